"""
The frozen models that are asked about a clip: the captioner of stage 2's sounds, the teacher of the
hints, the judge of stage 3's reasoning. One way to ask, two kinds of model: any OpenAI-compatible
chat server by its URL, or a local Hugging Face folder in this process.

Every answer is kept on disk under a hash of the whole question, media included, so nothing is asked
twice: a killed run goes on where it was. A server's key is read from the environment
(OPENAI_API_KEY), sent to that server only, and never printed or written.
"""

import base64
import hashlib
import io
import json
import os
import threading
import wave
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torchvision

from data.clips import AUDIO_RATE, decode_clip, find_media
from data.rows import RESERVED, TAGS, media_paths
from run.errors import UserError
from teachers.chat import NoAnswer, Server
from teachers.local import Local, frame_times

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

    def __init__(
        self,
        where,
        name,
        folder,
        recipe,
        answers,
        concurrency,
        timeout,
        retries,
        frames_as="images",
        device="cpu",
    ):
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

    def __enter__(self):
        return self

    def __exit__(self, *_):
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
            model=self.name,
            text=text,
            media=self._media_key(row),
            frames_as=self.frames_as,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            format=FORMAT,
            schema=shape and shape[0],
        )
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
        for file in media_paths(row):
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
        return base64.b64encode(
            torchvision.io.encode_jpeg(x.contiguous(), quality=90).numpy()
        ).decode()

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


def plain(text):
    """A reply on one line, without what a row's text may not hold."""
    text = TAGS.sub(" ", RESERVED.sub(" ", text))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
