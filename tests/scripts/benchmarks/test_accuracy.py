import pytest
from results_pages.accuracy import draw_results
from results_pages.results import Result

RESULTS = [
    Result("RNN", "Ay et al.", 2013, 45.0, None, None, False, "https://a"),
    Result("CNN", "Be et al.", 2014, 48.0, None, 2_000_000, False, "https://b"),
    Result("head", "this project", 2026, 49.0, 0.7, 38_464, True, "commit c"),
]


def drawn(figure):
    """What is drawn, by the label of the legend: marker and coordinates."""
    (axes,) = figure.axes
    bars = {container.get_label(): container.lines[0] for container in axes.containers}
    return {label: (line.get_marker(), line.get_xydata().tolist()) for label, line in bars.items()}


def test_accuracy_against_parameters():
    figure = draw_results(RESULTS, "parameters", "SST")
    (axes,) = figure.axes
    assert axes.get_title() == "SST: accuracy against trained parameters"
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "test accuracy, %"
    assert axes.get_xlabel().splitlines() == [
        "trained parameters",
        "(results not shown because theirs are not known: 1)",
    ]
    assert drawn(figure) == {
        "published": ("o", [[2_000_000, 48.0]]),
        "this project, measured (mean ± sd over seeds)": ("D", [[38_464, 49.0]]),
    }
    assert sorted(text.get_text() for text in axes.texts) == ["CNN\nBe et al., 2014", "head\nthis project, 2026"]


def test_accuracy_against_year():
    figure = draw_results(RESULTS, "year", "SST")
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_xlabel()) == ("SST: accuracy against year", "year")
    assert drawn(figure)["published"] == ("o", [[2013, 45.0], [2014, 48.0]])
    assert len(axes.texts) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(drawn(figure))


def test_the_error_bar_is_the_standard_deviation():
    (axes,) = draw_results(RESULTS, "year", "SST").axes
    bars = next(container for container in axes.containers if "measured" in container.get_label())
    ((_, low), (_, high)) = bars.lines[2][0].get_segments()[0]
    assert (low, high) == pytest.approx((48.3, 49.7))


def test_published_results_alone():
    assert list(drawn(draw_results(RESULTS[:2], "year", "SST"))) == ["published"]


def test_mistakes():
    with pytest.raises(ValueError, match="against is 'size'; expected 'parameters' or 'year'"):
        draw_results(RESULTS, "size", "SST")
    with pytest.raises(ValueError, match="None of the 1 results has a known number of parameters"):
        draw_results(RESULTS[:1], "parameters", "SST")
