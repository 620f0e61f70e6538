import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    modeling_utils,
)

from capsule_heads import CapsuleHeadConfig, CapsuleTrainer
from capsule_heads.backbones.processors import load_processor
from capsule_heads.data.tokenization import tokenize, window_fields
from capsule_heads.metrics import compute_metrics_for
from capsule_heads.training import OneCycle


class Recorder(TrainerCallback):
    """Learning rate and beta1 that each step was made with, and the loss that was logged."""

    def __init__(self):
        self.lrs, self.betas, self.losses = [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.lrs.append(optimizer.param_groups[0]["lr"])
        self.betas.append(optimizer.param_groups[0].get("betas", (None,))[0])

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture
def make_trainer(arguments, tokenizer, tokens):
    def make(model, cls=CapsuleTrainer, args=None, **kwargs):
        kwargs = {"train_dataset": tokens["train"], "eval_dataset": tokens["validation"], **kwargs}
        args = arguments() if args is None else args
        return cls(model=model, args=args, processing_class=kwargs.pop("processing_class", tokenizer), **kwargs)

    return make


def head_of(model):
    return {name: x.clone() for name, x in model.state_dict().items() if not name.startswith("backbone.")}


@pytest.mark.parametrize("plain", [False, True], ids=["CapsuleTrainer", "Trainer"])
def test_learns(make_model, make_trainer, arguments, plain):
    common = {"num_train_epochs": 12, "learning_rate": 2e-2, "logging_steps": 8, "per_device_train_batch_size": 20}
    args = arguments(TrainingArguments, **common) if plain else arguments(**common)
    recorder = Recorder()
    model = make_model()
    assert model.config.mixup_alpha > 0
    trainer = make_trainer(
        model,
        Trainer if plain else CapsuleTrainer,
        args,
        callbacks=[recorder],
        compute_metrics=compute_metrics_for("classification"),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] >= 0.95
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert np.mean(recorder.losses[-3:]) < 0.8 * recorder.losses[0]


def test_the_optimizer_is_radam_over_the_heads_parameters(make_model, make_trainer, arguments):
    model = make_model()
    trainer = make_trainer(model, args=arguments(weight_decay=0.1, adam_beta2=0.98))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.RAdam
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    assert held == {id(x) for x in model.head.parameters()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["decoupled_weight_decay"]) == (5e-4, (0.9, 0.98), True)


def test_the_schedule_is_at_work_in_training(make_model, make_trainer, arguments):
    recorder = Recorder()
    trainer = make_trainer(make_model(), args=arguments(max_steps=40), callbacks=[recorder])
    trainer.train()
    assert isinstance(trainer.lr_scheduler, OneCycle)
    assert len(recorder.lrs) == 40
    for step, (lr, beta1) in enumerate(zip(recorder.lrs, recorder.betas)):
        height = step / 4 if step <= 4 else (1 + math.cos(math.pi * (step - 4) / 36)) / 2
        assert lr == pytest.approx(1e-5 + (5e-4 - 1e-5) * height)
        assert beta1 == pytest.approx(0.9 - 0.09 * height)


def test_optimizers_and_schedules_of_transformers(make_model, make_trainer, arguments):
    recorder = Recorder()
    args = arguments(max_steps=4, optim="adamw_torch", lr_scheduler_type="constant", learning_rate=1e-3)
    trainer = make_trainer(make_model(), args=args, callbacks=[recorder])
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert recorder.lrs[1:] == [1e-3] * 3


@pytest.mark.parametrize("optim", ["radam", "adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
@pytest.mark.parametrize("schedule", ["one_cycle", "linear"])
def test_the_backbone_has_a_learning_rate_of_its_own(make_model, make_trainer, arguments, optim, schedule):
    args = arguments(
        max_steps=3,
        optim=optim,
        lr_scheduler_type=schedule,
        learning_rate=1e-3,
        backbone_learning_rate=1e-6,
        weight_decay=0.1,
    )
    model = make_model(freeze_backbone=False)
    trainer = make_trainer(model, args=args)
    optimizer = trainer.create_optimizer()
    of_part = {True: [], False: []}
    for group in optimizer.param_groups:
        for x in group["params"]:
            of_part[group["lr"] == 1e-6].append(id(x))
        assert group["lr"] in (1e-3, 1e-6)
    assert sorted(of_part[True]) == sorted(id(x) for x in model.backbone.parameters())
    assert sorted(of_part[False]) == sorted(id(x) for x in model.head.parameters())
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (lr, decay) for lr in (1e-3, 1e-6) for decay in (0.0, 0.1)
    }
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    before = [x.detach().clone() for x in model.backbone.parameters()]
    trainer.add_callback(Rates())
    trainer.train()
    for head, _, backbone, _ in rates:
        assert backbone == pytest.approx(head / 1000)
    assert max(head for head, *_ in rates) > 4e-4
    changes = [(x - y).abs().max().item() for x, y in zip(model.backbone.parameters(), before)]
    assert 0 < max(changes) < 1e-5


def test_a_learning_rate_for_a_backbone_that_does_not_train(make_model, make_trainer, arguments):
    trainer = make_trainer(make_model(), args=arguments(backbone_learning_rate=1e-5))
    with pytest.raises(ValueError, match=r"backbone_learning_rate is 1e-05, but the optimizer \(radam\) has no param"):
        trainer.create_optimizer()


@pytest.mark.parametrize("fields", [{}, {"freeze_backbone": False}], ids=["frozen", "unfrozen"])
def test_plain_arguments_train_as_in_transformers(make_model, make_trainer, arguments, fields):
    results = []
    for cls in CapsuleTrainer, Trainer:
        common = {"max_steps": 6, "learning_rate": 1e-3, "max_grad_norm": 0.0, "logging_steps": 1}
        args = arguments(TrainingArguments, **common)
        trainer = make_trainer(make_model(mixup_alpha=0, **fields), cls, args)
        trainer.train()
        results.append((head_of(trainer.model), [x["loss"] for x in trainer.state.log_history if "loss" in x]))
        assert trainer.evaluate()["eval_loss"] > 0
    (head, losses), (expected_head, expected_losses) = results
    assert losses == expected_losses and len(losses) == 6
    torch.testing.assert_close(head, expected_head, rtol=0, atol=0)


def test_no_arguments_at_all(make_model, tokens, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where transformers' default folder is made
    trainer = CapsuleTrainer(make_model(), train_dataset=tokens["train"])
    assert type(trainer.args) is TrainingArguments
    assert type(trainer.create_optimizer()) is not torch.optim.RAdam


def test_adapters_train_with_the_head(make_model, make_trainer, arguments, tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["head"])
    model = get_peft_model(make_model(), config)
    args = arguments(num_train_epochs=6, learning_rate=2e-2, backbone_learning_rate=5e-3, save_strategy="epoch")
    trainer = make_trainer(model, args=args, compute_metrics=compute_metrics_for("classification"))
    assert trainer.model_accepts_loss_kwargs is False  # as without adapters: gradients are divided when accumulated
    optimizer = trainer.create_optimizer()
    numbers = {lr: sum(len(g["params"]) for g in optimizer.param_groups if g["lr"] == lr) for lr in (2e-2, 5e-3)}
    assert numbers == {2e-2: len(list(make_model().head.parameters())), 5e-3: 2 * 2 * 2}
    trainer.train()
    results = trainer.evaluate()
    assert results["eval_accuracy"] >= 0.95
    checkpoint = tmp_path / "run" / "checkpoint-48"
    loaded = PeftModel.from_pretrained(make_model(), checkpoint)
    assert make_trainer(loaded, compute_metrics=trainer.compute_metrics).evaluate()["eval_loss"] == pytest.approx(
        results["eval_loss"], abs=1e-6
    )


def test_texts_in_windows_learn(make_model, make_trainer, arguments, texts, tokenizer):
    fields = window_fields(tokenizer, overlap=1, length=6)
    tokens = tokenize(texts, tokenizer, in_windows=True)
    assert max(tokens["train"]["length"]) > 12
    trainer = make_trainer(
        make_model(**fields),
        args=arguments(num_train_epochs=12, learning_rate=2e-2, per_device_eval_batch_size=7),
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        compute_metrics=compute_metrics_for("classification"),
    )
    trainer.train()
    output = trainer.predict(tokens["validation"])
    assert output.predictions.shape == (64, 2)
    assert output.label_ids.tolist() == tokens["validation"]["labels"][:]
    assert output.metrics["test_accuracy"] >= 0.95


def batches(trainer, epoch=0):
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return [batch["attention_mask"].sum(1).tolist() for batch in loader]


def test_batches_are_of_like_length(make_model, make_trainer, arguments, tokens):
    trainer = make_trainer(make_model(), args=arguments(per_device_train_batch_size=8))
    assert trainer._get_train_sampler().lengths == tokens["train"]["length"][:]
    grouped = batches(trainer)
    assert sorted(length for lengths in grouped for length in lengths) == sorted(tokens["train"]["length"])
    assert np.mean([max(lengths) - min(lengths) for lengths in grouped[1:]]) < 4
    shuffled = batches(make_trainer(make_model(), args=arguments(train_sampling_strategy="random")))
    assert np.mean([max(lengths) - min(lengths) for lengths in shuffled]) > 8


def test_the_order_follows_from_seed_and_epoch(make_model, make_trainer, arguments):
    def order(epoch, **fields):
        sampler = make_trainer(model, args=arguments(**fields))._get_train_sampler()
        sampler.set_epoch(epoch)
        torch.rand(epoch + 1)  # the global generator has no part in it
        return list(sampler)

    model = make_model()
    assert sorted(order(0)) == list(range(160))
    assert order(1) == order(1)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=7)
    assert order(0, seed=7) == order(0, data_seed=7)
    trainer = make_trainer(model)
    assert batches(trainer, 0) != batches(trainer, 1)  # the loader passes the epoch on


@pytest.mark.parametrize("plain", [False, True], ids=["CapsuleTrainer", "Trainer"])
def test_eight_times_one_is_one_times_eight(make_model, make_trainer, arguments, plain):
    def run(batch_size, n_accumulated):
        fields = {"num_train_epochs": 1, "logging_steps": 1, "learning_rate": 0.1, "max_grad_norm": 0.0}
        if plain:
            fields |= {"optim": "sgd", "learning_rate": 1.0}
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": n_accumulated}
        recorder = Recorder()
        args = arguments(*[TrainingArguments] * plain, **fields, **sizes)
        model = make_model(mixup_alpha=0).double()
        make_trainer(model, Trainer if plain else CapsuleTrainer, args, callbacks=[recorder]).train()
        return recorder.losses, head_of(model)

    (losses, head), (expected_losses, expected_head) = run(1, 8), run(8, 1)
    assert len(losses) == 20
    assert losses == pytest.approx(expected_losses, rel=1e-6)  # they are logged in float32
    torch.testing.assert_close(head, expected_head, rtol=1e-8, atol=1e-8)
    initial = head_of(make_model().double())
    assert max((head[name] - x).abs().max() for name, x in initial.items()) > 0.02  # it did learn


def test_evaluation_gathers_logits_alone(make_model, make_trainer, tokens):
    model = make_model()
    model.config.output_hidden_states = True
    output = make_trainer(model).predict(tokens["validation"])
    assert isinstance(output.predictions, np.ndarray)
    assert output.predictions.shape == (64, 2)
    assert output.label_ids.tolist() == tokens["validation"]["labels"][:]


def test_the_best_model_is_loaded_at_the_end(make_model, make_trainer, arguments, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog
    fields = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    scores = iter([0.2, 0.9, 0.3, 0.4])
    heads = []

    def compute_metrics(prediction):
        heads.append(head_of(model))
        return {"score": next(scores)}

    model = make_model()
    args = arguments(num_train_epochs=4, metric_for_best_model="score", **fields)
    trainer = make_trainer(model, args=args, compute_metrics=compute_metrics)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-16")
    torch.testing.assert_close(head_of(model), heads[1], rtol=0, atol=0)
    assert any(not torch.equal(x, heads[3][name]) for name, x in head_of(model).items())
    # The checkpoint holds the head alone.
    assert (tmp_path / "run" / "checkpoint-16" / "model.safetensors").stat().st_size < 10_000
    assert not [r for r in caplog.records if "key" in r.getMessage()]


def test_images_have_no_lengths_and_come_in_random_order(make_model, make_trainer, arguments):
    images = Dataset.from_dict({"pixel_values": [[0.0]] * 50, "labels": [0] * 50})
    trainer = make_trainer(make_model(), train_dataset=images)
    assert trainer.args.train_sampling_strategy == "group_by_length"
    torch.manual_seed(0)
    order = list(trainer._get_train_sampler())
    assert order != sorted(order) and sorted(order) == list(range(50))


@pytest.mark.parametrize("at", [12, 16], ids=["within an epoch", "between epochs"])
@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(make_model, make_trainer, arguments, tmp_path, at, strategy):
    fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": at, "train_sampling_strategy": strategy}
    whole, resumed = make_model(), make_model()
    trainer = make_trainer(whole, args=arguments(learning_rate=1e-2, **fields))
    trainer.train()
    assert trainer.state.global_step == 24
    torch.rand(3)
    trainer = make_trainer(resumed, args=arguments(learning_rate=1e-2, **fields))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    torch.testing.assert_close(head_of(resumed), head_of(whole), rtol=0, atol=0)


def test_early_stopping(make_model, make_trainer, arguments):
    fields = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = arguments(max_steps=40, load_best_model_at_end=True, metric_for_best_model="score", **fields)
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    trainer = make_trainer(
        make_model(), args=args, compute_metrics=lambda _: {"score": next(scores)}, callbacks=[EarlyStoppingCallback(2)]
    )
    trainer.train()
    assert trainer.state.global_step == 8  # the best at step 4, then two that are not better


def test_a_tokenizer_without_padding_token(make_model, make_trainer, gpt2):
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        make_trainer(make_model(gpt2), processing_class=load_processor(gpt2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_learns(make_model, make_trainer, arguments, gpt2, texts, side):
    tokenizer = load_processor(gpt2, pad_token="[SEP]")
    tokenizer.padding_side = side
    tokens = tokenize(texts, tokenizer)
    trainer = make_trainer(
        make_model(gpt2),
        args=arguments(num_train_epochs=12, learning_rate=2e-2),
        processing_class=tokenizer,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        compute_metrics=compute_metrics_for("classification"),
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= 0.95


def with_labels(dataset, feature, of):
    columns = {name: dataset[name][:] for name in ("input_ids", "attention_mask", "length")}
    features = Features({**{name: dataset.features[name] for name in columns}, "labels": feature})
    return Dataset.from_dict({**columns, "labels": [of(label) for label in dataset["labels"]]}, features=features)


@pytest.mark.parametrize(
    "feature, of, fields, task, metric, least",
    [
        (Value("float32"), lambda y: 30.0 + 4.0 * y, {"label_mean": 32.0, "label_std": 2.0}, "stsb", "pearson", 0.9),
        (
            List(Value("float32")),
            lambda y: [y, 1 - y, y],
            {"problem_type": "multi_label_classification", "num_labels": 3},
            "multilabel",
            "subset_accuracy",
            0.9,
        ),
    ],
    ids=["regression", "multi-label"],
)
def test_other_problem_types_learn(
    make_model, make_trainer, arguments, tokens, feature, of, fields, task, metric, least
):
    train, validation = (with_labels(tokens[split], feature, of) for split in ("train", "validation"))
    model = make_model(**{"num_labels": 1, **fields})
    trainer = make_trainer(
        model,
        args=arguments(num_train_epochs=12, learning_rate=2e-2),
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=compute_metrics_for(task),
    )
    trainer.train()
    results = trainer.evaluate()
    assert results[f"eval_{metric}"] >= least
    if task == "stsb":  # in the labels' own unit, around their own mean
        predictions = trainer.predict(validation).predictions.reshape(-1)
        assert np.abs(predictions - np.array(validation["labels"])).mean() < 1.0


@pytest.mark.parametrize("fails", ["config", "weights", "tokenizer", "arguments"])
def test_where_the_last_save_fails_the_earlier_model_stays(make_model, make_trainer, monkeypatch, fails):
    trainer = make_trainer(make_model())
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"config.json", "model.safetensors", "tokenizer.json", "training_args.bin"}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    place, name = {
        "config": (CapsuleHeadConfig, "to_json_file"),
        "weights": (modeling_utils, "safe_save_file"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "arguments": (torch, "save"),
    }[fails]
    monkeypatch.setattr(place, name, full)
    with pytest.raises(
        OSError, match=rf"^{folder} could not be written: \[Errno 28\] No space left on device\. .* as they"
    ):
        make_trainer(make_model(seed=1)).save_model()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
