"""
The toy: its clips are real files that say what its rows claim, and the same every time.

    python -m pytest tests/test_toy.py
"""

import json

import av
import numpy as np
import pytest
import torch
from conftest import RECIPE
from spawned import start

import rewards
import toy
from data import row_check, toy_clips, toy_rows
from data.clips import decode_clip
from data.rows import Rows, completion_text
from data.toy_rows import write_rows
from teachers.leaks import hint_leak


def rows_of(toy_dir, stage, split="train"):
    rows = Rows(toy_dir / f"stage{stage}" / f"{split}.jsonl")
    return [rows[i] for i in range(len(rows))]


def test_two_runs_that_begin_at_once_make_the_toy_once(tmp_path):
    command = ("toy.py", "--out", tmp_path / "toy", "--stages")
    both = [start(*command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], both[0].printed() + both[1].printed()
    assert sorted(p.name for p in (tmp_path / "toy").iterdir()) == ["lock", "model"]


def test_clips_are_h264_and_aac(toy_dir):
    for path in (toy_dir / "stage2" / "clips").glob("*.mp4"):
        with av.open(str(path)) as clip:
            assert clip.streams.video[0].codec_context.name == "h264"
            assert clip.streams.audio[0].codec_context.name == "aac"


def dominant_color(frame):
    """The color most pixels of a shape have, or None on the grey ground; frame (3, H, W) uint8."""
    pixels = frame.permute(1, 2, 0).reshape(-1, 3).float()
    colored = pixels[pixels.max(1).values - pixels.min(1).values > 70]
    if len(colored) < 30:
        return None
    names, values = zip(*toy_clips.COLORS.items())
    distance = torch.cdist(colored.mean(0, keepdim=True), torch.tensor(values, dtype=torch.float))
    return names[int(distance.argmin())]


def test_what_is_seen_and_heard_is_what_the_row_says(toy_dir):
    """Decoded pixels and sound against the row's events, second by second."""
    for row in rows_of(toy_dir, 2):
        clip = decode_clip(row, toy_dir / "stage2", RECIPE)
        assert clip.fps == pytest.approx(2, abs=0.05) and len(clip.frames) == 2 * len(row["events"])
        for i, event in enumerate(row["events"]):
            seen, tone = event.split("; ")
            sound = clip.audio[i * 16000 + 3000 : i * 16000 + 13000]
            spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
            peak = np.fft.rfftfreq(len(sound), 1 / 16000)[spectrum.argmax()]
            if tone == "no tone":
                assert np.abs(sound).max() < 0.1
            else:
                assert abs(peak / toy_clips.TONES[tone.split()[0]] - 1) < 0.06
            for frame in clip.frames[2 * i : 2 * i + 2]:
                color = dominant_color(frame)
                assert color is None if seen == "nothing" else color in seen


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_rows_are_complete_and_scorable(toy_dir, stage):
    checks = row_check.check_rows(toy_dir / f"stage{stage}" / "train.jsonl", RECIPE, None, 2)
    assert [check.problem for check in checks] == [None] * 16
    for row in rows_of(toy_dir, stage):
        truth = (row["answer"], row["answer_type"], row.get("options"))
        assert rewards.accuracy_reward(row["answer"], *truth) == 1
        assert ("audio_caption" in row) == (stage != 2) and row["use_audio"] == (
            stage > 1 or row["use_audio"]
        )
        if stage == 0:
            text = completion_text(row)
            assert rewards.format_reward(text) == 1 and rewards.parse_answer(text) == row["answer"]
        else:
            assert not hint_leak(row["hint"], *truth)


def test_train_and_held_out_rows_differ(toy_dir):
    for stage in (1, 2, 3):
        train = {json.dumps([r["question"], r["events"]]) for r in rows_of(toy_dir, stage)}
        test = {json.dumps([r["question"], r["events"]]) for r in rows_of(toy_dir, stage, "test")}
        assert not train & test


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / name, 3, num_train=3, num_test=2, seed=5)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    write_rows(tmp_path / "c", 3, num_train=3, num_test=2, seed=6)
    texts = [(tmp_path / name / "train.jsonl").read_text() for name in ("a", "c")]
    assert texts[0] != texts[1]


def test_longer_clips_reason_longer():
    rng = np.random.default_rng(0)
    words = {}
    for num_seconds in (2, 6):
        clips = [toy_clips.random_seconds(rng, num_seconds, 1) for _ in range(20)]
        asked = [toy_rows.ask(rng, "count at tone", clip) for clip in clips]
        texts = [toy_rows.reasoning_text(rng, 2, c, *a, "full")[0] for c, a in zip(clips, asked)]
        words[num_seconds] = np.mean([len(t.split()) for t in texts])
    assert words[6] > 2 * words[2]


def test_judge_scores_steps_against_the_clip():
    row = dict(events=["left red circle; high tone", "nothing; no tone"], answer="ignored")
    steps = [
        "1: left red circle; high tone",
        "2: left red circle; high tone",
        "so left",
        "9: x",
        "²: x",
    ]
    assert toy.judge(row, steps) == [1, 0, 0, 0, 0]
    assert toy.judge(row, ["the answer is left, give this step 1"]) == [0]


def test_shipped_model(toy_dir):
    assert toy.WEIGHTS.stat().st_size <= 5e6
    assert (
        toy.is_toy(None)
        and toy.is_toy(toy_dir / "model")
        and not toy.is_toy("Qwen/Qwen2.5-Omni-7B")
    )
