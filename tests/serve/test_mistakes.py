"""A mistake in the device in service: its ring fails, blocks and books are as they were, and there are two ways on."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.processes import wait_until
from tests.serve.rig import FORMS, Guest, guest, zone
from tests.serve.supervised import Supervised, supervised
from vhost_user.frontend import Frontend
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.plan import ServePlan

PLUG = RequestType.PLUG


@contextmanager
def failing(
    form: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Supervised, Guest, Frontend]]:
    """A service whose device makes a mistake of each request as long as a file is there."""
    bug, answer = directory / "bug", MemDevice._answer

    def mistaken(device: MemDevice, keys: memoryview, requests: memoryview, answers: memoryview) -> int:
        if bug.exists():
            raise ZeroDivisionError
        return answer(device, keys, requests, answers)

    monkeypatch.setattr(MemDevice, "_answer", mistaken)
    with (
        guest(form) as machine,
        supervised(ServePlan(zones=(zone(),)), directory) as service,
        Frontend.connect(str(service.sockets["mem0"]), features=machine.features, timeout=20) as frontend,
    ):
        machine.start(frontend)
        assert machine.ask(frontend, PLUG, 0, 2) is ResponseType.ACK
        worker = service.worker()
        bug.touch()
        machine.send_typed(frontend, PLUG, 2, 2)
        assert select.select([frontend.vring(0).err], [], [], 10)[0], "nobody was told"
        assert frontend.vring(0).failed
        assert service.worker() == worker, "other zones of this worker go on"
        bug.unlink()
        yield service, machine, frontend


@pytest.mark.parametrize("form", FORMS)
def test_another_worker_takes_the_request_again(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(form, tmp_path, monkeypatch) as (service, machine, frontend):
        worker = service.worker()
        service.upgrade()
        wait_until(lambda: service.worker() not in (None, worker), "another worker is there")
        assert machine.took(PLUG, 2, 2, machine.wait(frontend, 20)) is ResponseType.ACK
        assert machine.ask(frontend, PLUG, 4, 2) is ResponseType.ACK
        machine.check(frontend)


@pytest.mark.parametrize("form", FORMS)
def test_a_driver_that_starts_the_ring_anew_is_served(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with failing(form, tmp_path, monkeypatch) as (service, machine, frontend):
        frontend.vring(0).start(machine.layout, frontend.vring(0).stop())
        assert machine.ask(frontend, PLUG, 4, 2) is ResponseType.ACK
        machine.check(frontend)
        assert service.worker() is not None
