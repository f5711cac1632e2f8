"""The cases of a run, one after the other: what each system is asked to do, and whether what it made is right."""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lifl
import options
import report
from aggregate_one import TOLERANCE
from machine import CaseFailed, CaseSkipped, memory_bytes, run_child, say
from report import Left, Measured

HERE = Path(__file__).resolve().parent
ROUND_SCRIPTS = {
    "flower": "flower_rounds.py",
    "flower-deployed": "flower_deployed_rounds.py",
    "flare": "flare_rounds.py",
}
# Of the available memory. A mean's need is known; a round's is an estimate, and a round that takes too much is stopped.
MEAN_MEMORY_SHARE = 0.6
ROUND_MEMORY_SHARE = 0.85
# Accumulators and copies that a mean may need beside the updates.
EXTRA_UPDATES = 5
# Of each update in a round, until smaller cases have shown what a client costs.
COPIES_AT_FIRST = 3


class Bench:
    """One run: its options, its folder, and what came out so far."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen = chosen
        self.folder = folder
        self.results: list[Measured] = []
        self.left: list[Left] = []
        self.slices: dict[tuple[int, int], tuple[str, list[float]]] = {}
        self.memory_speed: float | None = None
        # Clients and peak memory of the rounds so far, by system and size.
        self.peaks: dict[tuple[str, int], list[tuple[int, int]]] = {}

    def case(self, name: str, needed_bytes: float, share: float, measure: Callable[[Path], list[Measured]]) -> None:
        """Measures one case, or notes why there is no number."""
        try:
            available = memory_bytes("MemAvailable")
            if needed_bytes > available * share:
                gigabytes = f"{needed_bytes / 1e9:.1f} GB, over {share:.0%} of the {available / 1e9:.1f} GB available"
                raise CaseSkipped(f"it would take about {gigabytes}")
            say(f"{name} …")
            for result in measure(self.fresh_folder()):
                self.results.append(result)
                say(f"    {result.system}: median {report.seconds(result.median_seconds)} s of {result.runs}")
        except CaseSkipped as why:
            say(f"    SKIPPED {name}: {why}")
            self.left.append(Left(name, str(why), failed=False))
        except CaseFailed as why:
            say(f"    FAILED {name}: {why}")
            self.left.append(Left(name, str(why), failed=True))

    def fresh_folder(self) -> Path:
        """An empty folder for a case. The last one goes: models lie in it."""
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def python(self, script: str, words: list[object], place: Path) -> tuple[dict, int]:
        """Runs one of the scripts here; returns what it wrote and the drop of available memory."""
        out = place / "out.json"
        env = {
            "PYTHONPATH": str(HERE),
            "PYTHONDONTWRITEBYTECODE": "1",
            # Nobody is told of this run, and nothing is left in the user's folders.
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_HOME": str(place / "flwr"),
            "RAY_TMPDIR": str(place),
            "TMPDIR": str(place),
        }
        command = [sys.executable, str(HERE / script), *map(str, words), str(out)]
        run = run_child(command, place, self.chosen.timeout, env)
        if not out.exists():
            raise CaseFailed(f"{script} ended well but wrote no result")
        return json.loads(out.read_text()), run.peak_memory_bytes

    def aggregate_peer(self, system: str, size_bytes: int, count: int, place: Path) -> list[Measured]:
        """One system's mean, held against the others'."""
        found, _ = self.python(
            "aggregate_one.py", [system, size_bytes, count, self.chosen.runs, self.chosen.threads], place
        )
        values = found.pop("slice")
        other, reference = self.slices.setdefault((size_bytes, count), (system, values))
        worst = max(abs(one - two) for one, two in zip(values, reference, strict=True))
        if worst > 2 * TOLERANCE:
            raise CaseFailed(f"wrong result: {worst} away from {other}'s")
        timing = found["seconds"]
        return [
            Measured(
                "aggregate",
                system,
                size_bytes,
                count,
                timing["median"],
                timing["min"],
                timing["max"],
                timing["runs"],
                found["cpu_seconds"],
                found["peak_memory_bytes"],
                found,
            )
        ]

    def aggregate_lifl(self, size_bytes: int, count: int, place: Path) -> list[Measured]:
        """LIFL's mean, lazy and eager."""
        threads = self.chosen.threads
        words = f"--bytes {size_bytes} --updates {count} --dtype f32 --timing lazy,eager --threads {threads}"
        events = lifl.bench(self.chosen.lifl, "aggregate", words.split(), place, self.chosen.timeout)
        return [
            self.from_event(event, f"lifl-{event['case']['timing']}", event["case"]["updates"], event["cpu_seconds"])
            for event in self.bench_events(events)
        ]

    def round_lifl(self, size_bytes: int, clients: int, levels: int, place: Path) -> list[Measured]:
        """LIFL's rounds."""
        words = f"--bytes {size_bytes} --trainers {clients} --levels {levels} --rounds {self.chosen.rounds}"
        events = lifl.bench(self.chosen.lifl, "round", words.split(), place, self.chosen.timeout)
        # No CPU seconds: the peers' rounds have none to hold them against.
        return [
            self.from_event(event, f"lifl-{event['case']['timing']}-{levels}", event["case"]["trainers"], None)
            for event in self.bench_events(events)
        ]

    def bench_events(self, events: list[dict]) -> list[dict]:
        """The results among LIFL's events; the memory's speed is kept."""
        for event in events:
            if event.get("event") == "memory":
                # The best of them: something else on the machine can only make it less.
                self.memory_speed = max(self.memory_speed or 0.0, event["read_bytes_per_second"])
        return [event for event in events if event.get("event") == "bench"]

    def from_event(self, event: dict, system: str, count: int, cpu_seconds: float | None) -> Measured:
        """One of LIFL's results."""
        timing = event["seconds"]
        return Measured(
            event["bench"],
            system,
            event["case"]["bytes"],
            count,
            timing["median"],
            timing["min"],
            timing.get("max"),
            timing["runs"],
            cpu_seconds,
            event["peak_memory_bytes"],
            event,
        )

    def round_peer(self, system: str, size_bytes: int, clients: int, place: Path) -> list[Measured]:
        """A peer's rounds, without the first; every round's model must be the weighted mean."""
        # FLARE takes its client's script from the folder it runs in.
        shutil.copy(HERE / "flare_client.py", place)
        found, peak = self.python(
            ROUND_SCRIPTS[system], [size_bytes, clients, self.chosen.rounds, self.chosen.threads], place
        )
        if len(found["rounds"]) != self.chosen.rounds:
            raise CaseFailed(f"{len(found['rounds'])} of {self.chosen.rounds} rounds were run")
        weights = [100 + index for index in range(clients)]
        mean = sum(weight * (index + 1) for index, weight in enumerate(weights)) / sum(weights)
        for number, value in enumerate(found["means"], start=1):
            if abs(value - mean) > TOLERANCE * mean:
                raise CaseFailed(f"wrong result: round {number} made {value}, the mean is {mean}")
        self.peaks.setdefault((system, size_bytes), []).append((clients, peak))
        after = found["rounds"][1:]
        return [
            Measured(
                "round",
                system,
                size_bytes,
                clients,
                statistics.median(after),
                min(after),
                max(after),
                len(after),
                None,
                peak,
                found,
            )
        ]

    def round_memory(self, system: str, size_bytes: int, clients: int) -> float:
        """What a round will take: a straight line through the last two cases of this size, if there are two."""
        points = self.peaks.get((system, size_bytes), [])[-2:]
        if len(points) < 2 or points[0][0] == points[1][0]:
            return COPIES_AT_FIRST * clients * size_bytes
        (few, little), (many, much) = points
        return much + (much - little) / (many - few) * (clients - many)

    def run(self) -> None:
        """Everything that was asked for; case by case and not system by system, so that all see the machine alike."""
        chosen = self.chosen
        if "aggregate" in chosen.benches:
            for size_bytes in chosen.bytes:
                for count in chosen.updates:
                    self.means(size_bytes, count)
        if "round" in chosen.benches:
            for size_bytes in chosen.round_bytes:
                for clients in chosen.clients:
                    self.rounds(size_bytes, clients)

    def means(self, size_bytes: int, count: int) -> None:
        """One mean by every system."""
        needed = (count + EXTRA_UPDATES) * size_bytes
        for system in self.chosen.systems:
            name = f"mean of {count} updates of {report.size(size_bytes)}, {system}"
            if system == "lifl":
                self.case(name, needed, MEAN_MEMORY_SHARE, partial(self.aggregate_lifl, size_bytes, count))
            elif system in options.AGGREGATION_SYSTEMS:
                self.case(
                    name,
                    needed,
                    MEAN_MEMORY_SHARE,
                    partial(self.aggregate_peer, system, size_bytes, count),
                )

    def rounds(self, size_bytes: int, clients: int) -> None:
        """Rounds by every system that has rounds."""
        name = f"rounds of {clients} clients with {report.size(size_bytes)}"
        for system in self.chosen.systems:
            if system == "lifl":
                for levels in self.chosen.levels:
                    # Each update once, and each aggregator's; there are fewer of those.
                    self.case(
                        f"{name}, lifl, {levels} level(s)",
                        2 * clients * size_bytes,
                        ROUND_MEMORY_SHARE,
                        partial(self.round_lifl, size_bytes, clients, levels),
                    )
            elif system in ROUND_SCRIPTS:
                needed = self.round_memory(system, size_bytes, clients)
                self.case(
                    f"{name}, {system}",
                    needed,
                    ROUND_MEMORY_SHARE,
                    partial(self.round_peer, system, size_bytes, clients),
                )
