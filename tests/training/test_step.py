"""What a step reads from the device: no more than a step of transformers' Trainer, and nothing in the model."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Value
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from capsule_heads import CapsuleTrainer
from capsule_heads.backbones import running as backbones
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache
from capsule_heads.models import losses

READS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class Reads(TorchDispatchMode):
    """Counts the operations whose result is in the values of a tensor, and so on the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in READS or (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class OfSteps(TrainerCallback):
    """Counts what the steps read, and not what comes before and after them."""

    def __init__(self):
        self.reads = Reads()

    def on_step_begin(self, args, state, control, **kwargs):
        self.reads.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.reads.__exit__(None, None, None)


@pytest.fixture
def count_reads(make_model, arguments, tokens, tokenizer, tmp_path, monkeypatch):
    """count_reads(cls, cached, **fields): what three steps read, the model behaving as on a device."""

    def count(cls, cached, **fields):
        model = make_model(mixup_alpha=0.0)
        train = HiddenStateCache(tokens["train"], model, tokenizer, tmp_path / "cache") if cached else tokens["train"]
        with monkeypatch.context() as patch:
            for module in (backbones, losses):
                patch.setattr(module, "is_readable", lambda tensor: False)
            fields |= {"max_steps": 3, "train_sampling_strategy": "random", "logging_steps": 100}
            args = arguments(optim="sgd", lr_scheduler_type="linear", **fields)  # the plain Trainer knows these
            steps = OfSteps()
            cls(model, args, train_dataset=train, data_collator=CapsuleCollator(tokenizer), callbacks=[steps]).train()
        return steps.reads.names

    return count


@pytest.mark.parametrize("cached", [False, True], ids=["texts", "hidden states"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["not clipped", "clipped"])
def test_a_step_reads_one_number(count_reads, cached, n, max_grad_norm):
    fields = {"gradient_accumulation_steps": n, "max_grad_norm": max_grad_norm}
    ours = count_reads(CapsuleTrainer, cached, **fields)
    theirs = count_reads(Trainer, cached, **fields)
    of_backbone = 0 if cached else n  # whether any text is padded, where transformers chooses an attention mask
    assert len(ours) == 3 * (1 + of_backbone)
    assert len(ours) <= len(theirs)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01], ids=["not clipped", "clipped"])
def test_losses_and_weights_are_those_of_the_plain_trainer(make_model, arguments, tokens, tokenizer, max_grad_norm):
    results = []
    for cls in CapsuleTrainer, Trainer:
        model = make_model(mixup_alpha=0.0)
        args = arguments(
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=0.1,
            train_sampling_strategy="sequential",
            gradient_accumulation_steps=2,
            max_steps=3,
            max_grad_norm=max_grad_norm,
            logging_steps=1,
        )
        trainer = cls(model, args, train_dataset=tokens["train"], data_collator=CapsuleCollator(tokenizer))
        trainer.train()
        logs = [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x]
        results.append((logs, torch.nn.utils.parameters_to_vector(model.head.parameters())))
        assert args.logging_nan_inf_filter
    (logs, weights), (expected_logs, expected_weights) = results
    assert len(logs) == 3 and logs == expected_logs
    assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fields", [{}, {"class_weights": [1.0, 2.0]}, {"freeze_backbone": False}], ids=str)
@pytest.mark.parametrize("given", ["input_ids", "hidden_states"])
def test_the_model_reads_no_value(make_model, monkeypatch, train, fields, given):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # this device knows none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model = make_model(mixup_alpha=0.0, **fields).to("meta").train(train)
    inputs = {"labels": torch.tensor([0, 1, 1, 0])}
    if given == "input_ids":  # without a mask: transformers reads whether all of it is 1
        inputs["input_ids"] = torch.ones(4, 7, dtype=torch.long)
    else:
        inputs["hidden_states"] = torch.zeros(4, 7, 3, 16, dtype=torch.float16)
        inputs["attention_mask"] = torch.ones(4, 7, dtype=torch.long)
    # A tensor on this device has no values: to read one is an error.
    outputs = model(**{name: x.to("meta") for name, x in inputs.items()})
    outputs.loss.backward()
    assert outputs.logits.shape == (4, 2)
    assert all(x.grad is not None for x in model.head.parameters())


WRONG = {
    "labels": (5, "labels go from 0 to 5; num_labels=2 expects class indices 0 to 1"),
    "attention_mask": (7, "attention_mask goes from 0 to 7; expected 1 for tokens and 0 for padding"),
    "input_ids": (99, "input_ids go from 0 to 99, and the bert backbone has embeddings for 0 to 31"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("evaluates", [False, True], ids=["training", "evaluation"])
def test_a_batch_is_checked_before_it_moves(make_model, arguments, tokens, tokenizer, name, evaluates):
    value, message = WRONG[name]

    def collate(features):
        batch = CapsuleCollator(tokenizer)(features)
        batch[name].view(-1)[0] = 0
        batch[name].view(-1)[-1] = value
        return batch

    model = make_model(mixup_alpha=0.0)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the batch has moved"))
    trainer = CapsuleTrainer(
        model, arguments(), train_dataset=tokens["train"], eval_dataset=tokens["validation"], data_collator=collate
    )
    with pytest.raises(ValueError, match=message):
        trainer.evaluate() if evaluates else trainer.train()
    assert trainer.data_collator is collate


@pytest.mark.parametrize("fields", [{}, {"num_labels": 1, "problem_type": "regression"}], ids=["classes", "values"])
@pytest.mark.parametrize("cached", [False, True], ids=["texts", "hidden states"])
def test_routing_and_loss_stay_float32_in_bfloat16(
    make_model, arguments, tokens, tokenizer, tmp_path, monkeypatch, fields, cached
):
    model = make_model(mixup_alpha=0.0, **fields)
    with torch.no_grad():  # all betas of a new head are zero, and so are its scores and most gradients
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    train = tokens["train"].map(lambda row: {"labels": float(row["labels"])}) if fields else tokens["train"]
    train = train.cast_column("labels", Value("float32")) if fields else train
    if cached:
        train = HiddenStateCache(train, model, tokenizer, tmp_path / "cache")
    seen = []
    for routing in model.head.routings:
        routing.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    logits_of = model._logits

    def logits(*given):
        assert torch.is_autocast_enabled("cpu")
        seen.append((logits_of(*given),))
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(seen[-1][0], logits_of(*given))
        return seen[-1][0]

    monkeypatch.setattr(model, "_logits", logits)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad.dtype == torch.float32, name
                    assert parameter.grad.isfinite().all() and parameter.grad.any(), name

    trainer = CapsuleTrainer(
        model,
        arguments(bf16=True, max_steps=3),
        train_dataset=train,
        data_collator=CapsuleCollator(tokenizer),
        callbacks=[Watch()],
    )
    trainer.train()
    assert len(seen) == 3 * 3
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.std() > 1e-4 for outputs in seen for x in outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a CUDA device")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("on_device", [False, True], ids=["from disk", "kept on the GPU"])
def test_forward_and_backward_never_wait_for_the_gpu(
    make_model, arguments, tokens, tokenizer, tmp_path, bf16, on_device
):
    model = make_model(mixup_alpha=0.0, class_weights=[1.0, 2.0]).cuda()
    train = HiddenStateCache(tokens["train"], model, tokenizer, tmp_path / "cache")
    if on_device:
        train.to("cuda")

    class Strict(CapsuleTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            assert all(x.is_cuda for x in inputs.values())
            torch.cuda.set_sync_debug_mode("error" if self.state.global_step else "default")  # the first one warms up
            return super().compute_loss(model, inputs, **kwargs)

    trainer = Strict(
        model,
        arguments(max_steps=4, bf16=bf16, use_cpu=False),
        train_dataset=train,
        data_collator=CapsuleCollator(tokenizer),
    )
    backward = trainer.accelerator.backward

    def strictly(loss, **kwargs):
        try:
            backward(loss, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.accelerator.backward = strictly
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 4
