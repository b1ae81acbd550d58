"""What the API's handlers get and give: a request that was read whole, a reply, and errors as JSON.

All that is sent is ASCII: ch-remote decodes what it reads 256 bytes at a time, and would panic at half a character.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from vhost_user.errors import FieldError, UsageError
from vhost_user.units import U64_MAX

JSON = "application/json"

_LONGEST_VALUE = 200
"""Characters of a wrong value that are shown again."""


class ApiError(UsageError):
    """What was asked can't be done, for the reason that `status` says."""

    def __init__(self, status: HTTPStatus, field: str, value: object, limit: str, remedy: str = "") -> None:
        super().__init__(field, value, limit, remedy)
        self.args = (status, *self.args)
        self.status = status
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class Peer:
    """Who asks, as the kernel knows it: the process that connected."""

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"pid {self.pid} uid {self.uid}"


@dataclass(frozen=True)
class ApiRequest:
    """A request: `path` and `query` as they came, but for what was in front of them in an absolute URL.

    `headers` are by lower-case name. `gone` says whether nobody waits for the reply any more.
    """

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    peer: Peer = Peer(0, 0, 0)
    gone: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Reply:
    """A reply; a body of pieces is sent as they come, and an empty piece only shows that the reader is still there."""

    status: HTTPStatus
    body: bytes | Generator[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(value: object, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Reply:
    """A reply with `value` as JSON."""
    return Reply(status, json.dumps(value).encode(), {"Content-Type": JSON, **(headers or {})})


def error_reply(error: FieldError, status: HTTPStatus, request: ApiRequest | None = None) -> Reply:
    """A reply that tells of an error: field, value, limit, remedy, and all of it in words."""
    headers = error.headers if isinstance(error, ApiError) else {}
    words = f"{error.field}={_shown(error.value)}: {error.limit}"
    if request is not None and _is_ch_remote(request):
        return json_reply([words, error.remedy] if error.remedy else [words], status, headers)
    body = {
        "field": error.field,
        "value": _shown(error.value),
        "limit": error.limit,
        "remedy": error.remedy,
        "message": f"{words}; {error.remedy}" if error.remedy else words,
    }
    return json_reply(body, status, headers)


def _is_ch_remote(request: ApiRequest) -> bool:
    """Whether it asks as ch-remote does: `Accept: */*`, and no name given. That can show a list of texts, no object."""
    return "user-agent" not in request.headers and request.headers.get("accept") == "*/*"


def _shown(value: object) -> Any:
    """A value as JSON can have it, and not longer than it takes to recognize it."""
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) <= U64_MAX):
        return value
    if isinstance(value, int):
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
