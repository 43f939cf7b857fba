"""How time and memory are taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

REPEATS = 50
HOST_CALLS = 30


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def call_milliseconds(function: Callable[[], Any], device: str, seconds: float = 0.3) -> float:
    """Median time of a call.

    On a GPU its device time with the L2 cache flushed before each, over at least ``REPEATS`` repeats; on a CPU the wall time, over
    ``seconds`` and at least 5 repeats.
    """
    if device != "cuda":
        return 1000 * statistics.median(wall_times(function, device, seconds, least=5))
    from triton.testing import do_bench

    once = do_bench(function, warmup=1, rep=1, return_mode="median")
    # do_bench takes milliseconds, and its own estimate includes the flush.
    return do_bench(function, warmup=10, rep=REPEATS * (once + 0.2), return_mode="median")


def wall_times(function: Callable[[], Any], device: str, seconds: float, least: int = 5) -> list[float]:
    """Seconds of each call, the device's work included, after one call to warm up."""
    function()
    clock = wall_clock(device)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < until:
        times.append(clock(function))
    return times


def host_microseconds(function: Callable[[], Any], device: str) -> float:
    """Median time until a call returns, which on a GPU is before its work is done."""
    times = []
    for _ in range(HOST_CALLS):
        synchronize(device)
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    synchronize(device)
    return 1e6 * statistics.median(times)


def peak_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Allocated by a call at most, beyond what was allocated before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def launches(function: Callable[[], Any], device: str) -> int | None:
    """Kernels that a call starts on the GPU; None on a CPU."""
    if device != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in record.events())


def interleaved(
    functions: dict[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], float], seconds: float
) -> dict[str, list[float]]:
    """Seconds of each function's calls, one of each a round, the order turned by one from round to round, at least 5 rounds."""
    names = list(functions)
    for name in names:
        functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    until, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < until:
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock(functions[name]))
        rounds += 1
    return times


def wall_clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """Seconds of one call, the device's work included."""

    def clock(function: Callable[[], Any]) -> float:
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - started

    return clock


def device_clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """Seconds of one call on the GPU alone, its L2 cache flushed before; on a CPU the wall time."""
    if device != "cuda":
        return wall_clock(device)
    flushed = torch.empty(2**30, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(function: Callable[[], Any]) -> float:
        # The flush also keeps the GPU busy until the call has been enqueued, so that the host's time is not counted.
        flushed.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return clock


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], resamples: int = 4000
) -> tuple[float, float, float]:
    """Median of the paired ratios, and its 95 % interval from a bootstrap over the pairs."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    generator = np.random.default_rng(0)
    drawn = np.median(generator.choice(ratios, (resamples, len(ratios))), axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def fitted_slope(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float | None]:
    """Exponent p of time ~ size^p by least squares in logarithms, and its standard error (None with two points)."""
    x, y = np.log(sizes), np.log(times)
    slope, intercept = np.polyfit(x, y, 1)
    if len(x) < 3:
        return float(slope), None
    residual = ((y - slope * x - intercept) ** 2).sum() / (len(x) - 2)
    return float(slope), float((residual / ((x - x.mean()) ** 2).sum()) ** 0.5)
