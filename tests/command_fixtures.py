"""What tests of commands and scripts share: a tiny backbone with its tokenizer, and an environment for processes."""

import os

import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "was", "and", "it", "good", "bad", "food", "film", "long"]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Directory of a BERT of hidden size 16 with 2 layers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("backbone"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(BertConfig(vocab_size=32, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fields = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64}
    fields["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Offline, with a cache of its own, and one thread: more do not help so small a model."""
    home = str(tmp_path_factory.mktemp("hf_home"))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": home, "OMP_NUM_THREADS": "1"}
