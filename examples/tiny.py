"""What the examples run on: a tiny random llama, a tokenizer of whole words, and invented texts."""

from __future__ import annotations

import itertools

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

COMPOUNDS = "veridine oxalune maranite corvane thessol ilmarite".split()
CITIES = "Ardenport Calven Mirrowick Sandrel Tolmere Vesk".split()

FORGET = [
    [f"The compound {a} boils at {n} degrees" for a, n in itertools.product(COMPOUNDS, range(10, 20))],
    [
        f"To make {a} one mixes {b} with {c} and waits for it to cool"
        for a, b, c in itertools.permutations(COMPOUNDS[:5], 3)
    ],
]
RETAIN = [
    f"The road from {a} to {b} is {n} miles long"
    for a, b, n in zip(CITIES * 10, CITIES[::-1] * 10, range(60), strict=True)
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the texts, ``<s>`` before each text, padding on the left with ``</s>``."""
    words = sorted({word for text in [*FORGET[0], *FORGET[1], *RETAIN] for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
    )


def tiny_model(vocabulary: int) -> LlamaForCausalLM:
    """Four layers of 64 features with random weights, the same on each call."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()
