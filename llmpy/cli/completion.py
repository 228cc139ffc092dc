"""`llmpy completion bash|zsh|fish`: what the Tab key knows, generated from the parsers.

After a verb come its flags, after a flag its values: one of its choices, a size of a model, a file, or the name of a
data set or model that does as well. Nothing is run when Tab is pressed; the script is made anew when llm.py is.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..model.config import LADDER, NAMES
from ..options.fields import options_of

PROGRAM = "llmpy"
FILES = {"PATH", "RUN", "FILE", "FILE.yaml", "FILE.png", "DIR", "MODEL", "IN", "OUT", "WHAT", "PYTHON"}  # metavars
SIZES = (*NAMES, *(f"d{depth}" for depth in range(1, max(LADDER) + 1)))  # no gpt3:c768: in bash a colon ends a word


@dataclass(frozen=True)
class Flag:
    """A flag: its spellings, what it does, the words that may follow, whether files may, whether it takes a value."""

    names: tuple[str, ...]
    text: str
    words: tuple[str, ...] = ()
    files: bool = False
    value: bool = False


@dataclass(frozen=True)
class Verb:
    """A verb, of one word or two: what it does, its flags, the words that may stand after it, and whether files may."""

    words: tuple[str, ...]
    text: str
    flags: tuple[Flag, ...]
    operands: tuple[str, ...] = ()
    files: bool = True

    @property
    def name(self) -> str:
        """As it is typed."""
        return " ".join(self.words)


def verbs(parser: argparse.ArgumentParser, before: tuple[str, ...] = (), text: str = "") -> Iterator[Verb]:
    """The parser's verb and all below it, as they are declared."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    kind = parser.get_default("options")
    names = {f.name: f.metadata["names"] for f in options_of(kind)} if kind else {}
    flags = tuple(_flag(a, names.get(a.dest, ())) for a in parser._actions if a.option_strings)
    words = [a for a in parser._actions if not a.option_strings]
    operands = tuple(word for a in words for word in a.choices or names.get(a.dest, ()))
    yield Verb(before, text, flags, operands, files=not any(a.choices for a in words))
    for action in below:
        told = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, child in action.choices.items():
            yield from verbs(child, (*before, name), told.get(name, ""))


def _flag(action: argparse.Action, known: tuple[str, ...]) -> Flag:
    """`known`: names that do, alone or as well as files."""
    names, text = tuple(action.option_strings), (action.help or "").replace("%%", "%")
    if action.help == argparse.SUPPRESS:
        text = ""
    if action.nargs == 0:
        return Flag(names, text)
    if action.choices is not None:
        return Flag(names, text, words=tuple(map(str, action.choices)), value=True)
    if action.dest == "model" and action.metavar == "TEXT":
        return Flag(names, text, words=SIZES, value=True)
    return Flag(names, text, words=known, files=action.metavar in FILES, value=True)


def bash(all_verbs: list[Verb]) -> str:
    """For bash 3.2 and newer."""
    values, flags = [], []
    for verb in all_verbs:
        for flag in verb.flags:
            if flag.value:
                patterns = "|".join(f'"{verb.name} {name}"' for name in flag.names)
                then = [f'_llmpy_words "{" ".join(flag.words)}"'] * bool(flag.words) + ["_llmpy_files"] * flag.files
                values.append(f"    {patterns}) {'; '.join(then) or ':'}; return ;;")
        names = " ".join(name for flag in verb.flags for name in flag.names)
        flags.append(f'    "{verb.name}") flags="{names}" operands="{" ".join(verb.operands)}" files={verb.files:d} ;;')
    two = "|".join(sorted({verb.words[0] for verb in all_verbs if len(verb.words) == 2}))
    return f"""# bash completion of {PROGRAM}
_llmpy_words() {{ COMPREPLY=($(compgen -W "$1" -- "$cur")); }}
_llmpy_files() {{
  local IFS=$'\\n'
  type compopt > /dev/null 2>&1 && compopt -o filenames
  COMPREPLY+=($(compgen -f -- "$cur"))
}}
_llmpy() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" verb="" flags="" operands="" files=1
  COMPREPLY=()
  [ "$COMP_CWORD" -gt 1 ] && verb="${{COMP_WORDS[1]}}"
  case "$verb" in
    {two}) [ "$COMP_CWORD" -gt 2 ] && verb="$verb ${{COMP_WORDS[2]}}" ;;
  esac
  case "$verb $prev" in
{chr(10).join(values)}
  esac
  case "$verb" in
{chr(10).join(flags)}
  esac
  case "$cur" in
    -*) _llmpy_words "$flags" ;;
    *) _llmpy_words "$operands"; [ "$files" = 0 ] || _llmpy_files ;;
  esac
}}
complete -F _llmpy {PROGRAM}
"""


def zsh(all_verbs: list[Verb]) -> str:
    """For zsh, sourced after compinit, or as a file _llmpy in its $fpath."""

    def described(word: str, text: str) -> str:
        return shlex.quote(word.replace(":", "\\:") + ":" + text)

    def argument(name: str, flag: Flag) -> str:
        text = flag.text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
        then = ""
        if flag.value:
            words = " ".join(word.replace(":", "\\:") for word in flag.words)
            then = f": :{files(flag.words)}" if flag.files else f": :({words})" if words else ": : "
        return shlex.quote(f"*{name}[{text}]{then}")

    def files(names: tuple[str, ...]) -> str:
        # The blank in front: its arguments are handed on as they are.
        return f" _llmpy_files {' '.join(names)}" if names else "_files"

    cases = []
    for verb in all_verbs:
        if not verb.files:
            children = [v for v in all_verbs if v.words[:-1] == verb.words and v.words]
            words = [described(v.words[-1], v.text) for v in children] or [described(w, "") for w in verb.operands]
            lines = f"local -a words_here=({' '.join(words)}); _describe word words_here"
        else:
            given = [argument(name, flag) for flag in verb.flags for name in flag.names]
            lines = f"_arguments -s {' '.join(given)} '*: :{files(verb.operands)}'"
        cases.append(f"    {shlex.quote(verb.name)}) {lines} ;;")
    two = "|".join(sorted({verb.words[0] for verb in all_verbs if len(verb.words) == 2}))
    return f"""#compdef {PROGRAM}
_llmpy_files() {{ _alternative "names:name:($*)" "files:file:_files" }}
_llmpy() {{
  local verb=''
  (( CURRENT > 2 )) && {{ verb=$words[2]; shift words; (( CURRENT-- )) }}
  case $verb in
    {two}) (( CURRENT > 2 )) && {{ verb="$verb $words[2]"; shift words; (( CURRENT-- )) }} ;;
  esac
  case $verb in
{chr(10).join(cases)}
  esac
}}
if [ "$funcstack[1]" = _llmpy ]; then _llmpy "$@"; else compdef _llmpy {PROGRAM}; fi
"""


def fish(all_verbs: list[Verb]) -> str:
    """For fish."""
    lines = [f"# fish completion of {PROGRAM}", f"complete -c {PROGRAM} -f"]

    def condition(words: tuple[str, ...]) -> str:
        return "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words) or "__fish_use_subcommand"

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    for verb in all_verbs:
        when = f"-n '{condition(verb.words)}'"
        children = [v for v in all_verbs if v.words and v.words[:-1] == verb.words]
        if children and verb.words:
            others = " ".join(v.words[-1] for v in children)
            when_child = f"-n '{condition(verb.words)}; and not __fish_seen_subcommand_from {others}'"
        else:
            when_child = when
        for child in children:
            lines.append(f"complete -c {PROGRAM} {when_child} -a {child.words[-1]} -d {quoted(child.text)}")
        for word in verb.operands if not children else ():
            lines.append(f"complete -c {PROGRAM} {when} -a {word}")
        if verb.files:
            lines.append(f"complete -c {PROGRAM} {when} -F")
        for flag in verb.flags:
            names = " ".join(f"{_fish_kind(name)} {name.lstrip('-')}" for name in flag.names)
            takes = ("-r -F" if flag.files else "-x") + f" -a {quoted(' '.join(flag.words))}" * bool(flag.words)
            line = f"complete -c {PROGRAM} {when} {names} {takes if flag.value else ''} -d {quoted(flag.text)}"
            lines.append(line.replace("  ", " "))
    return "\n".join(lines) + "\n"


def _fish_kind(name: str) -> str:
    """-l for --long, -s for -x, -o for -old."""
    return "-l" if name.startswith("--") else "-s" if len(name) == 2 else "-o"


SHELLS: dict[str, Callable[[list[Verb]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """What the shell sources."""
    return SHELLS[shell](list(verbs(parser)))
