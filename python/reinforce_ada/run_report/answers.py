"""The part of a run's page that shows what the model writes: a bounded sample of its completions, by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from reinforce_ada.outside import GarbageError, parse_json
from reinforce_ada.rollouts import Excerpt, RolloutStore, SampledCompletion, SampledPool
from reinforce_ada.run_report.markup import Content, element, table
from reinforce_ada.run_report.reading import STORE, Run

# The most that a page holds: 3 * 8 * 8 texts of 4000 characters are 768 KB, however large the run.
NUM_PROMPTS, NUM_COMPLETIONS, NUM_CHARACTERS = 8, 8, 4000
_ORDERS = (
    ("step up", "in the order of the run"), ("step down", "latest steps first"), ("rate up", "lowest pass rate first"),
    ("rate down", "highest pass rate first"), ("length down", "longest completions first"),
)  # fmt: skip


def sampled_steps(steps: Sequence[int]) -> list[int]:
    """Return the first, the middle and the last of the finished steps; fewer if there are not as many."""
    return sorted({steps[0], steps[(len(steps) - 1) // 2], steps[-1]}) if steps else []


def read_sample(run_dir: Path) -> tuple[list[SampledPool], int]:
    """Return the sample of a run, and the number of its finished steps; nothing if it has no store."""
    path = run_dir / STORE
    if not path.is_file():
        return [], 0
    with RolloutStore(path, read_only=True) as store:
        steps = store.finished_steps()
        limits = {"num_prompts": NUM_PROMPTS, "num_completions": NUM_COMPLETIONS, "num_characters": NUM_CHARACTERS}
        return [pool for step in sampled_steps(steps) for pool in store.sample(step, **limits)], len(steps)


def answers(run: Run, pools: Sequence[SampledPool], num_steps: int) -> list[Element]:
    """Return the elements of the section."""
    if not pools:
        return [element("p", "No step is finished yet, or the run has no rollout store.", class_="note")]
    steps = sorted({pool.step for pool in pools})
    said = (
        f"This is a sample: of {num_steps:,} finished steps the first, the middle and the last (here {_listed(steps)}), of each step the "
        f"first {NUM_PROMPTS} prompts, and of each prompt up to {NUM_COMPLETIONS} completions. Those that were trained on come first and "
        f"are marked by a bar; others follow in the order of the requests. "
        f"Of a longer text the page has {NUM_CHARACTERS:,} characters: the end of a prompt, the beginning of a completion. "
        "All rollouts are in the Parquet file that reinforce-ada report writes."
    )
    threshold = run.setting("sampling", "positive_threshold")
    about = f" A reward above {threshold} counts as correct." if isinstance(threshold, (int, float)) else ""
    return [element("p", said + about, class_="note"), _tools(), element("div", *map(_card, pools), id="answers")]


def _listed(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps[:-1]))} and {steps[-1]}"


def _tools() -> Element:
    options = [element("option", text, value=value) for value, text in _ORDERS]
    find = element("input", id="find", type="search", placeholder="find in prompts, answers, rewards", aria_label="find")
    count = element("span", id="count", class_="note", role="status")
    return element("div", find, element("select", *options, id="order", aria_label="order"), count, id="tools", class_="tools", hidden="")


def _card(pool: SampledPool) -> Element:
    scored = pool.num_correct + pool.num_wrong
    void = f", {pool.num_void} void" if pool.num_void else ""
    verdict = f"{pool.num_correct} of {scored} correct{void}; {len(pool.completions)} of {pool.num_completions} shown"
    head = element("header", element("h3", f"Step {pool.step} · {pool.prompt_id}"), element("span", verdict, class_="note"))
    answer = [element("p", "Answer of the record: ", element("span", text, class_="text"))] if (text := _answer(pool)) else []
    about = element(
        "div",
        head,
        element("div", element("div", _prompt(pool.prompt), class_="text"), class_="prompt", tabindex="0"),
        *answer,
        class_="about",
    )
    rows = [(_cells(c), "kept" if c.is_kept else "") for c in pool.completions]
    heads = (("#", "number"), ("reward", "number"), ("tokens", "number"), ("end", "short"), ("completion", "text"))
    lengths = [c.num_tokens for c in pool.completions if c.num_tokens is not None]
    numbers = {
        "data_step": str(pool.step), "data_rate": f"{pool.num_correct / scored if scored else -1:.4f}",
        "data_length": str(max(lengths, default=0)),
    }  # fmt: skip
    return element("article", about, table(heads, rows, class_="answers sortable"), class_="card", **numbers)


def _cells(c: SampledCompletion) -> tuple[Content, ...]:
    if c.reward is None:
        return str(c.index), "void", "", "", "This completion could not be scored."
    return str(c.index), f"{c.reward:g}", f"{c.num_tokens or 0:,}", c.finish_reason, _text(c.text)


def _prompt(excerpt: Excerpt) -> str:
    return f"(cut) …{excerpt.text}" if excerpt.is_cut else excerpt.text


def _text(excerpt: Excerpt) -> str:
    return f"{excerpt.text}… (cut)" if excerpt.is_cut else excerpt.text


def _answer(pool: SampledPool) -> str:
    """Return the answer in the prompt's record, if it is a text or a number."""
    try:
        record = parse_json(pool.data or "null")
    except GarbageError:
        return ""
    found = record.get("answer") if isinstance(record, dict) else None
    return str(found)[:NUM_CHARACTERS] if isinstance(found, (str, int, float)) else ""
