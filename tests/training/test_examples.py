"""The examples run, and the fused loss in them changes no loss of a step."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import LOGGED_LOSS_ERROR

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """The scripts as modules, imported as they are when they run as scripts."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("tiny", "hook_loop", "labels_trainer", "rmu_trainer"):
        sys.modules.pop(name, None)


def test_the_loop_with_hooks_and_the_same_run_with_the_trainer(examples):
    import hook_loop
    import rmu_trainer

    plain = hook_loop.unlearn(hook_loop.plain, 12)
    assert len(plain) == 12 and plain[-1] < plain[0]
    assert hook_loop.unlearn(hook_loop.fused, 12) == pytest.approx(plain, rel=1e-5)
    assert rmu_trainer.unlearn(12) == pytest.approx(plain, rel=1e-5, abs=LOGGED_LOSS_ERROR)


def test_the_trainer_with_labels(examples):
    import labels_trainer

    plain = labels_trainer.unlearn(labels_trainer.PlainRMU, 12)
    assert len(plain) == 12 and plain[-1] < plain[0]
    assert labels_trainer.unlearn(labels_trainer.FusedRMU, 12) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["hook_loop.py", "labels_trainer.py", "rmu_trainer.py"])
def test_runs_as_a_script(script):
    command = [sys.executable, str(EXAMPLES / script), "--steps", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "step 2: loss" in run.stdout
