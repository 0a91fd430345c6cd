"""``/metrics`` for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.queue.events import Event
from safelight.queue.job import ENDED
from safelight.server.problems import documented


class Metrics(Collector):
    """The metrics: they count events as they happen, and read the queue and the memory for each answer."""

    def __init__(self, control: Services) -> None:
        self._control = control
        self._registry = CollectorRegistry()
        self._ended = Counter("safelight_jobs_ended", "Jobs that ended.", ["state"], registry=self._registry)
        self._images = Counter("safelight_images", "Finished images.", ["model"], registry=self._registry)
        self._seconds = Histogram(
            "safelight_job_seconds",
            "Seconds from the start of a job to its end.",
            registry=self._registry,
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
        )
        self._registry.register(self)
        control.events.subscribe(self._count, ("job", "image"))

    def _count(self, event: Event) -> None:
        if event.kind == "job" and event.data["state"] in ENDED:
            self._ended.labels(event.data["state"]).inc()
            if event.data["started"] is not None:
                self._seconds.observe(event.data["ended"] - event.data["started"])
        elif event.kind == "image":
            self._images.labels(event.data["model"]).inc()

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of this moment."""
        dispatcher = self._control.dispatcher
        jobs = GaugeMetricFamily("safelight_jobs", "Jobs by state.", labels=["state"])
        for state, count in self._control.database.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        switches = CounterMetricFamily("safelight_switches", "Jobs that needed another model.", labels=["slot"])
        restarts = CounterMetricFamily("safelight_worker_restarts", "Replaced workers.", labels=["slot"])
        busy = GaugeMetricFamily("safelight_slot_busy", "Whether a job runs.", labels=["slot"])
        memory = GaugeMetricFamily("safelight_memory_bytes", "Bytes by place and use.", labels=["slot", "place", "use"])
        for slot in dispatcher.slots:
            switches.add_metric([slot.name], slot.switches)
            restarts.add_metric([slot.name], slot.supervisor.restarts)
            busy.add_metric([slot.name], slot.runner.running is not None)
            for place, values in slot.runner.memory.get("places", {}).items():
                for use in ("budget", "stored", "promised", "peak"):
                    memory.add_metric([slot.name, place, use], values[use])
        yield from (switches, restarts, busy, memory)

    def router(self) -> APIRouter:
        """Return the router with the route."""
        routes = APIRouter(tags=["server"])

        @routes.get(
            "/metrics",
            response_class=Response,
            responses={
                **documented(),
                200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus"},
            },
        )
        def metrics() -> Response:
            """Return the metrics in the text form of Prometheus."""
            return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

        return routes
