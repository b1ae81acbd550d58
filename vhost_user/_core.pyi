"""The extension module that cffi makes: what `ffi` and `lib` hold is read from csrc/*_api.h when it is compiled."""

from typing import Any

ffi: Any
lib: Any
