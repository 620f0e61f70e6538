"""Folders on a disk and in an object store: the same files, and one sentence when a store is lost."""

import os
import pickle
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny_texts import assert_same_states, make_tokenizer, texts

from capsule_heads.data import computing_states, state_keys, stores
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache


@pytest.fixture
def bucket():
    """URL of an object store in memory, empty."""
    yield "memory://bucket/states"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Stores(MemoryFileSystem):
    """An object store in memory that stops answering after a number of calls."""

    protocol = "lost"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    calls: ClassVar[list] = []  # the numbers of calls that are left

    def _call(self, name, *given, **fields):
        if self.calls:
            self.calls[0] -= 1
            if self.calls[0] < 0:
                raise ConnectionResetError("the connection\nwas closed")
        return getattr(super(), name)(*given, **fields)

    def cat_file(self, *given, **fields):
        return self._call("cat_file", *given, **fields)

    def pipe_file(self, *given, **fields):
        return self._call("pipe_file", *given, **fields)

    def info(self, *given, **fields):
        return self._call("info", *given, **fields)

    def ls(self, *given, **fields):
        return self._call("ls", *given, **fields)


@pytest.fixture
def lose():
    """lose(n): the store lost://bucket is not reached any more after n calls."""
    fsspec.register_implementation("lost", Stores, clobber=True)
    Stores.clear_instance_cache()

    def set_calls(n):
        Stores.calls[:] = [] if n is None else [n]

    yield set_calls
    set_calls(None)
    Stores.store.clear()
    Stores.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("kind", ["disk", "url of a disk", "object store"])
def test_a_store(kind, bucket, tmp_path):
    place = {"disk": tmp_path / "a", "url of a disk": f"file://{tmp_path}/a", "object store": bucket}[kind]
    store = stores.open_store(place, "b")
    assert store.names() == set() and not store.exists("x")
    store.write("x", [b"0123", np.arange(3, dtype=np.uint8).data])
    store.write("y", [b""])
    assert store.names() == {"x", "y"} and store.exists("x") and store.size("x") == 7
    assert store.read("x") == b"0123\x00\x01\x02" and store.read("x", 2, 5) == b"23\x00"
    assert store.read("x", 5, 9) == b"\x01\x02"  # where it ends
    store.write("x", [b"4"])
    assert pickle.loads(pickle.dumps(store)).read("x") == b"4"
    assert store.file("x") == f"{store.place}/x"
    with pytest.raises(FileNotFoundError):
        store.read("z")


def test_a_disk_keeps_a_file_until_the_next_is_complete(tmp_path):
    store = stores.open_store(tmp_path)
    store.write("x", [b"old"])

    def pieces():
        yield b"new"
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.write("x", pieces())
    assert store.read("x") == b"old"


def test_files_stay_open_as_long_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MOST_OPEN", 3)
    store = stores.open_store(tmp_path)
    n_open = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else None
    for n in range(6):
        store.write(f"{n}", [b"%d" % n])
        assert store.read(f"{n}") == b"%d" % n
    if n_open is not None:
        assert len(os.listdir("/proc/self/fd")) == n_open + 3
    for n in range(6):
        (tmp_path / f"{n}").unlink()
    assert [store.read(f"{n}") for n in (3, 5, 4)] == [b"3", b"5", b"4"]
    with pytest.raises(FileNotFoundError):
        store.read("0")
    store.write("4", [b"new"])
    assert store.read("4") == b"new" and pickle.loads(pickle.dumps(store)).read("4") == b"new"
    del store
    if n_open is not None:
        assert len(os.listdir("/proc/self/fd")) == n_open


def test_locks(tmp_path, bucket):
    store = stores.open_store(tmp_path)
    with store.lock("a") as mine, store.lock("a", wait=False) as twice, store.lock("b", wait=False) as other:
        assert (mine, twice, other) == (True, False, True)
    assert store.names() == set()  # locks are no files of the folder


def test_stores_that_there_are_not():
    with pytest.raises(ValueError, match=r"^nowhere://x is of no known kind of store: .*nowhere"):
        stores.open_store("nowhere://x")


# Hidden states in an object store


def test_an_object_store_has_the_same_bits_as_a_disk(make_model, bucket, tmp_path, count, small_shards):
    expected = HiddenStateCache(texts(), make_model(), make_tokenizer(), tmp_path)
    found = HiddenStateCache(texts(), make_model(), make_tokenizer(), bucket)
    assert found.folder == f"{bucket}/{Path(expected.folder).name}"
    store, files = stores.open_store(found.folder), sorted(Path(expected.folder).glob("*.*"))
    assert {path.name for path in files} == store.names()
    assert all(store.read(path.name) == path.read_bytes() for path in files)
    assert_same_states(found, expected)
    assert_same_states(pickle.loads(pickle.dumps(found)), expected)
    assert_same_states(HiddenStateCache(texts(), make_model(), make_tokenizer(), sources=[found.folder]), expected)

    model = make_model()
    batches = count(model)
    again = HiddenStateCache(texts(), model, make_tokenizer(), bucket)
    assert batches == [] and again[3]["labels"] == expected[3]["labels"]


def test_parts_of_an_object_store(make_model, bucket, small_shards):
    model, tokenizer = make_model(), make_tokenizer()
    found, folder = state_keys.find_folder(texts(), model, tokenizer, bucket, "float16")
    rows = found.select(texts(), tokenizer)
    source = computing_states.BackboneStates(model, CapsuleCollator(tokenizer))
    computing_states.compute(folder, rows, source, 2048, (1, 3), wait=False)
    assert folder.missing() == [shard for shard in range(folder.n_shards) if shard % 3 != 1]  # others may have them
    computing_states.compute(folder, rows, source, 2048)
    assert folder.is_complete()


def test_a_damaged_object_is_named(make_model, bucket, small_shards):
    cached = HiddenStateCache(texts(), make_model(), make_tokenizer(), bucket)
    store = stores.open_store(cached.folder)
    name = max(store.names() - {"manifest.json"})
    store.write(name, [store.read(name)[:-9]])
    with pytest.raises(ValueError, match=f"{cached.folder}/{name} has .* bytes, expected .* Delete the file"):
        HiddenStateCache(texts(), make_model(), make_tokenizer(), bucket)


@pytest.mark.parametrize("n_calls", range(0, 40, 3))
def test_a_store_that_is_lost_ends_in_one_sentence(make_model, lose, n_calls, small_shards):
    arguments = texts(), make_model(), make_tokenizer(), "lost://bucket/states"
    lose(n_calls)
    with pytest.raises(OSError, match=r"could not be read or written \(ConnectionResetError: the conn") as error:
        assert_same_states(HiddenStateCache(*arguments), HiddenStateCache(*arguments))
        pytest.fail("it was not lost")
    assert "\n" not in str(error.value) and str(error.value).startswith("lost://bucket/states/hidden_states_")
    lose(None)
    folder = state_keys.find_folder(*arguments, "float16")[1]
    kept = set(range(folder.n_shards)) - set(folder.missing())
    written = {shard: folder.store.read(f"shard-{shard:05d}.safetensors") for shard in kept}
    HiddenStateCache(*arguments)  # resumes where the store was lost
    assert folder.is_complete()
    assert all(folder.store.read(f"shard-{shard:05d}.safetensors") == x for shard, x in written.items())
