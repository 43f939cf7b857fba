"""Run the committed sweeps, adding to ``results/*.csv``, and draw their figures; stopped, each goes on where it was.

python -m benchmarks.sweeps layers         # results/layers.csv, docs/layers*.png, the layers in docs/paper.md
python -m benchmarks.sweeps methods         # results/methods.csv, docs/methods*.png
python -m benchmarks.sweeps layers --draw   # the figures alone
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.plot_demo import CHANCE
from benchmarks.results import ROOT
from benchmarks.tables import replace_between
from rmu.commands.sweep import parse_sweep
from rmu.sweep import run_sweep
from rmu.sweep_figures import strength, table, variant, write_figures
from rmu.sweep_results import Outcome, last_sweep, outcomes, pareto_front, read_rows

WORKS_RETAIN_POINTS = 5.0
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
    rows = last_sweep(read_rows(results))
    found = outcomes(rows)
    print(table(pareto_front(found)))
    print(*write_figures(found, arguments.figures / arguments.name), sep="\n")
    page = arguments.figures / "paper.md"
    if arguments.name == "layers" and page.exists():
        replace_between(page, "layers", layers_section(found, rows[-1]))


def works(outcome: Outcome) -> bool:
    """Whether a run forgot at least half of what was known above chance, for at most 5 points of retain accuracy."""
    return (
        outcome.forget - CHANCE <= (outcome.base_forget - CHANCE) / 2
        and outcome.retain_drop <= WORKS_RETAIN_POINTS
    )


def layers_section(found: list[Outcome], row: dict[str, Any]) -> str:
    """The layers in ``docs/paper.md``: how many layers each method and coefficient works at, and the figure."""
    layers = sorted({o.settings["layer"] for o in found})
    third = -(-len(layers) // 3)
    parts = [layers[i : i + third] for i in range(0, len(layers), third)]
    names = [f"layers {part[0]} to {part[-1]}" for part in parts]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(parts) + 1) + "|"]
    counts: dict[str, list[int]] = {}
    for o in found:
        letter = "beta" if o.settings["method"] == "adaptive" else "c"
        own = counts.setdefault(f"{variant(o)}, {letter} {strength(o)[0]:g}", [0] * len(parts))
        own[next(i for i, part in enumerate(parts) if o.settings["layer"] in part)] += works(o)
    lines += [
        f"| {name} | {' | '.join(f'{n} of {len(part)}' for n, part in zip(own, parts, strict=True))} |"
        for name, own in counts.items()
    ]
    late = {
        method: max(sum(own[1:]) for name, own in counts.items() if name.startswith(method))
        for method in ("RMU", "Adaptive")
    }
    verdict = (
        f"The claim {'holds' if late['Adaptive'] > late['RMU'] else 'does not hold'} here: in the upper two thirds RMU with its "
        f"best c works at {late['RMU']} layers, Adaptive RMU with its best beta at {late['Adaptive']}."
    )
    fixed = json.loads(row["fixed"])
    first = found[0]
    return "\n".join(
        [
            "```bash",
            "python -m benchmarks.sweeps layers",
            "```",
            "",
            f"At how many layers it works: forgets at least half of what is known above chance, for at most "
            f"{WORKS_RETAIN_POINTS:g} points of retain accuracy. {fixed['max_steps']} steps a run, one seed, validation questions "
            f"({row['forget_questions']} forget, {row['retain_questions']} retain); base model {100 * first.base_forget:.1f} and "
            f"{100 * first.base_retain:.1f} %.",
            "",
            *lines,
            "",
            f"{verdict} (Revision {row['revision']}, {row['date'][:10]}.)",
            "",
            "![Forget and retain accuracy over the hooked layer](layers.png)",
            "",
            "![The same for every layer and coefficient](layers_heat_map.png)",
        ]
    )


if __name__ == "__main__":
    main()
