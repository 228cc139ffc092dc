"""What Tab proposes is what the parsers accept, asked of bash itself; the other shells' scripts are shtab's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llmpy.cli import main as cli
from llmpy.cli.completion import SIZES, script
from llmpy.model.config import ModelConfig
from llmpy.options.tools import SHELLS


def test_every_size_that_is_proposed_exists() -> None:
    assert {"d1", "d3", "d84"} < set(SIZES)
    for size in SIZES:
        assert ModelConfig.from_dial(size).layers > 0


@pytest.mark.parametrize("shell", SHELLS)
def test_the_verb_prints_it_and_the_shell_understands_it(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out, "utf-8")
    assert "gpt2-medium" in (tmp_path / "script").read_text("utf-8")
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


BASH = """
source "$1"; shift
COMP_WORDS=(llmpy "$@")
COMP_CWORD=$#
_shtab_llmpy
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("line", "proposed"),
    [
        ("tra", ["train"]),
        ("bench st", ["step"]),
        ("train --batch", ["--batch-size"]),
        ("train --dtype bf", ["bfloat16"]),
        ("train --model d3", ["d3", *(f"d{depth}" for depth in range(30, 40))]),
        ("bench ops --op linear_", ["linear_backward", "linear_forward"]),
        ("completion f", ["fish"]),
        ("train --data t", ["text.txt", "tinyshakespeare", "tinystories"]),
        ("data h", ["hellaswag"]),
        ("data --tokenizer te", ["text.txt"]),
        ("train --init gpt2-m", ["gpt2-medium"]),
        ("sample te", ["text.txt"]),
        ("plot --x to", ["tokens"]),
    ],
)
def test_what_bash_proposes(line: str, proposed: list[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script("bash", cli.build_parser()), "utf-8")
    (tmp_path / "text.txt").touch()
    command = ["bash", "-c", BASH, "bash", str(tmp_path / "script"), *line.split(" ")]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8", timeout=60).stdout
    assert sorted(out.split()) == proposed
