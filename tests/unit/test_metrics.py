"""Scores of answers: the numbers of their papers and official implementations, and what holds for any text."""

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.errors import UserError
from tuning.metrics import METRICS, check_metrics, check_references, mean_scores, normalize_vqa, score_rows


def score(metric: str, prediction: str, *references: str) -> float:
    return score_rows([metric], [prediction], [references])[metric][0]


# The rows and the three means of pix2struct/metrics_test.py of google-research/pix2struct.
PIX2STRUCT = [
    *(("abc", "abc"), ("abc", "Abc"), ("Abc", "abc")),
    *(("100%", "96%"), ("100%", "94%"), ("100%", "0.96"), ("100%", "0.94"), ("Don't", "Won't")),
]


def test_rows_of_pix2struct_have_its_scores():
    by_metric = score_rows(
        ["exact_match", "anls", "relaxed_accuracy"], [row[0] for row in PIX2STRUCT], [[row[1]] for row in PIX2STRUCT]
    )
    assert mean_scores(by_metric) == pytest.approx({"exact_match": 0.125, "anls": 0.475, "relaxed_accuracy": 0.625})
    assert by_metric["relaxed_accuracy"] == [1, 1, 1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("prediction", "right", "expected"),
    [
        ("105", "100", 1),  # the bound is within
        ("105.01", "100", 0),
        ("-95", "-100", 1),
        ("5", "5%", 0),  # 5 and 0.05
        ("1,000", "1000", 0),  # no number for the official code
        ("1,000", "1,000", 1),
        ("0.0", "0", 0),  # a share of zero is none: compared as text
        ("0", "0", 1),
        (" Yes\n", "yes", 1),
        ("nan", "NaN", 1),
        ("inf", "100", 0),
        ("", "100", 0),
        ("%", "%", 1),
    ],
)
def test_numbers_are_right_within_five_percent_and_other_texts_in_any_case(prediction, right, expected):
    assert score("relaxed_accuracy", prediction, right) == expected


def test_exact_match_looks_at_case_and_inner_blanks_but_not_at_the_ends():
    assert score("exact_match", " Paris \n", "London", "Paris") == 1
    assert score("exact_match", "paris", "Paris") == 0
    assert score("exact_match", "New  York", "New York") == 0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # metrics/anls/README.md of huggingface/evaluate; 0.875 by equation 1 of Biten et al. 2019
        ("Denver Broncos", ["Denver Broncos", "Denver R. Broncos"], 1),
        ("12/15/89", ["12/15/88"], 0.875),
        ("Dear dr. Lobo", ["Dear Dr. Lobo", "Dr. Lobo"], 1),
        # tests/test_anls_star.py of deepopinion/anls_star_metric
        ("St. Louis Children's Hospital", ["st. louis children hospital", "st. louis children's hospital"], 1),
        (" Test    Hello\n\n", ["Test Hello "], 1),
        # the threshold
        ("ab", ["ax"], 0.5),
        ("abc", ["axx"], 0),
        ("", ["a"], 0),
        ("x" + " " * 1000, ["abc"], 0),
    ],
)
def test_anls_is_that_of_the_best_reference_and_zero_below_half(prediction, references, expected):
    assert score("anls", prediction, *references) == expected


def test_vqa_accuracy_grows_with_the_people_who_agree():
    # min(agree / 3, 1), averaged over the sets of nine answers (https://visualqa.org/evaluation.html)
    scores = [score("vqa_accuracy", "yes", *["yes"] * agree, *["no"] * (10 - agree)) for agree in range(6)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_vqa_accuracy_with_few_answers_asks_all_others_to_agree():
    assert score("vqa_accuracy", "The Cat.", "cat") == 1
    assert score("vqa_accuracy", "dog", "cat") == 0
    assert score("vqa_accuracy", "cat", "cat", "dog") == 0.5
    assert score("vqa_accuracy", "cat", "cat", "dog", "cow") == pytest.approx(1 / 3)
    assert score("vqa_accuracy", "cat", "cat", "cat", "cat") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the rules and examples of https://visualqa.org/evaluation.html
        ("Dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("The two dogs and a cat.", "2 dogs and cat"),
        ("3.5", "3.5"),
        # as vqaEval.py of GT-Vision-Lab/VQA has it
        ("None", "0"),
        ("t-shirt", "t shirt"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("yes/no or no /yes", "yesno or no yes"),
        ("shouldntve shouldnt've shouldn'tve", "shouldntve shouldn't've shouldn't've"),
        ("lets", "lets"),
    ],
)
def test_texts_are_normalized_as_by_the_official_script_of_vqa(text, expected):
    assert normalize_vqa(text) == expected


def test_token_f1_has_the_numbers_of_squad():
    # metrics/squad/README.md of huggingface/evaluate: two of three
    rows = [("1976", "1976"), ("Beyonce", "Beyoncé and Bruno Mars"), ("climate change", "climate change")]
    by_metric = score_rows(["token_f1"], [row[0] for row in rows], [[row[1]] for row in rows])
    assert mean_scores(by_metric)["token_f1"] == pytest.approx(2 / 3)
    # F1 by its formula: one word of one, one of three
    assert score("token_f1", "rock", "Rock, n' Roll.") == 0.5
    assert score("token_f1", "The cat the cat", "cat sat") == 0.5  # a word counts as often as both have it
    assert score("token_f1", "nothing", "in the park", "An apple!", "nothing at all") == 0.5
    assert score("token_f1", "the", "a") == 1
    assert score("token_f1", "", "word") == 0


@pytest.mark.parametrize(
    ("prediction", "right", "expected"),
    [
        # Lin 2004, section 3.1
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # rouge_scorer_test.py of google-research
        ("testing one", "testing one two", 4 / 5),
        ("testing two", "testing one two", 4 / 5),
        ("", "testing one two", 0),
        # rouge-score 0.1.2
        ("Café no. 3.5 is SHUT", "the cafe, no 3 5: shut", 8 / 12),
        ("漢字", "漢字", 0),
    ],
)
def test_rouge_l_has_the_numbers_of_its_paper_and_its_package(prediction, right, expected):
    assert score("rouge_l", prediction, right) == pytest.approx(expected)
    assert score("rouge_l", prediction, "other", right) == pytest.approx(expected)


LINES = {"k1": 1, "k2": "mock", "line_items": [{"a": "b", "c": "d"}, {"e": "f"}]}


@pytest.mark.parametrize(
    ("right", "given", "expected"),
    [
        # tests/test_anls_star.py of deepopinion/anls_star_metric
        ({"a": "b", "c": "d"}, {"a": "b", "c": "e"}, 1 / 2),
        ({"a": "b", "c": "d"}, {"a": "b", "e": "d"}, 1 / 3),
        (LINES, {"k1": 1, "k2": "kcom", "line_items": [{"e": "f"}, {"a": "y", "c": "d"}]}, 3 / 5),
        ({"a": ["a", "b", "c"]}, {"a": ["b", "c"]}, 2 / 3),
        ({"a": ["a", "b", "c"]}, {"a": "b"}, 0),
        (["one", "two", "three"], ["three", "one", "two"], 1),
        # a missing first item leaves the others right; exchanged values do not
        ([{"n": 1, "p": 5}, {"n": 2, "p": 5}], [{"n": 2, "p": 5}], 2 / 4),
        ([{"n": "x", "p": 1}, {"n": "y", "p": 2}], [{"n": "x", "p": 2}, {"n": "y", "p": 1}], 2 / 4),
        # values
        ({"a": 1}, {"a": 1.0}, 1),
        ({"a": 1}, {"a": "1"}, 0),
        ({"a": 1}, {"a": True}, 0),
        ({"a": "Ü "}, {"a": "Ü"}, 1),
        ({"a": "U"}, {"a": "u"}, 0),
        ({"a": float("nan")}, {"a": float("nan")}, 1),
        ({"a": None}, {}, 0),
        ({"a": [], "b": {}}, {"a": {}, "b": {}}, 1 / 2),
        ({}, {"a": 1}, 0),
        ({}, {}, 1),
    ],
)
def test_fields_of_both_are_counted(right, given, expected):
    assert score("json_field_accuracy", json.dumps(given), json.dumps(right)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ('```json\n{"a": 1}\n```', 1),
        ('Sure {here}: {"a": 1}. {"a": 2}', 1),
        ('{"a": 1', 0),
        ('{"b": {"a": 1}', 0),  # the part of a broken one
        ('{"a": NaN}', 0),
        ('{"a": ' + "1" * 9999 + "}", 0),
        ("[" * 9999, 0),
        ('{"a":' * 9999, 0),
        ("a: 1", 0),
        ("", 0),
    ],
)
def test_json_is_found_amid_words_and_what_is_none_scores_zero(prediction, expected):
    assert score("json_field_accuracy", prediction, '{"a": 1}') == expected


def test_json_too_deep_to_compare_is_no_error():
    deep = '{"a":' * 600 + "1" + "}" * 600
    assert score("json_field_accuracy", deep, deep) in (0, 1)  # Python 3.11 gives up


@pytest.mark.parametrize("right", ["seven", "7", '{"a": 1'])
def test_a_right_answer_without_json_is_an_error_of_the_user(right):
    with pytest.raises(UserError, match="needs a JSON object or list as the right answer, not '"):
        score("json_field_accuracy", "{}", right)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
PIECES = st.sampled_from(["a", "The", "cat ", "12", "%", "1,5", "nan", "don't ", ".", " ? ", "[", '{"a":', "\n"])
TEXTS = st.text(max_size=40) | st.lists(PIECES).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4), st.dictionaries(st.text(max_size=2), VALUES, max_size=3))
def test_any_text_scores_between_0_and_1_and_the_right_one_1(prediction, references, fields):
    texts = [name for name in METRICS if name != "json_field_accuracy"]
    assert all(0 <= value <= 1 for [value] in score_rows(texts, [prediction], [references]).values())
    same = score_rows([name for name in texts if name != "rouge_l"], [prediction], [[prediction]])
    assert set(map(tuple, same.values())) == {(1.0,)}
    assert score("rouge_l", f"x {prediction}", f"x {prediction}") == 1
    assert score("vqa_accuracy", prediction, *[prediction] * 10) == 1

    right = json.dumps(fields)
    assert 0 <= score("json_field_accuracy", prediction, right) <= 1
    assert 0 <= score("json_field_accuracy", json.dumps({"a": fields, "b": 1}), right) < 1
    turned = dict(random.Random(0).sample(sorted(fields.items(), key=lambda item: item[0]), len(fields)))
    assert score("json_field_accuracy", f"It is {json.dumps(turned)}!", right) == 1


def test_long_texts_are_scored_in_no_time():
    words = "word number 12 {" * 5000
    assert score_rows(list(METRICS), [words], [['{"a": 1}']])["json_field_accuracy"] == [0]


def test_a_score_that_does_not_exist_is_named_with_the_nearest_and_all_there_are():
    check_metrics(list(METRICS))
    with pytest.raises(UserError, match=r"^metrics: there is no score anl. Did you mean anls\? Use one of exact"):
        check_metrics(["exact_match", "anl"])
    with pytest.raises(UserError, match=r"eval_metrics: there is no score xyzzy. Use one of .*, json_field_acc"):
        check_metrics(["xyzzy"], "eval_metrics")


@pytest.mark.parametrize("name", ["anls", "rouge_l"])
def test_a_score_without_its_library_says_how_to_install_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    check_metrics([other for other in METRICS if other not in ("anls", "rouge_l")])
    with pytest.raises(UserError, match=rf'{name} needs rapidfuzz. Install it: pip install "vlm-tuning\[metrics\]"'):
        check_metrics([name])


def test_rows_without_a_right_answer_are_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="without a reference"):
        score_rows(["exact_match"], ["a", "b"], [["a"], []])


def test_scores_need_neither_torch_nor_what_is_not_asked_for():
    code = "import sys, tuning.metrics; print([name for name in ('torch', 'rapidfuzz') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("prediction", "right", "mean", "at_50"),
    [
        ("[0, 0, 10, 10]", "[0, 0, 10, 10]", 1, 1),
        ("It is at (0,0),(10,5).", "<loc0000><loc0000><loc0010><loc0010>", 0.5, 1),  # 0.5 is enough
        ("[0, 0, 10, 4]", "[0, 0, 10, 10]", 0.4, 0),
        ("[0, 0, 10, 10] [70, 70, 80, 80]", "[0, 0, 10, 10] [50, 50, 60, 60]", 0.5, 0.5),
        ("[0, 0, 10, 10]", "[0, 0, 10, 10] [0, 0, 10, 5]", 0.75, 1),  # one box may meet several
        ("[1, 1, 2, 2] [3, 3, 4, 4] [0, 0, 10, 10]", "[0, 0, 10, 10]", 1, 1),  # others do not count
        ("there is none", "[0, 0, 10, 10]", 0, 0),
        ("there is none", "No such thing.", 1, 1),
        ("[0, 0, 10, 10]", "No such thing.", 0, 0),
        ("[5, 5]", "No box: [7, 7]", 1, 1),  # points are not boxes
    ],
)
def test_boxes_are_scored_by_their_best_overlap(prediction, right, mean, at_50):
    assert score("iou", prediction, right) == pytest.approx(mean)
    assert score("iou_at_50", prediction, right) == pytest.approx(at_50)


def test_of_several_references_the_boxes_that_fit_best_count():
    assert score("iou", "[0, 0, 10, 10]", "[50, 50, 60, 60]", "[0, 0, 10, 5]") == pytest.approx(0.5)


def test_scores_of_boxes_need_a_box_in_one_right_answer():
    check_references(["iou"], [("a", "none"), ("b", "[1, 2, 3, 4]")])
    check_references(["iou"], [])  # nothing will be scored, which `predict` says
    check_references(["anls"], [("a", "none")])
    with pytest.raises(UserError, match="iou_at_50 compares boxes, and no right answer has one"):
        check_references(["exact_match", "iou_at_50"], [("a", "none"), ("b", "[1, 2]")])
