"""Where the state of devices is kept, in memfds or in files of a directory of the user's; and files of traces."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vhost_user.errors import FieldError, HostError, UsageError
from vhost_user.owned_fd import OwnedFd

TRACE_HEAD = b"# virtio-mem trace"
"""What each file of a trace begins with."""

_SUFFIX = ".state"
_ZONE = "{zone}"
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def require_given(option: str, path: str | None) -> None:
    """UsageError for an option that was given as an empty text, such as a variable that is not set."""
    if path == "":
        raise UsageError(option, path, "has to be a path, and is empty", "give one, or leave the option out")


def state_memfd(name: str, size: int) -> OwnedFd:
    """A blank memfd of `size` bytes that nobody can make shorter."""
    try:
        fd = OwnedFd(os.memfd_create(f"virtio-mem-state:{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(fd.fileno(), size)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise HostError.from_os_error("state", name, "memfd_create", error) from error
    return fd


def state_path(directory: str | Path, name: str) -> Path:
    """The file of the zone `name`: whatever a path can't have is written as %XX."""
    return Path(directory) / (_quoted(name) + _SUFFIX)


def _quoted(name: str) -> str:
    return "".join(letter if letter in _PLAIN else "".join(f"%{b:02x}" for b in letter.encode()) for letter in name)


def state_file(directory: str | Path, name: str, size: int) -> OwnedFd:
    """The zone's file, made with `size` bytes of zeros where there is none yet.

    Raises UsageError where something else is there, HostError where the host refuses. A file that is there is not
    changed, whatever its size.
    """
    path = state_path(directory, name)
    try:
        fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600))
        about = os.fstat(fd.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise UsageError("--state-dir", path, "is not a regular file", "remove it, or name another directory")
    except OSError as error:
        remedy = "name a directory that is there, and can be written to"
        raise HostError.from_os_error("--state-dir", path, "open", error, remedy) from error
    if about.st_size == 0:
        try:
            os.posix_fallocate(fd.fileno(), 0, size)  # a hole that the disk has no room for would be a SIGBUS later
        except OSError as error:
            with fd:
                os.ftruncate(fd.fileno(), 0)  # what was got of it would be a damaged state to who comes next
            remedy = f"make room for {size} bytes there, or name another directory"
            raise HostError.from_os_error("--state-dir", path, "fallocate", error, remedy) from error
    return fd


@contextmanager
def located_at(fd: int, otherwise: str) -> Iterator[None]:
    """Put the path of the file `fd`, or `otherwise` where it has none, in front of the field of what is refused in the
    block."""
    try:
        yield
    except FieldError as error:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        error.locate(otherwise if path.startswith("/memfd:") else path)
        raise


def lock(directory: str | Path) -> OwnedFd:
    """Have the directory for this service alone, as long as the descriptor is open. HostError where another has it."""
    path = Path(directory) / "lock"
    try:
        fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HostError("--state-dir", directory, "another service uses it", "end that one, or name another") from error
    except OSError as error:
        remedy = "name a directory that is there, and can be written to"
        raise HostError.from_os_error("--state-dir", path, "open", error, remedy) from error
    return fd


def trace_path(pattern: str, name: str) -> Path:
    """The file of the zone `name` where the user wrote `pattern`: `{zone}` is the name, quoted as that of a state."""
    return Path(pattern.replace(_ZONE, _quoted(name)))


def check_traces(pattern: str, names: Sequence[str]) -> None:
    """UsageError unless each of the zones `names` has a file of its own that can be written to; it is there then."""
    require_given("--trace", pattern)
    if len(names) > 1 and _ZONE not in pattern:
        raise UsageError("--trace", pattern, f"needs {_ZONE} in it, as there are several zones")
    for name in names:
        open_trace(trace_path(pattern, name)).close()


def open_trace(path: Path) -> OwnedFd:
    """A file to append to, made with mode 0600 where there is none. UsageError where it can't be one of a trace."""
    try:
        fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o600))
    except OSError as error:
        limit = f"can't be opened to be written to: {os.strerror(error.errno or 0)}"
        raise UsageError("--trace", path, limit, "name a file that can be") from error
    about = os.fstat(fd.fileno())
    if stat.S_ISREG(about.st_mode) and os.pread(fd.fileno(), len(TRACE_HEAD), 0) in (b"", TRACE_HEAD):
        return fd
    fd.close()
    raise UsageError("--trace", path, "is something else than a trace", "name a file that is not there yet")
