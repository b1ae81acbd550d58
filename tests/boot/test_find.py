"""Finding a QEMU and a kernel, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhost_user.errors import HostError, UsageError
from virtio_mem.boot.find import find_qemu
from virtio_mem.boot.guest import find_kernel
from virtio_mem.boot.initrd import build_initrd


def fake_qemu(directory: Path, says: str) -> Path:
    path = directory / "qemu-system-x86_64"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def test_the_one_in_path(search_path: Path, tmp_path: Path) -> None:
    path = fake_qemu(search_path, "QEMU emulator version 10.2.1\n-run-with [exit-with-parent=on|off]")
    qemu = find_qemu(tree=tmp_path)
    assert qemu.command == (str(path),)
    assert qemu.version == (10, 2)
    assert qemu.exits_with_parent


def test_one_that_is_too_old(search_path: Path, tmp_path: Path) -> None:
    fake_qemu(search_path, "QEMU emulator version 7.2.9")
    with pytest.raises(HostError, match=r"is QEMU 7\.2; 10\.2 is the first .* scripts/peers gets one"):
        find_qemu(tree=tmp_path)


def test_none_at_all(search_path: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"neither in PATH nor in .*; scripts/peers gets one"):
        find_qemu(tree=tmp_path)


def test_the_one_that_is_named(search_path: Path, tmp_path: Path) -> None:
    fake_qemu(search_path, "QEMU emulator version 7.2.9")
    path = fake_qemu(tmp_path / "mine", "QEMU emulator version 11.1.3")
    assert find_qemu(str(path), tmp_path).version == (11, 1)
    with pytest.raises(UsageError, match="--qemu=nonsense: is not a program"):
        find_qemu("nonsense", tmp_path)


def test_one_of_a_tree_is_started_through_the_linker_of_its_own_tree(search_path: Path, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "bookworm"):
        path = fake_qemu(root / "usr/bin", "")
        libraries = root / "usr/lib/x86_64-linux-gnu"
        libraries.mkdir(parents=True)
        linker = libraries / "ld-linux-x86-64.so.2"
        linker.write_text('#!/bin/sh\necho "QEMU emulator version 10.2.1 $*"\n')
        linker.chmod(0o755)
        qemu = find_qemu(str(path), tmp_path)
        assert qemu.release.startswith(f"10.2.1 --library-path {libraries} {path} -L {root}/usr/share/qemu")
        assert qemu.environment == {"QEMU_MODULE_DIR": f"{libraries}/qemu"}


def test_what_is_no_qemu(search_path: Path, tmp_path: Path) -> None:
    path = fake_qemu(tmp_path / "mine", "hello")
    with pytest.raises(HostError, match="does not say what it is, but 'hello"):
        find_qemu(str(path), tmp_path)
    path.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(HostError, match=r"does not say what it is: .*exit status 3"):
        find_qemu(str(path), tmp_path)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    for name in ("6.1.0-53-cloud-amd64", "6.12.3+deb13-amd64", "7.3.4+deb13-cloud-amd64"):
        directory = tmp_path / "usr/lib/modules" / name
        directory.mkdir(parents=True)
        (directory / "vmlinuz").touch()
    return tmp_path


@pytest.mark.parametrize(("version", "found"), [(None, "7.3.4"), ("6.1", "6.1.0"), ("6.12", "6.12.3"), ("6", "6.12.3")])
def test_a_kernel(kernels: Path, version: str | None, found: str) -> None:
    assert find_kernel(version, kernels).name.startswith(f"{found}")


def test_no_kernel(kernels: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"kernels are: 6\.1\.0-53-cloud-amd64, .*; run scripts/peers"):
        find_kernel("5.10", kernels)
    with pytest.raises(HostError, match="kernels are: none"):
        find_kernel(tree=tmp_path / "usr")


def test_a_module_that_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    with pytest.raises(UsageError, match="module=nonsense: is neither built into this kernel nor among its modules"):
        build_initrd(tmp_path, tmp_path / "busybox", "", ["virtio_pci", "nonsense"])
