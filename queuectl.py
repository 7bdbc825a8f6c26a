#!/usr/bin/env python3
"""queuectl: a durable job queue for one host, in one file.

  queuectl enqueue -- tar -czf /srv/etc.tgz /etc
  queuectl worker start --count 2
  queuectl status
  queuectl logs -f ID
  queuectl dlq retry ID

 cron, shells, scripts        daemon: a supervisor and its children
 +-------------+  changes     +--------------------------------------------------------+
 | queuectl …  |  as JSON     | server: socketserver on the Unix socket -> Requests    |
 |             +------------->|    | "look"                                            |
 +------+------+              | supervisor: as many workers as wanted, wakes idle ones |
        | looks; and          |    |                                                   |
        | changes when no     |    +-> worker 1 … N --> /bin/sh -c COMMAND             |
        v daemon runs         +----------------+---------------------------------------+
      Store                                  Store: one transaction at a time, in turn,
        +---------------- SQLite, WAL ---------+    under flock(DB-run/lock)

Life cycle of a job, and what moves it:

  (new)      -> pending              Store.insert, Store.replace
  pending    -> processing           Store.claim
  failed     -> processing           Store.claim, once run_after has passed
  processing -> completed            Store.finish: exit 0
  processing -> failed               Store.finish: will be tried again
  processing -> dead                 Store.finish: out of retries
  processing -> cancelled            Store.finish: at its user's wish
  processing -> pending or failed    Store.finish: given back, not counted
  pending or failed -> cancelled     Store.cancel
  any end -> pending                 Store.requeue

On disk: DB (SQLite, WAL) and DB-run/: lock (held for each transaction), door (where workers queue
for it), daemon (held by the daemon for its life, with a note), w.N (held by the worker of slot N, who
notes its attempt there), a number (the output of a running attempt), queuectl.pyc (what a daemon in
the background runs), log, log.1, and socket if the usual one is taken.

The sections of this file, each of which uses only those above it:

  Constants and defaults
  Time, ids and text
  Errors
  Files and processes
  Place
  Jobs and settings
  Verdicts
  Schema
  Store
  Requests
  Running a command
  Worker
  Pool
  Server
  Daemon
  Client
  Looking
  Output
  Commands
  Main

Licence: ISC
"""
import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # the script's directory: a json.py lying there must not be imported

import argparse
import collections
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import select
import signal
import socket
import stat
import time
from contextlib import closing, contextmanager, suppress
from time import monotonic, sleep

# ---- Constants and defaults ---------------------------------------------------------------------
# What is fixed; for what `config set` may change see SETTINGS. Times are milliseconds unless the
# name says _s.

VERSION = "1.0.0"
STATES = "pending processing completed failed dead cancelled".split()
UNFINISHED = ("pending", "processing", "failed")
FINISHED = ("completed", "dead", "cancelled")

MAX_MS = 10 ** 12               # the longest duration taken, some 31 years
LAST_MS = 253402300800000       # the year 10000, where ISO dates end
MAX_COMMAND = 131071            # bytes: Linux takes no longer argument
MAX_REQUEST = 16 << 20          # bytes of one request
MAX_WORKERS = 1000              # slots above it belong to `run` and `drain`
MAX_SOCKET_PATH = 107           # bytes: sockaddr_un, less its NUL
MAX_CLIENTS = 400               # connections at once
BATCH_JOBS = 1000               # `enqueue -` stores so many at once,
BATCH_BYTES = 8 << 20           # or so many bytes
STEP = 1000                     # rows or ids that one transaction takes on
MAX_NAMED = 10000               # jobs that a user may name for one change
PAGE = 400                      # rows of one look; SQLite 3.7.17 takes 999 values
LOOKED_AT = 20000               # jobs that `check` looks at, some 20 ms
MAX_DEAD_COMMAND = 100000       # bytes of QUEUECTL_DEAD_COMMAND
MIN_RUN_FILE = 1 << 20          # bytes an attempt's output may grow to, at least, before it is cut
MAX_LOG = 10 << 20              # bytes of DB-run/log before it is moved aside
LOW_DISK = 64 << 20             # bytes free below which `doctor` warns
PIECE = 64 << 10                # bytes of output read at a time
HEADER = 20                     # bytes at the start of a run file: how many are missing

KEEP_MS = 2000                  # a completed job stays at least: who waits for it must see it
GRACE_S = 2.0                   # from SIGTERM to SIGKILL
LOOK_S = 1.0                    # between two looks of a supervisor
PATIENCE_S = 40.0               # how long a command waits for its turn, or for an answer
TURN_S = 0.1                    # how long a supervisor does
BUSY_S = 0.05                   # SQLite's own wait for another program's lock
POLL_S = 0.2                    # between two looks of a command that watches, at the most
IDLE_S = 60.0                   # a connection without a request is closed

DEFAULT_SOCKET = "/tmp/queuectl.sock"

# ---- Time, ids and text -------------------------------------------------------------------------
# The only place that reads the wall clock. Whatever decides or stores takes the time as `now`:
# milliseconds since 1970, UTC. Timeouts are measured by monotonic(), in seconds.

UNITS_MS = {"d": 86400000, "h": 3600000, "m": 60000, "s": 1000, "ms": 1}
DATE = (r"(?a)(19[7-9]\d|[2-9]\d{3})-(\d\d)-(\d\d)"
        r"(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?"
        r"\s?([Zz]|([+-](?:[01]\d|2[0-3]))(?::?([0-5]\d))?)?)?")
DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"

def now_ms():
    """The wall clock, in ms since 1970."""
    return int(time.time() * 1000)

@functools.lru_cache()  # a batch asks for few
def iso(ms):
    """2026-01-15T10:30:00.000Z for ms since 1970; None for None."""
    if ms is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ms // 1000)) + ".%03dZ" % (ms % 1000)

def parse_date(text, local=False):
    """ms since 1970 of an ISO 8601 date-time, or SQLite's; without an offset it is UTC, or `local`."""
    from datetime import datetime, timedelta, timezone
    try:
        *numbers, fraction, zone, hours, minutes = re.fullmatch(DATE, text.strip()).groups("0")
        moment = datetime(*map(int, numbers))
        if zone != "0" or not local:
            moment = moment.replace(tzinfo=timezone.utc) - timedelta(
                hours=int(hours), minutes=int(hours[0] + minutes))
        return int(moment.timestamp()) * 1000 + int((fraction + "00")[:3])
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ValueError("must be a date-time since 1970, like 2026-01-15T10:30:00Z")

def next_time(text, now):
    """ms of a date in local time; a time of the day alone is the next one: 03:00."""
    from datetime import date, timedelta
    if not re.fullmatch(r"\d\d?:\d\d", text):
        return parse_date(text, local=True)
    today = date.fromtimestamp(now / 1000)
    first, second = (parse_date("%s %s" % (day, text.zfill(5)), local=True)
                     for day in (today, today + timedelta(1)))
    return first if first > now else second

def parse_duration(text):
    """ms of `90s`, `5m`, `1h30m`, `500ms`."""
    if not re.fullmatch(r"(?a)(\d{1,13}(ms|[smhd]))+", text):
        raise ValueError("must have a unit, like 90s, 5m, 1h30m or 1d")
    return sum(int(count) * UNITS_MS[unit] for count, unit in re.findall(r"(\d+)([a-z]+)", text))

def whole(text):
    """The number that a text of digits is, also the original's 60000.0; any other text as it is."""
    return int(float(text)) if re.fullmatch(r"(?a)\s*-?\d{1,15}(\.0)?\s*", text) else text

def lapse(ms):
    """A duration for people, in two units at most: 10 ms, 45 s, 3 m 20 s."""
    parts = []
    for unit, size in UNITS_MS.items():
        count, ms = divmod(ms, size)
        parts += ["%d %s" % (count, unit)] * bool(count)
    return " ".join(parts[:2]) or "0 s"

def new_ids(now, count=1):
    """`count` new job ids of 14 characters that sort by time."""
    first = (now << 25) + int.from_bytes(os.urandom(3), "big")
    return ["".join(DIGITS[number >> shift & 31] for shift in range(65, -5, -5))
            for number in range(first, first + count)]

def safe(text):
    """`text` with everything escaped that a terminal would act on or hide."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

def utf8(argument):
    """An argument or a path as users know it: with the C locale 3.6 makes surrogates of é."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument

def as_bytes(text):
    """UTF-8, with lone surrogates for the bytes that are none."""
    return text.encode("utf-8", "surrogateescape")

def os_path(text):
    """The reverse of `utf8`: a path as the OS is told it."""
    return os.fsdecode(as_bytes(text))

def plural(count, noun):
    return "%d %s%s" % (count, noun, "" if count == 1 else "s")

# A value as JSON in one ASCII line. repr: another program may have put bytes into a row.
compact = json.JSONEncoder(separators=(",", ":"), default=repr).encode

# ---- Errors -------------------------------------------------------------------------------------
# A Failure is expected: it becomes one line that says the way out, never a traceback.

class Failure(Exception):
    """A normal failure: `str()` is a line for the user, safe for a terminal; `details` for programs."""

    exit_code = 1

    def __init__(self, message, **details):
        super().__init__(safe(message))
        self.details = details

class Usage(Failure):
    """The command line itself is wrong."""

    exit_code = 2

class NoDaemon(Failure):
    """A command needs the daemon and none runs."""

    def __init__(self, db):
        super().__init__("no daemon runs for %s; start one with: queuectl worker start" % db)

class StorageError(Failure):
    """The database can't be used now. After a failed sync a change may have been made all the same."""

class Busy(StorageError):
    """It is not our turn yet, or another program holds the database's write lock."""

class Replaced(StorageError):
    """The database is no longer the file that was opened."""

REMEDIES = (  # what SQLite or the OS says -> what to tell of the file
    ("locked", "is locked by another program; try again when it is done"),
    ("File exists", "is there already, and nothing replaces it; name another file"),
    ("full|No space|quota", "has no space left; free some and try again"),
    ("readonly|Read-only", "can't be written; check its mode and its file system"),
    ("unable to open|denied", "can't be opened; check its directory and owner, or give another --db"),
    ("not a database", "is not a database; restore a backup or move it"),
    ("malformed|too big", "is corrupt; restore a backup, or save what is left: sqlite3 FILE .recover"),
    ("no such", "is not a queue's database; give another --db, or restore a backup"),
    ("disk I/O", "can't be read or written; its disk is full, or look at the kernel's log"),
    ("", "can't be used"))

def storage_error(path, error):
    """The StorageError for a sqlite3 or OS `error` on the file at `path`, with what to do."""
    text = getattr(error, "strerror", None) or str(error)
    words, advice = next(row for row in REMEDIES if re.search(row[0], text))
    return (Busy if words == "locked" else StorageError)("%s %s (%s)" % (path, advice, text))

def decode_json(text, what):
    """The value of a JSON text or its bytes; a Failure naming `what` when it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise Failure("%s is nested too deeply" % what)
    except ValueError as error:
        raise Failure("%s is not JSON in UTF-8: %s" % (what, error))

# ---- Files and processes ------------------------------------------------------------------------
# Files that nobody planted, and processes that are the ones we mean.

def others_can_write(status):
    """Whether someone else may write there; a primary group that bears the user's name may."""
    if status.st_mode & 0o022 != 0o020:
        return bool(status.st_mode & 0o002)
    import grp
    import pwd
    with suppress(KeyError):
        mine = pwd.getpwuid(os.geteuid())
        return (status.st_gid != mine.pw_gid or grp.getgrgid(status.st_gid).gr_name != mine.pw_name)
    return True

def check_ours(path, status, is_kind=stat.S_ISREG):
    """Refuse what is no regular file, or no directory, of ours that only we can write."""
    if not is_kind(status.st_mode) or status.st_uid != os.geteuid():
        raise Failure("%s is not a plain file or directory of yours (%s, uid %d); run as its owner, or"
                      " give another --db" % (path, stat.filemode(status.st_mode), status.st_uid))
    if others_can_write(status):
        raise Failure("%s can be written by others; give another --db, or, if none of them needs it,"
                      " run: chmod go-w %s" % (path, path))

def open_private(path, flags=os.O_RDWR | os.O_CREAT):
    """A descriptor on a file of ours, made 0600 if need be. Links are never followed. Also the `opener`
    of an open()."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Failure("%s is a symbolic link; move it away" % path)
        raise storage_error(path, error)
    try:
        check_ours(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd

def private_directory(path):
    """Make `path`, with what is missing above it, a directory of ours, 0700; one that is there must be
    ours, and nobody else may write it."""
    umask = os.umask(0o077)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error)
    finally:
        os.umask(umask)
    check_ours(path, os.lstat(path), stat.S_ISDIR)

def content(path):
    """The bytes of a file; none where it isn't there, or we may not read it."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""

def file_system(path):
    """The type of the file system that `path` is on; "" where the system doesn't say."""
    device = os.stat(path).st_dev
    types = re.findall(rb"(?m)^\S+ \S+ %d:%d .* - (\S+)" % (os.major(device), os.minor(device)),
                       content("/proc/self/mountinfo"))
    return types[0].decode() if types else ""

@functools.lru_cache()  # no process outlives it
def boot_id():
    """Differs after each boot; "" where the system doesn't say."""
    return content("/proc/sys/kernel/random/boot_id").decode().strip()

def process_start(pid):
    """When process `pid` started, in some unit of the system's; "" when it is gone or a zombie, or the
    system doesn't say."""
    fields = content("/proc/%s/stat" % pid).rpartition(b")")[2].split()
    return fields[19].decode() if fields and fields[0] not in b"ZX" else ""

def try_lock(fd, how=fcntl.LOCK_EX):
    """Whether the flock on `fd` was free, and is ours now."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False

def is_locked(path):
    """Whether another process holds the lock on a file. Shared: two who look don't collide."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return not try_lock(file, fcntl.LOCK_SH)
    return False

def processes(path=None, mark=None):
    """The pids, but for our own, that have the file `path` open for writing, or `mark` in their
    environment. Empty where there is no /proc."""
    import glob
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*") if path else ():
        with suppress(OSError):  # who only reads it, like tail -f, is no part of a job
            if os.path.samefile(link, path) and re.search(
                    rb"flags:\s+\d*[12]\s", content(link.replace("/fd/", "/fdinfo/"))):
                found.add(link)
    found.update(environ for environ in glob.glob("/proc/[0-9]*/environ")
                 if mark and mark in content(environ).split(b"\0"))
    return {int(name.split("/")[2]) for name in found} - {os.getpid()}

def read_note(path):
    """The object noted in a file of ours; {} when there is none, or it is not all there."""
    with suppress(ValueError):
        return json.loads(content(path))
    return {}

def write_note(fd, **note):
    """Note an object in the file, filled up with blanks: one write replaces it whole."""
    os.pwrite(fd, compact(note).encode().ljust(4000), 0)

def peer_uid(sock):
    """Who is at the other end of a Unix socket, by the kernel's word; None where it gives none."""
    for level, name in ((socket.SOL_SOCKET, "SO_PEERCRED"), (0, "LOCAL_PEERCRED")):
        if hasattr(socket, name):  # a pid or a version, then the uid
            credentials = sock.getsockopt(level, getattr(socket, name), 12)
            return int.from_bytes(credentials[4:8], sys.byteorder)
    return None

# ---- Place --------------------------------------------------------------------------------------
# Where a queue lives: its database, DB-run, the locks in there, and whose turn it is.

NETWORKS = r"nfs|cifs|smb|9p|afs|ceph|gluster|lustre|ncp|fuse\.(ssh|gluster|ceph|s3|rclone)"
# What raises in a command, and what stops a process: not while it holds the lock.
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGTSTP,
        signal.SIGTTIN, signal.SIGTTOU)

class Place(collections.namedtuple("Place", "db db_given socket socket_given")):
    """Where a queue is. db, socket: absolute paths; …_given: by flag or environment."""

    __slots__ = ()

    def file(self, name):
        """A path in DB-run: "lock", "w.1", 17 …; "": DB-run itself."""
        return ("%s-run/%s" % (self.db, name)).rstrip("/")  # a link would be followed for its slash

    def exists(self):
        """Whether there is a queue here."""
        return os.path.lexists(self.db)

    def check(self):
        """Refuse a place where no queue can be, or a file that is not ours."""
        folder = os.path.dirname(self.db)
        if not os.path.isdir(folder):
            if self.db_given:
                raise Failure("no directory %s for %s; make it, or give another --db"
                              % (folder, self.db))
            return  # it will be made, with DB-run
        if os.geteuid() == 0:  # another is the user's affair
            check_ours(folder, os.stat(folder), stat.S_ISDIR)
        if re.match(NETWORKS, file_system(folder)):
            raise Failure("%s is on a network file system (%s), where SQLite's WAL does not work;"
                          " give a --db on a local disk" % (self.db, file_system(folder)))
        if self.exists():
            status = os.lstat(self.db)
            check_ours(self.db, status)
            if not status.st_mode & 0o200:
                raise StorageError("%s is read-only; run: chmod u+rw %s" % (self.db, self.db))

    def slots(self):
        """The numbers of the slots whose worker lives, in order."""
        with suppress(FileNotFoundError):
            return sorted(int(name[2:]) for name in os.listdir(self.file(""))
                          if re.fullmatch(r"w\.\d+", name) and is_locked(self.file(name)))
        return []

    def note_of(self, slot):
        """What the worker of a slot noted: pid, at (ms), only; serial, leader, start of its attempt."""
        return read_note(self.file("w.%d" % slot))

    def hold(self, name, wait_s):
        """A descriptor that holds the lock on a file in DB-run; None if another still has it after
        `wait_s`: somebody may just look at it."""
        fd, until = open_private(self.file(name)), monotonic() + wait_s
        while not try_lock(fd):
            if monotonic() > until:
                os.close(fd)
                return None
            sleep(0.001)
        return fd

    def daemon(self):
        """What the daemon noted of itself: pid, start, socket …; {} when none runs."""
        path = self.file("daemon")
        return read_note(path) if is_locked(path) else {}

    def hold_daemon(self, wait_s):
        """A descriptor that holds the daemon's lock; a Failure if another still has it then."""
        fd = self.hold("daemon", wait_s)
        if fd is None:
            raise Failure("a daemon, pid %s, already serves %s; stop it with: queuectl daemon stop"
                          % (read_note(self.file("daemon")).get("pid", "unknown"), self.db))
        return fd

    def log(self, text):
        """A line in DB-run/log for what an operator should know; never a payload."""
        path = self.file("log")
        with suppress(OSError, Failure), open(path, "a", encoding="utf-8", opener=open_private) as file:
            file.write("%s [%d] %s\n" % (iso(now_ms()), os.getpid(), safe(text)))
            if file.tell() > MAX_LOG:
                os.rename(path, path + ".1")

class Turn:
    """The right to touch the database: flock on DB-run/lock. A process opens it for itself, after any
    fork: an inherited descriptor is the same lock.

    patience_s: Busy after so long, and HELD signals are blocked meanwhile; None: it waits as long
    as it takes, in a process or thread that no signal raises in.
    door: it waits at DB-run/door first, as workers do, so that one of them at most delays others.
    """

    def __init__(self, place, patience_s, door):
        self.fd = open_private(place.file("lock"))
        self.door = open_private(place.file("door"))
        self.by_door = door
        self.patience_s = patience_s
        self.waiting = False

    def on_alarm(self, *_):
        if self.waiting:
            raise Busy("another process keeps the database's lock; see: queuectl doctor")

    def take(self):
        if self.patience_s is None:
            if self.by_door:
                fcntl.flock(self.door, fcntl.LOCK_EX)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            if self.by_door:
                fcntl.flock(self.door, fcntl.LOCK_UN)
        else:
            self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
            try:
                try_lock(self.fd) or self.wait()
            except BaseException:
                self.release()
                raise

    def wait(self):
        """Block until it is ours; signals are let in meanwhile, and may raise."""
        try:
            self.waiting = True
            signal.signal(signal.SIGALRM, self.on_alarm)
            signal.setitimer(signal.ITIMER_REAL, self.patience_s, 1)  # the first may come too early
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
        finally:
            self.waiting = False
            signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def release(self):
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        if self.patience_s is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    __enter__ = take

    def __exit__(self, *_):
        self.release()

    def close(self):
        os.close(self.fd)
        os.close(self.door)

# ---- Jobs and settings --------------------------------------------------------------------------
# What `config set` may change, the job's record, and the checks of whatever a user or another
# program gives. A check returns the value to store, or raises ValueError: what it must be.

def is_text(value):
    """Whether it is text that a database and an argument can hold: no NUL, no lone surrogate."""
    try:
        return b"\0" not in value.encode()
    except (AttributeError, UnicodeError):
        return False

def text_that(fits, must):
    """The check of a text for which `fits(text)` holds: it must be so."""
    def check(value):
        if not is_text(value) or not fits(value):
            raise ValueError("must be " + must)
        return value
    return check

def one_of(*choices):
    return text_that(lambda text: text in choices, "one of " + ", ".join(choices))

def number_from(low, high, read=whole):
    """The check of a whole number; `read` makes one of a text, str: a text is refused."""
    def check(value):
        number = read(value) if isinstance(value, str) else value
        if type(number) is not int or not low <= number <= high:  # True is an int too
            raise ValueError("must be a whole number, %d to %d" % (low, high))
        return number
    return check

@functools.lru_cache()
def split_shell(text):
    """The argv, as bytes, that the `shell` setting stands for."""
    import shlex
    return [word.encode() for word in shlex.split(text)]

as_text = text_that(is_text, "text without NUL")
as_command = text_that(lambda text: text.strip() and len(text.encode()) <= MAX_COMMAND,
                       "text of 1 to %d bytes, without NUL; put more into a script" % MAX_COMMAND)
as_cwd = text_that(os.path.isabs, "an absolute path")
as_count = number_from(1, MAX_WORKERS)
as_ms = number_from(0, MAX_MS, parse_duration)

SETTINGS = {  # key -> (default, the check of a text that is given)
    "max-retries": (3, number_from(1, 1000)),
    "delay-base": (5000, number_from(1, MAX_MS, parse_duration)),
    "backoff": ("exponential", one_of("exponential", "linear", "fixed")),
    "max-delay": (86400000, number_from(1, MAX_MS, parse_duration)),
    "jitter": (0, number_from(0, 100)),
    "timeout": (5000, as_ms),
    "output-limit": (65536, number_from(0, 16 << 20)),
    "retention": (0, as_ms),
    "shell": ("/bin/sh -c", text_that(split_shell, "a program, like /bin/sh -c")),
    "workers": (0, number_from(0, MAX_WORKERS)),
    "on-dead": ("", as_command),
}
DURATIONS = ("delay-base", "max-delay", "timeout", "retention")

def checked(field, check, value):
    """What `check(value)` returns; its ValueError as a Failure that names the field."""
    try:
        return check(value)
    except ValueError as error:
        raise Failure("field %s %s" % (field, error))

def read_setting(key, value):
    """The typed value of a setting given as text or number, durations in ms unless they have a unit;
    `default` is its default. The original stored numbers as 60000.0, and 0.0 for the default."""
    if key not in list(SETTINGS):  # not hashed: it may be anything
        raise Failure("unknown setting %.80s; known are %s" % (key, ", ".join(SETTINGS)))
    (default, check), text = SETTINGS[key], str(value).strip()
    if text in ("default", "0.0"):
        return default
    return checked(key, check, whole(text) if isinstance(default, int) else text)

def as_date(value):
    return iso(parse_date(value))

def as_env(value):
    """The JSON text of an environment, an object of text to text. Lone surrogates stand for bytes that
    are no UTF-8."""
    with suppress(AttributeError, TypeError, UnicodeError):
        names, texts = "".join(value), "".join(value.values())
        if "" not in value and "=" not in names and b"\0" not in as_bytes(names + texts):
            return compact(value)
    raise ValueError("must be an object of text to text, without NUL, nor = in a name")

FIELDS = {  # what a job may be given -> the check that returns what is stored
    "id": text_that(lambda text: text.isprintable() and re.fullmatch("[^ /]{1,128}", text),
                    "1 to 128 printable characters without spaces or slashes"),
    "command": as_command,
    "priority": number_from(-1000, 1000, str),
    "run_after": as_date,
    "timeout": as_ms,
    "max_retries": number_from(1, 1000, str),
    "cwd": as_cwd,
    "env": as_env,
    "unique": text_that(len, "text without NUL, not empty"),
}
OF_OTHERS = dict(  # the same of a row that another program inserted
    FIELDS, state=one_of(*STATES), attempts=number_from(0, 1 << 30), created_at=as_date,
    updated_at=as_date, started_at=as_date)
PUBLIC = ("id command state attempts max_retries priority timeout created_at updated_at run_after"
          " locked_at started_at finished_at exit_code error cwd env unique").split()
OWN = {"timeout": 1, "max_retries": 2}  # bits of Job.own: not replaced by the settings on a retry
ON_DEAD = 4                             # and: it was enqueued because another job died

def env_of(text):
    """The object that a job's `env` stands for; another program may have written anything."""
    with suppress(ValueError, TypeError):
        return dict(json.loads(text or "{}"))
    return {}

class Job(collections.namedtuple("Job", PUBLIC + "due ready own runs serial environ".split())):
    """A row of the table jobs. Dates are ISO texts, `env` is JSON text or None, and

    due      ms when a waiting job must be made ready; 0: inserted by another program, not checked
             yet; else NULL
    ready    1 when it can be claimed, else NULL
    own      bits: OWN for what the job brought itself, ON_DEAD
    runs     attempts that have ended, over its whole life
    serial   of its open attempt, else NULL
    environ  of its caller, as `env`; read for its attempts alone
    """

    __slots__ = ()

    def public(self):
        """The job as users see it."""
        return dict(zip(PUBLIC, self), env=env_of(self.env))

def defaults(settings, now, job_id):
    """{field: value} of a job that brings nothing of its own."""
    stamp = iso(now)
    return dict(dict.fromkeys(Job._fields), id=job_id, state="pending", attempts=0, priority=0,
                ready=1, own=0, runs=0, max_retries=settings["max-retries"],
                timeout=settings["timeout"], created_at=stamp, updated_at=stamp, run_after=stamp)

def make_job(given, settings, now, job_id, checks=FIELDS):
    """A pending Job from the object a user gave (see FIELDS), called `job_id` if it brings no id; a
    Failure names a bad field. What the system sets is ignored: an object that `list` showed is a job
    too."""
    if not isinstance(given, dict):
        raise Failure('a job is a JSON object like {"command":"true"}; a command goes after --, like:'
                      ' enqueue -- make -j4')
    job = defaults(settings, now, job_id)
    for name, value in given.items():
        if name in checks and value is not None:
            job[name] = checked(name, checks[name], value)
            job["own"] |= OWN.get(name, 0)
        elif name not in PUBLIC:
            raise Failure("field %.80s is unknown; known are %s" % (name, ", ".join(FIELDS)))
    if job["command"] is None:
        raise Failure("field command is required")
    if job["run_after"] > iso(now):
        job.update(due=parse_date(job["run_after"]), ready=None)
    return Job(**job)

def job_of_others(row, settings, now):
    """The Job, like any other, of a row that another program inserted; what can't be makes it dead with
    the reason. One that was running has not begun."""
    job_id = row.id if row.id and row.id == safe(str(row.id)) else new_ids(now)[0]
    try:
        job = make_job(dict(zip(PUBLIC, row), id=None), settings, now, job_id, OF_OTHERS)
    except Failure as error:
        job = Job(**dict(defaults(settings, now, job_id), command=safe(str(row.command)),
                         state="dead", error=str(error)))
    if job.state in FINISHED:
        return job._replace(finished_at=job.updated_at, due=None, ready=None)
    return job._replace(state="failed" if job.state == "failed" else "pending")

# ---- Verdicts -----------------------------------------------------------------------------------
# What becomes of a job after an attempt. Pure: it reads no clock and touches no store.

# status: as subprocess gives it, 3 for exit 3, -9 for SIGKILL, None if unknown; reason: why it
# ended: "" by itself, "timeout", "cancel", "worker lost", "refused" (can't run, see detail),
# "give back" (a forced stop), "unstarted" (no space, no process); dropped: bytes cut from the start
# of its output; ended_at: ms
Outcome = collections.namedtuple("Outcome", "status reason detail output dropped ended_at")
GIVEN_BACK = ("give back", "unstarted")

# due: ms when a failed job runs again; attempts: what the job's count becomes
Verdict = collections.namedtuple("Verdict", "state attempts due error")

def backoff_ms(attempts, settings, spread=0.0):
    """The wait before the next try after `attempts` of them; `spread`, -1 to 1, takes the jitter."""
    base = max(settings["delay-base"] / 1000.0, 1.0)
    kind, longest = settings["backoff"], settings["max-delay"]
    try:
        seconds = (base ** attempts if kind == "exponential"
                   else base * attempts if kind == "linear" else base)
    except OverflowError:
        return longest
    return int(min(seconds * 1000 * (1 + spread * settings["jitter"] / 100.0), longest))

def signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number

def failure_text(timeout, outcome):
    """One line that says how an attempt failed; None if it did not."""
    status, reason = outcome.status, outcome.reason
    if reason == "timeout":
        return "timed out after %d ms (raise it with --timeout or: config set timeout 0)" % timeout
    if reason and not (reason in ("cancel", "give back") and status == 0):
        return outcome.detail or reason
    if status is not None and status < 0:
        return "killed by " + signal_name(-status)
    return "exit %s" % status if status else None

def decide(claim, outcome, settings, now, spread=0.0):
    """The Verdict on the job of `claim` (attempts, max_retries, timeout, wish) after an attempt."""
    error, attempts = failure_text(claim.timeout, outcome), claim.attempts + 1
    if error is None:
        return Verdict("completed", attempts, None, None)
    if claim.wish == "cancel":
        return Verdict("cancelled", attempts, None, "cancelled")
    if outcome.reason in GIVEN_BACK:
        return Verdict("failed" if claim.attempts else "pending", claim.attempts, now, None)
    if attempts >= claim.max_retries:
        return Verdict("dead", attempts, None, error)
    return Verdict("failed", attempts, now + backoff_ms(attempts, settings, spread), error)

def reason_of(wish, same_boot, began):
    """The reason (see Outcome) for an open attempt whose worker is gone: what was wished, whether it
    was claimed in this boot, whether its run file is there. A cancel is decided by `decide`."""
    return "give back" if same_boot and (not began or wish == "give back") else "worker lost"

# ---- Schema -------------------------------------------------------------------------------------
# Numbered migrations, each run in one transaction: a statement begins with the word CREATE, ALTER or
# INSERT at the start of a line. Released ones are never edited: add another. jobs, config and metrics
# begin as the original QueueCTL made them, so its databases open here. A row that another program
# inserts has due = 0, and is checked by whoever writes next.
# Not partial indexes (SQLite 3.8) nor WITHOUT ROWID (3.8.2): 3.7.17 has neither.

MIGRATIONS = ("""
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, command TEXT NOT NULL, state TEXT DEFAULT 'pending', attempts INT DEFAULT 0,
    max_retries INT DEFAULT 3, created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    updated_at DATETIME DEFAULT CURRENT_TIMESTAMP, locked_at DATETIME, timeout INT DEFAULT 5000,
    run_after DATETIME DEFAULT CURRENT_TIMESTAMP, priority INT DEFAULT 0, started_at DATETIME)
CREATE TABLE IF NOT EXISTS config (key TEXT PRIMARY KEY, value TEXT)
CREATE TABLE IF NOT EXISTS metrics (
    id INTEGER PRIMARY KEY AUTOINCREMENT, daemon_startup DATETIME DEFAULT CURRENT_TIMESTAMP,
    total_commands INT DEFAULT 0)

ALTER TABLE jobs ADD COLUMN finished_at TEXT
ALTER TABLE jobs ADD COLUMN exit_code INTEGER
ALTER TABLE jobs ADD COLUMN error TEXT
ALTER TABLE jobs ADD COLUMN cwd TEXT
ALTER TABLE jobs ADD COLUMN env TEXT
ALTER TABLE jobs ADD COLUMN environ TEXT
ALTER TABLE jobs ADD COLUMN 'unique' TEXT
ALTER TABLE jobs ADD COLUMN 'group' TEXT
ALTER TABLE jobs ADD COLUMN due INTEGER DEFAULT 0
ALTER TABLE jobs ADD COLUMN ready INTEGER
ALTER TABLE jobs ADD COLUMN own INTEGER DEFAULT 0
ALTER TABLE jobs ADD COLUMN runs INTEGER DEFAULT 0
ALTER TABLE jobs ADD COLUMN serial INTEGER
CREATE INDEX jobs_ready ON jobs (ready, priority DESC)
CREATE INDEX jobs_group ON jobs (ready, "group", priority DESC)
CREATE INDEX jobs_due ON jobs (due)
CREATE INDEX jobs_finished ON jobs (state, finished_at)

CREATE TABLE running (  -- the open attempts
    slot INTEGER PRIMARY KEY,        -- that this and the next are unique is why nothing can run
    job TEXT NOT NULL UNIQUE,        -- twice at once
    serial INTEGER NOT NULL,
    boot TEXT NOT NULL,
    started_at INTEGER NOT NULL,     -- ms
    wish TEXT NOT NULL DEFAULT '')   -- or 'cancel', 'give back'
CREATE TABLE attempts (
    serial INTEGER PRIMARY KEY, job TEXT NOT NULL, number INTEGER NOT NULL, worker INTEGER,
    started_at TEXT, finished_at TEXT, ms INTEGER NOT NULL, exit_code INTEGER, signal TEXT, error TEXT,
    dropped INTEGER NOT NULL, output BLOB)
CREATE INDEX attempts_job ON attempts (job)
CREATE TABLE after (  -- what a job waits for; a row goes when that has completed
    job TEXT NOT NULL, needs TEXT NOT NULL, PRIMARY KEY (job, needs))
CREATE INDEX after_needs ON after (needs)

CREATE TABLE unique_keys (  -- the last job that was given a key holds it while it is unfinished
    key TEXT PRIMARY KEY, job TEXT NOT NULL)
CREATE TRIGGER key_given AFTER INSERT ON jobs WHEN NEW."unique" IS NOT NULL BEGIN
    DELETE FROM unique_keys WHERE key = NEW."unique";
    INSERT INTO unique_keys (key, job) VALUES (NEW."unique", NEW.id);
    END
CREATE TRIGGER key_given_again AFTER UPDATE OF state ON jobs
    WHEN NEW."unique" IS NOT NULL AND NEW.state = 'pending' BEGIN
    DELETE FROM unique_keys WHERE key = NEW."unique";
    INSERT INTO unique_keys (key, job) VALUES (NEW."unique", NEW.id);
    END

CREATE TABLE answers (  -- to the last changes: a client whose connection broke may ask again
    number INTEGER PRIMARY KEY, once TEXT UNIQUE, answer TEXT)
CREATE TRIGGER answers_added AFTER INSERT ON answers BEGIN
    DELETE FROM answers WHERE number <= NEW.number - 1000;
    UPDATE metrics SET total_commands = total_commands + 1 WHERE id = (SELECT MAX(id) FROM metrics);
    END

CREATE TABLE totals (  -- one row: how many jobs there are in each state, and
    pending INTEGER DEFAULT 0, processing INTEGER DEFAULT 0, completed INTEGER DEFAULT 0,
    failed INTEGER DEFAULT 0, dead INTEGER DEFAULT 0, cancelled INTEGER DEFAULT 0,
    serial INTEGER DEFAULT 0,        -- of the last attempt
    changes INTEGER DEFAULT 0,       -- of settings, pause or limits
    jobs_enqueued INTEGER DEFAULT 0, jobs_completed INTEGER DEFAULT 0, jobs_died INTEGER DEFAULT 0,
    failed_attempts INTEGER DEFAULT 0, runtime_ms INTEGER DEFAULT 0, longest_ms INTEGER DEFAULT 0)
INSERT INTO totals (pending, processing, completed, failed, dead)
    SELECT COUNT(CASE state WHEN 'pending' THEN 1 END), COUNT(CASE state WHEN 'processing' THEN 1 END),
           COUNT(CASE state WHEN 'completed' THEN 1 END), COUNT(CASE state WHEN 'failed' THEN 1 END),
           COUNT(CASE state WHEN 'dead' THEN 1 END)
    FROM jobs
CREATE TRIGGER jobs_added AFTER INSERT ON jobs BEGIN  -- so that rows of other programs count too
    UPDATE totals
    SET pending = pending + (NEW.state IS 'pending'), failed = failed + (NEW.state IS 'failed'),
        processing = processing + (NEW.state IS 'processing'), dead = dead + (NEW.state IS 'dead'),
        completed = completed + (NEW.state IS 'completed'),
        cancelled = cancelled + (NEW.state IS 'cancelled'), jobs_enqueued = jobs_enqueued + 1;
    END
CREATE TRIGGER jobs_moved AFTER UPDATE OF state ON jobs WHEN OLD.state IS NOT NEW.state BEGIN
    UPDATE totals
    SET pending = pending + (NEW.state IS 'pending') - (OLD.state IS 'pending'),
        processing = processing + (NEW.state IS 'processing') - (OLD.state IS 'processing'),
        completed = completed + (NEW.state IS 'completed') - (OLD.state IS 'completed'),
        failed = failed + (NEW.state IS 'failed') - (OLD.state IS 'failed'),
        dead = dead + (NEW.state IS 'dead') - (OLD.state IS 'dead'),
        cancelled = cancelled + (NEW.state IS 'cancelled') - (OLD.state IS 'cancelled'),
        serial = MAX(serial, COALESCE(NEW.serial, 0)),
        jobs_completed = jobs_completed + (NEW.state IS 'completed'),
        jobs_died = jobs_died + (NEW.state IS 'dead');
    END
CREATE TRIGGER attempts_added AFTER INSERT ON attempts BEGIN
    UPDATE totals
    SET failed_attempts = failed_attempts + (NEW.error IS NOT NULL),
        runtime_ms = runtime_ms + (NEW.error IS NULL) * NEW.ms,
        longest_ms = MAX(longest_ms, (NEW.error IS NULL) * NEW.ms);
    END
CREATE TRIGGER jobs_removed AFTER DELETE ON jobs BEGIN
    UPDATE totals
    SET pending = pending - (OLD.state IS 'pending'), failed = failed - (OLD.state IS 'failed'),
        processing = processing - (OLD.state IS 'processing'), dead = dead - (OLD.state IS 'dead'),
        completed = completed - (OLD.state IS 'completed'),
        cancelled = cancelled - (OLD.state IS 'cancelled');
    DELETE FROM attempts WHERE job = OLD.id;
    DELETE FROM after WHERE job = OLD.id OR needs = OLD.id;
    DELETE FROM unique_keys WHERE key = OLD."unique" AND job = OLD.id;
    END""",)

# ---- Store --------------------------------------------------------------------------------------
# The only SQL but for the schema. Writes are made inside `transaction()`, which has its turn under
# the lock; each takes the time as `now` (ms) and names the arrow it stands for. What is to be
# acknowledged is made durable by `sync()`, after the lock was released: only checkpoints sync under it.

# In brackets, not quotes: SQLite takes an unknown "column" for a text.
COLUMNS = ", ".join("[%s]" % name for name in Job._fields)
LOOK = COLUMNS.replace("[environ]", "NULL")  # it may be large, and is shown to nobody

# An open attempt with what is needed to run it and to judge it. started_at: ms; number: counts
# over the job's life; command: None for a job deleted meanwhile
Claim = collections.namedtuple(
    "Claim", "serial slot boot started_at wish job number attempts max_retries timeout command cwd"
             " env environ")

def marks(values):
    """A place for each of `values` in SQL."""
    return ", ".join("?" * len(values))

INSERT = "INSERT OR IGNORE INTO jobs (%s) VALUES (%s)" % (COLUMNS, marks(Job._fields))

def sqlite_uri(path, mode="rw"):
    """How SQLite is told any path: Python 3.6 gives it no other bytes than UTF-8."""
    return "file:%s?mode=%s" % ("".join(map("%%%02x".__mod__, os.fsencode(path))), mode)

class Store:
    """The database of the queue at `place`, or an empty one in memory. One a process, opened after any
    fork and closed before one: a connection must not cross it. Threads may share it.

    patience_s, door  see Turn
    Raises StorageError; what could not be done is undone.
    """

    def __init__(self, place, *, patience_s=None, door=False, memory=False):
        import sqlite3
        import threading
        self.sqlite3 = sqlite3
        self.place = place
        self.path = place.db
        self.memory = memory
        self.patience_s = patience_s
        self.door = door
        self.mutex = threading.RLock()      # of the connection
        self.sync_mutex = threading.Lock()  # of the -wal; taken second where both are
        self.commits = 0                    # so many were made,
        self.synced = self.failed = 0       # so many are on the disk; the last of a sync that failed
        self.turn = None                    # None: closed, or in memory
        self.connection = self.cursor = None
        self.wal = self.file = None         # its descriptor; os.stat of the database
        self.broken = True                  # at first and after trouble: the next use opens anew
        self.serial = self.changes = None   # as in totals, when they were read
        self.settings = {}
        self.paused = None                  # the reason of a pause, never empty
        if not memory:
            place.check()
            if place.exists() and os.stat(self.path).st_size and not os.path.isdir(place.file("")):
                self.open_as("ro&immutable=1")  # refuse what is no queue's before anything is made
                self.execute("SELECT id, command, state, run_after, started_at FROM jobs LIMIT 0")
                self.disconnect()
            private_directory(place.file(""))
        self.query("SELECT 1")

    # -- opening

    def patiently(self, action):
        """Do it; while another process has the turn or the database, again, for some time."""
        until = monotonic() + (self.patience_s or PATIENCE_S)
        while True:
            try:
                return action()
            except Busy:
                if monotonic() > until:
                    raise
            sleep(0.02)

    def reopen(self):
        """(Re)open the connection, in turn: SQLite recovers then."""
        if self.turn is None and not self.memory:
            self.turn = Turn(self.place, self.patience_s, self.door)
        with self.sync_mutex, self.turn or suppress():
            self.disconnect()
            try:
                self.connect()
                if self.failed > self.synced:  # what is on no disk yet
                    self.query("PRAGMA wal_checkpoint")
            except BaseException:
                self.disconnect()
                raise

    def open_as(self, mode):
        """mode: as SQLite has it in URIs"""
        try:
            self.connection = self.sqlite3.connect(
                sqlite_uri(self.path, mode), timeout=BUSY_S, isolation_level=None, uri=True,
                check_same_thread=False)
        except self.sqlite3.Error as error:
            raise storage_error(self.path, error)
        self.cursor, self.broken = self.connection.cursor(), False

    def connect(self):
        if not (self.memory or self.place.exists()):
            os.close(open_private(self.path))
        self.open_as("memory" if self.memory else "rw")
        version = self.value("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise StorageError("%s was made by a newer queuectl (schema %d) than this, %s; use that"
                               " one" % (self.path, version, VERSION))
        for pragma in ("page_size = 1024",  # a new file's: whole pages are written
                       "synchronous = NORMAL", "wal_autocheckpoint = 4000",
                       "journal_size_limit = 8388608", "temp_store = MEMORY"):
            self.query("PRAGMA " + pragma)
        if self.value("PRAGMA journal_mode = WAL") not in ("wal", "memory"):
            raise StorageError("%s can't use WAL; check its file system" % self.path)
        if version < len(MIGRATIONS):
            self.migrate(version)
        self.changes = None
        self.refresh()  # the first read, which opens -wal
        if not self.memory:
            self.file = os.lstat(self.path)
            self.wal = os.open(self.path + "-wal", os.O_RDWR)

    def migrate(self, version):
        """Bring the schema up to date, while no daemon runs."""
        try:
            lock = open(os.devnull if self.memory else self.place.hold_daemon(0.1))
        except Failure as error:
            raise StorageError("%s has an older schema, which only changes while no daemon runs;"
                               " restart it (%s)" % (self.path, error))
        with lock:
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                self.execute("BEGIN IMMEDIATE")
                for statement in re.split(r"\n(?=CREATE|ALTER|INSERT)", script)[1:]:
                    self.execute(statement)
                self.execute("PRAGMA user_version = %d" % number)
                self.execute("SELECT %s FROM jobs LIMIT 0" % COLUMNS)
                self.execute("COMMIT")  # else `reopen` closes, which undoes it

    def disconnect(self):
        """Close what is open. The cursor first: while one lives, so do the connection's files."""
        for closes in filter(None, (self.cursor, self.connection)):
            with suppress(self.sqlite3.Error):
                closes.close()
        if self.wal is not None:
            os.close(self.wal)
        self.connection = self.cursor = self.wal = None
        self.broken = True

    def close(self):
        """In turn: the last connection copies the -wal into the database and removes it. To use the
        Store again opens it again."""
        with suppress(Busy), self.turn or suppress():
            self.disconnect()
        self.disconnect()  # also where our turn never came
        if self.turn:
            self.turn.close()
            self.turn = None

    # -- transactions

    @contextmanager
    def transaction(self):
        """All or nothing, in turn. Busy if another process keeps its lock beyond our patience."""
        with self.mutex:
            self.patiently(self.begin)
            try:
                yield
                self.check_file()
                self.execute("COMMIT")
                self.commits += 1
            except BaseException:
                self.undo()
                raise
            self.turn.release()

    def begin(self):
        """Take the turn, then SQLite's own lock; if another program has that, let others go on."""
        if self.broken:
            self.reopen()
        self.turn.take()
        try:
            self.execute("BEGIN IMMEDIATE")
            self.refresh()
        except BaseException:
            self.undo()
            raise

    def undo(self):
        """Roll back and end the turn; where even that fails the connection isn't used again."""
        try:
            if self.connection.in_transaction:
                self.cursor.execute("ROLLBACK")
        except self.sqlite3.Error:
            self.broken = True
        finally:
            self.turn.release()

    def check_file(self):
        """Raise unless the path still leads to the file that is open: SQLite writes on into a deleted
        one in silence."""
        with suppress(OSError):
            status = os.lstat(self.path)
            if os.path.samestat(status, self.file) and status.st_size:
                return
        raise Replaced("%s was removed, emptied or replaced in use; nothing more is stored in it;"
                       " put it back, and start the daemon again" % self.path)

    def sync(self):
        """Return once all that was committed before is on the disk. One sync serves all threads that
        wait for it; its error refuses them all, since Linux tells it once."""
        wanted = self.commits
        with self.sync_mutex:
            if self.synced >= wanted > self.failed:
                return
            upto = self.commits
            try:
                if wanted <= self.failed or self.broken or not os.fstat(self.wal).st_nlink:
                    raise OSError(errno.EIO, "disk I/O error: its -wal is not on the disk")
                getattr(os, "fdatasync", os.fsync)(self.wal)
                self.synced = upto
            except OSError as error:
                self.failed, self.broken = upto, True
                raise storage_error(self.path, error)

    def execute(self, sql, values=()):
        """The cursor after a statement; `rowcount` tells how many rows were written."""
        try:
            return self.cursor.execute(sql, values)
        except self.sqlite3.Error as error:
            raise storage_error(self.path, error)

    def query(self, sql, values=()):
        """All rows: an open cursor would hide others' writes."""
        with self.mutex:
            if self.broken and not (self.connection and self.connection.in_transaction):
                self.patiently(self.reopen)
            try:
                return self.cursor.execute(sql, values).fetchall()
            except self.sqlite3.Error as error:
                raise storage_error(self.path, error)

    def value(self, sql, values=()):
        """The first column of the first row, or None."""
        rows = self.query(sql, values)
        return rows[0][0] if rows else None

    def dicts(self, sql, values=()):
        """All rows as {column: value}."""
        with self.mutex:
            rows = self.query(sql, values)
            names = [column[0] for column in self.cursor.description]
            return [dict(zip(names, row)) for row in rows]

    def select_jobs(self, clauses, values):
        """The Jobs that the clauses select."""
        return map(Job._make, self.query("SELECT %s FROM jobs %s" % (LOOK, clauses), values))

    # -- settings, pause, answers

    def refresh(self):
        """Read the settings if they have changed. What is missing, NULL or nonsense has its default."""
        (changes, self.serial), = self.query("SELECT changes, serial FROM totals")
        if changes == self.changes:
            return
        stored = dict(self.query("SELECT key, value FROM config WHERE value IS NOT NULL"))
        settings = {key: default for key, (default, _) in SETTINGS.items()}
        for key, value in stored.items():
            with suppress(Failure):
                settings[key] = read_setting(key, value)
        self.settings, self.paused, self.changes = settings, stored.get("paused"), changes

    def configure(self, key, value):
        """Store a setting, as text by the column's type; None: its default."""
        self.execute("INSERT OR REPLACE INTO config (key, value) VALUES (?, ?)", (key, value))
        self.execute("UPDATE totals SET changes = changes + 1")
        self.refresh()

    def recall(self, once):
        """The answer given to the change `once`, or None."""
        return self.value("SELECT answer FROM answers WHERE once = ?", (once,))

    def remember(self, once, answer):
        """Keep what was answered to the change `once` (None: to one that can't be asked again)."""
        self.execute("INSERT INTO answers (once, answer) VALUES (?, ?)", (once, answer))

    def note_startup(self, now):
        self.execute("INSERT INTO metrics (daemon_startup, total_commands) VALUES (?, 0)", (iso(now),))

    # -- jobs coming in

    def insert(self, job):
        """(new) -> pending. A Failure if the id is taken."""
        if not self.execute(INSERT, job).rowcount:
            raise Failure("job id %s is taken; choose another, or leave it out" % job.id)

    def holder(self, key):
        """The id of the unfinished job that holds the unique key, or None."""
        return self.value("""SELECT jobs.id
                             FROM unique_keys JOIN jobs ON jobs.id = unique_keys.job
                             WHERE unique_keys.key = ? AND jobs."unique" = unique_keys.key
                               AND jobs.state IN ('pending', 'processing', 'failed')""", (key,))

    def unchecked(self):
        """[(rowid, Job)] inserted by another program and not checked yet, some at a time."""
        self.connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        rows = self.query("SELECT rowid, %s FROM jobs WHERE due = 0 LIMIT ?" % LOOK, (STEP,))
        self.connection.text_factory = str
        return [(row[0], Job._make(row[1:])) for row in rows]

    def replace(self, rowid, job):
        """(new) -> pending, or whatever state another program gave its row."""
        self.execute("UPDATE jobs SET %s WHERE rowid = ?" % COLUMNS.replace("]", "] = ?"),
                     (*job, rowid))

    # -- jobs coming due

    def promote(self, now):
        """Make due jobs ready, so many at a time; the number of them."""
        return self.execute("""UPDATE jobs SET ready = 1, due = NULL
                               WHERE rowid IN (SELECT rowid FROM jobs
                                               WHERE due > 0 AND due <= :now
                                               ORDER BY due LIMIT :most)""",
                            {"now": now, "most": STEP}).rowcount

    def next_due(self):
        """ms when the next job comes due; the end of all dates if none does."""
        # The upper bound leaves out texts of another program: to SQLite they exceed all numbers.
        return self.value("""SELECT COALESCE(MIN(due), :last) FROM jobs
                             WHERE due > 0 AND due < :last""", {"last": LAST_MS})

    def pull_in(self, now):
        """Backoffs that reach further than `max-delay` come from a clock that was set back."""
        self.execute("""UPDATE jobs SET due = :now
                        WHERE rowid IN (SELECT rowid FROM jobs INDEXED BY jobs_finished
                                        WHERE state = 'failed' AND due > :latest)""",
                     {"now": now, "latest": now + self.settings["max-delay"]})

    def claimable(self, most):
        """How many jobs a worker could claim now, counted up to `most`."""
        return self.value("SELECT COUNT(*) FROM (SELECT 1 FROM jobs WHERE ready = 1 LIMIT ?)",
                          (0 if self.paused else most,))

    # -- attempts

    def claim(self, slot, boot, now, only=None):
        """pending or failed -> processing: the Claim of the first ready job by priority, then age (of
        those called `only`), or None."""
        if self.paused:
            return None
        rows = self.query("""SELECT rowid, id, runs + 1, attempts, max_retries, timeout, command,
                                    cwd, env, environ
                             FROM jobs
                             WHERE ready = 1 %s
                               AND NOT EXISTS (SELECT 1 FROM running WHERE running.job = jobs.id)
                             ORDER BY priority DESC, rowid
                             LIMIT 1""" % (
            "" if only is None else "AND id IN (%s)" % marks(only)), only or ())
        if not rows:
            return None
        (rowid, job, *_), stamp, serial = rows[0], iso(now), self.serial + 1
        self.execute("INSERT INTO running (slot, job, serial, boot, started_at) VALUES (?, ?, ?, ?, ?)",
                     (slot, job, serial, boot, now))
        self.execute("""UPDATE jobs
                        SET state = 'processing', ready = NULL, serial = ?, locked_at = ?,
                            started_at = ?, updated_at = ?
                        WHERE rowid = ?""", (serial, stamp, stamp, stamp, rowid))
        return Claim(serial, slot, boot, now, "", *rows[0][1:])

    def open_claims(self, slot=None):
        """The Claims of all open attempts, or of the one in a slot."""
        return [Claim._make(row) for row in self.query(
            """SELECT running.serial, running.slot, running.boot, running.started_at, running.wish,
                      running.job, jobs.runs + 1, COALESCE(jobs.attempts, 0),
                      COALESCE(jobs.max_retries, 1), jobs.timeout, jobs.command, jobs.cwd,
                      jobs.env, NULL
               FROM running LEFT JOIN jobs
                 ON jobs.id = running.job AND jobs.serial = running.serial
               WHERE :slot IS NULL OR running.slot = :slot""", {"slot": slot})]

    def open_slots(self):
        """{slot: wish} of the open attempts."""
        return dict(self.query("SELECT slot, wish FROM running"))

    def wish(self, slot, serial):
        """What somebody wishes of an open attempt: "", "cancel" or "give back"; None once it is
        recorded."""
        return self.value("SELECT wish FROM running WHERE slot = ? AND serial = ?", (slot, serial))

    def want_back(self, slots):
        """Note on the open attempts in these slots that they are to be stopped and given back."""
        for slot in slots:
            self.execute("UPDATE running SET wish = 'give back' WHERE slot = ? AND wish = ''", (slot,))

    def raise_serial(self, serial):
        """Give no attempt a number up to `serial`."""
        self.execute("UPDATE totals SET serial = MAX(serial, ?)", (serial,))

    def finish(self, claim, verdict, outcome, worker):
        """processing -> completed, failed, dead or cancelled, with the attempt's record; or, where it
        does not count, back to pending or failed. Whether the job was still there: another program may
        have deleted it."""
        self.execute("DELETE FROM running WHERE slot = ?", (claim.slot,))
        status, ended, counts = outcome.status, iso(outcome.ended_at), verdict.attempts > claim.attempts
        code = None if outcome.reason or (status or 0) < 0 else status
        there = self.execute(
            """UPDATE jobs
               SET state = ?, attempts = ?, runs = runs + ?,
                   exit_code = CASE WHEN ? THEN ? ELSE exit_code END,
                   error = CASE WHEN ? THEN ? ELSE error END, finished_at = ?, updated_at = ?,
                   locked_at = NULL, serial = NULL
               WHERE id = ? AND serial = ?""", (
                verdict.state, verdict.attempts, counts, counts, code, counts, verdict.error,
                ended if verdict.state in FINISHED else None, ended, claim.job,
                claim.serial)).rowcount
        if there and verdict.due is not None:
            self.execute("UPDATE jobs SET due = ?, run_after = ? WHERE id = ?",
                         (verdict.due, iso(verdict.due), claim.job))
        if there and counts:
            self.execute(
                """INSERT INTO attempts (serial, job, number, worker, started_at, finished_at, ms,
                                         exit_code, signal, error, dropped, output)
                   VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""", (
                    claim.serial, claim.job, claim.number, worker, iso(claim.started_at), ended,
                    max(outcome.ended_at - claim.started_at, 0), code,
                    signal_name(-status) if (status or 0) < 0 else None, verdict.error,
                    outcome.dropped, outcome.output or None))
        return there

    def cancel(self, job, now):
        """pending or failed -> cancelled; a running one is to be stopped, and then recorded so."""
        stamp = iso(now)
        self.execute("UPDATE running SET wish = 'cancel' WHERE job = ?", (job.id,))
        self.execute("""UPDATE jobs
                        SET state = 'cancelled', error = 'cancelled', ready = NULL, due = NULL,
                            finished_at = ?, updated_at = ?
                        WHERE id = ? AND state IN ('pending', 'failed')""", (stamp, stamp, job.id))

    def requeue(self, job, now):
        """Any end -> pending, its attempts back at 0 and, where it brought none of its own, the present
        settings; a failed job is tried now. A Failure if another holds its unique key."""
        holder = job.unique and self.holder(job.unique)
        if holder not in (None, job.id):
            raise Failure("job %s can't be retried: its unique key is held by job %s; wait for that,"
                          " or cancel it" % (job.id, holder))
        self.execute("""UPDATE jobs SET ready = 1, due = NULL, run_after = ?
                        WHERE id = ? AND state NOT IN ('pending', 'processing')""", (iso(now), job.id))
        self.execute("""UPDATE jobs
                        SET state = 'pending', attempts = 0, updated_at = run_after,
                            finished_at = NULL, exit_code = NULL, error = NULL,
                            timeout = CASE WHEN own & ? THEN timeout ELSE ? END,
                            max_retries = CASE WHEN own & ? THEN max_retries ELSE ? END
                        WHERE id = ? AND state IN ('completed', 'dead', 'cancelled')""", (
            OWN["timeout"], self.settings["timeout"], OWN["max_retries"],
            self.settings["max-retries"], job.id))

    def delete(self, ids):
        for job_id in ids:
            self.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def expired(self, now):
        """The ids of completed jobs older than the `retention`, some at a time."""
        kept = self.settings["retention"]
        return [row[0] for row in self.query(
            """SELECT id FROM jobs INDEXED BY jobs_finished
               WHERE state = 'completed' AND finished_at < ? LIMIT ?""",
            (kept and iso(now - max(kept, KEEP_MS)), STEP))]  # 0: no date is before that

    # -- looking: once open it needs no turn

    def job(self, job_id):
        """The Job, or None."""
        return next(self.select_jobs("WHERE id = ?", (job_id,)), None)

    def ids_like(self, prefix):
        """The ids, two at the most, that begin with `prefix`; an exact one alone."""
        return [row[0] for row in self.query(
            """SELECT id FROM jobs
               WHERE id >= :from AND id < :to
                 AND (id = :from OR NOT EXISTS (SELECT 1 FROM jobs WHERE id = :from))
               LIMIT 2""", {"from": prefix, "to": prefix + "\U0010ffff"})]

    def select(self, states=(), match=None, before=None, limit=-1):
        """The rowids, oldest first, of the jobs in these states (none given: in all), with `match` in
        their id or command, that ended before a date: the newest `limit` of them."""
        import array
        sql = """SELECT rowid FROM jobs
                 WHERE (:match IS NULL OR instr(id, :match) OR instr(command, :match))
                   AND (:before IS NULL OR finished_at <= :before) %s
                 ORDER BY rowid DESC LIMIT :limit""" % (
            "AND state IN (:%s)" % ", :".join(states) if states else "")
        values = dict(zip(states, states), match=match, before=before, limit=limit)
        with self.mutex:
            return array.array("q", (row[0] for row in self.execute(sql, values)))[::-1]

    def jobs(self, keys, column="rowid"):
        """The Jobs with these rowids, or ids, oldest first, page by page; those that there are."""
        for at in range(0, len(keys), PAGE):
            page = keys[at:at + PAGE]
            yield from self.select_jobs("WHERE %s IN (%s) ORDER BY rowid" % (column, marks(page)), page)

    def last_deaths(self, limit):
        """The Jobs that died last, latest first."""
        return self.select_jobs("""INDEXED BY jobs_finished WHERE state = 'dead'
                                   ORDER BY finished_at DESC LIMIT ?""", (limit,))

    def next_retries(self, limit):
        """The failed Jobs that are tried next."""
        return self.select_jobs("""INDEXED BY jobs_due WHERE due > 0 AND +state = 'failed'
                                   ORDER BY due LIMIT ?""", (limit,))

    def rate(self, now):
        """Jobs that ended in the last 10 s, per second."""
        return self.value("""SELECT COUNT(*) / 10.0 FROM jobs INDEXED BY jobs_finished
                             WHERE state IN ('completed', 'dead') AND finished_at > ?""",
                          (iso(now - 10000),))

    def unsettled(self, now):
        """Whether jobs run, are ready or wait for another try; not for the time a user gave."""
        return self.value("""SELECT EXISTS (SELECT 1 FROM running)
                                 OR (? AND EXISTS (SELECT 1 FROM jobs WHERE ready = 1))
                                 OR EXISTS (SELECT 1 FROM jobs WHERE due >= 0 AND due <= ?)
                                 OR EXISTS (SELECT 1 FROM jobs
                                            WHERE state = 'failed' AND ready IS NULL)""",
                          (not self.paused, now))

    def attempts(self, job_id):
        """[dict] of the job's attempts, first to last; an open one has no finished_at."""
        return self.dicts(
            """SELECT number, worker, started_at, finished_at, exit_code, signal, error, serial,
                      dropped AS output_cut, COALESCE(length(output), 0) AS output_kept
               FROM attempts WHERE job = :job
               UNION ALL
               SELECT jobs.runs + 1, NULL, jobs.started_at, NULL, NULL, NULL, NULL, jobs.serial, 0,
                      NULL
               FROM running JOIN jobs ON jobs.id = running.job AND jobs.serial = running.serial
               WHERE running.job = :job
               ORDER BY serial""", {"job": job_id})

    def output(self, serial, start):
        """What is kept of a closed attempt's output, from byte `start` on."""
        return bytes(self.value("SELECT substr(output, ?) FROM attempts WHERE serial = ?",
                                (start + 1, serial)) or b"")

    def totals(self):
        """{name: number}: how many jobs there are by state, and what `metrics` tells of all so far; run
        times in s, of completed jobs."""
        return self.dicts(
            """SELECT pending, processing, completed, failed, dead, cancelled,
                      pending + processing + completed + failed + dead + cancelled AS total_jobs,
                      completed AS completed_jobs, dead AS dead_jobs,
                      jobs_enqueued, jobs_completed, jobs_died, failed_attempts,
                      runtime_ms / 1000.0 AS total_runtime,
                      round(runtime_ms / 1000.0 / MAX(jobs_completed, 1), 3) AS average_runtime,
                      longest_ms / 1000.0 AS max_runtime,
                      (SELECT COALESCE(SUM(total_commands), 0) FROM metrics) AS total_commands
               FROM totals""")[0]

    def counts(self):
        """{state: number of jobs}"""
        totals = self.totals()
        return {state: totals[state] for state in STATES if totals[state] or state != "cancelled"}

    def size(self):
        """Bytes of the database, with what waits in the WAL."""
        return 0 if self.memory else self.value("PRAGMA page_count") * self.value("PRAGMA page_size")

    def ready_since(self, now):
        """ms since when the one of the ready jobs that waits longest could have started, or None. No
        index has these times: the first in line are looked at."""
        since = self.value(
            """SELECT MIN(since)
               FROM (SELECT MAX(created_at, run_after) AS since
                     FROM (SELECT created_at, run_after FROM jobs
                           WHERE ready = 1 ORDER BY priority DESC, rowid LIMIT :most)
                     UNION ALL
                     SELECT run_after FROM (SELECT run_after FROM jobs WHERE due > 0 AND due <= :now
                                            ORDER BY due LIMIT 1))""",
            {"most": LOOKED_AT, "now": now})
        return since and parse_date(since)

    def completed_at(self, name, since):
        """ms of the last completion, since then, of a job whose id begins with `name` or whose unique
        key it is; None without one."""
        ended = self.value("""SELECT MAX(finished_at) FROM jobs INDEXED BY jobs_finished
                              WHERE state = 'completed' AND finished_at >= ?
                                AND (substr(id, 1, length(?)) = ? OR "unique" = ?)""",
                           (iso(since), name, name, name))
        return ended and parse_date(ended)

    # -- for `doctor` and `backup`

    def integrity(self):
        """Lines of what is damaged; [] when nothing is."""
        self.query("SELECT 1 FROM running, attempts, after, unique_keys, answers, totals LIMIT 0")
        return [row[0] for row in self.query("PRAGMA integrity_check(3)") if row[0] != "ok"]

    def copy(self, target):
        """Copy the database, as it is at one moment, into the empty file `target`; the number of jobs.
        Rows keep their order; indexes and triggers come when all rows are there."""
        # Not Connection.backup: 3.6 has none.
        self.connection.set_progress_handler(lambda: None, 10000)  # or a signal would have to wait
        self.query("ATTACH ? AS copy", (sqlite_uri(target),))
        for pragma in ("page_size = 1024", "journal_mode = OFF", "synchronous = OFF"):
            self.query("PRAGMA copy." + pragma)
        self.query("BEGIN")
        for kind, name, sql in self.query("""SELECT type, name, sql FROM main.sqlite_master
                                             WHERE sql IS NOT NULL AND name NOT GLOB 'sqlite_stat*'
                                             ORDER BY type = 'table' DESC, rowid"""):
            if name != "sqlite_sequence":  # there as soon as it is needed
                self.query(re.sub("^(CREATE (UNIQUE )?[A-Z]+) ", r"\1 copy.", sql))
            if kind == "table":
                self.query("DELETE FROM copy.[%s]" % name)  # sqlite_sequence counted along
                self.query("INSERT INTO copy.[%s] SELECT * FROM main.[%s]" % (name, name))
        self.query("PRAGMA copy.user_version = %d" % len(MIGRATIONS))
        self.query("COMMIT")
        if self.query("PRAGMA copy.integrity_check") != [("ok",)]:
            raise StorageError("the copy in %s is damaged; check that disk" % target)
        return self.value("SELECT COUNT(*) FROM copy.jobs")

# ---- Requests -----------------------------------------------------------------------------------
# What a request does, the same in the daemon's server and in a command: plain values in, an answer
# out. What changes the queue runs inside a transaction. Each takes the Store, the time in ms, and
# what the request says; commands call the looks that the wire knows too.

def reply(message, **more):
    return dict(success=True, message=message, **more)

# -- what happens to jobs

def known_job(store, job_id):
    job = store.job(job_id) if is_text(job_id) else None
    if job is None:
        raise Failure("no job %s; see: queuectl list" % str(job_id)[:128])
    return job

def on_job_death(store, job_id, now):
    """Enqueue the `on-dead` line for a job that has just died; its own death enqueues nothing. Returns
    the new job's id or None."""
    line = store.settings["on-dead"]
    job = store.job(job_id) if line else None
    if job is None or job.own & ON_DEAD:
        return None
    new = make_job({"command": line, "env": {
        "QUEUECTL_DEAD_ID": job.id, "QUEUECTL_DEAD_ERROR": job.error,
        "QUEUECTL_DEAD_COMMAND": job.command.encode()[:MAX_DEAD_COMMAND].decode("utf-8", "ignore")}},
        store.settings, now, new_ids(now)[0])
    store.insert(new._replace(own=ON_DEAD))
    return new.id

def check_inserted(store, now):
    """Make rows that another program inserted jobs like any other; the number of them."""
    rows = store.unchecked()
    for rowid, row in rows:
        job = job_of_others(row, store.settings, now)
        store.replace(rowid, job)
        if job.state == "dead" != row.state:
            on_job_death(store, job.id, now)
    return len(rows)

def record(store, claim, outcome, worker, now):
    """Store what became of an attempt: (Verdict, id of the job enqueued by a death); None if it was
    recorded before."""
    wish = store.wish(claim.slot, claim.serial)
    if wish is None:
        return None
    spread = store.settings["jitter"] and int.from_bytes(os.urandom(2), "big") / 32767.5 - 1
    verdict = decide(claim._replace(wish=wish), outcome, store.settings, now, spread)
    there = store.finish(claim, verdict, outcome, worker)
    return verdict, there and verdict.state == "dead" and on_job_death(store, claim.job, now)

# -- changes

def enqueue_batch(store, now, jobs=(), cwd=None, environ=None):
    """Store all of the jobs, given as objects, or none. `ids` are theirs, or those of the unfinished
    jobs that hold their unique keys; a Failure's `index` tells which is wrong; `paused` and `workers`
    what may keep new jobs from running."""
    if not isinstance(jobs, list) or len(jobs) > BATCH_JOBS:
        raise Failure("jobs must be a list of at most %d" % BATCH_JOBS)
    cwd = cwd and checked("cwd", as_cwd, cwd)
    environ = environ and checked("environ", as_env, environ)
    ids, held = new_ids(now, len(jobs)), 0
    for index, given in enumerate(jobs):
        try:
            job = make_job(given, store.settings, now, ids[index])
            holder = job.unique and store.holder(job.unique)
            if holder:
                held += 1
            else:
                store.insert(job._replace(cwd=job.cwd or cwd, environ=environ))
            ids[index] = holder or job.id
        except Failure as error:
            error.details["index"] = index
            raise
    count = len(ids) - held
    return reply("Enqueued %s" % plural(count, "job"), ids=ids, count=count, paused=store.paused,
                 workers=store.settings["workers"])

def enqueue(store, now, job=None, cwd=None, environ=None):
    """Store one job, given as JSON text or as an object."""
    given = decode_json(job, "the job") if isinstance(job, str) else job
    answer = enqueue_batch(store, now, [given], cwd, environ)
    (job_id,), stored = answer.pop("ids"), answer.pop("count")
    return dict(answer, message="Job enqueued" if stored else "Job already queued", id=job_id)

def for_each(act, states, done):
    """The change that makes act(store, job, now) of jobs in these states: of all that are named or of
    none; with `skip`, those that it refuses by a Failure are left out."""
    def change(store, now, ids=(), skip=False):
        ids, refused = [ids] if isinstance(ids, str) else ids, []
        if not isinstance(ids, list) or not 0 < len(ids) <= MAX_NAMED:
            raise Failure("name the jobs, 1 to %d of them" % MAX_NAMED)
        ids = list(dict.fromkeys(map(str, ids)))
        for job_id in ids:
            try:
                job = known_job(store, job_id)
                if job.state not in states:
                    raise Failure("job %s is %s, not %s; see: queuectl show %s" % (
                        job_id, job.state, " or ".join(states), job_id))
                act(store, job, now)
            except Failure as error:
                if not skip or isinstance(error, StorageError):
                    raise
                refused.append(str(error))
        count = len(ids) - len(refused)
        named = "Job " + ids[0] if count == len(ids) == 1 else plural(count, "job")
        return reply("%s %s" % (named, done), count=count, refused=refused)
    return change

def pause(store, now, reason=""):
    """Start nothing new until `resume`."""
    store.configure("paused", checked("reason", as_text, reason) or "paused")
    return reply("Queue paused")

def resume(store, now):
    store.configure("paused", None)
    return reply("Queue resumed")

def set_setting(store, now, key=None, value=None):
    text = str(value)
    stored = read_setting(key, text)
    store.configure(key, None if text.strip() == "default" else stored)
    return reply("Updated %s to %s" % (key, text), value=stored)

def start_workers(store, now, count=1):
    """Want so many workers more. Without a daemon nobody would start them."""
    count, wanted = checked("count", as_count, count), store.settings["workers"]
    daemon = store.place.daemon()
    if not daemon:
        raise NoDaemon(store.path)
    if daemon["stopping"]:
        raise Failure("the daemon is stopping; try again when it has ended")
    if wanted + count > MAX_WORKERS:
        raise Failure("at most %d workers; %d are wanted already" % (MAX_WORKERS, wanted))
    store.configure("workers", wanted + count)
    return reply("Started %s" % plural(count, "worker"))

def stop_workers(store, now, count=None, at_once=False):
    """Want so many workers fewer (None: none at all); `at_once`: their jobs are to be given back."""
    wanted = store.settings["workers"]
    left = 0 if count is None else max(wanted - checked("count", as_count, count), 0)
    store.configure("workers", left)
    busy = {claim.slot: claim.job for claim in store.open_claims() if left < claim.slot <= MAX_WORKERS}
    if at_once:
        store.want_back(busy)
    return reply("Stopped " + ("workers" if count is None else plural(wanted - left, "worker")),
                 jobs=list(busy.values()))

# -- looks

def status_of(store, now):
    """{"jobs", "workers"}, and "paused" in a pause."""
    told = {"jobs": store.counts(), "workers": len(store.place.slots())}
    return dict(told, paused=store.paused) if store.paused else told

def workers_of(store, now):
    """[dict] of the workers; `since`: of its job, or since when it is idle."""
    busy, found = {claim.slot: (claim.job, claim.number, claim.started_at)
                   for claim in store.open_claims()}, []
    for slot in store.place.slots():
        note = store.place.note_of(slot)
        job, attempt, since = busy.get(slot, (None, None, note.get("at", now)))
        leaving = store.settings["workers"] < slot <= MAX_WORKERS
        found.append({"pid": note.get("pid"), "job": job, "attempt": attempt, "since": iso(since),
                      "state": "leaving" if leaving else "busy" if job else "idle"})
    return found

def metrics_of(store, now):
    """{name: number} of what was counted, and of what is now."""
    totals, uptime_s = store.totals(), (now - store.place.daemon().get("since", now)) // 1000
    return dict({name: totals[name] for name in totals if name not in STATES},
                jobs=store.counts(), uptime="%d min" % (uptime_s // 60), uptime_s=uptime_s,
                workers_running=len(store.place.slots()), database_bytes=store.size())

def list_jobs(store, now, state=None):
    """All jobs, or those in a state, as an iterator: they are sent piece by piece."""
    states = [checked("state", one_of(*STATES), state)] if state else ()
    return (job.public() for job in store.jobs(store.select(states)))

def about_daemon(store, now):
    """What `daemon status` tells; Failure without one."""
    daemon = store.place.daemon()
    if not daemon:
        raise NoDaemon(store.path)
    return dict({name: daemon[name] for name in ("pid", "version", "socket", "stopping")},
                db=utf8(store.path), uptime_s=(now - daemon["since"]) // 1000,
                workers=len(store.place.slots()), wanted=store.settings["workers"])

# -- requests

CHANGES = {  # command and option -> its function; what it takes after the time are the arguments
    "enqueue": enqueue,
    "enqueue batch": enqueue_batch,
    "dlq retry": for_each(Store.requeue, ("dead",), "added to queue"),
    "retry": for_each(Store.requeue, STATES, "added to queue"),
    "cancel": for_each(Store.cancel, UNFINISHED, "cancelled"),
    "delete": for_each(lambda store, job, now: store.delete([job.id]), FINISHED, "deleted"),
    "pause": pause,
    "resume": resume,
    "config set": set_setting,
    "worker start": start_workers,
    "worker stop": stop_workers,
}
LOOKS = {
    "status": status_of,
    "list": list_jobs,
    "dlq list": lambda store, now: list_jobs(store, now, "dead"),
    "metrics": metrics_of,
    "daemon status": about_daemon,
}

def resolve(request):
    """(whether it changes the queue, function, {argument: value}) that a request stands for."""
    if not isinstance(request, dict):
        raise Failure('a request is an object like {"command":"status"}')
    command, option, flag, value = map(request.get, ("command", "option", "flag", "value"))
    if command == "config" and flag:  # as the original has it
        option, flag, value = option or "set", None, {"key": flag, "value": value}
    name = ("%s %s" % (command, option or "")).strip()
    function = CHANGES.get(name) or LOOKS.get(name)
    code = getattr(function, "__code__", None)
    known = code.co_varnames[2:code.co_argcount] if code else ()
    if flag is not None:
        value = {str(flag).lstrip("-"): value}
    elif not isinstance(value, dict):
        value = {(known + ("value",))[0]: value}  # the first argument
    given = {name: one for name, one in value.items() if one is not None}
    unknown = set(given).difference(known)
    if function is None or unknown:
        raise Failure("command %s is unknown to this queuectl, %s; known are %s" % (
            " ".join([name, *unknown])[:80], VERSION, ", ".join(known or [*CHANGES, *LOOKS])))
    return name in CHANGES, function, given

def perform(store, request, committed=lambda: None):
    """The answer to a request; Failure if it is refused. A change that was made before is only answered
    again. `committed()` is called before it is on the disk: a worker may start meanwhile."""
    changes, function, arguments = resolve(request)
    if not changes:
        with store.mutex:
            store.refresh()
        return reply(function(store, now_ms(), **arguments))
    once = request.get("once") and compact(request["once"])
    with store.transaction():
        answer, now = store.recall(once), now_ms()
        if not answer:
            check_inserted(store, now)
            answer = compact(function(store, now, **arguments))
            store.remember(once, answer)
    committed()
    store.sync()
    return json.loads(answer)

# ---- Running a command --------------------------------------------------------------------------
# One attempt: its run file, its process group, its deadline, its output, and stopping what is left.
#
# Three things speak for an attempt when nobody else can: the lock on its run file, held by whatever
# it left behind; QUEUECTL_RUN in their environment; and what the worker noted in its slot's file:
# the serial, the pid of the command's leader, and when that started.

UNSTARTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT,
             errno.EROFS, errno.EIO)  # the host's fault, not the job's: burns no retry

def job_environment(claim, run_file, environ):
    """What a command finds in its environment: its caller's, or `environ`; the job's; ours."""
    environ = ({as_bytes(name): as_bytes(text) for name, text in json.loads(claim.environ).items()}
               if claim.environ else dict(environ))
    environ.update((as_bytes(name), as_bytes(text)) for name, text in env_of(claim.env).items())
    environ.update({b"QUEUECTL_JOB_ID": claim.job.encode(), b"QUEUECTL_RUN": os.fsencode(run_file),
                    b"QUEUECTL_ATTEMPT": b"%d" % (claim.attempts + 1)})
    return environ

def send(number, group, others):
    """Signal a process group (None: its number may be another's by now), and other processes."""
    for one in (number, signal.SIGCONT):  # a stopped process handles SIGTERM only once it goes on
        with suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(group, one)
        for pid in others:
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != group:
                    os.kill(pid, one)

def stop_rest(run_file, group, leads, mark=None):
    """Return once nothing is left of an attempt: SIGTERM to its process group and to whoever else holds
    its run file or has `mark` in its environment, SIGKILL after the grace. `leads()`, called time and
    again, tells whether the group's leader lives."""
    def alive():
        return leads() or is_locked(run_file) or mark and processes(mark=mark)
    number, wait_s = signal.SIGTERM, GRACE_S
    while alive():
        held = is_locked(run_file)
        send(number, group if leads() else None, processes(run_file if held else None, mark)
             if held or mark else ())
        until = monotonic() + wait_s
        while alive() and monotonic() < until:
            sleep(0.02)
        number, wait_s = signal.SIGKILL, min(wait_s, 0.1) * 2

def dropped_of(fd):
    """How many bytes are missing at the start of a run file, by its header: -1 while it is cut."""
    return int(os.pread(fd, HEADER, 0).strip(b"\0\n") or 0)

def read_running(run_file, offset, limit):
    """(bytes of what a running attempt wrote, from byte `offset` of it on, or from what is left of it
    on; where they start; where all of it ends); None while it is being cut, or gone."""
    with suppress(OSError, ValueError), open(run_file, "rb", buffering=0) as file:
        fd, dropped = file.fileno(), dropped_of(file.fileno())
        data = os.pread(fd, limit, HEADER + max(offset - dropped, 0))
        end = dropped + max(os.fstat(fd).st_size - HEADER, 0)
        if 0 <= dropped == dropped_of(fd):
            return data, max(offset, dropped), end
    return None

def tail_of(run_file, limit):
    """(the last `limit` bytes of what an attempt wrote, how many came before)."""
    end = (read_running(run_file, 0, 0) or (b"", 0, 0))[2]
    data, start, _ = read_running(run_file, max(end - limit, 0), limit) or (b"", 0, 0)
    return data, start

class Attempt:
    """One run of one command, on its worker's side."""

    def __init__(self, worker, claim):
        self.worker = worker
        self.claim = claim
        self.path = worker.place.file(claim.serial)
        self.process = None
        self.output = None      # where the command's stdout and stderr come in: polled
        self.file = None        # the run file, locked
        self.size = 0           # bytes of output in it
        self.dropped = 0        # bytes no longer in it
        self.limit = worker.store.settings["output-limit"]
        self.status = None      # of the leader, once it has ended
        self.reason = ""        # as in Outcome

    def run(self):
        """See the command through; the Outcome."""
        try:
            self.start()
            self.watch()
            if self.reason or self.status:
                self.sweep()
            self.process.wait()
        except (OSError, ValueError) as error:  # a NUL, say, in what another program inserted
            if self.process:
                raise
            return self.outcome(
                "unstarted" if getattr(error, "errno", None) in UNSTARTED else "refused",
                "can't start: %s %s" % (getattr(error, "strerror", error),
                                        os.fsdecode(getattr(error, "filename", None) or "")))
        finally:
            self.close_output()
            if self.file is not None:
                os.close(self.file)
        return self.outcome(self.reason)

    def outcome(self, reason, detail=""):
        output, before = tail_of(self.path, self.limit) if self.size else (b"", self.dropped)
        return Outcome(self.status, reason, safe(detail), output, before, now_ms())

    def start(self):
        """Make and lock the run file, start the command, note its leader."""
        import subprocess
        claim, worker = self.claim, self.worker
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.output, theirs = os.pipe()
        try:
            os.set_blocking(self.output, False)  # the command may read from there what we heard of
            worker.poll.register(self.output, select.POLLIN)
            self.process = subprocess.Popen(
                split_shell(worker.store.settings["shell"]) + [claim.command.encode()],
                stdin=worker.null, stdout=theirs, stderr=theirs,
                cwd=as_bytes(claim.cwd) if claim.cwd else os.path.dirname(worker.place.db),
                env=job_environment(claim, self.path, worker.environ), pass_fds=(self.file,),
                start_new_session=True)
        finally:
            os.close(theirs)
        worker.note(serial=claim.serial, leader=self.process.pid)

    def watch(self):
        """Wait for the command's end, for its deadline, or for a wish to end it."""
        worker, pid, now = self.worker, self.process.pid, monotonic()
        deadline = now + (self.claim.timeout or MAX_MS) / 1000.0
        note_at = now + 0.01  # right after the start /proc would wait for the exec
        while self.status is None and not self.reason:
            left = min(note_at, deadline, now + LOOK_S) - now
            ready = worker.listen(left)
            if self.output in ready:
                self.pump()
            if worker.wake_fd in ready:
                self.leads()
            reason, now = worker.wish(self.claim), monotonic()
            if now >= note_at:
                note_at = deadline + LOOK_S  # not again
                worker.note(serial=self.claim.serial, leader=pid, start=process_start(pid))
            reason = reason or "timeout" * (now >= deadline)
            if reason and self.leads():  # else it has ended by itself
                self.reason = reason
        self.drain()

    def leads(self):
        """Whether the command's leader still runs; takes its output meanwhile. Where possible without
        reaping: a pid is safe to signal only as long as it is not reaped."""
        if self.output is not None:
            self.pump()
        if self.status is None and hasattr(os, "waitid"):
            info = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                self.status = (info.si_status if info.si_code == os.CLD_EXITED else -info.si_status)
        elif self.status is None:
            self.status = self.process.poll()
        return self.status is None

    def sweep(self):
        """After a failure nothing of it may be left: there will be a next attempt."""
        os.close(self.file)  # so that the lock tells of others alone
        self.file = os.open(self.path, os.O_RDWR)
        stop_rest(self.path, self.process.pid, self.leads)
        send(signal.SIGKILL, self.process.pid, ())  # who closed the lock
        self.drain()

    def pump(self):
        """Take a piece of its output, if there is one."""
        with suppress(BlockingIOError):
            data = os.read(self.output, PIECE)
            if data:
                self.keep(data)
            else:
                self.close_output()
            return bool(data)

    def drain(self):
        """Take what is in the pipe now: whoever still writes there is not waited for."""
        for _ in range(64):
            if self.output is None or not self.pump():
                break

    def close_output(self):
        if self.output is not None:
            self.worker.poll.unregister(self.output)  # closed it would be "ready" for ever
            os.close(self.output)
            self.output = None

    def keep(self, data):
        """Add to the run file; a full disk costs the output, not the job."""
        done = 0
        with suppress(OSError):
            done = os.pwrite(self.file, data, HEADER + self.size)
        self.size += done
        if self.size > max(MIN_RUN_FILE, 16 * self.limit):
            self.cut()
        self.dropped += len(data) - done

    def cut(self):
        """Leave the last `limit` bytes. Who reads meanwhile is told."""
        with suppress(OSError):
            tail = os.pread(self.file, self.limit, HEADER + self.size - self.limit)
            self.mark_dropped(-1)
            os.pwrite(self.file, tail, HEADER)
            os.ftruncate(self.file, HEADER + len(tail))
            self.dropped += self.size - len(tail)
            self.size = len(tail)
            self.mark_dropped(self.dropped)

    def mark_dropped(self, count):
        os.pwrite(self.file, b"%*d\n" % (HEADER - 1, count), 0)

# ---- Worker -------------------------------------------------------------------------------------
# A process of its own, forked by a Pool, the owner of a slot. Its supervisor only wakes it; without
# one it finishes its job and leaves.

def close_descriptors(keep):
    """Close all but these and stdio: a copy of another child's socket would hide its end, one of a lock
    would hold it."""
    signal.set_wakeup_fd(-1)  # it would write into whatever has that number next
    for fd in map(int, os.listdir("/dev/fd")):
        if fd > 2 and fd not in keep:
            with suppress(OSError):  # the one that listed them
                os.close(fd)

def ignore_signals():
    """No signal ends or stops us, who may hold the lock; jobs start with default dispositions and an
    empty mask, whatever the daemon inherited. Not by SIG_IGN: exec resets handlers only."""
    for number in range(1, signal.NSIG):
        with suppress(OSError, ValueError):
            if number in HELD + (signal.SIGCHLD,) or signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

def set_open_files(limit=None):
    """Set the soft limit of descriptors, None: as high as allowed; the limit before."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if limit is None else limit, hard))
    return soft

def wakeup_fd():
    """A descriptor that is readable after each signal that has a handler."""
    wake, theirs = os.pipe()
    for fd in (wake, theirs):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(theirs)
    return wake

class Worker:
    """The owner of a slot, whose file `slot_fd` it has locked. `sock`: to its supervisor; `only`: the
    ids of the jobs it is for, None: any; []: it only settles what it finds in its slot."""

    def __init__(self, place, slot, slot_fd, sock, only):
        self.place = place
        self.slot = slot
        self.slot_fd = slot_fd
        self.sock = sock
        self.alone = False       # the supervisor is gone, or wants no more of it
        self.only = only
        self.look_at = 0.0       # monotonic: when to look for a wish again
        self.store = Store(place, door=True)
        self.wake_fd = wakeup_fd()
        self.null = os.open(os.devnull, os.O_RDONLY)
        # What jobs get. Not by os.environ: setenv(3) keeps every text that it was ever given.
        self.environ = {name: text for name, text in os.environb.items()
                        if not re.match(b"LISTEN_|WATCHDOG_|NOTIFY_SOCKET", name)}  # what is systemd's
        sock.setblocking(False)
        self.poll = select.poll()
        self.poll.register(sock, select.POLLIN)
        self.poll.register(self.wake_fd, select.POLLIN)

    def run(self):
        """Settle, then: one transaction, one job, until it is to leave."""
        claim, outcome = self.settle()
        while True:
            claim = self.next_claim(claim, outcome)
            if claim:
                outcome = Attempt(self, claim).run()
                if outcome.reason == "unstarted":
                    self.listen(LOOK_S)  # what the host lacks now it may have then
            elif self.await_word():
                outcome = None
            else:
                return

    def note(self, **news):
        with suppress(OSError):
            write_note(self.slot_fd, pid=os.getpid(), only=self.only, at=now_ms(), **news)

    def settle(self):
        """(Claim, Outcome) of the attempt that the last owner of the slot left open, once nothing of it
        is left; (None, None) without one."""
        claims = self.store.open_claims(slot=self.slot)
        if not claims:
            return None, None
        claim, run_file = claims[0], self.place.file(claims[0].serial)
        note, same_boot = self.place.note_of(self.slot), claim.boot == boot_id()
        reason = reason_of(claim.wish, same_boot, os.path.lexists(run_file))
        if same_boot:
            start = note.get("start") if note.get("serial") == claim.serial else None
            stop_rest(run_file, note.get("leader"),
                      lambda: start and process_start(note["leader"]) == start,
                      b"QUEUECTL_RUN=" + os.fsencode(run_file))
        output, dropped = tail_of(run_file, self.store.settings["output-limit"])
        return claim, Outcome(None, reason, "", output, dropped, now_ms())

    def next_claim(self, claim, outcome):
        """The next Claim or None, in one transaction with the outcome of the last one. Where that fails
        the outcome alone, which a claim that can't be stored must not cost, again and again."""
        pause_s = BUSY_S
        while True:
            for may_claim in (True, False):
                try:
                    return self.record_and_claim(claim, outcome, may_claim)
                except StorageError:
                    if self.leaves():
                        self.store.check_file()  # raises if nothing can be stored any more
                    if outcome is None:
                        return None
            self.listen(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    def record_and_claim(self, claim, outcome, may_claim):
        """Not synced: after a power cut the last outcomes may be lost, and those jobs run again."""
        store, recorded, new = self.store, None, None
        with store.transaction():
            now = now_ms()
            if claim:
                recorded = record(store, claim, outcome, os.getpid(), now)
            if may_claim and not self.leaves():
                new = store.claim(self.slot, boot_id(), now, self.only)
        if claim:
            with suppress(OSError):
                os.unlink(self.place.file(claim.serial))
            if recorded:
                self.tell(claim, outcome, *recorded)
        return new

    def leaves(self):
        """Whether it is to claim no more."""
        return (self.alone or self.only == []
                or self.store.settings["workers"] < self.slot <= MAX_WORKERS)

    def tell(self, claim, outcome, verdict, on_dead):
        """Log what an operator should know; wake the supervisor for what it has to see to."""
        error = verdict.error or outcome.detail
        if error:
            self.place.log("job %s is %s after attempt %d of %d: %s" % (
                claim.job, verdict.state, verdict.attempts, claim.max_retries or 0, error))
        if on_dead and self.only and claim.job in self.only:
            self.only.append(on_dead)
        if verdict.due is not None or on_dead:
            with suppress(OSError):
                self.sock.send(b"!")

    def listen(self, wait_s):
        """Wait for something to hear, at most so long; the descriptors that are readable. What the
        supervisor sends is only that there is something to look at, or its end. The socket stays open:
        its end would tell of ours."""
        ready = [fd for fd, _ in self.poll.poll(max(int(wait_s * 1000) + 1, 0))]
        if self.wake_fd in ready:
            os.read(self.wake_fd, 512)
        if self.sock.fileno() in ready:
            self.look_at, data = 0.0, b""
            with suppress(OSError):
                data = self.sock.recv(512)
            if not data:
                self.poll.unregister(self.sock)
                self.alone = True
        return ready

    def wish(self, claim):
        """What somebody wishes of the attempt: looked up when we are woken, and once a second."""
        if monotonic() >= self.look_at:
            self.look_at = monotonic() + LOOK_S
            with suppress(StorageError):
                return self.store.wish(claim.slot, claim.serial)

    def await_word(self):
        """Idle until there may be something to do; False when it is to leave."""
        self.note()
        done = self.only is not None and not any(
            job.state in UNFINISHED for job in self.store.jobs(self.only, "id"))
        if not (done or self.leaves()):
            self.listen(3600)
        return not (done or self.leaves())

def worker_main(sock, place, slot, slot_fd, only, open_files):
    """The whole life of a worker process. `open_files`: the limit that jobs get back."""
    close_descriptors({sock.fileno(), slot_fd})
    ignore_signals()
    set_open_files(open_files)
    Worker(place, slot, slot_fd, sock, only).run()

# ---- Pool ---------------------------------------------------------------------------------------
# As many workers as wanted: started, woken, replaced. One thread and one poll, in the process that
# forks: the daemon's supervisor, or a `drain` or `run` for itself.

STARTS = 32  # children forked in one go

def child_main(target, sock, args):
    """Nothing of the parent's may be flushed, closed or finalized in a child; args[0]: the Place."""
    try:
        target(sock, *args)
        os._exit(0)
    except BaseException:
        import traceback
        args[0].log(traceback.format_exc())
    finally:
        os._exit(1)

class Child:
    """A forked process, and the socket to it that ends with it."""

    def __init__(self, context, target, *args):
        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        with theirs:
            self.process = context.Process(target=child_main, args=(target, theirs, args))
            self.process.start()

    def wake(self):
        with suppress(OSError):
            self.sock.send(b"!")

    def ended(self):
        """Whether it has; what it sent is only that there is something to look at."""
        try:
            return not self.sock.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            return True

class Pool:
    """Workers for the queue of `store`: `count` of them; `only`: as a Worker's."""

    def __init__(self, store, count=0, only=None):
        import multiprocessing
        self.context = multiprocessing.get_context("fork")  # not the default since 3.14
        self.store = store
        self.place = store.place
        self.only = only
        self.own = list(range(MAX_WORKERS + 1, MAX_WORKERS + 1 + count))  # slots
        self.workers = {}        # slot -> Child
        self.pauses = {}         # slot -> monotonic before which no worker is started there
        self.poll = select.poll()
        self.handlers = {}       # descriptor -> what to call when it is readable
        self.look_at = 0.0       # monotonic
        self.stopping = False
        self.logged = {}         # text -> monotonic of its last line
        self.open_files = set_open_files()
        self.clock = now_ms() - int(monotonic() * 1000)
        self.begin()

    def slots(self):
        """The numbers of the slots that are to have a worker."""
        return () if self.stopping else self.own

    def begin(self):
        """Remove the run files that no open attempt names, and give no attempt the number of one."""
        names = [int(name) for name in os.listdir(self.place.file("")) if name.isdigit()]
        if names:
            with self.store.transaction():
                self.store.raise_serial(max(names))
            for serial in set(names) - {claim.serial for claim in self.store.open_claims()}:
                with suppress(OSError):
                    os.unlink(self.place.file(serial))

    def log(self, text):
        """Log it, the same at most once a minute."""
        if monotonic() - self.logged.get(text, -60) >= 60:
            self.logged[text] = monotonic()
            self.place.log(text)

    # -- children

    def on_readable(self, fd, handler):
        self.poll.register(fd, select.POLLIN)
        self.handlers[fd] = handler

    def start(self, handler, target, *args):
        """The Child that runs target(its socket, *args), None if there can be none; handler() is called
        when it has something for us to look at, or has ended."""
        try:
            child = Child(self.context, target, self.place, *args)
            self.on_readable(child.sock.fileno(), handler)
            return child
        except OSError as error:
            self.log("can't start a process: %s" % error)
            return None

    def forget(self, child):
        self.poll.unregister(child.sock)
        del self.handlers[child.sock.fileno()]
        child.sock.close()
        child.process.join()

    def start_worker(self, slot, slot_fd):
        only = self.only if slot in self.slots() else []
        if only:  # whoever looks who works the job finds it from the start
            write_note(slot_fd, **dict(self.place.note_of(slot), only=only))
        child = self.start(functools.partial(self.on_worker, slot), worker_main, slot, slot_fd, only,
                           self.open_files)
        os.close(slot_fd)  # the lock lives on in the worker's copy
        if child:
            self.workers[slot] = child
        else:
            self.pauses[slot] = monotonic() + LOOK_S

    def on_worker(self, slot):
        """It has something for us to look at, or has ended: then another may settle and go on."""
        child = self.workers[slot]
        self.look_at = 0.0
        if child.ended():
            del self.workers[slot]
            self.forget(child)
            status = child.process.exitcode  # after 1 the next one is likely to fail as well
            self.pauses[slot] = monotonic() + (LOOK_S if status > 0 else BUSY_S if status else 0)

    def missing(self, busy):
        """What starts the children that are missing, as functions: workers in the slots that should
        have one, and in those where an attempt is open that nobody works at."""
        starts, now = [], monotonic()
        for slot in sorted(set(self.slots()).union(busy) - set(self.workers)):
            pause_end = self.pauses.get(slot, 0.0)
            if pause_end > now or len(starts) == STARTS:
                self.look_at = min(self.look_at, pause_end)
                continue
            slot_fd = self.place.hold("w.%d" % slot, 0.002)
            if slot_fd is not None:
                starts.append(functools.partial(self.start_worker, slot, slot_fd))
            elif slot in self.own:  # another `run` or `drain` has it
                self.own[self.own.index(slot)] = max(self.own) + 1
                self.look_at = 0.0
        return starts

    def fork(self, starts):
        """Call these one after the other; each forks, so no connection is open meanwhile."""
        import gc
        self.store.close()
        getattr(gc, "freeze", int)()  # the children go on sharing what is loaded now
        for start in starts:
            start()

    # -- the loop

    def step(self, timeout_s=LOOK_S):
        """Wait for something to do, at most so long, and do it."""
        left = min(self.look_at - monotonic(), timeout_s)
        for fd, _ in self.poll.poll(int(left * 1000) + 1 if left > 0 else 0):
            if fd in self.handlers:
                self.handlers[fd]()
        if monotonic() >= self.look_at:
            self.look()

    def look(self):
        """See to what is due, how many workers there are, and who is to be woken."""
        now = now_ms()
        self.look_at = monotonic() + LOOK_S
        try:
            self.store.check_file()
            self.store.refresh()
            self.tidy(now)
            starts = self.missing(self.store.open_slots())
            if starts:
                self.fork(starts)
            self.wake(self.store.open_slots())
            self.look_at = min(self.look_at, monotonic() + max(
                self.store.next_due() - now_ms(), 0) / 1000.0)
        except Busy:
            self.look_at = monotonic() + 0.01
        except Replaced:
            raise
        except StorageError as error:
            self.log("storage trouble: %s" % error)

    def tidy(self, now):
        """Check rows of other programs, make due jobs ready, delete what has been kept enough."""
        store, offset = self.store, now - int(monotonic() * 1000)
        stepped, self.clock = abs(offset - self.clock) > 1000, offset
        if not (stepped or store.unchecked() or store.next_due() <= now or store.expired(now)):
            return
        with store.transaction():
            if stepped:  # backoffs may be too far ahead
                store.pull_in(now)
            expired = store.expired(now)
            store.delete(expired)
            if STEP in (check_inserted(store, now), store.promote(now), len(expired)):
                self.look_at = 0.0

    def wake(self, busy):
        """Wake idle workers, as many as there may be jobs; those that are to leave; those whose attempt
        somebody wishes to end."""
        idle = [slot for slot in self.workers if slot not in busy]
        leaving = set(idle) - set(self.slots())
        for slot in leaving.union(idle[:self.store.claimable(len(idle))],
                                  (slot for slot in busy if busy[slot])).intersection(self.workers):
            self.workers[slot].wake()

    # -- the end

    def stop(self):
        """Have workers claim no more, and leave after their job."""
        self.stopping = True
        for child in self.workers.values():
            with suppress(OSError):
                child.sock.shutdown(socket.SHUT_WR)

    def force(self):
        """Have running jobs stopped, and their attempts given back."""
        self.stop()
        with self.store.transaction():
            self.store.want_back(self.workers)

# ---- Server -------------------------------------------------------------------------------------
# A child of the daemon's supervisor: socketserver on the Unix socket, a thread for each connection,
# one Store for all. What hurts it hurts no job: the supervisor holds the socket, and starts another.

def is_whole(inbox):
    """Whether it is one JSON object; what is nested too deeply to tell may as well be taken."""
    try:
        json.loads(inbox.decode())
    except ValueError:
        return False
    except RecursionError:
        pass
    return True

def receive(sock, inbox):
    """The next message on `sock`, None at its end; `inbox` holds what came after it. It ends with a
    newline, or, from those that send none, once it is one whole JSON object."""
    while True:
        inbox[:] = inbox.lstrip()
        end = inbox.find(b"\n")
        if end < 0 and inbox.rstrip().endswith(b"}") and is_whole(inbox):
            end = len(inbox)
        if (len(inbox) if end < 0 else end) > MAX_REQUEST:
            raise Failure("a request has at most %d bytes" % MAX_REQUEST)
        if end >= 0:
            message = bytes(inbox[:end])
            del inbox[:end + 1]
            return message
        piece = sock.recv(1 << 18)
        if not piece:
            return bytes(inbox) or None
        inbox += piece

def is_served(path):
    """Whether somebody listens at the socket `path` of ours; None: it is no such socket."""
    with suppress(OSError):
        status = os.lstat(path)
        if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1)
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    return False
                except OSError:  # its backlog is full
                    pass
                return True
    return None

def check_socket_path(path):
    """Refuse what doesn't fit a socket's address, with room for the name it is bound under."""
    folder, name = os.path.split(path)
    if len(os.fsencode(folder)) + 1 + max(len(os.fsencode(name)), 8) > MAX_SOCKET_PATH:
        raise Failure("socket path %s is too long: at most %d bytes; give a shorter --socket"
                      % (path, MAX_SOCKET_PATH))

def listen_at(path):
    """A socket that listens at `path`, 0600 from its first instant. It listens under another name
    before `path` leads to it: in between it would look stale to others. A stale one is moved aside
    first, and must be the one that was found stale. FileExistsError if another was faster."""
    hidden, aside = [os.path.join(os.path.dirname(path), os.urandom(4).hex()) for _ in range(2)]
    if is_served(path) is False:
        before = os.lstat(path)
        os.rename(path, aside)
        if not os.path.samestat(os.lstat(aside), before):
            with suppress(FileExistsError):
                os.link(aside, path)
        os.unlink(aside)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(hidden)
        listener.listen(128)
        os.link(hidden, path)
    finally:
        os.umask(umask)
        with suppress(FileNotFoundError):
            os.unlink(hidden)
    return listener

def refusal(error):
    """The answer for an error, as a line."""
    return compact(dict(success=False, message="Error: %s" % (
        error if isinstance(error, Failure) else repr(error)), **getattr(error, "details", {}))) + "\n"

def answer_to(store, data, committed):
    """Pieces of the answer to the bytes of a request; whatever goes wrong in it is its own trouble
    alone. A list that is given as an iterator is sent row by row."""
    try:
        request = decode_json(data, "the request")
        if isinstance(request, dict) and request.get("db") not in (None, utf8(store.path)):
            raise Failure("the daemon here serves %s, not %s; leave out --socket and SOCKET_PATH"
                          % (store.path, request["db"]))
        answer = perform(store, request, committed)
    except Exception as error:
        yield refusal(error)
        if not isinstance(error, Failure):  # a bug must not end the queue
            import traceback
            store.place.log("internal error: %s" % traceback.format_exc())
        return
    rows, start = answer["message"], '{"success":true,"message":['
    if hasattr(rows, "__next__"):
        for row in rows:
            yield start + compact(row)
            start = ","
        yield start * (start != ",") + "]}\n"
    else:
        yield compact(answer) + "\n"

def answers(sock, store, committed):
    """The pieces of the answers to the requests on a connection, in order; None after each."""
    inbox = bytearray()
    try:
        for data in iter(lambda: receive(sock, inbox), None):
            yield from answer_to(store, data, committed)
            yield None
    except Failure as error:  # where the next one would begin is unknown
        yield refusal(error)

def serve(store, listener, committed):
    """Answer requests on connections to `listener`, a thread each, for ever."""
    import socketserver
    import threading

    class Handler(socketserver.StreamRequestHandler):
        timeout, wbufsize = IDLE_S, -1

        def handle(self):
            with suppress(OSError):
                for piece in answers(self.request, store, committed):
                    self.wfile.flush() if piece is None else self.wfile.write(piece.encode())

        def finish(self):
            with suppress(OSError):
                super().finish()

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

        def verify_request(self, request, _):
            """Only the owner of the queue gets in, and not too many: others do without a daemon."""
            return (peer_uid(request) in (os.geteuid(), None)
                    and threading.active_count() < MAX_CLIENTS)

    server = Server(None, Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever(3600)

def server_main(sock, place, listener):
    """The whole life of the server process: it ends with its supervisor."""
    import threading
    close_descriptors({sock.fileno(), listener.fileno()})
    ignore_signals()

    def wake():
        with suppress(OSError):
            sock.send(b"!", socket.MSG_DONTWAIT)

    def leave():
        with suppress(OSError):
            while sock.recv(512):
                pass
        os._exit(0)
    threading.Thread(target=leave).start()
    serve(Store(place), listener, wake)

# ---- Daemon -------------------------------------------------------------------------------------
# The supervisor: a Pool with as many workers as the settings want, a server, and an orderly end.

def notify(text):
    """Tell systemd, where it started us and listens; never an error."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(BUSY_S)
            sock.sendto(text.encode(), "\0" + path[1:] if path[0] == "@" else path)

class Ending:
    """SIGTERM, SIGINT and SIGHUP noted, for who polls `fd`. The last two stay ignored if they were."""

    def __init__(self):
        self.fd = wakeup_fd()
        self.first = None  # the first one that came
        self.numbers = []  # those that were not taken yet
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self.numbers.append(number))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def take(self):
        """The numbers of the signals that came since."""
        with suppress(BlockingIOError):
            os.read(self.fd, 512)
        numbers, self.numbers = self.numbers, []
        self.first = self.first or next(iter(numbers), None)
        return numbers

class Daemon(Pool):
    """The daemon of the queue at `place`. `workers`: wanted from now on, None: as stored; `grace`: ms
    that a stop waits for running jobs, None: as long as they take. Raises Failure."""

    def __init__(self, place, workers=None, grace=None):
        super().__init__(Store(place, patience_s=PATIENCE_S))
        self.grace = grace
        self.force_at = None       # monotonic: running jobs are stopped then
        self.server = None         # its Child
        self.since = now_ms()
        self.lock = place.hold_daemon(2)
        self.listener, self.path = self.listen()
        self.note(stopping=False)
        with self.store.transaction():
            self.store.note_startup(now_ms())
            if workers is not None:
                self.store.configure("workers", workers)
        self.store.patience_s = self.store.turn.patience_s = TURN_S
        self.ending = Ending()
        self.on_readable(self.ending.fd, self.on_signal)

    def note(self, stopping):
        write_note(self.lock, pid=os.getpid(), start=process_start(os.getpid()), version=VERSION,
                   socket=utf8(self.path), since=self.since, stopping=stopping)

    def slots(self):
        return range(1, 0 if self.stopping else self.store.settings["workers"] + 1)

    def listen(self):
        """(listener, path): at the socket given, or at the default one, or, that taken, in DB-run. The
        server of a daemon that was killed may still be leaving there."""
        until = monotonic() + GRACE_S
        while True:
            for path in ([self.place.socket]
                         + [self.place.file("socket")] * (not self.place.socket_given)):
                check_socket_path(path)
                try:
                    return listen_at(path), path
                except OSError as error:
                    problem = error.strerror
            if monotonic() > until:
                raise Failure("can't listen at %s: %s; give another --socket" % (path, problem))
            sleep(0.02)

    def run(self, announce):
        """Serve until stopped."""
        try:
            self.look()
            told = plural(len(self.slots()), "worker")
            self.log("started: queuectl %s, %s" % (VERSION, told))
            announce("queuectl %s daemon ready: pid %d, socket %s, database %s, %s" % (
                VERSION, os.getpid(), self.path, self.place.db, told))
            notify("READY=1")
            while self.workers or not self.stopping:
                self.step()
                if self.force_at and monotonic() >= self.force_at:
                    with suppress(StorageError):  # else again at the next step
                        self.force()
                        self.force_at = None
            self.log("stopped")
        except Exception as error:
            self.log("gives up: %r" % error)
            raise
        finally:
            self.end_server()
            self.store.close()

    def missing(self, busy):
        return super().missing(busy) + [self.start_server] * (not (self.server or self.stopping))

    def start_server(self):
        self.server = self.start(self.on_server, server_main, self.listener)

    def on_server(self):
        """A request was stored; or the server has ended, and the next look starts another."""
        self.look_at = 0.0
        if self.server.ended():
            self.look_at = monotonic() + LOOK_S
            self.forget(self.server)
            self.server = None

    def on_signal(self):
        """The first one: an orderly stop; another: running jobs are stopped too."""
        for _ in self.ending.take():
            if self.stopping:
                self.force_at = monotonic()
                continue
            self.log("stopping")
            notify("STOPPING=1")
            self.note(stopping=True)
            self.stop()
            self.end_server()
            self.force_at = None if self.grace is None else monotonic() + self.grace / 1000.0

    def end_server(self):
        """Nobody is let in any more: commands do without."""
        if self.server:
            os.kill(self.server.process.pid, signal.SIGKILL)  # it may be stopped
            self.forget(self.server)
            self.server = None
        if self.listener:
            self.listener.close()
            self.listener = None
            with suppress(OSError):  # what lies there now may be another's
                is_served(self.path) is False and os.unlink(self.path)

# ---- Client -------------------------------------------------------------------------------------
# Where a command finds its queue, and how it has its changes made: by the daemon, or, if nobody
# answers, here.

# The code of this whole file, for `compiled`.
CODE = sys._getframe().f_code

def default_db():
    """Beside this file if the directory is ours alone and no place for programs, else where state is
    kept."""
    folder = os.path.dirname(os.path.realpath(__file__))
    status = os.stat(folder)
    if (status.st_uid != os.geteuid() or others_can_write(status)
            or re.search(r"/lib/|/s?bin\Z", folder)):
        # Joined to /, or without a home it would depend on the current directory.
        folder = ("/var/lib/queuectl" if os.geteuid() == 0
                  else os.path.join("/", os.path.expanduser("~/.local/state/queuectl")))
    return os.path.join(folder, "queuectl.db")

def locate(db, sock):
    """The Place that flags or environment name. An empty variable counts as unset."""
    db = db or os.environ.get("DB_PATH")
    sock = sock or os.environ.get("SOCKET_PATH")
    folder, name = os.path.split(os.path.abspath(os_path(db or default_db())))
    place = Place(os.path.join(os.path.realpath(folder), name), bool(db),
                  os.path.abspath(os_path(sock or DEFAULT_SOCKET)), bool(sock))
    check_socket_path(place.socket)
    with suppress(FileNotFoundError):
        check_ours(place.file(""), os.lstat(place.file("")), stat.S_ISDIR)
    return place

def shell_quote(text):
    import shlex
    return shlex.quote(text)

def ask(path, request, patience_s=PATIENCE_S):
    """The answer of the daemon at socket `path`; {} when none gives one."""
    with suppress(OSError, ValueError, TypeError), \
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience_s)
        sock.connect(path)
        if peer_uid(sock) in (os.geteuid(), None):  # else it is another user's
            sock.sendall(compact(request).encode() + b"\n")
            return dict(json.loads(receive(sock, bytearray()) or b""))
    return {}

def daemon_at(path, patience_s=PATIENCE_S):
    """What the daemon at a socket tells of itself, see `about_daemon`; {} without one."""
    about = ask(path, {"command": "daemon", "option": "status"}, patience_s).get("message")
    return about if isinstance(about, dict) else {}

class Queue:
    """The queue at `place`, as a command uses it. `note(line)` tells the user what is special."""

    def __init__(self, place, note):
        self.given = place
        self.note = note
        self.opened = None      # the Store

    @property
    def place(self):
        """Where only a socket was given, the daemon there names the database."""
        if self.given.socket_given and not self.given.db_given:
            db = daemon_at(self.given.socket).get("db")
            if db is None:
                raise Failure("no daemon at %s; name the queue with --db" % self.given.socket)
            self.given = self.given._replace(db=os_path(db), db_given=True)
        return self.given

    def other_queue(self):
        """A line for a user who gave nothing, if a daemon of theirs at the default socket serves
        another queue, while none serves this one; else None."""
        place = self.given
        if not (place.db_given or place.socket_given or place.daemon()) and is_served(DEFAULT_SOCKET):
            db = daemon_at(DEFAULT_SOCKET, 2).get("db")
            if db not in (None, utf8(place.db)):
                return "a daemon at %s serves %s; to use that queue: export DB_PATH=%s" % (
                    DEFAULT_SOCKET, db, shell_quote(db))
        return None

    def change(self, name, **value):
        """The answer to a request that changes the queue: of the daemon, or, if nobody answers, made
        here; Failure when it was refused."""
        command, _, option = name.partition(" ")
        request = {"command": command, "option": option or None, "flag": None, "value": value,
                   "version": VERSION, "once": os.urandom(12).hex(), "db": utf8(self.place.db)}
        answer = self.ask_daemon(request)
        if not answer:
            other = command == "enqueue" and not self.place.exists() and self.other_queue()
            if other:
                raise Failure("%s does not exist; %s; or name the new queue with --db"
                              % (self.place.db, other))
            answer = dict(perform(self.store(), request), workers=None)  # the note says enough
            self.note("daemon not running; stored in %s" % self.place.db)
        if answer.get("success") is True:
            return answer
        raise Failure(re.sub("^Error: ", "", str(answer.get("message"))), index=answer.get("index", 0))

    def ask_daemon(self, request):
        """The answer of the daemon at the socket given, else where it says that it listens; {} if
        nobody answers."""
        place = self.place
        paths = [place.socket] * place.socket_given + [place.daemon().get("socket")]
        answers = (ask(os_path(path), request) for path in paths if path)
        return next(filter(None, answers), {})

    def store(self, make=True):
        """The Store of the queue; one that isn't there is not made for a look."""
        if self.opened is None or self.opened.memory and make:
            other = self.other_queue()
            if other:
                self.note(other)
            self.opened = Store(self.place, patience_s=PATIENCE_S,
                                memory=not make and not self.place.exists())
        return self.opened

    def look(self):
        """The Store, for who only reads, with the settings of now."""
        store = self.store(make=False)
        store.refresh()
        return store

    def existing(self):
        """The same; a Failure without a queue."""
        if not self.place.exists():
            raise Failure("no queue at %s; name it with --db" % self.place.db)
        return self.look()

    def close(self):
        if self.opened:
            self.opened.close()

def call_words(place, program):
    """The words that call a program file of ours for the queue at `place`."""
    return ([sys.executable or "python3", program, "--db", place.db]
            + ["--socket", place.socket] * place.socket_given)

def compiled(place):
    """The path of this program, compiled, in DB-run: a daemon is there sooner and needs less memory."""
    import importlib.util
    import marshal
    path, size = place.file("queuectl.pyc"), 12 if sys.version_info >= (3, 7) else 8
    new = "%s.%d" % (path, os.getpid())
    Store(place, patience_s=PATIENCE_S).close()  # refuses a place, or a DB-run, that is not ours
    with open(new, "wb", opener=open_private) as file:
        file.write(importlib.util.MAGIC_NUMBER + bytes(size) + marshal.dumps(CODE))
    os.rename(new, path)
    return path

def start_in_background(place, *options):
    """Start a daemon in a session of its own; its ready line, once it is."""
    from subprocess import DEVNULL, PIPE, Popen
    os.environ.pop("QUEUECTL_RUN", None)  # a job may start it, but it is no part of that
    daemon = Popen([*call_words(place, compiled(place)), "daemon", *options], cwd="/",
                   stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True,
                   encoding="utf-8", errors="replace")
    ready = daemon.stdout.readline()
    if ready:
        return ready.strip()
    error = daemon.communicate()[1].strip().rpartition("\n")[2]
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(error)["message"][7:]
    raise Failure("the daemon did not start: %s" % error)

# ---- Looking ------------------------------------------------------------------------------------
# What commands find by reading alone: what a job waits for, what `check` judges, what `doctor` finds,
# and a copy of it all.

def is_worked(store, job_id):
    """Whether somebody works the job, or will: a daemon with workers, a `drain`, its `run`."""
    notes = [store.place.note_of(slot) for slot in store.place.slots() if slot > MAX_WORKERS]
    return (store.settings["workers"] and store.place.daemon()
            or any(note.get("only") is None or job_id in note["only"] for note in notes))

def hindrance(store, job_id=None):
    """What keeps that job from running, or, with none given, all of them; None if nothing does."""
    if store.paused:
        return "the end of the pause (%s); go on with: queuectl resume" % store.paused
    if not is_worked(store, job_id):
        return "a worker; start one with: queuectl worker start"
    return None

def waiting_for(store, job, now):
    """What keeps a job from running; "" once it runs or has ended."""
    if job.state not in ("pending", "failed"):
        return ""
    if job.due and job.due > now:
        return "its time, %s" % iso(job.due)
    return hindrance(store, job.id) or "a free worker"

def output_of(store, attempt, offset):
    """(bytes of what an attempt wrote, where they start), from byte `offset` of it on, or from what is
    left of it on; of an open one as much as there is now, up to a large piece."""
    if attempt["finished_at"]:
        start = max(offset, attempt["output_cut"])
        return store.output(attempt["serial"], start - attempt["output_cut"]), start
    return (read_running(store.place.file(attempt["serial"]), offset, 16 << 20) or (b"", offset))[:2]

def full_id(store, given):
    """The id that a user means: it, or the one that begins so."""
    found = store.ids_like(given) if is_text(given) else []
    if len(found) != 1:
        raise Failure("no job %s; see: queuectl list" % given[:128] if not found else
                      "more than one job begins with %s; give more of the id" % given)
    return found[0]

def judge(store, limits, name, within, now):
    """(exit status, line) as monitoring plugins have them. limits: {"pending", "dead", "age" in s: the
    highest value allowed, None: any}; a job called `name` must have completed within so many ms."""
    counts, problems, figures = store.counts(), [], []
    values = dict(counts, age=(now - (store.ready_since(now) or now)) // 1000)
    for label, limit in limits.items():
        if limit is not None and values[label] > limit:
            problems.append("%s is %d, over %d" % (label, values[label], limit))
        figures.append("%s=%d;;%s" % (label, values[label], "" if limit is None else limit))
    if name is not None and not store.completed_at(name, max(now - within, 0)):
        problems.append("%s has not completed within %s" % (name, lapse(within)))
    waiting = counts["pending"] + counts["failed"] + len(  # and those whose worker is gone
        set(store.open_slots()).difference(store.place.slots()))
    lacks = (waiting or store.paused) and hindrance(store)
    status = 2 if problems else int(bool(lacks))
    problems += ["%s waiting, %d dead" % (plural(waiting, "job"), counts["dead"])] + [
        "waiting for %s" % lacks] * bool(lacks)
    line = "%s - %s" % (("OK", "WARNING", "CRITICAL")[status], ", ".join(problems))
    return status, "%s | %s" % (safe(line.replace("|", "/")), " ".join(figures))

def back_up(store, target):
    """Copy the queue into the new file `target`, 0600 from its first instant and on the disk in the
    end; if anything fails it is removed again. The number of jobs."""
    with open(target, "xb", opener=open_private) as file:
        try:
            count = store.copy(target)
            os.fsync(file)
            with suppress(OSError):  # a folder may be one that we can't read
                os.fsync(os.open(os.path.dirname(target), os.O_RDONLY))
            return count
        except BaseException:
            os.unlink(target)
            raise

# What `doctor` looks at, a function each: what is well, or a Failure: what is wrong; what to do.

def look_at_versions(queue):
    return "queuectl %s, %s, Python %s, %s" % (VERSION, os.path.abspath(__file__),
                                               sys.version.split()[0], sys.executable)

def look_at_folder(queue):
    place, other = queue.place, queue.other_queue()
    if other:
        raise Failure(other)
    place.check()
    folder = os.path.dirname(place.db)
    if not os.path.isdir(folder):
        return "%s is not there yet" % folder
    status, room = os.stat(folder), os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Failure("%s can't be written; mount it for writing, or run: chmod u+rwx %s"
                      % (folder, folder))
    if others_can_write(status) and not status.st_mode & stat.S_ISVTX:
        raise Failure("%s can be written by others; run: chmod go-w %s" % (folder, folder))
    if free < LOW_DISK or room.f_favail == 0 < room.f_files:
        raise Failure("only %d MiB, or no inodes, are free for %s; free some, or use another --db"
                      % (free >> 20, place.db))
    return "%s, on %s, %d MiB free" % (place.db, file_system(folder) or "an unknown disk", free >> 20)

def look_at_files(queue):
    place = queue.place
    for path in (place.db, place.db + "-wal", place.db + "-shm", place.daemon().get("socket", ""),
                 *map(place.file, ("", "lock", "door", "daemon", "log"))):
        with suppress(FileNotFoundError):
            mode = os.lstat(path).st_mode
            if mode & 0o077:
                raise Failure("%s has mode %03o; run: chmod go= %s" % (path, mode & 0o777, path))
    return "private"

def look_at_lock(queue):
    path, pids = queue.place.file("lock"), []
    for _ in range(60):
        if not is_locked(path):
            return "free"
        sleep(0.05)
    with suppress(OSError), open("/proc/locks") as locks:
        pids = re.findall(r": FLOCK .* (\d+) \S+:%d " % os.stat(path).st_ino, locks.read())
    pids = " ".join(pids) or "unknown"
    raise Failure("%s is held too long, by pid %s; it is stopped or stuck: kill -CONT %s, or end it"
                  % (path, pids, pids))

def look_at_daemon(queue):
    """Its socket answers, it is of this version, and no other program has the database open."""
    place, daemon = queue.place, queue.place.daemon()
    strangers = set(processes(place.db)).difference(processes(place.file("lock")))
    if strangers:
        raise Failure("another program has %s open: pid %s; end it, or it may run jobs twice"
                      % (place.db, " ".join(map(str, strangers))))
    if not daemon:
        return "none runs"
    about = daemon_at(os_path(daemon["socket"]), 5)
    if about.get("version") != VERSION:
        raise Failure("the daemon, pid %(pid)s, queuectl %(version)s, does not answer at %(socket)s as"
                      " queuectl %(ours)s does; restart it as it was started"
                      % dict(daemon, ours=VERSION))
    return "pid %(pid)d, up %(uptime_s)d s, %(workers)d of %(wanted)d workers" % about

def look_at_database(queue):
    if not os.path.isdir(queue.place.file("")):
        return "not there yet"
    look_at_lock(queue)
    store = queue.look()
    damage = store.integrity()
    if damage:
        raise Failure("%s is damaged: %s; stop the daemon and restore a backup, or save what is left"
                      " with: sqlite3 %s .recover" % (store.path, ", ".join(damage), store.path))
    return "sound, SQLite " + store.value("SELECT sqlite_version()")

def diagnose(queue):
    """What `doctor` finds: [{"check", "ok", "detail", "advice"}]. Nothing is made."""
    findings = []
    for look in (look_at_versions, look_at_folder, look_at_files, look_at_lock, look_at_daemon,
                 look_at_database):
        try:
            ok, text = True, look(queue)
        except (Failure, OSError) as error:
            ok, text = False, str(error)
        detail, _, advice = text.partition("; ")
        findings.append({"check": look.__name__[8:], "ok": ok, "detail": detail, "advice": advice})
    return findings

# ---- Output -------------------------------------------------------------------------------------
# What users see: results on stdout, as JSON, or as tables where that is a terminal; the rest is for
# people, on stderr.

CALL = ["queuectl"]  # the words that call this program for this queue, see `call_as`

def call_as(script, db):
    """Have commands named as this one was called, for the queue `db` if that was given."""
    CALL[:] = ["python3"] * script.endswith(".py") + [script] + ["--db", db] * bool(db)

def called():
    """How this program is called, as it can be pasted."""
    return " ".join(map(shell_quote, CALL))

def pasted(line):
    """`line` with the commands that it names after a colon as they can be pasted."""
    return re.sub(r"(?<=: )queuectl(?= [a-z-])", lambda _: called(), line)

def write_out(stream, text):
    """Write for whoever still listens: a dead end is led to /dev/null."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

def tell(line, stream=None):
    """For people: a full disk or a closed pipe there is no reason to fail."""
    write_out(stream or sys.stderr, safe(pasted(line)) + "\n")

def print_text(text):
    """Write a line and flush, so that a full disk or a closed pipe shows here."""
    print(text, flush=True)

def print_compact(value):
    print_text(compact(value))

def indented(value):
    return json.dumps(value, indent=2, default=repr)

def json_list(rows):
    """A list as indented JSON, piece by piece: it may be a long one."""
    start = "[\n  "
    for row in rows:
        yield start + indented(row).replace("\n", "\n  ")
        start = ",\n  "
    yield "[]\n" if start[0] == "[" else "\n]\n"

def screen():
    """(columns, lines) of the terminal."""
    import shutil
    return shutil.get_terminal_size()

def table(rows, columns):
    """Lines of a table of dicts: the widest columns give way until it fits the terminal."""
    cells = [[column.upper() for column in columns]] + [
        ["-" if row[column] is None else safe(str(row[column])) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    while sum(widths) + 2 * len(widths) - 2 > screen()[0] and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    for row in cells:
        yield "  ".join((cell if len(cell) <= width else cell[:width - 1] + "…").ljust(width)
                        for cell, width in zip(row, widths)).rstrip()

def pairs(value):
    """Lines of `name  value` for an object, without what is empty."""
    width = max(map(len, value))
    return ["%-*s  %s" % (width, name, safe(one if isinstance(one, str) else compact(one)))
            for name, one in value.items() if one not in (None, {}, [])]

def age(stamp, now):
    """How long ago an ISO time was."""
    return stamp and lapse(max(now - parse_date(stamp), 0) // 1000 * 1000)

def job_rows(jobs, now):
    """Jobs, as `public` has them, with what a table of them shows besides."""
    return [dict(job, age=age(job["updated_at"], now), tries="%(attempts)s/%(max_retries)s" % job)
            for job in jobs]

def bar(done, total, failed, seconds):
    """How far it is: done of total, failures so far, time left."""
    return "[%-20s] %d of %d, %d failed%s" % (
        "#" * (20 * done // (total or 1)), done, total, failed,
        ", %s left" % lapse(int(seconds * (total - done) / done) * 1000) if done else "")

def frame(store, now):
    """Lines of what `status --watch` shows: states, workers, running jobs, retries, deaths."""
    workers = workers_of(store, now)
    yield "  ".join("%s %d" % item for item in store.counts().items())
    yield "%s, %.1f jobs/s" % (plural(len(workers), "worker"), store.rate(now))
    lacks = hindrance(store)
    if lacks:
        yield safe(pasted("waiting for " + lacks))
    lines = [("runs %6s" % age(worker["since"], now), store.job(worker["job"]), "command")
             for worker in workers]
    lines += [("next in " + lapse(max(job.due - now, 1000) // 1000 * 1000), job, "error")
              for job in store.next_retries(5)]
    lines += [("died %s ago" % age(job.finished_at, now), job, "error") for job in store.last_deaths(5)]
    for what, job, field in lines:
        if job:
            yield safe("  %s  %s  %s" % (what, job.id, getattr(job, field) or ""))

EXPOSITION = """\
jobs gauge Jobs in the queue, by state.
queuectl_jobs{state="pending"} %(pending)d
queuectl_jobs{state="processing"} %(processing)d
queuectl_jobs{state="completed"} %(completed)d
queuectl_jobs{state="failed"} %(failed)d
queuectl_jobs{state="dead"} %(dead)d
queuectl_jobs{state="cancelled"} %(cancelled)d
jobs_enqueued_total counter Jobs stored so far.
queuectl_jobs_enqueued_total %(jobs_enqueued)d
jobs_completed_total counter Jobs that completed so far.
queuectl_jobs_completed_total %(jobs_completed)d
jobs_dead_total counter Jobs that became dead so far.
queuectl_jobs_dead_total %(jobs_died)d
attempts_failed_total counter Attempts that failed so far.
queuectl_attempts_failed_total %(failed_attempts)d
commands_total counter Changes made since a daemon first started.
queuectl_commands_total %(total_commands)d
job_duration_seconds summary Run time of completed jobs.
queuectl_job_duration_seconds_sum %(total_runtime)s
queuectl_job_duration_seconds_count %(jobs_completed)d
workers gauge Workers that run.
queuectl_workers %(workers_running)d
daemon_uptime_seconds gauge Seconds since the daemon started, 0 without one.
queuectl_daemon_uptime_seconds %(uptime_s)d
database_bytes gauge Size of the database.
queuectl_database_bytes %(database_bytes)d"""

def exposition(metrics):
    """Prometheus's text format of what `metrics_of` tells; in EXPOSITION each metric begins with its
    name, type and help."""
    text = re.sub(r"(?m)^(\w+) (\w+) (.*)", r"# HELP queuectl_\1 \3\n# TYPE queuectl_\1 \2", EXPOSITION)
    return text % dict(dict.fromkeys(STATES, 0), **metrics["jobs"], **metrics)

# grace is shorter than TimeoutStopSec, so that no job is left behind. OOMPolicy: a job that takes
# all the memory must not end the others.
UNIT = """\
[Unit]
Description=queuectl job queue
RequiresMountsFor=%(folder)s

[Service]
Type=notify
NotifyAccess=main
ExecStart=%(command)s daemon --grace 80s
%(user)sKillMode=process
TimeoutStopSec=90s
Restart=on-failure
RestartSec=5s
OOMPolicy=continue

[Install]
WantedBy=%(target)s"""

def unit_word(text):
    """`text` as one word of a unit, where systemd replaces %x and $NAME."""
    text = text.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\")
    return shell_quote(safe(text))

def systemd_unit(place, user):
    """A unit for this very file, interpreter and queue; `user`: for a user's own systemd."""
    import pwd
    return UNIT % {
        "folder": unit_word(os.path.dirname(place.db)),
        "command": " ".join(map(unit_word, call_words(place, os.path.abspath(sys.argv[0])))),
        "user": "" if user else "User=%s\n" % pwd.getpwuid(os.geteuid()).pw_name,
        "target": "default.target" if user else "multi-user.target"}

# What makes each shell ask the program at every Tab; %s is how it is called.
SHELLS = {
    "bash": """\
_queuectl() {
    local IFS=$'\\n'
    COMPREPLY=($(%s completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _queuectl queuectl queuectl.py""",
    "zsh": """\
#compdef queuectl queuectl.py
_queuectl() {
    local -a words_; words_=(${(f)"$(%s completion zsh -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    (( $#words_ )) && compadd -- $words_ || _files
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _queuectl "$@"
else compdef _queuectl queuectl queuectl.py; fi""",
    "fish": """\
function __queuectl
    set -l words (commandline -opc) (commandline -ct)
    %s completion fish -- $words[2..-1] 2>/dev/null
    or __fish_complete_path (commandline -ct)
end
complete -c queuectl -f -a '(__queuectl)'
complete -c queuectl.py -f -a '(__queuectl)'"""}

class Drawing:
    """Lines on a terminal that are drawn anew in place; nothing where it can't be."""

    def __init__(self, stream):
        self.stream = stream
        self.able = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.height = 0

    def show(self, lines):
        if self.able:
            width, most = screen()
            lines = [line[:width - 1] for line in list(lines)[:most - 1]]
            up = "\r" + "\x1b[A" * (self.height - 1)
            write_out(self.stream, up + "\x1b[J" + "\n".join(lines))
            self.height = len(lines)

    def close(self):
        """Leave what stands there, and go on below."""
        if self.height:
            write_out(self.stream, "\n")

# ---- Commands -----------------------------------------------------------------------------------
# One function a command, its arguments above it, its help and then its examples in its docstring.
# Glue only.

COMMANDS = {}  # "dlq retry" -> (function, the text of its arguments)

def subcommand(arguments=""):
    """Register a command, cmd_dlq_retry as `dlq retry`; `arguments`: a line each, FLAGS METAVAR about,
    with METAVAR - for a flag without a value (see CHECKS and OPTIONS); a positional one has its name in
    place of flags."""
    def register(function):
        COMMANDS[function.__name__[4:].replace("_", " ")] = function, arguments
        return function
    return register

def pair(text):
    """[name, value] of NAME=VALUE."""
    if "=" not in text:
        raise ValueError("must be NAME=VALUE")
    return text.split("=", 1)

CHECKS = {  # metavar -> what reads its text
    "N": number_from(0, 10 ** 9),
    "COUNT": as_count,
    "PRIORITY": number_from(-1000, 1000),
    "DUR": as_ms,
    "AGE": lambda text: iso(now_ms() - as_ms(text)),
    "DELAY": lambda text: iso(now_ms() + as_ms(text)),
    "TIME": lambda text: iso(next_time(text, now_ms())),
    "DIR": lambda text: utf8(os.path.abspath(os_path(text))),
    "K=V": pair,
}
OPTIONS = {  # metavar -> what else argparse is told
    "-": {"action": "store_true"},
    "[JOB]": {"nargs": "?"},
    "[ID...]": {"nargs": "*"},
    "DELAY": {"dest": "run_after"},
    "TIME": {"dest": "run_after"},
    "K=V": {"action": "append"},
    "STATE": {"action": "append", "choices": STATES},
    "SHELL": {"choices": SHELLS},
    "FORMAT": {"choices": ["prometheus"]},
}
GLOBAL = """
    --db PATH      the queue's database (else DB_PATH)
    --socket PATH  the daemon's socket (else SOCKET_PATH)
    --json -       JSON on a terminal too
    --table -      a table in a pipe too"""
QUIET = """
    -q --quiet -   print ids only"""
JOB = """
    --id ID              default: made of the time
    --priority PRIORITY  -1000 to 1000, higher first
    --delay DELAY        not before so long from now: 90s, 5m
    --at TIME            not before, local time: 03:00, '2026-12-01 10:00'
    --timeout DUR        longest run of an attempt; a command has none unless given
    --max-retries N      attempts in all
    --cwd DIR            where it runs (default: here)
    --env K=V            added to its environment; may be repeated
    --clean-env -        without the environment of its caller
    --unique KEY         store nothing while an unfinished job has this key"""
LISTED = """
    --state STATE  only those; may be repeated"""
CHOSEN = """
    ids [ID...]""" + LISTED + """
    --all -        all that can be"""

def read_argument(metavar, text):
    """The value that an argument's text stands for."""
    try:
        return CHECKS.get(metavar, str)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("%s %s" % (text, error))

def print_reply(message, **more):
    print_compact(reply(message, **more))

def act_on(queue, args, states, done, name):
    """Have the change `name` made to the jobs that are meant, all at once those that were named, others
    some at a time; their ids."""
    if bool(args.ids) + bool(args.state) + args.all != 1:
        raise Usage("name the jobs, or select them by --all or another flag; see: queuectl %s --help"
                    % name)
    store, refused = queue.look(), []
    ids = [full_id(store, given) for given in args.ids] or [
        job.id for job in store.jobs(store.select(args.state or states, before=args.older_than))]
    step = len(args.ids) or STEP
    for at in range(0, len(ids), step):
        answer = queue.change(name, ids=ids[at:at + step], skip=not args.ids)
        refused += answer["refused"]
    done = (answer["message"] if args.ids else "%s %s" % (plural(len(ids) - len(refused), "job"), done))
    if refused:
        raise Failure("%s, %d refused; the first: %s" % (done, len(refused), refused[0]))
    print_reply(done)
    return ids

def print_value(args, value, lines=()):
    """An object as JSON, or `lines`, else its pairs, for people."""
    print_text("\n".join(lines or pairs(value)) if args.table else indented(value))

def print_rows(args, rows, columns):
    """A list of dicts as JSON, the first column alone with -q, or a table for people."""
    sys.stdout.writelines(("%s\n" % row[columns[0]] for row in rows) if args.quiet else
        (line + "\n" for line in table(rows, columns)) if args.table else json_list(rows))
    sys.stdout.flush()

def caller_environment():
    """The environment that a command line's job runs in: all but what belongs to the terminal, the
    session, a service, or a job that we run in."""
    return {utf8(name): utf8(text) for name, text in os.environ.items() if not re.fullmatch(
        "TERM|DISPLAY|SSH_.*|XDG_SESSION_.*|_|SHLVL|PWD|OLDPWD|LISTEN_.*|WATCHDOG_.*|NOTIFY_SOCKET"
        "|INVOCATION_ID|JOURNAL_STREAM|QUEUECTL_RUN", name)}

def working_directory():
    """The directory a job runs in unless it says so itself."""
    with suppress(OSError):
        path = utf8(os.getcwd())
        return path if is_text(path) else None

def job_fields(args):
    """What the command line says of a job."""
    if bool(args.job) == bool(args.argv):
        raise Usage("one job is needed: a command after --, like: -- make -j4 (or JSON: enqueue)")
    fields = {name: value for name, value in vars(args).items() if name in FIELDS and value is not None}
    if args.argv:
        fields["command"] = (args.argv[0] if len(args.argv) == 1
                             else " ".join(map(shell_quote, args.argv)))
        fields.setdefault("timeout", 0)
    if args.env:
        fields["env"] = dict(args.env)
    return fields

def read_job(text, fields):
    """The job that a JSON text is; `fields`, what the flags say, win."""
    job = decode_json(text, "the job")
    return dict(job, **fields) if isinstance(job, dict) else job

def warn(answer):
    """Say what keeps a new job from running."""
    if answer.get("paused"):
        tell("the queue is paused (%s); nothing starts until: queuectl resume" % answer["paused"])
    elif answer.get("workers") == 0:
        tell("no worker runs; start one with: queuectl worker start")

def store_one(queue, args, job):
    """The answer to the job that a command line makes."""
    environ = caller_environment() if args.argv and not args.clean_env else None
    return queue.change("enqueue", job=job, cwd=working_directory(), environ=environ)

def jobs_from(lines):
    """(which batch, which line, JSON bytes) of each job of a binary stream of JSON Lines, or of one
    array. A batch is as large as one request may be."""
    count = size = 0
    if lines.peek(1)[:1] == b"[":
        jobs = decode_json(lines.read(), "the array")
        lines = (compact(job).encode() for job in jobs)
    for number, text in enumerate(lines, 1):
        if text.strip():
            yield (count // BATCH_JOBS, size // BATCH_BYTES), number, text
            count += 1
            size += len(text)

def enqueue_all(queue, args, fields):
    """Store the jobs from stdin, in batches that are each stored whole or not at all."""
    stored = held = last = 0
    numbers, answer, progress = [1], {}, Drawing(sys.stderr)
    try:
        for _, batch in itertools.groupby(jobs_from(open(0, "rb")), lambda row: row[0]):
            numbers, jobs = [], []
            for _, number, text in batch:
                numbers.append(number)
                jobs.append(read_job(text, fields))
            answer = queue.change("enqueue batch", jobs=jobs, cwd=working_directory())
            last = number
            stored += answer["count"]
            held += len(jobs) - answer["count"]
            if args.quiet:
                print_text("\n".join(answer["ids"]))
            progress.show(["%d stored" % stored])
    except Failure as error:
        raise Failure("line %d: %s; %s" % (numbers[error.details.get("index", -1)], error,
            "lines 1 to %d are stored" % last if last else "nothing is stored"))
    progress.close()
    warn(answer)
    if not args.quiet:
        print_reply("Enqueued %s" % plural(stored, "job"), already_queued=held)

@subcommand("""
    job [JOB]            JSON, - for JSON Lines or an array from stdin, or a command after --"""
            + JOB + QUIET)
def cmd_enqueue(queue, args):
    """Store a job. It is on disk when this returns. As JSON its fields are: command (required), id,
    priority, run_after, timeout, max_retries, cwd, env, unique; a flag wins over a field.

    enqueue '{"id":"hello","command":"echo Hello World"}'
    enqueue --unique backup --timeout 2h -- tar -czf /srv/a.tgz /etc
    enqueue - <jobs.jsonl"""
    job = job_fields(args)
    if args.job == "-":
        return enqueue_all(queue, args, job)
    if args.job:
        job = read_job(args.job if "{" in args.job else "0", job)  # 0: it is told what a job is
    answer = store_one(queue, args, job)
    warn(answer)
    if args.quiet:
        print_text(answer["id"])
        return
    print_reply(answer["message"], id=answer["id"])
    tell("id: %s" % answer["id"])
    if answer["message"] == "Job enqueued":
        tell("command: %s" % job["command"])

@subcommand("""
    --workers N  workers wanted from now on (default: as many as before)
    --grace DUR  how long a stop waits for running jobs, like 30s (default: as long as it takes)""")
def cmd_daemon(queue, args):
    """Serve the queue in the foreground. SIGTERM or Ctrl-C: start nothing more, wait for running jobs,
    exit; a second one stops them and gives their attempts back.

    daemon --workers 2
    daemon --workers 4 --grace 60s"""
    Daemon(queue.given, args.workers, args.grace).run(
        lambda line: tell(line, sys.stdout))

def watch(look, step=sleep):
    """Call `look` until it returns True. Else it returns what is waited for, which is told after a
    second, or nothing."""
    start, told = monotonic(), None
    for what in iter(look, True):
        seconds = monotonic() - start
        if what and what != told and seconds > 1:
            tell("waiting for %s" % what)
            told = what
        step(min(max(seconds / 5, 0.01), POLL_S))

class Progress(Drawing):
    """How far the queue, or the jobs `ids` of it, came since now, as a bar on a terminal; `failed`: how
    many jobs did not complete."""

    def __init__(self, queue, ids=()):
        super().__init__(sys.stderr)
        self.queue = queue
        self.ids = ids
        self.start = monotonic()
        self.before = queue.look().totals()

    def look(self):
        """The number of jobs that have not ended."""
        store = self.queue.look()
        totals = store.totals()
        done, self.failed, self.cancelled = (
            totals[name] - self.before[name] for name in ("jobs_completed", "jobs_died", "cancelled"))
        if self.ids:
            totals = collections.Counter(job.state for job in store.jobs(self.ids, "id"))
            done, self.failed = totals["completed"], totals["dead"] + totals["cancelled"]
        left = sum(totals[state] for state in UNFINISHED)
        ended = done + self.failed
        self.show([bar(ended, ended + left, self.failed, monotonic() - self.start)])
        return left

@subcommand("""
    --grace DUR  stop jobs that still run after it""")
def cmd_daemon_stop(queue, args):
    """Stop the daemon as SIGTERM does, and wait until it is gone.

    daemon stop --grace 30s"""
    daemon = queue.place.daemon()
    if not daemon:
        raise NoDaemon(queue.place.db)
    if process_start(daemon["pid"]) != daemon["start"]:
        raise Failure("the daemon, pid %d, can't be seen from here; stop it in its own container"
                      % daemon["pid"])
    force_at = monotonic() + (MAX_MS if args.grace is None else args.grace) / 1000.0
    os.kill(daemon["pid"], signal.SIGTERM)

    def look():
        if queue.place.daemon().get("pid") != daemon["pid"]:
            return True
        if monotonic() >= force_at:
            os.kill(daemon["pid"], signal.SIGTERM)
        return "running jobs; Ctrl-C ends only the waiting"
    watch(look)
    print_reply("Stopped daemon")

@subcommand()
def cmd_daemon_status(queue, args):
    """Show the daemon's pid, version, paths and workers.

    daemon status"""
    print_value(args, about_daemon(queue.look(), now_ms()))

@subcommand("""
    -c --count COUNT  how many (default 1)""")
def cmd_worker_start(queue, args):
    """Add workers. Without a daemon, start one in the background with so many.

    worker start --count 3"""
    count, place = args.count or 1, queue.given
    try:
        unserved = place.socket_given and not (place.db_given or is_served(place.socket))
        if unserved or not queue.place.daemon():
            raise NoDaemon(place.db)
        queue.change("worker start", count=count)
    except NoDaemon:
        tell(start_in_background(place, "--workers", str(count)))
    print_reply("Started %s" % plural(count, "worker"))

@subcommand("""
    -c --count COUNT  so many (default: all)
    --now -           stop their jobs, which are then run again""")
def cmd_worker_stop(queue, args):
    """End workers, each after its current job; they are no longer wanted.

    worker stop --count 1 --now"""
    answer = queue.change("worker stop", count=args.count, at_once=args.now)
    if answer["jobs"] and not args.now:
        tell("%s to finish first: %s; to stop them: queuectl worker stop --now"
             % (plural(len(answer["jobs"]), "job"), " ".join(answer["jobs"])))
    print_reply(answer["message"])

@subcommand(QUIET)
def cmd_worker_list(queue, args):
    """Show the workers: pid, state, job, and since when.

    worker list"""
    now = now_ms()
    workers = workers_of(queue.look(), now)
    if args.table:
        workers = [dict(worker, since=age(worker["since"], now)) for worker in workers]
    print_rows(args, workers, ("pid", "state", "since", "attempt", "job"))

@subcommand("""
    --watch -  show it live until Ctrl-C, where that is a terminal""")
def cmd_status(queue, args):
    """Show the number of jobs in each state, and of workers.

    status --watch"""
    store, drawing = queue.look(), Drawing(sys.stdout)
    if args.watch and drawing.able:
        watch(lambda: drawing.show(frame(queue.look(), now_ms())))
    print_value(args, status_of(store, now_ms()), frame(store, now_ms()))

@subcommand(LISTED + """
    --match TEXT   in id or command
    --limit N      the newest so many""" + QUIET)
def cmd_list(queue, args):
    """Show jobs, oldest first.

    list --state dead --state failed
    list --match backup --limit 5"""
    store = queue.look()
    rowids = store.select(args.state or (), args.match, limit=args.limit)
    newest = rowids[-20:] if args.table and args.limit < 0 else rowids
    jobs = (job.public() for job in store.jobs(newest))
    print_rows(args, job_rows(jobs, now_ms()) if args.table else jobs,
               ("id", "state", "age", "tries", "error", "command"))
    if len(newest) < len(rowids):
        print_text("… and %d more; add --json to see all" % (len(rowids) - len(newest)))

@subcommand(QUIET)
def cmd_dlq_list(queue, args):
    """Show the dead jobs.

    dlq list -q"""
    args.state = ["dead"]
    cmd_list(queue, args)

def with_ages(row):
    """A row of dates with their ages in place of them."""
    return {name: age(one, now_ms()) + " ago" if one and name.endswith("_at") else one
            for name, one in row.items()}

@subcommand("\nid ID")
def cmd_show(queue, args):
    """Show a job with its attempts and what it waits for.

    show hello
    show hello --json | grep error"""
    store = queue.look()
    job = known_job(store, full_id(store, args.id))
    told = dict(job.public(), waiting_for=pasted(waiting_for(store, job, now_ms())) or None)
    history = store.attempts(job.id)
    lines = list(pairs(with_ages(told)))
    if history:
        lines += ["attempts:", *table(map(with_ages, history),
                                      ("number", "started_at", "finished_at", "error"))]
    print_value(args, dict(told, history=history), lines)

SILENT = float("inf")  # a serial that no attempt reaches

class Tail:
    """Hands on what a job writes, attempt by attempt, from the one with that `serial` on."""

    def __init__(self, queue, job_id, serial=0):
        self.queue = queue
        self.job_id = job_id
        self.serial = serial
        self.offset = 0  # what is next of that attempt

    def hand_on(self, data, start):
        """Write a piece, bytes as they are."""
        if start > self.offset:
            tell("%d bytes were cut here" % (start - self.offset))
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        self.offset = start + len(data)

    def look(self):
        """Hand on all that was written until now; True at the job's end, else what it waits for."""
        store = self.queue.look()
        job = known_job(store, self.job_id)
        for attempt in store.attempts(self.job_id):
            if attempt["serial"] > self.serial:
                self.serial = attempt["serial"]
                self.offset = 0
            if attempt["serial"] == self.serial:
                self.hand_on(*output_of(store, attempt, self.offset))
                if attempt["finished_at"]:
                    self.serial += 1
                    self.offset = 0
                    failed = known_job(store, self.job_id)  # `job` may be older than the attempts
                    if failed.state not in FINISHED:
                        tell("attempt %d of %d failed: %s; next in %s" % (
                            failed.attempts, failed.max_retries, attempt["error"],
                            lapse(max((failed.due or 0) - now_ms(), 0) // 1000 * 1000 + 1000)))
        return job.state in FINISHED or self.serial < SILENT and waiting_for(store, job, now_ms())

def failure_of(job):
    """The Failure for a job that did not complete, with its exit code, 125 if it has none."""
    failure = Failure("job %s %s; see: queuectl logs %s" % (
        job.id, "died: %s" % job.error if job.state == "dead" else "was " + job.state, job.id))
    failure.exit_code = job.exit_code or 125
    return failure

@subcommand("""
    id ID
    --attempt N    that attempt (default: the last)
    -n --lines N   only the last so many lines
    -f --follow -  to the end of the job""")
def cmd_logs(queue, args):
    """Print what a job wrote, bytes as they were. -f follows it, and waits for it to start.

    logs hello
    logs -f hello
    logs hello --attempt 1 -n 20"""
    store = queue.look()
    job_id = full_id(store, args.id)
    found = [attempt for attempt in store.attempts(job_id)
             if args.attempt in (None, attempt["number"])][-1:]
    if not (found or args.follow):
        raise Failure("job %s has no such attempt yet; to wait for it: queuectl logs -f %s"
                      % (job_id, job_id))
    tail = Tail(queue, job_id)
    for attempt in found:
        tail.serial = attempt["serial"]
        data, start = output_of(store, attempt, 0)
        if args.lines is not None:
            kept = b"".join(data.splitlines(True)[-args.lines or len(data):])
            tail.offset = start = start + len(data) - len(kept)
            data = kept
        tail.hand_on(data, start)
    if args.follow:
        watch(tail.look)
        job = known_job(store, job_id)
        if job.state != "completed":
            tell(str(failure_of(job)))

@subcommand("\nids [ID...]  default: until the queue is empty")
def cmd_wait(queue, args):
    """Wait until jobs have ended. One id: exits with the job's exit code (125 if it has none); several,
    or none given: 0 all completed, 1 not. For a limit there is timeout(1).

    wait hello
    wait job-1 job-2 && echo both"""
    store = queue.look()
    ids = list({full_id(store, given) for given in args.ids})
    progress = Progress(queue, ids)
    watch(lambda: progress.look() == 0 or hindrance(store))
    progress.close()
    if len(ids) == 1 == progress.failed:
        raise failure_of(known_job(store, ids[0]))
    if progress.failed or not ids and progress.cancelled > 0:
        raise Failure("not all completed; see: queuectl list --state dead --state cancelled")
    print_reply("%s completed" % plural(len(ids), "job") if ids else "Queue is empty")

def attend(queue, job_id, ending, tail):
    """See a job through, by a worker of our own while nobody else works it. A signal, or a reader that
    has gone, cancels it."""
    pool = Pool(queue.store(), only=[job_id])
    pool.on_readable(ending.fd, int)

    def look():
        waits = False
        try:
            waits = tail.look()
        except OSError:
            tail.serial = SILENT
            ending.numbers = [signal.SIGPIPE]
        if ending.take():
            queue.change("cancel", ids=[job_id], skip=True)
        if not (pool.own or is_worked(queue.look(), job_id)):
            pool.own = [MAX_WORKERS + 1]
        return waits
    watch(look, pool.step)
    pool.own = []
    while pool.workers:  # with the `on-dead` job
        pool.step()

@subcommand(JOB + """
    --quiet -            print nothing unless the job dies""")
def cmd_run(queue, args):
    """Enqueue a command, wait, hand on its output and exit code. For crontabs. Where nobody works it
    works its own job. Ctrl-C or SIGTERM cancels the job. With --unique and the key held it starts
    nothing: it exits 0 at once, or, if nobody works the job that holds it, sees that job through.

    run --quiet --unique backup --timeout 2h -- /usr/local/bin/backup
    run --max-retries 5 -- 'curl -fsS https://example.org/ >/srv/page'"""
    fields = job_fields(args)
    ending = Ending()
    queue.note = lambda line: None
    answer = store_one(queue, args, fields)
    job_id = answer["id"]
    if answer["message"] != "Job enqueued":
        if not args.quiet:
            tell("job %s has this key and is unfinished; no other is started" % job_id)
        if is_worked(queue.look(), job_id):  # else its `run`, or its daemon, is gone
            return 0
    tail = Tail(queue, job_id, SILENT if args.quiet else 0)
    attend(queue, job_id, ending, tail)
    store = queue.look()
    job = known_job(store, job_id)
    if job.state == "completed":
        return 0
    for attempt in store.attempts(job_id)[-1:] * args.quiet:
        tail.hand_on(*output_of(store, attempt, 0))
    failure = failure_of(job)
    tell(str(failure))
    return 130 if ending.first == signal.SIGINT else failure.exit_code

@subcommand("""
    -c --count COUNT  so many workers (default 1)""")
def cmd_drain(queue, args):
    """Run what is queued, in the foreground, without a daemon. Ends when nothing is ready, running or
    waiting for another try; exits 1 if a job died.

    drain --count 4"""
    ending, store = Ending(), queue.store()
    progress, pool = Progress(queue), Pool(store, args.count or 1)
    pool.on_readable(ending.fd, int)

    def look():
        progress.look()
        if ending.take():
            (pool.force if pool.stopping else pool.stop)()
        elif not store.unsettled(now_ms()):
            pool.stop()
        return pool.stopping and not pool.workers
    watch(look, pool.step)
    progress.close()
    if ending.first:
        tell("stopped before the queue was drained; the rest is kept")
        return 130 if ending.first == signal.SIGINT else 1
    if progress.failed:
        raise Failure("%s died; see: queuectl dlq list" % plural(progress.failed, "job"))
    print_reply("Queue drained")

@subcommand(CHOSEN)
def cmd_retry(queue, args):
    """Run jobs that have ended again; have failed ones tried now.

    retry hello
    retry --state cancelled"""
    act_on(queue, args, FINISHED + ("failed",), "added to queue", "retry")

@subcommand("""
    ids [ID...]
    --all -    all dead jobs""")
def cmd_dlq_retry(queue, args):
    """Queue dead jobs again, their attempts back at 0.

    dlq retry hello
    dlq retry --all"""
    act_on(queue, args, ("dead",), "added to queue", "dlq retry")

@subcommand(CHOSEN)
def cmd_cancel(queue, args):
    """Cancel jobs: waiting ones at once, running ones when all their processes are stopped.

    cancel hello
    cancel --state pending"""
    ids = act_on(queue, args, UNFINISHED, "cancelled", "cancel")

    def look():
        states = [job.state for job in queue.look().jobs(ids, "id")]
        return "processing" not in states or "running jobs to stop"
    if look() is not True:
        watch(look, Pool(queue.store()).step)  # it stops those whose worker is gone

@subcommand(CHOSEN + """
    --older-than AGE  only those that ended so long ago""")
def cmd_delete(queue, args):
    """Delete jobs that have ended, with their attempts and output.

    delete hello
    delete --state completed --older-than 7d"""
    act_on(queue, args, FINISHED, "deleted", "delete")

@subcommand("""
    --reason TEXT  shown by status""")
def cmd_pause(queue, args):
    """Start nothing new; running jobs go on. Kept over restarts.

    pause --reason 'disk swap, back at 9'"""
    print_compact(queue.change("pause", reason=args.reason))

@subcommand()
def cmd_resume(queue, args):
    """End the pause.

    resume"""
    print_compact(queue.change("resume"))

@subcommand("""
    key KEY      see: config list
    value VALUE""")
def cmd_config_set(queue, args):
    """Change a setting. Times are milliseconds, or like 90s, 5m, 1h30m; `default` puts it back.

    config set max-retries 5
    config set timeout 10m"""
    answer = queue.change("config set", key=args.key, value=args.value)
    if args.key in DURATIONS:
        tell("%s: %s" % (args.key, lapse(answer["value"])))
    print_reply(answer["message"])

@subcommand("\nkey KEY  see: config list")
def cmd_config_get(queue, args):
    """Show a setting.

    config get max-retries"""
    read_setting(args.key, "default")  # is there one?
    print_compact(queue.look().settings[args.key])

@subcommand()
def cmd_config_list(queue, args):
    """Show all settings.

    config list"""
    print_value(args, queue.look().settings)

@subcommand("""
    --format FORMAT  prometheus: for its collectors""")
def cmd_metrics(queue, args):
    """Show counters and run times.

    metrics --format prometheus >queuectl.prom"""
    metrics = metrics_of(queue.look(), now_ms())
    if args.format:
        print_text(exposition(metrics))
    else:
        print_value(args, metrics)

@subcommand("""
    --max-pending N   most pending jobs
    --max-dead N      most dead jobs
    --max-age DUR     longest that a ready job may have waited, like 10m
    --completed NAME  a job whose id begins so, or with this key, must have completed
    --within DUR      not longer ago than this""")
def cmd_check(queue, args):
    """Judge the queue as a monitoring plugin. It says one line and exits 0 OK, 1 WARNING (jobs wait and
    nobody works), 2 CRITICAL (a limit is exceeded), 3 UNKNOWN (any error).

    check --max-dead 0 --max-age 10m
    check --completed backup- --within 26h"""
    if bool(args.completed) != bool(args.within):
        raise Usage("--completed and --within go together")
    limits = {"pending": args.max_pending, "dead": args.max_dead,
              "age": args.max_age and args.max_age // 1000}
    status, line = judge(queue.existing(), limits, args.completed, args.within, now_ms())
    print_text(pasted(line))
    return status

@subcommand("\nfile FILE  one that does not exist yet")
def cmd_backup(queue, args):
    """Copy the database while jobs run. The copy holds all that was acknowledged before, is checked,
    0600, and a queue like any other: DB_PATH=FILE.

    backup /var/backups/queue-$(date +%F).db"""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no half of it is left
    count = back_up(queue.existing(), os.path.abspath(os_path(args.file)))
    print_reply("Backed up %s to %s" % (plural(count, "job"), args.file))

@subcommand()
def cmd_doctor(queue, args):
    """Look for what is or will be wrong, and say what to do about it. No job is touched. Exit 0 if all
    is well, 1 if not.

    doctor
    --db /srv/q.db doctor"""
    findings = diagnose(queue)
    wrong = [pasted("%(check)s: %(detail)s; %(advice)s" % finding) for finding in findings
             if not finding["ok"]]
    print_value(args, findings, wrong or ["ok"])
    for line in () if args.table else wrong:
        tell(line)
    return bool(wrong)

@subcommand("""
    --user -  for your own systemd instance""")
def cmd_systemd(queue, args):
    """Print a systemd unit that serves this queue with this file. Jobs run as the user who asks, and
    have 80 s to end when it is stopped.

    systemd | sudo tee /etc/systemd/system/queuectl.service
    systemd --user >~/.config/systemd/user/queuectl.service"""
    print_text(systemd_unit(queue.given, args.user))
    tell("save it as {0}/queuectl.service, then: {1} daemon-reload; {1} enable --now queuectl"
         .format(*(("~/.config/systemd/user", "systemctl --user") if args.user
                   else ("/etc/systemd/system", "systemctl"))))

def split(argv):
    """(the flags that stand before a command, the rest)."""
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        at += 1 + (argv[at] in ("--db", "--socket"))
    return argv[:at], argv[at:]

OFFERED = {  # a word -> what may follow it
    "--state": STATES, "--format": ["prometheus"], "completion": SHELLS,
    "get": SETTINGS, "set": SETTINGS}

@subcommand("\nshell SHELL  the shell to complete in")
def cmd_completion(queue, args):
    """Print what makes Tab complete commands, flags, states, settings and ids.

    completion bash >~/.local/share/bash-completion/completions/queuectl
    completion fish >~/.config/fish/completions/queuectl.fish"""
    if not args.argv:
        return print_text(SHELLS[args.shell] % called())
    *before, word = split(args.argv)[1] or args.argv
    line, store = " ".join(before), queue.look()
    found = OFFERED.get(line.rpartition(" ")[2]) or re.findall(
        r"^%s\b *(\S+)" % re.escape(line), "\n".join(COMMANDS), re.M) or [
            job.id for job in store.jobs(store.select(limit=200))]
    if word[:1] == "-":
        found = re.findall("(?<= )--?[a-z-]+", " --version" + GLOBAL + "".join(
            text for name, (_, text) in COMMANDS.items() if line.startswith(name)))
    found = {one for one in found if one.startswith(word)}
    sys.stdout.writelines(one + "\n" for one in found)
    return not found

@subcommand()
def cmd_(queue, args):
    """Durable job queues. Without a command it shows what runs, waits and died."""
    print_text("%s\n\nusual commands: enqueue -- CMD, worker start, list, show ID, logs -f ID,\n"
               "dlq retry ID, doctor; all of them: %s --help"
               % ("\n".join(frame(queue.look(), now_ms())), called()))

# ---- Main ---------------------------------------------------------------------------------------
# The parser of the one command that is called, and the exit status.

class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours."""

    def error(self, message):
        raise Usage("%s; see: %s --help" % (message, self.prog))

def manual(name):
    """(help, examples) of a command; the program has an example of each."""
    about, _, examples = COMMANDS[name][0].__doc__.replace("\n    ", "\n").partition("\n\n")
    if not name:
        return about, "\n".join("%s\n%s" % (about.partition(".")[0], lines.partition("\n")[0])
                                for about, lines in map(manual, filter(None, COMMANDS)))
    return about, "  queuectl " + examples.replace("\n", "\n  queuectl ")

def new_parser(name):
    about, examples = manual(name)
    # A width, or each parser would import shutil to ask the terminal, help or no help.
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=78)
    parser = Parser(prog=("queuectl " + name).strip(), formatter_class=layout, allow_abbrev=False,
                    description=about, epilog="examples:\n" + examples)
    parser.add_argument("--version", action="version", version="queuectl " + VERSION)
    parser.set_defaults(job=None, state=None, quiet=False, older_than=None, match=None, limit=-1)
    for line in (GLOBAL + COMMANDS[name][1]).strip().split("\n"):
        call, _, about = line.strip().partition("  ")
        *names, metavar = call.split()
        options = dict(OPTIONS.get(metavar, {}), help=about)
        if metavar != "-":
            options.update(metavar=metavar.strip("[.]"), type=functools.partial(read_argument, metavar))
        parser.add_argument(*names, **options)
    return parser

def parse(flags, words):
    """(function, arguments) of a command line; its parser is the only one that is made."""
    name = next(one for one in map(" ".join, (words[:2], words[:1], [])) if one in COMMANDS)
    if words and not name and not {"-h", "--help"}.intersection(words):
        import difflib
        given = " ".join(filter(str.isalpha, words[:2]))
        raise Usage("unknown command %s; did you mean: queuectl %s" % (
            given, " or ".join(difflib.get_close_matches(given, COMMANDS, 3, 0.5) or ["--help"])))
    end = (words + ["--"]).index("--") if name in ("enqueue", "run", "completion") else len(words)
    args = new_parser(name).parse_args(flags + words[len(name.split()):end])
    args.argv = words[end + 1:]
    args.table = (args.table or sys.stdout.isatty() and not args.json) and not args.quiet
    return COMMANDS[name][0], args

def prepare_stdio():
    """Open descriptors 0 to 2, or the lock could become one of them; write UTF-8 in any locale."""
    fd = 0
    while fd < 3:  # it becomes the lowest one that is free
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
    sys.stdout = open(1, "w", -1, "utf-8", "backslashreplace", closefd=False)
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)

def complain(words, error):
    """Say what went wrong, in one line; the exit status. `check` has its own form of both."""
    problem = str(error)
    if words[:1] == ["check"]:
        with suppress(OSError):
            print_text("UNKNOWN - %s" % problem.replace("|", "/"))
        return 3
    if not isinstance(error, BrokenPipeError):  # who reads has enough
        tell("Error: " + problem if sys.stderr.isatty() and "--json" not in sys.argv else
             compact({"success": False, "message": "Error: %s" % pasted(problem)}))
    return getattr(error, "exit_code", 1)

def main(argv):
    """Run one command; the exit status. 0: done, 1: refused or failed, 2: wrong usage."""
    flags, words = split(list(map(utf8, argv)))
    try:
        call_as(utf8(sys.argv[0]), None)
        function, args = parse(flags, words)
        place = locate(args.db, args.socket)
        call_as(utf8(sys.argv[0]), args.db and utf8(place.db))
        with closing(Queue(place, tell)) as queue:
            return function(queue, args) or 0
    except Exception as error:
        return complain(words, error)
    except KeyboardInterrupt:
        tell("interrupted; the jobs go on")
        return 130

def run_script():
    """The program. Ends at once, not by sys.exit: multiprocessing would wait for workers, which may
    outlive their daemon to finish their jobs."""
    status = 1
    try:
        prepare_stdio()
        status = main(sys.argv[1:])
    except SystemExit as ending:  # argparse, after its help
        status = ending.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # it has ended
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)

if __name__ == "__main__":
    run_script()
