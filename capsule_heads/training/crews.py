"""Training the members of a sweep, in this process or in several.

A head's step is many small operations, in which Python's threads wait for each other. Processes share the cores better.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import skip_first_batches

from ..data.hidden_states import HiddenStateCache
from .graphs import CudaGraphs, GraphedSteps
from .members import Member
from .trainer import CapsuleTrainer, set_epoch


@dataclass
class Batches:
    """The data that the crews of a sweep read.

    Attributes:
        lead: a trainer on the sweep's data, which makes the batches.
        loader: data loader of the training data.
        steps_in_epoch: number of batches in the training data.
        caches: hidden states of the splits that members are evaluated on.
    """

    lead: CapsuleTrainer
    loader: Any
    steps_in_epoch: int
    caches: Mapping[str, HiddenStateCache]

    def of_training(self, step: int) -> Iterator[tuple[bool, dict[str, Any]]]:
        """Yield whether a training batch begins an epoch, and the batch, from a step on and without end."""
        while True:
            epoch, done = divmod(step, self.steps_in_epoch)
            self.loader.set_epoch(epoch)
            set_epoch(self.loader, epoch)
            loader = skip_first_batches(self.loader, done) if done else self.loader
            for batch in loader:
                yield step % self.steps_in_epoch == 0, self._prepare(batch)
                step += 1

    def of_split(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the batches of a split that members are evaluated on."""
        for batch in self.lead.get_eval_dataloader(self.caches[name]):
            yield self._prepare(batch)

    def _prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch on the device, with hidden states in float32, so that no head has to convert them."""
        prepared = self.lead._prepare_inputs(dict(batch))
        return {**prepared, "hidden_states": prepared["hidden_states"].float()}


class Crew:
    """Members of a sweep that take their steps in one process.

    Args:
        members: the members, by their place in the sweep.
        batches: the data that they read.
        step: the last step that they have taken.
    """

    def __init__(self, members: Mapping[int, Member], batches: Batches, step: int) -> None:
        self.members, self.batches, self.step = members, batches, step
        self._training = batches.of_training(step)
        args: Any = batches.lead.args
        # A step that is skipped for its numbers has to be known before the next one begins.
        has_graphs = args.device.type == "cuda" and args.on_nonfinite == "stop"
        self._graphs = GraphedSteps(CudaGraphs()) if has_graphs else None

    def living(self) -> list[Member]:
        """Return the members that still train."""
        return [member for member in self.members.values() if member.fault is None]

    def advance(self, until: int) -> None:
        """Train all members until a step.

        Args:
            until: the last step that is taken.
        """
        while self.step < until and self.living():
            begins_epoch, batch = next(self._training)
            for member in self.living():
                if begins_epoch:
                    member.start_epoch()
            if self._graphs is not None:
                self._graphs.step(self.living(), batch)
            else:
                for member in self.living():
                    member.step(batch)
            self.step += 1
        if self._graphs is not None:
            self._graphs.check()

    def evaluate(self) -> None:
        """Evaluate all members on the splits whose hidden states are cached; see `Member.found`."""
        members = self.living()
        for name in self.batches.caches:
            for member in members:
                member.outputs.clear()
            labels = []
            for batch in self.batches.of_split(name):
                labels.append(batch["labels"].cpu().numpy())
                for member in members:
                    member.predict(batch)
            for member in members:
                member.found[name] = member.measure(np.concatenate(labels))

    def stop(self, why: Mapping[int, str]) -> None:
        """Stop the training of some members.

        Args:
            why: the reason in words, by each member's place.
        """
        for place in self.members.keys() & why.keys():
            self.members[place].fault = why[place]

    def save(self, folder: Path) -> None:
        """Write the state of each member to a file of its own; see `file_of`."""
        for place, member in self.members.items():
            torch.save(member.state_dict(), file_of(folder, place))

    def report(self) -> dict[int, dict[str, Any]]:
        """Return the progress and results of each member, by place."""
        names = ("steps", "seconds", "fault", "found")
        return {place: {name: getattr(member, name) for name in names} for place, member in self.members.items()}


def file_of(folder: Path, place: int) -> Path:
    """Return the file of a member's state in a checkpoint."""
    return folder / f"{place}.pt"


class Tell(Protocol):
    """Calls a method of all crews at once."""

    def __call__(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method of each crew, and return when all calls are done and the members here are up to date."""


def number_of_processes(n_members: int, device: torch.device) -> int:
    """Return the number of processes that share the members of a sweep: one for each thread that torch uses.

    Each process is forked from this one. Only Linux forks safely, and CUDA does not work in a forked process.
    """
    if device.type != "cpu" or sys.platform != "linux" or torch.cuda.is_initialized():
        return 1
    return max(1, min(torch.get_num_threads(), n_members))


@contextmanager
def crews(members: Sequence[Member], n_processes: int, batches: Batches, step: int) -> Iterator[Tell]:
    """Share the members of a sweep among processes, and yield a function that calls all crews.

    With several processes, the members here only get what `Crew.report` returns. Their weights are in the files of
    `Crew.save`.

    Args:
        members: members of the sweep.
        n_processes: number of processes; 1 for this process alone.
        batches: the data that they read.
        step: the last step that was taken.
    """
    placed = list(enumerate(members))
    of_processes = [Crew(dict(placed[first::n_processes]), batches, step) for first in range(n_processes)]
    if n_processes == 1:
        yield lambda method, *args: method(of_processes[0], *args)
        return
    workers: list[_Worker] = []
    try:
        for crew in of_processes:
            workers.append(_Worker(crew, [worker.connection for worker in workers]))

        def tell(method: Callable[..., None], *args: Any) -> None:
            for worker in workers:
                worker.send(method.__name__, args)
            for place, values in itertools.chain.from_iterable(worker.receive().items() for worker in workers):
                for name, value in values.items():
                    setattr(members[place], name, value)

        yield tell
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that runs a crew, as seen from this process.

    Args:
        crew: the crew that it runs.
        others: connections to other workers. The process closes its copies, which would outlive this process.
    """

    def __init__(self, crew: Crew, others: Sequence[Connection]) -> None:
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(crew, theirs, [self.connection, *others]))
        with warnings.catch_warnings():  # it has one thread, and needs no lock that another thread here may hold
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self._process.start()
        theirs.close()

    def send(self, method: str, args: Sequence[Any]) -> None:
        with suppress(BrokenPipeError):  # `receive` finds out why
            self.connection.send((method, args))

    def receive(self) -> dict[int, dict[str, Any]]:
        """Return a crew's report, or raise the error that was raised in its process.

        Raises:
            ChildProcessError: If the process has ended.
        """
        try:
            reply = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ChildProcessError(
                f"A process of the sweep ended with exit code {self._process.exitcode} (-9: killed, or out of memory); "
                "expected it to run to the end: resume from the last checkpoint with --resume."
            ) from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def end(self) -> None:
        self._process.terminate()  # everything that has to be kept is in files
        self._process.join()
        self.connection.close()


def _serve(crew: Crew, connection: Connection, others: Sequence[Connection]) -> None:
    """Run the calls that arrive for a crew, until the connection is closed."""
    for other in others:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that sends the calls ends this one
    torch.set_num_threads(1)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            getattr(crew, method)(*args)
            reply: Any = crew.report()
        except Exception as error:
            error.add_note(traceback.format_exc())  # pickle would drop the traceback
            reply = error
        connection.send_bytes(pickle.dumps(reply))
