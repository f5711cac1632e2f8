"""The report: Markdown tables of what was measured, and what about them is not fair."""

from dataclasses import asdict, dataclass, field

AGGREGATION_NOTES = """\
- Every system has the same updates and weights, held as it takes them, in one process, in memory, before the clock starts.
  The results were held against each other and against the mean in double precision. LIFL's were not among them, since its
  bench does not hand them out: its tests hold them against a plain mean.
- LIFL's updates are other values of the same sizes; adding takes as long for any of them.
- `numpy`, `numpy-blocked` and `torch` write into memory that they have; `flower` and `flare` make their result anew each
  time, since that is how their functions are written. `numpy`, `flower` and `flare` use one thread, the others all.
- `flower` is `aggregate_arrayrecords`, which its FedAvg strategy calls: it takes the arrays out of the serialized form in
  which messages bring them, and puts the mean into it. `flare` and `flare-torch` are `WeightedAggregationHelper`.
- Peak memory has the updates in it, and of the Python systems the interpreter and the libraries."""

ROUND_NOTES = """\
- A round goes from the model being sent to the next model being there, as the server sees it. The start of processes is
  outside, and the first round too, since connections and pools are made in it. Writing the model to the disk is outside.
- Nobody trains: each client writes one update of the size, each round. LIFL's trainers are synthetic and do the same.
- Flower (simulation, Ray) and FLARE (simulator) copy the model and the updates from process to process, through Ray's object
  store and through FLARE's cells. That is how they hand them over, also between machines; they were not asked to compute in
  shared memory, and LIFL's rounds here do nothing between machines.
- Flower and FLARE also wait: they look for tasks and results at intervals of their own, up to 0.1 s (`flower`), 2 s
  (`flare`) and 3 s (`flower-deployed`). The rounds of a small model show how much of a round that is. The intervals are as
  they come.
- `flower` is its simulation, begun by `run_simulation`, the same engine as below `flwr run`; `flower-deployed` is a
  SuperLink and a SuperNode for each client. Limits of message sizes are as they come: none stopped what has a number here.
- Ray runs as many clients at once as there are cores; FLARE's and LIFL's clients all have a process.
- Flower and FLARE have one aggregator, as `lifl-…-1` has. `lifl-…-3` has three levels of them for the same updates.
- Peak memory of Flower and FLARE is the drop of what the machine has available: memory that processes share counts once, and
  what other programs took meanwhile counts too. LIFL's is what its bench counted, which leaves out the memory in which that
  bench measures the memory's speed beforehand."""


@dataclass
class Measured:
    """One number of the report, with where it comes from."""

    bench: str
    system: str
    size_bytes: int
    count: int
    median_seconds: float
    min_seconds: float
    max_seconds: float | None
    runs: int
    cpu_seconds: float | None
    peak_memory_bytes: int | None
    raw: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """A case without a number, and why."""

    case: str
    reason: str
    failed: bool


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def size(value: int) -> str:
    """Bytes for a reader, in powers of 10."""
    return f"{value / 1e6:g} MB" if value >= 10**6 else f"{value / 1e3:g} kB"


def seconds(value: float | None) -> str:
    """Seconds with three digits that count."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def comparison(results: list[Measured], baseline: str, counted: str) -> str:
    """A row for each case, a column for each system, with the ratio to the baseline."""
    systems = list(dict.fromkeys(result.system for result in results))
    systems.sort(key=lambda name: not name.startswith("lifl"))
    cases = sorted({(result.size_bytes, result.count) for result in results})
    by_case = {(result.size_bytes, result.count, result.system): result for result in results}
    rows = []
    for size_bytes, count in cases:
        against = by_case.get((size_bytes, count, baseline))
        row = [f"{size(size_bytes)} × {count}"]
        for system in systems:
            result = by_case.get((size_bytes, count, system))
            if result is None:
                row.append("–")
            elif against is None or system == baseline:
                row.append(f"{seconds(result.median_seconds)} s")
            else:
                row.append(
                    f"{seconds(result.median_seconds)} s ({result.median_seconds / against.median_seconds:.2f}×)"
                )
        rows.append(row)
    return table([f"update × {counted}", *systems], rows)


def details(results: list[Measured], counted: str) -> str:
    """Everything about each number."""
    rows = []
    for result in sorted(results, key=lambda result: (result.size_bytes, result.count)):
        peak = "–" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 1e6:,.0f} MB"
        rows.append(
            [
                f"{size(result.size_bytes)} × {result.count}, {result.system}",
                seconds(result.median_seconds),
                seconds(result.min_seconds),
                seconds(result.max_seconds),
                str(result.runs),
                seconds(result.cpu_seconds),
                f"{result.size_bytes * result.count / result.median_seconds / 1e9:.2f}",
                peak,
            ]
        )
    header = [
        f"update × {counted}, system",
        "median s",
        "min s",
        "max s",
        "runs",
        "CPU s",
        "GB/s of updates",
        "peak memory",
    ]
    return table(header, rows)


def markdown(
    facts: dict[str, str], command: str, results: list[Measured], left: list[Left], round_baseline: str
) -> str:
    """The whole report."""
    parts = [
        "# LIFL and its peers, side by side",
        table(["", "machine"], [[name, value] for name, value in facts.items()]),
    ]
    parts.append(f"```text\n{command}\n```")
    for bench, title, counted, baseline, notes in (
        ("aggregate", "Aggregation: the weighted mean of K updates", "K", "lifl-lazy", AGGREGATION_NOTES),
        ("round", "Whole rounds", "clients", round_baseline, ROUND_NOTES),
    ):
        chosen = [result for result in results if result.bench == bench]
        if not chosen:
            continue
        ratio = (
            f" In brackets: times as long as `{baseline}`."
            if any(result.system == baseline for result in chosen)
            else ""
        )
        parts += [f"## {title}", f"Median seconds.{ratio}", comparison(chosen, baseline, counted)]
        parts += ["What is not fair, or cannot be made so:", notes]
        parts += [f"<details><summary>Each number</summary>\n\n{details(chosen, counted)}\n\n</details>"]
    if left:
        lines = [f"- {'failed' if one.failed else 'skipped'}: {one.case}: {one.reason}" for one in left]
        parts += ["## Without a number", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def raw(facts: dict[str, str], command: str, results: list[Measured], left: list[Left]) -> dict:
    """The same for programs."""
    return {
        "machine": facts,
        "command": command,
        "results": [asdict(result) for result in results],
        "left": [asdict(one) for one in left],
    }
