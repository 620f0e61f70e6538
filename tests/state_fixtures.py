"""Tiny backbones, and models on them, for tests of cached hidden states."""

import datasets
import pytest
import torch
from transformers import AutoModel, BertConfig, GPT2Config

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.data import state_folder

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONES = {
    "bert": BertConfig(**SIZES, intermediate_size=16, max_position_embeddings=16, initializer_range=0.5),
    "gpt2": GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.5),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the cache is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "capsule_heads"


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of at most 24 tokens of three layers of 16 numbers in half precision."""
    monkeypatch.setattr(state_folder, "SHARD_BYTES", 24 * 3 * 16 * 2)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name, seed): the directory of a tiny backbone."""
    folders = {}

    def save(name, seed=0, **changes):
        key = (name, seed, *changes.items())
        if key not in folders:
            folders[key] = str(tmp_path_factory.mktemp(name))
            torch.manual_seed(seed)
            config = type(BACKBONES[name])(**{**BACKBONES[name].to_dict(), **changes})
            AutoModel.from_config(config).save_pretrained(folders[key])
        return folders[key]

    return save


@pytest.fixture
def make_model(saved):
    def make(name="bert", seed=0, changes=(), **fields):
        backbone = saved(name, seed, **dict(changes))
        torch.manual_seed(1)
        model = CapsuleHeadForSequenceClassification.from_backbone(backbone, **{"d_inp": 8, "n_parts": 4, **fields})
        with torch.no_grad():  # a new head scores nothing: its betas are zero
            for parameter in model.head.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def count(monkeypatch):
    """count(model): a list to which the model adds the number of texts and tokens of each batch it computes."""

    def counting(model):
        batches = []
        compute = model.compute_hidden_states

        def counted(**inputs):
            batches.append(tuple(inputs["input_ids"].shape))
            return compute(**inputs)

        monkeypatch.setattr(model, "compute_hidden_states", counted)
        return batches

    return counting
