"""The results pages say what the runs say."""

import pytest
from results_pages.comparison import holm, render_results, render_set
from scipy.stats import ttest_1samp, ttest_rel

SPACE = {"learning_rate": [0.001, 0.01], "n_iters": [2, 3], "C": [0.1, 1.0]}
OURS = {"trec": [0.93, 0.94, 0.95], "cr": [0.86, 0.85, 0.87]}
THEIRS = {"trec": [0.951, 0.961, 0.9712], "cr": [0.85, 0.86, 0.86]}


def run(head, settings, seed, validation, test):
    sizes = {"seconds": 10.0 + (seed or 0), "parameters": 1234, "fault": None}
    return {"head": head, "settings": settings, "seed": seed, "validation": validation, "test": test, **sizes}


def record(of_set):
    best = {"learning_rate": 0.01, "n_iters": 2}
    tried = [
        run("capsules", {"learning_rate": 0.001, "n_iters": 2}, 0, 0.80, 0.99),
        run("capsules", {"learning_rate": 0.01, "n_iters": 3}, 0, 0.88, 0.99),
    ]
    ours = [run("capsules", best, seed, 0.9, test) for seed, test in enumerate(OURS[of_set])]
    theirs = [run("scalar mix", {"learning_rate": 0.01}, seed, 0.8, test) for seed, test in enumerate(THEIRS[of_set])]
    varied = [run("soft k-means", best, seed, 0.8, test - 0.02) for seed, test in enumerate(OURS[of_set])]
    regression = {**run("regression", {"C": 0.1}, None, 0.7, 0.97), "tried": {"0.1": 0.7, "1": 0.6}}
    return {
        "set": of_set,
        "texts": {"train": 5000, "validation": 500, "test": 400},
        "backbone": "b",
        "steps": 600,
        "space": SPACE,
        "commit": "abc1234",
        "machine": "x86_64",
        "date": "2026-11-29",
        "best": {"capsules": best, "scalar mix": {"learning_rate": 0.01}, "regression": {"C": 0.1}},
        "variants": {"soft k-means": best},
        "runs": [*varied, *tried, *ours, *theirs, regression],
    }


def cells(page, start):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return line.strip("| ").split(" | ")


def test_accuracies():
    page = render_results([record("trec"), record("cr")], [])
    section = page.split("## Accuracy")[1].split("## Against")[0]
    assert "600 batches" in page and "with 3 seeds" in " ".join(page.split())
    assert "| head | [CR](heads/cr.md) | [TREC](heads/trec.md) | mean |" in section  # in one order
    assert cells(section, "capsules") == ["capsules", "86.0 ± 1.0", "94.0 ± 1.0", "90.0", "2.5", "1,234", "11"]
    assert cells(section, "regression") == ["regression", "97.0", "97.0", "97.0", "1.0", "1,234", "10"]
    errors = [100 * (0.97 * 0.03 / 400) ** 0.5] * 2
    assert cells(section, "standard error")[1:3] == [f"{x:.1f}" for x in errors]


def test_differences_are_tested():
    page = render_results([record("trec"), record("cr")], [])
    section = page.split("## Against")[1].split("## What")[0]
    p = ttest_rel(THEIRS["trec"], OURS["trec"]).pvalue
    assert 2 * p < 0.05  # of two heads that are compared
    found = cells(section, "scalar mix")
    differences = [100 * (sum(THEIRS[x]) - sum(OURS[x])) / 3 for x in ("cr", "trec")]
    assert found[1:3] == [f"{differences[0]:+.1f}", f"**{differences[1]:+.1f}**"]
    over_sets = [ttest_1samp(x, 0).pvalue for x in (differences, [11.0, 3.0])]
    assert found[3:] == [f"{sum(differences) / 2:+.2f}", f"{holm(over_sets)[0]:.2g}", "1", "0"]
    # The regression, which has no seeds, is compared with each run.
    alone = ttest_rel([0.97] * 3, OURS["cr"]).pvalue
    assert ("**" in cells(section, "regression")[1]) == (min(1, 2 * alone) < 0.05)


def test_what_settings_are_worth():
    section = render_results([record("trec"), record("cr")], []).split("## What")[1]
    assert "| head | `learning_rate` 0.01 against 0.001 | `n_iters` 3 against 2 |" in section
    assert cells(section, "capsules") == ["capsules", "+10.0 ± 0.0", "-2.0 ± 0.0"]
    assert "regression" not in section


def test_variants():
    section = render_results([record("trec"), record("cr")], []).split("## Variants")[1]
    # The difference is the same from each seed, so there is nothing to test over them.
    assert cells(section, "soft k-means")[:4] == ["soft k-means", "-2.0", "-2.0", "-2.00"]
    assert "Variants" not in render_results([record("trec"), {**record("cr"), "variants": {}}], [])


def test_the_page_of_a_set():
    page = render_set(record("trec"))
    assert "compare_heads.py --set trec --data DIRECTORY --variants 'soft k-means'" in page
    assert "| capsules | `learning_rate` 0.01, `n_iters` 2 | 90.0 ± 0.0 | 94.0 ± 1.0 | 1,234 | 11 |" in page
    assert "| capsules | `learning_rate` 0.01, `n_iters` 3 | 88.0 |" in page
    assert "| regression | `C` 1 | 60.0 |" in page
    stopped = record("trec")
    stopped["runs"][3]["fault"] = "step 3: not finite"
    assert "| capsules | `learning_rate` 0.001, `n_iters` 2 | stopped |" in render_set(stopped)


def test_one_set():
    """There is nothing to test over sets, and no standard error over them."""
    page = render_results([record("trec")], [])
    assert cells(page.split("## Against")[1].split("## What")[0], "scalar mix")[2:] == ["+2.11", "", "1", "0"]
    assert cells(page.split("## What")[1], "capsules") == ["capsules", "+10.0", "-2.0"]


def test_published_numbers():
    published = [
        {"task": task, "method": "m", "authors": "A", "year": 2019, "accuracy": 58.5, "url": "https://x", "where": "p"}
        for task in ("sst5", "smallnorb")
    ]
    OURS["sst5"], THEIRS["sst5"] = OURS["cr"], THEIRS["cr"]
    page = render_results([record("sst5")], published)
    assert "## Published: SST-5" in page and page.count("| m (A) | 2019 | 58.5 | [p](https://x) |") == 1
    assert "Published" not in render_results([record("cr")], published)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_nothing_to_write():
    with pytest.raises(ValueError, match=r"no results to write; run scripts/benchmarks/compare_heads\.py first"):
        render_results([], [])
    with pytest.raises(ValueError, match="The sets have 300, 600 steps; expected the same for all"):
        render_results([record("trec"), {**record("cr"), "steps": 300}], [])
