import functools
import http.server
import io
import itertools
import threading
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import pytest

from capsule_heads.data import sst
from capsule_heads.data.sst import load_sst

TRAIN = "(3 (2 It) (4 (2 's) (3 fun)))\n(2 (2 It) (2 (2 's) (0 long)))\n"
DEV = "(1 (2 Too) (1 long))\n(2 (2 a) (2 film))\n"
TEST = "(4 (2 So) (4 good))\n(0 (2 So) (0 bad))\n(1 (2 So) (1 so))\n"
FILES = {"train.txt": TRAIN, "dev.txt": DEV, "test.txt": TEST}


def write(folder, **changed):
    """Writes the three files, with other content where given: train=..., dev=..., test=..."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        content = changed.get(name.removesuffix(".txt"), content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def zipped(prefix="trees/", names=tuple(FILES)):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(prefix + name, FILES[name])
    return buffer.getvalue()


def rows(dataset):
    return list(zip(dataset["text"], dataset["label"], strict=True))


@pytest.fixture
def serve(tmp_path_factory, monkeypatch):
    """Serves files from a loopback address: serve(name, payload) -> (address, list of requested paths)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    root = tmp_path_factory.mktemp("served")
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requested.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def serve_file(name, payload):
        (root / name).write_bytes(payload)
        return f"http://127.0.0.1:{server.server_port}/{name}", requested

    yield serve_file
    server.shutdown()
    thread.join()
    server.server_close()


def test_phrases_are_distinct_and_in_order_of_first_occurrence(tmp_path):
    loaded = load_sst(write(tmp_path))
    assert list(loaded) == ["train", "validation", "test"]
    assert rows(loaded["train"]) == [
        ("It 's fun", 3),
        ("It", 2),
        ("'s fun", 4),
        ("'s", 2),
        ("fun", 3),
        ("It 's long", 2),
        ("'s long", 2),
        ("long", 0),
    ]
    # Evaluation splits hold complete sentences.
    assert rows(loaded["validation"]) == [("Too long", 1), ("a film", 2)]
    assert rows(loaded["test"]) == [("So good", 4), ("So bad", 0), ("So so", 1)]
    assert loaded["train"].features["label"].names == [
        "very negative",
        "negative",
        "neutral",
        "positive",
        "very positive",
    ]


def test_binary_labels_leave_neutral_out(tmp_path):
    loaded = load_sst(write(tmp_path), fine_grained=False)
    assert rows(loaded["train"]) == [("It 's fun", 1), ("'s fun", 1), ("fun", 1), ("long", 0)]
    assert rows(loaded["validation"]) == [("Too long", 0)]
    assert rows(loaded["test"]) == [("So good", 1), ("So bad", 0), ("So so", 0)]
    assert loaded["test"].features["label"].names == ["negative", "positive"]


def test_without_phrases_train_holds_every_sentence(tmp_path):
    source = write(tmp_path, train=TRAIN + TRAIN)
    sentences = [("It 's fun", 3), ("It 's long", 2)]
    assert rows(load_sst(source, phrases=False)["train"]) == sentences * 2
    assert rows(load_sst(source, phrases=False, fine_grained=False)["train"]) == [("It 's fun", 1)] * 2


def test_first_label_of_a_phrase_wins_and_neutral_ones_do_not_count_for_binary_labels(tmp_path):
    source = write(tmp_path, train="(1 (2 odd) (4 joy))\n(3 (3 odd) (0 joy))\n")
    assert rows(load_sst(source)["train"]) == [("odd joy", 1), ("odd", 2), ("joy", 4)]
    assert rows(load_sst(source, fine_grained=False)["train"]) == [("odd joy", 0), ("joy", 1), ("odd", 1)]


def test_escapes_are_undone_and_tokens_stay_apart(tmp_path):
    words = [
        "-LRB-",
        "-rrb-",
        "-LCB-",
        "-RCB-",
        "-lsb-",
        "-RSB-",
        r"and\/or",
        r"\*\*\*",
        "``",
        "''",
        "2\u00a01\\/2",
        "-lr-",
    ]
    tree = "(2 " + " ".join(f"(2 {word})" for word in words) + ")\n"
    loaded = load_sst(write(tmp_path, train=tree), phrases=False)
    assert loaded["train"]["text"][0] == "( ) { } [ ] and/or *** `` '' 2 1/2 -lr-"


def test_line_ends_blanks_and_unusual_separators(tmp_path):
    train = "(3\t(2 A)(4 \u2028treat\x85))\r\n( 2 (2 B)  (2 movie) )  \r\n\r\n"
    assert rows(load_sst(write(tmp_path, train=train), phrases=False)["train"]) == [
        ("A \u2028treat\x85", 3),
        ("B movie", 2),
    ]


def test_deep_trees_need_no_recursion(tmp_path):
    layer = 5_000
    tree = "(2 (2 x) " * layer + "(3 end)" + ")" * layer
    assert len(load_sst(write(tmp_path, train=tree))["train"]) == layer + 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("(3 (2 A) (4 treat)", r"unbalanced parenthesis, 1 not closed"),
        ("(3 (2 A) (4 treat)))", r"unbalanced parenthesis, a '\)' closes nothing"),
        (")", r"unbalanced parenthesis, a '\)' closes nothing"),
        ("(5 (2 A) (4 treat))", r"label '5' is not one of 0, 1, 2, 3, 4"),
        ("(3 (2 A) (good treat))", r"label 'good' is not one of"),
        ("((2 A) (4 treat))", r"label '' is not one of"),
        ("(22 A)", r"label '22' is not one of"),
        ("(2 A) (4 treat)", r"text after the tree: '\(4 treat\)'"),
        ("(2 A) treat", r"text after the tree: 'treat'"),
        ("A (4 treat)", r"text before the tree: 'A \(4 treat\)'"),
        ("(3 (2 ) (4 treat))", r"empty leaf, a node without a word"),
        ("(3)", r"empty leaf, a node without a word"),
        ("(3 A treat)", r"'treat' stands beside another word or node"),
        ("(3 A (4 treat))", r"'\(4' stands beside another word or node"),
        ("(3 (4 treat) A)", r"'A' stands beside another word or node"),
        ("", r"the line is blank"),
        (b"(2 caf\xe9)", r"not UTF-8 text .*; save the file as UTF-8"),
        (b"(2 ca\0fe)", "a NUL byte, as in UTF-16 or a damaged file"),
    ],
)
def test_malformed_tree_names_file_and_line(tmp_path, line, complaint):
    line = line if isinstance(line, bytes) else line.encode()
    source = write(tmp_path, dev=b"(2 fine)\n" + line + b"\n(2 fine)\n")
    with pytest.raises(ValueError, match=rf"dev\.txt, line 2: {complaint}"):
        load_sst(source)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    with pytest.raises(ValueError, match=r"test\.txt is empty; expected one tree a line"):
        load_sst(write(tmp_path, test=content))


def test_trees_folder_and_zip_files_give_the_same(tmp_path):
    expected = rows(load_sst(write(tmp_path / "plain"))["train"])
    write(tmp_path / "outer" / "trees")
    assert rows(load_sst(str(tmp_path / "outer"))["train"]) == expected
    for prefix in ("", "trees/"):
        (tmp_path / "sst.zip").write_bytes(zipped(prefix))
        assert rows(load_sst(tmp_path / "sst.zip")["train"]) == expected


def test_missing_files_are_named(tmp_path):
    source = write(tmp_path / "sst")
    (source / "dev.txt").unlink()
    (source / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing dev\.txt, test\.txt: looked in .*sst and its trees folder"):
        load_sst(source)
    (tmp_path / "sst.zip").write_bytes(zipped(names=("train.txt", "test.txt")))
    with pytest.raises(FileNotFoundError, match=r"missing dev\.txt: looked in .*sst\.zip and its trees folder"):
        load_sst(tmp_path / "sst.zip")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=r"missing train\.txt, dev\.txt, test\.txt"):
        load_sst(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"No SST at .*absent: give a directory with train\.txt"):
        load_sst(tmp_path / "absent")


def test_source_of_a_wrong_kind(tmp_path):
    with pytest.raises(TypeError, match="source must be a path or an address, got int"):
        load_sst(3)
    (tmp_path / "sst.zip").write_bytes(zipped()[:-30])
    with pytest.raises(ValueError, match=r"sst\.zip is not a complete zip file .*; delete it"):
        load_sst(tmp_path / "sst.zip")


def test_zip_files_that_lost_bytes_are_named(tmp_path):
    whole = zipped()
    lost = [whole[:-n] for n in (1, 3, 30, len(whole) - 5)]  # at the end
    lost += [whole[:start] + whole[start + n :] for start in (0, 40, 200, len(whole) - 100) for n in (1, 3, 20)]
    changed = [bytearray(whole) for _ in range(0, len(whole), 7)]
    for n, payload in enumerate(changed):
        payload[7 * n] ^= 0x20
    for payload in [*lost, *map(bytes, changed)]:
        (tmp_path / "sst.zip").write_bytes(payload)
        try:
            found = rows(load_sst(tmp_path / "sst.zip", phrases=False)["test"])
        except (ValueError, FileNotFoundError) as error:  # a changed name: the file is missing
            assert f"{tmp_path}/sst.zip" in str(error)
        else:  # what changed is of no account: a time, say
            assert found == [("So good", 4), ("So bad", 0), ("So so", 1)]
            assert payload not in lost


def test_malformed_tree_in_a_zip_file_names_both(tmp_path, monkeypatch):
    monkeypatch.setitem(FILES, "dev.txt", "(9 bad)\n")
    (tmp_path / "sst.zip").write_bytes(zipped())
    with pytest.raises(ValueError, match=r"trees/dev\.txt in .*sst\.zip, line 1: label '9'"):
        load_sst(tmp_path / "sst.zip")


def test_download_happens_once(tmp_path, serve):
    url, requested = serve("sst.zip", zipped())
    cache = tmp_path / "new" / "cache"
    first = load_sst(url, cache_dir=cache)
    again = load_sst(url, cache_dir=cache, fine_grained=False)
    assert (len(first["train"]), len(again["train"])) == (8, 4)
    assert requested == ["/sst.zip"]
    assert [file.suffix for file in cache.iterdir()] == [".zip"]


def test_download_goes_to_the_hugging_face_cache_by_default(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path))
    url, _ = serve("sst.zip", zipped())
    load_sst(url)
    assert len(list((tmp_path / "capsule_heads").glob("sst-*.zip"))) == 1


def damaged():
    payload = bytearray(zipped())
    payload[50] ^= 0xFF  # in the compressed bytes of the first file
    return bytes(payload)


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (None, "404"),
        (b"<html>moved</html>", "not a zip file"),
        (zipped()[:-30], "not a zip file"),
        (damaged(), "damaged|invalid|[Ee]rror"),
        (zipped(names=("train.txt",)), r"missing dev\.txt, test\.txt"),
    ],
    ids=["nothing", "page", "cut short", "damaged", "two files short"],
)
def test_failed_download_leaves_nothing_behind(tmp_path, serve, payload, complaint):
    url, _ = serve("other.zip", b"") if payload is None else serve("sst.zip", payload)
    url = url.replace("other", "sst")
    message = rf"Could not download SST from {url} \(.*({complaint}).*; .*give source= a local directory .*zip file"
    with pytest.raises(ConnectionError, match=message):
        load_sst(url, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_stanfords_address_must_bring_the_known_trees(tmp_path, serve, monkeypatch):
    url, _ = serve("sst.zip", zipped())
    monkeypatch.setattr(sst, "STANFORD_URL", url)
    with pytest.raises(ConnectionError, match=r"holds {'train': 2, .*expected {'train': 8544, 'validation': 1101"):
        load_sst(url, cache_dir=tmp_path)
    monkeypatch.setattr(sst, "_STANFORD_TREES", {"train": 2, "validation": 2, "test": 3})
    assert len(load_sst(url, cache_dir=tmp_path)["test"]) == 3


@pytest.fixture(scope="module")
def corpus():
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "sst"
    if not folder.is_dir():
        pytest.skip(f"the Stanford Sentiment Treebank is not at {folder}")
    return folder


@pytest.mark.parametrize(
    ("fine_grained", "n_examples", "n_labels"),
    [
        (True, (159_274, 1_101, 2_210), {0: 7_233, 1: 27_711, 2: 81_658, 3: 33_361, 4: 9_311}),
        (False, (77_616, 872, 1_821), {0: 34_944, 1: 42_672}),
    ],
)
def test_real_corpus(corpus, fine_grained, n_examples, n_labels):
    loaded = load_sst(corpus, fine_grained=fine_grained)
    assert tuple(len(split) for split in loaded.values()) == n_examples
    assert Counter(loaded["train"]["label"]) == n_labels
    assert len(set(loaded["train"]["text"])) == n_examples[0]
    assert not any(escape in text for text in loaded["test"]["text"] for escape in ("-LRB-", "-RRB-", "\\", "\u00a0"))


def test_real_sentences(corpus):
    loaded = load_sst(corpus, phrases=False)
    assert loaded.num_rows == {"train": 8_544, "validation": 1_101, "test": 2_210}
    assert load_sst(corpus, phrases=False, fine_grained=False).num_rows == {
        "train": 6_920,
        "validation": 872,
        "test": 1_821,
    }
    assert loaded["test"][0] == {"text": "Effective but too-tepid biopic", "label": 2}
    words = itertools.chain.from_iterable(text.split(" ") for text in loaded["train"]["text"])
    assert all(words)  # single spaces only
