"""Runs pytest again and again, each time in a process forked from this one, which has imported what takes long.

One line of JSON on stdin asks for a run: its arguments, directory, environment and the file for what it prints; one
line on stdout answers with its exit status.
"""

from __future__ import annotations

import json
import os
import sys

import hypothesis  # noqa: F401 - takes most of the time that a run needs to begin
import pytest


def main() -> None:
    for line in sys.stdin:
        run = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(**run)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _run(arguments: list[str], directory: str, environment: dict[str, str], output: str) -> None:
    """Never returns."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((nothing, printed, printed)):
        os.dup2(fd, number)
    sys.path.insert(0, directory)
    status = 3
    try:
        status = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
