"""Checkpoints as training frameworks write them: loaded, with a note of what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddqcli.checkpoint.read import load_checkpoint
from ddqcli.checkpoint.state_fit import load_state
from ddqcli.checkpoint.tensors import open_tensors
from ddqcli.errors import CheckpointError


class Net(nn.Module):
    """An embedding that is tied to the last layer, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = (
            nn.Embedding(5, 4),
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        )
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return Net().state_dict()


def renamed(change: Any) -> dict[str, Tensor]:
    return {change(name): value for name, value in state().items()}


def without_head() -> dict[str, Tensor]:
    return {name: value for name, value in state().items() if name != "head.weight"}


EXTRA = {"criterion.weight": torch.ones(3), "metric.total": torch.zeros(())}
FILES: dict[str, tuple[Any, str]] = {  # content, note
    "plain": (state(), ""),
    "DeepSpeed": ({"module": state(), "optimizer": {"lr": 0.1}}, "under 'module'"),
    "EMA": ({"model": EXTRA, "ema": {"module": state(), "updates": 7}}, "under 'ema' > 'module'"),
    "BasicSR": ({"params": EXTRA, "params_ema": state()}, "under 'params_ema'"),
    "DDP": (renamed(lambda n: f"module.{n}"), "prefix 'module.' stripped"),
    "DDP of a part": (
        renamed(lambda n: n.replace("body.0", "body.module.0")),
        "module stripped from names",
    ),
    "DDP of some parts": (
        renamed(lambda n: f"module.{n}" if n.startswith("body") else n),
        "module stripped from names",
    ),
    "an average beside its settings": (
        {"model": EXTRA, "ema": {"decay": 0.99, "shadow": state()}},
        "under 'ema' > 'shadow'",
    ),
    "an average without names": (
        {"model": state(), "ema": {"shadow_params": list(state().values())}},
        "under 'model'",
    ),
    "under a name of its own": ({"epoch": 3, "student": state()}, "under 'student'"),
    "FSDP": (
        renamed(lambda n: f"_fsdp_wrapped_module.{n}".replace("body", "body._fsdp_wrapped_module")),
        "prefix '_fsdp_wrapped_module.' stripped, _fsdp_wrapped_module stripped from names",
    ),
    "compiled part": (
        renamed(lambda n: n.replace("body.0", "body.0._orig_mod")),
        "_orig_mod stripped from names",
    ),
    "Lightning": (
        {"state_dict": renamed(lambda n: f"model.{n}") | EXTRA},
        "prefix 'model.' stripped, 2 tensors left out (criterion.weight, metric.total)",
    ),
    "Lightning with DDP": (
        {"state_dict": renamed(lambda n: f"net.module.{n}") | EXTRA},
        "prefix 'net.module.' stripped, 2 tensors left out",
    ),
    "metrics beside": (state() | EXTRA, "2 tensors left out (criterion.weight, metric.total)"),
    "tied": (without_head(), "head.weight tied to embed.weight"),
    "tied, other name": (
        {name: value for name, value in state().items() if name != "embed.weight"},
        "embed.weight tied to head.weight",
    ),
    "tied in a training module": (
        {f"model.{name}": value for name, value in without_head().items()} | EXTRA,
        "2 tensors left out (criterion.weight, metric.total), head.weight tied to embed.weight",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_it_loads_with_a_note(name: str, tmp_path: Path) -> None:
    content, note = FILES[name]
    torch.save(content, tmp_path / "c.pt")
    checkpoint, net = load_checkpoint(tmp_path / "c.pt"), Net()
    notes = checkpoint.note + load_state(net, checkpoint.tensors, checkpoint.path, "net.py:Net")
    assert note in notes
    assert net.head.weight is net.embed.weight
    for key, value in net.state_dict().items():
        assert torch.equal(value, state()[key]), key


def test_a_network_with_compiled_parts_gets_its_own_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    net = nn.Sequential(Wrapper(nn.Linear(2, 2)), nn.Linear(2, 2))
    tensors = {key.replace("_orig_mod.", ""): value + 1 for key, value in net.state_dict().items()}
    assert load_state(net, tensors, Path("c.pt"), "net") == ""
    assert torch.equal(net.state_dict()["0._orig_mod.weight"], tensors["0.weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without_head() | {"body.5.weight": torch.ones(1)}, r"unknown 1 tensors \(body.5.weight\)"),
        ({k: v for k, v in state().items() if "body.0" not in k}, "lacks 2 tensors"),
        (
            renamed(lambda n: f"student.{n}") | renamed(lambda n: f"teacher.{n}"),
            "holds this network under 'student.' and 'teacher.'",
        ),
        (
            state() | {"head.weight": state()["head.weight"] + 1},
            "different values for embed.weight and head.weight, which are one tensor in net.py:Net",
        ),
    ],
)
def test_what_would_change_the_function_is_refused(tensors: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_state(Net(), tensors, Path("c.pt"), "net.py:Net")


def test_inspect_shows_the_same_names(tmp_path: Path) -> None:
    torch.save(FILES["compiled part"][0], tmp_path / "c.pt")
    tensors, note = open_tensors(tmp_path / "c.pt")
    assert [tensor.name for tensor in tensors] == list(state())
    assert note.endswith("_orig_mod stripped from names")


def test_names_that_would_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({"a._orig_mod.weight": torch.ones(1), "a.weight": torch.ones(1)}, tmp_path / "c.pt")
    for read in (load_checkpoint, open_tensors):
        with pytest.raises(CheckpointError, match="two tensors would have one name"):
            read(tmp_path / "c.pt")


def write_shards(folder: Path) -> Path:
    """Write two safetensors files and their index, as Hugging Face does."""
    names, files = list(without_head()), ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    where = {name: files[k % 2] for k, name in enumerate(names)}
    for file in files:
        part = {name: state()[name] for name in names if where[name] == file}
        save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_a_checkpoint_in_several_files_is_read_by_its_index_or_folder(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for path in (index, tmp_path):
        checkpoint, net = load_checkpoint(path), Net()
        notes = checkpoint.note + load_state(net, checkpoint.tensors, path, "net")
        assert "in 2 files" in notes
        assert all(torch.equal(value, state()[key]) for key, value in net.state_dict().items())
    before = checkpoint.sha256
    assert [tensor.name for tensor in open_tensors(index)[0]] == list(checkpoint.tensors)
    changed = {k: v + 1 for k, v in load_file(tmp_path / "model-2-of-2.safetensors").items()}
    save_file(changed, tmp_path / "model-2-of-2.safetensors")
    assert load_checkpoint(index).sha256 != before


def test_a_folder_with_one_file_of_weights_is_read(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "pytorch_model.bin")
    assert load_checkpoint(tmp_path).tensors.keys() == state().keys()
    save_file(without_head(), tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path).tensors.keys() == without_head().keys()


def test_incomplete_indices_are_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-2-of-2.safetensors, which is"):
        load_checkpoint(index)
    (tmp_path / "up").mkdir()
    other = tmp_path / "up" / "a.safetensors.index.json"
    other.write_text(json.dumps({"weight_map": {"a": "../model-1-of-2.safetensors"}}))
    with pytest.raises(CheckpointError, match="which is not beside it"):
        load_checkpoint(other)
    for content in ("{", "{}", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        other.write_text(content)
        with pytest.raises(CheckpointError, match="is no index of a checkpoint"):
            load_checkpoint(other)
