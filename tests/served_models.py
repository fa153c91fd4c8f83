"""Servers on this machine: `transformers serve`, and one that says what a test tells it to."""

import base64
import contextlib
import io
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
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

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


class PlainModel:
    """A model that plain transformers runs, behind the API of vLLM: with token ids and log probabilities.

    vLLM scales Granite's logits, which `LlavaNextForConditionalGeneration` of transformers does not.

    `template`: another chat template. `first_token`: whether the tokenizer's first token is added unless a request says
    so (vLLM adds none). `size`: another size of pictures. `tells`: what it adds to answers.
    """

    def __init__(
        self, folder, *, adapter=None, template=None, first_token=True, dtype="auto", size=None, tells="ids logprobs"
    ):
        self.first_token, self.tells = first_token, tells.split()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.chat_template = template or self.processor.chat_template
        if size:
            self.processor.image_processor.size = {"shortest_edge": size}
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter)
        self.lock = threading.Lock()

    def render(self, body: dict) -> tuple[str, list]:
        """The prompt as text, and its pictures."""
        images, messages = [], []
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    images.append(Image.open(io.BytesIO(data)).convert("RGB"))
            bare = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            messages.append({**message, "content": bare})
        variables = body.get("chat_template_kwargs", {})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, **variables), images

    def answer(self, body: dict) -> Answer:
        text, images = self.render(body)
        adds = body.get("add_special_tokens", self.first_token)
        inputs = self.processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=adds)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with self.lock, torch.no_grad():
            made = self.model.generate(
                **inputs,
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        prompt = inputs["input_ids"][0].tolist()
        return self.reply(prompt, made.sequences[0, len(prompt) :].tolist(), made.logits, body)

    def reply(self, prompt: list[int], ids: list[int], logits: Any, body: dict) -> Answer:
        tokenizer = self.processor.tokenizer
        choice = {"message": {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}}
        made = {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}
        if body.get("return_token_ids") and "ids" in self.tells:
            made["prompt_token_ids"], choice["token_ids"] = prompt, ids
        if body.get("logprobs") and "logprobs" in self.tells:
            entries, scaling = [], getattr(self.model.config.get_text_config(), "logits_scaling", 1.0)
            for number, one in zip(ids, logits, strict=True):
                values = torch.log_softmax(one[0].float() / scaling, dim=-1)
                top = values.topk(body["top_logprobs"])
                listed = [
                    {"token": tokenizer.decode([token]), "logprob": value}
                    for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ]
                entries.append(
                    {"token": tokenizer.decode([number]), "logprob": values[number].item(), "top_logprobs": listed}
                )
            choice["logprobs"] = {"content": entries}
        return 200, made
