"""`scripts/bench`: the benchmarks, as one table."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import signal
import sys
from pathlib import Path

from tests.benchmarks.measure import Row, table
from tests.benchmarks.page import write_page

BENCHMARKS = ("start", "zones", "requests", "fragmented", "slots", "memory", "linux")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures ours and the peer in one run.")
    parser.add_argument("benchmark", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all without")
    parser.add_argument("--quick", action="store_true", help="fewer pairs: two minutes in all")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--curves", type=Path, metavar="DIRECTORY", help="instead, how cost grows: figures and picture")
    parser.add_argument("--page", action="store_true", help="instead, put what is in docs/performance on its page")
    arguments = parser.parse_args()
    if unknown := set(arguments.benchmark) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    _end_what_was_started()
    machine = _machine()
    if arguments.page:
        write_page()
        return 0
    if arguments.curves:
        from tests.benchmarks.curves import save  # noqa: PLC0415 - what the table doesn't need

        save(arguments.curves, quick=arguments.quick, machine=machine)
        return 0
    found: list[Row] = []
    for name in arguments.benchmark or BENCHMARKS:
        for row in importlib.import_module(f"tests.benchmarks.{name}").rows(quick=arguments.quick):
            sys.stderr.write(f"{row.what}: {row.ours:.4g} {row.unit}\n")
            found.append(row)
    if arguments.json:
        everything = {"machine": machine, "quick": arguments.quick, "rows": [row.to_json() for row in found]}
        print(json.dumps(everything, indent=1))  # noqa: T201
    else:
        print(f"{machine}\n\n{table(found)}")  # noqa: T201
    return 0


def _end_what_was_started() -> None:
    """Have SIGTERM end it all in order. Processes that are forked meanwhile end at once, as they would without this."""
    this = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != this:
            os._exit(128 + number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _machine() -> str:
    """What it is measured on, and how much else was going on there."""
    load, _, _ = os.getloadavg()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    processors = f"{os.cpu_count()} processors{f' ({model[1]})' if model else ''}"
    system = f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}"
    return f"{processors}, {system}, at a load average of {load:.1f} when it began"


if __name__ == "__main__":
    sys.exit(main())
