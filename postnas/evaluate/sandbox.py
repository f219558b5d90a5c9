"""Python that a model wrote, run where it can do no harm: a child without files, network, rights or time."""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postnas.errors import UserError
from postnas.sources.formats import short

JAIL = Path(__file__).with_name("jail.py")
GRACE = 60  # seconds beyond the limit before we end the launcher itself: it starts a Python on a busy machine


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """Whether its last line was reached and it ended well."""
    reason: str
    """One line: passed, timed out, killed (SIGNAL), not run: and why, failed: and what it raised or its exit code."""


PROBE = """
import ctypes, os, socket

def refused(what, action):
    try:
        action()
    except (OSError, MemoryError):
        return
    raise AssertionError(what)

def bomb():
    for _ in range(4):
        if os.fork() == 0:
            os.kill(os.getpid(), 19)

def capabilities():
    held = ctypes.create_string_buffer(24)
    ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), held)
    return any(held.raw)

for folder in ("/", "/usr/lib", os.path.dirname(os.__file__)):
    refused(f"{folder} can be written", lambda: open(f"{folder}/probe", "w"))
for path in ("/proc", "/etc", "/dev", "/sys", "/run", "/var"):
    refused(f"{path} can be seen", lambda: os.stat(path))
open("probe", "w").write("x")
refused("the disk has no bounds", lambda: open("probe", "wb").write(bytes(2 << 20)))
refused("memory has no bounds", lambda: bytearray(256 << 20))
refused("sockets can be made", lambda: socket.socket())
refused("it can become root", lambda: os.setuid(0))
refused("it can change its root", lambda: os.chroot("."))
assert 0 not in os.getresuid() + os.getresgid(), "it is root"
assert not capabilities(), "it holds capabilities"
assert os.getppid() == 1, "it sees our processes"
refused("processes are not counted", bomb)
"""
"""What a program must not be able to do; each finding stands as what an AssertionError says."""


@functools.cache
def available() -> str | None:
    """None where the sandbox shuts in all that it should, else why not, in one line. Tried once, really."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, and this is {sys.platform}"
    try:
        outcome = _run(PROBE, seconds=20, memory_bytes=128 << 20, processes=3, disk_bytes=1 << 20)
    except UserError as error:
        return str(error)
    return None if outcome.passed else f"the sandbox does not hold here ({outcome.reason})"


def run(
    program: str, *, seconds: float = 5, memory_bytes: int = 1 << 30, processes: int = 16, disk_bytes: int = 16 << 20
) -> Outcome:
    """Run Python source with the standard library in a sandbox and say how it ended.

    The program has user, network, pid, mount, ipc and uts namespaces of its own, a file system of
    Python's and the system's libraries, read-only, and an empty folder in memory as the one place to
    write. It has no capability, no socket, no /proc, no environment; what it prints is dropped. Everything
    it started is gone when this returns, or a moment after this is left by an exception.

    seconds: wall clock, from the program's start; also bounds the CPU time of each process.
    memory_bytes: address space of each process. processes: how many at a time, threads included.
    disk_bytes: of all files together. Memory in all is at most processes * memory_bytes + disk_bytes.

    Passed means that the end of the source was reached: an exit before it is a failure, whatever its
    code. A program that sets out to forge this can, since it runs beside its own tests; it gains
    nothing else. Hash seeds are fixed; the random module is not. A launcher that fails, as on a machine without
    a process to spare, is a failure of the program, with its reason. Raises UserError where the sandbox cannot be had
    (`available` says why): a program never runs with less.
    """
    if reason := available():
        raise UserError(f"--allow-code: {reason}; run code tasks elsewhere")
    try:
        return _run(program, seconds=seconds, memory_bytes=memory_bytes, processes=processes, disk_bytes=disk_bytes)
    except (UserError, OSError) as error:  # it held when it was tried: one program's loss, not that of all others
        return Outcome(False, f"not run: {short(error)}")


def _run(program: str, *, seconds: float, memory_bytes: int, processes: int, disk_bytes: int) -> Outcome:
    token = secrets.token_hex(16)
    verdict, its_end = os.pipe()
    job = {"program": program, "token": token, "verdict": its_end, "parent": os.getpid(), "seconds": seconds}
    job |= {"memory": memory_bytes, "processes": processes, "disk": disk_bytes}
    command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(JAIL)]
    # Some Pythons do not start without the path; the launcher clears all of it before the program runs.
    environment = {"PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    pipe = subprocess.PIPE
    with open(verdict, "rb", buffering=0) as answer:
        with open(its_end, "wb", buffering=0):
            launcher = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=environment,
                cwd="/",
                pass_fds=(its_end,),
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
        with launcher:
            try:
                found, errors = launcher.communicate(json.dumps(job).encode(), seconds + GRACE)
            except subprocess.TimeoutExpired:
                return Outcome(False, "timed out")
            finally:
                launcher.kill()  # nothing, where it has ended; else init dies with it
        report = json.loads(found.splitlines()[0]) if found else {}
        if errors and not report:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            return Outcome(False, f"not run: the sandbox's launcher failed ({short(' '.join(last))})")
        said = answer.read(4096).decode("utf-8", "replace")
    return _outcome(report, said, token)


def _outcome(report: dict[str, Any], said: str, token: str) -> Outcome:
    """From the launcher's finding, which can be trusted, and what the program said, which cannot."""
    if "refused" in report:
        raise UserError(f"this system refuses the sandbox ({report['refused']})")
    if "timed_out" in report:
        return Outcome(False, "timed out")
    if "status" not in report:
        return Outcome(False, "killed")
    code = os.waitstatus_to_exitcode(report["status"])
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return Outcome(False, f"killed ({name})")
    if code == 0:
        return Outcome(True, "passed") if said == token else Outcome(False, "failed: left before its end")
    line = "".join(c if c.isprintable() else " " for c in said)[:200].strip()
    return Outcome(False, f"failed: {line or f'exit code {code}'}")
