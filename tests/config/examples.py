"""Option lines of Cloud Hypervisor's documentation: facts to be parsed, without its prose.

NEW     docs/memory.md of ae44c2971c83 (2026-08-22), the bracket syntax
EPC     docs/memory.md and docs/intel_sgx.md just before 2d9e24316386 (2025-08-15), which removed SGX
OLD     docs/memory.md just before b81d758c41a8 (2021-11-08), which replaced colons by brackets

Each entry is what stands in one example: the options of one machine. `--cpus`, `--device` and `--platform`, which
accompany some of them, are not options of memory and left out.
"""

NEW = [
    "--memory size=1G",
    "--memory size=1G,mergeable=on",
    "--memory size=1G,hotplug_method=acpi",
    "--memory size=1G,hotplug_size=1G",
    "--memory size=1G,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=512M",
    "--memory size=1G,shared=on",
    "--memory size=1G,hugepages=on,hugepage_size=2M",
    "--memory size=1G,prefault=on",
    "--memory size=1G,hugepages=on,reserve=on",
    "--memory size=1G,thp=on",
    "--memory size=0 --memory-zone id=mem0,size=1G",
    "--memory size=0 --memory-zone id=mem0,size=1G,file=/foo/bar",
    "--memory size=0 --memory-zone id=mem0,size=1G,shared=on",
    "--memory size=0 --memory-zone id=mem0,size=1G,hugepages=on,hugepage_size=2M",
    "--memory size=0 --memory-zone id=mem0,size=1G,host_numa_node=0",
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=mem0,size=1G,hotplug_size=1G",
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=mem0,size=1G,hotplug_size=1G,hotplugged_size=512M",
    "--memory size=0 --memory-zone id=mem0,size=1G,prefault=on",
    "--memory size=0 --memory-zone id=mem0,size=1G,hugepages=on,reserve=on",
    "--memory size=2G,mergeable=off --memory-zone id=hotplug,size=0,hotplug_size=8G,mergeable=on",
    "--memory size=0 --memory-zone id=mem0,size=1G,mergeable=on",
    "--numa guest_numa_id=0,cpus=[0-1],memory_zones=mem0",
    "--numa guest_numa_id=0,cpus=[1-3,7] guest_numa_id=1,cpus=[0,4-6]",
    (
        "--numa guest_numa_id=0,distances=[1@15,2@25] guest_numa_id=1,distances=[0@15,2@20]"
        " guest_numa_id=2,distances=[0@25,1@20]"
    ),
    "--numa guest_numa_id=0,distances=[1@15,2@25] guest_numa_id=1,distances=[2@20]",
    (
        "--numa guest_numa_id=0,cpus=[0-1],memory_zones=mem0,distances=[1@15]"
        " --numa guest_numa_id=1,cpus=[2-3],memory_zones=mem1"
    ),
    "--numa guest_numa_id=0,memory_zones=mem0 guest_numa_id=1,memory_zones=mem0",
    (
        "--memory size=0 --memory-zone id=mem0,size=1G id=mem1,size=1G id=mem2,size=1G"
        " --numa guest_numa_id=0,memory_zones=[mem0,mem2] guest_numa_id=1,memory_zones=mem1"
    ),
    (
        "--memory size=0 --memory-zone id=mem0,size=2G id=mem1,size=2G"
        " --numa guest_numa_id=0,cpus=[0-1],memory_zones=mem0,distances=[1@20,2@25]"
        " --numa guest_numa_id=1,cpus=[2-3],memory_zones=mem1,distances=[0@20,2@30]"
        " --numa guest_numa_id=2,device_id=gpu0,distances=[0@25,1@30]"
    ),
    (
        "--memory-zone size=16G,host_numa_node=0,id=mem0 --memory-zone size=16G,host_numa_node=1,id=mem1"
        " --numa guest_numa_id=0,memory_zones=mem0,pci_segments=[0]"
        " --numa guest_numa_id=1,memory_zones=mem1,pci_segments=[1]"
    ),
    # In the running text of the section on cpus.
    "--numa guest_numa_id=0,cpus=0-4",
    "--numa guest_numa_id=0,cpus=[0,1,2,3,4]",
    "--numa guest_numa_id=0,cpus=[0-99,255]",
]

EPC = [
    "--numa guest_numa_id=0",
    (
        "--sgx-epc id=epc0,size=32M id=epc1,size=64M id=epc2,size=32M"
        " --numa guest_numa_id=0,sgx_epc_sections=epc1 guest_numa_id=1,sgx_epc_sections=[epc0,epc2]"
    ),
    "--memory size=1G --sgx-epc id=epc0,size=64M,prefault=on id=epc1,size=32M,prefault=off",
]

OLD = [
    "--memory size=1G",
    "--memory size=1G,mergeable=on",
    "--memory size=1G,hotplug_method=acpi",
    "--memory size=1G,hotplug_size=1G",
    "--memory size=1G,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=512M",
    "--memory size=1G,shared=on",
    "--memory size=1G,hugepages=on,hugepage_size=2M",
    "--memory size=1G,prefault=on",
    "--memory size=0 --memory-zone id=mem0,size=1G",
    "--memory size=0 --memory-zone id=mem0,size=1G,file=/foo/bar",
    "--memory size=0 --memory-zone id=mem0,size=1G,shared=on",
    "--memory size=0 --memory-zone id=mem0,size=1G,hugepages=on,hugepage_size=2M",
    "--memory size=0 --memory-zone id=mem0,size=1G,host_numa_node=0",
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=mem0,size=1G,hotplug_size=1G",
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=mem0,size=1G,hotplug_size=1G,hotplugged_size=512M",
    "--memory size=0 --memory-zone id=mem0,size=1G,prefault=on",
    "--numa guest_numa_id=0",
    "--numa guest_numa_id=0,cpus=1-3:7 guest_numa_id=1,cpus=0:4-6",
    (
        "--numa guest_numa_id=0,distances=1@15:2@25 guest_numa_id=1,distances=0@15:2@20"
        " guest_numa_id=2,distances=0@25:1@20"
    ),
    "--numa guest_numa_id=0,memory_zones=mem0 guest_numa_id=1,memory_zones=mem0",
    (
        "--memory size=0 --memory-zone id=mem0,size=1G id=mem1,size=1G id=mem2,size=1G"
        " --numa guest_numa_id=0,memory_zones=mem0:mem2 guest_numa_id=1,memory_zones=mem1"
    ),
    (
        "--sgx-epc id=epc0,size=32M id=epc1,size=64M id=epc2,size=32M"
        " --numa guest_numa_id=0,sgx_epc_sections=epc1 guest_numa_id=1,sgx_epc_sections=epc0:epc2"
    ),
    # In the running text of the section on cpus.
    "--numa guest_numa_id=0,cpus=0-4",
    "--numa guest_numa_id=0,cpus=0:1:2:3:4",
    "--numa guest_numa_id=0,cpus=0-99:255",
]

REFUSED = {
    "--memory size=2G,mergeable=off --memory-zone id=hotplug,size=0,hotplug_size=8G,mergeable=on": "--memory size",
    "--numa guest_numa_id=0,distances=[1@15,2@25] guest_numa_id=1,distances=[0@15,2@20]"
    " guest_numa_id=2,distances=[0@25,1@20]": "--numa guest_numa_id",
    "--numa guest_numa_id=0,distances=[1@15,2@25] guest_numa_id=1,distances=[2@20]": "--numa guest_numa_id",
    "--numa guest_numa_id=0,distances=1@15:2@25 guest_numa_id=1,distances=0@15:2@20"
    " guest_numa_id=2,distances=0@25:1@20": "--numa guest_numa_id",
    "--numa guest_numa_id=0": "--numa guest_numa_id",
    "--numa guest_numa_id=0,cpus=[0-1],memory_zones=mem0,distances=[1@15]"
    " --numa guest_numa_id=1,cpus=[2-3],memory_zones=mem1": "--numa guest_numa_id=1 memory_zones",
    "--numa guest_numa_id=0,memory_zones=mem0 guest_numa_id=1,memory_zones=mem0": "--numa guest_numa_id=1 memory_zones",
    "--memory-zone size=16G,host_numa_node=0,id=mem0 --memory-zone size=16G,host_numa_node=1,id=mem1"
    " --numa guest_numa_id=0,memory_zones=mem0,pci_segments=[0]"
    " --numa guest_numa_id=1,memory_zones=mem1,pci_segments=[1]": "--memory size",
}
"""The examples that can't be a whole machine, by Cloud Hypervisor's own rules, and the field that is at fault.

Some show one option without what it refers to; one is there to show what is not allowed; one has zones along with a
`--memory` that is not 0, or with the `--memory` that is assumed where none is written."""
