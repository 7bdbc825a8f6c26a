from harness import *

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
        self.env["DB_PATH"] = self.path("other.db")
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

    def test_flags_and_an_argv_make_a_job(self):
        self.assertEqual(self.prints(
            "enqueue", "-q", "--id", "a", "--priority", "-5", "--timeout", "2h", "--max-retries", "7",
            "--cwd", "/", "--env", "A=1", "--env", "B=x=y", "--env", "C=", "--unique", "k", "--",
            "printf", "%s|", "a b", "it's", "--", "*"), "a\n")
        self.has("a", priority=-5, timeout=7200000, max_retries=7, cwd="/", unique="k",
                 env={"A": "1", "B": "x=y", "C": ""}, command="""printf '%s|' 'a b' 'it'"'"'s' -- '*'""")
        self.ok("enqueue", "--id", "b", "--", "echo $HOME; true")
        self.has("b", command="echo $HOME; true", timeout=0, cwd=os.getcwd())

    def test_flags_win_over_fields_and_env_takes_one_value(self):
        self.ok("enqueue", "--priority", "9", "--env", "A=1", '{"id":"a","command":"x","priority":3}')
        self.has("a", priority=9, env={"A": "1"})
        self.ok("enqueue", "--timeout", "1m", "--env", "A=2", "-",
                stdin='{"id":"b","command":"x"}\n{"id":"c","command":"x","timeout":5}')
        for job_id in "bc":
            self.has(job_id, timeout=60000, env={"A": "2"})

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

    def test_the_number_of_workers_is_absolute_and_heeded_at_once(self):
        self.ok("config", "set", "workers", "2")
        self.daemon()
        for number in (2, 3, 1):
            self.ok("config", "set", "workers", str(number))
            wait_until(lambda: self.request("status")["workers"] == number, "%d work" % number)
        self.ok("worker", "start")
        self.assertEqual(self.ok("config", "get", "workers"), 2)
        self.ok("worker", "stop")
        self.assertEqual(self.ok("config", "get", "workers"), 0)

    def test_dlq_retry_stamps_present_settings_on_what_brought_none(self):
        self.enqueue("false", id="bare")
        self.enqueue("false", id="own", max_retries=3, timeout=9000)
        self.ok("enqueue", "--id", "line", "--", "false")
        self.ok("config", "set", "max-delay", "1ms")
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
                ("c", "kill -9 $$", {}), ("d", "kill -9 $PPID; true", {}), ("e", "exit 3", {}),
                ("f", "trap '' TERM; sleep 300 & sleep 300", {"timeout": 200})):
            self.enqueue(command, id=name, **more)
        self.wait_for("dead", 6)
        errors = dict(self.rows("SELECT id, error FROM jobs"))
        self.assertIn("/no/such/directory", errors.pop("b"))
        self.assertEqual(errors, {
            "a": "exit 127", "c": "killed by SIGKILL", "d": "worker lost", "e": "exit 3", "f":
            "timed out after 200 ms (raise it with --timeout or: config set timeout 0)"})
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
        with umask(0o27):
            self.daemon("--workers", "1", env=dict(self.env, LISTEN_FDS="1"))
        self.enqueue("pwd; echo $A $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $LISTEN_FDS; cat; umask; trap;"
                     "ps -o pgid= -p $$ | grep -c $$; grep -E 'Sig(Blk|Ign)' /proc/$$/status",
                     id="env", cwd=self.dir, env={"A": "b c"})
        self.wait_for("completed")
        self.assertEqual(self.prints("logs", "env").replace("\t", ""), "%s\nb c env 1\n0027\n1\n"
                         "SigBlk:%s\nSigIgn:%s\n" % (self.dir, "0" * 16, "0" * 16))

    def test_a_background_child_of_a_completed_job_is_left_alone(self):
        self.daemon("--workers", "1")
        for job_id in "ab":
            self.enqueue("sleep 300 >/dev/null & echo $!", id=job_id)
        self.wait_for("completed", 2)
        pids = [int(self.prints("logs", job_id)) for job_id in "ab"]
        self.ok("retry", "a")
        self.wait_for("completed", 2)
        self.ok("daemon", "stop")
        self.assertLessEqual(set(pids), set(processes_of(self.dir)))

    def test_output_is_exact_and_bounded(self):
        self.ok("config", "set", "output-limit", "10")
        self.ok("config", "set", "max-delay", "1ms")
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
        self.daemon("--workers", "1")
        wait_until(lambda: self.states() == {"done": "completed", "dead": "dead", "failed": "failed",
                                             "waits": "pending", "gone": "cancelled"}, "all ended")
        for job_id in ("done", "gone", "failed", "waits", "none"):
            self.says(job_id, "dlq", "retry", "dead", job_id)
        self.assertEqual([job["id"] for job in self.ok("dlq", "list")], ["dead"])
        self.ok("worker", "stop")
        wait_until(lambda: self.request("status")["workers"] == 0, "they are gone")
        open(self.path("x"), "w").close()
        self.prints("retry", "done", "gone", "failed", "waits")
        self.has("waits", state="pending", run_after=LATER)
        self.has("done", state="pending", attempts=0)
        self.prints("dlq", "retry", "dead")
        self.has("dead", state="pending", attempts=0)
        self.ok("worker", "start")
        self.wait_for("completed", 3)
        self.has("failed", state="completed", attempts=2)
        self.says("no job none", "retry", "done", "none")
        self.has("done", state="completed")

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
        self.ok("config", "set", "on-dead", "default")
        self.cli("run", "--", "exit 7")
        self.assertEqual(len(self.jobs()), 6)

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
        self.ok("config", "set", "max-delay", "1ms")
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
            seen.append(read("/proc/%d/stat" % process.pid))  # it sleeps when its times stand still
            folder = "/proc/%d/fd/" % process.pid
            with contextlib.suppress(OSError):
                return len(set(seen[-4:])) == 1 < len(seen) - 3 and self.db in [
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
            err = process.communicate()[1].decode()
            self.assertEqual((args, process.returncode), (args, 130))
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
                    (["--max-retries", "1", "--", "kill -9 $$"], (125, "")), (["--", "echo hi"], (0, "hi\n"))):
                self.assertEqual(self.cli("run", *args)[:2], told)
            self.assertEqual(self.cli("run", "--quiet", "--", "echo x; test $QUEUECTL_ATTEMPT = 2"),
                             (0, "", ""))
            code, out, err = self.cli("run", "--quiet", "--max-retries", "1", "--", "echo why; exit 6")
            self.assertEqual((code, out, err.count("\n")), (6, "why\n", 1))
            self.assertIn("exit 6", err)
            if workers != "1":
                self.has("other", state="pending")  # nobody else's job is worked
                self.kill_all()

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

    def test_an_interrupted_run_cancels_its_job(self):
        for served, number, code in ((False, signal.SIGINT, 130), (True, signal.SIGTERM, 125)):
            if served:
                self.daemon("--workers", "1")
            run = self.spawn("run", "--id", "job%d" % code, "--", "echo started; sleep 60")
            self.assertEqual(run.stdout.readline(), b"started\n")
            self.assertEqual(self.stop(run, number), code)
            self.has("job%d" % code, state="cancelled", error="cancelled")

    def test_a_run_whose_reader_has_gone_leaves_no_job(self):
        run = self.spawn("run", "--id", "pipe", "--", "while echo x; do sleep 0.05; done")
        self.assertEqual(run.stdout.readline(), b"x\n")
        run.stdout.close()
        self.assertEqual(run.wait(30), 125)  # it was cancelled
        self.wait_for("cancelled")

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

    def test_a_drain_works_beside_a_daemon(self):
        self.daemon("--workers", "1")
        for name in "ab":
            self.enqueue(self.gate(name), id=name, timeout=0)
        self.wait_for("processing")
        drain = self.spawn("drain")
        self.wait_for("processing", 2)
        self.open_gate("a")
        self.open_gate("b")
        self.assertEqual(drain.wait(30), 0)
        self.are(a="completed", b="completed")

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

    def test_the_originals_messages_are_understood(self):
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

    def test_what_the_toolkit_changes_travels_the_same_way(self):
        self.daemon()
        self.enqueue("true", id="a", run_after=LATER)
        for command, state in (("cancel", "cancelled"), ("retry", "pending"), ("cancel", "cancelled")):
            self.assertNotIn("Error", self.request(command, value="a"))
            self.are(a=state)
        self.request("pause", value={"reason": "x"})
        self.assertEqual(self.request("status")["paused"], "x")
        self.request("resume")
        self.assertNotIn("Error", self.request("delete", value="a"))
        self.assertEqual((self.states(), self.ask(b'{"command":"status"}')), ({}, self.STATUS))

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

    def test_a_request_asked_again_is_only_answered_again(self):
        self.daemon()
        for request in ({"command": "enqueue", "value": '{"command":"true"}', "once": "abc"},
                        {"command": "worker", "option": "start", "value": 1, "once": "def"}):
            data = json.dumps(request).encode() + b"\n"
            self.assertEqual(self.ask(data), self.ask(data))
        self.assertEqual((len(self.jobs()), self.ok("config", "get", "workers")), (1, 1))


class OriginalTest(QueueCase):
    """A database that the original QueueCTL made, and rows that any program inserts."""

    def make(self, *statements):
        with contextlib.closing(sqlite3.connect(self.db)) as connection:
            connection.executescript(ORIGINAL + "".join(statements))
        os.chmod(self.db, 0o600)

    def test_its_settings_are_kept(self):
        self.make("INSERT INTO config VALUES ('max-retries', '2.0'), ('timeout', '60000.0'),"
                  "('delay-base', '0.0'), ('backoff', NULL), ('theirs', 'x');")
        shown = self.ok("config", "list")
        self.assertEqual({key: shown[key] for key in SETTINGS},
                         dict(SETTINGS, **{"max-retries": 2, "timeout": 60000}))
        self.enqueue("true", id="a")
        self.has("a", max_retries=2, timeout=60000)
        self.ok("config", "set", "max-retries", "1")
        self.assertEqual(self.rows("SELECT value FROM config WHERE key = 'theirs'"), [("x",)])

    def test_its_jobs_run_and_one_it_was_running_as_if_it_had_not_begun(self):
        self.make("""INSERT INTO config VALUES ('delay-base', '1.0');
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
            process = self.started(
                driver(script=folder + "/queuectl.py") + ["daemon", "status"], ready=False, cwd="/",
                env=dict(self.env, DB_PATH="", SOCKET_PATH="", HOME=self.path("home")),
                stderr=subprocess.PIPE)
            return os.path.dirname(re.search(r"/\S+?\.db", process.communicate()[1].decode()).group())
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
        os.mkdir(self.path("folder"))
        for db, words in (("no/q.db", self.path("no")), ("folder", self.path("folder")),
                          ("link", self.path("link"))):
            for args in (["enqueue", "--", "true"], ["drain"], ["daemon"]):
                self.says(words, "--db", self.path(db), *args)
        self.assertEqual(sorted(os.listdir(self.dir)), ["folder", "link"])

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
            process = self.started(call + args, ready=False, stderr=subprocess.PIPE)
            self.assertIn("DB_PATH=" + self.db, process.communicate()[1].decode())
            self.assertEqual(process.returncode, code)
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

    def test_workers_come_back_with_the_daemon_unless_they_were_stopped(self):
        self.stop(self.daemon("--workers", "2"))
        daemon = self.daemon()
        wait_until(lambda: self.request("status")["workers"] == 2, "they are back")
        self.stop(daemon)
        self.assertEqual(self.ok("worker", "stop")["message"], "Stopped workers")
        self.daemon()
        self.assertEqual(self.ok("worker", "list"), [])

    def test_a_stop_waits_until_a_second_signal_or_the_end_of_its_grace(self):
        self.enqueue("trap '' TERM; sleep 300; sleep 300", id="a", timeout=0)
        for grace in (None, "0s", "50ms"):
            daemon = self.daemon("--workers", "1")
            self.wait_for("processing")
            if grace:
                self.ok("daemon", "stop", "--grace", grace)
            else:
                daemon.terminate()
                wait_until(lambda: self.ok("daemon", "status")["stopping"], "it is stopping")
                daemon.send_signal(signal.SIGINT)
            self.assertEqual(daemon.wait(30), 0)
            self.has("a", state="pending", attempts=0, history=[])
            self.assertEqual(processes_of(self.dir), [])

    def test_its_log_tells_what_happened_but_no_payload(self):
        daemon = self.daemon("--workers", "1")
        self.ok("config", "set", "max-delay", "1ms")
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
        self.ok("config", "set", "max-delay", "1ms")
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
        samples, declared = {}, {}
        for line in self.prints("metrics", "--format", "prometheus").splitlines():
            if line.startswith("#"):
                _, word, name, rest = line.split(" ", 3)
                declared.setdefault(name, []).append(word if word == "HELP" else rest)
                continue
            match = re.fullmatch(r'(queuectl_[a-z_]+)(\{state="[a-z]+"\})? ([0-9.e+]+)', line)
            self.assertTrue(match, line)
            kind = declared[re.sub("_(sum|count)$", "", match.group(1))]
            self.assertEqual(kind, ["HELP", kind[1]])
            self.assertEqual(kind[1] == "counter", match.group(1).endswith("_total"))
            samples[line.split(" ")[0]] = float(match.group(3))
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
            self.request("status")
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
        self.assertIn("over 60,", line)
        self.assertIn("2 jobs waiting, 0 dead", line)
        self.assertRegex(line, r"\| pending=2;; dead=0;; age=\d+;;60\n")
        code, line = self.check()  # they wait, and no daemon runs
        self.assertEqual((code, "worker start" in line), (1, True))
        last = ("--completed", "nightly-", "--within", "1d")
        self.assertEqual(self.check(*last)[0], 2)
        self.daemon("--workers", "1")
        self.wait_for("completed", 2)
        self.assertEqual(
            self.check("--max-pending", "0", "--max-dead", "0", "--max-age", "1s", *last)[0], 0)
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
    def setUp(self):
        super().setUp()
        self.copy = self.path("copy of 100%?#.db")

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
        with umask(0):
            self.assertEqual(self.ok("backup", self.copy), {
                "success": True, "message": "Backed up 1000 jobs to " + self.copy})
        self.assertEqual(stat.S_IMODE(os.stat(self.copy).st_mode), 0o600)
        self.assertEqual(self.dump(self.copy), self.dump(self.db))
        listed = self.prints("list")
        self.env["DB_PATH"] = self.copy
        self.assertEqual(self.prints("list"), listed)
        self.enqueue("true")

    def test_a_backup_under_load_holds_all_that_was_acknowledged_before(self):
        self.daemon("--workers", "1")
        acknowledged, over = [], threading.Event()

        def feed():
            while not over.is_set():
                acknowledged.append(self.ask(
                    b'{"command":"enqueue","value":"{\\"command\\":\\"true\\"}"}\n')["id"])
        feeder = threading.Thread(target=feed)
        self.addCleanup(lambda: (over.set(), feeder.join()))
        feeder.start()
        for number in range(3):
            wait_until(lambda: len(acknowledged) > 30 * (number + 1), "jobs are fed")
            before = set(acknowledged)
            self.ok("backup", self.copy + str(number))
            with contextlib.closing(sqlite3.connect(self.copy + str(number))) as connection:
                self.assertEqual(connection.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
                ids = {row[0] for row in connection.execute("SELECT id FROM jobs")}
            self.assertEqual(before - ids, set())

    def test_a_backup_replaces_nothing_and_leaves_nothing_when_it_fails(self):
        self.says(self.db, "backup", self.copy)
        self.ok("enqueue", "-", stdin='{"command":"true"}\n' * 500)
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        for make in (lambda: open(self.copy, "w").close(), lambda: os.symlink("none", self.copy)):
            make()
            self.says(self.copy, "backup", self.copy)
            os.unlink(self.copy)
        before = read(self.db)
        self.refused("backup", self.db)
        self.refused("backup", self.path("none/x"))
        small = self.started(["/bin/sh", "-c", 'ulimit -f 40; exec "$@"', "sh"] + driver()
                             + ["backup", self.copy], ready=False)
        self.assertEqual((small.communicate()[0], small.returncode), (b"", 1))
        with open(self.db, "r+b") as file:
            file.seek(len(before) // 2)
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

    def test_what_others_may_touch_is_found(self):
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

    def test_a_socket_that_others_may_use_is_found(self):
        self.daemon()
        os.chmod(self.sock, 0o666)
        self.finds("chmod go= " + self.sock)

    def test_who_else_has_it_open_is_found(self):
        self.daemon()
        with contextlib.closing(sqlite3.connect(self.db)) as other:
            other.execute("SELECT * FROM jobs").fetchall()
            self.assertIn(str(os.getpid()), self.wrong())

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


class InstallTest(QueueCase):
    """Under systemd, and in the shell."""

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


class HouseTest(unittest.TestCase):
    """The order of the files, as the docstring promises it."""

    @classmethod
    def setUpClass(cls):
        cls.text = read(SCRIPT).decode()
        cls.tree = ast.parse(cls.text)
        with open(SCRIPT, "rb") as file:
            cls.tokens = list(tokenize.tokenize(file.readline))
        cls.banners = [(number, match.group(1)) for number, match in (
            (number, re.match("# ---- (.+?) -+$", line))
            for number, line in enumerate(cls.text.split("\n"), 1)) if match]

    def rooms(self, first, second=None):
        """The sections in whose code that name stands, followed by that token if one is given."""
        return {[name for number, name in self.banners if number < one.start[0]][-1]
                for one, two in zip(self.tokens, self.tokens[1:])
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
        counted = sum(token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
                      for token in self.tokens)
        self.assertLessEqual(counted, 26500)
        self.assertLessEqual(self.text.count("\n"), 4100)
        long = ["%s: %d" % (node.name, lines) for node, lines in (
            (node, max(n.lineno for n in ast.walk(node) if hasattr(n, "lineno")) - node.lineno + 1)
            for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)) if lines > 45]
        self.assertEqual(long, [])

    def test_the_tests_use_no_private_name_of_the_program(self):
        text = read(os.path.splitext(os.path.abspath(__file__))[0] + ".py").decode()
        self.assertEqual(set(re.findall(r"\bqueuectl\.([a-z_]\w*)", text)) - {
            "main", "db", "py", "sock", "service"}, set())
