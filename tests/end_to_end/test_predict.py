"""`vlm-tuning predict`: answers are those of the model alone, kept when interrupted, scored and compared."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from predictions import flags_of, make_predict, read_lines
from transformers import AutoModelForImageTextToText, AutoProcessor
from two_processes import run_two

from tuning import train
from tuning.commands import predict as prediction
from tuning.data.images import load_image

QUICK = {"max_new_tokens": 8, "batch_size": 3}


@pytest.fixture(scope="module")
def trained(models, rows, tmp_path_factory):
    """Folders of a model tuned in full, and of an adapter, both of llava15."""
    root = tmp_path_factory.mktemp("trained")
    common = {
        "model_name_or_path": str(models["llava15"]),
        "training_data_path": str(rows),
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "report_samples": 0,
    }
    train({**common, "output_dir": str(root / "full")})
    lora = {"peft_method": "lora", "target_modules": "all-linear", "lora_alpha": 64}
    train({**common, **lora, "output_dir": str(root / "adapter")})
    return root


@pytest.fixture
def predict(rows, tmp_path, capsys):
    run = make_predict(capsys, data_path=rows, output=tmp_path / "predictions.jsonl", **QUICK)
    return lambda model, **changes: run(model_name_or_path=model, **changes)


def answer_alone(model, processor, rows):
    """The answers by plain transformers, row by row."""
    answers = []
    for row in read_lines(rows):
        text = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
        image = load_image(row["images"][0], Path(rows).parent, "")
        inputs = processor(text=text, images=image, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=QUICK["max_new_tokens"], do_sample=False)
        new = written[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def test_answers_are_those_of_plain_transformers_row_by_row(predict, trained, models, rows):
    processor = AutoProcessor.from_pretrained(trained / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(models["llava15"])
    plain = {"base": answer_alone(base, processor, rows)}
    full = AutoModelForImageTextToText.from_pretrained(trained / "full")
    plain["full"] = answer_alone(full, processor, rows)
    plain["adapter"] = answer_alone(PeftModel.from_pretrained(base, trained / "adapter"), processor, rows)
    assert len({tuple(answers) for answers in plain.values()}) == 3
    for name, folder in {"base": models["llava15"], "full": trained / "full", "adapter": trained / "adapter"}.items():
        code, lines, _ = predict(folder, overwrite="true")
        assert code == 0
        assert [line["prediction"] for line in lines] == plain[name]
    assert [line["row"] for line in lines] == list(range(16))
    assert lines[0]["question"] == "Which colour is it?"
    assert lines[0]["reference"] == "It is red."
    assert lines[0]["prompt"] == "USER: <image>\nWhich colour is it? ASSISTANT:"


def test_two_models_stand_side_by_side_with_their_scores(predict, trained, models, tmp_path):
    _, alone, _ = predict(trained / "full", metrics=["exact_match", "token_f1"], output=tmp_path / "alone.jsonl")
    code, lines, printed = predict(trained / "full", compare=models["llava15"], metrics=["exact_match", "token_f1"])
    assert code == 0
    assert [line["prediction"] for line in lines] == [line["prediction"] for line in alone]
    assert [line["prediction"] for line in lines] != [line["compared"] for line in lines]
    assert lines[0]["scores"].keys() == {"prediction", "compared"}
    summary = json.loads((tmp_path / "predictions.scores.json").read_text())
    mean = sum(line["scores"]["compared"]["token_f1"] for line in lines) / len(lines)
    assert summary["scores"]["compared"]["token_f1"] == pytest.approx(mean)
    assert summary["models"] == {"prediction": str(trained / "full"), "compared": str(models["llava15"])}
    assert "exact_match" in printed.out
    assert not list(tmp_path.glob(".*partial"))
    code, _, printed = predict(trained / "full", metrics="anls")
    assert code == 1
    assert f"holds answers of {models['llava15']}: another model, other rows or other settings" in printed.err
    assert "name that model as compare" in printed.err


def test_what_was_answered_before_an_interruption_is_kept(predict, trained, rows, tmp_path, monkeypatch):
    asked, answer = [], prediction.answer

    def count(model, samples, *rest, **settings):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(samples))
        return answer(model, samples, *rest, **settings)

    monkeypatch.setattr(prediction, "answer", count)
    code, lines, printed = predict(trained / "full")
    assert (code, lines) == (130, [])
    assert "Interrupted. 6 answers are kept. Run the same command again to continue." in printed.err
    (partial,) = tmp_path.glob(".*partial")
    partial.write_text(partial.read_text() + '{"index": 6, "file": "ro')  # killed while it wrote
    monkeypatch.setattr(prediction, "answer", answer)
    _, whole, _ = predict(trained / "full", output=tmp_path / "whole.jsonl")
    asked.append(0)
    monkeypatch.setattr(
        prediction, "answer", lambda m, samples, *r, **s: asked.append(len(samples)) or answer(m, samples, *r, **s)
    )
    code, lines, _ = predict(trained / "full")
    assert code == 0
    assert lines == whole
    assert asked == [3, 3, 0, 3, 3, 3, 1]
    _, lines, _ = predict(trained / "full", metrics="token_f1")  # only scores anew
    assert asked == [3, 3, 0, 3, 3, 3, 1]
    assert lines[0]["scores"]["prediction"]["token_f1"] >= 0


def test_a_killed_process_is_named_and_answers_are_kept(predict, trained, rows, tmp_path, monkeypatch):
    read = prediction.Questions.__getitem__

    def killed(questions, index):
        if index == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(questions, index)

    whole = predict(trained / "full", output=tmp_path / "whole.jsonl")[1]
    monkeypatch.setattr(prediction.Questions, "__getitem__", killed)
    code, _, printed = predict(trained / "full")
    assert code == 1
    assert "Traceback" not in printed.err
    assert printed.err.splitlines()[-1].startswith("Error: a process that reads data ")
    monkeypatch.undo()
    assert predict(trained / "full")[:2] == (0, whole)


def test_a_model_may_be_compared_on_some_of_the_rows(predict, trained, models):
    predict(trained / "full")
    code, lines, printed = predict(trained / "full", compare=models["llava15"], max_rows=4, metrics="exact_match")
    assert code == 0
    assert [line["compared"] is None for line in lines] == [False] * 4 + [True] * 12
    assert "Scores of 4 rows" in printed.out


def test_another_chat_template_is_another_model(predict, trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained / "full", folder)
    assert predict(folder)[0] == 0
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("upper()", "lower()"))
    code, _, printed = predict(folder)
    assert code == 1
    assert f"holds answers of {folder}: another model" in printed.err


def test_other_answers_are_not_written_over(predict, trained, models, rows):
    changing = rows.with_name("changing.jsonl")
    changing.write_text(rows.read_text())
    assert predict(trained / "full", data_path=changing)[0] == 0
    changing.write_text(rows.read_text().replace("Which colour is it?", "Which animal is it?"))
    assert predict(trained / "full", data_path=changing)[0] == 1
    assert predict(trained / "full", overwrite="true")[0] == 0
    code, _, printed = predict(models["llava15"])
    assert code == 1
    assert f"holds answers of {trained / 'full'}: another model" in printed.err
    assert predict(models["llava15"], overwrite="true")[0] == 0


def test_bad_rows_stop_the_run_or_are_written_down(predict, trained, rows, tmp_path):
    lines = rows.read_text().splitlines()
    lines[4] = lines[4].replace("4.png", "none.png")
    path = rows.with_name("one_bad.jsonl")
    path.write_text("\n".join(lines) + "\n")
    code, _, printed = predict(trained / "full", data_path=path)
    assert code == 1
    assert "row 4, field 'images', image 0" in printed.err
    assert "Traceback" not in printed.err
    code, lines, printed = predict(trained / "full", data_path=path, on_bad_row="skip", metrics="exact_match")
    assert code == 0
    assert ["error" in line for line in lines] == [number == 4 for number in range(16)]
    assert "1 rows were left out" in printed.out
    assert "Scores of 15 rows" in printed.out


def test_rows_may_have_no_answer_or_several(predict, trained, rows):
    lines = read_lines(rows)[:2]
    lines[0]["messages"] = lines[0]["messages"][:1]
    path = rows.with_name("several.jsonl")
    answers = [{"answers": None}, {"answers": ["It is green.", "green"]}]
    path.write_text("".join(json.dumps(line | more) + "\n" for line, more in zip(lines, answers, strict=True)))
    code, lines, printed = predict(trained / "full", data_path=path, references_field="answers", metrics="anls")
    assert code == 0
    assert [line["references"] for line in lines] == [[], ["It is green.", "green"]]
    assert [line["reference"] for line in lines] == [None, "It is green. Very much so."]
    assert "Scores of 1 rows" in printed.out
    code, _, printed = predict(trained / "full", data_path=path, references_field="answer")
    assert code == 1
    assert "there is no column 'answer'" in printed.err


def test_wrong_options_are_said_before_anything_is_loaded(predict, trained, tmp_path):
    code, lines, printed = predict(trained / "none", metrics="exact_mach", max_new_tokens=0)
    assert (code, lines) == (1, [])
    assert "model_name_or_path" in printed.err
    assert "max_new_tokens: must be at least 1, got 0" in printed.err
    code, _, printed = predict(trained / "full", metrics="exact_mach")
    assert code == 1
    assert "exact_match" in printed.err
    code, _, printed = predict(trained / "full", batchsize=3)
    assert "batchsize: unknown option. Did you mean batch_size?" in printed.err


def test_an_adapter_whose_base_is_gone_is_named(predict, trained, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(trained / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base/model"}))
    code, _, printed = predict(folder)
    assert code == 1
    assert f"{folder}/adapter_config.json, base_model_name_or_path /nowhere/base/model" in printed.err


# The command, of which each process writes down how many questions it is asked.
COUNTING = """
import os, sys
from pathlib import Path
from tuning import cli
from tuning.commands import predict

def count(model, samples, *rest, **settings):
    with Path(__file__).with_name(f"asked_of_{os.environ['RANK']}").open("a") as file:
        file.write(str(len(samples)))
    return answer(model, samples, *rest, **settings)

answer, predict.answer = predict.answer, count
predict.PROGRAM = (__file__,)  # what the launcher starts
sys.exit(cli.main(["predict", *sys.argv[1:]]))
"""


FSDP = Path(__file__).parents[2] / "fixtures" / "accelerate_fsdp_defaults.yaml"  # of whole copies all the same


def test_two_processes_answer_as_one_from_a_json_file(predict, trained, rows, tmp_path):
    _, alone, _ = predict(trained / "full", output=tmp_path / "alone.jsonl")
    config = {
        "model_name_or_path": str(trained / "full"),
        "data_path": str(rows),
        "output": str(tmp_path / "two.jsonl"),
        "metrics": "exact_match",
        "accelerate_launch_args": {"num_processes": 2, "config_file": str(FSDP)},
        **QUICK,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "counting.py").write_text(COUNTING)
    command = [sys.executable, str(tmp_path / "counting.py"), str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"asked_of_{rank}").read_text() for rank in "01"] == ["333", "331"]
    lines = [{k: v for k, v in line.items() if k != "scores"} for line in read_lines(tmp_path / "two.jsonl")]
    assert lines == alone
    assert torch.get_num_threads() == 1


def test_the_command_starts_itself_in_two_processes(predict, trained, rows, tmp_path):
    _, alone, _ = predict(trained / "full", output=tmp_path / "alone.jsonl", max_rows=4)
    options = {"model_name_or_path": trained / "full", "data_path": rows, "output": tmp_path / "two.jsonl", **QUICK}
    options |= {"max_rows": 4, "accelerate_launch_args": json.dumps({"num_processes": 2})}
    command = [sys.executable, "-m", "tuning.cli", "predict", *flags_of(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "two.jsonl") == alone
    assert done.stdout.count("Done: ") == 1


def test_layers_that_are_shared_out_answer_as_before_and_need_one_process(predict, trained, rows, tmp_path):
    """With an adapter, too. `tests/cuda` has two devices; here the CPU is the only one."""
    for model in ("full", "adapter"):
        _, expected, _ = predict(trained / model, output=tmp_path / f"{model}.jsonl", max_rows=4)
        changes = {"output": tmp_path / f"{model}-shared.jsonl", "max_rows": 4, "device_map": "auto"}
        code, lines, printed = predict(trained / model, **changes)
        assert (code, lines) == (0, expected)
        assert "The layers of the model are on cpu." in printed.out
    words = ["predict", *flags_of({"model_name_or_path": trained / "full", "data_path": rows, "device_map": "auto"})]
    codes, said, _ = run_two([*words, "--output", str(tmp_path / "two.jsonl")], tmp_path, {}, lambda rank: None)
    assert codes == [1, 1]
    assert "device_map auto: shares one model out over all GPUs, and each of 2 processes would do so" in "".join(said)


def test_several_machines_need_not_share_the_output(predict, trained, rows, tmp_path):
    _, alone, _ = predict(trained / "full", output=tmp_path / "alone.jsonl", max_rows=4)
    options = {"model_name_or_path": trained / "full", "data_path": rows, "output": "answers.jsonl", "max_rows": 4}

    def move_to_own_folder(rank: int) -> None:
        os.chdir(tmp_path / f"machine-{rank}")

    for rank in range(2):
        (tmp_path / f"machine-{rank}").mkdir()
    words = ["predict", *flags_of(options | QUICK)]
    codes, said, _ = run_two(words, tmp_path, {}, move_to_own_folder)
    assert codes == [0, 0], said
    assert read_lines(tmp_path / "machine-0" / "answers.jsonl") == alone
    assert list((tmp_path / "machine-1").iterdir()) == []


def test_a_compared_model_that_is_not_there_is_named_before_anything_is_answered(predict, trained, tmp_path):
    code, lines, printed = predict(trained / "full", compare="no/such")
    assert (code, lines) == (1, [])
    assert "compare no/such" in printed.err
    assert not list(tmp_path.glob(".*partial"))


def test_an_adapter_on_another_model_and_damaged_weights_are_told_in_a_line(predict, trained, models, tmp_path):
    other, damaged = tmp_path / "other", tmp_path / "damaged"
    shutil.copytree(trained / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    base = str(models["granite_vision"])
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    code, _, printed = predict(other)
    assert code == 1
    assert "was trained on a model with LlavaProcessor" in printed.err
    for kind, name in (("full", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        shutil.copytree(trained / kind, damaged, dirs_exist_ok=True)
        (damaged / name).write_bytes((trained / kind / name).read_bytes()[:200])
        code, _, printed = predict(damaged)
        assert code == 1, printed.err
        assert "Traceback" not in printed.err
        shutil.rmtree(damaged)


def test_scores_without_right_answers_are_missed_aloud(predict, trained, rows):
    line = read_lines(rows)[0]
    path = rows.with_name("asking.jsonl")
    path.write_text(json.dumps({**line, "messages": line["messages"][:1]}) + "\n")
    code, _, printed = predict(trained / "full", data_path=path, metrics="exact_match")
    assert code == 0
    assert "Nothing is scored" in printed.out


def test_what_would_fail_in_the_end_is_said_before_anything_is_answered(predict, trained, rows, monkeypatch):
    monkeypatch.setattr(prediction, "load_answering", lambda *_, **__: pytest.fail("a model is loaded"))
    code, lines, printed = predict(trained / "full", metrics="json_field_accuracy")
    assert (code, lines) == (1, [])
    assert (
        "rows.jsonl, row 0: json_field_accuracy needs a JSON object or list as the right answer, not 'It is red.'"
        in printed.err
    )
    code, lines, printed = predict(trained / "full", output=rows / "predictions.jsonl")  # in a file
    assert (code, lines) == (1, [])
    assert "cannot be written" in printed.err


def test_a_file_that_holds_no_answers_is_never_written_over(predict, trained, tmp_path):
    precious = tmp_path / "mine.jsonl"
    precious.write_text("{}\n")
    code, _, printed = predict(trained / "full", output=precious, overwrite="true")
    assert code == 1
    assert "the file exists, but has no answers" in printed.err
    assert precious.read_text() == "{}\n"


def test_prompts_without_a_column_of_answers_are_answered(models, rows, tmp_path, predict):
    prompts = [{"role": "user", "content": "Which colour?"}]
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Which colour?", "images": ["0.png"]}, {"prompt": prompts, "images": ["1.png"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, answered, _ = predict(models["llava15"], data_path=path, image_folder=rows.parent)
    assert code == 0
    assert [line["question"] for line in answered] == ["Which colour?"] * 2
    assert answered[0]["prompt"] == answered[1]["prompt"]
    assert "<image>" in answered[0]["prompt"]
    assert [line["reference"] for line in answered] == [None, None]
