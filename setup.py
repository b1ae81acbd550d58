"""cffi's build hook: the one thing that pyproject.toml has no key for."""

from setuptools import setup

setup(cffi_modules=["vhost_user/_build.py:ffibuilder", "virtio_mem/_build.py:ffibuilder"])
