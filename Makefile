# banger: `make up` brings a real VM, `make test` shows that everything works.

GO      ?= scripts/go
TOOL     = $(GO) tool -modfile=tools/go.mod
PREFIX  ?= /usr/local
DESTDIR ?=
export PREFIX DESTDIR

VERSION := $(shell cat VERSION)
# The stamp tells two builds apart, also those of uncommitted work: client, daemon and agent compare it.
STAMP   := $(shell git ls-files -co --exclude-standard '*.go' '*.sql' go.mod go.sum | LC_ALL=C sort | xargs cat 2>/dev/null | sha256sum | cut -c1-12)
LDFLAGS  = -s -w -X banger/internal/build.Version=$(VERSION) -X banger/internal/build.Stamp=$(STAMP)
BUILD    = CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'
BINARIES = banger bangerd banger-agent banger-nethelper

.DEFAULT_GOAL := help
.PHONY: help up image-dev deps build test test-short check fmt fmt-check vet lint generate generate-diff arch bench install uninstall deb runtime-bundle runtime-fetch clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

up: deps build ## from a fresh clone to a running VM you work in
	@scripts/up

deps: ## install what the host lacks
	@scripts/host-deps

build: ## the four programs, in bin/
	@mkdir -p bin
	@for b in $(BINARIES); do $(BUILD) -o bin/$$b ./cmd/$$b || exit 1; done
	@scripts/grant bin/banger-nethelper

test: deps build ## unit, integration and end-to-end tests, with real VMs booted
	@scripts/test

test-short: ## what needs no VM; seconds
	$(GO) test -short ./...

image-dev: build ## the development image, from the recipe images/dev, and its tests; long without KVM
	bin/banger setup --image dev
	bin/banger image test dev

check: fmt-check vet lint generate-diff arch ## format, vet, lint, generated code, floor plan

fmt: ## format all Go files
	$(TOOL) gofumpt -w $$(git ls-files '*.go' | grep -vE '\.(pb|connect)\.go$$')

fmt-check:
	@bad=$$($(TOOL) gofumpt -l $$(git ls-files '*.go' | grep -vE '\.(pb|connect)\.go$$')); \
	 if [ -n "$$bad" ]; then echo "not formatted (make fmt):"; echo "$$bad"; exit 1; fi

vet:
	$(GO) vet ./...
	GOARCH=arm64 $(GO) vet ./...

lint:
	$(TOOL) staticcheck ./...
	$(TOOL) buf lint

generate: ## code from the .proto files
	$(TOOL) buf generate

generate-diff:
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && $(TOOL) buf generate -o "$$tmp" && \
	 for f in $$(git ls-files 'api/*.go'); do cmp "$$f" "$$tmp/$$f" || { echo "generated code is stale: make generate"; exit 1; }; done

arch:
	$(GO) test ./internal/arch

bench: build ## speed and size against a stock boot in the same run; writes docs/benchmarks.md
	@$(BUILD) -o bin/banger-bench ./cmd/banger-bench
	@$(BUILD) -o bin/banger-fake-firecracker ./internal/vmm/firecracker/fakefc/firecracker
	@scripts/bench

# Under sudo what was built is installed: root would build it anew, with a stamp of its own.
install: $(if $(and $(SUDO_UID),$(wildcard bin/banger-nethelper)),,build) ## programs, unit and completion to PREFIX; the network helper's capabilities
	@scripts/install

uninstall: ## take away what install put to PREFIX
	@scripts/install remove

deb: build ## a Debian package, in dist/
	@scripts/deb

runtime-bundle: build ## pack your kernel, image and Firecracker into dist/, with the manifest to fetch them by
	@bin/banger runtime package

runtime-fetch: build ## put the bundle that dist/runtime-bundle.toml lists into ./runtime; none is published
	@bin/banger runtime fetch --manifest dist/runtime-bundle.toml

clean:
	rm -rf bin
