"""Imports point one way: cli → trainer → gpt2 → arena, and backend → cpu → operations → gemm, simd → jit.

Read from the source with `ast`, so that an import inside a function counts too. A rule about a module
that does not exist holds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmpy

PACKAGE = Path(llmpy.__file__).parent
SOURCES = {
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}
CPU = "llmpy.backend.cpu"

# What a module must never import, for modules by prefix. A prefix stands for the module and all below it.
FORBIDDEN = [
    # from                  to                                       why
    ("llmpy.trainer", ("llmpy.cli",), "the trainer is driven by the command line"),
    ("llmpy.gpt2", ("llmpy.trainer", "llmpy.cli", "llmpy.data"), "the model knows no training loop"),
    ("llmpy.gpt2", (CPU, "llmpy.backend.reference"), "the model is handed its operations"),
    ("llmpy.gpt2", ("llmpy.decode", "llmpy.generate"), "the model knows no cache"),
    ("llmpy.arena", ("llmpy.",), "an arena knows its table alone"),
    ("llmpy.errors", ("llmpy.",), "everything may raise it"),
    ("llmpy.config", ("llmpy.gpt2", "llmpy.backend", "llmpy.trainer", "llmpy.cli", "llmpy.data"), "leaf"),
    ("llmpy.formats", ("llmpy.trainer", "llmpy.cli", "llmpy.backend"), "a file knows no machine"),
    ("llmpy.data", ("llmpy.gpt2", "llmpy.backend", "llmpy.trainer", "llmpy.cli"), "data knows no model"),
    (
        "llmpy.backend",
        ("llmpy.gpt2", "llmpy.arena", "llmpy.config", "llmpy.trainer", "llmpy.cli", "llmpy.data"),
        "kernels take arrays and scalars",
    ),
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


def imports(top_level_only: bool = False) -> Graph:
    """Module → everything it imports; `top_level_only` leaves out imports inside functions."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}
    return {
        module: imported(module, iter(tree.body) if top_level_only else ast.walk(tree))
        for module, tree in trees.items()
    }


def height(module: str) -> int:
    name = module.removeprefix(CPU).lstrip(".")
    return HEIGHT.get(name.split(".")[0], OPERATION)


def violations(graph: Graph) -> list[str]:
    """Every import that points the wrong way, with the reason."""
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            for source, prefixes, why in FORBIDDEN:
                if below(module, source) and any(below(target, p) for p in prefixes):
                    found.append(f"{module} imports {target}: {why}")
            if below(target, CPU) and not below(module, "llmpy.backend"):
                found.append(f"{module} imports {target}: only backend.load names a kernel module")
            if below(module, CPU) and below(target, CPU) and height(target) >= height(module):
                found.append(f"{module} imports {target}: inside the CPU backend imports point down to jit")
            if target.split(".")[0] in UNSAFE:
                found.append(f"{module} imports {target}: loading it can run code")
    return found


def cycle(graph: Graph) -> list[str]:
    """One cycle of imports, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in graph:
            return []
        for target in sorted(graph[module] - {module}):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_imports_point_one_way() -> None:
    assert violations(imports()) == []


def test_no_import_cycles() -> None:
    assert cycle(imports(top_level_only=True)) == []


def test_nothing_unpickles() -> None:
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("llmpy.gpt2", "llmpy.backend.cpu"),
        ("llmpy.gpt2", "llmpy.backend.reference"),
        ("llmpy.gpt2", "llmpy.trainer"),
        ("llmpy.trainer", "llmpy.backend.cpu.gemm"),
        ("llmpy.trainer", "llmpy.cli"),
        ("llmpy.arena", "llmpy.config"),
        ("llmpy.data.shards", "llmpy.gpt2"),
        ("llmpy.backend.cpu.jit", "llmpy.backend.cpu.simd"),
        ("llmpy.backend.cpu.simd", "llmpy.backend.cpu.gemm"),
        ("llmpy.backend.cpu.gemm", "llmpy.backend.cpu.linear"),
        ("llmpy.backend.cpu.linear", "llmpy.backend.cpu.attention"),
        ("llmpy.backend.cpu.linear", "llmpy.backend.cpu"),
        ("llmpy.formats.native", "pickle"),
        ("llmpy.formats.llmc", "llmpy.trainer"),
    ],
)
def test_the_rules_bite(module: str, target: str) -> None:
    assert violations({module: {target}})


def test_what_the_rules_allow() -> None:
    allowed = {
        "llmpy.cli": {"llmpy.trainer", "llmpy.backend"},
        "llmpy.trainer": {"llmpy.gpt2", "llmpy.backend", "llmpy.data"},
        "llmpy.gpt2": {"llmpy.arena", "llmpy.backend", "llmpy.config", "llmpy.errors"},
        "llmpy.backend": {"llmpy.backend.cpu", "llmpy.backend.reference", "llmpy.errors"},
        "llmpy.backend.cpu": {"llmpy.backend.cpu.linear", "llmpy.backend.cpu.jit"},
        "llmpy.backend.cpu.linear": {"llmpy.backend.cpu.gemm", "llmpy.backend.cpu.simd"},
    }
    assert violations(allowed) == []
    assert cycle(allowed) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
