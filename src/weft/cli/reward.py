"""`weft reward serve`: scorers behind HTTP."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from weft.errors import WeftError

Options = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")]


@dataclass
class Serve:
    """Serve scorers to trainers on this or other machines: POST /score, GET /scorers, GET /health.

    One scorer is named here with its options; several stand in a YAML file: {name: {call: ..., args: {...}}}."""

    scorer: Positional[str]
    """judge, critic, clip, pickscore, hpsv2, consistency, geneval, ocr, oracle (of the embedded world), your own as
    file.py:name, or a YAML file of several."""
    options: Positional[Options] = ()
    """What the scorer takes, such as model=FOLDER variant=yes_no."""
    host: str = "127.0.0.1"
    """The address to listen on; one that other machines reach needs a token."""
    port: int = 12341
    token_env: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """The environment variable that holds the bearer token (16 characters or more)."""
    batch: int = 16
    """Items that are scored at once, at most."""
    wait: float = 0.01
    """Seconds to wait for more items to score with the first."""
    max_body: int = 64
    """The largest request, in MiB."""
    queue: int = 1024
    """Items that may wait; more are told to come back later."""

    def run(self) -> int:
        token = None
        if self.token_env is not None:
            token = os.environ.get(self.token_env, "").strip()
            if not token:
                raise WeftError(f"the environment variable {self.token_env} is not set: put the token there")
        try:
            from weft.reward.guard import make_server, run_server
            from weft.reward.service import Limits
        except ImportError as error:
            raise WeftError("serving rewards needs an extra: pip install 'weft[reward]'") from error
        limits = Limits(body=self.max_body << 20, queue=self.queue)
        server, service = make_server(
            self.scorers(),
            host=self.host,
            port=self.port,
            token=token,
            limits=limits,
            batch=self.batch,
            wait=self.wait,
        )
        print(f"serving {', '.join(service.batchers)} on http://{self.host}:{self.port}", flush=True)
        run_server(server, service)
        return 0

    def scorers(self) -> dict[str, Any]:
        """The scorers by name."""
        from weft.reward.make import SCORERS, make_scorer
        from weft.settings import parse_yaml, read_yaml

        if self.scorer.endswith((".yaml", ".yml")):
            if self.options:
                raise WeftError(f"{self.options[0]}: with a YAML file, options stand in it")
            path = Path(self.scorer)
            rows = read_yaml(path)
            if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
                raise WeftError(f"{path}: write name: {{call: ..., args: {{...}}}}")
            for name, row in rows.items():
                if extra := set(row) - {"call", "args"}:
                    raise WeftError(f"{path}: {name}.{sorted(extra)[0]} is unknown: use call and args")
            return {
                str(name): make_scorer(str(row.get("call", name)), row.get("args") or {}) for name, row in rows.items()
            }
        args = {}
        for option in self.options:
            key, equals, value = option.partition("=")
            if not equals:
                raise WeftError(f"{option!r}: write KEY=VALUE")
            args[key] = parse_yaml(value, option)
        name = self.scorer if self.scorer in SCORERS else self.scorer.rpartition(":")[2]
        return {name: make_scorer(self.scorer, args)}
