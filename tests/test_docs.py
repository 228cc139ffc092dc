"""What README and docs tell a reader to do can be done: code runs, quotations are true, commands exist, links lead on.

Pages are found, not listed. In a page's fences

    python                  runs, block after block in one namespace; a page needs no other
    py FILE                 quotes FILE: its lines stand there one after another, but for indentation
    sh, bash, console, none commands; a line with `llmpy`, or with `python` and a file of this project, is checked

`make` is checked in test_house; `llmpy selftest` and `bench` run in test_selftest and test_bench.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from laptop import TINY, Laptop
from samples import in_memory, with_tokenizer

from llmpy import backend, cli
from llmpy.formats import hub, huggingface
from llmpy.options import TrainOptions, as_yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("", "sh", "bash", "shell", "console")
OPTIONAL = {"torch", "transformers", "matplotlib"}
TEXT = "the cat sat on the mat and the dog ran to the sea. it was a good day for a dog.\n" * 200


class Fence(NamedTuple):
    """A fenced block: the line it begins on, its label and what it quotes, its text."""

    line: int
    label: str
    source: str
    text: str


def fences(page: Path) -> list[Fence]:
    text = page.read_text("utf-8")
    found = re.finditer(r"^```(\w*)[ ]*([^\n`]*)\n(.*?)^```[ ]*$", text, re.DOTALL | re.MULTILINE)
    return [Fence(text[: m.start()].count("\n") + 2, m[1], m[2].strip(), m[3]) for m in found]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def words_of(line: str) -> list[str]:
    """A line of a shell as words, up to what pipes, redirects, ends or, two blanks further on, explains it."""
    told = re.match(r"""(?:'[^']*'|"[^"]*"|[^\s'"]| (?! ))*""", line.strip())
    assert told is not None
    lexer = shlex.shlex(told[0], posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            break
        if word not in ("…", "..."):
            words.append(word)
    return words


def command_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every line of a page's shell fences as (place, words)."""
    for fence in fences(page):
        if fence.label in SHELLS:
            for i, line in enumerate(re.sub(r"\\\n\s*", " ", fence.text).splitlines()):
                # Only these are commands; the rest, output and tables, need not even be whole quotations.
                if re.match(r"\s*(\$ |\w+=|\S*llmpy |mpiexec |mpirun |srun |\S*python )", line):
                    yield f"{name(page)}:{fence.line + i}", words_of(line.removeprefix("$ "))


def after(words: list[str], program: str) -> list[str] | None:
    """What follows a program, however it is called: `.venv/bin/llmpy train` → train."""
    for i, word in enumerate(words):
        if word == program or word.endswith(("/" + program, "\\" + program)):
            return words[i + 1 :]
    return None


def spans(page: Path) -> list[list[str]]:
    """What follows llmpy in the text's `code`; it may leave out words that a verb needs."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"`(?:\S*/)?llmpy ([^`]+)`", text)
    return [words_of(" ".join(span.split())) for span in found]


COMMANDS = [
    pytest.param(rest, id=place)
    for page in PAGES
    for place, words in command_lines(page)
    if (rest := after(words, "llmpy")) is not None
]


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser of every verb."""
    children = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not children:
        yield parser
    for action in children:
        for child in action.choices.values():
            yield from leaves(child)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], int]:
    """`llmpy` as it is, in an empty folder, but for its verbs, which do nothing."""
    build = cli.build_parser

    def without_verbs() -> Any:
        parser = build()
        for leaf in leaves(parser):
            leaf.set_defaults(verb=lambda _: 0)
        return parser

    def call(words: list[str]) -> int:
        for word in words:
            if word.endswith((".yaml", ".yml")):
                Path(word).write_text(as_yaml(TrainOptions()), "utf-8")
        try:
            return cli.main(words)
        except SystemExit as ended:
            return int(ended.code or 0)

    monkeypatch.setattr(cli, "build_parser", without_verbs)
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model lies where GPT-2 would, had it been downloaded."""
    small = with_tokenizer(in_memory(replace(TINY, vocab_size=257)), tmp_path / "tokenizer.json")
    huggingface.write_model(tmp_path / "cache" / "models" / "gpt2", small, "float32")
    monkeypatch.setattr(hub, "user_cache", lambda: tmp_path / "cache")


@pytest.mark.parametrize("page", [p for p in PAGES if any(f.label == "python" for f in fences(p))], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: None) -> None:
    """In a folder with a my.txt, short enough to train ten epochs on, and with a GPT-2; --minutes last a second."""
    monkeypatch.setattr(TrainOptions, "seconds", property(lambda options: options.minutes and 1.0))
    (tmp_path / "my.txt").write_text(TEXT[: len(TEXT) // 3], "utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        for fence in fences(page):
            if fence.label == "python":
                # Empty lines before it: a failing line has the page's number.
                code = "\n" * (fence.line - 1) + fence.text
                exec(compile(code, str(page), "exec", dont_inherit=True), namespace)
    except ModuleNotFoundError as fault:
        if fault.name not in OPTIONAL:
            raise
        pytest.skip(f"{fault.name} is not installed")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quotations_are_true(page: Path) -> None:
    for fence in fences(page):
        if fence.label == "py" and fence.source:
            have = [line.strip() for line in (ROOT / fence.source).read_text("utf-8").splitlines()]
            want = [line.strip() for line in fence.text.strip().splitlines()]
            places = (have[i : i + len(want)] for i in range(len(have)))
            assert want in places, f"{name(page)}:{fence.line} is no longer in {fence.source}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{name(page)}: {target}"


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_exist(words: list[str], parse: Callable[[list[str]], int], capsys: Any) -> None:
    assert parse(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_text_exist(page: Path, parse: Callable[[list[str]], int], capsys: Any) -> None:
    for words in spans(page):
        code, said = parse(words), capsys.readouterr().err
        assert code == 0 or "required: " in said, f"{words}: {said}"


def test_examples_of_help_exist(parse: Callable[[list[str]], int], capsys: Any) -> None:
    parser = cli.build_parser()
    texts = [text for p in (parser, *leaves(parser)) if (text := p.epilog)]
    lines = [line for text in texts for line in re.findall(r"^ +llmpy (.*)$", text, re.MULTILINE)]
    assert len(lines) >= 10
    for line in lines:
        assert parse(words_of(line)) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_and_their_options_exist(page: Path) -> None:
    for place, words in command_lines(page):
        for script in (w for w in after(words, "python") or () if w.startswith(("dev/", "bench/", "tests/"))):
            text = (ROOT / script).read_text("utf-8")
            for flag in (w for w in words if w.startswith("--")):
                assert f'"{flag}"' in text, f"{place}: {flag}"


def test_what_is_not_there_fails(parse: Callable[[list[str]], int], capsys: Any) -> None:
    assert parse(words_of("train --no-such-option | tee log")) != 0
    assert parse(words_of("trian")) != 0
    assert parse(words_of("sample runs/NAME --temperature hot")) != 0
    assert "required" not in capsys.readouterr().err


# What the README's commands are given besides, so that they take no time. Other verbs are parsed alone.
TINY_BATCHES = "-B 2 -T 16 --steps 2 --eval-batches 1 --sample-tokens 4"
SMALL = f"--model d1 --vocab-size 300 {TINY_BATCHES}"
ADDED = {
    "train": SMALL + " --out runs/{}",
    "train --init": TINY_BATCHES + " --out runs/{}",
    "train --resume": "--steps 4",
    "sample": "--tokens 4",
    "convert": "",
    "data": "--tokenizer bytes",
}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: None) -> Path:
    """A reader's folder: texts, and the run that the README calls NAME; the machine is NumPy."""
    for folder in ("a-folder", "tinyshakespeare"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.txt").write_text(TEXT, "utf-8")
    for file in ("my.txt", "more.txt"):
        (tmp_path / file).write_text(TEXT, "utf-8")
    records = "".join(f'{{"text": "{line}"}}\n' for line in TEXT.splitlines())
    (tmp_path / "my.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMPY_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(backend, "load", lambda *_, **__: Laptop())
    assert cli.main(["train", "--data", "my.txt", *SMALL.split(), "--out", "runs/NAME"]) == 0
    return tmp_path


def test_commands_of_the_readme_run(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another in one folder, as a reader would; those of several processes are not among them."""
    ran = []
    for place, line in command_lines(ROOT / "README.md"):
        words = after(line[:1], "llmpy") is not None and line[1:]
        if words and "--ranks" not in words:
            key = " ".join(words[:2]) if " ".join(words[:2]) in ADDED else words[0]
            if key in ADDED:
                code = cli.main([*words, *ADDED[key].format(len(ran)).split()])
                assert code == 0, f"{place}: {capsys.readouterr().err}"
                ran.append(key)
    assert set(ran) == set(ADDED)
    for made in ("my-gpt2/model.safetensors", "tokens/tokenizer.json"):
        assert (reader / made).exists(), made


def test_printed_options_are_a_file_of_options(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["train", *SMALL.split(), "--data", "my.txt", "--print-config"]) == 0
    Path("run.yaml").write_text(capsys.readouterr().out, "utf-8")
    assert cli.main(["train", "--config", "run.yaml", "--out", "runs/again"]) == 0
    assert (reader / "runs/again/model.safetensors").read_bytes() == (
        reader / "runs/NAME/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("leaf", [p.prog for p in leaves(cli.build_parser())])
def test_help_of_every_verb(leaf: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*leaf.split()[1:], "--help"])
    assert ended.value.code == 0
    assert "usage: " + leaf in capsys.readouterr().out
