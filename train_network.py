#!/usr/bin/env python3
"""Train a LoRA for Stable Diffusion. `python train_network.py --help` lists every option."""

from __future__ import annotations

import sys

from library import cpus, gpu, log, processes
from library.config import parser
from library.errors import CommonError, UserError


def main(
    argv: list[str] | None = None,
    *,
    families: tuple[str, ...] = (),
    before: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
) -> int:
    """Read the options, build the run, train. Returns the exit code: 2 for mistakes that the user can correct.

    families: the only ones to train, as in `library.models.FAMILIES`; without any all are. before: words that a
    command adds in front of the user's. required: options without which it has nothing to train.
    """
    with log.lasting_streams():
        return _main([*before, *(sys.argv[1:] if argv is None else argv)], families, required)


def _main(argv: list[str], families: tuple[str, ...], required: tuple[str, ...]) -> int:
    log.set_up()
    cpus.spin_briefly()  # before torch is imported
    try:
        options = parser.parse(argv, required=required)
        log.configure(level=options.logging.console_log_level, file=options.logging.console_log_file)
        from library.job import run  # the rest of the program loads only if the options are good

        return run(options, families=families)
    except CommonError as error:
        if processes.is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        processes.let_the_first_speak()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if reason := gpu.explained(error):
            processes.let_the_first_speak()
            print(f"error: {reason}", file=sys.stderr)
            return 2
        if not processes.is_of_a_lost_one(error):
            raise
        processes.let_the_first_speak()
        print(f"error: {processes.LOST}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training, or for the second time: there is nothing to save
        if processes.is_first():
            print("stopped", file=sys.stderr)
        return 130
    finally:
        log.give_up_waiting()


if __name__ == "__main__":
    sys.exit(main())
