"""Kill a run, again and again: `python benchmarks/survival.py [--trials 200] [--cases ...] [--signals ...]`.

Short distillations of handwritten digits (lives.py), of kinds that differ in what is saved, evaluated, recorded,
streamed and uploaded and in the number of ranks, are run once to their ends. In each trial such a run is struck at a
random moment of its life and the same command is given again. Weights, moving average, losses, evaluations, recorded
teacher outputs and uploaded weights must then be those of the undisturbed run, bit for bit, with no process and no
temporary file left. Exit status 1 if one trial was not as promised.

How a run is struck:
  KILL      SIGKILL: the process, one of its ranks, its launcher or all at once, loader workers among them
  TERM      SIGTERM, to as many; it must save and end with status 75
  BOTH      SIGTERM, and up to 0.5 s later SIGKILL
  TWICE     the command is started a second time, which must be refused; then SIGKILL
  LAUNCHER  SIGKILL to `accelerate launch` or torchrun, real new processes; the run must take it for a SIGTERM

A moment is random in a random phase: before training, between saves, while saving, evaluating, at the end, uploading.
Most runs are forked from this process, which has imported everything; every eighth and every LAUNCHER is a new process
that is struck at any moment since its first import, half of them while it imports.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import lives
import psutil
from lives import DIGITS, FOLDER, HUB, ON_HUB, PHASES, ROOT, SHORT, STUDENT, TEACHER, distill, words


SIGNALS = {"KILL": 4, "TERM": 4, "BOTH": 3, "TWICE": 2, "LAUNCHER": 2}  # how often each, of 15
INSIDE = {"max_steps": 13, "save_steps": 4, "save_total_limit": 1}  # an epoch has 9 steps
BEST = {
    "save_strategy": "epoch",
    "eval_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
}
UPLOAD = {"push_to_hub": True, "hub_model_id": "user/student"}
WORKERS = {"dataloader_num_workers": 1}


class Case(NamedTuple):
    """A kind of run: what differs from lives.STUDENT, and what it does with teacher outputs."""

    keys: dict
    ranks: int = 1
    records: bool = False
    replays: bool = False


CASES = {
    "steps": Case({}),
    "epochs, best model, limit 1": Case(BEST),
    "ends inside an epoch, limit 1, evaluated": Case({**INSIDE, "eval_strategy": "steps", "eval_steps": 5}),
    "record, epochs, limit 1": Case({"save_strategy": "epoch", "save_total_limit": 1}, records=True),
    "replay": Case({}, replays=True),
    "upload, evaluated": Case({**UPLOAD, **INSIDE, "hub_strategy": "end", "eval_strategy": "epoch"}),
    "upload of each checkpoint": Case({**UPLOAD, "hub_strategy": "every_save"}),
    "streamed": Case(ON_HUB),
    "streamed, record, ends inside an epoch": Case({**ON_HUB, **INSIDE}, records=True),
    "streamed, replay, best model, limit 1": Case({**ON_HUB, **BEST}, replays=True),
    "two ranks": Case(WORKERS, ranks=2),
    "two ranks, best model, limit 1": Case({**WORKERS, **BEST}, ranks=2),
    "two ranks, streamed, record, inside an epoch": Case({**WORKERS, **ON_HUB, **INSIDE}, ranks=2, records=True),
    "two ranks, replay, upload": Case({**WORKERS, **UPLOAD, **INSIDE}, ranks=2, replays=True),
}


class Run:
    """A command line of a case, in an output_dir of its own."""

    def __init__(self, case: Case, name: str, **more):
        self.case, self.output, self.log = case, FOLDER / name, FOLDER / f"{name}.log"
        self.record = FOLDER / f"{name} record" if case.records else None
        keys = {"dataset_name": DIGITS, "teacher": TEACHER, **SHORT, **STUDENT, **case.keys, **more}
        keys |= {"hidden_size": 32, "num_hidden_layers": 2, "per_device_train_batch_size": 64 // case.ranks}
        keys |= {"num_train_epochs": 2}  # of 9 steps
        if self.record is not None:
            keys["teacher_record"] = self.record
        recipe = str(ROOT / "recipes/quickstart.yaml")
        self.arguments = [recipe, *words(**keys, output_dir=self.output)]
        self.forget()

    def forget(self) -> None:
        """All that the run has left: files, a log, a repository on the Hub."""
        lives.remove(self.output, *filter(None, [self.record]))
        self.log.write_text("")
        HUB.repositories.pop(("model", "user/student"), None)
        HUB.requests.clear()

    def start(self):
        return lives.start(distill.main, self.arguments, self.log, self.case.ranks)

    def fresh(self, launcher: bool):
        return lives.fresh(self.arguments, self.log, self.case.ranks, launcher)

    def finish(self) -> float:
        return lives.finish(distill.main, self.arguments, self.log, self.case.ranks)

    def outcome(self) -> dict[str, dict]:
        return lives.outcome(self.output, self.record, "user/student" if "push_to_hub" in self.case.keys else None)

    @property
    def steps(self) -> int:
        """As many as the log knows of."""
        return self.log.read_text(errors="replace").count("{'loss':")

    @property
    def last_checkpoint(self) -> int:
        return max((int(path.name.split("-")[1]) for path in self.output.glob("checkpoint-*")), default=0)

    @property
    def finished(self) -> bool:
        return (self.output / "trainer_state.json").exists()

    def place(self, steps: int) -> str:
        """Where a new process is, seen from outside."""
        said = self.log.read_text(errors="replace")
        if "images" not in said:  # the summary of the images is the first thing that is said
            return "importing"
        if any((self.output / "_unfinished").glob("*")):
            return "while saving"
        if any(request.method in ("POST", "PUT") and "preupload" in request.path for request in HUB.requests):
            return "uploading"
        done = self.steps
        return "before training" if not done else "between saves" if done < steps else "at the end"


class Reference:
    """The undisturbed run of a case, and the times at which it entered and left each phase."""

    def __init__(self, case: Case):
        more = {}
        if case.replays:
            source = Run(case._replace(records=True, replays=False), "recording")
            source.finish()
            more["teacher_replay"] = source.record.rename(FOLDER / f"replayed {len(list(FOLDER.glob('replayed*')))}")
        self.run = Run(case, "run", **more)
        begin, process = time.perf_counter(), self.run.start()
        self.visits: list[tuple[str, float]] = []  # of phases, and their seconds
        here, since = "", begin
        while process.is_alive():
            if (now := lives.phase()) != here:
                self.visits += [(here, time.perf_counter() - since)] * bool(here)
                here, since = now, time.perf_counter()
            time.sleep(0.0005)
        self.seconds = time.perf_counter() - begin
        if process.exitcode:
            raise RuntimeError(
                f"the undisturbed run ended with {process.exitcode}: {self.run.log.read_text()[-3000:]}"
            )
        self.visits.append((here, time.perf_counter() - since))
        self.outcome, self.steps = self.run.outcome(), self.run.steps
        lives.all_gone(20)

    def moment(self, chance: random.Random) -> tuple[str, int, float]:
        """A random moment of a random phase: its name, at which of its visits, and seconds in it."""
        name = chance.choice(sorted({name for name, _ in self.visits}))
        durations = [seconds for phase, seconds in self.visits if phase == name]
        visit = chance.randrange(len(durations))
        return name, visit, chance.uniform(0, durations[visit])


def wait_for(process, name: str, visit: int, seconds: float) -> None:
    """Returns at that moment, or when the process has ended."""
    here, seen = "", -1
    while process.is_alive():
        if (now := lives.phase()) != here:
            here = now
            seen += here == name
            if seen == visit:
                break
        time.sleep(0.0002)
    process.join(seconds)


def send(process, number: int, ranks: int, chance: random.Random) -> str:
    """To the process, its launcher, one rank or all there are. Returns whom."""
    whom = chance.choice(["launcher", "rank", "all"] if ranks > 1 else ["process", "all"])
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if whom == "all":
            os.killpg(process.pid, number)
            if ranks > 1:  # torchrun's ranks have sessions of their own
                for child in psutil.Process(process.pid).children():
                    child.send_signal(number)
        elif whom == "rank" and (children := psutil.Process(process.pid).children()):
            chance.choice(children).send_signal(number)
        else:
            os.kill(process.pid, number)
    return whom


def strike(process, run: Run, how: str, chance: random.Random) -> list[str]:
    """Strikes now. Returns what was not as promised."""
    ranks, problems = run.case.ranks, []
    if how == "TWICE" and (run.output / "_lock").exists():
        second = run.start()
        second.join(120)
        if second.exitcode != 1 and process.is_alive():
            problems.append(f"a second run ended with {second.exitcode}")
    if how == "LAUNCHER":
        return strike_launcher(process, run)
    number = signal.SIGTERM if how in ("TERM", "BOTH") else signal.SIGKILL
    whom = send(process, number, ranks, chance)
    if how == "BOTH":
        process.join(chance.uniform(0, 0.5))
        send(process, signal.SIGKILL, ranks, chance)
    process.join(120)
    if process.is_alive():
        for hung in lives.family():
            with suppress(psutil.NoSuchProcess):
                hung.send_signal(signal.SIGUSR1)  # a forked one writes its stack
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
        return [*problems, f"hung after {how} to {whom}"]
    status = process.exitcode
    if ranks > 1:  # the launcher's own
        return problems + ["status 0 of an unfinished run"] * (status == 0 and not run.finished)
    allowed = {os.EX_TEMPFAIL} if number == signal.SIGTERM else {-signal.SIGKILL}
    if how == "BOTH":
        allowed |= {-signal.SIGKILL}
    if not run.log.read_text():  # Python itself was starting
        allowed.add(-number)
    return problems + [f"status {status} after {how} to {whom}"] * (status not in allowed and not run.finished)


def strike_launcher(launcher, run: Run) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(launcher.pid).children()
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.join()
        statuses, end = {}, time.monotonic() + 60
        while len(statuses) < len(ranks) and time.monotonic() < end:
            statuses |= {rank.pid: status for rank in ranks if (status := lives.bury(rank.pid)) is not None}
            time.sleep(0.02)
        if len(statuses) < len(ranks):
            return [f"{len(ranks) - len(statuses)} ranks outlived their launcher by a minute"]
        early = {-signal.SIGTERM} if run.place(0) == "importing" else set()  # Python itself was starting
        wrong = set(statuses.values()) - {os.EX_TEMPFAIL} - early - ({0} if run.finished else set())
        return [f"status {status} after the launcher's death" for status in wrong]
    return []


def trial(reference: Reference, how: str, is_new: bool, chance: random.Random, import_seconds: float) -> dict | None:
    """One strike and what came of it; None if it came too late, after the run's end."""
    run = reference.run
    run.forget()
    for path in lives.TEMPORARY.iterdir():
        path.unlink() if path.is_file() else lives.remove(path)
    if is_new:
        process = run.fresh(launcher=how == "LAUNCHER")
        process.join(chance.uniform(0, import_seconds + chance.choice((0, reference.seconds))))
        met = run.place(reference.steps)
    else:
        process = run.start()
        wait_for(process, *reference.moment(chance))
        met = lives.phase()
    problems = strike(process, run, how, chance)
    if run.finished:
        lives.all_gone(20)
        return None
    # A lone killed process leaves its loader's workers a few seconds, in which the command may well come again.
    if run.case.ranks > 1 or how == "LAUNCHER":
        problems += [f"{process} outlived the strike" for process in lives.all_gone(60)]
    steps, kept = run.steps, run.last_checkpoint
    if (
        how == "TERM"
        and met in ("between saves", "while saving", "evaluating")
        and run.case.ranks == 1
        and kept < steps
    ):
        problems.append(f"SIGTERM lost {steps - kept} steps")
    run.log.rename(first := run.log.with_suffix(".first.log"))
    run.log.write_text("")
    try:
        run.finish()
        problems += lives.differences(reference.outcome, run.outcome())
    except (RuntimeError, OSError, ValueError) as error:
        problems.append(f"the same command again: {error}")
    left = lives.all_gone(30)
    for process in left:
        problems.append(f"left behind: {process}")
        process.kill()
    temporary = [path.name for path in lives.TEMPORARY.iterdir()]
    if problems:
        print(first.read_text()[-3000:], run.log.read_text()[-3000:], sep="\n---\n", file=sys.stderr, flush=True)
    return {
        "signal": how,
        "new_process": is_new,
        "met": met,
        "steps_lost": max(0, steps - kept),
        "problems": problems,
        "left_processes": len(left),
        "left_in_tmp": temporary,
    }


def table(trials: list[dict]) -> str:
    """For each case and signal: how many kills, how many equal, and where they met the run."""
    places = ("importing", *PHASES)
    lines = ["| run | signal | kills | equal | " + " | ".join(places) + " |", "|---|---|" + "---|" * (2 + len(places))]
    cells = {(one["case"], one["signal"]): [] for one in trials}
    for one in trials:
        cells[one["case"], one["signal"]].append(one)
    order = {name: number for number, name in enumerate([*CASES, *SIGNALS])}
    rows = [(*cell, cells[cell]) for cell in sorted(cells, key=lambda cell: (order[cell[0]], order[cell[1]]))]
    for case, how, ones in [*rows, ("all", "", trials)]:
        met = Counter(one["met"] for one in ones)
        counts = [len(ones), sum(not one["problems"] for one in ones), *(met[place] or "" for place in places)]
        lines.append(f"| {case} | {how} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="spread over the cases and signals")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS), metavar="SIGNAL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="share the cases among so many processes")
    parser.add_argument("--json", type=Path, help="write every trial here")
    args = parser.parse_args()
    if args.jobs > 1:
        return report(in_parallel(args), args.trials, args.json)
    return report(survive(args), args.trials, args.json)


def in_parallel(args: argparse.Namespace) -> dict:
    """The results of several processes of this script, each with some of the cases."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for number in range(args.jobs):
            cases = args.cases[number :: args.jobs]
            before = sum(len(args.cases[earlier :: args.jobs]) for earlier in range(number))
            trials = (before + len(cases)) * args.trials // len(args.cases) - before * args.trials // len(args.cases)
            words = ["--trials", trials, "--seed", args.seed * 1000 + number, "--json", f"{folder}/{number}.json"]
            command = [sys.executable, __file__, *words, "--cases", *cases, "--signals", *args.signals]
            jobs.append(subprocess.Popen([*map(str, command)]))
        for job in jobs:
            job.wait()
        parts = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    whole = {"seed": args.seed, "trials": [trial for part in parts for trial in part["trials"]]}
    whole["different_if_new"] = [name for part in parts for name in part["different_if_new"]]
    whole["too_late"] = sum(part["too_late"] for part in parts)
    return whole | {"minutes": max(part["minutes"] for part in parts)}


def survive(args: argparse.Namespace) -> dict:
    chance, begin, trials, late = random.Random(args.seed), time.monotonic(), [], 0
    lives.prepare()

    new, seconds = Run(CASES["steps"], "run"), time.monotonic()
    process = new.fresh(launcher=False)
    process.join()
    seconds, expected = time.monotonic() - seconds, new.outcome()
    steps = Reference(CASES["steps"])
    different = lives.differences(expected, steps.outcome)
    import_seconds = seconds - steps.seconds
    print(f"a new process: {seconds:.1f} s, a forked one {steps.seconds:.1f} s; different: {different or 'nothing'}")

    references = {}
    for name in args.cases:
        references[name] = reference = Reference(CASES[name])
        print(f"{name}: {reference.steps} steps, {reference.seconds:.1f} s undisturbed", flush=True)
    signals = [name for name in args.signals for _ in range(SIGNALS[name])]
    deck: list[str] = []
    while len(trials) < args.trials:
        name = args.cases[len(trials) % len(args.cases)]
        deck = deck or chance.sample(signals, len(signals))
        is_new = deck[-1] == "LAUNCHER" or len(trials) % 8 == 7
        one = trial(references[name], deck[-1], is_new, chance, import_seconds)
        if one is None:
            late += 1
            continue
        trials.append({"case": name, **one})
        verdict = "; ".join(one["problems"])[:300] or "equal"
        line = f"{len(trials):>4} {'new' if is_new else '':<4}{deck.pop():<9}{one['met']:<16}"
        print(f"{line}{one['steps_lost']:>2} steps again  {verdict}  ({name})", flush=True)
        result = {"seed": args.seed, "too_late": late, "different_if_new": different, "trials": trials}
        result["minutes"] = (time.monotonic() - begin) / 60
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))
    HUB.__exit__()
    return result


def report(result: dict, wanted: int, file: Path | None) -> int:
    """Prints the table, writes the file and returns the exit status."""
    trials = result["trials"]
    left, files = sum(one["left_processes"] for one in trials), sum(len(one["left_in_tmp"]) for one in trials)
    equal = sum(not one["problems"] for one in trials)
    print(table(trials))
    print(f"{equal} of {len(trials)} as if nothing had happened; {result['too_late']} strikes more came after the end")
    print(f"{left} processes left, {files} files in the temporary directory; {result['minutes']:.0f} minutes")
    if file:
        file.write_text(json.dumps(result, indent=1))
    return int(equal < wanted or bool(result["different_if_new"]))


if __name__ == "__main__":
    sys.exit(main())
