"""Tests of queuectl, cheapest first. `make test T=StoriesTest` runs one class; the program is the
file named by QUEUECTL, else queuectl.py beside this one."""
import array
import ast
import atexit
import calendar
import contextlib
import errno
import fcntl
import functools
import itertools
import json
import marshal
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
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

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.abspath(os.environ.get("QUEUECTL") or os.path.join(HERE, "queuectl.py"))


def setUpModule():
    """What the shell brings is not for the tests: a queue of its own, and SIGINT ignored where it
    runs them in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("DB_PATH", "SOCKET_PATH", "NOTIFY_SOCKET", "NO_COLOR", "COLUMNS", "LINES"):
        os.environ.pop(name, None)


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


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# ---- The program under test ---------------------------------------------------------------------
# It is compiled once. Each command is a process of its own: `driver` has the words that start one,
# after changes to the standard library or to constants; short commands are forked from a Template,
# which has the standard library loaded, in a twentieth of the time.

@functools.lru_cache()
def compiled():
    """The path of the program's code: to compile it takes most of a process's start."""
    fd, path = tempfile.mkstemp(prefix="queuectl-test-")
    atexit.register(os.unlink, path)
    with open(fd, "wb") as file:
        marshal.dump(compile(read(SCRIPT), SCRIPT, "exec", dont_inherit=True), file)
    return path


# For the code of `driver`.
TOOLS = """
def passed(path, n):
    "Kill this process at the n-th pass, counted over all processes."
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, b".")
    if os.lseek(fd, 0, os.SEEK_CUR) == n:
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(fd)

def around(owner, name, before, point):
    "Have point() called before or after each call."
    inner = getattr(owner, name)
    def outer(*args, **named):
        if before:
            point()
        value = inner(*args, **named)
        if not before:
            point()
        return value
    setattr(owner, name, outer)

def on_sql(hook):
    "Have hook(connection, sql, run) called for each statement, by a connection or its cursors."
    class Cursor(sqlite3.Cursor):
        def execute(self, sql, *values):
            return hook(self.connection, sql, lambda: sqlite3.Cursor.execute(self, sql, *values))
        def executemany(self, sql, *values):
            return hook(self.connection, sql,
                        lambda: sqlite3.Cursor.executemany(self, sql, *values))
    class Connection(sqlite3.Connection):
        def cursor(self, factory=Cursor):
            return sqlite3.Connection.cursor(self, factory)
        def execute(self, sql, *values):
            return self.cursor().execute(sql, *values)
        def executemany(self, sql, *values):
            return self.cursor().executemany(sql, *values)
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **named: connect(*args, **dict(named, factory=Connection))
"""

# Run as the script itself; but where constants are to be changed it is a module first, since its
# last lines never return.
DRIVER = """
import marshal, os, signal, sqlite3, sys, types
with open(sys.argv.pop(2), "rb") as file:
    CODE = marshal.load(file)
CONSTANTS = sys.argv.pop(2)
del sys.argv[0]  # the script's name comes first, as if it had been called
""" + TOOLS + """
%s
queuectl = types.ModuleType("queuectl" if CONSTANTS else "__main__")
queuectl.__file__ = sys.argv[0]
sys.modules[queuectl.__name__] = queuectl
exec(CODE, vars(queuectl))
exec(CONSTANTS)
status = 1
try:
    status = queuectl.main(sys.argv[1:])
except SystemExit as end:
    status = end.code or 0
finally:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
"""


def driver(code="", constants="", script=SCRIPT):
    """The words that call the program as its script does, once `code` has changed the standard
    library, and `constants` (say "queuectl.GRACE_S = 9") what the program has at its top;
    `script`: where it is to lie."""
    return [sys.executable, "-c", DRIVER % code, script, compiled(), constants]


TEMPLATE = """
import argparse, array, collections, contextlib, ctypes, datetime, errno, fcntl, functools, gc
import itertools, json, marshal, math, multiprocessing, os, random, re, select, selectors, shlex
import shutil, signal, socket, socketserver, sqlite3, stat, string, struct, subprocess, sys
import tempfile, textwrap, threading, time, types

def become(request, code):
    os.setsid()
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["env"])
    if hasattr(time, "tzset"):
        time.tzset()
    random.seed()
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, encoding="utf-8", errors=errors, closefd=False) for fd, mode, errors in
        ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace")))
    sys.argv = [script] + request["args"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = script
    exec(code, vars(main))

script, path = sys.argv[1:]
with open(path, "rb") as file:
    code = marshal.load(file)
control = socket.socket(fileno=os.dup(0))
fds = array.array("i")
while True:
    size, ancillary, _, _ = control.recvmsg(4, socket.CMSG_SPACE(12))
    if not size:
        os._exit(0)
    fds = array.array("i", ancillary[0][2])
    left, data = struct.unpack("I", size)[0], b""
    while len(data) < left:
        data += control.recv(left - len(data))
    pid = os.fork()
    if not pid:
        try:
            for fd, to in zip(fds, (0, 1, 2)):
                os.dup2(fd, to)
                os.close(fd)
            control.close()
            become(json.loads(data.decode()), code)
        except SystemExit:
            pass
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(99)
    for fd in fds:
        os.close(fd)
    control.sendall(struct.pack("i", pid))
    control.sendall(struct.pack("i", os.waitpid(pid, 0)[1]))
"""


class Template:
    """A process that has loaded all that commands need, and forks itself for each."""

    def __init__(self):
        self.turn = threading.Lock()
        self.control, theirs = socket.socketpair()
        process = subprocess.Popen([sys.executable, "-c", TEMPLATE, SCRIPT, compiled()], stdin=theirs,
                                   start_new_session=True)
        theirs.close()
        atexit.register(lambda: (self.control.close(), process.wait()))

    def run(self, args, env, cwd, files, seconds):
        """The exit status of a command, negative after a signal."""
        mask = os.umask(0)
        os.umask(mask)
        request = json.dumps({"args": args, "env": env, "cwd": cwd, "umask": mask}).encode()
        fds = array.array("i", [file.fileno() for file in files])
        with self.turn:
            self.control.sendmsg([struct.pack("I", len(request))],
                                 [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            self.control.sendall(request)
            self.control.settimeout(seconds)
            pid, = struct.unpack("i", self.control.recv(4))
            try:
                status, = struct.unpack("i", self.control.recv(4))
            except socket.timeout:
                os.kill(pid, signal.SIGKILL)
                self.control.recv(4)
                raise AssertionError("waited %d s in vain for the end of: %s" % (seconds, args))
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


template = functools.lru_cache()(Template)


# ---- Cases --------------------------------------------------------------------------------------

FIFO_JOB = "echo started; read line < %s; echo $line"

# What lives longer than its command, or has workers: to be found by its environment.
LASTING = {"run", "drain", "daemon"}


def processes_of(folder):
    """The pids of all processes that carry `folder` in their environment, but for this one."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/environ" % pid, "rb") as file:
            if folder.encode() in file.read() and int(pid) != os.getpid():
                found.append(int(pid))
    return found


def parent(pid):
    with contextlib.suppress(OSError), open("/proc/%d/stat" % pid, "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


class QueueCase(unittest.TestCase):
    """A queue in a directory of its own, with what is needed to drive it. Daemons are real
    processes in a session of their own. Whatever a test leaves running is found by the directory
    in its environment, and killed."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="queuectl-test-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.addCleanup(self.kill_all)
        self.db = os.path.join(self.dir, "q.db")
        self.sock = os.path.join(self.dir, "s")
        self.env = dict(os.environ, DB_PATH=self.db, SOCKET_PATH=self.sock)
        for name in ("PYTHONPATH", "PYTHONUNBUFFERED", "QUEUECTL"):  # users have buffers
            self.env.pop(name, None)
        self.daemons = []  # all processes that were started

    def kill_all(self):
        def left():
            for pid in processes_of(self.dir):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self.daemons:
                daemon.poll()
            return not processes_of(self.dir)
        wait_until(left, "no process is left")
        for daemon in self.daemons:
            daemon.wait()
            for file in filter(None, (daemon.stdout, daemon.stderr)):
                file.close()

    def table(self, call, *rows):
        """Each row: arguments, then what `call` returns for them."""
        for row in rows:
            with self.subTest(args=repr(row[:-1])[:80]):
                self.assertEqual(call(*row[:-1]), row[-1])

    # Commands

    def cli(self, *args, stdin="", env=None, cwd=None, seconds=60):
        """(exit status, stdout, stderr) of a command."""
        data = stdin if isinstance(stdin, bytes) else stdin.encode("utf-8", "surrogateescape")
        env, cwd = env or self.env, cwd or os.getcwd()
        files = [tempfile.TemporaryFile() for _ in range(3)]
        try:
            files[0].write(data)
            files[0].seek(0)
            if LASTING.intersection(args):
                process = subprocess.Popen(
                    driver() + list(args), stdin=files[0], stdout=files[1], stderr=files[2],
                    env=env, cwd=cwd, start_new_session=True)
                status = process.wait(seconds)
            else:
                status = template().run(list(args), env, cwd, files, seconds)
            out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
                        for file in files[1:])
        finally:
            for file in files:
                file.close()
        return status, out.decode("utf-8", "surrogateescape"), err.decode("utf-8", "replace")

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

    def show(self, job_id, *names):
        job = self.ok("show", job_id)
        return tuple(job[name] for name in names)

    def enqueue(self, command, **fields):
        """The id of a new job."""
        return self.ok("enqueue", json.dumps(dict(fields, command=command)))["id"]

    def says(self, words, *args, **options):
        """A command must fail, with these words."""
        self.assertIn(words, self.refused(*args, **options))

    def has(self, job_id, **fields):
        """A job must have these."""
        self.assertEqual(dict(zip(fields, self.show(job_id, *fields))), fields)

    def are(self, **states):
        """These are all jobs, and their states."""
        self.assertEqual(self.states(), states)

    # Processes

    def started(self, argv, ready=True, **options):
        """A process of any kind with its stdout at hand, killed in cleanup like all."""
        for name, value in (("env", self.env), ("stdout", subprocess.PIPE), ("start_new_session", True),
                            ("stderr", subprocess.DEVNULL), ("stdin", subprocess.DEVNULL)):
            options.setdefault(name, value)
        process = subprocess.Popen(argv, **options)
        self.daemons.append(process)
        if ready:
            self.assertIn(b"ready", process.stdout.readline())
        return process

    def spawn(self, *args, **options):
        """A command in a process of its own, still running."""
        return self.started(driver() + list(args), ready=False, **options)

    def daemon(self, *args, **options):
        """A daemon that is ready."""
        return self.started(driver() + ["daemon"] + list(args), **options)

    def driven(self, code, *args, ready=True, constants="", **options):
        """A daemon that has run `code` before its start."""
        return self.started(driver(code, constants) + ["daemon"] + list(args), ready, **options)

    def script(self, *args, **options):
        """(exit status, stdout, stderr) of the program as a user starts it."""
        process = self.started([sys.executable, SCRIPT] + list(args), ready=False,
                               **dict({"stderr": subprocess.PIPE}, **options))
        out, err = process.communicate(timeout=60)
        return process.returncode, out.decode("utf-8", "surrogateescape"), err.decode()

    def terminal(self, *args, columns=80, code="", **options):
        """(exit status, what is shown) of a command whose stdout and stderr are a terminal."""
        ours, theirs = pty.openpty()
        with contextlib.closing(os.fdopen(ours, "rb", 0)) as screen:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            process = subprocess.Popen(
                driver(code) + list(args), stdout=theirs, stderr=theirs, start_new_session=True,
                **dict({"env": dict(self.env, TERM="xterm"), "stdin": subprocess.DEVNULL}, **options))
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # EIO at its end
                for piece in iter(lambda: os.read(ours, 1 << 16), b""):
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

    def job(self, job_id):
        return next(job for job in self.jobs() if job["id"] == job_id)

    def rows(self, sql, *values):
        """Rows by a connection of another program's."""
        with contextlib.closing(sqlite3.connect(self.db, timeout=10)) as connection, connection:
            return connection.execute(sql, values).fetchall()

    def states(self):
        """{id: state} of all jobs."""
        return dict(self.rows("SELECT id, state FROM jobs"))

    def wait_for(self, state, count=1):
        """Wait until so many jobs are in `state`, and begun if that is "processing"."""
        wait_until(lambda: self.rows("SELECT COUNT(*) FROM jobs WHERE state = ?", state)
                   == [(count,)], "%d jobs are %s" % (count, state))
        if state == "processing":
            wait_until(lambda: self.begun() >= count, "%d commands run" % count)

    def begun(self):
        """The number of open attempts whose command runs: its process has the run file's name in
        its environment."""
        serials, begun = [serial for serial, in self.rows("SELECT serial FROM running")], set()
        for pid in processes_of(self.dir):
            with contextlib.suppress(OSError):
                found = re.search(rb"QUEUECTL_RUN=[^\0]*?(\d+)\0", read("/proc/%d/environ" % pid))
                begun.add(int(found.group(1)) if found else None)
        return len(begun.intersection(serials))

    def path(self, name):
        return os.path.join(self.dir, name)

    def read(self, name):
        try:
            return read(self.path(name)).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def gate(self, name="gate"):
        """A FIFO that holds a FIFO_JOB until `open_gate`."""
        os.mkfifo(self.path(name))
        return FIFO_JOB % self.path(name)

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
