"""Compiles every GPU kernel for every target, writes what was found to benchmarks/gpu_static.json, and the tables of docs/gpu.md from it;
`make gpu-docs` calls it. Needs no GPU. With `--render` only the tables are written, from the facts there are."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from gpu_proof import HERE, ROOT, catalogue, nvcc
from gpu_proof.aot import compile_all
from gpu_proof.machine_code import Facts
from gpu_proof.targets import NVCC_TARGETS, TARGETS, TRITON_TARGETS

FACTS = ROOT / "benchmarks/gpu_static.json"
PAGE = ROOT / "docs/gpu.md"


# -------------------- facts


def sources() -> str:
    """Changes when anything does that the machine code or its checks come from; not when only comments or line breaks do."""
    found = hashlib.sha256()
    python = [path for path in sorted((ROOT / "python/reinforce_ada/ops").rglob("*.py")) if "@triton.jit" in path.read_text()]
    python += [HERE / name for name in ("calls.py", "catalogue.py", "machine_code.py", "targets.py", "nvcc.py", "aot.py")]
    for path in python:
        found.update(meaning(ast.parse(path.read_text())).encode())
    for path in sorted((ROOT / "csrc").rglob("*.cu*")):
        found.update(re.sub(r"//[^\n]*|\s+", " ", path.read_text()).encode())
    return found.hexdigest()


def meaning(tree: ast.Module) -> str:
    """The code without positions and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@dataclass(slots=True)
class Row:
    """One kernel in one dtype on one target, over all its compilations: the most of each number, the fewest warps."""

    form: str
    op: str
    kernel: str
    dtype: str
    target: str
    compiled: int
    threads: list[int]
    registers: int
    shared_bytes: int
    local_bytes: int
    spills: int
    resident_warps: int
    code_bytes: int
    instructions: int
    loads: dict[str, int]
    stores: dict[str, int]
    matrix: dict[str, int]
    fma: int
    barriers: int
    checks: list[str]  # that hold wherever they apply
    failed: list[str]


Found = tuple[Facts, list[tuple[str, bool, str]]]


def row(form: str, op: str, kernel: str, dtype: str, target_name: str, found: list[Found]) -> Row:
    """Puts the compilations of one row together."""
    target = TARGETS[target_name]
    all_facts = [facts for facts, _ in found]

    def most(field: str) -> Any:
        return max(getattr(facts, field) for facts in all_facts)

    def widest(field: str) -> dict[str, int]:
        keys = sorted({key for facts in all_facts for key in getattr(facts, field)}, key=lambda key: (len(key), key))
        return {key: max(getattr(facts, field).get(key, 0) for facts in all_facts) for key in keys}

    failed = sorted({check for _, checks in found for check, holds, _ in checks if not holds})
    return Row(
        form=form,
        op=op,
        kernel=kernel,
        dtype=dtype,
        target=target_name,
        compiled=len(found),
        threads=sorted({facts.warps * target.warp_size for facts in all_facts}),
        registers=most("registers"),
        shared_bytes=most("shared_bytes"),
        local_bytes=most("local_bytes"),
        spills=most("spills"),
        resident_warps=min(target.warps(facts.warps, facts.registers, facts.shared_bytes) for facts in all_facts),
        code_bytes=most("code_bytes"),
        instructions=most("instructions"),
        loads=widest("loads"),
        stores=widest("stores"),
        matrix=widest("matrix"),
        fma=most("fma"),
        barriers=most("barriers"),
        checks=list(dict.fromkeys(check for _, checks in found for check, _, _ in checks if check not in failed)),
        failed=failed,
    )


def expected() -> set[tuple[str, str, str, str, str]]:
    """(form, op, kernel, dtype, target) of every row there has to be."""
    triton = {("triton", v.op, v.launch.kernel, dtype, v.target) for v in catalogue.entries() for dtype in catalogue.shown_dtypes(v)}
    cuda = {
        ("cuda", source.parent.name, *catalogue.cuda_kernel(source.parent.name, entry), target)
        for source in nvcc.SOURCES
        for entry in nvcc.entry_points(source)
        for target in NVCC_TARGETS
    }
    return triton | cuda


def measure() -> dict[str, Any]:
    """Compiles everything. Raises where something does not compile; a check that fails is written down."""
    found: dict[tuple[str, str, str, str, str], list[Found]] = {}
    variants = catalogue.entries()
    results = compile_all((v.launch, v.target) for v in variants)
    for variant, (_, facts) in zip(variants, results, strict=True):
        assert isinstance(facts, Facts), f"{variant} does not compile: {facts}"
        checks = list(catalogue.verdicts(variant.kernel, variant.target, facts, *catalogue.due(variant)))
        for dtype in catalogue.shown_dtypes(variant):
            found.setdefault(("triton", variant.op, variant.launch.kernel, dtype, variant.target), []).append((facts, checks))
    nvcc.warm([(source, target) for source in nvcc.SOURCES for target in NVCC_TARGETS])
    for source in nvcc.SOURCES:
        op = source.parent.name
        for target in NVCC_TARGETS:
            unit = nvcc.compile_unit(source, target)
            assert not unit.failed, unit.messages
            for entry in unit.entries:
                checks = list(catalogue.cuda_verdicts(op, entry, target))
                found.setdefault(("cuda", op, *catalogue.cuda_kernel(op, entry.name), target), []).append((entry.facts, checks))
    rows = [row(*key, results) for key, results in sorted(found.items(), key=_order)]
    return {"sources": sources(), "tools": tools(), "kernels": [asdict(r) for r in rows]}


def _order(item: tuple[tuple[str, str, str, str, str], object]) -> tuple[Any, ...]:
    form, op, kernel, dtype, target = item[0]
    kernels = (catalogue.TRITON_KERNELS if form == "triton" else catalogue.CUDA_KERNELS)[op]
    return form != "triton", op, list(kernels).index(kernel), dtype, list(TARGETS).index(target)


def tools() -> dict[str, str]:
    """What compiled."""
    import triton

    compiler = nvcc.nvcc()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", version)
    return {"triton": triton.__version__, "nvcc": release.group(1) if release else version}


# -------------------- floors


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    bytes_per_s: float
    flop_per_s: float  # dense bfloat16


DEVICES = (Device("H100 SXM", 3.35e12, 989e12), Device("H200", 4.8e12, 989e12))


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of an operator: what it has to read and to write once, and what it has to multiply."""

    name: str
    formula: str
    shape: str
    bytes: float
    work: str = ""
    flop: float = 0

    def floor_s(self, device: Device) -> float:
        return max(self.bytes / device.bytes_per_s, self.flop / device.flop_per_s)


T, V, D, N, G = 8192, 151936, 4096, 1 << 22, 1 << 19
_LOGITS = f"T = {T}, V = {V}, bf16"
_HEAD = f"T = {T}, D = {D}, V = {V}, bf16"
_FACTORS = 2 * (T * D + V * D)
PASSES = (
    Pass("token_logprobs forward", "2 T V + 8 T (ids) + 12 T", _LOGITS, 2 * T * V + 20 * T),
    Pass("token_logprobs forward, entropy and sum_p2", "2 T V + 8 T + 20 T", _LOGITS, 2 * T * V + 28 * T),
    Pass("token_logprobs gradient", "2 T V + 2 T V + 20 T", _LOGITS, 4 * T * V + 20 * T),
    Pass("group_advantages, cu_seqlens", "4 N + 8 (G + 1) + 4 N", f"N = {N}, G = {G}, fp32", 8 * N + 8 * (G + 1)),
    Pass("group_advantages, pool statistics", "4 N + 8 (G + 1) + 40 G + 4 N", f"N = {N}, G = {G}, fp32", 8 * N + 8 * (G + 1) + 40 * G),
    Pass(
        "policy_loss: ppo",
        "4 T (logprobs) + 4 T (old) + T (mask) + 4 T (gradient) + 12 N",
        f"T = {1 << 23}, N = 1024, fp32",
        13 * (1 << 23) + 12 * 1024,
    ),
    Pass(
        "policy_loss: ppo, correction, KL",
        "the same + 4 T (rollout) + 4 T (ref)",
        f"T = {1 << 23}, N = 1024, fp32",
        21 * (1 << 23) + 12 * 1024,
    ),
    Pass("linear_token_logprobs forward", "2 T D + 2 V D + 20 T", _HEAD, _FACTORS + 20 * T, "2 T V D", 2 * T * V * D),
    Pass("linear_token_logprobs backward", "2 (2 T D + 2 V D) + 20 T", _HEAD, 2 * _FACTORS + 20 * T, "3 · 2 T V D", 6 * T * V * D),
    Pass("linear_policy_loss", "3 (2 T D + 2 V D) + 40 T", _HEAD, 3 * _FACTORS + 40 * T, "4 · 2 T V D", 8 * T * V * D),
)


# -------------------- the page


def floors() -> str:
    """A table of `PASSES`."""
    header = ["pass", "bytes", "multiplications and additions", "for", "GB", *(device.name for device in DEVICES)]
    rows = [
        [p.name, p.formula, p.work or "–", p.shape, f"{p.bytes / 1e9:.3f}", *(_time(p.floor_s(device)) for device in DEVICES)]
        for p in PASSES
    ]
    return table(header, rows)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def kernels(facts: dict[str, Any], form: str) -> str:
    """A table for each operator of a form: a line for each kernel and dtype, a column for each target."""
    targets = TRITON_TARGETS if form == "triton" else NVCC_TARGETS
    described = catalogue.TRITON_KERNELS if form == "triton" else catalogue.CUDA_KERNELS
    held = [found["checks"] for found in facts["kernels"] if found["form"] == form]
    common = set.intersection(*map(set, held))
    text = [f"On every line held: {', '.join(check for check in held[0] if check in common)}.\n"]
    for op, kernels_of_op in described.items():
        text.append(f"#### {op}\n")
        text += [f"- `{name}`: {kernel.does}." for name, kernel in kernels_of_op.items()]
        lines: dict[tuple[str, str], dict[str, Row]] = {}
        for found in facts["kernels"]:
            if found["form"] == form and found["op"] == op:
                lines.setdefault((found["kernel"], found["dtype"]), {})[found["target"]] = Row(**found)
        rows = [
            [f"`{kernel}`", dtype, *(_cell(cells[t]) for t in targets), _checks(cells.values(), common)]
            for (kernel, dtype), cells in lines.items()
        ]
        text.append("\n" + table(["kernel", "dtype", *targets, "also checked, and held"], rows) + "\n")
    return "\n".join(text)


def _cell(found: Row) -> str:
    shared = f", {_size(found.shared_bytes)}" if found.shared_bytes else ""
    numbers = f"{found.registers} reg{shared}, {found.resident_warps}/{TARGETS[found.target].max_warps} warps"
    return numbers + (f" **fails: {', '.join(found.failed)}**" if found.failed else "")


def _size(count: int) -> str:
    return f"{count} B" if count < 1024 else f"{count / 1024:.3g} KB"


def _checks(rows: Iterable[Row], common: set[str]) -> str:
    """What held on every target, but for the common checks; a check of some targets only is named with them."""
    rows = list(rows)
    names = dict.fromkeys(check for found in rows for check in found.checks if check not in common)
    shown = []
    for name in names:
        where = [found.target for found in rows if name in found.checks]
        shown.append(name if len(where) == len(rows) else f"{name} ({', '.join(where)})")
    return ", ".join(shown)


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def limits() -> str:
    """What occupancy is computed from."""
    header = ["target", "devices", "warps", "blocks", "32-bit registers", "shared memory", "of one block"]
    rows = [
        [
            t.name,
            t.device,
            f"{t.max_warps} ({t.warp_size} threads each)",
            str(t.max_blocks),
            str(4 * t.registers),
            f"{t.shared_bytes >> 10} KB",
            f"{t.block_shared_bytes >> 10} KB",
        ]
        for t in TARGETS.values()
    ]
    return table(header, rows)


def summary(facts: dict[str, Any]) -> str:
    """How much was compiled, in a sentence."""
    rows = facts["kernels"]
    count = sum(found["compiled"] for found in rows)
    names = {(found["form"], found["op"], found["kernel"]) for found in rows}
    failing = sum(bool(found["failed"]) for found in rows)
    return (
        f"{len(names)} kernels, {len(rows)} lines of kernel, dtype and target, {count} compilations, {failing} lines with a failing check. "
        f"Triton {facts['tools']['triton']}, nvcc {facts['tools']['nvcc']}."
    )


def render(page: str, facts: dict[str, Any]) -> str:
    """The page with everything between its markers written anew."""
    parts: dict[str, Callable[[], str]] = {
        "summary": lambda: summary(facts),
        "floors": floors,
        "limits": limits,
        "triton": lambda: kernels(facts, "triton"),
        "cuda": lambda: kernels(facts, "cuda"),
    }
    for name, make in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        assert begin in page, f"the page lacks {begin}"
        assert end in page, f"the page lacks {end}"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{make().strip()}\n\n{end}{rest.partition(end)[2]}"
    return page


def load() -> dict[str, Any]:
    """The facts there are."""
    facts: dict[str, Any] = json.loads(FACTS.read_text())
    return facts


def main() -> None:
    if "--render" not in sys.argv:
        found = measure()
        lines = ",\n".join(json.dumps(line) for line in found.pop("kernels"))
        FACTS.write_text(json.dumps(found, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n]}}\n')
    PAGE.write_text(render(PAGE.read_text(), load()))
    print(summary(load()))


if __name__ == "__main__":
    main()
