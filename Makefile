# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
PY = .venv/bin/python

demo: .venv/ready
	$(PY) distill.py --out out/demo --teacher out/demo-teacher --overwrite
	$(PY) sample.py --ckpt out/demo --prompt "The " --max_tokens 300 --seed 1

test: .venv/ready-test
	$(PY) -m pytest

# Larger budget, 3 seeds, and for the first seed the controls. Up to an hour on 2 cores.
results: .venv/ready
	for seed in 0 1 2; do \
	  $(PY) distill.py config/results.toml --out out/results-$$seed --seed $$seed --resume $$([ $$seed = 0 ] && echo --controls) || exit 1; \
	  cp out/results-$$seed/report.json docs/results/seed$$seed.json; \
	done
	$(PY) evaluate.py --collect docs/results

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[plot]'
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) -e '.[plot,test]'
	touch $@

.PHONY: demo test results
