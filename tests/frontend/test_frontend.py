"""What a front end agrees on, remembers, and sets up again with another back end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.fake import (
    ALL,
    FEATURES,
    LATE,
    SHORT,
    VERSION_1,
    FakeBackend,
    fake,
    leave,
    refuse,
    stay_silent,
)
from vhost_user.connection import Received
from vhost_user.errors import Disconnected, HostError, PeerError, Refused, TimedOut, UsageError
from vhost_user.frontend import PROTOCOL_FEATURES, Frontend, SharedRegion, accept
from vhost_user.message import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    VIRTIO_F_RING_PACKED,
    Config,
    Empty,
    FrontendRequest,
    Inflight,
    PackedBase,
    ProtocolFeature,
    SingleMemoryRegion,
    VringAddr,
    VringState,
)
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset, UserAddress
from vhost_user.vring import PackedLayout, SplitLayout

R = FrontendRequest
SPLIT = SplitLayout.place(16, GuestAddress(0x1000))
PACKED = PackedLayout.place(16, GuestAddress(0x1000))
WITH_PACKED = FEATURES | VIRTIO_F_RING_PACKED


@contextmanager
def memory() -> Iterator[SharedRegion]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), MIB)
        yield SharedRegion(GuestAddress(0), ByteCount(MIB), fd.fileno(), user_address=UserAddress(0x7F0000000000))


def connected(back: FakeBackend, timeout: float = LATE, features: int = VERSION_1) -> Frontend:
    return Frontend(back.connection, features=features, timeout=timeout)


class TestNegotiation:
    def test_only_what_is_offered_and_known_is_acked(self) -> None:
        with fake() as back, connected(back) as frontend:
            assert frontend.features == VERSION_1 | F_PROTOCOL_FEATURES
            assert frontend.requests.acked == PROTOCOL_FEATURES
            assert back.acked == PROTOCOL_FEATURES
            assert U64.decode(back.payloads_of(R.SET_FEATURES)[0]).value == frontend.features
            assert frontend.queue_count == 2
            assert frontend.regions.slots == 509

    def test_without_protocol_features_none_of_their_requests_is_made(self) -> None:
        with fake(features=VERSION_1) as back, memory() as region, connected(back) as frontend:
            frontend.regions.share([region])
            vring = frontend.vring(200)
            vring.start(SPLIT)
            assert vring.enabled
            vring.stop()
            by_numbers = {R.GET_PROTOCOL_FEATURES, R.SET_PROTOCOL_FEATURES, R.GET_QUEUE_NUM, R.SET_VRING_ENABLE}
            assert not by_numbers & set(back.requests)
            assert frontend.queue_count is None

    def test_a_feature_that_is_required_and_not_offered(self) -> None:
        with fake() as back, pytest.raises(PeerError, match="needs bits 0x2 too"):
            Frontend(back.connection, features=VERSION_1, required=VERSION_1 | 2)
        assert R.SET_FEATURES not in back.requests

    @pytest.mark.parametrize(
        ("feature", "use"),
        [
            (ProtocolFeature.CONFIG, lambda frontend: frontend.get_config(0, 1)),
            (ProtocolFeature.CONFIG, lambda frontend: frontend.set_config(0, b"1")),
            (ProtocolFeature.STATUS, lambda frontend: frontend.status),
            (ProtocolFeature.STATUS, lambda frontend: setattr(frontend, "status", 1)),
            (ProtocolFeature.RESET_DEVICE, lambda frontend: frontend.reset_device()),
            (ProtocolFeature.INFLIGHT_SHMFD, lambda frontend: frontend.track_inflight(1, 1)),
        ],
    )
    def test_what_was_not_negotiated_is_not_asked(self, feature: ProtocolFeature, use: object) -> None:
        assert callable(use)
        with fake(offered=ALL & ~feature) as back, connected(back) as frontend:
            frontend.requests.confirm()
            before = len(back.requests)
            with pytest.raises(Refused, match="not negotiated"):
                use(frontend)
            assert len(back.requests) == before


class TestConfiguration:
    def test_what_is_sent(self) -> None:
        with fake() as back, connected(back) as frontend:
            assert frontend.get_config(4, 8) == bytes(8)
            frontend.set_config(4, b"abcd")
            frontend.set_config(0, b"efgh", migration=True)
            sent = [Config.decode(body) for body in back.payloads_of(R.SET_CONFIG)]
            assert sent == [Config(4, 0, b"abcd"), Config(0, 1, b"efgh")]

    def test_more_than_fits_a_message_is_the_callers_mistake_and_costs_nothing(self) -> None:
        with fake() as back, connected(back) as frontend:
            with pytest.raises(UsageError, match="at most 4096"):
                frontend.set_config(0, bytes(4097))
            frontend.requests.confirm()

    def test_a_refusal_leaves_the_connection(self) -> None:
        def without_payload(back: FakeBackend, request: R, _received: Received) -> None:
            back.reply(request, Empty())

        with fake(behaviour={R.GET_CONFIG: without_payload}) as back, connected(back) as frontend:
            with pytest.raises(Refused, match="GET_CONFIG"):
                frontend.get_config(0, 8)
            frontend.requests.confirm()

    def test_fewer_bytes_than_were_asked_for(self) -> None:
        def shorter(back: FakeBackend, request: R, _received: Received) -> None:
            back.reply(request, Config(0, 0, b"1234"))

        with (
            fake(behaviour={R.GET_CONFIG: shorter}) as back,
            connected(back) as frontend,
            pytest.raises(PeerError, match="the 8 bytes"),
        ):
            frontend.get_config(0, 8)


class TestRings:
    def test_what_a_start_tells(self) -> None:
        with (
            fake(features=WITH_PACKED) as back,
            memory() as region,
            connected(back, features=WITH_PACKED) as frontend,
        ):
            frontend.regions.share([region])
            vring = frontend.vring(1)
            assert frontend.vring(1) is vring
            vring.set_log(GuestAddress(0x5000))
            vring.start(PACKED, enabled=False)
            address = VringAddr.decode(back.payloads_of(R.SET_VRING_ADDR)[0])
            user = 0x7F0000000000
            assert address == VringAddr(
                1,
                1,
                UserAddress(user + PACKED.desc),
                UserAddress(user + PACKED.device),
                UserAddress(user + PACKED.driver),
                GuestAddress(0x5000),
            )
            base = PackedBase(0, True, 0, True).to_num()
            assert VringState.decode(back.payloads_of(R.SET_VRING_BASE)[0]) == VringState(1, base)
            assert R.SET_VRING_ENABLE not in back.requests
            assert vring.kick.take()  # for back ends of the old rule
            with pytest.raises(UsageError, match="stop it first"):
                vring.start(PACKED)
            vring.set_log(None)
            assert VringAddr.decode(back.payloads_of(R.SET_VRING_ADDR)[1]).flags == 0
            vring.enable()
            vring.enable(False)
            enabled = [VringState.decode(body).num for body in back.payloads_of(R.SET_VRING_ENABLE)]
            assert enabled == [1, 0]

    @pytest.mark.parametrize(("layout", "features"), [(SPLIT, WITH_PACKED), (PACKED, VERSION_1)])
    def test_a_layout_of_the_other_kind(self, layout: SplitLayout | PackedLayout, features: int) -> None:
        with fake(features=WITH_PACKED) as back, memory() as region, connected(back, features=features) as frontend:
            frontend.regions.share([region])
            vring, before = frontend.vring(0), len(back.requests)
            given, wanted = ("SplitLayout", "PackedLayout") if layout is SPLIT else ("PackedLayout", "SplitLayout")
            with pytest.raises(UsageError, match=f"layout of ring 0={given}: has to be a {wanted}, as VIRTIO_F_RING_P"):
                vring.start(layout)
            assert len(back.requests) == before
            assert not vring.started

    def test_a_ring_that_lies_in_no_shared_memory(self) -> None:
        with fake() as back, memory() as region, connected(back) as frontend:
            frontend.regions.share([region])
            vring = frontend.vring(0)
            vring.start(SPLIT)
            stopped_at, before = vring.stop(), len(back.requests)
            with pytest.raises(UsageError, match="share it first"):
                vring.start(SplitLayout.place(16, GuestAddress(MIB)))
            assert len(back.requests) == before
            assert (vring.layout, vring.base) == (SPLIT, stopped_at)

    def test_more_rings_than_there_are(self) -> None:
        with (
            fake() as back,
            connected(back) as frontend,
            pytest.raises(PeerError, match="has to be one of the back end's 2"),
        ):
            frontend.vring(2)

    @pytest.mark.parametrize("index", [-1, 256, 0.0, False, "0", None])
    @pytest.mark.parametrize("features", [F_PROTOCOL_FEATURES, VERSION_1])
    def test_what_is_no_index_of_a_ring(self, index: Any, features: int) -> None:
        with fake(features=VERSION_1 | features) as back, connected(back) as frontend:
            ring = frontend.vring(0)
            with pytest.raises(UsageError, match="has to be an int from 0 to 255"):
                frontend.vring(index)
            assert frontend.vrings == {0: ring}

    def test_an_answer_for_another_ring(self) -> None:
        def mistaken(back: FakeBackend, request: R, _received: Received) -> None:
            back.reply(request, VringState(5, 0))

        with (
            fake(behaviour={R.GET_VRING_BASE: mistaken}) as back,
            connected(back) as frontend,
            pytest.raises(PeerError, match="has to answer for ring 0"),
        ):
            frontend.vring(0).stop()

    def test_calls_and_errors(self) -> None:
        with fake() as back, connected(back) as frontend:
            vring = frontend.vring(0)
            assert not vring.wait(0)
            assert not vring.failed
            vring.call.signal()
            vring.err.signal()
            assert vring.wait(LATE)
            assert not vring.wait(SHORT)
            assert vring.failed
            assert not vring.failed

    def test_a_reset_stops_and_disables_all(self) -> None:
        with fake() as back, memory() as region, connected(back) as frontend:
            frontend.regions.share([region])
            vring = frontend.vring(0)
            vring.start(SPLIT)
            assert (vring.started, vring.enabled) == (True, True)
            frontend.reset_device()
            assert (vring.started, vring.enabled) == (False, False)


class TestReconnecting:
    @pytest.mark.parametrize("kind", [SplitLayout, PackedLayout])
    def test_everything_is_set_up_again(self, kind: type[SplitLayout | PackedLayout]) -> None:
        packed = kind is PackedLayout
        features = WITH_PACKED if packed else FEATURES
        layouts = [kind.place(16, GuestAddress(at)) for at in (0x1000, 0x2000)]
        positions = [0x12344, 0x12345] if packed else [300, 400]
        with memory() as region, fake(features=features) as first, connected(first, features=features) as frontend:
            frontend.regions.share([region])
            frontend.track_inflight(1, 16)
            frontend.start_logging(GuestAddress(MIB - 1))
            enabled, disabled = frontend.vring(0), frontend.vring(1)
            enabled.start(layouts[0], positions[0] if packed else 0)
            disabled.start(layouts[1], positions[1] if packed else 0, enabled=False)
            for layout, position in zip(layouts, positions, strict=True):
                if isinstance(layout, SplitLayout):
                    os.pwrite(region.fd, position.to_bytes(2, "little"), layout.used + 2)
            with fake(features=features) as second:
                frontend.reconnect(second.connection)
                assert frontend.has(ProtocolFeature.REPLY_ACK)
                assert SingleMemoryRegion.decode(second.payloads_of(R.ADD_MEM_REG)[0]).region == region.wire
                inflight = [Inflight.decode(back.payloads_of(R.SET_INFLIGHT_FD)[0]) for back in (first, second)]
                assert inflight[0] == inflight[1]
                assert R.GET_INFLIGHT_FD not in second.requests
                told = [U64.decode(body).value for body in second.payloads_of(R.SET_FEATURES)]
                assert [bool(each & F_LOG_ALL) for each in told] == [False, True]
                bases = [VringState.decode(body) for body in second.payloads_of(R.SET_VRING_BASE)]
                assert bases == [VringState(index, position) for index, position in enumerate(positions)]
                assert VringState.decode(second.payloads_of(R.SET_VRING_ENABLE)[0]) == VringState(0, 1)
                assert len(second.payloads_of(R.SET_VRING_ENABLE)) == 1
                assert enabled.started
                assert disabled.started

    def test_a_back_end_that_offers_less_is_none(self) -> None:
        with fake() as first, connected(first) as frontend:
            with fake(offered=ALL & ~ProtocolFeature.CONFIG) as second:
                with pytest.raises(PeerError, match="that are in use"):
                    frontend.reconnect(second.connection)
                assert not frontend.connected
            with fake(features=FEATURES) as third:
                frontend.reconnect(third.connection)
                assert frontend.connected

    @pytest.mark.parametrize("asked", [R.GET_FEATURES, R.ADD_MEM_REG, R.SET_VRING_ADDR, R.SET_VRING_KICK])
    def test_an_attempt_that_fails_can_be_made_again(self, asked: R) -> None:
        with memory() as region, fake() as first, connected(first) as frontend:
            frontend.regions.share([region])
            frontend.vring(0).start(SPLIT)
            assert not frontend.vring(1).started
            with fake(behaviour={asked: leave}) as second, pytest.raises(Disconnected):
                frontend.reconnect(second.connection)
            with fake() as third:
                frontend.reconnect(third.connection)
                assert list(frontend.regions) == [region]
                assert frontend.vring(0).started
                assert len(third.payloads_of(R.SET_VRING_KICK)) == 1

    def test_without_a_connection_nothing_is_asked(self) -> None:
        with fake() as back, connected(back) as frontend:
            frontend.requests.close()
            with pytest.raises(Disconnected, match="was closed"):
                frontend.requests.confirm()
            assert frontend.requests.fileno() == -1


class TestInflight:
    def test_an_area_without_memory(self) -> None:
        def without(back: FakeBackend, request: R, received: Received) -> None:
            right = back.right_answer(request, received)
            assert right is not None
            back.reply(request, right[0])

        with (
            fake(behaviour={R.GET_INFLIGHT_FD: without}) as back,
            connected(back) as frontend,
            pytest.raises(Refused, match="has to come with the reply"),
        ):
            frontend.track_inflight(1, 16)

    def test_a_second_area_replaces_the_first(self) -> None:
        with fake() as back, connected(back) as frontend:
            frontend.track_inflight(1, 16)
            frontend.track_inflight(2, 32)
            sent = [Inflight.decode(body) for body in back.payloads_of(R.SET_INFLIGHT_FD)]
            assert [(area.num_queues, area.queue_size) for area in sent] == [(1, 16), (2, 32)]


class TestConnecting:
    def test_nobody_listens(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match=r"ENOENT.*start the daemon first"):
            Frontend.connect(str(tmp_path / "none"), features=0)

    def test_a_daemon_comes_to_us(self, tmp_path: Path) -> None:
        path = str(tmp_path / "ours")
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as daemon:
            listener.bind(path)
            listener.listen()
            with pytest.raises(HostError, match="a daemon has to connect within"):
                accept(listener, timeout=SHORT)
            daemon.connect(path)
            with accept(listener, timeout=LATE):
                pass

    def test_we_come_to_a_daemon(self, tmp_path: Path) -> None:
        path = str(tmp_path / "theirs")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            with pytest.raises(TimedOut):
                Frontend.connect(path, features=0, timeout=SHORT)


class TestRefusals:
    def test_a_request_that_was_refused_says_which_and_how(self) -> None:
        with fake(behaviour={R.SET_CONFIG: refuse}) as back, connected(back) as frontend:
            with pytest.raises(Refused, match=r"SET_CONFIG \(25\)=.*failure 1"):
                frontend.set_config(0, b"1")
            frontend.requests.confirm()

    def test_without_acknowledgements_a_refusal_is_not_heard_of(self) -> None:
        without = ALL & ~ProtocolFeature.REPLY_ACK
        with fake(offered=without, behaviour={R.SET_CONFIG: refuse}) as back, connected(back) as frontend:
            frontend.set_config(0, b"1")
            frontend.requests.confirm()

    def test_descriptors_that_nobody_wants_are_closed(self) -> None:
        question = Inflight(ByteCount(0), HostOffset(0), 1, 16)
        with fake() as back, connected(back) as frontend:
            assert frontend.requests.ask(R.GET_INFLIGHT_FD, Inflight, question).mmap_size == 4096
            with pytest.raises(Refused, match="answered by a failure"):
                frontend.requests.ask_for_fds(R.GET_INFLIGHT_FD, U64, question)
            frontend.requests.give_up()
            frontend.requests.give_up()

    def test_an_interrupt_within_a_request_costs_the_connection(self) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        ours, theirs = socket.socketpair()
        with (
            ours,
            theirs,
            fake(behaviour={R.GET_STATUS: stay_silent}) as back,
            connected(back) as frontend,
        ):
            theirs.send(b"now")
            frontend.requests.watched[ours.fileno()] = interrupt
            with pytest.raises(KeyboardInterrupt):
                _ = frontend.status
            del frontend.requests.watched[ours.fileno()]
            assert not frontend.connected

    def test_a_thread_closes_it_while_another_waits_for_a_silent_back_end(self) -> None:
        ended: list[PeerError] = []
        seen: list[PeerError] = []

        def ask(frontend: Frontend) -> None:
            try:
                _ = frontend.status
            except PeerError as error:
                ended.append(error)

        def wait_for_the_end(back: FakeBackend, _request: R, _received: Received) -> None:
            try:
                back.own.receive(LATE / 4).close()
            except PeerError as error:
                seen.append(error)
                raise

        with fake(behaviour={R.GET_STATUS: wait_for_the_end}) as back, connected(back) as frontend:
            frontend.vring(0)
            thread = threading.Thread(target=ask, args=[frontend])
            thread.start()
            while R.GET_STATUS not in back.requests:
                time.sleep(0.001)
            frontend.close()
            thread.join()
            assert not frontend.connected
            with pytest.raises(Disconnected):
                _ = frontend.status
        assert [type(error) for error in (*ended, *seen)] == [Disconnected, Disconnected]

    def test_a_signal_whose_handler_raises_does_so_too(self) -> None:
        def interrupt(_back: FakeBackend, _request: R, _received: Received) -> None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            with fake(behaviour={R.GET_STATUS: interrupt}) as back, connected(back) as frontend:
                with pytest.raises(KeyboardInterrupt):
                    _ = frontend.status
                assert not frontend.connected
        finally:
            signal.signal(signal.SIGALRM, before)

    def test_an_answer_in_pieces(self) -> None:
        def in_pieces(back: FakeBackend, _request: R, _received: Received) -> None:
            back.socket.setblocking(True)
            for byte in b"\x28\0\0\0\x05\0\0\0\x08\0\0\0" + U64(15).encode():
                back.socket.send(bytes([byte]))

        with fake(behaviour={R.GET_STATUS: in_pieces}) as back, connected(back) as frontend:
            assert frontend.status == 15
