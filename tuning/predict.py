"""Answers of a model to the questions of chat data, by real generation."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel

from tuning.data.chat import ChatFormat
from tuning.data.messages import Message


def generate_answers(
    model: PreTrainedModel,
    processor: Any,
    conversations: Sequence[tuple[list[Message], list[Image.Image]]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    description: str = "answering",
) -> list[str]:
    """Greedy answers to conversations that end with a question; prompts are padded on the left."""
    chat = ChatFormat(processor)
    processor.tokenizer.padding_side = "left"
    answers: list[str] = []
    with tqdm(total=len(conversations), desc=description, unit="row") as progress:
        for start in range(0, len(conversations), batch_size):
            batch = conversations[start : start + batch_size]
            texts = [chat.generation_prompt(messages) for messages, _ in batch]
            bos = processor.tokenizer.bos_token
            inputs = processor(
                text=texts,
                images=[image for _, images in batch for image in images] or None,
                padding=True,
                return_tensors="pt",
                **({"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}),
            ).to(model.device)
            with torch.inference_mode():
                generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = generated[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
            progress.update(len(batch))
    return answers
