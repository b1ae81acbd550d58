"""Devices behind programs that speak JSON lines: the examples, and programs that do what none should."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.targets import play
from tests.peers.processes import wait_until
from vhost_user.errors import UsageError
from virtio_mem.conformance.kit import Verdict, judge
from virtio_mem.conformance.target import (
    Asks,
    Capability,
    Chain,
    Odd,
    Refused,
    Registers,
    Subject,
    TargetFailure,
    Used,
    Wish,
)
from virtio_mem.conformance.targets import lines
from virtio_mem.conformance.targets import subprocess as program
from virtio_mem.conformance.targets.lines import LineProcess
from virtio_mem.conformance.targets.subprocess import ProgramSubject, ProgramTarget
from virtio_mem.protocol import RequestType, ResponseType

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "conformance-targets.md"
HERE = Path(__file__).parent

(EXAMPLE,) = re.findall(r"```python\n# shim.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
SHIM = (HERE / "shim.py").read_text()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_TO_END", 0.2)


def python(directory: Path, text: str) -> str:
    """A command that runs a program of Python."""
    (directory / "program.py").write_text(text)
    return f"{sys.executable} -S -E '{directory / 'program.py'}'"


def shim(directory: Path, replaced: str = "", by: str = "") -> ProgramTarget:
    """The page's example, with something replaced."""
    assert replaced in SHIM
    return ProgramTarget(python(directory, SHIM.replace(replaced, by) if replaced else SHIM))


def test_the_example_in_python(tmp_path: Path) -> None:
    target = ProgramTarget(python(tmp_path, EXAMPLE))
    assert target.version == "shim.py 1"
    play.play(target)
    with ProgramTarget(python(tmp_path, EXAMPLE)) as target:
        assert_passes(target, 60)
    assert len(EXAMPLE.splitlines()) < 60


def test_the_example_with_a_host_s_side(tmp_path: Path) -> None:
    target = shim(tmp_path)
    assert (target.kind, target.version) == ("exec", "shim.py 1")
    assert Capability.CONTENT not in target.capabilities
    play.play(target)
    with shim(tmp_path) as target:
        assert_passes(target, 80)


def test_the_example_in_c(tmp_path: Path) -> None:
    binary = tmp_path / "shim"
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", binary, HERE / "shim.c"], check=True
    )
    target = ProgramTarget(str(binary))
    assert target.version == "shim.c 1"
    play.play(target)
    with ProgramTarget(str(binary)) as target:
        assert_passes(target, 60)


def assert_passes(target: ProgramTarget, clauses: int) -> None:
    judgement = judge(target)
    assert (judgement.status, judgement.missing, judgement.failures) == (0, (), ())
    assert len(judgement.of(Verdict.HOLDS)) >= clauses


def test_a_program_that_is_wrong_is_found_out(tmp_path: Path) -> None:
    with shim(tmp_path, "            return NACK, 0\n", "            return ERROR, 0\n") as target:
        judgement = judge(target, only=["DEP-NACK-1"])
        assert [one.clause.id for one in judgement.of(Verdict.VIOLATED)] == ["DEP-NACK-1"]


def test_a_program_that_dies_of_many_words_is_a_violation(tmp_path: Path) -> None:
    """Its traceback goes into the sequence, which is lines: it must not be read as some of them."""
    dies = "    def answer(self, type_: int, addr: int, nb_blocks: int) -> tuple[int, int]:\n"
    with shim(tmp_path, dies, f"{dies}        assert type_ < 4, 'of\\nwish # no -> such type'\n") as target:
        judgement = judge(target, only=["DEP-UNKNOWN-1"])
    assert (judgement.status, judgement.failures) == (1, ())
    last = judgement.verdicts["DEP-UNKNOWN-1"].violations[0].lines[-1]
    assert "Traceback" in last
    assert "wish" in last
    assert "\n" not in last


def test_the_kits_lines_are_those_of_the_page(tmp_path: Path) -> None:
    """Each line of the table, but for its numbers, is what comes; and the table has all of them."""
    can = [name for name in Capability.__members__ if name != "CHAINS"]
    for abilities in (can, [*can, "CHAINS"]):
        with clerk(tmp_path, *abilities) as target:
            _ask_all(target.start(Wish(1 << 30, 1 << 21, 0, None)), Capability.CHAINS in target.capabilities)
    said = {_shape(line) for line in (tmp_path / "log").read_text().splitlines()}
    assert said == {_shape(line) for line in re.findall(r"`({\"do\".*?})` \|", PAGE.read_text())}


def _shape(line: str) -> str:
    line = re.sub(r'"(HEX|[0-9a-f]{8,})"', '"HEX"', line)
    return re.sub(r"(?<=:)(\d[\d.]*|N|S)(?=[,}])", "N", line)


_CLERK = """
import json, sys
print(json.dumps({"virtio-mem-conformance": 1, "version": "", "capabilities": CAN}), flush=True)
log = open(LOG, "a")
for line in sys.stdin:
    log.write(line)
    log.flush()
    print(json.dumps({"offered_features": 0, "accepted": True, "config": "00" * 56, "response": "00" * 10,
        "used": [{"length": 0, "room": ROOM}], "notices": 0, "held": 0, "data": "00" * 8,
        "notified": False, "flags": 0, "ram": [{"addr": 0, "size": 1}]}), flush=True)
"""


def clerk(directory: Path, *can: str, room: int = 10) -> ProgramTarget:
    """A program that puts down in `log` what it is asked, and gives every answer at once."""
    head = f"CAN, LOG, ROOM = {can}, {str(directory / 'log')!r}, {'00' * room!r}"
    return ProgramTarget(python(directory, head + _CLERK))


PARTS = (
    "accepted",
    "config",
    "data",
    "error",
    "flags",
    "held",
    "length",
    "notices",
    "notified",
    "ram",
    "offered_features",
    "refused",
    "response",
    "room",
    "status",
    "used",
    "virtio_id",
)
ASKED: tuple[Callable[[Subject], object], ...] = (
    lambda subject: subject.begin(5),
    lambda subject: subject.config(),
    lambda subject: subject.device_reset(),
    lambda subject: subject.set_target(5),
    lambda subject: subject.advance(5),
    lambda subject: subject.system_reset(),
    lambda subject: subject.take_notices(),
    lambda subject: subject.held(5, 5),
    lambda subject: subject.read(5, 8),
    lambda subject: subject.write(5, bytes(8)),
    lambda subject: subject.refuse(True),
    lambda subject: subject.pause(True),
    lambda subject: subject.prepare(5),
    lambda subject: subject.go(),
    lambda subject: subject.offer([Chain(bytes(24))], Asks(5, 5)),
    lambda subject: subject.kick(),
    lambda subject: subject.look(True),
    lambda subject: subject.overrun(),
    lambda subject: subject.boot_memory(),
    lambda subject: subject.sleep(),
    lambda subject: subject.wake(),
    lambda subject: subject.registers(),
    lambda subject: subject.write_config(5, bytes(8)),
    lambda subject: subject.submit([Chain(bytes(24))]),
)


def _ask_all(subject: Subject, with_chains: bool) -> None:
    for ask in ASKED[-1:] if with_chains else ASKED:
        ask(subject)


def test_all_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own device behind a ring, in another process, with all that it can do."""
    monkeypatch.chdir(ROOT)
    target = ProgramTarget(f"{sys.executable} -m tests.conformance.targets.bridge ring:packed")
    assert target.capabilities == ~(Capability.SLEEP | Capability.BOOT_MEMORY)
    play.play(target)


def test_chains_go_as_they_are(tmp_path: Path) -> None:
    with clerk(tmp_path, "RESTART", "CHAINS", room=2) as target:
        subject = target.start(Wish())
        assert subject.submit([Chain(b"\1\2", (1, 7), (2,), True)]) == [Used(0, bytes(2))]
        with pytest.raises(TargetFailure, match="gives 1 of 2 buffers back"):
            subject.submit([Chain(bytes(24))] * 2)
        with pytest.raises(TargetFailure, match="has a room of 2 bytes, and that of the chain has 10"):
            subject.submit([Chain(bytes(24))])
    sent = json.loads((tmp_path / "log").read_text().splitlines()[1])["chains"]
    assert sent == [{"request": "0102", "readable": [1, 7], "room": [2], "indirect": True}]


def test_registers_may_be_missing(tmp_path: Path) -> None:
    text = """import sys
print('{"virtio-mem-conformance":1,"version":"","capabilities":["RESTART"]}', flush=True)
for line in sys.stdin:
    print('{"offered_features":0,"virtio_id":24,"status":null}', flush=True)
"""
    with ProgramTarget(python(tmp_path, text)) as target:
        assert target.start(Wish()).registers() == Registers(virtio_id=24)


def test_what_is_odd_of_a_chain_is_told(tmp_path: Path) -> None:
    with clerk(tmp_path, "CHAINS", "RING") as target:
        subject = target.start(Wish())
        subject.submit([Chain(b"\7", (1,), (10,), indirect=True, fill=0, odd=Odd.WRITE | Odd.IDS)])
    (line,) = (tmp_path / "log").read_text().splitlines()[-1:]
    chain = '{"request":"07","readable":[1],"room":[10],"indirect":true,"fill":0,"odd":5}'
    assert chain in line


def test_much_memory_goes_in_pieces(tmp_path: Path) -> None:
    text = """
import json, sys
print(json.dumps({"virtio-mem-conformance": 1, "version": "", "capabilities": ["CONTENT", "RESTART"]}), flush=True)
memory = bytearray(1 << 20)
for line in sys.stdin:
    asked = json.loads(line)
    at = asked.get("offset", 0)
    if asked["do"] == "write":
        data = bytes.fromhex(asked["data"])
        memory[at : at + len(data)] = data
    print(json.dumps({"offered_features": 0, "data": memory[at : at + asked.get("size", 0)].hex()}), flush=True)
"""
    with ProgramTarget(python(tmp_path, text)) as target:
        subject = target.start(Wish())
        data = os.urandom(600_001)
        subject.write(7, data)
        assert subject.read(6, 600_003) == b"\0" + data + b"\0"


def test_without_a_clock_of_its_own_it_is_waited(tmp_path: Path) -> None:
    with shim(tmp_path, '"TIME", ') as target:
        subject = target.start(play.WISH)
        began = time.monotonic()
        subject.advance(0.1)
        assert time.monotonic() - began >= 0.1


def test_a_wish_that_is_refused(tmp_path: Path) -> None:
    with shim(tmp_path) as target:
        with pytest.raises(UsageError, match="that is no size for blocks"):
            target.start(Wish(block_size=6 << 20))
        play.begin(target.start(play.WISH))


def test_a_device_that_was_there_before_is_cleared(tmp_path: Path) -> None:
    with shim(tmp_path, '["RESTART", "WISH", ', "[") as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        play.plug(subject, 0, 3)
    again = SHIM.replace('["RESTART", "WISH", ', "[").replace(
        "            device = Device(**asked)\n", "            device = device if device.region else Device(**asked)\n"
    )
    with ProgramTarget(python(tmp_path, again)) as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        play.plug(subject, 0, 3)
        subject = target.start(Wish())
        assert subject.config().plugged_size == 0


# What is wrong with a program.

SAID = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("00" * 56),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(PARTS)), inner, max_size=8),
    max_leaves=12,
)
LINES = st.binary(max_size=40) | SAID.map(lambda said: json.dumps(said).encode())


@given(lines=st.lists(LINES, min_size=27, max_size=27), can=st.sampled_from([~Capability(0), ~Capability.CHAINS]))
def test_answers_of_any_kind(lines: list[bytes], can: Capability) -> None:
    """Whatever is said, it is an answer, a refusal or a failure."""
    process = Mock(ask=lambda *_: lines.pop(), failure=TargetFailure)
    process.name = "program"
    with suppress(TargetFailure, UsageError):
        ProgramSubject(process, can, Wish(), 1.0)
    lines.append(b'{"offered_features":5}')
    subject = ProgramSubject(process, can, Wish(), 1.0)
    for ask in ASKED:
        with suppress(TargetFailure, Refused):
            ask(subject)


HELLO = 'print(\'{"virtio-mem-conformance":1,"version":"","capabilities":["RESTART","CONTENT"]}\', flush=True)\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ended with status 0"),
        ("import sys; sys.exit('no such device')", "ended with status 1, after this: no such device"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "was ended by signal 40"),
        ("import os, time; os.close(1); time.sleep(60)", "closed its standard output"),
        ("print('hello')", "answers hello, which is no JSON"),
        (r"print('\033[2J\udc80')", r"answers \\x1b\[2J\\x80, which is no JSON"),
        ("print('[' * 100000)", "which is no JSON"),
        ("print('[1]')", "which is no JSON object"),
        ("print('{}')", "has no good 'virtio-mem-conformance', a whole number"),
        ("print('{\"virtio-mem-conformance\":true}')", "has no good 'virtio-mem-conformance'"),
        ("print('{\"virtio-mem-conformance\":2}')", "speaks version 2 of the protocol, and the kit 1"),
        (HELLO.replace('"version":""', '"version":3'), "has no good 'version', text"),
        (HELLO.replace('"RESTART"', '"FLY"'), r"has capabilities \['FLY'\], and these are known: RESTART, "),
        (HELLO.replace('"RESTART"', "[]"), "has capabilities"),
        ("import sys\nwhile True: sys.stdout.write('x' * 10000)", "has a line of more than 1048576 bytes"),
        ("print('\\xff' * 40)", "which is no JSON"),
    ],
)
def test_a_program_that_does_not_speak_the_protocol(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TargetFailure, match=says):
        ProgramTarget(python(tmp_path, text))


def test_a_program_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "PATIENCE", 0.3)
    noisy = "import sys\nwhile True: sys.stderr.write('blah ' * 1000)"
    for text in ("import time; time.sleep(60)", noisy):
        with pytest.raises(TargetFailure, match=r"says nothing within 0\.3 s"):
            ProgramTarget(python(tmp_path, text))


def test_a_program_without_standard_error_is_not_listened_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listen_and_count(process: LineProcess) -> None:
        listened.append(process)
        listen(process)

    listened: list[LineProcess] = []
    listen = LineProcess._listen
    monkeypatch.setattr(program, "PATIENCE", 0.3)
    monkeypatch.setattr(LineProcess, "_listen", listen_and_count)
    with pytest.raises(TargetFailure, match=r"says nothing within 0\.3 s: does it flush its standard output\?$"):
        ProgramTarget(python(tmp_path, "import os, time; os.close(2); time.sleep(60)"))
    assert len(listened) <= 2


def _pause_twice(subject: Subject) -> None:
    subject.pause(True)
    process = subject._process  # type: ignore[attr-defined]
    assert process._unread or select.select([process._stdout], [], [], 20)[0], "the second line comes"
    subject.pause(False)


@pytest.mark.parametrize(
    ("answer", "does", "says"),
    [
        ("{}", lambda subject: subject.begin(0), "has no good 'accepted', true or false"),
        ('{"accepted":1}', lambda subject: subject.begin(0), "has no good 'accepted'"),
        ('{"config":"0g"}', lambda subject: subject.config(), "has no good 'config', hexadecimal digits"),
        ('{"config":"00"}', lambda subject: subject.config(), "a configuration space that is none: .*length=1"),
        ('{"response":[]}', lambda subject: subject.submit([Chain(bytes(24))]), "has no good 'response', text"),
        ('{"data":"00"}', lambda subject: subject.read(0, 8), "reads 1 bytes, and was asked for 8"),
        ('{"notices":-1}', lambda subject: subject.take_notices(), "has no good 'notices', a whole number from 0"),
        ('{"held":1.5}', lambda subject: subject.held(0, 8), "has no good 'held'"),
        ('{"notified":true,"flags":0}', lambda subject: subject.look(True), "has no good 'used', a list"),
        (
            '{"used":[{}],"notified":true,"flags":0}',
            lambda subject: subject.look(False),
            "of 1 chains, and 0 were offered",
        ),
        ('{"used":[],"notified":2,"flags":0}', lambda subject: subject.look(True), "has no good 'notified', true or"),
        ('{"status":true}', lambda subject: subject.registers(), "has no good 'status', a whole number"),
        ('{"error":"on fire"}', lambda subject: subject.pause(True), "says: on fire"),
        ('{"refused":7}', lambda subject: subject.set_target(0), "has no good 'refused', text"),
        ('{}\\n{"more":1}', _pause_twice, "nobody asked"),
        ("{}', flush=True); time.sleep(0.05); print('{}", _pause_twice, "nobody asked"),
    ],
)
def test_an_answer_that_is_none(tmp_path: Path, answer: str, does: Callable[[Subject], object], says: str) -> None:
    started = "input(); print('{\"offered_features\":0}', flush=True)"
    text = f"import time\n{HELLO}{started}; input(); print('{answer}', flush=True); input()"
    with ProgramTarget(python(tmp_path, text)) as target:
        subject = target.start(Wish())
        with pytest.raises(TargetFailure, match=says):
            does(subject)
        target.start(Wish())  # another process


def test_a_program_that_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{HELLO}input(); print('{{\"offered_features\":0}}', flush=True); import time; time.sleep(60)"
    with ProgramTarget(python(tmp_path, text)) as target:
        monkeypatch.setattr(program, "PATIENCE", 1.5)
        for seconds in (r"1\.5", "1"):
            subject = target.start(Wish())
            with pytest.raises(TargetFailure, match=rf"does not read within {seconds} s"):
                subject.write(0, bytes(100_000))


def test_a_program_that_dies_between(tmp_path: Path) -> None:
    with shim(tmp_path, "        device.driver = False\n", "        1 / 0\n") as target:
        subject = target.start(play.WISH)
        play.begin(subject)
        with pytest.raises(TargetFailure, match=r"(?s)ended with status 1, after this: .*ZeroDivisionError"):
            subject.system_reset()
        with pytest.raises(TargetFailure):
            subject.config()
        subject.close()
        subject = target.start(play.WISH)
        play.begin(subject)
        assert play.ask(subject, RequestType.PLUG) is ResponseType.ACK


def test_what_a_program_started_is_ended_with_it(tmp_path: Path) -> None:
    pid = str(tmp_path / "pid")
    text = f"""
import os, time
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, file=open({pid!r}, "w"))
{HELLO}
time.sleep(60)
"""
    target = ProgramTarget(python(tmp_path, text))
    child = Path("/proc", Path(pid).read_text().strip(), "stat")
    assert child.exists()
    target.close()
    # It may be left as a zombie by whoever has to reap orphans.
    wait_until(lambda: not child.exists() or ") Z " in child.read_text(), "the child is dead")


def test_a_refusal_is_passed_on(tmp_path: Path) -> None:
    with shim(tmp_path) as target:
        subject = target.start(play.WISH)
        with pytest.raises(Refused, match="is not what such a region can have"):
            subject.set_target(1)
