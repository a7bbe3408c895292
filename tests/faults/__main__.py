"""Run the faults and print a line for each; exits with 1 where one did not hold."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tiny import save

from faults import disk, kills, numbers, outside, suites
from faults.tools import Bench, Outcome, outcomes
from sae.memory import keep_freed_memory

FAULTS: dict[str, tuple[str, Callable[[Bench], Iterator[Outcome]]]] = {
    "F1": ("kill -9 at random moments", kills.kill_9),
    "F2": ("a crash at every step of a save", kills.crash_points),
    "F3": ("kills within an epoch and across", kills.same_tokens),
    "F4": ("SIGTERM, SIGINT, both twice, time", kills.signals),
    "F5": ("files damaged at random", disk.damages),
    "F6": ("no room on the disk", disk.no_room),
    "F7": ("numbers that are none", numbers.injected),
    "F7b": ("a skipped batch is as if never there", numbers.again),
    "F8": ("three losses that jump", numbers.spikes),
    "F9": ("out of memory", suites.out_of_memory),
    "F10": ("memory of the scan", outside.scan_memory),
    "F12": ("wandb broken in five ways", outside.wandb),
    "F13": ("a data server that fails", outside.flaky_server),
    "F14": ("two writers, a reader", kills.one_writer),
    "S1": ("pickles that would run", suites.canaries),
    "S2": ("calls that would run foreign code", suites.banned_calls),
    "S3": ("hostile files", suites.hostile_files),
    "S4": ("hostile text", suites.hostile_text),
    "B1": ("bad input", suites.bad_input),
    "B2": ("tokenizers and hooks of all kinds", suites.matrices),
    "D1": ("golden losses", suites.golden),
    "D2": ("one config twice", kills.stream_is_plan),
}


def main() -> int:
    """The table; the exit code."""
    parser = argparse.ArgumentParser(prog="faults")
    parser.add_argument("--long", action="store_true", help="the release column")
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="these alone")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the schedule")
    args = parser.parse_args()
    torch.set_num_threads(1)  # forked processes have no threads of their parent's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    keep_freed_memory()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of damaged checkpoints, which are damaged on purpose
    print(f"seed {args.seed}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    print(f"{'':4} {'fault':38} {'tried':>6} {'held':>6} {'skipped':>8} {'seconds':>8}", flush=True)
    failed = [name for name in args.only or FAULTS if not _try(name, args)]
    print(f"not held: {', '.join(failed)}" if failed else "all held or skipped")
    return 1 if failed else 0


def _try(name: str, args: argparse.Namespace) -> bool:
    """One line, and what did not hold below it; whether all of it held or was skipped."""
    title, fault = FAULTS[name]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(save(Path(folder)), random.Random(f"{args.seed} {name}"), args.long)
        tried, held, skipped, why = outcomes(fault(bench))
    seconds = time.perf_counter() - started
    print(f"{name:4} {title:38} {tried:6} {held:6} {skipped:8} {seconds:8.0f}", flush=True)
    for line in dict.fromkeys(why):
        print(f"       {line}"[:200], flush=True)
    return tried > 0 and held + skipped == tried


if __name__ == "__main__":
    sys.exit(main())
