"""Tasks that are no classification of images, from finetuning to the exported file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import Answer, ddq, inside

CODE = """
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 16), nn.Linear(5, 16), nn.Linear(16, 4)
    def forward(self, image, extra):
        return self.head(F.relu(self.a(image.flatten(1)) + self.b(extra)))

class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 32, 3, padding=1)
        self.head, self.size = nn.Conv2d(32, 4, 3, padding=1), nn.Linear(32, 1)
    def forward(self, x):
        x = F.relu(self.body(x))
        return OrderedDict(out=self.head(x), size=self.size(x.mean((2, 3))))

class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))
    def forward(self, x):
        return self.body(x)[:, 0]

class Drawing(nn.Module):  # draws its code as a variational autoencoder does, in eval mode too
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(12, 8), nn.Linear(4, 12)
    def forward(self, x):
        mean, log = self.down(x.flatten(1)).chunk(2, 1)
        return self.up(mean + torch.randn_like(mean) * log.exp())

class Inputs(NamedTuple):
    image: torch.Tensor
    extra: object

@dataclass
class Answer:
    scores: torch.Tensor
    hidden: object = None
    steps: int = 1

class Records(nn.Module):  # takes and gives more than tensors; its view needs contiguous memory
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(32, 4)
    def forward(self, image, extra):
        assert extra is None
        x = self.conv(image.sub_(0.1)).relu()
        return Answer(self.head(x.view(x.size(0), -1)), [], 3)

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))

def images(count, seed):
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count,), generator=draw)
    mean = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(99))
    return mean[label] + 0.5 * torch.randn(count, 3, 2, 2, generator=draw), label

def splits(of):
    return {"train": of(*images(96, 0)), "val": of(*images(40, 1))}

def tuples():
    return splits(lambda x, y: [((a, a.flatten()[:5]), b) for a, b in zip(x, y)])

def mappings():
    hits = lambda out, y: (out.argmax(1) == y).float()
    loss = lambda out, y: F.cross_entropy(out, y, reduction="none")
    metrics = [hits, {"name": "log loss", "unit": "nats", "better": "lower", "function": loss}]
    made = lambda x, y: [({"extra": a.flatten()[:5], "image": a}, b) for a, b in zip(x, y)]
    return splits(made) | {"metric": metrics}

def loader():
    made = tuples()
    return {"train": DataLoader(made["train"], 16, shuffle=True), "val": DataLoader(made["val"], 7)}

def pixels():
    def loss(out, y):
        return F.cross_entropy(out["out"], y["mask"]) + F.mse_loss(out["size"], y["size"])
    hits = lambda out, y: (out["out"].argmax(1) == y["mask"]).float().mean((1, 2))
    made = lambda x, y: [
        (a, {"mask": b.expand(2, 2), "size": b[None].float()}) for a, b in zip(x, y)
    ]
    return splits(made) | {"loss": loss, "metric": {"name": "mIoU", "unit": "%", "function": hits}}

def numbers():
    error = lambda out, y: (out - y).square()
    return splits(lambda x, y: TensorDataset(x, y.float())) | {
        "loss": F.mse_loss,
        "metric": {"name": "error", "better": "lower", "function": error},
    }

def signals():
    psnr = lambda out, y: 30 - 10 * (out - y).square().log10()
    return numbers() | {"metric": {"name": "PSNR", "unit": "dB", "function": psnr}}

def records():
    made = lambda x, y: [(Inputs(a, None), {"label": b, "path": "a.png"}) for a, b in zip(x, y)]
    return splits(made) | {
        "loss": lambda out, y: F.cross_entropy(out.scores, y["label"]),
        "metric": lambda out, y: (out.scores.argmax(1) == y["label"]).float(),
    }

def unlabelled():
    return splits(lambda x, y: TensorDataset(x))

def copies():
    error = lambda out, y: (out - y).square().mean(1)
    metric = {"name": "error", "better": "lower", "function": error}
    made = lambda x, y: TensorDataset(x, x.flatten(1))
    return splits(made) | {"loss": F.mse_loss, "metric": metric}

def own_distillation():
    def distill(out, expected):
        return (out["out"] - expected["out"]).abs().mean()
    return pixels() | {"distill": distill}

def undefined():
    hits = lambda out, y: torch.where(y == 3, float("nan"), (out.argmax(1) == y).float())
    return splits(TensorDataset) | {"metric": hits}

def decibels():
    return splits(TensorDataset) | {"metric": lambda out, y: 30 + out[:, 0]}
"""

TASKS = {  # data -> network and further arguments
    "tuples": "Two",
    "mappings": "Two --act-bits 8",
    "loader": "Two",
    "pixels": "Segmenter --set train.distill.weight=0.5",
    "numbers": "Regressor",
    "signals": "Regressor --set train.distill.weight=0.9",
    "unlabelled": "Segmenter --act-bits 8",
    "copies": "Drawing",
    "records": "Records --act-bits 8",
    "own_distillation": "Segmenter --set train.distill.layers=['body']",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with networks that are trained on the labels for a moment."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "tasks.py").write_text(CODE)
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    with inside(path):
        for name in ("Drawing", "Records"):
            torch.save(scope[name]().state_dict(), f"{name}.pt")
        for name in ("Two", "Segmenter", "Regressor", "plain"):
            torch.manual_seed(0)
            net = scope[name]()
            x, y = scope["images"](96, 0)
            optimizer = torch.optim.Adam(net.parameters(), 0.01)
            for _ in range(60):
                out = net(x, x.flatten(1)[:, :5]) if name == "Two" else net(x)
                if name == "Regressor":
                    loss = (out - y).square().mean()
                else:
                    scores = out["out"].mean((2, 3)) if name == "Segmenter" else out
                    loss = torch.nn.functional.cross_entropy(scores, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.save(net.state_dict(), f"{name}.pt")
        yield path


def finetune(data: str, *more: str, run: str | None = None) -> Answer:
    arch, *others = TASKS.get(data, "plain").split()
    return ddq(
        *("finetune", f"{arch}.pt", "--arch", f"tasks.py:{arch}", "--data", f"tasks.py:{data}"),
        *("--target-bits", 4, "--max-steps", 6, "--set", "data.batch_size=16"),
        *("--set", "data.workers=0", "--set", "train.save_every=2"),
        *("--run-dir", run or f"runs/{data}", *others, *more),
    )


@pytest.fixture(scope="module")
def trained(folder: Path) -> Callable[[str], Answer]:
    """Return the answer of the run of a task, trained once in runs/NAME; not to be changed."""

    @cache
    def train(name: str) -> Answer:
        answer = finetune(name)
        assert answer.code == 0, answer.err
        return answer

    return train


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_trained_reported_exported_and_verified(
    trained: Callable[[str], Answer], name: str
) -> None:
    answer = trained(name)
    report = ddq("report", f"runs/{name}", "--json").data
    metric, values = report["metric"], report["accuracy"]
    worse = values["float"] - values["quantized"]
    if metric["better"] == "lower":
        worse = -worse
    assert values["drop"] == pytest.approx(worse, abs=1e-4)
    assert report["totals"]["average_bits"] <= 4
    exported = ddq("export", f"runs/{name}", "-o", f"{name}.safetensors", "--json")
    assert exported.code == 0, exported.out
    behavior = exported.data["behaviour"]
    assert behavior["unchecked"] == []
    assert behavior["outputs"] == 0
    assert behavior["accuracy"] == pytest.approx(values["quantized"], abs=1e-3)
    assert ddq("export", f"runs/{name}", "--check", f"{name}.safetensors").code == 0
    assert ddq("report", f"{name}.safetensors", "--json").data["metric"] == metric
    assert ("accuracy" in answer.out) == (metric["name"] == "accuracy")
    assert f"{metric['name']:<10} float " in answer.out


@pytest.mark.parametrize("name", ["mappings", "unlabelled", "records"])
def test_a_task_is_exported_to_onnx(trained: Callable[[str], Answer], name: str) -> None:
    """onnxruntime itself gets the inputs by name, and gives the outputs in the network's order."""
    onnxruntime = pytest.importorskip("onnxruntime")
    import ddqcli

    trained(name)
    answer = ddq("export", f"runs/{name}", "--format", "onnx", "-o", f"{name}.onnx", "--json")
    assert answer.code == 0, answer.out
    assert answer.data["unchecked"] == []
    assert ddq("export", f"runs/{name}", "-o", f"{name}.safetensors").code == 0
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    net = ddqcli.load(f"{name}.safetensors", scope[TASKS[name].split()[0]]()).eval()
    x, _ = scope["images"](5, 3)
    inputs, more = {"input": x}, ()
    if name == "mappings":
        inputs = {"image": x, "extra": x.flatten(1)[:, :5]}
    if name == "records":
        inputs, more = {"input_0": x}, (None,)
    with torch.no_grad():
        output = net(*(value.clone() for value in inputs.values()), *more)
    wanted = list(output.values()) if isinstance(output, dict) else [output]
    if name == "records":
        wanted = [output.scores]
    session = onnxruntime.InferenceSession(f"{name}.onnx")
    given = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    assert len(given) == len(wanted)
    for array, tensor in zip(given, wanted, strict=True):
        difference = (torch.from_numpy(array) - tensor).square().mean().sqrt()
        assert difference < 0.02 * tensor.square().mean().sqrt()
    names = {"unlabelled": ["out", "size"], "records": ["scores"]}.get(name, ["output"])
    assert [value.name for value in session.get_outputs()] == names


def test_a_run_is_the_same_each_time_and_after_it_was_stopped(
    trained: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddqcli.errors import Interrupted
    from ddqcli.training.trainer import Trainer

    step = Trainer._train_step

    def stopped(self: Trainer, x: Any, y: Any) -> Any:
        if self.step == 4:
            raise Interrupted("stopped", 15)
        return step(self, x, y)

    for name in ("mappings", "unlabelled", "loader", "copies"):
        trained(name)
        monkeypatch.setattr(Trainer, "_train_step", stopped)
        assert finetune(name, run=f"runs/{name}-part").code == 143
        monkeypatch.setattr(Trainer, "_train_step", step)
        assert ddq("finetune", "--resume", "--run-dir", f"runs/{name}-part").code == 0
        for file in ("final.pt", "report.json"):  # of which an export is a function
            whole, part = (
                Path(run, file).read_bytes() for run in (f"runs/{name}", f"runs/{name}-part")
            )
            assert whole == part, (name, file)


def test_without_labels_the_report_gives_the_distance_from_the_float_outputs(
    trained: Callable[[str], Answer],
) -> None:
    """Against the outputs of the file's network, in float64."""
    import ddqcli

    trained("unlabelled")
    report = ddq("report", "runs/unlabelled", "--json").data
    assert report["metric"]["name"] == "distance from the float outputs"
    assert report["metric"]["better"] == "lower"
    assert report["accuracy"]["float"] == 0
    assert ddq("export", "runs/unlabelled", "-o", "distance.safetensors").code == 0
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    net = scope["Segmenter"]()
    net.load_state_dict(torch.load("Segmenter.pt"))
    x, _ = scope["images"](40, 1)
    with torch.no_grad():
        before = net.eval()(x)
        after = ddqcli.load("distance.safetensors", scope["Segmenter"]()).eval()(x)
    errors = []
    for name in ("out", "size"):
        a, b = (each[name].double().flatten(1) for each in (after, before))
        sizes = [b[k : k + 16].square().mean().sqrt() for k in range(0, 40, 16)]
        size = torch.cat([s.expand(16) for s in sizes])[:40]
        errors.append((a - b).square().mean(1).sqrt() / size)
    distance = 100 * torch.maximum(*errors).mean()
    assert report["accuracy"]["quantized"] == pytest.approx(float(distance), rel=1e-3)


def test_reports_speak_of_the_metric_alone(trained: Callable[[str], Answer]) -> None:
    trained("signals")
    page = ddq("report", "runs/signals", "--html", "page")
    assert page.code == 0
    value = ddq("report", "runs/signals", "--json").data["accuracy"]["quantized"]
    text = Path("page/index.html").read_text()
    for shown in (page.out, ddq("report", "runs/signals", "--md").out, text):
        assert f"{value:.5g} dB" in shown
        assert "PSNR" in shown
        assert "ccuracy" not in shown
        assert "points" not in shown
    diff = ddq("report", "--diff", "runs/signals", "runs/signals").out
    assert re.search(rf"^PSNR +{value:.5g} +{value:.5g}", diff, re.M)


def test_limits_speak_of_the_metric(trained: Callable[[str], Answer]) -> None:
    trained("numbers")
    values = ddq("report", "runs/numbers", "--json").data["accuracy"]
    error, drop = values["quantized"], values["drop"]
    met = (
        f"--max error={error + 0.01}",
        f"--min error={error - 0.01}",
        f"--max-drop={drop + 0.01}",
    )
    for limit in met:
        assert ddq("report", "runs/numbers", *limit.split()).code == 0
    unmet = {
        f"--max error={error - 0.01}": f"--max error is unmet: {error:,} error are 0.01 above",
        f"--min error={error + 0.01}": f"--min error is unmet: {error:,} error are 0.01 below",
        f"--max-drop={drop - 0.01}": f"--max-drop is unmet: {drop:,} error are 0.01 above",
        "--min-accuracy 0": "this run is judged by error, not by accuracy",
        "--min mAP=0.31": "this run is judged by error, not by mAP",
    }
    for limit, message in unmet.items():
        answer = ddq("report", "runs/numbers", *limit.split())
        assert answer.code == 3
        assert message in answer.err
    assert ddq("report", "runs/numbers", "--min", "0.31").code == 2


def test_a_metric_beside_the_first_is_reported_and_has_limits(
    folder: Path, trained: Callable[[str], Answer]
) -> None:
    """Against the mean of the scores of the file's network, in float64."""
    import ddqcli

    trained("mappings")
    (other,) = ddq("report", "runs/mappings", "--json").data["other_metrics"]
    assert other["metric"] == {"name": "log loss", "unit": "nats", "better": "lower"}
    assert ddq("export", "runs/mappings", "-o", "several.safetensors").code == 0
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    x, y = scope["images"](40, 1)
    before, after = scope["Two"](), ddqcli.load("several.safetensors", scope["Two"]())
    before.load_state_dict(torch.load("Two.pt"))
    for net, stage in ((before, "float"), (after, "quantized")):
        with torch.no_grad():
            scores = net.eval()(x, x.flatten(1)[:, :5]).double()
        mean = torch.nn.functional.cross_entropy(scores, y)
        assert other["accuracy"][stage] == pytest.approx(float(mean), rel=1e-4)
    value = other["accuracy"]["quantized"]
    assert ddq("report", "several.safetensors", "--json").data["other_metrics"] == [other]
    for shown in (ddq("report", "runs/mappings").out, ddq("report", "runs/mappings", "--md").out):
        assert f"{value:.5g} nats quantized" in shown
    assert ddq("report", "runs/mappings", "--html", "several").code == 0
    assert f"{value:.5g}\N{NO-BREAK SPACE}nats" in Path("several/index.html").read_text()
    assert ddq("report", "runs/mappings", "--max", f"log loss={value + 0.01}").code == 0
    answer = ddq("report", "runs/mappings", "--max", f"log loss={value - 0.01}")
    assert answer.code == 3
    assert "--max log loss is unmet" in answer.err
    unknown = ddq("report", "runs/mappings", "--max", "mAP=1")
    assert "judged by accuracy and log loss, not by mAP" in unknown.err


def test_a_metric_where_less_is_better_chooses_states_by_it(folder: Path) -> None:
    """No state is delivered whose error on held-out samples is above that of the start."""
    assert finetune("numbers", "--set", "train.lr=0.02", run="runs/lower").code == 0
    lines = [json.loads(line) for line in Path("runs/lower/metrics.jsonl").read_text().splitlines()]
    looks = {line["step"]: line for line in lines if "held_out_loss" in line}
    best = ddq("report", "runs/lower", "--json").data["course"]["best_step"]
    assert looks[best]["held_out_accuracy"] <= looks[0]["held_out_accuracy"]
    for step, look in looks.items():
        if look["held_out_loss"] < looks[best]["held_out_loss"]:
            assert look["held_out_accuracy"] > looks[0]["held_out_accuracy"], step


def test_a_layer_to_distill_is_named_right_or_refused_before_training(folder: Path) -> None:
    answer = finetune("numbers", "--set", "train.distill.layers=['body.3']", run="runs/layers")
    assert answer.code == 0, answer.err
    assert "90 % distillation from the float model, also of the outputs of body.3" in answer.err
    answer = finetune("numbers", "--set", "train.distill.layers=['body.33']", run="runs/wrong")
    assert answer.code == 2
    assert "the network has no layer body.33; did you mean body.3?" in answer.err
    zero = ("--set", "train.distill.layers=['body.3']", "--set", "train.distill.weight=0")
    assert "train.distill.weight is 0" in finetune("numbers", *zero, run="runs/zero").err


def test_a_metric_that_is_not_a_number_is_refused_at_the_float_model(folder: Path) -> None:
    answer = finetune("undefined")
    assert answer.code == 2
    assert "is NaN or infinite for 9 of 40 evaluation samples (number 1, 4, 6, 8," in answer.err
    assert not Path("runs/undefined").exists()


def test_an_accuracy_that_is_no_share_is_refused_at_the_float_model(folder: Path) -> None:
    answer = finetune("decibels")
    assert answer.code == 2
    assert "an accuracy is a share in 0..1; name what it is" in answer.err


def test_several_targets_of_another_metric(folder: Path) -> None:
    answer = finetune("signals", "--target-bits", "4,6", run="runs/sweep")
    assert answer.code == 0, answer.err
    assert "PSNR" in answer.out
    assert " dB" in answer.out
    assert "ccuracy" not in answer.out.replace("size-accuracy.png", "")
    assert "%" not in answer.out
