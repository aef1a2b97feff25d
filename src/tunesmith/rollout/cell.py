"""The inside of a sandbox: a script of its own, which knows nothing of the rest of the house and imports the standard library alone.

Read from standard input: what to run, as JSON. Written to standard output: the key and the number of each test that passed.
Three processes: the first makes the namespaces and waits; the second is their first process, with whose end the kernel ends all
others in them; the third gives up every right and runs the program.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import runpy
import signal
import sys
import warnings
from contextlib import redirect_stdout, suppress
from typing import Any, NoReturn

_NEW = {"mounts": 0x00020000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
_REC, _PRIVATE = 16384, 1 << 18
_NOSUID, _NODEV = 2, 4
_RDONLY, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_SETATTR = 1, -100, 0x8000, 442
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _NO_NEW_PRIVS = 1, 4, 8, 38
_DAC_READ_SEARCH = 1 << 2
_ALONE = 2_000_000_000
"""Users from this number on have no name: a program run by root gets one of them for itself, so that its processes can be counted."""


def main() -> NoReturn:
    """Read a task from standard input, shut this process in as it says, and run its tests."""
    task = json.loads(sys.stdin.buffer.read())
    try:
        if task["limits"]["isolation"] == "full":
            _enter(task["limits"])
        _limit(task["limits"])
    except OSError as cause:
        os.write(1, f"cell {cause.strerror or cause}\n".encode())
        os._exit(1)
    _run(task["key"], task["tests"], watched=task["limits"]["isolation"] != "full")
    os._exit(0)


def _enter(limits: dict[str, Any]) -> None:
    """Go on as the third process, in namespaces of its own and without rights."""
    if not sys.platform.startswith("linux"):
        raise OSError(0, "namespaces are a thing of Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    root, user, group = os.geteuid() == 0, os.getuid(), os.getgid()
    apart = sum(bits for name, bits in _NEW.items() if name != "user")
    if root and libc.unshare(apart) != 0:  # root without the right to it, as in containers
        _become(libc, _ALONE + os.getpid())
        root, user, group = False, os.getuid(), os.getgid()
    if not root:
        _must(libc.unshare(apart | _NEW["user"]), "the kernel grants no namespaces")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _dies_with_parent(libc)
    _wait_in_parent()
    _dies_with_parent(libc)
    _close_the_house(libc, limits["megabytes"])
    libc.prctl(_DUMPABLE, 0, 0, 0, 0)
    _wait_in_parent()
    if root:
        libc.prctl(_KEEPCAPS, 1, 0, 0, 0)  # the interpreter's own files may be root's alone: it keeps the right to read
        _become(libc, _ALONE + os.getppid() + int.from_bytes(os.urandom(3), "little"))
    _give_up(libc, _DAC_READ_SEARCH if root else 0)


def _must(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what} ({os.strerror(code)})")


def _become(libc: Any, user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _dies_with_parent(libc: Any) -> None:
    libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _wait_in_parent() -> None:
    """Fork; the parent waits for the child, then ends, and the kernel ends what the namespaces still hold."""
    child = os.fork()
    if child == 0:
        return
    os.close(0)
    while True:
        ended, status = os.wait()
        if ended == child:
            os._exit(os.waitstatus_to_exitcode(status) & 255)


def _close_the_house(libc: Any, megabytes: int) -> None:
    """Everything is read only but this folder, which is in memory, and /proc shows the processes in here."""
    here = os.getcwd()
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
    _must(libc.mount(None, b"/", None, _REC | _PRIVATE, None), "mounts cannot be made private")
    attributes = (ctypes.c_uint64 * 4)(_RDONLY, 0, 0, 0)
    found = libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    _must(found, "the file system cannot be made read only")
    options = f"size={megabytes}m,mode=777,nr_inodes=4096".encode()
    _must(libc.mount(b"cell", here.encode(), b"tmpfs", _NOSUID | _NODEV, options), "no folder in memory can be made")
    libc.mount(b"proc", b"/proc", b"proc", _NOSUID | _NODEV, None)  # some containers refuse it, and nothing hangs on it
    os.chdir(here)


def _give_up(libc: Any, kept: int) -> None:
    """No capabilities but those kept, none to be gained by running another program, and nobody may trace this one."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    _must(libc.capset(header, rights), "rights cannot be given up")
    _must(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "rights could be gained again")


def _limit(limits: dict[str, Any]) -> None:
    memory, seconds = limits["megabytes"] << 20, int(limits["seconds"]) + 1
    wanted = [("CPU", seconds), ("FSIZE", memory), ("NOFILE", 64), ("CORE", 0), ("DATA", memory), ("AS", memory)]
    if limits["isolation"] == "full":
        others = 0 if os.getuid() >= _ALONE else 2  # the two processes that wait are counted with those of the same user
        wanted.append(("NPROC", limits["processes"] + others))
    for name, value in wanted:
        with suppress(ValueError, OSError):  # macOS has no limit on memory
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


_REFUSED = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill"),
    *("socket.", "subprocess.", "ctypes.", "pty.", "signal."),
)
_MOVING = frozenset(
    f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod", "chown", "utime", "setxattr")
)


def _watch() -> None:
    """Refuse what a program has no business with, as far as Python itself is asked."""
    here = os.path.realpath(os.getcwd())

    def inside(path: Any) -> bool:
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(here + os.sep)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if event.startswith(_REFUSED) or ((writes or event in _MOVING) and not inside(args[0])):
            raise PermissionError(f"{event} is not for programs in here")

    sys.addaudithook(hook)


def _run(key: str, tests: list[dict[str, Any]], *, watched: bool) -> None:
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    warnings.simplefilter("ignore")
    if watched:
        _watch()
    for number, test in enumerate(tests):
        if _passes(test):
            os.write(report, f"\n{key} {number}\n".encode())


def _passes(test: dict[str, Any]) -> bool:
    with open("program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(test["program"])
    printed = io.StringIO()
    sys.stdin = io.StringIO(test["input"])
    sys.argv = ["program.py"]
    try:
        with redirect_stdout(printed):
            runpy.run_path("program.py", run_name="__main__")
    except SystemExit as cause:
        if test["output"] is None or cause.code not in (None, 0):  # a program that ends itself has not come to its tests
            return False
    except BaseException:
        return False
    return test["output"] is None or _lines(printed.getvalue()) == _lines(test["output"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


if __name__ == "__main__":
    main()
