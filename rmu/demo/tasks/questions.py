"""The documents of the demo's tasks, read from the package itself (no hub, no cache)."""

import random
from typing import Any

from datasets import Dataset, DatasetDict

from rmu.demo import read_data


def load(**_metadata: Any) -> DatasetDict:
    """Called by lm-evaluation-harness, which passes the metadata of the task file."""
    return DatasetDict(test=Dataset.from_list(read_data("questions")))


def load_validation(**_metadata: Any) -> DatasetDict:
    """The questions to choose settings by."""
    return DatasetDict(test=Dataset.from_list(read_data("validation_questions")))


def load_blind(**_metadata: Any) -> DatasetDict:
    """Each test question four times with the definition of another thing of its kind, which is none of the answers: what is
    right then is right by the model's liking for some words alone."""
    questions = read_data("questions")
    blind = []
    for question in questions:
        others = [
            other["gloss"]
            for other in questions
            if other["kind"] == question["kind"] and other["word"] not in question["choices"]
        ]
        glosses = random.Random(question["synset"]).sample(others, 4)
        blind += [{**question, "gloss": gloss} for gloss in glosses]
    return DatasetDict(test=Dataset.from_list(blind))
