"""Which messages may be sent by what was agreed on; and that no rule outlives what it was made by."""

from __future__ import annotations

import pytest

from vhost_user.backend.answer import Handler
from vhost_user.backend.negotiated import Negotiated
from vhost_user.backend.rules import Rules
from vhost_user.errors import PeerError
from vhost_user.message import (
    F_PROTOCOL_FEATURES,
    VIRTIO_F_IOMMU_PLATFORM,
    FrontendRequest,
    ProtocolFeature,
    Reply,
)
from vhost_user.shared_memory import SharedMemory

F, P = FrontendRequest, ProtocolFeature
SLOTS = P.CONFIGURE_MEM_SLOTS


@pytest.fixture
def negotiated() -> Negotiated:
    return Negotiated(SharedMemory(), features=F_PROTOCOL_FEATURES, features_set=True)


@pytest.fixture
def rules(negotiated: Negotiated) -> Rules:
    handled: dict[FrontendRequest, Handler] = {request: lambda *_: None for request in F if request != F.SEND_RARP}
    return Rules(handled, negotiated, F_PROTOCOL_FEATURES | VIRTIO_F_IOMMU_PLATFORM, SLOTS | P.MQ | P.RARP)


def test_a_message_may_be_sent_as_long_as_its_feature_is_agreed_on(rules: Rules, negotiated: Negotiated) -> None:
    for _ in range(2):
        for number in (F.ADD_MEM_REG, F.REM_MEM_REG):
            with pytest.raises(PeerError, match=r"needs CONFIGURE_MEM_SLOTS, which was not negotiated"):
                rules.find(number)
        negotiated.protocol_features = SLOTS
        assert [rules.find(number).request for number in (F.ADD_MEM_REG, F.REM_MEM_REG)] == [37, 38]
        negotiated.protocol_features = P.NONE


def test_a_rule_is_found_once_until_something_else_is_agreed_on(rules: Rules, negotiated: Negotiated) -> None:
    first = rules.find(F.SET_OWNER)
    assert rules.find(F.SET_OWNER) is first
    negotiated.status = 4
    assert rules.find(F.SET_OWNER) is first
    negotiated.protocol_features = P.REPLY_ACK
    assert rules.find(F.SET_OWNER) is not first


def test_acknowledgements_are_agreed_on(rules: Rules, negotiated: Negotiated) -> None:
    asked = F.SET_OWNER, F.GET_FEATURES
    assert [rules.find(number).acknowledged for number in asked] == [False, False]
    negotiated.protocol_features = P.REPLY_ACK
    assert [rules.find(number).acknowledged for number in asked] == [True, False]
    assert [rules.acknowledges(number) for number in (*asked, F.ADD_MEM_REG, F.GET_CONFIG, 999)] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_postcopy_changes_what_answers_a_table(rules: Rules, negotiated: Negotiated) -> None:
    assert rules.find(F.SET_MEM_TABLE).spec.reply is Reply.ACK
    negotiated.postcopy = True
    assert rules.find(F.SET_MEM_TABLE).spec.reply is Reply.ALWAYS
    negotiated.postcopy = False
    assert rules.find(F.SET_MEM_TABLE).spec.reply is Reply.ACK


def test_virtio_features_count_once_they_are_set(rules: Rules, negotiated: Negotiated) -> None:
    negotiated.features, negotiated.features_set = 0, False
    rules.find(F.SET_VRING_ENABLE)
    negotiated.features_set = True
    with pytest.raises(PeerError, match="needs virtio feature bits 0x40000000, which were not negotiated"):
        rules.find(F.SET_VRING_ENABLE)
    negotiated.features = F_PROTOCOL_FEATURES
    rules.find(F.SET_VRING_ENABLE)
    with pytest.raises(PeerError, match="needs virtio feature bits 0x200000000, which were not negotiated"):
        rules.find(F.IOTLB_MSG)


def test_what_is_offered_suffices_for_some(rules: Rules, negotiated: Negotiated) -> None:
    assert negotiated.protocol_features is P.NONE
    rules.find(F.GET_QUEUE_NUM)
    with pytest.raises(PeerError, match="needs MTU, which was not offered"):
        rules.find(F.NET_SET_MTU)


def test_what_nothing_handles_is_refused(rules: Rules) -> None:
    for number, match in (
        (F.SEND_RARP, "has to be one that this back end offers"),
        (999, "has to be a request that the protocol has"),
    ):
        for _ in range(2):
            with pytest.raises(PeerError, match=match):
                rules.find(number)
