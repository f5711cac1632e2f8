"""LIFL's own measurements: `lifl bench`, read line by line."""

import json
import subprocess
from pathlib import Path

from machine import CaseFailed, run_child


def check(binary: Path) -> str:
    """The binary's version, or why it cannot be measured."""
    if not binary.exists():
        raise CaseFailed(f"no {binary}: build it with `cargo build --release`, or leave LIFL out with `--systems`")
    if subprocess.run([binary, "bench", "--help"], capture_output=True).returncode != 0:
        raise CaseFailed(f"{binary} has no command `bench`: build it anew with `cargo build --release`")
    version = subprocess.run([binary, "--version"], capture_output=True, text=True)
    return version.stdout.strip() or "unknown"


def bench(binary: Path, name: str, arguments: list[str], folder: Path, timeout_seconds: float) -> list[dict]:
    """Runs one of `lifl bench`'s benches and returns its events."""
    run_child([str(binary), "bench", name, "--json", *arguments], folder, timeout_seconds)
    events = [json.loads(line) for line in (folder / "stdout.txt").read_text().splitlines() if line.strip()]
    if not any(event.get("event") == "bench" for event in events):
        raise CaseFailed(f"`lifl bench {name} {' '.join(arguments)}` printed no result")
    return events
