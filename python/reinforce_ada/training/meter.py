"""The metrics of an engine per step: counts as differences, loads as means over time."""

from __future__ import annotations

import time
from collections.abc import Callable

from reinforce_ada.engines.base import Engine

# Momentary values, averaged over the time of a step. Rates are shown as they stand at its end; everything else counts up.
LOADS = ("engine_busy_slots", "engine_queue", "engine_slots", "engine_replicas")
# An engine in this process takes a step in milliseconds; a look at each would cost more than it tells.
_LOOK_EVERY_S = 0.05


class EngineMeter:
    """Reads the `metrics` of an engine, around and during each step."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self.start()

    def start(self) -> None:
        self._before = self._last = self._engine.metrics()
        self._began = self._looked = self._clock()
        self._areas = dict.fromkeys(LOADS, 0.0)  # integrals of the loads over time

    def look(self) -> dict[str, float]:
        """Return the engine's current metrics. Called often, so that loads are sampled."""
        now = self._clock()
        if now - self._looked >= _LOOK_EVERY_S:
            self._advance(now)
        return self._last

    def step(self) -> dict[str, float]:
        """Return the metrics of the step that `start` began; nothing for an engine without metrics."""
        now = self._clock()
        self._advance(now)
        elapsed = now - self._began
        numbers: dict[str, float] = {}
        for name, value in self._last.items():
            if name in LOADS:
                numbers[name] = self._areas[name] / elapsed if elapsed > 0 else value
            else:
                numbers[name] = value if name.endswith("_rate") else value - self._before.get(name, 0.0)
        return numbers

    def _advance(self, now: float) -> None:
        current = self._engine.metrics()
        for name in LOADS:
            mean = (self._last.get(name, 0.0) + current.get(name, 0.0)) / 2
            self._areas[name] += mean * (now - self._looked)
        self._last, self._looked = current, now
