"""Change whole files at random, and read them: `python tests/fuzz/fuzz.py [--minutes 1] [--target NAME]`.

Each target runs in a process of its own with a limit of memory; hypothesis chooses the changes, and makes a crasher
as small as it can. A crasher is printed and kept beside this file in `crashers/`, to become a test.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


sys.path.insert(0, str(Path(__file__).parent))
from targets import MAX_BYTES, MAX_SECONDS, TARGETS, Target

from hf_deit.errors import UserError


CRASHERS = Path(__file__).with_name("crashers")


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes], words: tuple[bytes, ...]) -> bytes:
    """A whole file with up to six changes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 6)))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("set", "bit", "cut", "insert", "delete", "repeat", "number", "word")))
        if kind == "cut":
            del data[at:]
        elif kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.sampled_from((1, 2, 100)))
        elif kind == "number":
            size = draw(st.sampled_from((1, 2, 4, 8)))
            value = draw(st.sampled_from((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)))
            data[at : at + size] = value.to_bytes(size, draw(st.sampled_from(("big", "little"))))
        elif words:
            data[at:at] = draw(st.sampled_from(words))
    return bytes(data)


def read(target: Target, data: bytes) -> bool:
    """Read a changed file; True if it was read, False if it was refused. Anything else raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, target.name)
        path.write_bytes(data)
        start = time.process_time()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                target.read(path)
            done = True
        except UserError as error:
            assert "\n" not in str(error) and "\x1b" not in str(error), f"not one line: {str(error)[:200]!r}"
            done = False
        except SystemExit:  # argparse, about the value of an option
            done = False
        assert time.process_time() - start < MAX_SECONDS, "took too long"
    return done


def run(name: str, minutes: float, examples: int) -> None:
    """Fuzz one target in this process, a whole number of rounds."""
    target, counts = TARGETS[name], {True: 0, False: 0}
    seeds = target.seeds()
    with contextlib.suppress(AssertionError):
        read(target, seeds[0])  # imports what it needs
    for seed in seeds:
        assert read(target, seed), "a whole file is refused"
    _limit_memory()
    last = CRASHERS / f"{name.replace(' ', '_')}.last"
    CRASHERS.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * minutes

    def alarm(*_: object) -> None:
        raise AssertionError("took too long")

    signal.signal(signal.SIGPROF, alarm)  # of the process's own time, which a busy machine does not lengthen
    signal.signal(signal.SIGALRM, alarm)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(changed(seeds, target.words))
    def fuzz(data: bytes) -> None:
        last.write_bytes(data)  # survives a crash of the interpreter
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        signal.alarm(10 * MAX_SECONDS)  # whoever waits uses no time
        try:
            counts[read(target, data)] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    fuzz()
    while time.monotonic() < end:
        fuzz()
    last.unlink(missing_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {sum(counts.values()):,} inputs, {counts[True]:,} read, {counts[False]:,} refused, {peak:.2f} GB")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Run the targets in turn, each in a process of its own; the status is the number of those that crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--examples", type=int, default=200, help="of a round; rounds follow until the time is over")
    parser.add_argument("--target", choices=TARGETS)
    options = parser.parse_args()
    if options.target:
        faulthandler.enable()
        return run(options.target, options.minutes, options.examples)
    failed = []
    for name in TARGETS:
        words = ["--minutes", str(options.minutes), "--examples", str(options.examples), "--target", name]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            failed.append(name)
            print(f"{name}: CRASH (status {done.returncode})\n{done.stderr[-3000:]}", flush=True)
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
