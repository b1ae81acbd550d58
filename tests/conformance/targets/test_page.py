"""docs/conformance-targets.md names what is there."""

from __future__ import annotations

import re
from pathlib import Path

from virtio_mem.conformance.target import Capability
from virtio_mem.conformance.targets.parse import KINDS

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "conformance-targets.md").read_text()


def test_files_that_the_page_names_exist() -> None:
    names = re.findall(r"`((?:vhost_user|virtio_mem|tests|scripts)/[\w/.]+)`", PAGE)
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_page_has_every_kind_of_target_as_the_program_tells_it() -> None:
    forms = [text.partition(": ")[0] for text in KINDS.values()]
    assert re.findall(r"^\| `([^{].*?)` \|", PAGE, re.MULTILINE) == [form.replace("|", r"\|") for form in forms]


def test_the_page_explains_each_question() -> None:
    asked = set(re.findall(r'^\| `{"do":"(\w+)"', PAGE, re.MULTILINE))
    heads = re.findall(r"^- ((?:`\w+`(?:, )?)+):", PAGE, re.MULTILINE)
    assert len(asked) > 20
    assert asked <= {name for head in heads for name in re.findall(r"\w+", head)}


def test_the_page_asks_for_capabilities_that_there_are() -> None:
    columns = [re.sub(r"^not ", "", name) for name in re.findall(r'^\| `{"do.*\| ([\w ]*) ?\|$', PAGE, re.MULTILINE)]
    asked = {name.strip() for name in columns} - {""}
    assert asked == set(Capability.__members__) - {"RESTART", "WISH", "UNPLUGGED"}
