"""Build wheel and sdist, install the wheel into clean environments, and run every verb outside the repository.

make test-wheel ARGS=[FOLDER for the files]: needs the network. The sdist must build the same wheel. Without extras,
only drawing, servers and GGUF may fail, and must name the missing package.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmpy.cli.main import VERBS

ROOT = Path(__file__).parents[1]
EXTRAS = "plot,parquet,gguf,serve,trackers,mpi"
CHAT = '{"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the mat."}]}\n'
FETCH = "import sys, urllib.request as r; [r.urlopen(sys.argv[1] + name, timeout=60).read() for name in sys.argv[2:]]"
SERVED = {"watch run": ("", "page.js", "page.css"), "serve run --port 0": ("v1/models",)}
COMMANDS = [line.strip() for line in """
data my.jsonl --tokenizer bpe:300 --out tokens; train --recipe gpt2_124M --data tokens --print-config
train --data tokens --model d1 -B 2 -T 32 --steps 4 --eval-batches 1 --sample-tokens 4 --out run
train --resume run --steps 6; sample run --prompt "Where is" --tokens 4; chat run; report run
watch run; serve run --port 0; plot run -o run.svg; plot run -o run.html; plot run; convert run my-gpt2
convert run my.gguf; plan --model d1; doctor; selftest; warmup; completion bash
bench step --model d1 -B 1 -T 16 --steps 1; bench ops --op activation_backward; bench decode --model d1 --tokens 4
bench peers --model d1 -B 1 -T 16 --rounds 1 --steps 1
""".strip().replace("\n", ";").split(";")]  # fmt: skip


def call(*words: object, code: int = 0, folder: Path = ROOT) -> str:
    """Run a command and return its output; stop if it ends otherwise."""
    more = {"cwd": folder, "input": "Where?\n", "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **more)  # type: ignore[call-overload]
    if done.returncode != code:
        sys.exit(f"{words} ended with {done.returncode}, not {code}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


def check_verbs(llmpy: Path, folder: Path, extras: str) -> None:
    """Run every verb in a new folder. Servers must answer."""
    folder.mkdir()
    (folder / "my.jsonl").write_text(CHAT * 400)
    for line in COMMANDS:
        if line in SERVED and extras:
            with subprocess.Popen([llmpy, *line.split()], cwd=folder, stdout=subprocess.PIPE, text=True) as server:
                try:
                    rows = server.stdout or ()
                    address = next(found[0] for row in rows if (found := re.search(r"http://[^/]+/", row)))
                    call(sys.executable, "-c", FETCH, address, *SERVED[line])
                finally:
                    server.terminate()
            continue
        lacks = not extras and line.startswith((*SERVED, "plot", "convert run my.gguf"))
        text = call(llmpy, *shlex.split(line), code=lacks, folder=folder)
        assert not lacks or "[package.missing]" in text, text


def main(*out: str) -> None:
    assert {verb.name for verb in VERBS} <= {" ".join(line.split()[:n]) for line in COMMANDS for n in (1, 2)}
    if existing := [path for path in out if Path(path).exists()]:
        sys.exit(f"{existing[0]} exists: remove it, or name another folder")
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # it keeps files that have since been removed or renamed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builder = folder / "builder" / "bin" / "python"
        call(sys.executable, "-m", "venv", folder / "builder")
        call(builder, "-m", "pip", "install", "--quiet", "build", "twine")
        call(builder, "-m", "build", "--wheel", "--outdir", folder / "tree", ROOT)
        call(builder, "-m", "build", "--outdir", folder / "dist", ROOT)  # the wheel is built from the sdist
        (wheel,), (sdist,), (tree,) = (folder.glob(p) for p in ("dist/*.whl", "dist/*.gz", "tree/*"))
        assert contents(wheel) == contents(tree), "the sdist builds another wheel"
        print(call(builder, "-m", "twine", "check", "--strict", wheel, sdist).strip())
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes; {sdist.name}: {sdist.stat().st_size:,}")
        for extras in ("", EXTRAS):
            home, sizes = folder / f"with-{extras}", []
            python = home / "bin" / "python"
            for words in (
                [sys.executable, "-m", "venv", home],
                [python, "-m", "pip", "install", f"{wheel}[{extras}]".removesuffix("[]")],
            ):
                call(*words)
                sizes.append(int(call("du", "-sk", home).split()[0]))
            call(python, "-m", "pip", "check")
            print(f"installed with [{extras}]: {(sizes[1] - sizes[0]) / 1000:,.0f} MB")
            check_verbs(home / "bin" / "llmpy", folder / f"work {extras}", extras)
        for path in out:
            shutil.copytree(folder / "dist", path)


if __name__ == "__main__":
    main(*sys.argv[1:])
