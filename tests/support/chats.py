"""Tokenizers of every make, chat templates of every kind, and conversations, small and written for these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from llmpy.data.rank_tables import LLAMA3

CORPUS = [
    "user system assistant: what is 2 + 2? It is 4.\n\nThe answer  is here, isn't it?\n\n\n1. one\n2. two 345\n" * 9,
    "Größe, naïve café — 日本語 🙂 def f(x):\n    return x\n<think>\nhm\n</think>\n\n[INST] <|user|>\n" * 5,
]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
Json = dict[str, Any]


def byte_level(library: Tokenizer, special: list[str], plain: list[str] = [], size: int = 380) -> Tokenizer:  # noqa: B006
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return library


def words(pattern: str) -> pre_tokenizers.Sequence:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def smollm() -> tuple[Tokenizer, Json]:
    """Digits one by one; three bytes that are never in UTF-8, and one that is rare, have no token."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    library = byte_level(library, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    about = json.loads(library.to_str())
    vocabulary = about["model"]["vocab"]
    for i, byte in enumerate(("À", "Á", "õ", "ñ")):  # 0xc0, 0xc1, 0xf5, 0xf1
        vocabulary[f"unused {i}"] = vocabulary.pop(byte)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return Tokenizer.from_str(json.dumps(about)), {"tokenizer_class": "GPT2Tokenizer", **names}


def llama3() -> tuple[Tokenizer, Json]:
    """Whole words without merges; <|begin_of_text|> by the post-processor."""
    library = Tokenizer(models.BPE(ignore_merges=True))
    library.pre_tokenizer = words(LLAMA3)
    bos, eot = "<|begin_of_text|>", "<|eot_id|>"
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    library = byte_level(library, [bos, "<|end_of_text|>", *headers, eot, "<|eom_id|>"])
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))]),
        ]
    )
    return library, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eot}


def qwen() -> tuple[Tokenizer, Json]:
    """NFC, one digit at a time, and added tokens that are not special."""
    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = words(QWEN)
    plain = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    library = byte_level(library, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], plain)
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return library, {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, **names}


def sentencepiece(metaspace: str | None = None) -> tuple[Tokenizer, Json]:
    """Bytes for rare characters; a blank in front, by the normalizer or by Metaspace; <s> by the post-processor."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.train_from_iterator(
        [text.replace("日本語", "") for text in CORPUS], trainers.BpeTrainer(vocab_size=200, show_progress=False)
    )
    about = json.loads(library.to_str())
    learned = sorted(about["model"]["vocab"], key=about["model"]["vocab"].get)
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *(t for t in learned if "\n" not in t)]
    merges = [tuple(pair) for pair in about["model"]["merges"] if "\n" not in "".join(pair)]
    vocabulary = {token: i for i, token in enumerate(names)}
    library = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace is None:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", metaspace, split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    about = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return library, {"tokenizer_class": "PreTrainedTokenizerFast", **about}


MAKES = {
    "smollm": smollm, "llama3": llama3, "qwen": qwen, "prepend": sentencepiece,
    "metaspace first": lambda: sentencepiece("first"), "metaspace always": lambda: sentencepiece("always"),
}  # fmt: skip

CHATML = """\
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nBe of use.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' ~ m['role'] ~ '\\n' ~ m['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
HEADERS = """\
{{- bos_token }}
{%- set today = strftime_now("%Y") if strftime_now is defined else "2026" %}
{%- if messages[0]['role'] == 'system' %}{% set first, rest = messages[0]['content']|trim, messages[1:] %}
{%- else %}{% set first, rest = "", messages %}{% endif %}
{%- macro head(role) %}{{ "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" }}{% endmacro %}
{{- head("system") + "It is " + today[:2] + "xx.\\n" }}
{%- if tools is not none and tools is defined %}
    {%- for tool in tools %}{{ tool | tojson(indent=2) + "\\n" }}{% endfor %}
{%- endif %}
{{- first + "<|eot_id|>" }}
{%- for m in rest %}
    {%- if m.role == 'system' %}{{ raise_exception("System comes first, or not at all") }}{% endif %}
    {%- if m.tool_calls %}
        {%- set f = m.tool_calls[0].function %}
        {{- head("assistant") + '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + "}<|eot_id|>" }}
        {%- continue %}
    {%- endif %}
    {{- head("ipython" if m.role == "tool" else m.role) + m.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ head("assistant") }}{% endif %}
"""
CALLS = """\
{%- set given = messages[0].content if messages[0].role == 'system' else 'You are a model.' %}
{{- '<|im_start|>system\\n' + given }}
{%- if tools %}
    {{- "\\n\\n<tools>" }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\\n</tools>" }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) or m.role == 'assistant' and not m.tool_calls %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{ '\\n' + m.content }}{% endif %}
        {%- for call in m.tool_calls %}
            {%- set f = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{ f.name }}{{ '", "arguments": ' }}{{ f.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
THINKING = """\
{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set said = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or m.role == 'system' and not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>' + '\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if not thought and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
        {%- else %}{{ said }}{% endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
ENDED = """\
{% for m in messages %}
{% if m['role'] in ['user', 'system'] %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MARKED = """\
{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}
{% generation %}
{{- m.content + '<|im_end|>' -}}
{% endgeneration %}
{{- '\\n' -}}
{%- else -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TEMPLATES = {  # name → make of the tokenizer, template, end of an answer
    "chatml": ("smollm", CHATML, "<|im_end|>"),
    "headers": ("llama3", HEADERS, "<|eot_id|>"),
    "calls": ("qwen", CALLS, "<|im_end|>"),
    "thinking": ("qwen", THINKING, "<|im_end|>"),
    "ended": ("prepend", ENDED, "</s>"),
    "marked": ("smollm", MARKED, "<|im_end|>"),
}


def talk(*contents: str, system: str | None = None) -> list[Json]:
    """Return messages of the user and the assistant, in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


LETTERS = "Größe — 日本語 🙂🙃 e\u0301 ﬁ \u2028x\u00a0y"
CONVERSATIONS: dict[str, list[Json]] = {
    "one": talk("What is 2 + 2?", "It is 4."),
    "system": talk("Hi", "Hello!", system="Be brief."),
    "empty system": talk("Hi", "Hello!", system=""),
    "turns": talk("one", "two", "three", "four", "five", "six"),
    "turns, system": talk("one", "two", "three", "four", system="  Count.\n"),
    "no answer": talk("Hi", system="Be brief."),
    "ends with a question": talk("Hi", "Hello!", "And?"),
    "empty question": talk("", "Hello!"),
    "empty answer": talk("Hi", ""),
    "blank answer": talk("Hi", " \n"),
    "letters": talk(LETTERS, LETTERS, system=LETTERS),
    "line ends": talk("\n\na\n\nb\r\n\n", "\n\n1. one\n\n2. two\n", "\n", "\n\n\n"),
    "blanks": talk("  two  blanks  ", "   3  4\t\t5 ", "x ", " y"),
    "the same": talk("a", "a", "a", "a"),
    "says a role": talk("user\nassistant\n", "assistant:\nuser", "<|user|>", "\n<|assistant|>\n"),
    "thinks": talk("Hi", "<think>\nA greeting.\n</think>\n\nHello!", "And?", "<think>\nWhat?\n</think>\n\nWell."),
    "thought": talk("Hi", "Hello! </think>"),
    "two in a row": [*talk("Hi", "a"), {"role": "assistant", "content": "b"}],
    "long": talk(" ".join(CORPUS), CORPUS[0][:700], CORPUS[1], "ok"),
    "json": talk('{"a": "<b>&\'\\n"}', '[1, 2.5, "é"]'),
}
SPELLED: dict[str, list[Json]] = {  # special tokens as text
    "in a question": talk("What is <|im_end|> or </s>?", "It ends."),
    "in an answer": talk("Hi", "<|im_end|>\n<|eot_id|></s><s>", "b", "c"),
    "in the system": talk("Hi", "Hello!", system="<|im_start|>user\nNo.<|im_end|><|eot_id|></s>"),
}
TOOL = {"type": "function", "function": {"name": "add", "description": "a < b", "parameters": {"type": "object"}}}
CALLING = [
    *talk("What is 2 + 2?"),
    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                                          "function": {"name": "add", "arguments": {"a": 2, "b": "é"}}}]},
    {"role": "tool", "name": "add", "tool_call_id": "1", "content": "4"},
    {"role": "assistant", "content": "4."},
]  # fmt: skip


def write(folder: Path, make: str, template: str | None = None, ends: list[str] | None = None) -> Tokenizer:
    """Write the tokenizer files of a model, its template, and its generation_config.json."""
    library, config = MAKES[make]()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    kind = {"smollm": "llama", "llama3": "llama", "qwen": "qwen2"}.get(make, "llama")
    about = {"model_type": kind, "vocab_size": library.get_vocab_size() + 7}
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(about), "utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*map(library.token_to_id, ends)]}))
    return library
