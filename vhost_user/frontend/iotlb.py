"""The front end's IOMMU: which I/O virtual addresses the device may use, and what they stand for.

With VIRTIO_F_IOMMU_PLATFORM negotiated the back end knows nothing of guest addresses. It asks on its channel for the
addresses that its rings hold, and is told here what the guest has mapped there. What is not mapped, or not for that
access, is not answered, as the document has it: the back end's ring waits.

The question comes on one socket and the answer goes by another one, on which a request may be waiting for its reply;
then the answer is sent right after that. What the guest unmaps is taken from the back end before `unmap` returns: it
said so itself. A new back end knows nothing, and asks for what it needs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vhost_user.errors import FieldError, PeerError, Refused, UsageError
from vhost_user.message import U64, FrontendRequest, Iotlb, IotlbPermission, IotlbType, Payload
from vhost_user.units import U64_MAX, ByteCount, GuestAddress, UserAddress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vhost_user.frontend.regions import SharedRegions
    from vhost_user.frontend.requests import Requests
    from vhost_user.owned_fd import OwnedFd


@dataclass(frozen=True)
class IovaMapping:
    """`size` bytes from `iova` on stand for those from `guest_address` on; `permission` is the device's."""

    iova: GuestAddress
    size: ByteCount
    guest_address: GuestAddress
    permission: IotlbPermission

    @property
    def end(self) -> int:
        """The IOVA behind the last byte."""
        return self.iova + self.size


class Iommu:
    """The mappings for one device. Any thread may call it; `active` says whether the back end goes by them."""

    def __init__(self, requests: Requests, regions: SharedRegions) -> None:
        self.active = False
        self.updates = self.updates_failed = self.invalid_misses = 0
        """Misses that were answered, that could not be, and that had no answer."""
        self._requests = requests
        self._regions = regions
        self._starts: list[int] = []
        self._mappings: dict[int, IovaMapping] = {}
        self._to_tell: set[int] = set()

    def __iter__(self) -> Iterator[IovaMapping]:
        with self._requests.lock:
            return iter([self._mappings[start] for start in self._starts])

    def begin(self, *, active: bool) -> None:
        """A back end came that was told nothing yet; whether it is to ask."""
        self.active = active
        self._to_tell.clear()

    def map(
        self,
        iova: GuestAddress,
        size: ByteCount,
        guest_address: GuestAddress,
        permission: IotlbPermission = IotlbPermission.READ_WRITE,
    ) -> IovaMapping:
        """Let `size` bytes from `iova` on stand for those at `guest_address`, which lie in one region that is shared.

        The back end is told when it asks. Raises UsageError for a mapping that is empty, wraps, overlaps another one,
        allows nothing, or is not within a shared region.
        """
        with self._requests.lock:
            if size < 1 or not 0 <= iova <= U64_MAX - (size - 1):
                raise UsageError(
                    "iova", f"{iova:#x}+{size:#x}", "has to be 1 byte or more, that end at 2**64 or before"
                )
            if permission is IotlbPermission.NO_ACCESS:
                raise UsageError("permission", permission.name, "has to be some access", "leave it unmapped")
            at = bisect_right(self._starts, iova)
            for start in self._starts[max(at - 1, 0) : at + 1]:
                other = self._mappings[start]
                if other.iova < iova + size and iova < other.end:
                    limit = f"overlaps the mapping at {other.iova:#x}+{other.size:#x}"
                    raise UsageError("iova", f"{iova:#x}+{size:#x}", limit, "unmap that one first")
            self._regions.to_user(guest_address, size)
            mapping = IovaMapping(iova, size, guest_address, permission)
            insort(self._starts, iova)
            self._mappings[iova] = mapping
            return mapping

    def unmap(self, mapping: IovaMapping) -> None:
        """Take a mapping away: when this returns the back end can't reach anything by it, or is gone.

        Raises UsageError for one that is not there. What `ask` raises, and Refused where the back end says that it
        failed, leave it unmapped here, and unknown there: close the connection if that matters.
        """
        with self._requests.lock:
            if self._mappings.get(mapping.iova) != mapping:
                raise UsageError("mapping", f"{mapping.iova:#x}+{mapping.size:#x}", "has to be one that map() returned")
            del self._mappings[mapping.iova]
            del self._starts[bisect_left(self._starts, mapping.iova)]
            if self.active and self._requests.connected:
                permission = IotlbPermission.NO_ACCESS
                self._tell(Iotlb(mapping.iova, mapping.size, UserAddress(0), permission, IotlbType.INVALIDATE))

    def to_guest(self, iova: GuestAddress) -> GuestAddress:
        """The guest address that an IOVA stands for. UsageError where it is not mapped."""
        mapping = self._find(iova)
        if mapping is None:
            raise UsageError("iova", f"{iova:#x}", "has to be an address that is mapped", "map it first")
        return GuestAddress(mapping.guest_address + iova - mapping.iova)

    def serve(self, payload: Payload, _: list[OwnedFd]) -> bool:
        """The channel's handler: answer a miss by an update; False for one that has no answer."""
        assert isinstance(payload, Iotlb)
        if not self.active or payload.type is not IotlbType.MISS:
            raise PeerError("IOTLB_MSG", payload.type.name, "has to be MISS, where IOMMU_PLATFORM was negotiated")
        mapping = self._find(payload.iova)
        if mapping is None or payload.perm & ~mapping.permission:
            self.invalid_misses += 1
            return False
        if mapping.iova not in self._to_tell:
            self._to_tell.add(mapping.iova)
            self._requests.when_free(partial(self._update, mapping.iova))
        return True

    def _find(self, iova: int) -> IovaMapping | None:
        at = bisect_right(self._starts, iova) - 1
        mapping = self._mappings[self._starts[at]] if at >= 0 else None
        return mapping if mapping is not None and iova < mapping.end else None

    def _update(self, iova: int) -> None:
        self._to_tell.discard(iova)
        mapping = self._mappings.get(iova)
        if mapping is None or not self._requests.connected:
            return
        try:
            user = self._regions.to_user(mapping.guest_address, mapping.size)
            self._tell(Iotlb(mapping.iova, mapping.size, user, mapping.permission, IotlbType.UPDATE))
        except FieldError:
            self.updates_failed += 1
            raise
        self.updates += 1

    def _tell(self, message: Iotlb) -> None:
        code = self._requests.ask(FrontendRequest.IOTLB_MSG, U64, message).value
        if code:
            raise Refused("IOTLB_MSG", message.type.name, f"was answered with failure {code}")
