"""What a user sets has an effect, or is refused by name."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from capsule_heads import CapsuleTrainer

LABELS = {
    "single_label_classification": [0, 1, 2, 1] * 10,
    "multi_label_classification": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]] * 10,
    "regression": [[0.5, 1.5, 2.0], [0.0, -1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.3]] * 10,
}


@pytest.fixture
def make(make_model, arguments, tokenizer, tokens):
    """make(problem_type, fields, **arguments): a trainer on forty texts; all parameters of its head are at work."""

    def trainer(problem_type="single_label_classification", fields=None, model=None, **options):
        labels = LABELS[problem_type]
        data = Dataset.from_dict(
            {**{n: tokens["train"][n][:40] for n in ("input_ids", "attention_mask", "length")}, "labels": labels}
        )
        own = {name: options.pop(name) for name in ("compute_loss_func", "compute_metrics") if name in options}
        if model is None:
            model = make_model(**{"mixup_alpha": 0.0, "num_labels": 3, "problem_type": problem_type, **(fields or {})})
            torch.manual_seed(1)
            with torch.no_grad():
                for x in model.head.parameters():
                    x.add_(0.3 * torch.randn_like(x))
        return CapsuleTrainer(
            model=model,
            args=arguments(**{"max_steps": 3, "learning_rate": 0.02, **options}),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            **own,
        )

    return trainer


def weights_after(trainer):
    trainer.train()
    return torch.cat([x.detach().flatten() for x in trainer.model.head.parameters()])


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("fields", [{"class_weights": [0.2, 1.0, 3.0]}, {"mixup_alpha": 0.5}])
def test_label_smoothing_leaves_class_weights_and_mixup_at_work(make, problem_type, fields):
    plain = weights_after(make(problem_type))
    smooth = weights_after(make(problem_type, label_smoothing_factor=0.1))
    both = weights_after(make(problem_type, fields, label_smoothing_factor=0.1))
    alone = weights_after(make(problem_type, fields))
    found = [plain, smooth, both, alone]
    assert all(not torch.allclose(x, y, atol=1e-5) for i, x in enumerate(found) for y in found[:i])


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0]])
def test_the_smoothed_loss_is_that_of_torch(make, weights):
    trainer = make(fields={"class_weights": weights}, label_smoothing_factor=0.2)
    batch = next(iter(trainer.get_eval_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    weight = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(outputs.logits, batch["labels"], weight=weight, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)
    # Outside of the Trainer it is the plain one.
    assert trainer.model(**batch).loss.item() != pytest.approx(loss.item(), rel=1e-4)


def test_smoothed_labels_of_several_are_between_0_and_1(make):
    trainer = make("multi_label_classification", label_smoothing_factor=0.2)
    batch = next(iter(trainer.get_eval_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    targets = 0.8 * batch["labels"] + 0.1
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(outputs.logits, targets))


def test_a_regression_has_no_labels_to_smooth(make):
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1, and a regression has no classes"):
        make("regression", label_smoothing_factor=0.1).train()


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({"mixup_alpha": 0.2}, {}, "and mixup_alpha would have no effect; leave it out"),
        (
            {"class_weights": [1, 2, 3]},
            {"label_smoothing_factor": 0.1},
            "class_weights and label_smoothing_factor would",
        ),
    ],
)
def test_a_loss_of_ones_own_leaves_nothing_out_in_silence(make, fields, options, said):
    with pytest.raises(ValueError, match=said):
        make(fields=fields, compute_loss_func=lambda *_, **__: None, **options).train()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim_args": "a=1"}, "optim_args is a=1, without effect where optim is radam"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "without effect where lr_scheduler_type is one_cycle"),
        (
            {"lr_scheduler_type": "linear", "min_learning_rate": 1e-7},
            "min_learning_rate is 1e-07, without effect",
        ),
        ({"lr_scheduler_type": "cosine", "min_adam_beta1": 0.5}, "without effect where lr_scheduler_type is cosine"),
        ({"max_steps": 0}, "max_steps is 0; expected 1 or more, or -1"),
        ({"learning_rate": 1e-6}, "learning_rate is 1e-06, the peak of the cycle, and min_learning_rate, its ends,"),
        (
            {"neftune_noise_alpha": 5.0},
            "neftune_noise_alpha is 5.0, and the embeddings of a frozen backbone get no noise",
        ),
    ],
)
def test_arguments_without_effect_are_refused(make, options, said):
    with pytest.raises(ValueError, match=said):
        make(**options).train()


def test_noise_for_a_backbone_that_trains_is_at_work(make):
    fields = {"freeze_backbone": False}
    assert not torch.equal(
        weights_after(make(fields=fields)), weights_after(make(fields=fields, neftune_noise_alpha=5.0))
    )


def test_adapters_without_the_head_are_refused(make_model, make):
    adapters = get_peft_model(make_model(num_labels=3), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r'No parameter of the head.*modules_to_save=\["head"\]'):
        make(model=adapters).train()
    frozen = make_model(num_labels=3)
    frozen.head.requires_grad_(False)
    with pytest.raises(ValueError, match="would not train; unfreeze it"):
        make(model=frozen).train()


@pytest.mark.parametrize("part", ["all", "one layer"])
def test_a_backbone_that_is_unfrozen_by_hand_trains(make_model, make, tmp_path, part):
    model = make_model(num_labels=3, mixup_alpha=0.0)
    with torch.no_grad():
        for x in model.head.parameters():
            x.add_(0.3 * torch.randn_like(x))
    unfrozen = model.backbone if part == "all" else model.backbone.encoder.layer[1]
    for x in unfrozen.parameters():
        x.requires_grad = True
    assert model.backbone_trains and model.train().backbone.training
    before = {name: x.detach().clone() for name, x in model.backbone.named_parameters()}
    make(model=model).train()
    changed = {name for name, x in model.backbone.named_parameters() if not torch.equal(x, before[name])}
    expected = {name for name in before if part == "all" or name.startswith("encoder.layer.1.")}
    assert changed and changed <= expected and all("encoder.layer.1" in name or part == "all" for name in changed)
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_balanced_weights_are_made_of_the_training_labels(make):
    trainer = make(fields={"class_weights": "balanced"})
    trainer.train()
    assert trainer.model.config.class_weights == pytest.approx([40 / 30, 40 / 60, 40 / 30])


def test_balanced_weights_outside_of_the_trainer(make):
    model = make(fields={"class_weights": "balanced"}).model
    with pytest.raises(ValueError, match='class_weights is "balanced", of which CapsuleTrainer makes numbers'):
        model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1]))


def test_a_batch_of_classes_without_weight_changes_nothing(make):
    trainer = make(fields={"class_weights": [1.0, 0.0, 1.0]})
    loss = trainer.model(input_ids=torch.tensor([[2, 5, 3]] * 2), labels=torch.tensor([1, 1])).loss
    loss.backward()
    assert loss == 0
    assert all(x.grad is None or (x.grad == 0).all() for x in trainer.model.parameters())


@pytest.mark.parametrize(
    ("problem_type", "names"),
    [
        ("single_label_classification", {"eval_accuracy", "eval_f1_macro"}),
        ("multi_label_classification", {"eval_f1_micro", "eval_f1_macro", "eval_subset_accuracy"}),
        ("regression", set()),
    ],
)
def test_metrics_by_default(make, problem_type, names):
    found = make(problem_type).evaluate()
    assert names <= found.keys() and "eval_loss" in found


def test_metrics_of_a_single_number(make_model, arguments, tokens, tokenizer):
    data = tokens["validation"].remove_columns("labels").add_column("labels", np.linspace(0, 1, 64, dtype=np.float32))
    model = make_model(num_labels=1, mixup_alpha=0.0)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    trainer = CapsuleTrainer(model=model, args=arguments(), eval_dataset=data, processing_class=tokenizer)
    assert {"eval_pearson", "eval_spearmanr"} <= trainer.evaluate().keys()


def test_metrics_of_ones_own_stay(make):
    assert make(compute_metrics=lambda _: {"score": 0.5}).evaluate()["eval_score"] == 0.5


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, lambda x: pd.Series([x])[0]])
def test_arguments_take_numbers_of_any_library(arguments, number):
    made = arguments(learning_rate=number(0.5), max_steps=number(3), adam_beta2=number(0.75))
    assert (made.learning_rate, made.max_steps, made.adam_beta2) == (0.5, 3, 0.75)
    assert type(made.learning_rate) is float
