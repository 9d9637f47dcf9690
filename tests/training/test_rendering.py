"""Options of a chat template: passed to it, and told apart from what it does not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reinforce_ada import config as configuration
from reinforce_ada.config import TaskConfig
from reinforce_ada.errors import InputError
from reinforce_ada.training.models import tiny_tokenizer
from reinforce_ada.training.rendering import Renderer
from reinforce_ada.training.tasks import load_records, render

THINKS = (
    "{# depth is a word of this comment #}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{{ tools | length if tools else 0 }}"
)


def renderer(**options: Any) -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    return Renderer(tokenizer, "", "chat", options)


@pytest.mark.parametrize(
    ("options", "end", "unread"),
    [
        ({}, "assistant: 0", ()),
        ({"enable_thinking": False}, "assistant: <think></think>0", ()),
        ({"enable_thinking": True}, "assistant: 0", ()),
        ({"enable_thinkin": False}, "assistant: 0", ("enable_thinkin",)),
        ({"depth": 3, "enable_thinking": False}, "assistant: <think></think>0", ("depth",)),  # a comment reads nothing
        ({"tools": [{"name": "calculator"}]}, "assistant: 1", ()),
    ],
)
def test_options_reach_the_template(options: dict[str, Any], end: str, unread: tuple[str, ...]) -> None:
    found = renderer(**options)
    assert found.text([], {"prompt": "q"}).removesuffix("\n") == f"user: q\n{end}"
    assert found.unread == unread


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "chat_template", "return_tensors"])
def test_an_argument_of_the_tokenizer_is_no_option_of_the_template(name: str) -> None:
    with pytest.raises(InputError, match=f"template_options sets {name}, an argument of apply_chat_template"):
        renderer(**{name: False})


def test_an_option_that_is_not_read_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}", "answer": i}) + "\n" for i in range(3)))
    config = TaskConfig(task=str(tmp_path / "a.jsonl"), eval_prompts=1, template_options={"enable_thinking": False, "x": 1})
    task = render(load_records(config, 0, 0), config, tiny_tokenizer(), longest=100)
    assert task.notes == ("the chat template does not read enable_thinking, x of template_options",)


def test_options_need_a_chat_template() -> None:
    given = {"template_options": '{"enable_thinking": false}'}
    assert configuration.load(None, given).task.template_options == {"enable_thinking": False}
    with pytest.raises(InputError, match="template_options with template = 'plain'"):
        configuration.load(None, {**given, "template": "plain"})
