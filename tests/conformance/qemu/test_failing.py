"""Programs in QEMU's place that fail in each way that there is: the kit says so in words, and in time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.rig import command, until
from vhost_user.errors import HostError, UsageError
from virtio_mem.conformance.target import TargetFailure
from virtio_mem.conformance.targets.qemu import QemuTarget

HELP = """
case "$*" in
    --help) echo "QEMU emulator version 9.0.1 (made up)"; exit ;;
    *virtio-mem-pci,help) printf 'virtio-mem-pci options:\\n  block-size=<size>\\n  %s=<bool>\\n' prealloc; exit 1 ;;
    *qtest,help) echo "-accel qtest,help: $ACCEL" >&2; exit 1 ;;
esac
# The two sockets, by their numbers.
for word; do
    case $word in
        socket,id=qtest,fd=*) qtest=${word##*=} ;;
        socket,id=qmp,fd=*) qmp=${word##*=} ;;
    esac
done
"""

READS = 'while read -r -u "$qtest" line; do {}; done\n'


AFTER_ITS_IDENTITY = 'n=$((n + 1)); [[ $n = 3 ]] && a=0x10581af4 || a={}; echo "OK $a" >&"$qtest"'
"""What everything else reads as. The identity is asked for by the third access."""


def script(directory: Path, text: str) -> Path:
    path = directory / "qemu"
    path.write_text(text)
    path.chmod(0o755)
    return path


def program(directory: Path, then: str, accel: str = "Property not found") -> Path:
    return script(directory, f"#!/bin/bash\nACCEL='{accel}'\n{HELP}{then}")


def target(path: Path, options: str = "") -> QemuTarget:
    return QemuTarget.parse(f":{path}{options}")


def test_it_ends_and_says_why(tmp_path: Path) -> None:
    path = program(tmp_path, "echo 'qemu: no such thing:   really' >&2; exit 3\n")
    with pytest.raises(TargetFailure) as failure:
        target(path)
    assert failure.value.what == "QEMU hung up; it ended with status 3; it said: qemu: no such thing: really"


def has_ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("more", ["", " -run-with [exit-with-parent=on|off]"])
def test_it_ends_with_who_started_it_from_its_start_on(more: str, tmp_path: Path) -> None:
    """Even one that has not come to what would have it end."""
    path = program(tmp_path, f"echo $$ > {tmp_path}/part; mv {tmp_path}/part {tmp_path}/pid; exec sleep 100\n")
    path.write_text(path.read_text().replace("(made up)", f"(made up){more}"))
    with subprocess.Popen(command("conformance", f"qemu:{path}")) as judging:
        until((tmp_path / "pid").exists)
        judging.kill()
    pid = int((tmp_path / "pid").read_text())
    until(lambda: has_ended(pid))


def test_it_says_very_much(tmp_path: Path) -> None:
    path = program(tmp_path, "printf '%09999d' 7 >&2; kill -SEGV $$\n")
    with pytest.raises(TargetFailure) as failure:
        target(path)
    assert failure.value.what == f"QEMU hung up; it ended with signal 11; it said: {'7':0>1000}"


def test_it_does_not_answer(tmp_path: Path) -> None:
    path = program(tmp_path, "exec sleep 1000\n")
    with pytest.raises(TargetFailure, match=r"QEMU did not answer 'inb 0x80' within 0\.03 s"):
        QemuTarget(str(path), patience=0.01)


def test_it_hangs_up_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtio_mem.conformance.targets.qtest.machine._END_SECONDS", 0.01)
    path = program(tmp_path, 'eval "exec $qtest>&- $qmp>&-"; exec sleep 1000\n')
    with pytest.raises(TargetFailure) as failure:
        target(path)
    assert failure.value.what == "QEMU hung up"


def test_it_has_another_device(tmp_path: Path) -> None:
    path = program(tmp_path, READS.format('echo "OK 0x12345678" >&"$qtest"'))
    with pytest.raises(TargetFailure, match="in the place of the virtio-mem device is PCI device 0x12345678"):
        target(path)


def test_its_capabilities_have_no_end(tmp_path: Path) -> None:
    with pytest.raises(TargetFailure, match="list of PCI capabilities has no end"):
        target(program(tmp_path, READS.format(AFTER_ITS_IDENTITY.format("0xffffff10"))))


def test_its_windows_have_no_room(tmp_path: Path) -> None:
    with pytest.raises(TargetFailure, match="windows take more than"):
        target(program(tmp_path, READS.format(AFTER_ITS_IDENTITY.format("0x80000000"))))


def test_it_is_no_virtio_device(tmp_path: Path) -> None:
    with pytest.raises(TargetFailure, match="the device has no common structure"):
        target(program(tmp_path, READS.format(AFTER_ITS_IDENTITY.format("0"))))


def test_it_is_too_old(tmp_path: Path) -> None:
    path = script(tmp_path, "#!/bin/sh\necho QEMU emulator version 5.2.0\n")
    with pytest.raises(HostError, match=r"is QEMU 5\.2; 7\.2 is the first that was tried; .* by qemu:BINARY"):
        target(path)


def test_it_has_no_such_device(tmp_path: Path) -> None:
    path = script(tmp_path, "#!/bin/sh\necho QEMU emulator version 8.0.0\n")
    with pytest.raises(HostError, match="has no virtio-mem-pci"):
        target(path)


def test_an_option_that_it_has_not(tmp_path: Path) -> None:
    path = program(tmp_path, "exit 1\n")
    with pytest.raises(UsageError, match=r"qemu dynamic-memslots=on: QEMU 9\.0\.1 \(made up\) does not have it"):
        target(path, ",dynamic-memslots=on,prealloc=on")


def test_without_the_qtest_accelerator(tmp_path: Path) -> None:
    path = program(tmp_path, 'echo "$*" >&2\nexit 1\n', accel="invalid accelerator qtest")
    with pytest.raises(TargetFailure, match=r"-machine q35,accel=tcg,\S* -S "):
        target(path)


def test_a_program_that_cant_be_started(tmp_path: Path) -> None:
    path = script(tmp_path, "#!/no/such/interpreter\n")
    with pytest.raises(HostError, match="does not say what it is"):
        target(path)
