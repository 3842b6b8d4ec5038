"""Checkpoints in several files under an index, and folders of Hugging Face that hold one."""

from __future__ import annotations

from pathlib import Path

from ddqcli.errors import CheckpointError
from ddqcli.json_text import read_json

INDEX = ".index.json"
# Weights in a folder of Hugging Face, the first of these that is there.
_WEIGHTS = tuple(
    f"{stem}{end}"
    for stem, suffix in (
        ("model", ".safetensors"),
        ("diffusion_pytorch_model", ".safetensors"),
        ("pytorch_model", ".bin"),
    )
    for end in (suffix + INDEX, suffix)
)


def weights_in(folder: Path) -> Path:
    """Return the file or index of the weights in a folder. Raises CheckpointError without one."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} is a folder; name the checkpoint file in it.")


def shard_files(index: Path) -> list[Path]:
    """Return the files that an index names, each once. Raises CheckpointError if one is missing."""
    try:
        names = read_json(index)["weight_map"].values()
        files = [index.parent / name for name in dict.fromkeys(names)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of a checkpoint: it has no weight_map of files."
        ) from error
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise CheckpointError(
                f"{index} names {file.name}, which is not beside it; download all of its files."
            )
    return files
