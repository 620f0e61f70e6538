"""Encodings of hidden states keep no number that is not finite."""

import pytest
import torch

from capsule_heads.data.encodings import ENCODINGS


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("token", [0, 2, 4])
def test_one_number_that_is_not_finite(encoding, wrong, token):
    states = torch.randn(5, 2, 3)
    kept = ENCODINGS[encoding].encode(states)
    assert ENCODINGS[encoding].decode(kept).shape == states.shape
    states[token, 1, token % 3] = wrong
    with pytest.raises(ValueError, match=r"hidden states (are not finite|exceed half precision)"):
        ENCODINGS[encoding].encode(states)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_token(encoding):
    assert ENCODINGS[encoding].decode(ENCODINGS[encoding].encode(torch.zeros(0, 2, 3))).shape == (0, 2, 3)
