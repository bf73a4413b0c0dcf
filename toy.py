"""
The built-in data and model: mp4 clips with known answers, and a tiny Qwen2.5-Omni to train on them.

A clip lasts N seconds. In each second nothing, one or two coloured shapes are shown at the left,
center or right, while a high tone, a low tone or silence is heard (data/toy_clips.py). Every question
has one answer that follows from the clip (data/toy_rows.py). The model has the architecture of the 7B
one at 2.1 M parameters and is loaded by the same `from_pretrained` (models/toy_model.py). Its weights
(`toy_stage0.safetensors`) are the result of stage 0:

    python toy.py                  # write toy/model and the rows and clips of every stage
    python toy.py --out DIR --random-init --stages 0 --num-train 8000    # to rebuild stage 0 ...
    python train_sft.py --model DIR/model --data DIR/stage0/train.jsonl ...   # ... see experiments/results/notes.md
    python toy.py --backbone ola --out DIR         # a tiny Ola, with random weights: stage 0 first
    python toy.py --backbone qwen3 --out DIR       # a tiny Qwen3-Omni, likewise
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
from pathlib import Path

from models.paths import base_model, read_config, run_final
from run import processes
from run.arguments import PARSER, answer_early, check_bounds
from run.errors import UserError
from run.io import file_lock
from run.launch import run_main

# What writes clips and models loads torch and transformers: it is imported where it is needed, as
# the other commands ask this file which defaults they have before they load anything.

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "toy_stage0.safetensors"

# (training rows, held-out rows) of each stage. In RL a prompt comes back every 8 steps: with more rows
# no prompt would stay Hard long enough to get a hint.
NUM_ROWS = {0: (2048, 128), 1: (128, 128), 2: (128, 128), 3: (128, 128)}

# What the toy changes of the paper's 7B settings; a typed flag always wins.
OVERRIDES = {
    "sft": dict(lr=3e-4, steps=40, batch_size=16, lora_rank=0, train_towers=True),
    "rl": dict(
        lr=1e-4,
        steps=90,
        prompts_per_step=16,
        max_new_tokens=80,
        lora_rank=0,
        buffer_size=2000,
        eval_every=30,
    ),
    # 64: a multiple of the 32 pixels that Ola needs
    "media": dict(max_frames=16, max_pixels=64 * 64, max_audio_seconds=8.0),
}


def is_toy(model):
    """True for None (the default), the toy's folder, and every model or run trained from it."""
    if model is None:
        return True
    config = Path(base_model(run_final(model))) / "config.json"
    return config.is_file() and read_config(config).get("avatar_toy", False)


def make_model(folder, weights=WEIGHTS, backbone="qwen"):
    """Writes the model's folder unless it exists; another process that needs it waits."""
    if folder.exists():
        return
    from models.toy_model import write_model

    with file_lock(folder.parent):
        if not folder.exists():  # else another process wrote it meanwhile
            write_model(folder, weights, backbone)


def make_rows(folder, stage, num_train, num_test, seed=0):
    """Writes a stage's rows and clips unless they exist; another process that needs them waits."""
    if folder.exists():
        return
    from data.toy_rows import write_rows

    with file_lock(folder.parent):
        if not folder.exists():
            write_rows(folder, stage, num_train, num_test, seed)


def default_model(model, root=HERE / "toy"):
    """Writes the toy's model where --model is not given (rank 0; the others wait) -> its folder"""
    if processes.rank() == 0 and not model:
        make_model(root / "model")
    processes.all_gather_object(None)  # a barrier
    return root / "model"


def write_defaults(stage, model, data, root=HERE / "toy"):
    """
    Writes the toy's model and rows where --model or --data is not given (rank 0; the others wait).

    returns  (model folder, training rows, held-out rows): their paths, also of those not written
    """
    folder = root / f"stage{stage}"
    num_train, num_test = NUM_ROWS[stage]
    model_folder = default_model(model, root=root)
    if processes.rank() == 0 and not data:
        make_rows(folder, stage, num_train, num_test)
    processes.all_gather_object(None)  # a barrier
    if not data:
        count = (folder / "train.jsonl").read_bytes().count(b"\n")
        if count != num_train:
            problem = f"{folder} has {count} training rows instead of {num_train}"
            processes.print0(f"  {problem}: remove the folder to have it written again")
    return model_folder, folder / "train.jsonl", folder / "test.jsonl"


def judge(row, steps):
    """
    Stage 3's judge for the toy: is each reasoning step true of the clip?           [R.judge]

    row      the prompt's row, with `events`; what follows `note_after` in a step, if the row has
             this field, is a note of the writer and is not judged
    steps    list of str        the lines of the reasoning
    returns  list of float      1 if the step names a second and says what happens in it, else 0
    raises   UserError          the row has no events: it is not the toy's

    It sees the reasoning and the clip's events, never the answer.
    """
    if "events" not in row:
        problem = f"row {row['prompt_id']} has no events"
        raise UserError(f"{problem}: --judge toy works for the toy's rows only, give a URL")
    events = row["events"]
    scores = []
    for step in steps:
        number, _, text = step.partition(":")
        if "note_after" in row:
            text, _, _ = text.partition(row["note_after"])
        number = number.strip()
        names_a_second = number.isdecimal() and 1 <= int(number) <= len(events)
        is_true = names_a_second and text.strip() == events[int(number) - 1]
        scores.append(float(is_true))
    return scores


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    flag = parser.add_argument
    flag(
        "--out",
        default=str(HERE / "toy"),
        help="folder to write (default: toy/ of this repository)",
    )
    flag("--seed", type=int, default=0, help="random seed of the clips and questions")
    flag(
        "--stages",
        type=int,
        nargs="*",
        default=[0, 1, 2, 3],
        choices=[0, 1, 2, 3],
        help="stages to write rows and clips for (default: all); without a number, only the model",
    )
    flag(
        "--num-train", type=int, help="training rows of each stage (default: 2048 for 0, else 128)"
    )
    flag(
        "--backbone",
        choices=["qwen", "qwen3", "ola"],
        default="qwen",
        help="architecture of the model: Qwen2.5-Omni, Qwen3-Omni or Ola",
    )
    flag("--random-init", action="store_true", help="random weights instead of the shipped ones")
    flag(
        "--ship", metavar="FOLDER", help=f"do nothing but pack a trained folder into {WEIGHTS.name}"
    )
    args = parser.parse_args(argv)
    check_bounds(args, seed=0, num_train=1)
    return args


def main():
    args = parse_args()
    if args.ship:
        from models.toy_model import ship_weights

        ship_weights(args.ship, WEIGHTS)
        return
    out = Path(args.out)
    make_model(out / "model", None if args.random_init else WEIGHTS, args.backbone)
    for stage in args.stages:
        num_train, num_test = NUM_ROWS[stage]
        make_rows(out / f"stage{stage}", stage, args.num_train or num_train, num_test, args.seed)
    print(f"{out}: model, " + ", ".join(f"stage{stage}" for stage in args.stages))


if __name__ == "__main__":
    answer_early(parse_args)
    run_main(main)
