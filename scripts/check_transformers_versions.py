"""Run the training and command tests with several versions of transformers, each in an environment of its own.

python scripts/check_transformers_versions.py --folder /tmp/versions [--versions 4.57 5.23] [--tests tests/training]

An environment that is there already is used again. Prints a table; exits 1 when a version fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ["4.57", "5.0", "5.17", "5.23"]
TESTS = ["tests/training", "tests/cli/test_cli.py", "tests/cli/test_presets.py"]


def make_environment(folder: Path, version: str, torch: str) -> Path:
    """The Python of an environment with ``transformers==version.*`` and everything that the tests need."""
    python = folder / f"transformers-{version}" / "bin" / "python"
    if not (folder / f"transformers-{version}" / "installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        packages = [torch, f"transformers=={version}.*", "pytest", "pytest-timeout", "hypothesis"]
        extras = f"{ROOT}[demo,peft,loggers]"
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *packages, "--editable", extras], check=True
        )
        (python.parents[1] / "installed").touch()
    return python


def run_tests(python: Path, tests: list[str], log: Path) -> tuple[str, str]:
    """Version of transformers as installed, and pytest's last line; its output goes to ``log``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    code = "import transformers; print(transformers.__version__)"
    version = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=environment)
    with open(log, "w") as stream:
        subprocess.run(
            [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    lines = log.read_text().strip().splitlines()
    return version.stdout.strip(), lines[-1] if lines else "no output"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the environments and logs lie")
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement for torch")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for version in arguments.versions:
        python = make_environment(arguments.folder.resolve(), version, arguments.torch)
        log = arguments.folder / f"transformers-{version}.log"
        rows.append(run_tests(python, arguments.tests, log))
        print(*rows[-1], sep=": ", flush=True)
    print("\n| transformers | tests |\n|---|---|")
    for version, result in rows:
        print(f"| {version} | {result.strip('= ')} |")
    failed = [result for _, result in rows if re.search(r"failed|error|no output", result)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
