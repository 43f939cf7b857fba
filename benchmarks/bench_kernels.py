"""The losses alone: time, memory and error of each provider, beside a plain copy of as many bytes.

python -m benchmarks.bench_kernels
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import cases, results, timing


def main(arguments: Sequence[str] | None = None) -> int:
    options = results.parser(__doc__).parse_args(arguments)
    started, failed = time.perf_counter(), 0
    plan = cases.planned_cases(options.device, options.toy)
    for i, (case, mode, providers) in enumerate(plan):
        if time.perf_counter() - started > options.seconds:
            print(f"time is up: {len(plan) - i} of {len(plan)} cases were not measured")
            break
        print(f"{case.function}, {case.rows} x {case.features}{', masked' * case.masked}, {mode}")
        rows = measure(case, mode, providers, options.device, 0.01 if options.toy else 0.3)
        failed += sum(row.pop("failed", False) for row in rows)
        results.append(options.results, "kernels", rows, options.device)
    return 1 if failed else 0


def measure(
    case: cases.Case, mode: str, providers: Sequence[str], device: str, seconds: float
) -> list[dict[str, Any]]:
    """A row for each provider and one for the copy."""
    inputs = cases.make_inputs(case, device)
    rows = [row_of_copy(case, mode, device, seconds)]
    for provider in providers:
        row = row_of(case, mode, provider)
        try:
            function = cases.call(
                cases.loss_function(provider, case, inputs), mode, inputs.trained(case.function)
            )
            errors = cases.errors(case, inputs, mode, function())
            row |= {
                "milliseconds": timing.call_milliseconds(function, device, seconds),
                "host_microseconds": timing.host_microseconds(function, device) if device == "cuda" else None,
                "launches": timing.launches(function, device) if provider == "ours" else None,
                "peak_bytes": timing.peak_bytes(function, device),
                "loss_error": errors.loss,
                "gradient_error": errors.gradient,
                "right": not errors.wrong,
            }
        # One provider that fails must not take the others' figures with it.
        except Exception as error:
            row["note"], row["failed"] = results.note_of(error)
        rows.append(row)
        print("    " + in_words(row, rows[0]["milliseconds"]), flush=True)
    return rows


def row_of(case: cases.Case, mode: str, provider: str) -> dict[str, Any]:
    return {
        "function": case.function,
        "rows": case.rows,
        "features": case.features,
        "masked": case.masked,
        "mode": mode,
        "provider": provider,
        "least_bytes": case.least_bytes(mode),
        "milliseconds": None,
        "host_microseconds": None,
        "launches": None,
        "peak_bytes": None,
        "loss_error": None,
        "gradient_error": None,
        "right": None,
        "note": "",
    }


def row_of_copy(case: cases.Case, mode: str, device: str, seconds: float) -> dict[str, Any]:
    """The ceiling: half of the bytes read, half written."""
    source = torch.empty(max(1, case.least_bytes(mode) // 4), dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    milliseconds = timing.call_milliseconds(lambda: target.copy_(source), device, seconds)
    return row_of(case, mode, "copy") | {"milliseconds": milliseconds, "right": True}


def in_words(row: dict[str, Any], copy_milliseconds: float) -> str:
    if row["note"]:
        return f"{row['provider']:14} {row['note']}"
    share = 100 * copy_milliseconds / row["milliseconds"]
    text = f"{row['provider']:14} {row['milliseconds']:9.4f} ms, {share:3.0f} % of the copy"
    return text + ("" if row["right"] else f", WRONG: loss off by {row['loss_error']:.2g}")


if __name__ == "__main__":
    raise SystemExit(main())
