"""A sweep over layers and coefficients: frozen work shared between the settings, against as many runs of the released loop.

python -m benchmarks.bench_sweep
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import results
from benchmarks.bench_step import LOSS_TOLERANCE
from benchmarks.models import SHAPES, Shape, corpora, random_model, word_tokenizer
from benchmarks.released_loop import LoopSettings, released_loop
from benchmarks.runs import ALPHA, LEARNING_RATE, SEED, run_apart, trained_layers
from benchmarks.timing import synchronize
from rmu.data import UnlearningCollator
from rmu.directions import draw_directions
from rmu.optimizer import AdamWRMU
from rmu.recording import decoder_layers, frozen_passes
from rmu.window import LayerWindow
from rmu_kernels import rmu_loss

Losses = dict[tuple[int, float], float]  # after the last step, by layer and coefficient


def main(arguments: Sequence[str] | None = None) -> int:
    options = results.parser(__doc__).parse_args(arguments)
    device = options.device
    if options.toy:
        shape, layers, coefficients, steps = SHAPES["toy"], [1, 2], [2.0, 6.5], 2
    elif device == "cpu":
        shape, layers, coefficients, steps = SHAPES["SmolLM2-135M"], [7, 15], [2.0, 6.5, 20.0], 4
        shape = Shape(**{**vars(shape), "forget_tokens": (64,), "retain_tokens": 64, "rows": 2})
    else:
        shape, layers, coefficients, steps = SHAPES["Zephyr-7B"], [3, 7, 15, 23, 31], [2.0, 6.5, 20.0], 4
    dtype = torch.float32 if options.toy else torch.bfloat16
    baseline: Losses | None = None
    for provider, function in (("released", separate_runs), ("ours", shared_sweep)):
        seconds, losses = run_apart(function, shape, layers, coefficients, steps, device, dtype)
        difference = None
        if baseline is None:
            baseline = losses
        else:
            difference = max(abs(losses[key] - wanted) / abs(wanted) for key, wanted in baseline.items())
        row: dict[str, Any] = {
            "model": shape.name,
            "layers": " ".join(map(str, layers)),
            "coefficients": " ".join(map(str, coefficients)),
            "steps": steps,
            "tokens": shape.rows
            * (sum(shape.forget_tokens) // len(shape.forget_tokens) + shape.retain_tokens),
            "provider": provider,
            "seconds": seconds,
            "losses": " ".join(f"{loss:.5g}" for loss in losses.values()),
            "loss_difference": difference,
            "same_losses": None if difference is None else difference <= LOSS_TOLERANCE,
        }
        results.append(options.results, "sweep", [row], device)
        print(
            f"{provider}: {len(losses)} settings in {seconds:.2f} s, last losses {row['losses']}", flush=True
        )
    return 0


def separate_runs(
    shape: Shape, layers: list[int], coefficients: list[float], steps: int, device: str, dtype: torch.dtype
) -> tuple[float, Losses]:
    """Seconds of all runs of the released loop, the making of the models left out, and their last losses."""
    frozen, trained = (random_model(shape, device, dtype) for _ in range(2))
    tokenizer = word_tokenizer(shape.vocabulary)
    forget, retain = corpora(shape, steps)
    losses, total = {}, 0.0
    for layer in layers:
        for coefficient in coefficients:
            trained.load_state_dict(frozen.state_dict())
            trained.zero_grad(set_to_none=True)
            settings = LoopSettings(
                layer=layer,
                trained_layers=trained_layers(shape.at(layer)),
                coefficients=[coefficient] * len(forget),
                alphas=[ALPHA] * len(forget),
                learning_rate=LEARNING_RATE,
                steps=steps,
                rows=shape.rows,
                forget_lengths=shape.forget_tokens,
                retain_length=shape.retain_tokens,
                seed=SEED,
            )
            synchronize(device)
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                record = released_loop(trained, frozen, tokenizer, forget, retain, settings)
            synchronize(device)
            total += time.perf_counter() - started
            losses[layer, coefficient] = record.loss[-1]
    return total, losses


def shared_sweep(
    shape: Shape, layers: list[int], coefficients: list[float], steps: int, device: str, dtype: torch.dtype
) -> tuple[float, Losses]:
    """The same settings: a batch is tokenised once, and one frozen pass of it serves all layers and coefficients."""
    model = random_model(shape, device, dtype, max(layers) + 1)
    forget, retain = corpora(shape, steps)
    directions = draw_directions(len(forget), shape.hidden, seed=SEED, dtype=dtype, device=device)
    synchronize(device)
    started = time.perf_counter()
    batches = tokenized(shape, forget, retain, steps, device)
    windows = [LayerWindow(model, layer, trained_layers=trained_layers(shape.at(layer))) for layer in layers]
    spans = [(window.first_layer, window.layer) for window in windows]
    decoder = decoder_layers(model.base_model, max(layers) + 1)
    recorded = [
        [frozen_passes(model.base_model, decoder, spans, *side) for side in batch] for batch in batches
    ]
    losses = {}
    for i, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        original = {name: tensor.clone() for name, tensor in window.trained_tensors()}
        passes = [[side[i] for side in batch] for batch in recorded]
        for coefficient in coefficients:
            window.load_trained_tensors(original)
            optimizer = AdamWRMU(window.trained, lr=LEARNING_RATE)
            for step, (frozen_forget, frozen_retain) in enumerate(passes):
                hidden = window(frozen_forget, frozen_retain)
                direction = directions[step % len(forget)]
                loss = rmu_loss(
                    *hidden, frozen_retain.hidden, direction, coefficient=coefficient, alpha=ALPHA
                ).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses[layer, coefficient] = loss.item()
    synchronize(device)
    return time.perf_counter() - started, losses


def tokenized(
    shape: Shape, forget: list[list[str]], retain: list[str], steps: int, device: str
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(ids, mask) of the forget and the retain side of each step, in the released loop's order."""
    tokenizer = word_tokenizer(shape.vocabulary)
    collator = UnlearningCollator(
        tokenizer, forget_lengths=shape.forget_tokens, retain_length=shape.retain_tokens, padding_side="left"
    )
    batches = []
    for step in range(steps):
        topic, position = step % len(forget), step // len(forget)
        rows = slice(position * shape.rows, (position + 1) * shape.rows)
        sides = [
            collator.side(forget[topic][rows], shape.forget_tokens[topic]),
            collator.side(retain[rows], shape.retain_tokens),
        ]
        batches.append([(s["input_ids"].to(device), s["attention_mask"].to(device)) for s in sides])
    return batches


if __name__ == "__main__":
    raise SystemExit(main())
