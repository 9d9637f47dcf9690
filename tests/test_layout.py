"""The layout and import rules of docs/architecture.md."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import reinforce_ada
import reinforce_ada.ops
from reinforce_ada import doctor
from reinforce_ada.ops import _dispatch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python/reinforce_ada"
OPS = PACKAGE / "ops"
CSRC = ROOT / "csrc"
DECLARED = _dispatch.table()

# What each part may import; the part of a module is the longest entry it starts with. launch puts a run together for the command line
# and ends it with the report, so nothing else in training may import it but launch_eval, which puts an evaluation together.
FOUNDATION = {"errors", "files", "heartbeat", "loading", "machine", "outside", "types"}
STAGES = {"sampling", "rewards", "ops", "engines", "rollouts", "config"}
ENTRIES = {"training.eval_results", "training.hub", "training.launch", "training.launch_eval"}
MAY_IMPORT = {
    "errors": {"outside"},
    "heartbeat": set(),
    "outside": {"heartbeat"},
    "packing": set(),
    "files": {"errors", "outside"},
    "loading": {"errors", "outside"},
    "machine": set(),
    "plots": {"errors", "files", "outside"},
    "types": {"errors", "outside"},
    "config": {"errors", "files", "loading", "outside", "rewards"},
    "sampling": FOUNDATION,
    "rewards": FOUNDATION,
    "rollouts": {*FOUNDATION, "packing"},
    "engines": FOUNDATION,
    "engines.serve": {*FOUNDATION, "config", "engines"},
    "ops": {*FOUNDATION, "_cpu", "_cuda"},
    "advantages": {*FOUNDATION, "sampling", "ops"},
    "integrations": {*FOUNDATION, "sampling", "rewards", "engines", "driver", "async_driver", "advantages", "ops"},
    "driver": {*FOUNDATION, "sampling", "rewards", "engines"},
    "async_driver": {*FOUNDATION, "sampling", "rewards", "driver"},
    "training": {*FOUNDATION, *STAGES, "advantages", "driver"},
    "run_report": {*FOUNDATION, "config", "plots", "rollouts", "training"},
    "report": {*FOUNDATION, "rollouts", "run_report"},
    "training.hub": {*FOUNDATION, "config", "training"},
    "training.launch": {*FOUNDATION, *STAGES, "advantages", "driver", "training", "training.hub", "report"},
    "training.launch_eval": {*FOUNDATION, *STAGES, "driver", "training", "training.launch", "training.eval_results"},
    "training.entry": {*FOUNDATION, "config", "rewards", "training", "training.hub", "training.launch"},
    "training.eval_results": {*FOUNDATION, "training"},
    "simulate": {*FOUNDATION, "plots", "sampling", "rollouts", "config", "training"},
    "doctor": {*FOUNDATION, "ops", "integrations", "_cpu", "_cuda"},
    "explain": {*FOUNDATION, "plots", "sampling", "config", "training"},
    "study": {*FOUNDATION, "plots", "sampling", "config", "explain", "training"},
    "bench": {*FOUNDATION, "plots", "ops", "_cpu"},
    "commands": {*FOUNDATION, "config", "explain", "report", "simulate", "study", "bench", "doctor", "engines.serve", *ENTRIES},
    "cli": {*FOUNDATION, "commands", "config"},
    "__main__": {"cli"},
}

# The imports that go up: a method of a record that calls what stands above it, when somebody calls the method, and names for its types.
UP = {"types": {"sampling", "training.tensors"}}


def module_name(path: Path) -> str:
    """The module below reinforce_ada: "ops.policy_loss.cpu"; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def part_of(module: str) -> str:
    found = [part for part in (*MAY_IMPORT, "_cpu", "_cuda") if f"{module}.".startswith(f"{part}.")]
    assert found, f"{module} belongs to no part: say in MAY_IMPORT what it may import"
    return max(found, key=len)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in it, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below.removeprefix("reinforce_ada.") in (*MODULES, "_cpu", "_cuda") else str(node.module)


# -------------------- operators


def test_every_operator_package_is_declared_and_has_its_reference():
    packages = {path.name for path in OPS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(DECLARED)
    for op in packages:
        assert (OPS / op / "__init__.py").is_file()
        assert (OPS / op / "reference.py").is_file()


@pytest.mark.parametrize("op", DECLARED)
def test_declared_forms_are_the_files_that_exist(op):
    present = {path.stem for path in (OPS / op).glob("*.py")} & set(_dispatch.BACKENDS)
    assert present == set(DECLARED[op])


# Native forms that are made of the kernels of others, in Python: the logits of the one, the loss of the other.
COMPOSED = {"linear_policy_loss": {"linear_token_logprobs", "policy_loss"}}


def native_files(op: str) -> set[str]:
    """What csrc/ops/<op> holds for the forms that are declared, beside the parts of a long kernel."""
    cpu, cuda = (backend in DECLARED[op] and op not in COMPOSED for backend in ("cpu", "cuda"))
    return {name for name, there in ((f"{op}.h", cpu or cuda), (f"{op}_cpu.cpp", cpu)) if there} | {
        f"{op}_cuda.{kind}" for kind in ("h", "cuh", "cu") if cuda
    }


def is_part(file: Path) -> bool:
    """Whether its name says of which form it is a part, or that the forms share it, and another file includes it."""
    op = file.parent.name
    named = re.fullmatch(rf"{op}_(cpu_\w+\.h|cuda_\w+\.cuh|settings\.h)", file.name)
    return named is not None and any(f'#include "ops/{op}/{file.name}"' in other.read_text() for other in file.parent.iterdir())


def test_native_code_exists_for_exactly_the_native_forms():
    assert set(DECLARED) >= {op for parts in (COMPOSED, *COMPOSED.values()) for op in parts}
    assert all("cpu" in DECLARED[part] for op, parts in COMPOSED.items() if "cpu" in DECLARED[op] for part in parts)
    present = {path.name: {file.name for file in path.iterdir() if not is_part(file)} for path in (CSRC / "ops").iterdir()}
    assert present == {op: files for op in DECLARED if (files := native_files(op))}


def test_the_doctor_shows_every_declared_form():
    shown = doctor.examine(check=False)["ops"]
    assert {op: set(forms) for op, forms in shown.items()} == {op: set(forms) for op, forms in DECLARED.items()}


def test_the_table_in_the_documentation_is_the_declared_one():
    rows = [line.strip("| ").split("|") for line in (ROOT / "docs/operators.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    header = next(row for row in cells if row[0] == "operator")
    shown = {row[0].strip("`"): {form for form, cell in zip(header, row, strict=False) if cell == "yes"} for row in cells}
    assert {op: shown.get(op) for op in DECLARED} == {op: set(forms) for op, forms in DECLARED.items()}


@pytest.mark.parametrize("op", DECLARED)
def test_every_operator_is_exported_under_its_name(op):
    assert op in reinforce_ada.ops.__all__
    assert callable(getattr(reinforce_ada.ops, op))


# -------------------- native code


def test_native_code_includes_no_torch():
    sources = [path for path in CSRC.rglob("*") if path.is_file()]
    assert sources
    assert [path.name for path in sources if re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", path.read_text())] == []


@pytest.mark.parametrize("module", ["cpu", "cuda"])
def test_bindings_hold_only_definitions(module):
    body = (CSRC / f"bindings_{module}.cpp").read_text().partition(f"PYBIND11_MODULE(_{module}, m) {{")[2]
    statements = [s.strip() for s in re.sub(r"//.*", "", body.rpartition("}")[0]).split(";")]
    assert [s for s in statements if s and not s.startswith(("m.def(", "using "))] == []


@pytest.mark.parametrize("module", ["cpu", "cuda"])
def test_the_stub_has_exactly_the_bound_functions(module):
    bound = dict(re.findall(r'm\.def\("(\w+)",(.*?)\);', (CSRC / f"bindings_{module}.cpp").read_text(), re.DOTALL))
    stub = ast.parse((PACKAGE / f"_{module}.pyi").read_text())
    stubbed = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert stubbed == {name: re.findall(r'"(\w+)"_a', definition) for name, definition in bound.items()}


def test_every_kernel_is_in_the_header():
    """Who launches one without this library finds its parameters, grid and block there."""
    for path in CSRC.glob("ops/*/*_cuda.cuh"):
        op = path.parent.name
        # What a macro ends with a type or a size is there without it.
        kernels = set(re.findall(rf"\b({op}_\w+?)_?(?:##\w+)?\(", path.read_text()))
        assert kernels, path
        assert {name for name in kernels if name not in path.with_suffix(".h").read_text()} == set()


# -------------------- imports


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_one_way(module):
    part = part_of(module)
    ours = {name.removeprefix("reinforce_ada.") for name in imports(TREES[module]) if name.startswith("reinforce_ada.")}
    assert {name for name in ours - UP.get(module, set()) if part_of(name) not in {part, *MAY_IMPORT[part]}} == set()


def test_the_parts_have_an_order():
    """The table above has no cycle: going down it always ends."""
    left = {part: set(below) - {"_cpu", "_cuda"} for part, below in MAY_IMPORT.items()}
    while left:
        lowest = {part for part, below in left.items() if not below & left.keys()}
        assert lowest, f"a cycle among {sorted(left)}"
        left = {part: below for part, below in left.items() if part not in lowest}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("ops._")])
def test_what_operators_share_knows_none_of_them(module):
    assert [name for name in imports(TREES[module]) if any(f"{name}.".startswith(f"reinforce_ada.ops.{op}.") for op in DECLARED)] == []


def test_what_needs_no_torch_imports_none():
    """Nor does it import an engine: these start in a moment, and the sampler lives in trainers that have neither."""
    light = [
        "sampling",
        "rewards",
        "config",
        "cli",
        "doctor",
        "driver",
        "engines.function",
        "engines.scripted",
        "rollouts",
        "report",
        "explain.command",
        "study.command",
    ]
    code = f"""
import importlib, json, sys
heavy = {{}}
for name in {light}:
    importlib.import_module("reinforce_ada." + name)
    heavy[name] = sorted({{"torch", "transformers", "vllm", "matplotlib", "pyarrow"}} & set(sys.modules))
print(json.dumps(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert json.loads(done.stdout) == {name: [] for name in light}


def environment() -> dict[str, str]:
    """Enough to find the package under test."""
    return {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


@pytest.mark.parametrize("name", reinforce_ada.__all__)
def test_the_package_exports_resolve(name):
    assert getattr(reinforce_ada, name) is not None


def test_a_name_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Samplr'"):
        reinforce_ada.Samplr  # noqa: B018


# -------------------- style that a linter does not see


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, without overloads."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            decorators = [d.id for d in node.decorator_list if isinstance(d, ast.Name)]
            yield from () if "overload" in decorators else (node,)


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_what_they_offer_have_docstrings(module):
    tree = TREES[module]
    assert ast.get_docstring(tree)
    assert [node.name for node in public(tree) if not ast.get_docstring(node)] == []


def test_tests_mirror_the_package():
    """A part has its tests under its name, an operator too; and some test names every public module or what it offers."""
    parts = {module.partition(".")[0] for module in MODULES if module} - {*FOUNDATION, "__main__"}  # these are in every test
    assert [
        p for p in sorted(parts) if not (ROOT / f"tests/test_{p}.py").is_file() and not any((ROOT / "tests" / p).glob("test_*.py"))
    ] == []
    assert [op for op in DECLARED if not (ROOT / f"tests/ops/test_{op}.py").is_file()] == []
    words = {word for path in (ROOT / "tests").rglob("*.py") for word in re.findall(r"\w+", path.read_text())}
    untested = []
    for module, tree in TREES.items():
        name = module.rpartition(".")[2]
        offered = {node.name for node in public(tree)}
        through_its_operator = module.startswith("ops.") and module.split(".")[1] in DECLARED
        if offered and not name.startswith("_") and not through_its_operator and not words & {name, *offered}:
            untested.append(module)
    assert untested == []


def files() -> Iterator[Path]:
    """Every text file of the project."""
    for top in ("csrc", "python", "tests", "tools", "benchmarks", "docs", "examples"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in {".py", ".pyi", ".h", ".cpp", ".md", ".toml", ".jsonl"}:
                yield path
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "CMakeLists.txt", "pyproject.toml", "constraints-cpu.txt"):
        yield ROOT / name


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("an absent package hidden behind None", r"except (ImportError|ModuleNotFoundError)[^\n]*:\s*\w+ = None"),
        ("something that is not there", r"NotImplemented" + r"Error|\bTO" + r"DO\b|\bFIX" + r"ME\b"),
        ("a path of one machine", r"(?<![\w.~/}])/(?:wo" + r"rk|ho" + r"me|ro" + r"ot|Us" + r"ers|tm" + r"p)/"),
    ],
)
def test_no_file_has(what, pattern):
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path in files() for match in re.finditer(pattern, path.read_text())]
    assert found == [], what
