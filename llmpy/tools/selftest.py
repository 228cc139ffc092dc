"""`llmpy selftest`: is what this machine computes right? A table, and an exit code other than 0 if not.

Without files   a small model of our own against the reference in float64: loss, logits, gradients layer by layer,
                AdamW; micro-batches against one batch; save, load and go on, to the bit; threads, to the bit;
                generators, loader, schedules, outlier detector and file layouts against llm.c's numbers
With llm.c's    logits, loss and the 16 gradients of `gpt2_124M_debug_state.bin`, and its ten losses

Relative errors are of whole tensors: ‖got − want‖ / ‖want‖.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import backend
from ..data.loader import Loader
from ..data.shards import Shard
from ..errors import LlmpyError
from ..formats import llmc, llmc_state, native, open_model
from ..formats.source import Source
from ..model.arena import Arena
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2, params_table
from ..model.initialise import initialise
from ..options.tools import SelftestOptions
from ..rng import MT19937, Xorshift64Star
from ..run import checkpoint
from ..train.optimizer import EPSILON, AdamW
from ..train.outliers import WINDOW, OutlierDetector
from ..train.schedule import learning_rate
from . import golden

# No size is a whole number of vectors or tiles.
OWN = ModelConfig(layers=3, heads=3, channels=48, context=40, vocab_size=97)
OWN_BATCH = (4, 33)
OWN_STEPS = 3
THREADS = (1, 2, 3)
# Relative errors. float32: sums of about a hundred products, measured up to 5e-7, 2e-9 and 1.3e-6. bfloat16: every
# number that products read or write is rounded by up to 2⁻⁸, measured up to 0.009, 3e-4 and 0.02.
LOGITS_ERROR = {"float32": 1e-5, "bfloat16": 2e-2}
LOSS_ERROR = {"float32": 1e-6, "bfloat16": 5e-3}
GRADIENT_ERROR = {"float32": 1e-5, "bfloat16": 4e-2}
SAME_ERROR = 1e-5  # of the same sums in another order, in float32 whatever the dtype
FILE_ERROR = 1e-4  # of float32 against float32, over 12 layers; llm.c allows 1e-2 of each logit
# Ten steps apart. Published losses are PyTorch's, which llm.c and its ports miss by up to 1.8e-3; llm.c allows 1e-2.
PUBLISHED_ERROR, LOSSES_ERROR = 3e-3, 1e-4
REFERENCE_AT_MOST = 20_000_000  # parameters that the reference trains in reasonable time
BETAS, DECAY, LR = (0.9, 0.999), 0.01, 1e-4  # of llm.c's ten steps


class Check(NamedTuple):
    """One row: it passes if `error` is at most `bound`; NaN never does."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound

    def row(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.name:<68} {self.error:>9.2g}   at most {self.bound:<8.2g} {verdict}"


class LeftOut(NamedTuple):
    """A row for what is not checked here, and why."""

    name: str
    why: str

    @property
    def passed(self) -> bool:
        return True

    def row(self) -> str:
        return f"{self.name:<68} not checked: {self.why}"


def selftest(options: SelftestOptions, say: Callable[[str], None]) -> int:
    """Run every check and print a row for each as it is done; returns 0 if all pass, else 1.

    Raises LlmpyError for files that cannot be read, or one of them without the other.
    """
    if options.debug_state and not options.model:
        raise LlmpyError("--debug-state without --model", "give the model that it was made of, too")
    checks = [from_files(options), golden_checks()] if options.model else [golden_checks(), own_model(options)]
    failed = count = left_out = 0
    for check in (check for group in checks for check in group):
        say(check.row())
        left_out += isinstance(check, LeftOut)
        count += isinstance(check, Check)
        failed += not check.passed
    say(
        f"{count} checks, {f'{failed} FAILED' if failed else 'all passed'}"
        + (f"; {left_out} not made" if left_out else "")
    )
    return 1 if failed else 0


# A model of our own


def own_model(options: SelftestOptions) -> Iterator[Check]:
    """The CPU backend in float32, and in bfloat16 where it is what `--dtype auto` takes, against the reference."""
    auto = backend.load("cpu", threads=options.threads, dtype="auto")
    dtypes = ("float32", "bfloat16") if auto.dtype != auto.wide else ("float32",)
    tokens, targets = _batch(OWN, *OWN_BATCH)
    want = _filled(OWN, backend.load("reference"))
    want_loss = want.loss_and_grads(tokens, targets)
    want_logits = all_logits(want, tokens)
    for dtype in dtypes:
        model = _filled(OWN, _machine(options, dtype))
        yield Check(f"{dtype}: logits", _error(all_logits(model, tokens), want_logits), LOGITS_ERROR[dtype])
        loss = model.loss_and_grads(tokens, targets)
        yield Check(f"{dtype}: loss", abs(loss - want_loss) / want_loss, LOSS_ERROR[dtype])
        yield from _gradients(dtype, model, want)
        yield from _micro_batches(dtype, model, tokens, targets)
        yield from _guarded(f"{dtype}: AdamW", _updates(dtype, model, tokens, targets))
        yield from _threads(dtype, tokens, targets)
        yield from _guarded(f"{dtype}: save, load and go on", _resume(dtype, options))


def _guarded(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """The same checks; a refusal of the program's own, of a gradient that is not finite, is a row that fails."""
    try:
        yield from checks
    except LlmpyError as fault:
        yield Check(f"{name}: {fault}", math.nan, 0)


def _gradients(dtype: str, model: GPT2, want: GPT2) -> Iterator[Check]:
    """Row by row what backward leaves in each layer, the worst tensor named."""
    assert model.grads is not None
    assert want.grads is not None
    groups: dict[str, list[tuple[float, str]]] = {}
    for (tensor, got), (_, expected) in zip(model.grads.items(), want.grads.items(), strict=True):
        host = model.ops.to_host(got)
        if tensor.name.startswith(("wte", "wpe", "ln_f")):
            groups.setdefault("embeddings and last LayerNorm", []).append((_error(host, expected), tensor.name))
        else:
            for l in range(len(host)):
                groups.setdefault(f"layer {l}", []).append((_error(host[l], expected[l]), tensor.name))
    for where, errors in sorted(groups.items()):
        worst, name = max(errors, key=lambda e: (math.isnan(e[0]), e[0]))
        yield Check(f"{dtype}: gradients, {where} (worst: {name})", worst, GRADIENT_ERROR[dtype])


def _micro_batches(dtype: str, model: GPT2, tokens: np.ndarray, targets: np.ndarray) -> Iterator[Check]:
    """The rows one at a time, accumulated, against all at once."""
    assert model.grads is not None
    model.loss_and_grads(tokens, targets)
    whole = np.array(model.ops.to_host(model.grads.buffer))
    for i in range(len(tokens)):
        one = slice(i, i + 1)
        model.loss_and_grads(tokens[one], targets[one], accumulate=i > 0, micro_steps=len(tokens))
    error = _error(model.ops.to_host(model.grads.buffer), whole)
    yield Check(f"{dtype}: {len(tokens)} micro-batches against one batch", error, SAME_ERROR)


def _updates(dtype: str, model: GPT2, tokens: np.ndarray, targets: np.ndarray) -> Iterator[Check]:
    """AdamW with clipping and decay, from the same gradients as the reference's."""
    assert model.grads is not None
    model.loss_and_grads(tokens, targets)
    twin = _filled(OWN, backend.load("reference"))
    twin.reserve(len(tokens), tokens.shape[1], training=True)
    assert twin.grads is not None
    twin.grads.buffer[...] = model.ops.to_host(model.grads.buffer)
    optimizers = [AdamW(m, clip=0.5) for m in (model, twin)]
    before = np.array(twin.params.buffer)
    norms = []
    for _ in range(OWN_STEPS):
        norms = [o.step(1e-2) for o in optimizers]
    moved = model.ops.to_host(model.params.buffer) - before
    yield Check(f"{dtype}: norm of all gradients", abs(norms[0] - norms[1]) / norms[1], 1e-6)
    # a parameter is rounded to float32 once an update: 2⁻²⁴ of it, against a step of 1e-2
    yield Check(f"{dtype}: AdamW, {OWN_STEPS} updates", _error(moved, twin.params.buffer - before), SAME_ERROR)


def _threads(dtype: str, tokens: np.ndarray, targets: np.ndarray) -> Iterator[Check]:
    """Loss and gradients at several numbers of threads: bits that differ."""
    results = []
    for threads in THREADS:
        model = _filled(OWN, backend.load("cpu", threads=threads, dtype=dtype))
        loss = model.loss_and_grads(tokens, targets)
        assert model.grads is not None
        results.append(np.append(np.array(model.ops.to_host(model.grads.buffer)), np.float32(loss)))
    differing = sum(_different(r, results[0]) for r in results[1:])
    yield Check(f"{dtype}: values that differ with {', '.join(map(str, THREADS))} threads", differing, 0)


def _resume(dtype: str, options: SelftestOptions) -> Iterator[Check]:
    """Train, save as llm.c does, load into new objects, go on: values that differ from never stopping."""
    text = np.random.default_rng(3).integers(0, OWN.vocab_size, 3000).astype(np.uint16)
    shard = Shard(Path("selftest"), text)

    def begin() -> tuple[GPT2, AdamW, Loader]:
        model = _filled(OWN, _machine(options, dtype))
        model.reserve(*OWN_BATCH, training=True)
        return model, AdamW(model), Loader([shard], *OWN_BATCH, shuffle=True)

    def go(model: GPT2, optimizer: AdamW, loader: Loader) -> np.ndarray:
        losses = []
        for _ in range(OWN_STEPS):
            losses.append(model.loss_and_grads(*loader.next()))
            optimizer.step(1e-3)
        return np.append(np.array(model.ops.to_host(model.params.buffer)), np.array(losses, np.float32))

    first = begin()
    go(*first)
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder, "model.safetensors")
        checkpoint.save(ours, first[0], OWN_BATCH[1])
        params = np.array(first[0].ops.to_host(first[0].params.buffer))
        state = llmc_state.capture(first[1], first[2], params)
        llmc_state.write_checkpoint(Path(folder), native.read_model(ours), state)
        on = go(*first)
        (Path(folder) / "model.safetensors").unlink()
        source, state = llmc_state.read_checkpoint(Path(folder))
        second = begin()
        source.fill(second[0].params)
        second[0].store_weights()
        llmc_state.restore(state, *second[1:])
        yield Check(f"{dtype}: values that differ after save, load and go on", _different(go(*second), on), 0)


# llm.c's files


def from_files(options: SelftestOptions) -> Iterator[Check | LeftOut]:
    """A model of any format and llm.c's debug state of it, in float32."""
    assert options.model is not None
    source = open_model(options.model)
    if options.debug_state is None:
        raise LlmpyError(
            "--model without --debug-state: there is nothing to compare with",
            "give the file gpt2_124M_debug_state.bin that llm.c made of the same model",
        )
    debug = llmc.read_debug(options.debug_state, source.config)
    B, T = debug.tokens.shape
    model = GPT2(source.config, _machine(options, "float32"))
    source.fill(model.params)
    model.store_weights()
    yield Check("logits", _error(all_logits(model, debug.tokens), debug.logits), FILE_ERROR)
    model.reserve(B, T, training=True)
    loss = model.loss_and_grads(debug.tokens, debug.targets)
    yield Check("loss", abs(loss - debug.loss) / abs(debug.loss), FILE_ERROR)
    assert model.grads is not None
    for name in llmc.ORDER:
        got = model.ops.to_host(getattr(model.grads, name))
        yield Check(f"gradient of {name}", _error(got, debug.gradient(name)), FILE_ERROR)
    want, bound = _ten_losses(source, debug)
    if not want:
        why = f"the reference would take too long for more than {REFERENCE_AT_MOST:,} parameters"
        yield LeftOut(f"losses of {len(golden.LOSSES)} steps", why)
    for step, (expected, got) in enumerate(zip(want, _train(model, debug), strict=False)):
        yield Check(f"loss of step {step}: {got:.6f}, expected {expected:.6f}", abs(got - expected), bound)


def _ten_losses(source: Source, debug: llmc.DebugState) -> tuple[tuple[float, ...], float]:
    """What ten steps on this batch must give, and how closely: published for GPT-2 124M, else by the reference.

    Nothing for a model that is too large for the reference.
    """
    config = source.config
    if config == ModelConfig.from_dial("gpt2") and abs(debug.loss - golden.LOSSES[0]) < PUBLISHED_ERROR:
        return golden.LOSSES, PUBLISHED_ERROR
    if sum(t.size for t in params_table(config)) > REFERENCE_AT_MOST:
        return (), LOSSES_ERROR
    twin = GPT2(config, backend.load("reference"))
    source.fill(twin.params)
    return tuple(_train(twin, debug)), LOSSES_ERROR


def _train(model: GPT2, debug: llmc.DebugState) -> Iterator[float]:
    """The losses of ten steps as llm.c's test makes them: decay on every tensor, no clipping."""
    ops = model.ops
    B, T = debug.tokens.shape
    model.reserve(B, T, training=True)
    assert model.grads is not None
    m, v = (ops.zeros(model.params.size, ops.wide) for _ in range(2))
    for step in range(1, 1 + len(golden.LOSSES)):
        yield model.loss_and_grads(debug.tokens, debug.targets)
        ops.adamw(model.params.buffer, model.grads.buffer, m, v, LR, *BETAS, EPSILON, DECAY, 1.0, step)
        model.store_weights()


# llm.c's numbers


def golden_checks() -> Iterator[Check]:
    """Generators, loader, schedules, outlier detector, initialisation and layouts of files."""
    rng = MT19937(42)
    yield Check("MT19937: words", _mismatches(rng.uint32(len(golden.WORDS)), golden.WORDS), 0)
    # a unit in the last place: NumPy's vector log and cos are not glibc's
    for (n, std), values in golden.NORMAL.items():
        yield Check(f"MT19937: {n} normal numbers", _largest(MT19937(42).normal(n, 0.0, std), values), 3e-7)
    order = np.arange(len(golden.PERMUTATION))
    MT19937(42).permutation(order)
    yield Check("MT19937: permutation", _mismatches(order, golden.PERMUTATION), 0)
    coin = Xorshift64Star(1337)
    yield Check("xorshift64*: coins", _largest([coin.uniform() for _ in golden.COINS], golden.COINS), 1e-8)
    yield Check("xorshift64*: state", float(coin.state != golden.COINS_STATE), 0)
    yield from _golden_loader()
    for kind, rates in golden.RATES.items():
        got = [learning_rate(step, 100, 10, 6e-4, 0.1, kind) for step in golden.RATE_STEPS]
        yield Check(f"schedule: {kind}", _largest(got, rates), 1e-6)  # llm.c computes in float32
    detector = OutlierDetector()
    scores = [detector.update(x) for x in [float(i % 7) for i in range(WINDOW + 2)] + [100.0]]
    early = sum(not math.isnan(z) for z in scores[:WINDOW])
    yield Check("outlier detector: z-scores", early + _largest(scores[WINDOW:], golden.Z_SCORES), 1e-10)
    yield from _golden_init("d6")
    yield from _golden_layout()


def _golden_loader() -> Iterator[Check]:
    """Epochs of one shard, and batches of four shards by one rank and by two."""
    places = np.zeros(305_260, np.uint16)
    places[::256] = np.arange(places[::256].size)  # each sample's first token is its number
    wrong = 0
    for (seed, rank, epoch), samples in golden.SAMPLES.items():
        loader = Loader([Shard(Path("golden"), places)], 4, 64, shuffle=True, seed=seed - rank, rank=rank)
        order = [int(loader.next()[0][0, 0]) for _ in range((epoch + 1) * 1192)][epoch * 1192 :]
        wrong += _mismatches(order[: len(samples)], samples)
        wrong += (seed, epoch) == (42, 0) and order[-1] != golden.LAST_SAMPLE
    yield Check("loader: samples over epochs", wrong, 0)
    shards = [Shard(Path("golden"), (np.arange(140) + 140 * i).astype(np.uint16)) for i in range(4)]
    for (rank, ranks), tokens in golden.FIRST_TOKENS.items():
        loader = Loader(shards, 2, 8, shuffle=True, rank=rank, ranks=ranks)
        got = [int(loader.next()[0][0, 0]) for _ in tokens]
        yield Check(f"loader: shards, rank {rank} of {ranks}", _mismatches(got, tokens), 0)


def _golden_init(dial: str) -> Iterator[Check]:
    """Parameters from scratch: first values, sum, and sum of squares of each matrix."""
    config = ModelConfig.from_dial(dial)
    params = Arena(params_table(config), np.empty, np.float32)
    initialise(params, config)
    errors = []
    for name, (*first, total, squares) in golden.INIT[dial].items():
        flat = getattr(params, name).reshape(-1)
        # a sum cancels: its error is counted against the root of the squares, a hundredth of it
        off = abs(flat.sum(dtype=np.float64) - total) / (10 * math.sqrt(squares))
        square = abs(float(np.square(flat, dtype=np.float64).sum()) - squares) / squares
        errors += [_largest(flat[:3], first), off, square]
    yield Check(f"initialisation: {dial}", float(np.max(errors)), 1e-6)  # unlike max: NaN if any is


def _golden_layout() -> Iterator[Check]:
    """Where the tensors of GPT-2 124M lie in llm.c's files, and how long those are."""
    config = ModelConfig.from_dial("gpt2")
    for version, size in golden.MODEL_BYTES.items():
        layout = llmc.layout(config, config.padded_vocab_size, version)
        wrong = abs(layout[llmc.ORDER[-1]].end - size)
        if version == 3:
            wrong += _mismatches([layout[name].offset for name in llmc.ORDER], golden.MODEL_OFFSETS)
        yield Check(f"model .bin version {version}: layout of 124M", wrong, 0)
    parameters = sum(t.size for t in params_table(config))
    yield Check("state .bin: size of 124M", abs(1024 + 12 * parameters - golden.STATE_BYTES), 0)
    yield Check("state .bin: the generator's 2520 bytes", abs(llmc_state.TWISTER.itemsize - 2520), 0)


# Helpers


def _machine(options: SelftestOptions, dtype: str) -> Any:
    """The CPU backend, its kernels compiled."""
    ops: Any = backend.load("cpu", threads=options.threads, dtype=dtype)
    ops.warm_up(lambda line: print(line, file=sys.stderr, flush=True))
    return ops


def all_logits(model: GPT2, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of every position."""
    B, T = tokens.shape
    a = model.forward(tokens, model.reserve(B, T, training=False))
    out = model.ops.empty((B * T, model.config.padded_vocab_size), model.ops.dtype)
    model.ops.linear_forward(out, a.ln_f, model.weights.wte, None)
    host: np.ndarray = model.ops.to_host(out)[:, : model.config.vocab_size].astype(model.ops.wide)
    return host.reshape(B, T, -1)


def _filled(config: ModelConfig, ops: Any) -> GPT2:
    """A model whose every term counts: matrices ten times GPT-2's, no bias of 0, no LayerNorm weight of 1."""
    model = GPT2(config, ops)
    rng = np.random.default_rng(1)
    for tensor, view in model.params.items():
        mean, std = float(tensor.init == "ones"), 0.2 if tensor.decay else 0.1
        view[...] = rng.normal(mean, std, tensor.shape).astype(np.float32)
    model.params.wte[config.vocab_size :] = 0
    model.store_weights()
    return model


def _batch(config: ModelConfig, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    text = np.random.default_rng(2).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)
    return np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """‖got − want‖ / ‖want‖."""
    difference = np.asarray(got, np.float64) - want
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(want, np.float64)))


def _largest(got: Any, want: Any) -> float:
    """The largest relative error of any value."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def _mismatches(got: Any, want: Any) -> int:
    """How many whole numbers differ."""
    return int(np.count_nonzero(np.asarray(got, np.int64) != np.asarray(want, np.int64)))


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """How many float32 values differ in any bit."""
    return int(np.count_nonzero(a.astype(np.float32).view(np.uint32) != b.astype(np.float32).view(np.uint32)))
