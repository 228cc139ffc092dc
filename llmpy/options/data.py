"""Options of `llmpy data`, and the data sets known by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import POSITIVE, Options, option, refusal

TRAINING_NAMES = ("tinyshakespeare", "tinystories", "fineweb", "fineweb-edu")
DATA_NAMES = (*TRAINING_NAMES, "hellaswag")


@dataclass(frozen=True)
class DataOptions(Options):
    """`llmpy data WHAT`."""

    what: tuple[str, ...] = option(
        (),
        f"{', '.join(DATA_NAMES)}; or files and folders of .txt, .md, .jsonl, .jsonl.gz, .parquet",
        metavar="WHAT",
        word=True,
        names=DATA_NAMES,
    )
    tokenizer: str | None = option(
        None,
        "gpt2 (default for a named dataset), bytes, bpe:N (trained on the text; default for your own, N chosen by its "
        "length), or a tokenizer.json or llm.c .bin file",
        metavar="WHAT",
        names=("gpt2", "bytes"),
    )
    source: Path | None = option(None, "the raw file or folder, already downloaded", metavar="PATH")
    out: Path | None = option(None, "folder of the tokens (default: the cache, or data/NAME for files)", metavar="DIR")
    tokens: int | None = option(None, "stop after so many tokens (hellaswag: examples)", within=POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None and self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            if not (size.isdecimal() and len(size) < 8 and 257 <= int(size) <= 1 << 16):
                raise refusal("tokenizer", self.tokenizer, "use bpe:N with N from 257 to 65536")
