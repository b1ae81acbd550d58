"""Which messages a front end may send by what was agreed on so far, and what handles each of them.

That is looked up for each message, and changes seldom: so what was found is kept until something else is agreed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vhost_user.backend.answer import Handler
from vhost_user.backend.negotiated import Negotiated
from vhost_user.errors import PeerError
from vhost_user.message import (
    F_PROTOCOL_FEATURES,
    FrontendRequest,
    MessageSpec,
    ProtocolFeature,
    Reply,
    spec_of,
)


class Rule(NamedTuple):
    """A message that may be sent now. `acknowledged` where what becomes of it is told by an acknowledgement, if one is
    asked for."""

    request: FrontendRequest
    spec: MessageSpec
    handler: Handler
    acknowledged: bool


class Rules:
    """Those of one session, whose `negotiated` is followed. `offered` and `offered_protocol` are the features that the
    back end offers."""

    def __init__(
        self,
        handlers: Mapping[FrontendRequest, Handler],
        negotiated: Negotiated,
        offered: int,
        offered_protocol: ProtocolFeature,
    ) -> None:
        self._handlers = handlers
        self._negotiated = negotiated
        self._offered = offered
        self._offered_protocol = offered_protocol
        self._found: dict[int, Rule] = {}
        self._found_by = negotiated.agreed

    def find(self, request: int) -> Rule:
        """The rule of a message. PeerError where nothing handles it, or where what it needs was not negotiated."""
        if self._found_by != (agreed := self._negotiated.agreed):
            self._found, self._found_by = {}, agreed
        if (rule := self._found.get(request)) is None:
            rule = self._found[request] = self._judged(self._spec(request))
        return rule

    def acknowledges(self, request: int) -> bool:
        """Whether a refusal is told by an acknowledgement, if one is asked for. Also of a message that has no rule."""
        if ProtocolFeature.REPLY_ACK not in self._negotiated.protocol_features:
            return False
        try:
            return self._spec(request).reply is Reply.ACK
        except PeerError:
            return True

    def _spec(self, request: int) -> MessageSpec:
        return spec_of(request, self._negotiated.protocol_features, postcopy=self._negotiated.postcopy)

    def _judged(self, spec: MessageSpec) -> Rule:
        assert isinstance(spec.request, FrontendRequest)
        handler = self._handlers.get(spec.request)
        if handler is None:
            raise PeerError("request", spec.name, "has to be one that this back end offers")
        acked = self._offered_protocol if spec.offered_suffices else self._negotiated.protocol_features
        agreed = "offered" if spec.offered_suffices else "negotiated"
        if lacking := spec.needs & ~acked:
            raise PeerError("request", spec.name, f"needs {lacking.name}, which was not {agreed}")
        if spec.needs_virtio:
            features = self._offered if spec.offered_suffices else self._negotiated.features
            if not self._negotiated.features_set:
                # Who comes back to a VM that runs may be told of its rings first: DPDK's virtio_user disables them.
                features |= self._offered & F_PROTOCOL_FEATURES
            if missing := spec.needs_virtio & ~features:
                limit = f"needs virtio feature bits {missing:#x}, which were not {agreed}"
                raise PeerError("request", spec.name, limit)
        return Rule(spec.request, spec, handler, self.acknowledges(spec.request))
