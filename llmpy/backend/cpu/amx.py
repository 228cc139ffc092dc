"""AMX: products of bfloat16 by tile registers, on Intel Xeons since 2023. What `simd` emits there.

A core has eight registers of 16 rows of 64 bytes. One instruction multiplies tiles of 16 words, of two bfloat16 each:

                                B  ┌──────────┐  16 words along k,
                                   │          │  16 columns
                                   └──────────┘
    A  ┌──────────┐             C  ┌──────────┐      C += even + odd,  where
       │          │  rows          │          │      even = Σ_k A[:, k].low  · B[k].low      from 0, along k,
       └──────────┘                └──────────┘      odd  = Σ_k A[:, k].high · B[k].high     fused multiply-adds
        16 words of k               16 float32

so a sum continues from block to block of k, whatever C started from. Subnormals are read and written as 0. Three tiles
of C take one of A and three of B from L1 for each block. A packed panel of B is those tiles one after another: memory
is read as one stream.

These sums are measured, not documented: `test_tiles_sum_in_the_order_that_amx_states` compares every bit.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils

ROWS = 16  # of C and A
BLOCK = 16  # words of k in a tile
WIDTH = 64  # bytes of a tile's row
TILE = WIDTH * ROWS  # bytes
STRIP = WIDTH, TILE  # bytes from row to row and from block to block of A, packed by `gemm.pack_columns`
A, B = 3, 4  # the first registers of each operand; C starts at 0
REGISTERS = 7

I8, I64, VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()
POINTER = I8.as_pointer()


# Emits the prefetches of a block, for `count` tiles of B: (count, index of the block, address of its B).
Prefetch = Callable[[int, ir.Value, ir.Value], None]


def _call(bd: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    function = ir.FunctionType(VOID, [arg.type for arg in args])
    bd.call(cgutils.get_or_insert_function(bd.module, function, f"llvm.x86.{name}"), args)


def _shapes(rows: int, words: int) -> bytes:
    """Return the 64 bytes that set the registers' shapes, for C and A of `rows`, and `words` along k."""
    each = [words if n >= B else rows for n in range(REGISTERS)]
    bytes_of = [4 * words if n == A else WIDTH for n in range(REGISTERS)]
    palette, widths = bytes([1]).ljust(16, b"\0"), b"".join(n.to_bytes(2, "little") for n in bytes_of)
    return palette + widths.ljust(32, b"\0") + bytes(each).ljust(16, b"\0")


def configure(bd: ir.IRBuilder, rows: ir.Value, words: int = BLOCK) -> None:
    """Emit the setting of shapes for 1 ≤ rows ≤ ROWS, which clears all registers, unless they are set.

    Setting them waits for all loads before it, asking does not.
    """
    name, table = f"llmpy_tile_shapes_{words}", b"".join(_shapes(max(n, 1), words) for n in range(ROWS + 1))
    kind = ir.ArrayType(I8, len(table))
    shapes = bd.module.globals.get(name)
    if shapes is None:
        shapes = ir.GlobalVariable(bd.module, kind, name)
        shapes.linkage, shapes.global_constant, shapes.align = "internal", True, WIDTH
        shapes.initializer = ir.Constant(kind, bytearray(table))
    wanted = bd.gep(shapes, [I64(0), bd.mul(rows, I64(WIDTH))])
    now = cgutils.alloca_once(bd, ir.ArrayType(I8, WIDTH))
    now.align = WIDTH
    _call(bd, "sttilecfg", bd.bitcast(now, POINTER))

    def part(shapes: ir.Value, start: int) -> ir.Value:
        return bd.load(bd.bitcast(bd.gep(bd.bitcast(shapes, POINTER), [I64(start)]), I64.as_pointer()))

    differs = [bd.xor(part(now, start), part(wanted, start)) for start in (16, 24, 48)]  # widths, heights
    with bd.if_then(bd.icmp_signed("!=", bd.or_(differs[0], bd.or_(differs[1], differs[2])), I64(0))):
        _call(bd, "ldtilecfg", wanted)


def _load(bd: ir.IRBuilder, register: int, address: ir.Value, stride: ir.Value) -> None:
    _call(bd, "tileloadd64", I8(register), bd.inttoptr(address, POINTER), stride)


def multiply(
    bd: ir.IRBuilder, count: int, c: ir.Value, rs_c: ir.Value, a: ir.Value, rs_a: ir.Value, step_a: ir.Value,
    b: ir.Value, words: ir.Value, adding: ir.Value, prefetch: Prefetch,
) -> None:  # fmt: skip
    """Emit C (rows, count·16) := or, where `adding`, += A (rows, words) · B (words, count·16), count ≤ 3.

    Addresses and strides are in bytes; step_a is from block to block of A. words is a multiple of BLOCK.
    """
    places = [I64(WIDTH * j) for j in range(count)]
    with bd.if_else(adding) as (old, new):
        with old:
            for j in range(count):
                _load(bd, j, bd.add(c, places[j]), rs_c)
        with new:
            for j in range(count):
                _call(bd, "tilezero", I8(j))
    with cgutils.for_range(bd, bd.udiv(words, I64(BLOCK)), intp=I64) as loop:
        here = bd.add(b, bd.mul(loop.index, I64(TILE * count)))
        _load(bd, A, bd.add(a, bd.mul(loop.index, step_a)), rs_a)
        for j in range(count):
            _load(bd, B + j, bd.add(here, I64(TILE * j)), I64(WIDTH))
            _call(bd, "tdpbf16ps", I8(j), I8(A), I8(B + j))
        prefetch(count, loop.index, here)
    for j in range(count):
        _call(bd, "tilestored64", I8(j), bd.inttoptr(bd.add(c, places[j]), POINTER), rs_c)


def multiply_bytes(
    bd: ir.IRBuilder, count: int, c: ir.Value, a: ir.Value, rs_a: ir.Value, b: ir.Value,
) -> None:  # fmt: skip
    """Emit C (rows, count·16) int32 := A · B, of signed and unsigned bytes; four along k are a word.

    `configure` has set rows and words. Addresses and rs_a are in bytes; the rows of B and C are adjacent. Exact.
    """
    stride = I64(WIDTH * count)
    _load(bd, A, a, rs_a)
    for j in range(count):
        _call(bd, "tilezero", I8(j))
        _load(bd, B + j, bd.add(b, I64(WIDTH * j)), stride)
        _call(bd, "tdpbsud", I8(j), I8(A), I8(B + j))
    for j in range(count):
        _call(bd, "tilestored64", I8(j), bd.inttoptr(bd.add(c, I64(WIDTH * j)), POINTER), stride)


def multiply_adds(bd: ir.IRBuilder, rounds: ir.Value) -> None:
    """Emit `rounds` of products on registers alone: the last two multiplied into each of the others."""
    configure(bd, I64(ROWS))
    with cgutils.for_range(bd, rounds, intp=I64):
        for j in range(REGISTERS - 2):
            _call(bd, "tdpbf16ps", I8(j), I8(REGISTERS - 2), I8(REGISTERS - 1))


FLOPS_PER_ROUND = (REGISTERS - 2) * 2 * ROWS * ROWS * 2 * BLOCK  # of `multiply_adds`
