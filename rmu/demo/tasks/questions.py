"""The documents of the demo's tasks, read from the package itself (no hub, no cache)."""

from typing import Any

from datasets import Dataset, DatasetDict

from rmu.demo import read_data


def load(**_metadata: Any) -> DatasetDict:
    """Called by lm-evaluation-harness, which passes the metadata of the task file."""
    return DatasetDict(test=Dataset.from_list(read_data("questions")))


def load_validation(**_metadata: Any) -> DatasetDict:
    """The questions to choose settings by."""
    return DatasetDict(test=Dataset.from_list(read_data("validation_questions")))
