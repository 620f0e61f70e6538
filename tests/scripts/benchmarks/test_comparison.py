"""The results page says what the runs say."""

import pytest
from results_pages.comparison import render_results
from scipy.stats import ttest_rel


def run(head, seed, validation, test, rate=0.002):
    sizes = {"seconds": 10.0 + seed, "steps": 100, "parameters": 1234}
    return {"head": head, "rate": rate, "seed": seed, "validation": validation, "test": test, **sizes}


OURS = [0.48, 0.50, 0.49]
WORSE = [0.40, 0.41, 0.43]
RECORD = {
    "task": "sst5",
    "backbone": "b",
    "phrases": 20_000,
    "epochs": 3,
    "commit": "abc1234",
    "date": "2026-11-27",
    "tried": [run("capsules", 0, 0.5, 0.5, rate) for rate in (0.0005, 0.002)],
    "runs": [
        *(run("capsules", seed, 0.5, test) for seed, test in enumerate(OURS)),
        *(run("linear, mean", seed, 0.4, test) for seed, test in enumerate(WORSE)),
        *(run("scalar mix", seed, 0.3, 0.9) for seed in range(3)),
    ],
    "ablations": [run("no mixup", seed, 0.5, 0.47) for seed in range(2)],
}
PUBLISHED = [
    {
        "task": task,
        "method": "m",
        "authors": "A",
        "year": 2019,
        "accuracy": 58.5,
        "url": "https://x",
        "where": "page 1",
    }
    for task in ("sst5", "smallnorb")
]


def test_the_page():
    page = render_results([RECORD], PUBLISHED)
    assert "## SST-5, complete sentences (five classes)" in page
    assert "20,000 phrases, drawn once, 3 epochs; backbone `b`; learning rates tried: 0.0005, 0.002; commit " in page
    assert "| capsules | 50.0 ± 0.0 | 49.0 ± 1.0 | 1,234 | 0.002 | 3 | 11 |" in page
    assert "| linear, mean | 40.0 ± 0.0 | 41.3 ± 1.5 | 1,234 | 0.002 | 3 | 11 |" in page
    # The best control is chosen on validation, though another is better on the test split.
    verdict = f"(paired t-test over 3 seeds: p = {ttest_rel(OURS, WORSE).pvalue:.2g}; it wins)"
    best = "Best on validation are 'capsules' and, of the controls, 'linear, mean': on the test split the former is"
    assert f"{best} +7.7 points from the latter {verdict}" in page
    assert "| as it is | 50.0 ± 0.0 | 49.0 ± 1.4 |" in page  # of the seeds of the variants alone
    assert "| no mixup | 50.0 ± 0.0 | 47.0 ± 0.0 |" in page
    assert "| head | 0.0005 | 0.002 |" in page and "| capsules | 50.0 | 50.0 |" in page
    assert "with p < 0.05 for each, none is better than it." in page
    assert page.count("| m (A) | 2019 | 58.5 | [page 1](https://x) |") == 1


@pytest.mark.parametrize(
    ("theirs", "words"), [([0.58, 0.60, 0.59], "it loses"), ([0.47, 0.52, 0.48], "no difference beyond the seeds")]
)
def test_the_verdict_is_honest(theirs, words):
    theirs = [run("linear, mean", seed, 0.4, test) for seed, test in enumerate(theirs)]
    record = {**RECORD, "runs": [*RECORD["runs"][:3], *theirs], "ablations": []}
    page = render_results([record], [])
    assert words in page and "Variants" not in page and "Published" not in page


def test_nothing_to_write():
    with pytest.raises(ValueError, match=r"no results to write; run scripts/benchmarks/compare_heads\.py first"):
        render_results([], [])


def test_variants_that_are_better_are_named():
    better = [run("no mixup", seed, validation, 0.47) for seed, validation in enumerate((0.55, 0.56, 0.57))]
    page = render_results([{**RECORD, "ablations": better}], [])
    assert "with p < 0.05 for each, these are better than it: no mixup." in page
