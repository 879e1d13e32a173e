"""Records that training cannot use (a picture that is cut off, missing, no picture): left out by name, up to a limit.

What a step leaves out depends on the step and the files alone, so a continued run makes the same steps. All processes
hear of it before the step's gradients, count the same samples, and end together if they end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from weft.data.sources import refuse_faults
from weft.errors import WeftError
from weft.media import LazyPicture
from weft.record import Record
from weft.train.fed import Fed, Row
from weft.train.parallel import Processes


def read_pictures(record: Record) -> None:
    """Decode all pictures of a record once. Raises WeftError for one that cannot be used."""
    for part in (part for turn in record.turns for part in turn.parts if part.type == "image"):
        if part.path is not None or isinstance(part.value, LazyPicture):  # others are there
            part.load(record.root)


class Unusable:
    """The unusable records that were met so far, by row; a run that is continued counts anew, because what it names may
    have been mended. `rows` and `names` are of the sources, `limit` is the share of a source's records."""

    def __init__(self, names: Sequence[str], rows: Sequence[int], limit: float, say: Callable[[str], None]) -> None:
        self.names, self.rows, self.limit, self.say = names, rows, limit, say
        self.met: dict[Row, str] = {}

    def meet(self, found: Mapping[Row, str]) -> list[str]:
        """Count and name these; returns those that are new. Raises WeftError above the limit."""
        news = {row: why for row, why in found.items() if row not in self.met}
        self.met |= news
        for (s, _), why in news.items():
            count = sum(1 for source, _ in self.met if source == s)
            self.say(f"skipped {why} ({count} of {self.rows[s]} records of {self.names[s]})")
        for s in {s for s, _ in news}:
            faults = [why for (source, _), why in self.met.items() if source == s]
            refuse_faults(faults, self.rows[s], self.limit, self.names[s])
        return list(news.values())

    def agree(self, fed: Fed, processes: Processes) -> tuple[list[str], str | None]:
        """What this step leaves out, known to all processes and taken off `fed.count`: the records that are new, and
        why the run has to end (None: it goes on), the same in all of them."""
        lost, failed = processes.sum(float(len(fed.faults)), float(fed.error is not None))
        if not lost and not failed:
            return [], None
        fed.count -= int(lost)
        lines = processes.gather([json.dumps([*row, why]) for row, why in fed.faults])
        news, why = list[str](), [] if fed.error is None else [str(fed.error)]
        try:
            news = self.meet({(s, n): reason for s, n, reason in map(json.loads, lines)})
        except WeftError as error:
            why.append(str(error))
        reasons = processes.gather(why)
        return news, "; ".join(dict.fromkeys(reasons)) if reasons else None
