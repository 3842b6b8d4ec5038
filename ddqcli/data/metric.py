"""A user's own metrics: functions of outputs and targets, with name, unit and direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ddqcli.data.batches import batch_size
from ddqcli.data.classification import Score
from ddqcli.data.own_loss import call_own
from ddqcli.data.source import list_names
from ddqcli.errors import DataError
from ddqcli.runs.evaluation import Metric

_EXAMPLE = '{"name": "PSNR", "unit": "dB", "better": "higher", "function": psnr}'


def own_metrics(given: Any, spec: str) -> list[tuple[Score, Metric]]:
    """Return each metric of a factory: one alone, or those of a list, the first of which decides.

    Raises DataError as `own_metric`, for an empty list, and for two metrics of one name.
    """
    if not isinstance(given, (list, tuple)):
        return [own_metric(given, spec)]
    metrics = [own_metric(each, spec) for each in given]
    names = [metric.name for _, metric in metrics]
    if not names or len(set(names)) < len(names):
        raise DataError(
            f"The data factory {spec} returned a list of metrics named {list_names(names)}; give "
            f"at least one, and each a name of its own: [{_EXAMPLE}, ...]."
        )
    return metrics


def own_metric(given: Any, spec: str) -> tuple[Score, Metric]:
    """Return the scores' function of a factory's metric, and their name, unit and direction.

    A function alone is an accuracy: it returns shares in 0..1, which are shown in percent. A
    mapping holds the function beside its name. Raises DataError for anything else.
    """
    if not isinstance(given, Mapping):
        return _checked(_require_function(given, spec), spec, shares=True), Metric()
    fields = {key: value for key, value in given.items() if key != "function"}
    function = _require_function(given.get("function"), spec)
    try:
        metric = Metric.model_validate({"unit": "", **fields})
        if "name" not in fields:
            raise ValueError("it has no name")
    except (ValidationError, ValueError) as error:
        raise DataError(
            f"The metric of {spec} holds {list_names(given)}; give it a name, and if needed a unit "
            f'and the direction ("higher" or "lower") that is better: {_EXAMPLE}.'
        ) from error
    return _checked(function, spec, shares=False), metric


def _require_function(given: Any, spec: str) -> Score:
    if not callable(given):
        raise DataError(
            f"The data factory {spec} returned a metric that is no function of (output, target)."
        )
    function: Score = given
    return function


def _checked(function: Score, spec: str, *, shares: bool) -> Score:
    """Wrap a metric: raise DataError unless it returns one score for each sample."""

    def checked(output: Any, target: Any) -> Tensor:
        samples = batch_size((output, target))
        needed = f"{samples} scores are needed, one a sample"
        scores = call_own(function, "metric", spec, output, target, needed)
        if not isinstance(scores, Tensor) or scores.ndim != 1:
            is_tensor = isinstance(scores, Tensor)
            kind = f"shape {list(scores.shape)}" if is_tensor else f"a {type(scores).__name__}"
            raise DataError(f"The metric of {spec} returned {kind}; {needed}.")
        if shares and ((scores < -1e-6) | (scores > 1 + 1e-6)).any():
            raise DataError(
                f"The metric of {spec} returned scores from {scores.min():.4g} to "
                f"{scores.max():.4g}, and an accuracy is a share in 0..1; name what it is: "
                f'"metric": {_EXAMPLE}.'
            )
        return scores

    return checked
