"""A server on loopback that speaks as much of OpenAI's protocol as a captioner needs, and fails as
it is told to."""

import base64
import io
import json
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def reply(text: str, finish: str = "stop") -> bytes:
    """The body of an answer that holds one caption."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()


class StandIn(ThreadingHTTPServer):
    """`answer(request)` gives the caption of a request. `faults` come first, one a request: a
    status, (status, headers, body), or seconds to wait before the answer. `requests`: what came:
    path, headers, the decoded body, and `pictures`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.lock = deque(), [], threading.Lock()
        self.answer = lambda request: f"a picture, {len(request['pictures'])} of them"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Say nothing: clients that do not wait are what is tested."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(data)
        (message,) = body["messages"]
        urls = [part["image_url"]["url"] for part in message["content"][:-1]]
        assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
        coded = [base64.b64decode(url.partition(",")[2], validate=True) for url in urls]
        request = {
            "path": self.path,
            "headers": dict(self.headers),
            "body": body,
            "prompt": message["content"][-1]["text"],
            "pictures": [Image.open(io.BytesIO(part)).convert("RGB") for part in coded],
        }
        with self.server.lock:
            self.server.requests.append(request)
            fault = self.server.faults.popleft() if self.server.faults else None
        status, headers, content = 200, {}, None
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            status, content = fault, b'{"error": "as it was told"}'
        elif fault is not None:
            status, headers, content = fault
        self.send_response(status)
        content = reply(self.server.answer(request)) if content is None else content
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Print nothing."""


@contextmanager
def stand_in():
    """Run a server in a thread; yields it."""
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
