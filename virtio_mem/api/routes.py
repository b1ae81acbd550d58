"""The paths of the API, what answers each, and how a request finds its way there.

`Api` is sans-IO: a request goes in, a reply comes out. Whatever is wrong with a request is a reply, too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from vhost_user.errors import FieldError, HostError, PeerError, UsageError
from virtio_mem.api import body
from virtio_mem.api.message import JSON, ApiError, ApiRequest, Reply, error_reply, json_reply
from virtio_mem.api.stream import event_stream, last_event_id
from virtio_mem.control import Control, UnknownZone, reclaim
from virtio_mem.installed import version
from virtio_mem.operation import Operation

log = logging.getLogger(__name__)

OPENAPI = Path(__file__).with_name("openapi.json")
OPERATION_HEADER = "Operation-Id"

_MAX_ID_DIGITS = 18


class Call(NamedTuple):
    """A request that found its handler: the parts of its path that vary, its query, and the fields of its body."""

    request: ApiRequest
    parts: tuple[str, ...]
    query: dict[str, str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Route:
    """One path and method. In `path` a part in braces is any text. `query` are the parameters that it takes, and `body`
    the fields of the JSON object; a `long` one may hold its connection for minutes: where it takes parameters, only
    for a request that gives some."""

    method: str
    path: str
    handler: Callable[[Call], Reply]
    query: tuple[str, ...] = ()
    body: tuple[str, ...] = ()
    long: bool = False

    def match(self, path: str) -> tuple[str, ...] | None:
        """The varying parts of `path`, decoded; None where the route is another one's."""
        pattern, parts = self.path.split("/"), path.split("/")
        if len(pattern) != len(parts):
            return None
        found = []
        for expected, part in zip(pattern, parts, strict=True):
            if expected.startswith("{"):
                found.append(part)
            elif expected != part:
                return None
        try:
            return tuple(unquote(part, errors="strict") for part in found)
        except UnicodeDecodeError:
            return None


class Api:
    """Answers requests by what `control` knows and does."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.routes = (
            Route("GET", "/api/v1/vmm.ping", self._ping),
            Route("GET", "/api/v1/vm.info", lambda _: json_reply(control.info())),
            Route("GET", "/api/v1/vm.counters", lambda _: json_reply(control.counters())),
            Route("PUT", "/api/v1/vm.resize", self._resize, body=("desired_vcpus", "desired_ram", "desired_balloon")),
            Route("PUT", "/api/v1/vm.resize-zone", self._resize_zone, body=("id", "desired_ram")),
            Route("PUT", "/api/v1/vm.pause", self._pause),
            Route("PUT", "/api/v1/vm.resume", self._resume),
            Route("PUT", "/api/v1/vm.snapshot", self._snapshot, body=("destination_url",), long=True),
            Route("PUT", "/api/v1/vm.coredump", self._coredump, body=("destination_url",), long=True),
            Route("PUT", "/api/v1/system-reset", self._system_reset),
            Route("GET", "/api/v1/operations", lambda _: json_reply(control.operations.all())),
            Route("GET", "/api/v1/operations/{id}", self._operation, query=("wait",), long=True),
            Route("GET", "/api/v1/zones/{id}/blocks", self._blocks, query=("cells",)),
            Route("PUT", "/api/v1/zones/{id}/reclaim", self._reclaim),
            Route("GET", "/api/v1/events", self._events, long=True),
            Route("GET", "/api/v1/openapi.json", lambda _: Reply(HTTPStatus.OK, _document(), {"Content-Type": JSON})),
            Route("GET", "/metrics", self._metrics),
        )

    def answer(self, request: ApiRequest) -> Reply:
        """Answer a request. It is logged, with who asked, as information where it may change something."""
        reply = self._answer(request)
        level = logging.DEBUG if request.method == "GET" else logging.INFO
        said = f", operation {reply.headers[OPERATION_HEADER]}" if OPERATION_HEADER in reply.headers else ""
        text = "%s %s %s by %s: %d%s"
        shown = request.body[:200].decode("latin-1").encode("unicode_escape").decode()  # one line, and no escape codes
        log.log(level, text, request.method, request.path[:200], shown, request.peer, reply.status, said)
        return reply

    def is_long(self, request: ApiRequest) -> bool:
        """Whether a request may hold its connection for minutes."""
        return any(
            route.long and (request.query or not route.query) and route.match(request.path) is not None
            for route in self.routes
        )

    def _answer(self, request: ApiRequest) -> Reply:
        try:
            route, parts = self._find(request)
            query, fields = body.parse_query(request.query, route.query), {}
            if route.body:
                fields = body.parse_object(request.body, route.body)
            else:
                body.no_body(request.body)
            return route.handler(Call(request, parts, query, fields))
        except ApiError as error:
            return error_reply(error, error.status, request)
        except UnknownZone as error:
            return error_reply(error, HTTPStatus.NOT_FOUND, request)
        except UsageError as error:
            return error_reply(error, HTTPStatus.BAD_REQUEST, request)
        except (HostError, PeerError) as error:
            return error_reply(error, HTTPStatus.INTERNAL_SERVER_ERROR, request)
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path[:200])
            unexpected = FieldError(request.path[:200], type(error).__name__, "a mistake of this program: see its log")
            return error_reply(unexpected, HTTPStatus.INTERNAL_SERVER_ERROR, request)

    def _find(self, request: ApiRequest) -> tuple[Route, tuple[str, ...]]:
        found = [(route, parts) for route in self.routes if (parts := route.match(request.path)) is not None]
        if not found:
            raise ApiError(HTTPStatus.NOT_FOUND, "path", request.path, "is not known", "see /api/v1/openapi.json")
        for route, parts in found:
            if route.method == request.method:
                return route, parts
        methods = ", ".join(route.method for route, _ in found)
        error = ApiError(HTTPStatus.METHOD_NOT_ALLOWED, "method", request.method, f"must be {methods}")
        error.headers["Allow"] = methods
        raise error

    # Cloud Hypervisor's.

    @staticmethod
    def _ping(_: Call) -> Reply:
        ours = version()
        features = ["virtio-mem"]
        return json_reply({"build_version": ours, "version": ours, "pid": os.getpid(), "features": features})

    def _resize(self, call: Call) -> Reply:
        body.only_memory(call.fields, "desired_vcpus")
        body.only_memory(call.fields, "desired_balloon")
        return _accepted(self.control.resize(body.byte_count(call.fields, "desired_ram")))

    def _resize_zone(self, call: Call) -> Reply:
        zone, size = body.text(call.fields, "id"), body.byte_count(call.fields, "desired_ram")
        return _accepted(self.control.resize_zone(zone, size))

    def _pause(self, _: Call) -> Reply:
        self.control.pause()
        return Reply(HTTPStatus.NO_CONTENT)

    def _resume(self, _: Call) -> Reply:
        self.control.resume()
        return Reply(HTTPStatus.NO_CONTENT)

    def _snapshot(self, call: Call) -> Reply:
        self.control.snapshot(body.local_path(call.fields, "destination_url", "/tmp/snapshot"))
        return Reply(HTTPStatus.NO_CONTENT)

    def _coredump(self, call: Call) -> Reply:
        self.control.coredump(body.local_path(call.fields, "destination_url", "/tmp/core"))
        return Reply(HTTPStatus.NO_CONTENT)

    # Ours.

    def _system_reset(self, _: Call) -> Reply:
        if self.control.system_reset():
            return Reply(HTTPStatus.NO_CONTENT)
        paused = self.control.paused
        limit = "a device is paused, and its blocks must stay" if paused else "the host would not take all blocks back"
        remedy = "resume it first" if paused else "try again; the log says why"
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "system-reset", "refused", limit, remedy)

    def _operation(self, call: Call) -> Reply:
        (name,) = call.parts
        wait = body.seconds(call.query, "wait")
        known = name.isascii() and name.isdigit() and len(name) <= _MAX_ID_DIGITS
        number = int(name) if known else 0
        if wait is None:
            operation = self.control.operations.get(number)
        else:
            operation = self.control.wait(number, wait, call.request.gone)
        if operation is None:
            limit = "is not known: it never was, or was forgotten"
            raise ApiError(HTTPStatus.NOT_FOUND, "operation", name, limit, "see /api/v1/operations")
        return json_reply(operation)

    def _blocks(self, call: Call) -> Reply:
        most = body.cell_count(call.query, "cells")
        blocks = self.control.blocks(*call.parts)
        head = {
            name: getattr(blocks, name) for name in ("block_size", "nb_blocks", "usable_blocks", "requested_blocks")
        }
        if most is not None:
            per_cell, counts = blocks.counts(most)
            return json_reply({**head, "nb_runs": len(blocks.plugged_runs()), "per_cell": per_cell, "cells": counts})

        def pieces() -> Generator[bytes]:
            yield json.dumps(head)[:-1].encode() + b', "plugged": ['
            between = ""
            for some in blocks.plugged_runs().arrays():
                yield (between + ",".join(f"[{first},{count}]" for first, count in some)).encode()
                between = ","
            yield b"]}"

        return Reply(HTTPStatus.OK, pieces(), {"Content-Type": JSON})

    def _reclaim(self, call: Call) -> Reply:
        (zone,) = call.parts
        freed, left = reclaim(self.control, zone, call.request.gone)
        return json_reply({"freed": freed, "held": left})

    def _events(self, call: Call) -> Reply:
        after = last_event_id(call.request)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        return Reply(HTTPStatus.OK, event_stream(self.control.events, after, call.request.gone), headers)

    def _metrics(self, _: Call) -> Reply:
        try:
            from virtio_mem.api import metrics  # noqa: PLC0415
        except ImportError as error:
            limit = f"needs the Python package prometheus-client: {error}"
            remedy = "pip install prometheus-client"
            raise ApiError(HTTPStatus.NOT_IMPLEMENTED, "/metrics", "off", limit, remedy) from None
        return Reply(HTTPStatus.OK, metrics.render(self.control), {"Content-Type": metrics.CONTENT_TYPE})


def _accepted(operation: Operation) -> Reply:
    return Reply(HTTPStatus.NO_CONTENT, headers={OPERATION_HEADER: str(operation.id)})


@cache
def _document() -> bytes:
    return OPENAPI.read_bytes()
