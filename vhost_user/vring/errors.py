"""What can go wrong with a whole ring, as opposed to one chain of it."""

from vhost_user.errors import PeerError, UsageError


class RingBroken(PeerError):  # noqa: N818
    """The other side left the ring in a state in which nothing can be answered. Only a ring made anew can go on."""


class QueueFull(UsageError):  # noqa: N818
    """The ring has no room for another chain until the device has used one."""
