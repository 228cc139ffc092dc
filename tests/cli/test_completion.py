"""What Tab proposes is what the parsers accept; asked of the shells themselves where they are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmpy.bench.ops import BENCH
from llmpy.cli import main as cli
from llmpy.cli.completion import SHELLS, SIZES, script, verbs
from llmpy.data.datasets import SOURCES
from llmpy.formats import hub
from llmpy.model.config import ModelConfig
from llmpy.options.data import DATA_NAMES, TRAINING_NAMES
from llmpy.options.tools import SHELLS as NAMES

VERBS = {verb.name: verb for verb in verbs(cli.build_parser())}


def test_every_verb_and_flag_is_known() -> None:
    assert {"", "train", "bench", "bench step", "plan", "completion"} <= set(VERBS)
    names = {name for flag in VERBS["train"].flags for name in flag.names}
    assert {"--data", "-i", "--no-shuffle", "--help"} <= names
    flags = {flag.names[-1]: flag for flag in VERBS["train"].flags}
    assert flags["--dtype"].words == ("auto", "float32", "bfloat16")
    assert "gpt2-medium" in flags["--model"].words
    assert flags["--data"].files
    assert flags["--data"].words == TRAINING_NAMES == tuple(SOURCES)
    assert flags["--init"].words == hub.NAMES
    assert flags["--lr"].value
    assert not flags["--overfit"].value
    assert VERBS["completion"].operands == NAMES
    op = next(flag for flag in VERBS["bench ops"].flags if "--op" in flag.names)
    assert (op.words, op.files) == (tuple(BENCH), False)


def test_every_size_that_is_proposed_exists() -> None:
    assert {"d1", "d3", "d84"} < set(SIZES)
    for size in SIZES:
        assert ModelConfig.from_dial(size).layers > 0


def test_the_shells_are_those_of_the_option() -> None:
    assert tuple(SHELLS) == NAMES


@pytest.mark.parametrize("shell", NAMES)
def test_the_verb_prints_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    assert capsys.readouterr().out == script(shell, cli.build_parser())


@pytest.mark.parametrize("shell", NAMES)
def test_the_shell_understands_it(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    path = tmp_path / "script"
    path.write_text(script(shell, cli.build_parser()), encoding="utf-8")
    subprocess.run([shell, "-n", str(path)], check=True, timeout=60)


CASES = [
    ("tra", ["train"]),
    ("bench st", ["step"]),
    ("train --batch", ["--batch-size"]),
    ("train --dtype bf", ["bfloat16"]),
    ("train --model gpt2-m", ["gpt2-medium"]),
    ("train --model d3", ["d3", *(f"d{depth}" for depth in range(30, 40))]),
    ("bench step --model d8", ["d8", *(f"d{depth}" for depth in range(80, 85))]),
    ("bench step --js", ["--json"]),
    ("bench ops --op linear_", ["linear_backward", "linear_forward"]),
    ("completion f", ["fish"]),
    ("train --data te", ["text.txt"]),
    ("sample te", ["text.txt"]),
    ("data t", ["text.txt", "tinyshakespeare", "tinystories"]),
    ("data --tokenizer b", ["bytes"]),
    ("data --tokenizer te", ["text.txt"]),
    ("data h", ["hellaswag"]),
    ("train --data t", ["text.txt", "tinyshakespeare", "tinystories"]),
    ("train -i fineweb-", ["fineweb-edu"]),
    ("train --init gpt2-m", ["gpt2-medium"]),
    ("train --init t", ["text.txt"]),
    ("sample gpt2-l", ["gpt2-large"]),
    ("chat gpt2-x", ["gpt2-xl"]),
    ("plot --x to", ["tokens"]),
]
BASH = """
source "$1"; shift
COMP_WORDS=(llmpy "$@")
COMP_CWORD=$#
_llmpy
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(("line", "proposed"), CASES)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_what_is_proposed(shell: str, line: str, proposed: list[str], tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    path = tmp_path / "script"
    path.write_text(script(shell, cli.build_parser()), encoding="utf-8")
    (tmp_path / "text.txt").touch()
    if shell == "bash":
        command = ["bash", "-c", BASH, "bash", str(path), *line.split(" ")]
    else:
        command = ["fish", "-c", f"source {path}; complete -C 'llmpy {line}'"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8", timeout=60).stdout
    assert sorted(row.split("\t")[0] for row in out.splitlines()) == proposed


ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "autoload -U compinit; compinit -u -D; source $1; cd $2; print rea''dy"
zpty -r shell out '*ready*'
zpty -w -n shell "llmpy data "$'\\t\\t'
zpty -r shell out '*tinystories*'
print -r -- $out
"""


def test_names_and_files_in_zsh(tmp_path: Path) -> None:
    """Its completion runs in a line editor alone, which needs a terminal: it makes one itself."""
    if not shutil.which("zsh"):
        pytest.skip("no zsh")
    (tmp_path / "script").write_text(script("zsh", cli.build_parser()), encoding="utf-8")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "text.txt").touch()
    command = ["zsh", "-f", "-c", ZSH, "zsh", str(tmp_path / "script"), str(tmp_path / "here")]
    out = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=60).stdout
    assert {"text.txt", *DATA_NAMES} <= set(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", " ", out).split())  # without its colours
