"""llm.c's command line → ours: `train -i x -e d12 -b 4 -z 1` → `train --data x --model d12 --batch-size 4`."""

from __future__ import annotations

from collections.abc import Sequence

# Each letter takes a value. Those of a switch are 0 or 1; those that are no flag are ignored with the hint.
LETTERS = {
    "-i": "--data", "-j": "--data", "-e": "--model", "-y": "--auto-resume", "-b": "--batch-size",
    "-t": "--sequence-length", "-d": "--total-batch", "-x": "--steps", "-k": "--schedule", "-l": "--lr",
    "-u": "--warmup", "-q": "--min-lr", "-c": "--weight-decay", "-sl": "--skip-loss", "-sg": "--skip-norm",
    "-a": "--overfit", "-r": "--recompute", "-v": "--eval-every", "-m": "--eval-batches", "-s": "--sample-every",
    "-g": "--sample-tokens", "-n": "--checkpoint-every", "-nk": "--keep",
    "-nm": "use --keep 0 to keep all checkpoints",
    "-h": "use --hellaswag FILE",
    "-f": "use --dtype",
    "-w": "float32 weights are always kept",
    "-ge": "GELU is always part of the product before it",
    "-lg": "ask llmpy doctor",
    "-z": "ZeRO-1 is on where there are --ranks",
    **dict.fromkeys(("-pn", "-pr", "-pg", "-pm", "-pi", "-ps", "-pp", "-pf"), "use --ranks N, or mpiexec"),
}  # fmt: skip
SWITCHES = ("--auto-resume", "--overfit")


def translated(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of `llmpy train` with our flags for llm.c's letters, and the letters that were ignored."""
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
            ours.append(word)  # without the number it needs: the parser reports it
    return ours, ignored
