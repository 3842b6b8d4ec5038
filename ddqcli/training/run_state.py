"""Entries of last.pt beside the trainer's state, for resuming a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from ddqcli.errors import DDQError
from ddqcli.training.detect_augmentation import DetectedAugmentation

_AUGMENTATION = TypeAdapter(DetectedAugmentation)
_STATE_FORMAT = 6  # raised when the contents of last.pt change


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Facts that a resumed run must share with the saved state.

    `Run.load_resume_state` compares them.


    Attributes:
        format: version of the state's contents.
        sha256: hash of the float checkpoint.
        teacher: hash of the teacher's checkpoint; None if the float model is the teacher.
        recipe: text of recipe.yaml.
        steps: training steps in all.
        data: fingerprint of the data.
        files: fingerprint of the files that the data are read from.
    """

    format: int = _STATE_FORMAT
    sha256: str
    teacher: str | None = None
    recipe: str
    steps: int
    data: str
    files: str = ""

    def state(self) -> dict[str, Any]:
        """Return the facts by name."""
        return asdict(self)

    def shared_state(self) -> dict[str, Any]:
        """Return the facts that all targets of a sweep share: all but the recipe."""
        return {name: fact for name, fact in self.state().items() if name != "recipe"}


@dataclass(frozen=True)
class FloatBaseline:
    """Measurements on the float model; a resumed run takes them from the saved state."""

    accuracy: float  # the metric on held-out data, in its unit
    augmentation: DetectedAugmentation
    surroundings: Mapping[str, str]  # in which they were measured: see `same_run`
    inputs: str = ""  # hash of the first held-out samples
    outputs: list[Tensor] | None = None  # of the float model for these
    others: tuple[float, ...] = ()  # metrics that decide nothing, in their units

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FloatBaseline:
        """Read the baseline from a saved state. Raises DDQError if that is not one of ddq's."""
        try:
            accuracy, *others = map(float, (state["float_accuracy"], *state["float_others"]))
            if not all(map(math.isfinite, (accuracy, *others))):
                raise ValueError("a metric is not finite")
            return cls(
                accuracy,
                _AUGMENTATION.validate_python(state["augmentation"]),
                dict(state["surroundings"]),
                state["float_inputs"],
                state["float_outputs"],
                tuple(others),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DDQError(
                "The saved state is not as this version of ddq writes it; begin a new run."
            ) from error

    def state(self) -> dict[str, Any]:
        """Return the entries of the saved state. Augmentation that was not detected is left out."""
        detected = {k: v for k, v in asdict(self.augmentation).items() if v is not None}
        return {
            "float_accuracy": self.accuracy,
            "augmentation": detected,
            "surroundings": dict(self.surroundings),
            "float_inputs": self.inputs,
            "float_outputs": self.outputs,
            "float_others": self.others,
        }
