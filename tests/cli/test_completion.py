"""Tab completes what the parsers accept, run in bash; the scripts of other shells are parsed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llmpy.cli import main as cli
from llmpy.options.tools import SHELLS

BASH = """
source "$1"; shift
COMP_WORDS=(llmpy "$@")
COMP_CWORD=$#
_shtab_llmpy
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_the_verb_prints_a_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script, text = tmp_path / "script", tmp_path / "text.txt"
    script.write_text(capsys.readouterr().out, "utf-8")
    text.touch()
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(script)], check=True, timeout=60)
    for line, proposed in (
        ("tra", ["train"]),
        ("bench st", ["step"]),
        ("train --batch", ["--batch-size"]),
        ("train --dtype bf", ["bfloat16"]),
        ("train --init te", ["text.txt"]),
        ("sample te", ["text.txt"]),
    ):
        if shell == "bash" and shutil.which(shell):
            command = ["bash", "-c", BASH, "bash", str(script), *line.split(" ")]
            found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8", timeout=60)
            assert found.stdout.split() == proposed
