"""All resizes of a machine: at most one of each zone that has not ended, and the last of those that have.

Nothing here calls anybody: who reports what the guest did (`moved`, `answered`) and asks for the verdict (`settle`) is
the control. `start`, `moved`, `answered` and `settle` are called under the lock of the zone's device, so that what they
are told is true at that moment; the lock here is taken after it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from virtio_mem.operation import ENDED, Operation, State, ZoneView

MAX_OPERATIONS = 64
"""Operations that are remembered: the last one of each zone, and as many that have ended as there is room for."""

_WAIT_SECONDS = 1.0
"""How often who waits looks for himself: a stall is the absence of news."""


class Operations:
    """All operations of a machine; thread-safe. `changed` tells that there is something new to be saved."""

    def __init__(self) -> None:
        self.changed = False
        self._next = 1
        self._operations: dict[int, Operation] = {}
        self._condition = threading.Condition()

    # What the control reports.

    def start(
        self, zone: str, target: int, plugged: int, block_size: int, now: float
    ) -> tuple[Operation, Operation | None]:
        """Zone `zone` is to have `target` bytes: the operation for that, and the one that it superseded.

        The target that the zone's operation has already is that operation again, its patience renewed.
        """
        with self._condition:
            current = self._open(zone)
            if current is not None and current.target == target:
                current.moved = now
                self._enter(current, State.REACHED if plugged == target else State.RUNNING, "", now)
                return current, None
            operation = Operation(
                self._next, zone, target, block_size, plugged, plugged, time.time(), began=now, moved=now
            )
            operation.samples.append((now, plugged))
            self._next += 1
            if current is not None:
                self._enter(current, State.SUPERSEDED, f"by operation {operation.id}", now)
            self._operations[operation.id] = operation
            self._forget_old()
            if plugged == target:
                self._enter(operation, State.REACHED, "", now)
            self._say_changed()
            return operation, current

    def moved(self, zone: str, plugged: int, now: float, *, anew: bool = False) -> Operation | None:
        """Blocks of `zone` came or went, and it has `plugged` bytes now; `anew` if all of them went at once. The
        operation, where that ended it."""
        with self._condition:
            operation = self._open(zone)
            if operation is None:
                return None
            nearer = operation.note(plugged, now, anew=anew)
            if plugged != operation.target:
                if nearer:
                    self._enter(operation, State.RUNNING, "", now)
                return None
            self._enter(operation, State.REACHED, "", now)
            return operation

    def answered(self, zone: str, *, busy: str = "", error: str = "") -> None:
        """A request of the guest of `zone` was answered, and no block moved: with the reason if it was refused."""
        with self._condition:
            operation = self._open(zone)
            if operation is not None:
                operation.asked = True
                if busy or error:
                    operation.busy, operation.error = busy, error

    def settle(self, zone: str, view: ZoneView, now: float) -> Operation | None:
        """Judge the operation of `zone` by what there is now. The operation, where its state became another one."""
        with self._condition:
            operation = self._open(zone)
            if operation is None:
                return None
            if operation.plugged != view.plugged:
                operation.note(view.plugged, now, anew=True)
            before = operation.state
            self._enter(operation, *operation.judge(view, now), now)
            return operation if operation.state is not before else None

    # What others ask.

    def get(self, operation_id: int) -> dict[str, Any] | None:
        """An operation as plain data; None for one that never was, or was forgotten."""
        with self._condition:
            operation = self._operations.get(operation_id)
            return operation.as_dict(time.monotonic()) if operation else None

    def all(self) -> list[dict[str, Any]]:
        """Every operation that is remembered as plain data, the oldest first."""
        with self._condition:
            now = time.monotonic()
            return [operation.as_dict(now) for operation in self._operations.values()]

    def last(self, zone: str) -> dict[str, Any] | None:
        """The last operation of `zone` as plain data."""
        with self._condition:
            mine = [operation for operation in self._operations.values() if operation.zone == zone]
            return mine[-1].as_dict(time.monotonic()) if mine else None

    def wait(
        self, operation_id: int, seconds: float, refresh: Callable[[], None], given_up: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """`get()`, once the operation is not running any more, after `seconds`, or when `given_up`.

        `refresh` has it judged anew; it and `given_up` are called about once a second, without the lock.
        """
        deadline = time.monotonic() + seconds
        while True:
            refresh()
            over = given_up()
            with self._condition:
                operation = self._operations.get(operation_id)
                left = deadline - time.monotonic()
                if operation is None or operation.state is not State.RUNNING or left <= 0 or over:
                    return operation.as_dict(time.monotonic()) if operation else None
                self._condition.wait(min(left, _WAIT_SECONDS))

    def wake(self) -> None:
        """Have everybody who waits look whether to give up."""
        with self._condition:
            self._condition.notify_all()

    # From one process to the next.

    def dump(self) -> dict[str, Any]:
        """All of it as plain data, for `load()`; what is new from now on is told by `changed` again."""
        with self._condition:
            self.changed = False
            saved = [operation.save() for operation in self._operations.values()]
            return {"next": self._next, "operations": saved}

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Operations:
        """What `dump()` made. ValueError, TypeError or KeyError for anything else."""
        operations, now = cls(), time.monotonic()
        for entry in saved["operations"]:
            operation = Operation.parse(entry, now)
            operations._operations[operation.id] = operation
        operations._forget_old()
        operations._next = max([int(saved["next"]), *(key + 1 for key in operations._operations)])
        return operations

    # Under the lock.

    def _open(self, zone: str) -> Operation | None:
        """The operation of `zone` that has not ended; it is the zone's last."""
        for operation in reversed(self._operations.values()):
            if operation.zone == zone:
                return None if operation.state in ENDED else operation
        return None

    def _enter(self, operation: Operation, state: State, reason: str, now: float) -> None:
        if operation.state is state:
            operation.reason = reason
            return
        operation.state, operation.reason = state, reason
        operation.ended = now if state in ENDED else None
        self._say_changed()

    def _say_changed(self) -> None:
        self.changed = True
        self._condition.notify_all()

    def _forget_old(self) -> None:
        """Forget the oldest that have ended, but for the last one of each zone."""
        last = {operation.zone: operation.id for operation in self._operations.values()}
        ended = (key for key in self._operations if key != last[self._operations[key].zone])
        for key in list(ended)[: max(0, len(self._operations) - MAX_OPERATIONS)]:
            del self._operations[key]
