"""Scores of predicted answers, each from 0 to 1: the measures that the papers of the usual datasets define.

docs/scores.md lists them. Nothing here needs torch.
"""

import difflib
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from tuning.errors import UserError


def check_metrics(names: Sequence[str], option: str = "metrics") -> None:
    """Raise `UserError` for the first of `names`, given by `option`, that does not exist or lacks its library."""
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            guess = f"Did you mean {near[0]}? " if near else ""
            raise UserError(
                where=option, problem=f"{name}: there is no such score.", fix=f"{guess}There are {', '.join(METRICS)}."
            )
        if name in NEED_RAPIDFUZZ and find_spec("rapidfuzz") is None:
            raise UserError(
                where=option, problem=f"{name} needs rapidfuzz.", fix='Install it: pip install "vlm-tuning[metrics]"'
            )


def check_right_answers(names: Sequence[str], answers: Iterable[tuple[str, str]]) -> None:
    """Raise `UserError` for the first of `answers`, given after its row, that one of the scores cannot take."""
    if "json_field_accuracy" in names:
        for where, right in answers:
            read_right_json(right, where)


def score_rows(
    metrics: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """By metric, the score of every row: its prediction against its right answers, of which there is at least one."""
    assert len(predictions) == len(references), f"{len(predictions)} predictions of {len(references)} rows"
    assert all(references), "rows without a right answer cannot be scored"
    rows = list(zip(predictions, references, strict=True))
    return {name: [METRICS[name](prediction, right) for prediction, right in rows] for name in metrics}


def mean_scores(by_metric: dict[str, list[float]]) -> dict[str, float]:
    """By metric, the mean over rows, of which there is at least one."""
    return {name: fmean(scores) for name, scores in by_metric.items()}


def best_of(score: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """The score of a row with several right answers as that of the one that fits best."""
    return lambda prediction, references: max(score(prediction, right) for right in references)


def exact_match(prediction: str, right: str) -> float:
    """1 if both are the same text, upper and lower case included; blanks around them do not count."""
    return float(prediction.strip() == right.strip())


def relaxed_accuracy(prediction: str, right: str) -> float:
    """ChartQA: 1 for a number within 5 % of the right one, else for the same text in upper or lower case.

    A number is what `float` reads, and percentages are divided by 100; 1,000 with its comma is text, and so is every
    answer where the right one is 0. Source: Masry et al. 2022 (https://arxiv.org/abs/2203.10244, section 5.1), as
    https://github.com/google-research/pix2struct/blob/main/pix2struct/metrics.py computes it; lmms-eval and VLMEvalKit
    do the same. As in the latter, blanks around an answer do not count; unlike in all, `inf` and `nan` are text.
    """
    prediction, right = prediction.strip(), right.strip()
    number, right_number = _to_number(prediction), _to_number(right)
    if number is not None and right_number:
        return float(abs(number - right_number) / abs(right_number) <= 0.05)
    return float(prediction.lower() == right.lower())


def _to_number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def anls(prediction: str, right: str) -> float:
    """DocVQA: 1 − edit distance / length of the longer text; below 0.5 it is 0. Case and runs of blanks do not count.

    Source: Biten et al. 2019 (https://arxiv.org/abs/1907.00490, equation 1), and the script of
    https://rrc.cvc.uab.es/?ch=17 (copy: https://github.com/QwenLM/Qwen-VL/blob/master/eval_mm/infographicsvqa_eval.py),
    which keeps a similarity of exactly 0.5. Like VLMEvalKit, the length is that of the compared texts; the script's
    has superfluous blanks in it, so that an answer would gain by them.
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(_lower_words(prediction), _lower_words(right), score_cutoff=0.5)


def _lower_words(text: str) -> str:
    return " ".join(text.lower().split())


def token_f1(prediction: str, right: str) -> float:
    """SQuAD: F1 of the words of both texts, in lower case, without punctuation and articles.

    Source: Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250, section 6.1), and evaluate-v1.1.py of
    https://rajpurkar.github.io/SQuAD-explorer/. Where no words are left, both must have none, as in evaluate-v2.0.py.
    """
    words, right_words = _squad_words(prediction), _squad_words(right)
    if not words or not right_words:
        return float(words == right_words)
    same = (Counter(words) & Counter(right_words)).total()
    return 2 * same / (len(words) + len(right_words))


def _squad_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(prediction: str, right: str) -> float:
    """F1 of the words that both texts have in the same order, as the package rouge-score computes `rougeL`.

    Words are runs of a–z and 0–9, so that a text in another script scores 0. Source: Lin 2004
    (https://aclanthology.org/W04-1013, section 3.1, with β = 1) and
    https://github.com/google-research/google-research/tree/master/rouge. rapidfuzz finds the longest common subsequence
    many times as fast as that package.
    """
    from rapidfuzz.distance import LCSseq

    words, right_words = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, right))
    if not words or not right_words:
        return 0.0
    return 2 * LCSseq.similarity(words, right_words) / (len(words) + len(right_words))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA: the mean, over leaving out one human answer at a time, of min(1, answers that agree / 3).

    With ten answers, one to four that agree give 0.3, 0.6, 0.9, 1. With fewer than four, all that are left must agree
    instead of three: of two answers, one that agrees gives 0.5; a single one must be the same. Source: Antol et al.
    2015 (https://arxiv.org/abs/1505.00468, section 3), https://visualqa.org/evaluation.html, and vqaEval.py of
    https://github.com/GT-Vision-Lab/VQA. That script leaves texts as they are where all ten people wrote the same one,
    so that `Yes` would be wrong where they wrote `yes`; here they are always normalized, as VLMEvalKit does.
    """
    answer, number = normalize_vqa(prediction), len(references)
    agree = [normalize_vqa(right) for right in references].count(answer)
    if number == 1:
        return float(agree)
    enough = min(3, number - 1)
    left_in = (number - agree) * min(agree, enough)  # leaving out one of the others
    left_out = agree * min(agree - 1, enough)  # leaving out one of those that agree
    return (left_in + left_out) / (number * enough)


# Every way to leave out one apostrophe of these is mended. Those of vqaEval.py, less the ones that never match there.
CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
NUMBERS = "zero one two three four five six seven eight nine ten"
VQA_WORDS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS.split() for at in range(len(word)) if word[at] == "'"
}
VQA_WORDS |= {word: str(number) for number, word in enumerate(NUMBERS.split())} | {"none": "0"}


def normalize_vqa(text: str) -> str:
    """The text in lower case, with digits for number words, apostrophes, and without articles and punctuation.

    A mark becomes a blank, or nothing where that mark is beside a blank somewhere, or some digits have a comma between
    them. Periods stay before a digit.
    """
    given = " ".join(text.split())
    digits = re.search(r"\d,\d", given) is not None
    cleaned = given
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_blank = f"{mark} " in given or f" {mark}" in given
        cleaned = cleaned.replace(mark, "" if digits or beside_blank else " ")
    words = re.sub(r"\.(?!\d)", "", cleaned).lower().split()
    return " ".join(VQA_WORDS.get(word, word) for word in words if word not in ("a", "an", "the"))


def json_field_accuracy(prediction: str, right: str) -> float:
    """The share of fields of two JSON objects (or lists) that agree, among the fields that either of them has.

    The prediction's is the first that its text contains, be it fenced or amid words; without one it scores 0. Fields
    are values at whatever depth, and empty objects and lists. Missing and invented fields both count, and the items of
    a list are paired by how well they agree, whatever their order, as in ANLS* (Peer et al. 2024,
    https://arxiv.org/abs/2402.03848, https://github.com/deepopinion/anls_star_metric); but values must be equal: 1 and
    1.0 are, 1 and "1" are not, and blanks around a text do not count. Raises `UserError` where `right` is no JSON.
    """
    wanted = read_right_json(right)
    given = find_json(prediction, "{" if isinstance(wanted, dict) else "[")
    if given is None:
        return 0.0
    try:
        equal, fields = compare_fields(wanted, given)
    except RecursionError:  # a thousand brackets in a row
        return 0.0
    return equal / fields


def read_right_json(right: str, where: str = "") -> dict | list:
    """The JSON object or list that is a right answer. Raises `UserError`, naming `where`, for anything else."""
    wanted = _read_json(right)
    if not isinstance(wanted, dict | list):
        fix = "Mend the row, or choose other scores."
        raise UserError(
            where=where, problem=f"json_field_accuracy needs JSON as the right answer, not {right[:60]!r}.", fix=fix
        )
    return wanted


JSON = json.JSONDecoder(parse_constant=str)  # NaN would not be equal to itself


def _read_json(text: str) -> Any:
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def find_json(text: str, bracket: str) -> Any:
    """The first JSON in `text` that begins with `bracket`; None if there is none. Parts of a broken one are not."""
    start = text.find(bracket)
    while start >= 0:
        try:
            return JSON.raw_decode(text, start)[0]
        except json.JSONDecodeError as error:
            start = text.find(bracket, max(error.pos, start + 1))
        except (ValueError, RecursionError):  # thousands of digits, or of brackets
            return None
    return None


def compare_fields(right: Any, given: Any) -> tuple[int, int]:
    """How many fields of two JSON values agree, and how many there are in either; see `json_field_accuracy`."""
    if isinstance(right, dict) and isinstance(given, dict) and (right or given):
        found = [compare_fields(right[key], given[key]) for key in right.keys() & given.keys()]
        alone = [right.get(key, given.get(key)) for key in right.keys() ^ given.keys()]
    elif isinstance(right, list) and isinstance(given, list) and (right or given):
        found, alone = _compare_items(right, given)
    else:
        if isinstance(right, str) and isinstance(given, str):
            right, given = right.strip(), given.strip()
        same = right == given and isinstance(right, bool) == isinstance(given, bool)
        return int(same), max(_count_fields(right), _count_fields(given))
    return sum(equal for equal, _ in found), sum(fields for _, fields in found) + sum(map(_count_fields, alone))


def _compare_items(right: list[Any], given: list[Any]) -> tuple[list[tuple[int, int]], list[Any]]:
    """How the items of two lists compare, those that agree most paired first; and the items that are left over."""
    results = {(i, j): compare_fields(a, b) for i, a in enumerate(right) for j, b in enumerate(given)}
    pairs: list[tuple[int, int]] = []
    open_right, open_given = set(range(len(right))), set(range(len(given)))
    for i, j in sorted(results, key=lambda pair: -results[pair][0] / results[pair][1]):
        if i in open_right and j in open_given:
            pairs.append((i, j))
            open_right.remove(i)
            open_given.remove(j)
    return [results[pair] for pair in pairs], [right[i] for i in open_right] + [given[j] for j in open_given]


def _count_fields(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return sum(map(_count_fields, items)) or 1


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": best_of(exact_match),
    "relaxed_accuracy": best_of(relaxed_accuracy),
    "anls": best_of(anls),
    "vqa_accuracy": vqa_accuracy,
    "token_f1": best_of(token_f1),
    "rouge_l": best_of(rouge_l),
    "json_field_accuracy": best_of(json_field_accuracy),
}
NEED_RAPIDFUZZ = ("anls", "rouge_l")
