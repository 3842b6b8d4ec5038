"""The method's documentation is correct: METHOD.md's names and the docstring examples."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from functools import reduce
from pathlib import Path

import pytest

import ddqcli.quant

METHOD = Path(ddqcli.quant.__path__[0], "METHOD.md")
MODULES = [m.name for m in pkgutil.iter_modules(ddqcli.quant.__path__)]
NAMES = sorted(set(re.findall(r"`((?:quant|qat|training)\.[\w.]+)`", METHOD.read_text())))


def resolve(name: str) -> object:
    """The module, class or function with this name below ddqcli."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(f"ddqcli.{'.'.join(parts[:count])}")
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[count:], module)
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_method_md_exists(name):
    assert resolve(name) is not None


def test_method_md_maps_every_equation_and_algorithm_1():
    table = METHOD.read_text().split("## Equation to code")[1].split("##")[0]
    for topic in [*(f"Eqn ({number})" for number in range(1, 10)), "Algorithm 1"]:
        assert re.search(rf"^\| {re.escape(topic)} .*`", table, re.MULTILINE), topic


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_hold(module):
    assert doctest.testmod(importlib.import_module(f"ddqcli.quant.{module}")).failed == 0


@pytest.mark.parametrize("module", ["fake_quantize", "levels"])
def test_the_central_functions_have_examples(module):
    assert doctest.testmod(importlib.import_module(f"ddqcli.quant.{module}")).attempted > 0
