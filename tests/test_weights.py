import pytest
import torch
from torch import nn

from capsule_heads.weights import digest_weights, plain_weights, same_weights, sample_weights


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50))


def test_a_sample_is_a_copy_of_some_numbers_of_each_weight_and_buffer(module):
    sample = sample_weights(module)
    assert set(sample) == set(module.state_dict())
    assert 64 <= len(sample["0.weight"]) <= 128
    assert len(sample["1.running_var"]) == 50
    assert same_weights(module, sample)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"])
def test_a_change_of_any_is_noticed(module, name):
    sample = sample_weights(module)
    module.state_dict()[name].add_(1)
    assert not same_weights(module, sample)


def test_another_shape_is_noticed(module):
    sample = sample_weights(module)
    module[0] = nn.Linear(40, 60)
    assert not same_weights(module, sample)


def test_a_cast_is_none_and_what_it_rounds_off_is(module):
    sample = sample_weights(module)
    assert same_weights(module.double(), sample)
    assert same_weights(module.bfloat16(), sample)
    assert not same_weights(module.float(), sample)


def test_a_digest_is_of_the_numbers_and_of_the_dtype_they_are_in_unless_one_is_given(module):
    plain, rounded = digest_weights(module), digest_weights(module, torch.bfloat16)
    assert digest_weights(module.bfloat16(), torch.bfloat16) == rounded
    assert digest_weights(module) != plain
    module[0].weight.data.mul_(2)
    assert digest_weights(module, torch.bfloat16) != rounded


def test_weights_without_numbers_are_left_out():
    assert sample_weights(nn.Linear(2, 3, device="meta")) == {}


class Quantised(torch.Tensor):
    """A tensor that is made of two others, as those of torchao are."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, outer_size, outer_stride):
        return Quantised(tensors["values_"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_quantised_weights_are_the_tensors_they_are_made_of():
    module = nn.Linear(3, 2, bias=False)
    weight = Quantised(torch.ones(2, 3, dtype=torch.int8), torch.ones(2))
    module.weight = nn.Parameter(weight, requires_grad=False)
    assert [name for name, _ in plain_weights(module)] == ["weight.values_", "weight.scale"]
    sample = sample_weights(module)
    assert same_weights(module, sample)
    weight.scale.mul_(2)
    assert not same_weights(module, sample)
