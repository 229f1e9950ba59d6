# `make serve` tries it, `make test` proves it. Both need a C compiler and Python's headers and venv
# (Debian: apt-get install gcc python3-dev python3-venv); the tests that boot guests need more, and say
# in one line what.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CYTHON := _fds _wire _memory _spin _bell _core
SOURCES := pyproject.toml setup.py $(wildcard src/ivshmem/*.* src/ivshmem/*/*.py systemd/*/*)

.PHONY: help serve test check lint sanitize fuzz fuzz-sanitized bench bench-roundtrips cython clean

help:
	@echo "make serve   build, install into $(VENV), and run a server (ARGS='--vectors 4 ...')"
	@echo "make test    lint and run all tests, real guests included"
	@echo "make check   the same as CI: what cannot run is a failure"
	@echo "make sanitize   run the tests of the C code with it built for AddressSanitizer and UBSan"
	@echo "make fuzz    a million hostile inputs (COUNT=1000000 SEED=1 TARGET=all); the one input of a"
	@echo "             finding: TARGET=client REPLAY=build/fuzz/client-1. make fuzz-sanitized: the same"
	@echo "             with the C code built for AddressSanitizer and UBSan"
	@echo "make bench   measure; bench/README.md says what the figures mean. It does these in turn:"
	@echo "    make bench ARGS='-k call'                     those under pytest-benchmark (-k guest, ...)"
	@echo "    make bench-roundtrips ARGS='--pinning two'    round trips, beside C and other libraries"
	@echo "make cython  generate the C files in src/ivshmem from those in Cython afresh"
	@echo "make clean   remove what these made"

serve: $(VENV)/installed
	@$(BIN)/python -m ivshmem serve $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

check:
	CI=true $(MAKE) test

lint: $(VENV)/tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/cython-lint src/ivshmem/*.pyx src/ivshmem/*.pxd
	$(BIN)/codespell src tests bench README.md ARCHITECTURE.md CHANGELOG.md CONTRIBUTING.md SECURITY.md
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest $(CYTHON:%=ivshmem.%) --allowlist tests/typing/stubtest.allow --ignore-unused-allowlist
	@for name in $(CYTHON); do \
	    (cd src && ../$(BIN)/cython -3 ivshmem/$$name.pyx -o ../build/fresh.c) && \
	    cmp build/fresh.c src/ivshmem/$$name.c || { echo "$$name.c is stale: make cython"; exit 1; }; \
	done

# With ARGS, which pytest is given, only its part.
bench: $(VENV)/measured
	$(BIN)/python -m pytest bench --benchmark-only $(or $(ARGS),-k 'not guest')
	$(if $(ARGS),,@$(MAKE) bench-roundtrips)

bench-roundtrips: $(VENV)/measured
	$(BIN)/python -m bench.roundtrips $(or $(ARGS),--json build/roundtrips.json --picture build/latency.svg)

# The C code under AddressSanitizer and UndefinedBehaviorSanitizer. Left out are tests that hardly touch it,
# and take long then: command lines, the doctor, packaging, benchmarks, what is Python alone; and those that
# do the same as others with thousands of peers or for seconds. Leaks are not looked for by the
# sanitizer, to which CPython's own look the same; the tests look for descriptors and mappings themselves.
SANITIZED := fuzz/test_fuzz $(addprefix unit/test_,core_* directory events guest_pci guest_uio guest_vfio) \
    $(addprefix integration/test_,access aio broker directory each_call_fails embedding foreign_servers \
    hostile lifecycle memory region region_shortage server_client service shortages sockets succession threads)
SANITIZE := -fsanitize=address,undefined
RUNTIME = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libubsan.so)

# To files, since pytest takes what goes to stderr, and what it holds is lost when the process aborts.
REPORTS := build/reports
WATCHED = LD_PRELOAD="$(RUNTIME)" PYTHONMALLOC=malloc \
    UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/$(REPORTS)/ubsan \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_sigbus=0:log_path=$(CURDIR)/$(REPORTS)/asan
# A report fails also if a test did not notice what became of a process that it started.
REPORTED = cat $(REPORTS)/* 2>/dev/null | grep -A 100 'ERROR: \|runtime error: '

sanitize: $(VENV)-sanitize/installed
	@rm -rf $(REPORTS) && mkdir -p $(REPORTS)
	$(WATCHED) $(VENV)-sanitize/bin/python -m pytest \
	    $(or $(ARGS),$(wildcard $(SANITIZED:%=tests/%.py))) || \
	    { $(REPORTED); exit 1; }
	@! $(REPORTED)

COUNT ?= 1000000
SEED ?= 1
TARGET ?= all
FUZZ = -m fuzz --count $(COUNT) --seed $(SEED) --target $(TARGET) $(REPLAY:%=--replay %)

fuzz: $(VENV)/tested
	PYTHONPATH=tests $(BIN)/python $(FUZZ)

fuzz-sanitized: $(VENV)-sanitize/installed
	@rm -rf $(REPORTS) && mkdir -p $(REPORTS)
	$(WATCHED) PYTHONPATH=tests $(VENV)-sanitize/bin/python $(FUZZ) || { $(REPORTED); exit 1; }
	@! $(REPORTED)

$(VENV)-sanitize/installed: $(SOURCES) | $(VENV)
	$(PYTHON) -m venv $(VENV)-sanitize
	@echo "building with $(SANITIZE) ..."
	@rm -rf build/sanitize && mkdir -p build/sanitize  # a copy: objects of both kinds must not mix
	@cp -r pyproject.toml setup.py README.md LICENSE src systemd build/sanitize
	@CFLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g" \
	    LDFLAGS="$(SANITIZE)" $(VENV)-sanitize/bin/python -m pip install --quiet --no-cache-dir \
	    --force-reinstall "build/sanitize[test]"
	@touch $@

cython: $(VENV)/tested
	cd src && for name in $(CYTHON); do ../$(BIN)/cython -3 ivshmem/$$name.pyx -o ivshmem/$$name.c; done

# What is run and tested is the wheel, installed, never the checkout.
$(VENV)/installed: $(SOURCES) | $(VENV)
	@echo "building and installing into $(VENV) ..."
	@rm -rf build/wheel
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@$(BIN)/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	@touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install --quiet "$$(echo build/wheel/*.whl)[test]"
	@touch $@

$(VENV)/measured: $(VENV)/tested
	$(BIN)/python -m pip install --quiet "$$(echo build/wheel/*.whl)[bench]"
	@touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "venv is missing; on Debian: apt-get install python3-venv"; exit 1; }

clean:
	rm -rf $(VENV) $(VENV)-sanitize build dist .mypy_cache .ruff_cache .hypothesis .benchmarks src/*.egg-info
