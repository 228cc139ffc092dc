"""Values of any shape in records, files of options and tokenizer folders: used, or refused in one plain sentence.

test_fuzz_data.py corrupts bytes. `make fuzz` reads 100,000 inputs of each kind; `repeat` reads a failed one again.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.mutations import mutated
from support.samples import llama_tokenizer
from test_fuzz_data import MEGABYTES, SECONDS, peak, run_campaign

from llmpy.data import record_fields
from llmpy.data.records import kind_of, read_records
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.errors import LlmpyError
from llmpy.options.fields import options_of
from llmpy.options.train import TrainOptions
from llmpy.options.yaml_files import as_yaml

NORMAL, EACH, CAMPAIGNS = 300, 10_000, 10
PYTHON = re.compile(
    r"NoneType|Traceback|<class|\w+Error\b|object at 0x|object (has|is|does)|'\w+' object|indices|unhashable|iterable|"
    r"subscript|literal|codec|argument|unpack|positional|attribute|instance of|\bdicts?\b|\bstr\b|\bbool\b|panic|unwrap"
)
# fmt: off
WORDS = ("", " ", "hi", "2+2=", "user", "Assistant", "gpt", "system", "text", "image_url", "é\u2028\n\x1b[1m", "\ud800",
         EOT, "a" * 5000, "0", "true", "~", "\n\n")
NUMBERS = (0, 1, -1, 2, 0.5, 1e300, float("nan"), float("inf"), 2**63, 10**400, True, False, None)
LIKELY = ("text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output")
FIELDS = [*sorted(record_fields.KNOWN | record_fields.MESSAGE | record_fields.OF_MESSAGES), "parts", "type", "", "x\ny"]
OPTIONS = [*(f.name for f in options_of(TrainOptions)), "batch-size", "config", "learning_rate", "<<", "x" * 3000]
FORMS = ("|\n  a\n  b", "2026-11-28", "0x1f", "1_000", "!!binary aGk=", "!x y", "&a [*a]", "*a", "{<<: *a}", "? a",
         "1e3", ".nan", "-.inf", "1:30", "'~'", "~/x", "yes", "Off", "9" * 4400, "1e400", "[1, [2]]", "- - a")
TOKEN = {"content": "<tool>", "lstrip": False, "rstrip": True, "normalized": False, "special": True}
CONFIG = {"tokenizer_class": "GPT2Tokenizer", "eos_token": EOT, "unk_token": TOKEN, "add_prefix_space": False,
          "add_bos_token": True, "bos_token": EOT, "additional_special_tokens": ["<a>"]}
SPECIALS = {"eos_token": EOT, "pad_token": TOKEN, "extra_special_tokens": {"image_token": "<i>"}}
MODEL = {"model_type": "gpt2", "tokenizer_class": None, "eos_token_id": 256, "vocab_size": 300}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
# fmt: on
TEXT = "A cat's 12 hats,\n\n naïve 日本"
VALID: list[dict[str, bytes]] = []  # tokenizer folders, made once in a process


def value(source: random.Random, names: Sequence[str] = FIELDS, depth: int = 3) -> Any:
    """Return a JSON value of any shape."""
    kind, size = source.randrange(10 if depth else 6), source.choice((0, 1, 1, 2, 3))
    if kind < 6:
        return source.choice(WORDS if kind < 4 else NUMBERS)
    made = [value(source, names, depth - 1) for _ in range(size)]
    return made if kind < 8 else {source.choice(names): one for one in made}


def message(source: random.Random) -> Any:
    role, content = source.choice((("role", "content"), ("from", "value")))
    more = {source.choice(FIELDS): value(source)} if source.random() < 0.5 else {}
    made = {role: source.choice(("user", "assistant", "system")), content: "hi"} | more
    return made if source.random() < 0.9 else value(source)


def record(source: random.Random) -> Any:
    made = {source.choice(source.choice((LIKELY, FIELDS))): value(source) for _ in range(source.randrange(4))}
    if source.random() < 0.5:
        made[source.choice(LIKELY)] = [message(source) for _ in range(source.randrange(4))]
    return made if source.random() < 0.97 else value(source)


def records(source: random.Random, folder: Path) -> Callable[[], object]:
    rows = [json.dumps(record(source), ensure_ascii=source.random() < 0.5) for _ in range(source.choice((1, 1, 2, 3)))]
    name, text = source.choice((("a.json", "[" + ",".join(rows) + "]"), ("a.jsonl", "\n".join(rows))))
    (path := folder / name).write_text(text, "utf-8", "surrogatepass")
    return lambda: [document.text.encode() for document in read_records(path, kind_of(path, b"") or "")]


def options(source: random.Random, folder: Path) -> Callable[[], object]:
    text = ""
    for _ in range(source.choice((1, 1, 2, 3, 5))):
        made = json.dumps(value(source, OPTIONS), ensure_ascii=source.random() < 0.5)
        text += f"{source.choice(OPTIONS)}: {source.choice((made, source.choice(FORMS)))}\n"
    data, valid = text.encode("utf-8", "surrogatepass"), as_yaml(TrainOptions()).encode()
    path = folder / "a.yaml"
    path.write_bytes(source.choice((data, data, mutated(data, source), mutated(valid, source))))
    return lambda: TrainOptions.gather({"config": path, "data": (folder,)}).as_record()


def tokenizers(source: random.Random, folder: Path) -> Callable[[], object]:
    files = dict(source.choice(VALID))
    name = source.choice([*files])
    if name.endswith(".json") and source.random() < 0.7:
        root = changed(json.loads(files[name]), source)
        files[name] = json.dumps(root, ensure_ascii=source.random() < 0.5).encode("utf-8", "surrogatepass")
    else:
        files[name] = mutated(files[name], source)
    return put(folder, files)


def changed(root: Any, source: random.Random) -> Any:
    """Return a JSON value in which one value is removed, copied to another name, or replaced."""
    if not isinstance(root, dict | list) or not root:
        return value(source, ["content", "id"])
    key = source.choice([*root] if isinstance(root, dict) else range(len(root)))
    if isinstance(root[key], dict | list) and source.random() < 0.5:
        root[key] = changed(root[key], source)
    elif (way := source.randrange(4)) == 0:
        del root[key]
    elif way == 1 and isinstance(root, dict):
        root[source.choice((*WORDS, "unk_token", "content"))] = root[key]
    else:
        root[key] = value(source, ["content", "id", "special", EOT])
    return root


def put(folder: Path, files: dict[str, bytes]) -> Callable[[], object]:
    """Write a tokenizer folder, and return its reader."""
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)

    def read() -> None:
        loaded = Tokenizer.load(folder)
        assert loaded.decode(loaded.encode(TEXT)) == TEXT and loaded.ordinary().encode(EOT)

    return read


def make_valid(folder: Path) -> None:
    """Make tokenizer folders: two files of GPT-2's form, its tokenizer.json, and one of Llama 3's form."""
    llama_tokenizer(folder / "llama.json", names=["<tool>"])
    gpt2 = json.loads((trained := Tokenizer.train([TEXT * 50], 280)).to_json())
    config = CONFIG | {"added_tokens_decoder": {str(trained.vocab_size): TOKEN}}
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in gpt2["model"]["merges"])
    two: dict[str, Any] = {"vocab.json": gpt2["model"]["vocab"], "merges.txt": merges, "config.json": MODEL}
    old = {"special_tokens_map.json": SPECIALS, "added_tokens.json": {"<new>": trained.vocab_size}}
    llama = {"tokenizer.json": (folder / "llama.json").read_text("utf-8"), "tokenizer_config.json": FAST}
    whole = {"tokenizer.json": gpt2, "tokenizer_config.json": config, "config.json": MODEL}
    for files in (two | {"tokenizer_config.json": config}, two | old, whole, llama):
        VALID.append({k: (v if isinstance(v, str) else json.dumps(v)).encode() for k, v in files.items()})


def repeat(kind: Callable[..., Any], seed: int, number: int, folder: Path) -> bool:
    """Read one input and return whether it is used. Fails for another error, a poor message or a second of time."""
    read, about = kind(random.Random(f"{seed} {number}"), folder), f"{kind.__name__}, seed {seed}, input {number}"
    start, said = time.thread_time(), ""
    try:
        read()
    except LlmpyError as error:
        said = str(error).replace(str(folder), "")
        assert 10 <= len(str(error)) <= 2000 and len(said.splitlines()) == 1, f"{about}: not a sentence: {said!r}"
        assert not PYTHON.search(said) and any(f.name in said for f in folder.iterdir()), f"{about}: {said!r}"
    except BaseException as error:
        raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
    assert (seconds := time.thread_time() - start) < SECONDS, f"{about}: {seconds:.1f} s"
    return not said


def campaign(seed: int, count: int, folder: Path) -> None:
    make_valid(folder)
    for kind in (records, options, tokenizers):
        repeat(kind, -1, 0, folder)  # imports
        before = peak()
        used = sum(repeat(kind, seed, number, folder) for number in range(count))
        assert (grown := peak() - before) < MEGABYTES, f"{kind.__name__}, seed {seed}: {grown:.0f} MB more"
        print(f"{count:,} {kind.__name__}, {used:,} of them used, {grown:.0f} MB more")
    for files in VALID:
        put(folder, files)()


def test_values_of_any_shape() -> None:
    assert f"{NORMAL:,} tokenizers" in run_campaign(0, NORMAL, 60, "test_fuzz_records")


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, CAMPAIGNS + 1))
def test_many_values_of_any_shape(seed: int) -> None:
    print(run_campaign(seed, EACH, 600, "test_fuzz_records"))
