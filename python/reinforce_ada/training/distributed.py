"""Train one model in several processes, as `torchrun` starts them. Rank 0 samples, decides and writes; the others train on what it sends.

The ranks have their own process group, since an engine in the process of rank 0 may make torch's default one.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as torch_distributed

from reinforce_ada.errors import InputError

T = TypeVar("T")
dist: Any = torch_distributed  # torch.distributed does not export by name everything that it documents

_ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHED = "TORCHELASTIC_RUN_ID"
_PR_SET_PDEATHSIG = 1
_MEET = timedelta(minutes=5)
_LONGEST_SHARE = timedelta(minutes=30)  # of one minibatch, or of loading the model: a rank that takes longer counts as hung
# The others wait in a receive while rank 0 samples. If a process dies, the wait ends at once.
_LONGEST_STEP = timedelta(days=7)


class RankError(InputError):
    """A rank failed or is gone; all others end too."""

    def __init__(self, what: str) -> None:
        super().__init__("train", what, "every rank must run", "what was scored is kept: --resume goes on")


class Ranks:
    """This process among all ranks; the only one by default.

    Objects go through rank 0 one by one, so that a process that is gone can be named. Tensors are summed by gloo, on a GPU by nccl.

    Args:
        group: the group of all ranks for objects and CPU tensors.
        on_device: the group of all ranks for tensors on a GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, on_device: Any = None) -> None:
        self.rank, self.size = rank, size
        self.is_ending = False  # another rank is lost, or this one was told to end
        self._group, self._on_device = group, on_device

    # -------------------- objects

    def send(self, orders: Sequence[Any]) -> None:
        """Send one object to each other rank, from rank 0."""
        for rank in range(1, self.size):
            self._put(orders[rank], rank)

    def receive(self) -> Any:
        """Return what rank 0 sent to this rank."""
        return self._take(0)

    def exchange(self, mine: T) -> list[T]:
        """Return the values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [mine]
        if self.rank:
            self._put(mine, 0)
            everything: list[T] = self._take(0)
            return everything
        everything = [mine, *(self._take(rank) for rank in range(1, self.size))]
        self.send([everything] * self.size)
        return everything

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of `work` once every rank has succeeded. Raises: RankError when it failed on one; on rank 0 its own error."""
        if self.size == 1:
            return work()
        try:
            result = work()
        except Exception as e:
            self.is_ending = True
            trouble = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            self.exchange(trouble)
            if self.rank == 0:
                raise
            with suppress(RankError):  # until rank 0 has reported it and is gone: the launcher would end it with this process
                self.receive()
            raise RankError(f"rank {self.rank} failed: {trouble}") from e
        for rank, trouble in enumerate(self.exchange("")):
            if trouble:
                self.is_ending = True
                raise RankError(f"rank {rank} failed: {trouble}")
        return result

    def _put(self, what: Any, rank: int) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(what)), dtype=torch.uint8)
        with self._naming(rank):
            self._group.send([torch.tensor([data.numel()])], rank, 0).wait()
            self._group.send([data], rank, 0).wait()

    def _take(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        patience = _LONGEST_STEP if self.rank else _LONGEST_SHARE
        with self._naming(rank):
            self._group.recv([size], rank, 0).wait(patience)
            data = torch.empty(int(size), dtype=torch.uint8)
            self._group.recv([data], rank, 0).wait()
        return pickle.loads(data.numpy().tobytes())

    # -------------------- tensors

    def add_up(self, tensor: Tensor) -> None:
        """Sum the tensor over all ranks, in place."""
        if self.size > 1:
            with self._naming(None):
                self._of(tensor).allreduce([tensor]).wait()

    def copy_from_first(self, tensor: Tensor) -> None:
        """Replace the tensor by that of rank 0, in place."""
        if self.size > 1:
            with self._naming(None):
                self._of(tensor).broadcast([tensor]).wait()

    def _of(self, tensor: Tensor) -> Any:
        return self._on_device if tensor.is_cuda and self._on_device is not None else self._group

    @contextmanager
    def _naming(self, rank: int | None) -> Iterator[None]:
        """Raise RankError naming the rank: a broken connection means that it is gone, a silent one that it hangs."""
        try:
            yield
        except RuntimeError as e:
            self.is_ending = True
            what = "does not answer" if "timed out" in str(e).lower() else "is gone"
            raise RankError(f"{'another rank' if rank is None else f'rank {rank}'} {what}") from e


@contextmanager
def join() -> Iterator[Ranks]:
    """Join the ranks that a launcher such as torchrun has started, by its environment; without one, this process is alone.

    The others are released when rank 0 leaves. Raises: InputError for an incomplete environment, or if ranks do not join.
    """
    size = world_size()
    if _LAUNCHED in os.environ:  # a killed launcher cannot end this process, so the kernel sends its signal instead
        with suppress(AttributeError, OSError):  # Linux only
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    _check_environment(size)
    if size == 1:
        yield Ranks()
        return
    given = f"WORLD_SIZE={size}"
    if absent := [name for name in _ENVIRONMENT if name not in os.environ]:
        raise InputError("train", f"{given} without {', '.join(absent)}", "all that torchrun sets", "torchrun -m reinforce_ada train ...")
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_MEET))
        store = dist.PrefixStore("reinforce_ada", store)
        ranks = Ranks(rank, size, dist.ProcessGroupGloo(store, rank, size, _LONGEST_SHARE), _nccl(store, rank, size))
    except (RuntimeError, ValueError) as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError("train", f"{given}: the ranks do not meet at {where}: {' '.join(str(e).split())[:200]}", "all of them") from e
    if rank:
        yield ranks
        return

    def interrupt(*_: Any) -> None:
        # A launcher that has seen a rank die sends SIGTERM to the others; it must not disturb a rank that is already ending for that.
        if not ranks.is_ending:
            ranks.is_ending = True
            raise KeyboardInterrupt("by SIGTERM: another rank has ended, or the launcher was stopped")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield ranks
        with suppress(RankError):  # a rank that is gone by now has nothing left to do
            ranks.send([None] * size)
    finally:
        if not ranks.is_ending:
            signal.signal(signal.SIGTERM, before)


def world_size() -> int:
    """Return how many processes the launcher has started; 1 without one. Raises: InputError for an incomplete environment of a launcher."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        if given := [f"{name}={os.environ[name]}" for name in ("RANK", "LOCAL_RANK") if name in os.environ]:
            raise InputError("train", f"{' '.join(given)} without WORLD_SIZE", "all that torchrun sets, or none of it", f"unset {given[0]}")
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise InputError("train", f"WORLD_SIZE={text}", "the number of processes, as torchrun sets it")
    return int(text)


def _check_environment(size: int) -> None:
    """Raise InputError for a variable of the launcher that is not a number, or out of its range."""
    for name, most in (("RANK", size - 1), ("LOCAL_RANK", size - 1), ("MASTER_PORT", 65535)):
        text = os.environ.get(name)
        if text is not None and not (text.isdecimal() and int(text) <= most):
            raise InputError("train", f"{name}={text[:80]} with WORLD_SIZE={size}", f"a number up to {most}, as torchrun sets it")


def local_device(kind: str) -> torch.device:
    """Return the device of this process among those of its machine. Raises: InputError if there are more processes than GPUs."""
    if kind != "cuda" or world_size() == 1:
        return torch.device(kind)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        given = f"process {index} on a machine with {torch.cuda.device_count()} GPUs"
        raise InputError("train", given, "a GPU for each process", "torchrun --nproc-per-node N")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _nccl(store: Any, rank: int, size: int) -> Any:
    """Return the group for tensors on GPUs; None without a GPU or nccl."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, dist.ProcessGroupNCCL.Options())
