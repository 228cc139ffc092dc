"""The limits of a container are those of its control group and of every parent, in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmpy.system import resources
from llmpy.system.resources import available_memory, container_cores, container_memory

V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), ("memory.max", "memory.current", "inactive_file")  # fmt: skip  # noqa: E501
UNLIMITED = str((1 << 63) - 4096)  # version 1


def group(folder: Path, limit: str, usage: int = 70, cache: int = 60, names: tuple[str, ...] = V2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(usage)), strict=False):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\nzzz 5\n")


def quota(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


# membership, the groups with (limit, usage, reclaimable), the version; what is left
MEMORY = {
    "no groups": ("", {}, V2, None),
    "the root is the container": ("0::/", {"": ("7000", 70, 60)}, V2, 6990),
    "without a limit": ("0::/", {"": ("max", 70, 60)}, V2, None),
    "an own group": ("0::/a/b", {"a/b": ("7000", 70, 60), "": ("max", 0, 0)}, V2, 6990),
    "a parent": ("0::/a/b", {"a/b": ("max", 10, 0), "a": ("500", 100, 30)}, V2, 430),
    "the smaller one": ("0::/a/b", {"a/b": ("300", 10, 0), "a": ("500", 400, 30)}, V2, 130),
    "a sibling": ("0::/a/b", {"a/c": ("5", 1, 0), "a": ("500", 0, 0)}, V2, 500),
    "above the limit": ("0::/a", {"a": ("100", 150, 20)}, V2, -30),
    "another namespace's path": ("0::/docker/x", {"": ("900", 100, 0)}, V2, 800),
    "a path from outside": ("0::/../a", {"": ("900", 100, 0), "a": ("1", 0, 0)}, V2, 800),
    "no membership": ("", {"": ("900", 100, 0)}, V2, 800),
    "v1": ("5:cpu:/\n4:memory:/a\n0::/", {"memory/a": ("900", 100, 50)}, V1, 850),
    "v1, a parent": ("4:memory:/a/b", {"memory/a/b": (UNLIMITED, 9, 0), "memory/a": ("900", 9, 5)}, V1, 896),
    "v1, the container is the root": ("4:memory:/docker/x", {"memory": ("900", 100, 50)}, V1, 850),
    "v1, with another controller": ("4:hugetlb,memory:/a", {"hugetlb,memory/a": ("900", 100, 0)}, V1, 800),
    "both": ("4:memory:/a\n0::/b", {"memory/a": ("900", 100, 0)}, V1, 800),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORY)
def test_memory_of_containers(case: str, tmp_path: Path) -> None:
    lines, groups, names, left = MEMORY[case]
    (own := tmp_path / "own").write_text(lines + "\n" if lines else "")
    for path, (limit, usage, cache) in groups.items():
        group(tmp_path / "cgroup" / path, limit, usage, cache, names)
    found = container_memory(tmp_path / "cgroup", own)
    assert found == left


def test_soft_limits_missing_files_and_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "missing"
    group(tmp_path, "9000")
    (tmp_path / "memory.high").write_text("800\n")
    assert container_memory(tmp_path, own) == 790
    (tmp_path / "memory.stat").unlink()
    assert container_memory(tmp_path, own) == 730
    monkeypatch.setattr(resources, "container_memory", lambda: 730)
    assert available_memory() == 730
    monkeypatch.setattr(resources, "container_memory", lambda: -1)
    assert available_memory() == 0


# membership, files by group; cores
CORES = {
    "v2": ("0::/a/b", {"a/b": {"cpu_max": "max 100000"}, "a": {"cpu_max": "300000 200000"}}, 1.5),
    "v2, without a limit": ("0::/", {"": {"cpu_max": "max 100000"}}, None),
    "v1": ("1:cpu,cpuacct:/a", {"cpu,cpuacct/a": {"cpu_cfs_quota_us": "50000", "cpu_cfs_period_us": "20000"}}, 2.5),
    "v1, a parent": (
        "1:cpu:/a/b",
        {"cpu/a/b": {"cpu_cfs_quota_us": "-1", "cpu_cfs_period_us": "1"},
         "cpu/a": {"cpu_cfs_quota_us": "4", "cpu_cfs_period_us": "2"}}, 2,
    ),
    "v1, without a limit": ("1:cpu:/", {"cpu": {"cpu_cfs_quota_us": "-1", "cpu_cfs_period_us": "1"}}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CORES)
def test_cores_of_containers(case: str, tmp_path: Path) -> None:
    lines, groups, cores = CORES[case]
    (own := tmp_path / "own").write_text(lines + "\n")
    for path, files in groups.items():
        quota(tmp_path / "cgroup" / path, **files)
    assert container_cores(tmp_path / "cgroup", own) == cores
