"""Plays a film as a browser does: what of it is visible at a moment, read from the SVG alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SVG = "{http://www.w3.org/2000/svg}"
COLUMN, LINE = 12.04, 24.4


class Player:
    """One film. Moments are seconds from its start; None is a viewer that animates nothing."""

    def __init__(self, svg: str) -> None:
        self.root = ElementTree.fromstring(svg)
        (style,) = self.root.findall(f"{SVG}style")
        self.css = style.text or ""
        self.seconds = float(re.findall(r"animation:([\d.]+)s step-end infinite", self.css)[0])
        self._drawn = {each.get("id", ""): each for each in self.root.iter() if each.get("id")}
        self._steps: dict[str, list[tuple[float, str]]] = {}
        for name, steps in re.findall(r"@keyframes (\w+)\{((?:[^{}]*\{[^{}]*\})*)\}", self.css):
            found = re.findall(r"([\d.]+)%\{visibility:(\w+)\}", steps)
            self._steps[name] = [(float(at), value) for at, value in found]

    def screen(self, moment: float | None) -> str:
        """The terminal's text."""
        (terminal,) = (each for each in self.root.findall(f"{SVG}g") if each.get("class") == "t")
        rows: dict[int, list[tuple[int, str]]] = {}
        for row, text in self._texts(terminal, moment, 0):
            rows.setdefault(row, []).append((round(float(text.get("x", "")) / COLUMN), text.text or ""))
        lines = []
        for row in range(max(rows, default=-1) + 1):
            line = ""
            for column, letters in sorted(rows.get(row, [])):
                assert len(line) <= column, "two texts in one place"
                line = line.ljust(column) + letters
            lines.append(line)
        return "\n".join(lines)

    def note(self, moment: float | None) -> str:
        """What the title bar says on its right."""
        groups = (each for each in self.root.findall(f"{SVG}g") if each.get("class") != "t")
        return "".join(text.text or "" for group in groups for _, text in self._texts(group, moment, 0))

    def _texts(self, element: Element, moment: float | None, row: int) -> Iterator[tuple[int, Element]]:
        if not self._visible(element, moment):
            return
        if place := re.fullmatch(r"translate\(0 ([\d.]+)\)", element.get("transform", "")):
            row += round(float(place[1]) / LINE)
        if element.tag == f"{SVG}text":
            yield row, element
        if element.tag == f"{SVG}use":
            yield from self._texts(self._drawn[element.get("href", "")[1:]], moment, row)
        for child in element:
            yield from self._texts(child, moment, row)

    def _visible(self, element: Element, moment: float | None) -> bool:
        visibility = element.get("visibility", "visible")
        for name in element.get("class", "").split():
            if moment is not None and name in self._steps:
                part = 100 * moment / self.seconds
                visibility = [value for at, value in self._steps[name] if at <= part][-1]
        return visibility == "visible"
