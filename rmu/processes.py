"""A step whose rows are spread over processes and micro-batches: what has to be known of the whole of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rmu_kernels.reference import reduce_norms


class StepTokens(NamedTuple):
    """Counted tokens of a whole step, in every micro-batch of every process."""

    forget: int
    retain: int


def sum_over_processes(numbers: list[int], accelerator: Accelerator) -> list[int]:
    """Element by element, the sum over the processes. Waits for the device when there are several."""
    if accelerator.num_processes == 1:
        return numbers
    return accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "sum").tolist()


def step_coefficient(norms: Tensor, scale: float, statistic: str, accelerator: Accelerator) -> Tensor:
    """``rmu_kernels.adaptive_coefficient`` of scope ``batch`` over a whole step, the same on every process.

    Args:
        norms: ``[N]`` fp32, those of this process's counted tokens.
        scale, statistic: as there.
    """
    if accelerator.num_processes > 1:
        padded = accelerator.pad_across_processes(norms, pad_index=-1.0)
        gathered = accelerator.gather(padded)
        norms = gathered[gathered != -1.0]
    return scale * reduce_norms(norms, None, "batch", statistic)
