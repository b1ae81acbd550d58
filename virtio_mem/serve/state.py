"""A device's state in memory that outlives its process: a memfd that the supervisor keeps, or a file.

    byte 0     magic, version, geometry, a checksum over them: written once, the magic last
    byte 128   the sizes and counters, slot A       generation, values, checksum
    byte 192   the same, slot B
    byte 256   the record of the request in hand    (intent.py)
    byte 4096  the map of blocks, block n in bit n % 8 of byte n // 8; the map that the device uses, not a copy

The sizes are written to the slot that is the older one: its generation to 0, the values, the checksum, and last the new
generation. So one of the two is whole at any moment, and the one with the higher generation counts. The bits of the map
are changed in place, many at a time; whoever is stopped in there has a record that says which bits are to be what.

To load is to parse: size, magic, checksum, geometry, a slot that is whole, the record, then, after the record's bits
were put again, no bit beyond the usable region. Whatever is wrong raises UsageError, and nothing was changed. A new
file is all zeros, and one in which the magic never came is as good as new.

A file in a directory of the user's keeps the state across the service's own restarts. When the machine goes down, so
does every guest; a file that was torn then is refused, or says of blocks what a driver's first UNPLUG ALL puts right.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.mapping import Mapping, map_part
from vhost_user.units import ByteCount, HostOffset, align_up
from virtio_mem._native import RECORD_WORDS, Record
from virtio_mem.blocks import BlockMap
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.serve.intent import ChainKey, Chains, Intent, IntentRecord, Phase
from virtio_mem.serve.words import Words
from virtio_mem.tally import MOST_BYTES

MAGIC = int.from_bytes(b"vmemstat", "little")
VERSION = 2

_PAGE = 4096
_SLOTS = (16, 24)  # words
_RECORD = 32
_HEADER = struct.Struct("=6Q")  # version, addr, region_size, block_size, node_id + 1, nb_blocks
_SIZES = struct.Struct("=6Q")  # generation, requested_size, usable_region_size, flags, unplugged and unreturned bytes
_PAUSED, _UNRESTORED = 1, 2  # of the flags
_MOST_GENERATIONS = 1 << 63  # so that whatever is found can be counted on
_CHECKSUM = 7  # the word of a slot; of the header too


def state_size(geometry: Geometry) -> ByteCount:
    """Bytes of the state of a device."""
    return ByteCount(_PAGE + align_up(-(-geometry.nb_blocks // 8), _PAGE))


def _mapped(fd: int, size: int) -> Mapping:
    if (found := os.fstat(fd).st_size) != size:
        raise _damaged("size", found, f"has to be {size}, that of a device of this geometry")
    try:
        mapping, _ = map_part(fd, 0, size)
    except PeerError as error:
        raise HostError("state", error.value, error.limit) from error
    return mapping


def is_blank(fd: int) -> bool:
    """Whether the file of a state, or one that is to be it, is as good as new."""
    return not any(os.pread(fd, 8, 0))


def make_blank(fd: int) -> None:
    """Have it be so. Nobody has it open."""
    os.pwrite(fd, bytes(8), 0)


class DeviceState:
    """The state in the file `fd` of a device of this geometry, mapped; the descriptor stays the caller's.

    `device` is the device that it says. Where the file is blank it is a new one with the target `requested_size`; or,
    if that is given, it is where `saved` is, paused, and memory has yet to be as a snapshot says. Raises UsageError for
    a file that holds something else, HostError where the host can't map it.
    """

    def __init__(
        self,
        fd: int,
        geometry: Geometry,
        *,
        requested_size: int,
        unplugged_inaccessible: bool = True,
        saved: VirtioMemDevice | None = None,
    ) -> None:
        size = state_size(geometry)
        self._mapping = _mapped(fd, size)
        self._words = Words(self._mapping.view(HostOffset(0), ByteCount(_PAGE)))
        self._record_words = self._words.part(_RECORD, RECORD_WORDS)
        self.record = Record(self._record_words.view)
        """Where the C core puts requests on record that it answers at once."""
        self._bits = self._mapping.view(HostOffset(_PAGE), ByteCount(size - _PAGE))
        self._blocks: BlockMap | None = None
        self._intents: IntentRecord | None = None
        self.serving: Chains | None = None
        """What is opened now is for these chains, or for the first of them; None where it is for none."""
        self._unanswered: set[ChainKey] = set()
        self._counted: set[ChainKey] = set()
        self._answering: ChainKey | None = None
        self._aside: tuple[Intent, set[ChainKey], set[ChainKey]] | None = None
        self._generation = 0
        self._saved: tuple[int, ...] = ()
        """The sizes and counters of the newer slot, as far as this process wrote it."""
        self.intent: Intent | None = None
        """The record of a process before this one, as far as something is to be done about it; or of this one, of
        requests whose driver has no answer."""
        self.interrupted: Intent | None = None
        """The record that was found. The device is already what it says, where it says that it was granted."""
        self.unrestored = False
        """Whether what its blocks are to hold is in a snapshot still, and not in memory."""
        self.counted = 0, 0
        """What `counters` said in the process before."""
        self.counters: Callable[[], tuple[int, int]] = lambda: self.counted
        """Asked for the bytes that were unplugged and that were not returned, whenever the sizes are written."""
        try:
            self.device = VirtioMemDevice(
                geometry, requested_size=requested_size, unplugged_inaccessible=unplugged_inaccessible
            )
            self.blank = self._words[0] == 0
            if self.blank:
                self._format(geometry, saved)
            self._load(geometry)
        except BaseException:
            self.close()
            raise

    # What it holds.

    def _format(self, geometry: Geometry, saved: VirtioMemDevice | None) -> None:
        """Make a blank file the state of a device that is new or was saved. Until the magic is there it is none."""
        bits = b"" if saved is None else saved.blocks.to_bytes()
        self._bits[:] = bits + bytes(len(self._bits) - len(bits))
        for index in range(1, _RECORD + RECORD_WORDS):
            self._words[index] = 0
        header = _header(geometry)
        for index, value in enumerate(struct.unpack("=6Q", header), 1):
            self._words[index] = value
        self._words[_CHECKSUM] = zlib.crc32(header)
        self.unrestored = saved is not None
        self._save(saved or self.device, paused=self.unrestored)
        self._words[0] = MAGIC

    def _load(self, geometry: Geometry) -> None:
        words = self._words
        if words[0] != MAGIC:
            raise _damaged("magic", f"{words[0]:#x}", f"has to be {MAGIC:#x}")
        header = struct.pack("=6Q", *(words[index] for index in range(1, 7)))
        if zlib.crc32(header) != words[_CHECKSUM]:
            raise _damaged("checksum", words[_CHECKSUM], f"has to be {zlib.crc32(header)}, that of the header")
        if header != _header(geometry):
            raise _other_device(_HEADER.unpack(header), _HEADER.unpack(_header(geometry)))
        requested, usable, flags = self._load_sizes()
        self._intents = IntentRecord(self._record_words, geometry.nb_blocks)
        self._load_blocks(geometry, requested, usable)
        self.device.paused, self.unrestored = bool(flags & _PAUSED), bool(flags & _UNRESTORED)
        self.interrupted = self.intent = intent = self._intents.read()
        if intent is None:
            return
        self._unanswered = set(intent.chains)
        end = (intent.run.first + intent.run.nb_blocks) * geometry.block_size
        if intent.type is EffectType.PLUG and end > usable:
            raise _damaged("intent", f"bytes up to {end}", f"has to be within usable_region_size, {usable}")
        if intent.phase is Phase.GRANTED:
            self.counted = max(self.counted[0], intent.unplugged), self.counted[1]
            self.finish(intent)

    def _load_sizes(self) -> tuple[int, int, int]:
        best = (0, 0, 0, 0, 0, 0)
        for start in _SLOTS:
            values = tuple(self._words[start + index] for index in range(6))
            checksum = zlib.crc32(_SIZES.pack(*values))
            if best[0] < values[0] < _MOST_GENERATIONS and checksum == self._words[start + _CHECKSUM]:
                best = values  # type: ignore[assignment]
        self._generation, requested, usable, flags, unplugged, unreturned = best
        self.counted = min(unplugged, MOST_BYTES), min(unreturned, MOST_BYTES)  # versions before counted on
        if not self._generation:
            raise _damaged("sizes", "none", "one of two slots has to be whole")
        return requested, usable, flags

    def _load_blocks(self, geometry: Geometry, requested: int, usable: int) -> None:
        padding = int.from_bytes(self._bits[geometry.nb_blocks // 8 :], "little") >> geometry.nb_blocks % 8
        if padding:
            raise _damaged("bits", "more", f"has to be those of {geometry.nb_blocks} blocks")
        self._blocks = BlockMap(geometry.nb_blocks, self._bits)
        try:
            self.device.adopt(requested, usable, self._blocks)
        except UsageError as error:
            raise _damaged(error.field, error.value, error.limit) from error

    # What the service tells; see virtio_mem/keeper.py.

    def opening(self, effect: Effect) -> None:
        """The host is about to act."""
        if self.intent is not None:
            assert effect.type is EffectType.SYSTEM_RESET, "what was left is brought to an end before a chain is taken"
            self._aside = self.intent, self._unanswered, self._counted
        self._forget()
        unplugged = 0
        if effect.type is not EffectType.PLUG:
            unplugged = self.counters()[0] + (self.device.plugged_size if effect.everything else effect.size)
        self._record.open(effect, self.serving, min(unplugged, MOST_BYTES))

    def granted(self, effect: Effect) -> None:
        """The host has acted."""
        del effect
        self._aside = None
        self._record.grant()

    def changed(self) -> None:
        """The device changed."""
        self._save(self.device, paused=self.device.paused)

    def done(self) -> None:
        """What was opened came to its end: refused, or with the answers of what was served at the driver."""
        if self._aside is not None:
            self._put_back(*self._aside)
        elif self.intent is None:
            self._record.clear()
        elif self.intent.phase is Phase.GRANTED:
            if self._answering is not None:
                self._unanswered.remove(self._answering)
                self._answering = None
            if not self._unanswered:
                self.undone()

    def plugged_at_once(self, *, lost: bool) -> None:
        """The C core has granted requests that are on record, and the driver has the answers, unless they are lost."""
        if lost:
            self.unanswered()
        else:
            self.done()

    def unanswered(self) -> None:
        """The driver has not got the answers of what was served: its chains may come again, to this process too."""
        if self._answering is not None:
            self._counted.add(self._answering)
            self._answering = None
        elif self.intent is None:
            self.intent = self._record.read()
            self._unanswered = set() if self.intent is None else set(self.intent.chains)
            self._counted = self._unanswered.copy()

    def _put_back(self, intent: Intent, unanswered: set[ChainKey], counted: set[ChainKey]) -> None:
        """A system reset was refused: what there was to be done before it is still to be done."""
        if intent.type is not EffectType.SYSTEM_RESET:
            self._record.uncover()
        self.intent, self._unanswered, self._counted, self._aside = intent, unanswered, counted, None

    def _forget(self) -> None:
        self.intent, self._answering = None, None
        self._unanswered, self._counted = set(), set()

    @property
    def _record(self) -> IntentRecord:
        assert self._intents is not None
        return self._intents

    def _save(self, device: VirtioMemDevice, *, paused: bool) -> None:
        flags = _PAUSED * paused | _UNRESTORED * self.unrestored
        sizes = device.requested_size, device.usable_region_size, flags, *self.counters()
        if sizes == self._saved:  # a PLUG changes none of them
            return
        values = (self._generation + 1, *sizes)
        checksum = zlib.crc32(_SIZES.pack(*values))  # which refuses what has no room, before anything is changed
        words, start = self._words, _SLOTS[values[0] % 2]
        words[start] = 0
        for index in range(1, 6):
            words[start + index] = values[index]
        words[start + _CHECKSUM] = checksum
        words[start] = values[0]
        self._generation, self._saved = values[0], sizes

    def restored(self) -> None:
        """Memory is as the snapshot says."""
        self.unrestored = False
        self.changed()

    # What a process before this one left, or this one.

    def granted_before(self, chain: ChainKey) -> bool:
        """Whether the request in this chain was granted, and only its answer is to be given. Any other record of
        requests that were granted is of no use any more, and goes."""
        intent = self.intent
        if intent is None:
            return False
        assert intent.phase is Phase.GRANTED, "what was opened is brought to an end before a chain is taken"
        if chain in self._unanswered:
            self._answering = chain
            return True
        self.undone()
        return False

    def counted_before(self, chain: ChainKey) -> bool:
        """Whether this chain was granted before, and this process has counted its answer."""
        return chain in self._counted & self._unanswered

    def undone(self) -> None:
        """What was opened, by whatever process, is of no use any more: its requests are served afresh."""
        self._forget()
        self._record.clear()

    def finish(self, intent: Intent) -> None:
        """Have the device be as the record of `intent` wants it, whose memory was given back, or is there."""
        if intent.phase is Phase.OPEN:
            self._record.grant()
        self.intent = replace(intent, phase=Phase.GRANTED)
        self.device.finish(intent.type, intent.run)
        self.changed()
        if not intent.chains:
            self.done()

    def close(self) -> None:
        """Unmap. The device is of no use any more."""
        if self._blocks is not None:
            self._blocks.release()
        self.record.release()
        self._record_words.release()
        self._words.release()
        self._bits.release()
        self._mapping.close()


def _header(geometry: Geometry) -> bytes:
    node = 0 if geometry.node_id is None else geometry.node_id + 1
    return _HEADER.pack(VERSION, geometry.addr, geometry.region_size, geometry.block_size, node, geometry.nb_blocks)


def _other_device(found: tuple[int, ...], wanted: tuple[int, ...]) -> UsageError:
    for name, value, want in zip(
        ("version", "addr", "region_size", "block_size", "node_id", "nb_blocks"), found, wanted, strict=True
    ):
        if value != want:
            was, has_to_be = (each if name != "node_id" else each - 1 if each else "none" for each in (value, want))
            limit = f"has to be that of the zone, {has_to_be}"
            return UsageError(f"state {name}", was, limit, "remove the state, or change --zone")
    raise AssertionError("they are the same")


def _damaged(field: str, value: object, limit: str) -> UsageError:
    return UsageError(f"state {field}", value, limit, "remove the state: it is damaged or another's")
