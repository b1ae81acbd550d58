"""The options as a program gets them: a list of arguments, sorted by option.

Cloud Hypervisor takes several values behind one option, and the same option several times; both mean the same:
`--memory-zone A B --memory-zone C`. `--memory-zone=A` is fine too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from virtio_mem.config.errors import ConfigError


def group_values(arguments: Sequence[str], options: Collection[str]) -> dict[str, list[str]]:
    """The values of each of `options`, in their order; one that is not there has none. Raises ConfigError."""
    values: dict[str, list[str]] = {option: [] for option in options}
    waiting = current = ""
    for argument in arguments:
        if not argument.startswith("--"):
            if not current:
                raise ConfigError("arguments", argument, "comes before any option", f"begin with {_names(options)}")
            values[current].append(argument)
            waiting = ""
            continue
        _check_waiting(waiting)
        current, equals, value = argument.partition("=")
        if current not in values:
            raise ConfigError("arguments", current, "is not an option of memory", f"the options are {_names(options)}")
        waiting = "" if equals else current
        values[current] += [value] if equals else []
    _check_waiting(waiting)
    return values


def only_value(option: str, values: Sequence[str], default: str, remedy: str) -> str:
    """The value of an option that can't be repeated, or `default` where there is none. Raises ConfigError."""
    if len(values) > 1:
        raise ConfigError(option, " ".join(values), "may be given only once", remedy)
    return values[0] if values else default


def _check_waiting(option: str) -> None:
    if option:
        raise ConfigError(option, None, "has no value", "write its keys behind it, or leave the option out")


def _names(options: Collection[str]) -> str:
    return ", ".join(options)
