"""The page of `vlm-tuning chat`: ask one or two models about images, and see their answers as they are written."""

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
from tuning.pages.render import read_asset

HOST = "127.0.0.1"
SHOWN_SIZE = (1024, 1024)


class ChatModel(Protocol):
    """What answers on the page. `about` is the line below its `name`."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    def reply(self, messages: list[Message], images: list[Image.Image]) -> Generator[str]:
        """The answer in pieces. Closing the iterator stops it. Raises `UserError` if there can be no answer."""


@dataclass
class Answer:
    """What a model has written so far. `problem`: why it wrote nothing, or no more."""

    text: str = ""
    problem: str = ""


@dataclass
class Turn:
    """A question with its images, the files that the page shows of them, and the answer of each model."""

    text: str
    images: list[Image.Image]
    files: list[str]
    answers: list[Answer]


@dataclass
class Conversation:
    """The conversation of one browser tab."""

    turns: list[Turn] = field(default_factory=list)
    stopped: bool = False

    def history(self, model: int) -> tuple[list[Message], list[Image.Image]]:
        """The messages and images for a model: its own conversation, without the questions that it did not answer."""
        messages, images = list[Message](), list[Image.Image]()
        for turn in self.turns:
            answer, is_last = turn.answers[model].text.strip(), turn is self.turns[-1]
            if answer or is_last:
                parts: list[dict[str, Any]] = [{"type": "image"} for _ in turn.images]
                messages.append({"role": "user", "content": [*parts, *_text_parts(turn.text)]})
                images += turn.images
            if answer and not is_last:
                messages.append({"role": "assistant", "content": _text_parts(answer)})
        return messages, images

    def bubbles(self, model: int) -> list[dict[str, Any]]:
        """The conversation for gradio's chatbot. It is escaped here, as the chatbot reads text as HTML."""
        bubbles: list[dict[str, Any]] = []
        for turn in self.turns:
            bubbles += [{"role": "user", "content": {"path": file}} for file in turn.files]
            bubbles += [{"role": "user", "content": html.escape(turn.text, quote=False)}] if turn.text else []
            answer = turn.answers[model]
            words = [answer.text, f"⚠ {answer.problem}" if answer.problem else ""]
            text = "\n\n".join(filter(None, words)) or "…"
            bubbles.append({"role": "assistant", "content": html.escape(text, quote=False)})
        return bubbles


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def describe_error(error: UserError) -> str:
    """The problem as a sentence. The fix is left out, as it is about rows of data."""
    return error.problem[:1].upper() + error.problem[1:]


def read_question(text: str, files: Sequence[str], num_models: int) -> Turn:
    """Open the images of a question, and save them as the page shows them. Raises `UserError` for an unreadable one."""
    images, shown = [], []
    for path in map(Path, files):
        try:
            images.append(load_image(str(path), path.parent, path.name, ImageRules(allow_outside=True)))
        except UserError as error:
            raise UserError(problem=f"'{path.name}': {error.problem}") from error
        preview = images[-1].copy()
        preview.thumbnail(SHOWN_SIZE)
        shown.append(str(path.with_name(f"{path.stem}-shown.png")))
        preview.save(shown[-1])
    return Turn(text.strip(), images, shown, [Answer() for _ in range(num_models)])


def stream_answers(conversation: Conversation, models: Sequence[ChatModel]) -> Iterator[None]:
    """Let one model after the other answer the last question. Yields after each piece of an answer."""
    conversation.stopped = False
    turn = conversation.turns[-1]  # the user may clear the conversation meanwhile
    for number, (model, answer) in enumerate(zip(models, turn.answers, strict=True)):
        if not conversation.stopped:
            try:
                with contextlib.closing(model.reply(*conversation.history(number))) as pieces:
                    for piece in pieces:
                        answer.text += piece
                        yield
                        if conversation.stopped:
                            break
            except UserError as error:
                answer.problem = describe_error(error)
        answer.text = answer.text.strip()
        if not answer.text and not answer.problem:
            answer.problem = "Stopped." if conversation.stopped else "The answer is empty."
        yield


def build_page(models: Sequence[ChatModel]) -> Any:
    """The page as a `gradio.Blocks`, not yet served.

    `gr.ChatInterface` would not do: it takes the question out of the box even when an image cannot be read, shows text
    as HTML, and has one column.
    """
    import gradio as gr

    with gr.Blocks(title=f"{models[0].name} – chat", fill_height=True, fill_width=True) as page:
        conversation = gr.State(lambda: Conversation())  # gradio takes a dataclass itself for a value
        columns = []
        with gr.Row(scale=1, equal_height=True):
            for model in models:
                name, about = html.escape(model.name), html.escape(model.about)
                with gr.Column(min_width=320):
                    gr.HTML(f"<strong>{name}</strong><small>{about}</small>", elem_classes="model")
                    column = gr.Chatbot(
                        show_label=False,
                        height=None,
                        buttons=[],
                        render_markdown=False,  # show the exact words
                        latex_delimiters=[],
                        placeholder=f"Ask {name} about an image, or just chat.",
                        elem_classes="talk",
                    )
                columns.append(column)
        problem = gr.Markdown(visible=False, elem_classes="problem")
        with gr.Row():
            box = gr.MultimodalTextbox(
                placeholder="Ask a question, drop images",
                show_label=False,
                file_types=["image"],
                file_count="multiple",
                autofocus=True,
                max_plain_text_length=100_000,
            )
            clear = gr.Button("Clear", scale=0, min_width=80, size="md", elem_classes="clear")
        _connect(models, conversation, columns, problem, box, clear)
    return page


def _connect(models: Sequence[ChatModel], state: Any, columns: list[Any], problem: Any, box: Any, clear: Any) -> None:
    """Define what the page does when the user asks, stops or clears."""
    import gradio as gr

    def show(conversation: Conversation) -> list[Any]:
        return [conversation.bubbles(number) for number in range(len(models))]

    def ask(conversation: Conversation, question: dict[str, Any]) -> Iterator[list[Any]]:
        text, files = question["text"] or "", question["files"] or []
        if not text.strip() and not files:
            return
        try:
            conversation.turns.append(read_question(text, files, len(models)))
        except UserError as error:
            yield [*show(conversation), gr.skip(), gr.Markdown(describe_error(error), visible=True)]
            return
        busy = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        yield [*show(conversation), busy, gr.Markdown(visible=False)]
        for _ in stream_answers(conversation, models):
            yield [*show(conversation), gr.skip(), gr.skip()]

    def finish(conversation: Conversation) -> list[Any]:
        for answer in conversation.turns[-1].answers if conversation.turns else []:
            if not answer.text and not answer.problem:
                answer.problem = "No answer: an internal error, see the terminal."
        return [*show(conversation), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)]

    def stop(conversation: Conversation) -> None:
        conversation.stopped = True

    def empty(conversation: Conversation) -> list[Any]:
        conversation.stopped = True
        conversation.turns.clear()
        return [*show(conversation), None, gr.Markdown(visible=False)]

    outputs = [*columns, box, problem]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    asked = box.submit(ask, [state, box], outputs, **private)
    for ended in (asked.success, asked.failure):
        ended(finish, state, [*columns, box], **private)
    box.stop(stop, state, None, queue=False, **private)
    clear.click(empty, state, outputs, queue=False, **private)


def serve(models: Sequence[ChatModel], port: int, folder: str) -> None:
    """Serve the page to this machine only, until interrupted. Uploads go to `folder`. Nothing uses the network."""
    os.environ |= {  # gradio reads them when it is imported
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), HOST])),  # gradio asks itself if it is up
    }
    import gradio as gr

    build_page(models).launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        show_error=True,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=read_asset("chat.css"),
        head=f"<script>{read_asset('chat.js')}</script>",
    )
    print0(f"Chat at http://{HOST}:{port} (only from this machine). Press Ctrl-C to stop it.")
    threading.Event().wait()
