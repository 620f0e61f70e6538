"""Code that goes along with a checkpoint: how much it is, what it computes, and when it runs."""

import ast
import hashlib
import json
import subprocess
import sys

import pytest
import torch
from configurations import make_config
from hub_programs import COMMON, WITHOUT_PACKAGE
from hub_server import File, Repository
from transformers import BertConfig, ViTConfig, Wav2Vec2Config

from capsule_heads import (
    CapsuleHeadConfig,
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleHeadModel,
)
from capsule_heads.heads import registered_heads
from capsule_heads.hub import write_code
from capsule_heads.hub.code import carried_files
from capsule_heads.hub.sources import Rules, Selection
from capsule_heads.ops import STRATEGIES
from capsule_heads.paper.configuration_stereo_conv import StereoConvConfig
from capsule_heads.paper.image_processing_stereo import StereoImageProcessor

OWN_HEADS = [
    name
    for name, head in registered_heads().items()
    if head.__module__.startswith("capsule_heads.") and head.made_by is None
]
MOST_LINES = 2000  # that a cautious person reads
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
BERT = BertConfig(vocab_size=32, max_position_embeddings=32, **SIZES)


def make_model(cls=CapsuleHeadForSequenceClassification, base_config=BERT, **fields):
    """Return a model whose weights are all random."""
    torch.manual_seed(0)
    model = cls(make_config(base_config, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save_with_code(model, directory, processor=None):
    """Save a model and its code, and return the code's files by name."""
    model.save_pretrained(directory)
    if processor is not None:
        processor.save_pretrained(directory)
    write_code(directory)
    return {path.name: path.read_text() for path in sorted(directory.glob("*.py"))}


def n_lines(code):
    return sum(len(text.splitlines()) for text in code.values())


def imported(code):
    """Return the packages that the files import."""
    nodes = [node for text in code.values() for node in ast.walk(ast.parse(text))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


# What it is


@pytest.mark.parametrize("name", OWN_HEADS)
def test_it_is_little_enough_to_read(name, tmp_path):
    code = save_with_code(make_model(head_type=name), tmp_path)
    assert n_lines(code) <= MOST_LINES
    assert imported(code) == {"torch", "transformers", "safetensors"}
    assert code.keys() == {
        "backbones.py",
        "configuration_capsule_head.py",
        "heads.py",
        "modeling_capsule_head.py",
        "routing.py",
    }
    assert [other for other in OWN_HEADS if f'@register("{other}")' in code["heads.py"]] == [name]
    assert "the fast strategies" in code["modeling_capsule_head.py"].splitlines()[2].lower()


@pytest.mark.parametrize(
    "cls, base_config, fields, processor",
    [
        (
            CapsuleHeadForImageClassification,
            StereoConvConfig(image_size=16, hidden_sizes=[8, 8], strides=[2, 2]),
            {"head_type": "spatial_pose", "freeze_backbone": False},
            StereoImageProcessor(16),
        ),
        (CapsuleHeadForImageClassification, ViTConfig(image_size=8, patch_size=4, **SIZES), {}, None),
        (CapsuleHeadForAudioClassification, Wav2Vec2Config(**SIZES), {}, None),
        (CapsuleHeadModel, BERT, {}, None),
    ],
    ids=["stereo", "images", "audio", "parts"],
)
def test_it_has_the_models_of_the_checkpoint(cls, base_config, fields, processor, tmp_path):
    code = save_with_code(make_model(cls, base_config, **fields), tmp_path, processor)
    assert n_lines(code) <= MOST_LINES
    text = code["modeling_capsule_head.py"]
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {value.partition(".")[2] for value in auto_map.values()} == {
        cls.__name__,
        "CapsuleHeadModel",
        "CapsuleHeadConfig",
    }
    others = {
        CapsuleHeadForAudioClassification,
        CapsuleHeadForImageClassification,
        CapsuleHeadForSequenceClassification,
    }
    assert f"class {cls.__name__}(" in text
    assert not any(f"class {other.__name__}(" in text for other in others - {cls})
    assert ("image_processing_stereo.py" in code) == (processor is not None)


def test_a_head_without_parts_has_no_model_of_parts(tmp_path):
    code = save_with_code(make_model(head_type="linear"), tmp_path)
    assert "AutoModel" not in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert "class CapsuleHeadModel(" not in code["modeling_capsule_head.py"]
    assert "class Routing(" in code["routing.py"]  # the classifier asks whether its head routes


def test_every_name_in_it_is_known_and_used(tmp_path):
    """Also those behind `if`s that no test of logits reaches."""
    for name in OWN_HEADS:
        save_with_code(make_model(head_type=name), tmp_path / name)
    model = make_model(
        CapsuleHeadForImageClassification, StereoConvConfig(image_size=16, hidden_sizes=[8, 8], strides=[2, 2])
    )
    save_with_code(model, tmp_path / "stereo", StereoImageProcessor(16))
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_writing_it_to_a_directory(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} holds no config.json; expected a directory that save_pretrained"):
        write_code(tmp_path)
    make_model().save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: expected keys and values, found list"):
        write_code(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert not list(tmp_path.glob("*.py"))
    write_code(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    auto_map = after.pop("auto_map")
    assert after == before
    assert auto_map == {
        "AutoConfig": "modeling_capsule_head.CapsuleHeadConfig",
        "AutoModel": "modeling_capsule_head.CapsuleHeadModel",
        "AutoModelForSequenceClassification": "modeling_capsule_head.CapsuleHeadForSequenceClassification",
    }
    assert not list(tmp_path.glob("*.part"))  # nothing temporary is left


@pytest.mark.parametrize(
    "rules, message",
    [
        (Rules({"": "x"}, without={"mixup": ["Mixer.draw"]}), "There is no Mixer"),
        (Rules({"": "x"}, instead={"mixup": {"blend": "def blend(): ..."}}), "There is no blend"),
        (Rules({"heads": "heads"}), "capsule_heads.mixup has no file"),
    ],
)
def test_rules_that_name_what_is_not_there(rules, message):
    with pytest.raises(ImportError, match=message):
        Selection(rules).add("capsule_heads.mixup", "mix")


# What it computes


PULL = """
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification

expected = torch.load(sys.argv[1])
equal = {}
for name in ("head", "whole"):
    model = AutoModelForSequenceClassification.from_pretrained(f"me/{name}", trust_remote_code=True)
    equal[name] = close(logits(model), expected[name])
    model.save_pretrained(f"{name} again")
    again = AutoModelForSequenceClassification.from_pretrained(f"{name} again", trust_remote_code=True)
    equal[f"{name} saved again"] = close(logits(again), expected[name])
equal["the head alone again"] = "backbone" not in str(model.__class__) and os.path.getsize(
    "head again/model.safetensors"
) < os.path.getsize("whole again/model.safetensors") / 4
pictures = AutoModelForImageClassification.from_pretrained("me/pictures", trust_remote_code=True)
equal["pictures"] = close(logits(pictures), expected["pictures"])
processor = AutoImageProcessor.from_pretrained("me/pictures", trust_remote_code=True)
equal["processor"] = processor.size == {"height": 16, "width": 16}
parts = AutoModel.from_pretrained("me/head", trust_remote_code=True)
equal["parts"] = parts(input_ids=IDS).scores.shape == (3, 6)
equal["no package"] = "capsule_heads" not in sys.modules
print(json.dumps(equal))
"""


@pytest.mark.slow
def test_models_run_without_the_package(client, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    equal = client(WITHOUT_PACKAGE + COMMON + PULL, pushed)
    assert all(equal.values()), equal
    assert len(equal) == 9


LOAD = """
from pathlib import Path
from transformers import AutoModelForSequenceClassification

expected = torch.load(sys.argv[1])
models = {
    name: AutoModelForSequenceClassification.from_pretrained(Path(sys.argv[1]).with_name(name), trust_remote_code=True)
    for name in expected
    if "capsule_heads" not in sys.modules or not name.startswith("strategy")
}
equal = {name: close(logits(model), expected[name]) for name, model in models.items()}
print(json.dumps([equal, sorted({type(model).__module__.partition(".")[0] for model in models.values()})]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of logits by name, beside directories of the models of these names with their code.

    There is one for every head, and for every strategy that a configuration can name.
    """
    folder = tmp_path_factory.mktemp("saved")
    fields = {name: {"head_type": name} for name in OWN_HEADS}
    fields |= {f"strategy {name}": {"strategy": name} for name in STRATEGIES}
    fields |= {"regression": {"num_labels": 1}, "skm": {"p_model": "skm", "single_beta": True, "layers": [0, -1]}}
    fields["skm"]["calibration_temperature"] = 2.5
    members = [
        {"head_type": name, "options": {}, "layers": layers, "linear_term": term, "calibration_temperature": 1.5}
        for name, layers, term in (("token_depth", [0, 1], True), ("linear", [1], False))
    ]
    fields["ensemble"] = {"head_type": "ensemble_of_heads", "members": members, "layers": [0, -1]}
    fields |= {"windows": {"window_length": 5, "window_overlap": 1, "window_special_tokens": [1, 1]}}
    expected = {}
    for name, of_model in fields.items():
        model = make_model(**of_model).eval()
        save_with_code(model, folder / name)
        if "strategy" in of_model:  # the machine may lack what it needs
            model.head.routings[0].strategy = "auto"
        with torch.no_grad():
            expected[name] = model(input_ids=torch.arange(3, 24).view(3, 7)).logits
    torch.save(expected, folder / "logits.pt")
    return folder / "logits.pt"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["", "import capsule_heads\n"], ids=["without the package", "with the package"])
def test_every_head_has_the_same_logits(client, saved, package):
    equal, modules = client((package or WITHOUT_PACKAGE) + COMMON + LOAD, saved)
    assert all(equal.values()), equal
    assert len(equal) == len(OWN_HEADS) + 4 + (0 if package else len(STRATEGIES))
    assert modules == (["capsule_heads"] if package else ["transformers_modules"])


# A head of one's own


MEAN = """
from dataclasses import dataclass

from torch import nn

from capsule_heads import Routing as Layer
from capsule_heads.heads import Head, HeadOptions, HeadOutput, option, register


@dataclass(frozen=True)
class MeanOptions(HeadOptions):
    scale: int = option(2, "Factor of the scores.")


@register("own_mean")
class MeanHead(Head):
    title = "A mean head"
    Options = MeanOptions

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.affine = nn.Linear(self.hidden_sizes[-1], self.n_out)
        self.layer = Layer(1, 4, 2, n_out=3)

    def score(self, hidden_states, masks, return_routing_probabilities, mix):
        return HeadOutput(self.options.scale * self.affine(hidden_states[-1].mean(1)))
"""
SAVE_MEAN = """
import mean_head
from transformers import BertConfig
from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.hub import write_code

sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
bert = BertConfig(vocab_size=32, **sizes)
model = CapsuleHeadForSequenceClassification.from_backbone(bert, head_type="own_mean", scale=3)
model.save_pretrained(sys.argv[2])
write_code(sys.argv[2])
torch.save(logits(model), sys.argv[1])
print(json.dumps(True))
"""
LOAD_MEAN = """
from transformers import AutoModelForSequenceClassification

load = AutoModelForSequenceClassification.from_pretrained
model = load(sys.argv[2], trust_remote_code=True)
model.save_pretrained("again")
again = load("again", trust_remote_code=True)
expected = torch.load(sys.argv[1])
print(json.dumps([close(logits(model), expected), close(logits(again), expected), model.config.scale]))
"""


@pytest.mark.slow
def test_a_head_of_ones_own_goes_along(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mean_head.py").write_text(MEAN)
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    client(path + COMMON + SAVE_MEAN, tmp_path / "logits.pt", tmp_path / "model")
    (tmp_path / "mean_head.py").unlink()
    code = {path.name: path.read_text() for path in (tmp_path / "model").glob("*.py")}
    assert "from .routing import Routing as Layer\n" in code["own_mean_head.py"]
    assert "capsule_heads" not in imported(code) and "class TokenDepthHead" not in code["heads.py"]
    program = WITHOUT_PACKAGE + COMMON + LOAD_MEAN
    assert client(program, tmp_path / "logits.pt", tmp_path / "model") == [True, True, 3]


@pytest.fixture
def head_in_a_file(tmp_path, monkeypatch):
    """head_in_a_file(source): the configuration of a model with the head that a module of that source defines."""
    from capsule_heads.heads.base import _HEADS

    monkeypatch.setattr("capsule_heads.heads.base._HEADS", dict(_HEADS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_head_of_a_test", raising=False)

    def load(source):
        (tmp_path / "own_head_of_a_test.py").write_text(source)
        __import__("own_head_of_a_test")
        return {
            "head_type": "own_mean",
            "architectures": ["CapsuleHeadForSequenceClassification"],
            "base_config": {"model_type": "bert"},
        }

    return load


@pytest.mark.parametrize(
    "line, message",
    [
        ("import capsule_heads.heads as h", r"imports the module capsule_heads\.heads; expected names"),
        (
            "from capsule_heads import heads",
            r"imports heads from capsule_heads; expected names of capsule_heads\.heads",
        ),
        (
            "from capsule_heads.training import CapsuleTrainer",
            "imports CapsuleTrainer from capsule_heads.training; exp",
        ),
        ("def f(): from .others import x", r"imports \.others; expected all of a head's own code in one file"),
    ],
)
def test_a_head_whose_code_cannot_go_along(head_in_a_file, line, message):
    with pytest.raises(ValueError, match=f"head_type 'own_mean' is MeanHead of own_head_of_a_test, which {message}"):
        carried_files(head_in_a_file(MEAN + line + "\n"))


def test_a_head_of_a_notebook_cannot_go_along(head_in_a_file):
    config = head_in_a_file(MEAN)
    sys.modules["own_head_of_a_test"].MeanHead.__module__ = "__main__"
    with pytest.raises(ValueError, match=r"of __main__, whose code cannot go along .* move it from the notebook"):
        carried_files(config)


# transformers' own way


@pytest.mark.parametrize("cls", [CapsuleHeadConfig, CapsuleHeadForSequenceClassification, StereoImageProcessor])
def test_registering_for_an_auto_class_says_which_call_to_use(cls):
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\.register_for_auto_class\(\) was called") as caught:
        cls.register_for_auto_class()
    assert "push_to_hub(repo_id, include_code=True)" in str(caught.value)
    assert "capsule_heads.hub.write_code(directory) after save_pretrained" in str(caught.value)
    assert cls._auto_class is None


# When it runs


MARK = 'import os\nopen(os.environ["MARK"], "a").write("{} ")\n'
ASK = """
import json, os, sys
from transformers import AutoModelForSequenceClassification

def attempt(*arguments, load=AutoModelForSequenceClassification.from_pretrained, **options):
    open(os.environ["MARK"], "w").close()
    try:
        load(*arguments, **options)
        message = None
    except (OSError, ValueError) as error:
        message = str(error)
    return [message, open(os.environ["MARK"]).read()]
"""


@pytest.fixture
def marked(hub, pushed):
    """The name of a repository like me/head, with code that leaves a mark where it runs."""
    files = dict(hub.repositories["me/head"].files())
    name = "modeling_capsule_head.py"
    files[name] = File(files[name].content + MARK.format("head").encode(), is_large=False)
    sha = hashlib.sha1(files[name].content).hexdigest()
    hub.repositories["me/marked"] = Repository(False, {sha: files}, {"main": sha})
    return "me/marked"


@pytest.mark.slow
def test_it_runs_only_where_it_is_trusted(client, marked, tmp_path):
    program = """
answers = [attempt(sys.argv[1]), attempt(sys.argv[1], trust_remote_code=False)]
print()  # transformers has asked
print(json.dumps([*answers, attempt(sys.argv[1], trust_remote_code=True)]))
"""
    refused, refused_too, (message, mark) = client(WITHOUT_PACKAGE + ASK + program, marked, MARK=str(tmp_path / "mark"))
    for error, mark_before in (refused, refused_too):
        assert "pass the argument `trust_remote_code=True` to allow custom code to be run" in error
        assert mark_before == ""
    assert (message, mark) == (None, "head ")


@pytest.mark.slow
def test_where_the_package_is_imported_it_never_runs(client, marked, tmp_path):
    program = """
from capsule_heads import CapsuleHeadForSequenceClassification
load = CapsuleHeadForSequenceClassification.from_pretrained
print(json.dumps([attempt(sys.argv[1]), attempt(sys.argv[1], trust_remote_code=True), attempt(sys.argv[1], load=load),
                  attempt(sys.argv[1], load=load, trust_remote_code=True)]))
"""
    assert client(ASK + program, marked, MARK=str(tmp_path / "mark")) == [[None, ""]] * 4


# A backbone with code of its own

ODD = """
import os
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

open(os.environ["MARK"], "a").write("backbone ")

class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(self, vocab_size=32, hidden_size=16, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)

class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, output_hidden_states=None, return_dict=None):
        embedded = self.embeddings(input_ids)
        last = self.layer(embedded)
        return BaseModelOutput(last_hidden_state=last, hidden_states=(embedded, last))
"""
PUSH_ODD = """
import odd_code
from capsule_heads import CapsuleHeadForSequenceClassification

odd_code.OddConfig.register_for_auto_class()
odd_code.OddModel.register_for_auto_class("AutoModel")
odd_code.OddModel(odd_code.OddConfig()).push_to_hub("me/odd")
create = CapsuleHeadForSequenceClassification.from_backbone
refused = attempt("me/odd", load=create, trust_remote_code=False)
model = create("me/odd", trust_remote_code=True, d_inp=8, n_parts=6)
with torch.no_grad():
    model.head.routings[1].W.normal_(generator=torch.Generator().manual_seed(0))
model.push_to_hub("me/odd-head", include_code=True)
model.push_to_hub("me/odd-whole", head_only=False, include_code=True)
torch.save(logits(model), sys.argv[1])
print(json.dumps(refused))
"""
PULL_ODD = """
expected, names = torch.load(sys.argv[1]), ("me/odd-head", "me/odd-whole")
refused = [attempt(name, trust_remote_code=True) for name in names]
load = lambda name: AutoModelForSequenceClassification.from_pretrained(
    name, trust_remote_code=True, trust_backbone_code=True
)
equal = [close(logits(load(name)), expected) for name in names]
print(json.dumps([refused, equal, open(os.environ["MARK"]).read()]))
"""


@pytest.fixture(scope="module")
def odd(client, tmp_path_factory):
    """The logits of me/odd-head and me/odd-whole, whose backbone me/odd comes with code of its own."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_code.py").write_text(ODD)
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + COMMON + ASK + PUSH_ODD
    message, mark = client(program, folder / "logits.pt", MARK=str(folder / "mark"))
    assert "trust_remote_code=True" in message and mark == ""
    return folder / "logits.pt"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["", "import capsule_heads\n"], ids=["without the package", "with the package"])
def test_a_backbones_code_is_trusted_by_itself(client, odd, package, tmp_path):
    program = (package or WITHOUT_PACKAGE) + COMMON + ASK + PULL_ODD
    refused, equal, mark = client(program, odd, MARK=str(tmp_path / "mark"))
    for message, mark_before in refused:
        assert "The backbone is of a type that comes with code of its own, odd." in message
        assert "pass trust_backbone_code=True to from_pretrained; trust_remote_code is not about it" in message
        assert mark_before == ""
    assert equal == [True, True] and set(mark.split()) == {"backbone"}
