"""What each file of the user's data serves for: training, validation, or nothing, with the reason.

Roles are named by whole words of a file's name, else of the nearest folder below the path that the user gave:
`train`, `val`, `test` and their synonyms. Validation files are held out whole, test files are left out. All other data
are for training, and so is a file given alone, whatever its name.

Documentation, media, settings and scripts next to data are left out and listed; in a folder of source code all text
is data. What may be data but cannot be read is refused, all of it at once. Names and first bytes decide; the rest of a
file is checked when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LlmpyError
from . import magic
from .records import kind_of
from .shards import check_form, is_shard
from .text import Found, Skip, find_files, first_bytes, refuse_all, refuse_sealed, shown

TRAINING, VALIDATION, TEST = "training", "validation", "test data"
ROLES = {
    **dict.fromkeys(("train", "training"), TRAINING),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation", "heldout", "holdout"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
SHARD, TEXT, RECORDS, SCRIPT = "tokens", "text", "records", "scripts and settings"
DATA = (SHARD, TEXT, RECORDS)
OF_SHARDS = ("tokenizer.json", "dataset.json")  # files that `llmpy data` writes next to them
DOCUMENTATION = re.compile(
    r"(?i:readme\b.*|(licen[cs]es?|copying|notice|citation|changelog|contributing|authors|dataset[-_]?card|datasheet)"
    r"(\.(md|txt|rst|cff|html))?)|(LICEN[CS]E|COPYING|NOTICE|CITATION|CHANGELOG)\b.*"
)
MEDIA = re.compile(
    r"(?i).*\.(png|jpe?g|gif|bmp|webp|ico|svg|tiff?|heic|mp3|wav|flac|ogg|m4a|mp4|webm|mov|avi|mkv|woff2?|ttf|otf|eot|"
    r"pyc|so|o|a|dll|dylib|exe|class)"
)
SETTINGS = re.compile(
    r"(?i)(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|config|generation_config|dataset_infos?|"
    r"dataset_dict|state|package|package-lock)\.json|(merges|requirements.*|cmakelists|robots)\.txt|makefile|dockerfile"
)
SCRIPTS = re.compile(
    r"(?i).*\.(pyi?|pyx|ipynb|sh|bash|zsh|fish|ps1|bat|cmd|[mc]?js|tsx?|jsx|s?css|vue|[ch]|cc|[ch]pp|cxx|cuh?|java|kt|"
    r"scala|go|rs|rb|php|p[lm]|lua|r|jl|m|swift|[cf]s|hs|mli?|exs?|erl|clj|lisp|el|vim|sql|cmake|mk|gradle|proto|asm|s|"
    r"json|ya?ml|toml|cfg|ini|conf|lock)"
)


@dataclass(frozen=True)
class Chosen:
    """The files to use; `shards`: all of them are token files. No `val`: a part of `train` is held out."""

    train: list[Found]
    val: list[Found]
    shards: bool


def choose(
    paths: Sequence[Path],
    val: Sequence[Path] | None = None,
    skip: Skip = None,
    log: Callable[[str], None] = print,
) -> Chosen:
    """Return what the files of `paths` and `val` (all the validation data, if given) serve for; log those left out.

    Raises LlmpyError for files that cannot be read, ambiguous names, shards mixed with text, files both to train on and
    to validate on, and if nothing is left to train on.
    """
    found, given = find_files(paths, skip), find_files(val, skip) if val else []
    problems: list[LlmpyError] = []
    kinds = {file: _kind(file, problems) for file in (*found, *given)}
    if SHARD in kinds.values():
        kinds |= {file: "" for file in kinds if file.path.name in OF_SHARDS and not file.named}
    source = _is_source(kinds)
    if source:
        kinds = {file: TEXT if kind == SCRIPT else kind for file, kind in kinds.items()}
    names_count = not source and (len(found) > 1 or not found[0].named) if found else False
    held = {file.real for file in given if kinds[file] in DATA}
    uses = {file: kinds[file] if file.real not in held else VALIDATION for file in given}
    for file in found:
        use = kinds[file]
        if use in DATA:
            use = (names_count and _role(file, problems)) or TRAINING
        if file.real in held and use == TRAINING:
            what = f"{file.path} is both in --data and --val"
            problems.append(LlmpyError("split.overlap", what, "Remove it from one of them"))
        elif file.real not in held:
            uses[file] = "validation data not in --val" if given and use == VALIDATION else use
    refuse_all(problems)
    train, validation = ([file for file, use in uses.items() if use == part] for part in (TRAINING, VALIDATION))
    shards = [file for file in (*train, *validation) if kinds[file] == SHARD]
    for reason in dict.fromkeys(use for use in uses.values() if use not in (TRAINING, VALIDATION, "")):
        log(f"{'left out':<11} {reason}: {shown([file for file, use in uses.items() if use == reason])}")
    text = [file for file in (*train, *validation) if kinds[file] != SHARD]
    if shards and text:
        message = f"both token shards ({shards[0].path}) and text ({text[0].path}) given"
        raise LlmpyError("data.mixed", message, "Give one or the other")
    if not train or (given and not validation):
        listed = shown(list(uses)) or "no files"
        if not train and (validation or TEST in uses.values()):
            hint = "Add training data. A file given alone is trained on, whatever its name"
            raise LlmpyError("split.no-training-data", f"only validation or test data given: {listed}", hint)
        what = f"nothing to {'validate' if train else 'train'} on: {listed}"
        raise LlmpyError("data.empty", what, "Give text. A file that is left out in a folder is used if named itself")
    return Chosen(train, validation, bool(shards))


def _role(file: Found, problems: list[LlmpyError]) -> str | None:
    """Return the role that a file's names say, if any."""
    roles = set[str]()
    for names in file.names:  # several if links lead to the file
        words = (re.findall(r"[^\W\d_]+", name.lower()) for name in reversed(names))
        roles |= next(filter(None, ({ROLES[word] for word in some if word in ROLES} for some in words)), set())
    if len(roles) > 1:
        what = f"{file.path} is named as {' and '.join(sorted(roles))}"
        problems.append(LlmpyError("split.ambiguous", what, "Rename it, or give the validation data with --val"))
    return min(roles, default=None)


def _kind(file: Found, problems: list[LlmpyError]) -> str:
    """Return the kind of a file: one of DATA, SCRIPT, or why it is no data. "": not worth listing."""
    path, name, suffix = file.path, file.path.name, file.path.suffix.lower()
    if not file.named:
        if DOCUMENTATION.fullmatch(name):
            return "documentation"
        if MEDIA.fullmatch(name):
            return "no text"
        if SETTINGS.fullmatch(name):
            return SCRIPT
    try:
        start = first_bytes(path)
        if not start.strip():
            return "empty" if path.stat().st_size == len(start) else TEXT
        number = magic.magic_of(start)
        if is_shard(path):
            return SHARD
        if number in magic.WHAT and not file.named:
            return "" if number == magic.MASK else magic.WHAT[number]
        if kind_of(path, start) and not magic.lfs_pointer(start):
            return RECORDS
        if suffix == ".bin":
            check_form(path)
        refuse_sealed(path, start)
        if suffix == ".parquet":
            what = f"{path} is not parquet: it starts with {start[:24]!r}"
            raise LlmpyError("file.corrupt", what, "Download it again")
    except LlmpyError as error:
        if _role(file, []) == TEST:
            return TEXT  # which is left out
        problems.append(error)
        return ""
    return TEXT if file.named or not SCRIPTS.fullmatch(name) else SCRIPT


def _is_source(kinds: dict[Found, str]) -> bool:
    """Return whether folders hold source code: more of it than of other text. LlmpyError if that is unclear."""
    scripts, prose = ([f for f, kind in kinds.items() if kind == part and not f.named] for part in (SCRIPT, TEXT))
    if {SHARD, RECORDS} & {*kinds.values()} or all(file.path.suffix.lower() == ".json" for file in scripts):
        return False
    sizes = [sum(file.path.stat().st_size for file in files if file.path.is_file()) for files in (scripts, prose)]
    if sizes[0] <= sizes[1]:
        return False
    if plain := [file for file in prose if file.path.suffix.lower() == ".txt"]:
        what = f"both text ({shown(plain)}) and more source code ({shown(scripts)}) given"
        raise LlmpyError("data.mixed", what, "Give patterns of what to train on: 'FOLDER/**/*.txt'")
    return True
