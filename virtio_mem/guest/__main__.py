"""`python -m virtio_mem.guest`: see `process.main`."""

import sys

from virtio_mem.guest.process import main

sys.exit(main(sys.argv[1:]))
