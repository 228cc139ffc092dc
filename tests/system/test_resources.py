"""The limits of a container are read from its cgroup files."""

from __future__ import annotations

from pathlib import Path

from llmpy.system.resources import container_cores, container_memory


def test_limits_of_containers(tmp_path: Path) -> None:
    assert container_cores(tmp_path) is None
    assert container_memory(tmp_path) is None
    files = {
        "cpu.max": "300000 200000",
        "memory.max": "7000",
        "memory.current": "70",
        "memory.stat": "a 1\ninactive_file 60",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert container_cores(tmp_path) == 1.5
    assert container_memory(tmp_path) == 6990
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_cores(tmp_path) is None
    assert container_memory(tmp_path) is None
