"""Folders of pictures: pairs by stem, a caption or instruction as a text file beside the target."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.errors import WeftError, nearest
from weft.record import IMAGE_SUFFIXES, Record, make_record


def folder_records(path: Path, options: dict[str, Any], task: str | None, faults: list[str]) -> Iterator[Record]:
    """Records of a folder, in the order of the stems; what cannot be used is noted in `faults`.

    Without options, the folders `target` (else the folder itself), `source`, `mask` and `reference`, `reference_1`
    ... are used where they exist. A picture's text is `<stem>.txt` beside the target, in `captions`, or in the folder
    itself. This is also the layout of ai-toolkit: `source` is its control_path, further ones are `references`.
    A stem that is in no `source` is a fault if there is a source folder; references may be ragged.
    """
    if not path.is_dir():
        raise WeftError(f"{path}: no such folder: check the path")
    target = _folder(path, options, "target") or path
    source, mask, captions = (_folder(path, options, name) for name in ("source", "mask", "captions"))
    found = sorted((p.name for p in path.glob("reference*") if p.is_dir()), key=_number)
    named = options.get("references", found)
    references = [_pictures(_existing(path, name)) for name in ([named] if isinstance(named, str) else named)]
    targets = _pictures(target)
    if not targets:
        raise WeftError(f"{target} holds no picture ({', '.join(IMAGE_SUFFIXES)}): check the path")
    sources, masks = (_pictures(folder) if folder else {} for folder in (source, mask))
    for stem, picture in targets.items():
        try:
            if source and stem not in sources:
                raise WeftError(f"source: no picture '{stem}' in {source}: {nearest(stem, sources, 'add it')}")
            record = make_record(
                _caption(stem, [target, captions or path, path / "instruction"]),
                source=sources.get(stem),
                mask=masks.get(stem),
                references=[pictures[stem] for pictures in references if stem in pictures],
                target=picture,
                task=task,
                id=stem,
            )
        except WeftError as error:
            faults.append(f"{picture}: {error}")
            continue
        yield record
    for stem in sorted(set(sources) - set(targets)):
        faults.append(f"{sources[stem]}: target: no picture '{stem}' in {target}")


def _number(name: str) -> tuple[int, str]:
    """`reference_10` after `reference_2`."""
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else -1, name


def _folder(path: Path, options: dict[str, Any], name: str) -> Path | None:
    if name in options:
        return _existing(path, options[name])
    return path / name if (path / name).is_dir() else None


def _existing(path: Path, name: Any) -> Path:
    folder = path / str(name)  # the user's own configuration: another disk is allowed
    if not folder.is_dir():
        raise WeftError(f"{folder}: no such folder: check the options of {path}")
    return folder


def _pictures(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith("."):
            if file.stem in found:
                raise WeftError(f"{file} and {found[file.stem].name} have one stem: rename or remove one")
            found[file.stem] = file
    return found


def _caption(stem: str, folders: list[Path]) -> str:
    for folder in folders:
        file = folder / f"{stem}.txt"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise WeftError(f"{file} is not a UTF-8 text ({error}): write it again") from error
    raise WeftError(f"instruction: no {stem}.txt in {' or '.join(str(f) for f in folders[:2])}: write one")
