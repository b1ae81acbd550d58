"""What a judgement looks like: for a terminal, for a file of each kind, and as plain data.

`write` chooses by the file's name; `WRITERS` has the kinds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vhost_user.errors import HostError, UsageError
from virtio_mem.conformance.kit import Judgement
from virtio_mem.conformance.report.data import as_json
from virtio_mem.conformance.report.junit import as_junit
from virtio_mem.conformance.report.markdown import as_markdown
from virtio_mem.conformance.report.page import as_page

WRITERS: dict[str, Callable[[Judgement], str]] = {
    ".html": as_page,
    ".md": as_markdown,
    ".json": as_json,
    ".xml": as_junit,
}


def check_path(path: Path) -> None:
    """UsageError for a name of which no kind of report follows, and for a place where nothing can be written."""
    _check_kind(path)
    if not path.parent.is_dir():
        limit = f"has to be in a directory that is there: {path.parent} is none"
    elif path.is_dir():
        limit = "has to be a file: it is a directory"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        limit = "has to be a file that may be written to"
    else:
        return
    raise UsageError("report", str(path), limit, "choose another place")


def _check_kind(path: Path) -> None:
    if path.suffix not in WRITERS:
        limit = f"has to be a name that ends in {', '.join(WRITERS)}"
        raise UsageError("report", str(path), limit, "give it one of these; .xml is JUnit's form")


def write(judgement: Judgement, path: Path) -> None:
    """Write a report. HostError where the file can't be."""
    _check_kind(path)
    try:
        path.write_text(WRITERS[path.suffix](judgement), encoding="utf-8")
    except OSError as error:
        raise HostError("report", str(path), error.strerror or str(error)) from error
