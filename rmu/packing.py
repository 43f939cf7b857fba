"""Batches without pad tokens: the sequences of a batch stand in one row, and attention keeps them apart by their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rmu.window import LayerWindow

# Relative to the norm of a token's state: rounding of the model's dtype through a few layers, far below what a token changes that
# sees another sequence.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def pack_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and position ids, both ``[1, S]`` int64, of sequences one after another; positions start again at each."""
    ids = [token for row in rows for token in row]
    positions = [position for row in rows for position in range(len(row))]
    return torch.tensor([ids], dtype=torch.long), torch.tensor([positions], dtype=torch.long)


def check_packing(window: LayerWindow, length: int = 12) -> None:
    """Try whether the model keeps packed sequences apart, on two sequences of random tokens.

    Raises:
        ValueError: a sequence's hidden states in a pack are not those it has alone.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = window.config.get_text_config().vocab_size
    rows = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (length, length + 3)]
    ids, positions = (tensor.to(window.device) for tensor in pack_rows(rows))
    attention = window.config._attn_implementation
    try:
        packed = window.frozen(ids, None, positions).hidden
    except TypeError as error:  # a model without position_ids
        raise ValueError(
            f"padding_free: {type(window.model).__name__} takes no position_ids; set it to false"
        ) from error
    start = 0
    for row in rows:
        alone = window.frozen(torch.tensor([row], device=window.device)).hidden
        assert packed is not None and alone is not None
        part = packed[:, start : start + len(row)]
        start += len(row)
        difference = (part.float() - alone.float()).norm(dim=-1) / alone.float().norm(dim=-1)
        if not difference.max() <= _TOLERANCE[alone.dtype]:
            raise ValueError(
                f"padding_free: {type(window.model).__name__} with attention {attention} does not keep packed sequences apart "
                f"(a hidden state is {difference.max().item():.0%} off); set it to false or choose another attn_implementation"
            )
