"""
Rows and clips, on media files written here, whose frames and sounds tell the time.

    python -m pytest tests/test_data.py -q        # CPU, about half a minute

Every frame shows its own number as black and white columns; the sound has tones at known times.
"""

import itertools
import json
import random
import re
import struct
import tracemalloc
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import RECIPE, launch
from PIL import Image

from rows import data
from omni import model
import rewards
from rows import stream
from rows.clips import frame_size

BITS = 11  # of a frame's number, and then a white column and a black one
WIDE = RECIPE._replace(
    max_frames=64, max_pixels=112 * 112, max_audio_seconds=120.0, max_prompt_tokens=4096
)
TONE = 1000.0  # Hz


# ---- helpers: files that tell the time ---------------------------------------------------------


def stamp(number, width, height):
    """A picture of a number: BITS columns, white for 1, the lowest bit at the left."""
    bits = [*((number >> np.arange(BITS)) & 1), 1, 0]
    columns = np.array(bits, np.uint8)[np.arange(width) * len(bits) // width] * 255
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).copy()


def numbers(frames):
    """(T, 3, H, W) uint8 -> the number on each frame, list of int."""
    edges = np.linspace(0, frames.shape[3], BITS + 3)
    at = ((edges[1:] + edges[:-1]) / 2).astype(int)
    bits = frames.float().mean((1, 2))[:, at] > 128
    assert bits[:, BITS].all() and not bits[:, BITS + 1].any(), "no stamp"
    return (bits[:, :BITS].long() * 2 ** torch.arange(BITS)).sum(1).tolist()


FAST = {
    "libx264": {"preset": "ultrafast"},
    "libvpx": {"deadline": "realtime", "cpu-used": "16"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "aac": {"aac_coder": "fast"},
}


def write(path, video="libx264", audio=None, format=None, options=None, muxer=None, **content):
    """Writes a file and returns its name. options: of the video codec; muxer: of the container."""
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        picture = {k: content.pop(k) for k in list(content) if k in write_video.__kwdefaults__}
        mux_video = video and write_video(container, video, options or {}, **picture)
        mux_audio = audio and write_audio(container, audio, **content)
        for mux in filter(None, (mux_video, mux_audio)):  # all streams first, then all packets
            mux()
    return path.name


def write_video(container, codec, options, *, fps=10, seconds=6.0, size=(104, 56), gop=12,
                times=None, begin=0.0, picture=stamp):  # fmt: skip
    """times: of the frames, in seconds, if not regular; begin: the first frame's time stamp."""
    base = Fraction(1, fps) if times is None else Fraction(1, 1000)
    times = np.arange(round(seconds * fps)) / fps if times is None else times
    stream = container.add_stream(codec, rate=fps)
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
    stream.codec_context.time_base, stream.codec_context.gop_size = base, gop
    stream.options = {"threads": "1", **FAST.get(codec, {}), **options}

    def mux():
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts, frame.time_base = round((time + begin) / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return mux


def write_audio(container, codec, *, sound, rate=48000, layout="mono", sound_begin=0.0):
    """sound: (S,) or (channels, S); sound_begin: the first sample's time stamp."""
    stream = container.add_stream(codec, rate=rate, layout=layout)
    stream.options = FAST.get(codec, {})

    def mux():
        context = stream.codec_context
        samples = np.broadcast_to(sound, (context.layout.nb_channels, np.shape(sound)[-1]))
        samples = np.ascontiguousarray(samples, np.float32)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(sound_begin * rate)
        form = dict(format=context.format.name, layout=layout, rate=rate)
        cutter = av.AudioResampler(**form, frame_size=context.frame_size or 1024)
        for piece in [*cutter.resample(frame), *cutter.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))

    return mux


def bursts(seconds, rate=48000, at=()):
    """(S,): silence with 0.1 s of tone from each of the times `at` on."""
    loud = np.zeros(round(seconds * rate))
    for time in at:
        loud[round(time * rate) : round((time + 0.1) * rate)] = 0.5
    return loud * np.sin(2 * np.pi * TONE * np.arange(len(loud)) / rate)


def onsets(audio):
    """The seconds at which tones begin."""
    loud = np.flatnonzero(np.abs(audio) > 0.1)
    return (loud[np.diff(loud, prepend=-9999) > 1600] / 16000).tolist()


def make_row(**fields):
    return dict(
        dict(prompt_id="r7", question="How many?", answer="3", answer_type="number"), **fields
    )


def decode(folder, recipe=WIDE, **fields):
    return data.decode_clip(data.normalize_row(make_row(**fields)), folder, recipe)


def write_jsonl(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def on_show(span, count, fps):
    """The numbers of the frames in the middle of `count` equal parts of a span, by hand."""
    start, end = span
    return [int((start + (i + 0.5) * (end - start) / count) * fps + 1e-6) for i in range(count)]


# ---- video -------------------------------------------------------------------------------------

B_FRAMES = {"preset": "medium", "bf": "3"}
CONTAINERS = {
    "mp4": dict(),
    "mov": dict(),
    "b-frames.mp4": dict(options=B_FRAMES),
    "no-edit-list.mp4": dict(options=B_FRAMES, muxer={"use_editlist": "0"}),
    "fragmented.mp4": dict(muxer={"movflags": "frag_keyframe+empty_moov"}),
    "late.mp4": dict(begin=0.7),
    "open-gop.mp4": dict(options=B_FRAMES | {"x264-params": "open-gop=1"}),
    "mpeg4.mp4": dict(video="mpeg4"),
    "late.mkv": dict(begin=2.0, options=B_FRAMES),
    "webm": dict(video="libvpx-vp9"),
    "live.webm": dict(video="libvpx", muxer={"live": "1"}),  # no duration, no index
    "odd.webm": dict(video="libvpx-vp9", size=(131, 57)),
    "ts": dict(options=B_FRAMES),
    "avi": dict(video="mpeg4"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_frames_are_those_on_show_in_the_middle_of_equal_parts(tmp_path, name):
    path = write(tmp_path / f"x.{name}", **CONTAINERS[name])
    for span in ((0, 6), (1.5, 4.5), (3.3, 6)):
        clip = decode(tmp_path, video=path, start=span[0], end=span[1])
        count = len(clip.frames)
        assert count == round((span[1] - span[0]) * 2 / 2) * 2
        assert clip.fps == pytest.approx(count / (span[1] - span[0]), rel=0.02)
        assert numbers(clip.frames) == on_show(span, count, 10)


LONG = {
    "mp4": dict(gop=100),
    "one-key.mp4": dict(gop=9999),
    "open-gop.mp4": dict(gop=100, options=B_FRAMES | {"x264-params": "open-gop=1"}),
    "intra-refresh.mp4": dict(gop=100, options=B_FRAMES | {"x264-params": "intra-refresh=1"}),
    "no-edit-list.mp4": dict(gop=250, options=B_FRAMES, muxer={"use_editlist": "0"}),
    "mkv": dict(gop=300, begin=0.5, options={"bf": "3"}),
    "webm": dict(gop=300, video="libvpx"),
    "ts": dict(gop=250, options={"bf": "3"}),
    "avi": dict(gop=300, video="mpeg4"),
}


@pytest.mark.parametrize("name", LONG)
def test_long_clips_are_reached_by_seeking(tmp_path, name):
    path = write(tmp_path / f"x.{name}", seconds=120, size=(104, 28), **LONG[name])
    for start, end, most in ((0, 120, 8), (0, 120, 64), (61.3, 64.3, 64), (100, 120, 2)):
        recipe = WIDE._replace(max_frames=most)
        clip = decode(tmp_path, recipe, video=path, start=start, end=end)
        count = len(clip.frames)
        assert count == min(most, (end - start) // 1 * 2)
        assert clip.fps == pytest.approx(count / (end - start), rel=1e-3)
        assert numbers(clip.frames) == on_show((start, end), count, 10)


@pytest.mark.parametrize("name", ["mp4", "mkv"])
def test_variable_frame_rate_goes_by_the_time_stamps(tmp_path, name):
    times = [0, 0.1, 0.2, 0.3, 2.0, 2.5, 2.6, 4.0, 4.05, 5.0, 5.9]
    path = write(tmp_path / f"x.{name}", times=times, options={"bf": "0"})
    clip = decode(tmp_path, video=path, start=0, end=6)
    length = len(clip.frames) / clip.fps
    middles = (np.arange(len(clip.frames)) + 0.5) / clip.fps
    assert 5.9 < length <= 6.01
    assert numbers(clip.frames) == (np.searchsorted(times, middles, side="right") - 1).tolist()


def turn(path, degrees):
    """Writes a rotation, clockwise, into the header of a one-track mp4, as phones do."""
    file = bytearray(path.read_bytes())
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    at = file.find(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version 0: times, ids, duration, reserved, layer
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    struct.pack_into(">9i", file, at, *matrix)
    path.write_bytes(file)


def corner(_, width, height):
    """Red at the top left, blue at the bottom left, grey elsewhere."""
    frame = np.full((height, width, 3), 120, np.uint8)
    frame[: height // 2, : width // 2] = 220, 40, 40
    frame[height // 2 :, : width // 2] = 50, 80, 230
    return frame


@pytest.mark.parametrize("name, degrees", [("mp4", 90), ("mov", 90), ("mp4", 180), ("mp4", 270)])
def test_rotation_in_the_metadata_is_applied(tmp_path, name, degrees):
    path = tmp_path / f"x.{name}"
    write(path, picture=corner, size=(112, 56), seconds=1)
    straight = decode(tmp_path, video=path.name).frames
    turn(path, degrees)
    turned = decode(tmp_path, video=path.name).frames
    assert straight.shape[2:] == (56, 112)
    assert torch.equal(turned, torch.rot90(straight, -degrees // 90, (2, 3)))


def test_broken_metadata_change_nothing(tmp_path):
    write(tmp_path / "x.mp4", seconds=1)
    straight = decode(tmp_path, video="x.mp4").frames
    file = (tmp_path / "x.mp4").read_bytes()
    at = file.find(b"tkhd") + 32
    (tmp_path / "zeros.mp4").write_bytes(file[:at] + bytes(36) + file[at + 36 :])  # the rotation
    title = b"Lavf" + file.split(b"Lavf")[1][:4]
    (tmp_path / "latin.mp4").write_bytes(file.replace(title, b"caf\xe9" * 2))
    for name in ("zeros.mp4", "latin.mp4"):
        assert torch.equal(decode(tmp_path, video=name).frames, straight)


def test_colours_survive_and_frames_shrink_to_the_pixel_limit(tmp_path):
    fine = {"preset": "ultrafast", "qp": "10"}
    write(tmp_path / "big.mp4", picture=corner, size=(3840, 2160), seconds=0.2, options=fine)
    recipe = RECIPE._replace(max_pixels=128 * 28 * 28)
    frames = decode(tmp_path, recipe, video="big.mp4").frames
    assert frames.shape == (2, 3, 224, 420)
    for y, x, color in ((50, 90, (220, 40, 40)), (170, 90, (50, 80, 230)), (90, 300, (120,) * 3)):
        assert (frames[0, :, y, x].int() - torch.tensor(color)).abs().max() <= 4


def test_pixels_that_are_not_square_are_shown_as_players_show_them(tmp_path):
    write(tmp_path / "x.mp4", size=(56, 56), seconds=1, options={"x264-params": "sar=2/1"})
    assert decode(tmp_path, video="x.mp4").frames.shape[2:] == (56, 112)


def test_a_size_that_changes_on_the_way(tmp_path):
    parts = [write(tmp_path / f"{w}.webm", video="libvpx", size=(w, 56)) for w in (104, 208)]
    with av.open(str(tmp_path / "x.webm"), "w") as out:
        for i, part in enumerate(parts):
            with av.open(str(tmp_path / part)) as container:
                stream = out.streams[0] if i else out.add_stream_from_template(container.streams[0])
                for packet in container.demux():
                    if packet.pts is not None:
                        packet.pts, packet.dts = packet.pts + 6000 * i, packet.dts + 6000 * i
                        packet.stream = stream
                        out.mux(packet)
    frames = decode(tmp_path, video="x.webm").frames
    assert frames.shape == (24, 3, 56, 112)  # as it begins
    assert numbers(frames) == on_show((0, 6), 12, 10) * 2


def test_frame_sizes_are_multiples_of_28_within_the_limit():
    assert frame_size(1920, 1080, 128 * 28 * 28) == [420, 224]
    assert frame_size(10, 10, 10**6) == [28, 28]  # never zero
    assert frame_size(640, 360, 10**6) == [644, 364]  # nearest, if there is room
    rng = random.Random(0)
    for _ in range(500):
        width, height, limit = rng.randint(1, 8000), rng.randint(1, 8000), rng.randint(784, 10**6)
        size = frame_size(width, height, limit)
        assert size[0] % 28 == size[1] % 28 == 0 and 0 < size[0] * size[1] <= limit


def test_the_frame_count_is_even_and_bounded(tmp_path):
    write(tmp_path / "x.mp4", seconds=5.3)
    for fps, most, count in ((2, 64, 10), (2, 7, 6), (0.1, 64, 2), (30, 16, 16)):
        clip = decode(tmp_path, WIDE._replace(fps=fps, max_frames=most), video="x.mp4")
        assert len(clip.frames) == count and clip.fps == pytest.approx(count / 5.3)
    clip = decode(tmp_path, video="x.mp4", end=6.2)  # annotations are rounded
    assert len(clip.frames) / clip.fps == pytest.approx(5.3)


# ---- sound -------------------------------------------------------------------------------------

SOUNDS = {
    "aac.mp4": dict(audio="aac"),
    "44k.mp4": dict(audio="aac", rate=44100, layout="stereo"),
    "44k.mkv": dict(audio="aac", rate=44100, layout="stereo", begin=2.0, sound_begin=2.0),
    "8k.mkv": dict(audio="pcm_s16le", rate=8000),
    "surround.mp4": dict(audio="aac", layout="5.1"),
    "ac3.mkv": dict(audio="ac3", layout="5.1"),
    "opus.webm": dict(audio="libopus", video="libvpx-vp9"),
    "mp3.avi": dict(audio="libmp3lame", video="mpeg4"),
    "ts": dict(audio="aac"),
    "no-edit-list.mp4": dict(audio="aac", options=B_FRAMES, muxer={"use_editlist": "0"}),
    "late-video.mp4": dict(audio="aac", begin=0.5),
    "late-sound.mp4": dict(audio="aac", sound_begin=0.5),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_the_sound_of_a_video_is_aligned_with_its_frames(tmp_path, name):
    how = SOUNDS[name]
    shift = how.get("sound_begin", 0) - how.get("begin", 0)  # of the sound, by the video's clock
    sound = bursts(6, how.get("rate", 48000), at=(1 - shift, 4 - shift))
    path = write(tmp_path / f"x.{name}", sound=sound, **how)
    # LAME in avi: nothing tells that the first 23 ms are the encoder's
    near = 0.03 if name == "mp3.avi" else 0.003
    for start, end, heard in ((None, None, (1, 4)), (0.5, 4.5, (0.5, 3.5)), (3.25, 5.75, (0.75,))):
        clip = decode(tmp_path, video=path, use_audio=True, start=start, end=end)
        assert len(clip.audio) / 16000 == pytest.approx(len(clip.frames) / clip.fps, abs=1e-3)
        assert clip.audio.dtype == np.float32
        assert onsets(clip.audio) == pytest.approx(heard, abs=near)


@pytest.mark.parametrize("seconds, heard", [(3.0, (1,)), (9.0, (1, 4))])
def test_a_track_is_padded_or_cut_to_the_span_of_the_video(tmp_path, seconds, heard):
    path = write(tmp_path / "x.mp4", audio="aac", sound=bursts(seconds, at=(1, 4)[: len(heard)]))
    clip = decode(tmp_path, video=path, use_audio=True)
    assert len(clip.audio) == 6 * 16000 and onsets(clip.audio) == pytest.approx(heard, abs=0.003)


def test_sound_in_a_long_video_is_reached_by_seeking(tmp_path):
    sound = bursts(60, at=range(60))
    for name, video, audio in (
        ("mp4", "libx264", "aac"),
        ("mkv", "libx264", "aac"),
        ("webm", "libvpx", "libopus"),
    ):
        how = dict(seconds=60, gop=300, size=(104, 28), video=video, audio=audio)
        path = write(tmp_path / f"x.{name}", sound=sound, **how)
        clip = decode(tmp_path, video=path, use_audio=True, start=40.75, end=43.25)
        assert numbers(clip.frames) == on_show((40.75, 43.25), len(clip.frames), 10)
        assert onsets(clip.audio) == pytest.approx((0.25, 1.25, 2.25), abs=0.003)


@pytest.mark.parametrize("name", ["flac.mkv", "mp3.mkv", "mp3.ts"])
def test_rounded_time_stamps_leave_no_gaps(tmp_path, name):
    tone = 0.5 * np.sin(2 * np.pi * TONE * np.arange(6 * 44100) / 44100)
    codec = "libmp3lame" if name.startswith("mp3") else "flac"
    path = write(tmp_path / f"x.{name}", audio=codec, rate=44100, sound=tone)
    audio = decode(tmp_path, video=path, use_audio=True, start=1, end=5).audio
    power = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
    near = slice(int(0.99 * TONE * 4), int(1.01 * TONE * 4))
    assert power[near].sum() / power.sum() > 1 - 1e-5  # clicks would be wide-band


@pytest.mark.parametrize("name, codec", [("mp4", "aac"), ("ogg", "libopus"), ("mkv", "mp3")])
def test_sound_is_whole_from_its_first_sample_on(tmp_path, name, codec):
    tone = 0.5 * np.sin(2 * np.pi * TONE * np.arange(20 * 48000) / 48000)
    path = write(tmp_path / f"x.{name}", video=None, audio=codec, sound=tone)
    for start in (12.0, 12.345):  # decoders need what comes before
        audio = decode(tmp_path, audio=path, start=start, end=13).audio
        assert np.abs(audio[:80]).max() == pytest.approx(0.5, abs=0.05)


AUDIO_FILES = {
    "wav": "pcm_s16le",
    "u8.wav": "pcm_u8",
    "s24.wav": "pcm_s24le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "m4a": "aac",
    "ogg": "libopus",
    "aac": "aac",
}


@pytest.mark.parametrize("name", AUDIO_FILES)
def test_sound_files(tmp_path, name):
    form, path = {"m4a": "ipod", "aac": "adts"}.get(name), tmp_path / f"x.{name}"
    write(path, video=None, audio=AUDIO_FILES[name], sound=bursts(30, at=(1, 21)), format=form)
    near = 0.03 if name == "aac" else 0.003  # bare AAC does not tell its priming
    for start, end, heard, length in (
        (None, None, (1, 21), 30),
        (0.5, 1.75, (0.5,), 1.25),
        (20.5, 22, (0.5,), 1.5),
        (20.75, None, (0.25,), 9.25),
    ):
        clip = decode(tmp_path, audio=f"x.{name}", start=start, end=end)
        assert onsets(clip.audio) == pytest.approx(heard, abs=near) and not clip.use_audio
        assert len(clip.audio) / 16000 == pytest.approx(length, abs=0.06)
        assert np.abs(clip.audio).max() == pytest.approx(0.5, abs=0.06)


def test_channels_are_averaged(tmp_path):
    left = np.stack([bursts(1, at=(0.5,)), np.zeros(48000)])
    for name, codec in (("wav", "pcm_s16le"), ("mp4", "aac")):
        write(tmp_path / f"x.{name}", video=None, audio=codec, layout="stereo", sound=left)
        audio = decode(tmp_path, audio=f"x.{name}").audio
        assert np.abs(audio).max() == pytest.approx(0.25, abs=0.02)


def test_a_cover_picture_is_no_video(tmp_path):
    write(tmp_path / "x.mp3", video=None, audio="libmp3lame", sound=bursts(3, at=(1,)))
    Image.new("RGB", (64, 64)).save(tmp_path / "c.jpg")
    picture = (tmp_path / "c.jpg").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(picture) + 14, 0) + b"\0image/jpeg\0\3\0" + picture
    size = len(frame)
    head = b"ID3\3\0\0" + bytes([(size >> s) & 127 for s in (21, 14, 7, 0)])
    (tmp_path / "cover.mp3").write_bytes(head + frame + (tmp_path / "x.mp3").read_bytes())
    with av.open(str(tmp_path / "cover.mp3")) as container:
        assert container.streams.video
    assert onsets(decode(tmp_path, audio="cover.mp3").audio) == pytest.approx((1,), abs=0.003)
    with pytest.raises(data.BadRow, match="r7.*cover.mp3 has no video stream"):
        decode(tmp_path, video="cover.mp3")


def test_a_silent_video_and_a_sound_file(tmp_path):
    write(tmp_path / "x.mp4")
    write(tmp_path / "x.wav", video=None, audio="pcm_s16le", sound=bursts(9, at=(1, 7)))
    clip = decode(tmp_path, video="x.mp4", audio="x.wav", use_audio=False)
    assert len(clip.frames) == 12 and len(clip.audio) == 9 * 16000 and not clip.use_audio
    assert onsets(clip.audio) == pytest.approx((1, 7), abs=0.003)


# ---- images ------------------------------------------------------------------------------------


def test_images_of_all_kinds(tmp_path):
    picture = Image.fromarray(corner(0, 140, 112))
    names = ["a.png", "a.jpg", "a.webp", "a.bmp", "50%d.png", "a%20b.jpg", "c:d.jpg", "e[1].png"]
    for name in names:
        picture.save(tmp_path / name, **(dict(quality=95) if name.endswith("jpg") else {}))
    picture.save(tmp_path / "jpeg.png", "JPEG", quality=95)  # a wrong name, as the web has them
    picture.convert("RGBA").save(tmp_path / "rgba.png")
    exif = Image.Exif()
    exif[0x112] = 6  # "turn me 90 degrees clockwise"
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    names += ["jpeg.png", "rgba.png", "turned.jpg"]
    clip = decode(tmp_path, RECIPE._replace(max_pixels=10**6), images=names)
    assert clip.frames is None and clip.audio is None
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1).int()
    for image in clip.images[:-1]:
        assert image.shape == (3, 112, 140) and image.dtype == torch.uint8
        assert (image.int() - whole)[:, 5:50, 5:60].abs().max() < 12
    assert (clip.images[-1].int() - whole.rot90(-1, (1, 2)))[:, 5:60, 60:100].abs().max() < 12


# ---- bad media ---------------------------------------------------------------------------------


def cut(path, share):
    """Keeps the first part of a file; one cut copy, its name."""
    name = f"cut-{path.name}"
    file = path.read_bytes()
    path.with_name(name).write_bytes(file[: int(share * len(file))])
    return name


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with good and bad files."""
    folder = tmp_path_factory.mktemp("media") / "set"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def noise(_, width, height):
        return rng.integers(0, 255, (height, width, 3), np.uint8)

    sound = rng.normal(0, 0.1, 48000 * 6)
    both, start = dict(picture=noise, sound=sound), {"movflags": "faststart"}
    for name, video, audio, muxer in (
        ("good.mp4", "libx264", "aac", {}),
        ("good.mov", "libx264", "aac", {}),
        ("start.mp4", "libx264", "aac", start),
        ("good.mkv", "libx264", "aac", {}),
        ("good.webm", "libvpx", "libopus", {}),
        ("live.webm", "libvpx", "libopus", {"live": "1"}),
        ("good.avi", "mpeg4", "libmp3lame", {}),
    ):
        write(folder / name, video=video, audio=audio, muxer=muxer, **both)
    write(folder / "good.wav", video=None, audio="pcm_s16le", sound=sound)
    write(folder / "good.flac", video=None, audio="flac", sound=sound)
    write(folder / "good.m4a", video=None, audio="aac", sound=sound, format="ipod", muxer=start)
    for name in ("good.jpg", "good.png"):
        Image.fromarray(noise(0, 140, 112)).save(folder / name)
    for path in list(folder.iterdir()):
        cut(path, 0.6)

    write(folder / "silent.mp4")
    write(folder / "tiny.mp4", size=(16, 16), seconds=0.1, picture=noise)
    Image.fromarray(noise(0, 3, 5)).save(folder / "tiny.png")
    write(folder / "short.wav", video=None, audio="pcm_s16le", sound=np.zeros(2000))
    write(folder / "odd.wav", video=None, audio="pcm_s16le", rate=11127, sound=sound[:20000])
    with wave.open(str(folder / "none.wav"), "wb") as file:
        file.setparams((1, 2, 48000, 0, "NONE", ""))
    write(folder / "raw.h264", format="h264")
    file = bytearray((folder / "start.mp4").read_bytes())
    file[len(file) // 2 : len(file) // 2 + 200] = rng.bytes(200)
    (folder / "damaged.mp4").write_bytes(file)
    file = (folder / "silent.mp4").read_bytes()
    (folder / "codec.mp4").write_bytes(file.replace(b"avc1", b"zzzz"))
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("<html>404 not found</html>\n" * 50)
    (folder / "noise.mp4").write_bytes(rng.bytes(5000))
    (folder / "folder.mp4").mkdir()
    write(folder.parent / "outside.mp4")
    write(folder.parent / "outside.ts")
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:6,\n../outside.ts\n#EXT-X-ENDLIST\n"
    (folder / "list.m3u8").write_text(playlist)
    return folder


BAD_MEDIA = [
    (dict(video="nowhere.mp4"), "no file at .*nowhere.mp4: paths are relative"),
    (dict(video="folder.mp4"), "no file at"),
    (dict(video="empty.mp4"), "empty.mp4 is empty: fetch it again"),
    (dict(video="text.mp4"), "does not open .*: fetch it again"),
    (dict(video="noise.mp4"), "does not open .*: fetch it again"),
    (dict(video="good.wav"), "has no video stream: drop the row, or give another file"),
    (dict(video="codec.mp4"), "unknown codec: re-encode it"),
    (dict(video="raw.h264"), "time stamp: re-encode it"),
    (dict(video="silent.mp4", use_audio=True), "has no audio stream: set use_audio to false"),
    (dict(audio="silent.mp4"), "has no audio stream"),
    (dict(video="cut-good.mp4"), "does not open .*: fetch"),  # the index was at the end
    (dict(video="cut-good.mov"), "does not open .*: fetch"),
    (dict(video="cut-start.mp4"), "ends .* s early|cannot be decoded"),
    (dict(video="cut-start.mp4", use_audio=True), "ends .* s early|cannot be decoded"),
    (dict(audio="cut-start.mp4"), "cut off|cannot be decoded"),
    (dict(video="cut-good.mkv"), "ends .* s early|cannot be decoded"),
    (dict(video="cut-good.avi"), "cut off, fetch"),
    (dict(audio="cut-good.wav"), "shorter than it tells: it is cut off"),
    (dict(audio="cut-good.m4a"), "cut off|cannot be decoded"),
    (dict(audio="cut-good.flac"), "cut off|cannot be decoded"),
    (dict(video="damaged.mp4"), "cannot be decoded .damaged at [23].[0-9] s.: fetch it again"),
    (dict(audio="odd.wav"), "11127 samples a second, no usual rate: re-encode"),
    (dict(audio="none.wav"), "does not open|nothing in it"),
    (dict(audio="short.wav"), "under 0.1 s of sound"),
    (dict(audio="good.wav", start=2.0, end=2.05), "under 0.1 s of sound"),
    (dict(video="good.mp4", start=7), "lasts 6.00 s, start 7, .*mend"),
    (dict(video="good.mp4", end=90), "lasts 6.00 s, .* end 90: mend"),
    (dict(audio="good.wav", start=90), "lasts 6.00 s, start 90"),
    (dict(audio="good.wav", end=90), "lasts 6.00 s"),
    (dict(images=["cut-good.jpg"]), "no whole image"),
    (dict(images=["cut-good.png"]), "no whole image|does not open"),
    (dict(images=["good.jpg", "good.wav"]), "no video stream"),
    (dict(images=["text.mp4"]), "does not open"),
    (dict(video="../outside.mp4"), "is not in the JSONL's folder: .*--allow-outside"),
    (dict(video="link.mp4"), "is not in the JSONL"),
    (dict(images=["/etc/passwd"]), "is not in the JSONL"),
    (dict(video="list.m3u8"), "is a playlist: give the media file itself"),
    (dict(video="loop.mp4"), "cannot be reached|no file at"),
    (dict(images=["data:image/png;base64," + "A" * 5000]), "cannot be reached .*: mend the path"),
]


@pytest.mark.parametrize("fields, words", BAD_MEDIA)
def test_bad_media_are_one_clear_line(media, fields, words):
    with pytest.raises(data.BadRow) as error:
        decode(media, RECIPE, **fields)
    line = str(error.value)
    assert line.startswith("row r7: ") and re.search(words, line) and "\n" not in line
    assert len(line.replace(str(media), "")) < 300


@pytest.mark.parametrize("fields", [dict(video="good.mp4", use_audio=True), dict(audio="good.m4a")])
def test_too_much_sound_names_the_flag(media, fields):
    recipe = RECIPE._replace(max_audio_seconds=4.0)
    words = "r7.*gives over 4 s of sound: raise --max-audio-seconds or set start and end"
    with pytest.raises(data.BadRow, match=words):
        decode(media, recipe, **fields)
    assert len(decode(media, recipe, start=1, end=5, **fields).audio) == 4 * 16000


def test_media_outside_the_folder_need_a_flag(media):
    allowed = RECIPE._replace(allow_outside=True)
    for path in ("../outside.mp4", "link.mp4", str(media.parent / "outside.mp4")):
        assert len(decode(media, allowed, video=path).frames) == 12
    (media.parent / "way").mkdir()
    (media.parent / "way" / "set").symlink_to(media)  # the folder itself may be a link
    assert len(decode(media.parent / "way" / "set", RECIPE, video="./good.mp4").frames) == 12


DAMAGED = ["good.mp4", "good.mkv", "good.webm", "good.avi", "good.jpg", "good.png", "good.m4a"]


def test_a_file_damaged_anywhere_is_a_clip_or_one_clear_line(media):
    rng, num_clips, num_lines = random.Random(0), 0, 0
    for name, trial in itertools.product(DAMAGED, range(6)):
        file = bytearray((media / name).read_bytes())
        for _ in range(1 + 20 * (trial % 2)):
            at = rng.randrange(len(file))
            file[at : at + 40] = rng.randbytes(len(file[at : at + 40]))
        (media / f"damaged-{name}").write_bytes(file)
        kind = {"jpg": "images", "png": "images", "m4a": "audio"}.get(name[5:], "video")
        try:
            decode(media, RECIPE, **{kind: f"damaged-{name}", "use_audio": kind == "video"})
            num_clips += 1
        except data.BadRow as problem:
            assert str(problem).startswith("row r7: ") and "\n" not in str(problem)
            num_lines += 1
    assert num_clips > 5 and num_lines > 5


# ---- rows --------------------------------------------------------------------------------------

OPTIONS = ["red", "green", "blue"]
BAD_ROWS = [
    (dict(question=""), "empty question"),
    (dict(question=["a"]), "question is .*: give it as text"),
    (dict(hint=3), "hint is 3: give it as text"),
    (dict(answer=""), "empty answer: give one"),
    (dict(answer=None), "empty answer"),
    (dict(answer=[], answer_type="multi"), "empty answer"),
    (dict(answer_type="essay"), "answer_type essay: one of choice, multi"),
    (dict(answer_type=["choice"]), "answer_type .*one of"),
    (dict(answer_type=None), "answer_type None"),
    (dict(answer="many"), "truth 'many' is no number.*: mend answer"),
    (
        dict(answer="D", answer_type="choice", options=OPTIONS),
        "truth 'D' is no choice answer.*mend",
    ),
    (dict(answer=3, answer_type="choice", options=OPTIONS), "truth 3 is no choice"),
    (dict(answer=["A", "F"], answer_type="multi", options=OPTIONS), "mend answer"),
    (dict(answer=["A"], answer_type="choice", options=OPTIONS), "a list is no choice answer"),
    (dict(answer={"a": 1}, answer_type="text"), "a dict is no text answer"),
    (dict(answer="a cat", answer_type="location"), "no location answer"),
    (dict(answer="maybe", answer_type="yesno"), "no yesno answer"),
    (dict(options="A. red B. blue"), "options 'A. red B. blue': give a list"),
    (dict(options=[1, None]), "options .*give a list"),
    (dict(options=["a", " "]), "options .*give a list"),
    (dict(options={"X": "a"}), "options .*A..J"),
    (dict(options={"a": "x", "A": "y"}), "options .*give a list"),
    (dict(options=list("abcdefghijk")), "of 1 to 10 texts"),
    (dict(options=5), "options 5: give a list"),
    (dict(options="{'red', 'blue'}"), "options .*give a list"),
    (
        dict(question="What does <|AUDIO|> say?"),
        "question holds the reserved <|AUDIO|>: remove it".replace("|", r"\|"),
    ),
    (dict(hint="see <|VIDEO|>"), "hint holds the reserved"),
    (dict(audio_caption="<|im_end|>"), "audio_caption holds the reserved"),
    (dict(reasoning="<|IMAGE|>"), "reasoning holds the reserved"),
    (dict(options=["a", "<|im_start|>"]), "option B holds the reserved"),
    (dict(answer="<|x1|>", answer_type="text"), "answer holds the reserved"),
    (dict(reasoning="so </think> 3"), "reasoning holds the reserved </think>: remove"),
    (dict(video=None), "no media: give video, audio or images"),
    (dict(video=["a.mp4"]), "media .*: give paths as text"),
    (dict(images=[{"path": "x"}]), "media .*: give paths as text"),
    (dict(video="a\0b.mp4"), "give paths as text"),
    (dict(use_audio="false"), "use_audio 'false': give true or false"),
    (dict(use_audio=True, audio="x.wav"), "use_audio is for sound in `video`"),
    (dict(use_audio=True, video=None, images=["x.png"]), "use_audio is for sound in `video`"),
    (dict(start=3, end=3), "start 3, end 3: give seconds, start before end"),
    (dict(start=3, end=2), "start before end"),
    (dict(start=-1), "start -1"),
    (dict(end=0), "end 0"),
    (dict(start="1:20"), "give seconds"),
    (dict(start=float("nan")), "start nan"),
    (dict(start=1e300), "give seconds"),
    (dict(useaudio=True), "unknown key 'useaudio': did you mean use_audio"),
    (dict(strat=1.0, end=2.0), "unknown key 'strat': did you mean start"),
    (dict(image="x.png"), "unknown key 'image': did you mean images"),
    (dict(Audio="x.wav"), "unknown key 'Audio': did you mean audio"),
    (dict(question="cut emoji \ud83d?"), r"a text has half a character, '\\ud83d': mend it"),
    (dict(video="\udc80.mp4"), "has half a character"),
]


@pytest.mark.parametrize("fields, words", BAD_ROWS)
def test_bad_rows_are_one_clear_line(fields, words):
    with pytest.raises(data.BadRow) as error:
        data.normalize_row(make_row(**{"video": "x.mp4", **fields}))
    line = str(error.value)
    assert re.match("'?row r7'?: ", line) and re.search(words, line) and "\n" not in line


def test_other_keys_are_nobodys_business():
    other = dict(question_id=7, video_id="x", answers=["a"], duration=3.0, category="color")
    row = data.normalize_row(make_row(video="x.mp4", **other))
    assert row == data.normalize_row(make_row(video="x.mp4")) | other


GOOD_ROWS = [  # answer_type, answer, options, the answer as text
    ("choice", "B", OPTIONS, "B"),
    ("choice", "green", OPTIONS, "green"),  # as the row writes it: what stage 0 teaches
    ("choice", " b. green\n", OPTIONS, "b. green"),
    ("choice", 1, OPTIONS, "B"),
    ("choice", 0, ["A. x", "B. y"], "A"),
    ("choice", "C", None, "C"),  # the options stand in the question
    ("choice", "E", {"D": "red", "E": "blue"}, "E"),
    ("choice", "b", "['red', 'green']", "b"),  # IntentBench
    ("choice", 2, [1, 2, 3.5], "C"),
    ("choice", 0, ["B", "A"], "B"),  # options that are letters: their text wins, as in rewards.py
    ("multi", ["A", "blue"], OPTIONS, "A, C"),
    ("multi", [0, 2], OPTIONS, "A, C"),
    ("multi", "CA", OPTIONS, "CA"),
    ("number", 3, None, "3"),
    ("number", 2.5, None, "2.5"),
    ("number", " 1,000 m ", [], "1,000 m"),
    ("yesno", "Yes", None, "Yes"),
    ("yesno", True, None, "True"),
    ("text", "A cat", None, "A cat"),
    ("location", "left: cat | right: dog", None, "left: cat | right: dog"),
]


@pytest.mark.parametrize("kind, answer, options, text", GOOD_ROWS)
def test_answers_become_text_that_scores_one(kind, answer, options, text):
    row = data.normalize_row(
        make_row(video="x.mp4", answer=answer, answer_type=kind, options=options)
    )
    assert row["answer"] == text
    assert rewards.accuracy_reward(text, row["answer"], kind, row["options"]) == 1
    taught = data.completion_text(dict(row, reasoning="because"))
    assert rewards.parse_answer(taught) == text and taught.startswith("<think>because</think>")
    if not isinstance(options, str):
        assert rewards.accuracy_reward(text, answer, kind, row["options"]) == 1


@pytest.mark.parametrize(
    "options, line",
    [
        (["red", "blue"], "A. red B. blue"),
        (["A. red", "B. blue"], "A. red B. blue"),
        (["(A) red", "(B) blue"], "A. red B. blue"),
        # not every option has its own letter before it: none is a prefix
        (["A. red", "blue"], "A. A. red B. blue"),
        (["B. red", "A. blue"], "A. B. red B. A. blue"),
        ({"a": "red", "C": "blue"}, "A. red C. blue"),
        ({"A": "A: red", "C": "C: blue"}, "A. red C. blue"),
        ([1, 2], "A. 1 B. 2"),
    ],
)
def test_the_question_shows_options_as_the_scorer_reads_them(options, line):
    choice = dict(question="Which?", answer="A", answer_type="choice", options=options)
    row = data.normalize_row(make_row(video="x.mp4", **choice))
    assert data.question_text(row, None, True) == f"Which?\n{line}\nAnswer with one option."
    for letter, text in data.option_table(row["options"]).items():
        assert f"{letter}. {text}" in line
        assert rewards.accuracy_reward(text, letter, "choice", row["options"]) == 1


def test_hint_and_caption_stand_before_the_question():
    row = data.normalize_row(make_row(video="x.mp4", audio_caption="a bell"))
    plain = "How many?\nAnswer with a number."
    assert data.question_text(row, None, False) == plain
    assert data.question_text(row, "look up", True) == f"Hint: look up.\nSound: a bell.\n{plain}"


# Rows of Video-R1-260k and -COT-165k, AVQA-R1-6K and IntentTrain as they are published.
VIDEO_R1 = dict(
    problem_id=2,
    problem="What appears on the screen in Russian during the missile's ascent?",
    data_type="video",
    problem_type="multiple choice",
    options=["A. A YouTube subscribe button", "B. A Facebook like button"],
    process="<think>\nA button appears.\n</think>",
    solution="<answer>A</answer>",
    path="./LLaVA-Video-178K/academic/1.mp4",
    data_source="LLaVA-Video-178K",
)
AVQA_PATH = {"image": "i.jpg", "audio": "a.wav"}
INTENT_PATH = {"video": "v.mp4", "audio": "a.wav"}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, dict(video="./LLaVA-Video-178K/academic/1.mp4", images=[])),
        ({}, dict(answer="A", answer_type="choice", reasoning="A button appears.")),
        (dict(data_type="image", path="./a/1.png", process=None), dict(images=["./a/1.png"])),
        (dict(data_type="image_audio", path=AVQA_PATH), dict(images=["i.jpg"], audio="a.wav")),
        (dict(path=INTENT_PATH), dict(video="v.mp4", audio="a.wav")),
    ],
)
def test_video_r1_rows_load_as_they_are(fields, expected):
    row = data.normalize_row({**VIDEO_R1, **fields})
    assert row["prompt_id"] == "2" and row["question"] == VIDEO_R1["problem"]
    assert {key: row[key] for key in expected} == expected
    asked = data.question_text(row, None, False)
    assert "\nA. A YouTube subscribe button B. A Facebook like button\n" in asked


@pytest.mark.parametrize(
    "problem_type, solution, answer_type",
    [
        ("numerical", "42", "number"),
        ("regression", "3.50", "number"),
        ("free-form", "a red car", "text"),
        ("OCR", "EXIT 12", "text"),
        ("judge", "Yes", "yesno"),
        ("emer_ov_mc", "A,B", "multi"),
    ],
)
def test_problem_types_of_video_r1(problem_type, solution, answer_type):
    fields = dict(problem_type=problem_type, options=[], solution=f"<answer>{solution}</answer>")
    row = data.normalize_row({**VIDEO_R1, **fields})
    assert (row["answer"], row["answer_type"], row["options"]) == (solution, answer_type, None)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(problem_type="essay"), "problem_type essay: one of multiple choice"),
        (dict(problem_type=None), "problem_type None"),
        (dict(data_type="text"), "data_type text: one of video, audio, image"),
        (dict(path=None), "no media"),
        (dict(solution="<answer></answer>"), "empty answer"),
        (dict(solution="<answer>Q</answer>"), "mend answer"),
    ],
)
def test_bad_video_r1_rows(fields, words):
    with pytest.raises(data.BadRow, match=f"row 2: .*{words}"):
        data.normalize_row({**VIDEO_R1, **fields})


# ---- the file ----------------------------------------------------------------------------------


def test_a_large_file_stays_on_the_disk(tmp_path):
    """Offsets and hashes: under 100 bytes a row, whatever the rows hold."""
    count, text = 20_000, "why " * 100
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i in range(count):
            row = make_row(prompt_id=f"q{i}", question=text, video="x.mp4")
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    rows = data.Rows(tmp_path / "rows.jsonl")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count and rows[rows.index("q777")]["prompt_id"] == "q777"
    assert held < 100 * count and peak < 200 * count < (tmp_path / "rows.jsonl").stat().st_size


def test_rows_are_found_by_number_and_by_id(tmp_path):
    rows = [
        make_row(
            prompt_id=f"é{i}" if i % 2 else i, video=f"{i}.mp4", question="Wie viel?" * i + "ü"
        )
        for i in range(200)
    ]
    lines = [json.dumps(row, ensure_ascii=bool(i % 3)) for i, row in enumerate(rows)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        "\r\n\n".join(["\ufeff" + lines[0], *lines[1:]]).encode()
    )  # BOM, CRLF, blank lines, no end
    table = data.Rows(path)
    assert len(table) == 200 and len(list(table)) == 200
    for i in (0, 1, 150, 199, -1):
        assert table[i]["video"] == rows[i]["video"] and table[i]["question"] == rows[i]["question"]
        assert table.index(str(rows[i]["prompt_id"])) == i % 200
    with pytest.raises(data.BadRow, match="has no row 'é2'"):
        table.index("é2")
    held = table.offsets.nbytes + table.hashes.nbytes + table.order.nbytes
    assert held == 24 * len(table)  # 24 MB for 10^6 rows, whatever their length


@pytest.mark.parametrize(
    "lines, words",
    [
        ([make_row(), "{'a': 1}"], "x.jsonl:2: not JSON .*: write one object a line"),
        ([make_row(), "", '{"prompt_id": '], "x.jsonl:3: not JSON"),
        (["[" * 100000], "x.jsonl:1: not JSON"),
        (["\udcff"], "x.jsonl:1: not JSON"),
        ([[make_row()]], "x.jsonl:1: a list, no object: write one a line"),
        ([make_row(), dict(question="?")], "x.jsonl:2: prompt_id is None: give every row a unique"),
        ([make_row(prompt_id="")], "x.jsonl:1: prompt_id is ''"),
        ([make_row(prompt_id="two\nlines")], "x.jsonl:1: prompt_id is 'two"),
        (
            [make_row(prompt_id=5), make_row(), make_row(prompt_id="5")],
            "prompt_id '5' occurs twice: make ids unique",
        ),
        ([], "has no rows: give a JSONL"),
        (None, "no data file at .*x.jsonl: give a JSONL file"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, lines, words):
    path = tmp_path / "x.jsonl"
    if lines is not None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_bytes("".join(text + "\n" for text in texts).encode(errors="surrogateescape"))
    with pytest.raises(data.BadRow, match=words):
        data.Rows(path)


def test_a_folder_and_utf16_are_named_as_such(tmp_path):
    with pytest.raises(data.BadRow, match="a folder, no data file at"):
        data.Rows(tmp_path)
    path = tmp_path / "x.jsonl"
    rows = "\n".join(json.dumps(make_row(prompt_id=name)) for name in "ab")
    path.write_text(rows, encoding="utf-16")
    with pytest.raises(data.BadRow, match="x.jsonl:1: not JSON in UTF-8"):
        data.Rows(path)


def test_check_names_every_bad_row_and_counts(media):
    rows = [
        make_row(prompt_id="a", video="good.mp4", use_audio=True),
        make_row(prompt_id="b", video="nowhere.mp4"),
        "not json",
        make_row(prompt_id="a", video="good.mp4"),
        make_row(prompt_id="c", video="silent.mp4", use_audio=True),
        make_row(prompt_id="d", audio="good.wav", answer="?"),
        dict(question="?"),
        make_row(prompt_id="e", video="../outside.mp4"),
        make_row(prompt_id="f", images=["good.png"]),
    ]
    path = write_jsonl(media / "rows.jsonl", rows[:4] + [""] + rows[4:])
    lines = launch("data.py", "check", path, code=1).splitlines()
    begins = [
        "2: row b: no file at",
        "3: not JSON",
        "4: row a: the id occurs twice: make ids unique",
        "6: row c: silent.mp4 has no audio stream",
        "7: row d: truth '?'",
        "8: prompt_id is None",
        "9: row e: ../outside.mp4 is not in",
    ]
    for line, begin in zip(lines, begins):
        assert line.replace(f"{media}/", "").startswith(f"rows.jsonl:{begin}")
    assert lines[7:] == ["9 rows, 7 would not train"]
    assert data.check(path, RECIPE) == (9, lines[:7])
    fine = write_jsonl(media / "fine.jsonl", [rows[0], rows[7]])
    told = launch("data.py", "check", fine, "--allow-outside", "--workers", 1)
    assert told == "2 rows, 0 would not train\n"


def test_check_counts_tokens_with_a_model(media, toy_dir):
    rows = [
        make_row(prompt_id="a", video="good.mp4"),
        make_row(prompt_id="b", images=["good.png"], question="why " * 300),
        make_row(prompt_id="c", images=["good.png"], hint="why " * 300),
    ]
    path = write_jsonl(media / "long.jsonl", rows)
    check = ["data.py", "check", path, "--model", toy_dir / "model"]
    assert launch(*check).endswith("3 rows, 0 would not train\n")
    *lines, last = launch(*check, "--max-prompt-tokens", 400, code=1).splitlines()
    assert last == "3 rows, 2 would not train" and len(lines) == 2
    for line, name in zip(lines, "bc"):
        assert f"row {name}: " in line
        assert "over --max-prompt-tokens 400: lower --max-frames" in line


def test_check_ends_in_one_line(media, tmp_path):
    path = write_jsonl(media / "one.jsonl", [make_row(video="good.mp4")])
    for flags, words in (
        ([path, "--max-frames", 1], "data.py: --max-frames 1: at least 2 is needed"),
        ([path, "--model", tmp_path / "none"], "data.py: no Qwen2.5-Omni model at .*none: .*"),
        ([tmp_path / "none.jsonl"], "data.py: no data file at .*none.jsonl: .*"),
        ([write_jsonl(media / "no.jsonl", [])], "0 rows, 0 would not train"),
    ):
        assert re.fullmatch(words, launch("data.py", "check", *flags, code=1).strip())


# ---- through the model's inputs ----------------------------------------------------------------


@pytest.fixture(scope="module")
def build(media, toy_dir):
    return model.InputBuilder(toy_dir / "model", RECIPE, media, audio_captions=False)


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
    row = data.normalize_row(make_row(**fields))
    clip, prompt = data.decode_clip(row, media, RECIPE), build(row)

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
    other = data.normalize_row(make_row(**fields, prompt_id="other", question="Why, then?"))
    for asked, hint in ((row, None), (other, "look left")):
        retold, fresh = build.with_text(prompt, asked, hint), build(asked, hint)
        assert torch.equal(retold.input_ids, fresh.input_ids)
        assert torch.equal(retold.position_ids, fresh.position_ids)
        assert retold.media is prompt.media and build.key(other) == build.key(row)


def test_positions_tell_the_real_time_of_a_long_clip(build, tmp_path):
    write(tmp_path / "x.mp4", seconds=60, size=(56, 56), audio="aac", sound=bursts(60))
    build = build.at(tmp_path)
    build.recipe = RECIPE._replace(max_audio_seconds=60.0)
    for use_audio in (False, True):
        prompt = build(data.normalize_row(make_row(video="x.mp4", use_audio=use_audio)))
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
    rows = [data.normalize_row(row) for row in rows]
    alone = [build(row) for row in rows]
    reader = stream.Reader(build, 3, 10**9)
    for row in rows:
        reader.prefetch(row)
    for row, prompt in zip(rows, alone):
        again = reader.get(row)
        assert torch.equal(again.input_ids, prompt.input_ids)
        assert torch.equal(again.position_ids, prompt.position_ids)
        for name, tower in prompt.media.items():
            assert all(torch.equal(again.media[name][key], value) for key, value in tower.items())


def test_prompts_over_the_limit_name_the_flags(build):
    row = data.normalize_row(make_row(video="good.mp4", question="why " * 3000))
    words = "row r7: .* prompt tokens, over --max-prompt-tokens 2048: lower --max-frames"
    with pytest.raises(data.BadRow, match=words):
        build(row)
