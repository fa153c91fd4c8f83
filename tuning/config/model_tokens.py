"""What a checkpoint says of its tokens, for encoding rows."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelTokens:
    """`stop`: the tokens at which the model stops.

    `embeddings`: for how many tokens it has embeddings, where the tokenizer has more tokens; else None.
    """

    stop: Sequence[str] = ()
    embeddings: int | None = None
