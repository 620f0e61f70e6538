import logging

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
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


def test_a_pair_without_a_second_text_is_a_single_text():
    pairs = splits(text=["a", "a b " * 5, "c"], text_pair=["", "", "b"], label=[0, 1, 0])
    assert tokenize(pairs, tokenizer())["train"]["input_ids"][:] == [
        [CLS, A, SEP],
        [CLS, A, B, A, B, A, B, SEP],
        [CLS, C, SEP, B, SEP],
    ]


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


# A user's own data


def test_a_dataset_stays_a_dataset():
    tokenized = tokenize(Dataset.from_dict({"text": ["a b", "c"], "label": [1, 0]}), tokenizer())
    assert isinstance(tokenized, Dataset)
    assert tokenized["labels"][:] == [1, 0] and tokenized["length"][:] == [4, 3]
    assert isinstance(tokenize(DatasetDict(train=Dataset.from_dict({"text": ["a"]})), tokenizer()), DatasetDict)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "is an IterableDataset, .* without streaming=True"),
        (
            IterableDatasetDict(train=Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()),
            "is an IterableDatasetDict, .* without streaming=True",
        ),
        (["a"], "is a list; expected a Dataset or a DatasetDict of the package datasets"),
        ({"train": Dataset.from_dict({"text": ["a"]})}, "is a dict; expected a Dataset or a DatasetDict"),
        (pd.DataFrame({"text": ["a"]}), "is a DataFrame; .*from_pandas"),
    ],
    ids=["stream", "streams", "list", "dict", "frame"],
)
def test_data_of_another_kind(given, message):
    with pytest.raises(TypeError, match=f"datasets {message}"):
        tokenize(given, tokenizer())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, r"text of row 1 of train \(counted from 0\) is None; expected a text in every row"),
        ({"text": [None, None]}, "text of row 0 of train"),
        ({"text": ["a", "b"], "text_pair": [None, "b"]}, r"text_pair of row 0 of train .* is None.*'text_pair'"),
        ({"text": [1, 2]}, r"text of train is int64; expected strings: .*cast_column\('text', Value"),
        ({"text": [float("nan"), 0.5]}, "text of train is float64; expected strings"),
        ({"text": [["a"], ["b"]]}, "text of train is list; expected strings"),
        ({"text": ["a", "b"], "text_pair": [1, 2]}, "text_pair of train is int64; expected strings"),
        ({"text": ["a"], "label": [0], "labels": [0]}, "has the columns label and labels; expected one of them"),
    ],
)
def test_texts_that_are_missing_or_no_texts(columns, message):
    with pytest.raises(ValueError, match=message):
        tokenize(splits(**columns), tokenizer())


def test_a_missing_text_in_pandas():
    frame = pd.DataFrame({"text": ["a", np.nan], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"text of row 1 \(counted from 0\) is None"):
        tokenize(Dataset.from_pandas(frame), tokenizer())


def test_splits_with_other_columns_or_none():
    pairs = DatasetDict(train=Dataset.from_dict({"text": ["a"]}), test=splits(text=["a"], text_pair=["b"])["test"])
    with pytest.raises(ValueError, match=r"dataset of test has the columns text, text_pair; .* the same in all splits"):
        tokenize(pairs, tokenizer())
    with pytest.raises(ValueError, match="a DatasetDict without splits; expected one"):
        tokenize(DatasetDict(), tokenizer())


def test_a_split_without_rows():
    given = DatasetDict(train=splits(text=["a"], label=[0])["train"], test=splits(text=["a"], label=[0])["test"])
    given["test"] = given["test"].select([])
    assert len(tokenize(given, tokenizer())["test"]) == 0


def bare_tokenizer(**kwargs):
    """One that adds no special tokens, as GPT-2's."""
    bare = tokenizer(**kwargs)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )
    return bare


def test_a_text_without_a_token():
    message = r"text of row 1 of train \(counted from 0\) is '  ', of which \w+ makes no token; expected a token"
    with pytest.raises(ValueError, match=message):
        tokenize(splits(text=["a", "  "]), bare_tokenizer())
    assert tokenize(splits(text=["a", ""]), tokenizer())["train"]["length"][:] == [3, 2]  # special tokens
    assert tokenize(splits(text=[""], text_pair=["b"]), bare_tokenizer())["train"]["length"][:] == [1]


# Limits, and texts that are cut


def test_one_line_says_how_many_texts_are_cut(caplog):
    given = DatasetDict(
        train=Dataset.from_dict({"text": ["a " * 20, "a", "a " * 9]}), test=Dataset.from_dict({"text": ["a"]})
    )
    tokenize(given, tokenizer())
    expected = "Cut to 8 tokens: 2 of 3 texts of train, the longest of which has 22 tokens."
    assert [record.getMessage() for record in caplog.records] == [expected]
    caplog.clear()
    assert tokenize(given["train"], tokenizer(), max_length=5)["input_ids"][0] == [CLS, A, A, A, SEP]
    expected = "Cut to 5 tokens: 2 of 3 texts, the longest of which has 22 tokens."
    assert [record.getMessage() for record in caplog.records] == [expected]
    caplog.clear()
    tokenize(given, tokenizer(), in_windows=True)
    tokenize(given["test"], tokenizer())
    assert caplog.records == []


def test_a_tokenizer_that_says_nothing_and_the_configuration_of_its_backbone(backbone_dir, caplog):
    long = Dataset.from_dict({"text": ["a " * 60]})
    for model_type, length in (("gpt2", 40), ("roberta", 38), ("llama", 62)):
        unknown = tokenizer(model_max_length=None, name_or_path=backbone_dir(model_type))
        assert tokenize(long, unknown)["length"][:] == [length]
        assert len(unknown("a " * 60, truncation=length < 62)["input_ids"]) == length  # predictions too
    assert "No text is cut" not in caplog.text
    assert tokenize(long, tokenizer(model_max_length=None))["length"][:] == [62]
    assert caplog.text.count("No text is cut: ") == 1
    wrong = tokenizer(model_max_length=100, name_or_path=backbone_dir("roberta"))  # says more than the backbone takes
    assert tokenize(long, wrong)["length"][:] == [38]
