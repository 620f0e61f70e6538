"""A run that is resumed with other settings: it covers its new length, or one sentence names what differs."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, TrainerCallback

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer
from capsule_heads.training.resume import RUN

STEPS_IN_EPOCH = 8  # 160 texts, 20 in a step
FIELDS = {"num_train_epochs": 2, "save_strategy": "epoch", "learning_rate": 1e-2, "weight_decay": 0.1}


class Groups(TrainerCallback):
    """The options of the first parameter group at each step, by the number of steps before it."""

    def __init__(self):
        self.by_step = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        group = optimizer.param_groups[0]
        self.by_step[state.global_step] = {name: value for name, value in group.items() if name != "params"}


@pytest.fixture
def run(make_model, arguments, tokens, tokenizer):
    """run(**fields): train, perhaps resumed; returns the trainer, and the groups at each step."""

    def train(resume=None, model=None, data=None, cls=CapsuleTrainer, **fields):
        groups = Groups()
        trainer = cls(
            model=make_model() if model is None else model,
            args=arguments(**{**FIELDS, **fields}),
            processing_class=tokenizer,
            train_dataset=tokens["train"] if data is None else data,
            eval_dataset=tokens["validation"],
            callbacks=[groups],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, groups.by_step

    return train


@pytest.mark.parametrize("schedule", ["one_cycle", "linear", "cosine"])
def test_more_epochs_have_the_learning_rates_of_a_run_that_was_as_long_from_the_start(run, schedule):
    optim = {} if schedule == "one_cycle" else {"optim": "adamw_torch"}
    _, complete = run(num_train_epochs=4, lr_scheduler_type=schedule, save_strategy="no", **optim)
    run(lr_scheduler_type=schedule, **optim)
    trainer, resumed = run("last", num_train_epochs=4, lr_scheduler_type=schedule, **optim)
    assert trainer.state.global_step == 4 * STEPS_IN_EPOCH and min(resumed) == 2 * STEPS_IN_EPOCH
    assert resumed == {step: group for step, group in complete.items() if step in resumed}


def test_fewer_epochs_end_the_cycle(run):
    run(num_train_epochs=4, save_strategy="steps", save_steps=STEPS_IN_EPOCH, max_steps=STEPS_IN_EPOCH)
    trainer, groups = run("last", num_train_epochs=2)
    assert trainer.state.global_step == 2 * STEPS_IN_EPOCH
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(trainer.args.min_learning_rate)
    assert groups[STEPS_IN_EPOCH]["lr"] > groups[2 * STEPS_IN_EPOCH - 1]["lr"]


@pytest.mark.parametrize(
    ("schedule", "fields"),
    [
        ("one_cycle", {"learning_rate": 3e-3, "min_learning_rate": 2e-5, "min_adam_beta1": 0.7, "weight_decay": 0.3}),
        ("one_cycle", {"adam_beta1": 0.95, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "warmup_steps": 3}),
        ("cosine", {"learning_rate": 3e-3, "weight_decay": 0.3, "adam_beta1": 0.95, "adam_epsilon": 1e-6}),
    ],
)
def test_other_learning_rates_and_the_like_are_at_work(run, schedule, fields):
    optim = {} if schedule == "one_cycle" else {"optim": "adamw_torch"}
    common = {"num_train_epochs": 3, "lr_scheduler_type": schedule, **optim}
    _, fresh = run(save_strategy="no", **common, **fields)
    run(save_strategy="steps", save_steps=5, max_steps=5, **{**common, "num_train_epochs": 1})
    _, resumed = run("last", **common, **fields)
    assert min(resumed) == 5
    assert resumed == {step: group for step, group in fresh.items() if step in resumed}


def test_steps_between_checkpoints_are_those_of_the_resumed_run(run):
    run(save_strategy="steps", save_steps=8, num_train_epochs=1)
    trainer, _ = run("last", save_strategy="steps", save_steps=3, num_train_epochs=2)
    steps = {int(path.name.rpartition("-")[2]) for path in Path(trainer.run_dir).glob("checkpoint-*")}
    assert steps == {8, 9, 12, 15, 16}


def test_a_run_that_is_complete_ends_at_once(run):
    run()
    trainer, groups = run("last")
    assert trainer.state.global_step == 2 * STEPS_IN_EPOCH and not groups


@pytest.fixture
def other_bert(tmp_path):
    """A BERT of the same sizes with other weights."""
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=32,
        max_position_embeddings=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    from transformers import AutoModel

    AutoModel.from_config(config).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    ("model_fields", "fields", "said"),
    [
        ({"head_type": "linear", "n_parts": None, "d_inp": None}, {}, "head_type is 'token_depth'.*'linear'"),
        ({"n_parts": 9}, {}, "n_parts is 8, and this run has 9"),
        ({"layers": [0, 2]}, {}, r"layers is \[0, 1, 2\], and this run has \[0, 2\]"),
        ({"num_labels": 3}, {}, "classes is"),
        ({"freeze_backbone": False}, {}, "backbone is .*, and this run has None"),
        ({}, {"per_device_train_batch_size": 10}, "examples in a step is 20, and this run has 10"),
        ({}, {"seed": 1}, "seed is 42, and this run has 1"),
        ({}, {"data_seed": 1}, "data_seed is None, and this run has 1"),
        ({}, {"optim": "adamw_torch"}, "optim is 'radam', and this run has 'adamw_torch'"),
        ({}, {"lr_scheduler_type": "linear"}, "lr_scheduler_type is 'one_cycle', and this run has 'linear'"),
        ({}, {"train_sampling_strategy": "random"}, "train_sampling_strategy is 'group_by_length'"),
        ({}, {"num_train_epochs": 1}, "num_train_epochs is 1, and .* is at 2 already"),
        ({}, {"max_steps": 9}, "max_steps is 9, and .* is at 16 already"),
    ],
)
def test_another_run_is_refused_by_name(run, make_model, model_fields, fields, said):
    run()
    given = {name: value for name, value in model_fields.items() if value is not None}
    if "head_type" in model_fields:
        model = CapsuleHeadForSequenceClassification.from_backbone(make_model().config.base_model_name_or_path, **given)
    else:
        model = make_model(**given)
    with pytest.raises(ValueError, match=said) as error:
        run("last", model=model, **fields)
    assert "\n" not in str(error.value)


def test_another_backbone_of_the_same_sizes_is_refused(run, make_model, other_bert):
    run()
    with pytest.raises(ValueError, match="its backbone is"):
        run("last", model=make_model(backbone=other_bert))


def test_a_backbone_that_has_moved_is_the_same(run, make_model, bert, tmp_path):
    run()
    (tmp_path / "moved").symlink_to(bert)
    trainer, _ = run("last", model=make_model(backbone=str(tmp_path / "moved")), num_train_epochs=3)
    assert trainer.state.global_step == 3 * STEPS_IN_EPOCH


def test_other_data_is_refused(run, tokens):
    run()
    fewer, flipped = tokens["train"].select(range(150)), tokens["train"].select([1, 0, *range(2, 160)])
    for data in (fewer, flipped):
        with pytest.raises(ValueError, match="its training data is '160 examples"):
            run("last", data=data)


def test_adapters_are_told_from_none(run, make_model):
    adapters = get_peft_model(make_model(), LoraConfig(target_modules=["query"], modules_to_save=["head"]))
    run()
    with pytest.raises(ValueError, match=r"its backbone is|its trainable parameters is"):
        run("last", model=adapters)


def test_a_checkpoint_without_optimizer_is_refused(run):
    run(save_only_model=True)
    with pytest.raises(ValueError, match="no optimizer state, as it was saved with save_only_model"):
        run("last", num_train_epochs=3)


def test_a_schedule_that_goes_by_results_keeps_its_learning_rate(run):
    fields = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "optim": "adamw_torch",
        "eval_strategy": "epoch",
        "metric_for_best_model": "loss",
    }
    run(**fields)
    with pytest.raises(ValueError, match=r"learning_rate of a schedule that goes by results is 0\.01"):
        run("last", **fields, learning_rate=1e-3, num_train_epochs=3)
    trainer, _ = run("last", **fields, num_train_epochs=3)
    assert trainer.state.global_step == 3 * STEPS_IN_EPOCH


def test_the_description_is_in_the_checkpoint_and_a_damaged_one_is_named(run):
    trainer, _ = run()
    file = Path(trainer.run_dir) / f"checkpoint-{2 * STEPS_IN_EPOCH}" / RUN
    assert json.loads(file.read_text())["examples in a step"] == 20
