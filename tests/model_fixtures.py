"""Tiny random backbones, saved as pretrained checkpoints, and heads on them whose parameters are all at work."""

import pytest
import torch
from configurations import small
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from capsule_heads import CapsuleHeadForSequenceClassification

VOCAB_SIZE = 64
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 1, "head_dim": 8}
SSM = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
BACKBONES = {
    "albert": {**COMMON, "embedding_size": 8},
    "bert": COMMON,
    "deberta-v2": {**COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"vocab_size": VOCAB_SIZE, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": {**COMMON, "embedding_size": 8},
    "gpt2": {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
    "gpt_neox": COMMON,
    "llama": GROUPED,
    "mamba": SSM,
    "mixtral": {**GROUPED, "num_local_experts": 2},
    "modernbert": COMMON,
    "mpnet": {**COMMON, "pad_token_id": 1},
    "opt": {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "roberta": {**COMMON, "pad_token_id": 1},
    "xglm": {**COMMON, "d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24},
}


def pytest_generate_tests(metafunc):
    """Runs a test that asks for a `backbone_type` on every kind of backbone."""
    if "backbone_type" in metafunc.fixturenames:
        metafunc.parametrize("backbone_type", BACKBONES)


@torch.no_grad()
def _shake(module, seed=0, scale=0.2):
    # Zeros (biases, the head's betas) and ones would hide mistakes.
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)
    return module


@pytest.fixture(scope="session")
def shake():
    """Adds noise to all parameters of a module, the same for the same seed."""
    return _shake


@pytest.fixture(scope="session")
def backbone_config():
    """The configuration of a tiny backbone: `backbone_config(model_type, **changes)`."""
    return lambda model_type="bert", **changes: AutoConfig.for_model(model_type, **{**BACKBONES[model_type], **changes})


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory, backbone_config):
    """A directory with a tiny pretrained backbone: `backbone_dir(model_type, dtype=..., **changes)`."""
    saved = {}

    def save(model_type="bert", dtype=torch.float32, **changes):
        key = (model_type, dtype, *sorted(changes.items()))
        if key not in saved:
            directory = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            backbone = _shake(AutoModel.from_config(backbone_config(model_type, **changes)), scale=0.05)
            backbone.to(dtype).save_pretrained(directory)
            saved[key] = str(directory)
        return saved[key]

    return save


@pytest.fixture
def make_model(backbone_dir):
    """A small head, none of whose parameters is zero, on a tiny backbone: `make_model(model_type, **kwargs)`."""

    def make(model_type="bert", cls=CapsuleHeadForSequenceClassification, changes=(), seed=0, **kwargs):
        torch.manual_seed(seed)
        model = cls.from_backbone(backbone_dir(model_type, **dict(changes)), **small(**{"num_labels": 3, **kwargs}))
        for name, child in model.named_children():
            if name != "backbone":
                _shake(child, seed)
        return model

    return make


@pytest.fixture(scope="session")
def ids():
    """Three sequences of token ids, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in (4, 7, 2)]


@pytest.fixture(scope="session")
def pad(ids):
    """The three sequences as one batch: `pad(side, pad_token_id)`."""

    def pad_to(side="right", pad_token_id=0):
        n_tokens = max(map(len, ids))
        batch = {name: torch.zeros(len(ids), n_tokens, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        batch["input_ids"] += pad_token_id
        for row, sequence in enumerate(ids):
            place = slice(0, len(sequence)) if side == "right" else slice(n_tokens - len(sequence), n_tokens)
            batch["input_ids"][row, place] = sequence
            batch["attention_mask"][row, place] = 1
        return batch

    return pad_to


@pytest.fixture
def backbone_loads(monkeypatch):
    """Records the names that backbones are loaded by."""
    names, from_pretrained = [], AutoModel.from_pretrained

    def record(name, *args, **kwargs):
        names.append(str(name))
        return from_pretrained(name, *args, **kwargs)

    monkeypatch.setattr(AutoModel, "from_pretrained", record)
    return names


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of whole words that sends token_type_ids, as BERT's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "film", "plot", "is", "was", "good", "bad", "not", "dull"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=40,
    )
