"""A front's metrics through Ray's own, which every node exports for all that runs on it."""

import asyncio
import logging

from prometheus_client.registry import Collector
from ray.serve.metrics import Gauge

# Ray's agents report about as often.
_PERIOD_S = 5.0

logger = logging.getLogger(__name__)


class RayMetrics:
    """Mirrors every sample as a gauge: vllm:x becomes ray_vllm_x, as vLLM has it on Ray.

    Gauges, because what is mirrored are totals, and Ray's counters and histograms take increments.
    Prometheus' functions go by names, not types: rate() and histogram_quantile() work on these too.
    """

    def __init__(self, metrics: Collector) -> None:
        self._metrics = metrics
        self._gauges: dict[str, Gauge] = {}

    async def publish_forever(self) -> None:
        while True:
            try:
                self.publish()
            except Exception:
                logger.exception("metrics were not published")
            await asyncio.sleep(_PERIOD_S)

    def publish(self) -> None:
        for family in self._metrics.collect():
            for sample in family.samples:
                name = sample.name.replace(":", "_")
                gauge = self._gauges.get(name)
                if gauge is None:
                    labels = tuple(sample.labels)
                    gauge = Gauge(name, family.documentation, labels)  # type: ignore[arg-type]
                    self._gauges[name] = gauge
                gauge.set(sample.value, dict(sample.labels))
