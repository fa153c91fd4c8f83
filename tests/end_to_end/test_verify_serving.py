"""`vlm-tuning verify-serving`: an equal server passes, and of any other the first difference is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from served_models import PlainModel, scripted_server, transformers_server
from tiny_models import VICUNA_TEMPLATE, build_model, build_processor, save_layout

from tuning import cli, train
from tuning.commands import verify_serving

VLLM = {"/version": {"version": "0.30"}}


@pytest.fixture(scope="module")
def adapter(models, rows, tmp_path_factory):
    """The folder of an adapter of llava15."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    train(
        {
            "model_name_or_path": str(models["llava15"]),
            "training_data_path": str(rows),
            "output_dir": str(folder),
            "max_steps": 8,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "dataloader_num_workers": 0,
            "report_samples": 0,
            "peft_method": "lora",
            "target_modules": "all-linear",
            "lora_alpha": 64,
        }
    )
    return folder


@pytest.fixture
def verify(capsys):
    """Compare a model with a server; returns the exit code, what was printed, and the error."""

    def run(url, folder, **options):
        words = [f"--{name}={value}" for name, value in options.items()]
        code = cli.main(["verify-serving", "--server_url", url, "--model_name_or_path", str(folder), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def verify_plain(verify):
    """As `verify`, with a server of the same options as `PlainModel`."""

    def run(folder, served=None, *, pages=VLLM, models=("tuned",), options=(), **settings):
        model = PlainModel(served or folder, **settings)
        with scripted_server(model.answer, pages=pages, models=models) as url:
            return verify(url, folder, **dict(options))

    return run


def table_of(printed: str) -> list[list[str]]:
    """The cells of the table's rows, without its heading."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("row  "))
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 :] if "row " in line
    ]


def test_a_server_of_plain_transformers_is_equal_as_far_as_it_tells(verify, models, rows):
    folder = models["llava15"]
    with transformers_server(folder) as url:
        code, printed, error = verify(url, folder)
        assert code == 0, error
        cells = table_of(printed)
        assert [row[:2] for row in cells] == [["built-in, row 0", "0"], ["built-in, row 1", "1"]]
        assert all(row[4:] == ["the same", "not given"] for row in cells)
        assert "Done: on these rows the server has the same number of prompt tokens and the same answers" in printed
        code, printed, error = verify(url, folder, data_path=rows, rows=2)
        assert code == 0, error
        assert [row[0].split("/")[-1] for row in table_of(printed)][:2] == ["rows.jsonl, row 0", "rows.jsonl, row 1"]
        assert [row[1] for row in table_of(printed)] == ["1", "1", "0"]


@pytest.mark.parametrize("layout", ["granite_vision", "llava_next_vicuna", "llava16_mistral", "mllama"])
def test_an_equal_server_is_equal_in_ids_and_log_probabilities(verify_plain, models, layout):
    code, printed, error = verify_plain(models[layout], first_token=layout != "mllama")  # its template begins with it
    assert code == 0, error
    assert "the same prompt tokens and the same answers as training, with log probabilities within 0.002." in printed
    for row in table_of(printed):
        here, there = row[2].removesuffix(" tokens").split(" / ")
        assert here == there
        assert row[4] == "the same"
        assert float(row[5].removeprefix("differ by ")) < 1e-4


@pytest.mark.parametrize("tells", ["ids logprobs", ""])
def test_a_missing_or_doubled_first_token(verify_plain, models, tells):
    folder = models["llava15"]
    code, _, error = verify_plain(folder, first_token=False, tells=tells)
    assert code == 1
    assert "the server's prompts lack the first token <s>. Send " in error
    assert '{"add_special_tokens": true} with every request' in error
    code, _, error = verify_plain(
        folder, first_token=False, tells=tells, options={"request_options": '{"add_special_tokens": true}'}
    )
    assert code == 0, error
    code, _, error = verify_plain(folder, template="{{ '<s>' }}" + VICUNA_TEMPLATE, tells=tells)
    assert code == 1
    assert "the server's prompts begin with <s> twice" in error


def test_another_chat_template(verify_plain, models):
    template = VICUNA_TEMPLATE.replace("ASSISTANT:", "Assistant:")
    code, printed, error = verify_plain(models["llava15"], template=template)
    assert code == 1
    assert "the prompt of built-in, row 0 has " in error
    assert "ASSISTANT:" in error.partition(" in training and ")[0]
    assert "Assistant:" in error.partition(" in training and ")[2]
    assert "another chat template" in error
    assert "--chat-template" in error
    assert table_of(printed)[0][2].endswith("differ")
    code, _, error = verify_plain(models["llava15"], template=template, pages={})
    assert code == 1
    assert " tokens in training and " in error
    assert "another chat template" in error


def test_another_size_of_pictures(verify_plain, models, tmp_path):
    folder = models["llava15"]
    code, _, error = verify_plain(folder, size=48)  # cropped to as many patches: only the pixels differ
    assert code == 1
    assert "rows without pictures agree, but those with pictures do not: log probabilities differ" in error
    assert "resizes or normalises pictures in another way" in error
    other = save_layout("granite_vision", tmp_path / "other")
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["image_grid_pinpoints"] = [[32, 32]]
    (other / "processor_config.json").write_text(json.dumps(settings))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"image_grid_pinpoints": [[32, 32]]}))
    code, _, error = verify_plain(models["granite_vision"], other)
    assert code == 1
    assert "built-in, row 1, which has pictures, has " in error
    assert "picture tokens in training and " in error
    code, _, error = verify_plain(models["granite_vision"], other, pages={})
    assert code == 1
    assert "built-in, row 1, which has pictures, has " in error


def test_another_precision(verify_plain, models):
    code, _, error = verify_plain(models["llava15"], dtype=torch.bfloat16)
    assert code == 1
    assert "all prompts agree, but log probabilities differ by up to 0.0" in error
    assert "as in another precision. The weights here are in float32. Serve with --dtype float32" in error
    code, _, error = verify_plain(models["llava15"], dtype=torch.bfloat16, options={"dtype": "bfloat16"})
    assert code == 0, error


def test_an_answer_that_does_not_end(verify_plain, models, tmp_path):
    here, served = save_layout("llava15", tmp_path / "here"), models["llava15"]
    settings = json.loads((here / "generation_config.json").read_text())
    third = first_tokens(served)[2]
    (here / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, third]}))
    code, _, error = verify_plain(here, served)
    assert code == 1
    assert "all tokens agree, but the answer to built-in, row 0 ends elsewhere" in error
    assert "generation_config.json" in error


def first_tokens(folder):
    """The tokens that a model answers the first built-in question with."""
    body = {
        "messages": verify_serving.built_in_rows()[0].columns["messages"],
        "max_tokens": 3,
        "return_token_ids": True,
    }
    _, made = PlainModel(folder).answer(body)
    return made["choices"][0]["token_ids"]


def test_other_weights(verify_plain, models, tmp_path):
    folder = tmp_path / "other"
    build_model("llava15", seed=1).save_pretrained(folder)
    build_processor("llava15").save_pretrained(folder)
    for tells, words in (("ids logprobs", "log probabilities differ by up to"), ("", "the greedy answers differ")):
        code, _, error = verify_plain(models["llava15"], folder, tells=tells)
        assert code == 1
        assert f"all prompts agree, but {words}" in error
        assert f"Does the server have the weights of {models['llava15']}" in error


def test_an_adapter_that_the_server_uses_or_ignores(verify_plain, models, adapter):
    base, template = models["llava15"], (adapter / "chat_template.jinja").read_text()
    code, printed, error = verify_plain(adapter, base, adapter=adapter, template=template)
    assert code == 0, error
    assert len(table_of(printed)) == 4  # two of them with several turns
    assert "Warning: The adapter" not in printed
    code, _, error = verify_plain(adapter, base, template=template)
    assert code == 1
    assert "the adapter has no effect on the server: tuned answers as the base model alone. Serve it with" in error
    code, _, error = verify_plain(adapter, base, template=template, models=("base", "tuned"), options={"model": "base"})
    assert code == 1
    assert "base answers as the base model alone. Name the adapter with --model: the server lists tuned." in error


def test_the_bases_template_in_place_of_the_adapters(verify_plain, models, adapter):
    """Training ended earlier answers. The base's template, which a server takes by default, does not."""
    code, _, error = verify_plain(adapter, models["llava15"], adapter=adapter)
    assert code == 1
    assert "</s>  USER: Name' in training and " in error
    assert f"Serve that of {adapter} (--chat-template)" in error


def test_an_adapter_that_changes_nothing_is_named_before_any_request(verify, adapter, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in adapter.iterdir():
        if file.is_file() and not file.name.startswith("."):
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(weight) if ".lora_B" in name else weight for name, weight in weights.items()}
    save_file(zero, folder / "adapter_model.safetensors")
    code, _, error = verify("http://127.0.0.1:9/v1", folder)
    assert code == 1
    assert f"{folder}: the adapter changes nothing: every lora_B in it is 0." in error
    save_file(
        {k: v * 0 for k, v in weights.items()} | {k: v for k, v in weights.items() if ".lora_B" in k},
        folder / "adapter_model.safetensors",
    )
    with scripted_server(lambda body: pytest.fail("the server is asked")) as url:
        code, _, error = verify(url, folder)
    assert code == 1
    assert "the adapter changes nothing: base and adapter give the same log probabilities." in error


def test_a_gpu_without_room_and_rows_that_cannot_be_used(verify, models, rows, tmp_path, monkeypatch):
    path = rows.with_name("bad_to_verify.jsonl")
    path.write_text(rows.read_text().splitlines()[0].replace("0.png", "none.png") + "\n")
    with scripted_server(PlainModel(models["llava15"]).answer) as url:
        code, _, error = verify(url, models["llava15"], data_path=path)
        assert code == 1
        assert "row 0, field 'images', image 0" in error
        code, printed, error = verify(url, models["llava15"], data_path=path, on_bad_row="skip")
        assert code == 0, error
        assert len(table_of(printed)) == 2

        def fail(*_, **__):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr(verify_serving, "load_answering", fail)
        code, _, error = verify(url, models["llava15"])
    assert code == 1
    assert "Is the server on the same GPU? Compare on the CPU: start the command with CUDA_VISIBLE_DEVICES=" in error


def test_a_weak_adapter_is_not_called_equal_without_a_warning(verify_plain, models, adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    folder = tmp_path / "weak"
    folder.mkdir()
    for file in adapter.iterdir():
        if file.is_file() and not file.name.startswith("."):
            (folder / file.name).write_bytes(file.read_bytes())
    weak = {name: weight * 1e-4 if ".lora_B" in name else weight for name, weight in weights.items()}
    save_file(weak, folder / "adapter_model.safetensors")
    code, printed, error = verify_plain(
        folder, models["llava15"], template=(adapter / "chat_template.jinja").read_text()
    )
    assert code == 0, error
    assert "Warning: The adapter changes these answers too little" in printed


def test_a_server_of_llama_cpp_and_one_that_refuses_log_probabilities(verify, models):
    """What a server does not take is left out, and the rest is compared."""
    folder = models["llava15"]
    model = PlainModel(folder)

    def answer(body):
        if "logprobs" in body:
            return 400, {"error": {"message": "logprobs are not supported"}}
        if "content" in body:
            return 200, {"tokens": model.processor.tokenizer(body["content"])["input_ids"]}
        if "max_tokens" not in body:
            return 200, {"prompt": model.render(body)[0]}
        return model.answer(body)

    with scripted_server(answer, pages={"/props": {"default_generation_settings": {}}}) as url:
        code, printed, error = verify(url, folder)
    assert code == 0, error
    assert "(llama.cpp)" in printed
    cells = table_of(printed)
    assert [row[2].endswith("tokens") for row in cells] == [True, False]
    assert all(row[5] == "not given" for row in cells)
