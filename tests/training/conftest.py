"""A tiny random backbone with its tokenizer, and a task that a head on it can learn."""

import random

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, GPT2Config, PreTrainedTokenizerFast

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainingArguments
from capsule_heads.data.tokenization import tokenize
from capsule_heads.paper import PAPER

WORDS = ["fine", "good", "great", "super", "sweet", "awful", "bad", "dull", "poor", "sad"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def word_tokenizer(**kwargs):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=32, **kwargs)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Directory of a BERT of hidden size 16 with 2 layers."""
    folder = str(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(BertConfig(vocab_size=32, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    word_tokenizer(pad_token="[PAD]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """Directory of a GPT-2 of hidden size 16 with 2 layers, whose tokenizer has no padding token."""
    folder = str(tmp_path_factory.mktemp("gpt2"))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=3, eos_token_id=3)
    AutoModel.from_config(config).save_pretrained(folder)
    word_tokenizer(eos_token="[SEP]").save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer():
    return word_tokenizer(pad_token="[PAD]")


@pytest.fixture
def make_model(bert):
    """make_model(**fields): a small head on the BERT."""

    def make(backbone=bert, seed=0, **fields):
        torch.manual_seed(seed)
        fields = {"d_inp": 16, "n_parts": 8, **PAPER, **fields}
        return CapsuleHeadForSequenceClassification.from_backbone(backbone, **fields)

    return make


def make_texts(n_train, n_validation):
    """Splits of texts of 1 to 12 words, from one half of the vocabulary or the other; the label says which."""
    rng = random.Random(0)

    def split(n):
        labels = [i % 2 for i in range(n)]
        rows = [" ".join(rng.choices(WORDS[5 * label :][:5], k=rng.randint(1, 12))) for label in labels]
        features = Features({"text": Value("string"), "label": ClassLabel(names=["fine", "poor"])})
        return Dataset.from_dict({"text": rows, "label": labels}, features=features)

    return DatasetDict(train=split(n_train), validation=split(n_validation))


@pytest.fixture
def texts():
    return make_texts(160, 64)


@pytest.fixture
def tokens(texts, tokenizer):
    """The same, tokenized."""
    return tokenize(texts, tokenizer)


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory):
    """Directory of 80 of them, as `load_from_disk` reads it."""
    folder = str(tmp_path_factory.mktemp("tokens"))
    tokenize(make_texts(80, 1), word_tokenizer(pad_token="[PAD]"))["train"].save_to_disk(folder)
    return folder


@pytest.fixture
def arguments(tmp_path):
    """arguments(**fields): quiet ones of the paper's recipe, on the CPU, that save nothing unless asked to."""

    def make(cls=CapsuleTrainingArguments, **fields):
        fields = {"output_dir": str(tmp_path / "run"), "save_strategy": "no", "use_cpu": True, **fields}
        if cls is CapsuleTrainingArguments:
            fields.setdefault("recipe", "paper")
        return cls(disable_tqdm=True, report_to=[], **fields)

    return make
