"""The Ray engine on this machine: the same bits as one process, though an actor is killed."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_texts import assert_same_states, make_tokenizer, texts

from capsule_heads.data import computing_states, state_keys
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache
from capsule_heads.engines import Actors, run_on_ray
from capsule_heads.engines.states import compute_on_ray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def make_killed(folder):
    """Returns what kills its process at the first piece 3, and makes other pieces their squares."""

    def work(piece):
        marker = Path(folder, "killed")
        if piece == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if piece == 7:
            raise ValueError("seven is too many")
        return piece**2

    return work


def test_pieces_come_in_order_though_an_actor_is_killed(tmp_path):
    def make():
        return make_killed(tmp_path)

    assert list(run_on_ray(make, range(6), Actors(2, 2))) == [0, 1, 4, 9, 16, 25]
    assert (tmp_path / "killed").exists()
    assert list(run_on_ray(make, [])) == []
    with pytest.raises(ValueError, match=r"^seven is too many$"):
        list(run_on_ray(make, [7]))


def test_what_cannot_be():
    with pytest.raises(ValueError, match="There are 3 to 2 actors; expected the larger number last"):
        Actors(3, 2)
    with pytest.raises(ValueError, match=r"An actor takes 0.5 GPUs, and the cluster has 0; expected as many or fewer"):
        list(run_on_ray(int, [1], Actors(gpus=0.5)))


@pytest.mark.parametrize("address", ["192.0.2.1:6379", "ray://192.0.2.1:10001"])  # kept for documentation: none answers
def test_an_address_where_nothing_answers(address, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("capsule_heads.engines.ray.SECONDS_TO_ANSWER", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=rf"^There is no Ray cluster at {address} \(RAY_ADDRESS\): "):
        list(run_on_ray(int, [1]))


def killing(collator, marker):
    """Returns a collator that kills its process, once, at its fourth batch."""

    class Killing:
        n_batches = 0

        def __call__(self, features):
            self.n_batches += 1
            if self.n_batches == 4 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return collator(features)

    return Killing()


def test_the_same_bits_as_one_process_though_an_actor_is_killed(make_model, small_shards, tmp_path):
    model, tokenizer, marker = make_model(), make_tokenizer(), tmp_path / "killed"
    expected = HiddenStateCache(texts(), model, tokenizer, tmp_path / "one")
    found, folder = state_keys.find_folder(texts(), model, tokenizer, tmp_path / "ray", "float16")
    rows = found.select(texts(), tokenizer)
    source = computing_states.BackboneStates(model, killing(CapsuleCollator(tokenizer), marker))
    compute_on_ray(folder, rows, source, 2048, Actors(2, 2))
    assert marker.exists() and folder.n_shards > 5 and folder.is_complete()
    files = list(Path(expected.folder).glob("*.*"))
    assert len(files) == folder.n_shards + 1
    for path in files:
        assert path.read_bytes() == (folder.store.path / path.name).read_bytes()
    assert_same_states(HiddenStateCache(texts(), model, tokenizer, tmp_path / "ray"), expected)


def test_states_that_cannot_be_kept(make_model, small_shards, tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    with torch.no_grad():
        model.backbone.encoder.layer[0].output.LayerNorm.bias.fill_(1e5)
    found, folder = state_keys.find_folder(texts(), model, tokenizer, tmp_path, "float16")
    source = computing_states.BackboneStates(model, CapsuleCollator(tokenizer))
    with pytest.raises(ValueError, match=r"exceed half precision \(65,504\); keep them as bfloat16"):
        compute_on_ray(folder, found.select(texts(), tokenizer), source, 2048, Actors())


def test_commands_of_the_command_line(call, backbone, tmp_path):
    rows = [
        {"text": f"the {('food', 'film')[n % 3 > 0]} was {('bad', 'good')[n % 2]}", "label": n % 2} for n in range(9)
    ]
    with open(tmp_path / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows([*rows, {"text": "", "label": 0}])
    given = ("--data", tmp_path / "data.csv", "--backbone", backbone, "--use_cpu")
    status, out, err = call("cache", *given, "--cache_dir", tmp_path / "states", "--engine", "ray", "--actors", 1)
    assert status == 0, err
    assert out.startswith("train: ") and str(tmp_path / "states") in out
    run = tmp_path / "run"
    status, _, err = call(
        "train", *given, "--max_steps", 3, "--n_parts", 4, "--output_dir", run, "--hidden_states", tmp_path / "states"
    )
    assert status == 0, err
    ways = {"here": (), "ray": ("--engine", "ray", "--actors", "1:2")}
    for name, options in ways.items():
        status, _, err = call(
            "predict", run, "--data", tmp_path / "data.csv", "--output", tmp_path / f"{name}.csv", *options
        )
        assert status == 0, err
        assert "No prediction for 1 of 10 rows" in err
    assert (tmp_path / "here.csv").read_text() == (tmp_path / "ray.csv").read_text()
    status, _, err = call(
        "predict", run, "--data", tmp_path / "data.csv", "--output", tmp_path / "x.csv", "--actors", 2
    )
    assert (status, err) == (2, "error: --actors is for --engine ray; leave it out, or name the engine.\n")
    status, _, err = call("cache", *given, "--engine", "ray", "--part", "1/2")
    assert status == 2 and "--part is for processes without a cluster, and --engine is ray; leave one out" in err
