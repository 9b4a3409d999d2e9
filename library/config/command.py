"""The command line of a tool, declared as `train_network.py`'s is: dataclasses whose fields are made by `option`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library import gpu, log, out_of_memory
from library.config.fields import UNSET, BadValue, convert, declared
from library.config.parser import add_argument
from library.config.settings import from_words
from library.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Command:
    """A tool's command line. `groups`: the dataclasses of its options, by the names under which `read` returns them.
    `leading`: the metavar of the words before the first option, with its help; None: there are none."""

    name: str
    description: str
    groups: Mapping[str, type]
    leading: tuple[str, str] | None = None


@dataclass(frozen=True)
class Read:
    """`groups`: an object of each dataclass. `leading`: the words before the first option. `given`: by option, the
    place where the user gave it."""

    groups: Mapping[str, Any]
    leading: tuple[str, ...]
    given: Mapping[str, str]


def read(command: Command, argv: Sequence[str]) -> Read:
    """The options on a command line. An option that takes a list may be given several times.

    `--help` is printed, and raises SystemExit(0). Raises UserError, which names every mistake, one a line.
    """
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    leading, settings = tuple(argv[:count]), from_words(list(argv[count:]))
    if any(setting.name == "help" for setting in settings):
        _help(command).print_help()
        raise SystemExit(0)
    options = {name: item for group in command.groups.values() for name, item in declared(group).items()}
    names = {alias: name for name, item in options.items() for alias in (name, *item.details.aliases)}
    problems, values, given = [], dict[str, object](), dict[str, str]()
    if leading and command.leading is None:
        problems.append(f"command line: unexpected word '{leading[0]}': options begin with --")
    for setting in settings:
        plain, words = setting.name.removeprefix("no-"), setting.words
        name = names.get(setting.name)
        if name is None and plain in options and options[plain].kind is bool and not words:
            name, words = plain, ("false",)
        if name is None:
            problems.append(f"{setting.place}: unknown option{did_you_mean(setting.name, names)}")
            continue
        try:
            value = convert(options[name], words)
        except BadValue as error:
            problems.append(f"{setting.place}: {error}")
            continue
        if value is not UNSET:
            before = values.get(name)
            joined = isinstance(before, tuple) and isinstance(value, tuple) and options[name].many
            values[name] = (*before, *value) if joined else value  # type: ignore[misc]
            given[name] = setting.place
    problems += [
        f"--{name} is required: {item.details.help}"
        for name, item in options.items()
        if item.required and name not in values and not problems
    ]
    if problems:
        raise UserError("\n".join(problems))
    groups = {
        name: group(**{key: values[key] for key in declared(group) if key in values})
        for name, group in command.groups.items()
    }
    return Read(groups, leading, given)


def _help(command: Command) -> argparse.ArgumentParser:
    first = "" if command.leading is None else f" {command.leading[0]} [...]"
    parser = argparse.ArgumentParser(
        prog=command.name,
        usage=f"%(prog)s{first} [--option value ...]",
        description=command.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command.leading is not None:
        parser.add_argument(command.leading[0], nargs="*", help=command.leading[1].replace("%", "%%"))
    for name, group in command.groups.items():
        section = parser.add_argument_group((group.__doc__ or name).strip())
        for item in declared(group).values():
            add_argument(section, item)
    return parser


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call a tool's `main` with the command line; errors that the user can correct are printed. Returns the exit code:
    2 for those, 130 after Ctrl-C."""
    with log.lasting_streams():
        log.configure()
        try:
            with out_of_memory.during(""):
                code = main(sys.argv[1:] if argv is None else argv)
                sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of what is printed, as `head`, has seen enough
            # or Python complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (UserError, out_of_memory.OutOfMemory) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            if not (reason := gpu.explained(error)):
                raise
            print(f"error: {reason}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
