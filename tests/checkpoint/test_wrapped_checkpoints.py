"""Checkpoints as training frameworks write them: loaded, with a note of what was left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
