"""Every barrier, bound and mask of the GPU kernels, each removed once: generated from the sources by rule.

CUDA (csrc/common/device.cuh, csrc/ops/*/*.cuh), in code that is compiled for the CPU too; what asks for an enumerator chooses a
formula and is left alone:
  barrier     a __syncthreads() or __syncwarp() is gone
  guard       `if (c)` before a return, break or continue never holds; any other `if (c)` always does
  part        an operand of && or || is gone
  choice      the condition of `c ? a : b`, if it compares sizes, always or never holds
  bound       a loop takes one turn more
  clamp       a call of within or at_least gives what is to be limited
Triton (@triton.jit functions of python/reinforce_ada/ops):
  mask        a load or store has no mask
  other       what a masked load gives outside is NaN, or a number that is no index
  where       tl.where always gives the choice that is no number, or one and the other
  guard       `if c` always holds, or never does; conditions of constexprs alone are not guards
  part        an operand of &, |, and, or is gone
  limit       tl.minimum, tl.maximum, min, max of two give the first, or the second
  barrier     a tl.debug_barrier() is gone
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpu_proof import ROOT


class Mutant(NamedTuple):
    """`text[begin:end]` of a file becomes `new`."""

    file: str  # relative to the root of the repository
    function: str
    rule: str
    begin: int
    end: int
    old: str
    new: str
    number: int  # among those that read the same

    @property
    def name(self) -> str:
        """Stays when lines move; changes when the function or what is mutated does."""
        where = "/".join(Path(self.file).parts[-2:])
        number = f" ({self.number})" if self.number > 1 else ""
        return f"{where} {self.function}: {self.rule} `{' '.join(self.old.split())}` -> `{self.new}`{number}"

    def apply(self, text: str) -> str:
        return text[: self.begin] + self.new + text[self.end :]


class Change(NamedTuple):
    function: str
    rule: str
    begin: int
    end: int
    new: str


def all_mutants(root: Path = ROOT) -> list[Mutant]:
    """Of every kernel source below `root`."""
    mutants: list[Mutant] = []
    for file in [root / "csrc/common/device.cuh", *sorted(root.glob("csrc/ops/*/*.cuh"))]:
        mutants += _of(file, root, cuda_changes)
    for file in sorted(root.glob("python/reinforce_ada/ops/**/*.py")):
        if "@triton.jit" in file.read_text():
            mutants += _of(file, root, triton_changes)
    return mutants


def _of(file: Path, root: Path, changes: object) -> list[Mutant]:
    text = file.read_text()
    seen: set[tuple[int, int, str]] = set()
    counts: Counter[tuple[str, ...]] = Counter()
    mutants = []
    for change in sorted(changes(text), key=lambda c: (c.begin, -c.end)):  # type: ignore[operator]
        if (change.begin, change.end, change.new) in seen or _ENUMERATOR.search(text, change.begin, change.end):
            continue
        seen.add((change.begin, change.end, change.new))
        old = text[change.begin : change.end]
        same = (change.function, change.rule, " ".join(old.split()), change.new)
        counts[same] += 1
        mutants.append(
            Mutant(str(file.relative_to(root)), change.function, change.rule, change.begin, change.end, old, change.new, counts[same])
        )
    return mutants


# -------------------- CUDA

_ENUMERATOR = re.compile(r"\b[A-Z]\w*::\w")
_FUNCTION = re.compile(r"(?:RA_DEVICE[^;{}()]*?\b|__launch_bounds__\([^()]+\)[\s\\]*)(\w+|operator[^\s\w]+)\s*\(")
_COMPARISON = re.compile(r" (==|!=|<=|>=|<|>) ")
_LEFT_STOPS = ("&&", "||", "?", ":", ",", ";", "=", "{", "return")
_RIGHT_STOPS = ("&&", "||", "?", ",", ";")


def cuda_changes(source: str) -> Iterator[Change]:
    text = _without_comments(source)

    def change(rule: str, span: tuple[int, int], new: str) -> Change:
        names = [m.group(1) for m in _FUNCTION.finditer(text, 0, span[0])]
        return Change(names[-1] if names else "", rule, *span, new)

    static = [_parenthesis(text, m.end() - 1) for m in re.finditer(r"\b(?:if constexpr \(|static_assert\()", text)]
    loops = [_parenthesis(text, m.end() - 1) for m in re.finditer(r"\bfor \(", text)]

    def inside(position: int, spans: list[tuple[int, int]]) -> bool:
        return any(begin <= position < end for begin, end in spans)

    for m in re.finditer(r"\b__sync(?:threads|warp)\(\);", text):
        yield change("barrier", m.span(), ";")
    for m in re.finditer(r"\bif \(", text):
        begin, end = _parenthesis(text, m.end() - 1)
        if ";" in text[begin:end]:  # if (declaration; condition)
            begin = _stripped(text, text.rindex(";", begin, end) + 1, end)[0]
        leaves = re.match(r"\)\s*(\{\s*)?(return|break|continue)\b", text[end:])
        yield change("guard", (begin, end), "false" if leaves else "true")
    for m in re.finditer(r" (&&|\|\|) ", text):
        if inside(m.start(), static):
            continue
        neutral = "true" if m.group(1) == "&&" else "false"
        for span in (_left(text, m.start()), _right(text, m.end())):
            yield change("part", span, neutral)
    for m in re.finditer(r" \? ", text):
        begin, end = _left(text, m.start(), stops=(":", ",", ";", "=", "{", "return"))
        if _COMPARISON.search(text, begin, end) and not inside(begin, static) and not re.search(" [!=]= ", text[begin:end]):
            for new in ("true", "false"):
                yield change("choice", (begin, end), new)
    for begin, end in loops:
        first = text.find(";", begin, end)
        if first < 0:
            continue
        condition = _stripped(text, first + 1, text.index(";", first + 1))
        words = set(re.findall(r"\b[A-Za-z_]\w*", text[condition[0] : condition[1]])) - {text[begin:first].split("=")[0].split()[-1]}
        compared = _COMPARISON.search(text, condition[0], condition[1])
        if compared and compared.group(1) in "<>" and any(not re.fullmatch(r"k[A-Z]\w*|sizeof|int|static_cast|T", word) for word in words):
            yield change("bound", compared.span(1), compared.group(1) + "=")
    for m in re.finditer(r"(?<!RA_DEVICE float )(?<!RA_DEVICE std::int64_t )\b(within|at_least)\(", text):
        begin, end = _parenthesis(text, m.end() - 1)
        parts = _arguments(text, begin, end)
        limited = parts[0] if m.group(1) == "within" else parts[-1]
        yield change("clamp", (m.start(), end + 1), f"({text[limited[0] : limited[1]]})")


def _without_comments(source: str) -> str:
    """With blanks in the place of comments, strings and preprocessor lines that are no macro, so that positions stay."""
    blank = lambda m: re.sub(r"[^\n]", " ", m.group())  # noqa: E731
    text = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, source, flags=re.DOTALL)
    # What only nvcc compiles cannot be found out here; the other branches are the CPU's.
    text = re.sub(r"^#if(?:def __CUDA\w+|.*__CUDA\w+).*?^#(?:else|elif[^\n]*|endif)", blank, text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^#(?!define)[^\n]*", blank, text, flags=re.MULTILINE)


def _parenthesis(text: str, position: int) -> tuple[int, int]:
    """Of the parenthesis that opens at `position`, what is inside."""
    depth = 0
    for i in range(position, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return position + 1, i
    raise AssertionError("a parenthesis that is not closed")


def _stripped(text: str, begin: int, end: int) -> tuple[int, int]:
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end


def _left(text: str, position: int, stops: tuple[str, ...] = _LEFT_STOPS) -> tuple[int, int]:
    """The operand that ends at `position`."""
    depth, i = 0, position - 1
    while i >= 0:
        depth += (text[i] in ")]}") - (text[i] in "([{")
        if depth < 0:
            break
        if depth == 0 and any(_is_stop(text, i, stop) for stop in stops):
            break
        i -= 1
    word = re.match(r"return\b", text[i : i + 6])
    return _stripped(text, i + (6 if word else 1), position)


def _is_stop(text: str, i: int, stop: str) -> bool:
    if stop == "return":
        return text.startswith(stop, i) and (i == 0 or not text[i - 1].isalnum()) and not text[i + 6 : i + 7].isalnum()
    if stop == "=":
        return text[i] == "=" and text[i - 1] not in "=!<>" and text[i + 1] != "="
    if stop == ":":
        return text[i] == ":" and text[i - 1] != ":" and text[i + 1] != ":"
    if len(stop) == 2:
        return text[i] == stop[0] and text[i - 1 : i + 1] == stop
    return text[i] == stop


def _right(text: str, position: int) -> tuple[int, int]:
    """The operand that begins at `position`."""
    depth, i = 0, position
    while i < len(text):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth < 0:
            break
        if depth == 0 and (any(text.startswith(stop, i) for stop in _RIGHT_STOPS) or _is_stop(text, i, ":")):
            break
        i += 1
    return _stripped(text, position, i)


def _arguments(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    depth, first, found = 0, begin, []
    for i in range(begin, end):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0 and text[i] == ",":
            found.append(_stripped(text, first, i))
            first = i + 1
    return [*found, _stripped(text, first, end)]


# -------------------- Triton


def triton_changes(source: str) -> Iterator[Change]:
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    raw = source.encode()

    def position(line: int, column: int) -> int:
        return len(raw[: starts[line - 1] + column].decode())

    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
            continue
        for statement in function.body:
            for rule, node, new in _triton_rules(statement):
                begin = position(node.lineno, node.col_offset)
                yield Change(function.name, rule, begin, position(node.end_lineno or 0, node.end_col_offset or 0), new)


def _triton_rules(statement: ast.stmt) -> Iterator[tuple[str, ast.expr, str]]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            yield from _call_rules(node)
        elif isinstance(node, ast.If) and not _is_constexpr(node.test):
            for new in ("True", "False"):
                yield "guard", node.test, new
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
            for kept in (node.left, node.right):
                yield "part", node, ast.unparse(kept)
        elif isinstance(node, ast.BoolOp) and not _is_constexpr(node):
            for left_out in node.values:
                others = [ast.unparse(value) for value in node.values if value is not left_out]
                yield "part", node, f" {'and' if isinstance(node.op, ast.And) else 'or'} ".join(others)


def _call_rules(call: ast.Call) -> Iterator[tuple[str, ast.expr, str]]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("tl.load", "tl.store"):
        if "mask" in keywords:
            kept = [k for k in call.keywords if k.arg not in ("mask", "other")]
            yield "mask", call, ast.unparse(ast.Call(call.func, call.args, kept))
        if isinstance(other := keywords.get("other"), ast.expr):
            yield "other", other, "1000003" if isinstance(other, ast.Constant) and type(other.value) is int else 'float("nan")'
    elif name == "tl.where":
        for choice in [c for c in call.args[1:] if not _is_number(c)] or call.args[1:]:
            yield "where", call, ast.unparse(choice)
    elif name in ("tl.minimum", "tl.maximum", "min", "max") and len(call.args) == 2:
        for choice in call.args:
            yield "limit", call, ast.unparse(choice)
    elif name == "tl.debug_barrier":
        yield "barrier", call, "None"


def _is_number(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) or ast.unparse(value).lstrip("-").startswith(("float(", "tl.zeros"))


def _is_constexpr(test: ast.expr) -> bool:
    """Of names in capitals and constants alone: it chooses what is compiled."""
    names = [node for node in ast.walk(test) if isinstance(node, ast.Name)]
    return all(name.id.isupper() or name.id in ("tl", "len") for name in names)
