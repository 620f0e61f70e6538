"""Runs notebooks: `python tests/notebooks.py NOTEBOOK ...` runs each in an empty folder and writes its outputs into it.

A notebook is kept as git shows it best: sorted keys, no times, no versions, and cells whose names do not change.
"""

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},  # which knows lines that begin with !
}
SECONDS = 900  # of a cell; a machine that compiles routing kernels first takes the longest


def read(path: Path) -> nbformat.NotebookNode:
    """Return a notebook."""
    return nbformat.read(path, as_version=4)


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run the cells of a notebook in a folder, without a network, and give them their outputs.

    Raises:
        CellExecutionError: At the first cell that fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment["PATH"]])
    environment["HF_HOME"] = str(folder / ".home")  # rendered toys and hidden states are made anew
    environment["IPYTHONDIR"] = str(folder / ".ipython")  # not the settings of whoever runs this
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)


def tidy(notebook: nbformat.NotebookNode) -> str:
    """Return the text of a notebook's file, without what differs from one run to the next for no reason."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    return nbformat.writes(notebook).rstrip("\n") + "\n"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        notebook = read(path)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        path.write_text(tidy(notebook), encoding="utf-8")
