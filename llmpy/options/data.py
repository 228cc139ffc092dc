"""Options of `llmpy data`, and the datasets known by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import POSITIVE, Options, option, refusal

TRAINING_NAMES = ("tinyshakespeare", "tinystories", "fineweb", "fineweb-edu")
DATA_NAMES = (*TRAINING_NAMES, "hellaswag")


# fmt: off
@dataclass(frozen=True)
class DataOptions(Options):
    """`llmpy data WHAT`."""

    what: tuple[str, ...] = option(
        (), f"{', '.join(DATA_NAMES)}, or files and folders of .txt, .md, .jsonl, .json or .parquet",
        metavar="WHAT", word=True,
    )
    tokenizer: str | None = option(
        None, "gpt2 (default for named datasets), bytes, bpe:N (trained on the text, N tokens; default for your own "
        "text, N by its length), or tokenizer.json, vocab.json, .tiktoken, llm.c's .bin or a folder", metavar="WHAT",
    )
    val: tuple[Path, ...] | None = option(None, "validation data (default: by file name, or a tenth)", metavar="PATH")
    source: Path | None = option(None, "raw file or folder that is already downloaded", metavar="PATH")
    out: Path | None = option(None, "output folder (default: the cache, or data/NAME for files)", metavar="DIR")
    tokens: int | None = option(None, "stop after this many tokens (hellaswag: examples)", within=POSITIVE)
    format: str = option(
        "auto", "token type; int32: no header, as in llm.rs, llm.mojo", choices=("auto", "uint16", "uint32", "int32")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None and self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            if not (size.isdecimal() and len(size) < 8 and 257 <= int(size) <= 1 << 16):
                raise refusal("tokenizer", self.tokenizer, "Use bpe:N with N from 257 to 65536")
# fmt: on
