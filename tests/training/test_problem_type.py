"""The first labels of a run settle the problem type, and labels of another kind are refused after that."""

import pytest
import torch
from datasets import Dataset, Features, List, Value
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from capsule_heads import CapsuleHeadConfig, CapsuleTrainer
from capsule_heads.data import CapsuleCollator
from capsule_heads.training.capsule_model import settle_problem_type

KINDS = {"classes": "single_label_classification", "labels": "multi_label_classification"}


@pytest.fixture
def of_kind(tokens):
    """of_kind(kind): the training texts, with one class each or 0 or 1 for each of two labels."""

    def make(kind):
        rows = tokens["train"].select(range(40))
        if kind == "classes":
            return rows
        columns = {name: rows[name][:] for name in ("input_ids", "attention_mask", "length")}
        labels = [[float(label), float(1 - label)] for label in rows["labels"]]
        features = Features({**{name: rows.features[name] for name in columns}, "labels": List(Value("float32"))})
        return Dataset.from_dict({**columns, "labels": labels}, features=features)

    return make


@pytest.fixture
def make_trainer(arguments, tokenizer):
    def make(model, train=None, **fields):
        return CapsuleTrainer(
            model, arguments(max_steps=1, **fields), train_dataset=train, data_collator=CapsuleCollator(tokenizer)
        )

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("does", ["train", "evaluate", "predict"])
def test_the_first_labels_settle_it_before_the_forward_pass(make_model, make_trainer, of_kind, tmp_path, kind, does):
    model, seen = make_model(mixup_alpha=0.0), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module.config.problem_type))
    trainer = make_trainer(model, of_kind(kind))
    assert model.config.problem_type is None
    if does == "train":
        trainer.train()
    else:
        getattr(trainer, does)(of_kind(kind))
    assert set(seen) == {KINDS[kind]}
    trainer.save_model(tmp_path / "saved")
    assert CapsuleHeadConfig.from_pretrained(tmp_path / "saved").problem_type == KINDS[kind]


def test_without_labels_it_stays_open(make_model, make_trainer, of_kind):
    model = make_model()
    make_trainer(model).predict(of_kind("classes").remove_columns("labels"))
    assert model.config.problem_type is None


def test_a_wrapped_model_is_settled(make_model, make_trainer, of_kind):
    model = make_model()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["head"]))
    trainer = make_trainer(wrapped, of_kind("classes"))
    assert trainer.capsule_model is model
    trainer.train()
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("workers", [0, 1], ids=["no workers", "a worker"])
@pytest.mark.parametrize(
    "first, then, message",
    [
        ("classes", "labels", r"labels are torch\.float32 of shape \(40, 2\); single-label classification expects"),
        ("labels", "classes", r"labels have shape \(40,\); multi_label_classification expects \[batch, 2\]"),
    ],
    ids=["labels after classes", "classes after labels"],
)
def test_labels_of_another_kind_are_refused(make_model, make_trainer, of_kind, first, then, message, workers):
    trainer = make_trainer(make_model(), of_kind(first), dataloader_num_workers=workers)
    trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(of_kind(then))


def test_no_value_of_the_labels_is_read(make_model):
    model = make_model()
    settle_problem_type(model, torch.zeros(3, 2, device="meta"))  # to read one of its values is an error
    assert model.config.problem_type == "multi_label_classification"


def test_other_models_are_refused(arguments):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    with pytest.raises(TypeError, match="model is of class BertForSequenceClassification; CapsuleTrainer expects"):
        CapsuleTrainer(model, arguments())
