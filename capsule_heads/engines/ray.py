"""Work by the actors of a Ray cluster. Ray Data hands pieces of work to them, and restarts actors that die."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

SECONDS_TO_ANSWER = 20.0  # for the address of a cluster
NUMBER, CONTENT = "number", "content"  # columns of the tables that go to actors and come back


@dataclass(frozen=True)
class Actors:
    """The number of actors, and the GPUs of each.

    Attributes:
        least: number of actors to begin with.
        most: largest number of actors, if there is work for them; None for the number that the cluster has room for.
        gpus: GPUs of each actor, which may be a fraction; None for 1 if the cluster has any GPUs, and 0 otherwise.
    """

    least: int = 1
    most: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"There are {self.least} to {self.most} actors; expected the larger number last.")


def run_on_ray(
    make_worker: Callable[[], Callable[[Any], Any]], pieces: Iterable[Any], actors: Actors | None = None
) -> Iterator[Any]:
    """Yield the results of workers on pieces, in the order of the pieces.

    The cluster is the one at RAY_ADDRESS, or one on this machine alone, which ends with the process. An actor makes a
    worker when it starts, and takes one piece after another. If an actor dies, its piece is done again.

    Args:
        make_worker: makes a worker, in an actor. It is pickled once, with all that it holds, such as a model.
        pieces: the pieces of work. All are pickled into Ray's object store, which writes to disk when memory is full.
        actors: the number of actors, and their GPUs.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If no cluster answers at the address.
        ValueError: If an actor needs more GPUs than the cluster has.
        Exception: Any error that a worker raised.
    """
    ray = _import_ray()
    _connect(ray)
    import pyarrow as pa

    actors = actors or Actors()
    resources = ray.cluster_resources()
    gpus = actors.gpus if actors.gpus is not None else float(resources.get("GPU", 0) > 0)
    if gpus > resources.get("GPU", 0):
        raise ValueError(
            f"An actor takes {gpus:g} GPUs, and the cluster has {resources.get('GPU', 0):g}; expected as many or fewer."
        )
    room = int(resources.get("GPU", 0) / gpus) if gpus else int(resources.get("CPU", 1))
    most = max(actors.least, actors.most or room)
    tables = [
        ray.put(pa.table({NUMBER: [number], CONTENT: pa.array([pickle.dumps(piece)], pa.large_binary())}))
        for number, piece in enumerate(pieces)
    ]
    if not tables:
        return
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        results = ray.data.from_arrow_refs(tables).map_batches(
            _Actor,
            fn_constructor_args=(ray.put(make_worker),),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=actors.least, max_size=most),
            num_cpus=0 if gpus else 1,
            num_gpus=gpus or None,
        )
        for row in results.iter_rows():
            found = pickle.loads(row[CONTENT])
            if isinstance(found, _Fault):
                raise found.error
            yield found


@dataclass(frozen=True)
class _Fault:
    """An error that a worker raised. It is raised again in the calling process, and the piece is not tried again."""

    error: Exception


class _Actor:
    """Holds a worker in a process of the cluster."""

    def __init__(self, make_worker: Any) -> None:
        import ray

        self.fault: _Fault | None = None
        try:
            self.worker = ray.get(make_worker)()
        except Exception as error:
            self.fault = _Fault(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        found: Any = self.fault
        if found is None:
            try:
                found = self.worker(pickle.loads(batch[CONTENT][0]))
            except Exception as error:
                found = _Fault(error)
        return {NUMBER: [int(batch[NUMBER][0])], CONTENT: [pickle.dumps(found)]}


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send usage statistics
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray would warn of each actor that holds a model
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError('The engine ray needs Ray: pip install "capsule-heads[ray]".') from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else it prints lines about each run
    return ray


def _connect(ray: Any) -> None:
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        _check_reachable(address or "")
        ray.init(
            address=address, include_dashboard=None if address else False, logging_level="error", log_to_driver=False
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"There is no Ray cluster at {address} (RAY_ADDRESS): {error}") from None


def _check_reachable(address: str) -> None:
    """Check that something answers at HOST:PORT, because Ray would wait many minutes for an answer.

    Raises:
        OSError: If nothing answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
