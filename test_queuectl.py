"""Tests of queuectl, cheapest first: tables, stories, faults; then what `make bench`, `make stress` and
`make plug` run. The program is the file named by QUEUECTL, else queuectl.py beside this one."""
import ast
import atexit
import calendar
import collections
import contextlib
import fcntl
import functools
import itertools
import json
import marshal
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import termios
import threading
import time
import tokenize
import unittest

SCRIPT = os.path.abspath(os.environ.get("QUEUECTL") or os.path.join(os.path.dirname(__file__), "queuectl.py"))

def setUpModule():
    """What the shell brings is not for the tests: a queue of its own, and SIGINT ignored where it
    runs them in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("DB_PATH", "SOCKET_PATH", "NOTIFY_SOCKET", "NO_COLOR", "COLUMNS", "LINES"):
        os.environ.pop(name, None)

class SideBySide(unittest.TestSuite):
    """Runs its tests on a few threads, as they wait more than they work."""

    def run(self, result, debug=False):
        setUpModule()
        tests = iter(list(self))

        def work():
            for test in tests:
                if not result.shouldStop:
                    test(result)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            result.stop()  # after Ctrl-C
        return result

def load_tests(loader, tests, pattern):
    """All tests, in the order of this file."""
    kinds = [kind for kind in globals().values()
             if isinstance(kind, type) and issubclass(kind, unittest.TestCase)]
    return SideBySide(itertools.chain(*map(loader.loadTestsFromTestCase, kinds)))

def read(path):
    with open(path, "rb") as file:
        return file.read()

def wait_until(predicate, what, seconds=30, every_s=0.01):
    """What `predicate()` returns once it is true; the only sleep of the tests."""
    deadline, pause_s = time.monotonic() + seconds, every_s / 8
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("waited %d s in vain: %s" % (seconds, what))
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, every_s)

def pause(seconds):
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, "the time passes", seconds + 30)

# ---- The program under test ---------------------------------------------------------------------
# It is compiled once. Each command is a process of its own: `driver` has the words that start one,
# after changes to the standard library or to constants. Short commands are forked from a Caller,
# which has loaded all that they need, in a twentieth of the time.

@functools.lru_cache()
def compiled():
    """The path of the program's code: to compile it takes most of a process's start."""
    fd, path = tempfile.mkstemp(prefix="queuectl-test-")
    atexit.register(os.unlink, path)
    with open(fd, "wb") as file:
        marshal.dump(compile(read(SCRIPT), SCRIPT, "exec", dont_inherit=True), file)
    return path

# For the code of `driver`: at("COMMIT", True, die) has die() called before each COMMIT of any process.
TOOLS = """
import fcntl, subprocess

PASSES = ["", 0]  # path of the file that counts, the pass that kills

def die(*args):
    "Kill this process at the n-th pass, counted over all processes."
    path, n = PASSES
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, b".")
        if os.lseek(fd, 0, os.SEEK_CUR) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(fd)

def on_sql(hook):
    "Have hook(connection, sql, run) called for each statement, by a connection or its cursors."
    class Cursor(sqlite3.Cursor):
        def execute(self, sql, *values):
            return hook(self.connection, sql, lambda: sqlite3.Cursor.execute(self, sql, *values))
        def executemany(self, sql, *values):
            return hook(self.connection, sql, lambda: sqlite3.Cursor.executemany(self, sql, *values))
    class Connection(sqlite3.Connection):
        def cursor(self, factory=Cursor):
            return sqlite3.Connection.cursor(self, factory)
        def execute(self, sql, *values):
            return self.cursor().execute(sql, *values)
        def executemany(self, sql, *values):
            return self.cursor().executemany(sql, *values)
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **named: connect(*args, **dict(named, factory=Connection))

def at(seam, before, point):
    "Have point(*args of the call) called before or after each pass of the seam."
    def passing(run, *args, hit=True):
        if hit and before:
            point(*args)
        value = run()
        if hit and not before:
            point(*args)
        return value
    if seam in ("COMMIT", "statement"):
        on_sql(lambda connection, sql, run: passing(
            run, hit=connection.in_transaction if seam == "statement" else sql.split()[:1] == ["COMMIT"]))
    else:
        owner, name = {"flock": (fcntl, "flock"), "Popen": (subprocess.Popen, "__init__")}.get(
            seam, (os, seam))
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **named: passing(lambda: inner(*args, **named), *args))
"""

# Run as the script itself; but where constants are to be changed it is a module first, since its
# last lines never return.
DRIVER = """
import marshal, os, signal, sqlite3, sys, types
with open(sys.argv.pop(2), "rb") as file:
    CODE = marshal.load(file)
CONSTANTS = sys.argv.pop(2)
del sys.argv[0]  # the script's name comes first, as if it had been called
%s
queuectl = types.ModuleType("queuectl" if CONSTANTS else "__main__")
queuectl.__file__ = sys.argv[0]
sys.modules[queuectl.__name__] = queuectl
exec(CODE, vars(queuectl))

def become(args, *fds):
    "Make a call, once descriptors are closed; this process ends with it."
    status = 1
    try:
        for fd in fds:
            os.close(fd)
        status = queuectl.main(args)
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # it has ended
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(status)

exec(CONSTANTS)
become(sys.argv[1:])
"""

def driver(code="", constants="", script=SCRIPT):
    """The words that call the program as its script does, once `code` has changed the standard
    library, and `constants` (say "queuectl.GRACE_S = 9") what the program has at its top;
    `script`: where it is to lie."""
    return [sys.executable, "-c", DRIVER % (code and TOOLS + code), script, compiled(), constants]

def sh(line, argv):
    """The words that have a shell run a line, and then become `argv`."""
    return ["/bin/sh", "-c", line + '; exec "$@"', "sh"] + argv

# Each line of its stdin is an order: calls to make at once, each in a fork, and a signal for those
# that still run after a while. Answered with [status, stdout, stderr] of each.
CALLER = """
import array, datetime, difflib, json, multiprocessing, random, selectors, shlex, shutil, socketserver
import subprocess, tempfile, textwrap, threading, time

def forked(args, files):
    "The pid of a process that makes this call, and has begun to: Python drops earlier signals."
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
        return pid
    signal.alarm(60)
    random.seed()
    for fd, file in enumerate(files):
        os.dup2(file.fileno(), fd)
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, "w" if fd else "r", encoding="utf-8", errors="backslashreplace", closefd=False)
        for fd in range(3))
    sys.argv[1:] = args
    become(args, ours, theirs)

for line in iter(sys.stdin.readline, ""):
    order, made = json.loads(line), []
    PASSES[:] = order["passes"]
    if order["env"]:
        os.environ.clear()
        os.environ.update(order["env"])
        time.tzset()
    os.chdir(order["cwd"])
    for args in order["calls"]:
        files = [tempfile.TemporaryFile() for _ in range(3)]
        files[0].write(order["stdin"].encode("utf-8", "surrogateescape"))
        files[0].seek(0)
        made.append((forked(args, files), files))
    if order["signal"]:
        time.sleep(order["after_s"])
        for pid, _ in made:
            os.kill(pid, order["signal"])
    answers = []
    for pid, files in made:
        status = os.waitpid(pid, 0)[1]
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
            file.close()
        answers.append([-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)]
                       + texts[1:])
    print(json.dumps(answers), flush=True)
os._exit(0)
"""

class Caller:
    """Makes calls, many at once if need be, and may kill them in the middle. `code`: as for `driver`;
    `start`: what makes a process of words."""

    def __init__(self, start=subprocess.Popen, code="", **options):
        self.process = start(driver(code or "pass", CALLER), stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, start_new_session=True, **options)

    def __call__(self, *calls, env=None, cwd="/", stdin="", signal=0, after_s=0, passes=("", 0)):
        """[status, stdout, stderr] of each call; [] if it was killed itself. A status is negative
        after a signal, and -SIGALRM after 60 s."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(dict(
                calls=calls, env=env, cwd=cwd, stdin=stdin, signal=signal, after_s=after_s,
                passes=passes)).encode() + b"\n")
            self.process.stdin.flush()
        return json.loads(self.process.stdout.readline().decode() or "[]")

@functools.lru_cache()
def caller(thread):
    """The Caller of a thread, which ends with the tests."""
    made = Caller()
    atexit.register(made.process.communicate)  # at the end of its stdin it ends
    return made

# ---- Cases --------------------------------------------------------------------------------------

# What lives longer than its command, or has workers: to be found by its environment.
LASTING = {"run", "drain", "daemon"}

def all_pids():
    return map(int, filter(str.isdigit, os.listdir("/proc")))

def environ_of(pid):
    with contextlib.suppress(OSError):
        return read("/proc/%d/environ" % pid)
    return b""

def processes_of(folder):
    """The pids of all processes that carry `folder` in their environment, but for this one."""
    return [pid for pid in all_pids() if folder.encode() in environ_of(pid) and pid != os.getpid()]

def kill_those(pids, number=signal.SIGKILL):
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)

def stat_of(pid):
    """The fields of a process from its state on; none if there is no such process."""
    with contextlib.suppress(OSError):
        return read("/proc/%d/stat" % pid).rpartition(b")")[2].split()
    return []

def parent(pid):
    return int((stat_of(pid) or [b"", -1])[1])

def alive(pid):
    """Whether a process runs; one that nobody has reaped yet does not."""
    return stat_of(pid)[:1] not in ([], [b"Z"], [b"X"])

def children_of(pid):
    return [one for one in all_pids() if parent(one) == pid]

def slot_of(pid, db):
    """The number of the slot that a process holds, None: it is no worker."""
    with contextlib.suppress(OSError):
        for fd in os.listdir("/proc/%d/fd" % pid):
            with contextlib.suppress(OSError):
                path = os.readlink("/proc/%d/fd/%s" % (pid, fd))
                if path.startswith(db + "-run/w."):
                    return int(path[len(db + "-run/w."):])

class QueueCase(unittest.TestCase):
    """A queue in a directory of its own, with what is needed to drive it. Daemons are real
    processes in a session of their own. Whatever a test leaves running is found by the directory
    in its environment, and killed."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="queuectl-test-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.addCleanup(self.kill_all)
        self.env = dict(os.environ)
        for name in ("PYTHONPATH", "PYTHONUNBUFFERED", "QUEUECTL"):  # users have buffers
            self.env.pop(name, None)
        self.daemons = []  # all processes that were started
        self.use("")

    def use(self, name):
        """Go on with the queue in a directory below that of the test."""
        self.here = name
        os.makedirs(self.path(""), 0o700, exist_ok=True)
        self.db, self.sock = self.path("q.db"), self.path("s")
        self.env = dict(self.env, DB_PATH=self.db, SOCKET_PATH=self.sock)

    def path(self, name):
        return os.path.join(self.dir, self.here, name)

    def read(self, name):
        with contextlib.suppress(FileNotFoundError):
            return read(self.path(name)).decode("utf-8", "replace")
        return ""

    def kill_all(self):
        def none_is_left():
            kill_those(processes_of(self.dir))
            return None not in [daemon.poll() for daemon in self.daemons] and not processes_of(self.dir)
        wait_until(none_is_left, "no process is left")
        for daemon in self.daemons:
            for file in filter(None, (daemon.stdin, daemon.stdout, daemon.stderr)):
                with contextlib.suppress(OSError):
                    file.close()

    def table(self, call, *rows):
        """Each row: arguments, then what `call` returns for them."""
        for row in rows:
            with self.subTest(args=repr(row[:-1])[:80]):
                self.assertEqual(call(*row[:-1]), row[-1])

    # Commands

    def cli(self, *args, stdin="", env=None, cwd=None):
        """(exit status, stdout, stderr) of a command."""
        env, cwd = env or self.env, cwd or os.getcwd()
        if LASTING.intersection(args):
            process = self.spawn(*args, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=cwd)
            return self.ended(process, stdin.encode())
        if isinstance(stdin, bytes):
            stdin = stdin.decode("utf-8", "surrogateescape")
        return tuple(caller(threading.get_ident())(args, stdin=stdin, env=env, cwd=cwd)[0])

    def ok(self, *args, **options):
        """The decoded stdout of a command that must succeed."""
        out = self.prints(*args, **options)
        return json.loads(out) if out.strip() else None

    def prints(self, *args, **options):
        """The stdout of a command that must succeed."""
        code, out, err = self.cli(*args, **options)
        self.assertEqual(code, 0, (args, out, err))
        return out

    def refused(self, *args, status=1, **options):
        """The message of a command that must fail, in one line on stderr."""
        code, out, err = self.cli(*args, **options)
        self.assertEqual((code, out), (status, ""), (args, err))
        answer = json.loads(err.strip().splitlines()[-1])
        self.assertIs(answer["success"], False)
        self.assertTrue(answer["message"].startswith("Error"), answer)
        return answer["message"]

    def says(self, words, *args, **options):
        """A command must fail, with these words."""
        self.assertIn(words, self.refused(*args, **options))

    def enqueue(self, command, **fields):
        """The id of a new job."""
        return self.ok("enqueue", json.dumps(dict(fields, command=command)))["id"]

    def haste(self):
        """Have retries follow at once."""
        self.ok("config", "set", "max-delay", "1ms")

    def show(self, job_id, *names):
        job = self.ok("show", job_id)
        return tuple(job[name] for name in names)

    def has(self, job_id, **fields):
        """A job must have these."""
        self.assertEqual(dict(zip(fields, self.show(job_id, *fields))), fields)

    def are(self, **states):
        """These are all jobs, and their states."""
        self.assertEqual(self.states(), states)

    # Processes

    def started(self, argv, ready=True, **options):
        """A process of any kind with its stdout at hand, killed in cleanup like all."""
        process = subprocess.Popen(argv, **dict(dict(
            env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True), **options))
        self.daemons.append(process)
        if ready:
            self.assertIn(b"ready", process.stdout.readline())
        return process

    def ended(self, process, stdin=None):
        """(exit status, stdout, stderr) of a process that ends by itself."""
        out, err = process.communicate(stdin, 60)
        return (process.returncode,) + tuple(
            (text or b"").decode("utf-8", "surrogateescape") for text in (out, err))

    def spawn(self, *args, **options):
        """A command in a process of its own, still running."""
        return self.started(driver() + list(args), ready=False, **options)

    def daemon(self, *args, **options):
        """A daemon that is ready."""
        return self.started(driver() + ["daemon"] + list(args), **options)

    def driven(self, code, *args, constants="pass", **options):
        """A daemon that has run `code` before its start, and goes on in the same process."""
        return self.started(driver(code, constants) + ["daemon"] + list(args), **options)

    def script(self, *args, **options):
        """(exit status, stdout, stderr) of the program as a user starts it."""
        return self.ended(self.started([sys.executable, SCRIPT] + list(args), ready=False,
                                       stderr=subprocess.PIPE, **options))

    def terminal(self, *args, **options):
        """(exit status, what is shown) of a command whose stdout and stderr are a terminal, 80 wide."""
        ours, theirs = pty.openpty()
        with contextlib.closing(os.fdopen(ours, "rb", 0)) as screen:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
            process = self.spawn(*args, stdout=theirs, stderr=theirs,
                                 **dict({"env": dict(self.env, TERM="xterm")}, **options))
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # EIO at its end
                for piece in iter(lambda: screen.read(1 << 16), b""):
                    shown += piece
            return process.wait(60), shown.decode().replace("\r\n", "\n")

    def kill(self, process):
        process.kill()
        process.wait()

    def stop(self, process, number=signal.SIGTERM):
        """The exit status of a process after a signal."""
        process.send_signal(number)
        return process.wait(30)

    def workers_of(self, daemon):
        """The pids of its workers."""
        return [row["pid"] for row in self.ok("worker", "list") if parent(row["pid"]) == daemon.pid]

    # Looks

    def jobs(self, state=None):
        return self.ok("list", *(("--state", state) if state else ()))

    def rows(self, sql, *values):
        """Rows by a connection of another program's."""
        with contextlib.closing(sqlite3.connect(self.db, timeout=10)) as connection, connection:
            return connection.execute(sql, values).fetchall()

    def states(self):
        """{id: state} of all jobs."""
        return dict(self.rows("SELECT id, state FROM jobs"))

    def wait_for(self, state, count=1):
        """Wait until so many jobs are in `state`, and begun if that is "processing"."""
        wait_until(lambda: list(self.states().values()).count(state) == count,
                   "%d jobs are %s" % (count, state))
        if state == "processing":
            wait_until(lambda: self.begun() >= count, "%d commands run" % count)

    def begun(self):
        """The number of open attempts whose command runs: its process has the run file's name in
        its environment."""
        begun = b"".join(map(environ_of, processes_of(self.db + "-run/")))
        return len({serial for serial, in self.rows("SELECT serial FROM running")}.intersection(
            map(int, re.findall(rb"QUEUECTL_RUN=[^\0]*?(\d+)\0", begun))))

    def gate(self, name="gate"):
        """A command that tells of its start and goes on at `open_gate`."""
        os.mkfifo(self.path(name))
        return "echo started; read line <%s; echo $line" % self.path(name)

    def open_gate(self, name="gate"):
        def through():
            with contextlib.suppress(OSError):  # nobody waits there yet
                with open(os.open(self.path(name), os.O_WRONLY | os.O_NONBLOCK), "w") as file:
                    return file.write("through\n")
        wait_until(through, "a job is at the gate")

    # The wire

    def ask(self, data, close=False):
        """What the daemon answers to raw bytes, up to the first newline."""
        return self.asked([data], 1, close)[0]

    def asked(self, pieces, count, close=False):
        """Its answers, so many, to raw bytes sent one piece after the other."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(self.sock)
            for piece in pieces:
                client.sendall(piece)
            if close:
                client.shutdown(socket.SHUT_WR)
            answers = b""
            while answers.count(b"\n") < count:
                piece = client.recv(1 << 16)
                if not piece:
                    break
                answers += piece
            return [json.loads(line) for line in answers.decode().splitlines()]

    def request(self, command, option=None, value=None, flag=None):
        """The daemon's answer to a request: its message, which begins with Error if refused."""
        return self.ask(json.dumps({"command": command, "option": option, "flag": flag,
                                    "value": value}).encode() + b"\n")["message"]

# ---- The house ----------------------------------------------------------------------------------
# The order of the program's text, as its docstring promises it, and of this file.

@functools.lru_cache()
def tokens_of(script):
    with open(script, "rb") as file:
        return list(tokenize.tokenize(file.readline))

def size_of(script):
    """(tokens, lines)"""
    tokens = tokens_of(script)
    return sum(token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
               for token in tokens), tokens[-1].start[0] - 1

class HouseTest(unittest.TestCase):
    def setUp(self):
        self.text = read(SCRIPT).decode()
        self.tree = ast.parse(self.text)
        self.banners = [(number, match.group(1)) for number, match in (
            (number, re.match("# ---- (.+?) -+$", line))
            for number, line in enumerate(self.text.split("\n"), 1)) if match]

    def rooms(self, first, second=None):
        """The sections in whose code that name stands, followed by that token if one is given."""
        tokens = tokens_of(SCRIPT)
        return {[name for number, name in self.banners if number < one.start[0]][-1]
                for one, two in zip(tokens, tokens[1:])
                if one.type == tokenize.NAME and one.string == first
                and second in (None, two.string) and one.start[0] > self.banners[0][0]}

    def test_banners_are_those_of_the_docstring(self):
        listed = [line.strip() for line in ast.get_docstring(self.tree).split("\n")]
        names = [name for _, name in self.banners]
        self.assertGreater(len(names), 15)
        self.assertIn(names, [listed[start:start + len(names)] for start in range(len(listed))])

    def test_names_point_only_up(self):
        starts = {node.name: node.lineno for node in self.tree.body if hasattr(node, "name")}

        def used(scope):
            for symbol in scope.get_symbols():
                if symbol.is_global() or scope.get_type() == "class" and not symbol.is_assigned():
                    yield symbol.get_name()
            for child in scope.get_children():
                yield from used(child)
        down = ["%s -> %s" % (scope.get_name(), name)
                for scope in symtable.symtable(self.text, SCRIPT, "exec").get_children()
                for name in used(scope) if starts.get(name, 0) > starts.get(scope.get_name(), 10 ** 9)]
        self.assertEqual(down, [])

    def test_each_concern_has_one_room(self):
        self.assertLessEqual(self.rooms("sqlite3"), {"Schema", "Store"})
        self.assertLessEqual(self.rooms("time", "."), {"Time, ids and text"})

    def test_it_is_as_small_as_promised_and_no_function_is_too_long_to_read(self):
        tokens, lines = size_of(SCRIPT)
        self.assertLessEqual(tokens, 26500)
        self.assertLessEqual(lines, 4100)
        long = ["%s: %d" % (node.name, lines) for node, lines in (
            (node, max(n.lineno for n in ast.walk(node) if hasattr(n, "lineno")) - node.lineno + 1)
            for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)) if lines > 45]
        self.assertEqual(long, [])

    def test_the_tests_use_no_private_name_of_the_program(self):
        text = read(os.path.splitext(os.path.abspath(__file__))[0] + ".py").decode()
        self.assertEqual(set(re.findall(r"\bqueuectl\.(?!__)([a-z_]\w*)", text)) - {
            "main", "db", "py", "sock", "service"}, set())

# ---- Stories ------------------------------------------------------------------------------------
# What users do, by command, socket and database alone.

NOW = 1768473000000  # ms
STAMP = "2026-01-15T10:30:00.000Z"
LATER = "2100-01-01T00:00:00.000Z"
COMMANDS = [words.replace("-", " ") for words in (
    "enqueue run show logs wait drain retry cancel delete pause resume daemon worker-start worker-stop"
    " worker-list daemon-stop daemon-status status list dlq-list dlq-retry config-set config-get config-list"
    " metrics check backup doctor systemd completion dlq config worker").split()]
SETTINGS = {
    "max-retries": 3, "delay-base": 5000, "backoff": "exponential", "max-delay": 86400000, "jitter": 0,
    "timeout": 5000, "output-limit": 65536, "retention": 0, "shell": "/bin/sh -c", "workers": 0,
    "on-dead": ""}
COUNTS = {"pending": 0, "processing": 0, "completed": 0, "failed": 0, "dead": 0}

# As the original QueueCTL makes them.
ORIGINAL = """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, command TEXT NOT NULL, state TEXT DEFAULT 'pending',
        attempts INT DEFAULT 0, max_retries INT DEFAULT 3, created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
        updated_at DATETIME DEFAULT CURRENT_TIMESTAMP, locked_at DATETIME, timeout INT DEFAULT 5000,
        run_after DATETIME DEFAULT CURRENT_TIMESTAMP, priority INT DEFAULT 0, started_at DATETIME);
    CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT);
    CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT,
        daemon_startup DATETIME DEFAULT CURRENT_TIMESTAMP, total_commands INT DEFAULT 0);"""

def make_original(path, statements):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(ORIGINAL + statements)
    os.chmod(path, 0o600)

def ms(stamp):
    """Milliseconds since 1970 of a time as the program writes it."""
    whole, _, parts = stamp[:-1].partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) * 1000 + int(parts)

class UsageTest(QueueCase):
    """How the program speaks of itself, and of wrong calls."""

    def test_help_has_examples_at_every_level(self):
        top = self.prints("--help")
        for words in COMMANDS:
            self.assertIn("queuectl " + words, self.prints(*(words.split() + ["--help"])))
            self.assertIn(words.split()[0], top)
        self.assertRegex(self.prints("--version"), r"^queuectl \d+\.\d+\S*\n$")
        self.assertEqual(os.listdir(self.dir), [])

    def test_wrong_usage_exits_2_and_makes_nothing(self):
        for words, line in (
                ("status", "statsu"), ("enqueue", "enqeue {}"), ("start", "worker strat"),
                ("retry", "dlq retyr x"), ("dlq retry", "dlq"), ("worker start", "worker"),
                ("completed", "list --state gone"), ("count", "worker start --count 0"),
                ("count", "worker start -c x"), ("unit", "daemon --grace 30"), ("config get", "config get"),
                ("job", "enqueue"), ("command", "enqueue --"), ("command", "enqueue {} -- x"),
                ("--env", "enqueue --env A -- x"), ("--at", "enqueue --at noon -- x"),
                ("--", "run true"),
                ("--priority", "enqueue --priority 5000 -- x"), ("unit", "enqueue --timeout 30 -- x"),
                ("--", "enqueue ls -l"), ("--all", "cancel"), ("--all", "delete"), ("--all", "dlq retry"),
                ("--all", "delete --older-than 1h"), ("--all", "delete a --all"), ("--frob", "status --frob"),
                ("bash", "completion tcsh"), ("attempt", "logs a --attempt x")):
            self.says(words, *line.split(), status=2)
        self.assertEqual(os.listdir(self.dir), [])

    def test_looking_at_a_queue_that_is_not_there_makes_nothing(self):
        self.assertEqual((self.ok("list"), self.ok("dlq", "list")), ([], []))
        self.assertEqual(self.ok("status"), {"jobs": COUNTS, "workers": 0})
        self.assertEqual(self.ok("metrics")["total_jobs"], 0)
        self.assertEqual(self.ok("config", "list"), SETTINGS)
        for command in ("show", "logs", "cancel", "wait"):
            self.says("no job a", command, "a")
        for words in ("pending", "enqueue", "worker start", "--help"):
            self.assertIn(words, self.prints())  # nothing typed
        self.assertEqual(os.listdir(self.dir), [])

    def test_a_next_command_is_named_so_that_it_can_be_pasted(self):
        env = dict(self.env, DB_PATH="", SOCKET_PATH="")
        message = self.refused("--db", self.db, "--socket", self.sock, "daemon", "status", env=env)
        self.assertRegex(message, r"--db %s\b.* worker start" % re.escape(self.db))
        self.assertNotIn("--db", self.refused("daemon", "status"))

    def test_utf8_and_any_path_survive_the_c_locale(self):
        env = dict(self.env, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        job = '{"id":"caf\u00e9","command":"echo \u00e9"}'.encode()
        code, out, err = self.script("enqueue", job, env=env)
        self.assertEqual((code, json.loads(out)["id"]), (0, "caf\u00e9"), err)
        self.assertIn("command: echo \u00e9\n", err)
        self.assertEqual(self.rows("SELECT id, command FROM jobs"), [("caf\u00e9", "echo \u00e9")])
        for name in (b"caf\xe9", b"a %20?#'\"\n"):
            folder = os.fsencode(self.dir) + b"/" + name
            os.mkdir(folder)
            code, out, err = self.script(b"--db", b"q.db", "run", "--", "pwd; echo \u00e9".encode(),
                                         env=env, cwd=folder)
            self.assertEqual((code, os.fsencode(out)), (0, folder + b"\n\xc3\xa9\n"), err)
            self.script(b"--db", folder + b"/q.db", "backup", b"copy-" + name, env=env, cwd=folder)
            self.assertIn(b"copy-" + name, os.listdir(folder))

class EnqueueTest(QueueCase):
    """Jobs in all the forms in which they come."""

    def put(self, **fields):
        return self.request("enqueue", value=json.dumps(fields))

    def test_an_enqueued_job_is_stored_and_said_so(self):
        self.assertEqual(self.cli("enqueue", '{"id":"hello","command":"echo Hello World"}'), (
            0, '{"success":true,"message":"Job enqueued","id":"hello"}\n', "daemon not running; stored in "
            "%s\nid: hello\ncommand: echo Hello World\n" % self.db))
        self.are(hello="pending")

    def test_a_bad_job_is_refused_and_nothing_is_stored(self):
        self.enqueue("true", id="taken", priority=7)
        for job, words in (
                ('{"command":""}', "command"), ('{"id":"x"}', "command"), ("[1]", "object"),
                ('{"command":"true","prio":1}', "prio"), ('{"command":"true","id":"taken"}', "taken"),
                ("not json", "JSON"), ('{"a":' * 100000, "nest"), ("make", "-- make"), ("{} x", "JSON")):
            self.says(words, "enqueue", job)
        self.assertEqual(self.rows("SELECT id, priority FROM jobs"), [("taken", 7)])

    def test_a_bad_field_is_named(self):
        self.daemon()
        for name, *values in (
                ("id", 5, True, "", "a b", "a/b", "a\n", "a\u202e", "\0", "\ud800", "x" * 129),
                ("command", 5, True, ["a"], "", "a\0b", "\udcff", "x" * 131072, "\u00e9" * 65536),
                ("priority", True, "1", 1.5, 1001, -1001, 2 ** 64),
                ("run_after", True, NOW, "", "tomorrow", "2026-02-30", "2026-01-15T24:30",
                 "2026-01-15T10:30:00+24:00", "2026-1-15"),
                ("timeout", True, -1, 1.5, "1w", [], 2 ** 64, "9" * 30),
                ("max_retries", False, True, 0, 1001, "3", 10 ** 30),
                ("cwd", "", "here", "./x", "/a\0", "/\ud800"),
                ("env", [], "A=b", {"A": 1}, {"A": None}, {"": "x"}, {"A=B": "x"}, {"A\0": "x"},
                 {"A": "\0"}, {"A": "\ud800"}),
                ("unique", 5, True, "", "\0", "\ud800"), ("Command", "true"), ("colour", 1)):
            for value in values:
                with self.subTest(name=name, value=repr(value)[:40]):
                    self.assertRegex(self.put(**dict({"command": "true"}, **{name: value})),
                                     r"^Error.*\b%s\b" % name)
        self.are()

    def test_good_fields_are_stored_and_null_ones_count_as_absent(self):
        self.daemon()

        def stored(name, value):
            self.assertEqual(self.put(**dict({"command": "true"}, **{name: value})), "Job enqueued")
            return self.rows("SELECT %s FROM jobs ORDER BY rowid DESC LIMIT 1" % name)[0][0]
        self.table(
            stored, ("id", "a", "a"), ("id", "\u00e9" * 128, "\u00e9" * 128), ("command", " x\n", " x\n"),
            ("command", "x" * 131071, "x" * 131071), ("priority", -1000, -1000), ("priority", 1000, 1000),
            ("run_after", "2026-01-15T12:30:00+02:00", STAMP), ("run_after", "2026-01-15 10:30", STAMP),
            ("run_after", STAMP, STAMP), ("timeout", 0, 0), ("timeout", "90s", 90000),
            ("timeout", "1h30m", 5400000), ("timeout", None, 5000), ("max_retries", 1, 1),
            ("max_retries", 1000, 1000), ("max_retries", None, 3), ("priority", None, 0),
            ("state", "dead", "pending"), ("attempts", 7, 0), ("error", "x", None), ("exit_code", 5, None),
            ("started_at", [], None))

    def test_a_list_can_be_enqueued_again(self):
        self.ok("enqueue", "--id", "a", "--priority", "4", "--unique", "k", "--cwd", "/",
                '{"command":"echo a","env":{"A":"b"},"timeout":7}')
        self.enqueue("true", id="b", run_after=LATER, max_retries=9)
        jobs, listed = self.jobs(), self.prints("list")
        self.says("taken", "enqueue", json.dumps(jobs[1]))

        def same(jobs):
            return [{name: value for name, value in job.items() if name not in (
                "created_at", "updated_at", job["id"] == "a" and "run_after")} for job in jobs]
        self.prints("cancel", "--all")
        self.prints("delete", "--all")
        self.ok("enqueue", json.dumps(jobs[0]))
        self.ok("enqueue", json.dumps(jobs[1]))
        self.assertEqual(same(self.jobs()), same(jobs))
        self.use("other")
        self.ok("enqueue", "-", stdin=listed)
        self.assertEqual(same(self.jobs()), same(jobs))

    def test_ids_are_short_and_sort_by_time_and_a_prefix_that_fits_one_job_will_do(self):
        ids = [self.enqueue("true") for _ in range(3)]
        ids += self.prints("enqueue", "-q", "-", stdin='{"command":"true"}\n' * 1000).split()
        self.assertEqual((sorted(set(ids)), len(ids)), (ids, 1003))
        self.assertLessEqual(max(map(len, ids)), 16)
        self.ok("enqueue", "-", stdin="".join('{"command":"true","id":"%s"}\n' % job_id for job_id in (
            "alpha-1", "alpha-2", "beta", "beta-2", "100%_x", "100ab")))
        self.table(lambda given: self.show(given, "id")[0],
                   ("alpha-2", "alpha-2"), ("beta", "beta"), ("beta-", "beta-2"), ("100%", "100%_x"))
        for given, words in (("alpha", "alpha"), ("b", "b"), ("none", "no job none"), ("_", "no job _"),
                             ("alpha-12", "no job alpha-12"), ("B", "no job B"), (ids[0][:3], ids[0][:3])):
            self.says(words, "show", given)
        self.prints("cancel", "beta-", "100%")
        self.refused("cancel", "alpha")
        self.assertEqual([job["id"] for job in self.jobs("cancelled")], ["beta-2", "100%_x"])

    def test_lines_or_an_array_from_stdin_are_stored_whole_or_not_at_all(self):
        answer = self.ok("enqueue", "-", stdin='{"command":"a"}\n\n{"command":"b"}\n')
        self.assertEqual((answer["success"], answer["message"]), (True, "Enqueued 2 jobs"))
        for stdin in ('[{"command":"c"},{"command":"d"}]', "[]",
                      '[\n{"command":"e"},\n  {"command":\n"f"}\n]\n'):
            self.ok("enqueue", "-", stdin=stdin)
        for words, stdin in (
                ("line 3", '{"command":"x"}\n\nnonsense\n'), ("line 2", '{"command":"x"}\n{"command":""}'),
                ("line 1", "5\n"), ("line 2", '{"command":"x"}\n{"command":"x'),
                ("UTF-8", b'{"command":"\xff"}\n'), ("nothing is stored", '{"command":"x"}\nx\n'),
                ("command", '[{"command":"x"},{"command":""}]'), ("", '[{"command":"x"}')):
            self.says(words, "enqueue", "-", stdin=stdin)
        self.assertEqual(self.rows("SELECT command FROM jobs ORDER BY rowid"), list(zip("abcdef")))
        lines = ['{"command":"true"}'] * 1200 + ['{"command":1}']  # stored in batches
        self.assertRegex(self.refused("enqueue", "-", stdin="\n".join(lines)), "line 1201.*command.*1000")
        self.assertEqual(self.ok("status")["jobs"]["pending"], 1006)

    def test_flags_and_an_argv_make_a_job_and_flags_win_over_fields(self):
        self.assertEqual(self.prints(
            "enqueue", "-q", "--id", "a", "--priority", "-5", "--timeout", "2h", "--max-retries", "7",
            "--cwd", "/", "--env", "A=1", "--env", "B=x=y", "--env", "C=", "--unique", "k", "--",
            "printf", "%s|", "a b", "it's", "--", "*"), "a\n")
        self.has("a", priority=-5, timeout=7200000, max_retries=7, cwd="/", unique="k",
                 env={"A": "1", "B": "x=y", "C": ""}, command="""printf '%s|' 'a b' 'it'"'"'s' -- '*'""")
        self.ok("enqueue", "--id", "b", "--", "echo $HOME; true")
        self.has("b", command="echo $HOME; true", timeout=0, cwd=os.getcwd())
        flags = ("enqueue", "--timeout", "1m", "--priority", "9", "--env", "A=2")
        self.ok(*flags, '{"id":"c","command":"x","priority":3}')
        self.ok(*flags, "-", stdin='{"id":"d","command":"x"}\n{"id":"e","command":"x","timeout":5}')
        for job_id in "cde":
            self.has(job_id, timeout=60000, priority=9, env={"A": "2"})

    def test_dates_in_flags_are_local_and_in_json_utc(self):
        env = dict(self.env, TZ="XXX-05:30")
        for at in ("2026-12-01 10:00", "2026-12-01T04:30Z", "2026-12-01T06:30+02:00"):
            self.ok("enqueue", "--at", at, "--", "true", env=env)
        self.ok("enqueue", '{"command":"x","run_after":"2026-12-01 04:30"}', env=env)
        self.assertEqual(self.rows("SELECT DISTINCT run_after FROM jobs"), [("2026-12-01T04:30:00.000Z",)])
        self.ok("enqueue", "--id", "next", "--at", "03:00", "--", "true", env=env)
        self.ok("enqueue", "--id", "soon", "--delay", "1h30m", "--", "true", env=env)
        created, run_after = map(ms, self.show("next", "created_at", "run_after"))
        self.assertEqual(run_after % 86400000, (3 * 60 - 330) % 1440 * 60000)
        self.assertTrue(0 < run_after - created <= 86400000)
        created, run_after = map(ms, self.show("soon", "created_at", "run_after"))
        self.assertLess(abs(run_after - created - 5400000), 5000)

    def test_an_unfinished_job_holds_its_unique_key(self):
        first = self.ok("enqueue", '{"command":"true","unique":"nightly"}')
        second = self.ok("enqueue", "--unique", "nightly", "--", "false")
        self.assertEqual((second["success"], second["id"]), (True, first["id"]))
        self.ok("enqueue", "--unique", "x", "-", stdin='{"command":"true"}\n' * 2)
        self.assertEqual(len(self.jobs()), 2)
        self.ok("drain")
        self.assertNotEqual(self.enqueue("true", unique="nightly"), first["id"])

    def test_a_command_line_keeps_its_callers_environment_and_json_the_daemons(self):
        line = "echo $WHO:$WORD:$TERM$SSH_TTY$XDG_SESSION_ID$NOTIFY_SOCKET"
        env = dict(self.env, WHO="daemon", NOTIFY_SOCKET="/none", TERM="", SSH_TTY="", XDG_SESSION_ID="")
        self.daemon("--workers", "1", env=env)
        caller = dict(self.env, WHO="caller", TERM="xterm", SSH_TTY="/dev/x", XDG_SESSION_ID="5",
                      WORD="\u00e9 \x1b")
        for args in (["--id", "argv", "--", line], ["--id", "flag", "--env", "WHO=flag", "--", line],
                     ["--id", "clean", "--clean-env", "--", line],
                     [json.dumps({"id": "json", "command": line})]):
            self.ok("enqueue", *args, env=caller)
        self.wait_for("completed", 4)
        self.assertEqual({job: output.decode() for job, output in self.rows(
            "SELECT job, output FROM attempts")}, {"argv": "caller:\u00e9 \x1b:\n", "clean": "daemon::\n",
                                                   "flag": "flag:\u00e9 \x1b:\n", "json": "daemon::\n"})
        self.has("argv", env={})
        self.has("flag", env={"WHO": "flag"})
        self.assertNotIn("caller", self.prints("list") + self.prints("show", "argv"))

class SettingsTest(QueueCase):
    def test_settings_are_set_shown_and_put_back(self):
        self.assertEqual(self.prints("config", "set", "max-retries", "2"),
                         '{"success":true,"message":"Updated max-retries to 2"}\n')
        for key, value, stored in (
                ("timeout", "10m", 600000), ("delay-base", "1h30m", 5400000), ("jitter", "100", 100),
                ("backoff", "fixed", "fixed"), ("output-limit", "0", 0), ("retention", "1d", 86400000),
                ("shell", "/bin/bash -c", "/bin/bash -c"), ("on-dead", "mail x", "mail x"),
                ("workers", "0", 0), ("max-delay", "500ms", 500)):
            self.ok("config", "set", key, value)
            self.assertEqual((key, self.ok("config", "get", key)), (key, stored))
        self.enqueue("true", id="a")
        self.has("a", max_retries=2, timeout=600000)
        for key in SETTINGS:
            self.ok("config", "set", key, "default")
        self.assertEqual(self.ok("config", "list"), SETTINGS)
        self.assertIn("10 ms", self.cli("config", "set", "timeout", "10")[2])  # a bare number

    def test_a_bad_setting_is_named_and_changes_nothing(self):
        self.daemon()
        for key, *values in (
                ("max-retries", "0", "1001", "x", "", "1.5", "-1", "\u0663", "9" * 30),
                ("delay-base", "0", "-1", "1w", "", "1.5s"), ("backoff", "Linear", "", "none"),
                ("jitter", "101", "-1", "5%"), ("timeout", "-1", "20d 1h"), ("output-limit", "1k"),
                ("retention", "ever"), ("shell", "", " ", "'sh", "a\0"), ("workers", "-1", "1001", "x"),
                ("colour", "red"), ("", "x"), ("limit.", "1")):
            for value in values:
                with self.subTest(key=key, value=value):
                    self.assertRegex(self.request("config", value=value, flag=key), "^Error.*" + key)
        self.assertEqual(self.ok("config", "list"), SETTINGS)
        self.says("max-retries", "config", "get", "colour")
        self.says("jitter", "config", "set", "jitter", "101")

    def test_the_number_of_workers_is_absolute_heeded_at_once_and_kept(self):
        self.ok("config", "set", "workers", "2")
        daemon = self.daemon()
        for number in (2, 3, 1):
            self.ok("config", "set", "workers", str(number))
            wait_until(lambda: self.request("status")["workers"] == number, "%d work" % number)
        self.ok("worker", "start")
        self.assertEqual(self.ok("config", "get", "workers"), 2)
        self.ok("worker", "stop")
        self.assertEqual(self.ok("config", "get", "workers"), 0)
        self.stop(daemon)
        self.stop(self.daemon("--workers", "2"))
        self.daemon()
        wait_until(lambda: self.request("status")["workers"] == 2, "they are back")

    def test_dlq_retry_stamps_present_settings_on_what_brought_none(self):
        self.enqueue("false", id="bare")
        self.enqueue("false", id="own", max_retries=3, timeout=9000)
        self.ok("enqueue", "--id", "line", "--", "false")
        self.haste()
        self.cli("drain", "--count", "2")
        self.ok("config", "set", "max-retries", "5")
        self.ok("config", "set", "timeout", "7000")
        self.prints("dlq", "retry", "--all")
        self.assertEqual(self.rows("SELECT id, max_retries, timeout, attempts FROM jobs ORDER BY id"),
                         [("bare", 5, 7000, 0), ("line", 5, 0, 0), ("own", 3, 9000, 0)])

    def test_the_shell_setting_is_what_runs_a_command(self):
        self.ok("config", "set", "shell", "/bin/echo 'a b' -n")
        self.ok("enqueue", "--id", "a", "--", "it's $HOME")
        self.ok("drain")
        self.assertEqual(self.prints("logs", "a"), "a b -n it's $HOME\n")

class LifeTest(QueueCase):
    """From pending to the end, and back."""

    def test_scenario_basic_job(self):
        self.ok("enqueue", '{"id":"hello","command":"echo Hello World"}')
        self.assertEqual(self.prints("worker", "start", "--count", "1"),
                         '{"success":true,"message":"Started 1 worker"}\n')
        self.wait_for("completed")
        self.has("hello", attempts=1, exit_code=0, error=None)
        self.assertEqual(self.rows("SELECT number, exit_code, output FROM attempts"),
                         [(1, 0, b"Hello World\n")])
        self.assertEqual(self.ok("metrics")["completed_jobs"], 1)
        self.assertEqual(self.prints("worker", "stop"),
                         '{"success":true,"message":"Stopped workers"}\n')
        wait_until(lambda: self.ok("status")["workers"] == 0, "they are gone")

    def test_scenario_retry_backoff_and_dead_letter_queue(self):
        self.ok("config", "set", "max-retries", "2")
        self.ok("config", "set", "delay-base", "1000")
        self.daemon("--workers", "1")
        self.enqueue("echo try $QUEUECTL_ATTEMPT; test -e cause", id="fail-test", cwd=self.dir)
        self.wait_for("failed")
        self.wait_for("dead")
        dead, = self.ok("dlq", "list")
        self.assertEqual((dead["attempts"], dead["error"]), (2, "exit 1"))
        first, second = self.show("fail-test", "history")[0]
        self.assertGreaterEqual(ms(second["started_at"]) - ms(first["finished_at"]), 999)
        open(self.path("cause"), "w").close()
        self.assertEqual(self.prints("dlq", "retry", "fail-test"),
                         '{"success":true,"message":"Job fail-test added to queue"}\n')
        self.wait_for("completed")
        self.assertEqual(self.rows("SELECT number, output FROM attempts ORDER BY number"),
                         [(1, b"try 1\n"), (2, b"try 2\n"), (3, b"try 1\n")])
        self.has("fail-test", attempts=1)

    def test_scenario_invalid_commands(self):
        self.ok("config", "set", "max-retries", "1")
        self.daemon("--workers", "1")
        for name, command, more in (
                ("a", "no-such-command", {}), ("b", "true", {"cwd": "/no/such/directory"}),
                ("c", "kill -9 $$", {}), ("d", "kill -9 $PPID; true", {}), ("e", "exit 3", {})):
            self.enqueue(command, id=name, **more)
        self.wait_for("dead", 5)
        errors = dict(self.rows("SELECT id, error FROM jobs"))
        self.assertIn("/no/such/directory", errors.pop("b"))
        self.assertEqual(errors, {
            "a": "exit 127", "c": "killed by SIGKILL", "d": "worker lost", "e": "exit 3"})
        self.has("c", exit_code=None)
        wait_until(lambda: self.ok("status")["workers"] == 1, "the worker is replaced")

    def test_priority_then_age(self):
        for name, priority in (("low", 0), ("high", 1), ("lower", -5), ("high2", 1)):
            self.enqueue("echo %s >> %s" % (name, self.path("log")), priority=priority)
        self.ok("drain")
        self.assertEqual(self.read("log").split(), ["high", "high2", "low", "lower"])

    def test_a_scheduled_job_starts_at_its_time(self):
        self.daemon("--workers", "1")
        job_id = self.ok("enqueue", "--delay", "700ms", "--", "true")["id"]
        self.has(job_id, state="pending")
        self.wait_for("completed")
        due, started = map(ms, self.show(job_id, "run_after", "started_at"))
        self.assertTrue(due <= started < due + 500, started - due)

    def test_a_job_finds_its_world(self):
        self.started(sh("umask 027", driver() + ["daemon", "--workers", "1"]),
                     env=dict(self.env, LISTEN_FDS="1"))
        self.enqueue("pwd; echo $A $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $LISTEN_FDS; cat; umask;"
                     "read stat </proc/$$/stat; set -- $stat; echo $(($1 - $5))", id="env", cwd=self.dir,
                     env={"A": "b c"})
        self.wait_for("completed")
        self.assertEqual(self.prints("logs", "env"), "%s\nb c env 1\n0027\n0\n" % self.dir)

    def test_a_background_child_of_a_completed_job_is_left_alone(self):
        self.daemon("--workers", "1")
        for job_id in "ab":
            self.enqueue("sleep 300 & echo $!", id=job_id)
        self.wait_for("completed", 2)
        pids = [int(self.prints("logs", job_id)) for job_id in "ab"]
        self.ok("retry", "a")
        self.wait_for("completed", 2)
        self.ok("daemon", "stop")
        self.assertLessEqual(set(pids), set(processes_of(self.dir)))

    def test_output_is_exact_and_bounded(self):
        self.ok("config", "set", "output-limit", "10")
        self.haste()
        self.daemon("--workers", "1")
        self.enqueue("seq 1000 >&2; echo end $QUEUECTL_ATTEMPT; exit 1", max_retries=2)
        self.wait_for("dead")
        self.assertEqual([(output, dropped > 3000) for output, dropped in self.rows(
            "SELECT output, dropped FROM attempts ORDER BY number")],
            [(b"000\nend 1\n"[-10:], True), (b"000\nend 2\n"[-10:], True)])
        self.ok("config", "set", "output-limit", "default")
        self.enqueue(r"printf '\377\000\r\n'; echo err >&2; echo three >/dev/stderr", id="order")
        self.wait_for("completed")
        self.assertEqual(self.prints("logs", "order"), "\udcff\0\r\nerr\nthree\n")

    def test_a_chatty_job_can_not_fill_the_disk(self):
        self.daemon("--workers", "1")
        self.enqueue("yes", id="a", timeout=700, max_retries=1)
        self.wait_for("processing")
        run_file = self.path("q.db-run/%d" % self.rows("SELECT serial FROM running")[0])
        sizes = [0]

        def gone():
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.stat(run_file).st_size)
            return not os.path.exists(run_file)
        wait_until(gone, "the chatty job is stopped")
        self.wait_for("dead")
        self.assertTrue(65536 < max(sizes) < (1 << 20) + (1 << 18), max(sizes))
        (output, dropped), = self.rows("SELECT output, dropped FROM attempts")
        self.assertEqual((len(output), dropped > 1 << 20), (65536, True))
        code, out, err = self.cli("logs", "a")
        self.assertEqual((code, len(out)), (0, 65536))
        self.assertIn(str(dropped), err)

    def test_retry_takes_what_has_ended_and_dlq_retry_the_dead(self):
        self.ok("config", "set", "max-retries", "1")
        self.enqueue("true", id="done")
        self.enqueue("false", id="dead")
        self.enqueue("test -e x", id="failed", max_retries=2, cwd=self.dir)
        for job_id in ("waits", "gone"):
            self.enqueue("true", id=job_id, run_after=LATER)
        self.prints("cancel", "gone")
        ended = dict(done="completed", dead="dead", failed="failed", waits="pending", gone="cancelled")
        daemon = self.daemon("--workers", "1")
        wait_until(lambda: self.states() == ended, "all ended")
        self.stop(daemon)
        for job_id in ("done", "gone", "failed", "waits", "none"):
            self.says(job_id, "dlq", "retry", "dead", job_id)
        self.says("no job none", "retry", "done", "none")
        self.are(**ended)
        open(self.path("x"), "w").close()
        self.prints("retry", "done", "gone", "failed", "waits")
        self.prints("dlq", "retry", "dead")
        for job_id in ("done", "dead", "waits"):
            self.has(job_id, state="pending", attempts=0)
        self.cli("drain")
        self.has("failed", state="completed", attempts=2)
        self.are(done="completed", dead="dead", failed="completed", waits="pending", gone="completed")

    def test_a_retry_of_all_leaves_out_whose_key_is_held(self):
        for name in "ab":
            self.enqueue("false", id=name, unique="k", max_retries=1)
            self.cli("drain")
        code, _, err = self.cli("dlq", "retry", "--all")
        self.assertEqual(code, 1)
        self.assertIn("job b", err)
        self.are(a="pending", b="dead")
        self.says("job a", "dlq", "retry", "b")

    def test_a_death_enqueues_the_on_dead_line_but_its_own_does_not(self):
        self.ok("config", "set", "max-retries", "1")
        self.ok("config", "set", "on-dead", 'echo "$QUEUECTL_DEAD_ID, $QUEUECTL_DEAD_ERROR: '
                '$QUEUECTL_DEAD_COMMAND" >>"%s"; exit 3' % self.path("mail"))
        self.enqueue("true", id="b", run_after=LATER)
        self.prints("cancel", "b")
        self.ok("enqueue", "--id", "a", "--", "exit 7 #" + "x" * 110000)
        self.cli("drain")
        self.wait_for("dead", 2)
        mail = self.read("mail")
        self.assertEqual((mail[:17], mail.count("\n")), ("a, exit 7: exit 7", 1))
        self.assertLessEqual(len(mail), 100020)
        self.assertEqual(self.cli("run", "--id", "r", "--", "exit 3")[0], 3)  # it works that too
        self.assertIn("r, exit 3", self.read("mail"))
        self.assertEqual(len(self.jobs()), 5)

    def test_completed_jobs_are_deleted_after_their_retention(self):
        self.ok("config", "set", "retention", "1ms")
        self.daemon("--workers", "1")
        self.enqueue("false", id="dead", max_retries=1)
        kept = self.enqueue("true")
        self.wait_for("completed")
        finished = ms(self.show(kept, "finished_at")[0])
        wait_until(lambda: self.states() == {"dead": "dead"}, "it is deleted")
        self.assertGreaterEqual(time.time() * 1000 - finished, 1990)
        self.assertEqual(self.rows("SELECT DISTINCT job FROM attempts"), [("dead",)])

class ToolkitTest(QueueCase):
    """What operators reach for, with a daemon and without one."""

    def test_show_tells_what_a_job_waits_for(self):
        self.enqueue("true", id="later", run_after=LATER)
        self.enqueue("true", id="now")
        self.assertIn(LATER, self.show("later", "waiting_for")[0])
        self.assertIn("worker start", self.show("now", "waiting_for")[0])
        self.ok("pause", "--reason", "disk swap")
        self.assertIn("resume", self.show("now", "waiting_for")[0])
        self.ok("resume")
        self.ok("drain")
        waits, (one,) = self.show("now", "waiting_for", "history")
        self.assertEqual((waits, one["number"], one["exit_code"], one["error"]), (None, 1, 0, None))

    def test_lists_are_filtered(self):
        for job_id, command in (("a", "echo make"), ("b", "true"), ("c-make", "true"), ("d", "true 0%")):
            self.enqueue(command, id=job_id)
        self.prints("cancel", "b")
        self.ok("drain")
        self.enqueue("true", id="e")
        self.table(lambda args: " ".join(self.prints("list", "-q", *args.split()).split()),
                   ("", "a b c-make d e"), ("--state pending", "e"), ("--limit 2", "d e"), ("--match _", ""),
                   ("--state pending --state cancelled", "b e"), ("--match make", "a c-make"),
                   ("--match 0%", "d"), ("--state dead", ""), ("--match e --limit 1", "e"))
        self.assertEqual(self.ok("list", "--state", "dead"), [])

    def test_a_pause_starts_nothing_new_and_outlives_the_daemon(self):
        daemon = self.daemon("--workers", "2")
        self.enqueue(self.gate(), id="runs", timeout=0)
        self.wait_for("processing")
        self.assertEqual(self.prints("pause", "--reason", "disk swap"),
                         '{"success":true,"message":"Queue paused"}\n')
        self.assertIn("disk swap", self.cli("enqueue", "--id", "waits", "--", "true")[2])
        self.open_gate()
        self.wait_for("completed")
        self.kill(daemon)
        self.daemon()
        self.assertEqual((self.ok("status")["paused"], self.states()["waits"]), ("disk swap", "pending"))
        self.ok("pause")
        self.assertEqual(self.ok("status")["paused"], "paused")
        self.assertEqual(self.prints("resume"), '{"success":true,"message":"Queue resumed"}\n')
        self.wait_for("completed", 2)
        self.assertNotIn("paused", self.ok("status"))

    def test_cancel_is_an_end_of_its_own(self):
        self.ok("config", "set", "on-dead", "true")
        self.enqueue("true", id="waits", run_after=LATER)
        self.assertEqual(self.prints("cancel", "waits"),
                         '{"success":true,"message":"Job waits cancelled"}\n')
        self.daemon("--workers", "2")
        self.enqueue("sleep 60 & echo $! >pid; wait", id="runs", timeout=0, cwd=self.dir)
        self.enqueue("trap 'exit 0' TERM; echo up >up; while :; do sleep 0.02; done", id="good",
                     timeout=0, cwd=self.dir)
        wait_until(lambda: self.read("pid") and self.read("up"), "they run")
        self.enqueue("true", id="later", run_after=LATER)
        self.prints("cancel", "--all")
        self.are(waits="cancelled", runs="cancelled", later="cancelled", good="completed")
        self.has("runs", error="cancelled", attempts=1)
        self.assertNotIn(int(self.read("pid")), processes_of(self.dir))
        self.assertEqual(self.ok("status")["jobs"], dict(COUNTS, completed=1, cancelled=3))
        self.assertEqual((self.ok("dlq", "list"), len(self.jobs("cancelled"))), ([], 3))
        self.assertEqual(self.cli("check", "--max-dead", "0")[0], 0)
        self.says("runs", "cancel", "runs")
        self.says("good", "dlq", "retry", "good")

    def test_what_has_ended_is_deleted(self):
        self.ok("config", "set", "max-retries", "1")
        for name, command in (("a", "true"), ("b", "false"), ("c", "true"), ("d", "echo d; false")):
            self.enqueue(command, id=name)
        self.enqueue("true", id="e", run_after=LATER)
        self.cli("drain")
        self.says("job e", "delete", "a", "e")
        self.says("no job x", "delete", "a", "x")
        for args, message in (("--state completed --older-than 1h", "0 jobs deleted"),
                              ("b", "Job b deleted"), ("--state completed", "2 jobs deleted"),
                              ("--all --older-than 0s", "1 job deleted")):
            self.assertEqual(self.ok("delete", *args.split()), {"success": True, "message": message})
        self.are(e="pending")
        self.assertEqual(self.rows("SELECT COUNT(*) FROM attempts"), [(0,)])

    def test_large_selections_go_page_by_page(self):
        self.ok("enqueue", "-", stdin='{"command":"true"}\n' * 2007)
        self.assertIn("2007 jobs cancelled", self.prints("cancel", "--state", "pending"))
        ids = [job["id"] for job in self.jobs()]
        self.prints("retry", *ids)
        self.assertEqual(self.ok("status")["jobs"]["pending"], 2007)
        self.prints("cancel", "--all")
        self.refused("wait", *ids)
        self.assertIn("2007 jobs deleted", self.prints("delete", "--all"))

    def test_wait_tells_how_jobs_ended(self):
        self.daemon("--workers", "2")
        self.enqueue("true", id="good")
        self.enqueue("exit 7", id="bad", max_retries=1)
        self.enqueue("kill -9 $$", id="killed", max_retries=1)
        self.enqueue("true", id="later", run_after=LATER)
        self.assertEqual(self.ok("wait", "good")["message"], "1 job completed")
        self.says("job bad died: exit 7", "wait", "bad", status=7)
        self.says("killed by SIGKILL", "wait", "killed", status=125)
        self.refused("wait", "good", "bad")
        self.says("no job none", "wait", "good", "none")
        one, all_of_them = self.spawn("wait", "later"), self.spawn("wait")
        self.prints("cancel", "later")
        self.assertEqual(one.wait(), 125)
        self.assertIn(b"Queue is empty", all_of_them.communicate()[0])

    def test_logs_are_the_bytes_of_each_attempt(self):
        self.daemon("--workers", "1")
        self.haste()
        os.mkfifo(self.path("gate"))
        self.enqueue(r"printf '\377\000%s\r\n' $QUEUECTL_ATTEMPT; read line <gate; exit 28",
                     id="a", max_retries=2, timeout=0, cwd=self.dir)
        process = self.spawn("logs", "-f", "a", stderr=subprocess.PIPE)
        for line in (b"\xff\0001\r\n", b"\xff\0002\r\n"):
            self.assertEqual(process.stdout.readline(), line)
            self.open_gate()
        out, err = process.communicate()
        self.assertEqual((out, process.returncode), (b"", 0))
        self.assertIn(b"attempt 1 of 2 failed: exit 28; next in ", err)
        self.assertIn(b"exit 28", err.splitlines()[-1])
        self.assertEqual(self.prints("logs", "a", "--attempt", "1"), "\udcff\0001\r\n")
        self.assertEqual(self.prints("logs", "a"), "\udcff\0002\r\n")
        self.refused("logs", "a", "--attempt", "3")
        self.enqueue("seq 100", id="b")
        self.ok("wait", "b")
        self.assertEqual(self.prints("logs", "b", "-n", "2"), "99\n100\n")
        self.enqueue("true", id="c", run_after=LATER)
        self.says("job c", "logs", "c")

    def test_following_is_live_and_exact_even_when_output_is_cut(self):
        self.daemon("--workers", "1")
        self.ok("config", "set", "output-limit", "1000")
        os.mkfifo(self.path("gate"))
        self.enqueue("echo first; read line <gate; seq 400000", id="a", timeout=0, cwd=self.dir)
        process = self.spawn("logs", "-f", "a", stderr=subprocess.PIPE)
        self.assertEqual(process.stdout.readline(), b"first\n")
        self.open_gate()
        shown, notes = process.communicate()
        cut = sum(int(count) for count in re.findall(rb"^\D*(\d+) bytes", notes, re.M))
        whole = b"".join(b"%d\n" % number for number in range(1, 400001))
        self.assertEqual(len(shown) + cut, len(whole), notes)
        self.assertTrue(whole.endswith(shown[-900:]))

    def test_commands_that_watch_say_that_the_jobs_go_on(self):
        def watches(process, seen=[]):
            seen.append(b" ".join(stat_of(process.pid)))  # it waits when its times stand still
            folder = "/proc/%d/fd/" % process.pid
            with contextlib.suppress(OSError):
                return seen[-1][:1] == b"S" and len(set(seen[-4:])) == 1 < len(seen) - 3 and self.db in [
                    os.readlink(folder + fd) for fd in os.listdir(folder)]
        self.enqueue("true", id="a", run_after=LATER)
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        for args in (("wait", "a"), ("status", "--watch"), ("logs", "-f", "a")):
            process = self.spawn(*args, stdout=theirs, stderr=subprocess.PIPE,
                                 env=dict(self.env, TERM="xterm"))
            wait_until(lambda: watches(process), "it watches")
            process.send_signal(signal.SIGINT)
            code, _, err = self.ended(process)
            self.assertEqual((args, code), (args, 130))
            self.assertRegex(err, "the jobs? goe?s? on")
        self.are(a="pending")

    def test_some_workers_can_be_stopped_and_their_jobs_given_back(self):
        daemon = self.daemon("--workers", "3")
        self.enqueue("sleep 60", id="a", timeout=0)
        self.wait_for("processing")
        listed = self.ok("worker", "list")
        self.assertEqual(sorted((one["state"], str(one["job"])) for one in listed),
                         [("busy", "a"), ("idle", "None"), ("idle", "None")])
        self.assertEqual({one["pid"] for one in listed}, set(self.workers_of(daemon)))
        self.assertEqual(listed, self.ok("worker", "list"))
        self.assertEqual(self.ok("worker", "stop", "--count", "2")["message"], "Stopped 2 workers")
        wait_until(lambda: not [one for one in self.ok("worker", "list")
                                if one["state"] == "leaving" and not one["job"]], "the idle ones left")
        self.ok("worker", "stop", "--now")
        self.wait_for("pending")
        self.has("a", attempts=0, history=[])
        self.assertEqual(self.ok("worker", "list"), [])
        self.assertIn("worker start", self.cli("enqueue", "--", "true")[2])

class RunTest(QueueCase):
    """What works without a daemon: for crontabs, and by hand."""

    def test_run_hands_on_output_and_exit_code(self):
        self.ok("config", "set", "max-delay", "50ms")
        self.enqueue("true", id="other")
        for workers in (None, "0", "1"):  # without a daemon, with one that has none, and served
            if workers:
                self.daemon("--workers", workers)
            for args, told in (
                    (["--max-retries", "1", "--", "echo out; echo err >&2; exit 5"], (5, "out\nerr\n")),
                    (["--max-retries", "1", "--", "kill -9 $$"], (125, "")),
                    (["--", "echo hi"], (0, "hi\n"))):
                self.assertEqual(self.cli("run", *args)[:2], told)
            self.assertEqual(self.cli("run", "--quiet", "--", "echo x; test $QUEUECTL_ATTEMPT = 2"),
                             (0, "", ""))
            code, out, err = self.cli("run", "--quiet", "--max-retries", "1", "--", "echo why; exit 6")
            self.assertEqual((code, out, err.count("\n")), (6, "why\n", 1))
            self.assertIn("exit 6", err)
            if workers != "1":
                self.has("other", state="pending")  # nobody else's job is worked
                self.kill_all()

    def test_a_drain_under_a_pause_does_not_wait_for_what_has_failed(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue("false", id="a")
        self.wait_for("failed")
        self.ok("pause")
        self.kill(daemon)
        self.ok("retry", "a")
        self.assertEqual(self.ok("drain")["message"], "Queue drained")
        self.are(a="failed")

    def test_a_pause_makes_a_run_wait_and_leaves_nothing_to_drain(self):
        self.ok("pause")
        run = self.spawn("run", "--id", "a", "--", "echo", "through")
        self.wait_for("pending")
        self.ok("drain")
        self.are(a="pending")
        self.ok("resume")
        self.assertEqual((run.communicate()[0], run.returncode), (b"through\n", 0))

    def test_a_held_key_is_named_and_its_holder_worked_if_nobody_does(self):
        self.enqueue(self.gate(), id="holder", unique="k", timeout=0)
        works = self.spawn("run", "--quiet", "--unique", "k", "--", "false")
        self.wait_for("processing")
        code, out, err = self.cli("run", "--unique", "k", "--", "true")
        self.assertEqual((code, out), (0, ""))
        self.assertIn("holder", err)
        self.assertEqual(self.cli("run", "--quiet", "--unique", "k", "--", "true"), (0, "", ""))
        self.open_gate()
        self.assertEqual((works.communicate()[0], works.returncode), (b"", 0))
        self.are(holder="completed")

    def test_runs_go_on_beside_a_daemon_that_comes_and_dies(self):
        runs = [self.spawn("run", "--", self.gate(name)) for name in "ab"]
        for run in runs:
            self.assertEqual(run.stdout.readline(), b"started\n")
        daemon = self.daemon("--workers", "1")
        self.assertEqual(self.ok("status")["jobs"]["processing"], 2)
        runs.append(self.spawn("run", "--", self.gate("c")))
        self.assertEqual(runs[2].stdout.readline(), b"started\n")
        self.kill(daemon)
        for name, run in zip("abc", runs):
            self.open_gate(name)
            self.assertEqual((run.communicate()[0], run.returncode), (b"through\n", 0))
        self.assertEqual(self.rows("SELECT DISTINCT attempts, state FROM jobs"), [(1, "completed")])

    def test_a_run_that_is_interrupted_or_whose_reader_has_gone_cancels_its_job(self):
        for served, number, code in ((False, signal.SIGINT, 130), (True, signal.SIGTERM, 125)):
            if served:
                self.daemon("--workers", "1")
            run = self.spawn("run", "--id", "job%d" % code, "--", "echo started; sleep 60")
            self.assertEqual(run.stdout.readline(), b"started\n")
            self.assertEqual(self.stop(run, number), code)
            self.has("job%d" % code, state="cancelled", error="cancelled")
        run = self.spawn("run", "--id", "pipe", "--", "while echo x; do sleep 0.05; done")
        self.assertEqual(run.stdout.readline(), b"x\n")
        run.stdout.close()
        self.assertEqual(run.wait(30), 125)
        self.wait_for("cancelled", 3)

    def test_drain_works_what_is_ready_and_waits_out_backoffs(self):
        self.ok("config", "set", "max-delay", "300ms")
        self.enqueue("true", id="later", run_after=LATER)
        self.assertEqual(self.prints("drain"), '{"success":true,"message":"Queue drained"}\n')
        self.enqueue("test -e again || { touch again; exit 1; }", id="twice", cwd=self.dir)
        for _ in range(5):
            self.enqueue("true")
        self.assertEqual(self.ok("drain", "--count", "3")["message"], "Queue drained")
        self.has("twice", state="completed", attempts=2)
        self.enqueue("false", max_retries=1)
        self.refused("drain")
        self.ok("drain")  # it died before
        self.has("later", state="pending")

    def sleeps(self, pid):
        """How often a process has gone to sleep so far; -1 while it is awake."""
        status = read("/proc/%d/status" % pid)
        return (int(re.search(rb"\nvoluntary_ctxt_switches:\s+(\d+)", status).group(1))
                if b"State:\tS" in status else -1)

    def test_a_stopped_drain_keeps_the_rest(self):
        self.enqueue(self.gate(), id="a", timeout=0)
        self.enqueue("true", id="b")
        drain = self.spawn("drain")
        self.wait_for("processing")
        slept = self.sleeps(drain.pid)
        drain.send_signal(signal.SIGINT)
        wait_until(lambda: self.sleeps(drain.pid) > slept, "it stops")
        self.open_gate()
        self.assertEqual(drain.wait(30), 130)
        self.are(a="completed", b="pending")

class WireTest(QueueCase):
    """What programs send, the original's client first."""

    STATUS = {"success": True, "message": {"jobs": COUNTS, "workers": 0}}

    def test_the_originals_messages_and_the_toolkits_are_understood(self):
        self.daemon()
        for request, message in (
                ({"command": "worker", "option": "start", "flag": "count", "value": "3"},
                 "Started 3 workers"),
                ({"command": "enqueue", "option": None, "flag": None,
                  "value": '{"id":"a","command":"true"}'}, "Job enqueued"),
                ({"command": "config", "option": "set", "flag": "max-retries", "value": "2"},
                 "Updated max-retries to 2"),
                ({"command": "config", "option": None, "flag": "max-retries", "value": "1"},
                 "Updated max-retries to 1"),
                ({"command": "list", "option": None, "flag": "--state", "value": "dead"}, []),
                ({"command": "dlq", "option": "list"}, []),
                ({"command": "worker", "option": "stop"}, "Stopped workers")):
            answer = self.ask(json.dumps(request).encode())
            self.assertEqual((answer["success"], answer["message"]), (True, message))
        self.enqueue("false", id="b", max_retries=1)
        self.cli("drain")
        self.assertEqual([job["id"] for job in self.request("dlq", "list")], ["b"])
        self.assertEqual(self.request("dlq", "retry", "b"), "Job b added to queue")
        self.assertEqual(self.request("metrics")["total_jobs"], 2)
        self.assertEqual(self.request("daemon", "status")["db"], self.db)
        for command, state in (("cancel", "cancelled"), ("retry", "pending"), ("cancel", "cancelled")):
            self.assertNotIn("Error", self.request(command, value="b"))
            self.has("b", state=state)
        self.request("pause", value={"reason": "x"})
        self.assertEqual(self.request("status")["paused"], "x")
        self.request("resume")
        self.assertNotIn("Error", self.request("delete", value="b"))
        self.assertEqual((self.states(), self.request("status").get("paused")), ({"a": "completed"}, None))

    def test_a_request_ends_with_a_newline_or_once_it_is_whole(self):
        self.daemon()
        for pieces in ([b'{"command":"status"}\n'], [b'{"command":"status"}'],
                       [b'{"comm', b'and":"sta', b'tus"}'],
                       [b' \n\r\n{"command": "status", "option": null}\r\n']):
            self.assertEqual(self.asked(pieces, 1), [self.STATUS])
        self.assertEqual(self.ask(b'{"command":"status"}', close=True), self.STATUS)

    def test_several_on_one_connection_are_answered_in_order(self):
        self.daemon()
        self.ok("enqueue", "-", stdin='{"command":"echo %s"}\n' % ("x" * 3000) * 900)
        answers = self.asked([b'{"command":"enqueue","value":"{\\"command\\":\\"true\\"}"}\n'
                              b'{"command":"status"}\n', b'nonsense\n{"command":"list"}\n',
                              b'{"command":"status"}\n' * 500], 504)
        self.assertEqual(answers[0]["message"], "Job enqueued")
        self.assertEqual(answers[1]["message"]["jobs"]["pending"], 901)
        self.assertIs(answers[2]["success"], False)
        self.assertEqual(len(answers[3]["message"]), 901)
        self.assertEqual(answers[4:], [answers[1]] * 500)

    def test_garbage_gets_an_error_and_the_daemon_lives_on(self):
        self.daemon()
        version = self.request("daemon", "status")["version"]
        for data, words in (
                (b"garbage\n", "JSON"), (b"\xff\n", "UTF-8"), (b"[]\n", "object"), (b"5\n", "object"),
                (b'{"command":"x"}\n', version), (b'{"command":["x"]}\n', ""), (b"{}\n", "command"),
                (b'{"command":"list","option":"all"}\n', version),
                (b'{"command":"list","value":{"colour":1}}\n', version),
                (b'{"command":"show","flag":"--colour","value":"x"}\n', version),
                (b"[" * 100000 + b"\n", "nest"), (b'{"a":' * 100000 + b"1" + b"}" * 100000, "nest"),
                (b'{"command":"list","flag":"--state","value":"odd"}\n', "state"),
                (b'{"command":"enqueue"}\n', "job"), (b'{"command":"enqueue","value":5}\n', "job"),
                (b'{"command":"worker","option":"start","flag":"count","value":"0"}\n', "count"),
                (b'{"command":"worker","option":"start","flag":"count","value":true}\n', "count"),
                (b'{"command":"cancel","value":"none"}\n', "none"),
                (b'{"command":"status","db":"/other"}\n', "/other"),
                (b'{"command":"enqueue","value":"{\\"command\\":\\"\\ud800\\"}"}\n', "command")):
            with self.subTest(data=data[:40]):
                answer = self.ask(data)
                self.assertIs(answer["success"], False)
                self.assertRegex(answer["message"], "^Error.*" + re.escape(words))
        for data in (b'{"command":"sta', b"garb"):
            self.assertIs(self.ask(data, close=True)["success"], False)
        self.assertEqual(self.ask(b'{"command":"status"}'), self.STATUS)

    def test_too_large_a_request_is_refused_and_others_go_on(self):
        self.daemon()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.sock)
            with contextlib.suppress(OSError):  # cut off before all is sent
                for _ in range(18):
                    client.sendall(b"x" * (1 << 20))
            with contextlib.suppress(OSError):
                self.assertIn(b'"success":false', client.recv(1 << 16))
            self.assertEqual(self.ask(b'{"command":"status"}'), self.STATUS)
        value = json.dumps({"command": "true", "env": {"A%d" % n: "x" * 99999 for n in range(9)}})
        self.assertEqual(self.request("enqueue", value=value), "Job enqueued")

    def test_slow_clients_hold_nobody_up(self):
        self.daemon()
        self.ok("enqueue", "-", stdin='{"command":"echo %s"}\n' % ("x" * 3000) * 1000)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(101)]
        for client in clients:
            self.addCleanup(client.close)
            client.connect(self.sock)
            client.sendall(b'{"command":')
        clients[0].sendall(b'"list"}\n')  # and does not read the answer
        self.assertEqual(self.request("status")["jobs"]["pending"], 1000)
        with clients[0].makefile("r") as lines:
            self.assertEqual(len(json.loads(lines.readline())["message"]), 1000)

class OriginalTest(QueueCase):
    """A database that the original QueueCTL made, and rows that any program inserts."""

    def test_its_settings_are_kept(self):
        make_original(self.db, """INSERT INTO config VALUES ('max-retries', '2.0'), ('timeout', '60000.0'),
                                  ('delay-base', '0.0'), ('backoff', NULL), ('theirs', 'x');""")
        shown = self.ok("config", "list")
        self.assertEqual({key: shown[key] for key in SETTINGS},
                         dict(SETTINGS, **{"max-retries": 2, "timeout": 60000}))
        self.enqueue("true", id="a")
        self.has("a", max_retries=2, timeout=60000)
        self.ok("config", "set", "max-retries", "1")
        self.assertEqual(self.rows("SELECT value FROM config WHERE key = 'theirs'"), [("x",)])

    def test_its_jobs_run_and_one_it_was_running_as_if_it_had_not_begun(self):
        make_original(self.db, """
            INSERT INTO config VALUES ('delay-base', '1.0');
            INSERT INTO metrics (total_commands) VALUES (7);
            INSERT INTO jobs (id, command, state, attempts, locked_at, started_at) VALUES
                ('waiting', 'echo one', 'pending', 0, NULL, NULL), ('done', 'true', 'completed', 1, NULL,
                 NULL), ('gone', 'false', 'dead', 3, NULL, NULL), ('held', 'echo two', 'processing', 0,
                 CURRENT_TIMESTAMP, CURRENT_TIMESTAMP), ('again', 'echo 3', 'processing', 2,
                 CURRENT_TIMESTAMP, CURRENT_TIMESTAMP), ('failed', 'echo four', 'failed', 1, NULL, NULL);""")
        self.daemon("--workers", "1")
        self.wait_for("completed", 5)
        self.assertEqual(dict(self.rows("SELECT id, attempts FROM jobs")), {
            "waiting": 1, "done": 1, "gone": 3, "held": 1, "again": 3, "failed": 2})
        self.assertEqual(self.rows("SELECT COUNT(*), COUNT(error) FROM attempts"), [(4, 0)])
        self.assertRegex(self.show("waiting", "created_at")[0], r"^\d{4}-.*T.*\.\d{3}Z$")
        self.assertEqual([job["id"] for job in self.ok("dlq", "list")], ["gone"])

    def test_rows_inserted_by_hand_become_jobs(self):
        self.enqueue("true", id="mine")
        self.ok("drain")
        for given in (("state", "NULL", "'pending'"), ("run_after", "'past'", "'2026-01-15 10:30:00'"),
                      ("run_after", "'later'", "'2100-01-01 00:00:00'"), ("run_after", "'bad'", "'soon'"),
                      ("created_at", "'worse'", "X'00'"), ("state", "'odd'", "'waiting'"),
                      ("priority", "'high'", "5")):
            self.rows("INSERT INTO jobs (id, command, %s) VALUES (%s, 'echo $QUEUECTL_JOB_ID', %s)" % given)
        self.assertEqual(len(self.jobs()), 8)
        self.cli("drain")
        self.has("later", state="pending", run_after=LATER)
        for job_id, field in (("bad", "run_after"), ("worse", "created_at"), ("odd", "state")):
            state, error = self.show(job_id, "state", "error")
            self.assertEqual((state, field in error), ("dead", True), error)
        ran = {output.decode().strip() for output, in self.rows(
            "SELECT output FROM attempts WHERE job != 'mine' AND exit_code = 0")}
        self.assertEqual(ran | {"mine"}, {job["id"] for job in self.jobs("completed")})
        self.assertEqual(len(ran), 3)
        self.daemon("--workers", "1")
        self.rows("INSERT INTO jobs (id, command) VALUES ('theirs', 'true')")
        self.wait_for("completed", 5)
        waited, = self.rows("""SELECT (julianday(started_at) - julianday(created_at)) * 86400 FROM jobs
                               WHERE id = 'theirs'""")[0]
        self.assertLess(waited, 2.5)  # created_at is in whole seconds
        self.rows("DELETE FROM jobs WHERE id = 'theirs'")
        self.assertEqual(self.request("status")["jobs"]["completed"], 4)

class PlaceTest(QueueCase):
    """Where a queue lives, and which one is meant."""

    def test_the_default_database_is_beside_the_script_or_the_users_own(self):
        own = self.path("home/.local/state/queuectl") if os.geteuid() else "/var/lib/queuectl"

        def default(folder, mode=0o755):
            folder = self.path(folder)
            os.makedirs(folder, exist_ok=True)
            os.chmod(folder, mode)
            err = self.ended(self.started(
                driver(script=folder + "/queuectl.py", constants="queuectl.DEFAULT_SOCKET = %r" % self.sock)
                + ["daemon", "status"], ready=False, cwd="/", stderr=subprocess.PIPE,
                env=dict(self.env, DB_PATH="", SOCKET_PATH="", HOME=self.path("home"))))[2]
            return os.path.dirname(re.search(r"/\S+?\.db", err).group())
        os.mkdir(self.path("mine"))
        os.mkdir(self.path("link"))
        os.symlink("../mine/queuectl.py", self.path("link/queuectl.py"))
        self.table(default, ("mine", self.path("mine")), ("link", self.path("mine")), ("bin", own),
                   ("x/sbin", own), ("lib/python3/x", own), ("mine", 0o777, own), ("mine", 0o1777, own),
                   ("bin/x", self.path("bin/x")))

    def test_nothing_is_made_beside_what_is_no_queue(self):
        os.mkdir(self.path("etc"))
        path = self.path("etc/passwd")
        with contextlib.closing(sqlite3.connect(self.path("theirs"))) as theirs:
            theirs.execute("CREATE TABLE other (a)")
        for data in (b"root:x:0:0::/root:/bin/sh\n", b"SQLite format 3", read(self.path("theirs")),
                     b"SQLite format 3\0" + b"x" * 5000):
            with open(path, "wb") as file:
                file.write(data)
            os.chmod(path, 0o644)
            for line in ("status", "enqueue {}", "enqueue -- true", "list", "daemon", "worker start",
                         "run -- true", "drain", "backup %s2" % path, "config set jitter 5", "doctor",
                         "check", "cancel --all"):
                with self.subTest(line=line, data=data[:17]):
                    code, out, err = self.cli("--db", path, *line.split())
                    self.assertEqual(code, 3 if line == "check" else 1)
                    self.assertIn(path, out + err)
                    self.assertEqual((os.listdir(self.path("etc")), read(path)), (["passwd"], data))
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o644)

    def test_what_can_be_no_database_is_refused(self):
        os.symlink("nowhere", self.path("link"))
        os.mkdir(self.path("shut"), 0o500)
        for db, words in (("no/q.db", "no"), ("shut", "shut"), ("link", "link"), ("shut/q.db", "shut"))[
                :3 + bool(os.geteuid())]:  # root may write anywhere
            for args in (["enqueue", "--", "true"], ["drain"], ["daemon"]):
                self.says(self.path(words), "--db", self.path(db), *args)
        self.assertEqual(sorted(os.listdir(self.dir)) + os.listdir(self.path("shut")), ["link", "shut"])

    def test_what_was_given_decides_the_queue(self):
        self.daemon()
        db, self.env["DB_PATH"] = self.db, self.path("other.db")
        self.says(db, "enqueue", "--", "true")  # its socket serves another
        self.assertEqual(self.ok("list"), [])
        self.assertFalse(os.path.exists(self.path("other.db")))
        self.env["DB_PATH"] = ""
        self.enqueue("true")                    # a socket alone is enough
        self.assertEqual(len(self.jobs()), 1)
        self.assertIn("1 job", self.ok("backup", self.path("copy"))["message"])
        self.env["SOCKET_PATH"] = self.path("nobody")
        for args in (["list"], ["enqueue", "--", "true"], ["status"]):
            self.says("--db", *args)
        self.env.update(DB_PATH=db, SOCKET_PATH="")
        code, _, err = self.cli("enqueue", "-q", "--", "true")  # the daemon is found by its database
        self.assertEqual((code, "not running" in err), (0, False))
        self.env["DB_PATH"] = "q.db"
        self.assertEqual(len(self.ok("list", cwd=self.dir)), 2)
        self.assertEqual(len(self.ok("--db", db, "--socket", self.path("nobody"), "list")), 2)
        self.says("107", "--socket", "/" + "x" * 107, "status")

    def test_a_default_socket_that_is_taken_is_left_alone(self):
        default = self.path("default.sock")
        open(default, "w").close()
        self.env["SOCKET_PATH"] = ""
        self.driven("", "--workers", "1", constants="queuectl.DEFAULT_SOCKET = %r" % default)
        self.assertEqual((read(default), self.ok("daemon", "status")["socket"]),
                         (b"", self.db + "-run/socket"))
        self.assertNotIn("not running", self.cli("enqueue", "--", "true")[2])
        self.wait_for("completed")

    def test_with_nothing_given_another_queue_at_the_default_socket_is_mentioned(self):
        self.daemon()
        os.mkdir(self.path("mine"))
        call = driver(script=self.path("mine/queuectl.py"),
                      constants="queuectl.DEFAULT_SOCKET = %r" % self.sock)
        self.env.update(DB_PATH="", SOCKET_PATH="")
        for args, code in ((["list"], 0), (["enqueue", "--", "true"], 1)):
            status, _, err = self.ended(self.started(call + args, False, stderr=subprocess.PIPE))
            self.assertEqual((status, "DB_PATH=" + self.db in err), (code, True), err)
        self.assertEqual(os.listdir(self.path("mine")), [])

class DaemonTest(QueueCase):
    """The daemon and its workers as their users see them."""

    def test_a_second_daemon_is_refused_with_the_pid_of_the_first(self):
        first = self.daemon()
        self.says("pid %d" % first.pid, "--socket", self.path("s2"), "daemon")
        status = self.ok("daemon", "status")
        self.assertEqual([status[key] for key in ("pid", "db", "socket", "workers", "wanted", "stopping")],
                         [first.pid, self.db, self.sock, 0, 0, False])
        self.assertLessEqual({"version", "uptime_s"}, set(status))

    def test_a_given_socket_that_is_taken_is_an_error_but_a_stale_one_is_replaced(self):
        for plant, remove in ((lambda path: open(path, "w").close(), os.unlink), (os.mkdir, os.rmdir),
                              (lambda path: os.symlink("nowhere", path), os.unlink)):
            plant(self.sock)
            self.says(self.sock, "daemon")
            remove(self.sock)
        self.kill(self.daemon())
        self.assertTrue(os.path.exists(self.sock))
        daemon = self.daemon()
        self.assertEqual(self.ask(b'{"command":"status"}'), WireTest.STATUS)
        self.env["DB_PATH"] = self.path("other.db")
        self.says(self.sock, "daemon")
        self.assertEqual(self.stop(daemon), 0)
        self.assertFalse(os.path.exists(self.sock))

    def test_a_worker_start_brings_up_a_daemon_and_the_next_adds(self):
        code, out, _ = self.script("worker", "start", "-c", "2")  # it ends, so nobody has its pipes
        self.assertEqual((code, out), (0, '{"success":true,"message":"Started 2 workers"}\n'))
        self.assertEqual(self.ok("worker", "start")["message"], "Started 1 worker")
        self.assertEqual(self.prints("status"), '{\n  "jobs": {\n    "pending": 0,\n'
                         '    "processing": 0,\n    "completed": 0,\n    "failed": 0,\n'
                         '    "dead": 0\n  },\n  "workers": 3\n}\n')
        self.says("1000", "worker", "start", "--count", "998")
        self.enqueue("false", max_retries=1)
        self.wait_for("dead")
        self.assertEqual(self.prints("daemon", "stop"), '{"success":true,"message":"Stopped daemon"}\n')
        self.says("worker start", "daemon", "stop")
        self.ok("worker", "start")
        self.assertEqual(self.ok("status")["workers"], 1)

    def test_a_stop_waits_until_a_second_signal_or_the_end_of_its_grace(self):
        self.enqueue("trap '' TERM; sleep 300; sleep 300", id="a", timeout=0)
        for grace in (None, "0s", "50ms"):
            daemon = self.daemon("--workers", "1")
            self.wait_for("processing")
            if grace:
                os.kill(daemon.pid, signal.SIGSTOP)  # two signals that it could not take yet are one
                stop = self.spawn("daemon", "stop", "--grace", grace)
                pause(0.3)
                os.kill(daemon.pid, signal.SIGCONT)
                self.assertEqual(stop.wait(30), 0)
            else:
                daemon.terminate()
                wait_until(lambda: self.ok("daemon", "status")["stopping"], "it is stopping")
                daemon.send_signal(signal.SIGINT)
            self.assertEqual(daemon.wait(30), 0)
            self.has("a", state="pending", attempts=0, history=[])
            self.assertEqual(processes_of(self.dir), [])

    def test_its_log_tells_what_happened_but_no_payload(self):
        daemon = self.daemon("--workers", "1")
        self.haste()
        self.enqueue("secret=1; exit 3", id="a", max_retries=2)
        self.wait_for("dead")
        self.stop(daemon)
        log = self.read("q.db-run/log")
        for words in ("started", "exit 3", "dead", "stopped"):
            self.assertIn(words, log)
        self.assertNotIn("secret", log)
        self.assertTrue(all(re.match(r"\d{4}-\d\d-\d\dT\S+Z ", line) for line in log.splitlines()))

    def test_no_statement_scans_or_sorts_the_jobs(self):
        hook = """if True:
            def note(connection, sql, run):
                with open(%r, "a") as file:
                    file.write(sql.strip() + "\\0")
                return run()
            on_sql(note)""" % self.path("seen")
        self.haste()
        self.driven(hook, "--workers", "1")
        for job in ({"command": "true"}, {"command": "false", "max_retries": 2, "unique": "k"},
                    {"command": "sleep 60", "timeout": 0, "priority": -1, "id": "c"}):
            self.request("enqueue", value=json.dumps(job))
        self.wait_for("processing")
        self.request("cancel", value="c")
        self.wait_for("cancelled")
        found = {sql for sql in self.read("seen").split("\0")
                 if re.match("SELECT|UPDATE|DELETE|INSERT|WITH", sql)}
        self.assertGreater(len(found), 10)
        with contextlib.closing(sqlite3.connect(self.db)) as connection:
            for sql in found:
                values = dict.fromkeys(re.findall(r":(\w+)", sql), 1) or (1,) * sql.count("?")
                plan = "\n".join(row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + sql, values))
                with self.subTest(sql=sql):
                    self.assertNotRegex(plan, r"SCAN (TABLE )?(jobs|attempts)\b(?!.*INDEX)|TEMP B-TREE")

class MonitoringTest(QueueCase):
    """What a monitoring system asks."""

    def exposed(self):
        """{sample: value} of `metrics --format prometheus`, after a check of its form."""
        samples, kinds = {}, {}
        for line in self.prints("metrics", "--format", "prometheus").splitlines():
            if line.startswith("# HELP "):
                kinds[line.split(" ")[2]] = None
            elif line.startswith("# TYPE "):
                name, kind = line.split(" ")[2:]
                self.assertIsNone(kinds[name])
                kinds[name] = kind
            else:
                self.assertRegex(line, r'^queuectl_[a-z_]+(\{state="[a-z]+"\})? [0-9.e+]+$')
                name, value = line.split(" ")
                kind = kinds[re.sub("_(sum|count)$", "", name.split("{")[0])]
                self.assertEqual(kind == "counter", name.endswith("_total"))
                samples[name] = float(value)
        return samples

    def test_the_samples_are_those_of_the_queue(self):
        self.assertEqual(set(self.exposed().values()), {0.0})
        self.daemon("--workers", "1")
        self.enqueue("sleep 0.1")
        self.enqueue("exit 3", max_retries=1)
        self.wait_for("completed")
        self.wait_for("dead")
        shown, metrics = self.exposed(), self.ok("metrics")
        size = self.rows("PRAGMA page_count")[0][0] * self.rows("PRAGMA page_size")[0][0]
        for name, value in (
                ("jobs_enqueued_total", 2), ("jobs_completed_total", 1), ("jobs_dead_total", 1),
                ("attempts_failed_total", 1), ('jobs{state="dead"}', 1), ('jobs{state="pending"}', 0),
                ("job_duration_seconds_count", 1), ("workers", 1), ("database_bytes", size),
                ("job_duration_seconds_sum", metrics["total_runtime"])):
            self.assertEqual((name, shown["queuectl_" + name]), (name, value))
        self.assertEqual([metrics[key] for key in ("total_jobs", "completed_jobs", "uptime")],
                         [2, 1, "0 min"])
        self.assertTrue(0.1 <= metrics["average_runtime"] == metrics["max_runtime"] < 2)
        self.assertIn("total_commands", metrics)

    def test_counters_never_fall_however_the_daemon_ends(self):
        seen = []
        for stop in (self.stop, self.kill, self.kill):
            daemon = self.daemon("--workers", "1")
            job_id = self.enqueue("true")
            self.ok("wait", job_id)
            seen.append(self.exposed())
            self.ok("delete", job_id)
            stop(daemon)
        seen.append(self.exposed())
        for name in seen[0]:
            if name.endswith(("_total", "_sum", "_count")):
                values = [samples[name] for samples in seen]
                self.assertEqual(values, sorted(values), name)
        self.assertEqual(seen[-1]["queuectl_jobs_completed_total"], 3)

    def check(self, *args):
        """(exit status, line) of a `check`, which says one line and no more."""
        code, out, err = self.cli("check", *args)
        self.assertEqual((err, out.count("\n"), out.count("|")), ("", 1, code < 3))
        self.assertTrue(out.startswith(("OK", "WARNING", "CRITICAL", "UNKNOWN")[code] + " - "), out)
        return code, out

    def test_check_sees_what_waits_and_what_completed(self):
        self.enqueue("true", id="nightly-1", unique="key")
        self.rows("""INSERT INTO jobs (id, command, created_at, run_after)
                     VALUES ('old', 'true', '2026-01-01 00:00:00', '2026-01-01 00:00:00')""")
        self.ok("config", "set", "jitter", "1")  # whoever writes next takes it on
        code, line = self.check("--max-age", "1m")
        self.assertEqual(code, 2)
        self.assertIn("2 jobs waiting, 0 dead", line)
        self.assertRegex(line, r"over 60,.*\| pending=2;; dead=0;; age=\d+;;60\n")
        code, line = self.check()  # they wait, and no daemon runs
        self.assertEqual((code, "worker start" in line), (1, True))
        last = ("--completed", "nightly-", "--within", "1d")
        self.assertEqual(self.check(*last)[0], 2)
        self.daemon("--workers", "1")
        self.wait_for("completed", 2)
        self.assertEqual(self.check("--max-pending", "0", "--max-dead", "0", "--max-age", "1s", *last)[0], 0)
        for name, code in (("nightly-1", 0), ("key", 0), ("nightly-1x", 2), ("ke", 2), ("NIGHT", 2)):
            self.assertEqual((name, self.check("--completed", name, "--within", "1d")[0]), (name, code))
        self.enqueue("false", max_retries=1)
        self.wait_for("dead")
        self.assertIn("dead is 1, over 0", self.check("--max-dead", "0")[1])
        self.ok("pause", "--reason", "disk | swap")
        self.assertEqual(self.check()[0], 1)
        self.ok("resume")
        self.assertEqual(self.check("--max-dead", "1")[0], 0)

    def test_any_error_of_check_is_unknown_and_exits_3(self):
        self.assertIn(self.db, self.check()[1])
        self.enqueue("true")
        for args in ("--frob", "--max-dead -1", "--max-pending x", "--max-age 30", "--completed x",
                     "--within 1d", "--db " + self.dir, "extra", "--socket /" + "x" * 200):
            self.assertEqual((args, self.check(*args.split())[0]), (args, 3))
        for stdout, code in (("/dev/full", 3), (self.path("out"), 1)):
            with open(stdout, "w") as file:
                self.assertEqual(self.spawn("check", stdout=file).wait(), code)

class BackupTest(QueueCase):
    copy = property(lambda self: self.path("copy of 100%?#.db"))

    def dump(self, path):
        """Schema and rows, in the order of the rows."""
        with contextlib.closing(sqlite3.connect(path)) as connection:
            made = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
            pragmas = [connection.execute("PRAGMA " + name).fetchall()
                       for name in ("user_version", "page_size", "encoding", "integrity_check")]
            return made, pragmas, [connection.execute('SELECT * FROM "%s"' % name).fetchall()
                                   for kind, name, _ in made if kind == "table"]

    def test_a_copy_equals_its_original_and_is_a_queue_of_its_own(self):
        self.ok("enqueue", "-", stdin="".join('{"command":"true","id":"%d","priority":%d}\n' % (
            number * 7919 % 1000, number % 3) for number in range(1000)))
        self.rows("CREATE TABLE \"odd 'name\" (a, b DEFAULT (1 + 1))")
        self.rows("INSERT INTO \"odd 'name\" (a) VALUES (x'00ff')")
        answer = self.ended(self.started(sh("umask 0", driver() + ["backup", self.copy]), False))[1]
        self.assertEqual(json.loads(answer), {
            "success": True, "message": "Backed up 1000 jobs to " + self.copy})
        self.assertEqual(stat.S_IMODE(os.stat(self.copy).st_mode), 0o600)
        self.assertEqual(self.dump(self.copy), self.dump(self.db))
        listed = self.prints("list")
        self.env["DB_PATH"] = self.copy
        self.assertEqual(self.prints("list"), listed)
        self.enqueue("true")

    def test_a_backup_under_load_holds_all_that_was_acknowledged_before(self):
        self.daemon("--workers", "1")
        acknowledged, calls = set(), [("enqueue", "-q", "--", "true")] * 15
        for number in range(3):
            copy = self.copy + str(number)
            answers = caller(threading.get_ident())(*calls, ("backup", copy), *calls, env=self.env)
            self.assertEqual([answer for answer in answers if answer[0]], [])
            with contextlib.closing(sqlite3.connect(copy)) as connection:
                self.assertEqual(connection.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
                ids = {job_id for job_id, in connection.execute("SELECT id FROM jobs")}
            self.assertEqual(acknowledged - ids, set())
            acknowledged.update(answer[1].strip() for answer in answers[:15] + answers[16:])

    def test_a_backup_replaces_nothing_and_leaves_nothing_when_it_fails(self):
        self.says(self.db, "backup", self.copy)
        self.ok("enqueue", "-", stdin='{"command":"true"}\n' * 500)
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        for put in (lambda: open(self.copy, "w").close(), lambda: os.symlink("none", self.copy)):
            put()
            self.says(self.copy, "backup", self.copy)
            os.unlink(self.copy)
        before = read(self.db)
        self.refused("backup", self.db)
        self.refused("backup", self.path("none/x"))
        small = self.started(sh("ulimit -f 40", driver() + ["backup", self.copy]), False)
        self.assertEqual(self.ended(small)[:2], (1, ""))
        with open(self.db, "r+b") as file:
            file.seek(len(before) // 8192 * 4096)  # whole pages
            file.write(b"\xff" * 4096 * 3)
        self.says("corrupt", "backup", self.copy)
        self.assertFalse(os.path.lexists(self.copy))

class DoctorTest(QueueCase):
    """Each thing that can be wrong, found and told with the way out."""

    def wrong(self, *args):
        """What is wrong, and what to do, a line each."""
        code, out, err = self.cli("doctor", *args)
        wrong = ["%(detail)s; %(advice)s" % one for one in json.loads(out) if not one["ok"]]
        self.assertEqual((code, len(err.splitlines())), (int(bool(wrong)), len(wrong)), err)
        return "\n".join(wrong)

    def finds(self, *words):
        """Just one thing is wrong, with these words."""
        wrong = self.wrong()
        self.assertEqual(wrong.count("\n"), 0, wrong)
        for word in words:
            self.assertIn(word, wrong)

    def test_a_sound_queue_is_left_as_it_is_with_a_daemon_and_without(self):
        self.enqueue("true")
        before = self.rows("SELECT * FROM jobs")
        self.assertEqual((self.wrong(), self.rows("SELECT * FROM jobs")), ("", before))
        self.assertEqual(self.prints("doctor", "--table"), "ok\n")
        daemon = self.daemon("--workers", "1")
        self.wait_for("completed")
        code, out, _ = self.cli("doctor")
        self.assertEqual(code, 0, out)
        self.assertIn("pid %d" % daemon.pid, out)
        self.assertIn(self.db, out)

    def test_what_others_may_touch_or_have_open_is_found(self):
        self.enqueue("true")
        for path, bad, good in ((self.db, 0o644, 0o600), (self.db + "-run/lock", 0o604, 0o600),
                                (self.db + "-run", 0o755, 0o700)):
            os.chmod(path, bad)
            self.finds("%o" % bad, "chmod go= %s" % path)
            os.chmod(path, good)
        os.chmod(self.dir, 0o777)
        self.assertIn(self.dir, self.wrong())
        os.chmod(self.dir, 0o700)
        self.assertIn(self.path("none"), self.wrong("--db", self.path("none/q.db")))
        with contextlib.closing(sqlite3.connect(self.db)) as other:
            other.execute("SELECT * FROM jobs").fetchall()
            self.finds(str(os.getpid()))
        self.daemon()
        os.chmod(self.sock, 0o666)
        self.finds("chmod go= " + self.sock)

    def test_a_damaged_or_strange_database_is_found(self):
        self.ok("enqueue", "-", stdin='{"command":"true"}\n' * 500)
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        whole = read(self.db)
        size = struct.unpack(">H", whole[16:18])[0]
        for data, sql, words in (
                (whole[:size * 30] + b"\xff" * size + whole[size * 31:], None, "restore a backup"),
                (whole[:size] + b"\xff" * size * 9 + whole[size * 10:], None, "restore a backup"),
                (b"x" * 5000, None, "not a database"), (whole, "PRAGMA user_version = 99", "99"),
                (whole, "DROP TABLE running", "running"), (whole, None, "")):
            with open(self.db, "wb") as file:
                file.write(data)
            if sql:
                self.rows(sql)
            with self.subTest(words=words, sql=sql):
                wrong = self.wrong()
                self.assertEqual((words in wrong, bool(wrong)), (True, bool(words)), wrong)

def make(target, script=SCRIPT, **variables):
    """(exit status, output) of the Makefile beside `script`, under umask 077; None: there is none."""
    folder = os.path.dirname(script)
    if not shutil.which("make") or not os.path.exists(folder + "/Makefile"):
        return None
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(sh("umask 077", ["make", "-s", "-C", folder, target, "PYTHON=" + sys.executable]
                             + ["%s=%s" % pair for pair in variables.items()]),
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode()

class InstallTest(QueueCase):
    """By make, under systemd, and in the shell."""

    def setUp(self):
        super().setUp()
        self.prefix = self.path("it's a prefix")

    def make(self, target, **variables):
        done = make(target, **dict({"PREFIX": self.prefix}, **variables))
        if not done:
            self.skipTest("needs make and the Makefile")
        self.assertEqual(done, (0, ""))

    def call(self, *args, status=0, **options):
        """stdout and stderr of the launcher; status None: whatever."""
        code, out, _ = self.ended(self.started([self.prefix + "/bin/queuectl"] + list(args), False,
                                               stderr=subprocess.STDOUT, **options))
        self.assertIn(status, (code, None), out)
        return out

    def files(self):
        """{path below the prefix: mode}"""
        return {os.path.relpath(base + "/" + name, self.prefix): stat.S_IMODE(
                    os.lstat(base + "/" + name).st_mode)
                for base, folders, names in os.walk(self.prefix) for name in folders + names}

    def test_it_can_be_read_by_all_whatever_the_umask_and_goes_without_a_trace(self):
        self.make("install")
        os.unlink(self.prefix + "/bin/queuectl")
        os.symlink(self.path("target"), self.prefix + "/bin/queuectl")
        for others in ((), ("bin/a", "lib/queuectl/b", "lib/queuectl/__pycache__/c")):
            self.make("install")
            self.assertEqual(self.files(), {
                "bin": 0o755, "bin/queuectl": 0o755, "lib": 0o755, "lib/queuectl": 0o755,
                "lib/queuectl/queuectl.py": 0o644, "lib/queuectl/__pycache__": 0o755,
                "lib/queuectl/__pycache__/queuectl.%s.pyc" % sys.implementation.cache_tag: 0o644})
            for name in others:
                open(os.path.join(self.prefix, name), "w").close()
            self.make("uninstall")
            self.assertEqual(set(self.files()), {"bin", "lib"}.union(others, map(os.path.dirname, others)))
        self.assertFalse(os.path.exists(self.path("target")))
        self.assertIn("must be an absolute path", make("install", PREFIX="here")[1])

    def test_the_compiled_form_is_what_runs_and_nothing_is_kept_below_lib(self):
        self.make("install", DESTDIR=self.path("stage"))
        os.rename(self.path("stage") + self.prefix, self.prefix)  # as a package is unpacked
        before, launcher = self.files(), self.prefix + "/bin/queuectl"
        self.assertEqual(read(launcher).split(b"\n")[0].decode(), "#!" + sys.executable)
        told = subprocess.run([sys.executable, "-v", launcher, "--version"], env=self.env, check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        cached, = [self.prefix + "/" + name for name in before if name.endswith(".pyc")]
        self.assertIn(b"# code object from " + ascii(cached).encode(), told.stderr)
        code = marshal.loads(read(cached)[12 if sys.version_info < (3, 7) else 16:])
        self.assertEqual(code.co_filename, self.prefix + "/lib/queuectl/queuectl.py")
        self.call("worker", "start", "--count", "2")
        self.call("enqueue", "--id", "one", "--", "echo done")
        self.call("wait", "one")
        self.assertEqual(self.call("logs", "one"), "done\n")
        self.call("daemon", "stop")
        self.assertIn("here\n", self.call("run", "--", "echo here"))
        env = dict(self.env, HOME=self.path("home"), DB_PATH="", SOCKET_PATH="")  # the default one
        self.assertIn(("/var/lib" if os.geteuid() == 0 else env["HOME"] + "/.local/state")
                      + "/queuectl/queuectl.db", self.call("doctor", status=None, env=env))
        self.assertEqual(self.files(), before)

    def test_modules_come_from_where_those_of_the_script_come_from(self):
        self.make("install")
        version = self.call("--version")
        for folder, names in ((self.prefix + "/bin", ("json", "argparse", "queuectl")),
                              (self.path("planted"), ("queuectl",))):
            os.makedirs(folder, exist_ok=True)
            for name in names:
                with open("%s/%s.py" % (folder, name), "w") as file:
                    file.write("raise SystemExit('planted')")
        for value in ("", "1"):
            env = dict(self.env, PYTHONPATH=self.path("planted"), PYTHONSAFEPATH=value)
            self.assertEqual(self.call("--version", cwd=self.path("planted"), env=env), version)

    def unit(self, *args):
        """{section: {key: value}} of the unit printed."""
        code, out, err = self.cli("systemd", *args)
        self.assertEqual(code, 0)
        self.assertIn("daemon-reload", err)
        sections = re.split(r"^\[(\w+)\]\n", out, flags=re.M)[1:]
        return {name: dict(line.split("=", 1) for line in text.split("\n") if line)
                for name, text in zip(sections[::2], sections[1::2])}

    def test_the_unit_serves_this_very_queue(self):
        unit = self.unit()
        service = unit["Service"]
        self.assertEqual([service[key] for key in ("Type", "KillMode", "Restart")],
                         ["notify", "process", "on-failure"])
        command = service["ExecStart"].split(" ")
        self.assertEqual(command[1:-3], [SCRIPT, "--db", self.db, "--socket", self.sock])
        self.assertEqual(command[-3:-1], ["daemon", "--grace"])
        grace, patience = (int(text.rstrip("s")) for text in (command[-1], service["TimeoutStopSec"]))
        self.assertLess(grace + 2, patience)
        self.assertEqual((unit["Install"]["WantedBy"], self.unit("--user")["Install"]["WantedBy"]),
                         ("multi-user.target", "default.target"))
        del self.env["SOCKET_PATH"]
        self.assertNotIn("--socket", self.unit()["Service"]["ExecStart"])

    @unittest.skipUnless(shutil.which("systemd-analyze"), "needs systemd-analyze")
    def test_systemd_accepts_the_unit(self):
        for name in ("plain", "odd %n$HOME \"q\" \\back; 'x' \u00e9"):
            folder = self.path(name)
            os.mkdir(folder)
            script = shutil.copy(SCRIPT, folder + "/queuectl.py")
            with open(self.path("queuectl.service"), "w") as file:
                file.write(self.prints("--db", folder + "/q.db", "systemd").replace(SCRIPT, script))
            verify = subprocess.Popen(["systemd-analyze", "verify", file.name],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            out, _ = verify.communicate()
            self.assertEqual((verify.returncode, [line for line in out.splitlines() if b"queuectl" in line
                                                  and b"Special user nobody" not in line]), (0, []))

    def test_the_daemon_tells_systemd_how_it_is(self):
        address = self.env["NOTIFY_SOCKET"] = self.path("notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(30)
            manager.bind(address)

            def hears(words):
                while words not in manager.recv(4096).decode():
                    pass
            daemon = self.daemon()
            hears("READY=1")
            daemon.terminate()
            hears("STOPPING=1")
            self.assertEqual(daemon.wait(), 0)
        self.assertEqual(self.stop(self.daemon()), 0)  # nobody listens there any more

    LINES = (  # what stands before the cursor -> what is offered
        ("dl", "dlq"), ("dlq ", "list retry"), ("dlq r", "retry"), ("list --state d", "dead"),
        ("--db x.db list --st", "--state"), ("config get ji", "jitter"), ("completion ", "bash fish zsh"),
        ("metrics --format p", "prometheus"), ("daemon ", "stop status"), ("daemon --gr", "--grace"),
        ("worker start --count 2 --c", "--count"), ("check --max-", "--max-pending --max-dead --max-age"),
        ("config set ", " ".join(SETTINGS)), ("show nigh", "nightly-1 nightly-2"), ("--v", "--version"),
        ("list --state ", "pending processing completed failed dead cancelled"))

    @unittest.skipUnless(shutil.which("bash"), "needs bash")
    def test_tab_completes_commands_flags_states_settings_and_ids_in_bash(self):
        for job_id in ("nightly-1", "nightly-2", "other"):
            self.enqueue("true", id=job_id)
        with open(self.path("queuectl"), "w") as program:
            program.write("#!/bin/sh\nexec %s \"$@\"\n" % " ".join(map(shlex.quote, driver())))
        os.chmod(program.name, 0o700)
        with open(self.path("script"), "w") as file:
            file.write(re.sub(r"[\w./]*python[\d.]* %s" % re.escape(SCRIPT), program.name,
                              self.prints("completion", "bash")))
        out = subprocess.check_output(["bash", "-c", """PATH="${0%/*}:$PATH"; . "$0"
            set -- "$(complete -p queuectl | sed 's/.*-F \\([^ ]*\\).*/\\1/')" "$@"; name=$1; shift
            for line; do
                COMP_LINE="queuectl $line"; COMP_POINT=${#COMP_LINE}
                read -ra COMP_WORDS <<<"queuectl ${line}x"
                COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
                COMP_WORDS[COMP_CWORD]=${COMP_WORDS[COMP_CWORD]%x}
                COMPREPLY=()
                $name queuectl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
                echo "${COMPREPLY[*]}"
            done""", file.name] + [line for line, _ in self.LINES], env=self.env)
        for (line, offered), told in zip(self.LINES, out.decode().split("\n")):
            with self.subTest(line=line):
                self.assertEqual(sorted(told.split()), sorted(offered.split()))
        for shell in filter(shutil.which, ("zsh", "fish")):
            subprocess.run([shell, "-n"], input=self.prints("completion", shell).encode(), check=True)

class TerminalTest(QueueCase):
    """What people see, and that programs see JSON."""

    def test_programs_get_json_and_people_tables(self):
        self.ok("enqueue", "-", stdin='{"id":"gone","command":"false","max_retries":1}\n' + "".join(
            '{"command":"echo %s","id":"job-%d"}\n' % ("x" * 200, number) for number in range(25)))
        self.daemon("--workers", "1")
        self.wait_for("completed", 25)
        for args in (["list"], ["dlq", "list"], ["worker", "list"], ["show", "gone"], ["config", "list"]):
            with self.subTest(args=args):
                code, shown = self.terminal(*args)
                self.assertEqual((code, shown[0] in "[{"), (0, False), shown)
                self.assertLessEqual(max(map(len, shown.splitlines())), 80)
                piped = self.prints(*args)
                self.assertEqual(self.terminal(*(["--json"] + args)), (0, piped))
                self.assertEqual(self.prints(*(args + ["--json"])), piped)
                self.assertNotIn(self.prints(*(args + ["--table"]))[0], "[{")
        for command in ("status", "metrics", "doctor"):
            self.assertRaises(ValueError, json.loads, self.terminal(command)[1])
            self.assertIsNotNone(json.loads(self.terminal("--json", command)[1]))
        shown = self.terminal("list")[1]
        self.assertIn("job-24", shown)
        self.assertNotIn("job-3 ", shown)
        self.assertRegex(shown, r"\b6\b.*more")
        code, shown = self.terminal("show", "none")
        self.assertEqual((code, shown.count("\n"), "{" in shown), (1, 1, False))

    def test_flags_for_tables_change_nothing_else(self):
        for job_id, args in (("a", ["--json", "enqueue"]), ("b", ["enqueue", "--table"])):
            self.assertEqual(self.prints(*(args + ["--id", job_id, "--", "echo", "--table", "--json"])),
                             '{"success":true,"message":"Job enqueued","id":"%s"}\n' % job_id)
            self.has(job_id, command="echo --table --json")

    def test_nothing_unescaped_reaches_a_terminal(self):
        evil = "\x1b[31m\u202e\u200b\r\x9b"
        self.enqueue("echo " + evil, id="a", env={"A": evil})
        self.ok("pause", "--reason", evil)
        for args in (("list",), ("list", "--json"), ("show", "a"), ("status",), (evil,), (),
                     ("enqueue", json.dumps({"command": ": " + evil})), ("enqueue", evil),
                     ("dlq", "retry", evil), ("config", "set", evil, "1"),
                     ("config", "set", "shell", evil), ("list", "--state", evil)):
            with self.subTest(args=args):
                _, shown = self.terminal(*args, env=dict(self.env, TERM="dumb"))
                self.assertTrue(shown)
                self.assertEqual([c for c in shown if c != "\n" and not c.isprintable()], [])

# ---- Faults -------------------------------------------------------------------------------------
# A checker, not examples: each job tells of any overlap with itself, and logs that it ran; after
# whatever was killed, nothing acknowledged is missing, nothing ran twice at once, and the attempts
# add up.

def spread(count, limit):
    """Numbers from 1 to `count`: all, or at most `limit` of them, the first and the last among these."""
    return sorted({1 + i * (count - 1) // max(min(count, limit) - 1, 1) for i in range(min(count, limit))})

# As a host that was started anew: its boot has the id that this file tells.
BOOT = """
import builtins, io
def elsewhere(real):
    def opened(path, *args, **named):
        return real(%r if path == "/proc/sys/kernel/random/boot_id" else path, *args, **named)
    return opened
os.open, builtins.open, io.open = map(elsewhere, (os.open, builtins.open, io.open))
"""

class FaultCase(QueueCase):
    PROBE = ("exec 9>>%(dir)sprobe.$QUEUECTL_JOB_ID; flock -n 9 || echo $QUEUECTL_JOB_ID >>"
             "%(dir)soverlaps; echo $QUEUECTL_JOB_ID >>%(dir)slog")

    def caller(self, code=""):
        """A Caller that is killed in cleanup."""
        return Caller(lambda argv, **options: self.started(argv, False, **options), code)

    def probing(self, then=""):
        """A command that tells of any overlap, logs its run, and goes on with `then`."""
        return self.PROBE % {"dir": self.path("")} + ("; " + then if then else "")

    def probe(self, job_id, then="", **fields):
        return self.enqueue(self.probing(then), id=job_id, **fields)

    def hold(self, then="", **fields):
        """A job called held that runs until the gate opens; the pid of its command."""
        os.mkfifo(self.path("gate"))
        self.probe("held", "%s echo $$ >%s; read line <%s" % (then, self.path("pid"), self.path("gate")),
                   **dict({"timeout": 0}, **fields))
        return int(wait_until(lambda: self.read("pid").strip(), "it runs"))

    def fill(self, ids, **fields):
        """Enqueue probing jobs, all in one call; their ids."""
        self.ok("enqueue", "-", stdin="".join(json.dumps(dict(
            fields, id=one, command=self.probing())) + "\n" for one in ids))
        return ids

    def boot(self, name):
        """The code of a driver that lives in another boot."""
        with open(self.path("boot." + name), "w") as file:
            file.write("%s-boot\n" % name)
        return BOOT % file.name

    def logged(self):
        return self.read("q.db-run/log")

    def unfinished(self):
        return len([state for state in self.states().values()
                    if state not in ("completed", "dead", "cancelled")])

    def finish(self, seconds=30):
        try:
            wait_until(lambda: not self.unfinished(), "all is done", seconds)
        except AssertionError as error:
            raise AssertionError("%s: %s\n%s%s" % (error, self.states(), self.logged(), self.read("errors")))

    def history(self, job_id):
        """The errors of its attempts, the first first."""
        return [error for error, in self.rows(
            "SELECT error FROM attempts WHERE job = ? ORDER BY number", job_id)]

    def lost(self):
        return self.rows("SELECT COUNT(*) FROM attempts WHERE error = 'worker lost'")[0][0]

    def nothing_is_left(self):
        """Of any command of this queue."""
        wait_until(lambda: not any(map(alive, processes_of(self.db + "-run/"))), "nothing of them is left")

    def kill_workers(self):
        kill_those(pid for pid in processes_of(self.db) if slot_of(pid, self.db))

    def wrongs(self, ids, cancels=(), lost=(0, 0)):
        """What is wrong with a queue at rest, {what: ids or rows}; `cancels`: those of `ids` that
        somebody asked to cancel; `lost`: so many attempts at least and at most were lost."""
        stored, log = self.states(), self.read("log").split()
        numbers = {job_id: [] for job_id in stored}
        for job_id, number in self.rows("SELECT job, number FROM attempts ORDER BY job, number"):
            numbers[job_id].append(number)
        counted = dict(self.rows("SELECT id, attempts FROM jobs"))
        errors = {(None,), ("worker lost",)} | ({("cancelled",)} if cancels else set())
        wrong = {
            "damaged": [row for row in self.rows("PRAGMA integrity_check") if row != ("ok",)],
            "lost": sorted(set(ids) - set(stored)),
            "running": self.rows("SELECT * FROM running"),
            "overlaps": self.read("overlaps").split(),
            "in the wrong state": sorted(item for item in stored.items() if item[1] != "completed" and (
                item[1] != "cancelled" or item[0] not in cancels)),
            "never run": sorted(job_id for job_id, state in stored.items()
                                if state == "completed" and job_id not in log),
            "ran more often than counted": sorted(
                job_id for job_id, seen in numbers.items() if log.count(job_id) > len(seen)),
            "miscounted": sorted((job_id, counted[job_id], seen) for job_id, seen in numbers.items()
                                 if seen != list(range(1, counted[job_id] + 1))),
            "errors": sorted(set(self.rows("SELECT error FROM attempts")) - errors, key=str),
            "attempts lost": [] if lost[0] <= self.lost() <= lost[1] else [self.lost(), lost]}
        return {what: found for what, found in wrong.items() if found}

    def check(self, ids, lost=(0, 0)):
        self.assertEqual(self.wrongs(ids, lost=lost), {})
        self.assertEqual(set(self.states()), set(ids))

@unittest.skipUnless(shutil.which("flock"), "needs flock(1)")
class FailpointTest(FaultCase):
    """kill -9 at the n-th pass of a seam, counted over all processes of a daemon, for each n of a run
    (where those are many, for some spread over it); another daemon follows at once."""

    def sweep(self, seam, before, at_least=1, lost=0):
        """`at_least`: passes that a run makes; `lost`: attempts that each kill costs at the least."""
        self.haste()
        ids, kills, points = [], 0, [0]
        while points:
            n = points.pop(0)
            ids += self.fill(["%d.%d" % (n, i) for i in range(2)])
            with open(self.path("errors"), "ab") as errors:
                self.started(["/bin/sh", "-c", 'while "$@"; [ $? = 137 ]; do :; done', "sh"] + driver(
                    "PASSES[:] = %r, %d\nat(%r, %r, die)" % (self.path("passes.%d" % n), n, seam, before),
                    "pass") + ["daemon", "--workers", "2"], ready=False, stderr=errors)
            with self.subTest(pass_number=n):
                self.finish()
                self.kill_all()
                made = len(self.read("passes.%d" % n))
                kills += made >= n > 0
                self.check(ids, lost=(lost * kills, kills))
            if not n:
                self.assertGreaterEqual(made, at_least)
                points = spread(made, 4)
        self.assertGreater(kills, 0)

    test_before_a_commit = functools.partialmethod(sweep, "COMMIT", True, at_least=4)
    test_after_a_commit = functools.partialmethod(sweep, "COMMIT", False, at_least=4)
    test_before_a_lock = functools.partialmethod(sweep, "flock", True, at_least=8)
    test_after_a_lock = functools.partialmethod(sweep, "flock", False, at_least=8)
    test_before_a_note = functools.partialmethod(sweep, "pwrite", True, at_least=2)
    test_after_a_note = functools.partialmethod(sweep, "pwrite", False, at_least=2)
    test_before_a_command_starts = functools.partialmethod(sweep, "Popen", True, at_least=2, lost=1)
    test_once_a_command_runs = functools.partialmethod(sweep, "Popen", False, at_least=2, lost=1)
    test_before_a_file_goes = functools.partialmethod(sweep, "unlink", True)
    test_after_a_file_has_gone = functools.partialmethod(sweep, "unlink", False)

class CommandFaultTest(FaultCase):
    """Commands that are killed or interrupted at any moment, and many at once."""

    def test_a_server_that_dies_in_a_request_costs_nothing_and_doubles_nothing(self):
        points = {"transaction": ("COMMIT", True), "disk": ("fdatasync", True),
                  "answer": ("fdatasync", False)}
        daemon = self.driven("".join(
            "at(%r, %r, lambda *_: os.path.exists(%r) and (os.unlink(%r), os.kill(os.getpid(), 9)))\n"
            % (points[name] + (self.path(name),) * 2) for name in sorted(points)))

        def served(point, *args):
            open(self.path(point), "w").close()
            answer = self.ok(*args)
            self.assertFalse(os.path.exists(self.path(point)), "the server died")
            return answer
        for point in points:
            with self.subTest(point=point):
                answer = served(point, "enqueue", json.dumps({"id": point, "command": "true"}))
                self.assertEqual((answer["success"], answer["id"]), (True, point))
        self.assertEqual(served("answer", "worker", "start", "--count", "2")["message"], "Started 2 workers")
        self.ok("worker", "start")
        wait_until(lambda: self.ok("status")["workers"] == 3, "as many as were asked for")
        self.finish()
        self.assertEqual(self.states(), dict.fromkeys(points, "completed"))
        self.assertEqual(self.ok("daemon", "status")["pid"], daemon.pid)

    def test_a_command_killed_in_its_transaction_leaves_a_sound_queue(self):
        for seam, before in itertools.product(("COMMIT", "flock", "fdatasync"), (True, False)):
            self.use("%s.%s" % (seam, before))
            caller, ids = self.caller("at(%r, %r, die)" % (seam, before)), []
            for n in itertools.count(1):
                ids.append("job%d" % n)
                call, stored = ("enqueue", json.dumps({"id": ids[-1], "command": "true"})), False
                status = caller(call, passes=(self.path("passes.%d" % n), n))[0][0]
                with contextlib.suppress(sqlite3.OperationalError):  # no table yet
                    stored = ids[-1] in self.states()
                with self.subTest(seam=seam, before=before, n=n):
                    self.assertIn(status, (0, -9))
                    again, = caller(call)
                    self.assertEqual(again[0], int(stored), again)
                    self.assertEqual(sorted(self.states()), sorted(ids))
                    self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])
                if not status:
                    break
            self.assertGreater(n, 1)

    def test_a_migration_killed_at_any_statement_is_begun_anew(self):
        caller, points = self.caller("at('statement', True, die)"), [0]
        while points:
            n = points.pop(0)
            self.use("queue%d" % n)
            make_original(self.db, """INSERT INTO config VALUES ('max-retries', NULL), ('timeout', '7000.0');
                                      INSERT INTO jobs (id, command) VALUES ('old', 'true');""")
            status = caller(("--db", self.db, "enqueue", '{"id":"new","command":"true"}'),
                            passes=(self.path("passes"), n))[0][0]
            if not n:
                points += spread(len(self.read("passes")), 16)
            with self.subTest(statement=n):
                self.assertEqual(status, -9 if n else 0)
                self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])
                self.assertIn("old", self.states())
                got, added = caller(("--db", self.db, "config", "get", "timeout"),
                                    ("--db", self.db, "enqueue", '{"id":"after","command":"true"}'))
                self.assertEqual((got[:2], added[0]), ([0, "7000\n"], 0), (got, added))
                self.assertEqual(set(self.states()) - {"new"}, {"old", "after"})
        self.assertGreater(n, 5)

    def interrupt(self, rounds):
        """Ctrl-C for two commands at once, so many times."""
        caller = self.caller()
        for number in range(rounds):
            ids = ["%d.%d" % (number, i) for i in range(2)]
            answers = caller(*[("enqueue", json.dumps({"id": one, "command": "true"})) for one in ids],
                             signal=signal.SIGINT, after_s=number % 60 * 0.00025)
            for job_id, (status, out, err) in zip(ids, answers):
                self.assertIn(status, (0, 130), err)
                if not status:
                    self.assertEqual(json.loads(out)["id"], job_id)
                    self.assertIn(job_id, self.states())
        self.assertEqual(caller(("enqueue", "-q", "--", "true"))[0][0], 0)
        self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])
        self.assertEqual(set(self.states().values()), {"pending"})

    def test_a_command_interrupted_at_any_moment_leaves_no_lock(self):
        self.interrupt(60)

    def test_a_run_interrupted_at_any_moment_leaves_nothing_running(self):
        caller, stored = self.caller(), 0
        self.ok("config", "set", "jitter", "0")
        for number in range(10):
            status, out, err = caller(("run", "--quiet", "--", "exec sleep 60"), signal=signal.SIGINT,
                                      after_s=number * 0.01)[0]
            with self.subTest(number=number):
                self.assertEqual(status, 130, err)
                states = sorted(self.states().values())
                self.assertEqual(states, ["cancelled"] * len(states))
                self.assertIn(len(states) - stored, (0, 1))
                self.assertEqual(self.rows("SELECT * FROM running"), [])
                stored = len(states)
        self.assertGreater(stored, 0)
        self.assertEqual(self.prints("run", "--", "echo on"), "on\n")

    def test_what_was_acknowledged_survives_the_death_of_everything(self):
        self.daemon("--workers", "2")
        self.hold()
        ids = [self.enqueue("true", run_after=LATER) for _ in range(3)]
        self.ok("pause", "--reason", "swap")
        self.ok("config", "set", "jitter", "7")
        self.prints("cancel", ids[0])
        kill_those(processes_of(self.dir))
        self.assertEqual(self.states(), {
            "held": "processing", ids[0]: "cancelled", ids[1]: "pending", ids[2]: "pending"})
        self.assertEqual((self.ok("status")["paused"], self.ok("config", "get", "jitter")), ("swap", 7))

    def test_two_hundred_enqueues_at_once_share_the_turns_of_a_slow_disk_and_jobs_go_on(self):
        caller = self.caller()
        self.fill(["old%d" % number for number in range(60)])
        for count in (40, 200):  # by the commands themselves, and by a daemon
            if count == 200:
                self.driven("""
import time
def slow(fd):
    with open(%r, "ab", 0) as file:
        file.write(b".")
    time.sleep(0.05)
at("fdatasync", True, slow)""" % self.path("synced"), "--workers", "2")
            before = len(self.read("synced"))
            answers = caller(*[("enqueue", "-q", "--", "true")] * count)
            states, ids = self.states(), {answer[1].strip() for answer in answers}
            with self.subTest(count=count):
                self.assertEqual([answer for answer in answers if answer[0]], [])
                self.assertEqual(len(ids), count)
                self.assertLessEqual(ids, set(states))
        self.assertIn(len(self.read("synced")) - before, range(1, 180))
        self.assertGreater(list(states.values()).count("completed"), 10)
        self.finish()

    def test_a_unique_run_that_was_killed_is_taken_up_by_the_next(self):
        self.haste()
        night = ("run", "--unique", "nightly", "--timeout", "60s", "--")
        first = self.spawn(*night, self.probing("[ $QUEUECTL_ATTEMPT = 2 ] || exec sleep 60"))
        wait_until(lambda: self.read("log"), "it runs")
        job, = self.states()
        os.kill(first.pid, signal.SIGSTOP)  # so that it can't replace its worker
        self.kill_workers()
        kill_those([first.pid])
        self.assertEqual(self.states(), {job: "processing"})
        self.assertEqual(self.cli(*night, "echo other")[0], 0)
        self.check([job], lost=(1, 1))
        self.assertEqual(self.read("log"), (job + "\n") * 2)

class OrphanTest(FaultCase):
    """The daemon's death is not the workers', and what those leave is not left alone."""

    FORMS = {
        "plain": "sleep 300",
        "redirected": "exec >>%(dir)sout 2>&1 </dev/null; sleep 300",
        "closed": "exec %(python)s -c 'import os, time; os.closerange(0, 9); os.closerange(10, 999);"
                  " open(\"%(dir)sclosed\", \"w\"); time.sleep(300)'",
        "stopped": "kill -STOP $$; sleep 300",
        "escaped": "setsid sh -c 'exec >/dev/null 2>&1 </dev/null; touch %(dir)sescaped; sleep 300' & wait",
        "far-away": "setsid %(python)s -c 'import os, time; os.closerange(0, 9); os.closerange(10, 999);"
                    " open(\"%(dir)sfar\", \"w\"); time.sleep(300)' & wait"}

    @unittest.skipUnless(shutil.which("setsid") and shutil.which("flock"), "needs setsid(1), flock(1)")
    def test_whatever_a_command_did_it_is_stopped_before_its_retry(self):
        for with_daemon in (False, True):
            self.use("all" if with_daemon else "workers")
            self.haste()
            daemon, ids = self.daemon("--workers", str(len(self.FORMS))), sorted(self.FORMS)
            for form in ids:
                self.probe(form, "[ $QUEUECTL_ATTEMPT = 1 ] || exit 0; " + self.FORMS[form] % {
                    "dir": self.path(""), "python": sys.executable}, timeout=0)
            wait_until(lambda: len(self.read("log").split()) == len(ids) and all(
                os.path.exists(self.path(mark)) for mark in ("closed", "escaped", "far")), "all run")
            wait_until(lambda: any(stat_of(pid)[:1] == [b"T"] for pid in processes_of(self.db + "-run/")),
                       "one is stopped")
            if with_daemon:
                self.kill(daemon)
            self.kill_workers()
            if with_daemon:
                self.daemon()
            self.finish()
            with self.subTest(daemon_killed=with_daemon):
                self.check(ids, lost=(len(ids), len(ids)))
                self.assertEqual(sorted(self.read("log").split()), sorted(ids * 2))
                self.nothing_is_left()

    def test_a_timeout_ends_whatever_a_command_started(self):
        self.daemon("--workers", "3")
        self.enqueue("trap '' TERM; (sleep 300) & setsid sh -c 'sleep 300' & sleep 300", id="deaf",
                     timeout=300, max_retries=1)
        self.enqueue("trap 'echo in order; exit 0' TERM; sleep 300 & wait", id="orderly", timeout=300,
                     max_retries=1)
        self.enqueue("kill -KILL $$", id="killed", max_retries=1)
        self.wait_for("dead", 3)
        late = "timed out after 300 ms (raise it with --timeout or: config set timeout 0)"
        self.assertEqual([self.history(job) for job in ("deaf", "orderly", "killed")],
                         [[late], [late], ["killed by SIGKILL"]])
        self.assertEqual(self.prints("logs", "orderly"), "in order\n")
        self.nothing_is_left()

    def test_an_orphans_job_ends_as_if_its_daemon_lived(self):
        daemon = self.daemon("--workers", "1")
        command = self.hold()
        self.kill(daemon)
        self.daemon()
        self.probe("next")
        self.assertEqual(self.states(), {"held": "processing", "next": "pending"})
        self.assertTrue(alive(command))
        self.open_gate()
        self.finish()
        self.check(["held", "next"])

    def test_an_orphans_job_is_stopped_by_whoever_wishes_it(self):
        stopped = []
        for name, with_daemon, args in (("alone", False, ("cancel", "held")),
                                        ("daemon", True, ("cancel", "held")),
                                        ("workers", True, ("worker", "stop", "--now"))):
            self.use(name)
            daemon = self.daemon("--workers", "1")
            command = self.hold(max_retries=5)
            self.kill(daemon)
            if with_daemon:
                self.daemon()
            stopped.append((name, command, self.spawn(*args)))
        for name, command, process in stopped:
            self.use(name)
            with self.subTest(name=name):
                self.assertEqual(process.wait(30), 0)
                self.wait_for("pending" if name == "workers" else "cancelled")
                self.assertFalse(alive(command))
                self.assertEqual((self.show("held", "attempts"), self.history("held")),
                                 ((0,), []) if name == "workers" else ((1,), ["cancelled"]))

    def test_an_acknowledged_cancel_outlives_everything(self):
        for boot in ("first", "second"):
            self.use(boot)
            daemon = self.driven(self.boot("first"), "--workers", "1")
            command = self.hold()
            worker, = self.workers_of(daemon)
            os.kill(worker, signal.SIGSTOP)  # so that it can't stop the job before its death
            self.assertTrue(self.ask(b'{"command":"cancel","value":"held"}\n')["success"])
            self.kill(daemon)
            os.kill(worker, signal.SIGKILL)
            self.driven(self.boot(boot))
            self.wait_for("cancelled")
            with self.subTest(boot=boot):
                self.assertEqual((self.history("held"), self.read("log")), (["cancelled"], "held\n"))
                self.assertEqual(alive(command), boot == "second")

    def test_after_another_boot_an_attempt_is_lost_and_nothing_is_signalled(self):
        self.haste()
        daemon = self.driven(self.boot("first"), "--workers", "1")
        command = self.hold(then="[ $QUEUECTL_ATTEMPT = 1 ] || exit 0;")
        self.kill(daemon)
        self.kill_workers()
        self.driven(self.boot("second"))
        self.finish()
        self.assertTrue(alive(command))
        self.assertEqual(self.history("held"), ["worker lost", None])

    def test_a_worker_that_stands_still_keeps_its_job(self):
        daemon = self.daemon("--workers", "1")
        command = self.hold()
        worker, = self.workers_of(daemon)
        os.kill(worker, signal.SIGSTOP)
        self.kill(daemon)
        self.daemon("--workers", "2")
        self.open_gate()
        wait_until(lambda: not alive(command), "the command has ended")
        self.probe("other")
        self.wait_for("completed")
        self.assertEqual(self.states(), {"held": "processing", "other": "completed"})
        os.kill(worker, signal.SIGCONT)
        self.finish()
        self.check(["held", "other"])

    def test_a_running_jobs_row_deleted_or_inserted_anew_runs_once_at_a_time(self):
        for anew in (False, True):
            self.use("anew" if anew else "deleted")
            self.daemon("--workers", "2")
            self.hold()
            self.rows("DELETE FROM jobs WHERE id = 'held'")
            if anew:
                self.rows("INSERT INTO jobs (id, command) VALUES ('held', ?)", self.probing("echo second"))
            self.probe("other")
            self.wait_for("completed")
            self.assertEqual(self.read("log"), "held\nother\n")
            self.open_gate()
            self.finish()
            wait_until(lambda: [one["state"] for one in self.ok("worker", "list")] == ["idle"] * 2,
                       "both workers go on")
            self.assertEqual(self.read("log").split(), ["held", "other", "held"][:2 + anew])
            self.assertEqual((self.read("overlaps"), self.rows("SELECT * FROM running")), ("", []))
            self.are(**dict.fromkeys(["other", "held"][:1 + anew], "completed"))
        self.assertEqual(self.prints("logs", "held"), "second\n")

    def two_at_once(self, pairs):
        """Two daemons of one database, for so many databases; the second a bit later each time."""
        for pair in range(pairs):
            self.use(str(pair))
            ids, rivals = self.fill(["job%d.%d" % (pair, number) for number in range(2)]), []
            for late_s in (0, pair * 0.002):
                pause(late_s)
                rivals.append(self.spawn("--socket", self.sock + str(late_s), "daemon", "--workers", "1",
                                         stderr=subprocess.PIPE))
            refused, = wait_until(lambda: [rival for rival in rivals if rival.poll() is not None],
                                  "one is refused")
            rivals.remove(refused)
            code, _, err = self.ended(refused)
            self.assertEqual((code, "pid %d" % rivals[0].pid in err), (1, True), err)
            self.assertIn(b"ready", rivals[0].stdout.readline())
            self.finish()
            self.check(ids)
            self.assertEqual(len(self.read("log").split()), 2)
            self.assertEqual(self.stop(rivals[0]), 0)

    def test_two_daemons_at_once_leave_one(self):
        self.two_at_once(8)

class StorageTest(FaultCase):
    """No space, no descriptors, no database; the clock jumps, signals are ignored."""

    @unittest.skipUnless(sys.platform == "linux", "needs Linux")
    def test_a_disk_that_takes_nothing_costs_neither_job_nor_outcome_nor_retry(self):
        daemon = self.daemon("--workers", "2")
        command, due = self.hold(), time.time() + 0.7
        self.probe("due", run_after=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(due)) + ".%03dZ" % (
            due % 1 * 1000))
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE)
                  for pid in [daemon.pid] + children_of(daemon.pid)}
        for pid, (_, hard) in limits.items():  # room for the log, not for a page
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (4000, hard))
        self.assertRegex(self.request("enqueue", value='{"command":"true"}'), "^Error")
        self.open_gate()
        wait_until(lambda: not alive(command) and time.time() > due + 0.3, "the command has ended")
        self.assertEqual(self.states(), {"held": "processing", "due": "pending"})
        wait_until(lambda: re.search("storage|space|can't be|too large", self.logged()), "the log tells")
        self.assertEqual({daemon.pid}.union(children_of(daemon.pid)), set(limits))
        for pid, before in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        self.finish()
        self.check(["held", "due"])
        self.assertEqual(self.read("log"), "held\ndue\n")

    def test_a_file_system_that_is_full_or_read_only_gets_one_clear_error_and_work_goes_on_after(self):
        self.use("small")
        if os.geteuid() or not shutil.which("mount") or subprocess.call(
                ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "small", self.path("")],
                stderr=subprocess.DEVNULL):
            self.skipTest("needs the right to mount")
        self.addCleanup(subprocess.call, ["umount", "--lazy", self.path("")])
        self.addCleanup(self.kill_all)
        daemon, command = self.daemon("--workers", "1"), self.hold()
        self.fill(["a", "b"])
        large = json.dumps({"id": "large", "command": self.probing(": " + "x" * 100000)})
        with open(self.path("filler"), "wb", 0) as file:
            for size in (4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)
        self.open_gate()
        for env in (self.env, dict(self.env, SOCKET_PATH=self.path("nobody"))):
            self.assertRegex(self.refused("enqueue", large, env=env), "space|full")
        wait_until(lambda: not alive(command), "the command has ended")
        os.unlink(self.path("filler"))
        self.ok("enqueue", large)
        self.finish()
        self.stop(daemon)
        subprocess.check_call(["mount", "-o", "remount,ro", self.path("")])
        for args in (("enqueue", "--", "true"), ("config", "set", "jitter", "1"), ("daemon",)):
            with self.subTest(args=args):
                self.assertRegex(self.refused(*args), "[Rr]ead-only|can't")
        subprocess.check_call(["mount", "-o", "remount,rw", self.path("")])
        self.probe("c")
        self.daemon()
        self.finish()
        self.check(["held", "a", "b", "large", "c"])

    def test_an_attempt_that_lacks_what_it_needs_is_given_back_and_burns_no_retry(self):
        wants = ("process", "descriptor", "note")
        for want in wants:
            open(self.path("no." + want), "w").close()
        daemon = self.driven("""
import errno
MAIN = os.getpid()
def lacks(want, number):
    if os.getpid() != MAIN:
        try:
            os.unlink(%r + want)
        except FileNotFoundError:
            return
        raise OSError(number, os.strerror(number))
at("Popen", True, lambda *args: lacks("process", errno.EAGAIN))
at("open", True, lambda path, flags, *args: (
    flags & os.O_EXCL and os.path.basename(path).isdigit() and lacks("descriptor", errno.EMFILE)))
at("pwrite", True, lambda fd, data, *args: b"serial" in data and lacks("note", errno.ENOSPC))
""" % self.path("no."), "--workers", "4")
        self.fill(["a", "b", "c", "d"], max_retries=1)
        self.finish()
        self.check(["a", "b", "c", "d"])
        self.assertEqual([want for want in wants if os.path.exists(self.path("no." + want))], [])
        self.assertRegex(self.logged(), "[cn]('t| not) start")
        self.assertIsNone(daemon.poll())

    def test_a_foreign_lock_of_three_seconds_is_waited_for_and_running_jobs_go_on(self):
        daemon = self.daemon("--workers", "2")
        command = self.hold()
        alone = dict(self.env, SOCKET_PATH=self.path("nobody"))
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            begun = time.monotonic()
            clients = [self.spawn("enqueue", json.dumps({"id": "job%d" % number, "command": self.probing()}),
                                  env=self.env if number % 2 else alone) for number in range(4)]
            self.open_gate()
            wait_until(lambda: not alive(command), "the running one goes on to its end")
            self.assertEqual(self.states(), {"held": "processing"})
            wait_until(lambda: time.monotonic() > begun + 3, "3 s pass")
            self.assertEqual([client.poll() for client in clients], [None] * 4)
            other.execute("COMMIT")
            self.assertEqual([client.wait(30) for client in clients], [0] * 4)
            self.finish()
            self.check(["held", "job0", "job1", "job2", "job3"])
            other.execute("BEGIN EXCLUSIVE")
            self.assertEqual(self.stop(daemon), 0)

    def test_a_database_that_is_not_what_it_was_is_written_to_no_more(self):
        daemons = {}
        for name in ("removed", "moved", "replaced", "emptied"):
            self.use(name)
            daemons[name] = self.daemon("--workers", "1")
            self.ok("backup", self.path("backup"))
            self.hold(then="[ $QUEUECTL_ATTEMPT = 1 ] || exit 0;")
            self.fill(["job%d" % number for number in range(5)])
            if name == "removed":
                os.unlink(self.db)
            elif name == "emptied":
                os.truncate(self.db, 0)
            else:
                os.rename(self.db, self.path("moved"))
                if name == "replaced":
                    shutil.copy(self.path("backup"), self.db)
            with contextlib.suppress(OSError, ValueError):  # no answer at all is none that misleads
                answer = self.ask(b'{"command":"enqueue","value":{"command":"true"}}\n')
                with self.subTest(name=name):
                    self.assertEqual((answer["success"], answer["message"][:5]), (False, "Error"))
            self.open_gate()
        for name, daemon in daemons.items():
            self.use(name)
            with self.subTest(name=name):
                self.assertEqual(daemon.wait(10), 1)
                wait_until(lambda: not [pid for pid in processes_of(self.db) if slot_of(pid, self.db)],
                           "its workers have left")
                self.assertEqual(self.read("log"), "held\n")  # nothing else was begun
                self.assertRegex(self.logged() + self.read("q.db.log"), "removed|replaced|emptied")
                if name == "moved":
                    os.rename(self.path("moved"), self.db)
                    self.haste()
                    self.daemon()
                    self.finish()
                    self.assertEqual(set(self.states().values()), {"completed"})
                    self.assertEqual((self.read("overlaps"), len(self.read("log").split())), ("", 7))

    def test_a_database_that_is_garbled_or_newer_is_refused_untouched_and_a_backup_put_back_goes_on(self):
        self.daemon("--workers", "1")
        self.enqueue("true", id="a", run_after=LATER)
        self.ok("backup", self.path("backup"))
        self.kill_all()
        self.rows("PRAGMA user_version = 1000000")
        for words in ("newer", "not a database|malformed|no queue"):
            before = read(self.db)
            for args in (("enqueue", "--", "true"), ("list",), ("status",), ("daemon",), ("drain",)):
                with self.subTest(args=args):
                    self.assertRegex(self.refused(*args), words)
            self.assertEqual(read(self.db), before)
            with open(self.db, "r+b") as file:
                file.write(b"garbled " * (len(before) // 8))
        shutil.copy(self.path("backup"), self.db)
        self.probe("b")
        self.daemon()
        self.wait_for("completed")
        self.are(a="pending", b="completed")

    def test_a_clock_that_steps_a_day_neither_loses_nor_times_out_nor_runs_twice(self):
        for days in (-1, 1):
            self.use(str(days))
            for key, value in (("delay-base", "30m"), ("max-delay", "1h"), ("backoff", "fixed")):
                self.ok("config", "set", key, value)
            self.driven("""
import time
def stepping(real, scale):
    return lambda: real() + %d * 86400 * scale * os.path.exists(%r)
time.time = stepping(time.time, 1)
if hasattr(time, "time_ns"):
    time.time_ns = stepping(time.time_ns, 10 ** 9)""" % (days, self.path("stepped")), "--workers", "2")
            self.hold(timeout=60000)
            self.probe("waits", "exit $((2 - $QUEUECTL_ATTEMPT))")
            self.wait_for("failed")
            open(self.path("stepped"), "w").close()
        for days in (-1, 1):
            self.use(str(days))
            with self.subTest(days=days):
                self.wait_for("completed")  # its time has come, or was too far ahead
                self.assertEqual(self.states()["held"], "processing")
                self.open_gate()
                self.finish()
                self.assertEqual((self.history("held"), self.history("waits")), ([None], ["exit 1", None]))
                self.assertEqual((self.read("overlaps"), len(self.read("log").split())), ("", 3))

    def test_signals_ignored_or_blocked_at_the_start_stop_it_and_reach_no_job(self):
        for number, argv in enumerate((
                sh("trap '' HUP INT QUIT TERM USR1 CHLD PIPE", driver()),
                driver("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))", "pass")), 1):
            with self.subTest(number=number):
                daemon = self.started(argv + ["daemon", "--workers", "1"])
                # The shell itself reads: a helper of its may be blocked from them while it starts.
                job = self.enqueue("while read name mask; do case $name in SigBlk:|SigIgn:) echo $mask ;;"
                                   " esac; done </proc/$$/status")
                self.wait_for("completed", number)
                masks = [int(mask, 16) & 0x7fffffff for mask in self.prints("logs", job).split()]
                self.assertEqual(masks, [0, 0])
                self.assertEqual(self.stop(daemon), 0)
                wait_until(lambda: not processes_of(self.dir), "its children have ended")

AS_NOBODY = ("import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
             "s = socket.socket(socket.AF_UNIX)\n")

class SecurityTest(FaultCase):
    """What another user may try, and what was planted."""

    @unittest.skipIf(os.geteuid(), "needs root, to be another user")
    def test_nobody_gets_in_even_if_the_modes_were_opened(self):
        self.daemon()
        os.chmod(self.dir, 0o755)
        os.chmod(self.sock, 0o666)
        answer = subprocess.check_output([sys.executable, "-c", AS_NOBODY + (
            "s.connect(sys.argv[1])\n"
            "try: s.sendall(b'{\"command\":\"enqueue\",\"value\":{\"command\":\"true\"}}\\n')\n"
            "except OSError: pass\n"
            "try: print(s.recv(4096).decode())\n"
            "except OSError: pass"), self.sock])
        self.assertNotIn(b'"success":true', answer.replace(b" ", b""))
        self.assertEqual(self.jobs(), [])

    @unittest.skipIf(os.geteuid(), "needs root, to be another user")
    def test_a_squatted_socket_path_is_an_error_and_left_alone(self):
        server = socket.socket(socket.AF_UNIX)
        self.addCleanup(server.close)

        def live(path):
            server.bind(path)
            server.listen(5)
        os.chmod(self.dir, 0o755)
        for plant in (lambda path: open(path, "w").close(), os.mkdir,
                      lambda path: os.symlink("/etc/passwd", path),
                      lambda path: os.symlink(self.path("nowhere"), path), live):
            plant(self.sock)
            os.lchown(self.sock, 65534, 65534)
            before = os.lstat(self.sock)
            with self.subTest(mode=oct(before.st_mode)):
                self.says(self.sock, "daemon")
                after = os.lstat(self.sock)
                self.assertEqual((after.st_ino, after.st_mode, after.st_uid),
                                 (before.st_ino, before.st_mode, 65534))
                self.assertFalse(os.path.exists(self.path("nowhere")))
            (os.rmdir if stat.S_ISDIR(before.st_mode) else os.unlink)(self.sock)

    @unittest.skipIf(os.geteuid(), "needs root, to be another user")
    def test_a_foreign_server_is_told_nothing_and_its_answers_are_not_believed(self):
        os.chmod(self.dir, 0o755)
        os.mkdir(self.path("tmp"))
        os.chmod(self.path("tmp"), 0o777)
        self.env["SOCKET_PATH"] = path = self.path("tmp/s")
        squatter = self.started([sys.executable, "-c", AS_NOBODY + (
            "s.bind(sys.argv[1]); s.listen(5); print('ready', flush=True)\n"
            "while True:\n"
            "  c = s.accept()[0]\n"
            "  try:\n"
            "    c.sendall(b'{\"success\":true,\"message\":\"Job enqueued\",\"id\":\"x\"}\\n')\n"
            "    print(c.recv(99), flush=True)\n"
            "  except OSError: pass\n"), path])
        code, out, err = self.cli("enqueue", "-q", "--", "true")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"end")
            client.shutdown(socket.SHUT_WR)
            told = iter(squatter.stdout.readline, b"b'end'\n")
            self.assertEqual(set(told) - {b"b''\n"}, set())
        self.assertEqual((code, list(self.states())), (0, [out.strip()]), err)

    @unittest.skipIf(os.geteuid(), "needs root, to be another user")
    def test_root_refuses_what_another_user_can_write(self):
        self.enqueue("true")
        for path, uid, mode in (
                (self.db, 65534, 0o600), (self.db, 0, 0o606), (self.db + "-run", 65534, 0o700),
                (self.dir, 65534, 0o700), (self.dir, 0, 0o777)):
            before = os.stat(path)
            os.chown(path, uid, uid)
            os.chmod(path, mode)
            for args in (("daemon",), ("enqueue", '{"command":"true"}'), ("list",)):
                if args == ("list",) and path.endswith("-run"):
                    continue
                with self.subTest(path=path, mode=oct(mode), args=args):
                    self.assertRegex(self.refused(*args), "another user|others|not .*yours")
            os.chown(path, 0, 0)
            os.chmod(path, before.st_mode & 0o777)
        self.assertEqual(len(self.jobs()), 1)

    def test_planted_links_are_not_followed(self):
        target = os.path.join(self.dir, "target")
        for name in ("q.db", "q.db-wal", "q.db-run", "q.db-run/lock", "q.db-run/daemon", "q.db-run/door",
                     "q.db-run/log", "q.db-run/w.1", "q.db-run/1"):
            self.use(name.replace("/", "-"))
            os.makedirs(os.path.dirname(self.path(name)), 0o700, exist_ok=True)
            with open(target, "w") as file:
                file.write("precious")
            os.chmod(target, 0o644)
            os.symlink(target, self.path(name))
            with self.subTest(name=name):
                daemon = self.spawn("daemon", "--workers", "1")
                if b"ready" in daemon.stdout.readline():  # it does without
                    self.probe("a")
                    self.finish()
                    self.kill(daemon)
                else:
                    self.assertEqual(daemon.wait(30), 1)
                self.assertEqual((read(target), os.stat(target).st_mode & 0o777), (b"precious", 0o644))

    def test_a_link_in_place_of_its_directory_is_refused(self):
        os.mkdir(self.path("elsewhere"), 0o700)
        os.symlink("elsewhere", self.path("q.db-run"))
        self.says(self.path("q.db-run"), "enqueue", "--", "true")
        self.assertEqual(os.listdir(self.path("elsewhere")), [])

    def test_a_stop_does_not_wait_for_a_stopped_server_nor_remove_what_others_put_at_its_socket(self):
        daemon = self.daemon("--workers", "1")
        server, = [pid for pid in children_of(daemon.pid) if slot_of(pid, self.db) is None]
        os.kill(server, signal.SIGSTOP)
        os.unlink(self.sock)
        open(self.sock, "w").close()
        self.assertEqual((self.stop(daemon), os.path.exists(self.sock)), (0, True))

    def test_a_running_job_deleted_by_hand_costs_no_slot(self):
        self.daemon("--workers", "1")
        self.hold()
        worker, = self.rows("SELECT slot FROM running")[0]
        self.rows("DELETE FROM jobs")
        os.kill(json.loads(read(self.db + "-run/w.%d" % worker))["pid"], signal.SIGKILL)
        self.probe("next")
        self.finish()
        self.assertEqual(self.states(), {"next": "completed"})

    def test_a_signal_to_a_child_writes_into_no_file(self):
        for opened in ("", "exec 3</dev/null", "exec 3</dev/null 4</dev/null"):  # shift the numbers
            self.use("with%d" % len(opened))
            daemon = self.started(sh(opened or ":", driver() + ["daemon", "--workers", "1"]))
            self.probe("a")
            self.finish()
            for pid in children_of(daemon.pid):
                os.kill(pid, signal.SIGINT)
                wait_until(lambda: b"ShdPnd:\t" + b"0" * 16 in read("/proc/%d/status" % pid), "it came")
            self.assertEqual(self.request("status")["jobs"]["completed"], 1)
            self.assertEqual((read(self.db)[:6], read(self.db + "-wal")[:1]), (b"SQLite", b"7"))
            self.kill(daemon)

    def test_all_files_are_private_whatever_the_umask(self):
        for mask in ("000", "077"):
            self.use(mask)
            for args in (["enqueue", "--", "sleep 60"], ["daemon", "--workers", "1"]):
                process = self.started(sh("umask " + mask, driver() + args), ready=args[0] == "daemon")
                args[0] == "daemon" or self.ended(process)
            self.wait_for("processing")
            modes = {name: os.lstat(os.path.join(above, name)).st_mode
                     for above, folders, files in os.walk(self.path("")) for name in folders + files}
            with self.subTest(umask=mask):
                self.assertEqual({stat.S_IMODE(mode) for mode in modes.values() if not stat.S_ISDIR(mode)},
                                 {0o600})
                self.assertEqual(stat.S_IMODE(modes["q.db-run"]), 0o700)
                self.assertLessEqual({"s", "q.db", "q.db-wal", "q.db-shm", "w.1"}, set(modes))

    def test_modules_beside_the_script_or_in_its_directory_are_not_imported(self):
        self.use("here")
        folder = self.path("")
        shutil.copy(SCRIPT, folder + "/queuectl.py")
        for name in ("json argparse sqlite3 selectors select socketserver subprocess multiprocessing"
                     " traceback random shlex queue signal").split():
            with open("%s/%s.py" % (folder, name), "w") as file:
                file.write("open(%r, 'w')\n" % self.path("hijacked"))
        self.started([sys.executable, folder + "/queuectl.py", "daemon", "--workers", "1"], cwd=folder)
        self.probe("a")
        self.finish()
        self.assertFalse(os.path.exists(self.path("hijacked")))

# ---- Bench --------------------------------------------------------------------------------------
# `make bench`: each row a function that yields Figures: medians of rounds, the queue's and the
# yardstick's in turn, so that a noisy moment hits both; with OTHER=/path/queuectl.py that program's
# in the same turns. What was timed is checked: an unfinished or repeated job is no result.

# must, aim: in `unit` (None: only told); beside: what was measured
Figure = collections.namedtuple("Figure", "what value unit must aim beside")

PROGRAMS = [("", SCRIPT)] + [  # what is added to the name of a Figure, path
    (", OTHER", os.path.abspath(path)) for path in [os.environ.get("OTHER")] if path]

BARE_LOOP = """import subprocess, sys, time
start = time.monotonic()
for _ in range(int(sys.argv[1])):
    subprocess.run(["/bin/sh", "-c", "true"])
print(start, time.monotonic())"""

# Each sync takes at least BENCH_SYNC_MS, if that is there: the same library is loaded both ways.
SLOW_DISK = """#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static int sync_as(long number, int fd) {
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    int status = syscall(number, fd), ms = atoi(getenv("BENCH_SYNC_MS") ?: "0");
    end.tv_sec += (end.tv_nsec += ms * 1000000L) / 1000000000, end.tv_nsec %= 1000000000;
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL);
    return status;
}
int fdatasync(int fd) { return sync_as(SYS_fdatasync, fd); }
int fsync(int fd) { return sync_as(SYS_fsync, fd); }
"""

def expect(found, wanted, what):
    if found != wanted:
        raise SystemExit("bench: %s: %r, not %r" % (what, found, wanted))

def timed(argv, env, stdin=b""):
    """ms that a process takes, which must succeed."""
    start = time.monotonic()
    done = subprocess.run(argv, env=env, input=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expect(done.returncode, 0, "exit status of %s" % argv)
    return (time.monotonic() - start) * 1000

class Trial(QueueCase):
    """A queue of its own for `script`; however its block ends, no process and no file is left."""

    def __init__(self, script):
        super().__init__("setUp")
        self.argv = [sys.executable, script]

    def __enter__(self):
        self.setUp()
        return self

    def __exit__(self, *_):
        self.doCleanups()

    def call(self, *args, stdin=""):
        return timed(self.argv + list(args), self.env, stdin.encode())

    def fill(self, name, count, command, **fields):
        """Store `count` jobs, their ids beginning with `name`."""
        self.call("enqueue", "-", stdin="\n".join(
            json.dumps(dict(fields, id=name + str(n), command=command)) for n in range(count)))

    def count(self, state="completed"):
        return self.request("status")["jobs"][state]

    def until_completed(self, count, every_s=0.05):
        wait_until(lambda: self.count() >= count, "%d jobs are done" % count, 600, every_s)

    def check(self, count, first=""):
        """`count` jobs, with ids that begin with `first`, were completed at their first attempt."""
        expect(self.rows("""SELECT COUNT(*), SUM(state = 'completed'), SUM(attempts), MAX(attempts)
                            FROM jobs WHERE id > ? AND id < ?""", first, first + "~"),
               [(count, count, count, 1)], "jobs, completed, attempts, the most of one")

    def drain(self, workers, count, asks_a_second=0):
        """(jobs a second from `worker start` on, ms that each `enqueue` took meanwhile)"""
        waits, done, start = [], threading.Event(), time.monotonic()
        self.call("worker", "start", "--count", str(workers))

        def ask():
            next_at = time.monotonic()
            while asks_a_second and not done.wait(max(0, next_at - time.monotonic())):
                begun, next_at = time.monotonic(), next_at + 1 / asks_a_second
                self.store({"command": "true", "priority": -1})
                waits.append((time.monotonic() - begun) * 1000)
        asker = threading.Thread(target=ask)
        asker.start()
        try:
            self.until_completed(count)
            rate = self.count() / (time.monotonic() - start)
        finally:
            done.set()
            asker.join()
        self.until_completed(count + len(waits))
        self.check(count + len(waits))
        return rate, waits

    def store(self, job):
        expect(self.request("enqueue", value=json.dumps(job)), "Job enqueued", "answer")

    def pids(self):
        """(its workers, supervisor and server)"""
        workers = [worker["pid"] for worker in json.loads(subprocess.check_output(
            self.argv + ["worker", "list"], env=self.env).decode())]
        return workers, [pid for pid in processes_of(self.dir) if pid not in workers]

def in_turn(yardstick, measure, rounds=3):
    """`yardstick()` and `measure(script)` in turn; ("" or ", OTHER", [(its own, bare) a round])."""
    found = [(suffix, script, []) for suffix, script in PROGRAMS]
    for _ in range(rounds):
        bare = yardstick()
        for _, script, pairs in found:
            pairs.append((measure(script), bare))
    return [(suffix, pairs) for suffix, _, pairs in found]

def medians(pairs):
    """(of the ratios of each round, of the one side, of the other)"""
    return [statistics.median(values)
            for values in [[ours / bare for ours, bare in pairs]] + list(zip(*pairs))]

def bare_rate(count):
    """Commands a second of two bare Python loops."""
    argv = [sys.executable, "-c", BARE_LOOP, str(count // 2)]
    loops = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(2)]
    times = [float(text) for loop in loops for text in loop.communicate()[0].split()]
    return count / (max(times) - min(times))

def drained(script, workers, count, asks_a_second=0, **env):
    with Trial(script) as trial:
        trial.fill("job", count, "true")
        trial.env.update(env)
        return trial.drain(workers, count, asks_a_second)

def row_drain(count=2000):
    """2,000 x true on 2 and on 8 workers, against two bare Python loops."""
    must = 0.45 if sys.version_info < (3, 10) else 0.55
    for workers, aim in ((2, 0.62), (8, 0.65)):
        for suffix, pairs in in_turn(lambda: bare_rate(count),
                                     lambda script: drained(script, workers, count)[0]):
            yield Figure("drain, %d workers%s" % (workers, suffix), medians(pairs)[0],
                         "of the bare loops", must, aim, "%d of %d jobs/s" % tuple(medians(pairs)[1:]))

def row_enqueue(rounds=60):
    """An `enqueue` call beside an idle worker, as script and as installed, against a bare python."""
    job, calls = '{"command":"true","run_after":"2100-01-01"}', []
    with contextlib.ExitStack() as stack:
        for suffix, script in PROGRAMS:
            trial = stack.enter_context(Trial(script))
            trial.call("worker", "start", "--count", "1")
            calls.append(("enqueue" + suffix, trial, script, 5.5, 4.5))
            launcher = trial.path("prefix/bin/queuectl")
            make("install", script, PREFIX=trial.path("prefix"))
            if os.path.exists(launcher):
                calls.append(("enqueue, installed" + suffix, trial, launcher, 3.2, 2.8))
            else:
                yield Figure("enqueue, installed" + suffix, None, "", None, None,
                             "skipped: no make, or no Makefile that installs")
        bare, *ours = map(statistics.median, zip(*[
            [timed([sys.executable, "-c", "pass"], trial.env)]
            + [timed([sys.executable, path, "enqueue", job], trial.env) for _, trial, path, _, _ in calls]
            for _ in range(rounds)]))
        for _, trial, _, _, _ in calls:
            expect(trial.count("pending"), rounds * sum(call[1] is trial for call in calls), "stored")
    for (what, _, _, must, aim), value in zip(calls, ours):
        yield Figure(what, value / bare, "x python3 -c pass", must, aim,
                     "%.1f against %.1f ms" % (value, bare))

def dispatched(script, count):
    """ms from the answer to an enqueue until the job of an idle worker runs, of each."""
    told = {}
    with Trial(script) as trial:
        trial.call("worker", "start", "--count", "1")
        for number in range(count):
            job = "d%d" % number
            trial.store({"id": job, "command": "date '+%s %%s%%N' >>%s" % (job, trial.path("stamps"))})
            told[job] = time.time()
            trial.until_completed(number + 1, every_s=0.02)
        trial.check(count)
        stamps = dict(line.split() for line in trial.read("stamps").splitlines())
    return [int(stamps[job]) / 1e6 - at * 1000 for job, at in told.items()]

def row_dispatch(count=100):
    """From the answer to an enqueue until the job of an idle worker runs."""
    for suffix, pairs in in_turn(lambda: timed(["/bin/sh", "-c", "date"], os.environ),
                                 lambda script: dispatched(script, count)):
        waits = sorted(itertools.chain(*[ours for ours, _ in pairs]))
        yield Figure("dispatch, median" + suffix, statistics.median(waits), "ms", 10, 3,
                     "a bare `sh -c date` %.1f ms" % medians([(1, bare) for _, bare in pairs])[2])
        yield Figure("dispatch, p99" + suffix, waits[len(waits) * 99 // 100], "ms", 50, 10,
                     "of %d jobs" % len(waits))

def urgent(trial, name, count):
    """Jobs a second of `count` that go before whatever else waits, on 2 workers at work."""
    trial.fill(name, count, "true", priority=9)
    until = trial.rows("SELECT COUNT(*) FROM jobs WHERE state = 'completed'")[0][0] + count
    trial.call("worker", "start", "--count", "2")
    before, start = trial.count(), time.monotonic()
    trial.until_completed(until)
    rate = (trial.count() - before) / (time.monotonic() - start)
    trial.call("daemon", "stop")
    wait_until(lambda: not processes_of(trial.dir), "its workers are gone")
    trial.check(count, name)
    return rate

def row_backlog(rounds=3, count=1500, waiting=1000000):
    """Claims with 1,000,000 jobs waiting, ready or scheduled, against an empty queue."""
    with Trial(SCRIPT) as empty, Trial(SCRIPT) as ready, Trial(SCRIPT) as scheduled:
        for trial, columns in ((ready, (1, None)), (scheduled, (None, 4102444800000))):
            trial.fill("first", 1, "true", priority=-1000)
            with contextlib.closing(sqlite3.connect(trial.db)) as connection, connection:
                connection.executemany(
                    """INSERT INTO jobs (id, command, state, cwd, env, run_after, ready, due)
                       VALUES ('wait' || ?, 'true', 'pending', '/', '{}', '2100-01-01', ?, ?)""",
                    ((number,) + columns for number in range(waiting)))
        turns = [[urgent(trial, "urgent%d-" % number, count) for trial in (empty, ready, scheduled)]
                 for number in range(rounds)]
    for what, column in (("ready", 1), ("scheduled", 2)):
        ratio, ours, bare = medians([(turn[column], turn[0]) for turn in turns])
        yield Figure("beside {:,} {}".format(waiting, what), ratio, "of an empty queue's", 0.8, 0.95,
                     "%d of %d jobs/s" % (ours, bare))

def row_bulk(count=50000):
    """`enqueue -` as a process of its own, daemon up."""
    def bulk(script):
        with Trial(script) as trial:
            trial.call("worker", "start", "--count", "1")
            trial.call("worker", "stop")
            took_ms = trial.call("enqueue", "-", stdin='{"command":"true"}\n' * count)
            expect(trial.count("pending"), count, "jobs stored")
            return count * 1000 / took_ms
    for suffix, pairs in in_turn(lambda: 1, bulk):
        yield Figure("enqueue in bulk" + suffix, int(medians(pairs)[1]), "jobs/s", 20000, 80000,
                     "%d jobs at a time" % count)

def row_disk(count=2000, workers=2, slow_ms=10):
    """The drain with a sync that takes 10 ms, against the real disk, beside 20 enqueues a second."""
    def on(script, **env):
        rate, waits = drained(script, workers, count, 20, LD_PRELOAD=library, **env)
        expect(not env or min(waits) >= slow_ms, True, "what was acknowledged was synced")
        return rate, statistics.median(waits)
    if not shutil.which("cc"):
        return (yield Figure("drain, slow disk", None, "", None, None, "skipped: no cc"))
    with tempfile.TemporaryDirectory() as folder:
        library = folder + "/slow_disk.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-xc", "-", "-o", library], check=True,
                       input=SLOW_DISK.encode())
        for suffix, pairs in in_turn(lambda: None, lambda script: (
                on(script, BENCH_SYNC_MS=str(slow_ms)), on(script))):
            (ratio, slow, real), (_, wait, waits) = (
                medians([(ours[column], bare[column]) for (ours, bare), _ in pairs]) for column in (0, 1))
            yield Figure("drain, slow disk" + suffix, ratio, "of the real disk's", 0.7, 0.9,
                         "%d of %d jobs/s; an enqueue %.1f, %.1f ms" % (slow, real, wait, waits))

def cpu_s(pid):
    """Seconds of CPU that a process has used; in steps of 10 ms where the kernel keeps no more."""
    with contextlib.suppress(OSError):
        return sum(int(read("/proc/%d/task/%s/schedstat" % (pid, task)).split()[0])
                   for task in os.listdir("/proc/%d/task" % pid)) / 1e9
    return sum(map(int, stat_of(pid)[11:13])) / os.sysconf("SC_CLK_TCK")

def row_idle(seconds=20, workers=8):
    """CPU of a daemon and 8 workers that have nothing to do."""
    for suffix, script in PROGRAMS:
        with Trial(script) as trial:
            trial.call("worker", "start", "--count", str(workers))
            wait_until(lambda: len(trial.pids()[0]) == workers, "all workers are there")
            pids = processes_of(trial.dir)
            wait_until(lambda: all(stat_of(pid)[0] == b"S" for pid in pids), "all wait")
            before = sum(map(cpu_s, pids))
            pause(seconds)
            used = sum(map(cpu_s, pids)) - before
            expect(processes_of(trial.dir), pids, "processes")
        yield Figure("idle, %d s%s" % (seconds, suffix), used, "s CPU", 0.1, 0.02,
                     "%d processes" % len(pids))

def row_busy(workers=64, count=4000):
    """An `enqueue` request while 64 workers drain."""
    for suffix, pairs in in_turn(lambda: None, lambda script: drained(script, workers, count, 100)):
        rates, lists = zip(*[ours for ours, _ in pairs])
        waits = sorted(itertools.chain(*lists))
        yield Figure("enqueue, %d busy%s" % (workers, suffix), waits[len(waits) * 99 // 100], "ms, p99",
                     50, 10, "of %d, median %.1f ms; %d jobs/s" % (
                         len(waits), statistics.median(waits), statistics.median(rates)))

def pss_mib(pid):
    """Its share of the memory it holds, in MiB; 0 if it has ended."""
    for name in ("smaps_rollup", "smaps"):
        with contextlib.suppress(OSError):
            text = read("/proc/%d/%s" % (pid, name))
            return sum(int(kib) for kib in re.findall(rb"^Pss:\s*(\d+)", text, re.M)) / 1024.0
    return 0

def row_memory(workers=8, count=200):
    """Memory of supervisor and server, and of each worker, after some jobs."""
    for suffix, script in PROGRAMS:
        with Trial(script) as trial:
            trial.fill("job", count, "true")
            trial.drain(workers, count)
            wait_until(lambda: len(trial.pids()[0]) == workers, "all workers are there")
            each, rest = ([pss_mib(pid) for pid in pids] for pids in trial.pids())
        yield Figure("memory, daemon" + suffix, sum(rest), "MiB PSS", 30, 20,
                     "%d processes, after %d jobs" % (len(rest), count))
        yield Figure("memory, worker" + suffix, max(each), "MiB PSS", 8, 6,
                     "the largest of %d, in all %.1f" % (workers, sum(each)))

def row_many(workers=64, count=1280):
    """64 workers on sleep 0.2, against the ideal: from the first start to the last end."""
    def rate(script):
        with Trial(script) as trial:
            trial.fill("job", count, "sleep 0.2")
            trial.drain(workers, count)
            return count / 86400 / trial.rows("""SELECT julianday(MAX(finished_at))
                                                        - julianday(MIN(started_at)) FROM jobs""")[0][0]
    for suffix, pairs in in_turn(lambda: workers / 0.2, rate):
        yield Figure("%d workers%s" % (workers, suffix), medians(pairs)[0], "of the ideal", 0.8, 0.95,
                     "%d of %d jobs/s" % tuple(medians(pairs)[1:]))

def row_size():
    """Tokens and lines of the file; what is allowed depends on what is in."""
    for suffix, script in PROGRAMS:
        tokens, lines = size_of(script)
        whole = all(word in read(script) for word in (b'"web"', b'"group"', b'"after"'))
        for unit, value, must in (("tokens", tokens, (26500, 29500)[whole]),
                                  ("lines", lines, (4100, 4500)[whole])):
            yield Figure("size" + suffix, value, unit, must, None,
                         "everything in" if whole else "without all of web, groups, after")

def bench(*names):
    """Print the table, or the rows named; the exit status: whether this program missed a must."""
    known = {name[4:]: row for name, row in globals().items() if name.startswith("row_")}
    if set(names) - set(known):
        raise SystemExit("bench: rows are " + ", ".join(known))
    print("Python %s, SQLite %s, %d CPUs, load %.1f" % (
        sys.version.split()[0], sqlite3.sqlite_version, os.cpu_count(), os.getloadavg()[0]))
    layout, missed = "%-26s %8s %-20s %2s %6s %6s  %-6s %s", False
    print(layout % ("what", "value", "unit", "", "must", "aim", "holds", "measured"))
    for figure in itertools.chain.from_iterable(known[name]() for name in names or known):
        sign = 1 if re.match("of |jobs", figure.unit) else -1  # the more the better, or the less
        verdict = ("-" if figure.must is None or ", OTHER" in figure.what
                   else "yes" if figure.value * sign >= figure.must * sign else "MISSED")
        value, must, aim = ["-" if one is None else round(one, 3) for one in figure[1:2] + figure[3:5]]
        print(layout % (figure.what, value, figure.unit, ">=" if sign > 0 else "<=", must, aim,
                        verdict, figure.beside), flush=True)
        missed = missed or verdict == "MISSED"
    return int(missed)

# ---- Storms -------------------------------------------------------------------------------------
# `make stress`: the storm kills workers, servers and daemons for minutes while jobs keep coming, the
# soak runs 100,000 jobs through one daemon. `make plug`: power cuts. Figures are printed; anything
# lost or run twice at once makes the exit status 1.

def storm_jobs(chance, case, name, count):
    """Jobs for a storm, as objects to enqueue: here limited groups and chains would come in."""
    return [{"id": "%s.%d" % (name, number), "max_retries": 1000,
             "command": case.PROBE.replace("; echo", "; sleep 0.0%d; echo" % chance.randint(1, 9))
             % {"dir": case.path("")}} for number in range(count)]

class Storm(FaultCase):
    """Random kills against a queue that clients keep full; `wrong()` tells what became of it."""

    def __init__(self, seed):
        super().__init__("rage")
        self.chance, self.clients_chance = random.Random(seed), random.Random(seed + 1)
        self.acknowledged, self.cancels, self.cancelled = set(), set(), set()
        self.killed = dict.fromkeys(("workers", "servers", "daemons", "clients"), 0)
        self.pending = {}      # serial of an attempt hit by a kill -> when, monotonic
        self.slowest = 0.0     # s from a kill until the attempt's fate was recorded
        self.over = threading.Event()
        self.trouble = None    # what ended the clients

    def feed(self):
        """Enqueue and cancel, whoever is there to do it; some of the calls are killed."""
        try:
            chance, caller = self.clients_chance, self.caller()
            for number in itertools.count():
                if self.over.is_set():
                    return
                if self.unfinished() > 60:
                    self.over.wait(0.02)
                    continue
                calls = [(("enqueue", json.dumps(job)), self.acknowledged, job["id"])
                         for job in storm_jobs(chance, self, "job%d" % number, 6)]
                for job_id in sorted(self.acknowledged - self.cancels)[-12:]:
                    if chance.random() < 0.1:
                        self.cancels.add(job_id)
                        calls.append((("cancel", job_id), self.cancelled, job_id))
                answers = caller(*[call for call, _, _ in calls], signal=9 * (chance.random() < 0.3),
                                 after_s=chance.uniform(0, 0.03))
                for (_, done, job_id), (status, out, err) in zip(calls, answers):
                    self.killed["clients"] += status == -9
                    if status == 0:
                        done.add(job_id)
                    elif status != -9 and done is self.acknowledged:
                        raise AssertionError("enqueue of %s: %s" % (job_id, err))
        except BaseException as error:
            self.trouble = repr(error)

    def watch(self):
        """Note which of the attempts hit by a kill are settled now."""
        if self.pending:
            for serial in set(self.pending) - {one for one, in self.rows("SELECT serial FROM running")}:
                self.slowest = max(self.slowest, time.monotonic() - self.pending.pop(serial))

    def strike(self, daemon):
        """Kill a worker or the server; orphans of an earlier daemon are no children of this one."""
        children = {pid: slot_of(pid, self.db) for pid in children_of(daemon.pid)}
        server = self.chance.random() < 0.12
        victims = sorted(pid for pid, slot in children.items() if (slot is None) == server)
        if victims:
            victim = self.chance.choice(victims)
            kill_those([victim])
            self.killed["servers" if server else "workers"] += 1
            for serial, slot in self.rows("SELECT serial, slot FROM running"):
                if slot == children[victim]:  # again, if it was about to settle another's
                    self.pending[serial] = time.monotonic()

    def rage(self, seconds):
        """Kill for so long; then let the queue come to rest."""
        self.haste()
        daemon = self.daemon("--workers", "4")
        feeder = threading.Thread(target=self.feed)
        feeder.start()
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end and not self.trouble:
                pause(self.chance.uniform(0.01, 0.05))
                self.watch()
                if self.chance.random() < 0.96:
                    self.strike(daemon)
                else:
                    self.kill(daemon)
                    daemon.stdout.close()
                    self.daemons.remove(daemon)
                    self.killed["daemons"] += 1
                    daemon = self.daemon()
                    self.pending.update(dict.fromkeys(self.pending, time.monotonic()))
        finally:
            self.over.set()
            feeder.join()
        wait_until(lambda: self.watch() or not self.unfinished(), "all is done", 120)
        self.watch()
        wait_until(lambda: self.ok("status")["workers"] == 4, "the pool is at its number")

    def figures(self):
        log = self.read("log").split()
        return ("%(workers)d workers, %(servers)d servers, %(daemons)d daemons, %(clients)d clients killed"
                % self.killed + ", %d jobs acknowledged, %d cancelled, %d attempts lost, %d jobs ran more"
                " than once, slowest recovery %.2f s" % (
                    len(self.acknowledged), list(self.states().values()).count("cancelled"), self.lost(),
                    len(log) - len(set(log)), self.slowest))

    def wrong(self):
        states = self.states()
        wrong = dict(self.wrongs(self.acknowledged, self.cancels, (0, self.killed["workers"])), **{
            "cancels forgotten": sorted(job_id for job_id in self.cancelled
                                        if states.get(job_id) not in ("cancelled", "completed")),
            "slow": ["%.2f s" % self.slowest] if self.slowest > 2 else [],
            "clients": [self.trouble] if self.trouble else []})
        return {what: found for what, found in wrong.items() if found}

class StormTest(unittest.TestCase):
    def test_a_short_storm_loses_nothing_and_runs_nothing_twice_at_once(self):
        storm = Storm(int(os.environ.get("SEED") or 1))
        self.addCleanup(storm.doCleanups)
        storm.setUp()
        storm.rage(2)
        self.assertEqual(storm.wrong(), {}, storm.figures())
        self.assertGreater(min(storm.killed["workers"], len(storm.acknowledged)), 10, storm.figures())

class Soak(FaultCase):
    """Many short jobs through one daemon: nothing may grow."""

    def sample(self, daemon):
        """[PSS in MiB, descriptors, zombies, WAL in MiB, database in MiB] of daemon and children."""
        pids = [daemon.pid] + children_of(daemon.pid)
        living, fds = list(filter(alive, pids)), 0
        for pid in living:
            with contextlib.suppress(OSError):
                fds += len(os.listdir("/proc/%d/fd" % pid))
        return [sum(map(pss_mib, living)), fds, len(pids) - len(living)] + [
            os.path.getsize(self.db + end) / 1048576.0 for end in ("-wal", "")]

    def completed(self):
        found = re.search(r"(?m)^queuectl_jobs_completed_total (\S+)",
                          self.prints("metrics", "--format", "prometheus"))
        return int(float(found.group(1)))

    def soak(self, count, batch=1000):
        """Run `count` jobs; what grew, as {name: [early, late]}."""
        self.ok("config", "set", "retention", "2s")
        daemon, samples, start = self.daemon("--workers", "2"), [], time.monotonic()
        print("soak:    jobs   PSS MiB  open fds  zombies   WAL MiB    DB MiB")
        for number in range(0, count, batch):
            self.ok("enqueue", "-", stdin='{"command":"echo x"}\n' * batch)
            wait_until(lambda: self.completed() > number - 2 * batch, "jobs go on", 120, every_s=0.1)
            if len(samples) < number * 10 // count:
                samples.append(self.sample(daemon))
                print("soak: %7d %9.1f %9d %8d %9.1f %9.1f" % ((self.completed(),) + tuple(samples[-1])),
                      flush=True)
        wait_until(lambda: self.completed() == count, "all have completed", 120, every_s=0.1)
        print("soak: %d jobs/s" % (count / (time.monotonic() - start)))
        wait_until(lambda: self.rows("SELECT COUNT(*) FROM jobs") == [(0,)], "all are deleted", 120)
        samples.append(self.sample(daemon))
        early = [max(column) for column in zip(*samples[:max(len(samples) // 2, 1)])]
        names = ("PSS", "descriptors", "zombies", "WAL", "database")
        return {name: [first, last] for name, first, last, slack in zip(
            names, early, samples[-1], (2, 2, 0, 4, 2)) if last > first * 1.1 + slack}

def conclude(name, wrong, well):
    """Print what is wrong, or that all is well; the exit status."""
    for what, found in wrong.items():
        print("%s: %s: %s" % (name, what, str(found)[:500]))
    print("%s: %s" % (name, "FAILED" if wrong else well))
    return int(bool(wrong))

def stress():
    """The storm, then two daemons at once, interrupts and the soak; the exit status."""
    seconds, seed, jobs = (int(os.environ.get(name) or default) for name, default in (
        ("SECONDS", 180), ("SEED", time.time()), ("JOBS", 100000)))
    print("stress: %d s, then %d jobs; the same again with: make stress SEED=%d" % (seconds, jobs, seed),
          flush=True)
    wrong, storm, soak = {}, Storm(seed), Soak("soak")
    rivals = OrphanTest("test_two_daemons_at_once_leave_one")
    commands = CommandFaultTest("test_a_command_interrupted_at_any_moment_leaves_no_lock")

    def rage():
        storm.rage(seconds)
        print("storm: " + storm.figures(), flush=True)
        return storm.wrong()
    for case, action in ((storm, rage), (rivals, lambda: rivals.two_at_once(50)),
                         (commands, lambda: commands.interrupt(3000)),
                         (soak, lambda: soak.soak(jobs - jobs % 1000))):
        case.setUp()
        try:
            wrong.update(action() or {})
        except AssertionError as error:
            wrong[type(case).__name__] = error
        finally:
            case.doCleanups()
    return conclude("stress", wrong, "nothing lost, nothing twice, nothing grew")

# As if nobody answered at any socket.
ALONE = """
import socket
def refuse(*args):
    raise ConnectionRefusedError(111, "Connection refused")
socket.socket.connect = refuse
"""

class Plug(FaultCase):
    """Power cuts of a queue that lives on a file system in a file. A copy of that file, taken while
    all stands still, is the disk as the cut leaves it: what had not been synced is not in it."""

    def __init__(self, seed):
        super().__init__("pull")
        self.chance = random.Random(seed)

    def setUp(self):
        super().setUp()
        self.disk = self.path("disk")
        self.env["DB_PATH"] = self.db = os.path.join(self.disk, "q.db")
        os.mkdir(self.disk)
        self.addCleanup(self.switch_off)

    def switch_off(self):
        self.kill_all()
        self.daemons = []
        if os.path.ismount(self.disk):
            wait_until(lambda: not subprocess.call(["umount", self.disk]), "nothing uses the disk")

    def switch_on(self, image, boot, code=""):
        """Mount the image and start a daemon, as after another boot."""
        subprocess.check_call(["mount", "-o", "loop", image, self.disk])
        os.chmod(self.disk, 0o700)
        self.driven(self.boot(boot) + code, "--workers", "3")

    def feed(self, caller, name, acknowledged, over):
        """Enqueue jobs, and cancel some; `acknowledged`: id -> whether its cancel was, None: it may be."""
        for number in itertools.count():
            jobs = storm_jobs(self.chance, self, "%s.%d" % (name, number), 3)
            answers = caller(*[("enqueue", json.dumps(job)) for job in jobs])
            ids = [job["id"] for job, answer in zip(jobs, answers) if answer[0] == 0]
            if over.is_set():
                return
            acknowledged.update(dict.fromkeys(ids, False))
            if ids and number % 3 == 0:
                acknowledged[ids[0]] = None
                answers = caller(("cancel", ids[0]))
                if over.is_set():
                    return
                acknowledged[ids[0]] = bool(answers and answers[0][0] == 0) or None

    def pull(self, name, code=""):
        """One power cut; (acknowledged, what is wrong after it, as {what: ids or rows})."""
        # New names: a loop device that lingers would show the old contents.
        before, after = self.path("before%s" % name), self.path("after%s" % name)
        with open(before, "wb") as file:
            file.truncate(64 << 20)
        subprocess.check_call(["mkfs.ext4", "-q", "-F", before])
        self.switch_on(before, "a%s" % name, code)
        self.haste()
        acknowledged, over, feeders = {}, threading.Event(), []
        for kind, trick in (("asks", ""), ("alone", ALONE)):  # by the daemon, and by commands themselves
            feeders.append(threading.Thread(target=self.feed, args=(
                self.caller(code + trick), "%s.%s" % (name, kind), acknowledged, over)))
            feeders[-1].start()
        try:
            pause(self.chance.uniform(0.3, 1.5))
            kill_those(processes_of(self.dir), signal.SIGSTOP)
            promised, ran = dict(acknowledged), self.read("log").split()
            shutil.copyfile(before, after)
        finally:
            over.set()
            kill_those(processes_of(self.dir))
            for feeder in feeders:
                feeder.join()
        self.switch_off()
        self.switch_on(after, "b%s" % name)
        self.finish(60)
        wrong = self.report(name, promised, ran)
        self.switch_off()
        os.unlink(before)
        os.unlink(after)
        return promised, wrong

    def report(self, name, promised, ran):
        stored, log = self.states(), self.read("log").split()
        print("plug: cut %s, %d jobs acknowledged, %d of them by commands themselves, %d stored, %d ran more"
              " than once" % (name, len(promised), sum(".alone." in one for one in promised), len(stored),
                              sum(log.count(job_id) > 1 for job_id in stored)), flush=True)
        wrong = self.wrongs(promised, {job_id for job_id in stored if promised.get(job_id) is not False})
        wrong["run though cancelled"] = sorted(job_id for job_id, cancelled in promised.items()
                                               if cancelled and log.count(job_id) > ran.count(job_id))
        return {what: found for what, found in wrong.items() if found and what in (
            "damaged", "lost", "overlaps", "in the wrong state", "never run", "run though cancelled")}

def plug():
    """Power cuts, and one of a program that syncs nothing; the exit status."""
    rounds, seed = int(os.environ.get("ROUNDS") or 10), int(os.environ.get("SEED") or time.time())
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        print("plug: needs root, mkfs.ext4 and loop devices")
        return 1
    print("plug: %d cuts; the same again with: make plug SEED=%d" % (rounds, seed), flush=True)
    case, wrong = Plug(seed), {}
    case.setUp()
    try:
        for number in range(1, rounds + 1):
            for what, found in case.pull(number)[1].items():
                wrong.setdefault(what, []).extend(found)
        promised, found = case.pull("without", "os.fdatasync = lambda fd: None\n")
        print("plug: of a program that syncs nothing %d of %d are lost" % (
            len(found.get("lost", ())), len(promised)))
    finally:
        case.doCleanups()
    return conclude("plug", wrong, "nothing lost, nothing damaged")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` cleans up
    if sys.argv[1:2] == ["bench"] or sys.argv[1:] in (["stress"], ["plug"]):
        setUpModule()  # what the shell brings is left out
        sys.exit({"bench": bench, "stress": stress, "plug": plug}[sys.argv[1]](*sys.argv[2:]))
    unittest.main()
