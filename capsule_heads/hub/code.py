"""Code that goes along with a checkpoint: AutoModel...from_pretrained(..., trust_remote_code=True) runs it.

transformers copies the files of a checkpoint that the first one imports, by lines such as `from .losses import x`, all
of them in one folder. So the modules of this package lie side by side there, as they are but for those lines.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..files import read_json, write_json, write_text
from ..version import __version__

ROOT = Path(__file__).parents[1]
# Of the package: what models are made of.
PARTS = ("checks", "ops", "layers", "mixup", "weights", "heads", "control_heads", "explain", "models")
# transformers keeps a copy of a local checkpoint's code for each first file: with one, there is one class of each name.
FIRST = "modeling_capsule_head"
CLASSES = {
    "AutoConfig": "CapsuleHeadConfig",
    "AutoModel": "CapsuleHeadModel",
    "AutoModelForAudioClassification": "CapsuleHeadForAudioClassification",
    "AutoModelForImageClassification": "CapsuleHeadForImageClassification",
    "AutoModelForSequenceClassification": "CapsuleHeadForSequenceClassification",
}
PROCESSORS = "image_processing_stereo"  # a first file of its own: it needs Pillow, which models of text do not


def write_code(directory: str | os.PathLike) -> None:
    """Adds the code to a checkpoint that `save_pretrained` wrote, and names its classes in the configuration.

    Args:
        directory: of the checkpoint; also of a `StereoImageProcessor`, if the checkpoint needs one.

    Raises:
        OSError: if there is no checkpoint, or it cannot be written to.
        ValueError: if its configuration is none.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise OSError(f"{directory} holds no config.json; expected a directory that save_pretrained wrote.")
    processor = directory / "preprocessor_config.json"
    is_stereo = processor.is_file() and read_json(processor).get("image_processor_type") == "StereoImageProcessor"
    read_json(directory / "config.json")  # before anything is written
    for name, text in flat_modules().items():
        write_text(directory / name, text)
    # Last: without these, nothing looks at the files.
    _add_to_json(directory / "config.json", {name: f"{FIRST}.{class_name}" for name, class_name in CLASSES.items()})
    if is_stereo:
        _add_to_json(processor, {"AutoImageProcessor": f"{PROCESSORS}.StereoImageProcessor"})


def flat_modules() -> dict[str, str]:
    """The modules that models are made of, as files of one folder: `{name: text}`."""
    paths = [path for part in PARTS for path in (ROOT / f"{part}.py", *sorted(ROOT.glob(f"{part}/*.py")))]
    sources = {_flat_name(path): path for path in paths if path.is_file() and path != ROOT / "models" / "__init__.py"}
    texts = {
        f"{name}.py": f"# capsule_heads {__version__}, {path.relative_to(ROOT).as_posix()}; MIT licence.\n"
        + _flatten_imports(path.read_text(encoding="utf-8"))
        for name, path in sources.items()
    }
    # What ops imports by name, when it is first used, or as modules.
    strategies = "".join(f"    from .{path.stem} import *\n" for path in sorted(ROOT.glob("ops/[!_]*.py")))
    texts["ops.py"] += f"\nif False:  # transformers copies the files that such lines name, run or not\n{strategies}"
    return texts


def _flat_name(path: Path) -> str:
    return path.parent.name if path.name == "__init__.py" else path.stem


def _flatten_imports(text: str) -> str:
    """`from ..ops.votes import x` becomes `from .votes import x`, and `from .. import x` becomes `from . import x`."""
    return re.sub(r"^(\s*from )\.+(?:\w+\.)*(\w*) import", r"\1.\2 import", text, flags=re.MULTILINE)


def _add_to_json(path: Path, auto_map: dict[str, str]) -> None:
    write_json(path, {**read_json(path), "auto_map": auto_map})
