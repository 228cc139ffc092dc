"""What each file of the user's data serves for: training, validation, or nothing, with the reason.

Whole words name a role (`train`, `val`, `test` …): of the file's name, else of the nearest folder below the given path.
A file given alone is for training, whatever its name. Documentation, media, settings and scripts next to data are left
out and listed; in a folder of source code all text is data. What may be data but cannot be read is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from .magic import MASK, WHAT, lfs_pointer, magic_of
from .records import NotText, kind_of, read_records
from .shards import form_of, is_shard
from .text import Found, Skip, find_files, first_bytes, refuse_all, refuse_sealed, shown

TRAINING, VALIDATION, TEST = "training", "validation", "test data"
WORDS = {
    TRAINING: ("train", "training", "trn"),
    VALIDATION: ("val", "valid", "validate", "validation", "dev", "eval", "evals", "evaluation", "heldout", "holdout"),
    TEST: ("test", "tests", "testing", "tst"),
}
ROLES = {word + end: role for role, words in WORDS.items() for word in words for end in ("", "set", "data")}
WORD = re.compile(r"(?i:held|hold)[-_ ]?out|[A-Z]+(?![a-z])|[^\W\d_][^\W\d_A-Z]*")  # valData are two words
LANGUAGES = {".cs", ".el", ".mk", ".ml", ".pl", ".so", ".ts"}  # of train.cs, in Czech
LONG = 500  # characters of a text that is no setting
SHARD, TEXT, RECORDS, SCRIPT = "tokens", "text", "records", "scripts and settings"
NO_DATA = {
    "documentation": re.compile(
        r"(?i:readme\b.*|(licen[cs]es?|copying|notice|citation|changelog|contributing|authors|dataset[-_]?card)"
        r"(\.(md|txt|rst|cff|html))?)|(LICEN[CS]E|COPYING|NOTICE|CITATION|CHANGELOG)\b.*"
    ),
    "no text": re.compile(
        r"(?i)thumbs\.db|~\$.*|.*\.(png|jpe?g|gif|bmp|webp|ico|svg|tiff?|heic|avif|psd|mp3|wav|flac|ogg|opus|aac|amr|"
        r"wma|midi?|m4[av]|mp4|3gp|webm|mov|avi|mkv|woff2?|ttf|otf|eot|pyc|so|o|a|dll|dylib|exe|class)"
    ),
    SCRIPT: re.compile(
        r"(?i)(.*tokenizer.*|special_tokens_map|added_tokens|vocab|.*config|dataset_(infos?|dict)|state|package.*)\.json|"
        r"(merges|requirements.*|cmakelists|robots)\.txt|makefile|dockerfile|.*\.(pyi?|pyx|ipynb|sh|bash|zsh|ps1|bat|cmd|"
        r"[mc]?js|tsx?|jsx|s?css|vue|[ch]|cc|[ch]pp|cxx|cuh?|java|kt|scala|go|rs|rb|php|p[lm]|lua|r|jl|m|swift|[cf]s|hs|"
        r"mli?|exs?|erl|clj|lisp|el|vim|sql|cmake|mk|gradle|proto|asm|s|ya?ml|toml|cfg|ini|conf|lock)"
    ),
}


@dataclass(frozen=True)
class Chosen:
    """The files to use; `shards`: all of them are token files. No `val`: a part of `train` is held out."""

    train: list[Found]
    val: list[Found]
    shards: bool


def choose(
    paths: Sequence[Path], val: Sequence[Path] | None = None, skip: Skip = None, log: Callable[[str], None] = print
) -> Chosen:
    """Return what the files of `paths` and `val` (all the validation data, if given) serve for; log those left out.

    Raises LlmpyError for files that cannot be read, ambiguous names, shards mixed with text, files both to train on and
    to validate on, and if nothing is left to train on.
    """
    problems: list[LlmpyError] = []
    found, given = find_files(paths, skip), find_files(val or (), skip)
    kinds = {file: _kind(file, problems) for file in (*given, *found)}
    if SHARD in kinds.values():  # `llmpy data` writes these next to them
        kinds |= {f: "" for f in kinds if f.path.name in ("tokenizer.json", "dataset.json") and not f.named}
    if source := _is_source(kinds):
        kinds |= {f: TEXT for f, kind in kinds.items() if kind == SCRIPT and f.path.suffix.lower() != ".json"}
    uses = {file: VALIDATION if kinds[file] in (SHARD, TEXT, RECORDS) else kinds[file] for file in given}
    held = {file.real for file, use in uses.items() if use == VALIDATION}
    for file in found:
        use = kinds[file]
        if use in (SHARD, TEXT, RECORDS):
            alone = source or (file.named and len(found) == 1)
            use = (not alone and _role(file, problems)) or TRAINING
        if file.real in held and use == TRAINING:
            what = f"{file.path} is both in --data and --val"
            problems.append(LlmpyError("split.overlap", what, "Remove it from one of them"))
        elif file.real not in held:
            uses[file] = "validation data not in --val" if given and use == VALIDATION else use
    refuse_all(problems)
    for reason in dict.fromkeys(use for use in uses.values() if use not in (TRAINING, VALIDATION, "")):
        log(f"left out    {reason}: {shown([file for file, use in uses.items() if use == reason])}")
    train, validation = ([file for file, use in uses.items() if use == part] for part in (TRAINING, VALIDATION))
    shards, text = ([f for f in train + validation if (kinds[f] == SHARD) == part] for part in (True, False))
    if shards and text:
        message = f"both token shards ({shards[0].path}) and text ({text[0].path}) given"
        raise LlmpyError("data.mixed", message, "Give one or the other")
    if not train and (validation or TEST in uses.values()):
        hint = "Add training data. A file given alone is trained on, whatever its name"
        raise LlmpyError("split.no-training-data", f"only validation or test data given: {shown([*uses])}", hint)
    if not train or (given and not validation):
        what = f"nothing to {'validate' if train else 'train'} on: {shown([*uses]) or 'no files'}"
        raise LlmpyError("data.empty", what, "Give text. A file that was left out of a folder is used if you name it")
    return Chosen(train, validation, bool(shards))


def _role(file: Found, problems: list[LlmpyError]) -> str | None:
    """Return the role that a file's names say, if any."""
    roles = set[str]()
    for names in file.names:  # several if links lead to the file
        words = ([re.sub("[-_ ]", "", word).lower() for word in WORD.findall(name)] for name in reversed(names))
        roles |= next(filter(None, ({ROLES[word] for word in some if word in ROLES} for some in words)), set())
    if len(roles) > 1:
        what = f"{file.path} is named as {' and '.join(sorted(roles))}"
        problems.append(LlmpyError("split.ambiguous", what, "Rename it, or give the validation data with --val"))
    return min(roles, default=None)


def _kind(file: Found, problems: list[LlmpyError]) -> str:
    """Return SHARD, TEXT, RECORDS, or why a file is no data ("": not worth listing)."""
    path, suffix = file.path, file.path.suffix.lower()
    by_name = next((why for why, names in NO_DATA.items() if names.fullmatch(path.name) and not file.named), None)
    if by_name and suffix != ".json" and not (suffix in LANGUAGES and _role(file, [])):
        return by_name
    try:
        start = first_bytes(path)
        opening = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if by_name and suffix == ".json" and opening != b"[":  # an array holds records
            return by_name
        if path.stat().st_size == len(start) and not start.strip():
            if _role(file, []) in (TRAINING, VALIDATION):
                raise LlmpyError("data.empty", f"{path} is empty", "Restore it, or remove it")
            return "empty"
        if is_shard(path):
            return SHARD
        if magic_of(start) in WHAT and not file.named:
            return WHAT[magic_of(start)] if magic_of(start) != MASK else ""
        if (kind := kind_of(path, start)) and not lfs_pointer(start):
            if suffix == ".json" and not file.named and opening == b"{":  # it may hold settings
                next(read_records(path, kind), None)
            return RECORDS
        if suffix == ".bin":
            form_of(path)
        refuse_sealed(path, start)
        if suffix == ".parquet":
            raise LlmpyError(
                "file.corrupt", f"{path} is not parquet: it starts with {start[:24]!r}", "Download it again"
            )
    except LlmpyError as error:
        if error.code == "record.unsupported":  # a chat template may support it; else reported when it is read
            return RECORDS
        if isinstance(error, NotText) and not _role(file, []) and _is_settings(path):
            return SCRIPT
        if _role(file, []) != TEST:  # those are left out
            problems.append(error)
            return ""
    return SCRIPT if suffix == ".json" and not file.named else TEXT


def _is_settings(path: Path) -> bool:
    """Return whether a .json file holds one small object without long texts and tables of objects."""

    def is_data(value: Any, level: int = 0) -> bool:
        if isinstance(value, str):
            return len(value) > LONG
        rows = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        table = len(rows) > 1 and all(isinstance(row, dict) for row in rows)
        return table and (level < 2 or isinstance(value, list)) or any(is_data(row, level + 1) for row in rows)

    try:
        about = json.loads(path.read_text("utf-8-sig")) if path.stat().st_size < 1 << 20 else None
        return isinstance(about, dict) and not is_data(about)
    except (ValueError, RecursionError):
        return False


def _is_source(kinds: dict[Found, str]) -> bool:
    """Return whether folders hold source code: more of it than of other text. LlmpyError if that is unclear."""
    if {SHARD, RECORDS} & {*kinds.values()}:
        return False
    scripts, prose = ([f for f, kind in kinds.items() if kind == part and not f.named] for part in (SCRIPT, TEXT))
    sizes = [sum(f.path.stat().st_size for f in files if f.path.is_file()) for files in (scripts, prose)]
    if sizes[0] <= sizes[1] or all(file.path.suffix.lower() == ".json" for file in scripts):
        return False
    if plain := [file for file in prose if file.path.suffix.lower() == ".txt"]:
        what = f"both text ({shown(plain)}) and more source code ({shown(scripts)}) given"
        raise LlmpyError("data.mixed", what, "Give patterns of what to train on: 'FOLDER/**/*.txt'")
    return True
