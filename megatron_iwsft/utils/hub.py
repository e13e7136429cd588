"""Names of the Hugging Face Hub, which is never asked."""

from __future__ import annotations

import re
from pathlib import Path

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def missing_directory(name: str | Path) -> str:
    """What is wrong with a directory that does not exist; if it may be the id of a model, with the command that downloads it."""
    if _ID.fullmatch(str(name)) is None:
        return f"{name} does not exist. Check the path."
    local = f"models/{Path(name).name}"
    return (
        f"{name} does not exist here, and models are not downloaded. If it is one of the Hugging Face Hub: "
        f"hf download {name} --local-dir {local} (pip install huggingface_hub), then use {local}."
    )
