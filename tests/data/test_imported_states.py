"""Hidden states that vLLM or something else has computed: kept where they are the backbone's, and refused otherwise."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_texts import make_tokenizer, texts
from transformers import AutoModel, LlamaConfig

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.data.computing_states import BackboneStates
from capsule_heads.data.hidden_states import CapsuleCollator
from capsule_heads.data.imported_states import Arrays, ImportedStates

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A head on a small Llama, whose last layer's hidden states are normalised."""
    backbone = str(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    of_states = AutoModel.from_config(LlamaConfig(vocab_size=24, initializer_range=0.5, pad_token_id=0, **sizes))
    with torch.no_grad():
        of_states.norm.weight.copy_(torch.rand(16) + 0.5)
    of_states.save_pretrained(backbone)
    return CapsuleHeadForSequenceClassification.from_backbone(backbone, d_inp=8, n_parts=4)


@torch.no_grad()
def raw_states(model, ids):
    """Return what vLLM writes of a text: each layer's states, of which the last are not normalised."""
    found, last = [], []
    hook = model.backbone.norm.register_forward_pre_hook(lambda module, given: last.append(given[0]))
    states = model.backbone(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    found = [*states[:-1], last[0]]
    return torch.stack(found, dim=2)[0]


@pytest.fixture
def rows():
    return texts(20).remove_columns(["labels", "length"])


@pytest.fixture
def write(model, rows, tmp_path):
    """write(change): a file of each text, as vLLM writes them in bfloat16, after a change of its states."""

    def write(change=lambda x: x):
        for n, ids in enumerate(rows["input_ids"][:]):
            states = change(raw_states(model, ids)).bfloat16().contiguous()
            (tmp_path / f"{n % 3}").mkdir(exist_ok=True)
            save_file(
                {"hidden_states": states, "token_ids": torch.tensor(ids)}, tmp_path / f"{n % 3}" / f"{n}.safetensors"
            )
        return tmp_path

    return write


def imported(folder, model, rows):
    own = BackboneStates(model.eval(), CapsuleCollator(make_tokenizer()))
    return ImportedStates(folder, model, own, rows), own


def compare(found, own, rows):
    for n in range(len(rows)):
        batch = rows[n : n + 1]
        n_tokens = len(batch["input_ids"][0])
        ours = found(batch, n_tokens)
        assert ours.dtype == torch.float32
        expected = own(batch, n_tokens)
        assert ((ours - expected).norm(dim=(0, 2)) <= 0.02 * expected.norm(dim=(0, 2))).all()
        assert not torch.equal(ours, expected)


def test_files_of_vllm(write, model, rows):
    found, own = imported(write(), model, rows)
    assert not found.is_normalized  # the backbone's norm was found, and is applied
    compare(found, own, rows)


def test_files_whose_last_layer_is_normalised(write, model, rows):
    def normalised(states):
        states[:, -1] = model.backbone.norm(states[:, -1]).detach()
        return states

    found, own = imported(write(normalised), model, rows)
    assert found.is_normalized
    compare(found, own, rows)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x: x.flip(1),
            "differ from the backbone's own at layer 0, by .*%; expected 10% at most|differ .* layer",
        ),
        (
            lambda x: x[:, [0, 2, 1, 3]],
            r"differ from the backbone's own at layer 1, by \d+% in \d+ texts; expected 10%",
        ),
        (lambda x: x.flip(0), "differ from the backbone's own at layer 0"),
        (
            lambda x: x[:, 1:],
            r"has states \[\d+, 3, 16\] of a text; expected \[\d+, 4, 16\]: its tokens, the layers in",
        ),
        (lambda x: x + torch.nan, "differ from the backbone's own at layer 0, by nan%"),
    ],
)
def test_other_states_are_refused(write, model, rows, change, message):
    folder = write(change)
    with pytest.raises(ValueError, match=message):
        imported(folder, model, rows)


def test_what_is_missing(write, model, rows, tmp_path):
    folder = write()
    missing = folder / "1" / "4.safetensors"
    missing.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=re.escape(f"{missing} cannot be read (")):
        imported(folder, model, rows)
    missing.unlink()
    found, _ = imported(folder, model, rows.select([0, 1]))
    ids = rows[4]["input_ids"]
    with pytest.raises(ValueError, match=re.escape(f"has no hidden states of a text with the tokens {ids}"[:60])):
        found(rows[4:5], len(ids))
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere of hidden states to import"):
        imported(tmp_path / "nowhere", model, rows)


def test_arrays(model, rows, tmp_path):
    states = [raw_states(model, ids) for ids in rows["input_ids"][:]]
    for x in states:
        x[:, -1] = model.backbone.norm(x[:, -1]).detach()
    np.save(tmp_path / "s.npy", torch.cat(states).half().numpy())
    np.save(tmp_path / "t.npy", np.concatenate(rows["input_ids"][:]))
    np.save(tmp_path / "l.npy", [len(ids) for ids in rows["input_ids"][:]])
    about = {"states": "s.npy", "tokens": "t.npy", "lengths": "l.npy"}
    (tmp_path / "arrays.json").write_text(json.dumps(about))
    found, own = imported(tmp_path, model, rows)
    assert found.is_normalized
    compare(found, own, rows)
    np.save(tmp_path / "l.npy", [1, 2])
    with pytest.raises(
        ValueError, match=r"has states \[\d+, 4, 16\] and tokens \[\d+\] of texts with 3 tokens together"
    ):
        Arrays(tmp_path)
    (tmp_path / "arrays.json").write_text(json.dumps({**about, "tokens": 3}))
    with pytest.raises(ValueError, match=r"arrays\.json has tokens 3; expected the name of a \.npy file"):
        Arrays(tmp_path)
