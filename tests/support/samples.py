"""Small models in memory and in every format, and a tokenizer, for tests of readers and writers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.laptop import TINY

from llmpy import backend
from llmpy.data.loader import Position
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.formats import huggingface, llmc, llmc_state, native
from llmpy.formats.gguf import LLAMA3
from llmpy.formats.source import DTYPES, Source, shapes
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.rng import MT19937

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"  # tinyshakespeare and GPT-2's ranks, if present
needs_data = pytest.mark.skipif(not (SHARED / "gpt2.tiktoken").exists(), reason="tinyshakespeare is not here")


def gpt2_table(path: Path, version: int = 2) -> None:
    """Write GPT-2's tokens as llm.c's tokenizer file."""
    tokens = [base64.b64decode(line.split()[0]) for line in (SHARED / "gpt2.tiktoken").read_bytes().splitlines()]
    path.write_bytes(llmc_table(*tokens, EOT.encode(), eot=50256 * (version == 2), version=version))


def llmc_table(*tokens: bytes, eot: int | None = None, version: int = 2, count: int | None = None) -> bytes:
    """Return llm.c's tokenizer file; EOT is the last token by default."""
    header = np.zeros(256, "<u4")
    header[:4] = 20240328, version, count or len(tokens), len(tokens) - 1 if eot is None else eot
    return header.tobytes() + b"".join(bytes([len(t)]) + t for t in tokens)


def in_memory(config: ModelConfig = TINY, dtype: str = "float32", seed: int = 1) -> Source:
    """Return a model of random numbers exact in `dtype`, with padding rows 0 and a few edge values."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.3, s).astype(np.float32).astype(DTYPES[dtype]) for name, s in shapes(config).items()
    }
    tensors.get("ln_f_b", tensors["wte"][0])[:2] = -0.0, 1e-7
    for name in tensors.keys() & {"wte", "head"}:
        tensors[name][config.vocab_size :] = 0
    return Source(Path("memory"), "model in memory", config, dtype, config.context, tensors.__getitem__)


def same(a: Source, b: Source) -> bool:
    """Return whether two models are equal in shape and type, and bitwise."""
    return (a.config, a.dtype) == (b.config, b.dtype) and all(
        a.read(name).tobytes() == b.read(name).tobytes() for name in shapes(a.config)
    )


def sharded(folder: Path, source: Source) -> None:
    """Write a Hugging Face folder of two files with an index."""
    huggingface.write_model(folder, source, source.dtype)
    whole = folder / huggingface.WEIGHTS_FILE
    tensors = load_file(whole)
    whole.unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{i % 2 + 1:05d}-of-00002.safetensors"
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / huggingface.INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def with_tokenizer(source: Source, path: Path) -> Source:
    """Return the model with a byte tokenizer of 257 tokens."""
    Tokenizer.bytes().save(path)
    return replace(source, tokenizer=path)


def llmc_debug(source: Source, model: Path, state: Path) -> None:
    """Write a model and its debug state of llm.c, computed by the reference."""
    twin = GPT2(source.config, backend.load("reference"))
    source.fill(twin.params)
    text = np.random.default_rng(2).integers(0, source.config.vocab_size, 4 * 8 + 1, dtype=np.int32)
    tokens, targets = text[:-1].reshape(4, 8), text[1:].reshape(4, 8)
    logits = twin.logits(tokens, None)
    loss = twin.loss_and_grads(tokens, targets)
    llmc.write_model(model, source, "float32")
    write_debug(state, llmc.DebugState(tokens, targets, logits, loss, lambda name: getattr(twin.grads, name)))


def write_debug(path: Path, state: llmc.DebugState) -> None:
    """Write a debug state of llm.c, as its PyTorch script does."""
    header = np.zeros(256, "<i4")
    header[:4] = (llmc.DEBUG, 2, *state.tokens.shape)
    with path.open("wb") as file:
        for x in (header, state.tokens.astype("<i4"), state.targets.astype("<i4")):
            file.write(x.tobytes())
        for x in (state.logits, np.array([state.loss]), *map(state.gradient, llmc.ORDER)):
            x.astype("<f4").tofile(file)


def training_state(
    config: ModelConfig, ranks: int = 1, shuffle: bool = True, master: bool = True
) -> llmc_state.TrainingState:
    """Return a state of random numbers after 7 updates."""
    rng = np.random.default_rng(5)
    n = sum(int(np.prod(s)) for s in shapes(config).values())
    places = []
    for rank in range(ranks):
        twister = MT19937(42 + rank)
        orders = [np.arange(k, dtype=np.int32) for k in ((3, 11) if shuffle else (0, 0))]
        for order in orders:
            twister.permutation(order)
        places.append(Position(1, 4, orders[0], orders[1], twister.state))
    m, v, weights = rng.normal(size=(3, n)).astype(np.float32)
    return llmc_state.TrainingState(7, m, v, weights if master else None, shuffle, tuple(places))


WRITERS: dict[str, Callable[[Path, Source], object]] = {
    "llmc": lambda path, source: llmc.write_model(path, source, source.dtype),
    "native": native.write_model,
    "hf": lambda path, source: huggingface.write_model(path, source, source.dtype),
    "hf sharded": sharded,
}


def llama_tokenizer(
    path: Path,
    specials: Sequence[str] = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    names: Sequence[str] = (),
) -> Any:
    """Write a tokenizer.json like Llama 3's: unmerged words, special tokens last, the first one prepended."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["the cat, the dog: 12 naïve cafés and 日本語, it's\n" * 20], trainer)
    library.add_special_tokens([AddedToken(token, special=True) for token in specials])
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in names])
    first = [(specials[0], library.token_to_id(specials[0]))]
    library.post_processor = processors.TemplateProcessing(f"{specials[0]} $A", special_tokens=first)
    library.save(str(path))
    return library
