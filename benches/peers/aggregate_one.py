"""One system's weighted mean of K updates, timed in a process of its own so that its peak memory is its own.

aggregate_one.py SYSTEM BYTES UPDATES RUNS THREADS OUT.json
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from machine import peak_rss_bytes

# One run, and what makes an array of its result.
Prepared = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]

# Floats in a block that stays in a core's cache while all updates are folded into it.
BLOCK_FLOATS = 32 * 1024
SLOW_SECONDS = 5.0
SLOW_RUNS = 3
TOLERANCE = 1e-5
SLICE_FLOATS = 4096


def update(index: int, floats: int) -> np.ndarray:
    """Update number `index`: the same for every system."""
    return np.random.default_rng(1000 + index).random(floats, dtype=np.float32)


def weight(index: int) -> int:
    """The samples behind an update."""
    return 100 + index


def shares(count: int) -> list[float]:
    """The updates' shares of the mean."""
    total = sum(weight(index) for index in range(count))
    return [weight(index) / total for index in range(count)]


def numpy_whole(floats: int, count: int, _threads: int) -> Prepared:
    """NumPy as one would write it with care: in place, with an accumulator and a buffer that are there already."""
    updates, parts = [update(index, floats) for index in range(count)], shares(count)
    mean, product = np.empty(floats, np.float32), np.empty(floats, np.float32)

    def run() -> np.ndarray:
        np.multiply(updates[0], np.float32(parts[0]), out=mean)
        for values, part in zip(updates[1:], parts[1:], strict=True):
            np.multiply(values, np.float32(part), out=product)
            np.add(mean, product, out=mean)
        return mean

    return run, lambda result: result


def numpy_blocked(floats: int, count: int, threads: int) -> Prepared:
    """NumPy at its best: block by block, so that sums stay in the cache, on all threads (NumPy lets go of the GIL)."""
    updates, parts = [update(index, floats) for index in range(count)], [np.float32(part) for part in shares(count)]
    mean = np.empty(floats, np.float32)
    bounds = np.linspace(0, floats, threads + 1).astype(int)
    pool = ThreadPoolExecutor(threads)

    def fold(begin: int, end: int) -> None:
        product = np.empty(BLOCK_FLOATS, np.float32)
        for start in range(begin, end, BLOCK_FLOATS):
            stop = min(start + BLOCK_FLOATS, end)
            block, scratch = mean[start:stop], product[: stop - start]
            np.multiply(updates[0][start:stop], parts[0], out=block)
            for values, part in zip(updates[1:], parts[1:], strict=True):
                np.multiply(values[start:stop], part, out=scratch)
                np.add(block, scratch, out=block)

    def run() -> np.ndarray:
        list(pool.map(fold, bounds[:-1], bounds[1:]))
        return mean

    return run, lambda result: result


def torch_in_place(floats: int, count: int, threads: int) -> Prepared:
    """PyTorch: `add_(x, alpha=w)` into one accumulator, on all threads."""
    import torch

    torch.set_num_threads(threads)
    updates, parts = [torch.from_numpy(update(index, floats)) for index in range(count)], shares(count)
    mean = torch.empty(floats, dtype=torch.float32)

    def run() -> torch.Tensor:
        torch.mul(updates[0], parts[0], out=mean)
        for values, part in zip(updates[1:], parts[1:], strict=True):
            mean.add_(values, alpha=part)
        return mean

    return run, lambda result: result.numpy()


def flower(floats: int, count: int, _threads: int) -> Prepared:
    """What Flower's FedAvg strategy calls, with the records that messages bring it."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({"model": Array(update(index, floats))}),
                "metrics": MetricRecord({"num-examples": weight(index)}),
            }
        )
        for index in range(count)
    ]
    return lambda: aggregate_arrayrecords(records, "num-examples"), lambda result: result["model"].numpy()


def flare(floats: int, count: int, _threads: int) -> Prepared:
    """What FLARE's FedAvg controller calls, with NumPy arrays."""
    return flare_helper([{"model": update(index, floats)} for index in range(count)], lambda values: values)


def flare_torch(floats: int, count: int, threads: int) -> Prepared:
    """The same with PyTorch tensors, for which FLARE has code of its own, in place."""
    import torch

    torch.set_num_threads(threads)
    updates = [{"model": torch.from_numpy(update(index, floats))} for index in range(count)]
    return flare_helper(updates, lambda values: values.numpy())


def flare_helper(updates: list[dict[str, Any]], to_numpy: Callable[[Any], np.ndarray]) -> Prepared:
    """One round of FLARE's aggregation helper over the updates."""
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

    def run() -> dict[str, Any]:
        helper = WeightedAggregationHelper()
        for index, data in enumerate(updates):
            helper.add(data, weight(index), f"site-{index + 1}", 0)
        return helper.get_result()

    return run, lambda result: to_numpy(result["model"])


PREPARE: dict[str, Callable[[int, int, int], Prepared]] = {
    "numpy": numpy_whole,
    "numpy-blocked": numpy_blocked,
    "torch": torch_in_place,
    "flower": flower,
    "flare": flare,
    "flare-torch": flare_torch,
}


def checked_slice(result: np.ndarray, floats: int, count: int) -> list[float]:
    """Values from all over the result, after they were held against the mean in double precision."""
    if result.shape != (floats,) or result.dtype != np.float32:
        raise SystemExit(f"wrong result: {result.shape} of {result.dtype}, expected ({floats},) of float32")
    stride = max(1, floats // SLICE_FLOATS)
    expected = np.zeros(len(range(0, floats, stride)), np.float64)
    for index, part in enumerate(shares(count)):
        expected += part * update(index, floats)[::stride].astype(np.float64)
    worst = float(np.max(np.abs(result[::stride] - expected)))
    if not worst <= TOLERANCE:
        raise SystemExit(f"wrong result: {worst} away from the mean in double precision, {TOLERANCE} is allowed")
    return result[::stride].tolist()


def main() -> None:
    """Times the system and writes what came out."""
    system, size_bytes, count, runs, threads = sys.argv[1], *map(int, sys.argv[2:6])
    floats = size_bytes // 4
    run, to_numpy = PREPARE[system](floats, count, threads)
    begun = time.perf_counter()
    run()
    if time.perf_counter() - begun > SLOW_SECONDS:
        runs = min(runs, SLOW_RUNS)
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    result: object = None
    for _ in range(runs):
        # The last result is given back before the clock starts, not while it runs.
        result = None
        gc.collect()
        cpu_begun, begun = time.process_time(), time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begun)
        cpu_seconds.append(time.process_time() - cpu_begun)
    # Before the check: it makes the updates a second time.
    peak = peak_rss_bytes()
    measured = {
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": runs},
        "cpu_seconds": statistics.median(cpu_seconds),
        "peak_memory_bytes": peak,
        "slice": checked_slice(to_numpy(result), floats, count),
    }
    Path(sys.argv[6]).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
