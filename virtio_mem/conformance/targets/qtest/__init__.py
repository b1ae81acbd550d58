"""A virtio-mem device inside QEMU, with us in the processor's place: no guest, no firmware that runs, no KVM."""
