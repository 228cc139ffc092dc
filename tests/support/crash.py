"""Runs that are killed, starved or robbed of what they had not synced, each in a forked process. POSIX only.

    python crash.py FOLDER kill|power|full|random FIRST STRIDE   → one JSON object

A shim replaces the operations of `llmpy.system.durable` in the child. It numbers them and acts at the chosen one:

kill    SIGKILL before it, and after it
power   the same, but first everything is lost that was not synced: contents, names, renames
full    it raises ENOSPC, once, and in another run from there on for some operations
random  (no shim) SIGKILL after a random time, again and again until the run is through

After each, the run is resumed until it ends; its files must equal those of a run that nobody disturbed, and no
checkpoint that was complete before may be lost.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from support.laptop import CLOCKED, Laptop

from llmpy.data.shards import write_shard
from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint
from llmpy.run.folder import LOGS
from llmpy.run.parts import part_name
from llmpy.system import durable
from llmpy.train import assemble

STEPS, EVERY = 12, 3
OPERATIONS = ("write", "sync", "sync_folder", "replace", "link", "remove")
COMPARED = ("model.safetensors", part_name(0, 1))
FULL_FOR = 6  # operations in a row that fail, in the second run of "full"


class Shim:
    """Stands before the disk, and acts at operation number `at`."""

    def __init__(self, run: Path, mode: str, at: int, after: bool, report: mmap.mmap) -> None:
        self.run, self.mode, self.at, self.after, self.report = run, mode, at, after, report
        self.count = 0
        self.true = {name: getattr(durable, name) for name in OPERATIONS}
        self.unsynced: set[str] = set()  # files whose contents are not on the disk
        self.unnamed: set[str] = set()  # files and folders whose name is not
        self.renamed: list[tuple[str, str, str | None]] = []  # from, to, and what had that name
        self.sizes: dict[str, int] = {}  # bytes of a file that are on the disk
        self.spare = itertools.count()
        self.one_at_a_time = Lock()  # the checkpoint's thread writes while training keeps the best model
        for name in OPERATIONS:
            setattr(durable, name, self.stand_in(name))

    def stand_in(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            with self.one_at_a_time:
                return one(*arguments)

        def one(*arguments: Any) -> Any:
            self.count += 1
            number = self.count
            self.report[:4] = number.to_bytes(4, "little")
            if self.mode == "full" and number in range(self.at, self.at + (FULL_FOR if self.after else 1)):
                raise OSError(errno.ENOSPC, "No space left on device")
            if number == self.at and self.mode != "full" and not self.after:
                self.die()
            if self.mode == "power":
                self.remember(name, *arguments)
            if name == "link":  # what the run now takes its model from must be complete, and stay so
                self.report[4:8] = int(arguments[0].parent.name[5:]).to_bytes(4, "little")
            result = self.true[name](*arguments)
            if number == self.at and self.mode != "full":
                self.die()
            return result

        return operation

    def remember(self, name: str, *arguments: Any) -> None:
        """What of this operation a loss of power would undo."""
        if name in ("write", "sync"):
            path = os.readlink(f"/proc/self/fd/{arguments[0]}")
            if name == "write":
                self.unsynced.add(path)
                self.unnamed.add(path)
            else:
                self.unsynced.discard(path)
                self.sizes[path] = os.path.getsize(path)
        elif name == "sync_folder":
            folder = str(arguments[0].absolute())
            self.unnamed = {p for p in self.unnamed if os.path.dirname(p) != folder}
            self.renamed = [r for r in self.renamed if os.path.dirname(r[1]) != folder]
        elif name in ("replace", "link"):
            source, target = (str(p.absolute()) for p in arguments)
            if name == "link":
                self.unnamed.add(target)
                return
            saved = None
            if os.path.isfile(target):
                saved = os.path.join(os.environ["CRASH_SPARE"], f"{os.getpid()}-{next(self.spare)}")
                os.link(target, saved)
            self.renamed.append((source, target, saved))
            moved = {p: target + p[len(source) :] for p in self.unsynced | self.unnamed if p.startswith(source)}
            self.unsynced = {moved.get(p, p) for p in self.unsynced}
            self.unnamed = {moved.get(p, p) for p in self.unnamed} - {target}

    def die(self) -> None:
        if self.mode == "power":
            for path in self.unsynced:
                with contextlib.suppress(FileNotFoundError):
                    os.truncate(path, os.path.getsize(path) // 2)
            for path in self.unnamed:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            for source, target, saved in reversed(self.renamed):
                with contextlib.suppress(OSError):
                    os.rename(target, source)
                    if saved is not None:
                        os.rename(saved, target)
            for path in (str((self.run / name).absolute()) for name in LOGS):
                with contextlib.suppress(FileNotFoundError):
                    os.truncate(path, min(self.sizes.get(path, 0), os.path.getsize(path)))
        os.kill(os.getpid(), signal.SIGKILL)


def child(options: TrainOptions, log: Path, shim: Callable[[], object] = lambda: None) -> int:
    """Fork a run; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        shim()
        code = assemble.train(options, Laptop())
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = getattr(error, "exit_code", 71)
    finally:
        os._exit(code if isinstance(code, int) else 72)


def wait(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Campaign:
    """One folder with data, an undisturbed run, and all the disturbed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "output.txt"
        tokens = np.random.default_rng(0).integers(0, 300, 1500)
        for name in ("train_a.bin", "train_b.bin", "val.bin"):
            write_shard(folder / name, tokens)
        (folder / "spare").mkdir()
        os.environ["CRASH_SPARE"] = str(folder / "spare")
        self.report = mmap.mmap(-1, 8)
        self.reference = folder / "reference"
        assert (
            wait(
                child(
                    self.options(self.reference), self.log, lambda: Shim(self.reference, "count", 0, False, self.report)
                )
            )
            == 0
        )
        self.operations = int.from_bytes(self.report[:4], "little")
        self.expected = self.outcome(self.reference)

    def options(self, run: Path) -> TrainOptions:
        begun = (run / "config.json").exists() or (run / "checkpoints").exists()
        if begun:
            return TrainOptions(resume=run)
        data = tuple(sorted(self.folder.glob("*.bin")))
        return TrainOptions(
            data=data, out=run, model="d1", vocab_size=300, batch_size=2, sequence_length=8, total_batch=32,
            steps=STEPS, eval_every=5, eval_batches=1, sample_tokens=2, checkpoint_every=EVERY, lr=1e-2, keep=1,
        )  # fmt: skip

    def outcome(self, run: Path) -> dict[str, Any]:
        """What must be equal."""
        last = run / "checkpoints" / f"step-{STEPS:08}"
        found: dict[str, Any] = {name: (last / name).read_bytes() for name in COMPARED}
        found["model"] = (run / "model.safetensors").read_bytes()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        found["metrics"] = [{k: v for k, v in r.items() if k not in CLOCKED} for r in rows]
        found["main.log"] = (run / "main.log").read_text("utf-8")
        return found

    def finish(self, run: Path, what: str) -> None:
        """Resume; compare. A run that is at its end already does what is left of its ending."""
        code = wait(child(self.options(run), self.log))
        assert code == 0, f"{what}: the resumed run ended with {code}\n{self.log.read_text()[-2000:]}"
        found = self.outcome(run)
        for name, value in self.expected.items():
            assert found[name] == value, f"{what}: {name} differs from that of an undisturbed run"
        shutil.rmtree(run)

    def disturbed(self, mode: str, first: int, stride: int) -> Iterator[str]:
        run = self.folder / "run"
        for at in range(first, self.operations + 1, stride):
            for after in (False, True):
                what = f"{mode} {'after' if after else 'before'} operation {at} of {self.operations}"
                self.report[:8] = bytes(8)
                shim = functools.partial(Shim, run, mode, at, after, self.report)
                code = wait(child(self.options(run), self.log, shim))
                complete = int.from_bytes(self.report[4:8], "little")
                if mode == "full":
                    assert code in (0, 1), f"{what}: {code}\n{self.log.read_text()[-2000:]}"
                else:
                    assert code in (-signal.SIGKILL, 0), f"{what}: {code}\n{self.log.read_text()[-2000:]}"
                self.check_kept(run, complete, what)
                self.finish(run, what)
                yield what

    def check_kept(self, run: Path, complete: int, what: str) -> None:
        """Nothing before the last complete checkpoint is lost."""
        found = checkpoint.newest(run / "checkpoints", lambda _: None) if run.exists() else None
        step = found[1]["step"] if found else 0
        assert step >= complete, f"{what}: step {complete} was complete, {step} is there"

    def random(self, kills: int, seed: int) -> Iterator[str]:
        rng = random.Random(seed)
        start = time.perf_counter()
        assert wait(child(self.options(self.folder / "timed"), self.log)) == 0
        length = time.perf_counter() - start
        run, done = self.folder / "run", 0
        while done < kills:
            pid = child(self.options(run), self.log)
            time.sleep(rng.uniform(0, 1.1 * length))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            assert code in (0, -signal.SIGKILL), f"random kill {done}: {code}\n{self.log.read_text()[-2000:]}"
            done += code != 0
            if code == 0:
                self.finish(run, f"random kill {done}")
            yield f"random kill {done}"
        if run.exists():
            self.finish(run, "the last")


def main() -> None:
    folder, mode, first, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    campaign = Campaign(folder)
    tried = list(campaign.random(first, stride) if mode == "random" else campaign.disturbed(mode, first, stride))
    print(json.dumps({"operations": campaign.operations, "disturbed": len(tried)}))


if __name__ == "__main__":
    main()
