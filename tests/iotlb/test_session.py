"""Our front end and our back end with an IOMMU between them: rules K2 to K4."""

from __future__ import annotations

import pytest

from tests.iotlb.rig import behind

FORMATS = pytest.mark.parametrize("form", ["split", "packed"])


@FORMATS
def test_chains_come_back_through_translations(form: str) -> None:
    with behind(form) as rig:
        ring = rig.ready()
        for length in (1, 100, 2047):
            ring.echo(b"x" * length)
        for _ in range(5):
            for each in range(8):
                ring.send(b"%d" % each)
            ring.kick()
            ring.collect(8)
