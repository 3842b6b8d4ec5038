"""The report of a quantized model as it stands in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddqcli.qat.budget import ResolvedBudget
from ddqcli.qat.model import QuantizedModel, QuantizedParameter
from ddqcli.runs.evaluation import Accuracy, Course, Measured, Metric
from ddqcli.runs.report import (
    REPORT_VERSION,
    ActivationRow,
    Report,
    RunFacts,
    Source,
    TensorRow,
    Totals,
)
from ddqcli.training.snapshot import relative_error


@torch.no_grad()
def build_report(
    model: QuantizedModel,
    budget: ResolvedBudget,
    *,
    metric: Metric | None = None,
    accuracy: tuple[float, float] | None,
    other_metrics: Sequence[Measured] = (),
    course: Course | None = None,
    source: Source,
    run: RunFacts,
    warnings: Sequence[str] = (),
) -> Report:
    """Return the report.

    `accuracy` is the value of `metric` (float, quantized), or None if not measured;
    `other_metrics` have values of their own.
    """
    metric = metric or Metric()
    rows = tuple(_row(tensor) for tensor in model.tensors)
    return Report(
        version=REPORT_VERSION,
        layers=rows,
        totals=Totals.of(
            rows,
            float_bytes=budget.float_bytes,
            overhead_bytes=budget.overhead_bytes,
            manifest_bytes=budget.description_bytes,
            budget_bytes=budget.file_limit,
        ),
        metric=metric,
        accuracy=Accuracy.of(*accuracy, metric) if accuracy else None,
        other_metrics=tuple(other_metrics),
        course=course,
        activations=tuple(
            ActivationRow.of(name, activation.bits, learned=activation.learned is not None)
            for name, activation in model.activations.items()
        ),
        kept_float=dict(model.kept_float),
        source=source,
        run=run,
        warnings=tuple(warnings),
    )


def _row(tensor: QuantizedParameter) -> TensorRow:
    levels, _, _ = tensor.quantizer.effective_levels()
    return TensorRow.of(
        tensor.name,
        tensor.kind,
        tensor.shape,
        tensor.quantizer.bits,
        [len(set(level.tolist())) for level in levels],
        relative_error(tensor),
        element_size=tensor.parameter.element_size(),
    )
