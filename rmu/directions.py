"""Steering directions: one unit vector a topic, drawn once and kept."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

FILE_NAME = "rmu_directions.safetensors"
DISTRIBUTIONS = ("uniform", "gaussian")


def draw_directions(
    topics: int,
    hidden_size: int,
    *,
    seed: int,
    distribution: str = "uniform",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``[topics, D]`` fp32 unit vectors from one generator seeded with ``seed``.

    ``uniform`` draws entries from [0, 1), as the released RMU code does (Li et al. 2024, arXiv 2403.03218): all entries are
    positive, so two directions have an expected cosine of 0.75. ``gaussian`` directions are nearly orthogonal.
    ``dtype`` and ``device`` are those of the drawing and of the division by the norm; the released code takes the model's.

    Raises:
        ValueError: an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"direction_distribution: got {distribution!r}, expected one of {', '.join(DISTRIBUTIONS)}"
        )
    generator = torch.Generator(device).manual_seed(seed)
    draw = torch.rand if distribution == "uniform" else torch.randn
    rows = [draw(hidden_size, generator=generator, dtype=dtype, device=device) for _ in range(topics)]
    return torch.stack([row / row.norm() for row in rows]).float()


def directions_to_bytes(directions: Tensor) -> bytes:
    """A safetensors file with keys ``direction.0``, ``direction.1``, ..."""
    return save({f"direction.{i}": row.contiguous() for i, row in enumerate(directions.cpu())})


def read_directions(path: str | Path, topics: int, hidden_size: int) -> Tensor:
    """``[topics, D]`` fp32 from a file as :func:`directions_to_bytes` writes it; the rows are used as they are.

    Raises:
        ValueError: not such a file, or its directions do not fit the topics or the hidden size.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"directions: {path} is not a readable safetensors file: {error}") from error
    rows = []
    for i in range(topics):
        row = tensors.get(f"direction.{i}")
        if row is None:
            raise ValueError(
                f"directions: {path} has {sorted(tensors)}, expected direction.{i} for {topics} topics"
            )
        if row.numel() != hidden_size:
            raise ValueError(
                f"directions: direction.{i} has shape {list(row.shape)}, expected [{hidden_size}]"
            )
        rows.append(row.float().flatten())
    return torch.stack(rows)
