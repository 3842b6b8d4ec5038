"""The folders that a crash may leave behind, from a recording of what a command does to them.

Each call for a file is a moment at which the process can be killed or the power fail. After a kill,
all is there that was written. After a power loss, a file may hold what it held when it was last
synced, and a folder may list what it listed then; both alone or together.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Tree = dict[str, bytes | None]  # the content of each file by its path; None for a folder
Folders = dict[int, dict[str, int]]  # the entries of each folder, all by inode
Contents = dict[int, bytes]
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


@dataclass
class _Disk:
    """A folder now and as it was last synced."""

    root: Path
    synced_folders: Folders = field(default_factory=dict)
    synced_contents: Contents = field(default_factory=dict)
    last_contents: Contents = field(default_factory=dict)
    open_files: dict[int, int] = field(default_factory=dict)  # so that no inode is used again

    def now(self) -> tuple[Folders, Contents]:
        folders: Folders = {}
        contents: Contents = {}
        stack = [self.root]
        while stack:
            folder = stack.pop()
            entries = {entry.name: entry for entry in os.scandir(folder)}
            folders[folder.stat().st_ino] = {name: e.inode() for name, e in entries.items()}
            for entry in entries.values():
                if entry.inode() not in self.open_files:
                    self.open_files[entry.inode()] = os.open(entry.path, os.O_RDONLY)
                if entry.is_dir():
                    stack.append(Path(entry.path))
                else:
                    contents[entry.inode()] = Path(entry.path).read_bytes()
        return folders, contents

    def crashes(self) -> list[Tree]:
        """Return the folders that a crash at this moment may leave."""
        folders, contents = self.now()
        torn = {
            inode: content[: (len(self.last_contents.get(inode, b"")) + len(content)) // 2]
            for inode, content in contents.items()
        }
        self.last_contents = contents
        # A file that is gone may still be listed on the disk.
        now, synced = self.synced_contents | contents, self.synced_contents
        return [
            *(self._tree(folders, known) for known in (contents, torn, synced)),
            *(self._tree(self.synced_folders, known) for known in (now, synced)),
        ]

    def sync(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        folders, contents = self.now()
        if inode in folders:
            self.synced_folders[inode] = folders[inode]
        elif inode in contents:
            self.synced_contents[inode] = contents[inode]

    def _tree(self, folders: Folders, contents: Contents) -> Tree:
        tree: Tree = {}
        stack = [("", self.root.stat().st_ino)]
        while stack:
            path, folder = stack.pop()
            for name, inode in folders.get(folder, {}).items():
                below = f"{path}{name}"
                if os.path.isdir(f"/proc/self/fd/{self.open_files[inode]}"):
                    tree[below] = None
                    stack.append((f"{below}/", inode))
                else:
                    tree[below] = contents.get(inode, b"")
        return tree


def recording(root: Path, out: Path) -> Callable[[], None]:
    """Return a function that records what this process does to `root`, and fills `out`.

    `root` is on the disk as it is when that begins.
    """

    def begin() -> None:
        disk, trees, busy = _Disk(root), [], False
        disk.synced_folders, disk.synced_contents = disk.now()
        disk.last_contents = disk.synced_contents
        here, fsync = f"{root.resolve()}{os.sep}", os.fsync

        def look(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal busy
            if busy or event not in _EVENTS or not isinstance(arguments[0], str | bytes | Path):
                return
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path.startswith(here) and (event != "open" or int(str(arguments[2])) & 3):
                record()

        def record() -> None:
            nonlocal busy
            busy = True
            for tree in disk.crashes():
                if tree not in trees:
                    trees.append(tree)
            busy = False
            out.write_bytes(pickle.dumps(trees))

        def recorded_fsync(descriptor: int) -> None:
            nonlocal busy
            record()
            fsync(descriptor)
            busy = True
            disk.sync(descriptor)
            busy = False

        os.fsync = recorded_fsync
        sys.addaudithook(look)

    return begin


def crashes(out: Path) -> list[Tree]:
    """Return what was recorded: different folders in their order."""
    trees: list[Tree] = pickle.loads(out.read_bytes())
    return trees


def restore(tree: Tree, folder: Path) -> None:
    """Write such a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sorted(tree.items()):
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
