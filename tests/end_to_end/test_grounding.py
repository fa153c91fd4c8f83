"""Rows with boxes: trained as `check` shows them, drawn on its page and on that of `predict`, and scored."""

import json
import re

import pytest
from grounding_models import build_config, build_processor
from PIL import Image

from tuning import cli, train
from tuning.model import load

BOXES = [[8, 6, 40, 30], [0, 0, 64, 48], [16, 12, 32, 24]]


def line_of(number: int, objects: dict, answer: str = "At <bbox>.") -> dict:
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the <ref-object>?"}]}
    objects = {"ref": ["cat"], **objects}
    return {"messages": [question, {"role": "assistant", "content": answer}], "images": ["0.png"], "objects": objects}


@pytest.fixture
def write_rows(tmp_path):
    """A .jsonl of the given rows beside their picture, 64 pixels wide and 48 high."""

    def write(*lines) -> str:
        Image.new("RGB", (64, 48), "teal").save(tmp_path / "0.png")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def run(command: str, **options) -> int:
    words = [command]
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return cli.main(words)


def check(options: dict, tmp_path) -> tuple[int, dict, str]:
    """Exit code, check.json and check.html."""
    code = run("check", **options)
    return code, json.loads((tmp_path / "out/check.json").read_text()), (tmp_path / "out/check.html").read_text()


def test_check_shows_the_words_and_boxes_that_are_trained(make_options, write_rows, tmp_path, open_page):
    rows = write_rows(*(line_of(number, {"bbox": [box]}) for number, box in enumerate(BOXES)))
    options = make_options("granite_vision", training_data_path=rows, bbox_format="norm1000")
    code, found, page = check(options, tmp_path)
    assert code == 0
    assert found["problems"] == []
    shown = {sample["row"]: sample for sample in found["samples"]}
    texts = ["[125, 125, 625, 625]", "[0, 0, 1000, 1000]", "[250, 250, 500, 500]"]
    for row, text in enumerate(texts):
        assert shown[row]["supervised_text"] == [f"At {text}.<|end_of_text|>"]
        assert "Where is the cat?" in shown[row]["rendered_text"]
    assert 'alt="picture 1 of 1 of row 0, with 1 box of the row"' in page
    assert '<rect class="mark of-row" x="12.50" y="12.50" width="50.00" height="50.00"/>' in page
    assert "box of the row</li>" in page
    _, console = open_page(tmp_path / "out/check.html")
    assert console == []


def test_a_page_without_boxes_has_no_legend_of_them(make_options, tmp_path):
    _, _, page = check(make_options("llava15"), tmp_path)
    assert 'class="legend boxes"' not in page
    assert "<rect class=" not in page.split("</style>")[1].split('id="samples"')[1]


def test_check_names_every_bad_box(make_options, write_rows, tmp_path, capsys):
    bad = [
        {"bbox": [[0, 0, 65, 10]]},
        {"bbox": [[9, 0, 8, 1]]},
        {"bbox": []},
        {"bbox": [[0, 0, 1, 1]], "image_id": [1]},
    ]
    rows = write_rows(line_of(0, {"bbox": [BOXES[0]]}), *(line_of(1, objects) for objects in bad))
    options = make_options("llava15", training_data_path=rows, bbox_format="norm1")
    code, found, _ = check(options, tmp_path)
    assert code == 1
    assert "Traceback" not in capsys.readouterr().err
    problems = {problem["row"]: problem for problem in found["problems"]}
    assert {row: problem["kind"] for row, problem in problems.items()} == {
        1: "box outside the image",
        2: "box that ends before it begins",
        3: "marks and objects differ",
        4: "box without an image",
    }
    assert {problem["field"] for problem in problems.values()} == {"objects"}
    assert all(f"rows.jsonl, row {row}, field 'objects'" in problems[row]["message"] for row in problems)


def test_a_family_whose_format_is_not_known_needs_the_option(make_options, write_rows, capsys):
    options = make_options("llava15", training_data_path=write_rows(line_of(0, {"bbox": [BOXES[0]]})), max_steps=1)
    assert run("train", **options) == 1
    printed = capsys.readouterr()
    assert "row 0, field 'objects': how this model writes boxes is not known. Set bbox_format to one of" in printed.err
    assert "Traceback" not in printed.err
    assert run("train", **options, bbox_format="pixel") == 1
    assert "bbox_format: 'pixel' is unknown; use norm1, norm1000," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("Qwen2VL", "<|box_start|>(125,125),(625,625)<|box_end|>"),
        ("Qwen2_5_VL", "[7, 7, 35, 35]"),  # the processor makes 56×56 pixels of the picture
        ("Qwen3VL", "[125, 125, 625, 625]"),
    ],
)
def test_a_family_with_a_format_needs_no_option(family, text, make_options, write_rows, tmp_path, monkeypatch):
    build_config(family).save_pretrained(tmp_path / "model")
    # The published processor class would load a video processor, which needs torchvision.
    monkeypatch.setattr(load, "load_processor", lambda *_: build_processor(family))
    rows = write_rows(line_of(0, {"bbox": [BOXES[0]]}))
    options = make_options("llava15", training_data_path=rows, model_name_or_path=str(tmp_path / "model"))
    code, found, _ = check(options, tmp_path)
    assert code == 0
    assert found["samples"][0]["supervised_text"] == [f"At {text}.<|im_end|>"]


def test_training_reads_the_rows_with_boxes(make_options, write_rows, tmp_path):
    rows = write_rows(*(line_of(number, {"bbox": [box]}) for number, box in enumerate(BOXES)))
    train(make_options("llava15", training_data_path=rows, bbox_format="norm1000", max_steps=2))
    assert "loss" in (tmp_path / "out/training_logs.jsonl").read_text()


@pytest.fixture
def predict(models, write_rows, tmp_path, monkeypatch, capsys):
    """Run `predict` with these answers in place of a model's; returns its exit code, lines, page and what it said."""

    def run_predict(lines, answers, **changes):
        left = iter(answers)
        monkeypatch.setattr(
            "tuning.commands.predict.answer", lambda model, samples, *_, **__: [next(left) for _ in samples]
        )
        output = tmp_path / "predictions.jsonl"
        options = {"model_name_or_path": models["llava15"], "data_path": write_rows(*lines), "output": output}
        code = run("predict", **options, **{"bbox_format": "norm1000", "metrics": ["iou", "iou_at_50"], **changes})
        written = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        page = output.with_suffix(".html")
        return code, written, page.read_text() if page.exists() else "", capsys.readouterr()

    return run_predict


def test_predict_scores_boxes_and_draws_them(predict, open_page, tmp_path):
    lines = [line_of(number, {"bbox": [box]}) for number, box in enumerate(BOXES)]
    answers = ["It is at [125, 125, 625, 625]", "[0,0,500,1000] or (900, 900)", "I see no cat."]
    code, written, page, printed = predict(lines, answers)
    assert code == 0
    assert written[0]["reference"] == "At [125, 125, 625, 625]."
    assert [line["scores"]["prediction"]["iou"] for line in written] == pytest.approx([1, 0.5, 0])
    assert [line["scores"]["prediction"]["iou_at_50"] for line in written] == [1, 1, 0]
    assert written[0]["boxes"] == [{"image": 0, "place": [0.125, 0.125, 0.625, 0.625], "scale": [1000, 1000]}]
    assert re.search(r"iou +iou_at_50\n.* 50\.00% +66\.67%", printed.out)
    assert '<rect class="mark of-answer" x="0.00" y="0.00" width="50.00" height="100.00"/>' in page
    assert '<path class="mark point of-answer square" d="M90.00 90.00h0"/>' in page
    assert "with 1 box of the row and 2 boxes of the answer" in page
    assert re.search(r"box in the answer of llava15\s*</li>", page)
    _, console = open_page(tmp_path / "predictions.html")
    assert console == []


def test_corners_in_the_wrong_order_and_boxes_far_outside_are_drawn(predict, open_page, tmp_path):
    code, _, page, _ = predict([line_of(0, {"bbox": [BOXES[0]]})], ["[900, 800, 100, -200]" + "[1,1,2,2]" * 500])
    assert code == 0
    assert '<rect class="mark of-answer" x="10.00" y="-20.00" width="80.00" height="100.00"/>' in page
    assert page.count('<rect class="mark of-answer"') <= 201
    _, console = open_page(tmp_path / "predictions.html")
    assert console == []


def test_boxes_of_several_images_are_drawn_on_their_own(predict, write_rows):
    line = line_of(0, {"bbox": [BOXES[0], BOXES[2]], "image_id": [1, 0]}, "<bbox> <bbox>")
    line["images"] = ["0.png", "0.png"]
    line["messages"][0]["content"].insert(0, {"type": "image"})
    code, _, page, _ = predict([line], ["[0, 0, 100, 100] [0, 0, 200, 200]"], max_images_per_sample=2)
    assert code == 0
    first, second = re.findall(r'<div class="marked">(.*?)</div>', page, flags=re.DOTALL)
    assert 'of-answer" x="0.00" y="0.00" width="20.00"' in first
    assert 'of-answer" x="0.00" y="0.00" width="10.00"' in second


def test_scores_of_boxes_need_boxes(predict):
    plain = line_of(0, {"bbox": []}, "Left.")
    code, _, _, printed = predict([plain], ["x"])
    assert code == 1
    assert "iou compares boxes, and no right answer has one. Choose other scores" in printed.err


def test_json_answers_with_marks_are_json(predict):
    line = line_of(0, {"bbox": [BOXES[0]]}, '[{"bbox_2d": <bbox>, "label": "cat"}]')
    code, written, _, _ = predict([line], ['[{"bbox_2d": [125, 125, 625, 625]}]'], metrics="json_field_accuracy")
    assert code == 0
    assert written[0]["scores"]["prediction"] == {"json_field_accuracy": 0.8}
