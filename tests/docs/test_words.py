"""The project's words: what users read says the field's terms, and nothing that has to be read twice."""

import ast
import re
from pathlib import Path

import pytest
from pages import BLOCK

import capsule_heads

ROOT = Path(capsule_heads.__file__).parents[1]
# What not to write, and what to write instead.
WORDS = {
    r"in the place of": "instead of",
    r"(begins?|made|computed|drawn) anew|anew": "again",
    r"goes on where": "resumes",
    r"sees to": "a verb for what is done",
    r"at the margin": "derivative",
    r"so many": "a number",
    r"with no need of": "without",
    r"none (has|is|are) (a|an) ": "there is no",
    r"whole (model|network|head|text|sentence|run|checkpoint|suite)s?": "complete",
    r"shares? of (the )?(data|examples|rows|time|distances|predictions)": "fraction of",
    r"width of (the )?(hidden|backbone)": "hidden size",
    r"sounds? files?": "audio files",
    r"chance level": "chance",
    r"(simply|just|easily|obviously|of course|clearly|basically)": "nothing",
    r"(utili[sz]es?|leverages?|in order to|prior to)": "a plain word: uses, to, before",
    r"(blazing|lightning|state-of-the-art|powerful|seamless(ly)?|effortless(ly)?|robust(ly)?)": "a number",
}
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for pattern in ("README.md", "docs/**/*.md", ".github/**/*.md", "capsule_heads/**/*.md", "configs/**/*.yaml")
    for path in sorted(ROOT.glob(pattern))
}
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "capsule_heads").rglob("*.py"))}


def faults(text):
    for words, instead in WORDS.items():
        for found in re.finditer(rf"(?<![\w-]){words}(?![\w-])", " ".join(text.split()), re.IGNORECASE):
            yield f'"{found[0]}": write {instead}'


@pytest.mark.parametrize("name", PAGES)
def test_pages(name):
    assert not list(faults(re.sub(r"`[^`\n]+`", "", BLOCK.sub("", PAGES[name].read_text()))))


@pytest.mark.parametrize("name", MODULES)
def test_texts_in_code(name):
    """Docstrings, and all other texts of more than three words: help texts, errors and warnings."""
    found = (node.value for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Constant))
    for text in found:
        if isinstance(text, str) and len(text.split()) > 3:
            assert not list(faults(re.sub(r"``?[^`\n]+``?", "", text))), text
