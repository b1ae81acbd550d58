"""A virtio-mem device of bits alone, with all that such a device can have, behind the kit's JSON lines.

The one in docs/conformance-targets.md is the shortest.
"""

import json
import struct
import sys
from typing import Any

ADDR, FEATURES = 4 << 30, 1 << 32 | 1 << 2 | 1 << 1
ACK, NACK, BUSY, ERROR = range(4)
PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)


class Device:
    def __init__(self, region_size: int, block_size: int, requested_size: int, node_id: int | None) -> None:
        self.region, self.block, self.target = region_size, block_size, requested_size
        self.plugged: set[int] = set()
        self.driver = self.paused = self.owes = False
        self.notices = 0

    def config(self) -> bytes:
        plugged = len(self.plugged) * self.block
        return struct.pack("<QQQQQQQ", self.block, 0, ADDR, self.region, self.region, plugged, self.target)

    def answer(self, type_: int, addr: int, nb_blocks: int) -> tuple[int, int]:
        first, odd = divmod(addr - ADDR, self.block)
        blocks = set(range(first, first + nb_blocks))
        inside = blocks and not odd and 0 <= first <= self.region // self.block - nb_blocks
        here = len(blocks & self.plugged)
        if type_ > STATE or (type_ != UNPLUG_ALL and not inside):
            return ERROR, 0
        if type_ == STATE:
            return ACK, 0 if here == nb_blocks else 2 if here else 1
        if here != {PLUG: 0, UNPLUG: nb_blocks}.get(type_, here):
            return ERROR, 0
        if type_ == PLUG and (len(self.plugged) + nb_blocks) * self.block > self.target:
            return NACK, 0
        if self.paused:
            self.owes = True
            return BUSY, 0
        self.plugged = {PLUG: self.plugged | blocks, UNPLUG: self.plugged - blocks}.get(type_, set())
        return ACK, 0


def serve(device: Device, do: str, asked: dict[str, Any]) -> dict[str, Any]:
    if do == "begin":
        good = not asked["features"] & ~FEATURES and asked["features"] & 1 << 1 and asked["features"] & 1 << 32
        device.driver = bool(good)
        return {"accepted": device.driver}
    if do == "config":
        return {"config": device.config().hex()}
    if do == "request":
        answer = device.answer(*struct.unpack_from("<H6xQH", bytes.fromhex(asked["request"])))
        return {"response": struct.pack("<H6xH", *answer).hex()}
    if do == "set_target":
        if asked["requested_size"] % device.block or asked["requested_size"] > device.region:
            return {"refused": f"{asked['requested_size']} is not what such a region can have"}
        device.target, device.notices = asked["requested_size"], device.notices + 1
    elif do == "notices":
        notices, device.notices = (device.notices, 0) if device.driver else (0, device.notices)
        return {"notices": notices}
    elif do == "pause":
        device.paused = asked["paused"]
        if device.owes and not device.paused:
            device.owes, device.notices = False, device.notices + 1
    elif do in ("device_reset", "system_reset"):
        device.driver = False
        device.plugged = set() if do == "system_reset" else device.plugged
    return {}


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    can = ["RESTART", "WISH", "SET_TARGET", "TIME", "SYSTEM_RESET", "NOTICES", "PAUSE"]
    device = Device(0, 1, 0, None)
    say({"virtio-mem-conformance": 1, "version": "shim.py 1", "capabilities": can})
    for line in sys.stdin:
        asked = json.loads(line)
        do, size = asked.pop("do"), asked.get("block_size", 1)
        if do != "start":
            say(serve(device, do, asked))
        elif size & size - 1 or asked["region_size"] % size:
            say({"refused": "that is no size for blocks"})
        else:
            device = Device(**asked)
            say({"offered_features": FEATURES})
