"""Folders are floors: a module imports from its own folder and those below, never from above.

`ast` finds imports inside functions too. Inside backend/cpu, imports point from the operations down to gemm, simd, jit.
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

# Top to bottom, with the reason for each floor. Folders of one floor may import each other, without a cycle.
FLOORS = (
    ("cli",),  # drives everything; Python users and tests must not need it
    ("tools", "bench", "watch", "serve"),  # inspect machines, models and runs from outside, or serve them
    ("api",),  # `import llmpy` is on a par with the command line, without flags
    ("distributed",),  # replaces the world, optimizer and checkpoints of one process; training does not know it
    ("train",),  # the loop samples, but sampling does not need the loop
    ("generate",),  # decoding needs a model, independent of its file format
    ("formats",),  # convert other programs' files to ours: they know run folders and data, no trainer and no backend
    ("run",),  # folder, checkpoints and logs of a run; knows a model's table, no other program's files
    ("data",),  # text and tokens without a model, so that preparing data loads no kernel
    ("options",),  # values of flags; never reads the disk
    ("model",),  # receives its operations, so it imports no kernel
    ("backend",),  # kernels take arrays and scalars, never a config
    ("system",),  # files, terminals, downloads: nothing specific to this project
    ("errors", "rng", "version", ""),  # available to all
)
ENTRANCES = {"llmpy", "llmpy.__main__"}  # re-export what lies above, on demand
HEIGHT_OF = {name: -height for height, names in enumerate(FLOORS) for name in names}
# Imports that the floors would allow.
FORBIDDEN = [
    # from                        to                             reason
    ("llmpy.model", ("llmpy.backend.cpu", "llmpy.backend.reference"), "a model receives its operations"),
    ("llmpy.model.arena", ("llmpy.",), "an arena knows only its table"),
    ("llmpy.formats", ("llmpy.backend",), "a file format is independent of the machine"),
    ("llmpy.data", ("llmpy.model.gpt2", "llmpy.backend"), "data is independent of the model"),
    ("llmpy.backend.reference", (CPU,), "the reference is independent of what it checks"),
    (CPU, ("llmpy.backend.reference",), "the backend is independent of its reference"),
]
# Heights inside the CPU backend: a module imports only from below. All others are operations.
HEIGHT = {"pool": -1, "jit": 0, "amx": 0, "simd": 1, "activation": 2, "gemm": 2, "decode": 4, "int8": 5, "": 9}
OPERATION = 3
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
Graph = dict[str, set[str]]


def below(module: str, prefix: str) -> bool:
    """Return whether `module` is `prefix` or inside it."""
    return module == prefix or module.startswith(prefix if prefix.endswith(".") else prefix + ".")


def imported(module: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Return the absolute names that the import statements among `nodes` import into `module`."""
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
    """Return module → its imports, also those inside functions."""
    return {module: imported(module, ast.walk(ast.parse(p.read_text("utf-8")))) for module, p in SOURCES.items()}


def height(module: str) -> int:
    name = module.removeprefix(CPU).lstrip(".")
    return HEIGHT.get(name.split(".")[0], OPERATION)


def floor(module: str) -> int:
    """Return the height of a module's folder; other packages are below all."""
    name, _, inside = module.partition(".")
    if name != "llmpy":
        return -len(FLOORS)
    return HEIGHT_OF.get(inside.split(".")[0], 1)  # 1: __main__


def violations(graph: Graph) -> list[str]:
    """Return every forbidden import, with the reason."""
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            for source, prefixes, why in FORBIDDEN:
                if below(module, source) and any(below(target, p) for p in prefixes):
                    found.append(f"{module} imports {target}: {why}")
            if module not in ENTRANCES and floor(target) > floor(module):
                found.append(f"{module} imports {target}: a floor above")
            if below(target, CPU) and not below(module, "llmpy.backend"):
                found.append(f"{module} imports {target}: only backend.load names a kernel module")
            if below(module, CPU) and below(target, CPU) and height(target) >= height(module):
                found.append(f"{module} imports {target}: imports of the CPU backend point down to jit")
            if target.split(".")[0] in UNSAFE:
                found.append(f"{module} imports {target}: loading it can run code")
    return found


def test_imports_point_one_way() -> None:
    assert violations(imports()) == []


def test_no_import_cycles() -> None:
    graph = imports()
    # `backend.load` imports a backend on demand.
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
        ("llmpy.system.durable", "llmpy.data.shards"),
        ("llmpy.backend.cpu.linear", "llmpy.backend.cpu.attention"),
        ("llmpy.formats.native", "pickle"),
    ],
)
def test_violations_are_found(module: str, target: str) -> None:
    assert violations({module: {target}})
