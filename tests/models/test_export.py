"""torch.export, ONNX and torch.compile: one program for any batch and length, with the model's own logits."""

import onnxruntime
import pytest
import torch
from configurations import make_config
from torch.export import Dim
from transformers import AutoConfig

from capsule_heads import (
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VIT = {**SIZES, "image_size": 32, "patch_size": 8}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embedding_groups": 2}
WAV2VEC2 = {**SIZES, **CONVOLUTIONS, "num_conv_pos_embeddings": 4, "feat_extract_norm": "layer", "conv_bias": True}
ANY = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}  # batch and length


def text(n, length):
    generator = torch.Generator().manual_seed(n * length)
    lengths = torch.randint(1, length + 1, (n, 1), generator=generator)
    return {
        "input_ids": torch.randint(3, 64, (n, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
    }


def image(n, _):
    return {"pixel_values": torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))}


def sound(n, length):
    return {"input_values": torch.randn(n, 40 * length, generator=torch.Generator().manual_seed(n))}


KINDS = {
    "text": (CapsuleHeadForSequenceClassification, "bert", None, text, {"input_ids": ANY, "attention_mask": ANY}),
    "image": (CapsuleHeadForImageClassification, "vit", VIT, image, {"pixel_values": {0: Dim.DYNAMIC}}),
    "audio": (CapsuleHeadForAudioClassification, "wav2vec2", WAV2VEC2, sound, {"input_values": ANY}),
}


@pytest.fixture
def make_kind(backbone_config, shake):
    """make_kind(kind): a model, what makes inputs for it, and which of their dimensions vary."""

    def make(kind, **fields):
        cls, model_type, sizes, inputs, dimensions = KINDS[kind]
        base = AutoConfig.for_model(model_type, **sizes) if sizes else backbone_config(model_type)
        torch.manual_seed(0)
        model = cls(make_config(base, d_inp=8, n_parts=6, num_labels=3, **fields))
        shake(model.head)
        if model.linear_term is not None:
            shake(model.linear_term)
        return model.eval(), inputs, dimensions

    return make


@torch.no_grad()
@pytest.mark.parametrize("linear_term", [None, True])
def test_a_program_for_one_shape(make_kind, linear_term):
    model, inputs, _ = make_kind("text", linear_term=linear_term)
    program = torch.export.export(model, (), inputs(3, 7))
    for routing in model.head.routings:
        routing.strategy = "reference"  # as exported
    assert torch.equal(program.module()(**inputs(3, 7)).logits, model(**inputs(3, 7)).logits)


SHAPES = ((1, 2), (2, 40), (5, 11), (3, 7))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_program_for_any_batch_and_length(make_kind, kind):
    model, inputs, dimensions = make_kind(kind)
    program = torch.export.export(model, (), inputs(3, 7), dynamic_shapes=dimensions)
    for n, length in SHAPES:
        batch = inputs(n, length)
        torch.testing.assert_close(program.module()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_for_any_batch_and_length(make_kind, kind, tmp_path):
    model, inputs, dimensions = make_kind(kind, linear_term=True)
    program = torch.export.export(model, (), inputs(3, 7), dynamic_shapes=dimensions)
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [x.name for x in session.get_inputs()] == list(dimensions)
    for n, length in SHAPES:
        batch = inputs(n, length)
        expected = model(**batch).logits
        assert expected.std() > 1e-3
        (logits,) = session.run(None, {name: x.numpy() for name, x in batch.items()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_where_scores_of_parts_are_low(make_kind, tmp_path):
    model, inputs, dimensions = make_kind("text")
    model.head.routings[0].beta_ign += torch.linspace(0.5, 1.0, 6)  # the cost of all that a part ignores
    batch = inputs(2, 40)
    states, masks = model.compute_hidden_states(**batch)
    parts, *_ = model.head.routings[0](*model.head.detect(states, masks))
    assert parts.max() > -30 and parts.min() < -60
    program = torch.export.export(model, (), inputs(3, 7), dynamic_shapes=dimensions)
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {name: x.numpy() for name, x in batch.items()})
    torch.testing.assert_close(torch.from_numpy(logits), model(**batch).logits, rtol=0, atol=1e-4)


def test_exporting_takes_the_literal_loop_however_many_votes_there_are(make_kind, monkeypatch):
    monkeypatch.setattr("capsule_heads.ops.routing.SMALL", {"kept": 0, "reference": 0})
    model, inputs, _ = make_kind("text")
    program = torch.export.export(model, (), inputs(3, 7))
    assert not any("capsule_heads" in str(node.target) for node in program.graph.nodes)
    model.head.routings[0].strategy = "votes"
    with pytest.raises(ValueError, match=r'strategy "votes" is an operator of this package.*strategy="auto" or "refer'):
        torch.export.export(model, (), inputs(3, 7))


class Counter:
    """A backend of torch.compile that compiles nothing, and counts graphs."""

    def __init__(self):
        self.n = 0

    def __call__(self, graph, inputs):
        self.n += 1
        return graph.forward


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["auto", "votes"])
def test_compiling_once_more_serves_all_lengths(make_kind, strategy):
    model, inputs, _ = make_kind("text", strategy=strategy)
    torch.compiler.reset()
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    counts = []
    for length in (5, 7, 9, 12, 20, 33, 40):
        torch.testing.assert_close(compiled(**inputs(3, length)).logits, model(**inputs(3, length)).logits)
        counts.append(counter.n)
    assert counts[1] <= 2 * counts[0] and counts[-1] == counts[1]


@torch.no_grad()
def test_marked_as_dynamic_one_compilation_serves_all_lengths(make_kind):
    model, _, _ = make_kind("text")
    torch.compiler.reset()
    compiled = torch.compile(model.head, backend=(counter := Counter()), fullgraph=True)
    for length in (5, 7, 50, 300):
        states, mask = [torch.randn(3, length, 16) for _ in range(3)], torch.ones(3, length)
        for x in (*states, mask):
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(states, mask).a_out, model.head(states, mask).a_out)
    assert counter.n == 1
