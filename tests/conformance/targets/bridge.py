"""One of our targets behind JSON lines, by which all of the protocol is spoken: `bridge ring:packed`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from vhost_user.errors import UsageError
from virtio_mem.conformance.target import Asks, Capability, Chain, Refused, Subject, Target, Used, Wish
from virtio_mem.conformance.targets.parse import parse_target


def made(chains: list[dict[str, Any]]) -> list[Chain]:
    return [Chain(bytes.fromhex(chain.pop("request")), **chain) for chain in chains]


def told(used: Used) -> dict[str, Any]:
    return {"length": used.length, "room": used.room.hex()}


class Bridge:
    """Does what it is asked; each method is one kind of question, and returns the answer."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.subject: Subject | None = None

    @property
    def there(self) -> Subject:
        assert self.subject is not None
        return self.subject

    def start(self, **wish: Any) -> dict[str, Any]:
        if self.subject is not None:
            self.subject.close()
        self.subject = self.target.start(Wish(**wish))
        return {"offered_features": self.subject.offered_features}

    def begin(self, features: int) -> dict[str, Any]:
        return {"accepted": self.there.begin(features)}

    def config(self) -> dict[str, Any]:
        return {"config": self.there.config().encode().hex()}

    def submit(self, chains: list[dict[str, Any]]) -> dict[str, Any]:
        return {"used": [told(used) for used in self.there.submit(made(chains))]}

    def prepare(self, features: int) -> dict[str, Any]:
        return {"accepted": self.there.prepare(features)}

    def offer(self, chains: list[dict[str, Any]], flags: int, ahead: int) -> None:
        self.there.offer(made(chains), Asks(flags, ahead))

    def look(self, whole: bool) -> dict[str, Any]:
        seen = self.there.look(whole)
        return seen._asdict() | {"used": [{} if used is None else told(used) for used in seen.used]}

    def registers(self) -> dict[str, Any]:
        return self.there.registers()._asdict()

    def write_config(self, offset: int, data: str) -> None:
        self.there.write_config(offset, bytes.fromhex(data))

    def notices(self) -> dict[str, Any]:
        return {"notices": self.there.take_notices()}

    def held(self, offset: int, size: int) -> dict[str, Any]:
        return {"held": self.there.held(offset, size)}

    def read(self, offset: int, size: int) -> dict[str, Any]:
        return {"data": self.there.read(offset, size).hex()}

    def write(self, offset: int, data: str) -> None:
        self.there.write(offset, bytes.fromhex(data))

    def answer(self, do: str, **asked: Any) -> dict[str, Any]:
        does: Callable[..., dict[str, Any] | None] = getattr(self, do, None) or getattr(self.there, do)
        try:
            return does(**asked) or {}
        except (Refused, UsageError) as refused:
            return {"refused": str(refused)}


def main() -> None:
    with parse_target(sys.argv[1]) as target:
        bridge = Bridge(target)
        can = [one.name for one in Capability if one in target.capabilities]
        hello = {"virtio-mem-conformance": 1, "version": target.version, "capabilities": can}
        sys.stdout.write(json.dumps(hello) + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            sys.stdout.write(json.dumps(bridge.answer(**json.loads(line))) + "\n")
            sys.stdout.flush()
        if bridge.subject is not None:
            bridge.subject.close()


if __name__ == "__main__":
    main()
