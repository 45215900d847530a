"""Captions by a server with OpenAI's chat protocol (vLLM, llama.cpp, Ollama, SGLang …).

Temporary failures (too many requests, a server error, a timeout, a truncated reply) are tried
again, each time after twice the wait. The key comes from the environment, is sent to this server
alone, and appears in no message and no file.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from PIL import Image

from mmdit.data.dataset.problems import Unusable
from mmdit.privacy import is_loopback
from mmdit.terminal import shown

KEY = "MMDIT_CAPTION_KEY"  # the environment variable
MOST_BYTES = 1 << 20  # of a reply
QUALITY = 90  # of the JPEG pictures that are sent
LONGEST_WAIT = 60.0  # seconds between two tries, at most
REFUSED = {
    401: f"it wants a key, or another one: set the environment variable {KEY}",
    403: f"the key in {KEY} may not use this model",
    404: "it has no such address or model; compare --server (…/v1) and --model with what it offers",
}


class ServerFailed(Unusable):
    """Raised when a server gives no caption for a record, even after all tries."""


class ServerRefused(ValueError):
    """Raised when a server will refuse every request, because its address, the key or the model is
    wrong."""


class _TryAgain(Exception):
    """Raised for failures that may be temporary; `wait`: the seconds that the server asks to
    wait."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class ServerCaptioner:
    """`captioner(pictures, prompt, seed)` returns the description of the pictures by the server's
    model, and whether it was stopped at `max_tokens`. Several threads may call it."""

    address: str  # http://localhost:8000/v1
    model: str
    max_tokens: int = 256
    temperature: float = 0.0
    timeout: float = 120.0  # time limit of an answer, in seconds
    tries: int = 6
    sleep: Callable[[float], None] = time.sleep
    key: str = field(default_factory=lambda: os.environ.get(KEY, ""), repr=False)

    def __post_init__(self):
        parts = urlsplit(self.address)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(
                f"--server is {self.address!r}; must be an address like http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "--server must be the address alone; a key goes into the environment variable"
                f" {KEY}"
            )
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(f"{KEY} holds characters that no key has, perhaps a line end")
        if self.key and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError(
                f"{KEY} is set, and http:// would show it to the network between here and"
                f" {parts.hostname}: use https://, a tunnel to localhost, or unset it"
            )

    @property
    def identity(self) -> dict[str, object]:
        """Return the settings that decide its captions, to be stored with them."""
        return {
            "model": self.model,
            "server": self.address,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }

    def __call__(self, pictures: list[Image.Image], prompt: str, seed: int) -> tuple[str, bool]:
        """Return a caption, as the class describes. ServerFailed if there is none; ServerRefused if
        there never will be one."""
        body = json.dumps(self._request(pictures, prompt, seed)).encode()
        wait, reason = 1.0, ""
        for number in range(self.tries):
            if number:
                self.sleep(wait)
            try:
                return self._answer(body)
            except _TryAgain as error:
                reason = str(error)
                wait = min(max(2.0**number, error.wait), LONGEST_WAIT)
        raise ServerFailed("the server gives no caption", f"{reason}, {self.tries} times")

    def _request(self, pictures: list[Image.Image], prompt: str, seed: int) -> dict:
        """Return the body of a request: the pictures in order, then the prompt."""
        content: list[dict] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures
        ]
        content.append({"type": "text", "text": prompt})
        row = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        return row | ({"seed": seed} if self.temperature else {})

    def _answer(self, body: bytes) -> tuple[str, bool]:
        """Send one request; return the caption, and whether it was cut off."""
        try:
            status, headers, data = self._send(body)
        except (OSError, http.client.HTTPException) as error:
            what = "no answer in time" if isinstance(error, TimeoutError) else "no connection"
            raise _TryAgain(f"{what} ({self._said(error) or type(error).__name__})") from None
        if status != 200:
            said = self._said(data.decode("utf-8", "replace"))
            if status == 429 or status >= 500:
                raise _TryAgain(f"status {status} ({said})", _retry_after(headers))
            if status in REFUSED or 300 <= status < 400:
                hint = REFUSED.get(status, "it leads elsewhere; give that address")
                raise ServerRefused(f"{self.address} answers {status} ({said}): {hint}")
            raise ServerFailed(f"the server refuses the request with {status}", said)
        try:
            choice = json.loads(data)["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            said = self._said(data[:200].decode("utf-8", "replace"))
            raise _TryAgain(f"a reply that holds no caption ({said})") from None
        return text, choice.get("finish_reason") == "length"

    def _send(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return status, headers and body of the answer. Redirections and proxies are not followed,
        so that the key goes to this server alone."""
        parts = urlsplit(self.address)
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        end = time.monotonic() + self.timeout
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/chat/completions", body, headers)
            response = connection.getresponse()
            data = b""
            while piece := response.read1(1 << 16):
                data += piece
                if len(data) > MOST_BYTES:
                    raise http.client.HTTPException(f"a reply of more than {MOST_BYTES} bytes")
                if time.monotonic() > end:  # a server that sends byte after byte would never end
                    raise TimeoutError(f"not all of it in {self.timeout:g} s")
            return response.status, response.headers, data
        finally:
            connection.close()

    def _said(self, message: object) -> str:
        """Return the beginning of a message from another program, fit for one line, and without the
        key."""
        text = str(message)
        if self.key:
            text = text.replace(self.key, "***")
        return shown(" ".join(text.split())[:200])


def _data_url(picture: Image.Image) -> str:
    """Return a URL that contains the picture as JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _retry_after(headers: http.client.HTTPMessage) -> float:
    """Return how many seconds a server asks to wait, at most LONGEST_WAIT; 0 if it does not say."""
    try:
        return max(0.0, min(float(headers.get("Retry-After", "0")), LONGEST_WAIT))
    except ValueError:  # a date
        return 0.0
