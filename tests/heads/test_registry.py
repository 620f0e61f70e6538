"""The registry of heads, and a head of a user's own: the one of docs/how_to/extend.md."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.heads import Head, HeadOptions, HeadOutput, get_head, option, register, registered_heads
from capsule_heads.heads import base as registry

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "extend.md"
TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def own_head(tmp_path):
    """The file of docs/how_to/extend.md, in a folder of its own."""
    (source,) = re.findall(r"```python\n(\"\"\"mean_head\.py.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "mean_head.py"
    path.write_text(source, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Heads that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_HEADS", dict(registry._HEADS))


def run(program, folder, *, status=0):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


LOAD = """
import sys, torch
{}
from transformers import AutoModelForSequenceClassification
import capsule_heads
model = AutoModelForSequenceClassification.from_pretrained("model")
torch.save(model(input_ids=torch.tensor([[3, 4, 5]])).logits, "logits.pt")
"""


@pytest.mark.slow
def test_a_head_of_ones_own_is_saved_and_loaded_where_it_is_registered(own_head):
    sys.path.insert(0, str(own_head.parent))
    try:
        import mean_head  # noqa: F401 - it registers the head
    finally:
        sys.path.remove(str(own_head.parent))
    torch.manual_seed(0)
    fields = {"num_labels": 3, "head_type": "mean", "d_hidden": 8}
    model = CapsuleHeadForSequenceClassification.from_backbone(BertConfig(**TINY), **fields)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()
    assert model.config.d_hidden == 8 and model.head.options.d_hidden == 8
    model.save_pretrained(own_head.parent / "model")
    run(["-c", LOAD.format("import mean_head")], own_head.parent)
    expected = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    torch.testing.assert_close(torch.load(own_head.parent / "logits.pt"), expected)
    error = run(["-c", LOAD.format("")], own_head.parent, status=1).splitlines()[-1]
    assert error.startswith("ValueError: head_type is 'mean'; expected one of token_depth, ")
    assert error.endswith("import the module that calls capsule_heads.heads.register.")


@pytest.mark.slow
def test_a_head_of_ones_own_on_the_command_line(own_head):
    folder = own_head.parent
    command = ["-m", "capsule_heads"]
    assert "--d_hidden" in run([*command, "train", "--import", "mean_head.py", "--help"], folder)
    options = "--config quickstart --head_type mean --d_hidden 16 --max_steps 3 --eval_strategy no --save_strategy no"
    options += " --load_best_model_at_end false --output_dir run"
    run([*command, "train", "--import", "mean_head.py", *options.split()], folder)
    evaluate = ["evaluate", "run", "--task", "reviews", "--split", "test"]
    assert "accuracy  " in run([*command, *evaluate, "--import", "mean_head.py"], folder)
    error = run([*command, *evaluate], folder, status=2)
    assert error.startswith("error: head_type is 'mean'; expected one of token_depth") and error.count("\n") == 1


def make_head(options=HeadOptions):
    class Constant(Head):
        Options = options

        def score(self, hidden_states, masks, return_routing_probabilities, mix):
            return HeadOutput(torch.zeros(len(masks[0]), self.n_out))

    return Constant


def test_registering_again_and_twice():
    first = register("constant")(make_head())
    assert get_head("constant") is first and first.name == "constant"
    again = register("constant")(make_head())  # a notebook cell that is run again
    assert get_head("constant") is again
    with pytest.raises(ValueError, match=r"head_type 'linear' is capsule_heads\.heads\.linear\.LinearHead; choose an"):
        register("linear")(make_head())


def test_what_cannot_be_registered():
    with pytest.raises(TypeError, match=r"expected a subclass of capsule_heads\.heads\.Head\."):
        register("module")(torch.nn.Linear)

    @dataclasses.dataclass(frozen=True)
    class Plain(HeadOptions):
        size: int = 3

    with pytest.raises(TypeError, match=r"The option size of Constant has no help; make it with heads\.option\(\)"):
        register("plain")(make_head(Plain))


def test_an_option_with_the_name_of_a_field():
    @dataclasses.dataclass(frozen=True)
    class Clash(HeadOptions):
        layers: int = option(3, "A number.")

    register("clash")(make_head(Clash))
    with pytest.raises(ValueError, match='The option layers of head_type="clash" has the name of a field of Caps'):
        CapsuleHeadForSequenceClassification.from_backbone(BertConfig(**TINY), head_type="clash")


def test_misspelt_names():
    with pytest.raises(
        ValueError, match=r"head_type is 'tokendepth'; expected one of .*\. Did you mean token_depth\? A"
    ):
        get_head("tokendepth")
    with pytest.raises(TypeError, match=r"token_depth heads have no option n_part; did you mean n_parts\?"):
        get_head("token_depth")(hidden_sizes=[8], n_out=2, n_part=4)


@pytest.mark.parametrize("name", registered_heads())
def test_every_option_has_a_help_text(name):
    for field in dataclasses.fields(get_head(name).Options):
        assert field.metadata["help"].endswith(".") and field.metadata["help"][0].isupper(), field.name


@pytest.mark.parametrize("name", registered_heads())
def test_every_head_says_what_it_can_explain(name):
    head = get_head(name)
    assert set(head.explains) <= {"parts", "tokens"} and head.title != Head.title
