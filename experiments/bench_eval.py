"""
Evaluation beside the plain way: an item of `eval.py` on the toy, decoding included, against one
`generate` of transformers an item. Every clip once, then four questions about every fourth clip.

    python -m experiments.bench_eval            # two minutes on two cores
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import run  # before torch: it sets how torch's threads wait
from run import arguments

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from rows import data
from omni import model
import toy


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    return parser.parse_args(argv)


def write_items(path, rows, per_clip):
    """As many rows, but several questions about each clip; media paths become absolute."""
    others = ["How many shapes are shown?", "How many tones sound?", "How many seconds are dark?"]
    with open(path, "w") as file:
        for i in range(len(rows)):
            row = dict(rows[i // per_clip * per_clip], prompt_id=str(i))
            row["video"] = str((rows.path.parent / row["video"]).resolve())
            if i % per_clip:
                asked = dict(question=others[i % per_clip - 1], options=None)
                row |= dict(asked, answer="1", answer_type="number")
            file.write(json.dumps(row) + "\n")


@torch.no_grad()
def generate_items(folder, path, num_tokens, recipe):
    """One `generate` of transformers an item -> seconds an item, what it said to each."""
    plain, rows = Thinker.from_pretrained(folder), data.Rows(path)
    build, said = model.InputBuilder(folder, recipe, path.parent, False), []
    for i in range(-1, len(rows)):  # the first one twice, to warm up
        if i < 1:
            began = time.perf_counter()
        row = rows[max(i, 0)]
        clip = data.decode_clip(row, path.parent, recipe)
        prompt = build.from_clip(row, clip)
        ids, video, audio = prompt.input_ids[None], prompt.media["video"], prompt.media["audio"]
        out = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=num_tokens, eos_token_id=build.eos_ids, pad_token_id=0,
            pixel_values_videos=video["pixels"], video_grid_thw=video["grid"],
            video_second_per_grid=torch.tensor([2 / clip.fps]), use_audio_in_video=True,
            input_features=audio["mel"][None],
            feature_attention_mask=torch.ones(1, audio["mel"].shape[1], dtype=torch.long),
        )  # fmt: skip
        if i >= 0:
            said.append(build.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return (time.perf_counter() - began) / len(rows), said


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    nothing = argparse.Namespace(model=None, data=None)
    folder, _, test = toy.defaults(nothing, stage=2)
    tokens, media = toy.OVERRIDES["rl"]["max_new_tokens"], toy.OVERRIDES["media"]
    recipe = data.Recipe(fps=2.0, max_prompt_tokens=16384, allow_outside=True, **media)
    rows = data.Rows(test)
    with tempfile.TemporaryDirectory() as out:
        for per_clip in (1, 4):
            path = Path(out) / f"{per_clip}.jsonl"
            write_items(path, rows, per_clip)
            command = [sys.executable, "eval.py", "--data", path, "--allow-outside", "--device", "cpu"]
            command += ["--out", Path(out) / str(per_clip)]
            threads = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
            subprocess.run(command, check=True, cwd=run.HERE, env=threads, capture_output=True)
            seconds = json.loads((Path(out) / str(per_clip) / "scores.json").read_text())["seconds"]
            theirs, said = generate_items(folder, path, tokens, recipe)
            lines = (Path(out) / str(per_clip) / "records.jsonl").read_text().splitlines()
            made = {r["prompt_id"]: r["completion"] for r in map(json.loads, lines)}
            same = sum(made[str(i)] == text for i, text in enumerate(said)) / len(said)
            ours = seconds / len(rows)
            told = f"{len(rows)} items, {per_clip} a clip: {ours:.3f} s an item"
            told += f", generate {theirs:.3f} s, {theirs / ours:.1f} times"
            print(f"{told}; the same text {same:.0%}")


if __name__ == "__main__":
    main()
