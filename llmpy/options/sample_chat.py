"""Options of `llmpy sample` and `llmpy chat`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import NOT_NEGATIVE, POSITIVE, SHARE, OnMachine, Range, option

TEMPERATURE_TEXT = "0: always the likeliest token; 1: as the model has it"
RUN_TEXT = "a run folder, any model that --init takes, or gpt2 …"


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Sampling(OnMachine):
    """How tokens are chosen."""

    top_k: int = option(50, "choose among this many likeliest tokens, 0: among all", within=NOT_NEGATIVE)
    top_p: float = option(
        1.0, "choose among the fewest that together have this probability",
        within=Range(POSITIVE.low, 1, "a number above 0, up to 1"),
    )
    min_p: float = option(0.0, "leave out what is less likely than this share of the likeliest", within=SHARE)
    repetition_penalty: float = option(1.0, "above 1: make tokens of the text so far less likely", within=POSITIVE)
    seed: int = option(  # from seed 0 the generator would only draw zeros
        1337, "seed of the choices; the next text or answer has the next one, and so on",
        within=Range(1, (1 << 64) - 1, "a number from 1 to 2^64 - 1"),
    )


@dataclass(frozen=True)
class SampleOptions(Sampling):
    """`llmpy sample RUN`."""

    run: Path = option(Path(), RUN_TEXT, metavar="RUN", word=True)
    prompt: tuple[str, ...] | None = option(
        None, "text to continue (default: the start of a text); give it again for further texts", each=True
    )
    prompts_file: Path | None = option(None, "file of further prompts, one a line", metavar="FILE")
    tokens: int = option(200, "tokens to add", within=POSITIVE)
    temperature: float = option(0.5, TEMPERATURE_TEXT, within=NOT_NEGATIVE)
    stop: tuple[str, ...] | None = option(
        None, "end before this text; repeat it for further ones (default: at <|endoftext|> alone)", each=True
    )
    ignore_eot: bool = option(False, "continue after <|endoftext|>, with another text")
    json: bool = option(False, "print one JSON object, with tokens and their log-probabilities")


@dataclass(frozen=True)
class ChatOptions(Sampling):
    """`llmpy chat RUN`."""

    run: Path = option(Path(), RUN_TEXT, metavar="RUN", word=True)
    system: str | None = option(None, "what the model is told before the conversation")
    tokens: int = option(256, "tokens of an answer at most", within=POSITIVE)
    temperature: float = option(0.7, TEMPERATURE_TEXT, within=NOT_NEGATIVE)
# fmt: on
