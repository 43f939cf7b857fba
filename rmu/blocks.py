"""Trained tensors that are a part of one of the model's tensors.

Transformers 5 stacks the matrices of a layer's experts in one tensor; checkpoints store a matrix an expert, by names of their own.
A block is what such a stored name stands for in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

Index = tuple[int | slice, ...]

# By model type: the stored name of ``mlp.experts``, and those of an expert's gate, up and down matrices.
_STORED_EXPERTS = {"mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2")}


class Block(NamedTuple):
    """A tensor of the model, or with an ``index`` a part of it."""

    tensor: str
    index: Index = ()  # type: ignore[assignment]  # takes the place of tuple.index


def all_blocks(model_type: str, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
    """What can be trained: every tensor by its name, and every expert's matrices by their names in the checkpoint."""
    blocks = {name: Block(name) for name in tensors}
    if model_type not in _STORED_EXPERTS:
        return blocks
    experts, gate, up, down = _STORED_EXPERTS[model_type]
    for name, tensor in tensors.items():
        parent, _, kind = name.rpartition(".mlp.experts.")
        if not parent:
            continue
        for expert in range(tensor.shape[0]):
            stored = f"{parent}.{experts}.{expert}"
            if kind == "gate_up_proj":  # [E, 2 I, D]
                half = tensor.shape[1] // 2
                blocks[f"{stored}.{gate}.weight"] = Block(name, (expert, slice(0, half)))
                blocks[f"{stored}.{up}.weight"] = Block(name, (expert, slice(half, 2 * half)))
            elif kind == "down_proj":  # [E, D, I]
                blocks[f"{stored}.{down}.weight"] = Block(name, (expert,))
    return blocks


def without_overlap(names: Iterable[str], blocks: Mapping[str, Block]) -> list[str]:
    """``names`` without the tensors of which a part is named too: only the parts can be written back."""
    names = list(names)
    parted = {blocks[name].tensor for name in names if blocks[name].index}
    return [name for name in names if blocks[name].index or name not in parted]


def part(tensor: Tensor, index: Index) -> Tensor:
    """The part of ``tensor`` that a block stands for, a view."""
    return tensor[index] if index else tensor


def put(tensor: Tensor, parts: Iterable[tuple[Index, Tensor]]) -> Tensor:
    """``tensor`` with ``parts`` in their places, in its dtype and on its device; gradients flow to the parts."""
    result = None
    for index, value in parts:
        if not index:
            return value.to(tensor)
        result = tensor.detach().clone() if result is None else result
        result[index] = value.to(tensor)
    return tensor if result is None else result
