"""What the recipe chooses, and the regression that a model starts as."""

import json
import logging

import pytest
import torch

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer
from capsule_heads.data import CapsuleCollator
from capsule_heads.explain import explain
from capsule_heads.training.arguments import PAPER_SETTINGS
from capsule_heads.training.recipe import apply_recipe


@pytest.fixture
def make_trainer(make_model, arguments, tokens, tokenizer):
    """make_trainer(model=None, data=None, **fields): a trainer with the recipe "auto", on 160 texts."""

    def make(model=None, data=None, **fields):
        model = make_model(mixup_alpha=0.0) if model is None else model
        args = arguments(**{"recipe": "auto", **fields})
        data = tokens["train"] if data is None else data
        return CapsuleTrainer(model, args, train_dataset=data, data_collator=CapsuleCollator(tokenizer))

    return make


def pooled(model, tokens, tokenizer):
    """Means over tokens at all layers, side by side, in float64."""
    rows = []
    for ids in tokens["input_ids"]:
        with torch.no_grad():
            states, _ = model.compute_hidden_states(input_ids=torch.tensor([ids]))
        rows.append(torch.cat([x.mean(1) for x in states], -1).double())
    return torch.cat(rows)


def logits_of(model, tokens):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in tokens["input_ids"]])


def started(trainer):
    """The model as it is when training begins."""
    apply_recipe(trainer, trainer.capsule_model)
    return trainer.capsule_model.eval()


def test_the_model_starts_as_a_logistic_regression(make_trainer, tokens, tokenizer):
    from sklearn.linear_model import LogisticRegression

    model = started(make_trainer())
    x = pooled(model, tokens["train"], tokenizer)
    scale = x.std(0, correction=0)
    x = ((x - x.mean(0)) / scale / len(scale) ** 0.5).numpy()
    regression = LogisticRegression(C=10.0, max_iter=1000).fit(x, tokens["train"]["labels"])
    logits = logits_of(model, tokens["train"])
    found = 2 * (logits[:, 1] - logits[:, 0]).double()  # logits are the mean of this and the head's, which are 0
    assert found.numpy() == pytest.approx(regression.decision_function(x), abs=0.02)
    assert found.std() > 0.5
    assert model.config.linear_term and not any(x.requires_grad for x in model.linear_term.parameters())


def test_labels_of_several_kinds(make_trainer, make_model, tokens, tokenizer):
    labels = torch.tensor(tokens["train"]["labels"][:])
    several = (
        tokens["train"]
        .remove_columns("labels")
        .add_column("labels", [[float(y), 0.0, 1.0 - y] for y in labels.tolist()])
    )
    fields = {"num_labels": 3, "problem_type": "multi_label_classification", "mixup_alpha": 0.0}
    logits = logits_of(started(make_trainer(make_model(**fields), several)), tokens["train"])
    assert ((logits[:, 0] > 0) == (labels == 1)).float().mean() > 0.97
    assert logits[:, 0] == pytest.approx(-logits[:, 2], abs=1e-2) and (logits[:, 1] < -2).all()

    numbers = tokens["train"].remove_columns("labels").add_column("labels", [10.0 + 2.0 * y for y in labels.tolist()])
    fields = {"num_labels": 1, "label_mean": 11.0, "label_std": 1.0, "mixup_alpha": 0.0}
    values = logits_of(started(make_trainer(make_model(**fields), numbers)), tokens["train"])[:, 0]
    assert (values - (10.0 + 2.0 * labels)).abs().mean() < 0.35
    assert values.std() > 0.5


def test_a_class_without_rows_and_one_class_alone(make_trainer, make_model, tokens):
    logits = logits_of(started(make_trainer(make_model(num_labels=3, mixup_alpha=0.0))), tokens["train"])
    assert (logits[:, 2] < logits[:, :2].max(1).values).all()
    one = tokens["train"].filter(lambda row: row["labels"] == 1)
    model = started(make_trainer(data=one))
    assert model.linear_term is None and model.config.linear_term is None


@pytest.mark.parametrize(
    "fields", [{"freeze_backbone": False}, {"linear_term": False}, {"head_type": "vector_routing"}], ids=str
)
def test_models_that_do_not_start_as_a_regression(make_trainer, make_model, fields):
    sizes = {"d_inp": 16, "n_parts": 8}
    trainer = make_trainer(make_model(**{**sizes, "mixup_alpha": 0.0, **fields}))
    assert started(trainer).linear_term is None
    assert not trainer.args.unset()


def test_a_linear_term_that_cannot_be_solved_for(make_trainer, make_model):
    trainer = make_trainer(make_model(mixup_alpha=0.0, linear_term=True, freeze_backbone=False))
    with pytest.raises(ValueError, match="linear_term is True, and it cannot be solved for; expected a frozen"):
        trainer.train()
    asked = started(make_trainer(make_model(mixup_alpha=0.0, linear_term=True), recipe="paper"))
    assert asked.linear_term.affine.weight.count_nonzero()


def test_a_trained_head_gets_no_linear_term(make_trainer, make_model):
    model = make_model(mixup_alpha=0.0)
    with torch.no_grad():
        model.head.routings[1].beta_use += torch.randn_like(model.head.routings[1].beta_use)
    assert started(make_trainer(model)).linear_term is None


def test_what_is_not_set_is_chosen_and_said_in_one_line(make_trainer, caplog):
    trainer = make_trainer(max_grad_norm=0.5, per_device_train_batch_size=40)
    assert set(trainer.args.unset()) == {"learning_rate", "num_train_epochs", "warmup_steps"}
    with caplog.at_level(logging.WARNING, "capsule_heads"):
        trainer.train()
    args = trainer.args
    assert not args.unset() and args.max_grad_norm == 0.5
    assert trainer.state.max_steps == 4 * args.num_train_epochs
    (said,) = [x.getMessage() for x in caplog.records if "learning_rate" in x.getMessage()]
    assert said == (
        f"Recipe: learning_rate {args.learning_rate:g}, num_train_epochs {args.num_train_epochs:g}, warmup_steps "
        f"{args.warmup_steps:g}, for 160 examples in batches of 40 and a frozen backbone."
    )
    caplog.clear()
    trainer.train()
    assert not caplog.records


def test_the_more_examples_the_fewer_epochs(make_trainer):
    class Rows(list):
        def __len__(self):
            return self.n

    epochs = []
    for n in (1000, 3000, 100_000):
        rows = Rows()
        rows.n = n
        trainer = make_trainer(data=rows)
        trainer.create_optimizer()
        epochs.append(trainer.args.num_train_epochs)
    assert epochs[0] > epochs[1] > epochs[2] >= 1


@pytest.mark.parametrize("fields", [{"optim": "adamw_torch"}, {"max_steps": 3}, {"recipe": "paper"}], ids=str)
def test_settings_of_other_runs(make_trainer, fields):
    trainer = make_trainer(**fields)
    trainer.create_optimizer()
    found = {name: getattr(trainer.args, name) for name in PAPER_SETTINGS}
    assert (found == PAPER_SETTINGS) == ("max_steps" not in fields)


def test_a_backbone_that_trains_has_a_learning_rate_that_is_safe_for_it(make_trainer, make_model):
    trainer = make_trainer(make_model(freeze_backbone=False))
    trainer.create_optimizer()
    rates = {"backbone" if any(x is p for p in trainer.model.backbone.parameters()) else "head": group["lr"]
             for group in trainer.optimizer.param_groups for x in group["params"]}  # fmt: skip
    assert rates["backbone"] < rates["head"] / 10


def test_the_papers_recipe_adds_nothing(make_trainer):
    trainer = make_trainer(recipe="paper", max_steps=1)
    trainer.train()
    assert trainer.capsule_model.linear_term is None


def test_a_run_resumes_with_its_linear_term(make_trainer, make_model, tmp_path):
    fields = {"num_train_epochs": 2, "save_strategy": "epoch", "learning_rate": 1e-2}
    complete = make_trainer(**fields)
    complete.train()
    model = make_model(mixup_alpha=0.0, seed=1)
    resumed = make_trainer(model, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    for name, x in complete.capsule_model.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name
    refused = make_trainer(make_model(mixup_alpha=0.0, linear_term=False), **fields)
    with pytest.raises(ValueError, match="its linear_term is True, and this run has None"):
        refused.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))


def test_it_is_saved_loaded_and_explained_exactly(make_trainer, tokens, tokenizer, texts, tmp_path):
    trainer = make_trainer(num_train_epochs=6, learning_rate=2e-2)
    trainer.train()
    trainer.save_model()
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(trainer.args.output_dir)
    assert torch.equal(logits_of(loaded, tokens["validation"]), logits_of(trainer.model.eval(), tokens["validation"]))
    assert not any(x.requires_grad for x in loaded.linear_term.parameters())

    padded = texts["validation"]["text"][:4]
    for found, row in zip(explain(loaded, padded, tokenizer), logits_of(loaded, tokens["validation"])):
        torch.testing.assert_close(found.logits, row, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.parts.sum(0) + found.linear, row, atol=1e-4, rtol=1e-4)
        assert found.parts.sum(0).abs().max() > 1e-2 and found.linear.abs().max() > 1e-2

    # Without the head's own credits, those of tokens and the bias are the linear term, to rounding.
    batch = tokenizer.pad(tokenizer(padded), return_tensors="pt")
    with torch.no_grad():
        states, masks = loaded.compute_hidden_states(**batch)
        term = loaded.linear_term
        by_token = sum(x.sum(1) for x in term.credits(states, masks)) + term.affine.bias
        torch.testing.assert_close(by_token, term(states, masks), atol=1e-5, rtol=1e-5)
        assert all((x[masks[0] == 0] == 0).all() for x in term.credits(states, masks))


def test_a_model_without_the_field_loads_as_before(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    config.pop("linear_term", None)
    file.write_text(json.dumps(config))
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path / "old")
    assert loaded.linear_term is None and loaded.state_dict().keys() == model.state_dict().keys()
