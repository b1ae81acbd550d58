"""What is seen of a daemon from outside, whatever others on the machine have."""

from __future__ import annotations

import mmap
import os
import socket
from pathlib import Path

from vhost_user.attack.oracles import holdings, listens

ODD = os.fsdecode(b"caf\xe9 \x0c\r\x85")
"""A name that is no UTF-8, with what ends lines for some."""


def test_files_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / ODD).write_bytes(bytes(4096))
    with (tmp_path / ODD).open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert holdings(os.getpid())[f"mapping of {tmp_path / ODD}"] == 1


def test_sockets_may_have_any_name(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in (ODD, f"{ODD}\nsecond line", "plain")]
    for path in paths:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            assert not listens(path)
            sock.listen()
            assert listens(path) or "\n" in path
            assert listens(paths[-1]) is (path == paths[-1])
