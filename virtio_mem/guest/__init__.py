"""A simulated guest: the driver's side of virtio-mem, behaving as Linux's driver does, in a process of its own."""
