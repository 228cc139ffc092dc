"""Options of `llmpy sample` and `llmpy chat`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..model.config import NAMES
from .fields import OnMachine, below, not_negative, option, positive, refusal

RUN_TEXT = "a run folder, any model that --init takes, or gpt2 …"


@dataclass(frozen=True, kw_only=True)
class Sampling(OnMachine):
    """How tokens are chosen."""

    temperature: float = option(0.5, "0: always the likeliest token; 1: as the model has it")
    top_k: int = option(50, "choose among this many likeliest tokens, 0: among all")
    top_p: float = option(1.0, "choose among the fewest that together have this probability")
    min_p: float = option(0.0, "leave out what is less likely than this share of the likeliest")
    repetition_penalty: float = option(1.0, "above 1: make tokens of the text so far less likely")
    seed: int = option(1337, "seed of the choices; the next text or answer has the next one, and so on")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "seed", "top_p", "repetition_penalty")  # from seed 0 the generator would only draw zeros
        not_negative(self, "temperature", "top_k", "min_p")
        below(self, "seed", 1 << 64)
        for name in ("top_p", "min_p"):
            if getattr(self, name) > 1:
                raise refusal(name, getattr(self, name), "use a number from 0 to 1")


@dataclass(frozen=True)
class SampleOptions(Sampling):
    """`llmpy sample RUN`."""

    run: Path = option(Path(), RUN_TEXT, metavar="RUN", word=True, names=tuple(NAMES))
    prompt: tuple[str, ...] | None = option(
        None, "text to continue (default: the start of a text); give it again for further texts", each=True
    )
    prompts_file: Path | None = option(None, "file of further prompts, one a line", metavar="FILE")
    tokens: int = option(200, "tokens to add")
    stop: tuple[str, ...] | None = option(
        None, "end before this text; give it again for further ones (default: at <|endoftext|> alone)", each=True
    )
    ignore_eot: bool = option(False, "go on after <|endoftext|>, with another text")
    cache: bool = option(True, "keep keys and values; without, the same text comes, slower")
    json: bool = option(False, "print one JSON object, with tokens and their log-probabilities")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "tokens")
        if "" in (self.stop or ()):
            raise refusal("stop", "''", "name a text of at least one character")


@dataclass(frozen=True)
class ChatOptions(Sampling):
    """`llmpy chat RUN`."""

    run: Path = option(Path(), RUN_TEXT, metavar="RUN", word=True, names=tuple(NAMES))
    system: str | None = option(None, "what the model is told before the talk begins")
    tokens: int = option(256, "tokens of an answer at most")
    temperature: float = option(0.7, "0: always the likeliest token; 1: as the model has it")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "tokens")
