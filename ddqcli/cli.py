"""The command line: options in, exit codes out; the one place where an error becomes a message.

Nothing heavy is imported before a command runs, so that help and report answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ddqcli import __version__
from ddqcli.errors import DDQError, Interrupted

app = typer.Typer(
    name="ddq",
    help="Finetune a trained PyTorch model under a memory budget with Differentiable Dynamic Quantization.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 a gate is unmet, 4 a verification differs, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, also on failure.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"ddq {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _example(*lines: str) -> str:
    return "[bold]Example[/bold]\n\n" + "\n\n".join(f"  [cyan]{line}[/cyan]" for line in lines)


@app.command(
    epilog=_example(
        "ddq finetune model.pt --target-bits 4 --max-bits 8",
        "ddq finetune model.pt --arch net.py:build --data images/ --target-size 150kB",
    )
)
def finetune(
    model: Annotated[
        Path | None, typer.Argument(help="State dict: .pt, .pth, .th or .safetensors.", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe (YAML); ./ddq.yaml or the one beside MODEL if not given.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="torchvision name, package.module:factory or file.py:factory.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Image folder, .npz, DATASET:ROOT of torchvision, or module:factory.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Budget: average stored bits for each quantized weight.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Budget: size of all tensors, e.g. 150kB, 1.8MB or 12%.")
    ] = None,
    max_bits: Annotated[int | None, typer.Option(help="Most bits for a tensor.  [1-8]")] = None,
    min_bits: Annotated[int | None, typer.Option(help="Fewest bits for a tensor.  [1-8]")] = None,
    act_bits: Annotated[int | None, typer.Option(help="Bits of each layer's input; float if not given.  [1-8]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same bytes.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run folder.  [default: runs/<time>-<name>]", show_default=False)
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any field of the recipe, e.g. train.lr=0.02."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Load a pickled module; this runs code from the file.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest unfinished run, or with the one in --run-dir.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check model, recipe and budget; train nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Finetune MODEL under a memory budget: learned levels, learned bits."""
    flags = {
        "model.arch": arch, "data.source": data, "budget.target_bits": target_bits, "budget.target_size": target_size,
        "weights.max_bits": max_bits, "weights.min_bits": min_bits, "activations.bits": act_bits,
        "train.epochs": epochs, "train.max_steps": max_steps, "train.seed": seed, "model.pickle": allow_pickle or None,
    }  # fmt: skip

    def work() -> Any:
        from ddqcli.errors import UsageError
        from ddqcli.recipe import differences, find_recipe, load_recipe, parse_assignment

        if target_bits is not None and target_size is not None:
            raise UsageError("--target-bits and --target-size are both given; give one.")
        given = {key: value for key, value in flags.items() if value is not None}
        given |= dict(parse_assignment(text) for text in assign or ())
        path = recipe or (None if resume and model is None else find_recipe(model))
        loaded = load_recipe(path, given)
        run = None
        if resume:
            from ddqcli.engine.runs import Run

            run = Run.unfinished(run_dir)
            stored = run.recipe()
            if model is not None or given:
                asked = loaded.model_copy(update={"model": loaded.model.model_copy(update={"checkpoint": str(model)})})
                changed = differences(
                    stored, asked if model is not None else load_recipe(run.path / "recipe.yaml", given)
                )
                if changed:
                    raise UsageError(
                        f"{run.path} was begun with another recipe ({'; '.join(changed)}); begin a new run."
                    )
            loaded = stored
        checkpoint = model or (Path(loaded.model.checkpoint) if loaded.model.checkpoint else None)
        if checkpoint is None:
            raise UsageError("No model is named; write `ddq finetune MODEL`, or model.checkpoint in the recipe.")
        from ddqcli.render.progress import Live

        with Live(quiet=quiet) as live:
            if path:
                live.note(f"recipe: {path}")
            from ddqcli.commands.finetune import finetune as command

            return command(checkpoint, loaded, run=run, run_dir=run_dir, dry_run=dry_run, listener=live)

    def show(result: Any) -> None:
        from ddqcli.render import output
        from ddqcli.render import report as render

        render.finetuned(result.data(), output.out)

    _run("finetune", work, show, as_json)


@app.command(epilog=_example("ddq report", "ddq report runs/20260131-142310-model --md >> $GITHUB_STEP_SUMMARY"))
def report(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN_OR_FILE]",
            help="Run folder or exported file; the newest run if not given.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="The layers as CSV.")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="Markdown.")] = False,
) -> None:
    """Show each tensor's bits, levels, bytes and error, and the totals."""

    def work() -> Any:
        from ddqcli.errors import UsageError

        if as_json + as_csv + as_md > 1:
            raise UsageError("--json, --csv and --md exclude each other; give one.")
        from ddqcli.commands.report import report as command

        return command(target)

    def show(result: Any) -> None:
        from ddqcli.render import output
        from ddqcli.render import report as render

        if as_csv or as_md:
            output.plain(render.as_csv(result.report) if as_csv else render.as_markdown(result.report))
        else:
            render.table(result.report, output.out)

    _run("report", work, show, as_json)


@app.command(epilog=_example("ddq export", "ddq export runs/20260131-142310-model -o small.safetensors"))
def export(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder; the newest run if not given.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="File to write.  [default: model.safetensors in the run folder]", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the newest run's model as one safetensors file, and prove that it holds what was trained."""

    def work() -> Any:
        from ddqcli.commands.export import export as command

        return command(run, out)

    def show(result: Any) -> None:
        from ddqcli.render import output
        from ddqcli.render import report as render

        render.exported(result.data(), output.out)

    _run("export", work, show, as_json)


@app.command(epilog=_example("ddq inspect model.pt", "ddq inspect model.safetensors -o pictures"))
def inspect(
    model: Annotated[Path, typer.Argument(help="State dict: .pt, .pth, .th or .safetensors.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder for the pictures.  [default: inspect/<model>]", show_default=False),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Load a pickled module; this runs code from the file.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show each layer's weight distribution and what fewer bits would cost it: table, pictures and a page."""

    def work() -> Any:
        from ddqcli.commands.inspect import inspect as command
        from ddqcli.render.progress import Live

        with Live(quiet=quiet) as live:
            return command(
                model,
                out=out or Path("inspect") / model.stem,
                pickle=allow_pickle,
                on_progress=lambda done, total, name: live.progress(f"inspect {name}", done, total),
            )

    def show(result: Any) -> None:
        from ddqcli.render import inspect as render
        from ddqcli.render import output

        render.show(result, output.out)

    _run("inspect", work, show, as_json)


def _run(command: str, work: Callable[[], Any], show: Callable[[Any], None], as_json: bool) -> None:
    """Do the work and show its result; turn an error into one message and its exit code."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        result = work()
        if as_json:
            from ddqcli.render.output import envelope, plain

            plain(envelope(command, result.data()))
        else:
            show(result)
        sys.stdout.flush()
    except DDQError as error:
        _fail(command, str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        _fail(command, "Interrupted.", 130, as_json)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(number: int, frame: object) -> None:
    raise Interrupted("Terminated.", number)


def _fail(command: str, message: str, code: int, as_json: bool) -> None:
    if as_json:
        from ddqcli.render.output import envelope, plain

        plain(envelope(command, exit_code=code, errors=[message]))
    sys.stderr.write(f"Error: {message}\n")
    raise typer.Exit(code)


def main() -> None:
    """Entry point of `ddq` and `python -m ddqcli`."""
    app()
