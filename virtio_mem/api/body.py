"""JSON bodies and query strings, taken strictly: what could mean two things, or nothing, is refused with its name.

Python's own reader takes more than the standard allows (NaN), keeps the last of two equal keys, and tells nobody of
keys that nobody reads. A request that was misspelt must not do half of what was meant.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from vhost_user.units import U64_MAX
from virtio_mem.api.message import ApiError

MAX_WAIT_SECONDS = 300
"""The longest that one request may wait for an operation."""

MAX_CELLS = 1 << 16
"""The finest picture that one request may ask for: 256 rows of 256 cells, half a megabyte of JSON at most."""

_MAX_QUERY_FIELDS = 8
_NO_PATH = re.compile("[\0\ud800-\udfff]")
"""The zero byte, and what JSON can have and no encoding: half of a pair of surrogates."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")


def refuse(field: str, value: object, limit: str, remedy: str = "") -> ApiError:
    """What to raise for a part of a request that can't be right."""
    return ApiError(HTTPStatus.BAD_REQUEST, field, value, limit, remedy)


def parse_object(body: bytes, known: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object that a body is, which has no other keys than `known`, and none twice."""
    if not body:
        raise refuse("body", "", "must be a JSON object", f"give {', '.join(known)}")
    try:
        value = json.loads(body.decode(), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise refuse("body", f"{len(body)} bytes", f"must be UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise refuse("body", f"{len(body)} bytes", f"must be JSON: {error}") from None
    except RecursionError:
        raise refuse("body", f"{len(body)} bytes", "must not be nested so deep") from None
    except ApiError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise refuse("body", f"{len(body)} bytes", f"must have no such number: {error}") from None
    if not isinstance(value, dict):
        raise refuse("body", type(value).__name__, "must be a JSON object", f"give {', '.join(known)}")
    for key in value:
        if key not in known:
            raise refuse(key, value[key], "is not known here", f"give {', '.join(known)}")
    return value


def no_body(body: bytes) -> None:
    """Refuse a body where there is nothing to say."""
    if body:
        raise refuse("body", f"{len(body)} bytes", "must be empty", "leave it out")


def byte_count(fields: dict[str, Any], name: str) -> int:
    """The size in bytes that `fields` has under `name`: an integer from 0 to 2**64 - 1, written as one."""
    value = fields.get(name)
    if value is None:
        raise refuse(name, None, "must be given: a number of bytes", f'such as "{name}": {1 << 30}')
    if isinstance(value, bool) or not isinstance(value, int):
        raise refuse(name, value, "must be an integer: a number of bytes", f'such as "{name}": {1 << 30}')
    if not 0 <= value <= U64_MAX:
        raise refuse(name, value, f"must be from 0 to {U64_MAX} bytes")
    return value


def text(fields: dict[str, Any], name: str) -> str:
    """The text that `fields` has under `name`."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise refuse(name, value, "must be given: a text")
    return value


def local_path(fields: dict[str, Any], name: str, example: str) -> Path:
    """The absolute path that `fields` has under `name` as a URL, file:///DIR/FILE."""
    value = text(fields, name)
    path = value.removeprefix("file://")
    if path == value or not path.startswith("/") or _NO_PATH.search(path):
        raise refuse(name, value, "must be file:// and an absolute path", f'such as "{name}": "file://{example}"')
    return Path(path)


def only_memory(fields: dict[str, Any], name: str) -> None:
    """Refuse a value for what is not memory; null, as ch-remote sends it, is none."""
    if fields.get(name) is not None:
        raise refuse(name, fields[name], "is not this program's to change: it has memory only", "leave it out")


def parse_query(query: str, known: tuple[str, ...]) -> dict[str, str]:
    """The fields of a query string, none of them twice, and no others than `known`."""
    try:
        pairs = parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query), errors="strict", max_num_fields=_MAX_QUERY_FIELDS
        )
    except ValueError as error:
        raise refuse("query", query, f"can't be read: {error}") from None
    fields = dict(pairs)
    for name, value in fields.items():
        if name not in known:
            raise refuse(name, value, "is not a parameter of this path", "leave it out")
    if len(fields) != len(pairs):
        raise refuse("query", query, "has a parameter twice", "give it once")
    return fields


def seconds(fields: dict[str, str], name: str) -> float | None:
    """The time that a query has under `name`, if it has."""
    if name not in fields:
        return None
    value = fields[name]
    number = float(value) if _NUMBER.fullmatch(value) and len(value) < 32 else None
    if number is None or number > MAX_WAIT_SECONDS:
        raise refuse(name, value, f"must be from 0 to {MAX_WAIT_SECONDS} seconds", "wait again to wait longer")
    return number


def cell_count(fields: dict[str, str], name: str) -> int | None:
    """The number of cells that a query has under `name`, if it has: decimal digits."""
    if name not in fields:
        return None
    value = fields[name]
    number = int(value) if value.isascii() and value.isdigit() and len(value) <= len(str(MAX_CELLS)) else 0
    if not 1 <= number <= MAX_CELLS:
        raise refuse(name, value, f"must be from 1 to {MAX_CELLS} cells", "leave it out for all runs of blocks")
    return number


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise refuse(twice, found[twice], "is given twice", "give it once")
    return found


def _no_constant(name: str) -> None:
    raise refuse("body", name, "is no JSON number")
