"""QEMU's own virtio-mem as a target: the qtest protocol, QEMU that fails, and QEMU that works."""
