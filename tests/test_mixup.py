import pytest
import torch
from scipy.stats import beta

from capsule_heads.mixup import draw_mixup, mix

CPU = torch.device("cpu")


@pytest.mark.parametrize("n_samples", [1, 2, 20])
def test_draw_gives_a_ratio_per_sample_and_a_permutation(n_samples):
    ratio, partner = draw_mixup(n_samples, 0.2, CPU)
    assert ratio.shape == partner.shape == (n_samples,)
    assert ratio.dtype == torch.float32
    assert ((ratio >= 0) & (ratio <= 1)).all()
    assert sorted(partner.tolist()) == list(range(n_samples))


def test_partners_are_drawn_anew():
    torch.manual_seed(0)
    partners = torch.stack([draw_mixup(4, 0.2, CPU)[1] for _ in range(2000)])
    counts = torch.stack([(partners == sample).sum(0) for sample in range(4)])  # of 2000 at each place: 500 +- 19
    assert ((counts - 500).abs() < 5 * 19).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_ratios_follow_a_beta_distribution(alpha):
    torch.manual_seed(0)
    n = 100_000
    ratio = draw_mixup(n, alpha, CPU)[0].double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(ratio.mean() - 0.5) < 5 * (variance / n) ** 0.5
    # a sample variance spreads less than that of a normal distribution, variance * sqrt(2 / n): Beta has no tails
    assert abs(ratio.var() - variance) < 5 * variance * (2 / n) ** 0.5
    for x in (0.01, 0.25, 0.9):
        p = beta.cdf(x, alpha, alpha)
        assert abs((ratio < x).double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_ratios_are_drawn_per_sample():
    torch.manual_seed(0)
    assert len(draw_mixup(100, 1.0, CPU)[0].unique()) > 90


def test_draw_is_determined_by_the_seed():
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(draw_mixup(50, 0.2, CPU))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1]))
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not torch.equal(draws[0][1], draws[2][1])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
def test_mix_is_the_weighted_mean_of_each_sample_and_its_partner(shape):
    torch.manual_seed(0)
    tensor = torch.randn(4, *shape, dtype=torch.float64)
    ratio = torch.tensor([0.1, 0.9, 0.5, 0.3], dtype=torch.float64)
    partner = torch.tensor([2, 0, 3, 1])
    expected = torch.stack([r * tensor[k] + (1 - r) * tensor[p] for k, (r, p) in enumerate(zip(ratio, partner))])
    torch.testing.assert_close(mix(tensor, ratio, partner), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_ratio_of_one_changes_no_bit_and_of_zero_gives_the_partner(dtype):
    torch.manual_seed(0)
    tensor, partner = torch.randn(5, 7).to(dtype), torch.tensor([1, 2, 3, 4, 0])
    assert torch.equal(mix(tensor, torch.ones(5), partner), tensor)
    assert torch.equal(mix(tensor, torch.zeros(5), partner), tensor[partner])
    assert torch.equal(mix(tensor, torch.rand(5), torch.arange(5)), tensor)  # its own partner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_and_is_as_exact_as_it_can_be(dtype):
    torch.manual_seed(0)
    tensor, ratio, partner = torch.randn(64, 7).to(dtype), torch.rand(64), torch.randperm(64)
    mixed = mix(tensor, ratio, partner)
    assert mixed.dtype == dtype
    # the ratio and the result are rounded, to eps / 2 each, of terms no larger than this:
    largest = torch.maximum(tensor.abs(), tensor[partner].abs()).double()
    expected = mix(tensor.double(), ratio.double(), partner)
    assert ((mixed.double() - expected).abs() <= 3 * torch.finfo(dtype).eps * largest).all()


def test_gradients_reach_both_partners():
    tensor = torch.zeros(2, 3, requires_grad=True)
    mix(tensor, torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))[0].sum().backward()
    assert torch.equal(tensor.grad, torch.tensor([[0.75] * 3, [0.25] * 3]))
