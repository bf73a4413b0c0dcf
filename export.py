"""
Writes a trained model in a form that other tools load.

    python export.py runs/stage3 exported                               # a thinker, adapter merged
    python export.py runs/stage3 exported --full Qwen/Qwen2.5-Omni-7B   # a whole Omni checkpoint

Without --full, OUT is the thinker alone, which transformers' thinker class loads. With --full, OUT is a
copy of the whole checkpoint BASE in which the thinker's weights are the trained ones. Talker, vocoder,
configuration and processor files are those of BASE, byte for byte.

The weights keep the number format that they had before training, mostly bfloat16. It may round small
updates away: the command prints how much of the update survives.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
from pathlib import Path

from models.paths import run_final
from run import arguments
from run.errors import UserError


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("model", metavar="RUN", help="folder of a run, a thinker or an adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--full",
        metavar="BASE",
        help="write a whole Omni checkpoint: a copy of this one (folder or hub id) with the trained thinker",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="number format of the thinker's weights; auto: that before training",
    )
    args = parser.parse_args(argv)
    arguments.check_model(args.model)
    if args.full:
        arguments.check_model(args.full)
    if Path(args.out).exists():
        raise UserError(f"{args.out} already exists: choose another OUT")
    run_final(args.model)  # an unfinished run has no final/
    return args


if __name__ == "__main__":
    arguments.answer_early(parse_args)

import contextlib
import json
import shutil
import tempfile
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data.clips import BadRow
from models.inputs import BACKBONES, config_of
from models.loading import load_thinker
from models.paths import base_model, from_pretrained, hub_is_online, is_adapter, resolve_run_dir
from models.sharding import cast_params
from run.io import temp_dir, write_text
from run.launch import run_main

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
THINKER = "thinker."  # what the names of a whole checkpoint's thinker begin with
# a share below this is reported with the remedy
ENOUGH_SURVIVES = 0.99


# ---- what was trained --------------------------------------------------------------------------


class Trained(NamedTuple):
    thinker: object  # in float32, adapter merged
    backbone: object  # of models.inputs.BACKBONES
    before: dict  # name -> weight before training, of those that may have changed; {}: not known
    dtype: torch.dtype  # of the weights before training


def read_trained(folder, base):
    """
    folder   a thinker or an adapter
    base     folder of the whole checkpoint that it is to go into, or None
    """
    backbone = BACKBONES[config_of(folder).model_type]
    thinker = load_thinker(folder, torch.float32)  # of an adapter: its base
    if is_adapter(folder):
        thinker, before = merge_adapter(thinker, folder)
        return Trained(thinker, backbone, before, weights_dtype(base or base_model(folder)))

    start = base or start_of_run(folder)
    if start is None:
        return Trained(thinker, backbone, {}, weights_dtype(folder))
    if config_of(start).model_type not in backbone.MODEL_TYPES:
        raise UserError(f"{start} is a model of another kind than {folder}")
    before = dict(load_thinker(start, torch.float32).named_parameters())
    check_shapes(before, dict(thinker.named_parameters()), start)
    return Trained(thinker, backbone, before, weights_dtype(start))


def merge_adapter(thinker, folder):
    """-> the thinker with the adapter in its weights, {name: weight before} of what it changes"""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    peft = PeftModel.from_pretrained(thinker, folder)
    before = {}
    for name, module in peft.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            name = name.replace(".base_layer", "")  # experts have a layer around a layer
            base_layer = module.get_base_layer()
            for part, weight in base_layer.named_parameters(recurse=False):
                before[f"{name}.{part}"] = weight.detach().clone()
    return peft.merge_and_unload(), before


def start_of_run(folder):
    """The folder that the run around a final/ started from, if it is known and still there."""
    path = Path(folder).resolve().parent / "run.json"
    if not path.is_file():
        return None
    model = json.loads(path.read_text())["arguments"].get("model")
    return model if model and Path(model).is_dir() else None


def check_shapes(base, ours, base_name):
    """raises UserError   two {name: tensor} are not of one architecture and size"""
    for name in base.keys() | ours.keys():
        if name not in base or name not in ours:
            missing_in = base_name if name not in base else "the trained model"
            raise UserError(f"{missing_in} has no weight {name}: give the BASE that was trained")
        if base[name].shape != ours[name].shape:
            shapes = f"{tuple(base[name].shape)} and {tuple(ours[name].shape)}"
            raise UserError(f"{base_name} has other shapes: {name} is {shapes}")


# ---- rounding ----------------------------------------------------------------------------------


@torch.no_grad()
def survival(before, after, dtype):
    """
    How much of an update is left when the weights are rounded to dtype.

    before, after  {name: weight}, float32
    returns        share: of the update's length, what the rounded weights moved in its direction;
                   noise: what they moved in others, relative to the update; None, None: no update
    """
    moved_update = update_update = moved_moved = 0.0
    for name, weight in before.items():
        update = after[name].double() - weight.double()
        moved = after[name].to(dtype).double() - weight.to(dtype).double()
        moved_update += (moved * update).sum().item()
        update_update += (update * update).sum().item()
        moved_moved += (moved * moved).sum().item()
    if update_update == 0:
        return None, None
    share = moved_update / update_update
    noise = max(moved_moved / update_update - share**2, 0) ** 0.5
    return share, noise


def print_survival(trained, dtype):
    name = str(dtype).removeprefix("torch.")
    if not trained.before:
        print(f"weights in {name}; the model before training is not known: survival not measured")
        return
    share, noise = survival(trained.before, dict(trained.thinker.named_parameters()), dtype)
    if share is None:
        print("the weights are those before training: nothing was learnt")
        return
    print(f"weights in {name}: {share:.1%} of what was learnt survives, with noise of {noise:.1%}")
    if share < ENOUGH_SURVIVES:
        print("--dtype float32 keeps all of what was learnt")


# ---- files of weights --------------------------------------------------------------------------


def weight_files(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no safetensors files")
    return files


def weights_dtype(folder):
    """The dtype of the thinker's weights in a folder: that of its first matrix."""
    for file in weight_files(local_folder(folder)):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            is_whole = any(name.startswith(THINKER) for name in names)
            for name in names:
                part = tensors.get_slice(name)
                if len(part.get_shape()) == 2 and name.startswith(THINKER if is_whole else ""):
                    return DTYPES[part.get_dtype()]
    raise UserError(f"{folder} has no weights of a thinker")


def local_folder(name):
    """A folder as it is; a hub id's files on this disk, downloaded if they are not there."""
    if Path(name).is_dir():
        return Path(name)
    is_offline = not hub_is_online()
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=is_offline))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if is_offline:
            reason = "the hub does not answer, and this disk has no copy of the model"
        raise FileNotFoundError(f"no model at {name}: {reason}") from None


# ---- a thinker ---------------------------------------------------------------------------------


def write_thinker(trained, folder, dtype, out):
    """Writes thinker and processor to the folder `out`."""
    thinker = trained.thinker
    cast_params(thinker.parameters(), dtype)
    # two flags for one thing: some readers go by the text model's, whose default is True
    thinker.config.text_config.tie_word_embeddings = thinker.config.tie_word_embeddings
    thinker.save_pretrained(out)
    from_pretrained(trained.backbone.Processor, folder).save_pretrained(out)


# ---- a whole checkpoint ------------------------------------------------------------------------


class ThinkerFiles:
    """The tensors of a thinker's folder by a name that all versions of transformers share."""

    def __init__(self, folder):
        self.places = {}  # shared name -> file, name in it
        self.used = set()
        for file in weight_files(folder):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    self.places[shared_name(name)] = file, name

    def take(self, name, base_shape, base_name):
        """The tensor for a name of a whole checkpoint."""
        shared = shared_name(name)
        if shared not in self.places:
            raise UserError(f"{base_name} has {name}, the trained thinker does not: another BASE")
        file, own_name = self.places[shared]
        with safe_open(file, "pt") as tensors:
            tensor = tensors.get_tensor(own_name)
        if list(tensor.shape) != list(base_shape):
            shapes = f"{tuple(base_shape)}, the trained thinker's {tuple(tensor.shape)}"
            raise UserError(f"{base_name} has other shapes: {name} is {shapes}")
        self.used.add(shared)
        return tensor

    def unused(self):
        return sorted(self.places.keys() - self.used)


def shared_name(name):
    """thinker.model.layers.0 and model.language_model.layers.0 -> layers.0"""
    name = name.removeprefix(THINKER).removeprefix("model.").removeprefix("language_model.")
    return name.removeprefix("model.")


def write_whole(thinker_folder, base, out, dtype):
    """
    Writes a copy of the whole checkpoint `base` with the thinker of another folder.

    dtype    of the thinker's tensors; None: of each that of the base's
    """
    thinker = ThinkerFiles(thinker_folder)
    num_replaced = 0
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            num_replaced += write_shard(path, out / relative, thinker, dtype)
        else:
            shutil.copyfile(path, out / relative)
    if not num_replaced:
        raise UserError(f"--full {base}: no weight is named {THINKER}...: give a whole checkpoint")
    unused = thinker.unused()
    if unused:
        raise UserError(f"--full {base} has no place for {len(unused)} weights, as {unused[0]}")
    if dtype:
        tell_dtype(out, dtype)


def write_shard(source, target, thinker, dtype):
    """Copies a file of weights; those of the thinker are the trained ones -> how many there are."""
    with safe_open(source, "pt") as shard:
        names = list(shard.keys())
        num_thinker = sum(name.startswith(THINKER) for name in names)
        if not num_thinker:
            shutil.copyfile(source, target)
            return 0
        tensors = {}
        for name in names:
            tensors[name] = shard.get_tensor(name)
            if name.startswith(THINKER):
                new = thinker.take(name, tensors[name].shape, source.parent)
                tensors[name] = new.to(dtype or tensors[name].dtype).contiguous()
        save_file(tensors, target, metadata=shard.metadata())
    return num_thinker


def tell_dtype(out, dtype):
    """Names another number format in the copies of the configuration and of the index."""
    name = str(dtype).removeprefix("torch.")
    config = json.loads((out / "config.json").read_text())
    for part in (config, config.get("thinker_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    index_path = out / "model.safetensors.index.json"
    if index_path.is_file():
        index = json.loads(index_path.read_text())
        sizes = [file.stat().st_size for file in weight_files(out)]
        index.get("metadata", {})["total_size"] = sum(sizes)
        write_text(index_path, json.dumps(index, indent=2) + "\n")


# ---- the run -----------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out):
    """A folder to write to, which becomes OUT at the end; after an error nothing is left of it."""
    part = temp_dir(out)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main():
    args = parse_args()
    out = Path(args.out)
    folder = resolve_run_dir(args.model)
    base = local_folder(args.full) if args.full else None
    if base and config_of(folder).model_type == "ola":
        reason = "Ola is published in a layout that only its own code loads"
        raise UserError(f"--full: {reason}, and it is not written: leave --full out")

    trained = read_trained(folder, base)
    dtype = trained.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    print_survival(trained, dtype)

    with new_folder(out) as part:
        if base is None:
            write_thinker(trained, folder, dtype, part)
        else:
            with tempfile.TemporaryDirectory(dir=part.parent) as thinker_folder:
                # in float32, so that each weight is rounded once
                write_thinker(trained, folder, torch.float32, thinker_folder)
                write_whole(thinker_folder, base, part, None if args.dtype == "auto" else dtype)
    print(f"wrote {out}: {'a whole checkpoint' if base else 'a thinker'}")


if __name__ == "__main__":
    run_main(main, BadRow)
