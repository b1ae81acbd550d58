"""The program in docs/service.md works against a machine at an API socket."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.cli.rig import ONE_ZONE, Machine
from vhost_user.units import GIB, MIB
from virtio_mem.client import Client
from virtio_mem.policy import Policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "service.md"


def test_sizes_follow_pressure(api: str) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program, PAGE, "exec"), names)
    policy = Policy(GIB, step=128 * MIB)
    with Machine(ONE_ZONE, Path(api)) as machine:
        device = machine.service("mem0").device
        for pressures, requested in (({}, 0), ({"vm": 0.05}, 0), ({"vm": 0.4}, 128), ({"vm": 0.4}, 128)):
            names["once"](policy, {"vm": Client(api)}, pressures)
            assert device.requested_size == requested * MIB
