"""Scores of predicted answers, each from 0 to 1, as the papers of well-known datasets define them.

docs/scores.md lists them. They are our own code, so that a row's score does not depend on a library's version; each
names its source, and where it differs. Nothing here needs torch.
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

from tuning.boxes import find_boxes, overlap
from tuning.errors import UserError


def check_metrics(names: Sequence[str], option: str = "metrics") -> None:
    """Raise `UserError` for the first name, of those in `option`, that is not a score or whose library is missing."""
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            guess = f"Did you mean {near[0]}? " if near else ""
            listed = ", ".join(METRICS)
            raise UserError(where=option, problem=f"there is no score {name}.", fix=f"{guess}Use one of {listed}.")
        if name in NEED_RAPIDFUZZ and find_spec("rapidfuzz") is None:
            raise UserError(
                where=option, problem=f"{name} needs rapidfuzz.", fix='Install it: pip install "vlm-tuning[metrics]"'
            )


def check_references(names: Sequence[str], references: Iterable[tuple[str, str]]) -> None:
    """Raise `UserError` for the first reference that one of the scores cannot use. Each comes after its row's place.

    Scores of boxes need one in any of the references.
    """
    of_boxes = [name for name in names if name in NEED_BOXES]
    if not of_boxes and "json_field_accuracy" not in names:
        return
    where, has_boxes = "", False
    for where, reference in references:
        has_boxes = has_boxes or bool(find_boxes(reference))
        if "json_field_accuracy" in names:
            read_reference(reference, where)
    if of_boxes and where and not has_boxes:
        what = f"{of_boxes[0]} compares boxes, and no right answer has one."
        raise UserError(where="metrics", problem=what, fix="Choose other scores, or correct the data.")


def score_rows(
    metrics: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """By metric, the score of every row: its prediction against its references. Every row has at least one."""
    assert len(predictions) == len(references), f"{len(predictions)} predictions of {len(references)} rows"
    assert all(references), "rows without a reference cannot be scored"
    rows = list(zip(predictions, references, strict=True))
    return {name: [METRICS[name](prediction, of_row) for prediction, of_row in rows] for name in metrics}


def mean_scores(by_metric: dict[str, list[float]]) -> dict[str, float]:
    """By metric, the mean over rows. There is at least one row."""
    return {name: fmean(scores) for name, scores in by_metric.items()}


def best_of(score: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """Score a row with several references by the one that fits best."""
    return lambda prediction, references: max(score(prediction, reference) for reference in references)


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same text, upper and lower case included. Leading and trailing blanks do not count."""
    return float(prediction.strip() == reference.strip())


def relaxed_accuracy(prediction: str, reference: str) -> float:
    """ChartQA: 1 for a number within 5 % of the reference, or for the same text in upper or lower case.

    A number is what `float` reads; percentages are divided by 100. 1,000 with its comma is text, and every answer is
    text if the reference is 0. Source: Masry et al. 2022 (https://arxiv.org/abs/2203.10244, section 5.1), as
    https://github.com/google-research/pix2struct/blob/main/pix2struct/metrics.py computes it; lmms-eval and VLMEvalKit
    do the same. Like VLMEvalKit, we ignore leading and trailing blanks. Unlike all of them, `inf` and `nan` are text.
    """
    prediction, reference = prediction.strip(), reference.strip()
    number, expected = _to_number(prediction), _to_number(reference)
    if number is not None and expected:
        return float(abs(number - expected) / abs(expected) <= 0.05)
    return float(prediction.lower() == reference.lower())


def _to_number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def anls(prediction: str, reference: str) -> float:
    """DocVQA: 1 − edit distance / length of the longer text, or 0 if that is below 0.5.

    Upper and lower case and runs of blanks do not count.

    Source: Biten et al. 2019 (https://arxiv.org/abs/1907.00490, equation 1), and the script of
    https://rrc.cvc.uab.es/?ch=17 (copy: https://github.com/QwenLM/Qwen-VL/blob/master/eval_mm/infographicsvqa_eval.py),
    which keeps a similarity of exactly 0.5. Like VLMEvalKit, we take the length of the compared texts. The script also
    counts the blanks that it removed, so that an answer scores higher with more of them.
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(_lower_words(prediction), _lower_words(reference), score_cutoff=0.5)


def _lower_words(text: str) -> str:
    return " ".join(text.lower().split())


def token_f1(prediction: str, reference: str) -> float:
    """SQuAD: F1 of the words of both texts, in lower case, without punctuation and articles.

    Source: Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250, section 6.1), and evaluate-v1.1.py of
    https://rajpurkar.github.io/SQuAD-explorer/. If one has no words left, the score is 1 only if both have none, as in
    evaluate-v2.0.py.
    """
    words, expected = _squad_words(prediction), _squad_words(reference)
    if not words or not expected:
        return float(words == expected)
    same = (Counter(words) & Counter(expected)).total()
    return 2 * same / (len(words) + len(expected))


def _squad_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the words that both texts have in the same order, as the package rouge-score computes `rougeL`.

    Words are runs of a–z and 0–9, so that a text in another script scores 0. Source: Lin 2004
    (https://aclanthology.org/W04-1013, section 3.1, with β = 1) and
    https://github.com/google-research/google-research/tree/master/rouge. rapidfuzz finds the longest common subsequence
    many times faster than that package.
    """
    from rapidfuzz.distance import LCSseq

    words, expected = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    if not words or not expected:
        return 0.0
    return 2 * LCSseq.similarity(words, expected) / (len(words) + len(expected))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA: leave out one human answer at a time; the mean of min(1, number of the others that agree / 3).

    With ten answers, one to four that agree give 0.3, 0.6, 0.9, 1. With fewer than four, all the others must agree
    instead of three: of two answers, one that agrees gives 0.5. A single one must be the same. Source: Antol et al.
    2015 (https://arxiv.org/abs/1505.00468, section 3), https://visualqa.org/evaluation.html, and vqaEval.py of
    https://github.com/GT-Vision-Lab/VQA. That script does not normalize texts if all ten people wrote the same one, so
    that `Yes` is wrong if they wrote `yes`. Like VLMEvalKit, we always normalize.
    """
    answer, number = normalize_vqa(prediction), len(references)
    agree = [normalize_vqa(reference) for reference in references].count(answer)
    if number == 1:
        return float(agree)
    enough = min(3, number - 1)
    without_another = (number - agree) * min(agree, enough)  # the one left out does not agree
    without_agreeing = agree * min(agree - 1, enough)  # the one left out agrees
    return (without_another + without_agreeing) / (number * enough)


# A word that lacks one apostrophe of these gets it back. The list of vqaEval.py, less entries that never match there.
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
    """The text in lower case, with digits for number words, with apostrophes, without articles and punctuation.

    A punctuation mark becomes a blank. It becomes nothing if the text has it next to a blank somewhere, or has a comma
    between digits. A period stays before a digit.
    """
    original = " ".join(text.split())
    has_digits = re.search(r"\d,\d", original) is not None
    cleaned = original
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        is_next_to_blank = f"{mark} " in original or f" {mark}" in original
        cleaned = cleaned.replace(mark, "" if has_digits or is_next_to_blank else " ")
    words = re.sub(r"\.(?!\d)", "", cleaned).lower().split()
    return " ".join(VQA_WORDS.get(word, word) for word in words if word not in ("a", "an", "the"))


def json_field_accuracy(prediction: str, reference: str) -> float:
    """The share of fields that agree in two JSON objects (or lists), among the fields that either of them has.

    The prediction's JSON is the first in its text, in a code block or between words; without one it scores 0. Fields
    are values at any depth, and empty objects and lists. Missing and invented fields both count. Items of a list are
    paired by how well they agree, in any order, as in ANLS* (Peer et al. 2024, https://arxiv.org/abs/2402.03848,
    https://github.com/deepopinion/anls_star_metric). Unlike there, values must be equal: 1 and 1.0 are, 1 and "1" are
    not; leading and trailing blanks of a text do not count. Raises `UserError` if `reference` is not JSON.
    """
    expected = read_reference(reference)
    found = find_json(prediction, "{" if isinstance(expected, dict) else "[")
    if found is None:
        return 0.0
    try:
        equal, fields = compare_fields(expected, found)
    except RecursionError:  # a thousand brackets in a row
        return 0.0
    return equal / fields


def read_reference(reference: str, where: str = "") -> dict | list:
    """The JSON object or list in a reference. Raises `UserError`, naming `where`, for anything else."""
    expected = _read_json(reference)
    if not isinstance(expected, dict | list):
        what = f"json_field_accuracy needs a JSON object or list as the right answer, not {reference[:60]!r}."
        raise UserError(where=where, problem=what, fix="Correct the row, or choose other scores.")
    return expected


JSON = json.JSONDecoder(parse_constant=str)  # as a number, NaN would not be equal to itself


def _read_json(text: str) -> Any:
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def find_json(text: str, bracket: str) -> Any:
    """The first JSON in `text` that begins with `bracket`, or None. Whole JSON inside a broken one does not count."""
    start = text.find(bracket)
    while start >= 0:
        try:
            return JSON.raw_decode(text, start)[0]
        except json.JSONDecodeError as error:
            start = text.find(bracket, max(error.pos, start + 1))
        except (ValueError, RecursionError):  # thousands of digits, or of brackets
            return None
    return None


def compare_fields(expected: Any, found: Any) -> tuple[int, int]:
    """The number of fields of two JSON values that agree, and of all fields; see `json_field_accuracy`."""
    if isinstance(expected, dict) and isinstance(found, dict) and (expected or found):
        compared = [compare_fields(expected[key], found[key]) for key in expected.keys() & found.keys()]
        unpaired = [expected.get(key, found.get(key)) for key in expected.keys() ^ found.keys()]
    elif isinstance(expected, list) and isinstance(found, list) and (expected or found):
        compared, unpaired = _compare_items(expected, found)
    else:
        if isinstance(expected, str) and isinstance(found, str):
            expected, found = expected.strip(), found.strip()
        same = expected == found and isinstance(expected, bool) == isinstance(found, bool)
        return int(same), max(_count_fields(expected), _count_fields(found))
    return sum(equal for equal, _ in compared), sum(count for _, count in compared) + sum(map(_count_fields, unpaired))


def _compare_items(expected: list[Any], found: list[Any]) -> tuple[list[tuple[int, int]], list[Any]]:
    """How the items of two lists compare, paired with those that agree most first, and the items without a pair."""
    results = {(i, j): compare_fields(a, b) for i, a in enumerate(expected) for j, b in enumerate(found)}
    pairs: list[tuple[int, int]] = []
    left_expected, left_found = set(range(len(expected))), set(range(len(found)))
    for i, j in sorted(results, key=lambda pair: -results[pair][0] / results[pair][1]):
        if i in left_expected and j in left_found:
            pairs.append((i, j))
            left_expected.remove(i)
            left_found.remove(j)
    return [results[pair] for pair in pairs], [expected[i] for i in left_expected] + [found[j] for j in left_found]


def _count_fields(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return sum(map(_count_fields, items)) or 1


def best_overlaps(prediction: str, reference: str) -> list[float]:
    """For each box in the reference, the intersection over union with the box in the prediction that fits best.

    Boxes are found in every form that the library writes, and compared in the numbers of the texts. A reference without
    boxes counts as one, which a prediction without boxes meets. Points do not count.
    """
    boxes, expected = find_boxes(prediction), find_boxes(reference)
    if not expected:
        return [float(not boxes)]
    return [max((overlap(box, right) for box in boxes), default=0.0) for right in expected]


def iou(prediction: str, reference: str) -> float:
    """The mean over the boxes of the reference of the best intersection over union.

    Boxes that the prediction has beyond them do not count. Source of the measure: Everingham et al. 2010, section 4.2
    (https://doi.org/10.1007/s11263-009-0275-4), without the pixel that PASCAL VOC adds to width and height.
    """
    return fmean(best_overlaps(prediction, reference))


def iou_at_50(prediction: str, reference: str) -> float:
    """The share of the reference's boxes whose best intersection over union is 0.5 or more.

    With one box per row, its mean is the accuracy at 0.5 of RefCOCO, as
    https://github.com/QwenLM/Qwen-VL/blob/master/eval_mm/evaluate_grounding.py computes it.
    """
    return fmean(best >= 0.5 for best in best_overlaps(prediction, reference))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": best_of(exact_match),
    "relaxed_accuracy": best_of(relaxed_accuracy),
    "anls": best_of(anls),
    "vqa_accuracy": vqa_accuracy,
    "token_f1": best_of(token_f1),
    "rouge_l": best_of(rouge_l),
    "json_field_accuracy": best_of(json_field_accuracy),
    "iou": best_of(iou),
    "iou_at_50": best_of(iou_at_50),
}
NEED_BOXES = ("iou", "iou_at_50")
NEED_RAPIDFUZZ = ("anls", "rouge_l")
