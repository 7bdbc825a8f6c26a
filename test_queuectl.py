"""Tests of queuectl, cheapest first. `make test T=StoreTest` runs one class."""
import argparse
import ast
import atexit
import collections
import contextlib
import errno
import fcntl
import functools
import inspect
import io
import itertools
import json
import marshal
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from unittest import mock

import queuectl

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "queuectl.py")

NOW = 1768473000000  # ms
STAMP = "2026-01-15T10:30:00.000Z"
DEFAULTS = {key: setting.default for key, setting in queuectl.SETTINGS.items()}

# As the original QueueCTL makes them.
ORIGINAL = """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, command TEXT NOT NULL, state TEXT DEFAULT 'pending',
        attempts INT DEFAULT 0, max_retries INT DEFAULT 3,
        created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
        updated_at DATETIME DEFAULT CURRENT_TIMESTAMP, locked_at DATETIME, timeout INT DEFAULT 5000,
        run_after DATETIME DEFAULT CURRENT_TIMESTAMP, priority INT DEFAULT 0, started_at DATETIME);
    CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT);
    CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT,
        daemon_startup DATETIME DEFAULT CURRENT_TIMESTAMP, total_commands INT DEFAULT 0);
    INSERT INTO config VALUES ('max-retries', NULL), ('timeout', '7000');
    INSERT INTO jobs (id, command) VALUES ('old', 'true');"""


def setUpModule():
    """What the shell brings is not for the tests: a queue of its own, and SIGINT ignored where it
    runs them in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("DB_PATH", "SOCKET_PATH", "NOTIFY_SOCKET", "NO_COLOR"):
        os.environ.pop(name, None)


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


def read(path):
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


class Case(unittest.TestCase):
    def folder(self):
        """A directory of ours, 0700, that goes with the test."""
        path = os.path.realpath(tempfile.mkdtemp(prefix="queuectl-test-"))
        self.addCleanup(shutil.rmtree, path, True)
        return path

    def refused(self, words, call, *args, kind=queuectl.Failure):
        with self.assertRaisesRegex(kind, re.escape(words)):
            call(*args)

    def table(self, call, *rows):
        """Each row: arguments, then what `call` returns for them."""
        for *args, expected in rows:
            with self.subTest(args=repr(args)[:60]):
                self.assertEqual(call(*args), expected)

    def refusals(self, call, *rows, kind=queuectl.Failure):
        """Each row: words of the refusal, then single arguments that `call` refuses with them."""
        for words, *values in rows:
            for value in values:
                with self.subTest(words=words, value=repr(value)[:60]):
                    self.refused(words, call, value, kind=kind)

    def open_store(self, path=":memory:", known=None):
        store = queuectl.Store(path, known)
        self.addCleanup(store.close)
        return store


class TimeAndTextTest(Case):
    def test_times_are_utc_text_with_milliseconds(self):
        self.table(queuectl.iso, (None, None), (0, "1970-01-01T00:00:00.000Z"), (NOW, STAMP),
                   (NOW + 7, "2026-01-15T10:30:00.007Z"))

    def test_dates_are_read_with_any_offset(self):
        self.table(queuectl.parse_date, (STAMP, NOW), ("2026-01-15 10:30:00", NOW),
                   (" 2026-01-15t10:30z ", NOW), ("2026-01-15T10:30:00,5", NOW + 500),
                   ("2026-01-15T10:30:00.123999999Z", NOW + 123), ("2026-01-15T12:30+02", NOW),
                   ("2026-01-15T12:30:00+02:00", NOW), ("2026-01-15T05:00:00 -0530", NOW),
                   ("2026-01-15", NOW - 37800000), ("2024-02-29T00:00:00Z", 1709164800000),
                   ("1969-12-31T23:59:59Z", -1000))

    def test_what_is_no_date_is_refused(self):
        for text in (None, 5, "", "soon", "2026-02-30", "2026-01-15T24:00", "2026-01-15T10:30:60",
                     "2026-01-15T10:30:00+24:00", "2026-01-15T10:30:00+01:60", "2026-01-15T10",
                     "2026-1-15", "2026-01-15+02:00", "٢٠٢٦-01-15", "2026-01-15T10:30:00Z x"):
            with self.subTest(text=text), self.assertRaises(ValueError):
                queuectl.parse_date(text)

    def test_durations_need_a_unit(self):
        self.table(queuectl.parse_duration, ("500ms", 500), ("90s", 90000), (" 5m ", 300000),
                   ("2h", 7200000), ("1d", 86400000), ("0s", 0), ("30", "ms", 30))
        self.refusals(queuectl.parse_duration, ("needs a unit", "30"), (
            "must be like 90s", "", "s", "-1s", "1.5s", "1 s", "1w", "1S", "٣s", "1" * 14 + "s"),
            kind=ValueError)
        self.refused("or in ms", queuectl.parse_duration, "-1", "ms", kind=ValueError)

    def test_what_a_terminal_would_act_on_is_escaped(self):
        self.table(queuectl.safe, ("plain é 日", "plain é 日"), ("\x1b[2J", "\\x1b[2J"),
                   ("a\nb", "a\\nb"), ("\u202e", "\\u202e"), ("\ud800", "\\ud800"),
                   ("a\0", "a\\x00"))

    def test_new_ids_differ_sort_by_time_and_are_good_ids(self):
        ids = queuectl.new_ids(NOW, 1000) + queuectl.new_ids(NOW + 1)
        self.assertEqual(sorted(set(ids)), ids)
        self.assertRegex(ids[0], "^20260115T103000000-[0-9a-f]{8}$")
        self.assertEqual([queuectl.as_id(one) for one in ids], ids)


class FilesTest(Case):
    def setUp(self):
        self.base = self.folder()
        self.path = self.base + "/file"

    def test_open_private_makes_0600_whatever_the_umask(self):
        for mask in (0o000, 0o077, 0o777):
            with self.subTest(umask=oct(mask)), umask(mask):
                os.close(queuectl.open_private(self.path))
                self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
                os.unlink(self.path)

    def test_open_private_takes_what_others_may_read_away_from_them(self):
        open(self.path, "w").close()
        os.chmod(self.path, 0o666)
        os.close(queuectl.open_private(self.path))
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_open_private_refuses_what_was_planted(self):
        target, sock = self.base + "/target", socket.socket(socket.AF_UNIX)
        open(target, "w").close()
        self.addCleanup(sock.close)
        for words, plant in (
                ("is a symbolic link", lambda: os.symlink(target, self.path)),
                ("is a symbolic link", lambda: os.symlink(self.base + "/none", self.path)),
                ("has a second name (hard link)", lambda: os.link(target, self.path)),
                ("is not a regular file", lambda: os.mkfifo(self.path)),
                ("can't open", lambda: sock.bind(self.path))):
            with self.subTest(words=words):
                plant()
                self.refused(words, queuectl.open_private, self.path)
                os.unlink(self.path)
        self.refused("can't open", queuectl.open_private, self.base)
        self.assertEqual(os.listdir(self.base), ["target"])

    def test_open_private_refuses_a_file_of_another_user(self):
        with mock.patch("os.geteuid", return_value=os.geteuid() + 1):
            self.refused("belongs to another user", queuectl.open_private, self.path)

    def test_private_directory_makes_0700_whatever_the_umask(self):
        for mask in (0o000, 0o077, 0o777):
            with self.subTest(umask=oct(mask)), umask(mask):
                queuectl.private_directory(self.path)
                queuectl.private_directory(self.path)
                self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o700)
                os.rmdir(self.path)

    def test_the_default_directory_and_what_it_lacks_above_are_0700_whatever_the_umask(self):
        place = queuectl.Place(self.base + "/a/b/queuectl.db", False, "", False)
        for mask in (0o000, 0o777):
            with self.subTest(umask=oct(mask)), umask(mask):
                queuectl.make_default_folder(place)
                for folder in ("/a/b", "/a"):
                    self.assertEqual(stat.S_IMODE(os.stat(self.base + folder).st_mode), 0o700)
                    os.rmdir(self.base + folder)

    def test_private_directory_refuses_what_was_planted(self):
        os.symlink(self.base, self.path)
        self.refused("not a directory of yours", queuectl.private_directory, self.path)
        os.unlink(self.path)
        open(self.path, "w").close()
        self.refused("not a directory of yours", queuectl.private_directory, self.path)
        os.unlink(self.path)
        os.mkdir(self.path)
        os.chmod(self.path, 0o777)
        self.refused("can be written by others", queuectl.private_directory, self.path)

    def test_the_file_system_is_that_of_the_nearest_mount(self):
        with open(self.path, "w") as table:
            table.write("21 1 8:1 / / rw,relatime - ext4 /dev/sda rw\n"
                        "22 21 0:5 / /srv/my\\040data rw shared:1 master:2 - nfs4 host:/x rw\n"
                        "23 22 0:6 / /srv/my\\040data/inner rw - xfs /dev/sdb rw\n"
                        "24 21 0:7 / /over rw - xfs /dev/sdc rw\n"
                        "25 21 0:8 / /over rw - fuse.sshfs host: rw\n")
        self.table(lambda folder: queuectl.mount_of(folder, self.path)[1], ("/", "ext4"),
                   ("/srv", "ext4"), ("/srv/my data", "nfs4"), ("/srv/my data/a/b", "nfs4"),
                   ("/srv/my database", "ext4"), ("/srv/my data/inner/x", "xfs"),
                   ("/over/x", "fuse.sshfs"))
        self.assertEqual(queuectl.mount_of("/", self.base + "/none"), ("", ""))

    def test_a_database_on_a_network_file_system_is_refused(self):
        for kind, bad in (("ext4", False), ("fuse.ext4", False), ("", False), ("nfs4", True),
                          ("cifs", True), ("9p", True), ("fuse.sshfs", True)):
            with self.subTest(kind=kind), mock.patch(
                    "queuectl.mount_of", return_value=("/", kind)):
                if bad:
                    self.refused("(%s)" % kind, queuectl.check_database, self.path)
                else:
                    queuectl.check_database(self.path)

    def test_a_database_that_is_mounted_without_its_directory_is_refused(self):
        with mock.patch("queuectl.mount_of", return_value=(self.path, "ext4")):
            self.refused("is mounted alone", queuectl.check_database, self.path)

    def test_without_a_home_the_default_database_depends_on_no_current_directory(self):
        for environ in ({}, {"HOME": ""}, {"HOME": "here"}):
            with self.subTest(environ=environ), mock.patch.dict(os.environ, environ, clear=True), \
                    mock.patch("os.getuid", return_value=1 << 30), \
                    mock.patch("os.geteuid", return_value=1 << 30):
                self.assertTrue(os.path.isabs(queuectl.default_db()))

    def test_a_lock_file_that_cannot_be_signed_for_want_of_space_says_so(self):
        lock = queuectl.Lock(self.path)
        self.assertTrue(lock.take())
        self.addCleanup(lock.release)
        with mock.patch("os.pwrite", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            self.refused("no space left for " + self.path, lock.write, "command", None, None)

    def test_a_file_planted_beside_the_database_is_refused(self):
        for suffix in ("", "-wal", "-shm", "-journal"):
            with self.subTest(suffix=suffix):
                os.symlink("/etc/passwd", self.path + suffix)
                self.refused("move it away", queuectl.check_database, self.path)
                os.unlink(self.path + suffix)

    def test_is_locked_tells_a_held_lock_from_a_free_one(self):
        self.assertIsNone(queuectl.is_locked(self.path))
        fd = queuectl.open_private(self.path)
        self.assertIs(queuectl.is_locked(self.path), False)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self.assertIs(queuectl.is_locked(self.path), True)
        os.close(fd)
        self.assertIs(queuectl.is_locked(self.path), False)

    @unittest.skipUnless(os.path.isdir("/proc/self/fdinfo"), "needs /proc")
    def test_holders_are_the_others_that_may_write(self):
        fd = queuectl.open_private(self.path)
        self.addCleanup(os.close, fd)
        found = {}
        for mode in (">>", "<", "<>"):
            child = subprocess.Popen(
                ["/bin/sh", "-c", 'exec 3%s"$0"; echo; read x' % mode, self.path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            child.stdout.readline()
            found[mode] = queuectl.holders(self.path) == [child.pid]
            child.communicate()
        self.assertEqual(found, {">>": True, "<": False, "<>": True})
        self.assertEqual(queuectl.holders(self.path), [])



class JobsTest(Case):
    def make(self, **given):
        return queuectl.make_job(dict({"command": "true"}, **given), DEFAULTS, NOW)

    def test_a_bare_job_gets_the_defaults(self):
        job = queuectl.make_job({"command": "true"}, DEFAULTS, NOW, "/here", "spare")
        self.assertEqual(job.public(), {
            "id": "spare", "command": "true", "state": "pending", "attempts": 0, "max_retries": 3,
            "priority": 0, "timeout": 5000, "created_at": STAMP, "updated_at": STAMP,
            "run_after": STAMP, "locked_at": None, "started_at": None, "finished_at": None,
            "exit_code": None, "error": None, "cwd": "/here", "env": {}, "unique": None})
        self.assertEqual((job.due, job.ready, job.own, job.runs, job.serial), (None, 1, 0, 0, None))

    def test_good_fields_are_stored(self):
        self.table(
                lambda name, value: getattr(self.make(**{name: value}), name),
                ("id", "a", "a"), ("id", "é" * 128, "é" * 128), ("command", " x\n", " x\n"),
                ("command", "x" * 131071, "x" * 131071), ("priority", -1000, -1000),
                ("priority", 1000, 1000), ("run_after", "2026-01-15T12:30:00+02:00", STAMP),
                ("timeout", 0, 0), ("timeout", 10 ** 12, 10 ** 12), ("timeout", "90s", 90000),
                ("max_retries", 1, 1), ("max_retries", 1000, 1000), ("cwd", "/", "/"),
                ("env", {"A": "b=c"}, '{"A":"b=c"}'), ("env", {}, "{}"),
                ("unique", "k" * 1024, "k" * 1024))

    def test_a_bad_field_is_named(self):
        many = {"A%d" % i: "x" * 100000 for i in range(11)}
        for name, *values in (
                ("id", None, 5, True, "", "a b", "a/b", "a\n", "a\u202e", "\0", "\ud800",
                 "x" * 129),
                ("command", None, 5, True, ["a"], "", " \n", "a\0b", "\udcff", "x" * 131072,
                 "é" * 65536),
                ("priority", None, True, "1", 1.0, 1001, -1001, 2 ** 64, float("inf")),
                ("run_after", None, True, NOW, "", "tomorrow", "2026-02-30", "1969-12-31",
                 "2026-01-15T10:30:00+24:00", "9999-12-31T23:59:59-23:59"),
                ("timeout", None, True, -1, 1.5, "90", "1w", [], 10 ** 12 + 1, 2 ** 64, "9" * 30),
                ("max_retries", None, False, True, 0, 1001, "3", 10 ** 30),
                ("cwd", None, "", "here", "./x", "/a\0", "/\ud800", "/" + "x" * 4095),
                ("env", None, [], "A=b", {"A": 1}, {"A": None}, {"": "x"}, {"A=B": "x"},
                 {"A\0": "x"}, {"A": "\0"}, {"A": "\ud800"}, {"A": "x" * 131071}, many),
                ("unique", None, 5, True, "", "\0", "\ud800", "k" * 1025),
                ("state", "dead"), ("attempts", 0), ("Command", "true"), ("", "x")):
            self.refusals(lambda value: self.make(**{name: value}),
                          ("field %s " % name,) + tuple(values), kind=queuectl.BadField)

    def test_what_is_no_object_or_has_no_command_is_refused(self):
        self.refusals(lambda given: queuectl.make_job(given, DEFAULTS, NOW),
                      ("a job is a JSON object", None, [], "true", 5),
                      ("field command is required", {}, {"id": "a"}))

    def test_a_job_waits_for_its_time_and_remembers_what_it_brought(self):
        later = self.make(run_after="2026-01-15T10:30:00.001Z")
        self.assertEqual((later.due, later.ready), (NOW + 1, None))
        past = self.make(run_after="2020-01-01")
        self.assertEqual((past.due, past.ready), (None, 1))
        for fields, own in (({}, 0), ({"timeout": 1}, queuectl.OWN_TIMEOUT), (
                {"timeout": 0, "max_retries": 3}, queuectl.OWN_TIMEOUT | queuectl.OWN_RETRIES)):
            with self.subTest(fields=fields):
                self.assertEqual(self.make(**fields).own, own)

    def test_rows_of_other_programs_are_adopted_with_defaults(self):
        bare = queuectl.Job(*[None] * len(queuectl.Job._fields))
        bare = bare._replace(id="a", command="true", due=0, own=0, runs=0)
        date = "must be a date-time since 1970, like 2026-01-15T10:30:00Z"
        for given, expected in (
                ({}, {"id": "a", "state": "pending", "attempts": 0, "max_retries": 3,
                      "timeout": 5000, "priority": 0, "created_at": STAMP, "updated_at": STAMP,
                      "run_after": STAMP, "due": None, "ready": 1}),
                ({"priority": 5000, "max_retries": 0, "timeout": -1, "attempts": -3},
                 {"priority": 1000, "max_retries": 1, "timeout": 0, "attempts": 0}),
                ({"priority": "high", "timeout": 1.5}, {"priority": 0, "timeout": 5000}),
                ({"run_after": "2026-01-15 10:40:00"},
                 {"run_after": "2026-01-15T10:40:00.000Z", "due": NOW + 600000, "ready": None}),
                ({"state": "failed", "finished_at": "2026-01-15"},
                 {"state": "failed", "finished_at": None, "ready": 1}),
                ({"state": "completed", "updated_at": "2026-01-15 10:00:00"},
                 {"state": "completed", "finished_at": "2026-01-15T10:00:00.000Z", "ready": None,
                  "due": None}),
                ({"run_after": "soon"}, {"state": "dead", "error": "field run_after " + date,
                                         "finished_at": STAMP, "due": None, "ready": None}),
                ({"created_at": 2026, "command": "a\nb"},
                 {"state": "dead", "command": "a\nb", "error": "field created_at " + date}),
                ({"locked_at": "x"}, {"state": "dead", "error": "field locked_at " + date}),
                ({"created_at": "x", "updated_at": "2026-01-15 10:00:00", "run_after": b"\0",
                  "cwd": b"/", "env": "x", "unique": 5, "command": b"x", "exit_code": b"0"},
                 {"state": "dead", "error": "field created_at " + date, "created_at": STAMP,
                  "updated_at": "2026-01-15T10:00:00.000Z", "run_after": STAMP, "cwd": None,
                  "env": None, "unique": None, "command": "b'x'", "exit_code": None}),
                ({"state": "waiting"}, {"state": "dead", "error": "field state must be one of "
                                        "pending, processing, completed, failed, dead"}),
                ({"command": b"\xff"}, {"state": "dead", "error": "field command must be text"}),
                ({"command": "a\0b"}, {"state": "dead", "command": "a\\x00b",
                                       "error": "field command must not hold a NUL"})):
            with self.subTest(given=given):
                job = queuectl.adopted(bare._replace(**given), DEFAULTS, NOW)
                self.assertEqual({name: getattr(job, name) for name in expected}, expected)
        for bad_id in (None, "", b"x", 5):
            with self.subTest(id=bad_id):
                self.assertRegex(queuectl.adopted(bare._replace(id=bad_id), DEFAULTS, NOW).id,
                                 "^20260115T103000000-")


class SettingsTest(Case):
    def test_good_settings_are_read(self):
        self.table(
                queuectl.read_setting, ("max-retries", "2", 2), ("max-retries", 1000, 1000),
                ("delay-base", "5000", 5000), ("jitter", " 100 ", 100), ("timeout", "0", 0),
                ("delay-base", "1", 1), ("delay-base", "90s", 90000), ("backoff", "fixed", "fixed"),
                ("max-delay", "1d", 86400000),
                ("timeout", 10 ** 12, 10 ** 12), ("output-limit", "0", 0),
                ("retention", "2h", 7200000), ("shell", "/bin/bash -c", "/bin/bash -c"),
                ("shell", "'/a b/sh' -c", "'/a b/sh' -c"))

    def test_a_bad_setting_is_named(self):
        for key, *values in (
                ("max-retries", "0", "1001", "x", "", "1.0", "-1", "٣", "9" * 30, True, None),
                ("delay-base", "0", "-1", "1w", "", "1.5s"), ("backoff", "Linear", "", "none"),
                ("jitter", "101", "-1", "5%"), ("timeout", "-1", str(10 ** 12 + 1), "20d 1h"),
                ("output-limit", "1k", str((16 << 20) + 1)), ("retention", "ever"),
                ("shell", "", " ", "''", "'sh", "a\0", "\ud800")):
            self.refusals(lambda value: queuectl.read_setting(key, value),
                          ("field %s " % key,) + tuple(values), kind=queuectl.BadField)

    def test_an_unknown_setting_is_refused_with_the_known_ones(self):
        self.refusals(lambda key: queuectl.read_setting(key, "1"),
                      ("known are max-retries", "workers", "Timeout", "", None, 5, [], {}))


class RetryPolicyTest(Case):
    def test_backoff_grows_as_the_table_says(self):
        for kind, base, seconds in (
                ("exponential", 5000, (5, 25, 125, 625)), ("linear", 5000, (5, 10, 15, 20)),
                ("fixed", 5000, (5, 5, 5, 5)), ("exponential", 1500, (1.5, 2.25, 3.375, 5.0625)),
                ("exponential", 1, (1, 1, 1, 1)), ("linear", 999, (1, 2, 3, 4)),
                ("fixed", 1, (1, 1, 1, 1))):
            settings = dict(DEFAULTS, **{"backoff": kind, "delay-base": base})
            for attempts, wait in enumerate(seconds, 1):
                with self.subTest(kind=kind, base=base, attempts=attempts):
                    self.assertEqual(queuectl.backoff_ms(attempts, settings), int(wait * 1000))

    def test_backoff_is_never_longer_than_max_delay(self):
        for kind, base, attempts, longest in (
                ("exponential", 5000, 3, 124999), ("exponential", 5000, 441, 86400000),
                ("exponential", 5000, 1000, 86400000), ("exponential", 10 ** 12, 1000, 10 ** 12),
                ("linear", 10 ** 12, 1000, 10 ** 12), ("fixed", 5000, 1, 300)):
            for spread in (0.0, 1.0):
                with self.subTest(kind=kind, base=base, attempts=attempts, spread=spread):
                    settings = dict(DEFAULTS, **{"backoff": kind, "delay-base": base,
                                                 "max-delay": longest, "jitter": 100})
                    self.assertEqual(queuectl.backoff_ms(attempts, settings, spread), longest)

    def test_jitter_spreads_up_and_down(self):
        for jitter, spread, wait in ((0, 1.0, 5000), (10, 0.0, 5000), (10, 1.0, 5500),
                                     (10, -1.0, 4500), (50, 0.5, 6250), (100, -1.0, 0)):
            with self.subTest(jitter=jitter, spread=spread):
                settings = dict(DEFAULTS, jitter=jitter)
                self.assertEqual(queuectl.backoff_ms(1, settings, spread), wait)

    def test_the_verdict_on_an_attempt(self):
        timed_out = "timed out after 5000 ms (raise it with --timeout or: config set timeout 0)"
        for before, status, reason, detail, state, attempts, wait, error in (
                (0, 0, "", "", "completed", 1, None, None),
                (2, 0, "", "", "completed", 3, None, None),
                (0, 3, "", "", "failed", 1, 5000, "exit 3"),
                (1, 127, "", "", "failed", 2, 25000, "exit 127"),
                (2, 3, "", "", "dead", 3, None, "exit 3"),
                (7, 3, "", "", "dead", 8, None, "exit 3"),
                (0, -9, "", "", "failed", 1, 5000, "killed by SIGKILL"),
                (0, -63, "", "", "failed", 1, 5000, "killed by signal 63"),
                (0, -15, "timeout", "", "failed", 1, 5000, timed_out),
                (0, 0, "timeout", "", "failed", 1, 5000, timed_out),
                (2, -9, "timeout", "", "dead", 3, None, timed_out),
                (0, None, "worker lost", "", "failed", 1, 5000, "worker lost"),
                (2, None, "worker lost", "", "dead", 3, None, "worker lost"),
                (0, -15, "cancelled", "", "dead", 1, None, "cancelled"),
                (0, 0, "cancelled", "", "dead", 1, None, "cancelled"),
                (0, None, "refused", "can't start /x: no", "failed", 1, 5000, "can't start /x: no"),
                (2, None, "refused", "can't start /x: no", "dead", 3, None, "can't start /x: no"),
                (0, -15, "stopped", "", "pending", 0, 0, None),
                (2, -9, "stopped", "", "failed", 2, 0, None),
                (2, None, "unstarted", "no space", "failed", 2, 0, None),
                (0, None, "unstarted", "no space", "pending", 0, 0, None)):
            with self.subTest(before=before, status=status, reason=reason):
                job = queuectl.make_job({"command": "x"}, DEFAULTS, NOW)._replace(attempts=before)
                outcome = queuectl.Outcome(status, reason, detail, 0, NOW)
                self.assertEqual(
                    queuectl.decide(job, outcome, DEFAULTS, NOW),
                    (state, attempts, None if wait is None else NOW + wait, error))


class SettleTest(Case):
    RULES = (  # the first whose conditions all hold
        ("lost", {"same_boot": False}),
        ("take", {"phase": "ended"}),
        ("leave", {"worker": True}),
        ("stop", {"run": True}),
        ("stop", {"leader": True}),
        ("give back", {"run": None, "pid": None}),
        ("lost", {}),
    )

    def test_every_combination_is_settled_by_the_first_rule_that_fits(self):
        seen = set()
        for values in itertools.product((None, "starting", "running", "ended"), (None, 77),
                                        (None, False, True), (None, False, True), (False, True),
                                        (False, True)):
            case = dict(zip(("phase", "pid", "worker", "run", "leader", "same_boot"), values))
            expected = next(verdict for verdict, conditions in self.RULES
                            if all(case[name] is value or case[name] == value is not None
                                   for name, value in conditions.items()))
            record = {name: case[name] for name in ("phase", "pid") if case[name] is not None}
            with self.subTest(**case):
                self.assertEqual(queuectl.settle(record, case["worker"], case["run"],
                                                 case["leader"], case["same_boot"]), expected)
            seen.add(expected)
        self.assertEqual(seen, {"lost", "take", "leave", "stop", "give back"})


class SchemaTest(Case):
    def setUp(self):
        self.path = self.folder() + "/queuectl.db"

    def make(self, script):
        connection = sqlite3.connect(self.path)
        connection.executescript(script)
        connection.close()
        os.chmod(self.path, 0o600)

    def schema(self, store):
        """Columns and keys of all tables; the text of what is made by our migrations only."""
        names = store.query("SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2")
        columns = {name: store.query("PRAGMA table_info('%s')" % name)
                   for kind, name, _ in names if kind == "table"}
        ours = store.query("SELECT name, sql FROM sqlite_master"
                           " WHERE name NOT IN ('jobs', 'config', 'metrics') ORDER BY 1")
        return names, columns, ours

    def test_a_fresh_database_equals_a_migrated_one(self):
        self.make(ORIGINAL)
        self.assertEqual(self.schema(self.open_store(self.path)), self.schema(self.open_store()))

    def test_the_states_agree_with_those_in_sql(self):
        statements = list(itertools.chain(*queuectl.MIGRATIONS))
        seeded = [re.findall(r"SELECT '(\w+)', 0|UNION SELECT '(\w+)', 0", text)
                  for text in statements if "INTO counts" in text]
        self.assertEqual(sorted(max(pair) for pair in seeded[0]), sorted(queuectl.STATES))
        self.assertEqual(set(self.open_store().counts()), set(queuectl.STATES))
        text = inspect.getsource(queuectl.Store) + "\n".join(statements)
        used = re.findall(r"state (?:= |DEFAULT |IN \()('\w+'(?:, '\w+')*)", text)
        words = set(re.findall(r"\w+", " ".join(used)))
        self.assertEqual(words - set(queuectl.STATES), set())
        self.assertGreaterEqual(words, {"pending", "processing", "completed", "failed", "dead"})

    def test_a_migration_sorts_in_files_what_comes_later_in_memory(self):
        migrate, seen = queuectl.Store.migrate, []

        def noted(store, number):
            seen.append(store.value("PRAGMA temp_store"))
            migrate(store, number)
        with mock.patch("queuectl.Store.migrate", noted):
            store = self.open_store(self.path)
        self.assertEqual(seen, [0] * len(queuectl.MIGRATIONS))
        self.assertEqual(store.value("PRAGMA temp_store"), 2)

    def test_a_newer_database_is_refused_untouched(self):
        self.make(ORIGINAL + "PRAGMA user_version = 99;")
        before = read(self.path)
        self.refused("newer queuectl (schema 99", queuectl.Store, self.path,
                     kind=queuectl.StorageError)
        self.assertEqual(read(self.path), before)
        self.assertEqual(os.listdir(os.path.dirname(self.path)), ["queuectl.db"])

    def test_a_migration_that_fails_midway_changes_nothing(self):
        store = self.open_store(self.path)
        before = self.schema(store)
        store.close()
        broken = queuectl.MIGRATIONS + (("CREATE TABLE extra (a)", "ALTER TABLE none ADD b"),)
        with mock.patch("queuectl.MIGRATIONS", broken):
            self.refused("no such table", queuectl.Store, self.path, kind=queuectl.StorageError)
        again = self.open_store(self.path)
        self.assertEqual(self.schema(again), before)
        self.assertEqual(again.value("PRAGMA user_version"), len(queuectl.MIGRATIONS))

    def test_a_database_of_the_original_opens_and_its_jobs_run(self):
        self.make(ORIGINAL)
        store = self.open_store(self.path)
        self.assertEqual((store.settings["max-retries"], store.settings["timeout"]), (3, 7000))
        self.assertEqual(store.counts()["pending"], 1)
        with store.transaction():
            queuectl.adopt_strangers(store, queuectl.now_ms())
            claims = store.claim([1], "boot", queuectl.now_ms())
        self.assertEqual([(claim.job, claim.command) for claim in claims], [("old", "true")])

    def test_a_table_of_jobs_that_lacks_a_column_is_refused(self):
        self.make(ORIGINAL.replace("locked_at", "locked"))
        self.refused("no such column: locked_at", queuectl.Store, self.path,
                     kind=queuectl.StorageError)

    def test_a_database_that_the_lock_file_does_not_know_is_refused_untouched(self):
        self.refused("is gone", queuectl.Store, self.path, "other", kind=queuectl.StorageError)
        self.assertFalse(os.path.exists(self.path))
        open(self.path, "w").close()
        self.refused("is empty", queuectl.Store, self.path, "other", kind=queuectl.StorageError)
        self.assertEqual(os.path.getsize(self.path), 0)
        self.open_store(self.path).close()
        before = read(self.path)
        self.refused("is another queue's", queuectl.Store, self.path, "other",
                     kind=queuectl.StorageError)
        self.assertEqual(read(self.path), before)

    def test_a_database_removed_while_in_use_is_noticed(self):
        store = self.open_store(self.path)
        os.unlink(self.path)
        with self.assertRaises(queuectl.Replaced), store.transaction():
            store.set_wanted(3)
        self.assertFalse(os.path.exists(self.path))


class StoreCase(Case):
    def setUp(self):
        self.store = self.open_store()

    def add(self, *ids, **fields):
        """(new) -> pending"""
        with self.store.transaction():
            self.store.insert([queuectl.make_job(dict({"command": "true", "id": one}, **fields),
                                                 self.store.settings, NOW) for one in ids])

    def claim(self, count=1, now=NOW):
        """pending or failed -> processing"""
        with self.store.transaction():
            return self.store.claim(list(range(1, count + 1)), "boot", now)

    def end(self, claim, status=0, reason="", now=NOW + 1000):
        """processing -> what the retry policy says"""
        outcome = queuectl.Outcome(status, reason, "", 0, now)
        with self.store.transaction():
            return queuectl.record_results(
                self.store, [queuectl.Result(claim, outcome, b"out", 42)], now)[0][1]

    def kill(self, *ids):
        """(new) -> dead"""
        self.add(*ids, max_retries=1)
        for claim in self.claim(len(ids)):
            self.end(claim, 1)

    def sql(self, text, *values):
        """What another program writes."""
        with self.store.transaction():
            return self.store.query(text, values)

    def adopt(self, now=NOW):
        with self.store.transaction():
            return queuectl.adopt_strangers(self.store, now)

    def counts(self):
        """The counts that are not 0, after a look that they are right."""
        counted = dict(self.store.query("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
        self.assertEqual({k: n for k, n in self.store.counts().items() if n}, counted)
        return counted

    def shown(self, job_id, *names):
        job = self.store.job(job_id)
        return tuple(getattr(job, name) for name in names)


class StoreTest(StoreCase):
    def test_where_all_may_write_no_name_is_left_for_others_to_plant(self):
        folder, connect, found = self.folder(), sqlite3.connect, []
        os.chmod(folder, 0o1777)
        path = folder + "/q.db"
        self.open_store(path).close()

        def connected(*args, **options):
            found.extend(stat.S_IMODE(os.lstat(path + suffix).st_mode)
                         for suffix in ("-wal", "-shm", "-journal"))
            return connect(*args, **options)
        with mock.patch("sqlite3.connect", connected):
            store = self.open_store(path)
        self.assertEqual(found, [0o600] * 3)
        with store.transaction():
            store.insert([queuectl.make_job({"command": "true"}, DEFAULTS, NOW)])
        self.assertEqual(store.counts()["pending"], 1)
        with mock.patch("queuectl.open_private", side_effect=queuectl.Failure("full")):
            self.refused("full", queuectl.Store, path, kind=queuectl.StorageError)

    def test_a_text_of_another_program_that_is_not_utf8_is_told_with_the_way_out(self):
        self.sql("INSERT INTO config VALUES ('jitter', '7')")
        self.store.read_settings()
        self.sql("INSERT INTO config VALUES ('backoff', CAST(x'ff' AS TEXT))")
        self.refused("not UTF-8, which another program wrote; mend it with sqlite3",
                     self.store.read_settings, kind=queuectl.StorageError)
        self.assertEqual(self.store.settings["jitter"], 7)  # those read before are still good

    def test_insert_makes_a_job_pending(self):
        self.add("a")
        self.add("later", run_after="2026-01-15T10:31:00Z")
        self.assertEqual(self.shown("a", "state", "ready", "due"), ("pending", 1, None))
        self.assertEqual(self.shown("later", "state", "ready", "due"),
                         ("pending", None, NOW + 60000))
        self.assertEqual(self.counts(), {"pending": 2})
        self.assertEqual(self.store.totals()["enqueued"], 2)
        self.assertIsNone(self.store.job("none"))

    def test_claim_takes_by_priority_then_age(self):
        for one, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5)):
            self.add(one, priority=priority)
        claims = self.claim(2) + self.claim(9)
        self.assertEqual([claim.job for claim in claims], ["b", "e", "a", "c", "d"])
        self.assertEqual([claim.serial for claim in claims], [1, 2, 3, 4, 5])
        self.assertEqual(self.shown("b", "state", "started_at", "locked_at", "runs", "serial"),
                         ("processing", STAMP, STAMP, 1, 1))
        self.assertEqual(self.counts(), {"processing": 5})
        self.assertEqual(self.claim(9), [])
        self.assertEqual(self.store.open_claims(), claims)

    def test_a_completed_job_is_stored_with_its_attempt(self):
        self.add("a")
        claim, = self.claim()
        self.end(claim)
        self.assertEqual(
            self.shown("a", "state", "attempts", "exit_code", "error", "finished_at", "locked_at"),
            ("completed", 1, 0, None, "2026-01-15T10:30:01.000Z", None))
        self.assertEqual(self.store.query("SELECT * FROM attempts"), [
            (1, "a", 1, 42, STAMP, "2026-01-15T10:30:01.000Z", 0, None, None, 0, b"out")])
        self.assertEqual(self.store.open_claims(), [])
        totals = self.store.totals()
        self.assertEqual((totals["completed"], totals["runtime_ms"], totals["longest_ms"]),
                         (1, 1000, 1000))

    def test_a_failed_job_is_tried_again_once_its_time_has_come(self):
        self.add("a")
        self.end(self.claim()[0], -9, now=NOW)
        self.assertEqual(self.shown("a", "state", "attempts", "due", "error", "run_after"),
                         ("failed", 1, NOW + 5000, "killed by SIGKILL", "2026-01-15T10:30:05.000Z"))
        self.assertEqual(self.store.value("SELECT signal FROM attempts"), "SIGKILL")
        with self.store.transaction():
            self.assertEqual(self.store.promote(NOW + 4999), 0)
        self.assertEqual((self.claim(), self.store.next_due()), ([], NOW + 5000))
        with self.store.transaction():
            self.assertEqual(self.store.promote(NOW + 5000), 1)
        claim, = self.claim(now=NOW + 5000)
        self.assertEqual((claim.job, claim.number, claim.attempts), ("a", 2, 1))

    def test_a_job_out_of_retries_is_dead(self):
        self.kill("a")
        self.assertEqual(self.shown("a", "state", "error", "exit_code", "due", "ready"),
                         ("dead", "exit 1", 1, None, None))
        self.assertEqual((self.counts(), self.store.totals()["dead"]), ({"dead": 1}, 1))

    def test_an_attempt_given_back_does_not_count(self):
        self.add("a")
        self.end(self.claim()[0], None, "unstarted")
        self.assertEqual(self.shown("a", "state", "attempts", "runs", "ready", "locked_at"),
                         ("pending", 0, 0, 1, None))
        self.end(self.claim()[0], 1, now=NOW)
        with self.store.transaction():
            self.store.promote(NOW + 5000)
        self.end(self.claim()[0], -15, "stopped")
        self.assertEqual(self.shown("a", "state", "attempts", "runs", "ready", "error"),
                         ("failed", 1, 1, 1, "exit 1"))
        self.assertEqual(self.store.value("SELECT COUNT(*) FROM attempts"), 1)

    def test_requeue_stamps_the_present_settings_but_keeps_the_jobs_own(self):
        self.kill("a")
        self.add("b", timeout=77)
        self.end(self.claim()[0], 0, "cancelled")
        with self.store.transaction():
            self.store.set_setting("timeout", 1000)
            self.store.set_setting("max-retries", 9)
            for one in "ab":
                self.store.requeue(self.store.job(one), NOW + 5000)
        names = ("state", "attempts", "error", "finished_at", "exit_code", "timeout", "max_retries")
        self.assertEqual(self.shown("a", *names), ("pending", 0, None, None, None, 1000, 1))
        self.assertEqual(self.shown("b", *names), ("pending", 0, None, None, None, 77, 9))
        self.assertEqual([(claim.job, claim.number) for claim in self.claim(9)],
                         [("a", 2), ("b", 2)])

    def test_promote_makes_due_jobs_ready_so_many_at_a_time(self):
        self.add("c", run_after="2026-01-15T10:30:03Z")
        self.add("a", "b", run_after="2026-01-15T10:30:01Z")
        with mock.patch("queuectl.PROMOTE", 1), self.store.transaction():
            self.assertEqual(self.store.promote(NOW + 1000), 1)
        self.assertEqual(self.store.next_due(), NOW + 1000)
        with self.store.transaction():
            self.assertEqual(self.store.promote(NOW + 2999), 1)
        self.assertEqual(self.store.next_due(), NOW + 3000)
        self.sql("UPDATE jobs SET due = 'soon'")
        self.assertEqual(self.store.next_due(), queuectl.LAST_MS)
        self.assertEqual([claim.job for claim in self.claim(9)], ["a", "b"])

    def test_rows_inserted_by_hand_become_jobs(self):
        for columns, values, expected in (
                ("id, command", ("'a'", "'true'"), ("pending", None)),
                ("id, command", ("NULL", "'true'"), ("pending", None)),
                ("id, command", ("CAST(x'ff' AS TEXT)", "'true'"), ("pending", None)),
                ("id, command", ("x'ff'", "'true'"), ("pending", None)),
                ("id, command, run_after", ("'b'", "'true'", "'2026-01-15 10:30:00'"),
                 ("pending", None)),
                ("id, command, run_after", ("'c'", "'true'", "'2026-01-16 10:30:00'"),
                 ("pending", NOW + 86400000)),
                ("id, command, state, attempts", ("'d'", "'true'", "'failed'", "1"),
                 ("failed", None)),
                ("id, command, run_after", ("'e'", "'true'", "'soon'"), ("dead", None)),
                ("id, command, state", ("'f'", "'true'", "'odd'"), ("dead", None)),
                ("id, command", ("'g'", "CAST(x'ff' AS TEXT)"), ("dead", None)),
                ("id, command, run_after, cwd", ("'g'", "CAST(x'ff' AS TEXT)", "'soon'", "x'ff'"),
                 ("dead", None)),
                ("id, command, state, attempts", ("'h'", "'true'", "'processing'", "0"),
                 ("failed", NOW + 5000)),
                ("id, command, state, attempts", ("'i'", "'true'", "'processing'", "2"),
                 ("dead", None))):
            with self.subTest(columns=columns, values=values):
                self.store = self.open_store()
                with mock.patch("time.time", return_value=NOW / 1000.0):
                    self.sql("INSERT INTO jobs (created_at, updated_at, %s) VALUES"
                             " ('2026-01-15 10:30:00', NULL, %s)" % (columns, ", ".join(values)))
                if "run_after" not in columns:
                    self.sql("UPDATE jobs SET run_after = '2026-01-15'")
                self.adopt()
                (_, job), = self.store.jobs(None, 0, 9)
                self.assertEqual((job.state, job.due), expected)
                self.assertEqual(job.error is None, job.state == "pending" or "'failed'" in values)
                if job.state != "dead":
                    self.assertEqual((job.created_at, job.updated_at), (STAMP, STAMP))
                self.assertEqual(json.loads(json.dumps(job.public()))["id"], queuectl.as_id(job.id))
                self.assertEqual([claim.job for claim in self.claim(now=NOW)],
                                 [job.id] if job.ready else [])
                self.assertFalse(self.store.has_chores(NOW))
                self.counts()

    def test_a_row_by_hand_that_dies_is_counted_one_that_came_dead_is_not(self):
        for name, state in (("a", "odd"), ("b", "dead"), ("c", "processing")):
            self.sql("INSERT INTO jobs (id, command, state, attempts) VALUES (?, 'x', ?, 2)",
                     name, state)
        self.adopt()
        totals = self.store.totals()
        self.assertEqual((self.counts(), totals["enqueued"], totals["dead"]), ({"dead": 3}, 3, 2))

    def test_a_job_without_the_time_of_its_end_is_none_of_the_latest(self):
        self.kill("a")
        self.add("b")
        self.sql("UPDATE jobs SET state = 'dead' WHERE id = 'b'")
        self.assertEqual([job.id for job in self.store.last_deaths()], ["a"])

    def test_a_running_job_deleted_by_hand_leaves_no_trace(self):
        self.add("a")
        claim, = self.claim()
        self.sql("DELETE FROM jobs WHERE id = 'a'")
        self.assertIsNone(self.store.open_claims()[0].command)
        self.end(claim)
        self.assertEqual((self.store.open_claims(), self.store.job("a")), ([], None))
        self.assertEqual(self.counts(), {})
        self.assertEqual(self.store.query("SELECT * FROM attempts"), [])

    def test_a_running_job_inserted_anew_waits_until_its_attempt_is_over(self):
        self.add("a")
        claim, = self.claim()
        self.sql("DELETE FROM jobs WHERE id = 'a'")
        self.sql("INSERT INTO jobs (id, command, run_after) VALUES ('a', 'new', '2026-01-15')")
        self.adopt()
        self.assertEqual(self.claim(), [])
        self.assertEqual((self.store.open_claims("a"), len(self.store.open_claims())), ([], 1))
        self.end(claim, 1)
        self.assertEqual(self.shown("a", "state", "attempts"), ("pending", 0))
        self.adopt()
        self.assertEqual([claim.command for claim in self.claim()], ["new"])

    def test_a_running_job_called_dead_by_hand_and_retried_runs_once_more(self):
        self.add("a", max_retries=1)
        claim, = self.claim()
        self.sql("UPDATE jobs SET state = 'dead' WHERE id = 'a'")
        with self.store.transaction():
            self.store.requeue(self.store.job("a"), NOW)
        self.assertEqual(self.claim(), [])
        self.end(claim, 1)
        self.assertEqual(self.shown("a", "state", "attempts"), ("pending", 0))
        self.assertEqual([claim.attempts for claim in self.claim()], [0])

    def test_a_cancel_undoes_no_end_that_came_before_but_a_retry(self):
        for ended, status, state, error in ((NOW - 1, 0, "completed", None),
                                            (NOW + 1, 0, "dead", "cancelled"),
                                            (NOW - 1, 1, "dead", "cancelled")):
            with self.subTest(ended=ended, status=status):
                job_id = "%d.%d" % (ended, status)
                self.add(job_id)
                claim, = self.claim()
                self.assertTrue(self.store.mark_cancelled(job_id, NOW))
                self.end(claim, status, now=ended)
                self.assertEqual(self.shown(job_id, "state", "error"), (state, error))

    def test_a_cancel_means_the_job_of_today_not_its_namesakes_attempt(self):
        self.add("a")
        self.claim()
        self.sql("DELETE FROM jobs WHERE id = 'a'")
        self.add("a")
        self.assertFalse(self.store.mark_cancelled("a", NOW))
        self.assertEqual(self.store.cancelled(), {1: NOW})  # the old one is stopped all the same

    def test_numbers_and_texts_that_are_none_are_replaced(self):
        self.add("a")
        self.sql("UPDATE jobs SET max_retries = 'many', attempts = NULL, timeout = NULL, runs = NULL")
        self.sql("UPDATE jobs SET command = x'74727565'")
        self.sql("UPDATE jobs SET ready = 1, due = NULL")
        claim, = self.claim()
        self.assertEqual(claim[5:], (1, 0, 3, 5000, "b'true'", None, None))
        self.assertEqual(self.store.open_claims(), [claim])
        self.end(claim, 1)
        self.assertEqual(self.shown("a", "state", "attempts", "runs"), ("failed", 1, 1))

    def test_ids_that_become_the_same_when_escaped_stay_two_jobs(self):
        for end, command in (("\\n", "x"), ("\n", "y")):
            self.sql("INSERT INTO jobs (id, command, run_after) VALUES (?, ?, '2026-01-15')",
                     "a" + end, command)
        self.adopt()
        self.assertEqual(sorted(claim.command for claim in self.claim(9)), ["x", "y"])

    def test_what_died_fits_the_environment_of_the_on_dead_line(self):
        with self.store.transaction():
            self.store.set_setting("on-dead", "mail")
        self.sql("INSERT INTO jobs (id, command, run_after, max_retries)"
                 " VALUES (?, 'x', '2026-01-15', 1)", "i" * 200000)
        self.adopt()
        self.end(self.claim()[0], 1)
        env = json.loads(self.store.jobs("pending", 0, 9)[0][1].env)
        self.assertEqual((env["QUEUECTL_DEAD_ID"], env["QUEUECTL_DEAD_ERROR"]),
                         ("i" * 1000, "exit 1"))

    def test_a_processing_job_without_an_attempt_is_adopted(self):
        self.add("a")
        claim, = self.claim()
        self.store.disown_stranded()
        self.assertEqual(self.shown("a", "due"), (None,))
        self.sql("UPDATE jobs SET id = 'b' WHERE id = 'a'")
        self.store.disown_stranded()
        self.assertEqual(self.shown("b", "due"), (None,))
        self.sql("UPDATE jobs SET id = 'a' WHERE id = 'b'")
        self.sql("DELETE FROM running")
        self.store.disown_stranded()
        self.adopt()
        self.assertEqual(self.shown("a", "state", "error"), ("failed", "worker lost"))

    def test_a_running_job_set_to_pending_by_hand_goes_on(self):
        self.add("a")
        claim, = self.claim()
        self.sql("UPDATE jobs SET state = 'pending' WHERE id = 'a'")
        self.assertTrue(self.store.has_chores(NOW))
        self.adopt()
        self.assertEqual((self.shown("a", "state"), self.claim()), (("processing",), []))
        self.end(claim)
        self.assertEqual(self.shown("a", "state", "attempts"), ("completed", 1))

    def test_completed_jobs_are_purged_after_their_retention(self):
        self.add("a", "b", "c")
        for claim, now in zip(self.claim(3), (NOW, NOW + 1, NOW)):
            self.end(claim, claim.job == "c", "cancelled" if claim.job == "c" else "", now)
        for retention, deleted in ((0, 0), (5000, 1)):
            with self.subTest(retention=retention), self.store.transaction():
                self.store.set_setting("retention", retention)
                self.assertEqual(self.store.has_chores(NOW + 5001), deleted > 0)
                self.assertEqual(self.store.purge_expired(NOW + 5001), deleted)
        self.assertEqual(self.counts(), {"completed": 1, "dead": 1})
        self.assertEqual(self.store.query("SELECT job FROM attempts ORDER BY 1"), [("b",), ("c",)])

    def test_counts_follow_whoever_writes(self):
        self.add("a", "b")
        self.sql("INSERT INTO jobs (id, command) VALUES ('c', 'true')")
        self.sql("UPDATE jobs SET state = 'dead' WHERE id = 'a'")
        self.assertEqual(self.counts(), {"pending": 2, "dead": 1})
        self.sql("DELETE FROM jobs WHERE state = 'pending'")
        self.assertEqual(self.counts(), {"dead": 1})
        self.sql("UPDATE counts SET jobs = 5")
        with self.store.transaction():
            self.store.recount()
        self.assertEqual(self.counts(), {"dead": 1})

    def test_a_unique_key_is_held_while_its_job_is_unfinished(self):
        self.add("a", unique="k", max_retries=2)
        held = [self.store.holder("k")]
        claim, = self.claim()
        held.append(self.store.holder("k"))
        self.end(claim, 1, now=NOW)
        held.append(self.store.holder("k"))
        with self.store.transaction():
            self.store.promote(NOW + 5000)
        self.end(self.claim()[0], 1)
        self.assertEqual(held + [self.store.holder("k")], ["a", "a", "a", None])
        self.add("b", unique="k")
        self.assertEqual(self.store.holder("k"), "b")
        self.sql("DELETE FROM jobs WHERE id = 'a'")
        self.assertEqual(self.store.holder("k"), "b")
        self.sql("DELETE FROM jobs WHERE id = 'b'")
        self.assertEqual((self.store.holder("k"), self.store.holder("none")), (None, None))

    def test_a_job_revived_by_hand_holds_its_key_again_if_it_is_free(self):
        self.add("a", unique="k")
        self.end(self.claim()[0])
        self.add("b", unique="k")
        for a, b in (("pending", "b"), ("completed", None), ("pending", "a")):
            with self.subTest(a=a, b=b):
                self.sql("UPDATE jobs SET state = ? WHERE id = 'a'", a)
                if b != "b":
                    self.sql("UPDATE jobs SET state = 'completed' WHERE id = 'b'")
                self.adopt()
                self.assertEqual(self.store.holder("k"), b)

    def test_a_job_can_have_only_one_open_attempt(self):
        self.add("a")
        self.claim()
        self.sql("UPDATE jobs SET ready = 1")
        self.assertEqual(self.claim(), [])
        with self.assertRaises(queuectl.StorageError), self.store.transaction():
            self.store.write("INSERT INTO running VALUES (9, 'a', 1, '', 0)", ())

    def test_a_durable_transaction_is_synchronous(self):
        for durable, level in ((True, 2), (False, 1), (True, 2)):
            with self.subTest(durable=durable), self.store.transaction(durable=durable):
                self.assertEqual(self.store.value("PRAGMA synchronous"), level)

    def test_no_statement_of_the_loop_scans_or_sorts(self):
        self.add("a", unique="k")
        self.sql("UPDATE config SET value = value")
        store, store.settings["retention"] = self.store, 1000
        for name, index, call in (
                ("claim", "jobs_ready", lambda: store.claim([1], "", NOW)),
                ("promote", "jobs_due", lambda: store.promote(NOW)),
                ("next_due", "jobs_due", store.next_due),
                ("pull_in", "jobs_state", lambda: store.pull_in(NOW)),
                ("strangers", "jobs_due", store.strangers),
                ("purge_expired", "jobs_finished", lambda: store.purge_expired(NOW)),
                ("has_chores", "jobs_finished", lambda: store.has_chores(NOW)),
                ("holder", "autoindex_unique_keys", lambda: store.holder("k")),
                ("list", "PRIMARY KEY", lambda: store.jobs(None, 5, 50)),
                ("list --state", "jobs_state", lambda: store.jobs("dead", 5, 50)),
                ("ended", "autoindex_jobs", lambda: store.ended(["a", "b"])),
                ("unsettled", "jobs_ready", lambda: store.unsettled(NOW)),
                ("last_deaths", "jobs_finished", store.last_deaths),
                ("count_finished", "jobs_finished", lambda: store.count_finished("dead", STAMP)),
                ("attempts", "attempts_job", lambda: store.attempts("a")),
                ("cancel", "autoindex_jobs", lambda: store.cancel("a", NOW))):
            with self.subTest(name=name), store.transaction(), \
                    mock.patch.object(store, "query", wraps=store.query) as reads, \
                    mock.patch.object(store, "write", wraps=store.write) as writes:
                call()
                made = [seen[0] for seen in reads.call_args_list + writes.call_args_list
                        if re.search("jobs|attempts", seen[0][0])]
                plan = "\n".join(row[3] for sql, *values in made for row in
                                 store.connection.execute("EXPLAIN QUERY PLAN " + sql, *values))
                self.assertRegex(plan, r"SEARCH (TABLE )?(jobs|unique_keys|attempts)\b.*" + index)
                self.assertNotRegex(plan, r"SCAN (TABLE )?(jobs|attempts|unique)|TEMP B-TREE")


class LeaderTest(Case):
    def test_a_group_speaks_for_its_leader_as_long_as_it_has_members(self):
        run = self.folder() + "/1"
        leader = subprocess.Popen(["/bin/sh", "-c", "read x; sleep 300 & echo $!; read x"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  env=dict(os.environ, QUEUECTL_JOB_ID="a", QUEUECTL_RUN=run),
                                  start_new_session=True)
        self.addCleanup(leader.communicate)
        record = {"pid": leader.pid, "start": queuectl.process_start(leader.pid)}
        self.assertEqual(queuectl.leader(record, "a", run), leader.pid)
        self.assertIsNone(queuectl.leader(dict(record, start="another"), "a", run))
        self.assertEqual(queuectl.leader({"phase": "starting"}, "a", run), leader.pid)
        self.assertIsNone(queuectl.leader({"phase": "starting"}, "a", run + "1"))
        leader.stdin.write(b"\n")
        leader.stdin.flush()
        member = int(leader.stdout.readline())
        os.kill(leader.pid, signal.SIGKILL)
        wait_until(lambda: not queuectl.process_start(leader.pid), "the leader has ended")
        self.assertEqual(queuectl.leader(record, "a", run), leader.pid)
        self.assertIsNone(queuectl.leader(record, "b", run))  # a number used again
        os.kill(member, signal.SIGKILL)
        wait_until(lambda: not queuectl.process_start(member), "the member has ended")
        self.assertIsNone(queuectl.leader(record, "a", run))
        self.assertIsNone(queuectl.leader({}, "a", run))

    def test_while_the_worker_lives_its_command_is_not_looked_for(self):
        spool = queuectl.Spool(self.folder() + "/q")
        os.mkdir(spool.path)
        claim = mock.Mock(serial=1, slot=1, boot=queuectl.boot_id())
        with open(spool.worker_file(1), "wb") as file:
            file.write(queuectl.pad({"serial": 1, "phase": "starting"}, 4096))
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
            with mock.patch("queuectl.leader", side_effect=AssertionError):
                self.assertEqual(queuectl.examine(claim, spool)[0], "leave")


class SpoolTest(Case):
    def test_without_descriptors_nothing_is_known_of_an_attempt(self):
        spool = queuectl.Spool(self.folder() + "/q")
        claim = mock.Mock(serial=1, slot=1)
        self.assertEqual((spool.record(claim), spool.tail(1, 9)), ({}, (b"", 0)))
        self.assertEqual(spool.piece(claim, 0, 9), (b"", 0, 0))
        with mock.patch("os.open", side_effect=OSError(errno.EMFILE, "no descriptors")):
            self.assertRaises(OSError, spool.record, claim)
            self.assertRaises(OSError, spool.tail, 1, 9)
            self.assertIsNone(spool.piece(claim, 0, 9))


class AttemptTest(Case):
    """With commands started by subprocess."""

    def setUp(self):
        self.base = self.folder()
        self.notes = []
        self.serials = itertools.count(1)
        mocked = mock.patch("queuectl.posix_spawn", return_value=self.posix_spawn())
        mocked.start()
        self.addCleanup(mocked.stop)
        self.addCleanup(os.chdir, os.getcwd())

    def posix_spawn(self):
        return None

    def start(self, command, **order):
        order = dict({"serial": next(self.serials), "id": "a", "attempt": 1, "command": command,
                      "shell": ["/bin/sh", "-c"], "timeout": 0, "cwd": self.base, "env": {},
                      "limit": 1000}, **order)
        run = queuectl.Attempt(order, "%s/%d" % (self.base, order["serial"]),
                               lambda **note: self.notes.append(note), select.poll())
        run.start(0.0)
        if run.process:
            self.addCleanup(self.kill_group, run.process.pid)
        return run

    def kill_group(self, pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def finish(self, run, now=0.0):
        """Drive it to its end from the fake time `now` on; status and reason noted, output."""
        clock = itertools.count()

        def step():
            moment = now + next(clock) / 100.0
            while run.output is not None and select.select([run.output], [], [], 0.005)[0]:
                run.on_output()
                self.assertLessEqual(run.size, run.bound)
            run.look(moment)
            return run.over
        wait_until(step, "the attempt is over")
        last = self.notes[-1]
        self.assertEqual((last["phase"], last["size"], last["dropped"]),
                         ("ended", run.size, run.dropped))
        return last["status"], last["reason"], read(run.path)

    def pid_in(self, name):
        path = self.base + "/" + name
        return int(wait_until(lambda: os.path.exists(path) and read(path).endswith(b"\n")
                              and read(path), name + " is written"))

    def gone(self, pid):
        return queuectl.process_start(pid) == ""

    def test_commands_end_as_they_do(self):
        for command, status, output in (
                ("exit 7", 7, b""), ("echo out; echo err >&2", 0, b"out\nerr\n"),
                ("kill -9 $$", -9, b""), ("/none/such 2>/dev/null", 127, b""),
                ("printf '\\377\\000'", 0, b"\xff\0"), ("cat", 0, b""), ("pwd", 0, None),
                ("echo $PPID-$X", 0, b"%d-y\n" % os.getpid())):
            with self.subTest(command=command):
                run = self.start(command, env={"X": "y"} if "$X" in command else {})
                expected = self.base.encode() + b"\n" if output is None else output
                self.assertEqual(self.finish(run), (status, "", expected))
                self.assertEqual([note["phase"] for note in self.notes[-3:]],
                                 ["starting", "running", "ended"])

    def test_output_that_the_command_read_itself_is_not_waited_for(self):
        run = self.start("exec sleep 0.3")
        run.on_output()
        self.assertIsNotNone(run.output)  # it would be closed if the end had been waited for
        run.drain()
        self.assertEqual(self.finish(run), (0, "", b""))

    def test_nothing_is_loaded_once_a_command_runs(self):
        run = self.start("sleep 9 & echo out; exit 3")
        with mock.patch("builtins.__import__", side_effect=ImportError("a disk that fails")):
            self.assertEqual(self.finish(run), (3, "", b"out\n"))

    def test_the_record_names_the_process_and_the_run_file_is_locked(self):
        os.mkfifo(self.base + "/go")
        run = self.start("read x <go")
        self.assertEqual(self.notes[-1], {
            "serial": 1, "phase": "running", "pid": run.process.pid,
            "start": queuectl.process_start(run.process.pid)})
        self.assertEqual(queuectl.leader(self.notes[-1], "a", run.path), run.process.pid)
        self.assertEqual(os.getpgid(run.process.pid), run.process.pid)
        self.assertIs(queuectl.is_locked(run.path), True)
        with open(self.base + "/go", "w") as fifo:
            fifo.write("\n")
        self.assertEqual(self.finish(run), (0, "", b""))
        with mock.patch("os.listdir", side_effect=AssertionError):  # no search for what has ended
            self.assertIsNone(queuectl.leader(self.notes[-1], "a", run.path))
        self.assertIs(queuectl.is_locked(run.path), False)
        self.assertIsNone(queuectl.leader(self.notes[-2], "a", run.path))

    def test_a_timeout_ends_the_whole_group_and_who_left_it(self):
        leaver = "import os,time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)"
        run = self.start("trap '' TERM; sh -c 'echo $$ >a; exec sleep 60' & "
                         "\"%s\" -SEc '%s' >b & wait; wait" % (sys.executable, leaver),
                         timeout=60000)
        pids = [self.pid_in(name) for name in "ab"]
        self.assertEqual(run.deadline, 60.0)
        run.look(60.0)
        run.look(60.0)
        self.assertEqual((run.over, run.deadline), (False, 60.0 + queuectl.GRACE_S))
        self.assertEqual(self.finish(run, run.deadline), (-9, "timeout", b""))
        for pid in pids:
            wait_until(lambda: self.gone(pid), "all of it has ended")

    def test_a_stopped_command_may_end_in_order(self):
        for reason in ("cancelled", "stopped"):
            with self.subTest(reason=reason):
                run = self.start("exec 2>&-; trap 'echo bye; exit 5' TERM; echo 1 >up;"
                                 "while :; do sleep 0.01; done")
                self.pid_in("up")
                run.on_message(reason, 10.0)
                self.assertEqual(self.finish(run, 10.0), (5, reason, b"bye\n"))
                os.unlink(self.base + "/up")

    def test_a_completed_command_leaves_its_background_alone(self):
        run = self.start("sleep 60 & echo $! >a")
        self.assertEqual(self.finish(run), (0, "", b""))
        self.assertFalse(self.gone(self.pid_in("a")))

    def test_a_failed_command_leaves_nothing_behind(self):
        run = self.start("sh -c 'trap \"\" TERM; echo $$ >a; exec sleep 60' & "
                         "until [ -s a ]; do :; done; exit 3")
        with mock.patch("queuectl.GRACE_S", 0.1):
            self.assertEqual(self.finish(run), (3, "", b""))
        wait_until(lambda: self.gone(self.pid_in("a")), "the background has ended")

    def test_output_is_cut_while_it_runs(self):
        run = self.start("yes | head -c 5000000; echo end")
        status, reason, output = self.finish(run)
        self.assertEqual((status, reason, run.size + run.dropped), (0, "", 5000004))
        self.assertTrue(output.endswith(b"y\nend\n"))
        self.assertLessEqual(len(output), queuectl.MIN_RUN_FILE)

    def test_a_command_that_can_not_start_says_why(self):
        none, folder = self.base + "/none", self.base + "/folder"
        os.mkdir(folder)
        for order, detail in (({"cwd": none}, "in %s: No such file or directory" % none),
                              ({"shell": [none]}, none + ": No such file or directory"),
                              ({"shell": [folder]}, folder + ": Permission denied")):
            with self.subTest(order=order):
                run = self.start("true", **order)
                last = self.notes[-1]
                self.assertEqual((run.over, last["status"], last["reason"]),
                                 (True, None, "refused"))
                self.assertEqual(last["detail"], "can't start " + detail)

    def test_who_ended_in_time_is_not_timed_out_by_a_late_look(self):
        run = self.start("true", timeout=1000)
        wait_until(lambda: not queuectl.process_start(run.process.pid), "it has ended")
        run.look(100.0)
        last = self.notes[-1]
        self.assertEqual((run.over, last["status"], last["reason"]), (True, 0, ""))

    def test_who_ended_before_it_was_to_be_stopped_is_not_stopped(self):
        for command, status in (("true", 0), ("exit 3", 3)):
            with self.subTest(command=command):
                run = self.start(command)
                wait_until(lambda: not queuectl.process_start(run.process.pid), "it has ended")
                run.on_message("stopped", 10.0)
                self.assertEqual(self.finish(run, 10.0), (status, "", b""))

    def test_what_another_program_made_of_a_job_is_refused(self):
        for order in ({"env": {"A": 3}}, {"env": ["A"]}, {"command": "a\0b"}, {"cwd": "/\0"}):
            with self.subTest(order=order):
                command = order.pop("command", "true")
                self.assertTrue(self.start(command, **order).over)
                self.assertEqual(self.notes[-1]["reason"], "refused")

    def test_want_of_processes_or_descriptors_burns_no_retry(self):
        for number in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENOSPC):
            with self.subTest(number=number), mock.patch(
                    "queuectl.spawn", side_effect=OSError(number, os.strerror(number))):
                run = self.start("true")
                self.assertEqual((run.over, self.notes[-1]["reason"], self.notes[-1]["detail"]),
                                 (True, "unstarted", "can't start: " + os.strerror(number)))

    def test_want_of_room_for_run_files_is_told_in_the_same_words_each_time(self):
        opened = os.open

        def full(path, *args):
            if os.path.basename(path).isdigit():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return opened(path, *args)
        with mock.patch("os.open", full):
            self.assertEqual({self.start("true", cwd="/").path for _ in range(2)},
                             {self.base + "/1", self.base + "/2"})
        self.assertEqual([note["detail"] for note in self.notes if note["phase"] == "ended"],
                         ["can't start in %s: %s" % (self.base, os.strerror(errno.ENOSPC))] * 2)


C_LIBRARYS = 0b11 << 31  # the signals 32 and 33: nobody else can set them


def c_library():
    """PosixSpawn, or None where the C library has nothing for it."""
    with contextlib.suppress(AttributeError, ImportError, OSError):
        return sys.platform == "linux" and queuectl.PosixSpawn()


@unittest.skipUnless(c_library(), "posix_spawn starts no sessions here")
class PosixSpawnTest(AttemptTest):
    """The same with commands started by posix_spawn, whatever this Python would do."""

    def posix_spawn(self):
        return c_library()

    def test_a_command_finds_the_same_world_either_way(self):
        script = ("pwd; env | sort; umask; ps -o sid=,pgid= -p $$ | tr -d ' ' | sed s/$$/ME/g;"
                  "cd /proc/self; while read line; do case $line in Sig[BIC]*|Shd*) echo $line;;"
                  " esac; done <status; for fd in fd/*; do echo $fd; done; readlink fd/0")
        for name in os.listdir("/dev/fd"):  # what this process was left; a worker closes them
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), int(name) < 3)
        for env in ({}, {"A": "é", "PATH": "/usr/bin:/bin"}):
            seen = []
            for way in (c_library(), None):
                with mock.patch("queuectl.posix_spawn", return_value=way), \
                        mock.patch.dict(os.environ, {"THIS": "stays"}):
                    status, reason, output = self.finish(self.start(script, env=env, shell=(
                        "/bin/sh", "-e", "-c")))
                self.assertEqual((status, reason), (0, ""))
                output = re.sub(rb"QUEUECTL_RUN=.*", b"", output)
                output = re.sub(rb"(?<=:\s)[0-9a-f]{16}", lambda mask: b"%x" % (
                    int(mask.group(), 16) & ~C_LIBRARYS), output)
                seen.append(output.decode().splitlines())
            self.assertEqual(*seen)
            self.assertIn("THIS=stays", seen[0])
            self.assertIn("/dev/null", seen[0])
            self.assertEqual("A=é" in seen[0], bool(env))

    def test_a_shell_is_looked_for_where_its_job_would(self):
        folder = self.base + "/bin"
        os.mkdir(folder)
        for name, where in (("here", self.base), ("there", folder)):
            os.symlink("/bin/sh", "%s/%s" % (where, name))
        path = {"PATH": "/none:%s:/bin" % folder}
        self.assertEqual(self.finish(self.start("echo a", shell=["there", "-c"], env=path)),
                         (0, "", b"a\n"))
        other = self.base + "/other"  # it goes on to the next where what is there can't be run
        os.makedirs(other + "/there")
        path["PATH"] = "%s:%s" % (other, path["PATH"])
        self.assertEqual(self.finish(self.start("echo a", shell=["there", "-c"], env=path)),
                         (0, "", b"a\n"))
        for shell in ("there", "here"):  # not in our PATH, nor in the job's directory
            with self.subTest(shell=shell):
                self.start("true", shell=[shell, "-c"], env={} if shell == "there" else path)
                self.assertEqual(self.notes[-1]["reason"], "refused")
                self.assertIn(shell + ": No such file", self.notes[-1]["detail"])


@unittest.skipUnless(c_library(), "posix_spawn starts no sessions here")
class PosixSpawnChoiceTest(Case):
    def test_it_is_used_where_subprocess_forks_unless_something_lacks(self):
        choose = queuectl.posix_spawn.__wrapped__
        with mock.patch("sys.version_info", (3, 10)):
            self.assertIsNone(choose())
        with mock.patch("sys.version_info", (3, 9)):
            self.assertIsInstance(choose(), queuectl.PosixSpawn)
            for lack in (ImportError, AttributeError, OSError, MemoryError):
                with mock.patch("queuectl.PosixSpawn", side_effect=lack):
                    self.assertIsNone(choose())


class ProtocolTest(Case):
    def test_a_request_ends_with_a_newline_or_once_it_is_whole(self):
        for inbox, requests, rest in (
                (b"", [], b""), (b"\n \n", [], b""), (b'{"a":1}\n', [b'{"a":1}'], b""),
                (b'{"a":1}', [b'{"a":1}'], b""), (b'{"a":1} \r', [b'{"a":1} \r'], b""),
                (b'{"a":{}', [], b'{"a":{}'), (b'{"a":"}', [], b'{"a":"}'), (b"x}", [], b"x}"),
                (b'{"a":1}\n{"b":2}\n\n{"c"', [b'{"a":1}', b'{"b":2}'], b'{"c"'),
                (b'{"a":1}\r\n{"b":2}', [b'{"a":1}\r', b'{"b":2}'], b""),
                (b"junk\n", [b"junk"], b""), (b"\xff}", [], b"\xff}"), (b"[1]", [], b"[1]"),
                (b"{" * 100000 + b"}", [], b"{" * 100000 + b"}")):
            with self.subTest(inbox=inbox[:40]):
                box = bytearray(inbox)
                self.assertEqual(list(iter(lambda: queuectl.take_request(box), None)), requests)
                self.assertEqual(bytes(box), rest)

    def test_any_number_of_empty_lines_is_no_request(self):
        box = bytearray(b"\n" * 65536)
        self.assertIsNone(queuectl.take_request(box))
        self.assertEqual(box, b"")

    def test_a_request_too_large_is_refused(self):
        with mock.patch("queuectl.MAX_REQUEST", 10):
            self.assertEqual(queuectl.take_request(bytearray(b"x" * 10 + b"\n")), b"x" * 10)
            self.assertIsNone(queuectl.take_request(bytearray(b"x" * 10)))
            for inbox in (b"x" * 11, b"x" * 11 + b"\n", b'{"a":"123"}'):
                with self.subTest(inbox=inbox):
                    self.refused("at most 10 bytes", queuectl.take_request, bytearray(inbox))

    def test_what_is_no_request_gets_a_clear_error(self):
        deep = b'{"command":' + b"[" * 100000 + b"]" * 100000 + b"}"
        self.refusals(queuectl.parse_request, ("JSON in UTF-8", b"\xff", b'{"command":"\xe9"}'),
                      ("is not JSON", b"x", b"", b'{"command":NaN}'),
                      ("is an object", b"[]", b'"status"', b"{}", b'{"command":5}', b"null"),
                      ("nested too deeply", b"[" * 100000, deep))
        self.assertEqual(queuectl.parse_request(b'{"command":"x"}'), {"command": "x"})

    def test_the_kernel_names_the_peer(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.assertEqual(queuectl.peer_uid(ours), os.geteuid())


class OperationsTest(StoreCase):
    def request(self, **request):
        with self.store.transaction():
            return queuectl.perform(queuectl.Context(self.store, NOW, None),
                                    queuectl.resolve(request))

    def ask(self, command, option=None, **value):
        return self.request(command=command, option=option, flag=None, value=value)

    def ids(self):
        return [job.id for _, job in self.store.jobs(None, 0, 999)]

    def test_what_sqlite_undid_as_a_whole_is_not_gone_on_with(self):
        daemon = object.__new__(queuectl.Daemon)
        daemon.store = self.store
        pages = self.store.value("PRAGMA page_count")
        self.store.query("PRAGMA max_page_count = %d" % (pages + 3))
        call = queuectl.resolve({"command": "pause", "value": "x" * 100000, "once": "a"})
        with self.assertRaises(queuectl.StorageError), self.store.transaction():
            daemon.answer(call)
            self.fail("it went on")
        self.assertIsNone(self.store.connection)

    def test_trouble_is_followed_by_a_pause_and_then_by_a_turn(self):
        daemon = object.__new__(queuectl.Daemon)
        daemon.log, daemon.pause_s, daemon.writes = mock.Mock(), 0.05, []
        daemon.chores = daemon.hungry = False
        daemon.trouble(queuectl.StorageError("no"), 10.0)
        self.assertEqual((daemon.wants_turn(10.04), daemon.wants_turn(10.06)), (False, True))
        daemon.hungry = daemon.chores = False  # a look in between finds nothing to do
        self.assertTrue(daemon.wants_turn(10.06))

    def test_a_daemons_write_finds_what_another_program_has_just_written(self):
        with mock.patch("queuectl.Loop"):
            daemon = queuectl.Daemon(queuectl.Place(":memory:", True, "none", True))
        daemon.log, daemon.chores = mock.Mock(), False
        daemon.store, channel = self.store, mock.Mock(open=False)
        daemon.pool = mock.Mock(idle={}, hold_until=0.0, **{"results.return_value": []})
        daemon.writes = [(channel, queuectl.resolve(
            {"command": "dlq", "option": "retry", "value": {"state": "dead"}}), 0.0)]
        self.sql("INSERT INTO jobs (id, command, state) VALUES (NULL, 'true', 'dead')")
        daemon.turn(1.0)
        answer = channel.send.call_args[0][0]
        self.assertEqual((answer.get("count"), self.counts()), (1, {"pending": 1}))
        self.assertEqual(self.ids(), [queuectl.as_id(one) for one in self.ids()])

    def test_enqueue_answers_with_the_id(self):
        answer = {"success": True, "message": "Job enqueued", "id": "a"}
        self.assertEqual(self.ask("enqueue", job={"id": "a", "command": "x"}, cwd="/w"), answer)
        self.assertEqual(self.shown("a", "command", "cwd", "created_at"), ("x", "/w", STAMP))
        job_id = self.ask("enqueue", job='{"command":"y"}')["id"]
        self.assertEqual(self.shown(job_id, "command"), ("y",))

    def test_a_duplicate_id_is_refused_and_the_first_stays(self):
        self.ask("enqueue", job={"id": "a", "command": "first"})
        with self.assertRaisesRegex(queuectl.Failure, "job id a is taken"):
            self.ask("enqueue", job={"id": "a", "command": "second"})
        self.assertEqual((self.shown("a", "command"), self.counts()), (("first",), {"pending": 1}))

    def test_a_held_key_is_answered_with_its_holder(self):
        job = {"id": "a", "command": "x", "unique": "k"}
        self.ask("enqueue", job=job)
        for one in ("a", "b"):
            with self.subTest(id=one):
                self.assertEqual(self.ask("enqueue", job=dict(job, id=one)),
                                 {"success": True, "message": "Job already queued", "id": "a"})
        self.end(self.claim()[0])
        self.assertEqual(self.ask("enqueue", job=dict(job, id="c"))["id"], "c")

    def test_a_batch_is_stored_whole(self):
        jobs = [{"command": "x"}, {"id": "b", "command": "x", "unique": "k"},
                {"command": "x", "unique": "k"}, {"command": "y"}]
        answer = self.ask("enqueue", "batch", jobs=jobs, cwd="/w", ids=True)
        self.assertEqual((answer["message"], answer["ids"][1:3]), ("Enqueued 3 jobs", ["b", "b"]))
        self.assertEqual(self.ids(), [answer["ids"][i] for i in (0, 1, 3)])
        self.assertEqual(self.shown("b", "cwd"), ("/w",))

    def test_a_bad_batch_stores_nothing_and_tells_which(self):
        self.add("old")
        good = {"id": "a", "command": "x"}
        for bad, words in (({"command": ""}, "field command"), (good, "job id a stands twice"),
                           ({"id": "old", "command": "x"}, "job id old is taken"),
                           (5, "JSON object")):
            with self.subTest(bad=bad):
                with self.assertRaisesRegex(queuectl.Failure, words) as caught:
                    self.ask("enqueue", "batch", jobs=[good, {"command": "x"}, bad, {}])
                self.assertEqual((caught.exception.details, self.ids()), ({"index": 2}, ["old"]))
        for jobs in (None, "x", {}, [good] * (queuectl.BATCH_JOBS + 1)):
            with self.subTest(jobs=str(jobs)[:20]):
                self.refused("a list of at most", lambda: self.ask("enqueue", "batch", jobs=jobs))

    def test_dlq_retry_queues_all_or_none(self):
        self.kill("a", "b")
        self.add("c")
        for ids, words in ((["a", "c"], "job c is pending, not dead"), (["a", "none"], "no job none"),
                           ([], "name the jobs"), (None, "name the jobs"), ([5], "no job 5"),
                           (["a", "\ud800"], "no job")):
            with self.subTest(ids=ids):
                self.refused(words, lambda: self.ask("dlq", "retry", ids=ids))
                self.assertEqual(self.counts(), {"dead": 2, "pending": 1})
        self.assertEqual(self.ask("dlq", "retry", ids=["a", "b", "a"])["message"],
                         "Jobs a, b added to queue")
        self.assertEqual(self.shown("a", "state", "attempts"), ("pending", 0))

    def test_a_purge_without_an_age_means_all_whatever_the_clock_says(self):
        self.kill("a")  # at NOW + 1000: then the clock was set back
        self.add("b")
        self.sql("UPDATE jobs SET state = 'dead' WHERE id = 'b'")  # without a time
        for value, count in (({"older_than": 1}, 0), ({"dry_run": True}, 2), ({}, 2)):
            with self.subTest(value=value):
                answer = self.ask("delete", state="dead", **value)
                self.assertEqual((answer["count"], answer["next"]), (count, None))
        self.assertEqual(self.counts(), {})

    def test_config_is_set_got_and_listed(self):
        self.assertEqual(self.ask("config", "set", key="timeout", value="90s")["message"],
                         "Updated timeout to 90s")
        self.assertEqual(self.ask("config", "get", key="timeout")["message"], 90000)
        self.assertEqual(self.ask("config", "list")["message"], dict(DEFAULTS, timeout=90000))
        self.refused("field jitter", lambda: self.ask("config", "set", key="jitter", value="x"))
        self.assertEqual(self.ask("config", "list")["message"], dict(DEFAULTS, timeout=90000))

    def test_lists_come_in_pages_oldest_first(self):
        self.kill("x")
        self.add(*"abcdefg")
        for state, expected in ((None, "xabcdefg"), ("pending", "abcdefg"), ("dead", "x"),
                                ("failed", "")):
            with self.subTest(state=state):
                shown, after, pages = "", 0, 0
                while after is not None:
                    with mock.patch("queuectl.PAGE_JOBS", 3):
                        answer = self.ask("list", state=state, after=after)
                    after, pages = answer["next"], pages + 1
                    shown += "".join(job["id"] for job in answer["message"])
                self.assertEqual((shown, pages), (expected, len(expected) // 3 + 1))
        self.assertEqual([job["id"] for job in self.ask("dlq", "list")["message"]], ["x"])

    def test_a_write_asked_again_is_only_answered_again(self):
        request = {"command": "enqueue", "value": '{"command":"x"}', "once": "abc"}
        first = self.request(**request)
        self.assertEqual(self.request(**request), first)
        self.assertNotEqual(self.request(**dict(request, once="abd")), first)
        self.assertEqual(self.counts(), {"pending": 2})

    def test_the_originals_requests_are_understood(self):
        self.kill("a")
        for request, message in (
                ({"command": "enqueue", "option": None, "flag": None,
                  "value": '{"id":"b","command":"x"}'}, "Job enqueued"),
                ({"command": "config", "option": None, "flag": "max-retries", "value": "2"},
                 "Updated max-retries to 2"),
                ({"command": "config", "option": "get", "flag": "key", "value": "max-retries"}, 2),
                ({"command": "dlq", "option": "retry", "value": "a"}, "Job a added to queue"),
                ({"command": "list", "option": None, "flag": "--state", "value": "dead"}, []),
                ({"command": "dlq", "option": "list"}, []),
                ({"command": "worker", "option": "start", "flag": "count", "value": "3"},
                 "Started 3 workers"),
                ({"command": "worker", "option": "stop"}, "Stopped workers"),
                ({"command": "status"}, {"jobs": {"pending": 2, "processing": 0, "completed": 0,
                                                  "failed": 0, "dead": 0}, "workers": 0})):
            with self.subTest(request=request):
                answer = self.request(**request)
                self.assertEqual((answer["success"], answer["message"]), (True, message))

    def test_what_another_version_asks_for_in_vain_is_answered_with_both_versions(self):
        for request in ({"command": "fly"}, {"command": "status", "value": {"colour": 1}},
                        {"command": "show", "flag": "--colour", "value": "x"}):
            for version in ({}, {"version": "9.9"}):
                with self.subTest(request=request, version=version), \
                        self.assertRaises(queuectl.Failure) as caught:
                    queuectl.resolve(dict(request, **version))
                self.assertIn("(daemon: queuectl %s, request: %s)" % (
                    queuectl.VERSION, version.get("version", "unversioned")),
                    str(caught.exception))

    def test_bad_arguments_get_a_clear_error(self):
        for command, option, value, words in (
                ("fly", None, None, "unknown command"), ("list", "all", None, "unknown command"),
                ("list", ["x"], None, "unknown command"), ("\ud800", None, None, "unknown command"),
                ("status", None, "x", "takes no"), ("list", None, {"context": 1}, "takes no"),
                ("list", None, "odd", "field state"), ("list", None, {"state": []}, "field state"),
                ("list", None, {"after": "x"}, "field after"),
                ("list", None, {"limit": 3}, "takes no argument limit"),
                ("logs", None, {"limit": -1}, "field limit"),
                ("list", None, {"after": 2 ** 64}, "field after"),
                ("config", "get", "odd", "unknown setting"),
                ("config", "get", None, "unknown setting"),
                ("config", "get", {"key": ["timeout"]}, "unknown setting"),
                ("config", "set", {"key": {}, "value": 1}, "unknown setting"),
                ("config", "set", {"key": "timeout"}, "field timeout"),
                ("config", "set", {"key": "shell", "value": "\ud800"}, "field shell"),
                ("enqueue", None, None, "a job is a JSON"), ("enqueue", None, "x", "not JSON"),
                ("enqueue", None, {"job": {"command": "x"}, "cwd": 5}, "field cwd"),
                ("config", "set", {"key": "on-dead"}, "config unset"),
                ("show", None, {}, "no job None"), ("logs", None, "none", "no job none"),
                ("cancel", None, {"ids": ["a"], "state": "pending"}, "field state"),
                ("cancel", None, {"state": "dead"}, "field state"),
                ("cancel", None, {"state": "pending", "upto": "x"}, "field upto"),
                ("cancel", None, ["a"] * 1001, "1 to 1000"), ("cancel", None, 5, "name the jobs"),
                ("delete", None, {"state": "dead", "older_than": -1}, "field older_than"),
                ("delete", None, {"state": "failed"}, "field state"),
                ("delete", None, {"ids": ["a"], "state": "dead"}, "field state"),
                ("delete", None, {"state": "dead", "older_than": None}, "field older_than"),
                ("wait", None, "a", "ids must be"), ("wait", None, ["none"], "no job none"),
                ("pause", None, {"reason": {}}, "field reason"),
                ("daemon", "yield", {"kind": "daemon"}, "does not give way"),
                ("worker", "start", 0, "field count"), ("worker", "start", True, "field count"),
                ("worker", "start", "x", "field count"), ("worker", "start", 1001, "field count")):
            with self.subTest(command=command, option=option, value=value):
                self.refused(words, lambda: self.request(
                    command=command, option=option, value=value))
        self.assertEqual((self.counts(), self.store.wanted()), ({}, 0))


# ---- The daemon and its clients -----------------------------------------------------------------
# Daemons are real processes in a session of their own. Whatever a test leaves running is found
# by the directory in its environment, and killed.

FIFO_JOB = "echo started; read line < %s; echo $line"

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
    "Have hook(connection, sql, run) called for each statement."
    class Connection(sqlite3.Connection):
        def execute(self, sql, *values):
            return hook(self, sql, lambda: sqlite3.Connection.execute(self, sql, *values))
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **named: connect(*args, factory=Connection, **named)
"""

DRIVER = """
import marshal, os, signal, sqlite3, sys, types
queuectl = sys.modules["queuectl"] = types.ModuleType("queuectl")
queuectl.__file__ = sys.argv.pop(1)
with open(sys.argv.pop(1), "rb") as file:
    exec(marshal.load(file), vars(queuectl))
""" + TOOLS + """
%s
queuectl.prepare_stdio()
queuectl.leave(queuectl.main(sys.argv[1:]))
"""

# So that no test waits a second for a look, or for the end of a pause after trouble.
HASTE = "queuectl.LOOK_S = 0.1\n"


@functools.lru_cache()
def compiled():
    """The path of the program's code: to compile it takes most of a process's start."""
    fd, path = tempfile.mkstemp(prefix="queuectl-test-")
    atexit.register(os.unlink, path)
    with open(fd, "wb") as file:
        marshal.dump(compile(read(SCRIPT), SCRIPT, "exec"), file)
    return path


def driver(code):
    """The words that call the program as its script does, once `code` has changed it."""
    return [sys.executable, "-c", DRIVER % code, SCRIPT, compiled()]


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
    """A queue in a directory of its own, with what is needed to drive it."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="queuectl-test-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.addCleanup(self.kill_all)
        self.db = os.path.join(self.dir, "q.db")
        self.sock = os.path.join(self.dir, "s")
        self.env = dict(os.environ, DB_PATH=self.db, SOCKET_PATH=self.sock)
        for name in ("PYTHONPATH", "PYTHONUNBUFFERED"):  # users have buffers
            self.env.pop(name, None)
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
            daemon.wait()
            daemon.stdout.close()

    def cli(self, *args, stdin=""):
        """(exit status, stdout, stderr) of a command, run in this process."""
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        data = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        with mock.patch.dict(os.environ, self.env), mock.patch("sys.stdin", data), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = queuectl.main(list(args))
        out.flush()
        return code, out.buffer.getvalue().decode(), err.getvalue()

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

    def prints(self, *args, stdin=""):
        """The stdout of a command that must succeed."""
        code, out, err = self.cli(*args, stdin=stdin)
        self.assertEqual(code, 0, err)
        return out

    def show(self, job_id, *names):
        job = self.ok("show", job_id)
        return tuple(job[name] for name in names)

    def enqueue(self, command, **fields):
        """The id of a new job."""
        return self.ok("enqueue", json.dumps(dict(fields, command=command)))["id"]

    def spawn(self, *args, **options):
        """A command in a process of its own, with its stdout at hand."""
        options.setdefault("env", self.env)
        with open(compiled(), "rb") as code:  # as a daemon starts itself anew
            process = subprocess.Popen(
                [sys.executable, "-c", queuectl.LOADER, str(code.fileno()), SCRIPT] + list(args),
                pass_fds=[code.fileno()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True, **options)
        self.daemons.append(process)
        return process

    def daemon(self, *args, **options):
        """A daemon that is ready."""
        process = self.spawn("daemon", *args, **options)
        self.assertIn(b"ready", process.stdout.readline())
        return process

    def started(self, argv, ready=True, **options):
        """A process of any kind, killed in cleanup like all."""
        options.setdefault("env", self.env)
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   start_new_session=True, **options)
        self.daemons.append(process)
        if ready:
            self.assertIn(b"ready", process.stdout.readline())
        return process

    def driven(self, code, *args, ready=True):
        """A daemon that has run `code` before its start."""
        return self.started(driver(code) + ["daemon"] + list(args), ready)

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
        """Wait until so many jobs are in `state`, and begun if that is "processing": a daemon that
        dies just after its claim takes the order along."""
        wait_until(lambda: self.rows("SELECT COUNT(*) FROM jobs WHERE state = ?", state)
                   == [(count,)], "%d jobs are %s" % (count, state))
        if state == "processing":
            wait_until(lambda: self.begun() >= count, "%d commands run" % count)

    def begun(self):
        """The number of open attempts whose worker has noted its command."""
        noted = [queuectl.unpad(self.read("q.db-run/" + name).encode())
                 for name in os.listdir(self.path("q.db-run")) if name[0] == "w"]
        running = [serial for serial, in self.rows("SELECT serial FROM running")]
        return sum(record.get("phase") == "running" and record["serial"] in running
                   for record in noted)

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
        def through():
            with contextlib.suppress(OSError):  # nobody waits there yet
                with open(os.open(self.path(name), os.O_WRONLY | os.O_NONBLOCK), "w") as file:
                    return file.write("through\n")
        wait_until(through, "a job is at the gate")

    @contextlib.contextmanager
    def opened_by_a_wait(self, name="gate"):
        """Within it a command that waits opens the gate: one that does not leaves the job there."""
        closed, inner = [name], queuectl.Wait.__call__

        def wait(*args):
            if closed:
                self.open_gate(closed.pop())
            inner(*args)
        with mock.patch("queuectl.Wait.__call__", wait):
            yield

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


def handled(pid):
    """The signals that a process catches."""
    mask = int(re.search(rb"SigCgt:\s*(\w+)", read("/proc/%d/status" % pid)).group(1), 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


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

    def test_a_daemon_of_any_version_tells_how_many_lines_it_stored(self):
        answer = {"success": True, "message": "Enqueued 1 job"}
        with mock.patch("queuectl.Queue.call", return_value=answer):
            self.assertEqual(self.ok("enqueue", "-", stdin='{"command":"a"}\n' * 2),
                             dict(answer, already_queued=1))

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

    def test_a_read_only_database_is_refused_and_works_once_it_is_mended(self):
        self.enqueue("true")
        os.chmod(self.db, 0o400)
        self.assertIn("chmod u+w", self.refused("enqueue", '{"command":"true"}'))
        os.chmod(self.db, 0o600)
        self.enqueue("true")
        self.assertEqual(self.ok("status")["jobs"]["pending"], 2)

    def test_a_directory_that_is_missing_or_a_database_that_is_one_is_refused(self):
        for db, words in ((self.path("no/q.db"), "no directory"), (self.dir, "no file")):
            self.env["DB_PATH"] = db
            with self.subTest(db=db):
                self.assertIn(words, self.refused("enqueue", '{"command":"true"}'))
                self.assertIn(words, self.refused("status"))
        self.assertEqual(os.listdir(self.dir), [])

    def test_nothing_unescaped_reaches_a_terminal(self):
        evil = "\x1b[31m\u202e\u200b\r\x9b"
        self.enqueue("echo " + evil, id="a", env={"A": evil})
        for args in (("list",), ("enqueue", json.dumps({"command": ": " + evil})),
                     ("enqueue", evil), ("dlq", "retry", evil), ("config", "set", evil, "1"),
                     ("config", "set", "shell", evil), (evil,), ("list", "--state", evil)):
            with self.subTest(args=args):
                _, out, err = self.cli(*args)
                self.assertTrue(out or err)
                self.assertEqual([c for c in out + err if c != "\n" and not c.isprintable()], [])

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

    def test_a_queue_may_have_any_path_in_any_locale(self):
        env = dict(self.env, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        env.pop("DB_PATH")
        for name in (b"caf\xc3\xa9", b"caf\xe9", b"a %20?#'\"\n"):
            folder = os.fsencode(self.dir) + b"/" + name
            try:
                os.mkdir(folder)
            except OSError:
                self.skipTest("a file system that wants UTF-8")
            with self.subTest(name=name):
                self.assertEqual(subprocess.check_output(
                    [sys.executable, SCRIPT, b"--db", folder + b"/q.db", "run", "--", "pwd"],
                    env=env, cwd=folder, stderr=subprocess.DEVNULL), folder + b"\n")
                subprocess.check_output(
                    [sys.executable, SCRIPT, b"--db", b"q.db", "backup", b"copy-" + name], env=env,
                    cwd=folder)
                self.assertIn(b"copy-" + name, os.listdir(folder))

    def test_a_daemon_of_another_locale_is_seen_and_gives_way(self):
        os.mkdir(self.path(os.fsdecode(b"caf\xc3\xa9")))
        self.env["SOCKET_PATH"] = self.path(os.fsdecode(b"caf\xc3\xa9/s"))
        self.enqueue("sleep 1")
        self.spawn("drain", env=dict(self.env, LC_ALL="C.UTF-8"))
        self.wait_for("processing")
        other = dict(self.env, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        self.assertIn(b'"integrity"', self.spawn("doctor", env=other).communicate()[0])
        self.daemon(env=other)

    def patched(self, code, *args):
        """(exit status, stdout) of a command in a process that has run `code` before."""
        process = subprocess.Popen(
            [sys.executable, "-c", "import os, runpy, sys\n%s\nrunpy.run_path(sys.argv[0],"
             " run_name='__main__')" % code.replace("SCRIPT", repr(SCRIPT))] + list(args),
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        out = process.communicate()[0]
        return process.returncode, out

    def test_who_has_open_descriptors_needs_no_dev_null(self):
        code, out = self.patched("os.devnull = '/dev/none'; sys.argv[0] = SCRIPT", "config", "list")
        self.assertEqual(code, 0)
        self.assertIn(b"max-retries", out)

    def test_without_memory_for_a_traceback_it_ends_all_the_same(self):
        self.assertEqual(self.patched(
            "import argparse, atexit, traceback\n"
            "def fail(*args, **options): raise MemoryError\n"
            "argparse.ArgumentParser.parse_known_args = traceback.print_exc = fail\n"
            "atexit.register(print, 'would wait for workers'); sys.argv[0] = SCRIPT", "status"),
            (1, b""))

    def test_twenty_enqueues_at_once_all_find_the_lock(self):
        script = "for i in $(seq 20); do %s %s enqueue '{\"command\":\"true\"}' & done; wait" % (
            sys.executable, SCRIPT)
        subprocess.check_call(["/bin/sh", "-c", script], env=self.env, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
        self.assertEqual(self.ok("status")["jobs"]["pending"], 20)


class DaemonTest(QueueCase):
    """The daemon as its clients see it."""

    def test_a_second_daemon_is_refused_with_the_pid_of_the_first(self):
        first = self.daemon()
        self.assertIn("pid %d" % first.pid, self.refused("daemon"))
        self.assertEqual(self.ok("daemon", "status")["pid"], first.pid)

    @unittest.skipUnless(os.path.isdir("/proc/self"), "needs /proc")
    def test_it_runs_from_its_compiled_code_unless_isolated(self):
        daemon = self.started([sys.executable, SCRIPT, "daemon"])
        self.assertIn(b"FROM_CODE", read("/proc/%d/cmdline" % daemon.pid))
        self.kill(daemon)
        isolated = self.started([sys.executable, "-I", SCRIPT, "daemon"])
        self.assertNotIn(b"FROM_CODE", read("/proc/%d/cmdline" % isolated.pid))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
    def test_workers_that_have_gone_leave_no_descriptors(self):
        daemon = self.daemon("--workers", "3")

        def descriptors():
            return len(os.listdir("/proc/%d/fd" % daemon.pid))
        before = descriptors()
        for _ in range(5):
            self.ok("worker", "stop")
            self.ok("worker", "start", "--count", "3")
        wait_until(lambda: descriptors() <= before, "they are closed", 5)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
    def test_workers_that_can_not_be_forked_leave_no_descriptors(self):
        spool = queuectl.Spool(self.db)
        os.mkdir(spool.path, 0o700)
        loop = queuectl.Loop()
        self.addCleanup(loop.selector.close)
        told = []
        pool = queuectl.Pool(spool, loop, lambda text, every_s: told.append(text), 1024)
        before = os.listdir("/proc/self/fd")
        with mock.patch("os.fork", side_effect=BlockingIOError):
            self.assertFalse(pool.start_worker(0) or pool.start_worker(0))
        self.assertEqual(os.listdir("/proc/self/fd"), before)
        self.assertEqual(told, ["can't start a worker: "] * 2)

    def test_a_daemon_that_nobody_listens_to_still_starts_workers(self):
        # This command is gone once it is done, and with it the other end of the daemon's stderr.
        subprocess.check_call([sys.executable, SCRIPT, "worker", "start"], env=self.env,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.enqueue("false", max_retries=1)
        self.wait_for("dead")
        wait_until(lambda: "job dead" in self.read("q.db.log"), "the log tells")
        self.ok("worker", "start")
        wait_until(lambda: self.ok("status")["workers"] == 2, "there are two")

    def test_a_stderr_that_nobody_empties_stops_nothing(self):
        ours, theirs = os.pipe()
        self.addCleanup(os.close, ours)
        os.set_blocking(theirs, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(theirs, b"x" * 512)
        os.set_blocking(theirs, True)
        daemon = subprocess.Popen([sys.executable, SCRIPT, "daemon", "--workers", "1"],
                                  env=self.env, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        self.daemons.append(daemon)
        ready, _, _ = select.select([daemon.stdout], [], [], 10)
        self.assertTrue(ready)
        self.enqueue("false", max_retries=1)
        wait_until(lambda: "job dead" in self.read("q.db.log"), "the log tells")
        self.ok("daemon", "stop")

    def test_a_stop_waits_for_the_lock_whatever_proc_says_of_the_pid(self):
        # "": no /proc; the other: in another container that number is a process that stays, and
        # the clock shortens the second in which it might go.
        for started in ("", "another"):
            self.daemon("--workers", "1")
            job_id = self.enqueue(self.gate("gate" + started))
            self.wait_for("processing")
            with self.subTest(started=started), self.opened_by_a_wait("gate" + started), \
                    mock.patch("queuectl.monotonic", lambda: 10 * time.monotonic()), \
                    mock.patch("queuectl.process_start", return_value=started):
                self.ok("daemon", "stop")
                self.assertEqual(self.rows("SELECT state FROM jobs WHERE id = ?", job_id),
                                 [("completed",)])

    def test_a_stop_by_socket_alone_waits_for_a_daemon_of_any_version(self):
        self.daemon("--workers", "1")
        del self.env["DB_PATH"]
        self.enqueue(self.gate())
        self.wait_for("processing")
        ask = queuectl.ask

        def without_db(*args):
            return {name: value for name, value in ask(*args).items() if name != "db"}
        with mock.patch("queuectl.ask", without_db), self.opened_by_a_wait():
            self.ok("daemon", "stop")
        self.assertEqual(self.rows("SELECT state FROM jobs"), [("completed",)])

    def test_the_socket_is_private_and_a_stale_one_is_replaced(self):
        first = self.daemon()
        self.assertEqual(os.stat(self.sock).st_mode & 0o777, 0o600)
        self.kill(first)
        self.assertTrue(os.path.exists(self.sock))
        self.daemon()
        self.assertEqual(self.ok("status")["workers"], 0)

    def test_a_daemon_outlives_its_sockets_directory(self):
        folder = os.path.join(self.dir, "d")
        os.mkdir(folder)
        self.sock = self.env["SOCKET_PATH"] = os.path.join(folder, "s")
        daemon = self.driven(HASTE)
        shutil.rmtree(folder)

        def logged():
            with open(self.db + ".log") as log:
                return "can't listen again" in log.read()
        wait_until(logged, "it says so")
        os.mkdir(folder)
        wait_until(lambda: os.path.exists(self.sock), "it listens again")
        self.assertEqual(self.ok("daemon", "status")["pid"], daemon.pid)

    def test_a_removed_socket_comes_back(self):
        self.driven(HASTE)
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
        for data in (b"garbage", b"[1]", b'{"command":"sta'):
            with self.subTest(data=data):
                self.assertIs(self.ask(data, close=True)["success"], False)
        self.assertIn("nested", self.ask(b'{"a":' * 100000 + b"1" + b"}" * 100000)["message"])
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

    def test_many_pipelined_requests_are_answered_in_order(self):
        self.daemon()
        lines = "".join('{"command":"echo %s"}\n' % ("x" * 3000) for _ in range(900))
        self.ok("enqueue", "-", stdin=lines)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(self.sock)
            client.sendall(b"\n" * 5000 + b'{"command":"list"}\n'
                           + b'{"command":"status"}\n' * 2000)
            client.shutdown(socket.SHUT_WR)
            answers = [json.loads(line)["message"] for line in client.makefile("r")]
        self.assertEqual([len(answers[0]), len(answers)], [900, 2001])
        self.assertEqual(answers[-1]["jobs"]["pending"], 900)

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

    def test_a_client_that_stops_reading_a_long_answer_holds_nobody_up(self):
        self.daemon()
        lines = "".join('{"command":"echo %s"}\n' % ("x" * 3000) for _ in range(1000))
        self.ok("enqueue", "-", stdin=lines)
        with socket.socket(socket.AF_UNIX) as slow:
            slow.connect(self.sock)
            slow.sendall(b'{"command":"list"}\n')
            self.assertEqual(self.ok("status")["jobs"]["pending"], 1000)
            self.assertEqual(len(json.loads(slow.makefile("r").readline())["message"]), 1000)

    def test_two_hundred_enqueues_at_once_are_all_served(self):
        self.daemon()
        data = json.dumps({"command": "enqueue", "value": '{"command":"true"}'}).encode()
        clients = [socket.socket(socket.AF_UNIX) for _ in range(200)]
        for client in clients:
            self.addCleanup(client.close)
            client.connect(self.sock)
            client.settimeout(30)
        for client in clients:
            client.sendall(data)
        answers = {client.makefile("r").readline() for client in clients}
        self.assertEqual({json.loads(answer)["message"] for answer in answers}, {"Job enqueued"})
        self.assertEqual(len(answers), 200)
        self.assertEqual(self.ok("status")["jobs"]["pending"], 200)

    def test_a_lost_answer_is_given_again(self):
        self.daemon()
        request = json.dumps({"command": "enqueue", "value": '{"command":"true"}',
                              "once": "abc"}).encode() + b"\n"
        self.assertEqual(self.ask(request), self.ask(request))
        self.assertEqual(len(self.jobs()), 1)

    def test_rows_of_another_program_are_noticed_within_a_second(self):
        self.driven(HASTE, "--workers", "1")
        self.rows("INSERT INTO jobs (id, command) VALUES ('theirs', 'true')")
        self.rows("INSERT INTO jobs (id, command, run_after) VALUES (NULL, 'true', 'never')")
        self.wait_for("completed")
        self.wait_for("dead")
        dead, = self.jobs("dead")
        self.assertIn("run_after", dead["error"])
        self.assertTrue(dead["id"])

    def test_bytes_in_a_row_of_another_program_end_no_daemon(self):
        self.driven(HASTE)
        self.rows("INSERT INTO jobs (id, command, created_at, run_after)"
                  " VALUES ('theirs', 'true', 'never', X'00')")
        self.wait_for("dead")
        self.assertIn("created_at", self.show("theirs", "error")[0])
        self.rows("UPDATE jobs SET updated_at = X'00'")
        for listed in (("list",), ("list", "--format", "jsonl"), ("show", "theirs")):
            self.assertIn('"theirs"', self.prints(*listed))
        self.ok("daemon", "status")

    def test_states_set_by_another_program_are_heeded(self):
        for job in "abc":
            self.enqueue("echo %s >> %s" % (job, self.path("log")), id=job)
        self.rows("UPDATE jobs SET state = 'dead' WHERE id = 'a'")
        self.rows("UPDATE jobs SET state = 'completed' WHERE id = 'b'")
        self.rows("UPDATE jobs SET command = 'echo changed >> %s' WHERE id = 'c'"
                  % self.path("log"))
        self.driven(HASTE, "--workers", "1")
        self.wait_for("completed", 2)
        self.assertEqual(self.read("log"), "changed\n")
        self.rows("UPDATE jobs SET state = 'pending', attempts = 0 WHERE id = 'a'")
        self.wait_for("completed", 3)
        self.assertEqual(self.read("log"), "changed\na\n")

    def test_a_daemon_starts_while_another_program_has_the_write_lock(self):
        self.enqueue("true")
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            daemon = self.spawn("daemon", "--workers", "1")
            wait_until(lambda: '"kind":"daemon"' in self.read("q.db.lock"), "it has the lock")
            self.assertIsNone(daemon.poll())
            other.execute("COMMIT")
        self.assertIn(b"ready", daemon.stdout.readline())
        self.wait_for("completed")

    def test_an_emptied_database_stops_the_daemon_without_an_answer(self):
        daemon = self.daemon()
        os.truncate(self.db, 0)
        code, out, _ = self.cli("enqueue", '{"command":"true"}')
        self.assertEqual((code, out), (1, ""))
        self.assertEqual(daemon.wait(30), 1)

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
        daemon = self.driven(HASTE, "--workers", "2")
        os.rename(self.db, self.db + ".moved")
        self.assertEqual(daemon.wait(30), 1)
        self.assertIn("was removed", self.read("q.db.log"))

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

    def test_what_a_daemon_of_another_version_leaves_out_is_no_traceback(self):
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as client:
                        if client.recv(65536):
                            client.sendall(b'{"success":true,"message":{"jobs":{}}}\n')
        server = socket.socket(socket.AF_UNIX)
        server.bind(self.sock)
        server.listen(5)
        thread = threading.Thread(target=serve)
        for ended in (server.close, thread.join, lambda: server.shutdown(socket.SHUT_RDWR)):
            self.addCleanup(ended)
        thread.start()
        del self.env["DB_PATH"]
        for words, lacking in (("enqueue -q -- true", "id"), ("cancel a", "count"),
                               ("daemon stop", "db"), ("status --watch", "totals"),
                               ("metrics --format prometheus", "jobs_enqueued")):
            with self.subTest(words=words):
                self.assertIn("answer lacks %s, which queuectl %s" % (
                    lacking, queuectl.VERSION), self.refused(*words.split()))

    def test_with_nothing_given_another_queue_at_the_default_socket_is_mentioned(self):
        self.daemon()
        place = queuectl.Place(self.path("new.db"), False, queuectl.DEFAULT_SOCKET, False)
        said = []
        queue = queuectl.Queue(place, said.append)
        with mock.patch("queuectl.DEFAULT_SOCKET", self.sock):
            queue.call("status")
            self.assertIn("export DB_PATH=" + self.db, said[0])
            with self.assertRaisesRegex(queuectl.Failure, "does not exist.*DB_PATH"):
                queue.call("enqueue", job='{"command":"true"}')
            self.assertEqual([name for name in os.listdir(self.dir) if "new" in name], [])

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
        end = time.monotonic() + 2
        wait_until(lambda: time.monotonic() > end, "two seconds have passed")
        woken = [late - early for early, late in zip(before, switches())]
        self.assertLessEqual(woken[0], 9)
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
        self.driven("queuectl.GRACE_S = 0.2", "--workers", "1")
        self.enqueue("trap '' TERM; sleep 300 & setsid sleep 300 & echo up; wait; sleep 300",
                     timeout=300)
        self.wait_for("dead")
        self.assertIn("timed out after 300 ms", self.jobs()[0]["error"])
        sleeping = subprocess.Popen(["pgrep", "-f", "^sleep 300$"], stdout=subprocess.PIPE)
        pids = [int(pid) for pid in sleeping.communicate()[0].split()]
        self.assertEqual(set(pids) & set(processes_of(self.dir)), set())

    def test_the_longest_timeout_is_waited_for(self):
        self.daemon("--workers", "1")
        job = self.enqueue("true", timeout=queuectl.MAX_MS, max_retries=1)
        self.ok("wait", job)

    def test_output_is_bounded_and_kept_across_retries(self):
        self.ok("config", "set", "output-limit", "10")
        self.ok("config", "set", "max-delay", "1ms")
        self.daemon("--workers", "1")
        self.enqueue("seq 1000 >&2; echo end $QUEUECTL_ATTEMPT; exit 1", max_retries=2)
        self.wait_for("dead")
        self.assertEqual([(output, dropped > 3000) for output, dropped in self.rows(
            "SELECT output, dropped FROM attempts")], [(b"000\nend 1\n"[-10:], True),
                                                       (b"000\nend 2\n"[-10:], True)])

    def test_output_comes_in_order_and_a_chatty_job_can_not_fill_the_disk(self):
        self.daemon("--workers", "2")
        self.enqueue("echo one; echo two >/dev/stderr; echo three", id="order")
        self.enqueue("yes", id="chatty", timeout=700, max_retries=1)
        self.enqueue("(read line < %s; echo late; echo later) & echo soon" % self.path("gate"),
                     id="background")
        os.mkfifo(self.path("gate"))
        self.wait_for("completed", 2)
        largest = [0]

        def dead():
            for name in os.listdir(self.db + "-run"):
                with contextlib.suppress(FileNotFoundError):
                    largest.append(os.stat(self.path("q.db-run/" + name)).st_size)
            return self.jobs("dead")
        wait_until(dead, "the chatty job is stopped")
        self.assertLessEqual(max(largest), queuectl.MIN_RUN_FILE + 65536)
        outputs = {job: (output, dropped) for job, output, dropped in self.rows(
            "SELECT job, output, dropped FROM attempts")}
        self.assertEqual(outputs["order"], (b"one\ntwo\nthree\n", 0))
        self.assertEqual(outputs["background"], (b"soon\n", 0))
        self.assertEqual(len(outputs["chatty"][0]), 65536)
        self.assertGreater(outputs["chatty"][1], queuectl.MIN_RUN_FILE)

    def test_a_stop_waits_for_running_jobs(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue(self.gate())
        self.wait_for("processing")
        self.enqueue("true")
        daemon.terminate()
        wait_until(lambda: self.ok("daemon", "status")["stopping"], "the daemon is stopping")
        self.assertIn("the daemon is stopping; try again", self.refused("worker", "start"))
        self.open_gate()
        self.assertEqual(daemon.wait(30), 0)
        self.assertEqual(self.ok("status")["jobs"], {"pending": 1, "processing": 0, "completed": 1,
                                                     "failed": 0, "dead": 0})

    def test_a_job_given_back_is_run_by_a_worker_that_came_meanwhile(self):
        self.daemon("--workers", "1")
        job_id = self.enqueue("[ -e %(dir)s/again ] && exit; trap 'sleep 0.3; touch %(dir)s/again;"
                              " exit 1' TERM; touch %(dir)s/began; while :; do sleep 0.02; done"
                              % {"dir": self.dir}, timeout=0)
        wait_until(lambda: os.path.exists(self.path("began")), "it runs")
        self.ok("worker", "stop", "--now")
        self.ok("worker", "start")
        wait_until(lambda: self.job(job_id)["state"] == "completed", "it has run again")
        self.assertEqual(self.job(job_id)["attempts"], 1)

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
        self.ok("config", "set", "max-delay", "1ms")
        daemon = self.daemon("--workers", "4")
        escapes = ("exec >/dev/null 2>&1", "exec 3>&- 4>&- 5>&- 6>&- 7>&-", "kill -STOP $$",
                   "setsid sleep 300; :")
        for number, escape in enumerate(escapes):
            self.enqueue("echo $$ >> %s; test $QUEUECTL_ATTEMPT = 2 && exit 0; %s; sleep 300" % (
                self.path("probe%d" % number), escape), timeout=0)
        wait_until(lambda: all(self.read("probe%d" % n).strip() for n in range(4)), "all run")
        for worker in self.workers_of(daemon):
            os.kill(worker, signal.SIGKILL)
        self.wait_for("completed", 4)
        for number, escape in enumerate(escapes):
            with self.subTest(escape=escape):
                first, second = map(int, self.read("probe%d" % number).split())
                self.assertEqual(queuectl.process_start(first), "")
                self.assertNotEqual(first, second)
        self.assertEqual(self.rows("SELECT attempts, error FROM jobs"), [(2, None)] * 4)
        self.assertEqual(self.rows("SELECT error FROM attempts WHERE number = 1"),
                         [("worker lost",)] * 4)

    def test_a_worker_killed_before_its_next_order_costs_nothing(self):
        daemon = self.driven(HASTE, "--workers", "1")
        self.enqueue(self.gate())
        self.wait_for("processing")
        second = self.enqueue("true")
        worker, = self.workers_of(daemon)
        os.kill(daemon.pid, signal.SIGSTOP)
        self.open_gate()
        wait_until(lambda: '"ended"' in self.read("q.db-run/w.1"), "the outcome is noted")
        os.kill(worker, signal.SIGKILL)
        os.kill(daemon.pid, signal.SIGCONT)
        self.wait_for("completed", 2)
        self.assertEqual(self.job(second)["attempts"], 1)

    def test_a_running_jobs_row_changed_by_another_program_runs_once_at_a_time(self):
        self.driven(HASTE, "--workers", "2")
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


class ToolkitTest(QueueCase):
    """What operators reach for, with a daemon and without one."""

    def test_flags_and_an_argv_make_a_job(self):
        job_id = self.prints("enqueue", "-q", "--id", "a", "--priority", "-5", "--timeout", "2h",
                             "--max-retries", "7", "--cwd", "/", "--env", "A=1", "B=x=y", "--env",
                             "C=", "--unique", "k", "--", "printf", "%s|", "a b", "it's", "--", "*")
        self.assertEqual(job_id, "a\n")
        self.assertEqual(
            self.show("a", "priority", "timeout", "max_retries", "cwd", "env", "unique", "command"),
            (-5, 7200000, 7, "/", {"A": "1", "B": "x=y", "C": ""}, "k",
             """printf '%s|' 'a b' 'it'"'"'s' -- '*'"""))
        self.ok("enqueue", "--id", "b", "--", "echo $HOME; true")
        self.ok("enqueue", "--id", "c", "--at", "2026-01-15T12:30:00+02:00", "--", "true")
        self.assertEqual(self.show("b", "command"), ("echo $HOME; true",))
        self.assertEqual(self.show("c", "run_after"), (STAMP,))
        self.ok("enqueue", "--id", "d", "--delay", "1h", '{"command":"x","id":"e","priority":3}')
        self.assertEqual(self.show("d", "priority", "command"), (3, "x"))
        created, run_after = map(queuectl.parse_date, self.show("d", "created_at", "run_after"))
        self.assertLess(abs(run_after - created - 3600000), 5000)
        self.ok("enqueue", "--priority", "9", "-", stdin='{"id":"f","command":"x"}\n')
        self.assertEqual(self.show("f", "priority"), (9,))

    def test_wrong_flags_are_refused(self):
        for words, *args in (
                ("needs a unit", "--timeout", "30", "--", "x"), ("a job is missing",),
                ("one command", "--"), ("one command", "{}", "--", "x"),
                ("NAME=VALUE", "--env", "A", "--", "x"), ("date-time", "--at", "noon", "--", "x"),
                ("can't both", "--at", STAMP, "--delay", "1s", "--", "x"),
                ("invalid int", "--priority", "high", "--", "x")):
            with self.subTest(args=args):
                self.assertIn(words, self.refused("enqueue", *args, status=2))
        self.assertIn("after --", self.refused("run", "true", status=2))
        self.assertIn("enqueue -- make", self.refused("enqueue", "make"))
        self.assertIn("a command goes after --", self.refused("enqueue", "ls", "-l", status=2))
        self.assertIn("known are worker start", self.refused("worker", status=2))
        self.assertNotIn("--state", self.refused("dlq", "retry", status=2))
        self.assertIn("--state S", self.refused("cancel", status=2))
        self.assertIn("--all", self.refused("delete", "a", "--all", status=2))
        self.assertFalse(os.path.exists(self.db))
        self.assertIn("field priority", self.refused("enqueue", "--priority", "5000", "--", "x"))

    def test_lists_come_in_every_format(self):
        self.assertEqual(self.prints("list", "--json"), "[]\n")
        self.assertEqual((self.prints("list", "-q"), self.prints("list", "--format", "jsonl")),
                         ("", ""))
        self.enqueue("echo \x1b[2J", id="a")
        self.enqueue("true", id="b", priority=7)
        jobs = self.ok("list")
        self.assertEqual([job["id"] for job in jobs], ["a", "b"])
        self.assertEqual(self.ok("list", "--json"), jobs)
        lines = self.prints("list", "--format", "jsonl").splitlines()
        self.assertEqual([json.loads(line) for line in lines], jobs)
        self.assertEqual(self.prints("list", "-q"), "a\nb\n")
        table = [line.split() for line in self.prints("list", "--format", "table").splitlines()]
        self.assertEqual(table[0], "ID STATE PRIORITY ATTEMPTS UPDATED_AT ERROR COMMAND".split())
        self.assertEqual([row[:4] + row[5:] for row in table[1:]],
                         [["a", "pending", "0", "0", "-", "echo", "\\x1b[2J"],
                          ["b", "pending", "7", "0", "-", "true"]])
        self.assertEqual(self.ok("worker", "list"), [])

    def test_show_tells_what_a_job_waits_for(self):
        self.enqueue("true", id="later", run_after="2100-01-01")
        self.enqueue("true", id="now")
        self.assertEqual(self.show("later", "waiting_for"), ("its time, 2100-01-01T00:00:00.000Z",))
        self.assertIn("worker start", self.show("now", "waiting_for")[0])
        self.ok("pause", "--reason", "disk swap")
        self.assertIn("resume", self.show("now", "waiting_for")[0])
        self.daemon("--workers", "1")
        self.ok("resume")
        self.wait_for("completed")
        (waits, history), = [self.show("now", "waiting_for", "history")]
        self.assertEqual((waits, [(one["number"], one["exit_code"], one["error"])
                                  for one in history]), (None, [(1, 0, None)]))
        self.assertIn("no job none; see: list", self.refused("show", "none"))

    def test_where_no_worker_runs_a_run_is_refused_and_an_enqueue_warned(self):
        self.daemon("--workers", "1")
        self.ok("worker", "stop")
        code, _, err = self.cli("enqueue", "--id", "a", "--", "true")
        self.assertEqual(code, 0)
        self.assertIn("no worker runs; start one with: worker start\n", err)
        self.assertIn("no worker runs; start one with: worker start; job b cancelled",
                      self.refused("run", "--quiet", "--id", "b", "--", "true"))
        self.assertEqual((self.show("a", "state"), self.show("b", "state", "error")),
                         (("pending",), ("dead", "cancelled")))
        self.ok("worker", "start")
        self.assertEqual(self.prints("run", "--quiet", "--", "true"), "")

    def test_a_pause_starts_nothing_new_and_outlives_the_daemon(self):
        daemon = self.daemon("--workers", "2")
        self.enqueue(self.gate(), id="runs")
        self.wait_for("processing")
        self.ok("pause", "--reason", "disk swap")
        self.assertEqual(self.ok("status")["paused"], "disk swap")
        code, _, err = self.cli("enqueue", "--id", "waits", "--", "true")
        self.assertEqual(code, 0)
        self.assertIn("the queue is paused (disk swap)", err)
        self.open_gate()
        self.wait_for("completed")
        self.kill(daemon)
        self.daemon()
        self.assertEqual((self.ok("status")["paused"], self.show("waits", "state")),
                         ("disk swap", ("pending",)))
        self.ok("resume")
        self.wait_for("completed", 2)
        self.assertNotIn("paused", self.ok("status"))

    def test_cancel_ends_waiting_and_running_jobs(self):
        self.enqueue("true", id="waits", run_after="2100-01-01")
        self.assertIn("Job waits cancelled", self.prints("cancel", "waits"))
        self.assertEqual(self.show("waits", "state", "error"), ("dead", "cancelled"))
        self.daemon("--workers", "1")
        self.enqueue("sleep 60 & echo $! >pid; wait", id="runs", timeout=0, cwd=self.dir)
        wait_until(lambda: self.read("pid"), "it runs")
        for _ in range(2):
            self.enqueue("true", run_after="2100-01-01")
        self.assertIn("3 jobs would be", self.prints("cancel", "--all", "--dry-run"))
        self.prints("cancel", "--all")
        self.assertEqual(self.show("runs", "state", "error", "attempts"), ("dead", "cancelled", 1))
        self.assertEqual(queuectl.process_start(int(self.read("pid"))), "")
        self.assertEqual(self.ok("status")["jobs"]["dead"], 4)
        self.assertIn("is dead, not pending or failed or processing", self.refused("cancel", "runs"))

    def test_an_acknowledged_cancel_outlives_everything(self):
        daemon = self.daemon("--workers", "1")
        self.enqueue("sleep 60", id="a", timeout=0)
        self.wait_for("processing")
        worker, = self.workers_of(daemon)
        os.kill(worker, signal.SIGSTOP)  # so that it can't stop the job before its death
        self.assertTrue(self.ask(b'{"command":"cancel","value":"a"}\n')["success"])
        self.kill(daemon)
        os.kill(worker, signal.SIGKILL)
        self.daemon()
        self.wait_for("dead")
        self.assertEqual(self.show("a", "error", "attempts"), ("cancelled", 1))

    def test_the_job_of_a_dead_daemons_worker_can_be_cancelled(self):
        for restart, trap, grace_s in ((False, "", 0.2), (True, "exit 0", 30)):
            code = "queuectl.GRACE_S = %g" % grace_s
            with self.subTest(restart=restart), mock.patch(
                    "queuectl.call_of", return_value=driver(code)[1:]):
                daemon = self.driven(code, "--workers", "1")
                job = self.enqueue("trap '%s' TERM; echo ready; while :; do sleep 0.1; done" % trap,
                                   timeout=0)
                follower = self.spawn("logs", "-f", job)
                self.assertEqual(follower.stdout.readline(), b"ready\n")
                self.kill(follower)
                self.kill(daemon)
                if restart:
                    daemon = self.driven(code, "--workers", "1")
                self.prints("cancel", job)
                self.assertEqual(self.show(job, "state", "error"), ("dead", "cancelled"))
                self.kill(daemon)

    def test_finished_jobs_are_deleted_and_purged(self):
        self.daemon("--workers", "1")
        self.ok("config", "set", "max-retries", "1")
        for name, command in (("a", "true"), ("b", "false"), ("c", "true"), ("d", "echo d; false")):
            self.enqueue(command, id=name)
        self.enqueue("true", id="e", run_after="2100-01-01")
        self.wait_for("completed", 2)
        self.wait_for("dead", 2)
        self.assertIn("job e is pending", self.refused("delete", "a", "e"))
        self.assertIn("2 jobs would be", self.prints("delete", "a", "b", "--dry-run"))
        self.assertIn("0 jobs deleted", self.prints("purge", "--older-than", "1h"))
        self.assertIn("2 jobs would be", self.prints("purge", "--dry-run"))
        self.assertEqual(len(self.jobs()), 5)
        self.assertIn("Job b deleted", self.prints("delete", "b"))
        self.assertIn("2 jobs deleted", self.prints("purge"))
        self.assertIn("1 job deleted", self.prints("delete", "--all"))
        self.assertEqual(([job["id"] for job in self.jobs()],
                          self.rows("SELECT COUNT(*) FROM attempts")), (["e"], [(0,)]))

    def test_large_selections_go_page_by_page(self):
        count = queuectl.PAGE_JOBS * 2 + 7
        self.ok("enqueue", "-", stdin='{"command":"true"}\n' * count)
        self.assertIn("%d jobs cancelled" % count, self.prints("cancel", "--state", "pending"))
        self.assertIn("%d jobs added" % count, self.prints("dlq", "retry", "--all"))
        self.prints("cancel", "--all")
        self.assertIn("%d jobs deleted" % count, self.prints("purge", "--state", "dead"))
        self.assertEqual(self.jobs(), [])

    def test_a_retry_of_all_leaves_out_whose_key_is_held(self):
        for name in "ab":
            self.enqueue("x", id=name, unique="k")
            self.prints("cancel", name)
        code, out, err = self.cli("dlq", "retry", "--all")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("job b can't be retried: its unique key is held by job a; wait for that", err)
        self.assertIn("1 job added to queue, 1 refused", err)
        self.assertEqual((self.show("a", "state"), self.show("b", "state")),
                         (("pending",), ("dead",)))

    def test_a_death_enqueues_the_on_dead_line_but_its_own_does_not(self):
        self.daemon("--workers", "1")
        self.ok("config", "set", "max-retries", "1")
        self.ok("config", "set", "on-dead", 'echo "$QUEUECTL_DEAD_ID, $QUEUECTL_DEAD_ERROR: '
                '$QUEUECTL_DEAD_COMMAND" >>"%s"; exit 3' % self.path("mail"))
        self.enqueue("exit 7", id="a")
        self.wait_for("dead", 2)
        self.enqueue("true", id="b", run_after="2100-01-01")
        self.prints("cancel", "b")
        self.wait_for("dead", 4)
        self.assertEqual(self.read("mail"), "a, exit 7: exit 7\nb, cancelled: true\n")
        self.ok("config", "unset", "on-dead")
        self.assertEqual(self.ok("config", "get", "on-dead"), "")
        self.enqueue("exit 7")
        self.wait_for("dead", 5)
        self.assertEqual(len(self.jobs()), 5)

    def test_wait_tells_how_jobs_ended(self):
        self.daemon("--workers", "2")
        self.enqueue("true", id="good")
        self.enqueue("exit 7", id="bad", max_retries=1)
        self.enqueue("kill -9 $$", id="killed", max_retries=1)
        self.enqueue("true", id="later", run_after="2100-01-01")
        self.assertEqual(self.ok("wait", "good")["message"], "1 job completed")
        self.assertIn("job bad died: exit 7; see: logs bad", self.refused("wait", "bad", status=7))
        self.assertIn("killed by SIGKILL", self.refused("wait", "killed", status=125))
        self.assertIn("1 job died", self.refused("wait", "good", "bad"))
        self.assertIn("no job none", self.refused("wait", "good", "none"))
        self.assertIn("0 of 1 job", self.refused("wait", "later", "--timeout", "50ms", status=124))
        self.prints("cancel", "later")
        self.assertEqual(self.ok("wait")["message"], "Queue is empty")

    def test_logs_are_the_bytes_of_each_attempt(self):
        self.daemon("--workers", "1")
        self.ok("config", "set", "max-delay", "1ms")
        os.mkfifo(self.path("gate"))
        self.enqueue(r"printf '\377\000%%s\r\n' $QUEUECTL_ATTEMPT; read line <%s; exit 1"
                     % self.path("gate"), id="a", max_retries=2)
        self.assertIn("no job none", self.refused("logs", "none"))
        process = self.spawn("logs", "-f", "a")
        for line in (b"\xff\0001\r\n", b"\xff\0002\r\n"):
            self.assertEqual(process.stdout.readline(), line)
            self.open_gate()
        self.assertEqual((process.communicate()[0], process.returncode), (b"", 0))
        self.assertEqual(self.spawn("logs", "a", "--attempt", "1").communicate()[0],
                         b"\xff\0001\r\n")
        self.assertIn("no such attempt", self.refused("logs", "a", "--attempt", "3"))
        self.enqueue("true", id="b", run_after="2100-01-01")
        self.assertIn("logs -f b", self.refused("logs", "b"))
        self.prints("cancel", "b")
        self.assertIn("never ran; see: show b", self.refused("logs", "b"))

    def test_following_is_live_and_exact_even_when_output_is_cut(self):
        self.daemon("--workers", "1")
        self.ok("config", "set", "output-limit", "1000")
        os.mkfifo(self.path("gate"))
        self.enqueue("echo first; read line <%s; seq 400000" % self.path("gate"), id="a", timeout=0)
        process = subprocess.Popen([sys.executable, SCRIPT, "logs", "-f", "a"], env=self.env,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(process.stdout.readline(), b"first\n")
        self.open_gate()
        shown, notes = process.communicate()
        cut = sum(int(line.split()[0]) for line in notes.splitlines() if b"were cut" in line)
        whole = b"".join(b"%d\n" % number for number in range(1, 400001))
        self.assertEqual(len(shown) + cut, len(whole))
        self.assertTrue(whole.endswith(shown[-900:]))

    def test_run_hands_on_output_and_exit_code_without_a_daemon(self):
        process = self.spawn("run", "--max-retries", "1", "--", "echo out; echo err >&2; exit 5")
        self.assertEqual((process.communicate()[0], process.returncode), (b"out\nerr\n", 5))
        self.assertEqual(self.prints("run", "--quiet", "--", "echo", "quiet"), "")
        code, out, err = self.cli("run", "--quiet", "--max-retries", "1", "--", "echo why; exit 6")
        self.assertEqual((code, out), (6, "why\n"))
        self.assertRegex(err, "^job \\S+ died: exit 6; see: logs \\S+\n$")
        self.enqueue("true", id="other")
        self.ok("run", "--", "true")
        self.assertEqual(self.show("other", "state"), ("pending",))  # nobody else's job is worked

    def test_a_held_key_is_named_and_its_holder_worked_if_nobody_does(self):
        self.enqueue(self.gate(), id="holder", unique="k", timeout=0)  # what a dead `run` left
        self.assertEqual(self.cli("run", "--quiet", "--unique", "k", "--", "true"), (0, "", ""))
        self.wait_for("processing")
        self.assertIn("job holder", self.cli("run", "--unique", "k", "--", "true")[2])
        self.open_gate()
        self.wait_for("completed")
        self.assertEqual(len(self.jobs()), 1)

    def test_runs_at_once_share_a_temporary_daemon_and_give_way_to_a_real_one(self):
        runs = [self.spawn("run", "--timeout", "0s", "--", self.gate(name)) for name in "ab"]
        for run in runs:
            self.assertEqual(run.stdout.readline(), b"started\n")
        daemon = self.daemon("--workers", "1")
        self.assertEqual(self.ok("status")["jobs"]["processing"], 2)
        for name, run in zip("ab", runs):
            self.open_gate(name)
            self.assertEqual((run.communicate()[0], run.returncode), (b"through\n", 0))
        self.assertEqual(self.rows("SELECT MAX(runs), MAX(attempts) FROM jobs"), [(1, 1)])
        self.assertIsNone(daemon.poll())

    def test_a_run_goes_on_when_its_daemon_dies(self):
        run = self.spawn("run", "--timeout", "0s", "--", self.gate())
        self.assertEqual(run.stdout.readline(), b"started\n")
        os.kill(json.loads(self.read("q.db.lock"))["pid"], signal.SIGKILL)
        self.open_gate()
        self.assertEqual((run.communicate()[0], run.returncode), (b"through\n", 0))

    def test_an_interrupted_run_cancels_its_job(self):
        for served, number, code in ((False, signal.SIGINT, 130), (True, signal.SIGTERM, 143)):
            with self.subTest(served=served):
                if served:
                    self.daemon("--workers", "1")
                run = self.spawn("run", "--id", "job%d" % code, "--timeout", "0s", "--",
                                 "echo started; sleep 60")
                self.assertEqual(run.stdout.readline(), b"started\n")
                run.send_signal(number)
                self.assertEqual(run.wait(), code)
                self.assertEqual(self.show("job%d" % code, "state", "error"), ("dead", "cancelled"))

    def test_a_daemon_that_can_not_be_started_for_another_is_tried_twice(self):
        with mock.patch("queuectl.start_in_background",
                        side_effect=queuectl.Served("it already serves")) as start:
            self.assertIn("already serves", self.refused("worker", "start"))
        self.assertEqual(start.call_count, 2)  # once more, where the other has just ended

    def test_a_run_that_ends_early_leaves_no_job(self):
        for number in queuectl.ENDINGS:  # at the worst moment: stored, and nobody knows yet
            with self.subTest(number=number):
                code = """if True:
                    import os, signal, sys
                    sys.path.insert(0, sys.argv.pop(1))
                    import queuectl
                    def call(self, command, *args, inner=queuectl.Queue.call, **named):
                        answer = inner(self, command, *args, **named)
                        if command == "enqueue":
                            os.kill(os.getpid(), %d)
                        return answer
                    queuectl.Queue.call = call
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    queuectl.leave(queuectl.main(sys.argv[1:]))""" % number
                self.assertEqual(subprocess.call(
                    [sys.executable, "-c", code, HERE, "run", "--id", "s%d" % number, "--", "true"],
                    env=self.env, stderr=subprocess.DEVNULL), 130 if number == 2 else 143)
                self.assertEqual(self.show("s%d" % number, "error"), ("cancelled",))
        reader, writer = os.pipe()
        os.close(reader)
        self.assertEqual(subprocess.call(
            [sys.executable, SCRIPT, "run", "--id", "pipe", "--", "while echo x; do sleep 0.1; done"],
            env=self.env, stdout=writer, stderr=subprocess.DEVNULL), 1)
        os.close(writer)
        for number in queuectl.ENDINGS:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        with mock.patch("queuectl.start_in_background", side_effect=queuectl.Failure("no room")):
            self.assertIn("no room", self.refused("run", "--id", "none", "--", "true"))
        self.assertEqual(self.show("pipe", "error") + self.show("none", "error"),
                         ("cancelled",) * 2)

    def test_a_quiet_run_prints_nothing_though_a_try_failed(self):
        self.ok("config", "set", "max-delay", "300ms")
        run = self.spawn("run", "--quiet", "--", "test $QUEUECTL_ATTEMPT = 2")
        self.assertEqual((run.communicate()[0], run.returncode), (b"", 0))

    def test_a_death_in_a_run_without_a_daemon_is_told_too(self):
        self.ok("config", "set", "on-dead", "echo $QUEUECTL_DEAD_ID >>%s" % self.path("mail"))
        self.assertEqual(self.cli("run", "--quiet", "--max-retries", "1", "--", "exit 3")[0], 3)
        wait_until(lambda: self.read("mail"), "it is told")

    def test_a_temporary_daemon_keeps_no_worker_for_what_has_ended(self):
        run = self.spawn("run", "--timeout", "0s", "--", self.gate())
        self.assertEqual(run.stdout.readline(), b"started\n")
        for _ in range(3):
            self.ok("run", "--quiet", "--", "true")
        wait_until(lambda: len(self.ok("worker", "list")) == 1, "one worker is left")
        self.open_gate()
        self.assertEqual(run.wait(), 0)

    def test_a_run_that_knows_only_a_socket_outlives_its_daemon(self):
        first = self.spawn("run", "--timeout", "0s", "--", self.gate("a"))
        self.assertEqual(first.stdout.readline(), b"started\n")
        env = {key: value for key, value in self.env.items() if key != "DB_PATH"}
        second = self.spawn("run", "--timeout", "0s", "--", self.gate("b"), env=env)
        self.assertEqual(second.stdout.readline(), b"started\n")
        os.kill(json.loads(self.read("q.db.lock"))["pid"], signal.SIGKILL)
        for name, run in (("a", first), ("b", second)):
            self.open_gate(name)
            self.assertEqual((run.communicate()[0], run.returncode), (b"through\n", 0))

    def test_notifications_of_a_cancel_are_not_cancelled_by_it(self):
        self.ok("config", "set", "on-dead", "true")
        count = queuectl.PAGE_JOBS + 1
        self.ok("enqueue", "-", stdin='{"command":"false"}\n' * count)
        self.assertIn("%d jobs cancelled" % count, self.prints("cancel", "--state", "pending"))
        self.assertEqual(self.ok("status")["jobs"]["pending"], count)
        self.assertIn("%d jobs added" % count, self.prints("dlq", "retry", "--all"))

    def test_any_number_of_jobs_can_be_waited_for_and_deleted(self):
        ids = ["j%d" % n for n in range(1000)]
        self.ok("enqueue", "-", stdin="".join('{"command":"x","id":"%s"}\n' % one for one in ids))
        self.prints("cancel", "--all")
        self.assertIn("1000 jobs died", self.refused("wait", *ids))
        self.assertIn("1000 jobs deleted", self.prints("delete", *ids))

    def test_a_chatty_jobs_logs_are_never_empty_and_end(self):
        self.daemon("--workers", "1")
        self.enqueue("yes", id="a", timeout=0)
        wait_until(lambda: self.cli("logs", "a")[1], "it writes")
        for _ in range(12):
            self.assertNotEqual(self.prints("logs", "a"), "")
        self.prints("cancel", "a")

    def test_jobs_of_another_daemons_workers_are_stopped_and_waited_for_too(self):
        run = self.spawn("run", "--id", "a", "--timeout", "0s", "--", "echo started; sleep 60")
        self.assertEqual(run.stdout.readline(), b"started\n")
        self.daemon("--workers", "1")
        self.ok("worker", "stop", "--now")
        self.wait_for("pending")
        self.assertEqual(self.show("a", "attempts"), (0,))
        self.prints("cancel", "a")

    def test_what_keeps_a_watched_job_waiting_is_told(self):
        self.enqueue("true", id="a")
        with mock.patch("queuectl.monotonic", side_effect=itertools.count()):
            code, _, err = self.cli("wait", "a", "--timeout", "20s")
        self.assertEqual(code, 124)
        self.assertIn("waiting for a worker; start one with: worker start\n", err)
        self.assertEqual(err.count("waiting for"), 1)

    def test_a_hint_is_told_after_a_second_and_when_it_changes(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), \
                mock.patch("queuectl.monotonic", side_effect=itertools.count()), \
                mock.patch("time.sleep"):
            wait = queuectl.Wait()
            for what in "aabbc":
                wait(what)
                wait()
        self.assertEqual(err.getvalue(), "waiting for a\nwaiting for b\nwaiting for c\n")
        self.ok("pause")
        self.assertIn("paused", self.refused("drain"))

    def test_drain_works_what_is_ready_and_waits_out_backoffs(self):
        self.ok("config", "set", "max-delay", "300ms")
        self.enqueue("true", id="later", run_after="2100-01-01")
        self.assertEqual(self.ok("drain")["message"], "Queue drained")
        self.enqueue("test -e again || { touch again; exit 1; }", id="twice", cwd=self.dir)
        for _ in range(5):
            self.enqueue("true")
        self.assertEqual(self.ok("drain", "--count", "3")["message"], "Queue drained")
        self.assertEqual(self.show("twice", "state", "attempts"), ("completed", 2))
        self.enqueue("false", max_retries=1)
        self.assertIn("1 job died", self.refused("drain"))
        self.assertEqual(self.show("later", "state"), ("pending",))
        self.daemon()
        self.assertIn("already serves", self.refused("drain"))

    def test_drain_gives_way_to_a_daemon_and_waits_on(self):
        self.enqueue(self.gate(), id="a", timeout=0)
        self.enqueue("false", id="b", max_retries=1)
        drain = self.spawn("drain")
        self.wait_for("processing")
        self.daemon("--workers", "1")
        self.open_gate()
        self.assertEqual(drain.wait(), 1)
        self.assertEqual((self.show("a", "state"), self.show("b", "state")),
                         (("completed",), ("dead",)))

    def test_a_drain_that_gave_way_can_be_interrupted(self):
        self.enqueue(self.gate(), id="a", timeout=0)
        drain = self.spawn("drain")
        self.wait_for("processing")
        self.daemon("--workers", "1")
        wait_until(lambda: signal.SIGINT in handled(drain.pid), "it watches")
        drain.send_signal(signal.SIGINT)
        self.assertEqual(drain.wait(), 130)
        self.open_gate()
        self.wait_for("completed")

    def test_a_run_gives_way_to_a_drain(self):
        run = self.spawn("run", "--timeout", "0s", "--", self.gate())
        self.assertEqual(run.stdout.readline(), b"started\n")
        self.enqueue("true", id="b")
        drain = self.spawn("drain", "--count", "2")
        wait_until(lambda: self.show("b", "state") == ("completed",), "the other job is worked")
        self.open_gate()
        self.assertEqual((drain.wait(), run.wait()), (0, 0))

    def test_a_stopped_drain_keeps_the_rest(self):
        self.enqueue(self.gate(), id="a", timeout=0)
        self.enqueue("true", id="b")
        drain = self.spawn("drain")
        self.wait_for("processing")
        drain.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in self.read("q.db.log"), "it stops")
        self.open_gate()
        self.assertEqual(drain.wait(), 1)
        self.assertEqual((self.show("a", "state"), self.show("b", "state")),
                         (("completed",), ("pending",)))

    def test_some_workers_can_be_stopped_and_their_jobs_given_back(self):
        daemon = self.daemon("--workers", "3")
        self.enqueue("sleep 60", id="a", timeout=0)
        self.wait_for("processing")
        roll = self.ok("worker", "list")
        self.assertEqual(sorted((one["state"], str(one["job"])) for one in roll),
                         [("busy", "a"), ("idle", "None"), ("idle", "None")])
        self.assertEqual({one["pid"] for one in roll}, set(self.workers_of(daemon)))
        self.assertEqual(self.ok("worker", "stop", "--count", "2")["message"], "Stopped 2 workers")
        wait_until(lambda: len(self.ok("worker", "list")) == 1, "two have left")
        self.assertEqual(self.show("a", "state"), ("processing",))
        self.ok("worker", "stop", "--now")
        self.wait_for("pending")
        self.assertEqual(self.show("a", "attempts", "history"), (0, []))

    def test_commands_that_watch_say_that_the_jobs_go_on(self):
        self.enqueue("true", id="a", run_after="2100-01-01")
        for args in (("wait", "a"), ("status", "--watch"), ("logs", "-f", "a")):
            with self.subTest(args=args):
                with mock.patch("time.sleep", side_effect=KeyboardInterrupt):
                    code, _, err = self.cli(*args)
                self.assertEqual((code, err.splitlines()[-1]),
                                 (130, "stopped watching; the jobs go on"))


# ---- Faults -------------------------------------------------------------------------------------
# Daemons whose functions were replaced, so that they die, or the host fails them, at a known point.


class FaultCase(QueueCase):
    PROBE = ("exec 9>>%(dir)s/probe.$QUEUECTL_JOB_ID; flock -n 9 || echo $QUEUECTL_JOB_ID >>"
             " %(dir)s/overlaps; echo $QUEUECTL_JOB_ID >> %(dir)s/log")

    def probe(self, job_id, then=""):
        """Enqueue a job that tells of any overlap, and logs its run."""
        return self.enqueue(self.PROBE % {"dir": self.dir} + then, id=job_id)

    def unfinished(self):
        return self.rows("""SELECT COUNT(*) FROM jobs
                            WHERE state NOT IN ('completed', 'dead')""") != [(0,)]

    def check(self, ids, lost=0):
        """Every job ran, completed and was counted once, but for so many lost attempts."""
        self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])
        self.assertEqual(self.rows("SELECT id, state FROM jobs ORDER BY id"),
                         [(job_id, "completed") for job_id in sorted(ids)])
        self.assertEqual(self.rows("""SELECT id FROM jobs WHERE attempts != runs OR runs != (
            SELECT COUNT(*) FROM attempts WHERE job = jobs.id)"""), [])
        self.assertEqual(self.rows("SELECT COUNT(*) FROM running"), [(0,)])
        self.assertEqual(self.rows("SELECT SUM(attempts) FROM jobs"), [(len(ids) + lost,)])
        self.assertEqual(self.rows("SELECT COUNT(*) FROM attempts WHERE error = 'worker lost'"),
                         [(lost,)])
        self.assertEqual(self.read("overlaps"), "")
        ran = self.read("log").split()
        self.assertEqual(set(ran), set(ids))
        self.assertLessEqual(len(ran), len(ids) + lost)


@unittest.skipUnless(shutil.which("flock"), "needs flock(1)")
class FailpointTest(FaultCase):
    """kill -9 at the n-th pass of a point, n upward until a run completes."""

    def kill_at(self, point, jobs=2, lost=0, worker=False, at_least=1, then=""):
        """`point`: code that calls die() where it is to happen; `lost`: attempts that each kill
        costs; `worker`: it is one that dies, and its daemon makes it good; `then`: what the
        jobs do in the end."""
        ids, losses = [], 0
        self.ok("config", "set", "max-delay", "1ms")
        for n in itertools.count(1):
            ids += [self.probe("%d.%d" % (n, i), then) for i in range(jobs)]
            passes = self.path("passes%d" % n)
            daemon = self.driven(HASTE + "die = lambda: passed(%r, %d)\n%s" % (passes, n, point),
                                 "--workers", "2", ready=False)

            def died():
                return os.path.exists(passes) and os.path.getsize(passes) >= n
            wait_until(lambda: daemon.poll() is not None or not self.unfinished(), "its end")
            if not worker:
                self.kill(daemon)
            if died():
                losses += lost
                if not worker:
                    daemon = self.driven(HASTE, "--workers", "2")
            wait_until(lambda: not self.unfinished(), "all is done")
            self.kill(daemon)
            with self.subTest(pass_number=n):
                self.check(ids, losses)
            if not died():
                break
        self.assertGreater(n, at_least)
        return n

    def test_the_daemon_dies_before_a_commit(self):
        self.kill_at("on_sql(lambda _, sql, run: (sql == 'COMMIT' and die(), run())[1])",
                     at_least=3)

    def test_the_daemon_dies_after_a_commit(self):
        self.kill_at("on_sql(lambda _, sql, run: (run(), sql == 'COMMIT' and die())[0])",
                     at_least=3)

    def test_the_daemon_dies_before_it_hands_a_job_over(self):
        self.kill_at("around(queuectl.Pool, 'hand_out', True, die)", at_least=2)

    def test_the_daemon_dies_after_it_handed_a_job_over(self):
        self.kill_at("around(queuectl.Pool, 'hand_out', False, die)", at_least=2)

    def test_the_daemon_dies_before_it_frees_the_worker_of_a_stored_outcome(self):
        self.kill_at("around(queuectl.Pool, 'close', True, die)", at_least=2)

    def test_a_worker_dies_before_it_starts_a_command(self):
        self.kill_at("around(queuectl.Attempt, 'spawn', True, die)", jobs=1, lost=1, worker=True)

    def test_a_worker_dies_once_its_command_runs(self):
        self.kill_at("around(queuectl.Attempt, 'spawn', False, die)", jobs=1, lost=1, worker=True)

    def test_a_worker_dies_once_its_command_runs_and_has_closed_its_descriptors(self):
        closed = self.path("closed")
        self.kill_at("""
def die_later():
    while not os.path.exists(%r):
        queuectl.time.sleep(0.01)
    die()
around(queuectl.Attempt, 'spawn', False, die_later)""" % closed, jobs=1, lost=1, worker=True,
                     then="; exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&-; mkdir %s || exit 0;"
                     " sleep 60" % closed)  # the first of all, until it is stopped

    def test_a_worker_dies_before_it_notes_an_outcome(self):
        self.kill_at("around(queuectl.Attempt, 'finish', True, die)", jobs=1, lost=1, worker=True)

    def test_a_worker_dies_after_it_noted_an_outcome(self):
        self.kill_at("around(queuectl.Attempt, 'finish', False, die)", worker=True, at_least=2)

    def test_the_daemon_dies_between_a_commit_and_the_answer(self):
        ids = []
        for n in itertools.count(1):
            passes = self.path("passes%d" % n)
            daemon = self.driven("around(queuectl.Daemon, 'send', True, lambda: passed(%r, %d))"
                                 % (passes, n), "--workers", "2")
            ids += [self.probe("%d.%d" % (n, i)) for i in range(2)]  # asks again by itself
            alive = daemon.poll() is None
            self.kill(daemon)
            daemon = self.daemon()
            wait_until(lambda: not self.unfinished(), "all is done")
            self.kill(daemon)
            with self.subTest(pass_number=n):
                self.check(ids)
            if alive:
                break
        self.assertEqual(n, 3)

    def test_a_migration_killed_at_any_statement_is_begun_anew(self):
        for n in itertools.count(1):
            with contextlib.closing(sqlite3.connect(self.db)) as original, original:
                original.executescript(ORIGINAL)
            os.chmod(self.db, 0o600)
            code = ("count = 0\n"
                    "def hook(connection, sql, run):\n"
                    "    global count\n"
                    "    count += connection.in_transaction\n"
                    "    if count == %d: os.kill(os.getpid(), signal.SIGKILL)\n"
                    "    return run()\n"
                    "on_sql(hook)\nqueuectl.Store(%r).close()\nos._exit(0)" % (n, self.db))
            pid = os.fork()  # a new interpreter for each statement would take long
            if not pid:
                try:
                    exec("import os, queuectl, signal, sqlite3\n" + TOOLS + code, {})
                finally:
                    os._exit(1)
            status = os.waitpid(pid, 0)[1]
            self.assertIn(status, (0, signal.SIGKILL))
            with self.subTest(statement=n):
                self.assertEqual(self.rows("PRAGMA integrity_check"), [("ok",)])
                self.assertEqual([job["id"] for job in self.jobs()], ["old"])
                self.assertEqual(self.ok("config", "get", "timeout"), 7000)
            for name in os.listdir(self.dir):
                os.unlink(self.path(name))
            if status == 0:
                break
        self.assertGreater(n, 20)


AS_NOBODY = ("import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
             "s = socket.socket(socket.AF_UNIX)\n")


def as_nobody(code, *args):
    """The stdout of Python code run by another user."""
    return subprocess.check_output([sys.executable, "-c", AS_NOBODY + code] + list(args)).decode()


@unittest.skipIf(os.geteuid(), "needs root, to be another user")
class SecurityTest(FaultCase):
    """What another user may try."""

    def squatter(self, path):
        """A live server of nobody's, that prints how many bytes its first client sent."""
        return self.started([sys.executable, "-c", AS_NOBODY + (
            "s.bind(sys.argv[1]); s.listen(5); print('ready', flush=True)\n"
            "print(len(s.accept()[0].recv(99)), flush=True); s.accept()"), path])

    def open_folder(self, name):
        """A directory that everybody may write, as /tmp without its sticky bit."""
        os.chmod(self.dir, 0o755)
        os.mkdir(self.path(name))
        os.chmod(self.path(name), 0o777)
        return self.path(name)

    def test_nobody_gets_in_even_if_the_modes_were_opened(self):
        self.daemon()
        os.chmod(self.dir, 0o755)
        self.assertIn("PermissionError", as_nobody(
            "try: s.connect(sys.argv[1])\n"
            "except OSError as error: print(repr(error))", self.sock))
        os.chmod(self.sock, 0o666)
        answer = as_nobody(
            "s.connect(sys.argv[1])\n"
            "try: s.sendall(b'{\"command\":\"enqueue\",\"value\":{\"command\":\"true\"}}\\n')\n"
            "except OSError: pass\n"
            "print(s.recv(4096).decode())", self.sock)
        self.assertIn("another user", answer)
        self.assertEqual(self.jobs(), [])

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
                self.assertIn("not a socket of yours", self.refused("daemon"))
                after = os.lstat(self.sock)
                self.assertEqual((after.st_ino, after.st_mode, after.st_uid),
                                 (before.st_ino, before.st_mode, 65534))
                self.assertFalse(os.path.exists(self.path("nowhere")))
            (os.rmdir if stat.S_ISDIR(before.st_mode) else os.unlink)(self.sock)

    def test_a_squatted_default_socket_moves_the_daemon_beside_its_database(self):
        path = self.open_folder("tmp") + "/s"
        del self.env["SOCKET_PATH"]
        self.squatter(path)
        self.driven("queuectl.DEFAULT_SOCKET = %r" % path, "--workers", "1")
        with mock.patch("queuectl.DEFAULT_SOCKET", path):
            self.enqueue("true")
            self.wait_for("completed")
            self.assertEqual(self.ok("daemon", "status")["socket"], self.db + ".sock")
        self.assertEqual(os.lstat(path).st_uid, 65534)

    def test_a_default_socket_squatted_later_moves_the_daemon_too(self):
        path = self.open_folder("tmp") + "/s"
        del self.env["SOCKET_PATH"]
        self.driven(HASTE + "queuectl.DEFAULT_SOCKET = %r" % path)
        with mock.patch("queuectl.DEFAULT_SOCKET", path):
            as_nobody("os.unlink(sys.argv[1]); s.bind(sys.argv[1])", path)
            wait_until(lambda: os.path.exists(self.db + ".sock"), "it listens elsewhere")
            wait_until(lambda: self.db + ".sock" in self.read("q.db.lock"), "the lock tells")
            self.assertEqual(self.ok("daemon", "status")["socket"], self.db + ".sock")
        self.assertEqual(os.lstat(path).st_uid, 65534)

    def test_a_daemon_that_could_not_move_at_once_signs_the_lock_when_it_does(self):
        path = self.open_folder("tmp") + "/s"
        del self.env["SOCKET_PATH"]
        self.driven(HASTE + """queuectl.DEFAULT_SOCKET = %r
make_server, left = queuectl.make_server, [1]
def scarce(path, *args):
    if path.endswith('q.db.sock') and left:
        raise queuectl.Failure('no room %%d' %% left.pop())
    return make_server(path, *args)
queuectl.make_server = scarce""" % path)
        with mock.patch("queuectl.DEFAULT_SOCKET", path):
            as_nobody("os.unlink(sys.argv[1]); s.bind(sys.argv[1])", path)
            wait_until(lambda: "no room 1" in self.read("q.db.log"), "the first try fails")
            wait_until(lambda: os.path.exists(self.db + ".sock"), "it listens elsewhere")
            self.assertEqual(self.ok("daemon", "status")["socket"], self.db + ".sock")

    def test_a_daemon_that_can_not_move_comes_back_once_its_place_is_free(self):
        path = self.open_folder("tmp") + "/s"
        del self.env["SOCKET_PATH"]
        os.mkdir(self.db + ".sock")
        self.driven(HASTE + "queuectl.DEFAULT_SOCKET = %r" % path)
        with mock.patch("queuectl.DEFAULT_SOCKET", path):
            as_nobody("os.unlink(sys.argv[1]); s.bind(sys.argv[1])", path)
            wait_until(lambda: "can't listen" in self.read("q.db.log"), "it can't move")
            os.unlink(path)
            wait_until(lambda: os.path.exists(path), "it is back")
            self.assertEqual(self.ok("daemon", "status")["socket"], path)

    def test_a_link_that_another_user_planted_leads_to_no_database(self):
        shared, target = self.open_folder("tmp"), self.path("target")
        os.chmod(shared, 0o1777)
        for link, tail in ((shared + "/q.db", "/q.db"), (shared + "/d", "")):
            os.symlink(target + tail, link)
            os.lchown(link, 65534, 65534)
        os.mkdir(target)
        os.symlink(target, shared + "/mine")
        for name in ("/q.db", "/d/q.db"):
            with self.subTest(name=name):
                self.assertIn("is a symbolic link of another user (uid 65534)",
                              self.refused("--db", shared + name, "enqueue", "--", "true"))
        self.assertEqual(os.listdir(target), [])
        self.ok("--db", shared + "/mine/q.db", "enqueue", "--", "true")

    def test_roots_client_tells_another_users_server_nothing(self):
        path = self.env["SOCKET_PATH"] = self.open_folder("tmp") + "/s"
        self.daemon()
        as_nobody("os.rename(sys.argv[1], sys.argv[1] + '.old')", path)
        squatter = self.squatter(path)
        self.assertIn("another user (uid 65534)", self.refused("enqueue", '{"command":"true"}'))
        self.assertEqual(squatter.stdout.readline(), b"0\n")
        del self.env["DB_PATH"]
        self.assertIn("no daemon at", self.refused("status"))

    def test_planted_links_are_not_followed(self):
        target, mine = self.path("target"), self.path("queue")
        os.mkdir(mine)
        self.env["DB_PATH"] = self.db = mine + "/q.db"
        for suffix, link, words in ((".lock", os.symlink, "symbolic link"),
                                    (".lock", os.link, "hard link"), (".log", os.symlink, None),
                                    (".log", os.link, None), ("", os.link, "hard link"),
                                    ("-run", os.symlink, "not a directory"),
                                    ("-run", os.link, "not a directory"),
                                    ("-wal", os.symlink, "not a regular")):
            with open(target, "w") as file:
                file.write("precious")
            os.chmod(target, 0o644)
            link(target, self.db + suffix)
            with self.subTest(suffix=suffix, link=link.__name__):
                if words:
                    self.assertIn(words, self.refused("daemon"))
                else:
                    daemon = self.daemon()  # does without its log
                    self.assertEqual(self.ok("status")["workers"], 0)
                    self.kill(daemon)
                self.assertEqual((self.read("target"), os.stat(target).st_mode & 0o777),
                                 ("precious", 0o644))
            shutil.rmtree(mine)
            os.mkdir(mine)
        os.makedirs(self.path("elsewhere"))
        os.symlink(self.path("elsewhere"), self.db + "-run")
        self.assertIn("not a directory of yours", self.refused("daemon"))
        os.unlink(self.db + "-run")
        os.mkdir(self.db + "-run")
        os.chown(self.db + "-run", 65534, 65534)
        self.assertIn("not a directory of yours", self.refused("daemon"))
        self.assertEqual(os.listdir(self.path("elsewhere")), [])

    def test_root_refuses_what_another_user_can_write(self):
        self.enqueue("true")
        job = '{"command":"true"}'
        for path, uid, mode, words in (
                (self.db, 65534, 0o600, "belongs to another user (uid 65534)"),
                (self.db, 0, 0o606, "can be written by others"),
                (self.db + ".lock", 65534, 0o600, "belongs to another user (uid 65534)"),
                (self.dir, 65534, 0o700, "can be written by others than root"),
                (self.dir, 0, 0o777, "can be written by others than root")):
            before = os.stat(path)
            os.chown(path, uid, uid)
            os.chmod(path, mode)
            for args in (("daemon",), ("enqueue", job), ("list",)):
                with self.subTest(path=path, mode=oct(mode), args=args):
                    self.assertIn(words, self.refused(*args))
            os.chown(path, 0, 0)
            os.chmod(path, before.st_mode & 0o777)
        self.assertEqual(len(self.jobs()), 1)

    @unittest.skipUnless(hasattr(os, "setxattr"), "needs Linux")
    def test_root_refuses_what_a_list_lets_another_user_write(self):
        nobody = b"".join(struct.pack("<HHi", *entry) for entry in (
            (1, 7, -1), (2, 7, 65534), (4, 0, -1), (16, 7, -1), (32, 0, -1)))
        try:
            os.setxattr(self.dir, "system.posix_acl_access", struct.pack("<I", 2) + nobody)
        except OSError:
            self.skipTest("a file system without access control lists")
        self.assertIn("can be written by others than root", self.refused("enqueue", "--", "true"))
        os.chmod(self.dir, 0o700)  # the mask: nobody may any more
        self.ok("enqueue", "--", "true")

    def test_all_files_are_private_whatever_the_umask(self):
        for mask in (0o000, 0o077):
            folder = self.path("%03o" % mask)
            os.mkdir(folder, 0o700)
            self.env.update(DB_PATH=folder + "/q.db", SOCKET_PATH=folder + "/s")
            self.db = folder + "/q.db"
            with umask(mask):
                daemon = self.daemon("--workers", "1")
            self.enqueue(self.gate("gate%d" % mask))
            wait_until(lambda: os.path.exists(self.db + "-run/1"), "its run file")
            found = [os.path.join(above, name) for above, folders, files in os.walk(folder)
                     for name in folders + files]
            modes = {path[len(folder):]: os.lstat(path).st_mode & 0o7777 for path in found}
            with self.subTest(umask=oct(mask)):
                self.assertEqual(modes.pop("/q.db-run"), 0o700)
                self.assertEqual(modes, dict.fromkeys((
                    "/s", "/q.db", "/q.db-wal", "/q.db-shm", "/q.db.lock", "/q.db.log",
                    "/q.db-run/1", "/q.db-run/w.1"), 0o600))
            self.open_gate("gate%d" % mask)
            self.kill(daemon)

    def test_modules_beside_the_script_or_in_its_directory_are_not_imported(self):
        shutil.copy(SCRIPT, self.dir)
        for name in ("json argparse sqlite3 selectors socketserver subprocess multiprocessing"
                     " traceback random shlex").split():
            with open(self.path(name + ".py"), "w") as file:
                file.write("open(%r, 'w')\n" % self.path("hijacked"))
        self.started([sys.executable, self.path("queuectl.py"), "daemon", "--workers", "1"],
                     cwd=self.dir)
        self.enqueue("true")
        self.wait_for("completed")
        self.assertFalse(os.path.exists(self.path("hijacked")))


def set_limit(pid, name, soft):
    """Set a soft limit of a running process; the one before."""
    import resource
    number = getattr(resource, "RLIMIT_" + name)
    before, hard = resource.prlimit(pid, number)
    resource.prlimit(pid, number, (soft, hard))
    return before


class StorageTest(FaultCase):
    """No space, no descriptors, a clock that jumps, signals that are ignored."""

    def test_whatever_ends_the_daemon_stands_in_the_log(self):
        self.driven("def turn(daemon, now): raise MemoryError\nqueuectl.Daemon.turn = turn",
                    ready=False)
        wait_until(lambda: "gives up: MemoryError()" in self.read("q.db.log"), "the log tells")

    def test_a_disk_that_takes_nothing_costs_neither_outcome_nor_retry(self):
        daemon = self.daemon("--workers", "2")
        self.enqueue(self.gate(), id="runs")
        self.wait_for("processing")
        before = set_limit(daemon.pid, "FSIZE", 4000)  # room for the log, not for a page
        self.assertIn("can't be read or written",
                      self.refused("enqueue", '{"command":"true","id":"refused"}'))
        self.open_gate()
        wait_until(lambda: '"ended"' in self.read("q.db-run/w.1"), "the outcome is noted")
        wait_until(lambda: "storage trouble" in self.read("q.db.log"), "its recording has failed")
        self.assertEqual(self.rows("SELECT id, state FROM jobs"), [("runs", "processing")])
        set_limit(daemon.pid, "FSIZE", before)
        self.wait_for("completed")
        self.enqueue("true", id="after")
        self.wait_for("completed", 2)
        self.assertEqual(self.rows("SELECT job, number, error FROM attempts"),
                         [("runs", 1, None), ("after", 1, None)])

    def test_a_disk_full_at_the_claim_starts_nothing_until_there_is_room(self):
        daemon = self.daemon("--workers", "1")
        due = queuectl.now_ms() + 500
        self.enqueue("true", run_after=queuectl.iso(due))
        before = set_limit(daemon.pid, "FSIZE", 4000)
        wait_until(lambda: "storage trouble" in self.read("q.db.log"), "the claim has failed")
        self.assertGreaterEqual(queuectl.now_ms(), due)
        self.assertEqual(self.rows("SELECT state, runs FROM jobs"), [("pending", 0)])
        self.assertIsNone(daemon.poll())
        set_limit(daemon.pid, "FSIZE", before)
        self.wait_for("completed")
        self.assertEqual(self.rows("SELECT attempts, runs FROM jobs"), [(1, 1)])

    def test_no_space_left_is_said_and_worked_on_after(self):
        full = self.path("full")
        self.driven("""
def hook(connection, sql, run):
    if sql == "BEGIN IMMEDIATE":
        pages = 1 if os.path.exists(%r) else 1000000
        sqlite3.Connection.execute(connection, "PRAGMA max_page_count = %%d" %% pages)
    return run()
on_sql(hook)""" % full, "--workers", "1")
        self.enqueue(self.gate() + "; seq 10000", id="large")
        self.wait_for("processing")
        open(full, "w").close()
        job = json.dumps({"command": ": " + "x" * 100000})
        self.assertIn("no space left", self.refused("enqueue", job))
        self.open_gate()
        wait_until(lambda: "no space left" in self.read("q.db.log"), "the outcome is put off")
        self.assertEqual(self.rows("SELECT state FROM jobs"), [("processing",)])
        os.unlink(full)
        self.wait_for("completed")
        self.assertEqual(self.rows("SELECT number, error, LENGTH(output) > 40000 FROM attempts"),
                         [(1, None, 1)])
        self.ok("enqueue", job)
        self.wait_for("completed", 2)

    def starve(self, limit, soft):
        """Let a job start while its worker has no more of `limit`; (worker, workers after)."""
        daemon = self.driven(HASTE, "--workers", "1")
        self.enqueue("true", id="first")
        self.wait_for("completed")
        worker, = self.workers_of(daemon)
        before = set_limit(worker, limit, soft)
        self.enqueue("true", id="poor", max_retries=1)
        wait_until(lambda: "could not start" in self.read("q.db.log"), "it could not start")
        poor = "SELECT state, attempts, runs FROM jobs WHERE id = 'poor'"
        wait_until(lambda: self.rows(poor) == [("pending", 0, 0)], "it waits for another try")
        with contextlib.suppress(ProcessLookupError):
            set_limit(worker, limit, before)
        self.wait_for("completed", 2)
        self.assertEqual(self.rows(poor), [("completed", 1, 1)])
        return worker, self.workers_of(daemon)

    def test_a_want_of_descriptors_costs_no_output_and_holds_no_request_up(self):
        poor = self.path("poor")
        self.driven("""
def read_at(path, start, size):
    if start < 0 and os.path.exists(%r):
        raise OSError(queuectl.errno.EMFILE, "no descriptors")
    return real(path, start, size)
real, queuectl.read_at = queuectl.read_at, read_at""" % poor, "--workers", "1")
        open(poor, "w").close()
        job = self.enqueue("echo hello")
        wait_until(lambda: "no descriptors" in self.read("q.db.log"), "its outcome is put off")
        self.enqueue("true")
        self.assertEqual(self.job(job)["state"], "processing")
        os.unlink(poor)
        self.wait_for("completed", 2)
        self.assertEqual(self.prints("logs", job), "hello\n")

    def test_an_attempt_without_descriptors_is_given_back(self):
        worker, after = self.starve("NOFILE", 3)
        self.assertEqual(after, [worker])

    def test_an_attempt_without_room_for_its_record_is_given_back(self):
        worker, after = self.starve("FSIZE", 0)
        self.assertNotIn(worker, after)

    def jump(self, days):
        """A clock that jumps while one job runs and one waits for its second try."""
        for key, value in (("delay-base", "30m"), ("max-delay", "1h"), ("backoff", "fixed")):
            self.ok("config", "set", key, value)
        self.driven(HASTE + """
real = queuectl.now_ms
queuectl.now_ms = lambda: real() + %d * 86400000 * os.path.exists(%r)"""
                    % (days, self.path("jumped")), "--workers", "2")
        self.enqueue(self.gate(), id="runs", timeout=60000)
        self.enqueue("echo run >> %s; exit $((2 - $QUEUECTL_ATTEMPT))" % self.path("log"),
                     id="waits")
        self.wait_for("failed")
        self.wait_for("processing")
        open(self.path("jumped"), "w").close()
        self.wait_for("completed")  # its time has come, or was too far ahead
        self.assertEqual(self.job("runs")["state"], "processing")
        self.open_gate()
        self.wait_for("completed", 2)
        self.assertEqual(self.read("log"), "run\n" * 2)
        self.assertEqual(self.rows("SELECT job, number, exit_code FROM attempts ORDER BY 1, 2"), [
            ("runs", 1, 0), ("waits", 1, 1), ("waits", 2, 0)])
        self.assertEqual(self.rows("SELECT longest_ms < 60000 FROM totals"), [(days < 0,)])

    def test_a_clock_set_back_a_day_keeps_no_job_waiting(self):
        self.jump(-1)

    def test_a_clock_set_ahead_a_day_times_nothing_out(self):
        self.jump(1)

    def test_signals_ignored_or_blocked_at_the_start_stop_it_and_reach_no_job(self):
        shell = ["/bin/sh", "-c", "trap '' HUP INT QUIT TERM USR1 CHLD; exec \"$@\"", "sh",
                 sys.executable, SCRIPT, "daemon", "--workers", "1"]
        for number, start in enumerate((
                lambda: self.started(shell),
                lambda: self.driven("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))",
                                    "--workers", "1")), 1):
            with self.subTest(number=number):
                daemon = start()
                job = self.enqueue("grep -E '^Sig(Blk|Ign)' /proc/self/status")
                self.wait_for("completed", number)
                output, = self.rows("SELECT output FROM attempts WHERE job = ?", job)[0]
                blocked, ignored = [int(mask, 16) for mask in output.split()[1::2]]
                self.assertEqual((blocked & ~C_LIBRARYS, ignored & ~C_LIBRARYS), (0, 0))
                daemon.terminate()
                self.assertEqual(daemon.wait(30), 0)
                wait_until(lambda: not processes_of(self.dir), "its worker has ended")


@unittest.skipUnless(shutil.which("flock"), "needs flock(1)")
class OrphanTest(FaultCase):
    """The daemon's death is not the workers'."""

    def test_a_second_signal_does_not_keep_a_run_from_cancelling(self):
        self.daemon("--workers", "1")
        run = self.started(driver("""
call = queuectl.Queue.call
def called(queue, command, *args, **named):
    if command == "cancel":
        os.kill(os.getpid(), signal.SIGTERM)
    return call(queue, command, *args, **named)
queuectl.Queue.call = called""") + ["run", "--timeout", "60s", "--", "echo started; sleep 60"],
                           ready=False)
        self.assertEqual(run.stdout.readline(), b"started\n")
        run.terminate()
        self.assertEqual(run.wait(30), 143)
        self.wait_for("dead")

    def test_a_second_signal_ends_a_run_though_its_daemon_hangs(self):
        daemon = self.daemon("--workers", "1")
        run = self.started(driver("queuectl.TWICE_S = 0.1") + [
            "run", "--", "echo started; sleep 60"], ready=False)
        self.assertEqual(run.stdout.readline(), b"started\n")
        daemon.send_signal(signal.SIGSTOP)
        wait_until(lambda: run.terminate() or run.poll() is not None, "it has ended", 20,
                   every_s=0.2)
        self.assertEqual(run.returncode, 143)

    @unittest.skipUnless(shutil.which("unshare"), "needs unshare")
    def test_process_1_of_a_container_buries_what_jobs_left(self):
        container = ["unshare", "--pid", "--fork", "--mount-proc"]
        if subprocess.call(container + ["true"], stderr=subprocess.DEVNULL):
            self.skipTest("needs the right to make a container")
        daemon = self.started(container + driver(HASTE) + ["daemon", "--workers", "1"])
        self.enqueue("sleep 0.1 & sleep 0.1 & true", id="leaves")
        self.wait_for("completed")
        first, = [pid for pid in processes_of(self.dir) if parent(pid) == daemon.pid]

        def children():
            """[state] of the children of process 1, its worker among them."""
            return [line.split()[1] for line in subprocess.check_output(
                ["ps", "-e", "-o", "ppid=,state="]).decode().splitlines()
                if int(line.split()[0]) == first]
        wait_until(lambda: len(children()) == 1, "only the worker is left")
        self.enqueue("true", id="after")
        self.wait_for("completed", 2)

    def running(self):
        """(daemon, its busy worker) with a job that runs until the gate opens."""
        daemon = self.daemon("--workers", "1")
        os.mkfifo(self.path("gate"))
        self.probe("held", "; echo $$ > %s/pid; read line < %s" % (self.dir, self.path("gate")))
        wait_until(lambda: self.read("pid").strip(), "it runs")
        worker, = self.workers_of(daemon)
        return daemon, worker

    def test_an_orphan_that_a_daemon_stopped_before_it_died_is_given_back(self):
        self.kill(self.running()[0])
        second = self.driven("around(queuectl, 'signal_command', False,"
                             " lambda: os.kill(os.getpid(), signal.SIGKILL))")
        self.ok("worker", "stop", "--now")
        second.wait()
        self.daemon()
        self.wait_for("pending")
        self.assertEqual(self.rows("SELECT attempts, runs FROM jobs"), [(0, 0)])

    def test_a_stop_of_workers_reaches_an_orphan_though_the_database_was_locked(self):
        self.kill(self.running()[0])
        self.driven("""
inner = queuectl.Store.mark_stopped
def locked(*args):
    queuectl.Store.mark_stopped = inner
    raise queuectl.Busy("another program has it")
queuectl.Store.mark_stopped = locked""")
        self.ok("worker", "stop", "--now")
        self.wait_for("pending")

    def test_an_orphan_that_had_failed_before_it_was_stopped_has_failed(self):
        first = self.daemon("--workers", "1")
        self.enqueue("while [ ! -e %s ]; do sleep 0.1; done; exit 3" % self.path("go"))
        self.wait_for("processing")
        worker, = self.workers_of(first)
        self.kill(first)
        second = self.daemon()
        second.send_signal(signal.SIGSTOP)
        open(self.path("go"), "w").close()
        wait_until(lambda: not queuectl.process_start(worker), "the worker has left")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            second.send_signal(number)
        self.assertEqual(second.wait(30), 0)
        self.assertEqual(self.rows("SELECT state, attempts FROM jobs"), [("failed", 1)])

    def test_a_queue_that_an_orphan_started_is_no_part_of_it(self):
        first = self.driven("""
def die():
    while not os.path.exists(%r):
        queuectl.time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
around(queuectl.Attempt, 'spawn', False, die)""" % self.path("closed"), "--workers", "1")
        os.mkfifo(self.path("gate"))
        self.enqueue("exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&-; mkdir closed; read line <gate;"
                     " %s %s worker start" % (queuectl.shell_quote(sys.executable),
                                              queuectl.shell_quote(SCRIPT)), cwd=self.dir)
        first.wait()
        wait_until(lambda: len(processes_of(self.dir)) == 1, "only the command is left")
        self.open_gate()
        self.wait_for("failed")
        self.assertEqual(self.ok("status")["workers"], 1)

    def test_a_worker_that_leaves_before_its_outcome_can_be_stored_is_not_lost(self):
        _, worker = self.running()
        self.ok("worker", "stop")
        other = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN EXCLUSIVE")
        self.open_gate()
        wait_until(lambda: not os.path.exists("/proc/%d" % worker), "its daemon has reaped it")
        other.execute("ROLLBACK")
        self.wait_for("completed")
        self.check(["held"])
        self.assertEqual(self.rows("SELECT worker FROM attempts"), [(worker,)])
        self.assertNotIn("worker lost", self.read("q.db.log"))

    def test_a_daemon_from_a_newer_copy_adopts_what_runs(self):
        daemon, worker = self.running()
        with open(SCRIPT, encoding="utf-8") as file:
            text = file.read()
        with open(self.path("queuectl.py"), "w", encoding="utf-8") as file:
            file.write(text.replace('VERSION = "', 'VERSION = "99.', 1))
        self.kill(daemon)
        self.started([sys.executable, self.path("queuectl.py"), "daemon"])
        self.assertEqual(self.ok("daemon", "status")["version"], "99." + queuectl.VERSION)
        self.assertEqual(self.job("held")["state"], "processing")
        self.open_gate()
        self.wait_for("completed")
        self.check(["held"])
        wait_until(lambda: not queuectl.process_start(worker), "the old worker has left")
        self.probe("next")
        self.wait_for("completed", 2)
        self.check(["held", "next"])

    def test_the_job_of_a_stopped_worker_waits_for_it_whoever_is_the_daemon(self):
        daemon, worker = self.running()
        os.kill(worker, signal.SIGSTOP)
        self.kill(daemon)
        self.daemon("--workers", "2")
        self.open_gate()
        wait_until(lambda: not queuectl.process_start(int(self.read("pid"))), "the job has ended")
        self.probe("other")
        self.wait_for("completed")
        self.assertEqual(self.job("held")["state"], "processing")
        os.kill(worker, signal.SIGCONT)
        self.wait_for("completed", 2)
        self.check(["held", "other"])

    def test_an_outcome_is_taken_though_the_workers_file_has_been_removed(self):
        self.running()
        for name in os.listdir(self.db + "-run"):
            os.unlink(os.path.join(self.db + "-run", name))
        self.open_gate()
        self.wait_for("completed")
        self.check(["held"])

    def test_a_stopped_worker_is_given_up_in_the_end(self):
        impatient = "queuectl.SILENT_S = queuectl.GRACE_S = queuectl.LOOK_S = 0.1"
        daemon = self.driven(impatient, "--workers", "1")
        for orphaned in (False, True):
            with self.subTest(orphaned=orphaned):
                job_id = self.enqueue("echo $$ >%s; sleep 300" % self.path("pid"), timeout=500,
                                      max_retries=1)
                wait_until(lambda: self.read("pid").strip(), "it runs")
                worker, = self.workers_of(daemon)
                os.kill(worker, signal.SIGSTOP)
                if orphaned:
                    self.kill(daemon)
                    daemon = self.driven(impatient)
                wait_until(lambda: self.job(job_id)["state"] == "dead", "its job is given up")
                self.assertFalse(queuectl.process_start(int(self.read("pid"))))
                os.unlink(self.path("pid"))
                wait_until(lambda: not queuectl.process_start(worker), "it is gone")
                self.assertEqual(self.prints("run", "--", "echo on"), "on\n")

    def test_a_run_does_not_wait_for_the_jobs_of_others(self):
        daemon, _ = self.running()
        self.kill(daemon)
        self.assertEqual(self.prints("run", "--quiet", "--id=-x", "--", "true"), "")
        self.assertEqual(self.job("-x")["state"], "completed")
        self.assertEqual(self.job("held")["state"], "processing")

    def test_numbers_are_above_those_of_run_files_and_no_worker_begins_with_a_record(self):
        os.mkdir(self.path("q.db-run"), 0o700)
        for name, text in (("41", b"old"), ("w.1", queuectl.pad({
                "serial": 42, "phase": "ended", "reason": "", "status": 0, "dropped": 0}, 4096))):
            with open(self.path("q.db-run/" + name), "wb") as file:
                file.write(text)
        worker, = self.workers_of(self.daemon("--workers", "1"))
        os.kill(worker, signal.SIGSTOP)
        self.enqueue("echo run >>%s" % self.path("log"), id="a")
        wait_until(lambda: self.rows("SELECT serial, slot FROM running") == [(42, 1)], "a claim")
        os.kill(worker, signal.SIGKILL)
        self.wait_for("completed")
        self.assertEqual(self.read("log"), "run\n")
        self.assertEqual(self.rows("SELECT serial, number FROM attempts"), [(43, 1)])

    def test_what_a_database_put_back_does_not_know_is_stopped(self):
        self.daemon("--workers", "1")
        self.ok("backup", self.path("copy"))
        self.ok("daemon", "stop")
        daemon, worker = self.running()
        self.kill(daemon)
        for end in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.db + end)
        shutil.copyfile(self.path("copy"), self.db)
        self.daemon()
        pid = int(self.read("pid"))
        wait_until(lambda: not queuectl.process_start(pid), "what nobody knows is stopped")
        self.assertEqual(self.jobs(), [])

    def test_what_a_completed_job_left_in_the_background_outlives_the_daemon(self):
        daemon = self.daemon("--workers", "1")
        self.probe("a")
        self.wait_for("completed")
        self.kill(daemon)
        run_file = self.db + "-run/1"  # as if the daemon had died before it was removed
        left = self.started(["/bin/sh", "-c", "exec 9>>%s; flock 9; echo ready; exec sleep 300"
                             % run_file])
        self.daemon()
        self.assertFalse(os.path.exists(run_file))
        self.assertIsNone(left.poll())

    def test_a_command_left_by_daemon_and_worker_is_stopped_before_its_retry(self):
        self.ok("config", "set", "max-delay", "1ms")
        daemon, worker = self.running()
        command = int(self.read("pid"))
        self.kill(daemon)
        os.kill(worker, signal.SIGKILL)
        self.assertTrue(queuectl.process_start(command))
        self.daemon()
        wait_until(lambda: self.read("log") == "held\n" * 2, "it runs again")
        self.assertEqual(queuectl.process_start(command), "")
        self.open_gate()
        self.wait_for("completed")
        self.check(["held"], lost=1)


class StormTest(QueueCase):
    """Promise 2 under fire: an in-job `flock -n` tells of any overlap."""

    JOB = ("exec 9>>%(dir)s/probe.$QUEUECTL_JOB_ID; flock -n 9 || echo $QUEUECTL_JOB_ID >>"
           " %(dir)s/overlaps; sleep 0.0%(ms)d; echo $QUEUECTL_JOB_ID >> %(dir)s/log")

    def storm(self, jobs, rounds, seed):
        chance = random.Random(seed)
        self.ok("config", "set", "max-delay", "1ms")
        lines = "".join(json.dumps({"command": self.JOB % {"dir": self.dir, "ms": n % 9 + 1},
                                    "id": "job%d" % n, "max_retries": 1000}) + "\n"
                        for n in range(jobs))
        self.ok("enqueue", "-", stdin=lines)
        daemon = self.driven(HASTE, "--workers", "4")
        for _ in range(rounds):
            before = self.read("log")
            wait_until(lambda: self.read("log") != before or not self.open_jobs(), "jobs go on")
            workers = self.workers_of(daemon)
            if workers and chance.random() < 0.6:
                with contextlib.suppress(OSError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
            else:
                self.kill(daemon)
                daemon = self.driven(HASTE)
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


class MonitoringTest(QueueCase):
    """What a monitoring system asks."""

    def exposed(self):
        """{sample: value} of `metrics --format prometheus`, after a check of its form."""
        code, out, _ = self.cli("metrics", "--format", "prometheus")
        self.assertEqual((code, out[-1:]), (0, "\n"))
        samples, declared = {}, {}
        for line in out.splitlines():
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
        self.assertEqual(os.listdir(self.dir), [])
        self.daemon("--workers", "1")
        self.enqueue("true")
        self.enqueue("exit 3", max_retries=1)
        self.wait_for("completed")
        self.wait_for("dead")
        shown, metrics = self.exposed(), self.ok("metrics")
        for name, value in (("jobs_enqueued_total", 2), ("jobs_completed_total", 1),
                            ("jobs_dead_total", 1), ("attempts_failed_total", 1),
                            ('jobs{state="dead"}', 1), ('jobs{state="pending"}', 0),
                            ("job_duration_seconds_count", 1), ("workers", 1),
                            ("job_duration_seconds_sum", metrics["total_runtime"])):
            with self.subTest(name=name):
                self.assertEqual(shown["queuectl_" + name], value)
        size = sum(os.path.getsize(self.db + end) for end in ("", "-wal"))
        self.assertEqual(metrics["database_bytes"], size)
        self.assertEqual(shown["queuectl_database_bytes"], size)

    def test_counters_never_fall_however_the_daemon_ends(self):
        counters, seen = None, []
        for stop in (lambda daemon: self.ok("daemon", "stop"), self.kill, self.kill):
            daemon = self.daemon("--workers", "1")
            self.enqueue("true")
            for _ in range(3):
                self.ok("status")
                shown = self.exposed()
                counters = [name for name in shown if name.endswith(("_total", "_sum", "_count"))]
                seen.append([shown[name] for name in counters])
            stop(daemon)
            if len(seen) == 3:  # the orderly stop lost no request, itself one of them
                self.assertEqual(self.rows("SELECT SUM(total_commands) FROM metrics"), [(8,)])
        shown = self.exposed()
        seen.append([shown[name] for name in counters])
        for name, values in zip(counters, zip(*seen)):
            self.assertEqual(list(values), sorted(values), name)

    def test_requests_are_counted_within_a_second_though_nothing_is_stored(self):
        self.driven(HASTE)
        self.ok("status")
        wait_until(lambda: self.rows("SELECT SUM(total_commands) FROM metrics")[0][0] == 1,
                   "the request is counted")

    def check(self, *args):
        """(exit status, text, {name: perfdata}) of a `check`, which says one line and no more."""
        code, out, err = self.cli("check", *args)
        self.assertEqual((err, out.count("\n")), ("", 1))
        text, _, data = out.strip().partition(" | ")
        word = ("OK", "WARNING", "CRITICAL", "UNKNOWN")[code]
        self.assertTrue(text.startswith(word + " - "), out)
        return code, text, dict(item.split("=") for item in data.split())

    def test_what_is_ok_what_a_warning_and_what_critical(self):
        def found(daemon=True, workers=2, age=0, **more):
            return dict(dict.fromkeys(queuectl.STATES, 0), daemon=daemon, workers=workers, age=age,
                        **more)
        switch = {"ended": 60}
        for status, words, given, limits in (
                (0, "0 jobs waiting, 0 dead", found(), {}),
                (0, "0 jobs", found(False, 0), {}),
                (0, "1 job waiting", found(pending=1, dead=5), {}),
                (1, "no worker runs, 1 job waiting", found(workers=0, pending=1), {}),
                (1, "no worker runs", found(workers=0, failed=1), {}),
                (0, "OK", found(workers=0, processing=1), {}),  # they end after their jobs
                (1, "no daemon runs", found(False, 0, processing=1), {}),
                (1, "paused, 0 jobs waiting", found(paused=""), {}),
                (1, "paused, 0 jobs waiting", found(paused="disk swap"), {}),
                (0, "OK", found(pending=9), {"pending": 9, "dead": None}),
                (2, "pending is 10, over 9", found(pending=10), {"pending": 9}),
                (2, "dead is 1, over 0, no daemon runs", found(False, 0, pending=1, dead=1),
                 {"dead": 0}),
                (0, "OK", found(age=60), {"age": 60}),
                (2, "age is 61s, over 60s", found(age=61), {"age": 60}),
                (0, "OK", found(ended=60), switch),
                (2, "a job b/... completed is 61s, over 60s", found(ended=61), switch),
                (2, "a job b/... completed is unknown, over 60s", found(ended=None), switch)):
            with self.subTest(words=words, status=status):
                code, line = queuectl.judge(given, limits, "b|")
                self.assertEqual((code, line.count("|")), (status, 1))
                self.assertIn(words, line)

    def test_check_sees_what_waits_and_what_completed(self):
        self.enqueue("true", id="nightly-1")
        self.rows("UPDATE jobs SET created_at = '2026-01-01', run_after = ?",
                  queuectl.iso(queuectl.now_ms() - 90000))
        code, text, data = self.check("--max-age", "1m")
        self.assertEqual((code, data["pending"], data["age"][-7:]), (2, "1;;;0", "s;;60;0"))
        self.assertRegex(text, r"age is 9\ds, over 60s, no daemon runs")
        self.assertEqual(self.check("--max-age", "2m")[0], 1)
        self.assertEqual(self.check("--completed", "nightly-", "--within", "1d")[0], 2)
        self.daemon("--workers", "1")
        self.wait_for("completed")
        code, _, data = self.check("--completed", "nightly-", "--within", "1d", "--max-pending",
                                   "0", "--max-dead", "0", "--max-age", "1s")
        self.assertEqual((code, data["dead"], data["age"], data["workers"]),
                         (0, "0;;0;0", "0s;;1;0", "1;;;0"))
        self.assertRegex(data["ended"], r"^\d+s;;86400;0$")
        self.rows("UPDATE jobs SET finished_at = ?", queuectl.iso(queuectl.now_ms() - 86400001))
        self.assertEqual(self.check("--completed", "nightly-", "--within", "1d")[0], 2)
        self.assertEqual(self.check("--completed", "nightly-1x", "--within", "1d")[0], 2)
        self.ok("worker", "stop")
        self.enqueue("true")
        self.assertIn("no worker runs", self.check()[1])

    def test_any_error_of_check_is_unknown_and_exits_3(self):
        self.assertIn("no queue at " + self.db, self.check()[1])
        self.enqueue("true")
        for args in (("--frob",), ("--max-dead", "-1"), ("--max-pending", "x"), ("--max-age", "30"),
                     ("--completed", "x"), ("--within", "1d"), ("--completed", "a/b|", "--within",
                     "1d"), ("--db", self.dir), ("extra",), ("--socket", "/" + "x" * 200)):
            with self.subTest(args=args):
                self.assertEqual(self.check(*args)[0], 3)
        with open(self.db, "w"):
            pass
        self.assertIn("is empty", self.check()[1])
        for argv, code in ((("--db", self.db, "check"), 3), (("--frob", "check"), 3),
                           (("dlq", "retry", "check"), 1), (("--db", "check", "list"), 0)):
            with self.subTest(argv=argv):
                self.assertEqual(queuectl.is_check(argv), code == 3)
        reader, writer = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, writer)
        for stdout in (writer, os.open("/dev/full", os.O_WRONLY)):
            self.assertEqual(subprocess.call([sys.executable, SCRIPT, "check"], env=self.env,
                                             stdout=stdout, stderr=subprocess.DEVNULL), 3)
        os.close(stdout)


class CheckQueriesTest(StoreCase):
    """What `check` reads of the database."""

    def test_the_longest_wait_is_counted_from_when_a_job_could_have_started(self):
        self.assertIsNone(self.store.ready_since(NOW))
        self.add("a", priority=5, run_after="2020-01-01")       # could start once it was stored
        self.add("b", run_after=queuectl.iso(NOW + 1000))
        self.assertEqual(self.store.ready_since(NOW), NOW)
        self.sql("UPDATE jobs SET created_at = ? WHERE id = 'b'", queuectl.iso(NOW - 9000))
        self.claim()
        self.assertIsNone(self.store.ready_since(NOW + 999))
        self.assertEqual(self.store.ready_since(NOW + 2000), NOW + 1000)  # due, nobody works
        with self.store.transaction():
            self.store.promote(NOW + 5000)
        self.assertEqual(self.store.ready_since(NOW + 5000), NOW + 1000)
        self.add("c", priority=-1000, run_after="2020-01-01")
        self.add("d", priority=1000)
        self.sql("UPDATE jobs SET created_at = ? WHERE id = 'c'", queuectl.iso(NOW - 7000))
        self.sql("UPDATE jobs SET run_after = 'soon' WHERE id = 'd'")
        self.assertEqual(self.store.ready_since(NOW + 5000), NOW - 7000)

    def test_the_last_completion_is_found_by_prefix_however_many_there_are(self):
        for number, job_id in enumerate(("job", "job-1", "job-2", "jobs", "jo", "joc")):
            self.add(job_id)
            self.end(self.claim()[0], 0, now=NOW + number * 1000)
        self.add("job-3")
        for looked_at in (20000, 2):
            with mock.patch("queuectl.LOOKED_AT", looked_at):
                for prefix, number in (("job", 3), ("job-", 2), ("job-1", 1), ("j", 5), ("k", None),
                                       ("job-3", None), ("J", None), ("job_", None)):
                    with self.subTest(prefix=prefix, looked_at=looked_at):
                        self.assertEqual(self.store.completed_at(prefix, STAMP),
                                         None if number is None
                                         else queuectl.iso(NOW + number * 1000))
        with mock.patch("queuectl.LOOKED_AT", 2):
            self.assertIsNone(self.store.completed_at("job", queuectl.iso(NOW + 3001)))

    def test_a_million_jobs_are_looked_at_by_index(self):
        self.add("a")
        for looked_at in (20000, 0):
            with mock.patch("queuectl.LOOKED_AT", looked_at), \
                    mock.patch.object(self.store, "query", wraps=self.store.query) as reads:
                self.store.ready_since(NOW)
                self.store.completed_at("a", STAMP)
            self.assertGreaterEqual(reads.call_count, 6)
            for seen in reads.call_args_list:
                plan = "\n".join(row[3] for row in self.store.connection.execute(
                    "EXPLAIN QUERY PLAN " + seen[0][0], *seen[0][1:]))
                with self.subTest(plan=plan):
                    self.assertRegex(plan, r"SEARCH (TABLE )?jobs\b.*(INDEX)")
                    self.assertNotRegex(plan, r"SCAN (TABLE )?jobs|TEMP B-TREE|^SEARCH.*\(state=\?\)")


class BackupTest(FaultCase):
    def setUp(self):
        super().setUp()
        self.copy = self.path("copy of 100%?#.db")
        self.addCleanup(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def dump(self, path):
        """Schema and rows, in the order of the rows."""
        with contextlib.closing(sqlite3.connect(path)) as connection:
            made = connection.execute("""SELECT type, name, sql FROM sqlite_master
                                         ORDER BY type, name""").fetchall()
            pragmas = [connection.execute("PRAGMA " + name).fetchall()
                       for name in ("user_version", "page_size", "encoding", "integrity_check")]
            return made, pragmas, [connection.execute('SELECT * FROM "%s"' % name).fetchall()
                                   for kind, name, _ in made if kind == "table"]

    def test_a_copy_equals_its_original_and_is_a_queue_of_its_own(self):
        with contextlib.closing(sqlite3.connect(self.db)) as connection:
            connection.executescript("PRAGMA page_size = 2048; CREATE TABLE extra (a)")
        self.enqueue("echo a")
        self.ok("enqueue", "-", stdin="".join('{"command":"true","id":"%d","priority":%d}\n' % (
            number * 7919 % 1000, number % 3) for number in range(1000)))
        self.assertNotEqual(*[self.rows("SELECT id FROM jobs ORDER BY " + order)
                              for order in ("id", "rowid")])
        self.rows("CREATE TABLE \"odd 'name\" (a, b DEFAULT (1 + 1))")
        self.rows("INSERT INTO \"odd 'name\" (a) VALUES (x'00ff')")
        self.rows("CREATE VIEW seen AS SELECT id FROM jobs")
        self.rows("INSERT INTO metrics (id) VALUES (7)")
        self.rows("DELETE FROM metrics WHERE id = 7")
        with umask(0):
            self.assertEqual(self.ok("backup", self.copy), {
                "success": True, "message": "Backed up 1001 jobs to " + self.copy})
        self.assertEqual(stat.S_IMODE(os.stat(self.copy).st_mode), 0o600)
        self.assertEqual(self.dump(self.copy), self.dump(self.db))
        self.env["DB_PATH"] = self.copy
        jobs, self.env["DB_PATH"] = self.jobs(), self.db
        self.assertEqual(jobs, self.jobs())

    def test_a_backup_under_load_holds_all_that_was_acknowledged_before(self):
        daemon = self.daemon("--workers", "2")
        queue = queuectl.Queue(queuectl.Place(self.db, True, self.sock, True), lambda line: None)
        acknowledged, over = set(), threading.Event()

        def feed():
            while not over.is_set():
                jobs = [{"command": "true"}] * 20
                acknowledged.update(queue.call("enqueue", "batch", jobs=jobs, ids=True)["ids"])
        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            for number in range(3):
                copy = self.copy + str(number)
                wait_until(lambda: len(acknowledged) > 200 * (number + 1), "jobs are fed")
                before = set(acknowledged)
                self.ok("backup", copy)
                made, pragmas, _ = self.dump(copy)
                self.assertEqual(pragmas[-1], [("ok",)])
                with contextlib.closing(sqlite3.connect(copy)) as connection:
                    ids = {row[0] for row in connection.execute("SELECT id FROM jobs")}
                    counted, = connection.execute("""SELECT SUM(jobs) FROM counts""").fetchone()
                    states = connection.execute("""SELECT state, jobs FROM counts WHERE jobs > 0
                        EXCEPT SELECT state, COUNT(*) FROM jobs GROUP BY state""").fetchall()
                self.assertEqual((before - ids, counted, states), (set(), len(ids), []))
        finally:
            over.set()
            feeder.join()
        self.assertIsNone(daemon.poll())

    def test_the_copy_is_of_one_moment(self):
        self.enqueue("true")
        original = queuectl.beside

        @contextlib.contextmanager
        def amid_writes(*args):
            def execute(sql):
                if sql.startswith("INSERT INTO main"):
                    self.rows("INSERT INTO jobs (id, command) VALUES (hex(randomblob(9)), 'true')")
                return connection.execute(sql)
            with original(*args) as connection:
                yield mock.Mock(execute=execute)
        with mock.patch("queuectl.beside", amid_writes):
            self.assertEqual(self.ok("backup", self.copy)["message"][:15], "Backed up 1 job")
        with contextlib.closing(sqlite3.connect(self.copy)) as connection:
            self.assertEqual(connection.execute("SELECT SUM(jobs) FROM counts").fetchall(), [(1,)])

    def test_no_lock_is_taken_and_no_checkpoint_made(self):
        daemon = self.daemon()
        self.enqueue("true")
        self.kill(daemon)
        files = [self.db, self.db + "-wal"]
        before = list(map(read, files))
        with open(self.db + ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.assertEqual(self.ok("backup", self.copy)["message"][:15], "Backed up 1 job")
        self.assertEqual(list(map(read, files)), before)
        self.assertEqual(self.ok("status")["jobs"]["pending"], 1)

    def test_a_backup_replaces_nothing_and_leaves_nothing_when_it_fails(self):
        self.assertIn("no queue at", self.refused("backup", self.copy))
        self.enqueue("true")
        for make in (lambda: open(self.copy, "w").close(), lambda: os.symlink("none", self.copy)):
            make()
            self.assertIn("replaces nothing", self.refused("backup", self.copy))
            os.unlink(self.copy)
        self.assertIn("replaces nothing", self.refused("backup", self.db))
        before = read(self.db)
        with mock.patch("os.path.lexists", return_value=False):  # made just after the look
            self.assertIn("File exists", self.refused("backup", self.db))
        self.assertEqual(read(self.db), before)
        self.assertIn("No such file", self.refused("backup", self.path("none/x")))
        for error, words in ((queuectl.StorageError("no space"), "no space; no backup was made"),
                             (OSError(5, "it broke"), "it broke")):
            with mock.patch("queuectl.copy_database", side_effect=error):
                self.assertIn(words, self.refused("backup", self.copy))
            self.assertFalse(os.path.lexists(self.copy))
        with mock.patch("queuectl.copy_database", side_effect=KeyboardInterrupt):
            self.assertEqual(self.cli("backup", self.copy)[0], 130)
        self.assertFalse(os.path.lexists(self.copy))

    def test_a_damaged_or_strange_source_and_a_full_disk_are_told(self):
        self.ok("enqueue", "-", stdin='{"command":"true"}\n' * 500)
        small = subprocess.Popen(["/bin/sh", "-c", 'ulimit -f 40; exec "$@"', "sh", sys.executable,
                                  SCRIPT, "backup", self.copy], env=self.env,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = small.communicate()
        self.assertEqual((small.returncode, out), (1, b""), err)
        self.assertIn(b"no backup was made", err)
        with open(self.db, "r+b") as file:
            file.seek(4096 * 12)
            file.write(b"\xff" * 4096 * 3)
        self.assertIn("is corrupt; restore a backup", self.refused("backup", self.copy))
        with open(self.db, "wb") as file:
            file.write(b"x" * 5000)
        self.assertIn("is not a database", self.refused("backup", self.copy))
        os.unlink(self.db)
        self.rows("CREATE TABLE other (a)")
        self.assertIn("holds no queue", self.refused("backup", self.copy))
        self.assertFalse(os.path.lexists(self.copy))

    def test_a_signal_ends_it_and_removes_the_file(self):
        self.enqueue("true")
        code = """import signal, sys
sys.path.insert(0, sys.argv.pop(1))
import queuectl
queuectl.copy_database = lambda path, target: (print("ready", flush=True), signal.pause())
sys.exit(queuectl.main(sys.argv[1:]))"""
        process = self.started([sys.executable, "-c", code, HERE, "backup", self.copy])
        self.assertTrue(os.path.exists(self.copy))
        process.terminate()
        self.assertEqual(process.wait(), 143)
        self.assertFalse(os.path.exists(self.copy))

    def test_where_only_a_socket_is_given_the_daemon_there_tells_the_database(self):
        self.daemon()
        self.enqueue("true")
        del self.env["DB_PATH"]
        self.assertEqual(self.ok("backup", self.copy)["message"][:15], "Backed up 1 job")
        self.env["SOCKET_PATH"] = self.path("none")
        self.assertIn("no daemon at", self.refused("backup", self.copy + "2"))


class DoctorTest(QueueCase):
    """Each thing that can be wrong, found and told with the way out."""

    def doctor(self, *args):
        """{check: finding}; whether all is well stands in the exit status and on stderr too."""
        code, out, err = self.cli("doctor", *args)
        findings = json.loads(out)
        wrong = [finding for finding in findings if not finding["ok"]]
        self.assertEqual(code, int(bool(wrong)), err)
        self.assertEqual(err, "".join("%(check)s: %(detail)s; %(advice)s\n" % one for one in wrong))
        self.assertTrue(all(bool(one["advice"]) != one["ok"] for one in findings), findings)
        return {finding["check"]: finding for finding in findings}

    def wrong(self, *args):
        """{check: "what is wrong; the way out"}"""
        return {name: "%(detail)s; %(advice)s" % one for name, one in self.doctor(*args).items()
                if not one["ok"]}

    def finds(self, check, *words):
        wrong = self.wrong()
        self.assertEqual(list(wrong), [check])
        for word in words:
            self.assertIn(word, wrong[check])

    def files(self):
        """All that is there, to the byte."""
        return {name: (read(self.path(name)) if os.path.isfile(self.path(name)) else None,
                       os.lstat(self.path(name)).st_mtime) for name in os.listdir(self.dir)
                if not name.endswith("-shm")}

    def test_a_sound_queue_is_left_as_it_is_with_a_daemon_and_without(self):
        found = self.doctor()
        self.assertEqual((found["integrity"]["ok"], os.listdir(self.dir)), (True, []))
        self.enqueue("true")
        before = self.files()
        self.assertEqual(self.wrong(), {})
        if queuectl.sqlite_version() > (3, 8, 10):  # the older can't open it immutable
            self.assertEqual(self.files(), before)
        daemon = self.daemon("--workers", "1")
        self.wait_for("completed")
        before = os.listdir(self.dir)
        found = self.doctor()
        self.assertEqual([name for name, one in found.items() if not one["ok"]], [])
        self.assertEqual(os.listdir(self.dir), before)
        self.assertIn("held by a daemon, pid %d" % daemon.pid, found["lock"]["detail"])
        self.assertRegex(found["daemon"]["detail"], "pid %d, .*1 of 1 workers" % daemon.pid)
        del self.env["DB_PATH"]
        self.assertIn(self.db, self.doctor()["file DB"]["detail"])

    def test_versions_are_judged(self):
        for version, bug in (((3, 7, 17), True), ((3, 40, 1), True), ((3, 44, 5), True),
                             ((3, 44, 6), False), ((3, 45, 0), True), ((3, 50, 6), True),
                             ((3, 50, 7), False), ((3, 51, 2), True), ((3, 51, 3), False),
                             ((3, 52, 0), False)):
            with self.subTest(version=version):
                self.assertEqual("WAL-reset bug" in queuectl.look_at_versions(version), bug)
        with mock.patch("queuectl.sqlite_version", return_value=(3, 7, 16)):
            self.finds("versions", "3.7.16 is too old", "3.7.17 or newer")
        daemon = self.daemon()
        with mock.patch("queuectl.VERSION", "0.9"):
            self.finds("daemon", "another version", "restart it")
        self.kill(daemon)

    def test_modes_owners_and_planted_files_are_found(self):
        self.kill(self.daemon())
        os.unlink(self.sock)
        for name, path, mode in (("file DB", self.db, 0o644), ("file DB-wal", self.db + "-wal", 0o666),
                                 ("file DB.lock", self.db + ".lock", 0o640),
                                 ("file DB.log", self.db + ".log", 0o604),
                                 ("file DB-run", self.db + "-run", 0o755),
                                 ("file DB", self.db, 0o400)):
            good = stat.S_IMODE(os.stat(path).st_mode)
            os.chmod(path, mode)
            self.finds(name, "has mode %04o" % mode, "run: chmod %o %s" % (good, path))
            os.chmod(path, good)
        with mock.patch("os.geteuid", return_value=os.geteuid() + 1):
            wrong = self.wrong()
        for name in ("file DB", "file DB.lock", "file DB.log", "file DB-run"):
            self.assertIn("move it away" if name == "file DB-run" else "belongs to another user",
                          wrong[name])
        os.rename(self.db + ".lock", self.path("real"))
        for plant, words in ((os.symlink, "not a regular file"), (os.link, "hard link")):
            plant(self.path("real"), self.db + ".lock")
            self.assertIn(words, self.wrong()["file DB.lock"])
            os.unlink(self.db + ".lock")
        os.mkfifo(self.db + ".lock")
        self.assertIn("move it away", self.wrong()["file DB.lock"])

    def test_places_where_no_queue_should_be_are_found(self):
        self.enqueue("true")
        with mock.patch("queuectl.mount_of", return_value=("/", "nfs4")):
            self.finds("file system", "network file system (nfs4)", "--db on a local disk")
        with mock.patch("queuectl.mount_of", return_value=(self.db, "ext4")):
            self.finds("file system", "is mounted alone", "mount its directory")
        room = os.statvfs(self.dir)
        for values, check, *words in (
                ({"f_bavail": 10, "f_frsize": 4096}, "disk", "are free for " + self.dir, "free some"),
                ({"f_favail": 0}, "disk", "are free for " + self.dir, "free some"),
                ({"f_flag": os.ST_RDONLY}, "directory", "read-only file system", "for writing")):
            full = mock.Mock(**dict({name: getattr(room, name) for name in (
                "f_bavail", "f_frsize", "f_files", "f_favail", "f_flag")}, **values))
            if full.f_files:
                with mock.patch("os.statvfs", return_value=full):
                    self.finds(check, *words)
        os.chmod(self.dir, 0o777)
        self.finds("directory", "can be written by others")
        os.chmod(self.dir, 0o700)
        with mock.patch("os.access", return_value=False):
            self.finds("directory", "chmod u+rwx")
        self.assertIn("no directory", self.wrong("--db", self.path("none/q.db"))["directory"])

    def test_a_stale_socket_and_a_lock_that_nobody_answers_for_are_found(self):
        daemon = self.daemon()
        os.chmod(self.sock, 0o666)
        self.finds("socket", "open to others", "chmod 600")
        os.kill(daemon.pid, signal.SIGSTOP)
        os.unlink(self.sock)
        wrong = self.wrong()
        self.assertIn("nobody listens at", wrong["socket"])
        self.assertIn("nobody answers at", wrong["daemon"])
        self.kill(daemon)
        self.kill(self.daemon())
        self.finds("socket", "left by a daemon that died", "rm " + self.sock)
        os.unlink(self.sock)
        open(self.sock, "w").close()
        self.finds("socket", "not a socket of this queue", "another --socket")
        os.unlink(self.sock)
        with open(self.db + ".lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.finds("lock", "not by the daemon it names", "end that process")
            lock.write(queuectl.pad({"pid": "x", "socket": 5}, 1024).decode())
            lock.flush()
            self.finds("lock", "an unknown process")

    def test_a_damaged_a_strange_and_a_lost_database_are_found(self):
        self.ok("enqueue", "-", stdin='{"command":"true"}\n' * 500)
        whole = read(self.db)

        def put(data):
            with open(self.db, "wb") as file:
                file.write(data)
            os.chmod(self.db, 0o600)
        size = struct.unpack(">H", whole[16:18])[0]
        put(whole[:size * 30] + b"\xff" * size + whole[size * 31:])
        self.finds("integrity", "restore a backup", ".recover")
        put(whole[:size] + b"\xff" * size * 9 + whole[size * 10:])
        self.finds("integrity", "is corrupt; restore a backup")
        put(b"x" * 5000)
        self.finds("integrity", "is not a database")
        put(b"")
        self.finds("schema", "not the database that", "remove the lock file if this is meant")
        os.unlink(self.db)
        self.finds("schema", "is gone, the queue that", "restore it")
        for sql, words in (("PRAGMA user_version = 99", "has schema 99"),
                           ("PRAGMA user_version = -1", "has schema -1"),
                           ("DROP INDEX jobs_due", "lacks jobs_due: another program"),
                           ("DROP TABLE running", "lacks running, sqlite_auto"),
                           ("UPDATE meta SET value = 'other'", "not the database that")):
            put(whole)
            self.rows(sql)
            self.finds("schema", words)
        put(whole)
        with contextlib.closing(sqlite3.connect(self.db)) as connection, connection:
            connection.execute("PRAGMA writable_schema = 1")
            connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'exit_code', 'code')")
        self.finds("integrity", "another program changed it", "no such column: exit_code")

    def test_another_queue_behind_the_default_socket_is_found(self):
        self.daemon()
        with mock.patch("queuectl.DEFAULT_SOCKET", self.sock), \
                mock.patch("queuectl.default_db", return_value=self.path("none/other.db")):
            self.env.update(DB_PATH="", SOCKET_PATH="")
            self.finds("queue", "serves " + self.db, "export DB_PATH=" + self.db)


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
        self.assertEqual([service[key] for key in ("Type", "KillMode", "Restart", "NotifyAccess")],
                         ["notify", "process", "on-failure", "main"])
        self.assertEqual(unit["Install"]["WantedBy"], "multi-user.target")
        command = service["ExecStart"].split(" ")
        self.assertEqual(command[1:-3], [SCRIPT, "--db", self.db, "--socket", self.sock])
        self.assertEqual(command[-3:-1], ["daemon", "--grace"])
        grace, patience = (queuectl.parse_duration(text)
                           for text in (command[-1], service["TimeoutStopSec"]))
        self.assertLess(grace + 1000 * queuectl.GRACE_S, patience)
        with mock.patch("os.geteuid", return_value=1):
            self.assertEqual(self.unit()["Service"]["User"], "daemon")
            unit = self.unit("--user")
        self.assertEqual((unit["Install"]["WantedBy"], "User" in unit["Service"]),
                         ("default.target", False))
        del self.env["SOCKET_PATH"]
        self.assertNotIn("--socket", self.unit()["Service"]["ExecStart"])

    def test_the_words_of_a_unit_are_quoted_as_systemd_wants(self):
        for word, quoted in (("/a/b-1.db", "/a/b-1.db"), ("/50%", "/50%%"), ("/a b", '"/a b"'),
                             ("/$HOME", "/$$HOME"), ('/a"b', '"/a\\"b"'),
                             ("/a\\b", '"/a\\\\b"'), ("/a\nb", '"/a\\nb"'),
                             ("/\u00e9;'", "\"/\u00e9;'\"")):
            with self.subTest(word=word):
                self.assertEqual(queuectl.unit_word(word), quoted)
        self.assertEqual(queuectl.unit_word("/$A", variables=False), "/$A")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "needs systemd-analyze")
    def test_systemd_accepts_the_unit(self):
        for name in ("plain", "odd %n$HOME \"q\" \\back; 'x' \u00e9"):
            folder = self.path(name)
            os.mkdir(folder)
            script = shutil.copy(SCRIPT, folder)
            with open(self.path("queuectl.service"), "wb") as file:
                subprocess.check_call(
                    [sys.executable, script, "--db", folder + "/q.db", "systemd"],
                    env=self.env, stdout=file, stderr=subprocess.DEVNULL)
            verify = subprocess.Popen(["systemd-analyze", "verify", file.name],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            out, _ = verify.communicate()
            self.assertEqual((verify.returncode, [line for line in out.splitlines()
                                                  if b"queuectl" in line
                                                  and b"Special user nobody" not in line]), (0, []))

    def manager(self, address):
        """A daemon, and a function that waits until it has told that."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(sock.close)
        sock.settimeout(30)
        sock.bind(address.replace("@", "\0", 1))
        told = []

        def hears(words):
            while words not in told:
                told.append(sock.recv(4096).decode())
        self.env["NOTIFY_SOCKET"] = address
        return self.driven(HASTE, "--workers", "1"), hears

    def test_the_daemon_tells_systemd_how_it_is(self):
        daemon, hears = self.manager(self.path("notify"))
        hears("READY=1")
        self.enqueue(self.gate())
        hears("STATUS=1 worker, 0 jobs waiting, 1 running, 0 dead")
        daemon.terminate()
        hears("STOPPING=1")
        hears("STATUS=Stopping: 1 worker, 0 jobs waiting, 1 running, 0 dead")
        self.open_gate()
        self.assertEqual(daemon.wait(), 0)

    def test_a_status_is_told_once(self):
        daemon = mock.Mock(told=None, stopping=False)
        daemon.pool.count.return_value = 2
        daemon.store.counts.return_value = dict.fromkeys(queuectl.STATES, 1)
        with mock.patch("queuectl.notify") as notify:
            for environ, calls in (({}, 0), ({"NOTIFY_SOCKET": "/x"}, 1)):
                with mock.patch.dict(os.environ, environ):
                    queuectl.Daemon.tell_status(daemon)
                    queuectl.Daemon.tell_status(daemon)
                self.assertEqual(notify.call_count, calls)
        notify.assert_called_with("STATUS=2 workers, 2 jobs waiting, 1 running, 1 dead")

    @unittest.skipUnless(sys.platform.startswith("linux"), "needs abstract sockets")
    def test_an_abstract_notify_socket_is_found(self):
        _, hears = self.manager("@" + self.path("abstract"))
        hears("READY=1")

    def test_a_notify_socket_that_leads_nowhere_harms_nothing(self):
        for address in ("", "@", "nonsense", "/none/here", "x" * 300, "/dev/null"):
            with mock.patch.dict(os.environ, NOTIFY_SOCKET=address):
                queuectl.notify("READY=1")
        self.env["NOTIFY_SOCKET"] = "/none/here"
        self.daemon()
        self.assertEqual(self.ok("daemon", "stop")["success"], True)

    LINES = (  # what stands before the cursor -> what is offered, "": files
        ("dl", "dlq"), ("dlq ", "list retry"), ("dlq r", "retry"),
        ("list --state ", "pending processing completed failed dead"), ("list --state d", "dead"),
        ("--db x.db list --st", "--state"), ("--db ", ""), ("--socket list --db x dlq r", "retry"),
        ("config get ji", "jitter"), ("config set ", " ".join(queuectl.SETTINGS)),
        ("completion ", "bash fish zsh"), ("metrics --format p", "prometheus"), ("backup ", ""),
        ("backup --h", "--help"), ("daemon ", "stop status"), ("daemon --gr", "--grace"),
        ("worker start --count ", ""), ("worker start --count 2 --c", "--count"),
        ("check --max-", "--max-pending --max-dead --max-age"), ("--v", "--version"))

    def test_completion_knows_every_command_and_every_flag_by_itself(self):
        new = {"frob now": (lambda queue, args: None, (
            queuectl.arg("--colour", choices=("red", "blue")), queuectl.arg("--env", action="append"),
            queuectl.arg("what", choices=(1, 2))))}
        new["frob now"][0].__doc__ = "Frob it. At once."
        with mock.patch.dict(queuectl.COMMANDS, new):
            table = queuectl.completions()
        for name, (_, arguments) in list(queuectl.COMMANDS.items()) + list(new.items()):
            group, _, last = name.rpartition(" ")
            self.assertIn(last, dict(table[group]))
            for names, options in arguments:
                hidden = options.get("help") == argparse.SUPPRESS
                self.assertEqual([one for one in names if one[0] == "-"
                                  and (one in dict(table[name + " -"])) is hidden], [])
        self.assertEqual(dict(table[""])["frob"], "")
        self.assertEqual(table["frob"], [("now", "Frob it")])
        self.assertEqual(table["frob now"], [("1", ""), ("2", "")])
        self.assertEqual(table["frob now --colour"], [("red", ""), ("blue", "")])

    def test_a_daemon_in_the_background_gets_all_that_it_was_given(self):
        with mock.patch("queuectl.start_in_background", return_value="ready") as start:
            self.cli("daemon", "--detach", "--workers", "2", "--grace", "30s")
        self.assertEqual(start.call_args[0][1:], ("--workers", "2", "--grace", "30000ms"))

    def script(self, shell):
        code, out, _ = self.cli("completion", shell)
        self.assertEqual(code, 0)
        with open(self.path("script"), "w") as file:
            file.write(out)
        if shutil.which(shell):
            subprocess.check_call([shell, "-n", file.name])
        return file.name

    @unittest.skipUnless(shutil.which("bash"), "needs bash")
    def test_completion_in_bash(self):
        lines = self.LINES + (("list --state = de", "dead"), ("list --state =", "pending processing"
                                                               " completed failed dead"))
        out = subprocess.check_output(["bash", "-c", """. "$0"
            for line; do
                read -ra COMP_WORDS <<<"queuectl ${line}x"
                COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
                COMP_WORDS[COMP_CWORD]=${COMP_WORDS[COMP_CWORD]%x}
                COMPREPLY=(); _queuectl; echo "${COMPREPLY[*]}"
            done"""] + [self.script("bash")] + [line for line, _ in lines])
        for (line, offered), told in zip(lines, out.decode().split("\n")):
            self.assertEqual(told, offered, line)

    @unittest.skipUnless(shutil.which("fish"), "needs fish")
    def test_completion_in_fish(self):
        os.mkdir(self.path("empty"))
        out = subprocess.check_output(
            ["fish", "-c", """source $argv[1]
             for line in $argv[2..-1]; complete -C "queuectl $line"; echo END; end""",
             self.script("fish")] + [line for line, _ in self.LINES],
            cwd=self.path("empty"), env=dict(self.env, HOME=self.path("empty")))
        for (line, offered), told in zip(self.LINES, out.decode().split("END\n")):
            self.assertEqual({one.split("\t")[0] for one in told.splitlines()},
                             set(offered.split()), line)

    def test_completion_in_zsh_parses_and_unknown_shells_are_refused(self):
        self.assertIn("#compdef queuectl", read(self.script("zsh")).decode())
        self.assertIn("bash", self.refused("completion", "tcsh", status=2))


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


# ---- Bench --------------------------------------------------------------------------------------
# `make bench`: what the queue does, beside what this machine does without it. Each row a function
# that yields Figures: medians of rounds, the queue's and the yardstick's in turn, so that a noisy
# moment hits both. What was timed is checked: an unfinished or repeated job is no result.

# value, must, aim: in `unit` (aim above must: the more the better; None: only told); beside: what
# was measured
Figure = collections.namedtuple("Figure", "what value unit must aim beside")

BARE_LOOP = """import subprocess, sys, time
start = time.monotonic()
for _ in range(int(sys.argv[1])):
    subprocess.run(["/bin/sh", "-c", "true"])
print(start, time.monotonic())"""


def median(values):
    return sorted(values)[len(values) // 2]


@contextlib.contextmanager
def own_queue(*args):
    """A queue in a directory of its own, served by a daemon if `args` are given for one; however
    the block ends, no process and no file of it is left."""
    case = QueueCase()
    case.setUp()
    try:
        if args:
            case.daemon(*args)
        yield case
    finally:
        case.doCleanups()


def expect(found, wanted, what):
    if found != wanted:
        raise SystemExit("bench: %s: %r, not %r" % (what, found, wanted))


def fill(case, name, count, command, **fields):
    """Enqueue `count` jobs, their ids beginning with `name`."""
    case.ok("enqueue", "-", stdin="\n".join(
        json.dumps(dict(fields, id=name + str(n), command=command)) for n in range(count)))


def finish(case, name, count):
    """Jobs a second from the first start to the last end of the `count` jobs called so."""
    span, sql = (name, name + "~"), "SELECT %s FROM jobs WHERE id > ? AND id < ?"
    wait_until(lambda: case.rows(sql % "SUM(state = 'completed')", *span) == [(count,)],
               "%d jobs are done" % count, 60, every_s=0.2)  # our looking must cost nothing
    expect(case.rows(sql % "COUNT(*), SUM(attempts), SUM(runs), MAX(attempts)", *span),
           [(count, count, count, 1)], "jobs and attempts")
    expect(case.rows("""SELECT COUNT(*), COUNT(output) FROM attempts
                        WHERE job > ? AND job < ?""", *span), [(count, 0)], "attempts and outputs")
    start, end = map(queuectl.parse_date,
                     case.rows(sql % "MIN(started_at), MAX(finished_at)", *span)[0])
    return count * 1000.0 / (end - start)


def bare_rate(count):
    """Commands a second of two bare Python loops."""
    loops = [subprocess.Popen([sys.executable, "-c", BARE_LOOP, str(count // 2)],
                              stdout=subprocess.PIPE) for _ in range(2)]
    times = [float(text) for loop in loops for text in loop.communicate()[0].split()]
    return count / (max(times) - min(times))


def row_drain(rounds=3, count=2000):
    """2,000 x true on 2 workers, against two bare Python loops."""
    ours, bare = [], []
    for _ in range(rounds):
        bare.append(bare_rate(count))
        with own_queue() as case:
            fill(case, "job", count, "true")
            case.daemon("--workers", "2")
            ours.append(finish(case, "job", count))
    old = sys.version_info < (3, 7)
    yield Figure("drain, 2 workers", median(ours) / median(bare), "of the bare loops",
                 0.6 if old else 0.4, 0.7 if old else 0.55,
                 "%d of %d jobs/s" % (median(ours), median(bare)))


def row_enqueue(rounds=40):
    """One enqueue call, daemon up, against a bare interpreter."""
    def timed(*args):
        start = time.monotonic()
        code = subprocess.call([sys.executable] + list(args), env=case.env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        expect(code, 0, "exit status of %s" % (args,))
        return (time.monotonic() - start) * 1000
    with own_queue("--workers", "1") as case:
        case.ok("worker", "stop")
        pairs = [(timed("-c", "pass"), timed(SCRIPT, "enqueue", '{"command":"true"}'))
                 for _ in range(rounds)]
        expect(case.ok("status")["jobs"]["pending"], rounds, "jobs stored")
    bare, ours = (median(values) for values in zip(*pairs))
    yield Figure("enqueue call", ours / bare, "x python3 -c pass", 4.5, 3.5,
                 "%.1f against %.1f ms" % (ours, bare))


def row_dispatch(rounds=150):
    """From the answer to an enqueue until the job of an idle worker runs."""
    stamp = "date +%s%N"
    request = b'{"command":"enqueue","value":{"job":{"command":"%s"}}}\n' % stamp.encode()
    bare, told = [], {}
    with own_queue("--workers", "1") as case:
        for _ in range(rounds):
            start = time.time()
            bare.append(int(subprocess.check_output(["/bin/sh", "-c", stamp])) / 1e6 - start * 1e3)
            told[case.ask(request)["id"]] = time.time()
            time.sleep(0.025)
        wait_until(lambda: case.rows("SELECT COUNT(*) FROM attempts") == [(rounds,)], "all ran")
        outputs = dict(case.rows("SELECT job, output FROM attempts"))
    waits = sorted(int(outputs[job]) / 1e6 - at * 1000 for job, at in told.items())
    yield Figure("dispatch, median", median(waits), "ms", 10, 3,
                 "a bare `%s` %.1f ms" % (stamp, median(bare)))
    yield Figure("dispatch, p99", waits[rounds * 99 // 100], "ms", 50, 10, "of %d jobs" % rounds)


def fill_backlog(case, thousands):
    """So many waiting jobs, one half ready, one half scheduled over the coming day."""
    case.enqueue("true")
    with contextlib.closing(sqlite3.connect(case.db)) as connection, connection:
        connection.execute("CREATE TEMP TABLE digits (d)")
        connection.executemany("INSERT INTO digits VALUES (?)", [(d,) for d in range(1000)])
        connection.execute(
            """INSERT INTO jobs (id, command, state, cwd, env, ready, due, run_after)
               SELECT 'wait' || (a.d * 1000 + b.d), 'true', 'pending', '/', '{}',
                      CASE b.d % 2 WHEN 0 THEN 1 END,
                      CASE b.d % 2 WHEN 1 THEN ? + a.d * 86400 + b.d END, '2030-01-01T00:00:00.000Z'
               FROM digits AS a, digits AS b
               WHERE a.d < ?""", (queuectl.now_ms() + 3600000, thousands))


def urgent(case, name, count):
    """(jobs a second of `count` that go before whatever else waits, seconds of a `status`)."""
    fill(case, name, count, "true", priority=9)
    daemon = case.daemon("--workers", "2")
    rate, start = finish(case, name, count), time.monotonic()
    case.ask(b'{"command":"status"}\n')
    status_s = time.monotonic() - start
    case.kill(daemon)
    wait_until(lambda: not processes_of(case.dir), "its workers are gone")
    return rate, status_s


def row_backlog(rounds=3, count=1500):
    """Claims with 1,000,000 jobs waiting, ready and scheduled, against an empty queue."""
    with own_queue() as empty, own_queue() as full:
        fill_backlog(full, thousands=1000)
        pairs = [urgent(case, "urgent%d-" % number, count)
                 for number in range(rounds) for case in (empty, full)]
    (bare, _), (ours, status_s) = [map(median, zip(*half)) for half in (pairs[::2], pairs[1::2])]
    yield Figure("drain on 1,000,000", ours / bare, "of an empty queue's", 0.8, 0.95,
                 "%d of %d jobs/s" % (ours, bare))
    yield Figure("status on 1,000,000", status_s, "s", 0.1, 0.01, "asked at the socket")


def row_bulk(rounds=3, count=20000):
    """`enqueue -` as a process of its own, daemon up, against bare inserts into one table."""
    ours, bare = [], []
    with own_queue("--workers", "1") as case:
        case.ok("worker", "stop")
        for number in range(rounds):
            start = time.monotonic()
            with contextlib.closing(sqlite3.connect(case.path("bare.db"))) as other, other:
                other.execute("CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, command TEXT)")
                other.executemany("INSERT INTO jobs VALUES (?, 'true')",
                                  (("%d-%d" % (number, n),) for n in range(count)))
            bare.append(count / (time.monotonic() - start))
            start = time.monotonic()
            told = subprocess.run([sys.executable, SCRIPT, "enqueue", "-"], env=case.env,
                                  input=b'{"command":"true"}\n' * count, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)  # no worker runs, it would say
            ours.append(count / (time.monotonic() - start))
            expect(json.loads(told.stdout.decode())["message"], "Enqueued %d jobs" % count, "answer")
        expect(case.ok("status")["jobs"]["pending"], rounds * count, "jobs stored")
    yield Figure("enqueue in bulk", median(ours), "jobs/s", 20000, 80000,
                 "bare INSERT %d/s" % median(bare))


def toil(pid):
    """(seconds of CPU, times woken) of a process so far."""
    fields = read("/proc/%d/stat" % pid).rpartition(b")")[2].split()
    woken = re.search(rb"\nvoluntary_ctxt_switches:\s*(\d+)", read("/proc/%d/status" % pid))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(woken.group(1))


def pss_mib(pid):
    """Its share of the memory it holds, in MiB."""
    path = "/proc/%d/smaps_rollup" % pid
    text = read(path if os.path.exists(path) else "/proc/%d/smaps" % pid)
    return sum(int(kib) for kib in re.findall(rb"^Pss:\s*(\d+)", text, re.M)) / 1024.0


def row_idle(seconds=20, workers=8):
    """CPU of a daemon and 8 workers that have nothing to do."""
    with own_queue("--workers", str(workers)) as case:
        time.sleep(1)
        pids = processes_of(case.dir)
        expect(len(pids), workers + 1, "processes")
        before = [sum(column) for column in zip(*map(toil, pids))]
        time.sleep(seconds)
        after = [sum(column) for column in zip(*map(toil, pids))]
    cpu, woken = (new - old for old, new in zip(before, after))
    yield Figure("idle, %d s" % seconds, cpu, "s CPU", 0.1, 0.02, "woke %d times" % woken)


def row_memory(workers=8, count=200):
    """Memory of a daemon that has run jobs, and of each worker beyond it."""
    with own_queue("--workers", str(workers)) as case:
        fill(case, "job", count, "true")
        finish(case, "job", count)
        pids = processes_of(case.dir)
        expect(len(pids), workers + 1, "processes")
        together = sum(map(pss_mib, pids))
        case.ok("worker", "stop")
        wait_until(lambda: len(processes_of(case.dir)) == 1, "the workers are gone")
        alone = pss_mib(processes_of(case.dir)[0])
    yield Figure("memory, daemon", alone, "MiB PSS", 20, 15, "after %d jobs" % count)
    yield Figure("memory, worker", (together - alone) / workers, "MiB PSS", 6, 4,
                 "each of %d" % workers)


def row_many(rounds=3, workers=64, count=640):
    """64 workers on sleep 0.2, against the ideal 320 jobs/s."""
    ours, bare = [], []
    for _ in range(rounds):
        start = time.monotonic()
        subprocess.run(["xargs", "-P%d" % workers, "-n1", "/bin/sh", "-c", "sleep 0.2"],
                       input=b"x\n" * count)
        bare.append(count / (time.monotonic() - start))
        with own_queue() as case:
            fill(case, "job", count, "sleep 0.2")
            case.daemon("--workers", str(workers))
            ours.append(finish(case, "job", count))
    yield Figure("%d workers" % workers, median(ours) / (workers / 0.2), "of the ideal", 0.8, 0.95,
                 "%d, xargs %d jobs/s" % (median(ours), median(bare)))


def daemon_cpu_ms(workers, count=300):
    """(ms until that many workers were there, ms until they were gone, CPU ms of the daemon a job
    while all but two of them idled)."""
    with own_queue("--workers", "2") as case:
        daemon, start = case.daemons[0], time.monotonic()
        if workers > 2:
            case.ok("worker", "start", "--count", str(workers - 2))
        wait_until(lambda: case.ok("status")["workers"] == workers, "they are there")
        started, before = time.monotonic(), toil(daemon.pid)[0]
        fill(case, "job", count, "true")
        finish(case, "job", count)
        busy, stop = toil(daemon.pid)[0] - before, time.monotonic()
        case.ok("worker", "stop")
        wait_until(lambda: len(processes_of(case.dir)) == 1, "they are gone")
        return (started - start) * 1000, (time.monotonic() - stop) * 1000, busy * 1000 / count


def row_fleet():
    """Hundreds of workers: how long they take to come and go, and what idle ones cost."""
    few = daemon_cpu_ms(2)[2]
    for workers in (64, 256, 1000):
        came, went, busy = daemon_cpu_ms(workers)
        yield Figure("%d workers come" % workers, came / workers, "ms each", None, None,
                     "gone in %.1f ms each; a job costs the daemon %.2f ms, with 2 workers %.2f"
                     % (went / workers, busy, few))


def row_clients(calls=200, clients=8, seconds=5):
    """Enqueue calls that come together: as processes, and from clients that ask in loops."""
    def ask_on(waits):
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as answers:
            sock.connect(case.sock)
            while time.monotonic() < end:
                start = time.monotonic()
                sock.sendall(b'{"command":"enqueue","value":{"job":{"command":"true"}}}\n')
                answers.readline()
                waits.append((time.monotonic() - start) * 1000)
    with own_queue("--workers", "1") as case:
        case.ok("worker", "stop")
        start = time.monotonic()
        each = [case.spawn("enqueue", "-q", "--", "true") for _ in range(calls)]
        for process in each:
            expect(process.wait(), 0, "exit status of a call")
        rate = calls / (time.monotonic() - start)
        yield Figure("%d calls at once" % calls, rate, "calls/s", None, None, "none refused")
        waits, end = [], time.monotonic() + seconds
        threads = [threading.Thread(target=ask_on, args=(waits,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expect(case.ok("status")["jobs"]["pending"], calls + len(waits), "jobs stored")
    waits.sort()
    yield Figure("%d clients in loops" % clients, len(waits) / seconds, "jobs/s", None, None,
                 "median %.2f, p99 %.2f ms" % (waits[len(waits) // 2], waits[len(waits) * 99 // 100]))


def row_safety(rounds=5, count=300):
    """What promises cost: a commit on the disk against one in the system's memory; a run file with
    its lock for each attempt."""
    def commits(store, durable):
        start = time.perf_counter()
        for _ in range(count):
            with store.transaction(durable=durable):
                store.insert([queuectl.make_job({"command": "true"}, store.settings, 0)])
        return (time.perf_counter() - start) * 1000 / count

    def run_files(folder):
        start = time.perf_counter()
        for number in range(count):
            fd = os.open("%s/%d" % (folder, number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.close(fd)
            os.unlink("%s/%d" % (folder, number))
        return (time.perf_counter() - start) * 1000 / count
    with own_queue() as case:
        store = queuectl.Store(case.db)
        full, normal, files = map(median, zip(*[
            (commits(store, True), commits(store, False), run_files(case.dir))
            for _ in range(rounds)]))
        store.close()
    yield Figure("an enqueue, FULL", full, "ms", None, None, "NORMAL, lost by a power cut: %.3f ms"
                 % normal)
    yield Figure("run file and lock", files, "ms a job", None, None, "made, locked, removed")


ROWS = (row_drain, row_enqueue, row_dispatch, row_backlog, row_bulk, row_idle, row_memory, row_many,
        row_fleet, row_clients, row_safety)


def verdict_of(figure):
    if figure.must is None:
        return "-"
    sign = 1 if figure.aim > figure.must else -1
    return ("aim" if figure.value * sign >= figure.aim * sign else
            "must" if figure.value * sign >= figure.must * sign else "MISSED")


def in_digits(value):
    if value is None:
        return "-"
    return "%d" % value if value >= 1000 else "%.3g" % value


def bench(names):
    """Print the table, or the rows named; the exit status tells whether every must was reached."""
    known = {row.__name__[4:]: row for row in ROWS}
    if set(names) - set(known):
        raise SystemExit("bench: rows are " + ", ".join(known))
    layout, missed = "%-20s %8s %-20s %8s %8s  %-6s %s", False
    print("Python %s, SQLite %s, %d CPUs, load %.1f" % (
        sys.version.split()[0], sqlite3.sqlite_version, os.cpu_count(), os.getloadavg()[0]))
    print(layout % ("row", "figure", "unit", "must", "aim", "holds", "measured"))
    for name in names or known:
        for figure in known[name]():
            sign = "" if figure.must is None else ">= " if figure.aim > figure.must else "<= "
            print(layout % (figure.what, in_digits(figure.value), figure.unit,
                            sign + in_digits(figure.must), sign + in_digits(figure.aim),
                            verdict_of(figure), figure.beside), flush=True)
            missed = missed or verdict_of(figure) == "MISSED"
    return int(missed)


# ---- Stress -------------------------------------------------------------------------------------
# `make stress`: the storm kills workers and daemons for minutes while jobs keep coming, the soak
# runs 100,000 jobs through one daemon. `make plug`: power cuts. Figures are printed; anything lost
# or run twice at once makes the exit status 1.


class Storm(QueueCase):
    """Random kills against a queue that a feeder keeps full; `report` tells what became of it."""

    OPEN = 100  # jobs waiting or running, about so many

    def __init__(self, seed):
        super().__init__("rage")
        self.chance = random.Random(seed)
        self.acknowledged = set()   # ids that an enqueue returned
        self.refused = 0            # enqueue calls without an answer, or with a no
        self.kills = {"worker": 0, "daemon": 0}
        self.pending = {}           # serial of an attempt hit by a kill -> when, monotonic
        self.slowest = 0.0          # s from a kill until the attempt's fate was recorded
        self.over = threading.Event()

    def feed(self):
        """Enqueue a few jobs at a time, whoever is there to take them."""
        place = queuectl.Place(self.db, True, self.sock, True)
        number = 0
        while not self.over.is_set():
            self.over.wait(0.02)
            waiting, = self.rows("SELECT SUM(jobs) FROM counts WHERE state != 'completed'")[0]
            if waiting > self.OPEN:
                continue
            ids = ["job%d" % (number + n) for n in range(5)]
            number += 5
            jobs = [{"id": one, "max_retries": 1000,
                     "command": StormTest.JOB % {"dir": self.dir, "ms": number % 9 + 1}} for one in ids]
            try:
                answer = queuectl.Queue(place, lambda line: None).call("enqueue", "batch", jobs=jobs)
                self.assertEqual(answer["message"], "Enqueued 5 jobs")
                self.acknowledged.update(ids)
            except queuectl.Failure:
                self.refused += 1

    def open_attempts(self):
        return dict(self.rows("SELECT serial, slot FROM running"))

    def watch(self):
        """Note which of the attempts hit by a kill are settled now."""
        for serial in set(self.pending) - set(self.open_attempts()):
            self.slowest = max(self.slowest, time.monotonic() - self.pending.pop(serial))

    def kill_worker(self, daemon):
        victims = self.workers_of(daemon)
        if not victims:
            return
        victim = self.chance.choice(sorted(victims))
        files = set()
        with contextlib.suppress(OSError):  # it may be on its way out
            files = {os.readlink("/proc/%d/fd/%s" % (victim, fd))
                     for fd in os.listdir("/proc/%d/fd" % victim)}
        os.kill(victim, signal.SIGKILL)  # not reaped yet: nobody else's
        self.kills["worker"] += 1
        for serial, slot in self.open_attempts().items():
            if "%s-run/w.%d" % (self.db, slot) in files:
                self.pending.setdefault(serial, time.monotonic())

    def kill_daemon(self, daemon):
        self.kill(daemon)
        self.daemons.remove(daemon)
        daemon.stdout.close()
        self.kills["daemon"] += 1
        for serial in self.open_attempts():
            self.pending.setdefault(serial, time.monotonic())
        return self.daemon()

    def rage(self, seconds):
        """Kill for so long; then let the queue come to rest."""
        self.ok("config", "set", "delay-base", "1")
        daemon = self.daemon("--workers", "4")
        feeder = threading.Thread(target=self.feed)
        feeder.start()
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(self.chance.uniform(0.01, 0.05))
                self.watch()
                if self.chance.random() < 0.98:
                    self.kill_worker(daemon)
                else:
                    daemon = self.kill_daemon(daemon)
        finally:
            self.over.set()
            feeder.join()
        wait_until(lambda: self.watch() or self.rows(
            "SELECT COUNT(*) FROM jobs WHERE state != 'completed'") == [(0,)], "all is done", 120)
        self.watch()

    def report(self):
        """What is wrong, as {name: ids or rows}; empty is good."""
        log, stored = self.read("log").split(), {row[0] for row in self.rows("SELECT id FROM jobs")}
        print("storm: %(worker)d workers and %(daemon)d daemons killed" % self.kills
              + ", %d jobs acknowledged, %d calls refused, %d attempts, %d ran more than once,"
                " slowest recovery %.2f s" % (
                    len(self.acknowledged), self.refused,
                    self.rows("SELECT COUNT(*) FROM attempts")[0][0], len(log) - len(set(log)),
                    self.slowest))
        wrong = {
            "lost": sorted(self.acknowledged - stored),
            "never run": sorted(stored - set(log)),
            "overlaps": self.read("overlaps").split(),
            "not completed": self.rows("SELECT id, state FROM jobs WHERE state != 'completed'"),
            "miscounted": self.rows("""SELECT id FROM jobs WHERE attempts != runs OR attempts != (
                SELECT COUNT(*) FROM attempts WHERE job = jobs.id)"""),
            "damaged": [row for row in self.rows("PRAGMA integrity_check") if row != ("ok",)],
            "slow": ["%.2f s" % self.slowest] if self.slowest > 2 else []}
        return {name: found for name, found in wrong.items() if found}


class Soak(QueueCase):
    """Many short jobs through one daemon: nothing may grow."""

    def __init__(self):
        super().__init__("sample")

    def sample(self, daemon):
        """(PSS in MiB, descriptors, zombies, WAL in MiB, database in MiB)"""
        zombies = sum(parent(pid) == daemon.pid and not queuectl.process_start(pid)
                      for pid in map(int, filter(str.isdigit, os.listdir("/proc"))))
        sizes = [os.path.getsize(self.db + end) / 1048576.0 for end in ("-wal", "")]
        return [pss_mib(daemon.pid), len(os.listdir("/proc/%d/fd" % daemon.pid)), zombies] + sizes

    def soak(self, count, batch=1000):
        """Run `count` jobs; what grew, as {name: [early, late]}."""
        self.ok("config", "set", "retention", "2s")
        daemon = self.daemon("--workers", "2")
        lines, samples, start = '{"command":"echo x"}\n' * batch, [], time.monotonic()
        print("soak: %7s %9s %9s %8s %9s %9s" % ("jobs", "PSS MiB", "open fds", "zombies",
                                                 "WAL MiB", "DB MiB"))
        for number in range(0, count, batch):
            self.ok("enqueue", "-", stdin=lines)
            done = self.wait_for_completed(number - 2 * batch)
            if len(samples) < done * 10 // count:
                samples.append(self.sample(daemon))
                print("soak: %7d %9.1f %9d %8d %9.1f %9.1f" % ((done,) + tuple(samples[-1])),
                      flush=True)
        self.wait_for_completed(count)
        print("soak: %d jobs/s" % (count / (time.monotonic() - start)))
        wait_until(lambda: self.rows("SELECT COUNT(*) FROM jobs") == [(0,)], "all are purged", 60)
        samples.append(self.sample(daemon))
        early = [max(column) for column in zip(*samples[:max(len(samples) // 2, 1)])]
        names = ("PSS", "descriptors", "zombies", "WAL", "database")
        grew = {name: [first, last] for name, first, last, slack in zip(
            names, early, samples[-1], (2, 2, 0, 8, 0.5)) if last > first * 1.1 + slack}
        totals = self.rows("SELECT enqueued, completed, failed, dead FROM totals")
        if totals != [(count, count, 0, 0)]:
            grew["enqueued, completed, failed, dead"] = totals
        return grew

    def wait_for_completed(self, wanted):
        """Wait until so many have completed; how many have."""
        return wait_until(lambda: self.rows(
            "SELECT completed FROM totals WHERE completed >= ?", wanted),
            "%d jobs completed" % wanted, 120, every_s=0.2)[0][0]


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

    def switch_on(self, image):
        """Mount the image and start a daemon, as after another boot."""
        subprocess.check_call(["mount", "-o", "loop", image, self.disk])
        os.chmod(self.disk, 0o700)
        self.driven("queuectl.boot_id = lambda: %r" % image, "--workers", "3")

    def feed(self, name, acknowledged, over):
        """Enqueue jobs, and cancel some; `acknowledged`: id -> the state it must come to, None: that
        is not known yet."""
        queue = queuectl.Queue(queuectl.Place(self.db, True, self.sock, True), lambda line: None)
        for number in range(10 ** 6):
            if over.is_set():
                return
            job_id = "%s.%d" % (name, number)
            queue.call("enqueue", job={"id": job_id, "max_retries": 1000, "command":
                                       StormTest.JOB % {"dir": self.dir, "ms": number % 9 + 1}})
            acknowledged[job_id] = "completed" if number % 7 else None
            if number % 7 == 0:
                with contextlib.suppress(queuectl.Failure):  # it has just completed
                    queue.call("cancel", ids=[job_id])
                    acknowledged[job_id] = "dead"

    def pull(self, name):
        """One power cut; what is wrong after it, as {what: ids or rows}."""
        # New names: a loop device that lingers would show the old contents.
        before, after = self.path("before%d" % name), self.path("after%d" % name)
        with open(before, "wb") as file:
            file.truncate(64 << 20)
        subprocess.check_call(["mkfs.ext4", "-q", "-F", before])
        self.switch_on(before)
        acknowledged, over = {}, threading.Event()
        feeder = threading.Thread(target=self.feed, args=(name, acknowledged, over))
        feeder.start()
        try:
            time.sleep(self.chance.uniform(0.3, 1.5))
            for pid in processes_of(self.dir):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
            promised = dict(acknowledged)
            shutil.copyfile(before, after)
        finally:
            over.set()
            self.kill_all()
            feeder.join()
        self.switch_off()
        self.switch_on(after)
        wait_until(lambda: not self.unfinished(), "all is done", 60)
        wrong = self.report(name, promised)
        self.switch_off()
        os.unlink(before)
        os.unlink(after)
        return wrong

    def report(self, name, promised):
        stored = dict(self.rows("SELECT id, state FROM jobs"))
        log = [job_id for job_id in self.read("log").split() if job_id in stored]
        print("plug: cut %s, %d jobs acknowledged, %d stored, %d of them ran more than once" % (
            name, len(promised), len(stored), len(log) - len(set(log))), flush=True)
        wrong = {
            "lost": sorted(set(promised) - set(stored)),
            "in the wrong state": sorted(job_id for job_id, state in promised.items()
                                         if state not in (None, stored.get(job_id))),
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
            wrong.update(case.pull(number))
    finally:
        case.doCleanups()
    return conclude("plug", wrong, "nothing lost, nothing damaged")


def stress(seconds, seed, jobs):
    """The storm, then the soak; the exit status."""
    print("stress: %d s, then %d jobs; the same again with: make stress SEED=%d" % (
        seconds, jobs, seed), flush=True)
    wrong = {}
    storm, soak = Storm(seed), Soak()
    for case, action in ((storm, lambda: storm.rage(seconds) or storm.report()),
                         (soak, lambda: soak.soak(jobs - jobs % 1000))):
        case.setUp()
        try:
            wrong.update(action())
        finally:
            case.doCleanups()
    return conclude("stress", wrong, "nothing lost, nothing twice, nothing grew")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` cleans up
    if sys.argv[1:2] == ["bench"]:
        sys.exit(bench(sys.argv[2:]))
    if sys.argv[1:2] == ["stress"]:
        sys.exit(stress(int(os.environ.get("SECONDS") or 180),
                        int(os.environ.get("SEED") or time.time()),
                        int(os.environ.get("JOBS") or 100000)))
    if sys.argv[1:2] == ["plug"]:
        sys.exit(plug(int(os.environ.get("ROUNDS") or 10),
                      int(os.environ.get("SEED") or time.time())))
    # What a later Python will refuse is an error already, here and in every process of a test.
    warnings.filterwarnings("error", category=DeprecationWarning, module="queuectl$")
    os.environ["PYTHONWARNINGS"] = "error::DeprecationWarning:__main__"
    unittest.main(warnings=False)
