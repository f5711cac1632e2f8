"""LIFL, Flower, NVIDIA FLARE, PyTorch and NumPy measured side by side, on one machine, in one run.

The report goes to standard output as Markdown, progress to standard error. `run` starts this with what it needs.
"""

import importlib.util
import json
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import lifl
import options
import report
from cases import Bench
from machine import CaseFailed, adopt_orphans, busy_warning, end_descendants, facts, say

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupted(*_: object) -> None:
    """The first signal ends the run; what comes after it must not end the cleaning up."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Measures and reports; returns the exit code."""
    chosen = options.parse()
    for number in ENDING:
        signal.signal(number, interrupted)
    adopt_orphans()
    packages = ["numpy", "flwr", "ray", "nvflare"]
    if any("torch" in system for system in chosen.systems):
        packages.append("torch")
    try:
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            raise CaseFailed(
                f"Python has no {', '.join(missing)}: start this with benches/peers/run, which installs them"
            )
        versions = {"LIFL": lifl.check(chosen.lifl)} if "lifl" in chosen.systems else {}
        machine, warning = {**facts(packages), **versions}, busy_warning()
    except CaseFailed as why:
        say(f"error: {why}")
        return 3
    if warning:
        machine["warning"] = warning
        say(f"warning: {warning}")
    command = shlex.join(["benches/peers/run", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as folder:
        bench = Bench(chosen, Path(folder))
        stopped = False
        try:
            bench.run()
        except KeyboardInterrupt:
            # What took minutes to measure is not thrown away.
            say("interrupted: the report has what was measured until then")
            machine["warning"], stopped = "interrupted before all cases were measured", True
        finally:
            end_descendants()
    if bench.memory_speed:
        machine["memory read, as LIFL measured it"] = f"{bench.memory_speed / 1e9:.1f} GB/s"
    print(report.markdown(machine, command, bench.results, bench.left, f"lifl-lazy-{min(chosen.levels)}"), end="")
    if chosen.json:
        chosen.json.write_text(json.dumps(report.raw(machine, command, bench.results, bench.left), indent=1) + "\n")
        say(f"raw numbers in {chosen.json}")
    if stopped:
        return 130
    failed = sum(one.failed for one in bench.left)
    if failed:
        say(f"error: {failed} case(s) failed, named in the report")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
