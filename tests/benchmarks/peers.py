"""Accuracy of other tools on the pretrained networks of real_models.py, at the same bytes.

    python -m venv peerenv        # Python 3.11
    peerenv/bin/pip install -e . brevitas==0.13.4 model-compression-toolkit==2.6.1 accelerate
    peerenv/bin/python tests/benchmarks/peers.py DIR [--bits 4] [--only NAME ...] [--peers NAME ...]
    peerenv/bin/python tests/benchmarks/peers.py DIR --table

DIR is prepared and measured by real_models.py. Every tool gets the same float network, the same 192
calibration samples and the same test samples; only weights are quantized. ddq's row is the newest
of DIR/results.jsonl at these bits. Each row is appended to DIR/peers.jsonl. A tool that fails has a
row with the first line of its error.

- `brevitas-gptq`, `brevitas-qronos`, `brevitas-round` (learned rounding, 300 steps a layer): the
  functions of Brevitas' ImageNet example, with BatchNorm merged if the network can be traced.
  Weights are asymmetric by channel, with scales of least squared error, and biases are corrected at
  the end. Of symmetric and asymmetric weights, scales from the range and of least squared error,
  with and without equalization, this was best on onet.
- `mct-plain`: all layers with the same bits. `mct-gradient`: the same with gradient PTQ, 300 steps.
- `mct-mixed`: mixed precision of 2 to 8 bits within the bytes of ddq's file.

Bytes of ddq are those of the whole file. Bytes of the others are counted, in their favor: bits x
weights / 8, a scale of 2 bytes and, if asymmetric, a zero point of 1 byte a channel, and 4 bytes
for each parameter that stays float (biases, PReLU, a BatchNorm's scale and shift if not merged).
Without header, names and shapes. A difference is ddq's accuracy minus the other's on the same test
samples, with its paired standard error. Seconds are those of the quantization alone; ddq's are
those of the whole command.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import itertools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from real_models import (
    build,
    load_samples,
    percent,
    predict,
    scores_from_text,
    scores_to_text,
    standard_error,
)
from real_networks import NETWORKS
from torch import Tensor, nn

SCALE, ZERO_POINT, FLOAT = 2, 1, 4  # bytes
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)

# (float network, calibration samples, bits, bytes of ddq's file) -> quantized network, its bytes
Peer = Callable[[nn.Module, Tensor, int, int], tuple[nn.Module, int]]

# ----------------------------------------------------------------------------------- Brevitas


def brevitas(method: str) -> Peer:
    """Return a peer that rounds weights by a method of Brevitas' ImageNet example."""

    def quantize(net: nn.Module, samples: Tensor, bits: int, _: int) -> tuple[nn.Module, int]:
        from brevitas_examples.imagenet_classification.ptq import ptq_common

        batches = [(batch, None) for batch in samples.split(64)]
        net = brevitas_layers(net, bits)
        predict(net, samples[:2])  # initializes the scales
        if method == "gptq":
            ptq_common.apply_gptq(batches, net, act_order=True, create_weight_orig=True)
        elif method == "qronos":
            ptq_common.apply_qronos(net, batches, act_order=True)
        else:
            learn_rounding(net, batches)
        ptq_common.apply_bias_correction(batches, net)
        return net, brevitas_bytes(net, bits)

    return quantize


def brevitas_layers(net: nn.Module, bits: int) -> nn.Module:
    """Merge BatchNorm if the network can be traced, and quantize each layer's weights."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq.ptq_common import quantize_model

    with contextlib.suppress(Exception):  # not traceable
        # ReLU6 stays: only equalization needs ReLU in its place.
        net = preprocess_for_quantize(copy.deepcopy(net), relu6_to_relu=False, merge_bn=True)
    quantized: nn.Module = quantize_model(
        net,
        backend="layerwise",
        quant_format="int",
        weight_bit_width=bits,
        layerwise_first_last_bit_width=bits,
        weight_quant_granularity="per_channel",
        weight_quant_type="asym",
        weight_param_method="mse",
        scale_factor_type="float_scale",
        act_bit_width=None,
        act_quant_type="sym",
        act_quant_percentile=99.999,
        bias_bit_width=None,
    )
    return quantized.eval()


def learn_rounding(net: nn.Module, batches: list[tuple[Tensor, None]]) -> None:
    """Learn to round each weight up or down, layer by layer."""
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils
    from brevitas_examples.imagenet_classification.ptq.ptq_imagenet_args import create_args_parser

    options = "--learned-round=hard_sigmoid --learned-round-iters=300"
    options += " --learned-round-batch-size=16 --learned-round-lr=0.01"
    args = create_args_parser().parse_args(options.split())
    learned_round_utils.apply_learned_round(net, batches, args)


def brevitas_bytes(net: nn.Module, bits: int) -> int:
    """Return the bytes of a network whose layers all have `bits` bits."""
    from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer

    layers = [m for m in net.modules() if isinstance(m, QuantWeightBiasInputOutputLayer)]
    tensors = [(m.weight.numel(), bits, m.out_channels) for m in layers]
    own = {id(p) for m in layers for p in m.weight_quant.parameters()}
    own |= {id(m.weight) for m in layers}
    return total_bytes(tensors, net, own, SCALE + ZERO_POINT)


# ---------------------------------------------------------------------------------------- MCT


def mct(*, mixed: bool = False, gradient: bool = False) -> Peer:
    """Return a peer that quantizes with the Model Compression Toolkit."""

    def quantize(net: nn.Module, samples: Tensor, bits: int, limit: int) -> tuple[nn.Module, int]:
        import model_compression_toolkit as toolkit

        def batches() -> Iterator[list[Tensor]]:
            yield from ([batch] for batch in samples.split(32))

        options: dict[str, Any] = {
            "target_platform_capabilities": capabilities([8, 6, 5, 4, 3, 2] if mixed else [bits])
        }
        if mixed:
            memory = limit - bytes_beside_weights(net)
            options["target_resource_utilization"] = toolkit.core.ResourceUtilization(memory)
        if gradient:
            options["gptq_config"] = toolkit.gptq.get_pytorch_gptq_config(
                n_epochs=50, gradual_activation_quantization=False
            )
            run = toolkit.gptq.pytorch_gradient_post_training_quantization
        else:
            run = toolkit.ptq.pytorch_post_training_quantization
        quantized, _ = run(net, batches, **options)
        return quantized.eval(), mct_bytes(quantized)

    return quantize


def capabilities(bits: list[int]) -> Any:
    """Return MCT's description of a device with these bits for weights and float activations."""
    from model_compression_toolkit.target_platform_capabilities.tpc_models import imx500_tpc

    tpc = imx500_tpc.v1_0.tpc

    layer, _, other = tpc.get_op_quantization_configs()
    layer, other = (
        config.clone_and_edit(enable_activation_quantization=False) for config in (layer, other)
    )
    choices = [
        layer.clone_and_edit(attr_to_edit={tpc.KERNEL_ATTR: {tpc.WEIGHTS_N_BITS: b}}) for b in bits
    ]
    return tpc.generate_tpc(other, choices[0], choices, "weights")


def bytes_beside_weights(net: nn.Module) -> int:
    """Return the bytes of scales, biases and other float parameters once BatchNorm is merged."""
    layers = [m for m in net.modules() if isinstance(m, WEIGHTED)]
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    merged = {id(p) for m in [*layers, *norms] for p in m.parameters(recurse=False)}
    channels = sum(getattr(m, "out_channels", None) or m.out_features for m in layers)
    rest = sum(p.numel() for p in net.parameters() if id(p) not in merged)
    return (SCALE + FLOAT) * channels + FLOAT * rest


def mct_bytes(net: nn.Module) -> int:
    """Return the bytes of a network that MCT quantized."""
    from mct_quantizers import PytorchQuantizationWrapper

    tensors, own = [], set()
    for module in net.modules():
        if isinstance(module, PytorchQuantizationWrapper):
            for _, weight, quantizer in module.get_weights_vars():
                tensors.append((weight.numel(), quantizer.num_bits, len(quantizer.scales)))
                own.add(id(weight))
    return total_bytes(tensors, net, own, SCALE)


def total_bytes(
    tensors: list[tuple[int, int, int]], net: nn.Module, own: set[int], by_channel: int
) -> int:
    """Return the bytes of quantized tensors and of the parameters that stay float.

    Args:
        tensors: number of weights, bits and number of channels of each quantized tensor.
        own: ids of the parameters that are part of quantized tensors.
        by_channel: bytes of a channel's scale and zero point.
    """
    if not tensors:
        raise ValueError("no layer was quantized")
    quantized = sum(
        -(-size * bits // 8) + by_channel * channels for size, bits, channels in tensors
    )
    return quantized + FLOAT * sum(p.numel() for p in net.parameters() if id(p) not in own)


PEERS: dict[str, Peer] = {
    "brevitas-gptq": brevitas("gptq"),
    "brevitas-qronos": brevitas("qronos"),
    "brevitas-round": brevitas("round"),
    "mct-plain": mct(),
    "mct-mixed": mct(mixed=True),
    "mct-gradient": mct(gradient=True),
}
PACKAGES = {"brevitas": "brevitas", "mct": "model-compression-toolkit"}

# --------------------------------------------------------------------------------------- rows


def ddq_row(folder: Path, name: str, bits: int) -> dict[str, Any]:
    """Return the newest row of a network in real_models.py's results."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    for line in reversed(text.splitlines()):
        row = json.loads(line)
        same = (row["network"], row["bits"], row.get("act_bits")) == (name, bits, None)
        if same and "scores" in row:
            break
    else:
        raise SystemExit(f"{name}: no row at {bits} bits; `real_models.py run` makes it")
    return {
        "network": name,
        "bits": bits,
        "peer": "ddq",
        "version": row.get("ddq"),
        "args": row.get("args", []),
        "bytes": row["file_bytes"],
        **accuracy(scores_from_text(row["scores"])),
        "seconds": row["seconds"],
    }


def peer_row(folder: Path, ddq: dict[str, Any], peer: str) -> dict[str, Any]:
    """Quantize a network and return its row."""
    name, bits = ddq["network"], ddq["bits"]
    version = importlib.metadata.version(PACKAGES[peer.split("-")[0]])
    row = {"network": name, "bits": bits, "peer": peer, "version": version}
    torch.manual_seed(0)
    began = time.monotonic()
    try:
        with quiet():
            samples = load_samples(name, folder, "calibration")
            net, size = PEERS[peer](build(name, folder), samples, bits, ddq["bytes"])
            seconds = time.monotonic() - began
            output = predict(net, load_samples(name, folder, "test"))
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        first = (str(error).strip() or repr(error)).splitlines()[0]
        return row | {"error": f"{type(error).__name__}: {first}"}
    expected = torch.load(folder / name / "answers.pt", weights_only=True)["test"]
    scores = NETWORKS[name].agreement(output, expected)
    difference = scores_from_text(ddq["scores"]) - scores
    return row | {
        "bytes": size,
        **accuracy(scores),
        "difference": percent(difference),
        "difference_error": standard_error(difference),
        "seconds": round(seconds, 1),
    }


def accuracy(scores: Tensor) -> dict[str, Any]:
    """Return the fields of a row that follow from its scores."""
    return {
        "accuracy": percent(scores),
        "standard_error": standard_error(scores),
        "scores": scores_to_text(scores),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what other tools and their child processes print."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stream in (1, 2):
            os.dup2(sink.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            for stream, file in enumerate(saved, start=1):
                os.dup2(file, stream)
                os.close(file)


HEAD = (
    f"{'network':<20}{'bits':>5}  {'':<16}{'bytes':>11}{'%':>8}{'s.e.':>6}"
    f"{'ddq ahead':>11}{'s.e.':>6}{'s':>7}"
)


def table_line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    begin = f"{row['network']:<20}{row['bits']:>5}  {row['peer']:<16}"
    if "error" in row:
        return f"{begin}  {row['error'][:120]}"
    ahead = f"{'':>17}"
    if "difference" in row:
        ahead = f"{row['difference']:>+11.2f}{row['difference_error']:>6.2f}"
    return (
        f"{begin}{row['bytes']:>11,}{row['accuracy']:>8.2f}{row['standard_error']:>6.2f}"
        f"{ahead}{row['seconds']:>7.0f}"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NAME")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the rows of DIR/peers.jsonl")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    results = args.folder / "peers.jsonl"
    print(HEAD, flush=True)
    if args.table:
        for line in results.read_text(encoding="utf-8").splitlines():
            print(table_line(json.loads(line)))
        return 0
    names = args.only or [name for name in NETWORKS if (args.folder / name / "net.py").exists()]
    for name in names:
        ddq = ddq_row(args.folder, name, args.bits)
        for row in itertools.chain([ddq], (peer_row(args.folder, ddq, p) for p in args.peers)):
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(table_line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
