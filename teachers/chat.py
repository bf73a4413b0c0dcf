"""
One question to an OpenAI-compatible chat server (vLLM, `transformers serve`, ...): deadlines,
retries with back-off, and errors told apart by what can be done about them. Standard library only:
copy this file freely.
"""

import email.utils
import http.client
import json
import random
import socket
import threading
import time
from urllib.parse import urlsplit

TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that may pass: asked again
MAX_REPLY = 2**22  # bytes of an answer
FIRST_WAIT, MAX_WAIT = 1.0, 60.0  # seconds between two attempts


class NoAnswer(Exception):
    """There is none that can be used. `dead`: nobody answers; `refused`: nobody ever will."""

    def __init__(self, why, dead=False, refused=False):
        super().__init__(why)
        self.dead, self.refused = dead, refused


class Server:
    """
    A chat server behind one method, `chat`, which may be called by many threads.

    address   "http://host:8000/v1"
    key       str     sent to this address only (no redirect is followed), told to nobody; "" = none
    timeout   float   seconds of one attempt, from connecting to its last byte
    retries   int     attempts after the first, each after about twice the wait
    raises    ValueError   an address that is none
    """

    def __init__(self, address, key, timeout, retries):
        self.address, self.timeout, self.retries = address, timeout, retries
        try:
            self._url = urlsplit(address)
            if not (self._url.hostname and self._url.port != 0):
                raise ValueError("no host, or port 0")
        except ValueError as error:  # a port that is no number, a bracket left open
            told = f"{address} is no address ({error}): give one like http://host:8000/v1"
            raise ValueError(told) from None
        self._key = key if key.isascii() and key.isprintable() else ""
        self._open, self._lock, self._closed = set(), threading.Lock(), threading.Event()

    def close(self):
        """Ends the questions under way: a program that stops does not wait for them."""
        self._closed.set()
        with self._lock:
            for sock in self._open:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:  # it has ended by itself
                    pass

    def chat(self, body):
        """
        Asks until there is an answer, a refusal, or no attempt left.

        body     dict       of POST .../chat/completions
        returns  str        the text of the first choice
        raises   NoAnswer   timeouts, a dead server, an error status, no text in the answer
        """
        body = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            wait = min(FIRST_WAIT * 2.0**attempt * (0.5 + random.random()), MAX_WAIT)
            try:
                status, headers, content = self._exchange(body)
            except (OSError, http.client.HTTPException) as error:
                why = f"{self.address} does not answer ({type(error).__name__}: {error})"
                problem = NoAnswer(self._hide(why), dead=True)
            else:
                if status == 200:
                    return self._text(content)
                told = self._hide(content.decode(errors="replace"))  # whole: half a key is one too
                told = f"{self.address}: status {status}: {' '.join(told[:300].split())[:200]}"
                problem = NoAnswer(told, refused=status in (401, 403, 404))  # key, address or name
                if status not in TRANSIENT:
                    break
                wait = max(wait, retry_after(headers.get("Retry-After")))
            if attempt == self.retries or self._closed.wait(wait):
                break
        raise problem

    def _hide(self, text):
        return text.replace(self._key, "***") if self._key else text

    def _exchange(self, body):
        """One attempt -> status, headers, content."""
        url, until = self._url, time.monotonic() + self.timeout
        secure = url.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(url.hostname, url.port, timeout=self.timeout)
        path = url.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        sock = None
        try:
            connection.connect()
            sock = connection.sock
            with self._lock:
                self._open.add(sock)
            if self._closed.is_set():
                raise ConnectionError("closed")
            connection.request("POST", path + "/chat/completions", body, headers)
            response, content = connection.getresponse(), b""
            while piece := response.read1(2**16):
                content += piece
                left = until - time.monotonic()  # a server may send a byte now and then for ever
                if left <= 0:
                    raise TimeoutError(f"no end of the answer within {self.timeout:g} s")
                if len(content) > MAX_REPLY:
                    raise http.client.HTTPException(f"over {MAX_REPLY} bytes")
                if sock.fileno() >= 0:
                    sock.settimeout(left)
            if (length := response.headers.get("Content-Length")) and int(length) > len(content):
                raise http.client.IncompleteRead(content)  # read1 does not tell
            return response.status, response.headers, content
        except ValueError as error:  # a header or an address that is none
            raise http.client.HTTPException(str(error)) from None
        finally:
            with self._lock:
                self._open.discard(sock)
            connection.close()

    def _text(self, content):
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise NoAnswer(f"{self.address} sent no text")
        # half a character could not be written to a file
        return self._hide(text.encode("utf-8", "replace").decode())


def retry_after(value):
    """Seconds that a Retry-After header asks for, at most MAX_WAIT; 0 if there is none."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), MAX_WAIT) if seconds == seconds else 0.0
