"""Tokenizer files of Hugging Face, read as `transformers` (AutoTokenizer) reads their folder.

    tokenizer.json, or vocab.json and merges.txt        vocabulary, merges; a tokenizer.json also has the words
    tokenizer_config.json, or special_tokens_map.json   class, special tokens, added tokens, chat template
    added_tokens.json, config.json of the model         more added tokens; the class and eos_token_id if not named
    chat_template.jinja, generation_config.json         chat template; more tokens that end a text

A tokenizer.json has the words that its model was trained with, whatever its class: transformers 4 and llama.cpp use
them. transformers 5 gives GPT2Tokenizer, LlamaTokenizer and Qwen2Tokenizer the words of their class instead. A GPT-2
for which these differ is refused, since both may be meant. Source: transformers 5.24, `tokenization_utils_base.py` and
`tokenization_utils_tokenizers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .rank_tables import EOT

if TYPE_CHECKING:
    import tokenizers

WHOLE, CONFIG, UNREADABLE = "tokenizer.json", "tokenizer_config.json", ("tokenizer.model", "spiece.model", "vocab.txt")
TEMPLATE, ENDS = "chat_template.jinja", "generation_config.json"
SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json", TEMPLATE, ENDS)
FAST = "PreTrainedTokenizerFast"
GPT2 = "GPT2"  # classes without "Tokenizer" and "Fast"
CLASSES = ("", GPT2, "PreTrained", "TokenizersBackend", "PythonBackend", "Llama", "Qwen2", "GPTNeoX")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Names of the token between texts; the first that exists counts if no eos_token is named. Llama 3 has one for the start
# and one for the end of a text: like llm.c, we put the former before each document.
END_OF_TEXT = (EOT, "<|begin_of_text|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<EOS_TOKEN>")
NAMES = "llmpy"  # key in the model of a tokenizer.json of ours: role → special token, and the fields of `Chat`


class Chat(NamedTuple):
    """What a folder has for chats: a template, and all special tokens that end a text."""

    chat_template: str | None = None
    stop_tokens: Sequence[str] = ()


def find(folder: Path) -> Path | None:
    """Return the tokenizer file of a folder that llmpy can read, or None."""
    return next((folder / name for name in (WHOLE, "vocab.json") if (folder / name).is_file()), None)


def read(path: Path, data: bytes) -> tuple[tokenizers.Tokenizer, dict[str, str], Chat]:
    """Return a tokenizer.json, or vocab.json with its merges.txt, role → special token (eos_token …), and `Chat`.

    A file of another name is read alone. Raises ValueError or an error of the library if anything is invalid.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    about = _object(path.name, data)
    whole = "model" in about
    folder = None if whole and path.name != WHOLE else path.parent
    config, model = _sibling(folder, CONFIG), _sibling(folder, "config.json")
    named = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
    kind = named.removesuffix("Fast").removesuffix("Tokenizer")
    kind = kind or GPT2 * (not whole or model.get("model_type") == "gpt2")
    words, odd = (about.get("pre_tokenizer") or {}) if whole else {}, False
    if config.get("split_special_tokens"):
        raise ValueError(f"split_special_tokens in {CONFIG} is not supported")
    wrong = "" if kind in CLASSES else f"tokenizer_class {named} is not supported"
    if whole:
        library = Tokenizer.from_str(data.decode("utf-8-sig"))
        odd = bool(words.get("type") != "ByteLevel" or words.get("use_regex") is False or about.get("normalizer"))
        if kind == GPT2 and (odd or about["model"].get("ignore_merges")):
            wrong = "transformers 4 and 5 read it differently: its words are not those of its class, GPT2Tokenizer"
            wrong *= model.get("model_type") in (None, "gpt2")
        if wrong:
            raise ValueError(f'{wrong}. If the file is complete, set "tokenizer_class": "{FAST}" in {CONFIG}')
    else:
        merges = path.with_name(path.name.replace("vocab", "merges")).with_suffix(".txt")
        if kind != GPT2 or not merges.is_file():
            raise ValueError(f"tokenizer_class {named} is not supported" * (kind != GPT2) or f"{merges} is missing")
        library = Tokenizer(models.BPE.from_file(str(path), str(merges)))
        library.decoder = decoders.ByteLevel()
    prefix = bool(config.get("add_prefix_space"))
    if kind == GPT2 and not odd and words.get("add_prefix_space") != prefix:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    names = _add(library, folder, kind, config, model)
    kept = about["model"].get(NAMES, {}) if whole else {}
    chat = _chat(library, folder, config, model, Chat(*map(kept.pop, Chat._fields, Chat())))
    names = names or kept
    if not whole:  # else the file counts, and add_bos_token does not
        bos, eos = (names.get(role) if config.get(f"add_{role}") else None for role in ROLES[:2])
        ends = [(token, library.token_to_id(token)) for token in {bos, eos} if token]
        single = [x for x in (bos, "$A", eos) if x]
        library.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return library, names, chat


def _chat(
    library: tokenizers.Tokenizer, folder: Path | None, config: dict[str, Any], model: dict[str, Any], kept: Chat
) -> Chat:
    """Return what the folder has for chats, else what is `kept`. Of several templates, the default counts."""
    path = _there(folder, TEMPLATE)
    template = path.read_text("utf-8") if path else config.get("chat_template")
    if isinstance(template, list):
        template = next((one.get("template", 0) for one in template if one.get("name") == "default"), None)
    template = kept.chat_template if template is None else template
    ids = _sibling(folder, ENDS).get("eos_token_id", model.get("eos_token_id"))
    ends = {library.id_to_token(i) for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and i >= 0}
    stops = [token for token in sorted(_added(library)) if token in ends] or kept.stop_tokens
    if not isinstance(template, str | None) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"the chat template, or {NAMES} in the model, is not text")
    return Chat(template, stops)


def _add(
    library: tokenizers.Tokenizer, folder: Path | None, kind: str, config: dict[str, Any], model: dict[str, Any]
) -> dict[str, str]:
    """Add the folder's tokens to the library's in the order of transformers; return role → special token."""
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        config = config | _sibling(folder, "special_tokens_map.json")
    extra = [config.get(key) or [] for key in ("extra_special_tokens", "additional_special_tokens")]
    more = [t for tokens in extra for t in (tokens.values() if isinstance(tokens, dict) else tokens)]
    roles = [*ROLES, *(key for key in config if key.endswith("_token") and key not in ROLES)]
    special = {role: config[role] for role in roles if isinstance(config.get(role), str | dict)}
    if decoder is None:
        texts = {_token(t).content for t in [*special.values(), *more]}
        added = _sibling(folder, "added_tokens.json")
        decoder = {i: {"content": t, "special": t in texts, "normalized": t not in texts} for t, i in added.items()}
    if not all(str(i).isdecimal() for i in decoder):
        raise ValueError("added_tokens.json, or added_tokens_decoder, has an id that is not a number")
    for i, token in sorted((int(i), _token(t)) for i, t in decoder.items()):
        library.add_tokens([token])
        if (found := library.token_to_id(token.content)) != i:
            raise ValueError(f"{token.content!r} has id {i} as an added token, {found} in the vocabulary")
    padding = {"pad_token": library.padding["pad_token"]} if library.padding else {}
    usual = dict.fromkeys(ROLES[:3], EOT) if kind == GPT2 else padding
    for role in usual.keys() - config.keys():  # not outside the model
        if library.token_to_id(usual[role]) is not None or library.get_vocab_size() < model.get("vocab_size", 1 << 31):
            special[role] = usual[role]
    for token in [*(special[role] for role in roles if role in special), *more]:
        if _token(token).content not in _added(library):
            library.add_tokens([_token(token, special=True)])
    names = {role: _token(special[role]).content for role in ROLES if role in special}
    eos = model.get("eos_token_id")
    end = library.id_to_token(eos) if type(eos) is int and eos >= 0 else None
    # GPT-2's default id may be a word here
    return {"eos_token": end} | names if end in {*END_OF_TEXT, *_added(library)} else names


def _token(token: str | dict[str, Any], **more: Any) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, **more)
    return AddedToken(token["content"], **{key: token[key] for key in FLAGS if key in token} | more)


def _added(library: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in library.get_added_tokens_decoder().values()}


def _sibling(folder: Path | None, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of the folder; {} if it is missing."""
    path = _there(folder, name)
    return _object(name, path.read_bytes()) if path else {}


def _there(folder: Path | None, name: str) -> Path | None:
    """Return a file of the folder, None if it is missing. Raises ValueError for a link to nothing."""
    path = None if folder is None else folder / name
    if path is not None and path.is_symlink() and not path.exists():
        raise ValueError(f"{name} is a link to nothing")
    return path if path is not None and path.is_file() else None


def _object(name: str, data: bytes) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises ValueError."""
    try:
        about = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data.lower():  # half a surrogate pair is no text
            json.dumps(about, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        wrong = f"column {error.colno:,} of line {error.lineno:,}" if isinstance(error, json.JSONDecodeError) else ""
        known = {RecursionError: "it is nested too deeply", json.JSONDecodeError: f"{wrong} is wrong"}
        why = known.get(type(error), "it is not UTF-8" if isinstance(error, UnicodeError) else "a number is too long")
        raise ValueError(f"{name} is not JSON: {why}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{name} does not hold an object")
    return about
