"""GGUF, the files of llama.cpp: written by the `gguf` library, never read.

Matrices in the type asked for; vectors and wpe stay float32, as llama.cpp's own conversion has them. The head is
tied: llama.cpp takes token_embd where there is no output.weight. Tensor names are those of its architecture "gpt2".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..model.gpt2 import params_table
from ..system.command import install
from ..system.durable import write_whole
from .source import DTYPES, Source, cast

# ours → llama.cpp's; {} is the layer
NAMES = {
    "wte": "token_embd.weight",
    "wpe": "position_embd.weight",
    "attn_qkv_w": "blk.{}.attn_qkv.weight",
    "attn_proj_w": "blk.{}.attn_output.weight",
    "mlp_fc_w": "blk.{}.ffn_up.weight",
    "mlp_proj_w": "blk.{}.ffn_down.weight",
    "ln_1_w": "blk.{}.attn_norm.weight",
    "ln_1_b": "blk.{}.attn_norm.bias",
    "attn_qkv_b": "blk.{}.attn_qkv.bias",
    "attn_proj_b": "blk.{}.attn_output.bias",
    "ln_2_w": "blk.{}.ffn_norm.weight",
    "ln_2_b": "blk.{}.ffn_norm.bias",
    "mlp_fc_b": "blk.{}.ffn_up.bias",
    "mlp_proj_b": "blk.{}.ffn_down.bias",
    "ln_f_w": "output_norm.weight",
    "ln_f_b": "output_norm.bias",
}
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
TENSOR_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NORMAL, CONTROL = 1, 3  # llama.cpp's token types
LLAMA3 = (  # the pattern for words in Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_model(path: Path, source: Source, dtype: str) -> None:
    """Write a GGUF file, whole or not at all. Raises LlmpyError without the library, or if the disk refuses."""
    try:
        import gguf
    except ImportError:
        raise LlmpyError("writing GGUF needs the gguf library", install("llmpy[gguf]")) from None
    c = source.config
    tensors = [(t.name, t.shape, dtype if t.decay and t.name != "wpe" else "float32") for t in params_table(c)]

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        writer.add_block_count(c.layers)
        writer.add_context_length(c.context)
        writer.add_embedding_length(c.channels)
        writer.add_feed_forward_length(4 * c.channels)
        writer.add_head_count(c.heads)
        writer.add_layer_norm_eps(1e-5)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
        _add_tokenizer(writer, source)
        for name, shape, kind in tensors:
            size, raw = DTYPES[kind].itemsize, gguf.GGMLQuantizationType[TENSOR_TYPES[kind]]
            for theirs, one in _theirs(name, shape, c.vocab_size):
                # the library has no bfloat16: it takes bytes, and their count in place of the last dimension
                stored = (*one[:-1], size * one[-1]) if kind == "bfloat16" else one
                seen = np.dtype(np.uint8) if kind == "bfloat16" else DTYPES[kind]
                writer.add_tensor_info(theirs, stored, seen, size * math.prod(one), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, kind in tensors:
            x = cast(source.read(name), kind, name)
            for layer in x if "{}" in NAMES[name] else [x[: c.vocab_size] if name == "wte" else x]:
                writer.write_tensor_data(layer.view(np.uint8) if kind == "bfloat16" else layer)
        writer.close()

    write_whole(path, write)


def _theirs(name: str, shape: tuple[int, ...], V: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """llama.cpp's names of a tensor, one for each layer, with the shape of each."""
    if "{}" in NAMES[name]:
        yield from ((NAMES[name].format(l), shape[1:]) for l in range(shape[0]))
    else:
        yield NAMES[name], (V, *shape[1:]) if name == "wte" else shape


def _add_tokenizer(writer: Any, source: Source) -> None:
    """The vocabulary and merges, or a note that there are none: then llama.cpp takes and gives token ids."""
    V = source.config.vocab_size
    if source.tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(V)
        return
    tokenizer = Tokenizer.load(source.tokenizer)
    about = json.loads(tokenizer.to_json())
    if not tokenizer.splits_as_gpt2 and not _as_llama(about):
        raise LlmpyError(
            f"{source.tokenizer} splits words unlike GPT-2 and Llama 3, and llama.cpp knows other ways by name alone",
            "convert the model without it (move the file away): llama.cpp then takes token ids",
        )
    ids = about["model"]["vocab"] | {t["content"]: t["id"] for t in about.get("added_tokens", [])}
    if max(ids.values()) >= V:
        raise LlmpyError(
            f"{source.tokenizer} has {max(ids.values()) + 1:,} tokens, the model {V:,}", "give its own tokenizer"
        )
    words = {i: word for word, i in ids.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if tokenizer.splits_as_gpt2 else "llama-bpe")
    writer.add_token_list([words.get(i, f"[unused{i}]") for i in range(V)])
    controls = {t["content"] for t in about.get("added_tokens", []) if t["special"]} | {tokenizer.eot_text, None}
    writer.add_token_types([CONTROL if words.get(i) in controls else NORMAL for i in range(V)])
    # llama.cpp refuses a tokenizer without merges: bytes get one that no text can call for
    merges = about["model"]["merges"] or [f"{tokenizer.eot_text} {tokenizer.eot_text}"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(tokenizer.eot)
    writer.add_add_bos_token(False)


def _as_llama(about: dict[str, Any]) -> bool:
    """Whether words are Llama 3's, and one that is a token is never taken apart: what llama.cpp calls llama-bpe."""
    first = ((about["pre_tokenizer"] or {}).get("pretokenizers") or [{}])[0]
    return first.get("pattern") == {"Regex": LLAMA3} and about["model"].get("ignore_merges") is True
