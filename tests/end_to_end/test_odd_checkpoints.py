"""Checkpoints as people have them: templates in several places, greedy ones with sampling flags, extended tokenizers,
damaged or old adapters."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import tuning
from tuning import cli
from tuning.config.options import ModelArguments
from tuning.errors import UserError
from tuning.model import load

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}
SHORT = {"max_steps": 1}


@pytest.fixture
def model(models, tmp_path):
    """A copy of a tiny model, to change."""
    return Path(shutil.copytree(models["granite_vision"], tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | changes))


# --- chat templates ---


def move_template(model: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template=(model / "chat_template.jinja").read_text())
    (model / "chat_template.jinja").unlink()


def other_template_in_tokenizer(model: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template="{{ 'other' }}")


def no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


PLACES = {
    "in the tokenizer's settings": move_template,
    "another one there": other_template_in_tokenizer,
    "none": no_template,
}


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_training_saving_and_reading_back_agree_on_the_template(place, given, method, model, make_options, tmp_path):
    trained = (model / "chat_template.jinja").read_text()
    PLACES[place](model)
    changes = {}
    if given or place == "none":
        trained = trained.replace("A chat between a curious user", "A chat between a user")
        (tmp_path / "given.jinja").write_text(trained)
        changes = {"chat_template": str(tmp_path / "given.jinja")}
    options = make_options("granite_vision", model_name_or_path=str(model), **changes, **method, **SHORT)
    result = tuning.train(options)
    assert (result.model_dir / ".complete").is_file()
    processor = AutoProcessor.from_pretrained(result.model_dir)
    assert processor.chat_template == processor.tokenizer.chat_template == trained
    assert transformers.AutoTokenizer.from_pretrained(result.model_dir).chat_template == trained
    assert tuning.train(options).global_step == 1  # finished: it is not trained again


# --- generation settings ---


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"do_sample": False, "min_p": 0.1, "typical_p": 0.5},
        {"length_penalty": 2.0, "top_k": 5},
        {"do_sample": True, "temperature": 0.9},
    ],
)
def test_how_a_model_answers_is_saved_as_it_is_published(flags, model, make_options):
    """transformers refuses to save some of these, and `Trainer` changes the tokens."""
    kept = {"repetition_penalty": 1.3, "max_new_tokens": 77, "eos_token_id": 0, "pad_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(flags | kept))
    result = tuning.train(make_options("granite_vision", model_name_or_path=str(model), **SHORT))
    assert json.loads((result.model_dir / "generation_config.json").read_text()) == flags | kept


def test_settings_that_contradict_each_other_end_before_training(model, make_options, tmp_path):
    (model / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3, "eos_token_id": 0}))
    with pytest.raises(UserError, match="`num_return_sequences` different than 1"):
        tuning.train(make_options("granite_vision", model_name_or_path=str(model), **SHORT))


# --- tokens without an embedding ---


def write_rows(folder: Path, texts: list[tuple[str, str, str]]) -> Path:
    lines = []
    for system, question, answer in texts:
        turns = [("system", system)] * bool(system) + [("user", question), ("assistant", answer)]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], "images": []}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def add_plain(tokenizer) -> None:
    tokenizer.add_tokens(["<bbox>"])


def add_special(tokenizer) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bbox>"]})


@pytest.mark.parametrize("add", [add_plain, add_special])
@pytest.mark.parametrize("place", ["system", "question", "answer", "far in"])
def test_a_token_without_an_embedding_is_named(add, place, model, make_options, tmp_path, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows_known = len(tokenizer)
    add(tokenizer)
    tokenizer.save_pretrained(model)
    texts = {name: f"At <bbox> {name}." if name == place else "Red." for name in ("system", "question", "answer")}
    rows = [("", "Why?", "Red.")] * (5 if place == "far in" else 1)
    rows.append(("", "Why?", "<bbox>") if place == "far in" else tuple(texts.values()))
    data, out = write_rows(tmp_path, rows), tmp_path / "checked"
    is_escaped = add is add_special  # words of a row never become a control token
    options = make_options("granite_vision", model_name_or_path=str(model), training_data_path=str(data))
    (tmp_path / "config.json").write_text(json.dumps(options | {"output_dir": str(out)}))
    assert cli.main(["check", str(tmp_path / "config.json")]) == (0 if is_escaped else 1)
    problems = json.loads((out / "check.json").read_text())["problems"]
    assert len(problems) == (0 if is_escaped else 1)
    if is_escaped:
        return
    message = (
        f"{data}, row {len(rows) - 1}, field 'messages': the token '<bbox>' has the id {rows_known}, but the model has"
    )
    assert message in problems[0]["message"]
    with pytest.raises(UserError) as caught:
        tuning.train(options | {"max_steps": 3, "per_device_train_batch_size": 2, "num_train_epochs": 1})
    assert str(caught.value).startswith(message)
    output = tmp_path / "answers.jsonl"
    asked = cli.main(
        [
            "predict",
            "--model_name_or_path",
            str(model),
            "--data_path",
            str(data),
            "--output",
            str(output),
            "--on_bad_row",
            "skip",
        ]
    )
    assert asked == 0
    errors = [line.get("error", "") for line in map(json.loads, output.read_text().splitlines())]
    is_asked = place in ("system", "question")
    assert [bool(error) for error in errors] == [False] * (len(rows) - 1) + [is_asked]
    assert not is_asked or "has the id" in errors[-1]


def test_a_validation_row_with_such_a_token_is_named(model, make_options, rows, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    add_plain(tokenizer)
    tokenizer.save_pretrained(model)
    data = write_rows(tmp_path, [("", "Why?", "<bbox>")])
    options = make_options("granite_vision", model_name_or_path=str(model), validation_data_path=str(data), **SHORT)
    with pytest.raises(UserError, match=rf"^{data}, row 0, .*the token '<bbox>' has the id"):
        tuning.train(options)


@pytest.mark.parametrize("layout", ["granite_vision", "mllama"])
def test_models_with_an_embedding_for_every_token_are_not_looked_at(layout, models):
    arguments = ModelArguments(str(models[layout]))
    config = load.load_config(arguments)
    assert load.count_embeddings(load.load_processor(arguments, config), config) is None


# --- adapters ---


@pytest.fixture(scope="module")
def adapter(models, rows, tmp_path_factory):
    """A trained adapter."""
    options = {
        "model_name_or_path": str(models["granite_vision"]),
        "training_data_path": str(rows),
        "output_dir": str(tmp_path_factory.mktemp("adapter") / "out"),
        "learning_rate": 0.1,
        "dataloader_num_workers": 0,
        "report_samples": 0,
        "verify_save": False,
    }
    return tuning.train({**options, **LORA, "max_steps": 2}).model_dir


def cut(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"half")


def cut_late(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def cut_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", ')


def latin_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes('{"peft_type": "é"}'.encode("latin-1"))


DAMAGE = {
    "cut": (cut, "the weights cannot be read"),
    "cut late": (cut_late, "the weights cannot be read"),
    "config cut": (cut_config, "adapter_config.json: this is not an adapter that PEFT can read"),
    "config in Latin-1": (latin_config, "adapter_config.json: this is not an adapter that PEFT can read"),
    "config is a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "not an adapter that PEFT can read"),
    "another kind": (lambda a: edit(a / "adapter_config.json", peft_type="FOO"), "not an adapter that PEFT can read"),
    "no base": (lambda a: edit(a / "adapter_config.json", base_model_name_or_path=None), "names no model"),
    "base is no text": (lambda a: edit(a / "adapter_config.json", base_model_name_or_path=3), "names no model"),
    "rank is text": (lambda a: edit(a / "adapter_config.json", r="8"), "the adapter does not fit the model"),
    "other modules": (lambda a: edit(a / "adapter_config.json", target_modules=["nope"]), "does not fit the model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["export", "predict"])
def test_a_damaged_adapter_is_a_message(command, damage, adapter, rows, tmp_path, capsys):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    DAMAGE[damage][0](folder)
    output = str(tmp_path / "output.jsonl")
    words = {
        "export": ["--adapter", str(folder), "--output", output],
        "predict": ["--model_name_or_path", str(folder), "--data_path", str(rows), "--output", output],
    }
    assert cli.main([command, *words[command]]) == 1
    printed = capsys.readouterr().err
    assert DAMAGE[damage][1] in printed
    assert str(folder) in printed
    assert not Path(output).exists()


@pytest.mark.parametrize("name", ["{folder}/adaptr", "out/of/nowhere", "has space", "two//slashes"])
def test_a_mistyped_adapter_is_a_message(name, tmp_path, capsys):
    name = name.format(folder=tmp_path)
    assert cli.main(["export", "--adapter", name, "--output", str(tmp_path / "merged")]) == 1
    assert name in capsys.readouterr().err


def test_an_adapter_with_the_key_names_of_before_transformers_4_52_loads(adapter, rows, tmp_path):
    """These names moved: `language_model.model.layers` became `model.language_model.layers`."""
    old = Path(shutil.copytree(adapter, tmp_path / "old"))
    file = old / "adapter_model.safetensors"
    weights = load_file(file)
    start, moved = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    assert all(name.startswith(start) for name in weights)
    save_file({name.replace(start, moved): value for name, value in weights.items()}, file)
    for name, folder in (("new", adapter), ("old", old)):
        assert cli.main(["export", "--adapter", str(folder), "--output", str(tmp_path / f"merged-{name}")]) == 0
    merged, expected = (load_file(tmp_path / f"merged-{name}/model.safetensors") for name in ("old", "new"))
    assert merged.keys() == expected.keys()
    assert all(bool((merged[name] == expected[name]).all()) for name in expected)
