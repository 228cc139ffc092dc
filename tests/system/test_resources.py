"""What a process may use is read from its container, version 1 or 2 of control groups."""

from __future__ import annotations

from pathlib import Path

from llmpy.system.resources import container_cores, container_memory


def test_limits_of_containers(tmp_path: Path) -> None:
    assert container_cores(tmp_path) is None
    assert container_memory(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    for name, text in (("quota", "150000"), ("period", "100000")):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(text)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("40\n")
    assert container_cores(tmp_path) == 1.5
    assert container_memory(tmp_path) == (5000, 40)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert container_cores(tmp_path) is None
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    (tmp_path / "memory.max").write_text("7000\n")
    (tmp_path / "memory.current").write_text("70\n")
    assert container_cores(tmp_path) == 3
    assert container_memory(tmp_path) == (7000, 70)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_cores(tmp_path) is None
    assert container_memory(tmp_path) == (5000, 40)
