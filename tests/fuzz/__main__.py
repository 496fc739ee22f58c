"""Random calls until the time is over: python -m tests.fuzz --minutes 480 --seed 7.

Each fault is printed once, shrunk, as code that shows it; the process then goes on, and fails at the end.
"""

import argparse
import secrets
import sys
import time
import warnings
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis.errors import Flaky, Unsatisfiable

from po_kernels.backends.contract import OPS

from .calls import Call, FaultError, calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=480)
    parser.add_argument("--seed", type=int, default=None, help="a random one by default, which is printed")
    parser.add_argument("--op", choices=tuple(OPS), help="all by default")
    options = parser.parse_args()
    start = secrets.randbits(32) if options.seed is None else options.seed
    print(f"--seed {start}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known: set[tuple[str, ...]] = set()
    count: Counter[str] = Counter()
    last: list[Call] = []
    end = time.monotonic() + 60 * options.minutes

    def run(call: Call) -> None:
        assume(_kind(call) not in known and time.monotonic() < end)
        count[call.transform] += 1
        try:
            call.check()
        except FaultError:
            last[:] = [call]
            raise

    number = start
    while time.monotonic() < end:
        # Given anew in each round: a function keeps the random numbers of its first.
        try:
            settings(
                max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink), print_blob=False, report_multiple_bugs=False,
            )(seed(number)(given(calls(options.op))(run)))()  # fmt: skip
        except Unsatisfiable:  # the time is over
            pass
        except (FaultError, Flaky) as fault:
            print(f"\n{type(fault).__name__}: {fault}", flush=True)
            known.add(_kind(last[0]))
        number += 1
    print(f"\n{sum(count.values())} calls, of which {dict(count)}; {len(known)} kinds of fault", flush=True)
    return len(known) > 0


def _kind(call: Call) -> tuple[str, ...]:
    return call.op, call.backend, call.transform, str(call.drawn.get("estimator"))


if __name__ == "__main__":
    sys.exit(main())
