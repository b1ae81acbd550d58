"""Whatever guest, host and daemons do: each living daemon has exactly the slots with a plugged block.

Daemons refuse, close after an acknowledgement, vanish and come back as Hypothesis likes. A request that was answered
BUSY has changed no block, and one that was acknowledged has changed those that it names.
"""

from __future__ import annotations

from contextlib import ExitStack

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.sharing.daemon import ADD, REM, TABLE
from tests.sharing.helpers import ACK, BLOCK, BUSY, ask, daemon_at, manage, service_of
from vhost_user.units import MIB
from virtio_mem.protocol import RequestType, ResponseType

BLOCKS = {"a": 24, "b": 10}
LINE = (
    "--memory size=0,hotplug_method=virtio-mem "
    f"--memory-zone id=a,size=2M,shared=on,hotplug_size={24 * 2}M,hotplugged_size={24 * 2}M "
    f"id=b,size=2M,shared=on,hotplug_size={10 * 2}M,hotplugged_size={10 * 2}M"
)
LIMITS = (None, 8, 13, 509)
"""Regions that a daemon takes, boot memory's two included: for slots of 8 to 16 blocks, of 4, and of one."""

zone_ids = st.sampled_from(sorted(BLOCKS))
daemons = st.integers(0, 2)


class Sharing(RuleBasedStateMachine):
    """A machine of two zones, and one to three daemons."""

    @initialize(limits=st.lists(st.sampled_from(LIMITS), min_size=1, max_size=3))
    def start(self, limits: list[int | None]) -> None:
        self.stack = ExitStack()
        self.manager = self.stack.enter_context(manage(LINE))
        self.daemons = [self.stack.enter_context(daemon_at(limit)) for limit in limits]
        self.shares = [self.manager.share(frontend) for _, frontend in self.daemons]
        self.gone: set[int] = set()
        self.plugged: dict[str, set[int]] = {zone_id: set() for zone_id in BLOCKS}

    def ask(self, type_: RequestType, zone_id: str, blocks: set[int]) -> ResponseType:
        misbehaving = {
            number
            for number, (daemon, _) in enumerate(self.daemons)
            if number not in self.gone and (daemon.refuses or daemon.closes_after)
        }
        answer = ask(self.manager, type_, min(blocks, default=0), len(blocks), zone_id)
        assert answer is ACK or (answer is BUSY and misbehaving)
        assert self.settle() <= misbehaving
        return answer

    def settle(self) -> set[int]:
        """Wait until those have closed their ends that were given up, or are about to, and let all behave; who is gone
        that was not."""
        for daemon, _ in self.daemons:
            if daemon.ending:
                daemon.end()
        lost = {number for number, share in enumerate(self.shares) if not share.connected} - self.gone
        for number, (daemon, _) in enumerate(self.daemons):
            daemon.behave()
            if number in lost:
                daemon.end()
        self.gone |= lost
        return lost

    @rule(zone_id=zone_ids, first=st.integers(0, 23), nb_blocks=st.integers(1, 12))
    def plug(self, zone_id: str, first: int, nb_blocks: int) -> None:
        blocks = set(range(first, min(first + nb_blocks, BLOCKS[zone_id])))
        if blocks and not blocks & self.plugged[zone_id] and self.ask(RequestType.PLUG, zone_id, blocks) is ACK:
            self.plugged[zone_id] |= blocks

    @rule(zone_id=zone_ids, data=st.data())
    @precondition(lambda self: any(self.plugged.values()))
    def unplug(self, zone_id: str, data: st.DataObject) -> None:
        runs = list(service_of(self.manager, zone_id).device.blocks.plugged_runs())
        if runs:
            first, count = data.draw(st.sampled_from(runs))
            start = data.draw(st.integers(first, first + count - 1))
            blocks = set(range(start, data.draw(st.integers(start, first + count - 1)) + 1))
            if self.ask(RequestType.UNPLUG, zone_id, blocks) is ACK:
                self.plugged[zone_id] -= blocks

    @rule(zone_id=zone_ids)
    def unplug_all(self, zone_id: str) -> None:
        if self.ask(RequestType.UNPLUG_ALL, zone_id, set()) is ACK:
            self.plugged[zone_id].clear()

    @rule()
    def system_reset(self) -> None:
        for zone_id in BLOCKS:
            if service_of(self.manager, zone_id).system_reset():
                self.plugged[zone_id].clear()
            self.settle()

    @rule(number=daemons, what=st.sampled_from(["refuses", "closes_after"]), chances=st.integers(0, 4))
    def misbehave(self, number: int, what: str, chances: int) -> None:
        daemon, _ = self.daemons[number % len(self.daemons)]
        daemon.behave()
        getattr(daemon, what).update({ADD, REM, TABLE})
        daemon.chances = chances

    @rule(number=daemons)
    def vanish(self, number: int) -> None:
        number %= len(self.daemons)
        self.daemons[number][0].end()
        self.gone.add(number)

    @rule(number=daemons)
    def come_back(self, number: int) -> None:
        number %= len(self.daemons)
        daemon, frontend = self.daemons[number]
        daemon.behave()
        if number in self.gone:
            frontend.reconnect(daemon.start())
            self.gone.remove(number)

    @rule(number=daemons)
    def take_back_and_share_again(self, number: int) -> None:
        number %= len(self.daemons)
        daemon, frontend = self.daemons[number]
        if number not in self.gone:
            daemon.behave()
            self.shares[number].close()
            assert daemon.regions == {}
            self.shares[number] = self.manager.share(frontend)

    @invariant()
    def blocks_are_as_answered(self) -> None:
        if hasattr(self, "manager"):
            for zone_id, blocks in self.plugged.items():
                service = service_of(self.manager, zone_id)
                runs = service.device.blocks.plugged_runs()
                assert {first + n for first, count in runs for n in range(count)} == blocks
                assert service.failed_undos == 0

    @invariant()
    def daemons_have_what_is_plugged(self) -> None:
        if not hasattr(self, "manager"):
            return
        for number, ((daemon, frontend), share) in enumerate(zip(self.daemons, self.shares, strict=True)):
            expected = {(address, 2 * MIB) for address in (0, 2 * MIB)}
            for zone_id, blocks in self.plugged.items():
                expected |= self.slots(zone_id, blocks, share.plan.slot_size(zone_id))
            assert {(region.guest_address, region.size) for region in frontend.regions} == expected
            if number not in self.gone:
                assert {(region.guest_address, region.size) for region in daemon.regions.values()} == expected
                plugged = sum(map(len, self.plugged.values())) * BLOCK
                boot = 2 * 2 * MIB
                assert share.info()["shared_unplugged"] == sum(size for _, size in expected) - boot - plugged

    def slots(self, zone_id: str, blocks: set[int], slot_size: int) -> set[tuple[int, int]]:
        """Where the slots begin that have one of `blocks`, and how large they are."""
        region = service_of(self.manager, zone_id).device.geometry
        starts = {block * BLOCK // slot_size * slot_size for block in blocks}
        return {(region.addr + start, min(slot_size, region.region_size - start)) for start in starts}

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.stack.close()


def test_any_sequence() -> None:
    run_state_machine_as_test(Sharing)
