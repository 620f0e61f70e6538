import csv
import multiprocessing
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.files import read_json
from capsule_heads.heads import DEFAULT_HEAD, registered_heads
from capsule_heads.training.sweep import SweepArguments, combine
from capsule_heads.training.sweep_results import describe, render

SMALL = {"d_inp": 8, "n_parts": 4}
TRAINED = [name for name, head in registered_heads().items() if head.made_by is None]


@pytest.fixture(params=[1, 2])
def processes(request):
    """Number of processes that share the heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr("capsule_heads.training.sweep.number_of_processes", lambda n_members, device: 2)


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("head_type", [name for name in TRAINED if name != "spatial_pose"])  # of images
def test_members_end_with_the_weights_that_the_trainer_gives(make_sweep, train_alone, head_type):
    options = {x: v for x, v in SMALL.items() if x in registered_heads()[head_type].Options.names()}
    grid = {"learning_rate": [2e-2], "mixup_alpha": [0.0, 0.2]}
    plan = SweepArguments(grid=grid, heads=[head_type], seeds=1 + (head_type == DEFAULT_HEAD))
    sweep = make_sweep(plan, options, max_steps=30, seed=1, label_smoothing_factor=0.1)
    sweep.train()
    for member in sweep.members:
        expected = train_alone(sweep, member, max_steps=30, label_smoothing_factor=0.1)
        found = member.weights()
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-5)


def test_combinations_have_the_options_of_their_head():
    plan = SweepArguments(
        grid={"n_parts": [4, 8], "learning_rate": [1e-3, 1e-2]}, heads=["token_depth", "attentive_pooling"]
    )
    found = [str(x) for x in combine(plan, "linear", {"d_inp": 8})]
    assert found == [
        "token_depth, d_inp=8, n_parts=4, learning_rate=0.001",
        "token_depth, d_inp=8, n_parts=4, learning_rate=0.01",
        "token_depth, d_inp=8, n_parts=8, learning_rate=0.001",
        "token_depth, d_inp=8, n_parts=8, learning_rate=0.01",
        "attentive_pooling, d_inp=8, learning_rate=0.001",
        "attentive_pooling, d_inp=8, learning_rate=0.01",
    ]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"grid": {"parts": [4]}}, "parts is no option of token_depth; expected one of"),
        ({"grid": {"n_parts": [0]}}, "n_parts is 0; expected"),
        ({"heads": ["token_dept"]}, "Did you mean token_depth?"),
    ],
)
def test_what_no_head_has_is_refused(plan, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        combine(SweepArguments(**plan), "token_depth", {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy is epoch, which a sweep does not take"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, which a sweep does not take"),
    ],
)
def test_what_a_sweep_does_not_do_is_refused(make_sweep, given, message):
    with pytest.raises(ValueError, match=message):
        make_sweep(SweepArguments(), **given)


def test_the_best_is_a_run_of_its_own(make_sweep):
    grid = {"learning_rate": [1e-4, 2e-2], "d_inp": [8, 16]}
    sweep = make_sweep(
        SweepArguments(grid=grid, seeds=2, test_all=True, ensemble=3), {"n_parts": 4}, max_steps=30, recipe="paper"
    )
    found = sweep.execute()
    assert [x["seeds"] for x in found["combinations"]] == [2] * 4
    for row, member in zip(found["heads"], sweep.ranked(), strict=True):
        assert row["validation"] == member.found["validation"]
    scores = [row["validation"]["accuracy"] for row in found["heads"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1  # else nothing was chosen
    best = found["heads"][0]
    assert found["best"]["validation_accuracy"] == best["validation"]["accuracy"]
    assert found["best"]["test_accuracy"] == best["test"]["accuracy"]
    folder = sweep.output_dir / "best"
    ensemble = CapsuleHeadForSequenceClassification.from_pretrained(sweep.output_dir / "ensemble")
    assert len(ensemble.head.members) == 3
    assert found["ensemble"]["validation_accuracy"] > 0.6
    config = CapsuleHeadForSequenceClassification.from_pretrained(folder).config
    assert config.d_inp == best["d_inp"]
    assert read_json(folder / "results.json")["training_arguments"]["learning_rate"] == best["learning_rate"]
    with open(sweep.output_dir / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation_accuracy"]) for row in rows] == scores
    assert "The best head" in render(found)
    assert not list(sweep.output_dir.glob("checkpoint-*"))
    assert (sweep.output_dir / "sweep.png").stat().st_size > 10_000


def test_a_killed_sweep_goes_on(make_sweep, processes, monkeypatch):
    grid = {"learning_rate": [2e-2], "mixup_alpha": [0.0, 0.2]}
    complete = make_sweep(SweepArguments(grid=grid), max_steps=20)
    complete.train()
    expected = [member.weights() for member in complete.members]
    shutil.rmtree(complete.output_dir)

    monkeypatch.setattr("capsule_heads.training.sweep.SECONDS_BETWEEN_CHECKPOINTS", 0)
    killed = make_sweep(SweepArguments(grid=grid), max_steps=20)
    save = killed._save

    def save_and_die(tell):
        save(tell)
        if killed._step == 8:  # the end of an epoch
            raise KeyboardInterrupt

    killed._save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    with pytest.raises(ValueError, match="is of another sweep: its members is"):
        make_sweep(SweepArguments(grid={"learning_rate": [2e-2]}, resume=True), max_steps=20).train()
    resumed = make_sweep(SweepArguments(grid=grid, resume=True), max_steps=20)
    resumed.train()
    assert all(member.steps == 20 for member in resumed.members)
    for member, weights in zip(resumed.members, expected, strict=True):
        for name, x in member.weights().items():
            torch.testing.assert_close(x, weights[name], rtol=1e-4, atol=1e-6)


def test_halving_stops_the_worse_half(make_sweep, processes):
    rates = [1e-5, 1e-4, 2e-2, 2e-1]
    sweep = make_sweep(SweepArguments(grid={"learning_rate": rates}, halving=True), max_steps=40, min_learning_rate=0)
    sweep.train()
    assert sorted(member.steps for member in sweep.members) == [10, 10, 20, 40]
    found = describe(sweep)
    assert [row["stopped"] is None for row in found["heads"]] == [True, False, False, False]
    assert [x["seeds"] for x in found["combinations"]] == [1, 0, 0, 0]


def test_a_head_that_diverges_leaves_the_others(make_sweep, processes):
    sweep = make_sweep(SweepArguments(seeds=2), max_steps=10)
    with torch.no_grad():
        next(sweep.members[0].model.head.parameters()).fill_(torch.nan)
    sweep.train()
    assert [member.fault for member in sweep.members] == ["step 1: not finite", None]
    assert sweep.members[1].steps == 10


def test_a_sweep_that_does_not_fit_in_memory_is_refused(make_sweep, monkeypatch):
    sweep = make_sweep(SweepArguments(seeds=3), max_steps=10)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    with pytest.raises(ValueError, match=r"The sweep has 3 heads and takes .* expected at most 0 heads"):
        sweep._check_memory()


@pytest.mark.usefixtures("two_processes")
def test_a_process_that_is_killed_is_one_sentence(make_sweep):
    sweep = make_sweep(SweepArguments(seeds=2), max_steps=40)
    advance = sweep._advance

    def advance_and_kill(tell, *args):
        multiprocessing.active_children()[0].kill()
        advance(tell, *args)

    sweep._advance = advance_and_kill
    with pytest.raises(ChildProcessError, match=r"ended with exit code -9 .* resume from the last checkpoint"):
        sweep.train()
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("two_processes")
def test_what_a_process_raises_is_raised(make_sweep, monkeypatch):
    sweep = make_sweep(SweepArguments(seeds=2), max_steps=40)

    def fail(state, file):
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="could not be written: no space") as caught:
        sweep.train()
    assert "in fail" in caught.value.__cause__.__notes__[0]  # where it was raised there
    assert not multiprocessing.active_children()
