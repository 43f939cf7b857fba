"""Tiny models whose answers are known."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tests.tiny import tiny_model, word_tokenizer


def constant_model(favourite: str) -> PreTrainedModel:
    """A model that holds the word ``favourite`` likeliest next, whatever it reads: its final norm gives one fixed state."""
    model = tiny_model("gpt2")
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        embeddings[:, 0] = 0.0
        embeddings[word_tokenizer().convert_tokens_to_ids(favourite), 0] = 5.0
    return model


def questions(number: int = 12) -> list[dict]:
    """Questions of two choices, w5 and another word; w5 is right in every third, the first among them."""
    return [
        {
            "side": "forget" if i % 2 else "retain",
            "domain": f"d{i % 4}",
            "kind": "w7",
            "gloss": f"w{20 + i} w{40 + i}",
            "choices": ["w5", f"w{60 + i}"],
            "gold": 0 if i % 3 == 0 else 1,
        }
        for i in range(number)
    ]
