"""Instructions as Python: a function of each block, for all threads or for those of a mask."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import operations as do
from .memory import Memory
from .parse import Address, Block, Instruction, Kernel, Operand

TYPES = {f"{kind}{8 * size}": f"{'u' if kind == 'b' else kind}{size}" for kind in "busf" for size in (1, 2, 4, 8)}
TYPES |= {f"s{8 * size}": f"i{size}" for size in (1, 2, 4, 8)} | {"pred": "b", "bf16": "u2"}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARED |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
OPPOSITE = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # of which it is the negation
SIGNS = {"add": "+", "sub": "-", "xor": "^", "and": "&", "or": "|"}
APPROXIMATED = {"ex2": "np.exp2({})", "lg2": "np.log2({})", "rcp": "1 / {}", "sqrt": "np.sqrt({})"}
APPROXIMATED |= {"rsqrt": "1 / np.sqrt({})"}
ALIKE = {"selp": 2, "shl": 1, "shr": 1, "bfe": 1}  # operands of the type of the instruction


class Program:
    """A kernel for blocks of so many threads: what takes memory, where it is, and the functions of its blocks.

    A function takes the registers, the machine and a mask, and returns a predicate if the block ends in a branch of
    some threads.
    """

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel, self.threads = kernel, threads
        self.registers: dict[str, int] = {}
        self.constants: dict[tuple[str, str], str] = {}
        self.names: dict[str, Any] = {"np": np, "do": do, "where": np.where}
        self.symbols: dict[str, int] = {}
        # Dynamic shared memory, of size 0, is last.
        self.shared_size = self._place(sorted(kernel.of("shared"), key=lambda each: each.size == 0), Memory.SHARED)
        self.parameter_size = self._place(kernel.of("param"), Memory.PARAMETERS)
        self.local_size = -(-self._place(kernel.of("local"), Memory.LOCAL) // 16) * 16  # of a thread
        self._place(kernel.of("global", "const"), Memory.CONSTANT)
        self.functions: dict[tuple[int, bool], Callable[..., Any]] = {}
        codes = [i.code for block in kernel.blocks for i in block.instructions if "shared" in i.code]
        self.grain = min([4, *(np.dtype(TYPES[code[-1]]).itemsize for code in codes if code[0] in ("ld", "st"))])

    def _place(self, variables: list, base: int) -> int:
        """Sets their addresses; returns how many bytes they take."""
        at = base
        for each in variables:
            at = -(-at // each.align) * each.align
            self.symbols[each.name] = at
            at += each.size
        return at - base

    def initial(self) -> list[np.ndarray]:
        zeros = {w: np.zeros(self.threads, f"u{w}" if w else bool) for w in (0, 1, 2, 4, 8)}
        return [zeros[self.kernel.width(name)] for name in self.registers]

    def function(self, number: int, masked: bool) -> Callable[..., Any]:
        found = self.functions.get((number, masked))
        if found is None:
            source = _Writer(self, self.kernel.blocks[number], masked).source()
            exec(compile(source, f"{self.kernel.name} block {number}", "exec"), self.names)
            found = self.functions[number, masked] = self.names["run"]
        return found

    def constant(self, text: str, dtype: str) -> str:
        """The name of an array of a number of the code."""
        if (text, dtype) not in self.constants:
            name = self.constants[text, dtype] = f"k{len(self.constants)}"
            if text[:2] in ("0f", "0F", "0d", "0D"):
                size = 4 if text[1] in "fF" else 8
                value = np.frombuffer(bytes.fromhex(text[2:])[::-1], f"{dtype[0]}{size}")[0]
            elif dtype[0] == "f":
                value = float(text)
            elif text in self.symbols:
                value = self.symbols[text]
            else:
                value = int(text.rstrip("U"), 0)
            bits = 8 * np.dtype(dtype).itemsize
            if dtype[0] in "ui":
                value = int(value) % 2**bits
                value -= 2**bits if dtype[0] == "i" and value >= 2 ** (bits - 1) else 0
            filled = np.full(self.threads, value, dtype if dtype != "b" else bool)
            if text in self.symbols and any(each.name == text for each in self.kernel.of("local")):
                filled = filled + (np.arange(self.threads) * self.local_size).astype(dtype)
            self.names[name] = filled
        return self.constants[text, dtype]


class _Writer:
    def __init__(self, program: Program, block: Block, masked: bool) -> None:
        self.program, self.block, self.masked = program, block, masked
        self.lines: list[str] = []
        self.known: dict[int, str] = {}  # types of registers that the block has written

    def source(self) -> str:
        for instruction in self.block.instructions:
            try:
                self.instruction(instruction)
            except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                what = f"{instruction.text} {instruction.operands}"
                raise NotImplementedError(f"line {instruction.line}: {what}") from error
        if self.block.end and self.block.end.guard:
            self.lines.append(f"return {self.guard(self.block.end)}")
        return "def run(R, M, m=None):\n " + "\n ".join(self.lines or ["pass"])

    def index(self, register: str) -> int:
        return self.program.registers.setdefault(register, len(self.program.registers))

    def guard(self, instruction: Instruction) -> str:
        name, negated = instruction.guard
        return ("~" if negated else "") + f"R[{self.index(name)}]"

    def read(self, operand: Operand, dtype: str) -> str:
        if operand[0] == "!":
            return f"~{self.read(operand[1:], dtype)}"
        if operand[0] != "%":
            return self.program.constant(operand, dtype)
        if operand in ("%laneid", "%warpid") or operand[:-2] in ("%tid", "%ntid", "%ctaid", "%nctaid"):
            return f"M.special[{operand!r}].astype({dtype!r})"
        index = self.index(operand)
        width, size = self.program.kernel.width(operand), 0 if dtype == "b" else np.dtype(dtype).itemsize
        if width == size:
            return f"R[{index}]" if size == 0 or self.known.get(index) == dtype else f"R[{index}].view({dtype!r})"
        if width < size:
            raise ValueError("a register that is too narrow")
        return f"R[{index}].view('u{width}').astype('u{size}').view({dtype!r})"

    def write(self, operand: Operand, value: str, dtype: str) -> None:
        if operand == "_":
            return
        index, width = self.index(operand), self.program.kernel.width(operand)
        if dtype != "b" and np.dtype(dtype).itemsize < width:
            value, dtype = f"({value}).astype('{dtype[0] if dtype[0] != 'f' else 'u'}{width}')", f"{dtype[0]}{width}"
        if (0 if dtype == "b" else np.dtype(dtype).itemsize) != width:
            raise ValueError("a register of another width")
        if self.mask != "None":
            old = f"R[{index}]" if dtype == "b" else f"R[{index}].view({dtype!r})"
            value = f"where({self.mask}, {value}, {old})"
        self.lines.append(f"R[{index}] = {value}")
        self.known[index] = dtype

    def instruction(self, it: Instruction) -> None:
        self.mask = "m" if self.masked else "None"
        if it.guard:
            self.lines.append(f"g = {'m & ' if self.masked else ''}{self.guard(it)}")
            self.mask = "g"
        name, kinds = it.code[0], it.code[1:]
        method = getattr(self, f"do_{name}", None)
        if method is not None:
            method(it)
            return
        dtype = TYPES[kinds[-1]]
        count = 2 if "wide" in kinds else ALIKE.get(name, 3)
        read = [self.read(operand, dtype) for operand in it.operands[1 : 1 + count]]
        if "ftz" in kinds:
            read = [f"do.flush({x})" for x in read]
        value = self.value(name, kinds, dtype, read, it)
        if "ftz" in kinds:
            value = f"do.flush({value})"
        if "sat" in kinds:
            value = f"np.fmin(np.fmax({value}, 0), 1).astype({dtype!r})"
        wide = "wide" in kinds
        self.write(it.operands[0], value, f"{dtype[0]}{2 * int(dtype[1])}" if wide else dtype)

    def value(self, name: str, kinds: tuple[str, ...], dtype: str, read: list[str], it: Instruction) -> str:
        a, b, c, *_ = *read, "", ""
        if kinds[-1] in ("f16", "bf16", "f16x2", "bf16x2") or set(kinds) & {"cc", "rz", "rm", "rp"}:
            raise ValueError("arithmetic that is not modelled")
        if name in SIGNS:
            return f"{a} {SIGNS[name]} {b}"
        if name in ("mul", "mad"):
            if "wide" in kinds:
                wide = f"{dtype[0]}{2 * int(dtype[1])}"
                product = f"{a}.astype({wide!r}) * {b}.astype({wide!r})"
                c = self.read(it.operands[3], wide) if name == "mad" else ""
            else:
                product = f"do.high_product({a}, {b})" if "hi" in kinds else f"{a} * {b}"
            return f"{product} + {c}" if c else product
        if name in ("shl", "shr"):
            by = self.read(it.operands[2], "u4")
            return f"do.shift_{'left' if name == 'shl' else 'right'}({a}, {by})"
        if name == "fma":
            return f"do.fma({a}, {b}, {c})"
        if name in ("min", "max"):
            propagates = dtype[0] != "f" or "NaN" in kinds
            return f"np.{name + 'imum' if propagates else 'f' + name}({a}, {b})"
        if name == "div":
            return f"{a} / {b}" if dtype[0] == "f" else f"do.divide({a}, {b})"
        if name in ("neg", "not", "abs"):
            return f"{ {'neg': '-', 'abs': 'np.abs', 'not': '~'}[name] }({a})"
        if name == "selp":
            return f"where({self.read(it.operands[3], 'b')}, {a}, {b})"
        if name in APPROXIMATED:
            return APPROXIMATED[name].format(a)
        if name == "bfe":
            return f"do.extract({a}, {self.read(it.operands[2], 'u4')}, {self.read(it.operands[3], 'u4')})"
        if name == "prmt" and len(kinds) == 1:
            return f"do.permute({a}, {b}, {c})"
        if name == "shf" and kinds[1] == "wrap":
            return f"do.funnel({a}, {b}, {c}, {kinds[0] == 'l'})"
        raise ValueError("unknown")

    def do_clz(self, it: Instruction) -> None:
        self.write(it.operands[0], f"do.leading_zeros({self.read(it.operands[1], TYPES[it.code[1]])})", "u4")

    def do_mov(self, it: Instruction) -> None:
        dtype, (to, source) = TYPES[it.code[1]], it.operands
        if isinstance(source, tuple):
            part = f"u{int(dtype[1]) // len(source)}"
            parts = ", ".join(self.read(x, part) for x in source)
            self.write(to, f"np.stack([{parts}], axis=1).view({dtype!r}).ravel()", dtype)
        elif isinstance(to, tuple):
            part = f"u{int(dtype[1]) // len(to)}"
            whole = f"np.ascontiguousarray({self.read(source, dtype)})"
            self.lines.append(f"v = {whole}.view({part!r}).reshape(-1, {len(to)})")
            for i, each in enumerate(to):
                self.write(each, f"v[:, {i}].copy()", part)
        else:
            self.write(to, self.read(source, dtype), dtype)

    def do_cvta(self, it: Instruction) -> None:
        """Nothing: all spaces share one."""
        self.write(it.operands[0], self.read(it.operands[1], "u8"), "u8")

    def do_setp(self, it: Instruction) -> None:
        compare, dtype = it.code[1], TYPES[it.code[-1]]
        a, b = (self.read(x, dtype) for x in it.operands[1:3])
        if "ftz" in it.code:
            a, b = f"do.flush({a})", f"do.flush({b})"
        if compare in ("num", "nan"):
            value = f"{'~' if compare == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
        elif compare in OPPOSITE:
            value = f"~({a} {OPPOSITE[compare]} {b})"
            if compare in ("equ", "neu"):
                unordered = f"(np.isnan({a}) | np.isnan({b}))"
                value = f"({a} == {b}) | {unordered}" if compare == "equ" else f"{a} != {b}"
        else:
            value = f"{a} {COMPARED[compare]} {b}"
            if compare == "ne" and dtype[0] == "f":
                value = f"({value}) & ~(np.isnan({a}) | np.isnan({b}))"
        to, *other = it.operands[0].split("|")
        combine = {"and": "&", "or": "|", "xor": "^"}.get(it.code[2])
        self.lines.append(f"c = {value}")
        last = f" {combine} {self.read(it.operands[3], 'b')}" if combine else ""
        self.lines.append(f"d = (~c){last}")
        self.write(to.strip(), f"c{last}", "b")
        for each in other:
            self.write(each.strip(), "d", "b")

    def do_cvt(self, it: Instruction) -> None:
        kinds, to, source = it.code[1:-2], it.code[-2], it.code[-1]
        if to == "bf16x2" and kinds == ("rn",):
            high, low = (f"do.to_bfloat16({self.read(x, 'f4')}).astype('u4')" for x in it.operands[1:])
            self.write(it.operands[0], f"({high} << np.uint32(16)) | {low}", "u4")
            return
        value, dtype = self.read(it.operands[1], TYPES[source]), TYPES[to]
        if source == "bf16":
            value = f"do.from_bfloat16({value})"
        if "ftz" in kinds:
            value = f"do.flush({value})"
        rounds = [kind for kind in kinds if kind[:1] == "r"]
        if to == "bf16":
            if source != "f32" or rounds != ["rn"]:
                raise ValueError("unknown")
            value = f"do.to_bfloat16({value})"
        elif dtype[0] in "ui" and TYPES[source][0] == "f":
            value = f"do.to_integer({value}, np.dtype({dtype!r}), {rounds[0]!r})"
        elif rounds and rounds[0][-1] == "i":
            value = f"do.round_to_integer({value}, {rounds[0]!r}).astype({dtype!r})"
        elif rounds in ([], ["rn"]) and "sat" not in kinds:
            value = f"{value}.astype({dtype!r})"
        else:
            raise ValueError("unknown")
        self.write(it.operands[0], value, dtype)

    # ---- Memory ----

    def access(self, it: Instruction, address: Address, parts: int) -> str:
        space = next((x for x in it.code if x in ("global", "shared", "local", "param", "const")), "generic")
        if set(it.code) & {"volatile", "acquire", "release", "relaxed", "async"}:
            raise ValueError("unknown")
        at = self.address(address)
        return f"{at}, {self.mask}, {TYPES[it.code[-1]]!r}, {parts}, {space!r}, {self.place(it)!r}"

    def address(self, address: Address) -> str:
        if address.base[0] != "%":
            return f"{self.program.constant(address.base, 'u8')} + np.uint64({address.offset})"
        width = self.program.kernel.width(address.base)
        at = self.read(address.base, f"u{width}") + ("" if width == 8 else ".astype('u8')")
        return f"{at} + np.uint64({address.offset % 2**64})" if address.offset else at

    def do_ld(self, it: Instruction) -> None:
        to = it.operands[0] if isinstance(it.operands[0], tuple) else (it.operands[0],)
        self.lines.append(f"v = M.load({self.access(it, it.operands[1], len(to))})")
        for i, each in enumerate(to):
            self.write(each, f"v[{i}]", TYPES[it.code[-1]])

    def do_st(self, it: Instruction) -> None:
        source = it.operands[1] if isinstance(it.operands[1], tuple) else (it.operands[1],)
        values = ", ".join(self.read(x, TYPES[it.code[-1]]) for x in source)
        self.lines.append(f"M.store([{values}], {self.access(it, it.operands[0], len(source))})")

    def do_ldmatrix(self, it: Instruction) -> None:
        self.lines.append(f"v = {self.matrices(it, 'load')}")
        for i, each in enumerate(it.operands[0]):
            self.write(each, f"v[{i}]", "u4")

    def do_stmatrix(self, it: Instruction) -> None:
        self.lines.append(self.matrices(it, "store"))

    def matrices(self, it: Instruction, how: str) -> str:
        """Of each warp, matrix i has its rows of 16 bytes where threads 8 i to 8 i + 7 say; a thread has four bytes."""
        if it.code[1:4] != ("sync", "aligned", "m8n8") or it.code[-2:] != ("shared", "b16") or self.masked or it.guard:
            raise ValueError("unknown")
        address, parts = it.operands[1 if how == "load" else 0], it.operands[0 if how == "load" else 1]
        values = f"[{', '.join(self.read(x, 'u4') for x in parts)}], " if how == "store" else ""
        return f"M.{how}_matrices({values}{self.address(address)}, {len(parts)}, {self.place(it)!r})"

    def place(self, it: Instruction) -> tuple[int, str, str]:
        return it.line, it.text, it.source

    # ---- Threads together ----

    def do_bar(self, it: Instruction) -> None:
        if it.code not in (("bar", "sync"), ("bar", "warp", "sync")):
            raise ValueError("unknown")
        if it.code[1] != "warp" and it.operands[1:] not in ((), (str(self.program.threads),)):
            raise ValueError("a barrier of a part of a block")
        self.lines.append(f"M.watch.barrier({'None' if it.code[1] != 'warp' else 'M.all if m is None else m'})")

    def do_shfl(self, it: Instruction) -> None:
        to, *inside = (x.strip() for x in it.operands[0].split("|"))
        by, clamp = (self.read(x, "u4") for x in it.operands[2:4])
        self.lines.append(f"i, p = M.shuffled({it.code[2]!r}, {by}, {clamp}, {self.mask})")
        self.write(to, f"{self.read(it.operands[1], 'u4')}[i]", "u4")
        for each in inside:
            self.write(each, "p", "b")

    def do_redux(self, it: Instruction) -> None:
        how = {"add": "add", "min": "minimum", "max": "maximum", "and": "bitwise_and", "or": "bitwise_or"}[it.code[2]]
        dtype = TYPES[it.code[3]]
        value = f"np.{how}.reduce({self.read(it.operands[1], dtype)}.reshape(-1, 32), axis=1, dtype={dtype!r})"
        if self.masked or it.guard:
            raise ValueError("of a part of a warp")
        self.write(it.operands[0], f"np.repeat({value}, 32)", dtype)

    def do_mma(self, it: Instruction) -> None:
        shape, kind = it.code[3], it.code[7]
        if self.masked or it.guard or it.code[4:6] != ("row", "col") or kind not in ("tf32", "f64"):
            raise ValueError("unknown")
        of, dtype = ("u4", "f4") if kind == "tf32" else ("f8", "f8")
        parts = [
            "[" + ", ".join(self.read(x, of if i < 2 else dtype) for x in part) + "]"
            for i, part in enumerate(it.operands[1:4])
        ]
        self.lines.append(f"v = do.multiply_matrices({shape!r}, {kind!r}, {', '.join(parts)})")
        for i, each in enumerate(it.operands[0]):
            self.write(each, f"v[{i}]", dtype)
