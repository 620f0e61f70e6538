"""Faithfulness: the numbers against a literal computation, and the methods against their known properties."""

import math
import sys

import pytest
import torch
from transformers import BertConfig

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.explain import explain
from capsule_heads.explain import faithfulness as f

TEXT = "the film is not good"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = CapsuleHeadForSequenceClassification.from_backbone(
        BertConfig(vocab_size=32, **sizes), num_labels=3, d_inp=8, n_parts=6, freeze_backbone=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "film", "is", "not", "good"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def probability(model, text, kept):
    """Return the probability of the class with the tokens at some positions alone."""
    mask = torch.zeros_like(text.inputs["attention_mask"])
    mask[0, list(kept)] = 1
    return float(model(**{**text.inputs, "attention_mask": mask}).logits.softmax(-1)[0, text.target])


def test_numbers(model, tokenizer):
    text = f.prepare_text(model, tokenizer, TEXT)
    assert text.candidates.tolist() == [1, 2, 3, 4, 5]
    ranking = [4, 1, 5, 2, 3]

    def method(model, text):
        attributions = torch.full((7,), 99.0)  # of special tokens, which stay
        attributions[ranking] = torch.arange(5, 0, -1).float()
        return attributions

    found = f.measure(model, text, method)
    everything = {*range(7)}
    complete = probability(model, text, everything)
    numbers = [max(1, math.ceil(fraction * 5)) for fraction in f.FRACTIONS]
    assert numbers == [1, 1, 1, 1, 3]
    without = [probability(model, text, everything - {*ranking[:n]}) for n in numbers]
    alone = [probability(model, text, {0, 6, *ranking[:n]}) for n in numbers]
    assert found.comprehensiveness == pytest.approx(complete - sum(without) / 5, abs=1e-6)
    assert found.sufficiency == pytest.approx(complete - sum(alone) / 5, abs=1e-6)
    deleted = [probability(model, text, everything - {*ranking[: round(fraction * 5)]}) for fraction in f.DELETED]
    assert found.deletion == pytest.approx(deleted, abs=1e-6)
    assert found.deletion[0] == pytest.approx(complete, abs=1e-6)
    assert found.seconds > 0


def test_methods(model, tokenizer):
    text = f.prepare_text(model, tokenizer, TEXT)
    n = text.inputs["input_ids"].shape[1]
    (explanation,) = explain(model, TEXT, tokenizer)
    expected = explanation.against_others(explanation.by_token())[:, explanation.predicted]
    torch.testing.assert_close(f.credit_chain(model, text), expected)

    everything = {*range(n)}
    expected = [
        math.log(probability(model, text, everything) / probability(model, text, everything - {token}))
        for token in range(n)
    ]
    torch.testing.assert_close(f.leave_one_out(model, text), torch.tensor(expected), rtol=1e-4, atol=1e-5)

    log_probability = f.log_probability(model, text)
    embed = model.get_input_embeddings()
    ids = text.inputs["input_ids"]
    embeddings, baseline = (embed(x).detach() for x in (ids, ids.index_fill(1, text.candidates, 0)))
    gain = (log_probability(embeddings) - log_probability(baseline)).item()
    found = f.integrated_gradients(model, text)
    assert found.sum().item() == pytest.approx(gain, rel=0.02)  # completeness, but for the steps
    assert (found[[0, n - 1]] == 0).all()

    embeddings.requires_grad_()
    (slope,) = torch.autograd.grad(log_probability(embeddings), embeddings)
    torch.testing.assert_close(f.gradient_x_input(model, text), (slope * embeddings)[0].sum(-1).detach())

    rollout = f.attention_rollout(model, text)
    assert rollout.sum().item() == pytest.approx(1, abs=1e-5) and (rollout > 0).all()
    assert model.backbone.config._attn_implementation == "sdpa"


def test_all_methods_on_all_texts(model, tokenizer):
    found = f.compare_methods(model, tokenizer, [TEXT, "good film"])
    assert list(found) == list(f.METHODS) and all(len(x) == 2 for x in found.values())
    with_all = {of_texts[0].deletion[0] for of_texts in found.values()}
    assert max(with_all) - min(with_all) < 1e-6  # nothing removed yet


def test_a_frozen_backbone_keeps_no_gradient(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "freeze_backbone", True)
    with pytest.raises(ValueError, match="The backbone is frozen, and gradients stop there"):
        f.compare_methods(model, tokenizer, [TEXT])
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ImportError, match=r'Captum: pip install "capsule-heads\[explanations\]"'):
        f.compare_methods(model, tokenizer, [TEXT])
