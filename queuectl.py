#!/usr/bin/env python3
"""queuectl: a durable job queue for one host, in one file.

  queuectl enqueue '{"id":"hello","command":"echo Hello World"}'
  queuectl worker start --count 2
  queuectl status
  queuectl list --state completed
  queuectl dlq retry hello

 cron, shells, scripts             daemon: one process, one thread, the only writer
 +-------------+ JSON requests     +-----------------------------------------------+
 | queuectl ...| and answers over  | socketserver -> Operations -> Store -> SQLite |
 |             +------------------>|                     ^                         |
 +------+------+ the Unix socket   |     Retry policy -> Loop <- Pool              |
        | no daemon: the same      +------------------------+-------^--------------+
        | Operations, in process,                 order,    |       | outcome, noted
        v under the same lock                     a socket  |       | in its file too
     SQLite                                          +------v-------+---+
                                                     | worker 1 ... N   +-> /bin/sh -c COMMAND
                                                     +------------------+   own session; output
                                                                            into its run file
Life cycle of a job, and what moves it:

  (new)      -> pending              Store.insert, Store.adopt
  pending    -> processing           Store.claim
  failed     -> processing           Store.claim, once run_after has passed
  processing -> completed            Store.finish: exit 0
  processing -> failed               Store.finish: will be tried again
  processing -> dead                 Store.finish: out of retries
  processing -> pending or failed    Store.give_back: not counted
  dead       -> pending              Store.requeue
  pending or failed -> dead          Store.cancel (a running one: mark_cancelled, then finish)
  pending or failed -> processing    Store.put_back: undoes another program's change

On disk: DB (SQLite, WAL), DB.lock (whoever holds its flock may open DB), DB.log, and DB-run/ with
a file w.N for each worker (lock, slot and mailbox) and a file N for each running attempt.

The sections of this file, each of which uses only those above it:

  Constants and defaults
  Time, ids and text
  Errors
  Files and processes
  Settings and jobs
  Retry policy
  Schema
  Store
  Running a command
  Protocol
  Worker
  Pool
  Operations
  Lock, socket and log
  Daemon
  Client
  Doctor
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
import selectors
import signal
import socket
import stat
import struct
import time
from contextlib import ExitStack, closing, contextmanager, suppress

# ---- Constants and defaults ---------------------------------------------------------------------
# What is fixed; for what `config set` may change see SETTINGS. Times are milliseconds unless the
# name says _s.

VERSION = "1.0.0"
STATES = ("pending", "processing", "completed", "failed", "dead")
UNFINISHED = ("pending", "failed", "processing")
FINISHED = ("completed", "dead")

MAX_MS = 10 ** 12               # the longest duration taken, some 31 years
LAST_MS = 253402300800000       # the year 10000, where ISO dates end
MAX_COMMAND = 131071            # bytes: Linux takes no longer argument
MAX_ENV = 1 << 20               # bytes of a job's own environment in all
MAX_REQUEST = 16 << 20          # bytes of one request
MAX_WORKERS = 1000
MAX_SOCKET_PATH = 107           # bytes: sockaddr_un, less its NUL
BATCH_JOBS = 1000               # `enqueue -` stores so many at once,
BATCH_BYTES = 8 << 20           # or so many bytes
PAGE_JOBS = 500                 # a list travels in pages of so many jobs,
PAGE_BYTES = 1 << 20            # or so many bytes
PROMOTE = 1000                  # due jobs made ready, or rows adopted, in one turn of the loop
STARTS = 32                     # workers started in one turn of the loop
ANSWERS = 250                   # answers remembered, for clients whose connection broke
MAX_ASKED = 500                 # ids in one statement: SQLite 3.7.17 takes 999 values
ASKED = 2000                    # jobs that `wait` asks for at each look
PURGE = 500                     # jobs deleted in one transaction
PAGE_OUTPUT = 256 << 10         # output travels in pieces of so many bytes
MAX_DEAD_COMMAND = 100000       # bytes of QUEUECTL_DEAD_COMMAND
LOOKED_AT = 20000               # jobs that `check` looks at, some 20 ms
LOW_DISK = 64 << 20             # bytes free below which `doctor` warns
MIN_RUN_FILE = 1 << 20          # bytes an attempt's output may grow to, at least, before it is cut
PIECE = 64 << 10                # bytes of output read at a time
MAX_PIPE = 1 << 20              # bytes in a pipe, at the most

KEEP_MS = 2000                  # a completed job stays at least: who waits for it must see it
TWICE_S = 0.5                   # signals to a `run` within it are one
GRACE_S = 2.0                   # from SIGTERM to SIGKILL
SILENT_S = 10.0                 # a worker this long past its job's end is taken for hung
LOOK_S = 1.0                    # between two looks at the database, the lock and the socket
REACH_S = 10.0                  # how long a command tries to reach the queue
ANSWER_S = 40.0                 # how long it then waits for an answer
WRITE_S = 20.0                  # how long the daemon waits for another program's database lock
POLL_S = 0.2                    # between two looks of a command that watches, at the most
IDLE_S = 60.0                   # a connection without a request is closed
BUSY_S = 0.05                   # SQLite's own wait for a lock: the loop stands still meanwhile

DEFAULT_SOCKET = "/tmp/queuectl.sock"
CODE = sys._getframe().f_code   # this file, compiled; see shed_syntax_tree

# ---- Time, ids and text -------------------------------------------------------------------------
# The only place that reads a clock; what handles processes and sockets asks it here. Whatever
# decides or stores takes the time as `now`: milliseconds since 1970, UTC.

UNITS_MS = {"ms": 1, "s": 1000, "m": 60000, "h": 3600000, "d": 86400000}
DATE = (r"(\d{4})-(\d\d)-(\d\d)(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?"
        r"\s?(?:[Zz]|([+-])(\d\d)(?::?(\d\d))?)?)?")


def now_ms():
    """The wall clock, in ms since 1970."""
    return int(time.time() * 1000)


def monotonic():
    """Seconds on a clock that nobody sets: for timeouts."""
    return time.monotonic()


@functools.lru_cache(maxsize=64)  # a batch, or a turn of the loop, asks for few
def iso(ms):
    """2026-01-15T10:30:00.000Z for ms since 1970; None for None."""
    if ms is None:
        return None
    seconds, rest = divmod(ms, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%03dZ" % rest


def parse_date(text):
    """ms since 1970 of an ISO 8601 date-time (also SQLite's form); without an offset it is UTC."""
    from datetime import datetime, timezone
    match = re.fullmatch(DATE, text.strip(), re.ASCII) if isinstance(text, str) else None
    if not match:
        raise ValueError("not a date")
    *parts, fraction, sign, hours, minutes = match.groups("0")
    hours, minutes = int(hours), int(minutes)
    if hours > 23 or minutes > 59:
        raise ValueError("not an offset")
    moment = datetime(*map(int, parts), tzinfo=timezone.utc).timestamp()
    ahead = (hours * 60 + minutes) * (-60 if sign == "-" else 60)
    return (int(moment) - ahead) * 1000 + int((fraction + "00")[:3])


def parse_duration(text, bare=None):
    """ms of `90s`, `5m`, `2h`, `1d`, `500ms`; a bare number has the unit `bare`, or is refused."""
    match = re.fullmatch(r"(\d{1,13})([a-z]*)", text.strip(), re.ASCII)
    unit = match and (match.group(2) or bare)
    if match and not unit:
        raise ValueError("needs a unit: 90s, 5m, 2h or 1d")
    if unit not in UNITS_MS:
        raise ValueError("must be like 90s, 5m, 2h or 1d" + ", or in ms" * (bare == "ms"))
    return int(match.group(1)) * UNITS_MS[unit]


def new_ids(now, count=1):
    """`count` new job ids that sort by time: 20260115T103000123-4f2a9c01."""
    stem = re.sub("[-:.Z]", "", iso(now))
    first = int.from_bytes(os.urandom(4), "big") & 0x7fffffff
    return ["%s-%08x" % (stem, first + i) for i in range(count)]


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


# A value as JSON in one ASCII line. repr: another program may have put bytes into a row of ours.
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

    def __init__(self, db):
        super().__init__("no daemon runs for %s; start one with: worker start" % db,
                         no_daemon=True)


class StorageError(Failure):
    """The database can't be used now; nothing was changed."""


class Busy(StorageError):
    """Another program holds the database's write lock."""


class Replaced(StorageError):
    """The database or the lock file is no longer the one that was opened."""


class Served(Failure):
    """Another process already is the one that works with the database."""


class Unreachable(Failure):
    """Nobody answers now; asking again may help, and repeats nothing that was done."""


def storage_error(path, error):
    """The StorageError for a sqlite3 or OS `error` on the database at `path`, with what to do."""
    text = str(error)
    for words, advice in (
            ("locked", "%s is locked by another program; try again when it is done"),
            ("disk is full", "no space left for %s; free some and try again"),
            ("readonly", "%s can't be written; check its mode and its file system"),
            ("unable to open", "%s can't be opened; check its directory"),
            ("not a database", "%s is not a database; restore a backup or move it"),
            ("malformed", "%s is corrupt; restore a backup, or save what is left with:"
                          " sqlite3 FILE .recover"),
            ("no such", "%s is not a queue's database: another program changed it"),
            ("decode", "%s holds a text that is not UTF-8, which another program wrote; mend it"
                       " with sqlite3"),
            ("No space", "no space left for %s; free some and try again"),
            ("disk I/O", "%s can't be read or written; its disk is full, or look at the kernel's"
                         " log")):
        if words in text:
            kind = Busy if words == "locked" else StorageError
            return kind((advice % path) + " (%s)" % text)
    return StorageError("the database %s failed: %s" % (path, text))


def decode_json(text, what, kind=None):
    """The value of a JSON text or its bytes, its objects as dicts of that kind; a Failure naming
    `what` when it is none."""
    def refuse(constant):
        raise ValueError("%s is not JSON" % constant)
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), parse_constant=refuse,
                          object_hook=kind)
    except RecursionError:
        raise Failure("%s is nested too deeply" % what)
    except UnicodeDecodeError:
        raise Failure("%s is not JSON in UTF-8" % what)
    except ValueError as error:
        raise Failure("%s is not JSON: %s" % (what, error))


# ---- Files and processes ------------------------------------------------------------------------
# Files that nobody planted, and processes that are the ones we mean.


def check_regular(path, status):
    """Refuse what is no regular file of ours with one name."""
    if not stat.S_ISREG(status.st_mode):
        raise Failure("%s is not a regular file; move it away" % path)
    if status.st_uid != os.geteuid():
        raise Failure("%s belongs to another user (uid %d); run as that user or use another --db"
                      % (path, status.st_uid))
    if status.st_nlink > 1:
        raise Failure("%s has a second name (hard link); move it away" % path)


def open_private(path, flags=os.O_RDWR | os.O_CREAT):
    """A descriptor on a file of ours, mode 0600, made if need be. Links are never followed."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Failure("%s is a symbolic link; move it away" % path)
        advice = "; run as its owner, or use another --db" * isinstance(error, PermissionError)
        raise Failure("can't open %s: %s%s" % (path, error.strerror, advice))
    try:
        status = os.fstat(fd)
        check_regular(path, status)
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def has_acl(path):
    """Whether more users are named than the mode tells: it then shows their mask as the group."""
    with suppress(OSError, AttributeError):  # a system, or a disk, without them
        return "system.posix_acl_access" in os.listxattr(path)
    return False


def others_can_write(path, status):
    """Whether someone else may write there; a primary group that bears the user's name may."""
    if status.st_mode & 0o002:
        return True
    if not status.st_mode & 0o020:
        return False
    if has_acl(path):
        return True
    import grp
    import pwd
    try:
        mine = pwd.getpwuid(os.geteuid())
        return (status.st_gid != mine.pw_gid
                or grp.getgrgid(status.st_gid).gr_name != mine.pw_name)
    except KeyError:
        return True


def check_directory(path, status):
    """Refuse what is no directory of ours."""
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise Failure("%s is not a directory of yours; move it away" % path)


def check_links(path):
    """Refuse a way that leads over a symbolic link which another user may have planted: one in a
    directory where all may write, neither ours nor that directory's owner's."""
    folder = os.path.dirname(path)
    while path != folder:
        if os.path.islink(path):
            where, owner = os.stat(folder), os.lstat(path).st_uid
            if where.st_mode & 0o002 and owner not in (os.geteuid(), where.st_uid):
                raise Failure("%s is a symbolic link of another user (uid %d); use another --db"
                              % (path, owner))
        path, folder = folder, os.path.dirname(folder)


def private_directory(path):
    """Make `path` a directory of ours, 0700, or see that it is one nobody else can write."""
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)
    status = os.lstat(path)
    check_directory(path, status)
    if others_can_write(path, status):
        raise Failure("%s can be written by others; run: chmod go-w %s" % (path, path))


def private_directories(path):
    """The same, with what is missing above it."""
    above = os.path.dirname(path)
    if not os.path.isdir(above):
        private_directories(above)
    private_directory(path)


def check_folder(folder):
    """Refuse a directory that is missing, or where others could meddle with root's files."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise Failure("no directory %s (%s); make it, or give another --db"
                      % (folder, error.strerror))
    if os.geteuid() == 0 and (status.st_uid != 0 or others_can_write(folder, status)):
        raise Failure("%s can be written by others than root; use a directory that can't"
                      % folder)


def mount_of(path, table="/proc/self/mountinfo"):
    """(mount point, type) of the file system that `path` is on; "" where the system doesn't say."""
    best = ("", "")
    with suppress(OSError), open(table, errors="surrogateescape") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda m: chr(int(m.group(1), 8)), left.split()[4])
            if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
                best = (point, right.split()[0])
    return best


def check_database(path):
    """Refuse a database with planted files, or one where SQLite's locks don't work."""
    for name in (path, path + "-wal", path + "-shm", path + "-journal"):
        with suppress(FileNotFoundError):
            check_regular(name, os.lstat(name))
    point, kind = mount_of(path)
    if point == path:
        raise Failure("%s is mounted alone, so its lock and its -wal stay behind; mount its"
                      " directory" % path)
    if re.match(r"nfs|cifs|smb|9p|afs|ceph|gluster|lustre|ncp|fuse\.(ssh|gluster|ceph|s3|rclone)",
                kind):
        raise Failure("%s is on a network file system (%s), where SQLite's WAL does not work;"
                      " give a --db on a local disk" % (path, kind))


@functools.lru_cache(maxsize=None)  # no process outlives it
def boot_id():
    """Differs after each boot; "" where the system doesn't say."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def read_at(path, start, size):
    """(up to `size` bytes of a file from byte `start` on, from the end if negative; its size)."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        length = os.fstat(fd).st_size
        return os.pread(fd, size, max(start if start >= 0 else length + start, 0)), length
    finally:
        os.close(fd)


@contextmanager
def passing_over():
    """What can't be read in the block is left out; but a lack of descriptors says nothing about
    the file, and is raised."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise


def process_status(pid):
    """What /proc tells of a process, from its state on (see proc(5)); [] for a zombie."""
    fields = read_at("/proc/%d/stat" % pid, 0, 4096)[0].rpartition(b")")[2].split()
    return [] if fields[0] in (b"Z", b"X") else fields


def process_start(pid):
    """When process `pid` started, in some unit of the system's; "" when it is gone or a zombie."""
    with passing_over():
        fields = process_status(pid)
        return fields[19].decode() if fields else ""
    if os.path.exists("/proc/self/stat"):
        return ""
    import subprocess
    try:
        return subprocess.check_output(["ps", "-o", "lstart=", "-p", str(pid)],
                                       stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def is_locked(path):
    """True, False, or None when there is no such file. Shared: two lookers don't meet."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def has_open(pid, fd, wanted):
    """Whether descriptor `fd` of `pid` is the file with status `wanted`, open for writing."""
    with suppress(OSError):
        if os.path.samestat(os.stat("/proc/%s/fd/%s" % (pid, fd)), wanted):
            with open("/proc/%s/fdinfo/%s" % (pid, fd)) as info:
                flags = re.search(r"flags:\s*([0-7]+)", info.read())
            return flags and int(flags.group(1), 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def holders(path):
    """The pids, but for our own, that have `path` open for writing: who only reads it, like
    tail -f, is no part of the job. Empty where there is no /proc."""
    found = []
    with suppress(OSError):
        wanted = os.stat(path)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                fds = os.listdir("/proc/%s/fd" % pid)
                if int(pid) != os.getpid() and any(has_open(pid, fd, wanted) for fd in fds):
                    found.append(int(pid))
    return found


def pad(value, size):
    """`value` as JSON, filled with blanks to `size` bytes: one write replaces it whole."""
    return compact(value).encode().ljust(size - 1) + b"\n"


def unpad(data):
    """The object that a JSON text is; {} when it is garbled, or not all there."""
    try:
        value = json.loads(data)
        return value if isinstance(value, dict) else {}
    except ValueError:
        return {}


# ---- Settings and jobs --------------------------------------------------------------------------
# What `config set` may change, the job's record, and the checks of whatever a user or another
# program gives.


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


def in_range(number, low, high):
    if not low <= number <= high:
        raise ValueError("must be %d to %d" % (low, high))
    return number


def whole(text):
    if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        raise ValueError("must be a whole number")
    return int(text)


@functools.lru_cache(maxsize=8)
def split_shell(text):
    """The argv that the `shell` setting stands for."""
    import shlex
    argv = shlex.split(as_text(text))
    if not any(argv[:1]):
        raise ValueError("must name a program, like /bin/sh -c")
    return argv


def checked(field, check, *values):
    """What `check(*values)` returns; its ValueError as a BadField."""
    try:
        return check(*values)
    except ValueError as error:
        raise BadField(field, str(error))


def as_command(value):
    size = len(as_text(value).encode())
    if not value.strip():
        raise ValueError("must not be empty")
    if size > MAX_COMMAND:
        raise ValueError("is too long: %d bytes, at most %d; put it into a script"
                         % (size, MAX_COMMAND))
    return value


def number_from(low, high):
    return lambda text: in_range(whole(text), low, high)


def ms_from(low):
    return lambda text: in_range(parse_duration(text, bare="ms"), low, MAX_MS)


# check: returns the value that a text stands for
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
    "on-dead": Setting("", lambda text: text and as_command(text),
                       "a shell line, enqueued whenever a job dies"),
}


def checked_key(key):
    if not isinstance(key, str) or key not in SETTINGS:
        raise Failure("unknown setting %s; known are %s"
                      % (str(key)[:80], ", ".join(SETTINGS)))
    return key


def read_setting(key, value):
    """The typed value of setting `key` given as text or number; BadField, or Failure if unknown."""
    return checked(key, SETTINGS[checked_key(key)].check, str(value).strip())


def as_id(value):
    value = as_text(value)
    if not 1 <= len(value) <= 128 or not value.isprintable() or " " in value or "/" in value:
        raise ValueError("must be 1 to 128 printable characters without spaces or slashes")
    return value


def as_int(value, low, high):
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number, %d to %d" % (low, high))
    return in_range(value, low, high)


def as_ms(value):
    if isinstance(value, str):
        value = parse_duration(value)
    return as_int(value, 0, MAX_MS)


def as_date(value):
    try:
        ms = parse_date(value)
    except ValueError:
        ms = -1
    if not 0 <= ms < LAST_MS:
        raise ValueError("must be a date-time since 1970, like 2026-01-15T10:30:00Z")
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


def as_unique(value):
    if not 1 <= len(as_text(value)) <= 1024:
        raise ValueError("must be 1 to 1024 characters")
    return value


FIELDS = {  # what a job may be given -> the check that returns what is stored
    "id": as_id,
    "command": as_command,
    "priority": lambda value: as_int(value, -1000, 1000),
    "run_after": as_date,
    "timeout": as_ms,
    "max_retries": lambda value: as_int(value, 1, 1000),
    "cwd": as_cwd,
    "env": as_env,
    "unique": as_unique,
}
OWN_TIMEOUT, OWN_RETRIES = 1, 2  # bits of Job.own: not replaced by the settings on `dlq retry`
ON_DEAD = 4                      # and: it was enqueued because another job died

PUBLIC = ("id command state attempts max_retries priority timeout created_at updated_at run_after"
          " locked_at started_at finished_at exit_code error cwd env unique").split()


def env_of(text):
    """The object that a job's `env` stands for; another program may have written anything."""
    try:
        env = json.loads(text) if text else {}
        return env if isinstance(env, dict) else {}
    except (ValueError, TypeError, RecursionError):
        return {}


class Job(collections.namedtuple("Job", PUBLIC + "due ready own runs serial".split())):
    """A row of the table jobs. Dates are ISO texts, `env` is JSON text or None, and

    due      ms when a waiting job must be made ready; 0: a row to adopt; else NULL
    ready    1 when it can be claimed, else NULL
    own      bits: OWN_… for what the job brought itself, ON_DEAD
    runs     attempts over its whole life
    serial   of its open attempt, else NULL
    """

    __slots__ = ()

    def public(self):
        """The job as users see it."""
        shown = dict(zip(PUBLIC, self))
        shown["env"] = env_of(self.env)
        return shown


NEW = dict(dict.fromkeys(Job._fields), state="pending", attempts=0, priority=0, own=0, runs=0)
NO_JOB = 'a job is a JSON object like {"command":"true"}'


def defaults(settings, now):
    """{field: value} of a job that brings nothing of its own."""
    stamp = iso(now)
    return dict(NEW, max_retries=settings["max-retries"], timeout=settings["timeout"],
                created_at=stamp, updated_at=stamp, run_after=stamp)


def scheduled(due, now):
    """The fields of a job whose turn is at `due`: it is ready if that has come."""
    return {"due": due, "ready": None} if due > now else {"due": None, "ready": 1}


def make_job(given, settings, now, cwd=None, job_id=None):
    """A pending Job from the object a user gave (see FIELDS); raises BadField.

    `cwd` and `job_id` are what it gets where it brings none.
    """
    if not isinstance(given, dict):
        raise Failure(NO_JOB)
    fields = {}
    for name, value in dict({} if cwd is None else {"cwd": cwd}, **given).items():
        if name not in FIELDS:
            raise BadField(name, "is unknown; known are " + ", ".join(FIELDS))
        fields[name] = checked(name, FIELDS[name], value)
    if "command" not in fields:
        raise BadField("command", "is required")
    due = parse_date(fields["run_after"]) if "run_after" in fields else now
    job = defaults(settings, now)
    job.update(fields, id=fields.get("id") or job_id or new_ids(now)[0],
               own=OWN_TIMEOUT * ("timeout" in fields) + OWN_RETRIES * ("max_retries" in fields),
               **scheduled(due, now))
    return Job(**job)


def escaped(value):
    """A text that can be stored, whatever another program put there."""
    return safe(str(value))


# What another program may have written: the range of each number, the checks of all else. Dates
# are in any form: so not FIELDS.
NUMBERS = {"attempts": (0, 1 << 30), "max_retries": (1, 1000), "timeout": (0, MAX_MS),
           "priority": (-1000, 1000), "exit_code": (0, 255), "own": (0, 7), "runs": (0, 1 << 30)}
ADOPTED = dict(
    dict.fromkeys(("created_at", "updated_at", "run_after", "locked_at", "started_at",
                   "finished_at"), as_date),
    cwd=as_cwd, env=lambda text: as_env(json.loads(text)), unique=as_unique, error=escaped,
    command=as_command, state=lambda text: one_of(text, STATES))


def adopted(job, settings, now):
    """A row that another program wrote, as a job like any other. A number out of range is set to
    the nearest, what is empty or no number gets its default; a command that can't run, or a date
    that is none, makes it dead."""
    fields, problem = defaults(settings, now), None
    fields["id"] = escaped(job.id) if isinstance(job.id, str) and job.id else new_ids(now)[0]
    for field, (low, high) in NUMBERS.items():
        value = getattr(job, field)
        if type(value) is int:
            fields[field] = min(max(value, low), high)
    for field, check in ADOPTED.items():
        value = getattr(job, field)
        try:
            if value or field == "command":
                fields[field] = check(value)
        except (ValueError, TypeError, RecursionError) as error:
            problem = problem or "field %s %s" % (field, error)
    if problem:
        fields.update(command=fields["command"] or escaped(job.command), state="dead",
                      error=safe(problem), finished_at=iso(now))
    elif fields["state"] in FINISHED:
        fields["finished_at"] = fields["finished_at"] or fields["updated_at"]
    else:
        fields.update(scheduled(parse_date(fields["run_after"]), now), finished_at=None)
    return Job(**fields)


# ---- Retry policy -------------------------------------------------------------------------------
# What becomes of a job after an attempt. Pure: it reads no clock and touches no store.

# status: as subprocess gives it, 3 for exit 3, -9 for SIGKILL, None if unknown; reason: why it
# ended: "" by itself, "timeout", "cancelled", "worker lost", "refused" (can't run, see detail),
# and, given back: "stopped" (orderly stop), "unstarted" (no space, no process);
# dropped: bytes cut from the start of its output; ended_at: ms
Outcome = collections.namedtuple("Outcome", "status reason detail dropped ended_at")
GIVEN_BACK = ("stopped", "unstarted")

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


def failure_text(job, outcome):
    """One line that says how an attempt failed; None if it did not."""
    if outcome.reason == "timeout":
        return ("timed out after %d ms (raise it with --timeout or: config set timeout 0)"
                % job.timeout)
    if outcome.reason:
        return outcome.detail or outcome.reason
    if outcome.status is None or outcome.status >= 0:
        return "exit %s" % outcome.status if outcome.status else None
    return "killed by " + signal_name(-outcome.status)


def decide(job, outcome, settings, now, spread=0.0):
    """The Verdict on `job` (attempts, max_retries, timeout) after an attempt of it."""
    if outcome.reason in GIVEN_BACK:
        return Verdict("failed" if job.attempts else "pending", job.attempts, now, None)
    error, attempts = failure_text(job, outcome), job.attempts + 1
    if error is None:
        return Verdict("completed", attempts, None, None)
    if attempts >= job.max_retries or outcome.reason == "cancelled":
        return Verdict("dead", attempts, None, error)
    return Verdict("failed", attempts, now + backoff_ms(attempts, settings, spread), error)


# ---- Schema -------------------------------------------------------------------------------------
# Numbered migrations, each run in one transaction. Released ones are never edited: add another.
# jobs, config and metrics begin as the original QueueCTL made them, so its databases open here.
# A row that another program inserts has due = 0: it is adopted at the next look.
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
     """CREATE TABLE IF NOT EXISTS config (key TEXT PRIMARY KEY, value TEXT)""",
     """CREATE TABLE IF NOT EXISTS metrics (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            daemon_startup DATETIME DEFAULT CURRENT_TIMESTAMP,
            total_commands INT DEFAULT 0)""",
     "ALTER TABLE jobs ADD COLUMN finished_at TEXT",
     "ALTER TABLE jobs ADD COLUMN exit_code INTEGER",
     "ALTER TABLE jobs ADD COLUMN error TEXT",
     "ALTER TABLE jobs ADD COLUMN cwd TEXT",
     "ALTER TABLE jobs ADD COLUMN env TEXT",
     "ALTER TABLE jobs ADD COLUMN 'unique' TEXT",
     "ALTER TABLE jobs ADD COLUMN due INTEGER DEFAULT 0",
     "ALTER TABLE jobs ADD COLUMN ready INTEGER",
     "ALTER TABLE jobs ADD COLUMN own INTEGER DEFAULT 0",
     "ALTER TABLE jobs ADD COLUMN runs INTEGER DEFAULT 0",
     "ALTER TABLE jobs ADD COLUMN serial INTEGER",
     "CREATE INDEX jobs_ready ON jobs (ready, priority DESC)",
     "CREATE INDEX jobs_due ON jobs (due)",
     "CREATE INDEX jobs_state ON jobs (state)",
     "CREATE INDEX jobs_finished ON jobs (state, finished_at)",
     # The open attempts. That `job` is unique here is promise 2: no job runs twice at once.
     """CREATE TABLE running (
            serial INTEGER PRIMARY KEY,
            job TEXT NOT NULL UNIQUE,
            slot INTEGER NOT NULL,
            boot TEXT NOT NULL,
            started_at INTEGER NOT NULL)""",
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
     # The last job that was given a key; it holds it while it is unfinished.
     "CREATE TABLE unique_keys (key TEXT PRIMARY KEY, job TEXT NOT NULL)",
     # What was answered to the last writes: a client whose connection broke may ask again.
     "CREATE TABLE answers (number INTEGER PRIMARY KEY, once TEXT UNIQUE, answer TEXT)",
     "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)",
     "INSERT INTO meta VALUES ('identity', lower(hex(randomblob(16))))",
     """CREATE TABLE totals (
            enqueued INTEGER NOT NULL,
            completed INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            dead INTEGER NOT NULL,
            runtime_ms INTEGER NOT NULL,
            longest_ms INTEGER NOT NULL,
            serial INTEGER NOT NULL)""",
     "INSERT INTO totals VALUES (0, 0, 0, 0, 0, 0, 0)",
     # Counted by triggers, so that rows written by another program count too.
     "CREATE TABLE counts (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL)",
     """INSERT INTO counts
        SELECT 'pending', 0 UNION SELECT 'processing', 0 UNION SELECT 'completed', 0
        UNION SELECT 'failed', 0 UNION SELECT 'dead', 0""",
     """UPDATE counts
        SET jobs = (SELECT COUNT(*) FROM jobs WHERE jobs.state = counts.state)""",
     """CREATE TRIGGER jobs_added AFTER INSERT ON jobs BEGIN
            UPDATE counts SET jobs = jobs + 1 WHERE state = NEW.state;
        END""",
     """CREATE TRIGGER jobs_moved AFTER UPDATE OF state ON jobs WHEN OLD.state IS NOT NEW.state
        BEGIN
            UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
            UPDATE counts SET jobs = jobs + 1 WHERE state = NEW.state;
        END""",
     """CREATE TRIGGER jobs_removed AFTER DELETE ON jobs BEGIN
            UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
            DELETE FROM attempts WHERE job = OLD.id;
            DELETE FROM unique_keys WHERE key = OLD."unique" AND job = OLD.id;
        END""",
     # A turn is `due` (a time in ms; 0: to be adopted) or `ready`. We never leave a waiting job
     # without one; another program that sets the state does.
     """CREATE TRIGGER jobs_revived AFTER UPDATE OF state ON jobs
        WHEN NEW.state IN ('pending', 'failed') AND NEW.due IS NULL AND NEW.ready IS NULL
        BEGIN
            UPDATE jobs SET due = 0 WHERE rowid = NEW.rowid;
        END""",
     # Nor any other job with one.
     """CREATE TRIGGER jobs_parked AFTER UPDATE OF state ON jobs
        WHEN NEW.state NOT IN ('pending', 'failed')
            AND (NEW.due IS NOT NULL OR NEW.ready IS NOT NULL)
        BEGIN
            UPDATE jobs
            SET ready = NULL,
                due = CASE WHEN NEW.state IN ('completed', 'dead') THEN NULL ELSE 0 END
            WHERE rowid = NEW.rowid;
        END""",
     # What another program wants to have run is looked at again.
     """CREATE TRIGGER jobs_changed AFTER UPDATE OF command, cwd, env ON jobs
        WHEN OLD.due IS NOT 0 AND (NEW.due IS NOT NULL OR NEW.ready IS NOT NULL)
        BEGIN
            UPDATE jobs SET ready = NULL, due = 0 WHERE rowid = NEW.rowid;
        END"""),
    # ms when it was cancelled; negative: stopped, to be given back; 0: neither.
    ("ALTER TABLE running ADD COLUMN cancelled INTEGER NOT NULL DEFAULT 0",),
)

# ---- Store --------------------------------------------------------------------------------------
# The only SQL but for the schema. Whoever makes a Store holds the queue's lock. Every write is made
# inside `transaction()`, takes the time as `now` (ms), and names the arrow it stands for. At the
# end: what `backup` and `doctor` read, in a process of their own, beside whoever writes.

# In brackets, not quotes: SQLite takes an unknown "column" for a text.
COLUMNS = ", ".join("[%s]" % name for name in Job._fields)
ATTEMPT = ("number worker started_at finished_at exit_code signal error serial output_cut"
           " output_kept").split()

# An open attempt with what is needed to run it and to judge it. started_at: ms; number: counts
# over the job's life
Claim = collections.namedtuple(
    "Claim", "serial slot boot started_at job number attempts max_retries timeout command cwd env")


def sound(claim, settings):
    """The Claim with numbers that are none set to the defaults, and texts made texts: another
    program may have written anything."""
    numbers = [value if type(value) is int else default for value, default in zip(
        claim[5:9], (1, 0, settings["max-retries"], settings["timeout"]))]
    texts = [value if value is None or type(value) is str else str(value) for value in claim[9:]]
    return Claim(*claim[:5], *numbers, *texts)


def marks(values):
    """A place for each of `values` in SQL."""
    return ", ".join("?" * len(values))


def finished(before):
    """Which jobs are in :state and, unless None, have finished before :before."""
    return "state = :state" + " AND finished_at < :before" * (before is not None)


def sqlite_uri(path):
    """How SQLite is told any path: Python 3.6 gives it no other bytes than UTF-8."""
    return "file:" + "".join(map("%%%02x".__mod__, os.fsencode(path)))


class Store:
    """The database at `path` (":memory:": an empty one). One connection, one thread.

    `known` is the identity that the lock file remembers: a database with another one, or none,
    is refused untouched. Raises StorageError.
    """

    def __init__(self, path, known=None):
        self.path = path
        self.known = known
        self.connection = None   # None after trouble: the next use opens anew
        self.file = None         # os.stat of the database
        self.synchronous = None  # the level last set on this connection
        self.settings = {}       # key -> typed value, as of the last `read_settings`
        self.open()

    # -- opening

    def open(self):
        import sqlite3
        self.error = sqlite3.Error
        if self.path != ":memory:":
            self.guard()
        try:
            self.connection = sqlite3.connect(sqlite_uri(self.path), timeout=BUSY_S,
                                              isolation_level=None, uri=True)
            version = self.identify()
            # A new file's: a turn of the loop touches a dozen pages, each written whole.
            self.query("PRAGMA page_size = 1024")
            if self.path != ":memory:":
                self.file = os.stat(self.path)
                if self.value("PRAGMA journal_mode = WAL") != "wal":
                    raise StorageError("%s can't use WAL; check its file system" % self.path)
            self.query("PRAGMA journal_size_limit = 8388608")
            for number in range(version, len(MIGRATIONS)):
                self.migrate(number)  # sorts in files: there may be millions of jobs
            self.query("PRAGMA temp_store = MEMORY")  # what a savepoint may undo: no file for that
            self.known = self.meta("identity")
            self.read_settings()
        except BaseException as error:
            self.close()
            if isinstance(error, self.error):
                raise storage_error(self.path, error)
            raise

    def guard(self):
        """See that the file is ours, or make it; never while a connection to it is open."""
        check_database(self.path)
        if not os.path.exists(self.path):
            if self.known:
                raise self.foreign("is gone")
            os.close(open_private(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        path, status = self.path, os.stat(self.path)
        if not status.st_mode & 0o200 or not os.access(path, os.W_OK):
            raise StorageError("%s is read-only; run: chmod u+w %s" % (path, path))
        if os.geteuid() == 0 and others_can_write(path, status):
            raise StorageError("%s can be written by others; run: chmod 600 %s" % (path, path))
        if os.stat(os.path.dirname(path)).st_mode & 0o002:
            self.hold_names()

    def hold_names(self):
        """Where all may write, nobody else shall make the files that SQLite is going to open."""
        try:
            for suffix in ("-wal", "-shm", "-journal"):
                os.close(open_private(self.path + suffix))
        except Failure as error:
            raise StorageError(str(error))

    def foreign(self, what):
        return StorageError("%s %s, but %s.lock remembers a queue; restore the database, or remove"
                            " %s.lock if this is meant" % (self.path, what, self.path, self.path))

    def identify(self):
        """The schema's version, after the checks that must leave the file untouched."""
        version = self.value("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise StorageError("%s was made by a newer queuectl (schema %d, this is %s with %d);"
                               " use that one" % (self.path, version, VERSION,
                                                  len(MIGRATIONS)))
        if self.known and (version == 0 or self.meta("identity") != self.known):
            raise self.foreign("is empty" if version == 0 else "is another queue's")
        return version

    def migrate(self, number):
        """Run migration `number` and note it; all or nothing."""
        with self.transaction():
            for statement in MIGRATIONS[number]:
                self.query(statement)
            self.query("PRAGMA user_version = %d" % (number + 1))
            self.query("SELECT %s FROM jobs LIMIT 0" % COLUMNS)

    def close(self):
        connection, self.connection, self.synchronous = self.connection, None, None
        if connection is not None:
            with suppress(Exception):  # closing is all that is wanted of it
                connection.close()

    # -- transactions

    @contextmanager
    def transaction(self, *, durable=True):
        """All or nothing; with `durable` it is on the disk when the block has ended."""
        level = "FULL" if durable else "NORMAL"
        if self.synchronous != level:  # before BEGIN: SQLite ignores it in a transaction
            self.query("PRAGMA synchronous = " + level)
            self.synchronous = level
        self.query("BEGIN IMMEDIATE")
        try:
            yield
            self.query("COMMIT")
        except BaseException:
            self.rollback()
            raise
        if durable:
            self.check_file()

    def rollback(self):
        """Undo; after trouble of SQLite's own the connection isn't used again."""
        try:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            if isinstance(sys.exc_info()[1], StorageError):
                self.close()
        except self.error:
            self.close()

    @contextmanager
    def savepoint(self):
        """Inside a transaction: what the block wrote is undone if it fails."""
        self.query("SAVEPOINT request")
        try:
            yield
        except Exception:
            if self.connection.in_transaction:  # else SQLite undid it as a whole
                self.query("ROLLBACK TO request")
            raise
        self.query("RELEASE request")

    def check_file(self):
        """Raise Replaced unless the path still leads to the file that is open: SQLite goes on
        writing into a deleted one in silence."""
        if self.file is None:
            return
        status = None
        with suppress(OSError):
            status = os.stat(self.path)
        if status is None or not os.path.samestat(status, self.file) or not status.st_size:
            self.close()
            raise Replaced("%s was removed, emptied or replaced in use; nothing more is stored in it"
                           % self.path)

    def query(self, sql, values=()):
        """All rows: an open cursor would hide others' writes."""
        if self.connection is None:
            self.open()
        try:
            return self.connection.execute(sql, values).fetchall()
        except self.error as error:
            raise storage_error(self.path, error)

    def value(self, sql, values=()):
        """The first column of the first row, or None."""
        rows = self.query(sql, values)
        return rows[0][0] if rows else None

    def write(self, sql, values=()):
        """The number of rows written."""
        try:
            return self.connection.execute(sql, values).rowcount
        except self.error as error:
            raise storage_error(self.path, error)

    def write_all(self, sql, rows):
        try:
            self.connection.executemany(sql, rows)
        except self.error as error:
            raise storage_error(self.path, error)

    # -- settings and other values

    def read_settings(self):
        """Settings as stored; what is missing, NULL or nonsense has its default."""
        stored = self.query("SELECT key, value FROM config WHERE value IS NOT NULL")
        self.settings = {key: setting.default for key, setting in SETTINGS.items()}
        for key, value in stored:
            with suppress(Failure):
                self.settings[key] = read_setting(key, value)

    def set_setting(self, key, value):
        """Store it, as text by the column's type; None: the default."""
        self.write("INSERT OR REPLACE INTO config (key, value) VALUES (?, ?)", (key, value))
        self.read_settings()

    def meta(self, key):
        return self.value("SELECT value FROM meta WHERE key = ?", (key,))

    def set_meta(self, key, value):
        self.write("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def wanted(self):
        """The number of workers wanted."""
        with suppress(TypeError, ValueError):  # what another program wrote
            return min(max(int(self.meta("workers")), 0), MAX_WORKERS)
        return 0

    def set_wanted(self, count):
        self.set_meta("workers", count)

    def paused(self):
        """The reason of a pause ("" if none was given), None without one."""
        return self.meta("paused")

    def set_paused(self, reason):
        self.set_meta("paused", reason)

    def recall(self, once):
        """The answer given to the write `once`, or None."""
        return self.value("SELECT answer FROM answers WHERE once = ?", (once,))

    def remember(self, once, answer):
        self.write("INSERT INTO answers (once, answer) VALUES (?, ?)", (once, answer))
        self.write("""DELETE FROM answers
                      WHERE number <= (SELECT MAX(number) FROM answers) - ?""", (ANSWERS,))

    # -- jobs coming in

    def insert(self, jobs):
        """(new) -> pending. The caller has seen that the ids are free."""
        self.write_all("INSERT INTO jobs (%s) VALUES (%s)" % (COLUMNS, marks(Job._fields)), jobs)
        self.hold_keys(jobs)
        self.write("UPDATE totals SET enqueued = enqueued + ?", (len(jobs),))

    def hold_keys(self, jobs):
        """From now on the unique keys that they have are theirs."""
        self.write_all("INSERT OR REPLACE INTO unique_keys (key, job) VALUES (?, ?)",
                       [(job.unique, job.id) for job in jobs if job.unique])

    def holder(self, key):
        """The id of the unfinished job that holds the unique key, or None."""
        return self.value("""SELECT jobs.id
                             FROM unique_keys JOIN jobs ON jobs.id = unique_keys.job
                             WHERE unique_keys.key = ? AND jobs."unique" = unique_keys.key
                               AND jobs.state IN ('pending', 'processing', 'failed')""", (key,))

    def strangers(self):
        """[(rowid, Job)] written by another program, some at a time."""
        self.connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        try:
            rows = self.query("SELECT rowid, %s FROM jobs WHERE due = 0 LIMIT ?" % COLUMNS,
                              (PROMOTE,))
        finally:
            self.connection.text_factory = str
        return [(row[0], Job._make(row[1:])) for row in rows]

    def adopt(self, rowid, job, died=False):
        """(new) -> pending, or whatever state another program gave its row; `died`: by this."""
        self.write("UPDATE jobs SET %s WHERE rowid = ?" % ", ".join(
            "[%s] = ?" % name for name in Job._fields), (*job, rowid))
        self.write("UPDATE totals SET enqueued = enqueued + ?, dead = dead + ?",
                   (not job.runs, died))

    def open_serial(self, job_id):
        """The serial of the job's open attempt, or None."""
        return self.value("SELECT serial FROM running WHERE job = ?", (job_id,))

    def put_back(self, rowid):
        """pending or failed -> processing: another program changed the row of a running job."""
        self.write("UPDATE jobs SET state = 'processing', due = NULL WHERE rowid = ?", (rowid,))

    def disown_stranded(self):
        """A processing job without an open attempt, never ours, is adopted like a stranger's."""
        self.write("""UPDATE jobs SET due = 0
                      WHERE state = 'processing'
                        AND NOT EXISTS (SELECT 1 FROM running
                                        WHERE running.job = jobs.id
                                           OR running.serial = jobs.serial)""")

    # -- jobs coming due

    def promote(self, now):
        """Make due jobs ready, so many at a time; the number of them."""
        return self.write("""UPDATE jobs SET ready = 1, due = NULL
                             WHERE rowid IN (SELECT rowid FROM jobs
                                             WHERE due > 0 AND due <= :now
                                             ORDER BY due LIMIT :most)""",
                          {"now": now, "most": PROMOTE})

    def next_due(self):
        """ms when the next job comes due; the end of all dates if none does."""
        # The upper bound leaves out texts of another program: to SQLite they exceed all numbers.
        return self.value("""SELECT COALESCE(MIN(due), :last) FROM jobs
                             WHERE due > 0 AND due < :last""", {"last": LAST_MS})

    def pull_in(self, now):
        """Backoffs that reach further than `max-delay` come from a clock that was set back."""
        return self.write("""UPDATE jobs SET due = :now
                             WHERE rowid IN (SELECT rowid FROM jobs INDEXED BY jobs_state
                                             WHERE state = 'failed' AND due > :latest)""",
                          {"now": now, "latest": now + self.settings["max-delay"]})

    # -- attempts

    def claim(self, slots, boot, now, only=None):
        """pending or failed -> processing: a Claim for each of `slots`, as far as jobs are ready
        (of those in `only`, None: of all), by priority, then age."""
        which = "ready = 1" if only is None else "+ready = 1 AND id IN (%s)" % marks(only)
        rows = self.query("""SELECT rowid, id, runs + 1, attempts, max_retries, timeout, command,
                                    cwd, env
                             FROM jobs
                             WHERE %s
                               AND NOT EXISTS (SELECT 1 FROM running WHERE running.job = jobs.id)
                             ORDER BY priority DESC, rowid
                             LIMIT ?""" % which, (*(only or ()), len(slots)))
        if not rows:
            return []
        serials, stamp = itertools.count(self.last_serial() + 1), iso(now)
        claims = [sound(Claim(serial, slot, boot, now, *row[1:]), self.settings)
                  for serial, slot, row in zip(serials, slots, rows)]
        self.write_all("INSERT INTO running VALUES (?, ?, ?, ?, ?, 0)", [
            (claim.serial, claim.job, claim.slot, boot, now) for claim in claims])
        self.write_all(
            """UPDATE jobs
               SET state = 'processing', ready = NULL, serial = ?, runs = ?,
                   locked_at = ?, started_at = ?, updated_at = ?
               WHERE rowid = ?""",
            [(claim.serial, claim.number, stamp, stamp, stamp, row[0])
             for claim, row in zip(claims, rows)])
        self.write("UPDATE totals SET serial = ?", (claims[-1].serial,))
        return claims

    def open_claims(self, job_id=None):
        """The Claims of all open attempts, of a job deleted meanwhile with command None; or those
        of one job of today."""
        return [sound(Claim._make(row), self.settings) for row in self.query(
            """SELECT running.serial, running.slot, running.boot, running.started_at, running.job,
                      jobs.runs, jobs.attempts, jobs.max_retries, jobs.timeout, jobs.command,
                      jobs.cwd, jobs.env
               FROM running LEFT JOIN jobs
                 ON jobs.id = running.job AND jobs.serial = running.serial
               WHERE :job IS NULL OR jobs.id = :job
               ORDER BY running.serial""", {"job": job_id})]

    def last_serial(self):
        return self.value("SELECT serial FROM totals")

    def raise_serial(self, serial):
        """Give no attempt a number up to `serial`."""
        self.write("UPDATE totals SET serial = MAX(serial, ?)", (serial,))

    def finish(self, claim, verdict, outcome, output, worker, now):
        """processing -> completed, failed or dead. False, and only the attempt's end is stored, if
        another program deleted the job."""
        self.write("DELETE FROM running WHERE serial = ?", (claim.serial,))
        status, ended = outcome.status, iso(outcome.ended_at or now)
        code = status if status is not None and status >= 0 and not outcome.reason else None
        over = verdict.state in FINISHED
        if not self.write("""UPDATE jobs
                             SET state = ?, attempts = ?, due = ?,
                                 run_after = COALESCE(?, run_after), exit_code = ?, error = ?,
                                 finished_at = ?, updated_at = ?,
                                 locked_at = NULL, serial = NULL
                             WHERE id = ? AND serial = ?""", (
                verdict.state, verdict.attempts, verdict.due, iso(verdict.due), code,
                verdict.error, ended if over else None, ended, claim.job, claim.serial)):
            return False
        self.write("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
            claim.serial, claim.job, claim.number, worker, iso(claim.started_at), ended, code,
            signal_name(-status) if status is not None and status < 0 else None, verdict.error,
            outcome.dropped, output or None))
        self.write("""UPDATE totals
                      SET completed = completed + (:state = 'completed'),
                          failed = failed + (:state != 'completed'),
                          dead = dead + (:state = 'dead'),
                          runtime_ms = runtime_ms + :ms * (:state = 'completed'),
                          longest_ms = MAX(longest_ms, :ms * (:state = 'completed'))""",
                   {"state": verdict.state,
                    "ms": max((outcome.ended_at or now) - claim.started_at, 0)})
        return True

    def mark_cancelled(self, job_id, now):
        """Note that open attempts of that name are to be stopped; whether the job has one: it may
        have been deleted, and inserted anew."""
        self.write("UPDATE running SET cancelled = ? WHERE job = ?", (now, job_id))
        return self.value("""SELECT 1 FROM running JOIN jobs ON jobs.serial = running.serial
                             WHERE running.job = ? AND jobs.id = ?""", (job_id, job_id)) is not None

    def mark_stopped(self, serials, now):
        """Note that these open attempts are stopped, to be given back: as a cancel, but negative,
        which a cancel replaces."""
        self.write_all("UPDATE running SET cancelled = ? WHERE serial = ? AND cancelled = 0",
                       [(-now, serial) for serial in serials])

    def cancelled(self):
        """{serial: ms when it was cancelled, negative: stopped} of the open attempts that are to
        be stopped."""
        return dict(self.query("SELECT serial, cancelled FROM running WHERE cancelled != 0"))

    def cancel(self, job_id, now):
        """pending or failed -> dead, at its user's wish."""
        stamp = iso(now)
        self.write("""UPDATE jobs
                      SET state = 'dead', error = 'cancelled', ready = NULL, due = NULL,
                          finished_at = ?, updated_at = ?
                      WHERE id = ? AND state NOT IN ('completed', 'dead')""",
                   (stamp, stamp, job_id))
        self.write("UPDATE totals SET dead = dead + 1")

    def delete(self, ids):
        self.write_all("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in ids])

    def give_back(self, claim, verdict, now):
        """processing -> pending or failed, as it was: the attempt does not count."""
        self.write("DELETE FROM running WHERE serial = ?", (claim.serial,))
        self.write("""UPDATE jobs
                      SET state = ?, ready = 1, runs = runs - 1, updated_at = ?,
                          locked_at = NULL, serial = NULL
                      WHERE id = ? AND serial = ?""",
                   (verdict.state, iso(now), claim.job, claim.serial))

    def requeue(self, job, now):
        """dead -> pending, with its attempts back at 0 and, where it brought none of its own,
        the present settings. An attempt that is still open, where another program set the state,
        is no longer its own: it waits for the end of that, and then has one of its own."""
        stamp = iso(now)
        self.write("""UPDATE jobs
                      SET state = 'pending', attempts = 0, ready = 1, due = NULL, run_after = ?,
                          updated_at = ?, finished_at = NULL, exit_code = NULL, error = NULL,
                          timeout = ?, max_retries = ?, serial = NULL
                      WHERE id = ? AND state = 'dead'""", (
            stamp, stamp, job.timeout if job.own & OWN_TIMEOUT else self.settings["timeout"],
            job.max_retries if job.own & OWN_RETRIES else self.settings["max-retries"], job.id))
        self.hold_keys([job])

    def purge(self, state, before):
        """Delete jobs in `state`, some at a time: those that finished before that date (None: all,
        whatever the clock said then); the number."""
        return self.write("""DELETE FROM jobs
                             WHERE rowid IN (SELECT rowid FROM jobs INDEXED BY jobs_finished
                                             WHERE %s LIMIT :most)""" % finished(before),
                          {"state": state, "before": before, "most": PURGE})

    def kept_since(self, now):
        """The date before which completed jobs are not kept; "", before all dates: all are."""
        kept = self.settings["retention"]
        return iso(now - max(kept, KEEP_MS)) if kept else ""

    def purge_expired(self, now):
        """Delete completed jobs older than the `retention`, some at a time; the number of them."""
        return self.purge("completed", self.kept_since(now))

    def count_finished(self, state, before):
        """How many jobs `purge` would delete in the end."""
        return self.value("SELECT COUNT(*) FROM jobs INDEXED BY jobs_finished WHERE "
                          + finished(before), {"state": state, "before": before})

    def has_chores(self, now):
        """Whether there are rows to adopt or to purge."""
        return self.value("""SELECT EXISTS (SELECT 1 FROM jobs WHERE due = 0)
                                 OR EXISTS (SELECT 1 FROM jobs INDEXED BY jobs_finished
                                            WHERE finished_at < ? AND state = 'completed')""",
                          (self.kept_since(now),)) == 1

    # -- looking

    def job(self, job_id):
        """The Job, or None."""
        rows = self.query("SELECT %s FROM jobs WHERE id = ?" % COLUMNS, (job_id,))
        return Job._make(rows[0]) if rows else None

    def jobs(self, state, after, limit):
        """[(rowid, Job)] beyond rowid `after`, oldest first, in `state` or in all (None)."""
        rows = self.query("SELECT rowid, %s FROM jobs WHERE %srowid > :after ORDER BY rowid"
                          " LIMIT :limit" % (COLUMNS, "state = :state AND " if state else ""),
                          {"after": after, "limit": limit, "state": state})
        return [(row[0], Job._make(row[1:])) for row in rows]

    def last_row(self):
        """A number that later jobs' rowids exceed."""
        return self.value("SELECT MAX(rowid) FROM jobs") or 0

    def ended(self, ids):
        """[(id, state, exit_code, error)] of those of the jobs (MAX_ASKED at the most) that exist;
        state: None if it has yet to end."""
        return self.query("""SELECT id, CASE WHEN state IN ('completed', 'dead') THEN state END,
                                    exit_code, error
                             FROM jobs WHERE id IN (%s)""" % marks(ids), ids)

    def unsettled(self, now):
        """Whether jobs run, are ready or wait for another try; not for the time a user gave."""
        return self.value("""SELECT EXISTS (SELECT 1 FROM running)
                                 OR EXISTS (SELECT 1 FROM jobs WHERE ready = 1)
                                 OR EXISTS (SELECT 1 FROM jobs WHERE due <= ?)
                                 OR EXISTS (SELECT 1 FROM jobs WHERE state = 'failed')""",
                          (now,)) == 1

    def last_deaths(self):
        """The five Jobs that died last, latest first. Another program that sets the state may note
        no time: such are none of the last."""
        return [Job._make(row) for row in self.query(
            """SELECT %s FROM jobs INDEXED BY jobs_finished
               WHERE state = 'dead' AND finished_at IS NOT NULL
               ORDER BY finished_at DESC LIMIT 5""" % COLUMNS)]

    def attempts(self, job_id):
        """[dict] of the job's closed attempts, first to last."""
        rows = self.query("""SELECT number, worker, started_at, finished_at, exit_code, signal,
                                    error, serial, dropped, COALESCE(length(output), 0)
                             FROM attempts WHERE job = ? ORDER BY serial""", (job_id,))
        return [dict(zip(ATTEMPT, row)) for row in rows]

    def output(self, serial, start, limit):
        """`limit` bytes from `start` on of the output kept of a closed attempt."""
        return bytes(self.value("SELECT substr(output, ?, ?) FROM attempts WHERE serial = ?",
                                (start + 1, limit, serial)) or b"")

    def counts(self):
        """{state: number of jobs}"""
        stored = dict(self.query("SELECT state, jobs FROM counts"))
        return {state: stored.get(state, 0) for state in STATES}

    def recount(self):
        """Set the counts right: INSERT OR REPLACE of another program escapes the triggers."""
        self.write("""UPDATE counts
                      SET jobs = (SELECT COUNT(*) FROM jobs WHERE jobs.state = counts.state)""")

    def totals(self):
        names = "enqueued, completed, failed, dead, runtime_ms, longest_ms"
        return dict(zip(names.split(", "), self.query("SELECT %s FROM totals" % names)[0]))

    def note_startup(self, now):
        self.write("INSERT INTO metrics (daemon_startup, total_commands) VALUES (?, 0)",
                   (iso(now),))

    def add_commands(self, count):
        self.write("""UPDATE metrics SET total_commands = total_commands + ?
                      WHERE id = (SELECT MAX(id) FROM metrics)""", (count,))

    def total_commands(self):
        return self.value("SELECT SUM(total_commands) FROM metrics") or 0

    def size(self):
        """Bytes on the disk, with what waits in the WAL."""
        total = 0
        for name in (self.path, self.path + "-wal"):
            with suppress(OSError):
                total += os.stat(name).st_size
        return total

    def ready_since(self, now):
        """ms since when the one of the ready jobs that waits longest could have started, or None.
        No index has these times: the first in line of each priority are looked at."""
        levels, times = [1001], []
        while levels[-1] is not None:
            levels.append(self.value(
                "SELECT MAX(priority) FROM jobs WHERE ready = 1 AND priority < ?", (levels[-1],)))
        for level in levels[1:-1]:
            with suppress(ValueError):  # dates by another program's hand
                times.append(parse_date(self.value(
                    """SELECT MIN(MAX(created_at, run_after))
                       FROM (SELECT created_at, run_after FROM jobs
                             WHERE ready = 1 AND priority = ?
                             ORDER BY rowid LIMIT ?)""", (level, LOOKED_AT // len(levels)))))
        due = self.next_due()
        if due <= now:
            times.append(due)
        return min(times, default=None)

    def completed_at(self, prefix, since):
        """ISO time of the last completion of a job whose id begins with `prefix`, or None; where
        many are called so, none before `since` is looked for."""
        span = (prefix, prefix + "\U0010ffff")
        if self.value("""SELECT COUNT(*) FROM (SELECT 1 FROM jobs WHERE id >= ? AND id < ? LIMIT ?)
                      """, span + (LOOKED_AT,)) < LOOKED_AT:
            return self.value("""SELECT MAX(finished_at) FROM jobs
                                 WHERE id >= ? AND id < ? AND +state = 'completed'""", span)
        return self.value("""SELECT finished_at FROM jobs INDEXED BY jobs_finished
                             WHERE state = 'completed' AND finished_at >= ?
                               AND id >= ? AND id < ?
                             ORDER BY finished_at DESC LIMIT 1""", (since,) + span)


@contextmanager
def beside(path, target=":memory:", mode="ro"):
    """A connection to `target` that has the database at `path` attached as `source`, read-only:
    it needs no lock, since WAL lets one read while another writes, and never checkpoints. For a
    process of its own, never the daemon: to close a file there would drop SQLite's locks on it."""
    import sqlite3
    source = sqlite_uri(path) + "?mode=" + mode

    def connect(uri):
        return closing(sqlite3.connect(uri, timeout=REACH_S, isolation_level=None, uri=True))
    try:
        with connect(source) as probe:  # ATTACH would only say that it can't open it
            probe.execute("SELECT 1 FROM sqlite_master LIMIT 1")
        with connect(sqlite_uri(target)) as connection:
            connection.execute("ATTACH ? AS source", (source,))
            yield connection
    except sqlite3.Error as error:
        raise storage_error(target if "full" in str(error) else path, error)


def copy_database(path, target):
    """Copy the database at `path`, as it is at one moment, into the empty file `target`; the
    number of jobs. Rows keep their order; indexes and triggers come when all rows are there."""
    # Not Connection.backup: 3.6 has none.
    with beside(path, target) as connection:
        def run(sql):
            return connection.execute(sql).fetchall()

        connection.set_progress_handler(lambda: None, 10000)  # or a signal would have to wait
        for name, value in (("page_size", run("PRAGMA source.page_size")[0][0]),
                            ("journal_mode", "OFF"), ("synchronous", "OFF")):
            run("PRAGMA main.%s = %s" % (name, value))
        run("BEGIN")
        made = run("""SELECT type, name, sql FROM source.sqlite_master
                      WHERE sql IS NOT NULL AND name NOT GLOB 'sqlite_stat*' ORDER BY rowid""")
        tables = {name: sql for kind, name, sql in made if kind == "table"}
        if "jobs" not in tables:
            raise StorageError("%s holds no queue" % path)
        for name, sql in tables.items():
            if name != "sqlite_sequence":  # there as soon as it is needed
                run(sql)
        for name in tables:
            name = name.replace('"', '""')
            run('DELETE FROM main."%s"' % name)  # sqlite_sequence counted along
            run('INSERT INTO main."%s" SELECT * FROM source."%s"' % (name, name))
        for kind, _, sql in made:
            if kind != "table":
                run(sql)
        run("PRAGMA main.user_version = %d" % run("PRAGMA source.user_version")[0])
        run("COMMIT")
        if run("PRAGMA main.integrity_check") != [("ok",)]:
            raise StorageError("the copy in %s is damaged; check that disk" % target)
        return run("SELECT COUNT(*) FROM main.jobs")[0][0]


def back_up(path, target):
    """Copy the database at `path` into the new file `target`, 0600 from its first instant and on
    the disk in the end; if anything fails it is removed again. The number of jobs."""
    if os.path.lexists(target):
        raise Failure("%s exists, and a backup replaces nothing; name another file" % target)
    fd = open_private(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        count = copy_database(path, target)
        os.fsync(fd)
        with suppress(OSError):  # a folder may be one that we can't read
            os.fsync(os.open(os.path.dirname(target), os.O_RDONLY))
        return count
    except BaseException as error:
        os.unlink(target)
        if isinstance(error, StorageError):
            raise StorageError("%s; no backup was made" % error)
        raise
    finally:
        os.close(fd)


def sqlite_version():
    import sqlite3
    return sqlite3.sqlite_version_info


def inspect(path):
    """(schema's number, identity, what is lacking of the schema, what is damaged) of the database
    at `path`, which is left as it is; the first two None where they can't be read."""
    schema, identity, lacks, damage = None, None, (), ""
    if not os.path.exists(path):
        return schema, identity, lacks, damage
    quiet, before = not os.path.exists(path + "-wal"), os.stat(path).st_mtime_ns
    try:
        # Of a database that nobody has open SQLite would make a -wal; 3.7.17 still does.
        with beside(path, mode="ro&immutable=1" if quiet else "ro") as connection:
            def run(sql):
                return [row[0] for row in connection.execute(sql).fetchall()]
            schema, = run("PRAGMA source.user_version")
            if schema == len(MIGRATIONS):
                names = "SELECT name FROM %ssqlite_master"
                with closing(Store(":memory:")) as fresh:
                    wanted = {row[0] for row in fresh.query(names % "")}
                lacks = sorted(wanted - set(run(names % "source.")))
                run("SELECT %s FROM source.jobs LIMIT 0" % COLUMNS)
            if 0 < schema <= len(MIGRATIONS):
                identity, = run("SELECT value FROM source.meta WHERE key = 'identity'")
            lines = run("PRAGMA source.integrity_check(3)")
            if lines != ["ok"]:
                damage = ("%s; stop the daemon and restore a backup, or save what is left with:"
                          " sqlite3 %s .recover" % (", ".join(lines), path))
    except (StorageError, ValueError) as error:
        damage = str(error)
    if quiet and (os.path.exists(path + "-wal") or os.stat(path).st_mtime_ns != before):
        return inspect(path)  # someone used it meanwhile
    return schema, identity, lacks, damage


# ---- Running a command --------------------------------------------------------------------------
# One attempt: its files, its process group, its deadline, its output; what to make of it once its
# worker is gone; and stopping it from outside.
#
# Two locks speak for an attempt when nobody else can: the worker's file is locked as long as the
# worker lives, the run file as long as the worker or anything that the command left behind.

RECORD_BYTES = 4096  # a detail of 300 characters takes 12 bytes each as JSON, at worst
UNSTARTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT,
             errno.EROFS, errno.EIO)  # the host's fault, not the job's: burns no retry


class Spool:
    """DB-run: w.N is the file of worker slot N, N alone the run file of attempt N."""

    def __init__(self, db):
        self.path = db + "-run"

    def worker_file(self, slot):
        return "%s/w.%d" % (self.path, slot)

    def run_file(self, serial):
        return "%s/%d" % (self.path, serial)

    def record(self, claim):
        """What the worker noted about this very attempt, {} if nothing."""
        record = {}
        with passing_over():
            record = unpad(read_at(self.worker_file(claim.slot), 0, RECORD_BYTES)[0])
        return record if record.get("serial") == claim.serial else {}

    def tail(self, serial, limit):
        """(the last `limit` bytes of the attempt's output, how many came before)."""
        data, size = b"", 0
        with passing_over():
            data, size = read_at(self.run_file(serial), -limit, limit)
        return data, max(size - limit, 0)

    def piece(self, claim, offset, limit):
        """(bytes of what the running attempt wrote, from byte `offset` of it on, or from what is
        left of it on; where they start; where all of it ends); None while it is being cut, or
        can't be looked at."""
        data, size = b"", 0
        with suppress(OSError):
            before = self.record(claim).get("dropped", 0)
            with passing_over():
                data, size = read_at(self.run_file(claim.serial), max(offset - (before or 0), 0),
                                     limit)
            if before is not None and self.record(claim).get("dropped", 0) == before:
                return data, max(offset, before), before + size
        return None

    def discard(self, serial):
        with suppress(OSError):  # what stays is removed at the next start
            os.unlink(self.run_file(serial))

    def serials(self):
        """The attempts that have a run file."""
        return [int(name) for name in os.listdir(self.path) if name.isdigit()]


def settle(record, worker_locked, run_locked, leader_lives, same_boot):
    """What to do about an open attempt: "leave", "take", "give back", "stop" or "lost".

    record         what its worker noted, {} if nothing
    worker_locked  the worker lives
    run_locked     the run file is locked; None: there is none
    leader_lives   the noted process is there, or others of its group (see `leader`)
    same_boot      it was claimed since the host started
    """
    if not same_boot:
        return "lost"
    if record.get("phase") == "ended":  # said once and for all, by a living worker too
        return "take"
    if worker_locked:
        return "leave"
    if run_locked or leader_lives:
        return "stop"
    if run_locked is None and not record.get("pid"):
        return "give back"
    return "lost"


def group_of(mark, pid=None):
    """The group, in a session of its own, of a process, no zombie, that has `mark` in its
    environment; `pid`: if it is that one. None if there is none."""
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError, IndexError,
                      ValueError):  # it is just going
            group, session = map(int, process_status(int(name))[2:4])
            if group == session and pid in (None, group) and mark in read_at(
                    "/proc/%s/environ" % name, 0, 1 << 22)[0].split(b"\0"):
                return group
    return None


def leader(record, job, run_file):
    """The pid of the attempt's first process if it still is that one, or if others of its group
    have outlived it. Else None."""
    if record.get("phase") == "starting":  # it may have begun, and none has noted its pid
        return group_of(b"QUEUECTL_RUN=" + os.fsencode(run_file))
    pid = record.get("pid")
    if not pid or not record.get("start"):
        return None
    start = process_start(pid)
    lives = (start == record["start"] if start
             else group_of(b"QUEUECTL_JOB_ID=" + job.encode(), pid))
    return pid if lives else None


def examine(claim, spool):
    """(what `settle` says of the attempt, its record)."""
    locked = is_locked(spool.worker_file(claim.slot))  # first: once it is free the record is final
    record = spool.record(claim)
    same_boot, run_file = claim.boot == boot_id(), spool.run_file(claim.serial)
    return settle(record, locked, is_locked(run_file),
                  same_boot and not locked and bool(leader(record, claim.job, run_file)),
                  same_boot), record


def signal_command(pid, run_file, number):
    """Signal the group that `pid` leads (None: gone), and whoever else holds the run file."""
    numbers = (number, signal.SIGCONT) if number == signal.SIGTERM else (number,)
    for one in numbers:  # a stopped process handles SIGTERM only once it goes on
        if pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, one)
        for holder in holders(run_file):
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(holder) != pid:
                    os.kill(holder, one)


class Spawned:
    """A child of ours, as far as we need of what subprocess.Popen is."""

    def __init__(self, pid):
        self.pid = pid

    def wait(self):
        os.waitpid(self.pid, 0)


class PosixSpawn:
    """posix_spawn(3) with the arguments of `spawn`. AttributeError or OSError where the C library
    has none that can start a session (glibc before 2.26)."""

    SETSIGDEF, SETSID = 0x04, 0x80  # its flags on Linux
    ROOM = 1024                     # bytes: more than any of its structures takes

    def __init__(self):
        import ctypes
        self.ctypes, self.libc = ctypes, ctypes.CDLL(None)
        self.attributes = ctypes.create_string_buffer(self.ROOM)
        self.libc.posix_spawnattr_init(self.attributes)
        self.libc.posix_spawnattr_setsigdefault(self.attributes, b"\xff" * self.ROOM)  # all
        self.check(self.libc.posix_spawnattr_setflags(self.attributes,
                                                      self.SETSIGDEF | self.SETSID))

    def check(self, error, *path):
        if error:
            raise OSError(error, os.strerror(error), *path)

    def strings(self, words):
        """The bytes in `words` as C takes them."""
        if any(b"\0" in word for word in words):
            raise ValueError("embedded null byte")
        return (self.ctypes.c_char_p * (len(words) + 1))(*words)

    def actions(self, output):
        """What the child does to its descriptors."""
        actions = self.ctypes.create_string_buffer(self.ROOM)
        for name, *values in (("init",), ("addopen", 0, b"/dev/null", os.O_RDONLY, 0),
                              ("adddup2", output, 1), ("adddup2", output, 2)):
            add = getattr(self.libc, "posix_spawn_file_actions_" + name)
            self.check(add(actions, *values))
        return actions

    def __call__(self, argv, *, cwd, env, output, kept):
        places = [argv[0]] if b"/" in argv[0] else [
            os.path.join(os.fsencode(folder), argv[0]) for folder in os.get_exec_path(env)]
        words, pid = self.strings(argv), self.ctypes.c_int()
        environ = (self.ctypes.c_void_p.in_dll(self.libc, "environ") if env is None else
                   self.strings([name + b"=" + value for name, value in env.items()]))
        os.set_inheritable(kept, True)
        actions = self.actions(output)
        try:
            os.chdir(cwd)
            for place in [one for one in places if os.access(one, os.X_OK)] or places:
                error = self.libc.posix_spawn(self.ctypes.byref(pid), place, actions,
                                              self.attributes, words, environ)
                if not error:  # else it may be a directory, or lack its interpreter
                    break
            self.check(error, argv[0])
        finally:
            os.chdir("/")  # keeps no file system busy
            self.libc.posix_spawn_file_actions_destroy(actions)
        return Spawned(pid.value)


@functools.lru_cache(maxsize=None)
def posix_spawn():
    """A PosixSpawn where it pays, else None. It shares our memory until the exec, as subprocess
    does since Python 3.10; to copy the page tables takes longer than a short job."""
    if sys.version_info < (3, 10) and sys.platform == "linux":
        with suppress(ImportError, AttributeError, OSError, MemoryError):
            return PosixSpawn()
    return None


def spawn(argv, *, cwd, env, output, kept):
    """Start `argv` in a session of its own, with what it writes led to the descriptor `output`, and
    with `kept` open; its pid and `wait()`. OSError or ValueError where that can't be."""
    if posix_spawn():
        return posix_spawn()(argv, cwd=cwd, env=env, output=output, kept=kept)
    import subprocess
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd,
                            env=env, pass_fds=(kept,), start_new_session=True)


def exit_status(process):
    """As subprocess gives it, None while it runs; where possible without reaping, since a pid is
    safe to signal only as long as it is not reaped."""
    if not hasattr(os, "waitid"):
        return process.poll()
    info = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def job_environment(order, run_file):
    """What a command finds in its environment: the worker's, the job's, ours. None: the worker's,
    with ours in it, which costs no copy."""
    ours = {b"QUEUECTL_JOB_ID": order["id"].encode(),
            b"QUEUECTL_ATTEMPT": str(order["attempt"]).encode(),
            b"QUEUECTL_RUN": os.fsencode(run_file)}  # by which `leader` knows it
    if order["env"]:
        own = {name.encode(): value.encode() for name, value in order["env"].items()}
        return {**os.environb, **own, **ours}
    os.environb.update(ours)
    return None


def bury_strangers(ours):
    """Reap ended children but for `ours`: process 1 of a container is given those that jobs left
    in the background, and nobody else does it."""
    with suppress(ChildProcessError):
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in ours:
                return
            os.waitpid(ended.si_pid, 0)


class Attempt:
    """One run of one command, on its worker's side.

    `order` is what the daemon sent: serial, id, attempt, command, shell, cwd, env, timeout (ms) and
    limit (bytes of output kept). `write(**record)` writes the worker's record, `poll` is what the
    worker waits with.
    """

    def __init__(self, order, run_file, write, poll):
        self.order = order
        self.path = run_file
        self.write = write
        self.poll = poll
        self.record = {"serial": order["serial"]}  # what is noted of it so far
        self.process = None
        self.output = None      # where the command's stdout and stderr come in: polled
        self.file = None        # the run file, locked
        self.size = 0           # bytes in it
        self.dropped = 0        # bytes no longer in it
        self.bound = max(MIN_RUN_FILE, 16 * order["limit"])
        self.reason = ""        # as in Outcome
        self.deadline = None    # monotonic: the next thing to do of its own accord
        self.kill_at = None     # monotonic: end of the grace, once it is being stopped
        self.status = None      # of the leader, once it has ended
        self.over = False       # all is done and noted

    def note(self, **news):
        self.record.update(news)
        self.write(**self.record)

    def start(self, now):
        """Make and lock the run file, then start the command."""
        self.note(phase="starting")  # no room for it: better now than later
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.spawn()
        except OSError as error:
            self.fail(error)
        except (AttributeError, TypeError, ValueError) as error:  # what another program wrote
            self.finish("refused", "can't start: %s" % error)
        else:
            pid = self.process.pid
            self.note(phase="running", pid=pid, start=process_start(pid))
            if self.order["timeout"]:
                self.deadline = now + self.order["timeout"] / 1000.0

    def fail(self, error):
        """It can't be started, by its own fault or because the host lacks something."""
        place, spool = os.fsdecode(error.filename or ""), os.path.dirname(self.path)
        if place == self.path:
            place = spool  # a number would make each line of the log another
        there = place == os_path(self.order["cwd"])
        place = place and (" in " if there or place == spool else " ") + place
        own_fault = error.errno not in UNSTARTED or there and error.errno == errno.EIO
        self.finish("refused" if own_fault else "unstarted",
                    "can't start%s: %s" % (place, os.strerror(error.errno)))

    def spawn(self):
        order = self.order
        self.output, theirs = os.pipe()
        os.set_blocking(self.output, False)  # a command may read from there what we were told of
        self.poll.register(self.output, select.POLLIN)
        argv = [word.encode() for word in order["shell"]] + [order["command"].encode()]
        try:
            self.process = spawn(argv, cwd=os.fsencode(os_path(order["cwd"])), output=theirs,
                                 env=job_environment(order, self.path), kept=self.file)
        finally:
            os.close(theirs)

    def on_output(self):
        with suppress(BlockingIOError):
            data = os.read(self.output, PIECE)
            if data:
                self.keep(data)
            else:
                self.close_output()

    def keep(self, data):
        """Add to the run file; a full disk costs the output, not the job."""
        try:
            done = os.pwrite(self.file, data, self.size)
        except OSError:
            done = 0
        self.size += done
        self.dropped += len(data) - done
        if self.size > self.bound:
            self.cut()

    def cut(self):
        """Leave the last `limit` bytes. Written first, then cut: a crash leaves too much. Who
        reads meanwhile is told."""
        limit = self.order["limit"]
        with suppress(OSError):
            tail = os.pread(self.file, limit, self.size - limit) if limit else b""
            self.note(dropped=None)
            os.pwrite(self.file, tail, 0)
            os.ftruncate(self.file, len(tail))
            self.dropped += self.size - len(tail)
            self.size = len(tail)
            self.note(dropped=self.dropped)

    def drain(self):
        """Take what is in the pipe now: whoever still writes there is not waited for."""
        for _ in range(MAX_PIPE // PIECE):
            if self.output is not None:
                self.on_output()
        self.close_output()

    def close_output(self):
        if self.output is not None:
            self.poll.unregister(self.output)  # closed it would be "ready" for ever
            os.close(self.output)
            self.output = None

    def on_message(self, reason, now):
        """Stop it, "cancelled" or "stopped", unless it has ended by itself."""
        self.look(now)
        if self.status is None and not self.over:
            self.stop(reason, now)

    def look(self, now):
        """Has the leader ended, or has the time come for the next step?"""
        if self.status is None and not self.over:
            self.status = exit_status(self.process)
            if self.status is not None:
                self.drain()
                self.deadline = now
        if self.deadline is None or now < self.deadline:
            return
        if self.status is None:
            self.stop("timeout", now)
        elif self.status == 0 and not self.reason:
            self.finish("")
        else:
            self.sweep(now)

    def stop(self, reason, now):
        """SIGTERM to all of it, SIGKILL once the grace is over. The first reason stands."""
        self.reason = self.reason or reason
        if self.kill_at is None or now >= self.kill_at:
            number = signal.SIGTERM if self.kill_at is None else signal.SIGKILL
            self.kill_at = self.deadline = now + GRACE_S
            signal_command(self.process.pid, self.path, number)

    def sweep(self, now):
        """After a failure nothing of it may be left: there will be a next attempt."""
        self.close_file()  # so that the lock tells of others alone
        if not is_locked(self.path):
            signal_command(self.process.pid, self.path, signal.SIGKILL)  # who closed the lock
            self.finish(self.reason)
            return
        self.stop("", now)
        self.deadline = now + 0.02  # nothing wakes us when a lock is freed

    def finish(self, reason, detail=""):
        """Note the outcome, then reap: until then the pid can't have become another's."""
        self.note(phase="ended", start=None, reason=reason, status=self.status,  # none to look for
                  detail=safe(detail)[:300], size=self.size, dropped=self.dropped, at=now_ms())
        self.over, self.deadline = True, None
        if self.process:
            self.process.wait()
        self.close_output()
        self.close_file()

    def close_file(self):
        if self.file is not None:
            os.close(self.file)
            self.file = None


# ---- Protocol -----------------------------------------------------------------------------------
# JSON over Unix sockets. The daemon's never block: the loop that watches them, their buffers, where
# a request ends, who is at the other end. A client asks and waits.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def encode(message):
    return compact(message).encode() + b"\n"


class Loop:
    """Sockets and what to call, with the events that happened, when they are ready."""

    def __init__(self):
        self.selector = selectors.DefaultSelector()

    def want(self, sock, events, callback):
        """Watch `sock` for READ, WRITE, both, or 0: not at all."""
        self.remove(sock)
        if events:
            self.selector.register(sock, events, callback)

    def remove(self, sock):
        with suppress(KeyError, ValueError):
            self.selector.unregister(sock)

    def wait(self, timeout):
        """Call whatever is ready within `timeout` seconds."""
        for key, events in self.selector.select(timeout):
            key.data(events)


class Channel:
    """A socket in the loop with a buffer each way.

    `on_input(channel)` is called when bytes were added to `inbox`, and when all was sent: the next
    request may wait there. `on_end(channel)`: when the other side has stopped sending. `pages`, an
    iterator of bytes, is sent piece by piece.
    """

    def __init__(self, sock, loop, on_input, on_end):
        sock.setblocking(False)
        self.sock = sock
        self.loop = loop
        self.on_input = on_input
        self.on_end = on_end
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.pages = None
        self.watched = 0              # the events asked of the loop
        self.open = True
        self.ended = False            # the other side sends no more
        self.busy = False             # a request of it is being worked on
        self.active_at = monotonic()
        self.watch()

    def on_event(self, events):
        if events & WRITE:
            self.flush()
            if self.open:
                self.on_input(self)
        if self.open and events & READ:
            self.receive()

    def receive(self):
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.active_at = monotonic()
        if data:
            self.inbox += data
            self.on_input(self)
        else:
            self.ended = True
            self.watch()  # no longer for reading: it would be "ready" for ever
            self.on_end(self)

    def send(self, message):
        if self.open:
            self.outbox += encode(message)
            self.flush()

    def flush(self):
        try:
            while self.open and (self.outbox or self.refill()):
                del self.outbox[:self.sock.send(self.outbox)]
                self.active_at = monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            self.on_end(self)
            return
        self.watch()

    def refill(self):
        """Put the next page into the outbox; False when there is none."""
        try:
            self.outbox += next(self.pages) if self.pages else b""
        except StopIteration:
            self.pages = None
        return bool(self.outbox)

    def watch(self):
        """Ask the loop for what this channel waits for."""
        events = (0 if self.ended else READ) | (WRITE if self.outbox else 0)
        if self.open and events != self.watched:
            self.watched = events
            self.loop.want(self.sock, events, self.on_event)

    def idle(self):
        """Whether nothing is asked and nothing is left to send."""
        return not (self.busy or self.pages or self.inbox or self.outbox)

    def close(self):
        if self.open:
            self.open = False
            self.loop.remove(self.sock)
            self.sock.close()


def is_whole(inbox):
    """Whether it is one JSON object; what is nested too deeply to tell may as well be refused."""
    if inbox[-64:].rstrip()[-1:] != b"}":
        return False
    try:
        json.loads(inbox)
        return True
    except ValueError:
        return False
    except RecursionError:
        return True


def take_request(inbox, ended=False):
    """Remove and return the first whole request in `inbox`, None if there is none yet.

    It ends with a newline; for clients that send none, once it is one whole JSON object, or when
    they have `ended`. Raises Failure when it is too large.
    """
    if inbox[:1].isspace():
        inbox[:] = inbox.lstrip()
    end = inbox.find(b"\n")
    if end < 0 and inbox and (ended or is_whole(inbox)):
        end = len(inbox)
    if end > MAX_REQUEST or (end < 0 and len(inbox) > MAX_REQUEST):
        raise Failure("a request has at most %d bytes" % MAX_REQUEST)
    if end < 0:
        return None
    request = bytes(inbox[:end])
    del inbox[:end + 1]
    return request


def parse_request(data):
    """The object that a request is; a Failure says what is wrong with it."""
    request = decode_json(data, "the request")
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise Failure('a request is an object like {"command":"status"}')
    return request


def encode_request(request):
    """As UTF-8: escapes could make it three times as long. Lone surrogates have to be escaped, as
    \\udcff, by JSON and by backslashreplace alike."""
    text = json.dumps(request, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def error_answer(error):
    """The answer for a Failure."""
    return dict(success=False, message="Error: %s" % error, **error.details)


def peer_uid(sock):
    """Who is at the other end of a Unix socket, by the kernel's word; None where it gives none."""
    if hasattr(socket, "SO_PEERCRED"):
        return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if hasattr(socket, "LOCAL_PEERCRED"):  # struct xucred: version, uid, …
        return struct.unpack("2I", sock.getsockopt(0, socket.LOCAL_PEERCRED, 8))[1]
    return None


class Answer(dict):
    """An object that a daemon sent."""

    def __missing__(self, key):
        raise Failure("the daemon's answer lacks %s, which queuectl %s looks for; its version tells:"
                      " daemon status; restart it: daemon stop, worker start" % (key, VERSION))


def ask(path, request, patience=ANSWER_S):
    """The answer of the daemon at socket `path`; Unreachable when there is none."""
    data = encode_request(request)
    if len(data) > MAX_REQUEST:
        raise Failure("this is too large, %d bytes; a request has at most %d"
                      % (len(data), MAX_REQUEST))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience)
        try:
            sock.connect(path)
            if peer_uid(sock) not in (os.geteuid(), None):
                raise Failure("%s is served by another user (uid %d); give another --socket"
                              % (path, peer_uid(sock)))
            sock.sendall(data)
            data = bytearray()
            while not data.endswith(b"\n"):
                piece = sock.recv(1 << 18)
                if not piece:
                    raise Unreachable("the daemon at %s broke off" % path)
                data += piece
        except socket.timeout:
            raise Failure("the daemon at %s does not answer; whether it did what was asked shows:"
                          " list" % path)
        except OSError as error:
            raise Unreachable("nobody answers at %s: %s" % (path, error.strerror or error))
    answer = decode_json(data, "the answer from %s" % path, Answer)
    return answer if isinstance(answer, dict) else Answer()


# ---- Worker -------------------------------------------------------------------------------------
# The child's side: runs in a process of its own, forked by the daemon, and owns no data. Orders
# come down its socket, outcomes go up; first it notes in its file what it runs and how that ended,
# for whoever comes after the daemon. Without one it finishes its job and leaves.

def own_environment():
    """Take out of the environment what the daemon's service manager meant for it alone."""
    for name in list(os.environb):
        if name.startswith((b"LISTEN_", b"WATCHDOG_")) or name == b"NOTIFY_SOCKET":
            del os.environb[name]


class Worker:
    """The loop of one worker. `sock`: to the daemon; `slot_fd`: its file, locked."""

    def __init__(self, sock, slot_fd, spool):
        self.sock = sock
        self.slot_fd = slot_fd
        self.spool = spool
        self.inbox = b""         # the beginning of a line
        self.attempt = None
        self.leaving = False     # the daemon wants no more of it, or is gone
        own_environment()
        self.wake, wake_fd = os.pipe()
        for fd in (self.wake, wake_fd):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_fd)
        sock.setblocking(False)
        self.poll = select.poll()
        self.poll.register(sock, select.POLLIN)
        self.poll.register(self.wake, select.POLLIN)

    def run(self):
        while self.attempt or not self.leaving:
            self.step()

    def step(self):
        """Wait for whatever comes first, and pass it on."""
        ready = [fd for fd, _ in self.poll.poll(self.timeout_ms())]
        if self.wake in ready:
            os.read(self.wake, 512)
        if self.attempt and self.attempt.output in ready:
            self.attempt.on_output()
        if self.sock.fileno() in ready:
            self.on_daemon()
        if self.attempt:
            self.attempt.look(monotonic())
            if self.attempt.over:
                self.attempt = None

    def timeout_ms(self):
        if self.attempt is None or self.attempt.deadline is None:
            return None
        left = int((self.attempt.deadline - monotonic()) * 1000) + 1
        return min(max(left, 0), UNITS_MS["d"])  # poll takes no more than some 24 days

    def on_daemon(self):
        """Orders, stops, or the end of the connection."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.leaving = True
            self.poll.unregister(self.sock)
        *lines, self.inbox = (self.inbox + data).split(b"\n")
        for line in lines:
            self.obey(json.loads(line))

    def obey(self, message):
        if "leave" in message:
            self.leaving = True
        elif "stop" not in message:
            self.attempt = Attempt(message, self.spool.run_file(message["serial"]), self.write,
                                   self.poll)
            self.attempt.start(monotonic())
        elif self.attempt and self.attempt.order["serial"] == message["stop"]:
            self.attempt.on_message(message["reason"], monotonic())

    def write(self, **record):
        """Write the record, and tell the daemon once it stands for good."""
        os.pwrite(self.slot_fd, pad(record, RECORD_BYTES), 0)
        if record["phase"] == "ended":
            with suppress(OSError):  # no daemon: the next one reads the file
                self.sock.send(encode(record))


def close_other_descriptors(keep):
    """A copy of another worker's socket, of the lock or of a connection would hide its end."""
    try:
        last = max(map(int, os.listdir("/dev/fd")))
    except OSError:
        last = os.sysconf("SC_OPEN_MAX")
    keep = sorted(keep)  # begins with 0: closerange(0, 0) closes everything since CPython 3.10
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


@functools.lru_cache(maxsize=None)  # a second daemon in this process hears the first answer
def set_open_files(limit=None):
    """Set the soft limit of descriptors, None: as high as allowed; the limit before."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if limit is None else limit, hard))
    return soft


def worker_main(sock, slot_fd, spool, open_files):
    """The whole life of a worker process. `open_files`: the limit that jobs get back."""
    try:
        import gc
        gc.disable()  # a collected database connection would close descriptors used again
        close_other_descriptors({0, 1, 2, sock.fileno(), slot_fd})
        default_signals()
        set_open_files(open_files)
        Worker(sock, slot_fd, spool).run()
        os._exit(0)  # nothing of the daemon's may be flushed, closed or finalized here
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(1)


# ---- Pool ---------------------------------------------------------------------------------------
# The daemon's side of the workers, in the daemon's process: as many as wanted, their jobs, what
# became of these, and of those whose worker is gone. It knows no SQL.

# worker: pid or None; output: the tail that is kept
Result = collections.namedtuple("Result", "claim outcome output worker")

# The end of an attempt whose worker noted none, by what `settle` says of it.
UNNOTED = {"give back": {"reason": "unstarted", "detail": "its worker ended before it began"},
           "lost": {"reason": "worker lost"}}


class Hand:
    """A worker as its daemon sees it."""

    def __init__(self, slot, process):
        self.slot = slot
        self.process = process
        self.channel = None
        self.claim = None       # what it runs
        self.since = monotonic()  # of that, or of its leisure
        self.leaving = False    # ends after its job
        self.overdue = False    # so it was at the last look

    def stop(self, reason):
        """Have its command stopped: "cancelled" or "stopped"."""
        self.channel.send({"stop": self.claim.serial, "reason": reason})


class Orphan:
    """An open attempt without a worker of ours."""

    def __init__(self, claim):
        self.claim = claim
        self.since = monotonic()  # at first it is looked at often
        self.kill_at = None     # monotonic: SIGKILL, once it is being stopped
        self.attended = True    # its worker, another daemon's child, still works at it
        self.reason = ""        # "cancelled", "stopped", "hung": it is to be stopped even so


def is_overdue(claim, since, now):
    """Whether the worker that has run this since then must have ended it long ago. Of a job that
    was deleted meanwhile no timeout is known."""
    longest = claim.command is not None and claim.timeout
    return longest and now > since + longest / 1000.0 + GRACE_S + SILENT_S


def result_of(claim, verdict, record, spool, limit, worker=None):
    """The Result for what `settle` says of an attempt: "take", "give back" or "lost"."""
    output, cut = spool.tail(claim.serial, limit) if record.get("size", 1) else (b"", 0)
    dropped = (record.get("dropped") or 0) + cut
    end = UNNOTED.get(verdict, record)
    outcome = Outcome(end.get("status"), end.get("reason", ""), end.get("detail", ""), dropped,
                      end.get("at"))
    return Result(claim, outcome, output, worker)


@contextmanager
def undone(count):
    """Close what the block opened if it fails, up to `count` descriptors: they have the lowest
    numbers that are free."""
    free = []
    try:
        while len(free) < count:
            free.append(os.dup(0))
    finally:
        for fd in free:
            os.close(fd)
    try:
        yield
    except OSError:
        for fd in free:
            with suppress(OSError):
                os.close(fd)
        raise


class Pool:
    """The workers. `log(text, every_s)` takes what an operator should know."""

    def __init__(self, spool, loop, log, open_files):
        import multiprocessing
        self.context = multiprocessing.get_context("fork")  # not the default since 3.14
        self.spool = spool
        self.loop = loop
        self.log = log
        self.open_files = open_files
        boot_id()               # asked once, while there are descriptors left to read it
        posix_spawn()           # made once, for all workers
        self.hands = {}         # slot -> Hand
        self.idle = {}          # slot -> Hand without a job, not leaving
        self.ended = {}         # slot -> what its worker told of the end of its job
        self.orphans = {}       # serial -> Orphan
        self.uneven = True      # the number of workers may differ from the wanted one
        self.hold_until = 0.0   # monotonic: nothing is started before
        self.look_at = 0.0      # monotonic: next look at the orphans

    # -- as many as wanted

    def count(self):
        """Workers alive: ours, and another daemon's that are still busy."""
        return len(self.hands) + len(self.attended())

    def roll(self, now):
        """[(pid, state, Claim or None, ms it has been so)] of the workers; pid None: another
        daemon's."""
        return [(hand.process.pid, "leaving" if hand.leaving else "busy" if hand.claim else "idle",
                 hand.claim, int((now - hand.since) * 1000)) for hand in self.hands.values()] + [
            (None, "leaving", orphan.claim, int((now - orphan.since) * 1000))
            for orphan in self.orphans.values() if orphan.attended]

    def converge(self, wanted, now):
        """Start what is missing, retire what is too much, idle ones first."""
        self.reap()
        staying = [hand for hand in self.hands.values() if not hand.leaving]
        missing = wanted - len(staying) - len(self.attended())
        for hand in sorted(staying, key=lambda hand: hand.claim is not None)[:max(-missing, 0)]:
            self.retire(hand)
        if missing > 0 and now < self.hold_until:
            return
        self.uneven = not all(
            self.start_worker(now) for _ in range(min(missing, STARTS))) or missing > STARTS

    def start_worker(self, now):
        """Fork one; False (and a pause) where the system has no room for it."""
        try:
            slot, slot_fd = self.take_slot()
            # Ours of the slot is closed, the lock lives on in the worker's copy.
            with open(slot_fd, "rb"), ExitStack() as made:
                os.ftruncate(slot_fd, 0)  # an old record may bear a number that is given again
                ours, theirs = map(made.enter_context, socket.socketpair())
                with undone(4):  # multiprocessing keeps two pipes if it can't fork
                    process = self.context.Process(
                        target=worker_main, args=(theirs, slot_fd, self.spool, self.open_files))
                    process.start()
                made.pop_all()
                theirs.close()
        except (OSError, Failure) as error:
            self.log("can't start a worker: %s" % error, every_s=60)
            self.hold_until = now + LOOK_S
            return False
        hand = self.hands[slot] = self.idle[slot] = Hand(slot, process)
        hand.channel = Channel(ours, self.loop, functools.partial(self.on_record, hand),
                               functools.partial(self.on_death, hand))
        return True

    def take_slot(self):
        """(number, locked descriptor) of a worker file that nobody uses."""
        used = {orphan.claim.slot for orphan in self.orphans.values()} | set(self.hands)
        for slot in itertools.count(1):
            if slot in used:
                continue
            fd = open_private(self.spool.worker_file(slot))
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return slot, fd
            except BlockingIOError:  # another daemon's worker on its way out
                os.close(fd)

    def retire(self, hand):
        """It ends after its job, at once without one."""
        hand.leaving = True
        self.idle.pop(hand.slot, None)
        if hand.claim is None:
            self.drop(hand)
        else:
            hand.channel.send({"leave": True})

    def drop(self, hand):
        """Forget it; its end of the socket closes, so it leaves if it lives."""
        hand.channel.close()
        hand.channel = None  # it knows the hand: neither would go, nor the descriptors of both
        for group in (self.hands, self.idle, self.ended):
            group.pop(hand.slot, None)
        self.uneven = True

    def reap(self):
        ours = {child.pid for child in self.context.active_children()}  # joins those that ended
        if os.getpid() == 1:
            bury_strangers(ours)

    # -- what they do

    def hand_out(self, claim, order):
        hand = self.idle.pop(claim.slot)
        hand.claim, hand.since = claim, monotonic()
        hand.channel.send(order)

    def on_record(self, hand, channel):
        record = unpad(channel.inbox)
        if hand.claim and record.get("serial") == hand.claim.serial:
            self.ended[hand.slot] = record
            channel.inbox.clear()

    def on_death(self, hand, _channel):
        if hand.slot in self.ended:  # no loss: it has told, and `close` drops it once that is stored
            hand.leaving = self.uneven = True
            return
        if hand.claim:
            self.log("worker lost: slot %d, pid %d, job %s"
                     % (hand.slot, hand.process.pid, hand.claim.job))
            self.orphan(hand.claim)
        self.drop(hand)

    def orphan(self, claim):
        """No worker of ours has it: look what is to become of it."""
        self.orphans[claim.serial] = Orphan(claim)
        self.look_at = 0.0

    def kill_hung(self, now):
        """A worker that is silent long after its job's end is no use: let the job be settled. Not
        at the first look: all of us may have been stopped, and have just gone on."""
        for hand in list(self.hands.values()):
            if not hand.claim or hand.slot in self.ended or not is_overdue(
                    hand.claim, hand.since, now):
                hand.overdue = False
            elif not hand.overdue:
                hand.overdue = True
            elif hand.process.exitcode is None:  # else the pid may be another's
                self.log("worker hung: slot %d, pid %d" % (hand.slot, hand.process.pid))
                os.kill(hand.process.pid, signal.SIGKILL)
            else:  # what it has just forked hides its end
                self.on_death(hand, hand.channel)

    def stop_commands(self):
        """Have the commands of workers that are leaving stopped and given back."""
        for hand in list(self.hands.values()):
            if hand.claim and hand.leaving:
                hand.stop("stopped")

    def attended(self):
        """The attempts that another daemon's workers still work at."""
        return [serial for serial, orphan in self.orphans.items() if orphan.attended]

    def cancel(self, serials):
        """Have these commands stopped; once more does no harm. Of `serials`, {serial: ms}, those
        that are negative are orphans to be given back."""
        for hand in list(self.hands.values()):
            if hand.claim and serials.get(hand.claim.serial, 0) > 0:
                hand.stop("cancelled")
        for serial in set(serials) & set(self.orphans):
            self.orphans[serial].reason = "cancelled" if serials[serial] > 0 else "stopped"
            self.look_at = 0.0

    # -- what became of it

    def results(self, limit, now):
        """Results of ended attempts, with at most `limit` bytes of output. Those that aren't
        closed come again."""
        found = []
        for slot, record in self.ended.items():
            hand = self.hands[slot]
            found.append(result_of(hand.claim, "take", record, self.spool, limit,
                                   hand.process.pid))
        if self.orphans and now >= self.look_at:
            found += self.orphan_results(limit, now)
        return found

    def orphan_results(self, limit, now):
        found, soon = [], False
        for orphan in self.orphans.values():
            claim = orphan.claim
            verdict, record = examine(claim, self.spool)
            orphan.attended = verdict == "leave"
            if orphan.attended and not orphan.reason and is_overdue(claim, orphan.since, now):
                self.log("worker hung: slot %d, job %s" % (claim.slot, claim.job))
                orphan.reason = "hung"
            if verdict == "stop" or (orphan.attended and orphan.reason):
                self.stop_orphan(orphan, record, now)
                soon = True
            elif orphan.attended:
                soon = soon or now < orphan.since + LOOK_S
            else:
                found.append(result_of(claim, verdict, record, self.spool, limit))
        self.look_at = now + (BUSY_S if soon else LOOK_S)
        return found

    def stop_orphan(self, orphan, record, now):
        """SIGTERM, after the grace SIGKILL."""
        if orphan.kill_at is None or now >= orphan.kill_at:
            number = signal.SIGTERM if orphan.kill_at is None else signal.SIGKILL
            orphan.kill_at, claim = now + GRACE_S, orphan.claim
            run_file = self.spool.run_file(claim.serial)
            signal_command(leader(record, claim.job, run_file), run_file, number)

    def frees(self, claim):
        """Whether a worker of ours is free for another job once `claim` is closed."""
        return claim.slot in self.hands and not self.hands[claim.slot].leaving

    def close(self, claim):
        """The attempt's outcome is stored: its worker is free for the next."""
        if self.orphans.pop(claim.serial, None):
            self.uneven = True
            return
        del self.ended[claim.slot]
        hand = self.hands[claim.slot]
        hand.claim, hand.since = None, monotonic()
        if hand.leaving:
            self.drop(hand)
        else:
            self.idle[hand.slot] = hand


# ---- Operations ---------------------------------------------------------------------------------
# What a request does, the same with and without the daemon: plain values in, an answer out.
# An operation that writes runs inside a transaction.

# store; now: ms; daemon: None without one
Context = collections.namedtuple("Context", "store now daemon")

# defaults: of its arguments, as the function has them after the context; bare: the one that a
# `value` by itself stands for, the first unless that is keyword-only
Operation = collections.namedtuple("Operation", "function defaults bare writes needs_daemon")
OPERATIONS = {}  # (command, option) -> Operation

# What a request asks for. arguments: {name: value}; once: the key of a write that is sent again
# if its answer got lost
Call = collections.namedtuple("Call", "operation arguments once")


def operation(command, option=None, *, writes=False, needs_daemon=False):
    def register(function):
        names = function.__code__.co_varnames[1:function.__code__.co_argcount]
        defaults = dict(zip(names, function.__defaults__ or ()), **function.__kwdefaults__ or {})
        OPERATIONS[command, option] = Operation(function, defaults, names[0] if names else None,
                                                writes, needs_daemon)
        return function
    return register


def reply(message, **more):
    return dict(success=True, message=message, **more)


def as_count(value):
    """A number of workers, as a number or as text."""
    return as_int(whole(value) if isinstance(value, str) else value, 1, MAX_WORKERS)


def as_position(value):
    return as_int(value, 0, 1 << 62)


ARGUMENTS = {  # name -> its check, whatever the operation is; other names those check themselves
    "state": lambda value: one_of(value, STATES),
    "after": as_position,
    "upto": as_position,
    "offset": as_position,
    "limit": lambda value: as_int(value, 0, PAGE_OUTPUT),
    "attempt": lambda value: as_int(value, 1, 1 << 62),
    "count": as_count,
    "older_than": as_ms,
    "grace": as_ms,
    "within": as_ms,
    "prefix": as_id,
    "reason": as_text,
}


def versions(request):
    """Both sides' versions, for those that don't understand each other."""
    return "daemon: queuectl %s, request: %s" % (
        VERSION, str(request.get("version", "unversioned"))[:20])


def resolve(request):
    """The Call that a request stands for; Failure when it makes none."""
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
        if name in ARGUMENTS and not (value is None and found.defaults[name] is None):
            value = checked(name, ARGUMENTS[name], value)
        given[name] = value
    return Call(found, given, request.get("once"))


def perform(context, call):
    """Do what is asked; a write that was done before is only answered again."""
    remembered = call.operation.writes and is_text(call.once)
    answered = context.store.recall(call.once) if remembered else None
    if answered is not None:
        return json.loads(answered)
    answer = call.operation.function(context, **call.arguments)
    if remembered:
        context.store.remember(call.once, compact(answer))
    return answer


def known_job(store, job_id):
    job = store.job(job_id) if is_text(job_id) else None
    if job is None:
        raise Failure("no job %s; see: list" % str(job_id)[:128])
    return job


def check_state(state, states, ids):
    """That of the jobs which an operation on `states` means; nobody names jobs as well."""
    if state not in states or ids:
        raise BadField("state", "must be one of %s, and without ids" % ", ".join(states))


def selected(context, states, ids, state, after, upto=None):
    """([Job], what the answer tells of the page) of the jobs that a request means: those named,
    each of which must be in one of `states`, or a page of those in `state` beyond `after`, none of
    them later than `upto`: so it never meets what it has itself enqueued (on-dead)."""
    if state is not None:
        check_state(state, states, ids)
        upto = context.store.last_row() if upto is None else upto
        rows = context.store.jobs(state, after, PAGE_JOBS)
        jobs = [job for rowid, job in rows if rowid <= upto]
        return jobs, {"next": rows[-1][0] if len(jobs) == PAGE_JOBS else None, "upto": upto}
    ids = [ids] if isinstance(ids, str) else ids
    if not isinstance(ids, list) or not 0 < len(ids) <= BATCH_JOBS:
        raise Failure("name the jobs, 1 to %d of them, or give a state" % BATCH_JOBS)
    jobs = [known_job(context.store, job_id) for job_id in ids]
    for job in jobs:
        if job.state not in states:
            raise Failure("job %s is %s, not %s; see: show %s" % (
                job.id, job.state, " or ".join(states), job.id))
    return list(dict.fromkeys(jobs)), {"next": None}


def on_job_death(store, job_id, now):
    """Enqueue the `on-dead` line for a job that has just died; its own death enqueues nothing.
    Returns the new job's id or None."""
    line = store.settings["on-dead"]
    job = store.job(job_id) if line else None
    if job is None or job.own & ON_DEAD:
        return None

    def fitting(value, size):
        """What an environment takes of it: another program may have written anything."""
        return str(value).replace("\0", "").encode()[:size].decode("utf-8", "ignore")
    new = make_job({"command": line, "env": {
        "QUEUECTL_DEAD_ID": fitting(job.id, 1000),
        "QUEUECTL_DEAD_ERROR": fitting(job.error or "", 1000),
        "QUEUECTL_DEAD_COMMAND": fitting(job.command, MAX_DEAD_COMMAND)}}, store.settings, now)
    store.insert([new._replace(own=ON_DEAD)])
    return new.id


def pause_note(context):
    """{"paused": reason} for an answer while nothing new is started, else {}."""
    reason = context.store.paused()
    return {} if reason is None else {"paused": reason}


def new_job_note(context):
    """The same for an answer that tells of new jobs; {"workers": 0} where nobody will run them."""
    idle = context.daemon and context.daemon.kind == "daemon" and not context.daemon.wanted
    return pause_note(context) or ({"workers": 0} if idle else {})


def hindrance(context):
    """What keeps every job from running, or None."""
    if context.store.paused() is not None:
        return "the end of the pause; go on with: resume"
    if context.daemon is None or not context.daemon.wanted:
        return "a worker; start one with: worker start"
    return None


def store_jobs(context, given, cwd):
    """Store the jobs that these objects make, all or none: ([id, or that of the unfinished job
    which holds its unique key], how many are new). A Failure's `index` tells which is wrong."""
    store, spare_ids = context.store, new_ids(context.now, len(given))
    new, told, keys = {}, [], {}
    for index, fields in enumerate(given):
        try:
            job = make_job(fields, store.settings, context.now, cwd, spare_ids[index])
            holder = job.unique and (keys.get(job.unique) or store.holder(job.unique))
            if job.id in new and not holder:
                raise Failure("job id %s stands twice" % job.id)
            if "id" in fields and not holder and store.job(job.id):
                raise Failure("job id %s is taken; choose another, or leave it out" % job.id)
        except StorageError:
            raise
        except Failure as error:
            error.details["index"] = index
            raise
        told.append(holder or job.id)
        if not holder:
            new[job.id] = job
            keys[job.unique] = job.id
    store.insert(list(new.values()))
    return told, len(new)


@operation("enqueue", writes=True)
def op_enqueue(context, job=None, cwd=None):
    """Store one job, given as JSON text or as an object."""
    given = decode_json(job, "the job") if isinstance(job, str) else job
    (job_id,), stored = store_jobs(context, [given], cwd)
    return reply("Job enqueued" if stored else "Job already queued", id=job_id,
                 **new_job_note(context))


@operation("enqueue", "batch", writes=True)
def op_enqueue_batch(context, jobs=(), cwd=None, ids=False):
    """Store all of the jobs, or none. Their ids are told only if asked for: the answer is
    remembered."""
    if not isinstance(jobs, list) or len(jobs) > BATCH_JOBS:
        raise Failure("jobs must be a list of at most %d" % BATCH_JOBS)
    told, stored = store_jobs(context, jobs, cwd)
    return reply("Enqueued %s" % plural(stored, "job"),
                 **dict({"ids": told} if ids else {}, **new_job_note(context)))


def worker_list(context):
    """[dict] of the workers; `since`: of its job, or of its leisure."""
    roll = context.daemon.pool.roll(monotonic()) if context.daemon else ()
    return [{"pid": pid, "state": state, "job": claim and claim.job,
             "attempt": claim and claim.number, "since": iso(context.now - ms)}
            for pid, state, claim, ms in roll]


@operation("status")
def op_status(context, *, full=False):
    """Counts; with `full` also what `status --watch` shows."""
    store, daemon = context.store, context.daemon
    told = dict({"jobs": store.counts(), "workers": daemon.pool.count() if daemon else 0},
                **pause_note(context))
    if full:
        told.update(running=worker_list(context), totals=store.totals(), now=iso(context.now),
                    unsettled=store.unsettled(context.now), hindrance=hindrance(context),
                    served=daemon is not None,
                    deaths=[job.public() for job in store.last_deaths()])
    return reply(told)


@operation("list")
def op_list(context, state=None, after=0):
    """A page of jobs, oldest first, beyond `after`; `next` is what comes after, None at the end."""
    page, size = [], 0
    while len(page) < PAGE_JOBS and size < PAGE_BYTES:
        wanted = min(PAGE_JOBS - len(page), 50)
        rows = context.store.jobs(state, after, wanted)
        for after, job in rows:
            page.append(job.public())
            size += len(job.command) + len(job.env or "")
        if len(rows) < wanted:
            return reply(page, next=None)
    return reply(page, next=after)


@operation("dlq", "list")
def op_dlq_list(context, *, after=0):
    return op_list(context, "dead", after)


@operation("dlq", "retry", writes=True)
def op_dlq_retry(context, ids=(), state=None, after=0, upto=None):
    """Queue dead jobs again: those named, all or none; of a page of all, those that can be."""
    store, refused = context.store, []
    jobs, page = selected(context, ("dead",), ids, state, after, upto)
    for job in jobs:
        holder = job.unique and store.holder(job.unique)
        if not holder:
            store.requeue(job, context.now)
            continue
        refused.append("job %s can't be retried: its unique key is held by job %s; wait for that,"
                       " or cancel it" % (job.id, holder))
        if state is None:
            raise Failure(refused[0])
    named, count = ", ".join(job.id for job in jobs), len(jobs) - len(refused)
    return reply("%s added to queue" % (plural(count, "job") if state else "%s %s" % (
        "Jobs" if count > 1 else "Job", named)), count=count, refused=refused, **page)


@operation("cancel", writes=True)
def op_cancel(context, ids=(), state=None, after=0, upto=None, dry_run=False):
    """Make waiting jobs dead, have running ones stopped: those named, all or none, or a page."""
    store, stopping = context.store, []
    jobs, page = selected(context, UNFINISHED, ids, state, after, upto)
    for job in () if dry_run else jobs:
        if store.mark_cancelled(job.id, context.now):
            stopping.append(job.id)
        else:
            store.cancel(job.id, context.now)
            heir = on_job_death(store, job.id, context.now)
            if context.daemon and heir:
                context.daemon.take_on(heir)
    return reply("Cancelled %s" % plural(len(jobs), "job"), count=len(jobs), stopping=stopping,
                 **page)


@operation("delete", writes=True)
def op_delete(context, ids=(), state=None, older_than=0, after=0, upto=None, dry_run=False):
    """Delete finished jobs: those named, all or none, or some of those in `state` that finished
    `older_than` ms ago or before (0: all); `next` is None once there are no more."""
    if state is None:
        jobs, more = selected(context, FINISHED, ids, None, 0)[0], False
        count = len(jobs)
        if not dry_run:
            context.store.delete([job.id for job in jobs])
    else:
        check_state(state, FINISHED, ids)
        before = iso(context.now + 1 - older_than) if older_than else None
        act = context.store.count_finished if dry_run else context.store.purge
        count = act(state, before)
        more = not dry_run and count == PURGE
    return reply("Deleted %s" % plural(count, "job"), count=count, next=0 if more else None)


def waiting_for(context, job):
    """What keeps a job from running; None once it runs or has ended."""
    if job.state not in ("pending", "failed"):
        return None
    if job.due and job.due > context.now:
        return "its time, %s" % iso(job.due)
    return hindrance(context) or "a free worker"


@operation("show")
def op_show(context, id=None):
    """The job with its attempts, first to last, and what it waits for."""
    store, job = context.store, known_job(context.store, id)
    history = store.attempts(job.id) + [
        dict(dict.fromkeys(ATTEMPT), number=claim.number, started_at=iso(claim.started_at),
             serial=claim.serial)
        for claim in store.open_claims(job.id)]
    return reply(dict(job.public(), waiting_for=waiting_for(context, job), history=history))


def output_piece(store, job_id, attempt, offset, limit):
    """(bytes, what `op_logs` tells of them)."""
    past = {one["number"]: one for one in store.attempts(job_id)}
    running = {claim.number: claim for claim in store.open_claims(job_id)}
    last = max([*past, *running], default=None)
    number = last if attempt is None else attempt
    serial, piece = None, (b"", offset, 0)
    if number in running:
        serial = running[number].serial
        piece = Spool(store.path).piece(running[number], offset, limit) or (
            b"", offset, offset + 1)  # being cut: there is more to come
    elif number in past:
        serial, cut = past[number]["serial"], past[number]["output_cut"]
        start = max(offset, cut)
        piece = store.output(serial, start - cut, limit), start, cut + past[number]["output_kept"]
    data, start, end = piece
    return data, {"attempt": number, "serial": serial, "start": start, "end": end, "last": last,
                  "over": number in past}


@operation("logs")
def op_logs(context, id=None, attempt=None, offset=0, limit=PAGE_OUTPUT, work=False):
    """A piece of what an attempt (None: the last) wrote, in base64, from byte `offset` of it on.

    `start`: where the piece starts, later than asked if what came before was cut; `end`: where
    all of it ends by now; `serial`: of the attempt, None if there is none; `last`: the number of
    the last attempt; `over`: it has ended. With `work` a temporary daemon takes the job on.
    """
    import base64
    store, job = context.store, known_job(context.store, id)
    if work and context.daemon and job.state not in FINISHED:
        context.daemon.take_on(job.id)
    data, told = output_piece(store, job.id, attempt, offset, limit)
    return reply(base64.b64encode(data).decode(), **told, state=job.state,
                 exit_code=job.exit_code, error=job.error, served=context.daemon is not None,
                 waiting_for=waiting_for(context, job), db=store.path)


@operation("wait")
def op_wait(context, ids=()):
    """[[id, state, exit code, error]] of those of the jobs that have ended."""
    if not isinstance(ids, list) or len(ids) > MAX_ASKED or not all(map(is_text, ids)):
        raise Failure("ids must be a list of at most %d" % MAX_ASKED)
    rows = context.store.ended(ids)
    for job_id in set(ids) - {row[0] for row in rows}:
        known_job(context.store, job_id)
    return reply([row for row in rows if row[1]], hindrance=hindrance(context),
                 db=context.store.path)


@operation("pause", writes=True)
def op_pause(context, reason=""):
    """Start nothing new until `resume`."""
    context.store.set_paused(reason)
    return reply("Queue paused")


@operation("resume", writes=True)
def op_resume(context):
    paused = context.store.paused() is not None
    context.store.set_paused(None)
    return reply("Queue resumed" if paused else "Queue was not paused")


@operation("config", "set", writes=True)
def op_config_set(context, key=None, value=None):
    if value is None:
        raise BadField(key, "needs a value; for the default: config unset")
    text = value if isinstance(value, str) else compact(value)
    context.store.set_setting(key, read_setting(key, text))
    return reply("Updated %s to %s" % (key, text))


@operation("config", "unset", writes=True)
def op_config_unset(context, key=None):
    checked_key(key)
    context.store.set_setting(key, None)
    return reply("%s is back to its default, %s" % (key, compact(context.store.settings[key])))


@operation("config", "get")
def op_config_get(context, key=None):
    return reply(context.store.settings[checked_key(key)])


@operation("config", "list")
def op_config_list(context):
    return reply(dict(context.store.settings))


@operation("metrics")
def op_metrics(context):
    store, daemon = context.store, context.daemon
    counts, totals = store.counts(), store.totals()
    average = totals["runtime_ms"] / 1000.0 / totals["completed"] if totals["completed"] else 0
    uptime_s, commands, workers = (
        (monotonic() - daemon.started, daemon.commands, daemon.pool.count()) if daemon
        else (0, 0, 0))
    recorded = store.total_commands()
    return reply({
        "total_jobs": sum(counts.values()), "completed_jobs": counts["completed"],
        "uptime": "%d min" % (uptime_s / 60),
        "total_commands": recorded + commands,
        "average_runtime": round(average, 3), "max_runtime": totals["longest_ms"] / 1000.0,
        "dead_jobs": counts["dead"], "failed_attempts": totals["failed"],
        "jobs_enqueued": totals["enqueued"], "jobs_completed": totals["completed"],
        "jobs_died": totals["dead"], "workers_running": workers,
        "jobs": counts, "uptime_s": int(uptime_s),
        "total_runtime": totals["runtime_ms"] / 1000.0, "database_bytes": store.size(),
        # Those that a kill of the daemon can't take back: a counter must not fall.
        "commands_recorded": recorded})


@operation("worker", "start", writes=True, needs_daemon=True)
def op_worker_start(context, count=1):
    if context.daemon and context.daemon.stopping:
        raise Failure("the daemon is stopping; try again when it is gone")
    wanted = count + context.store.wanted()
    if wanted > MAX_WORKERS:
        raise Failure("at most %d workers; %d are wanted already" % (MAX_WORKERS, wanted - count))
    context.store.set_wanted(wanted)
    return reply("Started %s" % plural(count, "worker"))


@operation("worker", "list")
def op_worker_list(context):
    return reply(worker_list(context))


@operation("worker", "stop", writes=True, needs_daemon=True)
def op_worker_stop(context, count=None, now=False):
    """Want `count` workers fewer (None: none at all); `now`: stop their jobs, give them back."""
    wanted = context.store.wanted()
    fewer = wanted if count is None else min(wanted, count)
    context.store.set_wanted(wanted - fewer)
    if context.daemon and now:
        context.store.mark_stopped(context.daemon.pool.attended(), context.now)
        context.daemon.forced_at = 0.0
    return reply("Stopped workers" if count is None else "Stopped %s" % plural(fewer, "worker"))


@operation("daemon", "stop", needs_daemon=True)
def op_daemon_stop(context, grace=None):
    """Begin the orderly stop; `grace`: ms until running jobs are stopped too, None: no limit."""
    context.daemon.stop(grace)
    return reply("Daemon stopping", pid=os.getpid())


KINDS = ("run", "drain", "daemon")  # of daemons: each gives way to those after it


@operation("daemon", "yield")
def op_daemon_yield(context, kind=None):
    """A temporary daemon gives lock and socket up to one of a later kind."""
    if context.daemon is None or kind not in KINDS[KINDS.index(context.daemon.kind) + 1:]:
        raise Failure("this daemon does not give way")
    context.daemon.give_way()
    return reply("Giving way")


@operation("daemon", "status", needs_daemon=True)
def op_daemon_status(context):
    daemon = context.daemon
    return reply({"pid": os.getpid(), "version": VERSION, "db": daemon.db, "socket": daemon.sock,
                  "uptime_s": int(monotonic() - daemon.started), "workers": daemon.pool.count(),
                  "wanted": daemon.wanted, "stopping": daemon.stopping})


@operation("check")
def op_check(context, prefix=None, within=0):
    """What `check` judges: numbers of jobs and workers; the age (s) of the job that has been ready
    longest; if `prefix` is given, ended: s since the last completion of a job whose id begins so,
    None if there is none."""
    store, daemon, now = context.store, context.daemon, context.now

    def ago(ms):
        """In seconds, rounded up, so that nothing over a limit looks as if it weren't."""
        return None if ms is None else max(-((ms - now) // 1000), 0)
    found = dict(store.counts(), **pause_note(context))
    found.update(daemon=daemon is not None, age=ago(store.ready_since(now)) or 0,
                 workers=daemon.pool.count() if daemon else 0)
    if prefix is not None:
        ended = store.completed_at(prefix, iso(max(now - within, 0)))
        found["ended"] = ago(ended and parse_date(ended))
    return reply(found)


def record_results(store, results, now):
    """Store what became of attempts: [(Result, Verdict, id of the job enqueued by a death)]."""
    done, cancelled = [], store.cancelled()
    for result in results:
        claim, outcome, heir = result.claim, result.outcome, None
        spread = int.from_bytes(os.urandom(2), "big") / 32767.5 - 1
        verdict = decide(claim, outcome, store.settings, now, spread)
        at = cancelled.get(claim.serial, 0)
        ended_before = bool(outcome.ended_at) and outcome.ended_at < abs(at)
        if at < 0 and outcome.status != 0 and not ended_before:
            outcome = outcome._replace(reason="stopped")
        if at > 0 and not (verdict.state in FINISHED and ended_before):
            outcome = outcome._replace(reason="cancelled", detail="")
        if at:
            verdict = decide(claim, outcome, store.settings, now, spread)
        if outcome.reason in GIVEN_BACK:
            store.give_back(claim, verdict, now)
        elif (store.finish(claim, verdict, outcome, result.output, result.worker, now)
                and verdict.state == "dead"):
            heir = on_job_death(store, claim.job, now)
        done.append((result._replace(outcome=outcome), verdict, heir))
    return done


def adopt_strangers(store, now):
    """Make rows that another program wrote jobs like any other; the number looked at. One whose
    id has an open attempt waits until that is settled."""
    strangers = store.strangers()
    for rowid, row in strangers:
        job = adopted(row, store.settings, now)
        if job.id != row.id and store.job(job.id):
            job = job._replace(id=new_ids(now)[0])
        serial = store.open_serial(job.id)
        if serial is not None:
            if row.serial == serial:
                store.put_back(rowid)
            continue
        if job.state == "processing":  # its runner was not one of ours, and is gone
            verdict = decide(job, Outcome(None, "worker lost", "", 0, now), store.settings, now)
            job = job._replace(state=verdict.state, attempts=verdict.attempts, error=verdict.error,
                               locked_at=None)
            job = (job._replace(run_after=iso(verdict.due), **scheduled(verdict.due, now))
                   if verdict.due else job._replace(finished_at=iso(now), due=None, ready=None))
        died = job.state == "dead" != row.state
        store.adopt(rowid, job, died)
        if job.unique and job.state in UNFINISHED and not store.holder(job.unique):
            store.hold_keys([job])  # it had ended, and another has had the key since
        if died:
            on_job_death(store, job.id, now)
    return len(strangers)


# ---- Lock, socket and log -----------------------------------------------------------------------
# What makes one process the only writer, where it is reached, and what it tells its operator.

LOCK_BYTES = 1024

# Where a queue is. db, socket: absolute paths; …_given: by flag or environment, else the default
Place = collections.namedtuple("Place", "db db_given socket socket_given")


class Lock:
    """flock on DB.lock: its holder alone may open the database. The file is never removed. Its
    text (pid, kind of holder, socket, the database's identity) is a hint, not the lock."""

    def __init__(self, db):
        self.db = db
        self.path = db + ".lock"
        self.fd = None

    def take(self):
        """True if it is ours now, False if someone else has it."""
        check_folder(os.path.dirname(self.path))
        while True:
            self.fd = open_private(self.path)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if self.in_place():
                return True
            self.release()

    def in_place(self):
        """Whether the path still leads to the file that is locked."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except OSError:
            return False

    def text(self):
        return unpad(os.pread(self.fd, LOCK_BYTES, 0))

    def write(self, kind, sock, identity):
        text = pad({"pid": os.getpid(), "kind": kind, "socket": sock, "identity": identity},
                   LOCK_BYTES)
        try:
            os.pwrite(self.fd, text, 0)
        except OSError as error:
            raise storage_error(self.path, error)

    def release(self):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def is_held_by(pid, path):
    """Whether the lock at `path` is held, and by the process that signed as `pid`: true in any
    container, with or without /proc."""
    with suppress(OSError):
        return is_locked(path) and unpad(read_at(path, 0, LOCK_BYTES)[0]).get("pid") == pid
    return False


def take_lock(lock, kind):
    """Take the Lock for a starting daemon of that kind: those of earlier KINDS are asked
    to give way, commands waited for, a daemon that is to stay is not."""
    deadline = monotonic() + 5
    while not lock.take():
        text = lock.text()
        lock.release()
        holder = text.get("kind")
        # a dead pid: its successor has yet to sign
        serves = holder in KINDS and process_start(text.get("pid") or 0)
        if serves and holder in KINDS[:KINDS.index(kind)]:
            request = {"command": "daemon", "option": "yield", "db": utf8(lock.db),
                       "flag": "kind", "value": kind}
            with suppress(Failure, AttributeError):  # it has no socket yet
                ask(os_path(text["socket"]), request, 2)
        elif serves and (holder == "daemon" or kind == "run"):
            deadline = 0
        if monotonic() > deadline:
            raise Served("a %s, pid %s, already serves %s; %s" % (
                holder or "process", text.get("pid", "unknown"), lock.db,
                "stop it with: daemon stop" if holder == "daemon" else "wait until it is done"))
        time.sleep(0.02)


def check_socket_path(path):
    """Refuse what doesn't fit a socket's address, with room for the name it is bound under."""
    folder, name = os.path.split(path)
    if len(os.fsencode(folder)) + 1 + max(len(os.fsencode(name)), 8) > MAX_SOCKET_PATH:
        raise Failure("socket path %s is too long: at most %d bytes; give a shorter --socket"
                      % (path, MAX_SOCKET_PATH))


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


def name_beside(path):
    """One that nobody knows, for what is to become `path` or was it."""
    return os.path.join(os.path.dirname(path), os.urandom(4).hex())


def remove_stale(path):
    """Move a stale socket aside, and see that it is the one that was found stale: another
    daemon may have found it stale too, and have put its own there."""
    before = os.lstat(path)
    aside = name_beside(path)
    os.rename(path, aside)
    if not os.path.samestat(os.lstat(aside), before):
        with suppress(FileExistsError):
            os.link(aside, path)
    os.unlink(aside)


def bind_private(sock, path, listen):
    """Bind `sock` to `path`, 0600 from its first instant; returns its inode. It listens under
    another name before `path` leads to it: in between it would look stale to others."""
    hidden = name_beside(path)
    umask = os.umask(0o177)
    try:
        sock.bind(hidden)
    finally:
        os.umask(umask)
    try:
        listen()
        os.link(hidden, path)
        return os.lstat(hidden).st_ino
    finally:
        os.unlink(hidden)


def make_server(path, on_connection, on_request):
    """A socketserver on the Unix socket `path`. Our loop calls it, not it ours: `get_request`,
    `verify_request` and `process_request` for a connection, and `finish_request`, which makes a
    handler, for each whole request on it, given as (channel, bytes)."""
    import socketserver

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            on_request(*self.request)

    class Server(socketserver.UnixStreamServer):
        request_queue_size = 128
        inode = None  # of `path`, once that leads to it

        def server_bind(self):
            self.inode = bind_private(self.socket, path, self.server_activate)

        def verify_request(self, request, client_address):
            """Only the owner of the queue gets in; others are told."""
            if peer_uid(request) in (os.geteuid(), None):
                return True
            with suppress(OSError):
                request.settimeout(0)
                request.send(encode(error_answer(Failure("this queue belongs to another user"))))
            return False

        def process_request(self, request, client_address):
            on_connection(request)

        def in_place(self):
            with suppress(OSError):
                return os.lstat(path).st_ino == self.inode
            return False

        def server_close(self):
            if self.in_place():
                os.unlink(path)
            super().server_close()

    check_socket_path(path)
    try:
        server = Server(path, Handler)
    except FileExistsError:
        raise
    except OSError as error:
        raise Failure("can't listen at %s: %s; give another --socket"
                      % (path, error.strerror))
    server.socket.setblocking(False)
    return server


def utter(stream, text, fd):
    """Write for whoever still listens. A dead end is led to /dev/null: each fork flushes the
    streams first, and would fail on what is left in their buffers."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, fd)
            os.close(null)


class Log:
    """DB.log and stderr: a line for each thing an operator should know; never a payload. stderr
    goes without what it can't take now: a pipe that nobody empties, or a terminal held by Ctrl-S,
    would stop the loop with it."""

    def __init__(self, path):
        self.path = path
        self.last = {}  # text -> monotonic of its last line

    def __call__(self, text, every_s=0.0):
        """Write a line; the same one at most every `every_s` seconds."""
        if every_s:
            if monotonic() - self.last.get(text, -every_s) < every_s:
                return
            self.last[text] = monotonic()
        line = "%s [%d] %s\n" % (iso(now_ms()), os.getpid(), safe(text))
        with suppress(OSError, Failure):
            fd = open_private(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                os.write(fd, line.encode("utf-8", "backslashreplace"))
                if os.fstat(fd).st_size > 10 << 20:
                    os.rename(self.path, self.path + ".1")
            finally:
                os.close(fd)
        if select.select((), (2,), (), 0)[1]:
            utter(sys.stderr, line, 2)


def notify(text):
    """Tell systemd, where it started us and listens; never an error."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with suppress(OSError, ValueError), \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(BUSY_S)
            sock.sendto(text.encode(), "\0" + path[1:] if path[0] == "@" else path)


def patiently(action, trouble=Busy):
    """What `action()` returns, tried again for some time while it raises `trouble`."""
    deadline = monotonic() + REACH_S
    while True:
        try:
            return action()
        except trouble:
            if monotonic() > deadline:
                raise
            time.sleep(0.02)


def open_store(lock, kind):
    """The Store for the holder of its lock, who signs that."""
    identity = lock.text().get("identity")
    lock.write(kind, None, identity)
    store = patiently(lambda: Store(lock.db, identity))
    lock.write(kind, None, store.known)
    return store


# ---- Daemon -------------------------------------------------------------------------------------
# The loop: one turn of it stores outcomes, does requests and claims jobs in one transaction, then
# answers and hands out.

NEVER = float("inf")

LOADER = ("import marshal, sys; FROM_CODE = open(int(sys.argv[1]), 'rb'); __file__ = sys.argv[2];"
          " del sys.argv[:2]; code = marshal.loads(FROM_CODE.read()); FROM_CODE.close(); exec(code)")


def shed_syntax_tree():
    """Start this very process anew from its compiled code: Python holds the syntax tree of its
    main script, some 10 MiB, as long as that runs. Where it can't be, nothing is lost but that."""
    import marshal
    import tempfile
    if (__name__ != "__main__" or "FROM_CODE" in globals() or sys.flags.isolated
            or not sys.executable):
        return
    with suppress(OSError), tempfile.TemporaryFile() as file:
        file.write(marshal.dumps(CODE))
        file.seek(0)
        os.set_inheritable(file.fileno(), True)
        os.execv(sys.executable, [sys.executable, "-c", LOADER, str(file.fileno()),
                                  os.path.abspath(__file__)] + sys.argv[1:])


class Daemon:
    """Serves the queue at `place` until it is stopped. `workers`: wanted from now on, None: as
    stored; `grace`: ms, see `stop`.

    kind: "daemon", or a temporary one, which gives way to that: "drain" ends when there is no
    more to do, "run" works the job `only`, others that it takes on and none else, and ends with
    them.
    """

    def __init__(self, place, *, kind="daemon", only=None, workers=None, grace=None):
        self.db = place.db
        self.kind = kind
        self.only = None if only is None else {only}
        self.sock = place.socket
        self.sock_given = place.socket_given  # there or not at all
        self.grace = grace
        self.wanted = workers
        self.log = Log(self.db + ".log")
        self.lock = Lock(self.db)
        self.store = self.server = None  # until `start`
        self.handlers = {}         # signal -> what handled it before
        self.loop = Loop()
        self.started = monotonic()
        self.commands = 0          # served, not yet in the database
        self.channels = set()      # of clients
        self.writes = []           # (channel, Call, monotonic): to be done in the next turn
        self.hungry = True         # jobs may be ready
        self.chores = True         # rows to adopt or to delete
        self.next_due = 0          # ms: no job comes due earlier; 0: unknown
        self.look_at = 0.0         # monotonic
        self.retry_at = 0.0        # monotonic: after trouble with the storage; 0: none
        self.pause_s = BUSY_S
        self.paused = False        # nothing new is started
        self.yielded = False       # to a daemon that is to stay
        self.done = False          # a temporary one has worked all it was to
        self.stopping = False
        self.forced_at = NEVER     # monotonic: running jobs of leaving workers are stopped then
        self.signals = []          # numbers that came
        self.told = None           # the status that systemd shows
        self.clock = now_ms() - int(monotonic() * 1000)

    # -- start and end

    def start(self):
        """Take the lock, open everything, settle what is open; returns the ready line."""
        take_lock(self.lock, self.kind)
        self.store = open_store(self.lock, self.kind)
        self.listen()
        self.spool = Spool(self.db)
        private_directory(self.spool.path)
        self.pool = Pool(self.spool, self.loop, self.log, set_open_files())
        self.catch_signals()
        self.take_over()
        self.log("started: queuectl %s %s, %s" % (VERSION, self.kind,
                                                  plural(self.wanted, "worker")))
        self.step()
        return "queuectl %s daemon ready: pid %d, socket %s, database %s, %s" % (
            VERSION, os.getpid(), self.sock, self.db, plural(self.wanted, "worker"))

    def listen(self):
        """At the socket given, or at the default one, or beside the database if that is taken."""
        state = knock(self.sock)
        if state in ("live", "foreign"):
            if self.sock_given:
                raise Failure("%s is %s; give another --socket" % (
                    self.sock, "served by another daemon" if state == "live"
                    else "not a socket of yours"))
            self.sock, self.sock_given = self.db + ".sock", True
            self.listen()
            return
        try:
            if state == "stale":
                remove_stale(self.sock)
            self.open_socket()
        except (FileExistsError, FileNotFoundError):  # another daemon was there first
            self.listen()

    def open_socket(self):
        """Listen, and sign where."""
        self.server = make_server(self.sock, self.welcome, self.on_request)
        self.loop.want(self.server.socket, READ, self.on_connection)
        self.lock.write(self.kind, self.sock, self.store.known)

    def catch_signals(self):
        """Note them and wake the loop. TERM always works; INT and HUP stay ignored if they were."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        self.loop.want(ours, READ, lambda events: ours.recv(4096))
        self.wake_end = theirs  # or it would be closed
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(
                    number, lambda number, frame: self.signals.append(number))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def take_over(self):
        """What earlier holders of the lock left: open attempts, run files, numbers, workers."""
        claims, serials = self.store.open_claims(), self.spool.serials()
        given = self.store.last_serial()
        patiently(self.begin)
        for claim in claims:
            self.pool.orphan(claim)
        self.heed()
        for serial in set(serials) - {claim.serial for claim in claims}:
            if serial > given and is_locked(self.spool.run_file(serial)):
                # Of a database that was here before this one was put back.
                signal_command(None, self.spool.run_file(serial), signal.SIGKILL)
            self.spool.discard(serial)

    def begin(self):
        """Note the start, and set right what changed since the last one. No attempt gets a number
        that a run file bears."""
        store, now = self.store, now_ms()
        with store.transaction():
            store.raise_serial(max(self.spool.serials(), default=0))
            store.recount()
            store.disown_stranded()
            store.pull_in(now)
            if self.kind == "daemon":
                store.note_startup(now)
                if self.wanted is not None:
                    store.set_wanted(self.wanted)

    def heed(self):
        """Do as the database says from now on."""
        self.paused = self.store.paused() is not None
        if self.kind == "daemon":
            self.wanted = self.store.wanted()
        elif self.kind == "run":
            self.only = {row[0] for row in self.store.ended(list(self.only)) if row[1] is None}
            self.wanted = len(self.only)
        self.pool.cancel(self.store.cancelled())

    def run(self, on_ready):
        """Serve until stopped."""
        try:
            on_ready(self.start())
            if self.kind == "daemon":
                notify("READY=1")
            import gc
            gc.collect()
            if hasattr(gc, "freeze"):
                gc.freeze()  # the workers go on sharing what is loaded now
            while not self.may_end():
                self.step()
            with suppress(StorageError), self.store.transaction(durable=False):
                self.store.add_commands(self.commands)
            self.log("stopped")
        except Exception as error:
            if self.lock.fd is not None:
                self.log("gives up: %s" % (str(error) or repr(error)))
            raise
        finally:
            self.shut()

    def shut(self):
        if self.server:
            self.server.server_close()
        if self.store:
            self.store.close()
        self.lock.release()
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def may_end(self):
        """Whether it is stopping and has nothing left to wait for."""
        if self.writes or not self.stopping:
            return False
        if self.yielded:
            return True
        if self.kind == "daemon" and self.pool.attended():
            return False
        noted = self.pool.ended if self.retry_at else ()  # these wait for the next daemon as well
        return set(self.pool.hands) <= set(noted)

    def stop(self, grace=None):
        """Claim no more and wait for running jobs; after `grace` ms stop them too."""
        grace = self.grace if grace is None else grace
        if not self.stopping:
            self.log("stopping")
            notify("STOPPING=1")
            self.stopping = self.pool.uneven = True
        if grace is not None:
            self.forced_at = monotonic() + grace / 1000.0

    def give_way(self):
        """Stop at once: what runs is finished by its worker and settled by the next daemon."""
        self.stop()
        self.yielded = True

    def take_on(self, job_id):
        """Work this job too, with a worker of its own, if this is for jobs that are named."""
        if self.kind == "run" and len(self.only) < MAX_ASKED and not self.stopping:
            self.only.add(job_id)
            self.wanted = len(self.only)
            self.pool.uneven = self.hungry = True

    def out_of_work(self):
        """Whether a temporary daemon has no more to do."""
        if self.kind == "daemon" or self.writes or any(
                hand.claim for hand in self.pool.hands.values()):
            return False
        with suppress(StorageError):
            return not (self.store.unsettled(now_ms()) if self.only is None else self.only)
        return False

    # -- the loop

    def step(self):
        """Wait for something to do, then do it."""
        self.loop.wait(self.timeout())
        while self.signals:
            self.signals.pop()
            self.stop(0 if self.stopping else None)
        now = monotonic()
        if now >= self.look_at:
            self.look(now)
        self.turn(now)
        if not self.stopping and self.out_of_work():
            self.done = True
            self.stop()
        if self.pool.uneven:
            self.pool.converge(self.places(), now)
        if now >= self.forced_at:  # all that must leave are leaving by now
            self.forced_at = NEVER
            self.stop_commands()

    def places(self):
        """How many workers there are to be, orphans' workers among them."""
        strange = 0 if self.only is None else len(self.pool.attended())
        return 0 if self.stopping else self.wanted + strange

    def timeout(self):
        """Seconds until there is something to do of its own accord."""
        now = monotonic()
        if self.pool.uneven and now >= self.pool.hold_until or self.wants_turn(now):
            return 0.0
        at = [self.look_at, self.forced_at]
        if self.pool.orphans and now >= self.retry_at:
            at.append(self.pool.look_at)
        if now < self.pool.hold_until:
            at.append(self.pool.hold_until)
        if self.retry_at:
            at.append(self.retry_at)
        else:
            at.append(now + (self.next_due - now_ms()) / 1000.0)
        return max(min(at) - now, 0.0)

    def wants_turn(self, now):
        """Whether there is something to do, and be it to see that trouble is over."""
        return now >= self.retry_at and bool(
            self.retry_at or self.writes or self.chores or self.due()
            or (self.hungry and self.pool.idle and self.may_start(now)))

    def due(self):
        """Whether jobs are due, or it is unknown when they are."""
        return self.next_due <= now_ms()

    def may_start(self, now):
        return not self.stopping and not self.paused and now >= self.pool.hold_until

    def look(self, now):
        """Once a second: is everything still ours, what did other programs do?"""
        self.look_at = now + LOOK_S
        if not self.lock.in_place():
            raise Replaced("%s was removed or replaced; another daemon could start" % self.lock.path)
        self.store.check_file()
        if not self.server.in_place():
            self.reopen_socket()
        for channel in list(self.channels):
            if not channel.busy and now > channel.active_at + IDLE_S:
                self.part(channel)
        self.pool.kill_hung(now)
        self.pool.reap()
        try:
            self.store.read_settings()
            self.heed()
            self.chores = self.store.has_chores(now_ms()) or self.commands > 0
            self.notice_clock()
            self.tell_status()
        except StorageError as error:
            self.trouble(error, now)

    def notice_clock(self):
        """After a step of the wall clock other jobs are due, and backoffs may be too far ahead."""
        offset = now_ms() - int(monotonic() * 1000)
        if abs(offset - self.clock) > 1000:
            with self.store.transaction(durable=False):
                self.store.pull_in(now_ms())
            self.next_due = 0
        self.clock = offset

    def tell_status(self):
        """Keep what `systemctl status` shows up to date."""
        if "NOTIFY_SOCKET" in os.environ:
            jobs = self.store.counts()
            text = "STATUS=%s%s, %d jobs waiting, %d running, %d dead" % (
                "Stopping: " if self.stopping else "", plural(self.pool.count(), "worker"),
                jobs["pending"] + jobs["failed"], jobs["processing"], jobs["dead"])
            if text != self.told:
                self.told = text
                notify(text)

    def reopen_socket(self):
        """Someone removed our socket: listen anew, as at the start."""
        old, place = self.server, (self.sock, self.sock_given)
        try:
            self.listen()
            self.log("its socket was gone: listens at %s" % self.sock)
        except (OSError, Failure) as error:
            self.log("can't listen again at %s: %s" % (
                self.sock, getattr(error, "strerror", None) or error), every_s=60)
        if self.server is old:  # the next look tries all anew: whoever is there may have gone
            self.sock, self.sock_given = place
        else:
            self.loop.remove(old.socket)
            old.server_close()

    def turn(self, now):
        """One transaction: outcomes, requests, due jobs, claims. What is answered is on disk."""
        if now < self.retry_at:
            return
        try:
            results = self.pool.results(self.store.settings["output-limit"], now)
        except OSError as error:  # no descriptors, or the disk fails: nothing is known yet
            self.trouble(error, now)
            results = []
        # Requests are done even so: who makes them may have all the descriptors.
        if not results and not self.writes and not self.wants_turn(now):
            return
        writes, self.writes = self.writes, []
        try:
            with self.store.transaction(durable=bool(writes)):
                done = record_results(self.store, results, now_ms())
                self.chores = self.chores or bool(writes)  # they may mean rows just written
                self.do_chores()
                answers = [(channel, self.answer(call)) for channel, call, _ in writes]
                claims = self.claim(now, done)
                self.next_due = self.store.next_due()
        except StorageError as error:
            self.pool.look_at = 0.0
            self.put_off(error, writes, now)
            return
        self.retry_at, self.pause_s = 0.0, BUSY_S
        self.deliver(done, claims, answers, now)

    def do_chores(self):
        """Adopt, purge and promote, some at a time."""
        if self.chores:
            strangers = adopt_strangers(self.store, now_ms())
            purged = self.store.purge_expired(now_ms())
            self.hungry = self.hungry or strangers > 0
            self.chores = strangers == PROMOTE or purged == PURGE
        if self.commands:
            self.store.add_commands(self.commands)
        if self.due() and self.store.promote(now_ms()):
            self.hungry = True

    def claim(self, now, done):
        """Claims for idle workers, and for those whose job has just ended; what ended (`done`)
        may want a pause, or other jobs worked."""
        for result, _, heir in done:
            if result.outcome.reason == "unstarted":
                self.pool.hold_until = now + LOOK_S
            if heir:
                self.take_on(heir)
            # What was given back, or waited for an orphan of its name, is ready.
            if heir or result.outcome.reason in GIVEN_BACK or result.worker is None:
                self.hungry = True
        slots = list(self.pool.idle) if self.hungry else []
        slots += [result.claim.slot for result, _, _ in done if self.pool.frees(result.claim)]
        if not slots or not self.may_start(now):
            return []
        claims = self.store.claim(slots, boot_id(), now_ms(), self.only)
        self.hungry = len(claims) == len(slots)
        return claims

    def deliver(self, done, claims, answers, now):
        """After the COMMIT: free workers, hand out, answer."""
        self.commands = 0
        for result, _, _ in done:
            self.pool.close(result.claim)
        for claim in claims:
            self.pool.hand_out(claim, self.order(claim))
        for result, verdict, _ in done:  # while the workers go on
            self.spool.discard(result.claim.serial)
            if verdict.state == "dead":
                self.log("job dead: %s, %s" % (result.claim.job, verdict.error))
            elif result.outcome.reason == "unstarted":
                self.log("could not start a job: %s" % result.outcome.detail, every_s=60)
        if answers or (done and self.kind == "run"):
            self.obey(now)
        for channel, answer in answers:
            self.send(channel, answer)
            self.pump(channel)

    def obey(self, now):
        """After writes: whatever they want changed in what runs."""
        try:
            self.heed()
        except StorageError as error:  # it is stored: the next look sees it
            self.trouble(error, now)
        self.hungry = self.pool.uneven = True
        self.pool.converge(self.places(), now)

    def stop_commands(self):
        """Have what leaving workers run stopped and given back. Of an orphan this is stored first:
        its worker will note a signal, and the next daemon take that for its job's failure."""
        self.pool.stop_commands()
        try:
            with self.store.transaction():
                self.store.mark_stopped(self.pool.attended(), now_ms())
            self.pool.cancel(self.store.cancelled())
        except StorageError as error:
            self.trouble(error, monotonic())
            self.forced_at = self.retry_at

    def order(self, claim):
        """What a worker needs to run the claim."""
        settings = self.store.settings
        return {"serial": claim.serial, "id": claim.job, "attempt": claim.attempts + 1,
                "command": claim.command, "shell": split_shell(settings["shell"]),
                "timeout": claim.timeout, "limit": settings["output-limit"],
                "cwd": claim.cwd or os.path.dirname(self.db),
                "env": env_of(claim.env)}

    def put_off(self, error, writes, now):
        """The transaction failed as a whole: outcomes and claims are tried again, requests too
        while another program has the lock."""
        for channel, call, since in writes:
            if isinstance(error, Busy) and now < since + WRITE_S:
                self.writes.append((channel, call, since))
            else:
                self.send(channel, error_answer(error))
                self.pump(channel)
        self.hungry = self.chores = True
        self.trouble(error, now)

    def trouble(self, error, now):
        """Try again after a pause that grows, and say so once a minute; Replaced is the end."""
        if isinstance(error, Replaced):
            raise error
        self.log("storage trouble: %s" % error, every_s=60)
        self.retry_at = now + self.pause_s
        self.pause_s = BUSY_S if isinstance(error, Busy) else min(self.pause_s * 2, 5.0)

    # -- clients

    def on_connection(self, _events):
        """Let in whoever waits, a backlog at the most."""
        for _ in range(self.server.request_queue_size):
            if not self.let_in():
                return

    def let_in(self):
        """Accept one connection; False when there is none, or no room for it."""
        try:
            request, address = self.server.get_request()
        except BlockingIOError:
            return False
        except OSError as error:  # no descriptors: make room, or it would be ready for ever
            self.log("can't accept a connection: %s" % error, every_s=60)
            quiet = [channel for channel in self.channels if not channel.busy]
            for channel in sorted(quiet, key=lambda channel: channel.active_at)[:1]:
                self.part(channel)
            return False
        if self.server.verify_request(request, address):
            self.server.process_request(request, address)
        else:
            self.server.shutdown_request(request)
        return True

    def welcome(self, sock):
        self.channels.add(Channel(sock, self.loop, self.pump, self.pump))

    def part(self, channel):
        channel.close()
        self.channels.discard(channel)

    def pump(self, channel):
        """Take whole requests, each after the one before is answered; part when all is said."""
        while channel.open and not channel.busy and not channel.pages:
            data = self.next_request(channel)
            if data is None:
                break
            channel.busy = True
            self.server.finish_request((channel, data), None)
        if (not channel.open or (channel.ended and channel.idle())
                or len(channel.inbox) > 2 * MAX_REQUEST):
            self.part(channel)

    def next_request(self, channel):
        try:
            return take_request(channel.inbox, channel.ended)
        except Failure as error:  # where the next one would begin is unknown
            del channel.inbox[:]
            channel.ended = True
            self.send(channel, error_answer(error))
            return None

    def on_request(self, channel, data):
        """A whole request: reads are done at once, writes in the next turn."""
        self.commands += 1
        try:
            request = parse_request(data)
            if request.get("db") not in (None, utf8(self.db)):
                raise Failure("the daemon at %s serves %s, not %s" % (
                    self.sock, self.db, str(request["db"])))
            call = resolve(request)
            if call.operation.needs_daemon and self.kind != "daemon":
                raise NoDaemon(self.db)
        except Failure as error:
            self.send(channel, error_answer(error))
            return
        if call.operation.writes:
            self.writes.append((channel, call, monotonic()))
        elif "after" in call.operation.defaults and "after" not in call.arguments:
            channel.pages, channel.busy = self.pages(call), False
            channel.flush()
        else:
            self.send(channel, self.answer(call))

    def pages(self, call):
        """A whole list as one answer, a page at a time: the original's client knows no pages."""
        start, after = b'{"success":true,"message":[', 0
        while after is not None:
            answer = self.answer(call._replace(arguments=dict(call.arguments, after=after)))
            if not answer["success"]:
                yield encode(answer)
                return
            after = answer["next"]
            if answer["message"]:
                yield start + compact(answer["message"])[1:-1].encode()
                start = b","
        yield (start if start != b"," else b"") + b"]}\n"

    def answer(self, call):
        """Do it; whatever goes wrong in it is its own trouble alone."""
        context = Context(self.store, now_ms(), self)
        try:
            if not call.operation.writes:
                return perform(context, call)
            with self.store.savepoint():
                return perform(context, call)
        except Failure as error:
            if isinstance(error, StorageError) and call.operation.writes:
                raise  # what the turn did before may be undone as well
            return error_answer(error)
        except Exception as error:  # a bug must not end the queue
            import traceback
            self.log("internal error: %s" % traceback.format_exc())
            return error_answer(Failure("internal error: %r; see %s" % (error, self.log.path)))

    def send(self, channel, answer):
        channel.send(answer)
        channel.busy = False


# ---- Client -------------------------------------------------------------------------------------
# Where a command finds its queue, and how it has its request done: by whoever holds the lock, or,
# if nobody does, here.

def default_db():
    """Beside this file if the directory is ours alone and no bin, else where state is kept."""
    folder = os.path.dirname(os.path.realpath(__file__))
    status = os.stat(folder)
    ours = status.st_uid == os.geteuid() and not others_can_write(folder, status)
    if not ours or os.path.basename(folder) in ("bin", "sbin"):
        # Joined to /, or without a home it would depend on the current directory.
        folder = ("/var/lib/queuectl" if os.geteuid() == 0
                  else os.path.join("/", os.path.expanduser("~/.local/state/queuectl")))
    return os.path.join(folder, "queuectl.db")


def locate(db, sock):
    """The Place that flags or environment name. An empty variable counts as unset."""
    db = db or os.environ.get("DB_PATH")
    sock = sock or os.environ.get("SOCKET_PATH")
    path = os_path(db or default_db())
    check_links(os.path.abspath(path))
    place = Place(os.path.realpath(path), bool(db),
                  os.path.abspath(os_path(sock or DEFAULT_SOCKET)), bool(sock))
    if os.path.isdir(place.db):
        raise Failure("%s is no file for a database; give another --db" % place.db)
    check_socket_path(place.socket)
    return place


def make_default_folder(place):
    """Only the default's directory is made; another is the user's affair."""
    folder = os.path.dirname(place.db)
    if not place.db_given and not os.path.isdir(folder):
        try:
            private_directories(folder)
        except OSError as error:
            raise Failure("can't make %s: %s; give a --db" % (folder, error.strerror))


def shell_quote(text):
    import shlex
    return shlex.quote(text)


def silent(line):
    """A Queue's `note` for who wants to hear nothing."""


class Queue:
    """The queue at `place`, as a command uses it. `note(line)` tells the user how the first
    request went."""

    def __init__(self, place, note):
        self.place = place
        self.note = note
        self.mentioned = False  # whether there is another queue: once is enough

    def by_socket(self):
        """Whether only a socket was given: the queue is whatever is served there."""
        return self.place.socket_given and not self.place.db_given

    def call(self, command, option=None, **value):
        """The answer to a request; Failure when it was refused."""
        request = {"command": command, "option": option, "flag": None, "value": value,
                   "version": VERSION, "once": os.urandom(12).hex()}
        if self.by_socket():
            answer = patiently(lambda: self.ask_at_socket(request), Unreachable)
        else:
            answer = self.ask_queue(dict(request, db=utf8(self.place.db)))
        if answer.get("success") is True:
            self.note = silent
            if isinstance(answer.get("db"), str):  # a temporary daemon may be gone the next time
                self.place = self.place._replace(db=os_path(answer["db"]), db_given=True)
            return answer
        answer.pop("success", None)
        message = str(answer.pop("message", None))
        raise Failure(message[7:] if message.startswith("Error: ") else message, **answer)

    def ask_at_socket(self, request):
        """Only a socket was given: whatever is served there."""
        if knock(self.place.socket) != "live":
            raise Failure("no daemon at %s; name the queue with --db" % self.place.socket,
                          no_daemon=True)
        return ask(self.place.socket, request)

    def ask_queue(self, request):
        """Have it done by whoever holds the queue's lock, or here; reads of a queue that isn't
        there yet make none."""
        call = resolve(request)
        if not call.operation.writes and self.untouched():
            return self.do_here(None, call)
        if request["command"] == "enqueue" and not os.path.exists(self.place.db):
            other = self.other_queue()
            if other:
                raise Failure("%s does not exist; %s; or name the new queue with --db"
                              % (self.place.db, other))
        make_default_folder(self.place)
        return patiently(lambda: self.ask_holder(request, call), Unreachable)

    def ask_holder(self, request, call):
        """The lock tells: free, do it here; held, ask its holder."""
        lock = Lock(self.place.db)
        try:
            if lock.take():
                return self.do_here(lock, call)
            holder = lock.text()
        finally:
            lock.release()
        try:
            return ask(self.socket_of(holder), request)
        except Unreachable as error:
            raise Unreachable("pid %s holds the lock of %s, but %s" % (
                holder.get("pid", "unknown"), self.place.db, error))

    def socket_of(self, holder):
        """Where the lock's holder listens; a Failure if the user gave another place."""
        path = holder.get("socket")
        if not isinstance(path, str):
            raise Unreachable("it is no daemon")
        path = os_path(path)
        if self.place.socket_given and path != self.place.socket:
            raise Failure("the daemon of %s listens at %s, not at %s; leave out --socket and"
                          " SOCKET_PATH" % (self.place.db, path,
                                            self.place.socket))
        if path != DEFAULT_SOCKET:
            self.mention_other()
        return path

    def untouched(self):
        """Whether there has never been a queue here."""
        return not any(map(os.path.lexists, (self.place.db, self.place.db + ".lock")))

    def do_here(self, lock, call):
        """Without a daemon: the same operation, in this process, under the lock (None: only a
        look at a queue that isn't there yet, which makes nothing)."""
        if call.operation.needs_daemon:
            raise NoDaemon(self.place.db)
        if lock is None and self.place.db_given:
            check_folder(os.path.dirname(self.place.db))
        store = open_store(lock, "command") if lock else Store(":memory:")
        with closing(store):
            self.mention_other()
            answer = self.settle_and_do(store, call)
        stored = call.operation.writes and not call.arguments.get("dry_run")
        self.note("daemon not running; %s %s" % (
            "no queue yet at" if lock is None else "stored in" if stored else "read from",
            self.place.db))
        return answer

    def settle_and_do(self, store, call):
        """Record what ended meanwhile, then do it. Stopping what is left is the daemon's work."""
        spool, now = Spool(self.place.db), now_ms()
        results = []
        for claim in store.open_claims():
            verdict, record = examine(claim, spool)
            if verdict not in ("leave", "stop"):
                results.append(result_of(claim, verdict, record, spool,
                                         store.settings["output-limit"]))

        def transact():
            with store.transaction(durable=call.operation.writes):
                record_results(store, results, now)
                adopt_strangers(store, now)
                return perform(Context(store, now, None), call)
        answer = patiently(transact)
        for result in results:
            spool.discard(result.claim.serial)
        return answer

    def other_queue(self):
        """A line for a user who gave nothing, if a daemon of theirs at the default socket serves
        another queue; else None."""
        if self.place.db_given or self.place.socket_given or knock(DEFAULT_SOCKET) != "live":
            return None
        try:
            about = ask(DEFAULT_SOCKET, {"command": "daemon", "option": "status"}, 2)["message"]
            if os_path(about["db"]) == self.place.db:
                return None
        except (Failure, TypeError):
            return None
        return "a daemon at %s serves %s; to use that queue: export DB_PATH=%s" % (
            DEFAULT_SOCKET, about["db"], shell_quote(about["db"]))

    def mention_other(self):
        line = None if self.mentioned else self.other_queue()
        self.mentioned = True
        if line:
            self.note(line)

    def database(self):
        """Its path, for who only reads it: where just a socket was given the daemon there tells."""
        if self.by_socket():
            return os_path(self.call("daemon", "status")["message"]["db"])
        return self.place.db


def call_of(place):
    """The words after the interpreter that call this very file for the queue at `place`."""
    return ([os.path.abspath(__file__), "--db", place.db]
            + ["--socket", place.socket] * place.socket_given)


def start_in_background(place, *options):
    """Start a daemon in a session of its own; its ready line, once it is."""
    import subprocess
    command = [sys.executable or "python3"] + call_of(place) + ["daemon"] + list(options)
    environment = dict(os.environb)
    environment.pop(b"QUEUECTL_RUN", None)  # a job may start it, but it is no part of that
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd="/", start_new_session=True,
                              env=environment)
    ready = daemon.stdout.readline()
    if ready:
        daemon.returncode = 0  # it outlives us; subprocess would warn that nobody waited
        return ready.decode("utf-8", "replace").strip()
    lines = daemon.stderr.read().decode("utf-8", "replace").strip().splitlines() or ["it died"]
    daemon.wait()
    try:
        message = json.loads(lines[-1])["message"].partition(": ")[2]
    except (ValueError, KeyError, TypeError):
        message = "the daemon did not start: %s" % lines[-1]
    raise (Served if "already serves" in message else Failure)(message)


# ---- Doctor -------------------------------------------------------------------------------------
# What is or will be wrong with a queue. Each look returns what it saw, or raises a Failure: "what is
# wrong; the way out".


def look_at_versions(sqlite):
    text = ".".join(map(str, sqlite))
    if sqlite < (3, 7, 17):
        raise Failure("SQLite %s is too old; use a Python with SQLite 3.7.17 or newer" % text)
    return "queuectl %s, %s; Python %s, %s; SQLite %s%s" % (
        VERSION, os.path.abspath(__file__), sys.version.split()[0], sys.executable, text,
        "" if any(fixed <= sqlite < end for fixed, end in (
            ((3, 44, 6), (3, 45)), ((3, 50, 7), (3, 51)), ((3, 51, 3), (4,)))) else
        ", whose WAL-reset bug (fixed in 3.44.6, 3.50.7, 3.51.3) takes two programs that write at"
        " once: other programs should leave the database alone")


def look_at_queue(queue):
    other = queue.other_queue()
    if other:
        raise Failure(other)
    return "%s (%s)" % (queue.place.db, "given" if queue.place.db_given else "the default")


def look_at_folder(folder):
    check_folder(folder)
    mode = os.stat(folder)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise Failure("%s is on a read-only file system; mount it for writing, or use another --db"
                      % folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Failure("%s can't be written; run: chmod u+rwx %s" % (folder, folder))
    if others_can_write(folder, mode) and not mode.st_mode & stat.S_ISVTX:
        raise Failure("%s can be written by others; run: chmod go-w %s" % (folder, folder))
    return folder


def look_at_disk(folder):
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < LOW_DISK or room.f_files and not room.f_favail:
        raise Failure("only %d MiB and %d inodes are free for %s; free some, or use another --db"
                      % (free >> 20, room.f_favail, folder))
    return "%d MiB free" % (free >> 20)


def look_at_file(path, wanted):
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return "not there now"
    mode = stat.S_IMODE(status.st_mode)
    check = check_regular if wanted == 0o600 else check_directory
    check(path, status)
    if mode != wanted:
        raise Failure("%s has mode %04o; run: chmod %o %s" % (path, mode, wanted, path))
    return path


def look_at_lock(path, holder):
    pid = holder.get("pid")
    if not is_locked(path):
        return "free: no daemon runs"
    if type(pid) is not int or not process_start(pid):
        raise Failure("%s is held by %s, not by the daemon it names; end that process" % (
            path, ", ".join(map(str, holders(path))) or "an unknown process"))
    return "held by a %s, pid %d" % (holder.get("kind"), pid)


def look_at_socket(path, given, served):
    state = knock(path)
    if served and state != "live":
        raise Failure("nobody listens at %s, though a daemon holds the lock; end that daemon and"
                      " start another: worker start" % path)
    if state == "stale":
        raise Failure("%s was left by a daemon that died; start one, which replaces it, or run:"
                      " rm %s" % (path, path))
    if given and not served and state:
        raise Failure("%s is not a socket of this queue; give another --socket" % path)
    if served and os.stat(path).st_mode & 0o077:
        raise Failure("%s is open to others; run: chmod 600 %s" % (path, path))
    return "%s: %s" % (path, state or "nothing there")


def look_at_daemon(db, path):
    if not path:
        return "none runs"
    about = ask(path, {"command": "daemon", "option": "status", "db": utf8(db)}, 5).get("message")
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise Failure("the daemon at %s is of another version: %s; restart it: daemon stop, worker"
                      " start" % (path, about))
    return "pid %(pid)d, up %(uptime_s)d s, %(workers)d of %(wanted)d workers" % about


def look_at_schema(db, known, number, identity, lacks, damage):
    if number is not None and not 0 <= number <= len(MIGRATIONS):
        raise Failure("%s has schema %d, and queuectl %s knows %d; use the newer one that made it"
                      % (db, number, VERSION, len(MIGRATIONS)))
    if lacks:
        raise Failure("%s lacks %s: another program changed it; restore a backup"
                      % (db, ", ".join(lacks)))
    if known and identity != known and not damage:
        raise Failure("%s is %s that %s.lock remembers; restore it, or remove the lock file if this"
                      " is meant" % (db, "not the database" if number is not None
                                     else "gone, the queue", db))
    if number is None:
        return "unknown" if damage else "no database yet"
    return "schema %d of %d" % (number, len(MIGRATIONS))


def look_at_integrity(damage):
    if damage:
        raise Failure(damage)
    return "ok"


def diagnose(queue, db):
    """What `doctor` finds: [{"check", "ok", "detail", "advice"}]. Nothing is made or changed."""
    findings, place, holder = [], queue.place, {}

    def note(check, function, *args):
        try:
            detail, ok, advice = function(*args), True, ""
        except (Failure, OSError) as error:
            ok, (detail, _, advice) = False, str(error).partition("; ")
            advice = advice or "see %s.log" % db
        findings.append({"check": check, "ok": ok, "detail": detail, "advice": advice})
        return ok

    note("versions", look_at_versions, sqlite_version())
    note("queue", look_at_queue, queue)
    folder, lock = os.path.dirname(db), db + ".lock"
    while not place.db_given and not os.path.isdir(folder):
        folder = os.path.dirname(folder)  # made when it is needed
    note("directory", look_at_folder, folder)
    note("file system", lambda: check_database(db) or mount_of(folder)[1] or "unknown")
    note("disk", look_at_disk, folder)
    for name in ("", "-wal", "-shm", ".lock", ".log", "-run"):
        note("file DB" + name, look_at_file, db + name, 0o700 if name == "-run" else 0o600)
    if os.path.isfile(lock):
        with suppress(OSError), open(lock, "rb") as file:
            holder = unpad(file.read(LOCK_BYTES))
    served = note("lock", look_at_lock, lock, holder) and is_locked(lock)
    path = os_path(served and holder.get("socket") or "")
    note("socket", look_at_socket, path or place.socket, place.socket_given, path)
    note("daemon", look_at_daemon, db, path)
    found = inspect(db)
    note("schema", look_at_schema, db, holder.get("identity"), *found)
    note("integrity", look_at_integrity, found[-1])
    return findings


# ---- Output -------------------------------------------------------------------------------------
# What users see: results on stdout, as JSON or in the form that a monitoring system, systemd or a
# shell wants; the rest is for people, on stderr.

def indented(value):
    return json.dumps(value, indent=2, default=repr)


def json_lines(rows, _columns):
    """A list as indented JSON, piece by piece: it may be a long one."""
    start = "[\n  "
    for row in rows:
        yield start + indented(row).replace("\n", "\n  ")
        start = ",\n  "
    yield "[]\n" if start[0] == "[" else "\n]\n"


def jsonl_lines(rows, _columns):
    """An object a line."""
    for row in rows:
        yield compact(row) + "\n"


def table_lines(rows, columns):
    """A table for people. Its columns are as wide as the first rows need; on a terminal no line
    is wider than that."""
    import shutil
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    table = (["-" if row[column] is None else safe(str(row[column])) for column in columns]
             for row in rows)
    first = [[column.upper() for column in columns], *itertools.islice(table, PAGE_JOBS)]
    widths = [max(map(len, cells)) for cells in zip(*first)]
    for cells in itertools.chain(first, table):
        yield "  ".join(map(str.ljust, cells, widths)).rstrip()[:width] + "\n"


FORMATS = {"json": json_lines, "jsonl": jsonl_lines, "table": table_lines}
JOB_COLUMNS = ("id", "state", "priority", "attempts", "updated_at", "error", "command")


def lapse(seconds):
    """A duration in two units at most: 45s, 3m20s, 5h12m, 2d4h."""
    seconds = int(seconds)
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60),
                                    ("m", 60, "s", 1)):
        if seconds >= size:
            return "%d%s%d%s" % (seconds // size, unit, seconds % size // part, small)
    return "%ds" % seconds


def bar(done, total, failed, seconds):
    """How far it is: done of total, rate, time left, failures so far."""
    rate = done / seconds if seconds > 0 else 0.0
    filled = 20 * done // total if total else 20
    left = " %s left" % lapse((total - done) / rate) if rate and total > done else ""
    return "[%s%s] %d/%d  %.1f/s%s%s" % ("#" * filled, "." * (20 - filled), done, total, rate, left,
                                         "  %d failed" % failed if failed else "")


def can_draw():
    """Whether stderr is a terminal that a line can be drawn anew on."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def coloured(text, colour):
    """`text` in an ANSI colour, if stderr is a terminal that should have one."""
    if not can_draw() or os.environ.get("NO_COLOR"):
        return text
    return "\x1b[%dm%s\x1b[0m" % (colour, text)


def watch_lines(told, rate):
    """What `status --watch` shows of a full status: states, workers, the last deaths."""
    counts = told["jobs"]
    shades = {"processing": 36, "completed": 32, "failed": 33, "dead": 31}
    yield "  ".join(coloured("%s %d" % (state, counts[state]), shades.get(state, 0))
                    if counts[state] else "%s 0" % state for state in STATES)
    yield "%s, %.1f jobs/s%s" % (
        plural(told["workers"], "worker"), rate,
        ", PAUSED %s" % safe(told["paused"]) if "paused" in told else "")
    now = parse_date(told["now"])
    for worker in told["running"]:
        if worker["job"]:
            yield "  %-7s %-9s %-6s %s" % (
                worker["pid"] or "-", worker["state"],
                lapse((now - parse_date(worker["since"])) / 1000), safe(worker["job"]))
    for job in told["deaths"]:
        yield coloured("  dead %s ago: %s, %s" % (
            lapse((now - parse_date(job["finished_at"])) / 1000), safe(job["id"]),
            safe(job["error"] or "")), 31)


EXPOSITION = """\
jobs gauge jobs Jobs in the queue, by state.
jobs_enqueued_total counter jobs_enqueued Jobs stored so far.
jobs_completed_total counter jobs_completed Jobs that completed so far.
jobs_dead_total counter jobs_died Jobs that became dead so far.
attempts_failed_total counter failed_attempts Attempts that failed so far.
commands_total counter commands_recorded Requests that daemons served so far.
job_duration_seconds summary total_runtime,jobs_completed Run time of completed jobs.
workers gauge workers_running Workers that run.
daemon_uptime_seconds gauge uptime_s Seconds since the daemon started, 0 without one.
database_bytes gauge database_bytes Size of the database and its write-ahead log."""


def exposition(metrics):
    """What `metrics` answers as Prometheus's text format; each row of EXPOSITION is the name, the
    type, the keys, the help."""
    lines = []
    for row in EXPOSITION.splitlines():
        name, kind, keys, about = row.split(" ", 3)
        name, values = "queuectl_" + name, [metrics[key] for key in keys.split(",")]
        lines += ["# HELP %s %s" % (name, about), "# TYPE %s %s" % (name, kind)]
        if keys == "jobs":
            samples = [('{state="%s"}' % state, count) for state, count in values[0].items()]
        else:
            samples = zip(("_sum", "_count") if kind == "summary" else ("",), values)
        lines += ["%s%s %s" % (name, suffix, value) for suffix, value in samples]
    return "\n".join(lines)


def judge(found, limits, prefix=None):
    """(exit status, line) as monitoring plugins have them, from what `check` found and the highest
    values allowed, None for any."""
    critical, warnings, data = [], [], []
    daemon, paused = found.pop("daemon"), found.pop("paused", None)
    names = {"ended": "time since a job %s... completed" % safe(prefix or "").replace("|", "/")}
    for name, value in found.items():
        unit, limit = "s" if name in ("age", "ended") else "", limits.get(name)
        shown = "unknown" if value is None else "%d%s" % (value, unit)
        data.append("%s=%s;;%s;0" % (name, "U" if value is None else shown,
                                     "" if limit is None else limit))
        if limit is not None and (value is None or value > limit):
            critical.append("%s is %s, over %d%s" % (names.get(name, name), shown, limit, unit))
    waiting = found["pending"] + found["failed"]
    if waiting + found["processing"] and not daemon:
        warnings.append("no daemon runs")
    elif waiting and not found["workers"]:
        warnings.append("no worker runs")
    if paused is not None:
        warnings.append("paused")
    status = 2 if critical else int(bool(warnings))
    jobs = "%s waiting, %d dead" % (plural(waiting, "job"), found["dead"])
    return status, "%s - %s | %s" % (("OK", "WARNING", "CRITICAL")[status],
                                     ", ".join(critical + warnings + [jobs]), " ".join(data))


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
    program = unit_word(sys.executable or "/usr/bin/python3", variables=False)
    return UNIT % {
        "folder": unit_word(os.path.dirname(place.db), variables=False), "user": name,
        "command": " ".join([program] + [unit_word(word) for word in call_of(place)]),
        "target": "default.target" if user else "multi-user.target"}


# A completion script for each shell: the form of a word and of what it is (which bash can't show),
# of a row of words for what was typed, and the script around the rows. All do the same: find the
# command (`at`) and the flag before the cursor (`prev`); offer the values of that flag, else flags
# after a -, else what follows the command, else files.
SHELLS = {
    "bash": ("%s%.0s", "    %s) echo %s ;;", """\
_queuectl_words() {
    case "$1" in
ROWS
    *) return 1 ;;
    esac
}

_queuectl() {
    local cur=${COMP_WORDS[COMP_CWORD]} at= prev= word words
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $word == = ]] && continue
        [[ $prev == --db || $prev == --socket ]] && prev= && continue
        prev=$word
        [[ $word != -* ]] && _queuectl_words "$at${at:+ }$word" >/dev/null && at+=${at:+ }$word
    done
    [[ $prev == --db || $prev == --socket ]] && return
    [[ $cur == = ]] && cur=
    words=$(_queuectl_words "$at $prev") \\
        || { [[ $cur == -* ]] && words=$(_queuectl_words "$at -"); } \\
        || words=$(_queuectl_words "$at")
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}

complete -o default -F _queuectl queuectl queuectl.py"""),
    "zsh": ("%s:%s", "    %s) reply=(%s) ;;", """\
#compdef queuectl queuectl.py
_queuectl_words() {
    case "$1" in
ROWS
    *) return 1 ;;
    esac
}

_queuectl() {
    local at= prev= word cur=$words[CURRENT]
    local -a reply
    for word in "${(@)words[2,CURRENT-1]}"; do
        [[ $prev == --db || $prev == --socket ]] && prev= && continue
        prev=$word
        [[ $word != -* ]] && _queuectl_words "$at${at:+ }$word" && at+=${at:+ }$word
    done
    [[ $cur == --*=* ]] && prev=${cur%%=*} && compset -P "*="
    [[ $prev == --db || $prev == --socket ]] && _files && return
    reply=()
    _queuectl_words "$at $prev" || { [[ $cur == -* ]] && _queuectl_words "$at -" } \\
        || _queuectl_words "$at"
    (( $#reply )) && _describe queuectl reply || _files
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _queuectl "$@"
else compdef _queuectl queuectl queuectl.py; fi"""),
    "fish": ("%s\t%s", "    case %s\n        string join \\n -- %s", """\
function __queuectl_words
    switch "$argv[1]"
ROWS
    case '*'
        return 1
    end
    return 0
end

function __queuectl
    set -l at ''
    set -l prev ''
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    set -e words[1]
    for word in $words
        if contains -- $prev --db --socket
            set prev ''
            continue
        end
        set prev $word
        set -l next (string trim -- "$at $word")
        if not string match -q -- '-*' $word; and __queuectl_words $next >/dev/null
            set at $next
        end
    end
    set -l head (string match -r -- '^--[^=]+=' $cur)
    and set prev (string replace = '' -- $head)
    or set head ''
    set words
    if not contains -- $prev --db --socket
        set words (__queuectl_words "$at $prev")
        or begin
            string match -q -- '-*' $cur
            and set words (__queuectl_words "$at -")
        end
        or set words (__queuectl_words $at)
    end
    string join \\n -- $head$words
    or set -q words[1]
    or __fish_complete_path $cur
end

complete -c queuectl -f -a '(__queuectl)'
complete -c queuectl.py -f -a '(__queuectl)'"""),
}


def completion_script(shell, table):
    """The script for `shell`; table: {what was typed: [(word, what it is)]}."""
    form, row, script = SHELLS[shell]
    rows = [row % (shell_quote(typed), " ".join(
        shell_quote(form % (word, about) if about else word) for word, about in words))
            for typed, words in sorted(table.items())]
    return script.replace("ROWS", "\n".join(rows), 1)


def print_text(text):
    """Write a line and flush, so that a full disk or a closed pipe shows here."""
    print(text, flush=True)


def print_compact(value):
    """As JSON in one line."""
    print_text(compact(value))


def print_indented(value):
    print_text(indented(value))


def tell(line):
    """For people: a full disk or a closed pipe there is no reason to fail."""
    utter(sys.stderr, safe(line) + "\n", 2)


def clipped(line, width):
    """`line` cut to `width` characters, not counting colours."""
    shown, count = "", 0
    for part in re.split("(\x1b\\[[0-9]+m)", line):
        if not part.startswith("\x1b"):
            part = part[:width - count]
            count += len(part)
        shown += part
    return shown


class Drawing:
    """Lines on stderr that are drawn anew in place; nothing where it can't be."""

    def __init__(self):
        self.able = can_draw()
        self.height = 0

    def show(self, lines):
        if not self.able:
            return
        import shutil
        width, most = shutil.get_terminal_size()
        lines = [clipped(line, width - 1) for line in list(lines)[:max(most - 1, 1)]]
        up = "\r\x1b[%dA" % (self.height - 1) if self.height > 1 else "\r"
        sys.stderr.write(up * (self.height > 0) + "\x1b[J" + "\n".join(lines))
        sys.stderr.flush()
        self.height = len(lines)

    def close(self):
        """Leave what stands there, and go on below."""
        if self.height:
            tell("")
            self.height = 0


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
count_arg = functools.partial(arg, type=flag_type(as_count), metavar="N")
number_arg = functools.partial(arg, metavar="N", type=flag_type(number_from(0, 10 ** 9)))


# The one place of each grammar: a job's flags, which jobs are meant, how a list is shown.
WHAT = arg("job", "JSON, - for a job a line from stdin, or a command (one argument: a shell line)",
           nargs="?", metavar="JOB, or -- CMD ARG ...")
LINE = arg("job", "one argument alone is a shell line", nargs="?", metavar="-- CMD ARG ...")
JOB_FLAGS = (
    arg("--id", "default: made of the time"),
    arg("--priority", "-1000 to 1000, higher first", type=int, metavar="N"),
    duration_arg("--delay", "not before so long from now: 90s, 5m"),
    arg("--at", "not before: 2026-01-15T10:30:00Z", dest="run_after", type=flag_type(as_date),
        metavar="TIME"),
    duration_arg("--timeout", "longest run of an attempt, 0s: none"),
    arg("--max-retries", "attempts in all", type=int, metavar="N"),
    arg("--cwd", "where it runs (default: here)", metavar="DIR",
        type=lambda text: utf8(os.path.abspath(os_path(text)))),
    arg("--env", "added to its environment", action="append", nargs="+", metavar="K=V"),
    arg("--unique", "store nothing while an unfinished job has this key", metavar="KEY"))
QUIET = switch("-q --quiet", "print ids only")
LISTING = (
    arg("--format", "default: json", choices=tuple(FORMATS), default="json"),
    arg("--json", "--format json", dest="format", action="store_const", const="json"), QUIET)
KEY = arg("key", ", ".join(SETTINGS))
DRY_RUN = switch("--dry-run", "only say how many it would be")


def selection(states):
    return (arg("ids", nargs="*", metavar="ID"),
            arg("--state", "all that are " + ", ".join(states), choices=states, metavar="S"),
            switch("--all", "all that can be"))


def each_answer(queue, args, states, command, option=None, **more):
    """The answers to an operation on the selected jobs: one for ids, else one a page."""
    given = bool(args.ids) + bool(args.state) + args.all
    if given > 1:
        raise Usage("give ids, or --state S, or --all")
    if not given:
        raise Usage("name the jobs, or give --all" + " or --state S" * (len(states) > 1))
    upto = None
    for state in states if args.all else (args.state,):
        after = 0
        while after is not None:
            answer = queue.call(command, option, ids=args.ids, state=state, after=after, upto=upto,
                                **more)
            yield answer
            after, upto = answer["next"], answer.get("upto")


def print_rows(args, rows, columns):
    """A list as the flags of LISTING want it; its first column is the id."""
    lines = FORMATS[args.format](rows, columns)
    if args.quiet:
        lines = ("%s\n" % row[columns[0]] for row in rows)
    sys.stdout.writelines(lines)
    sys.stdout.flush()


def command_line(argv):
    """The command for an argv; one argument alone is a shell line."""
    return argv[0] if len(argv) == 1 else " ".join(map(shell_quote, argv))


def job_fields(args):
    """What the command line says of a job."""
    fields = {name: value for name, value in vars(args).items()
              if name in FIELDS and value is not None}
    if args.argv is not None:
        if args.job is not None or not args.argv:
            raise Usage("one command is needed, after --, like: -- make -j4")
        fields["command"] = command_line(args.argv)
    if args.env:
        pairs = [pair.partition("=") for pairs in args.env for pair in pairs]
        for name, equals, _ in pairs:
            if not equals:
                raise Usage("--env takes NAME=VALUE, not %s" % name)
        fields["env"] = {name: value for name, _, value in pairs}
    if args.delay is not None:
        if args.run_after is not None:
            raise Usage("--delay and --at can't both be given")
        fields["run_after"] = iso(now_ms() + args.delay)
    return fields


def is_held(answer):
    """Whether an enqueue was answered with the job that holds its unique key."""
    return answer["message"] == "Job already queued"


def warn(answer):
    """Say what keeps a new job from running."""
    if "paused" in answer:
        tell("the queue is paused%s; nothing starts until: resume"
             % (answer["paused"] and " (%s)" % answer["paused"]))
    elif answer.get("workers") == 0:
        tell("no worker runs; start one with: worker start")


class Wait:
    """Sleeps between two looks of a command that watches, at first but briefly. What is waited for
    is told after a second, and when it has become another."""

    def __init__(self):
        self.pause_s = 0.01
        self.hint_at = monotonic() + 1
        self.told = None

    def __call__(self, what=None):
        if what and what != self.told and monotonic() > self.hint_at:
            tell("waiting for %s" % what)
            self.told = what
        time.sleep(self.pause_s)
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
    try:
        path = utf8(os.getcwd())
        path.encode()
        return path
    except (OSError, UnicodeEncodeError):
        return None


def batches(stream):
    """Lists of (line number, bytes), each as large as one request may be; blank lines left out."""
    lines, size = [], 0
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        if lines and (len(lines) == BATCH_JOBS or size + len(line) > BATCH_BYTES):
            yield lines
            lines, size = [], 0
        lines.append((number, line))
        size += len(line)
    if lines:
        yield lines


def read_job(text, fields, what="the job"):
    """The job that a JSON text is; `fields`, what the flags say, win."""
    job = decode_json(text, what)
    if not isinstance(job, dict):
        raise Failure(NO_JOB)
    return dict(job, **fields)


def enqueue_batch(queue, lines, fields, ids, last):
    """The answer to the jobs that these lines are; a Failure names the one that is wrong, and
    `last`, up to which those before are stored."""
    jobs = []
    try:
        for _, line in lines:
            jobs.append(read_job(line, fields, "it"))
        return queue.call("enqueue", "batch", jobs=jobs, cwd=working_directory(), ids=ids)
    except Failure as error:
        wrong = len(jobs) if len(jobs) < len(lines) else error.details.get("index", 0)
        raise Failure("line %d: %s; %s" % (
            lines[wrong][0], error,
            "lines 1 to %d are stored" % last if last else "nothing is stored"))


def enqueue_lines(queue, args, fields):
    """JSON Lines from stdin, in batches that are each stored whole or not at all; what `fields`
    holds is the same for all."""
    stored = held = last = 0
    progress, answer = Drawing(), {}
    if sys.stdin is None:
        raise Failure("there is nothing to read: stdin is closed")
    for lines in batches(sys.stdin.buffer):
        answer = enqueue_batch(queue, lines, fields, args.quiet, last)
        last = lines[-1][0]
        count = int(answer["message"].split()[1])  # as a daemon of any version tells it
        stored, held = stored + count, held + len(lines) - count
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
        enqueue_lines(queue, args, fields)
        return
    if args.argv is not None:
        job = fields
    elif args.job is None:
        raise Usage("a job is missing: JSON, or a command after --, like: enqueue -- make -j4")
    elif args.job[:1].isalnum() or args.job[:1] in "./":
        raise Failure(NO_JOB + "; a command goes after --, like: enqueue -- make -j4")
    else:
        job = read_job(args.job, fields)
    answer = queue.call("enqueue", job=job, cwd=working_directory())
    warn(answer)
    if args.quiet:
        print_text(answer["id"])
        return
    print_compact(reply(answer["message"], id=answer["id"]))
    tell("id: %s" % answer["id"])
    if not is_held(answer):
        tell("command: %s" % job["command"])


def announce(line):
    """The ready line; whoever started us may have closed its end."""
    utter(sys.stdout, safe(line) + "\n", 1)


@subcommand("daemon",
            count_arg("--workers", "workers wanted from now on (default: as many as before)"),
            duration_arg("--grace", "how long a stop waits for running jobs, like 30s (default: as"
                                    " long as it takes)"),
            switch("--detach", "run in the background"),
            arg("--only", argparse.SUPPRESS))  # how `run` has its job worked without a daemon
def cmd_daemon(queue, args):
    """Serve the queue in the foreground. SIGTERM or Ctrl-C: start nothing more, wait for running
    jobs, exit; a second one stops them and gives their attempts back.

    daemon --workers 2
    daemon --workers 4 --grace 60s"""
    place = queue.place
    make_default_folder(place)
    if args.detach:
        options = [] if args.workers is None else ["--workers", str(args.workers)]
        options += [] if args.grace is None else ["--grace", "%dms" % args.grace]
        tell(start_in_background(place, *options))
        return
    if args.only is None:
        shed_syntax_tree()
    Daemon(place, kind="daemon" if args.only is None else "run", only=args.only,
           workers=args.workers, grace=args.grace).run(announce)


@subcommand("daemon stop", duration_arg("--grace", "stop jobs that still run after it"))
def cmd_daemon_stop(queue, args):
    """Stop the daemon as SIGTERM does, and wait until it is gone.

    daemon stop --grace 30s"""
    lock = queue.database() + ".lock"
    answer = queue.call("daemon", "stop", grace=args.grace)
    started, wait = process_start(answer["pid"]), Wait()
    while is_held_by(answer["pid"], lock):
        wait("running jobs; Ctrl-C ends only the waiting")
    gone_by = monotonic() + 1  # at once, but in another container that number may be anyone's
    while started and process_start(answer["pid"]) == started and monotonic() < gone_by:
        time.sleep(0.02)
    print_compact(reply("Stopped daemon"))


@subcommand("daemon status")
def cmd_daemon_status(queue, args):
    """Show the daemon's pid, version, paths and workers.

    daemon status"""
    print_indented(queue.call("daemon", "status")["message"])


@subcommand("worker start", count_arg("--count", "how many (default 1)", default=1))
def cmd_worker_start(queue, args):
    """Add workers. Without a daemon, start one in the background with so many.

    worker start --count 3"""
    for last in (False, True):
        try:
            print_compact(queue.call("worker", "start", count=args.count))
            return
        except Failure as error:
            if "no_daemon" not in error.details:
                raise
        make_default_folder(queue.place)
        try:
            tell(start_in_background(queue.place, "--workers", str(args.count)))
            print_compact(reply("Started %s" % plural(args.count, "worker")))
            return
        except Served:
            if last:
                raise


@subcommand("worker stop", count_arg("--count", "so many (default: all)"),
            switch("--now", "stop their jobs, which are then run again"))
def cmd_worker_stop(queue, args):
    """End workers, each after its current job; they are no longer wanted.

    worker stop --count 1 --now"""
    print_compact(queue.call("worker", "stop", count=args.count, now=args.now))


@subcommand("worker list", *LISTING)
def cmd_worker_list(queue, args):
    """Show the workers: pid, state, job, and since when.

    worker list --format table
    worker list -q"""
    print_rows(args, queue.call("worker", "list")["message"],
               ("pid", "state", "job", "attempt", "since"))


def statuses(queue):
    """Full statuses, one look after the other."""
    while True:
        yield queue.call("status", full=True)["message"]


def watch_status(queue):
    """Draw the state of the queue anew whenever it changes; plain lines where it can't be drawn."""
    drawing, samples, before = Drawing(), collections.deque(maxlen=50), None
    drawing.able = drawing.able and sys.stdout.isatty()
    try:
        for told in statuses(queue):
            samples.append((monotonic(), told["totals"]["completed"] + told["totals"]["dead"]))
            (start, first), (end, last) = samples[0], samples[-1]
            rate = (last - first) / (end - start) if end > start else 0.0
            drawing.show(watch_lines(told, rate))
            plain = " ".join("%s %d" % pair for pair in told["jobs"].items()) + (
                " workers %d%s" % (told["workers"], " paused" * ("paused" in told)))
            if not drawing.able and plain != before:
                print_text(plain)
                before = plain
            time.sleep(POLL_S)
    finally:
        drawing.close()


@subcommand("status", switch("--watch", "show it live until Ctrl-C"))
def cmd_status(queue, args):
    """Show the number of jobs in each state, and of workers.

    status --watch"""
    if args.watch:
        with watching():
            watch_status(queue)
    print_indented(queue.call("status")["message"])


def job_rows(queue, state):
    """The jobs in `state`, None: all, asked for page by page."""
    after = 0
    while after is not None:
        answer = queue.call("list", state=state, after=after)
        yield from answer["message"]
        after = answer["next"]


@subcommand("list", arg("--state", "only " + ", ".join(STATES), choices=STATES, metavar="S"),
            *LISTING)
def cmd_list(queue, args):
    """Show jobs, oldest first.

    list --state completed --format table"""
    print_rows(args, job_rows(queue, args.state), JOB_COLUMNS)


@subcommand("show", arg("id", metavar="ID"))
def cmd_show(queue, args):
    """Show a job with its attempts and what it waits for.

    show hello
    show hello | grep error"""
    print_indented(queue.call("show", id=args.id)["message"])


def employ(queue, job_id):
    """Have a temporary daemon work the job, unless someone else has just started one."""
    with suppress(Served):
        start_in_background(queue.place, "--only=" + job_id)


def hand_on(answer, offset):
    """Write a piece of output, bytes as they are; where the next one starts."""
    import base64
    data = base64.b64decode(answer["message"])
    if not data and not answer["over"]:
        return offset
    if answer["start"] > offset:
        tell("%d bytes were cut here" % (answer["start"] - offset))
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return answer["start"] + len(data)


def await_end(queue, job_id):
    """Wait until the job has ended, and see to it that somebody works it; the last answer."""
    wait = Wait()
    while True:
        answer = queue.call("logs", id=job_id, limit=0, work=True)
        if answer["state"] in FINISHED and (answer["over"] or answer["serial"] is None):
            return answer
        if not answer["served"]:
            employ(queue, job_id)
        wait()


def follow(queue, job_id, *, attempt=None, work=False, to_end=True):
    """Hand on what the job writes, from its last attempt or `attempt` on, to the end of the job
    or (not `to_end`) to what there is by now; returns the last answer. With `work` see to it that
    somebody works the job."""
    number, serial, offset, end = attempt, None, 0, 0
    wait = Wait()
    while True:
        answer = queue.call("logs", id=job_id, attempt=number, offset=offset, work=work)
        if answer["serial"] != serial:  # another attempt than before: from its start
            serial, number, offset, end = answer["serial"], answer["attempt"], 0, answer["end"]
            continue
        before, offset = offset, hand_on(answer, offset)
        read = answer["over"] and offset >= answer["end"]
        ended = read if attempt else (read or serial is None) and answer["state"] in FINISHED
        if offset > before and (to_end or offset < end):
            wait = Wait()
        elif read and attempt is None and answer["last"] > number:
            number += 1
            tell("attempt %d" % number)
        elif ended or not to_end and (serial is None or offset >= end):
            return answer
        else:
            if work and not answer["served"]:
                employ(queue, job_id)
            wait(answer["waiting_for"])


@subcommand("logs", arg("id", metavar="ID"),
            number_arg("--attempt", "that attempt (default: the last)"),
            switch("-f --follow", "to the end of the job"))
def cmd_logs(queue, args):
    """Print what a job wrote, bytes as they were. -f follows it, and waits for it to start.

    logs hello
    logs -f hello
    logs hello --attempt 1"""
    with watching():
        answer = follow(queue, args.id, attempt=args.attempt, to_end=args.follow)
    if answer["serial"] is None:
        raise Failure("job %s %s %s" % (args.id, (
            "has no such attempt; see: show" if args.attempt else "never ran; see: show"
            if answer["state"] in FINISHED else "has not run yet; follow it with: logs -f"),
            args.id))


def ended_with(code, message):
    """A Failure with that exit status."""
    error = Failure(message)
    error.exit_code = code
    return error


def failure_of(job_id, state, exit_code, error):
    """None for a job that completed; else a Failure with its exit code, 125 if it has none."""
    if state == "completed":
        return None
    return ended_with(125 if exit_code is None else exit_code, "job %s died: %s; see: logs %s" % (
        job_id, error, job_id))


def progress_of(queue, ids, ended):
    """(done, total, failed, what hinders them) of these jobs, time and again; fills `ended`:
    id -> (state, exit code, error)."""
    asked = waiting = ids  # at first all, to see that they exist
    while True:
        for at in range(0, len(asked), MAX_ASKED):
            answer = queue.call("wait", ids=asked[at:at + MAX_ASKED])
            for job_id, *end in answer["message"]:
                ended[job_id] = end
        yield (len(ended), len(ids), sum(end[0] == "dead" for end in ended.values()),
               answer["hindrance"])
        # In turns, so that each is asked before `retention` could take it.
        waiting = [job_id for job_id in waiting[ASKED:] + waiting[:ASKED] if job_id not in ended]
        asked = waiting[:ASKED]


def progress_of_all(queue):
    """The same for whatever is queued now and later."""
    before = None
    for told in statuses(queue):
        now = told["totals"]["completed"], told["totals"]["dead"]
        before = before or now
        done = sum(now) - sum(before)
        yield (done, done + sum(told["jobs"][state] for state in UNFINISHED), now[1] - before[1],
               told["hindrance"])


def watch_progress(steps, timeout):
    """Draw these steps until all is done; how many failed. A Failure once `timeout` ms are over."""
    drawing, start, wait = Drawing(), monotonic(), Wait()
    try:
        for done, total, failed, hindrance in steps:
            drawing.show([bar(done, total, failed, monotonic() - start)])
            if done >= total:
                return failed
            if timeout is not None and monotonic() > start + timeout / 1000.0:
                raise ended_with(124, "after %s %d of %d jobs had ended; the rest goes on" % (
                    lapse(timeout / 1000.0), done, total))
            wait(hindrance)
    finally:
        drawing.close()


@subcommand("wait", arg("ids", "default: until the queue is empty", nargs="*", metavar="ID"),
            duration_arg("--timeout", "give up after it, exit 124"))
def cmd_wait(queue, args):
    """Wait until jobs have ended. One id: exits with the job's exit code (125 if it has none);
    several, or none given: 0 all completed, 1 not.

    wait hello
    wait job-1 job-2 --timeout 10m"""
    ids, ended = list(dict.fromkeys(args.ids)), {}
    with watching():
        dead = watch_progress(progress_of(queue, ids, ended) if ids else progress_of_all(queue),
                              args.timeout)
    if dead and len(ids) == 1:
        raise failure_of(ids[0], *ended[ids[0]])
    if dead:
        raise Failure("%s died; see: dlq list" % plural(dead, "job"))
    print_compact(reply("%s completed" % plural(len(ids), "job") if ids else "Queue is empty"))


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it has to be answered like Ctrl-C."""

    exit_code = 143


def terminate(_number, _frame):
    raise Terminated()


ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def abandon(queue, job_id):
    """Cancel the job of a `run` that ends early, and wait for its end; what to say."""
    try:
        queue.call("cancel", ids=[job_id])
        await_end(queue, job_id)
    except Failure:  # it has just ended, or can't be reached
        return "job %s is left as it is; see: show %s" % (job_id, job_id)
    return "job %s cancelled" % job_id


def attend(queue, job_id, quiet):
    """See a job of `run` through: its last answer. Whatever ends that early cancels the job."""
    heard = []

    def handle(number, frame):
        """timeout(1) sends two signals: one that comes at once is the same again, a later one ends
        the waiting that the first brought."""
        if not heard or monotonic() > heard[-1] + TWICE_S:
            heard.append(monotonic())
            (signal.default_int_handler if number == signal.SIGINT else terminate)(number, frame)
    for number in ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
        return await_end(queue, job_id) if quiet else follow(queue, job_id, work=True)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(abandon(queue, job_id))
    except (Failure, OSError):
        tell(abandon(queue, job_id))
        raise


@subcommand("run", LINE, *JOB_FLAGS, switch("--quiet", "print nothing unless the job dies"))
def cmd_run(queue, args):
    """Enqueue a command, wait, hand on its output and exit code. For crontabs. Without a daemon
    it works its own job. Ctrl-C or SIGTERM cancels the job; with --unique and the key held
    nothing is done.

    run --quiet --unique backup --timeout 2h -- /usr/local/bin/backup
    run --max-retries 5 -- 'curl -fsS https://example.org/ >/srv/page'"""
    if args.argv is None:
        raise Usage("a command is missing, after --, like: run --quiet -- make")
    say = silent if args.quiet else tell
    queue.note = silent
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # until it is known whose the job is
    answer = queue.call("enqueue", job=job_fields(args), cwd=working_directory())
    job_id = answer["id"]
    if is_held(answer):
        say("job %s has this key and is unfinished; nothing was started" % job_id)
        if not queue.call("logs", id=job_id, limit=0, work=True)["served"]:
            employ(queue, job_id)  # nobody works it: its `run`, or its daemon, is gone
        return 0
    if answer.get("workers") == 0:
        raise Failure("no worker runs; start one with: worker start; %s" % abandon(queue, job_id))
    if not args.quiet:
        warn(answer)
    end = attend(queue, job_id, args.quiet)
    failure = failure_of(job_id, end["state"], end["exit_code"], end["error"])
    if failure is None:
        return 0
    if args.quiet:
        follow(queue, job_id, to_end=False)
    tell(str(failure))
    return failure.exit_code


def outlast(queue):
    """Watch, as a client of the daemon that took over a drain; whether all is done: not so when
    that daemon is gone too, or has not come for some seconds."""
    wait, served_at = Wait(), monotonic()
    for told in statuses(queue):
        served_at = monotonic() if told["served"] else served_at
        if not told["unsettled"] or monotonic() > served_at + 3:
            return not told["unsettled"]
        wait(told["hindrance"])


@subcommand("drain", count_arg("--count", "so many workers (default 1)", default=1))
def cmd_drain(queue, args):
    """Run what is queued, in the foreground, without a daemon. Ends when nothing is ready, running
    or waiting for another try; exits 1 if a job died.

    drain --count 4"""
    make_default_folder(queue.place)
    queue.note = silent
    before = next(statuses(queue))
    if "paused" in before:
        raise Failure("the queue is paused; go on with: resume")
    done = False
    while not done:
        daemon = Daemon(queue.place, kind="drain", workers=args.count)
        daemon.run(silent)
        done = daemon.done
        if not done:
            if not daemon.yielded:
                raise Failure("stopped before the queue was drained; the rest is kept")
            tell("another daemon took over; waiting for it")
            with watching():
                done = outlast(queue)
    died = next(statuses(queue))["totals"]["dead"] - before["totals"]["dead"]
    if died:
        raise Failure("%s died; see: dlq list" % plural(died, "job"))
    print_compact(reply("Queue drained"))


def report(args, done, count):
    """What was done ("cancelled", "deleted"), or would be, to how many jobs."""
    one = len(args.ids) == 1 and not args.dry_run
    print_compact(reply("%s %s%s" % ("Job " + args.ids[0] if one else plural(count, "job"),
                                     "would be " * args.dry_run, done)))


@subcommand("cancel", *selection(UNFINISHED), DRY_RUN)
def cmd_cancel(queue, args):
    """Make jobs dead: waiting ones at once, running ones when all their processes are stopped.

    cancel hello
    cancel --state pending --dry-run"""
    count, stopping = 0, []
    # failed once more: a job may move on between two looks
    states = UNFINISHED if args.dry_run else UNFINISHED + ("failed",)
    for answer in each_answer(queue, args, states, "cancel", dry_run=args.dry_run):
        count += answer["count"]
        stopping += answer["stopping"]
    for job_id in stopping:
        with watching():
            await_end(queue, job_id)
    report(args, "cancelled", count)


@subcommand("delete", *selection(FINISHED), DRY_RUN)
def cmd_delete(queue, args):
    """Delete finished jobs, with their attempts and output.

    delete hello
    delete --state dead --dry-run"""
    counts = [answer["count"] for answer in each_answer(
        queue, args, FINISHED, "delete", older_than=args.older_than, dry_run=args.dry_run)]
    report(args, "deleted", sum(counts))


@subcommand("purge", arg("--state", "completed (default) or dead", choices=FINISHED,
                         default="completed", metavar="S"),
            duration_arg("--older-than", "only those that finished so long ago"), DRY_RUN)
def cmd_purge(queue, args):
    """Delete completed jobs. The setting retention has it done by itself.

    purge --older-than 7d
    purge --state dead --older-than 30d --dry-run"""
    cmd_delete(queue, args)


@subcommand("pause", arg("--reason", "shown by status", default="", metavar="TEXT"))
def cmd_pause(queue, args):
    """Start nothing new; running jobs go on. Kept over restarts.

    pause --reason 'disk swap, back at 9'"""
    print_compact(queue.call("pause", reason=args.reason))


@subcommand("resume")
def cmd_resume(queue, args):
    """End the pause.

    resume"""
    print_compact(queue.call("resume"))


@subcommand("dlq list", *LISTING)
def cmd_dlq_list(queue, args):
    """Show the dead jobs.

    dlq list -q"""
    print_rows(args, job_rows(queue, "dead"), JOB_COLUMNS)


@subcommand("dlq retry", arg("ids", "a dead job", nargs="*", metavar="ID"),
            switch("--all", "all dead jobs"))
def cmd_dlq_retry(queue, args):
    """Queue dead jobs again, their attempts back at 0.

    dlq retry hello
    dlq retry --all"""
    count, refused = 0, []
    for answer in each_answer(queue, args, ("dead",), "dlq", "retry"):
        count += answer["count"]
        refused += answer["refused"]
    done = answer["message"] if args.ids else "%s added to queue" % plural(count, "job")
    for line in refused:
        tell(line)
    if refused:
        raise Failure("%s, %d refused" % (done, len(refused)))
    print_compact(reply(done))


@subcommand("config set", KEY, arg("value"))
def cmd_config_set(queue, args):
    """Change a setting. Times are milliseconds, or like 90s, 5m, 2h, 1d.

    config set max-retries 5
    config set timeout 10m"""
    print_compact(queue.call("config", "set", key=args.key, value=args.value))


@subcommand("config get", KEY)
def cmd_config_get(queue, args):
    """Show a setting.

    config get max-retries
    config get backoff"""
    print_compact(queue.call("config", "get", key=args.key)["message"])


@subcommand("config unset", KEY)
def cmd_config_unset(queue, args):
    """Put a setting back to its default.

    config unset timeout
    config unset on-dead"""
    print_compact(queue.call("config", "unset", key=args.key))


@subcommand("config list")
def cmd_config_list(queue, args):
    """Show all settings.

    config list | grep timeout"""
    print_indented(queue.call("config", "list")["message"])


@subcommand("metrics", arg("--format", "json (default), or prometheus for its collectors",
                           choices=("json", "prometheus"), default="json", metavar="F"))
def cmd_metrics(queue, args):
    """Show counters and run times.

    metrics --format prometheus >queuectl.prom"""
    metrics = queue.call("metrics")["message"]
    print_text(indented(metrics) if args.format == "json" else exposition(metrics))


@subcommand("check", number_arg("--max-pending", "most pending jobs"),
            number_arg("--max-dead", "most dead jobs"),
            duration_arg("--max-age", "longest that a ready job may have waited, like 10m"),
            arg("--completed", "a job whose id begins so must have completed", metavar="ID-PREFIX"),
            duration_arg("--within", "not longer ago than this"))
def cmd_check(queue, args):
    """Judge the queue as a monitoring plugin. It says one line and exits 0 OK, 1 WARNING (jobs wait
    and nobody works), 2 CRITICAL (a limit is exceeded), 3 UNKNOWN (any error).

    check --max-dead 0 --max-age 10m
    check --completed backup- --within 26h"""
    if (args.completed is None) != (args.within is None):
        raise Usage("--completed and --within go together; see: queuectl check --help")
    if not queue.by_socket() and queue.untouched():
        raise Failure("no queue at %s; name it with --db" % queue.place.db)
    queue.note = silent  # the line is all that a plugin says
    found = queue.call("check", prefix=args.completed, within=args.within or 0)["message"]
    age, ended = (ms and ms // 1000 for ms in (args.max_age, args.within))
    status, line = judge(found, {"pending": args.max_pending, "dead": args.max_dead, "age": age,
                                 "ended": ended}, args.completed)
    print_text(line)
    return status


@subcommand("backup", arg("file", "a file that does not exist yet", metavar="FILE"))
def cmd_backup(queue, args):
    """Copy the database while jobs run. The copy holds all that was acknowledged before, is
    checked, 0600, and a queue like any other: DB_PATH=FILE.

    backup /var/backups/queue-$(date +%F).db
    --db /srv/q.db backup /mnt/q.db"""
    path = queue.database()
    if not os.path.exists(path):
        raise Failure("no queue at %s; name it with --db" % path)
    signal.signal(signal.SIGTERM, terminate)  # so that no half of it is left
    count = back_up(path, os.path.abspath(os_path(args.file)))
    print_compact(reply("Backed up %s to %s" % (plural(count, "job"), args.file)))


@subcommand("doctor", *LISTING)
def cmd_doctor(queue, args):
    """Look for what is or will be wrong, and say what to do about it. Nothing is changed. Exit 0
    if all is well, 1 if not.

    doctor --format table
    --db /srv/q.db doctor"""
    findings = diagnose(queue, queue.database())
    print_rows(args, findings, ("check", "ok", "detail", "advice"))
    wrong = [finding for finding in findings if not finding["ok"]]
    for finding in wrong:
        tell("%(check)s: %(detail)s; %(advice)s" % finding)
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


def completions():
    """{what was typed: [(word, what it is)]} of all commands. After `COMMAND -` there are flags,
    after `COMMAND --flag` its values, none where they can't be known."""
    table = collections.defaultdict(list)
    common = [("--db", "the queue's database"), ("--socket", "the daemon's socket"),
              ("--help", "show help")]
    settings = [(key, setting.about) for key, setting in SETTINGS.items()]
    table[" -"] = common + [("--version", "show the version")]
    for name, (_, arguments) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        table[group].append((last, summary(name)))
        if group and group not in dict(table[""]):
            table[""].append((group, ""))
        table.setdefault(group + " -", common)
        table[name + " -"] = common[:]
        for names, options in arguments:
            if options["help"] == argparse.SUPPRESS:
                continue
            values = [(str(value), "") for value in options.get("choices", ())]
            if names[0][0] != "-":
                table[name] += settings if names[0] == "key" else values
                continue
            table[name + " -"] += [(flag, options["help"]) for flag in names]
            for flag in names if "action" not in options else ():
                table[name + " " + flag] = values
    for name in COMMANDS:
        table.setdefault(name, table[name + " -"])
    return table


@subcommand("completion", arg("shell", "the shell to complete in", choices=sorted(SHELLS)))
def cmd_completion(queue, args):
    """Print what makes Tab complete commands, flags, states and settings.

    completion bash >~/.local/share/bash-completion/completions/queuectl
    completion fish >~/.config/fish/completions/queuectl.fish"""
    print_text(completion_script(args.shell, completions()))


# ---- Main ---------------------------------------------------------------------------------------
# The parser of the one command that is called, and the exit status.


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours."""

    def error(self, message):
        raise Usage("%s; see: %s --help" % (message, self.prog))


def new_parser(prog, **options):
    # A width, or each parser would import shutil to ask the terminal, help or no help.
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=78)
    parser = Parser(prog=prog, formatter_class=layout, allow_abbrev=False, **options)
    parser.add_argument("--db", metavar="PATH", default=argparse.SUPPRESS,
                        help="the queue's database (else DB_PATH)")
    parser.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS,
                        help="the daemon's socket (else SOCKET_PATH)")
    return parser


def overview(prefix=""):
    return "commands:\n" + "\n".join("  %-15s %s" % (name, summary(name)) for name in COMMANDS
                                     if name.startswith(prefix))


def parse_group(name, rest):
    """Not a command, but maybe the first word of some, like dlq: their help if that is asked for,
    else an error that tells what is known. Does not return."""
    known = [full for full in COMMANDS if full.startswith(name + " ")]
    if known and set(rest) & {"-h", "--help"}:
        new_parser("queuectl " + name, epilog=overview(name + " ") + "\n\nexamples:\n" + "\n".join(
            manual(full)[1][0] for full in known)).parse_args(["--help"])
    raise Usage("unknown command %s; known are %s" % (
        " ".join([name] + rest[:1]), ", ".join(known or COMMANDS)))


def parse_global(argv, args):
    """Take the flags that stand before a command into `args`; the command and what follows."""
    parser = new_parser("queuectl", description=__doc__.partition("\n\n")[0], epilog=overview()
                        + "\n\nexamples:\n" + __doc__.split("\n\n")[1]
                        + "\n\nqueuectl COMMAND --help tells more.")
    parser.add_argument("--version", action="version", version="queuectl " + VERSION)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    words = parser.parse_args(argv, args).words
    if not words:
        raise Usage("a command is missing; see: queuectl --help")
    return words


def parse(argv):
    """(function, arguments) of a command line. Only the parsers that are needed are made."""
    args, words = argparse.Namespace(argv=None, db=None, socket=None), argv
    if not argv or argv[0].startswith("-"):
        words = parse_global(argv, args)
    name = " ".join(words[:2])
    if name not in COMMANDS:
        name = words[0]
    if name not in COMMANDS:
        parse_group(name, words[1:])
    function, arguments = COMMANDS[name]
    rest = words[len(name.split()):]
    if "--" in rest and (WHAT in arguments or LINE in arguments):
        at = rest.index("--")
        rest, args.argv = rest[:at], rest[at + 1:]
    about, examples = manual(name)
    parser = new_parser("queuectl " + name, description=about,
                        epilog="\n".join(["examples:"] + examples))
    # What it means to name no jobs, for commands where some can't be named in every way.
    parser.set_defaults(ids=(), state=None, all=False, older_than=0)
    for names, options in arguments:
        parser.add_argument(*names, **options)
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
    tell(compact({"success": False, "message": "Error: %s" % problem}))
    return status


def main(argv):
    """Run one command; the exit status. 0: done, 1: refused or failed, 2: wrong usage."""
    try:
        function, args = parse([utf8(argument) for argument in argv])
        return function(Queue(locate(args.db, args.socket), tell), args) or 0
    except Failure as error:
        return complain(argv, str(error), error.exit_code)
    except KeyboardInterrupt as interrupt:
        tell(str(interrupt) or "interrupted")
        return getattr(interrupt, "exit_code", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at exit
        return 3 if is_check(argv) else 1
    except OSError as error:
        return complain(argv, safe(str(error)), 1)


def leave(status):
    """End at once. Not sys.exit: multiprocessing would wait for workers, which may outlive their
    daemon to finish their jobs."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    code = 3 if is_check(sys.argv[1:]) else 1
    try:
        prepare_stdio()
        code = main(sys.argv[1:])
    except SystemExit as end:  # argparse, after --help and --version
        code = end.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        leave(code)  # also where there is no memory for a traceback
