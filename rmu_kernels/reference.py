"""The losses in plain PyTorch: the definition, the oracle of the tests and the path for tensors without a kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sequence_mean", "sum", "none")
SMALLEST_SQUARED_NORM = 1e-12  # ||h0||^2 below this is taken as this, where a loss or a cosine divides by it
NORM_METRICS = ("forget_norm", "forget_cosine", "coefficient_mean", "retain_norm", "retain_cosine")


class Term(NamedTuple):
    """One loss term: the squared error of every token of `hidden` against

        target_t = a_t * direction + [keep_frozen] * frozen_t + noise * eps_t,    eps ~ N(0, 1)

    with a_t = `coefficient`, or `scale` * ||frozen_t|| when `scale` is given; without a direction a_t is 0.
    `relative` divides a token's error by ||frozen_t||^2. Tokens whose `mask` is zero count nothing.
    Shapes as in `rmu_kernels.functional`, which checks them.
    """

    hidden: Tensor
    frozen: Tensor | None = None
    direction: Tensor | None = None
    coefficient: Tensor | float | None = None
    scale: float | None = None
    mask: Tensor | None = None
    keep_frozen: bool = False
    noise: float = 0.0
    seed: Tensor | int | None = None
    relative: bool = False


class TokenValues(NamedTuple):
    """Per token, in fp32: the squared error summed over features, and what the metrics average."""

    error: Tensor
    norm: Tensor
    cosine: Tensor
    coefficient: Tensor


def token_norm(hidden: Tensor) -> Tensor:
    """||h|| of every token, in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return torch.linalg.vector_norm(hidden, dim=-1, dtype=dtype)


def gaussian_noise(like: Tensor, seed: Tensor | int) -> Tensor:
    """Standard normal values shaped as `like`: the same for the same seed on the same device."""
    generator = torch.Generator(device=like.device).manual_seed(int(seed))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def over_tokens(values: Tensor, tokens: torch.Size) -> Tensor:
    """`[B]` or 0-d values, one for every token of `[B, T]`."""
    if values.ndim < len(tokens) and values.ndim > 0:
        values = values[:, None]
    return values.expand(tokens)


def token_values(term: Term) -> TokenValues:
    dtype = torch.promote_types(term.hidden.dtype, torch.float32)
    counted = None if term.mask is None else (term.mask != 0).unsqueeze(-1)

    def rows(hidden: Tensor) -> Tensor:
        # Masked before any arithmetic: what a masked row holds, NaN included, reaches neither loss nor gradient.
        hidden = hidden.to(dtype)
        return hidden if counted is None else torch.where(counted, hidden, 0.0)

    hidden = rows(term.hidden)
    tokens = hidden.shape[:-1]
    frozen = None if term.frozen is None else rows(term.frozen)
    squared_norm = None if frozen is None else frozen.square().sum(-1)

    target = torch.zeros_like(hidden)
    coefficient = torch.zeros(tokens, dtype=dtype, device=hidden.device)
    if term.direction is not None:
        if term.scale is not None:
            coefficient = term.scale * squared_norm.sqrt()
        elif isinstance(term.coefficient, Tensor):
            coefficient = over_tokens(term.coefficient.to(dtype), tokens)
        else:
            coefficient = torch.full_like(coefficient, term.coefficient)
        if counted is not None:
            coefficient = torch.where(counted.squeeze(-1), coefficient, 0.0)
        direction = term.direction.to(dtype)
        if direction.ndim == 2:
            direction = direction[:, None, :]
        target = coefficient[..., None] * direction
    if term.keep_frozen:
        target = target + frozen
    difference = hidden - target
    if term.noise:
        difference = difference - rows(term.noise * gaussian_noise(hidden, term.seed))
    error = difference.square().sum(-1)
    if counted is not None:
        error = torch.where(counted.squeeze(-1), error, 0.0)  # a direction's NaN times a zero coefficient
    if term.relative:
        error = error / squared_norm.clamp(min=SMALLEST_SQUARED_NORM)

    with torch.no_grad():
        norm = hidden.square().sum(-1).sqrt()
        squared_norms = (norm.square() * target.square().sum(-1)).clamp(min=SMALLEST_SQUARED_NORM**2)
        cosine = (hidden * target).sum(-1) / squared_norms.sqrt()
    return TokenValues(error, norm, cosine, coefficient)


def mean_over_counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over counted tokens; 0 where none is. Masked values must be 0 already."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return values.sum() / (mask != 0).sum().clamp(min=1)


def reduce_errors(error: Tensor, mask: Tensor | None, features: int, reduction: str) -> Tensor:
    if reduction == "none":
        return error / features
    if reduction == "sum":
        return error.sum()
    if reduction == "mean":
        return mean_over_counted(error, mask) / features
    counted = torch.ones_like(error) if mask is None else (mask != 0).to(error.dtype)
    lengths = counted.sum(1)
    sequence_means = error.sum(1) / lengths.clamp(min=1)
    return sequence_means.sum() / (lengths > 0).sum().clamp(min=1) / features


def term_loss(term: Term, reduction: str) -> Tensor:
    return reduce_errors(token_values(term).error, term.mask, term.hidden.shape[-1], reduction)


def reduce_norms(norms: Tensor, mask: Tensor | None, scope: str, statistic: str) -> Tensor:
    """Token norms over the scope of `functional.adaptive_coefficient`; 0 where nothing is counted."""
    counted = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask != 0
    norms = torch.where(counted, norms, 0.0)
    if scope == "token":
        return norms
    if scope == "batch":
        norms, counted = norms.reshape(1, -1), counted.reshape(1, -1)
    count = counted.sum(1)
    if statistic == "mean" or norms.shape[1] == 0:
        values = norms.sum(1) / count.clamp(min=1)
    else:
        # The lower median, as torch.median; masked norms sort to the end, and a counted NaN wins.
        ordered = torch.where(counted, norms, torch.inf).sort(1).values
        middle = ((count - 1) // 2).clamp(min=0)
        values = ordered.gather(1, middle[:, None])[:, 0]
        values = torch.where(norms.isnan().any(1), torch.nan, torch.where(count > 0, values, 0.0))
    return values[0] if scope == "batch" else values


def rmu_loss(forget: Term, retain: Term, alpha: float, reduction: str, metrics: bool):
    """(loss, forget loss, retain loss, metrics in the order of NORM_METRICS or None)"""
    forget_values, retain_values = token_values(forget), token_values(retain)
    features = forget.hidden.shape[-1]
    forget_loss = reduce_errors(forget_values.error, forget.mask, features, reduction)
    retain_loss = reduce_errors(retain_values.error, retain.mask, features, reduction)
    measured = None
    if metrics:
        pairs = [(forget_values[i], forget.mask) for i in (1, 2, 3)]
        pairs += [(retain_values[i], retain.mask) for i in (1, 2)]
        measured = [mean_over_counted(values, mask).detach() for values, mask in pairs]
    return forget_loss + alpha * retain_loss, forget_loss.detach(), retain_loss.detach(), measured
