"""The adapter for lm_eval against sums by hand; without lm_eval installed, a stub replaces its base class."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, Laptop, tiny_model
from support.models import build
from support.refused import refused
from support.samples import in_memory

from llmpy.data.tokenizer import Tokenizer
from llmpy.formats import huggingface
from llmpy.generate.generation import generate
from llmpy.generate.sampling import Choice, logprob
from llmpy.model.config import LlamaConfig
from llmpy.model.families import with_adapters
from llmpy.rng import Xorshift64Star
from llmpy.run import checkpoint
from llmpy.system.command import install

REAL = importlib.util.find_spec("lm_eval") is not None
REACH = 12
pytestmark = pytest.mark.filterwarnings("default" if REAL else "error")  # warnings of lm_eval's dependencies


class Hook:
    """Records the answers that lm_eval caches."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def add_partial(self, *answer: Any) -> None:
        self.seen.append(answer)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the module, with lm_eval or its stub."""
    if not REAL:
        model, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")
        vars(model)["LM"] = type("LM", (), {"__init__": lambda self: setattr(self, "cache_hook", Hook())})
        vars(registry)["register_model"] = lambda name: lambda kind: kind
        for name, module in (("lm_eval", types.ModuleType("lm_eval")), ("lm_eval.api", types.ModuleType("lm_eval.api")),
                             ("lm_eval.api.model", model), ("lm_eval.api.registry", registry)):  # fmt: skip
            monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("llmpy.tools.lm_eval")
    if not REAL:
        del sys.modules["llmpy.tools.lm_eval"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model.safetensors", tiny_model(), REACH)
    Tokenizer.train(["The cat sat on the mat, and the dog ran. " * 20], TINY.vocab_size).save(
        tmp_path / "tokenizer.json"
    )
    return tmp_path


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def by_hand(made: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Return the sum token by token, each from a separate forward pass."""
    text, total, greedy = [*context, *continuation], 0.0, True
    for i in range(len(context), len(text)):
        # Pieces end after every REACH tokens of the continuation, and at its end; a token sees its piece.
        end = min(len(context) + ((i - len(context)) // REACH + 1) * REACH, len(text))
        logits = made.model.logits(np.array([text[max(0, end - REACH - 1) : i]], np.int32))[0]
        total += logprob(logits, text[i])
        greedy &= int(logits.argmax()) == text[i]
    return total, greedy


PAIRS = [
    ("The cat", " sat"), ("The cat ", "sat on the mat"), ("", "dog"), (" \n", "dog"),
    ("a" * 40, "and the dog ran" * 4),
]  # fmt: skip


def adapted(run: Path) -> None:
    """Turn the model into an adapter of a Llama."""
    config = LlamaConfig(2, 4, 8, REACH, TINY.vocab_size, kv_heads=2)
    source = replace(in_memory(config), tokenizer=run / "tokenizer.json")
    huggingface.write_model(run / "base", source, "float32")
    model = build(with_adapters(config, 2, base=str(run / "base")), Laptop())
    checkpoint.save(run / "model.safetensors", model, REACH)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_likelihoods_are_those_by_hand(harness: Any, run: Path, batch_size: Any) -> None:
    if batch_size == 3:
        adapted(run)
    made = harness.Harness(str(run), batch_size=batch_size, machine=Laptop(np.float64))
    found = made.loglikelihood([asked(*pair) for pair in PAIRS], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        cut = context.rstrip()
        ids = made.tokens.encode(cut) if cut else [made.tokens.eot]
        rest = made.tokens.encode(context + continuation)[len(ids) if cut else 0 :]
        want = by_hand(made, ids, rest)
        assert value == pytest.approx(want[0], rel=1e-12)
        assert greedy == want[1]
    texts = ["The cat sat on the mat, and the dog ran. " * 3, "x", ""]
    rolling = made.loglikelihood_rolling([asked(text) for text in texts], disable_tqdm=True)
    assert rolling == pytest.approx([by_hand(made, [made.tokens.eot], made.tokens.encode(t))[0] for t in texts], 1e-12)


def test_greedy_continuations_are_greedy(harness: Any, run: Path) -> None:
    made = harness.Harness(str(run), machine=Laptop())
    ids = made.tokens.encode("The cat")
    follows = list(generate(made.model, ids, 4, REACH, Xorshift64Star(1), Choice(0)))
    assert list(made._score([([*ids, *follows], 4)]))[0][1]
    assert not list(made._score([([*ids, *follows[:3], (follows[3] + 1) % 256], 4)]))[0][1]


def test_generation_is_that_of_sample(harness: Any, run: Path) -> None:
    made = harness.Harness(str(run), batch_size=2, machine=Laptop())
    encode, decode = made.tokens.encode, made.tokens.decode

    def alone(text: str, count: int) -> str:
        return decode(list(generate(made.model, encode(text), count, REACH, Xorshift64Star(1), Choice(0))))

    contexts = ["The cat", "and the", "x"]
    found = made.generate_until([asked(c, {"until": [], "max_gen_toks": 9}) for c in contexts], disable_tqdm=True)
    assert found == [alone(c, 9) for c in contexts]
    stop = found[0][2:4]
    settings = {"until": stop, "max_gen_toks": 9, "do_sample": False, "temperature": 1.0}
    assert made.generate_until([asked("The cat", settings)], disable_tqdm=True) == [found[0].partition(stop)[0]]
    drawn = {"max_gen_toks": 30, "do_sample": True, "temperature": 1.0, "top_k": 50}
    once, again = (made.generate_until([asked("x", drawn), asked("x", drawn)], disable_tqdm=True) for _ in range(2))
    assert once == again
    assert once[0] != once[1]
    del drawn["temperature"]  # default 1 with do_sample
    assert made.generate_until([asked("x", drawn), asked("x", drawn)], disable_tqdm=True) == once
    made.model.params.wte[made.tokens.eot] = 10 * made.model.logits(np.array([encode("x")], np.int32)).max()
    made.model.params.ln_f_w[...], made.model.params.ln_f_b[...] = 0, 1
    assert made.generate_until([asked("x", {})], disable_tqdm=True) == [""]


def test_answers_are_cached_at_once(harness: Any, run: Path) -> None:
    made = harness.Harness(str(run), machine=Laptop())
    made.cache_hook = Hook()
    found = made.loglikelihood([asked("a", "b")], disable_tqdm=True)
    rolling = made.loglikelihood_rolling([asked("a b")], disable_tqdm=True)
    made.generate_until([asked("a", {"max_gen_toks": 1})], disable_tqdm=True)
    assert made.cache_hook.seen[:2] == [
        ("loglikelihood", ("a", "b"), found[0]), ("loglikelihood_rolling", ("a b",), rolling[0])
    ]  # fmt: skip
    assert made.cache_hook.seen[2][:2] == ("generate_until", ("a", {"max_gen_toks": 1}))


def test_without_lm_eval() -> None:
    program = "import sys; sys.modules['lm_eval'] = None; import runpy; "
    program += "runpy.run_module('llmpy.tools.lm_eval', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert ended.returncode == 1
    assert ended.stderr.startswith("llmpy: error: ")
    assert ended.stderr.endswith(f"{install('llmpy[lm-eval]')} [package.missing]\n")


TASK = """
task: cats
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.skipif(not REAL, reason="no lm_eval")
def test_the_command_runs_a_task(run: Path, tmp_path: Path) -> None:
    """lm_eval's command, from a file of questions to its table."""
    file, tasks = tmp_path / "cats.jsonl", tmp_path / "tasks"
    questions = [{"question": f"The cat {i}", "choices": [" sat", " ran"], "answer": i % 2} for i in range(6)]
    file.write_text("".join(json.dumps(q) + "\n" for q in questions), "utf-8")
    tasks.mkdir()
    (tasks / "cats.yaml").write_text(TASK.replace("FILE", str(file)), "utf-8")
    words = ["--model_args", f"run={run},dtype=float32", "--tasks", "cats", "--include_path", str(tasks)]
    command = [sys.executable, "-m", "llmpy.tools.lm_eval", *words]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "|cats |" in ended.stdout
    ended = subprocess.run([*command[:4], "run=nowhere", *command[5:]], capture_output=True, encoding="utf-8")
    assert ended.returncode == 1
    assert "nowhere" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("x", ""), ("", ""), ("The c", "at"), ("The cat s", "at"), ("The ca", "t "),
        ("The cat sat on the mat, an", "d"), ("The cat sat on t", "he"), ("The cat", ""),
    ],
)  # fmt: skip
def test_a_continuation_without_a_token_is_refused(harness: Any, run: Path, context: str, continuation: str) -> None:
    """It would count as certain. lm_eval's own model raises there, too."""
    made = harness.Harness(run=str(run), machine=Laptop())
    with refused("request.no-continuation", "request 2", repr(continuation), repr(context[-40:])):
        made.loglikelihood([asked("The", " cat"), asked(context, continuation)], disable_tqdm=True)
