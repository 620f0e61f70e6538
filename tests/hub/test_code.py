"""Code that comes along with a checkpoint: what it computes, and when it runs."""

import ast
import hashlib
import json

import pytest
from configurations import make_config
from hub_programs import COMMON, WITHOUT_PACKAGE
from hub_server import File, Repository
from transformers import BertConfig

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.hub import write_code
from capsule_heads.hub.code import ROOT, flat_modules

PULL = """
from importlib import import_module
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification

expected = torch.load(sys.argv[1])
equal = {}
for name in ("head", "whole"):
    model = AutoModelForSequenceClassification.from_pretrained(f"me/{name}", trust_remote_code=True)
    equal[name] = torch.equal(logits(model), expected[name])
model.save_pretrained("again")
again = AutoModelForSequenceClassification.from_pretrained("again", trust_remote_code=True)
equal["saved again"] = torch.equal(logits(again), expected["whole"])
pictures = AutoModelForImageClassification.from_pretrained("me/pictures", trust_remote_code=True)
equal["pictures"] = torch.equal(logits(pictures), expected["pictures"])
processor = AutoImageProcessor.from_pretrained("me/pictures", trust_remote_code=True)
equal["processor"] = processor.size == {"height": 16, "width": 16}
parts = AutoModel.from_pretrained("me/head", trust_remote_code=True)
equal["parts"] = parts(input_ids=IDS).scores.shape == (3, 6)
# Two copies of the code beside each other.
for copy in (model, pictures):
    route = import_module(type(copy).__module__.rpartition(".")[0] + ".ops").route
    equal |= {f"{type(copy).__name__} {s}": torch.equal(o, expected[s]) for s, o in routed(route).items()}
equal["no package"] = "capsule_heads" not in sys.modules
print(json.dumps(equal))
"""


@pytest.mark.slow
def test_models_run_without_the_package(client, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    equal = client(WITHOUT_PACKAGE + COMMON + PULL, pushed)
    assert all(equal.values()), equal
    assert len(equal) == 15


def test_it_is_the_packages_own_source():
    modules = flat_modules()
    assert {"modeling_capsule_head.py", "ops.py", "cpu_kernels.py", "stereo_conv.py"} <= modules.keys()
    assert "__init__.py" not in modules and "hub.py" not in modules and "trainer.py" not in modules
    sources = [*ROOT.glob("ops/*.py"), *ROOT.glob("models/[!_]*.py")]
    alone = ["checks.py", "layers.py", "mixup.py", "weights.py", "heads.py", "control_heads.py", "explain.py"]
    assert len(modules) == len(sources) + len(alone)  # no two have one name
    for name, text in modules.items():
        first, rest = text.split("\n", 1)
        assert first.startswith("# capsule_heads 0.") and first.endswith("; MIT licence."), name
        for node in ast.walk(ast.parse(rest)):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                assert node.level == 1 and all(f"{module}.py" in modules for module in imported), (name, imported)
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("capsule_heads") for alias in node.names)


def test_writing_it_to_a_directory(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} holds no config.json; expected a directory that save_pretrained"):
        write_code(tmp_path)
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = CapsuleHeadForSequenceClassification(make_config(config, d_inp=4, n_parts=2))
    model.save_pretrained(tmp_path)
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
    name = "modeling_capsule_head.CapsuleHeadForSequenceClassification"
    assert auto_map["AutoModelForSequenceClassification"] == name
    assert {path.name for path in tmp_path.glob("*.py")} == flat_modules().keys()
    assert not list(tmp_path.glob("*.part"))  # nothing temporary is left


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
equal = [torch.equal(logits(load(name)), expected) for name in names]
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
