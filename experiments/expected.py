"""
The default run over several seeds: the numbers of docs/expected.md.

    for S in 0 1 2 3 4; do python train_rl.py --stage 2 --seed $S --out runs/default-$S; done
    python -m experiments.expected runs/default-0 runs/default-1 ...    # -> docs/expected.json
    python -m experiments.expected                                      # prints the table
"""

import argparse
import json
from pathlib import Path

RESULT = Path(__file__).parent.parent / "docs" / "expected.json"
COMMAND = "python train_rl.py --stage 2 --seed S"
METRICS = (
    "reward rewards/acc rewards/format frac_reward_zero_std completions/mean_length "
    "completions/clipped_ratio kl entropy clip_frac off/clip_frac off/ess_frac off/age_mean "
    "logprob_gap grad_norm buffer/size hints/entered hints/withdrawn eval/acc"
).split()
WINDOWS = ((1, 5), (28, 32), (58, 62), (86, 90))  # steps, both ends included


def collect(folders):
    """Runs of equal flags -> dict with the commit and, per metric, one list of values per run."""
    runs = []
    for folder in folders:
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        about = json.loads((Path(folder) / "run.json").read_text())
        runs.append((about, [json.loads(line) for line in lines]))
    result = dict(
        command=COMMAND,
        commit=sorted({about["commit"] for about, _ in runs}),
        seeds=[about["arguments"]["seed"] for about, _ in runs],
        before=[
            next(step["eval/before"] for step in steps if "eval/before" in step)
            for _, steps in runs
        ],
        series={},
    )
    for name in METRICS:
        result["series"][name] = [[round_(step.get(name)) for step in steps] for _, steps in runs]
    return result


def round_(value):
    return None if value is None else float(f"{value:.4g}")


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(result):
    """Rows of the page: least and greatest over the runs of the mean over each window of steps."""
    heads = [f"steps {first} to {last}" for first, last in WINDOWS]
    yield f"| metric | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for name, runs in result["series"].items():
        cells = []
        for first, last in WINDOWS:
            means = []
            for values in runs:
                values = [value for value in values[first - 1 : last] if value is not None]
                if values:
                    means.append(sum(values) / len(values))
            cells.append(f"{number(min(means))} – {number(max(means))}" if means else "–")
        yield f"| `{name}` | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="folders of finished default runs")
    folders = parser.parse_args().runs
    if folders:
        RESULT.write_text(json.dumps(collect(folders)) + "\n")
    print("\n".join(table(json.loads(RESULT.read_text()))))


if __name__ == "__main__":
    main()
