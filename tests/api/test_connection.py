"""HTTP itself: what a client can do to the server, and that the next client does not notice."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import counts
from tests.api.rig import BLOCK, BOOT, Client, Rig, UnixConnection, machine, read_all
from tests.leaks import Holdings
from tests.peers.processes import wait_until
from vhost_user.errors import HostError
from virtio_mem.api import connection, server
from virtio_mem.api.server import MAX_CONNECTIONS, MAX_LONG, ApiServer, listen

PING = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n"
RESIZE = b"PUT /api/v1/vm.resize HTTP/1.1\r\nHost: localhost\r\n"


def status_of(received: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    assert found, received[:100]
    return int(found[1])


def send(rig: Rig, data: bytes) -> bytes:
    """What the server says to `data` before it closes."""
    with rig.raw() as sock:
        with suppress(OSError):  # closed already: what it said before can still be read
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


# What HTTP allows.


def test_requests_may_follow_each_other_and_come_at_once(rig: Rig) -> None:
    received = send(rig, PING * 3)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 3
    with rig.raw() as sock:
        for _ in range(3):
            sock.sendall(PING)
            assert status_of(sock.recv(4096)) == 200


@pytest.mark.parametrize("size", [1, 7])
def test_a_request_may_come_in_pieces(rig: Rig, size: int) -> None:
    body = json.dumps({"desired_ram": BOOT}).encode()
    data = RESIZE + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with rig.raw() as sock:
        for start in range(0, len(data), size):
            sock.sendall(data[start : start + size])
        assert status_of(sock.recv(4096)) == 204


def test_a_body_may_be_chunked_and_a_client_may_wait_to_be_asked_for_it(rig: Rig) -> None:
    body = json.dumps({"desired_ram": BOOT}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert status_of(send(rig, RESIZE + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)) == 204
    with rig.raw() as sock:
        sock.sendall(RESIZE + f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert sock.recv(4096) == b"HTTP/1.1 100 \r\n\r\n"
        sock.sendall(body)
        assert status_of(sock.recv(4096)) == 204


@pytest.mark.parametrize("head", [b"HTTP/1.0\r\n\r\n", b"HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"])
def test_a_connection_may_end_with_the_reply(rig: Rig, head: bytes) -> None:
    with rig.raw() as sock:
        sock.sendall(b"GET /api/v1/zones/mem0/blocks " + head)
        received = read_all(sock)
    body = received.partition(b"\r\n\r\n")[2]
    chunked = b"Transfer-Encoding: chunked" in received
    assert chunked == (b"1.1" in head)
    assert b'"nb_blocks": 512' in body


def test_a_target_may_be_a_whole_url(rig: Rig) -> None:
    assert status_of(send(rig, PING.replace(b"/api", b"http://localhost/api", 1))) == 200
    assert status_of(send(rig, PING.replace(b"/api/v1/vmm.ping", b"HTTP://localhost", 1))) == 404


def test_another_protocol_is_not_spoken(rig: Rig) -> None:
    upgrade = PING.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert status_of(send(rig, upgrade)) == 200
    assert status_of(send(rig, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n")) == 404


# What it does not allow.


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"x\r\n\r\n", 400),
        (b"\x00" * 40 + b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA : y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n", 400),
        (b"GET /" + b"a" * 24_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5_000 + b"\r\n", 431),
        (RESIZE + b"Content-Length: 65537\r\n\r\n", 413),
        (RESIZE + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
        (RESIZE + b"Content-Length: 1, 2\r\n\r\n", 400),
        (RESIZE + b"Content-Length: -1\r\n\r\n", 400),
        (RESIZE + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (RESIZE + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (RESIZE + b"Transfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        (RESIZE + b"Transfer-Encoding: chunked\r\n\r\n" + b"4000\r\n" + b"x" * 0x4000 + b"\r\n" * 1, None),
        (RESIZE + b"Transfer-Encoding: chunked\r\n\r\n" + 5 * (b"4000\r\n" + b"x" * 0x4000 + b"\r\n"), 413),
        (RESIZE + b"Content-Length: 70000\r\n\r\n" + b"x" * 70_000, 413),
        (b"GET /%ff HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /api/v1/zones/%ff/blocks HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /api/v1/zones/..%2f..%2fx/blocks HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_wrong_is_answered_and_the_connection_ends(rig: Rig, data: bytes, status: int | None) -> None:
    received = send(rig, data)
    if status is None:
        assert received == b"" or status_of(received) == 400
    else:
        assert status_of(received) == status
        head, _, body = received.partition(b"\r\n\r\n")
        assert set(json.loads(body)) == {"field", "value", "limit", "remedy", "message"}
        if status not in (404,):
            assert b"Connection: close" in head
    assert status_of(send(rig, PING)) == 200
    assert rig.notices == []


def test_a_client_that_goes_in_the_middle_is_forgotten(rig: Rig) -> None:
    for size in range(0, len(PING), 5):
        with rig.raw() as sock:
            sock.sendall(PING[:size])
    for _ in range(5):
        with rig.raw() as sock:
            sock.sendall(PING * 10)  # and reads nothing
    rig.wait_until_idle()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with machine(tmp_path_factory.mktemp("api")) as made:
        yield made


PIECES = st.sampled_from(
    [
        PING,
        PING[:-2],
        RESIZE,
        b"Content-Length: 5\r\n\r\n",
        b"Content-Length: 0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: close\r\n",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b'{"desired_ram": 1}',
        b"\r\n",
        b"GET /api/v1/operations/1?wait=0 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\n\r\n",
    ]
)


@settings(max_examples=counts.HOSTILE_HTTP, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES | st.binary(max_size=30), max_size=6))
def test_any_bytes_are_answered_with_http_or_with_the_end(lasting: Rig, pieces: list[bytes]) -> None:
    received = send(lasting, b"".join(pieces))
    assert received == b"" or status_of(received) in {100, 200, 204, 400, 404, 405, 413, 431, 501}
    assert b" 500 " not in received
    assert lasting.service().device.requested_size == 256 << 20
    lasting.wait_until_idle()


# Those who take their time.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(connection, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(connection, "_LINGER_SECONDS", 0.1)
    monkeypatch.setattr(server, "REFUSED_SECONDS", 0.1)


def test_a_request_has_so_long_however_it_trickles(impatient: None, rig: Rig) -> None:
    start = time.monotonic()
    with rig.raw() as sock:
        sock.sendall(PING)
        assert status_of(sock.recv(4096)) == 200
        for byte in PING:
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        assert status_of(sock.recv(4096)) == 408
    assert 1.0 <= time.monotonic() - start < 10


def test_one_who_says_nothing_is_closed(impatient: None, rig: Rig) -> None:
    with rig.raw() as fresh, rig.raw() as idle:
        idle.sendall(PING)
        assert status_of(idle.recv(4096)) == 200
        assert read_all(fresh) == read_all(idle) == b""
    rig.wait_until_idle()


def test_one_who_does_not_read_is_closed(impatient: None, rig: Rig) -> None:
    with rig.raw() as sock:
        sock.setblocking(False)
        with suppress(BlockingIOError):
            sock.sendall(PING * 100_000)
        rig.wait_until_idle()


# Many.


def test_one_too_many_is_told_so(rig: Rig) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            sock = stack.enter_context(rig.raw())
            sock.sendall(PING)
            assert status_of(sock.recv(4096)) == 200
        answer = rig.get("/api/v1/vm.info")
        assert (answer.status, answer.headers["Retry-After"], answer.json["field"]) == (503, "1", "connections")
        sock.sendall(PING)
        assert status_of(sock.recv(4096)) == 200, "who is there is served"
    rig.wait_until_idle()
    assert rig.get("/api/v1/vm.info").status == 200
    assert rig.server.refused == 1


def test_of_too_many_who_are_refused_the_first_is_let_linger_no_longer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MAX_CONNECTIONS", 0), ("MAX_REFUSED", 2), ("REFUSED_SECONDS", 1000.0)):
        monkeypatch.setattr(server, name, value)
    with ExitStack() as stack:
        for _ in range(4):
            assert status_of(stack.enter_context(rig.raw()).recv(4096)) == 503
        wait_until(lambda: len(rig.server._refused) == 2, "two are let go", seconds=5)
        assert rig.server.refused == 4


def test_those_who_wait_leave_room_for_the_others(rig: Rig) -> None:
    number = rig.resize(BOOT + BLOCK)
    wait = f"GET /api/v1/operations/{number}?wait=60 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    stream = b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack:
        waiting = [stack.enter_context(rig.raw()) for _ in range(MAX_LONG)]
        for position, sock in enumerate(waiting):
            sock.sendall(stream if position % 2 else wait)
        deadline = time.monotonic() + 5
        while rig.server._long < MAX_LONG:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for sock in [stack.enter_context(rig.raw()) for _ in range(MAX_CONNECTIONS - MAX_LONG)]:
            sock.sendall(stream)
            assert status_of(read_all(sock)) == 503, "and it is at its end, which takes no room of others"
        with rig.raw() as sock:
            sock.sendall(stream.replace(b"GET", b"HEAD"))
            head = read_all(sock)
            assert status_of(head) == 503
            assert head.endswith(b"\r\n\r\n"), "a HEAD is answered without a body"
        assert rig.get("/api/v1/vm.info").status == 200
        assert rig.operation(number)["target"] == BOOT + BLOCK, "who does not wait needs no such room"
        start = time.monotonic()
        rig.server.close()
        assert time.monotonic() - start < 30, "who waits is not waited for"


def test_two_thousand_clients_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is served or told to come again; nothing of them stays."""
    monkeypatch.setattr(server, "REFUSED_SECONDS", 0.1)
    before = Holdings()
    statuses: list[int] = []

    def ask() -> None:
        statuses.extend(status_of(send(rig, PING)) for _ in range(125))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    idle = []
    for thread in threads:
        thread.start()
    try:
        for _ in range(1000):
            idle.append(rig.raw())
            if len(idle) > 500:
                idle.pop(0).close()
    finally:
        for thread in threads:
            thread.join()
        for sock in idle:
            sock.close()
    assert len(statuses) == 1000
    assert set(statuses) <= {200, 503}
    assert rig.get("/api/v1/vmm.ping").status == 200
    rig.wait_until_idle()
    assert before.leaks() == []


# The socket.


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_the_socket_is_its_owners_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "sock"
    with umask(mask), listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_socket_is_never_open_to_others() -> None:
    """Watched by a tight loop in another process, while it is made a few hundred times."""
    program = """
import os, sys, tempfile
from virtio_mem.api.server import listen
os.umask(0)
directory = tempfile.mkdtemp()
path = f"{directory}/sock"
if pid := os.fork():
    for _ in range(int(sys.argv[1])):
        listen(path).close()
        os.unlink(path)
    os.kill(pid, 9)
    os.wait()
    os.rmdir(directory)
else:
    while True:
        try:
            mode = os.stat(path).st_mode & 0o777
        except FileNotFoundError:
            continue
        if mode != 0o600:
            print(oct(mode), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "300"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="another server listens there"):
        ApiServer(rig.control, rig.path)
    assert rig.get("/api/v1/vmm.ping").status == 200
    dead = tmp_path / "dead"
    listen(dead).close()
    with ApiServer(rig.control, dead):
        assert dead.exists()
    assert not dead.exists()
    with pytest.raises(HostError, match="ENOENT"):
        ApiServer(rig.control, tmp_path / "no" / "sock")


def test_a_socket_that_listens_already_stays_its_owners(rig: Rig, tmp_path: Path) -> None:
    """As a supervisor has it: servers come and go, the socket stays, and who came meanwhile is served."""
    path = tmp_path / "kept"
    with listen(path) as sock:
        with ApiServer(rig.control, sock):
            assert Client(str(path)).get("/api/v1/vmm.ping").status == 200
        assert path.exists()
        client = UnixConnection(str(path))
        client.request("GET", "/api/v1/vmm.ping")
        with ApiServer(rig.control, sock):
            assert client.getresponse().status == 200
            client.close()


def test_closing_ends_every_connection_and_takes_the_socket_away(rig: Rig) -> None:
    with rig.raw() as sock:
        sock.sendall(PING[:10])
        rig.server.close()
        assert not Path(rig.path).exists()
        assert read_all(sock) == b""
    rig.server.close()


def test_another_ones_socket_is_not_taken_away(rig: Rig) -> None:
    Path(rig.path).unlink()
    Path(rig.path).touch()
    rig.server.close()
    assert Path(rig.path).exists()


def test_out_of_descriptors_it_serves_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_RETRY_MS", 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
        spare = [os.dup(0) for _ in range(highest)]  # every free number below the limit
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
            sock.connect(rig.path)
            sock.sendall(PING)
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                sock.recv(4096)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
        sock.settimeout(20)
        assert status_of(sock.recv(4096)) == 200


def test_no_thread_left_is_one_too_many(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert rig.get("/api/v1/vmm.ping").status == 503
    monkeypatch.undo()
    assert rig.get("/api/v1/vmm.ping").status == 200
