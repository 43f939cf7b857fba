"""The family's settings (norm-relative, retain noise, random steering vector, sequence scope) against plain formulas."""

import copy

import pytest
import torch

from rmu import RMUConfig, RMUTrainer
from rmu.data import UnlearningCollator
from rmu.directions import draw_directions
from rmu.trainer import noise_seed
from rmu_kernels import rmu_loss
from tests.tiny import random_texts, tiny_folder, tiny_model, word_tokenizer
from tests.training.test_window import hidden_state

FORGET = [random_texts(1), random_texts(2, words=(8, 30))]
RETAIN = [random_texts(3)]


def config(folder, **changes) -> RMUConfig:
    settings = dict(output_dir=str(folder), layer=2, max_steps=1, learning_rate=1e-3, logging_steps=1)
    settings |= dict(alpha=[10.0], scale=[3.0], coefficient=[0.5], shuffle=False, seed=5)
    settings |= dict(disable_tqdm=True, use_cpu=True, report_to=[])
    return RMUConfig(**{**settings, **changes})


def trainer_of(model, args) -> RMUTrainer:
    return RMUTrainer(
        copy.deepcopy(model), args, forget=FORGET, retain=RETAIN, processing_class=word_tokenizer()
    )


def first_batch(model, count=4):
    """Counted rows' frozen states of the first batch, with each row's sequence."""
    collate = UnlearningCollator(word_tokenizer(), forget_lengths=[512], retain_length=512)
    items = [{"row": i, "topic": 0, "forget": FORGET[0][i], "retain": RETAIN[0][i]} for i in range(count)]
    batch = collate(items)
    sides = []
    for name in ("forget", "retain"):
        side = batch[name]
        with torch.no_grad():
            hidden = hidden_state(model, 2, side["input_ids"], side["attention_mask"])
        sides.append((hidden, side["loss_mask"].bool()))
    return sides


def losses_of(trainer):
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    return entry["forget_loss"], entry["retain_loss"]


def test_norm_relative(tmp_path):
    model = tiny_model()
    forget, retain = losses_of(trainer_of(model, config(tmp_path, relative=True)))
    (hidden, mask), _ = first_batch(model)
    rows = hidden[mask]
    norm = rows.norm(dim=-1, keepdim=True)
    direction = draw_directions(2, 32, seed=5)[0]
    assert forget == pytest.approx(((rows - 3.0 * norm * direction) ** 2 / norm**2).mean().item(), rel=1e-5)
    assert retain == 0.0


def test_sequence_scope(tmp_path):
    model = tiny_model()
    forget, _ = losses_of(trainer_of(model, config(tmp_path, scope="sequence")))
    (hidden, mask), _ = first_batch(model)
    direction = draw_directions(2, 32, seed=5)[0]
    errors = []
    for sequence, counted in zip(hidden, mask, strict=True):
        rows = sequence[counted]
        errors.append((rows - 3.0 * rows.norm(dim=-1).mean() * direction) ** 2)
    assert forget == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


def test_retain_noise_is_gaussian_of_that_size(tmp_path):
    """With h = h0 in the first step the retain loss is nu^2 times the mean square of the noise, 1 within five standard errors."""
    model = tiny_model()
    _, retain = losses_of(trainer_of(model, config(tmp_path, method="rmu", retain_noise=0.3)))
    _, (_, mask) = first_batch(model)
    values = mask.sum().item() * 32
    assert retain / 0.3**2 == pytest.approx(1.0, abs=5 * (2 / values) ** 0.5)


def test_random_steering_vector(tmp_path):
    model = tiny_model()
    trainer = trainer_of(model, config(tmp_path, method="rsv"))
    forget, retain = losses_of(trainer)
    (_, mask), _ = first_batch(model)
    values = mask.sum().item() * 32
    assert forget / 0.5**2 == pytest.approx(1.0, abs=5 * (2 / values) ** 0.5)
    assert retain == 0.0


def test_each_micro_batch_has_its_own_seed(tmp_path, monkeypatch):
    seeds: list[int] = []

    def keep_seed(*args, seed, **kwargs):
        seeds.append(seed)
        return rmu_loss(*args, seed=seed, **kwargs)

    monkeypatch.setattr("rmu.trainer.rmu_loss", keep_seed)
    args = config(tmp_path, method="rmu", retain_noise=0.1, max_steps=2, gradient_accumulation_steps=2)
    trainer_of(tiny_model(), args).train()
    assert seeds == [noise_seed(5, row) for row in (0, 4, 8, 12)]


def test_seeds_are_distinct_and_in_the_kernels_range():
    seeds = {noise_seed(seed, row) for seed in range(50) for row in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("settings", [{"method": "rmu", "retain_noise": 0.5}, {"method": "rsv"}], ids=str)
def test_a_resumed_run_repeats_the_noise(tmp_path, settings):
    base = tiny_folder(tmp_path / "base")
    settings = {**settings, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def run(name, **how):
        trainer = RMUTrainer(str(base), config(tmp_path / name, **settings), forget=FORGET, retain=RETAIN)
        trainer.train(**how)
        return trainer

    whole = run("a")
    resumed = run("b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for a, b in zip(whole.window.trained, resumed.window.trained, strict=True):
        assert torch.equal(a, b)
    entries = [e["retain_loss"] for e in whole.state.log_history if "loss" in e]
    assert len(set(entries)) == len(entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative": True, "method": "rmu"}, "relative: got true with method rmu and scope token"),
        ({"relative": True, "scope": "batch"}, "relative: got true with method adaptive and scope batch"),
        ({"retain_noise": -0.1}, "retain_noise: got -0.1"),
        ({"method": "rsv", "coefficient": [0.0]}, "coefficient: got 0, expected more than 0"),
        (
            {"directions": "d.safetensors", "direction_distribution": "gaussian"},
            "direction_distribution: got gaussian, but directions d.safetensors holds them",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
