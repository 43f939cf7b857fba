"""What TensorBoard and trackio get to see: the losses and cosines of a run; and nobody is asked for it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from rmu import RMUTrainer
from tests.tiny import random_texts, tiny_folder
from tests.training.test_trainer import config

LOGGED = ("forget_loss", "retain_loss", "forget_cosine", "retain_cosine")


def run(folder, **changes):
    args = config(folder / "out", max_steps=3, forget_max_length=16, **changes)
    trainer = RMUTrainer(
        str(tiny_folder(folder / "base")), args, forget=[random_texts(1)], retain=[random_texts(2)]
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_nothing_is_logged_elsewhere_unless_asked(tmp_path):
    args = config(tmp_path / "out")
    assert args.report_to == [] and args.trackio_space_id is None


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run(tmp_path, report_to=["tensorboard"])
    (file,) = (tmp_path / "out").rglob("events.out*")
    events = EventAccumulator(str(file)).Reload()
    for name in LOGGED:
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in history], rel=1e-5)


TRACKIO_RUN = """
import json, socket, sys
from pathlib import Path
connect = socket.socket.connect
def local_only(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("asked", address, file=sys.stderr)
        sys.stderr.flush()
        raise OSError("no network")
    return connect(self, address)
socket.socket.connect = local_only
from tests.training.test_loggers import run
history = run(Path(sys.argv[1]), report_to=["trackio"], project="rmu-test", run_name="one")
from trackio.sqlite_storage import SQLiteStorage
print("\\nRESULT" + json.dumps([history, SQLiteStorage.get_logs("rmu-test", "one")]))
"""


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio(tmp_path):
    # In a process of its own: trackio reads its folder when it is imported, and leaves threads behind.
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO_RUN, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "asked" not in done.stderr, done.stderr
    history, logs = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    for name in LOGGED:
        values = [log[f"train/{name}"] for log in logs if f"train/{name}" in log]
        assert values == pytest.approx([entry[name] for entry in history], rel=1e-5)
