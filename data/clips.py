"""
A media file -> frames, sound or a picture as tensors, true to its time stamps. Copy it freely.

What cannot be decoded as a row asks is an error that names the row and the remedy: there is no
substitute for a clip.

T frames, H height, W width, S audio samples. Seconds count from the file's first frame, or from
its first sample where only its sound is wanted; time stamps need not begin at 0.
"""

import math
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# torch and torchaudio take seconds to load: they are imported where a clip is decoded, so that a
# command can refuse a mistyped flag at once
try:  # where no clip is decoded nobody needs it
    import av
except ModuleNotFoundError:
    av = None

AUDIO_RATE = 16000  # samples/s, what the audio tower hears
SEEK_AHEAD = 8.0  # seconds; what is wanted further ahead than this is reached by seeking
PREROLL = 0.5  # seconds decoded before the sound wanted: codecs start blurred
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
SLACK = 1.0  # seconds by which an `end` may pass a file's, and the told end of a file its real one


class BadRow(ValueError):
    """A row that cannot be used as it is; the message names the row and the remedy."""


class MediaConfig(NamedTuple):
    """How a clip becomes tensors; part of every cache key and of every score."""

    fps: float  # frames/s wanted; fewer when max_frames binds
    max_frames: int  # even: the tower merges frames in pairs
    max_pixels: int  # per frame, after resizing
    max_audio_seconds: float
    max_prompt_tokens: int
    allow_outside: bool = False  # whether media may lie outside the JSONL's folder
    side: int = 28  # sides of frames are multiples of it: the model's, no flag


class Clip(NamedTuple):
    """A decoded row. A video and its own sound cover the same span of time."""

    frames: Any  # (T, 3, H, W) uint8 tensor or None
    fps: float | None  # of the frames really taken: T / span
    audio: np.ndarray | list | None  # (S,) float32 at 16 kHz; a list of them if the row has one
    images: list  # of (3, H, W) uint8
    use_audio: bool  # the audio is the video's own, interleaved with it in time

    @property
    def sounds(self):
        """All sounds, as a list."""
        return [self.audio] if isinstance(self.audio, np.ndarray) else self.audio or []

    def in_order(self, pieces):
        """With pictures and sounds in the order in which pieces {"type", "index"} of a text name them."""
        images, audio = (
            [piece["index"] for piece in pieces if piece["type"] == kind]
            for kind in ("image", "audio")
        )
        audio = self.audio if self.use_audio else [self.sounds[i] for i in audio]
        return self._replace(images=[self.images[i] for i in images], audio=audio)


def decode_clip(row, folder, recipe):
    """
    A row -> its Clip.

    row      dict              as `data.normalize_row` returns it
    folder   Path              that media paths are relative to
    raises   BadRow            a file is missing, has no such stream, is cut off or cannot be read
    """
    name, use_audio = f"row {row['prompt_id']}", bool(row.get("use_audio"))
    start, end = row.get("start"), row.get("end")
    paths = [find_media(name, folder, path, recipe) for path in row.get("images") or []]
    images = [decode_image(path, name, recipe) for path in paths]
    frames = fps = audio = None
    if row.get("video"):
        path = find_media(name, folder, row["video"], recipe)
        frames, fps, span = decode_video(path, name, start, end, recipe)
        if use_audio:
            audio = decode_audio(path, name, *span, recipe, of_video=True)
    if row.get("audio"):
        several = isinstance(row["audio"], list)
        paths = row["audio"] if several else [row["audio"]]
        paths = [find_media(name, folder, path, recipe) for path in paths]
        sounds = [decode_audio(path, name, start, end, recipe, of_video=False) for path in paths]
        audio = sounds if several else sounds[0]
    return Clip(frames, fps, audio, images, use_audio)


# ---- files and streams -------------------------------------------------------------------------


def find_media(name, folder, path, recipe):
    """
    -> the file's path; BadRow if it is not there, not in the folder, or cut off. A link in the folder
    is followed wherever it leads: who put it there wants that.
    """
    if URL.match(path):
        raise BadRow(f"{name}: {path[:99]} is a URL: not fetched: download it and give its path")
    whole = Path(folder) / path
    outside = not Path(os.path.abspath(whole)).is_relative_to(os.path.abspath(folder))
    try:
        head = b""
        if is_file := whole.is_file():
            size = whole.stat().st_size
            with open(whole, "rb") as file:
                head = file.read(8)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, links in a circle
        why = getattr(error, "strerror", None) or "links in a circle"
        raise BadRow(f"{name}: {path[:99]} cannot be reached ({why}): mend the path") from None
    if outside and not recipe.allow_outside:
        raise BadRow(
            f"{name}: {path} is not in the JSONL's folder: move it there or --allow-outside"
        )
    if not is_file:
        raise BadRow(f"{name}: no file at {whole}: paths are relative to the JSONL")
    if size == 0:
        raise BadRow(f"{name}: {whole} is empty: fetch it again")
    # FFmpeg takes a cut-off wav for a short one; streamed ones tell a placeholder near 2^31 or 2^32
    if head[:4] == b"RIFF" and size < int.from_bytes(head[4:], "little") + 8 < 2**31 - 2**20:
        raise BadRow(f"{name}: {whole} is shorter than it tells: it is cut off, fetch it again")
    return whole


def open_media(path, name):
    """-> PyAV's container of a local file; BadRow if it is none, or a playlist."""
    if av is None:
        raise ModuleNotFoundError("no clip can be read without av and torchaudio", name="av")
    try:  # "file:", or a colon in the name would be taken for a protocol
        container = av.open(f"file:{path}", metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise BadRow(f"{name}: {path} does not open ({error.strerror}): fetch it again") from None
    if container.format.name in ("hls", "concat", "dash"):  # these read other files, anywhere
        container.close()
        raise BadRow(f"{name}: {path} is a playlist: give the media file itself")
    return container


def _stream(container, kind, path, name):
    """The stream that a player would choose; a cover picture is no video."""
    stream = container.streams.best(kind)
    if stream is None or stream.disposition & stream.disposition.attached_pic:
        remedy = "set use_audio to false" if kind == "audio" else "drop the row"
        raise BadRow(f"{name}: {path} has no {kind} stream: {remedy}, or give another file")
    if stream.codec_context is None:
        raise BadRow(f"{name}: {path} has {kind} of an unknown codec: re-encode it")
    return stream


def _begin(stream):
    """The time stamp of a stream's beginning, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def _declared_end(container, stream):
    """The time stamp of a stream's end as the file tells it, in seconds; None if it does not."""
    if stream.duration and container.format.name not in ("mp3", "aac"):  # these are guessed
        return _begin(stream) + float(stream.duration * stream.time_base)
    for key, value in stream.metadata.items():
        if key.startswith("DURATION") and re.fullmatch(r"\d+:\d+:[\d.]+", value):  # Matroska, WebM
            return sum(float(part) * unit for part, unit in zip(value.split(":"), (3600, 60, 1)))
    return None


def _scanned_end(path, name, index):
    """The time stamp of a stream's end, from all the packets of the file."""
    ends = {}
    with open_media(path, name) as container:
        for packet in container.demux():
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream_index] = max(end, ends.get(packet.stream_index, 0.0))
        if (container.duration or 0) / av.time_base > max(ends.values(), default=0.0) + SLACK:
            raise BadRow(
                f"{name}: {path} ends earlier than it tells: it is cut off, fetch it again"
            )
    return ends.get(index, 0.0)


def _span(start, end, length, path, name):
    """The part of a file that a row wants -> (start, end) in seconds."""
    if length <= 0:
        raise BadRow(f"{name}: {path} has nothing in it with a time stamp: re-encode it")
    if (start or 0) >= length or (end or 0) > length + SLACK:
        raise BadRow(f"{name}: {path} lasts {length:.2f} s, start {start}, end {end}: mend them")
    return float(start or 0), float(min(end or length, length))


def _decode(container, stream):
    """All frames that have a time stamp, from where the container stands."""
    for frame in container.decode(stream):
        if stream.type == "video" and frame.is_corrupt:  # filled in by the decoder, and passed on
            at = (frame.time or 0.0) - _begin(stream)
            raise av.InvalidDataError(0, f"damaged at {at:.1f} s")
        if frame.time is not None:
            yield frame


def _decode_from(container, stream, time):
    """All frames from one at or before the time stamp `time` on, or from the stream's first."""
    if time <= _begin(stream) + SEEK_AHEAD:  # the container is fresh
        return _decode(container, stream)
    for back in (0.0, 10.0, time):  # an index may go by another clock, or by guesses
        container.seek(int(max(time - back, 0.0) / stream.time_base), stream=stream)
        frames = _decode(container, stream)
        first = next(frames, None)
        if first is not None and first.time <= time:
            break
    return chain([first] if first else [], frames)


# ---- pictures ----------------------------------------------------------------------------------


def frame_size(width, height, max_pixels, step=28):
    """The nearest (width, height) in multiples of `step` within max_pixels, aspect kept."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    rounded = [max(step, round(side * scale / step) * step) for side in (width, height)]
    while rounded[0] * rounded[1] > max_pixels and max(rounded) > step:
        rounded[rounded.index(max(rounded))] -= step
    return rounded


def _upright(frame, size):
    """A frame -> (H, W, 3) uint8, resized, then turned as its metadata asks."""
    pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    degrees = frame.rotation if abs(frame.rotation) <= 360 else 0  # no more: a broken matrix
    return np.rot90(pixels, round(degrees / 90))


def decode_image(path, name, recipe):
    """-> (3, H, W) uint8."""
    import torch

    with open_media(path, name) as container:
        stream = _stream(container, "video", path, name)
        stream.codec_context.options = {"err_detect": "explode"}  # else half a JPEG turns grey
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise BadRow(f"{name}: {path} is no whole image ({error.strerror}): fetch it") from None
        if frame is None:
            raise BadRow(f"{name}: {path} holds no image: give another file")
        size = frame_size(frame.width, frame.height, recipe.max_pixels, recipe.side)
        pixels = _upright(frame, size)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def decode_video(path, name, start, end, recipe):
    """
    -> frames (T, 3, H, W) uint8, fps of the frames taken, (start, end) in seconds.

    [U17] The span is cut into T equal parts and the frame on show in the middle of each is taken,
    so that frame i stands for the time i / fps, which is what the positions say.
    """
    import torch

    with open_media(path, name) as container:
        stream = _stream(container, "video", path, name)
        stream.thread_type = "AUTO"
        begin = _begin(stream)
        length = (
            _declared_end(container, stream) or _scanned_end(path, name, stream.index)
        ) - begin
        start, end = _span(start, end, length, path, name)
        count = min(max(round((end - start) * recipe.fps / 2) * 2, 2), recipe.max_frames // 2 * 2)
        wanted = begin + start + (np.arange(count) + 0.5) * (end - start) / count
        frames, size, aspect = [], None, float(stream.sample_aspect_ratio or 1)  # of one pixel
        try:
            for frame in _frames_at(container, stream, wanted):
                limits = recipe.max_pixels, recipe.side
                size = size or frame_size(frame.width * aspect, frame.height, *limits)
                frames.append(_upright(frame, size))
        except av.FFmpegError as error:
            raise BadRow(
                f"{name}: {path} cannot be decoded ({error.strerror}): fetch it again"
            ) from None
    if len(frames) < count:
        missing = (count - len(frames)) * (end - start) / count
        raise BadRow(f"{name}: {path} ends {missing:.1f} s early: it is cut off, fetch it again")
    frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()  # (T, 3, H, W)
    return frames, count / (end - start), (start, end)


def _frames_at(container, stream, wanted):
    """Yields the frames on show at the time stamps `wanted` (ascending), until the file ends."""
    shown = ahead = None
    half_frame = 0.5 / float(stream.average_rate or 25)
    for time in wanted:
        if shown is None or time - shown.time > SEEK_AHEAD:
            decoder = _decode_from(container, stream, time)
            shown, ahead = next(decoder, None), next(decoder, None)
        while ahead is not None and ahead.time <= time:
            shown, ahead = ahead, next(decoder, None)
        if shown is None:
            return
        until = shown.time + float((shown.duration or 0) * stream.time_base) + half_frame
        if ahead is None and time > until:
            return
        yield shown


# ---- sound -------------------------------------------------------------------------------------


def decode_audio(path, name, start, end, recipe, of_video):
    """
    -> (S,) float32, mono, 16 kHz.

    of_video   bool   True: exactly start..end by the clock of the file's video, silence where the
                      track is shorter; False: by its own clock, and no further than it goes
    """
    import torch
    import torchaudio.functional

    start, limit, found, pieces, rate = float(start or 0), float(end or math.inf), 0.0, [], None
    with open_media(path, name) as container:
        stream = _stream(container, "audio", path, name)
        begin = _begin(_stream(container, "video", path, name) if of_video else stream)
        told = _declared_end(container, stream)
        told = math.inf if told is None else told - begin
        if of_video and told <= start:
            raise BadRow(f"{name}: {path} has no sound after {told:.1f} s: set use_audio to false")
        if not of_video and told < math.inf:
            start, limit = _span(start, end, told, path, name)
        too_long = f"{path} gives over {recipe.max_audio_seconds:g} s of sound"
        too_long = BadRow(f"{name}: {too_long}: raise --max-audio-seconds or set start and end")
        if recipe.max_audio_seconds < limit - start < math.inf:
            raise too_long
        # formats that guess where they end also guess when they seek
        seek = start - PREROLL if told < math.inf else 0.0
        try:
            for frame in _decode_from(container, stream, begin + seek):
                time, rate = frame.time - begin, rate or frame.sample_rate
                if time >= limit:
                    break
                if frame.sample_rate != rate:
                    raise BadRow(f"{name}: {path} changes its sample rate on the way: re-encode it")
                if time > start + recipe.max_audio_seconds:
                    raise too_long
                found = time + frame.samples / rate
                if found > start:
                    pieces.append((time, _mono(frame)))
        except av.FFmpegError as error:
            raise BadRow(f"{name}: {path} cannot be decoded ({error.strerror}): fetch it") from None
    if told < math.inf and found < min(told, limit) - SLACK:
        at = f"{found:.1f} of {told:.1f} s"
        raise BadRow(f"{name}: the sound of {path} is cut off at {at}: fetch it again")
    if not of_video:
        start, limit = _span(start, None if limit == math.inf else limit, found, path, name)
    track, at = np.zeros(round((limit - start) * (rate or 1)), np.float32), None
    for time, samples in pieces:
        # by their own time stamps, since codecs prime and tracks begin late; but containers round
        # the stamps, and samples that follow each other must not be parted by it
        stamp = round((time - start) * rate)
        at = stamp if at is None or abs(stamp - at) > 0.05 * rate else at
        piece = samples[max(-at, 0) : max(len(track) - at, 0)]
        track[max(at, 0) : max(at, 0) + len(piece)] = piece
        at += len(samples)
    # the resampling kernel of a rate without common divisors would take minutes and GBs
    if rate and rate * AUDIO_RATE > 2e7 * math.gcd(rate, AUDIO_RATE) ** 2:
        raise BadRow(f"{name}: {path} has {rate} samples a second, no usual rate: re-encode it")
    if not pieces or len(track) < 0.1 * rate:
        raise BadRow(
            f"{name}: {path} gives under 0.1 s of sound: mend start and end, or do without it"
        )
    return torchaudio.functional.resample(torch.from_numpy(track), rate, AUDIO_RATE).numpy()


def _mono(frame):
    """A frame -> (S,) float32 in -1..1: the mean of its channels, as Qwen's own loader mixes."""
    x = frame.to_ndarray()
    if not frame.format.is_planar:
        x = x.reshape(-1, frame.layout.nb_channels).T
    if x.dtype.kind in "iu":
        half = 2.0 ** (8 * x.dtype.itemsize - 1)
        x = x / half - (x.dtype.kind == "u")
    return x.mean(0, dtype=np.float32)
