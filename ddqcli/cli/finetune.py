"""`ddq finetune`: its options, and the recipe that they and the recipe file give."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ddqcli.cli.completion import recipe_keys
from ddqcli.cli.error_handling import discard_stdout
from ddqcli.cli.options import AllowPickle, Arch, DataSource, Json, Quiet, Trust, examples
from ddqcli.cli.run_command import run_command

if TYPE_CHECKING:
    from ddqcli.commands.finetune import FinetuneResult
    from ddqcli.commands.sweep import SweepResult
    from ddqcli.recipe.schema import Recipe
    from ddqcli.runs.run import Run

EXAMPLES = examples(
    "ddq finetune model.pt --target-bits 4 --max-bits 8",
    "ddq finetune model.pt --arch net.py:build --data images/ --target-size 150kB",
    "ddq finetune model.pt --target-bits 3,4,6 --max-bits 8",
)


def finetune(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint: state dict in .pt, .pth, .th or .safetensors.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe (YAML).  [default: ./ddq.yaml, or ddq.yaml beside MODEL]"),
    ] = None,
    arch: Arch = None,
    data: DataSource = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="ddq|sdq",
            help="ddq: gates decide bit-widths. sdq: bit-widths are sampled, then fixed.  "
            "[default: ddq]",
        ),
    ] = None,
    target_bits: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Budget: average stored bits per quantized weight; one run per value.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE[,SIZE...]",
            help="Budget: size of the exported file, e.g. 150kB, 1.8MB or 12%; one run per value.",
        ),
    ] = None,
    target_format: Annotated[
        Literal["safetensors", "onnx"] | None,
        typer.Option(
            metavar="FORMAT",
            help="The file that --target-size is for: safetensors or onnx.  [default: safetensors]",
        ),
    ] = None,
    max_bits: Annotated[
        int | None, typer.Option(help="Maximum bits of a weight tensor.  [1-8]")
    ] = None,
    min_bits: Annotated[
        int | None, typer.Option(help="Minimum bits of a weight tensor.  [1-8]")
    ] = None,
    act_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of layer inputs; the first and last layer keep 8.  [1-8; default: float]"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of weights.  [default: by the run's length]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Training samples in a step.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that load images too many for memory.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed; the same seed gives the same bytes.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run folder.  [default: runs/<time>-<name>]", show_default=False),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set any recipe field, e.g. train.lr=0.02; may be repeated.",
            autocompletion=recipe_keys,
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the newest unfinished run, or the one in --run-dir; with MODEL, start "
            "one if there is none.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check model, recipe, budget and data; do not train."),
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Finetune a model under a memory budget.

    Learns each layer's quantization levels; DDQ's gates, or SDQ's sampling, decide each layer's
    bit-width. The run folder receives the quantized model, the metrics and the report.
    """
    flags = {
        "method": method,
        "model.arch": arch,
        "model.pickle": allow_pickle or None,
        "data.source": data,
        "budget.target_bits": target_bits and [_number(text) for text in target_bits.split(",")],
        "budget.target_size": target_size and [text.strip() for text in target_size.split(",")],
        "budget.target_format": target_format,
        "weights.max_bits": max_bits,
        "weights.min_bits": min_bits,
        "activations.bits": act_bits,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.lr": lr,
        "data.batch_size": batch_size,
        "data.workers": workers,
        "train.device": device,
        "train.seed": seed,
    }

    def work() -> FinetuneResult | SweepResult:
        from ddqcli.errors import UsageError
        from ddqcli.recipe.assignments import with_assignments
        from ddqcli.recipe.file import find_recipe, load_recipes
        from ddqcli.runs.run import Run

        if target_bits is not None and target_size is not None:
            raise UsageError("--target-bits and --target-size are both given; give one.")
        fields = with_assignments(
            {key: value for key, value in flags.items() if value is not None}, assign or ()
        )
        run = Run.unfinished(run_dir, or_none=model is not None, trust=trust) if resume else None
        from_run = run if not (model or recipe) else None
        path = from_run.recipe_path if from_run else recipe or find_recipe(model)
        recipes = load_recipes(path, fields)
        named = recipe or from_run or fields.get("model.pickle") or trust
        if recipes[0].model.pickle and not named:
            raise UsageError(
                f"{path} has model.pickle: true, which may run code from the checkpoint; give "
                "--allow-pickle, or name the recipe with --recipe."
            )
        checkpoint = _checkpoint(model, recipes[0])
        recipes[0].data.require_source()
        if run:
            run.check_same_recipes([each.with_checkpoint(checkpoint) for each in recipes])
        from ddqcli.render.progress import ProgressReporter
        from ddqcli.training.distributed import is_main  # imports torch: after all that is refused

        if not is_main():
            discard_stdout()
        consent = _consent(path, recipes[0], from_run, found=not (recipe or trust), given=fields)
        with consent, ProgressReporter(quiet=quiet or not is_main()) as reporter:
            if path:
                reporter.note(f"recipe: {path}")
            if len(recipes) > 1:
                from ddqcli.commands.sweep import sweep

                return sweep(
                    checkpoint,
                    recipes,
                    run=run,
                    run_dir=run_dir,
                    dry_run=dry_run,
                    listener=reporter,
                )
            from ddqcli.commands.finetune import finetune as command

            return command(
                checkpoint,
                recipes[0],
                run=run,
                run_dir=run_dir,
                dry_run=dry_run,
                listener=reporter,
            )

    run_command("finetune", work, _show, as_json)


def _number(text: str) -> float | str:
    """Convert to a number if possible; the recipe reports any other text as a fault."""
    with suppress(ValueError):
        return float(text)
    return text


def _checkpoint(model: Path | None, recipe: Recipe) -> Path:
    """Return the checkpoint of the command line, else of the recipe.

    Raises UsageError for none, CheckpointError if it is not there.
    """
    from ddqcli.errors import CheckpointError, UsageError
    from ddqcli.recipe.missing_file import CHECKPOINTS, missing_file

    named = model or recipe.model.checkpoint
    if named is None:
        raise UsageError(
            "No model is given; run `ddq finetune MODEL`, or set model.checkpoint in the recipe."
        )
    path = Path(named)
    with suppress(OSError, ValueError):  # a name that no file can have is told when it is opened
        if not path.exists():
            raise CheckpointError(missing_file(path, "checkpoint", CHECKPOINTS))
    return path


def _consent(
    path: Path | None, recipe: Recipe, run: Run | None, *, found: bool, given: dict[str, Any]
) -> AbstractContextManager[None]:
    """Return the context in which the recipe's code may run as far as the user agreed to it.

    The command line names code in `given`, or a recipe. The working folder is the user's, and so is
    its recipe, unless it was `found` beside the checkpoint. A resumed `run` speaks for itself.
    """
    from ddqcli.recipe.consent import code_fields, code_rule, found_recipe_rule
    from ddqcli.runs.trust import code_of

    if run:
        return code_of(run)
    if path is None or not found or path.parent == Path():
        return nullcontext()
    codes = {
        key: code
        for key, code in code_fields(recipe).items()
        if not any(f"{key}.".startswith(f"{field}.") for field in given)
    }
    return code_rule(found_recipe_rule(path, codes))


def _show(result: FinetuneResult | SweepResult) -> None:
    from ddqcli.commands.finetune import FinetuneResult
    from ddqcli.render import console, finetune, sweep

    if isinstance(result, FinetuneResult):
        finetune.show(result, console.out)
    else:
        sweep.show_result(result, console.out)
