import contextlib
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, List, Value
from safetensors.torch import load_file
from tiny_texts import WORDS, assert_same_states, make_tokenizer, texts
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from capsule_heads import CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.data import computing_states, encodings, hidden_states, shards, state_keys
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache
from capsule_heads.data.tokenization import window_fields
from capsule_heads.paper.image_processing_stereo import StereoImageProcessor

SHARD = "shard-00000.safetensors"

pytestmark = pytest.mark.usefixtures("folder")


def test_a_stream_is_refused():
    with pytest.raises(TypeError, match=r"dataset is an IterableDataset, .*; .* without streaming=T"):
        HiddenStateCache(texts().to_iterable_dataset(), None, make_tokenizer())
    with pytest.raises(TypeError, match="dataset is a DatasetDict; expected a Dataset of the package datasets"):
        HiddenStateCache(DatasetDict(train=texts()), None, make_tokenizer())


def folders_in(folder):
    return sorted(folder.iterdir()) if folder.exists() else []


def test_what_is_stored(make_model, folder):
    train = texts()
    cached = HiddenStateCache(train, make_model(), make_tokenizer())
    assert cached.column_names == ["hidden_states", "length", "labels"]
    assert len(cached) == 20
    assert cached["length"] == train["length"][:]
    assert cached["labels"] == train["labels"][:]
    for row, length, label in zip(cached, train["length"], train["labels"], strict=True):
        assert row.keys() == set(cached.column_names)
        assert row["hidden_states"].shape == (length, 3, 16)
        assert row["hidden_states"].dtype == np.float16
        assert (row["length"], row["labels"]) == (length, label)
    assert folders_in(folder) == [Path(cached.folder)]
    assert [path.name for path in sorted(Path(cached.folder).iterdir())] == ["locks", "manifest.json", SHARD]
    assert cached.n_bytes == sum(train["length"]) * 3 * 16 * 2
    assert cached.n_bytes < (Path(cached.folder) / SHARD).stat().st_size < cached.n_bytes + 2000
    assert json.loads((Path(cached.folder) / "manifest.json").read_text())["about"]["backbone"].startswith("/")
    with pytest.raises(KeyError, match="No column 'input_ids' in memory; there are length, labels"):
        cached["input_ids"]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", [None, [0, -1]])
def test_batches_of_cached_states_are_those_of_the_texts(make_model, name, side, layers):
    model, tokenizer = make_model(name, layers=layers), make_tokenizer(side)
    # Lengths 1 to 11, each once: the longest is in a batch with shorter ones, and rows are found again.
    train = texts(11)
    assert sorted(train["length"]) == list(range(1, 12))
    cached = HiddenStateCache(train, model, tokenizer, batch_tokens=30)
    collator = CapsuleCollator(tokenizer)
    batch = collator([cached[i] for i in range(11)])
    assert set(batch) == {"hidden_states", "attention_mask", "labels"}
    assert batch["hidden_states"].shape == (11, 11, len(model.config.layers), 16)
    assert batch["attention_mask"].sum(1).tolist() == train["length"][:]
    assert batch["labels"].tolist() == train["labels"][:]
    assert batch["labels"].dtype == batch["attention_mask"].dtype == torch.long

    columns = ["input_ids", "attention_mask", "labels"]
    features = [{name: row[name] for name in columns} for row in train]
    tokens = collator(features)
    assert torch.equal(tokens["input_ids"], DataCollatorWithPadding(tokenizer)(features)["input_ids"])
    with torch.no_grad():
        for k, feature in enumerate(features):  # against the backbone itself, one text at a time, without padding
            states = model.backbone(torch.tensor([feature["input_ids"]]), output_hidden_states=True).hidden_states
            states = torch.stack(states, dim=2)[0, :, model.config.layers].half()
            torch.testing.assert_close(batch["hidden_states"][k, : len(states)], states, rtol=2e-3, atol=2e-3)
            assert not batch["hidden_states"][k, len(states) :].any()
        from_cache, from_texts = model(**batch), model(**tokens)
    assert from_texts.logits.std() > 0.01
    # The states are rounded to half precision, 5e-4 of each.
    torch.testing.assert_close(from_cache.logits, from_texts.logits, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(from_cache.loss, from_texts.loss, rtol=5e-3, atol=5e-3)


def test_a_second_call_reads_the_file(make_model, folder, count):
    first = HiddenStateCache(texts(), make_model(), make_tokenizer())
    written = (Path(first.folder) / SHARD).stat().st_mtime_ns
    model = make_model(seed=0)
    batches = count(model)
    second = HiddenStateCache(texts(), model, make_tokenizer())
    assert batches == []
    assert folders_in(folder) == [Path(first.folder)]
    assert (Path(second.folder) / SHARD).stat().st_mtime_ns == written
    assert_same_states(second, first)


@pytest.mark.parametrize(
    "model, data",
    [
        ({"seed": 1}, {}),
        ({"changes": {"num_attention_heads": 1}.items()}, {}),  # the same weights at another computation
        ({"dtype": torch.bfloat16}, {}),
        ({"layers": [0, 1]}, {}),
        ({}, {"first": 1}),
        ({}, {"n": 19}),
    ],
    ids=["weights", "configuration", "dtype", "layers", "texts", "number of texts"],
)
def test_what_else_does_not_hit_the_file(make_model, folder, model, data):
    HiddenStateCache(texts(), make_model(), make_tokenizer())
    cached = HiddenStateCache(texts(**data), make_model(**model), make_tokenizer())
    assert len(folders_in(folder)) == 2
    assert cached["length"] == texts(**data)["length"][:]


def test_head_labels_and_order_have_no_part_in_it(make_model, folder):
    expected = HiddenStateCache(texts(), make_model(), make_tokenizer())
    for fields in {"d_inp": 4}, {"mixup_alpha": 0.0, "n_iters": 1}:
        HiddenStateCache(texts(), make_model(**fields), make_tokenizer())
    other = HiddenStateCache(texts(label=lambda i: 1 - i % 2), make_model(), make_tokenizer())
    assert other["labels"] == [1 - label for label in expected["labels"]]
    order = np.random.default_rng(0).permutation(20)
    shuffled = HiddenStateCache(texts().select(order), make_model(), make_tokenizer())
    assert shuffled["labels"] == [expected["labels"][i] for i in order]
    assert_same_states(shuffled, [expected[int(i)] for i in order])
    assert folders_in(folder) == [Path(expected.folder)]


def test_texts_with_the_same_tokens_are_computed_and_stored_once(make_model, count):
    train = texts(11)
    order = [3, 0, 3, 10, 0, 3, *range(11)]
    repeated = train.select(order)
    repeated = repeated.remove_columns("labels").add_column("labels", list(range(17)))
    model = make_model()
    batches = count(model)
    cached = HiddenStateCache(repeated, model, make_tokenizer())
    assert sum(n for n, _ in batches) == cached.n_unique == 11
    assert cached.n_bytes == HiddenStateCache.estimate(train, model, make_tokenizer()) == 66 * 3 * 16 * 2
    assert cached["labels"] == list(range(17))
    expected = HiddenStateCache(train, make_model(), make_tokenizer())
    assert_same_states(cached, [expected[i] for i in order])
    assert expected.folder == cached.folder


def test_the_same_tokens_in_other_inputs_are_another_text(make_model):
    train = texts(2).select([1, 1]).add_column("token_type_ids", [[0] * 8, [0] * 4 + [1] * 4])
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    cached = HiddenStateCache(train, make_model(), tokenizer)
    assert cached.n_unique == 2
    assert not np.array_equal(cached[0]["hidden_states"], cached[1]["hidden_states"])


def test_batches_are_of_like_length_and_limited_in_tokens(make_model, count):
    model = make_model()
    batches = count(model)
    HiddenStateCache(texts(20), model, make_tokenizer(), batch_tokens=24)
    assert [length for _, length in batches] == sorted(length for _, length in batches)
    assert all(n * length <= 24 for n, length in batches)
    assert len(batches) < 12
    model = make_model(seed=1)
    batches = count(model)
    HiddenStateCache(texts(11), model, make_tokenizer(), batch_tokens=1)  # one text at least
    assert batches == [(1, length) for length in range(1, 12)]


def test_states_are_computed_without_a_graph_or_the_head(make_model):
    model = make_model()
    model.head.forward = None  # it would fail if it was called
    modes = []
    hook = model.backbone.register_forward_pre_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), model.backbone.training))
    )
    HiddenStateCache(texts(), model.train(), make_tokenizer())
    hook.remove()
    assert set(modes) == {(True, False, False)}


PROGRAM = """
import os, signal, sys
import datasets
from transformers import AutoTokenizer
from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.data import HiddenStateCache, state_folder

state_folder.SHARD_BYTES = 24 * 3 * 16 * 2
backbone, data, cache_dir, kill_at = sys.argv[1:]
model = CapsuleHeadForSequenceClassification.from_backbone(backbone, d_inp=8, n_parts=4)
compute, calls = model.compute_hidden_states, []

def counted(**inputs):
    calls.append(len(inputs["input_ids"]))
    if len(calls) == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(**inputs)

model.compute_hidden_states = counted
tokenizer = AutoTokenizer.from_pretrained(backbone)
if kill_at == "0":
    input()  # all begin at once
cached = HiddenStateCache(datasets.load_from_disk(data), model, tokenizer, cache_dir, batch_tokens=24)
print(len(cached), sum(calls), float(sum((row["hidden_states"].astype("float64") ** 2).sum() for row in cached)))
"""


@pytest.fixture
def program(saved, tmp_path):
    """program(kill_at, **options): a process that caches `texts()`, and dies at the batch `kill_at`."""
    backbone = saved("bert")
    make_tokenizer().save_pretrained(backbone)
    texts().save_to_disk(tmp_path / "data")

    def start(kill_at=0, **options):
        command = [sys.executable, "-c", PROGRAM, backbone, tmp_path / "data", tmp_path / "shared", kill_at]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(program, make_model, count, tmp_path, caplog, small_shards):
    process = program(kill_at=4)
    _, err = process.communicate(timeout=180)
    assert process.returncode == -signal.SIGKILL, err
    (folder,) = folders_in(tmp_path / "shared")
    done = sorted(path.name for path in folder.glob("shard-*"))
    assert 0 < len(done) < 8

    whole = make_model()
    batches = count(whole)
    expected = HiddenStateCache(texts(), whole, make_tokenizer(), batch_tokens=24)
    rest = make_model()
    batches_of_rest = count(rest)
    lost = folder / f"shard-{len(done):05d}.safetensors.part"
    lost.write_bytes(b"half a shard")  # as if it had died while it wrote
    caplog.clear()
    cached = HiddenStateCache(texts(), rest, make_tokenizer(), tmp_path / "shared", batch_tokens=24)
    assert batches_of_rest == batches[-len(batches_of_rest) :] and len(batches_of_rest) >= len(batches) - 3
    n_done = sum(n for n, _ in batches) - sum(n for n, _ in batches_of_rest)
    assert f"hidden states of 20 texts ({n_done} are done)" in caplog.text
    assert_same_states(cached, expected)
    assert Path(cached.folder) == folder and not lost.exists()
    for path in folder.glob("shard-*"):  # the same bits, but for what the manifests say for people
        assert path.read_bytes()[1000:] == (Path(expected.folder) / path.name).read_bytes()[1000:]


@pytest.mark.slow
def test_processes_that_begin_at_once_share_the_shards(program, make_model, tmp_path):
    processes = [program(), program()]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    results = [out.split() for out, _ in outputs]
    assert [n for n, _, _ in results] == ["20", "20"]
    assert sum(int(computed) for _, computed, _ in results) == 20
    assert len({total for _, _, total in results}) == 1
    expected = HiddenStateCache(texts(), make_model(), make_tokenizer())
    total = sum((row["hidden_states"].astype("float64") ** 2).sum() for row in expected)  # not about 0, as the sum is
    assert float(results[0][2]) == pytest.approx(total, rel=1e-3)


def test_others_wait_for_the_process_that_computes(make_model, caplog):
    """In one process and two threads: the second finds the lock taken, says so, and then the finished file."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    computing, waiting = Event(), Event()
    first, second = make_model(), make_model()
    compute = first.compute_hidden_states

    def slow(**inputs):
        computing.set()
        assert waiting.wait(30)
        return compute(**inputs)

    class Listener(logging.Handler):
        def emit(self, record):
            if "waiting for it" in record.getMessage():
                waiting.set()

    listener = Listener()
    logging.getLogger("capsule_heads").addHandler(listener)
    first.compute_hidden_states = slow
    second.compute_hidden_states = None  # it would fail if it was called
    try:
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(HiddenStateCache, texts(), first, make_tokenizer())
            assert computing.wait(30)
            other = pool.submit(HiddenStateCache, texts(), second, make_tokenizer())
            assert_same_states(other.result(60), one.result(60))
    finally:
        logging.getLogger("capsule_heads").removeHandler(listener)


@pytest.mark.parametrize("change, what", [(-2, "cut short"), (2, "written to by something else")])
def test_a_file_of_another_size_is_refused(make_model, change, what):
    cached = HiddenStateCache(texts(), make_model(), make_tokenizer())
    file = Path(cached.folder) / SHARD
    size = file.stat().st_size
    os.truncate(file, size + change)
    expected = (
        rf"{SHARD} has {size + change:,} bytes, expected {size:,}: it was {what}\. "
        rf"Delete the file {file} to have its states computed again"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=expected):
            HiddenStateCache(texts(), make_model(), make_tokenizer())
    assert file.stat().st_size == size + change  # nothing is deleted behind the user's back


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "content, expected",
    [
        (
            {"key": {"layers": [0, 1]}},
            r"of something else: layers is \[0, 1\] in its manifest.json, expected \[0, 1, 2\]\. Delete the folder",
        ),
        (
            {"key": {"backbone_weights": "00"}},
            "of something else: backbone_weights is '00' in its manifest.json, expected '[0-9a-f]{64}'",
        ),
        ({"key": {"more": 1}}, "more is 1 in its manifest.json, expected None"),
        (
            {"format": 0},
            "has format 0 and encoding float16, expected 3 and one of float16, bfloat16, int8: it is damag",
        ),
        ({"shards": [20]}, r"shards is \[20\] in its manifest.json, expected \[\d"),
        ({"layers": "3"}, "manifest.json has layers '3'. Delete the folder"),
        ("{", r"manifest.json is not JSON.*Delete the folder"),
        ("[]", "manifest.json: expected keys and values, found list. Delete the folder"),
        (None, r"has states without a manifest\.json\. Delete the folder .* to have its states computed again"),
    ],
)
def test_a_foreign_folder_is_refused(make_model, finished, content, expected, small_shards):
    cached = HiddenStateCache(texts(), make_model(), make_tokenizer())
    manifest = Path(cached.folder) / "manifest.json"
    if content is None:
        manifest.unlink()
    elif isinstance(content, dict):
        before = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(before | content | {"key": before["key"] | content.get("key", {})}))
    else:
        manifest.write_text(content)
    if not finished:
        (Path(cached.folder) / SHARD).unlink()
    with pytest.raises(ValueError, match=expected):
        HiddenStateCache(texts(), make_model(), make_tokenizer())


def test_what_is_only_for_people_is_not_compared(make_model):
    cached = HiddenStateCache(texts(), make_model(), make_tokenizer())
    model = make_model()
    model.config.base_model_name_or_path = "elsewhere"
    assert_same_states(HiddenStateCache(texts(), model, make_tokenizer()), cached)


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_a_flipped_bit_is_the_fault_of_the_cache(make_model, folder, name, finished, encoding, small_shards):
    """Wherever it is, and whichever way it is read: by rows, for a device, or to resume a computation."""

    def read(kept=False):
        cached = HiddenStateCache(texts(), make_model(), make_tokenizer(), states_dtype=encoding)
        return [np.asarray(row["hidden_states"]).copy() for row in (cached.to("cpu") if kept else cached)]

    expected = read()
    (cache,) = folders_in(folder)
    if not finished:
        max(cache.glob("shard-*")).unlink()
    whole = (cache / name).read_bytes()
    rng = np.random.default_rng(0)
    for position in (0, 8, len(whole) - 1, *rng.integers(len(whole), size=12)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        (cache / name).write_bytes(damaged)
        for kept in (False, True):
            with pytest.raises(
                ValueError, match=rf"Delete the (folder {cache}|file {cache / name}) to have its states"
            ):
                read(kept)
    (cache / name).write_bytes(whole)
    assert all(map(np.array_equal, read(), expected))


def test_a_damaged_shard_is_named_and_computed_again_alone(make_model, folder, count, small_shards):
    expected = HiddenStateCache(texts(), make_model(), make_tokenizer())
    files = sorted(Path(expected.folder).glob("shard-*"))
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(ValueError, match=rf"Delete the file {files[2]} to have its states computed again"):
        [row["hidden_states"].copy() for row in HiddenStateCache(texts(), make_model(), make_tokenizer())]
    files[2].unlink()
    model = make_model()
    batches = count(model)
    HiddenStateCache(texts(), model, make_tokenizer())
    assert 0 < sum(n for n, _ in batches) < 8
    assert files[2].read_bytes() == whole


def test_a_disk_that_fills_up_is_named_and_the_computation_resumes(make_model, folder, tmp_path):
    needed = HiddenStateCache.estimate(texts(), make_model(), make_tokenizer())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (needed // 2 + 1, hard))  # where a write ends that was to go on
    try:
        with pytest.raises(
            OSError, match=r"states could not be written \(File too large\): all take .* are free; .*hidden_states_"
        ):
            HiddenStateCache(texts(), make_model(), make_tokenizer(), batch_tokens=24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (cache,) = folders_in(folder)
    assert not list(cache.glob("*.safetensors"))
    cached = HiddenStateCache(texts(), make_model(), make_tokenizer(), batch_tokens=24)
    elsewhere = HiddenStateCache(texts(), make_model(), make_tokenizer(), tmp_path / "elsewhere", batch_tokens=24)
    assert_same_states(cached, elsewhere)
    assert not list(cache.glob("*.part"))


def test_it_says_beforehand_what_it_takes_and_refuses_where_there_is_not_enough(
    make_model, folder, monkeypatch, caplog, count, small_shards
):
    model, train = make_model(), texts()
    needed = sum(train["length"]) * 3 * 16 * 2
    assert HiddenStateCache.estimate(train, model, make_tokenizer()) == needed
    assert not folder.exists()

    def disk(free):
        usage = namedtuple("usage", "total used free")(10**12, 0, free)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)

    disk(needed - 1)
    batches = count(model)
    megabytes = f"{needed / 1e6:.1f} MB"
    expected = (
        rf"hidden states of 20 texts take {megabytes} more on disk, and there are {megabytes} free; free some, give"
    )
    with pytest.raises(OSError, match=expected):
        HiddenStateCache(train, model, make_tokenizer())
    assert batches == []
    assert not [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"]

    disk(needed)
    caplog.clear()
    cached = HiddenStateCache(train, model, make_tokenizer())
    assert f"they take {megabytes} more of the {megabytes} of disk that are free, in {cached.folder}" in caplog.text
    # What is done needs no more.
    (Path(cached.folder) / SHARD).unlink()
    disk(24 * 3 * 16 * 2)
    assert_same_states(HiddenStateCache(train, model, make_tokenizer()), cached)


def test_a_worker_maps_the_file_itself(make_model):
    cached = HiddenStateCache(texts(), make_model(), make_tokenizer())
    expected = [row["hidden_states"].copy() for row in cached]
    blob = pickle.dumps(cached)
    assert len(blob) < cached.n_bytes  # not with the states
    assert_same_states(pickle.loads(blob), cached)
    loader = DataLoader(cached, batch_size=5, num_workers=2, collate_fn=CapsuleCollator(make_tokenizer()))
    for k, batch in enumerate(loader):
        for x, states in zip(batch["hidden_states"], expected[5 * k : 5 * k + 5], strict=True):
            assert np.array_equal(x[: len(states)], states)


def test_without_labels_and_without_texts(make_model):
    cached = HiddenStateCache(texts().remove_columns("labels"), make_model(), make_tokenizer())
    assert cached.column_names == ["hidden_states", "length"]
    assert set(CapsuleCollator(make_tokenizer())([cached[0], cached[1]])) == {"hidden_states", "attention_mask"}
    assert len(HiddenStateCache(texts().select([]), make_model(), make_tokenizer())) == 0


def test_texts_that_were_padded_are_stored_without_padding(make_model):
    train = texts(6)
    padded = make_tokenizer().pad(train[:], padding="max_length", max_length=16)
    padded = Dataset.from_dict({name: padded[name] for name in ("input_ids", "attention_mask", "labels")})
    cached = HiddenStateCache(padded, make_model(), make_tokenizer())
    assert cached["length"] == train["length"][:]
    for row, expected in zip(cached, HiddenStateCache(train, make_model(), make_tokenizer()), strict=True):
        np.testing.assert_allclose(row["hidden_states"], expected["hidden_states"], atol=2e-3)


def test_what_is_refused(make_model, folder):
    with pytest.raises(ValueError, match="The backbone is not frozen: its hidden states change in training"):
        HiddenStateCache(texts(), make_model(freeze_backbone=False), make_tokenizer())
    with pytest.raises(
        ValueError, match="The dataset has the columns labels; expected a tokenized one, with input_ids"
    ):
        HiddenStateCache(texts().select_columns("labels"), make_model(), make_tokenizer())
    with pytest.raises(
        ValueError, match="StereoImageProcessor is not a tokenizer; the cache of hidden states is for texts"
    ):
        HiddenStateCache(texts(), make_model(), StereoImageProcessor())
    model = make_model()
    model.config.hidden_sizes = [16, 8, 16]
    with pytest.raises(ValueError, match=r"have the hidden sizes \[16, 8, 16\]; the cache expects the same for all"):
        HiddenStateCache(texts(), model, make_tokenizer())
    model = make_model()
    model.backbone = None
    with pytest.raises(ValueError, match="no backbone to compute hidden states with; load it with load_backbone=True"):
        HiddenStateCache(texts(), model, make_tokenizer())
    assert not folder.exists()


def test_a_backbone_with_other_tokens_by_layer_is_refused(make_model, monkeypatch):
    model = make_model()
    compute = model.compute_hidden_states

    def pooled(**inputs):
        states, masks = compute(**inputs)
        return states, [*masks[:2], masks[2].roll(1, 0) * 0]

    monkeypatch.setattr(model, "compute_hidden_states", pooled)
    with pytest.raises(ValueError, match=r"hidden states of 15, 15, 0 tokens, by layer, of 15 tokens"):
        HiddenStateCache(texts(11), model, make_tokenizer(), batch_tokens=28)


def test_states_beyond_half_precision_are_refused_and_leave_nothing(make_model, folder):
    model = make_model("gpt2")
    with torch.no_grad():
        model.backbone.wte.weight[WORDS.index("w19") + 1] = 1e5  # a word of the last batches
    for _ in range(2):
        with pytest.raises(ValueError, match=r"exceed half precision \(65,504\); keep them as bfloat16 \(states_dtype"):
            HiddenStateCache(texts(), model, make_tokenizer(), batch_tokens=10)
        assert not list(folder.rglob("shard*"))
    kept = HiddenStateCache(texts(), model, make_tokenizer(), states_dtype="bfloat16")
    assert max(np.abs(row["hidden_states"]).max() for row in kept) > 65_504


@pytest.mark.parametrize(
    "feature, label, fields",
    [
        (Value("float32"), lambda i: i / 4, {"num_labels": 1}),
        (
            List(Value("float32")),
            lambda i: [1.0, i % 2],
            {"problem_type": "multi_label_classification", "num_labels": 2},
        ),
    ],
    ids=["regression", "multi-label"],
)
def test_other_labels(make_model, feature, label, fields):
    train = texts(feature=feature, label=label)
    model, tokenizer = make_model(**fields), make_tokenizer()
    cached = HiddenStateCache(train, model, tokenizer)
    batch = CapsuleCollator(tokenizer)([cached[i] for i in range(20)])
    assert torch.equal(batch["labels"], torch.tensor(train["labels"][:], dtype=torch.float32))
    assert model(**batch).loss.isfinite()


def test_long_texts_are_computed_in_windows(make_model, folder):
    train, tokenizer = texts(), make_tokenizer()
    windows = window_fields(tokenizer, overlap=2, length=5)
    model = make_model(**windows)
    cached = HiddenStateCache(train, model, tokenizer, batch_tokens=30)
    assert [len(row["hidden_states"]) for row in cached] == train["length"][:]
    rows = [i for i, length in enumerate(train["length"]) if length in (11, 8, 2)][:3]
    batch = CapsuleCollator(tokenizer)([cached[i] for i in rows])
    ids = CapsuleCollator(tokenizer)([{"input_ids": train[i]["input_ids"]} for i in rows])
    states, (mask, *_) = model.compute_hidden_states(**ids)
    assert torch.equal(batch["attention_mask"], mask.long())
    torch.testing.assert_close(batch["hidden_states"].float(), torch.stack(states, dim=2), rtol=1e-2, atol=1e-2)
    # Other windows are another cache; none is what it was without the option.
    HiddenStateCache(train, make_model(**{**windows, "window_overlap": 1}), tokenizer)
    assert len(folders_in(folder)) == 2
    HiddenStateCache(train, make_model(), tokenizer)
    assert len(folders_in(folder)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_cached_states_is_training_on_the_texts(make_model, tmp_path, workers):
    tokenizer, train = make_tokenizer(), texts()

    def losses(cached):
        model = make_model(mixup_alpha=0.0)
        arguments = CapsuleTrainingArguments(
            str(tmp_path / "run"),
            recipe="paper",
            use_cpu=True,
            num_train_epochs=2,
            per_device_train_batch_size=5,
            learning_rate=2e-2,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=workers * cached,
        )
        trainer = CapsuleTrainer(
            model,
            arguments,
            train_dataset=HiddenStateCache(train, model, tokenizer) if cached else train,
            processing_class=tokenizer,
            data_collator=CapsuleCollator(tokenizer),
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    from_texts = losses(False)
    assert len(from_texts) == 8
    assert max(from_texts) > 1.02 * min(from_texts)
    # The batches are the same, in the same order; the states are rounded to half precision.
    np.testing.assert_allclose(losses(True), from_texts, rtol=5e-3)


# How states are kept


@pytest.mark.parametrize("encoding, tolerance", [("float16", 6e-4), ("bfloat16", 5e-3), ("int8", 1e-2)])
def test_encodings(make_model, encoding, tolerance, small_shards):
    train, model = texts(), make_model()
    cached = HiddenStateCache(train, model, make_tokenizer(), states_dtype=encoding)
    assert cached.n_bytes == HiddenStateCache.estimate(train, model, make_tokenizer(), encoding)
    tokens = sum(train["length"])
    assert cached.n_bytes == tokens * 3 * {"float16": 32, "bfloat16": 32, "int8": 16 + 4}[encoding]
    for row, cached_row in zip(train, cached, strict=True):
        states = model.backbone(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        states = torch.stack(states, dim=2)[0].detach()
        found = torch.tensor(cached_row["hidden_states"]).float()
        largest = states.abs().amax(-1, keepdim=True)  # of a token at a layer
        assert ((found - states).abs() <= tolerance * largest + 2e-3).all()
        assert not torch.equal(found, states)
    batch = CapsuleCollator(make_tokenizer())([cached[0], cached[1]])
    assert batch["hidden_states"].dtype == (torch.float16 if encoding == "float16" else torch.float32)
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="states_dtype is 'float8'; expected one of float16, bfloat16, int8"):
        HiddenStateCache(train, model, make_tokenizer(), states_dtype="float8")


@pytest.mark.parametrize("encoding", encodings.ENCODINGS)
def test_the_library_reads_the_shards(make_model, encoding, small_shards):
    cached = HiddenStateCache(texts(), make_model(), make_tokenizer(), states_dtype=encoding)
    rows = {row["hidden_states"].tobytes() for row in cached}
    found = []
    for path in sorted(Path(cached.folder).glob("shard-*")):
        tensors = load_file(path)
        states = tensors["states"].float()
        if encoding == "int8":
            states = states * tensors["scales"][..., None]
        states = states.half() if encoding == "float16" else states
        found += [x.numpy().tobytes() for x in states.split(tensors["lengths"].tolist())]
    assert set(found) == rows


# Parts of a folder, and several folders


@pytest.mark.parametrize("n_processes", [2, 4])
def test_parts_have_the_same_bits_as_one_process(make_model, tmp_path, n_processes, small_shards):
    expected = HiddenStateCache(texts(), make_model(), make_tokenizer(), tmp_path / "one")
    model, tokenizer = make_model(), make_tokenizer()
    found, folder = state_keys.find_folder(texts(), model, tokenizer, tmp_path / "parts", "float16")
    rows = found.select(texts(), tokenizer)
    source = computing_states.BackboneStates(model, CapsuleCollator(tokenizer))
    written = []
    folder.begin()
    for number in reversed(range(n_processes)):  # in another order than the shards
        own = [shard for shard in range(folder.n_shards) if shard % n_processes == number]
        with contextlib.ExitStack() as others:  # that other processes hold
            for shard in set(range(folder.n_shards)) - set(own):
                others.enter_context(folder.claim(shard, wait=False))
            computing_states.compute(folder, rows, source, 2048, (number, n_processes), wait=False)
        written.append(folder.missing())
    assert [len(missing) for missing in written] == sorted([len(missing) for missing in written], reverse=True)
    assert folder.is_complete()
    for path in Path(expected.folder).glob("shard-*"):
        assert path.read_bytes() == (folder.store.path / path.name).read_bytes()


def test_a_dead_process_is_taken_over(make_model, tmp_path, small_shards):
    model, tokenizer = make_model(), make_tokenizer()
    found, folder = state_keys.find_folder(texts(), model, tokenizer, tmp_path, "float16")
    rows = found.select(texts(), tokenizer)
    source = computing_states.BackboneStates(model, CapsuleCollator(tokenizer))
    computing_states.compute(folder, rows, source, 2048, (3, 4), wait=False)  # nobody else is there
    assert folder.is_complete()


def test_states_from_other_folders(make_model, tmp_path, count, small_shards):
    train, tokenizer = texts(20), make_tokenizer()
    first = HiddenStateCache(train.select(range(8)), make_model(), tokenizer, tmp_path)
    second = HiddenStateCache(train.select(range(5, 20)), make_model(), tokenizer, tmp_path)
    model = make_model(n_parts=6)
    batches = count(model)
    wanted = train.select([19, 0, 7, 0, 3])
    sources = [first.folder, second.folder]
    cached = HiddenStateCache(wanted, model, tokenizer, sources=sources)
    assert batches == [] and cached.folder is None and cached["labels"] == wanted["labels"][:]
    assert_same_states(cached, [second[14], first[0], second[2], first[0], first[3]])
    kept = HiddenStateCache(wanted, model, tokenizer, sources=sources).to("cpu")
    for row, expected in zip(kept, cached, strict=True):
        assert np.array_equal(row["hidden_states"].numpy(), expected["hidden_states"])
    assert_same_states(pickle.loads(pickle.dumps(cached)), cached)

    with pytest.raises(ValueError, match=rf"1 of 4 texts have no hidden states in {second.folder}; expected all"):
        HiddenStateCache(train.select([3, 6, 7, 8]), model, tokenizer, sources=[second.folder])
    with pytest.raises(
        ValueError, match=r"of something else: layers is \[0, 1, 2\], expected \[0, 1\]; give folders of"
    ):
        HiddenStateCache(wanted, make_model(layers=[0, 1]), tokenizer, sources=sources)
    with pytest.raises(ValueError, match="keeps hidden states as float16, expected int8: change states_dtype"):
        HiddenStateCache(wanted, model, tokenizer, sources=sources, states_dtype="int8")
    rounded = HiddenStateCache(train.select([3]), model, tokenizer, tmp_path / "others", states_dtype="int8")
    with pytest.raises(ValueError, match=f"keeps hidden states as int8, expected float16, as in {first.folder}"):
        HiddenStateCache(wanted, model, tokenizer, sources=[*sources, rounded.folder])
    with pytest.raises(ValueError, match=r"others has no hidden states as bfloat16; change states_dtype, or leave it"):
        HiddenStateCache(wanted, model, tokenizer, sources=[tmp_path / "others"], states_dtype="bfloat16")

    # What is in a folder, but for what is of other layers.
    HiddenStateCache(train, make_model(layers=[0, 1]), tokenizer, tmp_path)
    (tmp_path / "hidden_states_not_begun").mkdir()
    assert_same_states(HiddenStateCache(wanted, model, tokenizer, sources=[tmp_path]), cached)
    with pytest.raises(ValueError, match=r"layers is .*; give folders of the same backbone and layers"):
        HiddenStateCache(wanted, make_model(layers=[0, 2]), tokenizer, sources=[tmp_path])
    max(Path(second.folder).glob("shard-*")).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its \d shards, shard-0000\d\.safetensors among them; expected a"):
        HiddenStateCache(wanted, model, tokenizer, sources=sources)
    with pytest.raises(ValueError, match=r"has no manifest\.json; expected a folder of hidden states"):
        HiddenStateCache(wanted, model, tokenizer, sources=[tmp_path / "nowhere"])


# Kept on a device


@pytest.mark.parametrize("encoding", encodings.ENCODINGS)
def test_batches_made_on_a_device_are_those_from_disk(make_model, monkeypatch, encoding, small_shards):
    monkeypatch.setattr(shards, "TOKENS_AT_ONCE", 7)  # several copies, the last one smaller
    train = texts(20).select([3, 0, 3, *range(20)])
    from_disk = HiddenStateCache(train, make_model(), make_tokenizer(), states_dtype=encoding)
    kept = HiddenStateCache(train, make_model(), make_tokenizer(), states_dtype=encoding)
    assert kept.to("cpu") is kept
    assert isinstance(kept[0]["hidden_states"], torch.Tensor) and kept.column_names == from_disk.column_names
    collator = CapsuleCollator(make_tokenizer())
    for rows in [0, 1, 2, 5], [7], range(23), [4, 4, 22]:
        expected = collator([from_disk[i] for i in rows])
        batch = collator([kept[i] for i in rows])
        assert batch.keys() == expected.keys()
        for name, x in expected.items():
            assert batch[name].dtype == x.dtype and torch.equal(batch[name], x), name
    (batch,) = DataLoader(kept, batch_size=23, collate_fn=collator, num_workers=1)
    assert torch.equal(batch["hidden_states"], collator([from_disk[i] for i in range(23)])["hidden_states"])


def test_training_on_a_kept_cache_is_that_on_the_file(make_model, tmp_path):
    weights = []
    for kept in False, True:
        cached = HiddenStateCache(texts(20), make_model(), make_tokenizer())
        if kept:
            cached.to("cpu")
        model = make_model(mixup_alpha=0.0)
        fields = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
        fields |= {"num_train_epochs": 2, "per_device_train_batch_size": 6}
        arguments = CapsuleTrainingArguments(str(tmp_path / "run"), **fields)
        collator = CapsuleCollator(make_tokenizer())
        CapsuleTrainer(model, arguments, train_dataset=cached, data_collator=collator).train()
        weights.append(torch.nn.utils.parameters_to_vector(model.head.parameters()))
    assert torch.equal(*weights)


def test_a_device_with_too_little_memory_is_refused(make_model, monkeypatch):
    cached = HiddenStateCache(texts(20), make_model(), make_tokenizer())
    monkeypatch.setattr(hidden_states, "_free_memory", lambda device: 5000)
    with pytest.raises(ValueError, match=r"The hidden states take 0\.0 MB, and cpu has 0\.0 MB of memory free; leave"):
        cached.to("cpu")
    assert isinstance(cached[0]["hidden_states"], np.ndarray)
    monkeypatch.setattr(hidden_states, "_free_memory", lambda device: cached.n_bytes)
    cached.to("cpu")


def test_worker_processes_cannot_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker")
    rows = [{"hidden_states": torch.zeros(3, 2, 4, dtype=torch.float16, device="meta")}]
    collator = CapsuleCollator(make_tokenizer())
    with pytest.raises(ValueError, match=r"hidden states are on meta, which worker.*set dataloader_num_workers to 0"):
        collator(rows)


def test_a_data_loader_pins_what_is_on_the_host(monkeypatch):
    rows = [{"hidden_states": torch.zeros(3, 2, 4, dtype=torch.float16, device="meta"), "labels": 1}]
    batch = CapsuleCollator(make_tokenizer())(rows)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: f"pinned {self.device}")
    pinned = batch.pin_memory()
    assert pinned["hidden_states"] is batch["hidden_states"]
    assert pinned["attention_mask"] == pinned["labels"] == "pinned cpu"
