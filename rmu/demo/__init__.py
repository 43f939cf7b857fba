"""The demo's own material: a small model, WordNet corpora, general prose and evaluation tasks."""

import gzip
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
TASKS_PATH = Path(__file__).parent / "tasks"
TASKS = ("rmu_demo_question", "rmu_demo_dictionary", "rmu_demo_completion")


def read_data(name: str) -> list[dict]:
    """The rows of `data/<name>.jsonl.gz`."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
