"""Byte-level BPE over the `tokenizers` library: trained on a text, loaded, or plain bytes.

Text becomes UTF-8 bytes, split into words by GPT-2's pattern, and pairs of neighbours are merged in the
order learnt (Sennrich et al. 2016; Radford et al. 2019). All 256 bytes are tokens, so every text has an
encoding and decodes to itself. `<|endoftext|>` stands before each document; written in a text it is that
token too, as in files that separate their documents with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .durable import write_whole
from .errors import LlmpyError

if TYPE_CHECKING:  # the library is imported where it is first needed: `llmpy --help` does without it
    import tokenizers

EOT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # every byte, and EOT


class Tokenizer:
    """Text ⇄ token ids. Made by `train`, `load` or `bytes`, never directly."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        vocabulary = library.get_vocab()
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eot: int = vocabulary[EOT]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` until there are `vocab_size` tokens (fewer, if pairs run out).

        The same texts give the same tokenizer. Raises LlmpyError for less than 257, or lone surrogates.
        """
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < SMALLEST_VOCAB:
            raise LlmpyError(
                f"a vocabulary of {vocab_size} tokens has no room for the 256 bytes and {EOT}",
                f"use --vocab-size {SMALLEST_VOCAB} or more",
            )
        library = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator((_encodable(text) for text in texts), trainer)
        return cls(library)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. LlmpyError: missing, damaged, or not byte-level BPE with EOT."""
        import tokenizers
        from tokenizers import decoders, pre_tokenizers

        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise LlmpyError(f"no tokenizer at {path}", "train on text to make one, or check the path") from None
        except OSError as fault:
            raise LlmpyError(f"cannot read {path}: {fault.strerror}", "check the path") from fault
        except UnicodeDecodeError as fault:
            raise _not_a_tokenizer(path, "it is binary") from fault
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as fault:  # the library raises nothing more special for any damage
            raise _not_a_tokenizer(path, str(fault)) from fault
        vocabulary = library.get_vocab()
        missing = sum(byte not in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
        if not isinstance(library.decoder, decoders.ByteLevel) or missing:
            # such a tokenizer silently drops what it lacks
            why = f"{missing} of the 256 bytes are no tokens" if missing else "its decoder is not ByteLevel"
            raise _not_a_tokenizer(path, f"not a byte-level one ({why})")
        if EOT not in vocabulary:
            raise _not_a_tokenizer(path, f"it has no {EOT} token")
        library.no_truncation()
        library.no_padding()
        return cls(library)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """256 tokens that are the bytes (id = byte), then EOT; no merges."""
        from tokenizers import AddedToken, models

        library = _byte_level(models.BPE(dict(zip(_byte_characters(), range(256), strict=True)), []))
        library.add_special_tokens([AddedToken(EOT, special=True)])
        return cls(library)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`, whole or not at all. Raises LlmpyError if the disk refuses."""
        content = self._library.to_str(pretty=True)
        write_whole(path, lambda temporary: temporary.write_text(content, "utf-8", newline="\n"))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no EOT is added. Raises LlmpyError for lone surrogates."""
        return self._library.encode(_encodable(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, on all cores."""
        batch = [_encodable(text) for text in texts]
        return [e.ids for e in self._library.encode_batch_fast(batch, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, EOT included; bytes that are no UTF-8 become U+FFFD.

        Raises LlmpyError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for position, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise LlmpyError(
                    f"token {i} at position {position} is not in the tokenizer's {self.vocab_size:,} tokens",
                    "use the tokenizer that made these tokens",
                )
        return self._library.decode(ids, skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each token stands for, int32 (vocab_size,); 0 for EOT and unused ids."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._library.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)  # in byte-level BPE a character is a byte
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


def _encodable(text: str) -> str:
    """`text`, if it has a UTF-8 form; else LlmpyError says where it has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise LlmpyError(
            f"the text holds {text[fault.start]!r} at character {fault.start}: a byte that was no UTF-8",
            "type it again, or set a UTF-8 locale (LANG=C.UTF-8)",
        ) from fault
    return text


def _not_a_tokenizer(path: Path, why: str) -> LlmpyError:
    return LlmpyError(f"{path} is not a usable tokenizer.json: {why}", "restore the file, or train on text again")
