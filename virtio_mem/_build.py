"""How the C core is compiled: cffi in API mode, one extension module, `virtio_mem._core`. As vhost_user/_build.py."""

from pathlib import Path

from cffi import FFI

CSRC = Path("virtio_mem/csrc")
_HERE = Path(__file__).resolve().parent / "csrc"
_APIS = ("rules_api.h", "at_once_api.h")  # the second has what the first declares

ffibuilder = FFI()
for _api in _APIS:
    ffibuilder.cdef((_HERE / _api).read_text())
ffibuilder.set_source(
    "virtio_mem._core",
    "#include <stdint.h>\n" + "".join(f'#include "{api}"\n' for api in _APIS),
    sources=sorted(str(CSRC / source.name) for source in _HERE.glob("*.c")),
    include_dirs=[str(CSRC)],
    depends=[str(CSRC / api) for api in _APIS],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
