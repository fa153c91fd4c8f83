"""`vlm-tuning chat` in a real browser: pictures and questions in, answers out, and nothing leaves the machine."""

import base64
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from scripted import save_scripted

from tuning.pages.chat_page import serve

DROP = """([bytes, target]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], "square.png", {type: "image/png"}));
  document.querySelector(target).dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true,
    cancelable: true}));
}"""


@pytest.fixture(scope="module")
def chromium():
    """A headless browser."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        assert not os.environ.get("CI"), "Chromium is missing: apt-get install chromium"
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def command(shared_folder):
    """The real command on an adapter, compared with its base: the process, its address and its folder."""
    words = " It is a red square."
    folder = shared_folder / "models"
    save_scripted(folder / "base", " A cat sits there.", adapter_words=words, adapter_folder=folder / "adapter")
    here, temporary = shared_folder / "here", shared_folder / "temporary"
    here.mkdir()
    temporary.mkdir()
    port = free_port()
    flags = [f"--model_name_or_path={folder / 'adapter'}", f"--compare={folder / 'base'}", f"--port={port}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tuning.cli", "chat", *flags],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = threading.Timer(600, process.kill)  # only where it hangs
    watch.start()
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "Chat at" in line:
            break
    assert "Chat at" in printed[-1], "".join(printed)
    yield process, f"http://127.0.0.1:{port}", shared_folder
    watch.cancel()
    process.kill()


@pytest.fixture
def open_page(chromium):
    """Open an address; the tab notes every request to another machine, and every error."""
    tabs = []

    def opened(address, **options):
        context = chromium.new_context(**options)
        tab = context.new_page()
        tab.unexpected = []
        tab.on("request", lambda request: note(tab, request.url))
        tab.on("pageerror", lambda error: tab.unexpected.append(str(error)))
        tab.set_default_timeout(60_000)
        tab.goto(address)
        tab.wait_for_selector("textarea")
        tabs.append(context)
        return tab

    def note(tab, url):
        if not re.match(r"(http://127\.0\.0\.1[:/]|data:|blob:)", url):
            tab.unexpected.append(url)

    yield opened
    for context in tabs:
        context.close()


def ask(tab, words):
    tab.fill("textarea", words)
    tab.press("textarea", "Enter")


def said(tab, column, who="bot"):
    """The words in one column, once as many answers as questions are there."""
    return tab.locator(".talk").nth(column).locator(f"[data-testid={who}] .message-content").all_inner_texts()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def test_two_models_answer_about_a_dropped_picture_and_nothing_leaves_the_machine(command, open_page, tmp_path):
    _, address, _ = command
    tab = open_page(address)
    assert tab.locator(".model strong, .model small").all_inner_texts() == [
        *("adapter", "cpu · float32 · LoRA adapter on base"),
        *("base", "cpu · float32 · without the adapter"),
    ]
    Image.new("RGB", (90, 60), "red").save(tmp_path / "square.png")
    data = base64.b64encode((tmp_path / "square.png").read_bytes()).decode()
    tab.evaluate(DROP, [data, ".talk"])
    tab.wait_for_selector("img[src*=square]")
    ask(tab, "What is <b>this</b>?")
    wait_for(lambda: said(tab, 1) == ["A cat sits there."])
    assert said(tab, 0) == ["It is a red square."]
    assert said(tab, 0, "user") == said(tab, 1, "user") == ["What is <b>this</b>?"]
    tab.wait_for_function("[...document.querySelectorAll('.talk img')].filter(i => i.naturalWidth == 90).length == 2")
    ask(tab, "Is it <image> &lt;\nsure?")
    wait_for(lambda: said(tab, 1) == ["A cat sits there."] * 2)
    assert said(tab, 0, "user")[1] == "Is it <image> &lt;\nsure?"
    ask(tab, "why " * 3000)
    wait_for(lambda: any("tokens are more than" in words for words in said(tab, 1)))
    ask(tab, "Still there?")
    wait_for(lambda: said(tab, 1)[3:] == ["A cat sits there."])
    tab.get_by_text("Clear", exact=True).click()
    wait_for(lambda: said(tab, 0) == said(tab, 1) == [])
    tab.get_by_text("Ask adapter about an image, or just chat.").wait_for()
    assert tab.unexpected == []
    assert not tab.locator("footer").is_visible()


def test_an_unreadable_image_is_reported_and_the_question_stays(command, open_page, tmp_path):
    _, address, _ = command
    tab = open_page(address)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    tab.set_input_files("input[type=file]", tmp_path / "broken.png")
    tab.wait_for_selector("img[src*=broken]")
    ask(tab, "What is it?")
    tab.get_by_text("'broken.png': the image cannot be read").wait_for()
    assert tab.input_value("textarea") == "What is it?"
    assert said(tab, 0) == []


def test_interrupted_it_leaves_nothing_behind(command, open_page):
    process, address, folder = command
    open_page(address)  # a tab that is open does not hold it up
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert printed == "\nThe chat is closed.\n"
    assert list((folder / "here").iterdir()) == []
    assert [entry.name for entry in (folder / "temporary").iterdir() if "chat" in entry.name] == []


class Gated:
    """A model whose answer the test puts into a queue, piece by piece."""

    name, about = "gated", "by the test"

    def __init__(self):
        self.pieces = queue.Queue()

    def reply(self, messages, images):
        while piece := self.pieces.get(timeout=120):
            if isinstance(piece, Exception):
                raise piece
            yield piece


def test_answers_stream_and_stop_and_a_crash_leaves_the_page_usable(open_page, tmp_path, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY", "no_proxy"):
        monkeypatch.setenv(name, "")  # set again while it serves, and taken away afterwards
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    model, port = Gated(), free_port()
    threading.Thread(target=serve, args=([model], port, str(tmp_path)), daemon=True).start()
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 30)
    tab = open_page(f"http://127.0.0.1:{port}")
    ask(tab, "Talk.")
    model.pieces.put("First ")
    wait_for(lambda: said(tab, 0) == ["First "])
    model.pieces.put("second ")
    wait_for(lambda: said(tab, 0) == ["First second "])
    tab.locator("button.stop-button").click()
    time.sleep(0.3)
    model.pieces.put("third ")  # the one that was on its way
    wait_for(lambda: tab.locator("button.submit-button").count() == 1)
    assert said(tab, 0) == ["First second third"]
    ask(tab, "Fail.")
    model.pieces.put(RuntimeError("the device is on fire"))
    tab.get_by_text("the device is on fire").wait_for()
    wait_for(lambda: tab.locator("button.submit-button").count() == 1)
    ask(tab, "Again.")
    model.pieces.put("Well.")
    model.pieces.put("")
    wait_for(lambda: said(tab, 0)[-1] == "Well.")
    assert tab.unexpected == []
