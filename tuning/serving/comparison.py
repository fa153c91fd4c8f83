"""What a server makes of a row beside what training makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuning.model.greedy_trace import Trace
from tuning.serving.server import Reply


@dataclass(frozen=True)
class RowHere:
    """A row as training encodes it, and the model's answer.

    `prompt_ids`: with the tokens of its `pictures`, which have `image_token_id`. `base`: the answer without the
    adapter, where the model has one.
    """

    name: str
    pictures: int
    prompt_ids: list[int]
    image_token_id: int | None
    answer: Trace
    base: Trace | None = None


@dataclass(frozen=True)
class Gap:
    """The `largest` difference of log probabilities of two answers, up to the first token that differs.

    `diverges`: there is such a token. `unlikely`: here it is not among the likeliest in its place.
    """

    largest: float
    diverges: bool
    unlikely: bool


@dataclass(frozen=True)
class RowComparison:
    """A row here and on the server. `decode`: the text of some ids."""

    here: RowHere
    served: Reply
    decode: Callable[[Sequence[int]], str]

    @property
    def same_answer(self) -> bool:
        return self._is_answer(self.here.answer)

    @property
    def prompt_lengths(self) -> tuple[int, int | None]:
        """How many tokens the prompt has here and there; None where the server does not tell."""
        ids = self.served.prompt_ids
        return len(self.here.prompt_ids), self.served.prompt_tokens if ids is None else len(ids)

    @property
    def same_prompt(self) -> bool:
        """Whether nothing that is known of the prompts differs."""
        here, there = self.prompt_lengths
        return there in (None, here) and self.served.prompt_ids in (None, self.here.prompt_ids)

    @property
    def picture_tokens(self) -> tuple[int, int | None]:
        """How many tokens pictures have here and there; None where the server does not name its tokens."""
        ids = self.served.prompt_ids
        return self._count_pictures(self.here.prompt_ids), None if ids is None else self._count_pictures(ids)

    def _count_pictures(self, ids: Sequence[int]) -> int:
        return sum(token == self.here.image_token_id for token in ids)

    def text_ids(self) -> tuple[list[int], list[int]]:
        """The ids of both prompts without those of pictures. The server must name them."""
        here, there = (
            [token for token in ids if token != self.here.image_token_id]
            for ids in (self.here.prompt_ids, self.served.prompt_ids or [])
        )
        return here, there

    def gap(self, trace: Trace | None = None) -> Gap | None:
        """How the log probabilities differ from those of `trace`, the answer here if not given.

        None where the server gives none.
        """
        trace = trace or self.here.answer
        differences = list[float]()
        for place, (token, top, own) in enumerate(zip(self.served.tokens, trace.top, trace.logprobs, strict=False)):
            if self._is_own(trace, place):
                differences.append(abs(token.logprob - own))
                differences += [abs(one - other) for one, other in zip(top.values(), token.top, strict=False)]
                continue
            found = self._find(trace, place)
            differences += [abs(token.logprob - own)] if found is None else [abs(token.logprob - found), own - found]
            return Gap(max(differences), diverges=True, unlikely=found is None)
        return Gap(max(differences), diverges=False, unlikely=False) if differences else None

    def _is_answer(self, trace: Trace) -> bool:
        """Whether the server gave this answer: its tokens, if it tells them, or its text."""
        ids = self.served.answer_ids
        return (ids is not None and list(ids) == list(trace.ids)) or reads_alike(self.served.text, trace.text)

    def agrees_with(self, trace: Trace, tolerance: float) -> bool:
        """Whether the server's answer is that of `trace`, as far as it is known.

        It may go on otherwise from a token on that is as likely as the one here.
        """
        gap, same = self.gap(trace), self._is_answer(trace)
        return same if gap is None else gap.largest <= tolerance and not gap.unlikely and (same or gap.diverges)

    def _is_own(self, trace: Trace, place: int) -> bool:
        """Whether the server's token at a place is that of `trace`."""
        if self.served.answer_ids is not None:
            return self.served.answer_ids[place] == trace.ids[place]
        return self._is_answer(trace) or self._reads(trace.ids[place], place)

    def _find(self, trace: Trace, place: int) -> float | None:
        """The log probability in `trace` of the server's token at a place; None where it is not among the likeliest."""
        top, ids = trace.top[place], self.served.answer_ids
        if ids is not None:
            return top.get(ids[place])
        return next((value for token, value in top.items() if self._reads(token, place)), None)

    def _reads(self, token: int, place: int) -> bool:
        """Whether a token has the text of the server's token at a place."""
        return self.decode([token]).strip() == self.served.tokens[place].text.strip()


def reads_alike(one: str, other: str) -> bool:
    """Whether two answers are the same but for bytes that are no characters: some servers leave them out."""
    return one.replace("\ufffd", "") == other.replace("\ufffd", "")


def trace_distance(one: Trace, other: Trace) -> float:
    """The largest difference of log probabilities of two answers, up to the first token that differs."""
    differences = [0.0]
    for place, (left, right) in enumerate(zip(one.top, other.top, strict=False)):
        differences += [abs(first - second) for first, second in zip(left.values(), right.values(), strict=True)]
        if one.ids[place] != other.ids[place]:
            break
    return max(differences)
