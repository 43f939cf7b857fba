"""A tripwire for regressions, with pytest-benchmark: ``pytest benchmarks/test_bench.py``, or ``make bench-compare REF=...``.

It uses nothing of this folder, so that it can measure any revision of the packages.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForCausalLM

from rmu.window import LayerWindow
from rmu_kernels import adaptive_coefficient, rmu_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, FEATURES = (8192, 4096) if DEVICE == "cuda" else (1024, 576)
SMALL_ROWS, SMALL_FEATURES = 8, 256


def measure(benchmark, function, rounds: int = 20) -> None:
    """The device's work included; a GPU's cache is overwritten before each call."""
    cache = torch.empty(2**28 if DEVICE == "cuda" else 0, dtype=torch.int8, device=DEVICE)

    def wait() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def setup() -> None:
        cache.zero_()
        wait()

    def call() -> None:
        function()
        wait()

    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=3)


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("form", ["rmu", "adaptive", "masked with metrics"])
def test_rmu_loss(benchmark, size, form):
    rows, features = (ROWS, FEATURES) if size == "large" else (SMALL_ROWS, SMALL_FEATURES)
    torch.manual_seed(0)
    tensors = [torch.randn(rows, features, device=DEVICE).bfloat16() for _ in range(4)]
    forget, retain = (tensor.requires_grad_() for tensor in tensors[:2])
    direction = normalize(torch.rand(features, device=DEVICE), dim=0)
    options: dict = {"frozen_forget": tensors[2], "scale": 5.0}
    if form == "rmu":
        options = {"coefficient": 6.5}
    if form == "masked with metrics":
        mask = torch.rand(rows, device=DEVICE) < 0.7
        options |= {"forget_mask": mask, "retain_mask": mask, "metrics": True}

    def step():
        loss = rmu_loss(forget, retain, tensors[3], direction, alpha=1200.0, **options).loss
        torch.autograd.grad(loss, [forget, retain])

    measure(benchmark, step, rounds=20 if size == "large" else 100)


@pytest.mark.parametrize("scope", ["token", "batch"])
def test_adaptive_coefficient(benchmark, scope):
    hidden = torch.randn(ROWS, FEATURES, device=DEVICE).bfloat16()
    measure(benchmark, lambda: adaptive_coefficient(hidden, 5.0, scope=scope), rounds=50)


@pytest.fixture(scope="module")
def window():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    return LayerWindow(AutoModelForCausalLM.from_config(config), 5).to(DEVICE)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 1024, (4, 64), device=DEVICE)


def test_frozen_pass(benchmark, window, ids):
    measure(benchmark, lambda: window.frozen(ids, torch.ones_like(ids)))


def test_window_step(benchmark, window, ids):
    frozen = window.frozen(ids, torch.ones_like(ids))

    def step():
        (hidden,) = window(frozen)
        torch.autograd.grad(hidden.square().mean(), list(window.trained))

    measure(benchmark, step)
