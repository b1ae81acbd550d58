"""The front end: what a VMM does with a vhost-user daemon; frontend.py shows how it is used."""

from vhost_user.frontend.frontend import PROTOCOL_FEATURES, Frontend, accept
from vhost_user.frontend.iotlb import Iommu, IovaMapping
from vhost_user.frontend.postcopy import PageSource, Postcopy
from vhost_user.frontend.regions import SharedRegion, SharedRegions
from vhost_user.frontend.vring import FrontendVring

__all__ = [
    "PROTOCOL_FEATURES",
    "Frontend",
    "FrontendVring",
    "Iommu",
    "IovaMapping",
    "PageSource",
    "Postcopy",
    "SharedRegion",
    "SharedRegions",
    "accept",
]
