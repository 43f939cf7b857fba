"""A forget word inside a retain question: does it spoil the answer (Dang et al. 2025, arXiv 2501.19202)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmu.analysis.questions import ask, first, question_accuracy

if TYPE_CHECKING:
    from pandas import DataFrame

INSERTED = ("nothing", "retain word", "forget word")


def insert_word(prompt: str, word: str) -> str:
    """The prompt with ``word`` in brackets after the first half of its words."""
    pieces = prompt.split(" ")
    middle = len(pieces) // 2
    return " ".join([*pieces[:middle], f"({word})", *pieces[middle:]])


def mixed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, Any]],
    templates: Mapping[str, str],
    *,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> DataFrame:
    """Accuracy on retain questions as they are, with a retain word inserted (the control), and with a forget word.

    The words are right answers of other questions of that side; a retain word is none of the question's own choices. Which word
    goes into which question depends on ``seed`` alone.

    Args:
        questions: as :func:`rmu.analysis.questions.read_questions` gives them; of both sides.
        templates: wordings by name.
        limit: at most this many retain questions.

    Returns:
        A row for each ``inserted`` and ``task`` (wording): ``side``, ``n``, ``accuracy``, ``stderr``.
    """
    import pandas as pd

    asked_about = first(questions, "retain", limit)
    words = {
        f"{side} word": [q["choices"][q["gold"]] for q in first(questions, side)]
        for side in ("forget", "retain")
    }
    asked = {}
    for inserted in INSERTED:
        generator = np.random.default_rng(seed)
        for name, template in templates.items():
            prompts = ask(asked_about, template)
            if inserted != "nothing":
                for row in prompts:
                    free = [word for word in words[inserted] if word not in row["choices"]]
                    if not free:
                        raise ValueError(f"questions: no {inserted} that is not among {row['choices']}")
                    row["prompt"] = insert_word(row["prompt"], free[generator.integers(len(free))])
            asked[f"{inserted}/{name}"] = prompts
    rows = []
    for row in question_accuracy(model, tokenizer, asked, batch_size):
        inserted, row["task"] = row["task"].split("/", 1)
        rows.append({"inserted": inserted, **row})
    return pd.DataFrame(rows)
