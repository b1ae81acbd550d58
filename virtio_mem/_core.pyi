"""The extension module that cffi makes: what `ffi` and `lib` hold is read from csrc/rules_api.h when it is compiled."""

from typing import Any

ffi: Any
lib: Any
