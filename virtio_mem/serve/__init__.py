"""virtio-mem devices in service as a vhost-user daemon: the front end has the memory, we say what of it is plugged.

daemon.py starts it, worker.py serves, device.py is the device to the vhost-user back end, memory.py the front end's
memory to the device, state.py and intent.py what outlives a worker. Nothing is imported here: the process that only
holds the sockets stays small.
"""
