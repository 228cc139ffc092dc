"""Language models in pure Python: hand-written forward and backward passes, compiled by Numba.

    model = llmpy.load("gpt2")                    # or a run folder, an llm.c file, a Hugging Face folder or hub name
    model.generate("Once upon a time", 100)
    loss, grads = model.loss_and_grads(tokens)
    run = llmpy.Trainer("d4", data="my.txt", minutes=5).run()

NumPy and Numba are imported on first use of these names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import GPT2, Model, Trainer, load
    from .data.tokenizer import Tokenizer
    from .errors import LlmpyError
    from .model.config import ModelConfig

from .version import __version__

__all__ = ["GPT2", "LlmpyError", "Model", "ModelConfig", "Tokenizer", "Trainer", "__version__", "load"]
_WHERE = {
    "GPT2": "api",
    "Model": "api",
    "load": "api",
    "Trainer": "api",
    "ModelConfig": "model.config",
    "LlmpyError": "errors",
    "Tokenizer": "data.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'llmpy' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
