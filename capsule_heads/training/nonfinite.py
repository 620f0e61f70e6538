"""What keeps numbers that are not finite out of the weights, and says where they come from."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer

logger = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # what batch normalisation has of all batches
NOTHING = "nothing of the last batch in another run, without mixup"
MOST = 4  # names, or samples, in a message


class StepCheck:
    """Checks the loss of each batch of a step, and its gradients before they reach the weights.

    All processes come to the same decision. Gradients whose norm overflows count as not finite: Trainer divides by the
    norm, and that gives NaN. Under a gradient scaler (fp16) gradients may overflow as long as its scale is above 1: it
    leaves out such steps itself. DeepSpeed makes its step before gradients can be seen: there it is the loss alone that
    is checked, after the step.

    Args:
        trainer: whose steps they are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batch: tuple[Tensor, Mapping[str, Any]] | None = None
        self._statistics: list[tuple[Tensor, Tensor]] | None = None
        self._tensors: tuple[dict[str, nn.Parameter], list[Tensor]] | None = None

    def _of_model(self) -> tuple[dict[str, nn.Parameter], list[Tensor]]:
        """The model's parameters by name, and its batch statistics: found once, as a backbone has many modules."""
        if self._tensors is None:
            model = self._trainer.model
            buffers = [x for name, x in model.named_buffers() if name.rpartition(".")[2] in STATISTICS]
            self._tensors = dict(model.named_parameters()), buffers
        return self._tensors

    def before_training(self) -> None:
        """To be called before the first step: modules may have been added or replaced since the last training."""
        self._tensors = None

    def before_batch(self) -> None:
        """To be called before the forward pass of each batch."""
        if self._statistics is None:  # the first of the step
            self._statistics = [(x, x.clone()) for x in self._of_model()[1]]

    def after_batch(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """To be called after the backward pass of each batch."""
        if self._batch is None or self._batch[0].isfinite():  # else there is one to report already
            self._batch = (loss, inputs)

    def after_last_batch(self, model: nn.Module) -> None:
        """To be called when the gradients of a step are complete.

        Args:
            model: as it was called, with its wrappers.

        Raises:
            FloatingPointError: naming what is not finite and where, if steps are not to be left out, or if weights are
                not finite, which leaving out steps does not mend.
        """
        (loss, inputs), statistics = self._batch, self._statistics
        self._batch = self._statistics = None
        parameters, _ = self._of_model()
        gradients = {f"the gradient of {name}": x.grad for name, x in parameters.items() if x.grad is not None}
        bad_losses, is_finite = self._judge(loss, gradients)
        if not bad_losses and (is_finite or self._scaler_sees_to_it()):
            return
        for x, before in statistics:
            x.copy_(before)
        # All processes go the same way: the model may be spread over them.
        broken = gather_object(_places(parameters))
        of_gradients = [] if bad_losses else _places(gradients)
        places = broken or gather_object(self._of_process(self._in_batch(model, inputs) + of_gradients))
        what = "loss" if bad_losses else "norm of the gradients"
        step = self._trainer.state.global_step + 1
        message = f"Step {step}: the {what} is not finite. Not finite: {_listed(places) or NOTHING}."
        if broken:
            raise FloatingPointError(f"{message} These weights are lost; go back to an earlier checkpoint.")
        if getattr(self._trainer.args, "on_nonfinite", "stop") == "stop":  # TrainingArguments have none
            raise FloatingPointError(
                f"{message} The weights are as before this step. Mend the data, or leave such steps out with "
                'on_nonfinite="skip".'
            )
        logger.warning("%s The step is left out.", message)
        self._drop(parameters.values())

    def _judge(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> tuple[int, bool]:
        """In how many processes a loss is not finite, and whether the norm of all gradients is."""
        norm = torch.nn.utils.get_total_norm([_local(x) for x in gradients.values()])
        found = torch.stack([(~loss.isfinite()).float(), norm.to(loss.device).float().square()])
        bad_losses, squares = self._trainer.accelerator.reduce(found).tolist()
        return int(bad_losses), squares < math.inf

    def _scaler_sees_to_it(self) -> bool:
        scaler = self._trainer.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _in_batch(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
        with self._trainer.compute_loss_context_manager():
            return find_nonfinite(model, self._trainer._prepare_inputs(inputs), self._trainer.model.config.depths)

    def _of_process(self, places: list[str]) -> list[str]:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return places
        return [f"{place} (process {accelerator.process_index})" for place in places]

    def _drop(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if self._trainer.accelerator.scaler is None:
                parameter.grad = None  # an optimizer leaves such a parameter, and what it keeps of it, as they are
            elif parameter.grad is not None:
                parameter.grad.fill_(math.nan)  # the scaler asks for gradients, and leaves the step out for these


@torch.no_grad()
def find_nonfinite(model: nn.Module, inputs: Mapping[str, Any], depths: Sequence[int]) -> list[str]:
    """Runs a capsule-head model on a batch in evaluation mode, and says what is not finite, and in which samples.

    Args:
        model: the model, perhaps wrapped. It is left in evaluation mode.
        inputs: of its forward pass.
        depths: those in use.

    Returns:
        Inputs; if those are finite, hidden states by their depth; if those are too, logits, and what they are made of.
    """
    outputs = model.eval()(**inputs, output_hidden_states=True)  # in all processes, whatever each finds
    tensors = {f"the input {name}": x for name, x in inputs.items() if isinstance(x, Tensor)}
    tensors.pop("the input hidden_states", None)
    found = _places(tensors, of_samples=True)
    if found:
        return found
    states = {f"the hidden state at depth {depth}": x for depth, x in zip(depths, outputs.hidden_states)}
    found = _places(states, of_samples=True)
    if found:
        return found
    largest = max((float(x.abs().max()) for x in outputs.hidden_states if x.numel()), default=0.0)
    return [
        f"{place} (hidden states are finite, up to {largest:.1e})"
        for place in _places({"the logits": outputs.logits}, of_samples=True)
    ]


def _places(tensors: Mapping[str, Tensor], of_samples: bool = False) -> list[str]:
    """Which of some tensors are not finite, and how many of their numbers, or in which samples."""
    places = []
    for name, tensor in tensors.items():
        bad = ~_local(tensor).isfinite()
        if not bad.any():
            continue
        rows = bad.flatten(1).any(1) if of_samples and bad.ndim > 1 else bad
        samples = [str(int(i)) for i in rows.nonzero()[:, 0]] if of_samples else []
        where = f"in samples {_listed(samples)}" if of_samples else f"in {int(bad.sum()):,} of {bad.numel():,} numbers"
        places.append(f"{name} {where}")
    return places


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over several (FSDP)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
