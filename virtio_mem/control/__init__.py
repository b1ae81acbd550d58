"""A machine's memory as its operator sees it: sizes to set, operations to wait for, events, and what there is to know.

The interfaces that an operator uses, the HTTP API above all, stand on `Control`.
"""

from virtio_mem.control.control import Control
from virtio_mem.control.hooks import Hooks
from virtio_mem.control.reclaim import reclaim
from virtio_mem.control.zone import ControlledZone, UnknownZone

__all__ = ["Control", "ControlledZone", "Hooks", "UnknownZone", "reclaim"]
