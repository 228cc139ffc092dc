"""From options to a finished run: claim → resolve → check → load → build → run.

claim   the run's folder                        resolve   the options and the starting point (start.py)
check   everything, and report all problems     load      parameters and data
build   the parts of a trainer (trainer.py)     run       the loop

A run is refused before anything compiles, and then leaves nothing behind.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from .. import backend
from ..backend.machine import Machine
from ..data.user_data import Dataset
from ..errors import LlmpyError
from ..formats import llmc_state
from ..model.families import flops_per_token, language_model
from ..options.train import TrainOptions
from ..run.folder import TOKENIZER_FILE, RunFolder, with_start, write_config
from ..run.journal import Journal
from ..run.trackers import Trackers
from ..system.durable import sync_folder
from ..system.resources import available_memory
from ..version import __version__
from .memory import check_disk, check_memory
from .preflight import Problems, check, check_length, inspect
from .report import Report
from .single_process import SINGLE_PROCESS, SingleProcess
from .start import RunStart, resolve
from .trainer import Trainer
from .training_data import TrainingData, contents
from .verification import weights_hash


def train(
    options: TrainOptions, machine: Machine | None = None, folder: RunFolder | None = None,
    world: SingleProcess = SINGLE_PROCESS, quiet: bool = False,
) -> int:  # fmt: skip
    """Train with these options; return the exit code. `machine` None: the CPU. `quiet` prints nothing.

    `folder`: from `RunFolder.claim`, if already called. Every rank of `world` calls this. Raises LlmpyError.
    """
    options = replace(options, ranks=world.size)
    try:
        folder = folder or world.claim(options)
    except LlmpyError as error:
        if world.rank == 0 and not options.resume:  # report all other problems too
            start = resolve(options, None, lambda _: None)
            check(start, Path(), machine or load_machine(options, world), world.local_size, error)
        raise
    try:
        with world.journal() as journal:
            journal.quiet = quiet
            journal.log(f"llm.py {__version__}")
            return assemble(options, folder, journal, machine, world).run()
    finally:
        folder.discard()


def assemble(
    options: TrainOptions, folder: RunFolder, journal: Journal, machine: Machine | None = None,
    world: SingleProcess = SINGLE_PROCESS,
) -> Trainer:  # fmt: skip
    """Return a trainer that is ready to run in a claimed folder, which is kept from then on."""
    with world.first_rank_first():
        start = resolve(options, folder, journal.log)
    machine = machine or load_machine(start.options, world)
    with world.first_rank_first():
        if start.manifest is None:
            check(start, folder.path, machine, world.local_size)
            if world.rank == 0:
                write_config(folder.path, start.options)  # the run can be resumed from now on
        start = start.load(journal.log)
        data = start.read_data(folder.path, journal.log, world.rank)
    return build(start, data, folder, journal, machine, world)


def load_machine(options: TrainOptions, world: SingleProcess = SINGLE_PROCESS) -> Machine:
    """Return the CPU backend with the threads and dtype of the options."""
    return cast(Machine, backend.load("cpu", threads=world.threads(options), dtype=options.dtype))


def build(
    start: RunStart, data: Dataset, folder: RunFolder, journal: Journal, machine: Machine,
    world: SingleProcess = SINGLE_PROCESS,
) -> Trainer:  # fmt: skip
    """Return a trainer for loaded data, with the state of the run if it is resumed."""
    config = start.shape(data)
    options = start.options.settled(config.channels, sum(map(len, data.train)), config.lora is not None)
    problems = Problems()
    fed = problems.attempt(TrainingData, data, options, config, world)
    problems.attempt(check_length, options.sequence_length, config.context)
    problems.attempt(check_memory, options, config, machine, available_memory() // world.local_size)
    problems.attempt(check_disk, options, config, folder.path)
    problems.report()
    assert fed is not None
    if start.state is not None:
        llmc_state.restore_place(start.state, fed.train)  # before anything compiles
    if start.manifest is None:
        fed.check_counted()
    else:
        fed.check_same(start.manifest["data"], folder.path)
    marks = [contents(part) for part in fed.fingerprints.values()]
    gathered = world.gather_values(marks)
    if odd := [str(rank) for rank, other in enumerate(gathered) if other != gathered[0]]:
        what = f"rank{'s' * (len(odd) > 1)} {', '.join(odd)}: other data than rank 0"
        raise LlmpyError("rank.data-differ", what, "Give all hosts the same files")
    flight = inspect(start, config, options, machine, fed.tokens)
    for line in [*flight.lines(), *world.lines(machine.threads)]:
        journal.log(line)
    with world.each_host_once():
        machine.warm_up(journal.log, kinds=config.kinds)
    model = language_model(config, machine, recompute=options.recompute)
    start.fill(model)
    model.reserve(options.batch_size, options.sequence_length, training=True)
    optimizer = world.optimizer(model, options)
    since = start.done + 1 if folder.resumed else None
    tracked = (options.track or ()) if world.rank == 0 else ()
    trackers = Trackers(tracked, folder.path, options.as_record(), journal.log, since)
    peak = sum(part for (part,) in world.gather(flight.peak))
    flops = flops_per_token(config, options.sequence_length)
    report = Report(journal, trackers, peak, flops, flight.step_seconds, world)
    # Positions beyond the longest T of training are untrained.
    length = max(options.sequence_length, start.source.trained_length if start.source else 0)
    checkpoints = world.checkpoints(folder.path, model, optimizer, length, journal, options)
    trainer = Trainer(model, optimizer, fed, options, checkpoints, report, world)
    if start.checkpoint is not None and start.manifest is not None:
        trainer.resume(start.checkpoint, start.manifest)
    if start.state is not None:
        trainer.take_over(start.state)
    if world.rank == 0:
        if data.tokenizer is not None:
            data.tokenizer.save(folder / TOKENIZER_FILE)
        about = {"model": config.record(), "machine": described(machine), "data": fed.fingerprints}
        now = {
            "step": trainer.done, "weights": weights_hash(model), "llmpy": __version__, "ranks": world.size,
            "options": options.as_record() | {"dtype": str(machine.dtype)},
            "machine": {name: value for name, value in about["machine"].items() if name != "command"},
        }  # fmt: skip
        write_config(folder.path, options, **about, starts=with_start(folder.path, now))
    journal.open(folder.path, None if not folder.resumed else start.manifest["logs"] if start.manifest else {})
    folder.keep()
    journal.log(f"run folder {folder.path}")
    sync_folder(folder.path)
    sync_folder(folder.path.absolute().parent)
    return trainer


def described(machine: Machine) -> dict[str, Any]:
    """Return the machine and the software versions, for the run's config.json."""
    # platform.platform() starts a process, which would briefly keep the lock of a run killed at that moment.
    system = "-".join((platform.system(), platform.release(), platform.machine()))
    return {
        "threads": machine.threads, "isa": machine.isa, "dtype": str(machine.dtype), **machine.version_info(),
        "python": platform.python_version(), "platform": system, "command": sys.argv,
    }  # fmt: skip
