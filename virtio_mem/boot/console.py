"""A guest that does what it is told on its console: for demonstrations and tests, which have no keyboard."""

from __future__ import annotations

import os
import re
import threading
from typing import IO

from vhost_user.errors import PeerError, TimedOut
from vhost_user.owned_fd import OwnedFd

READY = "guest is ready"

OBEY = f"""
dmesg -n 1
stty -echo
echo "{READY}"
while read -r line; do
    eval "$line" 2>&1
    echo "--- $?"
done
"""
"""What /init does: each line is a command of the shell, whose end and status it tells."""

_END = re.compile(r"\A(.*?)^--- (\d+)\n", re.DOTALL | re.MULTILINE)


class Console:
    """The console of a guest that runs OBEY: `keyboard` is what it reads, `screen` what it writes, and is listened to
    until its other end is closed, also when it is closed here. One thread asks.

    PeerError where the guest ends, or a command fails; TimedOut where it takes too long.
    """

    def __init__(self, keyboard: IO[bytes], screen: IO[bytes]) -> None:
        self._keyboard, self._screen = keyboard, OwnedFd.duplicate_of(screen.fileno())
        self._said = ""
        self._over = False
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="guest-console", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._screen:
            while data := os.read(self._screen.fileno(), 1 << 16):
                with self._more:
                    self._said += data.decode(errors="replace").replace("\r", "")
                    self._more.notify_all()
        with self._more:
            self._over = True
            self._more.notify_all()

    def wait_for_boot(self, seconds: float) -> None:
        """Until the guest is ready, once more if it was before."""
        self._take(re.compile(rf"\A(.*?)^{READY}()\n", re.DOTALL | re.MULTILINE), "the guest to boot", seconds)

    def run(self, command: str, seconds: float = 30.0) -> str:
        """What a command in the guest prints."""
        self._keyboard.write(command.encode() + b"\n")
        self._keyboard.flush()
        printed, status = self._take(_END, command, seconds)
        if status != "0":
            raise PeerError("guest", command, f"ended with status {status}: {printed}")
        return printed

    def _take(self, pattern: re.Pattern[str], what: str, seconds: float) -> tuple[str, str]:
        """The groups of the first match, which is taken away with all before it."""
        found: list[re.Match[str]] = []

        def there() -> bool:
            found[:] = filter(None, [pattern.search(self._said)])
            return bool(found) or self._over

        with self._more:
            if not self._more.wait_for(there, seconds):
                raise TimedOut("guest", what, f"not within {seconds:g} s")
            if not found:
                raise PeerError("guest", what, f"the guest ended: {self._said[-500:]}")
            self._said = self._said[found[0].end() :]
            return found[0][1], found[0][2]
