"""Tests of queuectl, cheapest first. `make test T=StoreTest` runs one class."""
import ast
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import queuectl

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "queuectl.py")


def wait_until(predicate, what, seconds=30):
    """Wait for a fact; the only sleep in this file."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError("waited %d s in vain: %s" % (seconds, what))
        time.sleep(0.02)

# ---- The daemon and its clients -----------------------------------------------------------------
# Daemons are real processes in a session of their own. Whatever a test leaves running is found
# by the directory in its environment, and killed.

FIFO_JOB = "echo started; read line < %s; echo $line"


def processes_of(folder):
    """The pids of all processes that carry `folder` in their environment, but for this one."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/environ" % pid, "rb") as file:
            if folder.encode() in file.read() and int(pid) != os.getpid():
                found.append(int(pid))
    return found


class QueueCase(unittest.TestCase):
    """A queue in a directory of its own, with what is needed to drive it."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="queuectl-test-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.addCleanup(self.kill_all)
        self.db = os.path.join(self.dir, "q.db")
        self.sock = os.path.join(self.dir, "s")
        self.env = dict(os.environ, DB_PATH=self.db, SOCKET_PATH=self.sock)
        self.env.pop("PYTHONPATH", None)
        self.daemons = []

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
            daemon.stdout.close()

    def cli(self, *args, stdin=""):
        """(exit status, stdout, stderr) of a command, run in this process."""
        out, err = io.StringIO(), io.StringIO()
        data = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        with mock.patch.dict(os.environ, self.env), mock.patch("sys.stdin", data), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = queuectl.main(list(args))
        return code, out.getvalue(), err.getvalue()

    def ok(self, *args, stdin=""):
        """The decoded stdout of a command that must succeed."""
        code, out, err = self.cli(*args, stdin=stdin)
        self.assertEqual(code, 0, err)
        return json.loads(out) if out.strip() else None

    def refused(self, *args, status=1, stdin=""):
        """The message of a command that must fail, in one line on stderr."""
        code, out, err = self.cli(*args, stdin=stdin)
        self.assertEqual((code, out), (status, ""), err)
        answer = json.loads(err.strip().splitlines()[-1])
        self.assertIs(answer["success"], False)
        self.assertTrue(answer["message"].startswith("Error"), answer)
        return answer["message"]

    def enqueue(self, command, **fields):
        """The id of a new job."""
        return self.ok("enqueue", json.dumps(dict(fields, command=command)))["id"]

    def spawn(self, *args, **options):
        """A command in a process of its own, with its stdout at hand."""
        options.setdefault("env", self.env)
        process = subprocess.Popen([sys.executable, SCRIPT] + list(args), stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, start_new_session=True, **options)
        self.daemons.append(process)
        return process

    def daemon(self, *args, **options):
        """A daemon that is ready."""
        process = self.spawn("daemon", *args, **options)
        self.assertIn(b"ready", process.stdout.readline())
        return process

    def kill(self, process):
        process.kill()
        process.wait()

    def jobs(self, state=None):
        return self.ok("list", *(("--state", state) if state else ()))

    def job(self, job_id):
        return next(job for job in self.jobs() if job["id"] == job_id)

    def rows(self, sql, *values):
        """Rows by a connection of another program's."""
        with contextlib.closing(sqlite3.connect(self.db, timeout=10)) as connection, connection:
            return connection.execute(sql, values).fetchall()

    def wait_for(self, state, count=1):
        """Wait until so many jobs are in `state`."""
        wait_until(lambda: self.rows("SELECT COUNT(*) FROM jobs WHERE state = ?", state)
                   == [(count,)], "%d jobs are %s" % (count, state))

    def path(self, name):
        return os.path.join(self.dir, name)

    def read(self, name):
        try:
            with open(self.path(name)) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def gate(self, name="gate"):
        """A FIFO that holds a FIFO_JOB until `open_gate`."""
        os.mkfifo(self.path(name))
        return FIFO_JOB % self.path(name)

    def open_gate(self, name="gate"):
        with open(self.path(name), "w") as file:
            file.write("through\n")

    def workers_of(self, daemon):
        """The pids of its workers."""
        return [pid for pid in processes_of(self.dir) if parent(pid) == daemon.pid]

    def ask(self, data, close=False):
        """What the daemon answers to raw bytes, up to the first newline."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(self.sock)
            client.sendall(data)
            if close:
                client.shutdown(socket.SHUT_WR)
            answer = b""
            while not answer.endswith(b"\n"):
                piece = client.recv(1 << 16)
                if not piece:
                    break
                answer += piece
            return json.loads(answer.decode())


def parent(pid):
    with contextlib.suppress(OSError), open("/proc/%d/stat" % pid, "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


class CommandsTest(QueueCase):
    """Each command without a daemon, and what it says when refused."""

    def test_an_enqueued_job_is_stored_and_said_so(self):
        code, out, err = self.cli("enqueue", '{"id":"hello","command":"echo Hello World"}')
        self.assertEqual((code, out),
                         (0, '{"success":true,"message":"Job enqueued","id":"hello"}\n'))
        self.assertEqual(err, "daemon not running; stored in %s\nid: hello\n"
                              "command: echo Hello World\n" % self.db)
        self.assertEqual(self.rows("SELECT id, state FROM jobs"), [("hello", "pending")])

    def test_a_bad_job_is_refused_and_nothing_is_stored(self):
        self.enqueue("true", id="taken")
        for job, words in (('{"command":""}', "command"), ('{"id":"x"}', "command"),
                           ('{"command":"true","prio":1}', "prio"),
                           ('{"command":"true","id":"taken"}', "taken"),
                           ('{"command":"true","run_after":"soon"}', "run_after"),
                           ("not json", "JSON"), ("[1]", "object"), ("[" * 100000, "nested")):
            with self.subTest(job=job[:40]):
                self.assertIn(words, self.refused("enqueue", job))
        self.assertEqual(len(self.jobs()), 1)

    def test_usage_errors_exit_2_and_name_what_is_known(self):
        for args, words in (((), "missing"), (("frob",), "enqueue"), (("dlq",), "dlq retry"),
                            (("list", "--state", "gone"), "completed"),
                            (("worker", "start", "--count", "0"), "1 to 1000"),
                            (("daemon", "--grace", "30"), "unit"), (("config", "get"), "key")):
            with self.subTest(args=args):
                self.assertIn(words, self.refused(*args, status=2))
        self.assertEqual(os.listdir(self.dir), [])

    def test_help_has_examples_at_every_level(self):
        for words in [[], ["dlq"], ["config"]] + [name.split() for name in queuectl.COMMANDS]:
            with self.subTest(words=words), self.assertRaises(SystemExit) as end, \
                    contextlib.redirect_stdout(io.StringIO()) as out:
                queuectl.main(words + ["--help"])
            self.assertEqual(end.exception.code, 0)
            self.assertIn("queuectl %s" % " ".join(words), out.getvalue())

    def test_looking_at_a_queue_that_is_not_there_makes_nothing(self):
        self.assertEqual(self.ok("list"), [])
        self.assertEqual(self.ok("status")["workers"], 0)
        self.assertEqual(os.listdir(self.dir), [])

    def test_settings_are_checked_and_shown(self):
        self.assertEqual(self.ok("config", "set", "max-retries", "2"),
                         {"success": True, "message": "Updated max-retries to 2"})
        self.ok("config", "set", "timeout", "10m")
        self.assertEqual(self.ok("config", "get", "timeout"), 600000)
        self.assertEqual(self.ok("config", "list")["max-retries"], 2)
        for key, value in (("max-retries", "abc"), ("max-retries", "0"), ("jitter", "101"),
                           ("backoff", "random"), ("shell", ""), ("colour", "red")):
            with self.subTest(key=key, value=value):
                self.assertIn(key, self.refused("config", "set", key, value))

    def test_lines_from_stdin_are_stored_whole_or_not_at_all(self):
        answer = self.ok("enqueue", "-", stdin='{"command":"a"}\n\n{"command":"b"}\n')
        self.assertEqual(answer["message"], "Enqueued 2 jobs")
        self.assertIn("line 3", self.refused("enqueue", "-", stdin='{"command":"c"}\n\nnonsense\n'))
        self.assertEqual([job["command"] for job in self.jobs()], ["a", "b"])

    def test_more_than_a_batch_of_lines_says_which_are_stored(self):
        lines = ['{"command":"true"}'] * 1500
        lines[1200] = '{"command":1}'
        message = self.refused("enqueue", "-", stdin="\n".join(lines))
        self.assertIn("line 1201: field command", message)
        self.assertIn("lines 1 to 1000 are stored", message)
        self.assertEqual(self.ok("status")["jobs"]["pending"], 1000)

    def test_commands_that_move_workers_need_the_daemon(self):
        self.assertIn("worker start", self.refused("worker", "stop"))
        self.assertIn("worker start", self.refused("daemon", "stop"))

    def test_files_are_private_whatever_the_umask(self):
        for umask in (0o000, 0o077):
            before = os.umask(umask)
            self.addCleanup(os.umask, before)
            self.enqueue("true")
            os.umask(before)
        for name in os.listdir(self.dir):
            self.assertEqual(os.stat(self.path(name)).st_mode & 0o777, 0o600, name)

    def test_planted_links_are_refused(self):
        self.enqueue("true")
        os.rename(self.db + ".lock", self.path("real"))
        for link in (os.symlink, os.link):
            link(self.path("real"), self.db + ".lock")
            with self.subTest(link=link.__name__):
                self.assertIn("link", self.refused("status"))
            os.unlink(self.db + ".lock")

    def test_a_database_that_lost_its_jobs_is_refused(self):
        self.enqueue("true")
        with open(self.db, "w"):
            pass
        self.assertIn(self.db + ".lock", self.refused("status"))
        os.unlink(self.db)
        self.assertIn("is gone", self.refused("enqueue", '{"command":"true"}'))
        self.assertFalse(os.path.exists(self.db))

    def test_a_newer_or_garbled_database_is_refused_untouched(self):
        self.rows("PRAGMA user_version = 99")
        self.assertIn("newer", self.refused("list"))
        for garbage in (b"x" * 5000, b"SQLite format 3\0" + b"x" * 5000):
            with open(self.db, "wb") as file:
                file.write(garbage)
            self.refused("list")
            with open(self.db, "rb") as file:
                self.assertEqual(file.read(), garbage)

    def test_a_module_beside_the_script_is_not_imported(self):
        shutil.copy(SCRIPT, self.dir)
        with open(self.path("json.py"), "w") as file:
            file.write("open(%r, 'w')\n" % self.path("hijacked"))
        subprocess.check_output([sys.executable, self.path("queuectl.py"), "status"],
                                cwd=self.dir, env=self.env, stderr=subprocess.DEVNULL)
        self.assertFalse(os.path.exists(self.path("hijacked")))

    def test_utf8_survives_the_c_locale(self):
        env = dict(self.env, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        env.pop("LANG", None)
        job = '{"id":"caf\u00e9","command":"echo \u00e9"}'
        process = subprocess.Popen([sys.executable, SCRIPT, "enqueue", job.encode()], env=env,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate()
        self.assertEqual(process.returncode, 0, err)
        self.assertIn("\\u00e9", out.decode())
        self.assertEqual(self.rows("SELECT id, command FROM jobs"), [("caf\u00e9", "echo \u00e9")])

    def test_forty_enqueues_at_once_all_find_the_lock(self):
        script = "for i in $(seq 40); do %s %s enqueue '{\"command\":\"true\"}' & done; wait" % (
            sys.executable, SCRIPT)
        subprocess.check_call(["/bin/sh", "-c", script], env=self.env, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
        self.assertEqual(self.ok("status")["jobs"]["pending"], 40)


class DaemonTest(QueueCase):
    """The daemon as its clients see it."""

    def test_a_second_daemon_is_refused_with_the_pid_of_the_first(self):
        first = self.daemon()
        self.assertIn("pid %d" % first.pid, self.refused("daemon"))
        self.assertEqual(self.ok("daemon", "status")["pid"], first.pid)

    def test_the_socket_is_private_and_a_stale_one_is_replaced(self):
        first = self.daemon()
        self.assertEqual(os.stat(self.sock).st_mode & 0o777, 0o600)
        self.kill(first)
        self.assertTrue(os.path.exists(self.sock))
        self.daemon()
        self.assertEqual(self.ok("status")["workers"], 0)

    def test_a_removed_socket_comes_back(self):
        self.daemon()
        os.unlink(self.sock)
        wait_until(lambda: os.path.exists(self.sock), "the socket is back")
        self.assertEqual(self.ok("status")["workers"], 0)

    def test_a_given_socket_that_is_taken_is_an_error(self):
        for plant in (lambda: open(self.sock, "w").close(), lambda: os.mkdir(self.sock),
                      lambda: os.symlink("nowhere", self.sock)):
            plant()
            self.assertIn("not a socket", self.refused("daemon"))
            self.assertTrue(os.path.lexists(self.sock))
            os.rmdir(self.sock) if os.path.isdir(self.sock) else os.unlink(self.sock)

    def test_requests_of_every_shape_are_answered(self):
        self.daemon()
        status = {"success": True, "message": {"jobs": dict.fromkeys(queuectl.STATES, 0),
                                               "workers": 0}}
        for data in (b'{"command":"status"}\n', b'{"command":"status"}',
                     b' \n{"command": "status", "option": null}\n'):
            with self.subTest(data=data):
                self.assertEqual(self.ask(data), status)
        self.assertEqual(self.ask(b'{"command":"status"}', close=True), status)
        for data, words in ((b"garbage\n", "JSON"), (b"\xff\n", "UTF-8"), (b"[]\n", "object"),
                            (b'{"command":"x"}\n', queuectl.VERSION),
                            (b'{"command":"list","value":{"x":1}}\n', "x"),
                            (b"[" * 100000 + b"\n", "nested"),
                            (b'{"command":"status","db":"/other"}\n', "/other")):
            with self.subTest(data=data[:30]):
                answer = self.ask(data)
                self.assertIs(answer["success"], False)
                self.assertIn(words, answer["message"])

    def test_too_large_a_request_is_refused_and_others_go_on(self):
        self.daemon()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.sock)
            with contextlib.suppress(OSError):  # cut off before all is sent
                client.sendall(b"x" * (queuectl.MAX_REQUEST + (1 << 20)))
            self.assertEqual(self.ok("status")["workers"], 0)

    def test_several_requests_in_one_write_are_answered_in_order(self):
        self.daemon()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.sock)
            client.sendall(b'{"command":"enqueue","value":"{\\"command\\":\\"true\\"}"}\n'
                           b'{"command":"status"}\n{"command":"config","flag":"jitter","value":"5"}\n')
            answers = [json.loads(line) for _, line in zip(range(3), client.makefile("r"))]
        self.assertEqual(answers[0]["message"], "Job enqueued")
        self.assertEqual(answers[1]["message"]["jobs"]["pending"], 1)
        self.assertEqual(answers[2]["message"], "Updated jitter to 5")

    def test_the_originals_messages_are_understood(self):
        self.daemon()
        for request, message in (
                ({"command": "worker", "option": "start", "flag": "count", "value": "3"},
                 "Started 3 workers"),
                ({"command": "enqueue", "option": None, "flag": None,
                  "value": '{"id":"a","command":"exit 3"}'}, "Job enqueued"),
                ({"command": "config", "option": "set", "flag": "max-retries", "value": "2"},
                 "Updated max-retries to 2"),
                ({"command": "list", "option": None, "flag": "--state", "value": "dead"}, []),
                ({"command": "dlq", "option": "list"}, []),
                ({"command": "worker", "option": "stop"}, "Stopped workers")):
            with self.subTest(request=request):
                self.assertEqual(self.ask(json.dumps(request).encode())["message"], message)

    def test_long_answers_and_requests_come_whole(self):
        self.daemon()
        lines = "".join('{"command":"echo %s"}\n' % ("x" * 3000) for _ in range(900))
        self.assertEqual(self.ok("enqueue", "-", stdin=lines)["message"], "Enqueued 900 jobs")
        self.assertEqual(len(self.jobs()), 900)
        answer = self.ask(b'{"command":"list","option":null,"flag":"--state","value":"pending"}')
        self.assertEqual(len({job["id"] for job in answer["message"]}), 900)

    def test_idle_connections_do_not_hold_others_up(self):
        self.daemon()
        idle = [socket.socket(socket.AF_UNIX) for _ in range(100)]
        for client in idle:
            self.addCleanup(client.close)
            client.connect(self.sock)
            client.sendall(b'{"command":')
        self.assertEqual(self.ok("status")["workers"], 0)

    def test_a_lost_answer_is_given_again(self):
        self.daemon()
        request = json.dumps({"command": "enqueue", "value": '{"command":"true"}',
                              "once": "abc"}).encode() + b"\n"
        self.assertEqual(self.ask(request), self.ask(request))
        self.assertEqual(len(self.jobs()), 1)

    def test_rows_of_another_program_are_noticed_within_a_second(self):
        self.daemon("--workers", "1")
        self.rows("INSERT INTO jobs (id, command) VALUES ('theirs', 'true')")
        self.rows("INSERT INTO jobs (id, command, run_after) VALUES (NULL, 'true', 'never')")
        self.wait_for("completed")
        self.wait_for("dead")
        dead, = self.jobs("dead")
        self.assertIn("run_after", dead["error"])
        self.assertTrue(dead["id"])

    def test_a_foreign_write_lock_makes_clients_wait_and_jobs_go_on(self):
        self.daemon("--workers", "1")
        self.enqueue(self.gate())
        self.wait_for("processing")
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            client = self.spawn("enqueue", '{"command":"true"}')
            self.open_gate()
            self.assertEqual(self.ok("status")["jobs"]["processing"], 1)
            self.assertIsNone(client.poll())
            other.execute("COMMIT")
        self.assertEqual(client.wait(30), 0)
        self.wait_for("completed", 2)

    def test_a_removed_database_stops_the_daemon_loudly(self):
        daemon = self.daemon("--workers", "2")
        os.rename(self.db, self.db + ".moved")
        self.assertEqual(daemon.wait(30), 1)
        self.assertIn("removed or replaced", self.read("q.db.log"))

    def test_a_client_that_asks_for_another_database_is_told(self):
        self.daemon()
        self.env["DB_PATH"] = self.path("other.db")
        self.enqueue("true")
        self.assertEqual(self.ok("status")["jobs"]["pending"], 1)
        del self.env["DB_PATH"]
        self.assertEqual(self.ok("status")["jobs"]["pending"], 0)  # a socket alone decides
        self.env.update(DB_PATH=self.db, SOCKET_PATH=self.path("nobody"))
        self.assertIn(self.sock, self.refused("status"))
        del self.env["DB_PATH"]
        self.assertIn("--db", self.refused("status"))

    @unittest.skipIf(os.geteuid(), "needs root, to be another user")
    def test_another_user_does_not_get_in(self):
        self.daemon()
        for path, mode in ((self.dir, 0o755), (self.sock, 0o666)):
            os.chmod(path, mode)
        code = ("import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
                "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
                "print(s.recv(4096).decode())")
        out = subprocess.check_output([sys.executable, "-c", code, self.sock])
        self.assertIn(b"another user", out)

    def test_an_idle_queue_wakes_about_once_a_second(self):
        daemon = self.daemon("--workers", "2")
        pids = [daemon.pid] + self.workers_of(daemon)
        for _ in range(4):
            self.enqueue("sleep 0.1; echo idle")
        self.wait_for("completed", 4)

        def switches():
            total = []
            for pid in pids:
                with open("/proc/%d/status" % pid) as file:
                    total.append(int(file.read().split("voluntary_ctxt_switches:")[1].split()[0]))
            return total
        before = switches()
        end = time.monotonic() + 3
        wait_until(lambda: time.monotonic() > end, "three seconds have passed")
        woken = [late - early for early, late in zip(before, switches())]
        self.assertLessEqual(woken[0], 12)
        self.assertEqual(woken[1:], [0] * len(woken[1:]))


class StoriesTest(QueueCase):
    """What users do, end to end, checked in the database."""

    def test_scenario_basic_job(self):
        self.ok("enqueue", '{"id":"hello","command":"echo Hello World"}')
        self.assertEqual(self.ok("worker", "start", "--count", "1")["message"], "Started 1 worker")
        self.wait_for("completed")
        self.assertEqual(self.rows("SELECT attempts, exit_code, error FROM jobs"), [(1, 0, None)])
        self.assertEqual(self.rows("SELECT number, exit_code, output FROM attempts"),
                         [(1, 0, b"Hello World\n")])
        self.assertEqual(self.ok("metrics")["completed_jobs"], 1)
        self.assertEqual(self.ok("worker", "stop")["message"], "Stopped workers")
        self.assertEqual(self.ok("status")["workers"], 0)

    def test_scenario_retry_backoff_and_dead_letter_queue(self):
        self.ok("config", "set", "max-retries", "2")
        self.ok("config", "set", "delay-base", "1000")
        self.daemon("--workers", "1")
        self.enqueue("echo try $QUEUECTL_ATTEMPT; test -e %s" % self.path("cause"), id="fail-test")
        self.wait_for("failed")
        self.wait_for("dead")
        dead, = self.ok("dlq", "list")
        self.assertEqual((dead["attempts"], dead["error"]), (2, "exit 1"))
        self.assertEqual(self.rows("SELECT number, output FROM attempts"),
                         [(1, b"try 1\n"), (2, b"try 2\n")])
        first, second = [queuectl.parse_date(row[0]) for row in self.rows(
            "SELECT started_at FROM attempts")]
        self.assertGreaterEqual(second - first, 1000)
        open(self.path("cause"), "w").close()
        self.assertEqual(self.ok("dlq", "retry", "fail-test")["message"],
                         "Job fail-test added to queue")
        self.wait_for("completed")
        self.assertEqual(self.rows("SELECT number, output FROM attempts WHERE number = 3"),
                         [(3, b"try 1\n")])

    def test_scenario_several_workers_without_overlap(self):
        self.daemon("--workers", "3")
        for name in "abcde":
            self.enqueue("echo $QUEUECTL_JOB_ID >> %s; sleep 0.1" % self.path("log"), id=name)
        self.wait_for("completed", 5)
        self.assertEqual(sorted(self.read("log").split()), list("abcde"))
        self.assertEqual(self.rows("SELECT DISTINCT attempts FROM jobs"), [(1,)])
        self.assertGreater(len(self.rows("SELECT DISTINCT worker FROM attempts")), 1)

    def test_scenario_invalid_commands(self):
        self.ok("config", "set", "max-retries", "1")
        self.daemon("--workers", "1")
        self.enqueue("no-such-command", id="a")
        self.enqueue("true", id="b", cwd="/no/such/directory")
        self.enqueue("kill -9 $$", id="c")
        self.enqueue("kill -9 $PPID; true", id="d")
        self.wait_for("dead", 4)
        errors = dict(self.rows("SELECT id, error FROM jobs"))
        self.assertEqual(errors["a"], "exit 127")
        self.assertIn("/no/such/directory", errors["b"])
        self.assertEqual(errors["c"], "killed by SIGKILL")
        self.assertEqual(errors["d"], "worker lost")
        wait_until(lambda: self.ok("status")["workers"] == 1, "the worker is replaced")

    def test_scenario_survives_a_restart(self):
        first = self.daemon("--workers", "2")
        self.enqueue(self.gate(), id="running")
        self.wait_for("processing")
        self.enqueue("true", id="later", run_after="2999-01-01T00:00:00+02:00")
        self.kill(first)
        self.daemon()
        wait_until(lambda: self.ok("status")["workers"] == 2, "the workers are back")
        self.open_gate()
        self.wait_for("completed")
        self.assertEqual(self.rows("SELECT number, output FROM attempts"),
                         [(1, b"started\nthrough\n")])
        self.assertEqual(self.job("later")["run_after"], "2998-12-31T22:00:00.000Z")
        self.assertEqual(self.job("later")["state"], "pending")

    def test_an_outcome_without_a_daemon_is_recorded_by_the_next_command(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue(self.gate())
        self.wait_for("processing")
        self.kill(daemon)
        self.open_gate()
        wait_until(lambda: not processes_of(self.dir), "the worker has ended")
        self.assertEqual(self.jobs()[0]["state"], "completed")
        self.assertEqual(os.listdir(self.db + "-run"), ["w.1"])

    def test_priority_then_age(self):
        for name, priority in (("low", 0), ("high", 1), ("lower", -5), ("high2", 1)):
            self.enqueue("echo %s >> %s" % (name, self.path("log")), priority=priority)
        self.daemon("--workers", "1")
        self.wait_for("completed", 4)
        self.assertEqual(self.read("log").split(), ["high", "high2", "low", "lower"])

    def test_a_scheduled_job_starts_at_its_time(self):
        self.daemon("--workers", "1")
        due = queuectl.now_ms() + 700
        self.enqueue("true", run_after=queuectl.iso(due))
        self.assertEqual(self.ok("status")["jobs"]["pending"], 1)
        self.wait_for("completed")
        started = queuectl.parse_date(self.jobs()[0]["started_at"])
        self.assertGreaterEqual(started, due)

    def test_a_job_finds_its_environment(self):
        env = dict(self.env, NOTIFY_SOCKET="x", LISTEN_FDS="1")
        self.daemon("--workers", "1", env=env)
        self.enqueue("pwd; echo $A $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $NOTIFY_SOCKET$LISTEN_FDS;"
                     "cat; umask; trap", id="env", cwd=self.dir, env={"A": "b c"})
        self.wait_for("completed")
        output, = self.rows("SELECT output FROM attempts")[0]
        self.assertEqual(output.decode().split("\n")[:2], [self.dir, "b c env 1"])

    def test_an_unfinished_job_holds_its_unique_key(self):
        first = self.enqueue("true", unique="nightly")
        self.assertEqual(self.enqueue("true", unique="nightly"), first)
        self.assertEqual(len(self.jobs()), 1)
        self.daemon("--workers", "1")
        self.wait_for("completed")
        self.assertNotEqual(self.enqueue("true", unique="nightly"), first)

    def test_a_timeout_ends_the_whole_group(self):
        self.ok("config", "set", "max-retries", "1")
        self.daemon("--workers", "1")
        self.enqueue("trap '' TERM; sleep 300 & setsid sleep 300 & echo up; wait; sleep 300",
                     timeout=300)
        self.wait_for("dead")
        self.assertIn("timed out after 300 ms", self.jobs()[0]["error"])
        sleeping = subprocess.Popen(["pgrep", "-f", "^sleep 300$"], stdout=subprocess.PIPE)
        pids = [int(pid) for pid in sleeping.communicate()[0].split()]
        self.assertEqual(set(pids) & set(processes_of(self.dir)), set())

    def test_output_is_bounded_and_kept_across_retries(self):
        self.ok("config", "set", "output-limit", "10")
        self.ok("config", "set", "delay-base", "1")
        self.daemon("--workers", "1")
        self.enqueue("seq 1000 >&2; echo end $QUEUECTL_ATTEMPT; exit 1", max_retries=2)
        self.wait_for("dead")
        self.assertEqual([(output, dropped > 3000) for output, dropped in self.rows(
            "SELECT output, dropped FROM attempts")], [(b"000\nend 1\n"[-10:], True),
                                                       (b"000\nend 2\n"[-10:], True)])

    def test_a_stop_waits_for_running_jobs(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue(self.gate())
        self.wait_for("processing")
        self.enqueue("true")
        daemon.terminate()
        wait_until(lambda: self.ok("daemon", "status")["stopping"], "the daemon is stopping")
        self.open_gate()
        self.assertEqual(daemon.wait(30), 0)
        self.assertEqual(self.ok("status")["jobs"], {"pending": 1, "processing": 0, "completed": 1,
                                                     "failed": 0, "dead": 0})

    def test_a_second_signal_gives_the_attempt_back(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue("sleep 300", timeout=0)
        self.wait_for("processing")
        daemon.terminate()
        wait_until(lambda: self.ok("daemon", "status")["stopping"], "the daemon is stopping")
        daemon.terminate()
        self.assertEqual(daemon.wait(30), 0)
        self.assertEqual(self.rows("SELECT state, attempts, runs FROM jobs"), [("pending", 0, 0)])
        self.assertEqual(self.rows("SELECT COUNT(*) FROM attempts"), [(0,)])

    def test_a_background_child_of_a_completed_job_is_left_alone(self):
        self.daemon("--workers", "1")
        self.enqueue("sleep 300 & echo $!")
        self.wait_for("completed")
        pid = int(self.rows("SELECT output FROM attempts")[0][0])
        self.assertTrue(queuectl.process_start(pid))

    def test_what_a_lost_worker_left_running_is_stopped_before_the_retry(self):
        self.ok("config", "set", "delay-base", "1")
        daemon = self.daemon("--workers", "1")
        for number, escape in enumerate(("exec >/dev/null 2>&1", "exec 3>&- 4>&- 5>&- 6>&- 7>&-",
                                         "kill -STOP $$", "setsid sleep 300; :")):
            with self.subTest(escape=escape):
                probe = self.path("probe%d" % number)
                job = self.enqueue(
                    "echo $$ >> %s; test $QUEUECTL_ATTEMPT = 2 && exit 0; %s; sleep 300" % (
                        probe, escape), timeout=0)
                wait_until(lambda: os.path.exists(probe) and self.read(probe).strip(), "it runs")
                worker, = self.workers_of(daemon)
                os.kill(worker, signal.SIGKILL)
                self.wait_for("completed", number + 1)
                first, second = map(int, self.read(probe).split())
                self.assertEqual(queuectl.process_start(first), "")
                self.assertEqual(self.job(job)["attempts"], 2)
                self.assertEqual(self.rows(
                    "SELECT error FROM attempts WHERE job = ? AND number = 1", job),
                    [("worker lost",)])

    def test_a_running_jobs_row_changed_by_another_program_runs_once_at_a_time(self):
        self.daemon("--workers", "2")
        job = self.enqueue(self.gate(), id="mine")
        self.wait_for("processing")
        self.rows("UPDATE jobs SET state = 'pending' WHERE id = ?", job)
        self.wait_for("processing")
        self.rows("DELETE FROM jobs WHERE id = ?", job)
        self.rows("INSERT INTO jobs (id, command) VALUES (?, 'echo second')", job)
        other = self.enqueue("true")
        wait_until(lambda: self.job(other)["state"] == "completed", "another job is through")
        self.assertEqual(self.job(job)["state"], "pending")
        self.open_gate()
        self.wait_for("completed", 2)
        self.assertEqual(self.rows("SELECT output FROM attempts WHERE job = ?", job),
                         [(b"second\n",)])

    def test_a_database_of_the_original_opens_and_its_jobs_run(self):
        with contextlib.closing(sqlite3.connect(self.db)) as original, original:
            original.execute("""CREATE TABLE jobs (id TEXT PRIMARY KEY, command TEXT NOT NULL,
                state TEXT DEFAULT 'pending', attempts INT DEFAULT 0, max_retries INT DEFAULT 3,
                created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
                updated_at DATETIME DEFAULT CURRENT_TIMESTAMP, locked_at DATETIME,
                timeout INT DEFAULT 5000, run_after DATETIME DEFAULT CURRENT_TIMESTAMP,
                priority INT DEFAULT 0, started_at DATETIME)""")
            original.execute("CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT)")
            original.execute("INSERT INTO config VALUES ('max-retries', '2'), ('backoff', NULL)")
            original.execute("""CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT,
                daemon_startup DATETIME DEFAULT CURRENT_TIMESTAMP, total_commands INT DEFAULT 0)""")
            original.executemany("INSERT INTO jobs (id, command, state) VALUES (?, ?, ?)", [
                ("waiting", "echo one", "pending"), ("done", "true", "completed"),
                ("gone", "false", "dead"), ("held", "echo two", "processing")])
        os.chmod(self.db, 0o600)
        self.assertEqual(self.ok("config", "get", "max-retries"), 2)
        self.assertEqual(self.ok("config", "get", "backoff"), "exponential")
        self.ok("config", "set", "delay-base", "1000")
        self.daemon("--workers", "1")
        self.assertEqual(len(self.jobs()), 4)
        wait_until(lambda: self.job("waiting")["state"] == "completed", "its job has run")
        self.assertEqual(self.job("held")["attempts"], 1)
        self.assertRegex(self.job("waiting")["created_at"], r"^\d{4}-.*T.*\.\d{3}Z$")

    def test_two_daemons_at_once_leave_one(self):
        for _ in range(5):
            both = [self.spawn("daemon"), self.spawn("daemon")]
            lines = [daemon.stdout.readline() for daemon in both]
            self.assertEqual(sorted(b"ready" in line for line in lines), [False, True])
            for daemon in both:
                self.kill(daemon)

    def test_acknowledged_jobs_survive_the_death_of_everything(self):
        self.daemon("--workers", "2")
        ids = [self.enqueue("true") for _ in range(5)]
        for pid in processes_of(self.dir):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        stored = {row[0] for row in self.rows("SELECT id FROM jobs")}
        self.assertLessEqual(set(ids), stored)

    def test_a_worker_start_brings_up_a_daemon_and_the_next_adds(self):
        self.assertEqual(self.ok("worker", "start", "--count", "2")["message"], "Started 2 workers")
        self.assertEqual(self.ok("worker", "start")["message"], "Started 1 worker")
        self.assertEqual(self.ok("status")["workers"], 3)
        self.assertEqual(self.ok("daemon", "stop")["message"], "Stopped daemon")
        self.ok("worker", "start")
        self.assertEqual(self.ok("status")["workers"], 1)


class StormTest(QueueCase):
    """Promise 2 under fire: an in-job `flock -n` tells of any overlap."""

    JOB = ("exec 9>>%(dir)s/probe.$QUEUECTL_JOB_ID; flock -n 9 || echo $QUEUECTL_JOB_ID >>"
           " %(dir)s/overlaps; sleep 0.0%(ms)d; echo $QUEUECTL_JOB_ID >> %(dir)s/log")

    def storm(self, jobs, rounds, seed):
        chance = random.Random(seed)
        self.ok("config", "set", "delay-base", "1")
        lines = "".join(json.dumps({"command": self.JOB % {"dir": self.dir, "ms": n % 9 + 1},
                                    "id": "job%d" % n, "max_retries": 1000}) + "\n"
                        for n in range(jobs))
        self.ok("enqueue", "-", stdin=lines)
        daemon = self.daemon("--workers", "4")
        for _ in range(rounds):
            before = self.read("log")
            wait_until(lambda: self.read("log") != before or not self.open_jobs(), "jobs go on")
            workers = self.workers_of(daemon)
            if workers and chance.random() < 0.6:
                with contextlib.suppress(OSError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
            else:
                self.kill(daemon)
                daemon = self.daemon()
        wait_until(lambda: not self.open_jobs(), "all is done", 60)
        self.assertEqual(self.read("overlaps"), "")
        self.assertEqual(set(self.read("log").split()), {"job%d" % n for n in range(jobs)})
        self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])
        self.assertEqual(self.rows("SELECT state, COUNT(*) FROM jobs GROUP BY state"),
                         [("completed", jobs)])
        self.assertEqual(self.rows("""SELECT id FROM jobs WHERE attempts != (
            SELECT COUNT(*) FROM attempts WHERE job = jobs.id) OR attempts != runs"""), [])
        wait_until(lambda: self.ok("status")["workers"] == 4, "the pool is at its number")

    def open_jobs(self):
        return self.rows("SELECT COUNT(*) FROM jobs WHERE state != 'completed'") != [(0,)]

    def test_two_hundred_jobs_survive_twenty_kills(self):
        self.storm(200, 20, seed=int(os.environ.get("SEED", "1")))


class HouseTest(unittest.TestCase):
    """The order of the file, as its docstring promises it."""

    def setUp(self):
        with open(SCRIPT, encoding="utf-8") as file:
            self.text = file.read()
        self.tree = ast.parse(self.text)

    def test_banners_are_those_of_the_docstring(self):
        listed = queuectl.__doc__.split("only those above it:\n\n")[1].split("\n\n")[0].split("\n")
        self.assertEqual(re.findall("^# ---- (.+?) -+$", self.text, re.M),
                         [line.strip() for line in listed])

    def test_names_point_only_up(self):
        defined = {node.name: node for node in self.tree.body if hasattr(node, "name")}
        down = ["%s -> %s" % (node.name, use.id) for node in defined.values()
                for use in ast.walk(node) if isinstance(use, ast.Name) and use.id in defined
                and defined[use.id].lineno > max(n.lineno for n in ast.walk(node)
                                                 if hasattr(n, "lineno"))]
        self.assertEqual(down, [])

    def test_each_concern_has_one_room(self):
        rooms = dict(zip(*[iter(re.split("^# ---- (.+?) -+$", self.text, flags=re.M)[1:])] * 2))
        for word, allowed in (("sqlite3.", {"Schema", "Store"}),
                              ("time.time(", {"Time, ids and text"}),
                              ("os._exit(", {"Main", "Worker"}), ("SELECT ", {"Schema", "Store"})):
            with self.subTest(word=word):
                self.assertEqual({name for name, text in rooms.items() if word in text} - allowed,
                                 set())


class ReadmeTest(QueueCase):
    """What the README tells a newcomer to type."""

    def test_the_quick_start_runs_as_written(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            text = file.read()
        quick = text.split("## Quick start")[1].split("\n## ")[0]
        commands = re.findall(r"^(?:\$ )?(make \w+)$", quick, re.M)
        self.assertIn("make demo", commands)
        self.assertIn("make test", commands)  # it is what runs this test
        out = subprocess.check_output(["make", "-s", "-C", HERE, "demo",
                                       "PYTHON=" + sys.executable],
                                      env=self.env, stderr=subprocess.STDOUT)
        self.assertIn(b"added to queue", out)
        self.assertIn(b'"dead": 0', out.splitlines()[-8:] and out)


if __name__ == "__main__":
    unittest.main()
