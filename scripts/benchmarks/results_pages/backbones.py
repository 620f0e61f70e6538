"""The table of backbones that work under a head, from the findings of `backbone_check`, as Markdown."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

INTRODUCTION = """\
# Backbones

Of the {all} types in transformers' mapping of models, {built} were built under a capsule head, and **{works} work**. To
work means that a tiny model of that type, with random weights, runs under the head and takes a training step. The step
moves every parameter of the head and none of the backbone. After saving and loading, the logits are equal to 1e-6.
{of_modality}. The others are listed below with the reason.

Measured on {date} with transformers {transformers} and torch {torch}, from a checkout of the source:

<!-- not run: it trains a model of each type, and the script is in the source -->
```bash
python scripts/benchmarks/check_backbones.py                    # all types, each in its own process
python scripts/benchmarks/check_backbones.py --types bert,t5    # some; their rows are renewed
```

- **States**: hidden states of one sample, tokens x hidden size at each layer. "3 of 4 x 64" are three layers of one
  shape. Sizes are those of the tiny model.
- **Padding**: whether a short sample has the same logits in a batch with a longer one. "neutral" means equal to 1e-4.
  "mixes" means that the backbone itself mixes padding into its tokens. The column is empty if samples do not differ in
  length.
- **Several towers**: a type with several towers is listed for text if its text tower works. Its image and audio towers
  work under the other heads if they are types of their own.
"""


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown.

    Args:
        report: `date`, `transformers`, `torch`, and `types`: the findings of `check` for each.
    """
    types = report["types"]
    works = {name: found for name, found in types.items() if found["works"]}
    modalities = Counter(found["modality"] for found in works.values())
    head = INTRODUCTION.format(
        date=report["date"],
        transformers=report["transformers"],
        torch=report["torch"],
        all=len(types),
        built=sum("modality" in found for found in types.values()),
        works=len(works),
        of_modality="; ".join(f"{count} take {modality}" for modality, count in modalities.most_common()),
    )
    lines = [
        head,
        f"## The {len(works)} that work",
        "",
        "| type | takes | states | padding |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in sorted(works.items()):
        padding = found.get("padding") or ""
        lines.append(f"| {name} | {found['modality']} | {describe(found['states'])} | {padding} |")
    failed = {name: found for name, found in types.items() if not found["works"]}
    lines += ["", f"## The {len(failed)} that do not", "", "| type | reason |", "| --- | --- |"]
    for name, found in sorted(failed.items()):
        lines.append(f"| {name} | {found['reason'].replace('|', '/').replace('<', '&lt;')} |")
    return "\n".join(lines) + "\n"


def describe(states: list[list[int]]) -> str:
    """Return shapes `[1, tokens, hidden_size]` in few words: "3 of 4 x 64, 1 of 2 x 64"."""
    return ", ".join(f"{len(list(same))} of {shape[1]} x {shape[2]}" for shape, same in groupby(states))
