"""Models in files: what each format is called, and where it is read and written.

format    files                                      read and written by
native    model.safetensors, or a run folder         native.py, over run/checkpoint.py
llmc      llm.c's model .bin, versions 3 and 5        llmc.py
llmc-run  a folder of llm.c with DONE_…              llmc_state.py
hf        a folder with config.json, or hub names    huggingface.py, hub.py
gguf      GGUF of llama.cpp, written only            gguf.py

source.py is a model in any of them; detect.py tells them apart, by contents and not by name; convert.py writes.
"""

from .detect import find, open_model, resolve, tokenizer_of

__all__ = ["find", "open_model", "resolve", "tokenizer_of"]
