"""
What is run: every table of docs/results.md as a dict of label -> flags of train_rl.py.

    EXPERIMENTS["dense"]["AVATAR"]    "--stage 2 --save-every 0 ..."

The first word may be the name of a variant (variants.py), which runs train_rl.py with one function
exchanged. The seed is added by runs.py. Rows and starts that are not the toy's own: tasks.py.
"""

from typing import NamedTuple

# ---- tasks -------------------------------------------------------------------------------------

NO_SAVES = "--save-every 0"

# short reasonings: the toy's default rows of stage 2
DENSE = f"--stage 2 {NO_SAVES} --eval-samples 128"

# rare rewards: hard rows and a start that answers without looking (tasks.py). A completion that the
# policy has given up has a tiny ratio, which is no fault here: --max-ratio 0.
HARD = (
    f"--stage 3 {NO_SAVES} --max-ratio 0 --model runs/experiments/hasty/final "
    "--reward-weights format=.5,acc=.5 --eval-samples 208 "
    "--data toy/stage3/hard.jsonl --eval-data toy/stage3/never.jsonl"
)

# long reasonings: task -> the folder of its start (tasks.py)
STARTS = {"plan": "sft", "middle": "middle-sft", "busy": "busy-sft"}
MAX_NEW_TOKENS = {"plan": 320, "middle": 320, "busy": 400}


def long_task(name, samples):
    """Flags of a task of long reasonings; samples: held-out completions an evaluation."""
    folder = "runs/experiments/long"
    return (
        f"--stage 1 {NO_SAVES} --model {folder}/{STARTS[name]}/final --data {folder}/{name}.jsonl "
        f"--eval-data {folder}/{name}-test.jsonl --max-frames 32 "
        f"--max-new-tokens {MAX_NEW_TOKENS[name]} --eval-samples {samples}"
    )


# clips of real recordings: hands_and_voices.py writes the rows, train_sft.py the start
# (docs/hands_and_voices.md has both commands)
HANDS = (
    f"kept-features --stage 2 {NO_SAVES} --model runs/experiments/hands-sft/final "
    "--data runs/experiments/hands/train.jsonl --eval-data runs/experiments/hands/people.jsonl "
    "--max-frames 12 --max-audio-seconds 6 --max-new-tokens 120 --eval-samples 128"
)

# ---- methods -----------------------------------------------------------------------------------

# "no replay" is the control: AVATAR's 4 fresh completions a prompt and nothing else of the method,
# so as many optimizer steps a completion as AVATAR
ALGO_FLAGS = {"grpo": "--algo grpo", "avatar": "", "no replay": "--algo grpo --num-on 4"}
NUM_FRESH = {"grpo": 8, "avatar": 4, "no replay": 4}

NO_EXTRAS = "--tas-shape uniform --no-hints"  # AVATAR without shaping and hints
PARABOLIC = "--no-hints --tas-shape parabolic"
# GSPO's ratio without replay, with 4 or 8 fresh completions a prompt; the clip follows
ONE_RATIO = "--algo avatar-gspo --clip-eps"
FRESH_ONLY = "--num-off 0 --tas-shape uniform --no-hints"


class Method(NamedTuple):
    algo: str  # a key of ALGO_FLAGS
    updates: int  # gradient steps a rollout
    prompts: int  # fresh prompts a step
    lr: str
    extra: str = ""  # other flags


def method_flags(task, method, completions, evaluations):
    """
    Flags of one run of about `completions` fresh completions with `evaluations` equal parts.

    The control has AVATAR's number of steps: 4 * prompts completions fewer, as AVATAR's first step
    has nothing to replay and makes 8 fresh ones a prompt.
    """
    num_fresh = NUM_FRESH[method.algo]
    extra_first_step = method.prompts * (8 - num_fresh)
    steps = (completions - extra_first_step) / (num_fresh * method.prompts)
    eval_every = max(1, round(steps / evaluations))
    parts = [
        task,
        f"--steps {eval_every * evaluations} --eval-every {eval_every}",
        ALGO_FLAGS[method.algo],
        f"--prompts-per-step {method.prompts}",
        f"--lr {method.lr}",
        f"--updates-per-rollout {method.updates}",
        method.extra,
    ]
    return " ".join(part for part in parts if part)


def comparison(task, completions, methods, evaluations=8):
    """methods: label -> Method -> label -> flags"""
    return {
        label: method_flags(task, method, completions, evaluations)
        for label, method in methods.items()
    }


def tuning(task, completions, grid, evaluations=8):
    """grid: (algo, updates, prompts, learning rates) a line -> label -> flags"""
    methods = {}
    for algo, updates, prompts, rates in grid:
        extra = "--no-hints" if algo == "avatar" else ""
        for lr in rates:
            label = f"{algo}, {updates} updates, {prompts} prompts, lr {lr}"
            methods[label] = Method(algo, updates, prompts, lr, extra)
    return comparison(task, completions, methods, evaluations)


EXPERIMENTS = {}

# ---- what was tried, seed 100 ------------------------------------------------------------------

EXPERIMENTS["tune-dense"] = tuning(
    DENSE,
    completions=1536,
    grid=[
        ("grpo", 1, 2, ["1e-4", "2e-4"]),
        ("avatar", 1, 2, ["1e-4", "2e-4"]),
        ("grpo", 1, 4, ["1e-4", "2e-4", "4e-4"]),
        ("grpo", 2, 4, ["1e-4", "2e-4"]),
        ("grpo", 4, 4, ["2e-5", "5e-5", "1e-4"]),
        ("avatar", 1, 4, ["5e-5", "1e-4", "2e-4"]),
        ("avatar", 2, 4, ["5e-5", "1e-4"]),
        ("avatar", 4, 4, ["2e-5", "5e-5"]),
        ("grpo", 1, 8, ["5e-5", "1e-4", "2e-4"]),
        ("grpo", 4, 8, ["5e-5", "1e-4", "2e-4"]),
        ("avatar", 1, 8, ["5e-5", "1e-4", "2e-4"]),
        ("avatar", 4, 8, ["5e-5", "1e-4", "2e-4"]),
        ("grpo", 1, 16, ["2e-4"]),
        ("grpo", 4, 16, ["1e-4"]),
        ("avatar", 1, 16, ["2e-4"]),
        ("avatar", 4, 16, ["5e-5"]),
    ],
)
EXPERIMENTS["tune-long"] = tuning(
    long_task("plan", samples=128),
    completions=512,
    grid=[
        ("grpo", 1, 2, ["5e-5"]),
        ("grpo", 4, 2, ["2e-5"]),
        ("avatar", 1, 2, ["5e-5"]),
        ("avatar", 4, 2, ["2e-5"]),
        ("grpo", 1, 4, ["2e-5", "5e-5", "1e-4"]),
        ("grpo", 2, 4, ["5e-5"]),
        ("grpo", 4, 4, ["1e-5", "2e-5", "5e-5", "1e-4"]),
        ("avatar", 1, 4, ["2e-5", "5e-5", "1e-4"]),
        ("avatar", 2, 4, ["5e-5"]),
        ("avatar", 4, 4, ["1e-5", "2e-5", "5e-5", "1e-4"]),
        ("grpo", 1, 8, ["1e-4"]),
        ("grpo", 4, 8, ["5e-5"]),
        ("avatar", 1, 8, ["1e-4"]),
        ("avatar", 4, 8, ["5e-5"]),
    ],
)
EXPERIMENTS["tune-longer"] = tuning(
    long_task("busy", samples=128),
    completions=512,
    grid=[
        ("grpo", 1, 4, ["5e-5", "1e-4"]),
        ("grpo", 4, 4, ["1e-5", "2e-5", "5e-5"]),
        ("avatar", 1, 4, ["5e-5", "1e-4"]),
        ("avatar", 4, 4, ["1e-5", "2e-5", "5e-5"]),
    ],
    evaluations=4,
)
EXPERIMENTS["tune-sparse"] = tuning(
    HARD,
    completions=2048,
    grid=[
        ("grpo", 1, 4, ["2e-4", "4e-4"]),
        ("grpo", 2, 4, ["2e-4"]),
        ("grpo", 4, 4, ["1e-4", "2e-4"]),
        ("avatar", 1, 4, ["1e-4", "2e-4"]),
        ("avatar", 2, 4, ["1e-4"]),
        ("avatar", 4, 4, ["5e-5", "1e-4"]),
        ("grpo", 1, 8, ["1e-4", "2e-4", "4e-4", "8e-4"]),
        ("grpo", 2, 8, ["2e-4", "4e-4"]),
        ("grpo", 4, 8, ["5e-5", "1e-4", "2e-4", "4e-4"]),
        ("avatar", 1, 8, ["1e-4", "2e-4", "4e-4"]),
        ("avatar", 2, 8, ["1e-4", "2e-4"]),
        ("avatar", 4, 8, ["5e-5", "1e-4", "2e-4"]),
        ("grpo", 1, 16, ["4e-4"]),
        ("grpo", 4, 16, ["2e-4"]),
        ("avatar", 1, 16, ["2e-4"]),
        ("avatar", 4, 16, ["1e-4"]),
    ],
)

# ---- methods beside each other -----------------------------------------------------------------

# the default run's first 40 steps. All three take 40 optimizer steps and make 2,560 completions
# (AVATAR 64 more in its first step), at the default learning rate, which was tuned for AVATAR.
DEFAULT_RUN = f"--stage 2 {NO_SAVES} --eval-samples 256 --eval-every 5 --steps 40"
EXPERIMENTS["control"] = {
    "GRPO": f"{DEFAULT_RUN} --algo grpo --prompts-per-step 8",
    "no replay": f"{DEFAULT_RUN} --algo grpo --num-on 4",
    "AVATAR": DEFAULT_RUN,
}

# Each method at its best of tune-*. The control is not tuned: it has AVATAR's settings.
EXPERIMENTS["dense"] = comparison(
    DENSE,
    completions=1024,
    methods={
        "GRPO": Method("grpo", 1, 4, "2e-4"),
        "GRPO, 4 updates": Method("grpo", 4, 4, "5e-5"),
        "AVATAR": Method("avatar", 1, 4, "1e-4"),
        "AVATAR, 4 updates": Method("avatar", 4, 4, "5e-5"),
        "replay only, 4 updates": Method("avatar", 4, 4, "5e-5", NO_EXTRAS),
        "no replay": Method("no replay", 1, 4, "1e-4"),
        "no replay, 4 updates": Method("no replay", 4, 4, "5e-5"),
    },
)
EXPERIMENTS["sparse"] = comparison(
    HARD,
    completions=2048,
    methods={
        "GRPO": Method("grpo", 1, 8, "4e-4"),
        "GRPO, 4 updates": Method("grpo", 4, 8, "2e-4"),
        "AVATAR": Method("avatar", 1, 8, "2e-4", "--no-hints"),
        "AVATAR, 4 updates": Method("avatar", 4, 8, "1e-4", "--no-hints"),
        "no replay": Method("no replay", 1, 8, "2e-4"),
        "no replay, 4 updates": Method("no replay", 4, 8, "1e-4"),
    },
)
EXPERIMENTS["long"] = comparison(
    long_task("plan", samples=256),
    completions=512,
    methods={
        "GRPO": Method("grpo", 1, 4, "5e-5"),
        "GRPO, 4 updates": Method("grpo", 4, 8, "5e-5"),
        "AVATAR": Method("avatar", 1, 2, "5e-5", PARABOLIC),
        "AVATAR, 4 updates": Method("avatar", 4, 4, "2e-5", PARABOLIC),
        "no replay": Method("no replay", 1, 2, "5e-5"),
        "no replay, 4 updates": Method("no replay", 4, 4, "2e-5"),
    },
    evaluations=4,
)
EXPERIMENTS["longer"] = comparison(
    long_task("busy", samples=256),
    completions=512,
    methods={
        "GRPO": Method("grpo", 1, 4, "5e-5"),
        "GRPO, 4 updates": Method("grpo", 4, 4, "2e-5"),
        "AVATAR": Method("avatar", 1, 4, "5e-5", PARABOLIC),
        "AVATAR, 4 updates": Method("avatar", 4, 4, "2e-5", PARABOLIC),
        "no replay": Method("no replay", 1, 4, "5e-5"),
        "no replay, 4 updates": Method("no replay", 4, 4, "2e-5"),
    },
    evaluations=4,
)

# ---- one ratio a completion --------------------------------------------------------------------


def one_ratio(name, clip):
    """The methods of a comparison with 4 updates, with a ratio a token and with one a completion."""
    grpo = EXPERIMENTS[name]["GRPO, 4 updates"]
    avatar = EXPERIMENTS[name]["AVATAR, 4 updates"]
    control = EXPERIMENTS[name]["no replay, 4 updates"]
    gspo = f"{ONE_RATIO} {clip}"
    return {
        "GRPO": EXPERIMENTS[name]["GRPO"],
        "GRPO, 4 updates": grpo,
        "GRPO, 4 updates, one ratio": grpo.replace(
            "--algo grpo", f"{gspo} --num-on 8 {FRESH_ONLY}"
        ),
        "AVATAR, 4 updates": avatar,
        "AVATAR, 4 updates, one ratio, clip .2": f"{avatar} {ONE_RATIO} 0.2",
        "AVATAR, 4 updates, one ratio": f"{avatar} {gspo}",
        "no replay, 4 updates, one ratio": control.replace(
            "--algo grpo --num-on 4", f"{gspo} --num-on 4 {FRESH_ONLY}"
        ),
    }


EXPERIMENTS["ratio-long"] = one_ratio("long", clip=0.005)  # the best clips of tune-ratio
EXPERIMENTS["ratio-longer"] = one_ratio("longer", clip=0.001)

AVATAR_DENSE = EXPERIMENTS["dense"]["AVATAR, 4 updates"]
AVATAR_LONG = EXPERIMENTS["long"]["AVATAR, 4 updates"]
AVATAR_LONGER = EXPERIMENTS["longer"]["AVATAR, 4 updates"]
EXPERIMENTS["tune-ratio"] = {
    **{
        f"dense, clip {clip}": f"{AVATAR_DENSE} {ONE_RATIO} {clip}"
        for clip in ("0.2", "0.05", "0.02", "0.005", "0.001")
    },
    **{f"long, clip {clip}": f"{AVATAR_LONG} {ONE_RATIO} {clip}" for clip in ("0.005", "0.001")},
    **{
        f"longer, clip {clip}": f"{AVATAR_LONGER} {ONE_RATIO} {clip}"
        for clip in ("0.2", "0.05", "0.02", "0.005", "0.001", "0.0004")
    },
    **{
        f"long, a token, clip {clip}": f"{AVATAR_LONG} --clip-eps {clip}"
        for clip in ("0.2", "0.05", "0.01")
    },
}

# ---- what is replayed --------------------------------------------------------------------------

AVATAR = EXPERIMENTS["dense"]["AVATAR"]
EXPERIMENTS["replay"] = {
    "AVATAR": AVATAR,
    "newest completions": f"newest {AVATAR}",
    "best completions": f"best {AVATAR}",
    "prompts by p (1 - p)": f"learnability {AVATAR}",
    "one ratio a completion": f"{AVATAR} {ONE_RATIO} 0.2",
    "one ratio a completion, clip .05": f"{AVATAR} {ONE_RATIO} 0.05",
    "ratio clipped at 3": f"{AVATAR} --clip-eps 2",
    "no replay": EXPERIMENTS["dense"]["no replay"],
}

# ---- shapes of temporal advantage shaping ------------------------------------------------------

MAIN_SHAPES = ["uniform", "parabolic", "parabolic-mean1", "inverse-mean1"]
OTHER_SHAPES = ["inverse", "linear-up", "linear-up-mean1", "linear-down", "linear-down-mean1"]
SHAPES = {
    "plan": MAIN_SHAPES + OTHER_SHAPES,
    "middle": MAIN_SHAPES + OTHER_SHAPES,
    "busy": MAIN_SHAPES,
}
for name, shapes in SHAPES.items():
    EXPERIMENTS[name] = comparison(
        long_task(name, samples=256),
        completions=512,
        methods={
            shape: Method("avatar", 1, 4, "5e-5", f"--no-hints --tas-shape {shape}")
            for shape in shapes
        },
        evaluations=4,
    )

# ---- hints and stage 3 -------------------------------------------------------------------------

# every row comes back every eighth step; evaluated on the rows never solved without a hint
HINTS = f"{HARD} --steps 64 --prompts-per-step 8 --eval-every 16 --lr 1e-4"
EXPERIMENTS["hints"] = {
    "no hints": f"{HINTS} --no-hints",
    "hints by need": HINTS,
    "never withdrawn": f"never-withdrawn {HINTS}",
    "entry by rank": f"by-rank {HINTS}",
    "after 3 visits, any KL": f"{HINTS} --hint-patience 3 --hint-kl 1e9",
}
# the same two again, with every visit of every prompt noted
EXPERIMENTS["withdrawn"] = {
    "no hints": f"visits {HINTS} --no-hints",
    "hints by need": f"visits {HINTS}",
}

STAGE3 = f"--stage 3 {NO_SAVES} --steps 48 --prompts-per-step 8 --eval-every 48 --lr 5e-5"
EXPERIMENTS["stage3"] = {
    "format, judge": STAGE3,
    "format, judge, .2 accuracy": f"{STAGE3} --reward-weights format=.4,judge=.4,acc=.2",
    "judge wrong in 20 %": f"wrong-judge {STAGE3}",
    "judge of form alone": f"form-judge {STAGE3}",
}

# ---- hands and voices ---------------------------------------------------------------------------

# all take as many optimizer steps and make 32 completions a step (AVATAR 32 more in its first)
HANDS_METHODS = {
    "GRPO": "--algo grpo --prompts-per-step 4",
    "no replay": "--algo grpo --num-on 4 --prompts-per-step 8",
    "AVATAR": "--prompts-per-step 8",
}
EXPERIMENTS["tune-hands"] = {
    f"{method}, lr {lr}": f"{HANDS} --steps 16 --eval-every 8 {flags} --lr {lr}"
    for method, flags in HANDS_METHODS.items()
    for lr in ("5e-5", "1e-4", "2e-4")
}
# two epochs, each method at its best of tune-hands
HANDS_LR = {"GRPO": "1e-4", "no replay": "1e-4", "AVATAR": "2e-4"}
HANDS_RUNS = {
    method: f"{HANDS} --steps 32 --eval-every 8 {flags} --lr {HANDS_LR[method]}"
    for method, flags in HANDS_METHODS.items()
}
HANDS_AVATAR = HANDS_RUNS["AVATAR"]
EXPERIMENTS["hands"] = {
    **HANDS_RUNS,
    "AVATAR, uniform weights": f"{HANDS_AVATAR} --tas-shape uniform",
    "AVATAR, no hints": f"{HANDS_AVATAR} --no-hints",
}
# ---- seeds -------------------------------------------------------------------------------------

SEEDS = {}
for name in EXPERIMENTS:
    if name.startswith("tune"):
        SEEDS[name] = [100]
    elif name == "control":
        SEEDS[name] = list(range(10))
    else:
        SEEDS[name] = list(range(5))


def shell_command(flags):
    """What to type for a run."""
    script = "train_rl.py" if flags.startswith("--") else "-m experiments.variants"
    return f"python {script} {flags} --seed S"
