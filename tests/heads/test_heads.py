import math
import re

import pytest
import torch

from capsule_heads.heads import (
    AttentivePoolingHead,
    HeadOutput,
    LinearHead,
    ScalarMixHead,
    SpatialPoseHead,
    TokenDepthHead,
    VectorRouting,
)

BATCH, TOKENS = 2, 6
N_DEPTHS, WIDTH = 3, 10
SIZES = {"hidden_sizes": [WIDTH] * N_DEPTHS, "d_inp": 8, "n_parts": 5, "d_cap": 2}
INF = math.inf


def build(n_out=4, dtype=torch.float64, **options):
    """A small head in which no parameter is zero or one, so that each of them matters."""
    torch.manual_seed(0)
    head = TokenDepthHead(n_out=n_out, **(SIZES | options)).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return head


def draw(dtype=torch.float64, tokens=TOKENS):
    torch.manual_seed(1)
    hidden_states = torch.randn(N_DEPTHS, BATCH, tokens, WIDTH, dtype=dtype)
    mask = torch.ones(BATCH, tokens, dtype=dtype)
    mask[0, 4:], mask[1, 2] = 0, 0.3  # padding, and a share of a token, as mixup makes it
    return hidden_states, mask


def relative(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def straightforward(head, hidden_states, mask):
    """Section 2 of the specification, capsule by capsule."""
    (detector,) = head.detect_parts
    affine, norm = detector.affine, detector.norm
    n_depth = len(hidden_states)
    capsules, scores = [], []
    for token in range(mask.shape[1]):
        for layer in range(n_depth):
            x = (hidden_states[layer][:, token] + detector.depth_emb[layer]) @ affine.weight.T + affine.bias
            x = x / (1 + torch.exp(-x))
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
            capsules.append((x * norm.weight + norm.bias).unsqueeze(-2))
            scores.append(torch.log(mask[:, token]) - torch.log(1 - mask[:, token]))
    a, x, R = torch.stack(scores, dim=1), torch.stack(capsules, dim=1), []
    for routing in head.routings:
        a, x, sig2, probabilities = routing(a, x, return_R=True)
        R.append(probabilities)
    return a, x, sig2, R


@pytest.mark.parametrize(
    "n_out, published, shapes",
    [(5, 140_480, {"W": (64, 5, 2, 2), "beta_use": (64, 5)}), (2, 138_944, {"W": (64, 2, 2, 2), "beta_use": (64, 2)})],
)
def test_number_of_parameters_is_that_of_the_paper(n_out, published, shapes):
    with torch.device("meta"):
        head = TokenDepthHead(hidden_sizes=[1280] * 37, n_out=n_out)
    assert sum(parameter.numel() for parameter in head.parameters()) == published
    assert {name: tuple(getattr(head.routings[1], name).shape) for name in shapes} == shapes


@pytest.mark.parametrize("n_out", [4, None])
@pytest.mark.parametrize("options", [{}, {"p_model": "skm", "n_iters": 2, "single_beta": True, "eps": 0.1}], ids=str)
def test_agrees_with_the_straightforward_computation(options, n_out):
    head = build(n_out, **options)
    hidden_states, mask = draw()
    output = head(hidden_states.unbind(0), mask, return_routing_probabilities=True)
    a, x, sig2, R = straightforward(head, hidden_states, mask)
    assert isinstance(output, HeadOutput)
    assert output.a_out.shape == (BATCH, n_out or SIZES["n_parts"])
    assert output.mu_out.shape == output.sig2_out.shape == (BATCH, n_out or SIZES["n_parts"], 1, SIZES["d_cap"])
    assert len(output.routing_probabilities) == len(R) == (1 if n_out is None else 2)
    for actual, expected in zip((*output[:3], *output.routing_probabilities), (a, x, sig2, *R), strict=True):
        assert relative(actual, expected) <= 1e-12

    parameters = dict(head.named_parameters())
    cotangents = [torch.randn_like(part) for part in (a, x, sig2)]
    actual = torch.autograd.grad(output[:3], parameters.values(), cotangents)
    expected = torch.autograd.grad((a, x, sig2), parameters.values(), cotangents)
    for name, got, wanted in zip(parameters, actual, expected, strict=True):
        assert wanted.any(), name
        assert relative(got, wanted) <= 1e-10, name


def test_options_reach_both_routings():
    options = {"n_iters": 2, "p_model": "skm", "single_beta": True, "eps": 0.1}
    for routing in build(**options).routings:
        assert {name: getattr(routing, name) for name in options} == options


@pytest.mark.parametrize("strategy", ["reference", "moments", "votes"])
def test_any_strategy_serves_the_head(strategy):
    hidden_states, mask = draw()
    head, auto = build(strategy=strategy), build()
    outputs = [h(hidden_states, mask, return_routing_probabilities=True) for h in (head, auto)]
    for a, e in zip((*outputs[0][:3], *outputs[0][3]), (*outputs[1][:3], *outputs[1][3]), strict=True):
        assert relative(a, e) <= 1e-9
    assert [routing.strategy for routing in head.routings] == [strategy, "auto"]  # each part has its own weights


def test_routing_probabilities_only_where_asked_for():
    assert build()(draw()[0], draw()[1]).routing_probabilities is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    head = build()
    hidden_states, mask = draw()
    shorter = head(hidden_states, mask)
    garbage, none = 50 * torch.randn_like(hidden_states), torch.zeros_like(mask)
    pairs = (garbage, hidden_states), (none, mask)
    padded = head(
        *(torch.cat(pair if side == "left" else pair[::-1], dim=-1 if pair[0] is none else 2) for pair in pairs)
    )
    for a, b in zip(padded[:3], shorter[:3]):
        assert relative(a, b) <= 1e-12


def test_a_sample_of_padding_alone_is_finite():
    head = build(dtype=torch.float32)
    hidden_states, mask = draw(torch.float32)
    mask[0] = 0
    hidden_states.requires_grad_()
    output = head(hidden_states, mask)
    (output.a_out.sum() + output.mu_out.sum() + output.sig2_out.sum()).backward()
    gradients = [hidden_states.grad, *(parameter.grad for parameter in head.parameters())]
    assert all(x.isfinite().all() for x in (*output[:3], *gradients))
    assert not hidden_states.grad[:, 0].any() and hidden_states.grad[:, 1].any()


def test_capsules_are_ordered_by_token_then_depth():
    head = build()
    hidden_states, mask = draw()
    token = 5
    assert not mask[0, token]  # so it changes no row of R but its own
    before = head(hidden_states, mask, True).routing_probabilities[0][0]
    for layer in range(N_DEPTHS):
        changed = hidden_states.clone()
        changed[layer, 0, token] += 1
        after = head(changed, mask, True).routing_probabilities[0][0]
        rows = (after != before).any(-1).nonzero().flatten().tolist()
        assert rows == [token * N_DEPTHS + layer]


def test_initialisation():
    torch.manual_seed(0)
    head = TokenDepthHead(hidden_sizes=[1000] * 4, n_out=3)
    fresh = {name: parameter.clone() for name, parameter in head.named_parameters()}
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(7.0)
    head.reset_parameters()
    for parameters in (fresh, dict(head.named_parameters())):
        weight = parameters.pop("detect_parts.0.affine.weight")  # Kaiming normal
        std = math.sqrt(2 / 1000)
        assert abs(weight.mean()) < 5 * std / math.sqrt(weight.numel())
        assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * weight.numel())
        assert (weight.abs().max() / std).item() > 3  # no uniform distribution
        assert (parameters.pop("detect_parts.0.norm.weight") == 1).all()
        W = parameters.pop("routings.0.W")
        assert abs(W.std() * 64 - 1) < 5 / math.sqrt(2 * W.numel())
        assert parameters.pop("routings.1.W").any()
        for name, parameter in parameters.items():
            assert not parameter.any(), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_dtype(dtype):
    head = build()
    hidden_states, mask = draw()
    mask = mask.round()
    assert torch.equal(head(hidden_states, mask.to(dtype)).a_out, head(hidden_states, mask).a_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_the_logits_of_the_mask_in_float32(dtype):
    head = build(dtype=dtype)
    hidden_states, mask = draw(torch.float32)
    scores = []
    head.routings[0].register_forward_pre_hook(lambda module, args: scores.append(args[0]))
    output = head(hidden_states.to(dtype), mask)
    assert scores[0].dtype == output.a_out.dtype == torch.float32
    expected = {0.0: -INF, 1.0: INF, mask[1, 2].item(): math.log(0.3 / 0.7)}
    for sample in range(BATCH):
        wanted = [expected[m] for m in mask[sample].tolist() for _ in range(N_DEPTHS)]
        assert scores[0][sample].tolist() == pytest.approx(wanted, rel=1e-6)


def test_autocast_touches_only_the_affine_map():
    head = build(dtype=torch.float32)
    hidden_states, mask = draw(torch.float32)
    received = []
    head.routings[0].register_forward_pre_hook(lambda module, args: received.append(args))
    plain = head(hidden_states, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = head(hidden_states, mask)
    again = head.routings[1](*head.routings[0](*received[1])[:2])
    assert not torch.equal(cast.a_out, plain.a_out)  # autocast did something
    assert all(torch.equal(a, b) for a, b in zip(cast[:3], again))
    assert all(x.dtype == torch.float32 for x in cast[:3])


@pytest.mark.parametrize("n_depth", [2, 4])
def test_another_number_of_hidden_states_is_an_error(n_depth):
    hidden_states, mask = draw()
    with pytest.raises(ValueError, match=rf"{n_depth} hidden states were passed to a head built for 3; expected"):
        build()([hidden_states[0]] * n_depth, mask)


def test_a_mask_of_another_shape_is_an_error():
    hidden_states, mask = draw()
    with pytest.raises(ValueError, match=r"shape \(2, 6, 10\) and its mask \(2, 5\); expected \[batch, tokens, 10\]"):
        build()(hidden_states, mask[:, 1:])


@pytest.mark.parametrize("hidden_sizes", [[WIDTH] * 3, [WIDTH, 6, WIDTH]], ids=["one width", "two widths"])
def test_mixing_behind_the_affine_map_is_mixing_hidden_states(hidden_sizes):
    head = build(hidden_sizes=hidden_sizes)
    _, mask = draw()
    hidden_states = [torch.randn(BATCH, TOKENS, width, dtype=torch.float64) for width in hidden_sizes]

    def mix(x):
        return torch.lerp(x.flip(0), x, 0.3)

    actual = head(hidden_states, mask, mix=mix)
    expected = head([mix(x) for x in hidden_states], mask)
    for x, y in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y)
    assert relative(head(hidden_states, mask).a_out, expected.a_out) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_computed_with_in_the_heads_precision_and_kept_as_they_are(dtype):
    hidden_states, mask = draw(torch.float32)
    half = [x.to(dtype) for x in hidden_states]
    head = build(dtype=torch.float32)

    def gradients(states):
        head.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            output = head(states, mask)
        output.a_out.square().sum().backward()
        kept = [x.dtype for x in kept if x.shape[-1] == WIDTH and x.numel() == half[0].numel()]  # flattened or not
        return output.a_out, [p.grad.clone() for p in head.parameters()], kept

    expected, expected_gradients, kept = gradients([x.float() for x in half])
    assert kept == [torch.float32] * N_DEPTHS
    actual, actual_gradients, kept = gradients(half)
    assert kept == [dtype] * N_DEPTHS
    torch.testing.assert_close(actual, expected)
    for x, y in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(head(half, mask).a_out, expected)


def test_half_precision_states_that_need_a_gradient_get_it():
    hidden_states, mask = draw(torch.float32)
    half = [x.half().requires_grad_() for x in hidden_states]
    whole = [x.detach().float().requires_grad_() for x in half]
    head = build(dtype=torch.float32)
    for states in (half, whole):
        head(states, mask).a_out.sum().backward()
    for x, y in zip(half, whole, strict=True):
        torch.testing.assert_close(x.grad.float(), y.grad, rtol=2e-3, atol=1e-4)


def test_nothing_as_large_as_all_hidden_states_is_made():
    width, tokens, n_layers = 256, 32, 12
    head = build(hidden_sizes=[width] * n_layers, dtype=torch.float32)
    states = [torch.randn(BATCH, tokens, width) for _ in range(n_layers)]
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor))
            return output

    mask = torch.ones(BATCH, tokens)
    for given in (states, [x.half() for x in states]):
        sizes.clear()
        with Recorder():
            head(given, mask, mix=lambda x: torch.lerp(x.flip(0), x, 0.3)).a_out.sum().backward()
        assert len(sizes) > 50
        assert max(sizes) <= BATCH * tokens * width  # of one layer


STATES = [torch.zeros(2, 5, 8)] * 2
MASK = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("hidden_states", "mask", "error", "said"),
    [
        (None, MASK, TypeError, "hidden_states is a NoneType; expected a sequence of tensors."),
        (["a", "b"], MASK, ValueError, "The hidden states are 2 of str and the masks 2 of Tensor; expected tensors"),
        (STATES, None, ValueError, "The hidden states are 2 of Tensor and the masks 0 of nothing; expected tensors"),
        (STATES, [MASK], ValueError, "The hidden states are 2 of Tensor and the masks 1 of Tensor; expected tensors"),
        (STATES, MASK.to("meta"), ValueError, "A hidden state is on cpu and its mask on meta; expected both on one"),
    ],
)
def test_inputs_that_are_none(hidden_states, mask, error, said):
    with pytest.raises(error, match=re.escape(said)):
        TokenDepthHead(hidden_sizes=[8, 8], n_out=3, d_inp=4, n_parts=5)(hidden_states, mask)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: TokenDepthHead(hidden_sizes=[], n_out=3),
            "hidden_sizes is []; expected the size of each hidden state",
        ),
        (lambda: TokenDepthHead(hidden_sizes=8, n_out=3), "hidden_sizes is 8; expected the size of each hidden state"),
        (
            lambda: TokenDepthHead(hidden_sizes=[8, 0.5], n_out=3),
            "hidden_sizes[1] is 0.5; expected a positive whole number.",
        ),
        (lambda: TokenDepthHead(hidden_sizes=[8], n_out=3, d_inp=-1), "d_inp is -1; expected a positive whole number."),
        (lambda: TokenDepthHead(hidden_sizes=[8], n_out=True), "n_out is True; expected a positive whole number"),
        (
            lambda: SpatialPoseHead(hidden_sizes=[8, 8], n_out=3),
            "hidden_sizes has 2 sizes; this head takes 1 hidden state.",
        ),
        (
            lambda: SpatialPoseHead(hidden_sizes=[8], n_out=3, n_parts=0),
            "n_parts is 0; expected a positive whole number.",
        ),
        (
            lambda: LinearHead(hidden_sizes=[8, 8], n_out=3),
            "hidden_sizes has 2 sizes; this head takes 1 hidden state.",
        ),
        (
            lambda: LinearHead(hidden_sizes=[8], n_out=3, pooling="max"),
            "pooling is 'max'; expected one of mean, first, last.",
        ),
        (
            lambda: AttentivePoolingHead(hidden_sizes=[8], n_out=None),
            "n_out is None, and AttentivePoolingHead has no parts to stop at",
        ),
        (lambda: ScalarMixHead(hidden_sizes=[8], n_out=3, d_inp=0), "d_inp is 0; expected a positive whole number."),
        (lambda: VectorRouting(n_out=3, d_inp=0, d_out=2), "d_inp is 0; expected a positive whole number."),
        (
            lambda: VectorRouting(n_out=3, d_inp=4, d_out=2)(torch.zeros(2, 5, 3)),
            "x_inp has shape (2, 5, 3); expected [..., n_inp, d_inp=4].",
        ),
        (
            lambda: TokenDepthHead(hidden_sizes=[8], n_out=3).routings[0](
                torch.zeros(5), torch.zeros(5, 1, 64, device="meta")
            ),
            "The tensors include a_inp on cpu, mu_inp on meta, W on cpu, B on cpu; expected all tensors on one device",
        ),
    ],
)
def test_sizes_and_devices_that_do_not_fit(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
