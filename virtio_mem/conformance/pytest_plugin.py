"""A plugin of pytest: `pytest --virtio-mem-target=TARGET` adds a test for each clause that the kit can show.

It is loaded by every run of pytest where the package is installed, so it imports nothing until it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from virtio_mem.conformance.pytest_soak import Soak

SOAK: pytest.StashKey[Soak] = pytest.StashKey()
"""What a run with the profile soak has besides."""

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
        "--virtio-mem-profile",
        choices=("quick", "full", "soak"),
        default="quick",
        help="how much is done; soak: one state machine in each worker, until a test fails or SIGINT (default: quick)",
    )
    group.addoption("--virtio-mem-seed", type=int, default=0, metavar="N", help="for the state machine (default: 0)")
    group.addoption(
        "--virtio-mem-machines",
        type=int,
        metavar="N",
        help="run the state machine N times, with a seed of its own each: for the workers of pytest-xdist (default: 1)",
    )
    group.addoption(
        "--virtio-mem-database",
        metavar="WHERE",
        help="keep failing sequences: a directory, or redis://HOST",
    )


def pytest_configure(config: pytest.Config) -> None:
    """A target that there is not is a mistake of the command line's. A soak is told to end by signals, and workers by
    each other."""
    target = config.getoption("--virtio-mem-target")
    if target and not hasattr(config, "workerinput"):
        _check(target)
    if config.getoption("--virtio-mem-target") and config.getoption("--virtio-mem-profile") == "soak":
        from virtio_mem.conformance.pytest_soak import Soak  # noqa: PLC0415 - see above

        config.stash[SOAK] = Soak(config)


def _check(target: str) -> None:
    from vhost_user.errors import FieldError  # noqa: PLC0415 - see above
    from virtio_mem.conformance.target import TargetFailure  # noqa: PLC0415
    from virtio_mem.conformance.targets.parse import check_target  # noqa: PLC0415

    try:
        check_target(target)
    except (FieldError, TargetFailure) as error:
        raise pytest.UsageError(f"--virtio-mem-target={target}: {' '.join(str(error).split())}") from error


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker of pytest-xdist is about to begin."""
    if soak := node.config.stash.get(SOAK, None):
        soak.add_worker(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of a soak each worker has one machine."""
    soak = config.stash.get(SOAK, None)
    return None if soak is None else soak.scheduling(log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests, before others choose among them."""
    if target := config.getoption("--virtio-mem-target"):
        from virtio_mem.conformance.pytest_items import items_for  # noqa: PLC0415 - see above

        items += items_for(session, target)
