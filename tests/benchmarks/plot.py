"""The curves as one picture of small multiples, by matplotlib: as an SVG, the same for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from virtio_mem.picture.image import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
_COLOURS = ("#2f81f7", "#c77712", "#0b7a70")
_MARKERS = ("o", "s", "^")
_INK, _QUIET, _GRID = "#1f2328", "#59636e", "#dde3ea"
_STYLE: Any = {
    **STYLE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _QUIET,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "text.color": _INK,
}
_WIDE = 100
"""An axis whose ends are further apart than this factor is a logarithm."""


def picture(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """All of them; each as `Curve.to_json` has it."""
    rows = -(-len(curves) // COLUMNS)
    with rc_context(_STYLE):
        figure = Figure(
            figsize=(11, 2.75 * rows), facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        )
        for number, curve in enumerate(curves, 1):
            _draw(figure.add_subplot(rows, COLUMNS, number), curve)
        file = BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _draw(axes: Axes, curve: Mapping[str, Any]) -> None:
    for series, colour, marker in zip(curve["series"], _COLOURS, _MARKERS, strict=False):
        axes.plot(curve["x"], series["y"], color=colour, marker=marker, markersize=3.5, label=series["name"])
    axes.set_title(curve["title"], loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(curve["x_label"], color=_QUIET)
    axes.set_ylabel(curve["unit"], color=_QUIET)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    values = [value for series in curve["series"] for value in series["y"]]
    wide_x = min(curve["x"]) > 0 and max(curve["x"]) > _WIDE * min(curve["x"]) and curve["x_label"] != "requests"
    if wide_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0,), numticks=20))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([value for at, value in enumerate(curve["x"]) if at % 2 == 0 or len(curve["x"]) < 10])
    if wide_x and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(0, (1.3 if len(curve["series"]) > 1 else 1.1) * max(values))
    if len(curve["series"]) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(_COLOURS))
