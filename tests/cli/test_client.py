"""The client takes nothing on trust: whatever a server answers is a result or one of the errors that it names."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.rig import TWO_ZONES, Machine, run
from vhost_user.errors import Disconnected, FieldError, HostError, PeerError, TimedOut, UsageError
from vhost_user.units import MIB
from virtio_mem import client as client_module
from virtio_mem.client import Client, NoServer, NotNow
from virtio_mem.protocol import ResponseType


class Broken:
    """A server at `path` that answers every request with the same bytes, and hangs up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer = b""
        self.holds = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                while b"\r\n\r\n" not in connection.recv(1 << 16):
                    pass
                with suppress(OSError):  # the client had enough
                    connection.sendall(self.answer)
                    if not self.holds.is_set():
                        connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

    def says(self, status: str, body: object) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@contextmanager
def broken_server(path: Path) -> Iterator[Broken]:
    server = Broken(path)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Broken]:
    with broken_server(tmp_path / "broken.sock") as server:
        yield server


CALLS: dict[str, Callable[[Client], object]] = {
    "ping": Client.ping,
    "info": Client.info,
    "operation": lambda client: client.operation(1),
    "blocks": lambda client: client.blocks("mem0"),
    "counts": lambda client: client.counts("mem0", 4),
    "resize": lambda client: client.resize(1),
    "resize_zone": lambda client: client.resize_zone("mem0", 1),
    "system_reset": Client.system_reset,
    "events": lambda client: list(client.events(idle=1)),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def test_what_the_api_has(api: str) -> None:
    with Machine(TWO_ZONES, Path(api)) as machine:
        client = Client(api)
        assert client.info() == machine.control.info()
        number = client.resize_zone("mem0", 128 * MIB)
        machine.plug("mem0", 0, 3)
        assert client.operation(number)["plugged"] == 70 * MIB
        assert client.operation(number, wait=0.05)["state"] == "running"
        blocks = client.blocks("mem0", 1 << 32)
        assert (blocks.nb_plugged, blocks.nb_blocks, blocks.requested_blocks) == (3, 1024, 32)
        counts = client.counts("mem0", 64, 1 << 32)
        assert (counts.nb_plugged, counts.nb_runs, counts.plugged_below(16)) == (3, 1, 3)
        with pytest.raises(UsageError, match="from 1 to 65536 cells"):
            client.counts("mem0", 0)
        kinds = []
        for event in client.events(after=0):
            kinds.append(event["kind"])
            if event["kind"] == "plugged":
                break
        assert kinds == ["requested", "plugged"]
        with pytest.raises(UsageError, match="name a zone that there is"):
            client.blocks("../../etc")


def test_a_machine_that_is_paused_and_reset(api: str) -> None:
    with Machine(TWO_ZONES, Path(api)) as machine:
        client = Client(api)
        machine.plug("mem0", 0, 3)
        client.pause()
        assert machine.plug("mem0", 3) is ResponseType.BUSY
        with pytest.raises(NotNow, match="a device is paused"):
            client.system_reset()
        client.resume()
        assert machine.plug("mem0", 3) is ResponseType.ACK
        client.system_reset()
        assert machine.service("mem0").device.plugged_size == 0


def changed(value: Any, data: st.DataObject) -> Any:
    """The same, but for one part that is something else or missing."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.booleans()):
            return {name: each for name, each in value.items() if name != key}
        return value | {key: changed(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], changed(value[index], data), *value[index + 1 :]]
    return data.draw(JSON)


OPERATION = {"id": 1, "zone": "a", "target": 1, "plugged": 0, "rate": 0}
OPERATION |= {"state": "running", "verdict": "", "seconds": 0.5}
ZONE: dict[str, Any] = dict.fromkeys(client_module.ZONE_NUMBERS, 4096)
ZONE |= {"id": "a", "answers": {"PLUG ACK": 1}, "operation": OPERATION, "connected": True, "paused": False}
BLOCKS = {"block_size": 1, "nb_blocks": 9, "usable_blocks": 9, "requested_blocks": 1, "plugged": [[0, 1], [3, 2]]}
COUNTED = BLOCKS | {"nb_runs": 2, "per_cell": 4, "cells": [3, 0, 0]}
ANSWERS = {"info": {"zones": [ZONE]}, "operation": OPERATION, "blocks": BLOCKS, "counts": COUNTED}


@pytest.mark.parametrize("call", CALLS)
@given(data=st.data())
def test_answers_of_any_kind(call: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    good = ANSWERS.get(call, {"kind": "plugged"})
    with broken_server(tmp_path_factory.mktemp("broken") / "s") as broken:
        if data.draw(st.booleans()):
            broken.answer = data.draw(st.binary(max_size=64) | st.just(b"HTTP/1.1 200 OK\r\n\r\n"))
        else:
            body = json.dumps(changed(good, data)).encode()
            status = data.draw(st.sampled_from(["200 OK", "204 No Content", "400 Bad Request", "503 Busy", "999 \xff"]))
            broken.says(status, b"data: " + body + b"\n\n" if call == "events" else body)
        with suppress(UsageError, PeerError, HostError):
            CALLS[call](Client(broken.path, timeout=2))


@pytest.mark.parametrize(
    ("call", "part", "value"),
    [
        ("info", ZONE, {"plugged_size": 10**400}),
        ("info", ZONE, {"answers": {"PLUG BUSY": 1 << 64}}),
        ("info", ZONE, {"block_size": None, "answers": [1]}),
        ("info", ZONE, {"held_unplugged": "much"}),
        ("info", ZONE, {"unrequested_bytes": -1}),
        ("info", ZONE, {"operation": OPERATION | {"rate": 10**400}}),
        ("operation", OPERATION, {"seconds": float("inf")}),
        ("operation", OPERATION, {"seconds": float("nan")}),
        ("blocks", BLOCKS, {"nb_blocks": 10**400}),
        ("counts", COUNTED, {"per_cell": 8, "cells": [3, 0]}),
        ("counts", COUNTED, {"per_cell": 3, "cells": [3, 0, 0]}),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_could_not_be_shown_is_no_answer(
    broken: Broken, call: str, part: dict[str, Any], value: dict[str, Any]
) -> None:
    for changes in ({}, value):
        answer = part | changes
        broken.says("200 OK", {"zones": [answer]} if call == "info" else answer)
        with pytest.raises(PeerError, match="is no answer that the API has") if changes else nullcontext():
            CALLS[call](Client(broken.path))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("400 Bad Request", UsageError),
        ("404 Not Found", UsageError),
        ("503 Service Unavailable", NotNow),
        ("500 Internal Server Error", HostError),
    ],
)
def test_a_refusal_keeps_its_parts(broken: Broken, status: str, kind: type[FieldError]) -> None:
    broken.says(status, {"field": "f", "value": 3, "limit": "at most 2", "remedy": "less", "message": ""})
    with pytest.raises(kind) as caught:
        Client(broken.path).info()
    assert (caught.value.field, caught.value.value, caught.value.limit, caught.value.remedy) == (
        *("f", 3, "at most 2"),
        "less",
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_hangs_up(broken: Broken, call: str) -> None:
    with pytest.raises(Disconnected, match="the server broke off"):
        CALLS[call](Client(broken.path))


@pytest.mark.parametrize("call", [call for call in CALLS if call != "events"])
def test_an_answer_that_breaks_off(broken: Broken, call: str) -> None:
    broken.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nOperation-Id: x\r\n\r\n{"
    with pytest.raises(PeerError if call.startswith("resize") else Disconnected):
        CALLS[call](Client(broken.path))


def test_a_stream_that_breaks_off(broken: Broken) -> None:
    broken.answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n: a\r\n9\r\ndata"
    with pytest.raises(Disconnected):
        list(Client(broken.path).events())


def test_a_server_that_says_nothing(broken: Broken) -> None:
    broken.holds.set()
    with pytest.raises(TimedOut, match=r"no answer within 0\.1 s"):
        Client(broken.path, timeout=0.1).info()
    with pytest.raises(TimedOut):
        list(Client(broken.path).events(idle=0.1))


def test_an_answer_without_end(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MOST_BYTES", 1 << 20)
    broken.answer = b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (1 << 22)
    with pytest.raises(PeerError, match="more than 1048576 bytes"):
        Client(broken.path).info()
    with pytest.raises(PeerError, match="a line of more than"):
        list(Client(broken.path).events())


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NoServer, match="ENOENT"):
        Client(tmp_path / "none").info()


def test_a_socket_of_somebody_else(broken: Broken) -> None:
    """Something that speaks HTTP and is not our API: one line that says so."""
    broken.says("200 OK", b"<html></html>")
    for arguments in (["info"], ["map"], ["watch"], ["resize", "1G"], ["resize-zone", "a", "1G"]):
        done = run(arguments[0], "--api-socket", str(broken.path), *arguments[1:])
        assert done.returncode == 1
        assert "is no answer that the API has; is this virtio-mem's API socket?" in done.stderr
        assert done.stderr.count("\n") == 1
