"""A descriptor has an owner, is closed once, and by nobody after it was taken."""

from __future__ import annotations

import errno
import gc
import os
import resource

import pytest

from vhost_user.errors import HostError, UsageError
from vhost_user.owned_fd import OwnedFd, close_all


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def new() -> OwnedFd:
    return OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC))


def test_a_descriptor_is_closed_once() -> None:
    owned = new()
    fd = owned.fileno()
    assert not owned.closed
    assert repr(owned) == f"<OwnedFd {fd}>"
    owned.close()
    assert owned.closed
    assert repr(owned) == "<OwnedFd closed>"
    assert not is_open(fd)
    with new() as other:
        assert other.fileno() == fd, "the number is free, and the next one to open takes it"
        owned.close()
        del owned
        assert is_open(fd)


def test_what_was_taken_is_the_takers() -> None:
    with new() as owned:
        fd = owned.take()
        assert owned.closed
    owned.close()
    assert is_open(fd)
    os.close(fd)


def test_a_block_that_raises_closes() -> None:
    owned = new()
    fd = owned.fileno()
    with pytest.raises(RuntimeError), owned:
        raise RuntimeError
    assert not is_open(fd)


def test_one_that_is_forgotten_is_closed() -> None:
    owned = new()
    fd = owned.fileno()
    del owned
    gc.collect()
    assert not is_open(fd)


@pytest.mark.parametrize("use", [OwnedFd.fileno, OwnedFd.take, OwnedFd.duplicate])
def test_one_that_is_gone_can_not_be_used(use: object) -> None:
    assert callable(use)
    owned = new()
    owned.close()
    with pytest.raises(UsageError, match="fd=closed: was closed or taken before"):
        use(owned)


@pytest.mark.parametrize("fd", [-1, -100])
def test_what_is_no_descriptor_is_refused(fd: int) -> None:
    with pytest.raises(UsageError, match=f"fd={fd}: has to be 0 or more"):
        OwnedFd(fd)


def test_a_duplicate_lives_by_itself_and_is_closed_at_exec() -> None:
    with new() as owned, owned.duplicate() as other:
        assert os.path.samestat(os.fstat(owned.fileno()), os.fstat(other.fileno()))
        assert not os.get_inheritable(other.fileno())
        owned.close()
        assert is_open(other.fileno())


def test_no_number_is_free_for_a_duplicate() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with new() as owned:
        resource.setrlimit(resource.RLIMIT_NOFILE, (owned.fileno(), hard))
        try:
            with pytest.raises(HostError, match="dup failed: EMFILE") as refusal:
                owned.duplicate()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert refusal.value.errno == errno.EMFILE
        assert not owned.closed


def test_an_error_that_close_reports_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network file system does that could not write."""
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, "Input/output error")

    owned = new()
    fd = owned.fileno()
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        owned.close()
    assert not is_open(fd)


def test_a_descriptor_that_somebody_else_closed_is_a_bug() -> None:
    owned = new()
    os.close(owned.fileno())
    with pytest.raises(AssertionError, match="somebody else closed"):
        owned.close()


def test_all_are_closed() -> None:
    several = [new() for _ in range(5)]
    numbers = [owned.fileno() for owned in several]
    several[2].close()
    close_all(several)
    assert not any(map(is_open, numbers))
