"""The Stanford Sentiment Treebank, read from its original PTB-format trees."""

from __future__ import annotations

import hashlib
import http.client
import io
import lzma
import os
import re
import struct
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

STANFORD_URL = "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"
FINE_GRAINED_NAMES = ["very negative", "negative", "neutral", "positive", "very positive"]
BINARY_NAMES = ["negative", "positive"]

_SPLIT_FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
_FOLDER = "trees/"  # in it, or beside it
# What zipfile raises of bytes that are lost or changed: wrong offsets, sizes, methods and flags among them.
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError, struct.error)
_STANFORD_TREES = {"train": 8_544, "validation": 1_101, "test": 2_210}
_LABELS = {name: int(name) for name in "01234"}
_NEUTRAL = 2
_DOWNLOAD_TIMEOUT = 60  # seconds without an answer

# An opening parenthesis takes the label behind it along. Only a blank or a tab separates: two training sentences hold a
# no-break space inside a word.
_TOKEN = re.compile(r"\([ \t]*(?P<label>[^() \t]*)|(?P<close>\))|(?P<word>[^() \t]+)")
_BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lcb-": "{", "-rcb-": "}", "-lsb-": "[", "-rsb-": "]"}


def load_sst(
    source: str | os.PathLike[str] = STANFORD_URL,
    *,
    fine_grained: bool = True,
    phrases: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.DatasetDict:
    r"""Load the Stanford Sentiment Treebank (8,544 / 1,101 / 2,210 trees).

    The columns are `text` (tokens separated by single spaces, as in the corpus) and `label` (a `ClassLabel`). The
    validation and test splits always hold complete sentences ("root" sentences), which is what SST-5/R and SST-2/R
    accuracies are measured on.

    Distinct phrases: the training phrases are walked sentence by sentence, each tree from its root down and from left
    to right. A text is kept where it first occurs, with the label it has there; for binary labels the neutral phrases
    are dropped before that. This is the rule of Heinsen's 2019 training notebook ("An Algorithm for Routing Capsules in
    All Domains"). In Stanford's corpus no text has two labels, so the rule decides the order alone. Of the 318,582
    subtrees, 159,274 distinct phrases remain with fine-grained labels (7,233 / 27,711 / 81,658 / 33,361 / 9,311) and
    77,616 with binary ones (34,944 / 42,672).

    The escapes of the Penn Treebank are undone: `-LRB- -RRB- -LCB- -RCB- -LSB- -RSB-` become brackets, `\/` and `\*`
    become `/` and `*`, and a no-break space inside a word becomes a space. The quotation marks ` `` ` and `''` stay as
    they are.

    Args:
        source: A directory with `train.txt`, `dev.txt` and `test.txt` (in it, or in its `trees` folder), a zip file
            with them, or the http(s) address of such a zip file. An address is downloaded once.
        fine_grained: With `True` the five labels "very negative" to "very positive"; with `False` "negative" and
            "positive", without the neutral examples.
        phrases: Whether the training split holds all distinct phrases or, with `False`, the sentences alone (none of
            them dropped as a duplicate).
        cache_dir: Where downloads are kept; by default `capsule_heads` in the cache folder of Hugging Face (`HF_HOME`).

    Returns:
        The splits `train`, `validation` and `test`, in the order of the corpus.

    Raises:
        TypeError: If `source` is neither a string nor a path.
        FileNotFoundError: If `source`, or one of the three files in it, does not exist.
        ConnectionError: If the download fails or does not bring a complete zip file.
        ValueError: If a zip file is damaged, a file is empty or a tree is malformed.
    """
    import datasets

    splits = {}
    for split, (name, payload) in _read_source(source, cache_dir).items():
        all_phrases = phrases and split == "train"
        trees = _parse_file(name, payload)
        examples: Iterable[tuple[str, int]] = (
            example for tree in trees for example in (tree if all_phrases else tree[:1])
        )
        if not fine_grained:
            examples = ((text, int(label > _NEUTRAL)) for text, label in examples if label != _NEUTRAL)
        if all_phrases:
            examples = _first_of_each_text(examples)
        splits[split] = _to_dataset(examples, FINE_GRAINED_NAMES if fine_grained else BINARY_NAMES)
    return datasets.DatasetDict(splits)


def _first_of_each_text(examples: Iterable[tuple[str, int]]) -> Iterable[tuple[str, int]]:
    labels: dict[str, int] = {}
    for text, label in examples:
        labels.setdefault(text, label)
    return labels.items()


def _to_dataset(examples: Iterable[tuple[str, int]], names: list[str]) -> datasets.Dataset:
    import datasets

    rows = list(examples)
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(columns, features=features)


# Trees


def _parse_file(name: str, payload: bytes) -> Iterator[list[tuple[str, int]]]:
    """Yield each line's phrases; `name` is the file's, for error messages."""
    if not payload.strip():
        raise ValueError(f"{name} is empty; expected one tree a line, such as (3 (2 A) (4 delight)).")
    # Not splitlines(), which also splits at characters that may stand inside a sentence.
    for number, line in enumerate(payload.rstrip().split(b"\n"), start=1):
        if b"\0" in line:
            raise ValueError(f"{name}, line {number}: a NUL byte, as in UTF-16 or a damaged file; save it as UTF-8.")
        try:
            yield _parse_tree(line.decode("utf-8").strip("\r\t "))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number}: not UTF-8 text ({error}); save the file as UTF-8.") from error
        except ValueError as error:
            raise ValueError(
                f"{name}, line {number}: {error}; expected one tree a line, such as (3 (2 A) (4 delight))."
            ) from None


def _parse_tree(line: str) -> list[tuple[str, int]]:
    """Return the phrases of a tree with their labels, from the root down and from left to right.

    Raises:
        ValueError: If the tree is malformed; the caller adds its file and line.
    """
    words: list[str] = []
    nodes: list[list[int]] = []  # label, index of the first word, index after the last word
    open_nodes: list[list[int]] = []
    in_leaf = False  # the innermost open node holds a word
    for token in _TOKEN.finditer(line):
        kind = token.lastgroup  # label (with the parenthesis before it), close or word
        if not open_nodes and (nodes or kind != "label"):
            if kind == "close":
                raise ValueError("unbalanced parenthesis, a ')' closes nothing")
            raise ValueError(f"text {'after' if nodes else 'before'} the tree: {line[token.start() :][:40]!r}")
        if kind == "close":
            node = open_nodes.pop()
            if node[1] == len(words):
                raise ValueError("empty leaf, a node without a word")
            node[2] = len(words)
            in_leaf = False
        elif in_leaf or (kind == "word" and len(words) > open_nodes[-1][1]):
            raise ValueError(f"{token[0]!r} stands beside another word or node, but a leaf holds one word and no node")
        elif kind == "label":
            if token["label"] not in _LABELS:
                raise ValueError(f"label {token['label']!r} is not one of 0, 1, 2, 3, 4")
            nodes.append([_LABELS[token["label"]], len(words), -1])
            open_nodes.append(nodes[-1])
        else:
            words.append(_unescape(token["word"]))
            in_leaf = True
    if open_nodes:
        raise ValueError(f"unbalanced parenthesis, {len(open_nodes)} not closed")
    if not nodes:
        raise ValueError("the line is blank")
    return [(" ".join(words[start:end]), label) for label, start, end in nodes]


def _unescape(word: str) -> str:
    if word.startswith("-") and word.lower() in _BRACKETS:
        return _BRACKETS[word.lower()]
    return word.replace("\\/", "/").replace("\\*", "*").replace("\N{NO-BREAK SPACE}", " ")


# Sources. Each reader returns, for each split, a name for error messages and the bytes of the file.


def _read_source(
    source: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None
) -> dict[str, tuple[str, bytes]]:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path or an address, got {type(source).__name__}.")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        path = _download(source, cache_dir)
    else:
        path = Path(source).expanduser()
    if path.is_dir():
        files = _locate(lambda name: (path / name).is_file(), str(path))
        return {split: (str(path / name), (path / name).read_bytes()) for split, name in files.items()}
    if path.is_file():
        return _read_zip(path.read_bytes(), str(path))
    raise FileNotFoundError(
        f"No SST at {path}: give a directory with {_file_names()}, a zip file with them, or an http(s) address of one."
    )


def _file_names() -> str:
    return ", ".join(_SPLIT_FILES.values())


def _locate(exists: Callable[[str], bool], where: str) -> dict[str, str]:
    """Return the name of each split's file, all in one folder."""
    for folder in ("", _FOLDER):
        found = {split: folder + file for split, file in _SPLIT_FILES.items() if exists(folder + file)}
        if found:
            break
    missing = [file for split, file in _SPLIT_FILES.items() if split not in found]
    if missing:
        raise FileNotFoundError(
            f"SST is missing {', '.join(missing)}: looked in {where} and its trees folder; "
            f"expected {_file_names()} together in one of the two."
        )
    return found


def _read_zip(payload: bytes, where: str) -> dict[str, tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            names = [name for name in archive.namelist() if name.removeprefix(_FOLDER) in _SPLIT_FILES.values()]
            contents = {name: archive.read(name) for name in names}
    except _DAMAGE as error:
        raise ValueError(
            f"{where} is not a complete zip file or is damaged ({error}); delete it and fetch it again."
        ) from error
    files = _locate(lambda name: name in contents, where)
    return {split: (f"{name} in {where}", contents[name]) for split, name in files.items()}


def _download(url: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the path of the zip file at `url`, downloading it unless the cache has it."""
    if cache_dir is None:
        from datasets.config import HF_CACHE_HOME

        folder = Path(HF_CACHE_HOME) / "capsule_heads"
    else:
        folder = Path(cache_dir).expanduser()
    target = folder / f"sst-{hashlib.sha256(url.encode()).hexdigest()[:16]}.zip"
    if target.exists():
        return target
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT) as response:
            payload = response.read()
        _check_download(payload, url)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConnectionError(
            f"Could not download SST from {url} ({error}); fetch it in another way and give source= a local directory "
            f"with {_file_names()}, or a zip file with them."
        ) from error
    # Checked before it gets its name, and renamed when complete: no other process sees a part of it.
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{target.name}.{uuid.uuid4().hex}.part"
    try:
        part.write_bytes(payload)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _check_download(payload: bytes, url: str) -> None:
    files = _read_zip(payload, "the downloaded file")
    if url == STANFORD_URL:
        n_trees = {split: len(content.rstrip().split(b"\n")) for split, (_, content) in files.items()}
        if n_trees != _STANFORD_TREES:
            raise ValueError(f"the downloaded file holds {n_trees} trees, expected {_STANFORD_TREES}")
