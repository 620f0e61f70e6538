"""`adapt`: adapters are trained in a frozen backbone, added to its weights, and saved with the head."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, ResNetConfig, SqueezeBertConfig

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification, CapsuleTrainer
from capsule_heads.data import CapsuleCollator, HiddenStateCache
from capsule_heads.heads.linear import pool_tokens
from capsule_heads.training import adapt
from capsule_heads.training.adapters import _examples, contrastive_loss
from capsule_heads.training.run import DataArguments, ModelArguments, TrainingRun

BATCH = {
    "input_ids": torch.tensor([[2, 5, 9, 3], [2, 10, 3, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}


def score(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def weights(model):
    return {name: x.clone() for name, x in model.backbone.state_dict().items()}


@pytest.fixture
def adapted(make_model, tokens, tokenizer):
    """`adapted(**fields)`: a model whose backbone was adapted, and the weights that the backbone had before."""

    def make(seed=0, **fields):
        model = make_model(**fields)
        before = weights(model)
        adapt(model, tokens["train"].select(range(20)), CapsuleCollator(tokenizer), seed=seed)
        return model, before

    return make


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # linear layers of two kinds
def test_the_backbone_is_changed_where_adapters_are_and_learns(request, adapted, kind, caplog):
    model, before = adapted(backbone=request.getfixturevalue(kind))
    after = weights(model)
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed == {f"{name}.weight" for name in model.config.adapters}
    assert len(changed) == {"bert": 12, "gpt2": 8}[kind]
    assert not model.backbone_trains and before.keys() == after.keys()  # as any frozen backbone
    (said,) = (record.message for record in caplog.records if "Adapted" in record.message)
    assert f"{len(changed)} LoRA adapters of rank 16" in said
    assert "in 12 steps of 20 examples" in said


def test_examples_of_a_class_become_alike(make_model, adapted, tokens, tokenizer, monkeypatch):
    batch = CapsuleCollator(tokenizer)(
        tokens["validation"].select_columns(["input_ids", "attention_mask", "labels"]).to_list()
    )
    same = batch["labels"][:, None] == batch.pop("labels")

    def gap(model):
        states, masks = model.compute_hidden_states(**batch)
        means = torch.nn.functional.normalize(pool_tokens(states[-1], masks[-1], "mean"), dim=-1)
        similarities = means @ means.T
        return (similarities[same].mean() - similarities[~same].mean()).item()

    monkeypatch.setattr("capsule_heads.training.adapters.LEARNING_RATE", 0.01)  # its weights are far from a solution
    assert gap(adapted()[0]) > gap(make_model()) + 0.25


def test_contrastive_loss_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    alike = torch.log(torch.exp(torch.tensor(6.0)) + torch.exp(torch.tensor(0.0))) - 6
    other = torch.log(torch.exp(torch.tensor(6.0)) + torch.exp(torch.tensor(8.0))) - 6
    loss = contrastive_loss(x, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))  # the third is like none
    torch.testing.assert_close(loss, (alike + other) / 2)


def test_the_same_seed_gives_the_same_adapters_and_another_others(adapted):
    first, second, third = (weights(adapted(seed=seed)[0]) for seed in (0, 0, 1))
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(first[name], second[name]) and not torch.allclose(first[name], third[name])


def test_head_and_adapters_are_saved_and_added_again(adapted, tokens, tokenizer, arguments, tmp_path):
    model, before = adapted()
    CapsuleTrainer(model, arguments(), train_dataset=tokens["train"], processing_class=tokenizer).train()
    expected = score(model)
    model.save_pretrained(tmp_path / "run")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert loaded.config.head_only and loaded.config.freeze_backbone
    assert torch.equal(score(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(score(again), expected)
    again.save_pretrained(tmp_path / "whole", head_only=False)  # its backbone is not adapted twice
    whole = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(score(whole), expected)
    with torch.no_grad():
        for name, x in model.backbone.state_dict().items():
            x.copy_(before[name])
    assert not torch.allclose(score(model), expected, rtol=0.01, atol=0.0)  # so that the adapters matter


def test_a_backbone_without_a_name_is_saved_changed(adapted, bert, make_model, tokens, tokenizer, tmp_path):
    model = make_model(backbone=make_model().backbone)
    adapt(model, tokens["train"], CapsuleCollator(tokenizer))
    assert model.config.adapters is None
    model.save_pretrained(tmp_path)
    assert torch.equal(score(CapsuleHeadForSequenceClassification.from_pretrained(tmp_path)), score(model))


def test_states_of_an_adapted_backbone_are_cached_as_its_own(adapted, make_model, tokens, tokenizer, tmp_path):
    model, _ = adapted()
    caches = [HiddenStateCache(tokens["validation"], x, tokenizer, tmp_path) for x in (make_model(), model)]
    assert caches[0].folder != caches[1].folder


def test_several_labels_are_adapted_to(make_model, tokens, tokenizer):
    rows = tokens["train"].select(range(20)).to_dict()
    data = Dataset.from_dict({**rows, "labels": [[1.0, float(label)] for label in rows["labels"]]})
    model = make_model(problem_type="multi_label_classification")
    adapt(model, data, CapsuleCollator(tokenizer))
    assert model.adapters is not None


def test_rare_classes_come_as_often(make_model, tokens, tokenizer):
    data = tokens["train"].select([*range(0, 80, 2), 1, 3])
    steps = _examples(make_model(), data, CapsuleCollator(tokenizer)).steps(seed=0)
    assert {[data["labels"][row] for row in rows].count(1) for rows in steps} <= {20, 21, 22}


def test_what_cannot_be_adapted_is_one_sentence(adapted, make_model, tokens, tokenizer):
    model, _ = adapted()
    for other, message in (
        (model, "has adapters already"),
        (make_model(freeze_backbone=False), "freeze_backbone is false"),
        (make_model(num_labels=1), "adapt is for classes, and the labels are numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(other, tokens["train"], CapsuleCollator(tokenizer))
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 32, "intermediate_size": 16, "q_groups": 1, "k_groups": 1, "v_groups": 1}
    convolutions = make_model(backbone=SqueezeBertConfig(**sizes, intermediate_groups=1, output_groups=1))
    with pytest.raises(ValueError, match="The squeezebert backbone has no linear layers on the way"):
        adapt(convolutions, tokens["train"], CapsuleCollator(tokenizer))
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    images = CapsuleHeadForImageClassification.from_backbone(ResNetConfig(**sizes), head_type="linear", num_labels=2)
    with pytest.raises(ValueError, match="The resnet backbone has no linear layers"):
        adapt(images, tokens["train"])


def test_another_backbone_is_refused(adapted, make_model, gpt2):
    with pytest.raises(
        ValueError, match=r"belong to a linear layer encoder.layer.0\S+ from 16 to 16 numbers, which the"
    ):
        adapted()[0].adapters.add_to(make_model(backbone=gpt2).backbone)


def test_a_run_that_is_resumed_takes_the_adapters_of_its_checkpoint(bert, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("capsule_heads.training.adapters.MOST_STEPS", 12)

    def run(adapt="lora", **more):
        fields = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, **more}
        return TrainingRun(
            DataArguments(task="reviews", max_length=8),
            ModelArguments(bert, adapt=adapt),
            {"n_parts": 4},
            arguments(**fields),
        )

    first = run(max_steps=2)
    first.train()
    resumed = run(max_steps=3, resume_from_checkpoint="last")
    for name, x in weights(first.model).items():
        assert torch.equal(weights(resumed.model)[name], x), name
    resumed.train()
    assert resumed.trainer.state.global_step == 3
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(score(loaded), score(resumed.model))
    with pytest.raises(ValueError, match="its backbone is"):
        run(adapt=None, max_steps=4, resume_from_checkpoint="last").train()


def test_a_run_without_adapters_is_not_resumed_with_them(make_model, tokens, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the backbone of .* was not adapted; leave adapt out"):
        adapt(make_model(), tokens["train"], CapsuleCollator(tokenizer), checkpoint=Path(tmp_path))
