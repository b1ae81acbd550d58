"""What is counted of requests, over whatever time."""

from __future__ import annotations

import logging

import pytest

from tests.device.helpers import BLOCK
from tests.device.test_service import ACK, ERROR, PLUG, UNPLUG, UNPLUG_ALL, ask, make_service
from vhost_user.units import ByteCount


@pytest.mark.parametrize("kept", [0, 2 * BLOCK])
def test_counts_of_bytes_end_where_clients_can_follow(kept: int) -> None:
    service, _, memory = make_service()
    service.tally.unplugged_bytes = service.tally.unreturned_bytes = 2**63 - 1 - BLOCK
    memory.kept = ByteCount(kept)
    for _ in range(3):
        ask(service, PLUG, 0, 4)
        assert ask(service, UNPLUG, 1, 2).type is ACK
        ask(service, UNPLUG_ALL)
    info = service.info()
    expected = 2**63 - 1 if kept else 2**63 - 1 - BLOCK
    assert (info["unplugged_bytes"], info["unreturned_bytes"]) == (2**63 - 1, expected)


@pytest.mark.parametrize("looked_at", [False, True], ids=["counted in C", "each looked at"])
def test_an_error_is_logged_with_its_reason_once_of_each_kind(
    looked_at: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG if looked_at else logging.INFO, "virtio_mem")
    service, _, _ = make_service()
    service.name = "zone z"

    def told() -> list[str]:
        service.poll(0)
        lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        caplog.clear()
        return lines

    again = "Linux gives a device up that says so"
    assert ask(service, PLUG, 0, 4).type is ACK
    assert told() == []
    for _ in range(3):
        assert ask(service, PLUG, 3).type is ERROR
    assert ask(service, 77).type is ERROR
    assert sorted(told()) == [
        f"zone z: PLUG answered ERROR 3 times: a block is plugged already; {again}",
        f"zone z: unknown answered ERROR 1 times: the request type is unknown; {again}",
    ]
    ask(service, PLUG, 3)
    assert told() == [], "a guest can't fill the log"
    assert ask(service, UNPLUG, 9).type is ERROR
    assert told() == [f"zone z: UNPLUG answered ERROR 1 times: a block is unplugged already; {again}"]
    service.tally.expect_errors()
    ask(service, PLUG, 3)
    assert told() == [f"zone z: PLUG answered ERROR 1 times: a block is plugged already; {again}"]
