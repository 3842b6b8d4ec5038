"""Attack the commands with damaged files, kills, signals and odd surroundings; count what falls.

    python tests/benchmarks/siege.py [--trials 2000] [--seed 0] [--kinds damaged,kill] [--log FILE]

Each trial forks a process that runs one command in a copy of a small project. It may end with a
documented exit code and one sentence, within 2 GB and a minute, and must leave every file whole.
The seed and the trial's number decide everything else. With --log, finished trials are kept in a
file and not repeated. A hundred trials take about half a minute on one core.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_project import ddq, make_project

from ddqcli.cli.run_command import interrupt_again

MEMORY = 2 << 30  # bytes more than the parent has
SECONDS = 60
CODES = {0, 1, 2, 3, 4}
FILE, RUN = "file.safetensors", "runs/done"
# What each file is read by. Of these commands none may pass a file that was changed.
READERS = {
    "model.pt": ["inspect model.pt -o out", "finetune --dry-run"],
    "model.safetensors": [
        "inspect model.safetensors -o out",
        "finetune model.safetensors --dry-run",
    ],
    "ddq.yaml": ["finetune --dry-run"],
    "images.npz": ["finetune --max-steps 0 --run-dir runs/new -q"],
    FILE: [f"export --check {FILE}", f"report {FILE} --md", f"inspect {FILE} -o out"],
    f"{RUN}/final.pt": ["export -o out.safetensors", f"inspect {RUN} -o out"],
    f"{RUN}/report.json": ["report --csv", "report --html out.html", "export -o out.safetensors"],
    f"{RUN}/recipe.yaml": ["export -o out.safetensors", f"finetune --resume --run-dir {RUN} -q"],
    f"{RUN}/metrics.jsonl": ["report --html out.html", f"inspect {RUN} -o out"],
    f"{RUN}/last.pt": [f"finetune --resume --run-dir {RUN} -q"],
    f"{RUN}/.ddq": ["report", "export", f"finetune --resume --run-dir {RUN} -q"],
}
WRITERS = {
    "export": f"{RUN}/model.safetensors",
    "export -o out.safetensors": "out.safetensors",
    "report --html out.html": "out.html",
    "finetune --max-steps 0 --run-dir runs/new -q": "runs/new/recipe.yaml",
}
SURROUNDINGS: dict[str, list[str | None]] = {
    "RANK": [None, "0", "1", "x"],
    "WORLD_SIZE": [None, "1", "2", "", "x"],
    "HOME": [None, "/dev/null", "/"],
    "XDG_STATE_HOME": [None, "/dev/null", "relative", "/proc"],
    "COLUMNS": [None, "0", "1", "x", "9999"],
    "NO_COLOR": [None, "1"],
    "TERM": [None, "dumb"],
    "DDQ_TRUST": [None, "0", "1"],
    "OMP_NUM_THREADS": [None, "1"],
}


@dataclass(frozen=True)
class Outcome:
    """The end of a command."""

    code: int  # minus the signal that ended it
    out: str
    err: str

    def fault(self, codes: set[int] = CODES) -> str:
        """Return what must not be, or ""."""
        if self.code not in codes:
            return f"exit code {self.code}: {self.err[-200:]}"
        if "Traceback" in self.err or "Exception ignored" in self.err or "--debug" in self.err:
            return f"unforeseen: {self.err[-200:]}"
        if self.code > 0 and not self.err.strip():
            return f"exit code {self.code} without a word"
        return ""


def run(command: str, before: Callable[[], object] = lambda: None, after: float = 0.0) -> Outcome:
    """Run `ddq COMMAND` in a fork; send it SIGTERM after so many seconds, unless that is 0."""
    out, err = Path("stdout.txt"), Path("stderr.txt")
    child = os.fork()
    if not child:
        code = 99
        try:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            signal.alarm(SECONDS)
            sys.unraisablehook = interrupt_again  # as `main` does
            before()
            answer = ddq(*command.split())
            os.write(1, answer.out.encode())
            os.write(2, answer.err.encode())
            code = answer.code
        finally:
            os._exit(code)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    return Outcome(code, *texts)


# ---- kinds of trials: each returns a fault, or ""


def damaged(draw: random.Random) -> str:
    """Change some bytes of a file that is read."""
    name = draw.choice(list(READERS))
    before = Path(name).read_bytes()
    Path(name).write_bytes(mutated(before, draw))
    return judged_by_readers(name, Path(name).read_bytes() != before, draw)


def forged(draw: random.Random) -> str:
    """Change a file under right checksums."""
    name = draw.choice([FILE, f"{RUN}/report.json", f"{RUN}/final.pt", "model.pt"])
    path = Path(name)
    before = path.read_bytes()
    if name == FILE:
        path.write_bytes(forged_artifact(before, draw))
    elif name.endswith(".json"):
        report = json.loads(before)
        del report["checksum"]
        changed(report, draw)
        digest = hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**report, "checksum": digest}))
    else:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        victim = next(record for record in records if record.endswith("data.pkl"))
        records[victim] = mutated(records[victim], draw)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for record, content in records.items():
                archive.writestr(record, content)
    return judged_by_readers(name, path.read_bytes() != before, draw)


def judged_by_readers(name: str, differs: bool, draw: random.Random) -> str:
    command = draw.choice(READERS[name])
    outcome = run(command)
    if fault := outcome.fault():
        return f"{command} with {name}: {fault}"
    if name == FILE and differs and command.startswith("export --check") and outcome.code == 0:
        return f"{command} passed a changed file"
    return ""


def kill(draw: random.Random) -> str:
    """Kill a command at one of its calls for a file; what was there before or after is there."""
    command = draw.choice(list(WRITERS))
    target = Path(WRITERS[command])
    old = target.read_bytes() if target.exists() else None
    moment = int(draw.expovariate(0.05))

    def die_at_moment() -> None:
        seen, here = iter(range(10**9)), os.getcwd()

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.mkdir"):
                path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
                if os.path.abspath(path).startswith(here) and next(seen) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    outcome = run(command, die_at_moment)
    if fault := outcome.fault({0, -signal.SIGKILL}):
        return f"{command} killed at {moment}: {fault}"
    found = target.read_bytes() if target.exists() else None
    if found != old and target.suffix == ".safetensors" and run(f"export --check {target}").code:
        return f"{command} killed at {moment} left a file that is neither old nor new"
    if found != old and target.suffix == ".html" and not found.endswith(b"</html>\n"):
        return f"{command} killed at {moment} left half a page"
    again = run(command if "runs/new" not in command else f"{command} --resume")
    codes = {0, 2} if "runs/new" in command else {0}
    return f"again after a kill at {moment}: {again.fault(codes)}" if again.fault(codes) else ""


def stop(draw: random.Random) -> str:
    """Send SIGTERM at a random time."""
    command = draw.choice(["finetune --run-dir runs/new -q", *WRITERS, *READERS["model.pt"]])
    seconds = draw.uniform(0.001, 1.5)
    try:
        outcome = run(command, after=seconds)
    except ProcessLookupError:
        return ""
    # Before the command has set its handler, the signal ends the process.
    fault = outcome.fault({0, 143, -signal.SIGTERM})
    return f"{command} stopped after {seconds:.3f} s: {fault}" if fault else ""


def surroundings(draw: random.Random) -> str:
    """Set variables at random."""
    command = draw.choice([*WRITERS, "report", "report --json", "finetune --dry-run", "--help"])
    values = {name: draw.choice(choices) for name, choices in SURROUNDINGS.items()}

    def set_variables() -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    fault = run(command, set_variables).fault()
    return f"{command} with {values}: {fault}" if fault else ""


KINDS = {kind.__name__: kind for kind in (damaged, forged, kill, stop, surroundings)}


# ---- mutations


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return the content with bits flipped, cut, overwritten, repeated or swapped."""
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        if not raw:
            break
        place, length = draw.randrange(len(raw)), int(draw.expovariate(0.1)) + 1
        way = draw.randrange(7)
        if way == 0:
            raw[place] ^= 1 << draw.randrange(8)
        elif way == 1:
            del raw[place:]
        elif way == 2:
            del raw[place : place + length]
        elif way == 3:
            raw[place : place + length] = draw.randbytes(length)
        elif way == 4:
            raw[place : place + length] = bytes(length)
        elif way == 5:
            raw[place:place] = raw[place : place + length] * draw.choice((1, 10))
        else:
            raw[place : place + 1] = draw.choice((b"\xff", b"\n", b"-1", b"{", b"[[", b"1e999"))
    return bytes(raw)


def changed(tree: Any, draw: random.Random) -> None:
    """Replace, remove or add something at a random place of a JSON value, in place."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.7:
            tree = tree[key]
            continue
        values = [None, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 10**4, [], {}, True, [[[]]]]
        if draw.random() < 0.2:
            del tree[key]
        elif isinstance(tree, dict) and draw.random() < 0.2:
            tree[draw.choice(["", "\x1b[2J", "[/x]", "name", "0"])] = draw.choice(values)
        else:
            tree[key] = draw.choice(values)
        return


def forged_artifact(raw: bytes, draw: random.Random) -> bytes:
    """Change a ddq file's manifest, header or data, and set its digest."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:start]), raw[start:]
    way = draw.randrange(3)
    if way == 0:
        first, last = header["manifest"]["data_offsets"]
        manifest = json.loads(bz2.decompress(data[first:last]))
        changed(manifest, draw)
        packed = bz2.compress(json.dumps(manifest).encode())
        data = data[:first] + packed + data[last:]
        shift = len(packed) - (last - first)
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= last:
                entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
        header["manifest"] |= {"data_offsets": [first, last + shift], "shape": [len(packed)]}
    elif way == 1:
        metadata = header.pop("__metadata__")
        changed(header, draw)
        header = {"__metadata__": metadata, **header}
    else:
        data = mutated(data, draw)
    text = json.dumps(header, separators=(",", ":")).encode()
    result = bytearray(len(text).to_bytes(8, "little") + text + data)
    result[50:114] = b"0" * 64
    result[50:114] = hashlib.sha256(result).hexdigest().encode()
    return bytes(result)


# ---- the siege


def make_target(folder: Path) -> Path:
    """Make a project with a finished run, an exported file, and weights as safetensors."""
    import torch
    from safetensors.torch import save_file

    for module in ("commands.finetune", "commands.export", "inspection.trained_page"):
        importlib.import_module(f"ddqcli.{module}")  # once, and not in each fork
    make_project(folder)
    here = Path.cwd()
    os.chdir(folder)
    try:
        save_file(torch.load("model.pt", weights_only=True), "model.safetensors")
        for command in (f"finetune --run-dir {RUN} -q", f"export -o {FILE}"):
            outcome = run(command)
            assert outcome.code == 0, outcome.err
    finally:
        os.chdir(here)
    return folder


def siege(
    folder: Path, kinds: list[str], trials: int, seed: int, finished: Counter[str]
) -> list[tuple[str, int, str]]:
    """Return (kind, number, fault or "") of trials of each kind that are not `finished`."""
    results = []
    here = Path.cwd()
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        if number // len(kinds) < finished[kind]:
            continue
        work = folder.parent / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        os.chdir(work)
        try:
            fault = KINDS[kind](random.Random(f"{seed} {kind} {number // len(kinds)}"))
        finally:
            os.chdir(here)
        results.append((kind, number // len(kinds), fault))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_STATE_HOME"] = f"{name}/state"
        target = make_target(Path(name) / "project")
        counts: Counter[str] = Counter()
        faults: Counter[str] = Counter()
        if options.log and options.log.exists():
            for line in options.log.read_text().splitlines():
                entry = json.loads(line)
                counts[entry["kind"]] += 1
                faults[entry["kind"]] += bool(entry["fault"])
        for end in range(len(kinds), options.trials + len(kinds), len(kinds)):
            for kind, number, fault in siege(target, kinds, end, options.seed, counts):
                counts[kind] += 1
                faults[kind] += bool(fault)
                if fault:
                    print(f"{kind} {number}: {fault}", flush=True)
                if options.log:
                    with options.log.open("a") as log:
                        log.write(f"{json.dumps({'kind': kind, 'n': number, 'fault': fault})}\n")
        print(f"{'kind':14}{'trials':>8}{'failures':>10}")
        for kind in kinds:
            print(f"{kind:14}{counts[kind]:8,}{faults[kind]:10,}")


if __name__ == "__main__":
    main()
