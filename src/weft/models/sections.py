"""Configurations of new models: YAML mappings whose sections are checked by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.errors import WeftError
from weft.settings import read_yaml


def read_sections(
    config: str | Path | dict[str, Any], known: Sequence[str], required: Sequence[str] = ()
) -> dict[str, Any]:
    """The sections of a YAML file, or of a mapping. Raises WeftError, with the file's name, for a missing file, bad
    YAML, an unknown section or one of `required` that is not there or empty."""
    where = "the configuration"
    if not isinstance(config, dict):
        where = str(config)
        config = read_yaml(Path(config))
    if not isinstance(config, dict):
        raise WeftError(f"{where}: must be a mapping of {', '.join(known)}")
    for name in config:
        if name not in known:
            raise WeftError(f"{where}: unknown section {name!r}; known: {', '.join(known)}")
    for name in required:
        if not isinstance(config.get(name), (dict, list)):
            raise WeftError(f"{where}: section {name!r} is missing")
    return config
