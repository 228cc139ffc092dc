"""Models in every format: exact round trips, layouts against an independent description, and errors."""

from __future__ import annotations

import errno
import itertools
import json
import os
import struct
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import golden
from support.laptop import TINY, Laptop
from support.refused import refused
from support.samples import in_memory, llama_tokenizer, same, sharded, training_state, with_tokenizer, write_debug

from llmpy.cli.main import main
from llmpy.data.rank_tables import LLMC_FILE, write_llmc
from llmpy.data.tokenizer import Tokenizer
from llmpy.errors import LlmpyError
from llmpy.formats import convert, huggingface, llmc, native, open_model, resolve, tokenizer_of
from llmpy.formats.source import DTYPES, Source, cast
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.run import checkpoint
from llmpy.system import durable
from llmpy.system.staged import staging

if sys.platform != "win32":
    import resource


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_goes_through_every_format_and_back(tmp_path: Path, dtype: str) -> None:
    source = in_memory(dtype=dtype)
    llmc.write_model(tmp_path / "a.bin", source, dtype)
    native.write_model(tmp_path / "b", open_model(tmp_path / "a.bin"))  # float32
    huggingface.write_model(tmp_path / "c", open_model(tmp_path / "b"), dtype)
    llmc.write_model(tmp_path / "d.bin", open_model(tmp_path / "c"), dtype)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "d.bin").read_bytes()
    for step in ("a.bin", "c", "c/model.safetensors", *(["b", "b/model.safetensors"] if dtype == "float32" else [])):
        assert same(open_model(tmp_path / step), source), step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_of_hugging_face_in_every_type(tmp_path: Path, dtype: str) -> None:
    source = in_memory(dtype=dtype)
    sharded(tmp_path, source)
    assert same(open_model(tmp_path), source)


@pytest.mark.parametrize(("dtype", "version"), [("float32", 3), ("bfloat16", 5)])
def test_bytes_are_those_of_llm_c(tmp_path: Path, dtype: str, version: int) -> None:
    """Against a file packed by struct from the description."""
    source = in_memory(dtype=dtype)
    llmc.write_model(tmp_path / "no suffix", source, dtype)
    header = struct.pack("<8i", 20240326, version, 16, 300, 2, 2, 8, 384).ljust(1024, b"\0")
    body = b"".join(source.read(name).astype(DTYPES[dtype]).tobytes() for name in llmc.ORDER)
    assert (tmp_path / "no suffix").read_bytes() == header + body
    assert same(open_model(tmp_path / "no suffix"), source)


def test_layout_of_124m() -> None:
    config, path = ModelConfig.from_dial("gpt2"), Path("model.bin")
    for dtype, version in (("float32", 3), ("bfloat16", 5)):
        size = golden.MODEL_BYTES[version]
        places = llmc.layout(config, dtype, llmc.HEADER.itemsize, path, size, "")
        assert places["ln_f_b"].end == size
        if dtype == "float32":
            assert tuple(place.offset for place in places.values()) == golden.MODEL_OFFSETS


def test_hugging_face_keeps_how_far_positions_are_trained(tmp_path: Path) -> None:
    source = in_memory()
    context = source.config.context
    huggingface.write_model(tmp_path, replace(source, trained_length=context - 3), "float32")
    assert open_model(tmp_path).trained_length == context - 3
    about = json.loads((tmp_path / "config.json").read_text())
    for wrong in (0, context + 1, "7", None):
        (tmp_path / "config.json").write_text(json.dumps({**about, huggingface.TRAINED: wrong}))
        assert open_model(tmp_path).trained_length == context


def test_names_and_transposes_of_hugging_face(tmp_path: Path) -> None:
    source = in_memory()
    huggingface.write_model(tmp_path, source, "float32")
    tensors = load_file(tmp_path / "model.safetensors")
    C = TINY.channels
    assert tensors["transformer.wte.weight"].shape == (TINY.vocab_size, C)
    for l in range(TINY.layers):
        assert tensors[f"transformer.h.{l}.mlp.c_fc.weight"].shape == (C, 4 * C)
        assert np.array_equal(tensors[f"transformer.h.{l}.attn.c_attn.weight"], source.read("attn_qkv_w")[l].T)
        assert np.array_equal(tensors[f"transformer.h.{l}.mlp.c_proj.weight"], source.read("mlp_proj_w")[l].T)
    assert len(tensors) == 4 + 12 * TINY.layers
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    shape = huggingface.FAMILIES["gpt2"].shape
    assert {ours: config[theirs] for ours, theirs in shape.items()} == TINY.record()


def test_weights_by_another_name(tmp_path: Path) -> None:
    huggingface.write_model(tmp_path, in_memory(seed=1), "float32")
    (tmp_path / "model.safetensors").rename(tmp_path / "tuned.safetensors")
    huggingface.write_model(tmp_path, in_memory(seed=2), "float32")
    assert same(open_model(tmp_path / "tuned.safetensors"), in_memory(seed=1))
    assert same(open_model(tmp_path), in_memory(seed=2))


def rewrite(folder: Path, change: Any) -> None:
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_openais_own_names_masks_and_a_repeated_head(tmp_path: Path) -> None:
    huggingface.write_model(tmp_path, in_memory(), "float32")

    def as_uploaded(t: dict[str, np.ndarray]) -> None:
        for name in list(t):
            t[name.removeprefix("transformer.")] = t.pop(name)
        t["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
        t["lm_head.weight"] = t["wte.weight"].copy()

    rewrite(tmp_path, as_uploaded)
    assert same(open_model(tmp_path), in_memory())


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "model.unsupported", "transformer.h.1.ln_2.bias"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "model.unsupported", "extra"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((16, 8), np.int8)}), "file.corrupt", "I8 (16, 8)"),
        (lambda t: t.update({"lm_head.weight": np.ones((300, 8), np.float32)}), "model.unsupported", "lm_head.weight"),
        ({"model_type": "gpt_neo"}, "model.unsupported", "'gpt_neo'"),
        ({"n_layer": 2.0}, "file.corrupt", "n_layer"),
        ({"n_layer": 10**9}, "file.corrupt", "1,000,000,000 layers"),
        ({"n_head": 3}, "file.corrupt", "3 heads"),
        ({"activation_function": "relu"}, "model.unsupported", "activation_function is 'relu'"),
        ({"n_inner": 7}, "model.unsupported", "n_inner"),
        ("[" * 100_000, "file.corrupt", "config.json"),
        ('{"n_layer": ' + "9" * 10_000 + "}", "file.corrupt", "config.json"),
        ("\xff", "file.corrupt", "config.json"),
    ],
)
def test_another_model(tmp_path: Path, change: Any, code: str, name: str) -> None:
    """Tensors, values of config.json, or its whole text."""
    huggingface.write_model(tmp_path, in_memory(), "float32")
    if callable(change):
        rewrite(tmp_path, change)
    else:
        path = tmp_path / "config.json"
        text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text("utf-8")) | change)
        path.write_text(text, encoding="latin-1")
    with refused(code, tmp_path, name):
        open_model(tmp_path)


def test_shards_that_are_missing_or_elsewhere(tmp_path: Path) -> None:
    sharded(tmp_path / "a", in_memory())
    index = tmp_path / "a" / huggingface.INDEX_FILE
    good = json.loads(index.read_text("utf-8"))
    for bad in ({"wte.weight": "../../etc/passwd"}, {"wte.weight": 3}, {}, []):
        index.write_text(json.dumps({"weight_map": bad}), encoding="utf-8")
        with refused("file.corrupt", index):
            open_model(tmp_path / "a")
    index.write_text(json.dumps(good), encoding="utf-8")
    (tmp_path / "a" / "model-00002-of-00002.safetensors").unlink()
    with refused("model.missing", "model-00002"):
        open_model(tmp_path / "a")


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        ({1: 4}, "model.unsupported-version", "version 4"),
        ({4: 1 << 30}, "file.wrong-size", "cut off"),
        ({6: -8}, "file.corrupt", "channels is -8"),
        ({3: 400}, "file.corrupt", "384"),
        ({2: 2**31 - 1, 3: 2**31 - 128, 4: 2**31 - 1, 5: 1, 6: 2**31 - 1, 7: 2**31 - 128}, "file.wrong-size", ""),
    ],
)
def test_bad_headers_allocate_nothing(tmp_path: Path, words: dict[int, int], code: str, name: str) -> None:
    path = tmp_path / "a.bin"
    llmc.write_model(path, in_memory(), "float32")
    header = np.fromfile(path, "<i4", 256)
    for i, value in words.items():
        header[i] = value
    path.write_bytes(header.tobytes() + path.read_bytes()[1024:])
    tracemalloc.start()
    with refused(code, path, name):
        open_model(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_paths_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    for content, code, name in (
        (b"", "model.unsupported-format", "nothing"),
        (b"GGUF\3\0\0\0....", "model.unsupported-format", "GGUF"),
        (b"PK\3\4........", "model.pickle", "PyTorch"),
        (b"version https://git-lfs.github.com/spec/v1\n", "file.lfs-pointer", ""),
        ((1 << 62).to_bytes(8, "little") + b"{}", "file.corrupt", ""),
        (np.array([20240527, 1, 3], "<i4").tobytes(), "model.unsupported-format", "optimizer state"),
    ):
        path.write_bytes(content)
        with refused(code, path, name):
            open_model(path)
    with refused("model.missing", tmp_path):
        open_model(tmp_path)
    with refused("file.missing", "nothing", "No such file or directory"):
        open_model(tmp_path / "nothing")


def test_a_model_must_be_finite(tmp_path: Path) -> None:
    source = in_memory()
    source.read("mlp_fc_b")[1, 3] = np.inf
    llmc.write_model(tmp_path / "a.bin", source, "float32")
    params = GPT2(TINY, Laptop()).params
    with refused("model.not-finite", "a.bin", "mlp_fc_b"):
        open_model(tmp_path / "a.bin").fill(params)


def test_rounding_is_to_nearest_even_and_never_to_infinity() -> None:
    words = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32)
    rounded = cast(words.view(np.float32), "bfloat16", "x").view(np.uint16)
    assert [hex(w) for w in rounded] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80"]
    with refused("convert.overflow", "float16"):
        cast(np.array([1e5], np.float32), "float16", "x")
    assert np.isinf(cast(np.array([np.inf], np.float32), "float16", "x"))


def test_debug_state(tmp_path: Path) -> None:
    rng, gradients, path = np.random.default_rng(0), in_memory(seed=9), tmp_path / "debug.bin"
    tokens, targets = rng.integers(0, TINY.vocab_size, (2, 3, 5), dtype=np.int32)
    logits = rng.normal(size=(3, 5, TINY.vocab_size)).astype(np.float32)
    write_debug(path, llmc.DebugState(tokens, targets, logits, 1.25, gradients.read))
    *arrays, loss, gradient = llmc.read_debug(path, TINY)
    assert loss == 1.25
    assert all(np.array_equal(x, y) for x, y in zip(arrays, (tokens, targets, logits), strict=True))
    assert all(np.array_equal(gradient(name), gradients.read(name)) for name in llmc.ORDER)
    content = path.read_bytes()
    another = content[:1024] + np.int32(TINY.vocab_size).tobytes() + content[1028:]
    for bad, code in ((another, "file.corrupt"), (content[:-1], "file.wrong-size")):
        path.write_bytes(bad)
        with refused(code, path):
            llmc.read_debug(path, TINY)


# llmpy convert


@pytest.mark.parametrize(
    ("target", "arguments", "dtype"),
    [
        ("out.bin", ["--dtype", "bfloat16"], "bfloat16"),
        ("out", ["--dtype", "bfloat16"], "bfloat16"),
        ("out", ["--to", "native"], "float32"),
        ("out.safetensors", [], "float32"),
        ("out", ["--to", "llmc"], "float32"),
    ],
)
def test_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, arguments: list[str], dtype: str
) -> None:
    source = with_tokenizer(in_memory(dtype="bfloat16" if dtype == "bfloat16" else "float32"), tmp_path / "t.json")
    native.write_model(tmp_path / "run", source)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / target), *arguments]) == 0
    found = open_model(tmp_path / target)
    if dtype != "float32" and target == "out":  # the dtype is kept if supported
        assert main(["convert", str(tmp_path / target), str(tmp_path / "again.bin")]) == 0
        assert open_model(tmp_path / "again.bin").dtype == dtype
    assert same(found, source) if dtype == "float32" else found.dtype == dtype
    assert "model of llmpy, float32, 2 layers" in (out := capsys.readouterr().out)
    assert f"{dtype}, " in out
    if (tmp_path / target).is_dir():
        assert found.tokenizer is not None
        assert Tokenizer.load(found.tokenizer).encode("abc") == [97, 98, 99]
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / target), *arguments]) == 1
    assert "[file.exists]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "name", "code"),
    [
        ("run out.txt", "out.txt", "convert.unknown-format"),
        ("run out.bin --dtype float16", "Use float32 or bfloat16", "convert.unsupported-dtype"),
        ("run out --to native --dtype bfloat16", "Use float32", "convert.unsupported-dtype"),
        ("nowhere out", "OWNER/NAME on the hub, or a path [", "model.missing"),
        ("run run/model.safetensors/x.bin", "model.safetensors: File exists", "file.unwritable"),
        ("run run --to llmc", "run exists", "file.exists"),
    ],
)
def test_convert_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, name: str, code: str) -> None:
    native.write_model(tmp_path / "run", in_memory())
    words = line.split()
    paths = [str(tmp_path / word) for word in words[:2]]
    assert main(["convert", *paths, *words[2:]]) == 1
    assert name in (err := capsys.readouterr().err) and f"[{code}]" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_convert_creates_folders_and_keeps_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = replace(TINY, vocab_size=257)
    native.write_model(tmp_path / "run", with_tokenizer(in_memory(words), tmp_path / "t.json"))
    there = tmp_path / "run"
    for target, file in (
        ("a/b/m.bin", "m.tokenizer.json"),
        ("c/m.safetensors", "m.tokenizer.json"),
        ("d", "tokenizer.json"),
        ("f/n.bin", "n.tokenizer.json"),
    ):
        assert main(["convert", str(there), str(tmp_path / target)]) == 0
        there = tmp_path / target
        lines = capsys.readouterr().out.splitlines()
        assert (f"wrote tokenizer {there.with_name(file)}" in lines) == ("." in target)
        assert there.with_name(LLMC_FILE).exists() == (there.suffix == ".bin")
        source = open_model(there)
        assert source.tokenizer == (there if target == "d" else there.parent) / file
        assert Tokenizer.load(source.tokenizer).same_tokens(Tokenizer.bytes())
    # llm.c's tokenizer of another model is ignored
    llmc.write_model(tmp_path / "f" / "other.bin", in_memory(), "float32")
    assert open_model(tmp_path / "f" / "other.bin").tokenizer is None


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_models_of_one_folder_keep_their_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """Though both have the same number of tokens."""
    source = in_memory(replace(TINY, vocab_size=260))
    learnt = {name: Tokenizer.train([text * 20], 260) for name, text in (("a", "the cat sat "), ("b", "le chat dort "))}
    for name, tokenizer in learnt.items():
        tokenizer.save(tmp_path / f"{name}.json")
        native.write_model(tmp_path / name, replace(source, tokenizer=tmp_path / f"{name}.json"))
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out" / f"{name}{suffix}")]) == 0
    assert ("which llm.c reads, is another model's" in capsys.readouterr().out) == (suffix == ".bin")
    for name, tokenizer in learnt.items():
        found = open_model(tmp_path / "out" / f"{name}{suffix}").tokenizer
        assert found is not None and Tokenizer.load(found).same_tokens(tokenizer)
    (tmp_path / "out" / f"a{suffix}").unlink()
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "out" / f"a{suffix}")]) == 1
    assert "a.tokenizer.json" in (err := capsys.readouterr().err) and "[file.exists]" in err
    assert not (tmp_path / "out" / f"a{suffix}").exists()


@pytest.mark.parametrize("write", [lambda path, source: llmc.write_model(path, source, "float32"), native.write_model])
def test_a_tokenizer_in_the_folder_must_fit_the_model(tmp_path: Path, write: Any) -> None:
    """It may belong to another model of the folder."""
    path, named, table = tmp_path / "m.safetensors", tmp_path / "tokenizer.json", tmp_path / LLMC_FILE
    write(path, in_memory(replace(TINY, vocab_size=260)))

    def found() -> Path | None:
        return open_model(path).tokenizer

    learnt = {size: Tokenizer.train(["the cat sat on the mat " * 20], size) for size in (260, 263)}
    assert found() is None
    learnt[263].save(named)
    assert found() is None
    write_llmc(table, learnt[260].ranks())
    assert found() == table
    Tokenizer.bytes().save(named)  # the vocabulary may be padded, but the other one fits
    assert found() == table
    table.write_bytes(b"x")
    assert found() == named
    named.write_bytes(b"{}")  # reported on use
    assert found() == named
    Tokenizer.bytes().save(tmp_path / "m.tokenizer.json")
    assert found() == tmp_path / "m.tokenizer.json"


def test_a_tokenizer_of_another_model_is_ignored(tmp_path: Path) -> None:
    """If it is larger or much smaller. A tokenizer named after the model's file is the model's."""
    path = tmp_path / "m.bin"
    llmc.write_model(path, in_memory(replace(TINY, vocab_size=400)), "float32")
    for size in (257, 420):
        Tokenizer.train([" ".join(map(str, range(1000)))], size).save(tmp_path / "tokenizer.json")
        with refused("tokenizer.missing", path, "m.tokenizer.json"):
            tokenizer_of(resolve(str(path), print), print)
    Tokenizer.bytes().save(tmp_path / "m.tokenizer.json")
    assert resolve(str(path), print).config.vocab_size == 257


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        huggingface.write_model(tmp_path / "m", with_tokenizer(in_memory(), tmp_path / "t.json"), "float32")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "m").iterdir()} == {"0o640"}


# GGUF, read back by the library that wrote it


def gguf_read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields and the tensors."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("gguf")
    source = with_tokenizer(in_memory(dtype=dtype), tmp_path / "t.json")
    huggingface.write_model(tmp_path / "hf", source, "float32")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "m.gguf"), "--dtype", dtype]) == 0
    value, tensors = gguf_read(tmp_path / "m.gguf")
    assert len(tensors) == 4 + 12 * TINY.layers
    for name, theirs in (
        ("wte", "token_embd.weight"), ("wpe", "position_embd.weight"), ("ln_f_b", "output_norm.bias"),
        ("attn_qkv_w", "blk.1.attn_qkv.weight"), ("mlp_proj_w", "blk.1.ffn_down.weight"),
        ("ln_2_w", "blk.1.ffn_norm.weight"),
    ):  # fmt: skip
        found, want = tensors[theirs], source.read(name)[: TINY.vocab_size]
        want = want[1] if theirs.startswith("blk") else want
        kind = dtype if want.ndim == 2 and name != "wpe" else "float32"
        assert found.tensor_type.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[kind]
        assert list(found.shape) == list(want.shape[::-1])
        assert found.data.tobytes() == want.astype(DTYPES[kind]).tobytes()
    assert value["general.architecture"] == "gpt2"
    assert (value["gpt2.block_count"], value["gpt2.context_length"], value["gpt2.embedding_length"]) == (2, 16, 8)
    assert (value["gpt2.attention.head_count"], value["gpt2.feed_forward_length"]) == (2, 32)
    assert len(value["tokenizer.ggml.tokens"]) == TINY.vocab_size
    assert value["tokenizer.ggml.eos_token_id"] == 256
    assert value["tokenizer.ggml.pre"] == "gpt-2"


def test_gguf_in_int8(tmp_path: Path) -> None:
    """As llama.cpp's own program quantises it; a row that is not whole blocks stays float32."""
    gguf = pytest.importorskip("gguf")
    c = ModelConfig(layers=1, heads=2, channels=64, context=8, vocab_size=40)
    for config, kind in ((c, "Q8_0"), (replace(c, channels=24), "F32")):
        source = in_memory(config)
        huggingface.write_model(tmp_path / kind, source, "float32")
        file = tmp_path / f"{kind}.gguf"
        assert main(["convert", str(tmp_path / kind), str(file), "--dtype", "q8_0"]) == 0
        _, tensors = gguf_read(file)
        found, want = tensors["blk.0.ffn_up.weight"], source.read("mlp_fc_w")[0]
        assert found.tensor_type.name == kind
        assert tensors["position_embd.weight"].tensor_type.name == tensors["output_norm.bias"].tensor_type.name == "F32"
        read = gguf.dequantize(found.data, found.tensor_type)
        blocks = want.reshape(*want.shape[:-1], -1, 32) if kind == "Q8_0" else want
        half_a_step, scale = 1 / 254, 2.0**-11  # rounding of an int8, and of its float16 scale
        bound = np.abs(blocks).max(-1, keepdims=True) * (half_a_step + scale) if kind == "Q8_0" else 0.0
        assert read.shape == want.shape
        assert (np.abs(read.reshape(blocks.shape) - blocks) <= bound).all()
    assert main(["convert", str(tmp_path / "F32"), str(tmp_path / "out"), "--to", "hf", "--dtype", "q8_0"]) == 1


def test_gguf_with_the_tokenizer_of_llama_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's "llama-bpe" gives the same ids (dev/LOG.md). GGUF cannot express other ways to split words."""
    pytest.importorskip("gguf")
    path = tmp_path / "tokenizer.json"
    V = llama_tokenizer(path).get_vocab_size()
    write = ["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "m.gguf")]
    native.write_model(tmp_path / "m.safetensors", in_memory(replace(TINY, vocab_size=V)))
    assert main(write) == 0
    value, _ = gguf_read(tmp_path / "m.gguf")
    assert value["tokenizer.ggml.pre"] == "llama-bpe"
    assert value["tokenizer.ggml.tokens"][-3] == "<|begin_of_text|>"
    assert value["tokenizer.ggml.eos_token_id"] == V - 3
    assert value["tokenizer.ggml.token_type"] == [1] * (V - 3) + [3] * 3
    for before, after in ((r"\\p{N}{1,3}", r"\\p{N}"), ('"ignore_merges": true', '"ignore_merges": false')):
        llama_tokenizer(path)
        assert before in (text := path.read_text("utf-8"))
        path.write_text(text.replace(before, after), "utf-8")
        (tmp_path / "m.gguf").unlink(missing_ok=True)
        assert main(write) == 1
        assert "[tokenizer.unsupported]" in capsys.readouterr().err


def test_gguf_without_a_tokenizer_and_without_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    llmc.write_model(tmp_path / "m.bin", in_memory(), "float32")
    assert main(["convert", str(tmp_path / "m.bin"), str(tmp_path / "ids.gguf")]) == 0
    assert gguf_read(tmp_path / "ids.gguf")[0]["tokenizer.ggml.model"] == "none"
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["convert", str(tmp_path / "m.bin"), str(tmp_path / "m.gguf")]) == 1
    assert "pip install 'llmpy[gguf]'" in capsys.readouterr().err


def test_a_run_folder_stays_a_run_folder(tmp_path: Path) -> None:
    """The weights' metadata identify it, though Hugging Face's folders have a config.json too."""
    native.write_model(tmp_path / "run", in_memory())
    (tmp_path / "run" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert open_model(tmp_path / "run").what == "model of llmpy"
    assert checkpoint.read_header(tmp_path / "run" / "model.safetensors").config == TINY


TARGETS = ("out", "out.bin", "out.safetensors", "out.gguf", "native", "llmc-run")


def converting(folder: Path, target: str, source: Source) -> list[str]:
    """Write the model to a target of TARGETS in a folder; return the log."""
    log: list[str] = []
    to = convert.format_of(folder / target, target if target in ("native", "llmc-run") else None)
    state = training_state(source.config) if target == "llmc-run" else None
    convert.write(source, folder / target, to, None, log.append, state)
    return log


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of the size of files")
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, target: str, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_tokenizer(in_memory(), tmp_path / "t.json")
    folder = tmp_path / "new" / "er"
    if made and "." not in target:
        (folder / target).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 10, 1000, 3000, 10_000):  # bytes of the largest file that can be written: also by libraries
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with refused("file.unwritable", folder):
                converting(folder, target, source)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(tmp_path.rglob("*")) == before
    for name in ("sync", "sync_folder", "replace"):
        for at in itertools.count():
            calls, true = itertools.count(), getattr(durable, name)

            def failing(*arguments: Any, true: Any = true, calls: Any = calls, at: int = at) -> None:
                if next(calls) == at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                true(*arguments)

            monkeypatch.setattr(durable, name, failing)
            try:
                converting(folder, target, source)
            except LlmpyError as error:
                assert error.code == "file.unwritable"  # noqa: PT017
            finally:
                monkeypatch.setattr(durable, name, true)
            if at >= next(calls) - 1:  # none failed
                break
            left = set(tmp_path.rglob("*")) - set(before)
            complete = (folder / target).exists() and name == "sync_folder"  # renamed, and not known to be durable
            assert complete or not left
            for path in sorted(left, reverse=True):
                durable.remove(path)
        for path in sorted(set(tmp_path.rglob("*")) - set(before), reverse=True):
            durable.remove(path)
    staging(folder / target).mkdir(parents=True)  # as a killed process leaves it
    converting(folder, target, source)
    assert not list(tmp_path.rglob(".*"))
    if target not in ("out.gguf", "llmc-run"):
        assert same(open_model(folder / target), source)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", TARGETS)
def test_a_model_that_is_not_finite_is_not_converted(tmp_path: Path, target: str, value: float) -> None:
    source = in_memory()
    source.read("mlp_fc_b")[1, 3] = value
    with refused("model.not-finite", "mlp_fc_b", "memory"):
        converting(tmp_path, target, source)
    assert not list(tmp_path.iterdir())
