"""Training on a GPU: through the Triton kernels, and equal to the CPU."""

import pytest
import torch

from rmu import RMUConfig, RMUTrainer
from rmu_kernels import resolve_backend
from tests.tiny import random_texts, tiny_model, word_tokenizer

pytestmark = pytest.mark.gpu


def run(folder, use_cpu: bool, **settings) -> RMUTrainer:
    args = RMUConfig(
        output_dir=str(folder),
        layer=2,
        max_steps=10,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=use_cpu,
        disable_tqdm=True,
        seed=3,
        **settings,
    )
    topics = [random_texts(1), random_texts(2, words=(8, 30))]
    trainer = RMUTrainer(
        tiny_model(), args, forget=topics, retain=[random_texts(3)], processing_class=word_tokenizer()
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings", [{"method": "rmu"}, {"scope": "token"}, {"scope": "batch"}, {"scope": "first_batch"}], ids=str
)
def test_losses_equal_those_of_the_cpu(tmp_path, settings):
    on_gpu, on_cpu = run(tmp_path / "a", False, **settings), run(tmp_path / "b", True, **settings)
    assert resolve_backend(on_gpu.window.trained[0]) == "triton"
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (on_gpu, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for a, b in zip(on_gpu.window.trained, on_cpu.window.trained, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-4)


def test_the_same_run_twice_gives_the_same_bits(tmp_path):
    first, second = run(tmp_path / "a", False), run(tmp_path / "b", False)
    for a, b in zip(first.window.trained, second.window.trained, strict=True):
        assert torch.equal(a, b)
