"""An answer as it is written, piece by piece."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, TextIteratorStreamer


def stream_text(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    batch: dict[str, Any],
    settings: GenerationConfig,
    *,
    during: AbstractContextManager,
    ending: threading.Event,
) -> Generator[str]:
    """The answer to a batch of one prompt in pieces of whole words, without special tokens.

    The model writes in a thread, which holds `during` for as long. Closing the iterator, or setting `ending`, stops it
    at the next token. What generation raises is raised here.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = threading.Event()
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}

    def should_stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), closed.is_set() or ending.is_set(), device=ids.device)

    def write() -> None:
        try:
            with during, torch.no_grad():
                model.generate(**batch, generation_config=settings, streamer=streamer, stopping_criteria=[should_stop])
        finally:
            streamer.end()

    with ThreadPoolExecutor(1) as pool:  # waits for the thread
        writing = pool.submit(write)
        try:
            yield from streamer
        finally:
            closed.set()
    writing.result()
