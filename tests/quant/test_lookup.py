"""Lookup tables against a search over all levels."""

from __future__ import annotations

import oracle
import pytest
import torch
from quant_cases import LEVELS, seeded

from ddqcli.quant.lookup import make_lookup_tables, nearest_level_table


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("s", [1, 3, 8])
def test_the_table_gives_the_nearest_level_of_every_cell(s, kind):
    levels = oracle.effective(LEVELS[kind](seeded(s), 2**s), s)
    centers = torch.arange(-1, 511, dtype=torch.float64) / 2 + 0.25
    table = nearest_level_table(levels.float()[None])[0]
    assert torch.equal(levels[table], levels[oracle.nearest(centers, levels)])


def test_a_repeated_level_has_its_first_index_below_it_and_its_last_at_and_above_it():
    table = nearest_level_table(torch.tensor([[10.0, 10, 50, 50]]))[0]
    cell = lambda position: int(table[2 * position + 1])  # noqa: E731
    assert [cell(p) for p in (0, 9, 10, 29, 30, 49, 50, 255)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_tables_of_groups_together_are_those_of_each_group_alone():
    levels, gates = torch.rand(2, 8, generator=seeded(0)) * 255, torch.ones(2, 3)
    scale, zero_point = torch.tensor([0.5, 0.25]), torch.tensor([128.0, 0.0])
    together = make_lookup_tables(levels, scale, zero_point, gates, (2, 2)).split()
    for g, tables in enumerate(together):
        row = slice(g, g + 1)
        alone = make_lookup_tables(levels[row], scale[row], zero_point[row], gates[row], (2,))
        assert torch.equal(tables.values, alone.values)
        assert torch.equal(tables.cells.nearest_value, alone.cells.nearest_value)
        assert torch.equal(tables.cells.bin, alone.cells.bin)


@pytest.mark.parametrize("trained", ["levels", "scale", "gates", None])
@pytest.mark.parametrize("bits", [2, 8])
def test_tables_know_what_training_moves(trained, bits):
    inputs = {"levels": torch.rand(1, 256) * 255, "scale": torch.ones(1), "gates": torch.ones(1, 8)}
    if trained:
        inputs[trained].requires_grad_()
    levels, scale, gates = inputs.values()
    tables = make_lookup_tables(levels, scale, torch.zeros(1), gates, (bits,))
    assert tables.learned == (trained is not None and not (trained == "levels" and bits == 8))
    assert tables.values_for_gates.requires_grad == (trained == "gates")
