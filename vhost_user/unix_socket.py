"""Sockets in the file system: bound where only a dead server's socket file was, removed only while they are ours."""

from __future__ import annotations

import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from vhost_user.errors import HostError, UsageError

MAX_PATH = 107
"""Bytes of a socket's path: what sockaddr_un.sun_path holds, less the zero byte at its end, unix(7)."""

BACKLOG = 16
"""Peers that may wait to be accepted; more are refused by the kernel."""

PROBE_SECONDS = 1.0
"""How long a server may take to accept, to be seen to live. To connect to one whose backlog is full waits that long."""


def require_path(field: str, path: str) -> None:
    """UsageError, which names `field`, for what is no path of a socket. An empty one would have the kernel choose."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b""
    if not 0 < len(name) <= MAX_PATH or b"\0" in name:
        limit = f"has to be 1 to {MAX_PATH} bytes, as the path of a unix socket"
        raise UsageError(field, path, limit, "give a shorter one, such as one below /run")


def listen(
    path: str | Path, *, backlog: int = BACKLOG, mode: int | None = None, field: str = "socket"
) -> socket.socket:
    """A unix stream socket that listens at `path`. A socket file that nobody listens at any more is replaced.

    `mode` is the file's access mode from the first moment on, whatever the process's umask; without it the umask
    decides. UsageError for what is no path of a socket, HostError where another server listens there, and where the
    kernel refuses; `field` is what they name.
    """
    path = os.fsdecode(path)
    require_path(field, path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(field, path)
        if mode is not None:
            os.fchmod(sock.fileno(), mode)  # bind(2) gives the file the socket's mode, less the umask
        sock.bind(path)
        if mode is not None and stat.S_IMODE(Path(path).lstat().st_mode) != mode:
            Path(path).chmod(mode)  # gives back what the umask took, and no more
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise HostError.from_os_error(field, path, "bind", error, "name a path in a directory of yours") from error
    except BaseException:
        sock.close()
        raise
    return sock


def connect_within(sock: socket.socket, path: str, timeout: float) -> None:
    """Connect a unix socket within `timeout` seconds. OSError where that can't be.

    A full backlog is an error at once for a socket that does not block, and nothing tells when there is room again.
    """
    sock.setblocking(False)
    deadline, pause = time.monotonic() + timeout, 0.001
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


def identity(path: str | Path) -> tuple[int, int]:
    """The device and inode of a socket file: whether the file at a path is still the same one."""
    info = Path(path).stat()
    return info.st_dev, info.st_ino


def remove(path: str | Path, own: tuple[int, int]) -> None:
    """Remove the socket file at `path`, unless it is another's by now."""
    with suppress(FileNotFoundError):
        if identity(path) == own:
            Path(path).unlink()


def _remove_stale(field: str, path: str) -> None:
    """Remove a socket file that nobody listens at."""
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            return  # bind will say that it is in use
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except (BlockingIOError, TimeoutError):
            pass  # its backlog is full, so somebody listens
    raise HostError(field, path, "another server listens there", "end that one, or name another path")
