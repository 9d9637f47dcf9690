"""Ray actors as replicas of a `Fleet`, each with its own vLLM, on one node or many."""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reinforce_ada.engines.base import Launch
from reinforce_ada.engines.fleet import Down, Fleet, Loaded, News, Refused, Up
from reinforce_ada.errors import InputError, needs
from reinforce_ada.outside import installed_version, one_line
from reinforce_ada.types import Completion, CompletionId, Request

_log = logging.getLogger(__name__)

_TURN_S = 0.05  # an actor answers after this time, or with the first completion
_BEAT_S = 1.0  # between two checks of an actor that has nothing to do
_CONNECT_S, _END_S = 5.0, 10.0
_START_S = 600.0  # for vLLM with a large model from a slow disk
_AHEAD = 2  # calls in flight: the actor continues with the next one while the answer of the last is on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The settings that every actor passes to its `VllmEngine`, and the resources it needs of a node."""

    model: str
    dtype: str
    device: str
    max_tokens: int
    max_model_len: int
    max_num_seqs: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    memory_fraction: float = 0.9  # nothing else is on its GPUs
    kv_cache_bytes: int = 512 << 20
    tensor_parallel: int = 1


class VllmActor:
    """The code that runs in an actor: one call at a time, so that only one thread ever uses the engine."""

    def __init__(self, options: dict[str, Any], replica: int, num_cpus: int) -> None:
        if options["device"] == "cpu":  # otherwise each engine takes all cores of the node
            cores = sorted(os.sched_getaffinity(0))
            own = {cores[(replica * num_cpus + i) % len(cores)] for i in range(num_cpus)}
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(own)))
        self._options = options
        self._engine: Any = None

    def ready(self) -> int:
        """Load the model and return the process id. The constructor does not: Ray passes on its errors as text only."""
        if self._engine is None:
            from reinforce_ada.engines.vllm import VllmEngine

            self._engine = VllmEngine(**self._options)
        return os.getpid()

    def load(self, weights: dict[str, Any], policy_version: int) -> None:
        self._engine.sync_weights(weights.items(), policy_version)

    def turn(self, requests: Sequence[Request], aborted: Sequence[CompletionId]) -> list[Completion]:
        """Take and abort requests, then compute until something finishes, for `_TURN_S` at most."""
        self._engine.abort(aborted)
        if requests:
            self._engine.submit(requests)
        until = time.monotonic() + _TURN_S
        done: list[Completion] = self._engine.poll()
        while not done and self._engine.num_running and time.monotonic() < until:
            done = self._engine.poll()
        return done


class RayReplica:
    """An actor as a replica. A thread here talks to it, and kills it if it does not answer for `hung_after_s`."""

    def __init__(self, number: int, options: Options, resources: dict[str, float], hung_after_s: float) -> None:
        self.name, self.num_slots = f"replica {number}", options.max_num_seqs
        self._number, self._options, self._resources, self._hung_after_s = number, options, resources, hung_after_s
        self._place: Any = None
        self._talk: _Talk | None = None

    def start(self, tell: Callable[[News], None]) -> None:
        """Start a new actor if there is room for it; otherwise it waits for a node that has some."""
        self._end()
        self._talk = _Talk(self._room, self._new_actor, tell, self._hung_after_s)

    def _room(self) -> Any:
        """Return a reference that is ready once a node has room. It is kept over restarts, so that nothing else takes the room."""
        from ray.util.placement_group import placement_group

        if self._place is None:
            self._place = placement_group([self._resources], strategy="STRICT_PACK")
        return self._place.ready()

    def _new_actor(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(VllmActor).options(
            num_cpus=self._resources.get("CPU", 0),
            num_gpus=self._resources.get("GPU", 0),
            max_restarts=0,  # a replacement actor loads the current weights before it takes requests
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._place),
        )
        return actor.remote(asdict(self._options), self._number, int(self._resources.get("CPU", 1)))

    def load(self, weights: Any, policy_version: int) -> None:
        """Send the weights by reference, so that each node fetches them once."""
        self._put(load=(weights, policy_version))

    def submit(self, requests: Sequence[Request]) -> None:
        """Send these with the next turn."""
        self._put(requests=requests)

    def abort(self, ids: Sequence[CompletionId]) -> None:
        """Abort these with the next turn."""
        self._put(aborted=ids)

    def _put(self, **order: Any) -> None:
        assert self._talk is not None
        self._talk.orders.put(order)

    def close(self) -> None:
        """Kill the actor and release its room."""
        self._end()
        if self._place is not None:
            from ray.util.placement_group import remove_placement_group

            with suppress(Exception):
                remove_placement_group(self._place)

    def _end(self) -> None:
        if self._talk is not None:
            self._talk.end()
            self._talk = None


class _Talk:
    """The conversation with one actor, in a thread, until it or the actor ends."""

    def __init__(self, room: Callable[[], Any], new_actor: Callable[[], Any], tell: Callable[[News], None], hung_after_s: float) -> None:
        self._room, self._new_actor, self._tell, self._hung_after_s = room, new_actor, tell, hung_after_s
        self.orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()  # which the actor follows one after another
        self._ended = threading.Event()
        self._actor: Any = None
        self._thread = threading.Thread(target=self._run, name="reinforce-ada-ray", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Kill the actor and tell the fleet nothing more."""
        self._ended.set()
        self.orders.put({})
        self._kill()  # otherwise the thread would wait for its answer
        self._thread.join(_END_S)  # it may wait longer for a cluster that is gone, but it tells nothing any more

    def _kill(self) -> None:
        import ray

        if self._actor is not None:
            with suppress(Exception):
                ray.kill(self._actor)

    def _run(self) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            self._follow(ray)
        except GetTimeoutError:
            self._say(Down(f"has not answered for {self._hung_after_s:g} s"))
        except RayTaskError as e:
            self._say(Refused(str(e.cause)) if isinstance(e.cause, InputError) else Down(one_line(str(e.cause or e)[-300:])))
        except RayActorError:
            self._say(Down("died"))
        except Exception as e:  # a thread that ended silently would keep its requests for ever
            self._say(Down(f"{type(e).__name__}: {one_line(str(e), 200)}"))
        finally:
            self._kill()

    def _say(self, news: News) -> None:
        if not self._ended.is_set():
            self._tell(news)

    def _follow(self, ray: Any) -> None:
        if not self._comes(ray, self._room(), math.inf):  # a node with room may still join
            return
        self._actor = self._new_actor()
        if not self._comes(ray, self._actor.ready.remote(), _START_S):
            self._say(Down(f"has not started in {_START_S:g} s"))
            return
        self._say(Up())
        running: set[CompletionId] = set()
        turns: list[Any] = []
        while not self._ended.is_set():
            load, requests, aborted = self._taken(wait=not running and not turns)
            running.difference_update(aborted)
            running.update(r.id for r in requests)
            if load is not None:
                ray.get([*turns, self._actor.load.remote(*load)], timeout=max(self._hung_after_s, _START_S))
                turns = []
                self._say(Loaded(load[1]))
            turns.append(self._actor.turn.remote(list(requests), list(aborted)))
            if len(turns) < _AHEAD and running:
                continue
            for completion in ray.get(turns.pop(0), timeout=self._hung_after_s):
                running.discard(completion.id)
                # Arrays of its own: those of Ray's store are read-only, about which torch warns.
                arrays = {"token_ids": completion.token_ids.copy(), "rollout_logprobs": completion.rollout_logprobs.copy()}
                self._say(replace(completion, **arrays))

    def _comes(self, ray: Any, reference: Any, limit_s: float) -> bool:
        """Wait for the reference, in short intervals so that the wait can be ended. Raise the error that it holds, if it holds one."""
        until = time.monotonic() + limit_s
        while not ray.wait([reference], timeout=_BEAT_S)[0]:
            if self._ended.is_set() or time.monotonic() > until:
                return False
        ray.get(reference)
        return True

    def _taken(self, *, wait: bool) -> tuple[Any, list[Request], list[CompletionId]]:
        """Merge all queued orders into one. A request that is aborted before it was sent is dropped."""
        load, requests, aborted = None, [], []
        with suppress(queue.Empty):
            order = self.orders.get(timeout=_BEAT_S) if wait else self.orders.get_nowait()
            while True:
                load = order.get("load", load)
                requests += order.get("requests", [])
                for i in order.get("aborted", []):
                    unsent = [r for r in requests if r.id == i]
                    requests = [r for r in requests if r.id != i]
                    aborted += [] if unsent else [i]
                order = self.orders.get_nowait()
        return load, requests, aborted


class RayEngine(Fleet):
    """Actors on a Ray cluster as one engine.

    Args:
        options: settings of each actor's vLLM.
        num_replicas: the most replicas; those for which no node of a cluster has room wait until one joins.
        vocab_size: the size of the model's vocabulary; a token id beyond it is garbage.
        address: the cluster ("auto": the one this node belongs to); "" starts Ray on this machine, which must have room for all.
        cpus: the cores of each replica.
        hung_after_s: an actor that does not answer for this long is killed and replaced.
        give_up_s, say: see `Fleet`.
    Raises: InputError when Ray is not installed, the cluster does not answer or this machine has no room.
    """

    def __init__(
        self,
        options: Options,
        *,
        num_replicas: int,
        vocab_size: int,
        address: str = "",
        cpus: int = 1,
        hung_after_s: float = 60.0,
        give_up_s: float = 600.0,
        say: Callable[[str], None] = _log.info,
    ) -> None:
        if num_replicas < 1 or cpus < 1:
            raise InputError("engine", f"{num_replicas} replicas of {cpus} cores", "at least 1 of each")
        self._is_ours = _connect(address)
        resources = {"CPU": float(cpus)} | ({"GPU": float(options.tensor_parallel)} if options.device == "cuda" else {})
        try:
            _check_room(resources, num_replicas, may_grow=bool(address) or not self._is_ours, say=say)
        except InputError:
            self._leave()
            raise
        replicas = [RayReplica(i, options, resources, hung_after_s) for i in range(num_replicas)]
        super().__init__(
            replicas, publish, max_tokens=options.max_tokens, vocab_size=vocab_size, max_model_len=options.max_model_len,
            give_up_s=give_up_s, say=say,
        )  # fmt: skip

    def close(self) -> None:
        """Kill the actors, and stop Ray if it was started here."""
        super().close()
        self._leave()

    def _leave(self) -> None:
        if self._is_ours:
            import ray

            ray.shutdown()


def publish(named_tensors: Iterable[tuple[str, Any]], _: int) -> Any:
    """Put the weights into the object store and return a reference to them."""
    import ray

    return ray.put({name: t.detach().cpu() for name, t in named_tensors})


def _connect(address: str) -> bool:
    """Connect to Ray, and return whether this call started it."""
    needs("engine", "ray", "--engine vllm needs no cluster")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # avoids a warning about the next version at each start
    import ray

    if ray.is_initialized():
        return False
    try:
        _probe(address)
        ray.init(
            address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True
        )
    except (ConnectionError, RuntimeError, ValueError) as e:
        given = f"no Ray cluster at {address!r}: {one_line(str(e), 200)}"
        raise InputError("engine", given, "a cluster, or no address", "ray start --head starts one") from e
    return True


def _check_room(resources: dict[str, float], num_replicas: int, *, may_grow: bool, say: Callable[[str], None]) -> None:
    """Print what resources there are if they are too few. Raises: InputError if no node can join either."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0) // amount) for name, amount in resources.items()) for node in nodes)
    if room >= num_replicas:
        return
    wanted = f"{num_replicas} replicas with {_in_words(resources)} each"
    there = _in_words(max(({name: node.get(name, 0.0) for name in resources} for node in nodes), key=lambda node: tuple(node.values())))
    if not may_grow:
        raise InputError(
            "engine", f"{wanted}; this machine has {there}", "room for all", "lower --replicas, --cpus-per-replica or --tensor-parallel"
        )
    say(f"engine: {wanted}; {len(nodes)} nodes, the largest with {there}, have room for {room}; the others wait until a node joins")


def _in_words(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _probe(address: str) -> None:
    """Raise ConnectionError if nothing listens at the address; Ray itself would try for minutes."""
    if found := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_S).close()
        except OSError as e:
            raise ConnectionError(str(e)) from e


def launch(run: Launch) -> RayEngine:
    """Return the engine of a run."""
    e = run.settings
    model = str(Path(run.path).resolve()) if Path(run.path).exists() else run.path  # a worker runs in a folder of its own
    options = Options(model=model, dtype=run.dtype, device=run.device, tensor_parallel=e.tensor_parallel, **run.limits)
    engine = RayEngine(
        options, num_replicas=e.replicas, vocab_size=run.vocab_size, address=e.ray_address, cpus=e.cpus_per_replica,
        hung_after_s=e.hung_after_s, give_up_s=e.give_up_s, say=run.say,
    )  # fmt: skip
    run.say(f"engine: {e.replicas} vLLM replicas on Ray {installed_version('ray')}")
    return engine
