"""
Frozen models that answer questions about a row's clip: the captioner of stage 2's sounds, the
teacher that writes hints, the judge of stage 3's reasoning.

Every reply is cached on disk under a hash of the whole question, media included: nothing is asked
twice, and a killed run continues where it was.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

from data.clips import decode_clip, find_media
from data.rows import media_paths
from run.errors import UserError
from teachers.backends import KEY_VARIABLE, ChatError, ChatServer, LocalModel

CLIPS_IN_MEMORY = 32  # decoded clips
FORMAT = 1  # part of every hash: raise it if what a model is shown changes


class FrozenModel:
    """
    A chat server or a local folder behind one method, `query`. For many threads.

    where         "http://host:8000/v1", or a Hugging Face folder: InternVL3, Qwen2.5-VL, ...
    model_name    str or None   the model's name on the server; a folder needs none
    media_folder  Path          that the rows' media paths are relative to
    media_config  MediaConfig   how clips are decoded
    cache_dir     Path          folder of the cached replies
    timeout       float         seconds for one attempt, to its last byte
    max_retries   int           attempts after the first
    frames_as     "images": one part a frame, any server; "video": one part for all, vLLM only
    device        of a folder's model
    raises        UserError     no such folder, no model name, not an address
    """

    def __init__(
        self,
        where,
        *,
        model_name,
        media_folder,
        media_config,
        cache_dir,
        timeout,
        max_retries,
        frames_as="images",
        device="cpu",
    ):
        self.where = where
        self.media_folder = Path(media_folder)
        self.media_config = media_config
        self.cache_dir = Path(cache_dir)
        self.frames_as = frames_as
        if where.startswith(("http://", "https://")):
            if not model_name:
                flags = "--judge-model, --captioner-model, --teacher-model"
                raise UserError(f"{where}: which model? give its name on the server: {flags}")
            self.backend = ChatServer(
                where,
                model_name=model_name,
                timeout=timeout,
                max_retries=max_retries,
                frames_as=frames_as,
            )
        else:
            self.backend = LocalModel(where, device)
        self.stop_reason = None  # set: only cached replies are given
        self._clip_parts = OrderedDict()  # media key -> Future of the parts, the newest last
        self._file_digests = {}  # (path, size, mtime) -> digest
        self._lock = threading.Lock()

    def stop(self, reason):
        """Ends the questions under way. From now on `query` knows only cached replies."""
        self.stop_reason = self.stop_reason or reason
        self.backend.close()

    def query(
        self,
        row,
        text,
        *,
        modalities,
        max_tokens,
        parse,
        temperature=0.0,
        seed=0,
        json_schema=None,
        pieces=None,
    ):
        """
        One question about a row's clip -> parse(reply).

        modalities   what the model gets of the clip: some of "frames", "audio"
        parse        callable(str) -> value; ValueError: the reply is unusable and not cached
        temperature  0: the likeliest reply; else `seed` tells its draws apart
        json_schema  None, or what a server makes the reply follow
        pieces       None, or the same for a local model: what it has to write one after the other,
                     each a str or a list of alternatives, none the beginning of another
        raises       ChatError    the server is dead or too slow; the reply is unusable
                     BadRow       the clip cannot be decoded
                     UserError    the key, the address or the model's name is wrong
        """
        if self.stop_reason and not self.cache_dir.is_dir():  # spares reading the clip for its hash
            raise ChatError(f"not asked: {self.stop_reason}")
        row = only_modalities(row, modalities)
        media_key = self._media_key(row, modalities)
        path = self._cache_path(
            dict(
                model=self.backend.model_name,
                text=text,
                media=media_key,
                frames_as=self.frames_as,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                format=FORMAT,
                schema=json_schema,
            )
        )
        try:
            return parse(str(json.loads(path.read_text())["reply"]))
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            pass  # not asked yet, or a damaged file

        if self.stop_reason:
            raise ChatError(f"not asked: {self.stop_reason}")
        try:
            reply = self.backend.chat(
                self._parts_of_clip(row, media_key, modalities),
                text,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                json_schema=json_schema,
                pieces=pieces,
            )
        except ChatError as error:
            if error.refused:
                remedy = f"check the address, the model's name and {KEY_VARIABLE}"
                raise UserError(f"{error}: {remedy}") from None
            raise
        try:
            value = parse(reply)
        except ValueError as error:
            start = " ".join(reply.split())[:80]
            raise ChatError(f"the reply is unusable ({error}): {start!r}") from None
        self._cache_reply(path, text, reply)
        return value

    # ---- cached replies --------------------------------------------------------------------------

    def _cache_path(self, question):
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self.cache_dir / key[:2] / f"{key}.json"

    def _cache_reply(self, path, text, reply):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.urandom(6).hex()}.part")  # several nodes may write it
        part.write_text(json.dumps(dict(model=self.backend.model_name, text=text, reply=reply)))
        os.replace(part, path)  # complete or not there

    # ---- the clip --------------------------------------------------------------------------------

    def _media_key(self, row, modalities):
        """What distinguishes this clip from every other: its files' bytes, span and decoding."""
        digests = []
        for file in media_paths(row):
            path = find_media(f"row {row['prompt_id']}", self.media_folder, file, self.media_config)
            digests.append(self._digest(path))
        span = [row.get("start"), row.get("end"), bool(row.get("use_audio"))]
        config = self.media_config
        limits = [config.fps, config.max_frames, config.max_pixels, config.max_audio_seconds]
        return [digests, span, limits, sorted(modalities)]

    def _digest(self, path):
        stat = path.stat()
        version = (str(path), stat.st_size, stat.st_mtime_ns)
        if version not in self._file_digests:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
            self._file_digests[version] = digest
        return self._file_digests[version]

    def _parts_of_clip(self, row, media_key, modalities):
        """The clip as the backend takes it; decoded once, also if many threads need it."""
        key = json.dumps(media_key)
        with self._lock:
            decodes_here = key not in self._clip_parts
            parts = self._clip_parts.setdefault(key, Future())
            self._clip_parts.move_to_end(key)
            while len(self._clip_parts) > CLIPS_IN_MEMORY:
                self._clip_parts.popitem(last=False)
        if decodes_here:
            try:
                clip = decode_clip(row, self.media_folder, self.media_config)
                if "frames" not in modalities:
                    clip = clip._replace(frames=None)
                parts.set_result(self.backend.clip_parts(clip))
            except BaseException as error:  # the threads that wait for the clip get it too
                parts.set_exception(error)
        return parts.result()


def only_modalities(row, modalities):
    """The row without the media that the model does not get."""
    row = dict(row)
    if "audio" not in modalities:
        row |= dict(audio=None, use_audio=False)
    if "frames" not in modalities:
        row["images"] = []
        if not row.get("use_audio"):  # a video is still needed for its sound
            row["video"] = None
    return row
