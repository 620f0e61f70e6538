"""Tokenized texts of a few words, for tests of what is made of them, and the comparison of their hidden states."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capsule_heads.data.tokenization import tokenize

WORDS = [f"w{i}" for i in range(20)]


def make_tokenizer(side="right"):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", *WORDS])}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", padding_side=side, model_max_length=16)


def texts(n=20, first=0, label=lambda i: i % 2, feature=None):
    rows = [" ".join(WORDS[(first + i + k) % 20] for k in range(1 + 7 * i % 11)) for i in range(n)]
    features = Features({"text": Value("string"), "label": feature or ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"text": rows, "label": [label(i) for i in range(n)]}, features=features)
    return tokenize(DatasetDict(train=dataset), make_tokenizer())["train"]


def assert_same_states(cached, expected):
    assert len(cached) == len(expected)
    for k in range(len(cached)):
        assert np.array_equal(cached[k]["hidden_states"], expected[k]["hidden_states"])
