"""Write GGUF, llama.cpp's format, with the `gguf` library. llmpy does not read it.

Matrices have the requested dtype; vectors and wpe stay float32, as in llama.cpp's own conversion. The head is tied:
llama.cpp uses token_embd if output.weight is missing. Tensor names are those of its architecture "gpt2".
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rank_tables import LLAMA3
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..model.families import params_table
from ..system.command import install
from ..system.durable import write_whole
from .source import DTYPES, Source, by_name, cast

# ours → llama.cpp's, see `by_name`
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "attn_qkv": "blk.{}.attn_qkv",
    "attn_proj": "blk.{}.attn_output",
    "mlp_fc": "blk.{}.ffn_up",
    "mlp_proj": "blk.{}.ffn_down",
    "ln_1": "blk.{}.attn_norm",
    "ln_2": "blk.{}.ffn_norm",
    "ln_f": "output_norm",
}
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
TENSOR_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def write_model(path: Path, source: Source, dtype: str) -> None:
    """Write a GGUF file atomically. Raises LlmpyError if the library is missing or the write fails."""
    try:
        import gguf
    except ImportError:
        raise LlmpyError(
            "package.missing", "GGUF requires the gguf package", f"Install it: {install('llmpy[gguf]')}"
        ) from None
    c = source.config
    tensors = [(t.name, t.shape, dtype if t.decay and t.name != "wpe" else "float32") for t in params_table(c)]

    def write(temporary: Path) -> None:
        with contextlib.closing(gguf.GGUFWriter(temporary, "gpt2")) as writer:
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
                for theirs, x in by_name(NAMES, name, np.broadcast_to(np.int8(0), shape), c.vocab_size):
                    # the library lacks bfloat16: pass bytes, with the last dimension in bytes
                    stored = (*x.shape[:-1], size * x.shape[-1]) if kind == "bfloat16" else x.shape
                    seen = np.dtype(np.uint8) if kind == "bfloat16" else DTYPES[kind]
                    writer.add_tensor_info(theirs, stored, seen, size * x.size, raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, _, kind in tensors:
                for _, x in by_name(NAMES, name, cast(source.read(name), kind, name), c.vocab_size):
                    writer.write_tensor_data(x.view(np.uint8) if kind == "bfloat16" else x)

    write_whole(path, write)


def _add_tokenizer(writer: Any, source: Source) -> None:
    """Add the vocabulary and merges; without a tokenizer llama.cpp reads and writes token ids."""
    V = source.config.vocab_size
    if source.tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(V)
        return
    tokenizer = Tokenizer.load(source.tokenizer)
    about = json.loads(tokenizer.to_json())
    first = ((about["pre_tokenizer"] or {}).get("pretokenizers") or [{}])[0]
    # llama.cpp's llama-bpe: Llama 3's word pattern; words that are tokens are not split
    as_llama = first.get("pattern") == {"Regex": LLAMA3} and about["model"].get("ignore_merges") is True
    added = {t["content"]: t for t in about.get("added_tokens", [])}
    odd = about["normalizer"] or any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added.values())
    if odd or not (tokenizer.splits_as_gpt2 or as_llama):
        what = f"GGUF cannot express how {source.tokenizer} splits or changes texts, unlike GPT-2 and Llama 3"
        hint = "Move the file away to convert without a tokenizer: llama.cpp then reads token ids"
        raise LlmpyError("tokenizer.unsupported", what, hint)
    ids = about["model"]["vocab"] | {content: t["id"] for content, t in added.items()}
    if max(ids.values()) >= V:
        what = f"{source.tokenizer} has ids beyond the model's {V:,} tokens"
        raise LlmpyError("tokenizer.vocab-mismatch", what, "Replace it with the model's own tokenizer.json")
    words = {i: word for word, i in ids.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if tokenizer.splits_as_gpt2 else "llama-bpe")
    writer.add_token_list([words.get(i, f"[unused{i}]") for i in range(V)])
    kinds = {content: CONTROL if t["special"] else USER_DEFINED for content, t in added.items()}
    kinds[tokenizer.eot_text] = CONTROL
    writer.add_token_types([kinds.get(words[i], NORMAL) if i in words else UNUSED for i in range(V)])
    # llama.cpp requires merges: a byte tokenizer gets one that no text can use
    merges = about["model"]["merges"] or [f"{tokenizer.eot_text} {tokenizer.eot_text}"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.roles.get("bos_token", tokenizer.eot))
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
