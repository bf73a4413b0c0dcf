"""
A media file -> frames, sound or a picture as tensors, true to its time stamps. Copy it freely.

If media cannot be decoded as a row demands, the error names the row and the remedy: there is no
substitute for a clip.

T frames, H height, W width, S audio samples. Seconds count from the file's first frame, or from its
first sample if only its sound is wanted; the file's own time stamps need not begin at 0.
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
try:  # commands that decode nothing work without it
    import av
except ModuleNotFoundError:
    av = None

AUDIO_RATE = 16000  # samples/s, what the audio tower takes
SEEK_AHEAD = 8.0  # seconds; what is wanted further ahead than this is reached by seeking
PREROLL = 0.5  # seconds decoded before the sound wanted: after a seek, codecs start blurred
SLACK = 1.0  # seconds by which `end` may exceed a file's length, and a declared length the real one
MIN_SOUND = 0.1  # seconds
LOUDEST = 1e9  # of a sample, where full scale is 1: above it, or NaN, the spectrogram is not finite
LARGEST_PICTURE = 2**28  # pixels
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class BadRow(ValueError):
    """A row that cannot be used as it is; the message names the row and the remedy."""


class NoSound(BadRow):
    """A video without a sound track, or with none in the span that the row takes."""


class MediaConfig(NamedTuple):
    """How a clip becomes tensors; part of every cache key and of every score."""

    fps: float  # frames/s wanted; fewer when max_frames binds
    max_frames: int  # even: the tower merges frames in pairs
    max_pixels: int  # per frame, after resizing
    max_audio_seconds: float
    max_prompt_tokens: int
    allow_outside: bool = False  # whether media may lie outside the JSONL's folder
    side: int = 28  # sides of frames are multiples of it: set by the model, not by a flag


class Clip(NamedTuple):
    """A decoded row. A video and its own sound cover the same span of time."""

    frames: Any  # (T, 3, H, W) uint8 tensor or None
    fps: float | None  # of the frames taken: T / span
    audio: np.ndarray | list | None  # (S,) float32 at 16 kHz; a list of them if the row has one
    images: list  # of (3, H, W) uint8
    use_audio: bool  # the audio is the video's own, interleaved with it in time

    @property
    def sounds(self):
        """All sounds, as a list."""
        if isinstance(self.audio, np.ndarray):
            return [self.audio]
        return self.audio or []

    def in_order(self, pieces):
        """With pictures and sounds in the order in which pieces {"type", "index"} of a text name them."""
        images = [self.images[p["index"]] for p in pieces if p["type"] == "image"]
        audio = self.audio
        if not self.use_audio:
            audio = [self.sounds[p["index"]] for p in pieces if p["type"] == "audio"]
        return self._replace(images=images, audio=audio)


def decode_clip(row, folder, config):
    """
    A row -> its Clip.

    row      dict              as `data.rows.normalize_row` returns it. use_audio "auto": the video's own
                               sound is taken if there is some
    folder   Path              that media paths are relative to
    config   MediaConfig
    raises   BadRow            a file is missing, has no such stream, is cut off or cannot be read
    """
    name = f"row {row['prompt_id']}"
    start, end = row.get("start"), row.get("end")
    images = []
    for path in row.get("images") or []:
        images.append(decode_image(find_media(name, folder, path, config), name, config))

    frames = fps = audio = None
    use_audio = row.get("use_audio") or False
    if row.get("video"):
        path = find_media(name, folder, row["video"], config)
        frames, fps, span = decode_video(path, name, start, end, config, with_sound=bool(use_audio))
        if use_audio:
            try:
                audio = decode_audio(path, name, *span, config, of_video=True)
            except NoSound:
                if use_audio != "auto":
                    raise
                use_audio = False

    if row.get("audio"):
        is_list = isinstance(row["audio"], list)
        sounds = []
        for path in row["audio"] if is_list else [row["audio"]]:
            path = find_media(name, folder, path, config)
            sounds.append(decode_audio(path, name, start, end, config, of_video=False))
        audio = sounds if is_list else sounds[0]
    return Clip(frames, fps, audio, images, bool(use_audio))


# ---- files and streams -------------------------------------------------------------------------


def find_media(name, folder, path, config):
    """
    -> the file's path; BadRow if it is not there, not in the folder, or cut off. A link in the folder
    is followed wherever it leads: whoever put it there wants that.
    """
    if URL.match(path):
        raise BadRow(f"{name}: {path[:99]} is a URL: not fetched: download it and give its path")
    whole = Path(folder) / path
    is_outside = not Path(os.path.abspath(whole)).is_relative_to(os.path.abspath(folder))
    try:
        is_file = whole.is_file()
        head = b""
        if is_file:
            size = whole.stat().st_size
            with open(whole, "rb") as file:
                head = file.read(8)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise BadRow(f"{name}: {path[:99]} cannot be reached ({reason}): mend the path") from None
    if is_outside and not config.allow_outside:
        raise BadRow(
            f"{name}: {path} is not in the JSONL's folder: move it there or --allow-outside"
        )
    if not is_file:
        raise BadRow(f"{name}: no file at {whole}: paths are relative to the JSONL")
    if size == 0:
        raise BadRow(f"{name}: {whole} is empty: fetch it again")
    # FFmpeg takes a cut-off wav for a short one. Streamed ones declare a placeholder near 2^31 or 2^32
    if head[:4] == b"RIFF" and size < int.from_bytes(head[4:], "little") + 8 < 2**31 - 2**20:
        raise BadRow(
            f"{name}: {whole} is shorter than its header says: it is cut off, fetch it again"
        )
    return whole


def open_media(path, name):
    """-> PyAV's container of a local file; BadRow if it is none, or a playlist."""
    if av is None:
        raise ModuleNotFoundError("no clip can be read without av and torchaudio", name="av")
    try:
        # without "file:", a colon in the name would be taken for a protocol
        container = av.open(f"file:{path}", metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise BadRow(f"{name}: {path} does not open ({error.strerror}): fetch it again") from None
    if container.format.name in ("hls", "concat", "dash"):  # these read other files, anywhere
        container.close()
        raise BadRow(f"{name}: {path} is a playlist: give the media file itself")
    return container


def _best_stream(container, kind, path, name):
    """The stream that a player would choose; a cover picture is no video."""
    stream = container.streams.best(kind)
    if stream is None or stream.disposition & stream.disposition.attached_pic:
        if kind == "audio":
            remedy = 'set use_audio to false or "auto"'
            raise NoSound(f"{name}: {path} has no audio stream: {remedy}, or give another file")
        raise BadRow(f"{name}: {path} has no {kind} stream: drop the row, or give another file")
    if stream.codec_context is None:
        raise BadRow(f"{name}: {path} has {kind} of an unknown codec: re-encode it")
    return stream


def has_sound_track(name, folder, path, config):
    """Whether a media file has a sound track; it is not decoded."""
    with open_media(find_media(name, folder, path, config), name) as container:
        return bool(container.streams.audio)


def _begin(stream):
    """The time stamp of a stream's beginning, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def _declared_end(container, stream):
    """The time stamp of a stream's end as the file declares it, in seconds; None if it does not."""
    ends = []
    if stream.duration and container.format.name not in ("mp3", "aac"):  # these are guesses
        ends.append(_begin(stream) + float(stream.duration * stream.time_base))
    for key, value in stream.metadata.items():
        if key.startswith("DURATION") and re.fullmatch(r"\d+:\d+:[\d.]+", value):  # Matroska, WebM
            hours, minutes, seconds = value.split(":")
            ends.append(3600 * float(hours) + 60 * float(minutes) + float(seconds))
            break
    # in Matroska, `duration` may be the whole file's
    return min(ends, default=None)


def _scanned_end(path, name, index):
    """The time stamp of a stream's end, from all the packets of the file."""
    ends = {}  # stream -> its end so far
    with open_media(path, name) as container:
        for packet in container.demux():
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream_index] = max(end, ends.get(packet.stream_index, 0.0))
        declared = (container.duration or 0) / av.time_base
        if declared > max(ends.values(), default=0.0) + SLACK:
            raise BadRow(
                f"{name}: {path} ends earlier than its header says: it is cut off, fetch it again"
            )
    return ends.get(index, 0.0)


def _end_of(container, stream, path, name):
    """The time stamp of a stream's end, in seconds."""
    return _declared_end(container, stream) or _scanned_end(path, name, stream.index)


def _span(start, end, length, path, name):
    """The part of a file that a row takes -> (start, end) in seconds."""
    if length <= 0:
        raise BadRow(f"{name}: {path} has nothing in it with a time stamp: re-encode it")
    if (start or 0) >= length or (end or 0) > length + SLACK:
        raise BadRow(f"{name}: {path} lasts {length:.2f} s, start {start}, end {end}: mend them")
    return float(start or 0), float(min(end or length, length))


def _decode(container, stream, after_seek=False):
    """All frames that have a time stamp, from where the container stands."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if after_seek:  # it may lead into the middle of a frame: MPEG program streams
                continue
            raise
        for frame in frames:
            after_seek = False
            if stream.type == "video" and frame.is_corrupt:  # filled in by the decoder, no error
                second = (frame.time or 0.0) - _begin(stream)
                raise av.InvalidDataError(0, f"damaged at {second:.1f} s")
            if frame.time is not None:
                yield frame


def _decode_from(container, stream, time):
    """All frames from one at or before the time stamp `time` on, or from the stream's first."""
    if time <= _begin(stream) + SEEK_AHEAD:  # the container is fresh
        return _decode(container, stream)
    # an index may follow another clock, or be a guess: step back until a frame before `time` comes
    for back in (0.0, 10.0, time):
        container.seek(int(max(time - back, 0.0) / stream.time_base), stream=stream)
        frames = _decode(container, stream, after_seek=True)
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
    """A frame -> (H, W, 3) uint8, resized, then turned as its metadata says."""
    pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    degrees = frame.rotation if abs(frame.rotation) <= 360 else 0  # beyond: a broken matrix
    return np.rot90(pixels, round(degrees / 90))


def decode_image(path, name, config):
    """
    -> (3, H, W) uint8. Transparency is put on white, as the models' own loaders do; the picture is
    turned and mirrored as its EXIF orientation says.
    """
    import torch

    frame = _read_picture(path, name)
    size = frame_size(frame.width, frame.height, config.max_pixels, config.side)
    if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
        frame = _on_white(frame)
    orientation = exif_orientation(path)
    if orientation is None:
        pixels = _upright(frame, size)
    else:
        pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
        pixels = _oriented(pixels, orientation)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _read_picture(path, name):
    """-> the picture as a frame of PyAV, by FFmpeg, or by PIL where FFmpeg cannot read all of it."""
    problem = None
    with open_media(path, name) as container:
        stream = _best_stream(container, "video", path, name)
        # without it, half a JPEG decodes to a picture that is half grey
        stream.codec_context.options = {"err_detect": "explode"}
        # AVIF and HEIC hold transparency, and the tiles of a large picture, in streams of their own
        is_in_parts = container.format.name.startswith("mov") and len(container.streams.video) > 1
        if not is_in_parts:
            try:
                frame = next(container.decode(stream), None)
                problem = None if frame else "no picture in it"
            except av.FFmpegError as error:
                problem = error.strerror
    if problem or is_in_parts:  # PIL reads animated WebP and TIFF with JPEG inside
        frame = _read_with_pil(path, name)
    if frame is None and is_in_parts:
        raise BadRow(f"{name}: {path} is a picture in several parts: convert it to JPEG or PNG")
    if frame is None:
        raise BadRow(f"{name}: {path} is cut off or not an image ({problem}): fetch it")
    return frame


def _read_with_pil(path, name):
    """-> a frame of PyAV; None if PIL cannot read the file either."""
    try:
        with _open_with_pil(path) as image:
            num_pixels = image.width * image.height
            if num_pixels > LARGEST_PICTURE:
                millions = f"{num_pixels / 1e6:.0f} million pixels"
                raise BadRow(f"{name}: {path} has {millions}: make it smaller")
            pixels = np.array(image.convert("RGBA"))
    except BadRow:
        raise
    except (OSError, ValueError, SyntaxError):
        return None
    return av.VideoFrame.from_ndarray(pixels, format="rgba")


def _open_with_pil(path):
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # phones take larger pictures than PIL's limit against attacks
    return Image.open(path)


def _on_white(frame):
    """A frame with transparency -> an opaque one, at full size: the edges blend before resizing."""
    rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
    alpha = rgba[..., 3:]
    blended = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(blended.astype(np.uint8), format="rgb24")


def exif_orientation(path):
    """
    1 to 8, 1 = upright; None if PIL cannot read the file. PyAV knows only the rotation, not whether a
    picture is mirrored.
    """
    try:
        with _open_with_pil(path) as image:
            return image.getexif().get(0x0112, 1)
    except (OSError, ValueError, SyntaxError):
        return None


def _oriented(pixels, orientation):
    """(H, W, 3), as stored -> as it is to be seen."""
    if orientation in (2, 4, 5, 7):  # mirrored
        pixels = pixels[:, ::-1]
    quarter_turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)  # to the left
    return np.rot90(pixels, quarter_turns)


def decode_video(path, name, start, end, config, *, with_sound):
    """
    -> frames (T, 3, H, W) uint8, fps of the frames taken, (start, end) in seconds.

    with_sound   bool   whether the video's sound is wanted too: if it outlasts the pictures by over
                        SLACK, as music with a still picture does, the last frame stays to its end

    [U17] The span is cut into T equal parts, and the frame visible in the middle of each is taken:
    frame i stands for the time i / fps, which is what its position says.
    """
    import torch

    with open_media(path, name) as container:
        stream = _best_stream(container, "video", path, name)
        stream.thread_type = "AUTO"
        begin = _begin(stream)
        stream_end = _end_of(container, stream, path, name)
        end_with_sound = stream_end
        sound = container.streams.best("audio") if with_sound else None
        if sound is not None:
            sound_end = _end_of(container, sound, path, name)
            if sound_end > stream_end + SLACK:
                end_with_sound = sound_end
        start, end = _span(start, end, end_with_sound - begin, path, name)

        num_wanted = max(round((end - start) * config.fps / 2) * 2, 2)
        count = min(num_wanted, config.max_frames // 2 * 2)
        times = begin + start + (np.arange(count) + 0.5) * (end - start) / count
        times = np.minimum(times, stream_end)  # the last frame stays
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        frames, size = [], None
        try:
            for frame in _frames_at(container, stream, times):
                if size is None:
                    width = frame.width * pixel_aspect
                    size = frame_size(width, frame.height, config.max_pixels, config.side)
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


def _frames_at(container, stream, times):
    """Yields the frames visible at the time stamps `times` (ascending), until the file ends."""
    visible = following = None
    half_frame = 0.5 / float(stream.average_rate or 25)
    for time in times:
        if visible is None or time - visible.time > SEEK_AHEAD:
            decoder = _decode_from(container, stream, time)
            visible = next(decoder, None)
            following = next(decoder, None)
        while following is not None and following.time <= time:
            visible = following
            following = next(decoder, None)
        if visible is None:
            return
        until = visible.time + float((visible.duration or 0) * stream.time_base) + half_frame
        if following is None and time > until:
            return
        yield visible


# ---- sound -------------------------------------------------------------------------------------


def decode_audio(path, name, start, end, config, *, of_video):
    """
    -> (S,) float32, mono, 16 kHz.

    of_video   bool   True: exactly start..end by the clock of the file's video, silence where the
                      track is shorter; False: by its own clock, and no further than it goes
    """
    import torch
    import torchaudio.functional

    start = float(start or 0)
    limit = float(end or math.inf)
    too_long = BadRow(
        f"{name}: {path} gives over {config.max_audio_seconds:g} s of sound: raise "
        "--max-audio-seconds or set start and end"
    )
    pieces = []  # (time of the first sample, samples)
    rate = None
    decoded_end = 0.0
    with open_media(path, name) as container:
        stream = _best_stream(container, "audio", path, name)
        clock = _best_stream(container, "video", path, name) if of_video else stream
        begin = _begin(clock)
        declared_end = _declared_end(container, stream)
        is_declared = declared_end is not None
        declared_end = declared_end - begin if is_declared else math.inf
        if of_video and declared_end <= start:
            raise NoSound(
                f"{name}: {path} has no sound after {declared_end:.1f} s: set use_audio to false or "
                '"auto"'
            )
        if not of_video and is_declared:
            start, limit = _span(start, end, declared_end, path, name)
        if config.max_audio_seconds < limit - start < math.inf:
            raise too_long

        # formats whose end is a guess also guess when they seek
        seek_to = begin + start - PREROLL if is_declared else begin
        try:
            for frame in _decode_from(container, stream, seek_to):
                time = frame.time - begin
                rate = rate or frame.sample_rate
                if time >= limit:
                    break
                if frame.sample_rate != rate:
                    raise BadRow(f"{name}: {path} changes its sample rate on the way: re-encode it")
                if time > start + config.max_audio_seconds:
                    raise too_long
                decoded_end = time + frame.samples / rate
                if decoded_end > start:
                    pieces.append((time, _mono(frame)))
        except av.FFmpegError as error:
            raise BadRow(f"{name}: {path} cannot be decoded ({error.strerror}): fetch it") from None
    if is_declared and decoded_end < min(declared_end, limit) - SLACK:
        progress = f"{decoded_end:.1f} of {declared_end:.1f} s"
        raise BadRow(f"{name}: the sound of {path} is cut off at {progress}: fetch it again")
    if not of_video:
        end = None if limit == math.inf else limit
        start, limit = _span(start, end, decoded_end, path, name)

    # the resampling kernel of a rate without common divisors would take minutes and GBs
    if rate and rate * AUDIO_RATE > 2e7 * math.gcd(rate, AUDIO_RATE) ** 2:
        raise BadRow(f"{name}: {path} has {rate} samples per second, an unusual rate: re-encode it")
    if not pieces or round((limit - start) * rate) < MIN_SOUND * rate:
        error = NoSound if of_video and not pieces else BadRow
        raise error(
            f"{name}: {path} gives under {MIN_SOUND} s of sound: mend start and end, or do without it"
        )
    track = _joined(pieces, start, limit, rate)
    if not (np.abs(track) < LOUDEST).all():
        raise BadRow(f"{name}: {path} has samples that are NaN or above {LOUDEST:g}: re-encode it")
    return torchaudio.functional.resample(torch.from_numpy(track), rate, AUDIO_RATE).numpy()


def _joined(pieces, start, end, rate):
    """
    Pieces of sound -> (S,) float32 of start..end, silence where there is none.

    Pieces go by their own time stamps, since codecs prime and tracks begin late. But containers
    round the stamps, and that must not part samples that follow each other.
    """
    track = np.zeros(round((end - start) * rate), np.float32)
    position = None
    for time, samples in pieces:
        stamp = round((time - start) * rate)
        if position is None or abs(stamp - position) > 0.05 * rate:
            position = stamp
        piece = samples[max(-position, 0) : max(len(track) - position, 0)]
        first = max(position, 0)
        track[first : first + len(piece)] = piece
        position += len(samples)
    return track


def _mono(frame):
    """A frame -> (S,) float32 in -1..1: the mean of its channels, as Qwen's own loader mixes."""
    x = frame.to_ndarray()
    if not frame.format.is_planar:
        x = x.reshape(-1, frame.layout.nb_channels).T
    if x.dtype.kind in "iu":
        half = 2.0 ** (8 * x.dtype.itemsize - 1)
        x = x / half - (x.dtype.kind == "u")
    return x.mean(0, dtype=np.float32)
