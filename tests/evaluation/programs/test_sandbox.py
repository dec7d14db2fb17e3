"""Programs that mean harm, or have no end: each is contained, and nothing of it is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evomerge.errors import TaskError
from evomerge.evaluation.programs import confined, sandbox
from evomerge.evaluation.programs.sandbox import Limits, not_forbidden, program_notes, run_program
from tests.frame import environment

SHORT = Limits(seconds=0.5)
PATIENT = Limits(seconds=60, memory=2**28)  # on a busy machine, what is right takes its time


def processes() -> set[str]:
    """The processes that this one has started and that are there still, and theirs."""
    return {pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folders of programs are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import os; assert not os.environ; assert os.listdir() == []",
        "with open('a', 'w') as file: file.write('x')\nassert open('a').read() == 'x'",
        "import numpy as np\nassert np.linalg.norm(np.ones((4, 4)) @ np.ones((4, 4))) == 16",
        "import asyncio\nasync def one(): return 1\nassert asyncio.run(one()) == 1",
        "import os; print('to nobody'); os.write(2, b'nor this')",
        "if __name__ == '__main__': raise ValueError('as code_eval, which runs no such block')",
        "import sys; assert sys.argv == [''] and not sys.stdin.read()",
    ],
)
def test_what_is_right_passes(program: str) -> None:
    assert run_program(program, Limits(seconds=60))


@pytest.mark.parametrize(
    "program",
    [
        *("assert False", "def (", "a\0b", "x = '\ud800'\nassert not x", "raise SystemExit(0)", "exit()", "input()"),
        *("import os; os._exit(0)", "import sys; sys.exit()", "import os; os.abort()"),
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    ],
)
def test_what_does_not_come_to_its_end_fails(program: str) -> None:
    assert not run_program(program, SHORT)


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "deaf": "import signal, time\nfor n in (1, 2, 3, 13, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile 1: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import _thread\nwhile 1:\n    try: _thread.start_new_thread(input, ())\n    except RuntimeError: 0",
}


@pytest.mark.parametrize("taken", ["_seccomp", "_landlock", "_mount_small"])
def test_one_layer_that_is_missing_is_said_and_the_others_are_there(
    taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system that has no such thing."""
    anyway = {*not_forbidden()}
    here = str(Path(confined.__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import confined; confined.{taken} = lambda *_: False"
    monkeypatch.setattr(sandbox, "_COMMAND", (*sandbox._COMMAND[:-1], "-c", f"{code}; confined.main()"))
    passed, lacking = sandbox._run("import os; os.listdir()", Limits())
    expected = {
        "_seccomp": {confined.SIGNALS} | ({confined.PROCESSES} if os.geteuid() == 0 else set()),
        "_landlock": {confined.WRITES, confined.READS},
        "_mount_small": {confined.DISK},
    }
    assert passed
    assert {*lacking} == anyway | expected[taken]
    assert not sandbox._run("bytearray(10 * 2**30)", Limits())[0]


@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_what_has_no_end_is_ended(program: str, folders: Path) -> None:
    before, began = processes(), time.monotonic()
    assert not run_program(program, SHORT)
    assert time.monotonic() - began < 20  # the second that it has, and a start on a busy machine
    assert processes() <= before  # what other tests have started goes on
    assert [*folders.iterdir()] == []


REFUSED = {
    "10 GB": (confined.MEMORY, "bytearray(10 * 2**30)"),
    "many small ones": (confined.MEMORY, "x = []\nwhile True: x.append(bytearray(2**24))"),
    "more memory": (confined.MEMORY, "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))"),
    "memory of a file": (confined.PROCESSES, "import os; os.memfd_create('x')"),
    "a large file": (None, "with open('a', 'wb') as file: file.write(bytes(2**25))"),
    "many files": (confined.DISK, "for k in range(64): open(str(k), 'wb').write(bytes(2**23))"),
    "a process": (confined.PROCESSES, "import os\nif not os.fork(): os._exit(0)"),
    "a command": (confined.PROCESSES, "import subprocess; subprocess.run(['true'])"),
    "another program": (confined.PROCESSES, "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'pass'])"),
    "a thread": (confined.PROCESSES, "import threading; threading.Thread(target=print).start()"),
    "a session": (confined.PROCESSES, "import os; os.setsid()"),
    "a signal": (confined.SIGNALS, "import os; os.kill(os.getppid(), 0)"),
    "a group's signal": (confined.SIGNALS, "import os; os.killpg(os.getpgid(os.getppid()), 0)"),
    "a parent's limits": (
        confined.SIGNALS,
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))",
    ),
    "a parent's priority": (confined.SIGNALS, "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"),
    "a parent's environment": (confined.READS, "import os; open(f'/proc/{os.getppid()}/environ').read()"),
    "a socket": (confined.NETWORK, "import socket; socket.socket()"),
    "a local socket": (confined.NETWORK, "import socket; socket.socket(socket.AF_UNIX)"),
}
"""What is tried, and which of what may be forbidden it comes under."""


@pytest.mark.parametrize(("need", "act"), REFUSED.values(), ids=REFUSED)
def test_what_is_forbidden_is_refused(need: str | None, act: str, folders: Path) -> None:
    """The program goes on from there: it is an error, as of any call that fails."""
    if need in not_forbidden():
        pytest.skip(f"this system does not forbid {need}")
    before = processes()
    assert not run_program(act, PATIENT)
    refused = "(OSError, MemoryError, RuntimeError, ValueError)"
    assert run_program(f"try: exec({act!r}, {{}})\nexcept {refused}: pass\nelse: raise SystemExit", PATIENT)
    assert processes() <= before  # what other tests have started goes on
    assert [*folders.iterdir()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_program_does_not_outlive_whoever_waits_for_it() -> None:
    code = (
        "from evomerge.evaluation.programs.sandbox import Limits, run_program\n"
        "run_program('import os, time; os.write(3, b\\'0\\'); time.sleep(60)', Limits(seconds=60))"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment()) as waiting:
        children = Path(f"/proc/{waiting.pid}/task/{waiting.pid}/children")
        deadline = time.monotonic() + 30
        while not (numbers := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.01)
        program = Path(f"/proc/{numbers[0]}")
        while not _is_confined(program) and time.monotonic() < deadline:
            time.sleep(0.01)
        waiting.kill()
    while program.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not program.exists()


def _is_confined(process: Path) -> bool:
    return "Seccomp:\t2" in (process / "status").read_text()


def test_nothing_outside_is_written_changed_or_read(tmp_path: Path, folders: Path) -> None:
    if {confined.WRITES, confined.READS, confined.SIGNALS} & {*not_forbidden()}:
        pytest.skip("this system does not forbid it")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    secret.chmod(0o640)
    before = secret.stat()
    for act in (
        *(f"open({str(secret)!r}, {mode!r})" for mode in ("r", "w", "a", "r+")),
        *(f"import os; os.{name}({str(secret)!r})" for name in ("unlink", "utime")),
        *(f"import os; os.{call}" for call in (f"chmod({str(secret)!r}, 0)", f"truncate({str(secret)!r}, 0)")),
        *(f"import os; os.{name}({str(secret)!r}, 'here')" for name in ("rename", "link")),
        f"import os; os.setxattr({str(secret)!r}, 'user.x', b'y')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.symlink({str(secret)!r}, 'a'); open('a')",
        "open('../new', 'w')",
    ):
        assert not run_program(act), act
    after = secret.stat()
    assert secret.read_text() == "mine"
    assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
    assert [*tmp_path.iterdir()] == [secret]


def test_no_server_of_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}))")
        assert not run_program(f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}', timeout=1)")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_program_has_no_open_files_but_the_one_it_is_reported_by(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        assert run_program(
            "import os\nnumbers = []\nfor k in range(64):\n    try: os.fstat(k); numbers.append(k)\n"
            "    except OSError: pass\nassert numbers == [0, 1, 2, 3], numbers",
            PATIENT,
        )


def test_what_a_program_writes_does_not_make_it_pass() -> None:
    assert not run_program("import os; os.write(3, b'confined: \\n' + b'0' * 32); os._exit(0)")
    assert not run_program("import os\nwhile True: os.write(3, b'0' * 4096)")


def test_the_same_program_gives_the_same_result() -> None:
    """Sets are in the same order and `random` draws the same, in every process."""
    code = "import random; print(hash('abc'))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True)
    assert run_program(f"assert hash('abc') == {done.stdout}")
    assert run_program("import random; assert random.random() == random.Random(0).random()")


def test_what_is_run_and_what_cannot_be_forbidden_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert program_notes([]) == []
    monkeypatch.setattr(sandbox, "not_forbidden", lambda: ())
    (note,) = program_notes(["humaneval", "mbpp"])
    assert note.startswith("'humaneval', 'mbpp': programs that the model writes are run")
    assert "3 s, 1024 MiB of memory, files of 16 MiB" in note
    monkeypatch.setattr(sandbox, "not_forbidden", lambda: (confined.NETWORK, confined.DISK))
    assert program_notes(["mbpp"])[1] == (
        "'mbpp': this system forbids programs neither the network nor filling the disk"
    )


def test_a_process_that_cannot_be_confined_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_COMMAND", (sys.executable, "-c", "raise RuntimeError('no such call')"))
    with pytest.raises(TaskError, match=r"no program is run: .*RuntimeError: no such call"):
        run_program("assert 'another one'")
