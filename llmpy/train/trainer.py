"""Training: step, evaluate, sample, log, checkpoint; bounded by steps, by time, and by Ctrl-C; and resumed to the bit.

A step     loss and gradients of one or more batches → norm → AdamW at the schedule's rate, unless it is skipped
At steps 0, every `eval_every`, and the last: the validation loss
After a step, every `checkpoint_every`, and at the end: all that the run needs to go on

A checkpoint holds the run as it is after its step and before what else is due there, so that a run that goes on does
and records what one does that was never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backend.machine import Machine
from ..data.hellaswag import read_examples
from ..data.loader import Loader
from ..data.pipeline import HELD_OUT
from ..data.prepare import Dataset
from ..data.records import holds_answers, question
from ..errors import Diverged, LlmpyError
from ..formats import llmc_state
from ..generate.generation import Choice, TextStream, encode_prompt, generate
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2
from ..options.options import ALL_BATCHES, TrainOptions
from ..rng import Xorshift64Star
from ..run import checkpoint
from ..run.folder import BEST_FILE, TOKENIZER_FILE, RunFolder
from ..run.journal import Journal
from ..run.trackers import Trackers
from ..system.command import command
from ..system.durable import sync_folder
from ..system.words import count_of, duration
from ..version import __version__
from . import start
from .memory import check_disk, check_memory
from .multiple_choice import MultipleChoice
from .nonfinite import origin
from .optimizer import AdamW
from .outliers import OutlierDetector
from .preflight import all_of, check_length, inspect
from .schedule import horizon, learning_rate
from .single_process import Alone

SAMPLE_SEED = 1337  # llm.c's; the same coins for every sample of a run, so that samples compare
SAMPLE_CHOICE = Choice(temperature=0.5, top_k=50)  # as `llmpy sample` has them
WARMUP_SHARE, WARMUP_MOST = 10, 50  # without --warmup: a tenth of the run, at most 50 steps
EVERY_LINE_UNTIL = 10  # the first steps are all told, later ones at most one in
LINE_SECONDS = 2.0
SMOOTHING = 0.95  # of the displayed tokens per second
ALONE = Alone()


class Feed:
    """What a trainer reads: batches to train and to validate on, and the prompt of samples."""

    def __init__(self, data: Dataset, options: TrainOptions, config: ModelConfig, world: Alone = ALONE) -> None:
        """Raises LlmpyError if the data do not do for the options; so it is made before anything compiles."""
        slices: dict[str, Any] = {"rank": world.rank, "ranks": world.size}
        check_enough(data, options)
        B, T, size = options.batch_size, options.sequence_length, data.vocab_size
        if options.overfit:
            self.train = Loader(data.val, B, T, shuffle=False, vocab_size=size, **slices)
        else:
            self.train = Loader(data.train, B, T, options.shuffle, options.seed, vocab_size=size, **slices)
        rows = min(B, (min(map(len, data.val)) - 1) // T)  # or as many as the validation text fills
        self.val = Loader(data.val, rows, T, shuffle=False, vocab_size=size)
        self.choices: MultipleChoice | None = None
        if options.hellaswag is not None:
            self.choices = MultipleChoice(read_examples(options.hellaswag, size), config)
        self.tokenizer, self.bytes_per_token = data.tokenizer, data.bytes_per_token
        self.opening = options.prompt or ""
        if data.tokenizer is not None:
            asked = question(data.val, data.tokenizer, T // 2) if not self.opening else []
            self.prompt = asked or encode_prompt(data.tokenizer, self.opening)
            self.opening = data.tokenizer.decode([i for i in asked if i != data.tokenizer.eot]) or self.opening
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
        trackers: Trackers | None = None,
        data: Mapping[str, Any] | None = None,
        trained_length: int = 0,
        world: Alone = ALONE,
    ) -> None:
        """`peak` is the machine's GFLOP/s, `step_seconds` what a step may take, `data` the fingerprints of the data.

        `trained_length` is the T that the model was trained at before; beyond the larger positions are untrained.
        `world`: the ranks that train together. All of them run what is here, and agree where it matters.
        """
        self.world = world
        self.model, self.optimizer, self.feed, self.options = model, optimizer, feed, options
        self.folder, self.journal, self.peak = folder, journal, peak
        self.trackers, self.data = trackers, dict(data or {})
        o = options
        length = max(o.sequence_length, trained_length)
        self.keeper = world.keeper(folder, model, optimizer, length, journal, o)
        self.micro_steps = o.micro_steps
        self._flops_per_token = model.config.flops_per_token(o.sequence_length)
        self.detectors = {"loss": OutlierDetector(), "norm": OutlierDetector()}
        self.done = 0
        self.stop_signal = 0  # of any rank; all know it since the same moment
        self._asked = 0  # the signal to this one
        self._logs: dict[str, int] = {}  # bytes of the logs after the last step: what came since comes again on resume
        self._bad = 0  # steps in a row with numbers that are not finite
        self._step_seconds = step_seconds
        self._doubted = False  # whether that was told of the peak
        self._rate = 0.0  # tokens per second of this process, smoothed
        self._made = 0  # steps of this process
        self._spent = 0.0  # seconds in steps, for their mean
        self._untimed = 0  # of the steps done: those of llm.c, before this run
        self._line_at = 0.0
        self._val_loss = math.nan  # the last one
        self._before = 0.0  # seconds of training of earlier processes
        self._started = 0.0

    def run(self) -> int:
        """Train to the end, or to Ctrl-C. Returns the exit code: 0, or 128 + signal (130 for Ctrl-C).

        Raises LlmpyError if the last checkpoint cannot be written, Diverged if too many steps are not finite.
        """
        unsaved: LlmpyError | None = None
        try:
            with stop_signals(self._stop):
                self.keeper.begin(self.done)
                self._logs = self.journal.sizes()
                if not self.done:
                    self.evaluate()
                self.journal.begin_progress()
                self._started = time.perf_counter()
                while not self._stopped() and not self._over():
                    self._between_steps()
                    if self.stop_signal:
                        break
                    self.step()
                    self._logs = self.journal.sizes()
                    if self.keeper.due(self.done) and not self._bad:
                        self._save()
                self.journal.end_progress()
                try:
                    self._check_finite()
                    self.keeper.finish(self.done, *self._state())
                except Diverged:
                    raise
                except LlmpyError as fault:
                    unsaved = fault
                self.evaluate()
            if unsaved is None:
                if self.trackers is not None:
                    self.trackers.close()  # a signal in the last sample ends the program at once
                self._conclude()
        finally:
            self.keeper.close()
            if self.trackers is not None:
                self.trackers.close()
        if unsaved is not None:
            raise unsaved
        return 128 + self.stop_signal if self._stopped() else 0

    def _stopped(self) -> bool:
        """Whether a signal came, to any rank."""
        self.stop_signal = int(max(asked for (asked,) in self.world.gather(self._asked)))
        return self.stop_signal != 0

    def _over(self) -> bool:
        """Whether the first rank is `finished`: its clock counts."""
        return bool(self.world.gather(self.finished())[0][0])

    def finished(self) -> bool:
        """Whether the steps or the time are used up. Every run makes a step."""
        o = self.options
        if o.steps is not None and self.done >= o.steps:
            return True
        return o.seconds is not None and self.done > 0 and self._elapsed() >= o.seconds

    def _between_steps(self) -> None:
        """What is due before the next step."""
        o = self.options
        if self.done and o.eval_every and self.done % o.eval_every == 0:
            self.evaluate()
        if self.done and o.sample_every and self.done % o.sample_every == 0:
            self.sample()

    def step(self) -> None:
        """One update, or one that is skipped; one line of metrics.

        A loss or norm that is not finite never reaches the parameters; after `give_up_after` of them in a row this
        raises Diverged.
        """
        lr = self.world.gather(self._learning_rate())[0][0]  # of a run by the clock, the first rank's
        start = time.perf_counter()
        loss, batches = self._gradients()
        norm = self.optimizer.norm()
        z = {"loss": math.nan, "norm": math.nan}
        why = ""
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._bad += 1
            why = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        else:
            self._bad = 0
            z = {"loss": self.detectors["loss"].update(loss), "norm": self.detectors["norm"].update(norm)}
            why = self._outlier(z)
        if why:
            self.optimizer.skip()
        else:
            self.optimizer.update(lr, norm)
        seconds = time.perf_counter() - start
        self.done += 1
        self._made += 1
        self._spent += seconds
        self._step_seconds = self._spent / (self.done - self._untimed)
        tokens = self.options.batch_tokens * self.micro_steps
        self._rate += (tokens / seconds - self._rate) * (1 - SMOOTHING if self._made > 2 else 1.0)
        numbers: dict[str, Any] = {"step": self.done, "loss": loss, "lr": lr, "grad_norm": norm}
        numbers |= {f"{name}_z": value for name, value in z.items()}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if why:
            numbers |= {"skipped": why, "batches": batches}
            told = ", ".join(f"{file} {sample}" for file, sample in batches)
            self.journal.say(f"step {self.done}: skipped, for {why}; batches {told}")
        share = self._flops_per_token / 1e9 * tokens / seconds / self.peak
        if share > 1 and not self._doubted:
            self._doubted = True
            self.journal.say("note: more than the measured peak: others were at work when it was measured")
        left = self._left()[1]
        self._record(
            **numbers, ms=1e3 * seconds, tokens_per_s=tokens / seconds, share_of_peak=share, eta_s=left,
            **self.world.times(),
        )  # fmt: skip
        if self._bad:
            if self._bad >= self.options.give_up_after:
                where = origin(self.model, self.options.batch_size, self.options.sequence_length)
                raise self._diverged(f"{why}, as in {count_of(self._bad, 'step')} in a row; it first arose in {where}")
            return
        self.journal.record_llmc(f"s:{self.done - 1} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}")
        self._tell(loss, lr, norm, z, seconds)

    def _gradients(self) -> tuple[float, list[tuple[str, int]]]:
        """Mean loss of the batches of one update, their gradients into `model.grads`; which batches they were.

        Batches weigh by their targets that count, so that several are as one that holds all their rows.
        """
        train, read, batches = self.feed.train, [], []
        if self.options.overfit:
            train.reset()
        for _ in range(self.micro_steps):
            tokens, targets = train.next()
            read.append((tokens.copy(), targets.copy(), int(np.count_nonzero(targets >= 0))))
            batches.append(train.batch)
        world, total = self.world, 0.0
        counted = max(1, int(sum(n for (n,) in world.gather(sum(n for _, _, n in read)))))
        for i, (tokens, targets, n) in enumerate(read):
            share = counted / max(1, n)  # without masks `micro_steps`, of all ranks
            if i + 1 == len(read):
                self.optimizer.expect()
            total += n * self.model.loss_and_grads(tokens, targets, accumulate=i > 0, micro_steps=share)
        return sum(part for (part,) in world.gather(total)) / counted, batches

    def _outlier(self, z: Mapping[str, float]) -> str:
        """Why this update is to be skipped, or ""."""
        for name, most in (("loss", self.options.skip_loss), ("norm", self.options.skip_norm)):
            if most and z[name] > most:
                return f"the {name} is {z[name]:.1f} deviations above its mean"
        return ""

    def evaluate(self) -> None:
        """Say and record how good the model is, unless a stop signal comes: then there is nothing to say."""
        self._validate()
        if self.feed.choices is not None:
            self._choose(self.feed.choices)

    def _choose(self, choices: MultipleChoice) -> None:
        """Say and record HellaSwag's accuracy."""
        world, count, right = self.world, len(choices.examples), 0
        for first in range(0, count, world.size):
            if self._stopped():
                return
            mine = first + world.rank
            right += int(sum(r for (r,) in world.gather(mine < count and choices.right(self.model, mine))))
        self._record(step=self.done, hellaswag=right / count)
        self.journal.record_llmc(f"s:{self.done} eval:{right / count:.4f}")
        self.journal.say(f"step {self.done:>5} | HellaSwag {right:,} of {count:,} right: {right / count:.4f}")

    def _validate(self) -> None:
        """Say and record the mean loss of the first `eval_batches` validation batches, always the same ones.

        Batches weigh by their targets that count: without a mask alike, as in llm.c.
        """
        val = self.feed.val
        val.reset()
        wanted, most = self.options.eval_batches, val.batches_per_epoch
        batches = most if wanted == ALL_BATCHES else max(1, min(wanted, most))
        world = self.world
        total = weight = 0.0
        for first in range(0, batches, world.size):  # a batch for each rank: the same sum for any number of them
            if self._stopped():
                return
            mine = 0.0, 0.0
            for i in range(first, min(first + world.size, batches)):
                tokens, targets = val.next()
                if i - first == world.rank:
                    share = np.count_nonzero(targets >= 0) / targets.size  # all, where no mask says otherwise
                    mine = share * self.model.loss(tokens, targets), share
            for part, counted in world.gather(*mine):
                total += part
                weight += counted
        if not weight:
            self.journal.say(f"step {self.done:>5} | no target of the {batches:,} validation batches counts")
            return
        loss = total / weight
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}")
        numbers: dict[str, float] = {"step": self.done, "val_loss": loss}
        line = f"step {self.done:>5} | validation loss {loss:.4f}"
        if self.feed.bytes_per_token:
            numbers["val_bits_per_byte"] = loss / math.log(2) / self.feed.bytes_per_token
            line += f" | {numbers['val_bits_per_byte']:.3f} bits a byte"
        self._record(**numbers)
        self.journal.record_llmc(f"s:{self.done} tel:{loss:.4f}")
        self.journal.say(line)
        self._val_loss = loss
        if self.done:
            self.keeper.keep_best(checkpoint.Score(self.done, loss, self._measured_on(batches)))

    def _measured_on(self, batches: int) -> str:
        """What a validation loss is the mean of: another one is not to be compared with it."""
        rows, T, digest = self.feed.val.B, self.feed.val.T, hashlib.blake2b(digest_size=6)
        digest.update(json.dumps(start.contents(self.data.get("val", []))).encode())
        return f"{batches:,} batches of {rows} x {T} of text {digest.hexdigest()}"

    def sample(self) -> None:
        """Print what the model writes after the prompt."""
        self.world.while_others_wait(self._sample)
        self._stopped()

    def _sample(self) -> None:
        o, feed = self.options, self.feed
        stream = TextStream(feed.tokenizer.decode if feed.tokenizer else token_ids)
        coin = Xorshift64Star(SAMPLE_SEED)
        # Packed matrices would take memory that training needs; a sample is soon done without.
        tokens = generate(self.model, feed.prompt, o.sample_tokens, o.sequence_length, coin, SAMPLE_CHOICE, pack=False)
        going = itertools.takewhile(lambda _: not self._asked, tokens)
        text = feed.opening + "".join(map(stream.feed, going)) + stream.finish()
        self.journal.say(f"--- sample at step {self.done}")
        self.journal.say(text.strip("\n"))
        self.journal.say("---")
        self.journal.record_sample(f"--- step {self.done}", text.strip("\n"))

    def _save(self) -> None:
        """A checkpoint of now; training waits for a copy only. Raises Diverged if it would not be finite."""
        self._check_finite()
        self.keeper.save(self.done, *self._state())

    def _check_finite(self) -> None:
        if not self.keeper.finite():
            raise self._diverged("a parameter or moment is no longer finite")

    def _state(self) -> tuple[dict[str, Any], Any]:
        """All that a run needs to go on beside parameters and moments: as JSON, and the place in the data."""
        position, o = self.feed.train.position, self.options
        data = {
            **self.data, "shard": position.shard, "sample": position.sample, "generator_used": position.rng.pos,
            "sample_tokens": o.batch_tokens,
        }  # fmt: skip
        state = {
            "llmpy": __version__,
            "options": o.as_record(),
            "dtype": str(self.model.ops.dtype),
            "data": data,
            "updates": self.optimizer.updates,
            "detectors": {name: detector.state for name, detector in self.detectors.items()},
            "bad_steps": self._bad,
            "seconds": {"elapsed": self._elapsed(), "in_steps": self._spent, "untimed": self._untimed},
            "logs": self._logs,
        }
        return state, position

    def resume(self, path: Path, manifest: dict[str, Any]) -> None:
        """Go on from a checkpoint that `checkpoint.newest` accepted."""
        position = self.keeper.restore(path, manifest, self.options.seed)
        self.feed.train.go_on(position, manifest["data"]["sample_tokens"])
        self.optimizer.updates = manifest["updates"]
        for name, detector in self.detectors.items():
            detector.state = manifest["detectors"][name]
        self.done, self._bad = manifest["step"], manifest["bad_steps"]
        self._before, self._spent = manifest["seconds"]["elapsed"], manifest["seconds"]["in_steps"]
        self._untimed = manifest["seconds"].get("untimed", 0)
        if self.done > self._untimed:
            self._step_seconds = self._spent / (self.done - self._untimed)
        self.keeper.adopt(path, self.done)

    def take_over(self, state: llmc_state.TrainingState) -> None:
        """Go on from a state of llm.c, whose weights the model has. What it does not hold begins anew: detectors."""
        llmc_state.restore(state, self.optimizer, self.feed.train)
        self.done = self._untimed = state.step

    def _conclude(self) -> None:
        """Say what came of it and how to go on; a sample unless the user wants to be gone."""
        say = self.journal.say
        if self._stopped():
            steps = count_of(self.done, "step")
            say(f"stopped after {steps}; go on with:  {command('train', '--resume', self.folder)}")
        else:
            self.sample()
            say(f"trained {count_of(self.done, 'step')} in {duration(self._elapsed())}; the model is in {self.folder}")
            best = self.keeper.best()
            if best is not None and best.val_loss < self._val_loss:  # both measured on the same: else it gave way
                say(
                    f"it was better before, after step {best.step}, with validation loss {best.val_loss:.4f}: "
                    f"{shlex.quote(str(self.folder / BEST_FILE))}"
                )
        feed = self.feed
        if feed.tokenizer is not None and any(holds_answers(shard, feed.tokenizer) for shard in feed.train.shards):
            say(f"talk with it:  {command('chat', self.folder)}")
        elif feed.tokenizer is not None:
            say(f'continue a text with:  {command("sample", self.folder)} --prompt "…"')

    def _elapsed(self) -> float:
        """Seconds since the first step began, evaluations and samples included, pauses of the run not."""
        return self._before + (time.perf_counter() - self._started if self._started else 0.0)

    def _total(self) -> int:
        o = self.options
        return horizon(self.done, self._elapsed(), self._step_seconds, o.steps, o.seconds)

    def _left(self) -> tuple[int, float]:
        """The last step as things are, and the seconds of training until then."""
        total = self._total() if not self.finished() else self.done
        return total, (total - self.done) * self._step_seconds

    def _learning_rate(self) -> float:
        o, total = self.options, self._total()
        warmup = min(total // WARMUP_SHARE, WARMUP_MOST) if o.warmup is None else o.warmup
        assert o.lr is not None  # `settled` has seen to it
        return learning_rate(self.done, total, warmup, o.lr, o.min_lr, o.schedule)

    def _record(self, **numbers: Any) -> None:
        """Into metrics.jsonl, and to whoever else follows the run."""
        self.journal.record(**numbers)
        if self.trackers is not None:
            self.trackers.log(numbers["step"], numbers)

    def _tell(self, loss: float, lr: float, norm: float, z: Mapping[str, float], seconds: float) -> None:
        """The step line, and the bar below it."""
        total, left = self._left()
        flops = self._flops_per_token * self._rate
        line = (
            f"step {self.done:>5}/{total} | loss {loss:.4f}{signed(z['loss'])} | lr {lr:.2e} | "
            f"norm {norm:.3f}{signed(z['norm'])} | "
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
        self._asked = number
        if self.world.rank:
            return
        again = b"; press Ctrl-C again to quit at once" if number == signal.SIGINT else b""
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, b"\nstopping after this step, and saving" + again + b"\n")

    def _diverged(self, what: str) -> Diverged:
        """To be raised, on all ranks; a checkpoint that is being written is finished first."""
        self.keeper.settle()
        last, again = self.keeper.last, ""
        if last is None:
            kept = "no checkpoint was made yet"
        elif last > self.done - self._bad:
            kept = f"the checkpoint of step {last} came after steps that had to be skipped, and is no better"
        else:
            kept = f"the last good checkpoint is of step {last}"
            again = f", and go on from it: {command('train', '--resume', self.folder)} --lr …"
        return Diverged(f"step {self.done}: {what}; {kept}", f"use a smaller --lr or a longer --warmup{again}")


def signed(z: float) -> str:
    """A deviation from the mean as the step line has it, once there is one."""
    return "" if math.isnan(z) else f" ({z:+.2f}z)"


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


def check_enough(data: Dataset, options: TrainOptions) -> None:
    """Raise LlmpyError if the data do not fill a batch to train on and a row to validate; it tells what both take."""
    o, T = options, options.sequence_length
    parts = data.val if o.overfit else data.train, data.val
    smallest = [min(part, key=len) for part in parts]
    have, needed = [len(shard) for shard in smallest], [o.batch_tokens + 1, T + 1]
    lacking = [n < least for n, least in zip(have, needed, strict=True)]
    if not any(lacking):
        return
    several = [shard.path if len(part) > 1 else None for shard, part in zip(smallest, parts, strict=True)]
    told = [f"{n:,}" + (f" in {path}" if path else "") for n, path in zip(have, several, strict=True)]
    # Where lines end, this text may have given more than its share to validate, and a longer one may not.
    held = have[1] if o.overfit else min(have[1], HELD_OUT * sum(have))
    times = max(needed[0] / max(1, have[0]), needed[1] / max(1, held))
    short = [path for path, lacks in zip(several, lacking, strict=True) if lacks and path]
    fix = f"give about {math.ceil(10 * times) / 10:,} times as much text"
    if short:
        fix = f"leave {short[0]} out, or join it with another"
    t = min(T, have[1] - 1, (have[0] - 1) // o.ranks)
    if t > 0 and o.total_batch is None:
        fix += f", or use -B {min(o.batch_size, (have[0] - 1) // (t * o.ranks))} -T {t}"
    of_ranks = f" of each of {o.ranks} ranks" if o.ranks > 1 else ""
    raise LlmpyError(
        f"there are {told[0]} tokens to train on and {told[1]} to validate, and -B {o.batch_size} -T {T}{of_ranks} "
        f"takes {needed[0]:,} and {needed[1]:,} at least",
        fix,
    )


def train(
    options: TrainOptions, machine: Machine | None = None, folder: RunFolder | None = None, world: Alone = ALONE
) -> int:
    """From options to a finished run folder; returns the exit code. `machine` None: the CPU.

    Whatever can be refused is refused before anything compiles, all of it at once, and then nothing is left behind.
    `folder` is what `RunFolder.claim` gave for the options, if it has been asked already. `world`: the ranks that train
    together, each of which calls this.
    """
    options = replace(options, ranks=world.size)
    if folder is None:
        try:
            folder = world.claim(options)
        except LlmpyError as fault:
            if world.rank == 0 and not options.resume:  # what else is wrong with that its folder would tell
                ops = machine or start.load(options, world)
                start.begin(options, Path(), ops, lambda _: None, world.local_size, known=[fault])
            raise
    try:
        with world.journal() as journal:
            journal.say(f"llm.py {__version__}")
            return assemble(options, folder, journal, machine, world).run()
    finally:
        folder.discard()


def assemble(
    options: TrainOptions, folder: RunFolder, journal: Journal, machine: Machine | None, world: Alone = ALONE
) -> Trainer:
    """Data, machine, preflight, model, optimizer: all that a trainer needs, checked; of a run that goes on, as it was.

    When this returns the run has begun, and its folder is kept.
    """
    begun = start.of(options, folder, machine, world, journal.say)
    ops, manifest = begun.machine, begun.manifest
    data = begun.read(folder.path, world, journal.say)
    config = start.shape(begun.options.model, begun.source, data)
    options = begun.options.settled(config.channels, sum(map(len, data.train)))
    feed: Feed = all_of(
        lambda: Feed(data, options, config, world),
        lambda: check_length(options.sequence_length, config.context),
        lambda: options.micro_steps,
        lambda: check_memory(options, config, ops, beside=world.local_size, ranks=world.size),
        lambda: check_disk(options, config, folder.path),
    )[0]
    if begun.state is not None:
        llmc_state.restore_place(begun.state, feed.train)  # before anything compiles
    marks = begun.recognised(data, folder.path)
    tokens = sum(map(len, data.train)), sum(map(len, data.val))
    flight = inspect(config, options, ops, *tokens, begun.done, begun.elapsed, world.size)
    for line in [*flight.lines(), *world.lines(ops.threads)]:
        journal.say(line)
    world.on_each_host(lambda: ops.warm_up(journal.say))
    model = GPT2(config, ops, options.recompute, options.recompute_layers)
    begun.fill(model, options.seed)
    model.reserve(options.batch_size, options.sequence_length, training=True)
    optimizer = world.optimizer(model, options)
    tracked = (options.track or ()) if world.rank == 0 else ()
    since = begun.done if folder.resumed else None
    trackers = Trackers(tracked, folder.path, options.as_record(), journal.say, since)
    peak = sum(part for (part,) in world.gather(flight.peak))
    trainer = Trainer(
        model, optimizer, feed, options, folder.path, journal, peak, flight.step_seconds, trackers, marks,
        begun.source.trained_length if begun.source else 0, world,
    )  # fmt: skip
    if begun.checkpoint is not None and manifest is not None:
        trainer.resume(begun.checkpoint, manifest)
    if begun.state is not None:
        trainer.take_over(begun.state)
    if world.rank == 0:
        if data.tokenizer is not None:
            data.tokenizer.save(folder / TOKENIZER_FILE)
        start.write_config(folder.path, options, model=asdict(config), machine=start.described(ops), data=marks)
    journal.open(folder.path, None if not folder.resumed else manifest["logs"] if manifest else {})
    if tracked and since:  # they forget this step with what came after it
        for row in journal.recorded(since):
            trackers.log(since, row)
    folder.keep()
    journal.say(f"run folder {folder.path}")
    sync_folder(folder.path)
    sync_folder(folder.path.absolute().parent)
    return trainer
