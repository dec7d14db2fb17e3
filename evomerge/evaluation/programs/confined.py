"""Runs one program where it can reach nothing: the other end of `sandbox.py`, a process of its own in plain Python.

Four layers of what Linux lets any user do to himself, each of which may be missing: limits (setrlimit), namespaces
without a network and with a small file system of their own, Landlock for what files may be read and written, seccomp
for the calls that the kernel answers. What none of them could forbid is reported before the program starts.

The standard input has a token and the program; standard output gets a line that says what could not be forbidden, and
the token once the program has ended as it should.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

NETWORK = "the network"
WRITES = "writing outside of its folder"
READS = "reading other people's files"
PROCESSES = "starting processes"
SIGNALS = "signals to other processes"
DISK = "filling the disk"
MEMORY = "using all memory"

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Confines this process and runs the program in it."""
    (seconds, memory, file_size, disk, *paths), sys.argv = sys.argv[1:], [""]
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    report = os.dup(1)
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):  # the lowest free number is given
        os.close(number)
        os.open(os.devnull, mode)
    sys.path += paths
    random.setstate(random.Random(0).getstate())
    lacking = confine(os.getcwd(), float(seconds), int(memory), int(file_size), int(disk))
    os.environ.clear()
    for library in ("OMP", "OPENBLAS", "MKL"):  # they may start no thread; `os.environ` does not have it
        os.putenv(f"{library}_NUM_THREADS", "1")
    os.write(report, f"confined: {'; '.join(lacking)}\n".encode())
    try:
        exec(program.decode("utf-8", "surrogatepass"), {})  # as code_eval does: `__name__` is no "__main__"
    except BaseException:  # what ends a program early has not passed, SystemExit neither
        os._exit(1)
    os.write(report, token)
    os._exit(0)  # threads and `atexit` have no say


def confine(folder: str, seconds: float, memory: int, file_size: int, disk: int) -> list[str]:
    """Gives up what this process may do; it cannot be had again.

    Args:
        folder: The only one that may be written to.
        seconds: Of processor time.
        memory: Bytes of address space.
        file_size: Bytes of any one file.
        disk: Bytes of all files together.

    Returns:
        What could not be forbidden.
    """
    lacking = set()
    user, group = os.geteuid(), os.getegid()
    if sys.platform != "linux" or _libc.unshare(_NEWUSER | _NEWNET | _NEWNS | _NEWIPC) != 0:
        lacking |= {NETWORK, DISK}
    elif not _mount_small(folder, disk, user, group):
        lacking.add(DISK)
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, most),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ValueError, OSError):  # macOS has no such limit
        lacking.add(MEMORY)
    if sys.platform == "linux":
        _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: what lets an ordinary user do the next two
    if not _landlock(folder):
        lacking |= {WRITES, READS}
    if sys.platform == "linux":  # the superuser is one no longer
        _libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: nothing outlives the one who waits for it
    if _seccomp():
        lacking.discard(NETWORK)
    else:
        lacking |= {PROCESSES, SIGNALS}
        if os.geteuid() != 0:  # which no limit holds for
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            lacking.discard(PROCESSES)
    return sorted(lacking)


_NEWNS, _NEWIPC, _NEWUSER, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x40000000


def _mount_small(folder: str, disk: int, user: int, group: int) -> bool:
    """Puts a file system of a few bytes over a folder, for this process alone, in which its user has a name."""
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    options = f"size={disk},nr_inodes=1000,mode=700".encode()
    nosuid_nodev_noexec = 2 | 4 | 8
    if _libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", nosuid_nodev_noexec, options) != 0:
        return False
    os.chdir(folder)  # which is another one now
    return True


_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute (libraries), read a file, list a folder
_READ_FILE = 1 << 0 | 1 << 2
_WRITE_FILE = 1 << 1 | 1 << 2
_MAKE = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12  # folders, files and links, no devices
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15


def _landlock(folder: str) -> bool:
    """Leaves one folder to be written to, and of the others those that Python reads (landlock(7))."""
    if sys.platform != "linux" or (version := _libc.syscall(444, None, 0, 1)) < 1:
        return False
    newer = (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled = (1 << 13) - 1 | newer | (_IOCTL if version >= 5 else 0)
    ports, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)  # bind and connect; sockets and signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _libc.syscall(444, struct.pack("QQQ", handled, ports, scopes), size, 0)
    if rules < 0:
        return False
    allowed = [(folder, _MAKE | newer), (os.devnull, _WRITE_FILE)]
    allowed += [(path, _READ if os.path.isdir(path) else _READ_FILE) for path in _read_by_python()]
    for path, rights in allowed:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        added = _libc.syscall(445, rules, 1, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)
        if added != 0:
            return False
    restricted = bool(_libc.syscall(446, rules, 0) == 0)
    os.close(rules)
    return restricted


def _read_by_python() -> list[str]:
    """What modules, and the libraries that they load, are read from."""
    shared = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache")
    own = [os.path.join(sys.base_prefix, "lib"), *sys.path]
    return [path for path in dict.fromkeys((*shared, *own, "/dev/urandom", "/dev/zero")) if os.path.exists(path)]


_NUMBERS: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            **{"socket": 41, "fork": 57, "vfork": 58, "clone": 56, "clone3": 435, "execve": 59, "execveat": 322},
            **{"kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297},
            **{"pidfd_open": 434, "pidfd_send_signal": 424, "pidfd_getfd": 438, "ptrace": 101, "prlimit64": 302},
            **{"process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "kcmp": 312},
            **{"setpriority": 141, "ioprio_set": 251, "sched_setparam": 142, "sched_setscheduler": 144},
            **{"sched_setaffinity": 203, "sched_setattr": 314, "migrate_pages": 256, "move_pages": 279},
            **{"setpgid": 109, "setsid": 112, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166},
            **{"truncate": 76, "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452},
            **{"chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260},
            **{"utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280},
            **{"setxattr": 188, "lsetxattr": 189, "fsetxattr": 190},
            **{"removexattr": 197, "lremovexattr": 198, "fremovexattr": 199},
            **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319, "memfd_secret": 447},
            **{"io_uring_setup": 425, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323},
            **{"add_key": 248, "request_key": 249, "keyctl": 250},
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            **{"socket": 198, "clone": 220, "clone3": 435, "execve": 221, "execveat": 281},
            **{"kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240},
            **{"pidfd_open": 434, "pidfd_send_signal": 424, "pidfd_getfd": 438, "ptrace": 117, "prlimit64": 261},
            **{"process_vm_readv": 270, "process_vm_writev": 271, "process_madvise": 440, "kcmp": 272},
            **{"setpriority": 140, "ioprio_set": 30, "sched_setparam": 118, "sched_setscheduler": 119},
            **{"sched_setaffinity": 122, "sched_setattr": 274, "migrate_pages": 238, "move_pages": 239},
            **{"setpgid": 154, "setsid": 157, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39},
            **{"truncate": 45, "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchown": 55, "fchownat": 54},
            **{"utimensat": 88, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7},
            **{"removexattr": 14, "lremovexattr": 15, "fremovexattr": 16},
            **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "memfd_create": 279, "memfd_secret": 447},
            **{"io_uring_setup": 425, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282},
            **{"add_key": 217, "request_key": 218, "keyctl": 219},
        },
    ),
}
"""By machine: what the kernel calls it, and the numbers of the calls that are refused.

Sockets; processes and threads; other processes; sessions and mounts; what Landlock does not see of files; memory and
objects of the kernel that no limit counts.
"""

_NEWEST = 463
"""Calls from here on are newer than this table."""

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16


def _seccomp() -> bool:
    """Has the kernel refuse what `_NUMBERS` lists (seccomp(2), a filter in classic BPF)."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _NUMBERS or sys.maxsize < 2**32:
        return False
    architecture, calls = _NUMBERS[machine]
    refuse, unknown = (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ERRNO | _ENOSYS)
    steps = [
        *((_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), refuse),  # 32-bit calls have other numbers
        *((_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _NEWEST), unknown),
    ]
    for name, number in calls.items():
        if name == "prlimit64":  # of oneself it reads limits, and sets none higher
            steps += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 1, 0, 0), refuse]
            steps += [(_RETURN, 0, 0, _ALLOW)]
        else:
            steps += [(_EQUAL, 0, 1, number), unknown if name == "clone3" else refuse]
    steps.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    arguments: list[Any] = [ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0)]
    return bool(_libc.prctl(22, *arguments) == 0)  # PR_SET_SECCOMP


if __name__ == "__main__":
    main()
