"""The released RMU and Adaptive RMU loops, re-stated plainly: the baseline of the parity tests and of the benchmarks.

RMU: Li et al. 2024, arXiv 2403.03218; Adaptive RMU: Dang et al. 2024, arXiv 2408.06223. Both are one loop with one line of
difference. What it does is what their code does, costs included: two whole models, every forward at full depth, gradients for
every tensor below the hooked layer, tensors chosen by position, losses in the model's dtype over every row (pad and BOS rows
too). Only their errors are left out: inputs go to the model's device, more than two topics work, and a corpus that is too short
is refused at the start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class LoopSettings:
    """Defaults are the released command lines'. Sequences hold a value a topic; ``forget_lengths`` goes on with its last."""

    method: str = "rmu"
    layer: int = 7
    trained_layers: Sequence[int] = (5, 6, 7)
    positions: Sequence[int] = (
        6,
    )  # among a layer's parameters; 6 is mlp.down_proj.weight on llama and mistral
    coefficients: Sequence[float] = (6.5, 6.5)  # c of RMU
    scale: float = 5.0  # beta of Adaptive RMU
    alphas: Sequence[float] = (1200.0, 1200.0)
    learning_rate: float = 5e-5
    steps: int = 150
    rows: int = 4
    minimum_length: int = 0
    forget_lengths: Sequence[int] = (512, 768)
    retain_length: int = 512
    seed: int = 42
    verbose: bool = False


@dataclass
class LoopRecord:
    """What a run leaves behind besides the trained model, a value a step in the lists.

    Losses are those of the loop, in the model's dtype, ``retain`` times alpha. ``verbose`` holds the fourth forward's cosines.
    """

    directions: Tensor  # [topics, D], as drawn, in the model's dtype
    coefficients: dict[int, float] = field(default_factory=dict)
    loss: list[float] = field(default_factory=list)
    forget: list[float] = field(default_factory=list)
    retain: list[float] = field(default_factory=list)
    verbose: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # wall time


class OldAdamW:
    """``transformers.AdamW`` as it was until 4.49, with its defaults, which both loops use.

    It differs from ``torch.optim.AdamW``: eps is 1e-6, it is added to the root BEFORE bias correction, and there is no decay.
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rate: float) -> None:
        self.parameters, self.learning_rate, self.steps = list(parameters), learning_rate, 0
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-6) -> None:
        self.steps += 1
        size = self.learning_rate * (1 - beta2**self.steps) ** 0.5 / (1 - beta1**self.steps)
        for parameter, m, v in zip(self.parameters, self.first, self.second, strict=True):
            m.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            parameter.addcdiv_(m, v.sqrt().add_(eps), value=-size)


def released_loop(
    trained: PreTrainedModel,
    frozen: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Sequence[str]],
    retain: Sequence[str],
    settings: LoopSettings,
) -> LoopRecord:
    """Unlearn in place.

    trained, frozen: two copies of one causal model with ``model.layers``; ``trained`` changes.
    tokenizer: it is set to pad with eos on the left and to cut on the right, and stays so.
    forget: one list of texts a topic. retain: texts; every topic reads the same.

    Raises ValueError when a corpus has too few texts for the steps.
    """
    trained.train()
    tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side = (
        tokenizer.eos_token_id,
        "left",
        "right",
    )
    forget_batches = [batches(texts, settings) for texts in forget]
    retain_batches = batches(retain, settings)
    needed = -(-settings.steps // len(forget))
    if min(map(len, [*forget_batches, retain_batches])) < needed:
        raise ValueError(
            f"steps: {settings.steps} need {needed} batches of {settings.rows} texts in every corpus"
        )

    layers = trained.model.layers
    tensors = [
        p
        for i in settings.trained_layers
        for j, p in enumerate(layers[i].parameters())
        if j in settings.positions
    ]
    optimizer = OldAdamW(tensors, settings.learning_rate)
    torch.manual_seed(settings.seed)
    size, dtype, device = trained.config.hidden_size, trained.dtype, trained.device
    directions = []
    for _ in forget:
        draw = torch.rand(1, 1, size, dtype=dtype, device=device)
        directions.append(draw / torch.norm(draw))
    record = LoopRecord(torch.cat(directions).flatten(1))

    def encode(texts: Sequence[str], length: int) -> dict[str, Tensor]:
        return tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(device)

    for step in range(settings.steps):
        started = time.perf_counter()
        topic, position = step % len(forget), step // len(forget)
        length = settings.forget_lengths[min(topic, len(settings.forget_lengths) - 1)]
        forget_inputs = encode(forget_batches[topic][position], length)
        retain_inputs = encode(retain_batches[position], settings.retain_length)

        forget_hidden = hidden_state(trained, layers[settings.layer], forget_inputs)
        if settings.method == "rmu":
            target = directions[topic] * settings.coefficients[topic]
        else:
            if topic not in record.coefficients:
                # Mean over sequences of each one's mean norm in the model being trained: for topic 1 after one update already.
                norm = forget_hidden.norm(dim=-1).mean(dim=1).mean(dim=0)
                record.coefficients[topic] = norm.item() * settings.scale
            target = directions[topic] * record.coefficients[topic]
        forget_loss = mse_loss(forget_hidden, target.expand_as(forget_hidden))

        retain_hidden = hidden_state(trained, layers[settings.layer], retain_inputs)
        with torch.no_grad():
            frozen_retain = hidden_state(frozen, frozen.model.layers[settings.layer], retain_inputs)
        retain_loss = mse_loss(retain_hidden, frozen_retain) * settings.alphas[topic]

        loss = forget_loss + retain_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.loss.append(loss.item())
        record.forget.append(forget_loss.item())
        record.retain.append(retain_loss.item())

        if settings.verbose:
            with torch.no_grad():
                frozen_forget = hidden_state(frozen, frozen.model.layers[settings.layer], forget_inputs)
            cosines = {
                "forget_cosine": cosine_similarity(forget_hidden, frozen_forget, dim=-1).mean().item(),
                "retain_cosine": cosine_similarity(retain_hidden, frozen_retain, dim=-1).mean().item(),
            }
            record.verbose.append(cosines)
            print(f"step {step}, topic {topic}: loss {loss.item():.4g}, {cosines}")
        record.seconds.append(time.perf_counter() - started)
    return record


def batches(texts: Sequence[str], settings: LoopSettings) -> list[list[str]]:
    """Texts of more than ``minimum_length`` characters in their own order, ``rows`` at a time."""
    kept = [text for text in texts if len(text) > settings.minimum_length]
    return [kept[i : i + settings.rows] for i in range(0, len(kept), settings.rows)]


def hidden_state(model: PreTrainedModel, layer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """``[B, T, D]`` output of ``layer`` in a forward pass of the whole model."""
    caught: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(keep)
    model(**inputs)
    handle.remove()
    return caught[0]
