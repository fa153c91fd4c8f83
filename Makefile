# Two commands do everything: `make demo` and `make test`. Both install first.

PYTHON ?= python3
PROCESSES ?= 2
SERVING = serving and not slow
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-slow serving test-serving test-all lint docs clean

install: .venv/installed

# The stamp file makes this quick when nothing changed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	touch $@

demo: install
	$(BIN)/vlm-tuning demo

# A file's tests stay together, and files in their order: the long ones come first.
test: install
	$(BIN)/python -m pytest -m "not slow and not serving" --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

# Minutes more: the rest of the architectures, then twenty random kills, processes that hang. It ends at the first
# failure, which is printed then.
test-slow: install
	$(BIN)/python -m pytest tests/architectures -m slow --exitfirst --numprocesses $(PROCESSES)
	$(BIN)/python -m pytest --ignore tests/architectures -m "slow and not serving" --exitfirst

# vLLM in an environment of its own, for processors with AVX2. On a GPU, install vLLM as its own pages say.
serving: .vllm/ready

.vllm/ready:
	PYTHON=$(PYTHON) bash tests/serving/setup.sh vllm .vllm

test-serving: install
	@if grep -q avx2 /proc/cpuinfo; then $(MAKE) serving && $(BIN)/python -m pytest -m "$(SERVING)"; \
	else echo "The tests of serving were left out: vLLM for CPUs needs a processor with AVX2."; fi

test-all: SERVING = serving
test-all: test test-slow test-serving

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/options.md is made from the options, the tables of docs/plan-a-large-run.md from benchmarks/results/.
docs: install
	$(BIN)/python docs/generate_options.py
	$(BIN)/python docs/generate_plan.py

clean:
	rm -rf .venv .cuda_stand_in .deepspeed demo_output .pytest_cache .mypy_cache .ruff_cache
	rm -rf .transformers4 .vllm .llama_cpp .llm_compressor .mlx .lmms_eval
