"""How the tests look at a refusal: the exception, its fields, and that each of them says something."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vhost_user.errors import UsageError
from virtio_mem.config import ConfigError


@contextmanager
def refused(field: str, value: object, limit: str) -> Iterator[None]:
    """The block raises a ConfigError of this field and value whose limit has these words, and that has a way out."""
    with pytest.raises(ConfigError) as caught:
        yield
    error = caught.value
    assert isinstance(error, UsageError)
    assert (error.field, error.value) == (field, value)
    assert limit in error.limit
    assert error.remedy
    shown = field if value is None else f"{field}={value}"
    assert str(error) == f"{shown}: {error.limit}; {error.remedy}"
