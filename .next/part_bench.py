from harness import *
import collections
import statistics


def make(target, script=SCRIPT, **variables):
    """(exit status, output) of the Makefile beside `script`; None where there is none."""
    folder = os.path.dirname(script)
    if not shutil.which("make") or not os.path.exists(folder + "/Makefile"):
        return None
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-s", "-C", folder, target, "PYTHON=" + sys.executable]
                          + ["%s=%s" % pair for pair in variables.items()],
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode()


class InstallTest(QueueCase):
    """`make install` and `make uninstall`: a launcher, and the program with its compiled form."""

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
        process = self.started([self.prefix + "/bin/queuectl"] + list(args), ready=False,
                               stderr=subprocess.STDOUT, **options)
        out = process.communicate(timeout=60)[0].decode()
        self.assertIn(status, (process.returncode, None), out)
        return out

    def files(self):
        """{path below the prefix: mode}"""
        return {os.path.relpath(base + "/" + name, self.prefix): stat.S_IMODE(
                    os.stat(base + "/" + name).st_mode)
                for base, folders, names in os.walk(self.prefix) for name in folders + names}

    def test_it_can_be_read_by_all_whatever_the_umask_and_goes_without_a_trace(self):
        with umask(0o077):
            self.make("install")
        self.assertEqual(self.files(), {
            "bin": 0o755, "bin/queuectl": 0o755, "lib": 0o755, "lib/queuectl": 0o755,
            "lib/queuectl/queuectl.py": 0o644, "lib/queuectl/__pycache__": 0o755,
            "lib/queuectl/__pycache__/queuectl.%s.pyc" % sys.implementation.cache_tag: 0o644})
        self.make("uninstall")
        self.assertEqual(set(self.files()), {"bin", "lib"})

    def test_what_others_put_there_stays_and_no_link_is_followed(self):
        target = self.path("target")
        os.makedirs(self.prefix + "/bin")
        os.symlink(target, self.prefix + "/bin/queuectl")
        open(target, "w").close()
        self.make("install")
        mine = {"bin/mine", "lib/queuectl/mine", "lib/queuectl/__pycache__/mine"}
        for name in mine:
            os.link(target, os.path.join(self.prefix, name))
        self.make("uninstall")
        self.assertEqual(set(self.files()), mine.union(map(os.path.dirname, mine), ("lib",)))
        self.assertEqual(self.read("target"), "")

    def test_the_compiled_form_is_what_runs(self):
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
        self.assertEqual(self.files(), before)

    def test_it_works_jobs_and_keeps_nothing_below_lib(self):
        self.make("install")
        before = self.files()
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
        planted = self.path("planted")
        for folder in (self.prefix + "/bin", planted):
            os.makedirs(folder, exist_ok=True)
            for name in ("json", "argparse", "queuectl"):
                with open("%s/%s.py" % (folder, name), "w") as file:
                    file.write("raise SystemExit('planted')")
        version = self.call("--version", cwd=planted)
        self.assertEqual(self.call("--version", env=dict(self.env, PYTHONSAFEPATH="1")), version)
        env = dict(self.env, PYTHONPATH=planted)
        self.assertEqual(self.script("--version", env=env), (1, "", "planted\n"))
        self.assertEqual(self.call("--version", env=env, status=1), "planted\n")
        for name in ("json", "argparse"):  # but its own module it has from its own directory
            os.unlink("%s/%s.py" % (planted, name))
        self.assertEqual(self.call("--version", env=env), version)

    def test_a_prefix_that_is_no_absolute_path_is_refused(self):
        self.make("uninstall")  # nothing is there
        self.assertIn("must be an absolute path", make("install", PREFIX="here")[1])


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
    done = subprocess.run(argv, env=env, input=stdin, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
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
            + [timed([sys.executable, path, "enqueue", job], trial.env)
               for _, trial, path, _, _ in calls]
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
        p99 = waits[len(waits) * 99 // 100]
        yield Figure("dispatch, p99" + suffix, p99, "ms", 50, 10, "of %d jobs" % len(waits))


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
                medians([(ours[column], bare[column]) for (ours, bare), _ in pairs])
                for column in (0, 1))
            yield Figure("drain, slow disk" + suffix, ratio, "of the real disk's", 0.7, 0.9,
                         "%d of %d jobs/s; an enqueue %.1f, %.1f ms" % (slow, real, wait, waits))


def cpu_s(pid):
    """Seconds of CPU that a process has used; in steps of 10 ms where the kernel keeps no more."""
    with contextlib.suppress(OSError):
        return sum(int(read("/proc/%d/task/%s/schedstat" % (pid, task)).split()[0])
                   for task in os.listdir("/proc/%d/task" % pid)) / 1e9
    fields = read("/proc/%d/stat" % pid).rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row_idle(seconds=20, workers=8):
    """CPU of a daemon and 8 workers that have nothing to do."""
    for suffix, script in PROGRAMS:
        with Trial(script) as trial:
            trial.call("worker", "start", "--count", str(workers))
            wait_until(lambda: len(trial.pids()[0]) == workers, "all workers are there")
            pids = processes_of(trial.dir)
            wait_until(lambda: all(b") S " in read("/proc/%d/stat" % pid) for pid in pids), "all wait")
            before = sum(map(cpu_s, pids))
            time.sleep(seconds)  # this is what is measured
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
    """Its share of the memory it holds, in MiB."""
    path = "/proc/%d/smaps_rollup" % pid
    text = read(path if os.path.exists(path) else "/proc/%d/smaps" % pid)
    return sum(int(kib) for kib in re.findall(rb"^Pss:\s*(\d+)", text, re.M)) / 1024.0


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
    counted = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    for suffix, script in PROGRAMS:
        with open(script, "rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        whole = {'"web"', '"group"', '"after"'} <= {token.string for token in tokens}
        for unit, value, must in (
                ("tokens", sum(token.type in counted for token in tokens), (26500, 29500)[whole]),
                ("lines", tokens[-1].start[0] - 1, (4100, 4500)[whole])):
            yield Figure("size" + suffix, value, unit, must, None,
                         "everything in" if whole else "without all of web, groups, after")


def bench(names):
    """Print the table, or the rows named; the exit status: whether this program missed a must."""
    known = {name[4:]: row for name, row in globals().items() if name.startswith("row_")}
    if set(names) - set(known):
        raise SystemExit("bench: rows are " + ", ".join(known))
    setUpModule()  # what the shell brings is left out
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


if __name__ == "__main__":
    sys.exit(bench(sys.argv[2:]))
