"""The closing lines of `ddq finetune`."""

from __future__ import annotations

import shlex

from rich.console import Console

from ddqcli.commands.finetune import FinetuneResult
from ddqcli.formatting import duration
from ddqcli.render.console import print_lines
from ddqcli.render.report import total_lines


def show(result: FinetuneResult, console: Console) -> None:
    """Print the totals, the run folder, and what to type next."""
    print_lines(total_lines(result.report), console)
    if result.run_dir is None:
        console.print(
            "dry run    the budget can be met, and model and data fit; nothing was trained, so the "
            "bits follow from the weights alone",
            soft_wrap=True,
        )
        return
    console.print(f"time       {duration(result.seconds)}", soft_wrap=True)
    console.print(f"run        {result.run_dir}", markup=False, soft_wrap=True)
    folder = shlex.quote(str(result.run_dir))
    console.print(f"next       ddq report {folder}", markup=False, soft_wrap=True)
    console.print(f"           ddq export {folder}", markup=False, soft_wrap=True)
