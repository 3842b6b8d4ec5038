"""Networks of transformers (Hugging Face), from the config.json beside their weights.

Nothing is downloaded, and no code that lies in the folder runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ddqcli.checkpoint.built_model import call_architecture
from ddqcli.checkpoint.read import Checkpoint
from ddqcli.checkpoint.state_fit import Tensors, compare_state, load_state, state_shapes
from ddqcli.errors import CheckpointError, UsageError
from ddqcli.recipe.factory import import_factory, user_errors

PREFIX = "transformers:"
_CONFIG = "config.json"
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def build_transformers(
    checkpoint: Checkpoint, arch: str, kwargs: dict[str, Any], folder: Path
) -> tuple[nn.Module, str]:
    """Return the network with the checkpoint's weights in float32, and a note.

    Args:
        checkpoint: tensors under the names in their file, or under the network's own.
        arch: `transformers:CLASS`, such as AutoModelForImageClassification.
        kwargs: values that replace those of the configuration.
        folder: holds config.json, and the weights in their file.

    Raises UsageError for a class that transformers lacks and without config.json, CheckpointError
    if the weights do not fit.
    """
    kind: Any = import_factory(arch)
    if not (folder / _CONFIG).is_file():
        raise UsageError(
            f"{arch} needs the {_CONFIG} of the network, and {folder} has none; name the folder "
            "that the network was saved in."
        )
    with user_errors(f"The configuration in {folder}"):
        config = import_factory(f"{PREFIX}AutoConfig").from_pretrained(  # type: ignore[attr-defined]
            str(folder), **_LOCAL, **kwargs
        )
    from_config = getattr(kind, "from_config", kind)  # of the Auto classes
    model = call_architecture(lambda: from_config(config), arch, {}).float()
    tensors, note = checkpoint.tensors, ""
    if not compare_state(tensors, state_shapes(model)).exact:
        tensors, note = _renamed(kind, arch, config, folder), ", names as transformers has them now"
    return model, load_state(model, tensors, checkpoint.path, arch) + note


def _renamed(kind: Any, arch: str, config: Any, folder: Path) -> Tensors:
    """Return the weights in a folder under the names that this version of transformers gives them.

    Raises CheckpointError if any are missing: transformers would draw them at random.
    """
    with user_errors(f"{arch} in {folder}"):
        loaded, info = kind.from_pretrained(
            str(folder), config=config, output_loading_info=True, **_LOCAL
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of {arch} ({', '.join(missing[:3])}); name the "
            "class that it was saved from."
        )
    tensors: Tensors = loaded.state_dict()
    return tensors
