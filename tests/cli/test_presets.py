"""Every preset on a model of its own architecture: real layer count and names, reduced width, random weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from rmu.cli import main
from rmu.settings import parse_unlearn, preset_names
from tests.tiny import VOCABULARY, random_texts, word_tokenizer, write_jsonl

NARROW = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_attention_heads=2, head_dim=8)
NARROW |= dict(num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1)
DOWN, EXPERT = "mlp.down_proj.weight", "block_sparse_moe.experts.0.w3.weight"

# preset: architecture, layers, trained layers and tensor, (c or beta, alpha, batch, steps) as published
PRESETS = {
    "zephyr-7b-rmu": ("mistral", 32, (5, 6, 7), DOWN, (6.5, 1200, 4, 150)),
    "zephyr-7b-adaptive-rmu": ("mistral", 32, (5, 6, 7), DOWN, (5, 1200, 4, 500)),
    "yi-34b-chat-rmu": ("llama", 60, (13, 14, 15), DOWN, (300, 350, 2, 400)),
    "mixtral-8x7b-rmu": ("mixtral", 32, (5, 6, 7), EXPERT, (300, 1600, 2, 400)),
    "llama-3-8b-rmu": ("llama", 32, (3, 4, 5), DOWN, (20, 1000, 4, 250)),
    "llama-3.1-8b-rmu": ("llama", 32, (13, 14, 15), DOWN, (30, 350, 4, 150)),
    "mistral-7b-v0.1-rmu": ("mistral", 32, (13, 14, 15), DOWN, (27, 1600, 4, 150)),
    "gemma-2-2b-rmu": ("gemma2", 26, (7, 8, 9), DOWN, (350, 300, 4, 250)),
    "gemma-2-2b-it-rmu": ("gemma2", 26, (7, 8, 9), DOWN, (750, 300, 4, 300)),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two topics and a retain corpus; min_length of the presets is at most 200 characters."""
    folder = tmp_path_factory.mktemp("corpora")
    return [
        str(write_jsonl(folder / f"{i}.jsonl", random_texts(i, number=8, words=(90, 100)))) for i in range(3)
    ]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """The folder of a random model of an architecture, made once."""
    made = {}

    def make(architecture, layers):
        if (architecture, layers) not in made:
            set_seed(0)
            config = AutoConfig.for_model(architecture, **NARROW, num_hidden_layers=layers)
            folder = made[architecture, layers] = tmp_path_factory.mktemp(architecture)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
        return made[architecture, layers]

    return make


def test_every_preset_is_here():
    assert set(preset_names()) == {*PRESETS, "demo"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_changes_exactly_the_named_tensors(name, corpora, model_of, tmp_path):
    architecture, layers, trained, tensor, published = PRESETS[name]
    base = model_of(architecture, layers)
    argv = ["--config", name, "--forget", *corpora[:2], "--retain", corpora[2]]
    argv += ["--output_dir", str(tmp_path / "out")]
    arguments, config = parse_unlearn(argv)
    assert "/" in arguments.model
    factor = config.coefficient if config.method == "rmu" else config.scale
    values = (*factor, *config.alpha, config.per_device_train_batch_size, config.max_steps)
    assert values == published and config.learning_rate == 5e-5

    argv += ["--model", str(base), "--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert main(["unlearn", *argv]) == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {f"model.layers.{i}.{tensor}" for i in trained}
    if tensor == EXPERT:
        check_block(base, tmp_path / "out")


def check_block(base, out):
    """Expert 0's w3 in the stacked tensors of the loaded result: the up half, and of no other expert."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, out)]
    old, new = (dict(model.named_parameters()) for model in models)
    stacked = {name for name in old if name.endswith("mlp.experts.gate_up_proj")}
    for name in stacked:  # transformers before 5 keeps an expert's matrices apart
        differs = (old[name] != new[name]).any(dim=-1)  # [E, 2 I]
        assert not differs[1:].any() and not differs[0, :24].any()
        assert differs[0, 24:].all() == any(f".{i}.mlp." in name for i in (5, 6, 7))
