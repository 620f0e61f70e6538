"""Pictures of explanations show the numbers that were computed; the page needs nothing beside it."""

import dataclasses
import re
import warnings

import numpy as np
import pandas
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

from capsule_heads.explain.attributions import Explanation
from capsule_heads.explain.faithfulness import DELETED
from capsule_heads.explain.pictures import (
    MOST_INCHES,
    draw_deletion,
    draw_explanation,
    draw_layers,
    draw_parts,
    draw_patches,
    draw_tokens,
    lead_of,
    lead_per_credit,
    new_figure,
    shade,
    shown_classes,
)
from capsule_heads.explain.report import render_explanation, render_report, render_scores


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


def of_labels(logits):
    """An explanation by a multi-label model."""
    return dataclasses.replace(
        of_text(logits), probabilities=torch.tensor(logits).sigmoid(), is_multi_label=True, labels=("a", "b", "c")
    )


def of_guess(probability, seed=0):
    """An explanation of a text between two classes."""
    found = of_text([0.0, 0.0, 0.0], seed=seed)
    logits = torch.tensor([1 - probability, probability]).log()
    return dataclasses.replace(
        found,
        labels=found.labels[1:],
        logits=logits,
        probabilities=logits.softmax(0),
        parts=found.parts[:, 1:],
        credits=tuple(x[:, 1:] for x in found.credits),
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
    expected *= lead_per_credit(explanation, 2)
    np.testing.assert_allclose(np.asarray(heat.images[0].get_array()), expected.T, rtol=1e-6)
    gains, losses = (patch.get_data().values for patch in sums.patches)
    np.testing.assert_allclose(gains + losses, expected.sum(1), rtol=1e-5)
    assert [label.get_text() for label in heat.get_xticklabels()] == list(explanation.tokens)
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "2"]
    assert " ".join(sums.get_title().split()) == "For good, against the others; probability 84%"
    assert draw_tokens(explanation, target=0).axes[0].get_title().startswith("For bad, ")


def test_positions_of_audio_by_layer():
    figure = draw_tokens(of_audio())
    sums, heat, _ = figure.axes
    assert figure.get_size_inches()[0] == 9  # a tick for each frame would be metres wide
    assert heat.get_xlabel() == "position" and heat.get_ylabel() == "layer"
    assert len(heat.get_xticks()) < 20 and len(sums.patches[0].get_data().values) == 500
    heat = draw_tokens(dataclasses.replace(of_audio(), seconds=0.02)).axes[1]
    assert heat.get_xlabel() == "seconds" and heat.get_xlim() == pytest.approx((0, 10))


def test_patches_over_an_image():
    plain, over, _ = draw_patches(of_image()).axes
    assert plain.images[0].get_array().shape == (20, 20, 3)
    expected = of_image().against_others(of_image().credits[0])[1:, 1].unflatten(0, (2, 2))
    expected = expected * lead_per_credit(of_image(), 1)
    np.testing.assert_allclose(np.asarray(over.images[1].get_array()), expected, rtol=1e-6)
    assert over.images[0].get_extent() == over.images[1].get_extent() == [0, 20, 20, 0]
    assert " ".join(over.get_title().split()) == "For dog, against the others; probability 73%"


@pytest.mark.parametrize("n_words", (330, 20_000))
def test_a_long_text_has_a_picture_that_can_be_looked_at(n_words):
    explanation = of_text([0.0, 1.0, 3.0], text="good " * n_words)
    figure = draw_tokens(explanation)
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == MOST_INCHES
    heat = figure.axes[1]
    names = heat.get_xticklabels()
    assert heat.images[0].get_array().shape == (2, n_words + 2)  # all of them
    assert heat.get_xlabel() == f"{len(names)} of {n_words + 2:,} tokens are named"
    boxes = [name.get_window_extent() for name in names]
    assert max(box.y1 for box in boxes) - min(box.y1 for box in boxes) < 1
    anchors = [heat.transData.transform((tick, 0))[0] for tick in heat.get_xticks()]
    assert min(np.diff(anchors)) > names[0].get_fontsize() * figure.dpi / 72  # they do not touch


def test_many_layers_and_classes_and_long_names_have_bounded_pictures():
    generator = torch.Generator().manual_seed(0)
    labels = tuple(f"{'class ' * 40}{n}" for n in range(1000))
    explanation = Explanation(
        labels=labels,
        logits=torch.randn(1000, generator=generator),
        probabilities=torch.full((1000,), 0.001),
        is_multi_label=False,
        parts=torch.randn(5, 1000, generator=generator),
        credits=tuple(torch.randn(3, 1000, generator=generator) for _ in range(200)),
        layers=tuple(range(200)),
        tokens=("a" * 5000, "b", "c"),
    )
    for figure in (draw_tokens(explanation), draw_layers(explanation), draw_parts([explanation])):
        figure.canvas.draw()
        assert max(figure.get_size_inches()) <= MOST_INCHES
        for axes in figure.axes:
            assert max(map(len, axes.get_title().splitlines()), default=0) < 150
            assert all(len(name.get_text()) <= 24 for name in axes.get_xticklabels())
    page = render_report([dataclasses.replace(explanation, text="a b c")])
    assert "990 more classes are less probable." in page and len(page) < 200_000


# What fonts have


def missing_glyphs(figure):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.canvas.draw()
    return [str(warning.message) for warning in caught if "Glyph" in str(warning.message)]


def test_no_glyph_is_missing_in_any_script():
    texts = (
        "你好 世界 电影",
        "مرحبا بالعالم",
        "שלום עולם",
        "😀 👩‍👩‍👧 🇪🇺",
        "हिन्दी ไทย 한국어",
        "a\u0000b \ufeff \ue000 \ud800",
    )
    for text in texts:
        explanation = dataclasses.replace(of_text([0.0, 1.0, 3.0], text=text), labels=("差", "中", "好"))
        assert missing_glyphs(draw_tokens(explanation)) == []
        assert missing_glyphs(draw_parts([explanation])) == []


def test_tokens_that_no_font_can_draw_are_numbered(monkeypatch):
    explanation = of_text([0.0, 1.0, 3.0], text="good \U00012345\U00012346")  # cuneiform
    (own,) = [font for font in font_manager.fontManager.ttflist if font.fname.endswith("DejaVuSans.ttf")][:1]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [own])
    heat = draw_tokens(explanation).axes[1]
    assert [name.get_text() for name in heat.get_xticklabels()] == ["[CLS]", "good", "#2", "[SEP]"]
    assert heat.get_xlabel() == "# is the number of a token that no installed font can draw"


def test_an_installed_font_that_has_the_character_is_used():
    def characters(name):
        return set(font_manager.get_font(font_manager.findfont(name)).get_charmap())

    only_there = sorted(characters("STIXGeneral") - characters("DejaVu Sans"))  # both come with matplotlib
    character = next(chr(x) for x in only_there if chr(x).isprintable())
    figure = draw_tokens(of_text([0.0, 1.0, 3.0], text=f"good {character}"))
    assert missing_glyphs(figure) == []
    name = figure.axes[1].get_xticklabels()[2]
    assert name.get_text() == character and len(name.get_fontfamily()) > 1


def test_dollars_and_backslashes_are_no_formulas():
    explanation = of_text([0.0, 1.0, 3.0], text=r"$x_{$ $\frac$ \n")
    figure = draw_tokens(dataclasses.replace(explanation, labels=("a", "b", r"$\bad$")))
    figure.canvas.draw()
    assert [name.get_text() for name in figure.axes[1].get_xticklabels()][1:4] == [r"$x_{$", r"$\frac$", r"\n"]


# What pictures are


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"))
def test_images_of_any_kind(mode):
    image = Image.new("RGB", (20, 20), (200, 10, 10))
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    figure = draw_patches(dataclasses.replace(of_image(), image=image))
    figure.canvas.draw()
    pixels = np.asarray(figure.axes[0].images[0].get_array())
    assert pixels.shape[:2] == (20, 20)
    if mode in ("P", "RGB", "RGBA", "YCbCr"):
        assert pixels[0, 0, 0] > 180 and pixels[0, 0, 1] < 30  # red


@pytest.mark.parametrize("most", (1.0, 255.0, 65_535, 300))
def test_arrays_of_any_range(most, caplog):
    pixels = np.linspace(0, most, 1200).reshape(3, 20, 20)
    pixels = torch.from_numpy(pixels) if most <= 255 else pixels.astype(np.uint16)
    figure = draw_patches(dataclasses.replace(of_image(), image=pixels))
    figure.canvas.draw()
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    assert (drawn.max() == 1 and len(np.unique(drawn)) == 1200 * (most != 300)) or most == 300
    assert "Clipping" not in caplog.text


def without_a_grid(shape):
    """Explanations of images whose tokens make no grid, or grids that do not nest, or no image at all."""
    found = of_image()
    if shape == "ragged":  # as many tokens as no grid of the image has
        return dataclasses.replace(found, credits=(torch.randn(41, 2),), n_pixels=(16, 16), patch_size=(8, 8))
    if shape == "packed":  # SigLIP 2 takes patches, not pixels in rows and columns
        return dataclasses.replace(found, n_pixels=None, patch_size=None)
    layers = (torch.randn(9, 2), torch.randn(4, 2))
    return dataclasses.replace(found, credits=layers, layers=(1, 2), patch_size=None)


@pytest.mark.parametrize("shape", ("ragged", "packed", "not nested"))
def test_an_image_without_a_grid_is_shown_with_its_layers(shape):
    explanation = without_a_grid(shape)
    plain, axes = draw_explanation(explanation).axes
    assert plain.images[0].get_array().shape == (20, 20, 3)
    expected = explanation.against_others(explanation.by_layer())[:, 1] * lead_per_credit(explanation, 1)
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], expected, rtol=1e-5)
    assert render_report([explanation], [1]).count("data:image/webp;base64,") == 1


def test_layers_with_other_tokens_each():
    explanation = dataclasses.replace(of_audio(), credits=(torch.randn(9, 2), torch.randn(4, 2)), layers=(1, 2))
    (axes,) = draw_explanation(explanation).axes
    assert [name.get_text() for name in axes.get_yticklabels()] == ["1", "2"]
    for text in (None, "a text whose tokens a backbone merges"):
        page = render_report([dataclasses.replace(explanation, text=text)])
        assert "data:image/webp;base64," in page and (text or "<img") in page


# How strong colours are


def test_colours_have_one_scale_and_a_guess_is_pale():
    def found(probability):
        explanation = of_guess(probability)
        page = render_report([explanation])
        drawn = draw_tokens(explanation).axes[1].images[0]
        assert (drawn.norm.vmin, drawn.norm.vmax) == (-1, 1)
        for tag in ("span", "td"):  # each colour is that of its number, on every page
            shown = re.findall(rf'<{tag} style="background:rgba\([^)]*,([\d.]+)\)"(?: title="|>)([+-][\d.]+)', page)
            assert shown and all(float(x) == pytest.approx(0.7 * shade(float(n)), abs=0.02) for x, n in shown)
        assert np.asarray(drawn.norm([-0.25, 0.25])) == pytest.approx([0.25, 0.75])  # as strong as `shade`: a half
        tokens = explanation.against_others(explanation.by_token())[:, 1] * lead_per_credit(explanation, 1)
        assert float(tokens.abs().sum()) == pytest.approx(abs(np.log(probability / (1 - probability))), rel=1e-4)
        return float(tokens.abs().max())

    guess, sure = found(0.54), found(0.99)
    assert shade(guess) < 0.4 and shade(sure) == 1 and shade(0) == 0


def test_the_lead_of_a_class():
    explanation = of_labels([-9.0, 0.3, 1.5])
    assert [lead_of(explanation, k) for k in range(3)] == pytest.approx([9, 0.3, 1.5])
    assert [lead_of(of_text([0.0, 1.0, 3.0]), k) for k in range(3)] == pytest.approx([3, 2, 2])
    assert lead_of(dataclasses.replace(of_text([0.0, 1.0, 3.0]), logits=torch.tensor([0.2])), 0) == pytest.approx(0.2)
    assert shown_classes(of_labels([2.0, -1.0, 1.0])) == [0, 2] and shown_classes(of_labels([-2.0, -1.0, -3.0])) == [1]


def test_sure_and_unsure_are_told_apart():
    for probability, word in ((0.54, "unsure"), (0.7, "likely"), (0.99, "sure")):
        assert f'<span class="chip">{word}</span>' in render_report([of_guess(probability)])
    page = render_report([of_guess(0.54)])
    assert "The lead of good over so so is 0.16 logits." in page and "-0.03" in page  # the scale


def test_parts():
    explanations = [of_text([0.0, 1.0, 3.0], seed=seed) for seed in range(3)]
    (axes, _) = draw_parts(explanations).axes
    drawn = np.asarray(axes.images[0].get_array())  # [classes, parts]
    mean = torch.stack([x.parts for x in explanations]).mean(0).numpy()
    np.testing.assert_allclose(np.sort(drawn, axis=1), np.sort(mean.T, axis=1), rtol=1e-6)
    assert (np.diff(drawn[-1] - drawn[0]) >= 0).all()
    with pytest.raises(ValueError, match="nothing to draw; expected at least one"):
        draw_parts([])


def test_a_head_without_parts():
    explanations = [
        dataclasses.replace(of_text([0.0, 1.0, 3.0], f"good film {n % 3}", seed=n), parts=torch.zeros(0, 3))
        for n in range(9)
    ]
    with pytest.raises(ValueError, match="There are no parts to draw"):
        draw_parts(explanations)
    page = render_report(explanations, [2] * 9, "nine")
    assert page.count("Tokens by layer") == 9 and "Parts that carry" not in page
    draw_explanation(explanations[0])


def test_deletion_curves():
    curves = {"ours": [1 - share for share in DELETED], "random": [0.9] * len(DELETED)}
    (axes,) = draw_deletion(curves).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == curves
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [100 * share for share in DELETED])


# The page


def test_words_are_coloured_and_escaped():
    explanation = of_text([0.0, 1.0, 3.0])
    explanation = dataclasses.replace(explanation, labels=("bad", "so <so>", "good & <i>"))
    page = render_report([explanation], title="A & B")
    assert page.startswith("<!doctype html>") and "<title>A &amp; B</title>" in page
    assert "&lt;b&gt;film&lt;/b&gt;" in page and ">film" not in page and "so &lt;so&gt;" in page and "<i>" not in page
    shares = [float(explanation.against_others(word.credit)[2]) for word in explanation.by_word()]
    shares = [share * lead_per_credit(explanation, 2) for share in shares]
    spans = re.findall(r'<span style="background:rgba\((\d+),\d+,\d+,([\d.]+)\)" title="([^"]+)">', page)
    assert [title for *_, title in spans] == [f"{share:+.3f}" for share in shares]
    assert [red == "33" for red, *_ in spans] == [share > 0 for share in shares]  # blue speaks for the class
    assert [float(alpha) for _, alpha, _ in spans] == pytest.approx([0.7 * shade(x) for x in shares], abs=1e-3)
    assert "http" not in page and "<script" not in page and "true:" not in page


LOGITS = {"sure": [0.0, 0.0, 9.0], "unsure": [0.0, 0.0, 1.0], "right": [0.0, 0.0, 5.0], "barely": [0.0, 0.0, 2.0]}


def four_texts():
    return [of_text(values, text=f"{name} film") for name, values in LOGITS.items()]


def in_order(page):
    return sorted(LOGITS, key=lambda name: page.index(f">{name}<"))


def test_wrong_predictions_come_first():
    page = render_report(four_texts(), [0, 0, 2, 2])
    assert in_order(page) == ["sure", "unsure", "barely", "right"]
    assert "Wrong, the most confident first (2)" in page and "Right, the least confident first (2)" in page
    assert page.count("true: bad") == 2 and page.count("✗ wrong") == 2 and page.count("✓ right") == 2
    with pytest.raises(ValueError, match="labels has 1 label for 4 explanations"):
        render_report(four_texts(), [0])


@pytest.mark.parametrize(
    "labels",
    (
        np.array([0, 0, 2, 2]),
        np.array([0, 0, 2, 2], dtype=np.float32),
        torch.tensor([0, 0, 2, 2], dtype=torch.int32),
        pandas.Series([0, 0, 2, 2], index=[7, 5, 3, 1]),
        pandas.Series([0, 0, 2, 2], dtype="Int64"),
        [np.int64(0), torch.tensor(0), 2.0, np.uint8(2)],
        (0, False, 2, 2),
    ),
    ids=lambda labels: type(labels).__name__,
)
def test_labels_are_numbers_of_any_library(labels):
    assert in_order(render_report(four_texts(), labels)) == ["sure", "unsure", "barely", "right"]


def test_unknown_labels():
    for nothing in (None, -1, float("nan"), np.nan, pandas.NA, np.int64(-1), torch.tensor(-1)):
        page = render_report(four_texts(), [nothing, 0, 2, nothing])
        assert page.count("true: ") == 2 and "Not labelled (2)" in page
        assert page.index("Not labelled") < page.index(">sure<") < page.index(">barely<") < page.index("Wrong")
    page = render_report(four_texts(), pandas.Series([0, None, 2, None]))
    assert page.count("true: ") == 2
    page = render_report(four_texts(), torch.full((4,), -1))
    assert "true:" not in page and "Not labelled" not in page and "right" not in re.findall("✓ (right)", page)


@pytest.mark.parametrize("label", (3, -2, 0.5, "good", [0, 1, 0]))
def test_what_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=r"labels\[1\] is .*; expected a class from 0 to 2, or None"):
        render_report(four_texts(), [0, label, 0, 0])


def test_many_labels():
    explanations = [of_labels([2.0, -3.0, 1.0]), of_labels([-2.0, -3.0, -1.0]), of_labels([-2.0, 4.0, -1.0])]
    page = render_report(explanations, torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0]]))
    wrong, right = page[page.index("Wrong") :].split("Right, ")
    assert "<b>a</b> 88%" in wrong and "✓ right" in wrong and "<b>c</b> 73%" in wrong and "✗ wrong" in wrong
    assert "true: a, b" in wrong and wrong.count('class="text"') == 2  # one for each label above 0.5
    assert wrong.index("Credits for <b>a</b>") < wrong.index("Credits for <b>c</b>")
    assert right.startswith("the least confident first (2)") and "<b>no label</b> above its threshold" in right
    assert "true: no label" in right and "✓ right" in right and "Credits for <b>b</b>" in right
    assert "true" not in render_report(explanations, [None, -1, [-1, -1, -1]])
    with pytest.raises(ValueError, match=r"labels\[0\] is 1; expected 3 numbers, 0 or 1, or None"):
        render_report(explanations, [1, 0, 0])


def test_texts_of_a_pair_are_apart():
    page = render_explanation(of_text([0.0, 1.0, 3.0], text="good film\tbad plot"))
    first, second = page[page.index('class="text"') :].split('<span class="pair"')
    assert ">film<" in first and ">bad<" in second and "\t" not in second


def test_what_was_cut_off_is_marked():
    whole = of_text([0.0, 1.0, 3.0], text="one two three four")
    cut = dataclasses.replace(whole, n_cut=1200, text="one two three four five <six>")
    page = render_report([cut])
    assert "1,200 more tokens were cut off" in page and '<s title="cut off"> five &lt;six&gt;</s>' in page
    assert "1 more token was cut off" in render_explanation(dataclasses.replace(cut, n_cut=1))
    for words in ((), cut.spans):  # a tokenizer that does not say which words it read
        assert "five &lt;six&gt;" in render_report([dataclasses.replace(cut, spans=words)])
    assert "cut off" not in render_report([whole])


def test_a_page_of_long_texts_is_small():
    explanation = of_text([0.0, 1.0, 3.0], text="good " * 20_000)
    page = render_report([explanation])
    assert "1,000 of 20,000 words are coloured" in page and page.count('" title="+') + page.count('" title="-') == 1000
    assert "Tokens by layer: 100 of 20,002, those with the largest shares" in page and page.count("<th class") == 100
    assert len(page) < 300_000 and page.count("good") >= 20_000
    shares = explanation.against_others(explanation.by_token_and_layer())[..., 2] * lead_per_credit(explanation, 2)
    assert f">{shares.flatten()[shares.abs().argmax()]:+.3f}</td>" in page


def test_images_and_audio_are_inside_the_page():
    for explanation in (of_image(), of_audio()):
        page = render_report([explanation])
        assert page.count('src="data:image/webp;base64,') == 1 and 'alt="picture of the credits"' in page
        assert render_explanation(explanation).count('src="data:image/webp;base64,') == 1


def test_a_prediction_alone():
    page = render_explanation(of_text([0.0, 1.0, 3.0]))
    assert page.count('title="token ') == 4 and "&lt;b&gt;film&lt;/b&gt;" in page and "<b>good</b> 84%" in page
    assert 'class="legend"' in page and "<html" not in page and page.count("data:image/webp") == 1


def test_scores_alone():
    page = render_scores(["a", "<b>"], [0.004, 0.996], None, "There are no credits.")
    assert (
        "<b>&lt;b&gt;</b> &gt;99%" in page
        and "There are no credits." in page
        and "legend" not in page.split("</style>")[1]
    )
    page = render_scores(["a", "b", "c"], [0.7, 0.2, 0.8], "multi_label_classification", "")
    assert "<b>c</b> 80%" in page and "<b>a</b> 70%" in page and "<b>b</b>" not in page
    page = render_scores(["a", "b"], [0.4, 0.6], "multi_label_classification", "", [0.3, 0.7])
    assert "<b>a</b> 40%" in page and "<b>b</b>" not in page
    page = render_scores(["stars"], [3.14159], "regression", "Its values have none.")
    assert "<b>stars</b> 3.142" in page and "%" not in page.split("</style>")[1]
