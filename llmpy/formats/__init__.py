"""Model files: the name of each format, and the module that reads and writes it.

format    files                                      read and written by
native    model.safetensors, or a run folder         native.py, over run/checkpoint.py
llmc      llm.c's model .bin, versions 3 and 5        llmc.py
llmc-run  a folder of llm.c with DONE_…              llmc_state.py
hf        a folder with config.json, or hub names    huggingface.py, hub.py, model_card.py
peft      an adapter on another model                peft.py
gguf      GGUF of llama.cpp, written only            gguf.py

source.py: a model in any format. detect.py: find the format by content, not by name. convert.py: write.
"""

from .detect import config_of, find, open_model, resolve, tokenizer_of

__all__ = ["config_of", "find", "open_model", "resolve", "tokenizer_of"]
