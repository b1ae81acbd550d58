"""How many descriptors front ends may have kept for them."""

from __future__ import annotations

import resource

from vhost_user.errors import UsageError
from vhost_user.supervisor.book import Book

SPARE_FDS = 128
"""Descriptors of the supervisor that are not a front end's: its own, and those that a worker has it keep."""

SPARE_STORED, SPARE_STORED_EACH = 8, 8
"""Of the descriptors that a service manager stores, those that are not a front end's: of all, and of each listener; the
latter with what a front end has besides what is kept for it, and what a worker keeps for a device."""

FEWEST_STORED = 32
"""For each front end. QEMU has four for each ring, and one or two for each of a few regions of memory."""


def most_fds_each(book: Book, nb_listeners: int) -> int:
    """The most of a front end, where one comes to each listener. The limit is raised as far as the process may.

    UsageError where the book has room for too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = max(hard - SPARE_FDS, SPARE_FDS) // nb_listeners
    if book.most_fds is None:
        return most
    stored = (book.most_fds - SPARE_STORED) // nb_listeners - SPARE_STORED_EACH
    if stored < FEWEST_STORED:
        need = SPARE_STORED + nb_listeners * (SPARE_STORED_EACH + FEWEST_STORED)
        raise UsageError(
            "FileDescriptorStoreMax", book.most_fds, f"has to be at least {need} for {nb_listeners} sockets"
        )
    return min(most, stored)
