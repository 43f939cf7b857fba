"""Unlearning with RMU and Adaptive RMU: a thin trainer that stops at the hooked layer."""

from rmu.config import RMUConfig, UnlearningArguments
from rmu.recording import FrozenPass
from rmu.trainer import RMUTrainer
from rmu.unlearn import unlearn
from rmu.window import LayerWindow

__all__ = ["FrozenPass", "LayerWindow", "RMUConfig", "RMUTrainer", "UnlearningArguments", "unlearn"]
