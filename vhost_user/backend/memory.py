"""What a session does with the messages that share memory: whole tables, and single regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vhost_user.backend.answer import Answer, Handler
from vhost_user.backend.device import Device
from vhost_user.backend.negotiated import Negotiated
from vhost_user.backend.postcopy import PostcopyHandlers, told
from vhost_user.errors import PeerError
from vhost_user.message import U64, FrontendRequest, MemoryRegion, MemoryTable, SingleMemoryRegion
from vhost_user.owned_fd import OwnedFd

if TYPE_CHECKING:
    from vhost_user.backend.rings import RingHandlers


class MemoryHandlers:
    """The handlers of memory messages."""

    def __init__(self, device: Device, negotiated: Negotiated, rings: RingHandlers, postcopy: PostcopyHandlers) -> None:
        self._device = device
        self._negotiated = negotiated
        self._postcopy = postcopy
        self._memory = negotiated.memory
        self._rings = rings
        self.table: Mapping[FrontendRequest, Handler] = {
            FrontendRequest.SET_MEM_TABLE: self._set_mem_table,
            FrontendRequest.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            FrontendRequest.ADD_MEM_REG: self._add_mem_reg,
            FrontendRequest.REM_MEM_REG: self._rem_mem_reg,
        }

    def _set_mem_table(self, payload: MemoryTable, fds: list[OwnedFd]) -> Answer | None:
        if self._negotiated.postcopy:
            return self._set_postcopy_table(payload, fds)
        self._replace(payload, fds)
        return None

    def _replace(self, payload: MemoryTable, fds: list[OwnedFd]) -> None:
        self._memory.replace(list(zip(payload.regions, fds, strict=True)))
        self._negotiated.iotlb.memory_changed()
        self._rings.memory_moved()
        self._device.memory_changed(self._memory)

    def _set_postcopy_table(self, payload: MemoryTable, fds: list[OwnedFd]) -> Answer | None:
        """A table whose pages are yet to come; or, without regions, the acknowledgement of the one before."""
        if self._postcopy.unacknowledged and not payload.regions:
            self._postcopy.unacknowledged = False
            return None
        if self._rings.any_started:
            raise PeerError("memory table", "replaced", "every ring has to be stopped while memory is to come")
        self._replace(payload, fds)
        regions = self._memory.guest_memory.regions
        self._postcopy.watch(regions)
        return Answer(told(payload, regions).encode())

    def _get_max_mem_slots(self, *_: object) -> Answer:
        return Answer(U64(self._memory.max_regions).encode())

    def _add_mem_reg(self, payload: SingleMemoryRegion, fds: list[OwnedFd]) -> None:
        self._memory.add(payload.region, fds[0])
        self._negotiated.iotlb.memory_changed()
        self._device.memory_changed(self._memory)

    def _rem_mem_reg(self, payload: SingleMemoryRegion, _: list[OwnedFd]) -> None:
        self._require_no_ring(payload.region)
        self._memory.remove(payload.region)
        self._negotiated.iotlb.memory_changed()
        self._device.memory_changed(self._memory)

    def _require_no_ring(self, region: MemoryRegion) -> None:
        """The document doesn't say what becomes of a ring whose memory goes. It stays, and so does its region.

        Behind an IOMMU rings are nowhere in particular: what goes is missed, and asked for again.
        """
        if self._negotiated.translated:
            return
        ring = self._rings.within(region.guest_address, region.size)
        if ring is not None:
            raise PeerError(
                "region",
                f"{region.guest_address:#x}",
                f"{ring} runs in it",
                "stop the ring first",
            )
