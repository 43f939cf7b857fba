"""Run the demo with several seeds and append what it measured to ``results/demo.csv``.

python -m benchmarks.demo_seeds --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers

from benchmarks.results import revision
from rmu.demo.run import run_demo

RESULTS = Path(__file__).parent / "results" / "demo.csv"
COLUMNS = (
    "date revision machine torch transformers seed side task domain n before after "
    "perplexity_before perplexity_after train_seconds peak_memory_bytes"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", help="model folder or hub id (default: the demo's)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments, overrides = parser.parse_known_args()
    measured = revision(("rmu", "rmu_kernels"))
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results, _ = run_demo(
                Path(folder) / "demo", model=arguments.model, overrides=["--seed", str(seed), *overrides]
            )
        append(arguments.output, rows(results, seed, measured))


def rows(results: dict, seed: int, measured: str) -> list[dict]:
    """A row for each task and domain."""
    common = {
        "date": date.today().isoformat(),
        "revision": measured,
        "machine": results["machine"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": seed,
        "perplexity_before": round(results["before"]["perplexity"]["perplexity"], 3),
        "perplexity_after": round(results["after"]["perplexity"]["perplexity"], 3),
        "train_seconds": round(results["cost"]["train_seconds"], 1),
        "peak_memory_bytes": results["cost"]["peak_memory_bytes"],
    }
    pairs = zip(results["before"]["accuracy"], results["after"]["accuracy"], strict=True)
    return [
        common
        | {key: old[key] for key in ("side", "task", "domain", "n")}
        | {"before": round(old["accuracy"], 5), "after": round(new["accuracy"], 5)}
        for old, new in pairs
    ]


def append(path: Path, new: list[dict]) -> None:
    """Append rows to a CSV file, with a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(new)


if __name__ == "__main__":
    main()
