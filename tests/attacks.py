"""The kinds of trials of `tests/benchmarks/siege.py`: each returns a fault, or ""."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from bombs import manifest, memo, npz_claim, overlapping, strided
from crashes import Tree, crashes, recording, restore
from mutations import changed, forged_artifact, mutated
from trial import end, run, start

FILE, RUN, SWEEP = "file.safetensors", "runs/done", "runs/sweep"
GOLDEN = "golden.safetensors"  # of version 1; FILE has constants
RESUME_SWEEP = f"finetune --resume --run-dir {SWEEP} -q"
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
    f"{RUN}/.ddq": ["report", "runs", f"export {RUN}", f"finetune --resume --run-dir {RUN} -q"],
    "golden.safetensors": [
        "export --check golden.safetensors",
        "inspect golden.safetensors -o out",
    ],
    "model.h": [f"export --check model.h {RUN}"],
    "model.onnx": [f"export --check model.onnx {RUN}"],
    "images/train/class0/0.png": ["finetune --data images --max-steps 0 --run-dir runs/new -q"],
    f"{SWEEP}/sweep.yaml": [RESUME_SWEEP, "runs", f"report {SWEEP}"],
    f"{SWEEP}/sweep.json": [f"report {SWEEP}", f"report {SWEEP} --html out.html", "runs"],
    f"{SWEEP}/.ddq": [RESUME_SWEEP, "runs", f"report {SWEEP}"],
    f"{SWEEP}/4-bits/recipe.yaml": [RESUME_SWEEP, f"export {SWEEP} --target 4 -o out.safetensors"],
    f"{SWEEP}/4-bits/report.json": [RESUME_SWEEP, f"report {SWEEP} --target 4", "runs"],
    f"{SWEEP}/4-bits/last.pt": [RESUME_SWEEP],
    f"{SWEEP}/4-bits/final.pt": [RESUME_SWEEP, f"inspect {SWEEP} --target 4 -o out"],
}
WRITERS = {
    "export": f"{RUN}/model.safetensors",
    "export --format c -o out.h": "out.h",
    "inspect model.pt -o out": "out/index.html",
    "init -o new.yaml --force": "new.yaml",
    "export -o out.safetensors": "out.safetensors",
    "report --html out.html": "out.html",
    "finetune --max-steps 0 --run-dir runs/new -q": "runs/new/recipe.yaml",
}
# Commands that fill the folder out/, whose crashes are replayed.
FILLERS = (
    "finetune model.pt --run-dir out/run --max-steps 3 --set train.save_every=1 -q",
    "finetune model.pt --target-bits 6,4 --run-dir out/sweep --max-steps 0 -q",
    f"export {RUN} -o out/a.safetensors",
    f"export {RUN} --format c -o out/a.h",
    f"report {RUN} --html out/page.html",
    "inspect model.pt -o out/pictures",
    "init -o out/ddq.yaml --force",
)
TOGETHER = (
    *("export", "export -o out.safetensors", "report --html out.html", "runs"),
    *(
        "inspect model.pt -o out",
        f"inspect {RUN} -o out",
        "init -o new.yaml --force",
        "finetune --resume -q",
    ),
    f"finetune --resume --run-dir {RUN} -q",
    "finetune --max-steps 0 --run-dir runs/new -q",
    "finetune --max-steps 0 -q",
)
BOMBS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "bomb.pt": (strided, ["inspect bomb.pt", "finetune bomb.pt"]),
    "memo.pt": (memo, ["inspect memo.pt", "finetune memo.pt --dry-run"]),
    "same.pt": (overlapping, ["inspect same.pt", "finetune same.pt"]),
    "bomb.npz": (npz_claim, ["finetune --data bomb.npz", "finetune --data bomb.npz --dry-run"]),
    "b.safetensors": (manifest, ["report b.safetensors", "export --check b.safetensors"]),
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


def damaged(draw: random.Random) -> str:
    """Change some bytes of a file that is read."""
    name = draw.choice([name for name in READERS if Path(name).exists()])
    before = Path(name).read_bytes()
    Path(name).write_bytes(mutated(before, draw))
    return judged_by_readers(name, Path(name).read_bytes() != before, draw)


def forged(draw: random.Random) -> str:
    """Change a file under right checksums."""
    names = [FILE, f"{RUN}/final.pt", "model.pt", f"{RUN}/metrics.jsonl"]
    names += [f"{RUN}/report.json", f"{SWEEP}/sweep.json"]
    name = draw.choice([name for name in names if Path(name).exists()])
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
    elif name.endswith(".jsonl"):
        lines = [json.loads(line) for line in before.splitlines()]
        changed(lines, draw)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
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
    if "--check" in command and differs and outcome.code == 0:
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
    outcome = run(command, after=seconds)
    # Before the command has set its handler, the signal ends the process.
    fault = outcome.fault({0, 143, -signal.SIGTERM})
    return f"{command} stopped after {seconds:.3f} s: {fault}" if fault else ""


def surroundings(draw: random.Random) -> str:
    """Set variables at random."""
    command = draw.choice(
        [*WRITERS, "report", "runs", "report --json", "finetune --dry-run", "--help"]
    )
    values = {name: draw.choice(choices) for name, choices in SURROUNDINGS.items()}

    def set_variables() -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    fault = run(command, set_variables).fault()
    return f"{command} with {values}: {fault}" if fault else ""


def crash(draw: random.Random) -> str:
    """Do a command again in what a kill or a power loss at any of its calls may have left."""
    command = draw.choice(FILLERS)
    trees, whole = recorded(command)
    tree = draw.choice(trees)
    shutil.rmtree("out", ignore_errors=True)
    restore(tree, Path("out"))
    torn = [name for name, content in finished_files(tree).items() if whole.get(name) != content]
    if torn:
        return f"a crash of {command} left {torn[0]} neither old nor new"
    for reader in ("runs out", "report out/run", "export out/run", "report out/sweep"):
        if fault := run(reader).fault():
            return f"{reader} after a crash of {command}: {fault}"
    again = run(f"{command} --resume" if "finetune" in command else command)
    if again.code:
        return f"{command} after its crash, with {sorted(tree)}: {again.code} {again.err[-200:]}"
    different = [
        n for n, content in whole.items() if finished_files(tree_of("out")).get(n) != content
    ]
    return f"{command} after its crash made another {different[0]}" if different else ""


@lru_cache
def recorded(command: str) -> tuple[list[Tree], Tree]:
    """Return all that crashes of a command may leave in out/, and the files that it makes there."""
    shutil.rmtree("out", ignore_errors=True)
    Path("out").mkdir()
    outcome = run(command, recording(Path("out"), Path("../recorded")))
    assert outcome.code == 0, outcome.err
    return crashes(Path("../recorded")), finished_files(tree_of("out"))


def tree_of(folder: str) -> Tree:
    paths = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


def finished_files(tree: Tree) -> Tree:
    """Return the files that are written once. metrics.jsonl holds times, last.pt goes on."""
    return {
        name: content
        for name, content in tree.items()
        if content is not None and not Path(name).name.startswith((".", "metrics", "last"))
    }


def together(draw: random.Random) -> str:
    """Run two or three commands at once in one folder."""
    commands = draw.choices(TOGETHER, k=draw.choice((2, 2, 3)))
    began = []
    for number, command in enumerate(commands):
        began.append(start(command, f"std{number}"))
        time.sleep(draw.choice((0, 0, 0.05, 0.3)))
    outcomes = [end(child, f"std{number}") for number, child in enumerate(began)]
    for command, outcome in zip(commands, outcomes, strict=True):
        if fault := outcome.fault():
            return f"{command} of {commands} at once: {fault}"
    for path in ("out.safetensors", f"{RUN}/model.safetensors"):
        if Path(path).exists() and (check := run(f"export --check {path} {RUN}")).code:
            return f"{commands} at once left a wrong {path}: {check.err[-200:]}"
    return ""


def odd(draw: random.Random) -> str:
    """Put something else in the place of a file: a pipe, a link, a folder, a device, a giant."""
    name = draw.choice([name for name in READERS if Path(name).exists()])
    path = Path(name)
    path.unlink()
    ways: list[Callable[[], object]] = [
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("gone"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/null"),
        lambda: (path.touch(), os.truncate(path, draw.choice((0, 1, 1 << 20, 1 << 33, 1 << 40)))),
        lambda: path.write_bytes(draw.randbytes(draw.choice((1, 8, 50, 1000)))),
        lambda: path.write_bytes(draw.choice((b"[", b"{", b"- ", b"a: {")) * 100_000),
    ]
    way = draw.randrange(len(ways))
    ways[way]()
    command = draw.choice(READERS[name])
    fault = run(command).fault()
    return f"{command} with {name} odd in way {way}: {fault}" if fault else ""


def bomb(draw: random.Random) -> str:
    """Read a small file that asks for much memory."""
    name = draw.choice(list(BOMBS))
    make, commands = BOMBS[name]
    make(Path(name))
    if draw.random() < 0.5:
        Path(name).write_bytes(mutated(Path(name).read_bytes(), draw))
    command = draw.choice(commands)
    fault = run(command).fault()
    return f"{command}: {fault}" if fault else ""


KINDS = {
    kind.__name__: kind
    for kind in (damaged, forged, odd, bomb, kill, crash, stop, together, surroundings)
}
