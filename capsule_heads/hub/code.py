"""Code that goes along with a checkpoint: AutoModel...from_pretrained(..., trust_remote_code=True) runs it.

It is what inference needs of the package's own source, for the model and the head of the checkpoint: little enough to
read before running it. `sources` selects it, `inference` says what is left out. transformers copies the files that the
first one imports, by lines such as `from .heads import x`, all of them in one folder.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from pathlib import Path
from typing import Any

from ..files import read_json, write_json, write_text
from ..heads import Head, get_head
from ..version import __version__
from .config import CLASSES, auto_class_of, members_of, read_config
from .inference import rules_for
from .sources import PACKAGE, Binding, Selection, edited, import_lines

# transformers keeps a copy of a local checkpoint's code for each first file: with one, there is one class of each name.
FIRST = "modeling_capsule_head"
PROCESSORS = "image_processing_stereo"  # a first file of its own: it needs Pillow, which models of text do not
BRIEF_NOTICE = "# Part of capsule_heads {version} (MIT licence); see modeling_capsule_head.py.\n"
NOTICE = """\
# Part of capsule_heads {version} (MIT licence): the code that its models need for inference, and no more.
# Routing is the paper's literal loop here. All strategies mean it, as they compute the same function.
# The fast strategies, training and explanations need the package. Where it is imported, it runs instead of this code.
"""
# A backbone that transformers does not know: its class, and what registers it where the package has not.
STEREO_CONV = "stereo_conv"
REGISTER_STEREO_CONV = """

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel  # noqa: E402

if StereoConvConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(StereoConvConfig.model_type, StereoConvConfig)
    AutoModel.register(StereoConvConfig, StereoConvModel)
"""


def write_code(directory: str | os.PathLike[str]) -> None:
    """Add the code to a checkpoint that `save_pretrained` wrote, and name its classes in the configuration.

    Args:
        directory: the checkpoint's, which also holds its `StereoImageProcessor`, if it has one.

    Raises:
        OSError: If there is no checkpoint, or it cannot be written to.
        ValueError: If its configuration is not one that `save_pretrained` wrote, its head is not registered, or the
            head's own code cannot go along.
    """
    directory = Path(directory)
    config = read_config(directory)
    processor = directory / "preprocessor_config.json"
    has_processor = processor.is_file() and read_json(processor).get("image_processor_type") == "StereoImageProcessor"
    for name, text in carried_files(config, has_processor).items():
        write_text(directory / name, text)
    # Last: without these, nothing looks at the files.
    auto_map = {name: f"{FIRST}.{CLASSES[name]}" for name in carried_classes(config)}
    write_json(directory / "config.json", {**read_json(directory / "config.json"), "auto_map": auto_map})
    if has_processor:
        auto_map = {"AutoImageProcessor": f"{PROCESSORS}.StereoImageProcessor"}
        write_json(processor, {**read_json(processor), "auto_map": auto_map})


def carried_classes(config: dict[str, Any]) -> list[str]:
    """Return the auto classes that the code has a class for: the checkpoint's, and that of its part capsules."""
    has_parts = get_head(config["head_type"]).has_parts
    return ["AutoConfig", *dict.fromkeys([*(["AutoModel"] if has_parts else []), auto_class_of(config)])]


def carried_files(config: dict[str, Any], has_processor: bool = False) -> dict[str, str]:
    """Return the files of the code, their text by name.

    Args:
        config: the checkpoint's configuration.
        has_processor: whether the checkpoint has a `StereoImageProcessor`.

    Raises:
        ValueError: If the head's own code cannot go along.
    """
    selection = Selection(rules_for(config))
    for name in carried_classes(config):
        selection.add(f"{PACKAGE}.models", CLASSES[name])
    own: dict[str, str] = {}
    registers = ""
    for head in dict.fromkeys(get_head(part["head_type"]) for part in (config, *members_of(config))):
        if head.__module__.partition(".")[0] == PACKAGE:
            selection.add(head.__module__, head.__name__)
        else:
            own_name, own_text = own_file(head, selection)
            if own.setdefault(f"{own_name}.py", own_text) != own_text:
                raise ValueError(f"Two heads of the ensemble are in files of one name, {own_name}.py; rename one file.")
            registers += f"from .{own_name} import {head.__name__}  # noqa: E402, F401\n"
    if config["base_config"]["model_type"] == STEREO_CONV:
        file, name = selection.add(f"{PACKAGE}.paper.modeling_stereo_conv", "StereoConvModel")
        registers += f"from .{file} import {name}  # noqa: E402, F401\n"
    if has_processor:
        selection.add(f"{PACKAGE}.paper.image_processing_stereo", "StereoImageProcessor")
    files = {**selection.files(), **own}
    if registers:
        files["configuration_capsule_head.py"] += f"\n\n# They register themselves when they are imported.\n{registers}"
    if f"modeling_{STEREO_CONV}.py" in files:
        files[f"modeling_{STEREO_CONV}.py"] += REGISTER_STEREO_CONV
    notices = {f"{FIRST}.py": NOTICE}
    return {
        name: f"{notices.get(name, BRIEF_NOTICE).format(version=__version__)}\n{text}" for name, text in files.items()
    }


def own_file(head: type[Head], selection: Selection) -> tuple[str, str]:
    """Return the file of a head that is not of the package: its name without suffix, and its text.

    Imports of the package become imports of the files of the code. What they import is added to the selection.

    Raises:
        ValueError: If the head is not in a file, or that file imports what cannot go along.
    """
    known = f"head_type {head.name!r} is {head.__qualname__} of {head.__module__}"
    try:
        source = inspect.getsourcefile(importlib.import_module(head.__module__))
    except (ImportError, TypeError):
        source = None
    if head.__module__ == "__main__" or source is None or not os.path.isfile(source):
        raise ValueError(
            f"{known}, whose code cannot go along with a checkpoint; expected a head in a module of its own: move it "
            "from the notebook or program to a .py file, and import it from there."
        )
    text = Path(source).read_text(encoding="utf-8")
    edits: dict[ast.stmt, list[str]] = {}
    for statement in ast.walk(ast.parse(text)):
        if isinstance(statement, ast.Import):
            wrong = next((x.name for x in statement.names if x.name.partition(".")[0] == PACKAGE), None)
            if wrong is not None:
                raise ValueError(
                    f"{known}, which imports the module {wrong}; expected names, which can go along with a checkpoint: "
                    f"write `from {wrong} import name`."
                )
        elif isinstance(statement, ast.ImportFrom) and statement.level:
            raise ValueError(
                f"{known}, which imports {'.' * statement.level}{statement.module or ''}; expected all of a head's own "
                "code in one file, which can go along with a checkpoint: move it there."
            )
        elif isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == PACKAGE:
            edits[statement] = _imports_of_copies(statement, selection, known)
    return f"own_{Path(source).stem}", edited(text, edits)


def _imports_of_copies(statement: ast.ImportFrom, selection: Selection, known: str) -> list[str]:
    bindings = []
    for alias in statement.names:
        try:
            file, name = selection.add(statement.module or "", alias.name)
        except ImportError as error:
            raise ValueError(
                f"{known}, which imports {alias.name} from {statement.module}; expected names of {PACKAGE}.heads or "
                f"{PACKAGE}.layers, the ones that can go along with a checkpoint ({error})"
            ) from error
        bindings.append(Binding(alias.asname or alias.name, f".{file}", name, False))
    return import_lines(bindings, indent=" " * statement.col_offset)
