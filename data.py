"""
A row -> a decoded clip -> text for the model. What is wrong with a row is said, never papered over.

A row is one JSON object on a line (README, "Data format"); Video-R1 rows load as they are. Media
paths are relative to the JSONL. `prompt_id` is the identity of a prompt everywhere, never its text.

    python data.py check FILE        # decode every row, report each one that would not train

T frames, H height, W width, S audio samples.
"""

import argparse
import json
import re
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torchaudio.functional
from tqdm import tqdm

SYSTEM_PROMPT = "Look and listen. Reason inside <think> </think>, then answer inside <answer> </answer>."
ANSWER_TYPES = ("choice", "multi", "yesno", "number", "text", "location")
INSTRUCTIONS = {
    "choice": "Answer with one option.",
    "multi": "Answer with all the letters that apply.",
    "yesno": "Answer yes or no.",
    "number": "Answer with a number.",
    "text": "Answer in a few words.",
    "location": "Answer as place: object | place: object.",
}
# A literal media token in a text would shift or swallow the media's features.
RESERVED = re.compile(r"<\|[A-Za-z_]+\|>")
AUDIO_RATE = 16000  # samples/s, what the audio tower hears
SEEK_AHEAD = 8.0  # seconds; wanted frames further apart than this are reached by seeking


class BadRow(ValueError):
    """A row that cannot be used as it is; the message names the row and the remedy."""


class Recipe(NamedTuple):
    """How a clip becomes tensors; part of every cache key and of every score."""

    fps: float  # frames/s wanted; fewer when max_frames binds
    max_frames: int  # even: the tower merges frames in pairs
    max_pixels: int  # per frame, after resizing to multiples of 28
    max_audio_seconds: float
    max_prompt_tokens: int


class Clip(NamedTuple):
    """A decoded row. Video and audio cover the same span of time."""

    frames: torch.Tensor | None  # (T, 3, H, W) uint8
    fps: float | None  # of the frames really taken: T / span
    audio: np.ndarray | None  # (S,) float32 at 16 kHz
    images: list  # of (3, H, W) uint8
    use_audio: bool  # the audio is the video's own, interleaved with it in time


def add_flags(parser):
    """The media limits, the same for every entry point."""
    parser.add_argument("--fps", type=float, default=2.0, help="video frames per second")
    parser.add_argument("--max-frames", type=int, default=32, help="even; longer clips are sampled thinner (paper: 32)")
    parser.add_argument("--max-pixels", type=int, default=128 * 28 * 28, help="pixels per frame [U]")
    parser.add_argument("--max-audio-seconds", type=float, default=120.0, help="seconds of sound; longer is an error")
    parser.add_argument("--max-prompt-tokens", type=int, default=16384, help="longer prompts are an error, never cut")
    parser.add_argument("--cache-gb", type=float, default=4.0, help="GB of decoded or encoded clips kept in memory")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode clips ahead of the loop")


def recipe_from(args):
    return Recipe(*(getattr(args, name) for name in Recipe._fields))


# ---- rows --------------------------------------------------------------------------------------


class Rows:
    """
    The rows of a JSONL, parsed when asked for: only their byte offsets and ids stay in memory.

    rows[i] -> dict; rows.index(prompt_id) -> i; len(rows)
    raises   BadRow    unreadable JSON, a duplicate id, or (on access) a row that breaks the format
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise BadRow(f"no data file at {path}: give a JSONL file to --data")
        offsets, ids = [], {}
        with open(self.path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    prompt_id = row_id(parse_line(line, f"{self.path}:{number}"), f"{self.path}:{number}")
                    if prompt_id in ids:
                        raise BadRow(f"{self.path}:{number}: prompt_id {prompt_id!r} occurs twice: make ids unique")
                    ids[prompt_id] = len(offsets)
                    offsets.append(offset)
                offset += len(line)
        if not offsets:
            raise BadRow(f"{path} has no rows")
        self.offsets, self.ids = np.array(offsets), ids

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return normalize_row(parse_line(file.readline(), f"{self.path} row {i}"))

    def index(self, prompt_id):
        return self.ids[prompt_id]


def parse_line(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRow(f"{where}: not JSON ({error}): one object a line is expected") from None
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a JSON object is expected, got {type(row).__name__}")
    return row


def row_id(row, where):
    prompt_id = row.get("prompt_id", row.get("problem_id"))
    if prompt_id is None or str(prompt_id) == "":
        raise BadRow(f"{where}: no prompt_id: give every row a unique one")
    return str(prompt_id)


def normalize_row(row):
    """A row of ours or of Video-R1's schema -> a row of ours, checked without opening its media."""
    row = dict(row, prompt_id=row_id(row, "row"))
    name = f"row {row['prompt_id']}"
    if "problem" in row:  # Video-R1: problem, problem_type, data_type, options, solution, path
        kinds = {"multiple choice": "choice", "numerical": "number", "regression": "number", "free-form": "text", "OCR": "text"}  # fmt: skip
        row["question"] = row["problem"]
        row["answer"] = re.sub(r"</?answer>", "", str(row.get("solution", ""))).strip()
        row["answer_type"] = kinds.get(row.get("problem_type"), "text")
        row["options"] = row.get("options") or None
        if path := row.get("path"):
            row["video" if row.get("data_type") == "video" else "images"] = path if row.get("data_type") == "video" else [path]  # fmt: skip
        if row.get("process"):
            row["reasoning"] = re.sub(r"</?think>", "", row["process"]).strip()
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise BadRow(f"{name}: empty {key}: give it as text")
    if row.get("answer_type") not in ANSWER_TYPES:
        raise BadRow(f"{name}: answer_type {row.get('answer_type')!r}: one of {', '.join(ANSWER_TYPES)}")
    if not (row.get("video") or row.get("audio") or row.get("images")):
        raise BadRow(f"{name}: no media: give video, audio or images")
    texts = [row["question"], row.get("hint"), row.get("audio_caption"), row.get("reasoning"), *_option_texts(row)]
    for text in filter(None, texts):
        if found := RESERVED.search(text):
            raise BadRow(f"{name}: the text holds the reserved token {found[0]}: remove it")
    return row


def _option_texts(row):
    options = row.get("options") or []
    return list(options.values()) if isinstance(options, dict) else [str(o) for o in options]


def question_text(row, hint, audio_captions):
    """The user's turn: hint, audio caption if asked for, question, options, and how to answer."""
    lines = [f"Hint: {hint}."] if hint else []  # [HINT] before the question
    if audio_captions and row.get("audio_caption"):
        lines.append(f"Sound: {row['audio_caption']}.")
    lines.append(row["question"])
    if options := _option_texts(row):
        letters = list(row["options"]) if isinstance(row["options"], dict) else "ABCDEFGHIJ"
        bare = [re.sub(r"^\(?[A-J][.):]\s*", "", option) for option in options]
        lines.append(" ".join(f"{letter}. {option}" for letter, option in zip(letters, bare)))
    return "\n".join([*lines, INSTRUCTIONS[row["answer_type"]]])


def completion_text(row):
    """What stage 0 teaches the model to write."""
    return f"<think>{row['reasoning']}</think><answer>{row['answer']}</answer>"


# ---- decoding ----------------------------------------------------------------------------------


def decode_clip(row, folder, recipe):
    """
    A row -> its Clip.

    row      dict              as `normalize_row` returns it
    folder   Path              that media paths are relative to
    raises   BadRow            a file is missing, has no such stream, is cut off or cannot be read
    """
    name, use_audio = f"row {row['prompt_id']}", bool(row.get("use_audio"))
    frames = fps = audio = None
    images = [decode_image(_media(name, folder, path), name, recipe) for path in row.get("images") or []]
    if row.get("video"):
        path = _media(name, folder, row["video"])
        frames, fps, span = decode_video(path, name, row.get("start"), row.get("end"), recipe)
        if use_audio:
            audio = decode_audio(path, name, *span, recipe)
    if row.get("audio") and not use_audio:
        path = _media(name, folder, row["audio"])
        audio = decode_audio(path, name, row.get("start"), row.get("end"), recipe)
    return Clip(frames, fps, audio, images, use_audio)


def _media(name, folder, path):
    path = Path(folder) / path
    if not path.is_file():
        raise BadRow(f"{name}: no file at {path}: paths are relative to the JSONL")
    if path.stat().st_size == 0:
        raise BadRow(f"{name}: {path} is empty: fetch it again")
    return path


def _open(path, name):
    try:
        return av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise BadRow(f"{name}: {path} cannot be opened ({error}): fetch or re-encode it") from None


def frame_size(width, height, max_pixels):
    """The nearest (width, height) in multiples of 28 within max_pixels, aspect kept."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    rounded = [max(28, round(side * scale / 28) * 28) for side in (width, height)]
    while rounded[0] * rounded[1] > max_pixels and max(rounded) > 28:
        rounded[rounded.index(max(rounded))] -= 28
    return rounded


def decode_video(path, name, start, end, recipe):
    """
    -> frames (T, 3, H, W) uint8, fps of the frames taken, (start, end) in seconds.

    [U17] The span is cut into T equal parts and the frame on show in the middle of each is taken, so
    that frame i stands for the time i / fps, which is what the positions say.
    """
    with _open(path, name) as container:
        if not container.streams.video:
            raise BadRow(f"{name}: {path} has no video stream: drop the row or give it as audio")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        first = float((stream.start_time or 0) * stream.time_base)  # a stream need not begin at 0
        length = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, av.time_base)  # fmt: skip
        if length <= 0:
            raise BadRow(f"{name}: {path} does not tell its duration: re-encode it")
        start, end = float(start or 0), min(float(end or length), float(length))
        if end <= start:
            raise BadRow(f"{name}: start {start} s lies behind the end {end} s of {path}: mend start and end")
        count = min(max(round((end - start) * recipe.fps / 2) * 2, 2), recipe.max_frames // 2 * 2)
        wanted = first + start + (np.arange(count) + 0.5) * (end - start) / count
        width, height = frame_size(stream.width, stream.height, recipe.max_pixels)
        try:
            frames = _frames_at(container, stream, wanted, width, height)
        except av.FFmpegError as error:
            raise BadRow(f"{name}: {path} breaks off while decoding ({error}): fetch or re-encode it") from None
    if len(frames) < count:
        raise BadRow(
            f"{name}: {path} ends {(count - len(frames)) * (end - start) / count:.1f} s early "
            f"({len(frames)} of {count} frames): it is cut off, fetch it again"
        )
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(), count / (end - start), (start, end)


def _frames_at(container, stream, wanted, width, height):
    """The frames on show at the times `wanted` (ascending, seconds); fewer if the file ends early."""
    frames, shown, decoder = [], None, None
    half_frame = 0.5 / float(stream.average_rate or 25)
    for time in wanted:
        if decoder is None or shown is None or time - shown.time > SEEK_AHEAD:
            container.seek(max(int(time / stream.time_base), 0), stream=stream)
            decoder = container.decode(stream)
            shown, ahead = None, next(decoder, None)
        while ahead is not None and (shown is None or ahead.time <= time):
            shown, ahead = ahead, next(decoder, None)
        if shown is None or (ahead is None and time > shown.time + (shown.duration or 0) * float(stream.time_base) + half_frame):  # fmt: skip
            break
        frames.append(shown.to_ndarray(format="rgb24", width=width, height=height))
    return frames


def decode_audio(path, name, start, end, recipe):
    """-> (S,) float32, mono, 16 kHz: exactly the span start..end, silence where the track is shorter."""
    with _open(path, name) as container:
        if not container.streams.audio:
            raise BadRow(f"{name}: {path} has no audio stream: set use_audio to false or give a clip with sound")
        stream = container.streams.audio[0]
        rate, begin = stream.rate, float(start or 0)
        limit = float(end) if end else None
        if limit and limit - begin > recipe.max_audio_seconds:
            raise BadRow(f"{name}: {limit - begin:.0f} s of sound: raise --max-audio-seconds or set start and end")
        clock = (*container.streams.video, stream)[0]  # t = 0 is the first frame; codecs prime before it
        first = float((clock.start_time or 0) * clock.time_base)
        if begin > SEEK_AHEAD:
            container.seek(int((first + begin) * av.time_base))
        pieces = []  # (time of the first sample, (S,) float32 mono)
        try:
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)  # mixes down only
            for frame in container.decode(stream):
                time = (frame.time or 0.0) - first
                if limit and time >= limit:
                    break
                for mono in resampler.resample(frame):
                    pieces.append((time, mono.to_ndarray()[0]))
                if not limit and time - begin > recipe.max_audio_seconds:
                    raise BadRow(f"{name}: over {recipe.max_audio_seconds:.0f} s of sound: raise --max-audio-seconds or set start and end")  # fmt: skip
        except av.FFmpegError as error:
            raise BadRow(f"{name}: the sound of {path} breaks off ({error}): fetch or re-encode it") from None
    if not pieces:
        raise BadRow(f"{name}: {path} has an audio stream without sound in it: set use_audio to false")
    limit = limit or pieces[-1][0] + len(pieces[-1][1]) / rate
    track = np.zeros(round((limit - begin) * rate), np.float32)
    for time, samples in pieces:  # by their own time stamps: codecs prime, streams start late
        at = round((time - begin) * rate)
        samples = samples[max(-at, 0) : max(len(track) - at, 0)]
        track[max(at, 0) : max(at, 0) + len(samples)] = samples
    if rate == AUDIO_RATE:
        return track
    return torchaudio.functional.resample(torch.from_numpy(track), rate, AUDIO_RATE).numpy()


def decode_image(path, name, recipe):
    with _open(path, name) as container:
        try:
            frame = next(container.decode(video=0), None)
        except av.FFmpegError as error:
            raise BadRow(f"{name}: {path} is no image ({error})") from None
        if frame is None:
            raise BadRow(f"{name}: {path} holds no image")
        width, height = frame_size(frame.width, frame.height, recipe.max_pixels)
        return torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height)).permute(2, 0, 1)


# ---- reading ahead -----------------------------------------------------------------------------


class Reader:
    """
    Reads rows in threads ahead of the loop (PyAV and torch let other threads run while they work)
    and keeps what it read, or what the towers made of it, up to a bound.

    load          callable(row, hint) -> model inputs, run in a thread
    cache_bytes   int     of tensors kept, least recently used out first
    """

    def __init__(self, load, workers, cache_bytes):
        self.load, self.pool = load, ThreadPoolExecutor(max(workers, 1))
        self.pending, self.kept, self.room = {}, OrderedDict(), cache_bytes

    def prefetch(self, row, hint=None):
        key = (row["prompt_id"], hint)
        if key not in self.pending and key not in self.kept:
            self.pending[key] = self.pool.submit(self.load, row, hint)

    def get(self, row, hint=None):
        """The inputs of a row, waiting only if they are not ready; raises BadRow."""
        self.prefetch(row, hint)
        key = (row["prompt_id"], hint)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        inputs = self.pending.pop(key).result()
        self.put(row, hint, inputs)
        return inputs

    def put(self, row, hint, inputs):
        """Keeps `inputs` in the place of what was kept for the row."""
        key = (row["prompt_id"], hint)
        self.room += tensor_bytes(self.kept.pop(key, None)) - tensor_bytes(inputs)
        self.kept[key] = inputs
        while self.room < 0:
            self.room += tensor_bytes(self.kept.popitem(last=False)[1])


def tensor_bytes(tree):
    """Bytes of all tensors in a nest of tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else ()
    return sum(map(tensor_bytes, parts))


def shuffled(num_rows, seed, skip=0):
    """Endless row indices: every epoch a new order, the same for every rank, from position `skip`."""
    epoch, at = divmod(skip, num_rows)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        yield from order[at:].tolist()
        epoch, at = epoch + 1, 0


# ---- check -------------------------------------------------------------------------------------


def check(path, recipe, count_tokens=None):
    """Every problem of a JSONL, one line each -> (number of rows, list of str)."""
    path, problems, ids, num_rows = Path(path), [], set(), 0
    with open(path, "rb") as file:
        for number, line in enumerate(tqdm(file, desc="rows", disable=None, leave=False), 1):
            if not line.strip():
                continue
            num_rows += 1
            try:
                row = parse_line(line, f"{path.name}:{number}")
                prompt_id = row_id(row, f"{path.name}:{number}")
                if prompt_id in ids:
                    raise BadRow(f"row {prompt_id}: the id occurs twice: make ids unique")
                ids.add(prompt_id)
                row = normalize_row(row)
                clip = decode_clip(row, path.parent, recipe)
                if count_tokens:
                    count_tokens(row, clip)
            except BadRow as problem:
                problems.append(f"{path.name}:{number}: {str(problem).removeprefix(f'{path.name}:{number}: ')}")
    return num_rows, problems


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file", help="JSONL of rows")
    parser.add_argument("--model", help="also count prompt tokens with this model's processor")
    add_flags(parser)
    args = parser.parse_args(argv)
    recipe, count_tokens = recipe_from(args), None
    if not Path(args.file).is_file():
        sys.exit(f"data.py: no data file at {args.file}")
    if args.model:
        from model import InputBuilder

        build = InputBuilder(args.model, recipe, Path(args.file).parent, False)
        count_tokens = lambda row, clip: build.from_clip(row, clip, None)  # noqa: E731
    num_rows, problems = check(args.file, recipe, count_tokens)
    print("\n".join([*problems, f"{num_rows} rows, {len(problems)} would not train"]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
