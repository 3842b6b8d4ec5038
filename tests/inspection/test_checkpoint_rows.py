"""`ddq inspect` of a checkpoint: its rows against brute force in float64, and its pictures."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from parsed_page import Page
from safetensors.numpy import save_file

from ddqcli.commands.inspect import inspect
from ddqcli.errors import CheckpointError, DDQError
from ddqcli.inspection.checkpoint_rows import ERROR_BITS, TOTAL_BITS, kind_of
from ddqcli.inspection.histograms import BINS, SHOWN_BINS
from ddqcli.quant.histogram import Histogram
from ddqcli.quant.lloyd_max import lloyd_max
from ddqcli.quant.patterns import fit_pattern, power_of_two_pattern, uniform_pattern


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.normal(0, 0.3, (16, 3, 3, 3)),
        "block.dw1.weight": rng.normal(0, 0.2, (32, 1, 3, 3)) * rng.lognormal(0, 1, (32, 1, 1, 1)),
        "block.dw2.weight": rng.choice([-0.4, 0.4], (64, 1, 3, 3))
        + rng.normal(0, 0.05, (64, 1, 3, 3)),
        "block.pw.weight": rng.laplace(0, 0.05, (64, 32, 1, 1)),
        "fc.weight": rng.uniform(-0.1, 0.1, (100, 64)),
        "fc.bias": rng.normal(size=100),
        "bn.running_var": np.ones(64),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "net.safetensors"
    state = {name: value.astype(np.float32) for name, value in weights().items()}
    save_file({**state, "bn.num_batches_tracked": np.array(7)}, path)
    return path


@pytest.fixture(scope="module")
def result(path):
    return inspect(path)


def nearest_error(x: np.ndarray, levels: np.ndarray) -> float:
    x = x.reshape(-1).astype(np.float64)
    return float(np.min((x[:, None] - levels) ** 2, axis=1).sum() / np.square(x).sum())


def test_every_weight_has_a_row_with_its_numbers(result):
    expected = {name: value for name, value in weights().items() if value.ndim > 1}
    assert {row.name for row in result.layers} == set(expected)
    for row in result.layers:
        x = expected[row.name].astype(np.float32)
        assert (row.shape, row.parameters, row.bytes, row.dtype) == (
            x.shape,
            x.size,
            x.nbytes,
            "float32",
        )
        assert (row.min, row.max) == (x.min(), x.max())
        assert row.mean == pytest.approx(x.astype(np.float64).mean(), abs=1e-9)
        assert row.std == pytest.approx(x.astype(np.float64).std(), rel=1e-6)


def test_histogram_counts_are_those_of_brute_force(result):
    for row in result.layers:
        x = np.sort(weights()[row.name].astype(np.float32).reshape(-1).astype(np.float64))
        edges = np.linspace(row.min, row.max, SHOWN_BINS + 1)
        below = np.array([(x < edge).sum() for edge in edges[1:-1]])
        found = np.cumsum(row.histogram)[:-1]
        assert sum(row.histogram) == x.size
        # A value within a millionth of the range from an edge may fall to either side.
        loose = np.array(
            [(np.abs(x - edge) < 1e-6 * (row.max - row.min)).sum() for edge in edges[1:-1]]
        )
        assert np.all(np.abs(found - below) <= loose), row.name


@pytest.mark.parametrize("bits", ERROR_BITS)
def test_error_columns_are_those_of_brute_force(result, bits):
    for row in result.layers:
        x = weights()[row.name].astype(np.float32)
        distribution = Histogram.of(x, bins=BINS)
        fitted = {
            "uniform": fit_pattern(distribution, uniform_pattern(bits)),
            "power_of_two": fit_pattern(distribution, power_of_two_pattern(bits)),
            "best": lloyd_max(distribution, 2**bits),
        }
        for kind, levels in fitted.items():
            exact = nearest_error(x, levels)
            assert row.error[bits][kind] == pytest.approx(exact, rel=0.02, abs=1e-8), (
                row.name,
                kind,
            )


def test_best_levels_are_best_and_more_bits_are_better(result):
    for row in result.layers:
        best = [row.error[bits]["best"] for bits in ERROR_BITS]
        assert best == sorted(best, reverse=True)
        for bits in ERROR_BITS:
            assert row.error[bits]["best"] <= min(
                row.error[bits]["uniform"], row.error[bits]["power_of_two"]
            )


def test_levels_shown_are_the_best_at_4_bits(result):
    for row in result.layers:
        assert len(row.levels) == 16
        assert nearest_error(
            weights()[row.name].astype(np.float32), np.array(row.levels)
        ) == pytest.approx(row.error[4]["best"], rel=0.02)


def test_kinds_and_shapes_are_told(result):
    found = {row.name: (row.kind, row.distribution) for row in result.layers}
    assert found == {
        "conv1.weight": ("conv", "Gaussian-like"),
        "block.dw1.weight": ("depthwise", "heavy-tailed"),
        "block.dw2.weight": ("depthwise", "multi-peaked"),
        "block.pw.weight": ("conv", "heavy-tailed"),
        "fc.weight": ("linear", "flat"),
    }


@pytest.mark.parametrize(
    ("name", "shape", "several", "kind"),
    [
        ("conv1.weight", (6, 1, 5, 5), False, "conv"),  # LeNet's first layer
        ("conv_dw.weight", (6, 1, 5, 5), False, "depthwise"),
        ("features.3.weight", (6, 1, 5, 5), True, "depthwise"),
        ("features.3.weight", (6, 1, 1, 1), True, "conv"),
        ("conv.weight", (8, 4, 3), True, "conv"),
        ("stem.weight", (8, 4, 3, 3, 3), True, "conv"),
        ("encoder.in_proj_weight", (30, 10), True, "linear"),
        ("embeddings.word.weight", (100, 16), True, "embedding"),
        ("wte.weight", (100, 16), True, "embedding"),
        ("pos_embedding", (1, 197, 768), True, "embedding"),
        ("patch_embed.proj.weight", (768, 3, 16, 16), True, "conv"),
    ],
)
def test_a_kind_is_guessed_from_shape_and_name(name, shape, several, kind):
    assert kind_of(name, shape, several) == kind


def test_depthwise_rows_hold_their_channels_quartiles(result):
    row = next(row for row in result.layers if row.name == "block.dw1.weight")
    x = np.sort(weights()["block.dw1.weight"].astype(np.float32).reshape(32, 9), axis=1)
    np.testing.assert_allclose(row.channels, x[:, [0, 2, 4, 6, 8]], rtol=1e-6)
    assert all(not row.channels for row in result.layers if row.kind != "depthwise")


def test_totals_add_up(result):
    sizes = {row.name: row.parameters for row in result.layers}
    rest = 4 * (100 + 64) + 8
    assert result.rest == {"tensors": 3, "parameters": 165, "bytes": rest}
    assert result.parameters == sum(sizes.values()) + 165
    assert result.bytes == 4 * sum(sizes.values()) + rest
    for bits in TOTAL_BITS:
        levels = 2**bits if bits < 8 else 0
        assert result.bytes_at[bits] == rest + sum(
            -(-n * bits // 8) + levels + 6 for n in sizes.values()
        )


def test_json_keys_are_these(result):
    data = json.loads(json.dumps(result.data()))
    assert list(data) == [
        "version",
        "what",
        "path",
        "note",
        "layers",
        "rest",
        "tied",
        "totals",
        "pictures",
    ]
    assert (data["version"], data["what"]) == (1, "checkpoint")
    assert list(data["totals"]) == ["parameters", "bytes", "bytes_at"]
    assert list(data["totals"]["bytes_at"]) == ["8", "6", "4", "3", "2"]
    assert list(data["rest"]) == ["tensors", "parameters", "bytes"]
    assert list(data["layers"][0]) == [
        *(
            "name",
            "kind",
            "shape",
            "dtype",
            "parameters",
            "bytes",
            "min",
            "max",
            "mean",
            "std",
            "tail_weight",
        ),
        *("distribution", "error", "histogram", "levels"),
    ]
    assert list(data["layers"][0]["error"]) == ["2", "3", "4", "8"]
    assert list(data["layers"][0]["error"]["4"]) == ["uniform", "power_of_two", "best"]
    assert len(data["layers"][0]["histogram"]) == 128


def test_a_large_tensor_is_read_in_pieces_with_the_same_result(path, result, monkeypatch):
    monkeypatch.setattr("ddqcli.checkpoint.chunks.CHUNK_VALUES", 1000)
    pieced = inspect(path)
    for row, whole in zip(pieced.layers, result.layers, strict=True):
        assert (row.histogram, row.distribution, row.min) == (
            whole.histogram,
            whole.distribution,
            whole.min,
        )
        assert row.error[4] == pytest.approx(whole.error[4], rel=1e-6)


def test_torch_and_safetensors_files_give_the_same_rows(result, tmp_path):
    state = {name: torch.tensor(value.astype(np.float32)) for name, value in weights().items()}
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        tmp_path / "net.pt",
    )
    found = inspect(tmp_path / "net.pt")
    assert found.note == "state dict under 'state_dict', prefix 'module.' stripped"
    assert sorted(found.layers, key=lambda row: row.name) == sorted(
        result.layers, key=lambda row: row.name
    )


def test_a_shared_tensor_is_counted_once(tmp_path):
    tied = torch.randn(20, 10)
    torch.save({"embed.weight": tied, "head.weight": tied}, tmp_path / "net.pt")
    found = inspect(tmp_path / "net.pt")
    assert [row.name for row in found.layers] == ["embed.weight"]
    assert found.tied == {"head.weight": "embed.weight"}
    assert found.bytes == 800


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["fc.weight", "fc.bias"])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, name, fault):
    state = {"fc.weight": np.ones((4, 4), np.float32), "fc.bias": np.ones(4, np.float32)}
    state[name].flat[2] = fault
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinite values"):
        inspect(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    "state", [{}, {"a": np.zeros((0, 3), np.float32)}], ids=["nothing", "no values"]
)
def test_an_empty_checkpoint_is_refused(tmp_path, state):
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        inspect(tmp_path / "net.safetensors")


def test_a_checkpoint_without_layers_has_totals_only(tmp_path):
    save_file({"bn.weight": np.ones(8, np.float32)}, tmp_path / "net.safetensors")
    found = inspect(tmp_path / "net.safetensors")
    assert found.layers == ()
    assert found.bytes == found.bytes_at[2] == 32


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_tensor_has_next_to_no_error(tmp_path, value):
    save_file({"fc.weight": np.full((30, 30), value, np.float32)}, tmp_path / "net.safetensors")
    (row,) = inspect(tmp_path / "net.safetensors").layers
    assert (row.distribution, row.min, row.max, row.std) == ("constant", value, value, 0.0)
    assert all(error < 1e-9 for errors in row.error.values() for error in errors.values())
    assert sum(row.histogram) == 900


def test_progress_names_every_tensor_and_ends_complete(path):
    calls = []
    inspect(path, on_progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(6))
    assert {total for _, total, _ in calls} == {5}
    assert "fc.weight" in [name for _, _, name in calls]


def test_pictures_are_written_and_named(path, tmp_path):
    found = inspect(path, out=tmp_path / "pictures")
    names = {str(p.relative_to(tmp_path / "pictures")) for p in found.pictures}
    assert found.pictures[0] == tmp_path / "pictures" / "index.html"
    assert {"overview-1.png", "overview-1.svg", "channels/001-block.dw1.weight.svg"} <= names
    assert len([name for name in names if name.startswith("layers/")]) == 2 * 5
    assert all(p.stat().st_size > 2000 for p in found.pictures)


def test_the_page_shows_sizes_then_every_layer_then_labeled_pictures(path, tmp_path):
    found = inspect(path, out=tmp_path)
    page = Page.read(tmp_path / "index.html")
    assert page.all("dt") == [
        "Size as stored",
        *(f"With weights of {bits} bits" for bits in (8, 4, 3, 2)),
    ]
    sizes = page.all("dd")[::2]
    shown = [number * {"B": 1, "kB": 1e3}[unit] for number, unit in map(number_and_unit, sizes)]
    stored = [found.bytes, *(found.bytes_at[bits] for bits in (8, 4, 3, 2))]
    assert shown == pytest.approx(stored, rel=0.005)
    assert page.places["dl"][0] < page.places["table"][0] < page.places["figure"][0]
    for row in found.layers:
        cells = page.row_of(row.name, 19)
        assert cells[1:3] == [row.kind, "×".join(map(str, row.shape))]
        assert cells[5] == f"{row.parameters:,}"
    assert len(page.all("figure")) == len(page.svgs) == 5 + 2
    for svg, row in zip(page.svgs, found.layers, strict=False):
        assert svg["role"] == "img"
        assert svg["aria-label"].startswith(f"{row.name}: {row.distribution}: ")
        assert svg["aria-label"].endswith("best 16 levels (4 bits, Lloyd-Max)")
    assert page.links == []


def number_and_unit(text):
    number, unit = text.split()
    return float(number), unit


def test_a_folder_that_cannot_be_made_is_named(path, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DDQError, match="taken"):
        inspect(path, out=tmp_path / "taken")


def test_neither_torch_nor_matplotlib_is_imported(path):
    code = (
        "import sys, pathlib; from ddqcli.commands.inspect import inspect; "
        f"inspect(pathlib.Path({str(path)!r})); "
        "assert not {'torch', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
