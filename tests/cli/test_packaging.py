"""The wheel holds everything that the command needs, and nothing of the tests."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_wheel_has_data_presets_tasks_and_licences(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    # A copy, so that the build leaves nothing in the tree.
    copy = tmp_path / "copy"
    for name in ("rmu", "rmu_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run([*command, str(copy)], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for folder, pattern in (
        ("rmu/presets", "*.yaml"),
        ("rmu/demo/data", "*"),
        ("rmu/demo/tasks", "*"),
        ("rmu", "*.py"),
        ("rmu_kernels", "*.py"),
    ):
        expected = {str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(pattern) if p.is_file()}
        assert expected and expected <= names, expected - names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
