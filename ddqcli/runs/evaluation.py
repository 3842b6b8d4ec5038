"""Evaluation records: the metric that judges a run, and its values; without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ddqcli.runs.record import Record

Value = float  # in the metric's unit; the fields named `float` hide the type


class Metric(Record):
    """Name, unit and direction of the values that judge a run.

    Values of the unit "%" are shares times 100, and their differences are points.
    """

    name: str = "accuracy"
    unit: str = "%"
    better: Literal["higher", "lower"] = "higher"

    @property
    def scale(self) -> float:
        """Factor from the scores that a metric's function returns to values in its unit."""
        return 100.0 if self.unit == "%" else 1.0

    def text(self, value: Value, space: str = "") -> str:
        """Return a value with its unit: 91.25%, 31.642 dB. `space` goes before a percent sign."""
        return f"{value:.2f}{space}%" if self.unit == "%" else f"{value:.5g} {self.unit}".rstrip()

    def change(self, before: Value, after: Value) -> str:
        """Return the signed difference with its unit: -1.25 points, +0.3 dB."""
        if self.unit == "%":
            return f"{after - before:+.2f} points"
        return f"{after - before:+.4g} {self.unit}".rstrip()

    def amount(self, difference: Value) -> str:
        """Return a difference without sign: 10.1 points, 0.3 dB."""
        if self.unit == "%":
            return f"{abs(difference):.1f} points"
        return f"{abs(difference):.4g} {self.unit or self.name}"

    def drop(self, before: Value, after: Value) -> Value:
        """Return by how much `after` is worse than `before`; negative if it is better."""
        return before - after if self.better == "higher" else after - before

    def tolerance(self, points: float, value: Value) -> Value:
        """Return a tolerance of so many points; in other units, of as many percent of `value`."""
        return points if self.unit == "%" else points / 100 * abs(value)

    def rounded(self, value: Value) -> Value:
        """Return a value as reports hold it: to 4 digits after the point, or to 6 digits."""
        return round(value, 4) if self.unit == "%" else float(f"{value:.6g}")

    @property
    def title(self) -> str:
        """The name as the first words of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def label(self) -> str:
        """Name and unit, for axes and columns: `accuracy, %`."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


class Accuracy(Record):
    """The metric's value on the held-out data, before and after quantization.

    Scripts read this record under the name of the default metric, whichever it is.
    """

    float: Value
    quantized: Value
    drop: Value  # by how much it became worse

    @classmethod
    def of(cls, before: Value, after: Value, metric: Metric | None = None) -> Accuracy:
        metric = metric or Metric()
        return cls(
            float=metric.rounded(before),
            quantized=metric.rounded(after),
            drop=metric.rounded(metric.drop(before, after)),
        )


class Measured(Record):
    """A metric beside the one that judges a run, and its values."""

    metric: Metric
    accuracy: Accuracy


class Stage(Record):
    """The metric's value on the evaluation data at one stage of a run."""

    name: Literal["float", "quantized", "compensated", "trained"]
    accuracy: Value


class Course(Record):
    """The stages of a run, and which state it delivers."""

    stages: tuple[Stage, ...]  # in order, without those that the run did not keep or reach
    delivered: Literal["quantized", "compensated", "trained"]
    looks: int  # evaluations on held-out training samples
    best_step: int  # of the delivered state; 0: before training

    @model_validator(mode="after")
    def _require_stages(self) -> Course:
        if not {"float", self.delivered} <= self._values.keys():
            raise ValueError("the float model or the delivered state is not among the stages")
        return self

    @property
    def start(self) -> Value:
        """Value of the last stage before training."""
        return [stage.accuracy for stage in self.stages if stage.name != "trained"][-1]

    def path(self, metric: Metric, arrow: str = "->", space: str = "") -> str:
        """Return all stages in one line: `float 92.50% -> quantized 85.00%`."""
        return f" {arrow} ".join(
            f"{stage.name} {metric.text(stage.accuracy, space)}" for stage in self.stages
        )

    def outcome(self, steps: int, metric: Metric | None = None) -> str:
        """Say in one line which state is delivered, after training of `steps` steps."""
        metric = metric or Metric()
        values = self._values
        distance = f"({metric.change(values['float'], values[self.delivered])} from float)"
        if self.delivered == "trained":
            best = f"best of {self.looks} looks: " if self.looks > 1 else ""
            return f"trained, {best}step {self.best_step:,} {distance}"
        if not steps:
            return f"{self.delivered} start, not trained {distance}"
        return f"{self.delivered} start {distance}; training did not improve it"

    @property
    def _values(self) -> dict[str, Value]:
        return {stage.name: stage.accuracy for stage in self.stages}
