"""Whose fault it was: three exceptions, one for each party that is not us.

A mistake of ours is an assertion, never one of these. Each names the field, the value that it had, the limit
that the value broke and, where there is one, the way out.
"""

from __future__ import annotations

import errno
import os


class FieldError(Exception):
    """The base of the three: `field` had `value`, which breaks `limit`; `remedy` says what to do about it.

    Catch one of the subclasses: they tell whose turn it is to act.
    """

    def __init__(self, field: str, value: object, limit: str, remedy: str = "") -> None:
        super().__init__(field, value, limit, remedy)
        self.field = field
        self.value = value
        self.limit = limit
        self.remedy = remedy

    def locate(self, where: str) -> None:
        """Put the name of the thing that the field belongs to in front of it, as somebody further out knows it."""
        self.field = f"{where} {self.field}"
        self.args = (self.field, *self.args[1:])

    def __str__(self) -> str:
        text = f"{self.field}={self.value}: {self.limit}"
        return f"{text}; {self.remedy}" if self.remedy else text


class UsageError(FieldError, ValueError):
    """The caller's mistake: an argument, an option or a call that can't be right. Nothing was changed."""


class PeerError(FieldError):
    """The peer's violation: a guest, a front end or a back end said something that its protocol forbids."""


class Disconnected(PeerError):  # noqa: N818
    """The peer closed the connection, or vanished. What it had confirmed before holds, as far as it told the truth."""

    def __init__(self, field: str, value: object, limit: str = "was closed by the peer", remedy: str = "connect again"):
        super().__init__(field, value, limit, remedy)


class TimedOut(PeerError):  # noqa: N818
    """The peer did not answer, or did not read, within the time that the caller gave it."""


class Refused(PeerError):  # noqa: N818
    """The peer answered a request, which keeps to the protocol, with a failure. Nothing is known of its reason."""


class HostError(FieldError):
    """The host's refusal: the kernel or the machine would not give what was asked. It may give it later.

    `errno` is the system call's error number where a system call refused, else 0.
    """

    def __init__(self, field: str, value: object, limit: str, remedy: str = "", *, errno: int = 0) -> None:
        super().__init__(field, value, limit, remedy)
        self.errno = errno

    @classmethod
    def from_os_error(cls, field: str, value: object, call: str, error: OSError, remedy: str = "") -> HostError:
        """The refusal of system call `call`, as the kernel named it."""
        number = error.errno or 0
        name = errno.errorcode.get(number, str(number))
        return cls(field, value, f"{call} failed: {name} ({os.strerror(number)})", remedy, errno=number)
