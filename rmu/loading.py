"""The model and the window that the settings of a run ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from rmu.config import RMUConfig
from rmu.lora import LoRAWindow, quantization_config
from rmu.window import LayerWindow


def window_settings(args: RMUConfig) -> dict[str, Any]:
    """Arguments of a :class:`LayerWindow` beside the model and the hooked layer."""
    return {
        "trained_layers": args.trained_layers,
        "trained_parameters": args.trained_parameters,
        "parameter_dtype": None if args.parameter_dtype == "auto" else getattr(torch, args.parameter_dtype),
        "embeddings_on_cpu": args.embeddings_on_cpu,
    }


def make_window(
    model: Path | PreTrainedModel, args: RMUConfig, trust_remote_code: bool = False
) -> LayerWindow:
    """The window that the settings ask for, on a model folder or on a model in memory."""
    settings = window_settings(args)
    window: type[LayerWindow] = LayerWindow
    if args.lora_rank:
        window = LoRAWindow
        settings |= {"rank": args.lora_rank, "alpha": args.lora_alpha}
        # Adapters are drawn at random, and Trainer seeds only after this.
        set_seed(args.seed)
    if isinstance(model, PreTrainedModel):
        return window(model, int(args.layer), **settings)
    return window.from_pretrained(
        str(model), int(args.layer), **load_arguments(args, trust_remote_code), **settings
    )


def load_arguments(args: RMUConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for the base model that the settings ask for."""
    arguments: dict[str, Any] = {"dtype": args.dtype, "trust_remote_code": trust_remote_code}
    if args.attn_implementation:
        arguments["attn_implementation"] = args.attn_implementation
    if args.quantization != "none":
        arguments["quantization_config"] = quantization_config(args.quantization, args.device)
        arguments["device_map"] = {"": args.device}
    return arguments
