# `make demo` and `make test` are all that a newcomer needs; both set up .venv first.
PYTHON ?= python3
DEMO := work_dirs/demo
CONFIG := configs/edaformer_t_synthetic.py


.PHONY: demo test soak test-fork test-isr test-kernels test-gpu bench-gpu lint lint-js env clean

demo: .venv/ready
	@.venv/bin/python tools/prepare_data.py synthetic
	@.venv/bin/python tools/train.py $(CONFIG) --work-dir $(DEMO)
	@.venv/bin/python tools/compare_isr.py $(CONFIG) $(DEMO)/iter_500.pth \
		--isr-ratio none optimal 2 auto --large 2 --picture $(DEMO)/demo.png

# The runtimes of the export keep threads, and a process with such must not fork, as tests do.
test: .venv/libraries
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --durations 20 --ignore tests/export
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile -p no:logging tests/export

# Kills, fuzzers, memory: what takes minutes.
soak: .venv/ready
	OMP_NUM_THREADS=1 OPENCV_LOG_LEVEL=OFF .venv/bin/python -m pytest -q -s -m soak

# The tests that meet the packages in which the stacks differ; FORK_TESTS=tests runs all.
FORK_TESTS := $(addprefix tests/, test_compat.py test_configs.py test_safe_defaults.py \
	data/test_transforms.py data/test_bad_files.py data/test_preprocessor.py \
	engine/test_amp.py engine/test_checkpoint_hook.py engine/test_checkpoint_loading.py \
	engine/test_isr_hook.py engine/test_nonfinite.py engine/test_resume.py \
	isr/test_mmseg.py models/test_segmentor.py predict/test_segmenter.py predict/test_run.py \
	pretraining/test_pretraining.py analysis/test_report.py tools/test_tools.py) \
	--deselect tests/tools/test_tools.py::test_compiled

test-fork: .venv-fork/ready
	OMP_NUM_THREADS=1 .venv-fork/bin/python -m pytest -q -n 2 $(FORK_TESTS)

# What `pip install mmseg_edaformer` brings is enough for ISR on a model of timm.
test-isr: .venv-isr/ready
	.venv-isr/bin/python -m tests.isr_alone

# The GPU kernels without a GPU: Triton interprets them.
test-kernels: .venv/ready .venv-triton/ready
	PYTHONPATH=.venv-triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		.venv/bin/python -m pytest -q -n 2 tests/models/test_triton_kernels.py

# On a GPU, also on a machine without pip and network: SITE=folder of wheels, or of what they hold.
# FAKE_CUDA=1: the CPU passes for a GPU, which finds what is not for timing.
GPU_PYTHON ?= $(if $(SITE),$(PYTHON),$(if $(wildcard .venv/ready),.venv/bin/python,$(PYTHON)))
GPU_PATH = PYTHONPATH=.$(if $(SITE),:$(if $(wildcard $(SITE)/*.whl),.site,$(SITE))):$$PYTHONPATH

test-gpu: $(if $(wildcard $(SITE)/*.whl),.site/ready)
	@$(GPU_PATH) $(GPU_PYTHON) -m tests.gpu $(if $(FAKE_CUDA),--fake-cuda) $(ARGS)

bench-gpu: $(if $(wildcard $(SITE)/*.whl),.site/ready)
	@$(GPU_PATH) $(GPU_PYTHON) $(if $(FAKE_CUDA),-m tests.fake_cuda) tools/benchmark_gpu.py \
		$(if $(FAKE_CUDA),--size 64 96 --batch-size 1 2 --repeats 1 --steps 6 --gemm 512 --out work_dirs/fake) $(ARGS)

.site/ready: $(wildcard $(SITE)/*.whl)
	@rm -rf .site && mkdir .site
	@for wheel in $^; do $(PYTHON) -m zipfile -e $$wheel .site || exit; done
	@touch $@

lint: .venv/ready $(if $(shell command -v npm),lint-js)
	.venv/bin/ruff check .
	.venv/bin/mypy

# The types of the page's JavaScript.
lint-js: node_modules
	npm run --silent lint

node_modules: package-lock.json
	npm ci --silent
	touch $@

env: .venv/ready

# torch first: nothing that comes after it may pull another build.
.venv/ready: requirements/lock.txt setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q $$(grep ^torch== $<)
	.venv/bin/python -m pip install -q -r $<
	.venv/bin/python -m pip install -q --no-deps -e .
	touch $@

# The libraries whose models ISR reduces, and those of the demo and of a cluster.
.venv/libraries: .venv/ready requirements/lock-libraries.txt
	.venv/bin/python -m pip install -q --no-deps -r requirements/lock-libraries.txt
	touch $@

.venv-isr/ready: requirements/lock.txt requirements/lock-libraries.txt setup.py
	$(PYTHON) -m venv .venv-isr
	.venv-isr/bin/python -m pip install -q $$(grep ^torch== $<)
	.venv-isr/bin/python -m pip install -q -e .
	.venv-isr/bin/python -m pip install -q --no-deps $$(cat $< requirements/lock-libraries.txt | grep -E \
		'^(timm|torchvision|pillow|PyYAML|safetensors|huggingface_hub|numpy|tqdm|packaging|requests|httpx|httpcore|anyio|idna|certifi|h11|sniffio|hf-xet)==' | sort -u)
	touch $@

.venv-triton/ready: .venv/ready
	.venv/bin/python -m pip install -q --no-deps --target .venv-triton triton==3.6.0
	touch $@

.venv-fork/ready: requirements/lock-fork.txt setup.py
	$(PYTHON) -m venv .venv-fork
	.venv-fork/bin/python -m pip install -q $$(grep ^torch== $<)
	.venv-fork/bin/python -m pip install -q -r $<
	.venv-fork/bin/python -m pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-fork .venv-isr .venv-triton .site node_modules work_dirs
