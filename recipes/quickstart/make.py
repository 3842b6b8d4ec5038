"""Recreate digits.npz and model.pt in plain PyTorch: python make.py (needs scikit-learn)."""

from pathlib import Path

import numpy as np
import torch
from model import digits_net
from torch.nn import functional as F

HERE = Path(__file__).parent
MEAN, STD = 0.305, 0.376  # of the training images, scaled to 0 to 1
EPOCHS, BATCH = 60, 64


def make_data() -> dict[str, np.ndarray]:
    """Return the images as uint8, scaled from 0..16 to 0..255; every fifth is a test image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("The images are part of scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    test = np.arange(len(labels)) % 5 == 4
    return {
        "x_train": images[~test],
        "y_train": labels[~test],
        "x_test": images[test],
        "y_test": labels[test],
    }


def as_input(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 images [B,8,8] to normalized inputs [B,1,8,8]."""
    return (torch.from_numpy(images)[:, None].float() / 255 - MEAN) / STD


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Shift each image at random by up to one pixel, filling with black."""
    padded = F.pad(x, (1, 1, 1, 1), value=-MEAN / STD)
    corners = torch.randint(0, 3, (len(x), 2)).tolist()
    return torch.stack(
        [image[:, t : t + 8, s : s + 8] for image, (t, s) in zip(padded, corners, strict=True)]
    )


def train(data: dict[str, np.ndarray]) -> torch.nn.Module:
    """Train with AdamW, a one-cycle learning rate and label smoothing."""
    model = digits_net()
    x, y = as_input(data["x_train"]), torch.from_numpy(data["y_train"]).long()
    steps = len(x) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=EPOCHS * steps
    )
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(shifted(x[batch])), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sum in the same order on every machine
    data = make_data()
    np.savez_compressed(HERE / "digits.npz", **data)
    model = train(data)
    with torch.no_grad():
        correct = model(as_input(data["x_test"])).argmax(1).numpy() == data["y_test"]
    torch.save(model.state_dict(), HERE / "model.pt")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size:,} parameters; {correct.sum()} of {len(correct)} test images correct: "
        f"{100 * correct.mean():.2f} %"
    )


if __name__ == "__main__":
    main()
