"""Faithfulness: the numbers against a literal computation, and the methods against their known properties."""

import itertools
import math
import sys

import pytest
import torch
from transformers import BertConfig

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.explain import explain
from capsule_heads.explain import faithfulness as f
from capsule_heads.explain import methods as m

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
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[UNK]",
    )


def probability(model, text, kept):
    """Return the probability of the class with the tokens at some positions alone."""
    mask = torch.zeros_like(text.inputs["attention_mask"])
    mask[0, list(kept)] = 1
    return float(model(**{**text.inputs, "attention_mask": mask}).logits.softmax(-1).detach()[0, text.target])


def replaced(model, text, kept):
    """Return the probability of the class with all other tokens replaced by the mask token."""
    ids = text.inputs["input_ids"].clone()
    ids[0, [n for n in range(ids.shape[1]) if n not in kept]] = text.mask_token_id
    return float(model(**{**text.inputs, "input_ids": ids}).logits.softmax(-1).detach()[0, text.target])


@pytest.mark.parametrize(("compute", "is_replaced"), [(probability, False), (replaced, True)])
def test_removal(model, tokenizer, compute, is_replaced):
    text = f.prepare_text(model, tokenizer, TEXT)
    assert text.candidates.tolist() == [1, 2, 3, 4, 5] and text.mask_token_id == 3
    ranking = [4, 1, 5, 2, 3]
    found, curve = f.measure_removal(model, text, torch.tensor(ranking), is_replaced)
    everything = {*range(7)}
    expected = [compute(model, text, everything - {*ranking[:n]}) for n in range(6)]
    assert curve.tolist() == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 1e-3
    numbers = [max(1, math.ceil(fraction * 5)) for fraction in f.FRACTIONS]
    assert numbers == [1, 1, 1, 1, 3]
    alone = [compute(model, text, {0, 6, *ranking[:n]}) for n in numbers]
    assert found.comprehensiveness == pytest.approx(expected[0] - sum(expected[n] for n in numbers) / 5, abs=1e-6)
    assert found.sufficiency == pytest.approx(expected[0] - sum(alone) / 5, abs=1e-6)
    log_odds = sum(math.log(expected[n] / expected[0]) for n in numbers) / 5
    assert found.log_odds == pytest.approx(log_odds, abs=1e-6)
    assert found.deletion == pytest.approx([expected[round(fraction * 5)] for fraction in f.DELETED], abs=1e-6)


def test_the_best_and_the_worst_order(model, tokenizer, monkeypatch):
    text = f.prepare_text(model, tokenizer, "the film not good")
    falls = []
    for ranking in itertools.permutations([1, 2, 3, 4]):
        _, curve = f.measure_removal(model, text, torch.tensor(ranking))
        falls.append(float(curve[0] - curve.mean()))
    monkeypatch.setattr(f, "BEAM", 24)  # all of them
    assert f.extreme_fall(model, text, 1) == pytest.approx(max(falls), abs=1e-6)
    assert f.extreme_fall(model, text, -1) == pytest.approx(min(falls), abs=1e-6)
    assert max(falls) - min(falls) > 1e-3


def test_a_measurement(model, tokenizer):
    text = f.prepare_text(model, tokenizer, TEXT)
    shuffled = f.shuffle_head(model)
    for a, b in zip(model.head.parameters(), shuffled.head.parameters()):
        torch.testing.assert_close(a.flatten().sort().values, b.flatten().sort().values)
    assert any((a != b).any() for a, b in zip(model.head.parameters(), shuffled.head.parameters()))

    def method(given, text):
        values = [5.0, 2.0, 4.0, 1.0, 3.0] if given is model else [5.0, 1.0, 3.0, 2.0, 4.0]
        return torch.tensor([99.0, *values, 99.0])  # special tokens stay

    removal, curve = f.measure_removal(model, text, torch.tensor([1, 3, 5, 2, 4]))
    fall = float(curve[0] - curve.mean())
    found = f.measure(model, shuffled, text, method, (fall - 0.1, fall + 0.3), has_mask=False)
    assert found.masked == removal and found.replaced is None and found.seconds > 0
    assert found.naopc == pytest.approx(0.25)
    assert found.sanity == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    found = f.measure(model, shuffled, text, lambda given, text: torch.ones(7), (math.nan, math.nan), has_mask=True)
    assert math.isnan(found.naopc) and math.isnan(found.sanity) and found.replaced is not None


def test_methods(model, tokenizer):
    text = f.prepare_text(model, tokenizer, TEXT)
    n = text.inputs["input_ids"].shape[1]
    (explanation,) = explain(model, TEXT, tokenizer)
    expected = explanation.against_others(explanation.by_token())[:, explanation.predicted]
    torch.testing.assert_close(m.credits(model, text), expected)
    (explanation,) = explain(model, TEXT, tokenizer, through_backbone=True)
    expected = explanation.against_others(explanation.by_token())[:, explanation.predicted]
    torch.testing.assert_close(m.traced_credits(model, text), expected)

    everything = {*range(n)}
    expected = [
        math.log(probability(model, text, everything) / probability(model, text, everything - {token}))
        for token in range(n)
    ]
    torch.testing.assert_close(m.leave_one_out(model, text), torch.tensor(expected), rtol=1e-4, atol=1e-5)

    logs = [math.log(probability(model, text, kept)) for kept in (everything, {0, n - 1})]
    for n_permutations in m.N_PERMUTATIONS:
        found = m.shapley_sampling(n_permutations)(model, text)
        assert found[text.candidates].sum().item() == pytest.approx(logs[0] - logs[1], abs=1e-5)

    log_probability = m.log_probability(model, text)
    embed = model.get_input_embeddings()
    ids = text.inputs["input_ids"]
    embeddings, baseline = (embed(x).detach() for x in (ids, ids.index_fill(1, text.candidates, 0)))
    gain = (log_probability(embeddings) - log_probability(baseline)).item()
    found = m.integrated_gradients(model, text)
    assert found.sum().item() == pytest.approx(gain, rel=0.02)  # completeness, but for the steps
    assert (found[[0, n - 1]] == 0).all()

    found = m.sequential_integrated_gradients(model, text)
    for token in range(n):  # of each token by itself
        without = embed(ids.index_fill(1, torch.tensor([token]), text.mask_token_id)).detach()
        gain = (log_probability(embeddings) - log_probability(without)).item() if 0 < token < n - 1 else 0
        assert found[token].item() == pytest.approx(gain, rel=0.02, abs=1e-3)

    embeddings.requires_grad_()
    (slope,) = torch.autograd.grad(log_probability(embeddings), embeddings)
    torch.testing.assert_close(m.gradient_x_input(model, text), (slope * embeddings)[0].sum(-1).detach())

    rollout = m.attention_rollout(model, text)
    assert rollout.sum().item() == pytest.approx(1, abs=1e-5) and (rollout > 0).all()
    assert model.backbone.config._attn_implementation == "sdpa"


def test_attn_lrp_of_a_linear_head_is_its_traced_credits(tokenizer, shake):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = CapsuleHeadForSequenceClassification.from_backbone(
        BertConfig(vocab_size=32, **sizes), num_labels=3, head_type="linear", freeze_backbone=False
    )
    text = f.prepare_text(shake(model).eval(), tokenizer, TEXT)
    (explanation,) = explain(model, text.inputs, through_backbone=True)
    # The derivative of the log of a probability weights the classes; by_token is without the bias, as is the state.
    weights = -explanation.probabilities
    weights[text.target] += 1
    torch.testing.assert_close(m.attn_lrp(model, text), explanation.by_token() @ weights, rtol=1e-4, atol=1e-6)


def test_all_methods_on_all_texts(model, tokenizer, monkeypatch):
    monkeypatch.setattr(f, "BEAM", 32)  # all of them
    found = f.compare_methods(model, tokenizer, [TEXT, "good film"])
    assert list(found) == list(m.METHODS) and all(len(x) == 2 for x in found.values())
    with_all = {of_texts[0].masked.deletion[0] for of_texts in found.values()}
    assert max(with_all) - min(with_all) < 1e-6  # nothing removed yet
    assert all(-1e-3 <= x.naopc <= 1.001 for of_texts in found.values() for x in of_texts)
    assert found["attention rollout"][0].sanity == pytest.approx(1)  # it knows nothing of the head
    monkeypatch.setattr(f, "MOST_TOKENS", 4)
    longer, shorter = f.compare_methods(model, tokenizer, [TEXT, "good film"])["random"]
    assert math.isnan(longer.naopc) and not math.isnan(shorter.naopc)


def test_a_frozen_backbone_keeps_no_gradient(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "freeze_backbone", True)
    with pytest.raises(ValueError, match="The backbone is frozen, and gradients stop there"):
        f.compare_methods(model, tokenizer, [TEXT])
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ImportError, match=r'Captum: pip install "capsule-heads\[explanations\]"'):
        f.compare_methods(model, tokenizer, [TEXT])
