"""What a run will read, train and keep, from the model's config alone: no weights are loaded.

The model's own class is built on the meta device and a step is run there, so that the numbers hold for any architecture. They are
of full batches: every row as long as the settings allow.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from rmu.calibrate import propose_layer
from rmu.checkpoint import CONFIG_FILE, stored_tensors
from rmu.config import AUTO, RMUConfig
from rmu.meter import Meter
from rmu.trainer import RMUTrainer, make_window
from rmu.window import LayerWindow, check_layer, truncate_config
from rmu_kernels import rmu_loss


@dataclass(frozen=True)
class Plan:
    """What a run takes, in parameters, bytes (of one process) and floating point operations (of one micro-batch pair).

    Attributes:
        layer, layers: the hooked layer and the number of decoder layers.
        rows, forget_lengths, retain_length: the shape of a batch.
        model_parameters, read_parameters, trained_parameters: of the whole model, of layers ``0..l`` with the embeddings, trained.
        trained_names: the trained tensors.
        read_bytes, checkpoint_bytes: what is read from the checkpoint's files, of how much.
        from_headers: whether these two are from the files' headers, or from the config.
        weights, embeddings: bytes of the frozen model on the device, the input embeddings among them or on their own.
        trained, optimizer: bytes of the trained tensors and of the optimizer's state.
        recorded: bytes that the frozen passes leave for the rerun and the loss.
        gradients: bytes of the trained tensors' gradients.
        activations: bytes at the peak of a step beyond ``recorded`` and ``gradients``: activations and workspace.
        device_peak: bytes on the device at most.
        host: bytes in the host's memory at most, those of the process itself (libraries) not counted.
        flops, released_flops: operations of a step here, and of the released two-model loop on the same batch; mean of the topics.
    """

    layer: int
    layers: int
    rows: int
    forget_lengths: tuple[int, ...]
    retain_length: int
    model_parameters: int
    read_parameters: int
    trained_parameters: int
    trained_names: tuple[str, ...]
    read_bytes: int
    checkpoint_bytes: int
    from_headers: bool
    weights: int
    embeddings: int
    trained: int
    optimizer: int
    recorded: int
    gradients: int
    activations: int
    device_peak: int
    host: int
    flops: float
    released_flops: float


def plan_run(
    model: str | Path,
    args: RMUConfig,
    *,
    topics: int = 1,
    on_cpu: bool | None = None,
    whole_model: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of ``rmu unlearn`` with these settings.

    Args:
        model: a model folder, a hub id (its config is read, nothing else), or a ``config.json``.
        args: settings.
        topics: number of forget corpora.
        on_cpu: plan a run on the CPU; default: what ``args`` would take.
        whole_model: the whole model is in memory, as it is where accuracy is measured during training.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        ValueError: no such config, or settings that do not fit it.
    """
    if args.quantization != "none":
        raise ValueError(f"quantization: got {args.quantization}, which cannot be planned; expected none")
    config = read_config(model, trust_remote_code)
    layers = config.get_text_config().num_hidden_layers
    layer = propose_layer(layers) if args.layer == AUTO else int(args.layer)
    check_layer(layer, layers)
    args = copy.copy(args)
    args.layer = layer
    on_cpu = args.device.type == "cpu" if on_cpu is None else on_cpu
    dtype = _dtype(args.dtype, config)
    lengths = tuple(args.per_topic("forget_max_length", topics))

    whole = _on_meta(AutoModelForCausalLM, config, dtype, trust_remote_code)
    truncated = copy.deepcopy(config)
    truncate_config(truncated.get_text_config(), layer + 1)
    base = _on_meta(AutoModel, truncated, dtype, trust_remote_code)
    window = make_window(base, args)
    rows = args.per_device_train_batch_size
    steps = {
        n: _Step(window, (rows, n), (rows, args.retain_max_length), args.gradient_accumulation_steps, on_cpu)
        for n in set(lengths)
    }
    largest = max(steps.values(), key=lambda step: step.peak)
    state, update = _optimizer_bytes(args, list(window.trained))
    gradients = _bytes(window.trained)
    embeddings = _bytes(base.get_input_embeddings().parameters())
    weights = _bytes(whole if whole_model else base) - embeddings
    trained = _bytes(window.trained) + (_bytes(base) - _bytes(_on_meta(AutoModel, truncated, dtype, trust_remote_code)) if args.lora_rank else 0)
    peak = weights + embeddings + trained + state + max(largest.peak, gradients + update)
    read, stored, from_headers = _read_bytes(model, base, layer, whole)
    released = _released_flops(whole, base, lengths, rows, args.retain_max_length)
    return Plan(
        layer=layer,
        layers=layers,
        rows=rows,
        forget_lengths=lengths,
        retain_length=args.retain_max_length,
        model_parameters=_number(whole),
        read_parameters=_number(whole if whole_model else base),
        trained_parameters=sum(p.numel() for p in window.trained),
        trained_names=tuple(window.trained_names),
        read_bytes=stored if whole_model else read,
        checkpoint_bytes=stored,
        from_headers=from_headers,
        weights=weights,
        embeddings=embeddings,
        trained=trained,
        optimizer=state,
        recorded=largest.recorded,
        gradients=gradients,
        activations=max(0, largest.peak - largest.recorded - gradients),
        device_peak=peak,
        host=peak if on_cpu else weights + embeddings,
        flops=sum(steps[n].flops for n in lengths) / len(lengths),
        released_flops=released,
    )
