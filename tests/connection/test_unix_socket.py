"""Paths of sockets: what none can be bound to is refused before anything is done to it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vhost_user.errors import HostError, UsageError
from vhost_user.unix_socket import MAX_PATH, identity, listen, remove


@pytest.mark.parametrize(
    "path", ["", "x" * (MAX_PATH + 1), "é" * MAX_PATH, "a\0b", "\ud800"], ids=["none", "long", "wide", "zero", "odd"]
)
def test_what_is_no_path_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an empty one the kernel makes a name of its own choice, and the directory is no socket."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    with pytest.raises(UsageError, match="has to be 1 to 107 bytes") as refused:
        listen(path, mode=0o600, field="--api-socket")
    assert refused.value.field == "--api-socket"
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert not list(tmp_path.iterdir())


def test_the_longest_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = "x" * MAX_PATH
    with listen(path, mode=0o600), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        assert Path(path).stat().st_mode & 0o777 == 0o600
        with pytest.raises(HostError, match="another server") as refused:
            listen(path, field="--zone socket")
        assert refused.value.field == "--zone socket"
        remove(path, identity(path))
    assert not list(tmp_path.iterdir())
