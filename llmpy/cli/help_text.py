"""Examples and exit codes that end the --help of each verb, at most 80 columns wide."""

from __future__ import annotations

EPILOGS = {
    "": """\
examples:
  llmpy train                              on built-in text, at most 3.5 minutes
  llmpy train --data my.txt --minutes 10   on your own files or folders
  llmpy train --init gpt2 --data my.txt    fine-tune GPT-2 124M
  llmpy train --resume runs/NAME           resume a run
  llmpy sample runs/NAME --prompt "The"    continue a prompt

exit codes: 0 done, 1 error, 2 usage, 3 NaN in training, 130 stopped by Ctrl-C""",
    "train": """\
examples:
  llmpy train                                      on built-in text
  llmpy train --data my.txt notes/ --minutes 10    on your own text
  llmpy train --init gpt2 --data my.txt            fine-tune GPT-2 124M
  llmpy train --init HuggingFaceTB/SmolLM2-135M --lora 16 --data my.jsonl
  llmpy train --resume runs/NAME --minutes 30      to 30 minutes in total
  llmpy train --data tokens/ --model gpt2 -B 4 -T 1024 --total-batch 524288

exit codes: 0 done, 1 error, 2 usage, 3 NaN or infinity in training
stopped by: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; the run is saved, see --resume""",
    "sample": """\
examples:
  llmpy sample runs/NAME --prompt "Once upon a time"
  llmpy sample gpt2 --prompt "The capital of France is" --temperature 0
  llmpy sample runs/NAME --prompts-file prompts.txt --json""",
    "chat": """\
example:
  llmpy chat runs/NAME --system "Answer in one sentence." --temperature 0.3""",
    "serve": """\
examples:
  llmpy serve runs/NAME
  llmpy serve runs/NAME --name my-model --texts 16 --length 1024
  LLMPY_API_KEY=... llmpy serve runs/NAME --host 0.0.0.0

stopped by: Ctrl-C or SIGTERM; texts in progress get --grace seconds to end""",
    "watch": """\
examples:
  llmpy watch                                every run in runs/
  llmpy watch runs/NAME runs/OTHER --open    two runs in the same charts""",
    "plot": """\
examples:
  llmpy plot runs/NAME runs/OTHER -o loss.svg          for a paper
  llmpy plot runs/NAME runs/OTHER --x tokens           for unequal batch sizes
  llmpy plot runs/NAME --terminal --curves loss lr     in the terminal""",
    "report": """\
examples:
  llmpy report runs/NAME                               runs/NAME/report.md
  llmpy report runs/NAME -o d3.md                      d3.md and d3.svg""",
    "data": """\
examples:
  llmpy data tinyshakespeare                           download and tokenize
  llmpy data my.jsonl.gz notes/ --tokenizer bpe:4096 --out tokens""",
    "convert": """\
examples:
  llmpy convert runs/NAME my-gpt2                      to Hugging Face
  llmpy convert runs/NAME model.gguf --dtype bfloat16  to llama.cpp
  llmpy convert gpt2_124M.bin my-run --to native       from llm.c""",
    "plan": """\
examples:
  llmpy plan --model gpt2 -B 4 -T 1024                 on this machine
  llmpy plan --model d3 --vocab-size 1024 -T 128       a model for your own text
  llmpy plan --recipe gpt2_124M --nodes 8 --bandwidth 10""",
    "doctor": "exit codes: 0 this machine can train, 1 an error prevents training",
    "selftest": """\
examples:
  llmpy selftest                                       a small built-in model
  llmpy selftest --model gpt2_124M.bin --debug-state gpt2_124M_debug_state.bin

exit codes: 0 every check passed, 1 a check failed""",
    "warmup": """\
example, as root for all users, who need the variable too:
  export LLMPY_CACHE_DIR=/opt/llmpy
  llmpy warmup""",
    "completion": """\
example, in ~/.bashrc (zsh: in ~/.zshrc, after compinit):
  eval "$(llmpy completion bash)\"""",
    "bench step": "example:\n  llmpy bench step --model gpt2 -B 4 -T 64 --dtype float32",
    "bench ops": "example:\n  llmpy bench ops --op linear_forward --dtype bfloat16",
    "bench peers": """\
examples:
  llmpy bench peers --model gpt2 -B 4 -T 1024 --rounds 1 --steps 2
  llmpy bench peers --model d3 --vocab-size 512 -B 4 -T 128 --json d3.json
  llmpy bench peers --decoding -B 1 -T 512 --steps 64""",
}
