"""llm.c's command line → ours: `train -i x -e d12 -b 4 -z 1` → `train --data x --model d12 --batch-size 4`."""

from __future__ import annotations

from collections.abc import Sequence

# Each letter takes a value; switches take 0 or 1. Letters without a flag are ignored with their hint.
LETTERS = {
    "-i": "--data", "-j": "--val", "-e": "--model", "-y": "--auto-resume", "-b": "--batch-size",
    "-t": "--sequence-length", "-d": "--total-batch", "-x": "--steps", "-k": "--schedule", "-l": "--lr",
    "-u": "--warmup", "-q": "--min-lr", "-c": "--weight-decay", "-sl": "--skip-loss", "-sg": "--skip-norm",
    "-a": "--overfit", "-r": "--recompute", "-v": "--eval-every", "-m": "--eval-batches", "-s": "--sample-every",
    "-g": "--sample-tokens", "-n": "--checkpoint-every", "-nk": "--keep",
    "-nm": "use --keep 0 to keep all checkpoints",
    "-h": "use --hellaswag FILE",
    "-f": "use --dtype",
    "-w": "float32 master weights are always kept",
    "-ge": "GELU is always fused into the product before it",
    "-lg": "use llmpy doctor",
    "-z": "ZeRO-1 is always on with --ranks",
    **dict.fromkeys(("-pn", "-pr", "-pg", "-pm", "-pi", "-ps", "-pp", "-pf"), "use --ranks N, or mpiexec"),
}  # fmt: skip
SWITCHES = ("--auto-resume", "--overfit")


def translated(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of `llmpy train` with llm.c's letters replaced by our flags, and the ignored letters."""
    ours, ignored, rest = list[str](), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        flag, value = LETTERS.get(word, word), rest[0] if rest else ""
        if word not in LETTERS or (flag.startswith("--") and flag not in SWITCHES):
            ours.append(flag)
        elif flag in SWITCHES and value in ("0", "1"):
            ours += [flag] * int(rest.pop(0))
        elif flag not in SWITCHES and value.lstrip("-").isdigit():
            ignored.append(word)
            rest.pop(0)
        else:
            ours.append(word)  # its value is missing or invalid: the parser reports it
    return ours, ignored
