"""The child of sandbox.py: shuts itself in, runs one program there, and says how it ended. Never imported.

It runs as `python -P -s -S jail.py` and knows the standard library only. Three processes:

- the launcher makes the namespaces, waits, and kills at the wall-clock limit;
- init, process 1 of the new pid namespace, builds the file system; its end takes all others with it;
- the program, forked from init without exec, so that no executable has to be in its file system.

stdin: the job, one JSON object (`sandbox.run` writes it). stdout: one JSON line a finding, the first counts:
{"refused": why}, {"timed_out": true} or {"status": wait status}. The program never holds this pipe.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)

NAMESPACES = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000}
NAMESPACES |= {"network": 0x40000000}
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18  # mount flags
READ_ONLY = 1 | NOSUID | NODEV  # mount_setattr counts these three alike
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, NO_NEW_PRIVS, CAP_AMBIENT = 1, 4, 22, 24, 38, 47  # prctl options

# Where namespaces, limits and modes leave a door: memory that no limit counts (System V, memfd, keys), a
# nested user namespace, where a program has all capabilities again, other processes' memory, and sockets,
# which no network namespace hides when they are AF_VSOCK. Number on x86_64, number on aarch64.
DENIED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241),
}
MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
PIVOT_ROOT, CLONE, CLONE3, MOUNT_SETATTR = (155, 41), (56, 220), (435, 435), (442, 442)

ROOT = "/tmp"  # where the new root is mounted before it becomes /; any folder that is always there
BOX = "/box"  # the program's working directory, the one place it can write
PROGRAM_ID = 1000  # the program's user and group as it sees them
SPARE_ID = 2_000_000_000  # what these are outside, where we are root: a user that owns nothing
VERDICT = 3  # the program's file descriptor for its end marker


def check(result: int, what: str) -> None:
    """Raises OSError, with `what` as its file name, where a call of libc gave -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def prctl(option: int, value: int, what: str, address: int = 0) -> None:
    check(LIBC.prctl(option, *map(ctypes.c_ulong, (value, address, 0, 0))), what)


def syscall(numbers: tuple[int, int], what: str, *arguments: Any) -> None:
    """A call that libc may not have."""
    number = numbers[MACHINES.index(os.uname().machine)]
    whole = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    check(LIBC.syscall(ctypes.c_long(number), *whole), what)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, options)]
    check(LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount on {target}")


def report(**finding: Any) -> None:
    os.write(1, (json.dumps(finding) + "\n").encode())


def fork(work: Callable[[], int]) -> int:
    """The id of a child that does `work` and leaves with its code. What the system refuses is reported."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = work()
    except OSError as error:
        report(refused=f"{error.filename}: {error.strerror}")
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
    finally:
        os._exit(code)


# The launcher


def spare_id(table: str) -> int | None:
    """An id for the program that `table` (a uid_map) lets root hand out; None where there is but one."""
    with open(table) as lines:
        start, _, count = max((tuple(map(int, line.split())) for line in lines), key=lambda extent: extent[2])
    return min(start + count - 1, SPARE_ID) if count > 1 else None


def launch(job: dict[str, Any]) -> None:
    machine = os.uname().machine
    if machine not in MACHINES or ctypes.sizeof(ctypes.c_void_p) != 8:
        report(refused=f"it knows {' and '.join(MACHINES)} with 64 bits, and this is {machine}")
        return
    prctl(PDEATHSIG, signal.SIGKILL, "death signal")
    if os.getppid() != job["parent"]:  # it died before the signal was asked for
        return
    user, group = (spare_id(f"/proc/self/{kind}_map") for kind in ("uid", "gid"))
    as_root = os.geteuid() == 0 and user is not None and group is not None
    if as_root:
        os.setgroups([])
    maps = {"uid_map": f"{PROGRAM_ID} {os.geteuid()} 1", "gid_map": f"{PROGRAM_ID} {os.getegid()} 1"}
    if as_root:  # init stays root in the namespace, which owns nothing outside; the program does not
        maps = {"uid_map": f"0 0 1\n{PROGRAM_ID} {user} 1", "gid_map": f"0 {os.getegid()} 1\n{PROGRAM_ID} {group} 1"}
    enter(maps)
    myself = os.pidfd_open(os.getpid())
    init = fork(lambda: initialise(job, myself, as_root))
    os.close(job["verdict"])
    if not select.select([os.pidfd_open(init)], [], [], job["seconds"])[0]:
        report(timed_out=True)
        os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)  # comes back only when nothing is left in the pid namespace


def enter(maps: dict[str, str]) -> None:
    """Into new namespaces. A helper stays outside for a moment: only there root may map two ids."""
    launcher = os.getpid()
    ready, go = os.pipe()

    def write_maps() -> int:
        os.close(go)
        if os.read(ready, 1):
            for name, text in {"setgroups": "deny", **maps}.items():
                with open(f"/proc/{launcher}/{name}", "w") as table:
                    try:
                        table.write(text)
                        table.flush()
                    except OSError as error:
                        raise OSError(error.errno, error.strerror, f"writing {name}") from error
        return 0

    helper = fork(write_maps)
    check(LIBC.unshare(sum(NAMESPACES.values())), "new namespaces")
    os.write(go, b".")
    if os.waitpid(helper, 0)[1]:
        os._exit(1)  # the helper has said why
    os.close(ready)
    os.close(go)


# Init


def initialise(job: dict[str, Any], launcher: int, as_root: bool) -> int:
    prctl(PDEATHSIG, signal.SIGKILL, "death signal")
    if select.select([launcher], [], [], 0)[0]:  # it died before the signal was asked for
        return 1
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory ends, the program goes first
    name = b"box"
    check(LIBC.sethostname(name, ctypes.c_size_t(len(name))), "host name")
    null = os.open(os.devnull, os.O_RDWR)
    build(job["disk"])
    prctl(DUMPABLE, 0, "dumpable")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a signal without a handler does not reach process 1
    program = fork(lambda: confined(job, null, as_root))
    os.close(job["verdict"])
    while True:
        child, status = os.wait()
        if child == program:
            report(status=status)
            return 0


def libraries() -> list[str]:
    """The folders that the program sees: this Python's library and the system's shared libraries."""
    folders = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib")}
    folders.add(os.path.join(sys.base_exec_prefix, sys.platlibdir))
    found = sorted(folder for folder in folders if os.path.isdir(folder))
    return [folder for folder in found if not any(folder.startswith(other + "/") for other in found)]


def build(disk: int) -> None:
    """A file system of libraries, read-only, and the box; ours is then gone from this namespace."""
    mount("none", "/", None, REC | PRIVATE)
    # Opened before ROOT is covered, since they may lie in it.
    places = [(path, None if os.path.islink(path) else os.open(path, os.O_PATH)) for path in libraries()]
    mount("none", ROOT, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path, place in places:
        os.makedirs(ROOT + os.path.dirname(path), exist_ok=True)
        if place is None:
            os.symlink(os.readlink(path), ROOT + path)
        else:
            os.mkdir(ROOT + path)
            mount(f"/proc/self/fd/{place}", ROOT + path, None, BIND | REC)
    os.mkdir(ROOT + BOX)
    os.chdir(ROOT)
    here, wanted = -100, struct.pack("4Q", READ_ONLY, 0, 0, 0)
    recursive = 0x8000
    syscall(MOUNT_SETATTR, "read-only mounts", here, b".", recursive, wanted, len(wanted))
    mount("none", ROOT + BOX, "tmpfs", NOSUID | NODEV | NOEXEC, f"size={disk},nr_inodes=1024,mode=777")
    syscall(PIVOT_ROOT, "pivot_root", b".", b".")
    detach = 2
    check(LIBC.umount2(b".", detach), "leaving the old root")
    os.chdir(BOX)


# The program


def confined(job: dict[str, Any], null: int, as_root: bool) -> int:
    limit(job, as_root)
    renounce()
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if job["verdict"] != VERDICT:
        os.dup2(job["verdict"], VERDICT)
    os.closerange(VERDICT + 1, 1 << 20)
    execute(job["program"], job["token"])


def limit(job: dict[str, Any], as_root: bool) -> None:
    """Every limit is of one process, but NPROC, which counts the program's user in this namespace."""
    others = 0 if as_root else 2  # launcher and init, where they are the same user
    limits = {
        resource.RLIMIT_NPROC: job["processes"] + others,
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_CPU: math.ceil(job["seconds"]) + 1,
        resource.RLIMIT_FSIZE: job["disk"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def renounce() -> None:
    """No capability, not root, nothing to be gained by exec, and the calls of DENIED refused."""
    clear_ambient = 4
    prctl(CAP_AMBIENT, clear_ambient, "ambient capabilities")
    for capability in range(64):
        if LIBC.prctl(CAPBSET_DROP, *map(ctypes.c_ulong, (capability, 0, 0, 0))):
            break  # the kernel's last one was the one before
    os.setresgid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
    os.setresuid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
    version_3 = 0x20080522
    check(LIBC.capset(struct.pack("Ii", version_3, 0), bytes(24)), "capabilities")
    prctl(DUMPABLE, 0, "dumpable")
    prctl(NO_NEW_PRIVS, 1, "no_new_privs")
    text = call_filter()
    code = ctypes.create_string_buffer(text, len(text))
    header = ctypes.create_string_buffer(struct.pack("HL", len(text) // 8, ctypes.addressof(code)))
    by_filter = 2
    prctl(SECCOMP, by_filter, "seccomp filter", ctypes.addressof(header))


def call_filter() -> bytes:
    """A seccomp filter, 8 bytes an instruction: the calls of DENIED, and clone into namespaces, give EPERM."""
    load, equal, least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    at_number, at_architecture, at_first_argument = 0, 4, 16
    not_permitted, unknown = 1, 38  # EPERM, ENOSYS
    machine = MACHINES.index(os.uname().machine)

    def word(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
        return struct.pack("HBBI", code, skip_if, skip_else, value)

    def answer(test: int, value: int, result: int) -> bytes:
        return word(test, value, 0, 1) + word(leave, result)

    text = word(load, at_architecture) + word(equal, AUDIT_ARCH[machine], 1, 0) + word(leave, kill)
    text += word(load, at_number)
    if machine == 0:
        text += answer(least, 0x40000000, refuse | not_permitted)  # the same calls again, under the x32 numbers
    text += b"".join(answer(equal, numbers[machine], refuse | not_permitted) for numbers in DENIED.values())
    text += answer(equal, CLONE3[machine], refuse | unknown)  # its flags lie in memory; libc then takes clone
    text += word(equal, CLONE[machine], 1, 0) + word(leave, allow)
    text += word(load, at_first_argument)
    return text + answer(any_bit, sum(NAMESPACES.values()), refuse | not_permitted) + word(leave, allow)


def execute(text: str, token: str) -> NoReturn:
    """Runs the program. Only where its last line was reached the token goes to VERDICT, else why not.

    The names that are needed afterwards are taken before, and a fork of the program says nothing.
    """
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = ["program"]
    write, leave, process = os.write, os._exit, os.getpid
    myself = process()
    said, code = token, 0
    try:
        exec(compile(text, "program", "exec"), module.__dict__)
    except BaseException as error:
        said, code = f"{type(error).__name__}: {error}".removesuffix(": "), 1
    if process() == myself:
        write(VERDICT, said.encode("utf-8", "replace")[:2000])
    leave(code)


if __name__ == "__main__":
    given = json.load(sys.stdin)
    os.environ.clear()
    try:
        launch(given)
    except OSError as error:
        report(refused=f"{error.filename}: {error.strerror}")
