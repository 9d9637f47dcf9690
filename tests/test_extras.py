"""What an installation without the extras does: it works, or one line names the extra that is missing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reinforce_ada import config
from reinforce_ada.errors import EXTRA_OF, InputError, needs, not_installed
from reinforce_ada.outside import is_installed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
TRAIN = "train --model model --task good.jsonl --steps 0 --eval-prompts 0 --dtype float32 --device cpu --engine"

# A command line, and what it cannot do without; with anything else missing it ends as it does with all there.
LINES: dict[str, set[str]] = {
    "explain grpo": set(),
    "explain reinforce-ada-balance --json": set(),
    "explain grpo --figure curves.png": {"matplotlib"},
    "simulate grpo --seeds 1 --prompts 2": set(),
    "simulate grpo --seeds 1 --prompts 2 --figure study.png": {"matplotlib"},
    "doctor": set(),
    "bench --list": set(),
    "completion bash": {"argcomplete"},
    "report gone": {"matplotlib"},
    "report gone --html": {"matplotlib"},
    "push gone --to org/name": {"huggingface_hub"},
    "study gone.toml": set(),
    "serve ./gone --expose --host 203.0.113.1": {"vllm"},
    "eval model --task good.jsonl --eval-prompts 1 --eval-k 1 --dtype float32 --device cpu --engine transformers": {
        "transformers", "safetensors", "rich",
    },
    f"{TRAIN} transformers": {"transformers", "safetensors", "rich", "tomli_w"},
    f"{TRAIN} transformers --lora-rank 2": {"transformers", "safetensors", "rich", "tomli_w", "peft"},
    f"{TRAIN} openai --servers http://127.0.0.1:9": {"transformers", "safetensors", "rich", "tomli_w", "httpx"},
    f"{TRAIN} vllm": {"transformers", "safetensors", "rich", "tomli_w", "vllm"},
    f"{TRAIN} ray": {"transformers", "safetensors", "rich", "tomli_w", "ray"},  # vLLM is needed where the actors are
    "train --model ./gone --task chain_sum --engine transformers": {
        "transformers", "reasoning_gym", "rich", "tomli_w", "matplotlib",  # reasoning_gym needs the last
    },
}  # fmt: skip
MISSING = re.compile(r'reinforce-ada: [\w -]+: (\w+) is not installed; pip install "reinforce-ada\[(\w+)\]"(; [^\n]+)?\n')


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reinforce_ada.training.models import build_tiny, tiny_tokenizer

    folder = tmp_path_factory.mktemp("world")
    (folder / "good.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}", "answer": str(i)}) + "\n" for i in range(12)))
    build_tiny(folder / "model", tiny_tokenizer(), [("q", "1")], seed=0, num_updates=0)
    return folder


def run_all(world: Path, cases: list[tuple[list[str], str]]) -> None:
    """Every case ends well or in the one line; and in that line exactly where the command cannot do without."""
    places = [["--out", f"runs/{i}"] if line.startswith("train") else [] for i, (_, line) in enumerate(cases)]  # some of them begin a run
    text = json.dumps([(packages, line.split() + place) for (packages, line), place in zip(cases, places, strict=True)])
    worker = [sys.executable, str(ROOT / "tests/without_packages.py")]
    done = subprocess.run(worker, input=text, capture_output=True, text=True, cwd=world, check=True)
    for (packages, line), (code, _, error) in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        about = f"{line} without {packages}: {code}, {error}"
        assert "Traceback" not in error, about
        found = MISSING.fullmatch(error.splitlines(keepends=True)[-1]) if error else None
        lacks = LINES[line] & set(packages)
        assert bool(found) == bool(lacks), about
        if found:
            assert code == 2, about
            assert found[1] in lacks, about
            assert found[2] == EXTRA_OF[found[1]], about


def test_a_base_install_does_what_needs_no_extra(world: Path) -> None:
    run_all(world, [(list(EXTRA_OF), line) for line in LINES])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_without_each_package(world: Path) -> None:
    run_all(world, [([package], line) for line in LINES for package in EXTRA_OF])


def test_the_table_of_extras_is_that_of_the_project() -> None:
    """But for `dev`; reinforce-ada[vllm] brings two others."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared: dict[str, str] = {}
    for extra in (
        "bench",
        "lora",
        "math",
        "ray",
        "vllm",
        "trl",
        "report",
        "train",
        "datasets",
        "completion",
    ):  # matplotlib is in two
        for requirement in extras[extra]:
            name = re.match(r"[\w-]+", requirement)[0].replace("-", "_")  # type: ignore[index]
            declared[name] = extra
    declared.pop("reinforce_ada")
    assert declared == EXTRA_OF


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(not_installed("track", "wandb", "or without")) == "track: wandb is not installed; pip install wandb; or without"
    needs("here", "json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not is_installed("json")
    with pytest.raises(InputError, match=r'^report: pyarrow is not installed; pip install "reinforce-ada\[report\]"$'):
        needs("report", "pyarrow")


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python imports any folder on its path, and the working folder is on it."""
    (tmp_path / "mlflow_of_mine").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("mlflow_of_mine") is not None
    assert not is_installed("mlflow_of_mine")


def test_a_configuration_is_read_without_any_package() -> None:
    code = "import sys; from reinforce_ada import config; config.load(None, {'steps': '3'}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "python")}
    )
    assert not set(EXTRA_OF) & {name.partition(".")[0] for name in done.stdout.split()}
    assert config.load(None, {"steps": "3"}).training.steps == 3
