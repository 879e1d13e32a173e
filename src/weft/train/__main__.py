"""`python -m weft.train RECIPE.yaml [key=value ...]`."""

from __future__ import annotations

import sys

from weft.errors import exit_status
from weft.train import run


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m weft.train RECIPE.yaml [key=value ...]")
        return 0 if arguments else 2
    return exit_status(lambda: run(arguments[0], arguments[1:], say=lambda line: print(line, flush=True)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
