"""Input quantizers: which tensors of a layer's call reach them, and the memory they take."""

from __future__ import annotations

import pytest
import torch
from small_models import Nested, bits_of, fit_inputs, images, recipe
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ddqcli.qat.convert import convert
from ddqcli.qat.model import quantized_state
from ddqcli.quant.activation import ActivationQuantizer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_inputs_that_no_forward_reaches_are_not_fitted() -> None:
    quantized = convert(Nested(), recipe(act_bits=8))
    assert fit_inputs(quantized, images(3, 6, 6)) == ["direct", "unused"]
    before = dict(quantized.model.named_modules())
    quantized.keep_input_float("direct", "never called")
    assert "direct" not in quantized.activations
    assert quantized.kept_float["direct (input)"] == "never called"
    assert before.keys() - dict(quantized.model.named_modules()).keys() == {
        "direct.input_quantizer"
    }
    assert not any(name.startswith("direct.input") for name in quantized.model.state_dict())
    quantized.model.direct(torch.randn(2, 4))  # passes through


def watched(quantizer: ActivationQuantizer) -> list[Tensor]:
    seen: list[Tensor] = []
    quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_quantizes_each_tensor_once_and_no_mask(batch_first: bool) -> None:
    x, memory = torch.randn(2, 3, 8), 5 * torch.randn(2, 3, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(3 if batch_first else 2)
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    quantized = convert(model, recipe(max_bits=8, act_bits=8))
    quantizer = quantized.activations[""]
    assert fit_inputs(quantized, x, memory, memory) == []
    assert float(quantizer(memory).detach().abs().max()) > 3 * float(
        quantizer(x).detach().abs().max()
    )  # both were seen
    seen = watched(quantizer)

    by_position, _ = model(x, x, x, None, True, causal)
    assert [t is x for t in seen] == [True]
    by_name, _ = model(query=x, key=x, value=x, attn_mask=causal)
    mixed, _ = model(x, key=x, value=x, attn_mask=causal)
    assert torch.equal(by_position, by_name)
    assert torch.equal(by_position, mixed)
    assert by_position.isfinite().all()

    seen.clear()
    model(x, memory, memory)
    assert [t is x for t in seen] == [True, False]
    seen.clear()
    model(x, memory, 2 * memory)
    assert len(seen) == 3

    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    plain.load_state_dict(quantized_state(quantized))
    q, k = quantizer(x), quantizer(memory)
    torch.testing.assert_close(model.eval()(x, memory, memory)[0], plain(q, k, k)[0])


def test_inputs_are_quantized_whether_given_by_position_or_by_name() -> None:
    class Upsampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.ConvTranspose2d(3, 3, 3, stride=2), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.out(input=self.up(x, output_size=[12, 12]))
                if self.by_name
                else self.out(self.up(x, [12, 12]))
            )

    model, x = Upsampled(), images(3, 5, 5)
    quantized = convert(model, recipe(act_bits=4))
    model.by_name = False
    assert fit_inputs(quantized, x) == []
    seen = watched(quantized.activations["out"])
    by_position = model(x)
    model.by_name = True
    assert torch.equal(model(x), by_position)
    assert len(seen) == 2


def test_a_layer_of_the_users_own_type_is_quantized_as_its_parent() -> None:
    class Gated(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, picture: Tensor, scale: float) -> Tensor:
            return super().forward(picture) * self.gain * scale

    class SelfAttention(nn.MultiheadAttention):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return super().forward(x, x, x, attn_mask=bias)[0]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.attention = Gated(), SelfAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(
                self.conv(picture=x, scale=2.0).flatten(2).permute(2, 0, 1), torch.zeros(9, 9)
            )

    model, x = Both(), images(3, 5, 5)
    quantized = convert(model, recipe({"type": "Conv2d", "bits": 5}, act_bits=8))
    assert bits_of(quantized)["conv"] == (5, 5)
    assert quantized.tensors[0].kind == "Gated"
    assert (
        quantized.kept_float["conv.gain"] == "Gated gain: no quantizer for this kind of parameter"
    )
    assert fit_inputs(quantized, x) == []
    assert model(x).isfinite().all()


@pytest.mark.parametrize("act_bits", [None, 8])
def test_the_fast_paths_of_transformers_in_evaluation(act_bits: int | None) -> None:
    """Torch's fused inference kernels read the weights themselves.

    With quantized inputs they must not be taken.
    """

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    model, x = build().eval(), torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    quantized = convert(model, recipe(max_bits=8, act_bits=act_bits))
    assert fit_inputs(quantized, x) == []
    with torch.no_grad():
        fast, padded = model(x), model(x, src_key_padding_mask=padding)
    slow = model(x)  # gradients on: the layers' own forward
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(padded[0], slow[0])
    float_model = build().eval()
    float_model.load_state_dict(quantized_state(quantized))
    differs = float((float_model(x) - slow).detach().abs().max())
    assert differs < 1e-6 if act_bits is None else 1e-4 < differs < 0.5


# ---- memory


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass allocates and keeps for the backward pass."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        output = model(x).sum()
    del output
    return sum(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("act_bits", [4, 8])
def test_quantized_inputs_are_not_kept_beside_the_float_ones(act_bits: int) -> None:
    """Float training keeps every layer's input. So do we, and at most one byte a value more."""
    layers = [
        m for _ in range(3) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    model, x = nn.Sequential(*layers), torch.randn(16, 8, 32, 32)
    before = bytes_saved(model, x)
    quantized = convert(model, recipe(act_bits=act_bits))
    for activation in quantized.activations.values():
        activation.observing = True
    model(x)
    for activation in quantized.activations.values():
        activation.fit()
    values, of_weights = 3 * x.numel(), 20 * 3 * (8 * 8 * 9 + 512 + 512)
    assert before >= 4 * 2 * values
    assert bytes_saved(model, x) <= before + values + of_weights


@pytest.mark.parametrize("act_bits", [None, 4])
def test_layers_that_are_computed_again_in_the_backward_pass_get_the_same_gradients(
    act_bits: int | None,
) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.layers, self.again = (
                nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
                again,
            )

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layers, x, use_reentrant=False) if self.again else self.layers(x)

    x, state, grads = torch.randn(16, 8), Checkpointed(False).state_dict(), []
    for again in (False, True):
        model = Checkpointed(again)
        model.load_state_dict(state)
        quantized = convert(model, recipe(act_bits=act_bits))
        for activation in quantized.activations.values():
            activation.observing = True
        model.layers(x)
        for activation in quantized.activations.values():
            activation.fit()
        with quantized.batched():
            with parametrize.cached():
                loss = model(x).square().sum()
            loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[1], grads[0])
    assert any("levels" in name for name in grads[0])
