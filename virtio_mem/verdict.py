"""What becomes of a request, as the C core says it in a byte: its type, the answer, and in words why."""

from __future__ import annotations

from typing import NamedTuple

from virtio_mem import _native
from virtio_mem.protocol import BlockState, RequestType, Response, ResponseType

_RESPONSES = {
    "state_plugged": Response(ResponseType.ACK, BlockState.PLUGGED),
    "state_unplugged": Response(ResponseType.ACK, BlockState.UNPLUGGED),
    "state_mixed": Response(ResponseType.ACK, BlockState.MIXED),
    "granted": Response(ResponseType.ACK),
    "unknown_type": Response(ResponseType.ERROR, reason="the request type is unknown"),
    "unaligned": Response(ResponseType.ERROR, reason="addr is not aligned to block_size"),
    "no_blocks": Response(ResponseType.ERROR, reason="nb_blocks is 0"),
    "outside": Response(ResponseType.ERROR, reason="a block is outside the usable region"),
    "plugged_already": Response(ResponseType.ERROR, reason="a block is plugged already"),
    "unplugged_already": Response(ResponseType.ERROR, reason="a block is unplugged already"),
    "beyond_target": Response(ResponseType.NACK, reason="plugged_size would exceed requested_size"),
    "paused": Response(ResponseType.BUSY, reason="the device is paused"),
}


class Verdict(NamedTuple):
    """What becomes of one request. `type` is None for a request whose type is unknown."""

    type: RequestType | None
    response: Response


VERDICTS = {
    kind << 4 | number: Verdict(RequestType(kind) if kind in list(RequestType) else None, response)
    for kind in range(len(RequestType) + 1)
    for number, response in enumerate(_RESPONSES[name] for name in _native.REASONS)
}
