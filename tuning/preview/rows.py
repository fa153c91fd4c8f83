"""Rows in full, as the model sees them: what a person looks at."""

from typing import Any

import numpy as np

from tuning.data.encode import IGNORED, Encoder
from tuning.data.images import thumbnail
from tuning.data.sources import Row
from tuning.preview.report import IMAGE, SUPERVISED, TEXT, SampleRow, Token


def show_row(row: Row, encoder: Encoder) -> SampleRow:
    """Encode a row as training does, and keep what there is to see of it. Raises `UserError` for a bad row."""
    prepared = encoder.prepare(row)
    sample = encoder.encode(row)
    pictures = [thumbnail(image) for image in encoder.open_images(prepared)]
    ids, labels = sample.sequence["input_ids"].tolist(), sample.sequence["labels"].tolist()
    tokens = [
        Token(number, text, IMAGE if number == encoder.image_token_id else SUPERVISED if label != IGNORED else TEXT)
        for number, text, label in zip(ids, token_texts(encoder.processor.tokenizer, ids), labels, strict=True)
    ]
    rendered = encoder.chat.controls.show(prepared.chat.text)
    return SampleRow(row.number, row.file, rendered, supervised_texts(tokens), tokens, pictures)


def supervised_texts(tokens: list[Token]) -> list[str]:
    """The text of each unbroken run of supervised tokens: one an answer."""
    texts, before = list[str](), ""
    for token in tokens:
        if token.role == SUPERVISED:
            texts = [*texts[:-1], texts[-1] + token.text] if before == SUPERVISED else [*texts, token.text]
        before = token.role
    return texts


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; of several tokens that make one character, the last has it."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        # Decoded after an anchor: some tokenizers leave out the blank that a first token begins with.
        anchor = tokenizer.decode(ids[start - 1 : start]) if start else ""
        text = tokenizer.decode(ids[max(start - 1, 0) : end])[len(anchor) :]
        if text.endswith("�") and end - start < 4 and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts


def padding_share(tokens: np.ndarray, batch_size: int, order: np.ndarray) -> float:
    """Share of the positions of padded batches that is padding, with rows in `order`."""
    lengths = tokens[order]
    starts = np.arange(0, len(lengths), batch_size)
    if not len(starts):
        return 0.0
    longest = np.maximum.reduceat(lengths, starts)
    sizes = np.diff(np.append(starts, len(lengths)))
    return float(1 - lengths.sum() / (longest * sizes).sum())
