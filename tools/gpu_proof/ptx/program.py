"""A kernel's PTX as a list of instructions; what ptxas would read, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_DIRECTIVES = re.compile(r"^\s*\.(loc|file|section|pragma|version|target|address_size)\b.*$", re.MULTILINE)
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?")
_ARRAY = re.compile(r"\.(shared|global|const)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\](?:\s*=\s*\{([^}]*)\})?")
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"^([\w$]+):\s*")
_INSTRUCTION = re.compile(r"^(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class PtxError(Exception):
    """The program does what a GPU would not forgive, or something that this machine does not know."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """`@predicate opcode operands`, with the opcode split at its dots."""

    text: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False
    scopes: tuple[int, ...] = (0,)  # the braces it stands in, innermost last


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the entry: PTX type, size in bytes and offset in the parameter block."""

    name: str
    type: str
    size: int
    offset: int


@dataclass(slots=True)
class Program:
    """One entry: instructions with labels resolved to their indices."""

    name: str
    params: list[Param]
    registers: dict[str, str]  # name or prefix ("%r") -> type
    shared: dict[str, tuple[int, int]]  # name -> (offset, size)
    shared_bytes: int
    constants: dict[str, bytes]
    instructions: list[Instruction]
    labels: dict[tuple[str, int], int] = field(default_factory=dict)  # of a name in a scope


def parse(ptx: str, entry: str | None = None, dynamic_shared: int = 0) -> Program:
    """The entry of that name, or the only one; `dynamic_shared` bytes stand behind an `.extern .shared` array."""
    ptx = _DIRECTIVES.sub("", _COMMENTS.sub("", ptx))
    for match in _ENTRY.finditer(ptx):
        if entry is None or match[1] == entry:
            body = _body(ptx, match.end())
            return _program(match[1], match[2], body, _arrays(ptx[: match.end()] + body), dynamic_shared)
    raise PtxError(f"no entry {entry}")


def target(program: Program, i: Instruction) -> int:
    """Where a branch goes: the label of the innermost scope that has it."""
    return next(program.labels[i.operands[0], scope] for scope in reversed(i.scopes) if (i.operands[0], scope) in program.labels)


def entries(ptx: str) -> list[str]:
    """The names of all entries."""
    return [match[1] for match in _ENTRY.finditer(_COMMENTS.sub("", ptx))]


def _body(ptx: str, start: int) -> str:
    depth, at = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[at], 0)
        at += 1
    return ptx[start : at - 1]


def _arrays(text: str) -> list[tuple[str, int, str, int | None, str | None]]:
    return [(m[1], int(m[2]), m[3], int(m[4]) if m[4] else None, m[5]) for m in _ARRAY.finditer(text)]


def _program(name: str, params: str, body: str, arrays: list[tuple[str, int, str, int | None, str | None]], dynamic_shared: int) -> Program:
    shared: dict[str, tuple[int, int]] = {}
    constants: dict[str, bytes] = {}
    end = 0
    for space, align, label, size, values in sorted(arrays, key=lambda a: a[3] is None):  # the dynamic array comes last
        if space != "shared":
            constants[label] = bytes(int(v) & 255 for v in values.split(",")) if values else bytes(size or 0)
        elif label in body:
            end = -(-end // align) * align
            shared[label] = (end, dynamic_shared if size is None else size)
            end += shared[label][1]
    program = Program(name, _params(params), {}, shared, end, constants, [])
    scopes = [0]
    for opened, statement in enumerate(body.split(";"), 1):
        text = statement.strip()
        while text[:1] in ("{", "}") or _LABEL.match(text):
            if found := _LABEL.match(text):
                program.labels[found[1], scopes[-1]] = len(program.instructions)
            else:
                scopes = [*scopes, opened] if text[0] == "{" else scopes[:-1]
            text = text[found.end() if found else 1 :].lstrip()
        _add(program, text, tuple(scopes))
    return program


def _params(text: str) -> list[Param]:
    params: list[Param] = []
    offset = 0
    for kind, name, count in _PARAM.findall(text):
        unit = _BYTES[kind[1:]]
        size = int(count) if count else unit
        align = 8 if count else unit
        offset = -(-offset // align) * align
        params.append(Param(name, kind, size, offset))
        offset += size
    return params


def _add(program: Program, text: str, scopes: tuple[int, ...]) -> None:
    if not text:
        return
    if reg := _REG.match(text):
        for one in reg[2].split(","):
            program.registers[re.sub(r"<\d+>", "", one.strip())] = reg[1]
        return
    if text.startswith("."):
        if not _ARRAY.match(text):
            raise PtxError(f"{program.name}: directive {text!r}")
        return
    found = _INSTRUCTION.match(text)
    if found is None:
        raise PtxError(f"{program.name}: cannot read {text!r}")
    negated, predicate, opcode, operands = found.groups()
    program.instructions.append(
        Instruction(text, tuple(opcode.split(".")), tuple(_split(operands)), predicate, bool(negated and predicate), scopes)
    )


def _split(operands: str) -> list[str]:
    """At the commas outside braces and brackets."""
    out, depth, start = [], 0, 0
    for at, c in enumerate(operands):
        depth += c in "{["
        depth -= c in "}]"
        if c == "," and not depth:
            out.append(operands[start:at].strip())
            start = at + 1
    rest = operands[start:].strip()
    return [*out, rest] if rest else out
