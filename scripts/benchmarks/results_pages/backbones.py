"""The table of backbones that work under a head, from the findings of `backbone_check`, as Markdown."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

INTRODUCTION = """\
# Backbones

A backbone is a model of transformers whose hidden states a head reads. {works} of the {all} types in transformers \
{transformers}'s mapping of models work under a head. `from_backbone` says in one sentence what it found if a model \
does not fit.

| class of the model | backbones |
| --- | --- |
| `CapsuleHeadForSequenceClassification` | encoders, decoders, state-space models and hybrids, for texts |
| `CapsuleHeadForImageClassification` | image models, flat (ViT) or hierarchical (Swin, ConvNeXt, ResNet), and \
towers that pack the patches of all images |
| `CapsuleHeadForAudioClassification` | speech models; the mask of the samples is mapped to frames |

A backbone is given by its name on the Hub, a folder, `package:NAME/FOLDER` inside an installed Python package, a \
configuration (with random weights) or a loaded model.

## Which part of a model is used

- **Encoder-decoders.** The encoder's hidden states are used, and the decoder is left out. `stack="decoder"` takes the \
decoder's hidden states.
- **Models of several towers.** The tower for the input is taken: CLIP's text tower under the text head, and its image \
tower under the image head. A language model with an image tower runs on text alone. `tower="text"`, `"vision"` or \
`"audio"` names another tower.
- **Hierarchical image models.** Hidden states differ in size and resolution from stage to stage. There is a part \
detector for each size.
- **Layers.** All hidden states are used, the embedding output included. `layers=[...]` takes some of them.

`stack` and `tower` are arguments of `from_backbone`. Here with a tiny encoder-decoder of random weights:

```python
from transformers import BartConfig

from capsule_heads import CapsuleHeadForSequenceClassification

sizes = dict(d_model=64, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2)
for stack in ("encoder", "decoder"):
    model = CapsuleHeadForSequenceClassification.from_backbone(BartConfig(**sizes), num_labels=2, stack=stack)
    print(stack, len(model.config.layers), "hidden states")
```

```text
encoder 3 hidden states
decoder 4 hidden states
```

## Padding

A masked token changes nothing in the head. The backbone is called so that padding on either side shifts no position. \
Some backbones mix padding into their tokens by themselves: FNet, ConvBERT and others without a full mask, and RWKV or \
RecurrentGemma with padding on the left. With these, the scores of a short text depend a little on its batch.

Many decoders come with a tokenizer that has no padding token. Set `tokenizer.pad_token = tokenizer.eos_token`, or \
`pad_token` in a YAML file. Padding is masked, so any token will do.

## How the types were checked

{date}, transformers {transformers}, torch {torch}. Of the {all} types in transformers' mapping of models, {built} \
were built under a capsule head, and **{works} work**: a tiny model of that type, with random weights, runs under it, \
takes a training step that moves every parameter of the head and none of the backbone, and gives equal logits (to \
1e-6) after saving and loading. {of_modality}. The others are listed below with what stopped them.

<!-- not run: all types take hours -->
```bash
python scripts/benchmarks/check_backbones.py                    # all types, each in its own process
python scripts/benchmarks/check_backbones.py --types bert,t5    # some; their rows are renewed
```

- **States**: hidden states of one sample, tokens x hidden size at each layer; "3 of 4 x 64" are three layers of one \
shape. Sizes are those of the tiny model.
- **Padding**: whether a short sample has the same logits in a batch with a longer one. "neutral": to 1e-4. "mixes": \
the backbone itself mixes padding into its tokens. Empty where samples do not differ in length.
- A type with several towers is listed for text if its text tower works; its image and audio towers work under the \
other heads where they are types of their own.
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
