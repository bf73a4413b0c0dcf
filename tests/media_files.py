"""
Media files that tell the time: every frame shows its own number as black and white columns; the sound
has tones at known times. And a folder of good and bad ones.
"""

import json
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data.clips import MediaConfig, decode_clip
from data.rows import normalize_row

RECIPE = MediaConfig(
    fps=2.0, max_frames=16, max_pixels=56 * 56, max_audio_seconds=8.0, max_prompt_tokens=2048
)
BITS = 11  # of a frame's number, and then a white column and a black one
WIDE = RECIPE._replace(
    max_frames=64, max_pixels=112 * 112, max_audio_seconds=120.0, max_prompt_tokens=4096
)
TONE = 1000.0  # Hz


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


def write_video(
    container,
    codec,
    options,
    *,
    fps=10,
    seconds=6.0,
    size=(104, 56),
    gop=12,
    times=None,
    begin=0.0,
    picture=stamp,
):
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
    return decode_clip(normalize_row(make_row(**fields)), folder, recipe)


def write_jsonl(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def on_show(span, count, fps):
    """The numbers of the frames in the middle of `count` equal parts of a span, by hand."""
    start, end = span
    return [int((start + (i + 0.5) * (end - start) / count) * fps + 1e-6) for i in range(count)]


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
    (dict(audio="cut-good.wav"), "shorter than .* it is cut off"),
    (dict(audio="cut-good.m4a"), "cut off|cannot be decoded"),
    (dict(audio="cut-good.flac"), "cut off|cannot be decoded"),
    (dict(video="damaged.mp4"), "cannot be decoded .damaged at [23].[0-9] s.: fetch it again"),
    (dict(audio="odd.wav"), "11127 samples per second.*re-encode"),
    (dict(audio="none.wav"), "does not open|nothing in it"),
    (dict(audio="short.wav"), "under 0.1 s of sound"),
    (dict(audio="good.wav", start=2.0, end=2.05), "under 0.1 s of sound"),
    (dict(video="good.mp4", start=7), "lasts 6.00 s, start 7, .*mend"),
    (dict(video="good.mp4", end=90), "lasts 6.00 s, .* end 90: mend"),
    (dict(audio="good.wav", start=90), "lasts 6.00 s, start 90"),
    (dict(audio="good.wav", end=90), "lasts 6.00 s"),
    (dict(images=["cut-good.jpg"]), "cut-good.jpg is cut off"),
    (dict(images=["cut-good.png"]), "is cut off|does not open"),
    (dict(images=["good.jpg", "good.wav"]), "no video stream"),
    (dict(images=["text.mp4"]), "does not open"),
    (dict(video="../outside.mp4"), "is not in the JSONL's folder: .*--allow-outside"),
    (
        dict(video="https://x.org/a.mp4"),
        "r7: https://x.org/a.mp4 is a URL: not fetched: download it",
    ),
    (dict(images=["/etc/passwd"]), "is not in the JSONL"),
    (dict(video="list.m3u8"), "is a playlist: give the media file itself"),
    (dict(video="loop.mp4"), "cannot be reached|no file at"),
    (dict(images=["data:image/png;base64," + "A" * 5000]), "cannot be reached .*: mend the path"),
]
