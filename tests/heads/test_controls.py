"""Control heads against literal computations in float64, and what all of them have in common."""

import dataclasses
import itertools
import math

import pytest
import torch
from configurations import make_config
from transformers import BertConfig

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleHeadModel
from capsule_heads.heads import (
    AttentivePoolingHead,
    GatedRoutingHead,
    LinearHead,
    ScalarMixHead,
    VectorRouting,
    VectorRoutingHead,
    get_head,
)

N_OUT, WIDTH, D_INP = 3, 5, 4
MAKE = {
    "mean": lambda: LinearHead(hidden_sizes=[WIDTH], n_out=N_OUT),
    "first": lambda: LinearHead(hidden_sizes=[WIDTH], n_out=N_OUT, pooling="first"),
    "last": lambda: LinearHead(hidden_sizes=[WIDTH], n_out=N_OUT, pooling="last"),
    "scalar_mix": lambda: ScalarMixHead(hidden_sizes=[WIDTH] * 2, n_out=N_OUT, d_inp=D_INP),
    "attentive_pooling": lambda: AttentivePoolingHead(hidden_sizes=[WIDTH] * 2, n_out=N_OUT, d_inp=D_INP),
    "several queries": lambda: AttentivePoolingHead(hidden_sizes=[WIDTH] * 2, n_out=N_OUT, d_inp=D_INP, n_queries=2),
    "gated_routing": lambda: GatedRoutingHead(hidden_sizes=[WIDTH] * 2, n_out=N_OUT, d_inp=D_INP, n_parts=6, n_iters=3),
    "vector_routing": lambda: VectorRoutingHead(hidden_sizes=[WIDTH] * 2, n_out=N_OUT, d_inp=D_INP, n_parts=6),
}
HEAD_TYPES = {
    "mean": {"head_type": "linear"},
    "first": {"head_type": "linear", "pooling": "first"},
    "last": {"head_type": "linear", "pooling": "last"},
    **{name: {"head_type": name} for name in ("scalar_mix", "attentive_pooling", "gated_routing", "vector_routing")},
    "several queries": {"head_type": "attentive_pooling", "n_queries": 2},
    "one iteration": {"head_type": "token_depth", "n_iters": 1},
}


@torch.no_grad()
def make_head(name):
    torch.manual_seed(0)
    head = MAKE[name]().double()
    for parameter in head.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return head


def some_states(head, n_tokens=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, n_tokens, width, generator=generator, dtype=torch.float64) for width in head.hidden_sizes]


def literal(name, head, states):
    """The scores of one text without padding, `states` being `[tokens, width]` per layer."""
    if name in ("mean", "first", "last"):
        (x,) = states
        pooled = {"mean": x.mean(0), "first": x[0], "last": x[-1]}[name]
        return head.affine.weight @ pooled + head.affine.bias
    if name == "scalar_mix":
        shares = [math.exp(w) for w in head.w.tolist()]
        x = head.gamma * sum(share * x for share, x in zip(shares, states)) / sum(shares)
        hidden = head.hidden.weight @ x.mean(0) + head.hidden.bias
        return head.affine.weight @ (hidden / (1 + torch.exp(-hidden))) + head.affine.bias
    (detector,) = head.detect_parts
    vectors = []
    for token in range(len(states[0])):
        for layer, x in enumerate(states):
            y = detector.affine.weight @ (x[token] + detector.depth_emb[layer]) + detector.affine.bias
            vectors.append(detector.norm(y / (1 + torch.exp(-y))))
    x = torch.stack(vectors)
    if name == "attentive_pooling":
        weights = torch.exp(x @ head.query / math.sqrt(D_INP))
        return head.affine.weight @ ((weights / weights.sum()) @ x) + head.affine.bias
    if name == "several queries":
        found = []
        for query, values in zip(head.query, x.split(D_INP // 2, dim=1)):
            weights = torch.exp(x @ query / math.sqrt(D_INP))
            found.append((weights / weights.sum()) @ values)
        return head.affine.weight @ torch.cat(found) + head.affine.bias
    if name == "gated_routing":
        return literal_gated_routing(head, x)
    parts = literal_vector_routing(head.to_parts, x)[0]
    return literal_vector_routing(head.to_classes, parts)[0][:, 0]


def literal_gated_routing(head, x):
    """Compute densities by torch's normal distribution, of one part at a time."""
    n_parts, gate = len(head.log_prior), torch.exp(x @ head.query / math.sqrt(D_INP))
    gate = gate / gate.sum()
    votes = [[y @ head.W_votes[:, :, j] + head.B_votes[:, j] for j in range(n_parts)] for y in x]
    R = torch.full((len(x), n_parts), 1 / n_parts, dtype=x.dtype)
    for _ in range(head.options.n_iters - 1):
        logits = []
        for j in range(n_parts):
            of_j = torch.stack([row[j] for row in votes])
            n = (gate * R[:, j]).sum()
            share = (gate * R[:, j] / n)[:, None]
            mu = (share * of_j).sum(0)
            spread = ((share * (of_j - mu) ** 2).sum(0) + 1e-3).sqrt()
            density = torch.distributions.Normal(mu, spread).log_prob(of_j).sum(1)
            logits.append(n.log() + head.log_prior[j] + head.sharpness * density)
        R = torch.stack(logits, dim=1).softmax(1)
    score = head.bias
    for i, j in itertools.product(range(len(x)), range(n_parts)):
        score = score + gate[i] * R[i, j] * (head.W_out[j] @ x[i] + head.B_out[j])
    return score


def literal_vector_routing(routing, x):
    """With all votes, one input and output at a time."""
    n, n_out = len(x), len(routing.W_F1)
    d_out = routing.d_out
    of = lambda parameter, i: parameter[i if len(parameter) == n and routing.n_inp else 0]  # noqa: E731
    z = x / math.sqrt(n)
    f = [torch.sigmoid(z[i] @ of(routing.W_A, i) + of(routing.B_A, i)) for i in range(n)]
    votes = [[(routing.W_F1[j] * z[i]) @ routing.W_F2 + routing.B_F2[j] for j in range(n_out)] for i in range(n)]
    if routing.n_inp:
        use, ignore = routing.beta_use, routing.beta_ign
    else:
        use, ignore = x @ routing.beta_use + routing.B_use, x @ routing.beta_ign + routing.B_ign

    def normalised(y):
        return (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 1e-5) if d_out > 1 else y

    y = None
    for _ in range(routing.n_iters):
        if y is None:
            R = torch.full((n, n_out), 1 / n_out, dtype=x.dtype)
        else:
            predicted = [routing.W_G2[j] * (normalised(y[j]) @ routing.W_G1) + routing.B_G2[j] for j in range(n_out)]
            S = torch.stack(
                [
                    torch.stack(
                        [(x[i] @ predicted[j]) * of(routing.W_S, i)[j] + of(routing.B_S, i)[j] for j in range(n_out)]
                    )
                    for i in range(n)
                ]
            )
            S = torch.log(1 / (1 + torch.exp(-S)))
            R = torch.exp(S) / torch.exp(S).sum(1, keepdim=True)
        credit = torch.stack(
            [
                torch.stack([use[i, j] * f[i] * R[i, j] - ignore[i, j] * f[i] * (1 - R[i, j]) for j in range(n_out)])
                for i in range(n)
            ]
        )
        y = [sum(credit[i, j] * votes[i][j] for i in range(n)) for j in range(n_out)]
    return torch.stack([normalised(vector) for vector in y]), credit


@pytest.mark.parametrize("name", MAKE)
def test_scores_are_those_of_a_literal_computation(name):
    head = make_head(name)
    states = some_states(head)
    scores = head(states, torch.ones(2, 6, dtype=torch.float64)).a_out
    expected = torch.stack([literal(name, head, [x[row] for x in states]) for row in range(2)])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes", [{"d_out": 3}, {"d_out": 1, "n_inp": 7}, {"d_out": 2, "n_iters": 4, "n_inp": 7}], ids=str
)
def test_vector_routing_and_its_gradients(sizes):
    torch.manual_seed(0)
    routing = VectorRouting(n_out=4, d_inp=5, **sizes).double()
    with torch.no_grad():
        for parameter in routing.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    x_out, credits = routing(x)
    expected = literal_vector_routing(routing, x)
    torch.testing.assert_close(x_out, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(credits, expected[1], rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(x_out)
    tensors = [x, *routing.parameters()]
    found = torch.autograd.grad((x_out * cotangent).sum(), tensors)
    wanted = torch.autograd.grad((expected[0] * cotangent).sum(), tensors)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_gated_routing_gives_tokens_to_different_parts():
    head = make_head("gated_routing")
    states, mask = some_states(head), torch.ones(2, 6, dtype=torch.float64)
    R = head(states, mask, return_routing_probabilities=True).routing_probabilities[0]
    assert R.shape == (2, 12, 6) and R.std(1).max() > 0.05  # tokens go to different parts
    torch.testing.assert_close(R.sum(-1), torch.ones_like(R.sum(-1)))


@pytest.mark.parametrize("name", MAKE)
def test_padding_changes_nothing(name):
    head = make_head(name)
    states = some_states(head, 4)
    expected = head(states, torch.ones(2, 4)).a_out
    for before, after in ((0, 3), (2, 0)):
        padded = [torch.nn.functional.pad(x, (0, 0, before, after), value=9.0) for x in states]
        mask = torch.nn.functional.pad(torch.ones(2, 4), (before, after))
        torch.testing.assert_close(head(padded, mask).a_out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_all_masked_is_finite(name):
    head = make_head(name)
    scores = head(some_states(head), torch.zeros(2, 6)).a_out
    assert scores.isfinite().all()
    scores.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("first", "last")])
def test_the_order_of_tokens_does_not_matter(name):
    head = make_head(name)
    states = some_states(head)
    mask = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    found = head([x[:, order] for x in states], mask[:, order]).a_out
    torch.testing.assert_close(found, head(states, mask).a_out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_half_precision_and_mixup(name):
    head = make_head(name).float()
    states = [x.half() for x in some_states(head)]
    ratio = torch.tensor([0.3, 0.8])[:, None]

    def mix(x):
        share = ratio.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return share * x + (1 - share) * x.flip(0)

    mask = mix(torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2]))
    found = head(states, mask, mix=mix).a_out
    expected = head([mix(x.float()) for x in states], mask).a_out
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


# In models


def make_model(**fields):
    torch.manual_seed(0)
    has = {field.name for field in dataclasses.fields(get_head(fields["head_type"]).Options)}
    sizes = {name: size for name, size in {"d_inp": D_INP, "n_parts": 6}.items() if name in has}
    fields = {"hidden_sizes": [WIDTH] * 3, "num_labels": 3, **sizes, **fields}
    return CapsuleHeadForSequenceClassification(make_config(BertConfig(), head_only=True, **fields), build=False)


@pytest.mark.parametrize("name", HEAD_TYPES)
def test_saved_and_loaded(name, tmp_path):
    model = make_model(**HEAD_TYPES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    states = [torch.randn(2, 4, WIDTH) for _ in model.config.layers]
    mask = torch.ones(2, 4)
    model.save_pretrained(tmp_path)
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path, load_backbone=False)
    assert type(loaded.head) is type(model.head)
    expected = model(hidden_states=states, attention_mask=mask).logits
    assert torch.equal(loaded(hidden_states=states, attention_mask=mask).logits, expected)


def test_one_iteration_is_uniform_routing():
    model = make_model(head_type="token_depth", n_iters=1).eval()
    states = [torch.randn(2, 4, WIDTH) for _ in range(3)]
    outputs = model(hidden_states=states, attention_mask=torch.ones(2, 4), output_routing=True)
    for R, n_out in zip(outputs.routing_probabilities, (6, 3)):
        torch.testing.assert_close(R, torch.full_like(R, 1 / n_out))


def test_scores_of_one_iteration_see_no_hidden_state():
    """A score is a sum over data used and ignored: with uniform routing, of their amount alone. Two iterations see."""
    mask = torch.ones(2, 4)
    for n_iters, is_blind in ((1, True), (2, False)):
        model = make_model(head_type="token_depth", n_iters=n_iters).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        first, second = (
            model(hidden_states=[torch.randn(2, 4, WIDTH) for _ in range(3)], attention_mask=mask).logits
            for _ in range(2)
        )
        assert torch.allclose(first, second, rtol=1e-5) == is_blind


@pytest.mark.parametrize("name", HEAD_TYPES)
def test_weights_are_drawn_anew_for_a_new_head(name):
    """Not left as they were allocated, when transformers builds on the meta device."""
    model, other = make_model(**HEAD_TYPES[name]), make_model(**HEAD_TYPES[name])
    for (key, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b) and a.isfinite().all(), key
    scores = model.eval()(hidden_states=[torch.randn(2, 4, WIDTH) for _ in model.config.layers]).logits
    assert scores.isfinite().all()
    if name != "vector_routing":  # whose scores the paper starts at random
        assert torch.equal(scores, torch.zeros_like(scores))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_type": "linear", "pooling": "max"}, r"pooling is 'max'; expected one of mean, first, last\."),
        (
            {"pooling": "first"},
            "pooling is 'first', and head_type=\"token_depth\" has no such option; expected one of n_",
        ),
        ({"head_type": "linear", "layers": [0, 1]}, 'head_type="linear" takes one hidden state'),
        ({"head_type": "vector_routing", "n_iters": 0}, "n_iters is 0"),
        (
            {"head_type": "attentive_pooling", "d_inp": 8, "n_queries": 3},
            "n_queries is 3, and d_inp 8; expected a divisor of d_inp",
        ),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(BertConfig(), hidden_sizes=[WIDTH] * 3, **fields)


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match='sizes 5, 6, 5; head_type="scalar_mix" adds them up, and expected one size'):
        make_model(head_type="scalar_mix", hidden_sizes=[5, 6, 5])
    with pytest.raises(
        ValueError, match=r"n_out is 1; expected 2 or more: a single output has nothing to compete with"
    ):
        make_model(head_type="vector_routing", num_labels=1)
    with pytest.raises(
        ValueError, match="n_out is None, and AttentivePoolingHead has no parts to stop at; load a classifier"
    ):
        CapsuleHeadModel(
            make_config(BertConfig(), hidden_sizes=[WIDTH] * 3, head_type="attentive_pooling"), build=False
        )
    with pytest.raises(ValueError, match="x_inp has 3 vectors; this layer was built for n_inp=4"):
        VectorRouting(n_out=2, d_inp=2, d_out=1, n_inp=4)(torch.randn(3, 2))


def test_iterations_are_the_papers_by_default():
    assert get_head("vector_routing").Options().n_iters == 2
    assert get_head("token_depth").Options().n_iters == 3
