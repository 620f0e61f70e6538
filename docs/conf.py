"""How Sphinx builds the documentation: `sphinx-build -W docs build/docs`, after `pip install --group docs`."""

from datetime import date
from importlib.metadata import version as version_of

project = "capsule_heads"
author = "The capsule_heads authors"
copyright = f"{date.today().year}, {author}"
version = release = version_of("capsule-heads")

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks, which are run
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",  # docstrings in Google's style
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinxcontrib.programoutput",  # what commands say with --help
]
exclude_patterns = ["_build"]
nitpicky = False
napoleon_use_ivar = True  # attributes are listed once, in their class
default_role = "code"  # docstrings are written for terminals, with single backticks

html_theme = "furo"
html_title = "capsule_heads"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
