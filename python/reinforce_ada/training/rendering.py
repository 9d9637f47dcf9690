"""Conversations as the text that a model continues: through the tokenizer's chat template, or as plain lines."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.training.task_files import Record, answer_of, question_of, turns_of

_EXPRESSION = re.compile(r"\{[{%].*?[}%]\}", re.DOTALL)
_PASSED_ON = {"tools", "documents"}  # arguments of apply_chat_template that are variables of the template


class Renderer:
    """Renders conversations as text, through the tokenizer's chat template or as plain lines.

    If a template raises on a system message, or leaves it out, the system text goes to the start of the first user message instead;
    `has_folded` tells whether this has happened, and `unread` has the names of options that the template does not read.

    Args:
        options: variables for the chat template, such as {"enable_thinking": False}.
    Raises: InputError when a chat template is needed and there is none, when it cannot take a user's message, and for an option that is
        an argument of `apply_chat_template` itself.
    """

    def __init__(self, tokenizer: Any, system_prompt: str, template: str, options: Mapping[str, Any] | None = None) -> None:
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise InputError("task", "the tokenizer has no chat template", "one", "--template plain writes questions as lines of text")
        self._tokenizer, self._system_prompt, self._is_chat = tokenizer, system_prompt, template == "chat"
        self._options = dict(options or {})
        self.unread = self._unread()
        self._folds = self._is_chat and self._must_fold()
        self.has_folded = False

    def text(self, examples: Sequence[Record], record: Record) -> str:
        """Return the examples with their answers, then the record's question. Raises: InputError if the template raises on them."""
        turns = self._conversation(examples, record)
        if not self._is_chat:
            return "\n".join(turn["content"] for turn in turns) + "\n"
        try:
            return self._apply(turns)
        except Exception as e:  # a template is a program and may raise anything
            given = f"the chat template raises on {one_line(question_of(record), 60)!r}: {one_line(str(e), 200)}"
            raise InputError("task", given, "a conversation that it takes", "--template plain writes lines of text") from e

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that `text` has made."""
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids if self._is_chat else self._tokenizer(text).input_ids)

    def _conversation(self, examples: Sequence[Record], record: Record) -> list[dict[str, str]]:
        turns = turns_of(record)
        system = [turn for turn in turns if turn["role"] == "system"]
        if not system and self._system_prompt:
            system = [{"role": "system", "content": self._system_prompt}]
        shown: list[dict[str, str]] = []
        for example in examples:
            shown += [turn for turn in turns_of(example) if turn["role"] != "system"]
            shown.append({"role": "assistant", "content": answer_of(example) or ""})
        rest = [*shown, *(turn for turn in turns if turn["role"] != "system")]
        if not (self._folds and system):
            return [*system, *rest]
        self.has_folded = True  # the system's text goes to the start of the first user message
        first = next(i for i, turn in enumerate(rest) if turn["role"] == "user")
        rest[first] = {"role": "user", "content": "\n\n".join(turn["content"] for turn in [*system, rest[first]])}
        return rest

    def _must_fold(self) -> bool:
        """Return whether the template does not support a system message."""
        system, user = ({"role": role, "content": f"the {role}'s part"} for role in ("system", "user"))
        try:
            alone = self._apply([user])
        except Exception as e:
            given = f"the chat template raises on a user's message: {one_line(str(e), 200)}"
            raise InputError("task", given, "a template for messages", "--template plain writes questions as lines of text") from e
        if user["content"] not in alone:
            raise InputError("task", "the chat template leaves out the user's message", "one that shows it", "--template plain")
        try:
            return system["content"] not in self._apply([system, user])
        except Exception:
            return True

    def _apply(self, turns: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **self._options))

    def _unread(self) -> tuple[str, ...]:
        """Return the options that no expression of the template names."""
        if not self._options:
            return ()
        taken = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys() - _PASSED_ON
        if wrong := sorted(self._options.keys() & taken):
            given = f"template_options sets {wrong[0]}, an argument of apply_chat_template"
            raise InputError("task", given, "variables that the chat template reads")
        words = set(re.findall(r"\w+", " ".join(_EXPRESSION.findall(str(self._tokenizer.get_chat_template())))))
        return tuple(name for name in self._options if name not in words)
