"""Running on torch's threads, and on others where torch's cannot be had."""

import threading

import pytest

from capsule_heads.ops import threads


@pytest.fixture(params=["torch's", "others"])
def run_on_threads(request, monkeypatch):
    if request.param == "others":
        monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    elif threads._openmp_parallel() is None:
        pytest.skip("this build of torch has no OpenMP that offers GOMP_parallel")
    return threads.run_on_threads


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_calls_each_once(run_on_threads, n_threads):
    called = []
    run_on_threads(called.append, n_threads)
    assert sorted(called) == list(range(n_threads))


def test_calls_at_the_same_time(run_on_threads):
    barrier = threading.Barrier(2, timeout=30)  # passed only by two at once
    run_on_threads(lambda _: barrier.wait(), 2)


def test_raises_what_a_call_raised(run_on_threads):
    def fail(thread):
        if thread == 1:
            raise ValueError("of thread 1")

    with pytest.raises(ValueError, match="of thread 1"):
        run_on_threads(fail, 2)


def test_fewer_threads_than_asked_for(monkeypatch):
    def parallel(body, data, n_threads, flags):
        body(data)

    monkeypatch.setattr(threads, "_openmp_parallel", lambda: parallel)
    called = []
    threads.run_on_threads(called.append, 3)
    assert sorted(called) == [0, 1, 2]
