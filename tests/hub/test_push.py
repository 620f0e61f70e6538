"""Pushing and pulling, each in a process of its own, through the unmodified client and a hub on loopback."""

import hashlib
import json
import subprocess
import sys

import pytest
import yaml
from hub_programs import COMMON, WITHOUT_PACKAGE
from hub_server import File
from huggingface_hub import ModelCard
from transformers import AutoModel, BertConfig

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.hub import push_run


def files(hub, name, revision="main"):
    return hub.repositories[name].files(revision)


def config_of(hub, name):
    return json.loads(files(hub, name)["config.json"].content)


def run_command(hub, home, *arguments):
    """What a command prints."""
    environment = hub.environment(home, hub.token)
    program = [sys.executable, "-m", "capsule_heads", *map(str, arguments)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


PULL = """
from transformers import AutoModelForSequenceClassification
from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification

expected = torch.load(sys.argv[1])
equal = {}
for name in ("head", "whole"):
    for cls in (CapsuleHeadForSequenceClassification, AutoModelForSequenceClassification):
        model = cls.from_pretrained(f"me/{name}")
        equal[f"{name} {cls.__name__}"] = torch.equal(logits(model), expected[name])
first = CapsuleHeadForSequenceClassification.from_pretrained("me/head", revision="v1")
equal["first"] = torch.equal(logits(first), expected["first"])
equal["the second differs"] = not torch.equal(expected["first"], expected["head"])
pictures = CapsuleHeadForImageClassification.from_pretrained("me/pictures")
equal["pictures"] = torch.equal(logits(pictures), expected["pictures"])
print(json.dumps({**equal, "revision": model.config.base_model_revision}))
"""


@pytest.mark.slow
def test_another_process_pulls_the_same_models(hub, client, pushed):
    equal = client(COMMON + PULL, pushed, token=None)
    revision = equal.pop("revision")
    assert all(equal.values()), equal
    backbone = hub.repositories["me/backbone"]
    assert revision in backbone.commits and revision != backbone.refs["main"]
    assert config_of(hub, "me/head")["base_model_revision"] == revision


@pytest.mark.slow
def test_a_push_is_one_commit_of_a_models_files(hub, pushed):
    head = files(hub, "me/head")
    own = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path for path in head if not path.endswith(".py")} == own
    assert len(hub.repositories["me/head"].commits) == 3  # the empty one that every repository begins with, and two
    weights = head["model.safetensors"]
    assert weights.is_large and hub.objects[hashlib.sha256(weights.content).hexdigest()] == weights.content
    assert len(files(hub, "me/whole")["model.safetensors"].content) > 4 * len(weights.content)
    assert not any(path.endswith(".py") for path in files(hub, "me/secret"))
    assert "auto_map" not in config_of(hub, "me/secret")


@pytest.mark.slow
def test_the_card_says_what_was_given(hub, pushed):
    data = ModelCard(files(hub, "me/head")["README.md"].content.decode()).data
    assert (data.base_model, data.license, data.pipeline_tag) == ("me/backbone", "mit", "text-classification")
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("nyu-mll/glue", "accuracy", 0.75)
    assert ModelCard(files(hub, "me/pictures")["README.md"].content.decode()).data.base_model is None


USE = """
import re
from huggingface_hub import hf_hub_download

card = open(hf_hub_download(sys.argv[1], "README.md")).read()
exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1], {"print": lambda answer: print(json.dumps(answer))})
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, program", [("me/secret", COMMON), ("me/head", WITHOUT_PACKAGE + COMMON)])
def test_the_code_in_the_card_runs(client, pushed, name, program):
    (answer,) = client(program + USE, name)
    assert answer["label"] in ("poor", "fine") and 0 < answer["score"] < 1


MISTAKES = """
import json
from capsule_heads import CapsuleHeadForSequenceClassification

def error(call, *arguments, **options):
    try:
        return str(call(*arguments, **options))
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

load = CapsuleHeadForSequenceClassification.from_pretrained
model = load("me/head")
errors = {name: error(load, name) for name in ("me/secret", "me/none", "me/backbone")}
errors["revision"] = error(load, "me/head", revision="v9")
errors["push"] = error(model.push_to_hub, "me/nobodys")
errors["name"] = error(model.push_to_hub, "not a name")
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_mistakes_of_a_user_who_has_not_logged_in(hub, client, pushed):
    errors = client(MISTAKES, token=None)
    for name in ("me/secret", "me/none"):
        assert errors[name].startswith(f"OSError: There is no directory {name} here, and the Hub has no such model")
        assert "a private one takes `hf auth login`" in errors[name]
    assert "ValueError: me/backbone is of a bert model, not of a capsule-head model" in errors["me/backbone"]
    assert "CapsuleHeadForSequenceClassification.from_backbone(name_or_path, num_labels=n)" in errors["me/backbone"]
    assert errors["revision"].startswith("OSError: me/head has no such revision; expected a branch, tag or commit")
    assert errors["push"].startswith("OSError: me/nobodys cannot be pushed to: it takes a token with write access")
    assert "me/nobodys" not in hub.repositories
    assert errors["name"].startswith("HFValidationError: ") and "not a name" in errors["name"]


PUSH_TWICE = """
import json
import torch
from huggingface_hub import HfApi
from capsule_heads import CapsuleHeadForSequenceClassification

model = CapsuleHeadForSequenceClassification.from_pretrained("me/head")
with torch.no_grad():
    model.head.routings[0].W.add_(1.0)
try:
    model.push_to_hub("me/broken")
except OSError as error:
    message = str(error)
sha = HfApi().model_info("me/broken").sha
print(json.dumps([message, sha, model.push_to_hub("me/broken").oid]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, n_tries", [("POST .*/commit/", 1), ("PUT /lfs/", 6)]
)  # the client itself tries uploads again
def test_an_upload_that_breaks_off(hub, client, pushed, place, n_tries):
    hub.breaks, hub.break_at = n_tries, place
    message, sha, oid = client(PUSH_TWICE)
    assert hub.breaks == 0
    assert message.startswith("Pushing to me/broken failed, and left it as it was: ")
    assert files(hub, "me/broken", sha) == {}
    assert "auto_map" not in config_of(hub, "me/broken")  # though me/head has code
    repository = hub.repositories.pop("me/broken")
    assert oid == repository.refs["main"] != sha
    hub.objects.pop(repository.files()["model.safetensors"].oid)


SAVE_AND_PUSH = """
from pathlib import Path
from capsule_heads import CapsuleHeadForSequenceClassification

model = CapsuleHeadForSequenceClassification.from_pretrained("me/head")
state_dict = {name: x + 1 for name, x in model.state_dict().items() if name.startswith("head.")}
folder = Path(sys.argv[1])
model.save_pretrained(folder, state_dict=dict(state_dict), push_to_hub=True, repo_id="me/saved", commit_message="Mine")
load = CapsuleHeadForSequenceClassification.from_pretrained
equal = [all(torch.equal(load(x).state_dict()[k], v) for k, v in state_dict.items()) for x in (folder, "me/saved")]
print(json.dumps([equal, sorted(os.listdir(folder))]))
"""


@pytest.mark.slow
def test_saving_with_push_to_hub(hub, client, pushed, tmp_path):
    equal, names = client(COMMON + SAVE_AND_PUSH, tmp_path / "model")
    assert equal == [True, True] and names == ["config.json", "model.safetensors"]
    assert files(hub, "me/saved").keys() >= {"config.json", "model.safetensors"}


TRAIN = """
import json, sys
from datasets import Dataset
from transformers import AutoTokenizer
from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.data import tokenize

model = CapsuleHeadForSequenceClassification.from_backbone("me/backbone", num_labels=2, d_inp=8, n_parts=6)
tokenizer = AutoTokenizer.from_pretrained("me/backbone")
from datasets import DatasetDict
data = Dataset.from_dict({"text": ["worth every minute", "the queue"] * 4, "label": [0, 1] * 4})
data = tokenize(DatasetDict(train=data), tokenizer)["train"]
arguments = CapsuleTrainingArguments(
    sys.argv[1], max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=1, report_to=[], use_cpu=True,
    recipe="paper",
    push_to_hub=True, hub_model_id="me/trained",
)
trainer = CapsuleTrainer(
    model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
)
trainer.train()
trainer.push_to_hub(license="mit")
accuracy = trainer.state.log_history[-2]["eval_accuracy"]
loaded = CapsuleHeadForSequenceClassification.from_pretrained("me/trained")
same = all((a == b).all() for a, b in zip(model.parameters(), loaded.parameters()))
print(json.dumps([bool(same), accuracy]))
"""


@pytest.mark.slow
def test_the_trainer_pushes(hub, client, pushed, tmp_path):
    same, accuracy = client(TRAIN, tmp_path / "run")
    assert same
    pushed_files = files(hub, "me/trained")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= pushed_files.keys()
    assert not any(path.startswith("checkpoint-") for path in pushed_files)
    assert config_of(hub, "me/trained")["head_only"]
    card = pushed_files["README.md"].content.decode()
    data = ModelCard(card).data
    assert (data.license, data.base_model, data.metrics) == ("mit", "me/backbone", ["accuracy"])
    assert data.eval_results is None  # on which data is not known
    assert f"| evaluation | accuracy | {accuracy:.4f} |" in card
    for row in ("| `max_steps` | 2 |", "| `optim` | radam |", "| `learning_rate` | 0.0005 |"):
        assert row in card
    assert "num_train_epochs" not in card and "- steps: 2\n" in card


@pytest.mark.slow
def test_a_run_has_its_results_on_the_card(hub, pushed, tmp_path):
    config = {"task": "reviews", "backbone": "me/backbone", "d_inp": 8, "n_parts": 4, "max_steps": 2, "use_cpu": True}
    config |= {"output_dir": str(tmp_path / "run"), "push_to_hub": True, "hub_model_id": "me/reviews"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run_command(hub, tmp_path / "home", "train", "--config", tmp_path / "run.yaml")
    card = files(hub, "me/reviews")["README.md"].content.decode()
    results = json.loads(files(hub, "me/reviews")["results.json"].content)
    assert f"| test | accuracy | {results['test_accuracy']:.4f} |" in card
    assert f"- trainable parameters: {results['trained_parameters']:,}\n" in card and "| `max_steps` | 2 |" in card
    assert {(r.dataset_type, r.dataset_split) for r in ModelCard(card).data.eval_results} == {
        ("reviews", "validation"),
        ("reviews", "test"),
    }


# What needs no hub: imports, and what is refused before anything is sent.


@pytest.mark.parametrize("module", ["backbones", "hub.push", "models.base"])
def test_a_module_can_be_the_first_that_is_imported(module):
    """Whoever comes first imports transformers' registry, which imports the configuration of our models."""
    subprocess.run([sys.executable, "-c", f"import capsule_heads.{module}"], check=True)


@pytest.fixture
def local_head(tmp_path):
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    AutoModel.from_config(config).save_pretrained(tmp_path / "backbone")
    return CapsuleHeadForSequenceClassification.from_backbone(tmp_path / "backbone", d_inp=8, n_parts=4)


def test_a_head_on_a_local_backbone_is_not_pushed(local_head, tmp_path, monkeypatch):
    message = f"The head refers to its backbone as {tmp_path}/backbone, a directory that nobody else has"
    with pytest.raises(ValueError, match=f"{message}; .* with --head_only false"):
        local_head.push_to_hub("me/x")
    local_head.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        push_run(tmp_path / "run", "me/x")
    arguments = CapsuleTrainingArguments(str(tmp_path / "run"), push_to_hub=True, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=message):  # not when all is trained
        CapsuleTrainer(local_head, arguments)
    monkeypatch.chdir(tmp_path)
    for name in ("backbone", "./elsewhere", "~/elsewhere"):  # as a user may have written into config.json
        local_head.config.base_model_name_or_path = name
        with pytest.raises(ValueError, match=f"refers to its backbone as {name}, a directory"):
            local_head.push_to_hub("me/x")


def test_pushing_what_is_no_run(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} holds no model: it has no config.json"):
        push_run(tmp_path, "me/x")
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of a bert model, not of a capsule-head model"):
        push_run(tmp_path, "me/x")


@pytest.mark.slow
def test_a_run_is_pushed_and_a_card_that_someone_wrote_is_kept(hub, local_head, tmp_path):
    def push(*options):
        return run_command(hub, tmp_path, "push", run, "me/run", *options).strip()

    run = tmp_path / "run"
    local_head.save_pretrained(run, head_only=False)
    results = {"task": "reviews", "seed": 3, "steps": 40, "trained_parameters": 123, "training_seconds": 5.5}
    (run / "results.json").write_text(json.dumps({**results, "test_accuracy": 0.625}))
    (run / "training_args.bin").write_bytes(b"a pickle")
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    address = push("--include_code", "--private", "--license", "mit")
    repository = hub.repositories["me/run"]
    assert address == f"{hub.url}/me/run/commit/{repository.refs['main']}"
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    pushed = repository.files()
    assert {path for path in pushed if not path.endswith(".py")} == {*before, "README.md"} - {"training_args.bin"}
    assert "auto_map" in config_of(hub, "me/run") and repository.is_private
    card = pushed["README.md"].content.decode()
    assert "| test | accuracy | 0.6250 |" in card and "- trainable parameters: 123\n" in card

    repository.files()["README.md"] = File(b"# Mine\n", is_large=False)
    push("--commit_message", "Again")
    assert repository.files()["README.md"].content == b"# Mine\n"
    assert "auto_map" not in config_of(hub, "me/run")


PUSH_SPACE = """
import json
from capsule_heads.cli import main
main(["demo", "me/head", "--push_space", "me/page"])
print(json.dumps("pushed"))
"""


@pytest.mark.slow
def test_the_page_is_pushed_as_a_space(hub, client):
    assert client(PUSH_SPACE) == "pushed"
    pushed = files(hub, "me/page")
    assert {path for path in pushed if not path.startswith(".")} == {"README.md", "app.py", "requirements.txt"}
    assert b"build_demo('me/head').launch(show_error=True)" in pushed["app.py"].content
    assert yaml.safe_load(pushed["README.md"].content.split(b"---")[1])["sdk"] == "gradio"
    assert "me/page cannot be pushed to: it takes a token" in client(PUSH_SPACE, token=None, fails=True)
