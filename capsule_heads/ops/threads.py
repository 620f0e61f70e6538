"""Run a function on several threads at once, on torch's own threads where possible.

After an operation of torch, OpenMP's threads look for work for milliseconds, each on a core of its own. Other threads
would share the cores with them. docs/benchmarks/speed.md says what that costs, and why numba's threads are not
suitable.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_on_threads(function: Callable[[int], None], n_threads: int) -> None:
    """Call `function(0)` to `function(n_threads - 1)`, at the same time if there are enough threads.

    The function should release the GIL. An error in one of the calls is raised here.
    """
    if n_threads == 1:
        function(0)
        return
    parallel = _openmp_parallel()
    if parallel is None:
        others = [_pool().submit(function, thread) for thread in range(1, n_threads)]
        function(0)
        for other in others:
            other.result()
        return
    waiting, errors = list(range(n_threads)), []

    def body(_: int | None) -> None:
        while waiting:  # OpenMP may give fewer threads than requested
            try:
                function(waiting.pop())
            except BaseException as error:  # ctypes would print it and go on
                errors.append(error)

    parallel(_BODY(body), None, n_threads, 0)
    if errors:
        raise errors[0]


@functools.cache
def _openmp_parallel() -> Callable[..., None] | None:
    """Return `GOMP_parallel` of the OpenMP that torch uses, GNU's or LLVM's; None if torch uses no OpenMP."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # also searches the libraries that this one links to
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Return the threads for all calls. No thread waits for another, so concurrent calls can share them."""
    return ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1), thread_name_prefix="capsule_heads")


if hasattr(os, "register_at_fork"):  # a forked process inherits the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
