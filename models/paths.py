"""
The folder of a model: on disk or on the hub, an adapter or whole.
"""

import functools
import json
import shutil
from pathlib import Path

from run import processes
from run.arguments import check_model
from run.errors import UserError
from run.io import default_file_modes, temp_dir
from run.run_dir import has_checkpoint


def run_final(folder):
    """RUN/final where `folder` is that of a run; any other folder or name as it is."""
    run = Path(folder)
    if not (run / "run.json").is_file() or (run / "config.json").exists():
        return folder
    if not (run / "final").is_dir():
        raise UserError(f"--model: {folder} is a run that has not ended: it has no final/ yet")
    return str(run / "final")


def resolve_run_dir(folder):
    """As run_final, and prints when it takes RUN/final."""
    final = run_final(folder)
    if final != folder:
        processes.print0(f"  --model: {folder} is a run: taking {final}")
    return final


@functools.cache
def hub_is_online():
    """Whether the hub answers: asked once, where transformers would ask for minutes."""
    import huggingface_hub  # here: commands read this file's paths before anything slow is loaded

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        return True
    except Exception:  # of whatever library speaks HTTP
        return False


def from_pretrained(kind, folder, empty=False, **kwargs):
    """A model, processor or config. empty: a model built from its config; no weights are read."""
    folder = run_final(folder)
    if empty:
        return kind(from_pretrained(kind.config_class, folder))
    name = base_model(folder)
    check_model(name)
    away = not Path(name).is_dir() and not hub_is_online()
    try:
        return kind.from_pretrained(name, local_files_only=away, **kwargs)
    except (OSError, ValueError) as error:
        why = (
            "the hub does not answer, and it is not on this disk"
            if away
            else str(error).splitlines()[0]
        )
        raise FileNotFoundError(f"no model at {folder}: {why}") from None


def base_model(folder):
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


def resolve_start_model(folder, lora_rank, out, write_merged):
    """
    The folder that a run starts from. One that an adapter will name as its base is given from the
    root. A new adapter on top of an old one starts from OUT/base, the old one merged, because PEFT
    trains one adapter on one base; OUT/base/adapter is the old one, for save_model.
    """
    folder = resolve_run_dir(folder)
    if not lora_rank or not is_adapter(folder):
        is_base = lora_rank and Path(folder).is_dir()
        return str(Path(folder).resolve()) if is_base else folder
    from models.adapters import can_stack, copy_adapter

    base = Path(out).resolve() / "base"
    if processes.rank() == 0 and not has_checkpoint(Path(out)):
        shutil.rmtree(base, ignore_errors=True)  # of a start that failed, maybe of another model
    if processes.rank() == 0 and not base.exists():
        part = temp_dir(base)
        write_merged(folder, part)
        if can_stack(Path(folder)):
            copy_adapter(Path(folder), part / "adapter")
        part.rename(base)
    processes.all_gather_object(None)  # the others wait
    return str(base)


def save_model(policy, folder, processor):
    """
    Writes a standard folder that `from_pretrained` loads: the thinker and its processor, or a PEFT
    adapter. An adapter on top of an adapter becomes one of both, on the base of the first.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from models.adapters import stack  # here, as torch: commands ask this file for paths early

    # of an adapter its base is not gathered: it is not written
    kwargs = dict(ignore_frozen_params=hasattr(policy.model, "disable_adapter"))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, **kwargs)
    state = get_model_state_dict(policy, options=options)
    if processes.rank() == 0:
        state = {name.removeprefix("model."): value for name, value in state.items()}
        part = temp_dir(folder)
        policy.model.save_pretrained(part, state_dict=state)
        processor.save_pretrained(part)
        if is_adapter(part):
            previous = Path(base_model(part)) / "adapter"
            if previous.is_dir():  # of the stage before: see resolve_start_model
                stack(previous, part)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card, with a path of here
        default_file_modes(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
