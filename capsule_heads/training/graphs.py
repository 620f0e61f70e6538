"""The forward and backward passes of all members of a sweep as one CUDA graph for each shape of batches.

A member's passes are hundreds of small launches, which cost more than their arithmetic. A graph is one launch, and runs
members in parallel. Optimizers stay outside, as their settings change from step to step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .members import Gradients, Member

logger = logging.getLogger(__name__)

MULTIPLE = 8  # batches are padded to a multiple of it in tokens: each length would need its own graph
BRANCHES = 8  # parallel branches of a graph; each keeps the memory of one member's passes
OF_TOKENS = ("hidden_states", "attention_mask")

Record = Callable[[Sequence[Callable[[], None]]], Callable[[], None]]


class CudaGraphs:
    """Records calls as the branches of a CUDA graph, and returns a function that runs them all again.

    All graphs share memory, as one is replayed at a time, and its results are read before the next.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._streams = [torch.cuda.Stream() for _ in range(BRANCHES)]

    def __call__(self, calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """Record a graph.

        Raises:
            RuntimeError: If a call does something that a graph cannot do, such as read a number from the device.
        """
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # first compile kernels, and let libraries make workspaces
            self._run(calls)
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(calls)
        return graph.replay

    def _run(self, calls: Sequence[Callable[[], None]]) -> None:
        before = torch.cuda.current_stream()
        streams = self._streams[: len(calls)]
        for stream in streams:
            stream.wait_stream(before)
        for place, call in enumerate(calls):
            with torch.cuda.stream(streams[place % len(streams)]):
                call()
        for stream in streams:
            before.wait_stream(stream)


@dataclass
class _Graph:
    """The passes of all members on batches of one shape.

    Attributes:
        batch: the batch that the passes read.
        draws: random numbers of mixup that they read, by member.
        found: gradients that they wrote, by member.
        replay: function that runs them.
    """

    batch: dict[str, Any]
    draws: list[tuple[Tensor, Tensor] | None]
    found: list[Gradients]
    replay: Callable[[], None]


class GraphedSteps:
    """Takes the steps of a sweep's members by CUDA graphs; see the module.

    A graph is recorded when a shape occurs for the second time. If a step cannot be recorded, all members take their
    steps one by one, and the log says so. `check` finds numbers that are not finite some steps late. The member's
    weights are lost by then, but its training ends anyway.

    Args:
        record: records a graph, as `CudaGraphs` does.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._members: list[Member] = []
        self._seen: set[tuple] = set()
        self._graphs: dict[tuple, _Graph] = {}
        self._first_bad = torch.zeros(0)  # first step at which each member's numbers were not finite; 0 if finite
        self._works = True

    def step(self, members: Sequence[Member], batch: Mapping[str, Any]) -> None:
        """Take a step of training with all members.

        Args:
            members: the members that still train.
            batch: as `Member.step` takes it.
        """
        if list(members) != self._members:  # some have stopped
            self.check()
            self._members = list(members)
            self._seen, self._graphs = set(), {}
            self._first_bad = torch.zeros(len(members), device=batch["hidden_states"].device)
        padded = _pad(batch)
        shape = tuple((name, x.shape, x.dtype) for name, x in padded.items())
        if not self._works or shape not in self._seen:
            self._seen.add(shape)
            for member in self._members:
                member.step(padded)
            return
        if shape not in self._graphs:
            try:
                self._graphs[shape] = self._make(padded)
            except RuntimeError as error:
                self._works = False
                reason = str(error).splitlines()[0]
                logger.warning(f"Heads take their steps one by one, as a CUDA graph cannot record them: {reason}")
                self.step(members, batch)
                return
        graph = self._graphs[shape]
        for name, x in padded.items():
            graph.batch[name].copy_(x, non_blocking=True)
        for member, draws in zip(self._members, graph.draws):
            if draws is not None:
                for into, drawn in zip(draws, member.draw_mixup(len(padded["labels"])), strict=True):
                    into.copy_(drawn, non_blocking=True)
        graph.replay()
        is_fine = torch.stack([found.check for found in graph.found]).isfinite() | (self._first_bad > 0)
        self._first_bad.masked_fill_(~is_fine, self._members[0].steps + 1)  # the same for all members
        for member, found in zip(self._members, graph.found):
            member.update(found.gradients)

    def check(self) -> None:
        """Stop the members whose numbers were not finite since the last call. This waits for the device."""
        for member, step in zip(self._members, self._first_bad.tolist()):
            if step and member.fault is None:
                member.fault = f"step {step:.0f}: not finite"

    def _make(self, batch: Mapping[str, Any]) -> _Graph:
        """Record the passes of all members on a batch.

        Raises:
            RuntimeError: If a member's passes cannot be recorded.
        """
        fixed = {name: x.clone() for name, x in batch.items()}
        n, device = len(batch["labels"]), batch["labels"].device
        draws = [  # these mix nothing; each step writes its own draws into them
            (torch.ones(n, device=device), torch.arange(n, device=device)) if x.model.config.mixup_alpha else None
            for x in self._members
        ]
        found: list[Any] = [None] * len(self._members)

        def call(place: int) -> None:
            found[place] = self._members[place].differentiate(fixed, draws[place])

        before = torch.get_rng_state()
        replay = self._record([functools.partial(call, place) for place in range(len(found))])
        if not torch.equal(before, torch.get_rng_state()):
            raise RuntimeError("a head draws random numbers on the CPU, which a graph would draw once.")
        return _Graph(fixed, draws, found, replay)


def _pad(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with padding, so that its number of tokens is a multiple of `MULTIPLE`."""
    missing = -batch["hidden_states"].shape[1] % MULTIPLE
    padded = dict(batch)
    for name in OF_TOKENS:
        x = padded[name]
        padded[name] = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return padded
