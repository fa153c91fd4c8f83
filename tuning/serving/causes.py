"""The first difference between training and a server, and its likely cause."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuning.serving.comparison import RowComparison, trace_distance
from tuning.serving.server import VLLM, Server

TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 0.2}
"""Differences of log probabilities that other kernels and other orders of sums make, by the model's dtype here."""
ROUNDING = 0.5  # 16 bits on one of the two sides make no larger ones
AROUND = 3, 8  # how many tokens to show before and after the first that differs


@dataclass(frozen=True)
class Difference:
    """What differs, and what to do about it, as in `UserError`."""

    problem: str
    fix: str


@dataclass(frozen=True)
class Finder:
    """Compares what `server` does with `rows` with what a model does here.

    `name`: the model here; `dtype`: of its weights; `adapter`: whether it is one on a base. `added_end`: what training
    writes after an answer and the chat template does not; "" if nothing. `engine_note`: what this engine is known to do
    in another way with pictures.
    """

    server: Server
    name: str
    dtype: torch.dtype
    tokenizer: Any
    adapter: bool
    added_end: str = ""
    engine_note: str = ""

    @property
    def tolerance(self) -> float:
        return TOLERANCE.get(self.dtype, max(TOLERANCE.values()))

    def find(self, rows: Sequence[RowComparison]) -> Difference | None:
        """The first difference in the order in which a server works: text, pictures, weights. None without any."""
        ordered = sorted(rows, key=lambda row: row.here.pictures > 0)
        for row in ordered:
            if not row.same_prompt:
                return self._in_prompt(row, ordered)
        wrong = [row for row in ordered if not row.agrees_with(row.here.answer, self.tolerance)]
        return self._in_answers(wrong, ordered) if wrong else None

    def _in_prompt(self, row: RowComparison, rows: Sequence[RowComparison]) -> Difference:
        """The difference between the two prompts of a row."""
        (here, there), (pictures_here, pictures_there) = row.prompt_lengths, row.picture_tokens
        if first_token := self._first_token(row, rows):
            return first_token
        if row.here.pictures and pictures_there != pictures_here:
            kind, mine, theirs = "picture tokens", pictures_here, pictures_there
            if theirs is None:  # prompts without pictures, which come first, have equal lengths
                kind, mine, theirs = "tokens", here, there
            shown = f"{row.here.name}, which has pictures, has {mine} {kind} in training and {theirs} on the server."
            return Difference(shown, self._serve_processor())
        if row.served.prompt_ids is None:
            shown = f"the prompt of {row.here.name} has {here} tokens in training and {there} on the server."
        else:
            left, right = self._first_pieces(row.here.prompt_ids, row.served.prompt_ids)
            shown = f"the prompt of {row.here.name} has {left!r} in training and {right!r} on the server."
            if self.added_end and self.added_end in left and self.added_end not in right:
                fix = f"Serve a chat template that writes {self.added_end} after every answer."
                return Difference(f"{shown} Training adds {self.added_end}.", fix)
        return Difference(shown, self._serve_template())

    def _first_token(self, row: RowComparison, rows: Sequence[RowComparison]) -> Difference | None:
        """That the tokenizer's first token is missing or doubled, if it is the only difference of the texts."""
        first, number = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        if first is None or row.here.prompt_ids[0] != number:
            return None
        if row.served.prompt_ids is not None:
            here, there = row.text_ids()
            missing, doubled = there == here[1:], there == [number, *here]
        else:
            gaps = {(one.prompt_lengths[1] or 0) - one.prompt_lengths[0] for one in rows}
            missing, doubled = gaps == {-1}, gaps == {1}
        if missing:
            return Difference(f"the server's prompts lack the first token {first}.", self._add_first_token())
        if doubled:
            fix = "Let it add none, as vLLM does by default, or serve a template that does not begin with it."
            return Difference(f"the server's prompts begin with {first} twice.", fix)
        return None

    def _first_pieces(self, ours: list[int], theirs: list[int]) -> tuple[str, str]:
        """The texts of both around the first token that differs."""
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((at for at, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
        start, end = max(0, place - AROUND[0]), place + AROUND[1]
        return self.tokenizer.decode(ours[start:end]), self.tokenizer.decode(theirs[start:end])

    def _in_answers(self, wrong: Sequence[RowComparison], rows: Sequence[RowComparison]) -> Difference:
        """The difference between answers to equal prompts."""
        row, gaps = wrong[0], [gap for one in wrong if (gap := one.gap())]
        largest = max((gap.largest for gap in gaps), default=0.0)
        shown = f"log probabilities differ by up to {largest:.1g}" if gaps else "the greedy answers differ"
        if all(one.here.base and one.agrees_with(one.here.base, self.tolerance) for one in rows):
            others = [name for name in self.server.models if name != self.server.model]
            fix = f"Name the adapter with --model: the server lists {', '.join(others)}." if others else ""
            return Difference(
                f"the adapter has no effect on the server: {self.server.model} answers as the base model alone.",
                fix or "Serve it with the adapter, or merge it first: vlm-tuning export --adapter DIR --output DIR.",
            )
        if row.here.pictures and len(wrong) < len(rows):
            place = f"{shown}, first in {row.here.name}."
            note = f" {self.engine_note} If that is not why:" if self.engine_note else ""
            return Difference(
                f"rows without pictures agree, but those with pictures do not: {place}{note}", self._serve_processor()
            )
        if gaps and largest <= self.tolerance and not any(gap.diverges for gap in gaps):
            return Difference(
                f"all tokens agree, but the answer to {row.here.name} ends elsewhere: {row.here.answer.text!r} here,"
                f" {row.served.text!r} on the server.",
                f"Serve {self.name} with its generation_config.json, whose eos_token_id ends answers.",
            )
        if gaps and largest <= ROUNDING and not any(gap.unlikely for gap in gaps):
            kind = str(self.dtype).removeprefix("torch.")
            return Difference(
                f"all prompts agree, but {shown}, as in another precision. The weights here are in {kind}.",
                f"Serve with --dtype {kind}, or compare with --dtype as the server has it.",
            )
        return Difference(
            f"all prompts agree, but {shown}, first in {row.here.name}: {row.here.answer.text!r} here,"
            f" {row.served.text!r} on the server.",
            f"Does the server have the weights of {self.name}, unquantised, and no sampling settings of its own?",
        )

    def find_doubt(self, rows: Sequence[RowComparison]) -> str:
        """Why equal rows do not show that the server uses the adapter; "" if they do, or if there is none."""
        if not self.adapter:
            return ""
        changes = [trace_distance(row.here.answer, row.here.base) for row in rows if row.here.base]
        texts = any(row.here.base and row.here.base.text != row.here.answer.text for row in rows)
        if texts or (max(changes, default=0.0) > self.tolerance and any(row.served.tokens for row in rows)):
            return ""
        return "The adapter changes these answers too little to see whether the server uses it. Give data_path."

    # --- what to do ---

    def _add_first_token(self) -> str:
        if self.server.engine == VLLM:
            sent = '{"add_special_tokens": true}'
            return f"Send {sent} with every request (here: --request_options), or write it into the chat template."
        return "Serve with a chat template that begins with it, or let the server add it."

    def _serve_template(self) -> str:
        option = "--chat-template" if self.server.engine == VLLM else "an option of the server"
        return (
            f"The server has another chat template, or other variables for it. Serve that of {self.name} ({option}),"
            " and send the same chat_template_kwargs."
        )

    def _serve_processor(self) -> str:
        return (
            f"The server resizes or normalises pictures in another way. Serve the processor's files of {self.name},"
            " without options of the server for the size of pictures."
        )
