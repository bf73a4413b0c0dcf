"""
The two kinds of frozen model, with the same two methods: a chat server (vLLM, `transformers serve`,
any server with OpenAI's interface) and a Hugging Face folder in this process.

    parts = backend.clip_parts(clip)             what the model gets to see and hear
    reply = backend.chat(parts, text, ...)       its reply, str
"""

import base64
import io
import os
import ssl
import threading
import time
import wave
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

# torch, torchvision, transformers and openai take seconds to load: they are imported where they are
# used, so that a command can refuse a mistyped flag at once
from data.clips import AUDIO_RATE
from run.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"  # of the environment
MAX_REPLY_BYTES = 2**22
NO_KEY = "none"  # the client needs some key; servers that check none ignore it


class ChatError(Exception):
    """
    There is no usable reply to a question.

    unreachable   nobody answers at the address: no connection, or not within the time limit
    refused       the server will never answer: the address, the model's name or the key is wrong
    """

    def __init__(self, message, unreachable=False, refused=False):
        super().__init__(message)
        self.unreachable = unreachable
        self.refused = refused


# ---- a chat server -------------------------------------------------------------------------------


class ChatServer:
    """
    A server with OpenAI's chat interface, through the `openai` client. For many threads.

    address      "http://host:8000/v1"
    model_name   str     the model's name on the server
    timeout      float   seconds for one attempt, from connecting to the last byte
    max_retries  int     attempts after the first, after waits that double (the client's own rule),
                         or after as long as the server asks for, up to two minutes
    frames_as    "images": one part a frame, any server; "video": one part for all, vLLM only
    raises       UserError    the address is not one

    The key is read from OPENAI_API_KEY, sent to this address only (redirects are not followed), and
    never printed or written.
    """

    def __init__(self, address, *, model_name, timeout, max_retries, frames_as):
        import openai

        self.address = address
        self.model_name = model_name
        self.frames_as = frames_as
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            self._key = ""
        self._client = openai.OpenAI(
            base_url=api_root(address),
            api_key=self._key or NO_KEY,
            timeout=timeout,
            max_retries=max_retries,
            http_client=bounded_http_client(timeout),
        )
        self._running = set()  # futures of the questions under way
        self._closed = False
        self._lock = threading.Lock()

    def clip_parts(self, clip):
        """A Clip -> the content parts of a chat message."""
        parts = [image_part(image) for image in clip.images]
        frames = [] if clip.frames is None else list(clip.frames)
        if self.frames_as == "video" and frames:
            jpegs = ",".join(base64_jpeg(frame) for frame in frames)  # as vLLM reads them
            parts.append(url_part("video_url", "data:video/jpeg;base64," + jpegs))
        else:
            parts += [image_part(frame) for frame in frames]
        for audio in clip.sounds:
            data = base64.b64encode(wav_bytes(audio)).decode()
            parts.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
        return parts + frame_times(clip)

    def chat(self, parts, text, *, max_tokens, temperature, seed, json_schema=None, pieces=None):
        """
        json_schema  the reply's JSON schema, or None; `pieces` are for a local model only
        returns      str
        raises       ChatError    no reply within the time limit, an error status, no text
        """
        content = [*parts, {"type": "text", "text": text}]
        request = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if json_schema:
            schema = {"name": "reply", "strict": True, "schema": json_schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return self._abandonable(lambda: self._complete(request))

    def close(self):
        """From here on, questions under way and new ones end with a ChatError at once."""
        with self._lock:
            self._closed = True
            for future in self._running:
                future.set_exception(ChatError(f"{self.address}: not waited for any longer"))
            self._running.clear()

    def _abandonable(self, function):
        """function() in a daemon thread, which neither close() nor the end of the program awaits."""
        future = Future()

        def run():
            try:
                result, error = function(), None
            except BaseException as problem:  # whoever waits for the reply gets it
                result, error = None, problem
            with self._lock:
                if future in self._running:  # not closed in the meantime
                    self._running.discard(future)
                    future.set_exception(error) if error else future.set_result(result)

        with self._lock:
            if self._closed:
                raise ChatError(f"{self.address}: closed")
            self._running.add(future)
        threading.Thread(target=run, daemon=True).start()
        return future.result()

    def _complete(self, request):
        import openai

        try:
            completion = self._client.chat.completions.create(**request)
        except openai.APIConnectionError as error:  # also timeouts
            reason = error.__cause__ or error
            message = f"{self.address} does not answer ({type(reason).__name__}: {reason})"
            raise ChatError(self._without_key(message), unreachable=True) from None
        except openai.APIStatusError as error:
            # the whole text, before it is cut: half a key is a secret too
            text = self._without_key(error.response.text)
            message = f"{self.address}: status {error.status_code}: {' '.join(text.split())[:200]}"
            raise ChatError(message, refused=error.status_code in (401, 403, 404)) from None
        except (ValueError, RecursionError):  # called JSON, and is not
            completion = None
        try:
            text = completion.choices[0].message.content
        except (AttributeError, LookupError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise ChatError(f"{self.address} sent no text")
        # half a character (a lone surrogate) could not be written to a file
        return self._without_key(text.encode("utf-8", "replace").decode())

    def _without_key(self, text):
        return text.replace(self._key, "***") if self._key else text


def api_root(address):
    """ "http://host:8000" or ".../v1/chat/completions" -> "http://host:8000/v1" """
    try:
        url = urlsplit(address)
        if not url.hostname or url.port == 0:
            raise ValueError("no host, or port 0")
    except ValueError as error:  # a port that is no number, a bracket left open
        raise UserError(
            f"{address} is not a valid URL ({error}): give one like http://host:8000/v1"
        ) from None
    path = url.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{url.scheme}://{url.netloc}{path}"


def bounded_http_client(timeout):
    """
    An HTTP client in which one attempt takes `timeout` seconds and MAX_REPLY_BYTES at most. The
    client's own timeouts are for each read: a server that sends a byte now and then would hold it
    for ever. Certificates are the system's; no proxy of the environment is used.
    """
    import httpx2 as httpx  # the HTTP library under `openai`

    class BoundedBody(httpx.SyncByteStream):
        def __init__(self, stream, deadline):
            self.stream = stream
            self.deadline = deadline

        def __iter__(self):
            num_bytes = 0
            for chunk in self.stream:
                num_bytes += len(chunk)
                if num_bytes > MAX_REPLY_BYTES:
                    raise httpx.ReadError(f"over {MAX_REPLY_BYTES} bytes")
                if time.monotonic() > self.deadline:
                    raise httpx.ReadTimeout(f"no end of the reply within {timeout:g} s")
                yield chunk

        def close(self):
            self.stream.close()

    class BoundedTransport(httpx.HTTPTransport):
        def handle_request(self, request):
            deadline = time.monotonic() + timeout
            response = super().handle_request(request)
            response.stream = BoundedBody(response.stream, deadline)
            return response

    # no connection is kept: a server that restarts between two questions is no error
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(
        transport=BoundedTransport(verify=ssl.create_default_context(), limits=limits),
        timeout=timeout,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # the bound is on bytes as they are sent
    )


def url_part(kind, url):
    return {"type": kind, kind: {"url": url}}


def image_part(image):
    return url_part("image_url", "data:image/jpeg;base64," + base64_jpeg(image))


def base64_jpeg(image):
    """(3, H, W) uint8 -> str"""
    import torchvision

    jpeg = torchvision.io.encode_jpeg(image.contiguous(), quality=90)
    return base64.b64encode(jpeg.numpy()).decode()


def wav_bytes(audio):
    """(S,) float32 at 16 kHz -> a 16-bit wav file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(AUDIO_RATE)
        out.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def frame_times(clip):
    """A text part with the times of the frames, which pictures alone do not show; [] without."""
    if clip.frames is None:
        return []
    times = ", ".join(f"{(i + 0.5) / clip.fps:.2f}" for i in range(len(clip.frames)))
    return [{"type": "text", "text": f"Frames of one video, at the seconds {times}."}]


# ---- a folder in this process --------------------------------------------------------------------


class LocalModel:
    """
    A Hugging Face folder (InternVL3, Qwen2.5-VL, ...) in this process; one question at a time.

    raises   UserError    not a model folder, or it cannot be loaded
    """

    def __init__(self, folder, device):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not (Path(folder) / "config.json").is_file():
            raise UserError(
                f"{folder} is neither a model folder nor an http(s) URL: give one of them"
            )
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from None
        self.model = model.to(device).eval().requires_grad_(False)
        if hasattr(self.processor.image_processor, "crop_to_patches"):
            self.processor.image_processor.crop_to_patches = False  # InternVL: one tile a frame
        newest = max(path.stat().st_mtime_ns for path in Path(folder).iterdir())
        self.model_name = f"{Path(folder).resolve()}@{newest}"  # other weights have another name
        self._lock = threading.Lock()

    def clip_parts(self, clip):
        """A Clip -> the content parts of a chat message."""
        from torchvision.transforms.functional import to_pil_image

        frames = [] if clip.frames is None else list(clip.frames)
        parts = [{"type": "image", "image": to_pil_image(x)} for x in [*clip.images, *frames]]
        for audio in clip.sounds:
            parts.append({"type": "audio", "audio": audio})
        return parts + frame_times(clip)

    def chat(self, parts, text, *, max_tokens, temperature, seed, json_schema=None, pieces=None):
        """
        pieces    None, or what the reply is put together from: str, or a list of alternatives, none
                  the beginning of another; `json_schema` is for servers only
        returns   str
        """
        import torch

        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        tokenizer = self.processor.tokenizer
        is_sampled = temperature > 0
        with self._lock, torch.no_grad(), torch.random.fork_rng(enabled=is_sampled):
            inputs = self.processor.apply_chat_template(
                [message],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.model.device)
            for name, tensor in inputs.items():
                if tensor.is_floating_point():
                    inputs[name] = tensor.to(self.model.dtype)
            prompt_length = inputs["input_ids"].shape[1]
            sampling = {"do_sample": False}
            if is_sampled:
                torch.manual_seed(seed)  # forked above: a training run keeps its random state
                sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
            if pieces:
                allowed = allowed_tokens(pieces, tokenizer, prompt_length)
                sampling["prefix_allowed_tokens_fn"] = allowed
            ids = self.model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
        return tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True)

    def close(self):
        pass


def allowed_tokens(pieces, tokenizer, prompt_length):
    """
    For generate's prefix_allowed_tokens_fn: the tokens that may follow, so that the reply is the
    pieces one after the other, of each a single alternative.

    returns   callable(batch index, ids (T,)) -> list of token ids
    """
    alternatives = []  # for each piece, a list of token lists
    for piece in pieces:
        texts = [piece] if isinstance(piece, str) else piece
        alternatives.append([tokenizer.encode(t, add_special_tokens=False) for t in texts])

    def allowed(_, ids):
        written = ids[prompt_length:].tolist()
        for options in alternatives:
            complete = [tokens for tokens in options if written[: len(tokens)] == tokens]
            if not complete:
                begun = [tokens for tokens in options if tokens[: len(written)] == written]
                return sorted({tokens[len(written)] for tokens in begun})
            written = written[len(complete[0]) :]
        return [tokenizer.eos_token_id]

    return allowed
