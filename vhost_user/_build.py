"""How the C core is compiled: cffi in API mode, one extension module, `vhost_user._core`.

The `*_api.h` files hold plain declarations only, so that the C compiler and cffi read the same text and can't disagree.
"""

from pathlib import Path

from cffi import FFI

# Relative to the project's root, which is where a build back end runs: setuptools refuses absolute source paths.
CSRC = Path("vhost_user/csrc")
_HERE = Path(__file__).resolve().parent / "csrc"

ffibuilder = FFI()
_apis = sorted(_HERE.glob("*_api.h"))
for _api in _apis:
    ffibuilder.cdef(_api.read_text())
ffibuilder.set_source(
    "vhost_user._core",
    "#include <stddef.h>\n#include <stdint.h>\n" + "".join(f'#include "{api.name}"\n' for api in _apis),
    sources=sorted(str(CSRC / source.name) for source in _HERE.glob("*.c")),
    include_dirs=[str(CSRC)],
    depends=sorted(str(CSRC / header.name) for header in _HERE.glob("*.h")),
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
