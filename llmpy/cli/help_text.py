"""Examples that --help of each verb ends with, and exit codes."""

from __future__ import annotations

EPILOGS = {
    "": """\
examples:
  llmpy train                              on built-in text, at most 3.5 minutes
  llmpy train --data my.txt --minutes 10   on your own files or folders
  llmpy train --init gpt2 --data my.txt    fine-tune GPT-2 124M
  llmpy train --resume runs/NAME           resume a run
  llmpy sample runs/NAME --prompt "The"    continue a text

exit codes: 0 done, 1 error, 2 usage, 3 NaN in training, 130 stopped by Ctrl-C""",
    "train": """\
examples:
  llmpy train                                            on built-in text
  llmpy train --data my.txt notes/ --minutes 10          on your own
  llmpy train --init gpt2 --data my.txt --steps 200      fine-tune GPT-2
  llmpy train --resume runs/NAME --minutes 30            resume a run, up to 30 minutes in all
  llmpy train --data tokens/ --model gpt2 -B 4 -T 1024 --total-batch 524288

exit codes: 0 done, 1 error, 2 usage, 3 training gave NaN or infinity, 130 stopped by Ctrl-C (143 by SIGTERM,
129 by SIGHUP): all is saved, resume with --resume RUN""",
    "sample": """\
examples:
  llmpy sample runs/NAME --prompt "Once upon a time"
  llmpy sample gpt2 --prompt "The capital of France is" --temperature 0 --tokens 10
  llmpy sample runs/NAME --prompts-file prompts.txt --json""",
    "chat": """\
example:
  llmpy chat runs/NAME --system "Answer in one sentence." --temperature 0.3""",
    "data": """\
examples:
  llmpy data tinyshakespeare                             download a data set and make its tokens
  llmpy data my.jsonl.gz notes/ --tokenizer bpe:4096 --out tokens""",
    "convert": """\
examples:
  llmpy convert runs/NAME my-gpt2                        a folder for Hugging Face
  llmpy convert runs/NAME model.gguf --dtype bfloat16    for llama.cpp
  llmpy convert gpt2_124M.bin my-run --to native         from llm.c, for sample and --init""",
    "plan": """\
examples:
  llmpy plan --model gpt2 -B 4 -T 1024                   on this machine
  llmpy plan --model d3 --vocab-size 1024 -T 128         as on your own text
  llmpy plan --recipe gpt2_124M --nodes 8 --bandwidth 10   llm.c's run on eight machines""",
    "doctor": "exit codes: 0 this machine can train, 1 something prevents that",
    "watch": """\
examples:
  llmpy watch                                            every run below runs/
  llmpy watch runs/NAME runs/OTHER --open                two runs in the same charts, in the browser""",
    "plot": """\
examples:
  llmpy plot runs/NAME runs/OTHER -o loss.svg            for a paper
  llmpy plot runs/NAME runs/OTHER --x tokens             compare runs with different batch sizes
  llmpy plot runs/NAME --terminal --curves loss lr       in the terminal""",
    "selftest": """\
examples:
  llmpy selftest                                         against a reference in float64
  llmpy selftest --model gpt2_124M.bin --debug-state gpt2_124M_debug_state.bin

exit codes: 0 every check passed, 1 one failed""",
    "completion": """\
example:
  eval "$(llmpy completion bash)"                        in ~/.bashrc; zsh: in ~/.zshrc, after compinit""",
    "bench step": "example:\n  llmpy bench step --model gpt2 -B 4 -T 64 --dtype float32",
    "bench ops": "example:\n  llmpy bench ops --op linear_forward --dtype bfloat16",
}
