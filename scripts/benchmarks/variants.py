"""Changes that might make the capsule heads better: heads for benchmarks, which the package does not have."""

import torch
import torch.nn.functional as F
from torch import nn

from capsule_heads.heads import HeadOutput, SpatialPoseHead, TokenDepthHead, register
from capsule_heads.ops.reference import Reference, _m_step


class RandomBetas(TokenDepthHead):
    """Initial betas from a normal distribution, not zeros: scores differ from the first step on."""

    def reset_parameters(self):
        super().reset_parameters()
        for routing in self.routings:
            nn.init.normal_(routing.beta_use)
            nn.init.normal_(routing.beta_ign)


class BetasOfOne(TokenDepthHead):
    """Initial betas of the routing to classes at one: scores depend on what classes use from the first step on."""

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.ones_(self.routings[1].beta_use)
        nn.init.ones_(self.routings[1].beta_ign)


class OrthogonalVotes(TokenDepthHead):
    """Initial votes for parts by orthogonal maps, as far as there are dimensions, and of the same size."""

    def reset_parameters(self):
        super().reset_parameters()
        W = self.routings[0].W  # [1,parts,d_inp,d_cap]
        size = W.norm()
        flat = torch.empty(W.shape[2], W.shape[1] * W.shape[3])
        nn.init.orthogonal_(flat)
        with torch.no_grad():
            W.copy_(flat.unflatten(1, (W.shape[1], W.shape[3])).movedim(0, 1))
            W.mul_(size / W.norm())


class StandardisedStates(TokenDepthHead):
    """Hidden states normalised to mean 0 and variance 1, at each layer and token."""

    def detect(self, hidden_states, masks, mix=None):
        return super().detect([F.layer_norm(x.float(), x.shape[-1:]) for x in hidden_states], masks, mix)


class GateOnInputs(TokenDepthHead):
    """A learned score of each input: its mask is multiplied by a gate that the vector itself opens."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.gate = nn.Linear(self.options.d_inp, 1)
        self.reset_gate()

    def reset_gate(self):
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 2.0)

    def reset_parameters(self):
        super().reset_parameters()
        self.reset_gate()

    def detect(self, hidden_states, masks, mix=None):
        a, x = super().detect(hidden_states, masks, mix)
        opened = (F.logsigmoid(a) + F.logsigmoid(self.gate(x).flatten(1))).exp()
        return torch.logit(opened.clamp(1e-12, 1 - 1e-6)).masked_fill(a == -torch.inf, -torch.inf), x


class AttentiveMeans(TokenDepthHead):
    """All inputs together one unit of data, shared by attention: scores of parts are means, not sums."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.query = nn.Parameter(torch.zeros(self.options.d_inp))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.query)
        for routing in self.routings:  # means of betas near 0 would all be near 0
            nn.init.normal_(routing.beta_use)
            nn.init.normal_(routing.beta_ign)

    def detect(self, hidden_states, masks, mix=None):
        a, x = super().detect(hidden_states, masks, mix)
        attention = (x.squeeze(-2) @ self.query) * len(self.query) ** -0.5 + F.logsigmoid(a)
        fractions = attention.softmax(-1).clamp(1e-12, 1 - 1e-6)  # not 0 or 1, whose logit has no derivative
        return torch.logit(fractions).masked_fill(a == -torch.inf, -torch.inf), x


class LayerDropout(TokenDepthHead):
    """Each layer is left out of a training step with a probability of 0.1."""

    def detect(self, hidden_states, masks, mix=None):
        if self.training:
            kept = (torch.rand(len(masks)) >= 0.1).tolist()
            masks = [mask * keep for mask, keep in zip(masks, kept)] if any(kept) else masks
        return super().detect(hidden_states, masks, mix)


class NormalisedParts(TokenDepthHead):
    """Poses of all parts normalised together, with a learned scale of each, before they are routed to classes."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.norm = nn.LayerNorm([self.options.n_parts, 1, self.options.d_cap])

    def score(self, hidden_states, masks, return_routing_probabilities, mix):
        a, mu, _ = self.routings[0](*self.detect(hidden_states, masks, mix))
        return HeadOutput(*self.routings[1](a, self.norm(mu)))


class BenefitsOfContent(TokenDepthHead):
    """Benefits of the routing to parts that are affine maps of the input's vector, as in Heinsen (2022)."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        d_inp, n_parts = self.options.d_inp, self.options.n_parts
        self.use, self.ignore = nn.Linear(d_inp, n_parts), nn.Linear(d_inp, n_parts)
        for unused in (self.routings[0].beta_use, self.routings[0].beta_ign):
            unused.requires_grad_(False)

    def score(self, hidden_states, masks, return_routing_probabilities, mix):
        a, x = self.detect(hidden_states, masks, mix)
        first, o = self.routings[0], self.options
        n = a.sigmoid().sum(-1)[:, None, None].clamp_min(1.0)  # benefits are of a mean: sums of these grow too large
        betas = (layer(x.squeeze(-2)) / n for layer in (self.use, self.ignore))
        options = {"n_out": o.n_parts, "n_iters": o.n_iters, "p_model": o.p_model, "eps": o.eps}
        a, mu, _, _ = Reference().route(a, x, first.W, first.B, *betas, **options, return_R=False)
        return HeadOutput(*self.routings[1](a, mu))


class PriorAndTemperature(TokenDepthHead):
    """A learned prior of each part, and a learned factor of the log-density of votes, in the routing to parts."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.log_prior, self.factor = nn.Parameter(torch.zeros(self.options.n_parts)), nn.Parameter(torch.ones(1))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.log_prior)
        nn.init.ones_(self.factor)

    def score(self, hidden_states, masks, return_routing_probabilities, mix):
        a, x = self.detect(hidden_states, masks, mix)
        first = self.routings[0]
        V = torch.einsum("bicd,ijdh->bijch", x, first.W) + first.B
        f = a.sigmoid().unsqueeze(-1)
        R = (torch.zeros_like(f) + self.log_prior).softmax(-1)
        scores, mu, sig2 = _m_step(V, f, R, first.beta_use, first.beta_ign, first.eps)
        for _ in range(first.n_iters - 1):
            sig2 = sig2.unsqueeze(1)
            distance = ((V - mu.unsqueeze(1)).square() / (2 * sig2) + sig2.sqrt().log()).sum((-2, -1))
            R = (F.logsigmoid(scores).unsqueeze(1) + self.log_prior - self.factor * distance).softmax(-1)
            scores, mu, sig2 = _m_step(V, f, R, first.beta_use, first.beta_ign, first.eps)
        return HeadOutput(*self.routings[1](scores, mu))


# Starts of the vision head, for vision.py: other initial weights of the same function.


class _SpatialStart(SpatialPoseHead):
    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.start(self.routings[1])


class SpatialBetas(_SpatialStart):
    """Initial betas of the routing to classes at 0.07: logits then have a standard deviation of about 1."""

    def start(self, routing):
        routing.beta_use.fill_(0.07)
        routing.beta_ign.fill_(0.07)


class SpatialAlike(_SpatialStart):
    """Initial votes of a part that are nearly the same for all classes, so that it goes to none of them alone."""

    def start(self, routing):
        routing.W.copy_(routing.W[:, :1] + 0.03 * routing.W)


class SpatialBoth(SpatialAlike, SpatialBetas):
    """Both of these."""

    def start(self, routing):
        SpatialAlike.start(self, routing)
        SpatialBetas.start(self, routing)


HEADS = {
    "random_betas": RandomBetas,
    "betas_of_one": BetasOfOne,
    "orthogonal_votes": OrthogonalVotes,
    "standardised_states": StandardisedStates,
    "gate_on_inputs": GateOnInputs,
    "attentive_means": AttentiveMeans,
    "layer_dropout": LayerDropout,
    "normalised_parts": NormalisedParts,
    "benefits_of_content": BenefitsOfContent,
    "prior_and_temperature": PriorAndTemperature,
    "spatial_betas": SpatialBetas,
    "spatial_alike": SpatialAlike,
    "spatial_both": SpatialBoth,
}
VARIANTS = {
    "random initial betas": {"head_type": "random_betas"},
    "initial betas of classes at one": {"head_type": "betas_of_one"},
    "orthogonal initial votes": {"head_type": "orthogonal_votes"},
    "hidden states standardised": {"head_type": "standardised_states"},
    "a learned gate on inputs": {"head_type": "gate_on_inputs"},
    "scores as attentive means": {"head_type": "attentive_means"},
    "layer dropout, 0.1": {"head_type": "layer_dropout"},
    "poses of parts normalised": {"head_type": "normalised_parts"},
    "benefits that depend on content": {"head_type": "benefits_of_content"},
    "learned prior and temperature": {"head_type": "prior_and_temperature"},
    "128 parts of one dimension": {"head_type": "token_depth", "n_parts": 128, "d_cap": 1},
    "single beta": {"head_type": "token_depth", "single_beta": True},
    "soft k-means": {"head_type": "token_depth", "p_model": "skm"},
    "last layer alone": {"head_type": "token_depth", "layers": [-1]},
    "last 3 layers": {"head_type": "token_depth", "layers": [-3, -2, -1]},
}


def register_variants() -> None:
    """Register the heads of this file; to import it does not, as others may go by all heads that are registered."""
    for name, head in HEADS.items():
        register(name)(head)
