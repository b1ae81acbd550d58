"""Each peer starts, speaks, and ends; what the other tests in this directory build on."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
from pathlib import Path

import pytest

from tests.peers.daemons import qemu_storage_daemon, virtiofsd
from tests.peers.dpdk import dpdk_vhost, dpdk_virtio_user
from tests.peers.guest import make_initrd
from tests.peers.processes import LATE, Peer, doings, listens, running, wait_until
from tests.peers.qemu import qemu, qemu_io, qemu_io_started
from vhost_user.errors import UsageError

pytestmark = pytest.mark.needs_peers

VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30

GET_FEATURES = struct.pack("=III", 1, 1, 0)
SET_OWNER = struct.pack("=III", 3, 1, 0)
REPLY = 0b101


def receive(connection: socket.socket, size: int) -> bytes:
    with connection.makefile("rb") as stream:
        return stream.read(size)


def get_features(path: Path) -> int:
    """What a new client is answered; it leaves then."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LATE)
        client.connect(str(path))
        client.sendall(GET_FEATURES)
        request, flags, size, features = struct.unpack("=IIIQ", receive(client, 20))
    assert (request, flags, size) == (1, REPLY, 8)
    return int(features)


@pytest.mark.parametrize("fixture", ["storage_daemon", "virtiofs", "passt_daemon", "dpdk_daemon"])
def test_a_daemon_answers_its_first_client(fixture: str, request: pytest.FixtureRequest) -> None:
    peer: Peer = request.getfixturevalue(fixture)
    assert get_features(peer.socket) & (VERSION_1 | PROTOCOL_FEATURES) == VERSION_1 | PROTOCOL_FEATURES
    assert peer.version[0].isdigit()
    if fixture == "virtiofs":
        assert peer.wait() == 0
    else:
        assert any("socket:" in file for file in peer.open_files())
        assert peer.mappings()
        assert peer.process.poll() is None


def test_what_a_process_does_that_is_not_waited_for_any_longer(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait_in_vain() -> None:
        with running("sleep", "", ["sleep", "100"], directory, directory / "none", server=False) as peer:
            wait_until(lambda: doings(peer.pid).startswith("sleep: S"), "it sleeps")
            raise TimeoutError("once")

    with pytest.raises(TimeoutError, match="once"):
        wait_in_vain()
    assert "\nsleep: S, " in capsys.readouterr().out


def test_there_is_nothing_that_a_dead_process_does(directory: Path) -> None:
    with running("sleep", "", ["sleep", "100"], directory, directory / "none", server=False) as peer:
        peer.kill()
        assert doings(peer.pid) == ""


def test_nothing_of_a_daemon_is_left(directory: Path, image: Path) -> None:
    with qemu_storage_daemon(directory, image) as peer:
        assert os.waitid(os.P_PID, peer.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    assert peer.process.returncode == -signal.SIGKILL
    assert not listens(peer.socket)
    with pytest.raises(ProcessLookupError):
        os.kill(peer.pid, 0)


def test_a_daemon_that_cannot_start_is_an_error_with_its_own_words(directory: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"qsd ended with 1 before it was ready:\n.*No such file or directory"),
        qemu_storage_daemon(directory, directory / "nothing"),
    ):
        pytest.fail("it started")


def test_what_a_process_printed_is_shown(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sh", "-c", "echo one; read word; echo $word; exit 3"]
    with running("shell", "1", command, directory, directory / "none", server=False) as peer:
        peer.wait_for_output("one")
        peer.send("two")
        assert peer.wait() == 3
    with (
        running("shell", "1", ["false"], directory, directory / "none", server=False) as second,
        pytest.raises(RuntimeError, match="ended with 1 and had not printed 'word'"),
    ):
        second.wait_for_output("word")
    assert second.log != peer.log
    assert "--- shell 1 ended with 3 after this:\none\ntwo\n" in capsys.readouterr().out


def test_a_daemon_takes_the_place_of_one_that_was_killed(directory: Path, image: Path) -> None:
    with qemu_storage_daemon(directory, image) as first:
        first.kill()
        with qemu_storage_daemon(directory, image, socket=first.socket) as second:
            assert get_features(second.socket)


def test_virtiofsd_with_a_tag(directory: Path, share: Path) -> None:
    with virtiofsd(directory, share, tag="files") as peer:
        assert get_features(peer.socket)


def test_qemu_io_reads_what_it_wrote(storage_daemon: Peer, directory: Path, image: Path) -> None:
    assert "read 65536/65536" in qemu_io(
        directory, storage_daemon.socket, "write -P 0xa7 1M 64k", "read -P 0xa7 1M 64k"
    )
    with image.open("rb") as file:
        file.seek(1 << 20)
        assert file.read(1 << 16) == b"\xa7" * (1 << 16)
    with pytest.raises(AssertionError, match="Pattern verification failed"):
        qemu_io(directory, storage_daemon.socket, "read -P 0xa8 1M 64k")


def test_qemu_io_asks_us(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(LATE)
        listener.bind(str(directory / "ours.sock"))
        listener.listen()
        with qemu_io_started(directory, directory / "ours.sock", "read 0 512"):
            client, _ = listener.accept()
            with client:
                client.settimeout(LATE)
                assert receive(client, 12) == SET_OWNER


def test_dpdk_sends_frames_to_dpdk(directory: Path) -> None:
    with dpdk_vhost(directory) as echo, dpdk_virtio_user(directory, echo.socket, "--stats-period=1") as source:
        source.wait_for_output(r"RX-packets: [1-9]")
        source.terminate()
        assert re.search(r"RX-total: [1-9]", source.output())
        assert "virtio is now ready for processing" in echo.output()


def test_dpdk_as_a_front_end_that_listens(directory: Path) -> None:
    with (
        dpdk_virtio_user(directory, directory / "front.sock", server=True) as source,
        socket.socket(socket.AF_UNIX) as server,
    ):
        server.settimeout(LATE)
        server.connect(str(source.socket))
        assert receive(server, 4)


def test_a_guest_boots_and_powers_off(directory: Path, storage_daemon: Peer, image: Path) -> None:
    """Over the whole of another's vhost-user: from a disk of qemu-storage-daemon."""
    image.write_bytes(b"on the disk".ljust(512, b".") + bytes(image.stat().st_size - 512))
    script = """
        uname -r; head -c 11 /dev/vda; echo
        read word; echo "read: $word"
        grep virtio_mem /proc/modules
    """
    initrd = make_initrd(directory, script, ["virtio_blk", "virtio_mem", "virtiofs"])
    device = ["-chardev", f"socket,id=disk,path={storage_daemon.socket}", "-device", "vhost-user-blk-pci,chardev=disk"]
    with qemu(directory, *device, initrd=initrd) as vm:
        assert "on the disk" in vm.wait_for_output("on the disk")
        assert vm.qmp("query-status")["running"]
        assert re.search(r"(?s)IP=.*HLT=.*kernel's log at .*Run /init as init process", "\n".join(vm.doings()))
        with pytest.raises(RuntimeError, match=r"QEMU: .*nonsense"):
            vm.qmp("nonsense")
        vm.send("a word")
        assert vm.qmp.wait_for_event("SHUTDOWN")["data"]["guest"]
        assert vm.wait() == 0
        assert "read: a word" in vm.output()
        assert "virtio_mem " in vm.output()


def test_what_a_guest_does_is_shown_where_it_is_waited_for_in_vain(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TimeoutError, match="prints 'nonsense'"), qemu(directory) as vm:
        vm.wait_for_output("nonsense", 0.3)
    assert re.search(r"(?s)the guest when it was not waited for.*IP=.*HLT=.*qemu when it was", capsys.readouterr().out)


def test_a_monitor_that_does_not_tell(directory: Path) -> None:
    with qemu(directory) as vm:
        assert vm.qmp("query-status")["running"]
        os.kill(vm.pid, signal.SIGSTOP)
        assert "its monitor does not tell: TimeoutError" in "\n".join(vm.doings())
        os.kill(vm.pid, signal.SIGCONT)
        assert vm.qmp("query-status")["running"]  # not the answer to what was asked before


def test_a_module_that_there_is_not(directory: Path) -> None:
    with pytest.raises(UsageError, match="virtio_nonsense"):
        make_initrd(directory, "", ["virtio_nonsense"])
