"""Print the table of `gpu.sh` from the folder of its output.

python tests/benchmarks/gpu_summary.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TIMED_OUT = (124, 137)  # exit codes of `timeout`


def main() -> None:
    folder = Path(sys.argv[1])
    parts = [line.split("\t") for line in (folder / "parts.tsv").read_text().splitlines()]
    print(f"\n{folder}\n{last_line(folder / 'card.out')}\n")
    print("| part | seconds | result |\n|---|---|---|")
    for name, code, seconds in parts:
        print(f"| {name} | {seconds} | {result(folder, name, int(code))} |")
    print("\n| steps | method | ms | of float | MiB |\n|---|---|---|---|---|")
    for name, code, _ in parts:
        if name.startswith("steps_") and code == "0":
            for method, row in read_json(folder / f"{name}.out")["rows"].items():
                mib = "" if row["mib"] is None else row["mib"]
                print(f"| {name[6:]} | {method} | {row['ms']} | {row['ratio']} | {mib} |")


def result(folder: Path, name: str, code: int) -> str:
    """Return what a part has to say in a few words."""
    if code in TIMED_OUT:
        return "did not end in time"
    if "tests" in name or name == "suite":
        return last_line(folder / f"{name}.out").strip("= ")
    if code:
        return f"exit code {code}: {last_line(folder / f'{name}.err')}"
    if name in ("quickstart", "resnet20_2_2"):
        data = read_json(folder / f"{name}.out")["data"]
        return " -> ".join(f"{s['name']} {s['accuracy']}" for s in data["course"]["stages"])
    return "done"


def last_line(path: Path) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.replace("|", " ") for line in reversed(lines) if line.strip()), "")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
