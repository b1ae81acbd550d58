# shellcheck shell=bash
# Sourced by the other scripts: makes the machine and the project's .venv ready, and is quick when they are.
#
#   prepare EXTRAS        .venv holds the project (editable, its C core compiled) and these extras of pyproject.toml
#   need_tools TOOL...    these Debian packages, each with a command of the same name, are there
#   copy_tree DIRECTORY   the project's files are there too, in a new directory, without what was made from them
#
# Afterwards ROOT is the project's directory and PYTHON the interpreter of .venv. As root, Debian packages that are
# missing are installed; otherwise the line that installs them is printed. pip follows the user's own configuration.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
# What is imported is compiled once, and not by each of the hundreds of processes that the tests start.
unset PYTHONDONTWRITEBYTECODE
PYTHON=$VENV/bin/python
# With gcc, what compiles an extension module on a Debian machine that has only python3.
BUILD_PACKAGES=(gcc libc6-dev python3 python3-dev python3-venv)

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$@"
    exit 1
}

apt_install() {
    if [[ $(id -u) -ne 0 ]]; then
        die "These Debian packages are needed: run 'sudo apt-get install $*' and try again."
    fi
    command -v apt-get >/dev/null || die "There is no apt-get here: install what Debian calls $* and try again."
    say "Installing Debian packages: $*"
    apt-get update -qq >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

need_tools() {
    local tool missing=()
    for tool in "$@"; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    [[ ${#missing[@]} -eq 0 ]] || apt_install "${missing[@]}"
}

# Whether an interpreter is new enough, can make a venv, and has headers that the compiler can read.
can_build() {
    local include
    include=$("$1" -c '
import ensurepip, sys, sysconfig, venv
if sys.version_info < (3, 11):
    sys.exit(1)
print(sysconfig.get_path("include"))
' 2>/dev/null) || return 1
    echo '#include <Python.h>' | gcc -fsyntax-only -x c -I "$include" - 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if can_build "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    if ! python=$(find_python); then
        apt_install "${BUILD_PACKAGES[@]}"
        python=$(find_python) || die "No Python 3.11 or later with venv and headers was found, nor does apt have one."
    fi
    say "Making .venv with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
}

# Python compiles what is imported, when it is; most of what is installed never is.
pip_install() {
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile "$@" >&2
}

# The build back end goes into .venv first, so that compiling the C core again needs no network.
install_project() {
    local requirements
    can_build "$PYTHON" || make_venv
    say "Installing the project and its extras ($1) in .venv"
    mapfile -t requirements < <("$PYTHON" -c '
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["build-system"]["requires"], sep="\n")
' "$ROOT/pyproject.toml")
    pip_install "${requirements[@]}"
    pip_install --no-build-isolation --editable "${ROOT}[$1]"
}

# The project's files in a new directory, without what was made from them.
copy_tree() {
    mkdir "$1"
    tar -C "$ROOT" --exclude=./.git --exclude=./.venv --exclude=./.cache --exclude=./build --exclude='*.so' \
        --exclude='*.egg-info' -cf - . | tar -C "$1" -xf -
}

# What an installation with these extras was made from.
fingerprint() {
    (
        cd "$ROOT"
        echo "$ROOT $1"
        cat pyproject.toml setup.py scripts/setup.sh ./*/_build.py ./*/csrc/*
    ) | sha256sum
}

is_ready() {
    [[ -f $1 && $(<"$1") == "$2" ]] && "$PYTHON" -P -c 'import vhost_user._core, virtio_mem._core' 2>/dev/null
}

prepare() {
    local stamp=$VENV/.ready-${1//,/-} print
    print=$(fingerprint "$1")
    is_ready "$stamp" "$print" && return
    mkdir -p "$ROOT/.cache"
    # Two scripts may be started at once: the second waits, and then finds the work done.
    exec 9>"$ROOT/.cache/setup.lock"
    flock 9
    if ! is_ready "$stamp" "$print"; then
        install_project "$1"
        echo "$print" >"$stamp"
    fi
    exec 9>&-
}
