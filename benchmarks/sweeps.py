"""Run the committed sweeps, adding to ``results/*.csv``, and draw their figures; stopped, each goes on where it was.

python benchmarks/sweeps.py layers          # results/layers.csv, docs/layers*.png
python benchmarks/sweeps.py methods         # results/methods.csv, docs/methods*.png
python benchmarks/sweeps.py layers --draw   # the figures alone
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rmu.commands.sweep import parse_sweep
from rmu.sweep import run_sweep
from rmu.sweep_figures import table, write_figures
from rmu.sweep_results import last_sweep, outcomes, pareto_front, read_rows

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"layers": "layer_sweep.yaml", "methods": "method_sweep.yaml"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<name>.csv")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs")
    arguments, overrides = parser.parse_known_args()
    results = arguments.results or ROOT / "benchmarks" / "results" / f"{arguments.name}.csv"
    if not arguments.draw:
        config = str(ROOT / "benchmarks" / CONFIGS[arguments.name])
        run_sweep(*parse_sweep(["--config", config, *overrides, "--results", str(results)]))
    found = outcomes(last_sweep(read_rows(results)))
    print(table(pareto_front(found)))
    print(*write_figures(found, arguments.figures / arguments.name), sep="\n")


if __name__ == "__main__":
    main()
