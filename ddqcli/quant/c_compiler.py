"""The system's C compilers: `$CC`, and those of PATH."""

from __future__ import annotations

import os
import shlex
import shutil


def c_compilers() -> list[list[str]]:
    """Return the commands of the C compilers that are here: `$CC`, then cc, gcc and clang.

    `$CC` may hold arguments, such as `gcc -m64` or `ccache gcc`.
    """
    try:
        chosen = shlex.split(os.environ.get("CC", ""), posix=os.name == "posix")
    except ValueError:  # a quote that does not end
        chosen = []
    return [
        [path, *arguments]
        for name, *arguments in filter(None, (chosen, ["cc"], ["gcc"], ["clang"]))
        if (path := shutil.which(name))
    ]
