"""`ddq inspect` of a run and of an exported file: levels and counts against brute force."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import dequantized, export_made, make_run, weights_of
from parsed_page import Page
from tiny_project import ddq, inside

from ddqcli.artifact import decoder
from ddqcli.commands.inspect import inspect
from ddqcli.errors import DDQError, UsageError, VerificationError
from ddqcli.inspection import layer_figures
from ddqcli.inspection.histograms import SHOWN_BINS
from ddqcli.inspection.trained_page import write_trained_page
from ddqcli.inspection.trained_rows import TrainedResult, short_kind
from ddqcli.runs.run import Run

NAMES = [f"block{k}.conv.weight" for k in range(1, 5)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_made(run, tmp_path_factory.mktemp("made") / "model.safetensors")


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("made") / "channels", axis=0)


def counted(values: np.ndarray, low: float, high: float) -> list[int]:
    """Count the values in each bin; one on an edge is in the bin above, but for the last."""
    bins = [0] * SHOWN_BINS
    for value in values.reshape(-1).astype(float):
        bins[min(SHOWN_BINS - 1, int((value - low) / (high - low) * SHOWN_BINS))] += 1
    return bins


def test_a_run_shows_its_levels_over_its_float_weights(run: Run) -> None:
    found = inspect(run.path)
    assert isinstance(found, TrainedResult)
    assert (found.what, found.histogram_of) == ("run", "float weights")
    assert found.note == "finetuned from some/net.pt, 100 steps"
    assert [row.name for row in found.layers] == NAMES  # in the run's order, without the bias
    weights, values = weights_of(run), dequantized(run)
    for row, reported in zip(found.layers, run.report().layers, strict=False):
        x, q = weights[row.name], values[row.name]
        assert (row.min, row.max, row.shape, row.parameters) == (x.min(), x.max(), x.shape, x.size)
        assert (row.bits, row.bytes) == (reported.bits, reported.bytes)
        assert row.error["trained"] == reported.error
        taken = {value: (q == value).sum() for value in row.levels}
        assert list(row.counts) == list(taken.values())
        assert sum(row.counts) == x.size
        assert len(row.levels) == reported.levels
        assert set(q.reshape(-1)) <= set(row.levels)
        assert sum(row.histogram) == x.size
        assert (
            np.abs(np.cumsum(row.histogram) - np.cumsum(counted(x, row.min, row.max))).max() <= 1
        )  # float32 at an edge
        assert row.distribution in {"Gaussian-like", "flat", "multi-peaked"}


def test_the_errors_of_fixed_levels_are_at_the_layers_own_bits(run: Run) -> None:
    for row in inspect(run.path).layers:
        x = weights_of(run)[row.name].astype(float).reshape(-1)

        def error(levels: np.ndarray, x: np.ndarray = x) -> float:
            return float(np.min((x[:, None] - levels) ** 2, 1).sum() / (x**2).sum())

        half = np.arange(2 ** (row.bits - 1)) / (2 ** (row.bits - 1) - 1)
        clips = np.linspace(0.05, abs(x).max(), 2000)
        uniform = min(error(np.concatenate([-c * half, c * half])) for c in clips)
        assert row.error["uniform"] == pytest.approx(uniform, rel=0.01)
        assert row.error["best"] < min(row.error["uniform"], row.error["power_of_two"])
        assert row.error["best"] <= error(np.array(row.levels)) * 1.001


def test_an_exported_file_shows_how_many_values_lie_on_each_level(run: Run, file: Path) -> None:
    found = inspect(file)
    assert isinstance(found, TrainedResult)
    assert (found.what, found.histogram_of) == ("artifact", "stored values")
    decoded = decoder.decode(file)[0]
    for row, of_run in zip(found.layers, inspect(run.path).layers, strict=True):
        x = decoded[row.name]
        assert (row.levels, row.counts, row.bits) == (of_run.levels, of_run.counts, of_run.bits)
        assert [int((x == np.float32(level)).sum()) for level in row.levels] == list(row.counts)
        assert (row.min, row.max) == (row.levels[0], row.levels[-1])
        assert list(row.histogram) == counted(x, row.min, row.max)
        assert row.error == {
            "trained": of_run.error["trained"],
            "uniform": None,
            "power_of_two": None,
            "best": None,
        }
        assert row.distribution is None


def test_levels_by_channel_are_not_drawn_as_one_set(channels: Run, tmp_path: Path) -> None:
    values = dequantized(channels)
    file = export_made(channels, tmp_path / "model.safetensors")
    for found in (inspect(channels.path), inspect(file)):
        for row in found.layers:
            assert (row.levels, row.counts) == ((), ())
            assert row.error["uniform"] is None
    for row in inspect(file, out=tmp_path / "out").layers:
        assert list(row.histogram) == counted(values[row.name], row.min, row.max)


def test_json_keys_are_these(run: Run, file: Path) -> None:
    for path in (run.path, file):
        data = json.loads(json.dumps(inspect(path).data()))
        assert list(data) == [
            *(
                "version",
                "what",
                "path",
                "note",
                "histogram_of",
                "layers",
                "totals",
                "metric",
                "accuracy",
                "pictures",
            )
        ]
        assert data["version"] == 1
        assert list(data["layers"][0]) == [
            *(
                "name",
                "kind",
                "shape",
                "parameters",
                "bytes",
                "bits",
                "error",
                "levels",
                "counts",
                "min",
                "max",
            ),
            *("histogram", "distribution", "tail_weight"),
        ]
        assert list(data["layers"][0]["error"]) == ["trained", "uniform", "power_of_two", "best"]
        assert len(data["layers"][0]["histogram"]) == 128


def test_pictures_and_page_are_written(run: Run, tmp_path: Path) -> None:
    found = inspect(run.path, out=tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in found.pictures}
    assert found.pictures[0] == tmp_path / "out" / "index.html"
    assert {
        "overview-1.png",
        "overview-1.svg",
        "bits-by-layer.svg",
        "layers/001-block1.conv.weight.png",
    } <= names
    assert {
        "bits-over-time.png",
        "loss.svg",
        "error-over-time.png",
        "levels-over-time-4.svg",
    } <= names
    assert len(names) == 1 + 2 + 2 * 4 + 2 * (4 + 4)


def test_the_page_of_a_run_has_its_figures_its_table_then_labeled_pictures(
    run: Run, tmp_path: Path
) -> None:
    found = inspect(run.path, out=tmp_path)
    page = Page.read(tmp_path / "index.html")
    assert page.all("h2") == [
        *("Layers", "Pictures", "Weights and their levels", "Details", "Tensors that stay float")
    ]
    assert page.all("dt") == ["Size of the file", "Accuracy", "Average"]
    assert "92.50\N{NO-BREAK SPACE}% → 91.25\N{NO-BREAK SPACE}%" in page.all("dd")
    assert page.places["dl"][0] < page.places["table"][0] < page.places["figure"][0]
    assert isinstance(found, TrainedResult)
    for row in found.layers:
        assert page.row_of(row.name, 2)[1] == row.kind
    assert len(page.svgs) == len(page.all("figure")) == 4 + 4 + 4
    assert {svg["role"] for svg in page.svgs} == {"img"}
    for svg, row in zip(page.svgs[8:], found.layers, strict=True):
        levels = f"{len(row.levels)} levels in force ({row.bits:g} bits)"
        assert svg["aria-label"].startswith(f"{row.name}: {row.distribution}: ")
        assert svg["aria-label"].endswith(levels)
        assert levels in page.all("text")


@pytest.mark.parametrize(
    ("levels", "of_file", "caption"),
    [
        (16, False, "16 levels in force (8 bits)"),
        (256, False, "256 levels in force (8 bits): too dense to draw"),
        (16, True, "16 levels in force (8 bits), and the number of weights at each"),
        (0, False, "levels by channel are not drawn"),
    ],
)
def test_a_picture_of_a_layer_says_which_levels_it_shows(
    run: Run, tmp_path: Path, levels: int, of_file: bool, caption: str
) -> None:
    found = inspect(run.path)
    assert isinstance(found, TrainedResult)
    row = replace(
        found.layers[0],
        bits=8,
        levels=tuple(range(levels)),
        counts=(1,) * levels,
        distribution=None if of_file else "flat",
    )
    result = replace(found, what="artifact", layers=(row,))
    write_trained_page(result, tmp_path)
    assert caption in Page.read(tmp_path / "index.html").all("text")


def test_of_many_layers_the_single_pictures_are_svg_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_figures, "PNG_LAYERS", 0)
    run = make_run(tmp_path / "run", 1)
    names = {p.name for p in inspect(run.path, out=tmp_path / "out").pictures}
    assert "overview-1.png" in names
    assert "001-block1.conv.weight.svg" in names
    assert "001-block1.conv.weight.png" not in names


def test_neither_run_nor_file_needs_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    file = export_made(run, tmp_path / "model.safetensors")
    code = f"""
import sys
from pathlib import Path
from ddqcli.commands.inspect import inspect
for path in ("{run.path}", "{file}"):
    inspect(Path(path), out=Path("{tmp_path}/out"))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_shown_is_refused_in_a_sentence(
    run: Run, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="holds no finished run"):
        inspect(tmp_path)
    cut = make_run(tmp_path / "cut", 1)
    (cut.path / "final.pt").write_bytes((cut.path / "final.pt").read_bytes()[:-100])
    with pytest.raises(DDQError, match=r"final\.pt is damaged and cannot be read"):
        inspect(cut.path)
    gone = make_run(tmp_path / "gone", 1)
    (gone.path / "final.pt").unlink()
    with pytest.raises(UsageError, match=r"holds no final\.pt"):
        inspect(gone.path)
    old = make_run(tmp_path / "old", 1)
    old.save(
        "final.pt",
        {
            key: value
            for key, value in torch.load(old.path / "final.pt").items()
            if key != "weights"
        },
    )
    with pytest.raises(DDQError, match="not as this version of ddq writes it"):
        inspect(old.path)
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(changed)
    with pytest.raises(VerificationError, match="damaged or incomplete"):
        inspect(tmp_path / "changed.safetensors")


def test_a_real_run_and_its_file_agree(pristine: Path, exported_file: Path, tmp_path: Path) -> None:
    with inside(pristine):
        of_run, of_file = inspect(Path("runs/done")), inspect(exported_file)
        shown = ddq("inspect", "runs/done", "-o", tmp_path / "out", "-q")
    assert [row.name for row in of_run.layers] == ["0.weight", "3.weight", "8.weight"]
    for one, other in zip(of_run.layers, of_file.layers, strict=True):
        assert (one.name, one.levels, one.counts) == (other.name, other.levels, other.counts)
        assert float(f"{one.error['trained']:.3g}") == other.error["trained"]
        # The report's error is that of these levels over these weights.
        weights = (
            torch.load(pristine / "runs/done/final.pt")["weights"][one.name]
            .double()
            .numpy()
            .reshape(-1)
        )
        nearest = np.min((weights[:, None] - np.array(one.levels)) ** 2, 1)
        assert one.error["trained"] == pytest.approx(
            nearest.sum() / (weights**2).sum(), rel=1e-3, abs=1e-9
        )
    assert shown.code == 0
    assert "shows them all" in shown.out


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        ("Conv2d", "conv"),
        ("depthwise Conv2d", "depthwise"),
        ("ConvTranspose1d", "conv"),
        ("EmbeddingBag", "embedding"),
        ("Linear", "linear"),
        ("MultiheadAttention", "linear"),
        ("bias", "bias"),
    ],
)
def test_kinds_are_named_as_for_a_checkpoint(kind: str, plain: str) -> None:
    assert short_kind(kind) == plain
