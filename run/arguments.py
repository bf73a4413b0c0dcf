"""
The flags that every trainer takes, where each value comes from, and which numbers are allowed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from run.errors import UserError
from run.io import file_problem, safe_streams


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written; after each help text the default, if that says something."""

    def _get_help_string(self, action):
        default = action.default  # 0 is a default to show, False is not
        is_silent = default is None or default is False or default in ([], argparse.SUPPRESS)
        if is_silent or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


PARSER = dict(formatter_class=Formatter, allow_abbrev=False)

TRACKERS = ("tensorboard", "wandb")  # packages that --log may name: run/logs.py

# ---- the flags ---------------------------------------------------------------------------------


def add_device_flags(flag):
    """Where and in which number format a command computes.  flag: add_argument of a group"""
    flag(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: a GPU if there is one",
    )
    flag(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="number format of the computation; auto: bfloat16 on a GPU, else float32",
    )


def add_flags(parser):
    """
    Adds the flags of a training command.

    returns   add_argument of the last group, "model and data"
    """
    parser.usage = "%(prog)s [--flag value ...]"
    parser.epilog = """
The defaults shown depend on the other flags of this command line; without --model they are the toy's.
Tags in [] are explained in README.md and docs/method.md.
"""
    kernels = ["auto", "flash", "fa3", "fa4", "sdpa"]
    hidden = argparse.SUPPRESS
    # fmt: off

    flag = parser.add_argument_group("run").add_argument
    flag("--out", help="folder of the run; it must be new, except with --resume")
    flag("--steps", type=int, help="optimizer steps; 0 = one epoch over the data")
    flag("--seed", type=int, default=0, help="random seed")
    flag("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add_device_flags(flag)
    flag("--attn", default="auto", choices=kernels, help="attention kernel; auto: flash where it works")
    flag("--save-every", type=int, default=50, help="steps between checkpoints; 0 = never")
    flag("--keep-checkpoints", type=int, default=2, metavar="N", help="keep the newest N checkpoints; a crash may damage the last one")
    flag("--keep", type=int, dest="keep_checkpoints", default=hidden, help=hidden)
    flag("--on-bad-step", choices=["stop", "skip"], default="stop", help="what to do if a step's loss or gradient is not finite, or in RL a ratio is too large")
    flag("--log", action="append", choices=TRACKERS, default=[], help=f"also log to {' or '.join(TRACKERS)}; may be given twice")

    flag = parser.add_argument_group("model and data").add_argument
    flag("--model", help="folder of a model or a run, or hub id (default: the toy, written to toy/model)")
    flag("--data", help="JSONL of rows (default: the toy's rows for this stage)")

    # fmt: on
    return flag


# ---- where each value comes from ---------------------------------------------------------------


def parse(parser, argv, overrides):
    """
    Parses twice, so that defaults which depend on other flags still lose to a typed flag. With
    --resume, the arguments that the run began with are the defaults.

    overrides   callable(args of the first pass) -> pairs (name, {flag: value}); later ones win
    returns     args, {flag: where its value comes from: "typed", the name of an override, "run.json"
                or None for the parser's own default}
    """
    words = sys.argv[1:] if argv is None else argv
    without_help = [word for word in words if word not in ("-h", "--help")]
    first, _ = parser.parse_known_args(without_help)
    source = dict.fromkeys(vars(first))
    for name, values in [*overrides(first), ("run.json", resumed_arguments(first))]:
        parser.set_defaults(**values)
        source |= dict.fromkeys(values, name)
    args = parser.parse_args(argv)
    source |= dict.fromkeys(typed_flags(parser, words, vars(args)), "typed")

    if not (args.out or "").strip():
        raise UserError("--out is empty: give a folder")
    for name, value in vars(args).items():
        if isinstance(value, str) and not is_encodable(value):
            raise UserError(
                f"{as_flag(name)} has letters that this terminal's encoding lacks: set "
                "LC_ALL=C.UTF-8, or PYTHONUTF8=1"
            )
    return args, source


def typed_flags(parser, words, names):
    """-> the names of the flags on the command line, also of those typed with their default value."""
    untyped = []  # argparse fills in only what is absent; a list, as --log appends to a copy of it
    namespace = argparse.Namespace(**dict.fromkeys(names, untyped))
    parser.parse_known_args(words, namespace)
    return [name for name, value in vars(namespace).items() if value is not untyped]


def resumed_arguments(args):
    """-> {flag: value} of the run in --out that --resume continues; {} without --resume."""
    about = read_run_json(args.out or "") if args.resume else {}
    if about.get("script") != Path(sys.argv[0]).name:
        return {}
    names = vars(args).keys() - {"out", "resume", "device"}
    return {name: value for name, value in about["arguments"].items() if name in names}


# flags that runs of earlier versions have by other names
RENAMED = dict(keep="keep_checkpoints", hint_kl="hint_kl_threshold", max_ratio="max_seq_ratio")


def read_run_json(out):
    """What OUT/run.json holds, flags by their present names; {} before there is one."""
    path = Path(out) / "run.json"
    if not path.is_file():
        return {}
    about = json.loads(path.read_text())
    if "arguments" in about:
        values = about["arguments"].items()
        about["arguments"] = {RENAMED.get(name, name): value for name, value in values}
    return about


def as_flag(name):
    """max_frames -> --max-frames"""
    return "--" + name.replace("_", "-")


def is_encodable(text):
    """False for text with halves of letters, which an ASCII terminal gives to Python."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


# ---- mistakes ----------------------------------------------------------------------------------


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
            return parsed
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
        problem = file_problem(file)
        if problem:
            raise UserError(f"{problem}: give a JSONL file")


def check_model(name):
    """
    raises   FileNotFoundError   neither a folder nor a name that a model on the hub can have. Asking
                                 the hub for a mistyped path takes minutes where there is no network.
    """
    is_hub_name = name.count("/") == 1 and not Path(name).parent.is_dir()
    if name.startswith("toy/") and not Path(name).is_dir():
        raise FileNotFoundError(
            f"no model at {name}: `python toy.py` writes the toy's model and rows"
        )
    if not Path(name).is_dir() and not is_hub_name:
        reason = f"there is no folder {name}, and a model on the hub is named OWNER/NAME"
        raise FileNotFoundError(f"no model at {name}: {reason}")


# bounds of the numbers that both trainers take: the least, or (least, most)
BOUNDS = dict(
    seed=0,
    steps=0,
    keep_checkpoints=1,
    save_every=0,
    cache_gb=0,
    lr=0,
    micro_tokens=1,
    lora_rank=0,
)


def check_bounds(args, **bounds):
    """raises   UserError   a number of `args` that is out of its bounds; None is allowed"""
    for name, bound in bounds.items():
        least, most = bound if isinstance(bound, tuple) else (bound, math.inf)
        value = getattr(args, name)
        if value is None or (least <= value <= most and value < math.inf):
            continue
        wanted = f"at least {least}" if most == math.inf else f"a number from {least} to {most}"
        raise UserError(f"{as_flag(name)} {value}: give {wanted}")


def parse_weights(flag, text, names):
    """'format=.5,acc=.5' -> {part: weight}; `names` are the parts there are."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if name not in names or not math.isfinite(weights[name]):
            raise UserError(
                f"{flag}: {part!r} is not a part of the reward ({', '.join(names)}) with its weight: "
                "write it as format=.5,acc=.5"
            )
    return weights
