"""Pictures of explanations show the numbers that were computed; the page needs nothing beside it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from capsule_heads.explain.attributions import Explanation
from capsule_heads.explain.faithfulness import DELETED
from capsule_heads.explain.pictures import draw_deletion, draw_parts, draw_patches, draw_tokens, new_figure
from capsule_heads.explain.report import render_report, render_words


def of_text(logits, text="good <b>film</b>", seed=0):
    """An explanation of a text of two words and two special tokens, at layers 0 and 2, with three classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.tensor(logits)
    words = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    return Explanation(
        labels=("bad", "so so", "good"),
        logits=logits,
        probabilities=logits.softmax(0),
        is_multi_label=False,
        parts=torch.randn(5, 3, generator=generator),
        credits=tuple(torch.randn(len(words) + 2, 3, generator=generator) for _ in range(2)),
        layers=(0, 2),
        tokens=("[CLS]", *(text[start:end] for start, end in words), "[SEP]"),
        is_special=(True, *[False] * len(words), True),
        spans=tuple((start, end, (n + 1,)) for n, (start, end) in enumerate(words)),
        text=text,
    )


def of_image():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0])
    return Explanation(
        labels=("cat", "dog"),
        logits=logits,
        probabilities=logits.softmax(0),
        is_multi_label=False,
        parts=torch.randn(5, 2, generator=generator),
        credits=(torch.randn(5, 2, generator=generator),),
        layers=(1,),
        image=Image.new("RGB", (20, 20), (200, 10, 10)),
        n_pixels=(16, 16),
        patch_size=(8, 8),
    )


def of_audio(n_frames=500):
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0])
    return Explanation(
        labels=("no", "yes"),
        logits=logits,
        probabilities=logits.softmax(0),
        is_multi_label=False,
        parts=torch.randn(5, 2, generator=generator),
        credits=tuple(torch.randn(n_frames, 2, generator=generator) for _ in range(3)),
        layers=(0, 1, 2),
    )


def test_an_empty_figure():
    figure = new_figure(4, 3, dpi=50)
    assert figure.get_size_inches().tolist() == [4, 3] and figure.dpi == 50 and not figure.axes


def test_tokens_by_layer():
    explanation = of_text([0.0, 1.0, 3.0])
    sums, heat, _ = draw_tokens(explanation).axes
    expected = explanation.against_others(torch.stack(explanation.credits, dim=1))[..., 2]
    np.testing.assert_allclose(np.asarray(heat.images[0].get_array()), expected.T, rtol=1e-6)
    np.testing.assert_allclose([bar.get_height() for bar in sums.patches], expected.sum(1), rtol=1e-5)
    assert [label.get_text() for label in heat.get_xticklabels()] == list(explanation.tokens)
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "2"]
    assert sums.get_title() == "For good, against the others; probability 0.84"
    assert draw_tokens(explanation, target=0).axes[0].get_title().startswith("For bad, ")


def test_positions_of_audio_by_layer():
    figure = draw_tokens(of_audio())
    sums, heat, _ = figure.axes
    assert figure.get_size_inches()[0] == 16  # a tick for each frame would be metres wide
    assert heat.get_xlabel() == "position" and heat.get_ylabel() == "layer"
    assert len(heat.get_xticks()) < 20 and len(sums.patches) == 500


def test_patches_over_an_image():
    plain, over, _ = draw_patches(of_image()).axes
    assert plain.images[0].get_array().shape == (20, 20, 3)
    expected = of_image().against_others(of_image().credits[0])[1:, 1].unflatten(0, (2, 2))
    np.testing.assert_allclose(np.asarray(over.images[1].get_array()), expected, rtol=1e-6)
    assert over.images[0].get_extent() == over.images[1].get_extent()
    assert over.get_title() == "for dog, probability 0.73"


def test_parts():
    explanations = [of_text([0.0, 1.0, 3.0], seed=seed) for seed in range(3)]
    (axes, _) = draw_parts(explanations).axes
    drawn = np.asarray(axes.images[0].get_array())  # [classes, parts]
    mean = torch.stack([x.parts for x in explanations]).mean(0).numpy()
    np.testing.assert_allclose(np.sort(drawn, axis=1), np.sort(mean.T, axis=1), rtol=1e-6)
    assert (np.diff(drawn[-1] - drawn[0]) >= 0).all()
    with pytest.raises(ValueError, match="nothing to draw; expected at least one"):
        draw_parts([])


def test_deletion_curves():
    curves = {"ours": [1 - share for share in DELETED], "random": [0.9] * len(DELETED)}
    (axes,) = draw_deletion(curves).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == curves
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [100 * share for share in DELETED])


# The page


def test_words_are_coloured_and_escaped():
    explanation = of_text([0.0, 1.0, 3.0])
    page = render_report([explanation], title="A & B")
    assert "<title>A &amp; B</title>" in page and "&lt;b&gt;film&lt;/b&gt;" in page and "<b>" not in page
    credits = [float(explanation.against_others(word.credit)[2]) for word in explanation.by_word()]
    spans = re.findall(r'<span style="background:rgba\((\d+),\d+,\d+,([\d.]+)\)" title="([^"]+)">', page)
    assert [title for *_, title in spans] == [f"{credit:+.3f}" for credit in credits]
    assert [red == "33" for red, *_ in spans] == [credit > 0 for credit in credits]  # blue speaks for the class
    shades = [0.7 * abs(credit) / max(map(abs, credits)) for credit in credits]
    assert [float(alpha) for _, alpha, _ in spans] == pytest.approx(shades, abs=1e-3)
    assert "http" not in page and "<script" not in page and "true:" not in page


def test_wrong_predictions_come_first():
    logits = {"sure": [0.0, 0.0, 9.0], "unsure": [0.0, 0.0, 1.0], "right": [0.0, 0.0, 5.0], "barely": [0.0, 0.0, 2.0]}
    explanations = [of_text(values, text=f"{name} film") for name, values in logits.items()]
    page = render_report(explanations, [0, 0, 2, 2])
    assert [page.index(f">{name}<") for name in ("sure", "unsure", "barely", "right")] == sorted(
        page.index(f">{name}<") for name in logits
    )
    assert "Wrong, the most confident first (2)" in page and "Right, the least confident first (2)" in page
    assert page.count("true: bad") == 2
    with pytest.raises(ValueError, match="There are 1 labels of 4 explanations"):
        render_report(explanations, [0])


def test_images_and_audio_are_inside_the_page():
    for explanation, alt in ((of_image(), "the image, and"), (of_audio(), "credits of positions by layers")):
        page = render_report([explanation])
        assert page.count('src="data:image/png;base64,iVBOR') == 1 and f'alt="{alt}' in page


def test_a_text_alone():
    explanation = of_text([0.0, 1.0, 3.0])
    words = render_words(explanation)
    assert words.count("<span") == 2 and "&lt;b&gt;film&lt;/b&gt;" in words
    assert render_words(of_image()) == ""
