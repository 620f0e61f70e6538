"""The results page: what compare_heads.py has measured, as Markdown; nothing on it is typed by hand."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import ttest_rel

CAPSULES = "capsules"
TITLES = {
    "sst5": "SST-5, complete sentences (five classes)",
    "sst2_root": "SST-2, complete sentences of SST (two classes)",
    "sst2": "SST-2 as in GLUE (validation: its dev split; test: complete sentences of SST)",
}
REMARK = """`scripts/benchmarks/write_results.py` writes this page from [results/heads.json](results/heads.json).

All heads take the same hidden states of the same frozen backbone, in half precision from one cache. All are trained by
the same trainer in the paper's regime: batches of 20 texts of similar length, RAdam, one cycle, and mixup, unless the
row says "no mixup", which is this package's default. The learning rate of a head is the best of those tried, on the
validation split, with one seed. The test split chose nothing. Accuracies are in percent, mean ± standard deviation over
seeds. Training time is for one thread, on a machine with other work: compare it roughly."""
VARIANTS = """Variants of the capsule head, with its learning rate. The last ones are changes that only
`scripts/benchmarks/compare_heads.py` has. They test what might have held the head back: initial betas drawn from a
normal distribution instead of zeros; hidden states normalised at each layer; scores of parts that are means over inputs
instead of sums, so that they do not grow with a text; and such means weighted by a learned query, as in attentive
pooling."""
PAPER = """## The paper's numbers

This project has not run these: they need a GPU. The paper's settings, for 58.5 on SST-5, 95.6 on SST-2 and 99.1 on
smallNORB (Heinsen, 2019), are

```bash
capsule-heads train --config sst5
capsule-heads train --config sst2
capsule-heads train --config smallnorb --source DIRECTORY
```"""


def render_results(records: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        records: one record for each task, as compare_heads.py writes them.
        published: published results, as `read_published` returns them.

    Raises:
        ValueError: If there are no records.
    """
    if not records:
        raise ValueError("There are no results to write; run scripts/benchmarks/compare_heads.py first.")
    sections = ["# Results", REMARK]
    for record in records:
        sections += _section(record, [x for x in published if x["task"] == record["task"]])
    return "\n\n".join(section.rstrip() for section in [*sections, PAPER]) + "\n"


def _section(record: Mapping[str, Any], published: Sequence[Mapping[str, Any]]) -> list[str]:
    groups = _grouped(record["runs"])
    rates = ", ".join(f"{rate:g}" for rate in sorted({x["rate"] for x in record["tried"]}))
    size = f"{record['phrases']:,} phrases, drawn once" if record["phrases"] else "all phrases"
    parts = [
        f"## {TITLES[record['task']]}",
        f"{size}, {record['epochs']:g} epochs; backbone `{record['backbone']}`; learning rates tried: {rates}; commit "
        f"{record['commit'] or 'unknown'}, {record['date']}.",
        _table("head", groups),
        _verdict(groups),
        "The learning rates that were tried, validation accuracy with one seed:",
        _rates(record["tried"]),
    ]
    if record["ablations"]:
        ours = groups[CAPSULES]
        seeds = {x["seed"] for x in record["ablations"]}
        same_seeds = {"as it is": [x for x in ours if x["seed"] in seeds]}
        variants = _grouped(record["ablations"])
        parts += [VARIANTS, _table("variant", {**same_seeds, **variants}), _better(same_seeds["as it is"], variants)]
    if published:
        rows = [
            [f"{x['method']} ({x['authors']})", str(x["year"]), str(x["accuracy"]), f"[{x['where']}]({x['url']})"]
            for x in sorted(published, key=lambda x: x["accuracy"])
        ]
        parts += ["Published, on the same test set:", _markdown(["method", "year", "test", "source"], rows)]
    return parts


def _grouped(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["head"], []).append(run)
    return {name: sorted(group, key=lambda x: x["seed"]) for name, group in groups.items()}


def _table(what: str, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    header = [what, "validation", "test", "trained parameters", "learning rate", "seeds", "training, s"]
    rows = []
    for name, runs in groups.items():
        scores = [_percent([x[split] for x in runs]) for split in ("validation", "test")]
        seconds = sum(x["seconds"] for x in runs) / len(runs)
        sizes = [f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g}", str(len(runs)), f"{seconds:.0f}"]
        rows.append([name, *scores, *sizes])
    return _markdown(header, rows)


def _rates(tried: Sequence[Mapping[str, Any]]) -> str:
    rates = sorted({x["rate"] for x in tried})
    rows = []
    for name, runs in _grouped(tried).items():
        scores = {x["rate"]: _percent([x["validation"]]) for x in runs}
        rows.append([name, *(scores.get(rate, "") for rate in rates)])
    return _markdown(["head", *(f"{rate:g}" for rate in rates)], rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], f"|{' --- |' * len(header)}", *lines[1:]])


def _better(ours: Sequence[Mapping[str, Any]], variants: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a sentence on which variants are better than the head as it is, on validation."""
    better = []
    for name, runs in variants.items():
        pairs = [[x["validation"] for x in of] for of in (runs, ours)]
        if len(runs) == len(ours) > 1 and ttest_rel(*pairs, alternative="greater").pvalue < 0.05:
            better.append(name)
    found = f"these are better than it: {', '.join(better)}" if better else "none is better than it"
    return f"On validation, by paired one-sided t-tests over seeds with p < 0.05 for each, {found}."


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _verdict(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Compare the best capsule head with the best control, chosen on validation, by a paired test over the seeds."""
    ranked = sorted(groups, key=lambda name: -statistics.mean(x["validation"] for x in groups[name]))
    capsules = [name for name in ranked if name.startswith(CAPSULES)]
    controls = [name for name in ranked if not name.startswith(CAPSULES)]
    if not capsules or not controls:
        return "There is nothing to compare."
    ours, theirs = ([x["test"] for x in groups[names[0]]] for names in (capsules, controls))
    difference = 100 * (statistics.mean(ours) - statistics.mean(theirs))
    text = (
        f"Best on validation are {capsules[0]!r} and, of the controls, {controls[0]!r}: on the test split the former "
        f"is {difference:+.1f} points from the latter"
    )
    if len(ours) != len(theirs) or len(ours) < 2:
        return f"{text}."
    p = float(ttest_rel(ours, theirs).pvalue)
    found = "no difference beyond the seeds" if not p < 0.05 else "it wins" if difference > 0 else "it loses"
    return f"{text} (paired t-test over {len(ours)} seeds: p = {p:.2g}; {found})."
