"""Vectors: the one table per instruction set, and the four things that plain loops cannot say.

LLVM turns the loops of the other files into vector code by itself. It needs help for

    microkernel   the inner loop of every product: a register tile of C, vectors of B, scalars of A
    transpose     lanes × lanes numbers turned in registers, for packing
    address       where an array begins, as an integer (microkernels work on addresses)
    fma, maximum, copy_vector, get, put …        one instruction each

    microkernel:  C[MR, n] (+)= Σ_k A[:, k] ⊗ B[k, n]           n = 1 … NV vectors of LANES columns

           B panel, row k →  │ b0 │ b1 │ b2 │      loaded: NV vectors
                           ──┼────┼────┼────┤
        A[0, k] broadcast →  │ c00│ c01│ c02│      MR × NV accumulators live in registers
        A[1, k]           →  │ c10│ c11│ c12│      for the whole loop over k; each step is
          ⋮                  │  ⋮ │  ⋮ │  ⋮ │      MR broadcasts and MR·NV fused multiply-adds
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .jit import intrinsic


@dataclass(frozen=True)
class Isa:
    """One instruction set: its vectors and the register tile that fills its register file.

    `rows` (MR) × `vectors` (NV) accumulators, plus NV vectors of B and a broadcast, must fit in the
    registers: 24 + 4 of 32 on AVX-512 and NEON, 12 + 3 of 16 on AVX2. `panel_k` (KC) is the depth at
    which a packed panel of B, KC × NR floats, takes at most a sixth of a 1 MB L2 cache.
    """

    name: str
    lanes: int
    rows: int
    vectors: int
    fused: bool
    panel_k: int = 768


# Measured on Zen 4 (dev/LOG.md): 8 × 48 reaches 95–98 % of the FMA peak. 48 divides GPT-2's widths.
ISAS = (
    Isa("avx512", lanes=16, rows=8, vectors=3, fused=True),
    Isa("avx2", lanes=8, rows=6, vectors=2, fused=True),
    Isa("neon", lanes=4, rows=8, vectors=3, fused=True),
    Isa("generic", lanes=4, rows=4, vectors=2, fused=False),
)


def host_isa() -> Isa:
    """The row of the table for this CPU. NUMBA_CPU_FEATURES, if set, speaks for the CPU.

    Chosen before anything is compiled: LLVM aborts the whole process on a vector instruction that
    the target lacks.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return _named("neon")
    described = os.environ.get("NUMBA_CPU_FEATURES")
    if described is None and os.environ.get("NUMBA_CPU_NAME") == "generic":
        return _named("generic")
    if described is not None:
        has = {f[1:] for f in described.split(",") if f.startswith("+")}
    else:
        has = {name for name, present in llvm.get_host_cpu_features().items() if present}
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= has:
        return _named("avx512")
    if {"avx2", "fma"} <= has:
        return _named("avx2")
    return _named("generic")


def _named(name: str) -> Isa:
    return next(isa for isa in ISAS if isa.name == name)


HOST = host_isa()
LANES, MR, NV, KC = HOST.lanes, HOST.rows, HOST.vectors, HOST.panel_k
NR = NV * LANES

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)


def _pointer(bd: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return bd.inttoptr(address, F32.as_pointer())


def _load(bd: ir.IRBuilder, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    vector = bd.load(bd.bitcast(bd.gep(pointer, [offset]), VECTOR.as_pointer()))
    vector.align = 4
    return vector


def _store(bd: ir.IRBuilder, value: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
    bd.store(value, bd.bitcast(bd.gep(pointer, [offset]), VECTOR.as_pointer())).align = 4


def _splat(bd: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undef = ir.Constant(VECTOR, ir.Undefined)
    first = bd.insert_element(undef, scalar, I32(0))
    return bd.shuffle_vector(first, undef, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def _multiply_add(bd: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a·b + c; fused where the CPU can (llvm.fma elsewhere would call libm for every lane)."""
    if not HOST.fused:
        return bd.fadd(bd.fmul(a, b), c)
    fn = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return bd.call(cgutils.get_or_insert_function(bd.module, fn, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _prefetch(bd: ir.IRBuilder, pointer: ir.Value) -> None:
    byte = ir.IntType(8).as_pointer()
    fn = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    call = cgutils.get_or_insert_function(bd.module, fn, "llvm.prefetch.p0")
    bd.call(call, [bd.bitcast(pointer, byte), I32(0), I32(3), I32(1)])


def _tile_loop(
    bd: ir.IRBuilder, nv: int, a: ir.Value, rs_a: ir.Value, cs_a: ir.Value, b: ir.Value, rs_b: ir.Value,
    kc: ir.Value,
) -> list[list[ir.Value]]:  # fmt: skip
    """The loop over k; leaves the builder behind it and returns the MR × nv accumulators."""
    rows = [bd.gep(a, [bd.mul(rs_a, I64(i))]) for i in range(MR)]
    entry, loop, end = bd.block, bd.append_basic_block("k"), bd.append_basic_block("done")
    bd.branch(loop)
    bd.position_at_end(loop)
    k, offset_a, row_b = bd.phi(I64), bd.phi(I64), bd.phi(F32.as_pointer())
    for phi, start in ((k, I64(0)), (offset_a, I64(0)), (row_b, b)):
        phi.add_incoming(start, entry)
    tile = [[bd.phi(VECTOR) for _ in range(nv)] for _ in range(MR)]
    vectors = [_load(bd, row_b, I64(LANES * j)) for j in range(nv)]
    sums = []
    for i in range(MR):
        scalar = bd.load(bd.gep(rows[i], [offset_a]))
        broadcast = _splat(bd, scalar)
        sums.append([_multiply_add(bd, broadcast, vectors[j], tile[i][j]) for j in range(nv)])
    for i in range(MR):
        for j in range(nv):
            tile[i][j].add_incoming(ir.Constant(VECTOR, None), entry)
            tile[i][j].add_incoming(sums[i][j], loop)
    next_k = bd.add(k, I64(1))
    k.add_incoming(next_k, loop)
    offset_a.add_incoming(bd.add(offset_a, cs_a), loop)
    row_b.add_incoming(bd.gep(row_b, [rs_b]), loop)
    bd.cbranch(bd.icmp_signed("<", next_k, kc), loop, end)
    bd.position_at_end(end)
    return sums


@intrinsic
def microkernel(
    typingctx: Any, nv: Any, a: Any, rs_a: Any, cs_a: Any, b: Any, rs_b: Any, c: Any, rs_c: Any, kc: Any, add: Any
) -> Any:
    """C (MR, nv·LANES) := or += (if `add`) A (MR, kc) · B (kc, nv·LANES), kc ≥ 1.

    a, b, c are addresses; rs_* and cs_* row and column strides in elements. A is read one scalar at
    a time, so any strides serve (rows, columns, transposes); B and C want contiguous rows.
    """
    i64 = types.int64
    signature = types.void(i64, i64, i64, i64, i64, i64, i64, i64, i64, types.boolean)

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        nv, a, rs_a, cs_a, b, rs_b, c, rs_c, kc, add = args
        a, b, c = (_pointer(bd, p) for p in (a, b, c))
        c_rows = [bd.gep(c, [bd.mul(rs_c, I64(i))]) for i in range(MR)]
        for row in c_rows:  # C is needed after the loop; ask for it now
            for j in range(NV):
                _prefetch(bd, bd.gep(row, [I64(LANES * j)]))
        finish = bd.append_basic_block("finish")
        choice = bd.switch(nv, finish)
        for n in range(1, NV + 1):
            block = bd.append_basic_block(f"tile{n}")
            choice.add_case(I64(n), block)
            bd.position_at_end(block)
            sums = _tile_loop(bd, n, a, rs_a, cs_a, b, rs_b, kc)
            plus, write = bd.append_basic_block("plus"), bd.append_basic_block("write")
            bd.cbranch(add, plus, write)
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
    """dst[j, i] := src[i, j] for a LANES × LANES block, in registers; addresses and row strides.

    log2(LANES) rounds; round s swaps, between vectors i and i + s, the blocks of s lanes that lie
    off the diagonal.
    """
    signature = types.void(types.int64, types.int64, types.int64, types.int64)

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        dst, rs_dst, src, rs_src = args
        dst, src = _pointer(bd, dst), _pointer(bd, src)
        v = [_load(bd, src, bd.mul(rs_src, I64(i))) for i in range(LANES)]
        s = LANES // 2
        while s:
            keep = [j if not j & s else LANES + j - s for j in range(LANES)]
            move = [j + s if not j & s else LANES + j for j in range(LANES)]
            low, high = (ir.Constant(ir.VectorType(I32, LANES), m) for m in (keep, move))
            for i in range(LANES):
                if not i & s:
                    v[i], v[i + s] = (
                        bd.shuffle_vector(v[i], v[i + s], low),
                        bd.shuffle_vector(v[i], v[i + s], high),
                    )
            s //= 2
        for i in range(LANES):
            _store(bd, v[i], dst, bd.mul(rs_dst, I64(i)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """Address of an array's first element, as int64."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, bd, args[0]).data
        return bd.ptrtoint(data, I64)

    return types.int64(array), codegen


@intrinsic
def maximum(typingctx: Any, x: Any, y: Any) -> Any:
    """The larger of two float32; NaN if either is (so that a NaN score is not lost in a maximum)."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        fn = ir.FunctionType(F32, [F32, F32])
        return bd.call(cgutils.get_or_insert_function(bd.module, fn, "llvm.maximum.f32"), args)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z in float32, fused where the CPU can."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        fn = ir.FunctionType(F32, [F32] * 3)
        return bd.call(cgutils.get_or_insert_function(bd.module, fn, "llvm.fmuladd.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def float_to_bits(typingctx: Any, x: Any) -> Any:
    """The 32 bits of a float32, as int32."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def bits_to_float(typingctx: Any, x: Any) -> Any:
    """The float32 with these 32 bits."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


@intrinsic
def copy_vector(typingctx: Any, dst: Any, src: Any) -> Any:
    """LANES floats from one address to another."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _store(bd, _load(bd, _pointer(bd, args[1]), I64(0)), _pointer(bd, args[0]), I64(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def get(typingctx: Any, where: Any) -> Any:
    """The float32 at an address."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.load(_pointer(bd, args[0]))

    return types.float32(types.int64), codegen


@intrinsic
def put(typingctx: Any, where: Any, x: Any) -> Any:
    """Write a float32 to an address."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        bd.store(args[1], _pointer(bd, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen
