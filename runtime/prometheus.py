"""Metrics as Prometheus reads them: `tilewright:` before the names, `model_name` as the label.

Nothing is kept here; figures are read when somebody scrapes. To serve them, register a `Collector`
with the registry that is served, or send `exposition` in answer to a GET.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from .metrics import Histogram, Metrics, Reading

PREFIX = "tilewright:"


class Collector:
    """Figures of one engine, for `prometheus_client`'s `CollectorRegistry.register`.

    Args:
        metrics: `engine.metrics`.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        for reading in self.metrics.read():
            yield _family(reading, self.metrics.model_name)


def exposition(metrics: Metrics) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(Collector(metrics))
    return generate_latest(registry)


def _family(reading: Reading, model_name: str) -> Metric:
    name, value = PREFIX + reading.name, reading.value
    if isinstance(value, Histogram):
        family = HistogramMetricFamily(name, reading.text, labels=["model_name"])
        bounds = [*map(floatToGoString, value.bounds), "+Inf"]
        counts = accumulate(value.counts.tolist())
        family.add_metric([model_name], [*zip(bounds, counts, strict=True)], value.sum)
        return family
    kind = GaugeMetricFamily if reading.kind == "gauge" else CounterMetricFamily
    if isinstance(value, Mapping):
        labelled = kind(name, reading.text, labels=["model_name", reading.label])
        for label, each in value.items():
            labelled.add_metric([model_name, label], each)
        return labelled
    single = kind(name, reading.text, labels=["model_name"])
    single.add_metric([model_name], value)
    return single
