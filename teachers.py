"""
The frozen models that are asked about a clip: the captioner of stage 2's sounds, the teacher of the
hints (hints.py), the judge of stage 3's reasoning (judge.py). One way to ask, two kinds of model:
any OpenAI-compatible chat server by its URL, or a local Hugging Face folder in this process.

    python teachers.py caption --data IN --out OUT --captioner http://localhost:8000/v1 \\
        --captioner-model moonshotai/Kimi-Audio-7B-Instruct
    python teachers.py caption --data IN --out OUT --captioner FOLDER

Every answer is kept on disk under a hash of the whole question, media included, so nothing is asked
twice: a killed run goes on where it was. A server's key is read from the environment
(OPENAI_API_KEY), sent to that server only, and never printed or written.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import threading
import wave
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from run import PARSER, UserError, main_guard  # before torch: it sets how torch's threads wait

import numpy as np
import torch
import torchvision
from tqdm import tqdm

import data
from chat import NoAnswer, Server
from clips import AUDIO_RATE, BadRow, decode_clip, find_media
from local import Local, frame_times

KEY = "OPENAI_API_KEY"  # of the environment
CLIPS_KEPT, FORMAT = 32, 1  # decoded clips in memory; part of every hash: raise it if prompts move


class Teacher:
    """
    A frozen model behind one method, `ask`. Its methods may be called by many threads.

    where        "http://host:8000/v1", or a Hugging Face folder: InternVL3, Qwen2.5-VL, ...
    name         str or None   how the server calls the model; a folder has no need of it
    folder       Path          that the rows' media paths are relative to
    recipe       clips.Recipe  how clips are decoded
    answers      Path          folder of the answers kept
    concurrency  int           requests at one time; 1 for a folder
    timeout      float         seconds of one attempt, to its last byte
    retries      int           attempts after the first, each waiting about twice as long as before
    frames_as    "images": one part a frame, any server; "video": one part for all, vLLM only
    device       torch.device  of a folder's model
    raises       UserError     no such folder, no model name, an address that is none
    """

    def __init__(self, where, name, folder, recipe, answers, concurrency, timeout, retries,
                 frames_as="images", device="cpu"):  # fmt: skip
        self.where, self.name, self.folder, self.recipe = where, name, Path(folder), recipe
        self.answers, self.frames_as, self.lock = Path(answers), frames_as, threading.Lock()
        self.clips, self.digests, self.local, self.server = OrderedDict(), {}, None, None
        self.ended = None  # why nothing more is asked
        if where.startswith(("http://", "https://")):
            if not name:
                raise UserError(
                    f"{where}: which model? give its name there: --judge-model, --teacher-model"
                )
            key = os.environ.get(KEY, "").strip()
            try:
                self.server = Server(where, key, timeout, retries)
            except ValueError as error:
                raise UserError(str(error)) from None
        else:
            self.local, concurrency = Local(where, device), 1
            self.name = self.local.name
        self.pool = ThreadPoolExecutor(concurrency)

    def submit(self, function, *args):
        """Runs a function that asks, in a thread; at most `concurrency` at one time -> Future."""
        return self.pool.submit(function, *args)

    def end(self, why):
        """Ends the questions under way; from now on `ask` knows only the answers kept."""
        self.ended = self.ended or why
        if self.server:
            self.server.close()

    def close(self):
        """Ends all that is under way, so that a program which stops does not wait for it."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.end("closed")

    def ask(self, row, kinds, text, max_tokens, accept, temperature=0.0, seed=0, shape=None):
        """
        One question about a row's clip -> accept(reply).

        kinds        what is shown of the clip: some of "frames", "audio"
        accept       callable(str) -> value; ValueError: the reply is of no use, and is not kept
        temperature  0: the likeliest reply; else `seed` tells its draws apart
        shape        None, or (JSON schema, pieces) that the reply has to follow: a server is told
                     the schema; a folder can write nothing but the pieces, each a str or a list
                     of alternatives, none the beginning of another
        raises       NoAnswer   the server is dead, too slow or refuses; the reply is of no use
                     BadRow     the clip cannot be decoded
                     UserError  the key, the address or the model name is wrong
        """
        if self.ended and not self.answers.is_dir():  # spares reading the clip for its hash
            raise NoAnswer(f"not asked: {self.ended}")
        row = self._shown(row, kinds)
        question = dict(
            model=self.name, text=text, media=self._media_key(row), frames_as=self.frames_as,
            max_tokens=max_tokens, temperature=temperature, seed=seed, format=FORMAT,
            schema=shape and shape[0],
        )  # fmt: skip
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        path = self.answers / key[:2] / f"{key}.json"
        try:
            return accept(str(json.loads(path.read_text())["reply"]))
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            pass  # not asked yet, or a damaged file
        if self.ended:
            raise NoAnswer(f"not asked: {self.ended}")
        clip = self._clip(row, question["media"])
        if self.local:
            reply = self.local.chat(clip, text, max_tokens, temperature, seed, shape)
        else:
            body = dict(model=self.name, max_tokens=max_tokens, temperature=temperature, seed=seed)
            body["messages"] = [{"role": "user", "content": [*clip, dict(type="text", text=text)]}]
            if shape:
                schema = dict(name="reply", strict=True, schema=shape[0])
                body["response_format"] = dict(type="json_schema", json_schema=schema)
            try:
                reply = self.server.chat(body)
            except NoAnswer as problem:
                if problem.refused:
                    told = f"{problem}: check the address, the model's name and {KEY}"
                    raise UserError(told) from None
                raise
        try:
            value = accept(reply)
        except ValueError as error:
            told = " ".join(reply.split())[:80]
            raise NoAnswer(f"the reply is of no use ({error}): {told!r}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.urandom(6).hex()}.part")  # several nodes may write it
        part.write_text(json.dumps(dict(model=self.name, text=text, reply=reply)))
        os.replace(part, path)  # whole or not at all
        return value

    # ---- the clip ------------------------------------------------------------------------------

    def _shown(self, row, kinds):
        """The row without what is not to be shown."""
        row = dict(row)
        if "audio" not in kinds:
            row |= dict(audio=None, use_audio=False)
        if "frames" not in kinds:
            row |= dict(images=[], video=row.get("video") if row.get("use_audio") else None)
        return row | dict(kinds=sorted(kinds))

    def _media_key(self, row):
        """What tells this clip from every other: the bytes of its files, span and recipe."""
        digests = []
        for file in data.media_paths(row):
            path = find_media(f"row {row['prompt_id']}", self.folder, file, self.recipe)
            about = path.stat()
            about = (str(path), about.st_size, about.st_mtime_ns)
            if about not in self.digests:
                with open(path, "rb") as content:
                    self.digests[about] = hashlib.file_digest(content, "blake2b").hexdigest()[:32]
            digests.append(self.digests[about])
        span = [row.get("start"), row.get("end"), bool(row.get("use_audio"))]
        return [digests, span, list(self.recipe[:4]), row["kinds"]]

    def _clip(self, row, key):
        """A decoded clip, as the model takes it; once, also for many threads that ask for it."""
        key = json.dumps(key)
        with self.lock:
            mine = key not in self.clips
            made = self.clips.setdefault(key, Future())
            self.clips.move_to_end(key)
            while len(self.clips) > CLIPS_KEPT:
                self.clips.popitem(last=False)
        if mine:
            try:
                clip = decode_clip(row, self.folder, self.recipe)
                clip = clip if "frames" in row["kinds"] else clip._replace(frames=None)
                parts = self.local.parts(clip) if self.local else http_parts(clip, self.frames_as)
                made.set_result(parts)
            except BaseException as error:  # those who wait for it have to learn of it
                made.set_exception(error)
        return made.result()


def http_parts(clip, frames_as):
    """A Clip -> the content parts of a chat message."""

    def jpeg(x):
        encoded = torchvision.io.encode_jpeg(x.contiguous(), quality=90)
        return base64.b64encode(encoded.numpy()).decode()

    url = lambda kind, text: {"type": kind, kind: {"url": text}}  # noqa: E731
    frames = [jpeg(x) for x in ([] if clip.frames is None else clip.frames)]
    parts = [url("image_url", "data:image/jpeg;base64," + jpeg(x)) for x in clip.images]
    if frames_as == "video" and frames:  # vLLM: the JPEGs of a video, with commas between them
        parts.append(url("video_url", "data:video/jpeg;base64," + ",".join(frames)))
    else:
        parts += [url("image_url", "data:image/jpeg;base64," + frame) for frame in frames]
    for audio in clip.sounds:
        sound = dict(data=base64.b64encode(wav_bytes(audio)).decode(), format="wav")
        parts.append(dict(type="input_audio", input_audio=sound))
    return parts + frame_times(clip)


def wav_bytes(audio):
    """(S,) float32 at 16 kHz -> a 16-bit wav file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(AUDIO_RATE)
        out.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


# ---- a field of every row ----------------------------------------------------------------------


def add_flags(parser, who):
    """The flags of a command that asks a model about the rows of a file."""
    flag = parser.add_argument
    flag("--data", required=True, help="JSONL of rows")
    flag("--out", required=True, help="JSONL to write, in the folder of --data; one row a row")
    flag(f"--{who}", required=True, help="URL of a chat server (http://host:8000/v1) or a folder")
    flag(f"--{who}-model", help="the model's name on the server")
    flag("--answers", help="folder of the answers kept (default: OUT.answers)")
    flag("--concurrency", type=int, default=16, help="requests at one time")
    flag("--timeout", type=float, default=300.0, help="seconds for one attempt")
    flag("--retries", type=int, default=4, help="attempts after the first")
    flag("--frames-as", choices=["images", "video"], default="images", help="video: vLLM only")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of a folder")
    data.add_flags(parser, keeps_clips=False)


def from_args(args, where, name):
    """-> the Teacher of such a command."""
    data.check_file(args.data)
    if Path(args.out).resolve().parent != Path(args.data).resolve().parent:
        raise UserError("--out must lie beside --data: the rows' media paths are relative to it")
    if args.concurrency < 1 or args.retries < 0 or args.timeout <= 0:
        raise UserError("--concurrency and --timeout must be over 0, --retries at least 0")
    recipe, answers = data.recipe_from(args), args.answers or f"{args.out}.answers"
    return Teacher(
        where, name, Path(args.data).parent, recipe, answers, args.concurrency, args.timeout,
        args.retries, args.frames_as, args.device,
    )  # fmt: skip


def fill(teacher, source, out, field, find, keep, concurrency):
    """
    Copies a JSONL row by row and gives each row a field that it lacks.

    find     callable(row) -> text or None (the row needs none); raises NoAnswer, BadRow
    keep     callable(row, text) -> None, or why the text that a row has is not to be kept
    returns  dict of counts: rows, kept (had it), new, needless, without
    raises   UserError    after writing OUT: the model cannot be reached or refuses us

    One row in, one row out, in order. A row without an answer is named and stays as it is, but for
    a text that is not to be kept. An OUT of before is not read: its rows, their clips or the model
    may have changed since; the answers kept know, and give again what is still true.
    """
    lines, name = Path(source).read_bytes().splitlines(), Path(source).name
    counts, waiting, dead = dict(rows=0, kept=0, new=0, needless=0, without=0), deque(), 0
    part, late = Path(f"{out}.part"), []  # late: lines without an answer since the model's end

    def look(line, where):
        """-> the line to write, what became of the row, why it has no answer."""
        try:
            raw = data.parse_line(line, where)
            row = data.normalize_row(raw)
            text = raw.pop(field, None)
            why = keep(row, text) if text else None
            if text and not why:
                return line, "kept", None
            if why:
                bar.write(f"row {row['prompt_id']}: its {field} is not kept: {why}")
                line = json.dumps(raw).encode()
            if text := find(row):
                return json.dumps(raw | {field: text}).encode(), "new", None
            return line, "needless", None
        except (NoAnswer, BadRow, UserError) as problem:
            if isinstance(problem, UserError):
                teacher.end(str(problem))
            return line, "without", problem

    def settle(number, asked):
        nonlocal dead
        line, kind, problem = asked.result()
        dead = 0 if kind == "new" else dead + getattr(problem, "dead", False)
        if teacher.ended and isinstance(problem, (NoAnswer, UserError)):
            if not late:
                bar.write(f"{teacher.ended}: for the rest only the answers kept are looked up")
            late.append(number)
        elif problem:
            bar.write(f"{name}:{number}: {problem}")
        if dead > 2 * concurrency and not teacher.ended:
            teacher.end(f"{teacher.where} does not answer")
        counts["rows"] += 1
        counts[kind] += 1
        file.write(line + b"\n")
        bar.update()

    with open(part, "wb") as file, tqdm(total=len(lines), desc=field, disable=None) as bar:
        for number, line in enumerate(lines, 1):
            if line.strip():
                waiting.append((number, teacher.submit(look, line, f"{name}:{number}")))
            if len(waiting) > 4 * concurrency:
                settle(*waiting.popleft())
        while waiting:
            settle(*waiting.popleft())
    os.replace(part, out)
    if late:
        print(f"{name}: no answer since then: lines {spans(late)}")
    told = (
        f"{out}: {counts['rows']} rows: {counts['new']} got their {field}, {counts['kept']} had it"
    )
    told += f", {counts['needless']} need none, {counts['without']} without"
    print(told + (": named above; mend the cause and run again" if counts["without"] else ""))
    if teacher.ended:
        raise UserError(f"{teacher.ended}; the answers so far are kept: run again to go on")
    return counts


def spans(numbers):
    """[1, 3, 4, 5] -> "1, 3-5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda x: x[1] - x[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def plain(text):
    """A reply on one line, without what a row's text may not hold."""
    text = data.TAGS.sub(" ", data.RESERVED.sub(" ", text))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---- captions of sounds ------------------------------------------------------------------------

CAPTION = (
    "Describe what is heard in this recording in one or two short sentences: voices and what they "
    "say, music, other sounds, in the order in which they come, and how often. Say only what is "
    "heard. Reply with the description alone."
)
MAX_CAPTION = 120  # words


def find_caption(teacher, row):
    """The caption of a row's sound; None for a row without sound."""
    if not (row.get("audio") or row.get("use_audio")):
        return None

    def accept(reply):
        words = plain(reply).strip("\"' ").split()
        if not any(c.isalnum() for c in "".join(words)):
            raise ValueError("no words")
        return " ".join(words[:MAX_CAPTION]).removesuffix(".")

    return teacher.ask(row, ("audio",), CAPTION, 2 * MAX_CAPTION, accept)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    parser.add_argument("command", choices=["caption"], help="write audio_caption into every row")
    add_flags(parser, "captioner")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    teacher = from_args(args, args.captioner, args.captioner_model)
    try:
        find = lambda row: find_caption(teacher, row)  # noqa: E731
        counts = fill(teacher, args.data, args.out, "audio_caption", find, lambda row, text: None,
                      args.concurrency)  # fmt: skip
    finally:
        teacher.close()
    sys.exit(1 if counts["without"] else 0)


if __name__ == "__main__":
    main_guard(main)
