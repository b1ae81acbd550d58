"""Fixtures
pages   the kinds of pages, one after the other: of 4 KiB, and huge ones of which HUGE_PAGES are free
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.host import HugePagePool
from tests.shared_memory.helpers import HUGE, HUGE_PAGES, SMALL, Pages


@pytest.fixture(params=["small", pytest.param("huge", marks=pytest.mark.needs_hugetlb)])
def pages(request: pytest.FixtureRequest, hugepages: Callable[[int, int], HugePagePool]) -> Pages:
    if request.param == "small":
        return SMALL
    hugepages(HUGE, HUGE_PAGES)
    return Pages(HUGE)
