"""The closing lines of `ddq finetune`."""

from __future__ import annotations

import shlex

from rich.console import Console

from ddqcli.commands.finetune import FinetuneResult
from ddqcli.formatting import duration
from ddqcli.render.console import export_command, print_lines, sizes_lines
from ddqcli.render.report import total_lines


def show(result: FinetuneResult, console: Console) -> None:
    """Print the totals, the run folder, and what to type next."""
    lines = total_lines(result.report) + sizes_lines(result.file_format)
    if result.run_dir is None:
        lines.append(
            "dry run    the budget can be met, and model and data fit; nothing was trained, so the "
            "bits follow from the weights alone"
        )
    else:
        folder = shlex.quote(str(result.run_dir))
        lines += [
            f"time       {duration(result.seconds)}",
            f"run        {result.run_dir}",
            f"next       ddq report {folder}",
            f"           {export_command(folder, result.file_format)}",
        ]
    print_lines(lines, console)
