"""`llmpy selftest`: check the kernels of this machine for correctness. Print a table; exit with 1 if a check fails.

Without files       a small GPT-2, a Llama and its adapters against the reference in float64: loss, logits, gradients by
                    layer; bitwise: number of threads, decoding against the whole text; of the GPT-2 also AdamW,
                    micro-batches against one batch, resume
With llm.c's files  logits, loss and the 16 gradients of a debug state; for `gpt2_124M_debug_state.bin` also ten losses

Errors are relative, over whole tensors: ‖got − want‖ / ‖want‖.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import backend
from ..backend.machine import KINDS
from ..data.loader import Loader
from ..data.shards import Shard
from ..errors import LlmpyError
from ..formats import llmc, open_model
from ..formats.source import clear_padding
from ..generate.kv_cache import Decoder
from ..model.arena import Arena
from ..model.config import LlamaConfig, ModelConfig
from ..model.families import language_model, with_adapters
from ..model.language_model import LanguageModel
from ..options.tools import SelftestOptions
from ..run import checkpoint
from ..run.checkpoint_writer import CheckpointWriter
from ..run.folder import CHECKPOINTS
from ..run.journal import Journal
from ..system.terminal import aside
from ..train.optimizer import EPSILON, AdamW
from ..train.single_process import SINGLE_PROCESS

# No size is a multiple of a vector or tile.
OWN = ModelConfig(layers=3, heads=3, channels=48, context=40, vocab_size=97)
# All that differs between Llama, Qwen2 and Qwen3 at once: groups of heads, another width, norms, biases, own head.
LLAMA = LlamaConfig(
    layers=2, heads=4, channels=44, context=40, vocab_size=97, kv_heads=2, head_size=10, ffn=70, tied=False,
    qkv_bias=True, qk_norm=True,
)  # fmt: skip
MODELS = {"": OWN, "Llama: ": LLAMA, "LoRA: ": with_adapters(LLAMA, rank=3, alpha=1.5)}
OWN_BATCH = (4, 33)
PROMPT = 20  # tokens of the first row before decoding
OWN_STEPS = 3
THREADS = (1, 2, 3)
# Bounds of relative errors. float32: sums of about 100 products; measured up to 5e-7, 2e-9 and 1.3e-6. bfloat16:
# operands and results of products are rounded by up to 2⁻⁸; measured up to 0.009, 3e-4 and 0.02.
LOGITS_ERROR = {"float32": 1e-5, "bfloat16": 2e-2}
LOSS_ERROR = {"float32": 1e-6, "bfloat16": 5e-3}
GRADIENT_ERROR = {"float32": 1e-5, "bfloat16": 4e-2}
SAME_ERROR = 1e-5  # the same sums in another order, always in float32
FILE_ERROR = 1e-4  # float32 against float32, over 12 layers; llm.c allows 1e-2 per logit
BETAS, DECAY, LR = (0.9, 0.999), 0.01, 1e-4  # of llm.c's ten steps, which decay every tensor
# GPT-2 124M on the batch of gpt2_124M_debug_state.bin: PyTorch's losses from llm.c's tests, which allow errors of 1e-2;
# llm.c and its ports have errors of up to 1.8e-3.
GPT2_124M = ModelConfig.from_dial("gpt2")
LOSSES_ERROR = 3e-3
LOSSES = (
    5.270007133, 4.059706688, 3.375123024, 2.800782681, 2.315382242, 1.849028587, 1.394656420, 0.999146521,
    0.624080420, 0.376510978,
)  # fmt: skip


class Check(NamedTuple):
    """One row: it passes if `error` is at most `bound`; NaN fails."""

    name: str
    error: float
    bound: float


def selftest(options: SelftestOptions, log: Callable[[str], None]) -> int:
    """Run every check and log a row for each; return 0 if all pass, else 1. Raises LlmpyError for unusable files."""
    if (options.model is None) != (options.debug_state is None):
        given, missing = ("--model", "--debug-state") if options.model else ("--debug-state", "--model")
        raise LlmpyError("option.missing", f"{given} without {missing}", "Pass a model and llm.c's debug state of it")
    passed = []
    for check in from_files(options) if options.model else own_model(options):
        passed.append(check.error <= check.bound)
        verdict = "ok" if passed[-1] else "FAILED"
        log(f"{check.name:<68} {check.error:>9.2g}   at most {check.bound:<8.2g} {verdict}")
    failed = passed.count(False)
    log(f"{len(passed)} checks, {f'{failed} FAILED' if failed else 'all passed'}")
    return 1 if failed else 0


def own_model(options: SelftestOptions) -> Iterator[Check]:
    """Check the CPU backend against the reference in float32, and in bfloat16 if `--dtype auto` selects it."""
    auto = backend.load("cpu", threads=options.threads, dtype="auto")
    dtypes = ("float32", "bfloat16") if auto.dtype != auto.wide else ("float32",)
    text = np.random.default_rng(2).integers(0, OWN.vocab_size, (OWN_BATCH[0], OWN_BATCH[1] + 1), dtype=np.int32)
    tokens, targets = np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])
    for dtype in dtypes:
        for name, config in MODELS.items():
            yield from _computed(f"{dtype}: {name}", dtype, config, options, tokens, targets)
        model = _filled(_machine(options, dtype))
        model.loss_and_grads(tokens, targets)
        whole = np.array(model.ops.to_host(_grads(model).buffer))
        for i in range(len(tokens)):
            model.loss_and_grads(tokens[i : i + 1], targets[i : i + 1], accumulate=i > 0, micro_steps=len(tokens))
        error = _error(model.ops.to_host(_grads(model).buffer), whole)
        yield Check(f"{dtype}: {len(tokens)} micro-batches against one batch", error, SAME_ERROR)
        try:
            yield from _resume(dtype, options)
        except LlmpyError as error:  # the checkpoint has NaN or infinity
            yield Check(f"{dtype}: save, load and resume: {error}", math.inf, 0)
        try:
            yield from _updates(dtype, model, tokens, targets)
        except LlmpyError as error:  # a gradient is NaN or infinity
            yield Check(f"{dtype}: AdamW: {error}", math.nan, 0)


def _computed(
    label: str, dtype: str, config: ModelConfig, options: SelftestOptions, tokens: np.ndarray, targets: np.ndarray
) -> Iterator[Check]:
    """Check logits, loss and gradients of a model, with several numbers of threads, and decoding."""
    want, model = _filled(backend.load("reference"), config), _filled(_machine(options, dtype), config)
    want_loss, logits = want.loss_and_grads(tokens, targets), model.logits(tokens, None)
    yield Check(f"{label}logits", _error(logits, want.logits(tokens, None)), LOGITS_ERROR[dtype])
    loss = model.loss_and_grads(tokens, targets)
    yield Check(f"{label}loss", abs(loss - want_loss) / want_loss, LOSS_ERROR[dtype])
    yield from _gradients(label, dtype, model, want)
    results = []
    for threads in THREADS:
        twin = _filled(backend.load("cpu", threads=threads, dtype=dtype), config)
        loss = twin.loss_and_grads(tokens, targets)
        results.append(np.append(twin.ops.to_host(_grads(twin).buffer), np.float32(loss)))
    differing = sum(_different(r, results[0]) for r in results[1:])
    yield Check(f"{label}values that differ with {', '.join(map(str, THREADS))} threads", differing, 0)
    row, decoder = tokens[0].tolist(), Decoder(model, 1, tokens.shape[1])
    decoded = [decoder.prefill(0, row[:PROMPT]), *(decoder.decode([0], [token])[0] for token in row[PROMPT:])]
    exact = model.ops.name == "cpu"  # NumPy's sums depend on shapes
    error = _error(np.array(decoded), logits[0, PROMPT - 1 :])
    yield Check(f"{label}decoding against the whole text", error, 0 if exact else LOGITS_ERROR[dtype])


def _gradients(label: str, dtype: str, model: LanguageModel, want: LanguageModel) -> Iterator[Check]:
    """Check the gradients by layer; each row names its worst tensor."""
    groups = defaultdict(list)
    for (tensor, got), (_, expected) in zip(_grads(model).items(), _grads(want).items(), strict=True):
        host = model.ops.to_host(got)
        if not tensor.per_layer:
            groups["embeddings and last norm"].append((_error(host, expected), tensor.name))
        else:
            for l in range(len(host)):
                groups[f"layer {l}"].append((_error(host[l], expected[l]), tensor.name))
    for where, errors in sorted(groups.items()):
        worst, name = max(errors, key=lambda e: (math.isnan(e[0]), e[0]))
        bound = GRADIENT_ERROR[dtype] * (1 if model.adapters is None else 2)  # two more rounded products
        yield Check(f"{label}gradients, {where} (worst: {name})", worst, bound)


def _updates(dtype: str, model: LanguageModel, tokens: np.ndarray, targets: np.ndarray) -> Iterator[Check]:
    """Check AdamW with clipping and decay, from the same gradients as the reference."""
    model.loss_and_grads(tokens, targets)
    twin = _filled(backend.load("reference"))
    twin.reserve(len(tokens), tokens.shape[1], training=True)
    _grads(twin).buffer[...] = model.ops.to_host(_grads(model).buffer)
    optimizers = [AdamW(m, clip=0.5) for m in (model, twin)]
    before = np.array(twin.params.buffer)
    for _ in range(OWN_STEPS):
        norms = [o.step(1e-2) for o in optimizers]
    moved = model.ops.to_host(model.params.buffer) - before
    yield Check(f"{dtype}: norm of all gradients", abs(norms[0] - norms[1]) / norms[1], 1e-6)
    # each update rounds a parameter to float32: by 2⁻²⁴ of it, against a step of 1e-2
    yield Check(f"{dtype}: AdamW, {OWN_STEPS} updates", _error(moved, twin.params.buffer - before), SAME_ERROR)


def _resume(dtype: str, options: SelftestOptions) -> Iterator[Check]:
    """Train, save, load into new objects and resume; compare bitwise with an uninterrupted run."""
    shard = Shard(Path("selftest"), np.random.default_rng(3).integers(0, OWN.vocab_size, 3000).astype(np.uint16))

    def start() -> tuple[LanguageModel, AdamW, Loader]:
        model = _filled(_machine(options, dtype))
        model.reserve(*OWN_BATCH, training=True)
        return model, AdamW(model), Loader([shard], *OWN_BATCH, shuffle=True)

    def train(model: LanguageModel, optimizer: AdamW, loader: Loader) -> np.ndarray:
        losses = []
        for _ in range(OWN_STEPS):
            losses.append(model.loss_and_grads(*loader.next()))
            optimizer.update(1e-3, optimizer.norm())
        return np.append(model.ops.to_host(model.params.buffer), np.array(losses, np.float32))

    def writer(folder: str, model: LanguageModel, optimizer: AdamW) -> CheckpointWriter:
        return CheckpointWriter(SINGLE_PROCESS, Path(folder), model, optimizer, OWN_BATCH[1], Journal(), 0, 1)

    first, second = start(), start()
    train(*first)
    with tempfile.TemporaryDirectory() as folder:
        writer(folder, *first[:2]).finish(OWN_STEPS, {"data": {}}, first[2].position)
        uninterrupted = train(*first)
        path = checkpoint.listed(Path(folder, CHECKPOINTS))[0]
        second[2].position = writer(folder, *second[:2]).restore(path, checkpoint.verify(path), 0)
        second[1].updates = OWN_STEPS
        differing = _different(train(*second), uninterrupted)
        yield Check(f"{dtype}: values that differ after save, load and resume", differing, 0)


def from_files(options: SelftestOptions) -> Iterator[Check]:
    """Check a model of any format against llm.c's debug state of it, in float32."""
    assert options.model is not None and options.debug_state is not None
    source = open_model(options.model)
    debug = llmc.read_debug(options.debug_state, source.config)
    model = language_model(source.config, _machine(options, "float32"))
    source.fill(model.params)
    model.store_weights()
    yield Check("logits", _error(model.logits(debug.tokens, None), debug.logits), FILE_ERROR)
    loss = model.loss_and_grads(debug.tokens, debug.targets)
    yield Check("loss", abs(loss - debug.loss) / abs(debug.loss), FILE_ERROR)
    for name in llmc.ORDER:
        got = model.ops.to_host(getattr(_grads(model), name))
        yield Check(f"gradient of {name}", _error(got, debug.gradient(name)), FILE_ERROR)
    if source.config == GPT2_124M and abs(debug.loss - LOSSES[0]) < LOSSES_ERROR:
        for step, (want, got) in enumerate(zip(LOSSES, _train(model, debug), strict=True)):
            yield Check(f"loss of step {step}: {got:.6f}, expected {want:.6f}", abs(got - want), LOSSES_ERROR)


def _train(model: LanguageModel, debug: llmc.DebugState) -> Iterator[float]:
    """Yield the losses of ten steps as in llm.c's test: decay of every tensor, no clipping."""
    ops = model.ops
    m, v = (ops.zeros(model.params.size, ops.wide) for _ in range(2))
    for step in range(1, 1 + len(LOSSES)):
        yield model.loss_and_grads(debug.tokens, debug.targets)
        ops.adamw(model.params.buffer, _grads(model).buffer, m, v, LR, *BETAS, EPSILON, DECAY, 1.0, step)
        model.store_weights()


def _machine(options: SelftestOptions, dtype: str) -> Any:
    """Return the CPU backend with compiled kernels."""
    ops: Any = backend.load("cpu", threads=options.threads, dtype=dtype)
    ops.warm_up(aside, None, KINDS)
    return ops


def _grads(model: LanguageModel) -> Arena:
    assert model.grads is not None
    return model.grads


def _filled(ops: Any, config: ModelConfig = OWN) -> LanguageModel:
    """Return a model in which every term counts: matrices ten times GPT-2's, no bias 0, no weight of a norm 1."""
    model = language_model(config, ops)
    rng = np.random.default_rng(1)
    for arena in dict.fromkeys((model.params, model.trained)):
        for tensor, view in arena.items():
            mean, std = float(tensor.init == "ones"), 0.2 if tensor.decay else 0.1
            view[...] = rng.normal(mean, std, tensor.shape).astype(np.float32)
    clear_padding(model.params, config.vocab_size)
    model.store_weights()
    return model


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Return ‖got − want‖ / ‖want‖."""
    exact = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of float32 values that differ in any bit."""
    return int(np.count_nonzero(a.astype(np.float32).view(np.uint32) != b.astype(np.float32).view(np.uint32)))
