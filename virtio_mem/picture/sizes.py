"""Sizes, times and counts as people read them."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def human_size(size: float) -> str:
    """`size` bytes for people to read: 1 GiB, 1.5 GiB, 258 MiB, 0 B."""
    power = 0
    while size >= 1 << 10 * (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return f"{size / (1 << 10 * power):.4g} {_UNITS[power]}"


def human_time(seconds: float) -> str:
    """A time span for people to read: 0.4 s, 12 s, 3 min 20 s, 5 h 1 min, 2 d 3 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, smaller, its_name in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {its_name}"
    return f"{whole} s"


def counted(number: int, thing: str) -> str:
    """How many of a thing: 1 block, 3 blocks, 8,388,608 blocks."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
