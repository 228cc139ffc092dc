"""`llmpy sample`: continue prompts with a model."""

from __future__ import annotations

import json
from collections.abc import Callable

from ..backend.machine import Machine
from ..errors import LlmpyError, unreadable
from ..generate.generation import Generation, Text, TextStream, encode_prompt, load_model, open_run
from ..generate.sampling import choice_of
from ..options.sample_chat import SampleOptions
from ..rng import Xorshift64Star


def sample(options: SampleOptions, write: Callable[[str], object], machine: Machine | None = None) -> None:
    """Continue prompts with a model; text goes to `write`, everything else to stderr.

    Generation stops before a token that ends texts or answers (unless `options.ignore_eot`), at `options.stop` or after
    `options.tokens`.
    A single text is written token by token. Several texts, and the JSON object of `options.json`, are written at the
    end, in the order of the prompts. Raises LlmpyError if the model is missing, corrupt or does not fit its tokenizer.
    """
    o = options
    source, tokenizer = open_run(o.run)
    openings = read_prompts(o)
    prompts = [encode_prompt(tokenizer, opening) for opening in openings]
    reach = source.trained_length
    length = min(reach, max(map(len, prompts)) + o.tokens)
    model = load_model(source, len(prompts), length, threads=o.threads, dtype=o.dtype, machine=machine)
    # One generator per text; the first text is the same as without the others.
    ends = frozenset[int]() if o.ignore_eot else tokenizer.stops
    texts = [
        Text(
            ids, o.tokens, Xorshift64Star((o.seed + i - 1) % ((1 << 64) - 1) + 1), choice_of(o),
            TextStream(tokenizer.continuation, o.stop or ()), ends, 0 if o.json else None,
        )
        for i, ids in enumerate(prompts)
    ]  # fmt: skip
    generation = Generation.of(model, texts, o.tokens, reach, tokens=tokenizer.vocab_size)
    pieces = {text: [opening] for text, opening in zip(texts, openings, strict=True)}
    streaming = len(prompts) == 1 and not o.json
    if streaming:
        write(openings[0])
    while generation.texts:
        for text, piece in generation.step():
            pieces[text].append(piece)
            if streaming:
                write(piece)
    if o.json:
        found = [
            {
                "prompt": words[0],
                "prompt_tokens": ids,
                "text": "".join(words[1:]),
                "tokens": [token.id for token in text.added],
                "logprobs": [token.logprob for token in text.added],  # nats
                "ended": text.ended,
            }
            for ids, (text, words) in zip(prompts, pieces.items(), strict=True)
        ]
        write(json.dumps({"texts": found}) + "\n")
    else:
        write("\n" if streaming else "\n---\n".join(map("".join, pieces.values())) + "\n")


def read_prompts(options: SampleOptions) -> list[str]:
    """Return the prompts of the command line, then those of the file, one per line; [""] if there are none."""
    prompts = list(options.prompt or ())
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_bytes().decode("utf-8-sig").split("\n")
        except OSError as error:
            raise unreadable(options.prompts_file, error) from None
        except UnicodeDecodeError:
            raise LlmpyError("data.not-utf8", f"{options.prompts_file} is not UTF-8", "Save it as UTF-8") from None
        found = [line.removesuffix("\r") for line in lines if line.strip()]
        if not found:
            raise LlmpyError("sample.no-prompts", f"{options.prompts_file} has no prompts", "Write one per line")
        prompts += found
    return prompts or [""]
