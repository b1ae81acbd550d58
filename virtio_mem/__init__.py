"""A virtio-mem device and the guest memory around it."""
