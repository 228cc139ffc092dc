"""The parser accepts every `llmpy` command in the fences of README and docs and in --help; a first hour's are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.heard import hear
from support.laptop import in_place_of_the_cpu
from support.pages import PAGES, Command, after, typed, words_of

from llmpy.cli import main as cli
from llmpy.cli.help_text import EPILOGS
from llmpy.model.config import ModelConfig
from llmpy.options.train import names_file

TEXT = "the cat sat on the mat and the dog ran to the sea. it was a good day for a dog.\n" * 600
FIRST_HOUR = """
data my.txt --tokenizer bpe:300 --out tokens
train --data tokens --model d1 -B 2 -T 32 --steps 2 --eval-batches 1 --sample-tokens 4 --out runs/NAME
train --resume runs/NAME --steps 4
sample runs/NAME --prompt "The cat" --temperature 0.8 --top-k 50 --tokens 4
convert runs/NAME my-gpt2
sample my-gpt2 --prompt "The cat" --tokens 4
plot runs/NAME
"""


def documented() -> list[Command]:
    found = [command for page in PAGES for command in typed(page)]
    examples = re.findall(r"^ +(llmpy .*)$", "\n".join(EPILOGS.values()), re.MULTILINE)
    found += [Command(f"--help: {line}", words_of(line)) for line in examples]
    return list({tuple(words): c for c in found if (words := after(c.words, "llmpy"))}.values())


@pytest.mark.parametrize("command", documented(), ids=lambda command: command.place)
def test_documented_commands_are_accepted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser, the ranges of the options and the table of model sizes."""
    heard = hear(monkeypatch)
    try:
        code = cli.main(after(command.words, "llmpy"))
    except SystemExit as ended:
        code = ended.code
    assert code == 0, command.words
    for size in (getattr(options, "model", None) for options in heard):
        if isinstance(size, str) and size and not names_file(size):
            ModelConfig.from_dial(size)


@pytest.mark.parametrize("line", ["train --no-such-option", "trian", "sample runs/NAME --temperature hot"])
def test_other_commands_are_refused(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hear(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        cli.main(line.split())


def test_the_commands_of_a_first_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmpy.backend.cpu.CPU", in_place_of_the_cpu)
    (tmp_path / "my.txt").write_text(TEXT, "utf-8")
    for line in FIRST_HOUR.strip().splitlines():
        assert cli.main(shlex.split(line)) == 0, line
        assert not re.search(r"error:|Traceback", capfd.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} >= {"tokens", "runs", "my-gpt2"}
