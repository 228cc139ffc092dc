"""What --help shows besides flags: examples and exit codes of each verb, and our words for those of other programs."""

from __future__ import annotations

CODES = "0 done, 1 error, 2 unknown option or missing value, 130 stopped by Ctrl-C"
CODES_OF = {
    "": "0 done, 1 error, 2 usage, 3 NaN in training, 130 stopped by Ctrl-C",
    "train": "0 done, 1 error, 2 unknown option or missing value, 3 training gave NaN or infinity,\n"
    "130 stopped by Ctrl-C (143 by SIGTERM, 129 by SIGHUP): all is saved, resume with --resume RUN",
    "doctor": "0 this machine can train, 1 something prevents that, 2 unknown option or missing value",
    "watch": "0 stopped by Ctrl-C, 1 error, 2 unknown option or missing value",
    "selftest": "0 every check passed, 1 one failed, 2 unknown option or missing value",
}
EXAMPLES = {
    "": """\
  llmpy train                              on built-in text, at most 3.5 minutes
  llmpy train --data my.txt --minutes 10   on your own files or folders
  llmpy train --init gpt2 --data my.txt    fine-tune GPT-2 124M
  llmpy train --resume runs/NAME           resume a run
  llmpy sample runs/NAME --prompt "The"    continue a text""",
    "train": """\
  llmpy train                                            on built-in text
  llmpy train --data my.txt notes/ --minutes 10          on your own
  llmpy train --init gpt2 --data my.txt --steps 200      fine-tune GPT-2
  llmpy train --resume runs/NAME --minutes 30            resume a run, up to 30 minutes in all
  llmpy train --data tokens/ --model gpt2 -B 4 -T 1024 --total-batch 524288""",
    "sample": """\
  llmpy sample runs/NAME --prompt "Once upon a time"
  llmpy sample gpt2 --prompt "The capital of France is" --temperature 0 --tokens 10
  llmpy sample runs/NAME --prompts-file prompts.txt --json""",
    "chat": """\
  llmpy chat runs/NAME                                   Ctrl-C ends an answer, /quit the chat
  llmpy chat runs/NAME --system "Answer in one sentence." --temperature 0.3""",
    "data": """\
  llmpy data tinyshakespeare                             download a data set and make its tokens
  llmpy data my.jsonl.gz notes/ --tokenizer bpe:4096 --out tokens""",
    "convert": """\
  llmpy convert runs/NAME my-gpt2                        a folder for Hugging Face
  llmpy convert runs/NAME model.gguf --dtype bfloat16    for llama.cpp
  llmpy convert gpt2_124M.bin my-run --to native         from llm.c, for sample and --init""",
    "plan": """\
  llmpy plan --model gpt2 -B 4 -T 1024                   on this machine
  llmpy plan --model d3 --vocab-size 1024 -T 128         as on your own text
  llmpy plan --recipe gpt2_124M --nodes 8 --bandwidth 10   llm.c's run on eight machines""",
    "doctor": "  llmpy doctor --json                                    for an issue report",
    "watch": """\
  llmpy watch                                            every run below runs/
  llmpy watch runs/NAME runs/OTHER --open                two runs in the same charts, in the browser""",
    "plot": """\
  llmpy plot runs/NAME runs/OTHER -o loss.svg            for a paper
  llmpy plot runs/NAME runs/OTHER --x tokens             compare runs with different batch sizes
  llmpy plot runs/NAME --terminal --curves loss lr       in the terminal""",
    "selftest": """\
  llmpy selftest                                         against a reference in float64
  llmpy selftest --model gpt2_124M.bin --debug-state gpt2_124M_debug_state.bin""",
    "completion": """\
  eval "$(llmpy completion bash)"                        in ~/.bashrc; zsh: in ~/.zshrc, after compinit""",
    "bench": "  llmpy bench step --help",
    "bench step": "  llmpy bench step --model gpt2 -B 4 -T 64 --dtype float32",
    "bench ops": "  llmpy bench ops --op linear_forward --dtype bfloat16",
    "bench decode": "  llmpy bench decode --model gpt2 --dtype float32 --json",
    "bench peers": "  llmpy bench peers --rounds 2 --steps 6",
}
# What other programs call verbs (""), and options of a verb.
ELSEWHERE = {
    "": {
        "generate": "sample", "finetune": "train --init MODEL", "resume": "train --resume RUN", "prepare": "data",
        "export": "convert", "help": "--help", "version": "--version",
    },
    "train": {
        "--epochs": "--steps N, -1 for one epoch, or --minutes", "--learning-rate": "--lr", "--max-steps": "--steps",
        "--max-iters": "--steps", "--block-size": "--sequence-length", "--seq-len": "--sequence-length",
        "--grad-clip": "--clip", "--gradient-accumulation-steps": "--total-batch TOKENS", "--precision": "--dtype",
        "--eval-interval": "--eval-every", "--eval-iters": "--eval-batches", "--output": "--out",
        "--device": "--threads and --dtype; it trains on the CPU",
    },
    "sample": {"--max-new-tokens": "--tokens", "--num-samples": "--prompt several times"},
    "convert": {"--format": "--to"},
}  # fmt: skip


def epilog(verb: str) -> str:
    """Return what --help of a verb ends with."""
    return f"examples:\n{EXAMPLES[verb]}\n\nexit codes: {CODES_OF.get(verb, CODES)}"
