"""llama.cpp's converter takes merged models, and llama.cpp computes of them what the library does."""

import base64
import io
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from serving.conftest import make_environment, run_in
from serving.merging import ADAPTED, merge
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = pytest.mark.slow

MARKER = "<__media__>"
TEXT = "What is in the picture? Yes."
CONVERTED = {  # a base of published.py → the class of its language model, if the converter has none of the whole model
    "llava15": "",
    "granite_vision": "GraniteForCausalLM",
    "llava16_mistral": "MistralForCausalLM",
    "qwen2_5_vl": "",
    "gemma3": "",
    "smolvlm": "LlamaForCausalLM",
}
ALLOWED = {"gemma3": 5e-3, "qwen2_5_vl": 1e-2}
"""The largest difference of log probabilities where it is more than 2e-5.

ggml looks GELU up in a table of float16. llama.cpp reads no `rms_norm_eps` of Qwen2-VL and Qwen2.5-VL: it adds 0.
"""
PICTURES = {  # size of a picture, its prompt for transformers, and for llama.cpp
    "qwen2_5_vl": (
        (196, 84),
        "<|im_start|>user<|vision_start|><|image_pad|><|vision_end|>What",
        f"<|im_start|>user{MARKER}What",
    ),
    # transformers' processor puts line breaks around a picture of Gemma 3, llama.cpp does not
    "gemma3": ((32, 32), "<start_of_image>What", f"\n\n{MARKER}\n\nWhat"),
}


@dataclass(frozen=True)
class LlamaCpp:
    """`source`: of llama.cpp. `python`: has llama.cpp. `converter`: the Python that runs the converter."""

    source: Path
    python: Path
    converter: Path

    def convert(self, model: Path, out: Path, *more: str) -> Path:
        run_in(self.converter, "convert_tiny.py", self.source, model, out, *more)
        return out

    def read(self, gguf: Path) -> dict:
        return run_in(self.converter, "read_gguf.py", self.source, gguf)[0]

    def ask(self, model: Path, requests: list, mmproj: Path | None = None) -> list[dict]:
        job = model.with_suffix(".json")
        job.write_text(json.dumps({"model": str(model), "mmproj": mmproj and str(mmproj), "requests": requests}))
        return run_in(self.python, "ask_llama_cpp.py", job)


@pytest.fixture(scope="session")
def llama_cpp(transformers4) -> LlamaCpp:
    python = make_environment("llama_cpp")
    return LlamaCpp(python.parents[1] / "llama.cpp", python, transformers4)


@dataclass(frozen=True)
class Model:
    name: str
    base: Path
    folder: Path
    gguf: Path

    def load(self):
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=CONVERTED)
def model(request, published, llama_cpp, tmp_path_factory) -> Model:
    """A merged model and the GGUF of its language model."""
    root = tmp_path_factory.mktemp(request.param)
    base = published / request.param
    merged = merge(base, root)
    for number, folder in enumerate((base, merged)):
        name_language_model(folder, root / f"named_{number}", CONVERTED[request.param])
    return Model(request.param, root / "named_0", merged, llama_cpp.convert(root / "named_1", root / "text.gguf"))


def name_language_model(model: Path, folder: Path, architecture: str) -> None:
    """A copy of a model whose config.json names the class of its language model, as docs/llama-cpp.md says."""
    folder.mkdir()
    for file in model.iterdir():
        os.link(file, folder / file.name)
    config = json.loads((model / "config.json").read_text())
    if architecture:
        config["text_config"]["architectures"] = [architecture]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


def log_probabilities(model, **inputs) -> torch.Tensor:
    """Of the next token, by the library's arithmetic: stock LLaVA-NeXT leaves out Granite's `logits_scaling`."""
    scale = getattr(model.config.get_text_config(), "logits_scaling", 1.0)
    with torch.no_grad():
        return (model(**inputs).logits[0, -1] / scale).log_softmax(-1)


def ask_for_probabilities(prompt, vocabulary: int, plain: int) -> tuple[str, dict]:
    """A request for those of all tokens. The token `plain` is chosen: the server shows none of half a character."""
    body = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": vocabulary,
        "logit_bias": [[plain, 100]],
        "cache_prompt": False,
    }
    return "/completion", body


def worst_difference(answer: dict, expected: torch.Tensor) -> float:
    (seen,) = answer["completion_probabilities"]
    assert len(seen["top_logprobs"]) == len(expected)
    assert seen["top_logprobs"][0]["id"] == expected.argmax()
    return max(abs(entry["logprob"] - expected[entry["id"]].item()) for entry in seen["top_logprobs"])


def plain_token(tokenizer) -> int:
    return next(number for number in range(len(tokenizer)) if tokenizer.decode([number]) == "A")


def test_only_what_the_adapter_changes_differs_from_the_gguf_of_the_base(model, llama_cpp, tmp_path):
    base, merged = llama_cpp.read(llama_cpp.convert(model.base, tmp_path / "base.gguf")), llama_cpp.read(model.gguf)
    changed = {name for name, digest in base["tensors"].items() if merged["tensors"][name] != digest}
    parts = {"q_proj": "attn_q.weight", "v_proj": "attn_v.weight"}
    assert parts.keys() == set(ADAPTED)
    assert changed == {name for name in base["tensors"] if name.endswith(tuple(parts.values()))}
    for fields in (base["fields"], merged["fields"]):
        del fields["general.name"]  # of the folder
    template = "tokenizer.chat_template"  # training may write one that ends answers
    assert merged["fields"].pop(template).endswith(base["fields"].pop(template))
    assert merged["fields"] == base["fields"]


def test_the_gguf_says_what_the_config_says(model, llama_cpp):
    fields = llama_cpp.read(model.gguf)["fields"]
    processor, text = AutoProcessor.from_pretrained(model.folder), model.load().config.get_text_config()
    tokenizer, architecture = processor.tokenizer, fields["general.architecture"]
    assert fields[f"{architecture}.rope.freq_base"] == 500_000
    assert fields.get(f"{architecture}.logit_scale", 1.0) == getattr(text, "logits_scaling", 1.0)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields.get("tokenizer.ggml.bos_token_id") == tokenizer.bos_token_id
    assert fields["tokenizer.chat_template"] == processor.chat_template
    for token in json.loads((model.folder / "tokenizer.json").read_text())["added_tokens"]:
        assert fields["tokenizer.ggml.tokens"][token["id"]] == token["content"]
        if model.name != "gemma3":  # its vocabulary is set by convert_tiny.py
            assert fields["tokenizer.ggml.token_type"][token["id"]] in (2, 3)  # unknown, control


def test_llama_cpp_computes_the_same_of_a_text(model, llama_cpp):
    processor, loaded = AutoProcessor.from_pretrained(model.folder), model.load()
    tokens = processor.tokenizer(TEXT)["input_ids"]
    prompts = [tokens[:1], tokens[:4], tokens, tokens + tokens]
    size, plain = loaded.config.get_text_config().vocab_size, plain_token(processor.tokenizer)
    requests = [ask_for_probabilities(prompt, size, plain) for prompt in prompts]
    question = [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]
    requests.append(("/apply-template", {"messages": question}))
    requests.append(("/tokenize", {"content": TEXT, "add_special": True, "parse_special": True}))
    *answers, rendered, tokenized = llama_cpp.ask(model.gguf, requests)
    assert tokenized["tokens"] == tokens
    template = processor.apply_chat_template(question, add_generation_prompt=True)
    adds_bos = llama_cpp.read(model.gguf)["fields"].get("tokenizer.ggml.add_bos_token", False)
    assert rendered["prompt"] == template.removeprefix(processor.tokenizer.bos_token if adds_bos else "")
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = log_probabilities(loaded, input_ids=torch.tensor([prompt]))
        assert worst_difference(answer, expected) <= ALLOWED.get(model.name, 2e-5)


def draw_pictures(size: tuple[int, int]) -> list[Image.Image]:
    """One of a single colour, and one of noise."""
    width, height = size
    noise = random.Random(0).randbytes(width * height * 3)
    return [Image.new("RGB", size, "red"), Image.frombytes("RGB", size, noise)]


def in_base64(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("model", PICTURES, indirect=True)
def test_llama_cpp_computes_the_same_of_a_picture(model, llama_cpp, monkeypatch):
    monkeypatch.setenv("LLAMA_MEDIA_MARKER", MARKER)
    mmproj = llama_cpp.convert(model.folder, model.gguf.with_name("mmproj.gguf"), "--mmproj")
    size, prompt, marked = PICTURES[model.name]
    processor, loaded = AutoProcessor.from_pretrained(model.folder), model.load()
    vocabulary, plain = loaded.config.get_text_config().vocab_size, plain_token(processor.tokenizer)
    pictures = draw_pictures(size)
    prompts = [{"prompt_string": marked, "multimodal_data": [in_base64(picture)]} for picture in pictures]
    answers = llama_cpp.ask(model.gguf, [ask_for_probabilities(one, vocabulary, plain) for one in prompts], mmproj)
    expected = []
    for picture, answer in zip(pictures, answers, strict=True):
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        assert answer["tokens_evaluated"] == inputs["input_ids"].shape[1]
        expected.append(log_probabilities(loaded, **inputs))
        assert worst_difference(answer, expected[-1]) <= ALLOWED[model.name]
    assert (expected[0] - expected[1]).abs().max() > 1  # the pictures matter
