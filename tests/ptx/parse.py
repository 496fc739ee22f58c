"""The text of PTX as kernels of basic blocks."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Address(NamedTuple):
    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


class Instruction(NamedTuple):
    """`code` is the opcode, split at its dots; `guard` a predicate and whether it is negated."""

    code: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    line: int
    source: str

    @property
    def text(self) -> str:
        return ".".join(self.code)


class Variable(NamedTuple):
    """What takes memory: a parameter, or an array in shared, local, global or constant memory."""

    space: str
    name: str
    align: int
    size: int
    values: bytes


@dataclass
class Block:
    """Instructions that run one after another. `sync` of them, the first, waits for other threads."""

    instructions: list[Instruction] = field(default_factory=list)
    sync: Instruction | None = None
    end: Instruction | None = None  # a branch, or the last of a thread


@dataclass
class Kernel:
    name: str
    variables: list[Variable] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)  # bytes of a register, 0 of a predicate, by prefix or name
    blocks: list[Block] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def of(self, *spaces: str) -> list[Variable]:
        return [each for each in self.variables if each.space in spaces]

    def width(self, register: str) -> int:
        found = self.widths.get(register)
        return self.widths[register.rstrip("0123456789")] if found is None else found


WAITS = ("bar", "shfl", "redux", "mma", "ldmatrix", "stmatrix")
ENDS = ("bra", "ret", "exit")
_VARIABLE = re.compile(
    r"\.(param|shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.([a-z])(\d+)(?:\s+\.ptr[\s.\w]*?)?\s+([\w$]+)"
    r"(\[\d*\])?(?:\s*=\s*\{?([^};]*)\}?)?\s*;?\s*$"
)


def variable(text: str) -> Variable | None:
    found = _VARIABLE.search(text)
    if not found:
        return None
    space, align, _, bits, name, count, values = found.groups()
    size = int(bits) // 8
    number = int(count[1:-1] or 0) if count else 1
    data = b""
    if values:
        data = b"".join((int(x, 0) % 2 ** int(bits)).to_bytes(size, "little") for x in values.split(","))
        data = data.ljust(size * number, b"\0")
    return Variable(space, name, int(align or size), size * number, data)


def parse(text: str) -> dict[str, Kernel]:
    """Kernels by name. Functions that they call are left out."""
    kernels: dict[str, Kernel] = {}
    common: list[Variable] = []
    kernel, depth, statement, source, header = None, 0, "", "", ""
    for number, line in enumerate(text.splitlines(), 1):
        line, _, comment = line.partition("//")
        line = line.strip()
        if kernel is None:
            header += line + " "
            if line.startswith(".section"):
                break
            if line.endswith(";"):
                if ".func" not in header and (declared := variable(header)):
                    common.append(declared)
                header = ""
            elif line == "{":
                found = re.search(r"\.(entry|func)(?:\s+\([^)]*\))?\s+([\w$]+)\s*\((.*?)\)", header)
                kernel = Kernel(found[2], variables=list(common))
                if found[1] == "entry":
                    kernels[kernel.name] = kernel
                kernel.variables += [variable(each) for each in found[3].split(",") if each.strip()]
                kernel.blocks.append(Block())
                depth, header = 1, ""
            elif re.match(r"\.(version|target|address_size|file|weak|alias)\b", line):
                header = ""
            continue
        if line.split(None, 1)[:1] == [".loc"]:
            source = comment.strip()
            continue
        line = f"{statement} {line}".strip() if statement else line
        statement = ""
        while line:
            if line[0] in "{}":
                depth += 1 if line[0] == "{" else -1
                line = line[1:].strip()
                if depth == 0:
                    _finish(kernel)
                    kernel = None
                    break
            elif label := re.match(r"([\w$]+):(?!:)\s*", line):
                kernel.labels[label[1]] = _new_block(kernel)
                line = line[label.end() :]
            else:
                one, semicolon, line = line.partition(";")
                if not semicolon:
                    statement, line = one, ""
                else:
                    _statement(kernel, one.strip(), number, source)
                    line = line.strip()
    return kernels


def _new_block(kernel: Kernel) -> int:
    last = kernel.blocks[-1]
    if last.instructions or last.end:
        kernel.blocks.append(Block())
    return len(kernel.blocks) - 1


def _finish(kernel: Kernel) -> None:
    if not kernel.blocks[-1].instructions and not kernel.blocks[-1].end:
        kernel.blocks[-1].end = Instruction(("ret",), (), None, 0, "")


def _statement(kernel: Kernel, text: str, line: int, source: str) -> None:
    if not text or text.startswith(".pragma"):
        return
    if text.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        width = 0 if kind == "pred" else int(kind[1:]) // 8
        kernel.widths |= {name.strip().split("<")[0]: width for name in names.split(",")}
        return
    if text.startswith("."):
        declared = variable(text)
        if not declared:
            raise NotImplementedError(f"line {line}: {text}")
        if declared.space != "param":  # of a call, which is an instruction that nobody knows, where one is run
            kernel.variables.append(declared)
        return
    guard = None
    if text[0] == "@":
        name, text = text[1:].split(None, 1)
        guard = (name.lstrip("!"), name[0] == "!")
    code, _, rest = text.partition(" " if " " in text.split("\t")[0] else "\t")
    instruction = Instruction(tuple(code.strip().split(".")), operands(rest), guard, line, source)
    if instruction.code[0] in ENDS:
        kernel.blocks[-1].end = instruction
        kernel.blocks.append(Block())
        return
    if instruction.code[0] in WAITS:
        _new_block(kernel)
        kernel.blocks[-1].sync = instruction
    kernel.blocks[-1].instructions.append(instruction)


def operands(text: str) -> tuple[Operand, ...]:
    found: list[Operand] = []
    for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,{\[]*", text):
        each = each.strip()
        if each[0] == "{":
            found.append(tuple(x.strip() for x in each[1:-1].split(",")))
        elif each[0] == "[":
            base, _, offset = each[1:-1].replace(" ", "").partition("+")
            found.append(Address(base, int(offset or "0", 0)))
        else:
            found.append(each)
    return tuple(found)
