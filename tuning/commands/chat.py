"""`vlm-tuning chat`: talk to a model about images in the browser, and compare its answers with another model's."""

import contextlib
import importlib.util
import signal
import socket
import tempfile
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from PIL import Image

from tuning.config.options import ModelSource, RowArguments, option
from tuning.console import print0
from tuning.data.collator import Collator, probe_collator
from tuning.data.encode import Encoder
from tuning.data.from_config import make_encoder
from tuning.data.messages import Message
from tuning.data.prompts import ask, join_on_the_right
from tuning.data.sources import Row
from tuning.errors import UserError, is_out_of_memory
from tuning.model.answering import LoadedModel, load_answering
from tuning.model.generate import greedy_settings, stream_text
from tuning.model.lora import ADAPTER_NAME
from tuning.pages.chat_page import HOST, serve


@dataclass(frozen=True)
class ChatArguments(ModelSource):
    compare: str | None = option(None, "A second model to compare with, such as the base: a folder or hub id.")
    port: int = option(7860, "Port of the page, which only this machine can reach.", minimum=1, maximum=65535)
    max_new_tokens: int = option(256, "Longest answer in tokens.", minimum=1)


OPTIONS = ChatArguments


@dataclass(frozen=True)
class Speaker:
    """A model that answers a conversation. `without_adapter`: it answers with its adapter disabled.

    `turn`: a lock that is held while the model writes. `ending`: set when the command ends.
    """

    name: str
    loaded: LoadedModel
    encoder: Encoder
    collator: Collator
    max_new_tokens: int
    ending: threading.Event
    without_adapter: bool = False
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def about(self) -> str:
        """Device, precision and adapter, as the page shows them."""
        model, adapter = self.loaded.model, self.loaded.adapter
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
        words = [device, str(model.dtype).removeprefix("torch.")]
        if adapter:
            words.append(
                "without the adapter" if self.without_adapter else f"LoRA adapter on {Path(adapter.base).name}"
            )
        return " · ".join(words)

    def reply(self, messages: list[Message], images: list[Image.Image]) -> Generator[str]:
        """The answer in pieces. The model reads the conversation as training renders it.

        Raises `UserError` if it cannot read it: too many images, too many tokens, not enough memory.
        """
        limit = self.encoder.max_images
        if limit is not None and len(images) > limit:
            what = f"the model takes {limit} image{'s'[: limit - 1]} per conversation, and there are {len(images)}."
            raise UserError(problem=what, fix="Clear the chat, or send fewer images.")
        question = ask(Row({"messages": messages, "images": images}, "chat", 0), self.encoder)
        room = self.encoder.max_seq_length - len(question.sample.sequence["input_ids"])
        if room < 1:
            raise UserError(problem="the conversation fills the model's context.", fix="Clear the chat.")
        settings = greedy_settings(
            self.loaded.model,
            self.loaded.processor.tokenizer,
            max_new_tokens=min(self.max_new_tokens, room),
            end_of_turn=self.encoder.chat.end_of_turn,
        )
        batch = join_on_the_right([question.sample], self.collator)
        model, tokenizer = self.loaded.model, self.loaded.processor.tokenizer
        try:
            yield from stream_text(
                model, tokenizer, batch, settings, during=self.exclusive_adapter(), ending=self.ending
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                problem="there is not enough memory for this conversation.", fix="Clear the chat."
            ) from error

    @contextlib.contextmanager
    def exclusive_adapter(self) -> Iterator[None]:
        """Use the model alone, with the adapter enabled or disabled."""
        model = self.loaded.model
        off = self.without_adapter and isinstance(model, PeftModel)
        with self.turn, model.disable_adapter() if off else contextlib.nullcontext():
            yield


def make_speaker(options: ChatArguments, ending: threading.Event) -> Speaker:
    """Load a model onto the machine's accelerator, if there is one."""
    loaded = load_answering(options, device=PartialState().device)
    encoder = make_encoder(
        RowArguments(),
        loaded.processor,
        loaded.config,
        None,
        template_kwargs=options.chat_template_kwargs,
        tokens=loaded.tokens,
    )
    name = Path(options.model_name_or_path).expanduser().resolve().name
    return Speaker(name, loaded, encoder, probe_collator(loaded.processor), options.max_new_tokens, ending)


def make_speakers(options: ChatArguments, ending: threading.Event) -> list[Speaker]:
    """The model and the one to compare it with. If that is the base of its adapter, both share the weights."""
    first = make_speaker(options, ending)
    if not options.compare:
        return [first]
    if is_base_of(options.compare, first.loaded):
        return [first, replace(first, name=Path(options.compare).expanduser().resolve().name, without_adapter=True)]
    return [first, make_speaker(replace(options, model_name_or_path=options.compare), ending)]


def is_base_of(name: str, loaded: LoadedModel) -> bool:
    """Whether `name` is the base model of an adapter, and disabling the adapter gives that model."""
    if loaded.adapter is None or not isinstance(loaded.model, PeftModel):
        return False
    if loaded.model.peft_config[ADAPTER_NAME].bias != "none":  # trained biases stay when the adapter is disabled
        return False
    here, there = Path(name).expanduser(), Path(loaded.adapter.base).expanduser()
    return name == loaded.adapter.base or (here.exists() and there.exists() and here.samefile(there))


def check_page(port: int) -> None:
    """Raise `UserError` if the page cannot be served. This comes before the models, which take longer to load."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(problem="the chat needs gradio.", fix='Install it: pip install "vlm-tuning[chat]"')
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                where=f"port {port}", problem=f"cannot be used: {error.strerror}.", fix="Give another one with --port."
            ) from error


def run(options: ChatArguments) -> None:
    """Serve the chat until it is interrupted."""
    check_page(options.port)
    for number in (signal.SIGINT, signal.SIGTERM):  # both must remove the temporary folder
        signal.signal(number, signal.default_int_handler)
    ending = threading.Event()
    with tempfile.TemporaryDirectory(prefix="vlm-tuning-chat-") as folder:
        try:
            serve(make_speakers(options, ending), options.port, folder)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C waits until the folder is removed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            print0("\nThe chat is closed.")
        finally:
            ending.set()
