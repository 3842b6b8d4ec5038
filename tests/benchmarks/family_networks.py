"""One network a family with a few random samples, loss and metric, for families.py.

`build` and `data` are the factories that ddq gets; `name` chooses the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection, optical_flow, segmentation, video

CLASSES = 5
BLANK = 0  # of CTC
Sample = tuple[Any, Any]  # inputs, targets


@dataclass(frozen=True)
class Family:
    """A network and the task that it is for; without loss and metric, classification."""

    build: Callable[[], nn.Module]
    sample: Callable[[int], Sample]
    loss: Callable[[Any, Any], Tensor] | None = None
    metric: Any = None
    train: int = 8  # samples


def build(name: str) -> nn.Module:
    """Return a family's network with random weights."""
    torch.manual_seed(0)
    return FAMILIES[name].build()


def data(name: str) -> dict[str, Any]:
    """Return a family's data for `ddq --data`."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    samples = [family.sample(k) for k in range(family.train)]
    parts = {"train": samples, "val": samples[:4], "loss": family.loss, "metric": family.metric}
    return {key: value for key, value in parts.items() if value is not None}


# ------------------------------------------------------------------------------- classification


def classifiers() -> Iterator[tuple[str, Family]]:
    """Yield a small member of each of torchvision's families of image classifiers."""
    sizes = {"maxvit_t": 224, "inception_v3": 299}
    for name in (
        "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3",
        "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf",
        "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11",
        "vit_b_32",
    ):  # fmt: skip
        kwargs: dict[str, Any] = {"num_classes": CLASSES}
        if name in ("googlenet", "inception_v3"):
            kwargs["init_weights"] = False  # initialization takes a minute
        if name == "vit_b_32":
            kwargs["image_size"] = 64
        yield name, Family(_model(name, **kwargs), _image(sizes.get(name, 64)))


def _model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **kwargs)


def _image(size: int) -> Callable[[int], Sample]:
    return lambda k: (torch.randn(3, size, size), k % CLASSES)


# --------------------------------------------------------------------- segmentation and detection


def segmenter(name: str, **kwargs: Any) -> Family:
    """Return a segmenter of torchvision; the auxiliary output of some has a part in the loss."""

    def sample(k: int) -> Sample:
        return torch.randn(3, 64, 64), torch.randint(CLASSES, (64, 64))

    def loss(output: dict[str, Tensor], classes: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(scores, classes) for scores in output.values()]).sum()

    def hits(output: dict[str, Tensor], classes: Tensor) -> Tensor:
        return (output["out"].argmax(1) == classes).float().mean((1, 2))

    factory = getattr(segmentation, name)
    metric = {"name": "right pixels", "unit": "%", "function": hits}
    return Family(
        lambda: factory(weights=None, weights_backbone=None, num_classes=CLASSES, **kwargs),
        sample, loss, metric,
    )  # fmt: skip


class Detector(nn.Module):
    """Gives losses and boxes at once, as in recipes/README.md; targets are named inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def run(self, training: bool, *arguments: Any) -> Any:
        for part in self.net.modules():
            if not isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.training = training
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the detector samples the boxes that its losses are of
            return self.net(*arguments)

    def forward(self, images: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        each = [{key: value[k] for key, value in targets.items()} for k in range(len(images))]
        losses = self.run(True, list(images), each)
        with torch.no_grad():
            found = self.run(False, list(images))
        best = torch.zeros(len(images), 4)
        for place, boxes in zip(best, found, strict=True):
            if len(boxes["boxes"]):
                place.copy_(boxes["boxes"][0])
        return {"losses": torch.stack(list(losses.values())), "boxes": best}


def detector(name: str, size: int = 96, **kwargs: Any) -> Family:
    """Return a detector of torchvision for images with one object."""
    limits = {} if name.startswith("ssd") else {"min_size": size, "max_size": size}

    def build() -> nn.Module:
        factory = getattr(detection, name)
        return Detector(
            factory(
                weights=None, weights_backbone=None, num_classes=CLASSES + 1, **limits, **kwargs
            )
        )

    def sample(k: int) -> Sample:
        box = torch.tensor([[16.0, 16.0, 80.0, 72.0]])
        inputs = {"images": torch.rand(3, size, size), "boxes": box}
        inputs["labels"] = torch.tensor([1 + k % CLASSES])
        if name.startswith("mask"):
            inputs["masks"] = torch.zeros(1, size, size, dtype=torch.uint8)
            inputs["masks"][:, 16:72, 16:80] = 1
        if name.startswith("keypoint"):
            inputs["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17])
        return inputs, box[0]

    def loss(output: dict[str, Tensor], box: Tensor) -> Tensor:
        return output["losses"].sum()

    def overlap(output: dict[str, Tensor], box: Tensor) -> Tensor:
        return torchvision.ops.box_iou(output["boxes"], box).diagonal()

    metric = {"name": "IoU", "unit": "%", "function": overlap}
    return Family(build, sample, loss, metric)


# ------------------------------------------------------------------------------- video and flow


def video_classifier(name: str, frames: int, size: int) -> Family:
    """Return a video classifier of torchvision for a few small frames."""
    factory = getattr(video, name)
    return Family(
        lambda: factory(weights=None, num_classes=CLASSES),
        lambda k: (torch.randn(3, frames, size, size), k % CLASSES),
    )


def small_mvit() -> nn.Module:
    """Return MViT for 4 frames of 64 pixels; torchvision's factories insist on 16 of 224."""
    config = video.mvit.MSBlockConfig
    blocks = [
        config(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        config(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        config(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    ]
    return video.MViT(
        spatial_size=(64, 64), temporal_size=4, block_setting=blocks, residual_pool=True,
        residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True,
        num_classes=CLASSES,
    )  # fmt: skip


def flow() -> Family:
    """Return RAFT, whose output is a list: a flow after each of its updates."""

    def build() -> nn.Module:
        return optical_flow.raft_small(weights=None)

    def sample(k: int) -> Sample:
        return (torch.rand(3, 128, 128), torch.rand(3, 128, 128)), torch.zeros(2, 128, 128)

    def loss(flows: list[Tensor], truth: Tensor) -> Tensor:
        return torch.stack([F.l1_loss(each, truth) for each in flows]).mean()

    def error(flows: list[Tensor], truth: Tensor) -> Tensor:
        return (flows[-1] - truth).square().sum(1).sqrt().mean((1, 2))

    metric = {"name": "endpoint error", "unit": "px", "better": "lower", "function": error}
    return Family(build, sample, loss, metric)


# -------------------------------------------------------------------------------------- sequences


class Encoder(nn.Module):
    """A transformer encoder that classifies tokens [B, T]; 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(100, 64, padding_idx=0), nn.Embedding(16, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.body(self.embed(tokens) + self.place(places), src_key_padding_mask=tokens == 0)
        return self.head(x[:, 0])


class Translator(nn.Module):
    """A transformer encoder and decoder, with one embedding for both and for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(100, 64), nn.Embedding(16, 64)
        self.body = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], target.device)
        x, y = (self.embed(t) + self.place(torch.arange(t.shape[1])) for t in (source, target))
        return self.head(self.body(x, y, tgt_mask=mask, tgt_is_causal=True))


def sentence(k: int) -> Sample:
    text = torch.randint(1, 100, (12,))
    text[9 + k % 4 :] = 0
    return text, k % CLASSES


def translation(k: int) -> Sample:
    source, target = torch.randint(100, (9,)), torch.randint(100, (8,))
    return {"source": source, "target": target[:-1]}, target[1:]


def token_loss(scores: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


def token_hits(scores: Tensor, following: Tensor) -> Tensor:
    return (scores.argmax(2) == following).float().mean(1)


class CRNN(nn.Module):
    """Log-probabilities [B, T, K] of lines [B, 1, 32, W], as the text recognizer of Shi et al."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, after, pool in ((1, 32, (2, 2)), (32, 64, (2, 2)), (64, 128, (2, 1))):
            parts += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
            parts += [nn.ReLU(), nn.MaxPool2d(pool)]
        self.conv = nn.Sequential(*parts, nn.Conv2d(128, 128, (4, 1)), nn.ReLU())
        self.rnn = nn.LSTM(128, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, 11)

    def forward(self, lines: Tensor) -> Tensor:
        x = self.conv(lines).squeeze(2).transpose(1, 2)
        return self.head(self.rnn(x)[0]).log_softmax(2)


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward (Gulati et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = self._feed_forward(width), self._feed_forward(width)
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.before_conv = nn.LayerNorm(width)
        self.conv = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1), nn.GLU(1),
            nn.Conv1d(width, width, 15, padding=7, groups=width), nn.BatchNorm1d(width),
            nn.SiLU(), nn.Conv1d(width, width, 1),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def _feed_forward(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        y = self.before_attention(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.conv(self.before_conv(x).transpose(1, 2)).transpose(1, 2)
        return self.norm(x + 0.5 * self.last(x))


class Conformer(nn.Module):
    """Log-probabilities [B, T / 4, K] of spectrograms [B, T, 40]."""

    def __init__(self) -> None:
        super().__init__()
        self.subsample = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.project = nn.Linear(160, 64)
        self.blocks = nn.Sequential(ConformerBlock(64), ConformerBlock(64))
        self.head = nn.Linear(64, 11)

    def forward(self, features: Tensor) -> Tensor:
        x = self.subsample(features[:, None]).transpose(1, 2).flatten(2)
        return self.head(self.blocks(self.project(x))).log_softmax(2)


def line(shape: tuple[int, ...]) -> Callable[[int], Sample]:
    return lambda k: (
        torch.rand(shape),
        {"text": torch.randint(1, 11, (5,)), "length": torch.tensor(3 + k % 3)},
    )


def ctc(output: Tensor, targets: dict[str, Tensor]) -> Tensor:
    steps = torch.full((len(output),), output.shape[1])
    return F.ctc_loss(output.transpose(0, 1), targets["text"], steps, targets["length"], BLANK)


def ctc_bits(output: Tensor, targets: dict[str, Tensor]) -> Tensor:
    steps = torch.full((len(output),), output.shape[1])
    arguments = output.transpose(0, 1), targets["text"], steps, targets["length"], BLANK
    return F.ctc_loss(*arguments, reduction="none") / torch.log(torch.tensor(2.0))


CTC_METRIC = {"name": "code length", "unit": "bits", "better": "lower", "function": ctc_bits}

FAMILIES: dict[str, Family] = {
    **dict(classifiers()),
    "fcn_resnet50": segmenter("fcn_resnet50", aux_loss=True),
    "deeplabv3_mobilenet": segmenter("deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet": segmenter("lraspp_mobilenet_v3_large"),
    "fasterrcnn_mobilenet": detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "fcos_resnet50": detector("fcos_resnet50_fpn"),
    "retinanet_resnet50": detector("retinanet_resnet50_fpn"),
    "ssd300_vgg16": detector("ssd300_vgg16"),
    "ssdlite320_mobilenet": detector("ssdlite320_mobilenet_v3_large"),
    "maskrcnn_resnet50": detector("maskrcnn_resnet50_fpn"),
    "keypointrcnn_resnet50": detector("keypointrcnn_resnet50_fpn", num_keypoints=17),
    "r3d_18": video_classifier("r3d_18", 4, 48),
    "mc3_18": video_classifier("mc3_18", 4, 48),
    "r2plus1d_18": video_classifier("r2plus1d_18", 4, 48),
    "s3d": video_classifier("s3d", 16, 224),
    "swin3d_t": video_classifier("swin3d_t", 4, 64),
    "mvit": Family(small_mvit, lambda k: (torch.randn(3, 4, 64, 64), k % CLASSES)),
    "raft_small": flow(),
    "transformer_encoder": Family(Encoder, sentence),
    "transformer_decoder": Family(Translator, translation, token_loss, token_hits),
    "crnn": Family(CRNN, line((1, 32, 64)), ctc, CTC_METRIC),
    "conformer": Family(Conformer, line((64, 40)), ctc, CTC_METRIC),
}
