"""The pages agree with each other and with the site: links, anchors, navigation, blocks that no test would find."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import reinforce_ada
import reinforce_ada.ops
from reinforce_ada import config
from reinforce_ada.sampling import PRESETS
from reinforce_ada.study.settings import read_study
from reinforce_ada.training.task_files import read_records, turns_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "tools").rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((DOCS / "notebooks").glob("*.ipynb")),
]
FENCED = re.compile(r"^( *)(```+)(\w*)\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((\S+?)\)|<(?:a|img)\b[^>]*?(?:href|src)=\"([^\"]+)\"|^\[[^\]]+\]: (\S+)", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def prose(page: Path) -> str:
    """The Markdown of a page without its blocks of code; of a notebook, that of its Markdown cells."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCED.sub("", text)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page: what GitHub and the site make of its headings, and those that it sets itself."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        shown = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", shown).lower())
        found.append(shown.replace(" ", "-"))
    return {name for name in found if found.count(name) == 1} | set(re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text()))


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in (next(filter(None, groups)) for groups in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and (target.suffix not in (".md", ".ipynb") or anchor not in anchors(target))):
            broken.append(link)
    return broken


@each_page
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_the_check_of_links_sees_what_is_wrong(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A `title` – with (signs)\n\n## Twice\n\n## Twice\n\n```sh\n# no heading\n```\n")
    page.write_text(
        "[1](other.md#a-title--with-signs) [2](other.md#a-title) [3](other.md#twice) [4](other.md#no-heading) [5](none.md) ![6](no.png)"
    )
    assert broken_links(page) == ["other.md#a-title", "other.md#twice", "other.md#no-heading", "none.md", "no.png"]


# -------------------- blocks


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_no_code_hides_from_the_tests(page):
    """tests/test_examples.py runs blocks of the languages python and sh; an indented one, or one without a language, it would not find."""
    indented = re.findall(r"(?<=\n\n)((?:    .*\n)+)", prose(page))
    nameless = [text for _, _, language, text in FENCED.findall(page.read_text()) if language in ("", "py", "bash", "shell", "console")]
    code = re.compile(r"^ *(?:(?:import|from|def|async def|class) .*|reinforce-ada .*)$", re.MULTILINE)
    assert [found for block in indented + nameless for found in code.findall(block)] == []


def blocks(language: str) -> list[pytest.ParameterSet]:
    found = [
        (page, text) for page in sorted(DOCS.glob("*.md")) for _, _, name, text in FENCED.findall(page.read_text()) if name == language
    ]
    return [pytest.param(page, text, id=f"{page.stem}-{i}") for i, (page, text) in enumerate(found)]


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_configurations_of_the_pages_load(page, text, tmp_path):
    path = tmp_path / "given.toml"
    path.write_text(text)
    tables = tomllib.loads(text)
    if "arm" in tables:
        assert len(read_study(path).arms) > 1
        return
    if own := tables.get("task", {}).get("task"):
        (tmp_path / own).touch()
    loaded = config.load(path)
    assert not own or loaded.task.num_examples == 0


@pytest.mark.parametrize(("page", "text"), blocks("json"))
def test_records_of_the_pages_are_read(page, text, tmp_path):
    path = tmp_path / "given.jsonl"
    path.write_text(text)
    records = list(read_records(path, needs_answer=True))
    assert [turns_of(record)[-1]["role"] for record in records] == ["user"] * len(text.splitlines())


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_the_settings_of_other_trainers_have_counterparts(name):
    table = (DOCS / f"{name}.md").read_text().partition("\n## Your settings\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[-1] for line in table.splitlines() if line.startswith("| `")][1:]
    keys = {field.name for section in fields(config.Config()) for field in fields(getattr(config.Config(), section.name))}
    found = [set(re.findall(r"`(\w+)`", cell)) for cell in rows]
    assert len(found) >= 8
    assert all(found)
    assert set().union(*found) <= keys


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs", "group_advantages", "policy_loss", "linear_policy_loss"])
def test_signatures_of_the_operators_are_those_of_the_code(name):
    """As far as they are spelled out: three dots stand for the parameters of policy_loss."""
    (shown,) = re.findall(rf"^    {name}\((.*?)\)$", (DOCS / "operators.md").read_text(), re.MULTILINE | re.DOTALL)
    (given,) = ast.parse(f"def f({shown.replace('..., ', '')}): pass").body
    positional, keywords = given.args.args, dict(zip(given.args.kwonlyargs, given.args.kw_defaults, strict=True))
    defaults = [None] * (len(positional) - len(given.args.defaults)) + given.args.defaults
    documented = {arg.arg: value for arg, value in [*zip(positional, defaults, strict=True), *keywords.items()]}
    real = inspect.signature(getattr(reinforce_ada.ops, name)).parameters
    assert [found for found in real if found in documented or "..." not in shown] == list(documented)
    for arg, value in documented.items():
        assert (inspect.Parameter.empty if value is None else ast.literal_eval(value)) == real[arg].default


def test_every_preset_has_a_situation():
    table = (DOCS / "choosing.md").read_text().partition("\n## Which preset when\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert {name for cell in rows for name in re.findall(r"`([\w-]+)`", cell)} == set(PRESETS)


# -------------------- AGENTS.md


def test_what_agents_md_names_exists():
    text = (ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) < 80
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", text)) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:\.github|benchmarks|csrc|docs|examples|python|tests|tools)/[\w/.-]*\w/?", text))
    assert len(named) > 15
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


# -------------------- the site


class _Settings(yaml.SafeLoader):
    """Reads mkdocs.yml, which names a function of a package that this environment need not have."""


_Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_every_page_is_in_the_navigation_once():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), _Settings)
    listed = [
        next(iter(entry.values())) if isinstance(entry, dict) else entry for part in settings["nav"] for entry in part[next(iter(part))]
    ]
    own = {path.relative_to(DOCS).as_posix().replace(".ipynb", ".md") for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")}
    assert sorted(listed) == sorted([*own, "CONTRIBUTING.md", "CHANGELOG.md"])
    assert len(settings["nav"]) <= 6


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    for path in named:
        module, _, name = path.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), name)), path
    public = {*reinforce_ada.__all__, *reinforce_ada.ops.__all__} - {"__version__", "ops", "CONVENTIONS"}  # docs/operators.md has the last
    assert public <= {path.rpartition(".")[2] for path in named}


def test_the_site_asks_no_other_server():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), _Settings)
    assert settings["theme"]["font"] is False
    assert settings["strict"] is True
    assert not {"extra_javascript", "repo_url"} & set(settings)
    assert all((DOCS / path).exists() for path in settings["extra_css"])
    assert settings["hooks"] == ["tools/site_hooks.py"]  # refuses a page that would
    assert not any("```mermaid" in page.read_text() for page in PAGES)  # the theme would fetch what draws it
