"""Magic numbers of llm.c's files, our own, and those of files that are not text.

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
SEALED = (  # files that hold data, but not as text: pattern of the start, what it is, what to do
    (
        rb"\x1f\x8b|PK\x03\x04|\x28\xb5\x2f\xfd|\xfd7zXZ|BZh\d1AY|7z\xbc\xaf|Rar!\x1a|.{257}ustar",
        "compressed (gzip, zip, docx, zstd, xz, bzip2, tar …)", "Unpack it, or save it as plain text",
    ),
    (rb"%PDF-|\{\\rtf|\xd0\xcf\x11\xe0", "a PDF, RTF or Office document", "Save it as plain text"),
    (rb"\xff{4}..\0\0|ARROW1", "Arrow", 'Convert it: datasets.load_from_disk(FOLDER).to_json("train.jsonl")'),
    (rb"\x80[\x02-\x05]|\x93NUMPY", "a pickle or NumPy array", "Export it as text or jsonl"),
    (rb"\0{16}", "empty space, as of an interrupted download", "Download it again"),
    (rb"SQLite format 3|\x89HDF", "an SQLite or HDF5 database", "Export it as text or jsonl"),
)  # fmt: skip


def magic_of(start: bytes) -> int:
    """Return the magic number of a file that starts with `start`; 0 if shorter than four bytes."""
    return int.from_bytes(start[:4], "little") if len(start) >= 4 else 0


def lfs_pointer(start: bytes) -> tuple[str, str] | None:
    """Return message and hint if a file that starts with `start` is a git-lfs pointer, else None."""
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself", "Fetch it: git lfs pull"
    return None
