"""
Clips, on media files whose frames and sounds tell the time.

    python -m pytest tests/test_clips.py
"""

import itertools
import random
import re
import struct
import zlib

import av
import numpy as np
import pytest
import torch
from conftest import RECIPE
from media_files import (
    BAD_MEDIA,
    TONE,
    WIDE,
    bursts,
    decode,
    make_row,
    numbers,
    on_show,
    onsets,
    write,
)
from PIL import Image, ImageOps

from data.clips import BadRow, frame_size
from data.rows import normalize_row

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


@pytest.mark.parametrize("seconds, heard", [(3.0, (1,)), (6.5, (1, 4))])
def test_a_track_is_padded_or_cut_to_the_span_of_the_video(tmp_path, seconds, heard):
    path = write(tmp_path / "x.mp4", audio="aac", sound=bursts(seconds, at=(1, 4)[: len(heard)]))
    clip = decode(tmp_path, video=path, use_audio=True)
    assert len(clip.audio) == 6 * 16000 and onsets(clip.audio) == pytest.approx(heard, abs=0.003)


@pytest.mark.parametrize("name, num_frames", [("mp4", 1), ("mp4", 4), ("mkv", 1), ("ts", 4)])
def test_the_last_frame_stays_while_the_sound_goes_on(tmp_path, name, num_frames):
    times = np.array([0, 0.1, 0.2, 1.9])[:num_frames]
    path = write(tmp_path / f"x.{name}", audio="aac", sound=bursts(9, at=(1, 7)), times=times)
    for use_audio in (True, "auto"):
        clip = decode(tmp_path, video=path, use_audio=use_audio)
        assert len(clip.audio) / 16000 == pytest.approx(9, abs=0.1)
        assert len(clip.audio) / 16000 == pytest.approx(len(clip.frames) / clip.fps, abs=1e-3)
        assert onsets(clip.audio) == pytest.approx((1, 7), abs=0.003)
        assert numbers(clip.frames)[-8:] == [num_frames - 1] * 8
    clip = decode(tmp_path, video=path, use_audio=True, start=6.5, end=8.5)
    assert numbers(clip.frames) == [num_frames - 1] * 4
    assert onsets(clip.audio) == pytest.approx((0.5,), abs=0.003)
    mute = decode(tmp_path, video=path, use_audio=False)
    assert len(mute.frames) / mute.fps < 2.2


def test_a_seek_may_lead_into_the_middle_of_a_frame(tmp_path):
    """Program streams: what is left of a cut-off frame of sound cannot be decoded."""
    how = dict(video="mpeg2video", audio="mp2", format="mpeg", fps=25, seconds=14)
    write(tmp_path / "x.mpg", sound=bursts(14, at=range(1, 14)), **how)
    for start in (9.25, 10.25, 11.25, 12.25):
        clip = decode(tmp_path, video="x.mpg", use_audio=True, start=start, end=start + 1.5)
        assert onsets(clip.audio) == pytest.approx((0.75,), abs=0.03)


@pytest.mark.parametrize("sample", [np.nan, np.inf, 1e29])
def test_samples_that_are_no_sound(tmp_path, sample):
    samples = np.zeros(16000, "<f4")
    samples[5000] = sample
    form = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)  # 3: float
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 64000)
    data = b"RIFF" + struct.pack("<I", len(chunks) + 64000) + chunks + samples.tobytes()
    (tmp_path / "x.wav").write_bytes(data)
    with pytest.raises(BadRow, match="r7.*x.wav has samples that are NaN or above 1e\\+09"):
        decode(tmp_path, audio="x.wav")


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
    with pytest.raises(BadRow, match="r7.*cover.mp3 has no video stream"):
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


MODES = {  # name -> (mode of PIL, what save() takes)
    "grey.png": ("L", {}),
    "bits.png": ("1", {}),
    "palette.png": ("P", {}),
    "rgb.png": ("RGB", {}),
    "alpha.png": ("RGBA", {}),
    "alpha.webp": ("RGBA", dict(lossless=True, exact=True)),
    "grey-alpha.png": ("LA", {}),
    "palette-alpha.png": ("P", dict(transparency=0)),
    "grey-key.png": ("L", dict(transparency=0)),
    "rgb-key.png": ("RGB", dict(transparency=(0, 0, 0))),
    "grey.jpg": ("L", dict(quality=95)),
    "cmyk.jpg": ("CMYK", dict(quality=95)),
    "alpha.gif": ("P", dict(transparency=0)),
}


def with_white_ground(image):
    """A picture as the models' own loaders read it: transparency is put on white."""
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    if "A" not in image.getbands():
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, (255, 255, 255))
    ground.paste(image, mask=image.getchannel("A"))
    return ground


@pytest.mark.parametrize("name", MODES)
def test_picture_modes_are_read_as_by_the_models_own_loader(tmp_path, name):
    """Black and coloured bars on a ground that is transparent where the mode has transparency."""
    mode, options = MODES[name]
    pixels = np.zeros((112, 140, 4), np.uint8)
    pixels[:, 20:60] = (0, 0, 0, 255)  # black, opaque
    pixels[:, 60:100] = (200, 60, 40, 255)
    pixels[:, 100:120] = (40, 60, 200, 128)  # half transparent
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture = picture.convert("RGB").quantize(8)
    elif mode != "RGBA":
        picture = (picture if mode == "LA" else picture.convert("RGB")).convert(mode)
    picture.save(tmp_path / name, **options)
    clip = decode(tmp_path, RECIPE._replace(max_pixels=10**6), images=[name])
    with Image.open(tmp_path / name) as image:
        expected = np.array(with_white_ground(image))
    ours = clip.images[0].permute(1, 2, 0).numpy()
    middles = [10, 40, 80, 110]  # of the bars
    difference = np.abs(ours[50, middles].astype(int) - expected[50, middles])
    assert difference.max() <= (8 if name.endswith("jpg") else 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_and_mirrored_as_their_exif_says(tmp_path, orientation):
    picture = Image.fromarray(corner(0, 140, 112))
    exif = Image.Exif()
    exif[0x112] = orientation
    for name in ("a.jpg", "a.png", "a.webp"):
        options = {} if name == "a.png" else dict(quality=95)
        picture.save(tmp_path / name, exif=exif, **options)
        clip = decode(tmp_path, RECIPE._replace(max_pixels=10**6), images=[name])
        with Image.open(tmp_path / name) as image:
            expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        ours = clip.images[0].permute(1, 2, 0).numpy()
        assert ours.shape == expected.shape
        assert np.abs(ours.astype(int) - expected).mean() < 2


def test_pictures_that_ffmpeg_reads_only_in_part(tmp_path):
    """AVIF keeps transparency in a stream of its own; TIFF may hold a JPEG, WebP an animation."""
    pixels = np.zeros((112, 140, 4), np.uint8)
    pixels[:, 60:] = (0, 0, 0, 255)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.avif", quality=95)
    picture.save(
        tmp_path / "a.webp", save_all=True, append_images=[Image.new("RGBA", picture.size)]
    )
    ground = with_white_ground(picture)
    ground.save(tmp_path / "a.tif", compression="jpeg")
    for name in ("a.avif", "a.webp", "a.tif"):
        (image,) = decode(tmp_path, RECIPE._replace(max_pixels=10**6), images=[name]).images
        assert image[:, :, 5:50].min() > 247 and image[:, :, 70:135].max() < 8, name

    # as HEIC of a phone, whose tiles are streams: PIL does not read it
    with av.open(str(tmp_path / "a.heic"), "w", format="mp4") as container:
        for _ in range(2):
            stream = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for stream in container.streams.video:
            picture = np.zeros((64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    with pytest.raises(BadRow, match="r7.*a.heic is a picture in several parts: convert it"):
        decode(tmp_path, images=["a.heic"])


def test_pictures_larger_than_the_limit_of_pil(tmp_path):
    Image.new("1", (15000, 12000)).save(tmp_path / "phone.png")
    (image,) = decode(tmp_path, images=["phone.png"]).images
    assert image.max() == 0
    content = bytearray((tmp_path / "phone.png").read_bytes())
    content[16:24] = struct.pack(">II", 40000, 30000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "huge.png").write_bytes(content)
    with pytest.raises(BadRow, match="r7.*huge.png has 1200 million pixels: make it smaller"):
        decode(tmp_path, images=["huge.png"])


def test_sound_is_taken_where_there_is_some(media, tmp_path):
    """use_audio "auto": a track is heard; without one, or with none in the span, there is no sound."""
    clip = decode(media, RECIPE, video="good.mp4", use_audio="auto")
    heard = decode(media, RECIPE, video="good.mp4", use_audio=True)
    assert clip.use_audio and np.array_equal(clip.audio, heard.audio)
    clip = decode(media, RECIPE, video="silent.mp4", use_audio="auto")
    assert not clip.use_audio and clip.audio is None and clip.sounds == []
    write(tmp_path / "short.mkv", seconds=6.0, audio="aac", sound=bursts(2, at=(1,)))
    clip = decode(tmp_path, RECIPE, video="short.mkv", use_audio="auto", start=4)
    assert not clip.use_audio and len(clip.frames) == 4
    with pytest.raises(BadRow, match="no sound after"):
        decode(tmp_path, RECIPE, video="short.mkv", use_audio=True, start=4)
    with pytest.raises(BadRow, match="cut off|cannot be decoded|ends .* s early"):
        decode(media, RECIPE, video="cut-start.mp4", use_audio="auto")  # broken stays broken
    for fields in (dict(images=["good.png"]), dict(video="good.mp4", audio="good.wav")):
        row = normalize_row(make_row(use_audio="auto", **fields))
        assert row["use_audio"] is False  # nothing of its own to be heard


# ---- bad media ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, words", BAD_MEDIA)
def test_bad_media_are_one_clear_line(media, fields, words):
    with pytest.raises(BadRow) as error:
        decode(media, RECIPE, **fields)
    line = str(error.value)
    assert line.startswith("row r7: ") and re.search(words, line) and "\n" not in line
    assert len(line.replace(str(media), "")) < 300


@pytest.mark.parametrize("fields", [dict(video="good.mp4", use_audio=True), dict(audio="good.m4a")])
def test_too_much_sound_names_the_flag(media, fields):
    recipe = RECIPE._replace(max_audio_seconds=4.0)
    words = "r7.*gives over 4 s of sound: raise --max-audio-seconds or set start and end"
    with pytest.raises(BadRow, match=words):
        decode(media, recipe, **fields)
    assert len(decode(media, recipe, start=1, end=5, **fields).audio) == 4 * 16000


def test_media_outside_the_folder_need_a_flag(media):
    allowed = RECIPE._replace(allow_outside=True)
    for path in ("../outside.mp4", str(media.parent / "outside.mp4")):
        assert len(decode(media, allowed, video=path).frames) == 12
    assert len(decode(media, RECIPE, video="link.mp4").frames) == 12  # a link is followed
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
        except BadRow as problem:
            assert str(problem).startswith("row r7: ") and "\n" not in str(problem)
            num_lines += 1
    assert num_clips > 5 and num_lines > 5
