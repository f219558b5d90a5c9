"""The sandbox against programs that mean harm: each ends as a failed row, and nothing of ours is touched."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from postnas.errors import UserError
from postnas.evaluate import sandbox
from postnas.evaluate.sandbox import Outcome, run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sandbox.available() is not None, reason=str(sandbox.available()))


def descendants(ancestor: int) -> set[int]:
    """Processes that have this one among their ancestors."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    found = {ancestor}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def command_lines() -> list[bytes]:
    """Of all processes, also of those that left their parents; a fork keeps the one of the launcher."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def fails(program: str, reason: str, seconds: float = 20) -> None:
    """It does not pass, for that reason, and leaves no process behind."""
    before = descendants(os.getpid())
    outcome = run(program, seconds=seconds)
    assert not outcome.passed
    assert reason in outcome.reason
    assert descendants(os.getpid()) <= before


def test_a_program_that_reaches_its_end_passes() -> None:
    program = (
        "import math, hashlib, re, collections\nassert math.gcd(12, 18) == 6\nprint('é', hashlib.md5(b'').hexdigest())"
    )
    assert run(program) == Outcome(True, "passed")


def test_it_can_use_threads_files_and_dataclasses_by_name() -> None:
    program = """
from __future__ import annotations
import dataclasses, tempfile, threading
@dataclasses.dataclass
class Point:
    x: int
found = []
thread = threading.Thread(target=lambda: found.append(Point(3)))
thread.start(); thread.join()
assert found == [Point(3)]
with tempfile.TemporaryFile() as file:
    file.write(b"x")
open("here", "w").write("y")
assert open("here").read() == "y"
assert input.__name__ == "input" and __name__ != "__main__"
"""
    assert run(program) == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError"),
        ("'\\ud800'.encode()", "failed: UnicodeEncodeError"),
        ("x = '\ud800'", "failed: UnicodeEncodeError"),
        ("raise ValueError('a\\nb' * 9999)", "failed: ValueError: a b"),
        ("input()", "failed: EOFError"),
        (
            "import sys; sys.setrecursionlimit(10**9)\ndef f(): return [*map(lambda _: f(), [0])]\nf()",
            "killed (SIGSEGV)",
        ),
        ("import os; os.abort()", "killed (SIGABRT)"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "failed: exit code 1"),
    ],
)
def test_a_program_that_fails_says_why_in_one_line(program: str, reason: str) -> None:
    outcome = run(program)
    assert not outcome.passed and outcome.reason.startswith(reason)
    assert len(outcome.reason.splitlines()) == 1 and len(outcome.reason) <= 250


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os\nif os.fork(): os._exit(0)",  # the child reaches the end
        "import os\ntry:\n    raise SystemExit\nexcept SystemExit:\n    os._exit(0)",
        "import os; os.write(3, b'0' * 32); os._exit(0)",
        "import os; os.close(3)",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_leaving_before_the_end_is_no_pass(program: str) -> None:
    assert not run(program + "\n").passed


def test_a_program_that_quits_late_still_fails_its_tests() -> None:
    fails("import atexit, os\natexit.register(lambda: os._exit(0))\nassert False, 'late'", "AssertionError: late")


def test_an_endless_loop_ends_at_the_wall_clock() -> None:
    start = time.monotonic()
    fails("while True: pass", "timed out", seconds=0.5)
    fails("import time, signal\nsignal.pthread_sigmask(0, range(1, 65))\ntime.sleep(99)", "timed out", seconds=0.5)
    assert time.monotonic() - start < 20


def test_a_fork_bomb_stays_small_and_ends() -> None:
    fails("import os\nwhile True:\n    os.fork()", "BlockingIOError")
    fails("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timed out", seconds=0.5)


def test_processes_and_threads_are_counted() -> None:
    program = "import threading, time\nfor _ in range({}):\n    threading.Thread(target=time.sleep, args=(9,)).start()"
    assert run(program.format(3), processes=4).passed
    assert "start new thread" in run(program.format(4), processes=4).reason


@pytest.mark.parametrize(
    "program",
    [
        "bytearray(10 << 30)",
        "held = []\nwhile True: held.append(bytearray(1 << 24))",
        "import mmap; mmap.mmap(-1, 10 << 30)",
        "import os\ndescriptor = os.memfd_create('x')",
        "print('x' * (10 << 30))",
    ],
)
def test_memory_has_bounds(program: str) -> None:
    outcome = run(program, seconds=20, memory_bytes=256 << 20)
    assert "MemoryError" in outcome.reason or "Error: [Errno" in outcome.reason


def test_memory_that_no_limit_counts_is_refused() -> None:
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{} == -1 and ctypes.get_errno() == 1"
    )
    for call in ("shmget(0, ctypes.c_size_t(4096), 0o1600)", "msgget(0, 0o1600)", "semget(0, 1, 0o1600)"):
        assert run(program.format(call)).passed


def test_the_disk_has_bounds() -> None:
    fails("open('big', 'wb').write(bytes(64 << 20))", "File too large")
    fails("for n in range(99): open(f'file{n}', 'wb').write(bytes(1 << 20))", "No space left")
    fails("for n in range(9999): open(f'file{n}', 'w').close()", "No space left")


def test_a_gigabyte_of_output_goes_nowhere() -> None:
    program = """
import os
for _ in range(1 << 14):
    assert os.write(1, bytes(1 << 16)) == 1 << 16
print("x" * 10**8)
assert False, "written"
"""
    fails(program, "AssertionError: written")


@pytest.mark.parametrize(
    "folder", ["/", "/tmp", "/root", "/home", "/work", "/etc", "/dev/shm", "/usr", "/lib", "/var/tmp"]
)
def test_nothing_is_written_outside_the_box(folder: str) -> None:
    name = f"postnas-sandbox-{os.getpid()}"
    fails(f"open('{folder}/{name}', 'w')", "Error: [Errno")
    assert not Path(folder, name).exists()


def test_python_cannot_be_changed() -> None:
    fails("import os; os.chmod(os.__file__, 0o777)", "Read-only file system")
    fails("import os; os.remove(os.__file__)", "Read-only file system")
    assert Path(os.__file__).exists()


def test_files_of_ours_are_not_there(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("ours")
    for path in (
        secret,
        ROOT / "pyproject.toml",
        "/etc/passwd",
        "/root/.bashrc",
        "/proc/1/environ",
        f"/proc/{os.getpid()}",
    ):
        fails(f"open({str(path)!r})", "No such file or directory")
    program = f"import os\nassert os.listdir('.') == []\nos.symlink({str(secret)!r}, 'link')\nos.symlink('/', 'top')\n"
    fails(program + "open('link')", "No such file or directory")
    fails(program + f"open('top/../..{secret}')", "No such file or directory")
    fails("import os\nos.mkdir('a')\nos.chroot('a')", "Operation not permitted")


def test_nothing_of_ours_is_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTNAS_SECRET", "ours")
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        program = """
import os, sys, stat
assert not os.environ, os.environ
null = os.fstat(0)
assert stat.S_ISCHR(null.st_mode) and null == os.fstat(1) == os.fstat(2)
assert stat.S_ISFIFO(os.fstat(3).st_mode)
for descriptor in range(4, 64):
    try: os.fstat(descriptor)
    except OSError: continue
    raise AssertionError(descriptor)
assert os.getgroups() == [] or set(os.getgroups()) == {65534}, os.getgroups()
assert os.uname().nodename == "box" and os.getcwd() == "/box"
"""
        assert run(program) == Outcome(True, "passed")


def test_there_is_no_network(tmp_path: Path) -> None:
    refused = "PermissionError: [Errno 1]"
    path = str(tmp_path / "ours.sock")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen()
        fails(f"import socket; socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 5)", refused)
        fails("import socket; socket.create_connection(('8.8.8.8', 53), 5)", refused)
        fails(f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})", refused)
        fails("import socket; socket.socket(socket.AF_VSOCK).connect((2, 52))", refused)
        fails("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", refused)


def test_our_processes_cannot_be_reached() -> None:
    fails(f"import os; os.kill({os.getpid()}, 9)", "No such process")
    fails("import os\ntry: os.kill(1, 9)\nexcept PermissionError: pass\nassert os.getppid() == 0, 'alive'", "alive")
    fails("import os\nfor number in range(1, 65): os.kill(1, number)", "", seconds=2)
    fails("import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(-1, 15); assert False, 'alive'", "")
    fails("import ctypes; assert ctypes.CDLL(None, use_errno=True).ptrace(16, 1, 0, 0) == 0, ctypes.get_errno()", ": 1")


def test_no_rights_can_be_gained() -> None:
    fails("import os; os.setuid(0)", "Operation not permitted")
    fails("import os; os.setgid(0)", "Operation not permitted")
    fails("import os; os.setgroups([0])", "Operation not permitted")
    fails("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "ValueError")
    program = """
import ctypes, os
from ctypes import c_long, c_size_t
libc = ctypes.CDLL(None, use_errno=True)
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
assert libc.CALL == -1, "it could"
assert ctypes.get_errno() == 1
"""
    for call in (
        "unshare(0x10000000)",
        "setns(0, 0)",
        "syscall(c_long(clone), c_long(0x10000011), c_long(0), c_long(0), c_long(0), c_long(0))",
        "mount(b'none', b'/box', b'tmpfs', 0, None)",
        "umount2(b'/box', 2)",
        "sethostname(b'x', c_size_t(1))",
    ):
        assert run(program.replace("CALL", call)) == Outcome(True, "passed"), call
    no_new_privs, has_filter = "prctl(39, 0, 0, 0, 0) == 1", "prctl(21, 0, 0, 0, 0) == 2"
    assert run(f"import ctypes\nassert ctypes.CDLL(None).{no_new_privs}\nassert ctypes.CDLL(None).{has_filter}").passed


def test_no_daemon_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"jail-{os.getpid()}.py"  # so that other runs on this machine do not count
    shutil.copy(sandbox.JAIL, tmp_path / mark)
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / mark)
    program = """
import os, signal, time
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(300)
    os._exit(0)
time.sleep(0.2)
"""
    before = descendants(os.getpid())
    assert run(program).passed
    assert descendants(os.getpid()) <= before
    assert not any(mark.encode() in line for line in command_lines())


def test_a_killed_caller_takes_its_program_along() -> None:
    """Nothing that the caller could do by itself: it is killed with a signal that it cannot catch."""
    text = "from postnas.evaluate.sandbox import run; run('while True: pass', seconds=300)"
    caller = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT)
    try:
        until(lambda: len(descendants(caller.pid)) >= 3)  # launcher, init, program
    finally:
        tree = descendants(caller.pid)
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    until(lambda: not any(Path(f"/proc/{process}").exists() for process in tree))


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_another_user_is_shut_in_too() -> None:
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not Path(python).exists():
        pytest.skip("needs root, to become another user, and a Python that this user can read")
    text = (
        "import sys; sys.version_info >= (3, 11) or sys.exit('old')\n"
        "from postnas.evaluate import sandbox\nprint(sandbox.available(), sandbox.run('assert 1').reason)"
    )
    done = subprocess.run(
        [python, "-B", "-c", text], cwd="/", user=65534, group=65534, extra_groups=[], text=True, capture_output=True,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if "old" in done.stderr or "No module named 'postnas'" in done.stderr:
        pytest.skip("the system's Python is too old, or that user may not read this folder")
    assert done.stdout.strip() == "None passed", done.stderr


def test_what_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.available.cache_clear()
    monkeypatch.setattr(sandbox.sys, "platform", "plan9")
    try:
        with pytest.raises(
            UserError, match="--allow-code: the sandbox needs Linux, and this is plan9; run code tasks else"
        ):
            run("1")
    finally:
        sandbox.available.cache_clear()


def test_a_system_that_refuses_namespaces_is_told_from_one_that_grants_them() -> None:
    """Inside namespaces that allow no more of them, the sandbox cannot be had, and nothing runs."""
    text = (
        "from postnas.evaluate import sandbox\nfrom postnas.errors import UserError\n"
        "try:\n    print(sandbox.run('1'))\nexcept UserError as error:\n    print(error)"
    )
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", shell, sys.executable, text]
    try:
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    assert done.stdout.startswith("--allow-code: this system refuses the sandbox (new namespaces: "), done
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("hole", ["socket", "unshare", "memory", "processes"])
def test_the_probe_sees_what_does_not_hold(hole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jail with one wall taken out is found unfit."""
    text = sandbox.JAIL.read_text()
    walls = {
        "socket": ('    "socket": (41, 198),\n', ""),
        "unshare": ("    check(LIBC.capset(", "    len(("),
        "memory": ("resource.RLIMIT_AS: job", "resource.RLIMIT_RSS: job"),
        "processes": ("resource.RLIMIT_NPROC: job", "resource.RLIMIT_RSS: job"),
    }
    wall, gap = walls[hole]
    assert text.count(wall) == 1
    (tmp_path / "jail.py").write_text(text.replace(wall, gap))
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "jail.py")
    sandbox.available.cache_clear()
    try:
        reason = sandbox.available()
    finally:
        sandbox.available.cache_clear()
    assert reason is not None and "does not hold here" in reason
