"""Launches of the Triton kernels on the terms of a loss. No call here waits for the GPU."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rmu_kernels import kernels
from rmu_kernels.reference import Rows, Term, Wanted

# Columns that the registers of 16 warps hold: metrics and noise need registers too, and so do longer rows,
# which are taken in pieces by 8 warps. `python -m rmu_kernels.aot` finds what spills.
LARGEST_BLOCK, LARGEST_WITH_METRICS, LARGEST_WITH_NOISE = 16384, 8192, 4096
LARGEST_PIECE, PIECE_WITH_NOISE = 4096, 2048
COUNT_SEGMENT = 4096  # tokens that one program counts
REDUCE_BLOCK = 8192
RESCALED_ROWS = 16  # that one program looks after
# Fused multiply-adds: the default of Triton 3.9, which warns that 3.10 will turn it round.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
LAYOUTS_KEPT = 4096
_compiled: dict[tuple[Any, ...], dict[str, Any]] = {}


def layout(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """All that Triton compiles differently for: the rest of a tensor is its address."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16


def term_layout(term: Term) -> tuple[Any, ...]:
    return (
        layout(term.hidden),
        layout(term.frozen),
        layout(term.direction),
        layout(term.coefficient) if isinstance(term.coefficient, Tensor) else None,
        layout(term.mask),
        layout(term.seed) if isinstance(term.seed, Tensor) else (term.seed or 0) >= 2**31,
        term_flags(term),
    )


def compiled_for(*key: Any) -> dict[str, Any]:
    """The compiled kernels, by name, that calls with this key have launched."""
    found = _compiled.get(key)
    if found is None:
        if len(_compiled) >= LAYOUTS_KEPT:  # every batch may have another length
            _compiled.clear()
        found = _compiled[key] = {}
    return found


def run(kernel: Any, compiled: dict[str, Any], programs: int, *arguments: Any, **options: Any) -> None:
    """Every launch passes here, so that `rmu_kernels.aot` compiles what is launched and nothing else.

    To find the compiled kernel, Triton looks at each of some sixty arguments, which takes several times as
    long as the launch itself: done once for a `compiled_for`, whose key must decide all that Triton looks at.
    """
    launcher = compiled.get(kernel.__name__)
    if launcher is None:
        found = kernel[(programs,)](*arguments, **options, **COMPILER_OPTIONS)
        if found is not None:  # which the interpreter's is
            compiled[kernel.__name__] = found[(programs, 1, 1)]
    else:
        del options["num_warps"]
        launcher(*arguments, *options.values())


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def block_and_warps(features: int, metrics: bool = False, noise: bool = False) -> tuple[int, int]:
    """Columns that a program holds, and its warps: 32 would not fit the 64 lanes of an AMD wavefront."""
    largest = LARGEST_WITH_NOISE if noise else LARGEST_WITH_METRICS if metrics else LARGEST_BLOCK
    if features > largest:
        return PIECE_WITH_NOISE if noise else LARGEST_PIECE, 8
    block = next_power_of_2(features)
    return block, 4 if block <= 2048 else 8 if block <= 4096 else 16


def row_view(tensor: Tensor, trailing: int) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor and its strides with the leading dimensions seen as `[B, T]`; `trailing` dimensions stay."""
    leading = tensor.ndim - trailing
    if leading > 2:
        tensor = tensor.flatten(0, leading - 2)
    strides = tensor.stride()
    return tensor, strides if leading >= 2 else (0, *strides)


def row_length(hidden: Tensor) -> int:
    return max(hidden.shape[-2], 1)


def row_count(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


def row_arguments(
    term: Term, gradient: Tensor | None, weight: float, gradient_scale: float
) -> kernels.RowArguments:
    hidden, hidden_strides = row_view(term.hidden, 1)
    frozen, frozen_strides = (None, (0, 0, 0)) if term.frozen is None else row_view(term.frozen, 1)
    mask, mask_strides = (None, (0, 0)) if term.mask is None else row_view(term.mask, 0)
    direction_strides: tuple[int, ...] = (0, 0)
    if term.direction is not None:
        direction_strides = term.direction.stride()
        if len(direction_strides) == 1:
            direction_strides = (0, *direction_strides)
    pointer: Tensor | None = None
    pointer_strides: tuple[int, ...] = (0, 0)
    coefficient = 0.0
    if isinstance(term.coefficient, Tensor):
        pointer = term.coefficient
        if pointer.ndim == term.hidden.ndim - 1:
            pointer, pointer_strides = row_view(pointer, 0)
        elif pointer.ndim == 1:
            pointer_strides = (*pointer.stride(), 0)
    elif term.direction is not None:
        factor = term.coefficient if term.scale is None else term.scale
        assert factor is not None
        coefficient = float(factor)
    values = (
        hidden,
        *hidden_strides,
        frozen,
        *frozen_strides,
        term.direction,
        *direction_strides,
        pointer,
        *pointer_strides,
        coefficient,
        mask,
        *mask_strides,
        gradient,
        gradient_scale,
        weight,
        float(term.noise),
    )
    return kernels.RowArguments._make(values)


def term_flags(term: Term) -> kernels.TermFlags:
    return kernels.TermFlags(term.scale is not None, term.keep_frozen, term.relative, term.noise != 0)


def constant_weight(rows: int, features: int, reduction: str) -> float:
    """The weight of a token where every token is counted: then all sequences are equally long."""
    if reduction == "sum":
        return 1.0
    return 1.0 / features if reduction == "none" else 1.0 / (features * max(rows, 1))


def segments(term: Term | None, reduction: str) -> tuple[int, int]:
    """How many segments a mask is counted in, and the tokens of each."""
    if term is None or term.mask is None:
        return 0, 1
    rows = row_count(term.hidden)
    length = row_length(term.hidden) if reduction == "sequence_mean" else COUNT_SEGMENT
    return -(-rows // length), length


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(tensor.device)
    if tensor.device.index == module.current_device():
        return nullcontext()
    return module.device(tensor.device)


def mask_view(term: Term | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask and its strides, where there is one with tokens."""
    if term is None or term.mask is None or not term.mask.numel():
        return None, (0, 0)
    return row_view(term.mask, 0)


def count_tokens(
    forget: Term, retain: Term | None, reduction: str, compiled: dict[str, Any]
) -> tuple[Tensor | None, int, int]:
    """Counted tokens of every segment, forget first, and the number of segments of each."""
    forget_segments, forget_segment = segments(forget, reduction)
    retain_segments, retain_segment = segments(retain, reduction)
    total = forget_segments + retain_segments
    if total == 0:
        return None, 0, 0
    counts = torch.empty(total, dtype=torch.int32, device=forget.hidden.device)
    forget_mask, forget_strides = mask_view(forget)
    retain_mask, retain_strides = mask_view(retain)
    retain_rows, retain_length = 0, 1
    if retain is not None and retain_segments:
        retain_rows, retain_length = row_count(retain.hidden), row_length(retain.hidden)
    run(
        kernels.count_kernel,
        compiled,
        total,
        forget_mask,
        forget_strides,
        row_count(forget.hidden),
        row_length(forget.hidden),
        forget_segments,
        forget_segment,
        retain_mask,
        retain_strides,
        retain_rows,
        retain_length,
        retain_segment,
        counts,
        BLOCK=1024,
        num_warps=4,
    )
    return counts, forget_segments, retain_segments


def launch_rows(
    forget: Term,
    retain: Term | None,
    alpha: float,
    reduction: str,
    wanted: Wanted,
    grad_output: Tensor | None = None,
) -> Rows:
    """The loss forget + alpha * retain and, where wanted, its gradients times grad_output (1 when None)."""
    hidden, features = forget.hidden, forget.hidden.shape[-1]
    device = hidden.device
    compiled = compiled_for(
        device,
        term_layout(forget),
        None if retain is None else term_layout(retain),
        reduction,
        wanted,
        layout(grad_output),
    )
    forget_rows = row_count(hidden)
    retain_rows = 0 if retain is None else row_count(retain.hidden)
    rows = forget_rows + retain_rows

    def gradient_of(term: Term | None, is_wanted: bool) -> Tensor | None:
        if term is None or not is_wanted:
            return None
        return torch.empty(term.hidden.shape, dtype=term.hidden.dtype, device=device)

    forget_gradient = gradient_of(forget, wanted.forget_gradient)
    retain_gradient = gradient_of(retain, wanted.retain_gradient)
    values = torch.empty(rows, dtype=torch.float32, device=device) if wanted.loss else None
    measured = torch.empty(3 * rows, dtype=torch.float32, device=device) if wanted.metrics else None
    grad_output_strides: tuple[int, ...] = (0, 0)
    if grad_output is not None and grad_output.ndim:
        grad_output, grad_output_strides = row_view(grad_output, 0)

    with on_device(hidden):
        counts, forget_segments, retain_segments = None, 0, 0
        if wanted.metrics or reduction in ("mean", "sequence_mean"):
            counts, forget_segments, retain_segments = count_tokens(forget, retain, reduction, compiled)
        if rows:
            weight = constant_weight(forget_rows, features, reduction)
            retain_arguments = retain_flags = None
            if retain is not None:
                retain_weight = constant_weight(retain_rows, features, reduction)
                retain_arguments = row_arguments(retain, retain_gradient, retain_weight, float(alpha))
                retain_flags = term_flags(retain)
            noise = forget.noise != 0 or (retain is not None and retain.noise != 0)
            block, warps = block_and_warps(features, wanted.metrics, noise)
            run(
                kernels.rows_kernel,
                compiled,
                rows,
                row_arguments(forget, forget_gradient, weight, 1.0),
                retain_arguments,
                forget_rows,
                row_length(hidden),
                1 if retain is None else row_length(retain.hidden),
                counts,
                forget_segments,
                retain_segments,
                grad_output,
                grad_output_strides,
                forget.seed if isinstance(forget.seed, Tensor) else None,
                forget.seed if isinstance(forget.seed, int) else 0,
                values,
                measured,
                FORGET_FLAGS=term_flags(forget),
                RETAIN_FLAGS=retain_flags,
                COUNTING=reduction if counts is not None else "",
                FEATURES=features,
                BLOCK=block,
                num_warps=warps,
            )
        if values is None:
            return Rows(None, None, forget_gradient, retain_gradient)
        if reduction == "none":
            return Rows(values.view(hidden.shape[:-1]), None, forget_gradient)
        loss = torch.empty((), dtype=torch.float32, device=device)
        parts = torch.empty(7 if wanted.metrics else 2, dtype=torch.float32, device=device)
        run(
            kernels.finish_kernel,
            compiled,
            6 if wanted.metrics else 1,
            values,
            measured,
            forget_rows,
            retain_rows,
            counts,
            forget_segments,
            retain_segments,
            float(alpha),
            loss,
            parts,
            BLOCK=REDUCE_BLOCK,
            num_warps=16,
        )
    return Rows(loss, parts, forget_gradient, retain_gradient)


def launch_rescale(
    forget_gradient: Tensor | None, retain_gradient: Tensor | None, grad_output: Tensor
) -> None:
    """Multiply the gradients by grad_output in place; where it is 1 they are neither read nor written."""
    some = forget_gradient if forget_gradient is not None else retain_gradient
    if some is None:
        return
    forget_rows = 0 if forget_gradient is None else row_count(forget_gradient)
    rows = forget_rows + (0 if retain_gradient is None else row_count(retain_gradient))
    if rows == 0:
        return
    compiled = compiled_for(
        some.device, layout(forget_gradient), layout(retain_gradient), layout(grad_output)
    )
    strides: tuple[int, ...] = (0, 0)
    if grad_output.ndim:
        grad_output, strides = row_view(grad_output, 0)
    # Rows one after another: each in pieces, so that what the loop over rows needs has registers too.
    block, warps = block_and_warps(min(some.shape[-1], LARGEST_PIECE))
    with on_device(some):
        run(
            kernels.rescale_kernel,
            compiled,
            -(-rows // RESCALED_ROWS),
            forget_gradient,
            retain_gradient,
            forget_rows,
            rows,
            row_length(some),
            grad_output,
            strides,
            FEATURES=some.shape[-1],
            BLOCK=block,
            ROWS=RESCALED_ROWS,
            num_warps=warps,
        )


def launch_token_norm(hidden: Tensor) -> Tensor:
    """||h|| of every token in fp32."""
    norms = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
    rows = row_count(hidden)
    if rows:
        view, strides = row_view(hidden, 1)
        block, warps = block_and_warps(hidden.shape[-1])
        compiled = compiled_for(hidden.device, layout(hidden))
        with on_device(hidden):
            run(
                kernels.norm_kernel,
                compiled,
                rows,
                view,
                strides,
                row_length(hidden),
                norms,
                FEATURES=hidden.shape[-1],
                BLOCK=block,
                num_warps=warps,
            )
    return norms
