"""`self[:BACKING]`: our own device in service on real host memory, without a ring: requests are decoded straight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vhost_user.errors import PeerError
from virtio_mem.conformance.target import FILL, Capability, Chain, Used
from virtio_mem.conformance.targets.in_process import OURS, InProcess, InProcessTarget, Made, Parts, alive
from virtio_mem.protocol import RESPONSE_SIZE, ConfigSpace, Feature


class OurSubject(InProcess):
    """A device that is asked without a ring."""

    def __init__(self, made: Made) -> None:
        super().__init__(made)
        self._has_driver = False
        self.offered_features = int(self.service.device.offered_features | Feature.VERSION_1)

    def begin(self, features: int) -> bool:
        """As a transport would: what was not offered and what the device does not take leaves FEATURES_OK unset."""
        self.device_reset()
        if features & ~self.offered_features or Feature.VERSION_1 not in Feature(features):
            return False
        with alive():
            try:
                self.service.device.negotiate(features)
            except PeerError:
                return False
            self._has_driver, self._notices = True, 0
            self._collect_notices()
        return True

    def config(self) -> ConfigSpace:
        """By way of its 56 bytes."""
        with alive():
            return ConfigSpace.decode(self.service.device.config.encode())

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        """One request after the other."""
        with alive():
            answers = [self.parts.answer(self.service, chain.request) for chain in chains]
            self._collect_notices()
        return [Used(len(answer), answer.ljust(RESPONSE_SIZE, FILL)) for answer in answers]

    def device_reset(self) -> None:
        """See `Subject`."""
        with alive():
            self.service.device_reset()
        self._has_driver = False

    def system_reset(self) -> None:
        """See `Subject`."""
        with alive():
            self.service.system_reset()
        self._has_driver = False

    def _collect_notices(self) -> None:
        # Without a driver a notice waits, as in front of every transport.
        if self._has_driver and self.service.device.take_config_notice():
            self._notices += 1


class OurTarget(InProcessTarget):
    """Our device; see `InProcessTarget`."""

    kind = "self"
    abilities: ClassVar[Capability] = ~(
        Capability.CHAINS
        | Capability.RING
        | Capability.START
        | Capability.REGISTERS
        | Capability.CONFIG_WRITES
        | Capability.SLEEP
        | Capability.BOOT_MEMORY
    )

    def __init__(self, backing: str = "memfd", *, parts: Parts = OURS, name: str = "") -> None:
        super().__init__(name or f"self:{backing}", backing, parts)

    def _made(self, made: Made) -> InProcess:
        return OurSubject(made)
