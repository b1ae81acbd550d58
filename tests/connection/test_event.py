"""Events: eventfds and pipes of a peer who may change their flags and fill them, and what else a peer may send."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from vhost_user.errors import HostError, PeerError
from vhost_user.event import Event
from vhost_user.owned_fd import OwnedFd


def peers_eventfd() -> tuple[OwnedFd, OwnedFd]:
    """One to give away and one to keep, of the same description."""
    fd = OwnedFd(os.eventfd(0, 0))
    return fd, fd.duplicate()


def test_a_ring_is_heard_once() -> None:
    with Event.create() as event:
        assert not event.take()
        event.signal()
        event.signal()
        assert event.take()
        assert not event.take()


@pytest.mark.parametrize("value", [0, 1, 2**64 - 2])
def test_signalling_a_blocking_eventfd_never_waits(value: int) -> None:
    given, kept = peers_eventfd()
    with kept, Event.to_signal(given) as event:
        os.eventfd_write(kept.fileno(), value)
        event.signal()
        event.signal()
        assert os.eventfd_read(kept.fileno()) in {value + 2, 2**64 - 1}


def test_taking_from_a_blocking_eventfd_never_waits() -> None:
    given, kept = peers_eventfd()
    with kept, Event.to_wait(given) as event:
        assert not event.take()
        os.eventfd_write(kept.fileno(), 7)
        assert event.take()
        assert not event.take()


def test_a_full_blocking_pipe_never_waits() -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    kept = writer.duplicate()
    with reader, kept, Event.to_signal(writer) as event:
        for _ in range(10_000):  # 8 bytes each: more than a pipe holds
            event.signal()
        assert os.get_blocking(kept.fileno())
        assert os.read(reader.fileno(), 8)
        event.signal()


def test_a_pipe_without_a_reader_hears_nothing() -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with Event.to_signal(writer) as event:
        reader.close()
        event.signal()


def test_an_eventfd_that_gives_one_ring_at_a_time_is_refused() -> None:
    fd = OwnedFd(os.eventfd(0, os.EFD_SEMAPHORE))
    with pytest.raises(PeerError, match="SEMAPHORE"):
        Event.to_wait(fd)
    assert fd.closed


def test_the_wrong_end_of_a_pipe_can_not_be_waited_for() -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with reader, pytest.raises(PeerError, match="can be read"):
        Event.to_wait(writer)
    assert writer.closed


WITHOUT_AIO = """
import ctypes, fcntl, os, pathlib, select, threading
from vhost_user.event import Event
from vhost_user.owned_fd import OwnedFd
limit = int(pathlib.Path("/proc/sys/fs/aio-max-nr").read_text())
used = int(pathlib.Path("/proc/sys/fs/aio-nr").read_text())
libc = ctypes.CDLL(None, use_errno=True)
def take(number):
    context = ctypes.c_ulong()
    return libc.syscall(206, number, ctypes.byref(context)) == 0
take(limit - used)
while take(1):
    pass  # others had some, and let go of them meanwhile
"""

HEARD = """
with Event.create() as event:
    for _ in range(100):
        event.signal()
        print(select.select([event], [], [], 10)[0] == [event], event.take(), event.take())
"""

BLOCKING = """
fd = os.eventfd(0)
os.eventfd_write(fd, 2**64 - 2)
def change():
    while True:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
threading.Thread(target=change, daemon=True).start()
with Event.to_signal(OwnedFd(os.dup(fd))) as event:
    for _ in range(20000):
        event.signal()
print("never held")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="io_setup has another number on this architecture")
@pytest.mark.parametrize(
    ("program", "said"), [(HEARD, "True True False\n" * 100), (BLOCKING, "never held\n")], ids=["heard", "blocking"]
)
def test_a_host_without_asynchronous_io_loses_no_ring_and_holds_nobody(program: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AIO + program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == said


def test_no_descriptor_left_is_the_hosts_refusal() -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (writer.fileno() + 1, before[1]))
        with pytest.raises(HostError, match="EMFILE"):
            Event.to_signal(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    reader.close()
    assert writer.closed


def test_taking_from_a_blocking_pipe_never_waits_and_ends() -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with Event.to_wait(reader) as event:
        assert not event.take()
        os.write(writer.fileno(), b"12345678" * 3)
        assert event.take()
        assert not event.take()
        writer.close()
        with pytest.raises(EOFError):
            event.take()


@pytest.mark.parametrize("make", [Event.to_signal, Event.to_wait])
@pytest.mark.parametrize("kind", ["/dev/zero", "/dev/null", "/proc/self/maps", "/", "socket"])
def test_any_other_file_is_refused_and_closed(make: Callable[[OwnedFd], Event], kind: str) -> None:
    fd = OwnedFd(socket.socket(socket.AF_UNIX).detach() if kind == "socket" else os.open(kind, os.O_RDONLY))
    with pytest.raises(PeerError, match="an eventfd or"):
        make(fd)
    assert fd.closed


def test_signals_in_a_forked_child() -> None:
    with Event.create() as event:
        event.signal()
        assert event.take()
        pid = os.fork()
        if pid == 0:
            try:
                event.signal()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert event.take()


FORKS = """
import os, signal, threading, warnings
from vhost_user.event import Event
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
def signal_on():
    with Event.create() as event:
        while True:
            event.signal()
threading.Thread(target=signal_on, daemon=True).start()
with Event.create() as event:
    for _ in range(25):
        pid = os.fork()
        if pid == 0:
            signal.alarm(5)
            event.signal()
            os._exit(0)
        print(os.waitpid(pid, 0)[1], event.take())
"""


def test_signals_in_a_child_that_was_forked_beside_a_thread_that_signals() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "0 True\n" * 25


CLOSES = """
import os, signal
from pathlib import Path
from vhost_user.event import Event
with Event.create() as event:
    event.signal()
    print(event.take())
    (zero,) = (int(each.name) for each in Path("/proc/self/fd").iterdir() if str(each.resolve()) == "/dev/zero")
    reader, writer = os.pipe()
    os.write(writer, b"somebody else's")
    pid = os.fork()
    if pid == 0:
        signal.alarm(5)
        os.dup2(reader, zero)
        event.signal()
        os._exit(0)
    print(os.waitpid(pid, 0)[1], event.take(), os.read(reader, 100))
"""


def test_a_forked_child_that_has_another_file_where_its_parent_had_one_reads_nothing_of_it() -> None:
    """As of one that closes all that it does not know, and opens others."""
    done = subprocess.run([sys.executable, "-c", CLOSES], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == 'True\n0 True b"somebody else\'s"\n'


CLOSED_BEFORE = """
import ctypes, os, signal, sys
from vhost_user.event import Event
with Event.create() as event:
    event.signal()
    print(event.take())
os.closerange(3, 64)
mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
event = Event.create()
fork = os.fork if sys.argv[1] == "fork" else ctypes.CDLL(None)._Fork
pid = fork()
if pid == 0:
    signal.alarm(5)
    for fd in mine:
        os.fstat(fd)
    event.signal()
    os._exit(0)
print(os.waitpid(pid, 0)[1], event.take())
"""


@pytest.mark.parametrize("fork", ["fork", "_Fork"])
def test_a_child_of_one_that_closed_what_it_does_not_know_has_its_files(fork: str) -> None:
    """Also of one that is forked without a word to the C core: _Fork(3)."""
    if not hasattr(ctypes.CDLL(None), fork):
        pytest.skip("the C library has no _Fork (glibc 2.34)")
    command = [sys.executable, "-c", CLOSED_BEFORE, fork]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True\n0 True\n"
