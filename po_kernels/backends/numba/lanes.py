"""Lane values for Numba: a SIMD vector with a row in each lane, the same with a derivative, and pointers to them.

Row code is written once, as functions on whatever a pointer into the scratch memory points at: `Lanes` of float32
or float64, or `Dual` lanes of float64, a value and its derivative, on which the code of a loss and its gradient gives
the derivatives of both. Operators become vector instructions as they stand, so that nothing depends on LLVM finding
loops to vectorise. `stop(x)` drops a derivative; `output(x)` is what is put out: a value, or on duals its derivative.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

BYTES = 64  # of a vector of floats: what one AVX-512 register holds, and two or four of other machines
PER_LINE = 64

_I32 = ir.IntType(32)

# Products and sums may be fused. Nothing else is relaxed: inf, nan and the order of sums stand as written.
_FUSED = ("contract",)


# Row code allocates nothing, so that no references are counted.
_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}
HELPER: Any = {**_OPTIONS, "no_cpython_wrapper": True}
INLINED: Any = {**HELPER, "forceinline": True}


def helper(function: Callable[..., Any]) -> Any:
    """Compiled into its callers, and never called from Python."""
    return njit(**HELPER)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A helper whose call would cost as much as its work."""
    return njit(**INLINED)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled at the first call, kept on disk, and run without the interpreter's lock."""
    return njit(**_OPTIONS, cache=True)(function)


# ---- Types ----


class Lanes(types.Type):
    """`width` numbers of a scalar type, one a row."""

    def __init__(self, element: Any, width: int) -> None:
        self.element, self.width = element, width
        super().__init__(name=f"Lanes({element}, {width})")


class Dual(types.Type):
    """Lanes with the derivative of each."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        super().__init__(name=f"Dual({lanes})")


class Pointer(types.Type):
    """To consecutive Lanes or Duals, aligned to a cache line."""

    def __init__(self, item: Any) -> None:
        self.item = item
        super().__init__(name=f"Pointer({item})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vector(fe_type))


@register_model(Dual)
class _DualModel(models.StructModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, [("v", fe_type.lanes), ("t", fe_type.lanes)])


@register_model(Pointer)
class _PointerModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, dmm.lookup(fe_type.item).get_data_type().as_pointer())


def _vector(lanes: Lanes) -> ir.VectorType:
    return ir.VectorType(_scalar(lanes.element), lanes.width)


def _scalar(element: Any) -> ir.Type:
    if isinstance(element, types.Float):
        return ir.FloatType() if element.bitwidth == 32 else ir.DoubleType()
    return ir.IntType(1 if element == types.boolean else element.bitwidth)


def _lanes_of(item: Any) -> Lanes:
    return item.lanes if isinstance(item, Dual) else item


def _bytes_of(lanes: Lanes) -> int:
    return lanes.width * lanes.element.bitwidth // 8


def _is_value(ty: Any) -> bool:
    return isinstance(ty, Lanes | Dual)


def _is_float(ty: Any) -> bool:
    return _is_value(ty) and isinstance(_lanes_of(ty).element, types.Float)


# ---- Values in LLVM: (lanes, derivative or None) ----


def _constant(lanes: Lanes, value: float) -> ir.Constant:
    return ir.Constant(_vector(lanes), [value] * lanes.width)


def _splat(builder, scalar, lanes: Lanes):
    empty = ir.Constant(_vector(lanes), ir.Undefined)
    first = builder.insert_element(empty, scalar, _I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_I32, lanes.width), [0] * lanes.width))


def _parts(context, builder, ty: Any, value, lanes: Lanes) -> tuple[Any, Any]:
    """Of an operand, where a plain number stands for itself in all lanes."""
    if isinstance(ty, Lanes):
        return value, None
    if isinstance(ty, Dual):
        return builder.extract_value(value, 0), builder.extract_value(value, 1)
    return _splat(builder, context.cast(builder, value, ty, lanes.element), lanes), None


def _whole(context, builder, ty: Any, v, t=None):
    """A value of type `ty` from its parts."""
    if isinstance(ty, Lanes):
        return v
    pair = cgutils.create_struct_proxy(ty)(context, builder)
    pair.v = v
    pair.t = _constant(ty.lanes, 0.0) if t is None else t
    return pair._getvalue()


# ---- Operators ----


def _fused(builder, name: str, a, b):
    return getattr(builder, name)(a, b, flags=_FUSED)


def _add(builder, av, at, bv, bt):
    t = _fused(builder, "fadd", at, bt) if at and bt else at or bt
    return _fused(builder, "fadd", av, bv), t


def _subtract(builder, av, at, bv, bt):
    t = _fused(builder, "fsub", at, bt) if at and bt else at or (bt and builder.fneg(bt))
    return _fused(builder, "fsub", av, bv), t


def _multiply(builder, av, at, bv, bt):
    left = bt and _fused(builder, "fmul", av, bt)
    right = at and _fused(builder, "fmul", at, bv)
    t = _fused(builder, "fadd", left, right) if left and right else left or right
    return _fused(builder, "fmul", av, bv), t


def _divide(builder, av, at, bv, bt):
    y = builder.fdiv(av, bv)
    if at is None and bt is None:
        return y, None
    slope = bt and _fused(builder, "fmul", y, bt)
    top = _fused(builder, "fsub", at, slope) if at and slope else at or builder.fneg(slope)
    return y, builder.fdiv(top, bv)


_OPERATORS: dict[Any, tuple[Callable[..., Any] | None, str | None]] = {
    # on floats, and on integers
    operator.add: (_add, "add"),
    operator.sub: (_subtract, "sub"),
    operator.mul: (_multiply, "mul"),
    operator.truediv: (_divide, None),
    operator.and_: (None, "and_"),
    operator.or_: (None, "or_"),
    operator.xor: (None, "xor"),
    operator.lshift: (None, "shl"),
    operator.rshift: (None, "shr"),
}
_COMPARISONS = {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
}  # fmt: skip


def _common(a: Any, b: Any) -> Any:
    """The type of a result of a and b, one a value and the other of its lanes, or a number."""
    for x, y in ((a, b), (b, a)):
        if _is_value(x) and (isinstance(y, types.Number) or y == x or y == _lanes_of(x)):
            return x
    return None


_PAIRS = [
    (a, b) for a in (Lanes, Dual, types.Number) for b in (Lanes, Dual, types.Number) if (a, b) != (types.Number,) * 2
]


def _define_operator(op: Any, on_floats: Callable[..., Any] | None, on_integers: str | None) -> None:
    @type_callable(op)
    def typing(context):
        def typer(a, b):
            result = _common(a, b)
            if result is None or (on_floats if _is_float(result) else on_integers) is None:
                return None
            return result

        return typer

    def lowering(context, builder, sig, args):
        lanes = _lanes_of(sig.return_type)
        (av, at), (bv, bt) = (_parts(context, builder, *x, lanes) for x in zip(sig.args, args, strict=True))
        if _is_float(lanes):
            return _whole(context, builder, sig.return_type, *on_floats(builder, av, at, bv, bt))
        name = ("ashr" if lanes.element.signed else "lshr") if on_integers == "shr" else on_integers
        return getattr(builder, name)(av, bv)

    for pair in _PAIRS:
        lower_builtin(op, *pair)(lowering)


def _define_comparison(op: Any, symbol: str) -> None:
    """Of values, their derivatives left aside; a mask."""

    @type_callable(op)
    def typing(context):
        def typer(a, b):
            result = _common(a, b)
            return None if result is None else Lanes(types.boolean, _lanes_of(result).width)

        return typer

    def lowering(context, builder, sig, args):
        lanes = _lanes_of(_common(*sig.args))
        (av, _), (bv, _) = (_parts(context, builder, *x, lanes) for x in zip(sig.args, args, strict=True))
        if _is_float(lanes):
            return (builder.fcmp_unordered if symbol == "!=" else builder.fcmp_ordered)(symbol, av, bv)
        return (builder.icmp_signed if lanes.element.signed else builder.icmp_unsigned)(symbol, av, bv)

    for pair in _PAIRS:
        lower_builtin(op, *pair)(lowering)


for _op, (_floats, _integers) in _OPERATORS.items():
    _define_operator(_op, _floats, _integers)
for _op, _symbol in _COMPARISONS.items():
    _define_comparison(_op, _symbol)


@type_callable(operator.neg)
def _type_neg(context):
    return lambda x: x if _is_float(x) else None


@lower_builtin(operator.neg, Lanes)
@lower_builtin(operator.neg, Dual)
def _lower_neg(context, builder, sig, args):
    v, t = _parts(context, builder, sig.args[0], args[0], _lanes_of(sig.args[0]))
    return _whole(context, builder, sig.return_type, builder.fneg(v), t and builder.fneg(t))


# ---- Memory ----


def _places(builder, pointer: Pointer, address) -> list[Any]:
    """Addresses of the value and, on duals, of the derivative."""
    if isinstance(pointer.item, Lanes):
        return [address]
    return [builder.gep(address, [_I32(0), _I32(part)], inbounds=True) for part in (0, 1)]


def _lane_address(builder, place, lane):
    """Of one number in a vector in memory."""
    first = builder.bitcast(place, place.type.pointee.element.as_pointer())
    return builder.gep(first, [lane], inbounds=True)


def _alignment(pointer: Pointer) -> int:
    return min(PER_LINE, _bytes_of(_lanes_of(pointer.item)))


@type_callable(operator.getitem)
def _type_getitem(context):
    return lambda p, i: p.item if isinstance(p, Pointer) and isinstance(i, types.Integer) else None


@lower_builtin(operator.getitem, Pointer, types.Integer)
def _lower_getitem(context, builder, sig, args):
    pointer = sig.args[0]
    address = builder.gep(args[0], [args[1]], inbounds=True)
    parts = [builder.load(place, align=_alignment(pointer)) for place in _places(builder, pointer, address)]
    return _whole(context, builder, sig.return_type, *parts)


@type_callable(operator.setitem)
def _type_setitem(context):
    def typer(p, i, x):
        if isinstance(p, Pointer) and isinstance(i, types.Integer) and _common(p.item, x) == p.item:
            return types.none
        return None

    return typer


@lower_builtin(operator.setitem, Pointer, types.Integer, types.Any)
def _lower_setitem(context, builder, sig, args):
    pointer, _, ty = sig.args
    lanes = _lanes_of(pointer.item)
    v, t = _parts(context, builder, ty, args[2], lanes)
    address = builder.gep(args[0], [args[1]], inbounds=True)
    places = _places(builder, pointer, address)
    for part, place in zip((v, _constant(lanes, 0.0) if t is None else t), places, strict=False):
        builder.store(part, place, align=_alignment(pointer))
    return context.get_dummy_value()


@type_callable(operator.add)
def _type_advance(context):
    return lambda p, i: p if isinstance(p, Pointer) and isinstance(i, types.Integer) else None


@lower_builtin(operator.add, Pointer, types.Integer)
def _lower_advance(context, builder, sig, args):
    return builder.gep(args[0], [args[1]], inbounds=True)


def lanes_of_dtype(dtype: Any) -> Any:
    """What rows are computed in with scratch memory of this type: complex128 stands for duals."""
    if dtype == types.complex128:
        return Dual(lanes_of_dtype(types.float64))
    return Lanes(dtype, BYTES * 8 // dtype.bitwidth)


def width(dtype: Any) -> int:
    """Rows at once with scratch memory of this dtype."""
    return BYTES // (4 if dtype == np.float32 else 8)


@intrinsic
def lanes_in(typingctx, work):
    """The lane values in an array, from its first whole cache line on."""

    def generate(context, builder, sig, args):
        data = context.make_array(work)(context, builder, args[0]).data
        word = ir.IntType(64)
        address = builder.add(builder.ptrtoint(data, word), word(PER_LINE - 1))
        return builder.inttoptr(builder.and_(address, word(-PER_LINE)), context.get_value_type(sig.return_type))

    return Pointer(lanes_of_dtype(work.dtype))(work), generate


def _cast(item_of: Callable[[Any], Any]) -> Any:
    def define(typingctx, p):
        def generate(context, builder, sig, args):
            return builder.bitcast(args[0], context.get_value_type(sig.return_type))

        return Pointer(item_of(p.item))(p), generate

    return intrinsic(define)


# The same memory as lanes without derivatives, as 32-bit words, and as float64.
primals_in = _cast(_lanes_of)
words_in = _cast(lambda item: Lanes(types.uint32, _lanes_of(item).width))
doubles_in = _cast(lambda item: Lanes(types.float64, _lanes_of(item).width))


@intrinsic
def width_of(typingctx, p):
    count = _lanes_of(p.item).width
    return types.intp(p), lambda context, builder, sig, args: context.get_constant(types.intp, count)


@intrinsic
def is_dual(typingctx, p):
    dual = isinstance(p.item, Dual)
    return types.boolean(p), lambda context, builder, sig, args: context.get_constant(types.boolean, dual)


@intrinsic
def is_single(typingctx, x):
    """Whether the lanes are float32; a constant, so that of the two branches one is compiled."""
    single = _lanes_of(x).element == types.float32
    return types.boolean(x), lambda context, builder, sig, args: context.get_constant(types.boolean, single)


# ---- Making and taking apart ----


@intrinsic
def full(typingctx, p, x):
    """What `p` points at, with a number in all lanes, or with what lanes have."""

    def generate(context, builder, sig, args):
        v, t = _parts(context, builder, x, args[1], _lanes_of(p.item))
        return _whole(context, builder, sig.return_type, v, t)

    return p.item(p, x), generate


@intrinsic
def with_tangent(typingctx, p, v, t):
    """The lanes `v`, on duals with the derivative `t`."""

    def generate(context, builder, sig, args):
        return _whole(context, builder, sig.return_type, args[1], args[2])

    return p.item(p, v, t), generate


@intrinsic
def chain(typingctx, x, y, slope):
    """f(x) from its value y and derivative, both lanes."""

    def generate(context, builder, sig, args):
        _, t = _parts(context, builder, x, args[0], _lanes_of(x))
        return _whole(context, builder, x, args[1], t and _fused(builder, "fmul", t, args[2]))

    return x(x, y, slope), generate


@intrinsic
def shared(typingctx, p, value, tangent, i):
    """Number i of arrays that all rows share, as what `p` points at; only duals read its derivative."""
    lanes = _lanes_of(p.item)

    def generate(context, builder, sig, args):
        parts = []
        for ty, array in ((value, args[1]), (tangent, args[2]))[: 2 if isinstance(p.item, Dual) else 1]:
            number = builder.load(_row_address(context, builder, ty, array, args[3]))
            parts.append(_splat(builder, number, lanes))
        return _whole(context, builder, sig.return_type, *parts)

    return p.item(p, value, tangent, i), generate


def _part(index: int) -> Any:
    def define(typingctx, x):
        lanes = _lanes_of(x)

        def generate(context, builder, sig, args):
            part = _parts(context, builder, x, args[0], lanes)[index]
            return _constant(lanes, 0.0) if part is None else part

        return lanes(x), generate

    return intrinsic(define)


stop = _part(0)
tangent_of = _part(1)


@intrinsic
def output(typingctx, x):
    def generate(context, builder, sig, args):
        v, t = _parts(context, builder, x, args[0], _lanes_of(x))
        return v if t is None else t

    return _lanes_of(x)(x), generate


@intrinsic
def select(typingctx, mask, a, b):
    ty = _common(a, b)

    def generate(context, builder, sig, args):
        lanes = _lanes_of(ty)
        (av, at), (bv, bt) = (_parts(context, builder, *x, lanes) for x in zip((a, b), args[1:], strict=True))
        zero = None if at is None and bt is None else _constant(lanes, 0.0)
        t = None if zero is None else builder.select(args[0], zero if at is None else at, zero if bt is None else bt)
        return _whole(context, builder, ty, builder.select(args[0], av, bv), t)

    return ty(mask, a, b), generate


@intrinsic
def any_lane(typingctx, mask):
    def generate(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(mask.width))
        return builder.icmp_unsigned("!=", bits, bits.type(0))

    return types.boolean(mask), generate


@intrinsic
def all_lanes(typingctx, mask):
    def generate(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(mask.width))
        return builder.icmp_unsigned("==", bits, bits.type(-1))

    return types.boolean(mask), generate


@intrinsic
def element(typingctx, x, lane):
    """One lane's number, without its derivative."""

    def generate(context, builder, sig, args):
        v, _ = _parts(context, builder, x, args[0], _lanes_of(x))
        return builder.extract_element(v, args[1])

    return _lanes_of(x).element(x, lane), generate


@intrinsic
def number_at(typingctx, p, i, lane):
    """One lane's number of item i, without its derivative, by way of memory."""
    lanes = _lanes_of(p.item)

    def generate(context, builder, sig, args):
        item = builder.gep(args[0], [args[1]], inbounds=True)
        place = _places(builder, p, item)[0]
        return builder.load(_lane_address(builder, place, args[2]))

    return lanes.element(p, i, lane), generate


# ---- Conversions, a lane at a time ----


def _converted(to: Callable[[Any], Any], instruction: str) -> Any:
    def define(typingctx, x):
        result = Lanes(to(x.element), x.width)

        def generate(context, builder, sig, args):
            return getattr(builder, instruction)(args[0], _vector(result))

        return result(x), generate

    return intrinsic(define)


def _bits(element: Any) -> Any:
    return types.int32 if element.bitwidth == 32 else types.int64


def _float_of_bits(element: Any) -> Any:
    return types.float32 if element.bitwidth == 32 else types.float64


to_bits = _converted(_bits, "bitcast")
from_bits = _converted(_float_of_bits, "bitcast")
from_integer = _converted(_float_of_bits, "sitofp")
to_integer = _converted(_bits, "fptosi")
to_words = _converted(lambda element: types.uint32, "trunc")  # of wide ones
to_unsigned = _converted(lambda element: types.uint32, "fptoui")


@intrinsic
def to_double(typingctx, x):
    result = Lanes(types.float64, x.width)

    def generate(context, builder, sig, args):
        return args[0] if x == result else builder.fpext(args[0], _vector(result))

    return result(x), generate


@intrinsic
def from_word(typingctx, p, word):
    """Words below 2**31 as the numbers that `p` points at."""
    lanes = _lanes_of(p.item)
    return lanes(p, word), lambda context, builder, sig, args: builder.sitofp(args[1], _vector(lanes))


@intrinsic
def wide(typingctx, p, x):
    """A number in wide words, as many as `p` has lanes."""
    result = Lanes(types.uint64, _lanes_of(p.item).width)

    def generate(context, builder, sig, args):
        return _splat(builder, context.cast(builder, args[1], x, types.uint64), result)

    return result(p, x), generate


@intrinsic
def count_up(typingctx, p):
    """0, 1, 2, ... in wide words, as many as `p` has lanes."""
    result = Lanes(types.uint64, _lanes_of(p.item).width)
    return result(p), lambda context, builder, sig, args: ir.Constant(_vector(result), list(range(result.width)))


def _elementwise(name: str) -> Any:
    def define(typingctx, x):
        def generate(context, builder, sig, args):
            ty = args[0].type
            suffix = f"v{ty.count}f{_lanes_of(x).element.bitwidth}"
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ty, [ty]), f"{name}.{suffix}")
            return builder.call(function, args)

        return x(x), generate

    return intrinsic(define)


# Of lanes without derivatives; maths.py has the rest.
root_of_lanes = _elementwise("llvm.sqrt")
nearest = _elementwise("llvm.rint")
ceiling = _elementwise("llvm.ceil")


# ---- Rows in memory ----


class RowInput(NamedTuple):
    """Rows in a flat array, `stride` apart, and their derivatives without gaps, which only duals read."""

    value: Any
    tangent: Any
    stride: int


def _interleaved(builder, vectors: list[Any], count: int) -> list[Any]:
    """Index bits of (vector, lane) rotated by one: a lane's low bit is what was the vector's high one."""
    if len(vectors) == 1:
        return _rotated_alone(builder, vectors[0], count)
    half = len(vectors) // 2
    order = [i // 2 + i % 2 * count for i in range(count)]
    result = []
    for a, b in zip(vectors[:half], vectors[half:], strict=True):
        for shift in (0, count // 2):
            indices = [i + shift for i in order]
            result.append(builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, count), indices)))
    return result


def _rotated_alone(builder, vector, count: int) -> list[Any]:
    indices = [i // 2 + i % 2 * (count // 2) for i in range(count)]
    return [builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, count), indices))]


def _deinterleaved(builder, vectors: list[Any], count: int) -> list[Any]:
    """The inverse."""
    even = ir.Constant(ir.VectorType(_I32, count), [2 * i for i in range(count)])
    odd = ir.Constant(ir.VectorType(_I32, count), [2 * i + 1 for i in range(count)])
    pairs = [(vectors[i], vectors[i + 1]) for i in range(0, len(vectors), 2)]
    return [builder.shuffle_vector(*p, even) for p in pairs] + [builder.shuffle_vector(*p, odd) for p in pairs]


def _row_address(context, builder, array, value, at):
    return builder.gep(context.make_array(array)(context, builder, value).data, [at], inbounds=True)


def _loader(columns: int, part: int) -> Any:
    """(to, source, at, stride, last): `columns` numbers of each row to as many lane values at `to`.

    Row l starts at source[at + min(l, last) * stride], or at source[at + last[l] * stride] if `last` are words, one a
    lane. Part 0 is the values, part 1 the derivatives of duals.
    """

    def define(typingctx, to, source, at, stride, last):
        lanes = _lanes_of(to.item)
        count = lanes.width

        def generate(context, builder, sig, args):
            to_value, source_value, at_value, stride_value, last_value = args
            if part == 1 and not isinstance(to.item, Dual):
                return context.get_dummy_value()
            word = at_value.type
            block = ir.VectorType(_scalar(lanes.element), columns)
            rows = []
            for lane in range(count):
                if isinstance(last, Lanes):
                    row = builder.zext(builder.extract_element(last_value, _I32(lane)), word)
                else:
                    row = builder.select(builder.icmp_signed("<", last_value, word(lane)), last_value, word(lane))
                place = builder.add(at_value, builder.mul(row, stride_value))
                address = _row_address(context, builder, source, source_value, place)
                address = builder.bitcast(address, block.as_pointer()) if columns > 1 else address
                rows.append(builder.load(address, align=lanes.element.bitwidth // 8))
            for column, vector in enumerate(_to_lanes(builder, rows, columns, lanes)):
                item = builder.gep(to_value, [word(column)], inbounds=True)
                builder.store(vector, _places(builder, to, item)[part], align=_alignment(to))
            return context.get_dummy_value()

        return types.none(to, source, at, stride, last), generate

    return intrinsic(define)


def _to_lanes(builder, rows: list[Any], columns: int, lanes: Lanes) -> list[Any]:
    count = lanes.width
    if columns == 1:
        vector = ir.Constant(_vector(lanes), ir.Undefined)
        for lane, x in enumerate(rows):
            vector = builder.insert_element(vector, x, _I32(lane))
        return [vector]
    held = columns
    while held < count:  # neighbouring rows side by side, until vectors are full
        every = ir.Constant(ir.VectorType(_I32, 2 * held), list(range(2 * held)))
        rows = [builder.shuffle_vector(rows[i], rows[i + 1], every) for i in range(0, len(rows), 2)]
        held *= 2
    for _ in range(count.bit_length() - 1):
        rows = _interleaved(builder, rows, count)
    return rows


def _storer(columns: int) -> Any:
    """(source, to, at, stride): as many lane values from `source` on to `columns` numbers of each row of `to`."""

    def define(typingctx, source, to, at, stride):
        lanes = source.item
        count = lanes.width

        def generate(context, builder, sig, args):
            source_value, to_value, at_value, stride_value = args
            word = at_value.type
            vectors = []
            for column in range(columns):
                item = builder.gep(source_value, [word(column)], inbounds=True)
                vectors.append(builder.load(item, align=_alignment(source)))
            if columns == 1:
                rows = [builder.extract_element(vectors[0], _I32(lane)) for lane in range(count)]
            else:
                for _ in range(count.bit_length() - 1):
                    vectors = _deinterleaved(builder, vectors, count)
                rows = []
                for vector in vectors:
                    for first in range(0, count, columns):
                        some = ir.Constant(ir.VectorType(_I32, columns), list(range(first, first + columns)))
                        rows.append(builder.shuffle_vector(vector, vector, some))
            for lane, row in enumerate(rows):
                place = builder.add(at_value, builder.mul(word(lane), stride_value))
                address = _row_address(context, builder, to, to_value, place)
                address = builder.bitcast(address, row.type.as_pointer())
                builder.store(row, address, align=lanes.element.bitwidth // 8)
            return context.get_dummy_value()

        return types.none(source, to, at, stride), generate

    return intrinsic(define)


@intrinsic
def _put_all(typingctx, x, to, at):
    def generate(context, builder, sig, args):
        vector, address = args[0], _row_address(context, builder, to, args[1], args[2])
        if to.dtype == types.int64:  # labels
            vector = builder.zext(vector, ir.VectorType(ir.IntType(64), x.width))
        address = builder.bitcast(address, vector.type.as_pointer())
        builder.store(vector, address, align=to.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(x, to, at), generate


_load8, _load8_tangents = _loader(8, 0), _loader(8, 1)
_load1, _load1_tangents = _loader(1, 0), _loader(1, 1)
_store8, _store1 = _storer(8), _storer(1)


@helper
def _load_rows(to, source, columns, at, at_tangents, last):
    value, tangent, stride = source
    c = 0
    while c + 8 <= columns:
        _load8(to + c, value, at + c, stride, last)
        _load8_tangents(to + c, tangent, at_tangents + c, columns, last)
        c += 8
    while c < columns:
        _load1(to + c, value, at + c, stride, last)
        _load1_tangents(to + c, tangent, at_tangents + c, columns, last)
        c += 1


@helper
def load(to, source, columns, begin, count):
    """Rows [begin, begin + count) of a RowInput; the lanes past them repeat the last."""
    _load_rows(to, source, columns, begin * source.stride, begin * columns, count - 1)


@helper
def load_chosen(to, source, columns, words):
    """The rows of a RowInput that the words in the lanes say."""
    _load_rows(to, source, columns, 0, 0, words)


@helper
def load_weight(to, weight, begin, count):
    """Of each row, and 0 past the last: sums over rows go over whole vectors."""
    load(to, weight, 1, begin, count)
    to[0] = select(count_up(to) < count, to[0], full(to, 0.0))


@helper
def load_plain(to, values, columns, at, count):
    """Rows of numbers without derivatives, the first at values[at]."""
    c = 0
    while c + 8 <= columns:
        _load8(to + c, values, at + c, columns, count - 1)
        c += 8
    while c < columns:
        _load1(to + c, values, at + c, columns, count - 1)
        c += 1


@helper
def store(source, columns, to, at, count):
    """To `count` rows of `columns` numbers, the first at to[at]."""
    if count == width_of(source):
        c = 0
        while c + 8 <= columns:
            _store8(source + c, to, at + c, columns)
            c += 8
        while c < columns:
            _store1(source + c, to, at + c, columns)
            c += 1
    else:
        for c in range(columns):
            for lane in range(count):
                to[at + lane * columns + c] = number_at(source, c, lane)


@helper
def put(x, to, at, count):
    """One number a row, without its derivative."""
    if count == width_of_value(x):
        _put_all(stop(x), to, at)
    else:
        for lane in range(count):
            to[at + lane] = element(x, lane)


@helper
def lane_sum(x):
    """In float64 and in a fixed order."""
    total = 0.0
    for lane in range(width_of_value(x)):
        total += element(x, lane)
    return total


@intrinsic
def width_of_value(typingctx, x):
    count = _lanes_of(x).width
    return types.intp(x), lambda context, builder, sig, args: context.get_constant(types.intp, count)


# ---- Labels: a word a lane, looked up in what has an item a class ----


def _lane_addresses(context, builder, p: Pointer, pointer, words):
    """The address of each lane's own number, in items that differ from lane to lane."""
    lanes = _lanes_of(p.item)
    for lane in range(lanes.width):
        index = builder.zext(builder.extract_element(words, _I32(lane)), ir.IntType(64))
        item = builder.gep(pointer, [index], inbounds=True)
        for place in _places(builder, p, item):
            yield lane, _lane_address(builder, place, _I32(lane))


@intrinsic
def gather(typingctx, p, words):
    def generate(context, builder, sig, args):
        lanes = _lanes_of(p.item)
        parts = [ir.Constant(_vector(lanes), ir.Undefined)] * (2 if isinstance(p.item, Dual) else 1)
        for i, (lane, address) in enumerate(_lane_addresses(context, builder, p, *args)):
            which = i % len(parts)
            parts[which] = builder.insert_element(parts[which], builder.load(address), _I32(lane))
        return _whole(context, builder, sig.return_type, *parts)

    return p.item(p, words), generate


@intrinsic
def scatter_add(typingctx, p, words, x):
    def generate(context, builder, sig, args):
        parts = [part for part in _parts(context, builder, x, args[2], _lanes_of(p.item)) if part is not None]
        for i, (lane, address) in enumerate(_lane_addresses(context, builder, p, args[0], args[1])):
            change = builder.extract_element(parts[i % len(parts)], _I32(lane))
            builder.store(builder.fadd(builder.load(address), change), address)
        return context.get_dummy_value()

    return types.none(p, words, x), generate


@intrinsic
def load_labels(typingctx, p, labels, at, last):
    """Lane l has labels[at + min(l, last)]."""
    result = Lanes(types.uint32, _lanes_of(p.item).width)

    def generate(context, builder, sig, args):
        _, array, at_value, last_value = args
        word = at_value.type
        vector = ir.Constant(_vector(result), ir.Undefined)
        for lane in range(result.width):
            row = builder.select(builder.icmp_signed("<", last_value, word(lane)), last_value, word(lane))
            label = builder.load(_row_address(context, builder, labels, array, builder.add(at_value, row)))
            vector = builder.insert_element(vector, builder.trunc(label, _I32), _I32(lane))
        return vector

    return result(p, labels, at, last), generate
