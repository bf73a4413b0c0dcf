"""
Rows and starting weights that the experiments take beside the toy's own; each is made once, in
runs/experiments, by the first run that names it.

    hasty    a model that answers without looking: nearly all its groups are all wrong
    hard     64 rows of stage 3. A fifth of them that model never solves: 0 of 256 completions; with
             their hint it does best. never.jsonl holds only these
    long     a model for clips of 12 to 16 seconds, whose reasonings have about 150 tokens
    plan     its rows whose reasoning is decided in its first line and in its last
    middle   rows whose reasoning is decided in its middle, and a start that goes on from "long" and
             decides right in two thirds of them: from a tenth, as "long" does, nothing is learnt
    busy     "plan" with up to two shapes a second and two counts a line, about 250 tokens, and a
             start that goes on from "long"
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import torch
from tqdm import tqdm

from data.media_flags import media_config_from
from data.rows import answer_spec, normalize_row
from data.toy_clips import COLORS, describe, random_seconds, write_clip
from models.inputs import InputBuilder
from models.loading import open_policies
from models.rollout import rollout
from run import processes
from run.errors import UserError
from run.io import REPOSITORY, file_lock, write_text

RUNS = REPOSITORY / "runs" / "experiments"
STAGE3, LONG = REPOSITORY / "toy/stage3", RUNS / "long"  # where rows lie beside their clips
SECONDS = (12, 16)  # of a long clip, at least and at most
NEVER, ROWS = 13, 64  # hard rows that are never solved, and all
SAMPLES = 256  # completions in which a row that is never solved is not solved


def python(*words, log):
    """Runs a script of ours on one core; its output goes to a file, whose tail explains a failure."""
    command, env = [sys.executable, *map(str, words)], os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=env
        )
    if done.returncode:
        tail = log.read_text()[-600:]
        raise UserError(f"{words[0]} ended with {done.returncode}, see {log}:\n{tail}")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def make(name):
    """Makes a task, if it is not there."""
    write, made = MAKE[name]
    with file_lock(RUNS / "locks" / name):  # another experiment may need the same
        if not made.exists():
            write()


# ---- a start that hardly ever looks ------------------------------------------------------------


def hasty():
    """Stage-0 rows whose reasoning is hasty, and every twentieth of the others: 40 steps of SFT."""
    log, out = RUNS / "hasty.log", RUNS / "hasty"
    shutil.rmtree(out, ignore_errors=True)
    python("toy.py", "--stages", 0, log=log)
    rows = read_lines(REPOSITORY / "toy/stage0/train.jsonl")
    is_hasty = lambda row: row["reasoning"].startswith("it seems")
    kinds = [
        [row for row in rows if is_hasty(row)],
        [row for row in rows if row["reasoning"].startswith("1:") and "hint" not in row][::20],
        [row for row in rows if "hint" in row][::20],
    ]
    data = REPOSITORY / "toy/stage0/hasty.jsonl"  # beside the clips that its rows name
    write_lines(data, [row for kind in kinds for row in kind])
    flags = "--steps 40 --lr 2e-4 --save-every 0".split()
    python("train_sft.py", "--data", data, "--out", out, *flags, log=log)


# ---- rows that are never solved without a hint -------------------------------------------------


def hard():
    """
    Stage-3 rows, sampled from the hasty start: of those that it never solves the NEVER that a hint helps
    most, and others. Where the hint does not help either, no schedule of hints could be told from another.
    """
    make("hasty")
    python("toy.py", "--stages", 3, log=RUNS / "hard.log")
    rows = read_lines(STAGE3 / "train.jsonl") + read_lines(STAGE3 / "test.jsonl")
    solved = solved_counts(RUNS / "hasty/final", STAGE3, rows, SAMPLES)
    candidates = [row for row, count in zip(rows, solved) if count == 0]
    helped = solved_counts(RUNS / "hasty/final", STAGE3, candidates, SAMPLES, with_hint=True)
    best = sorted(range(len(candidates)), key=lambda i: -helped[i])[:NEVER]
    if len(best) < NEVER or not helped[best[-1]]:
        raise UserError(f"fewer than {NEVER} rows are solved with a hint and never without")
    never = [candidates[i] for i in best]
    others = [row for row, count in zip(rows, solved) if count][: ROWS - NEVER]
    mixed = [(never + others)[i] for i in np.random.default_rng(0).permutation(ROWS)]
    write_lines(STAGE3 / "never.jsonl", never)
    write_lines(STAGE3 / "hard.jsonl", mixed)
    told = dict(
        candidates=len(candidates), of=len(rows), with_hint=sorted(helped), plain=sorted(solved)
    )
    write_text(RUNS / "hard.json", json.dumps(told))


def solved_counts(start, folder, rows, samples, with_hint=False):
    """-> of each row, how many of `samples` completions at temperature 1 are right."""
    import rewards
    from train_rl import parse_args

    args, _, _ = parse_args(["--stage", "3", "--model", str(start)])
    build = InputBuilder(str(start), media_config_from(args), folder, audio_captions=False)
    policy, _ = open_policies(
        str(start),
        device=torch.device("cpu"),
        dtype=args.dtype,
        attn=args.attn,
        lora_rank=args.lora_rank,
        train_towers=args.train_towers,
        with_reference=False,
    )
    counts = []
    for i, row in enumerate(tqdm(rows, desc="rows sampled", disable=None)):
        row = normalize_row(row)
        prompt = build(row, row["hint"] if with_hint else None)
        (group,) = rollout(
            policy,
            [prompt],
            [samples],
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            eos_ids=build.eos_ids,
            seeds=[processes.seed(7, 0, i)],
        )
        answers = map(rewards.parse_answer, build.texts(group))
        right = [rewards.accuracy_reward(answer, *answer_spec(row)) == 1 for answer in answers]
        counts.append(sum(right))
    return counts


# ---- long reasonings ---------------------------------------------------------------------------


def long_row(rng, kind, name, right):
    """
    "How many red shapes are shown?": a line for each second, with the count so far.

    kind     "plan": the first line says what is counted, the last line gives the sum; in the cold
             start each is wrong about half of the time, the lines between follow from the clip
             "busy": the same, with up to two shapes a second, and a count of the others in each line
             "middle": only the second half is counted, and a line in the middle says what; the end
             follows from it
    right    how often that line is right in the row's reasoning; 0: the row has none
    returns  the row, the clip's seconds
    """
    max_shapes = 2 if kind == "busy" else 1
    seconds = random_seconds(rng, int(rng.integers(SECONDS[0], SECONDS[1] + 1)), max_shapes)
    first = len(seconds) // 2 if kind == "middle" else 0
    asked = str(rng.choice(list(COLORS)))
    num_of = lambda color, shapes: sum(shape[1] == color for shape in shapes)
    answer = sum(num_of(asked, shapes) for shapes, _ in seconds[first:])
    question = (
        f"How many {asked} shapes are shown" + " in the second half" * (kind == "middle") + "?"
    )
    row = dict(
        prompt_id=f"{kind}-{name}", question=question, answer=str(answer), answer_type="text"
    )
    row |= dict(video=f"clips/{kind}-{name}.mp4", use_audio=False)
    if not right:
        return row, seconds
    decided = rng.random() < right
    counted = asked if decided else str(rng.choice([c for c in COLORS if c != asked]))
    lines, count, others = (
        ["plan: look first" if kind == "middle" else f"plan: count {counted}"],
        0,
        0,
    )
    for k, second in enumerate(seconds):
        if kind == "middle" and k == first:
            lines.append(f"now count {counted}")
        count += num_of(counted, second[0]) if k >= first else 0
        others += len(second[0]) - num_of(counted, second[0])
        so_far = f"{counted} {count}" if k >= first else "count later"
        so_far += f", others {others}" * (kind == "busy")
        lines.append(f"{k + 1}: {describe(*second, ('place', 'color', 'shape'))}, {so_far}")
    if kind != "middle" and rng.random() < 0.4:
        count = int(rng.integers(0, len(seconds) // 2))
    row |= dict(reasoning="\n".join([*lines, f"so {count}"]), answer=str(count))
    return row, seconds


def long_rows(kind, split, count, seed, right=0):
    """-> the rows of a kind, and writes their clips; `right` as in long_row."""
    rng, rows = np.random.default_rng([seed, len(kind)]), []
    (LONG / "clips").mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc=f"{kind} {split} clips", disable=None, leave=False):
        row, seconds = long_row(rng, kind, f"{split}-{i:04d}", right)
        write_clip(LONG / row["video"], seconds, rng)
        rows.append(row)
    return rows


def long_start(name, rows, *flags):
    """SFT on these rows, from the toy's start or another --model."""
    data, out = LONG / f"{name}.jsonl", LONG / name
    write_lines(data, rows)
    shutil.rmtree(out, ignore_errors=True)
    flags += *"--max-frames 32 --batch-size 16 --lr 5e-4 --save-every 0".split(), "--out", out
    python("train_sft.py", "--data", data, *flags, log=RUNS / "long.log")


def long():
    rows = long_rows("plan", "sft", 512, 0, right=0.5) + long_rows(
        "middle", "sft", 512, 0, right=0.3
    )
    long_start("sft", rows, "--steps", 500)


def long_kind(kind):
    make("long")
    write_lines(LONG / f"{kind}-test.jsonl", long_rows(kind, "test", 64, 2))
    write_lines(LONG / f"{kind}.jsonl", long_rows(kind, "train", 64, 1))


def middle():
    long_kind("middle")
    rows = long_rows("middle", "more", 512, 3, right=0.8)
    long_start("middle-sft", rows, "--model", LONG / "sft/final", "--steps", 400)


def busy():
    long_kind("busy")
    rows = long_rows("busy", "more", 512, 3, right=0.5)
    long_start("busy-first", rows, "--model", LONG / "sft/final", "--steps", 500)
    rows = long_rows(
        "busy", "again", 1024, 4, right=0.5
    )  # after the first its lines are not true enough
    long_start("busy-sft", rows, "--model", LONG / "busy-first/final", "--steps", 600)


MAKE = {  # name -> what makes it, and its last file
    "hasty": (hasty, RUNS / "hasty/final"),
    "hard": (hard, STAGE3 / "hard.jsonl"),
    "long": (long, LONG / "sft/final"),
    "plan": (lambda: long_kind("plan"), LONG / "plan.jsonl"),
    "middle": (middle, LONG / "middle-sft/final"),
    "busy": (busy, LONG / "busy-sft/final"),
}
