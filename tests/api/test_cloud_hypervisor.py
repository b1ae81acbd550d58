"""Cloud Hypervisor's API, as far as it concerns memory: our document and server agree with it, and its client works.

What it is like is in spec-notes/peers/cloud-hypervisor-api.toml.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.api.rig import BLOCK, BOOT, Rig
from virtio_mem.api.routes import OPENAPI

DOCUMENT: dict[str, Any] = json.loads(OPENAPI.read_text())
FACTS: dict[str, Any] = tomllib.loads(
    (Path(__file__).resolve().parents[2] / "spec-notes/peers/cloud-hypervisor-api.toml").read_text()
)


def schema(name: str) -> dict[str, Any]:
    return dict(DOCUMENT["components"]["schemas"][name])


def test_our_paths_are_cloud_hypervisors() -> None:
    assert FACTS["path"]
    for fact in FACTS["path"]:
        operation = DOCUMENT["paths"][FACTS["source"]["prefix"] + fact["path"]][fact["method"].lower()]
        success = [status for status in operation["responses"] if status.startswith("2")]
        assert success == [str(fact["success"])]
        for name, where in (("answer", operation["responses"][success[0]]), ("body", operation.get("requestBody", {}))):
            content = where.get("content", {}).get("application/json", {})
            named = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
            assert named == fact.get(name, "")
        assert operation["tags"] == ["Cloud Hypervisor"]
    tagged = {path for path, item in DOCUMENT["paths"].items() for entry in item.values() if entry.get("tags")}
    assert tagged == {FACTS["source"]["prefix"] + fact["path"] for fact in FACTS["path"]}


@pytest.mark.parametrize("name", FACTS["schema"])
def test_our_bodies_are_cloud_hypervisors(name: str) -> None:
    fact, ours = FACTS["schema"][name], schema(name)
    properties = ours["properties"]
    assert set(fact["required"]) <= set(ours["required"])
    for field, expected in fact["fields"].items():
        described = properties[field]
        assert expected in (described.get("type"), described.get("$ref", "").rpartition("/")[2]), field
    for field in fact.get("null_here", []):
        assert properties[field]["type"] == "null"
    more = set(properties) - set(fact["fields"]) - set(fact.get("null_here", []))
    assert more == ({"zones"} if name == "VmInfo" else set())


def test_our_values_are_cloud_hypervisors() -> None:
    assert set(schema("VmState")["enum"]) <= set(FACTS["values"]["state"])
    assert schema("MemoryConfig")["properties"]["hotplug_method"]["enum"] == FACTS["values"]["hotplug_method"]


def test_what_the_server_says_is_in_cloud_hypervisors_terms(zones: Rig) -> None:
    info = zones.get("/api/v1/vm.info").json
    assert info["state"] in FACTS["values"]["state"]
    memory = info["config"]["memory"]
    for name, part in (("MemoryConfig", memory), *(("MemoryZoneConfig", zone) for zone in memory["zones"])):
        types = {"integer": int, "boolean": bool, "string": str, "array": list}
        fields = FACTS["schema"][name]["fields"]
        assert set(part) <= set(fields)
        for field, value in part.items():
            assert type(value) is types[fields[field]], field


def test_ch_remote_works(rig: Rig) -> None:
    program = shutil.which("ch-remote")
    if program is None:
        pytest.skip("ch-remote is not installed")

    def remote(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [program, "--api-socket", rig.path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)

    assert json.loads(remote("ping").stdout)["pid"] == os.getpid()
    assert remote("resize", "--memory", "128M").returncode == 0
    assert json.loads(remote("info").stdout)["config"]["memory"]["hotplugged_size"] == BOOT
    assert remote("pause").returncode == remote("resume").returncode == 0
    refused = remote("resize", "--memory", "1")
    assert refused.returncode == 1
    assert "desired_ram=1" in refused.stderr


def test_curl_works(rig: Rig) -> None:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")

    def curl(path: str, *arguments: str) -> str:
        command = [
            program,
            "--silent",
            "--show-error",
            "--unix-socket",
            rig.path,
            f"http://localhost{path}",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout

    assert json.loads(curl("/api/v1/vm.info"))["state"] == "Running"
    resized = curl("/api/v1/vm.resize", "-i", "-X", "PUT", "-d", json.dumps({"desired_ram": BOOT + BLOCK}))
    assert resized.startswith("HTTP/1.1 204 ")
    assert "Operation-Id: 1\n" in resized.replace("\r", "")
    large = curl("/api/v1/vm.resize", "-w", "%{http_code}", "-X", "PUT", "-d", "x" * 70_000)
    assert large.endswith("413")
