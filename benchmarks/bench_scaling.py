"""How the time of our step grows with the tokens, the hooked layer, the hidden size, the topics and the processes.

python -m benchmarks.bench_scaling

Each curve changes one thing and leaves the others; its slope is fitted in logarithms (1: proportional, 0: no growth).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import results
from benchmarks.models import SHAPES, Shape
from benchmarks.runs import Run, ours
from benchmarks.timing import fitted_slope


def main(arguments: Sequence[str] | None = None) -> int:
    options = results.parser(__doc__).parse_args(arguments)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    started, steps = time.perf_counter(), 3 if options.toy else 6
    for curve, points in curves(options.device, options.toy):
        sizes, times = [], []
        for size, shape in points:
            if time.perf_counter() - started > options.seconds:
                print("time is up")
                return 0
            if curve == "processes":
                run = run_ranks(shape, size, steps)
            else:
                run = ours(shape, "adaptive", steps, options.device, dtype, {"scope": "token"})
            gc.collect()  # a trainer is a cycle, and would keep its model
            seconds = statistics.median(run.seconds[1:])
            sizes.append(size)
            times.append(seconds)
            row = {
                "curve": curve,
                "size": size,
                "hidden": shape.hidden,
                "hooked_layer": shape.hooked,
                "topics": len(shape.forget_tokens),
                "tokens": shape.rows * (shape.forget_tokens[0] + shape.retain_tokens),
                "seconds": seconds,
            }
            device = "cpu" if curve == "processes" else options.device
            results.append(options.results, "scaling", [row], device)
            print(f"{curve} {size}: {1000 * seconds:.1f} ms a step", flush=True)
        slope, error = fitted_slope(sizes, times)
        print(f"{curve}: slope {slope:.2f}" + (f" +- {error:.2f}" if error is not None else ""))
    return 0


def curves(device: str, toy: bool) -> Iterator[tuple[str, list[tuple[int, Shape]]]]:
    """(what grows, [(size, shape)])."""
    if toy:
        base = replace(SHAPES["toy"], forget_tokens=(12,))
        tokens, layers, hidden, topics = (12, 24), (1, 2), (32, 64), (1, 2)
    elif device == "cpu":
        base = Shape("scaling", 16, 256, 768, 4, 4, 1024, 7, 4, (64,), 64)
        tokens, layers, hidden, topics = (32, 64, 128, 256), (3, 5, 9, 15), (96, 192, 384, 768), (1, 2, 4, 8)
    else:
        base = Shape("scaling", 32, 2048, 7168, 16, 16, 1024, 7, 4, (256,), 256)
        tokens, layers, hidden, topics = (
            (128, 256, 512, 1024),
            (3, 7, 15, 31),
            (1024, 2048, 4096, 8192),
            (1, 2, 4, 8),
        )
    # Of both sides together.
    points = [(2 * base.rows * t, replace(base, forget_tokens=(t,), retain_tokens=t)) for t in tokens]
    yield "tokens", points
    yield "layers", [(layer + 1, base.at(layer)) for layer in layers]
    yield "hidden", [(h, replace(base, hidden=h, mlp=base.mlp * h // base.hidden)) for h in hidden]
    yield "topics", [(t, replace(base, forget_tokens=base.forget_tokens * t)) for t in topics]
    if device == "cpu":
        yield "processes", [(1, base), (2, base)]


def run_ranks(shape: Shape, ranks: int, steps: int) -> Run:
    """As many processes with gloo, each with a thread and batches of the shape; the first one's figures."""
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, port, shape, steps, queue))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            raise RuntimeError(f"a rank of {ranks} ended with exit code {process.exitcode}")
    return queue.get()


def run_rank(rank: int, ranks: int, port: int, shape: Shape, steps: int, queue: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    run = ours(shape, "adaptive", steps, "cpu", torch.float32, {"scope": "token"})
    if rank == 0:
        queue.put(run)
    # A rank that ran autograd with gloo can abort while the interpreter shuts down: everything is done, leave at once.
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
