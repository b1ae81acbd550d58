"""Registers that are accessed while another thread is at the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.device.helpers import REGION
from tests.machine.helpers import Rig, guest_ram
from virtio_mem.mmio_registers import MAGIC, Interrupt, Register


@pytest.fixture
def rig() -> Iterator[Rig]:
    with guest_ram() as memory:
        yield Rig(memory)


def test_an_interrupt_is_looked_at_and_acknowledged_while_a_request_is_carried_out(rig: Rig) -> None:
    rig.driver()
    rig.service.resize(REGION // 2)
    rig.transport.notify_config()
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def carry_out() -> None:
        with rig.service.lock:
            inside.set()
            assert go_on.wait(30)

    def access() -> None:
        seen.append([rig.transport.read(offset) for offset in range(0, Register.CONFIG_GENERATION, 4)])
        rig.transport.write(Register.INTERRUPT_ACK, Interrupt.CONFIG_CHANGE)
        seen.append([rig.transport.read(Register.INTERRUPT_STATUS)])

    threads = [threading.Thread(target=carry_out), threading.Thread(target=access)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    threads[1].join(5)
    waited = threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    assert not waited
    assert seen[0][Register.MAGIC_VALUE // 4] == MAGIC
    assert seen[0][Register.STATUS // 4] == 15
    assert seen[0][Register.INTERRUPT_STATUS // 4] == Interrupt.CONFIG_CHANGE
    assert seen[1] == [0]


@pytest.mark.clause("MMIO-3")
@pytest.mark.parametrize("within", ["__or__", "__and__"])
def test_an_interrupt_that_is_raised_while_another_is_acknowledged(
    rig: Rig, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of one the other begins: none is lost, and none that was acknowledged comes back."""

    def raise_used() -> None:
        rig.transport._raise(Interrupt.USED_BUFFER)

    def acknowledge() -> None:
        rig.transport.write(Register.INTERRUPT_ACK, int(Interrupt.CONFIG_CHANGE))

    first, second = (raise_used, acknowledge) if within == "__or__" else (acknowledge, raise_used)
    real, thread = getattr(Interrupt, within), threading.Thread(target=second)

    def slow(one: Interrupt, other: Interrupt) -> Interrupt:
        if thread.ident is None:
            thread.start()
            thread.join(0.1)
        combined: Interrupt = real(one, other)
        return combined

    rig.driver()
    rig.transport.interrupt_status = Interrupt.CONFIG_CHANGE
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, within, slow)
        first()
        thread.join()
    assert rig.transport.read(Register.INTERRUPT_STATUS) == Interrupt.USED_BUFFER
