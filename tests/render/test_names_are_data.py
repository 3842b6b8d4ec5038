"""Names of layers and files come from anyone; no kind of output takes them for commands."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from made_run import export_made, make_run
from tiny_project import ddq

from ddqcli.formatting import visible
from ddqcli.render.data import csv_text, markdown

HOSTILE = [
    "[/x].weight",
    "[link=http://x]y[/link]",
    "$x_{$",
    "\x1b[31mred\x1b]0;title\x07",
    "a\nbits       all values read back as trained",
    "a|b|c",
    "<script>alert(1)</script>",
    '=HYPERLINK("http://x")',
    "@SUM(A1)",
    "\x00\x9b2J",
    "`a` *b* _c_ ![d](e) \\",
    "\u202eevil\u2028x",
    "--></style>",
    ":smile: {0} %s {task.total}",
]
COMMANDS = ["report", "report --csv", "report --md", "report --json", "report --html {out}/a.html"]
COMMANDS += ["report --diff run file.safetensors", "report --diff run run --md", "inspect -o {out}"]
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its file, and a checkpoint, all with these names."""
    folder = tmp_path_factory.mktemp("hostile")
    export_made(make_run(folder / "run", names=HOSTILE), folder / "file.safetensors")
    torch.save({name: torch.randn(4, 4) for name in HOSTILE}, folder / "model.pt")
    return folder


@pytest.mark.parametrize("target", ["run", "file.safetensors", "model.pt"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_every_name(
    hostile: Path, tmp_path: Path, command: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--diff" in command and target != "run":
        pytest.skip("a diff names its own targets")
    if target == "model.pt" and not command.startswith("inspect"):
        pytest.skip("a checkpoint has no report")
    monkeypatch.chdir(hostile)
    words = command.format(out=tmp_path).split()
    answer = ddq(*words, *([] if "--diff" in command else [target]))
    assert answer.code == 0, answer.err
    assert not UNSEEN.search(answer.out + answer.err)
    assert not any(line.startswith("bits       all") for line in answer.out.splitlines())
    for path in tmp_path.rglob("*.svg"):
        ElementTree.parse(path)
    for path in tmp_path.rglob("*.html"):
        check_page(path.read_text(encoding="utf-8"))


def check_page(text: str) -> None:
    """A page runs nothing, and its cells hold all names."""
    tags, cells = set(), []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            assert not any(name.startswith("on") for name, _ in attrs)

        def handle_data(self, data: str) -> None:
            cells.append(data)

    Reader().feed(text)
    assert not tags & {"script", "img", "a", "iframe", "link"}
    assert not UNSEEN.search(text)
    shown = set(cells)
    assert all(visible(name) in shown for name in HOSTILE)


def test_csv_holds_every_name_and_no_formula(hostile: Path) -> None:
    rows = list(csv.reader(ddq("report", str(hostile / "run"), "--csv").out.splitlines()))
    names = [row[0] for row in rows[1:]]
    assert not any(name[0] in "=+-@" for name in names)
    assert {name.removeprefix("'") for name in names} >= {visible(name) for name in HOSTILE}


def test_json_holds_every_name_as_it_is(hostile: Path) -> None:
    data = json.loads(ddq("report", str(hostile / "run"), "--json").out)["data"]
    assert {row["name"] for row in data["layers"]} >= set(HOSTILE)


def test_a_markdown_table_keeps_its_columns(hostile: Path) -> None:
    lines = ddq("report", str(hostile / "run"), "--md").out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {9}
    assert len(rows) == 2 + len(HOSTILE) + 1 + 2  # what is not quantized, and the file


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.conv_1.weight", "layer1.0.conv_1.weight"),
        ("a|b", r"a\|b"),
        ("<b>", r"\<b>"),
        ("it went [wrong]", "it went [wrong]"),
        ("[a](b) [a][b]", r"[a]\(b) [a]\[b]"),
        ("_x_", r"\_x\_"),
        ("a\n# b", r"a\\n# b"),
        ("90.00% -> 91.00% (x2)", "90.00% -> 91.00% (x2)"),
    ],
)
def test_markdown_escapes_what_it_must_and_no_more(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize(("value", "cell"), [("=1", "'=1"), ("-x", "'-x"), (-1.5, "-1.5")])
def test_a_number_is_no_formula(value: object, cell: str) -> None:
    assert csv_text(["a"], [[value]]) == f"a\n{cell}"
