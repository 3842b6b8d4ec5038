"""The kinds of trials of `tests/benchmarks/siege.py`: each returns what it tried, and its fault."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import forgeries
from bombs import (
    aliases,
    deep,
    deflated,
    header_claim,
    keys,
    loops,
    manifest,
    memo,
    npz_claim,
    overlapping,
    png_claim,
    strided,
    tensors_claim,
)
from crashes import Tree, crashes, recording, restore
from mutations import INJECTED, mutated
from trial import end, run, run_anew, start

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
# What makes each file, up to which binary order of size, and its readers.
BOMBS: dict[str, list[tuple[Callable[[Path, int], None], int]]] = {
    "model.pt": [(strided, 31), (memo, 31), (overlapping, 14), (deflated, 7)],
    "images.npz": [(npz_claim, 50), (deflated, 7)],
    FILE: [(manifest, 7), (header_claim, 63), (tensors_claim, 12)],
    "model.safetensors": [(header_claim, 63), (tensors_claim, 12)],
    "ddq.yaml": [(aliases, 6), (keys, 17), (deep, 17)],
    f"{RUN}/recipe.yaml": [(aliases, 6), (keys, 17), (deep, 17)],
    f"{RUN}/report.json": [(deep, 20)],
    f"{RUN}/metrics.jsonl": [(deep, 20)],
    f"{RUN}/final.pt": [(strided, 31), (memo, 31), (overlapping, 14), (deflated, 7)],
    f"{RUN}/last.pt": [(strided, 31), (memo, 31), (overlapping, 14), (deflated, 7)],
    f"{SWEEP}/sweep.json": [(deep, 20)],
    f"{SWEEP}/sweep.yaml": [(aliases, 6), (keys, 17), (deep, 17)],
    "images/train/class0/0.png": [(png_claim, 31), (loops, 7)],
}
SURROUNDINGS: dict[str, list[str | None]] = {
    "RANK": [None, None, "0", "1", "x"],
    "WORLD_SIZE": [None, None, "1", "2", "", "x"],
    "LOCAL_RANK": [None, None, "0", "7", "x"],
    "MASTER_ADDR": [None, None, "localhost", ""],
    "HOME": [None, "/dev/null", "/"],
    "XDG_STATE_HOME": [None, "/dev/null", "relative", "/proc"],
    "XDG_CACHE_HOME": [None, "/dev/null"],
    "TMPDIR": [None, "/dev/null", "/nowhere"],
    "COLUMNS": [None, "0", "1", "x", "9999", "-5", "80"],
    "LINES": [None, "0", "x"],
    "NO_COLOR": [None, "1"],
    "FORCE_COLOR": [None, None, "0"],
    "TERM": [None, "dumb", "xterm-256color"],
    "DDQ_TRUST": [None, "0", "1", "x"],
    "OMP_NUM_THREADS": [None, "1", "x"],
    "CUDA_VISIBLE_DEVICES": [None, "", "7"],
    "SOURCE_DATE_EPOCH": [None, "0", "x"],
    "MPLBACKEND": [None, "x", "svg"],
    "TZ": [None, "x", "Asia/Kathmandu"],
}
# What a new interpreter reads before `ddq` begins.
STARTING: dict[str, list[str | None]] = {
    "PYTHONIOENCODING": [None, "ascii", "latin-1", "ascii:strict"],
    "PYTHONUTF8": [None, "0", "1"],
    "LC_ALL": [None, "C", "POSIX", "xx_XX.UTF-8"],
    "PYTHONUNBUFFERED": [None, "1"],
    "PYTHONWARNINGS": [None, "default", "error::SyntaxWarning"],
    "PYTHONOPTIMIZE": [None, "1", "2"],
    "PYTHONDONTWRITEBYTECODE": [None, "1"],
    "PYTHONHASHSEED": [None, "0", "7"],
    "PYTHONDEVMODE": [None, None, None, "1"],
    "PYTHONSAFEPATH": [None, "1"],
}
REDIRECTIONS = ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "2>&1",
                ">/dev/null", "</dev/zero", "| head -c 5", "| true"]  # fmt: skip
COMMANDS = [*WRITERS, "report", "runs", "report --json", "runs --json", "finetune --dry-run",
            "finetune --dry-run --json", "inspect model.pt --json", f"export --check {FILE} --json",
            "--help", "--version", "finetune --help", "report gone", "nothing"]  # fmt: skip
Result = tuple[str, str]  # what was tried, and its fault or ""


def damaged(draw: random.Random) -> Result:
    """Change some bytes of a file that is read."""
    name = _some_file(draw)
    return _read_by_someone(name, mutated(Path(name).read_bytes(), draw), draw)


def forged(draw: random.Random) -> Result:
    """Change a file's content under right checksums."""
    name = _some_file(draw)
    return _read_by_someone(name, forgeries.forged(name, Path(name).read_bytes(), draw), draw)


def _some_file(draw: random.Random) -> str:
    names = [name for name in READERS if Path(name).exists()]
    return draw.choices(names, [0.1 if name.endswith(".onnx") else 1 for name in names])[0]


def _some_reader(name: str, draw: random.Random) -> str:
    """Return a command that reads a file, seldom one that trains or draws pictures."""
    slow = ("finetune", "inspect")
    return draw.choices(READERS[name], [0.3 if c.startswith(slow) else 1 for c in READERS[name]])[0]


def _read_by_someone(name: str, content: bytes, draw: random.Random) -> Result:
    path = Path(name)
    differs = path.read_bytes() != content
    path.write_bytes(content)
    command = _some_reader(name, draw)
    what = f"{command} with {name} of {hashlib.sha256(content).hexdigest()[:16]}"
    outcome = run(command)
    if fault := outcome.fault():
        return what, fault
    if "--check" in command and differs and outcome.code == 0:
        return what, "passed a changed file"
    if "finetune" not in command and path.read_bytes() != content:
        return what, "replaced what it reads"
    if Path(forgeries.CANARY).exists():
        return what, "ran code of a file"
    pages = [page for page in (Path("out.html"), Path("out/index.html")) if page.exists()]
    if any(INJECTED in page.read_text() for page in pages):
        return what, "put a name into a page as markup"
    return what, ""


def kill(draw: random.Random) -> Result:
    """Kill a command at calls for files, twice; what was there before or after is there."""
    command = draw.choice(list(WRITERS))
    target = Path(WRITERS[command])
    old = target.read_bytes() if target.exists() else None
    moments = [int(draw.expovariate(0.05)) for _ in range(draw.choice((1, 2)))]
    what = f"{command} killed at {moments}"
    codes = {0, 2} if "runs/new" in command else {0}  # 2: it is there already
    for moment in moments:
        outcome = run(command, _dying_at(moment))
        if fault := outcome.fault({*codes, -signal.SIGKILL}):
            return what, fault
    found = target.read_bytes() if target.exists() else None
    if found != old and target.suffix == ".safetensors" and run(f"export --check {target}").code:
        return what, "left a file that is neither old nor new"
    if found != old and target.suffix == ".html" and not (found or b"").endswith(b"</html>\n"):
        return what, "left half a page"
    again = run(f"{command} --resume" if "runs/new" in command else command)
    fault = again.fault(codes)
    return what, f"then: {fault}" if fault else ""


def _dying_at(moment: int) -> Callable[[], None]:
    def die_at_moment() -> None:
        seen, here = iter(range(10**9)), os.getcwd()

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.mkdir"):
                path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
                if os.path.abspath(path).startswith(here) and next(seen) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return die_at_moment


def stop(draw: random.Random) -> Result:
    """Send SIGTERM or SIGINT, or both, at random times."""
    command = draw.choice(["finetune --run-dir runs/new -q", *WRITERS, *READERS["model.pt"]])
    numbers = draw.choices((signal.SIGTERM, signal.SIGINT), k=draw.choice((1, 1, 2)))
    signals = tuple((draw.uniform(0.001, 1.0 / n), number) for n, number in enumerate(numbers, 1))
    what = f"{command} with {[(f'{s:.6f}', number.name) for s, number in signals]}"
    # Before the command has set its handler, the signal ends the process.
    ends = {code for number in numbers for code in (128 + number, -number)}
    return what, run(command, signals=signals).fault({0, *ends})


def surroundings(draw: random.Random) -> Result:
    """Set variables at random."""
    command, values = draw.choice(COMMANDS), _drawn(SURROUNDINGS, draw)

    def set_variables() -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    return f"{command} with {values}", run(command, set_variables).fault()


def startup(draw: random.Random) -> Result:
    """Start a new interpreter, with its variables set and its streams redirected at random."""
    command, redirection = draw.choice(COMMANDS), draw.choice(REDIRECTIONS)
    values = _drawn(STARTING, draw) | draw.choice([{}, _drawn(SURROUNDINGS, draw)])
    what = f"{command} {redirection} with {values}"
    outcome = run_anew(command, redirection, values)
    fault = outcome.fault()
    silent = fault.endswith("without a word") and "2>" in redirection
    return what, "" if silent else fault


def _drawn(choices: dict[str, list[str | None]], draw: random.Random) -> dict[str, str | None]:
    """Return a value for some of the variables."""
    share = draw.random()
    return {name: draw.choice(some) for name, some in choices.items() if draw.random() < share}


def crash(draw: random.Random) -> Result:
    """Do a command again in what a kill or a power loss at any of its calls may have left."""
    command = draw.choice(FILLERS)
    trees, whole = recorded(command)
    number = draw.randrange(len(trees))
    tree, what = trees[number], f"state {number} of {command}"
    shutil.rmtree("out", ignore_errors=True)
    restore(tree, Path("out"))
    torn = [name for name, content in finished_files(tree).items() if whole.get(name) != content]
    if torn:
        return what, f"left {torn[0]} neither old nor new"
    for reader in ("runs out", "report out/run", "export out/run", "report out/sweep"):
        if fault := run(reader).fault():
            return what, f"then {reader}: {fault}"
    again = run(f"{command} --resume" if "finetune" in command else command)
    if again.code:
        return what, f"of {sorted(tree)}, then again: {again.code} {again.err[-200:]}"
    different = [
        n for n, content in whole.items() if finished_files(tree_of("out")).get(n) != content
    ]
    return what, f"then made another {different[0]}" if different else ""


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


def together(draw: random.Random) -> Result:
    """Run two or three commands at once in one folder."""
    commands = draw.choices(TOGETHER, k=draw.choice((2, 2, 3)))
    waits = [draw.choice((0.0, draw.uniform(0, 0.1), draw.uniform(0, 0.5))) for _ in commands]
    what = f"{commands} at once, after {waits} s"
    began = []
    for number, command in enumerate(commands):
        began.append(start(command, f"std{number}"))
        time.sleep(waits[number])
    outcomes = [end(child, f"std{number}") for number, child in enumerate(began)]
    for command, outcome in zip(commands, outcomes, strict=True):
        if fault := outcome.fault():
            return what, f"{command}: {fault}"
    for path in ("out.safetensors", f"{RUN}/model.safetensors"):
        if Path(path).exists() and (check := run(f"export --check {path} {RUN}")).code:
            return what, f"left a wrong {path}: {check.err[-200:]}"
    return what, ""


def odd(draw: random.Random) -> Result:
    """Put something else in the place of one or two files: a pipe, a link, a folder, a giant."""
    names = draw.sample([name for name in READERS if Path(name).exists()], draw.choice((1, 1, 2)))
    ways = [_make_odd(Path(name), names, draw) for name in names]
    command = _some_reader(names[0], draw)
    return f"{command} with {ways}", run(command).fault()


def _make_odd(path: Path, names: list[str], draw: random.Random) -> str:
    """Replace a file; return by what."""
    others = [name for name in READERS if Path(name).is_file() and name not in names]
    other, size = Path(draw.choice(others)), draw.choice((0, 1, draw.randrange(1 << 20), 1 << 33))
    noise = draw.randbytes(draw.choice((1, 8, 50, 1000)))
    nested = draw.choice((b"[", b"{", b"- ", b"a: {", b'{"a":', b"(", b"]l")) * draw.randrange(
        10**5
    )
    old = path.read_bytes()
    path.unlink()
    ways: dict[str, Callable[[], object]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a folder": lambda: path.mkdir(),
        f"a folder with {other}": lambda: (path.mkdir(), shutil.copy(other, path)),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("gone"),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link to /dev/null": lambda: path.symlink_to("/dev/null"),
        "a socket": lambda: os.mknod(path, stat.S_IFSOCK | 0o600),
        "nothing": lambda: None,
        f"{size} zeros": lambda: (path.touch(), os.truncate(path, size)),
        f"noise {noise[:8].hex()}": lambda: path.write_bytes(noise),
        f"{len(nested)} x {nested[:5]!r}": lambda: path.write_bytes(nested),
        f"a copy of {other}": lambda: shutil.copy(other, path),
        f"a link to {other}": lambda: path.symlink_to(other.resolve()),
        f"a hard link to {other}": lambda: os.link(other, path),
        f"itself and {other}": lambda: path.write_bytes(old + other.read_bytes()),
        "itself, and no access": lambda: (path.write_bytes(old), path.chmod(0)),
        "itself, and a folder not to write to": lambda: (path.write_bytes(old),
                                                        path.parent.chmod(0o555)),
    }  # fmt: skip
    way = draw.choice(list(ways))
    ways[way]()
    return f"{path} as {way}"


def bomb(draw: random.Random) -> Result:
    """Read a small file that asks for much memory."""
    name = draw.choice([name for name in BOMBS if Path(name).exists()])
    make, order = draw.choice(BOMBS[name])
    size = draw.randrange(1, 2 ** draw.randint(1, order))
    make(Path(name), size)
    if draw.random() < 0.5:
        Path(name).write_bytes(mutated(Path(name).read_bytes(), draw))
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
    command = _some_reader(name, draw)
    what = f"{command} with {name} as {make.__name__} of {size}, {digest}"
    return what, run(command).fault()


# Of a hundred trials, so many are of each kind. What trains or starts an interpreter takes seconds.
KINDS: dict[Callable[[random.Random], Result], int] = {
    damaged: 33,
    forged: 33,
    odd: 10,
    bomb: 9,
    surroundings: 6,
    kill: 3,
    stop: 2,
    crash: 2,
    together: 1,
    startup: 1,
}
