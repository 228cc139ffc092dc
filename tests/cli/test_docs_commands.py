"""Every command in README, docs and --help is run: page by page and in order, in a reader's folder (reader.py).

Each is first understood as it is written, then run with what makes it small (ADDED): it ends well, tells no error, and
what it was to write is there.
The machine is NumPy, in other processes too; the network is a server of this one. A page's fences come first, one
after another, then what its text and tables name. A command that nobody has thought of fails; what cannot be run here
is in ELSEWHERE, with the reason. `make` is checked in test_house.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.laptop import in_place_of_the_cpu
from support.pages import PAGES, ROOT, SHELLS, Command, after, fences, name, spans, told, typed, words_of
from support.reader import TRAIN, furnish, internet

from llmpy.bench import decoding as decode
from llmpy.bench import ops
from llmpy.cli import main as cli
from llmpy.data.pack import is_dataset
from llmpy.distributed import launch
from llmpy.formats import hub
from llmpy.model.config import ModelConfig
from llmpy.system.cache import data_cache
from llmpy.tools import plan

pytestmark = pytest.mark.skipif(os.name != "posix", reason="they are commands of a POSIX shell")
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None, reason="no mpi4py: pip install 'llmpy[mpi]'")

# Of each verb, and of an option that makes it another: what it is given besides, so that it takes no time.
STEP = "--model d1 -B 1 -T 8 --steps 1"
ADDED = {
    "train": TRAIN,
    "train -d": f"{TRAIN} --vocab-size 300 --total-batch 192",
    "train --total-batch": f"{TRAIN} --total-batch 192",
    "train --recipe": f"{TRAIN} --total-batch 192",
    "train --init": TRAIN.removeprefix("--model d1 "),
    "train --resume": "--steps 4",
    "train --help": "",
    "sample": "--tokens 4",
    "chat": "--tokens 4",
    "data": "",
    "convert": "",
    "plan": "--model d1 --vocab-size 300 -B 2 -T 16",
    "doctor": "",
    "completion": "",
    "watch": "",
    "plot": "",
    "selftest": "",
    "bench step": STEP,
    "bench ops": "",
    "bench decode": "--model d1 --prompt-tokens 2 --tokens 2 --prefill 8",
    "bench peers": f"{STEP} --rounds 1 --without PyTorch torch",
    "bench/line.py": "",
}
ELSEWHERE = {
    "dev/ladder.py": "test_ladder runs it, on small products",
    "bench/torch_decode.py": "it needs PyTorch, and takes GPT-2 alone",
    "llmpy.tools.lm_eval": "lm_eval downloads the tasks; test_harness runs one of its own",
    "srun": "it needs a cluster that Slurm manages",
}
OUT = ("-o", "--out")
RUNS = Path("runs")  # where runs begin that name no folder
LAUNCHERS = ("mpiexec", "mpirun", "srun")
EXTRAS = {"plot": "matplotlib", "parquet": "pyarrow", "gguf": "gguf"}  # whoever lacks one is told so instead
# What other processes import when they start: their CPU is a laptop too, and Numba is not even loaded.
SITE = """
import sys, types
from support.laptop import in_place_of_the_cpu
sys.modules["llmpy.backend.cpu"] = types.SimpleNamespace(CPU=in_place_of_the_cpu)
"""


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmpy.backend.cpu.CPU", in_place_of_the_cpu)
        patch.chdir(folder)
        furnish(folder)
    return folder


@pytest.fixture
def reader(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with all that commands name in it; what they measure is small and measured once."""
    folder = tmp_path / "here"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("llmpy.backend.cpu.CPU", in_place_of_the_cpu)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE, "utf-8")
    paths = [str(tmp_path / "site"), str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("BROWSER", "sh -c 'echo %s > opened'")
    for module, constant, value in (
        (plan, "BUDGET", 0.0), (plan, "REPEATS", 1), (plan, "CACHES", 10), (ops, "BUDGET", 0.0), (ops, "REPEATS", 1),
        (ops, "BENCH", {op: [ops.Case(2, 3, C=4, NH=2, OC=5, V=7, Vp=8, n=9)] for op in ops.BENCH}),
        (decode, "FIRST_TOKENS", 1), (hub, "user_cache", lambda: tmp_path / "cache"),
    ):  # fmt: skip
        monkeypatch.setattr(module, constant, value)
    with internet(furnished, monkeypatch):
        yield folder


Run = Callable[[Command], None]


@pytest.fixture
def run(reader: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command as a reader would."""

    def run(command: Command) -> None:
        capfd.readouterr()
        code = (run_llmpy if after(command.words[:1], "llmpy") is not None else run_python)(command, monkeypatch)
        out, err = capfd.readouterr()
        lacking = re.search(r"llmpy\[(\w+)\]", err)
        if code == 1 and lacking and find_spec(EXTRAS[lacking[1]]) is None:
            return
        assert code == 0, f"{command.place}: {err}"
        assert not re.search(r"error:|Traceback", err), f"{command.place}: {err}"

    return run


def run_llmpy(command: Command, patch: pytest.MonkeyPatch) -> int:
    """What it is to write is not there before, and is there then."""
    words = command.words[1:]
    assert understood(words, patch) == 0, f"{command.place} is not understood: {command.line}"
    place = target(words)
    if place is not None and place != RUNS:
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    before = files(place)
    code = VERBS.get(words[0], called)([*words, *added(command, words)], patch)
    assert code or place is None or files(place) - before, f"{command.place}: nothing new at {place}"
    return code


def target(words: list[str]) -> Path | None:
    """Where a command is to write, if anywhere."""
    named = words[2:] if words[0] == "convert" else [words[i] for i in range(1, len(words)) if words[i - 1] in OUT]
    if named:
        return Path(named[0])
    if words[0] == "data":
        return data_cache() / words[1] if is_dataset(words[1]) else Path("data")
    return RUNS if words[0] == "train" and {"--resume", "--help"}.isdisjoint(words) else None


def files(place: Path | None) -> set[Path]:
    """A file, or all in a folder."""
    return {path for path in (place, *place.rglob("*")) if path.is_file()} if place is not None else set()


def run_python(command: Command, patch: pytest.MonkeyPatch) -> int:
    """Python by way of a shell; scripts are those of the repository."""
    program, *words = command.words
    assert after([program], "python") is not None, f"{command.place}: how is {program} run?"
    line = command.line.removeprefix(program)
    if not words[0].startswith("-"):
        line = line.replace(words[0], str(ROOT / words[0]), 1) + " " + " ".join(added(command, words))
    return subprocess.run(shlex.quote(sys.executable) + line, shell=True).returncode


def understood(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """The exit code of `llmpy` with verbs that do nothing; the sizes it names must be there."""
    build = cli.build_parser

    def heard(options: Any) -> int:
        if isinstance(size := getattr(options, "model", None), str) and size:
            ModelConfig.from_dial(size)
        return 0

    def without_verbs() -> Any:
        parser = build()
        for leaf in leaves(parser):
            leaf.set_defaults(verb=heard)
        return parser

    with patch.context() as inner:
        inner.setattr(cli, "build_parser", without_verbs)
        return called(words, inner)


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser of every verb."""
    children = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not children:
        yield parser
    for action in children:
        for child in action.choices.values():
            yield from leaves(child)


def added(command: Command, words: list[str]) -> list[str]:
    """What a line is run with besides, by the most that is known of it."""
    fitting = [key for key in ADDED if key.split()[0] == words[0] and set(key.split()) <= set(words)]
    assert fitting, f"{command.place}: say in ADDED or ELSEWHERE how to run {command.line}"
    return ADDED[max(fitting, key=lambda key: len(key.split()))].split()


def called(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """`llmpy` in this process; the exit code."""
    patch.setattr(sys, "argv", ["llmpy", *words])
    try:
        return cli.main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


def talked(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """A talk: a question, a command, another question, the end of the input."""
    patch.setattr(sys, "stdin", io.StringIO("Who sat?\n/reset\nWho ran?\n"))
    with contextlib.redirect_stdout(io.StringIO()) as answers:
        code = called(words, patch)
    assert answers.getvalue().count("\n") >= 2
    return code


def served(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """A page that is asked for, and ended by Ctrl-C."""
    with subprocess.Popen([sys.executable, "-m", "llmpy", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[0]
            with urllib.request.urlopen(address, timeout=10) as page:
                assert b"<title>" in page.read()
            with urllib.request.urlopen(f"{address}board", timeout=10) as board:
                shown = {row["name"] for row in json.load(board)["runs"]}
            assert shown >= {word for word in words if word.startswith("runs/")} and "runs/NAME" in shown
            opened, until = Path("opened"), time.monotonic() + 10
            while "--open" in words and not (opened.exists() and opened.read_text() == f"{address}\n"):
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
        finally:
            process.kill()
    return process.returncode


VERBS = {"watch": served, "chat": talked}


def of_pages() -> dict[Path, list[Command]]:
    """What is run of each page, in order; of the text what no fence, and no page before, has."""
    found = {page: list(typed(page)) for page in PAGES}
    known = {what(command) for commands in found.values() for command in commands}
    for page in PAGES:
        elsewhere = page.name.startswith("from-")  # for who comes from there: its scripts are not ours
        for command in spans(page):
            ours = after(command.words[:1], "llmpy") is not None or script(command) and not elsewhere
            if ours and what(command) not in known:
                known.add(what(command))
                found[page].append(command)
    return found


def what(command: Command) -> tuple[str, ...]:
    """A command, however its program is called."""
    return Path(command.words[0]).name, *command.words[1:]


def script(command: Command) -> str | None:
    """The program of this repository that is run, if one is."""
    return next((word for word in command.words if word.startswith(("bench/", "dev/"))), None)


def of_ranks(command: Command) -> bool:
    return command.words[0] in LAUNCHERS or "--ranks" in command.words


def is_elsewhere(command: Command) -> bool:
    return not set(ELSEWHERE).isdisjoint(command.words)


COMMANDS = of_pages()
ALL = {what(command): command for commands in COMMANDS.values() for command in commands}


@pytest.mark.parametrize("page", [page for page, commands in COMMANDS.items() if commands], ids=name)
def test_commands_run(page: Path, run: Run) -> None:
    for command in COMMANDS[page]:
        if not of_ranks(command) and not is_elsewhere(command):
            run(command)


def test_examples_of_help_run(run: Run) -> None:
    """Those that no page has."""
    parser = cli.build_parser()
    texts = [p.epilog or "" for p in (parser, *leaves(parser))]
    lines = [told(line) for text in texts for line in re.findall(r"^ +(llmpy .*)$", text, re.MULTILINE)]
    examples = [Command(f"--help: {line}", line, words_of(line)) for line in dict.fromkeys(lines)]
    assert len(examples) > 30
    for command in examples:
        if what(command) not in ALL:
            run(command)


def planned(command: Command) -> Any:
    """A test of its own; plans that are made by other processes take as long as they do."""
    marks = [pytest.mark.mpi] if "--plan" in command.words else []
    return pytest.param(command, id=command.place, marks=marks)


@needs_mpi
@pytest.mark.parametrize("command", [planned(c) for c in ALL.values() if of_ranks(c) and not is_elsewhere(c)])
def test_commands_of_several_ranks_run(command: Command, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.words[0] not in LAUNCHERS:
        run(command)
        return
    place = next(i for i, word in enumerate(command.words) if Path(word).name in ("llmpy", "python"))
    (_, *options), (program, *words) = command.words[:place], command.words[place:]
    launcher = launch.mpiexec()
    ours, environment = launch.flags(launcher)
    if bool(ours) != ("--host" in options):
        pytest.skip("it is a command of another MPI")
    more, said = added(command, words), ""
    if after([program], "llmpy") is not None:
        assert understood(words, monkeypatch) == 0
        words, said = ["-m", "llmpy", *words], f"on each of {options[options.index('-n') + 1]} ranks"
    options = [re.sub(r"\b[ab]\b", "localhost", word) for word in options]  # the hosts a and b
    words = [str(ROOT / word) if word == script(command) else word for word in words]
    line = [str(launcher), *options, sys.executable, *words, *more]
    done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_what_is_run_elsewhere_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reason is one of some command; verbs, scripts and options of these are there all the same."""
    left = [command for command in ALL.values() if is_elsewhere(command)]
    assert {word for command in left for word in command.words} >= set(ELSEWHERE)
    for command in left:
        if (words := after(command.words, "llmpy")) is not None:
            assert understood(words, monkeypatch) == 0, command.place
        if (program := script(command)) is not None:
            text = (ROOT / program).read_text("utf-8")
            for flag in (word for word in after(command.words, program) or () if word.startswith("--")):
                assert f'"{flag}"' in text, f"{command.place}: {flag}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_command_is_overlooked(page: Path) -> None:
    """Wherever a fence has a verb of llmpy, this is a command that was found."""
    verbs = "|".join(sorted({leaf.prog.split()[1] for leaf in leaves(cli.build_parser())}))
    text = "\n".join(fence.text for fence in fences(page) if fence.label in SHELLS)
    seen = re.findall(rf"^[^`#\n]*(?<![\w.`])llmpy (?:{verbs})\b", text, re.MULTILINE)
    assert len(seen) == sum(after(command.words, "llmpy") is not None for command in typed(page))


def test_what_is_not_there_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("train --no-such-option", "trian", "sample runs/NAME --temperature hot", "plan --model gpt9"):
        assert understood(line.split(), monkeypatch) != 0
    assert "required" not in capsys.readouterr().err
    with pytest.raises(AssertionError, match="say in ADDED or ELSEWHERE how to run"):
        added(Command("a page", "llmpy conjure", []), ["conjure"])


@pytest.mark.parametrize(
    "line",
    ["train --data my.txt", "train -o log", "data my.txt", "data tinyshakespeare", "convert IN OUT", "plot -o a.html"],
)
def test_what_is_not_written_is_missed(line: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "called", lambda *_: 0)
    with pytest.raises(AssertionError, match="a page: nothing new at"):
        run_llmpy(Command("a page", f"llmpy {line}", ["llmpy", *line.split()]), monkeypatch)


def test_printed_options_are_a_file_of_options(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TRAIN.split(), "--data", "my.txt", "--print-config"]) == 0
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
