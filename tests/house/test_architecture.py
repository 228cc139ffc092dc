"""Folders are floors: a file imports from its own folder and from those below it, never from above.

Read from the source with `ast`, so that an import inside a function counts too. Inside backend/cpu imports point from
the operations down to gemm, simd and jit.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llmpy

PACKAGE = Path(llmpy.__file__).parent
SOURCES = {
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}
CPU = "llmpy.backend.cpu"

# Top to bottom, with the reason of each floor's height. Neighbours on one line may use each other, without a circle.
FLOORS = (
    ("cli",),  # the command line drives everything; nothing may need it, so that Python and tests do not either
    ("tools", "bench", "watch"),  # they look at machines, models and runs from outside
    ("api",),  # `import llmpy` is the command line's equal: it has no words of its own for flags
    ("distributed",),  # ranks replace the world, optimizer and checkpoints of one process; training asks for none
    ("train",),  # the loop, which samples but is not needed to sample
    ("generate",),  # decoding needs a model, whatever file it came from
    ("formats",),  # other programs' files become ours: they know run folders and data, no trainer and no machine
    ("run",),  # where a run lives: its folder, checkpoints, logs; it knows a model's table, no file of others
    ("data",),  # text and tokens: no model, so that preparing data loads no kernel
    ("options",),  # what a user may say; it touches no disk
    ("model",),  # handed its operations: it imports no kernel
    ("backend",),  # kernels take arrays and scalars, never a config
    ("system",),  # files, terminals, downloads: nothing of this project's subject
    ("errors", "rng", "version", ""),  # everything may use them
)
ENTRANCES = {"llmpy", "llmpy.__main__"}  # they show what lies above; asked for, they are no more than a version
HEIGHT_OF = {name: -height for height, names in enumerate(FLOORS) for name in names}
# What the floors allow and a module must not import all the same.
FORBIDDEN = [
    # from                        to                             why
    ("llmpy.model", ("llmpy.backend.cpu", "llmpy.backend.reference"), "the model is handed its operations"),
    ("llmpy.model.arena", ("llmpy.",), "an arena knows its table alone"),
    ("llmpy.formats", ("llmpy.backend",), "a file knows no machine"),
    ("llmpy.data", ("llmpy.model.gpt2", "llmpy.backend"), "data knows no model"),
    ("llmpy.backend.reference", (CPU,), "a specification stands alone"),
    (CPU, ("llmpy.backend.reference",), "the backend does not lean on its own specification"),
]
# Height inside the CPU backend: a module imports only from below. Everything else is an operation.
HEIGHT = {"pool": -1, "jit": 0, "simd": 1, "gelu": 2, "gemm": 2, "decode": 4, "": 9}
OPERATION = 3
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
Graph = dict[str, set[str]]


def below(module: str, prefix: str) -> bool:
    """Whether `prefix` stands for `module`."""
    return module == prefix or module.startswith(prefix if prefix.endswith(".") else prefix + ".")


def imported(module: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute names of what the import statements among `nodes` bring into `module`."""
    found: set[str] = set()
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from .backend import cpu` names a module, `from .backend import Ops` something inside one.
            found |= {f"{origin}.{a.name}" if f"{origin}.{a.name}" in SOURCES else origin for a in node.names}
    return found


def imports() -> Graph:
    """Module → everything it imports, also inside functions."""
    return {module: imported(module, ast.walk(ast.parse(p.read_text("utf-8")))) for module, p in SOURCES.items()}


def height(module: str) -> int:
    name = module.removeprefix(CPU).lstrip(".")
    return HEIGHT.get(name.split(".")[0], OPERATION)


def floor(module: str) -> int:
    """How high the folder of a module stands; other packages lie below all."""
    name, _, inside = module.partition(".")
    if name != "llmpy":
        return -len(FLOORS)
    return HEIGHT_OF.get(inside.split(".")[0], 1)  # 1: __main__


def violations(graph: Graph) -> list[str]:
    """Every import that points the wrong way, with the reason."""
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            for source, prefixes, why in FORBIDDEN:
                if below(module, source) and any(below(target, p) for p in prefixes):
                    found.append(f"{module} imports {target}: {why}")
            if module not in ENTRANCES and floor(target) > floor(module):
                found.append(f"{module} imports {target}: it stands above")
            if below(target, CPU) and not below(module, "llmpy.backend"):
                found.append(f"{module} imports {target}: only backend.load names a kernel module")
            if below(module, CPU) and below(target, CPU) and height(target) >= height(module):
                found.append(f"{module} imports {target}: inside the CPU backend imports point down to jit")
            if target.split(".")[0] in UNSAFE:
                found.append(f"{module} imports {target}: loading it can run code")
    return found


def test_imports_point_one_way() -> None:
    assert violations(imports()) == []


def test_no_import_cycles() -> None:
    graph = imports()
    # The seam loads a backend when it is asked for one, by name; that is no import of the seam's own.
    graph["llmpy.backend"] -= {"llmpy.backend.cpu", "llmpy.backend.reference"}
    TopologicalSorter({module: targets - {module} for module, targets in graph.items()}).prepare()


def test_nothing_unpickles() -> None:
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_every_folder_is_a_floor() -> None:
    names = {name for floor in FLOORS for name in floor}
    assert {m.split(".")[1] for m in SOURCES if "." in m} - {"__main__"} == names - {""}


def test_no_file_name_twice() -> None:
    names = Counter(p.name for p in SOURCES.values() if p.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("llmpy.model.gpt2", "llmpy.backend.cpu"),
        ("llmpy.train.trainer", "llmpy.backend.cpu.gemm"),
        ("llmpy.train.trainer", "llmpy.cli.main"),
        ("llmpy.model.arena", "llmpy.model.config"),
        ("llmpy.data.shards", "llmpy.model.gpt2"),
        ("llmpy.system.durable", "llmpy.data.shards"),
        ("llmpy.backend.cpu.gemm", "llmpy.backend.cpu.linear"),
        ("llmpy.backend.cpu.linear", "llmpy.backend.cpu.attention"),
        ("llmpy.formats.native", "pickle"),
    ],
)
def test_the_rules_bite(module: str, target: str) -> None:
    assert violations({module: {target}})
