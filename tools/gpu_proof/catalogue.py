"""Every GPU kernel, what its machine code must look like, and which of its compilations the tests look at.

The Triton entries are the launches that `calls.py` leads to (see `launches.py`), the CUDA ones what the compiler finds in csrc. What is
written here by hand is what cannot be read off either: what a kernel is for, and the limits that its machine code has to keep.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from gpu_proof import launches
from gpu_proof.launches import OPS, Launch
from gpu_proof.machine_code import Facts
from gpu_proof.nvcc import Entry
from gpu_proof.targets import TARGETS, TRITON_TARGETS

__all__ = [
    "CUDA_KERNELS",
    "DTYPES",
    "TRITON_KERNELS",
    "Kernel",
    "Variant",
    "cuda_kernel",
    "cuda_verdicts",
    "due",
    "entries",
    "entry_kernels",
    "quick",
    "verdicts",
]

DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one kernel has to be.

    Args:
        does: in one line.
        warps: how many must be resident on a multiprocessor at least, of 64 on NVIDIA's data-centre parts.
        amd_warps: the same of a compute unit's 32 wavefronts.
        streams_in: arguments (a pointer, and the stride of its rows) which, where all are divisible by 16, must be read 16 bytes at once;
            empty for a kernel that reads nothing that lies together.
        streams_out: the same for what it writes.
        dots: whether it multiplies matrices.
        neighbours: elements of a stream that lie together in a thread; with 4 of them 16-bit streams come 8 bytes at once.
    """

    does: str
    warps: int
    amd_warps: int = 0
    streams_in: tuple[str, ...] = ()
    streams_out: tuple[str, ...] = ()
    dots: bool = False
    neighbours: int = 8

    @property
    def streams(self) -> tuple[str, ...]:
        return (*self.streams_in, *self.streams_out)


_HIDDEN = ("hidden", "hidden_stride", "width")
_WEIGHT = ("weight", "weight_stride", "width")
_DZ = ("dz", "dz_stride", "num_columns")
TRITON_KERNELS: dict[str, dict[str, Kernel]] = {
    "token_logprobs": {
        "forward_kernel": Kernel("one sweep over each row", 16, 8, ("logits", "row_stride")),
        "gradient_kernel": Kernel("the gradient of each row", 24, 16, ("logits", "row_stride"), ("grad", "grad_stride")),
    },
    "group_advantages": {
        "survey_kernel": Kernel("moments of all rewards, and whether offsets are right", 16, 8),
        "settle_kernel": Kernel("one program: the divisor of all advantages", 16, 8),
        "rows_kernel": Kernel("a program for each group: its moments, then its advantages", 16, 8),
    },
    "policy_loss": {
        "sequences_kernel": Kernel("what is counted and summed of each sequence", 16, 8),
        "totals_kernel": Kernel("one program: what a token counts for", 32, 16),
        "through_kernel": Kernel("the derivative in the mean log-ratio of each sequence", 16, 8),
        "tokens_kernel": Kernel("gradients, and sums of each 512 tokens", 16, 8, ("logprobs",), ("grad",), neighbours=4),
        "finish_kernel": Kernel("one program: the value and the metrics", 8, 4),
    },
    "linear_token_logprobs": {
        "partial_scores": Kernel("logits tile by tile, scored as they come", 8, 4, (*_HIDDEN, *_WEIGHT), dots=True),
        "combined_scores": Kernel("the scores of all parts of the vocabulary", 32, 16),
        "logits_gradient": Kernel(
            "logits again, and their gradient", 8, 4, (*_HIDDEN, *_WEIGHT), ("dz", "dz_stride", "num_columns"), dots=True
        ),
        "bias_gradient": Kernel("sums over blocks of tokens", 32, 16),
        "weight_gradient": Kernel("dz^T hidden", 8, 4, (*_DZ, *_HIDDEN), ("grad_weight", "width"), dots=True),
        "hidden_gradient": Kernel("dz weight", 8, 4, (*_DZ, *_WEIGHT), ("grad_hidden", "width"), dots=True),
    },
}
CUDA_KERNELS: dict[str, dict[str, Kernel]] = {
    "token_logprobs": {
        "token_logprobs_forward": Kernel("one sweep over each row", 32, streams_in=("logits",)),
        "token_logprobs_gradient": Kernel("the gradient of each row", 24, streams_in=("logits",), streams_out=("grad",)),
    },
    "group_advantages": {
        "group_advantages_survey": Kernel("moments of all rewards, and whether offsets are right", 40),
        "group_advantages_settle": Kernel("one block: the divisor of all advantages", 40),
        "group_advantages_rows": Kernel("a warp for each group: its moments, then its advantages", 32),
    },
    "policy_loss": {
        "policy_loss_sequences": Kernel("what is counted and summed of each sequence", 24, streams_in=("logprobs",)),
        "policy_loss_totals": Kernel("one block: what a token counts for", 32),
        "policy_loss_through": Kernel("the derivative in the mean log-ratio of each sequence", 16, streams_in=("logprobs",)),
        "policy_loss_tokens": Kernel("gradients, and sums of each 2048 tokens", 16, streams_in=("logprobs",), streams_out=("grad",)),
        "policy_loss_finish": Kernel("one block: the value and the metrics", 17),
    },
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation: an entry of the catalogue for one target."""

    launch: Launch
    target: str

    @property
    def op(self) -> str:
        return self.launch.module.split(".")[2]

    @property
    def kernel(self) -> Kernel:
        """Raises KeyError for a kernel that the catalogue lacks."""
        return TRITON_KERNELS[self.op][self.launch.kernel]

    def __str__(self) -> str:
        return f"{self.op}-{self.target}-{self.launch.label}"


@cache
def entries() -> tuple[Variant, ...]:
    """What is compiled, for every target.

    The launches of one kernel differ in flags, in dtype, in blocks, and in what Triton knows to be divisible by 16. Of each dtype and
    block, once with all divisible that can be and once with as little as possible, the barest and the fullest code is taken; on sm_90 in
    one dtype also as many in between as it takes for every two flags to occur in all ways they do together.
    """
    chosen: list[Variant] = []
    for target in TRITON_TARGETS:
        groups: dict[tuple[str, str, str, Any], list[Variant]] = {}
        for launch in launches.recorded(TARGETS[target].backend):
            variant = Variant(launch, target)
            blocks = tuple((name, value) for name, value in launch.constants.items() if name in launches.BLOCKS | launches.TILES)
            groups.setdefault((variant.op, launch.kernel, due(variant)[0], blocks), []).append(variant)
        covered = {(op, kernel): dtype for op, kernel, dtype, _ in sorted(groups, key=lambda place: place[2] != "fp32")}
        for (op, kernel, dtype, _), group in groups.items():
            by_code: dict[str, list[Variant]] = {}
            for variant in sorted(group, key=lambda v: (_divisible(v.launch, v.kernel.streams), len(v.launch.attributes))):
                by_code.setdefault(variant.launch.code, []).append(variant)
            codes = sorted(by_code.values(), key=lambda same: same[0].launch.fullness)
            covering = _covering(codes) if target == "sm_90" and dtype == covered[op, kernel] else [codes[0], codes[-1]]
            chosen += dict.fromkeys(one for same in covering for one in (same[-1], same[0]))
    return tuple(chosen)


def _covering(codes: list[list[Variant]]) -> list[list[Variant]]:
    """Some of the codes, the barest and the fullest first: every pair of flags occurs with every pair of values it has in any."""
    pairs = {id(code): frozenset(combinations(code[0].launch.flags, 2)) for code in codes}
    taken = [codes[0], codes[-1]]
    left = frozenset[Any]().union(*pairs.values()) - frozenset[Any]().union(*(pairs[id(code)] for code in taken))
    while left:
        best = max(codes, key=lambda code: len(pairs[id(code)] & left))
        taken.append(best)
        left -= pairs[id(best)]
    return taken


@cache
def quick() -> frozenset[Variant]:
    """What the default run compiles: the fullest code of each kernel where its streams are aligned, on sm_90 in each dtype, elsewhere in
    bfloat16; on sm_90 also where they are not, in bfloat16."""
    fullest: dict[tuple[object, ...], Variant] = {}
    for variant in entries():
        dtype, launch = due(variant)[0], variant.launch
        aligned = _divisible(launch, variant.kernel.streams)
        if (aligned and (variant.target == "sm_90" or dtype != "fp16")) or (variant.target == "sm_90" and dtype == "bf16"):
            place = (variant.op, launch.kernel, variant.target, dtype, aligned)
            if place not in fullest or _rank(variant) > _rank(fullest[place]):
                fullest[place] = variant
    return frozenset(
        v for place, v in fullest.items() if place[2] == "sm_90" or place[3] == "bf16" or (*place[:3], "bf16", True) not in fullest
    )


def _rank(variant: Variant) -> tuple[int, bool]:
    """How much is on; between equals, whether the streams are not divisible by 16."""
    return variant.launch.fullness, not _divisible(variant.launch, variant.kernel.streams)


def _divisible(launch: Launch, names: Iterable[str]) -> bool:
    """Whether Triton was told that each of these arguments is a multiple of 16."""
    return set(names) <= launch.divisible


def entry_kernels() -> dict[str, set[str]]:
    """The @triton.jit functions of each operator that no other one calls, read from the sources."""
    jitted: dict[str, set[str]] = {}
    called: set[str] = set()
    for file in sorted(OPS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(_is_jit(decorator) for decorator in node.decorator_list):
                jitted.setdefault(_owner(file), set()).add(node.name)
                called |= {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
                called |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} - {node.name}  # handed on: tl.reduce(f)
    return {op: found - called for op, found in jitted.items() if found - called}


def _owner(file: Path) -> str:
    return file.relative_to(OPS).parts[0].removesuffix(".py")


def _is_jit(decorator: ast.expr) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(target, ast.Attribute) and target.attr == "jit"


def due(variant: Variant) -> tuple[str, bool, bool]:
    """(dtype of the factors and streams, whether reads of 16 bytes are due, whether writes are)."""
    kernel, launch = variant.kernel, variant.launch
    wide_in, wide_out = (bool(names) and _divisible(launch, names) for names in (kernel.streams_in, kernel.streams_out))
    kinds = [kind.removeprefix("*") for kind in launch.kinds.values()]
    return next((kind for kind in kinds if kind in ("fp16", "bf16")), "fp32"), wide_in, wide_out


def shown_dtypes(variant: Variant) -> tuple[str, ...]:
    """The dtypes whose line in the documentation a compilation belongs to: its own, or those of the calls where it sees none of them."""
    own = due(variant)[0]
    return (own,) if own != "fp32" else tuple(variant.launch.dtypes)


def verdicts(kernel: Kernel, target_name: str, facts: Facts, dtype: str, wide_in: bool, wide_out: bool) -> Iterator[tuple[str, bool, str]]:
    """(check, whether it holds, what was found) for one compiled kernel; `wide_in` and `wide_out` where 16-byte accesses are due."""
    target = TARGETS[target_name]
    amd = target.backend == "hip"
    needed = kernel.amd_warps if amd else min(kernel.warps, kernel.warps * target.max_warps // 64)
    resident = target.warps(facts.warps, facts.registers, facts.shared_bytes)
    yield "no spills", facts.spills == 0, f"{facts.spills} spills"
    yield "no local memory", facts.local_bytes == 0, f"{facts.local_bytes} bytes a thread"
    yield "registers", facts.registers <= target.max_registers, f"{facts.registers}"
    yield "shared memory", facts.shared_bytes <= target.block_shared_bytes, f"{facts.shared_bytes} of {target.block_shared_bytes} bytes"
    yield f"{needed} warps", resident >= needed, f"{resident} of {target.max_warps} warps"
    yield "no atomics", facts.atomics == 0, f"{facts.atomics} atomics"
    generic = facts.loads.get("generic", 0) + facts.stores.get("generic", 0)
    yield "global accesses", generic == 0, f"{generic} accesses of unknown memory"
    at_once = min(16, kernel.neighbours * (4 if dtype == "fp32" else 2))
    if wide_in:
        yield f"{at_once}-byte loads", _wide(facts.loads, at_once), f"by bits {facts.loads}"
    if wide_out:
        # From the registers that AMD's matrix units leave 16-bit results in, Triton stores 4 of them at once.
        stored = 8 if amd and kernel.dots and dtype != "fp32" else at_once
        yield f"{stored}-byte stores", _wide(facts.stores, stored), f"by bits {facts.stores}"
    if kernel.dots and dtype in ("fp16", "bf16"):
        yield "tensor cores", sum(facts.matrix.values()) > 0, f"matrix instructions {facts.matrix}"
    if kernel.dots and dtype == "fp32":
        # AMD's matrix units multiply whole fp32; NVIDIA's would round the factors to 10 bits.
        exact = all(name.endswith("_f32") and "xf32" not in name and name.count("f32") == 2 for name in facts.matrix)
        yield (
            "fp32 products",
            (exact and bool(facts.matrix or facts.fma)) if amd else (not facts.matrix and facts.fma > 0),
            (f"matrix instructions {facts.matrix}, {facts.fma} multiply-adds"),
        )
    if not kernel.dots:
        yield "no tensor cores", not facts.matrix, f"matrix instructions {facts.matrix}"


def _wide(widths: dict[str, int], at_once: int) -> bool:
    return any(bits in widths for bits in ("64", "128", "256", "tma") if not bits.isdigit() or int(bits) >= 8 * at_once)


# -------------------- CUDA C++

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def cuda_kernel(op: str, entry: str) -> tuple[str, str]:
    """(kernel, dtype) of an entry point: token_logprobs_forward_bfloat16_moments is token_logprobs_forward in bf16."""
    name = max((name for name in CUDA_KERNELS.get(op, {}) if f"{entry}_".startswith(f"{name}_")), key=len, default="")
    assert name, f"{entry} is of no kernel in CUDA_KERNELS[{op!r}]: say there what it must be"
    return name, next((short for word, short in _TYPES.items() if word in entry.split("_")), "any")


def cuda_verdicts(op: str, entry: Entry, target_name: str) -> Iterator[tuple[str, bool, str]]:
    """As `verdicts`, for an entry point of a CUDA source: 16 bytes at once are always due, since its code looks at addresses itself."""
    name, dtype = cuda_kernel(op, entry.name)
    kernel = CUDA_KERNELS[op][name]
    yield "launch bounds", entry.threads > 0, f"{entry.threads} threads"
    yield "no stack", entry.stack_bytes == 0 and entry.spill_bytes == 0, f"{entry.stack_bytes} of stack, {entry.spill_bytes} spilled"
    yield from verdicts(kernel, target_name, entry.facts, dtype, bool(kernel.streams_in), bool(kernel.streams_out))
