"""How the rules are compiled: cffi in API mode, one extension module, `virtio_mem._core`. As vhost_user/_build.py."""

from pathlib import Path

from cffi import FFI

CSRC = Path("virtio_mem/csrc")
_API = Path(__file__).resolve().parent / "csrc" / "rules_api.h"

ffibuilder = FFI()
ffibuilder.cdef(_API.read_text())
ffibuilder.set_source(
    "virtio_mem._core",
    f'#include <stdint.h>\n#include "{_API.name}"\n',
    sources=[str(CSRC / "rules.c")],
    include_dirs=[str(CSRC)],
    depends=[str(CSRC / _API.name)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
