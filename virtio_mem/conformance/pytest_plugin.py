"""A plugin of pytest: `pytest --virtio-mem-target=TARGET` adds a test for each clause that the kit can show.

It is loaded by every run of pytest where the package is installed, so it imports nothing until it is asked for.
"""

from __future__ import annotations

import pytest

GROUP = "virtio-mem conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup(GROUP)
    group.addoption(
        "--virtio-mem-target",
        metavar="TARGET",
        help="judge this virtio-mem device, a test for each clause: see virtio-mem conformance --help",
    )
    group.addoption(
        "--virtio-mem-profile", choices=("quick", "full"), default="quick", help="how much is done (default: quick)"
    )
    group.addoption("--virtio-mem-seed", type=int, default=0, metavar="N", help="for the state machine (default: 0)")
    group.addoption(
        "--virtio-mem-machines",
        type=int,
        default=1,
        metavar="N",
        help="run the state machine N times, with a seed of its own each: for the workers of pytest-xdist (default: 1)",
    )
    group.addoption(
        "--virtio-mem-database",
        metavar="WHERE",
        help="keep failing sequences: a directory, or redis://HOST",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests, before others choose among them."""
    if target := config.getoption("--virtio-mem-target"):
        from virtio_mem.conformance.pytest_items import items_for  # noqa: PLC0415 - see above

        items += items_for(session, target)
