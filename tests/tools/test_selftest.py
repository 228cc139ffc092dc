"""The self-test passes on a correct machine, and fails on every injected error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import Laptop
from support.samples import in_memory, llmc_debug

from llmpy import backend
from llmpy.cli.main import main
from llmpy.formats import llmc
from llmpy.model.gpt2 import GPT2
from llmpy.options.tools import SelftestOptions
from llmpy.run.checkpoint_writer import CheckpointWriter
from llmpy.tools import selftest

LOAD = backend.load


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[Laptop]:
    """Replace the CPU by the reference in float32, in a class that tests may break."""

    class Machine(Laptop):
        pass

    def load(name: str = "cpu", **options: Any) -> Any:
        if name != "cpu":
            return LOAD(name, **options)
        made = Machine()
        made.threads = options.get("threads") or 1
        return made

    monkeypatch.setattr(backend, "load", load)
    return Machine


@dataclass
class Result:
    code: int
    lines: list[str]

    @property
    def failed(self) -> list[str]:
        return [line for line in self.lines if line.endswith("FAILED") and "checks," not in line]


def run(**options: Any) -> Result:
    lines: list[str] = []
    return Result(selftest.selftest(SelftestOptions(**options), lines.append), lines)


def test_a_right_machine_passes(machine: type[Laptop]) -> None:
    result = run()
    assert (result.code, result.failed) == (0, [])
    assert result.lines[-1] == f"{len(result.lines) - 1} checks, all passed"
    assert len(result.lines) == 26


ERRORS = [
    # operation, output to multiply by 1 + 1e-3, and a row that must fail
    ("layernorm_forward", 0, "logits"),
    ("embedding_forward", 0, "logits"),
    ("attention_forward", 0, "logits"),
    ("linear_forward", 0, "logits"),
    ("layernorm_backward", 1, "gradients, layer 0"),
    ("layernorm_backward", 2, "gradients, embeddings"),
    ("linear_backward", 1, "gradients, layer 2"),
    ("linear_backward", 2, "gradients, layer 1"),
    ("attention_backward", 0, "gradients, layer 0"),
    ("embedding_backward", 1, "gradients, embeddings"),
    ("classifier", 0, "float32: loss"),
    ("classifier", 2, "gradients, embeddings"),
    ("adamw", 0, "AdamW"),
    ("rmsnorm_forward", 0, "Llama: logits"),
    ("head_rmsnorm_backward", 1, "Llama: gradients, layer 0"),
    ("rope", 0, "Llama: loss"),
    ("add_columns", 0, "LoRA: logits"),
    ("take_columns", 0, "LoRA: gradients, layer 1"),
    ("attention_decode", 0, "Llama: decoding"),
]


def break_(machine: type[Laptop], operation: str, output: int, factor: float = 1 + 1e-3) -> None:
    """Multiply one output of an operation by a factor."""
    right: Callable[..., Any] = getattr(Laptop, operation)

    def wrong(self: Laptop, *arguments: Any, **named: Any) -> Any:
        result = right(self, *arguments, **named)
        if arguments[output] is not None:
            arguments[output][...] *= np.float32(factor)
        return result

    setattr(machine, operation, wrong)


@pytest.mark.parametrize(("operation", "output", "row"), ERRORS)
def test_a_wrong_kernel_is_noticed(machine: type[Laptop], operation: str, output: int, row: str) -> None:
    break_(machine, operation, output)
    result = run()
    assert result.code == 1
    assert any(row in line for line in result.failed), result.failed


def test_a_kernel_that_overwrites_where_it_should_add(machine: type[Laptop]) -> None:
    right = Laptop.linear_backward
    machine.linear_backward = lambda self, *a: right(self, *a[:-1], False)  # type: ignore[method-assign]
    assert any("micro-batches" in line for line in run().failed)


def test_bits_that_depend_on_threads(machine: type[Laptop]) -> None:
    right = Laptop.linear_backward

    def wrong(self: Laptop, dinp: Any, dweight: Any, *rest: Any) -> None:
        right(self, dinp, dweight, *rest)
        if self.threads == 3 and dweight is not None:
            dweight[0, 0] = np.nextafter(dweight[0, 0], np.float32(9))

    machine.linear_backward = wrong  # type: ignore[method-assign]
    assert any("threads" in line for line in run().failed)


def test_a_norm_or_an_output_that_is_nan(machine: type[Laptop]) -> None:
    right = Laptop.global_norm
    machine.global_norm = lambda self, g: right(self, g) * (1 + 1e-4)  # type: ignore[method-assign]
    assert any("norm of all gradients" in line for line in run().failed)
    machine.activation_forward = lambda self, out, inp: out.fill(np.nan)  # type: ignore[method-assign]
    assert any("gradients, layer" in line for line in run().failed)


def test_a_state_that_forgets(machine: type[Laptop], monkeypatch: pytest.MonkeyPatch) -> None:
    right = CheckpointWriter.restore

    def forget(writer: CheckpointWriter, *given: Any) -> Any:
        position = right(writer, *given)
        writer.optimizer.m[0] = 1
        return position

    monkeypatch.setattr(CheckpointWriter, "restore", forget)
    assert any("save, load and resume" in line for line in run().failed)


# With llm.c's files, written by the reference in float64


@pytest.fixture
def llmc_files(machine: type[Laptop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return files of a small model; the reference's ten losses replace the published ones."""
    source = in_memory()
    paths = {"model": tmp_path / "m.bin", "debug_state": tmp_path / "d.bin"}
    llmc_debug(source, *paths.values())
    twin = GPT2(source.config, LOAD("reference"))
    source.fill(twin.params)
    losses = tuple(selftest._train(twin, llmc.read_debug(paths["debug_state"], source.config)))
    monkeypatch.setattr(selftest, "GPT2_124M", source.config)
    monkeypatch.setattr(selftest, "LOSSES", losses)
    return paths


def test_llmc_files(llmc_files: dict[str, Path]) -> None:
    result = run(**llmc_files)
    assert (result.code, result.failed) == (0, [])
    assert sum("gradient of" in line for line in result.lines) == 16
    assert sum("loss of step" in line for line in result.lines) == 10


@pytest.mark.parametrize("operation", ["layernorm_backward", "attention_backward", "linear_forward", "adamw"])
def test_llmc_files_notice_a_wrong_kernel(machine: type[Laptop], llmc_files: dict[str, Path], operation: str) -> None:
    break_(machine, operation, 0, 1 + 1e-2)
    result = run(**llmc_files)
    assert result.code == 1
    assert result.failed


def test_a_model_and_a_debug_state_of_another(llmc_files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    llmc.write_model(llmc_files["model"], in_memory(seed=2), "float32")
    assert run(**llmc_files).code == 1
    for flag, path in zip(("--model", "--debug-state"), llmc_files.values(), strict=True):
        assert main(["selftest", flag, str(path)]) == 1
        assert f"{flag} without " in capsys.readouterr().err
