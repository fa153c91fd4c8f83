"""Generate answers: for a whole batch, or for one prompt in pieces."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, TextIteratorStreamer

from tuning.model.picture_dtype import cast_pictures, reader_of


def generate_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    batch: dict[str, Any],
    *,
    max_new_tokens: int,
    end_of_turn: str = "",
    synced_gpus: bool = False,
) -> list[str]:
    """Greedy answers to a batch of prompts, `[rows, T]`, padded on the left, without special tokens and outer blanks.

    `end_of_turn`: ends an answer in addition to the model's own end tokens. `synced_gpus`: other processes generate at
    the same time from the same sharded weights, so that all of them run as many steps as the longest answer needs.
    """
    settings = greedy_settings(model, tokenizer, max_new_tokens=max_new_tokens, end_of_turn=end_of_turn)
    batch = prepare_prompts(model, batch)
    with torch.no_grad():
        written = model.generate(**batch, generation_config=settings, synced_gpus=synced_gpus)
    texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def prepare_prompts(model: PreTrainedModel | PeftModel, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch on the model's device. `generate` gives pictures to the tower before it calls `forward`."""
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return cast_pictures(batch, reader_of(model))


def greedy_settings(
    model: PreTrainedModel | PeftModel, tokenizer: Any, *, max_new_tokens: int, end_of_turn: str
) -> GenerationConfig:
    """Take the likeliest token, until an end token of the model, of the tokenizer, or `end_of_turn`."""
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    last = tokenizer(end_of_turn, add_special_tokens=False)["input_ids"]
    ends |= set(last) if len(last) == 1 else set()
    ends.discard(None)
    padding = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        bos_token_id=model.generation_config.bos_token_id,
    )


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

    The model writes in a thread, inside the context manager `during`. Closing the iterator, or setting `ending`, stops
    it at the next token. An error of the thread is raised here.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = threading.Event()
    batch = prepare_prompts(model, batch)

    def should_stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), closed.is_set() or ending.is_set(), device=ids.device)

    def write() -> None:
        try:
            with during, torch.no_grad():
                model.generate(**batch, generation_config=settings, streamer=streamer, stopping_criteria=[should_stop])
        finally:
            streamer.end()

    with ThreadPoolExecutor(1) as pool:  # leaving it waits for the thread
        writing = pool.submit(write)
        try:
            yield from streamer
        finally:
            closed.set()
    writing.result()
