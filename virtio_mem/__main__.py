"""`python -m virtio_mem`: the command `virtio-mem`, also where it was not installed, and what that begins with."""

import sys


def main() -> int:
    """The command; the exit status. Ctrl-C may come while its modules are read."""
    try:
        from virtio_mem.cli import main as command  # noqa: PLC0415 - it takes the most of the start

        return command()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
