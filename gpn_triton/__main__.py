"""One command for all of this package's: gpn-triton COMMAND, which is python -m gpn_triton.COMMAND.

gpn-triton train --amp
gpn-triton predict RUN FILE.h5
gpn-triton COMMAND --help
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

from gpn_triton.machine.provenance import VERSION

USAGE = "gpn-triton COMMAND ... (also python -m gpn_triton.COMMAND ...)"


def find_commands() -> dict[str, Path]:
    """The commands by name, each with its file: the modules of the package's folder, and rooms of
    it that can be run."""
    folder = Path(__file__).parent
    files = [*folder.glob("[!_]*.py"), *folder.glob("*/__main__.py")]
    return {
        path.stem if path.parent == folder else path.parent.name: path for path in sorted(files)
    }


def describe(path: Path) -> str:
    """What a command does: the first sentence of its file, which is read and not imported."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def help_text() -> str:
    """The usage, and a sentence for each command."""
    lines = [f"  {name:10}  {describe(path)}\n" for name, path in find_commands().items()]
    return (
        f"usage: {USAGE}\n\n{''.join(lines)}\n"
        "gpn-triton COMMAND --help lists a command's options, gpn-triton --version tells the "
        "version."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    commands = find_commands()
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"gpn-triton {VERSION}")
        return 0
    if name not in commands:
        what = f"got {name!r}" if name else "got none"
        print(f"error: expected one of {', '.join(commands)}, {what} (gpn-triton --help tells "
              "what they do)", file=sys.stderr)  # fmt: skip
        return 2
    path = commands[name]
    module = f"gpn_triton.{name}" if path.stem == name else f"gpn_triton.{name}.{path.stem}"
    # Ctrl-C is answered by the package until the command, once imported, answers it
    return import_module(module).main(rest)


if __name__ == "__main__":
    sys.exit(main())
