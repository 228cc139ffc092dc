"""The command line: flags, help, one-line errors with exit codes, late imports."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.heard import hear

from llmpy import __version__
from llmpy.cli import main as cli
from llmpy.cli.help_text import EPILOGS
from llmpy.data.pipeline import VOCAB_AT_LEAST, VOCAB_AT_MOST
from llmpy.model.config import GPT2_VOCAB
from llmpy.options.bench import BenchOptions
from llmpy.options.fields import flags_of
from llmpy.options.sample_chat import SampleOptions
from llmpy.options.train import TrainOptions


def test_names_that_acceptance_checks_use(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = hear(monkeypatch)
    line = (
        "train --data a.txt b --data c --model gpt2 --out RUN -B 4 -T 64 --steps 5 --minutes 2 --lr 0.1 "
        "--seed 3 --threads 2 --dtype float32 --no-shuffle"
    )
    assert cli.main(line.split()) == 0
    assert heard == [
        TrainOptions(
            data=(Path("a.txt"), Path("b"), Path("c")), model="gpt2", out=Path("RUN"), batch_size=4,
            sequence_length=64, steps=5, minutes=2.0, lr=0.1, seed=3, threads=2, dtype="float32", shuffle=False,
        )
    ]  # fmt: skip
    cli.main(["sample", "RUN", "--prompt", "a b", "--temperature", "0", "--top-k", "3", "--seed", "9"])
    assert heard[1] == SampleOptions(Path("RUN"), prompt=("a b",), temperature=0.0, top_k=3, seed=9)
    cli.main(["bench", "step", "--model", "gpt2", "-B", "4", "-T", "64", "--dtype", "float32", "--json"])
    assert heard[2] == BenchOptions("gpt2", 4, 64, dtype="float32", json=True)
    for words in (["train"], ["sample", "RUN"], ["bench", "step"]):
        cli.main(words)
    assert heard[3:] == [TrainOptions(), SampleOptions(Path("RUN")), BenchOptions()]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("trian", "'trian'"),
        ("train --modl d4", "--model?"),
        ("watch --host 0.0.0.0", "--host"),
        ("train --schedule x", "'x'"),
        ("train --lr fast", "--lr: invalid float value: 'fast'"),
        ("train --steps", "--steps"),
        ("train book.txt", "--data"),
        ("train --data=", "empty"),
        ("sample", "RUN"),
        ("bench", "WHAT"),
        ("--zzzz train", "--zzzz"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(line: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("train --model gpt2-small", " gpt2?"),
        ("train --resume RUN --out OTHER", "--out OTHER"),
        ("train --lr -1", "--lr -1"),
        ("data --out tokens", "tinyshakespeare"),
        ("train --init gpt2-mediun", "gpt2-medium?"),
        ("chat runs/on", "runs/one?"),
        ("train --model d0", "'d0'"),
        ("data tinyshakespear", "tinyshakespeare?"),
        ("sample runs/oen", "runs/one?"),
        ("sample elsewhere", "runs/one"),
        ("convert nothing out", "nothing"),
        ("watch runs/one/model.safetensors", "runs/one/model.safetensors"),
        ("train -T 2000", "-T 1024"),
        (f"sample {'x' * 300}", "xxx"),
        (f"train --out {'x' * 300}", "xxx"),
        ("train --minutes 1e307", "--minutes 1e+307"),
    ],
)
def test_errors_are_one_line_and_code_1(
    line: str, named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And write nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "runs" / "one" / name).touch()
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(line.split()) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"llmpy: error: .* \[[a-z0-9.-]+\]\n", err)
    assert named in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (MemoryError("Unable to allocate 9 TiB"), 1, ("9 TiB", "-B", "[memory.exhausted]")),
        (KeyboardInterrupt(), 130, ("Ctrl-C", "[stopped]")),
        (OSError(28, "No space left on device", "a file"), 1, ("No space left on device: a file [system.os-error]",)),
        (OSError("odd"), 1, ("odd [system.os-error]",)),
    ],
)
def test_other_ends(
    error: BaseException, code: int, named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def failing(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run", failing)
    assert cli.main(["train"]) == code
    err = capsys.readouterr().err
    assert all(text in err for text in named)


@pytest.mark.parametrize("verb", ["", *(verb.name for verb in cli.VERBS)])
def test_help(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits 80 columns, and without a verb 30 lines."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.main([*verb.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: llmpy {verb}".strip() in text
    assert EPILOGS.get(verb, "") in text
    assert max(map(len, text.splitlines())) <= 80
    if verb == "train":
        assert [f.name for f in flags_of(TrainOptions) if f"--{f.name.replace('_', '-')}" not in text] == []
        assert "--init-state" not in text
    if verb == "plan":
        numbers = GPT2_VOCAB, VOCAB_AT_LEAST, VOCAB_AT_MOST, TrainOptions().sequence_length
        assert all(str(number) in text for number in numbers)
    if not verb:
        assert len(text.splitlines()) <= 30
        names = dict.fromkeys(verb.name.split()[0] for verb in cli.VERBS)
        assert re.findall(r"^    (\w+) ", text, re.MULTILINE) == [*names]
        assert cli.main([]) == 2


def test_every_verb_has_its_function() -> None:
    text = Path(str(cli.__file__)).read_text("utf-8")
    found = re.findall(r'calling\("([\w.]+)", "(\w+)"', text)
    assert len(found) == 14
    for module, name in found:
        assert callable(getattr(importlib.import_module(f"llmpy.{module}"), name))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8", timeout=60)


def test_help_needs_neither_numpy_nor_numba() -> None:
    program = (
        "import sys; from llmpy.cli import main as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'numba', 'llvmlite', 'tokenizers', 'tqdm', 'psutil'} & set(sys.modules)))"
    )
    assert python("-c", program).stdout.endswith("\n[]\n")
    assert python("-m", "llmpy", "--version").stdout == f"llmpy {__version__}\n"


@pytest.mark.parametrize(
    "setting", ["PYTHONOPTIMIZE=2", "PYTHONWARNINGS=error", "PYTHONIOENCODING=ascii", "PYTHONSAFEPATH=1"]
)
def test_settings_of_python(setting: str) -> None:
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"} | dict([setting.split("=")])
    for words in (["--help"], ["train", "--help"]):
        ended = subprocess.run([sys.executable, "-m", "llmpy", *words], capture_output=True, env=environment)
        assert (ended.returncode, ended.stderr) == (0, b"") and b"llmpy" in ended.stdout


@pytest.mark.parametrize(
    "setting", ["NUMBA_DISABLE_JIT=1", "NUMBA_NUM_THREADS=0", "NUMBA_NUM_THREADS=many", "NUMBA_DEBUG_JIT=1"]
)
def test_settings_of_numba_that_break_kernels_are_named(setting: str) -> None:
    program = "from llmpy import backend; from llmpy.errors import LlmpyError\n"
    program += "try: backend.load('cpu', threads=1)\nexcept LlmpyError as error: print(error.code, error)"
    environment = os.environ | dict([setting.split("=")])
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("environment.numba ") and setting in ended.stdout and "\n" not in ended.stdout[:-1]


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps the current folder")
def test_the_current_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["plan"]) == 1
    assert capsys.readouterr().err.endswith("[system.no-folder]\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_unwritten_output_is_an_error() -> None:
    command, quiet = [sys.executable, "-m", "llmpy", "--help"], os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=quiet)
    assert (ended.returncode, ended.stderr) == (1, "llmpy: error: No space left on device [system.os-error]\n")


@pytest.mark.skipif(os.name != "posix", reason="Windows reports a closed pipe differently")
def test_a_closed_pipe(tmp_path: Path) -> None:
    """Work continues; generated text ends without a traceback."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 200, "utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    text = "from llmpy.cli import main as cli; cli.run = lambda a: print('x' * 100_000) or 0; exit(cli.main([]))"
    for words, code in (
        (["-m", "llmpy", "data", "a.txt", "--tokenizer", "bytes", "--out", "tokens"], 0), (["-c", text], 1)
    ):  # fmt: skip
        ended = subprocess.run([sys.executable, *words], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
        assert (ended.returncode, ended.stderr) == (code, "")
    os.close(writer)
    assert (tmp_path / "tokens" / "train.bin").exists()


TRAINING = """
import sys
from pathlib import Path
from support.laptop import Laptop
from llmpy.cli import main as cli
from llmpy.options.train import TrainOptions
from llmpy.train import assemble
cli.run = lambda words: assemble.train(TrainOptions(
    data=(Path(words[0]),), model="d1", out=Path(words[1]), batch_size=2, sequence_length=16,
    steps=int(words[2]), eval_batches=2, sample_tokens=5, vocab_size=300), Laptop())
sys.exit(cli.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows reports a closed pipe differently")
@pytest.mark.parametrize(("steps", "code"), [(20, 0), (100_000, 130)])
def test_training_survives_a_closed_pipe(tmp_path: Path, steps: int, code: int) -> None:
    """`llmpy train 2>&1 | head` continues; Ctrl-C during `llmpy train 2>&1 | tee log` kills tee and still saves."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "text.txt"), str(tmp_path / "run"), str(steps)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if f" 2/{steps}" in line:
            break
    process.stdout.close()
    if code:
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == code
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert (f"{steps}/{steps}" in (tmp_path / "run" / "console.log").read_text("utf-8")) is not bool(code)


def test_errors_are_red_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(["train", "--lr", "-1"]) == 1
    assert capsys.readouterr().err.startswith("\x1b[31mllmpy: error:\x1b[0m --lr -1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["train", "--lr", "-1"]) == 1
    assert capsys.readouterr().err.startswith("llmpy: error: --lr -1")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sample no\x1b]52;c;aGk=\x07run\n2", 1), ("train --x\x1b[2J", 2), ("train --schedule \x9b1m", 2),
        ("plot no\u202efile", 1), ("convert no\x1bfile x.bin", 1), ("train --config a.yaml", 1),
    ],
)  # fmt: skip
def test_errors_have_no_control_characters(
    line: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text('"key\\e]52;c;aGk=\\a": 1\n')
    with contextlib.suppress(SystemExit):
        assert cli.main(line.split(" ")) == code
    error = capsys.readouterr().err
    assert "\\x" in error or "\\u" in error, error
    assert all(c.isprintable() for c in error.removesuffix("\n")), error


def test_progress_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    cli.log("wrote a\x1b[2J\nb")
    cli.show("a\nb")
    cli.write("exact\x1b")
    assert capsys.readouterr().out == "wrote a\\x1b[2J\\nb\na\nb\nexact\x1b"
