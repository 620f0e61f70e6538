"""The results pages of heads: what compare_heads.py has measured, as Markdown; nothing on them is typed by hand."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import rankdata, ttest_1samp, ttest_rel

from .tables import markdown, percent

CAPSULES = "capsules"  # what the others are compared with
SIGNIFICANT = 0.05
TITLES = {
    "sst5": "SST-5",
    "sst2": "SST-2",
    "glue_sst2": "GLUE SST-2",
    "mr": "MR",
    "cr": "CR",
    "subj": "SUBJ",
    "trec": "TREC",
}
TASKS = {"sst5": "sst5", "sst2": "sst2_root"}  # by set, for what is published
PLACES = {"sst5": "--trees TREES", "sst2": "--trees TREES", "glue_sst2": "--glue GLUE_SST2"}
REMARK = """`scripts/benchmarks/write_results.py` writes this page from what `scripts/benchmarks/compare_heads.py`
has measured.

All heads take the same hidden states of the same frozen backbone, from one cache, and as many steps: {steps} batches of
20 texts. Each is tuned alike on the validation split, with one seed: its learning rate, weight decay, mixup, and, if it
has them, iterations and parts. The best setting of each is then trained with {seeds} seeds. The test split chose
nothing. The regression takes mean, maximum and first token of every layer, and is tuned by its penalty.

Sets have at most 20,000 texts to train on; of SST these are phrases. Accuracies are on the test split, in percent, mean
± standard deviation over seeds. The last line of the table has the standard error of an accuracy, which follows from
the number of test texts. A difference below it says little about other texts, even where all seeds agree.

[An earlier comparison](heads_earlier.md) tuned learning rates alone, on SST-5, SST-2 and GLUE's SST-2."""
TESTED = """## Against the capsule head

Differences of the mean accuracies on the test split, in points. Set in bold are those of paired t-tests over seeds with
p < 0.05 after Holm's correction for the heads of one set. The last columns are of all sets: the mean difference, its p
by a t-test over sets, corrected likewise, and on how many sets the head is better or worse by the tests over seeds."""
WORTH = """## What the settings are worth

Each setting was tried with the best values of those before it. Validation accuracy against that of the value that was
tried first, in points: mean over sets ± standard error. These trials have one seed each, and the best of them was
chosen, so differences of less than two standard errors say nothing."""
VARIANTS = """## Variants of the capsule head

What might make the capsule head better, trained with its best settings on each set and the same seeds. Each is a class
of `scripts/benchmarks/variants.py`, whose first line says what is changed. Differences from the head as it is, in mean
accuracy on the test split, in points; bold, better and worse as above, p by a t-test over sets."""
PAPER = """## The paper's numbers

This project has not run these: they need a GPU. The paper's settings, for 58.5 on SST-5, 95.6 on SST-2 and 99.1 on
smallNORB (Heinsen, 2019), are

```bash
capsule-heads train --config sst5
capsule-heads train --config sst2
capsule-heads train --config smallnorb --source DIRECTORY
```"""
Record = Mapping[str, Any]


def render_results(records: Sequence[Record], published: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of all sets.

    Args:
        records: one record for each set, as compare_heads.py writes them.
        published: published results, as `read_published` returns them.

    Raises:
        ValueError: If there are no records, or these have different numbers of steps.
    """
    records = in_order(records)
    names = heads_of(records)
    steps = {record["steps"] for record in records}
    if len(steps) > 1:
        raise ValueError(f"The sets have {', '.join(map(str, sorted(steps)))} steps; expected the same for all.")
    seeds = max(len(final_runs(record, name)) for record in records for name in names)
    sections = [
        "# Results",
        REMARK.format(steps=steps.pop(), seeds=seeds),
        "## Accuracy",
        accuracies(records, names),
        TESTED,
        against_capsules(records, names),
        WORTH,
        worth(records, names),
    ]
    variants = [name for name in records[0]["variants"] if all(name in record["variants"] for record in records)]
    if variants:
        sections += [VARIANTS, against_capsules(records, variants, "variant")]
    for record in records:
        of_task = [x for x in published if x["task"] == TASKS.get(record["set"])]
        if of_task:
            sections += [f"## Published: {TITLES[record['set']]}", _published(of_task)]
    return "\n\n".join(section.rstrip() for section in [*sections, PAPER]) + "\n"


def render_set(record: Record) -> str:
    """Return the page of one set: the command, the best settings of each head, and all trials."""
    texts = ", ".join(f"{n:,} {split}" for split, n in record["texts"].items())
    place = PLACES.get(record["set"], "--data DIRECTORY")
    about = f"{record['machine']}, commit {record['commit'] or 'unknown'}, {record['date']}."
    variants = f" --variants {' '.join(map(repr, record['variants']))}" if record["variants"] else ""
    rows = []
    for name in (*record["best"], *record["variants"]):
        runs = final_runs(record, name)
        scores = [percent([x[split] for x in runs]) for split in ("validation", "test")]
        seconds = statistics.mean(x["seconds"] for x in runs)
        rows.append([name, _words(runs[0]["settings"]), *scores, f"{runs[0]['parameters']:,}", f"{seconds:.0f}"])
    trials = []
    for name in record["best"]:
        for run in trials_of(record, name):
            of_split = "stopped" if run["fault"] else percent([run["validation"]])
            trials.append([name, _words(run["settings"]), of_split])
    return (
        "\n\n".join(
            [
                f"# {TITLES[record['set']]}",
                f"Texts: {texts}. Backbone `{record['backbone']}`, {record['steps']} steps of 20 texts.",
                f"```bash\npython scripts/benchmarks/compare_heads.py --set {record['set']} {place}{variants}\n```",
                f"{about} Seconds are of one thread beside another, for one training of a head without the backbone; "
                "compare them roughly. All runs, with their seeds: "
                f"[{record['set']}.json]({record['set']}.json).",
                markdown(
                    ["head", "best settings", "validation, %", "test, %", "trainable parameters", "training, s"], rows
                ),
                "## Trials",
                markdown(["head", "settings", "validation, %"], trials),
            ]
        )
        + "\n"
    )


def in_order(records: Sequence[Record]) -> list[Record]:
    """Return records in the order of `TITLES`.

    Raises:
        ValueError: If there are none.
    """
    if not records:
        raise ValueError("There are no results to write; run scripts/benchmarks/compare_heads.py first.")
    return sorted(records, key=lambda x: list(TITLES).index(x["set"]))


def heads_of(records: Sequence[Record]) -> list[str]:
    """Return the heads that were measured on all sets."""
    return [name for name in records[0]["best"] if all(name in record["best"] for record in records)]


def trials_of(record: Record, name: str) -> list[Mapping[str, Any]]:
    """Return the trials of a head, as they were made; of the regression, one for each penalty."""
    runs = [x for x in record["runs"] if x["head"] == name]
    if runs[0]["seed"] is None:
        return [
            {**runs[0], "settings": {"C": float(c)}, "validation": accuracy} for c, accuracy in runs[0]["tried"].items()
        ]
    return [x for x in runs if x["seed"] == runs[0]["seed"]]


def final_runs(record: Record, name: str) -> list[Mapping[str, Any]]:
    """Return the runs of a head's best settings, by seed."""
    best = {**record["variants"], **record["best"]}[name]
    runs = [x for x in record["runs"] if x["head"] == name and x["settings"] == best and not x["fault"]]
    return sorted(runs, key=lambda x: x["seed"] or 0)


def accuracies(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return the table of test accuracies, with mean, mean rank, size and time."""
    tests = {name: [[x["test"] for x in final_runs(record, name)] for record in records] for name in names}
    means = {name: [statistics.mean(values) for values in of_sets] for name, of_sets in tests.items()}
    of_sets = list(zip(*means.values(), strict=True))
    ranks = [rankdata([-x for x in values]) for values in of_sets]
    rows = []
    for place, name in enumerate(names):
        runs = [x for record in records for x in final_runs(record, name)]
        sizes = sorted({x["parameters"] for x in runs})
        size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        seconds = statistics.mean(x["seconds"] for x in runs)
        rank = statistics.mean(float(of_set[place]) for of_set in ranks)
        cells = [f"{100 * statistics.mean(means[name]):.1f}", f"{rank:.1f}", size, f"{seconds:.0f}"]
        rows.append([name, *(percent(values) for values in tests[name]), *cells])
    errors = [
        100 * (max(values) * (1 - max(values)) / record["texts"]["test"]) ** 0.5
        for values, record in zip(of_sets, records, strict=True)
    ]
    rows.append(["standard error", *(f"{error:.1f}" for error in errors), "", "", "", ""])
    sets = [f"[{TITLES[x['set']]}](heads/{x['set']}.md)" for x in records]
    return markdown(["head", *sets, "mean", "mean rank", "trainable parameters", "training, s"], rows)


def against_capsules(records: Sequence[Record], names: Sequence[str], what: str = "head") -> str:
    """Return the table of differences from the capsule head, with paired tests.

    Args:
        records: of the sets.
        names: of heads, or of variants of the capsule head.
        what: they are.
    """
    others = [name for name in names if name != CAPSULES]
    differences: dict[str, list[float]] = {name: [] for name in others}
    is_sure: dict[str, list[bool]] = {name: [] for name in others}
    for record in records:
        ours = [x["test"] for x in final_runs(record, CAPSULES)]
        ps = []
        for name in others:
            theirs = [x["test"] for x in final_runs(record, name)]
            theirs = theirs * len(ours) if len(theirs) == 1 else theirs  # the regression has no seeds
            differences[name].append(100 * (statistics.mean(theirs) - statistics.mean(ours)))
            ps.append(_paired(theirs, ours))
        for name, p in zip(others, holm(ps), strict=True):
            is_sure[name].append(p < SIGNIFICANT)
    over_sets = [float(ttest_1samp(differences[name], 0).pvalue) if len(records) > 1 else 1.0 for name in others]
    rows = []
    for name, p in zip(others, holm(over_sets), strict=True):
        pairs = list(zip(differences[name], is_sure[name], strict=True))
        cells = [f"**{x:+.1f}**" if sure else f"{x:+.1f}" for x, sure in pairs]
        better, worse = (sum(sure and sign * x > 0 for x, sure in pairs) for sign in (1, -1))
        rows.append(
            [
                name,
                *cells,
                f"{statistics.mean(differences[name]):+.2f}",
                f"{p:.2g}" if len(records) > 1 else "",
                str(better),
                str(worse),
            ]
        )
    return markdown([what, *(TITLES[x["set"]] for x in records), "mean", "p", "better", "worse"], rows)


def _paired(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the p of a paired t-test; 1 where there is nothing to test."""
    differences = [x - y for x, y in zip(first, second)]
    if len(first) != len(second) or len(first) < 2 or max(differences) - min(differences) < 1e-9:
        return 1.0
    return float(ttest_rel(first, second).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p of several tests, corrected by Holm's method."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def worth(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return the table of what each value of a setting changes, by head."""
    axes = {name: values for name, values in records[0]["space"].items() if name != "C"}
    columns = [(axis, value) for axis, values in axes.items() for value in values[1:]]
    rows = []
    for name in names:
        cells = []
        for axis, value in columns:
            gains = [x for record in records for x in _gains(trials_of(record, name), axis, axes[axis][0], value)]
            cell = f"{100 * statistics.mean(gains):+.1f}" if gains else ""
            if len(gains) > 1:
                cell += f" ± {100 * statistics.stdev(gains) / len(gains) ** 0.5:.1f}"
            cells.append(cell)
        if any(cells):
            rows.append([name, *cells])
    heading = [f"`{axis}` {value:g} against {axes[axis][0]:g}" for axis, value in columns]
    return markdown(["head", *heading], rows)


def _gains(trials: Sequence[Mapping[str, Any]], axis: str, first: float, value: float) -> list[float]:
    """Return the gains in validation accuracy of trials that differ from others in one setting alone."""
    trained = [x for x in trials if not x["fault"] and axis in x["settings"]]
    by_settings = {tuple(sorted(x["settings"].items())): x["validation"] for x in trained}
    gains = []
    for run in trained:
        before = by_settings.get(tuple(sorted({**run["settings"], axis: first}.items())))
        if run["settings"][axis] == value and before is not None:
            gains.append(run["validation"] - before)
    return gains


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` {value:g}" for name, value in settings.items())


def _published(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [f"{x['method']} ({x['authors']})", str(x["year"]), str(x["accuracy"]), f"[{x['where']}]({x['url']})"]
        for x in sorted(records, key=lambda x: x["accuracy"])
    ]
    return markdown(["method", "year", "test, %", "source"], rows)
