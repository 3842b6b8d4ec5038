"""The checksum of an ONNX file, among its metadata: any flipped bit is seen when it is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx

from ddqcli.errors import VerificationError

_KEY = "sha256"  # of the file with zeros in place of these 64 digits
_ZEROS = "0" * 64


def sealed(proto: onnx.ModelProto, about: Mapping[str, str]) -> bytes:
    """Set the metadata and return the bytes of the file."""
    onnx.helper.set_model_props(proto, {**about, _KEY: _ZEROS})
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    onnx.helper.set_model_props(proto, {**about, _KEY: digest})
    return bytes(proto.SerializeToString(deterministic=True))


def opened(raw: bytes, name: str) -> onnx.ModelProto:
    """Parse a file of `sealed`; errors call it `name`. Raises VerificationError if damaged."""
    try:
        proto = onnx.load_model_from_string(raw)
        digest = str(properties(proto)[_KEY])
    except Exception as error:  # damage can lead to any
        raise VerificationError(
            f"{name} is damaged, or no ONNX file of this version of ddq; export it again."
        ) from error
    zeroed = raw.replace(digest.encode(), _ZEROS.encode(), 1)
    if len(digest) != 64 or hashlib.sha256(zeroed).hexdigest() != digest:
        raise VerificationError(
            f"{name} is damaged or incomplete (its SHA-256 differs); copy or export it again."
        )
    return proto


def properties(proto: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata of a model."""
    return {entry.key: entry.value for entry in proto.metadata_props}
