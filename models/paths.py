"""
Model folders: on disk or on the hub, whole or a PEFT adapter; where a run starts, what it saves.
"""

import functools
import json
import shutil
from pathlib import Path

from run import processes
from run.arguments import check_model
from run.errors import UserError
from run.io import default_file_modes, temp_dir

# ---- from the command line to a folder ---------------------------------------------------------


def run_final(folder):
    """RUN/final if `folder` is that of a run; any other folder or hub id as it is."""
    run = Path(folder)
    is_run = (run / "run.json").is_file() and not (run / "config.json").exists()
    if not is_run:
        return folder
    final = run / "final"
    if not final.is_dir():
        raise UserError(f"--model: {folder} is a run that has not ended: it has no final/ yet")
    return str(final)


def resolve_run_dir(folder):
    """As run_final, and prints a line if it takes RUN/final."""
    final = run_final(folder)
    if final != folder:
        processes.print0(f"  --model: {folder} is a run: taking {final}")
    return final


def resolve_start_model(folder, lora_rank):
    """The model that a run starts from; with LoRA as an absolute path, because the adapter names it."""
    folder = resolve_run_dir(folder)
    if lora_rank and Path(folder).is_dir():
        return str(Path(folder).resolve())
    return folder


# ---- folders -----------------------------------------------------------------------------------


def is_adapter(folder):
    return (Path(folder) / "adapter_config.json").is_file()


def base_model(folder):
    """The folder or hub id with the full weights and the processor: an adapter's base, or itself."""
    if not is_adapter(folder):
        return str(folder)
    return read_config(Path(folder) / "adapter_config.json")["base_model_name_or_path"]


def read_config(path):
    """A JSON file of a model's folder."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): repair it, or copy the model again"
        ) from None


@functools.cache
def hub_is_online():
    """Whether the hub answers. Asked once, for 10 s at most: transformers would try for minutes."""
    import huggingface_hub  # here: commands read this file's paths before anything slow is loaded

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        return True
    except Exception:  # its class depends on the HTTP library
        return False


def from_pretrained(kind, folder, empty=False, **kwargs):
    """
    A model, processor or config.

    kind     class of transformers with `from_pretrained`
    folder   folder or hub id; for an adapter its base model is loaded, for a run that of its final/
    empty    build a model from its config, without reading weights
    raises   FileNotFoundError    no such folder, and no such model on the hub
    """
    folder = run_final(folder)
    if empty:
        return kind(from_pretrained(kind.config_class, folder))
    name = base_model(folder)
    check_model(name)
    is_offline = not Path(name).is_dir() and not hub_is_online()
    try:
        return kind.from_pretrained(name, local_files_only=is_offline, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if is_offline:
            reason = "the hub does not answer, and this disk has no copy of the model"
        raise FileNotFoundError(f"no model at {folder}: {reason}") from None


def save_model(policy, folder, processor):
    """Writes a standard folder that `from_pretrained` loads: thinker or PEFT adapter, and processor."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(
        full_state_dict=True,
        cpu_offload=True,
        ignore_frozen_params=policy.has_adapter,  # an adapter's base is not written, so not gathered
    )
    state = get_model_state_dict(policy, options=options)
    for name, parameter in policy.named_parameters():
        # an adapter of towers that trained in an earlier stage; frozen towers are whole on every rank
        if ".lora_" in name and ".default." in name and not parameter.requires_grad:
            state[name] = parameter.detach().cpu()
    if processes.rank() == 0:
        state = {name.removeprefix("model."): value for name, value in state.items()}
        temporary = temp_dir(folder)
        # only the trained adapter, not the frozen copy that is the reference policy
        adapters = dict(selected_adapters=["default"]) if policy.has_adapter else {}
        policy.model.save_pretrained(temporary, state_dict=state, **adapters)
        processor.save_pretrained(temporary)
        # PEFT's empty model card, with a path of this machine
        (temporary / "README.md").unlink(missing_ok=True)
        default_file_modes(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    # NCCL's shutdown is collective and has a timeout: no rank leaves while rank 0 still writes
    processes.all_gather_object(None)
