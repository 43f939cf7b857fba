"""Kernel-level cases: what is computed, on which shapes, and who computes it.

S is a bf16 hidden-state tensor: rows (of each side) x features x 2 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

import rmu_kernels

# With the alphas of real runs an error of the forget term would drown in the retain term.
COEFFICIENT, SCALE, ALPHA = 6.5, 5.0, 2.0
MASKED_FRACTION = 0.3
PROVIDERS = ("eager bf16", "eager fp32", "torch.compile", "ours")
MODES = ("forward", "forward + backward", "backward scaled")
GRAD_OUTPUT = 0.3
# A result is wrong when its loss or gradient is off by more: bf16 rounds by up to 0.4 %, several times in eager code.
TOLERANCE = 0.02


class Traffic(NamedTuple):
    """Hidden-state tensors that the terms read, and gradients that they write."""

    reads: int
    gradients: int


FUNCTIONS = {
    "rmu_loss, RMU": Traffic(3, 2),
    "rmu_loss, Adaptive RMU": Traffic(4, 2),
    "rmu_loss, Adaptive RMU, cached norms": Traffic(3, 2),
    "steering_mse": Traffic(1, 1),
    "adaptive_steering_mse": Traffic(2, 1),
    "retain_mse": Traffic(2, 1),
    "adaptive_coefficient": Traffic(1, 0),
}


@dataclass(frozen=True)
class Case:
    """rows: of each side."""

    function: str
    rows: int
    features: int
    masked: bool = False

    def least_bytes(self, mode: str) -> int:
        """Every element that counts read once, every gradient element written once."""
        traffic = FUNCTIONS[self.function]
        reads = traffic.reads * ((1 - MASKED_FRACTION) if self.masked else 1.0)
        writes = 0 if mode == "forward" else traffic.gradients
        return int((reads + writes) * self.rows * self.features * 2)


@dataclass
class Inputs:
    """forget, retain: [rows, features] bf16 that need a gradient. mask: [rows] or None."""

    forget: Tensor
    retain: Tensor
    frozen_forget: Tensor
    frozen_retain: Tensor
    direction: Tensor
    norms: Tensor
    mask: Tensor | None

    def trained(self, function: str) -> list[Tensor]:
        """What gets a gradient."""
        if FUNCTIONS[function].gradients == 2:
            return [self.forget, self.retain]
        return {"retain_mse": [self.retain], "adaptive_coefficient": []}.get(function, [self.forget])


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def hidden() -> Tensor:
        empty = torch.empty(case.rows, case.features, dtype=torch.bfloat16, device=device)
        return empty.normal_(generator=generator)

    mask = None
    if case.masked:
        mask = torch.rand(case.rows, generator=generator, device=device) >= MASKED_FRACTION
    direction = normalize(torch.rand(case.features, generator=generator, device=device), dim=0)
    frozen_forget = hidden()
    norms = rmu_kernels.adaptive_coefficient(frozen_forget, SCALE, backend="torch")
    return Inputs(
        hidden().requires_grad_(),
        hidden().requires_grad_(),
        frozen_forget,
        hidden(),
        direction,
        norms,
        mask,
    )


def loss_function(provider: str, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """The provider's loss of a case, as a function without arguments."""
    if provider == "ours":
        return lambda: ours(case.function, inputs)
    dtype = torch.bfloat16 if provider == "eager bf16" else torch.float32
    function = eager
    if provider == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(eager, dynamic=False, fullgraph=True)
    return lambda: function(case.function, inputs, dtype)


def ours(function: str, x: Inputs) -> Tensor:
    if function == "steering_mse":
        return rmu_kernels.steering_mse(x.forget, x.direction, COEFFICIENT, mask=x.mask)
    if function == "adaptive_steering_mse":
        return rmu_kernels.adaptive_steering_mse(x.forget, x.frozen_forget, x.direction, SCALE, mask=x.mask)
    if function == "retain_mse":
        return rmu_kernels.retain_mse(x.retain, x.frozen_retain, mask=x.mask)
    if function == "adaptive_coefficient":
        return rmu_kernels.adaptive_coefficient(x.frozen_forget, SCALE, mask=x.mask)
    target: dict = {
        "rmu_loss, RMU": {"coefficient": COEFFICIENT},
        "rmu_loss, Adaptive RMU": {"frozen_forget": x.frozen_forget, "scale": SCALE},
        "rmu_loss, Adaptive RMU, cached norms": {"coefficient": x.norms},
    }[function]
    return rmu_kernels.rmu_loss(
        x.forget,
        x.retain,
        x.frozen_retain,
        x.direction,
        **target,
        alpha=ALPHA,
        forget_mask=x.mask,
        retain_mask=x.mask,
    ).loss


def eager(function: str, x: Inputs, dtype: torch.dtype) -> Tensor:
    """As the released loops have it, in ``dtype``; with a mask, the mean over the counted rows."""
    if function == "adaptive_coefficient":
        norms = SCALE * x.frozen_forget.to(dtype).norm(dim=-1)
        return norms if x.mask is None else norms * x.mask
    terms = []
    if function != "retain_mse":
        terms.append(mean_square(x.forget.to(dtype), forget_target(function, x, dtype), x.mask))
    if FUNCTIONS[function].gradients == 2 or function == "retain_mse":
        weight = 1.0 if function == "retain_mse" else ALPHA
        terms.append(weight * mean_square(x.retain.to(dtype), x.frozen_retain.to(dtype), x.mask))
    return sum(terms[1:], terms[0])


def forget_target(function: str, x: Inputs, dtype: torch.dtype) -> Tensor:
    direction = x.direction.to(dtype)
    if function in ("rmu_loss, RMU", "steering_mse"):
        return (COEFFICIENT * direction).expand_as(x.forget)
    if "cached" in function:
        return x.norms.to(dtype)[:, None] * direction
    return SCALE * x.frozen_forget.to(dtype).norm(dim=-1, keepdim=True) * direction


def mean_square(hidden: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return mse_loss(hidden, target)
    errors = (hidden - target).square() * mask[:, None]
    return errors.sum() / (mask.sum() * hidden.shape[-1])


def call(loss: Callable[[], Tensor], mode: str, trained: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The loss, and in the modes with a backward pass its gradients times grad_output."""
    if mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(),)

        return forward
    grad_output = None
    if mode == "backward scaled":
        grad_output = torch.tensor(GRAD_OUTPUT, device=trained[0].device)

    def forward_and_backward() -> tuple[Tensor, ...]:
        value = loss()
        factor = None if grad_output is None else grad_output.to(value.dtype)
        return (value.detach(), *torch.autograd.grad(value, trained, factor))

    return forward_and_backward


class Errors(NamedTuple):
    """Against fp64, relative to the exact value's root mean square; of two gradients the larger error."""

    loss: float
    gradient: float | None

    @property
    def wrong(self) -> bool:
        return not (self.loss <= TOLERANCE and (self.gradient is None or self.gradient <= TOLERANCE))


@torch.no_grad()
def errors(case: Case, inputs: Inputs, mode: str, results: tuple[Tensor, ...]) -> Errors:
    """Of a call's results, in pieces of rows, so that fp64 needs little memory."""
    if case.function == "adaptive_coefficient":
        exact = SCALE * inputs.frozen_forget.double().norm(dim=-1)
        if inputs.mask is not None:
            exact = exact * inputs.mask
        return Errors(((results[0].double() - exact).norm() / exact.norm()).item(), None)
    factor = GRAD_OUTPUT if mode == "backward scaled" else 1.0
    trained = inputs.trained(case.function)
    gradients = results[1:] or (None,) * len(trained)
    loss, gradient_errors = 0.0, []
    counted = case.rows if inputs.mask is None else int(inputs.mask.sum())
    piece = max(1, 2**23 // case.features)
    for hidden, gradient in zip(trained, gradients, strict=True):
        on_retain = hidden is inputs.retain
        weight = ALPHA if on_retain and case.function != "retain_mse" else 1.0
        off, size = 0.0, 0.0
        for start in range(0, case.rows, piece):
            rows = slice(start, start + piece)
            difference = hidden[rows].double() - exact_target(case.function, inputs, rows, on_retain)
            if inputs.mask is not None:
                difference *= inputs.mask[rows, None]
            loss += weight * difference.square().sum().item() / (counted * case.features)
            if gradient is not None:
                exact = difference * (2 * weight * factor / (counted * case.features))
                off += (gradient[rows].double() - exact).square().sum().item()
                size += exact.square().sum().item()
        if gradient is not None:
            gradient_errors.append((off / size) ** 0.5)
    # max() would let a NaN pass when it comes second.
    gradient_error = torch.tensor(gradient_errors).max().item() if gradient_errors else None
    return Errors(abs(results[0].double().item() / loss - 1), gradient_error)


def exact_target(function: str, x: Inputs, rows: slice, on_retain: bool) -> Tensor:
    if on_retain:
        return x.frozen_retain[rows].double()
    direction = x.direction.double()
    if function in ("rmu_loss, RMU", "steering_mse"):
        return COEFFICIENT * direction
    return SCALE * x.frozen_forget[rows].double().norm(dim=-1, keepdim=True) * direction


def planned_cases(device: str, toy: bool) -> list[tuple[Case, str, tuple[str, ...]]]:
    """(case, mode, providers), the most telling first: a run that is cut off has those."""
    whole = list(FUNCTIONS)[:2]
    both = MODES[1]
    most = tuple(p for p in PROVIDERS if p != "torch.compile")  # compiling takes seconds a case
    if toy:
        plan = [(Case(f, 4, 64, masked=f in whole), m, most) for f in FUNCTIONS for m in modes_of(f)]
        return [(Case(whole[0], 4, 64), MODES[0], PROVIDERS), *plan]
    if device == "cpu":
        shapes = [(2048, 576), (512, 576), (2048, 2048), (512, 4096)]
        plan = [(Case(f, *shapes[0]), m, PROVIDERS) for f in whole for m in MODES[:2]]
        plan += [(Case(f, 4, 64), both, most) for f in whole]
        plan += [(Case(f, *shape), both, most) for shape in shapes[1:] for f in whole]
        plan += [(Case(f, *shapes[0], masked=True), both, most) for f in whole]
        plan += [(Case(f, *shapes[0]), "backward scaled", most) for f in whole]
        plan += [(Case(f, *shapes[0]), modes_of(f)[:2][-1], most) for f in list(FUNCTIONS)[2:]]
        return plan
    wide, tall = (2048, 4096, 8192, 16384), (512, 2048, 8192, 65536)
    main = [(2048, 4096), (8192, 4096), (65536, 4096), (512, 4096), (8192, 16384), (8192, 8192), (8192, 2048)]
    plan = [(Case(f, *shape), both, PROVIDERS) for shape in main for f in whole]
    plan += [(Case(f, *main[1]), m, PROVIDERS) for f in list(FUNCTIONS)[2:] for m in modes_of(f)[-2:]]
    plan += [(Case(f, *main[1]), m, PROVIDERS) for f in whole for m in ("forward", "backward scaled")]
    plan += [(Case(f, *main[1], masked=True), both, PROVIDERS) for f in whole]
    rest = [(rows, features) for features in wide for rows in tall if (rows, features) not in main]
    return plan + [(Case(f, *shape), both, PROVIDERS) for shape in rest for f in whole]


def modes_of(function: str) -> tuple[str, ...]:
    return MODES if FUNCTIONS[function].gradients else MODES[:1]
