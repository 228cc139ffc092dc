"""Magic numbers of llm.c's files, our own, and files that hold data but not as text.

A binary file of llm.c starts with 256 little-endian int32; the first is its magic number.

Source: llm.c's `train_gpt2.py`, `train_llama3.py`, `dev/data/data_common.py` and `train_gpt2.cu`; MASK is ours.
"""

MODEL = 20240326
DEBUG = 20240327
TOKENIZER = 20240328
TOKENS = 20240520  # uint16
EXAMPLES = 20240522
STATE = 20240527
WIDE_TOKENS = 20240801  # uint32
LLAMA3 = 20240803
MASK = 20261122
HEADER_BYTES = 1024  # of all these files
SPOOL = ".tokens-"  # prefix of the temporary folders that hold tokens until their files are complete

WHAT = {
    MODEL: "an llm.c model checkpoint",
    DEBUG: "an llm.c debug state",
    TOKENIZER: "an llm.c tokenizer",
    TOKENS: "an llm.c token shard",
    EXAMPLES: "an llm.c multiple-choice evaluation file",
    STATE: "an llm.c optimizer state",
    WIDE_TOKENS: "a Llama-3 token shard",
    LLAMA3: "a Llama-3 model of llm.c",
    MASK: "the mask of a token shard",
}
UNPACK, EXPORT, SAVE = "Unpack it", "Export it as text or JSON lines", "Save it as plain text"
SEALED = {  # start → what it is, and how to get the text
    b"\x1f\x8b": ("gzip", UNPACK),
    b"PK\x03\x04": ("zip (or docx, odt, epub, npz, PyTorch)", "Unpack it, or save it as plain text"),
    b"\x28\xb5\x2f\xfd": ("zstd", UNPACK),
    b"\xfd7zXZ": ("xz", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a rar archive", UNPACK),
    b"%PDF-": ("PDF", SAVE),
    b"{\\rtf": ("RTF", SAVE),
    b"\xd0\xcf\x11\xe0": ("an old Office document", SAVE),
    b"ARROW1": ("Arrow", EXPORT),
    b"\x93NUMPY": ("a NumPy array", EXPORT),
    b"SQLite format 3": ("an SQLite database", EXPORT),
    b"\x89HDF": ("HDF5", EXPORT),
    **{b"BZh%d1AY" % level: ("bzip2", UNPACK) for level in range(1, 10)},
    **{b"\x80" + bytes([protocol]): ("a pickle", EXPORT) for protocol in range(2, 6)},
}


def sealed(start: bytes) -> tuple[str, str] | None:
    """Return what a file is that starts with `start` and holds no plain text, and how to get it; None for others."""
    if start[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if start[:4] == b"\xff\xff\xff\xff" and start[6:8] == b"\0\0":  # a stream: the length of its first message
        return "Arrow", 'Convert it: datasets.load_from_disk(FOLDER).to_json("train.jsonl")'
    return next((about for mark, about in SEALED.items() if start.startswith(mark)), None)


def magic_of(start: bytes) -> int:
    """Return the magic number of a file that starts with `start`; 0 if shorter than four bytes."""
    return int.from_bytes(start[:4], "little") if len(start) >= 4 else 0


def lfs_pointer(start: bytes) -> tuple[str, str] | None:
    """Return message and hint if a file that starts with `start` is a git-lfs pointer, else None."""
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself", "Fetch it: git lfs pull"
    return None
