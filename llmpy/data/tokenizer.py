"""Byte-level BPE with the `tokenizers` library: trained on a text, loaded from common file formats, or plain bytes.

Text becomes UTF-8 bytes, split into words by GPT-2's pattern. Adjacent pairs are merged in the order learned (Sennrich
et al. 2016; Radford et al. 2019). All 256 bytes are tokens, so any text round-trips. `<|endoftext|>` precedes each
document. In a text it is the same token, since some files separate documents with it. Other tokenizers may name it
differently.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LlmpyError, unreadable
from ..system.cache import data_cache
from ..system.durable import write_whole
from ..system.interrupts import interruptible
from ..system.workers import few
from . import pretrained
from .magic import TOKENIZER, lfs_pointer, magic_of
from .rank_tables import EOT, TIKTOKEN_LINE, Ranks, parse_llmc, parse_tiktoken

if TYPE_CHECKING:  # imported on first use: `llmpy --help` does without it
    import tokenizers

SMALLEST_VOCAB = 257  # every byte, and EOT
GPT2 = "openai-community/gpt2"
# Training takes time proportional to the square of a word's length, and memory for each distinct word. So it sees words
# in parts of LONG_WORD characters, and of n · LONG_WORDS_SEEN bytes of such parts LONG_WORDS_SEEN · (1 + ln n).
LONG_WORD = 256
LONG_WORDS_SEEN = 1_000_000
RUN = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")  # GPT-2's pattern never joins two of these, but for a first blank
# A tokenizer that changes these (lower case, no accents) loses text. Composing accents is harmless (NFC, as Qwen and
# GPT-NeoX do). The second has no leading space.
PROBES = (" The  cAfe\u0301 caf\u00e9\n\n\t日本 \U0001f642 \ufb01 x\u2028\r\n.\0 ", "a\n")

SENTENCES = "It's 1 or 22, (a b) 'c' \"d\". E\n- f: g! 日 本 é _ x\n y\n\nz "  # to see where words start


class Tokenizer:
    """A map between text and token ids. Construct it by `train`, `load`, `gpt2` or `bytes`, not directly."""

    def __init__(self, library: tokenizers.Tokenizer, eot_text: str = EOT, names: dict[str, str] | None = None) -> None:
        self._library = library
        self.names = names or dict.fromkeys(("eos_token", "bos_token"), eot_text)  # role → special token
        vocabulary = library.get_vocab()
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eot_text = eot_text
        self.eot: int = vocabulary[eot_text]
        self.roles: dict[str, int] = {role: vocabulary[name] for role, name in self.names.items()}
        self._ordinary: Tokenizer | None = None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` up to `vocab_size` tokens (fewer if pairs run out). Deterministic.

        Signals are handled meanwhile. Raises LlmpyError for less than 257.
        """
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < SMALLEST_VOCAB:
            message = f"a vocabulary of {vocab_size} tokens is too small for the 256 bytes and {EOT}"
            raise LlmpyError("tokenizer.vocab-too-small", message, f"Use --vocab-size {SMALLEST_VOCAB} or more")
        library = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        few()  # before the library starts its threads
        stopped, fed = Event(), Event()

        def feed() -> Iterator[str]:
            try:
                for text in _parts_of_long_words(texts):
                    if stopped.is_set():
                        return
                    yield text
            finally:
                fed.set()

        try:
            interruptible(lambda: library.train_from_iterator(feed(), trainer))
        except BaseException:
            stopped.set()
            fed.wait(1)  # a thread in Python code could abort the process at exit
            raise
        return cls(library)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a tokenizer.json or vocab.json, the folder of one, a .tiktoken table or llm.c's tokenizer .bin.

        Files are recognized by content. Raises LlmpyError if it is missing, corrupt, or not byte-level BPE.
        """
        try:
            data = (path := (pretrained.find(path) or path / pretrained.WHOLE) if path.is_dir() else path).read_bytes()
        except FileNotFoundError:
            hint = "Check the path. --tokenizer is gpt2, bytes, bpe:N, a file or its folder"
            raise LlmpyError("tokenizer.missing", f"no tokenizer at {path}", hint) from None
        except OSError as error:
            raise unreadable(path, error) from error
        if pointer := lfs_pointer(data):
            raise LlmpyError("file.lfs-pointer", f"{path} {pointer[0]}", pointer[1])
        try:
            if magic_of(data) == TOKENIZER:
                return cls._from_ranks(parse_llmc(data))
            return cls._from_ranks(parse_tiktoken(data)) if TIKTOKEN_LINE.match(data) else cls._from_json(path, data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing more specific, and may panic
            why = str(error)
            if isinstance(error, TypeError | AttributeError | KeyError):
                near = [name for name in pretrained.SETTINGS if (path.parent / name).is_file()]
                why = " or of ".join([f"a field of {path.name}", *near]) + " is invalid"
            short = why if len(why) < 300 else why[:140] + " … " + why[-140:]  # the library repeats tokens in full
            message = f"{path} is not a usable tokenizer: {short}"
            hint = "Give a tokenizer.json, or vocab.json and merges.txt, of byte-level BPE"
            raise LlmpyError("tokenizer.invalid", message, hint) from error

    @classmethod
    def gpt2(cls, log: Callable[[str], None] = print) -> Tokenizer:
        """Return GPT-2's tokenizer, downloaded once from the hub (1.4 MB). Raises LlmpyError on failure."""
        from ..system.download import from_hub

        kept = data_cache() / "gpt2.tiktoken"  # where llmpy 0.1.0 put its ranks
        return cls.load(kept if kept.is_file() else from_hub(GPT2, "tokenizer.json", log))

    @classmethod
    def _from_ranks(cls, ranks: Ranks) -> Tokenizer:
        """Return the encoder that a rank table implies. Raises LlmpyError if it is not made of merges."""
        from tokenizers import AddedToken, Regex, models, pre_tokenizers

        letters = dict(enumerate(_byte_characters()))

        def spelled(token: bytes) -> str:
            return token.decode("latin-1").translate(letters)

        vocabulary = {EOT if i == ranks.eot else spelled(token): i for i, token in enumerate(ranks.tokens) if token}
        merges = [(spelled(a), spelled(b)) for a, b in ranks.merges()]
        library = _byte_level(models.BPE(vocabulary, merges, ignore_merges=ranks.whole))
        if ranks.pattern:
            words = pre_tokenizers.Split(Regex(ranks.pattern), "isolated")
            spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            library.pre_tokenizer = pre_tokenizers.Sequence([words, spelling])
        library.add_special_tokens([AddedToken(EOT, special=True)])
        return cls(library)

    @classmethod
    def _from_json(cls, path: Path, data: bytes) -> Tokenizer:
        """Return the tokenizer of JSON files. Raises ValueError or a library error if invalid or lossy."""
        from tokenizers import decoders, pre_tokenizers

        library, names = pretrained.read(path, data)
        vocabulary = library.get_vocab()
        missing = sum(byte not in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
        if not isinstance(library.decoder, decoders.ByteLevel) or missing:
            # it would silently drop missing bytes
            raise ValueError(f"not byte-level: {missing} of the 256 bytes are missing, decoder {library.decoder}")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("two tokens have the same id")
        eot = names.get("eos_token") or _usual_eot(library)
        if eot is None or eot not in vocabulary:
            raise ValueError(f"no {EOT} token, nor {', '.join(pretrained.END_OF_TEXT[1:])}; no eos_token is named")
        library.no_truncation()
        library.no_padding()
        library.model.dropout = None
        tokenizer = cls(library, eot, names and {"eos_token": eot, **names})
        for text in PROBES:
            again = tokenizer.decode(tokenizer.encode(text))
            if again not in (text, unicodedata.normalize("NFC", text)):
                raise ValueError(f"it changes text: {text!r} becomes {again!r}")
        return tokenizer

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Return the tokenizer of plain bytes: id = byte, then EOT; no merges."""
        from tokenizers import AddedToken, models

        library = _byte_level(models.BPE(dict(zip(_byte_characters(), range(256), strict=True)), []))
        library.add_special_tokens([AddedToken(EOT, special=True)])
        return cls(library)

    def ordinary(self) -> Tokenizer:
        """Return the same tokenizer without special tokens in texts, since a web page may contain `<|endoftext|>`."""
        if self._ordinary is None:
            from tokenizers import AddedToken
            from tokenizers import Tokenizer as Library

            library = Library.from_str(self.to_json())
            library.add_special_tokens([AddedToken(self.eot_text, special=True)])  # some files do not call it special
            library.encode_special_tokens = True
            self._ordinary = Tokenizer(library, self.eot_text, self.names)
        return self._ordinary

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` atomically. Raises LlmpyError on failure."""
        content = self.to_json()
        write_whole(path, lambda temporary: temporary.write_text(content, "utf-8", newline="\n"))

    def to_json(self) -> str:
        """Return the content of a tokenizer.json. It has `names` if other than the usual EOT is named."""
        content = self._library.to_str(pretty=True)
        if {*self.names.values(), self.eot_text} == {_usual_eot(self._library)}:
            return content
        about = json.loads(content)
        about["model"][pretrained.NAMES] = self.names
        return json.dumps(about, ensure_ascii=False, indent=2)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; no EOT is added. Raises LlmpyError for lone surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"the text has {text[error.start]!r} at character {error.start}, from a byte that is not UTF-8"
            hint = "Type it again, or set a UTF-8 locale (LANG=C.UTF-8)"
            raise LlmpyError("tokenizer.lone-surrogate", message, hint) from error
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, encoded on all cores. Raises LlmpyError as `encode`."""
        try:
            return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            return [self.encode(text) for text in texts]  # to name the character

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, with EOT; invalid UTF-8 becomes U+FFFD.

        Raises LlmpyError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            message = f"token {wrong[0]} is outside the vocabulary of {self.vocab_size:,} tokens"
            raise LlmpyError("tokenizer.outside-vocabulary", message, "Use the tokenizer that encoded these tokens")
        return self._library.decode(ids, skip_special_tokens=False)

    def same_tokens(self, other: Tokenizer) -> bool:
        """Return whether both have the same token for each id, and the same EOT."""
        return self.eot == other.eot and self._library.get_vocab() == other._library.get_vocab()

    def starts_words(self, border: re.Pattern[str]) -> bool:
        """Return whether `border` always starts a word, and no added token contains or takes it."""
        starts = {at[0] for _, at in self._library.pre_tokenizer.pre_tokenize_str(SENTENCES)}
        added = self._library.get_added_tokens_decoder().values()
        taken = any(token.lstrip or token.rstrip or border.search(token.content) for token in added)
        return not taken and all(m.start() in starts for m in border.finditer(SENTENCES))

    @property
    def splits_as_gpt2(self) -> bool:
        """Whether text is split into words by GPT-2's pattern."""
        from tokenizers import pre_tokenizers

        splitter = self._library.pre_tokenizer
        return isinstance(splitter, pre_tokenizers.ByteLevel) and splitter.use_regex

    def ranks(self) -> Ranks:
        """Return the bytes of every token, as in llm.c's tokenizer file.

        Raises LlmpyError if ids are unused or not in the order of merges. Words must be split as in GPT-2, since that
        file stores no pattern.
        """
        if not self.splits_as_gpt2:
            message = "the tokenizer splits words unlike GPT-2, and llm.c's format stores no word pattern"
            raise LlmpyError("tokenizer.not-gpt2-words", message, "Use its tokenizer.json")
        spelled = {i: token for token, i in self._library.get_vocab().items()}
        if len(spelled) < self.vocab_size:
            raise LlmpyError("tokenizer.id-gaps", "the tokenizer has unused ids", "Use one with contiguous ids")
        value = {ord(c): byte for byte, c in enumerate(_byte_characters())}
        tokens = [
            self.eot_text.encode() if i == self.eot else spelled[i].translate(value).encode("latin-1", "replace")
            for i in range(self.vocab_size)
        ]
        ranks = Ranks(tuple(tokens), self.eot)
        ranks.merges()
        return ranks

    def byte_lengths(self) -> np.ndarray:
        """Return the number of bytes of each token, int32 (vocab_size,); 0 for EOT and unused ids."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._library.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)  # in byte-level BPE a character is a byte
        for i, added in self._library.get_added_tokens_decoder().items():
            lengths[i] = len(added.content.encode())
        lengths[self.eot] = 0
        return lengths


def _usual_eot(library: tokenizers.Tokenizer) -> str | None:
    """Return EOT, or the first of END_OF_TEXT that is a special token."""
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    usual = (t for t in pretrained.END_OF_TEXT if t in special or t == EOT and library.token_to_id(t) is not None)
    return next(usual, None)


def _parts_of_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts unchanged if no word is longer than LONG_WORD, else their long words in parts, thinned out."""
    seen = skipped = 0
    for text in texts:
        start = 0
        for run in RUN.finditer(text) if _has_long_run(text) else ():
            if run.end() - run.start() <= LONG_WORD:
                continue
            yield text[start : run.start()]
            start = run.end()
            for at in range(run.start(), start, LONG_WORD):
                part = text[at : min(at + LONG_WORD, start)]
                seen += len(part.encode())
                skipped += 1
                if skipped > seen // LONG_WORDS_SEEN:
                    skipped = 0
                    yield part
        yield text[start:]


def _has_long_run(text: str) -> bool:
    """Return quickly whether a stretch of `text` is blank, or has neither blanks nor line ends."""
    at = 0
    while at + LONG_WORD < len(text):
        window = text[at : at + LONG_WORD + 1]
        last = max(window.rfind(" "), window.rfind("\n"))
        if last < 0 or window.isspace():
            return True
        at += last + 1
    return False


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _byte_characters() -> list[str]:
    """Return the printable character for each byte: itself, or the next one from U+0100 on (GPT-2)."""
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    stand_ins = iter(sorted(c for c in alphabet if ord(c) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(stand_ins) for byte in range(256)]
