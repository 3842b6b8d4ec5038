"""One network a family with a few random samples, loss and metric, for families.py.

`build` and `data` are the factories that ddq gets; `name` chooses the family.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection, optical_flow, segmentation, video
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock

TESTS = Path(__file__).resolve().parents[1]
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


def classifiers() -> dict[str, Family]:
    """Return a small member of each of torchvision's families of image classifiers."""
    sys.path += [str(TESTS), str(TESTS / "checkpoint")]
    families = importlib.import_module("test_torchvision_families").FAMILIES
    return {name: Family(build, _image(size)) for name, (build, size) in families.items()}


def _image(size: int) -> Callable[[int], Sample]:
    return lambda k: (torch.randn(3, size, size), k % CLASSES)


def small_resnet() -> nn.Module:
    """Return ResNet with one block a stage, as the backbone of segmenters and detectors."""
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])


# --------------------------------------------------------------------- segmentation and detection


def segmenter(build: Callable[[], nn.Module]) -> Family:
    """Return the task of a segmenter; the auxiliary output of some has a part in the loss."""

    def sample(k: int) -> Sample:
        return torch.randn(3, 64, 64), torch.randint(CLASSES, (64, 64))

    def loss(output: dict[str, Tensor], classes: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(scores, classes) for scores in output.values()]).sum()

    def hits(output: dict[str, Tensor], classes: Tensor) -> Tensor:
        return (output["out"].argmax(1) == classes).float().mean((1, 2))

    return Family(build, sample, loss, {"name": "right pixels", "unit": "%", "function": hits})


def fcn() -> nn.Module:
    layers = IntermediateLayerGetter(small_resnet(), {"layer4": "out", "layer3": "aux"})
    return segmentation.FCN(
        layers, segmentation.fcn.FCNHead(512, CLASSES), segmentation.fcn.FCNHead(256, CLASSES)
    )


def deeplab() -> nn.Module:
    layers = IntermediateLayerGetter(small_resnet(), {"layer3": "out"})
    head = segmentation.deeplabv3.DeepLabHead(256, CLASSES, (6, 12))
    return segmentation.DeepLabV3(layers, head)


def lraspp() -> nn.Module:
    return segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES)


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


def detector(net: Callable[[], nn.Module], size: int = 96) -> Family:
    """Return the task of a detector, on images with one object."""

    def build() -> nn.Module:
        return Detector(net())

    def sample(k: int) -> Sample:
        box = torch.tensor([[16.0, 16.0, 80.0, 72.0]])
        inputs = {"images": torch.rand(3, size, size), "boxes": box}
        inputs["labels"] = torch.tensor([1 + k % CLASSES])
        if net is mask_rcnn:
            inputs["masks"] = torch.zeros(1, size, size, dtype=torch.uint8)
            inputs["masks"][:, 16:72, 16:80] = 1
        if net is keypoint_rcnn:
            inputs["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17])
        return inputs, box[0]

    def loss(output: dict[str, Tensor], box: Tensor) -> Tensor:
        return output["losses"].sum()

    def overlap(output: dict[str, Tensor], box: Tensor) -> Tensor:
        return torchvision.ops.box_iou(output["boxes"], box).diagonal()

    metric = {"name": "IoU", "unit": "%", "function": overlap}
    return Family(build, sample, loss, metric)


def pyramid() -> nn.Module:
    return detection.backbone_utils._resnet_fpn_extractor(small_resnet(), 5, [2, 3, 4])


def with_regions(kind: Callable[..., nn.Module], **parts: Any) -> nn.Module:
    """Return Faster R-CNN or what is built on it, with a small head for boxes."""
    anchors = detection.rpn.AnchorGenerator(((32,), (64,), (96,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    return kind(
        pyramid(), min_size=96, max_size=96, rpn_anchor_generator=anchors, box_roi_pool=pool,
        box_head=detection.faster_rcnn.TwoMLPHead(256 * 49, 64),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(64, CLASSES + 1), **parts,
    )  # fmt: skip


def faster_rcnn() -> nn.Module:
    return with_regions(detection.FasterRCNN)


def mask_rcnn() -> nn.Module:
    parts = detection.mask_rcnn
    return with_regions(
        detection.MaskRCNN,
        mask_head=parts.MaskRCNNHeads(256, (64, 64), 1),
        mask_predictor=parts.MaskRCNNPredictor(64, 64, CLASSES + 1),
    )


def keypoint_rcnn() -> nn.Module:
    parts = detection.keypoint_rcnn
    return with_regions(
        detection.KeypointRCNN,
        keypoint_head=parts.KeypointRCNNHeads(256, (64, 64)),
        keypoint_predictor=parts.KeypointRCNNPredictor(64, 17),
    )


def one_stage(kind: Callable[..., nn.Module], shapes: int) -> Callable[[], nn.Module]:
    """Return FCOS or RetinaNet with so many anchor shapes a place."""
    ratios = ((0.5, 1.0, 2.0)[:shapes],) * 4
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,), (96,)), ratios)
    return lambda: kind(
        pyramid(), num_classes=CLASSES + 1, min_size=96, max_size=96, anchor_generator=anchors
    )


def ssdlite() -> nn.Module:
    return detection.ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES + 1)


# ------------------------------------------------------------------------------- video and flow


def video_classifier(build: Callable[[], nn.Module], frames: int, size: int) -> Family:
    """Return the task of a video classifier, on a few small frames."""
    return Family(build, lambda k: (torch.randn(3, frames, size, size), k % CLASSES))


def video_resnet(first: type[nn.Module], others: type[nn.Module]) -> Callable[[], nn.Module]:
    """Return R3D, MC3 or R(2+1)D with one block a stage."""
    parts = video.resnet
    stem = parts.R2Plus1dStem if first is parts.Conv2Plus1D else parts.BasicStem
    makers = [first, others, others, others]
    return lambda: parts.VideoResNet(
        parts.BasicBlock, makers, [1, 1, 1, 1], stem, num_classes=CLASSES
    )


def small_swin3d() -> nn.Module:
    return video.SwinTransformer3d([2, 4, 4], 24, [2, 2], [3, 6], [2, 2, 2], num_classes=CLASSES)


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
    **classifiers(),
    "fcn": segmenter(fcn),
    "deeplabv3": segmenter(deeplab),
    "lraspp": segmenter(lraspp),
    "faster_rcnn": detector(faster_rcnn),
    "mask_rcnn": detector(mask_rcnn),
    "keypoint_rcnn": detector(keypoint_rcnn),
    "fcos": detector(one_stage(detection.FCOS, 1)),
    "retinanet": detector(one_stage(detection.RetinaNet, 3)),
    "ssdlite": detector(ssdlite),
    "r3d": video_classifier(video_resnet(*[video.resnet.Conv3DSimple] * 2), 4, 32),
    "mc3": video_classifier(
        video_resnet(video.resnet.Conv3DSimple, video.resnet.Conv3DNoTemporal), 4, 32
    ),
    "r2plus1d": video_classifier(video_resnet(*[video.resnet.Conv2Plus1D] * 2), 4, 32),
    "s3d": video_classifier(lambda: video.s3d(num_classes=CLASSES), 14, 224),
    "swin3d": video_classifier(small_swin3d, 4, 32),
    "mvit": video_classifier(small_mvit, 4, 64),
    "raft_small": flow(),
    "transformer_encoder": Family(Encoder, sentence),
    "transformer_decoder": Family(Translator, translation, token_loss, token_hits),
    "crnn": Family(CRNN, line((1, 32, 64)), ctc, CTC_METRIC),
    "conformer": Family(Conformer, line((64, 40)), ctc, CTC_METRIC),
}
