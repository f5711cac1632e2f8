"""The machine: what it is, its memory, and processes that are watched while they run and gone afterwards."""

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
# A case that leaves less than this share of the machine's memory is stopped before the kernel kills something.
MEMORY_FLOOR_SHARE = 0.06
SAMPLE_SECONDS = 0.1
# Above this load (runnable processes, over the last minute) something else takes part in what is measured.
IDLE_LOAD = 0.5


class CaseFailed(Exception):
    """A case could not be measured, with the reason in words."""


class CaseSkipped(Exception):
    """A case was not tried, or was stopped, because the machine is too small for it."""


@dataclass(frozen=True)
class ChildRun:
    """How a child process and everything below it went."""

    seconds: float
    peak_memory_bytes: int


def say(text: str) -> None:
    """Tells progress, on standard error: standard output is the report's."""
    print(text, file=sys.stderr, flush=True)


def memory_bytes(field: str) -> int:
    """One line of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise CaseFailed(f"/proc/meminfo has no {field}: this needs Linux")


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise CaseFailed("/proc/self/status has no VmHWM: this needs Linux")


def busy_warning() -> str | None:
    """What to tell the reader if the machine does something else."""
    load = os.getloadavg()[0]
    if load <= IDLE_LOAD:
        return None
    return f"The machine was not idle when this began (load {load:.2f}): the numbers are of little worth."


def facts(packages: list[str]) -> dict[str, str]:
    """What a reader must know about the machine to judge the numbers."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    found = {
        "CPU": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_bytes('MemTotal') / 1e9:.1f} GB",
        "memory available at the start": f"{memory_bytes('MemAvailable') / 1e9:.1f} GB",
        "load at the start": f"{os.getloadavg()[0]:.2f}",
        "kernel": f"{platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "Python": platform.python_version(),
    }
    for package in packages:
        found[package] = metadata.version(package)
    return found


def adopt_orphans() -> None:
    """Makes processes whose parent ends children of this one.

    Ray and FLARE start processes that outlive their parents; as children they can be found and ended."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants() -> None:
    """Ends every process below this one and waits until they are gone."""
    for _ in range(50):
        below = psutil.Process().children(recursive=True)
        if not below:
            return
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=1)
    say(f"still there after being killed: {[process.pid for process in psutil.Process().children(recursive=True)]}")


def run_child(command: list[str], folder: Path, timeout_seconds: float, env: dict[str, str] | None = None) -> ChildRun:
    """Runs a command to its end in a folder; what it started is gone afterwards, whatever happens.

    What it prints lies in the folder's stdout.txt and stderr.txt. The memory is the drop of MemAvailable, which counts once
    what processes share (Ray's object store, LIFL's arenas)."""
    before = memory_bytes("MemAvailable")
    floor = int(memory_bytes("MemTotal") * MEMORY_FLOOR_SHARE)
    lowest = before
    started = time.monotonic()
    done = threading.Event()
    too_little = threading.Event()

    def watch() -> None:
        nonlocal lowest
        while not done.wait(SAMPLE_SECONDS):
            lowest = min(lowest, memory_bytes("MemAvailable"))
            if lowest < floor and not too_little.is_set():
                too_little.set()
                child.kill()

    with (folder / "stdout.txt").open("wb") as stdout, (folder / "stderr.txt").open("wb") as stderr:
        # Its own session: a Ctrl-C reaches this process alone, which then ends the whole tree.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            code = child.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise CaseFailed(f"not done after {timeout_seconds:.0f} s: `--timeout` gives it more") from None
        finally:
            done.set()
            watcher.join()
            end_descendants()
    if too_little.is_set():
        raise CaseSkipped(f"stopped: less than {floor / 1e9:.1f} GB of memory was left")
    if code != 0:
        texts = [(folder / name).read_text(errors="replace") for name in ("stdout.txt", "stderr.txt")]
        printed = "\n".join(texts).splitlines()
        raise CaseFailed(f"ended with code {code}; its last lines: " + " | ".join(printed[-8:]))
    return ChildRun(time.monotonic() - started, before - lowest)
