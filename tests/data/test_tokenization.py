import logging

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from capsule_heads.data.tokenization import check_pad_token, tokenize, window_fields

WORDS = ["[PAD]", "[CLS]", "[SEP]", "a", "b", "c"]
PAD, CLS, SEP, A, B, C = range(6)


def tokenizer(pad_token="[PAD]", **kwargs):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad_token, model_input_names=names, **{"model_max_length": 8, **kwargs}
    )


def splits(**columns):
    return DatasetDict(train=Dataset.from_dict(columns), test=Dataset.from_dict(columns))


def test_single_texts():
    tokenized = tokenize(splits(text=["a b", "c"], label=[1, 0]), tokenizer())
    assert list(tokenized) == ["train", "test"]
    for split in tokenized.values():
        assert split["input_ids"][:] == [[CLS, A, B, SEP], [CLS, C, SEP]]
        assert split["attention_mask"][:] == [[1] * 4, [1] * 3]
        assert split["length"][:] == [4, 3]
        assert split["labels"][:] == [1, 0]
        assert set(split.column_names) == {"input_ids", "token_type_ids", "attention_mask", "length", "labels"}


def test_pairs():
    split = tokenize(splits(text=["a b"], text_pair=["c"], label=[0.5]), tokenizer())["train"]
    assert split["input_ids"][0] == [CLS, A, B, SEP, C, SEP]
    assert split["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert split["length"][0] == 6
    assert split["labels"][0] == 0.5
    assert {"text", "text_pair", "label"}.isdisjoint(split.column_names)


def test_texts_are_cut_to_max_length_or_to_what_the_backbone_takes():
    long = splits(text=["a " * 20], text_pair=["b " * 20], label=[0])
    assert tokenize(long, tokenizer())["train"]["length"][0] == 8
    assert tokenize(long, tokenizer(model_max_length=30))["train"]["length"][0] == 30
    split = tokenize(long, tokenizer(), max_length=5)["train"]
    assert split["input_ids"][0] == [CLS, A, SEP, B, SEP]
    assert split["length"][0] == 5


def test_texts_for_windows_are_cut_to_max_length_alone(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog
    long = splits(text=["a " * 20], label=[0])
    split = tokenize(long, tokenizer(), in_windows=True)["train"]
    assert split["input_ids"][0] == [CLS, *[A] * 20, SEP]
    assert split["length"][0] == 22
    assert "longer than the specified maximum" not in caplog.text
    assert tokenize(long, tokenizer(), max_length=12, in_windows=True)["train"]["length"][0] == 12


def test_the_fields_of_a_model_that_takes_windows():
    expected = {"window_length": 8, "window_overlap": 3, "window_special_tokens": [1, 1]}
    assert window_fields(tokenizer(), overlap=3) == expected
    assert window_fields(tokenizer(), overlap=2, length=6) == {**expected, "window_length": 6, "window_overlap": 2}
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    assert window_fields(bare, overlap=3)["window_special_tokens"] == [0, 2]


def test_a_tokenizer_that_does_not_know_how_many_tokens_the_backbone_takes():
    unknown = tokenizer(model_max_length=None)
    with pytest.raises(ValueError, match=r"does not say how many tokens its backbone takes, so give the length"):
        window_fields(unknown, overlap=2)
    assert window_fields(unknown, overlap=2, length=6)["window_length"] == 6


def test_texts_without_labels():
    split = tokenize(splits(text=["a"]), tokenizer())["test"]
    assert "labels" not in split.column_names
    assert split["length"][0] == 3


def test_columns_that_are_neither_text_nor_label_stay():
    assert tokenize(splits(text=["a"], label=[0], index=[7]), tokenizer())["train"]["index"][0] == 7


def test_a_dataset_without_text():
    with pytest.raises(ValueError, match=r"has the columns sentence, label; expected text \(and text_pair for pairs\)"):
        tokenize(splits(sentence=["a"], label=[0]), tokenizer())


def test_a_tokenizer_without_padding_token():
    message = r"has no padding token.*Set one: tokenizer\.pad_token = tokenizer\.eos_token"
    with pytest.raises(ValueError, match=message):
        tokenize(splits(text=["a"], label=[0]), tokenizer(pad_token=None))
    with pytest.raises(ValueError, match=message):
        check_pad_token(tokenizer(pad_token=None))
    check_pad_token(tokenizer())
