"""Report records: typed rows and totals of a finished model, and a sweep's table; without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ddqcli.artifact.sizes import tensor_bytes
from ddqcli.runs.evaluation import Accuracy, Course, Measured, Metric
from ddqcli.runs.layer_order import in_order, order_runs
from ddqcli.runs.record import Record

if TYPE_CHECKING:
    from ddqcli.artifact.read import Artifact

Count = Annotated[int, Field(ge=0, lt=1 << 62)]  # bytes or values
Size = Annotated[int, Field(ge=1, lt=1 << 62)]  # bytes of a whole model, or of a budget

REPORT_VERSION = 1
SWEEP_VERSION = 1


class TensorRow(Record):
    """One quantized tensor."""

    name: str
    kind: str  # Conv2d, depthwise Conv2d, Linear, ...; "bias"
    shape: tuple[int, ...]
    bits: int | float  # the mean if the groups differ
    levels: int  # distinct levels; the most of any group
    bytes: Count  # in the exported file
    float_bytes: Count
    error: float  # squared error of quantization over the sum of squares

    @classmethod
    def of(
        cls,
        name: str,
        kind: str,
        shape: Sequence[int],
        bits: Sequence[int],
        distinct_levels: Sequence[int],
        error: float,
        *,
        element_size: int = 4,
    ) -> TensorRow:
        """Return the row of a tensor with G groups.

        `bits` and `distinct_levels` are [G]; `element_size` is the bytes of a float element.
        """
        numel = math.prod(shape)
        return cls(
            name=name,
            kind=kind,
            shape=tuple(shape),
            bits=bits[0] if len(set(bits)) == 1 else round(sum(bits) / len(bits), 4),
            levels=max(distinct_levels),
            bytes=tensor_bytes([numel // len(bits)] * len(bits), bits),
            float_bytes=element_size * numel,
            error=error,
        )


class Totals(Record):
    """Sizes of the exported file."""

    bytes: Count  # of the whole file
    float_bytes: Count
    budget_bytes: Size | None
    average_bits: float  # stored bits a quantized weight, level tables included
    quantized_bytes: Count
    kept_bytes: Count  # of unquantized tensors and of inputs' level tables
    manifest_bytes: Count = (
        0  # of names, shapes, report and header; older reports do not count them
    )
    weights: Count  # number of quantized values

    @classmethod
    def of(
        cls,
        rows: Sequence[TensorRow],
        *,
        float_bytes: int,
        overhead_bytes: int,
        manifest_bytes: int,
        budget_bytes: int | None,
    ) -> Totals:
        """Return the totals of all quantized tensors and of the bytes beside them."""
        quantized_bytes = sum(row.bytes for row in rows)
        weights = sum(math.prod(row.shape) for row in rows)
        return cls(
            bytes=quantized_bytes + overhead_bytes + manifest_bytes,
            float_bytes=float_bytes,
            budget_bytes=budget_bytes,
            average_bits=8 * quantized_bytes / max(1, weights),
            quantized_bytes=quantized_bytes,
            kept_bytes=overhead_bytes,
            manifest_bytes=manifest_bytes,
            weights=weights,
        )


class ActivationRow(Record):
    """One layer's quantized input."""

    name: str  # of the layer
    bits: int
    levels: Literal["learned", "uniform"]
    bytes: Count  # of its level table

    @classmethod
    def of(cls, name: str, bits: int, *, learned: bool) -> ActivationRow:
        return cls(
            name=name,
            bits=bits,
            levels="learned" if learned else "uniform",
            bytes=tensor_bytes([0], [bits]),
        )


class Source(Record):
    """The float model, and the version of ddq that quantized it."""

    path: str
    sha256: str
    arch: str
    ddq: str


class RunFacts(Record):
    """Facts of the training."""

    steps: int
    seed: int
    method: str = "ddq"  # or "sdq"


class EmbeddedReport(Record):
    """The part of a report that an exported file carries in its manifest."""

    metric: Metric = Field(default_factory=Metric)
    other_metrics: tuple[Measured, ...] = ()
    order: tuple[int, ...] = ()  # see `order_runs`
    accuracy: Accuracy | None
    course: Course | None = None
    run: RunFacts
    warnings: tuple[str, ...]
    source: Source
    kind: tuple[str, ...]  # of each tensor, names ascending
    error: tuple[float, ...]
    learned: tuple[str, ...]  # layers whose inputs have learned levels
    budget_bytes: Size | None
    float_bytes: Count


class Report(Record):
    """The content of `ddq report`: of a run folder, or of the file exported from it."""

    version: int
    layers: tuple[TensorRow, ...]
    totals: Totals
    metric: Metric = Field(default_factory=Metric)  # that `accuracy` and `course` hold values of
    accuracy: Accuracy | None  # None if nothing was evaluated
    other_metrics: tuple[Measured, ...] = ()  # metrics that decide nothing
    course: Course | None = None  # None after a dry run, and in reports of older versions
    activations: tuple[ActivationRow, ...]
    kept_float: dict[str, str]  # unquantized tensor -> reason
    source: Source
    run: RunFacts
    warnings: tuple[str, ...]

    @property
    def is_trained(self) -> bool:
        """True unless the model is the start of its run: no training, or none that helped."""
        return self.course is None or self.course.delivered == "trained"

    def embedded(self) -> dict[str, Any]:
        """Return the part that an exported file carries, as short as it can be.

        The rest follows from the file's tensors; `from_artifact` is the inverse. Paths are reduced
        to names, and errors to three digits.
        """
        rows = sorted(self.layers, key=lambda row: row.name)
        paths = {key: Path(getattr(self.source, key)).name for key in ("path", "arch")}
        embedded = EmbeddedReport(
            metric=self.metric,
            other_metrics=self.other_metrics,
            order=tuple(order_runs([row.name for row in self.layers])),
            accuracy=self.accuracy,
            course=self.course,
            run=self.run,
            warnings=self.warnings,
            source=self.source.model_copy(update=paths),
            kind=tuple(row.kind for row in rows),
            error=tuple(float(f"{row.error:.3g}") for row in rows),
            learned=tuple(row.name for row in self.activations if row.levels == "learned"),
            budget_bytes=self.totals.budget_bytes,
            float_bytes=self.totals.float_bytes,
        )
        data = embedded.model_dump(mode="json")
        data["run"] = self.run.model_dump(exclude_defaults=True)
        usual = {"metric": Metric().data(), "other_metrics": [], "order": []}
        return {key: value for key, value in data.items() if value != usual.get(key, ...)}

    def with_manifest(self, nbytes: int) -> Report:
        """Return the report of a file whose manifest and header take `nbytes`."""
        change = nbytes - self.totals.manifest_bytes
        return self._with_totals(bytes=self.totals.bytes + change, manifest_bytes=nbytes)

    def with_budget(self, nbytes: int) -> Report:
        """Return the report with another budget."""
        return self._with_totals(budget_bytes=nbytes)

    def _with_totals(self, **values: int) -> Report:
        return self.model_copy(update={"totals": self.totals.model_copy(update=values)})

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Report:
        """Return the report of an exported file.

        Raises LookupError if the file carries none, ValidationError if a key of it is not right,
        and ValueError if it is another file's.
        """
        embedded = EmbeddedReport.model_validate(artifact.meta["report"])
        tensors = sorted(artifact.quantized.values(), key=lambda tensor: tensor.name)
        by_name = {
            tensor.name: TensorRow.of(
                tensor.name,
                kind,
                tensor.shape,
                tensor.bits,
                [len(set(levels.tolist())) for levels in tensor.levels],
                error,
            )
            for tensor, kind, error in zip(tensors, embedded.kind, embedded.error, strict=True)
        }
        rows = [by_name[name] for name in in_order(by_name, embedded.order)]
        totals = Totals.of(
            rows,
            float_bytes=embedded.float_bytes,
            overhead_bytes=artifact.sizes.payload - sum(row.bytes for row in rows),
            manifest_bytes=artifact.sizes.file - artifact.sizes.payload,
            budget_bytes=embedded.budget_bytes,
        )
        layers = [row.name.rpartition(".")[0] for row in rows]
        tables = {table.layer: table for table in artifact.activations.values()}
        activations = [
            ActivationRow.of(layer, tables[layer].bits, learned=layer in embedded.learned)
            for layer in dict.fromkeys([*layers, *tables])
            if layer in tables
        ]
        return cls(
            version=REPORT_VERSION,
            layers=tuple(rows),
            totals=totals,
            activations=tuple(activations),
            kept_float={name: f"stored as {dtype}" for name, dtype in artifact.dtypes.items()}
            | dict.fromkeys(artifact.constants, "a constant: takes no bytes"),
            metric=embedded.metric,
            other_metrics=embedded.other_metrics,
            accuracy=embedded.accuracy,
            course=embedded.course,
            source=embedded.source,
            run=embedded.run,
            warnings=embedded.warnings,
        )


class FloatModel(Record):
    """The float model beside a sweep's targets."""

    bytes: Count
    accuracy: float | None


class SweepRow(Record):
    """One target of a sweep."""

    target: str
    bytes: Count
    budget_bytes: Size | None
    average_bits: float
    accuracy: float | None
    start: float | None  # of the last stage before training
    drop: float | None
    run: str | None  # folder inside the sweep's folder; None after a dry run
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, target: str, report: Report, run: str | None) -> SweepRow:
        accuracy = report.accuracy
        return cls(
            target=target,
            bytes=report.totals.bytes,
            budget_bytes=report.totals.budget_bytes,
            average_bits=report.totals.average_bits,
            accuracy=accuracy.quantized if accuracy else None,
            start=report.course.start if report.course else None,
            drop=accuracy.drop if accuracy else None,
            run=run,
            warnings=report.warnings,
        )


class SweepTable(Record):
    """Size against accuracy: the float model, and a row for each target."""

    version: int = SWEEP_VERSION
    metric: Metric = Field(default_factory=Metric)
    float: FloatModel
    targets: tuple[SweepRow, ...]
    source: Source

    @classmethod
    def of(cls, first: Report, targets: Sequence[SweepRow]) -> SweepTable:
        """Return the table of `targets`; `first` is the report of any of them."""
        float_model = FloatModel(
            bytes=first.totals.float_bytes,
            accuracy=first.accuracy.float if first.accuracy else None,
        )
        return cls(
            metric=first.metric, float=float_model, targets=tuple(targets), source=first.source
        )
