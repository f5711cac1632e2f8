"""The command line. It needs the standard library alone, so that `run` can check it before anything is installed."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHES = ["aggregate", "round"]
AGGREGATION_SYSTEMS = ["numpy", "numpy-blocked", "torch", "flower", "flare", "flare-torch"]
SYSTEMS = ["lifl", *AGGREGATION_SYSTEMS, "flower-deployed"]
# Flower as processes that speak HTTP takes many times as long as its simulation: only for those who ask for it.
DEFAULT_SYSTEMS = SYSTEMS[:-1]
MB = 10**6


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers; 44M and 4k are understood."""
    found = []
    for word in text.split(","):
        value = word.strip().lower().replace("m", "e6").replace("k", "e3")
        try:
            number = int(float(value))
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"`{word}` is no number: 44M, 44000000 and 4k are") from None
        if number < 1:
            raise argparse.ArgumentTypeError(f"`{word}` is less than 1")
        found.append(number)
    return found


def names(known: list[str]) -> Callable[[str], list[str]]:
    """Reads a comma-separated list of names out of those that are known."""

    def read(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",")]
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"`{word}` is none of {', '.join(known)}")
        return chosen

    return read


def parse() -> argparse.Namespace:
    """The options, checked, with their defaults filled in."""
    parser = argparse.ArgumentParser(
        prog="run",
        allow_abbrev=False,
        description="Measures LIFL and its peers side by side on this machine. The report, in Markdown, goes to standard "
        "output, progress to standard error.",
        epilog="example: benches/peers/run --quick > report.md. The first run makes target/peers-venv, which takes minutes. "
        "exit codes: 0 done, 1 a case failed or a result was wrong, 2 the command line is wrong, 3 something is missing, "
        "130 interrupted.",
    )
    option = parser.add_argument
    option(
        "--quick", action="store_true", help="44 MB only (and 4 kB), K of 2 and 8, rounds of 8 clients: below 3 minutes"
    )
    option("--benches", type=names(BENCHES), default=BENCHES, metavar="LIST", help="aggregate, round (default: both)")
    option(
        "--systems",
        type=names(SYSTEMS),
        default=DEFAULT_SYSTEMS,
        metavar="LIST",
        help=f"which of {', '.join(SYSTEMS)} (default: all but the last, which is slow); "
        "whole rounds are for lifl, flower, flower-deployed and flare",
    )
    option("--bytes", type=numbers, metavar="LIST", help="sizes of an update (default: 44M,83M,232M)")
    option("--updates", type=numbers, metavar="LIST", help="K, the updates of one mean (default: 2,8,32)")
    option(
        "--round-bytes",
        type=numbers,
        metavar="LIST",
        help="sizes in whole rounds (default: 4k,44M,232M; 4k shows what a round takes without bytes)",
    )
    option("--clients", type=numbers, metavar="LIST", help="clients in a whole round (default: 2,8,16)")
    option("--levels", type=numbers, default=[1, 3], metavar="LIST", help="LIFL's levels of aggregators (default: 1,3)")
    option("--rounds", type=int, default=5, metavar="N", help="rounds, the first of which is left out (default: 5)")
    option(
        "--runs",
        type=int,
        default=7,
        metavar="N",
        help="runs of each mean after a warm-up; 3 if one takes over 5 s (default: 7)",
    )
    option(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads of those systems that can have more than one (default: one for each core)",
    )
    option("--timeout", type=float, default=900, metavar="SECONDS", help="what one case may take (default: 900)")
    option("--without-torch", action="store_true", help="install and measure no PyTorch: saves most of the download")
    option(
        "--lifl",
        type=Path,
        default=ROOT / "target/release/lifl",
        metavar="FILE",
        help="LIFL's binary (default: target/release/lifl)",
    )
    option("--json", type=Path, metavar="FILE", help="write the raw numbers there, too")
    chosen = parser.parse_args()

    for name, least in (("rounds", 3), ("runs", 5), ("threads", 1), ("timeout", 1)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name}: at least {least}")
    if chosen.without_torch:
        chosen.systems = [system for system in chosen.systems if "torch" not in system]
    chosen.bytes = chosen.bytes or ([44 * MB] if chosen.quick else [44 * MB, 83 * MB, 232 * MB])
    chosen.updates = chosen.updates or ([2, 8] if chosen.quick else [2, 8, 32])
    chosen.round_bytes = chosen.round_bytes or ([4_000, 44 * MB] if chosen.quick else [4_000, 44 * MB, 232 * MB])
    chosen.clients = chosen.clients or ([8] if chosen.quick else [2, 8, 16])
    for name in ("bytes", "round_bytes"):
        if any(value % 4 for value in getattr(chosen, name)):
            parser.error(f"--{name.replace('_', '-')}: updates are of 4-byte numbers, so sizes are multiples of 4")
    if chosen.json and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.absolute().parent}")
    chosen.lifl = chosen.lifl.absolute()
    return chosen


if __name__ == "__main__":
    parse()
