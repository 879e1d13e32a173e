"""`python -m weft.train RECIPE.yaml [key=value ...]`."""

from __future__ import annotations

import sys

from weft.errors import exit_status
from weft.train import run, run_chain
from weft.train.chain import is_chain


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m weft.train RECIPE.yaml [key=value ...]")
        return 0 if arguments else 2

    def start() -> None:
        whole = run_chain if is_chain(arguments[0]) else run
        whole(arguments[0], arguments[1:], say=lambda line: print(line, flush=True))

    return exit_status(start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
