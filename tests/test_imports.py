"""Imports: one way downward, no cycles, no needless torch, no network; and the start-up time."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_project import exit_code, in_child

import ddqcli

PACKAGE = Path(ddqcli.__file__).parent

# From the bottom up. A module imports from its own layer and from those below.
LAYERS = (
    {"errors", "formatting", "hashing", "json_text"},
    {"artifact", "recipe"},
    {"quant"},
    {"qat"},
    {"data", "checkpoint", "runs"},
    {"training"},
    {"onnx", "pt2e", "coreml", "c_header", "plots"},
    {"inspection"},
    {"library", "__init__"},
    {"commands"},
    {"render"},
    {"cli"},
    {"__main__"},
)
# These start without torch; a function may import it.
TORCH_FREE = {
    "errors",
    "formatting",
    "hashing",
    "json_text",
    "artifact",
    "recipe",
    "plots",
    "inspection",
    "render",
    "cli",
}
NETWORK_MODULES = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "requests",
    "httpx",
    "ftplib",
    "smtplib",
    "aiohttp",
    "urllib3",
}

# Dotted name below ddqcli -> parsed source.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}


# ---- what the source says


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(
    module: str, *, type_checking: bool, functions: bool
) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements, optionally those for type checkers and those in functions."""
    stack: list[ast.AST] = [MODULES[module]]
    while stack:
        node = stack.pop()
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (is_function and not functions) or (is_type_checking(node) and not type_checking):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        stack.extend(ast.iter_child_nodes(node))


def imported_names(module: str, *, type_checking: bool = True, functions: bool = True) -> set[str]:
    """Return `package.module.name` for each name imported from a module, else `package.module`."""
    names: set[str] = set()
    for node in import_nodes(module, type_checking=type_checking, functions=functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{module}: use absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module: str) -> set[str]:
    """Return the modules of ddqcli that a module imports when it runs, in functions too.

    `from ddqcli import plots` imports `plots.__init__`; any name of `ddqcli` itself but its version
    stands for `__init__`, the library.
    """
    modules: set[str] = set()
    for name in imported_names(module, type_checking=False):
        if name.startswith("ddqcli.") and name != "ddqcli.__version__":
            inner = name.removeprefix("ddqcli.")
            parent = inner.rpartition(".")[0]
            candidates = {inner, f"{inner}.__init__", parent, f"{parent}.__init__"} & set(MODULES)
            modules |= candidates or {"__init__"}
    return modules


def layer_of(module: str) -> int:
    room = module.split(".")[0]
    (number,) = (n for n, rooms in enumerate(LAYERS) if room in rooms)
    return number


def test_imports_run_one_way_downward() -> None:
    for module in MODULES:
        above = [name for name in imported_modules(module) if layer_of(name) > layer_of(module)]
        assert not above, f"{module} imports {above}, which stand above it"


def test_imports_have_no_cycle() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for imported in sorted(imported_modules(module)):
                visit(imported, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_private_names_stay_in_their_module() -> None:
    for module in MODULES:
        private = [
            name
            for name in imported_names(module)
            if re.search(r"\._(?!_)", name) and name.startswith("ddqcli.")
        ]
        assert not private, f"{module} imports {private}"


@pytest.mark.parametrize("room", ["quant", "artifact"])
def test_the_method_and_the_file_format_stand_alone(room: str) -> None:
    for module in MODULES:
        if module.split(".")[0] == room:
            rooms = {name.split(".")[0] for name in imported_modules(module)}
            assert rooms <= {room, "errors"}, module


def test_only_render_plots_and_cli_import_their_libraries() -> None:
    for module in MODULES:
        libraries = {name.split(".")[0] for name in imported_names(module)}
        assert "rich" not in libraries or module.startswith("render."), module
        assert "typer" not in libraries or module.startswith("cli."), module
        assert "matplotlib" not in libraries or module.startswith(("plots.", "inspection.")), module


def test_torch_free_modules_do_not_import_torch_at_the_top() -> None:
    for module in MODULES:
        if module.split(".")[0] in TORCH_FREE:
            names = imported_names(module, type_checking=False, functions=False)
            assert not {name.split(".")[0] for name in names} & {"torch", "torchvision"}, module


def test_nothing_imports_a_network_module() -> None:
    for module in MODULES:
        assert not NETWORK_MODULES & {name.split(".")[0] for name in imported_names(module)}, module


# ---- what a process imports, and how long it takes

LIST_MODULES = """
import shlex, sys
from ddqcli.cli.app import app
for line in sys.argv[1:]:
    try:
        app(shlex.split(line))
    except SystemExit as stop:
        assert (stop.code or 0) == CODE, line
print("\\n", *sys.modules, file=sys.stderr)
"""


def libraries_after(*commands: str, code: int = 0) -> set[str]:
    """Return the top-level modules that a process has imported after these `ddq` commands.

    Each must exit with `code`.
    """
    script = LIST_MODULES.replace("CODE", str(code))
    process = subprocess.run(
        [sys.executable, "-c", script, *commands], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return {name.split(".")[0] for name in process.stderr.splitlines()[-1].split()}


def test_help_imports_no_heavy_library() -> None:
    heavy = {"torch", "torchvision", "numpy", "rich", "yaml"}
    assert not {*heavy, "pydantic", "pydantic_core"} & libraries_after("--help")
    # Typer imports pydantic, if it is installed, to convert the types of options.
    commands = ("finetune", "report", "export", "inspect")
    assert not heavy & libraries_after(*(f"{command} --help" for command in commands))


def test_report_never_imports_torch(finished: Path, exported_file: Path) -> None:
    commands = [
        shlex.join(["report", target, *options])
        for target in ("runs/done", str(exported_file))
        for options in ([], ["--json"], ["--csv"], ["--md"], ["--max-size", "100%"])
    ]
    assert not {"torch", "torchvision", "matplotlib", "scipy"} & libraries_after(*commands)


def test_wrong_options_are_refused_before_torch_is_imported(finished: Path) -> None:
    Path("bare.yaml").write_text("budget: {target_bits: 4}\n")
    commands = (
        "finetune model.pt --target-bits 4 --target-size 2kB",
        "finetune model.pt --recipe bare.yaml",
        "finetune gone.pt",
        "export -o model.pt",
        "export -o net.onnx",
        "export --half --format onnx",
    )
    assert not {"torch", "torchvision"} & libraries_after(*commands, code=2)


# ---- the network


def forbid_network() -> None:
    """End this process with 77 or 78 when it opens a socket."""

    def refuse(event: str, _: object) -> None:
        if event.startswith("socket.") and event != "socket.__new__":
            os._exit(77)

    sys.addaudithook(refuse)
    import socket

    def refuse_socket(*_: object, **__: object) -> None:
        os._exit(78)

    socket.socket.__init__ = refuse_socket  # type: ignore[assignment]


def test_no_command_opens_a_socket(project: Path) -> None:
    commands = (
        "finetune model.pt --run-dir runs/a",
        "report",
        "export",
        "report runs/a/model.safetensors --json",
    )
    assert exit_code(in_child(*commands, before=forbid_network)) == 0


def test_an_opened_socket_would_be_noticed(project: Path) -> None:
    def open_socket() -> None:
        forbid_network()
        import socket

        socket.create_connection(("127.0.0.1", 9))

    assert exit_code(in_child(before=open_socket)) in (77, 78)


def test_architectures_and_data_sets_are_never_downloaded(project: Path) -> None:
    child = in_child(
        "finetune model.pt --arch resnet18", "finetune --data CIFAR10:here", before=forbid_network
    )
    assert exit_code(child) == 2
    assert (
        "fetch it with torchvision.datasets.CIFAR10('here', train=True, download=True)"
        in Path("child.txt").read_text()
    )
