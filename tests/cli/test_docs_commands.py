"""Every command in README, docs and --help is understood by the real parser; those of a first hour are run.

`make` is checked in test_house. A fence's command that is not found, an option or a script that does not exist, fails.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from support.heard import hear, parsers
from support.laptop import in_place_of_the_cpu
from support.pages import PAGES, ROOT, SHELLS, TEXT, Command, after, fences, name, spans, told, typed, words_of

from llmpy.cli import main as cli
from llmpy.model.config import ModelConfig
from llmpy.options.train import names_file

SMALL = "--model d1 -B 2 -T 32 --steps 2 --eval-batches 1 --sample-tokens 4"
# Documented commands that are run, one after another, and what makes them small.
RUN = (
    ("llmpy data my.jsonl.gz a-folder --tokenizer bpe:4096 --out tokens", ""),
    ("llmpy train --data tokens --minutes 10", f"{SMALL} --out runs/NAME"),
    ("llmpy train --resume runs/NAME", "--steps 4"),
    ('llmpy sample runs/NAME --prompt "Once" --temperature 0.8 --top-k 50', "--tokens 4"),
    ("llmpy convert runs/NAME my-gpt2", ""),
    ('llmpy sample my-gpt2 --prompt "Once"', "--tokens 4"),
    ("llmpy plot runs/NAME", ""),
)


def documented() -> list[Command]:
    """Return every command of ours that README, docs and --help name, each once."""
    found = [command for page in PAGES for command in (*typed(page), *spans(page))]
    texts = [parser.epilog or "" for parser in parsers(cli.build_parser())]
    lines = [told(line) for text in texts for line in re.findall(r"^ +(llmpy .*)$", text, re.MULTILINE)]
    found += [Command(f"--help: {line}", line, words_of(line)) for line in lines]
    return list({tuple(words): command for command in found if (words := after(command.words, "llmpy"))}.values())


def understood(line: list[str], patch: pytest.MonkeyPatch) -> bool:
    """Return whether the parser takes a command, its values are in range and the size that it names exists."""
    heard = hear(patch)
    try:
        code = cli.main(line)
    except SystemExit as ended:
        return ended.code == 0
    for size in (getattr(options, "model", None) for options in heard):
        if isinstance(size, str) and size and not names_file(size):
            ModelConfig.from_dial(size)
    return code == 0


@pytest.mark.parametrize("command", documented(), ids=lambda command: command.place)
def test_documented_commands_are_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert understood(after(command.words, "llmpy") or [], monkeypatch), command.line


def test_what_is_not_there_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("train --no-such-option", "trian", "sample runs/NAME --temperature hot", "train --lr -1"):
        assert not understood(line.split(), monkeypatch)


def test_scripts_and_their_flags_exist() -> None:
    for command in (command for page in PAGES for command in (*typed(page), *spans(page))):
        script = next((word for word in command.words if word.startswith(("bench/", "dev/"))), None)
        if script and not re.search(r"/from-\w+\.md", command.place):  # those are other programs'
            text = (ROOT / script).read_text("utf-8")
            for flag in (word for word in after(command.words, script) or () if word.startswith("--")):
                assert f'"{flag}"' in text, f"{command.place}: {flag}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_command_is_overlooked(page: Path) -> None:
    """Wherever a fence has a verb of llmpy, this is a command that was found."""
    verbs = "|".join(sorted({p.prog.split()[1] for p in parsers(cli.build_parser()) if " " in p.prog}))
    text = "\n".join(fence.text for fence in fences(page) if fence.label in SHELLS)
    seen = re.findall(rf"^[^`#\n]*(?<![\w.`])llmpy (?:{verbs})\b", text, re.MULTILINE)
    assert len(seen) == sum(after(command.words, "llmpy") is not None for command in typed(page))


def test_the_commands_of_a_first_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmpy.backend.cpu.CPU", in_place_of_the_cpu)
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-folder" / "1.txt").write_text(TEXT, "utf-8")
    records = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    (tmp_path / "my.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    known = {tuple(after(command.words, "llmpy") or ()) for command in documented()}
    for line, more in RUN:
        words = shlex.split(line)[1:]
        assert tuple(words) in known, f"no page has {line}"
        assert cli.main([*words, *more.split()]) == 0, line
        assert not re.search(r"error:|Traceback", capfd.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} >= {"tokens", "runs", "my-gpt2"}
