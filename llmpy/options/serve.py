"""Options of `llmpy serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .fields import NOT_NEGATIVE, POSITIVE, Generating, Range, option
from .sample_chat import RUN_TEXT


# fmt: off
@dataclass(frozen=True)
class ServeOptions(Generating):
    """`llmpy serve RUN`."""

    run: Path = option(Path(), RUN_TEXT, metavar="RUN", word=True)
    host: str = option("127.0.0.1", "address to listen on; if others can reach it, only with a key", metavar="HOST")
    port: int = option(8000, "port; 0: any free one", within=Range(0, 65535, "a port from 0 to 65535"))
    api_key: str | None = option(
        None, "key that requests must carry (default: the environment variable LLMPY_API_KEY)", metavar="KEY"
    )
    name: str | None = option(None, "name of the model in requests (default: RUN)", metavar="NAME")
    texts: int = option(8, "texts continued at the same time", within=POSITIVE)
    length: int | None = option(
        None, "tokens that each text can see, prompt included (default: 2048, or the trained length if less)",
        within=Range(2, math.inf, "2 or more"),
    )
    waiting: int = option(64, "texts that may wait for a place; further ones are refused", within=NOT_NEGATIVE)
    timeout: float = option(600, "seconds that a request may take, waiting included", within=POSITIVE)
    grace: float = option(30, "seconds that texts may take to end after SIGTERM or Ctrl-C", within=NOT_NEGATIVE)
# fmt: on
