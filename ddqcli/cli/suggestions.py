"""The option that a wrong one may stand for, by the names and the help of those that exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping

from ddqcli.cli.completion import recipe_keys

_MOST = 4  # options suggested


def suggest(wrong: str, options: Mapping[str, str]) -> list[str]:
    """Return the options that `wrong` may mean, also as `--set KEY=...`.

    `options` maps each option, such as --lr, to its help. Of several ways to match, the first that
    finds anything counts.
    """
    words = _words(wrong)
    joined = "".join(words)
    names = {option: _words(option) for option in options if option.startswith("--")}

    def named(matches: Callable[[list[str]], bool]) -> list[str]:
        return [option for option, parts in names.items() if matches(parts)]

    def begins(parts: list[str]) -> bool:
        name = "".join(parts)
        return min(len(name), len(joined)) > 1 and (
            joined.startswith(name) or name.startswith(joined)
        )

    found = (
        named(lambda parts: "".join(parts) == joined)
        or (_keys(words, options) if len(words) > 1 else [])  # batch-norm is not batch-size
        or named(begins)
        or named(lambda parts: len(parts) > 1 and "".join(part[0] for part in parts) == joined)
        or named(lambda parts: any(len(word) > 2 and word in parts for word in words))
        or _keys(words, options)
        or [option for option in names if set(words) <= set(_words(options[option]))]
        or difflib.get_close_matches(wrong, names, n=1, cutoff=0.7)
    )
    return found[:_MOST]


def suggest_option(wrong: str, options: Mapping[str, str]) -> str:
    """Return `; did you mean --lr?`, or nothing."""
    *others, last = suggest(wrong, options) or [""]
    if not last:
        return ""
    return f"; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"


def _keys(words: list[str], options: Mapping[str, str]) -> list[str]:
    """Return the fields of the recipe with this name or in this section, if `--set` is there."""
    if "--set" not in options:
        return []
    name = "_".join(words)
    keys = [key for key, _ in recipe_keys("") if name in key.rstrip("=").split(".")]
    return [f"--set {key}..." for key in keys]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
