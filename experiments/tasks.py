"""
Rows and starting weights that the experiments take beside the toy's own; each is made once, in
runs/experiments, by the first run that names it.

    hasty    a model that answers without looking: nearly all its groups are all wrong
    hard     64 rows of stage 3. A fifth of them that model never solves: 0 of 256 completions; with
             their hint it does best. never.jsonl has only these
    long     a model for clips of 12 to 16 seconds, whose reasonings have about 150 tokens
    plan     its rows whose reasoning is decided in its first line and in its last
    middle   rows whose reasoning is decided in its middle, and a start that continues from "long" and
             decides right in two thirds of them: from a tenth, as "long" does, nothing is learnt
    busy     "plan" with up to two shapes a second and two counts a line, about 250 tokens, and a
             start that continues from "long"
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
STAGE3 = REPOSITORY / "toy/stage3"  # rows lie beside their clips
LONG = RUNS / "long"
MIN_SECONDS, MAX_SECONDS = 12, 16  # of a long clip
NUM_NEVER, NUM_HARD = 13, 64  # hard rows that are never solved, and all
SAMPLES = 256  # completions among which a row that is never solved has no right one


def python(*words, log, code=REPOSITORY):
    """
    Runs a script of ours on one core; its output goes to a file, whose end explains a failure.

    code   the checkout that it is run from
    """
    command = [sys.executable, *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=code, env=env)
    if done.returncode:
        end = log.read_text()[-600:]
        raise UserError(f"{words[0]} ended with {done.returncode}, see {log}:\n{end}")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- a start that hardly ever looks ------------------------------------------------------------


def make_hasty():
    """Stage-0 rows whose reasoning is hasty, and every twentieth of the others: 40 steps of SFT."""
    log, out = RUNS / "hasty.log", RUNS / "hasty"
    shutil.rmtree(out, ignore_errors=True)
    python("toy.py", "--stages", 0, log=log)
    rows = read_lines(REPOSITORY / "toy/stage0/train.jsonl")
    hasty = [row for row in rows if row["reasoning"].startswith("it seems")]
    looking = [row for row in rows if row["reasoning"].startswith("1:") and "hint" not in row]
    hinted = [row for row in rows if "hint" in row]
    data = REPOSITORY / "toy/stage0/hasty.jsonl"  # beside the clips that its rows name
    write_lines(data, hasty + looking[::20] + hinted[::20])
    flags = ["--steps", 40, "--lr", "2e-4", "--save-every", 0]
    python("train_sft.py", "--data", data, "--out", out, *flags, log=log)


# ---- rows that are never solved without a hint -------------------------------------------------


def make_hard():
    """
    Stage-3 rows, sampled from the hasty start: of those that it never solves the NUM_NEVER that a hint
    helps most, and others. Where the hint does not help either, no schedule of hints differs from another.
    """
    make("hasty")
    python("toy.py", "--stages", 3, log=RUNS / "hard.log")
    rows = read_lines(STAGE3 / "train.jsonl") + read_lines(STAGE3 / "test.jsonl")
    num_solved = solved_counts(RUNS / "hasty/final", STAGE3, rows, SAMPLES)
    candidates = [row for row, count in zip(rows, num_solved) if count == 0]
    with_hint = solved_counts(RUNS / "hasty/final", STAGE3, candidates, SAMPLES, with_hint=True)
    best = sorted(range(len(candidates)), key=lambda i: -with_hint[i])[:NUM_NEVER]
    if len(best) < NUM_NEVER or not with_hint[best[-1]]:
        raise UserError(f"fewer than {NUM_NEVER} rows are solved with a hint and never without")

    never = [candidates[i] for i in best]
    others = [row for row, count in zip(rows, num_solved) if count > 0][: NUM_HARD - NUM_NEVER]
    hard = never + others
    order = np.random.default_rng(0).permutation(NUM_HARD)
    write_lines(STAGE3 / "never.jsonl", never)
    write_lines(STAGE3 / "hard.jsonl", [hard[i] for i in order])
    counts = {
        "candidates": len(candidates),
        "of": len(rows),
        "with_hint": sorted(with_hint),
        "plain": sorted(num_solved),
    }
    write_text(RUNS / "hard.json", json.dumps(counts))


def solved_counts(start, folder, rows, samples, with_hint=False):
    """-> for each row, how many of `samples` completions at temperature 1 are right."""
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


def count_color(shapes, color):
    return sum(shape_color == color for _, shape_color, _ in shapes)


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
    num_seconds = int(rng.integers(MIN_SECONDS, MAX_SECONDS + 1))
    seconds = random_seconds(rng, num_seconds, max_shapes=2 if kind == "busy" else 1)
    first_counted = len(seconds) // 2 if kind == "middle" else 0
    color = str(rng.choice(list(COLORS)))
    answer = sum(count_color(shapes, color) for shapes, _ in seconds[first_counted:])
    where = " in the second half" if kind == "middle" else ""
    row = {
        "prompt_id": f"{kind}-{name}",
        "question": f"How many {color} shapes are shown{where}?",
        "answer": str(answer),
        "answer_type": "text",
        "video": f"clips/{kind}-{name}.mp4",
        "use_audio": False,
    }
    if right:
        row |= long_reasoning(rng, kind, seconds, color, first_counted, right)
    return row, seconds


def long_reasoning(rng, kind, seconds, color, first_counted, right):
    """The reasoning of a row, and the answer that it comes to, which may be wrong."""
    if rng.random() < right:
        counted_color = color
    else:
        counted_color = str(rng.choice([other for other in COLORS if other != color]))

    count, others = 0, 0
    lines = ["plan: look first" if kind == "middle" else f"plan: count {counted_color}"]
    for k, (shapes, tone) in enumerate(seconds):
        if kind == "middle" and k == first_counted:
            lines.append(f"now count {counted_color}")
        num_counted = count_color(shapes, counted_color)
        others += len(shapes) - num_counted
        if k < first_counted:
            so_far = "count later"
        else:
            count += num_counted
            so_far = f"{counted_color} {count}"
        if kind == "busy":
            so_far += f", others {others}"
        lines.append(f"{k + 1}: {describe(shapes, tone, ('place', 'color', 'shape'))}, {so_far}")
    if kind != "middle" and rng.random() < 0.4:  # the sum is wrong
        count = int(rng.integers(0, len(seconds) // 2))
    lines.append(f"so {count}")
    return {"reasoning": "\n".join(lines), "answer": str(count)}


def long_rows(kind, split, num_rows, seed, right=0):
    """Writes the clips of num_rows rows -> the rows; `right` as in long_row."""
    rng = np.random.default_rng([seed, len(kind)])
    (LONG / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in tqdm(range(num_rows), desc=f"{kind} {split} clips", disable=None, leave=False):
        row, seconds = long_row(rng, kind, f"{split}-{i:04d}", right)
        write_clip(LONG / row["video"], seconds, rng)
        rows.append(row)
    return rows


def long_start(name, rows, steps, start=None):
    """SFT on these rows, from the toy's start or from the folder of another one."""
    data, out = LONG / f"{name}.jsonl", LONG / name
    write_lines(data, rows)
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--steps", steps, "--max-frames", 32, "--batch-size", 16, "--lr", "5e-4"]
    if start:
        flags += ["--model", start]
    flags += ["--save-every", 0, "--out", out]
    python("train_sft.py", "--data", data, *flags, log=RUNS / "long.log")


def make_long():
    rows = long_rows("plan", "sft", 512, seed=0, right=0.5)
    rows += long_rows("middle", "sft", 512, seed=0, right=0.3)
    long_start("sft", rows, steps=500)


def make_long_kind(kind):
    make("long")
    write_lines(LONG / f"{kind}-test.jsonl", long_rows(kind, "test", 64, seed=2))
    write_lines(LONG / f"{kind}.jsonl", long_rows(kind, "train", 64, seed=1))


def make_plan():
    make_long_kind("plan")


def make_middle():
    make_long_kind("middle")
    rows = long_rows("middle", "more", 512, seed=3, right=0.8)
    long_start("middle-sft", rows, steps=400, start=LONG / "sft/final")


def make_busy():
    make_long_kind("busy")
    rows = long_rows("busy", "more", 512, seed=3, right=0.5)
    long_start("busy-first", rows, steps=500, start=LONG / "sft/final")
    # after the first SFT too many of the lines between are wrong
    rows = long_rows("busy", "again", 1024, seed=4, right=0.5)
    long_start("busy-sft", rows, steps=600, start=LONG / "busy-first/final")


# ---- all tasks ---------------------------------------------------------------------------------

TASKS = {  # name -> the function that makes it, the last file that it writes
    "hasty": (make_hasty, RUNS / "hasty/final"),
    "hard": (make_hard, STAGE3 / "hard.jsonl"),
    "long": (make_long, LONG / "sft/final"),
    "plan": (make_plan, LONG / "plan.jsonl"),
    "middle": (make_middle, LONG / "middle-sft/final"),
    "busy": (make_busy, LONG / "busy-sft/final"),
}


def make(name):
    """Makes a task unless it is there."""
    write, last_file = TASKS[name]
    with file_lock(RUNS / "locks" / name):  # another experiment may need the same
        if not last_file.exists():
            write()
