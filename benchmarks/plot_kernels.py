"""Tables of the losses alone, and of what Adaptive RMU costs beyond RMU."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.bench_adaptive_cost import SCOPES
from benchmarks.cases import PROVIDERS
from benchmarks.tables import (
    DEVICES,
    NOT_MEASURED,
    Results,
    by_device,
    duration,
    is_true,
    present,
    size,
    speedup,
    table,
    where_measured,
)


def blocks(results: Results) -> dict[str, str]:
    return {
        "kernels": by_device(results, "kernels", kernel_table),
        "adaptive cost": adaptive_table(results),
    }


def kernel_table(rows: pd.DataFrame) -> str:
    """A line for each function, shape and mode."""
    header = ["function", "rows x features", "pass", *PROVIDERS, "ours: of a copy's speed"]
    header += [f"ours against {provider}" for provider in PROVIDERS[:-1]]
    header += [
        "host time",
        "launches",
        "memory: ours",
        "eager bf16",
        "error of the gradient: ours",
        "eager bf16",
    ]
    lines = []
    for key, group in rows.groupby(["function", "rows", "features", "masked", "mode"], sort=False):
        function, row_number, features, masked, mode = key
        providers: dict[str, Any] = {row.provider: row for row in group.itertuples()}
        name = function + (", 30 % masked" if masked else "")
        lines.append(
            [name, f"{row_number} x {features}", mode, *(time_cell(providers.get(p)) for p in PROVIDERS)]
            + comparison(providers)
        )
    empty = [all(line[i] == "—" for line in lines) for i in range(len(header))]
    keep = [i for i in range(len(header)) if not empty[i]]
    return table([header[i] for i in keep], [[line[i] for i in keep] for line in lines])


def time_cell(row: Any) -> str:
    if row is None:
        return "—"
    if present(row.note):
        return str(row.note).split(":")[0]
    return duration(row.milliseconds / 1000) + ("" if is_true(row.right) else ", wrong result")


def comparison(providers: dict[str, Any]) -> list[str]:
    """Against the copy and the other providers; then what a call costs in host time, launches, memory and exactness."""
    ours, copy, eager = (providers.get(name) for name in ("ours", "copy", "eager bf16"))
    share = "—"
    if ours is not None and copy is not None and is_true(ours.right):
        share = f"{100 * copy.milliseconds / ours.milliseconds:.0f} %"
    speedups = []
    for provider in PROVIDERS[:-1]:
        other = providers.get(provider)
        measured = (
            other is not None and ours is not None and not present(other.note) and not present(ours.note)
        )
        speedups.append(
            speedup(other.milliseconds, ours.milliseconds, is_true(ours.right) and is_true(other.right))
            if measured
            else "—"
        )
    return [
        share,
        *speedups,
        duration(ours.host_microseconds / 1e6)
        if ours is not None and present(ours.host_microseconds)
        else "—",
        f"{ours.launches:.0f}" if ours is not None and present(ours.launches) else "—",
        *(size(row.peak_bytes) if row is not None else "—" for row in (ours, eager)),
        *(
            f"{row.gradient_error:.1e}" if row is not None and present(row.gradient_error) else "—"
            for row in (ours, eager)
        ),
    ]


def register_table(results: Results) -> str:
    """A line for each kernel of docs/kernels.md, targets beside each other."""
    rows = results.latest("registers", "cpu")
    if not len(rows):
        return NOT_MEASURED
    lines = []
    for (title, features), group in rows.groupby(["title", "features"], sort=False):
        of = {row.target: row for row in group.itertuples()}
        nvidia, amd = of["sm_90"], of["gfx942"]
        numbers = [features, nvidia.warps, nvidia.registers, amd.registers]
        numbers += [nvidia.spilled_bytes, nvidia.loads_128, nvidia.stores_128]
        lines.append([title, *map(str, numbers)])
    header = ["variant", "D", "warps", "registers, sm_90", "registers, gfx942"]
    header += ["spilled bytes, sm_90", "loads", "stores"]
    last = rows.iloc[-1]
    return f"{table(header, lines)}\n\ntriton {last.triton}, revision {last.revision}, {last.date[:10]}."


def agreement_table(results: Results) -> str:
    """A line for each model and method of docs/compat.md, in each precision."""
    rows = results.latest("agreement", "cpu")
    if not len(rows):
        return NOT_MEASURED
    header = ["precision", "model", "method", "steps", "loss of step 1", "losses", "trained tensors"]
    header += ["cosine of the change", "all equal, bit for bit"]
    lines = []
    for row in rows.sort_values("variant", key=lambda column: column.str.len(), kind="stable").itertuples():
        differences = (row.first_loss_difference, row.loss_difference, row.tensor_difference)
        lines.append(
            [row.variant, row.architecture, row.method, str(row.steps), *(f"{d:.1e}" for d in differences)]
            + [f"{row.change_cosine:.4f}", "yes" if is_true(row.equal) else "no"]
        )
    return f"{table(header, lines)}\n\n{where_measured(rows)}"


def adaptive_table(results: Results) -> str:
    """Ratio of times, Adaptive RMU over RMU."""
    frames = {device: results.latest("adaptive_cost", device) for device in DEVICES}
    lines = []
    for level in ("kernel", "step"):
        for scope in SCOPES:
            for cached in (True, False):
                if (level, scope, cached) == ("kernel", "first_batch", False):
                    continue
                cells = [ratio_cell(frames[device], level, scope, cached) for device in DEVICES]
                lines.append([level, scope, "cached" if cached else "uncached", *cells])
    text = table(["level", "scope", "norms", *DEVICES.values()], lines)
    measured = [where_measured(frame) for frame in frames.values() if len(frame)]
    return "\n\n".join([text, *measured])


def ratio_cell(rows: pd.DataFrame, level: str, scope: str, cached: bool) -> str:
    if len(rows):
        rows = rows[(rows.level == level) & (rows.scope == scope) & (rows.cached == cached)]
    if not len(rows):
        return NOT_MEASURED
    row = rows.iloc[-1]
    return f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}], {row.case}, {row.rounds} pairs"
