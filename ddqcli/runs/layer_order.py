"""The network's order of tensors in a few numbers; the manifest of a file is sorted by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ddqcli.formatting import natural_sort_key


def usual_order(names: Collection[str]) -> list[str]:
    """Return names as most networks have them: layer2 before layer10, weights before biases."""
    return sorted(names, key=lambda name: natural_sort_key(name.replace("bias", "~bias")))


def order_runs(names: Sequence[str]) -> list[int]:
    """Return what tells the order of `names` from the usual one: first place and length of runs.

    Each run is a stretch of the usual order. Without a difference, the list is empty.

    >>> order_runs(["conv1.weight", "layer1.weight", "layer2.weight", "fc.weight"])
    [0, 1, 2, 2, 1, 1]
    """
    place = {name: k for k, name in enumerate(usual_order(names))}
    runs: list[list[int]] = []
    for name in names:
        if runs and place[name] == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([place[name], 1])
    return [number for run in runs for number in run] if len(runs) > 1 else []


def in_order(names: Collection[str], runs: Sequence[int]) -> list[str]:
    """Return `names` in the order of `order_runs`. Raises ValueError unless each occurs once."""
    usual = usual_order(names)
    if not runs:
        return usual
    firsts, lengths = runs[::2], runs[1::2]
    if min(lengths) < 1 or sum(lengths) != len(usual):
        raise ValueError("the order does not name each tensor once")
    places = [
        place
        for first, length in zip(firsts, lengths, strict=True)
        for place in range(first, first + length)
    ]
    if sorted(places) != list(range(len(usual))):
        raise ValueError("the order does not name each tensor once")
    return [usual[place] for place in places]
