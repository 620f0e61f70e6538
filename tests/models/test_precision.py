"""Half precision: autocast on the CPU, and weights."""

import pytest
import torch

HALVES = (torch.bfloat16, torch.float16)
LABELS = torch.tensor([0, 1, 2])


def run(model, batch):
    """Logits, loss and gradients of a step without mixup and dropout."""
    model.eval().zero_grad()
    outputs = model(**batch, labels=LABELS)
    outputs.loss.backward()
    return outputs.logits, outputs.loss, {n: x.grad for n, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("freeze_backbone", [True, False], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize("p_model", ["gaussian", "skm"])
def test_a_step_in_half_precision_is_close_to_one_in_float32(make_model, pad, half, how, freeze_backbone, p_model):
    model, batch = make_model(freeze_backbone=freeze_backbone, p_model=p_model), pad()
    logits, _, gradients = run(model, batch)
    if how == "weights":
        model.to(half)
    with torch.autocast("cpu", half, enabled=how == "autocast"):
        half_logits, half_loss, half_gradients = run(model, batch)
    assert half_logits.dtype == half_loss.dtype == torch.float32  # routing does not come down to half precision
    digits = torch.finfo(half).eps
    torch.testing.assert_close(half_logits, logits, rtol=0, atol=20 * digits * float(logits.abs().max()))
    assert half_gradients.keys() == gradients.keys()
    for name, gradient in half_gradients.items():
        assert gradient.dtype == (half if how == "weights" else torch.float32)
        assert gradient.isfinite().all(), name
    flat, half_flat = (torch.cat([x.flatten().double() for x in g.values()]) for g in (gradients, half_gradients))
    assert torch.cosine_similarity(flat, half_flat, dim=0) > 0.97
