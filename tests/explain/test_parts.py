"""Parts are described by the words of the inputs in which they give a class most."""

import dataclasses
import re

import pytest
import torch

from capsule_heads.explain import Explanation, explain
from capsule_heads.explain.parts import PartDescriptions, PartWord, describe_parts, load_parts, summarize_parts
from capsule_heads.explain.report import render_explanation, render_report


def of_review(text):
    """An explanation whose part 3 gives "good" 2 logits where "fine" is in the text; all else is 0."""
    words = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    parts = torch.zeros(5, 3)
    parts[3, 2] = 2.0 * ("fine" in text.casefold())
    logits = parts.sum(0) + torch.tensor([0.0, 0.0, 0.1])
    return Explanation(
        labels=("bad", "so so", "good"),
        logits=logits,
        probabilities=logits.softmax(0),
        is_multi_label=False,
        parts=parts,
        credits=(torch.ones(len(words), 3),),
        layers=(0,),
        tokens=tuple(text[start:end] for start, end in words),
        spans=tuple((start, end, (n,)) for n, (start, end) in enumerate(words)),
        text=text,
    )


TEXTS = ("Fine <b>cast", *["fine film ."] * 4, *["dull film ."] * 4, "dull cast")
REVIEWS = [of_review(text) for text in TEXTS]
AUDIO = dataclasses.replace(REVIEWS[0], text=None, tokens=None, spans=())


def test_the_words_of_a_part():
    found = summarize_parts(REVIEWS)
    assert found.n_inputs == 10
    strongest = found.classes["good"][0]
    assert strongest.number == 3 and strongest.words[0][::2] == ("fine", 5)
    assert strongest.words[0].credit > 0 and "dull" not in [word.text for word in strongest.words]
    assert "." not in [word.text for part in found.classes["good"] for word in part.words]
    assert summarize_parts([AUDIO]) == PartDescriptions(0, {})


def test_parts_in_pages_are_words():
    page = render_report(REVIEWS)
    assert "among 10 inputs. The number" in page and "fine <small>5</small>" in page
    page = render_explanation(REVIEWS[0], summarize_parts(REVIEWS))
    assert "<mark>fine</mark> <small>5</small>" in page and "of 5 parts" in page  # the text has the word
    for nothing in (render_explanation(REVIEWS[0]), render_report([AUDIO])):
        assert "respond to" not in nothing


def test_a_model_and_its_file(classifier, tmp_path, caplog):
    from capsule_heads import CapsuleHeadForSequenceClassification

    model = CapsuleHeadForSequenceClassification.from_pretrained(classifier)
    texts = ["good food", "bad film"] * 6
    found = describe_parts(model, texts)
    assert found.n_inputs == 12 and found == summarize_parts(explain(model, texts))
    assert any(isinstance(word, PartWord) for parts in found.classes.values() for part in parts for word in part.words)
    assert load_parts(str(tmp_path)) is None
    found.save(tmp_path / "parts.json")
    assert load_parts(str(tmp_path)) == found
    (tmp_path / "parts.json").write_text("[]")
    assert load_parts(str(tmp_path)) is None and "expected a file that PartDescriptions.save wrote" in caplog.text
    with pytest.raises(ValueError, match="holds no descriptions of parts"):
        PartDescriptions.load(tmp_path / "parts.json")
