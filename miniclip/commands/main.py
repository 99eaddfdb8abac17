"""The `miniclip` command: parse the arguments, run one command, report its errors.

The exit status is 0 if all went well, 1 if a check failed, and 2 after an error. An error prints
one line on stderr.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from miniclip import __version__
from miniclip.commands import (
    bench,
    classify,
    convert,
    demo,
    embed,
    eval,
    explain,
    info,
    parity,
    search,
    serve,
    tokenize,
    train,
)
from miniclip.commands.shared import check_figure, complain, note

# Each module has DESCRIPTION, EXAMPLE, `add_arguments` and `run`. Only `run` imports torch.
COMMANDS = (
    *(classify, embed, search, explain, eval, train, parity, bench, convert, info, tokenize),
    *(demo, serve),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # some terminals cannot show "█"
    parser = build_parser()
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    log = logging.getLogger("miniclip")
    log.handlers, log.propagate = [Notes(logging.INFO)], False
    log.setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_: f"miniclip: warning: {message}\n"
    try:
        if getattr(args, "plot", None):
            check_figure(args.plot)
        status = args.run(args)
        if sys.stdout:
            sys.stdout.flush()  # a full disk raises its error here
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
        sys.stdout = None
        return 0
    except (ValueError, OSError, RuntimeError) as error:  # raised by miniclip or a library
        complain(error)
        try:
            print(end="", flush=True)
        except OSError:  # otherwise Python would flush again, and change the exit status
            sys.stdout = None
        return 2


class Notes(logging.Handler):
    """Print the package's log messages on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        note(f"miniclip: {record.getMessage()}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints an error as one line."""

    def error(self, message: str) -> Any:
        """Raise SystemExit with status 2."""
        complain(ValueError(f"{message} (see {self.prog} --help)"))
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands. It sets `args.run` to the chosen command's function."""
    parser = Parser(
        prog="miniclip",
        description="CLIP: compare images with texts.",
        epilog="To begin: miniclip demo. For an example of a command: miniclip COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parsers = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        sub = parsers.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.DESCRIPTION,
            description=command.DESCRIPTION,
            epilog=f"example, which runs offline:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=command.run)
        output = sub.add_mutually_exclusive_group()
        output.add_argument("--json", action="store_true", help="print the result as JSON")
        if command in (classify, search):
            output.add_argument("--csv", action="store_true", help="print the result as CSV")
        command.add_arguments(sub)
    return parser
