"""Prometheus metrics of a machine's memory, collected when they are asked for.

Imported at the first request for them: the client library takes longer to import than all the rest of the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from virtio_mem.control import Control

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of Prometheus' text format."""

_GAUGES = {
    "boot_size": ("boot_bytes", "Boot memory, which is always there."),
    "hotplug_size": ("region_bytes", "What the device can plug at most."),
    "usable_region_size": ("usable_region_bytes", "What of the region the guest may use."),
    "requested_size": ("requested_bytes", "What the guest is asked to have plugged."),
    "plugged_size": ("plugged_bytes", "What the guest has plugged."),
    "held": (
        "held_bytes",
        "What the host holds for the region, by its own counters; no less, where its memory is in very many pieces.",
    ),
    "held_unplugged": (
        "held_unplugged_bytes",
        "What of that the host holds for blocks that are not plugged; no less, where those are in very many pieces.",
    ),
    "block_size": ("block_bytes", "The size of a block."),
    "connected": ("connected", "Whether a guest's front end is there."),
    "paused": ("paused", "Whether the device is paused."),
}
_COUNTERS = {
    "unplugged_bytes": ("unplugged_bytes", "What was unplugged and given back to the host."),
    "unreturned_bytes": ("unreturned_bytes", "What the host still held of it right afterwards."),
    "unrequested_bytes": (
        "unrequested_bytes",
        "What was unplugged although the guest had no more than it was asked for.",
    ),
    "failed_undos": ("failed_undos", "Steps of a refused request that could not be taken back."),
}


def render(control: Control) -> bytes:
    """The metrics as Prometheus' text format has them."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Machine(control))
    return generate_latest(registry)


class _Machine(Collector):
    """Turns what the control knows into metrics."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        zones = self._control.info()["zones"]
        for field, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"virtio_mem_{name}", text, labels=["zone"])
            for zone in zones:
                if zone[field] is not None:
                    gauge.add_metric([zone["id"]], zone[field])
            yield gauge
        for field, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(f"virtio_mem_{name}", text, labels=["zone"])
            for zone in zones:
                if zone[field] is not None:
                    counter.add_metric([zone["id"]], zone[field])
            yield counter
        answers = CounterMetricFamily(
            "virtio_mem_requests", "The guest's requests.", labels=["zone", "request", "answer"]
        )
        for zone in zones:
            for name, count in (zone["answers"] or {}).items():
                request, _, answer = name.rpartition(" ")
                answers.add_metric([zone["id"], request, answer], count)
        yield answers
        events = self._control.events
        yield CounterMetricFamily("virtio_mem_events_dropped", "Events that slow readers lost.", value=events.dropped)
        yield GaugeMetricFamily("virtio_mem_event_listeners", "Readers of the event stream.", value=events.listeners)
