"""`ddq export --format c`: a header of what was trained; bad combinations are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_project import ddq

from ddqcli.quant.c_compiler import c_compilers

FILE = Path("runs/done/model.h")


def test_a_run_is_written_compiled_and_confirmed(finished: Path) -> None:
    answer = ddq("export", "--format", "c")
    assert (answer.code, answer.err) == (0, "")
    assert "yours      layer order and geometry" in answer.out
    raw = FILE.read_bytes()
    data = ddq("export", "--format", "c", "--json").data
    assert FILE.read_bytes() == raw
    assert data["sizes"]["file"] == len(raw)
    assert data["sizes"]["flash"] == sum(row["bytes"] for row in data["layers"])
    assert f"{data['sizes']['flash']:,} bytes of constants" in raw.decode()
    assert (data["compiler"] is None, data["unchecked"] != []) == (not c_compilers(),) * 2
    # The same tensors, of which the report counts the bytes: without constants of BatchNorm.
    totals = ddq("report", "--json").data["totals"]
    assert data["sizes"]["flash"] == totals["quantized_bytes"] + totals["kept_bytes"]
    assert ddq("export", "--check", FILE, "--json").data == data


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        (r"(uint8_t \w+\[\d+\] = \{\s*)\d+", r"\g<1>81161"),
        (r"(uint8_t \w+\[\d+\] = \{\s*)\d+", r"\g<1>x"),
        (r"(float \w+\[\d+\] = \{\s*-?)0x", r"\g<1>0z"),
        (r"const uint8_t (\w+\[)", r"const uint9_t \1"),
    ],
)
def test_a_header_of_no_numbers_is_exit_code_4(finished: Path, pattern: str, wrong: str) -> None:
    assert ddq("export", "--format", "c", "-q").code == 0
    text = FILE.read_text()
    damaged = re.sub(pattern, wrong, text, count=1)
    assert damaged != text
    FILE.write_text(damaged)
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert "model.h is damaged" in answer.err


@pytest.mark.parametrize("part", ["packed", "levels", "bits", "zero_point", "scale"])
@pytest.mark.parametrize("change", ["remove one", "remove all", "add one"])
def test_arrays_of_other_lengths_are_exit_code_4(finished: Path, part: str, change: str) -> None:
    assert ddq("export", "--format", "c", "-q").code == 0
    text = FILE.read_text()
    found = re.search(rf"_weight_{part}\[\d+\] = \{{([^}}]*)\}}", text)
    assert found
    values = [value for value in found[1].split(",") if value.strip()]
    values = {"remove one": values[1:], "remove all": [], "add one": [*values, "0"]}[change]
    FILE.write_text(text[: found.start(1)] + ",".join(values) + text[found.end(1) :])
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert answer.err.startswith(f"Error: {FILE} differs from what ")


def test_a_changed_header_is_exit_code_4(finished: Path) -> None:
    assert ddq("export", "--format", "c", "-q").code == 0
    text = FILE.read_text()
    at = text.index("_packed[")
    digit = text.index("\n", at) + 1
    FILE.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert answer.err.startswith(f"Error: {FILE} differs from what was trained in ")
    FILE.write_text(text + "\n")
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert "differs from what this version of ddq exports" in answer.err


@pytest.mark.skipif(not c_compilers(), reason="needs a C compiler")
def test_a_header_with_other_code_is_neither_compiled_nor_run(finished: Path) -> None:
    assert ddq("export", "--format", "c", "-q").code == 0
    code = f'fclose(fopen("{Path("ran").resolve()}", "w"));'
    with FILE.open("a") as header:
        header.write("#include <stdio.h>\n__attribute__((constructor))\n")
        header.write(f"static void run(void) {{ {code} }}\n")
    answer = ddq("export", "--check", FILE)
    assert answer.code == 4
    assert "differs from what this version of ddq exports" in answer.err
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "c", "--half"), "--half applies to safetensors and coreml; c keeps float32."),
        (("--format", "c", "--bench"), "--bench and --openvino run an ONNX file"),
        (
            ("-o", "net.onnx"),
            "net.onnx is named like a file of --format onnx, and",
        ),
        (
            ("--format", "c", "-o", "net.mlpackage"),
            "is named like a file of --format coreml",
        ),
        (("--check", "gone.h"), "There is no file gone.h in "),
        (("--check", "gone.h", "-o", "x"), "--check writes nothing"),
    ],
)
def test_bad_combinations_are_refused_at_once(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ddq("export", *options)
    assert answer.code == 2
    assert message in answer.err
