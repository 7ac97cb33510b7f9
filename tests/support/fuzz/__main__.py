"""Runs many cases outside of CI: `make fuzz`, or `python -m support.fuzz --cases 1000000 ledger report`.

A case that a parser does not survive is printed, and added to the corpus, which CI tries first.
"""

import argparse
import base64
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

from support.fuzz.corpus import all_targets, corpus_file
from support.fuzz.mutations import mutated
from support.fuzz.target import Target


def fuzz(target: Target, cases: int, seconds: float, seed: int) -> tuple[int, set[str]]:
    """Return how many cases were tried, and the faults that were found, each kind once."""
    rng, found, began = random.Random(seed), set[str](), time.monotonic()
    for number in range(cases):
        if number % 256 == 0 and time.monotonic() - began > seconds:
            return number, found
        case = mutated(target.seeds, rng)
        try:
            target.check(case)
        except Exception as error:
            kind = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            if kind not in found and len(found) < 10:
                found.add(kind)
                print(f"  {target.name}: {kind}\n    {case[:200]!r}", flush=True)
                with corpus_file(target.name).open("a") as file:
                    file.write(base64.b64encode(case).decode() + "\n")
    return cases, found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1_000_000, help="cases for each parser")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="the most time for each parser")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("targets", nargs="*", help="parsers; by default all")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    failed = False
    memory = Path("/dev/shm")  # files of a case are read once
    place = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="asyncrl-fuzz-", dir=place) as folder:
        for target in all_targets(Path(folder)):
            if options.targets and target.name not in options.targets:
                continue
            began = time.monotonic()
            tried, found = fuzz(target, options.cases, options.seconds, options.seed)
            failed |= bool(found)
            seconds = time.monotonic() - began
            print(f"{target.name:24} {tried:>9} cases {seconds:7.1f} s  {len(found)} faults", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
