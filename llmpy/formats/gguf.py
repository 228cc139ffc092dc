"""Write GGUF, llama.cpp's format, with the `gguf` library. llmpy does not read it.

Matrices have the requested dtype; vectors and wpe stay float32, as in llama.cpp's own conversion. If output.weight is
missing, llama.cpp uses token_embd. RoPE of its architecture "llama" rotates neighbors, so that the rows of queries and
keys are reordered; "qwen2" and "qwen3" rotate halves, as we do. Wavelengths stretched as in Llama 3 are in rope_freqs.

Source: llama.cpp, `convert_hf_to_gguf.py`, `gguf-py` and `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rank_tables import LLAMA3
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..model.config import LlamaConfig, ModelConfig
from ..model.families import params_table
from ..model.rope import frequencies
from ..system.command import install
from ..system.durable import write_whole
from .huggingface import kind_of
from .source import DTYPES, Source, by_name, cast

# ours → llama.cpp's, see `by_name`
GPT2_NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "attn_qkv": "blk.{}.attn_qkv", "attn_proj": "blk.{}.attn_output",
    "mlp_fc": "blk.{}.ffn_up", "mlp_proj": "blk.{}.ffn_down", "ln_1": "blk.{}.attn_norm", "ln_2": "blk.{}.ffn_norm",
    "ln_f": "output_norm",
}  # fmt: skip
NAMES = {
    "wte": "token_embd", "head": "output", "attn_qkv": "blk.{}.attn_q blk.{}.attn_k blk.{}.attn_v",
    "attn_proj": "blk.{}.attn_output", "mlp_gate_up": "blk.{}.ffn_gate blk.{}.ffn_up", "mlp_down": "blk.{}.ffn_down",
    "norm_1": "blk.{}.attn_norm", "q_norm": "blk.{}.attn_q_norm", "k_norm": "blk.{}.attn_k_norm",
    "norm_2": "blk.{}.ffn_norm", "norm_f": "output_norm",
}  # fmt: skip
ROPE = "rope_freqs.weight"
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
TENSOR_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
BLOCK = 32  # weights of a row that share a scale in Q8_0
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SENTENCEPIECE, BYTE_TOKEN = "sentencepiece", re.compile(r"<0x[0-9A-F]{2}>")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def write_model(path: Path, source: Source, dtype: str) -> None:
    """Write a GGUF file atomically. Raises LlmpyError if the library is missing or the write fails."""
    try:
        import gguf
    except ImportError:
        raise LlmpyError(
            "package.missing", "GGUF requires the gguf package", f"Install it: {install('llmpy[gguf]')}"
        ) from None
    c = source.config
    architecture = kind_of(c)
    tensors = [(t.name, t.shape, dtype if t.decay and t.name != "wpe" else "float32") for t in params_table(c)]
    if dtype == "q8_0":  # llama.cpp has no padding of rows
        tensors = [(name, shape, "float32" if shape[-1] % BLOCK else kind) for name, shape, kind in tensors]
    factors = np.empty(0, np.float32)
    if isinstance(c, LlamaConfig) and c.rope_scaling is not None:
        factors = frequencies(replace(c, rope_scaling=None)) / frequencies(c)

    def write(temporary: Path) -> None:
        with contextlib.closing(gguf.GGUFWriter(temporary, architecture)) as writer:
            writer.add_block_count(c.layers)
            writer.add_context_length(c.context)
            writer.add_embedding_length(c.channels)
            writer.add_head_count(c.heads)
            if isinstance(c, LlamaConfig):
                writer.add_vocab_size(c.vocab_size)
                writer.add_feed_forward_length(c.ffn)
                writer.add_head_count_kv(c.kv_heads)
                writer.add_key_length(c.head_size)
                writer.add_value_length(c.head_size)
                writer.add_layer_norm_rms_eps(c.norm_eps)
                writer.add_rope_dimension_count(c.head_size)
                writer.add_rope_freq_base(c.rope_theta)
            else:
                writer.add_feed_forward_length(4 * c.channels)
                writer.add_layer_norm_eps(1e-5)
            writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
            _add_tokenizer(writer, source)
            for name, shape, kind in tensors:
                raw = gguf.GGMLQuantizationType[TENSOR_TYPES[kind]]
                for theirs, x in _theirs(name, np.broadcast_to(np.int8(0), shape), c):
                    # NumPy lacks these types: pass bytes, with the last dimension in bytes
                    as_bytes = kind in ("bfloat16", "q8_0")
                    row = gguf.quant_shape_to_byte_shape(x.shape, raw) if as_bytes else x.shape
                    seen = np.dtype(np.uint8) if as_bytes else DTYPES[kind]
                    writer.add_tensor_info(theirs, row, seen, seen.itemsize * math.prod(row), raw)
            if factors.size:
                writer.add_tensor_info(ROPE, factors.shape, factors.dtype, factors.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, _, kind in tensors:
                for _, x in _theirs(name, cast(source.read(name), "float32" if kind == "q8_0" else kind, name), c):
                    x = np.ascontiguousarray(x)
                    if kind == "q8_0":
                        x = gguf.quantize(x, gguf.GGMLQuantizationType.Q8_0)
                    writer.write_tensor_data(x.view(np.uint8) if kind == "bfloat16" else x)
            if factors.size:
                writer.write_tensor_data(factors)

    write_whole(path, write)


def _theirs(name: str, x: np.ndarray, c: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield views of tensor x under llama.cpp's names, in its order of rows."""
    for theirs, view in by_name(NAMES if isinstance(c, LlamaConfig) else GPT2_NAMES, name, x, c):
        if kind_of(c) == "llama" and theirs.endswith(("attn_q.weight", "attn_k.weight")):
            halves = view.reshape(-1, 2, c.head_size // 2, view.shape[1])
            view = halves.swapaxes(1, 2).reshape(view.shape)
        yield theirs, view


def _add_tokenizer(writer: Any, source: Source) -> None:
    """Add the vocabulary and merges; without a tokenizer llama.cpp reads and writes token ids."""
    V = source.config.vocab_size
    if source.tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(V)
        return
    tokenizer = Tokenizer.load(source.tokenizer)
    about = json.loads(tokenizer.to_json())
    model = about["model"]
    added = {t["content"]: t for t in about.get("added_tokens", [])}
    pre = _words(about)
    if pre is None or any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added.values()):
        what = f"llama.cpp has no name for how {source.tokenizer} splits or changes texts"
        hint = "Move the file away to convert without a tokenizer: llama.cpp then reads token ids"
        raise LlmpyError("tokenizer.unsupported", what, hint)
    ids = model["vocab"] | {content: t["id"] for content, t in added.items()}
    if max(ids.values()) >= V:
        what = f"{source.tokenizer} has ids beyond the model's {V:,} tokens"
        raise LlmpyError("tokenizer.vocab-mismatch", what, "Replace it with the model's own tokenizer.json")
    words = {i: word for word, i in ids.items()}
    kinds = {content: CONTROL if t["special"] else USER_DEFINED for content, t in added.items()}
    kinds[tokenizer.eot_text] = CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if pre == SENTENCEPIECE:
        kinds = {w: BYTE for w in ids if BYTE_TOKEN.fullmatch(w)} | kinds | {model["unk_token"]: UNKNOWN}
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # llama.cpp merges the pair whose token has the largest score
        writer.add_token_scores([-float(ranks.get(words.get(i, ""), len(merges))) for i in range(V)])
        writer.add_add_space_prefix('"Prepend"' in json.dumps(about["normalizer"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        # llama.cpp requires merges: a byte tokenizer gets one that no text can use
        writer.add_token_merges(merges or [f"{tokenizer.eot_text} {tokenizer.eot_text}"])
    writer.add_token_list([words.get(i, f"[unused{i}]") for i in range(V)])
    writer.add_token_types([kinds.get(words[i], NORMAL) if i in words else UNUSED for i in range(V)])
    writer.add_bos_token_id((tokenizer.prefix or [tokenizer.roles.get("bos_token", tokenizer.eot)])[0])
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(bool(tokenizer.prefix))
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template.source)
    if turns := sorted(tokenizer.stops - {tokenizer.eot}):
        writer.add_eot_token_id(turns[0])


def _words(about: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the way a tokenizer.json splits text; None if it has none."""
    splitter, normalizer, model = about["pre_tokenizer"] or {}, about["normalizer"] or {}, about["model"]
    if model.get("byte_fallback"):
        steps = [n.get("type") for n in normalizer.get("normalizers", [normalizer] if normalizer else [])]
        # Metaspace puts a blank before the first word only, llama.cpp also after special tokens
        return SENTENCEPIECE if not splitter and steps in (["Prepend", "Replace"], ["Replace"]) else None
    *first, last = splitter.get("pretokenizers", [splitter])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    whole, unchanged = bool(model.get("ignore_merges")), normalizer.get("type")
    if last.get("use_regex", True):
        digits = len(first) == 1 and first[0].get("type") == "Digits" and first[0].get("individual_digits")
        name = "gpt-2" if not first else "smollm" if digits else None
        return name if not whole and unchanged is None else None
    if len(first) != 1 or (first[0].get("behavior"), first[0].get("invert")) != ("Isolated", False):
        return None
    known = {(LLAMA3, True, None): "llama-bpe", (QWEN2, False, None): "qwen2", (QWEN2, False, "NFC"): "qwen2"}
    return known.get((first[0]["pattern"].get("Regex"), whole, unchanged))  # llama.cpp does not compose accents
