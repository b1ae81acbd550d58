"""What is counted of requests, over whatever time."""

from __future__ import annotations

import pytest

from tests.device.helpers import BLOCK
from tests.device.test_service import ACK, PLUG, UNPLUG, UNPLUG_ALL, ask, make_service
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
