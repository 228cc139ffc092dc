"""The Python API: a model to load, sample from, differentiate and export, and a trainer.

Shapes, types and token ids are checked here, because compiled kernels check no bounds.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike

from . import backend, formats
from .backend.machine import Machine
from .data.pipeline import HELD_OUT
from .data.shards import form_for, open_shard, write_shard
from .data.tokenizer import Tokenizer
from .errors import LlmpyError
from .formats import convert, huggingface, peft
from .formats.source import HUGGING_FACE, Source
from .generate.generation import Generation, Text, TextStream, aside, check_memory, encode_prompt
from .generate.sampling import Choice, choice_of
from .model.arena import Arena
from .model.config import GPT2_VOCAB, ModelConfig
from .model.families import language_model
from .model.initialise import initialise
from .model.language_model import LanguageModel
from .options.fields import converted
from .options.sample_chat import SampleOptions
from .options.train import TrainOptions
from .rng import Xorshift64Star
from .run import checkpoint
from .run.folder import METRICS, MODEL_FILE, PARTS, START_FILE, TOKENIZER_FILE, RunFolder
from .system.resources import crowded
from .train.assemble import train

IGNORED = -1  # a target left out of the loss
CHOICES = {"stop", "seed", *(f.name for f in fields(Choice))}  # of the options of `llmpy sample`


class Model:
    """A language model and its tokenizer, created by `load` or `new`.

    `config` is its shape. `parameters` maps the name of each trained tensor to its float32 array: GPT-2's names here,
    Hugging Face's of a Llama or Qwen, peft's of adapters. Call `store_weights` after writing to one. `tokenizer` may be
    None; text then uses GPT-2's if the size matches (not in a Hugging Face folder).

    Threads may share a model, and get the results they would get alone: its methods wait for each other, a text's at
    every token. Each thread has its own gradients. A text whose model changes meanwhile ends with LlmpyError.
    """

    def __init__(self, net: LanguageModel, tokenizer: Tokenizer | None, trained_length: int) -> None:
        self.config = net.config
        self.tokenizer = tokenizer
        self.trained_length = trained_length  # positions beyond are untrained: the window slides
        self.parameters = self._named(net, net.trained)
        self._net = net
        self._untrained = False
        self._what = "model in memory"
        self._shape = (0, 0)
        self._changes = 0  # calls of `store_weights`
        self._own = threading.local()  # a thread's gradients

    @classmethod
    def load(
        cls, model: str | Path = "gpt2", *, threads: int | None = None, dtype: str = "auto",
        machine: Machine | None = None, trainable: bool = True,
    ) -> Self:  # fmt: skip
        """Load a hub model (gpt2, OWNER/NAME: downloaded once), or the model at a path.

        A path is a run folder, a `model.safetensors`, an llm.c `.bin`, a folder of Hugging Face or peft. `dtype` of
        matrix products: auto, float32, bfloat16, or int8. Without `trainable`, as in int8, the model has no gradients
        and no `save`, takes less memory, and `parameters` are in that type. Raises LlmpyError if it is missing, corrupt
        or unsupported.
        """
        source = formats.resolve(str(model), aside)
        tokenizer = None if source.tokenizer is None else Tokenizer.load(source.tokenizer)
        ops = machine or _machine(threads, dtype, source.config, trainable)
        net = language_model(source.config, ops, trainable=trainable and not ops.quantises)
        source.load_into(net)
        loaded = cls(net, tokenizer, source.trained_length)
        loaded._what = source.what
        return loaded

    @classmethod
    def new(
        cls, size: str | ModelConfig = "d4", *, tokenizer: Tokenizer | None = None, seed: int = 42,
        threads: int | None = None, dtype: str = "auto", machine: Machine | None = None,
    ) -> Self:  # fmt: skip
        """Return an untrained model: a config, or a size of `llmpy train --model` with the tokenizer's vocabulary."""
        vocab_size = None if tokenizer is None else tokenizer.vocab_size
        config = size if isinstance(size, ModelConfig) else ModelConfig.from_dial(size, vocab_size=vocab_size)
        ops = machine or _machine(threads, dtype, config)
        if ops.quantises:
            raise generates_alone("trained")
        net = language_model(config, ops)
        initialise(net.params, config, seed)
        net.store_weights()
        model = cls(net, tokenizer, config.context)
        model._untrained = True
        return model

    def store_weights(self) -> None:
        """Apply changes of `parameters`; call it after writing to them."""
        with self._net.ops.lock:
            self._changes += 1
            self._net.store_weights()

    def loss(self, tokens: ArrayLike, targets: ArrayLike | None = None) -> float:
        """Return the mean cross-entropy in nats; arguments as in `loss_and_grads`."""
        with self._net.ops.lock:
            return self._net.loss(*self._batch(tokens, targets))

    def loss_and_grads(
        self, tokens: ArrayLike, targets: ArrayLike | None = None
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Return the mean cross-entropy in nats and the gradient of every parameter, float32 in its shape.

        `tokens`: integers (B, T), or (T,) for one row, each in 0 … V − 1. `targets`: the next token of each, in the
        same shape, −1 to ignore; the default is the next token in the row.
        The thread's next call overwrites the gradients. Raises LlmpyError for invalid arguments.
        """
        with self._net.ops.lock:
            self._net.grads = getattr(self._own, "grads", None)
            loss = self._net.loss_and_grads(*self._batch(tokens, targets))
            grads = self._own.grads = self._net.grads
        assert grads is not None
        return loss, self._named(self._net, grads)

    def logits(self, tokens: ArrayLike, position: int | None = None) -> np.ndarray:
        """Return the next token's logits (B, T, V) float32 after each of tokens (B, T), or (B, V) at one position."""
        ids = self._ids(tokens, "tokens", 0, self.config.context)
        if position is not None and not -(T := ids.shape[1]) <= position < T:
            raise LlmpyError("tokens.position", f"position {position} of {T} tokens", f"Use {-T} to {T - 1}")
        with self._net.ops.lock:
            self._make_room(ids.shape)
            return self._net.logits(ids, position)

    def generate(self, prompt: str = "", tokens: int = 200, **choices: Any) -> str:
        """Return the prompt and up to `tokens` more tokens. Raises LlmpyError for unknown choices or no tokenizer.

        Choices are those of `llmpy sample`: temperature, top_k, top_p, min_p, repetition_penalty, stop (texts), seed.
        """
        return prompt + "".join(self.stream(prompt, tokens, **choices))

    def stream(self, prompt: str = "", tokens: int = 200, **choices: Any) -> Iterator[str]:
        """Return the continuation of the prompt piece by piece; arguments as in `generate`."""
        if unknown := choices.keys() - CHOICES:
            raise LlmpyError("option.unknown", f"unknown option {min(unknown)!r}", f"Use {', '.join(sorted(CHOICES))}")
        values = {name: converted(SampleOptions, name, value) for name, value in choices.items()}
        options = SampleOptions(tokens=converted(SampleOptions, "tokens", tokens), **values)
        prompt_ids = encode_prompt(self.require_tokenizer(), prompt)
        return self.continued(prompt_ids, options.tokens, choice_of(options), options.stop or (), options.seed)

    def continued(
        self, ids: Sequence[int], count: int, choice: Choice, stop: Sequence[str] = (), seed: int = 1337
    ) -> Iterator[str]:
        """Yield text of up to `count` tokens after `ids`, ending before `stop`. Raises LlmpyError for an unknown id."""
        self._check_range(ids, "ids", 0)
        tokenizer, reach = self.require_tokenizer(), self.trained_length
        check_memory(self.config, cast(Machine, self._net.ops), 1, min(reach, len(ids) + count), loaded=True)
        self.warm_up()
        stream = TextStream(tokenizer.continuation, stop)
        text, changes = Text(ids, count, Xorshift64Star(seed), choice, stream, tokenizer.stops), self._changes
        generation = Generation.of(self._net, [text], count, reach, tokens=tokenizer.vocab_size)
        while not text.ended:
            with self._net.ops.lock:
                if self._changes != changes:
                    what = "the model changed while it generated a text"
                    raise LlmpyError("model.changed", what, "Generate the text again")
                ((_, piece),) = generation.step()
            yield piece

    def warm_up(self) -> None:
        """Compile or load the kernels of generation; otherwise the first text does."""
        with self._net.ops.lock:
            cast(Machine, self._net.ops).warm_up(aside, decoding=True, kinds=self.config.kinds)

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, or GPT-2's. Raises LlmpyError if it is missing or has more tokens than the model."""
        if self.tokenizer is None and self.config.vocab_size == GPT2_VOCAB and not self._what.endswith(HUGGING_FACE):
            aside("note: the model has no tokenizer: taking OpenAI's GPT-2 tokenizer")
            self.tokenizer = Tokenizer.gpt2(aside)
        if self.tokenizer is None:
            raise LlmpyError("tokenizer.missing", "the model has no tokenizer", "Set its attribute `tokenizer`")
        have, V = self.tokenizer.vocab_size, self.config.vocab_size
        if have > V:
            what = f"the tokenizer has {have:,} tokens, the model {V:,}"
            raise LlmpyError("tokenizer.vocab-mismatch", what, "Use the model's own tokenizer")
        return self.tokenizer

    def save(self, path: str | Path) -> None:
        """Write a folder with model.safetensors and tokenizer for `load` and `llmpy sample`."""
        self.export(path, "native")

    def export_hf(self, path: str | Path, dtype: str = "float32") -> None:
        """Write a folder that Hugging Face's `transformers` loads, in float32 or bfloat16."""
        self.export(path, "hf", dtype)

    def export(self, path: str | Path, to: str | None = None, dtype: str | None = None) -> None:
        """Write llmc, hf, native or gguf, by default `path`'s format. Raises LlmpyError, also if `path` exists."""
        if not self._net.trainable:
            raise generates_alone("saved")
        path = Path(path)
        to = convert.format_of(path, to)
        with tempfile.TemporaryDirectory(prefix="llmpy-") as folder:
            tokenizer = None
            if self.tokenizer is not None:
                tokenizer = Path(folder, TOKENIZER_FILE)
                self.tokenizer.save(tokenizer)
            source = Source(
                Path("memory"), self._what, self.config, "float32", self.trained_length,
                lambda name: self._net.ops.to_host(getattr(self._net.params, name)), tokenizer,
                adapters=self._copy_adapters if self.config.lora is not None else None,
            )  # fmt: skip
            with self._net.ops.lock:
                convert.write(source, path, to, dtype, aside)

    def _copy_adapters(self, params: Arena) -> None:
        params.buffer[...] = self._net.ops.to_host(self._net.trained.buffer)

    @staticmethod
    def _named(net: LanguageModel, arena: Arena) -> dict[str, np.ndarray]:
        """Return the views of parameters or gradients under their public names."""
        host = ((t.name, net.ops.to_host(view)) for t, view in arena.items())
        if net.adapters is not None:
            return {theirs: x for name, stack in host for theirs, x in peft.named(name, stack, net.config)}
        if net.config.family == "gpt2":
            return dict(host)
        return {theirs: x for name, whole in host for theirs, x in huggingface.named(name, whole, net.config)}

    def _batch(self, tokens: ArrayLike, targets: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
        """Check and return tokens and targets (B, T) int32; free the arenas of other shapes."""
        ids = self._ids(tokens, "tokens", 0, self.config.context + (targets is None))
        if targets is None:
            if ids.shape[1] < 2:
                raise LlmpyError("tokens.no-target", "a row of one token has no target", "Use two, or pass targets")
            ids, labels = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
        else:
            labels = self._ids(targets, "targets", IGNORED, self.config.context)
            if labels.shape != ids.shape:
                raise LlmpyError("tokens.shape", f"targets {labels.shape} for tokens {ids.shape}", "Use equal shapes")
        self._make_room(ids.shape)
        return ids, labels

    def _ids(self, values: ArrayLike, what: str, least: int, longest: int) -> np.ndarray:
        """Return token ids as int32 (B, T). Raises LlmpyError unless T ≤ `longest` and all are in `least` … V − 1."""
        try:
            ids = np.asarray(values)
        except ValueError:
            raise LlmpyError("tokens.shape", f"{what}: rows differ in length", "Pass an array (B, T)") from None
        if ids.ndim not in (1, 2) or ids.size == 0 or ids.dtype.kind not in "iu":
            problem = f"{what} of shape {ids.shape} and type {ids.dtype}"
            raise LlmpyError("tokens.shape", problem, "Pass integers (B, T), or (T,) for one row")
        ids = ids.reshape(-1, ids.shape[-1])
        if (T := ids.shape[1]) > longest:
            raise LlmpyError(
                "model.context-exceeded",
                f"{what}: rows of {T:,} exceed {longest:,}, with a context of {self.config.context:,}",
                "Shorten the rows",
            )
        self._check_range((ids.min(), ids.max()), what, least)
        return np.ascontiguousarray(ids, np.int32)

    def _check_range(self, ids: Sequence[int], what: str, least: int) -> None:
        """Raise LlmpyError unless all are in `least` … V − 1."""
        V = self.config.vocab_size
        if wrong := [i for i in ids if not least <= i < V]:
            raise LlmpyError("tokens.range", f"{what}: {wrong[0]} is not a token id", f"Use {least} to {V - 1}")

    def _make_room(self, shape: tuple[int, ...]) -> None:
        """Free the activations of any other shape."""
        if shape != self._shape:
            self._net.release()
            self._shape = cast(tuple[int, int], shape)


GPT2 = Model  # its name in 0.1.0
load = Model.load


class Trainer:
    """A run of `llmpy train`, started and read from Python.

    `model`: a size to train from scratch ("d4"), or a `Model` to continue training, which then holds the result.
    `data`: files, folders, a dataset's name, or token ids, integers (n,), with the last tenth held out for validation;
    by default a text in Python's own library. Other options are those of `llmpy train --help`, by name: steps, minutes,
    lr, batch_size, sequence_length, out, resume, init … Raises LlmpyError for unknown or invalid options.
    """

    def __init__(
        self, model: str | Model = "", data: str | Path | Sequence[str | Path] | np.ndarray | None = None, *,
        machine: Machine | None = None, **options: Any,
    ) -> None:  # fmt: skip
        given = dict(options)
        self._trained = model if isinstance(model, Model) else None
        if isinstance(model, Model):
            if not model._net.trainable:
                raise generates_alone("trained")
            if "init" in given:
                raise LlmpyError("option.conflict", "both a model and init are given", "Use one of them")
            tokenizer, V = model.tokenizer, model.config.vocab_size
            if tokenizer is not None and tokenizer.vocab_size != V:
                what = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {V:,}"
                raise LlmpyError("tokenizer.vocab-mismatch", what, "Train a model with its tokenizer's vocabulary size")
        elif model:
            given["model"] = model
        if isinstance(data, list | tuple) and data and isinstance(data[0], int | np.integer):
            data = np.asarray(data)
        self._parts = _parts(data) if isinstance(data, np.ndarray) else {}  # file name in the run → tokens in memory
        if data is not None and not isinstance(data, np.ndarray):
            given["data"] = [data] if isinstance(data, str | Path) else list(data)
        values = {name: converted(TrainOptions, name, value) for name, value in given.items()}
        self.options = TrainOptions.gather(values)
        if self.options.ranks > 1:
            raise LlmpyError("option.unsupported", "Trainer runs in one process", "Use llmpy train --ranks N")
        self.folder: Path | None = None
        self._machine = machine

    def run(self, verbose: bool = True) -> Self:
        """Train to the end; Ctrl-C saves and stops. `verbose` prints progress. Raises LlmpyError or Diverged."""
        model, options = self._trained, self.options
        folder = RunFolder.claim(options if model is None else replace(options, model=f"d{model.config.layers}"))
        try:
            if folder.resumed:
                self._check_same(folder)
            else:
                options = self._put_in(folder)
        except BaseException:
            folder.discard()
            raise
        with contextlib.nullcontext() if self._machine is None else self._machine.lock:
            train(options, self._machine, folder, quiet=not verbose)
        self.folder = folder.path
        if model is not None:
            with model._net.ops.lock:
                checkpoint.load_parameters(folder / MODEL_FILE, model._net.trained)
                model.store_weights()
            model.trained_length, model._untrained = checkpoint.read_header(folder / MODEL_FILE).trained_length, False
        return self

    def _put_in(self, folder: RunFolder) -> TrainOptions:
        """Write model and tokens into a new run folder, for resuming; return options with their paths."""
        given = {name: getattr(self.options, name) for name in self.options.given}
        if (model := self._trained) is not None:
            given["init"] = str((folder / START_FILE).absolute())
            with model._net.ops.lock:
                checkpoint.save(folder / START_FILE, model._net, 1 if model._untrained else model.trained_length)
            if model.tokenizer is not None:
                model.tokenizer.save(folder / TOKENIZER_FILE)
        if self._parts:
            given["data"] = tuple((folder / name).absolute() for name in self._parts)
            form = form_for(1 + max(int(part.max()) for part in self._parts.values()))
            for name, part in self._parts.items():
                write_shard(folder / name, part, form)
        return TrainOptions.gather(given)

    def _check_same(self, folder: RunFolder) -> None:
        """Raise LlmpyError if a resumed run has another model shape or other tokens than those in memory."""
        models = [path for path in (folder / MODEL_FILE, folder / START_FILE) if path.is_file()]
        if self._trained is not None and models and checkpoint.read_header(models[0]).config != self._trained.config:
            raise LlmpyError("resume.model-mismatch", f"{folder.path}: the model has another shape", "Use another out")
        for name, part in self._parts.items():
            there = folder / name
            if not there.is_file() or not np.array_equal(open_shard(there, 1 << 31).tokens[:], part):
                raise LlmpyError("data.changed", f"{folder.path} has other tokens", "Use another out")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the run's metrics.jsonl: step, loss, lr, …; step, val_loss."""
        return [json.loads(line) for line in (self._done() / METRICS).read_text("utf-8").splitlines()]

    def curve(self, name: str = "loss") -> tuple[list[int], list[float]]:
        """Return the steps and values of one metric, for a plot."""
        rows: list[Mapping[str, Any]] = [row for row in self.metrics if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    @property
    def model(self) -> Model:
        """The trained model."""
        folder, o = self._done(), self.options
        self._trained = self._trained or Model.load(folder, threads=o.threads, dtype=o.dtype, machine=self._machine)
        return self._trained

    def _done(self) -> Path:
        if self.folder is None:
            raise LlmpyError("run.not-started", "nothing has been trained yet", "Call run() first")
        return self.folder


def generates_alone(what: str) -> LlmpyError:
    """Return the error to raise where a model needs its float32 matrices."""
    hint = "Load it as trainable, with dtype float32 or bfloat16"
    return LlmpyError("model.no-gradients", f"a model for generation cannot be {what}", hint)


def _parts(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return file name → token ids (n,): training and validation. Raises LlmpyError for invalid ids."""
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise LlmpyError("tokens.shape", f"data of shape {tokens.shape} and type {tokens.dtype}", "Pass integers (n,)")
    held = int(HELD_OUT * tokens.size)
    if not held or tokens.min() < 0:
        raise LlmpyError("tokens.range", "data has negative or too few token ids", "Use tokenizer.encode")
    return dict(zip(PARTS, (tokens[:-held], tokens[-held:]), strict=True))


def _machine(threads: int | None, dtype: str, config: ModelConfig, trainable: bool = True) -> Machine:
    """Return the CPU backend with the kernels of a model compiled: of training, or of generation."""
    machine = cast(Machine, backend.load("cpu", threads=threads, dtype=dtype))
    for line in crowded(machine.threads):
        aside(line)
    machine.warm_up(aside, machine.quantises or not trainable, config.kinds)
    return machine
