"""The command line of a tool, declared as `train_network.py`'s is: dataclasses whose fields are made by `option`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library import gpu, log, out_of_memory
from library.config.fields import UNSET, BadValue, Declared, by_any_name, convert, declared, is_truth, lacking, made
from library.config.parser import add_argument
from library.config.settings import COMMAND_LINE, Setting, from_words
from library.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Word:
    """A word that belongs to no option, known by its place. `many`: takes all that are left; only for the last one."""

    name: str
    help: str
    many: bool = False
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Command:
    """A tool's command line. `groups`: the dataclasses of its options, by the names under which `read` returns them.
    `words`: what may stand without an option's name, in this order."""

    name: str
    description: str
    groups: Mapping[str, type]
    words: tuple[Word, ...] = ()

    def options(self) -> dict[str, Declared]:
        """All its options, by name."""
        return {name: item for group in self.groups.values() for name, item in declared(group).items()}


@dataclass(frozen=True)
class Read:
    """`groups`: an object of each dataclass. `words`: those without an option's name. `given`: by option, the place
    where the user gave it."""

    groups: Mapping[str, Any]
    words: tuple[str, ...]
    given: Mapping[str, str]


def read(command: Command, argv: Sequence[str]) -> Read:
    """The options on a command line. An option that takes a list may be given several times.

    Words without an option's name may also stand behind an option that does not take them: a flag, or one of one value.
    `--help` is printed, and raises SystemExit(0). Raises UserError, which names every mistake, one a line.
    """
    options, words = command.options(), list[str]()
    names = by_any_name(options)
    argv = [f"-{word}" if word[:1] == "-" and word[1:] in names else word for word in argv]  # -s is --s
    settings = from_words(argv, options, leading=words)
    if any(setting.name == "help" for setting in settings):
        _help(command).print_help()
        raise SystemExit(0)
    problems, values, given = [], dict[str, object](), dict[str, str]()
    for setting in (_without_no(one, options) for one in settings):
        name = names.get(setting.name)
        if name is None:
            problems.append(f"{setting.place}: unknown option{did_you_mean(setting.name, names)}")
            continue
        item = options[name]
        taken = _taken(item, setting.words) if command.words else len(setting.words)
        words += setting.words[taken:]
        try:
            value = convert(item, setting.words[:taken])
        except BadValue as error:
            hint = f"; {command.words[0].name} stands before the options" if command.words and item.many else ""
            problems.append(f"{setting.place}: {error}{hint}")
            continue
        if value is not UNSET:
            before = values.get(name)
            joined = isinstance(before, tuple) and isinstance(value, tuple) and item.many
            values[name] = (*before, *value) if joined else value  # type: ignore[misc]
            given[name] = setting.place
    problems += _wrong_words(command, words)
    problems = problems or list(lacking(options, values).values())
    if problems:
        raise UserError("\n".join(problems))
    return Read({name: made(group, values) for name, group in command.groups.items()}, tuple(words), given)


def _without_no(setting: Setting, options: Mapping[str, Declared]) -> Setting:
    """`--no-flag` is `--flag=false`."""
    name = setting.name.removeprefix("no-")
    if setting.name in options or name not in options or options[name].kind is not bool:
        return setting
    return Setting(name, ("false", *setting.words), setting.place)


def _taken(item: Declared, words: tuple[str, ...]) -> int:
    """How many of the words behind an option are its own."""
    if item.many or item.details.joined_by is not None:
        return len(words)
    if item.kind is bool:
        return int(bool(words) and is_truth(words[0]))
    return min(1, len(words))


def _wrong_words(command: Command, words: Sequence[str]) -> list[str]:
    """A problem for each word too many or too few."""
    needed = [word for word in command.words if word.required]
    if len(words) < len(needed):
        return [f"{word.name} is required, before the options: {word.help}" for word in needed[len(words) :]]
    if "" in words:
        return [f"{COMMAND_LINE}: an empty word ('') is no {command.words[0].name if command.words else 'option'}"]
    most = len(words) if command.words and command.words[-1].many else len(command.words)
    return [f"{COMMAND_LINE}: unexpected word '{word}': options begin with --" for word in words[most:]]


def _help(command: Command) -> argparse.ArgumentParser:
    words = "".join(f" {word.name}" + " [...]" * word.many for word in command.words)
    parser = argparse.ArgumentParser(
        prog=command.name,
        usage=f"%(prog)s{words} [--option value ...]",
        description=command.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for word in command.words:
        parser.add_argument(word.name, nargs="*" if word.many else None, help=word.help.replace("%", "%%"))
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
