"""
The arguments that every trainer takes, where each value comes from, and which numbers are allowed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from run.errors import UserError
from run.io import safe_streams


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and every default."""


PARSER = dict(formatter_class=Formatter, allow_abbrev=False)

# what may change when a run is resumed: where and how fast it computes, and what it tolerates
MAY_CHANGE = """
    out resume log save_every keep eval_every eval_samples eval_data cache_gb device micro_tokens allow_outside
    on_bad_step max_seq_ratio attn
""".split()

TRACKERS = ("tensorboard", "wandb")  # packages that --log may name: run/logs.py


def add_flags(parser):
    parser.epilog = """
Defaults are those for the --model, --data, --stage and --algo on the line; without --model they are
the toy's. Tags in [] are explained in README.md and docs/method.md.
"""
    parser.usage = "%(prog)s [--flag value ...]"
    flag = parser.add_argument_group("run").add_argument
    flag("--out", help="folder of the run; must be new, or --resume")
    flag("--steps", type=int, help="optimizer steps; 0 = one epoch over the data")
    flag("--seed", type=int, default=0, help="of the data order and every draw")
    flag("--resume", action="store_true", help="continue --out where it stopped")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    dtypes = ["auto", "float32", "bfloat16"]
    flag("--dtype", default="auto", choices=dtypes, help="to compute in; auto: bfloat16 on a GPU")
    kernels = ["auto", "flash", "fa3", "fa4", "sdpa"]
    flag(
        "--attn",
        default="auto",
        choices=kernels,
        help="kernel of attention; auto: flash, if it can",
    )
    flag("--save-every", type=int, default=50, help="steps between checkpoints; 0 = never")
    flag(
        "--keep",
        type=int,
        default=2,
        help="checkpoints kept; one may be cut off by a dying machine",
    )
    choices = ["stop", "skip"]
    flag("--on-bad-step", choices=choices, default="stop", help="a gradient that must not be used")
    told = f"metrics also to {' or '.join(TRACKERS)}; may be given twice"
    flag("--log", action="append", choices=TRACKERS, default=[], help=told)
    flag = parser.add_argument_group("model and data").add_argument
    flag("--model", help="folder or hub id (default: the toy, written to toy/model)")
    flag("--data", help="JSONL of rows (default: the toy's for this stage)")
    return flag


def parse(parser, argv, overrides):
    """
    Parses twice, so that defaults which depend on other flags still lose to a typed one. With
    --resume, what the run began with stands for what is not typed again.

    overrides   callable(args of the first pass) -> pairs of (name, {flag: value}), later ones win
    returns     args, {flag: where its value comes from: "typed", the name of an override, or None}
    """
    source = {}
    words = sys.argv[1:] if argv is None else argv
    first = [word for word in words if word not in ("-h", "--help")]  # help: the final defaults
    first = parser.parse_known_args(first)[0]
    for name, values in [*overrides(first), ("run.json", resumed_arguments(first))]:
        parser.set_defaults(**values)
        source |= {key: name for key in values}
    args = parser.parse_args(argv)
    if not (args.out or "").strip():
        raise UserError("--out is empty: give a folder")
    if broken := [k for k, v in vars(args).items() if isinstance(v, str) and not encodable(v)]:
        told = f"--{broken[0].replace('_', '-')} has letters that this terminal's encoding lacks"
        raise UserError(f"{told}: set LC_ALL=C.UTF-8, or PYTHONUTF8=1")
    return args, {
        key: source.get(key) if value == parser.get_default(key) else "typed"
        for key, value in vars(args).items()
    }


def answer_early(parse_args):
    """
    Parses the flags of a command and looks for its --model and --data before it loads torch and
    transformers, which takes seconds: --help and a user's mistake are answered at once. main() parses
    the flags again.
    """
    try:
        with safe_streams():
            parsed = parse_args()
            args = parsed[0] if isinstance(parsed, tuple) else parsed
            check_inputs(getattr(args, "model", None), getattr(args, "data", None))
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def check_inputs(model, data):
    """
    model    folder, a run's folder, hub name or None
    data     a file, a list of them or None
    raises   UserError, FileNotFoundError   one of them does not exist
    """
    if model is not None:
        check_model(model)
    files = [data] if isinstance(data, str) else data or []
    for file in files:
        if not Path(file).is_file():
            problem = "a folder, no data file" if Path(file).is_dir() else "no data file"
            raise UserError(f"{problem} at {file}: give a JSONL file")


def check_model(name):
    """
    raises   FileNotFoundError   neither a folder nor a name that a model on the hub can have. Asking
                                 the hub for a mistyped path takes minutes where there is no network.
    """
    is_hub_name = name.count("/") == 1 and not Path(name).parent.is_dir()
    if not Path(name).is_dir() and not is_hub_name:
        reason = f"there is no folder {name}, and a model on the hub is named OWNER/NAME"
        raise FileNotFoundError(f"no model at {name}: {reason}")


def encodable(text):
    """Whether a text is whole: what an ASCII terminal could not tell Python comes as half letters."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def resumed_arguments(args):
    """-> {flag: value} of the run in --out that is to be resumed, if one is."""
    about = read_run_json(args.out or "") if args.resume else {}
    kept = about["arguments"] if about.get("script") == Path(sys.argv[0]).name else {}
    return {k: v for k, v in kept.items() if k in vars(args).keys() - {"out", "resume", "device"}}


def read_run_json(out):
    """What OUT/run.json holds; {} before there is one."""
    path = Path(out) / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


# of the numbers that both trainers take: the least; or the least and the most
BOUNDS = dict(
    seed=0,
    steps=0,
    keep=1,
    save_every=0,
    cache_gb=0,
    lr=0,
    micro_tokens=1,
    lora_rank=0,
)


def check_bounds(args, **bounds):
    for name, bound in bounds.items():
        least, most = bound if isinstance(bound, tuple) else (bound, math.inf)
        value = getattr(args, name)
        if value is not None and not (least <= value <= most and value < math.inf):
            told = f"at least {least}" if most == math.inf else f"a number from {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {value}: {told} is needed")


def parse_weights(flag, text, names):
    """'format=.5,acc=.5' -> {part: weight}, of the parts called `names`."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if name not in names or not math.isfinite(weights[name]):
            told = f"{part!r} is no part of the reward ({', '.join(names)}) with its weight"
            raise UserError(f"{flag}: {told}: write it as format=.5,acc=.5")
    return weights
