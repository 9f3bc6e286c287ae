# What a person types: make quickstart, then make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Each file of tests runs in one of two processes, the longest first.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
# Without its compiled files, each start of Python would compile TensorFlow's sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-fast test-system test-engines test-engine-faults test-cloud test-browser test-diffusers bench-overhead audit lint house docs clean

quickstart: $(BIN)/vqbeam
	$(BIN)/vqbeam run glyphs --run-dir runs/glyphs
	cp runs/glyphs/samples/samples.png samples.png

# Most of the time goes to compiling small programs; these settings save a tenth of it on TensorFlow,
# and a third on JAX. The other targets do without them, as users do.
TF_TESTS := TF_ENABLE_ONEDNN_OPTS=0
JAX_TESTS := KERAS_BACKEND=jax JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
test: $(VENV)/.test-installed lint
	$(TF_TESTS) $(PYTEST) -m "not system and not engines and not cloud"
	$(JAX_TESTS) $(PYTEST) -m "backend and not system"

test-fast: $(VENV)/.test-installed
	$(TF_TESTS) $(PYTEST) -m "not slow and not system and not engines and not cloud"

# Whole programs: killed and started again, on a full disk, on two devices, with every preset.
test-system: $(VENV)/.test-installed
	$(PYTEST) -m system

# Beam's other engines, each on this machine; takes Java, and Maven to fetch them.
test-engines: $(VENV)/.test-installed $(VENV)/engines/flink $(VENV)/engines/spark
	$(BIN)/python -m pytest -q tests/test_engines.py

# Workers killed on those engines.
test-engine-faults: $(VENV)/.test-installed $(VENV)/engines/flink
	$(BIN)/python -m pytest -q tests/test_engine_faults.py

# gs:// paths, and the job that Dataflow is given, on stand-ins for Google's services.
test-cloud: $(VENV)/.cloud-installed
	$(BIN)/python -m pytest -q tests/test_cloud.py tests/test_dataflow.py

$(VENV)/engines/%: tests/engines/%.xml
	mvn -q -B -f $< dependency:copy-dependencies -DoutputDirectory=$(abspath $@.part)
	rm -rf $@ && mv $@.part $@ && touch $@

# The pages of `vqbeam report` and `vqbeam studio` in Chromium; takes the Debian package chromium.
test-browser: $(VENV)/.browser-installed
	$(BIN)/python -m pytest -q tests/test_studio.py tests/test_report_browser.py tests/test_studio_browser.py

# The exported weights in diffusers, which has an environment of its own.
test-diffusers: $(VENV)/.test-installed $(VENV)/diffusers/.installed
	DIFFUSERS_PYTHON=$(abspath $(VENV)/diffusers/bin/python) $(BIN)/python -m pytest -q tests/test_weights.py

$(VENV)/diffusers/.installed:
	$(PYTHON) -m venv $(VENV)/diffusers
	$(VENV)/diffusers/bin/python -m pip install -q torch diffusers safetensors
	touch $@

# What the host adds to a training step, on each backend.
bench-overhead: $(VENV)/.test-installed
	$(BIN)/python benchmarks/overhead.py --backend jax
	$(BIN)/python benchmarks/overhead.py --backend tensorflow

# Asks PyPI for known weaknesses of the pinned versions.
audit: $(VENV)/.test-installed
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/python -m pip_audit --strict --no-deps -r constraints.txt

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/house.py --check > /dev/null

# How large the product is, and where it is too large.
house:
	$(PYTHON) tests/house.py

# The documentation as a site in site/; a broken link or any other warning ends it.
docs: $(VENV)/.docs-installed
	$(BIN)/python -m sphinx -q --fail-on-warning --keep-going -d $(VENV)/doctrees docs site

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info samples.png site jupyter_execute

# Every recipe installs with constraints.txt, so that versions do not depend on their order.
$(BIN)/vqbeam: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .
	touch $@

$(VENV)/.docs-installed: $(BIN)/vqbeam
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .[docs]
	touch $@

$(VENV)/.cloud-installed: $(VENV)/.test-installed
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .[test-cloud]
	touch $@

$(VENV)/.browser-installed: $(VENV)/.test-installed
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .[studio,test-browser]
	touch $@

$(VENV)/.test-installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .[test]
	touch $@
