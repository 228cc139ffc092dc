"""Documents → tokens: in order, independent of pieces and batches, with counted tokens marked."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmpy.data import encode as encode_module
from llmpy.data.encode import encode, pieces
from llmpy.data.records import Document
from llmpy.data.tokenizer import EOT, Tokenizer


def tokenise(tokenizer, documents):
    """Return the ids of all blocks, and whether each counts."""
    blocks = list(encode(tokenizer, iter(documents)))
    counted = [np.ones(len(b.ids), bool) if b.counted is None else b.counted for b in blocks]
    return np.concatenate([b.ids for b in blocks]), np.concatenate(counted)


@pytest.fixture(scope="module")
def blanks():
    """A tokenizer with merged blanks, which reveals a cut in a wrong place."""
    return Tokenizer.train([" a  b\n\n a's \n b   !!  ab!\x1c ab\n" * 50], 300)


@settings(max_examples=500, deadline=None)
@example("ab!!!\x1c!!!")  # white space to Python, not to the tokenizer
@given(text=st.text(max_size=100) | st.text(" \n\t ab'st日!\x1c\x85\u3000", max_size=60))
def test_pieces_encode_as_the_whole(blanks, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "PIECE", 3)
        assert "".join(pieces(text)) == text
        assert tokenise(blanks, [Document("", text)])[0][1:].tolist() == blanks.encode(text)


def test_batches_join_to_the_whole(blanks, monkeypatch):
    texts = [f" a b{i}\n\n" * (1 + i % 7) for i in range(200)]
    documents = [Document("", text) for text in texts]
    expected = [i for text in texts for i in [blanks.eot, *blanks.encode(text)]]
    assert tokenise(blanks, documents)[0].tolist() == expected
    monkeypatch.setattr(encode_module, "BATCH", 50)
    blocks = list(encode(blanks, iter(documents)))
    assert len(blocks) > 20
    assert np.concatenate([b.ids for b in blocks]).tolist() == expected
    assert sum(b.characters for b in blocks) == sum(map(len, texts))
    assert {b.ids.dtype for b in blocks} == {np.dtype(np.uint16)}
    at = np.cumsum([0] + [len(b.ids) for b in blocks])
    starts = np.concatenate([b.starts + first for b, first in zip(blocks, at, strict=False)])
    assert starts.tolist() == np.flatnonzero(np.array(expected) == blanks.eot).tolist()


def test_counted_tokens():
    plain = Tokenizer.bytes()
    spans = [Document("", "promptX", ((6, 7),)), Document("", "ab"), Document("", "uAuB", ((1, 2), (3, 4)))]
    ids, counted = tokenise(plain, spans)
    assert plain.decode(ids) == f"{EOT}promptX{EOT}ab{EOT}uAuB"
    # EOT counts, since it ends the previous document
    assert "".join(map(str, counted.astype(int))) == "1" + "0000001" + "1" + "11" + "1" + "0101"
    assert [block.counted for block in encode(plain, spans[1:2])] == [None]


def test_no_token_spans_counted_and_uncounted_text(blanks):
    text = " a  b a  b"
    ids, counted = tokenise(blanks, [Document("", text, ((5, 10),))])
    assert blanks.decode(ids[1:][~counted[1:]]) == text[:5]
    assert blanks.decode(ids[1:][counted[1:]]) == text[5:]
