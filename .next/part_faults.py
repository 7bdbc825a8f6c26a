"""Faults, storms, power cuts."""
from harness import *


# ---- Faults -------------------------------------------------------------------------------------
# A checker, not examples: each job tells of any overlap with itself, and logs that it ran; after
# whatever was killed, nothing acknowledged is missing, nothing ran twice at once, and the attempts
# add up.

def pause(seconds):
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, "the time passes", seconds + 30)


def alive(pid):
    """Whether a process runs; one that nobody has reaped yet does not."""
    with contextlib.suppress(OSError):
        return read("/proc/%d/stat" % pid).rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def children_of(pid):
    return [int(one) for one in os.listdir("/proc") if one.isdigit() and parent(int(one)) == pid]


def slot_of(pid, db):
    """The number of the slot that a process holds, None: it is no worker."""
    with contextlib.suppress(OSError):
        for fd in os.listdir("/proc/%d/fd" % pid):
            with contextlib.suppress(OSError):
                path = os.readlink("/proc/%d/fd/%s" % (pid, fd))
                if path.startswith(db + "-run/w."):
                    return int(path[len(db + "-run/w."):])


def spread(count, limit):
    """Numbers from 1 to `count`: all, or at most `limit` of them, the first and the last among these."""
    return sorted({1 + i * (count - 1) // max(min(count, limit) - 1, 1) for i in range(min(count, limit))})


def set_limit(pid, name, soft):
    """Set a soft limit of a running process; the one before."""
    import resource
    number = getattr(resource, "RLIMIT_" + name)
    before, hard = resource.prlimit(pid, number)
    resource.prlimit(pid, number, (soft, hard))
    return before


# For the code of `driver`: at("COMMIT", True, die) has die() called before each COMMIT, by any process.
SEAMS = """
import fcntl, subprocess

def at(seam, before, point):
    if seam in ("COMMIT", "statement"):
        def hook(connection, sql, run):
            hit = connection.in_transaction if seam == "statement" else sql.split()[:1] == ["COMMIT"]
            if hit and before:
                point()
            value = run()
            if hit and not before:
                point()
            return value
        on_sql(hook)
    else:
        owner, name = {"flock": (fcntl, "flock"), "Popen": (subprocess.Popen, "__init__")}.get(
            seam, (os, seam))
        around(owner, name, before, point)

PASSES = ["", 0]  # path of the file that counts, the pass that kills

def die():
    if PASSES[0]:
        passed(*PASSES)

def forked(args, fds=()):
    "The pid of a process that makes this call, and has begun to: Python drops earlier signals."
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
        return pid
    status = 1
    try:
        os.close(ours)
        os.close(theirs)
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        sys.argv[1:] = args
        status = queuectl.main(args)
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(status)
"""

# Each line of its stdin is an order: calls to make at once, each in a fork, and a signal for those
# that still run after a while. Answered with [status, stdout, stderr] of each.
CALLER = """
import json, tempfile, time
for line in iter(sys.stdin.readline, ""):
    order, made = json.loads(line), []
    PASSES[:] = order["passes"]
    for args, data in order["calls"]:
        files = [tempfile.TemporaryFile() for _ in range(3)]
        files[0].write(data.encode())
        files[0].seek(0)
        made.append((forked(args, [file.fileno() for file in files]), files))
    if order["signal"]:
        time.sleep(order["after_s"])
        for pid, _ in made:
            os.kill(pid, order["signal"])
    answers = []
    for pid, files in made:
        status = os.waitpid(pid, 0)[1]
        texts = []
        for file in files[1:]:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        for file in files:
            file.close()
        answers.append([-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)] + texts)
    print(json.dumps(answers), flush=True)
os._exit(0)
"""

# Each line of its stdin is the pass at which a process of its daemon is killed (0: none; -1: all is
# killed, and no daemon started). A daemon that was killed is followed by another at once.
KEEPER = """
guardian = 0
for line in iter(sys.stdin.readline, ""):
    if guardian:
        os.killpg(guardian, signal.SIGKILL)
        os.waitpid(guardian, 0)
        guardian = 0
    n = int(line)
    if n >= 0:
        PASSES[:] = [%r + str(n), n]
        guardian = os.fork()
        if not guardian:
            os.setsid()
            os.dup2(2, 1)
            status = signal.SIGKILL
            while status == signal.SIGKILL:
                status = os.waitpid(forked(["daemon"] + %r), 0)[1]
            os._exit(0)
    print(n, flush=True)
os._exit(0)
"""


class Caller:
    """Makes calls, many at once if need be, and may kill them in the middle."""

    def __init__(self, case, code=""):
        self.process = case.started(driver(SEAMS + code, CALLER), False, stdin=subprocess.PIPE)
        case.addCleanup(self.process.stdin.close)

    def __call__(self, *calls, signal=0, after_s=0, passes=("", 0), stdin=""):
        """[status, stdout, stderr] of each call; [] if it was killed itself."""
        order = {"calls": [[list(call), stdin] for call in calls], "signal": signal, "after_s": after_s,
                 "passes": passes}
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        return json.loads(self.process.stdout.readline().decode() or "[]")


# As a host that was started anew: its boot has the id that this file tells.
BOOT = """
import builtins, io
def elsewhere(real):
    def opened(path, *args, **named):
        return real(%r if path == "/proc/sys/kernel/random/boot_id" else path, *args, **named)
    return opened
os.open, builtins.open, io.open = map(elsewhere, (os.open, builtins.open, io.open))
"""

# As if nobody answered at any socket.
ALONE = """
import socket
def refuse(*args):
    raise ConnectionRefusedError(111, "Connection refused")
socket.socket.connect = refuse
"""


class FaultCase(QueueCase):
    here = ""  # the queue's directory below that of the test
    PROBE = ("exec 9>>%(dir)sprobe.$QUEUECTL_JOB_ID; flock -n 9 || echo $QUEUECTL_JOB_ID >>"
             "%(dir)soverlaps; echo $QUEUECTL_JOB_ID >>%(dir)slog")

    def driven(self, code, *args, **options):
        """A daemon that has run `code` before its start, and goes on in the same process."""
        return super().driven(code, *args, **dict({"constants": "pass"}, **options))

    def probing(self, then=""):
        """A command that tells of any overlap, logs its run, and goes on with `then`."""
        return self.PROBE % {"dir": self.path("")} + ("; " + then if then else "")

    def probe(self, job_id, then="", **fields):
        return self.enqueue(self.probing(then), id=job_id, **fields)

    def hold(self, job_id="held", then="", **fields):
        """A job that runs, until the gate opens; the pid of its command."""
        os.mkfifo(self.path("gate"))
        self.probe(job_id, "%s echo $$ >%s; read line <%s" % (then, self.path("pid"), self.path("gate")),
                   **dict({"timeout": 0}, **fields))
        return int(wait_until(lambda: self.read("pid").strip(), "it runs"))

    def fill(self, ids, then="", **fields):
        """Enqueue probing jobs, all in one call; their ids."""
        self.ok("enqueue", "-", stdin="".join(json.dumps(dict(
            fields, id=one, command=self.probing(then))) + "\n" for one in ids))
        return ids

    def path(self, name):
        return os.path.join(self.dir, self.here, name)

    def use(self, name):
        """Go on with the queue in a directory of its own."""
        self.here = name
        os.makedirs(self.path(""), 0o700, exist_ok=True)
        self.db, self.sock = self.path("q.db"), self.path("s")
        self.env = dict(self.env, DB_PATH=self.db, SOCKET_PATH=self.sock)

    def haste(self):
        """Have retries follow at once."""
        self.ok("config", "set", "max-delay", "1ms")

    def boot(self, name):
        """The code of a driver that lives in another boot."""
        with open(self.path("boot." + name), "w") as file:
            file.write("%s-boot\n" % name)
        return BOOT % file.name

    def logged(self):
        return b"".join(read(path) for path in (self.db + "-run/log", self.db + ".log")
                        if os.path.exists(path)).decode()

    def unfinished(self):
        return self.rows("""SELECT COUNT(*) FROM jobs
                            WHERE state NOT IN ('completed', 'dead', 'cancelled')""")[0][0]

    def finish(self, seconds=30):
        wait_until(lambda: not self.unfinished(), "all is done", seconds)

    def history(self, job_id):
        """The errors of its attempts, the first first."""
        return [error for error, in self.rows(
            "SELECT error FROM attempts WHERE job = ? ORDER BY number", job_id)]

    def lost(self):
        return self.rows("SELECT COUNT(*) FROM attempts WHERE error = 'worker lost'")[0][0]

    def wrongs(self, ids, cancels=(), lost=(0, 0)):
        """What is wrong with a queue at rest, {what: ids or rows}; `cancels`: those of `ids` that
        somebody asked to cancel; `lost`: so many attempts at least and at most were lost."""
        stored, log = dict(self.rows("SELECT id, state FROM jobs")), self.read("log").split()
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

    def check(self, ids, cancels=(), lost=(0, 0)):
        self.assertEqual(self.wrongs(ids, cancels, lost), {})
        self.assertEqual(set(self.states()), set(ids))


@unittest.skipUnless(shutil.which("flock"), "needs flock(1)")
class FailpointTest(FaultCase):
    """kill -9 at the n-th pass of a seam, counted over all processes of a daemon, for each n of a run
    (where those are many, for some spread over it); another daemon follows at once."""

    LIMIT = 4

    def sweep(self, seam, before, jobs=2, at_least=1, lost=0):
        """`at_least`: passes that a run makes; `lost`: attempts that each kill costs at the least."""
        self.haste()
        passes = self.path("passes.")
        with open(self.path("errors"), "wb") as errors:
            keeper = self.started(
                driver(SEAMS + "at(%r, %r, die)" % (seam, before), KEEPER % (passes, ["--workers", "2"])),
                False, stdin=subprocess.PIPE, stderr=errors)
        self.addCleanup(keeper.stdin.close)

        def keep(n):
            keeper.stdin.write(b"%d\n" % n)
            keeper.stdin.flush()
            self.assertEqual(int(keeper.stdout.readline() or -2), n)
        ids, kills, points = [], 0, None
        for n in itertools.chain([0], iter(lambda: points.pop(0) if points else None, None)):
            ids += self.fill(["%d.%d" % (n, i) for i in range(jobs)])
            keep(n)
            try:
                self.finish()
            except AssertionError as error:
                raise AssertionError("%s at pass %d: %s\n%s\n%s" % (
                    error, n, self.states(), self.logged(), self.read("errors")))
            made = len(self.read("passes.%d" % n))
            if not n:
                self.assertGreaterEqual(made, at_least)
                points = spread(made, self.LIMIT)
            kills += made >= n > 0
            keep(-1)
            with self.subTest(pass_number=n):
                self.check(ids, lost=(lost * kills, kills))
        self.assertGreater(kills, 0)

    def test_before_a_commit(self):
        self.sweep("COMMIT", True, at_least=4)

    def test_after_a_commit(self):
        self.sweep("COMMIT", False, at_least=4)

    def test_before_a_lock(self):
        self.sweep("flock", True, at_least=8)

    def test_after_a_lock(self):
        self.sweep("flock", False, at_least=8)

    def test_before_a_note(self):
        self.sweep("pwrite", True, at_least=2)

    def test_after_a_note(self):
        self.sweep("pwrite", False, at_least=2)

    def test_before_a_command_starts(self):
        self.sweep("Popen", True, at_least=2, lost=1)

    def test_once_a_command_runs(self):
        self.sweep("Popen", False, at_least=2, lost=1)

    def test_before_a_file_goes(self):
        self.sweep("unlink", True)

    def test_after_a_file_has_gone(self):
        self.sweep("unlink", False)


class CommandFaultTest(FaultCase):
    """Commands that are killed or interrupted at any moment, and many at once."""

    def test_a_server_that_dies_in_a_request_costs_nothing_and_doubles_nothing(self):
        armed = self.path("armed.%s")
        daemon = self.driven(SEAMS + "".join("at(%r, %r, lambda: os.path.exists(%r) and"
                                             " os.unlink(%r) is None and os.kill(os.getpid(), 9))\n" % (
                                                 seam, before, armed % name, armed % name)
                                             for name, seam, before in (
                                                 ("transaction", "COMMIT", True),
                                                 ("disk", "fdatasync", True),
                                                 ("answer", "fdatasync", False))))

        def served(point, *args):
            open(armed % point, "w").close()
            answer = self.ok(*args)
            self.assertFalse(os.path.exists(armed % point), "the server died")
            return answer
        points = ("transaction", "disk", "answer")
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

    def test_a_server_killed_under_load_costs_no_request(self):
        daemon, caller, ids = self.daemon("--workers", "2"), Caller(self), []
        for number in range(3):
            wave = ["%d.%d" % (number, i) for i in range(10)]
            server, = wait_until(lambda: [pid for pid in children_of(daemon.pid) if alive(pid) and
                                          slot_of(pid, self.db) is None], "there is a server")
            killer = threading.Timer(0.005 * number, os.kill, (server, signal.SIGKILL))
            killer.start()
            answers = caller(*[("enqueue", json.dumps({"id": one, "command": self.probing()}))
                               for one in wave])
            killer.join()
            self.assertEqual([answer for answer in answers if answer[0]], [])
            ids += wave
        self.finish()
        self.check(ids)
        self.assertIsNone(daemon.poll())

    def test_a_command_killed_in_its_transaction_leaves_a_sound_queue(self):
        for seam, before in itertools.product(("COMMIT", "flock", "fdatasync"), (True, False)):
            self.use("%s.%s" % (seam, before))
            caller, ids = Caller(self, "at(%r, %r, die)" % (seam, before)), []
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

    def original(self, name):
        """Go on with a queue that the original QueueCTL made."""
        self.use(name)
        with contextlib.closing(sqlite3.connect(self.db)) as connection, connection:
            connection.executescript("""
                CREATE TABLE jobs (
                    id TEXT PRIMARY KEY, command TEXT NOT NULL, state TEXT DEFAULT 'pending',
                    attempts INT DEFAULT 0, max_retries INT DEFAULT 3,
                    created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
                    updated_at DATETIME DEFAULT CURRENT_TIMESTAMP, locked_at DATETIME,
                    timeout INT DEFAULT 5000, run_after DATETIME DEFAULT CURRENT_TIMESTAMP,
                    priority INT DEFAULT 0, started_at DATETIME);
                CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT);
                CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT,
                    daemon_startup DATETIME DEFAULT CURRENT_TIMESTAMP, total_commands INT DEFAULT 0);
                INSERT INTO config VALUES ('max-retries', NULL), ('timeout', '7000.0');
                INSERT INTO jobs (id, command) VALUES ('old', 'true')""")
        os.chmod(self.db, 0o600)

    def test_a_migration_killed_at_any_statement_is_begun_anew(self):
        caller, points = Caller(self, "at('statement', True, die)"), [0]
        while points:
            n = points.pop(0)
            self.original("queue%d" % n)
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
        caller = Caller(self)
        for number in range(rounds):
            ids = ["%d.%d" % (number, i) for i in range(2)]
            answers = caller(*[("enqueue", json.dumps({"id": one, "command": "true"})) for one in ids],
                             signal=signal.SIGINT, after_s=number % 60 * 0.00025)
            for job_id, (status, out, err) in zip(ids, answers):
                self.assertIn(status, (0, 130), err)
                if not status:
                    self.assertEqual(json.loads(out)["id"], job_id)
                    self.assertIn(job_id, self.states())
        status, _, err = caller(("enqueue", "-q", "--", "true"))[0]
        self.assertEqual(status, 0, err)
        self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])
        self.assertEqual(set(self.states().values()), {"pending"})

    def test_a_command_interrupted_at_any_moment_leaves_no_lock(self):
        self.interrupt(60)

    def test_a_run_interrupted_at_any_moment_leaves_nothing_running(self):
        caller, stored = Caller(self), 0
        self.ok("config", "set", "jitter", "0")
        for number in range(10):
            status, out, err = caller(("run", "--quiet", "--", "exec sleep 60"), signal=signal.SIGINT,
                                      after_s=number * 0.004)[0]
            with self.subTest(number=number):
                self.assertEqual(status, 130, err)
                states = sorted(self.states().values())
                self.assertEqual(states, ["cancelled"] * len(states))
                self.assertIn(len(states) - stored, (0, 1))
                self.assertEqual(self.rows("SELECT * FROM running"), [])
                stored = len(states)
        self.assertGreater(stored, 0)
        self.assertEqual(self.prints("run", "--", "echo on"), "on\n")

    def test_two_hundred_enqueues_at_once_are_all_stored(self):
        caller = Caller(self)
        for count, daemon in ((40, False), (200, True)):
            if daemon:
                self.daemon("--workers", "1")
            answers = caller(*[("enqueue", "-q", "--", "true")] * count)
            with self.subTest(daemon=daemon):
                self.assertEqual([answer for answer in answers if answer[0]], [])
                ids = {answer[1].strip() for answer in answers}
                self.assertEqual(len(ids), count)
                self.assertLessEqual(ids, set(self.states()))
        self.finish()

    def test_what_was_acknowledged_survives_the_death_of_everything(self):
        self.daemon("--workers", "2")
        self.hold()
        ids = [self.enqueue("true", run_after="2100-01-01") for _ in range(3)]
        self.ok("pause", "--reason", "swap")
        self.ok("config", "set", "jitter", "7")
        self.prints("cancel", ids[0])
        for pid in processes_of(self.dir):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.assertEqual(self.states(), {
            "held": "processing", ids[0]: "cancelled", ids[1]: "pending", ids[2]: "pending"})
        self.assertEqual((self.ok("status")["paused"], self.ok("config", "get", "jitter")), ("swap", 7))

    def test_enqueues_share_the_turn_of_a_slow_disk_and_jobs_go_on(self):
        self.fill(["old%d" % number for number in range(60)])
        self.driven("""
import time
def slow(fd, real=os.fdatasync):
    with open(%r, "ab", 0) as file:
        file.write(b".")
    time.sleep(0.01)
    return real(fd)
os.fdatasync = slow""" % self.path("synced"), "--workers", "2")
        answers, before = [], len(self.read("synced"))

        def client(name):
            answers.extend(self.asked([json.dumps({"command": "enqueue", "value": json.dumps({
                "id": "%s.%d" % (name, number), "command": "true"})}).encode() + b"\n"
                for number in range(10)], 10))
        threads = [threading.Thread(target=client, args=(name,)) for name in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        states, syncs = self.states(), len(self.read("synced")) - before
        self.assertEqual([answer["success"] for answer in answers], [True] * 200)
        self.assertEqual(len(states), 260)
        self.assertGreaterEqual(syncs, 10)  # each client waits for its own, one after the other
        self.assertLess(syncs, 120)
        self.assertGreater(list(states.values()).count("completed"), 10)
        self.finish()

    NIGHT = ("run", "--unique", "nightly", "--timeout", "60s", "--")

    def test_a_unique_run_that_was_killed_is_taken_up_by_the_next(self):
        self.haste()
        first = self.spawn(*(self.NIGHT + (self.probing("[ $QUEUECTL_ATTEMPT = 2 ] || exec sleep 60"),)))
        wait_until(lambda: self.read("log"), "it runs")
        job, = self.states()
        os.kill(first.pid, signal.SIGSTOP)  # so that it can't replace its worker
        for pid in processes_of(self.dir):
            if pid == first.pid or slot_of(pid, self.db):
                os.kill(pid, signal.SIGKILL)
        self.assertEqual(self.states(), {job: "processing"})
        self.assertEqual(self.cli(*(self.NIGHT + ("echo other",)))[0], 0)
        self.check([job], lost=(1, 1))
        self.assertEqual(self.read("log"), (job + "\n") * 2)

    def test_a_unique_run_finds_the_one_whose_worker_lives_on(self):
        os.mkfifo(self.path("gate"))
        first = self.spawn(*(self.NIGHT + (self.probing("read line <%s" % self.path("gate")),)))
        wait_until(lambda: self.read("log"), "it runs")
        job, = self.states()
        self.kill(first)
        code, out, err = self.cli(*(self.NIGHT + ("echo other",)))
        self.assertEqual((code, out), (0, ""))
        self.assertIn(job, err)
        self.open_gate()
        self.finish()
        self.check([job])
        self.assertEqual(self.cli(*(self.NIGHT + (self.probing(),)))[0], 0)
        self.assertEqual(len(self.read("log").split()), 2)


# Daemons in pairs, the second so much later for each further pair.
RIVALS = """
import time
for pair in range(%(pairs)d):
    for rival in (0, 1):
        folder = "%(dir)s/%%d" %% pair
        os.environ.update(DB_PATH=folder + "/q.db", SOCKET_PATH="%%s/s%%d" %% (folder, rival))
        out = os.open("%%s/out%%d" %% (folder, rival), os.O_WRONLY | os.O_CREAT)
        late, inner = rival * pair * 0.002, queuectl.main
        queuectl.main = lambda args: time.sleep(late) or inner(args)
        print(pair, rival, forked(["daemon", "--workers", "1"], (0, out, out)), flush=True)
        queuectl.main = inner
        os.close(out)
while True:
    pid, status = os.wait()
    print(pid, status >> 8, flush=True)
"""


class OrphanTest(FaultCase):
    """The daemon's death is not the workers', and what those leave is not left alone."""

    def nothing_is_left(self):
        """Of any command of this queue."""
        wait_until(lambda: not any(map(alive, processes_of(self.db + "-run/"))), "nothing of them is left")

    def kill_workers(self):
        for pid in processes_of(self.db):
            if slot_of(pid, self.db):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

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
            self.ok("enqueue", "-", stdin="".join(json.dumps({
                "id": form, "timeout": 0, "command": self.probing("[ $QUEUECTL_ATTEMPT = 1 ] || exit 0; "
                + self.FORMS[form] % {"dir": self.path(""), "python": sys.executable})}) + "\n" for form in ids))
            wait_until(lambda: len(self.read("log").split()) == len(ids) and all(
                os.path.exists(self.path(mark)) for mark in ("closed", "escaped", "far")), "all run")
            wait_until(lambda: any(b"State:\tT" in read("/proc/%d/status" % pid)
                                   for pid in processes_of(self.db + "-run/")), "one is stopped")
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

    def slow_a_timeout_ends_whatever_a_command_started(self):
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

    @unittest.skipUnless(shutil.which("flock"), "needs flock(1)")
    def slow_never_more_run_at_once_than_wanted_whoever_is_the_daemon(self):
        seats = " || ".join("{ exec 9>>%sseat.%d; flock -n 9; }" % (self.path(""), n) for n in range(3))
        ids = ["job%d" % number for number in range(18)]
        self.ok("enqueue", "-", stdin="".join(json.dumps({"id": one, "command": (
            "%s || echo $QUEUECTL_JOB_ID >>%s; sleep 0.1; echo $QUEUECTL_JOB_ID >>%s" % (
                seats, self.path("crowd"), self.path("log")))}) + "\n" for one in ids))
        daemon = self.daemon("--workers", "3")
        for _ in range(3):
            before = self.read("log")
            wait_until(lambda: self.read("log") != before, "jobs go on")
            self.kill(daemon)
            daemon = self.daemon()
        self.finish()
        self.assertEqual(self.read("crowd"), "")
        self.check(ids)
        self.assertEqual(sorted(self.read("log").split()), sorted(ids))

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

    def slow_an_orphans_job_is_stopped_by_whoever_wishes_it(self):
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
                self.assertEqual(bool(alive(command)), boot == "second")

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

    def slow_a_running_jobs_row_deleted_or_inserted_anew_runs_once_at_a_time(self):
        self.daemon("--workers", "2")
        self.hold()
        self.rows("DELETE FROM jobs WHERE id = 'held'")
        self.rows("INSERT INTO jobs (id, command) VALUES ('held', ?)", self.probing("echo second"))
        self.probe("other")
        self.wait_for("completed")
        self.assertEqual(self.read("log"), "held\nother\n")
        self.open_gate()
        self.finish()
        self.assertEqual((self.read("overlaps"), self.read("log")), ("", "held\nother\nheld\n"))
        self.assertEqual(self.prints("logs", "held"), "second\n")
        self.assertEqual(self.rows("SELECT * FROM running"), [])

    def test_a_running_jobs_row_deleted_leaves_no_trace_and_the_worker_goes_on(self):
        self.daemon("--workers", "1")
        self.hold()
        self.rows("DELETE FROM jobs WHERE id = 'held'")
        self.probe("other")
        self.open_gate()
        self.finish()
        self.assertEqual((self.states(), self.rows("SELECT * FROM running")), ({"other": "completed"}, []))

    def test_a_worker_whose_files_were_removed_still_ends_its_job_and_none_takes_its_place(self):
        self.daemon("--workers", "1")
        self.hold()
        for name in os.listdir(self.db + "-run"):
            if name[:2] == "w." or name.isdigit():
                os.unlink(os.path.join(self.db + "-run", name))
        self.open_gate()
        self.finish()
        self.check(["held"])

    def two_at_once(self, pairs):
        """Two daemons of one database, for so many databases."""
        for pair in range(pairs):
            self.use(str(pair))
            self.fill(["job%d.%d" % (pair, number) for number in range(2)])
        driven = self.started(driver(SEAMS, RIVALS % {"pairs": pairs, "dir": self.dir}), False)

        def told(count):
            return [tuple(map(int, driven.stdout.readline().split())) for _ in range(count)]
        pids = {(pair, rival): pid for pair, rival, pid in told(2 * pairs)}
        ended = dict(told(pairs))
        self.assertEqual(set(ended.values()), {1})
        for pair in range(pairs):
            self.use(str(pair))
            refused, = [rival for rival in (0, 1) if pids[pair, rival] in ended]
            wait_until(lambda: "ready" in self.read("out%d" % (1 - refused)), "the other is ready")
            self.assertIn("pid %d" % pids[pair, 1 - refused], self.read("out%d" % refused))
            self.finish()
            self.check(["job%d.%d" % (pair, number) for number in range(2)])
            self.assertEqual(len(self.read("log").split()), 2)
        for pid in set(pids.values()) - set(ended):
            os.kill(pid, signal.SIGTERM)
        self.assertEqual({status for _, status in told(pairs)}, {0})

    def slow_two_daemons_at_once_leave_one(self):
        self.two_at_once(8)


class StorageTest(FaultCase):
    """No space, no descriptors, no database; the clock jumps, signals are ignored."""

    @unittest.skipUnless(sys.platform == "linux", "needs Linux")
    def slow_a_disk_that_takes_nothing_costs_neither_job_nor_outcome_nor_retry(self):
        daemon = self.daemon("--workers", "2")
        command, due = self.hold(), time.time() + 0.7
        self.probe("due", run_after=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(due)) + ".%03dZ" % (
            due % 1 * 1000))
        limits = {}
        for pid in [daemon.pid] + children_of(daemon.pid):
            limits[pid] = set_limit(pid, "FSIZE", 4000)  # room for the log, not for a page
        self.assertRegex(self.request("enqueue", value='{"command":"true"}'), "^Error")
        self.open_gate()
        wait_until(lambda: not alive(command) and time.time() > due + 0.3, "the command has ended")
        self.assertEqual(self.states(), {"held": "processing", "due": "pending"})
        wait_until(lambda: re.search("storage|space|can't be|too large", self.logged()), "the log tells")
        self.assertEqual({daemon.pid}.union(children_of(daemon.pid)), set(limits))
        for pid, before in limits.items():
            set_limit(pid, "FSIZE", before)
        self.finish()
        self.check(["held", "due"])
        self.assertEqual(self.read("log"), "held\ndue\n")

    def mounted(self, *options):
        """A small file system of its own for the queue."""
        small = os.path.join(self.dir, "small")
        os.mkdir(small, 0o700)
        if os.geteuid() or not shutil.which("mount") or subprocess.call(
                ["mount", "-t", "tmpfs", "-o", ",".join(("mode=700",) + options), "small", small],
                stderr=subprocess.DEVNULL):
            self.skipTest("needs the right to mount")
        self.addCleanup(lambda: subprocess.call(["umount", small]))
        self.addCleanup(self.kill_all)
        self.db, self.sock = small + "/q.db", small + "/s"
        self.env.update(DB_PATH=self.db, SOCKET_PATH=self.sock)
        return small

    def test_no_space_left_is_said_and_work_goes_on_after(self):
        filler = self.mounted("size=2m") + "/filler"

        def fill_up():
            with open(filler, "wb", 0) as file:
                for size in (4096, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"x" * size)
        large = json.dumps({"id": "large", "command": self.probing(": " + "x" * 100000)})
        self.ok("config", "set", "jitter", "0")
        fill_up()
        self.assertRegex(self.refused("enqueue", large), "space|full")
        os.unlink(filler)
        daemon = self.daemon("--workers", "1")
        command = self.hold()
        self.fill(["a", "b", "c"])
        fill_up()
        self.assertRegex(self.refused("enqueue", large), "space|full")
        self.open_gate()
        wait_until(lambda: not alive(command), "the command has ended")
        self.assertRegex(self.refused("enqueue", large), "space|full")
        self.assertIsNone(daemon.poll())
        os.unlink(filler)
        self.ok("enqueue", large)
        self.finish()
        self.check(["held", "a", "b", "c", "large"])
        self.assertEqual(len(self.read("log").split()), 5)

    def test_a_file_system_that_is_read_only_gets_one_clear_error(self):
        small = self.mounted()
        self.fill(["a"])
        subprocess.check_call(["mount", "-o", "remount,ro", small])
        for args in (("enqueue", "--", "true"), ("config", "set", "jitter", "1"), ("daemon",)):
            with self.subTest(args=args):
                self.assertRegex(self.refused(*args), "[Rr]ead-only|can't")
        subprocess.check_call(["mount", "-o", "remount,rw", small])
        self.assertEqual(self.ok("config", "get", "jitter"), 0)
        self.daemon("--workers", "1")
        self.finish()
        self.check(["a"])

    @unittest.skipUnless(os.geteuid(), "root may write anywhere")
    def test_a_directory_that_can_not_be_written_gets_one_clear_error(self):
        self.use("closed")
        os.chmod(self.path(""), 0o500)
        self.assertIn(self.path("")[:-1], self.refused("enqueue", "--", "true"))
        os.chmod(self.path(""), 0o700)
        self.enqueue("true")

    def test_an_attempt_that_lacks_what_it_needs_is_given_back_and_burns_no_retry(self):
        wants = ("process", "descriptor", "pipe", "note")
        for want in wants:
            open(self.path("no." + want), "w").close()
        daemon = self.driven("""
import errno, subprocess
MAIN = os.getpid()
def lacks(want, number):
    if os.getpid() != MAIN:
        try:
            os.rename(%r + want, %r + want)
        except FileNotFoundError:
            return
        raise OSError(number, os.strerror(number))
def lacking(real, want, number, of=lambda *args: True):
    def call(*args, **named):
        of(*args) and lacks(want, number)
        return real(*args, **named)
    return call
subprocess.Popen.__init__ = lacking(subprocess.Popen.__init__, "process", errno.EAGAIN)
os.open = lacking(os.open, "descriptor", errno.EMFILE, lambda path, flags, *args: (
    flags & os.O_EXCL and os.path.basename(path).isdigit()))
os.pipe = lacking(os.pipe, "pipe", errno.EMFILE)
os.pipe2 = lacking(os.pipe2, "pipe", errno.EMFILE)
os.pwrite = lacking(os.pwrite, "note", errno.ENOSPC, lambda fd, data, *args: b"serial" in data)
""" % (self.path("no."), self.path("tried.")), "--workers", "4")
        self.fill(["a", "b", "c", "d"], max_retries=1)
        self.finish()
        self.check(["a", "b", "c", "d"])
        tried = [want for want in wants if os.path.exists(self.path("tried." + want))]
        self.assertLessEqual({"process", "descriptor", "note"}, set(tried))
        self.assertRegex(self.logged(), "[cn]('t| not) start")
        self.assertIsNone(daemon.poll())

    def slow_a_foreign_lock_of_three_seconds_is_waited_for_and_running_jobs_go_on(self):
        self.daemon("--workers", "2")
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

    def test_a_daemon_can_be_stopped_while_another_program_has_the_database(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue("true")
        self.finish()
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            client = self.spawn("enqueue", "--", "true")
            self.assertEqual(self.stop(daemon), 0)
            other.execute("COMMIT")
        self.assertEqual(client.wait(30), 0)

    def slow_a_database_that_is_not_what_it_was_is_written_to_no_more(self):
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
                self.assertRegex(self.logged(), "removed|replaced|emptied")
                if name == "moved":
                    os.rename(self.path("moved"), self.db)
                    self.haste()
                    self.daemon()
                    self.finish()
                    self.assertEqual(set(self.states().values()), {"completed"})
                    self.assertEqual((self.read("overlaps"), len(self.read("log").split())), ("", 7))

    def test_a_garbled_database_gets_clear_errors_and_a_backup_put_back_goes_on(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue("true", id="a", run_after="2100-01-01")
        self.ok("backup", self.path("backup"))
        with open(self.db, "r+b") as file:
            file.write(b"garbled " * (os.path.getsize(self.db) // 8))
        self.kill(daemon)
        self.kill_all()
        for end in ("-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(self.db + end)
        before = read(self.db)
        for args in (("enqueue", "--", "true"), ("list",), ("daemon",)):
            with self.subTest(args=args):
                self.assertRegex(self.refused(*args), "not a database|malformed|no queue")
        self.assertEqual(read(self.db), before)
        shutil.copy(self.path("backup"), self.db)
        self.probe("b")
        self.daemon()
        self.wait_for("completed")
        self.assertEqual(self.states(), {"a": "pending", "b": "completed"})

    def test_a_database_of_a_newer_version_is_refused_untouched(self):
        self.fill(["a"])
        self.rows("PRAGMA user_version = 1000000")
        before = read(self.db)
        for args in (("enqueue", "--", "true"), ("list",), ("status",), ("daemon",), ("drain",)):
            with self.subTest(args=args):
                self.assertIn("newer", self.refused(*args))
        self.assertEqual(read(self.db), before)

    def slow_a_clock_that_steps_a_day_neither_loses_nor_times_out_nor_runs_twice(self):
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
        shell = ["/bin/sh", "-c", "trap '' HUP INT QUIT TERM USR1 CHLD PIPE; exec \"$@\"", "sh"]
        for number, argv in enumerate((
                shell + driver() + ["daemon", "--workers", "1"],
                driver("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))", "pass") + [
                    "daemon", "--workers", "1"]), 1):
            with self.subTest(number=number):
                daemon = self.started(argv)
                job = self.enqueue("grep -E '^Sig(Blk|Ign)' /proc/self/status")
                self.wait_for("completed", number)
                blocked, ignored = [int(mask, 16) for mask in self.prints("logs", job).split()[1::2]]
                self.assertEqual((blocked & 0x7fffffff, ignored & 0x7fffffff), (0, 0))
                self.assertEqual(self.stop(daemon), 0)
                wait_until(lambda: not processes_of(self.dir), "its children have ended")


AS_NOBODY = ("import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
             "s = socket.socket(socket.AF_UNIX)\n")


def as_nobody(code, *args):
    """The stdout of Python code run by another user."""
    return subprocess.check_output([sys.executable, "-c", AS_NOBODY + code] + list(args)).decode()


class SecurityTest(FaultCase):
    """What another user may try, and what was planted."""

    def open_folder(self, name, mode=0o777):
        """A directory that everybody may write, as /tmp without its sticky bit."""
        os.chmod(self.dir, 0o755)
        os.mkdir(self.path(name))
        os.chmod(self.path(name), mode)
        return self.path(name)

    @unittest.skipIf(os.geteuid(), "needs root, to be another user")
    def test_nobody_gets_in_even_if_the_modes_were_opened(self):
        self.daemon()
        self.assertEqual(os.lstat(self.sock).st_mode & 0o777, 0o600)
        os.chmod(self.dir, 0o755)
        self.assertIn("PermissionError", as_nobody(
            "try: s.connect(sys.argv[1])\n"
            "except OSError as error: print(repr(error))", self.sock))
        os.chmod(self.sock, 0o666)
        answer = as_nobody(
            "s.connect(sys.argv[1])\n"
            "try: s.sendall(b'{\"command\":\"enqueue\",\"value\":{\"command\":\"true\"}}\\n')\n"
            "except OSError: pass\n"
            "try: print(s.recv(4096).decode())\n"
            "except OSError: pass", self.sock)
        self.assertNotIn('"success":true', answer.replace(" ", ""))
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
                self.assertIn(self.sock, self.refused("daemon"))
                after = os.lstat(self.sock)
                self.assertEqual((after.st_ino, after.st_mode, after.st_uid),
                                 (before.st_ino, before.st_mode, 65534))
                self.assertFalse(os.path.exists(self.path("nowhere")))
            (os.rmdir if stat.S_ISDIR(before.st_mode) else os.unlink)(self.sock)

    @unittest.skipIf(os.geteuid(), "needs root, to be another user")
    def test_a_foreign_server_is_told_nothing_and_its_answers_are_not_believed(self):
        path = self.open_folder("tmp") + "/s"
        squatter = self.started([sys.executable, "-c", AS_NOBODY + (
            "s.bind(sys.argv[1]); s.listen(5); print('ready', flush=True)\n"
            "while True:\n"
            "  c = s.accept()[0]\n"
            "  try:\n"
            "    c.sendall(b'{\"success\":true,\"message\":\"Job enqueued\",\"id\":\"x\"}\\n')\n"
            "    print(c.recv(99), flush=True)\n"
            "  except OSError: pass\n"), path])
        self.env["SOCKET_PATH"] = path
        code, out, err = self.cli("enqueue", "-q", "--", "true")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"end")
            client.shutdown(socket.SHUT_WR)
            told = iter(squatter.stdout.readline, b"b'end'\n")
            self.assertEqual(set(told) - {b"b''\n"}, set())
        if not code:
            self.assertEqual(list(self.states()), [out.strip()])
        else:
            self.assertIn("another user", err)

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

    def test_all_files_are_private_whatever_the_umask(self):
        for mask in (0o000, 0o077):
            self.use("%03o" % mask)
            with umask(mask):
                self.daemon("--workers", "1")
                self.enqueue("sleep 60", timeout=0)
            wait_until(lambda: self.begun() == 1, "it runs")
            modes = {name: os.lstat(os.path.join(above, name)).st_mode
                     for above, folders, files in os.walk(self.path("")) for name in folders + files}
            with self.subTest(umask=oct(mask)):
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


class SlowTest(unittest.TestCase):
    def test_what_mostly_waits_side_by_side(self):
        """The methods slow_* of the classes above; each can be called by its name too."""
        cases = [kind(name) for kind in (OrphanTest, StorageTest) for name in dir(kind)
                 if name.startswith("slow_")]
        results = [unittest.TestResult() for _ in cases]
        threads = [threading.Thread(target=case.run, args=(result,)) for case, result in zip(cases, results)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bad = [text for result in results for _, text in result.failures + result.errors]
        self.assertFalse(bad, "\n".join(bad))


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

    OPEN = 60     # jobs waiting or running, about so many
    CANCELS = 0.2

    def __init__(self, seed):
        super().__init__("rage")
        self.chance, self.clients_chance = random.Random(seed), random.Random(seed + 1)
        self.acknowledged, self.cancels, self.cancelled = set(), set(), set()
        self.calls, self.unanswered = 0, 0
        self.killed = {"workers": 0, "servers": 0, "daemons": 0, "clients": 0}
        self.pending = {}      # serial of an attempt hit by a kill -> when, monotonic
        self.slowest = 0.0     # s from a kill until the attempt's fate was recorded
        self.over = threading.Event()
        self.trouble = None    # what ended the clients

    def feed(self):
        """Enqueue and cancel, whoever is there to do it; some of the calls are killed."""
        try:
            chance, caller = self.clients_chance, Caller(self)
            for number in itertools.count():
                if self.over.is_set():
                    return
                if self.unfinished() > self.OPEN:
                    self.over.wait(0.02)
                    continue
                jobs = storm_jobs(chance, self, "job%d" % number, 6)
                calls = [(("enqueue", json.dumps(job)), self.acknowledged, job["id"]) for job in jobs]
                known = sorted(self.acknowledged - self.cancels)[-12:]
                for job_id in known:
                    if chance.random() < self.CANCELS / 2:
                        self.cancels.add(job_id)
                        calls.append((("cancel", job_id), self.cancelled, job_id))
                mishap = chance.random() < 0.3
                answers = caller(*[call for call, _, _ in calls], signal=9 * mishap,
                                 after_s=chance.uniform(0, 0.03))
                for (_, done, job_id), (status, out, err) in zip(calls, answers):
                    self.calls += 1
                    self.unanswered += status != 0
                    self.killed["clients"] += status == -9
                    if status == 0:
                        done.add(job_id)
                    elif status != -9 and done is self.acknowledged:
                        raise AssertionError("enqueue of %s: %s" % (job_id, err))
        except BaseException as error:
            self.trouble = repr(error)

    def open_attempts(self):
        return dict(self.rows("SELECT serial, slot FROM running"))

    def watch(self):
        """Note which of the attempts hit by a kill are settled now."""
        if self.pending:
            for serial in set(self.pending) - set(self.open_attempts()):
                self.slowest = max(self.slowest, time.monotonic() - self.pending.pop(serial))

    def strike(self, daemon):
        """Kill a worker or the server; orphans of an earlier daemon are no children of this one."""
        children = {pid: slot_of(pid, self.db) for pid in children_of(daemon.pid)}
        server = self.chance.random() < 0.12
        victims = sorted(pid for pid, slot in children.items() if (slot is None) == server)
        if victims:
            victim = self.chance.choice(victims)
            os.kill(victim, signal.SIGKILL)  # not reaped yet, or a zombie: nobody else's
            self.killed["servers" if server else "workers"] += 1
            if not server:
                for serial, slot in self.open_attempts().items():
                    if slot == children[victim]:  # again, if it was about to settle another's
                        self.pending[serial] = time.monotonic()

    def strike_daemon(self, daemon):
        self.kill(daemon)
        self.daemons.remove(daemon)
        daemon.stdout.close()
        self.killed["daemons"] += 1
        daemon = self.daemon()
        self.pending.update(dict.fromkeys(self.pending, time.monotonic()))
        return daemon

    def rage(self, seconds):
        """Kill for so long; then let the queue come to rest."""
        self.ok("config", "set", "max-delay", "1ms")
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
                    daemon = self.strike_daemon(daemon)
        finally:
            self.over.set()
            feeder.join()
        wait_until(lambda: self.watch() or not self.unfinished(), "all is done", 120)
        self.watch()
        wait_until(lambda: self.ok("status")["workers"] == 4, "the pool is at its number")

    def figures(self):
        log = self.read("log").split()
        return ("%(workers)d workers, %(servers)d servers, %(daemons)d daemons and %(clients)d clients killed"
                % self.killed + ", %d calls, %d jobs acknowledged, %d cancelled, %d attempts lost,"
                " %d jobs ran more than once, slowest recovery %.2f s" % (
                    self.calls, len(self.acknowledged), list(self.states().values()).count("cancelled"),
                    self.lost(), len(log) - len(set(log)), self.slowest))

    def wrong(self):
        wrong = self.wrongs(self.acknowledged, self.cancels, (0, self.killed["workers"]))
        states = self.states()
        wrong.update({
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
        pss = fds = zombies = 0
        for pid in [daemon.pid] + children_of(daemon.pid):
            if not alive(pid):
                zombies += 1
                continue
            with contextlib.suppress(OSError):
                fds += len(os.listdir("/proc/%d/fd" % pid))
                for line in read("/proc/%d/smaps" % pid).splitlines():
                    pss += int(line.split()[1]) / 1024.0 if line.startswith(b"Pss:") else 0
        return [pss, fds, zombies] + [os.path.getsize(self.db + end) / 1048576.0 for end in ("-wal", "")]

    def completed(self):
        found = re.search(r"(?m)^queuectl_jobs_completed_total (\S+)",
                          self.prints("metrics", "--format", "prometheus"))
        return int(float(found.group(1)))

    def soak(self, count, batch=1000):
        """Run `count` jobs; what grew, as {name: [early, late]}."""
        self.ok("config", "set", "retention", "2s")
        daemon, samples, start = self.daemon("--workers", "2"), [], time.monotonic()
        print("soak: %7s %9s %9s %8s %9s %9s" % ("jobs", "PSS MiB", "open fds", "zombies", "WAL MiB", "DB MiB"))
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
            subprocess.check_call(["umount", self.disk])

    def switch_on(self, image, boot, code=""):
        """Mount the image and start a daemon, as after another boot."""
        subprocess.check_call(["mount", "-o", "loop", image, self.disk])
        os.chmod(self.disk, 0o700)
        self.driven(self.boot(boot) + code, "--workers", "3")

    def feed(self, caller, name, acknowledged, over):
        """Enqueue jobs, and cancel some; `acknowledged`: id -> whether its cancel was too, None: it may be."""
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
        self.ok("config", "set", "max-delay", "1ms")
        acknowledged, over, feeders = {}, threading.Event(), []
        for kind, trick in (("asks", ""), ("alone", ALONE)):  # by the daemon, and by commands themselves
            feeders.append(threading.Thread(target=self.feed, args=(
                Caller(self, code + trick), "%s.%s" % (name, kind), acknowledged, over)))
            feeders[-1].start()
        try:
            pause(self.chance.uniform(0.3, 1.5))
            for pid in processes_of(self.dir):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
            promised, ran = dict(acknowledged), self.read("log").split()
            shutil.copyfile(before, after)
        finally:
            over.set()
            self.kill_all()
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
        wrong = {
            "lost": sorted(set(promised) - set(stored)),
            "cancelled though nobody asked": sorted(
                job_id for job_id, state in stored.items()
                if state != "completed" and promised.get(job_id, None) is False),
            "run though cancelled": sorted(job_id for job_id, cancelled in promised.items()
                                           if cancelled and log.count(job_id) > ran.count(job_id)),
            "never run": sorted(job_id for job_id in stored if stored[job_id] == "completed"
                                and job_id not in log),
            "overlaps": self.read("overlaps").split(),
            "damaged": [row for row in self.rows("PRAGMA integrity_check") if row != ("ok",)]}
        return {what: found for what, found in wrong.items() if found}


def conclude(name, wrong, well):
    """Print what is wrong, or that all is well; the exit status."""
    for what, found in wrong.items():
        print("%s: %s: %s" % (name, what, str(found)[:500]))
    print("%s: %s" % (name, "FAILED" if wrong else well))
    return int(bool(wrong))


def plug(rounds, seed):
    """So many power cuts; the exit status."""
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


def stress(seconds, seed, jobs):
    """The storm, then two daemons at once, interrupts and the soak; the exit status."""
    print("stress: %d s, then %d jobs; the same again with: make stress SEED=%d" % (seconds, jobs, seed),
          flush=True)
    wrong, storm, soak = {}, Storm(seed), Soak("soak")

    def rage():
        storm.rage(seconds)
        print("storm: " + storm.figures(), flush=True)
        return storm.wrong()
    for case, action in (
            (storm, rage),
            (OrphanTest("slow_two_daemons_at_once_leave_one"), lambda: case.two_at_once(50)),
            (CommandFaultTest("test_a_command_interrupted_at_any_moment_leaves_no_lock"),
             lambda: case.interrupt(3000)),
            (soak, lambda: soak.soak(jobs - jobs % 1000))):
        case.setUp()
        try:
            wrong.update(action() or {})
        except AssertionError as error:
            wrong[type(case).__name__] = error
        finally:
            case.doCleanups()
    return conclude("stress", wrong, "nothing lost, nothing twice, nothing grew")


def main_stress():
    return stress(int(os.environ.get("SECONDS") or 180), int(os.environ.get("SEED") or time.time()),
                  int(os.environ.get("JOBS") or 100000))


def main_plug():
    return plug(int(os.environ.get("ROUNDS") or 10), int(os.environ.get("SEED") or time.time()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` cleans up
    if sys.argv[1:] in (["stress"], ["plug"]):
        setUpModule()
        sys.exit(main_stress() if sys.argv[1] == "stress" else main_plug())
    unittest.main()
