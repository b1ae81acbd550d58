"""Bodies: each wrong one is a 400 that names what is wrong, and changes nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.rig import BLOCK, BOOT, REGION, Rig
from virtio_mem.api.body import MAX_CELLS, cell_count, parse_object, parse_query, seconds
from virtio_mem.api.message import ApiError

KNOWN = ("id", "desired_ram")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"desired_ram": BOOT - 1}, "desired_ram"),
        ({"desired_ram": BOOT + 1}, "desired_ram"),
        ({"desired_ram": BOOT + REGION + BLOCK}, "desired_ram"),
        ({"desired_ram": -1}, "desired_ram"),
        ({"desired_ram": 2**64}, "desired_ram"),
        ({"desired_ram": 2**64 - 1}, "desired_ram"),
        ({"desired_ram": 10**4000}, "desired_ram"),
        ({"desired_ram": True}, "desired_ram"),
        ({"desired_ram": float(BOOT)}, "desired_ram"),
        ({"desired_ram": str(BOOT)}, "desired_ram"),
        ({"desired_ram": [BOOT]}, "desired_ram"),
        ({"desired_ram": {}}, "desired_ram"),
        ({"desired_ram": None}, "desired_ram"),
        ({}, "desired_ram"),
        ({"desired_ram": BOOT, "desired_vcpus": 1}, "desired_vcpus"),
        ({"desired_ram": BOOT, "desired_balloon": 0}, "desired_balloon"),
        ({"desired_ram": BOOT, "desired-ram": BOOT}, "desired-ram"),
        ({"desired_ram": BOOT, "": 0}, ""),
        ([], "body"),
        ("x", "body"),
        (None, "body"),
        (b"", "body"),
        (b" ", "body"),
        (b"{", "body"),
        (b'{"desired_ram": 1}x', "body"),
        (b"\xff", "body"),
        (b"\xef\xbb\xbf{}", "body"),
        (b'{"desired_ram": NaN}', "body"),
        (b'{"desired_ram": -Infinity}', "body"),
        (b'{"desired_ram": 1e400}', "desired_ram"),
        (b'{"desired_ram": 01}', "body"),
        (b'{"desired_ram": ' + b"9" * 5000 + b"}", "body"),
        (b'{"desired_ram": 1, "desired_ram": 2}', "desired_ram"),
        (b'{"desired_ram": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "body"),
        (b"[" * 60_000, "body"),
        (b'{"a":' * 10_000, "body"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_cannot_be_changes_nothing(rig: Rig, body: object, field: str) -> None:
    before = rig.control.info()
    sent = json.dumps(body).encode() if body is None else body
    answer = rig.ask("PUT", "/api/v1/vm.resize", sent)
    assert (answer.status, answer.json["field"]) == (400, field)
    assert set(answer.json) == {"field", "value", "limit", "remedy", "message"}
    assert len(answer.body) < 2000
    assert rig.control.info() == before
    assert rig.control.operations.all() == []
    assert rig.notices == []


def test_a_size_between_two_blocks_names_both(rig: Rig) -> None:
    answer = rig.ask("PUT", "/api/v1/vm.resize", {"desired_ram": BOOT + 1}).json
    assert (answer["value"], answer["limit"]) == (BOOT + 1, f"has to be its boot size, {BOOT}, and whole blocks of 2M")
    assert answer["remedy"] == f"the nearest are {BOOT} and {BOOT + BLOCK}"


def test_zones_are_resized_one_by_one(zones: Rig) -> None:
    refused = zones.ask("PUT", "/api/v1/vm.resize", {"desired_ram": BOOT})
    assert (refused.status, refused.json["remedy"]) == (400, "resize one of its zones: a, b")
    for body, status in (
        ({"id": "c", "desired_ram": BOOT}, 404),
        ({"id": 1, "desired_ram": BOOT}, 400),
        ({"desired_ram": BOOT}, 400),
        ({"id": "a"}, 400),
        ({"id": "a", "desired_ram": BOOT + 512 * 2**20 + BLOCK}, 400),
        ({"id": "\ud800", "desired_ram": BOOT}, 404),
        ({"id": "a", "desired_ram": BOOT, "desired_vcpus": None}, 400),
    ):
        assert zones.ask("PUT", "/api/v1/vm.resize-zone", body).status == status, body
    assert zones.control.operations.all() == []


@pytest.mark.parametrize("action", ["snapshot", "coredump"])
@pytest.mark.parametrize("url", ["", "/tmp/x", "file://x", "file:///a\0b", "file:///\ud800", "http:///x", None, 1])
def test_a_path_that_cannot_be(rig: Rig, url: object, action: str) -> None:
    rig.control.pause()
    answer = rig.ask("PUT", f"/api/v1/vm.{action}", {"destination_url": url})
    assert (answer.status, answer.json["field"]) == (400, "destination_url")


def test_a_directory_in_none_is_the_clients_mistake(rig: Rig, tmp_path: Path) -> None:
    rig.control.pause()
    answer = rig.ask("PUT", "/api/v1/vm.snapshot", {"destination_url": f"file://{tmp_path}/no/where"})
    assert (answer.status, answer.json["field"]) == (400, "directory")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KNOWN, "x"]), inner, max_size=3),
)


@given(JSON_VALUES)
def test_any_json_is_taken_as_it_is_or_refused(value: object) -> None:
    if isinstance(value, dict) and set(value) <= set(KNOWN):
        assert parse_object(json.dumps(value).encode(), KNOWN) == value
        return
    with pytest.raises(ApiError) as refused:
        parse_object(json.dumps(value).encode(), KNOWN)
    assert refused.value.status == 400


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE+-.nultrfas \\', max_size=60).map(str.encode))
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    with suppress(ApiError):
        assert isinstance(parse_object(data, KNOWN), dict)


@given(st.text(max_size=40))
def test_any_query_is_taken_or_refused(query: str) -> None:
    with suppress(ApiError):
        assert 0 <= (seconds(parse_query(query, ("wait",)), "wait") or 0) <= 300


HOSTILE = [
    "",
    "0",
    "-1",
    "+1",
    "1.0",
    "1e3",
    "0x10",
    " 1",
    "1_0",
    "65537",
    "\u0663",
    "\u00b2",
    "9" * 5000,
    "null",
    "\0",
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
def test_a_number_of_cells_that_cannot_be(rig: Rig, value: str) -> None:
    answer = rig.get(f"/api/v1/zones/mem0/blocks?{urlencode({'cells': value})}")
    assert (answer.status, answer.json["field"], answer.json["limit"]) == (
        400,
        "cells",
        "must be from 1 to 65536 cells",
    )
    assert str(answer.json["value"])[:20] == value[:20]


@pytest.mark.parametrize("query", ["cells=1&cells=2", "cell=1", "cells", "cells=1&wait=0", "cells=%ff"])
def test_a_query_for_blocks_that_cannot_be(rig: Rig, query: str) -> None:
    answer = rig.get(f"/api/v1/zones/mem0/blocks?{query}")
    assert answer.status == 400
    assert answer.json["field"] in ("query", "cell", "wait", "cells")


@given(st.text(max_size=40))
def test_any_text_is_a_number_of_cells_or_refused(value: str) -> None:
    with suppress(ApiError):
        assert 1 <= (cell_count({"cells": value}, "cells") or 0) <= MAX_CELLS
    assert cell_count({}, "cells") is None


@given(st.floats(0, 300))
def test_a_time_may_be_written_as_json_has_numbers(value: float) -> None:
    assert seconds(parse_query(f"wait={json.dumps(value).replace('+', '%2B')}", ("wait",)), "wait") == value
