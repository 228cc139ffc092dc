"""BPE with the `tokenizers` library: trained on a text, loaded from common file formats, or plain bytes.

Byte-level: text becomes UTF-8 bytes, split into words by GPT-2's pattern. Adjacent pairs are merged in the order
learned (Sennrich et al. 2016; Radford et al. 2019). All 256 bytes are tokens, so any text round-trips. SentencePiece's
(Llama 2, TinyLlama): blanks become `▁`, one is put in front, and rare characters are spelled in bytes, `<0xE6>`.

`<|endoftext|>` precedes each document. In a text it is the same token, since some files separate documents with it.
Other tokenizers may name it differently, and put a token of their own at the start of a text (`prefix`).
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LlmpyError, unreadable
from ..system.cache import data_cache
from ..system.durable import write_whole
from ..system.interrupts import interruptible
from ..system.thread_limit import few
from . import pretrained
from .chat_template import ChatTemplate, Spans
from .magic import TOKENIZER, lfs_pointer, magic_of
from .rank_tables import EOT, TIKTOKEN_LINE, Ranks, parse_llmc, parse_tiktoken

if TYPE_CHECKING:  # imported on first use: `llmpy --help` does without it
    import tokenizers

SMALLEST_VOCAB = 257  # every byte, and EOT
GPT2 = "openai-community/gpt2"
# Training takes time proportional to the square of a word's length, so it sees words in parts of LONG_WORD characters.
# Time and memory also grow with the distinct words: a text with more of them is sampled (dev/LOG.md#distinct-words).
LONG_WORD, MOST_WORDS, MOST_BYTES = 256, 700_000, 7_000_000
WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+")  # about GPT-2's
RUN = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")  # GPT-2's pattern never joins two of these, but for a first blank
# A tokenizer that changes these (lower case, no accents) loses text. Composing accents is harmless (NFC, as Qwen and
# GPT-NeoX do). The second has no leading space.
PROBES = (" The  cAfe\u0301 caf\u00e9\n\n\t日本 \U0001f642 \ufb01 x\u2028\r\n.\0 ", "a\n")

NO_CHAT = pretrained.Chat()
BYTE = re.compile("<0x[0-9A-F]{2}>")
BORDER = re.compile(r"(?<=\S)[ \n]")  # GPT-2's pattern always starts a word here (not at \x1c!)
BLANK = re.compile(r"(?<=\S) ")  # for other patterns, which may join line ends to the preceding sign
NEVER = re.compile(r"(?!)")
SENTENCES = "It's 1 or 22, (a b) 'c' \"d\". E\n- f: g! 日 本 é _ x\n y\n\nz "  # to see where words start


class Tokenizer:
    """A map between text and token ids. Construct it by `train`, `load`, `gpt2` or `bytes`, not directly."""

    def __init__(
        self, library: tokenizers.Tokenizer, eot_text: str = EOT, names: dict[str, str] | None = None,
        chat: pretrained.Chat = NO_CHAT,
    ) -> None:  # fmt: skip
        from tokenizers import decoders

        self._library = library
        self._chat = chat
        self.names = names or dict.fromkeys(("eos_token", "bos_token"), eot_text)  # role → special token
        vocabulary = library.get_vocab()
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eot_text = eot_text
        self.eot: int = vocabulary[eot_text]
        self.roles: dict[str, int] = {role: vocabulary[name] for role, name in self.names.items()}
        whole, text = library.encode("a").ids, library.encode("a", add_special_tokens=False).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
        self.prefix: list[int] = whole[:at]  # of a text, as transformers adds it
        self.byte_level = isinstance(library.decoder, decoders.ByteLevel)
        absent = (b for b, c in enumerate(_byte_characters()) if c not in vocabulary)
        self._absent = bytes(absent) if self.byte_level else b""  # of which the library drops texts silently
        special = [token.content for token in library.get_added_tokens_decoder().values() if token.special]
        template, apart = chat.chat_template, lambda: self._apart
        self.template = ChatTemplate(template, self.names, special, apart) if template else None
        self._ordinary: Tokenizer | None = None

    @property
    def start(self) -> list[int]:
        """The tokens before a document: EOT, which ends the previous one, and the prefix."""
        return self.prefix if self.prefix[:1] == [self.eot] else [self.eot, *self.prefix]

    @cached_property
    def stops(self) -> frozenset[int]:
        """The tokens that end a generated text: EOT, those the model names, and the end of an answer in a chat."""
        ends = {*self._chat.stop_tokens, self.template.end_of_turn if self.template else None}
        return frozenset({self.eot, *(i for end in ends if end and (i := self._library.token_to_id(end)) is not None)})

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
                yield from _few_words(_parts_of_long_words(texts), lambda _: not stopped.is_set())
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

        Files are recognized by content. Raises LlmpyError if it is missing, corrupt, or not BPE of bytes.
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
            hint = "Give a tokenizer.json, or vocab.json and merges.txt, of BPE with bytes"
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
        library, names, chat = pretrained.read(path, data)
        vocabulary = library.get_vocab()
        fallback = getattr(library.model, "byte_fallback", False)
        fallback = fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        missing = [byte for byte, c in enumerate(_byte_characters()) if c not in vocabulary]
        common = {*b"\t\n\r", *range(0x20, 0x7F)}.intersection(missing)
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("two tokens have the same id")
        eot = names.get("eos_token") or _usual_eot(library)
        if eot is None or eot not in vocabulary:
            raise ValueError(f"no {EOT} token, nor {', '.join(pretrained.END_OF_TEXT[1:])}; no eos_token is named")
        library.no_truncation()
        library.no_padding()
        library.model.dropout = None
        tokenizer = cls(library, eot, names and {"eos_token": eot, **names}, chat)
        if not (tokenizer.byte_level and not common or fallback):
            what = f"not byte-level: {len(missing)} of the 256 bytes are missing, decoder {library.decoder}"
            raise ValueError(what)
        for probe in PROBES:
            text = "".join(c for c in probe if not {*c.encode()} & {*tokenizer._absent})
            again = tokenizer.decode(tokenizer.encode(text))
            blank = " " * (fallback and text[:1] == " ")  # Metaspace puts no second one in front
            if not {again, blank + again} & {text, unicodedata.normalize("NFC", text)}:
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
        chat = {key: value for key, value in self._chat._asdict().items() if value}
        if {*self.names.values(), self.eot_text} == {_usual_eot(self._library)} and not chat:
            return content
        about = json.loads(content)
        about["model"][pretrained.NAMES] = self.names | chat
        return json.dumps(about, ensure_ascii=False, indent=2)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without prefix and EOT.

        Raises LlmpyError for lone surrogates, and for bytes without a token.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"the text has {text[error.start]!r} at character {error.start}, from a byte that is not UTF-8"
            hint = "Type it again, or set a UTF-8 locale (LANG=C.UTF-8)"
            raise LlmpyError("tokenizer.lone-surrogate", message, hint) from error
        if len(data.translate(None, self._absent)) < len(data):
            lost = next(c for c in text if len(c.encode().translate(None, self._absent)) < len(c.encode()))
            message = f"the tokenizer has no token for a byte of {lost!a}, and would drop it"
            raise LlmpyError("tokenizer.no-byte", message, "Remove this character from the text")
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, encoded on all cores. Raises LlmpyError as `encode`."""
        try:
            if self._absent and len((data := "".join(texts).encode()).translate(None, self._absent)) < len(data):
                raise TypeError
            return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            return [self.encode(text) for text in texts]  # to name the character

    def encode_marked(self, texts: Sequence[str], spans: Sequence[Spans]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the token ids (n,) of each text and which of them, bool (n,), have characters in its spans."""
        if self._absent:
            self.encode_batch(texts)  # refuses them
        for encoding, counted in zip(self._library.encode_batch(texts, add_special_tokens=False), spans, strict=True):
            at = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            first = np.minimum(at[:, 0], np.append(0, at[:-1, 1])[: len(at)])  # the library trims blanks
            last = np.maximum(at[:, 1], first + 1)
            marks = np.zeros(len(at), bool)
            for start, stop in counted:
                marks |= (first < stop) & (last > start)
            yield encoding.ids, marks

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, with EOT; invalid UTF-8 becomes U+FFFD.

        Raises LlmpyError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            message = f"token {wrong[0]} is outside the vocabulary of {self.vocab_size:,} tokens"
            raise LlmpyError("tokenizer.outside-vocabulary", message, "Use the tokenizer that encoded these tokens")
        return self._library.decode(ids, skip_special_tokens=False)

    def continuation(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` that continue a text: SentencePiece's first blank stays."""
        return self.decode(ids) if self.byte_level else self.decode([self.eot, *ids])[len(self.eot_text) :]

    def same_tokens(self, other: Tokenizer) -> bool:
        """Return whether both have the same token for each id, and the same EOT."""
        return self.eot == other.eot and self._library.get_vocab() == other._library.get_vocab()

    @cached_property
    def border(self) -> re.Pattern[str]:
        """What always starts a word, never inside or next to an added token; nothing if unknown.

        SentencePiece's has no words, but no token joins a blank to what precedes it. A piece is encoded without its
        first blank, since the library puts one in front.
        """
        added = self._library.get_added_tokens_decoder().values()
        border = BORDER if self.splits_as_gpt2 else BLANK
        if not self.byte_level:
            first, last = ("".join(re.escape(token.content[i]) for token in added) for i in (0, -1))
            border = re.compile(rf"(?<=[^\s▁{last}]) (?!\Z|[\s▁{first}])")
        if any(token.lstrip or token.rstrip or border.search(token.content) for token in added):
            return NEVER
        if not self.byte_level:
            same = self.encode(SENTENCES) == [i for text in border.split(SENTENCES) for i in self.encode(text)]
            return NEVER if not same or any(re.search("[^▁]▁", t) for t in self._library.get_vocab()) else border
        starts = {at[0] for _, at in self._library.pre_tokenizer.pre_tokenize_str(SENTENCES)}
        return border if all(m.start() in starts for m in border.finditer(SENTENCES)) else NEVER

    @cached_property
    def _apart(self) -> bool:
        """Whether texts between special tokens have the same ids if encoded alone."""
        parts = "a", self.eot_text, " b\n", self.eot_text, "c d"
        added = self._library.get_added_tokens_decoder().values()
        strips = any(token.lstrip or token.rstrip or token.single_word for token in added if token.special)
        return not strips and self.encode("".join(parts)) == [i for part in parts for i in self.encode(part)]

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
            # a character of byte-level BPE is a byte
            lengths[i] = len(token) if self.byte_level else len(BYTE.sub(".", token).replace("▁", " ").encode())
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
    """Yield texts unchanged if no word is longer than LONG_WORD, else their long words in parts."""
    for text in texts:
        start = 0
        for run in RUN.finditer(text) if _has_long_run(text) else ():
            if run.end() - run.start() <= LONG_WORD:
                continue
            yield text[start : run.start()]
            start = run.end()
            yield from (text[at : min(at + LONG_WORD, start)] for at in range(run.start(), start, LONG_WORD))
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


def _few_words(texts: Iterable[str], running: Callable[[str], bool]) -> Iterator[str]:
    """Yield texts unchanged if their distinct words are within the limits, else as many of them, drawn, as are.

    A sixteenth or a quarter of the texts gives a bound for all. Ends early once `running` returns False.
    """
    held = list(takewhile(running, texts))
    drawn, words, size = random.Random(0).sample(held, len(held)), set[str](), 0
    for n, text in enumerate(takewhile(running, drawn), 1):
        new = {*WORD.findall(text)} - words
        words |= new
        size += sum(len(word.encode()) for word in new)
        if len(words) > MOST_WORDS or size > MOST_BYTES:
            yield from takewhile(running, drawn[:n])
            return
        if n in (len(held) // 16, len(held) // 4) and max(len(words) / MOST_WORDS, size / MOST_BYTES) <= n / len(held):
            break
    yield from takewhile(running, held)


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
