"""What the host holds for blocks that are not plugged is told apart from the rest, and can be given back."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

import virtio_mem.unplugged
from tests.api.rig import ACK, BLOCK, MakeMachine, Rig
from tests.device.helpers import make_device
from tests.device.test_service import Script, ScriptedMemory
from tests.host import HugePagePool
from tests.peers.processes import wait_until
from vhost_user.errors import HostError, UsageError
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset
from virtio_mem.blocks import BlockIndex, BlockMap, Run
from virtio_mem.control import reclaim as control_reclaim
from virtio_mem.control import watch
from virtio_mem.control.watch import LOOK_SECONDS
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.protocol import Request, RequestType, ResponseType
from virtio_mem.service import DeviceService
from virtio_mem.unplugged import held_unplugged, reclaim

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


def touch(rig: Rig, block: int, size: int = BLOCK) -> None:
    """As a guest does that does not care what is plugged."""
    memory = rig.service().memory
    assert isinstance(memory, HostMemory)
    with memory.view(HostOffset(block * BLOCK), ByteCount(size)) as view:
        view[:] = os.urandom(16) * (size // 16)


def told(rig: Rig) -> tuple[int, int | None, bool]:
    (zone,) = rig.get("/api/v1/vm.info").json["zones"]
    return zone["held"], zone["held_unplugged"], zone["held_unplugged_more"]


def measured(rig: Rig) -> float:
    lines = rig.get("/metrics").body.decode().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("virtio_mem_held_unplugged_bytes{"))
    return float(value)


def test_what_a_guest_touches_of_unplugged_blocks_is_seen_and_given_back(rig: Rig) -> None:
    assert rig.request(PLUG, 10, 5) is ACK
    touch(rig, 10, 5 * BLOCK)
    assert told(rig) == (5 * BLOCK, 0, False)
    assert rig.request(UNPLUG, 12) is ACK
    touch(rig, 12, MIB)  # written, unplugged, and touched again
    touch(rig, 511, 4096)  # beyond what is usable
    assert told(rig) == (4 * BLOCK + MIB + 4096, MIB + 4096, False)
    assert measured(rig) == MIB + 4096
    with rig.control.events.subscribe() as subscription:
        answer = rig.ask("PUT", "/api/v1/zones/mem0/reclaim")
        event = subscription.get(timeout=20)
    assert (answer.status, answer.json) == (200, {"freed": MIB + 4096, "held": 0})
    assert event is not None
    assert (event.kind, event.zone, event.details) == ("freed", "mem0", {"size": MIB + 4096, "held": 0})
    assert told(rig) == (4 * BLOCK, 0, False), "what is plugged stays"
    assert rig.ask("PUT", "/api/v1/zones/mem0/reclaim").json == {"freed": 0, "held": 0}


def test_it_is_told_as_it_grows(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with rig.control.events.subscribe() as subscription:

        def told_by(now: float) -> list[int]:
            rig.control.poll(now)
            rig.control.events.publish("saved")
            events = []
            while (event := subscription.get(timeout=20)) is not None and event.kind != "saved":
                assert (event.kind, event.zone) == ("touched", "mem0")
                events.append(event.details["size"])
            return events

        assert told_by(0) == []
        touch(rig, 3, 8192)
        assert told_by(LOOK_SECONDS - 1) == [], "it is not looked so often"
        assert told_by(LOOK_SECONDS) == [8192]
        assert told_by(2 * LOOK_SECONDS) == []
        touch(rig, 5, 4096)
        assert told_by(3 * LOOK_SECONDS) == [12288]
        assert rig.ask("PUT", "/api/v1/zones/mem0/reclaim").json["freed"] == 12288
        assert [event.kind for event in (subscription.get(20),) if event] == ["freed"]
        touch(rig, 5, 12288)
        assert told_by(4 * LOOK_SECONDS) == [12288], "anew, although it is as much as before"
        assert rig.ask("PUT", "/api/v1/zones/mem0/reclaim").json["freed"] == 12288
        assert [event.kind for event in (subscription.get(20),) if event] == ["freed"]
        touch(rig, 5, 4096)
        assert told_by(5 * LOOK_SECONDS) == [4096]
    lines = [record.message for record in caplog.records if "for unplugged blocks" in record.message]
    assert lines == [
        f"zone mem0: the host holds {size} bytes for unplugged blocks" for size in (8192, 12288, 12288, 4096)
    ]


def test_who_only_wants_to_know_is_answered_in_a_bounded_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1, 3, 5):
        assert rig.request(PLUG, block) is ACK
    for block in (0, 2, 4, 6):
        touch(rig, block, 8192)
    for runs, expected in ((3, (3 * 8192, True)), (4, (4 * 8192, False))):
        monkeypatch.setattr(virtio_mem.unplugged, "MOST_RUNS", runs)
        assert told(rig)[1:] == expected
    monkeypatch.setattr(virtio_mem.unplugged, "MOST_BYTES", 2 * 8192)
    assert told(rig)[1:] == (2 * 8192, True)
    monkeypatch.setattr(virtio_mem.unplugged, "MOST_BYTES", 4 * 8192)
    assert told(rig)[1:] == (4 * 8192, False), "there are no more"
    assert reclaim(rig.service()) == (4 * 8192, 0), "and all of it is given back"


def test_nothing_is_taken_from_a_paused_machine(rig: Rig) -> None:
    touch(rig, 0)
    rig.control.pause()
    refused = rig.ask("PUT", "/api/v1/zones/mem0/reclaim")
    assert (refused.status, refused.json["remedy"]) == (400, "resume it first")
    assert told(rig)[1] == BLOCK


def test_a_zone_that_is_not_there_or_has_no_device(rig: Rig, make_machine: MakeMachine) -> None:
    assert rig.ask("PUT", "/api/v1/zones/nosuch/reclaim").status == 404
    plain = make_machine("--memory size=64M,shared=on")
    assert plain.ask("PUT", "/api/v1/zones/mem0/reclaim").json == {"freed": 0, "held": 0}
    assert told(plain) == (0, 0, False)


def test_huge_pages(make_machine: MakeMachine, hugepages: Callable[[int, int], HugePagePool]) -> None:
    hugepages(2 * MIB, 5)
    rig = make_machine("--memory size=2M,hugepages=on,hugepage_size=2M,hotplug_method=virtio-mem,hotplug_size=512M")
    rig.service().resize(256 * MIB)
    assert rig.request(PLUG, 3, 2) is ACK
    assert told(rig) == (2 * BLOCK, 0, False), "a PLUG populates them"
    touch(rig, 9, 4096)
    assert told(rig) == (3 * BLOCK, BLOCK, False)
    assert rig.ask("PUT", "/api/v1/zones/mem0/reclaim").json == {"freed": BLOCK, "held": 0}
    assert told(rig) == (2 * BLOCK, 0, False)


def test_a_guest_waits_for_a_piece_of_what_is_given_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[tuple[int, int]] = []
    discard = HostMemory.discard

    def noted(memory: HostMemory, offset: HostOffset, size: ByteCount) -> bool:
        given_back.append((offset // BLOCK, size // BLOCK))
        return discard(memory, offset, size)

    monkeypatch.setattr(HostMemory, "discard", noted)
    monkeypatch.setattr(virtio_mem.unplugged, "PIECE", 4 * BLOCK)
    assert rig.request(PLUG, 6) is ACK
    for block in (1, 5, 7, 13):
        touch(rig, block, 4096)
    assert reclaim(rig.service()) == (4 * 4096, 0)
    assert given_back == [(0, 4), (4, 2), (7, 4), (11, 4)]


def test_a_look_that_takes_long_is_seldom(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SHARE", 1e12)
    with rig.control.events.subscribe() as subscription:
        rig.control.poll(0)
        touch(rig, 3, 4096)
        rig.control.poll(9 * LOOK_SECONDS)
        rig.control.events.publish("saved")
        event = subscription.get(20)
    assert event is not None
    assert event.kind == "saved"


class Busy(ScriptedMemory):
    """Holds 4096 bytes of whatever is asked about, and has a block plugged meanwhile."""

    kept = ByteCount(4096)
    blocks: BlockMap

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        found = super().held(offset, size)
        if len(self.asked) == 1:
            self.blocks.plug(Run(BlockIndex(6), 1))
        return found

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.asked.append((-1, size // BLOCK))


def busy() -> tuple[DeviceService, Busy]:
    device, memory = make_device(), Busy(Script())
    memory.blocks = device.blocks
    device.blocks.plug(Run(BlockIndex(4), 1))
    return DeviceService(device, memory), memory


def test_a_run_of_which_a_block_was_plugged_meanwhile_is_passed_over() -> None:
    service, memory = busy()
    assert held_unplugged(service) == (4096, False)
    assert memory.asked == [(0, 4)]
    service, memory = busy()
    assert reclaim(service) == (0, 4096), "what is held right afterwards is said"
    assert memory.asked == [(0, 4), (-1, 4), (0, 4)]


class Huge(ScriptedMemory):
    """Memory of huge pages, all of which somebody asks about while a guest has one more plugged, and unplugs it."""

    service: DeviceService | None = None

    @property
    def page_size(self) -> ByteCount:  # type: ignore[override]
        assert self.service is None or self.service.lock._is_mine(), "a front end may go at any moment"
        return ByteCount(BLOCK)

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        del offset, size
        assert self.service is not None
        assert ask(self.service, PLUG, 0, 2) is ACK
        held = self.service.device.plugged_size
        assert ask(self.service, UNPLUG, 0, 2) is ACK
        return ByteCount(held + self.strays), False

    strays = 0


def ask(service: DeviceService, type_: RequestType, block: int, count: int) -> ResponseType:
    geometry = service.device.geometry
    addr = GuestAddress(geometry.addr + block * geometry.block_size)
    return service.request(Request(type_, addr, count)).type


def test_huge_pages_that_come_and_go_while_they_are_counted_are_no_strays() -> None:
    device, memory = make_device(), Huge(Script())
    service = memory.service = DeviceService(device, memory, prefault=True)
    assert held_unplugged(service) == (0, False)
    memory.strays = 5 * BLOCK
    assert held_unplugged(service) == (5 * BLOCK, False)


def test_a_long_run_is_asked_about_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtio_mem.unplugged, "LOOKED_AT", 4 * BLOCK)
    device, memory = make_device(), ScriptedMemory(Script())
    nb_blocks = device.geometry.nb_blocks
    held_unplugged(DeviceService(device, memory))
    assert memory.asked == [(at, min(4, nb_blocks - at)) for at in range(0, nb_blocks, 4)]


def test_what_is_being_given_back_is_given_up_with_who_asked_for_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtio_mem.unplugged, "PIECE", BLOCK)
    for block in range(8):
        touch(rig, block, 4096)
    asked = iter([False, False, False, True])
    with rig.control.events.subscribe() as subscription:
        with pytest.raises(HostError, match="given up"):
            control_reclaim(rig.control, "mem0", lambda: next(asked))
        event = subscription.get(20)
    assert event is not None
    assert (event.kind, event.details) == ("freed", {"size": 3 * 4096, "held": 0})
    assert told(rig)[1] == 5 * 4096


def test_who_closes_the_api_waits_for_a_piece_of_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker does that another one takes the place of: until then no guest is served."""
    given_back = []

    def noted(memory: HostMemory, offset: HostOffset, size: ByteCount) -> bool:
        del memory, size
        given_back.append(offset)
        closing.start()
        wait_until(lambda: rig.server.stopping, "the server is being closed")
        return True

    monkeypatch.setattr(HostMemory, "discard", noted)
    monkeypatch.setattr(virtio_mem.unplugged, "PIECE", BLOCK)
    for block in range(8):
        touch(rig, block, 4096)
    closing = threading.Thread(target=rig.server.close)
    with suppress(http.client.HTTPException, OSError):
        rig.ask("PUT", "/api/v1/zones/mem0/reclaim")
    closing.join()
    assert given_back == [0]


def test_a_host_that_can_not_tell(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise HostError("held", 0, "no counters")

    for name in ("held", "held_at_least"):
        monkeypatch.setattr(HostMemory, name, refuse)
    assert told(rig)[1:] == (None, False)
    assert rig.ask("PUT", "/api/v1/zones/mem0/reclaim").status == 500
    assert "held_unplugged_bytes{" not in rig.get("/metrics").body.decode()


def test_a_region_without_blocks_holds_nothing() -> None:
    service = DeviceService(make_device(region=0, requested=0), ScriptedMemory(Script()))
    assert held_unplugged(service) == (0, False)
    assert reclaim(service) == (0, 0)


def test_a_closed_machine_is_not_looked_at(rig: Rig) -> None:
    touch(rig, 0)
    rig.service().close()  # as the manager begins with, in another thread: memory is unmapped at any moment from now on
    with pytest.raises(UsageError, match="closed"):
        reclaim(rig.service())
    with pytest.raises(HostError, match="closed"):
        held_unplugged(rig.service())
    rig.manager.close()
    rig.control.poll(0)
