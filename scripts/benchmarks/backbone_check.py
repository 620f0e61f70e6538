"""Check whether a type of backbone works under a head: build it small, train the head for a step, save and load it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tiny_backbones import tiny_config
from torch import Tensor

from capsule_heads import (
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
)
from capsule_heads.backbones.probe import example_inputs, probe
from capsule_heads.models.base import CapsuleHeadPreTrainedModel

CLASSES = {
    "text": CapsuleHeadForSequenceClassification,
    "image": CapsuleHeadForImageClassification,
    "audio": CapsuleHeadForAudioClassification,
}
HEAD = {"num_labels": 3, "d_inp": 8, "n_parts": 4, "mixup_alpha": 0.0}
MEMORY = 12 << 30  # of address space
LONGEST_REASON = 200


def check(model_type: str) -> dict[str, Any]:
    """Build a tiny random backbone of that type with a head, train it for a step, save it and load it.

    Returns:
        The findings: `works`, `modality`, `states` (shapes for one sample), `padding` ("neutral", "mixes", or None
        where samples do not differ in length); or `works: False` and the `reason`.
    """
    found = _check(model_type)
    if found["works"] or "requires the" in found["reason"]:
        return found
    # The rules for sizes may be at fault.
    again = _check(model_type, keep_sizes=True)
    return found if "Cannot allocate memory" in again.get("reason", "") else again


def _check(model_type: str, **sizes: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    found = {"works": False}
    try:
        model, found["modality"] = _build(tiny_config(model_type, **sizes))
        inputs, states = probe(model.backbone, model.config.stack, (1.0, 1.0))
        found["states"] = [[1, *x.shape[1:]] for x in states]
        _train_step(model, inputs)
        _round_trip(model, inputs)
        found["padding"] = _padding(model)
        found["works"] = True
    except Exception as error:
        found["reason"] = _reason(error)
    return found


def _build(config) -> tuple[CapsuleHeadPreTrainedModel, str]:
    """Return the model of the first modality whose head takes that backbone."""
    errors = {}
    for modality, cls in CLASSES.items():
        try:
            return cls.from_backbone(config, **HEAD), modality
        except ValueError as error:
            errors[modality] = error
    # Of the modality that it is of, or of any: none takes its inputs.
    of_its_modality = [error for error in errors.values() if " expects a backbone that takes " not in str(error)]
    if of_its_modality:
        raise of_its_modality[0]
    raise ValueError(str(errors["text"]).partition(";")[0] + ", which is none of text, images and audio")


def _train_step(model: CapsuleHeadPreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():  # zeros would hide which parameters are not reached
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.train()
    before = [parameter.clone() for parameter in model.head.parameters()]
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    loss = model(**inputs, labels=torch.tensor([0, 2])).loss
    assert loss.isfinite(), f"the loss is {loss.item()}"
    loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters()), "the frozen backbone has gradients"
    optimizer.step()
    after = model.head.named_parameters()
    same = [name for old, (name, new) in zip(before, after) if torch.equal(old, new)]
    assert not same, f"parameters of the head were not trained: {', '.join(same)}"
    model.eval()


@torch.no_grad()
def _round_trip(model: CapsuleHeadPreTrainedModel, inputs: dict[str, Tensor]) -> None:
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected), "two runs of the model on the same inputs differ"
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, head_only=False)
        loaded = type(model).from_pretrained(directory)
    difference = (loaded(**inputs).logits - expected).abs().max().item()
    # Weights that are read from a file may lie in memory so that another kernel, with other rounding, takes them.
    assert difference < 1e-6, f"after saving and loading logits differ by {difference:.1e}"


@torch.no_grad()
def _padding(model: CapsuleHeadPreTrainedModel) -> str | None:
    """Return whether a shorter sample's logits are the same in a batch with a longer one."""
    for inputs in example_inputs(model.backbone, (1.0, 0.5)):
        masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
        if "image_grid_thw" not in inputs and (not masks or masks[0].all()):
            continue
        try:
            together = model(**inputs).logits[1:]
            alone = model(**_second_alone(inputs)).logits
        except Exception:
            continue
        return "neutral" if torch.allclose(together, alone, rtol=0, atol=1e-4) else "mixes"
    return None


def _second_alone(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the second sample without its padding."""
    if "image_grid_thw" in inputs:
        n_first = int(inputs["image_grid_thw"][0].prod())
        return {"pixel_values": inputs["pixel_values"][n_first:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    alone = {name: value[1:] for name, value in inputs.items()}
    mask = next(value for name, value in alone.items() if name.endswith("attention_mask"))
    length, full = int(mask.sum()), mask.shape[1]
    for name, value in alone.items():
        axis = next((axis for axis in range(1, value.ndim) if value.shape[axis] == full), None)
        alone[name] = value if axis is None else value.narrow(axis, 0, length)
    return alone


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".replace("; expected a backbone for text, images or audio.", ":")
    text = re.sub(r"/\S*/", "", text)  # where things are on this machine is nobody's business
    return " ".join(text.removeprefix("ValueError: ").split())[:LONGEST_REASON]


def check_apart(
    model_types: list[str], seconds: int = 60, job: Callable[[str], dict[str, Any]] = check
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check types one after another, each in a process of its own, forked from this one, and yield the findings.

    Args:
        model_types: the types.
        seconds: time limit for each.
        job: what to do in each process.
    """
    for model_type in model_types:
        start, (reading, writing) = time.perf_counter(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(job, model_type, writing, seconds)
        os.close(writing)
        with os.fdopen(reading) as stream:
            text = stream.read()
        _, status = os.waitpid(child, 0)
        found = json.loads(text) if text else {"works": False, "reason": _death(status, seconds)}
        yield model_type, {**found, "seconds": round(time.perf_counter() - start, 1)}


def _run(job: Callable[[str], dict[str, Any]], model_type: str, writing: int, seconds: int) -> None:
    """Run a job in a forked process; it does not return."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(5 * seconds)  # other work on the machine shall not fail it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        text = json.dumps(job(model_type))
        with os.fdopen(writing, "w") as stream:
            stream.write(text)
        code = 0
    finally:
        os._exit(code)


def _death(status: int, seconds: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            f"took more than {seconds} s"
            if number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
            else f"died of {signal.Signals(number).name}"
        )
    return "died without a message, probably out of memory"
