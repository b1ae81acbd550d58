"""The OpenAPI document: valid, in step with the server and with Cloud Hypervisor's, and every answer is as it says."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_schema_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.result import Ok
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from tests import counts
from tests.api.rig import BLOCK, BOOT, TWO_ZONES, Rig, machine
from virtio_mem.api.body import MAX_CELLS, MAX_WAIT_SECONDS
from virtio_mem.api.routes import OPENAPI, Api
from virtio_mem.control import Hooks
from virtio_mem.events import KINDS
from virtio_mem.operation import State
from virtio_mem.protocol import RequestType

DOCUMENT: dict[str, Any] = json.loads(OPENAPI.read_text())


def schema(name: str) -> dict[str, Any]:
    return dict(DOCUMENT["components"]["schemas"][name])


def resolved(value: Any) -> Any:
    """A part of the document with its references followed."""
    if isinstance(value, dict):
        if "$ref" in value:
            found: Any = DOCUMENT
            for step in value["$ref"].removeprefix("#/").split("/"):
                found = found[step]
            return resolved(found)
        return {key: resolved(inner) for key, inner in value.items()}
    return [resolved(inner) for inner in value] if isinstance(value, list) else value


# The document.


def test_the_document_is_valid() -> None:
    openapi_spec_validator.validate(DOCUMENT)


def test_the_document_has_the_servers_routes_and_no_others(rig: Rig) -> None:
    described = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert {(route.method, route.path) for route in Api(rig.control).routes} == described
    assert rig.get("/api/v1/openapi.json").json == DOCUMENT


def test_the_document_has_the_routes_parameters_and_fields(rig: Rig) -> None:
    for route in Api(rig.control).routes:
        operation = resolved(DOCUMENT["paths"][route.path][route.method.lower()])
        parameters = operation.get("parameters", [])
        assert {entry["name"] for entry in parameters if entry["in"] == "query"} == set(route.query)
        assert "".join(f"{{{entry['name']}}}" for entry in parameters if entry["in"] == "path") in route.path
        body = operation.get("requestBody")
        fields = body["content"]["application/json"]["schema"]["properties"] if body else {}
        assert set(fields) == set(route.body)


def test_the_document_has_the_programs_words_and_limits() -> None:
    assert schema("Operation")["properties"]["state"]["enum"] == [str(state) for state in State]
    assert schema("Event")["properties"]["kind"]["enum"] == list(KINDS)
    parameters = DOCUMENT["paths"]["/api/v1/operations/{id}"]["get"]["parameters"]
    assert {entry["name"]: entry for entry in parameters}["wait"]["schema"]["maximum"] == MAX_WAIT_SECONDS
    parameters = DOCUMENT["paths"]["/api/v1/zones/{id}/blocks"]["get"]["parameters"]
    assert {entry["name"]: entry for entry in parameters}["cells"]["schema"]["maximum"] == MAX_CELLS


def test_every_example_is_what_its_schema_says() -> None:
    schemas = resolved(DOCUMENT["components"]["schemas"])
    examples = {name: entry["example"] for name, entry in schemas.items() if "example" in entry}
    assert len(examples) >= 3
    for name, example in examples.items():
        validate(example, schemas[name])


# The server.


def check(rig: Rig, method: str, path: str, body: object = None, *, route: str = "") -> Any:
    """Ask, and hold the answer to the document; its body."""
    answer = rig.ask(method, path, body)
    operation = resolved(DOCUMENT["paths"][route or path][method.lower()])
    described = operation["responses"][str(answer.status)]
    for name, header in described.get("headers", {}).items():
        assert name in answer.headers or not header.get("required")
    if "content" not in described:
        assert answer.body == b""
        return None
    (content_type,) = described["content"]
    assert answer.headers["Content-Type"].partition(";")[0] == content_type
    if content_type != "application/json":
        return answer.body
    validate(answer.json, described["content"][content_type]["schema"])
    return answer.json


def test_every_route_answers_as_documented(rig: Rig, tmp_path: Path) -> None:
    rig.follow()
    check(rig, "PUT", "/api/v1/vm.resize", {"desired_ram": BOOT + BLOCK})
    rig.request(RequestType.STATE, 1)
    for path in ("vmm.ping", "vm.info", "vm.counters", "operations", "openapi.json"):
        check(rig, "GET", f"/api/v1/{path}")
    check(rig, "GET", "/metrics")
    check(rig, "GET", "/api/v1/operations/1?wait=0", route="/api/v1/operations/{id}")
    check(rig, "GET", "/api/v1/zones/mem0/blocks", route="/api/v1/zones/{id}/blocks")
    check(rig, "GET", "/api/v1/zones/mem0/blocks?cells=100", route="/api/v1/zones/{id}/blocks")
    check(rig, "GET", "/api/v1/zones/mem0/blocks?cells=x", route="/api/v1/zones/{id}/blocks")
    for _ in range(2):
        check(rig, "PUT", "/api/v1/vm.coredump", {"destination_url": f"file://{tmp_path}/core"})
    check(rig, "PUT", "/api/v1/vm.pause")
    assert check(rig, "PUT", "/api/v1/system-reset")["field"] == "system-reset"
    check(rig, "PUT", "/api/v1/vm.resume")
    check(rig, "PUT", "/api/v1/system-reset")
    assert check(rig, "PUT", "/api/v1/vm.resize", {"desired_ram": 1})["field"] == "desired_ram"
    assert check(rig, "GET", "/api/v1/operations/9", route="/api/v1/operations/{id}")["field"] == "operation"


def test_a_machine_of_zones_answers_as_documented(zones: Rig) -> None:
    zones.follow("b")
    check(zones, "PUT", "/api/v1/vm.resize-zone", {"id": "a", "desired_ram": BOOT + BLOCK})
    zones.follow("a")
    info = check(zones, "GET", "/api/v1/vm.info")
    validate(info["zones"][0]["operation"], resolved(schema("Operation")))
    assert check(zones, "PUT", "/api/v1/vm.resize-zone", {"id": "c", "desired_ram": 0})["field"] == "id"


def test_a_zone_without_a_device_answers_as_documented(tmp_path: Path) -> None:
    with machine(tmp_path, "--memory size=64M,shared=on") as rig:
        check(rig, "GET", "/api/v1/vm.info")
        check(rig, "GET", "/api/v1/zones/mem0/blocks", route="/api/v1/zones/{id}/blocks")


def test_every_event_is_as_documented(rig: Rig, tmp_path: Path) -> None:
    rig.follow()
    rig.resize(BOOT)
    rig.follow()
    rig.request(RequestType.PLUG)
    rig.control.pause()
    rig.control.coredump(tmp_path / "core")
    rig.control.system_reset()
    rig.control.operations._operations[1].moved = 0
    rig.control.poll(time.monotonic())
    kinds = set()
    expected = resolved(schema("Event")) | {"additionalProperties": False}
    with rig.control.events.subscribe(after=0) as subscription:
        while event := subscription.get(0):
            validate(event.as_dict(), expected)
            kinds.add(event.kind)
    assert kinds >= {
        "requested",
        "plugged",
        "unplugged",
        "refused",
        "freed",
        "reached",
        "paused",
        "dumped",
        "system-reset",
    }


# Requests made from the document.


class _UnixPool(HTTPConnectionPool):
    """A pool of connections to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def _new_conn(self) -> HTTPConnection:
        path = self._path

        class Connection(HTTPConnection):
            def connect(self) -> None:
                self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.sock.settimeout(20)
                self.sock.connect(path)

        return Connection("localhost")


class _UnixAdapter(requests.adapters.HTTPAdapter):
    """Sends all requests of a session to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._pool = _UnixPool(path)

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> HTTPConnectionPool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One that writes core dumps nowhere: requests name any file of the host's."""
    with machine(tmp_path_factory.mktemp("api"), TWO_ZONES, hooks=Hooks(coredump=lambda _: None)) as made:
        yield made


_SCHEMA = schemathesis.openapi.from_dict(DOCUMENT).exclude(path="/api/v1/events")  # whose answer does not end
_OPERATIONS: list[Any] = [found.ok() for found in _SCHEMA.get_all_operations() if isinstance(found, Ok)]
_BREAKABLE = {
    "PUT /api/v1/vm.resize",
    "PUT /api/v1/vm.resize-zone",
    "GET /api/v1/operations/{id}",
    "GET /api/v1/zones/{id}/blocks",
}
"""What takes anything that could be wrong."""


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        pytest.param(operation, mode, id=f"{operation.label} {mode.value}")
        for operation in _OPERATIONS
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation.label in _BREAKABLE
    ],
)
def test_any_request_made_from_the_document_is_answered_as_documented(
    lasting: Rig, operation: Any, mode: GenerationMode
) -> None:
    """Requests as the document describes them, and ones that break it in one place or more.

    One that it allows may still be refused: a size can be whole and yet not one that the zone can have.
    """
    not_checked = CHECKS.get_by_names(["positive_data_acceptance"])
    lasting.control.resume()  # a paused machine can't be reset
    with requests.Session() as session:
        session.mount("http://localhost", _UnixAdapter(lasting.path))

        @settings(max_examples=counts.OPENAPI_REQUESTS, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            case.call_and_validate(base_url="http://localhost", session=session, excluded_checks=not_checked)

        ask()
    assert lasting.get("/api/v1/vmm.ping").status == 200
    lasting.wait_until_idle()
