"""What ddq does without: imports that run upwards, torch where it is not needed, time, and the network."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import ddq, exit_code, in_child

import ddqcli

PACKAGE = Path(ddqcli.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the bottom up. A module imports its own layer and those below.
LAYERS = (
    {"errors", "formatting"},
    {"artifact", "recipe"},
    {"quant"},
    {"qat"},
    {"data", "checkpoint", "runs"},
    {"training"},
    {"onnx", "plots"},
    {"inspection"},
    {"library", "__init__"},
    {"commands"},
    {"render"},
    {"cli"},
    {"__main__"},
)
WITHOUT_TORCH = (
    *("artifact", "render", "plots", "recipe", "errors", "formatting", "inspection", "cli"),
)
SENDERS = {
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


def imports(path: Path, *, typing: bool = True) -> set[str]:
    """Dotted names of the modules that a file imports anywhere; without those for type checkers alone if not `typing`."""
    found: set[str] = set()
    unwanted: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            unwanted |= {id(below) for below in ast.walk(node)}
        if id(node) in unwanted:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    top = module.split(".")[0]
    (number,) = (n for n, names in enumerate(LAYERS) if top in names)
    return number


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way_downward(module: str) -> None:
    for name in imports(MODULES[module], typing=False):
        if name == "ddqcli.__version__" or not name.startswith("ddqcli."):
            continue
        imported = name.removeprefix("ddqcli.")
        assert layer(imported) <= layer(module), (
            f"ddqcli.{module} imports {name}, which stands above it"
        )


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, functions included."""
    inner = {name.removeprefix("ddqcli.") for name in imports(path, typing=False)}
    outer = {name.rpartition(".")[0] for name in inner}
    return {f"{name}{end}" for name in inner | outer for end in ("", ".__init__")} & set(MODULES)


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imported_modules(path) for module, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in finished:
            for name in sorted(graph[module]):
                visit(name, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_private_names_are_not_imported_across_modules() -> None:
    for module, path in MODULES.items():
        private = [name for name in imports(path) if re.match(r"ddqcli\..*\._[a-z]", name, re.I)]
        assert not private, f"{module} imports {private}"


@pytest.mark.parametrize(
    ("folder", "known"), [("quant", {"quant", "errors"}), ("artifact", {"artifact", "errors"})]
)
def test_quantizers_and_the_file_format_stand_alone(folder: str, known: set[str]) -> None:
    seen = {
        name
        for module, path in MODULES.items()
        if module.split(".")[0] == folder
        for name in imports(path)
    }
    assert {name.split(".")[1] for name in seen if name.startswith("ddqcli.")} <= known


def test_only_render_and_the_command_line_know_the_terminal() -> None:
    for module, path in MODULES.items():
        tops = {name.split(".")[0] for name in imports(path)}
        assert "rich" not in tops or module.startswith("render."), module
        assert "typer" not in tops or module.startswith("cli."), module
        assert "matplotlib" not in tops or module.startswith(("plots.", "inspection.")), module


def test_nothing_imports_a_way_to_the_network() -> None:
    for module, path in MODULES.items():
        assert not SENDERS & {name.split(".")[0] for name in imports(path)}, module


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in WITHOUT_TORCH])
def test_what_needs_no_torch_does_not_import_it_at_the_top(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in ("torch", "torchvision")}


# ---- what a process really imports, and how long it takes


def imported_by(*args: str) -> set[str]:
    """Top-level modules that `ddq ARGS` had imported at its end."""
    program = (
        "import sys, atexit; atexit.register(lambda: sys.stderr.write('\\n' + ' '.join(sys.modules)));"
        "from ddqcli.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stderr.splitlines()[-1].split()}


def test_help_imports_neither_torch_nor_numpy_nor_rich() -> None:
    assert not {"torch", "torchvision", "numpy", "rich", "pydantic_core", "yaml"} & imported_by(
        "--help"
    )
    assert not {"torch", "torchvision", "numpy", "rich"} & imported_by("finetune", "--help")


@pytest.mark.parametrize("target", ["runs/done", "small.safetensors"])
def test_report_never_imports_torch(finished: Path, target: str) -> None:
    assert ddq("export", "-o", "small.safetensors").code == 0
    for format_ in ([], ["--json"], ["--csv"], ["--md"], ["--max-size", "100%"]):
        assert not {"torch", "torchvision", "matplotlib", "scipy"} & imported_by(
            "report", target, *format_
        )


def seconds(*command: str) -> float:
    """Processor time of a Python process, which other processes prolong less than they do the clock's; the best of three."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_help_takes_at_most_twice_as_long_as_importing_typer() -> None:
    assert seconds("-m", "ddqcli", "--help") < 2 * seconds("-c", "import typer")


def test_a_report_on_a_file_takes_less_than_half_a_second(finished: Path) -> None:
    assert ddq("export", "-o", "small.safetensors").code == 0
    slow_machine = 4 * seconds("-c", "import numpy, typer")
    assert seconds("-m", "ddqcli", "report", "small.safetensors") < max(0.5, slow_machine)


# ---- the network


def without_network() -> None:
    """Let whatever would open a socket end the process."""

    def refuse(event: str, _: object) -> None:
        if event.startswith("socket.") and event != "socket.__new__":
            os._exit(77)

    sys.addaudithook(refuse)
    import socket

    def refuse_socket(*_: object, **__: object) -> None:
        os._exit(78)

    socket.socket.__init__ = refuse_socket


def test_no_command_ever_opens_a_socket(project: Path) -> None:
    commands = (
        "finetune model.pt --run-dir runs/a",
        "report",
        "export",
        "report runs/a/model.safetensors --json",
    )
    assert exit_code(in_child(*commands, before=without_network)) == 0


def test_the_watch_for_sockets_would_see_one(project: Path) -> None:
    def open_one() -> None:
        without_network()
        import socket

        socket.create_connection(("127.0.0.1", 9))

    assert exit_code(in_child(before=open_one)) in (77, 78)


def test_an_architecture_by_name_and_a_data_set_by_name_are_never_downloaded(project: Path) -> None:
    child = in_child(
        "finetune model.pt --arch resnet18", "finetune --data CIFAR10:here", before=without_network
    )
    assert exit_code(child) == 2
    assert (
        "fetch it with torchvision.datasets.CIFAR10('here', train=True, download=True)"
        in Path("child.txt").read_text()
    )
