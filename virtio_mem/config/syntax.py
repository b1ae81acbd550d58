"""The text of one option: `key=value` items between commas, lists, brackets and quotes.

    options  = item ("," item)*          item = key "=" value
    list     = "[" element ("," element)* "]"  |  element (":" element)*

Three rules decide where text is cut. Between double quotes every character is plain, and two double quotes side by side
stand for one. Between brackets a comma does not end the item, so a list may hold commas. And a colon separates elements
only where there are no brackets: that is the older of Cloud Hypervisor's two ways to write a list.

Everything here is text; what a value means is up to `virtio_mem.config.values`. Blanks around a key, a value or an
element are ignored. A mistake is a ConfigError; `where` is the name that it gives to the place.
"""

from __future__ import annotations

from collections.abc import Collection

from virtio_mem.config.errors import ConfigError

_SPECIAL = frozenset(',[]"')
"""The characters that cut text or hide others: text that has one of them is printed between quotes."""


def read_options(option: str, text: str, known: Collection[str]) -> dict[str, str]:
    """The values by key, quotes and all. Every key is one of `known` and is there once at most."""
    values: dict[str, str] = {}
    for item in split(option, text, ",") if text.strip() else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            remedy = "separate items by one comma, and put a list in brackets: key=[a,b]"
            raise ConfigError(option, item, "every item is key=value", remedy)
        if key not in known:
            raise ConfigError(f"{option} {key}", value, "there is no such key", f"the keys are {', '.join(known)}")
        if key in values:
            raise ConfigError(f"{option} {key}", value, f"was given before, as {values[key]}", "give every key once")
        values[key] = value
    return values


def read_list(where: str, text: str) -> list[str]:
    """The elements of a list in either syntax, quotes and all. There is at least one, and none is empty."""
    if not text.startswith("["):
        elements = split(where, text, ":")
    elif text.endswith("]"):
        elements = split(where, text[1:-1], ",")
    else:
        raise ConfigError(where, text, "has something behind its list", "put the whole list in one pair of brackets")
    elements = [element.strip() for element in elements]
    if "" in elements:
        raise ConfigError(where, text, "has an empty element", "write a list as [a,b], or leave the key out")
    return elements


def split(where: str, text: str, separator: str) -> list[str]:
    """`text` cut at every `separator` that is neither between quotes nor between brackets."""
    parts: list[str] = []
    start = depth = 0
    quoted = False
    for position, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
            if depth < 0:
                raise ConfigError(where, text, "has a ] without its [", 'write a list as [a,b], a plain ] as "]"')
        elif character == separator and not depth:
            parts.append(text[start:position])
            start = position + 1
    if quoted:
        raise ConfigError(where, text, "has a quote that does not end", 'write a plain quote as """"')
    if depth:
        raise ConfigError(where, text, "has a [ without its ]", 'write a list as [a,b], a plain [ as "["')
    return [*parts, text[start:]]


def unquote(text: str) -> str:
    """What `text`, with its quotes in pairs, stands for."""
    pieces = text.split('"')
    # Pieces with an odd index are between quotes. An empty one with an even index lies between two quotes side by side.
    inner = range(2, len(pieces) - 1, 2)
    return "".join('"' if index in inner and not piece else piece for index, piece in enumerate(pieces))


def quote(text: str) -> str:
    """The text that `unquote` turns back into `text` and `split` keeps whole: with quotes only if it needs them."""
    if text == text.strip() and _SPECIAL.isdisjoint(text):
        return text
    doubled = text.replace('"', '""')
    return f'"{doubled}"'
