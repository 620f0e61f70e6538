"""From what a backbone returns to [batch, tokens, width] and masks: every layout, on tensors made for it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from capsule_heads.backbones.states import Layout, arrange, frame_counts, hidden_states_of, unpack

BACKBONE = SimpleNamespace(config=SimpleNamespace(model_type="some_model"))


def numbers(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def arrange_one(x, backbone=BACKBONE, **layout):
    (states,), (mask,) = arrange([x], Layout(**{"n_samples": 2, **layout}), backbone)
    return states, mask


# Which states


@pytest.mark.parametrize(
    ("stack", "states", "last"),
    [("encoder", "encoder_hidden_states", "encoder_last_hidden_state"), ("decoder", "decoder_hidden_states", None)],
)
def test_an_encoder_decoder_has_two_stacks(stack, states, last):
    outputs = ModelOutput(
        last_hidden_state=numbers(2, 3, 4) + 0.5,
        encoder_last_hidden_state=numbers(2, 5, 4) + 0.5,
        encoder_hidden_states=(numbers(2, 5, 4),) * 2,
        decoder_hidden_states=(numbers(2, 3, 4),) * 2,
    )
    found = hidden_states_of(outputs, stack, "some_model")
    assert torch.equal(found[0], outputs[states][0])
    assert torch.equal(found[1], outputs[last or "last_hidden_state"])


def test_the_last_state_is_the_one_after_the_norm_unless_it_has_another_shape():
    tuple_of_states = (numbers(2, 3, 4), numbers(2, 3, 4) + 1)
    outputs = ModelOutput(last_hidden_state=numbers(2, 3, 4) + 2, hidden_states=tuple_of_states)
    assert torch.equal(hidden_states_of(outputs, "encoder", "some_model")[1], outputs.last_hidden_state)
    outputs = ModelOutput(last_hidden_state=numbers(2, 1, 4), hidden_states=tuple_of_states)
    assert torch.equal(hidden_states_of(outputs, "encoder", "some_model")[1], tuple_of_states[1])


def test_states_within_states_are_found_and_none_are_reported():
    outputs = ModelOutput(hidden_states=(numbers(2, 3, 4), (numbers(2, 3, 4), None, numbers(2, 3, 4))))
    assert len(hidden_states_of(outputs, "encoder", "some_model")) == 3
    with pytest.raises(ValueError, match="some_model backbone returned no hidden_states, only logits"):
        hidden_states_of(ModelOutput(logits=numbers(2, 3)), "encoder", "some_model")


# Shapes


def test_maps_with_channels_first():
    x = numbers(2, 5, 3, 4)
    states, mask = arrange_one(x, hidden_sizes=[5])
    assert states.shape == (2, 12, 5) and torch.equal(mask, torch.ones(2, 12))
    assert torch.equal(states[1, 2 * 4 + 3], x[1, :, 2, 3])


def test_maps_with_channels_last():
    x = numbers(2, 3, 4, 5)
    states, _ = arrange_one(x, hidden_sizes=[5])
    assert torch.equal(states[1, 2 * 4 + 3], x[1, 2, 3])


@pytest.mark.parametrize(("shape", "width"), [((1, 6, 3, 3), 6), ((1, 3, 3, 6), 6), ((1, 4, 4, 4), 4)])
def test_of_square_maps_the_width_is_found(shape, width):
    assert arrange_one(torch.rand(shape), n_samples=1)[0].shape == (1, shape[2] * 3 if width == 6 else 16, width)


def test_where_shapes_leave_a_choice_the_type_decides():
    x = numbers(2, 3, 3, 3)
    assert torch.equal(arrange_one(x, hidden_sizes=[3])[0][:, 1], x[:, :, 0, 1])
    last = SimpleNamespace(config=SimpleNamespace(model_type="sam_vision_model"))
    assert torch.equal(arrange_one(x, last, hidden_sizes=[3])[0][:, 1], x[:, 0, 1])


def test_windows_and_frames_go_to_their_samples():
    x = numbers(6, 4, 5)  # three windows of each sample
    states, _ = arrange_one(x)
    assert states.shape == (2, 12, 5) and torch.equal(states[1, 4:8], x[4])
    assert torch.equal(arrange_one(numbers(1, 6, 5))[0], numbers(2, 3, 5))
    assert arrange_one(numbers(2, 3, 4, 4, 5))[0].shape == (2, 48, 5)
    assert arrange_one(numbers(2, 5))[0].shape == (2, 1, 5)


def test_another_shape_is_reported():
    with pytest.raises(
        ValueError, match=r"some_model for a batch of 2 has shape \(3, 4, 5\); expected \[batch, tokens"
    ):
        arrange_one(numbers(3, 4, 5))


def test_streams_of_a_token_are_tokens_beside_each_other():
    x, mask = numbers(2, 3, 4, 5), torch.tensor([[0, 1, 1], [1, 1, 1]])
    states, mask = arrange_one(x, mask=mask, n_tokens=3)
    assert torch.equal(states[1, 4:8], x[1, 1])
    assert mask.tolist() == [[0] * 4 + [1] * 8, [1] * 12]
    first = SimpleNamespace(config=SimpleNamespace(model_type="gemma3n_text"))
    assert torch.equal(arrange_one(x.movedim(2, 0), first, n_tokens=3)[0], states)


# Packed tokens


@pytest.mark.parametrize("leading", [(), (1,)])
def test_packed_tokens_are_split_by_their_grids(leading):
    x = numbers(*leading, 10, 3)
    states, mask = arrange_one(x, grids=torch.tensor([[1, 2, 2], [1, 2, 3]]))
    flat = x.view(10, 3)
    assert torch.equal(states[0], torch.cat([flat[:4], torch.zeros(2, 3)])) and torch.equal(states[1], flat[4:])
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]


def test_merged_patches_are_split_too_and_other_numbers_are_reported():
    states, mask = unpack(numbers(3, 5), torch.tensor([[1, 2, 2], [2, 2, 2]]))
    assert states.shape == (2, 2, 5) and mask.tolist() == [[1, 0], [1, 1]]
    with pytest.raises(ValueError, match=r"has 5 packed tokens, and image_grid_thw says \[4, 8\] patches"):
        unpack(numbers(5, 5), torch.tensor([[1, 2, 2], [2, 2, 2]]))


# Masks


def test_a_mask_of_the_tokens_is_used_as_it_is():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(arrange_one(numbers(2, 3, 4), mask=mask)[1], mask.float())


def test_masks_are_wide_enough_for_fractions():
    x = numbers(2, 3, 4).bfloat16()
    assert arrange_one(x, mask=torch.ones(2, 3))[1].dtype == torch.float32
    assert arrange_one(x.double(), mask=torch.ones(2, 3))[1].dtype == torch.float64


def test_a_pooled_token_is_one_as_soon_as_one_of_its_tokens_is():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8])
    assert arrange_one(numbers(2, 4, 3), mask=mask)[1].tolist() == [[1, 1, 0, 0], [1] * 4]


def test_tokens_that_a_backbone_adds_are_tokens():
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert arrange_one(numbers(2, 4, 3), mask=mask)[1].tolist() == [[1, 1, 0, 0], [1] * 4]


class Speech(nn.Module):
    config = SimpleNamespace(model_type="some_speech_model")

    def _get_feat_extract_output_lengths(self, lengths):
        return (lengths - 2) // 3


def test_frames_are_counted_by_the_models_own_method():
    mask = (torch.arange(14) < torch.tensor([[9], [14]])).long()  # 2 and 4 frames; pooling would say 3 and 4
    assert arrange_one(numbers(2, 4, 3), Speech(), mask=mask)[1].tolist() == [[1, 1, 0, 0], [1] * 4]
    assert frame_counts(Speech(), torch.tensor([14])).tolist() == [4]
    assert frame_counts(nn.Identity(), torch.tensor([14])) is None


def test_a_layer_at_another_rate_is_pooled():
    mask = (torch.arange(14) < torch.tensor([[7], [14]])).long()
    assert arrange_one(numbers(2, 2, 3), Speech(), mask=mask)[1].tolist() == [[1, 0], [1, 1]]
