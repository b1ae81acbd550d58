"""A client of the API socket: asks, has sizes changed, listens to events.

Each request has a connection of its own, so that one that a dying server broke off costs nothing but itself, and may
just be made again. Nothing that comes back is taken on trust: answers are bounded and have to be what the API says.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import quote

from vhost_user.errors import Disconnected, FieldError, HostError, PeerError, TimedOut, UsageError
from vhost_user.units import U64_MAX
from vhost_user.unix_socket import require_path
from virtio_mem.picture.blocks import Sizes, ZoneBlocks, ZoneCounts

PREFIX = "/api/v1/"
PATIENCE = 10.0
"""Seconds that the server has for each step of an answer. To replace one that crashed takes a fraction of one."""

SILENCE = 40.0
"""Seconds after which a stream of events counts as broken: the server says that it is there every 15 s."""

MOST_BYTES = 256 << 20
"""Of an answer: twice what eight million blocks take, of which every second one is plugged."""

ZONE_NUMBERS = (
    "boot_size",
    "hotplug_size",
    "guest_numa_id",
    "held",
    "addr",
    "block_size",
    "requested_size",
    "usable_region_size",
    "plugged_size",
    "unplugged_bytes",
    "unreturned_bytes",
)
"""What `vm.info` says of each zone, in bytes but for the node; None where a zone has none of it."""

MAY_BE_UNKNOWN = ("guest_numa_id", "held")

_LATER_NUMBERS = ("held_unplugged", "unrequested_bytes")
"""What the server of an earlier version does not say."""

_MOST_OF_LINE = 1 << 16


class NoServer(HostError):  # noqa: N818
    """Nobody listens at the socket: there is no server, or it has gone."""


class NotNow(HostError):  # noqa: N818
    """The server is there and can't answer just now: it is being replaced, or has too much to do."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect; NoServer where nobody listens."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except TimeoutError:
            raise
        except OSError as error:
            self.close()
            raise _no_server(self._path, error) from None


def _no_server(path: str, error: OSError) -> NoServer:
    match error:
        case PermissionError():
            remedy = "be the user who runs the server, or root"
        case ConnectionRefusedError():
            remedy = "nobody listens there: start virtio-mem serve or boot with this --api-socket"
        case _:
            remedy = "start virtio-mem serve or boot with this --api-socket"
    return NoServer.from_os_error("--api-socket", path, "connect", error, remedy)  # type: ignore[return-value]


class Client:
    """Asks the server at the unix socket `path`.

    Every method raises NoServer where nobody listens, NotNow, Disconnected or TimedOut where the server is there and
    did not answer (to ask again may help), UsageError where it says that the request can't be, PeerError where it
    answers what the API doesn't have.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = PATIENCE) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        require_path("--api-socket", self.path)

    # What the API has.

    def ping(self) -> dict[str, Any]:
        """`vmm.ping`: the server's version, and the "pid" of the process that answers."""
        answer = self._get("vmm.ping")
        if not isinstance(answer, dict) or type(answer.get("pid")) is not int:
            raise _unexpected("vmm.ping", answer)
        return answer

    def info(self) -> dict[str, Any]:
        """`vm.info`: the zones under "zones", each a dict with ZONE_NUMBERS, and the last resize under "operation"."""
        answer = self._get("vm.info")
        try:
            for zone in answer["zones"]:
                _check_zone(zone)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise _unexpected("vm.info", f"{type(error).__name__}: {error}") from None
        return dict(answer)

    def operation(self, number: int, wait: float = 0.0, *, timeout: float | None = None) -> dict[str, Any]:
        """One resize; the server answers when it ends, or after `wait` seconds. It has `timeout` seconds besides, in
        place of those of the client."""
        question = f"operations/{number}" + (f"?wait={wait:g}" if wait else "")
        answer = self._get(question, (timeout or self.timeout) + wait)
        try:
            _check_operation(answer)
        except (TypeError, KeyError, ValueError) as error:
            raise _unexpected(question, f"{type(error).__name__}: {error}") from None
        return dict(answer)

    def blocks(self, zone: str, addr: int = 0) -> ZoneBlocks:
        """A zone's blocks as they are now; `addr` is its region's guest address, which `info()` has."""
        question = f"zones/{quote(zone, safe='')}/blocks"
        answer = self._get(question)
        try:
            return ZoneBlocks(plugged=answer["plugged"], **_sizes(answer, addr))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise _unexpected(question, f"{type(error).__name__}: {error}") from None

    def counts(self, zone: str, most: int, addr: int = 0) -> ZoneCounts:
        """The same as counts of blocks, `most` of them at most: the answer is as short, however many blocks there are.

        UsageError for a number of counts that the server doesn't give.
        """
        question = f"zones/{quote(zone, safe='')}/blocks?cells={most}"
        answer = self._get(question)
        try:
            per_cell, nb_runs = _whole(answer["per_cell"]), _whole(answer["nb_runs"])
            counts = [_whole(count) for count in answer["cells"]]
            if per_cell != 1 << (max(1, -(-_whole(answer["nb_blocks"]) // most)) - 1).bit_length():
                raise ValueError(f"counts of {per_cell} blocks each are not the finest of {most} or fewer")
            return ZoneCounts(per_cell=per_cell, counts=counts, nb_runs=nb_runs, **_sizes(answer, addr))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise _unexpected(question, f"{type(error).__name__}: {error}") from None

    def resize(self, size: int) -> int:
        """`vm.resize` to `size` bytes; the operation's number."""
        return self._resize("vm.resize", {"desired_ram": size})

    def resize_zone(self, zone: str, size: int) -> int:
        """`vm.resize-zone` to `size` bytes, boot memory included; the operation's number."""
        return self._resize("vm.resize-zone", {"id": zone, "desired_ram": size})

    def pause(self) -> None:
        """`vm.pause`: blocks stay as they are until `resume()`."""
        self._do("vm.pause")

    def resume(self) -> None:
        """`vm.resume`."""
        self._do("vm.resume")

    def system_reset(self) -> None:
        """`system-reset`: the machine is reset, and every block unplugged. NotNow where the server refuses."""
        self._do("system-reset")

    def events(self, *, after: int | None = None, idle: float = SILENCE) -> Iterator[dict[str, Any]]:
        """Events as they happen, until the server ends the stream or says nothing for `idle` seconds.

        With `after`, the number of an event, the first are those that came since, as far as the server knows them.
        """
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self._exchange("GET", "events", None, idle, headers) as response:
            while line := response.readline(_MOST_OF_LINE + 1):
                if len(line) > _MOST_OF_LINE:
                    raise _unexpected("events", f"a line of more than {_MOST_OF_LINE} bytes")
                if line.startswith(b"data:"):
                    event = _decoded("events", line[len(b"data:") :])
                    if not isinstance(event, dict):
                        raise _unexpected("events", event)
                    yield event

    # How it is asked.

    def _get(self, question: str, timeout: float | None = None) -> Any:
        with self._exchange("GET", question, None, timeout or self.timeout) as response:
            return _decoded(question, _read(question, response))

    def _do(self, action: str) -> None:
        with self._exchange("PUT", action, None, self.timeout) as response:
            _read(action, response)

    def _resize(self, action: str, body: dict[str, Any]) -> int:
        with self._exchange("PUT", action, body, self.timeout) as response:
            number = response.headers.get("Operation-Id", "")
            if not (number.isascii() and number.isdigit()):
                raise _unexpected(action, f"Operation-Id: {number}")
            return int(number[:20])

    @contextmanager
    def _exchange(
        self,
        method: str,
        question: str,
        body: dict[str, Any] | None,
        timeout: float,
        headers: dict[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """One request and the head of its answer, which is a good one."""
        text = None if body is None else json.dumps(body)
        headers = headers or ({} if text is None else {"Content-Type": "application/json"})
        try:
            with closing(_Connection(self.path, timeout)) as connection:
                connection.request(method, PREFIX + question, text, headers)
                with connection.getresponse() as response:
                    if response.status >= http.client.MULTIPLE_CHOICES:
                        raise _refusal(question, response)
                    yield response
        except FieldError:
            raise
        except TimeoutError:
            raise TimedOut(question, self.path, f"no answer within {timeout:g} s", "try again") from None
        except (http.client.RemoteDisconnected, http.client.IncompleteRead, ConnectionError, EOFError):
            raise Disconnected(question, self.path, "the server broke off", "try again") from None
        except (http.client.HTTPException, ValueError) as error:
            raise _unexpected(question, f"{type(error).__name__}: {error}") from None


def _read(question: str, response: http.client.HTTPResponse) -> bytes:
    body = response.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise _unexpected(question, f"more than {MOST_BYTES} bytes")
    if response.length:  # what is still to come of it; a bounded read() passes over an early end
        raise EOFError
    return body


def _decoded(question: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _unexpected(question, text[:60]) from None


def _refusal(question: str, response: http.client.HTTPResponse) -> Exception:
    """What a bad answer says, as the error that it is."""
    try:
        said = json.loads(response.read(_MOST_OF_LINE))
        field, value, limit, remedy = (said[name] for name in ("field", "value", "limit", "remedy"))
    except (ValueError, TypeError, KeyError, RecursionError):
        return _unexpected(question, f"{response.status} {response.reason}")
    if response.status == http.client.SERVICE_UNAVAILABLE:
        return NotNow(field, value, limit, remedy)
    if response.status >= http.client.INTERNAL_SERVER_ERROR:
        return HostError(field, value, limit, remedy)
    return UsageError(field, value, limit, remedy)


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value <= U64_MAX:
        raise ValueError(f"{value!r} is no whole number below 2**64")
    return value


def _sizes(answer: dict[str, Any], addr: int) -> Sizes:
    """What an answer says of a region but its blocks."""
    return Sizes(
        addr=addr,
        block_size=_whole(answer["block_size"]),
        nb_blocks=_whole(answer["nb_blocks"]),
        usable_blocks=_whole(answer["usable_blocks"]),
        requested_blocks=_whole(answer["requested_blocks"]),
    )


def _check_zone(zone: dict[str, Any]) -> None:
    """Refuse a zone that lacks what every zone has, or has something else for it."""
    has_device = bool(zone["block_size"])
    for name in ZONE_NUMBERS:
        if zone[name] is not None or (has_device and name not in MAY_BE_UNKNOWN):
            _whole(zone[name])
    for name in _LATER_NUMBERS:
        if zone.get(name) is not None:
            _whole(zone[name])
    for count in zone["answers"].values() if has_device or zone["answers"] else ():
        _whole(count)
    if not isinstance(zone["id"], str):
        raise TypeError("a zone's id is no text")
    if zone["operation"] is not None:
        _check_operation(zone["operation"])


def _check_operation(operation: dict[str, Any]) -> None:
    for name in ("id", "target", "plugged", "rate"):
        _whole(operation[name])
    for name in ("zone", "state", "verdict"):
        if not isinstance(operation[name], str):
            raise TypeError(f"an operation's {name} is no text")
    if not isinstance(operation["seconds"], (int, float)) or not 0 <= operation["seconds"] <= U64_MAX:
        raise ValueError("an operation's seconds are no time")


def _unexpected(question: str, answer: object) -> PeerError:
    return PeerError(question, str(answer)[:200], "is no answer that the API has", "is this virtio-mem's API socket?")
