"""Tools for adapter files: merge, resize, analyse, compare, average, rename and check them.

python -m networks.tools SUBCOMMAND …
python -m networks.tools SUBCOMMAND --help
"""

from __future__ import annotations

import argparse
import importlib
import sys

from networks.tools.command import execute, parser_of

COMMANDS = ("merge", "resize", "ranks", "inspect", "compare", "convert", "check", "ema")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    usual = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lora-tools", description=__doc__, formatter_class=usual, allow_abbrev=False)
    commands = parser.add_subparsers(title="sub-commands", metavar="SUBCOMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"networks.tools.{name}")
        text = (module.__doc__ or "").partition("\n")[0]
        parser_of(
            module,
            commands.add_parser(name, help=text, description=module.__doc__, formatter_class=usual, allow_abbrev=False),
        )
    return execute(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
