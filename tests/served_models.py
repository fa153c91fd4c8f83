"""Servers on this machine: `transformers serve`, and one that says what a test tells it to."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

Answer = tuple[int, Any]  # a status, and what is sent as JSON
MODEL = "tiny"

# `transformers serve FOLDER`. Where torchvision came without its decoder, Pillow decodes.
SERVE = """
import sys
import tuning
import numpy as np, io, torch, torchvision.io
from PIL import Image
from transformers.cli.serve import Serve

def decode(data, mode=None, apply_exif_orientation=True):
    image = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

try:
    torchvision.io.decode_image(torch.zeros(1, dtype=torch.uint8))
except RuntimeError as error:
    if "image extension" in str(error):
        torchvision.io.decode_image = decode
Serve(sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]), device="cpu")
"""


@contextlib.contextmanager
def transformers_server(folder: Path) -> Iterator[str]:
    """Serve the model in `folder` with transformers; gives the address of its API."""
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        port = any_free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with open(folder / "serve.log", "w") as log:
        command = [sys.executable, "-c", SERVE, str(folder), str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(address: str, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(address).status_code == 200:
                return
        time.sleep(0.3)
    raise TimeoutError(address)


@contextlib.contextmanager
def scripted_server(
    answer: Callable[[dict], Answer], *, models: tuple[str, ...] = (MODEL,), pages: dict[str, Any] | None = None
) -> Iterator[str]:
    """A server whose chat answers are what `answer` makes of a request's body; gives the address of its API.

    `pages`: what it gives at further paths.
    """
    found = {"/v1/models": {"data": [{"id": name} for name in models]}, **(pages or {})}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            page = found.get(self.path)
            self.send(*((404, {"error": "no such page"}) if page is None else (200, page)))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(*answer(body))

        def send(self, status: int, value: Any):
            text = json.dumps(value).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def says(text: str, **more: Any) -> Answer:
    """An answer in the form of OpenAI's API."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], **more}
