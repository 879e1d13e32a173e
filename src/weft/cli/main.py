"""The `weft` command: find the command, let tyro fill its dataclass, run it, turn what users can cause into a line.

Exit status: 0 done; 1 done, but something is wrong (`data check`, `doctor`); 2 bad input or environment;
130 interrupted.
Set WEFT_DEBUG=1 for the traceback behind a message.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from weft import __version__
from weft.errors import WeftError, nearest

# name -> (module, dataclass with `run() -> int`, one line). The modules are imported only when their command runs.
COMMANDS = {
    "tour": ("weft.cli.checks", "Tour", "the whole system on the tiny models that ship with weft; one HTML report"),
    "generate": ("weft.cli.make", "Generate", "make a picture or movement from a sentence; {file} is a reference"),
    "edit": ("weft.cli.make", "Edit", "change a picture or movement as a sentence says"),
    "describe": ("weft.cli.describe", "Describe", "ask a model about pictures or a movement"),
    "train": ("weft.cli.training", "Train", "run a recipe (YAML); continues where it was stopped"),
    "plan": ("weft.cli.training", "Plan", "what a recipe would cost: steps, forwards, tokens, time, memory"),
    "eval world": ("weft.cli.evaluate", "EvalWorld", "success on the embedded world, measured by its oracle"),
    "eval motion-world": ("weft.cli.evaluate", "EvalMotionWorld", "the same of movements, edits and captions"),
    "eval judge": ("weft.cli.judge", "EvalJudge", "agreement of a judge with the oracle, and its attack table"),
    "data check": ("weft.cli.data", "Check", "read every record, picture and movement, and name what is wrong"),
    "data show": ("weft.cli.data", "Show", "an HTML page of records: inputs, instruction, target"),
    "data convert": ("weft.cli.data", "Convert", "any source (folder, parquet) to records; motion files to others"),
    "reward serve": ("weft.cli.reward", "Serve", "scorers behind HTTP, for trainers on this or other machines"),
    "export": ("weft.cli.export", "Export", "merged weights or a LoRA for other tools; opened again and compared"),
    "doctor": ("weft.cli.checks", "Doctor", "versions, device, speed, extras, models, disk: what works here"),
}
INTERRUPTED = 130


def usage(group: str = "") -> str:
    """The list of commands, or of those that begin with `group`."""
    names = [name for name in COMMANDS if not group or name.split()[0] == group]
    width = max(map(len, names)) + 2
    lines = [f"weft {__version__}: generate and edit pictures from interleaved instructions; train and evaluate models"]
    lines += ["", f"usage: weft {group or 'COMMAND'} ...".rstrip(), ""]
    lines += [f"  {name:{width}}{COMMANDS[name][2]}" for name in names]
    if not group:
        lines += ["", "examples:"]
        lines += ['  weft generate "a red star at the top left on a white background" -o scene.png']
        lines += ['  weft edit scene.png "make the star green" -o out.png']
        lines += ["  weft data convert walk.bvh -o walk.glb"]
    lines += ["", "weft COMMAND --help explains a command's options."]
    return "\n".join(lines)


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the arguments into the command's name (one or two words) and the rest."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, list(argv[words:])
    group = [name for name in COMMANDS if name.split()[0] == argv[0]]
    tried = " ".join(argv[:2]) if group else argv[0]
    raise WeftError(f"unknown command '{tried}': {nearest(tried, group or COMMANDS)}")


def dispatch(argv: Sequence[str]) -> int:
    """Run one command line; raises what the command raises."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"weft {__version__}")
        return 0
    if any(name.startswith(argv[0] + " ") for name in COMMANDS) and argv[1:2] in ([], ["-h"], ["--help"]):
        print(usage(argv[0]))
        return 0
    name, rest = find_command(argv)
    module, cls, _ = COMMANDS[name]

    import tyro

    command = tyro.cli(
        getattr(import_module(module), cls),
        prog=f"weft {name}",
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )
    return command.run()


def message(error: Exception) -> str | None:
    """One line for an error that the user can cause and mend; None for a bug."""
    if isinstance(error, WeftError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}: free some space and run again, nothing finished was lost"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's, on a CPU
    if full or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: lower --batch, -n or --size, or use --offload, --tiling or --dtype bf16"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit status."""
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("weft: interrupted; what was finished is on disk", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = message(error)
        if line is None or os.environ.get("WEFT_DEBUG"):
            traceback.print_exc()
        if line is None:
            print("weft: this is a bug in weft; please report it with the lines above", file=sys.stderr)
            return 1
        print(f"weft: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
