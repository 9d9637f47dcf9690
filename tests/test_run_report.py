"""The page of a run: it says what the log and the store hold, whatever they hold stays text, and it loads and runs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import Browser, find
from reinforce_ada import cli
from reinforce_ada.errors import InputError
from reinforce_ada.report import write_page
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.run_report.answers import NUM_CHARACTERS, NUM_COMPLETIONS, NUM_PROMPTS, sampled_steps
from reinforce_ada.run_report.markup import digest, document, element
from reinforce_ada.run_report.page import _thinned, _verdict
from reinforce_ada.run_report.reading import Run
from reinforce_ada.types import Completion, CompletionId, Failed, Group, Outcome, Pool, Prompt, SamplingResult, Scored

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

# What would run, or load something, if it were not text.
ATTACKS = [
    "<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", "\"><svg onload=window.hacked=1>", "'><b>",
    "</script><script>window.hacked = 1</script>", "</style><style>*{display:none}</style>", "<!-- ", "]]>", "&lt;i&gt;", "&#60;u&#62;",
    "<iframe src='javascript:parent.hacked=1'>", "<a href='javascript:window.hacked=1'>x</a>", "<base href='https://example.org/'>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>", "<template><p>", "<plaintext>", "<textarea>", "<title>", "${hacked=1}",
    "</article></div></main></body></html>", "\x00<script\x00>", "\u202e\u2066 turned", "\x1b[2J\x07", "\udcff", "\ufeff\ufffe", "$x_{$",
]  # fmt: skip
ALL = " ".join(ATTACKS)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "dl", "div", "dt", "dd", "nav", "a", "picture"),
    *("source", "img", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "select", "option", "input", "span", "article"),
    *("header", "script"),
}


def pool(step: int, prompt: Prompt, texts: list[str], rewards: list[float | None]) -> Pool:
    """None is a void."""
    outcomes: list[Outcome] = []
    for index, (text, reward) in enumerate(zip(texts, rewards, strict=True)):
        id_ = CompletionId(step, prompt.prompt_id, index)
        if reward is None:
            outcomes.append(Failed(id_, step, "no"))
        else:
            outcomes.append(Scored(Completion(id_, np.arange(3), np.zeros(3), text, "stop", step), reward))
    known = [r for r in rewards if r is not None]
    moments = (float(np.mean(known)), 0.0, min(known), max(known))
    right = sum(r > 0.5 for r in known)
    return Pool(prompt, tuple(outcomes), right, len(known) - right, rewards.count(None), *moments, len(rewards), "satisfied", 32)


def write_run(folder: Path, prompts: list[Prompt], texts: list[str], rewards: list[float | None], config: Any, steps: int = 2) -> Path:
    """A run whose steps all have these prompts, and each of them these completions; the last one is kept."""
    folder.mkdir(parents=True)
    evals = [
        {"kind": "eval", "step": step, "k": 4, "avg_at_k": mean, "stderr": 0.1, "per_prompt": shares, "pass_at_k": {"1": mean, "4": 1.0}}
        for step, mean, shares in ((0, 0.25, [0.0, 0.25, 0.5]), (steps, 0.75, [0.75, 0.75, 0.75]))
    ]
    metrics = {"first_round_reward": 0.5, "signal_fraction": 0.5, "samples_per_prompt": 4.0, "issued_per_prompt": 5.0, "num_prompts": 2.0}
    totals = {"num_completions_committed": 8.0, "num_completions_issued": 10.0, "tokens_committed": 1500.0, "tokens_wasted": 0.0}
    log = [{"kind": "step", "step": s, **metrics, **totals, "sampling_s": 2.0, "training_s": 1.5} for s in range(1, steps + 1)]
    header = {"kind": "run", "cap": 8, "config": config, "engine": ALL}
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (header, evals[0], *log, evals[1])).replace("\\udcff", ""))
    with RolloutStore(folder / "rollouts.sqlite") as store:
        for step in range(1, steps + 1):
            pools = tuple(pool(step, prompt, texts, rewards) for prompt in prompts)
            store.append([outcome for p in pools for outcome in p.outcomes])
            store.finish_step(step, SamplingResult(pools, tuple(Group(p, p.scored[-1:]) for p in pools), {}))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of which every text is an attack."""
    config = {"sampling": {"preset": ALL}, "task": {"task": ALL, "reward": ALL}, "model": {"model": ALL}, ALL: {ALL: [ALL]}}
    name = "<script>window.hacked=1<" + "\u2215script> \"'&amp;$x_{$"  # a folder's name has no slash
    prompts = [Prompt(ALL, text=ALL, data={"answer": ALL}), *(Prompt(f"{i}{text}", text=text) for i, text in enumerate(ATTACKS))]
    folder = tmp_path_factory.mktemp("hostile") / name
    rewards = [*(float(i % 2) for i in range(len(ATTACKS))), None]
    return write_page(write_run(folder, prompts, [*ATTACKS, "lost"], rewards, config))


class Parsed(HTMLParser):
    """The tags with their attributes, and the text outside style sheets and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.other: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in self.raw:
            self.raw[self.cdata_elem].append(data)
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)


def of(folder: Path) -> Parsed:
    return Parsed(write_page(folder).read_text())


def shared(run: Path) -> str:
    """The page of a run that tests share, written once."""
    path = run / "report.html"
    return (path if path.exists() else write_page(run)).read_text()


# -------------------- what it says


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"sampling": {"preset": "grpo"}, "task": {"task": "sums.jsonl"}, "training": {"steps": 5, "learning_rate": 1e-5}}
    prompts = [Prompt("a", text="What is 1 + 1?", data={"answer": "2"}), Prompt("b", text="What is 2 + 2?")]
    return write_run(tmp_path_factory.mktemp("world") / "small", prompts, ["two", "2", "lost"], [0.0, 1.0, None], config)


def test_the_page_answers_its_four_questions(small: Path) -> None:
    text = Parsed(shared(small)).text
    for said in (
        "Did it learn?", "Yes: the held-out reward rose by 0.500 ± 0.144 (standard error, paired over 3 prompts).", "0.250 → 0.750",
        "What did it cost?", "16 of 32 (50% of the cap 8), 4.0 per prompt", "4 (20.0% of those issued)", "4 s sampling, 3 s training",
        "What do its answers look like?", "of 2 finished steps", "(here steps 1 and 2)", "Step 1 · a", "What is 1 + 1?",
        "1 of 2 correct, 1 void; 3 of 3 shown", "This completion could not be scored.", "Answer of the record: 2",
        "What was it run with?", "training.steps", "sums.jsonl", "small, after step 2 of 5 · learning rate 1e-05",
    ):  # fmt: skip
        assert said in text, said


def test_kept_completions_come_first_and_are_marked(small: Path) -> None:
    rows = re.findall(r'<tr class="(kept)?">(?:<td class="\w+">([^<]*)</td>){5}</tr>', shared(small))
    assert [row for row in rows if row[1] in ("two", "2")][:2] == [("kept", "2"), ("", "two")]


def test_what_differs_from_the_defaults_is_apart(small: Path) -> None:
    changed, _, rest = Parsed(shared(small)).text.partition("keys that have their defaults")
    assert "sampling.preset" in changed
    assert "task.task" in changed
    assert "training.learning_rate" in rest  # 1e-5 is the default


@pytest.mark.parametrize(
    ("first", "last", "says"),
    [
        ([0.0, 0.2, 0.4], [0.5, 0.6, 0.9], "Yes: the held-out reward rose by 0.467 ± 0.033"),
        ([0.5, 0.6, 0.9], [0.0, 0.2, 0.4], "It got worse: the held-out reward fell by 0.467 ± 0.033"),
        ([0.0, 0.5, 0.4], [0.5, 0.0, 0.5], "Not visibly: the held-out reward changed by 0.033 ± 0.291"),
        ([0.0], [1.0], "The first and the last evaluation cannot be compared"),
        ([0.0, 0.1], [1.0], "The first and the last evaluation cannot be compared"),
        ([0.0, 0.1], None, "There is one held-out evaluation so far: Avg@4 is 0.500 ± 0.100."),
        (None, None, "No held-out evaluation has been logged"),
    ],
)
def test_the_verdict(first: list[float] | None, last: list[float] | None, says: str) -> None:
    evals = [{"step": i, "k": 4, "avg_at_k": 0.5, "stderr": 0.1, "per_prompt": e} for i, e in enumerate((first, last)) if e is not None]
    assert _verdict(Run("run", {}, [], evals, None, None)).startswith(says)


@pytest.mark.parametrize(
    ("steps", "shown"), [([], []), ([1], [1]), ([1, 2], [1, 2]), ([1, 2, 3], [1, 2, 3]), (list(range(3, 103)), [3, 52, 102])]
)
def test_the_sample_is_of_the_first_the_middle_and_the_last_step(steps: list[int], shown: list[int]) -> None:
    assert sampled_steps(steps) == shown


def test_the_sample_is_bounded(tmp_path: Path) -> None:
    long = "begin" + "x" * 3 * NUM_CHARACTERS + "end"
    prompts = [Prompt(f"p{i}", text=f"{long}{i}", data={"answer": long}) for i in range(NUM_PROMPTS + 3)]
    count = NUM_COMPLETIONS + 2
    folder = write_run(tmp_path / "large", prompts, [long] * count, [1.0] * count, {}, steps=5)
    parsed = of(folder)
    assert sum(tag == "article" for tag, _ in parsed.tags) == 3 * NUM_PROMPTS
    assert sum(tag == "tr" and found.get("class") in ("kept", "") for tag, found in parsed.tags) >= 3 * NUM_PROMPTS * NUM_COMPLETIONS
    assert parsed.text.count("begin" + "x" * 100) == 3 * NUM_PROMPTS * NUM_COMPLETIONS  # completions, which have lost their ends
    assert "x" * NUM_CHARACTERS not in parsed.text
    assert "Step 5 · p7" in parsed.text
    assert "Step 5 · p8" not in parsed.text
    assert "Step 2 · " not in parsed.text
    with RolloutStore(folder / "rollouts.sqlite", read_only=True) as store:
        (found,) = store.sample(4, num_prompts=1, num_completions=2, num_characters=10)
    assert (found.prompt.text, found.prompt.is_cut, found.data, found.num_completions) == ("xxxxxxend0", True, None, count)
    assert [(c.index, c.text.text, c.text.is_cut, c.is_kept) for c in found.completions] == [
        (count - 1, "beginxxxxx", True, True),
        (0, "beginxxxxx", True, False),
    ]


def test_the_plots_are_bounded(tmp_path: Path) -> None:
    """At a hundred bytes a point the lines of 5000 steps would be several MB."""
    shares = {"first_round_reward": 0.5, "samples_per_prompt": 8.0, "issued_per_prompt": 9.0, "signal_fraction": 0.5}
    steps = [{"kind": "step", "step": s, **{name: share * (s % 7) / 6 for name, share in shares.items()}} for s in range(1, 5001)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    page = write_page(tmp_path).read_text()
    assert len(page) < 2_000_000
    assert "200 of 5,000 (every step is in log.jsonl)" in page


@pytest.mark.parametrize(("count", "places"), [(0, []), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (7, [0, 2, 4, 6]), (1000, [0, 333, 666, 999])])
def test_the_steps_are_thinned_evenly(count: int, places: list[int]) -> None:
    assert [r["n"] for r in _thinned([{"n": n} for n in range(count)], 4)] == places


def test_a_run_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "eval", "step": 0, "k": 4, "avg_at_k": None}) + "\n")
    text = of(tmp_path).text
    assert "No step has been logged." in text
    assert "No step is finished yet" in text
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "step", "step": 3}) + "\n" + json.dumps({"kind": "run", "config": None}) + "\n")
    assert "after step 3" in of(tmp_path).text


def test_the_command_writes_where_it_is_told(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(small), "--html"]) == 0
    assert capsys.readouterr().out.startswith(f"{small / 'report.html'}\nheld-out Avg@4 before")
    assert cli.main(["report", str(small), "--html", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").read_text() == (small / "report.html").read_text()
    assert not (small / "figure.png").exists()
    assert cli.main(["report", str(small), "--html", str(small / "log.jsonl")]) == 2
    assert capsys.readouterr().err == f"reinforce-ada: report: --html {small / 'log.jsonl'}; a file name that ends with .html\n"
    with pytest.raises(InputError, match=r"^report: cannot write .*gone"):
        write_page(small, "/proc/gone/a.html")


# -------------------- what it must not do


def test_whatever_a_run_holds_stays_text(hostile: Path) -> None:
    parsed = Parsed(hostile.read_text())
    assert {tag for tag, _ in parsed.tags} <= TAGS
    assert parsed.other == []
    for attack in ATTACKS:
        shown = attack.translate({0: "\\x00", 0x1B: "\\x1b", 7: "\\x07", 0x202E: "\\u202e", 0x2066: "\\u2066", 0xDCFF: "\ufffd"})
        assert parsed.text.count(shown) >= 2, attack  # a prompt and a completion
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "srcdoc", "formaction", "ping")]
    addresses = [value or "" for _, found in parsed.tags for name, value in found.items() if name in ("src", "srcset", "href")]
    assert all(re.match(r"data:image/svg\+xml;base64,[\w+/=]+$|#part-\d$", value) for value in addresses)


def test_the_policy_admits_the_script_and_the_style_sheet_alone(small: Path) -> None:
    parsed = Parsed(shared(small))
    assert [tag for tag, _ in parsed.tags].count("script") == [tag for tag, _ in parsed.tags].count("style") == 1
    (policy,) = [found["content"] for _, found in parsed.tags if found.get("http-equiv") == "Content-Security-Policy"]
    script, style = (digest("".join(parsed.raw[tag])) for tag in ("script", "style"))
    assert policy == (f"default-src 'none'; img-src data:; style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none'")
    # https://www.w3.org/TR/CSP3/#example-7c873a9d
    assert digest("doSomething();") == "sha256-" + "RFWPLDbv2BY+rCkDzsE+0fr8ylGr2R2faWMhq4lfEQc="


def test_it_holds_neither_control_characters_nor_halves_of_pairs(hostile: Path) -> None:
    page = hostile.read_bytes().decode()
    assert re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page) == []


# -------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no Chromium on the path; the variable CHROMIUM names one")
    made = Browser(program)
    yield made
    made.close()


def test_a_browser_runs_nothing_of_what_a_run_holds(browser: Browser, hostile: Path) -> None:
    browser.open(hostile)
    assert browser.value("typeof window.hacked") == "undefined"
    assert browser.value("document.querySelectorAll('script').length") == 1
    assert browser.value("document.getElementById('tools').hidden") is False  # the one script has run
    assert browser.value("[...document.images].every((image) => image.complete && image.naturalWidth > 100)") is True
    assert browser.value("document.getElementById('answers').textContent.includes('<plaintext>')") is True
    assert browser.of("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening") == []
    requested = [message["request"]["url"] for message in browser.of("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:image/svg+xml;base64,")] == [hostile.as_uri()]


def test_a_browser_would_have_run_it_without_the_escapes_and_the_policy(browser: Browser, tmp_path: Path) -> None:
    """What the test above looks for can be seen: of unescaped attacks the policy refuses some, and without it they run."""
    whole = document("title", element("main", "HERE"), style="", script="").replace("HERE", "<script>window.hacked = 1</script>")
    (tmp_path / "a.html").write_text(whole)
    browser.open(tmp_path / "a.html")
    assert browser.value("typeof window.hacked") == "undefined"
    assert "Content Security Policy" in str(browser.of("Log.entryAdded"))
    (tmp_path / "b.html").write_text(re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole))
    browser.open(tmp_path / "b.html")
    assert browser.value("window.hacked") == 1


def test_answers_are_found_and_arranged(browser: Browser, small: Path) -> None:
    shared(small)
    browser.open(small / "report.html")

    def shown() -> list[str]:
        return browser.value("[...document.querySelectorAll('article:not([hidden]) h3')].map((h) => h.textContent)")

    def type_in(box: str, text: str, event: str) -> None:
        told = f"box.value = {json.dumps(text)}; box.dispatchEvent(new Event('{event}'))"
        browser.value(f"{{ const box = document.getElementById('{box}'); {told} }}")

    assert shown() == ["Step 1 · a", "Step 1 · b", "Step 2 · a", "Step 2 · b"]
    type_in("find", "TWO  2?", "input")
    assert shown() == ["Step 1 · b", "Step 2 · b"]
    assert browser.value("document.getElementById('count').textContent") == "2 completions found"
    type_in("find", "nothing has this", "input")
    assert shown() == []
    type_in("find", "", "input")
    type_in("order", "step down", "change")
    assert shown() == ["Step 2 · a", "Step 2 · b", "Step 1 · a", "Step 1 · b"]
    rewards = "[...document.querySelector('article tbody').rows].map((row) => row.cells[1].textContent)"
    assert browser.value(rewards) == ["1", "0", "void"]
    browser.value("document.querySelectorAll('article thead th')[1].click()")
    assert browser.value(rewards) == ["0", "1", "void"]


@pytest.mark.parametrize("width", [320, 1400])
def test_the_page_is_no_wider_than_the_window(browser: Browser, hostile: Path, width: int) -> None:
    browser.resize(width)
    browser.open(hostile)
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_without_its_script_the_page_is_whole(browser: Browser, small: Path) -> None:
    shared(small)
    browser.allow_scripts(False)
    try:
        browser.open(small / "report.html")
        assert browser.value("document.getElementById('tools').offsetHeight") == 0
        assert browser.value("[...document.querySelectorAll('article tbody tr')].filter((row) => row.offsetHeight > 0).length") == 12
    finally:
        browser.allow_scripts(True)
