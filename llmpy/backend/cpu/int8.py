"""Products with int8 weights: one scale for each 32 weights along k, and for each 32 inputs of a row.

    quantise   weight (OC, C) → panels of NR outputs, one after another. Each holds the scales (blocks, width) float16,
               then words (8·blocks, width) of four weights adjacent along k, each q + 128 in a byte
    linear     out := inp · weightᵀ + bias, or GELU or SwiGLU of that. A row of inp becomes blocks of 32 int8, a scale
               and −128·Σq; sums of 32 products are exact integers, and are scaled and added in the order of k

A weight is d·q with d = max|w|/127 of its block, as in GGUF's Q8_0. The unsigned byte is what one instruction
multiplies (vpdpbusd: 4 unsigned by 4 signed bytes, added in 32 bits; or tiles of `amx`, for more rows); the sum starts
from −128·Σq to compensate. Since integers are exact, a row is bitwise identical whatever other rows the batch holds,
and on every instruction set that fuses multiply-adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from . import amx
from .activation import activate
from .decode import AHEAD, start_sums, write_sums
from .gemm import panel_width
from .jit import fork, inline, intrinsic, kernel
from .simd import (
    BF16,
    F32,
    HOST,
    I8,
    I16,
    I32,
    I64,
    IN_L2,
    INTEGERS,
    LANES,
    MR,
    NR,
    NV,
    VECTOR,
    _at,
    _load,
    _load_row,
    _multiply_add,
    _prefetch,
    _splat,
    _store,
    address,
    float_to_bits,
    per_word,
)

BLOCK = 32  # weights per scale
WORDS = BLOCK // 4
BYTES = BLOCK + 2  # of a block of weights
ROW_BYTES = BLOCK + 8  # of a block of inputs: int8s, scale float32, −128·Σq int32
FEW_ROWS = MR // 2  # of a tile in vectors: its sums are held twice, as integers and as floats
ROWS = amx.ROWS if HOST.dot4_tiles else FEW_ROWS
TOGETHER = 32 // ROWS * ROWS  # rows that use a cut of the panel while it is in L1
CUT = 8  # blocks
BYTES_AHEAD = 4 * AHEAD  # from a load of weights to the prefetch
SMALLEST = 1e-37  # scales below are 0: their inverse could overflow
SCRATCH = (TOGETHER + 1) * NR  # floats per thread


def shape(OC: int, C: int) -> tuple[int, int]:
    """Return the shape, in bytes, of a quantised weight (OC, C)."""
    return -(-OC // LANES) * LANES, blocks_of(C) * BYTES


def blocks_of(C: int) -> int:
    """Return the number of blocks of C weights or inputs."""
    return -(-C // BLOCK)


def _each(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _dot4(bd: ir.IRBuilder, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """Return sums + the dot product of the four bytes in every lane of two vectors of words."""
    if HOST.dot4:
        fn = ir.FunctionType(INTEGERS, [INTEGERS] * 3)
        return bd.call(cgutils.get_or_insert_function(bd.module, fn, HOST.dot4), [sums, unsigned, signed])
    halves, wide = ir.VectorType(I16, 2 * LANES), ir.VectorType(I32, 2 * LANES)
    eight = _each(halves, 8)
    u, s = bd.bitcast(unsigned, halves), bd.bitcast(signed, halves)
    pairs = (
        (bd.and_(u, _each(halves, 255)), bd.ashr(bd.shl(s, eight), eight)),
        (bd.lshr(u, eight), bd.ashr(s, eight)),
    )
    for x, y in pairs:  # what LLVM knows as one instruction (pmaddwd)
        product = bd.mul(bd.sext(x, wide), bd.sext(y, wide))
        even, odd = (
            bd.shuffle_vector(
                product, ir.Constant(wide, ir.Undefined), ir.Constant(INTEGERS, list(range(i, 2 * LANES, 2)))
            )
            for i in (0, 1)
        )
        sums = bd.add(sums, bd.add(even, odd))
    return sums


def _half_floats(bd: ir.IRBuilder, where: ir.Value) -> ir.Value:
    """Return LANES positive float16 at a pointer as float32, exactly; no step has subnormals, which are slow."""
    halves = bd.load(bd.bitcast(where, ir.VectorType(I16, LANES).as_pointer()))
    halves.align = 2
    bits = bd.shl(bd.zext(halves, INTEGERS), _each(INTEGERS, 13))
    normal, subnormal = (bd.bitcast(bd.add(bits, _each(INTEGERS, bias << 23)), VECTOR) for bias in (112, 113))
    small = bd.icmp_unsigned("<", bits, _each(INTEGERS, 1 << 23))
    return bd.select(small, bd.fsub(subnormal, _each(VECTOR, 2.0**-14)), normal)


@intrinsic
def multiply_blocks(
    typingctx: Any, rows: Any, nv: Any, c: Any, rs_c: Any, a: Any, rs_a: Any, scales: Any, b: Any, blocks: Any
) -> Any:
    """C (rows, nv·LANES) += A (rows, blocks) · B (blocks, nv·LANES); each sum starts from the value in C.

    1 ≤ rows ≤ ROWS, 1 ≤ nv ≤ NV, blocks ≥ 1. All but rs_c (floats) are addresses and bytes.
    """
    i64 = types.int64

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        if not HOST.dot4_tiles:
            _by_vectors(bd, *args)
        else:
            with bd.if_else(bd.icmp_signed("<=", args[0], I64(FEW_ROWS))) as (few, many):
                with few:
                    _by_vectors(bd, *args)
                with many:
                    _by_tiles(bd, *args)
        return context.get_dummy_value()

    return types.void(i64, i64, i64, i64, i64, i64, i64, i64, i64), codegen


def _by_tiles(
    bd: ir.IRBuilder, rows: ir.Value, nv: ir.Value, c: ir.Value, rs_c: ir.Value, a: ir.Value, rs_a: ir.Value,
    scales: ir.Value, b: ir.Value, blocks: ir.Value,
) -> None:  # fmt: skip
    """Emit `multiply_blocks` by `amx`: while vectors scale the sums of a block, tiles compute those of the next."""
    size = 4 * amx.ROWS * NR
    room = cgutils.alloca_once(bd, ir.ArrayType(I8, 2 * size))
    room.align = 64
    room = bd.ptrtoint(room, I64)
    amx.configure(bd, rows, WORDS)

    def sums_of(block: ir.Value) -> ir.Value:
        return bd.add(room, bd.mul(bd.and_(block, I64(1)), I64(size)))

    def multiply(block: ir.Value, n: int) -> None:
        row_b = bd.add(b, bd.mul(block, I64(4 * WORDS * LANES * n)))
        for line in range(0, 4 * WORDS * LANES * n, 64):
            _prefetch(bd, _at(bd, bd.add(row_b, I64(BYTES_AHEAD + line)), I8), IN_L2)
        amx.multiply_bytes(bd, n, sums_of(block), bd.add(a, bd.mul(block, I64(ROW_BYTES))), rs_a, row_b)

    for n in range(1, NV + 1):
        with bd.if_then(bd.icmp_signed("==", nv, I64(n))):
            multiply(I64(0), n)
            with cgutils.for_range(bd, blocks, intp=I64) as block:
                following = bd.add(block.index, I64(1))
                with bd.if_then(bd.icmp_signed("<", following, blocks)):
                    multiply(following, n)
                row_a = bd.add(a, bd.mul(block.index, I64(ROW_BYTES)))
                row_s = bd.add(scales, bd.mul(block.index, I64(2 * LANES * n)))
                sums = sums_of(block.index)
                factors = [_half_floats(bd, _at(bd, bd.add(row_s, I64(2 * LANES * j)), I8)) for j in range(n)]
                with cgutils.for_range(bd, rows, intp=I64) as row:
                    about = _at(bd, bd.add(bd.add(row_a, bd.mul(rs_a, row.index)), I64(BLOCK)))
                    scale, start = (_splat(bd, bd.load(bd.gep(about, [I64(i)]))) for i in (0, 1))
                    line = _at(bd, bd.add(sums, bd.mul(row.index, I64(4 * LANES * n))))
                    line_c = bd.gep(_at(bd, c), [bd.mul(rs_c, row.index)])
                    for j in range(n):
                        found = bd.bitcast(_load(bd, line, I64(LANES * j)), INTEGERS)
                        found = bd.add(found, bd.bitcast(start, INTEGERS))
                        old = _load(bd, line_c, I64(LANES * j))
                        new = _multiply_add(bd, bd.sitofp(found, VECTOR), bd.fmul(factors[j], scale), old)
                        _store(bd, new, line_c, I64(LANES * j))


def _by_vectors(
    bd: ir.IRBuilder, rows: ir.Value, nv: ir.Value, c: ir.Value, rs_c: ir.Value, a: ir.Value, rs_a: ir.Value,
    scales: ir.Value, b: ir.Value, blocks: ir.Value,
) -> None:  # fmt: skip
    """Emit `multiply_blocks` for up to FEW_ROWS rows."""
    c, a, scales, b = _at(bd, c), _at(bd, a, I8), _at(bd, scales, I8), _at(bd, b, I8)
    finish = bd.append_basic_block("finish")
    choice = bd.switch(bd.add(bd.mul(rows, I64(NV + 1)), nv), finish)
    for m, n in ((m, n) for m in range(1, FEW_ROWS + 1) for n in range(1, NV + 1)):
        entry, loop, end = (bd.append_basic_block(f"{name}{m}x{n}") for name in ("tile", "block", "done"))
        choice.add_case(I64(m * (NV + 1) + n), entry)
        bd.position_at_end(entry)
        rows_c = [bd.gep(c, [bd.mul(rs_c, I64(i))]) for i in range(m)]
        start = [_load(bd, rows_c[i], I64(LANES * j)) for i in range(m) for j in range(n)]
        bd.branch(loop)
        bd.position_at_end(loop)
        k, row_a, row_s, row_b = bd.phi(I64), bd.phi(a.type), bd.phi(a.type), bd.phi(a.type)
        before = [bd.phi(VECTOR) for _ in start]
        rows_a = [bd.gep(row_a, [bd.mul(rs_a, I64(i))]) for i in range(m)]

        def word(i: int, offset: int, rows_a: Any = rows_a) -> Any:
            value = bd.load(bd.bitcast(bd.gep(rows_a[i], [I64(offset)]), F32.as_pointer()))
            value.align = 4
            return _splat(bd, value)

        sums = [bd.bitcast(word(i, BLOCK + 4), INTEGERS) for i in range(m) for _ in range(n)]
        for w in range(WORDS):
            vectors = []
            for j in range(n):
                place = bd.gep(row_b, [I64(4 * LANES * (w * n + j))])
                if 4 * LANES * (w * n + j) % 64 == 0:
                    _prefetch(bd, bd.gep(place, [I64(BYTES_AHEAD)]), IN_L2)
                vectors.append(bd.bitcast(_load(bd, bd.bitcast(place, F32.as_pointer()), I64(0)), INTEGERS))
            for i in range(m):
                signed = bd.bitcast(word(i, 4 * w), INTEGERS)
                for j in range(n):
                    sums[i * n + j] = _dot4(bd, sums[i * n + j], vectors[j], signed)
        factors = [_half_floats(bd, bd.gep(row_s, [I64(2 * LANES * j)])) for j in range(n)]
        after = []
        for i in range(m):
            scale = word(i, BLOCK)
            for j in range(n):
                whole = bd.sitofp(sums[i * n + j], VECTOR)
                after.append(_multiply_add(bd, whole, bd.fmul(factors[j], scale), before[i * n + j]))
        steps = (I64(1), I64(ROW_BYTES), I64(2 * LANES * n), I64(BLOCK * LANES * n))
        moved = [bd.add(k, steps[0])]
        moved += [bd.gep(p, [by]) for p, by in zip((row_a, row_s, row_b), steps[1:], strict=True)]
        phis = (k, row_a, row_s, row_b, *before)
        for phi, first, then in zip(phis, (I64(0), a, scales, b, *start), (*moved, *after), strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(then, loop)
        bd.cbranch(bd.icmp_signed("<", moved[0], blocks), loop, end)
        bd.position_at_end(end)
        for i in range(m):
            for j in range(n):
                _store(bd, after[i * n + j], rows_c[i], I64(LANES * j))
        bd.branch(finish)
    bd.position_at_end(finish)


@intrinsic
def quantise_block(typingctx: Any, like: Any, dst: Any, src: Any, count: Any) -> Any:
    """Block at address dst := `count` numbers at address src, stored as `like`: int8s, scale, −128·Σq.

    Beyond `count` ≥ 1 numbers are 0, up to BLOCK. q = x/d rounded, halves away from zero, d = max|x|/127.
    If a number is not finite, d is not.
    """

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _, dst, src, count = args
        dst, size = _at(bd, dst, I8), 2 if like.dtype == BF16 else 4
        padded = cgutils.alloca_once(bd, ir.ArrayType(F32, BLOCK))
        part = bd.icmp_signed("<", count, I64(BLOCK))
        with bd.if_then(part, likely=False):
            cgutils.memset(bd, padded, I64(4 * BLOCK), 0)
            cgutils.raw_memcpy(bd, bd.bitcast(padded, I8.as_pointer()), _at(bd, src, I8), bd.mul(count, I64(size)), 1)
        src = bd.select(part, bd.ptrtoint(padded, I64), src)
        places = [bd.add(src, I64(size * LANES * j)) for j in range(BLOCK // LANES)]
        vectors = [_load_row(bd, like, place) for place in places]
        top = _each(INTEGERS, 0)
        for x in vectors:  # as integers: they order as |x|, and NaN above all
            magnitude = bd.and_(bd.bitcast(x, INTEGERS), _each(INTEGERS, 0x7FFFFFFF))
            top = bd.select(bd.icmp_signed(">", magnitude, top), magnitude, top)
        d = bd.fdiv(bd.bitcast(_reduce(bd, "smax", top), F32), ir.Constant(F32, 127.0))
        usable = bd.fcmp_ordered(">", d, ir.Constant(F32, SMALLEST))
        inverse = _splat(bd, bd.select(usable, bd.fdiv(ir.Constant(F32, 1.0), d), ir.Constant(F32, 0.0)))
        total = _each(INTEGERS, 0)
        for j, x in enumerate(vectors):
            y = bd.fmul(x, inverse)
            sign = bd.and_(bd.bitcast(y, INTEGERS), _each(INTEGERS, -(1 << 31)))
            half = bd.bitcast(bd.or_(sign, bd.bitcast(_each(VECTOR, 0.5), INTEGERS)), VECTOR)
            q = bd.fptosi(bd.fadd(y, half), INTEGERS)
            total = bd.add(total, q)
            int8s = ir.VectorType(I8, LANES)
            bd.store(bd.trunc(q, int8s), bd.bitcast(bd.gep(dst, [I64(LANES * j)]), int8s.as_pointer())).align = 4
        bd.store(d, bd.bitcast(bd.gep(dst, [I64(BLOCK)]), F32.as_pointer()))
        compensation = bd.mul(_reduce(bd, "add", total), I32(-128))
        bd.store(compensation, bd.bitcast(bd.gep(dst, [I64(BLOCK + 4)]), I32.as_pointer()))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.int64), codegen


def _reduce(bd: ir.IRBuilder, how: str, x: ir.Value) -> ir.Value:
    """Return the sum or maximum of a vector of integers."""
    fn = ir.FunctionType(I32, [INTEGERS])
    return bd.call(cgutils.get_or_insert_function(bd.module, fn, f"llvm.vector.reduce.{how}.v{LANES}i32"), [x])


@inline
def _to_half(x):
    """Return a float32 in 0 … 65504 as the bits of a float16, rounded to nearest even."""
    if x < np.float32(2.0**-14):
        return np.uint16(np.rint(x * np.float32(2.0**24)))
    bits = np.int64(float_to_bits(x))
    return np.uint16((bits - (112 << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13)


@inline
def _quantise_panel(worker, item, packed, weight, scratch):
    OC, C = weight.shape
    col = item * NR
    cols, blocks = min(NR, OC - col), (C + BLOCK - 1) // BLOCK
    width = panel_width(cols)
    panel = packed.reshape(-1)[col * blocks * BYTES : (col + width) * blocks * BYTES]
    scales, words = panel[: 2 * blocks * width].view(np.uint16), panel[2 * blocks * width :]
    one = scratch[worker, : ROW_BYTES // 4]
    q = one.view(np.int8)
    scales[:] = 0
    words[:] = 128
    for j in range(cols):
        for b in range(blocks):
            quantise_block(weight, address(one), address(weight) + 4 * ((col + j) * C + b * BLOCK), C - b * BLOCK)
            scales[b * width + j] = _to_half(one[BLOCK // 4])
            for k in range(BLOCK):
                words[((b * WORDS + k // 4) * width + j) * 4 + k % 4] = np.uint8(128 + q[k])


@kernel
def quantise(
    threads,  # int
    packed,   # `shape` u8 :=
    weight,   # (OC, C) f32, finite
    scratch,  # (threads, ≥ SCRATCH) f32
):  # fmt: skip
    fork(_quantise_panel, threads, (weight.shape[0] + NR - 1) // NR, (packed, weight, scratch))


@inline
def _quantise_row(worker, item, rows, inp):
    C = inp.shape[1]
    blocks, size = (C + BLOCK - 1) // BLOCK, 4 // per_word(inp)
    dst, src = address(rows) + item * blocks * ROW_BYTES, address(inp) + size * item * C
    for b in range(blocks):
        quantise_block(inp, dst + b * ROW_BYTES, src + size * b * BLOCK, C - b * BLOCK)


@inline
def _linear_item(worker, item, out, pre, rows, packed, bias, C, scratch):
    BT, OC, blocks = out.shape[0], out.shape[1], (C + BLOCK - 1) // BLOCK
    col = item * NR
    cols = min(NR, OC - col)
    width = panel_width(cols)
    scales = address(packed) + col * blocks * BYTES
    sums, part = scratch[worker, : TOGETHER * NR], scratch[worker, TOGETHER * NR :]
    for row in range(0, BT, TOGETHER):
        some = min(TOGETHER, BT - row)
        start_sums(sums, bias, col, some, cols)
        cut = CUT if some > ROWS else blocks
        for k in range(0, blocks, cut):
            b = scales + 2 * blocks * width + k * BLOCK * width
            for i in range(0, some, ROWS):
                a = address(rows) + ((row + i) * blocks + k) * ROW_BYTES
                c, few, stride = address(sums) + 4 * i * width, min(ROWS, some - i), blocks * ROW_BYTES
                multiply_blocks(
                    few, width // LANES, c, width, a, stride, scales + 2 * k * width, b, min(cut, blocks - k)
                )
        write_sums(out, pre, row, col, some, cols, sums, part)


@kernel
def int8_linear_forward(
    threads,   # int
    out,       # (BT, OC) :=
    pre,       # (BT, OC) or (BT, 2·OC) :=, or (0, 0) for none
    inp,       # (BT, C)
    packed,    # weight (columns of pre, C), from `quantise`
    bias,      # (columns of pre,) f32, or (0,) for none
    rows,      # (≥ BT·blocks·ROW_BYTES,) u8
    scratch,   # (threads, ≥ SCRATCH) f32
):  # fmt: skip
    paired = pre.shape[1] > out.shape[1]
    sums, before = (pre, pre[:0]) if paired else (out, pre)
    fork(_quantise_row, threads, inp.shape[0], (rows, inp))
    items = (sums.shape[1] + NR - 1) // NR
    fork(_linear_item, threads, items, (sums, before, rows, packed, bias, inp.shape[1], scratch))
    if paired:
        activate(threads, out, pre)
