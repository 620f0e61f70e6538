import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, DataCollatorWithPadding, GPT2Config, PreTrainedTokenizerFast

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.data.hidden_states import CapsuleCollator, cache_hidden_states
from capsule_heads.data.tokenization import tokenize

WORDS = [f"w{i}" for i in range(20)]
SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONES = {
    "bert": BertConfig(**SIZES, intermediate_size=16, max_position_embeddings=16, initializer_range=0.5),
    "gpt2": GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.5),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the cache is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "capsule_heads"


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


def make_tokenizer(side="right"):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", *WORDS])}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", padding_side=side, model_max_length=16)


def texts(n=20, first=0, label=lambda i: i % 2, feature=None):
    rows = [" ".join(WORDS[(first + i + k) % 20] for k in range(1 + 7 * i % 11)) for i in range(n)]
    features = Features({"text": Value("string"), "label": feature or ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"text": rows, "label": [label(i) for i in range(n)]}, features=features)
    return tokenize(DatasetDict(train=dataset), make_tokenizer())["train"]


def rows_of(dataset):
    """What identifies each row: its length and label."""
    return list(zip(dataset["length"], dataset["labels"]))


def test_what_is_stored(make_model):
    train = texts()
    cached = cache_hidden_states(train, make_model(), make_tokenizer())
    assert cached.column_names == ["hidden_states", "attention_mask", "length", "labels"]
    assert cached["length"][:].tolist() == sorted(train["length"][:])
    assert sorted(rows_of(cached)) == sorted(rows_of(train))
    assert cached.features["labels"] == train.features["labels"]
    for row in cached:
        assert np.array_equal(row["hidden_states"], row["hidden_states"].astype(np.float16))
        assert row["hidden_states"].shape == (row["length"] * 3 * 16,)
        assert row["attention_mask"].tolist() == [1] * row["length"]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("depths", [None, [0, -1]])
def test_batches_of_cached_states_are_those_of_the_texts(make_model, name, side, depths):
    model, tokenizer = make_model(name, depths=depths), make_tokenizer(side)
    # Lengths 1 to 11, each once: the longest is in a batch with the shortest, and rows are found again.
    train = texts(11)
    assert sorted(train["length"]) == list(range(1, 12))
    cached = cache_hidden_states(train, model, tokenizer, batch_size=4)
    order = np.argsort(train["length"][:])
    collator = CapsuleCollator(tokenizer, len(model.config.depths))
    batch = collator([cached[i] for i in range(11)])
    assert set(batch) == {"hidden_states", "attention_mask", "labels"}
    assert batch["hidden_states"].shape == (11, 11, len(model.config.depths), 16)
    assert batch["attention_mask"].sum(1).tolist() == list(range(1, 12))
    assert batch["labels"].tolist() == [train["labels"][i] for i in order]
    assert batch["labels"].dtype == torch.long

    columns = ["input_ids", "attention_mask", "labels"]
    features = [{name: train[int(i)][name] for name in columns} for i in order]
    tokens = collator(features)
    assert torch.equal(tokens["input_ids"], DataCollatorWithPadding(tokenizer)(features)["input_ids"])
    with torch.no_grad():
        for k, feature in enumerate(features):  # against the backbone itself, one text at a time, without padding
            states = model.backbone(torch.tensor([feature["input_ids"]]), output_hidden_states=True).hidden_states
            states = torch.stack(states, dim=2)[0, :, model.config.depths].half()
            torch.testing.assert_close(batch["hidden_states"][k, : k + 1], states, rtol=2e-3, atol=2e-3)
        from_cache, from_texts = model(**batch), model(**tokens)
    assert from_texts.logits.std() > 0.01
    torch.testing.assert_close(from_cache.logits, from_texts.logits, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(from_cache.loss, from_texts.loss, rtol=5e-3, atol=5e-3)


def test_a_second_call_reads_the_file(make_model, folder):
    first = cache_hidden_states(texts(), make_model(), make_tokenizer())
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    model = make_model(seed=0)
    model.forward = None  # it would fail if it was called
    second = cache_hidden_states(texts(), model, make_tokenizer())
    assert [file] == list(folder.iterdir())
    assert file.stat().st_mtime_ns == written
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one["hidden_states"], other["hidden_states"])
        assert one["labels"] == other["labels"]


@pytest.mark.parametrize(
    "model, data",
    [
        ({"seed": 1}, {}),
        ({"changes": {"num_attention_heads": 1}.items()}, {}),  # the same weights at another computation
        ({"depths": [0, 1]}, {}),
        ({}, {"first": 1}),
        ({}, {"n": 19}),
        ({}, {"label": lambda i: 1 - i % 2}),
    ],
    ids=["weights", "configuration", "depths", "texts", "number of texts", "labels"],
)
def test_what_else_does_not_hit_the_file(make_model, folder, model, data):
    cache_hidden_states(texts(), make_model(), make_tokenizer())
    cached = cache_hidden_states(texts(**data), make_model(**model), make_tokenizer())
    assert len(list(folder.iterdir())) == 2
    assert sorted(rows_of(cached)) == sorted(rows_of(texts(**data)))


def test_the_head_has_no_part_in_it(make_model, folder):
    for fields in {}, {"d_inp": 4}, {"mixup_alpha": 0.0, "n_iters": 1}:
        cache_hidden_states(texts(), make_model(**fields), make_tokenizer())
    assert len(list(folder.iterdir())) == 1


def test_an_unfrozen_backbone_is_refused(make_model, folder):
    with pytest.raises(ValueError, match="The backbone is not frozen: its hidden states change in training"):
        cache_hidden_states(texts(), make_model(freeze_backbone=False), make_tokenizer())
    assert not folder.exists()


def test_states_beyond_half_precision_are_refused_and_leave_nothing(make_model, folder):
    model = make_model("gpt2")
    with torch.no_grad():
        model.backbone.wte.weight[WORDS.index("w19") + 1] = 1e5  # a word of the last batches
    for _ in range(2):
        with pytest.raises(ValueError, match=r"exceed half precision \(65,504\); train without the cache"):
            cache_hidden_states(texts(), model, make_tokenizer(), batch_size=2)
        assert not list(folder.iterdir())


def test_other_columns_do_not_disturb(make_model):
    train = texts()
    cached = cache_hidden_states(train.add_column("index", list(range(20))), make_model(), make_tokenizer())
    assert cached.column_names == ["hidden_states", "attention_mask", "length", "labels"]


@pytest.mark.parametrize(
    "feature, label, fields",
    [
        (Value("float32"), lambda i: i / 4, {"num_labels": 1}),
        (
            List(Value("float32")),
            lambda i: [1.0, i % 2],
            {"problem_type": "multi_label_classification", "num_labels": 2},
        ),
    ],
    ids=["regression", "multi-label"],
)
def test_other_labels(make_model, feature, label, fields):
    train = texts(feature=feature, label=label)
    model, tokenizer = make_model(**fields), make_tokenizer()
    cached = cache_hidden_states(train, model, tokenizer)
    batch = CapsuleCollator(tokenizer, 3)([cached[i] for i in range(20)])
    order = np.argsort(train["length"][:], kind="stable")
    assert torch.equal(batch["labels"], torch.tensor([train["labels"][i] for i in order], dtype=torch.float32))
    assert model(**batch).loss.isfinite()


def test_training_on_cached_states_is_training_on_the_texts(make_model, tmp_path):
    tokenizer, train = make_tokenizer(), texts()

    def losses(cached):
        model = make_model(mixup_alpha=0.0)
        # Rows in the same order: then the batches are the same.
        data = train.select(np.argsort(train["length"][:], kind="stable"))
        if cached:
            data = cache_hidden_states(train, model, tokenizer)
        arguments = CapsuleTrainingArguments(
            str(tmp_path / "run"),
            use_cpu=True,
            num_train_epochs=2,
            per_device_train_batch_size=5,
            learning_rate=2e-2,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = CapsuleTrainer(
            model,
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=CapsuleCollator(tokenizer, 3),
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    from_texts = losses(False)
    assert len(from_texts) == 8
    np.testing.assert_allclose(losses(True), from_texts, rtol=5e-3)
