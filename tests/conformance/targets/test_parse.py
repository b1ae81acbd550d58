"""From text to a target."""

from __future__ import annotations

import pytest

from vhost_user.errors import UsageError
from virtio_mem.conformance.target import TargetFailure
from virtio_mem.conformance.targets import qemu
from virtio_mem.conformance.targets.parse import KINDS, parse_target
from virtio_mem.conformance.targets.vhost_user_socket import VhostUserTarget


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("self", "self:memfd", "self"),
        ("self:", "self:memfd", "self"),
        ("self:private-file", "self:private-file", "self"),
        ("ring", "ring:split", "ring"),
        ("ring:packed", "ring:packed", "ring"),
    ],
)
def test_targets_of_our_own(text: str, name: str, kind: str) -> None:
    with parse_target(text) as target:
        assert (target.name, target.kind) == (name, kind)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its kind is one of self, ring, vhost-user, qemu, exec"),
        ("selfish:memfd", r"its kind is one of .*; self\[:BACKING\]"),
        (":memfd", "its kind is one of"),
        ("self,memfd", "begins with a colon"),
        ("self:floppy", "one of anonymous, memfd, hugetlb, file, private-file"),
        ("ring:moebius", "one of split, packed"),
        ("vhost-user", "vhost-user alone does not say which; vhost-user:SOCKET"),
        ("vhost-user:/a,b", "the options of vhost-user are api=APISOCKET and"),
        ("vhost-user:/a,api=", "the options of vhost-user are"),
        ("vhost-user:/a,api=/b,api=/c", "the options of vhost-user are"),
        ("vhost-user:/a,memory=floppy", "one of memfd, hugetlb"),
        ("exec:", "exec alone does not say which"),
        ("exec:'", "No closing quotation"),
        ("exec: ", "names a program"),
        ("exec:/nowhere/to/be/found", "can't be run: No such file or directory"),
    ],
)
def test_what_names_no_target(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_target(text)


def test_a_socket_where_nobody_is() -> None:
    with pytest.raises(TargetFailure, match="connect failed"):
        parse_target("vhost-user:/nowhere/to/be/found")


def test_both_sockets_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    monkeypatch.setattr(VhostUserTarget, "__init__", lambda _, *given, memory: taken.append((*given, memory)))
    parse_target("vhost-user:/a:b,api=/c")
    parse_target("vhost-user:/a,memory=hugetlb")
    assert taken == [("/a:b", "/c", "memfd"), ("/a", None, "hugetlb")]


@pytest.mark.parametrize(("text", "rest"), [("qemu", ""), ("qemu:/bin/q,a=b", ":/bin/q,a=b"), ("qemu,a=b", ",a=b")])
def test_what_is_behind_qemu_is_its_own(monkeypatch: pytest.MonkeyPatch, text: str, rest: str) -> None:
    taken: list[str] = []
    monkeypatch.setattr(qemu.QemuTarget, "parse", taken.append)
    parse_target(text)
    assert taken == [rest]


def test_each_kind_is_told() -> None:
    assert [text.partition(":")[0].partition("[")[0] for text in KINDS.values()] == list(KINDS)
