"""The base of the records in report.json and the like."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """The fields, in their order, are the keys of the JSON object."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    def data(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        return self.model_dump()
