"""RMU as a plain loop that collects activations with hooks, in the style of the WMDP code.

``--loss plain`` runs the loop's own two lines of ``mse_loss``, ``--loss fused`` one call of ``rmu_kernels.rmu_loss`` in their
place. Nothing else differs, and both print the same losses.

python examples/hook_loop.py --loss fused
"""

from __future__ import annotations

import argparse
import copy

import torch
from tiny import FORGET, RETAIN, tiny_model, tiny_tokenizer
from torch.nn.functional import mse_loss

from rmu_kernels import rmu_loss

LAYER, TRAINED_LAYERS = 2, (0, 1, 2)
COEFFICIENT, ALPHA = 6.5, 10.0
ROWS = 4


def plain(forget, retain, frozen_retain, direction):
    forget_loss = mse_loss(forget, (COEFFICIENT * direction).expand_as(forget))
    return forget_loss + ALPHA * mse_loss(retain, frozen_retain)


def fused(forget, retain, frozen_retain, direction):
    return rmu_loss(forget, retain, frozen_retain, direction, coefficient=COEFFICIENT, alpha=ALPHA).loss


def activations(model, inputs):
    """The hidden states after the hooked layer, caught in a forward pass."""
    caught = []
    handle = model.model.layers[LAYER].register_forward_hook(
        lambda module, args, output: caught.append(output)
    )
    model(**inputs)
    handle.remove()
    return caught[0][0] if isinstance(caught[0], tuple) else caught[0]


def unlearn(loss_function, steps: int) -> list[float]:
    """The loss of each step."""
    tokenizer = tiny_tokenizer()
    frozen = tiny_model(len(tokenizer))
    model = copy.deepcopy(frozen)
    optimizer = torch.optim.AdamW(
        [model.model.layers[i].mlp.down_proj.weight for i in TRAINED_LAYERS], lr=1e-3, weight_decay=0.0
    )
    torch.manual_seed(42)
    directions = [torch.rand(model.config.hidden_size) for _ in FORGET]
    directions = [direction / direction.norm() for direction in directions]

    losses = []
    for step in range(steps):
        topic, first = step % len(FORGET), step // len(FORGET) * ROWS
        forget_inputs = tokenizer(FORGET[topic][first : first + ROWS], return_tensors="pt", padding=True)
        retain_inputs = tokenizer(RETAIN[first : first + ROWS], return_tensors="pt", padding=True)
        forget, retain = activations(model, forget_inputs), activations(model, retain_inputs)
        with torch.no_grad():
            frozen_retain = activations(frozen, retain_inputs)

        loss = loss_function(forget, retain, frozen_retain, directions[topic])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=["plain", "fused"], default="fused")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    for step, loss in enumerate(unlearn(globals()[arguments.loss], arguments.steps), 1):
        print(f"step {step}: loss {loss:.6f}")


if __name__ == "__main__":
    main()
