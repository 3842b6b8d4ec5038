"""Damage at random: to bytes, to lines of text, and to trees of values as JSON and YAML hold."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

SPECIAL = [0, 1, *(sign * 2**n + by for n in (7, 8, 15, 16, 31, 32, 53, 63, 64) for sign in (1, -1)
                   for by in (-1, 0, 1)), 10**30]  # fmt: skip
INJECTED = '<i id="ran">'  # must not stand in a page
NAMES = ["", "0", "name", "\x1b[2J", "[/x]", "$x_{$", "=HYPERLINK(1)", "a\nb", "a|b", "\u202egnp",
         "\udc80", "\0", "e\u0301", "..", "../../x", "/dev/null", "x" * 255, INJECTED, "__class__",
         "weight", "é" * 200, "\ufeff", "%s{0}", "`x`", "con"]  # fmt: skip
_TOKENS = [b"\xff", b"\n", b"-1", b"{", b"[[", b"1e999", b"\0", b"NaN", b"\\u0000", b"\xef\xbb\xbf",
           b"\r\n", b"&a", b"*a", b"!!python/name:os.system", b"<<: ", b"9" * 5000]  # fmt: skip
_NUMBER = re.compile(rb"-?(?:0x[0-9a-f.]+p[+-]\d+|\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return the content with bits flipped, cut, overwritten, repeated, moved or set to limits."""
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 5, 20))):
        if not raw:
            break
        place = draw.randrange(len(raw))
        length = int(draw.expovariate(draw.choice((0.5, 0.1, 10 / len(raw))))) + 1
        block = bytes(raw[place : place + length])
        way = draw.randrange(11)
        if way == 0:
            raw[place] ^= 1 << draw.randrange(8)
        elif way == 1:
            del raw[place:]
        elif way == 2:
            del raw[place : place + length]
        elif way == 3:
            raw[place : place + length] = draw.randbytes(len(block))
        elif way == 4:
            raw[place : place + length] = bytes([draw.choice((0, 0, 255, 32))]) * len(block)
        elif way == 5:
            raw[place:place] = block * draw.choice((1, 10))
        elif way == 6:
            raw[place : place + draw.randrange(2)] = draw.choice(_TOKENS)
        elif way == 7:
            del raw[place : place + length]
            other = draw.randrange(len(raw) + 1)
            raw[other:other] = block
        elif way == 8:
            raw[place : place + length] = block[::-1]
        elif way == 9:
            raw += draw.choice((block, bytes(raw), draw.randbytes(9), bytes(512)))
        else:
            raw[place : place + 8] = limit(draw, len(raw[place : place + 8]))
    return bytes(raw)


def limit(draw: random.Random, most: int = 8) -> bytes:
    """Return a number of up to so many bytes at or beside a limit of its type."""
    size = draw.choice([size for size in (1, 2, 4, 8) if size <= most])
    number = draw.choice(SPECIAL) % 2 ** (8 * size)
    return number.to_bytes(size, draw.choice(("little", "big")))


def rewritten(text: bytes, draw: random.Random) -> bytes:
    """Return text with a number or line changed, removed, repeated or moved, or new line ends."""
    lines = text.split(b"\n")
    place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    way = draw.randrange(9)
    numbers = list(_NUMBER.finditer(text))
    if way < 4 and numbers:
        found = draw.choice(numbers)
        by = [b"-" + found[0], found[0] + b"0", b"1" + found[0], found[0] + b".5", b"true", b'"1"']
        new = draw.choice([*by, str(draw.choice(SPECIAL)).encode(), *_TOKENS])
        return text[: found.start()] + new + text[found.end() :]
    if way == 4:
        del lines[place]
    elif way == 5:
        lines.insert(other, lines[place])
    elif way == 6:
        lines[place], lines[other] = lines[other], lines[place]
    elif way == 7:
        lines[place] = draw.choice((b" ", b"\t", b"- ", b"#", b"---\n", b"? ")) + lines[place]
    else:
        word = draw.choice(re.findall(rb"\w+", text) or [b""])
        return text.replace(word, draw.choice([*_TOKENS, word.upper(), word[::-1]]), 1)
    return b"\n".join(lines)


def changed(tree: Any, draw: random.Random) -> None:
    """Replace, remove, add, rename, copy or swap values at random places of a tree, in place."""
    for _ in range(draw.choice((1, 1, 1, 1, 2, 5))):
        _change_once(tree, draw)


def _change_once(tree: Any, draw: random.Random) -> None:
    root = tree
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw.choice(keys)
        if not (isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.7):
            break
        tree = tree[key]
    way = draw.randrange(10)
    if way == 0:
        del tree[key]
    elif way == 1 and isinstance(tree, dict):
        tree[draw.choice(NAMES)] = odd_value(tree[key], draw)
    elif way == 2 and isinstance(tree, dict):
        tree[draw.choice([*NAMES, *keys])] = tree.pop(key)
    elif way == 3:
        other = draw.choice(keys)
        tree[key], tree[other] = tree[other], tree[key]
    elif way == 4:
        tree[key] = copy.deepcopy(draw.choice(_values(root)))
    else:
        tree[key] = odd_value(tree[key], draw)


def _values(tree: Any) -> list[Any]:
    below = list(tree.values() if isinstance(tree, dict) else tree)
    return below + [v for b in below if isinstance(b, dict | list) and b for v in _values(b)]


def odd_value(old: Any, draw: random.Random) -> Any:
    """Return a value of another type, sign, size or spelling."""
    near: list[Any] = [[old], {"x": old}, str(old)]
    if isinstance(old, int | float):
        near += [-old, old + 1, old - 1, old * 2, old / 2, bool(old), old * 10**9, float(old)] * 2
    elif isinstance(old, str):
        near += [f"{old} ", old.upper(), old[::-1], old * 100, f"../{old}", f"{old}\0", old[1:]]
        near += [draw.choice(NAMES), f"{old}{draw.choice(NAMES)}"] * 3
    elif isinstance(old, list):
        near += [old[::-1], old + old, old[:-1], old[1:], old * 100, [old[:1]] * 3] * 2
    elif isinstance(old, dict):
        near += [list(old), list(old.values()), dict(list(old.items())[1:])] * 2
    constants = [None, 1e308, 5e-324, float("nan"), float("inf"), -0.0, "", "x" * 10**4, [], {}]
    constants += [True, False, [[[]]], draw.choice(SPECIAL), draw.random() * 10, draw.choice(NAMES)]
    return copy.deepcopy(draw.choice(near if draw.random() < 0.5 else constants))
