"""`vlm-tuning chat`: talk to a model about pictures on a page of this machine, with another's answers beside it."""

import contextlib
import importlib.util
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from PIL import Image

from tuning.config.options import ModelSource, RowArguments, option
from tuning.config.parse import describe_command, read_command
from tuning.console import print0
from tuning.data.collator import Collator, probe_collator
from tuning.data.encode import Encoder
from tuning.data.from_config import make_encoder
from tuning.data.messages import Message
from tuning.data.prompts import ask, join_on_the_right
from tuning.data.sources import Row
from tuning.errors import UserError, is_out_of_memory
from tuning.exit_codes import exit_code_of
from tuning.model.answering import LoadedModel, load_answering
from tuning.model.generate import greedy_settings, stream_text
from tuning.model.lora import ADAPTER_NAME
from tuning.pages.chat_page import HOST, serve

USAGE = "vlm-tuning chat --model_name_or_path MODEL [--compare MODEL] [--port 7860]"


@dataclass(frozen=True)
class ChatArguments:
    compare: str | None = option(None, "A second model that answers beside it, such as the base: a folder or hub id.")
    port: int = option(7860, "Port of the page, which only this machine can reach.")
    max_new_tokens: int = option(256, "Longest answer in tokens.")


@dataclass(frozen=True)
class Speaker:
    """A model that answers a conversation. `without_adapter`: as if its adapter were not there.

    `turn`: held while the model writes. `ending`: set when the command ends.
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
        """Where and how it runs."""
        model, adapter = self.loaded.model, self.loaded.adapter
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
        facts = [device, str(model.dtype).removeprefix("torch.")]
        if adapter:
            facts.append(
                "without the adapter" if self.without_adapter else f"LoRA adapter on {Path(adapter.base).name}"
            )
        return " · ".join(facts)

    def reply(self, messages: list[Message], images: list[Image.Image]) -> Generator[str]:
        """The answer in pieces, to a prompt as it is trained. Raises `UserError` where it cannot be asked."""
        limit = self.encoder.max_images
        if limit is not None and len(images) > limit:
            raise UserError(
                problem=f"the model takes {limit} image{'s'[: limit - 1]} a conversation; there are {len(images)}."
            )
        question = ask(Row({"messages": messages, "images": images}, "chat", 0), self.encoder)
        room = self.encoder.max_seq_length - len(question.sample.sequence["input_ids"])
        if room < 1:
            raise UserError(problem="the conversation fills all that the model can read.")
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
            raise UserError(problem="there is not enough memory for this conversation.") from error

    @contextlib.contextmanager
    def exclusive_adapter(self) -> Iterator[None]:
        """Alone with the model, and with the adapter on or off."""
        model = self.loaded.model
        off = self.without_adapter and isinstance(model, PeftModel)
        with self.turn, model.disable_adapter() if off else contextlib.nullcontext():
            yield


def make_speaker(source: ModelSource, max_new_tokens: int, ending: threading.Event) -> Speaker:
    """Load a model to talk to, on the machine's accelerator, if there is one."""
    loaded = load_answering(source, device=PartialState().device)
    encoder = make_encoder(RowArguments(), loaded.processor, loaded.config, None)
    name = Path(source.model_name_or_path).expanduser().resolve().name
    return Speaker(name, loaded, encoder, probe_collator(loaded.processor), max_new_tokens, ending)


def make_speakers(source: ModelSource, options: ChatArguments, ending: threading.Event) -> list[Speaker]:
    """The model to talk to and the one beside it: the same in memory, where that is the base of its adapter."""
    first = make_speaker(source, options.max_new_tokens, ending)
    if not options.compare:
        return [first]
    if is_base_of(options.compare, first.loaded):
        return [first, replace(first, name=Path(options.compare).expanduser().resolve().name, without_adapter=True)]
    return [first, make_speaker(replace(source, model_name_or_path=options.compare), options.max_new_tokens, ending)]


def is_base_of(name: str, loaded: LoadedModel) -> bool:
    """Whether `name` is the model below an adapter, which comes back when the adapter is left out."""
    if loaded.adapter is None or not isinstance(loaded.model, PeftModel):
        return False
    if loaded.model.peft_config[ADAPTER_NAME].bias != "none":  # trained biases stay when the adapter is left out
        return False
    here, there = Path(name).expanduser(), Path(loaded.adapter.base).expanduser()
    return name == loaded.adapter.base or (here.exists() and there.exists() and here.samefile(there))


def check_page(port: int) -> None:
    """Raises `UserError` where there can be no page; models take longer to load."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(problem="the chat needs gradio.", fix='Install it: pip install "vlm-tuning[chat]"')
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port or -1))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "it must be from 1 to 65535"
            raise UserError(
                where="port", problem=f"{port} cannot be used: {reason}.", fix="Give another one with --port."
            ) from error


def run(argv: Sequence[str]) -> None:
    """The whole command, until it is interrupted."""
    source, options = read_command(argv, ModelSource, ChatArguments, required=["model_name_or_path"])
    check_page(options.port)
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left behind
        signal.signal(number, signal.default_int_handler)
    ending = threading.Event()
    with tempfile.TemporaryDirectory(prefix="vlm-tuning-chat-") as folder:
        try:
            serve(make_speakers(source, options, ending), options.port, folder)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second of a hasty user: the folder goes first
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            print0("\nThe chat is closed.")
        finally:
            ending.set()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(describe_command(USAGE, ModelSource, ChatArguments))
        return 0
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
