"""One training, however its batches are dealt to processes; `distributed_runs.py` has the runs."""

import json
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from processes import run_program

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.data.hidden_states import CapsuleCollator

pytestmark = pytest.mark.slow

WHOLE = "1 x 16 x 1"  # processes x batch of each x accumulated
SPLITS = ("2 x 8 x 1", "1 x 4 x 4", "4 x 4 x 1", "2 x 8 x 1 sharded")
KINDS = ("frozen", "unfrozen")
TOLERANCE = 1e-5  # of weights and logits, relative and absolute: their sums are rounded to float32 in another order


@pytest.fixture(scope="module")
def runs(bert, tokens_folder, tmp_path_factory):
    """runs(split, kind): the folder of the run, and what each of its processes wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    run_program(Path(__file__).with_name("distributed_runs.py"), bert, tokens_folder, folder)

    def find(split, kind):
        name = f"{split.removesuffix(' sharded')} {kind}{' sharded' * split.endswith('sharded')}"
        files = [folder / name / f"{rank}.json" for rank in range(int(split[0]))]
        return folder / name, [json.loads(file.read_text()) for file in files]

    return find


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_one_however_it_is_split(runs, split, kind):
    _, (whole,) = runs(WHOLE, kind)
    folder, found = runs(split, kind)
    assert len(whole["losses"]) == 10
    for run in found:
        assert run["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        torch.testing.assert_close(
            torch.tensor(run["logits"]), torch.tensor(whole["logits"]), rtol=TOLERANCE, atol=TOLERANCE
        )
    assert len({json.dumps(run.get("weights")) for run in found}) == 1  # the same bits in every process
    state = CapsuleHeadForSequenceClassification.from_pretrained(folder).state_dict()
    assert any(name.startswith("backbone.") for name in whole["weights"]) == (kind == "unfrozen")
    for name, weights in whole["weights"].items():
        torch.testing.assert_close(state[name], torch.tensor(weights), rtol=TOLERANCE, atol=TOLERANCE)


def test_training_moves_the_weights(runs, bert):
    _, (whole,) = runs(WHOLE, "frozen")
    torch.manual_seed(0)
    model = CapsuleHeadForSequenceClassification.from_backbone(bert, d_inp=8, n_parts=4)
    moved = [(x - torch.tensor(whole["weights"][name])).abs().max() for name, x in model.head.named_parameters("head")]
    assert max(moved) > 100 * TOLERANCE


@pytest.mark.parametrize("split", ["2 x 8 x 1", "4 x 4 x 1"])
def test_the_processes_share_each_epoch(runs, tokens_folder, split):
    texts = sorted(load_from_disk(tokens_folder)["input_ids"])
    _, found = runs(split, "frozen")
    n = len(found[0]["batches"]) // 2
    for epoch in (slice(0, n), slice(n, 2 * n)):  # each epoch is all texts, once: the processes agree on the order
        seen = [[i for i in ids if i] for run in found for batch in run["batches"][epoch] for ids in batch]
        assert sorted(seen) == texts
    assert found[0]["batches"][:n] != found[0]["batches"][n:]


def test_what_is_frozen_is_not_sent(runs):
    for kind in KINDS:
        _, found = runs("2 x 8 x 1", kind)
        n_trained = sum(torch.tensor(x).numel() for x in found[0]["weights"].values())
        assert found[0]["shared"]["gradient_bytes"] == 4 * n_trained
        assert (found[0]["shared"]["n_buffers"] == 0) == (kind == "frozen")


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_counts_each_example_once(runs, split):
    _, (whole,) = runs(WHOLE, "frozen")
    for run in runs(split, "frozen")[1]:
        assert run["evaluated"]["eval_n"] == 13
        assert run["evaluated"]["eval_labels"] == whole["evaluated"]["eval_labels"]
        assert len(run["logits"]) == 80


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_is_saved_whole(runs, tokens_folder, tokenizer, kind):
    folder, found = runs("2 x 8 x 1 sharded", kind)
    assert found[0]["kinds"] == ["DTensor"]
    model = CapsuleHeadForSequenceClassification.from_pretrained(folder)
    assert model.config.head_only == (kind == "frozen")
    batch = CapsuleCollator(tokenizer)([load_from_disk(tokens_folder).remove_columns("length")[i] for i in range(80)])
    with torch.no_grad():
        logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.tensor(found[0]["logits"]), rtol=1e-5, atol=1e-6)
