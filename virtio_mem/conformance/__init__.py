"""The conformance kit: what is wrong with a virtio-mem device, whoever made it."""
