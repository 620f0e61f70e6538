"""Text and JSON files are written completely or not at all, and whatever is read ends in a value or a sentence."""

import os
import re
import resource

import pytest

from capsule_heads.files import read_json, write_json, write_text


@pytest.mark.parametrize("content", ["{", "", "[" * 10**5, '{"a":' * 10**5, "\0", "9" * 5000, b"\xff{}"])
def test_what_is_no_json_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^{path} is not JSON: .*\.$"):
        read_json(path)


@pytest.mark.parametrize("kind, content, expected", [(dict, "[]", "keys and values"), (list, "{}", "a list")])
def test_another_kind_of_content_is_named(tmp_path, kind, content, expected):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path}: expected {expected}, found"):
        read_json(path, kind)


def test_a_full_disk_leaves_the_earlier_file_and_no_other(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=rf"^{path} could not be written: File too large; make room, or choose"):
            write_json(path, {"a": "a" * 20_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["results.json"]
    assert read_json(path) == {"a": 1}


def test_a_place_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    for path in tmp_path / "none" / "a.txt", tmp_path / "file" / "a.txt":
        with pytest.raises(OSError, match=rf"^{re.escape(str(path))} could not be written: N.*; make room"):
            write_text(path, "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder could not be written: Is a directory"):
        write_text(tmp_path / "folder", "a")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
