"""The frozen weights split over processes by FSDP2 (:func:`torch.distributed.fsdp.fully_shard`), layer by layer.

Only they are split. The trained tensors, few and small, stay whole on every process, and DDP averages their gradients: optimizers,
checkpoints and results are those of a run without it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from rmu.embedding import HostEmbedding

if TYPE_CHECKING:
    from rmu.window import LayerWindow

SWITCH = "ACCELERATE_USE_FSDP"  # as accelerate launch sets it
_launched = False


def wants_sharding(fsdp: Any, fsdp_config: Any) -> bool:
    """Whether FSDP is asked for, by ``accelerate launch`` or by the settings of ``TrainingArguments``.

    The launcher's switch is turned off, for accelerate would wrap the window as a whole: outside its forward pass, where the
    frozen pass runs, its weights would be parts.

    Raises:
        ValueError: another FSDP than version 2 with all weights on the device.
    """
    global _launched
    if os.environ.get(SWITCH, "false").lower() == "true":
        _launched = True
        os.environ[SWITCH] = "false"
    given = fsdp if isinstance(fsdp, (list, tuple)) else str(fsdp or "").split()
    words = {str(getattr(word, "value", word)).lower() for word in given} - {"false", "none"}
    if words - {"true", "full_shard", "auto_wrap"}:
        raise ValueError(f"fsdp: got {fsdp!r}, expected true or full_shard")
    if not (words or _launched):
        return False
    if isinstance(fsdp_config, str):
        is_json = fsdp_config.lstrip().startswith("{")
        fsdp_config = json.loads(fsdp_config if is_json else Path(fsdp_config).read_text())
    config = {str(key).removeprefix("fsdp_"): value for key, value in (fsdp_config or {}).items()}
    launcher = os.environ if _launched else {}
    version = config.get("version", launcher.get("FSDP_VERSION", 2))
    if str(version) != "2":
        raise ValueError(f"fsdp_version: got {version}, expected 2")
    offload = config.get("cpu_offload", launcher.get("FSDP_OFFLOAD_PARAMS", False))
    if str(offload).lower() == "true":
        raise ValueError("fsdp_offload_params: got true, expected false; see embeddings_on_cpu")
    again = config.get("activation_checkpointing", launcher.get("FSDP_ACTIVATION_CHECKPOINTING", False))
    if str(again).lower() == "true":
        raise ValueError(
            "fsdp_activation_checkpointing: got true, expected false; see gradient_checkpointing"
        )
    return True


def shard(window: LayerWindow, device: torch.device) -> None:
    """Split the wrapped model's weights over all processes; each layer is gathered on ``device`` while it runs.

    To be called on every process, with the same weights.
    """
    from torch.distributed.fsdp import fully_shard

    options: dict[str, Any] = {
        "mesh": distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    }
    trained = set(window.trained)
    if trained & set(window.model.parameters()):  # LoRA adapters, in the layers
        options["ignored_params"] = trained
    for layer in window._layers:
        # The rerun comes right after the frozen pass, and its backward pass splits its layers again.
        fully_shard(layer, **options, reshard_after_forward=layer not in window._window)
    embedding = window.model.get_input_embeddings()
    if not isinstance(embedding, HostEmbedding):
        fully_shard(embedding, **options)
    fully_shard(window.model, **options)
    # DDP would compare and send what is not trained.
    names = [name for name, parameter in window.named_parameters() if parameter not in trained]
    names += [name for name, _ in window.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(window, names)
