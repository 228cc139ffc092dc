"""Byte-level BPE over the `tokenizers` library: trained on a text, loaded from any usual file, or plain bytes.

Text becomes UTF-8 bytes, split into words by GPT-2's pattern, and pairs of neighbours are merged in the
order learnt (Sennrich et al. 2016; Radford et al. 2019). All 256 bytes are tokens, so every text has an
encoding and decodes to itself. `<|endoftext|>` stands before each document; written in a text it is that
token too, as in files that separate their documents with it. A tokenizer.json of others may call it otherwise
(END_OF_TEXT).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LlmpyError, unreadable
from ..system.cache import data_cache
from ..system.durable import write_whole
from .magic import TOKENIZER, magic_of
from .rank_tables import EOT, TIKTOKEN_LINE, Ranks, parse_llmc, parse_tiktoken

if TYPE_CHECKING:  # the library is imported where it is first needed: `llmpy --help` does without it
    import tokenizers

SMALLEST_VOCAB = 257  # every byte, and EOT
GPT2 = "openai-community/gpt2"
# What every text holds somewhere: a tokenizer that changes any of it (lower case, no accents) loses text, one that
# composes accents (NFC, as Qwen's and GPT-NeoX's do) loses nothing that can be seen. The second begins without a blank.
PROBES = (" The  cAfe\u0301 caf\u00e9\n\n\t日本 \U0001f642 \ufb01 x\u2028\r\n.\0 ", "a\n")
# What the makers of byte-level tokenizers call the token between texts; of several the first is meant. Llama 3 has one
# that begins a text and one that ends it: llm.c puts the former before each document, and so do we.
END_OF_TEXT = (EOT, "<|begin_of_text|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<EOS_TOKEN>")


class Tokenizer:
    """Text ⇄ token ids. Made by `train`, `load` or `bytes`, never directly."""

    def __init__(self, library: tokenizers.Tokenizer, eot_text: str = EOT) -> None:
        self._library = library
        vocabulary = library.get_vocab()
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eot_text = eot_text
        self.eot: int = vocabulary[eot_text]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` until there are `vocab_size` tokens (fewer, if pairs run out).

        The same texts give the same tokenizer. Raises LlmpyError for less than 257.
        """
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < SMALLEST_VOCAB:
            raise LlmpyError(
                "data.x",
                f"a vocabulary of {vocab_size} tokens has no room for the 256 bytes and {EOT}",
                f"Use --vocab-size {SMALLEST_VOCAB} or more",
            )
        library = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        return cls(library)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json, a .tiktoken table or llm.c's tokenizer .bin, whichever the content is.

        Raises LlmpyError: missing, damaged, or not byte-level BPE with a token of END_OF_TEXT.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise LlmpyError(
                "data.x", f"no tokenizer at {path}", "Check the path; --tokenizer is gpt2, bytes, bpe:N or a file"
            ) from None
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            if magic_of(data) == TOKENIZER:
                return cls._from_ranks(parse_llmc(data))
            return cls._from_ranks(parse_tiktoken(data)) if TIKTOKEN_LINE.match(data) else cls._from_json(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing more special for any damage, and may panic
            why = str(error)
            short = why if len(why) < 300 else why[:140] + " … " + why[-140:]  # the library repeats tokens in full
            raise LlmpyError(
                "data.x", f"{path} is not a usable tokenizer: {short}", "Give a tokenizer.json of byte-level BPE"
            ) from error

    @classmethod
    def gpt2(cls, log: Callable[[str], None] = print) -> Tokenizer:
        """Return GPT-2's, downloaded once from the hub (1.4 MB). Raises LlmpyError if that fails."""
        from ..system.download import from_hub

        kept = data_cache() / "gpt2.tiktoken"  # where llmpy 0.1.0 put its ranks
        return cls.load(kept if kept.is_file() else from_hub(GPT2, "tokenizer.json", log))

    @classmethod
    def _from_ranks(cls, ranks: Ranks) -> Tokenizer:
        """Make the encoder that a rank table implies. Raises LlmpyError if it is none of merges."""
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
    def _from_json(cls, data: bytes) -> Tokenizer:
        """Make that of a tokenizer.json. Raises ValueError, or what the library does, if it would lose text."""
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, pre_tokenizers

        library = Library.from_str(data.decode("utf-8"))
        vocabulary = library.get_vocab()
        missing = sum(byte not in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
        if not isinstance(library.decoder, decoders.ByteLevel) or missing:
            # such a tokenizer silently drops what it lacks
            raise ValueError(f"not byte-level: {missing} of the 256 bytes are no tokens, decoder {library.decoder}")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("two of its tokens have the same id")
        added = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
        eot = next((name for name in END_OF_TEXT if name in added or name == EOT and name in vocabulary), None)
        if eot is None:
            raise ValueError(f"it has no {EOT} token, nor {', '.join(END_OF_TEXT[1:])}")
        library.no_truncation()
        library.no_padding()
        tokenizer = cls(library, eot)
        for text in PROBES:
            again = tokenizer.decode(tokenizer.encode(text))
            if again not in (text, unicodedata.normalize("NFC", text)):
                raise ValueError(f"it changes text: {text!r} becomes {again!r}")
        return tokenizer

    @classmethod
    def bytes(cls) -> Tokenizer:
        """256 tokens that are the bytes (id = byte), then EOT; no merges."""
        from tokenizers import AddedToken, models

        library = _byte_level(models.BPE(dict(zip(_byte_characters(), range(256), strict=True)), []))
        library.add_special_tokens([AddedToken(EOT, special=True)])
        return cls(library)

    def ordinary(self) -> Tokenizer:
        """The same tokens, but what a text spells is never a special one: a web page may well write `<|endoftext|>`."""
        from tokenizers import Tokenizer as Library

        library = Library.from_str(self.to_json())
        library.encode_special_tokens = True
        return Tokenizer(library, self.eot_text)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`, whole or not at all. Raises LlmpyError if the disk refuses."""
        content = self.to_json()
        write_whole(path, lambda temporary: temporary.write_text(content, "utf-8", newline="\n"))

    def to_json(self) -> str:
        """What a tokenizer.json holds."""
        return self._library.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; no EOT is added. Raises LlmpyError for lone surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LlmpyError(
                "data.x",
                f"the text holds {text[error.start]!r} at character {error.start}: a byte that was no UTF-8",
                "Type it again, or set a UTF-8 locale (LANG=C.UTF-8)",
            ) from error
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, on all cores."""
        try:
            return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            return [self.encode(text) for text in texts]  # which names the character

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, EOT included; bytes that are no UTF-8 become U+FFFD.

        Raises LlmpyError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise LlmpyError(
                "data.x",
                f"token {wrong[0]} is not in the tokenizer's {self.vocab_size:,} tokens",
                "Use the tokenizer that made these tokens",
            )
        return self._library.decode(ids, skip_special_tokens=False)

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether each id stands for the same text in both."""
        return self._library.get_vocab() == other._library.get_vocab()

    @property
    def splits_as_gpt2(self) -> bool:
        """Whether words are those of GPT-2's pattern."""
        from tokenizers import pre_tokenizers

        splitter = self._library.pre_tokenizer
        return isinstance(splitter, pre_tokenizers.ByteLevel) and splitter.use_regex

    def ranks(self) -> Ranks:
        """The bytes of every token, as llm.c's tokenizer file holds them.

        Raises LlmpyError where the ids leave a gap, or are not in the order of merges, and for words unlike GPT-2's:
        that file does not say how they are split.
        """
        if not self.splits_as_gpt2:
            fix = "use its tokenizer.json"
            raise LlmpyError("data.x", "the tokenizer splits words unlike GPT-2, which llm.c's table cannot tell", fix)
        spelled = {i: token for token, i in self._library.get_vocab().items()}
        if len(spelled) < self.vocab_size:
            raise LlmpyError("data.x", "the tokenizer has ids that no token has", "Use one whose ids have no gaps")
        value = {ord(c): byte for byte, c in enumerate(_byte_characters())}
        tokens = [
            self.eot_text.encode() if i == self.eot else spelled[i].translate(value).encode("latin-1", "replace")
            for i in range(self.vocab_size)
        ]
        ranks = Ranks(tuple(tokens), self.eot)
        ranks.merges()
        return ranks

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each token stands for, int32 (vocab_size,); 0 for EOT and unused ids."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._library.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)  # in byte-level BPE a character is a byte
        for i, added in self._library.get_added_tokens_decoder().items():
            lengths[i] = len(added.content.encode())
        lengths[self.eot] = 0
        return lengths


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte: itself, or the next one from U+0100 on (GPT-2)."""
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    stand_ins = iter(sorted(c for c in alphabet if ord(c) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(stand_ins) for byte in range(256)]
