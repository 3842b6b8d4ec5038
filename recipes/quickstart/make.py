"""Makes digits.npz and model.pt anew, in plain PyTorch:  python make.py  (needs torch and scikit-learn)."""

from pathlib import Path

import numpy as np
import torch
from model import digits_net
from torch.nn import functional as F

HERE = Path(__file__).parent
MEAN, STD = 0.305, 0.376  # of the training images, on a scale of 0 to 1
EPOCHS, BATCH = 60, 64


def make_data() -> dict[str, np.ndarray]:
    """The 1,797 images as uint8, 0 to 255 (the originals count 0 to 16); every fifth is a test image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("The images come with scikit-learn: pip install scikit-learn") from None
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
    return (torch.from_numpy(images)[:, None].float() / 255 - MEAN) / STD


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Each image moved by up to a pixel; what moves in is black."""
    padded = F.pad(x, (1, 1, 1, 1), value=-MEAN / STD)
    corners = torch.randint(0, 3, (len(x), 2)).tolist()
    return torch.stack(
        [image[:, t : t + 8, s : s + 8] for image, (t, s) in zip(padded, corners, strict=True)]
    )


def train(data: dict[str, np.ndarray]) -> torch.nn.Module:
    """Adam with a one-cycle step size and label smoothing."""
    model = digits_net()
    x, y = as_input(data["x_train"]), torch.from_numpy(data["y_train"]).long()
    steps = len(x) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=EPOCHS * steps
    )
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(shifted(x[chosen])), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    data = make_data()
    np.savez_compressed(HERE / "digits.npz", **data)
    model = train(data)
    with torch.no_grad():
        hits = model(as_input(data["x_test"])).argmax(1).numpy() == data["y_test"]
    torch.save(model.state_dict(), HERE / "model.pt")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size:,} parameters; {hits.sum()} of {len(hits)} test images right: {100 * hits.mean():.2f} %"
    )


if __name__ == "__main__":
    main()
