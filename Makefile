# queuectl.py is the whole program: nothing is built, nothing is downloaded.

PYTHON ?= python3
PREFIX ?= /usr/local
BIN = $(DESTDIR)$(PREFIX)/bin
LIB = $(DESTDIR)$(PREFIX)/lib/queuectl
T =
SEED ?=
SECONDS ?=
JOBS ?=
export PYTHONDONTWRITEBYTECODE = 1

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

# A queue of its own in a new directory. `show` prints a command as one would type it and runs it;
# `until_state` watches a job. However it ends, the daemon is stopped and the directory removed.
demo: ## a job that succeeds, one that fails, is retried, dies and is brought back (in seconds)
	@set -eu; \
	python=$$($(PYTHON) -c 'import sys; print(sys.executable)'); program=$$(pwd)/queuectl.py; \
	dir=$$(mktemp -d "$${TMPDIR:-/tmp}/queuectl.XXXXXX"); \
	started=; \
	clean_up() { \
	    trap '' HUP INT PIPE TERM; trap - EXIT; set +e; \
	    for attempt in $$started; do \
	        queuectl daemon stop --grace 0s >/dev/null 2>&1 && break; \
	        sleep 1; \
	    done; \
	    cd /; rm -rf "$$dir"; \
	    exit $$1; \
	}; \
	trap 'clean_up $$?' EXIT; \
	trap 'clean_up 129' HUP; trap 'clean_up 130' INT; \
	trap 'clean_up 141' PIPE; trap 'clean_up 143' TERM; \
	DB_PATH=$$dir/demo.db; SOCKET_PATH=$$dir/demo.sock; export DB_PATH SOCKET_PATH; \
	cd "$$dir"; \
	give_up_at=$$(($$(date +%s) + 12)); \
	queuectl() { "$$python" "$$program" "$$@"; }; \
	show() { \
	    typed=; \
	    for word in "$$@"; do \
	        case $$word in *[!A-Za-z0-9./_-]*) word="'$$word'" ;; esac; \
	        typed="$$typed $$word"; \
	    done; \
	    printf '$$%s\n' "$$typed"; "$$@"; printf '\n'; \
	}; \
	until_state() { \
	    seen=; \
	    while [ "$$seen" != "$$2" ]; do \
	        state=$$(queuectl list | \
	            sed -n '/"id": "'"$$1"'",/,/"state"/s/.*"state": "\(.*\)".*/\1/p'); \
	        [ "$$state" = "$$seen" ] || printf '  # %s is %s\n' "$$1" "$$state"; \
	        seen=$$state; \
	        if [ "$$(date +%s)" -gt "$$give_up_at" ]; then \
	            printf 'demo: %s is not %s in time\n' "$$1" "$$2" >&2; exit 1; \
	        fi; \
	        sleep 0.1; \
	    done; \
	    printf '\n'; \
	}; \
	show queuectl config set max-retries 2; \
	show queuectl config set delay-base 1000; \
	started='1 2'; \
	show queuectl worker start --count 2; \
	show queuectl enqueue '{"id":"hello","command":"echo Hello World >hello.txt"}'; \
	until_state hello completed; \
	show cat hello.txt; \
	show queuectl enqueue '{"id":"report","command":"wc -l <orders.csv >report.txt"}'; \
	until_state report dead; \
	show queuectl dlq list; \
	show sh -c 'echo apples >orders.csv'; \
	show queuectl dlq retry report; \
	until_state report completed; \
	show cat report.txt; \
	show queuectl status; \
	show queuectl daemon stop; \
	started=

test: ## the tests; T=DaemonTest, or T=DaemonTest.test_name, picks some
	@set --; for name in $(T); do set -- "$$@" "test_queuectl.$$name"; done; \
	if [ $$# -gt 0 ]; then exec $(PYTHON) -m unittest "$$@"; else exec $(PYTHON) test_queuectl.py; fi

test-all: $(addprefix test-3.,6 7 8 9 10 11 12 13 14) ## the tests on every python3.6 to python3.14 of the PATH
	@for minor in 6 7 8 9 10 11 12 13 14; do \
	    python3.$$minor -c 'import sqlite3' >/dev/null 2>&1 && exit 0; \
	done; \
	echo 'test-all: no python3.6 to python3.14 on the PATH' >&2; exit 1

test-3.%:
	@python=python3.$*; path=$$(command -v $$python) || exit 0; \
	if ! $$python -c 'import sqlite3' >/dev/null 2>&1; then \
	    printf '\n== %s: %s does not run, or lacks sqlite3: skipped\n' $$python "$$path"; \
	    exit 0; \
	fi; \
	printf '\n== %s: %s\n' $$python "$$path"; \
	exec $$python test_queuectl.py

bench: ## speed and size against what is promised, in minutes; T=drain picks a row, OTHER=FILE compares
	@exec $(PYTHON) test_queuectl.py bench $(T)

stress: ## storm, then soak; SEED=7 repeats one, SECONDS=180 and JOBS=100000 set the length
	@SEED=$(SEED) SECONDS=$(SECONDS) JOBS=$(JOBS) exec $(PYTHON) test_queuectl.py stress

plug: ## power cuts, simulated on a disk image, as root; ROUNDS=10, SEED=7 repeats one
	@SEED=$(SEED) ROUNDS=$(ROUNDS) exec $(PYTHON) test_queuectl.py plug

# Python compiles a script anew at each call, a module once: so `queuectl` is a launcher, and the
# compiled form is made here, since users can't write it. -I: nothing in the environment decides
# where that lies. New files are put in place whole, so that calls go on meanwhile.
define LAUNCHER
import os, py_compile, sys
destdir, prefix = sys.argv[1:]
folder, python = prefix + "/lib/queuectl", os.path.abspath(sys.executable)
if len(python.split()) > 1 or len(os.fsencode(python)) > 125:
    sys.exit("install: %s can't stand in a #! line; name another PYTHON" % python)
py_compile.compile(destdir + folder + "/queuectl.py", dfile=folder + "/queuectl.py", doraise=True)
launcher = destdir + prefix + "/bin/queuectl"
with open(launcher + ".new", "w") as file:
    file.write("""#!%s
import sys

# As the script does itself: what lies beside it is not for import.
if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]
sys.path.insert(0, %a)

import queuectl

queuectl.run_script()
""" % (python, folder))
os.chmod(file.name, 0o755)
os.replace(file.name, launcher)
endef
export LAUNCHER

install: ## lib/queuectl/queuectl.py, compiled, and bin/queuectl, which starts it, below $(DESTDIR)$(PREFIX)
	@case "$(PREFIX)" in /*) ;; *) echo 'install: PREFIX must be an absolute path' >&2; exit 1 ;; esac
	umask 022; mkdir -p "$(BIN)" "$(LIB)"
	install -m 644 queuectl.py "$(LIB)/queuectl.py.new"
	mv -f "$(LIB)/queuectl.py.new" "$(LIB)/queuectl.py"
	@umask 022; $(PYTHON) -I -c "$$LAUNCHER" "$(DESTDIR)" "$(PREFIX)"

uninstall: ## remove what `install` brought; queues stay
	rm -f "$(BIN)/queuectl" "$(LIB)/queuectl.py" "$(LIB)"/__pycache__/queuectl.*.pyc
	@rmdir "$(LIB)/__pycache__" "$(LIB)" 2>/dev/null || true

clean: ## remove what Python left here; queues stay
	rm -rf __pycache__

.PHONY: help demo test test-all bench stress plug install uninstall clean
