"""Pictures in a terminal's colours, by rich: the one module that has the colours.

They are of middling lightness, so that each stands out from a white background as from a black one, and differ in
lightness and not in hue alone, for those who see few hues. rich finds the nearest where a terminal has 256 or 16.
"""

from __future__ import annotations

from rich.text import Text

from virtio_mem.picture.spans import Line, Role, printable

STYLES: dict[Role, str] = {
    Role.PLUGGED: "#2f81f7",
    Role.PARTLY: "#d98a1f",
    Role.UNPLUGGED: "#8b949e",
    Role.UNUSABLE: "",
    Role.TARGET: "bold #d6409f",
    Role.BORDER: "bold #0d9488",
    Role.FRAME: "#8b949e",
    Role.TEXT: "",
    Role.QUIET: "#818b98",
    Role.NAME: "bold",
    Role.GOOD: "#1a9b50",
    Role.BAD: "bold #e5534b",
}


def coloured(line: Line) -> Text:
    """The line for rich to print."""
    return Text.assemble(*((printable(text), STYLES[role]) for text, role in line), no_wrap=True, overflow="crop")
