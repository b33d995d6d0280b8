"""The `decal` command. Importing this file costs no torch: each command imports what it needs when it runs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import decal
from decal.cli import (
    bench,
    chat,
    check,
    console,
    doctor,
    generate,
    inspect,
    merge,
    params,
    plan,
    quantize,
    quickstart,
    report,
    targets,
    train,
    verify,
)
from decal.errors import DecalError, nearest
from decal.reading import because, one_line

INTERRUPTED = 128 + signal.SIGINT
COMMANDS = {  # with what the list of commands says of each, in that order
    quickstart: "See it work: fine-tune the bundled model in minutes.",
    check: "Try a run before you start it: rows, mask, gradients.",
    plan: "What a run will take, and whether it fits.",
    train: "Fine-tune a model on your rows.",
    report: "A run as one page: curves, data, advice.",
    generate: "Answer prompts; base and adapters side by side.",
    chat: "Talk with a model and its adapter.",
    merge: "Write base + adapter as one model, and measure it.",
    quantize: "Store a model in 4 bits, and measure what it costs.",
    verify: "Whether an adapter is what was sealed, and answers as it did.",
    inspect: "What an adapter is, and what is odd about it.",
    targets: "Which layers an adapter would change.",
    params: "What an adapter of each rank costs.",
    bench: "How fast a training step is on this machine.",
    doctor: "This machine: versions, room, whether kernels are right.",
}

app = typer.Typer(
    name="decal",
    help="Fine-tune language models with LoRA, see what was learnt, and take it elsewhere.",
    epilog="Start here: decal quickstart",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        console.say(f"decal {decal.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (or DECAL_DEBUG=1).")] = False,
) -> None:
    pass  # main() takes --debug out of the words before they come here, wherever it stands


for command, summary in COMMANDS.items():
    name = command.__name__.rpartition(".")[2]
    app.command(name, short_help=summary, epilog=command.EXAMPLES)(getattr(command, name))


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and leave Python with its exit code: 2 for what the user can mend, 130 after Ctrl-C."""
    # Read by torch when it is imported: without it a card's memory breaks into pieces that a step cannot use.
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the same variable by its newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    given = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in given or os.environ.get("DECAL_DEBUG", "0") not in ("", "0")
    given = [word for word in given if word != "--debug"]
    if not debug:
        console.silence()
    sys.exit(run(given, debug=debug))


def run(words: Sequence[str], *, debug: bool) -> int:
    """Run one command and return its exit code; every error becomes a few lines on stderr."""
    try:
        code = app(list(words) or ["--help"], prog_name="decal", standalone_mode=False)
        sys.stdout.flush()  # what fails there fails here, where it can be said
        return code if isinstance(code, int) else 0
    except DecalError as error:
        if debug:
            traceback.print_exc()
        if hasattr(error, "resume"):  # Interrupted: no mistake, and its class costs torch to import
            console.note(f"stopped: {error.what}\n  {error.fix}", style=None)
            return INTERRUPTED
        console.show_error(error)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        console.note("stopped", style=None)
        return INTERRUPTED
    except BrokenPipeError:  # `decal ... | head`: the reader has gone, and that is no error
        forget_output()
        return 0
    except OSError as error:  # a path that cannot be, a file that may not be read, a full disk under the output
        if debug:
            traceback.print_exc()
        console.show_error(path_error(error))
        if error.filename is None:
            forget_output()
        return 2
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a wrong option, a missing argument
            console.show_error(usage_error(error))
            return 2
        if debug:
            traceback.print_exc()
        console.show_error(other_error(error))
        return 1


def forget_output() -> None:
    """Send what is left of the results nowhere: Python would try to write it once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage_error(error: Exception) -> DecalError:
    """Return typer's complaint in our words."""
    what = str(error.format_message()).strip().rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "decal"
    wrong = getattr(error, "option_name", None)
    if wrong and context is not None:
        options = [option for parameter in context.command.params for option in parameter.opts]
        what = f"no such option: {wrong}{nearest(wrong, options)}"
    return DecalError(what[:1].lower() + what[1:], fix=f"See: {path} --help")


def path_error(error: OSError) -> DecalError:
    """Return what the system said of a file, or of the place where the results go."""
    name = "" if error.filename is None else one_line(str(error.filename), 100)
    reason = error.strerror or because(error)
    if not name:
        return DecalError(f"the system refused: {reason}", fix="Make room, or look at where the output goes.")
    return DecalError(f"a file cannot be used: {reason}", got=name, fix="Check the path, and what you may do there.")


def other_error(error: Exception) -> DecalError:
    """Return what a person can do about an error that decal did not foresee."""
    what = because(error)
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return DecalError(
            f"the machine ran out of memory ({what})",
            fix="Lower train.micro_batch or data.max_length, or set train.gradient_checkpointing=true.",
        )
    return DecalError(what, fix="Run it again with --debug to see where it happened.")


if __name__ == "__main__":
    main()
