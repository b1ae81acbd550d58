"""`scripts/bench`: the benchmarks, as one table."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys

from tests.benchmarks.measure import Row, table

BENCHMARKS = ("start", "zones", "requests", "fragmented", "slots", "memory", "linux")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures ours and the peer in one run.")
    parser.add_argument("benchmark", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all without")
    parser.add_argument("--quick", action="store_true", help="fewer pairs: two minutes in all")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    if unknown := set(arguments.benchmark) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    found: list[Row] = []
    for name in arguments.benchmark or BENCHMARKS:
        for row in importlib.import_module(f"tests.benchmarks.{name}").rows(quick=arguments.quick):
            sys.stderr.write(f"{row.what}: {row.ours:.4g} {row.unit}\n")
            found.append(row)
    machine = f"{os.cpu_count()} processors, Linux {platform.release()}, Python {platform.python_version()}"
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": [row.to_json() for row in found]}, indent=1))  # noqa: T201
    else:
        print(f"{machine}\n\n{table(found)}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
