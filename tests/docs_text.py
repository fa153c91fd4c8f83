"""What the documentation says: its pages, sentences, links and commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *PROSE,
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("examples/*/README.md")),
]
FENCE = re.compile(r"^```.*?^```\n?", flags=re.MULTILINE | re.DOTALL)

# The beginning of a command → why tests/end_to_end/test_docs_commands.py does not run it.
NOT_RUN = {
    "vllm serve": "vLLM needs an environment of its own",
    "ssh ": "there is no other machine",
    "sbatch ": "there is no Slurm",
    "kubectl ": "there is no Kubernetes",
    "make ": "it installs; tests/end_to_end/test_readme.py and this suite run what it starts",
    ".venv/bin/python -m pytest": "it is this suite",
    "python benchmarks/": "tests/end_to_end/test_benchmarks.py and test_readme.py run each at its smallest",
    "python tuning/sft_trainer.py": "tests/end_to_end/test_readme.py runs it",
    "accelerate launch --num_processes=2 --config_file fixtures/accelerate_fsdp_defaults.yaml": "test_readme.py does",
    "pip download --no-binary llama-cpp-python": "tests/serving/setup.sh does",
    "tar --extract --file llama_cpp_python": "tests/serving/setup.sh does",
    "ln --symbolic llama_cpp_python": "tests/serving/setup.sh moves it",
    "python llama.cpp/convert_hf_to_gguf.py": "tests/serving/test_llama_cpp.py does, for tiny models",
    "llama-": "it is no Python package",
    "ollama ": "it is no Python package",
    "pip install llmcompressor": "tests/serving/setup.sh installs it into a folder",
    "pip install mlx-vlm": "tests/serving/setup.sh installs it into a folder",
    "python -m mlx_vlm convert": "tests/serving/test_quantised_exports.py does, in float32",
    "python -c": "it loads the model of the reader",
    "pip install lmms-eval": "tests/serving/setup.sh installs it into a folder",
    "python -m lmms_eval": "tests/serving/test_lmms_eval.py does, on a CPU",
    "pip install deepspeed": "tests/distributed/test_deepspeed.py installs it into a folder",
    "accelerate launch --num_processes=8 --config_file fixtures/accelerate_deepspeed_zero3.yaml": "it needs 8 GPUs",
    "vlm-tuning train config.json --torch_compile": "it compiles; tests/end_to_end/test_compiled_runs.py does the same",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The shell commands of a page, without comments."""
    lines = (line.split("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def why_not_run(command: str) -> str:
    """Why a command is not run by test_docs_commands.py; "" if it is."""
    return next((why for beginning, why in NOT_RUN.items() if command.startswith(beginning)), "")


def sentences(page: Path) -> list[str]:
    """The sentences of a page without code, tables, headings and pictures. Code within a line becomes one word."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", page.read_text(encoding="utf-8")), flags=re.DOTALL)
    lines = ["" if line.lstrip().startswith(("|", "#", "![")) else line for line in text.splitlines()]
    text = "\n".join(re.sub(r"^\s*(-|\d+\.) ", "\n", line) for line in lines)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        plain = re.sub(r"`+[^`]*`+", "code", " ".join(paragraph.split()))
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain).replace("*", "")
        found += [sentence for sentence in re.split(r"(?<=[.!?])\s+", plain) if len(sentence.split()) > 2]
    return found


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The relative links and pictures of a page."""
    text = re.sub(r"`+[^`]*`+", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
