"""`bench peers` with fake programs, and its errors; the fake llama.cpp checks what it is given."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from support.refused import refused

from llmpy.bench import peers
from llmpy.bench.peers import Peer
from llmpy.cli import main as cli
from llmpy.options.bench import PeersOptions

posix = pytest.mark.skipif(sys.platform == "win32", reason="shell lines of a POSIX shell")
LINES = 'for n in 1 2 3 4 5 6 7; do echo "step $n: train loss 5.3 (took ${n}0.5 ms)"; done'


def printing(name: str, dtype: str, milliseconds: float) -> Peer:
    """A program that prints the lines of two warm-up steps and three more, then its version as JSON."""
    lines = "".join(f"step {n}: train loss 5.3 (took {milliseconds + n} ms)\n" for n in (90, 91, 0, 2, 1))
    code = f'import time; print({lines!r}, flush=True); time.sleep(0.1); print(\'{{"isa": "{name}", "step_ms": []}}\')'
    return Peer(name, dtype, [sys.executable, "-c", code])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """llm.py in 10 ms (fp32) and 5 ms (bf16), PyTorch in 30 ms (bf16) and 8 ms (fp32)."""
    ours = lambda o, t: [printing("llm.py fp32", "float32", 10), printing("llm.py bf16", "bfloat16", 5)]  # noqa: E731
    monkeypatch.setattr(peers, "our_peers", ours)
    theirs = lambda *_: [printing("PyTorch bf16", "bfloat16", 30), printing("PyTorch fp32", "float32", 8)]  # noqa: E731
    monkeypatch.setattr(peers, "torch_peers", theirs)


@posix
def test_all_are_compared(pretended: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peers.json"
    line = ["bench", "peers", "-B", "2", "-T", "8", "--steps", "3", "--rounds", "2", "--json", str(file)]
    assert cli.main([*line, "--peer", f"llm.c={LINES}; sleep 60", "--without", "Torch fp32"]) == 0
    shown = capsys.readouterr()
    numbers = json.loads(file.read_text())
    by_name = {p["name"]: p for p in numbers["peers"]}
    assert list(by_name) == ["llm.py fp32", "llm.py bf16", "PyTorch bf16", "llm.c"]
    ours = {"median_ms": 11, "tokens_per_s": pytest.approx(16e3 / 11), "ratio": 1, "step_ms": [10, 12, 11] * 2}
    assert by_name["llm.py fp32"] == by_name["llm.py fp32"] | ours
    assert by_name["PyTorch bf16"]["ratio"] == pytest.approx(31 / 6)
    assert 1 < by_name["PyTorch bf16"]["peak_rss_mb"] < 100
    assert by_name["llm.c"]["step_ms"] == [30.5, 40.5, 50.5] * 2  # without the first two of a process
    assert by_name["llm.c"]["ratio"] == pytest.approx(40.5 / 11)
    assert by_name["llm.c"]["peak_rss_mb"] > 1
    assert (numbers["failed"], by_name["PyTorch bf16"]["isa"]) == ({}, "PyTorch bf16")
    given = "--batch-size 2 --sequence-length 8 --steps 3 --rounds 2 --peer"
    assert numbers["command"].startswith(f"llmpy bench peers {given} 'llm.c=") and "json" not in numbers["command"]
    assert cli.build_parser().parse_args(shlex.split(numbers["command"])[1:]).without == ["Torch fp32"]
    assert numbers["machine"]["memory_gb"] > 0.1 and numbers["date"].startswith("20")
    assert re.search(r"PyTorch bf16 +31.0 +30.0 +516 +\d+ +5.17\n", shown.out)
    assert [shown.err.splitlines()[n] for n in (0, 4)] == [f"round {n}/2  llm.py fp32 11.0 ms" for n in (1, 2)]


@posix
def test_a_failed_program_is_one_line_and_the_others_continue(
    pretended: None, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "broken=echo 'cannot open file' >&2; exit 3"
    assert cli.main(["bench", "peers", "--rounds", "2", "--steps", "3", "--peer", broken, f"llm.c={LINES}"]) == 1
    shown = capsys.readouterr()
    assert "llm.c" in shown.out
    assert "broken" not in shown.out
    assert shown.err.count("broken") == 2  # once when it failed, once as the error
    last = shown.err.splitlines()[-1]
    assert re.fullmatch(r"llmpy: error: broken .*\b3: cannot open file\. .*--without \[bench\.peer-failed\]", last)


def test_ctrl_c_keeps_what_was_measured(
    pretended: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Peer.run

    def interrupted(peer: Peer, steps: int) -> list[float]:
        if peer.name == "PyTorch bf16":
            raise KeyboardInterrupt
        return run(peer, steps)

    monkeypatch.setattr(Peer, "run", interrupted)
    assert cli.main(["bench", "peers", "--steps", "3", "--json", str(tmp_path / "a.json")]) == 130
    assert "llm.py bf16" in capsys.readouterr().out
    assert [p["name"] for p in json.loads((tmp_path / "a.json").read_text())["peers"]] == ["llm.py fp32", "llm.py bf16"]


@posix
@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("true", "0 of 4 lines"),
        ("echo 'step 1: train loss 5.3 (took 1 ms)'", "1 of 4 lines"),
        ("/no/such/program", "code 127"),
        ("kill -TERM $$", "SIGTERM"),
    ],
)
def test_programs_that_cannot_be_measured(command: str, cause: str) -> None:
    with refused("bench.peer-failed", cause):
        Peer("x", "float32", command).run(2)


@posix
def test_a_program_that_keeps_running_is_stopped_with_its_children(tmp_path: Path) -> None:
    peer = Peer("x", "float32", f"({LINES}; sleep 60; touch {tmp_path}/late) | cat; echo end")
    assert peer.run(5) == [30.5, 40.5, 50.5, 60.5, 70.5]
    assert not (tmp_path / "late").exists()


@posix
def test_the_environment_of_a_command() -> None:
    (peer,) = peers.given_peers(PeersOptions(batch_size=2, sequence_length=8, steps=3, peer=("a BF16=b=c $B",)), 7)
    assert (peer.name, peer.dtype, peer.command) == ("a BF16", "bfloat16", "b=c $B")
    names = "a=x", "a fp32=x", "a int8=x", "a Q8_0=x"
    others = peers.given_peers(PeersOptions(peer=names), 7)
    assert [p.dtype for p in others] == ["float32", "float32", "int8", "int8"]
    peer.command = 'for n in 1 2 3; do echo "step $n: train loss 1 (took $((B * T * STEPS * THREADS)) ms)"; done'
    assert peer.run(1) == [2 * 8 * 5 * 7]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--peer llm.c", ["--peer 'llm.c'", "name=command"]),
        ("--peer =./a", ["--peer '=./a'"]),
        ("--peer a=", ["--peer 'a='"]),
        ("--rounds 0", ["--rounds 0"]),
        ("--model d1x", ["d1x"]),
        ("-T 2000", ["-T 2000", "gpt2", "1024", "[model.context-exceeded]"]),
        ("--decoding -T 1000 --steps 21", ["-T 1000 and 25 tokens", "gpt2", "1024", "[model.context-exceeded]"]),
        ("--json none/x.json", ["none/x.json", "[file.unwritable]"]),
    ],
)
def test_errors(pretended: None, line: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "peers", *line.split()]) == 1
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert err.count("\n") == 1


def test_torch_peers_get_the_same_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "tcmalloc", lambda: "libtcmalloc_minimal.so.4")
    monkeypatch.setenv("LD_PRELOAD", "liba.so")
    options = PeersOptions("d2", 3, 16, 300, steps=4, torch_python=Path("/no/python"))
    found = peers.torch_peers(options, 2)
    assert capsys.readouterr().err == "PyTorch runs with libtcmalloc_minimal.so.4 preloaded\n"
    names = ["PyTorch fp32", "PyTorch bf16", "torch.compile fp32", "torch.compile bf16"]
    assert [p.name for p in found] == names
    command: Any = found[3].command
    size = {"layers": 2, "heads": 2, "channels": 128, "context": 1024, "vocab_size": 300, "padded_vocab_size": 384}
    work = {"model": size, "B": 3, "T": 16, "steps": 6, "threads": 2, "dtype": "bfloat16", "decoding": False}
    assert json.loads(command[2]) == {**work, "compile": True}
    assert found[0].environment["LD_PRELOAD"] == "liba.so libtcmalloc_minimal.so.4"
    assert found[0].environment["OMP_NUM_THREADS"] == "2"
    assert peers.TORCH_PEER.is_file()
    with refused("bench.cannot-run", "No such file or directory"):
        found[0].run(1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.torch_peers(PeersOptions(), 2) == peers.llama_peers(PeersOptions(decoding=True), 2, Path()) == []
    assert re.search(r"--torch-python\n.*--llama-python\n", capsys.readouterr().err)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no PyTorch")
@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_torch_program_trains_and_decodes(dtype: str, decoding: bool) -> None:
    size = {"layers": 1, "heads": 2, "channels": 8, "context": 16, "vocab_size": 60, "padded_vocab_size": 64}
    work = {"B": 2, "T": 8, "steps": 4, "threads": 1, "dtype": dtype, "compile": False, "decoding": decoding}
    peer = Peer("x", dtype, [sys.executable, str(peers.TORCH_PEER), json.dumps({"model": size, **work})])
    assert len(peer.run(2)) == (4 if decoding else 2)
    assert peer.reports[0]["torch"] and ("prefill_ms" in peer.reports[0]) is decoding


@pytest.mark.parametrize("decoding", [False, True])
def test_our_commands_parse(decoding: bool) -> None:
    options = PeersOptions("d1", 2, 8, 300, decoding=decoding, steps=3)
    for peer in peers.our_peers(options, 1):
        found = cli.build_parser().parse_args(peer.command[3:])  # type: ignore[arg-type]
        work = {"dtype": peer.dtype, "model": "d1", "batch_size": 2, "vocab_size": 300, "threads": 1, "json": True}
        more = {"prompt_tokens": 8, "prefill": 8, "tokens": 3} if decoding else {"sequence_length": 8, "steps": 3}
        assert vars(found).items() >= (work | more).items()


LLAMA = '''
"""llama_cpp, for a vocabulary of 300: after token t at position p of text s comes 7 t + 11 p + 13 s."""
from ctypes import POINTER, c_float, cast
from types import SimpleNamespace as New

__version__, kept = "9.9", {}
llama_backend_init = llama_model_default_params = llama_context_default_params = llama_get_memory = lambda *_: New()
llama_model_load_from_file = lambda path, _: open(path, "rb").read(4) == b"GGUF" and New()
llama_init_from_model = lambda model, settings: model and settings
llama_print_system_info = lambda: b"AVX"

def llama_batch_init(n, embd, texts):
    return New(token=[0] * n, pos=[0] * n, logits=[0] * n, n_seq_id=[0] * n, seq_id=[[0] for _ in range(n)])

def llama_memory_seq_rm(memory, text, start, end):
    kept[text] = 0

def llama_decode(context, batch):
    for i in range(batch.n_tokens):
        (text,), p = batch.seq_id[i], batch.pos[i]
        assert batch.n_seq_id[i] == 1 and text < context.n_seq_max and p == kept[text]
        kept[text] += 1
        if p >= 4:
            assert batch.logits[i] and batch.token[i] == expected[text], (batch.token[i], expected)
        if batch.logits[i]:
            expected[text] = (7 * batch.token[i] + 11 * p + 13 * text) % 300
            rows[i] = (c_float * 300)()
            rows[i][expected[text]] = 1
    assert sum(kept.values()) <= context.n_ctx
    return 0

llama_get_logits_ith = lambda context, i: cast(rows[i], POINTER(c_float))
expected, rows = {}, {}
'''


def test_llama_cpp_decodes_our_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each text continues with the likeliest token, at the next position."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "our_peers", lambda o, t: [])
    line = "bench peers --decoding --model d1 --vocab-size 300 -B 3 -T 4 --steps 5 --rounds 1 --without Torch"
    file = tmp_path / "found.json"
    assert cli.main([*line.split(), "--llama-python", sys.executable, "--json", str(file)]) == 0, capsys.readouterr()
    numbers = json.loads(file.read_text())
    assert [(p["name"], p["dtype"]) for p in numbers["peers"]] == [
        ("llama.cpp fp32", "float32"), ("llama.cpp bf16", "bfloat16"), ("llama.cpp int8", "int8")
    ]  # fmt: skip
    for p in numbers["peers"]:
        assert (p["llama_cpp_python"], p["features"], len(p["step_ms"])) == ("9.9", "AVX", 5)
        assert p["prefill_ms"] > 0 and p["tokens_per_s"] == pytest.approx(3e3 / p["median_ms"])
    assert "decoding with d1 (vocabulary 300), 3 texts after 4 tokens" in capsys.readouterr().out
