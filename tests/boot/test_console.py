"""The console of the demo's guest."""

from __future__ import annotations

import io
import os

import pytest

from vhost_user.errors import PeerError
from virtio_mem.boot.console import Console

LONG = 10.0


def test_what_a_guest_says_is_read_to_its_end() -> None:
    """Also behind the end of whoever had started it, and closed its output."""
    reading, writing = os.pipe()
    with open(reading, "rb") as screen, open(writing, "wb", buffering=0) as guest:
        keyboard = io.BytesIO()
        console = Console(keyboard, screen)
        guest.write(b"guest is ready\r\n")
        console.wait_for_boot(LONG)
        screen.close()
        guest.write(b"one\n--- 0\n")
        assert console.run("echo one", LONG) == "one\n"
        guest.write(b"no such thing\n--- 127\n")
        with pytest.raises(PeerError, match="status 127: no such thing"):
            console.run("none", LONG)
        guest.write(b"last words")
        guest.close()
        with pytest.raises(PeerError, match="the guest ended: last words"):
            console.run("more", LONG)
        assert keyboard.getvalue() == b"echo one\nnone\nmore\n"
