"""Two models on one text, and two classes of one model."""

import pytest
import torch

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.explain import compare, explain

TEXT = "the film is not good, dull"
NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


@pytest.fixture
def of_bert(make_model, tokenizer):
    return explain(make_model(**NAMES), TEXT, tokenizer)[0]


def test_two_models(of_bert, backbone_dir, shake, tokenizer):
    others = {"id2label": {0: "c", 1: "a", 2: "b"}, "label2id": {"c": 0, "a": 1, "b": 2}}  # in another order
    model = CapsuleHeadForSequenceClassification.from_backbone(
        backbone_dir("gpt2"), head_type="attentive_pooling", num_labels=3, **others
    )
    (second,) = explain(shake(model).eval(), TEXT, tokenizer)
    found = compare(of_bert, second)
    assert found.labels == ("a", "b", "c")
    assert [word.text for word in found.words] == ["the", "film", "is", "not", "good,", "dull"]
    assert len(of_bert.by_word()) == 7  # a comma is a word there
    order = [1, 2, 0]
    torch.testing.assert_close(found.logits, second.logits[order] - of_bert.logits)
    torch.testing.assert_close(found.rest + sum(word.credit for word in found.words), found.logits)
    last = second.by_word()[-1].credit[order] - of_bert.by_word()[-1].credit
    torch.testing.assert_close(found.words[-1].credit, last)
    rest = [x.baseline + x.by_token()[[0, -1]].sum(0) for x in (of_bert, second)]  # [CLS] and [SEP]
    torch.testing.assert_close(found.rest, rest[1][order] - rest[0], rtol=0, atol=3e-4)
    assert found.logits.abs().max() > 1e-2


def test_what_cannot_be_compared(of_bert, make_model, tokenizer):
    with pytest.raises(ValueError, match=r"are of 'the film .*' and 'dull'; expected one text"):
        compare(of_bert, explain(make_model(**NAMES), "dull", tokenizer)[0])
    with pytest.raises(ValueError, match="the classes a, b, c and LABEL_0, LABEL_1, LABEL_2; expected the same"):
        compare(of_bert, explain(make_model(), TEXT, tokenizer)[0])


def test_two_classes(of_bert):
    credits = of_bert.between(of_bert.by_token(), "c", "a")
    torch.testing.assert_close(credits, of_bert.by_token()[:, 2] - of_bert.by_token()[:, 0])
    total = of_bert.between(of_bert.baseline, "c", "a") + credits.sum()
    torch.testing.assert_close(total, of_bert.logits[2] - of_bert.logits[0], rtol=0, atol=2e-4)
    with pytest.raises(ValueError, match="label is 'd'; expected one of a, b, c"):
        of_bert.between(credits, "a", "d")
