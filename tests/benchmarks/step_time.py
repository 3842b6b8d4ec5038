"""Time of a training step with DDQ, Brevitas and torch's fake-quantize, relative to a float step.

    python tests/benchmarks/step_time.py                 # ResNet-20, batch 128, 2 threads
    python tests/benchmarks/step_time.py --model mlp     # most of the time goes to the weights
    python tests/benchmarks/step_time.py --model bert --batch 8 --size 32 --only "ddq W4"
    python tests/benchmarks/step_time.py --model mobilenet_v2 --size 224 --batch 256 \\
        --device cuda --precision bfloat16
    python tests/benchmarks/step_time.py --json > step_time.json

All methods alternate within one process. A ratio is the median over rounds of a method's time
divided by the float step's time in the same round. On CUDA it also shows the most memory that a
step allocates. `bert` is an encoder of 110 million parameters, 1.3 GB for each method; `--size` is
the number of its tokens. `--only` names the methods beside the float step. Brevitas needs
`pip install brevitas`. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddqcli.qat.budget import ResolvedBudget
from ddqcli.qat.convert import convert
from ddqcli.qat.model import quantizers
from ddqcli.qat.rules.registry import make_rule
from ddqcli.recipe.schema import Recipe
from ddqcli.training.defaults import with_defaults
from ddqcli.training.distillation import distillation
from ddqcli.training.memory import keep_freed_memory
from ddqcli.training.optimizers import make_optimizers

Step = Callable[[], None]

bfloat16 = False  # of all methods' forward passes; set by --precision


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        return model(x).float()


class Block(nn.Module):
    """A residual block of ResNet-20; the shortcut subsamples and pads channels with zeros."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.stride, self.pad = stride, (cout - cin) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


def resnet20() -> nn.Module:
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    widths = [3072, 2048, 2048, 2048]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


class Bert(nn.Module):
    """An encoder of BERT-base's size for tokens [B, T]: 12 layers of 768."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(30522, 768), nn.Embedding(512, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 12)
        self.head = nn.Linear(768, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.body(self.embed(tokens) + self.place(places))[:, 0])


def build(name: str) -> nn.Module:
    """Return `resnet20`, `mlp`, `bert` or a torchvision model, with random weights."""
    own = {"resnet20": resnet20, "mlp": mlp, "bert": Bert}
    if name in own:
        return own[name]()
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def training_step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], x: Tensor, y: Tensor
) -> Step:
    """Return a plain training step on one batch."""

    def step() -> None:
        F.cross_entropy(forward(model, x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    model.train()
    return step


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)]


def float_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    return training_step(model, sgd(model), x, y)


def ddq_step(model: nn.Module, x: Tensor, y: Tensor, views: int = 0, **sections: dict) -> Step:
    """Return a step of `ddq finetune` at 4 bits per weight, with the default gates.

    `views` is the number of float outputs to distill: 0 for labels alone, 1 for the image's, 2 for
    the image's and its mirror image's. `sections` are added to the recipe.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if views else nn.Identity()
    recipe = Recipe.model_validate({"budget": {"target_bits": 4}, **sections})
    recipe = with_defaults(recipe, 10**9, len(x))
    quantized = convert(model, recipe)
    size = sum(t.parameter.numel() for t in quantized.tensors)
    budget = ResolvedBudget(size // 2, 0, 4 * size, size)
    gates = make_rule(recipe.rule, quantized, recipe, budget, 10**9, len(x))
    for activation in quantized.activations.values():
        activation.observing = True
    F.cross_entropy(model.eval()(x), y).backward()
    gates.watch()
    use_compiled = True
    for activation in quantized.activations.values():
        activation.fit()
    for quantizer in quantizers(quantized):
        quantizer.use_compiled = use_compiled
    gates.start()
    model.train()
    optimizers = [o for o in make_optimizers(quantized, recipe.train) if o]
    counter = iter(range(1, 10**9))

    def step() -> None:
        number = next(counter)
        with torch.no_grad():
            targets = [forward(teacher, x.flip(-1) if flip else x) for flip in range(views)]
        with quantized.batched():
            output = forward(model, x)
            loss = F.cross_entropy(output, y)
            if targets:
                loss = 0.9 * distillation(output, torch.stack(targets).mean(0), 4.0) + 0.1 * loss
            loss.backward()
        gates.after_backward(number, loss.detach())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def torch_step(model: nn.Module, x: Tensor, y: Tensor, act_bits: int | None) -> Step:
    """Return a step with torch's fake-quantize: uniform, its range a moving average."""
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver
    from torch.nn.utils import parametrize

    def fake_quant(bits: int, signed: bool) -> nn.Module:
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        dtype = torch.qint8 if signed else torch.quint8
        return FusedMovingAvgObsFakeQuantize(
            MovingAverageMinMaxObserver, quant_min=low, quant_max=high, dtype=dtype
        )

    for module in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        parametrize.register_parametrization(
            module, "weight", fake_quant(4, True).to(x.device), unsafe=True
        )
        if act_bits:
            module.act = fake_quant(act_bits, False).to(x.device)
            module.register_forward_pre_hook(
                lambda m, inputs: (m.act(inputs[0].float()), *inputs[1:])
            )
    return training_step(model, sgd(model), x, y)


def brevitas_step(model: nn.Module, x: Tensor, y: Tensor, act_bits: int | None) -> Step:
    """Return a step with Brevitas: a learned scale for weights and activations."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    class Weight(Int8WeightPerTensorFloat):
        scaling_impl_type = "parameter_from_stats"

    def swap(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            common = {
                "weight_quant": Weight,
                "weight_bit_width": 4,
                "bias": getattr(child, "bias", None) is not None,
            }
            if act_bits:
                common |= {"input_quant": Int8ActPerTensorFloat, "input_bit_width": act_bits}
            if isinstance(child, nn.Conv2d):
                new = qnn.QuantConv2d(
                    child.in_channels, child.out_channels, child.kernel_size,
                    child.stride, child.padding, groups=child.groups, **common,
                )  # fmt: skip
            elif isinstance(child, nn.Linear):
                new = qnn.QuantLinear(child.in_features, child.out_features, **common)
            else:
                swap(child)
                continue
            setattr(parent, name, new)

    swap(model)
    model.to(x.device)
    return training_step(model, sgd(model), x, y)


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "float": float_step,
    "torch FusedMovingAvgObsFakeQuantize W4": partial(torch_step, act_bits=None),
    "torch FusedMovingAvgObsFakeQuantize W4/A8": partial(torch_step, act_bits=8),
    "ddq W4": ddq_step,
    "ddq W4, distilled": partial(ddq_step, views=1),
    "ddq W4/A8": partial(ddq_step, activations={"bits": 8}),
    "ddq W4/A8, distilled": partial(ddq_step, views=1, activations={"bits": 8}),
    "ddq W4/A8, distilled, with mirror images": partial(ddq_step, views=2, activations={"bits": 8}),
    "ddq W4/A4, learned levels": partial(ddq_step, activations={"bits": 4}),
    "Brevitas W4": partial(brevitas_step, act_bits=None),
    "Brevitas W4/A8": partial(brevitas_step, act_bits=8),
}


def make_steps(
    model: nn.Module, x: Tensor, y: Tensor, only: list[str] | None = None
) -> dict[str, Step]:
    """Return the step of each method, or of some, every one on its own copy of `model`."""
    steps = {}
    for name, method in METHODS.items():
        if only and name not in ("float", *only):
            continue
        if name.startswith("Brevitas") and find_spec("brevitas") is None:
            continue
        steps[name] = method(copy.deepcopy(model), x, y)
    return steps


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 3):
        first = number % len(names)  # rotate, so that caches favor no step
        for name in names[first:] + names[:first]:
            step = steps[name]
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_mib(step: Step, device: torch.device) -> float | None:
    """Return the most memory that a step allocates beyond what lasts; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def main() -> None:
    global bfloat16
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as `ddq finetune` does; the others gain from it, too
    bfloat16 = args.precision == "bfloat16"
    device = torch.device(args.device)
    x = torch.randn(args.batch, 3, args.size, args.size, device=device).to(
        memory_format=torch.channels_last
    )
    if args.model == "bert":
        x = torch.randint(30522, (args.batch, args.size), device=device)
    y = torch.randint(0, 10, (args.batch,), device=device)
    model = build(args.model).to(device, memory_format=torch.channels_last)
    steps = make_steps(model, x, y, args.only)
    seconds = measure(steps, args.rounds, device)
    rows = {
        name: {
            "ms": round(1000 * statistics.median(times), 2),
            "ratio": round(
                statistics.median(t / f for t, f in zip(times, seconds["float"], strict=True)), 3
            ),
            "mib": peak_mib(steps[name], device),
        }
        for name, times in seconds.items()
    }
    if args.json:
        facts = {
            **vars(args),
            "torch": torch.__version__,
            "processor": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or platform.machine(),
        }
        print(json.dumps({"settings": facts, "rows": rows}, indent=1))
        return
    for name, row in rows.items():
        memory = f"   {row['mib']:8.1f} MiB" if row["mib"] is not None else ""
        print(f"{name:44} {row['ms']:9.1f} ms   {row['ratio']:.2f}{memory}")


if __name__ == "__main__":
    main()
