"""Options of `llmpy sample` and `llmpy chat`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import NOT_NEGATIVE, POSITIVE, SHARE, Generating, Range, option

TEMPERATURE_TEXT = "divides the logits; 0: always the likeliest token"
RUN_TEXT = "run folder, or any model that llmpy train --init takes"


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Sampling(Generating):
    """Options of sampling."""

    top_k: int = option(50, "choose among the N likeliest tokens; 0: among all", within=NOT_NEGATIVE)
    top_p: float = option(
        1.0, "choose among the fewest tokens whose probabilities sum to X",
        within=Range(POSITIVE.low, 1, "a number above 0, at most 1"),
    )
    min_p: float = option(0.0, "drop tokens less likely than X times the likeliest; 0: none", within=SHARE)
    repetition_penalty: float = option(1.0, "above 1, tokens already in the text become less likely", within=POSITIVE)
    seed: int = option(  # from seed 0 xorshift generates only zeros
        1337, "random seed of the first text or answer; the next ones count up",
        within=Range(1, (1 << 64) - 1, "a number from 1 to 2^64 - 1"),
    )


@dataclass(frozen=True)
class SampleOptions(Sampling):
    """`llmpy sample RUN`."""

    run: Path = option(Path(), RUN_TEXT, metavar="RUN", word=True)
    prompt: tuple[str, ...] | None = option(
        None, "text to continue (default: end-of-text, the start of a document); can be repeated", each=True
    )
    prompts_file: Path | None = option(None, "file with more prompts, one per line", metavar="FILE")
    tokens: int = option(200, "tokens to generate per prompt, at most", within=POSITIVE)
    temperature: float = option(0.5, TEMPERATURE_TEXT, within=NOT_NEGATIVE)
    stop: tuple[str, ...] | None = option(
        None, "stop before this text, as at <|endoftext|>; can be repeated", each=True
    )
    ignore_eot: bool = option(False, "continue after <|endoftext|>")
    json: bool = option(False, "print one JSON object with token ids and log-probabilities (nats)")


@dataclass(frozen=True)
class ChatOptions(Sampling):
    """`llmpy chat RUN`."""

    run: Path = option(Path(), RUN_TEXT, metavar="RUN", word=True)
    system: str | None = option(None, "system message")
    tokens: int = option(256, "tokens per answer, at most", within=POSITIVE)
    temperature: float = option(0.7, TEMPERATURE_TEXT, within=NOT_NEGATIVE)
# fmt: on
