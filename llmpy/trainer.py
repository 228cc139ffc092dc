"""Training: step, evaluate, sample, log, save; bounded by steps, by time, and by Ctrl-C.

A step     loss and gradients of a batch → norm → AdamW at the schedule's rate
At steps 0, every `eval_every`, and the last: the validation loss, and with it the model on disk
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from . import __version__, backend, checkpoint, formats
from .config import ModelConfig
from .data.loader import Loader
from .data.prepare import Dataset, prepare
from .durable import write_whole
from .errors import LlmpyError
from .formats.source import Source
from .generate import TextStream, encode_prompt, generate
from .gpt2 import GPT2
from .init import initialise
from .journal import Journal
from .optimizer import AdamW
from .options import DEFAULT_MODEL, TrainOptions
from .preflight import Machine, duration, inspect
from .rng import Xorshift64Star
from .runfolder import MODEL_FILE, RunFolder
from .schedule import horizon, learning_rate

SAMPLE_SEED = 1337  # llm.c's; the same coins for every sample of a run, so that samples compare
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.5, 50  # as `llmpy sample` has them
BUILTIN_VOCAB = 512  # tokens for the text that Python carries; with 1024 each is seen too seldom (dev/LOG.md)
WARMUP_SHARE, WARMUP_MOST = 10, 50  # without --warmup: a tenth of the run, at most 50 steps
EVERY_LINE_UNTIL = 10  # the first steps are all told, later ones at most one in
LINE_SECONDS = 2.0
SMOOTHING = 0.95  # of the displayed tokens per second


class Feed:
    """What a trainer reads: batches to train and to validate on, and the prompt of samples."""

    def __init__(self, data: Dataset, options: TrainOptions) -> None:
        """Raises LlmpyError if the data do not do for the options; so it is made before anything compiles."""
        B, T, size = options.batch_size, options.sequence_length, data.vocab_size
        self.train = Loader(data.train, B, T, options.shuffle, options.seed, vocab_size=size)
        self.val = Loader(data.val, evaluation_rows(data, B, T), T, shuffle=False, vocab_size=size)
        self.tokenizer, self.bytes_per_token = data.tokenizer, data.bytes_per_token
        self.opening = options.prompt or ""
        if data.tokenizer is not None:
            self.prompt = encode_prompt(data.tokenizer, self.opening)
        elif self.opening:
            raise LlmpyError(
                "--prompt needs a tokenizer, and the token shards came without one",
                "put the tokenizer.json that they were made with beside them",
            )
        else:
            self.prompt = [size - 1]  # where GPT-2 has its end-of-text


class Trainer:
    """A model, its optimizer and its data, and the loop over them."""

    def __init__(
        self,
        model: GPT2,
        optimizer: AdamW,
        feed: Feed,
        options: TrainOptions,
        folder: Path,
        journal: Journal,
        peak: float,
        step_seconds: float,
    ) -> None:
        """`peak` is the machine's GFLOP/s; `step_seconds` what a step is expected to take."""
        self.model, self.optimizer, self.feed, self.options = model, optimizer, feed, options
        self.folder, self.journal, self.peak = folder, journal, peak
        self.trained_length = options.sequence_length  # beyond it positions are untrained
        self.done = 0
        self.stop_signal = 0
        self._step_seconds = step_seconds
        self._rate = 0.0
        self._spent = 0.0  # seconds in steps, for their mean
        self._line_at = 0.0
        self._started = 0.0

    def run(self) -> int:
        """Train to the end, or to Ctrl-C. Returns the exit code: 0, or 128 + signal (130 for Ctrl-C)."""
        o = self.options
        with stop_signals(self._stop):
            self.evaluate()
            self.journal.begin_progress()
            self._started = time.perf_counter()
            self.step()
            while not self.stop_signal and not self.finished():
                if o.eval_every and self.done % o.eval_every == 0:
                    self.evaluate()
                    self._save_if_possible()
                if o.sample_every and self.done % o.sample_every == 0:
                    self.sample()
                self.step()
            self.journal.end_progress()
            self.evaluate()
            self.save()
        self._conclude()
        return 128 + self.stop_signal if self.stop_signal else 0

    def finished(self) -> bool:
        """Whether the steps or the time are used up. Every run makes a step."""
        o = self.options
        if o.steps is not None and self.done >= o.steps:
            return True
        return o.seconds is not None and self.done > 0 and self._elapsed() >= o.seconds

    def step(self) -> None:
        """One batch, one update, one line of metrics.

        Raises LlmpyError for a loss or gradient that is not finite, before it reaches the parameters.
        """
        lr = self._learning_rate()
        start = time.perf_counter()
        loss = self.model.loss_and_grads(*self.feed.train.next())
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        try:
            norm = self.optimizer.step(lr)
        except LlmpyError as fault:
            raise self._diverged(str(fault).partition(" — ")[0]) from fault  # the hint is our own
        seconds = time.perf_counter() - start
        self.done += 1
        self._spent += seconds
        self._step_seconds = self._spent / self.done
        tokens = self.options.batch_size * self.options.sequence_length
        self._rate += (tokens / seconds - self._rate) * (1 - SMOOTHING if self.done > 2 else 1.0)
        self.journal.record(
            step=self.done, loss=loss, lr=lr, grad_norm=norm, ms=1e3 * seconds, tokens_per_s=tokens / seconds
        )
        self._tell(loss, lr, norm, seconds)

    def evaluate(self) -> None:
        """Say and record the mean loss of the first `eval_batches` validation batches, always the same ones.

        A stop signal cuts it short: then there is nothing to say.
        """
        val = self.feed.val
        val.reset()
        batches = max(1, min(self.options.eval_batches, val.batches_per_epoch))
        total = 0.0
        for _ in range(batches):
            if self.stop_signal:
                return
            total += self.model.loss(*val.next())
        loss = total / batches
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}")
        numbers: dict[str, float] = {"step": self.done, "val_loss": loss}
        line = f"step {self.done:>5} | validation loss {loss:.4f}"
        if self.feed.bytes_per_token:
            numbers["val_bits_per_byte"] = loss / math.log(2) / self.feed.bytes_per_token
            line += f" | {numbers['val_bits_per_byte']:.3f} bits a byte"
        self.journal.record(**numbers)
        self.journal.say(line)

    def sample(self) -> None:
        """Print what the model writes after the prompt."""
        o, feed = self.options, self.feed
        stream = TextStream(feed.tokenizer.decode if feed.tokenizer else token_ids)
        coin = Xorshift64Star(SAMPLE_SEED)
        tokens = generate(
            self.model,
            feed.prompt,
            o.sample_tokens,
            o.sequence_length,
            coin,
            SAMPLE_TEMPERATURE,
            SAMPLE_TOP_K,
        )
        going = itertools.takewhile(lambda _: not self.stop_signal, tokens)
        text = feed.opening + "".join(map(stream.feed, going)) + stream.finish()
        self.journal.say(f"--- sample at step {self.done}")
        self.journal.say(text.strip("\n"))
        self.journal.say("---")

    def save(self) -> None:
        """Write the model, in place of the one saved before."""
        checkpoint.save(self.folder / MODEL_FILE, self.model, self.trained_length)

    def _save_if_possible(self) -> None:
        """`save`, but a disk that is full now may have room again when the run ends."""
        try:
            self.save()
        except LlmpyError as fault:
            self.journal.say(f"warning: {fault}; the run goes on, and will save again")

    def _conclude(self) -> None:
        """Say what came of it and how to go on; a sample unless the user wants to be gone."""
        say = self.journal.say
        if self.stop_signal:
            say(f"stopped after {self.done} steps; the model as it is now is in {self.folder}")
        else:
            self.sample()
            say(f"trained {self.done} steps in {duration(self._elapsed())}; the model is in {self.folder}")
        if self.feed.tokenizer is not None:
            say(f'continue a text with:  llmpy sample {self.folder} --prompt "…"')

    def _elapsed(self) -> float:
        """Seconds since the first step began, evaluations and samples included."""
        return time.perf_counter() - self._started

    def _total(self) -> int:
        o = self.options
        return horizon(self.done, self._elapsed(), self._step_seconds, o.steps, o.seconds)

    def _learning_rate(self) -> float:
        o, total = self.options, self._total()
        warmup = min(total // WARMUP_SHARE, WARMUP_MOST) if o.warmup is None else o.warmup
        assert o.lr is not None  # `settled` has seen to it
        return learning_rate(self.done, total, warmup, o.lr, o.min_lr, o.schedule)

    def _tell(self, loss: float, lr: float, norm: float, seconds: float) -> None:
        """The step line, and the bar below it."""
        total = self._total() if not self.finished() else self.done
        left = (total - self.done) * self._step_seconds
        flops = self.model.config.flops_per_token(self.options.sequence_length) * self._rate
        line = (
            f"step {self.done:>5}/{total} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | "
            f"{1e3 * seconds:.0f} ms | {self._rate:,.0f} tok/s | {flops / self.peak / 1e7:.0f}% of peak | "
            f"{duration(left)} left"
        )
        self.journal.progress(self.done / total, f"step {self.done}/{total}, {duration(left)} left")
        now = time.perf_counter()
        if self.done <= EVERY_LINE_UNTIL or now - self._line_at >= LINE_SECONDS or self.finished():
            self._line_at = now
            self.journal.say(line)

    def _stop(self, number: int) -> None:
        """Ask the loop to end after this step. A signal may come in the middle of a print: write past it."""
        self.stop_signal = number
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, b"\nstopping after this step, and saving; press Ctrl-C again to quit at once\n")

    def _diverged(self, what: str) -> LlmpyError:
        kept = "the model last saved is kept" if (self.folder / MODEL_FILE).exists() else "nothing was saved"
        return LlmpyError(f"step {self.done + 1}: {what}; {kept}", "use a smaller --lr or a longer --warmup")


@contextlib.contextmanager
def stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Within: the first SIGINT, SIGTERM or SIGHUP calls `stop(number)`; a further one of the first two ends the
    process at once. A further SIGHUP does nothing, for a closing terminal may send two; under nohup none does.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)

    def handle(number: int, _frame: Any) -> None:
        for n in numbers:
            signal.signal(n, signal.SIG_IGN if n == hangup else signal.SIG_DFL)
        stop(number)

    before = {n: signal.signal(n, handle) for n in numbers}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def token_ids(ids: list[int]) -> str:
    """What stands for text where there is no tokenizer."""
    return "".join(f"{i} " for i in ids)


def evaluation_rows(data: Dataset, B: int, T: int) -> int:
    """Rows of a validation batch: B, or as many as the validation text fills.

    Raises LlmpyError if it does not fill one.
    """
    least = min(len(shard) for shard in data.val)
    if least < T + 1:
        raise LlmpyError(
            f"the validation text has {least:,} tokens, a row of -T {T} needs {T + 1:,}",
            "use a smaller -T, or more text",
        )
    return min(B, (least - 1) // T)


def train(options: TrainOptions, machine: Machine | None = None) -> int:
    """From options to a finished run folder; returns the exit code. `machine` None: the CPU.

    Whatever can be refused is refused before anything compiles, and then nothing is left behind.
    """
    start = None if options.init is None else formats.resolve(options.init, print)
    options = replace(options, model=dial(options.model, start))
    check_length(options.sequence_length, (start.config if start else ModelConfig.from_dial(options.model)).context)
    folder = RunFolder.open(options.out, options.model)
    try:
        with Journal() as journal:
            journal.say(f"llm.py {__version__}, run folder {folder.path}")
            trainer = assemble(options, folder, journal, machine, start)
            journal.open(folder.path)
            folder.keep()
            return trainer.run()
    except BaseException:
        folder.discard()
        raise


def check_length(T: int, context: int) -> None:
    """Raise LlmpyError for a row longer than the model's context."""
    if context < T:
        raise LlmpyError(f"-T {T} is longer than the model's context of {context}", f"use -T {context} or less")


def dial(model: str, start: Source | None) -> str:
    """What --model is: as it was given, or the default, or the size of what the run starts from.

    Raises LlmpyError if the last two are not the same.
    """
    if start is None:
        return model or DEFAULT_MODEL
    have = start.config
    if model:
        asked = ModelConfig.from_dial(model, have.vocab_size, have.context)
        if asked != have:
            raise LlmpyError(
                f"--model {model} is not what --init is: {start.describe()}", "leave --model out, or let them agree"
            )
    return model or f"d{have.layers}"


def starting_config(start: Source, data: Dataset) -> ModelConfig:
    """The shape of what the run starts from. Raises LlmpyError unless the data have the same vocabulary."""
    if start.config.vocab_size != data.vocab_size:
        raise LlmpyError(
            f"the model of --init has {start.config.vocab_size:,} tokens, the data {data.vocab_size:,}",
            "use data that were made with the model's tokenizer",
        )
    return start.config


def assemble(
    options: TrainOptions, folder: RunFolder, journal: Journal, machine: Machine | None, start: Source | None = None
) -> Trainer:
    """Data, machine, preflight, model, optimizer: everything a trainer needs, checked."""
    vocab_size = options.vocab_size or (BUILTIN_VOCAB if options.data is None else None)
    data = prepare(options.data, folder.path, vocab_size, journal.say)
    if start is None:
        config = ModelConfig.from_dial(options.model, vocab_size=data.vocab_size)
    else:
        config = starting_config(start, data)
        journal.say(f"init     {start.describe()}")
    options = options.settled(config.channels, sum(map(len, data.train)))
    feed = Feed(data, options)
    ops = machine or cast(Machine, backend.load("cpu", threads=options.threads, dtype=options.dtype))
    flight = inspect(config, options, ops, sum(map(len, data.train)), sum(map(len, data.val)))
    for line in flight.lines():
        journal.say(line)
    flight.check_memory()
    ops.warm_up(journal.say)
    model = GPT2(config, ops)
    if start is None:
        initialise(model.params, config, options.seed)
    else:
        start.fill(model.params)
    model.store_weights()
    model.reserve(options.batch_size, options.sequence_length, training=True)
    optimizer = AdamW(model, options.beta1, options.beta2, options.weight_decay, options.clip)
    trainer = Trainer(model, optimizer, feed, options, folder.path, journal, flight.peak, flight.step_seconds)
    trainer.trained_length = max(options.sequence_length, start.trained_length if start else 0)
    if data.tokenizer is not None:
        data.tokenizer.save(folder / "tokenizer.json")
    write_config(folder / "config.json", config, options, ops)
    return trainer


def write_config(path: Path, config: ModelConfig, options: TrainOptions, machine: Machine) -> None:
    """What was trained, how and on what, for people and later tools; loading a model does not read it."""
    record = {
        "llmpy": __version__,
        "model": asdict(config),
        "options": asdict(options),
        "machine": {"threads": machine.threads, "isa": machine.isa, **machine.version_info()},
    }
    text = json.dumps(record, indent=2, default=str, ensure_ascii=False)
    # errors: a path may hold bytes that are no text
    write_whole(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8", errors="replace"))
