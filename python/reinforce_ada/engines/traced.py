"""An engine wrapper that writes a Chrome trace: every request in the slot it had, between sampling, weight sync and training.

The file is in the JSON array format of chrome://tracing and ui.perfetto.dev. It is written as events happen, and both read it without its
closing bracket too, so a killed run leaves a trace.
"""

from __future__ import annotations

import heapq
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada.engines.base import Engine
from reinforce_ada.types import Completion, CompletionId, Request

_RUN = "run"  # the process of the trainer's own spans
_WHOLE = "engine"  # the process of an engine that has no replicas


class Trace:
    """Write events to a new file: `path`, or with a number if that exists (a run that is resumed keeps both)."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        with_numbers = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
        self.path = next(free for free in itertools.chain([path], with_numbers) if not free.exists())
        self.clock = clock
        self._began = clock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("xb", buffering=0)  # one write a flush, so a kill leaves whole events
        self._pending: list[str] = []
        self._separator = "[\n"
        self._processes: dict[str, int] = {}
        self._threads: set[tuple[str, int]] = set()

    def complete(self, name: str, began: float, ended: float, *, process: str = _RUN, thread: int = 0, **about: Any) -> None:
        """Record something that lasted, on a line of its process; times are seconds of the clock."""
        place = {"pid": self._process(process), "tid": self._thread(process, thread)}
        times = {"ts": self._us(began), "dur": round((ended - began) * 1e6)}
        self._write({"ph": "X", "name": name, **place, **times, "args": about})

    @contextmanager
    def span(self, name: str, **about: Any) -> Iterator[None]:
        """Record the duration of the body as one of the run's own spans. Spans may be nested."""
        began = self.clock()
        try:
            yield
        finally:
            self.complete(name, began, self.clock(), **about)
            self.flush()

    def count(self, name: str, values: Mapping[str, float]) -> None:
        """Record values as curves over time."""
        self._write({"ph": "C", "name": name, "pid": self._process(_RUN), "ts": self._us(self.clock()), "args": dict(values)})

    def flush(self) -> None:
        """Write all pending events to the file."""
        self._file.write("".join(self._pending).encode())
        self._pending.clear()

    def close(self) -> None:
        """Write the closing bracket, which makes the file complete JSON."""
        self._process(_RUN)
        self._pending.append("\n]\n")
        self.flush()
        self._file.close()

    def _us(self, seconds: float) -> int:
        return round((seconds - self._began) * 1e6)

    def _process(self, name: str) -> int:
        if name not in self._processes:
            self._processes[name] = pid = len(self._processes)
            self._write({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        return self._processes[name]

    def _thread(self, process: str, thread: int) -> int:
        if (process, thread) not in self._threads:
            self._threads.add((process, thread))
            name = "steps" if process == _RUN else f"slot {thread}"
            self._write({"ph": "M", "name": "thread_name", "pid": self._processes[process], "tid": thread, "args": {"name": name}})
        return thread

    def _write(self, event: Mapping[str, Any]) -> None:
        self._pending.append(self._separator + json.dumps(event, separators=(",", ":")))
        self._separator = ",\n"


def no_span(name: str) -> AbstractContextManager[None]:
    """Replace `Trace.span` when there is no trace."""
    return nullcontext()


class _Lines:
    """The lines of one replica; a request takes the first that is free."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._ended: list[float] = []  # when the last request of each line ended

    def take(self, at: float) -> tuple[int, float]:
        """Return a line, and when the request can be shown to begin on it."""
        if self._free:
            line = heapq.heappop(self._free)
            return line, max(at, self._ended[line])
        self._ended.append(at)
        return len(self._ended) - 1, at

    def give_back(self, line: int, at: float) -> None:
        self._ended[line] = at
        heapq.heappush(self._free, line)


@dataclass(slots=True)
class _Flight:
    """A request between submit and its end."""

    submitted: float
    replica: str | None = None  # None while it waits
    line: int = 0
    began: float = 0.0


class TracedEngine(Engine):
    """A wrapper that records every request of its engine: prompt, index, step, tokens, how it ended and how long it waited before."""

    def __init__(self, engine: Engine, trace: Trace) -> None:
        self.engine, self.trace = engine, trace
        self._flights: dict[CompletionId, _Flight] = {}
        self._lines: dict[str, _Lines] = {}

    @property
    def free_slots(self) -> int:
        return self.engine.free_slots

    def submit(self, requests: Sequence[Request]) -> None:
        now = self.trace.clock()
        self.engine.submit(requests)
        self._flights.update((r.id, _Flight(now)) for r in requests)
        if self.engine.placements is None:
            for request in requests:
                self._place(request.id, _WHOLE, now)
        self._read_placements()
        self._count()

    def poll(self) -> list[Completion]:
        completions = self.engine.poll()
        ended = {c.id for c in completions}
        self._read_placements(ended)  # those placed and answered meanwhile; others take slots that have just become free
        for c in completions:
            self._end(c.id, c.finish_reason, tokens=len(c.token_ids), version=c.policy_version)
        self._read_placements()
        if completions:
            self._count()
            self.trace.flush()
        return completions

    def abort(self, ids: Sequence[CompletionId]) -> None:
        self.engine.abort(ids)
        for request_id in ids:
            self._end(request_id, "aborted")
        self._count()

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        with self.trace.span("sync weights", version=policy_version):
            self.engine.sync_weights(named_tensors, policy_version)

    def sleep(self) -> None:
        with self.trace.span("sleep"):
            self.engine.sleep()

    def wake(self) -> None:
        with self.trace.span("wake"):
            self.engine.wake()

    def metrics(self) -> dict[str, float]:
        return self.engine.metrics()

    def close(self) -> None:
        """Close the engine; the owner of the trace closes the trace."""
        self.engine.close()

    # -------------------- requests

    def _read_placements(self, only: Collection[CompletionId] | None = None) -> None:
        placements = self.engine.placements or deque()
        for placement in [placements.popleft() for _ in range(len(placements))]:
            if only is None or placement.id in only:
                self._place(*placement)
            else:
                placements.append(placement)

    def _place(self, request_id: CompletionId, replica: str, at: float) -> None:
        flight = self._flights.get(request_id)
        if flight is None:
            return
        if flight.replica is not None:  # its earlier replica is gone
            self._show(request_id, flight, at, "moved")
        flight.replica = replica
        flight.line, flight.began = self._lines.setdefault(replica, _Lines()).take(at)

    def _end(self, request_id: CompletionId, how: str, **about: Any) -> None:
        flight = self._flights.pop(request_id, None)
        if flight is not None and flight.replica is not None:
            self._show(request_id, flight, self.trace.clock(), how, **about)

    def _show(self, request_id: CompletionId, flight: _Flight, ended: float, how: str, **about: Any) -> None:
        assert flight.replica is not None
        wait_ms = round((flight.began - flight.submitted) * 1e3, 3)
        self._lines[flight.replica].give_back(flight.line, ended)
        known = {"prompt": request_id.prompt_id, "index": request_id.index, "step": request_id.step, "wait_ms": wait_ms, "end": how}
        name = f"{request_id.prompt_id}/{request_id.index}"
        self.trace.complete(name, flight.began, ended, process=flight.replica, thread=flight.line, **known, **about)

    def _count(self) -> None:
        waiting = sum(f.replica is None for f in self._flights.values()) if self.engine.placements is not None else 0
        self.trace.count("requests", {"running": len(self._flights) - waiting, "waiting": waiting})
