"""Numbers that are not finite: they never reach the weights, and are named."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from configurations import make_config
from torch.utils.data import Dataset
from transformers import BertConfig, TrainerCallback

from capsule_heads import (
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleTrainer,
)
from capsule_heads.paper.configuration_stereo_conv import StereoConvConfig

N_LAYERS, HIDDEN_SIZE = 3, 16
NAN, INF = float("nan"), float("inf")


def make_head(**fields):
    """A head alone, that takes hidden states of 3 layers and hidden size 16."""
    torch.manual_seed(0)
    sizes = {"d_inp": 8, "n_parts": 4, "num_labels": 3, "hidden_sizes": [HIDDEN_SIZE] * N_LAYERS, "layers": [0, 2]}
    config = make_config(BertConfig(), head_only=True, **{**sizes, **fields})
    model = CapsuleHeadForSequenceClassification(config, build=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_batch(seed=0, n=4, n_tokens=5, n_layers=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(n, n_tokens, n_layers, HIDDEN_SIZE, generator=generator),
        "attention_mask": torch.ones(n, n_tokens),
        "labels": torch.randint(3, (n,), generator=generator),
    }


class Batches(Dataset):
    """Whole batches, each made when it is asked for."""

    def __init__(self, n, make=make_batch):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.make(index)


class Watch(TrainerCallback):
    """The weights after each step, and whether all were finite."""

    def __init__(self):
        self.weights, self.all_finite = [], True

    def on_step_end(self, args, state, control, model, **kwargs):
        flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        self.weights = [*self.weights[-5:], flat]
        self.all_finite &= bool(flat.isfinite().all())


@pytest.fixture
def train(arguments):
    """train(model, batches, **fields): trains on whole batches, in their order; returns what `Watch` saw."""

    def run(model, batches, scaler=None, **fields):
        fields = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "train_sampling_strategy": "sequential"} | {
            "remove_unused_columns": False,
            "learning_rate": 1e-2,
            **fields,
        }
        watch = Watch()
        trainer = CapsuleTrainer(
            model, arguments(**fields), train_dataset=batches, data_collator=lambda rows: rows[0], callbacks=[watch]
        )
        trainer.accelerator.scaler = scaler
        trainer.train()
        return watch

    return run


@pytest.fixture
def spoil():
    """spoil(at, name, index, value): four batches, a number of one of which is not finite."""

    def make_batches(at, name, index, value):
        def make(number):
            batch = make_batch(number)
            if number == at:
                batch[name] = batch[name].clone()
                batch[name][index] = value
            return batch

        return Batches(4, make)

    return make_batches


CASES = {
    "state": ("hidden_states", (1, 2, 1, 5), NAN, r"the hidden state at layer 2 in samples 1\."),
    "overflow": ("hidden_states", (3, 2, 0, 5), INF, r"the hidden state at layer 0 in samples 3\."),
    "logits": ("hidden_states", (0, 0), 3e38, r"the logits in samples 0 \(hidden states are finite, up to 3\.0e\+38\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_is_not_finite_stops_the_training_and_says_why(train, spoil, case):
    *where, message = CASES[case]
    model, before = make_head(mixup_alpha=0.0), make_head(mixup_alpha=0.0)
    train(before, Batches(4), max_steps=2, num_train_epochs=1, lr_scheduler_type="constant")
    with pytest.raises(
        FloatingPointError, match=rf"Step 3: the loss is not finite\. Not finite: {message}.*on_nonfinite"
    ):
        train(model, spoil(2, *where), lr_scheduler_type="constant")
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_such_a_step_is_left_out_if_so_configured(train, spoil, caplog):
    model = make_head()
    with caplog.at_level(logging.WARNING, logger="capsule_heads"):
        watch = train(model, spoil(1, "hidden_states", 0, INF), on_nonfinite="skip", logging_steps=1)
    assert len(watch.weights) == 4 and watch.all_finite
    assert [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:])] == [True, False, False]
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("capsule_heads")]
    assert len(messages) == 1
    assert messages[0].startswith(
        "Step 2: the loss is not finite. Not finite: the hidden state at layer 0 in samples 0, the"
    )
    assert messages[0].endswith("The step is skipped.")


@pytest.mark.parametrize("is_filtered", [True, False])
def test_a_loss_that_is_not_finite_is_logged_only_if_asked_for(spoil, arguments, is_filtered):
    args = arguments(
        on_nonfinite="skip",
        logging_steps=1,
        logging_nan_inf_filter=is_filtered,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    batches = spoil(2, "hidden_states", 0, NAN)
    trainer = CapsuleTrainer(make_head(), args, train_dataset=batches, data_collator=lambda rows: rows[0])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isfinite(loss) for loss in losses] == [True, True, is_filtered, is_filtered]  # NaN stays in a sum
    assert not is_filtered or losses[2] == losses[1]
    assert args.logging_nan_inf_filter is is_filtered


@pytest.mark.parametrize("value", [INF, 3e38], ids=["infinite", "of infinite norm"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["not clipped", "clipped"])
def test_gradients_that_overflow_never_reach_the_weights(train, value, max_grad_norm):
    fields = {"lr_scheduler_type": "constant", "max_grad_norm": max_grad_norm}
    model, before = make_head(), make_head()
    calls = []

    def overflow(gradient):
        calls.append(gradient)
        return gradient.index_fill(0, torch.tensor([1]), value) if len(calls) == 3 else gradient

    train(before, Batches(4), max_steps=2, **fields)
    model.head.detect_parts[0].norm.weight.register_hook(overflow)
    named = r"the gradient of head\.detect_parts\.0\.norm\.weight in 1 of 8 numbers" if value == INF else "nothing"
    message = rf"Step 3: the norm of the gradients is not finite\. Not finite: {named}"
    with pytest.raises(FloatingPointError, match=message):
        train(model, Batches(4), **fields)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    calls.clear()
    assert train(model, Batches(4), on_nonfinite="skip", **fields).all_finite and len(calls) == 4


def test_one_batch_of_an_accumulated_step_is_enough(train, spoil):
    model = make_head()
    fields = {"gradient_accumulation_steps": 2, "on_nonfinite": "skip"}
    watch = train(model, spoil(2, "hidden_states", (0, 0, 0, 0), NAN), **fields)
    assert len(watch.weights) == 2 and torch.equal(*watch.weights) and watch.all_finite
    with pytest.raises(FloatingPointError, match=r"Step 2: .* layer 0 in samples 0"):
        train(model, spoil(2, "hidden_states", (0, 0, 0, 0), NAN), gradient_accumulation_steps=2)


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_weights_that_are_not_finite_always_stop_it(train, on_nonfinite):
    model = make_head()
    with torch.no_grad():
        model.head.routings[0].W[0, 1, 2, 0] = NAN
    message = (
        r"Step 1: the loss is not finite\. Not finite: head\.routings\.0\.W in 1 of 64 numbers\. These weights are lost"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(model, Batches(2), on_nonfinite=on_nonfinite)


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_statistics_of_batch_normalisation_stay_finite_too(train, on_nonfinite):
    config = make_config(StereoConvConfig(hidden_sizes=[4] * 6), head_type="spatial_pose", freeze_backbone=False)
    model = CapsuleHeadForImageClassification(config)
    images = torch.rand(3, 2, 2, 96, 96)
    images[1, 0, 0, 3, 3] = NAN
    batches = Batches(3, lambda i: {"pixel_values": images[i], "labels": torch.tensor([0, 1])})
    if on_nonfinite == "stop":
        with pytest.raises(FloatingPointError, match=r"Step 2: .*the input pixel_values in samples 0"):
            train(model, batches)
    else:
        assert train(model, batches, on_nonfinite="skip").all_finite
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    tracked = {int(x) for name, x in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert tracked == {1 if on_nonfinite == "stop" else 2}


def test_a_gradient_scaler_sees_to_overflow_itself_until_its_scale_is_1(train, spoil):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=10**6)
    watch = train(make_head(), Batches(200), scaler=scaler)
    assert watch.all_finite and 1 < scaler.get_scale() < 2.0**120  # it found a scale, and no error was raised
    assert not torch.equal(*watch.weights[-2:])
    with pytest.raises(FloatingPointError, match="Step 1: the loss is not finite"):
        train(make_head(), spoil(0, "hidden_states", 0, NAN), scaler)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    watch = train(make_head(), spoil(1, "hidden_states", 0, NAN), scaler, on_nonfinite="skip")
    assert watch.all_finite and torch.equal(*watch.weights[:2]) and not torch.equal(*watch.weights[-2:])


def test_it_is_found_behind_the_wrapper_of_a_compiled_model(train, spoil):
    fields = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_grad_norm": 1.0}
    model = make_head()
    with pytest.raises(
        FloatingPointError, match=r"Step 3: the loss is not finite\. Not finite: the hidden state at layer 2"
    ):
        train(model, spoil(2, "hidden_states", (1, 2, 1, 5), NAN), **fields)
    assert all(x.isfinite().all() for x in model.parameters())


def test_weights_in_bfloat16(train, spoil):
    model = make_head().to(torch.bfloat16)
    watch = train(model, spoil(2, "hidden_states", (1, 2, 1, 5), INF), on_nonfinite="skip")
    assert watch.all_finite and watch.weights[-1].dtype == torch.bfloat16
    assert [torch.equal(a, b) for a, b in zip(watch.weights[1:], watch.weights[2:])] == [True, False]


PROGRAM = """
import json, os, sys, time
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]  # this module, and what it shares with others
import torch
from test_nonfinite import Batches, NAN, make_batch, make_head
from capsule_heads import CapsuleTrainer, CapsuleTrainingArguments

rank = int(os.environ["RANK"])

def make(index):  # a process has every second of them
    batch = make_batch(index)
    if index == 5:
        batch["hidden_states"][2, 0, 1] = NAN
    return batch

results = {}
for word in "stop", "skip":
    arguments = CapsuleTrainingArguments(
        sys.argv[2], use_cpu=True, max_steps=4, per_device_train_batch_size=1, train_sampling_strategy="sequential",
        recipe="paper",
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, on_nonfinite=word,
        lr_scheduler_type="constant", learning_rate=1e-2, ddp_find_unused_parameters=False,
        accelerator_config={"dispatch_batches": False},
    )
    model, error = make_head(), None
    trainer = CapsuleTrainer(model, arguments, train_dataset=Batches(8, make), data_collator=lambda rows: rows[0])
    try:
        trainer.train()
    except FloatingPointError as caught:
        error = str(caught)
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).tolist()
    results[word] = {"error": error, "weights": weights, "step": trainer.state.global_step}
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(results, file)
time.sleep(1)  # else a thread of gloo's may need Python when it is gone, and abort the process
"""


@pytest.mark.slow
def test_all_processes_decide_alike(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    done = subprocess.run(
        [*torchrun, "--rdzv_endpoint=127.0.0.1:0", tmp_path / "program.py", os.path.dirname(__file__), tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["stop"]["step"] == 2 and first["skip"]["step"] == 4
    assert "layer 2 in samples 2 (process 1)" in first["stop"]["error"]
    assert first["skip"]["error"] is None and first["skip"]["weights"] != first["stop"]["weights"]
    assert torch.tensor(first["skip"]["weights"]).isfinite().all()


def test_an_unknown_word_is_refused(arguments):
    with pytest.raises(ValueError, match='on_nonfinite is \'ignore\'; expected "stop" or "skip"'):
        arguments(on_nonfinite="ignore")


@pytest.mark.parametrize("name", ["max_grad_norm", "learning_rate", "min_learning_rate", "num_train_epochs"])
def test_options_that_are_no_number_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"{name} is NaN; expected a number"):
        arguments(**{name: NAN})


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_batches_of_nothing_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected a number, 1 or more"):
        arguments(**{name: 0})


# Ten thousand hostile steps

HOSTILE = {
    "masked": lambda x, mask: (x, mask * 0),
    "duplicates": lambda x, mask: (x[:, :1].expand_as(x), mask),
    "all alike": lambda x, mask: (x[:1, :1].expand_as(x), mask),
    "zeros": lambda x, mask: (x * 0, mask),
    "large": lambda x, mask: (x * 1e4, mask),
    "one large": lambda x, mask: (torch.cat([x[:1] * 1e4, x[1:]]), mask),
    "small": lambda x, mask: (x * 1e-30, mask),
    "half": lambda x, mask: ((x * 1e4).half(), mask),
    "no token": lambda x, mask: (x[:, :0], mask[:, :0]),
    "one token": lambda x, mask: (x[:, :1], mask[:, :1]),
    "shares of tokens": lambda x, mask: (x, torch.linspace(0, 1, mask.numel()).view_as(mask)),
    "too large": lambda x, mask: (x * 1e38, mask),
    "infinite": lambda x, mask: (x.masked_fill(x > 2.5, INF), mask),
    "nan": lambda x, mask: (x.masked_fill(x > 2.5, NAN), mask),
    "plain": lambda x, mask: (x, mask),
}


def make_hostile(index):
    batch = make_batch(index, n=1 + index % 3, n_tokens=65_536 if index % 2500 == 500 else 1 + index % 7)
    change = list(HOSTILE.values())[index % len(HOSTILE)]
    batch["hidden_states"], batch["attention_mask"] = change(batch["hidden_states"], batch["attention_mask"])
    return batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "head, fields",
    [
        ({}, {}),
        ({"p_model": "skm", "n_iters": 5}, {"max_grad_norm": 1.0}),
        ({"single_beta": True, "n_iters": 2}, {"bf16": True}),
        ({"p_model": "skm"}, {"bf16": True}),
    ],
    ids=["gaussian", "skm, clipped", "gaussian, bfloat16", "skm, bfloat16"],
)
def test_thousands_of_hostile_steps_leave_finite_weights(arguments, head, fields, caplog):
    n, model = 500, make_head(**head)
    trainer = CapsuleTrainer(model, arguments(on_nonfinite="skip", **fields))
    trainer.current_gradient_accumulation_steps = 1  # what the loop sets, which would take most of the time
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    weights = torch.nn.utils.parameters_to_vector(model.parameters())
    n_spoilt = 0
    for index in range(n):
        batch = make_hostile(index)
        n_spoilt += not batch["hidden_states"].isfinite().all()
        trainer.training_step(model, batch)
        if trainer.args.max_grad_norm:
            trainer._clip_grad_norm(model)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.nn.utils.parameters_to_vector(model.parameters()).isfinite().all(), index
    assert (torch.nn.utils.parameters_to_vector(model.parameters()) - weights).abs().max() > 0.1
    n_skipped = sum("The step is skipped" in record.getMessage() for record in caplog.records)
    assert n / 20 < n_spoilt <= n_skipped < n / 3
