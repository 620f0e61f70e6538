"""The notebooks of the documentation: they run, and the outputs they were committed with can be shown to anyone."""

import re
import tomllib

import notebooks
import pytest

ROOT = notebooks.ROOT
NAMES = sorted(path.name for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
FOLDERS = "bin|content|etc|home|mnt|opt|private|root|srv|tmp|usr|var|work|Users|Volumes"
MACHINE_PATH = re.compile(rf"(?<![\w.~-])/(?:{FOLDERS})/|\b[A-Z]:\\|site-packages")
MOST_BYTES = 500_000


def path_of(name):
    return ROOT / "docs" / "notebooks" / name


def text_of(output):
    """What a reader reads of an output: pictures are left out."""
    texts = [output.get("text", ""), *output.get("data", {}).values()]
    kinds = ["text/plain", *output.get("data", {})]
    return "\n".join(str(text) for kind, text in zip(kinds, texts) if not kind.startswith("image/"))


@pytest.fixture(params=NAMES)
def path(request):
    return path_of(request.param)


@pytest.fixture
def notebook(path):
    return notebooks.read(path)


def test_there_are_notebooks():
    assert len(NAMES) == 5


@pytest.mark.slow
def test_a_notebook_runs(path, tmp_path):
    notebooks.run(notebooks.read(path), tmp_path)  # ends at the first error


def test_a_notebook_was_run_from_top_to_bottom(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_outputs_have_no_errors_no_paths_and_no_messages(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output["text"]
            found = MACHINE_PATH.search(text_of(output))
            assert found is None, f"{cell.id}: {found}"


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("/tmp/x/model", True),
        ("in '/home/me/runs'", True),
        (r"C:\Users\me", True),
        ("runs/tmp/model", False),
        ("</td></tr>", False),
        ("positive/negative", False),
    ],
)
def test_the_reader_of_paths(text, is_path):
    assert bool(MACHINE_PATH.search(text)) == is_path


def test_the_beginning_says_what_is_learned_and_what_is_needed(notebook):
    title, install = notebook.cells[:2]
    assert title.cell_type == "markdown"
    assert re.match(r"# .+\n\nIn this notebook you\n", title.source)
    assert "Open in Colab" in title.source
    (extras,) = re.findall(r'^# %pip install "capsule-heads\[([\w,]+)\]"$', install.source, re.MULTILINE)
    for extra in extras.split(","):
        assert extra in EXTRAS
        assert f"`{extra}`" in title.source


def test_a_file_is_tidy(path, notebook):
    text = path.read_text(encoding="utf-8")
    assert notebooks.tidy(notebook) == text, f"python tests/notebooks.py {path.relative_to(ROOT)} tidies it"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id) for cell in notebook.cells)
    assert len(text.encode()) < MOST_BYTES


def test_links_lead_to_pages(path, notebook):
    for cell in notebook.cells:
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert (path.parent / target).exists(), target
