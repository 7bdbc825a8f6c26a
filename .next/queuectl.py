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

  (new)      -> pending              Store.insert, Store.adopt
  pending    -> processing           Store.claim
  failed     -> processing           Store.claim, once run_after has passed
  processing -> completed            Store.finish: exit 0
  processing -> failed               Store.finish: will be tried again
  processing -> dead                 Store.finish: out of retries
  processing -> cancelled            Store.finish: at its user's wish
  processing -> pending or failed    Store.give_back: not counted
  pending or failed -> cancelled     Store.cancel
  any end or failed -> pending       Store.requeue

On disk: DB (SQLite, WAL) and DB-run/: lock (held for each transaction), door (where workers queue
for it), daemon (held by the daemon for its life), w.N (held by the worker of slot N, who notes its
attempt there), a number (the output of a running attempt), log, and socket if the usual one is taken.

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
from contextlib import contextmanager, suppress

# ---- Constants and defaults ---------------------------------------------------------------------
# What is fixed; for what `config set` may change see SETTINGS. Times are milliseconds unless the
# name says _s.

VERSION = "1.0.0"
STATES = ("pending", "processing", "completed", "failed", "dead", "cancelled")
UNFINISHED = ("pending", "processing", "failed")
FINISHED = ("completed", "dead", "cancelled")

MAX_MS = 10 ** 12               # the longest duration taken, some 31 years
LAST_MS = 253402300800000       # the year 10000, where ISO dates end
MAX_COMMAND = 131071            # bytes: Linux takes no longer argument
MAX_ENV = 1 << 20               # bytes of a job's own environment in all
MAX_REQUEST = 16 << 20          # bytes of one request
MAX_WORKERS = 1000              # slots above it belong to `run` and `drain`
MAX_SOCKET_PATH = 107           # bytes: sockaddr_un, less its NUL
MAX_CLIENTS = 400               # connections at once
BATCH_JOBS = 1000               # `enqueue -` stores so many at once,
BATCH_BYTES = 8 << 20           # or so many bytes
STEP = 1000                     # rows or ids that one transaction takes on
PAGE = 400                      # rows of one look; SQLite 3.7.17 takes 999 values
ANSWERS = 1000                  # answers remembered, for clients that ask again
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
TWICE_S = 0.5                   # signals to a `run` within it are one: timeout(1) sends two

DEFAULT_SOCKET = "/tmp/queuectl.sock"

# ---- Time, ids and text -------------------------------------------------------------------------
# The only place that reads a clock or sleeps. Whatever decides or stores takes the time as `now`:
# milliseconds since 1970, UTC.

UNITS_MS = {"ms": 1, "s": 1000, "m": 60000, "h": 3600000, "d": 86400000}
DATE = (r"(\d{4})-(\d\d)-(\d\d)(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?"
        r"\s?([Zz]|[+-]\d\d(?::?\d\d)?)?)?")
DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"


def now_ms():
    """The wall clock, in ms since 1970."""
    return int(time.time() * 1000)


def monotonic():
    """Seconds on a clock that nobody sets: for timeouts."""
    return time.monotonic()


def sleep(seconds):
    time.sleep(seconds)


@functools.lru_cache(maxsize=64)  # a batch asks for few
def iso(ms):
    """2026-01-15T10:30:00.000Z for ms since 1970; None for None."""
    if ms is None:
        return None
    seconds, rest = divmod(ms, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%03dZ" % rest


def parse_date(text, local=False):
    """ms since 1970 of an ISO 8601 date-time (also SQLite's form); one without an offset is UTC, or
    `local` time."""
    from datetime import datetime, timedelta, timezone
    match = re.fullmatch(DATE, text.strip(), re.ASCII) if isinstance(text, str) else None
    if not match:
        raise ValueError("must be a date-time like 2026-01-15T10:30:00Z")
    *parts, fraction, offset = match.groups("0")
    zone = None if local and offset == "0" else timezone.utc
    if offset[0] in "+-":
        hours, minutes = int(offset[1:3]), int(offset[3:].lstrip(":") or 0)
        if hours > 23 or minutes > 59:
            raise ValueError("has no valid offset")
        zone = timezone((1 if offset[0] == "+" else -1) * timedelta(hours=hours, minutes=minutes))
    moment = datetime(*map(int, parts), tzinfo=zone).timestamp()
    return int(moment) * 1000 + int((fraction + "00")[:3])


def next_time(text, now):
    """ms of a date in local time; a time of the day alone is the next one: 03:00."""
    if not re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text, re.ASCII):
        return parse_date(text, local=True)
    hour, minute, second = (list(map(int, text.split(":"))) + [0])[:3]
    if hour > 23 or minute > 59 or second > 59:
        raise ValueError("must be a time of the day like 03:00")
    today = time.localtime(now / 1000)
    return next(ms for ms in (
        int(time.mktime(today[:2] + (today[2] + days, hour, minute, second, 0, 0, -1))) * 1000
        for days in (0, 1, 2)) if ms > now)


def parse_duration(text, bare=None):
    """ms of `90s`, `5m`, `1h30m`, `500ms`; a bare number has the unit `bare`, or is refused."""
    text = text.strip()
    if re.fullmatch(r"\d{1,13}", text, re.ASCII):
        if bare is None:
            raise ValueError("needs a unit: 90s, 5m, 2h or 1d")
        text += bare
    if not re.fullmatch(r"(\d{1,13}(ms|[smhd]))+", text, re.ASCII):
        raise ValueError("must be like 90s, 5m, 1h30m or 1d")
    return sum(int(count) * UNITS_MS[unit] for count, unit in re.findall(r"(\d+)([a-z]+)", text))


def lapse(ms):
    """A duration for people, in two units at most: 10 ms, 45 s, 3m20s, 5 h, 2d4h."""
    if ms < 1000:
        return "%d ms" % ms
    units = sorted(UNITS_MS.items(), key=lambda item: -item[1])
    for (unit, size), (small, part) in zip(units, units[1:]):
        if ms >= size:
            rest = ms % size // part if size > 1000 else 0
            return ("%d%s%d%s" % (ms // size, unit, rest, small) if rest
                    else "%d %s" % (ms // size, unit))


def new_ids(now, count=1):
    """`count` new job ids of 14 characters that sort by time."""
    first = (now << 25) + (int.from_bytes(os.urandom(4), "big") >> 7)
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
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def os_path(text):
    """The same the other way: a path as the OS is told it."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def plural(count, noun):
    return "%d %s%s" % (count, noun, "" if count == 1 else "s")


# A value as JSON in one ASCII line. repr: another program may have put bytes into a row.
compact = json.JSONEncoder(separators=(",", ":"), default=repr).encode

# ---- Errors -------------------------------------------------------------------------------------
# A Failure is expected: it becomes one line that says the way out, never a traceback.


class Failure(Exception):
    """A normal failure. `str()` is the line for the user, safe for a terminal; `details` travel in
    the answer."""

    exit_code = 1

    def __init__(self, message, **details):
        super().__init__(safe(message))
        self.details = details


class Usage(Failure):
    """The command line itself is wrong."""

    exit_code = 2


class BadField(Failure):
    """A job's field, or a setting, has a value it can't have."""

    def __init__(self, field, problem):
        super().__init__("field %s %s" % (str(field)[:80], problem))


class NoDaemon(Failure):
    """A command needs the daemon and none runs."""


class StorageError(Failure):
    """The database can't be used now; nothing was changed."""


class Busy(StorageError):
    """It is not our turn yet, or another program holds the database's write lock."""


class Unreachable(Failure):
    """Nobody answers at the socket."""


def storage_error(path, error):
    """The StorageError for a sqlite3 or OS `error` on the database at `path`, with what to do."""
    text = str(error)
    for words, advice in (
            ("locked", "%s is locked by another program; try again when it is done"),
            ("disk is full", "no space left for %s; free some and try again"),
            ("No space", "no space left for %s; free some and try again"),
            ("readonly", "%s can't be written; check its mode and its file system"),
            ("unable to open", "%s can't be opened; check its directory"),
            ("not a database", "%s is not a database; restore a backup or move it"),
            ("malformed", "%s is corrupt; restore a backup, or save what is left with:"
                          " sqlite3 FILE .recover"),
            ("no such", "%s is not a queue's database; give another --db, or restore a backup"),
            ("disk I/O", "%s can't be read or written; its disk is full, or look at the kernel's"
                         " log")):
        if words in text:
            kind = Busy if words == "locked" else StorageError
            return kind((advice % path) + " (%s)" % text)
    return StorageError("the database %s failed: %s" % (path, text))


def decode_json(text, what):
    """The value of a JSON text or its bytes; a Failure naming `what` when it is none."""
    def refuse(constant):
        raise ValueError("%s is not JSON" % constant)
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), parse_constant=refuse)
    except RecursionError:
        raise Failure("%s is nested too deeply" % what)
    except UnicodeDecodeError:
        raise Failure("%s is not JSON in UTF-8" % what)
    except ValueError as error:
        raise Failure("%s is not JSON: %s" % (what, error))


# ---- Files and processes ------------------------------------------------------------------------
# Files that nobody planted, and processes that are the ones we mean.


def check_regular(path, status):
    """Refuse what is no regular file of ours."""
    if not stat.S_ISREG(status.st_mode):
        raise Failure("%s is not a regular file; move it away" % path)
    if status.st_uid != os.geteuid():
        raise Failure("%s belongs to another user (uid %d); run as that user or use another --db"
                      % (path, status.st_uid))


def open_private(path, flags=os.O_RDWR | os.O_CREAT):
    """A descriptor on a file of ours, mode 0600, made if need be. Links are never followed."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Failure("%s is a symbolic link; move it away" % path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise storage_error(path, error)
        raise Failure("can't open %s: %s%s" % (path, error.strerror, "; run as its owner, or use"
                      " another --db" * isinstance(error, PermissionError)))
    try:
        status = os.fstat(fd)
        check_regular(path, status)
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def others_can_write(status):
    """Whether someone else may write there; a primary group that bears the user's name may."""
    if status.st_mode & 0o002 or not status.st_mode & 0o020:
        return bool(status.st_mode & 0o002)
    import grp
    import pwd
    with suppress(KeyError):
        mine = pwd.getpwuid(os.geteuid())
        return (status.st_gid != mine.pw_gid
                or grp.getgrgid(status.st_gid).gr_name != mine.pw_name)
    return True


def private_directory(path):
    """Make `path`, with what is missing above it, a directory of ours, 0700; one that is there must
    be ours, and nobody else may write it."""
    above = os.path.dirname(path)
    if not os.path.isdir(above):
        private_directory(above)
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)
    except OSError as error:
        raise (storage_error(path, error) if error.errno == errno.ENOSPC else
               Failure("can't make %s: %s; give another --db" % (path, error.strerror)))
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise Failure("%s is not a directory of yours; move it away" % path)
    if others_can_write(status):
        raise Failure("%s can be written by others; run: chmod go-w %s" % (path, path))


def mount_of(path, table="/proc/self/mountinfo"):
    """The type of the file system that `path` is on; "" where the system doesn't say."""
    best = ("", "")
    with suppress(OSError), open(table, errors="surrogateescape") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda m: chr(int(m.group(1), 8)), left.split()[4])
            if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
                best = (point, right.split()[0])
    return best[1]


@functools.lru_cache(maxsize=None)  # no process outlives it
def boot_id():
    """Differs after each boot; "" where the system doesn't say."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def process_start(pid):
    """When process `pid` started, in some unit of the system's; "" when it is gone or a zombie."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return "" if fields[0] in b"ZX" else fields[19].decode()
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return ""
    import subprocess
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["ps", "-o", "lstart=", "-p", str(pid)],
                                       stderr=subprocess.DEVNULL).decode().strip()
    return ""


def try_lock(fd, how=fcntl.LOCK_EX):
    """Whether the flock on `fd` was free, and is ours now."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def is_locked(path):
    """Whether another process holds the lock on a file. Shared: two lookers don't meet."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def processes(path=None, mark=None):
    """The pids, but for our own, that have the file `path` open for writing, or `mark` in their
    environment. Empty where there is no /proc."""
    found, wanted = [], None
    with suppress(OSError):
        wanted = path and os.stat(path)
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with suppress(OSError):
            if int(pid) != os.getpid() and process_start(int(pid)) and (
                    wanted and writes_to("/proc/" + pid, wanted)
                    or mark and mark in environment_of(pid)):
                found.append(int(pid))
    return found


def writes_to(process, wanted):
    """Whether the process (its /proc directory) has the file with that status open for writing: who
    only reads it, like tail -f, is no part of a job."""
    for fd in os.listdir(process + "/fd"):
        with suppress(OSError):
            if os.path.samestat(os.stat("%s/fd/%s" % (process, fd)), wanted):
                with open("%s/fdinfo/%s" % (process, fd)) as info:
                    flags = re.search(r"flags:\s*([0-7]+)", info.read())
                if flags and int(flags.group(1), 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


def environment_of(pid):
    """[NAME=VALUE as bytes] of a process of ours."""
    with open("/proc/%s/environ" % pid, "rb") as file:
        return file.read(1 << 22).split(b"\0")


def read_note(path):
    """The object noted in a file of ours; {} when there is none, or it is not all there."""
    with suppress(OSError, ValueError), open(path, "rb") as file:
        value = json.loads(file.read().decode())
        return value if isinstance(value, dict) else {}
    return {}


def write_note(fd, note, size=400):
    """Note an object in the file, filled with blanks to `size` bytes: one write replaces it whole."""
    os.pwrite(fd, compact(note).encode().ljust(size), 0)


def peer_uid(sock):
    """Who is at the other end of a Unix socket, by the kernel's word; None where it gives none."""
    import struct
    if hasattr(socket, "SO_PEERCRED"):
        return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if hasattr(socket, "LOCAL_PEERCRED"):  # struct xucred: version, uid, …
        return struct.unpack("2I", sock.getsockopt(0, socket.LOCAL_PEERCRED, 8))[1]
    return None


# ---- Place --------------------------------------------------------------------------------------
# Where a queue lives: its database, DB-run, the locks in there, and whose turn it is.

NETWORKS = r"nfs|cifs|smb|9p|afs|ceph|gluster|lustre|ncp|fuse\.(ssh|gluster|ceph|s3|rclone)"
# What raises in a command, and what stops a process: not while it holds the lock.
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGTSTP,
        signal.SIGTTIN, signal.SIGTTOU)


class Place(collections.namedtuple("Place", "db db_given socket socket_given")):
    """Where a queue is. db, socket: absolute paths; …_given: by flag or environment, else the
    default."""

    __slots__ = ()

    @property
    def run(self):
        """The directory DB-run."""
        return self.db + "-run"

    def file(self, name):
        """A path in it: "lock", "w.1", 17 …"""
        return "%s-run/%s" % (self.db, name)

    def exists(self):
        """Whether there is a queue here."""
        return os.path.lexists(self.db)

    def check(self):
        """Refuse a place where no queue can be, or a file that is no database; it stays as it is.
        Never while a connection is open: closing the file would drop SQLite's locks."""
        folder = os.path.dirname(self.db)
        if not self.db_given and not os.path.isdir(folder):
            private_directory(folder)  # another is the user's affair
        try:
            status = os.stat(folder)
        except OSError as error:
            raise Failure("no directory %s (%s); make it, or give another --db"
                          % (folder, error.strerror))
        if os.geteuid() == 0 and (status.st_uid != 0 or others_can_write(status)):
            raise Failure("%s can be written by others than root; use a directory that can't"
                          % folder)
        kind = mount_of(self.db)
        if re.match(NETWORKS, kind):
            raise Failure("%s is on a network file system (%s), where SQLite's WAL does not work;"
                          " give a --db on a local disk" % (self.db, kind))
        if self.exists():
            self.check_file()

    def check_file(self):
        """Refuse what is there but no database of ours."""
        status = os.lstat(self.db)
        check_regular(self.db, status)
        if not status.st_mode & 0o200 or not os.access(self.db, os.R_OK | os.W_OK):
            raise StorageError("%s is read-only; run: chmod u+rw %s" % (self.db, self.db))
        if others_can_write(status):
            raise StorageError("%s can be written by others; run: chmod 600 %s" % (self.db, self.db))
        with open(self.db, "rb") as file:
            if status.st_size and file.read(16) != b"SQLite format 3\0":
                raise StorageError("%s is not a database; restore a backup, or give another --db"
                                   % self.db)

    def slots(self):
        """The numbers of the slots whose worker lives, in order."""
        with suppress(FileNotFoundError):
            return sorted(int(name[2:]) for name in os.listdir(self.run)
                          if re.fullmatch(r"w\.\d+", name) and is_locked(self.file(name)))
        return []

    def take_slot(self, slot):
        """The descriptor of the slot's file, locked; None: somebody has it, or just looks at it."""
        fd = open_private(self.file("w.%d" % slot))
        if try_lock(fd):
            return fd
        os.close(fd)
        return None

    def daemon(self):
        """What the daemon noted of itself: pid, start, socket; {} when none runs."""
        path = self.file("daemon")
        return read_note(path) if is_locked(path) else {}

    def hold_daemon(self, wait_s):
        """A descriptor that holds the daemon's lock; a Failure if another still has it then."""
        fd, until = open_private(self.file("daemon")), monotonic() + wait_s
        while not try_lock(fd):
            if monotonic() > until:
                pid = read_note(self.file("daemon")).get("pid", "unknown")
                os.close(fd)
                raise Failure("a daemon, pid %s, already serves %s; stop it with: queuectl daemon stop"
                              % (pid, self.db), pid=pid)
            sleep(0.02)
        return fd

    def log(self, text):
        """A line in DB-run/log for what an operator should know; never a payload."""
        with suppress(OSError, Failure):
            fd = open_private(self.file("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                os.write(fd, ("%s [%d] %s\n" % (iso(now_ms()), os.getpid(), safe(text))).encode(
                    "utf-8", "backslashreplace"))
                if os.fstat(fd).st_size > MAX_LOG:
                    os.rename(self.file("log"), self.file("log.1"))
            finally:
                os.close(fd)


class Turn:
    """The right to touch the database: flock on DB-run/lock, with HELD signals blocked. A process
    opens it for itself, after any fork: an inherited descriptor is the same lock.

    door: workers wait at DB-run/door first, so that one of them at most is in others' way.
    """

    def __init__(self, place, door=False):
        self.place = place
        self.fd = open_private(place.file("lock"))
        self.door = open_private(place.file("door")) if door else None
        self.mask = ()         # signals that were blocked before
        self.waiting = False

    def on_alarm(self, *_):
        if self.waiting:
            raise Busy("the lock %s is held by another process; see: queuectl doctor"
                       % self.place.file("lock"))

    def take(self, patience_s=None):
        """Wait for it so long, then Busy; None: as long as it takes."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            if self.door is not None:
                fcntl.flock(self.door, fcntl.LOCK_EX)
                fcntl.flock(self.fd, fcntl.LOCK_EX)
                fcntl.flock(self.door, fcntl.LOCK_UN)
            elif not try_lock(self.fd):
                self.wait(mask, patience_s)
        except BaseException:
            self.release(mask)
            raise
        self.mask = mask

    def wait(self, mask, patience_s):
        """Block until it is ours; signals are let in meanwhile, and may raise."""
        try:
            if patience_s:
                self.waiting = True
                signal.signal(signal.SIGALRM, self.on_alarm)
                signal.setitimer(signal.ITIMER_REAL, patience_s)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
        finally:
            self.waiting = False
            signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
            if patience_s:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def release(self, mask=None):
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask if mask is None else mask)

    def close(self):
        os.close(self.fd)
        if self.door is not None:
            os.close(self.door)


# ---- Jobs and settings --------------------------------------------------------------------------
# What `config set` may change, the job's record, and the checks of whatever a user or another
# program gives. A check returns the value to store, or raises ValueError: what it must be.


def one_of(value, choices):
    if value not in choices:
        raise ValueError("must be one of " + ", ".join(choices))
    return value


def as_text(value):
    if not isinstance(value, str):
        raise ValueError("must be text")
    if "\0" in value:
        raise ValueError("must not hold a NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode (a lone surrogate)")
    return value


def is_text(value):
    with suppress(ValueError):
        return as_text(value) == value
    return False


def as_int(value, low, high):
    """A whole number, given as one or as its text."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value.strip(), re.ASCII):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError("must be a whole number, %d to %d" % (low, high))
    return value


def as_ms(value, low=0, bare=None):
    """A duration in ms, as a number or as text like 5m; a bare number in text has the unit `bare`."""
    if isinstance(value, str):
        value = parse_duration(value, bare)
    return as_int(value, low, MAX_MS)


def as_command(value):
    size = len(as_text(value).encode())
    if not value.strip():
        raise ValueError("must not be empty")
    if size > MAX_COMMAND:
        raise ValueError("is too long: %d bytes, at most %d; put it into a script"
                         % (size, MAX_COMMAND))
    return value


@functools.lru_cache(maxsize=8)
def split_shell(text):
    """The argv that the `shell` setting stands for."""
    import shlex
    argv = shlex.split(as_text(text))
    if not any(argv[:1]):
        raise ValueError("must name a program, like /bin/sh -c")
    return argv


def number_from(low, high):
    return lambda value: as_int(value, low, high)


def ms_from(low):
    return lambda value: as_ms(value, low, bare="ms")


# check: of the text that is given; about: for people
Setting = collections.namedtuple("Setting", "default check about")
SETTINGS = {
    "max-retries": Setting(3, number_from(1, 1000), "attempts in all before a job is dead"),
    "delay-base": Setting(5000, ms_from(1), "base of the backoff; counts as 1 s at least"),
    "backoff": Setting("exponential", lambda text: one_of(text, ("exponential", "linear", "fixed")),
                       "how the wait before the next try grows"),
    "max-delay": Setting(86400000, ms_from(1), "longest wait before a try"),
    "jitter": Setting(0, number_from(0, 100), "percent the wait is spread by, up and down"),
    "timeout": Setting(5000, ms_from(0), "longest run of an attempt, 0: no limit"),
    "output-limit": Setting(65536, number_from(0, 16 << 20),
                            "bytes of output kept of each attempt"),
    "retention": Setting(0, ms_from(0), "how long completed jobs are kept, 0: for ever"),
    "shell": Setting("/bin/sh -c", lambda text: split_shell(text) and text,
                     "what a command is appended to"),
    "workers": Setting(0, number_from(0, MAX_WORKERS), "the number of workers wanted"),
    "on-dead": Setting("", lambda text: text and as_command(text),
                       "a shell line, enqueued whenever a job dies"),
}
DURATIONS = ("delay-base", "max-delay", "timeout", "retention")


def checked(field, check, *values):
    """What `check(*values)` returns; its ValueError as a BadField."""
    try:
        return check(*values)
    except ValueError as error:
        raise BadField(field, str(error))


def setting_of(key):
    """The Setting called so; a Failure with those that are known."""
    if isinstance(key, str) and key in SETTINGS:
        return SETTINGS[key]
    raise Failure("unknown setting %s; known are %s" % (str(key)[:80], ", ".join(SETTINGS)))


def read_setting(key, value):
    """The typed value of a setting given as text or number; `default` is its default. The original
    stored numbers as 60000.0, and 0.0 for the default."""
    setting, text = setting_of(key), str(value).strip()
    if text in ("default", "0.0"):
        return setting.default
    return checked(key, setting.check, re.sub(r"^(\d+)\.0$", r"\1", text))


def as_id(value):
    value = as_text(value)
    if not 1 <= len(value) <= 128 or not value.isprintable() or " " in value or "/" in value:
        raise ValueError("must be 1 to 128 printable characters without spaces or slashes")
    return value


def as_date(value):
    ms = parse_date(value)
    if not 0 <= ms < LAST_MS:
        raise ValueError("must be a date-time since 1970")
    return iso(ms)


def as_cwd(value):
    if not as_text(value).startswith("/") or len(value.encode()) > 4095:
        raise ValueError("must be an absolute path")
    return value


def as_env(value):
    """The JSON text of an object of text to text."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of text to text")
    for name, text in value.items():
        if not name or "=" in as_text(name):
            raise ValueError("has a name that is empty or holds a =")
        if not is_text(text):
            raise ValueError("needs text for %s" % name[:80])
        if len(text.encode()) + len(name.encode()) >= MAX_COMMAND:
            raise ValueError("has a value that is too long: %s" % name[:80])
    text = compact(value)
    if len(text) > MAX_ENV:
        raise ValueError("is too large: at most %d bytes" % MAX_ENV)
    return text


def as_key(value):
    if not 1 <= len(as_text(value)) <= 1024:
        raise ValueError("must be 1 to 1024 characters")
    return value


FIELDS = {  # what a job may be given -> the check that returns what is stored
    "id": as_id,
    "command": as_command,
    "priority": number_from(-1000, 1000),
    "run_after": as_date,
    "timeout": as_ms,
    "max_retries": number_from(1, 1000),
    "cwd": as_cwd,
    "env": as_env,
    "unique": as_key,
}
PUBLIC = ("id command state attempts max_retries priority timeout created_at updated_at run_after"
          " locked_at started_at finished_at exit_code error cwd env unique").split()
OWN_TIMEOUT, OWN_RETRIES = 1, 2  # bits of Job.own: not replaced by the settings on a retry
ON_DEAD = 4                      # and: it was enqueued because another job died
NO_JOB = 'a job is a JSON object like {"command":"true"}'


def env_of(text):
    """The object that a job's `env` stands for; another program may have written anything."""
    with suppress(ValueError, TypeError, RecursionError):
        env = json.loads(text or "{}")
        return env if isinstance(env, dict) else {}
    return {}


class Job(collections.namedtuple("Job", PUBLIC + "due ready own runs serial environ".split())):
    """A row of the table jobs. Dates are ISO texts, `env` is JSON text or None, and

    due      ms when a waiting job must be made ready; 0: a row not checked yet; else NULL
    ready    1 when it can be claimed, else NULL
    own      bits: OWN_… for what the job brought itself, ON_DEAD
    runs     attempts over its whole life
    serial   of its open attempt, else NULL
    environ  of its caller, as `env`; read for its attempts alone
    """

    __slots__ = ()

    def public(self):
        """The job as users see it."""
        return dict(zip(PUBLIC, self), env=env_of(self.env))


NEW = dict(dict.fromkeys(Job._fields), state="pending", attempts=0, priority=0, own=0, runs=0)


def defaults(settings, now):
    """{field: value} of a job that brings nothing of its own."""
    stamp = iso(now)
    return dict(NEW, max_retries=settings["max-retries"], timeout=settings["timeout"],
                created_at=stamp, updated_at=stamp, run_after=stamp)


def scheduled(due, now):
    """The fields of a job whose turn is at `due`: it is ready if that has come."""
    return {"due": due, "ready": None} if due > now else {"due": None, "ready": 1}


def make_job(given, settings, now, job_id):
    """A pending Job from the object a user gave (see FIELDS), called `job_id` if it brings no id;
    raises BadField. What the system sets is ignored: an object that `list` showed is a job too."""
    if not isinstance(given, dict):
        raise Failure(NO_JOB)
    fields = {}
    for name, value in given.items():
        if name in FIELDS and value is not None:
            fields[name] = checked(name, FIELDS[name], value)
        elif name not in PUBLIC:
            raise BadField(name, "is unknown; known are " + ", ".join(FIELDS))
    if "command" not in fields:
        raise BadField("command", "is required")
    due = parse_date(fields["run_after"]) if "run_after" in fields else now
    job = defaults(settings, now)
    job.update({"id": job_id}, **fields)
    job.update(scheduled(due, now), own=(OWN_TIMEOUT * ("timeout" in fields)
                                         + OWN_RETRIES * ("max_retries" in fields)))
    return Job(**job)


def adopted(row, settings, now):
    """A row that another program inserted, as a job like any other. A number that is none gets its
    default; what can't be, makes it dead with the reason. One that was running has not begun."""
    fields, problem = defaults(settings, now), None
    fields["id"] = safe(str(row.id)) if row.id else new_ids(now)[0]
    for field, low, high in (("attempts", 0, 1 << 30), ("max_retries", 1, 1000),
                             ("timeout", 0, MAX_MS), ("priority", -1000, 1000)):
        with suppress(ValueError):
            fields[field] = as_int(getattr(row, field), low, high)
    for field, check in (("created_at", as_date), ("updated_at", as_date), ("run_after", as_date),
                         ("started_at", as_date), ("command", as_command),
                         ("state", lambda text: one_of(text, STATES))):
        value = getattr(row, field)
        try:
            if value or field == "command":
                fields[field] = check(value)
        except ValueError as error:
            problem = problem or "field %s %s" % (field, error)
    if fields["state"] == "processing":
        fields["state"] = "pending"
    if problem:
        fields.update(command=fields["command"] or safe(str(row.command)), state="dead",
                      error=safe(problem), finished_at=iso(now))
    elif fields["state"] in FINISHED:
        fields["finished_at"] = fields["updated_at"]
    else:
        fields.update(scheduled(parse_date(fields["run_after"]), now))
    return Job(**fields)


# ---- Verdicts -----------------------------------------------------------------------------------
# What becomes of a job after an attempt. Pure: it reads no clock and touches no store.

# status: as subprocess gives it, 3 for exit 3, -9 for SIGKILL, None if unknown; reason: why it
# ended: "" by itself, "timeout", "cancelled", "worker lost", "refused" (can't run, see detail),
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
    if outcome.reason == "timeout":
        return ("timed out after %d ms (raise it with --timeout or: config set timeout 0)"
                % timeout)
    if outcome.reason:
        return outcome.detail or outcome.reason
    if outcome.status is None or outcome.status >= 0:
        return "exit %s" % outcome.status if outcome.status else None
    return "killed by " + signal_name(-outcome.status)


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


def settle(wish, same_boot, named):
    """The reason (see Outcome) for an open attempt whose worker is gone: its wish, whether it was
    claimed in this boot, whether the slot's file names it. A cancel is decided by `decide`."""
    if not same_boot:
        return "worker lost"
    if not named or wish == "give back":  # not named: it never began
        return "give back"
    return "worker lost"


# ---- Schema -------------------------------------------------------------------------------------
# Numbered migrations, each run in one transaction. Released ones are never edited: add another.
# jobs, config and metrics begin as the original QueueCTL made them, so its databases open here.
# A row that another program inserts has due = 0, and is checked at the next look.
# Not partial indexes (SQLite 3.8) nor WITHOUT ROWID (3.8.2): 3.7.17 has neither.

MIGRATIONS = (
    ("""CREATE TABLE IF NOT EXISTS jobs (
            id TEXT PRIMARY KEY,
            command TEXT NOT NULL,
            state TEXT DEFAULT 'pending',
            attempts INT DEFAULT 0,
            max_retries INT DEFAULT 3,
            created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
            updated_at DATETIME DEFAULT CURRENT_TIMESTAMP,
            locked_at DATETIME,
            timeout INT DEFAULT 5000,
            run_after DATETIME DEFAULT CURRENT_TIMESTAMP,
            priority INT DEFAULT 0,
            started_at DATETIME)""",
     "CREATE TABLE IF NOT EXISTS config (key TEXT PRIMARY KEY, value TEXT)",
     """CREATE TABLE IF NOT EXISTS metrics (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            daemon_startup DATETIME DEFAULT CURRENT_TIMESTAMP,
            total_commands INT DEFAULT 0)""",
     "ALTER TABLE jobs ADD COLUMN finished_at TEXT",
     "ALTER TABLE jobs ADD COLUMN exit_code INTEGER",
     "ALTER TABLE jobs ADD COLUMN error TEXT",
     "ALTER TABLE jobs ADD COLUMN cwd TEXT",
     "ALTER TABLE jobs ADD COLUMN env TEXT",
     "ALTER TABLE jobs ADD COLUMN environ TEXT",
     "ALTER TABLE jobs ADD COLUMN 'unique' TEXT",
     "ALTER TABLE jobs ADD COLUMN 'group' TEXT",
     "ALTER TABLE jobs ADD COLUMN due INTEGER DEFAULT 0",
     "ALTER TABLE jobs ADD COLUMN ready INTEGER",
     "ALTER TABLE jobs ADD COLUMN own INTEGER DEFAULT 0",
     "ALTER TABLE jobs ADD COLUMN runs INTEGER DEFAULT 0",
     "ALTER TABLE jobs ADD COLUMN serial INTEGER",
     "CREATE INDEX jobs_ready ON jobs (ready, priority DESC)",
     'CREATE INDEX jobs_group ON jobs (ready, "group", priority DESC)',
     "CREATE INDEX jobs_due ON jobs (due)",
     "CREATE INDEX jobs_finished ON jobs (state, finished_at)",
     # The open attempts. That `job` and `slot` are unique here is promise 2: nothing runs twice at
     # once. wish: NULL, 'cancel' or 'give back'.
     """CREATE TABLE running (
            serial INTEGER PRIMARY KEY AUTOINCREMENT,
            job TEXT NOT NULL UNIQUE,
            slot INTEGER NOT NULL UNIQUE,
            boot TEXT NOT NULL,
            started_at INTEGER NOT NULL,
            wish TEXT)""",
     "INSERT INTO sqlite_sequence (name, seq) VALUES ('running', 0)",
     """CREATE TABLE attempts (
            serial INTEGER PRIMARY KEY,
            job TEXT NOT NULL,
            number INTEGER NOT NULL,
            worker INTEGER,
            started_at TEXT,
            finished_at TEXT,
            exit_code INTEGER,
            signal TEXT,
            error TEXT,
            dropped INTEGER NOT NULL,
            output BLOB)""",
     "CREATE INDEX attempts_job ON attempts (job)",
     # What a job waits for; a row goes when that has completed.
     """CREATE TABLE after (
            job TEXT NOT NULL,
            needs TEXT NOT NULL,
            PRIMARY KEY (job, needs))""",
     "CREATE INDEX after_needs ON after (needs)",
     # The last job that was given a key; it holds it while it is unfinished. completed: ms when a
     # job with this key last did.
     "CREATE TABLE unique_keys (key TEXT PRIMARY KEY, job TEXT NOT NULL, completed INTEGER)",
     # What was answered to the last changes: a client whose connection broke may ask again.
     "CREATE TABLE answers (number INTEGER PRIMARY KEY, once TEXT UNIQUE, answer TEXT)",
     # One row. By state: how many jobs there are; changes: of settings, pause or limits.
     """CREATE TABLE totals (
            pending INTEGER DEFAULT 0,
            processing INTEGER DEFAULT 0,
            completed INTEGER DEFAULT 0,
            failed INTEGER DEFAULT 0,
            dead INTEGER DEFAULT 0,
            cancelled INTEGER DEFAULT 0,
            changes INTEGER DEFAULT 0,
            jobs_enqueued INTEGER DEFAULT 0,
            jobs_completed INTEGER DEFAULT 0,
            jobs_died INTEGER DEFAULT 0,
            failed_attempts INTEGER DEFAULT 0,
            runtime_ms INTEGER DEFAULT 0,
            longest_ms INTEGER DEFAULT 0)""",
     """INSERT INTO totals (pending, processing, completed, failed, dead)
        SELECT COUNT(CASE state WHEN 'pending' THEN 1 END),
               COUNT(CASE state WHEN 'processing' THEN 1 END),
               COUNT(CASE state WHEN 'completed' THEN 1 END),
               COUNT(CASE state WHEN 'failed' THEN 1 END),
               COUNT(CASE state WHEN 'dead' THEN 1 END)
        FROM jobs""",
     # By triggers, so that rows inserted or deleted by another program count too.
     """CREATE TRIGGER jobs_added AFTER INSERT ON jobs BEGIN
            UPDATE totals
            SET pending = pending + (NEW.state IS 'pending'),
                processing = processing + (NEW.state IS 'processing'),
                completed = completed + (NEW.state IS 'completed'),
                failed = failed + (NEW.state IS 'failed'),
                dead = dead + (NEW.state IS 'dead'),
                cancelled = cancelled + (NEW.state IS 'cancelled'),
                jobs_enqueued = jobs_enqueued + 1;
        END""",
     """CREATE TRIGGER jobs_moved AFTER UPDATE OF state ON jobs WHEN OLD.state IS NOT NEW.state
        BEGIN
            UPDATE totals
            SET pending = pending + (NEW.state IS 'pending') - (OLD.state IS 'pending'),
                processing = processing + (NEW.state IS 'processing') - (OLD.state IS 'processing'),
                completed = completed + (NEW.state IS 'completed') - (OLD.state IS 'completed'),
                failed = failed + (NEW.state IS 'failed') - (OLD.state IS 'failed'),
                dead = dead + (NEW.state IS 'dead') - (OLD.state IS 'dead'),
                cancelled = cancelled + (NEW.state IS 'cancelled') - (OLD.state IS 'cancelled');
        END""",
     """CREATE TRIGGER jobs_removed AFTER DELETE ON jobs BEGIN
            UPDATE totals
            SET pending = pending - (OLD.state IS 'pending'),
                processing = processing - (OLD.state IS 'processing'),
                completed = completed - (OLD.state IS 'completed'),
                failed = failed - (OLD.state IS 'failed'),
                dead = dead - (OLD.state IS 'dead'),
                cancelled = cancelled - (OLD.state IS 'cancelled');
            DELETE FROM attempts WHERE job = OLD.id;
            DELETE FROM after WHERE job = OLD.id OR needs = OLD.id;
            DELETE FROM unique_keys WHERE key = OLD."unique" AND job = OLD.id;
        END"""),
)

# ---- Store --------------------------------------------------------------------------------------
# The only SQL but for the schema. Writes are made inside `transaction()`, which has its turn under
# the lock; each takes the time as `now` (ms) and names the arrow it stands for. What is to be
# acknowledged is made durable by `sync()`, after the lock was released: the disk never holds it.

# In brackets, not quotes: SQLite takes an unknown "column" for a text.
COLUMNS = ", ".join("[%s]" % name for name in Job._fields)
LOOK = COLUMNS.replace("[environ]", "NULL")  # it may be large, and is shown to nobody
ATTEMPT = "number worker started_at finished_at exit_code signal error".split()

# An open attempt with what is needed to run it and to judge it. started_at: ms; number: counts
# over the job's life; command: None for a job deleted meanwhile
Claim = collections.namedtuple(
    "Claim", "serial slot boot started_at wish job number attempts max_retries timeout command cwd"
             " env environ own unique")


def marks(values):
    """A place for each of `values` in SQL."""
    return ", ".join("?" * len(values))


def sqlite_uri(path, mode="rw"):
    """How SQLite is told any path: Python 3.6 gives it no other bytes than UTF-8."""
    return "file:%s?mode=%s" % ("".join(map("%%%02x".__mod__, os.fsencode(path))), mode)


class Store:
    """The database of the queue at `place` (None: an empty one in memory). One a process, opened
    after any fork and closed before one: a connection must not cross it.

    patience_s, door  see Turn
    Raises StorageError; what could not be done is undone.
    """

    def __init__(self, place, *, patience_s=None, door=False):
        import sqlite3
        import threading
        self.sqlite3 = sqlite3
        self.thread = threading.get_ident
        self.place = place
        self.path = place.db if place else ":memory:"
        self.patience_s = patience_s
        self.door = door
        self.sync_mutex = threading.Lock()  # of a sync, and of what reopens
        self.mutex = threading.RLock()      # of a transaction; taken second where both are
        self.owner = None                   # the thread that is in a transaction
        self.commits = 0                    # so many were made,
        self.synced = self.failed = 0       # so many are on the disk; the last of a sync that failed
        self.connection = self.cursor = self.wal = None
        self.broken = False                 # after trouble: the next use opens anew
        self.file = None                    # os.stat of the database
        self.changes = None                 # as in totals, when the settings were read
        self.settings = {}
        self.paused = None                  # the reason of a pause
        self.turn = None
        if place:
            place.check()
            if place.exists() and not os.path.isdir(place.run):
                self.recognise()
            private_directory(place.run)
        try:
            self.reopen()
        except BaseException:
            self.close()
            raise

    # -- opening

    def recognise(self):
        """Refuse a database that is no queue's, before anything is made beside it."""
        if not os.stat(self.path).st_size:
            return
        try:
            connection = self.sqlite3.connect(sqlite_uri(self.path, "ro&immutable=1"), uri=True)
            connection.execute("SELECT id, command, state, run_after, started_at FROM jobs LIMIT 0"
                               ).close()
            connection.close()
        except self.sqlite3.Error as error:
            raise storage_error(self.path, error)

    @contextmanager
    def in_turn(self):
        """Within the block the lock is ours."""
        if self.turn:
            self.turn.take(self.patience_s)
        try:
            yield
        finally:
            if self.turn:
                self.turn.release()

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
        def action():
            if self.place and self.turn is None:
                self.turn = Turn(self.place, self.door)
            with self.sync_mutex, self.mutex, self.in_turn():
                self.disconnect()
                try:
                    self.connect()
                    if self.failed > self.synced:  # what is on no disk yet
                        self.query("PRAGMA wal_checkpoint")
                except self.sqlite3.Error as error:
                    raise storage_error(self.path, error)
        self.patiently(action)

    def connect(self):
        if self.place and not self.place.exists():
            os.close(open_private(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        uri = sqlite_uri(self.path) if self.place else self.path
        self.connection = self.sqlite3.connect(uri, timeout=BUSY_S, isolation_level=None,
                                               uri=bool(self.place), check_same_thread=False)
        self.cursor, self.broken = self.connection.cursor(), False
        version = self.value("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise StorageError("%s was made by a newer queuectl (schema %d, this is %s with %d);"
                               " use that one" % (self.path, version, VERSION, len(MIGRATIONS)))
        if version < len(MIGRATIONS):
            self.migrate(version)
        for pragma in ("synchronous = NORMAL", "wal_autocheckpoint = 4000",
                       "journal_size_limit = 8388608", "temp_store = MEMORY"):
            self.query("PRAGMA " + pragma)
        if self.place:
            self.query("SELECT 1 FROM jobs LIMIT 1")  # opens -wal
            self.file = os.lstat(self.path)
            self.wal = os.open(self.path + "-wal", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.changes = None
        self.refresh()

    def migrate(self, version):
        """Bring the schema up to date, while no daemon runs."""
        held = None
        if self.place:
            try:
                held = self.place.hold_daemon(0)
            except Failure as error:
                raise StorageError("%s has an older schema, which only changes while no daemon"
                                   " runs; restart it: queuectl daemon stop, worker start (%s)"
                                   % (self.path, error))
        try:
            self.query("PRAGMA page_size = 1024")  # a new file's: whole pages are written
            if self.place and self.value("PRAGMA journal_mode = WAL") != "wal":
                raise StorageError("%s can't use WAL; check its file system" % self.path)
            for number in range(version, len(MIGRATIONS)):
                self.query("BEGIN IMMEDIATE")
                try:
                    for statement in MIGRATIONS[number]:
                        self.query(statement)
                    self.query("PRAGMA user_version = %d" % (number + 1))
                    self.query("SELECT %s FROM jobs LIMIT 0" % COLUMNS)
                    self.query("COMMIT")
                except BaseException:
                    self.rollback()
                    raise
        finally:
            if held is not None:
                os.close(held)

    def disconnect(self):
        """Close what is open. The cursor first: while one lives, so do the connection's files."""
        for closes in (self.cursor, self.connection):
            if closes is not None:
                with suppress(self.sqlite3.Error):
                    closes.close()
        if self.wal is not None:
            os.close(self.wal)
        self.connection = self.cursor = self.wal = None

    def close(self):
        """In turn: the last connection copies the -wal into the database and removes it. To use the
        Store again opens it again."""
        with suppress(Busy), self.in_turn():
            self.disconnect()
        self.disconnect()
        if self.turn:
            self.turn.close()
        self.turn, self.broken = None, True

    # -- transactions

    @contextmanager
    def transaction(self):
        """All or nothing, in turn. Busy if another process keeps its lock beyond our patience."""
        if self.broken:
            self.reopen()
        with self.mutex:
            self.patiently(self.begin)
            try:
                yield
                self.check_file()
                self.execute("COMMIT")
                self.commits += 1
            except BaseException:
                self.rollback()
                raise
            finally:
                self.owner = None
                if self.turn:
                    self.turn.release()

    def begin(self):
        """Take the turn, then SQLite's own lock; if another program has that, let others go on."""
        if self.turn:
            self.turn.take(self.patience_s)
        self.owner = self.thread()
        try:
            self.execute("BEGIN IMMEDIATE")
            self.refresh()
        except BaseException:
            self.rollback()
            self.owner = None
            if self.turn:
                self.turn.release()
            raise

    def rollback(self):
        """Undo; after trouble of SQLite's own the connection isn't used again."""
        try:
            if self.connection.in_transaction:
                self.cursor.execute("ROLLBACK")
        except self.sqlite3.Error:
            self.broken = True

    def check_file(self):
        """Raise unless the path still leads to the file that is open: SQLite writes on into a
        deleted one in silence."""
        if self.file is None:
            return
        with suppress(OSError):
            status = os.lstat(self.path)
            if os.path.samestat(status, self.file) and status.st_size:
                return
        raise StorageError("%s was removed, emptied or replaced in use; nothing more is stored in"
                           " it; put it back, and restart the daemon" % self.path)

    def sync(self):
        """Return once all that was committed before is on the disk. One sync serves all threads
        that wait for it; its error refuses them all, since Linux tells it once."""
        wanted = self.commits
        with self.sync_mutex:
            if self.turn is None or self.synced >= wanted > self.failed:
                return
            upto = self.commits
            try:
                if wanted <= self.failed or not os.fstat(self.wal).st_nlink:
                    raise OSError(errno.EIO, "disk I/O error: its -wal is not on the disk")
                getattr(os, "fdatasync", os.fsync)(self.wal)
                self.synced = upto
            except OSError as error:
                self.failed, self.broken = upto, True
                raise storage_error(self.path, error)

    def execute(self, sql, values=()):
        try:
            return self.cursor.execute(sql, values)
        except self.sqlite3.Error as error:
            raise storage_error(self.path, error)

    def query(self, sql, values=()):
        """All rows: an open cursor would hide others' writes."""
        if self.broken and self.owner != self.thread():
            self.reopen()
        with self.mutex:
            try:
                return self.cursor.execute(sql, values).fetchall()
            except self.sqlite3.Error as error:
                raise storage_error(self.path, error)

    def value(self, sql, values=()):
        """The first column of the first row, or None."""
        rows = self.query(sql, values)
        return rows[0][0] if rows else None

    def write(self, sql, values=()):
        """The number of rows written."""
        return self.execute(sql, values).rowcount

    def write_all(self, sql, rows):
        try:
            self.cursor.executemany(sql, rows)
        except self.sqlite3.Error as error:
            raise storage_error(self.path, error)

    # -- settings, pause, answers

    def refresh(self):
        """Read the settings if they have changed. What is missing, NULL or nonsense has its
        default."""
        changes = self.value("SELECT changes FROM totals")
        if changes == self.changes:
            return
        stored = dict(self.query("SELECT key, value FROM config WHERE value IS NOT NULL"))
        self.paused = stored.pop("paused", None)
        self.settings = {key: setting.default for key, setting in SETTINGS.items()}
        for key, value in stored.items():
            with suppress(Failure):
                self.settings[key] = read_setting(key, value)
        self.changes = changes

    def configure(self, key, value):
        """Store a setting, as text by the column's type; None: its default."""
        self.write("INSERT OR REPLACE INTO config (key, value) VALUES (?, ?)", (key, value))
        self.write("UPDATE totals SET changes = changes + 1")
        self.refresh()

    def recall(self, once):
        """The answer given to the change `once`, or None."""
        return self.value("SELECT answer FROM answers WHERE once = ?", (once,))

    def remember(self, once, answer):
        self.write("INSERT INTO answers (once, answer) VALUES (?, ?)", (once, answer))
        self.write("DELETE FROM answers WHERE number <= (SELECT MAX(number) FROM answers) - ?",
                   (ANSWERS,))

    def note_startup(self, now):
        self.write("INSERT INTO metrics (daemon_startup, total_commands) VALUES (?, 0)",
                   (iso(now),))

    def count_command(self):
        self.write("""UPDATE metrics SET total_commands = total_commands + 1
                      WHERE id = (SELECT MAX(id) FROM metrics)""")

    # -- jobs coming in

    def insert(self, jobs):
        """(new) -> pending. The caller has seen that the ids are free."""
        self.write_all("INSERT INTO jobs (%s) VALUES (%s)" % (COLUMNS, marks(Job._fields)), jobs)
        for job in jobs:
            self.hold_key(job)

    def hold_key(self, job):
        """From now on the unique key that it has is its own."""
        if job.unique and not self.write("UPDATE unique_keys SET job = ? WHERE key = ?",
                                         (job.id, job.unique)):
            self.write("INSERT INTO unique_keys (key, job) VALUES (?, ?)", (job.unique, job.id))

    def holder(self, key):
        """The id of the unfinished job that holds the unique key, or None."""
        return self.value("""SELECT jobs.id
                             FROM unique_keys JOIN jobs ON jobs.id = unique_keys.job
                             WHERE unique_keys.key = ? AND jobs."unique" = unique_keys.key
                               AND jobs.state IN ('pending', 'processing', 'failed')""", (key,))

    def has_strangers(self):
        """Whether there are rows of another program to be checked."""
        return self.value("SELECT EXISTS (SELECT 1 FROM jobs WHERE due = 0)") == 1

    def strangers(self):
        """[(rowid, Job)] inserted by another program, some at a time."""
        self.connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        try:
            rows = self.query("SELECT rowid, %s FROM jobs WHERE due = 0 LIMIT ?" % LOOK, (STEP,))
        finally:
            self.connection.text_factory = str
        return [(row[0], Job._make(row[1:])) for row in rows]

    def adopt(self, rowid, job):
        """(new) -> pending, or whatever state another program gave its row."""
        self.write("UPDATE jobs SET %s WHERE rowid = ?" % ", ".join(
            "[%s] = ?" % name for name in Job._fields), (*job, rowid))

    # -- jobs coming due

    def promote(self, now):
        """Make due jobs ready, so many at a time; the number of them."""
        return self.write("""UPDATE jobs SET ready = 1, due = NULL
                             WHERE rowid IN (SELECT rowid FROM jobs
                                             WHERE due > 0 AND due <= :now
                                             ORDER BY due LIMIT :most)""",
                          {"now": now, "most": STEP})

    def next_due(self):
        """ms when the next job comes due; the end of all dates if none does."""
        # The upper bound leaves out texts of another program: to SQLite they exceed all numbers.
        return self.value("""SELECT COALESCE(MIN(due), :last) FROM jobs
                             WHERE due > 0 AND due < :last""", {"last": LAST_MS})

    def pull_in(self, now):
        """Backoffs that reach further than `max-delay` come from a clock that was set back."""
        return self.write("""UPDATE jobs SET due = :now
                             WHERE rowid IN (SELECT rowid FROM jobs INDEXED BY jobs_finished
                                             WHERE state = 'failed' AND due > :latest)""",
                          {"now": now, "latest": now + self.settings["max-delay"]})

    def claimable(self, most):
        """How many jobs a worker could claim now, counted up to `most`."""
        if self.paused is not None:
            return 0
        return self.value("SELECT COUNT(*) FROM (SELECT 1 FROM jobs WHERE ready = 1 LIMIT ?)",
                          (most,))

    # -- attempts

    def claim(self, slot, boot, now, only=None):
        """pending or failed -> processing: the Claim of the first ready job by priority, then age
        (of the ids `only`: of one that is due, too), or None."""
        if self.paused is not None:
            return None
        which = "ready = 1" if only is None else (
            "id IN (%s) AND (ready = 1 OR due > 0 AND due <= %d)" % (marks(only), now))
        rows = self.query("""SELECT rowid, id, runs + 1, attempts, max_retries, timeout, command,
                                    cwd, env, environ, own, "unique"
                             FROM jobs
                             WHERE %s
                               AND NOT EXISTS (SELECT 1 FROM running WHERE running.job = jobs.id)
                             ORDER BY priority DESC, rowid
                             LIMIT 1""" % which, tuple(only or ()))
        if not rows:
            return None
        rowid, job, number = rows[0][:3]
        serial = self.execute(
            "INSERT INTO running (job, slot, boot, started_at) VALUES (?, ?, ?, ?)",
            (job, slot, boot, now)).lastrowid
        stamp = iso(now)
        self.write("""UPDATE jobs
                      SET state = 'processing', ready = NULL, due = NULL, serial = ?, runs = ?,
                          locked_at = ?, started_at = ?, updated_at = ?
                      WHERE rowid = ?""", (serial, number, stamp, stamp, stamp, rowid))
        return Claim(serial, slot, boot, now, None, *rows[0][1:])

    def open_claims(self, slot=None, job=None):
        """The Claims of all open attempts, of the one in a slot, or of the one of a job."""
        return [Claim._make(row) for row in self.query(
            """SELECT running.serial, running.slot, running.boot, running.started_at, running.wish,
                      running.job, jobs.runs, COALESCE(jobs.attempts, 0), jobs.max_retries,
                      jobs.timeout, jobs.command, jobs.cwd, jobs.env, NULL, jobs.own, jobs."unique"
               FROM running LEFT JOIN jobs
                 ON jobs.id = running.job AND jobs.serial = running.serial
               WHERE (:slot IS NULL OR running.slot = :slot)
                 AND (:job IS NULL OR running.job = :job)
               ORDER BY running.serial""", {"slot": slot, "job": job})]

    def open_slots(self):
        """{slot: wish} of the open attempts."""
        return dict(self.query("SELECT slot, wish FROM running"))

    def is_open(self, serial):
        """Whether the attempt has yet to be recorded."""
        return bool(self.query("SELECT 1 FROM running WHERE serial = ?", (serial,)))

    def wish(self, serial):
        """What somebody wishes of the open attempt: None, "cancel" or "give back"."""
        return self.value("SELECT wish FROM running WHERE serial = ?", (serial,))

    def wish_end(self, wish, *, jobs=(), slots=()):
        """Note the wish on the open attempts of these jobs, or in these slots. A cancel replaces a
        give back, never the reverse."""
        self.write_all("""UPDATE running SET wish = :wish
                          WHERE job = :job AND (wish IS NULL OR :wish = 'cancel')""",
                       [{"wish": wish, "job": job} for job in jobs])
        self.write_all("UPDATE running SET wish = ? WHERE slot = ? AND wish IS NULL",
                       [(wish, slot) for slot in slots])

    def raise_serial(self, serial):
        """Give no attempt a number up to `serial`."""
        self.write("UPDATE sqlite_sequence SET seq = MAX(seq, ?) WHERE name = 'running'",
                   (serial,))

    def finish(self, claim, verdict, outcome, worker):
        """processing -> completed, failed, dead or cancelled, with the attempt's record. Whether the
        job was still there: another program may have deleted it."""
        self.write("DELETE FROM running WHERE serial = ?", (claim.serial,))
        status, ended = outcome.status, iso(outcome.ended_at)
        code = status if status is not None and status >= 0 and not outcome.reason else None
        over = verdict.state in FINISHED
        if not self.write("""UPDATE jobs
                             SET state = ?, attempts = ?, due = ?,
                                 run_after = COALESCE(?, run_after), exit_code = ?, error = ?,
                                 finished_at = ?, updated_at = ?, locked_at = NULL, serial = NULL
                             WHERE id = ? AND serial = ?""", (
                verdict.state, verdict.attempts, verdict.due, iso(verdict.due), code,
                verdict.error, ended if over else None, ended, claim.job, claim.serial)):
            return False
        self.write("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
            claim.serial, claim.job, claim.number, worker, iso(claim.started_at), ended, code,
            signal_name(-status) if status is not None and status < 0 else None, verdict.error,
            outcome.dropped, outcome.output or None))
        done = verdict.state == "completed"
        ms = max(outcome.ended_at - claim.started_at, 0) if done else 0
        self.write("""UPDATE totals
                      SET jobs_completed = jobs_completed + ?, jobs_died = jobs_died + ?,
                          failed_attempts = failed_attempts + ?, runtime_ms = runtime_ms + ?,
                          longest_ms = MAX(longest_ms, ?)""",
                   (done, verdict.state == "dead", not done, ms, ms))
        if done and claim.unique:
            self.write("UPDATE unique_keys SET completed = ? WHERE key = ?",
                       (outcome.ended_at, claim.unique))
        return True

    def give_back(self, claim, verdict, now):
        """processing -> pending or failed, as it was: the attempt does not count."""
        self.write("DELETE FROM running WHERE serial = ?", (claim.serial,))
        self.write("""UPDATE jobs
                      SET state = ?, ready = 1, runs = runs - 1, updated_at = ?,
                          locked_at = NULL, serial = NULL
                      WHERE id = ? AND serial = ?""",
                   (verdict.state, iso(now), claim.job, claim.serial))

    def cancel(self, job_id, now):
        """pending or failed -> cancelled."""
        stamp = iso(now)
        self.write("""UPDATE jobs
                      SET state = 'cancelled', error = 'cancelled', ready = NULL, due = NULL,
                          finished_at = ?, updated_at = ?
                      WHERE id = ? AND state IN ('pending', 'failed')""", (stamp, stamp, job_id))

    def requeue(self, job, now):
        """Any end, or failed -> pending, its attempts back at 0 and, where it brought none of its
        own, the present settings."""
        stamp = iso(now)
        self.write("""UPDATE jobs
                      SET state = 'pending', attempts = 0, ready = 1, due = NULL, run_after = ?,
                          updated_at = ?, finished_at = NULL, exit_code = NULL, error = NULL,
                          timeout = ?, max_retries = ?
                      WHERE id = ? AND state NOT IN ('pending', 'processing')""", (
            stamp, stamp, job.timeout if job.own & OWN_TIMEOUT else self.settings["timeout"],
            job.max_retries if job.own & OWN_RETRIES else self.settings["max-retries"], job.id))
        self.hold_key(job)

    def hasten(self, job_id, now):
        """A failed job is tried now."""
        self.write("""UPDATE jobs SET ready = 1, due = NULL, run_after = ?
                      WHERE id = ? AND state = 'failed'""", (iso(now), job_id))

    def delete(self, ids):
        self.write_all("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in ids])

    def expired(self, now):
        """The ids of completed jobs older than the `retention`, some at a time."""
        kept = self.settings["retention"]
        return [row[0] for row in self.query(
            """SELECT id FROM jobs INDEXED BY jobs_finished
               WHERE state = 'completed' AND finished_at < ? LIMIT ?""",
            (iso(max(now - max(kept, KEEP_MS), 0)), STEP))] if kept else []

    # -- looking: needs no turn

    def job(self, job_id):
        """The Job, or None."""
        rows = self.query("SELECT %s FROM jobs WHERE id = ?" % LOOK, (job_id,))
        return Job._make(rows[0]) if rows else None

    def ids_like(self, prefix):
        """The ids, two at the most, that begin with `prefix`; an exact one alone."""
        if self.job(prefix):
            return [prefix]
        return [row[0] for row in self.query("SELECT id FROM jobs WHERE id >= ? AND id < ? LIMIT 2",
                                             (prefix, prefix + "\U0010ffff"))]

    def select(self, states=(), match=None, before=None, limit=None):
        """The rowids, oldest first, of the jobs in these states (none given: in all), with `match`
        in their id or command, that ended before a date: the newest `limit` of them."""
        import array
        where, values = ["1"], []
        if states:
            where.append("state IN (%s)" % marks(states))
            values += states
        if match is not None:
            where.append("(instr(id, ?) OR instr(command, ?))")
            values += [match, match]
        if before is not None:
            where.append("finished_at <= ?")
            values.append(before)
        with self.mutex:
            found = array.array("q", (row[0] for row in self.execute(
                "SELECT rowid FROM jobs WHERE %s ORDER BY rowid DESC LIMIT ?" % " AND ".join(where),
                values + [-1 if limit is None else limit])))
        found.reverse()
        return found

    def jobs(self, rowids):
        """The Jobs in these rows, page by page; those deleted meanwhile are left out."""
        for at in range(0, len(rowids), PAGE):
            page = rowids[at:at + PAGE]
            for row in self.query("SELECT %s FROM jobs WHERE rowid IN (%s) ORDER BY rowid"
                                  % (LOOK, marks(page)), page.tolist()):
                yield Job._make(row)

    def states(self, ids):
        """[(id, state, exit_code, error)] of those of the jobs (PAGE at the most) that exist."""
        return self.query("SELECT id, state, exit_code, error FROM jobs WHERE id IN (%s)"
                          % marks(ids), ids)

    def first(self, where, values, order, limit):
        """The Jobs where that holds, so many of them in that order."""
        return [Job._make(row) for row in self.query(
            "SELECT %s FROM jobs %s ORDER BY %s LIMIT %d" % (LOOK, where, order, limit), values)]

    def last_deaths(self, limit):
        """The Jobs that died last, latest first."""
        return self.first("INDEXED BY jobs_finished WHERE state = 'dead'", (),
                          "finished_at DESC", limit)

    def next_retries(self, limit):
        """The failed Jobs that are tried next."""
        return self.first("INDEXED BY jobs_due WHERE due > 0 AND +state = 'failed'", (), "due",
                          limit)

    def unsettled(self, now):
        """Whether jobs run, are ready or wait for another try; not for the time a user gave."""
        return self.value("""SELECT EXISTS (SELECT 1 FROM running)
                                 OR (? AND EXISTS (SELECT 1 FROM jobs WHERE ready = 1))
                                 OR EXISTS (SELECT 1 FROM jobs WHERE due >= 0 AND due <= ?)
                                 OR EXISTS (SELECT 1 FROM jobs WHERE state = 'failed')""",
                          (self.paused is None, now)) == 1

    def attempts(self, job_id):
        """[dict] of the job's closed attempts, first to last."""
        names = ATTEMPT + ["serial", "output_cut", "output_kept"]
        return [dict(zip(names, row)) for row in self.query(
            """SELECT number, worker, started_at, finished_at, exit_code, signal, error, serial,
                      dropped, COALESCE(length(output), 0)
               FROM attempts WHERE job = ? ORDER BY serial""", (job_id,))]

    def output(self, serial, start, limit):
        """`limit` bytes from `start` on of the output kept of a closed attempt."""
        return bytes(self.value("SELECT substr(output, ?, ?) FROM attempts WHERE serial = ?",
                                (start + 1, limit, serial)) or b"")

    def totals(self):
        """{column: number} of the table totals: jobs by state, and what was counted so far."""
        rows = self.query("SELECT * FROM totals")
        return dict(zip((column[0] for column in self.cursor.description), rows[0]))

    def counts(self):
        """{state: number of jobs}"""
        totals = self.totals()
        return {state: totals[state] for state in STATES if totals[state] or state != "cancelled"}

    def total_commands(self):
        return self.value("SELECT SUM(total_commands) FROM metrics") or 0

    def size(self):
        """Bytes on the disk, with what waits in the WAL."""
        total = 0
        for name in (self.path, self.path + "-wal"):
            with suppress(OSError):
                total += os.lstat(name).st_size
        return total

    def ready_since(self, now):
        """ms since when the one of the ready jobs that waits longest could have started, or None.
        No index has these times: the first in line of each priority are looked at."""
        levels, times = [1001], []
        while levels[-1] is not None:
            levels.append(self.value(
                "SELECT MAX(priority) FROM jobs WHERE ready = 1 AND priority < ?", (levels[-1],)))
        for level in levels[1:-1]:
            times.append(parse_date(self.value(
                """SELECT MIN(MAX(created_at, run_after))
                   FROM (SELECT created_at, run_after FROM jobs
                         WHERE ready = 1 AND priority = ?
                         ORDER BY rowid LIMIT ?)""", (level, LOOKED_AT // len(levels)))))
        due = self.next_due()
        return min(times + [due] * (due <= now), default=None)

    def completed_at(self, name, since):
        """ms of the last completion of a job whose id begins with `name`, or whose unique key is
        that, or None; where many are called so, none before `since` is looked for."""
        span = (name, name + "\U0010ffff")
        if self.value("SELECT COUNT(*) FROM (SELECT 1 FROM jobs WHERE id >= ? AND id < ? LIMIT ?)",
                      span + (LOOKED_AT,)) < LOOKED_AT:
            ended = self.value("""SELECT MAX(finished_at) FROM jobs
                                  WHERE id >= ? AND id < ? AND +state = 'completed'""", span)
        else:
            ended = self.value("""SELECT finished_at FROM jobs INDEXED BY jobs_finished
                                  WHERE state = 'completed' AND finished_at >= ?
                                    AND id >= ? AND id < ?
                                  ORDER BY finished_at DESC LIMIT 1""", (iso(since),) + span)
        by_key = self.value("SELECT completed FROM unique_keys WHERE key = ?", (name,))
        return max(filter(None, (by_key, ended and parse_date(ended))), default=None)

    # -- for `doctor` and `backup`

    def integrity(self):
        """Lines of what is damaged; [] when nothing is."""
        return [row[0] for row in self.query("PRAGMA integrity_check(3)") if row[0] != "ok"]

    def copy(self, target):
        """Copy the database, as it is at one moment, into the empty file `target`; the number of
        jobs. Rows keep their order; indexes and triggers come when all rows are there."""
        # Not Connection.backup: 3.6 has none.
        self.connection.set_progress_handler(lambda: None, 10000)  # or a signal would have to wait
        self.query("ATTACH ? AS copy", (sqlite_uri(target),))
        for pragma in ("page_size = 1024", "journal_mode = OFF", "synchronous = OFF"):
            self.query("PRAGMA copy." + pragma)
        self.query("BEGIN")
        made = self.query("""SELECT type, name, sql FROM main.sqlite_master
                             WHERE sql IS NOT NULL AND name NOT GLOB 'sqlite_stat*'
                             ORDER BY type = 'table' DESC, rowid""")
        into = re.compile(r"(CREATE (?:TABLE|UNIQUE INDEX|INDEX|TRIGGER)) ")
        for kind, name, sql in made:
            quoted = '"%s"' % name.replace('"', '""')
            if name != "sqlite_sequence":  # there as soon as it is needed
                self.query(into.sub(r"\1 copy.", sql, 1))
            if kind == "table":
                self.query("DELETE FROM copy." + quoted)  # sqlite_sequence counted along
                self.query("INSERT INTO copy.%s SELECT * FROM main.%s" % (quoted, quoted))
        self.query("PRAGMA copy.user_version = %d" % self.value("PRAGMA main.user_version"))
        self.query("COMMIT")
        if self.query("PRAGMA copy.integrity_check") != [("ok",)]:
            raise StorageError("the copy in %s is damaged; check that disk" % target)
        return self.value("SELECT COUNT(*) FROM copy.jobs")


def sqlite_version():
    import sqlite3
    return sqlite3.sqlite_version_info


# ---- Requests -----------------------------------------------------------------------------------
# What a request does, the same in the daemon's server and in a command: plain values in, an answer
# out. What changes the queue runs inside a transaction. And the looks that the wire knows.

# now: ms; served: whether a daemon performs it
Context = collections.namedtuple("Context", "store now served")

# defaults: of its arguments, as the function has them after the context; bare: the one that a
# `value` by itself stands for
Operation = collections.namedtuple("Operation", "function defaults bare changes")
OPERATIONS = {}  # (command, option) -> Operation


def operation(command, option=None, *, changes=True):
    def register(function):
        names = function.__code__.co_varnames[1:function.__code__.co_argcount]
        OPERATIONS[command, option] = Operation(
            function, dict(zip(names, function.__defaults__ or ())), names[0] if names else None,
            changes)
        return function
    return register


def reply(message, **more):
    return dict(success=True, message=message, **more)


ARGUMENTS = {  # name -> its check, whatever the operation is; other names those check themselves
    "state": lambda value: one_of(value, STATES),
    "count": number_from(1, MAX_WORKERS),
    "reason": as_text,
}


def versions(request):
    """Both sides' versions, for those that don't understand each other."""
    return "daemon: queuectl %s, request: %s" % (
        VERSION, str(request.get("version", "unversioned"))[:20])


def resolve(request):
    """(Operation, {argument: value}) that a request stands for; Failure when it makes none."""
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise Failure('a request is an object like {"command":"status"}')
    command, option = request["command"], request.get("option") or None
    flag, value = request.get("flag"), request.get("value")
    if command == "config" and option in (None, "set") and flag:  # as the original has it
        option, flag, value = "set", None, {"key": flag, "value": value}
    try:
        found = OPERATIONS[command, option]
    except (KeyError, TypeError):
        raise Failure("unknown command %s (%s); known are %s" % (
            compact([command, option])[:80], versions(request),
            ", ".join(sorted(" ".join(filter(None, key)) for key in OPERATIONS))))
    if flag is not None:
        arguments = {str(flag).lstrip("-").replace("-", "_"): value}
    elif isinstance(value, dict):
        arguments = value
    else:
        arguments = {} if value is None else {found.bare: value}
    given = {}
    for name, value in arguments.items():
        if name not in found.defaults:
            raise Failure("%s takes no %s (%s)" % (
                command, "value" if name is None else "argument " + str(name)[:80],
                versions(request)))
        if value is not None:
            given[name] = checked(name, ARGUMENTS[name], value) if name in ARGUMENTS else value
    return found, given


def perform(store, request, served=False, committed=lambda: None):
    """The answer to a request; Failure if it is refused. A change that was made before is only
    answered again. `committed()` is called once it is made, before it is on the disk."""
    found, arguments = resolve(request)
    if not found.changes:
        return found.function(Context(store, now_ms(), served), **arguments)
    once = request.get("once")
    once = once if is_text(once) else None
    with store.transaction():
        answered = once and store.recall(once)
        if answered:
            answer = json.loads(answered)
        else:
            context = Context(store, now_ms(), served)
            adopt_strangers(store, context.now)
            answer = found.function(context, **arguments)
            if served:
                store.count_command()
            if once:
                store.remember(once, compact(answer))
    committed()
    store.sync()
    return answer


# -- what happens to jobs

def known_job(store, job_id):
    job = store.job(job_id) if is_text(job_id) else None
    if job is None:
        raise Failure("no job %s; see: queuectl list" % str(job_id)[:128])
    return job


def on_job_death(store, job_id, now):
    """Enqueue the `on-dead` line for a job that has just died; its own death enqueues nothing.
    Returns the new job's id or None."""
    line = store.settings["on-dead"]
    job = store.job(job_id) if line else None
    if job is None or job.own & ON_DEAD:
        return None

    def fitting(text, size):
        return (text or "").replace("\0", "").encode()[:size].decode("utf-8", "ignore")
    new = make_job({"command": line, "env": {
        "QUEUECTL_DEAD_ID": job.id,
        "QUEUECTL_DEAD_ERROR": fitting(job.error, 1000),
        "QUEUECTL_DEAD_COMMAND": fitting(job.command, MAX_DEAD_COMMAND)}},
        store.settings, now, new_ids(now)[0])
    store.insert([new._replace(own=ON_DEAD)])
    return new.id


def adopt_strangers(store, now):
    """Make rows that another program inserted jobs like any other; the number of them. One whose id
    has an open attempt waits until that is recorded."""
    count = 0
    for rowid, row in store.strangers() if store.has_strangers() else ():
        job = adopted(row, store.settings, now)
        if job.id != row.id and store.job(job.id):
            job = job._replace(id=new_ids(now)[0])
        if not store.open_claims(job=job.id):
            store.adopt(rowid, job)
            count += 1
            if job.state == "dead" != row.state:
                on_job_death(store, job.id, now)
    return count


def record(store, claim, outcome, worker, now):
    """Store what became of an attempt: (Verdict, id of the job enqueued by a death or None); None
    if it was recorded before."""
    if not store.is_open(claim.serial):
        return None
    spread = int.from_bytes(os.urandom(2), "big") / 32767.5 - 1
    verdict = decide(claim._replace(wish=store.wish(claim.serial)), outcome, store.settings, now,
                     spread)
    if outcome.reason in GIVEN_BACK and verdict.state in ("pending", "failed"):
        store.give_back(claim, verdict, now)
        return verdict, None
    there = store.finish(claim, verdict, outcome, worker)
    return verdict, (on_job_death(store, claim.job, now)
                     if there and verdict.state == "dead" else None)


# -- changes

def notes(context):
    """What an answer tells of that keeps a new job from running: "paused", or "workers" 0."""
    store = context.store
    if store.paused is not None:
        return {"paused": store.paused}
    return {"workers": 0} if context.served and not store.settings["workers"] else {}


def store_jobs(context, given, cwd, environ):
    """Store the jobs that these objects make, all or none: ([id, or that of the unfinished job
    which holds its unique key], how many are new). A Failure's `index` tells which is wrong."""
    store, spare_ids = context.store, new_ids(context.now, len(given))
    new, told, keys = {}, [], {}
    for index, fields in enumerate(given):
        try:
            job = make_job(fields, store.settings, context.now, spare_ids[index])
            holder = job.unique and (keys.get(job.unique) or store.holder(job.unique))
            if not holder and (job.id in new or fields.get("id") and store.job(job.id)):
                raise Failure("job id %s is taken; choose another, or leave it out" % job.id)
        except StorageError:
            raise
        except Failure as error:
            error.details["index"] = index
            raise
        told.append(holder or job.id)
        if not holder:
            new[job.id] = job._replace(cwd=job.cwd or cwd, environ=environ)
            keys[job.unique] = job.id
    store.insert(list(new.values()))
    return told, len(new)


def as_environ(value):
    """The JSON text of a caller's environment; its bytes that are no UTF-8 are lone surrogates."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("must be an object of text to text")
    return compact(value)


@operation("enqueue")
def op_enqueue(context, job=None, cwd=None, environ=None):
    """Store one job, given as JSON text or as an object."""
    given = decode_json(job, "the job") if isinstance(job, str) else job
    environ = environ and checked("environ", as_environ, environ)
    (job_id,), stored = store_jobs(context, [given], cwd and checked("cwd", as_cwd, cwd), environ)
    return reply("Job enqueued" if stored else "Job already queued", id=job_id, **notes(context))


@operation("enqueue", "batch")
def op_enqueue_batch(context, jobs=(), cwd=None):
    """Store all of the jobs, or none."""
    if not isinstance(jobs, list) or len(jobs) > BATCH_JOBS:
        raise Failure("jobs must be a list of at most %d" % BATCH_JOBS)
    told, stored = store_jobs(context, jobs, cwd and checked("cwd", as_cwd, cwd), None)
    return reply("Enqueued %s" % plural(stored, "job"), ids=told, count=stored, **notes(context))


def for_each(context, ids, skip, act):
    """(ids, refusals): have act(job) done to each of the named jobs, to all or to none; with `skip`
    those that it refuses by a Failure are left out."""
    ids = [ids] if isinstance(ids, str) else ids
    if not isinstance(ids, list) or not 0 < len(ids) <= STEP:
        raise Failure("name the jobs, 1 to %d of them" % STEP)
    done, refused = [], []
    for job_id in dict.fromkeys(map(str, ids)):
        try:
            act(known_job(context.store, job_id))
            done.append(job_id)
        except Failure as error:
            if not skip or isinstance(error, StorageError):
                raise
            refused.append(str(error))
    return done, refused


def counted(done, word, refused):
    """The answer for what was done to jobs."""
    named = "Job " + done[0] if len(done) == 1 else plural(len(done), "job")
    return reply("%s %s" % (named, word), count=len(done), refused=refused)


def expect(job, states):
    if job.state not in states:
        raise Failure("job %s is %s, not %s; see: queuectl show %s" % (job.id, job.state,
                                                              " or ".join(states), job.id))


def requeue(context, job):
    """Put a job that has ended back, unless another holds its unique key."""
    holder = job.unique and context.store.holder(job.unique)
    if holder:
        raise Failure("job %s can't be retried: its unique key is held by job %s; wait for that, or"
                      " cancel it" % (job.id, holder))
    context.store.requeue(job, context.now)


@operation("dlq", "retry")
def op_dlq_retry(context, ids=(), skip=False):
    """Queue dead jobs again."""
    def act(job):
        expect(job, ("dead",))
        requeue(context, job)
    done, refused = for_each(context, ids, skip, act)
    return counted(done, "added to queue", refused)


@operation("retry")
def op_retry(context, ids=(), skip=False):
    """Queue jobs that have ended again, have failed ones tried now; leave those that wait or run."""
    def act(job):
        if job.state in FINISHED:
            requeue(context, job)
        elif job.state == "failed":
            context.store.hasten(job.id, context.now)
    done, refused = for_each(context, ids, skip, act)
    return counted(done, "added to queue", refused)


@operation("cancel")
def op_cancel(context, ids=(), skip=False):
    """Make waiting jobs cancelled; wish that of running ones."""
    def act(job):
        expect(job, UNFINISHED)
        if job.state == "processing":
            context.store.wish_end("cancel", jobs=[job.id])
        else:
            context.store.cancel(job.id, context.now)
    done, refused = for_each(context, ids, skip, act)
    return counted(done, "cancelled", refused)


@operation("delete")
def op_delete(context, ids=(), skip=False):
    """Delete jobs that have ended."""
    def act(job):
        expect(job, FINISHED)
        context.store.delete([job.id])
    done, refused = for_each(context, ids, skip, act)
    return counted(done, "deleted", refused)


@operation("pause")
def op_pause(context, reason=""):
    """Start nothing new until `resume`."""
    context.store.configure("paused", reason or "paused")
    return reply("Queue paused")


@operation("resume")
def op_resume(context):
    paused = context.store.paused is not None
    context.store.configure("paused", None)
    return reply("Queue resumed" if paused else "Queue was not paused")


@operation("config", "set")
def op_config_set(context, key=None, value=None):
    setting_of(key)
    text = value if isinstance(value, str) else compact(value)
    stored = read_setting(key, text)
    context.store.configure(key, None if text.strip() == "default" else stored)
    return reply("Updated %s to %s" % (key, text), value=stored)


@operation("worker", "start")
def op_worker_start(context, count=1):
    """Want so many workers more. Without a daemon nobody would start them."""
    if not context.served:
        raise NoDaemon("no daemon runs for %s; start one with: queuectl worker start" % context.store.path)
    wanted = context.store.settings["workers"] + count
    if wanted > MAX_WORKERS:
        raise Failure("at most %d workers; %d are wanted already" % (MAX_WORKERS, wanted - count))
    context.store.configure("workers", wanted)
    return reply("Started %s" % plural(count, "worker"), wanted=wanted)


@operation("worker", "stop")
def op_worker_stop(context, count=None, now=False):
    """Want so many workers fewer (None: none at all); `now`: their jobs are to be given back."""
    store = context.store
    wanted = store.settings["workers"]
    left = 0 if count is None else max(wanted - count, 0)
    store.configure("workers", left)
    if now:
        store.wish_end("give back", slots=[slot for slot in store.open_slots()
                                           if left < slot <= MAX_WORKERS])
    return reply("Stopped workers" if count is None else "Stopped %s"
                 % plural(wanted - left, "worker"), wanted=left)


# -- looks

def status_of(store):
    """{"jobs", "workers"}, and "paused" in a pause."""
    told = {"jobs": store.counts(), "workers": len(store.place.slots()) if store.place else 0}
    store.refresh()
    return told if store.paused is None else dict(told, paused=store.paused)


def daemon_of(store):
    """What the daemon of a Store's queue noted of itself; {} without one."""
    return store.place.daemon() if store.place else {}


def workers_of(store, now):
    """[dict] of the workers; `since`: of its job, or of its leisure."""
    store.refresh()
    claims, found = {claim.slot: claim for claim in store.open_claims()}, []
    for slot in store.place.slots() if store.place else ():
        path, claim = store.place.file("w.%d" % slot), claims.get(slot)
        since = claim.started_at if claim else now
        with suppress(OSError):
            since = claim.started_at if claim else int(os.stat(path).st_mtime * 1000)
        leaving = store.settings["workers"] < slot <= MAX_WORKERS
        found.append({"pid": read_note(path).get("pid"),
                      "state": "leaving" if leaving else "busy" if claim else "idle",
                      "job": claim and claim.job, "attempt": claim and claim.number,
                      "since": iso(since)})
    return found


def metrics_of(store, now):
    totals, counts, daemon = store.totals(), store.counts(), daemon_of(store)
    done = totals["jobs_completed"]
    uptime_s = max(now - daemon["since"], 0) // 1000 if "since" in daemon else 0
    told = {
        "total_jobs": sum(counts.values()), "completed_jobs": counts["completed"],
        "uptime": "%d min" % (uptime_s // 60), "total_commands": store.total_commands(),
        "average_runtime": round(totals["runtime_ms"] / 1000.0 / done, 3) if done else 0,
        "max_runtime": totals["longest_ms"] / 1000.0,
        "dead_jobs": counts["dead"], "workers_running": len(store.place.slots()) * bool(daemon)
        if store.place else 0, "jobs": counts, "uptime_s": uptime_s,
        "total_runtime": totals["runtime_ms"] / 1000.0, "database_bytes": store.size()}
    for name in ("jobs_enqueued", "jobs_completed", "jobs_died", "failed_attempts"):
        told[name] = totals[name]
    return told


@operation("status", changes=False)
def op_status(context):
    return reply(status_of(context.store))


@operation("list", changes=False)
def op_list(context, state=None):
    """All jobs, or those in a state, as an iterator: they are sent piece by piece."""
    store = context.store
    return reply(job.public() for job in store.jobs(store.select([state] if state else ())))


@operation("dlq", "list", changes=False)
def op_dlq_list(context):
    return op_list(context, "dead")


@operation("config", "get", changes=False)
def op_config_get(context, key=None):
    setting_of(key)
    context.store.refresh()
    return reply(context.store.settings[key])


@operation("config", "list", changes=False)
def op_config_list(context):
    context.store.refresh()
    return reply(dict(context.store.settings))


@operation("worker", "list", changes=False)
def op_worker_list(context):
    return reply(workers_of(context.store, context.now))


@operation("metrics", changes=False)
def op_metrics(context):
    return reply(metrics_of(context.store, context.now))


def about_daemon(store, now):
    """What `daemon status` tells; Failure without one."""
    daemon = daemon_of(store)
    if not daemon:
        raise NoDaemon("no daemon runs for %s; start one with: queuectl worker start" % store.path)
    store.refresh()
    return {"pid": daemon.get("pid"), "version": daemon.get("version"), "db": utf8(store.path),
            "socket": daemon.get("socket"), "uptime_s": max(now - daemon.get("since", now), 0) // 1000,
            "workers": len(store.place.slots()), "wanted": store.settings["workers"]}


@operation("daemon", "status", changes=False)
def op_daemon_status(context):
    return reply(about_daemon(context.store, context.now))


# ---- Running a command --------------------------------------------------------------------------
# One attempt: its run file, its process group, its deadline, its output, and stopping what is left.
#
# Three things speak for an attempt when nobody else can: the lock on its run file, held by whatever
# it left behind; QUEUECTL_RUN in their environment; and what the worker noted in its slot's file:
# its own pid, the serial, the pid of the command's leader, and when that started.

UNSTARTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT,
             errno.EROFS, errno.EIO)  # the host's fault, not the job's: burns no retry
FOR_THE_DAEMON = re.compile(b"LISTEN_|WATCHDOG_|NOTIFY_SOCKET")  # what systemd means for it alone


def job_environment(claim, run_file):
    """What a command finds in its environment: its caller's, or the worker's; the job's; ours."""
    if claim.environ:
        environ = {name.encode("utf-8", "surrogateescape"): text.encode("utf-8", "surrogateescape")
                   for name, text in json.loads(claim.environ).items()}
    else:
        environ = {name: value for name, value in os.environb.items()
                   if not FOR_THE_DAEMON.match(name)}
    environ.update((name.encode(), text.encode()) for name, text in env_of(claim.env).items())
    environ.update({b"QUEUECTL_JOB_ID": claim.job.encode(),
                    b"QUEUECTL_ATTEMPT": b"%d" % (claim.attempts + 1),
                    b"QUEUECTL_RUN": os.fsencode(run_file)})
    return environ


def send(number, group, others):
    """Signal a process group (None: gone), and other processes."""
    for one in (number, signal.SIGCONT) if number == signal.SIGTERM else (number,):
        # a stopped process handles SIGTERM only once it goes on
        with suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(group, one)
        for pid in others:
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != group:
                    os.kill(pid, one)


def stop_rest(run_file, group, leads, mark=None):
    """Return once nothing is left of an attempt: SIGTERM to its process group and to whoever else
    holds its run file or has `mark` in its environment, SIGKILL after the grace. `leads()`, called
    time and again, tells whether the group's leader lives."""
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


def read_running(run_file, offset, limit):
    """(bytes of what a running attempt wrote, from byte `offset` of it on, or from what is left of
    it on; where they start; where all of it ends); None while it is being cut, or gone."""
    with suppress(OSError, ValueError), open(run_file, "rb", buffering=0) as file:
        dropped = int(os.pread(file.fileno(), HEADER, 0))
        data = os.pread(file.fileno(), limit, HEADER + max(offset - dropped, 0))
        end = dropped + os.fstat(file.fileno()).st_size - HEADER
        if 0 <= dropped == int(os.pread(file.fileno(), HEADER, 0)):
            return data, max(offset, dropped), end
    return None


def tail_of(run_file, limit):
    """(the last `limit` bytes of what an attempt wrote, how many came before)."""
    end = (read_running(run_file, 0, 0) or (b"", 0, 0))[2]
    data, start, _ = read_running(run_file, max(end - limit, 0), limit) or (b"", 0, 0)
    return data, start


class Attempt:
    """One run of one command, on its worker's side.

    note      notes {name: value} in the slot's file
    poll      what the worker waits with; `wake_fd` is readable after SIGCHLD
    hears     called with what is readable: what somebody wishes, or None
    """

    def __init__(self, claim, place, settings, note, poll, wake_fd, hears):
        self.claim = claim
        self.settings = settings
        self.place = place
        self.path = place.file(claim.serial)
        self.note = note
        self.poll = poll
        self.wake_fd = wake_fd
        self.hears = hears
        self.process = None
        self.output = None      # where the command's stdout and stderr come in: polled
        self.file = None        # the run file, locked
        self.size = 0           # bytes of output in it
        self.dropped = 0        # bytes no longer in it
        self.limit = settings["output-limit"]
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
        except OSError as error:
            if self.process:
                raise
            return self.refused(error)
        except ValueError as error:  # a NUL, say, in what another program inserted
            return self.outcome("refused", "can't start: %s" % error)
        finally:
            self.close_output()
            if self.file is not None:
                os.close(self.file)
        return self.outcome(self.reason)

    def outcome(self, reason, detail=""):
        output, before = tail_of(self.path, self.limit) if self.size else (b"", self.dropped)
        return Outcome(self.status, reason, safe(detail), output, before, now_ms())

    def refused(self, error):
        """It can't be started, by its own fault or because the host lacks something."""
        place = os.fsdecode(error.filename or "")
        if place == self.path:
            place = self.place.run
        own_fault = error.errno not in UNSTARTED
        return self.outcome("refused" if own_fault else "unstarted", "can't start%s: %s" % (
            place and (" %s%s" % ("in " * os.path.isabs(place), place)), error.strerror))

    def start(self):
        """Make and lock the run file, note it, start the command."""
        import subprocess
        claim = self.claim
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.mark_dropped(0)
        self.note(serial=claim.serial)
        environ = job_environment(claim, self.path)
        argv = [word.encode() for word in split_shell(self.settings["shell"])]
        self.output, theirs = os.pipe()
        try:
            os.set_blocking(self.output, False)  # the command may read from there what we heard of
            self.poll.register(self.output, select.POLLIN)
            self.process = subprocess.Popen(
                argv + [claim.command.encode()], stdin=subprocess.DEVNULL, stdout=theirs,
                stderr=theirs, cwd=os.fsencode(os_path(claim.cwd or os.path.dirname(self.place.db))),
                env=environ, pass_fds=(self.file,), start_new_session=True)
        finally:
            os.close(theirs)
        self.note(serial=claim.serial, leader=self.process.pid)

    def watch(self):
        """Wait for the command's end, for its deadline, or for a wish to end it."""
        deadline = self.claim.timeout and monotonic() + self.claim.timeout / 1000.0
        note_at = monotonic() + 0.01  # right after the start /proc would wait for the exec
        while self.status is None and not self.reason:
            left = min(filter(None, (note_at, deadline, monotonic() + LOOK_S))) - monotonic()
            ready = [fd for fd, _ in self.poll.poll(max(int(left * 1000) + 1, 0))]
            if self.output in ready:
                self.pump()
            if self.wake_fd in ready:
                os.read(self.wake_fd, 512)
                self.leads()
            wish, now = self.hears(ready), monotonic()
            if note_at and now >= note_at:
                pid, note_at = self.process.pid, None
                self.note(serial=self.claim.serial, leader=pid, start=process_start(pid))
            if wish or deadline and now >= deadline:
                if self.leads():  # else it has ended by itself
                    self.reason = {"cancel": "cancelled"}.get(wish, wish) or "timeout"
        self.drain()

    def leads(self):
        """Whether the command's leader still runs; takes its output meanwhile. Where possible
        without reaping: a pid is safe to signal only as long as it is not reaped."""
        if self.output is not None:
            self.pump()
        if self.status is None and hasattr(os, "waitid"):
            info = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                self.status = (info.si_status if info.si_code == os.CLD_EXITED
                               else -info.si_status)
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
            self.poll.unregister(self.output)  # closed it would be "ready" for ever
            os.close(self.output)
            self.output = None

    def keep(self, data):
        """Add to the run file; a full disk costs the output, not the job."""
        try:
            done = os.pwrite(self.file, data, HEADER + self.size)
        except OSError:
            done = 0
        self.size += done
        if self.size > max(MIN_RUN_FILE, 16 * self.limit):
            self.cut()
        if done < len(data):
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
    """Close all but these and stdio: a copy of another child's socket would hide its end, one of a
    lock would hold it."""
    try:
        last = max(map(int, os.listdir("/dev/fd")))
    except OSError:
        last = os.sysconf("SC_OPEN_MAX")
    keep = sorted({0, 1, 2, *keep})  # begins with 0: closerange(0, 0) closes all since 3.10
    for low, high in zip(keep, keep[1:] + [last + 1]):
        os.closerange(low + 1, high)


def default_signals():
    """A job starts with default dispositions and an empty mask, whatever the daemon inherited.
    Handlers that do nothing, not SIG_IGN: exec resets handlers only."""
    for number in range(1, signal.NSIG):
        with suppress(OSError, ValueError):
            ours = number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
            python = number in (signal.SIGPIPE, getattr(signal, "SIGXFSZ", 0))
            if ours or (signal.getsignal(number) == signal.SIG_IGN and not python):
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
    """The owner of a slot, whose file `slot_fd` it has locked. `sock`: to its supervisor; `visits`:
    it only settles what it finds; `only`: the ids of the jobs it is for, None: any."""

    def __init__(self, place, slot, slot_fd, sock, visits, only):
        self.place = place
        self.slot = slot
        self.slot_fd = slot_fd
        self.sock = sock         # None: the supervisor is gone, or wants no more of it
        self.visits = visits
        self.only = only and list(only)
        self.look_at = 0.0
        self.store = Store(place, door=True)
        self.wake_fd = wakeup_fd()
        sock.setblocking(False)
        self.poll = select.poll()
        self.poll.register(sock, select.POLLIN)
        self.poll.register(self.wake_fd, select.POLLIN)

    def run(self):
        """Settle, then: one transaction, one job, until it is to leave."""
        claim, outcome = self.found()
        while True:
            claim = self.turn(claim, outcome)
            if claim is None:
                if not self.await_word():
                    return
                outcome = None
            else:
                outcome = Attempt(claim, self.place, self.store.settings,
                                  functools.partial(self.note, claim), self.poll, self.wake_fd,
                                  functools.partial(self.hears, claim)).run()

    def note(self, claim, **news):
        write_note(self.slot_fd, dict(news, pid=os.getpid(), only=self.only))

    def found(self):
        """(Claim, Outcome) of the attempt that the last owner of the slot left open, once nothing
        of it is left; (None, None) without one."""
        claims = self.store.open_claims(slot=self.slot)
        if not claims:
            return None, None
        claim, run_file = claims[0], self.place.file(claims[0].serial)
        noted, same_boot = read_note(self.place.file("w.%d" % self.slot)), claims[0].boot == boot_id()
        named = noted.get("serial") == claim.serial
        if same_boot:
            pid, start = (noted.get("leader"), noted.get("start")) if named else (None, None)
            stop_rest(run_file, pid, lambda: bool(start) and process_start(pid) == start,
                      b"QUEUECTL_RUN=" + os.fsencode(run_file))
        output, dropped = tail_of(run_file, self.store.settings["output-limit"])
        return claim, Outcome(None, settle(claim.wish, same_boot, named), "", output, dropped,
                              now_ms())

    def turn(self, claim, outcome):
        """One transaction between two jobs: the outcome, and the next Claim or None; where that
        fails, the outcome alone, again and again."""
        pause_s, unstarted = BUSY_S, outcome is not None and outcome.reason == "unstarted"
        while True:
            for claims in (False,) if unstarted else (True, False):
                try:
                    return self.record_and_claim(claim, outcome, claims)
                except StorageError:
                    if outcome is None:
                        return None
            sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    def record_and_claim(self, claim, outcome, claims):
        store, recorded, new = self.store, None, None
        with store.transaction():
            now = now_ms()
            if claim:
                recorded = record(store, claim, outcome, os.getpid(), now)
            if recorded and self.only is not None:
                self.only += filter(None, (claim.job, recorded[1]))
            if claims and not self.leaves():
                new = store.claim(self.slot, boot_id(), now, self.only)
        if claim:
            with suppress(OSError):
                os.unlink(self.place.file(claim.serial))
            if recorded:
                self.tell(claim, outcome, *recorded)
        return new

    def leaves(self, wait_ms=0):
        """Whether it is to claim no more, at once or when it is woken (None)."""
        self.hears(None, [fd for fd, _ in self.poll.poll(wait_ms)])
        return (self.sock is None or self.visits
                or self.store.settings["workers"] < self.slot <= MAX_WORKERS)

    def tell(self, claim, outcome, verdict, heir):
        """Log what an operator should know; wake the supervisor for what it has to see to."""
        if verdict.state == "dead":
            self.place.log("job dead: %s, %s" % (claim.job, verdict.error))
        elif outcome.reason == "unstarted":
            self.place.log("could not start job %s: %s" % (claim.job, outcome.detail))
        elif verdict.error:
            self.place.log("attempt %d of %d failed: %s, %s; next at %s" % (
                verdict.attempts, claim.max_retries, claim.job, verdict.error, iso(verdict.due)))
        if self.sock and (verdict.due is not None or heir):
            with suppress(OSError):
                self.sock.send(b"!")

    def hears(self, claim, ready):
        """Note whether the supervisor is gone; what somebody wishes of the attempt."""
        if self.sock and self.sock.fileno() in ready:
            try:
                data = self.sock.recv(512)
            except BlockingIOError:
                return None
            except OSError:
                data = b""
            if not data:
                self.poll.unregister(self.sock)
                self.sock.close()
                self.sock = None
        elif self.sock or monotonic() < self.look_at:
            return None
        self.look_at = monotonic() + LOOK_S  # without a supervisor
        with suppress(StorageError):
            return claim and self.store.wish(claim.serial)

    def await_word(self):
        """Idle until there may be something to do; False when it is to leave."""
        self.note(None)
        done = self.only is not None and not any(
            row[1] in UNFINISHED for row in self.store.states(self.only))
        return not (done or self.leaves() or self.leaves(None) and self.sock is None)


def worker_main(sock, place, slot, slot_fd, visits, only, open_files):
    """The whole life of a worker process. `open_files`: the limit that jobs get back."""
    close_descriptors({sock.fileno(), slot_fd})
    default_signals()
    set_open_files(open_files)
    Worker(place, slot, slot_fd, sock, visits, only).run()


# ---- Pool ---------------------------------------------------------------------------------------
# As many workers as wanted: started, woken, replaced. One thread and one poll, in the process that
# forks: the daemon's supervisor, or a `drain` or `run` for itself.

STARTS = 32  # children forked in one go


class Child:
    """A forked process, and the socket to it that ends with it."""

    def __init__(self, context, target, *args):
        ours, theirs = socket.socketpair()
        try:
            self.process = context.Process(target=child_main, args=(target, theirs, args))
            self.process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self.sock = ours
        self.started = monotonic()

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


def child_main(target, sock, args):
    """Nothing of the parent's may be flushed, closed or finalized in a child."""
    try:
        target(sock, *args)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(1)


class Pool:
    """Workers for the queue of `store`, in `slots`; `only`: as a Worker's."""

    def __init__(self, store, slots=(), only=None):
        import multiprocessing
        self.context = multiprocessing.get_context("fork")  # not the default since 3.14
        self.store = store
        self.place = store.place
        self.only = only
        self.own = list(slots)
        self.workers = {}        # slot -> Child
        self.pauses = {}         # slot -> (monotonic before which it is not tried, s of that pause)
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
        names = [int(name) for name in os.listdir(self.place.run) if name.isdigit()]
        if names:
            with self.store.transaction():
                self.store.raise_serial(max(names))
            for serial in set(names) - {claim.serial for claim in self.store.open_claims()}:
                with suppress(OSError):
                    os.unlink(self.place.file(serial))

    def log(self, text, every_s=60.0):
        """Log it, the same at most every `every_s` seconds."""
        if monotonic() - self.logged.get(text, -every_s) >= every_s:
            self.logged[text] = monotonic()
            self.place.log(text)

    # -- children

    def watch(self, fd, handler):
        self.poll.register(fd, select.POLLIN)
        self.handlers[fd] = handler

    def forget(self, child):
        self.poll.unregister(child.sock)
        del self.handlers[child.sock.fileno()]
        child.sock.close()
        child.process.join()

    def fork(self, starts):
        """Call these one after the other; each forks, so no connection is open meanwhile."""
        import gc
        self.store.close()
        if hasattr(gc, "freeze"):
            gc.freeze()  # the children go on sharing what is loaded now
        for start in starts:
            start()

    def start_worker(self, slot, slot_fd):
        try:
            if self.only:  # whoever looks who works the job finds it from the start
                write_note(slot_fd, dict(read_note(self.place.file("w.%d" % slot)), only=self.only))
            child = Child(self.context, worker_main, self.place, slot, slot_fd,
                          slot not in self.slots(), self.only, self.open_files)
        except OSError as error:
            self.log("can't start a worker: %s" % error)
            self.pauses[slot] = (monotonic() + LOOK_S, LOOK_S)
            return
        finally:
            os.close(slot_fd)  # the lock lives on in the worker's copy
        self.workers[slot] = child
        self.watch(child.sock.fileno(), functools.partial(self.on_worker, slot))

    def on_worker(self, slot):
        """It has something for us to look at, or has ended: then another may settle and go on."""
        child = self.workers[slot]
        self.look_at = 0.0
        if child.ended():
            del self.workers[slot]
            self.forget(child)
            early = child.process.exitcode != 0 and monotonic() < child.started + LOOK_S
            self.put_off(slot) if early else self.pauses.pop(slot, None)

    def put_off(self, slot):
        """Try the slot again after a pause that grows."""
        pause_s = min(self.pauses.get(slot, (0, BUSY_S / 4))[1] * 2, LOOK_S)
        self.pauses[slot] = (monotonic() + pause_s, pause_s)

    def converge(self, busy):
        """Start workers in the slots that should have one, and in those where an attempt is open
        that nobody works at."""
        now, taken = monotonic(), []
        missing = set(self.slots()).union(busy) - set(self.workers)
        due = sorted(slot for slot in missing if now >= self.pauses.get(slot, (0,))[0])
        for slot in due[:STARTS]:
            slot_fd = self.place.take_slot(slot)
            if slot_fd is None:
                self.put_off(slot)
                if slot in self.own:  # another `run` or `drain` has it
                    self.own[self.own.index(slot)] = max(self.own) + 1
            else:
                taken.append(functools.partial(self.start_worker, slot, slot_fd))
        if taken:
            self.fork(taken)
        self.look_at = 0.0 if len(due) > STARTS else min(
            [self.look_at] + [self.pauses[slot][0] for slot in missing if slot in self.pauses])

    # -- the loop

    def step(self, timeout_s=LOOK_S):
        """Wait for something to do, at most so long, and do it."""
        left = min(self.look_at - monotonic(), timeout_s)
        for fd, _ in self.poll.poll(max(int(left * 1000) + 1, 0) if left > 0 else 0):
            if fd in self.handlers:
                self.handlers[fd]()
        if monotonic() >= self.look_at:
            self.look()

    def look(self):
        """See to what is due, how many workers there are, and who is to be woken."""
        now = now_ms()
        self.look_at = monotonic() + LOOK_S
        try:
            self.store.refresh()
            self.tidy(now)
            busy = self.store.open_slots()
            self.converge(busy)
            self.wake(self.store.open_slots())
            self.look_at = min(self.look_at, monotonic() + max(
                self.store.next_due() - now_ms(), 0) / 1000.0)
        except Busy:
            self.look_at = monotonic() + 0.01
        except StorageError as error:
            self.log("storage trouble: %s" % error)

    def tidy(self, now):
        """Check rows of other programs, make due jobs ready, delete what has been kept enough."""
        store, offset = self.store, now - int(monotonic() * 1000)
        stepped, self.clock = abs(offset - self.clock) > 1000, offset
        if not (stepped or store.has_strangers() or store.next_due() <= now or store.expired(now)):
            return
        with store.transaction():
            if stepped:  # backoffs may be too far ahead
                store.pull_in(now)
            expired = store.expired(now)
            store.delete(expired)
            if STEP in (adopt_strangers(store, now), store.promote(now), len(expired)):
                self.look_at = 0.0

    def wake(self, busy):
        """Wake idle workers, as many as there may be jobs; those that are to leave; those whose
        attempt somebody wishes to end."""
        idle = [slot for slot in self.workers if slot not in busy]
        wanted = set(self.slots())
        for slot in idle[:self.store.claimable(len(idle))]:
            self.workers[slot].wake()
        for slot, child in self.workers.items():
            if busy.get(slot) or slot not in wanted and slot not in busy:
                child.wake()

    # -- the end

    def stop(self):
        """Have workers claim no more, and leave after their job."""
        if not self.stopping:
            self.stopping = True
            for child in self.workers.values():
                with suppress(OSError):
                    child.sock.shutdown(socket.SHUT_WR)

    def force(self):
        """Have running jobs stopped, and their attempts given back."""
        self.stop()
        with self.store.transaction():
            self.store.wish_end("give back", slots=list(self.workers))


# ---- Server -------------------------------------------------------------------------------------
# A child of the daemon's supervisor: socketserver on the Unix socket, a thread for each connection,
# one Store for all. What hurts it hurts no job: the supervisor holds the socket, and starts another.


def encode(message):
    return compact(message).encode() + b"\n"


def error_answer(error):
    """The answer for a Failure."""
    return dict(success=False, message="Error: %s" % error, **error.details)


def is_whole(inbox):
    """Whether it is one JSON object; what is nested too deeply to tell may as well be taken."""
    if inbox[-64:].rstrip()[-1:] != b"}":
        return False
    try:
        json.loads(inbox.decode())
        return True
    except ValueError:
        return False
    except RecursionError:
        return True


def receive(sock, inbox):
    """The next message on `sock`, None at its end; `inbox` holds what came after it. It ends with a
    newline, or, from those that send none, once it is one whole JSON object."""
    while True:
        inbox[:] = inbox.lstrip()
        end = inbox.find(b"\n")
        if end < 0 and inbox and is_whole(inbox):
            end = len(inbox)
        if max(end, len(inbox) if end < 0 else 0) > MAX_REQUEST:
            raise Failure("a request has at most %d bytes" % MAX_REQUEST)
        if end >= 0:
            message = bytes(inbox[:end])
            del inbox[:end + 1]
            return message
        piece = sock.recv(1 << 18)
        if not piece:
            return bytes(inbox) or None
        inbox += piece


def knock(path):
    """What is at `path`: None nothing, "stale" a socket of ours that nobody serves, "live", or
    "foreign": anything else."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError:
        return "foreign"
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        return "foreign"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return "stale"
        except FileNotFoundError:
            return None
        except OSError:  # its backlog is full
            pass
    return "live"


def listen_at(path):
    """A socket that listens at `path`, 0600 from its first instant. It listens under another name
    before `path` leads to it: in between it would look stale to others. A stale one is moved aside
    first, and must be the one that was found stale. FileExistsError if another was faster."""
    folder = os.path.dirname(path)
    hidden, aside = [os.path.join(folder, os.urandom(4).hex()) for _ in range(2)]
    if knock(path) == "stale":
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
    finally:
        os.umask(umask)
    try:
        listener.listen(128)
        os.link(hidden, path)
    finally:
        os.unlink(hidden)
    return listener


def answer_to(store, data, look):
    """The answer to the bytes of a request; whatever goes wrong in it is its own trouble alone."""
    try:
        request = decode_json(data, "the request")
        if isinstance(request, dict) and request.get("db") not in (None, utf8(store.path)):
            raise Failure("the daemon here serves %s, not %s; leave out --socket and SOCKET_PATH"
                          % (store.path, request["db"]))
        return perform(store, request, served=True, committed=look)
    except Failure as error:
        return error_answer(error)
    except Exception as error:  # a bug must not end the queue
        import traceback
        store.place.log("internal error: %s" % traceback.format_exc())
        return error_answer(Failure("internal error: %r; see %s" % (error,
                                                                    store.place.file("log"))))


def server_main(sock, place, listener):
    """The whole life of the server process: it ends with its supervisor."""
    import socketserver
    import threading
    close_descriptors({sock.fileno(), listener.fileno()})
    default_signals()
    store, places = Store(place), threading.Semaphore(MAX_CLIENTS)

    def look():
        with suppress(OSError):
            sock.send(b"!", socket.MSG_DONTWAIT)

    class Handler(socketserver.StreamRequestHandler):
        timeout, wbufsize = IDLE_S, -1

        def handle(self):
            inbox, data = bytearray(), True
            with suppress(OSError):
                while data:
                    try:
                        data = receive(self.request, inbox)
                        answer = data and answer_to(store, data, look)
                    except Failure as error:  # where the next one would begin is unknown
                        data, answer = None, error_answer(error)
                    if answer:
                        self.send(answer)

        def send(self, answer):
            """A list, given as an iterator, is sent row by row."""
            rows, start = answer["message"], b'{"success":true,"message":['
            if hasattr(rows, "__next__"):
                for row in rows:
                    self.wfile.write(start + compact(row).encode())
                    start = b","
                self.wfile.write((b"" if start == b"," else start) + b"]}\n")
            else:
                self.wfile.write(encode(answer))
            self.wfile.flush()

        def finish(self):
            places.release()
            with suppress(OSError):
                super().finish()

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

        def get_request(self):
            try:
                return super().get_request()
            except OSError:  # no descriptors: it would be ready for ever
                sleep(BUSY_S)
                raise

        def verify_request(self, request, _):
            """Only the owner of the queue gets in, and not too many; others are told."""
            ours = peer_uid(request) in (os.geteuid(), None)
            if ours and places.acquire(blocking=False):
                return True
            with suppress(OSError):
                request.setblocking(False)
                request.send(encode(error_answer(Failure(
                    "too many connections; try again" if ours else
                    "this queue belongs to another user"))))
            return False

    server = Server(place.socket, Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    threading.Thread(target=server.serve_forever, args=(3600,), daemon=True).start()
    while sock.recv(512):
        pass


# ---- Daemon -------------------------------------------------------------------------------------
# The supervisor: a Pool with as many workers as the settings want, a server, and an orderly end.


def notify(text):
    """Tell systemd, where it started us and listens; never an error."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with suppress(OSError, ValueError), \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(BUSY_S)
            sock.sendto(text.encode(), "\0" + path[1:] if path[0] == "@" else path)


class Ending:
    """SIGTERM, SIGINT and SIGHUP noted, for who polls `fd`. TERM always counts; the others stay
    ignored if they were."""

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
    """The daemon of the queue at `place`. `workers`: wanted from now on, None: as stored; `grace`:
    ms that a stop waits for running jobs, None: as long as they take. Raises Failure."""

    def __init__(self, place, workers=None, grace=None):
        super().__init__(Store(place, patience_s=PATIENCE_S))
        self.grace = grace
        self.force_at = None       # monotonic: running jobs are stopped then
        self.server = None         # its Child
        self.lock = place.hold_daemon(2)
        self.listener, self.path = self.listen()
        write_note(self.lock, {"pid": os.getpid(), "start": process_start(os.getpid()),
                               "since": now_ms(), "version": VERSION, "socket": utf8(self.path)},
                   1000)
        with self.store.transaction():
            self.store.note_startup(now_ms())
            if workers is not None:
                self.store.configure("workers", workers)
        self.store.patience_s = TURN_S
        self.ending = Ending()
        self.watch(self.ending.fd, self.on_signal)

    def slots(self):
        return range(1, 0 if self.stopping else self.store.settings["workers"] + 1)

    def listen(self):
        """(listener, path): at the socket given, or at the default one, or in DB-run if that is
        taken."""
        path = self.place.socket
        for _ in range(50):
            state = knock(path)
            if state in ("live", "foreign") and self.place.socket_given:
                raise Failure("%s is %s; give another --socket" % (
                    path, "served by another daemon" if state == "live"
                    else "not a socket of yours"))
            if state in ("live", "foreign"):
                path = self.place.file("socket")
            check_socket_path(path)
            try:
                return listen_at(path), path
            except (FileExistsError, FileNotFoundError):  # another daemon was there first
                continue
            except OSError as error:
                raise Failure("can't listen at %s: %s; give another --socket"
                              % (path, error.strerror))
        raise Failure("%s is taken time and again; give another --socket" % path)

    def run(self, announce):
        """Serve until stopped."""
        try:
            self.look()
            while len(self.workers) < len(self.slots()) and not self.pauses:
                self.look()
            self.log("started: queuectl %s, %s" % (VERSION, plural(len(self.slots()), "worker")))
            announce("queuectl %s daemon ready: pid %d, socket %s, database %s, %s" % (
                VERSION, os.getpid(), self.path, self.place.db,
                plural(len(self.slots()), "worker")))
            notify("READY=1")
            while self.workers or not self.stopping:
                self.step()
                if self.force_at and monotonic() >= self.force_at:
                    self.force()
            self.log("stopped")
        except Exception as error:
            self.log("gives up: %s" % (str(error) or repr(error)))
            raise
        finally:
            self.end_server()

    def converge(self, busy):
        super().converge(busy)
        if not self.server and not self.stopping and monotonic() >= self.pauses.get(0, (0,))[0]:
            self.fork([self.start_server])

    def start_server(self):
        try:
            self.server = Child(self.context, server_main, self.place, self.listener)
        except OSError as error:
            self.log("can't start the server: %s" % error)
            self.put_off(0)
        else:
            self.watch(self.server.sock.fileno(), self.on_server)

    def on_server(self):
        self.look_at = 0.0
        if self.server.ended():
            self.forget(self.server)
            self.server = None
            self.put_off(0)

    def on_signal(self):
        """The first one: an orderly stop; another: running jobs are stopped too."""
        for _ in self.ending.take():
            if self.stopping:
                self.force_at = monotonic()
            else:
                self.log("stopping")
                notify("STOPPING=1")
                self.stop()
                self.end_server()
                self.force_at = self.grace is not None and monotonic() + self.grace / 1000.0

    def force(self):
        self.force_at = None
        try:
            super().force()
        except StorageError as error:
            self.log("storage trouble: %s" % error)
            self.force_at = monotonic() + BUSY_S

    def end_server(self):
        """Nobody is let in any more: commands do without."""
        if self.listener:
            with suppress(OSError):
                if os.path.samestat(os.lstat(self.path), os.stat(self.path)) and knock(self.path):
                    os.unlink(self.path)
            self.listener.close()
            self.listener = None
        if self.server:
            self.forget(self.server)
            self.server = None


def check_socket_path(path):
    """Refuse what doesn't fit a socket's address, with room for the name it is bound under."""
    folder, name = os.path.split(path)
    if len(os.fsencode(folder)) + 1 + max(len(os.fsencode(name)), 8) > MAX_SOCKET_PATH:
        raise Failure("socket path %s is too long: at most %d bytes; give a shorter --socket"
                      % (path, MAX_SOCKET_PATH))


# ---- Client -------------------------------------------------------------------------------------
# Where a command finds its queue, and how it has its changes made: by the daemon, or, if nobody
# answers, here.


def default_db():
    """Beside this file if the directory is ours alone and no place for programs, else where state
    is kept."""
    folder = os.path.dirname(os.path.realpath(__file__))
    status, parts = os.stat(folder), folder.split("/")
    if (status.st_uid != os.geteuid() or others_can_write(status) or "lib" in parts[:-1]
            or parts[-1] in ("bin", "sbin")):
        # Joined to /, or without a home it would depend on the current directory.
        folder = ("/var/lib/queuectl" if os.geteuid() == 0
                  else os.path.join("/", os.path.expanduser("~/.local/state/queuectl")))
    return os.path.join(folder, "queuectl.db")


def locate(db, sock):
    """The Place that flags or environment name. An empty variable counts as unset."""
    db = db or os.environ.get("DB_PATH")
    sock = sock or os.environ.get("SOCKET_PATH")
    path = os.path.abspath(os_path(db or default_db()))
    place = Place(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)),
                  bool(db), os.path.abspath(os_path(sock or DEFAULT_SOCKET)), bool(sock))
    if os.path.isdir(place.db):
        raise Failure("%s is a directory; give a file as --db" % place.db)
    check_socket_path(place.socket)
    return place


def shell_quote(text):
    import shlex
    return shlex.quote(text)


def ask(path, request, patience_s=PATIENCE_S):
    """The answer of the daemon at socket `path`; Unreachable when there is none."""
    # As UTF-8: escapes could make it three times as long. Lone surrogates have to be escaped, as
    # \udcff, by JSON and by backslashreplace alike.
    text = json.dumps(request, separators=(",", ":"), ensure_ascii=False)
    data = text.encode("utf-8", "backslashreplace") + b"\n"
    if len(data) > MAX_REQUEST:
        raise Failure("this is too large, %d bytes; a request has at most %d"
                      % (len(data), MAX_REQUEST))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience_s)
        try:
            sock.connect(path)
            if peer_uid(sock) not in (os.geteuid(), None):
                raise Failure("%s is served by another user (uid %d); give another --socket"
                              % (path, peer_uid(sock)))
            sock.sendall(data)
            data = receive(sock, bytearray())
        except OSError as error:
            raise Unreachable("nobody answers at %s: %s" % (path, error.strerror or error))
    answer = decode_json(data or b"", "the answer from %s" % path) if data else None
    if not isinstance(answer, dict):
        raise Unreachable("the daemon at %s broke off" % path)
    return answer


class Queue:
    """The queue at `place`, as a command uses it. `note(line)` tells the user what is special."""

    def __init__(self, place, note):
        self.place = place
        self.note = note
        self.opened = None      # the Store

    def change(self, command, option=None, **value):
        """The answer to a request that changes the queue; Failure when it was refused."""
        request = {"command": command, "option": option, "flag": None, "value": value,
                   "version": VERSION, "once": os.urandom(12).hex()}
        place = self.place
        answer = self.ask_daemon(dict(request, db=utf8(place.db))
                                 if place.db_given or not place.socket_given else request)
        if answer is None:
            other = command == "enqueue" and not place.exists() and self.other_queue()
            if other:
                raise Failure("%s does not exist; %s; or name the new queue with --db"
                              % (place.db, other))
            answer = perform(self.store(), request)
            self.note("daemon not running; stored in %s" % place.db)
        if answer.get("success") is True:
            return answer
        answer.pop("success", None)
        message = str(answer.pop("message", None))
        raise Failure(message[7:] if message.startswith("Error: ") else message, **answer)

    def ask_daemon(self, request):
        """The daemon's answer, None when nobody answers: at the socket given, else where it says
        that it listens."""
        place, noted = self.place, read_note(self.place.file("daemon")).get("socket")
        if place.socket_given:
            with suppress(Unreachable):
                return ask(place.socket, request)
            if "db" not in request:
                raise Failure("no daemon at %s; name the queue with --db" % place.socket)
        if noted:
            if noted != DEFAULT_SOCKET and not place.socket_given:
                self.mention_other()
            with suppress(Unreachable):
                return ask(os_path(noted), request)
        self.mention_other()
        return None

    def store(self, make=True):
        """The Store of the queue; one that isn't there is not made for a look."""
        self.find()
        if self.opened is None or self.opened.place is None and make:
            there = make or self.place.exists()
            self.opened = Store(self.place if there else None, patience_s=PATIENCE_S)
        return self.opened

    def look(self):
        """The Store, for who only reads."""
        store = self.store(make=False)
        store.refresh()
        return store

    def find(self):
        """Where only a socket was given, the daemon there names the database."""
        place = self.place
        if place.socket_given and not place.db_given:
            with suppress(Unreachable, KeyError, TypeError):
                about = ask(place.socket, {"command": "daemon", "option": "status"})["message"]
                self.place = place._replace(db=os_path(about["db"]), db_given=True)
                return
            raise Failure("no daemon at %s; name the queue with --db" % place.socket)

    def other_queue(self):
        """A line for a user who gave nothing, if a daemon of theirs at the default socket serves
        another queue; else None."""
        if self.place.db_given or self.place.socket_given or knock(DEFAULT_SOCKET) != "live":
            return None
        with suppress(Failure, KeyError, TypeError):
            about = ask(DEFAULT_SOCKET, {"command": "daemon", "option": "status"}, 2)["message"]
            if os_path(about["db"]) != self.place.db:
                return "a daemon at %s serves %s; to use that queue: export DB_PATH=%s" % (
                    DEFAULT_SOCKET, about["db"], shell_quote(about["db"]))
        return None

    def mention_other(self):
        line = self.other_queue()
        if line:
            self.note(line)


def call_words(place):
    """The words that call this very program for the queue at `place`."""
    return ([sys.executable or "python3", os.path.abspath(sys.argv[0]), "--db", place.db]
            + ["--socket", place.socket] * place.socket_given)


def start_in_background(place, *options):
    """Start a daemon in a session of its own; its ready line, once it is."""
    import subprocess
    environ = dict(os.environb)
    environ.pop(b"QUEUECTL_RUN", None)  # a job may start it, but it is no part of that
    daemon = subprocess.Popen(call_words(place) + ["daemon"] + list(options), cwd="/", env=environ,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, start_new_session=True)
    ready = daemon.stdout.readline()
    if ready:
        daemon.returncode = 0  # it outlives us; subprocess would warn that nobody waited
        return ready.decode("utf-8", "replace").strip()
    lines = daemon.stderr.read().decode("utf-8", "replace").strip().splitlines() or ["it died"]
    daemon.wait()
    with suppress(ValueError, KeyError, TypeError):
        raise Failure(json.loads(lines[-1])["message"].partition(": ")[2])
    raise Failure("the daemon did not start: %s" % lines[-1])


# ---- Looking ------------------------------------------------------------------------------------
# What commands find by reading alone: what a job waits for, what `check` judges, what `doctor` finds,
# and a copy of it all.


def is_worked(store, job_id):
    """Whether somebody works the job, or will: a daemon with workers, a `drain`, its `run`."""
    if store.settings["workers"] and daemon_of(store):
        return True
    notes = [read_note(store.place.file("w.%d" % slot)) for slot in store.place.slots()
             if slot > MAX_WORKERS] if store.place else ()
    return any(not note.get("only") or job_id in note["only"] for note in notes)


def hindrance(store, job_id=None):
    """What keeps every job from running, or None."""
    if store.paused is not None:
        return "the end of the pause (%s); go on with: queuectl resume" % store.paused
    if not is_worked(store, job_id):
        return "a worker; start one with: queuectl worker start"
    return None


def waiting_for(store, job, now):
    """What keeps a job from running; None once it runs or has ended."""
    if job.state not in ("pending", "failed"):
        return None
    if job.due and job.due > now:
        return "its time, %s" % iso(job.due)
    return hindrance(store, job.id) or "a free worker"


def full_id(store, given):
    """The id that a user means: it, or the one that begins so."""
    found = store.ids_like(given) if is_text(given) else []
    if len(found) != 1:
        raise Failure("no job %s; see: queuectl list" % given[:128] if not found else
                      "more than one job begins with %s; give more of the id" % given)
    return found[0]


def shown(store, job_id, now):
    """The job with its attempts, first to last, and what it waits for."""
    job = known_job(store, job_id)
    history = store.attempts(job_id) + [
        dict(dict.fromkeys(ATTEMPT), number=claim.number, started_at=iso(claim.started_at),
             serial=claim.serial) for claim in store.open_claims(job=job_id)]
    return dict(job.public(), waiting_for=waiting_for(store, job, now), history=history)


def judge(store, limits, name, now):
    """(exit status, line) as monitoring plugins have them; `limits`: the highest values allowed,
    None for any, of pending, dead, age (s) and of ended: s since a job called `name` completed."""
    def ago(ms):
        """In seconds, rounded up, so that nothing over a limit looks as if it weren't."""
        return None if ms is None else max(-((ms - now) // 1000), 0)
    found, problems, data = store.counts(), [], []
    found.update(age=ago(store.ready_since(now)) or 0, workers=len(store.place.slots()))
    if name is not None:
        found["ended"] = ago(store.completed_at(name, max(now - limits["ended"] * 1000, 0)))
    names = {"ended": "time since %s completed" % (name or "").replace("|", "/")}
    for key, value in found.items():
        unit, limit = "s" if key in ("age", "ended") else "", limits.get(key)
        data.append("%s=%s;;%s;0" % (key, "U" if value is None else "%d%s" % (value, unit),
                                     "" if limit is None else limit))
        if limit is not None and (value is None or value > limit):
            problems.append("%s is %s, over %d%s" % (
                names.get(key, key), "unknown" if value is None else "%d%s" % (value, unit),
                limit, unit))
    waiting, status = found["pending"] + found["failed"], 2 if problems else 0
    problems += ["paused"] * (store.paused is not None)
    if waiting and not found["workers"]:
        problems.append("no worker runs" if daemon_of(store) else "no daemon runs")
    status = status or int(bool(problems))
    problems.append("%s waiting, %d dead" % (plural(waiting, "job"), found["dead"]))
    return status, "%s - %s | %s" % (("OK", "WARNING", "CRITICAL")[status],
                                     safe(", ".join(problems)), " ".join(data))


def back_up(store, target):
    """Copy the queue into the new file `target`, 0600 from its first instant and on the disk in the
    end; if anything fails it is removed again. The number of jobs."""
    if os.path.lexists(target):
        raise Failure("%s exists, and a backup replaces nothing; name another file" % target)
    fd = open_private(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        count = store.copy(target)
        os.fsync(fd)
        with suppress(OSError):  # a folder may be one that we can't read
            os.fsync(os.open(os.path.dirname(target), os.O_RDONLY))
        return count
    except BaseException:
        os.unlink(target)
        raise
    finally:
        os.close(fd)


def lock_holders(path):
    """The pids that hold the flock on a file; empty where the system doesn't say."""
    with suppress(OSError), open("/proc/locks") as locks:
        inode = ":%d" % os.stat(path).st_ino
        return [fields[4] for fields in map(str.split, locks)
                if fields[1] == "FLOCK" and fields[5].endswith(inode)]
    return []


def look_at_versions():
    sqlite, text = sqlite_version(), ".".join(map(str, sqlite_version()))
    if sqlite < (3, 7, 17):
        raise Failure("SQLite %s is too old; use a Python with SQLite 3.7.17 or newer" % text)
    return "queuectl %s, %s; Python %s, %s; SQLite %s" % (
        VERSION, os.path.abspath(__file__), sys.version.split()[0], sys.executable, text)


def look_at_folder(place):
    folder = os.path.dirname(place.db)
    place.check()
    if os.statvfs(folder).f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK | os.X_OK):
        raise Failure("%s can't be written; mount it for writing, or run: chmod u+rwx %s"
                      % (folder, folder))
    if others_can_write(os.stat(folder)) and not os.stat(folder).st_mode & stat.S_ISVTX:
        raise Failure("%s can be written by others; run: chmod go-w %s" % (folder, folder))
    return "%s on %s" % (place.db, mount_of(place.db) or "an unknown file system")


def look_at_disk(place):
    room = os.statvfs(os.path.dirname(place.db))
    free = room.f_bavail * room.f_frsize
    if free < LOW_DISK or room.f_files and not room.f_favail:
        raise Failure("only %d MiB and %d inodes are free for %s; free some, or use another --db"
                      % (free >> 20, room.f_favail, place.db))
    return "%d MiB free" % (free >> 20)


def look_at_files(place):
    for path, wanted in [(place.run, 0o700)] + [(path, 0o600) for path in (
            place.db, place.db + "-wal", place.db + "-shm", *map(place.file, (
                "lock", "door", "daemon", "log")))]:
        with suppress(FileNotFoundError):
            status = os.lstat(path)
            mode = stat.S_IMODE(status.st_mode)
            if wanted == 0o600:
                check_regular(path, status)
            if mode != wanted:
                raise Failure("%s has mode %04o; run: chmod %o %s" % (path, mode, wanted, path))
    return "private"


def look_at_lock(place):
    path, until = place.file("lock"), monotonic() + 3
    while is_locked(path):
        if monotonic() > until:
            pids = " ".join(lock_holders(path)) or "of some process"
            raise Failure("%s is held too long, by pid %s; it is stopped or stuck: kill -CONT %s, or"
                          " end it" % (path, pids, pids))
        sleep(0.05)
    return "free"


def look_at_daemon(place):
    """Its socket answers, it is of this version, and no other program has the database open."""
    daemon = place.daemon()
    strangers = set(processes(place.db)) - set(processes(place.file("lock")))
    if strangers:
        raise Failure("another program has %s open: pid %s; end it, or it may run jobs twice"
                      % (place.db, " ".join(map(str, sorted(strangers)))))
    if not daemon:
        if place.socket_given and knock(place.socket) == "foreign":
            raise Failure("%s is not a socket of yours; give another --socket" % place.socket)
        return "none runs"
    try:
        about = ask(os_path(str(daemon.get("socket"))), {
            "command": "daemon", "option": "status", "db": utf8(place.db)}, 5)["message"]
        if about["version"] != VERSION:
            raise Failure("the daemon is of another version, %s; restart it: queuectl daemon stop,"
                          " worker start" % about["version"])
        return "pid %(pid)d, up %(uptime_s)d s, %(workers)d of %(wanted)d workers" % about
    except (Unreachable, KeyError, TypeError):
        raise Failure("the daemon, pid %s, does not answer at %s; restart it: queuectl daemon stop,"
                      " worker start" % (daemon.get("pid"), daemon.get("socket")))


def look_at_integrity(place):
    if not place.exists():
        return "no database yet"
    store = Store(place, patience_s=5)
    try:
        lines = store.integrity()
    finally:
        store.close()
    if lines:
        raise Failure("%s is damaged: %s; stop the daemon and restore a backup, or save what is left"
                      " with: sqlite3 %s .recover" % (place.db, ", ".join(lines), place.db))
    return "ok"


def diagnose(queue):
    """What `doctor` finds: [{"check", "ok", "detail", "advice"}]. Nothing is made."""
    findings, place = [], queue.place

    def note(check, function, *args):
        try:
            detail, ok, advice = function(*args), True, ""
        except (Failure, OSError) as error:
            ok, (detail, _, advice) = False, str(error).partition("; ")
        findings.append({"check": check, "ok": ok, "detail": detail, "advice": advice})

    def look_at_queue():
        if queue.other_queue():
            raise Failure(queue.other_queue())
        return "%s (%s)" % (place.db, "given" if place.db_given else "the default")
    note("versions", look_at_versions)
    note("queue", look_at_queue)
    for check in (look_at_folder, look_at_disk, look_at_files, look_at_lock, look_at_daemon,
                  look_at_integrity):
        if check is look_at_integrity or os.path.isdir(os.path.dirname(place.db)):
            note(check.__name__[8:], check, place)
    return findings


# ---- Output -------------------------------------------------------------------------------------
# What users see: results on stdout, as JSON, or as tables where that is a terminal; the rest is for
# people, on stderr.


def pasted(line):
    """`line` with the commands it names as they can be typed: see `main`, which sets CALL."""
    return re.sub(r"(: |, then )queuectl (?=[a-z])", lambda match: match.group(1) + CALL + " ", line)


CALL = "queuectl"  # how this program is called for this queue


def call_as(words, db):
    """Have commands named as they were called: by these words, for the queue `db` (None: it is
    found without)."""
    global CALL
    CALL = " ".join(map(shell_quote, words + ([] if db is None else ["--db", db])))


def utter(stream, text, fd):
    """Write for whoever still listens: a dead end is led to /dev/null."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def tell(line):
    """For people: a full disk or a closed pipe there is no reason to fail."""
    utter(sys.stderr, safe(pasted(line)) + "\n", 2)


def silent(line):
    """A `tell` for who wants to hear nothing."""


def announce(line):
    """The daemon's ready line; whoever started it may have closed its end."""
    utter(sys.stdout, safe(line) + "\n", 1)


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
        ["-" if row[column] is None else safe(str(row[column])) for column in columns]
        for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    while sum(widths) + 2 * len(widths) - 2 > screen()[0] and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    for row in cells:
        yield "  ".join((cell if len(cell) <= width else cell[:width - 1] + "…").ljust(width)
                        for cell, width in zip(row, widths)).rstrip()


def pairs(value, indent=""):
    """Lines of `name  value` for an object, without what is empty."""
    wide = max(map(len, value), default=0)
    for name, one in value.items():
        if isinstance(one, dict) and one:
            yield indent + name
            yield from pairs(one, indent + "  ")
        elif one not in (None, {}, []):
            yield "%s%s  %s" % (indent, name.ljust(wide), safe(str(one)))


def age(stamp, now):
    """How long ago an ISO time was."""
    return None if stamp is None else lapse(max(now - parse_date(stamp), 0) // 1000 * 1000 or 1000)


def job_rows(jobs, now):
    """Objects for a table of jobs, as `public` has them."""
    return [{"id": job["id"], "state": job["state"], "age": age(job["updated_at"], now),
             "tries": "%d/%d" % (job["attempts"], job["max_retries"]), "error": job["error"],
             "command": job["command"]} for job in jobs]


def bar(done, total, failed, seconds):
    """How far it is: done of total, rate, time left, failures so far."""
    rate = done / seconds if seconds > 0 else 0.0
    filled = 20 * done // total if total else 20
    left = " %s left" % lapse(int((total - done) / rate * 1000)) if rate and total > done else ""
    return "[%s%s] %d/%d  %.1f/s%s%s" % ("#" * filled, "." * (20 - filled), done, total, rate, left,
                                         "  %d failed" % failed if failed else "")


def can_draw(stream):
    """Whether it is a terminal that a line can be drawn anew on."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def coloured(text, colour):
    """`text` in an ANSI colour, if stdout is a terminal that should have one."""
    if not can_draw(sys.stdout) or os.environ.get("NO_COLOR"):
        return text
    return "\x1b[%dm%s\x1b[0m" % (colour, text)


def frame(store, rate, now):
    """Lines of what `status --watch` shows: states, workers, running jobs, retries, deaths."""
    shades = {"processing": 36, "completed": 32, "failed": 33, "dead": 31}
    counts, workers = store.counts(), workers_of(store, now)
    yield "  ".join(coloured("%s %d" % (state, count), shades.get(state, 0)) if count
                    else "%s 0" % state for state, count in counts.items())
    yield "%s%s%s" % (plural(len(workers), "worker"),
                      "" if rate is None else ", %.1f jobs/s" % rate,
                      "" if store.paused is None else ", PAUSED: %s" % safe(store.paused))
    jobs = {worker["job"]: store.job(worker["job"]) for worker in workers if worker["job"]}
    for worker in workers:
        job = jobs.get(worker["job"])
        if job:
            yield "  runs %6s  %s  %s" % (age(worker["since"], now), safe(job.id),
                                          safe(job.command))
    for job in store.next_retries(5):
        yield "  next in %s  %s  %s" % (lapse(max(job.due - now, 1000)), safe(job.id),
                                        safe(job.error or ""))
    for job in store.last_deaths(5):
        yield coloured("  died %s ago  %s  %s" % (age(job.finished_at, now), safe(job.id),
                                                  safe(job.error or "")), 31)


EXPOSITION = """\
jobs gauge jobs Jobs in the queue, by state.
jobs_enqueued_total counter jobs_enqueued Jobs stored so far.
jobs_completed_total counter jobs_completed Jobs that completed so far.
jobs_dead_total counter jobs_died Jobs that became dead so far.
attempts_failed_total counter failed_attempts Attempts that failed so far.
commands_total counter total_commands Changes that daemons made so far.
job_duration_seconds summary total_runtime,jobs_completed Run time of completed jobs.
workers gauge workers_running Workers that run.
daemon_uptime_seconds gauge uptime_s Seconds since the daemon started, 0 without one.
database_bytes gauge database_bytes Size of the database and its write-ahead log."""


def exposition(metrics):
    """Lines of Prometheus's text format; each row of EXPOSITION is name, type, keys, help."""
    for row in EXPOSITION.splitlines():
        name, kind, keys, about = row.split(" ", 3)
        name, values = "queuectl_" + name, [metrics[key] for key in keys.split(",")]
        yield "# HELP %s %s" % (name, about)
        yield "# TYPE %s %s" % (name, kind)
        samples = (values[0].items() if keys == "jobs" else
                   zip(("_sum", "_count") if kind == "summary" else ("",), values))
        for label, value in samples:
            yield "%s%s %s" % (name, '{state="%s"}' % label if keys == "jobs" else label, value)


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


def unit_word(text, variables=True):
    """`text` as one word of a unit; `variables`: where systemd replaces $NAME."""
    text = text.replace("%", "%%").replace("$", "$$" if variables else "$")
    if re.fullmatch(r"[\w./:@%$+=,-]+", text, re.ASCII):
        return text
    return '"%s"' % safe(text.replace("\\", "\\\\").replace('"', '\\"'))


def systemd_unit(place, user):
    """A unit for this very file, interpreter and queue; `user`: for a user's own systemd."""
    name = ""
    if os.geteuid() and not user:
        import pwd
        name = "User=%s\n" % pwd.getpwuid(os.geteuid()).pw_name
    program, *words = call_words(place)
    return UNIT % {
        "folder": unit_word(os.path.dirname(place.db), variables=False), "user": name,
        "command": " ".join([unit_word(program, variables=False)] + list(map(unit_word, words))),
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
        self.able = can_draw(stream)
        self.height = 0

    def show(self, lines):
        if not self.able:
            return
        width, most = screen()
        lines = [clipped(line, width - 1) for line in list(lines)[:max(most - 1, 1)]]
        up = "\r\x1b[%dA" % (self.height - 1) if self.height > 1 else "\r"
        utter(self.stream, up * (self.height > 0) + "\x1b[J" + "\n".join(lines),
              self.stream.fileno())
        self.height = len(lines)

    def close(self):
        """Leave what stands there, and go on below."""
        if self.height:
            utter(self.stream, "\n", self.stream.fileno())
            self.height = 0


def clipped(line, width):
    """`line` cut to `width` characters, not counting colours."""
    shown, count = "", 0
    for part in re.split("(\x1b\\[[0-9]+m)", line):
        if not part.startswith("\x1b"):
            part = part[:width - count]
            count += len(part)
        shown += part
    return shown


# ---- Commands -----------------------------------------------------------------------------------
# One function a command, its arguments above it, its help and then its examples in its docstring.
# Glue only.

COMMANDS = {}  # "dlq retry" -> (function, arguments)


def arg(names, about=None, **options):
    """An argument's names, and what argparse is told of it."""
    return names.split(), dict(options, help=about)


def subcommand(name, *arguments):
    def register(function):
        COMMANDS[name] = (function, arguments)
        return function
    return register


def flag_type(check):
    """The type of an argparse argument: what `check` makes of its text."""
    def convert(text):
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError("%s %s" % (text, error))
    return convert


switch = functools.partial(arg, action="store_true")
duration_arg = functools.partial(arg, type=flag_type(as_ms), metavar="DUR")
number_arg = functools.partial(arg, metavar="N", type=flag_type(number_from(0, 10 ** 9)))
count_arg = functools.partial(arg, "-c --count", type=flag_type(number_from(1, MAX_WORKERS)),
                              metavar="N")


class Once(argparse.Action):
    """A flag that may be given once: the last of two would win in silence."""

    def __call__(self, parser, args, values, option_string=None):
        if self.dest in args.given:
            raise argparse.ArgumentError(self, "given twice")
        args.given.add(self.dest)
        setattr(args, self.dest, values)


# The one place of each grammar: a job's flags, which jobs are meant, what is printed.
WHAT = arg("job", "JSON, - for JSON Lines or an array from stdin, or a command after --",
           nargs="?", metavar="JOB")
JOB_FLAGS = (
    arg("--id", "default: made of the time"),
    arg("--priority", "-1000 to 1000, higher first", type=int, metavar="N"),
    duration_arg("--delay", "not before so long from now: 90s, 5m"),
    arg("--at", "not before, local time: 03:00, '2026-12-01 10:00'", metavar="TIME"),
    duration_arg("--timeout", "longest run of an attempt; a command has none unless given"),
    arg("--max-retries", "attempts in all", type=int, metavar="N"),
    arg("--cwd", "where it runs (default: here)", metavar="DIR",
        type=lambda text: utf8(os.path.abspath(os_path(text)))),
    arg("--env", "added to its environment", action="append", metavar="K=V"),
    switch("--clean-env", "without the environment of its caller"),
    arg("--unique", "store nothing while an unfinished job has this key", metavar="KEY"))
QUIET = switch("-q --quiet", "print ids only")
STATE = arg("--state", "only these; may be repeated", action="append", choices=STATES, metavar="S")
KEY = arg("key", ", ".join(SETTINGS))


def selection(states):
    return (arg("ids", nargs="*", metavar="ID"),
            arg("--state", "all that are so: %s; may be repeated" % ", ".join(states),
                action="append", choices=states, metavar="S"),
            switch("--all", "all that can be"))


def act_on(queue, args, states, done, *call):
    """Have the change `call` made to the jobs that are meant, some at a time; their ids."""
    if bool(args.ids) + bool(args.state) + args.all != 1:
        raise Usage("name the jobs, or give --state S, or --all")
    store = queue.look()
    if args.ids:
        ids = [full_id(store, given) for given in args.ids]
        print_compact(reply(queue.change(*call, ids=ids)["message"]))
        return ids
    before = iso(now_ms() - args.older_than) if args.older_than else None
    ids = [job.id for job in store.jobs(store.select(args.state or states, before=before))]
    count, refused = 0, []
    for at in range(0, len(ids), STEP):
        answer = queue.change(*call, ids=ids[at:at + STEP], skip=True)
        count, refused = count + answer["count"], refused + answer["refused"]
    for line in refused[:1]:
        tell("%d left out; the first: %s" % (len(refused), line))
    (print_compact if not refused else silent)(reply("%s %s" % (plural(count, "job"), done)))
    if refused:
        raise Failure("%s %s, %d refused" % (plural(count, "job"), done, len(refused)))
    return ids


def for_people(args):
    """Whether a result is shown as a table."""
    return args.table or sys.stdout.isatty() and not args.json


def print_value(args, value, lines):
    """An object as JSON, or `lines` for people."""
    print_text("\n".join(lines) if for_people(args) else indented(value))


def print_rows(args, rows, columns, key="id"):
    """A list of dicts as JSON, ids alone, or a table for people."""
    if getattr(args, "quiet", False):
        sys.stdout.writelines("%s\n" % row[key] for row in rows)
    elif for_people(args):
        sys.stdout.writelines(line + "\n" for line in table(list(rows), columns))
    else:
        sys.stdout.writelines(json_list(rows))
    sys.stdout.flush()


def caller_environment():
    """The environment that a command line's job runs in: all but what belongs to the terminal, the
    session, a service, or a job that we run in."""
    return {name.decode("utf-8", "surrogateescape"): text.decode("utf-8", "surrogateescape")
            for name, text in os.environb.items()
            if not re.fullmatch(rb"TERM|DISPLAY|SSH_.*|XDG_SESSION_.*|_|SHLVL|PWD|OLDPWD|LISTEN_.*"
                                rb"|WATCHDOG_.*|NOTIFY_SOCKET|INVOCATION_ID|JOURNAL_STREAM"
                                rb"|QUEUECTL_RUN", name)}


def job_fields(args):
    """What the command line says of a job."""
    fields = {name: value for name, value in vars(args).items()
              if name in FIELDS and value is not None and name != "env"}
    if args.argv is not None:
        if getattr(args, "job", None) is not None or not args.argv:
            raise Usage("one command is needed, after --, like: -- make -j4")
        fields["command"] = (args.argv[0] if len(args.argv) == 1
                             else " ".join(map(shell_quote, args.argv)))
        fields.setdefault("timeout", 0)
    if args.env:
        fields["env"] = dict(pair.partition("=")[::2] for pair in args.env)
        if not all("=" in pair for pair in args.env):
            raise Usage("--env takes NAME=VALUE")
    if args.delay is not None and args.at is not None:
        raise Usage("--delay and --at can't both be given")
    if args.delay is not None:
        fields["run_after"] = iso(now_ms() + args.delay)
    elif args.at is not None:
        fields["run_after"] = iso(checked("--at", next_time, args.at, now_ms()))
    return fields


def store_one(queue, args, job):
    """The answer to the job that a command line makes."""
    environ = None if args.argv is None or args.clean_env else caller_environment()
    return queue.change("enqueue", job=job, cwd=working_directory(), environ=environ)


def warn(answer):
    """Say what keeps a new job from running."""
    if "paused" in answer:
        tell("the queue is paused (%s); nothing starts until: queuectl resume" % answer["paused"])
    elif answer.get("workers") == 0:
        tell("no worker runs; start one with: queuectl worker start")


def is_held(answer):
    """Whether an enqueue was answered with the job that holds its unique key."""
    return answer["message"] == "Job already queued"


class Wait:
    """Sleeps between two looks of a command that watches, at first but briefly; what is waited for
    is told after a second, and when it has become another."""

    def __init__(self, step=sleep):
        self.step = step
        self.pause_s = 0.01
        self.hint_at = monotonic() + 1
        self.told = None

    def __call__(self, what=None):
        if what and what != self.told and monotonic() > self.hint_at:
            tell("waiting for %s" % what)
            self.told = what
        self.step(self.pause_s)
        self.pause_s = min(self.pause_s * 1.3, POLL_S)


@contextmanager
def watching():
    """Ctrl-C ends the watching, never the job."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped watching; the jobs go on")


def working_directory():
    """The directory a job runs in unless it says so itself."""
    with suppress(OSError):
        path = utf8(os.getcwd())
        return path if is_text(path) else None


def lines_of(stream):
    """(line number, job as JSON bytes or an object) of what `enqueue -` reads: a job a line, or one
    array of jobs."""
    first = stream.readline()
    while first and not first.strip():
        first = stream.readline()
    if first.lstrip()[:1] == b"[":
        jobs = decode_json(first + stream.read(), "the array")
        yield from enumerate(jobs, 1)
        return
    for number, line in enumerate(itertools.chain([first], stream), 1):
        if line.strip():
            yield number, line


def batches(jobs):
    """Lists of these, each as large as one request may be."""
    batch, size = [], 0
    for number, job in jobs:
        length = len(job) if isinstance(job, bytes) else len(compact(job))
        if batch and (len(batch) == BATCH_JOBS or size + length > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((number, job))
        size += length
    if batch:
        yield batch


def read_job(job, fields):
    """The job that a JSON text is; `fields`, what the flags say, win."""
    job = decode_json(job, "the job") if isinstance(job, (bytes, str)) else job
    if not isinstance(job, dict):
        raise Failure(NO_JOB)
    return dict(job, **fields)


def enqueue_all(queue, args, fields):
    """Store the jobs from stdin, in batches that are each stored whole or not at all."""
    if sys.stdin is None:
        raise Failure("there is nothing to read: stdin is closed")
    stored = held = last = 0
    progress, answer = Drawing(sys.stderr), {}
    for batch in batches(lines_of(sys.stdin.buffer)):
        jobs = []
        try:
            for _, job in batch:
                jobs.append(read_job(job, fields))
            answer = queue.change("enqueue", "batch", jobs=jobs, cwd=working_directory())
        except Failure as error:
            wrong = len(jobs) if len(jobs) < len(batch) else error.details.get("index", 0)
            raise Failure("line %d: %s; %s" % (
                batch[wrong][0], error,
                "lines 1 to %d are stored" % last if last else "nothing is stored"))
        last = batch[-1][0]
        stored, held = stored + answer["count"], held + len(batch) - answer["count"]
        if args.quiet:
            print_text("\n".join(answer["ids"]))
        progress.show(["%d stored" % stored])
    progress.close()
    warn(answer)
    if not args.quiet:
        print_compact(reply("Enqueued %s" % plural(stored, "job"), already_queued=held))


@subcommand("enqueue", WHAT, *JOB_FLAGS, QUIET)
def cmd_enqueue(queue, args):
    """Store a job. It is on disk when this returns. As JSON its fields are: command (required),
    id, priority, run_after, timeout, max_retries, cwd, env, unique; a flag wins over a field.

    enqueue '{"id":"hello","command":"echo Hello World"}'
    enqueue --unique backup --timeout 2h -- tar -czf /srv/a.tgz /etc
    enqueue - <jobs.jsonl"""
    fields = job_fields(args)
    if args.job == "-":
        enqueue_all(queue, args, fields)
        return
    if args.argv is None and args.job is None:
        raise Usage("a job is missing: JSON, or a command after --, like: enqueue -- make -j4")
    if args.argv is None and args.job[:1] not in "{[\"'":
        raise Failure(NO_JOB + "; a command goes after --, like: enqueue -- make -j4")
    job = fields if args.argv is not None else read_job(args.job, fields)
    answer = store_one(queue, args, job)
    warn(answer)
    if args.quiet:
        print_text(answer["id"])
        return
    print_compact(reply(answer["message"], id=answer["id"]))
    tell("id: %s" % answer["id"])
    if not is_held(answer):
        tell("command: %s" % job["command"])


@subcommand("daemon", arg("--workers", "workers wanted from now on (default: as many as before)",
                          type=flag_type(number_from(0, MAX_WORKERS)), metavar="N"),
            duration_arg("--grace", "how long a stop waits for running jobs, like 30s (default: as"
                                    " long as it takes)"))
def cmd_daemon(queue, args):
    """Serve the queue in the foreground. SIGTERM or Ctrl-C: start nothing more, wait for running
    jobs, exit; a second one stops them and gives their attempts back.

    daemon --workers 2
    daemon --workers 4 --grace 60s"""
    Daemon(queue.place, args.workers, args.grace).run(announce)


def process_lives(daemon):
    return bool(daemon) and process_start(daemon["pid"]) == daemon["start"]


@subcommand("daemon stop", duration_arg("--grace", "stop jobs that still run after it"))
def cmd_daemon_stop(queue, args):
    """Stop the daemon as SIGTERM does, and wait until it is gone.

    daemon stop --grace 30s"""
    queue.find()
    daemon, wait = queue.place.daemon(), Wait()
    if not process_lives(daemon):
        raise NoDaemon("no daemon runs for %s" % queue.place.db)
    os.kill(daemon["pid"], signal.SIGTERM)
    force_at = monotonic() + args.grace / 1000.0 if args.grace is not None else None
    while process_lives(daemon):
        if force_at is not None and monotonic() >= force_at:
            os.kill(daemon["pid"], signal.SIGTERM)
            force_at = None
        wait("running jobs; Ctrl-C ends only the waiting")
    print_compact(reply("Stopped daemon"))


@subcommand("daemon status")
def cmd_daemon_status(queue, args):
    """Show the daemon's pid, version, paths and workers.

    daemon status"""
    about = about_daemon(queue.look(), now_ms())
    print_value(args, about, pairs(about))


def await_workers(queue, enough):
    """Wait for a moment until that holds for the set of slots with a worker."""
    until = monotonic() + 2
    while not enough(set(queue.place.slots())) and monotonic() < until:
        sleep(0.01)


@subcommand("worker start", count_arg("how many (default 1)", default=1))
def cmd_worker_start(queue, args):
    """Add workers. Without a daemon, start one in the background with so many.

    worker start --count 3"""
    try:
        answer = queue.change("worker", "start", count=args.count)
        queue.find()
        await_workers(queue, lambda slots: slots >= set(range(1, answer.get("wanted", 0) + 1)))
    except NoDaemon:
        tell(start_in_background(queue.place, "--workers", str(args.count)))
        answer = reply("Started %s" % plural(args.count, "worker"))
    print_compact(reply(answer["message"]))


@subcommand("worker stop", count_arg("so many (default: all)"),
            switch("--now", "stop their jobs, which are then run again"))
def cmd_worker_stop(queue, args):
    """End workers, each after its current job; they are no longer wanted.

    worker stop --count 1 --now"""
    answer = queue.change("worker", "stop", count=args.count, now=args.now)
    store, left = queue.look(), answer.get("wanted", 0)
    await_workers(queue, lambda slots: not any(
        left < slot <= MAX_WORKERS for slot in slots - set(() if args.now else store.open_slots())))
    busy = sum(left < slot <= MAX_WORKERS for slot in store.open_slots())
    if busy:
        tell("%s finish their job first; to stop it: queuectl worker stop --now"
             % plural(busy, "worker"))
    print_compact(reply(answer["message"]))


@subcommand("worker list", QUIET)
def cmd_worker_list(queue, args):
    """Show the workers: pid, state, job, and since when.

    worker list"""
    now = now_ms()
    workers = workers_of(queue.look(), now)
    if for_people(args):
        workers = [dict(worker, since=age(worker["since"], now)) for worker in workers]
    print_rows(args, workers, ("pid", "state", "since", "attempt", "job"), key="pid")


def watch_status(queue):
    """Draw the state of the queue anew, time and again; plain lines where it can't be drawn."""
    drawing, samples, before = Drawing(sys.stdout), collections.deque(maxlen=50), None
    try:
        while True:
            store = queue.look()
            totals, counts = store.totals(), store.counts()
            samples.append((monotonic(), totals["jobs_completed"] + totals["jobs_died"]))
            (start, first), (end, last) = samples[0], samples[-1]
            rate = (last - first) / (end - start) if end > start else 0.0
            drawing.show(frame(store, rate, now_ms()))
            plain = " ".join("%s %d" % pair for pair in counts.items())
            if not drawing.able and plain != before:
                print_text(plain)
                before = plain
            sleep(POLL_S)
    finally:
        drawing.close()


@subcommand("status", switch("--watch", "show it live until Ctrl-C"))
def cmd_status(queue, args):
    """Show the number of jobs in each state, and of workers.

    status --watch"""
    if args.watch:
        with watching():
            watch_status(queue)
    store = queue.look()
    print_value(args, status_of(store), frame(store, None, now_ms()))


@subcommand("list", STATE, arg("--match", "in id or command", metavar="TEXT"),
            number_arg("--limit", "the newest so many"), QUIET)
def cmd_list(queue, args):
    """Show jobs, oldest first.

    list --state dead --state failed
    list --match backup --limit 5"""
    show_jobs(queue, args, args.state or (), args.match, args.limit)


def show_jobs(queue, args, states, match=None, limit=None):
    """Print jobs; for people the newest, and how many more there are."""
    store, people = queue.look(), for_people(args) and not args.quiet
    rowids = store.select(states, match, limit=limit)
    newest = rowids[-20:] if people and limit is None else rowids
    jobs = (job.public() for job in store.jobs(newest))
    print_rows(args, job_rows(jobs, now_ms()) if people else jobs,
               ("id", "state", "age", "tries", "error", "command"))
    if len(newest) < len(rowids):
        print_text("… and %d older; all of them: queuectl list --json" % (len(rowids) - len(newest)))


@subcommand("show", arg("id", metavar="ID"))
def cmd_show(queue, args):
    """Show a job with its attempts and what it waits for.

    show hello
    show hello --json | grep error"""
    store = queue.look()
    job = shown(store, full_id(store, args.id), now_ms())
    lines = list(pairs(dict(job, history=None)))
    if job["history"]:
        lines += ["attempts"] + ["  " + line for line in table(
            job["history"], ("number", "started_at", "finished_at", "error"))]
    print_value(args, job, lines)


class Tail:
    """Hands on what a job writes, attempt by attempt, from that `serial` on."""

    def __init__(self, queue, job_id, serial=0):
        self.queue = queue
        self.job_id = job_id
        self.serial = serial
        self.offset = 0      # what is next of that attempt
        self.printed = False

    def hand_on(self, piece):
        """Write a piece, bytes as they are; whether there was something."""
        data, start, _ = piece or (b"", self.offset, 0)
        if start > self.offset:
            tell("%d bytes were cut here" % (start - self.offset))
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        self.offset = start + len(data)
        return bool(data)

    def attempt(self, store, attempt):
        """Hand on what is left of an attempt that has ended."""
        if attempt["serial"] != self.serial:
            self.serial, self.offset = attempt["serial"], 0
        cut, end = attempt["output_cut"], attempt["output_cut"] + attempt["output_kept"]
        while self.offset < end:
            start = max(self.offset, cut)
            self.hand_on((store.output(self.serial, start - cut, PIECE), start, end))

    def step(self, say):
        """(the Job, whether something was written), with all that was written until now; `say` is
        told of attempts that failed."""
        store = self.queue.look()
        job = known_job(store, self.job_id)
        for attempt in store.attempts(self.job_id):
            if attempt["serial"] >= self.serial:
                self.attempt(store, attempt)
                self.serial, self.offset = attempt["serial"] + 1, 0
                if job.state not in FINISHED:
                    say("attempt %d of %d failed: %s; next %s" % (
                        job.attempts, job.max_retries, attempt["error"],
                        "in " + lapse(max(job.due - now_ms(), 0) + 999) if job.due else "now"))
        wrote = False
        for claim in store.open_claims(job=self.job_id):
            if claim.serial > self.serial:
                self.serial, self.offset = claim.serial, 0
            wrote = self.hand_on(read_running(store.place.file(claim.serial), self.offset, PIECE))
        return job, wrote


@subcommand("logs", arg("id", metavar="ID"),
            number_arg("--attempt", "that attempt (default: the last)"),
            number_arg("-n --lines", "only the last so many lines"),
            switch("-f --follow", "to the end of the job"))
def cmd_logs(queue, args):
    """Print what a job wrote, bytes as they were. -f follows it, and waits for it to start.

    logs hello
    logs -f hello
    logs hello --attempt 1 -n 20"""
    store = queue.look()
    job_id = full_id(store, args.id)
    running, past = store.open_claims(job=job_id), store.attempts(job_id)
    if args.follow:
        start = running[0].serial if running else past[-1]["serial"] if past else 0
        tail, wait = Tail(queue, job_id, start), Wait()
        with watching():
            job, wrote = tail.step(tell)
            while job.state not in FINISHED:
                wrote or wait(waiting_for(store, job, now_ms()))
                job, wrote = tail.step(tell)
        return 0
    chosen = [attempt for attempt in past if args.attempt in (None, attempt["number"])][-1:]
    open_ones = [claim for claim in running if args.attempt in (None, claim.number)]
    if not chosen and not open_ones:
        raise Failure("job %s has %s; see: queuectl show %s" % (
            job_id, "no such attempt" if args.attempt else "not run yet", job_id))
    tail = Tail(queue, job_id)
    if open_ones:
        path = store.place.file(open_ones[0].serial)
        data, start, _ = (None, 0, 0)
        while data is None and store.is_open(open_ones[0].serial):
            data, start, _ = read_running(path, 0, 1 << 30) or (None, 0, 0)
        data = data or b""
    else:
        attempt = chosen[0]
        data, start = store.output(attempt["serial"], 0, 1 << 30), attempt["output_cut"]
    if args.lines is not None:
        kept = data.splitlines(True)[-args.lines:] if args.lines else []
        tail.offset = start = start + len(data) - sum(map(len, kept))
        data = b"".join(kept)
    tail.hand_on((data, start, 0))


def ended_with(code, message):
    """A Failure with that exit status."""
    error = Failure(message)
    error.exit_code = code
    return error


def failure_of(job_id, state, exit_code, error):
    """None for a job that completed; else a Failure with its exit code, 125 if it has none."""
    if state == "completed":
        return None
    return ended_with(exit_code or 125, "job %s %s: %s; see: queuectl logs %s" % (
        job_id, "died" if state == "dead" else "was " + state, error, job_id))


@subcommand("wait", arg("ids", "default: until the queue is empty", nargs="*", metavar="ID"))
def cmd_wait(queue, args):
    """Wait until jobs have ended. One id: exits with the job's exit code (125 if it has none);
    several, or none given: 0 all completed, 1 not. For a limit there is timeout(1).

    wait hello
    timeout 10m queuectl wait job-1 job-2"""
    store, ended = queue.look(), {}
    ids = list(dict.fromkeys(full_id(store, given) for given in args.ids))
    before, drawing, start, wait = store.totals(), Drawing(sys.stderr), monotonic(), Wait()
    with watching():
        while True:
            store = queue.look()
            left = [job_id for job_id in ids if job_id not in ended]
            for at in range(0, len(left), PAGE):
                for job_id, *end in store.states(left[at:at + PAGE]):
                    if end[0] in FINISHED:
                        ended[job_id] = end
            totals = store.totals()
            died = totals["jobs_died"] - before["jobs_died"]
            open_now = sum(totals[state] for state in UNFINISHED)
            done, total = len(ended), len(ids)
            if not ids:
                done = totals["jobs_completed"] - before["jobs_completed"] + died
                total = done + open_now
            failed = sum(end[0] != "completed" for end in ended.values()) if ids else died
            drawing.show([bar(done, total, failed, monotonic() - start)])
            if done >= total:
                break
            wait(hindrance(store))
    drawing.close()
    if failed and len(ids) == 1:
        raise failure_of(ids[0], *ended[ids[0]])
    if failed:
        raise Failure("%s did not complete; see: queuectl list --state dead" % plural(failed, "job"))
    print_compact(reply("%s completed" % plural(len(ids), "job") if ids else "Queue is empty"))


def own_pool(queue, count, only=None):
    """A Pool of this process's own."""
    return Pool(queue.store(), range(MAX_WORKERS + 1, MAX_WORKERS + 1 + count), only)


def attend(queue, job_id, ending, say, tail):
    """See a job through, by a worker of our own while nobody else works it; the Job. A signal
    cancels it; another, not at once, ends the waiting."""
    pool, wait, heard_at = None, Wait(lambda s: select.select([ending.fd], (), (), s)), None
    while True:
        job, wrote = tail.step(say) if tail else (known_job(queue.look(), job_id), False)
        if job.state in FINISHED:
            break
        if ending.take():
            if heard_at is None:
                queue.change("cancel", ids=[job_id], skip=True)
                heard_at = monotonic()
            elif monotonic() > heard_at + TWICE_S:
                raise Failure("job %s is left as it is; see: queuectl show %s" % (job_id, job_id))
        if pool is None and not is_worked(queue.look(), job_id):
            pool = own_pool(queue, 1, [job_id])
            pool.watch(ending.fd, int)
            wait.step = pool.step
        if pool and (job.ready or job.due and job.due <= now_ms()):
            pool.look_at = 0.0
        wrote or wait(waiting_for(queue.look(), job, now_ms()) if say is tell else None)
    if pool:  # for the `on-dead` job
        pool.own = []
        while pool.workers:
            pool.step()
    return job


@subcommand("run", *JOB_FLAGS, switch("--quiet", "print nothing unless the job dies"))
def cmd_run(queue, args):
    """Enqueue a command, wait, hand on its output and exit code. For crontabs. Where nobody works
    it works its own job. Ctrl-C or SIGTERM cancels the job; with --unique and the key held nothing
    is done.

    run --quiet --unique backup --timeout 2h -- /usr/local/bin/backup
    run --max-retries 5 -- 'curl -fsS https://example.org/ >/srv/page'"""
    if args.argv is None:
        raise Usage("a command is missing, after --, like: run --quiet -- make")
    say, ending = silent if args.quiet else tell, Ending()
    queue.note = silent
    answer = store_one(queue, args, job_fields(args))
    job_id = answer["id"]
    if is_held(answer):
        say("job %s has this key and is unfinished; nothing was started" % job_id)
        if not is_worked(queue.look(), job_id):  # its `run`, or its daemon, is gone
            attend(queue, job_id, ending, silent, None)
        return 0
    if not args.quiet:
        warn(answer)
    job = attend(queue, job_id, ending, say, None if args.quiet else Tail(queue, job_id))
    failure = failure_of(job_id, job.state, job.exit_code, job.error)
    if failure is None:
        return 0
    if args.quiet:
        Tail(queue, job_id, max([attempt["serial"] for attempt in
                                 queue.look().attempts(job_id)], default=0)).step(silent)
    tell(str(failure))
    return 130 if job.state == "cancelled" and ending.first == signal.SIGINT else failure.exit_code


@subcommand("drain", count_arg("so many workers (default 1)", default=1))
def cmd_drain(queue, args):
    """Run what is queued, in the foreground, without a daemon. Ends when nothing is ready, running
    or waiting for another try; exits 1 if a job died.

    drain --count 4"""
    ending, store = Ending(), queue.store()
    before, start, drawing = store.totals(), monotonic(), Drawing(sys.stderr)
    pool = own_pool(queue, args.count)
    pool.watch(ending.fd, int)
    while pool.workers or not pool.stopping:
        pool.step()
        totals = store.totals()
        died = totals["jobs_died"] - before["jobs_died"]
        done = totals["jobs_completed"] - before["jobs_completed"] + died
        drawing.show([bar(done, done + sum(totals[state] for state in UNFINISHED), died,
                          monotonic() - start)])
        if ending.take():
            (pool.force if pool.stopping else pool.stop)()
        elif not store.unsettled(now_ms()):
            pool.stop()
    drawing.close()
    if ending.first:
        raise Failure("stopped before the queue was drained; the rest is kept")
    if died:
        raise Failure("%s died; see: queuectl dlq list" % plural(died, "job"))
    print_compact(reply("Queue drained"))


@subcommand("retry", *selection(FINISHED + ("failed",)))
def cmd_retry(queue, args):
    """Run jobs that have ended again; have failed ones tried now.

    retry hello
    retry --state cancelled"""
    act_on(queue, args, FINISHED + ("failed",), "added to queue", "retry")


@subcommand("cancel", *selection(UNFINISHED))
def cmd_cancel(queue, args):
    """Cancel jobs: waiting ones at once, running ones when all their processes are stopped.

    cancel hello
    cancel --state pending"""
    ids, wait = act_on(queue, args, UNFINISHED, "cancelled", "cancel"), Wait()
    store = queue.look()
    with watching():
        for at in range(0, len(ids), PAGE):
            while any(state == "processing" for _, state, _, _ in store.states(ids[at:at + PAGE])):
                settle_open(queue)
                wait("running jobs to stop")


def settle_open(queue):
    """Where no daemon does it: stop and record the attempts whose worker is gone."""
    store = queue.store()
    if not daemon_of(store) and set(store.open_slots()) - set(store.place.slots()):
        pool = Pool(store)
        pool.look()
        while pool.workers:
            pool.step()


@subcommand("delete", *selection(FINISHED),
            duration_arg("--older-than", "only those that ended so long ago", default=0))
def cmd_delete(queue, args):
    """Delete jobs that have ended, with their attempts and output.

    delete hello
    delete --state completed --older-than 7d"""
    act_on(queue, args, FINISHED, "deleted", "delete")


@subcommand("pause", arg("--reason", "shown by status", default="", metavar="TEXT"))
def cmd_pause(queue, args):
    """Start nothing new; running jobs go on. Kept over restarts.

    pause --reason 'disk swap, back at 9'"""
    print_compact(queue.change("pause", reason=args.reason))


@subcommand("resume")
def cmd_resume(queue, args):
    """End the pause.

    resume"""
    print_compact(queue.change("resume"))


@subcommand("dlq list", QUIET)
def cmd_dlq_list(queue, args):
    """Show the dead jobs.

    dlq list -q"""
    show_jobs(queue, args, ("dead",))


@subcommand("dlq retry", arg("ids", "a dead job", nargs="*", metavar="ID"),
            switch("--all", "all dead jobs"))
def cmd_dlq_retry(queue, args):
    """Queue dead jobs again, their attempts back at 0.

    dlq retry hello
    dlq retry --all"""
    act_on(queue, args, ("dead",), "added to queue", "dlq", "retry")


@subcommand("config set", KEY, arg("value"))
def cmd_config_set(queue, args):
    """Change a setting. Times are milliseconds, or like 90s, 5m, 1h30m; `default` puts it back.

    config set max-retries 5
    config set timeout 10m"""
    answer = queue.change("config", "set", key=args.key, value=args.value)
    if args.key in DURATIONS:
        tell("%s: %s" % (args.key, lapse(answer["value"])))
    print_compact(reply(answer["message"]))


@subcommand("config get", KEY)
def cmd_config_get(queue, args):
    """Show a setting.

    config get max-retries"""
    setting_of(args.key)
    print_compact(queue.look().settings[args.key])


@subcommand("config list")
def cmd_config_list(queue, args):
    """Show all settings.

    config list"""
    settings = queue.look().settings
    print_value(args, settings, pairs(settings))


@subcommand("metrics", arg("--format", "for a collector", choices=("json", "prometheus")))
def cmd_metrics(queue, args):
    """Show counters and run times.

    metrics --format prometheus >queuectl.prom"""
    metrics = metrics_of(queue.look(), now_ms())
    if args.format == "prometheus":
        print_text("\n".join(exposition(metrics)))
    else:
        print_value(args, metrics, pairs(metrics))


@subcommand("check", number_arg("--max-pending", "most pending jobs"),
            number_arg("--max-dead", "most dead jobs"),
            duration_arg("--max-age", "longest that a ready job may have waited, like 10m"),
            arg("--completed", "a job whose id begins so, or with this key, must have completed",
                metavar="NAME"),
            duration_arg("--within", "not longer ago than this"))
def cmd_check(queue, args):
    """Judge the queue as a monitoring plugin. It says one line and exits 0 OK, 1 WARNING (jobs wait
    and nobody works), 2 CRITICAL (a limit is exceeded), 3 UNKNOWN (any error).

    check --max-dead 0 --max-age 10m
    check --completed backup- --within 26h"""
    if (args.completed is None) != (args.within is None):
        raise Usage("--completed and --within go together")
    store = queue.look()
    if store.place is None:
        raise Failure("no queue at %s; name it with --db" % queue.place.db)
    age_s, ended_s = (ms and ms // 1000 for ms in (args.max_age, args.within))
    status, line = judge(store, {"pending": args.max_pending, "dead": args.max_dead, "age": age_s,
                                 "ended": ended_s}, args.completed, now_ms())
    print_text(line)
    return status


@subcommand("backup", arg("file", "a file that does not exist yet", metavar="FILE"))
def cmd_backup(queue, args):
    """Copy the database while jobs run. The copy holds all that was acknowledged before, is
    checked, 0600, and a queue like any other: DB_PATH=FILE.

    backup /var/backups/queue-$(date +%F).db"""
    store = queue.look()
    if store.place is None:
        raise Failure("no queue at %s; name it with --db" % queue.place.db)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no half of it is left
    count = back_up(store, os.path.abspath(os_path(args.file)))
    print_compact(reply("Backed up %s to %s" % (plural(count, "job"), args.file)))


@subcommand("doctor")
def cmd_doctor(queue, args):
    """Look for what is or will be wrong, and say what to do about it. Nothing is changed. Exit 0
    if all is well, 1 if not.

    doctor
    --db /srv/q.db doctor"""
    queue.find()
    findings = diagnose(queue)
    wrong = ["%(check)s: %(detail)s; %(advice)s" % finding for finding in findings
             if not finding["ok"]]
    print_value(args, findings, [pasted(safe(line)) for line in wrong] or ["ok"])
    for line in () if for_people(args) else wrong:
        tell(line)
    return int(bool(wrong))


@subcommand("systemd", switch("--user", "for your own systemd instance"))
def cmd_systemd(queue, args):
    """Print a systemd unit that serves this queue with this file. Jobs run as the user who asks,
    and have 80 s to end when it is stopped.

    systemd | sudo tee /etc/systemd/system/queuectl.service
    systemd --user >~/.config/systemd/user/queuectl.service"""
    print_text(systemd_unit(queue.place, args.user))
    tell("save it as %s/queuectl.service, then: systemctl%s daemon-reload; systemctl%s enable --now"
         " queuectl" % (("~/.config/systemd/user", " --user", " --user") if args.user
                        else ("/etc/systemd/system", "", "")))


def manual(name):
    """(help, examples) of a command."""
    about, _, examples = re.sub("\n +", "\n", COMMANDS[name][0].__doc__).partition("\n\n")
    return about, ["  queuectl " + example for example in examples.split("\n")]


def summary(name):
    """The first sentence of a command's help."""
    return manual(name)[0].replace("\n", " ").partition(". ")[0].rstrip(".")


def words_at(queue, words):
    """What may stand for the last of `words`, which are those of a command line."""
    *before, word = words or [""]
    name = next((" ".join(before[:n]) for n in (2, 1) if " ".join(before[:n]) in COMMANDS), "")
    if not name:
        prefix = before[0] + " " if before else ""
        return {full[len(prefix):].split()[0] for full in COMMANDS if full.startswith(prefix)}
    arguments = COMMANDS[name][1]
    for names, options in arguments:
        if before[-1] in names and "choices" in options:
            return options["choices"]
    if word.startswith("-"):
        return [flag for names, _ in arguments for flag in names if flag[0] == "-"]
    firsts = {names[0] for names, _ in arguments}
    if "key" in firsts:
        return SETTINGS
    if firsts & {"id", "ids"}:
        return [job.id for job in queue.look().jobs(queue.look().select(limit=200))]
    return ()


@subcommand("completion", arg("shell", "the shell to complete in", choices=sorted(SHELLS)))
def cmd_completion(queue, args):
    """Print what makes Tab complete commands, flags, states, settings and ids.

    completion bash >~/.local/share/bash-completion/completions/queuectl
    completion fish >~/.config/fish/completions/queuectl.fish"""
    if args.argv is None:
        print_text(SHELLS[args.shell] % CALL)
        return 0
    found = [word for word in sorted(words_at(queue, args.argv))
             if word.startswith(args.argv[-1] if args.argv else "")]
    sys.stdout.writelines(word + "\n" for word in found)
    return int(not found)


# ---- Main ---------------------------------------------------------------------------------------
# The parser of the one command that is called, and the exit status.


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours."""

    def error(self, message):
        raise Usage("%s; see: queuectl%s --help" % (message, self.prog[8:]))


def new_parser(prog, **options):
    # A width, or each parser would import shutil to ask the terminal, help or no help.
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=78)
    parser = Parser(prog=prog, formatter_class=layout, allow_abbrev=False, **options)
    for names, more in (arg("--db", "the queue's database (else DB_PATH)", metavar="PATH"),
                        arg("--socket", "the daemon's socket (else SOCKET_PATH)", metavar="PATH"),
                        switch("--json", "JSON on a terminal too"),
                        switch("--table", "a table in a pipe too")):
        parser.add_argument(*names, default=argparse.SUPPRESS, **more)
    return parser


def overview(prefix=""):
    return "commands:\n" + "\n".join("  %-15s %s" % (name, summary(name)) for name in COMMANDS
                                     if name.startswith(prefix))


def parse_group(name, rest):
    """Not a command, but maybe the first word of some, like dlq: their help if that is asked for,
    else an error that tells what is nearest. Does not return."""
    known = [full for full in COMMANDS if full.startswith(name + " ")]
    if known and set(rest) & {"-h", "--help"}:
        new_parser("queuectl " + name, epilog=overview(name + " ") + "\n\nexamples:\n" + "\n".join(
            manual(full)[1][0] for full in known)).parse_args(["--help"])
    import difflib
    given = " ".join([name] + rest[:1] * bool(known))
    near = difflib.get_close_matches(given, COMMANDS, 1)
    raise Usage("unknown command %s; %s" % (
        given, "did you mean: queuectl " + near[0] if near and not known else
        "known are %s" % ", ".join(known or COMMANDS)))


def parse_global(argv, args):
    """Take the flags that stand before a command into `args`; the command and what follows."""
    parser = new_parser("queuectl", description=__doc__.partition("\n\n")[0], epilog=overview()
                        + "\n\nexamples:\n" + __doc__.split("\n\n")[1]
                        + "\n\nqueuectl COMMAND --help tells more.")
    parser.add_argument("--version", action="version", version="queuectl " + VERSION)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    return parser.parse_args(argv, args).words


def cmd_overview(queue, args):
    """What `queuectl` alone shows."""
    print_text("\n".join(frame(queue.look(), None, now_ms())))
    print_text("\nusual commands: enqueue -- CMD, worker start, list, show ID, logs -f ID, dlq retry"
               " ID, doctor\nall of them: %s --help" % CALL)


def parse(argv):
    """(function, arguments) of a command line. Only the parsers that are needed are made."""
    args = argparse.Namespace(argv=None, db=None, socket=None, json=False, table=False, given=set())
    words = argv
    if not argv or argv[0].startswith("-"):
        words = parse_global(argv, args)
        if not words:
            return cmd_overview, args
    name = " ".join(words[:2])
    if name not in COMMANDS:
        name = words[0]
    if name not in COMMANDS:
        parse_group(name, words[1:])
    function, arguments = COMMANDS[name]
    rest = words[len(name.split()):]
    if "--" in rest and name in ("enqueue", "run", "completion"):
        at = rest.index("--")
        rest, args.argv = rest[:at], rest[at + 1:]
    about, examples = manual(name)
    parser = new_parser("queuectl " + name, description=about,
                        epilog="\n".join(["examples:"] + examples))
    # What it means to name no jobs, for commands where some can't be named in every way.
    parser.set_defaults(state=None, older_than=0)
    for names, options in arguments:
        more = {} if "action" in options or names[0][0] != "-" else {"action": Once}
        parser.add_argument(*names, **dict(options, **more))
    args, unknown = parser.parse_known_args(rest, args)
    if unknown:
        parser.error("unrecognized arguments: %s%s" % (
            " ".join(unknown), "; a command goes after --" * hasattr(args, "job")))
    return function, args


def prepare_stdio():
    """Open descriptors 0 to 2, or the lock could become one of them; write UTF-8 whatever the
    locale."""
    import io
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes this very one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, io.TextIOWrapper(stream.detach(), "utf-8", "backslashreplace",
                                                line_buffering=name == "stderr"))
        elif stream is None:
            setattr(sys, name, open(os.devnull, "w"))


def is_check(argv):
    """Whether the command is `check`, whatever else is wrong with the line."""
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            return word == "check"
        if word in ("--db", "--socket"):
            next(words, None)
    return False


def complain(argv, problem, status):
    """Say what went wrong, in one line; the exit status. `check` has its own form of both."""
    if is_check(argv):
        with suppress(OSError):
            print_text("UNKNOWN - %s" % problem.replace("|", "/"))
        return 3
    if sys.stderr.isatty() and "--json" not in argv:
        tell("Error: " + problem)
    else:
        tell(compact({"success": False, "message": "Error: %s" % pasted(problem)}))
    return status


def main(argv):
    """Run one command; the exit status. 0: done, 1: refused or failed, 2: wrong usage."""
    script = os.path.basename(sys.argv[0])
    words = ["python3", sys.argv[0]] if script.endswith(".py") else [script or "queuectl"]
    call_as(words, None)
    try:
        function, args = parse([utf8(argument) for argument in argv])
        place = locate(args.db, args.socket)
        if args.db:
            call_as(words, utf8(place.db))
        return function(Queue(place, tell), args) or 0
    except Failure as error:
        return complain(argv, str(error), error.exit_code)
    except KeyboardInterrupt as interrupt:
        tell(str(interrupt) or "interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at exit
        return 3 if is_check(argv) else 1
    except OSError as error:
        return complain(argv, safe(str(error)), 1)


def run_script():
    """The program. Ends at once, not by sys.exit: multiprocessing would wait for workers, which may
    outlive their daemon to finish their jobs."""
    status = 3 if is_check(sys.argv[1:]) else 1
    try:
        prepare_stdio()
        status = main(sys.argv[1:])
    except SystemExit as ending:  # argparse, after its help
        status = ending.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    run_script()
