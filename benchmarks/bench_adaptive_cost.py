"""What Adaptive RMU costs beyond RMU: the same model and batches, calls in turn, the ratio of times with its 95 % interval.

python -m benchmarks.bench_adaptive_cost

Cached: norms (kernel level) or frozen passes (step level) were computed before; uncached: in the step.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, results, timing
from benchmarks.models import SHAPES, Shape
from benchmarks.runs import dtype_name, make_trainer, training_dtype
from rmu.cache import MemoryStore
from rmu.source import FrozenSource
from rmu_kernels import adaptive_coefficient, rmu_loss

SCOPES = ("token", "batch", "first_batch")
CACHE_BYTES = 10**9


def main(arguments: Sequence[str] | None = None) -> int:
    options = results.parser(__doc__).parse_args(arguments)
    device = options.device
    on_cpu = device == "cpu"
    shape = SHAPES["toy" if options.toy else "SmolLM2-135M" if on_cpu else "Zephyr-7B"]
    case = cases.Case("rmu_loss, RMU", *((8, 64) if options.toy else (2048, 576) if on_cpu else (8192, 4096)))
    share = options.seconds / 5

    def report(
        level: str,
        name: str,
        dtype: torch.dtype,
        seconds: dict[str, list[float]],
        cached: Sequence[bool],
    ) -> None:
        rows = ratio_rows(level, name, dtype, seconds, cached)
        results.append(options.results, "adaptive_cost", rows, device)
        for row in rows:
            print(
                f"{level:6} {row['scope']:11} {'cached' if row['cached'] else 'uncached':8} "
                f"{row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}] of {row['rounds']} rounds",
                flush=True,
            )

    seconds = timing.interleaved(kernel_calls(case, device), timing.device_clock(device), share)
    report("kernel", f"{case.rows} x {case.features}", torch.bfloat16, seconds, (False, True))
    dtype = training_dtype(device, options.toy)
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(shape, device, dtype, Path(folder))
        for cached in (True, False):
            seconds = timing.interleaved(steps.calls(cached), timing.wall_clock(device), 2 * share)
            report("step", shape.name, dtype, seconds, (cached,))
    return 0


def ratio_rows(
    level: str, name: str, dtype: torch.dtype, seconds: dict[str, list[float]], cached: Sequence[bool]
) -> list[dict[str, Any]]:
    """A row for each scope, cached and uncached as asked, against RMU's call of the same round."""
    rows = []
    for scope in SCOPES:
        for is_cached in cached:
            key = f"{scope}, cached" if is_cached else scope
            if key not in seconds:
                continue
            ratio, low, high = timing.ratio_interval(seconds[key], seconds["rmu"])
            rows.append(
                {
                    "level": level,
                    "case": name,
                    "dtype": dtype_name(dtype),
                    "scope": scope,
                    "cached": is_cached,
                    "rounds": len(seconds[key]),
                    "rmu_seconds": statistics.median(seconds["rmu"]),
                    "seconds": statistics.median(seconds[key]),
                    "ratio": ratio,
                    "low": low,
                    "high": high,
                }
            )
    return rows


def kernel_calls(case: cases.Case, device: str) -> dict[str, Callable[[], Any]]:
    """``rmu_loss`` forward and backward: RMU, and each scope with the work that it needs in a step.

    ``first_batch`` has nothing to compute in a step, so it is there cached alone.
    """
    inputs = cases.make_inputs(case, device)
    batch = adaptive_coefficient(inputs.frozen_forget, cases.SCALE, scope="batch")
    first_batch = batch.clone()

    def step(**target: Any) -> tuple[torch.Tensor, ...]:
        loss = rmu_loss(
            inputs.forget, inputs.retain, inputs.frozen_retain, inputs.direction, alpha=cases.ALPHA, **target
        ).loss
        return torch.autograd.grad(loss, [inputs.forget, inputs.retain])

    return {
        "rmu": lambda: step(coefficient=cases.COEFFICIENT),
        "token": lambda: step(frozen_forget=inputs.frozen_forget, scale=cases.SCALE),
        "token, cached": lambda: step(coefficient=inputs.norms),
        "batch": lambda: step(
            coefficient=adaptive_coefficient(inputs.frozen_forget, cases.SCALE, scope="batch")
        ),
        "batch, cached": lambda: step(coefficient=batch),
        "first_batch, cached": lambda: step(coefficient=first_batch),
    }


class Steps:
    """Training steps of RMU and of each scope, each with a trainer of its own on equal weights, on one and the same batch."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, folder: Path) -> None:
        self.trainers = {"rmu": make_trainer(shape, "rmu", 1, device, dtype, folder, {})}
        for scope in SCOPES:
            self.trainers[scope] = make_trainer(shape, "adaptive", 1, device, dtype, folder, {"scope": scope})
        trainer = self.trainers["rmu"]
        items = [trainer.train_dataset[row] for row in range(shape.rows)]
        self.batch = trainer._prepare_inputs(trainer.data_collator(items))
        for trainer in self.trainers.values():
            trainer.create_optimizer()

    def calls(self, cached: bool) -> dict[str, Callable[[], Any]]:
        """``cached``: the frozen passes come from the trainer's cache in memory."""
        return {
            name + ", cached" * (cached and name != "rmu"): self._step(trainer, cached)
            for name, trainer in self.trainers.items()
        }

    def _step(self, trainer: Any, cached: bool) -> Callable[[], None]:
        # Without the retain passes that a trainer of several topics holds on to: every step is one of new batches.
        trainer.frozen = FrozenSource(trainer.window, MemoryStore(CACHE_BYTES) if cached else None)

        def step() -> None:
            trainer.compute_loss(trainer.window, self.batch).backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer._measured.clear()

        return step


if __name__ == "__main__":
    raise SystemExit(main())
