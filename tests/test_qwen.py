"""
Rows of every kind as what the model takes.

    python -m pytest tests/test_qwen.py
"""

import pytest
import torch
from conftest import RECIPE
from media_files import bursts, make_row, write

from data.clip_cache import ClipCache
from data.clips import BadRow, decode_clip
from data.rows import clip_of, normalize_row
from models.inputs import InputBuilder

# ---- through the model's inputs ----------------------------------------------------------------


@pytest.fixture(scope="module")
def build(media, toy_dir):
    return InputBuilder(toy_dir / "model", RECIPE, media, audio_captions=False)


@pytest.mark.parametrize(
    "fields, has",
    [
        (dict(images=["good.png"]), ["image"]),
        (dict(images=["good.png", "good.jpg"]), ["image"]),
        (dict(images=["tiny.png"], video="tiny.mp4"), ["image", "video"]),
        (dict(audio="good.wav"), ["audio"]),
        (dict(audio="good.wav", start=1, end=1.1), ["audio"]),
        (dict(audio="good.m4a", start=1.03, end=3.3), ["audio"]),
        (dict(video="good.mp4"), ["video"]),
        (dict(video="good.mp4", use_audio=False), ["video"]),
        (dict(video="good.mp4", use_audio=True), ["audio", "video"]),
        (dict(video="good.mp4", use_audio=True, start=2.21, end=2.9), ["audio", "video"]),
        (dict(video="silent.mp4", audio="good.wav"), ["audio", "video"]),
        (dict(images=["good.png"], audio="good.flac"), ["audio", "image"]),
        (dict(images=["good.png"], video="good.webm", use_audio=True), ["audio", "image", "video"]),
    ],
)
def test_every_kind_of_row_becomes_a_prompt(build, media, fields, has):
    row = normalize_row(make_row(**fields))
    clip, prompt = decode_clip(row, media, RECIPE), build(row)

    def count(token):
        return int((prompt.input_ids == build.tokenizer.convert_tokens_to_ids(token)).sum())

    assert sorted(prompt.media) == has and prompt.position_ids.shape == (3, len(prompt.input_ids))
    if "audio" in has:
        mel = prompt.media["audio"]["mel"].shape[1]
        assert mel == -(-len(clip.audio) // 160)  # 10 ms each, then two convolutions with stride 2
        assert count("<|AUDIO|>") == ((mel - 1) // 2 + 1 - 2) // 2 + 1 > 0
        assert clip.use_audio == bool(fields.get("use_audio"))
    if "video" in has:
        tall, wide = clip.frames.shape[2] // 28, clip.frames.shape[3] // 28
        assert count("<|VIDEO|>") == len(clip.frames) // 2 * tall * wide
        grid = [len(clip.frames) // 2, 2 * tall, 2 * wide]
        assert prompt.media["video"]["grid"].tolist() == [grid]
    if "image" in has:
        assert count("<|IMAGE|>") == sum(i.shape[1] * i.shape[2] // 784 for i in clip.images)
    # another question about the clip needs no second look at it
    other = normalize_row(make_row(**fields, prompt_id="other", question="Why, then?"))
    for asked, hint in ((row, None), (other, "look left")):
        retold, fresh = build.with_text(prompt, asked, hint), build(asked, hint)
        assert torch.equal(retold.input_ids, fresh.input_ids)
        assert torch.equal(retold.position_ids, fresh.position_ids)
        assert retold.media is prompt.media and clip_of(other) == clip_of(row)


def test_positions_tell_the_real_time_of_a_long_clip(build, tmp_path):
    write(tmp_path / "x.mp4", seconds=60, size=(56, 56), audio="aac", sound=bursts(60))
    build = build.at(tmp_path)
    build.media_config = RECIPE._replace(max_audio_seconds=60.0)
    for use_audio in (False, True):
        prompt = build(normalize_row(make_row(video="x.mp4", use_audio=use_audio)))
        video = prompt.input_ids == build.tokenizer.convert_tokens_to_ids("<|VIDEO|>")
        times = prompt.position_ids[0, video].view(8, -1)  # 16 frames in pairs
        assert (times == times[:, :1]).all()
        # 16 frames of 60 s: a pair is 7.5 s, at 25 positions a second
        assert (times[:, 0] - times[0, 0]).tolist() == [int(i * 7.5 * 25) for i in range(8)]
        if use_audio:  # a sound has the position of what is seen with it
            sound = prompt.input_ids == build.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
            heard = prompt.position_ids[0, sound]
            assert (heard - times[0, 0]).tolist() == list(range(1500))


def test_use_audio_is_a_matter_of_each_row(build):
    """What a row becomes does not depend on the rows read beside it."""
    rows = [make_row(prompt_id=i, video="good.mp4", use_audio=bool(i % 2)) for i in range(6)]
    rows = [normalize_row(row) for row in rows]
    alone = [build(row) for row in rows]
    clip_cache = ClipCache(build, 10**9)
    for row in rows:
        clip_cache.prefetch(row)
    for row, prompt in zip(rows, alone):
        again = clip_cache.get(row)
        assert torch.equal(again.input_ids, prompt.input_ids)
        assert torch.equal(again.position_ids, prompt.position_ids)
        for name, tower in prompt.media.items():
            assert all(torch.equal(again.media[name][key], value) for key, value in tower.items())


def test_prompts_over_the_limit_name_the_flags(build):
    row = normalize_row(make_row(video="good.mp4", question="why " * 3000))
    words = "row r7: .* prompt tokens, over --max-prompt-tokens 2048: lower --max-frames"
    with pytest.raises(BadRow, match=words):
        build(row)
