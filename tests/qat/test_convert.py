"""Conversion: the tensors that are quantized, and those that stay float with their reasons."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import Nested, fit_inputs, images, recipe, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from ddqcli.errors import UsageError
from ddqcli.qat.convert import convert
from ddqcli.qat.model import QuantizedModel, quantized_state, quantizers
from ddqcli.qat.parameters import float_state, kind_of


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def main_output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def assert_every_name_is_accounted_for(quantized: QuantizedModel, names: list[str]) -> None:
    """Each entry of the float state dict is either quantized, an alias, or kept with a reason."""
    tensors, aliases = [t.name for t in quantized.tensors], list(quantized.aliases)
    floats = [name for name in quantized.kept_float if not name.endswith(" (input)")]
    assert sorted(tensors + aliases + floats) == sorted(names)
    assert sorted(quantized.float_tensors()) == sorted(floats)
    assert set(quantized.aliases.values()) <= {*tensors, *floats}
    assert all(quantized.kept_float.values())
    assert QuantizedModel.of(quantized.model) == quantized


def assert_round_trip(
    model: nn.Module, quantized: QuantizedModel, fresh: nn.Module, *inputs: Any
) -> None:
    """The quantized values fit strictly into a fresh float model, which then computes the same."""
    names = list(fresh.state_dict())
    assert sorted(float_state(model)) == sorted(names)
    assert_every_name_is_accounted_for(quantized, names)
    fresh.load_state_dict(quantized_state(quantized), strict=True)
    with torch.no_grad():
        assert torch.equal(main_output(fresh.eval()(*inputs)), main_output(model.eval()(*inputs)))


# Every kind of layer


TOKENS = torch.tensor([[1, 2, 4, 5], [4, 3, 2, 9]])
EMBEDDED = torch.randn(3, 2, 8)
ATTENTION_OUTPUT = "NonDynamicallyQuantizableLinear"  # torch's own Linear inside of attention
LAYERS: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, str]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (images(4, 9),), {"weight": "Conv1d", "bias": "bias"}),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, 3),
        (images(4, 9, 9),),
        {"weight": "Conv2d", "bias": "bias"},
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 4, 3),
        (images(2, 5, 5, 5),),
        {"weight": "Conv3d", "bias": "bias"},
    ),
    "circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        (images(4, 5, 5),),
        {"weight": "Conv2d"},
    ),
    "transposed1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3),
        (images(4, 9),),
        {"weight": "ConvTranspose1d", "bias": "bias"},
    ),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        (images(4, 9, 9),),
        {"weight": "ConvTranspose2d", "bias": "bias"},
    ),
    "transposed3d": (
        lambda: nn.ConvTranspose3d(2, 4, 3),
        (images(2, 5, 5, 5),),
        {"weight": "ConvTranspose3d", "bias": "bias"},
    ),
    "grouped": (
        lambda: nn.Conv2d(4, 8, 5, groups=2),
        (images(4, 9, 9),),
        {"weight": "Conv2d", "bias": "bias"},
    ),
    "grouped transposed": (
        lambda: nn.ConvTranspose2d(4, 8, 3, groups=2),
        (images(4, 9, 9),),
        {"weight": "ConvTranspose2d", "bias": "bias"},
    ),
    "depthwise": (
        lambda: nn.Conv2d(6, 12, 5, groups=6),
        (images(6, 9, 9),),
        {"weight": "depthwise Conv2d", "bias": "bias"},
    ),
    "linear": (
        lambda: nn.Linear(16, 10),
        (torch.randn(2, 16),),
        {"weight": "Linear", "bias": "bias"},
    ),
    "embedding": (lambda: nn.Embedding(10, 16, padding_idx=1), (TOKENS,), {"weight": "Embedding"}),
    "embedding bag": (lambda: nn.EmbeddingBag(10, 16), (TOKENS,), {"weight": "EmbeddingBag"}),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        (EMBEDDED,) * 3,
        {
            "in_proj_weight": "MultiheadAttention",
            "in_proj_bias": "bias",
            "out_proj.weight": ATTENTION_OUTPUT,
            "out_proj.bias": "bias",
        },
    ),
    "attention, separate": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, bias=False),
        (EMBEDDED, torch.randn(4, 2, 6), torch.randn(4, 2, 5)),
        {f"{part}_proj_weight": "MultiheadAttention" for part in "qkv"}
        | {"out_proj.weight": ATTENTION_OUTPUT},
    ),
}


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_is_quantized_wherever_its_weight_is_read(
    kind: str, granularity: str
) -> None:
    build, inputs, expected = LAYERS[kind]
    model, fresh = build(), build()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # some biases start at 0
    original = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = convert(model, recipe(max_bits=2, granularity=granularity, bias_bits=4))

    assert {t.name: t.kind for t in quantized.tensors} == expected
    for tensor in quantized.tensors:
        layer, _, local = tensor.name.rpartition(".")
        read = getattr(model.get_submodule(layer), local).detach()
        assert torch.equal(read, quantized_state(quantized)[tensor.name])
        assert torch.equal(float_state(model)[tensor.name], original[tensor.name])
        groups = [read]
        if granularity == "channel" and tensor.kind != "bias":
            groups = list(
                read.movedim(1 if "Transpose" in tensor.kind else 0, 0)
            )  # output channels
            assert len(tensor.quantizer.bits) == len(groups)
            assert read.unique().numel() > 4
        most = 16 if tensor.kind == "bias" else 4
        assert all(group.unique().numel() <= most for group in groups)
        assert not torch.equal(read, original[tensor.name])
    assert_round_trip(model, quantized, fresh, *inputs)

    main_output(model.train()(*inputs)).square().sum().backward()
    for tensor in quantized.tensors:
        assert tensor.parameter.grad.abs().sum() > 0 or "k_proj" in tensor.name
        learned = [p for p in tensor.quantizer.parameters() if p.requires_grad]
        assert len(learned) == 1
        assert learned[0].grad.isfinite().all()


@pytest.mark.parametrize("kind", ["learned", "uniform", "power_of_two"])
def test_each_kind_of_levels_trains(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5))
    quantized = convert(model, recipe(max_bits=3, levels=kind))
    x, y = images(3, 5, 5), torch.tensor([1, 3])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    weights = [t for t in quantized.tensors if t.kind != "bias"]
    assert all(t.quantizer(t.parameter).unique().numel() <= 8 for t in weights)
    moved = [t.quantizer.levels if kind == "learned" else t.quantizer.log2_clip for t in weights]
    fresh = [
        convert(nn.Sequential(nn.Linear(2, 2)), recipe(max_bits=3, levels=kind))
        .tensors[0]
        .quantizer
    ]
    assert all(m.requires_grad for m in moved)
    assert fresh[0].levels.requires_grad == (kind == "learned")


def test_layers_are_found_in_nested_code_without_tracing() -> None:
    model, x = Nested(), images(3, 6, 6)
    quantized = convert(model, recipe(max_bits=3))
    layers = [
        "stem.0",
        "blocks.0.conv",
        "blocks.1.conv",
        "twice",
        "direct",
        "unused",
        "input_quantizer",
    ]
    assert [t.name for t in quantized.tensors] == [
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    ]
    assert_round_trip(model, quantized, Nested(), x)
    model.train()(x).sum().backward()
    assert model.unused.parametrizations.weight.original.grad is None


# Shared tensors


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.rnn = nn.GRU(8, 8)
        self.norm = nn.LayerNorm(8)
        self.last_norm = self.norm
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embedding.weight
        self.again = self.head
        self.last = nn.Linear(10, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.again(self.last_norm(self.rnn(self.norm(self.embedding(tokens)))[0])))


def test_a_shared_tensor_is_quantized_once_and_stored_once() -> None:
    model = Language()
    quantized = convert(model, recipe(max_bits=3))
    assert [t.name for t in quantized.tensors] == [
        "embedding.weight",
        *(f"rnn.{kind}_{part}_l0" for kind in ("weight", "bias") for part in ("ih", "hh")),
        "head.bias",
        "last.weight",
        "last.bias",
    ]
    assert quantized.aliases == {
        "head.weight": "embedding.weight",
        "again.weight": "embedding.weight",
        "again.bias": "head.bias",
        "last_norm.weight": "norm.weight",
        "last_norm.bias": "norm.bias",
    }
    assert torch.equal(model.embedding.weight, model.head.weight)
    assert model.head.weight.unique().numel() <= 8
    assert len(list(quantizers(quantized))) == 8
    assert_round_trip(model, quantized, Language(), TOKENS)


def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_uses() -> None:
    model, plain = Language(), Language()
    quantized = convert(model, recipe(max_bits=8))
    plain.load_state_dict(quantized_state(quantized))
    for m in (model, plain):
        m(TOKENS).square().mean().backward()
    shared = quantized.tensors[0].parameter
    inside = (shared >= plain.embedding.weight.min()) & (
        shared <= plain.embedding.weight.max()
    )  # of the levels' range
    assert inside.float().mean() > 0.95
    torch.testing.assert_close(shared.grad, plain.embedding.weight.grad * inside)


def test_a_shared_tensor_stays_float_if_one_of_its_layers_does() -> None:
    model = Language()
    quantized = convert(
        model, recipe({"match": "again", "skip": True}, {"match": "head", "bits": 4})
    )
    assert (
        quantized.kept_float["embedding.weight"]
        == "shared with again.weight: an override says skip"
    )
    assert quantized.kept_float["head.bias"] == "shared with again.bias: an override says skip"


def test_layers_that_share_a_weight_must_agree() -> None:
    with pytest.raises(
        UsageError,
        match=r"embedding.weight and head.weight are one tensor: give both layers the same",
    ):
        convert(Language(), recipe({"match": "[ha]*", "bits": 4}))
    agreeing = recipe({"type": "Linear", "bits": 4}, {"match": "embedding", "bits": 4})
    assert convert(Language(), agreeing).tensors[0].quantizer.bits == (4,)


def test_cached_reads_quantize_a_layers_weight_once() -> None:
    model = nn.MultiheadAttention(8, 2)
    quantized = convert(model, recipe(max_bits=4))
    calls: list[str] = []
    for tensor in quantized.tensors:
        tensor.quantizer.register_forward_hook(lambda *_, name=tensor.name: calls.append(name))
    plain, _ = model(EMBEDDED, EMBEDDED, EMBEDDED)
    calls.clear()
    with parametrize.cached():
        cached, _ = model(EMBEDDED, EMBEDDED, EMBEDDED)
    assert sorted(calls) == sorted(t.name for t in quantized.tensors)
    gradients = [
        torch.autograd.grad(out.square().sum(), [t.parameter for t in quantized.tensors])
        for out in (plain, cached)
    ]
    assert torch.equal(plain, cached)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# What stays float


def layer_with(**parameters: Tensor) -> nn.Module:
    """A model with one layer that is quantized and one whose parameters are given."""
    layer = nn.Linear(4, 4)
    for name, value in parameters.items():
        setattr(layer, name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    return nn.Sequential(nn.Linear(4, 4), layer)


def reparametrized(how: Any) -> Any:
    return lambda: how(nn.Linear(4, 4))


ORIGINAL = "1.parametrizations.weight.original"


def pruned() -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


KEPT: dict[str, tuple[Any, str, str]] = {
    "weight norm": (
        reparametrized(parametrizations.weight_norm),
        f"{ORIGINAL}0",
        "remove_parametrizations",
    ),
    "spectral norm": (
        reparametrized(parametrizations.spectral_norm),
        ORIGINAL,
        "remove_parametrizations",
    ),
    "orthogonal": (
        reparametrized(parametrizations.orthogonal),
        ORIGINAL,
        "remove_parametrizations",
    ),
    "pruning": (pruned, "1.weight_orig", "computed from it"),
    "norm": (lambda: nn.LayerNorm(4), "1.weight", "LayerNorm weight: no quantizer"),
    "running mean": (
        lambda: nn.BatchNorm1d(4),
        "1.running_mean",
        "folded into its weight and bias",
    ),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "1.weight", "Bilinear weight: no quantizer"),
    "prelu": (lambda: nn.PReLU(4), "1.weight", "PReLU weight: no quantizer"),
    "max norm": (
        lambda: nn.Embedding(4, 4, max_norm=1),
        "1.weight",
        "max_norm changes it in place",
    ),
    "no values": (lambda: nn.Linear(4, 0), "1.weight", "holds no values"),
    "float64": (lambda: nn.Linear(4, 4).double(), "1.weight", "holds torch.float64; only float32"),
    "bfloat16": (
        lambda: nn.Linear(4, 4).bfloat16(),
        "1.bias",
        "holds torch.bfloat16; only float32",
    ),
    "whole numbers": (
        lambda: layer_with(weight=torch.ones(4, 4, dtype=torch.int8))[1],
        "1.weight",
        "holds torch.int8",
    ),
    "parameter list": (
        lambda: nn.ParameterList([torch.ones(3)]),
        "1.0",
        "ParameterList 0: no quantizer",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("what", KEPT)
def test_what_stays_float_is_named_with_its_reason(what: str) -> None:
    build, name, reason = KEPT[what]
    model, fresh = (nn.Sequential(nn.Linear(4, 4), build()) for _ in range(2))
    names = list(model.state_dict())
    quantized = convert(model, recipe(max_bits=3, act_bits=8))
    assert reason in quantized.kept_float[name]
    assert {"0.weight", "0.bias"} <= {t.name for t in quantized.tensors}
    assert "1" not in quantized.activations
    assert_every_name_is_accounted_for(quantized, names)
    fresh.load_state_dict(quantized_state(quantized), strict=True)


@pytest.mark.parametrize("what", ["weight norm", "spectral norm", "orthogonal", "pruning"])
def test_models_that_parametrize_their_weights_still_train(what: str) -> None:
    model, fresh = (nn.Sequential(nn.Linear(4, 4), KEPT[what][0]()) for _ in range(2))
    quantized = convert(model, recipe(max_bits=3))
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    assert all(
        p.grad is not None
        for name, p in model.named_parameters()
        if "levels" not in name and p.requires_grad
    )
    fresh.load_state_dict(quantized_state(quantized), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x))


def test_biases_stay_float_on_request() -> None:
    quantized = convert(small(), recipe(bias_bits=None))
    assert quantized.kept_float == {
        f"{n}.bias": "biases are kept in float (weights.bias_bits)" for n in "0134"
    }


class Stateful(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


class Complex(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))


def loaded(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict())
    return model


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(
            lambda: nn.Sequential(nn.LazyLinear(3)),
            "0 is a LazyLinear, which has no shape yet; run the model",
            id="lazy",
        ),
        pytest.param(
            lambda: loaded(nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.Linear(2, 3))),
            "0 is a LazyLinear, which has no shape yet; run the model",
            id="lazy with the shape of a state dict",
        ),
        pytest.param(
            lambda: layer_with(weight=torch.full((4, 4), torch.nan)),
            "1.weight holds NaN or infinite",
            id="NaN",
        ),
        pytest.param(
            lambda: layer_with(bias=torch.full((4,), torch.inf)),
            "1.bias holds NaN or infinite",
            id="infinity",
        ),
        pytest.param(
            lambda: Complex(2, 2),
            "phase holds torch.complex64, which no exported file can",
            id="complex",
        ),
        pytest.param(
            lambda: Stateful(2, 2), "_extra_state of the model's state is a dict", id="extra state"
        ),
        pytest.param(
            lambda: nn.ReLU(),
            "Nothing in this ReLU can .*: it has no parameters",
            id="no parameters",
        ),
        pytest.param(
            lambda: nn.PReLU(3), "Nothing in this PReLU can .*: weight: PReLU weight", id="no layer"
        ),
        pytest.param(
            lambda: small().half(),
            "Nothing in this Sequential can .*: holds torch.float16",
            id="half",
        ),
    ],
)
def test_models_that_cannot_be_converted_are_refused(model: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(model(), recipe())


def test_a_model_is_not_converted_twice() -> None:
    model = small()
    convert(model, recipe())
    with pytest.raises(UsageError, match="already quantized; pass the float model"):
        convert(model, recipe())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_of_sparse_gradients_is_quantized_and_gets_dense_ones(kind: Any) -> None:
    model = nn.Sequential(kind(6, 4, sparse=True), nn.Linear(4, 2))
    quantized = convert(model, recipe(max_bits=3))
    assert "0.weight" in {tensor.name for tensor in quantized.tensors}
    model(torch.tensor([[1, 2], [2, 5]])).square().sum().backward()
    gradient = next(t.parameter.grad for t in quantized.tensors if t.name == "0.weight")
    assert gradient is not None
    assert gradient.layout is torch.strided
    assert gradient.abs().sum(1).nonzero()[:, 0].tolist() == [1, 2, 5]


def test_frozen_parameters_stay_frozen() -> None:
    model = small()
    model[0].requires_grad_(False)
    quantized = convert(model, recipe(max_bits=3))
    model(images(3, 6, 6)).sum().backward()
    frozen = [t for t in quantized.tensors if t.name.startswith("0.")]
    assert all(not t.parameter.requires_grad and t.parameter.grad is None for t in frozen)
    assert frozen[0].quantizer.levels.grad is not None


# Torch around the quantized model


def test_a_deep_copy_is_equal_and_independent() -> None:
    quantized = convert(small(), recipe(max_bits=3, act_bits=4))
    x = images(3, 6, 6)
    assert fit_inputs(quantized, x) == []
    twin = copy.deepcopy(quantized)
    before = quantized.model(x)
    assert torch.equal(twin.model(x), before)
    names = list(quantized.model.state_dict())
    assert list(twin.model.state_dict()) == names
    assert not {id(p) for p in twin.model.parameters()} & {
        id(p) for p in quantized.model.parameters()
    }
    assert {id(q) for q in quantizers(twin)} <= {id(m) for m in twin.model.modules()}
    with torch.no_grad():
        twin.tensors[0].parameter.zero_()
        twin.tensors[2].quantizer.fit(twin.tensors[2].parameter, 1)
        twin.activations["1"].learned.levels.zero_()
    assert torch.equal(quantized.model(x), before)
    assert not torch.equal(twin.model(x), before)


def test_kind_of_sees_through_parametrizations() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 1, groups=4), nn.Linear(3, 3)
    )
    expected = ["depthwise Conv2d", "Conv2d", "Linear"]
    assert [kind_of(m) for m in model] == expected
    convert(model, recipe())
    assert [kind_of(m) for m in model] == expected


@pytest.mark.parametrize("act_bits", [None, 8, 4])
def test_a_training_step_under_bfloat16_autocast(act_bits: int | None) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    quantized = convert(model, recipe(max_bits=4, act_bits=act_bits))
    x, y = images(3, 6, 6), torch.tensor([1, 3])
    assert fit_inputs(quantized, x) == []
    model.train()
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        gradients = [t.parameter.grad for t in quantized.tensors]
        assert all(
            g.dtype == torch.float32 and g.isfinite().all() and g.abs().sum() > 0 for g in gradients
        )
        model.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_torch_compile_traces_the_same_computation() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    quantized, x = (
        convert(model, recipe(max_bits=4, granularity="channel", act_bits=8)),
        images(4, 4, 4),
    )
    assert fit_inputs(quantized, x) == []
    twin = copy.deepcopy(quantized)
    torch._dynamo.reset()
    eager, compiled = (
        quantized.model.train(),
        torch.compile(twin.model.train(), backend="aot_eager"),
    )
    expected, found = eager(x), compiled(x)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, other in zip(quantizers(quantized), quantizers(twin), strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
    for one, other in zip(quantized.tensors, twin.tensors, strict=True):
        torch.testing.assert_close(other.parameter.grad, one.parameter.grad)
