"""A tiny random backbone with its tokenizer, and a task that a head on it can learn."""

import csv
import random

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, GPT2Config, PreTrainedTokenizerFast, set_seed

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.data import HiddenStateCache
from capsule_heads.data.tokenization import tokenize
from capsule_heads.paper import PAPER
from capsule_heads.training.run import DataArguments, ModelArguments
from capsule_heads.training.sweep import Sweep

SMALL_HEAD = {"d_inp": 8, "n_parts": 4}

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


@pytest.fixture
def data(tmp_path, texts):
    """Folder with train.csv, validation.csv and test.csv of texts that a head can learn."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, split in {**texts, "test": texts["validation"]}.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = [{"text": x["text"], "label": ["fine", "poor"][x["label"]]} for x in split]
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture
def make_sweep(bert, data, tmp_path, monkeypatch):
    """make_sweep(plan, **arguments): a sweep of small heads on the BERT, its hidden states in a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(plan, head_options=SMALL_HEAD, layers=None, **given):
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
        arguments = CapsuleTrainingArguments(str(tmp_path / "run"), **quiet, **given)
        return Sweep(plan, DataArguments(data=str(data)), ModelArguments(bert, layers=layers), head_options, arguments)

    return make


@pytest.fixture
def train_alone():
    """train_alone(sweep, member, **arguments): its weights, trained by CapsuleTrainer."""

    def train(sweep, member, **given):
        combination, run = member.combination, sweep.run
        settings = dict(combination.settings)
        fields = {"mixup_alpha": settings.pop("mixup_alpha", 0.0), **combination.options}
        names = run.model.config.id2label
        set_seed(member.seed)
        model = CapsuleHeadForSequenceClassification.from_backbone(
            sweep.model_arguments.backbone, id2label=names, head_type=combination.head_type, **fields
        )
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        arguments = CapsuleTrainingArguments(
            str(sweep.output_dir / "alone"), seed=member.seed, data_seed=1, **quiet, **settings, **given
        )
        cache = HiddenStateCache(run.prepared["train"], model, run.processor)
        trainer = CapsuleTrainer(model, arguments, train_dataset=cache, data_collator=run.trainer.data_collator)
        trainer.train()
        return {name: x for name, x in model.state_dict().items() if not name.startswith("backbone")}

    return train
