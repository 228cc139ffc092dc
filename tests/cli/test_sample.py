"""`llmpy sample`: one prompt, several, or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from support.heard import hear
from support.laptop import Laptop
from support.models import untrained_run
from support.refused import refused

from llmpy import backend
from llmpy.cli import main as cli
from llmpy.cli.sample import read_prompts, sample
from llmpy.errors import LlmpyError
from llmpy.generate import generation
from llmpy.generate.generation import open_run, window_start
from llmpy.model.gpt2 import GPT2
from llmpy.options.sample_chat import SampleOptions
from llmpy.run import checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return untrained_run(tmp_path)


def texts(run: Path, **options: object) -> str:
    out: list[str] = []
    sample(SampleOptions(run, **options), out.append, Laptop())  # type: ignore[arg-type]
    return "".join(out)


def test_sample_continues_the_prompt(run: Path) -> None:
    text = texts(run, prompt=("The ",), tokens=20, top_k=5)
    assert text == texts(run, prompt=("The ",), tokens=20, top_k=5)
    assert text.startswith("The ")
    assert len(text) > 5


def test_compilation_is_announced_on_stderr(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, asked = Laptop(), []
    monkeypatch.setattr(backend, "load", lambda name, **how: asked.append((name, how)) or machine)
    out: list[str] = []
    sample(SampleOptions(run, tokens=3, threads=2, dtype="bfloat16"), out.append)
    assert asked == [("cpu", {"threads": 2, "dtype": "bfloat16"})]
    assert machine.warmed == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "compiling nothing\n")
    assert SampleOptions(run).dtype == "auto"
    with refused("option.invalid", "--dtype int4"):
        SampleOptions(run, dtype="int4")


def test_several_prompts_are_the_single_ones(run: Path) -> None:
    prompts = ("The ", "A longer prompt, beyond the reach", "x")
    together = texts(run, prompt=prompts, tokens=12)
    alone = [texts(run, prompt=(p,), tokens=12, seed=1337 + i).removesuffix("\n") for i, p in enumerate(prompts)]
    assert together == "\n---\n".join(alone) + "\n"


def test_json_has_tokens_and_log_probabilities(run: Path) -> None:
    found = json.loads(texts(run, prompt=("The ", "x"), tokens=9, json=True, temperature=0))
    assert [t["prompt"] for t in found["texts"]] == ["The ", "x"]
    tokenizer = open_run(run)[1]
    model = GPT2(open_run(run)[0].config, Laptop())
    checkpoint.load_parameters(run / "model.safetensors", model.params)
    for t in found["texts"]:
        assert t["prompt_tokens"] == tokenizer.encode(t["prompt"])
        assert t["text"] == tokenizer.decode(t["tokens"])
        assert (t["ended"], len(t["tokens"])) == ("length", 9)
        text = list(t["prompt_tokens"])
        for token, given in zip(t["tokens"], t["logprobs"], strict=True):
            logits = model.logits(np.array([text[window_start(len(text), 8) :]], np.int32))[0].astype(np.float64)
            assert given == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)
            text.append(token)


def test_a_stop_ends_one_text_and_not_the_others(run: Path) -> None:
    options = {"prompt": ("The ", "x"), "tokens": 30, "json": True, "temperature": 1.0, "top_k": 0}
    whole = json.loads(texts(run, **options))["texts"]
    stop = whole[0]["text"][4:6]
    found = json.loads(texts(run, **options, stop=(stop,)))["texts"]
    assert found[0]["ended"] == "stop"
    assert found[0]["text"] == whole[0]["text"][: whole[0]["text"].index(stop)]
    assert found[0]["tokens"] == whole[0]["tokens"][: len(found[0]["tokens"])]
    if stop not in whole[1]["text"]:
        assert found[1] == whole[1]


def test_end_of_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends each text without being printed; with ignore_eot it is printed and ends none."""
    eot = 256
    monkeypatch.setattr(generation, "choose", lambda _l, _c, _h, text: eot if len(text) in (6, 9) else 97)
    assert texts(run, prompt=("1234",), tokens=9) == "1234aa\n"
    assert texts(run, prompt=("1234", "1234567"), tokens=9) == "1234aa\n---\n1234567aa\n"
    assert texts(run, prompt=("1234",), tokens=9, stop=("ab",)) == "1234aa\n"  # held-back text is printed at the end
    assert texts(run, prompt=("1234",), tokens=6, ignore_eot=True) == "1234aa<|endoftext|>aa<|endoftext|>\n"
    found = json.loads(texts(run, prompt=("1234", "1234567890"), tokens=4, json=True))["texts"]
    assert [(t["ended"], t["text"], t["tokens"]) for t in found] == [
        ("eot", "aa", [97, 97, eot]),
        ("length", "aaaa", [97] * 4),
    ]


def test_prompts_of_a_file(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n", "utf-8")
    found = json.loads(texts(run, prompt=("zero",), prompts_file=file, tokens=2, json=True))
    assert [t["prompt"] for t in found["texts"]] == ["zero", "one", "two"]
    separators = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\rj"
    file.write_bytes(f"\ufeff{separators}\r\n \r\nlast \ufeff".encode())
    assert read_prompts(SampleOptions(run, prompts_file=file)) == [separators, "last \ufeff"]
    file.write_text("\n", "utf-8")
    with refused("sample.no-prompts", file):
        texts(run, prompts_file=file)
    file.write_bytes(b"\xff\xfe")
    with refused("data.not-utf8", file):
        texts(run, prompts_file=file)
    with refused("file.missing", tmp_path / "none"):
        texts(run, prompts_file=tmp_path / "none")


def test_more_texts_than_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(LlmpyError, match=r"\b2 texts of 8 tokens\b.*GB"):
        texts(run, prompt=("a", "b"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0), ("min_p", -1.0), ("repetition_penalty", 0.0), ("seed", 0)],
)
def test_values_out_of_range(name: str, value: float) -> None:
    with refused("option.invalid", f"--{name.replace('_', '-')} {value}"):
        SampleOptions(Path("x"), **{name: value})  # type: ignore[arg-type]


def test_prompts_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = hear(monkeypatch)
    assert cli.main(["sample", "--prompt", "a", "--prompt", "b", "RUN", "--stop", ".", "--json"]) == 0
    assert heard == [SampleOptions(Path("RUN"), prompt=("a", "b"), stop=(".",), json=True)]
