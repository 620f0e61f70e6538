"""Why transformers' own way of saving code with a checkpoint is refused."""

from __future__ import annotations

from typing import NoReturn


def refuse_auto_class(cls: type) -> NoReturn:
    """Refuse `register_for_auto_class`, after which `save_pretrained` would copy a single folder of this package.

    Raises:
        TypeError: Always; with the calls to use.
    """
    raise TypeError(
        f"{cls.__name__}.register_for_auto_class() was called, and save_pretrained cannot copy the code of a package; "
        "expected model.push_to_hub(repo_id, include_code=True), or capsule_heads.hub.write_code(directory) after "
        "save_pretrained, which write the code that the model needs."
    )
