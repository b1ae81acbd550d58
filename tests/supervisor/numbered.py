"""Numbered requests, and a device that tells when it sees one again whose answer the guest has."""

from __future__ import annotations

import random

from tests.backend.rig import Running
from tests.inflight.world import Guest, answer_to, number_of
from tests.supervisor.rig import REQUESTS, Board, Counter
from vhost_user.chain import Chain

WRONG, ANSWERED, ANSWERED_WORDS = 8, 64, 448
"""Words of the board: a request that was seen after its answer, plus 1; and what was answered, a bit for each number
modulo their number. Those words end with a board of 4096 bytes."""


class Numbered(Counter):
    """Answers a number with the number, in the other byte order."""

    name = "numbered"

    def echo(self, chain: Chain) -> int:
        number = number_of(chain)
        if is_answered(self.board, number):
            self.board[WRONG] = number + 1
        self.board[REQUESTS] += 1
        if not chain.writable:
            return 0
        chain.write(answer_to(number))
        return 8


def is_answered(board: Board, number: int) -> bool:
    word, bit = divmod(number % (64 * ANSWERED_WORDS), 64)
    return bool(board[ANSWERED + word] >> bit & 1)


def tell_answered(board: Board, number: int, done: bool) -> None:
    word, bit = divmod(number % (64 * ANSWERED_WORDS), 64)
    board[ANSWERED + word] = board[ANSWERED + word] & ~(1 << bit) | done << bit


class Load:
    """A guest that sends and receives on a ring, and checks that each number comes back once."""

    def __init__(self, ring: Running, board: Board, rng: random.Random) -> None:
        self.guest = Guest(ring.memory, ring.driver, rng)
        self.ring, self.board = ring, board

    def step(self) -> None:
        """Send some, receive some."""
        while self.guest.rng.random() < 0.8 and self.send():
            pass
        self.ring.kick()
        self.receive()

    def send(self, *, malformed: bool = True) -> bool:
        """One more request; False where there is no room."""
        tell_answered(self.board, self.guest.number, False)
        return self.guest.send(malformed=malformed)

    def receive(self) -> int:
        """How many came back."""
        count = 0
        while (number := self.guest.receive()) is not None:
            tell_answered(self.board, number, True)
            count += 1
        return count

    def finish(self, timeout: float = 10.0) -> None:
        """Wait for all that was sent. The driver waits for its calls, as a guest does."""
        while self.guest.flying:
            if not self.receive() and not self.ring.driver.enable_interrupts():
                assert self.ring.vring.wait(timeout), f"no call came, and {len(self.guest.flying)} requests are out"
        assert self.board[WRONG] == 0, f"{self.board[WRONG] - 1} was seen again"
        assert sorted(self.guest.answered) == list(range(self.guest.number))
