"""The command line: options in, results out. How a command ends is in ddqcli.cli.exit.

Nothing heavy is imported before a command runs, so that help and report answer at once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ddqcli import __version__
from ddqcli.cli.exit import CommandGroup, run_command

app = typer.Typer(
    name="ddq",
    cls=CommandGroup,
    help="Finetune a trained PyTorch model under a memory budget with Differentiable Dynamic Quantization.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 a gate is unmet, 4 a verification differs, 130 Ctrl-C, 143 SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its import would double the time that help takes
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, also on failure.")
]
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
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the trace of an error; may stand anywhere.")
    ] = False,
) -> None:
    pass  # --debug is taken by Answering


def _example(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _number(text: str) -> float | str:
    """What is no number is for the recipe to refuse."""
    try:
        return float(text)
    except ValueError:
        return text


@app.command(
    short_help="Finetune a model under a memory budget.",
    epilog=_example(
        "ddq finetune model.pt --target-bits 4 --max-bits 8",
        "ddq finetune model.pt --arch net.py:build --data images/ --target-size 150kB",
        "ddq finetune model.pt --target-bits 3,4,6 --max-bits 8",
    ),
)
def finetune(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL", help="State dict: .pt, .pth, .th or .safetensors.", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe (YAML); ./ddq.yaml or the one beside MODEL if not given."),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="torchvision name, package.module:factory or file.py:factory."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Image folder, .npz, DATASET:ROOT of torchvision, or module:factory."),
    ] = None,
    target_bits: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Budget: average stored bits for each quantized weight; one run for each.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE[,SIZE...]", help="Budget: size of all tensors, e.g. 150kB, 1.8MB or 12%."
        ),
    ] = None,
    max_bits: Annotated[int | None, typer.Option(help="Most bits for a tensor.  [1-8]")] = None,
    min_bits: Annotated[int | None, typer.Option(help="Fewest bits for a tensor.  [1-8]")] = None,
    act_bits: Annotated[
        int | None, typer.Option(help="Bits of inputs, 8 at both ends; else in float.  [1-8]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same bytes.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run folder.  [default: runs/<time>-<name>]", show_default=False),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any field of the recipe, e.g. train.lr=0.02."
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Load a pickled module; this runs code from the file."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the newest unfinished run, or the one in --run-dir; with MODEL, begin if there is none.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model, recipe and budget; train nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Finetune MODEL under a memory budget: learned levels, learned bits."""
    flags = {
        "model.arch": arch, "data.source": data,
        "budget.target_bits": target_bits and [_number(text) for text in target_bits.split(",")],
        "budget.target_size": target_size and [text.strip() for text in target_size.split(",")],
        "weights.max_bits": max_bits, "weights.min_bits": min_bits, "activations.bits": act_bits,
        "train.epochs": epochs, "train.max_steps": max_steps, "train.seed": seed, "model.pickle": allow_pickle or None,
    }  # fmt: skip

    def work() -> Any:
        from ddqcli.errors import UsageError
        from ddqcli.recipe.file import find_recipe, load_recipes, with_assignments
        from ddqcli.runs.run import Run

        if target_bits is not None and target_size is not None:
            raise UsageError("--target-bits and --target-size are both given; give one.")
        given = with_assignments(
            {key: value for key, value in flags.items() if value is not None}, assign or ()
        )
        run = Run.unfinished(run_dir, or_none=model is not None) if resume else None
        path = run.recipe_path if run and not (model or recipe) else recipe or find_recipe(model)
        loaded, *others = recipes = load_recipes(path, given)
        if loaded.model.pickle and not recipe and not given.get("model.pickle"):
            raise UsageError(
                f"{path} has model.pickle: true, which may run code from the checkpoint and so is for you to say: give "
                "--allow-pickle, or name the recipe with --recipe."
            )
        checkpoint = model or (Path(loaded.model.checkpoint) if loaded.model.checkpoint else None)
        if checkpoint is None:
            raise UsageError(
                "No model is named; write `ddq finetune MODEL`, or model.checkpoint in the recipe."
            )
        if run:
            run.check_same([each.of(checkpoint) for each in recipes])
        from ddqcli.render.progress import Live

        if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first alone speaks
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with Live(quiet=quiet or os.environ.get("RANK", "0") != "0") as live:
            if path:
                live.note(f"recipe: {path}")
            if others:
                from ddqcli.commands.sweep import sweep

                return sweep(
                    checkpoint, recipes, run=run, run_dir=run_dir, dry_run=dry_run, listener=live
                )
            from ddqcli.commands.finetune import finetune as command

            return command(
                checkpoint, loaded, run=run, run_dir=run_dir, dry_run=dry_run, listener=live
            )

    def show(result: Any) -> None:
        from ddqcli.commands.finetune import FinetuneResult
        from ddqcli.render import console as output
        from ddqcli.render import finetune, sweep

        (finetune if isinstance(result, FinetuneResult) else sweep).show(result, output.out)

    run_command("finetune", work, show, as_json)


@app.command(
    short_help="Show what a run, or an exported file, holds.",
    epilog=_example(
        "ddq report",
        "ddq report model.safetensors --md >> $GITHUB_STEP_SUMMARY",
        "ddq report --max-size 20kB --max-drop 0.5",
        "ddq report --html report.html",
        "ddq report --diff model.safetensors runs/20260131-142310-model",
    ),
)
def report(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_OR_FILE",
            help="Run folder or exported file; the newest run if not given.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="The layers as CSV.")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="Markdown.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with pictures: FILE.html, or index.html in a folder.",
            show_default=False,
        ),
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B", help="Show two runs or exported files side by side.", show_default=False
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Gate: most for all tensors, e.g. 150kB or 12%."),
    ] = None,
    max_bits: Annotated[
        float | None, typer.Option(help="Gate: most stored bits a quantized weight.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Gate: most points of accuracy lost.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Gate: least accuracy, percent.")
    ] = None,
) -> None:
    """Show each tensor's bits, levels, bytes and error, and the totals. An unmet gate ends with exit code 3."""

    def work() -> Any:
        from ddqcli.errors import UsageError

        if as_json + as_csv + as_md > 1:
            raise UsageError("--json, --csv and --md exclude each other; give one.")
        from ddqcli.commands.report import Limits
        from ddqcli.commands.report import report as command

        limits = Limits(max_size, max_bits, max_drop, min_accuracy)
        if diff:
            if target or html or limits != Limits():
                raise UsageError(
                    "--diff takes A and B, and neither a third one, nor --html, nor gates; leave them out."
                )
            from ddqcli.commands.diff import diff as compare

            return compare(*diff)
        result = command(target, limits)
        if html:
            from ddqcli.inspection.report_page import write_report_page

            result = replace(result, page=write_report_page(result.source, result.report, html))
        return result

    def show(result: Any) -> None:
        from ddqcli.render import console as output
        from ddqcli.render import report as render

        if diff:
            from ddqcli.render import diff as sides

            if as_csv or as_md:
                output.plain(sides.as_csv(result) if as_csv else sides.as_markdown(result))
            else:
                sides.show(result, output.out)
        elif as_csv or as_md:
            output.plain(
                render.as_csv(result.report) if as_csv else render.as_markdown(result.report)
            )
        else:
            render.show(result.report, output.out)
            if result.page:
                output.out.print(f"page       {result.page}", markup=False, soft_wrap=True)

    run_command("report", work, show, as_json)


@app.command(
    epilog=_example(
        "ddq export",
        "ddq export runs/20260131-142310-model -o small.safetensors --half",
        "ddq export --format onnx",
        "ddq export --check small.safetensors",
    ),
    short_help="Write a run's model as one verified file.",
)
def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="Run folder; the newest run if not given.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="File to write.  [default: model.safetensors or model.onnx in the run folder]",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        Literal["ddq", "onnx"],
        typer.Option(
            "--format", help="ddq: the smallest file; onnx: whole numbers for onnxruntime."
        ),
    ] = "ddq",
    half: Annotated[
        bool,
        typer.Option("--half", help="Store what stays float as float16, and say what that costs."),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write nothing; verify this file of the run.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the newest run's model as one file, and prove that it is what was trained."""

    def work() -> Any:
        from ddqcli.commands import export as ddq
        from ddqcli.commands import export_onnx as onnx
        from ddqcli.errors import UsageError
        from ddqcli.render.progress import Live

        onnx_wanted = form == "onnx" or (check is not None and check.suffix == ".onnx")
        if check is not None and (out or half):
            raise UsageError("--check writes nothing: leave out --out and --half.")
        if onnx_wanted and half:
            raise UsageError("--half is for the ddq format; an ONNX file keeps float32.")
        with Live(quiet=quiet) as live:
            if check is not None:
                verify = onnx.check_onnx if onnx_wanted else ddq.check
                return verify(check, run, on_progress=live.progress)
            if onnx_wanted:
                return onnx.export_onnx(run, out, on_progress=live.progress)
            return ddq.export(run, out, half=half, on_progress=live.progress)

    def show(result: Any) -> None:
        from ddqcli.render import console as output
        from ddqcli.render import export as render

        render.show(result, output.out)

    run_command("export", work, show, as_json)


@app.command(
    short_help="Show a model's weight distributions.",
    epilog=_example(
        "ddq inspect model.pt",
        "ddq inspect model.pt -o pictures",
        "ddq inspect runs/20260131-142310-model",
    ),
)
def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="State dict (.pt, .pth, .th, .safetensors), run folder or exported file.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Folder for the pictures.  [default: inspect/<model>]",
            show_default=False,
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Load a pickled module; this runs code from the file."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show each layer's weight distribution and what fewer bits would cost it, or what a run made of it: table and pictures."""

    def work() -> Any:
        from ddqcli.commands.inspect import inspect as command
        from ddqcli.render.progress import Live

        with Live(quiet=quiet) as live:
            return command(
                model,
                out=out or Path("inspect") / model.resolve().stem,
                pickle=allow_pickle,
                on_progress=lambda done, total, name: live.progress(f"inspect {name}", done, total),
            )

    def show(result: Any) -> None:
        from ddqcli.inspection.checkpoint_rows import CheckpointResult
        from ddqcli.render import console as output
        from ddqcli.render import inspect_checkpoint, inspect_trained

        of_checkpoint = isinstance(result, CheckpointResult)
        (inspect_checkpoint if of_checkpoint else inspect_trained).show(result, output.out)

    run_command("inspect", work, show, as_json)


def main() -> None:
    """Entry point of `ddq` and `python -m ddqcli`."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - None if the caller closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    app()
