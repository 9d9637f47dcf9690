"""`--engine ray`: every key reaches the engine, and a value that cannot be is refused before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reinforce_ada import config as configuration
from reinforce_ada.engines import ray as ray_engine
from reinforce_ada.errors import InputError
from reinforce_ada.training import launch
from reinforce_ada.training.display import Display


def test_every_key_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Recorder:
        def __init__(self, options: ray_engine.Options, **settings: Any) -> None:
            self.options, self.settings, self.is_closed = options, settings, False
            made.append(self)

        def close(self) -> None:
            self.is_closed = True

    monkeypatch.setattr(ray_engine, "RayEngine", Recorder)
    of_actor = {
        "tensor_parallel": 2, "max_tokens": 7, "max_model_len": 99, "max_num_seqs": 5, "temperature": 0.5, "dtype": "float32",
        "top_p": 0.9, "top_k": 20, "min_p": 0.05,
    }  # fmt: skip
    of_fleet = {"replicas": 3, "ray_address": "auto", "cpus_per_replica": 4, "hung_after_s": 6.0, "give_up_s": 8.0}
    config = configuration.load(None, {**of_actor, **of_fleet})
    monkeypatch.chdir(tmp_path.parent)
    display, model = Display(), SimpleNamespace(causal_lm=torch.nn.ModuleDict(), tokenizer=None)
    model.causal_lm.get_input_embeddings = lambda: torch.nn.Embedding(11, 2)
    with launch.make_engine("ray", config, tmp_path.name, model, torch.device("cuda"), tmp_path, display):  # type: ignore[arg-type]
        (engine,) = made
        assert not engine.is_closed
    assert engine.is_closed
    expected = {**of_actor, "device": "cuda", "model": str(tmp_path.resolve())}  # an actor is in a folder of its own
    assert expected.items() <= dataclasses.asdict(engine.options).items()
    assert engine.settings == {
        "num_replicas": 3, "address": "auto", "cpus": 4, "hung_after_s": 6.0, "give_up_s": 8.0, "say": display.line,
        "vocab_size": 11,
    }  # fmt: skip


@pytest.mark.parametrize("key", ["replicas", "cpus_per_replica", "tensor_parallel", "hung_after_s", "give_up_s"])
def test_zero_of_it_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf"config \[engine\]: {key} = '0'; an? (integer|number) from (1|0.001) to "):
        configuration.load(None, {key: "0"})
