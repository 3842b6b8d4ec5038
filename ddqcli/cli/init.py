"""`ddq init`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddqcli.cli.options import AllowPickle, Arch, DataSource, Json, examples
from ddqcli.cli.run_command import run_command

if TYPE_CHECKING:
    from ddqcli.commands.init import InitResult

EXAMPLES = examples(
    "ddq init model.pt",
    "ddq init model.pt --arch net.py:build --data images/ -o small.yaml",
)


def init(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint.  [default: the only one in this folder]",
            show_default=False,
        ),
    ] = None,
    arch: Arch = None,
    data: DataSource = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Recipe.  [default: ddq.yaml]", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Write a commented recipe for a model and its data.

    Reads the checkpoint and looks at the data, or at what lies in this folder. The recipe sets what
    was found and shows the most used keys with their defaults; `ddq finetune` picks it up.
    """

    def work() -> InitResult:
        from ddqcli.commands.init import init as command

        return command(model, out=out, arch=arch, data=data, pickle=allow_pickle, force=force)

    run_command("init", work, _show, as_json)


def _show(result: InitResult) -> None:
    from ddqcli.render import console, init

    init.show(result, console.out)
