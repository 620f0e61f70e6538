"""Explanations: credits that add up, against a literal computation, and what users get of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    FunnelConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from capsule_heads import (
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    Routing,
)
from capsule_heads.explain import compute_credits, credits, explain
from capsule_heads.explain.credits import TOLERANCE, integrate_slopes
from capsule_heads.explain.parts import describe_parts
from capsule_heads.heads import (
    AttentivePoolingHead,
    LinearHead,
    ScalarMixHead,
    SpatialPoseHead,
    TokenDepthHead,
    VectorRoutingHead,
)
from capsule_heads.paper.configuration_stereo_conv import StereoConvConfig
from capsule_heads.paper.image_processing_stereo import StereoImageProcessor

N_OUT = 3


def shaken(head, shake):
    torch.manual_seed(0)
    return shake(head, scale=0.3).double().eval()


def some_states(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in sizes]


HEADS = {
    "token layer": (lambda: TokenDepthHead(hidden_sizes=[5, 5], n_out=N_OUT, d_inp=4, n_parts=6), [(7, 5), (7, 5)]),
    "hierarchical": (lambda: TokenDepthHead(hidden_sizes=[5, 3], n_out=N_OUT, d_inp=4, n_parts=6), [(8, 5), (2, 3)]),
    "spatial pose": (lambda: SpatialPoseHead(hidden_sizes=[5], n_out=N_OUT, n_parts=4, d_cov=2, d_cap=3), [(6, 5)]),
    "skm": (lambda: TokenDepthHead(hidden_sizes=[5], n_out=N_OUT, d_inp=4, n_parts=6, p_model="skm"), [(7, 5)]),
    "single beta": (
        lambda: TokenDepthHead(hidden_sizes=[5], n_out=N_OUT, d_inp=4, n_parts=6, single_beta=True),
        [(7, 5)],
    ),
    "one iteration": (lambda: TokenDepthHead(hidden_sizes=[5], n_out=N_OUT, d_inp=4, n_parts=6, n_iters=1), [(7, 5)]),
}


@pytest.mark.parametrize("name", HEADS)
def test_credits_are_those_of_the_literal_path(shake, name):
    make, sizes = HEADS[name]
    head, states = shaken(make(), shake), some_states(*sizes)
    masks = [torch.ones(x.shape[:2], dtype=torch.float64) for x in states]
    masks[-1][1, -1] = 0
    found = compute_credits(head, states, masks)
    expected = head(states, masks).a_out.detach()
    torch.testing.assert_close(found.scores, expected)
    torch.testing.assert_close(found.parts.sum(1), expected)
    nothing = head(states, [torch.zeros_like(mask) for mask in masks]).a_out.detach()
    torch.testing.assert_close(found.baseline, nothing)
    totals = found.baseline + sum(x.sum(1) for x in found.inputs)
    torch.testing.assert_close(totals, expected, rtol=0, atol=TOLERANCE)

    # The path, with votes, a complete Jacobian at each of many nodes, and loops instead of sums.
    first, second = head.routings
    with torch.no_grad():
        a_inp, x = head.detect(states, masks)
        a, mu, _, R = first(a_inp, x, return_R=True)
        use = a_inp.sigmoid()[..., None] * R
        ignored = a_inp.sigmoid()[..., None] - use
        to_parts = first.beta_use * use - (first.beta_use if first.single_beta else first.beta_ign) * ignored
        torch.testing.assert_close(to_parts.sum(1), a)
        votes = torch.einsum("bicd,xjdh->bijch", x, first.W) + first.B[None]
        share = use / (use.sum(1, keepdim=True) + first.eps)
        torch.testing.assert_close(torch.einsum("bij,bijch->bjch", share, votes), mu)
    slopes = [torch.zeros(N_OUT, *x.shape, dtype=torch.float64) for x in (a, mu)]
    for node, weight in zip(*np.polynomial.legendre.leggauss(200)):
        t = (node + 1) / 2
        at = torch.autograd.functional.jacobian(lambda a, mu: second(a, mu)[0].sum(0), (t * a, t * mu))
        for total, slope in zip(slopes, at):
            total += weight / 2 * slope
    by_score = torch.einsum("bij,kbj->bik", to_parts, slopes[0])
    by_pose = torch.einsum("bij,bijch,kbjch->bik", share, votes, slopes[1])
    literal = (by_score + by_pose).detach()
    n_tokens = [x.shape[1] for x in states]
    for layer, of_layer in enumerate(found.inputs):
        for token in range(n_tokens[layer]):
            if name == "spatial pose":  # part * positions + position
                inputs = [part * n_tokens[0] + token for part in range(4)]
            elif name == "hierarchical":
                inputs = [sum(n_tokens[:layer]) + token]
            else:
                inputs = [token * len(states) + layer]
            torch.testing.assert_close(of_layer[:, token], literal[:, inputs].sum(1), rtol=1e-3, atol=TOLERANCE)
    assert (found.inputs[-1][1, -1] == 0).all()  # masked
    assert literal.abs().max() > 100 * TOLERANCE


@pytest.fixture
def sharp():
    """Parts, and a routing whose scores change fast along the path: votes far apart beside the small variances."""
    torch.manual_seed(0)
    routing = Routing(1, 2, 2, n_inp=6, n_out=N_OUT)
    with torch.no_grad():
        for parameter in routing.parameters():
            parameter.add_(torch.randn_like(parameter))
        routing.B.zero_()
    return routing, 3 * torch.randn(4, 6), 3 * torch.randn(4, 6, 1, 2)


def miss(slopes, routing, a, mu):
    """How far slopes are from what scores gain."""
    gain = torch.einsum("bj,bjk->bk", a.double(), slopes.a) + torch.einsum("bjch,bjchk->bk", mu.double(), slopes.mu)
    return float((slopes.start + gain - routing(a, mu)[0].detach()).abs().max())


def test_stretches_of_a_path_are_halved_where_scores_change_fast(sharp, monkeypatch, caplog):
    slopes = integrate_slopes(*sharp)
    assert miss(slopes, *sharp) < TOLERANCE and not caplog.records
    monkeypatch.setattr(credits, "MOST_VOTES", 1)  # one stretch in a call
    one_by_one = integrate_slopes(*sharp)
    torch.testing.assert_close(slopes.a, one_by_one.a)
    torch.testing.assert_close(slopes.mu, one_by_one.mu)
    monkeypatch.setattr(credits, "MOST_HALVINGS", 0)
    coarse = miss(integrate_slopes(*sharp), *sharp)
    assert coarse > 100 * TOLERANCE
    (record,) = caplog.records
    assert record.message.startswith("The sum of token credits misses scores by ")


def test_scores_that_are_not_numbers_are_not_halved_for_ever(sharp, monkeypatch):
    routing, a, mu = sharp
    mu[0, 0] = torch.nan
    calls = []
    stretch = credits._integrate_stretch
    monkeypatch.setattr(credits, "_integrate_stretch", lambda *given: calls.append(given[2]) or stretch(*given))
    slopes = integrate_slopes(routing, a, mu)
    assert slopes.a[0].isnan().all() and slopes.a[1:].isfinite().all()
    assert sum(bool(x.isnan().any()) for x in calls) <= 1  # where the sample with a NaN was in


def test_credits_of_a_routing_add_up_to_its_scores():
    torch.manual_seed(0)
    routing = Routing(2, 3, 4, n_inp=5, n_out=N_OUT).double()
    with torch.no_grad():
        for beta in (routing.beta_use, routing.beta_ign):
            beta.normal_()
    a_inp = torch.tensor([0.3, -torch.inf, torch.inf, -2.0, 5.0], dtype=torch.float64)
    a_out, _, _, R = routing(a_inp, torch.randn(5, 2, 3).double(), return_R=True)
    credits = routing.credits(a_inp, R)
    torch.testing.assert_close(credits.sum(0), a_out)
    assert (credits[1] == 0).all() and (credits[2] != 0).all()


SUMS = {
    "linear": (LinearHead, [(7, 5)], {}),
    "linear, first": (LinearHead, [(7, 5)], {"pooling": "first"}),
    "linear, last": (LinearHead, [(7, 5)], {"pooling": "last"}),
    "attentive pooling": (AttentivePoolingHead, [(7, 5), (7, 5)], {"d_inp": 4}),
    "attentive pooling, hierarchical": (AttentivePoolingHead, [(8, 5), (2, 3)], {"d_inp": 4}),
    "scalar mix": (ScalarMixHead, [(7, 5), (7, 5)], {"d_inp": 4}),
    "scalar mix, hierarchical": (ScalarMixHead, [(8, 5), (2, 5)], {"d_inp": 4}),
}


@pytest.mark.parametrize("name", SUMS)
def test_credits_of_heads_that_are_sums_add_up(shake, name):
    make, sizes, options = SUMS[name]
    head = shaken(make(hidden_sizes=[size for _, size in sizes], n_out=N_OUT, **options), shake)
    states = some_states(*sizes)
    masks = [torch.ones(x.shape[:2], dtype=torch.float64) for x in states]
    masks[-1][1, -1] = 0
    found = compute_credits(head, states, masks)
    torch.testing.assert_close(found.scores, head(states, masks).a_out.detach())
    assert found.parts.shape == (2, 0, N_OUT)
    bias = head.affine(torch.nn.functional.silu(head.hidden.bias)) if make is ScalarMixHead else head.affine.bias
    torch.testing.assert_close(found.baseline, bias.detach().to(found.baseline).expand(2, -1))
    assert [x.shape for x in found.inputs] == [(*x.shape[:2], N_OUT) for x in states]
    assert all(x.abs().max() > 1e-3 for x in found.inputs)
    torch.testing.assert_close(found.baseline + sum(x.sum(1) for x in found.inputs), found.scores)
    assert (found.inputs[-1][1, -1] == 0).all()  # masked


def test_credits_of_attention_are_weighted_scores(shake):
    head = shaken(AttentivePoolingHead(hidden_sizes=[5], n_out=N_OUT, d_inp=4), shake)
    (states,) = some_states((7, 5))
    (credits,) = compute_credits(head, [states], [torch.ones(2, 7)]).inputs
    with torch.no_grad():
        _, x = head.detect([states], [torch.ones(2, 7)])
        for vectors, of_row in zip(x[:, :, 0], credits):
            exponentials = [torch.exp(head.query @ vector / 2) for vector in vectors]
            for vector, exponential, found in zip(vectors, exponentials, of_row):
                expected = exponential / sum(exponentials) * (head.affine.weight @ vector)
                torch.testing.assert_close(found.double(), expected)


def test_credits_of_a_scalar_mix_are_integrated_gradients(shake):
    """By quadrature instead: at 20 nodes of the path, the gradients with respect to all hidden states."""
    head = shaken(ScalarMixHead(hidden_sizes=[5, 5], n_out=N_OUT, d_inp=4), shake)
    states, masks = some_states((7, 5), (7, 5)), [torch.ones(2, 7, dtype=torch.float64)] * 2
    found = compute_credits(head, states, masks)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    for k in range(N_OUT):
        expected = [torch.zeros(2, 7, dtype=torch.float64) for _ in states]
        for node, weight in zip((nodes + 1) / 2, weights / 2):
            scaled = [(node * x).requires_grad_() for x in states]
            slopes = torch.autograd.grad(head(scaled, masks).a_out[:, k].sum(), scaled)
            for total, slope, x in zip(expected, slopes, states):
                total += weight * (slope * x).sum(-1)
        for of_layer, total in zip(found.inputs, expected):
            torch.testing.assert_close(of_layer[..., k].double(), total, rtol=1e-5, atol=1e-6)


def test_a_hidden_unit_that_gains_nothing_is_divided_too(shake):
    """Terms that cancel: their sum is what the secant would be divided by."""
    head = shaken(ScalarMixHead(hidden_sizes=[5], n_out=N_OUT, d_inp=4), shake)
    (states,) = some_states((1, 5))
    states = torch.cat([states, -states], dim=1)
    found = compute_credits(head, [states], [torch.ones(2, 2)])
    torch.testing.assert_close(found.scores, found.baseline)
    assert found.inputs[0].isfinite().all() and found.inputs[0].abs().max() > 1e-3
    torch.testing.assert_close(found.inputs[0].sum(1), torch.zeros(2, N_OUT).to(found.inputs[0]), rtol=0, atol=1e-6)


def test_a_head_that_explains_nothing_is_refused():
    (states,) = some_states((4, 5))
    with pytest.raises(ValueError, match=r"A VectorRoutingHead has no credits.*one of the heads token_depth, .*linear"):
        compute_credits(VectorRoutingHead(hidden_sizes=[5], n_out=2), [states], [torch.ones(2, 4)])
    with pytest.raises(ValueError, match="A TokenDepthHead has no credits"):
        compute_credits(TokenDepthHead(hidden_sizes=[5], n_out=None), [states], [torch.ones(2, 4)])


# Texts


def test_texts(make_model, tokenizer):
    model = make_model().train()
    texts = ["the film is good", ("the plot", "was not bad"), "dull"]
    explanations = explain(model, texts, tokenizer, batch_size=2)
    assert model.training
    model.eval()
    for text, explanation in zip(texts, explanations):
        pair = (text,) if isinstance(text, str) else text
        logits = model(**tokenizer(*pair, return_tensors="pt")).logits[0].detach()
        torch.testing.assert_close(explanation.logits, logits)
        torch.testing.assert_close(explanation.parts.sum(0), logits)
        torch.testing.assert_close(explanation.probabilities, logits.softmax(0))
        assert explanation.predicted == int(logits.argmax())
        assert explanation.by_token_and_layer().shape == (len(explanation.tokens), 3, 3)
        words = explanation.by_word()
        assert [word.text for word in words] == " ".join(pair).split()
        is_word = ~torch.tensor(explanation.is_special)
        torch.testing.assert_close(
            sum(word.credit for word in words), explanation.by_token()[is_word].sum(0), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(explanation.by_layer().sum(0), explanation.by_token().sum(0), rtol=1e-4, atol=1e-6)
    assert explanations[1].text == "the plot\twas not bad"
    assert explanations[0].tokens == ("[CLS]", "the", "film", "is", "good", "[SEP]")
    (alone,) = explain(model, "dull", tokenizer)
    torch.testing.assert_close(alone.by_token(), explanations[2].by_token(), rtol=1e-4, atol=1e-6)  # padding has none


def test_tokens_of_bytes_are_shown_as_text(make_model):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    text = "the film was great  así\n"
    of_bytes = Tokenizer(models.BPE())
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=36, special_tokens=["<s>"], show_progress=False)
    of_bytes.train_from_iterator([text] * 9, trainer)
    of_bytes.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<s>")
    assert tokenizer.tokenize(text) == ["the", "Ġfilm", "Ġwas", "Ġgreat", "Ġ", "ĠasÃŃ", "Ċ"]
    (explanation,) = explain(make_model("gpt2"), text, tokenizer)
    assert explanation.tokens == ("<s>", "the", "film", "was", "great", "", "así", "")
    assert [word.text for word in explanation.by_word()] == ["the", "film", "was", "great", " ", "así", "\n"]


def test_the_tokenizer_is_found_where_the_model_is(make_model, tokenizer, tmp_path):
    model = make_model()
    with pytest.raises(OSError, match=r"There is no processor in .*; pass it: explain\(model, inputs, processor\)"):
        explain(model, "dull")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (explanation,) = explain(CapsuleHeadForSequenceClassification.from_pretrained(tmp_path), "dull")
    assert explanation.text == "dull"


def test_prepared_inputs(make_model, tokenizer):
    model = make_model()
    batch = tokenizer(["the film is good", "dull"], padding=True, return_tensors="pt")
    states, _ = model.compute_hidden_states(**batch)
    found = explain(model, batch)
    of_states = explain(model, {"hidden_states": states, "attention_mask": batch["attention_mask"]})
    expected = explain(model, ["the film is good", "dull"], tokenizer)
    for a, b, c in zip(found, of_states, expected):
        torch.testing.assert_close(a.by_token(), c.by_token())
        torch.testing.assert_close(b.by_token(), c.by_token())
        assert a.tokens is None
        with pytest.raises(ValueError, match="Words are not known: expected an explanation of a text"):
            a.by_word()
        with pytest.raises(ValueError, match="There is no image"):
            a.by_patch()


def test_a_backbone_that_merges_tokens(tokenizer):
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1, 1], "num_decoder_layers": 1}
    torch.manual_seed(0)
    model = CapsuleHeadForSequenceClassification.from_backbone(
        FunnelConfig(vocab_size=64, architectures=["FunnelModel"], **sizes),
        num_labels=3,
        d_inp=8,
        n_parts=6,
        freeze_backbone=False,
    )
    (explanation,) = explain(model, "the film is not good at all", tokenizer)
    assert explanation.tokens is None and explanation.text == "the film is not good at all"
    assert len({len(x) for x in explanation.credits}) > 1
    with pytest.raises(ValueError, match="Words are not known"):
        explanation.by_word()


def test_long_texts_in_windows(make_model, tokenizer):
    model = make_model(window_length=8, window_overlap=2, window_special_tokens=(1, 1))
    text = " ".join(["the", "film", "is", "not", "dull"] * 4)
    (explanation,) = explain(model, text, tokenizer)
    assert len(explanation.by_word()) == 20
    torch.testing.assert_close(explanation.parts.sum(0), explanation.logits)


def test_what_cannot_be_explained(make_model, backbone_dir, tokenizer):
    with pytest.raises(ValueError, match="this model is a regression, which has none; expected a classifier"):
        explain(make_model(num_labels=1, problem_type="regression"), "dull", tokenizer)
    with pytest.raises(TypeError, match="Input 1 is 3; expected a text, or a pair: a tuple of two"):
        explain(make_model(), ["dull", 3], tokenizer)
    with pytest.raises(ValueError, match="A VectorRoutingHead has no credits"):
        model = CapsuleHeadForSequenceClassification.from_backbone(
            backbone_dir(), num_labels=3, head_type="vector_routing"
        )
        explain(model, "dull", tokenizer)


@pytest.mark.parametrize("has_term", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"head_type": "linear"},
        {"head_type": "scalar_mix"},
        {"head_type": "attentive_pooling"},
        {"head_type": "attentive_pooling", "n_queries": 4},
        {"head_type": "gated_routing", "n_iters": 3},
    ],
    ids=str,
)
def test_texts_by_heads_without_capsules(backbone_dir, shake, tokenizer, fields, has_term):
    model = CapsuleHeadForSequenceClassification.from_backbone(
        backbone_dir(), num_labels=3, calibration_temperature=1.7, **fields
    )
    if has_term:
        model.add_linear_term()
    shake(model, scale=0.3)
    model.eval()
    texts = ["the film is good", "dull"]
    for text, explanation in zip(texts, explain(model, texts, tokenizer)):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0].detach()
        torch.testing.assert_close(explanation.logits, logits)
        assert explanation.by_token().abs().max() > 1e-3
        torch.testing.assert_close(explanation.baseline + explanation.by_layer().sum(0), logits)
        assert explanation.parts.shape == (0, 3) and (explanation.linear is not None) == has_term
        assert len(explanation.by_word()) == len(text.split())
    with pytest.raises(ValueError, match="has no parts to describe"):
        describe_parts(model, texts, tokenizer)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_credits_against_the_other_classes(make_model, tokenizer, problem_type):
    (explanation,) = explain(make_model(problem_type=problem_type), "dull", tokenizer)
    logits = explanation.logits.double().requires_grad_()
    probabilities = logits.sigmoid() if "multi" in problem_type else logits.softmax(0)
    torch.testing.assert_close(explanation.probabilities, probabilities.float())
    slopes = torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0] for x in probabilities.logit()])
    credits = explanation.by_token()
    torch.testing.assert_close(explanation.against_others(credits), credits @ slopes.float().T)


# Images

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def image_model(backbone, shake, **fields):
    torch.manual_seed(0)
    sizes = {"n_parts": 6} if "head_type" in fields else {"d_inp": 8, "n_parts": 6}
    fields = {"num_labels": N_OUT, **sizes, **fields}
    model = CapsuleHeadForImageClassification.from_backbone(backbone, **fields)
    shake(model.head)
    return model.eval()


def test_patches_of_a_vit(shake):
    model = image_model(ViTConfig(image_size=24, patch_size=8, **SMALL), shake, freeze_backbone=False)
    image = Image.effect_noise((30, 30), 60).convert("RGB")
    processor = ViTImageProcessor(size={"height": 24, "width": 24})
    (explanation,) = explain(model, image, processor)
    assert explanation.image is image and explanation.tokens is None
    grid = explanation.by_patch()
    assert grid.shape == (3, 3, N_OUT)
    torch.testing.assert_close(grid.flatten(0, 1), explanation.by_token()[1:])  # all but the class token
    torch.testing.assert_close(explanation.parts.sum(0), explanation.logits)


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_patches_of_hierarchical_backbones(shake, kind):
    if kind == "swin":
        sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
        backbone = SwinConfig(image_size=32, patch_size=4, **sizes)
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        backbone = ResNetConfig(**sizes)
    model = image_model(backbone, shake, freeze_backbone=False)
    generator = torch.Generator().manual_seed(0)
    (explanation,) = explain(
        model,
        [torch.rand(3, 32, 32, generator=generator)],
        ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False),
    )
    grid = explanation.by_patch()
    assert grid.shape == (8, 8, N_OUT)
    torch.testing.assert_close(grid.sum((0, 1)), explanation.by_layer().sum(0), rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"Hidden states have 64, .* tokens, by layer.*use by_patch\(\) or by_layer\(\)"
    ):
        explanation.by_token()


def test_positions_of_a_feature_map(shake):
    model = image_model(
        StereoConvConfig(hidden_sizes=[4] * 6), shake, head_type="spatial_pose", freeze_backbone=False, d_cov=2, d_cap=2
    )
    (explanation,) = explain(model, Image.effect_noise((192, 96), 60).convert("L"), StereoImageProcessor())
    rows, columns, _ = explanation.by_patch().shape
    assert rows == columns and rows * columns == len(explanation.by_token())
    assert explanation.image.shape == (96, 96)  # the left view: two channels are no colours


def test_a_batch_in_one_array_is_refused(shake):
    model = image_model(ViTConfig(image_size=24, patch_size=8, **SMALL), shake, freeze_backbone=False)
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, do_rescale=False)
    with pytest.raises(ValueError, match="The processor made 2 samples of 1 inputs; expected one sample of each input"):
        explain(model, np.zeros((2, 3, 24, 24), np.float32), processor)


def test_tokens_that_make_no_grid(make_model, shake):
    model = image_model(ViTConfig(image_size=24, patch_size=8, **SMALL), shake, freeze_backbone=False)
    (explanation,) = explain(model, torch.rand(3, 24, 24), ViTImageProcessor(size={"height": 24, "width": 24}))
    odd = type(explanation)(**{**vars(explanation), "credits": tuple(x[:8] for x in explanation.credits)})
    with pytest.raises(ValueError, match=r"8 tokens make no grid of the shape of the image, 24x24 pixels"):
        odd.by_patch()


# Audio

RATE = 8_000  # not the 16,000 of most feature extractors


def audio_model(backbone, shake):
    torch.manual_seed(0)
    fields = {"num_labels": N_OUT, "d_inp": 8, "n_parts": 6, "freeze_backbone": False}
    model = CapsuleHeadForAudioClassification.from_backbone(backbone, **fields)
    shake(model.head)
    return model.eval()


@pytest.fixture
def waves(shake):
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4}
    return audio_model(Wav2Vec2Config(num_conv_pos_embedding_groups=2, **convolutions, **SMALL), shake)


def noise(n_samples, seed=0):
    return np.random.default_rng(seed).normal(size=n_samples).astype(np.float32)


@pytest.mark.parametrize("as_array", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_audio(waves, as_array, tmp_path):
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    waves.save_pretrained(tmp_path, head_only=False)
    extractor.save_pretrained(tmp_path)  # explain finds it beside the model, and the sampling rate in it
    model = CapsuleHeadForAudioClassification.from_pretrained(tmp_path)
    sounds = [noise(400), noise(100, seed=1)]
    explanations = explain(model, [as_array(samples) for samples in sounds])
    for samples, explanation in zip(sounds, explanations):
        inputs = extractor(samples, sampling_rate=RATE, return_tensors="pt")
        logits = model(**inputs).logits[0].detach()
        torch.testing.assert_close(explanation.logits, logits)  # without padding: as if it were alone
        torch.testing.assert_close(explanation.parts.sum(0), logits)
        n_frames = model.backbone(**inputs).last_hidden_state.shape[1]
        assert explanation.by_token_and_layer().shape == (n_frames, 3, N_OUT)
        assert explanation.tokens is None and explanation.image is None
    (alone,) = explain(model, as_array(sounds[1]), extractor)
    torch.testing.assert_close(alone.by_token(), explanations[1].by_token())


def test_audio_as_a_spectrum_of_one_length(shake):
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    backbone = WhisperConfig(
        d_model=16, num_mel_bins=6, max_source_positions=50, vocab_size=64, encoder_ffn_dim=24, **sizes, **tokens
    )
    extractor = WhisperFeatureExtractor(feature_size=6, chunk_length=1)
    explanations = explain(audio_model(backbone, shake), [noise(4_000), noise(16_000)], extractor)
    assert [len(x.by_token()) for x in explanations] == [13, 50]  # of 25 and 100 spectra, without padding
