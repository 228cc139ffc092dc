"""Our models in EleutherAI's `lm_eval` harness, an extra: `pip install 'llmpy[lm-eval]'`.

    python -m llmpy.tools.lm_eval --model_args run=runs/NAME --tasks hellaswag,lambada_openai

This is lm_eval's own command with one more model. In Python, pass `Harness("runs/NAME")` to lm_eval.

log p(continuation | context) = Σ log softmax(logits)[token] over its tokens, each with as much text before it as the
model's trained length allows. Rows are padded on the right, where no token attends to them.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from ..backend.machine import Machine
from ..errors import LlmpyError
from ..generate.generation import Generation, Text, TextStream, encode_prompt, load_model, open_run
from ..generate.sampling import Choice, logprob
from ..rng import Xorshift64Star
from ..system.command import install

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    missing = LlmpyError(
        "package.missing", "the lm_eval adapter needs the package lm_eval", f"Install it: {install('llmpy[lm-eval]')}"
    )
    if __name__ == "__main__":
        sys.exit(f"llmpy: error: {missing} [{missing.code}]")
    raise missing from None

BATCH_SIZE = 8  # rows
SHORTEST_ROW = 32  # rows are padded to powers of two, at least this: few shapes, hence few arenas
LOGITS_ROWS = 128  # rows of logits in memory: 26 MB with GPT-2's vocabulary
NEW_TOKENS = 256  # lm_eval's default
SEED = 1337  # for sampling; text n uses SEED + n


@register_model("llmpy")
class Harness(LM):  # type: ignore[misc, unused-ignore]  # LM is Any without lm_eval
    """A model with the interface of lm_eval."""

    def __init__(
        self, run: str, batch_size: int | str | None = None, dtype: str = "auto", threads: int | None = None,
        machine: Machine | None = None, **_: object,
    ) -> None:  # fmt: skip
        """Load `run`, a run folder or any model of `llmpy sample`; other arguments of lm_eval are ignored.

        Raises LlmpyError if the model is missing, corrupt or too large.
        """
        super().__init__()
        source, self.tokens = open_run(Path(run))
        self.reach = source.trained_length
        ours = batch_size is None or str(batch_size).startswith("auto")  # "auto", or "auto:4"
        self.batch_size = BATCH_SIZE if ours else max(1, int(cast(str, batch_size)))
        where: dict[str, Any] = {"threads": threads, "dtype": dtype, "machine": machine}
        self.model = load_model(source, self.batch_size, self.reach, **where)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), its log-likelihood in nats and whether greedy decoding gives it.

        An empty or blank context becomes the end-of-text token, which starts every document. Tokens are split as by
        lm_eval's own models: the continuation has those of the whole text after the context's number of tokens.
        Raises LlmpyError if that leaves none, which would count as certain.
        """
        pairs = []
        for number, (context, continuation) in enumerate((request.args for request in requests), 1):
            # Trailing blanks of a context belong to the next word.
            ids = self.tokens.encode(context.rstrip())
            follows = self.tokens.encode(context + continuation)[len(ids) :]
            if not follows:
                message = f"request {number:,}: {continuation!r} adds no token to the context …{context[-40:]!r}"
                hint = "Let contexts end, or continuations start, at a blank, or use a tokenizer with smaller tokens"
                raise LlmpyError("request.no-continuation", message, hint)
            pairs.append((ids or [self.tokens.eot], follows))
        return self._answers("loglikelihood", requests, pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats."""
        pairs = [([self.tokens.eot], self.tokens.encode(request.args[0])) for request in requests]
        return [value for value, _ in self._answers("loglikelihood_rolling", requests, pairs, disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a string of `until`, end-of-text or `max_gen_toks` tokens.

        Decoding is greedy unless `do_sample`, then with `temperature` (default 1), `top_k`, `top_p` and `min_p`.
        """
        texts = [""] * len(requests)
        alike = defaultdict(list)  # requests with the same settings share batches
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(i)
        batches = [rows for group in alike.values() for rows in _batches(group, self.batch_size)]
        for rows in tqdm(batches, desc="generating", disable=disable_tqdm):
            found = self._continue([requests[i].args[0] for i in rows], requests[rows[0]].args[1], rows)
            for i, text in zip(rows, found, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _answers(
        self, name: str, requests: Sequence[Any], pairs: Sequence[tuple[list[int], list[int]]], quiet: bool
    ) -> list[tuple[float, bool]]:
        """Return the sums over the windows of each pair."""
        parts = [(i, *part) for i, pair in enumerate(pairs) for part in windows(*pair, self.reach)]
        parts.sort(key=lambda part: -len(part[1]))  # longest first: too little memory shows at once, little padding
        total, greedy, left = [0.0] * len(pairs), [True] * len(pairs), Counter(i for i, _, _ in parts)
        for batch in tqdm(_batches(parts, self.batch_size), desc=name, disable=quiet):
            for (i, _, _), (value, same) in zip(batch, self._score([part[1:] for part in batch]), strict=True):
                total[i] += value
                greedy[i] &= same
                left[i] -= 1
                if not left[i]:
                    answer = total[i] if name == "loglikelihood_rolling" else (total[i], greedy[i])
                    self.cache_hook.add_partial(name, requests[i].args, answer)
        return list(zip(total, greedy, strict=True))

    def _score(self, batch: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        """Yield, for each text's last n tokens, their log-likelihood and whether each is the likeliest."""
        model = self.model
        T = max(SHORTEST_ROW, 1 << (max(len(ids) for ids, _ in batch) - 2).bit_length())
        tokens = np.zeros((self.batch_size, min(T, self.reach)), np.int32)
        for row, (ids, _) in enumerate(batch):
            tokens[row, : len(ids) - 1] = ids[:-1]
        acts = model.forward(tokens, model.reserve(*tokens.shape, training=False))
        final = model.ops.to_host(acts.final).reshape(*tokens.shape, -1)
        for row, (ids, n) in enumerate(batch):
            value, same = 0.0, True
            for start in range(len(ids) - 1 - n, len(ids) - 1, LOGITS_ROWS):
                wanted = ids[start + 1 : start + 1 + LOGITS_ROWS]
                logits = model.head_logits(final[row, start : start + len(wanted)])
                value += sum(map(logprob, logits, wanted))
                same &= bool(np.array_equal(logits.argmax(axis=1), wanted))
            yield value, same

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any], numbers: Sequence[int]) -> list[str]:
        """Return the continuations of these contexts, all with the same settings."""
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        count = int(next((settings[name] for name in names if settings.get(name) is not None), NEW_TOKENS))
        temperature = settings.get("temperature")
        sampled = settings.get("do_sample", bool(temperature))
        limits = {name: settings[name] for name in ("top_k", "top_p", "min_p") if settings.get(name) is not None}
        choice = Choice((1.0 if temperature is None else float(temperature)) if sampled else 0.0, **limits)
        prompts = [encode_prompt(self.tokens, context)[-self.reach :] for context in contexts]
        coins = [Xorshift64Star(SEED + number) for number in numbers]
        texts = [
            Text(ids, count, coin, choice, TextStream(self.tokens.continuation, until), self.tokens.stops)
            for ids, coin in zip(prompts, coins, strict=True)
        ]
        generation = Generation.of(self.model, texts, count, self.reach, tokens=self.tokens.vocab_size)
        found = dict.fromkeys(texts, "")
        while generation.texts:
            for text, piece in generation.step():
                found[text] += piece
        return list(found.values())


def windows(context: Sequence[int], continuation: Sequence[int], reach: int) -> Iterator[tuple[list[int], int]]:
    """Yield pieces of a text of at most reach + 1 tokens, and how many tokens at the end of each are scored.

    Every token of the continuation is scored once.
    """
    text = [*context, *continuation]
    for done in range(len(context), len(text), reach):
        end = min(done + reach, len(text))
        yield text[max(0, end - reach - 1) : end], end - done


def _batches(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:1] = ["--model", "llmpy"]
    try:
        cli_evaluate()
    except LlmpyError as error:
        sys.exit(f"llmpy: error: {error} [{error.code}]")
