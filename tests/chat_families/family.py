"""A family of models: its chat template, the tokenizer around it, and what its models have to learn."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from chat_families.rows import ANSWER, CALL_ID, OTHER_ANSWER
from tiny_models import CORPUS

from tuning.demo.tokenizer import train_tokenizer

Expected = Mapping[str, Sequence[str] | None]


@dataclass(frozen=True)
class Family:
    """A chat template and the tokenizer around it.

    `expected`: for each kind of row the supervised text of each assistant turn; None where the template has no place
    for what the row has. `tokens`: special tokens. `plain_tokens`: added tokens that are ordinary words to the model.
    `stop_tokens`: the contents of `eos_token_id` in the generation config. `template`: the file, where families share
    one.
    """

    name: str
    expected: Expected
    tokens: Sequence[str]
    eos: str
    bos: str | None = None
    plain_tokens: Sequence[str] = ()
    stop_tokens: Sequence[str] = ()
    image_token: str = ""
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    template: str = ""
    call_id: str = CALL_ID

    def expected_of(self, kind: str) -> Sequence[str] | None:
        if kind == "image":
            return self.expected["single"] if self.image_token else None
        if kind == "thinking_agent":
            return self.expected.get(kind, self.expected["tools"])  # without an entry the template ignores thoughts
        return self.expected["tools" if kind == "tools_object" else kind]

    @property
    def source(self) -> str:
        return (Path(__file__).parent / f"{self.template or self.name}.jinja").read_text(encoding="utf-8")

    def build_processor(self) -> SimpleNamespace:
        """What the library needs of a processor to render rows."""
        special = {self.eos, *([self.bos] if self.bos else []), *([self.image_token] if self.image_token else [])}
        return SimpleNamespace(
            tokenizer=_train(tuple(sorted({*self.tokens, *special})), tuple(self.plain_tokens), self.bos, self.eos),
            chat_template=self.source,
            image_token=self.image_token,
        )


@functools.cache
def _train(special: tuple[str, ...], plain: tuple[str, ...], bos: str | None, eos: str):
    names = {"eos_token": eos, "pad_token": eos, **({"bos_token": bos} if bos else {})}
    tokenizer = train_tokenizer(CORPUS, special_tokens=list(special), **names)
    tokenizer.add_tokens(list(plain))
    return tokenizer


def turns(end: str, last: str | None = None, *, before: str = "") -> dict[str, Sequence[str] | None]:
    """A family that ends every turn with `end`, the last one with `last`, and ignores thoughts and tools."""
    last = end if last is None else last
    one, two = [before + ANSWER + last], [before + ANSWER + end, before + OTHER_ANSWER + last]
    return {"single": one, "multi": two, "system": one, "tools": None, "reasoning": two}
