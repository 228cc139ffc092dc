"""Vectors: one table of instruction sets, and the operations that plain loops cannot express.

LLVM vectorises the loops of the other files by itself. It needs help for

    microkernel   the inner loop of every product: a register tile of C, vectors of B, scalars of A
    transpose     lanes × lanes words transposed in registers, for packing
    copy_row, copy_strip      rows into a packed panel
    write_row, read_row       a row of a tile to and from memory
    address       where an array starts, as an integer (microkernels work on addresses)
    fma, larger, float_to_bits, get, put …       one instruction each

    microkernel:  C[MR, n] (+)= Σ_k A[:, k] ⊗ B[k, n]           n = 1 … NV vectors of LANES columns

           B panel, row k →  │ b0 │ b1 │ b2 │      loaded: NV vectors
                           ──┼────┼────┼────┤
        A[0, k] broadcast →  │ c00│ c01│ c02│      MR × NV accumulators stay in registers
        A[1, k]           →  │ c10│ c11│ c12│      for the whole loop over k; each step is
          ⋮                  │  ⋮ │  ⋮ │  ⋮ │      MR broadcasts and MR·NV multiply-adds

Operands are 32-bit words: one float32, or two bfloat16 adjacent along k. A step on pairs is two products in one
instruction (vdpbf16ps), or on other CPUs two float32 multiply-adds on the halves of the words, or `amx`; all around the
microkernel is the same. Numba sees bfloat16 arrays as uint16; f32(x) and to(array, x) convert, rounding to nearest
even.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import overload

from ..kernel_cache import target
from . import amx
from .jit import intrinsic


@dataclass(frozen=True)
class Isa:
    """One instruction set: its vectors, and the register tile that fills its register file.

    `rows` (MR) × `vectors` (NV) accumulators, plus NV vectors of B and a broadcast, must fit in the
    registers: 24 + 4 of 32 on AVX-512 and NEON, 12 + 3 of 16 on AVX2. `panel_k` (KC) is the depth at
    which a packed panel of B, KC × NR floats, takes at most a sixth of a 1 MB L2 cache. `ahead`: the inner
    loop is long enough to hide prefetches. `rounds`: one instruction rounds to bfloat16, but flushes subnormals to 0.
    `tiles`: bfloat16 is multiplied by `amx`, with its own rows. `dot4`: adds to each lane the dot product of four
    unsigned and four signed bytes, and `dot4_tiles`: so does `amx`. These are not of a row, but of the CPU.
    """

    name: str
    lanes: int
    rows: int
    vectors: int
    fused: bool
    bf16: str = ""
    panel_k: int = 768
    ahead: bool = False
    rounds: bool = False
    tiles: bool = False
    dot4: str = ""
    dot4_tiles: bool = False


# Measured on Zen 4 (dev/LOG.md): 8 × 48 reaches 95–98 % of the FMA peak. 48 divides GPT-2's widths.
_AVX512 = Isa("avx512", lanes=16, rows=8, vectors=3, fused=True, ahead=True)
_AVX512_BF16 = replace(_AVX512, name="avx512-bf16", bf16="llvm.x86.avx512bf16.dpbf16ps.512", rounds=True)
ISAS = (
    replace(_AVX512_BF16, name="amx", tiles=True),
    _AVX512_BF16,
    _AVX512,
    Isa("avx2", lanes=8, rows=6, vectors=2, fused=True),
    Isa("neon-bf16", lanes=4, rows=8, vectors=3, fused=True, bf16="llvm.aarch64.neon.bfdot.v4f32.v8bf16"),
    Isa("neon", lanes=4, rows=8, vectors=3, fused=True),
    Isa("generic", lanes=4, rows=4, vectors=2, fused=False),
)


def host_isa() -> Isa:
    """Return the table row for the CPU that Numba compiles for.

    It is chosen before compiling anything: LLVM aborts the process on a vector instruction that the target lacks.
    """
    has = {feature[1:] for feature in target()[1].split(",") if feature.startswith("+")}
    if platform.machine().lower() in ("arm64", "aarch64"):
        return _named("neon-bf16" if "bf16" in has else "neon")
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= has:
        tiles = {"avx512bf16", "amx-tile", "amx-bf16"} <= has
        row = _named("amx" if tiles else "avx512-bf16" if "avx512bf16" in has else "avx512")
        dot4 = "llvm.x86.avx512.vpdpbusd.512" if "avx512vnni" in has else ""
        return replace(row, dot4=dot4, dot4_tiles={"amx-tile", "amx-int8"} <= has)
    if {"avx2", "fma"} <= has:
        return replace(_named("avx2"), dot4="llvm.x86.avx512.vpdpbusd.256" if "avxvnni" in has else "")
    return _named("generic")


def _named(name: str) -> Isa:
    return next(isa for isa in ISAS if isa.name == name)


HOST = host_isa()
LANES, MR, NV, KC = HOST.lanes, HOST.rows, HOST.vectors, HOST.panel_k
NR = NV * LANES
MOST_ROWS, MOST_BLOCK = (amx.ROWS, amx.BLOCK) if HOST.tiles else (MR, 1)  # of any type; see `tile_rows`, `block`

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
BF16 = types.uint16


class BFloats(ir.Type):
    """<count x bfloat>, or bfloat. llvmlite has no such type, but LLVM needs only the name."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def _to_string(self) -> str:
        return f"<{self.count} x bfloat>" if self.count > 1 else "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloats) and other.count == self.count

    def __hash__(self) -> int:
        return hash(("bfloats", self.count))


def _at(bd: ir.IRBuilder, address: ir.Value, kind: ir.Type = F32) -> ir.Value:
    return bd.inttoptr(address, kind.as_pointer())


def _load(bd: ir.IRBuilder, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    vector = bd.load(bd.bitcast(bd.gep(pointer, [offset]), VECTOR.as_pointer()))
    vector.align = 4
    return vector


def _store(bd: ir.IRBuilder, value: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
    bd.store(value, bd.bitcast(bd.gep(pointer, [offset]), VECTOR.as_pointer())).align = 4


def _splat(bd: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undef = ir.Constant(VECTOR, ir.Undefined)
    first = bd.insert_element(undef, scalar, I32(0))
    return bd.shuffle_vector(first, undef, ir.Constant(INTEGERS, [0] * LANES))


def _multiply_add(bd: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a·b + c, fused if the CPU can (llvm.fma elsewhere would call libm for every lane)."""
    if not HOST.fused:
        return bd.fadd(bd.fmul(a, b), c)
    fn = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return bd.call(cgutils.get_or_insert_function(bd.module, fn, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _dot_add(bd: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a₀·b₀ + a₁·b₁ + c for the two bfloat16 in every lane of a and b."""
    if HOST.bf16:
        pairs = BFloats(2 * LANES)
        fn = cgutils.get_or_insert_function(bd.module, ir.FunctionType(VECTOR, [VECTOR, pairs, pairs]), HOST.bf16)
        return bd.call(fn, [c, bd.bitcast(a, pairs), bd.bitcast(b, pairs)])
    for half in (_low_half, _high_half):
        c = _multiply_add(bd, half(bd, a), half(bd, b), c)
    return c


def _low_half(bd: ir.IRBuilder, words: ir.Value) -> ir.Value:
    shift = ir.Constant(INTEGERS, [16] * LANES)
    return bd.bitcast(bd.shl(bd.bitcast(words, INTEGERS), shift), VECTOR)


def _high_half(bd: ir.IRBuilder, words: ir.Value) -> ir.Value:
    mask = ir.Constant(INTEGERS, [-65536] * LANES)
    return bd.bitcast(bd.and_(bd.bitcast(words, INTEGERS), mask), VECTOR)


def _prefetch(bd: ir.IRBuilder, pointer: ir.Value, locality: int = 3) -> None:
    fn = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    call = cgutils.get_or_insert_function(bd.module, fn, "llvm.prefetch.p0")
    bd.call(call, [bd.bitcast(pointer, I8.as_pointer()), I32(0), I32(locality), I32(1)])


WRITE, ADD = 0, 1  # what the microkernel does to C
LISTS = 3  # of cache lines to prefetch
TOGETHER = MR  # lines, and steps, per round
CACHE_LINE = 64  # bytes
STRIP = 4, 4 * MR  # bytes from row to row and from word to word of A, packed by `gemm.pack_columns`
IN_L2 = 2  # prefetch hint: L2 only


def _asker(
    bd: ir.IRBuilder, lists: list[list[ir.Value]], nothing: ir.Value, together: int
) -> Callable[..., Callable[[int], None]]:
    """Return a function of k that prepares the prefetches of the next `together` steps; lists as in `microkernel`."""
    ends = [bd.mul(lists[0][3], I64(together))]
    for _, _, _, rounds in lists[1:]:
        ends.append(bd.add(ends[-1], bd.mul(rounds, I64(together))))
    starts = [I64(0), *ends[:-1]]

    def ask_from(k: ir.Value) -> Callable[[int], None]:
        where, gap = nothing, I64(0)  # after the last list
        for start, end, (soon, its_gap, step, _) in reversed(list(zip(starts, ends, lists, strict=True))):
            here, rounds = bd.icmp_signed("<", k, end), bd.udiv(bd.sub(k, start), I64(together))
            where = bd.select(here, bd.add(soon, bd.mul(rounds, step)), where)
            gap = bd.select(here, its_gap, gap)
        return lambda n: _prefetch(bd, _at(bd, bd.add(where, bd.mul(gap, I64(n))), I8), locality=IN_L2)

    return ask_from


def _tile_loop(
    bd: ir.IRBuilder, multiply: Callable[..., ir.Value], nv: int, a: ir.Value, rs_a: ir.Value, cs_a: ir.Value,
    b: ir.Value, rs_b: ir.Value, words: ir.Value, ask_from: Callable[..., Callable[[int], None]] | None,
) -> list[list[ir.Value]]:  # fmt: skip
    """Emit the loop over k, leave the builder after it, and return the MR × nv accumulators.

    A loop that prefetches takes TOGETHER steps at a time; a second loop takes the rest.
    """
    rows = [_at(bd, bd.add(a, bd.mul(rs_a, I64(i))), I8) for i in range(MR)]

    def step(k: ir.Value, offset_a: ir.Value, row_b: ir.Value, *sums: ir.Value) -> list[ir.Value]:
        vectors = [_load(bd, row_b, I64(LANES * j)) for j in range(nv)]
        new = []
        for i in range(MR):
            scalar = bd.load(bd.bitcast(bd.gep(rows[i], [offset_a]), F32.as_pointer()))
            scalar.align = 2
            broadcast = _splat(bd, scalar)
            new += [multiply(bd, broadcast, vectors[j], sums[nv * i + j]) for j in range(nv)]
        return [bd.add(k, I64(1)), bd.add(offset_a, cs_a), bd.gep(row_b, [rs_b]), *new]

    def steps(count: int, state: list[ir.Value]) -> list[ir.Value]:
        """Emit `count` steps, at least once, repeated while that many remain."""
        entry, loop, end = bd.block, bd.append_basic_block("k"), bd.append_basic_block("done")
        bd.branch(loop)
        bd.position_at_end(loop)
        phis = [bd.phi(value.type) for value in state]
        ask = ask_from(phis[0]) if ask_from and count > 1 else None
        after = list(phis)
        for n in range(count):
            if ask:
                ask(n)
            after = step(*after)
        for phi, first, value in zip(phis, state, after, strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(value, loop)
        bd.cbranch(enough_for(count, after[0]), loop, end)
        bd.position_at_end(end)
        return after

    def enough_for(count: int, k: ir.Value) -> ir.Value:
        """Return k + count ≤ words, in a form that LLVM unrolls where it pays."""
        return bd.icmp_signed("<", k, bd.sub(words, I64(count - 1)))

    def steps_if_any(count: int, state: list[ir.Value]) -> list[ir.Value]:
        """Emit `steps`, skipped if fewer than `count` remain."""
        before, some, join = bd.block, bd.append_basic_block("some"), bd.append_basic_block("join")
        bd.cbranch(enough_for(count, state[0]), some, join)
        bd.position_at_end(some)
        after = steps(count, state)
        last = bd.block
        bd.branch(join)
        bd.position_at_end(join)
        phis = [bd.phi(value.type) for value in state]
        for phi, first, value in zip(phis, state, after, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, last)
        return phis

    state = [I64(0), I64(0), b, *[ir.Constant(VECTOR, None)] * (MR * nv)]
    sums = (steps_if_any(1, steps_if_any(TOGETHER, state)) if ask_from else steps(1, state))[3:]
    return [sums[nv * i : nv * (i + 1)] for i in range(MR)]


def _multiply_tiles(
    bd: ir.IRBuilder, nv: ir.Value, c: ir.Value, rs_c: ir.Value, a: ir.Value, rs_a: ir.Value, step_a: ir.Value,
    b: ir.Value, words: ir.Value, adding: ir.Value, prefetch: amx.Prefetch,
) -> None:  # fmt: skip
    """Emit `amx.multiply` for nv = 1 … NV; units as in `microkernel`, step_a in bytes."""
    rs_c = bd.mul(rs_c, I64(4))
    for n in range(1, NV + 1):
        with bd.if_then(bd.icmp_signed("==", nv, I64(n))):
            amx.multiply(bd, n, c, rs_c, a, rs_a, step_a, b, words, adding, prefetch)


@intrinsic
def configure(typingctx: Any, like: Any, rows: Any) -> Any:
    """Prepare this thread for products of `like`'s type by tiles of `rows`; needed where `amx` multiplies them."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        if like.dtype == BF16 and HOST.tiles:
            amx.configure(bd, args[1])
        return context.get_dummy_value()

    return types.void(like, types.int64), codegen


@intrinsic
def microkernel(
    typingctx: Any, like: Any, nv: Any, a: Any, rs_a: Any, b: Any, rs_b: Any, c: Any, rs_c: Any, words: Any, mode: Any,
    ahead: Any,
) -> Any:  # fmt: skip
    """C (R, nv·LANES) := or += A (R, words) · B (words, nv·LANES), words ≥ 1, R = `tile_rows(like)`.

    mode WRITE: C :=;  ADD: C +=.

    `like` is any array of the operands' type: float32, or uint16 for pairs of bfloat16. a, b and c are
    addresses; rs_a is in bytes, rs_b and rs_c in words. C is float32. rs_a is None if A is a strip from
    `gemm.pack_columns`: a separate type, so that its strides are constants. Tiles of `amx` take whole blocks of words,
    continue the sums of C, and `configure` has set their rows.

    `ahead` is None, or lists of cache lines to prefetch into L2 (soon, gap, step, rounds): round r covers R lines,
    `gap` bytes apart, from soon + r·step. Each step prefetches one line; all at once would delay the loads of B.
    Addresses are computed once per TOGETHER steps, since a step can hide few instructions. Steps of fewer than NV
    vectors hide none and do not prefetch, nor do leftover steps.
    """
    i64 = types.int64
    multiply = _dot_add if like.dtype == BF16 else _multiply_add
    asks = HOST.ahead and ahead != types.none
    signature = types.void(like, i64, i64, rs_a, i64, i64, i64, i64, i64, i64, ahead)
    is_strip, tiles = rs_a == types.none, like.dtype == BF16 and HOST.tiles

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _, nv, a, rs_a, b, rs_b, c, rs_c, words, mode, ahead = args
        lists = [[bd.extract_value(ahead, (i, j)) for j in range(4)] for i in range(LISTS)] if asks else []
        ask = _asker(bd, lists, b, amx.BLOCK if tiles else TOGETHER) if asks else None
        adding = bd.icmp_signed("==", mode, I64(ADD))
        if tiles:
            rs_a, step_a = (I64(amx.STRIP[0]), I64(amx.STRIP[1])) if is_strip else (rs_a, I64(amx.WIDTH))

            def prefetch(count: int, block: ir.Value, b: ir.Value) -> None:
                if ask and count == NV:
                    ask_one = ask(bd.mul(block, I64(amx.BLOCK)))
                    for line in range(amx.BLOCK):
                        ask_one(line)

            _multiply_tiles(bd, nv, c, rs_c, a, rs_a, step_a, b, words, adding, prefetch)
            return context.get_dummy_value()
        rs_a, cs_a = (I64(STRIP[0]), I64(STRIP[1])) if is_strip else (rs_a, I64(4))
        b, c = _at(bd, b), _at(bd, c)
        c_rows = [bd.gep(c, [bd.mul(rs_c, I64(i))]) for i in range(MR)]
        with bd.if_then(adding):
            for row in c_rows:  # C is needed after the loop
                for j in range(NV):
                    _prefetch(bd, bd.gep(row, [I64(LANES * j)]))
        finish = bd.append_basic_block("finish")
        choice = bd.switch(nv, finish)
        for n in range(1, NV + 1):
            block = bd.append_basic_block(f"tile{n}")
            choice.add_case(I64(n), block)
            bd.position_at_end(block)
            sums = _tile_loop(bd, multiply, n, a, rs_a, cs_a, b, rs_b, words, ask if n == NV else None)
            plus, write = bd.append_basic_block("plus"), bd.append_basic_block("write")
            bd.cbranch(adding, plus, write)
            bd.position_at_end(plus)
            for i in range(MR):
                for j in range(n):
                    old = _load(bd, c_rows[i], I64(LANES * j))
                    _store(bd, bd.fadd(old, sums[i][j]), c_rows[i], I64(LANES * j))
            bd.branch(finish)
            bd.position_at_end(write)
            for i in range(MR):
                for j in range(n):
                    _store(bd, sums[i][j], c_rows[i], I64(LANES * j))
            bd.branch(finish)
        bd.position_at_end(finish)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def transpose(typingctx: Any, dst: Any, rs_dst: Any, src: Any, rs_src: Any) -> Any:
    """dst[j, i] := src[i, j] for a block of LANES × LANES words, in registers.

    dst and src are addresses; the row stride of dst is in words, of src in bytes. There are log2(LANES) rounds; round s
    swaps, between vectors i and i + s, the off-diagonal blocks of s lanes.
    """
    signature = types.void(types.int64, types.int64, types.int64, types.int64)

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        dst, rs_dst, src, rs_src = args
        dst = _at(bd, dst)
        v = []
        for i in range(LANES):
            v.append(_load(bd, _at(bd, bd.add(src, bd.mul(rs_src, I64(i)))), I64(0)))
            v[-1].align = 2
        s = LANES // 2
        while s:
            keep = [j if not j & s else LANES + j - s for j in range(LANES)]
            move = [j + s if not j & s else LANES + j for j in range(LANES)]
            low, high = (ir.Constant(INTEGERS, m) for m in (keep, move))
            for i in range(LANES):
                if not i & s:
                    v[i], v[i + s] = (bd.shuffle_vector(v[i], v[i + s], low), bd.shuffle_vector(v[i], v[i + s], high))
            s //= 2
        for i in range(LANES):
            _store(bd, v[i], dst, bd.mul(rs_dst, I64(i)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """Return the address of an array's first element, as int64."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, bd, args[0]).data
        return bd.ptrtoint(data, I64)

    return types.int64(array), codegen


def _mirrored(bd: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Flip all bits but the sign of a negative float32; its own inverse."""
    return bd.xor(bits, bd.and_(bd.ashr(bits, I32(31)), I32(0x7FFFFFFF)))


@intrinsic
def to_rank(typingctx: Any, x: Any) -> Any:
    """Return an int32 that orders as the float32 does; NaN is beyond all numbers, on the side of its sign.

    A maximum of floats must propagate NaN, which costs six instructions; a maximum of integers costs one.
    """

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return _mirrored(bd, bd.bitcast(args[0], I32))

    return types.int32(types.float32), codegen


@intrinsic
def from_rank(typingctx: Any, x: Any) -> Any:
    """Return the float32 of an int32 from `to_rank`."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.bitcast(_mirrored(bd, args[0]), F32)

    return types.float32(types.int32), codegen


@intrinsic
def larger(typingctx: Any, x: Any, y: Any) -> Any:
    """Return the larger of two int32."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.select(bd.icmp_signed(">", *args), *args)

    return types.int32(types.int32, types.int32), codegen


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x·y + z in float32, fused if the CPU can."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        fn = ir.FunctionType(F32, [F32] * 3)
        return bd.call(cgutils.get_or_insert_function(bd.module, fn, "llvm.fmuladd.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def float_to_bits(typingctx: Any, x: Any) -> Any:
    """Return the 32 bits of a float32, as int32."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def bits_to_float(typingctx: Any, x: Any) -> Any:
    """Return the float32 with these 32 bits."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


def _copier(count: int) -> Any:
    """Return a function that packs one row of `count` words."""
    floats, integers, halves = (ir.VectorType(kind, count) for kind in (F32, I32, I16))

    @intrinsic
    def copy(typingctx: Any, like: Any, dst: Any, src: Any, rs_src: Any) -> Any:
        def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
            _, dst, src, rs_src = args
            if like.dtype == BF16:
                pair = []
                for where in (src, bd.add(src, rs_src)):
                    row = bd.load(_at(bd, where, halves))
                    row.align = 2
                    pair.append(bd.zext(row, integers))
                high = bd.shl(pair[1], ir.Constant(integers, [16] * count))
                words = bd.bitcast(bd.or_(pair[0], high), floats)
            else:
                words = bd.load(_at(bd, src, floats))
                words.align = 4
            bd.store(words, _at(bd, dst, floats)).align = 4
            return context.get_dummy_value()

        return types.void(like, types.int64, types.int64, types.int64), codegen

    return copy


# copy(like, dst, src, rs_src): words from one row of float32, or from two rows of bfloat16 adjacent along k, rs_src
# bytes apart.
copy_row = _copier(LANES)
copy_strip = _copier(MR)


HALVES = ir.VectorType(I16, LANES)


def _any_subnormal(bd: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return whether any of LANES float32 is subnormal."""
    magnitude = bd.and_(bd.bitcast(x, INTEGERS), ir.Constant(INTEGERS, [0x7FFFFFFF] * LANES))
    less = bd.sub(magnitude, ir.Constant(INTEGERS, [1] * LANES))  # 0 wraps to the largest integer
    lanes = bd.icmp_unsigned("<", less, ir.Constant(INTEGERS, [0x7FFFFF] * LANES))
    mask = ir.IntType(LANES)
    return bd.icmp_unsigned("!=", bd.bitcast(lanes, mask), mask(0))


def _round_natively(bd: ir.IRBuilder, x: ir.Value, count: int = LANES) -> ir.Value:
    """Round LANES float32, or one, to bfloat16 by the instruction described at `Isa.rounds`."""
    return bd.bitcast(bd.fptrunc(x, BFloats(count)), HALVES if count > 1 else I16)


def _round(bd: ir.IRBuilder, x: ir.Value, count: int = LANES) -> ir.Value:
    """Round LANES float32, or one, to bfloat16, to nearest even; NaN stays NaN."""
    words, halves = (INTEGERS, HALVES) if count > 1 else (I32, I16)

    def each(value: int) -> ir.Value:
        return ir.Constant(words, [value] * LANES if count > 1 else value)

    bits = bd.bitcast(x, words)
    odd = bd.and_(bd.lshr(bits, each(16)), each(1))
    rounded = bd.add(bits, bd.add(odd, each(0x7FFF)))
    number = bd.select(bd.fcmp_unordered("uno", x, x), bd.or_(bits, each(0x400000)), rounded)
    return bd.trunc(bd.lshr(number, each(16)), halves)


def _writer(exact: bool) -> Any:
    """Return write(like, dst, src): LANES float32 at address src, to address dst as `like` stores them."""

    @intrinsic
    def write(typingctx: Any, like: Any, dst: Any, src: Any) -> Any:
        def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
            x = _load(bd, _at(bd, args[2]), I64(0))
            dst = _at(bd, args[1], HALVES if like.dtype == BF16 else F32)
            if like.dtype != BF16:
                _store(bd, x, dst, I64(0))
            elif not HOST.rounds:
                bd.store(_round(bd, x), dst).align = 2
            elif not exact:
                bd.store(_round_natively(bd, x), dst).align = 2
            else:
                with bd.if_else(_any_subnormal(bd, x), likely=False) as (some, none):
                    with some:
                        bd.store(_round(bd, x), dst).align = 2
                    with none:
                        bd.store(_round_natively(bd, x), dst).align = 2
            return context.get_dummy_value()

        return types.void(like, types.int64, types.int64), codegen

    return write


write_row = _writer(exact=True)
write_operands = _writer(exact=False)  # see `to_operand`


def _load_row(bd: ir.IRBuilder, like: Any, src: ir.Value) -> ir.Value:
    """Return LANES numbers at address src, stored as `like`, as float32."""
    if like.dtype != BF16:
        return _load(bd, _at(bd, src), I64(0))
    halves = bd.load(_at(bd, src, HALVES))
    halves.align = 2
    return bd.bitcast(bd.shl(bd.zext(halves, INTEGERS), ir.Constant(INTEGERS, [16] * LANES)), VECTOR)


@intrinsic
def read_row(typingctx: Any, like: Any, dst: Any, src: Any) -> Any:
    """Read LANES numbers at address src, stored as `like`, to float32 at address dst."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _store(bd, _load_row(bd, like, args[2]), _at(bd, args[1]), I64(0))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64), codegen


@intrinsic
def get(typingctx: Any, where: Any) -> Any:
    """Return the float32 at an address."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.load(_at(bd, args[0]))

    return types.float32(types.int64), codegen


@intrinsic
def put(typingctx: Any, where: Any, x: Any) -> Any:
    """Write a float32 to an address."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        bd.store(args[1], _at(bd, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def get_half(typingctx: Any, where: Any) -> Any:
    """Return the word with the bfloat16 at an address as its low half, and 0 as its high half."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        half = bd.load(_at(bd, args[0], I16))
        half.align = 2
        return bd.bitcast(bd.zext(half, I32), F32)

    return types.float32(types.int64), codegen


def per_word(array):
    """Return elements per 32-bit word: 1 for float32, 2 for bfloat16."""
    raise NotImplementedError("for kernels")


@overload(per_word)
def _per_word(array):
    return (lambda array: 2) if array.dtype == BF16 else (lambda array: 1)


def tile_rows(array):
    """Return the rows of a tile for products of this type, up to MOST_ROWS."""
    raise NotImplementedError("for kernels")


@overload(tile_rows)
def _tile_rows(array):
    return (lambda array: amx.ROWS) if HOST.tiles and array.dtype == BF16 else (lambda array: MR)


def block(array):
    """Return the words along k that products of this type take at once, up to MOST_BLOCK."""
    raise NotImplementedError("for kernels")


@overload(block)
def _block(array):
    return (lambda array: amx.BLOCK) if HOST.tiles and array.dtype == BF16 else (lambda array: 1)


def f32(x):
    """Return a stored number as float32."""
    raise NotImplementedError("for kernels")


@overload(f32)
def _f32(x):
    if x == BF16:
        return lambda x: bits_to_float(np.int32(x) << np.int32(16))
    return lambda x: x


def to(array, x):
    """Return float32 x as `array` stores it; bfloat16 rounds to nearest even and keeps NaN."""
    raise NotImplementedError("for kernels")


@overload(to)
def _to(array, x):
    if array.dtype != BF16:
        return lambda array, x: x

    return lambda array, x: _rounded(x)


@intrinsic
def _rounded(typingctx: Any, x: Any) -> Any:
    """Return a float32 as bfloat16, in uint16; in 32 bits throughout, since Numba's int32 sums are int64."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return _round(bd, args[0], 1)

    return types.uint16(types.float32), codegen


@intrinsic
def _rounded_natively(typingctx: Any, x: Any) -> Any:
    """Round as `_rounded`, by the instruction described at `Isa.rounds`."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return _round_natively(bd, args[0], 1)

    return types.uint16(types.float32), codegen


def to_operand(array, x):
    """Convert as `to`, for operands of products: a subnormal may become 0, as products read it anyway."""
    raise NotImplementedError("for kernels")


@overload(to_operand)
def _to_operand(array, x):
    if array.dtype == BF16 and HOST.rounds:
        return lambda array, x: _rounded_natively(x)
    return lambda array, x: to(array, x)


def typed(words, like):
    """Return float32 scratch as elements of `like`'s type."""
    raise NotImplementedError("for kernels")


@overload(typed)
def _typed(words, like):
    if like.dtype == BF16:
        return lambda words, like: words.view(np.uint16)
    return lambda words, like: words
