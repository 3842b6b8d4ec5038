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
    if result.missing:
        lines += [
            f"recipe     {result.path} was written and is incomplete; fill it in, or begin again:",
            f"next       {_again(result)}",
        ]
    else:
        words = ["ddq", "finetune"]
        if str(result.path) != RECIPE_NAME:
            words += ["--recipe", str(result.path)]
        lines += [f"recipe     {result.path}", f"next       {shlex.join(words)} --dry-run"]
    print_lines(lines, console)


def _again(result: InitResult) -> str:
    """Return the command that writes a complete recipe over this one."""
    values, missing = result.values, {text.partition(":")[0] for text in result.missing}
    words = ["ddq", "init", values.get("model.checkpoint", "MODEL")]
    if arch := values.get("model.arch") or ("model.arch" in missing and "net.py:build"):
        words += ["--arch", arch]
    if data := values.get("data.source") or ("data" in missing and "DATA"):
        words += ["--data", data]
    if values.get("model.pickle"):
        words.append("--allow-pickle")
    if str(result.path) != RECIPE_NAME:
        words += ["-o", str(result.path)]
    return shlex.join([*words, "--force"])
