"""The table of instruction sets: the microkernel of each row in assembly, and the suite on rows that run here.

LLVM cross-compiles, so the inner loop of every row is inspected. It must hold one multiply-add per accumulator, one
load per vector of B and one broadcast per row of A, and keep all of them in registers.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import pytest
from llvmlite import ir
from numba import types

from llmpy.backend import kernel_cache
from llmpy.backend.cpu import amx
from llmpy.backend.cpu import simd as host

TESTS = Path(__file__).parents[1]
AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx2,+fma"


@dataclass(frozen=True)
class Target:
    """A CPU, and the instructions its loops must have. `isa` is its row of the table."""

    isa: str
    cpu: str
    features: str
    machine: str = "x86_64"
    # The instruction that does one multiply-add, in float32 and in bfloat16.
    float32: str = "vfmadd231ps"
    bfloat16: str = "vfmadd231ps"
    # Vectors that the bfloat16 loop may spill per word of k. Without a bfloat16 product, registers hold the sums,
    # 2·NV halves of B, two of A and a mask: 24 + 9 of 32, or 12 + 7 of 16. Measured with LLVM 22, for 2·MR·NV
    # multiply-adds. Tiles of 7 × 3 (AVX-512, NEON) and 4 × 2 (AVX2) would not spill. In float32 and native bfloat16
    # no row spills.
    spilled: int = 0

    def __str__(self) -> str:
        return f"{self.isa}-{self.cpu}"

    @property
    def triple(self) -> str:
        return f"{self.machine}-unknown-linux-gnu"


AMX = AVX512 + ",+avx512bf16,+amx-tile,+amx-bf16"
TARGETS = [
    Target("amx", "sapphirerapids", AMX, bfloat16="tdpbf16ps"),
    Target("avx512-bf16", "znver4", AVX512 + ",+avx512bf16", bfloat16="vdpbf16ps"),
    Target("avx512-bf16", "sapphirerapids", AVX512 + ",+avx512bf16", bfloat16="vdpbf16ps"),
    Target("avx512", "skylake-avx512", AVX512, spilled=9),
    Target("avx2", "haswell", "+avx,+avx2,+fma", spilled=9),
    Target("avx2", "znver3", "+avx,+avx2,+fma", spilled=9),
    Target("neon-bf16", "neoverse-n2", "+neon,+bf16", "aarch64", "fmla", "bfdot"),
    Target("neon-bf16", "apple-m2", "+neon,+bf16", "aarch64", "fmla", "bfdot"),
    Target("neon", "cortex-a72", "+neon", "aarch64", "fmla", "fmla", spilled=8),
    Target("neon", "apple-m1", "+neon", "aarch64", "fmla", "fmla", spilled=8),
    Target("generic", "x86-64", "", float32="mulps", bfloat16="mulps"),
]


def test_every_row_of_the_table_has_a_target() -> None:
    assert {t.isa for t in TARGETS} == {isa.name for isa in host.ISAS}


@pytest.mark.parametrize(("allowed", "isa"), [(True, "amx"), (False, "avx512-bf16")])
def test_tiles_that_linux_refuses(monkeypatch: pytest.MonkeyPatch, allowed: bool, isa: str) -> None:
    """The features are part of the kernel cache's key."""
    monkeypatch.setattr(numba.config, "CPU_FEATURES", AMX)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(kernel_cache, "_may_use_tiles", lambda: allowed)
    assert host.host_isa().name == isa
    assert ("+amx-tile" in kernel_cache.target()[1]) is allowed


@pytest.fixture(scope="module", autouse=True)
def all_targets() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def simd(target: Target, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import `simd` as on the target's machine."""
    name = f"{host.__name__}_{target.isa.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, host.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # dataclasses look it up
        patch.setattr(numba.config, "CPU_FEATURES", target.features)
        patch.setattr(platform, "machine", lambda: target.machine)
        patch.setattr(kernel_cache, "_may_use_tiles", lambda: True)
        spec.loader.exec_module(module)
    return module


class Context:
    """The part of Numba's code generation context that the intrinsic uses."""

    def get_dummy_value(self) -> None:
        return None


def assembly(simd: Any, target: Target, element: Any, strip: bool) -> str:
    """Compile the microkernel for whole panels (nv = NV) as Numba does; A by rows, or a packed strip."""
    like = types.Array(element, 2, "C")
    i64, rs_a = types.int64, types.none if strip else types.int64
    _, codegen = simd.microkernel._defn(
        None, like, i64, i64, rs_a, *[i64] * 6, types.UniTuple(types.UniTuple(i64, 4), simd.LISTS)
    )
    module = ir.Module("microkernel")
    module.triple = target.triple
    integer = ir.IntType(64)
    lists = ir.ArrayType(ir.ArrayType(integer, 4), simd.LISTS)
    fn = ir.Function(module, ir.FunctionType(ir.VoidType(), [*[integer] * 8, lists]), "microkernel")
    builder = ir.IRBuilder(fn.append_basic_block())
    codegen(Context(), builder, None, [None, integer(simd.NV), *fn.args])  # like, nv, a, rs_a, …
    builder.ret_void()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization, tuning.slp_vectorization = True, False  # Numba's settings
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def inner_loops(text: str) -> list[list[str]]:
    """Return the instructions of every block that jumps to its own start."""
    found: list[list[str]] = []
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.?\w+):", line):
            labels[label[1]] = len(code)
        elif (instruction := line.strip()) and not instruction.startswith((".", "#", "//")):
            code.append(instruction)
            words = re.split(r"[\s,]+", instruction)
            if re.fullmatch(r"j\w+|b(\.\w+)?|cbn?z|tbn?z", words[0]) and words[-1] in labels:
                found.append(code[labels[words[-1]] :])
    return found


STACK = re.compile(r"\(%[re][sb]p\)|\[sp\b|\[x29\b")
VECTOR = re.compile(r"%[xyz]mm\d|\b[qvds]\d")


def counts(loop: list[str]) -> dict[str, int]:
    """Count each mnemonic in a loop."""
    mnemonics = [line.split()[0] for line in loop]
    return {m: mnemonics.count(m) for m in mnemonics}


def spills(loop: list[str]) -> list[str]:
    """Return the instructions that move a vector to or from the stack."""
    return [line for line in loop if STACK.search(line) and VECTOR.search(line)]


def stores(lines: list[str]) -> int:
    """Count the vectors that these instructions store: AT&T's destination is last, Arm's `stp` stores two."""
    return sum(
        1 + line.startswith("stp") if line.startswith("st") else line.endswith(")") and line.startswith(("vmov", "mov"))
        for line in lines
    )


@pytest.mark.parametrize("strip", [False, True], ids=["rows", "strip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_inner_loop(simd: Any, target: Target, dtype: str, strip: bool) -> None:
    assert target.isa == simd.HOST.name, "the table has another row for this CPU"
    text = assembly(simd, target, types.float32 if dtype == "float32" else types.uint16, strip)
    loop = max(inner_loops(text), key=len)  # shorter loops are narrower tiles and remainders
    has = counts(loop)
    instruction = target.float32 if dtype == "float32" else target.bfloat16
    if instruction == "tdpbf16ps":  # a block: three tiles of B for one of A, and a prefetch for each of its rows
        assert (has["tdpbf16ps"], has["tileloadd"], has["prefetcht1"]) == (simd.NV, simd.NV + 1, amx.BLOCK), has
        assert not spills(loop)
        return
    emulated = dtype == "bfloat16" and not simd.HOST.bf16
    a_turn = simd.MR * simd.NV * (2 if emulated else 1)  # for one word of k
    turns = has[instruction] / a_turn
    if simd.HOST.ahead:
        assert turns == simd.TOGETHER, has
        assert sum(n for m, n in has.items() if m.startswith("prefetch")) == turns
        # Other instructions of a step: more would delay its products and loads.
        assert emulated or len(loop) <= turns * (a_turn + simd.NV + simd.MR + 8), len(loop)
    else:
        assert turns in (1, 2), has  # LLVM unrolls by two where the CPU gains by it
    others = [
        m for m in has if re.match(r"v?(fn?m(add|sub|l)|mul[ps]|fmul|dp\w*ps|bfdot|f?div)", m) and m != instruction
    ]
    assert not others, has
    if not simd.HOST.fused:
        assert has["addps"] == has["mulps"]
    width = {16: "%zmm", 8: "%ymm", 4: "%xmm"}[simd.LANES] if target.machine == "x86_64" else ".4s"
    assert all(width in line for line in loop if line.startswith(instruction))
    spilled = spills(loop)
    if emulated and target.spilled:
        assert 0 < stores(spilled) <= target.spilled * turns, spilled  # 0: update TARGETS
    else:
        assert not spilled
        # Vector accesses: loads of B, broadcasts of A, and for emulated bfloat16 their halves.
        loads = [line for line in loop if VECTOR.search(line) and re.search(r"\(%|\[x", line)]
        vectors, rows = simd.NV, simd.MR
        if target.machine == "aarch64":  # ldp loads two
            vectors -= sum(line.startswith("ldp") for line in loads)
        assert len(loads) == turns * (vectors + rows), loads


def test_the_counters_count() -> None:
    """Fails if a pattern above stops matching."""
    x86 = "f:\n\tmovq\t%rax, %rbx\n.LBB0_1:\n\tvmovups\t%zmm1, -64(%rsp)\n\tvandps\t(%rsp), %zmm1, %zmm0\n\tjl\t.LBB0_1"
    arm = "f:\n.LBB0_3:\n\tstp\tq9, q0, [sp, #96]\n\tldr\tq8, [sp]\n\tldr\tx8, [sp]\n\tb.lt\t.LBB0_3\n\tret"
    for text, length, moved, stored in ((x86, 3, 2, 1), (arm, 4, 2, 2)):
        (loop,) = inner_loops(text)
        assert len(loop) == length
        assert len(spills(loop)) == moved
        assert stores(spills(loop)) == stored


# The suite, in a subprocess that compiles for another CPU.

RUNS = [
    Target("avx2", "haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2,+sse4.1,+popcnt"),
    Target("generic", "generic", ""),
    Target("avx512", "skylake-avx512", AVX512 + ",-prefer-256-bit,+avx,+f16c,+bmi,+bmi2,+sse4.2,+sse4.1,+popcnt"),
    Target("avx512-bf16", "znver4", AVX512 + ",+avx512bf16,+avx512vnni,+avx,+f16c,+bmi,+bmi2,+sse4.2,+sse4.1,+popcnt"),
]
SHORT = "linear_forward or rounding or widening"
# Run the tests; fail if the environment selected another row than intended.
PROGRAM = """
import sys, pytest
from llmpy.backend.cpu import simd
assert simd.HOST.name == sys.argv[1], simd.HOST
sys.exit(pytest.main(sys.argv[2:]))
"""


def run_suite(target: Target, *selection: str) -> None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("these run on x86-64")
    here = llvm.get_host_cpu_features()
    missing = [f[1:] for f in target.features.split(",") if f[:1] == "+" and not here.get(f[1:])]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CPU_FEATURES", "PYTEST_ADDOPTS")}
    env["NUMBA_CPU_NAME"] = target.cpu
    if target.features:
        env["NUMBA_CPU_FEATURES"] = target.features
    files = [
        str(TESTS / f"{name}.py")
        for name in (
            "backend/test_ops",
            "backend/test_mixed",
            "backend/test_exp",
            "backend/test_int8",
            "generate/test_kv_cache",
            "train/test_golden",
        )
    ]
    command = [sys.executable, "-c", PROGRAM, target.isa, "-p", "no:cacheprovider", "-x", *selection, *files]
    result = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, encoding="utf-8", timeout=900)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert re.search(r"\d{2,}%\]|[1-9]\d* passed", result.stdout), "ran no test"


@pytest.mark.parametrize("target", [RUNS[0], pytest.param(RUNS[1], marks=pytest.mark.isa)], ids=str)
def test_products_and_conversions_on_other_cpus(target: Target) -> None:
    """Code that differs per row: packing, microkernels, exp, rounding. Both dtypes."""
    run_suite(target, "-k", SHORT)


@pytest.mark.isa
@pytest.mark.parametrize("target", RUNS, ids=str)
def test_everything_on_other_cpus(target: Target) -> None:
    """A minute each without a cache: `make test-isa`."""
    run_suite(target)
