"""The server: who may connect when, what a bad front end costs, and that the next one is served."""

from __future__ import annotations

import logging
import os
import resource
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backend.devices import Echo
from tests.backend.rig import SPLIT, Ram, start_ring
from vhost_user.backend import Server, link
from vhost_user.connection import Connection
from vhost_user.errors import Disconnected, HostError, Refused, TimedOut, UsageError
from vhost_user.frontend import Frontend, accept
from vhost_user.message import U64, FrontendRequest, VringFd, encode_message


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(path)
    return sock


def send_often(sock: socket.socket, data: bytes) -> None:
    for _ in range(1000):
        sock.sendall(data)


def serves(path: str) -> None:
    """A good front end is served."""
    ram = Ram()
    try:
        with Frontend.connect(path, features=SPLIT) as frontend:
            frontend.regions.share([ram.region])
            start_ring(frontend, ram).echo(b"good")
    finally:
        ram.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_front_ends_are_served_one_after_the_other(path: str) -> None:
    device = Echo()
    with Server() as server:
        server.listen(path, device)
        with server.in_thread():
            for _ in range(3):
                serves(path)
            wait_until(lambda: device.log[-1] == "disconnected")
        assert device.log == ["connected", "stopped 0", "disconnected"] * 3
    assert not Path(path).exists()


def test_a_second_front_end_waits_for_its_turn(path: str) -> None:
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread():
            first = Frontend.connect(path, features=SPLIT)
            waiting = connect(path)
            waiting.sendall(encode_message(FrontendRequest.GET_FEATURES, b""))
            waiting.settimeout(0.05)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            first.close()
            waiting.settimeout(5)
            assert len(waiting.recv(100)) == 20
            waiting.close()


def test_two_devices_are_served_at_once(tmp_path: Path) -> None:
    with Server() as server:
        paths = [str(tmp_path / name) for name in "ab"]
        for each in paths:
            server.listen(each, Echo())
        with server.in_thread(), Frontend.connect(paths[0], features=SPLIT) as first:
            serves(paths[1])
            first.requests.confirm()


def test_a_device_is_served_at_one_socket(path: str) -> None:
    device = Echo()
    with Server() as server:
        server.listen(path, device)
        with pytest.raises(UsageError):
            server.listen(path + "2", device)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(path: str) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    with Server() as server, Server() as other:
        server.listen(path, Echo())
        with pytest.raises(HostError, match="another server"):
            other.listen(path, Echo())
        with server.in_thread():
            serves(path)


def test_no_other_file_is_removed(path: str) -> None:
    Path(path).write_text("precious")
    with Server() as server, pytest.raises(HostError):
        server.listen(path, Echo())
    assert Path(path).read_text() == "precious"


def test_a_listening_socket_can_be_given(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with Server() as server:
        server.listen(listener, Echo())
        with server.in_thread():
            serves(path)


def test_the_back_end_may_be_the_one_that_connects(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, Server() as server:
        listener.bind(path)
        listener.listen()
        server.connect(path, Echo())
        with server.in_thread():
            with Frontend(accept(listener, timeout=5), features=SPLIT) as frontend:
                frontend.requests.confirm()
            with Frontend(accept(listener, timeout=5), features=SPLIT) as frontend:
                frontend.requests.confirm()


def test_it_tries_again_until_somebody_listens(path: str) -> None:
    with Server() as server:
        server.connect(path, Echo())
        with server.in_thread(), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            with Frontend(accept(listener, timeout=5), features=SPLIT) as frontend:
                frontend.requests.confirm()


GARBAGE = {
    "another version": struct.pack("=III", 1, 2, 0),
    "a reply": struct.pack("=III", 1, 5, 0),
    "a huge payload": struct.pack("=III", 1, 1, 0xFFFFFFFF),
    "an unknown request": struct.pack("=III", 999, 1, 0),
    "a payload too short": struct.pack("=III", 2, 1, 4) + b"1234",
    "a request that was not negotiated": struct.pack("=III", FrontendRequest.GET_STATUS, 1, 0),
    "half a header and gone": b"\1\0\0",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_its_own_session(path: str, garbage: bytes) -> None:
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread():
            for _ in range(3):
                bad = connect(path)
                bad.sendall(garbage)
                bad.shutdown(socket.SHUT_WR)
                assert bad.recv(100) == b""
                bad.close()
            serves(path)


@pytest.mark.parametrize("start", [b"", b"\1\0\0\0\1", struct.pack("=III", 2, 1, 8) + b"123"], ids=repr)
def test_who_says_nothing_more_makes_room(path: str, start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MESSAGE_TIME_LIMIT", 0.05)
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread():
            silent = connect(path)
            if start:
                silent.sendall(struct.pack("=III", 1, 1, 0) + start)
            while silent.recv(100):
                pass
            monkeypatch.undo()  # who comes next has its time
            serves(path)
            silent.close()


def test_who_does_not_read_replies_is_closed(path: str) -> None:
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread():
            deaf = connect(path)
            question = encode_message(FrontendRequest.GET_FEATURES, b"") * 1000
            with pytest.raises(OSError, match=r"pipe|reset"):
                send_often(deaf, question)
            deaf.close()
            serves(path)


def test_a_mistake_of_the_device_ends_the_session_only(path: str, caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Echo):
        def set_status(self, status: int) -> None:
            raise ZeroDivisionError

    with Server() as server:
        server.listen(path, Faulty())
        with server.in_thread():
            with Frontend.connect(path, features=SPLIT) as frontend, pytest.raises(Disconnected):
                frontend.status = 1
            serves(path)
    assert "ZeroDivisionError" in caplog.text


def test_a_full_and_blocking_call_descriptor_holds_nobody(path: str) -> None:
    ram = Ram()
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread(), Frontend.connect(path, features=SPLIT) as frontend:
            frontend.regions.share([ram.region])
            ring = start_ring(frontend, ram)
            ring.echo(b"once")
            frontend.requests.confirm()  # a chain is given back before the driver is called
            ring.vring.call.take()
            os.set_blocking(ring.vring.call.fileno(), True)
            os.eventfd_write(ring.vring.call.fileno(), 2**64 - 2)
            for _ in range(8):
                ring.send(b"x")
                ring.vring.kick.signal()
            while ring.sent:
                used = ring.driver.get_used()
                if used is not None:
                    ring.sent.pop(used[0])
                frontend.requests.confirm()
    ram.close()


def test_a_kick_pipe_serves_until_it_is_closed(path: str) -> None:
    ram = Ram()
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread(), Frontend.connect(path, features=SPLIT) as frontend:
            frontend.regions.share([ram.region])
            ring = start_ring(frontend, ram)
            reader, writer = os.pipe()
            call_reader, call_writer = os.pipe()
            frontend.requests.tell(FrontendRequest.SET_VRING_KICK, VringFd(0), [reader])
            frontend.requests.tell(FrontendRequest.SET_VRING_CALL, VringFd(0), [call_writer])
            os.close(reader)
            os.close(call_writer)
            ring.send(b"x" * 8)
            os.write(writer, b"12345678")
            assert os.read(call_reader, 8)
            os.close(writer)
            os.close(call_reader)
            frontend.requests.confirm()
    ram.close()


def test_the_front_end_gives_up_after_its_time_limit(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with pytest.raises(TimedOut):
        Frontend.connect(path, features=SPLIT, timeout=0.05)
    listener.close()


def test_connecting_to_nobody_says_so(path: str) -> None:
    with pytest.raises(HostError, match="connect failed"):
        Frontend.connect(path, features=SPLIT)


def test_a_server_that_runs_out_of_descriptors_serves_later(path: str, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with caplog.at_level(logging.WARNING), Server() as server, socket.socket(socket.AF_UNIX) as early:
        endpoint = server.listen(path, Echo())
        endpoint._accept()  # nobody is there: nothing happens
        assert not endpoint.connected
        with server.in_thread():
            spare = [os.dup(0) for _ in range(max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()))]
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
                early.connect(path)
                wait_until(lambda: "accept failed" in caplog.text)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in spare:
                    os.close(fd)
            early.settimeout(20)
            early.sendall(encode_message(FrontendRequest.GET_FEATURES, b""))
            assert len(early.recv(100)) == 20
            early.close()
            serves(path)


def test_messages_can_be_pipelined() -> None:
    with Server() as server:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        server.serve(theirs, Echo())
        with server.in_thread(), Connection(ours) as connection:
            ours_count = 200
            for _ in range(ours_count):
                connection.send(FrontendRequest.GET_FEATURES, timeout=5)
            for _ in range(ours_count):
                with connection.receive(5) as received:
                    assert U64.decode(received.body).value


def test_a_channel_that_is_never_finished_keeps_nobody(path: str) -> None:
    """The front end sends its own end of the channel along with half an answer: its end would never be seen."""
    device = Echo()
    with Server() as server:
        server.listen(path, device)
        with server.in_thread():
            frontend = Frontend.connect(path, features=SPLIT)
            assert frontend.channel is not None
            channel = frontend.channel._connection
            socket.send_fds(channel._sock, [b"\1"], [channel.fileno(), frontend.requests.fileno()])
            frontend.close()
            wait_until(lambda: "disconnected" in device.log)


@pytest.mark.parametrize("kick", ["writing end", "semaphore"])
def test_a_kick_that_would_never_end_is_refused(path: str, kick: str) -> None:
    ram = Ram()
    reader, writer = os.pipe()
    semaphore = os.eventfd(1 << 31, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread(), Frontend.connect(path, features=SPLIT) as frontend:
            frontend.regions.share([ram.region])
            ring = start_ring(frontend, ram)
            fd = writer if kick == "writing end" else semaphore
            with pytest.raises(Refused):
                frontend.requests.tell(FrontendRequest.SET_VRING_KICK, VringFd(0), [fd])
            ring.echo(b"by the kick before")
    ram.close()
    for fd in (reader, writer, semaphore):
        os.close(fd)


def test_a_session_that_can_not_begin_keeps_nobody_out(path: str) -> None:
    class Faulty(Echo):
        def connected(self) -> None:
            super().connected()
            if len(self.log) == 1:
                raise ZeroDivisionError

    with Server() as server:
        server.listen(path, Faulty())
        with server.in_thread():
            with pytest.raises(Disconnected):
                Frontend.connect(path, features=SPLIT)
            Frontend.connect(path, features=SPLIT).close()


def test_closing_goes_on_whatever_a_device_raises(tmp_path: Path) -> None:
    class Faulty(Echo):
        def disconnected(self) -> None:
            raise ZeroDivisionError

    paths = [tmp_path / name for name in "ab"]
    frontends = []
    server = Server()
    for each in paths:
        server.listen(each, Faulty())
    with server.in_thread():
        frontends = [Frontend.connect(str(each), features=SPLIT) for each in paths]
    with pytest.raises(ZeroDivisionError):
        server.close()
    assert not any(each.exists() for each in paths)
    for frontend in frontends:
        frontend.close()


def test_a_front_ends_own_end_is_no_channel_even_of_an_inherited_listener(path: str) -> None:
    """Who is asked by the kernel's word for who listens is then somebody else than us."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    if os.fork() == 0:
        listener.listen()
        os._exit(0)
    os.wait()
    with Server() as server:
        server.listen(listener, Echo())
        with server.in_thread(), Frontend.connect(path, features=SPLIT) as frontend, pytest.raises(Refused):
            frontend.requests.tell(FrontendRequest.SET_BACKEND_REQ_FD, fds=[frontend.requests.fileno()])
