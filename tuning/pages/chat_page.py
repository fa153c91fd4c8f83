"""The page of `vlm-tuning chat`: questions with pictures, and the answers of one model or two as they are written."""

import contextlib
import html
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from tuning.console import print0
from tuning.data.images import ImageRules, load_image
from tuning.data.messages import Message
from tuning.errors import UserError

HOST = "127.0.0.1"
SHOWN = (1024, 1024)
# A picture that is dropped beside the box goes into it; the browser would open it in place of the page.
DROP_ANYWHERE = """<script>
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  const input = document.querySelector("input[type=file]");
  if (event.defaultPrevented || !input || !event.dataTransfer.files.length) return;
  event.preventDefault();
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
});
</script>"""
CSS = """
.main.fillable { max-width: 100rem !important; padding: .75rem clamp(.75rem, 2vw, 1.5rem) !important; }
.gradio-container .contain .column { flex-wrap: nowrap; gap: .5rem; }
.speaker { flex: 0 0 auto !important; padding: 0 .25rem !important; line-height: 1.35; }
.speaker strong { font-size: 1.1rem; overflow-wrap: anywhere; }
.speaker small { display: block; font-size: .85rem; opacity: .7; }
.talk { flex: 1 1 0 !important; min-height: 14rem; overflow: hidden !important; }
.talk > .wrapper { flex: 1 1 0; min-height: 0; }
.talk .message-content { white-space: pre-wrap; overflow-wrap: anywhere; }
.talk img { max-height: 14rem; width: auto; }
.talk > .wrapper > .icon-button-wrapper { display: none; }  /* its trash can would clear the screen, not the talk */
.talk .message-buttons { display: none; }  /* one of them shares with a site */
.problem * { color: var(--error-text-color) !important; }
.clear { align-self: center; }
"""


class Speaker(Protocol):
    """Whoever answers on the page. `about`: one line of facts under its `name`."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    def reply(self, messages: list[Message], images: list[Image.Image]) -> Generator[str]:
        """The answer in pieces; closing the iterator ends it. Raises `UserError` where there can be none."""


@dataclass
class Answer:
    """What a speaker said so far; `problem`: why it said nothing, or no more."""

    text: str = ""
    problem: str = ""


@dataclass
class Turn:
    """A question with its pictures, the files they are shown from, and an answer of each speaker."""

    text: str
    images: list[Image.Image]
    shown: list[str]
    answers: list[Answer]


@dataclass
class Talk:
    """A conversation of one browser tab."""

    turns: list[Turn] = field(default_factory=list)
    stopped: bool = False

    def history(self, speaker: int) -> tuple[list[Message], list[Image.Image]]:
        """What the speaker is asked: its own conversation without questions it left open, up to the last one."""
        messages, images = list[Message](), list[Image.Image]()
        for turn in self.turns:
            answer = turn.answers[speaker].text.strip()
            if not answer and turn is not self.turns[-1]:
                continue
            parts: list[dict[str, Any]] = [{"type": "image"} for _ in turn.images]
            messages.append({"role": "user", "content": [*parts, *_text_parts(turn.text)]})
            images += turn.images
            if turn is not self.turns[-1]:
                messages.append({"role": "assistant", "content": _text_parts(answer)})
        return messages, images

    def shown(self, speaker: int) -> list[dict[str, Any]]:
        """The conversation as gradio's chatbot takes it, which reads text as HTML."""
        bubbles: list[dict[str, Any]] = []
        for turn in self.turns:
            bubbles += [{"role": "user", "content": {"path": file}} for file in turn.shown]
            bubbles += [{"role": "user", "content": html.escape(turn.text, quote=False)}] if turn.text else []
            answer = turn.answers[speaker]
            said = [answer.text, f"⚠ {answer.problem}" if answer.problem else ""]
            words = html.escape("\n\n".join(filter(None, said)) or "…", quote=False)
            bubbles.append({"role": "assistant", "content": words})
        return bubbles


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def sentence(error: UserError) -> str:
    """What went wrong, with a capital letter; advice about rows of data is left out."""
    return error.problem[:1].upper() + error.problem[1:]


def read_question(text: str, files: Sequence[str], speakers: int) -> Turn:
    """Open the pictures of a question and save them as they are shown. Raises `UserError` for one that cannot be."""
    images, shown = [], []
    for file in files:
        path = Path(file)
        try:
            images.append(load_image(str(path), path.parent, path.name, ImageRules(allow_outside=True)))
        except UserError as error:
            raise UserError(problem=f"'{path.name}': {error.problem}") from error
        preview = images[-1].copy()
        preview.thumbnail(SHOWN)
        shown.append(str(path.with_name(f"{path.stem}-shown.png")))
        preview.save(shown[-1])
    return Turn(text.strip(), images, shown, [Answer() for _ in range(speakers)])


def answer(talk: Talk, speakers: Sequence[Speaker]) -> Iterator[None]:
    """Have the last question answered by one speaker after the other; yields after each piece of an answer."""
    talk.stopped = False
    turn = talk.turns[-1]  # the user may clear the talk meanwhile
    for number, (speaker, place) in enumerate(zip(speakers, turn.answers, strict=True)):
        if not talk.stopped:
            yield from _speak(speaker, place, talk, talk.history(number))
        place.text = place.text.strip()
        if not place.text and not place.problem:
            place.problem = "Stopped." if talk.stopped else "It answered nothing."
        yield


def _speak(speaker: Speaker, place: Answer, talk: Talk, asked: tuple[list[Message], list[Image.Image]]):
    try:
        with contextlib.closing(speaker.reply(*asked)) as pieces:
            for piece in pieces:
                place.text += piece
                yield
                if talk.stopped:
                    return
    except UserError as error:
        place.problem = sentence(error)


def build_page(speakers: Sequence[Speaker]) -> Any:
    """The page, not yet served: a `gradio.Blocks`."""
    import gradio as gr

    with gr.Blocks(title=f"{speakers[0].name} – chat", fill_height=True, fill_width=True) as page:
        talk = gr.State(lambda: Talk())  # gradio takes a dataclass itself for a value
        with gr.Row(scale=1, equal_height=True):
            bots = [_add_column(speaker) for speaker in speakers]
        problem = gr.Markdown(visible=False, elem_classes="problem")
        with gr.Row():
            box = gr.MultimodalTextbox(
                placeholder="Ask something; drop pictures here",
                show_label=False,
                file_types=["image"],
                file_count="multiple",
                autofocus=True,
                max_plain_text_length=100_000,
            )
            clear = gr.Button("Clear", scale=0, min_width=80, size="md", elem_classes="clear")
        _connect(speakers, talk, bots, problem, box, clear)
    return page


def _add_column(speaker: Speaker) -> Any:
    import gradio as gr

    with gr.Column(min_width=320):
        name, about = html.escape(speaker.name), html.escape(speaker.about)
        gr.HTML(f"<strong>{name}</strong><small>{about}</small>", elem_classes="speaker")
        return gr.Chatbot(
            show_label=False,
            height=None,
            buttons=[],
            render_markdown=False,  # the exact words are what one wants to see
            latex_delimiters=[],
            placeholder=f"Ask {name} about a picture, or just talk.",
            elem_classes="talk",
        )


def _connect(speakers: Sequence[Speaker], talk: Any, bots: list[Any], problem: Any, box: Any, clear: Any) -> None:
    """What happens when something is asked, stopped or cleared."""
    import gradio as gr

    def show(talk: Talk) -> list[Any]:
        return [talk.shown(number) for number in range(len(speakers))]

    def start(talk: Talk, question: dict[str, Any]) -> Iterator[list[Any]]:
        text, files = question["text"] or "", question["files"] or []
        if not text.strip() and not files:
            return
        try:
            talk.turns.append(read_question(text, files, len(speakers)))
        except UserError as error:
            yield [*show(talk), gr.skip(), gr.Markdown(sentence(error), visible=True)]
            return
        busy = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        yield [*show(talk), busy, gr.Markdown(visible=False)]
        for _ in answer(talk, speakers):
            yield [*show(talk), gr.skip(), gr.skip()]

    def settle(talk: Talk) -> list[Any]:
        for place in talk.turns[-1].answers if talk.turns else []:
            if not place.text and not place.problem:
                place.problem = "No answer: an internal error, which is in the terminal."
        return [*show(talk), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)]

    def stop(talk: Talk) -> None:
        talk.stopped = True

    def empty(talk: Talk) -> list[Any]:
        talk.stopped = True
        talk.turns.clear()
        return [*show(talk), None, gr.Markdown(visible=False)]

    outputs = [*bots, box, problem]
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    asked = box.submit(start, [talk, box], outputs, **hidden)
    for ended in (asked.success, asked.failure):
        ended(settle, talk, [*bots, box], **hidden)
    box.stop(stop, talk, None, queue=False, **hidden)
    clear.click(empty, talk, outputs, queue=False, **hidden)


def serve(speakers: Sequence[Speaker], port: int, folder: str) -> None:
    """Show the page on this machine only, until interrupted. Uploads lie in `folder`; the network is not asked."""
    os.environ |= {  # read when gradio is imported
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), HOST])),  # it asks itself whether it is up
    }
    import gradio as gr

    build_page(speakers).launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        head=DROP_ANYWHERE,
    )
    print0(f"Chat at http://{HOST}:{port} (only from this machine). Ctrl-C ends it.")
    threading.Event().wait()
