"""The closing lines of `ddq init`: what was found, what is missing, and what to type next."""

from __future__ import annotations

import shlex

from rich.console import Console

from ddqcli.commands.init import InitResult
from ddqcli.recipe.file import RECIPE_NAME
from ddqcli.render.console import print_lines


def show(result: InitResult, console: Console) -> None:
    """Print the model, the data and the next command."""
    lines = [f"model      {result.model}"] if result.model else []
    lines += [f"data       {result.source}"] if result.source else []
    lines += [f"missing    {text}" for text in result.missing]
    words = ["ddq", "finetune"]
    if not result.model:
        words.append("MODEL")
    if str(result.path) != RECIPE_NAME:
        words += ["--recipe", str(result.path)]
    lines += [f"recipe     {result.path}", f"next       {shlex.join(words)} --dry-run"]
    print_lines(lines, console)
