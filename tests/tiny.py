"""Tiny random models of every architecture the window is tested on."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

VOCABULARY = 96
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
GROUPED = dict(intermediate_size=48, num_key_value_heads=2)

ARCHITECTURES: dict[str, dict] = {
    "llama": {**SMALL, **GROUPED},
    "mistral": {**SMALL, **GROUPED, "sliding_window": 5},
    "gemma2": {**SMALL, **GROUPED, "head_dim": 8, "sliding_window": 5},
    "gemma3_text": {**SMALL, **GROUPED, "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7},
    "qwen2": {**SMALL, **GROUPED},
    "qwen3": {**SMALL, **GROUPED, "head_dim": 8},
    "gpt2": SMALL,
    "gpt_neo": {**SMALL, "attention_types": [[["global", "local"], 2]], "window_size": 5},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {**SMALL, **GROUPED},
    "phi3": {**SMALL, **GROUPED},
    "falcon": {**SMALL, "new_decoder_architecture": False},
    "bloom": SMALL,
    "mixtral": {**SMALL, **GROUPED, "num_local_experts": 4},
}


def tiny_model(architecture: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal model in fp32, wide enough in its initial weights for layers to matter."""
    set_seed(seed)
    config = AutoConfig.for_model(
        architecture, **{**ARCHITECTURES[architecture], "initializer_range": 0.1, **changes}
    )
    return AutoModelForCausalLM.from_config(config).eval()
