"""Networks of biology: antibody numbering, and sources of brain waves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from real_networks import pictures
from real_networks.network import (
    CALIBRATION,
    TEST,
    Network,
    divergence,
    import_module,
    load_state,
    same_class,
)

# ---------------------------------------------------------------------------------- antibodies


def antibody_numbers(site: Path) -> nn.Module:
    """ANARCII's transformer, which numbers the residues of an antibody, with teacher forcing.

    The input [B,L+L] holds the residues and the float network's own numbers. The output holds the
    scores of each next number.
    """
    parts = import_module(site, "anarcii.inference.model")
    folder = site / "anarcii" / "models" / "antibody"
    sizes = json.loads((folder / "antibody_4_2_128_512.json").read_text(encoding="utf-8"))

    class Numbering(parts.S2S):
        def forward(self, sequences: Tensor) -> Tensor:
            residues, numbers = sequences.chunk(2, 1)
            mask = self.make_src_mask(residues)
            masks = *self.make_trg_mask(numbers), mask
            return self.decoder(numbers, self.encoder(residues, mask), *masks)[0]

    hidden = sizes["HID_DIM"]
    common = hidden, sizes["LAYERS"], sizes["HEADS"], 4 * hidden, sizes["DROPOUT"], "cpu"
    encoder = parts.Encoder(sizes["INPUT_DIM"], *common)
    decoder = parts.Decoder(sizes["OUTPUT_DIM"], *common)
    net = Numbering(encoder, decoder, sizes["SRC_PAD_IDX"], sizes["TRG_PAD_IDX"], "cpu")
    net.load_state_dict(load_state(folder / "antibody_4_2_128_512.pt"))
    return net


# Variable domains of well-known antibodies.
CALIBRATION_CHAINS = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAY"
    "LQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQP"
    "EDFATYYCQQHYTTPPTFGQGTKVEIK",
    "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAY"
    "MQLSSLTSEDSAVYYCARSTYYGGDWYFNVWGAGTTVTVSA",
)
TEST_CHAINS = (
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLY"
    "LQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQP"
    "EDVATYYCQRYNRAPYTFGQGTKVEIK",
)
RESIDUES = "ACDEFGHIKLMNPQRSTVWXY"
START, END = 1, 2  # of both sequences


def numbered_chains(site: Path) -> tuple[Tensor, Tensor]:
    """Return mutated antibodies and the float network's numbers, [N,128+128]."""
    net = antibody_numbers(site).eval()

    def mutants(chains: tuple[str, ...], part: int, count: int) -> Tensor:
        rng = np.random.default_rng(60 + part)
        residues = torch.zeros(count, 128, dtype=torch.long)
        for index in range(count):
            tokens = [RESIDUES.index(r) + 4 for r in mutated(chains[index % len(chains)], rng)]
            row = [START, *tokens, END]
            residues[index, : len(row)] = torch.tensor(row)
        return pictures.shuffled(append_numbers(net, residues), part)

    return mutants(CALIBRATION_CHAINS, 0, CALIBRATION), mutants(TEST_CHAINS, 1, TEST)


def mutated(chain: str, rng: np.random.Generator) -> list[str]:
    """Replace up to 19 residues of a chain, delete up to 3, and cut up to 3 at the start."""
    residues = list(chain)
    for place in rng.integers(len(residues), size=int(rng.integers(0, 20))):
        residues[place] = RESIDUES[rng.integers(len(RESIDUES))]
    for place in sorted(rng.integers(5, len(residues), size=int(rng.integers(0, 4))))[::-1]:
        del residues[place]
    return residues[int(rng.integers(0, 4)) :]


@torch.no_grad()
def append_numbers(net: nn.Module, residues: Tensor) -> Tensor:
    """Append the numbers that the network generates one after another."""
    numbers = torch.zeros_like(residues)
    numbers[:, 0] = START
    for source, generated in zip(residues.split(32), numbers.split(32), strict=True):
        mask = net.make_src_mask(source)
        encoded, caches = net.encoder(source, mask), None
        for step in range(source.shape[1] - 1):
            padding = torch.zeros(len(source), step + 1, dtype=torch.bool)
            scores, caches = net.decoder(
                generated[:, step : step + 1], encoded, padding, None, mask, caches
            )
            generated[:, step + 1] = scores[:, -1].argmax(-1)
    return torch.cat([residues, numbers], 1)


def same_numbers(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if all numbers up to the end are the same."""
    best = expected.argmax(-1)
    is_end = (best == END).int()
    after_end = is_end.cumsum(1) - is_end > 0
    return ((output.argmax(-1) == best) | after_end).all(1).float()


# --------------------------------------------------------------------------------- brain waves


def iclabel(site: Path) -> nn.Module:
    """ICLabel: the source of a component of brain waves, of seven classes.

    The input [B,1224] holds a map of 32 x 32, a spectrum of 100 bins, and an autocorrelation of
    100 lags.
    """
    kind: type[nn.Module] = import_module(site, "mne_icalabel.iclabel.network.torch").ICLabelNet

    class Scores(kind):  # type: ignore[misc, valid-type]
        def forward(self, features: Tensor) -> Tensor:
            image = self.img_conv(features[:, :1024].unflatten(1, (1, 32, 32)))
            rows = features[:, 1024:].unflatten(1, (2, 1, 1, 100))
            lines = self.psds_conv(rows[:, 0]), self.autocorr_conv(rows[:, 1])
            wide = [line.permute(0, 3, 1, 2).expand(-1, -1, 4, 4) for line in lines]
            return self.conv(torch.cat([image, *wide], 1)).flatten(1)

    net = Scores()
    folder = site / "mne_icalabel" / "iclabel" / "network" / "assets"
    net.load_state_dict(load_state(folder / "ICLabelNet.pt"))
    return net


def components(_: Path) -> tuple[Tensor, Tensor]:
    """Return random components, float32 [N,1224]."""

    def rows(seed: int, count: int) -> Tensor:
        rng = np.random.default_rng(70 + seed)
        return torch.from_numpy(np.stack([component(rng) for _ in range(count)])).float()

    return rows(0, CALIBRATION), rows(1, TEST)


def component(rng: np.random.Generator) -> np.ndarray:
    """Return a scalp map, a spectrum in dB and its autocorrelation, each scaled to 0.99."""
    scalp, power = scalp_map(rng), power_spectrum(rng)
    lags = np.fft.irfft(np.concatenate([[0], 10 ** (power / 10)]), 200)
    lags = lags[1:101] / lags[0]
    return np.concatenate([scalp.ravel(), power / np.abs(power).max(), lags]) * 0.99


def scalp_map(rng: np.random.Generator) -> np.ndarray:
    """Return the potential of one to three sources on a round head, [32,32]."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    head = x**2 + y**2 <= 1
    potential = np.zeros((32, 32))
    for _ in range(int(rng.integers(1, 4))):
        across, along = rng.uniform(-0.9, 0.9, 2)
        size = rng.uniform(0.1, 0.7)
        bump = np.exp(-((x - across) ** 2 + (y - along) ** 2) / (2 * size**2))
        potential += rng.choice([-1, 1]) * rng.uniform(0.3, 1) * bump
    return np.where(head, potential, 0) / np.abs(potential[head]).max()


def power_spectrum(rng: np.random.Generator) -> np.ndarray:
    """Return the power at 1 to 100 Hz in dB: a slope with two peaks, sometimes with mains hum."""
    frequency = np.arange(1, 101)
    power = -rng.uniform(-0.5, 2) * 10 * np.log10(frequency)
    for center in (rng.uniform(8, 12), rng.uniform(15, 60)):
        power += rng.uniform(0, 12) * np.exp(-((frequency - center) ** 2) / 8)
    power += rng.choice([0, 20], p=[0.8, 0.2]) * (np.abs(frequency - 50) < 2)
    return power + rng.normal(0, 0.7, 100)


NETWORKS = {
    "anarcii": Network(
        task="antibody numbering (transformer)",
        metric="same number for each residue",
        packages=("anarcii==2.0.8",),
        build=antibody_numbers,
        samples=numbered_chains,
        agreement=same_numbers,
        loss=divergence,
        preprocess=torch.Tensor.long,
    ),
    "iclabel": Network(
        task="source of a brain wave (shared weights)",
        metric="same class of 7",
        packages=("mne-icalabel==0.10.0",),
        build=iclabel,
        samples=components,
        agreement=same_class,
    ),
}
