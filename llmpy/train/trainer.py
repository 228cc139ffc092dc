"""Training: step, evaluate, sample, report, save; until --steps, --minutes or Ctrl-C; resumed bitwise identically.

A checkpoint holds the state after its step but before the evaluation and sample due there. So a resumed run does and
records the same as an uninterrupted one. `assemble.py` builds the parts of a trainer.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from pathlib import Path
from typing import Any

from ..data.loader import Position
from ..errors import Diverged, LlmpyError
from ..formats import llmc_state
from ..model.language_model import LanguageModel
from ..options.train import TrainOptions
from ..run.checkpoint_writer import CheckpointWriter
from ..run.folder import BEST_FILE
from ..system.command import command, command_here
from ..system.words import count_of, duration
from ..version import __version__
from .evaluation import Evaluation
from .movement import ENOUGH, Movement, listed
from .nonfinite import origin
from .optimizer import AdamW
from .outliers import GIVE_UP_AFTER, UpdateGuard
from .report import Report, StepResult
from .samples import write_sample
from .schedule import horizon, learning_rate
from .signals import StopSignals
from .single_process import SINGLE_PROCESS, SingleProcess
from .training_data import TrainingData, Update
from .verification import Verification, weights_hash

WARMUP_SHARE, WARMUP_MOST = 10, 50  # default warm-up: a tenth of the run, at most 50 steps


class Trainer:
    """A model, its optimizer, its data and the training loop. Every rank runs one, in lockstep."""

    update: Update  # the batches of the next step, prefetched
    movement: Movement  # since the start of this process

    def __init__(
        self, model: LanguageModel, optimizer: AdamW, data: TrainingData, options: TrainOptions,
        checkpoints: CheckpointWriter, report: Report, world: SingleProcess = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.data, self.options = model, optimizer, data, options
        self.checkpoints, self.report, self.world = checkpoints, report, world
        self.stop = StopSignals(world)
        self.evaluation = Evaluation(model, data, options, report, self.stop, world)
        self.verification = Verification(model, options)
        self.guard = UpdateGuard({"loss": options.skip_loss, "norm": options.skip_norm})
        self.done = 0
        self.agreed: int | None = None  # the last step after which all ranks had the same weights
        self.hash = ""  # of these weights
        self.warned: set[str] = set()
        self.counted = 0  # unmasked targets of the next update, on all ranks
        self.elapsed, self.step_seconds = 0.0, 1.0  # by rank 0's clock

    def run(self) -> int:
        """Train to the end or to a stop signal. Returns the exit code: 0, or 128 + the signal (130 for Ctrl-C).

        Raises LlmpyError if the final checkpoint cannot be written, Diverged if training gives NaN or infinity.
        """
        with contextlib.closing(self.checkpoints), self.report:
            with self.stop.handled():
                self.train()
                self.save_last()
            self.report.close()  # from now on a signal ends the program at once
            self.conclude()
        return 128 + self.stop.signal if self.stop.signal else 0

    def train(self) -> None:
        o = self.options
        self.update = self.data.read()
        self.checkpoints.begin(self.done)
        self.compare_ranks()
        self.movement = Movement(self.model, self.optimizer)
        self.report.mark_logs()
        if not self.done:
            self.evaluate()
        self.report.start()
        self.agree(loss=0.0)
        while not self.finished():
            if self.due(o.eval_every):
                self.evaluate()
            if self.due(o.sample_every):
                self.sample()
            if self.stop.signal:
                break
            result = self.train_step()
            self.report.step(result)
            self.check(result)
            if self.movement.updates == ENOUGH and not result.skipped:
                self.warn(f"without a gradient in {ENOUGH} updates", self.movement.without_gradient())
                self.warn("unchanged since the start", self.movement.unmoved())
            if self.checkpoints.due(self.done) and not self.guard.bad_steps:
                self.save()

    def train_step(self) -> StepResult:
        """Make one update; skip it if its loss or norm is not finite or an outlier."""
        start, update, counted, lr = time.perf_counter(), self.update, self.counted, self.learning_rate()
        loss = self.gradients()
        self.update = self.data.read()
        total = self.agree(loss)
        mean = total / counted if counted else None
        norm = self.optimizer.norm()
        z, skipped = self.guard.judge(mean, norm)
        if skipped:
            self.optimizer.skip()
        else:
            self.optimizer.update(lr, norm)
            self.movement.updates += 1
        self.done += 1
        seconds, tokens = time.perf_counter() - start, self.options.batch_tokens * len(update.batches)
        steps = self.done if self.finished() else self.total_steps()
        return StepResult(self.done, steps, mean, norm, lr, z, skipped, update.names, tokens, seconds)

    def gradients(self) -> float:
        """Compute the update's gradients, on a verified step twice; see `accumulate`.

        Raises LlmpyError if they differ.
        """
        if not self.verification.due(self.done, self.total_steps() - self.done):
            return self.accumulate()
        self.optimizer.settle()
        loss, different = self.verification.compare(self.accumulate)
        for rank, found in enumerate(self.world.gather_values(different)):
            if found:
                where = f" on rank {rank}" if self.world.size > 1 else ""
                what = f"step {self.done + 1}: {found} differs between two computations from the same state{where}"
                kept, fix = self.from_before("Memory or CPU flip bits: test them (memtest86+), undo overclocking")
                raise LlmpyError("run.bits-differ", f"{what}; {kept}", fix)
        return loss

    def accumulate(self, sent: bool = True) -> float:
        """Accumulate the gradients of the update's mean loss in `model.grads`. Returns this rank's sum of losses.

        Micro-batches are weighted by their unmasked targets, so that they are equivalent to one large batch. `sent`:
        ranks exchange the gradients.
        """
        batches, total = self.update.batches, 0.0
        for i, (tokens, targets, positions, n) in enumerate(batches):
            if sent and i + 1 == len(batches):
                self.optimizer.expect()
            share = max(1, self.counted) / max(1, n)  # without masks: the number of micro-batches on all ranks
            total += n * self.model.loss_and_grads(tokens, targets, i > 0, share, positions)
        return total

    def agree(self, loss: float) -> float:
        """Synchronise losses, counts, clocks and signals of all ranks. Returns the sum of their losses."""
        report = self.report
        rows = self.stop.agree(loss, self.update.counted, report.elapsed(), report.step_seconds)
        self.counted = int(sum(row[1] for row in rows))
        self.elapsed, self.step_seconds = rows[0][2:]
        return sum(row[0] for row in rows)

    def finished(self) -> bool:
        """Return whether the run ends: a signal, --steps or --minutes. Every run makes at least one step."""
        o = self.options
        timed_out = o.seconds is not None and self.done > 0 and self.elapsed >= o.seconds
        return bool(self.stop.signal) or (o.steps is not None and self.done >= o.steps) or timed_out

    def due(self, every: int) -> bool:
        """Return whether an action due `every` n steps is due now; 0: never."""
        return self.done > 0 and every > 0 and self.done % every == 0

    def total_steps(self) -> int:
        """Return the predicted steps of the whole run: N of the schedule."""
        return horizon(self.done, self.elapsed, self.step_seconds, self.options.steps, self.options.seconds)

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""
        o, total = self.options, self.total_steps()
        warmup = min(total // WARMUP_SHARE, WARMUP_MOST) if o.warmup is None else o.warmup
        assert o.lr is not None  # set by `settled`
        return learning_rate(self.done, total, warmup, o.lr, o.min_lr, o.schedule)

    def evaluate(self) -> None:
        """Report validation loss and accuracy, and keep the best model; a stop signal ends it."""
        score = self.evaluation.validate(self.done)
        if score is not None and not math.isfinite(score.val_loss):
            raise self.diverged(f"the validation loss is {score.val_loss}")
        if score is not None and self.done:
            self.checkpoints.keep_best(score)
        self.evaluation.choose(self.done)

    def sample(self) -> None:
        """Print a sample, on rank 0."""
        with self.world.others_waiting() as mine:
            if mine:
                write_sample(self.model, self.data, self.options, self.done, self.report.journal, self.stop)
        self.stop.agree()

    def check(self, result: StepResult) -> None:
        """Raise Diverged after too many consecutive steps with a loss or norm that is not finite."""
        if self.guard.bad_steps >= GIVE_UP_AFTER:
            where = origin(self.model, self.options.batch_size, self.options.sequence_length)
            steps = count_of(self.guard.bad_steps, "consecutive step")
            raise self.diverged(f"{result.skipped}, in {steps}; it first arose in {where}")

    def before_checkpoint(self) -> None:
        """Check the state. Raises Diverged if it is not finite, LlmpyError if the ranks' weights differ."""
        if not self.checkpoints.finite():
            raise self.diverged("a parameter or moment is no longer finite")
        self.compare_ranks()
        self.warn("unchanged since the start", self.movement.unmoved())

    def compare_ranks(self) -> None:
        """Compare the hash of the weights of all ranks. Raises LlmpyError if they differ."""
        if self.world.size == 1:
            return
        self.optimizer.settle()
        found = self.world.gather_values(weights_hash(self.model))
        if len({*found}) > 1:
            most = max(found, key=found.count)
            whole = 2 * found.count(most) <= len(found)  # no majority: any of them may be wrong
            odd = ", ".join(str(rank) for rank, value in enumerate(found) if whole or value != most)
            since = "at the start" if self.agreed is None else f"all ranks last agreed after step {self.agreed}"
            start = "Give all hosts the same model files"
            kept, fix = self.from_before(start if self.agreed is None else "Test the memory and network of the hosts")
            who = f"rank{'s' * (',' in odd)} {odd}{'' if whole else ' from the others'}"
            what = f"step {self.done}: weights differ: {who}; {since}; {kept}"
            raise LlmpyError("rank.weights-differ", what, fix)
        self.agreed, self.hash = self.done, found[0]

    def warn(self, what: str, names: list[str]) -> None:
        """Log the tensors of any rank that stand still, once."""
        found = dict.fromkeys(name for part in self.world.gather_values(names) for name in part)
        if new := [name for name in found if name not in self.warned]:
            self.report.journal.log(f"warning: {what}: {listed(new)}")
        self.warned |= {*found}

    def save(self) -> None:
        """Start a background checkpoint. Raises as `before_checkpoint`."""
        self.before_checkpoint()
        self.checkpoints.save(self.done, *self.state())

    def save_last(self) -> None:
        """Write the final checkpoint, then evaluate even if that failed."""
        self.report.journal.end_progress()
        self.before_checkpoint()
        try:
            self.checkpoints.finish(self.done, *self.state())
        finally:
            self.evaluate()

    def state(self) -> tuple[dict[str, Any], Position]:
        """Return the state besides parameters and moments: as JSON, and the data position."""
        position = self.update.position
        data = {
            **self.data.fingerprints, "shard": position.shard, "sample": position.sample,
            "generator_used": position.rng.pos, "sample_tokens": self.options.batch_tokens,
        }  # fmt: skip
        state = {
            "llmpy": __version__, "options": self.options.as_record(), "dtype": str(self.model.ops.dtype), "data": data,
            "updates": self.optimizer.updates,
            "detectors": {name: detector.state for name, detector in self.guard.detectors.items()},
            "bad_steps": self.guard.bad_steps, "seconds": self.report.state(self.done), "logs": self.report.log_sizes,
            **({"weights_hash": self.hash} if self.hash else {}),
        }  # fmt: skip
        return state, position

    def resume(self, path: Path, manifest: dict[str, Any]) -> None:
        """Continue from a checkpoint that `checkpoint.newest` accepted."""
        position = self.checkpoints.restore(path, manifest, self.options.seed)
        self.data.train.resume(position, manifest["data"]["sample_tokens"])
        self.optimizer.updates = manifest["updates"]
        for name, detector in self.guard.detectors.items():
            detector.state = manifest["detectors"][name]
        self.done, self.guard.bad_steps = manifest["step"], manifest["bad_steps"]
        self.report.restore(self.done, manifest["seconds"])
        self.checkpoints.adopt(path, self.done)

    def take_over(self, state: llmc_state.TrainingState) -> None:
        """Continue from llm.c's state; weights and data position are already set. Detectors start empty."""
        llmc_state.restore(state, self.optimizer)
        self.done = state.step

    def conclude(self) -> None:
        """Print a sample, the result and the commands to continue; no sample after a signal."""
        log, data, folder = self.report.journal.log, self.data, self.checkpoints.run
        model = folder
        if self.stop.signal:
            log(f"stopped after {count_of(self.done, 'step')}")
            log(f"resume:  {command_here('train', '--resume', folder)}")
        else:
            self.sample()
            taken = duration(self.report.elapsed())
            log(f"trained {count_of(self.done, 'step')} in {taken}; model in {folder}")
            best = self.checkpoints.best()
            if best is not None and best.val_loss < self.evaluation.loss:  # of the same batches, or it was replaced
                model = folder / BEST_FILE
                log(f"best validation loss {best.val_loss:.4f} at step {best.step}: {shlex.quote(str(model))}")
        if data.holds_answers:
            log(f"chat:  {command_here('chat', model)}")
        elif data.tokenizer is not None:
            log(f'sample:  {command_here("sample", model)} --prompt "…"')

    def from_before(self, fix: str) -> tuple[str, str]:
        """Return the checkpoint before an error, after waiting for one in progress, and how to fix it and resume."""
        self.checkpoints.settle()
        if self.checkpoints.last is None:
            return "no checkpoint exists yet", f"{fix}. Then start again"
        resume = command("train", "--resume", self.checkpoints.run)
        return f"the checkpoint of step {self.checkpoints.last} is from before", f"{fix}. Then resume: {resume}"

    def diverged(self, what: str) -> Diverged:
        """Return the error to raise, on all ranks, after waiting for a checkpoint in progress."""
        self.checkpoints.settle()
        last, fix = self.checkpoints.last, "Use a smaller --lr or a longer --warmup"
        if last is None:
            kept = "no checkpoint exists yet"
        elif last > self.done - self.guard.bad_steps:
            kept = f"the checkpoint of step {last} is bad too: it follows skipped steps"
        else:
            kept = f"the last good checkpoint is of step {last}"
            fix += f", and resume: {command('train', '--resume', self.checkpoints.run)} --lr …"
        return Diverged("run.diverged", f"step {self.done}: {what}; {kept}", fix)
