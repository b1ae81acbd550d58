"""`python -m virtio_mem`: the command `virtio-mem`, also where it was not installed."""

import sys

from virtio_mem.cli import main

if __name__ == "__main__":
    sys.exit(main())
