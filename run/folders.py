"""
The folder of a model: on disk or on the hub, an adapter or whole.
"""

import json
from pathlib import Path

from run import UserError


def from_pretrained(kind, folder, **kwargs):
    name = base_folder(folder)
    # a mistyped path is told at once: asking the hub for it takes minutes where there is no network
    if not Path(name).is_dir() and (name.count("/") != 1 or Path(name).parent.is_dir()):
        why = f"there is no folder {name}, and a model on the hub is named OWNER/NAME"
        raise FileNotFoundError(f"no Qwen2.5-Omni model at {folder}: {why}")
    try:
        return kind.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise FileNotFoundError(f"no Qwen2.5-Omni model at {folder}: {why}") from None


def base_folder(folder):
    """The folder with the processor and full weights: an adapter's base, or the folder itself."""
    if is_adapter(folder):
        named = read_config(Path(folder) / "adapter_config.json")["base_model_name_or_path"]
        beside = Path(folder).resolve().parent / "base"  # as a run left it, wherever that is now
        return str(beside) if beside.is_dir() and not Path(named).is_dir() else named
    return str(folder)


def read_config(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): mend it, or copy the model anew") from None


def is_adapter(folder):
    return (Path(folder) / "adapter_config.json").is_file()
