"""What the kit judges: a virtio-mem device, whoever made it, behind one small interface.

A `Target` is what the user named; it starts devices. A `Subject` is one such device, with its driver's side and its
host's side. An adapter implements what its kind of target has, and says in `capabilities` what that is: a check that
needs more is "not testable here", with the reason that `Target.lacks` gives.

Nothing here judges. An adapter passes on what it saw, also what no device should do: it raises `TargetFailure` only
where the device is gone, hangs, or breaks the transport itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Flag, IntFlag, auto
from typing import NamedTuple, Self

from vhost_user.units import MIB
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, ConfigSpace, Feature, Request, RequestType


class Capability(Flag):
    """What can be done with a target's devices besides negotiating, reading the configuration space and requests."""

    RESTART = auto()
    """Each `Target.start()` gives a device that has just been made."""
    WISH = auto()
    """`start()` makes the device as the `Wish` says; else the device is what it is."""
    SET_TARGET = auto()
    """`Subject.set_target`."""
    TIME = auto()
    """`Subject.advance` moves the device's clock without waiting; else it waits."""
    SYSTEM_RESET = auto()
    """`Subject.system_reset`."""
    NOTICES = auto()
    """`Subject.take_notices` counts configuration change notices."""
    CHAINS = auto()
    """The kit lays out the ring: `Chain.readable`, `Chain.room`, `Chain.indirect`, and several chains a kick."""
    HELD = auto()
    """`Subject.held` says how many bytes the host holds."""
    CONTENT = auto()
    """`Subject.read` and `Subject.write` reach the memory as the guest would."""
    HOST_REFUSES = auto()
    """`Subject.refuse` has the host out of memory."""
    PAUSE = auto()
    """`Subject.pause`."""
    RING = auto()
    """The ring lies open: `Subject.offer`, `kick`, `look` and `overrun`, and of a chain `fill` and `odd`."""
    START = auto()
    """`Subject.prepare` and `go`: what comes before DRIVER_OK can be seen. Together with RING."""
    REGISTERS = auto()
    """`Subject.registers` reads what the transport says of the device."""
    CONFIG_WRITES = auto()
    """`Subject.write_config` writes where a driver has nothing to write."""
    UNPLUGGED = auto()
    """`Subject.read` reaches unplugged blocks of the usable region as well, as a guest's processor would."""
    SLEEP = auto()
    """`Subject.sleep` and `wake`."""
    BOOT_MEMORY = auto()
    """`Subject.boot_memory`."""


class TargetFailure(Exception):  # noqa: N818
    """The device is gone, does not answer in time, or broke the transport. `what` says it in words.

    During a check it is a violation, the worst there is. While a target is started it means that nothing can be judged.
    `silent`: it was time that ran out, as it will again where the device hangs.
    """

    def __init__(self, what: str, *, silent: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.silent = silent


class Refused(Exception):  # noqa: N818
    """The host's side turned a target (`set_target`) down, with its own words. That is no failure."""


@dataclass(frozen=True)
class Wish:
    """The device that a check would like. Sizes in bytes; `requested_size` is the target at start.

    `node_id` None: without ACPI_PXM. A target without `Capability.WISH` gives what it has.
    """

    region_size: int = 128 * MIB
    block_size: int = 2 * MIB
    requested_size: int = 0
    node_id: int | None = None


RING_SIZE = 64
"""Descriptors of the ring: what a check has in flight at one time."""

LEAST_RING = 8
"""A ring of fewer is none to judge a device's way with rings by: chains have five descriptors at least there."""

FILL = b"\xa5"
"""What the room for an answer is filled with before the kick, so that what was not written can be told."""


class Odd(IntFlag):
    """What has no meaning where a chain lies in an indirect table, and may be anything."""

    WRITE = 1
    """The write flag of the descriptor that points at the table."""
    FLAGS = 2
    """In a packed ring's table, each flag but the write flag and the indirect flag."""
    IDS = 4
    """In a packed ring's table, the ids."""


class Chain(NamedTuple):
    """One buffer on the ring: a request and the room for its answer.

    `readable` are the lengths of the readable descriptors, which `request` is spread over, zeros behind it; `room`
    those of the writable ones. `indirect` puts the descriptors into a table of their own. Without `Capability.CHAINS`
    only the defaults are possible, and the last two take `Capability.RING`: `fill` is another byte in the room than
    FILL, and `odd` sets what has no meaning in a descriptor.
    """

    request: bytes
    readable: tuple[int, ...] = (REQUEST_SIZE,)
    room: tuple[int, ...] = (RESPONSE_SIZE,)
    indirect: bool = False
    fill: int = FILL[0]
    odd: Odd = Odd(0)


class Asks(NamedTuple):
    """What the driver's area of the ring says of used buffer notifications.

    `flags` are the format's own numbers: those of a split ring's available ring, or of a packed ring's event area. The
    event that is named is the next entry to be used (descriptor, where the ring is packed), or `ahead` further on.
    """

    flags: int = 0
    ahead: int = 0


class Seen(NamedTuple):
    """What has become of the chains that were offered: in their order what came back, None for what did not yet.

    `notified`: whether a used buffer notification came since the last look. `flags` is what the device's area says: a
    split ring's used flags, or those of a packed ring's event area.
    """

    used: tuple[Used | None, ...]
    notified: bool
    flags: int


class Registers(NamedTuple):
    """What the transport says of the device; None for what it has no register for.

    `queues` counts virtqueues, `queue_size` is the most entries that queue 0 can have, `status` the device status.
    """

    virtio_id: int | None = None
    queues: int | None = None
    queue_size: int | None = None
    status: int | None = None
    generation: int | None = None


class Used(NamedTuple):
    """What came back of a chain: the length that the device said it wrote, and all the bytes of the room.

    `flagged` is False where a packed ring's used descriptor has the length and not the write flag, without which the
    length has no meaning. Drivers that exist take it all the same, and so does the kit, but for what it says of that.
    """

    length: int
    room: bytes
    flagged: bool = True


class Subject(ABC):
    """A device that runs. Its driver has not begun yet: `begin()` is the first thing to call."""

    offered_features: int
    """Feature bits 0 to 63, those of the ring and the transport included."""

    ring_size: int = RING_SIZE
    """Descriptors that the ring has, where there is one."""

    @abstractmethod
    def begin(self, features: int) -> bool:
        """Reset the device, negotiate exactly `features`, and go on to DRIVER_OK; whether FEATURES_OK stayed set.

        Where it did not, or the transport has no such thing and the device refuses otherwise, the device is left
        without a driver, and `begin` may be called again.
        """

    @abstractmethod
    def config(self) -> ConfigSpace:
        """The configuration space as the driver reads it. May be called before `begin`."""

    @abstractmethod
    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        """Make all of `chains` available, kick once, and wait for all to be used; in the order of `chains`.

        TargetFailure where one does not come back within the target's time limit.
        """

    @abstractmethod
    def device_reset(self) -> None:
        """The driver's reset: status 0, nothing after it. `begin` starts the driver anew."""

    @abstractmethod
    def close(self) -> None:
        """The device is not needed any more. Closing twice is allowed."""

    # What a target may have besides. Called only where `capabilities` says so.

    def set_target(self, requested_size: int) -> None:
        """The host wants `requested_size` bytes plugged. Refused where its side says no."""
        raise NotImplementedError

    def advance(self, seconds: float) -> None:
        """Let time go by. A target without `Capability.TIME` may only be asked for a few seconds."""
        raise NotImplementedError

    def system_reset(self) -> None:
        """Reset the machine, after which the driver has to `begin` again."""
        raise NotImplementedError

    def take_notices(self) -> int:
        """How many configuration change notices came since this was last asked, or since `begin`."""
        raise NotImplementedError

    def held(self, offset: int, size: int) -> int:
        """Bytes that the host holds for `size` bytes at `offset` of the region, both multiples of the block size."""
        raise NotImplementedError

    def read(self, offset: int, size: int) -> bytes:
        """What the guest would read at `offset` of the region. Only of plugged blocks."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        """What the guest would write at `offset` of the region. Only to plugged blocks."""
        raise NotImplementedError

    def refuse(self, refuses: bool) -> None:
        """While `refuses`, the host has no memory to give, and can take none back."""
        raise NotImplementedError

    def pause(self, paused: bool) -> None:
        """While `paused`, blocks are to stay as they are."""
        raise NotImplementedError

    def prepare(self, features: int) -> bool:
        """`begin` up to DRIVER_OK, which is left out: features are agreed, and the device has its ring."""
        raise NotImplementedError

    def go(self) -> None:
        """DRIVER_OK, after `prepare`."""
        raise NotImplementedError

    def offer(self, chains: Sequence[Chain], asks: Asks) -> None:
        """Make all of `chains` available and tell nobody; those of before have come back, or are given up.

        After `device_reset` the ring is where it was, and the device knows of none.
        """
        raise NotImplementedError

    def kick(self) -> None:
        """Notify the device, whether it wants to be or not, and whether there is anything new or not."""
        raise NotImplementedError

    def look(self, whole: bool) -> Seen:
        """What came of the last `offer`: as soon as all did if `whole`, else what there is when all is quiet.

        TargetFailure where all was to come and did not in time, and where the device wrote what is not its to write:
        the descriptor table of a split ring, a buffer that it may only read, or beyond the room.
        """
        raise NotImplementedError

    def overrun(self) -> None:
        """Have a split ring's available index run ahead by more than the ring has entries, which none can serve."""
        raise NotImplementedError

    def sleep(self) -> None:
        """The machine goes to sleep, its memory being kept. The configuration space can be looked at meanwhile."""
        raise NotImplementedError

    def wake(self) -> None:
        """The machine wakes up, after which the driver has to `begin` again."""
        raise NotImplementedError

    def boot_memory(self) -> list[tuple[int, int]]:
        """Guest address and size of each range that the tables for boot, such as x86's e820, call RAM."""
        raise NotImplementedError

    def registers(self) -> Registers:
        """What the transport says now. May be called before `begin`."""
        raise NotImplementedError

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space, as a driver would that took it for writable. A refusal is as good."""
        raise NotImplementedError


class Target(ABC):
    """What the user named: `self:memfd`, `vhost-user:/run/mem0.sock`, `qemu`, `exec:./shim`."""

    name: str
    """As the user wrote it."""
    kind: str
    """One of self, ring, vhost-user, qemu, exec: which clauses must get a verdict depends on it."""
    version: str
    """What is being judged, for the report: a program and its version."""
    capabilities: Capability
    many: Wish | None = None
    """Of which hundreds of blocks may be plugged at a time; None where memory for it may lack: BUSY is no excuse."""

    @abstractmethod
    def start(self, wish: Wish) -> Subject:
        """A device to judge; at most one at a time. Close it before the next one is started.

        Without `Capability.RESTART` it is the same device as before, brought back to no plugged block as far as a
        driver can (UNPLUG ALL). UsageError where no such device can be as wished, TargetFailure where there is none.
        """

    @abstractmethod
    def close(self) -> None:
        """End what was started for it. Closing twice is allowed."""

    def lacks(self, wanted: Capability) -> str:
        """Why some of `wanted` is not there, for the report; "" where all of it is."""
        missing = wanted & ~self.capabilities
        return "" if not missing else f"{self.kind} can't: {', '.join(one.name or '' for one in missing)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clear(subject: Subject) -> None:
    """Bring a device that others used before as near to a new one as a driver can; it has no driver afterwards.

    Whether it obeys is not looked at. TargetFailure where it is gone.
    """
    if subject.begin(subject.offered_features & int(sum(Feature))):
        subject.submit([Chain(Request(RequestType.UNPLUG_ALL).encode())])
    subject.device_reset()
