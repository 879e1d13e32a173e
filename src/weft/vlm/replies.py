"""A store of replies, so that what a model once said can be scored again without it.

One JSON line for each reply, found by a digest of the model's name, the question and how it was asked. Lines are
appended; one torn by a crash is dropped on opening. Failed replies are not stored: they are asked again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from weft.errors import WeftError
from weft.vlm.ask import VLM, Ask, Question, Reply, Token, ask_key


class ReplyStore:
    """The replies in a JSONL file. Thread-safe within one process."""

    def __init__(self, path: str | Path):
        """Open or create; raises WeftError at a line that is no reply."""
        self.path = Path(path)
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        if self.path.exists():
            self._load()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        """The stored reply, if there is one."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; one with an error is not kept."""
        if reply.error is not None:
            return
        line = json.dumps({"key": key, "text": reply.text, "tokens": [asdict(token) for token in reply.tokens]})
        with self._lock:
            if key in self._replies:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
            self._replies[key] = reply

    def _load(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the next line must not be glued to this one
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._replies[row["key"]] = Reply(row["text"], [Token(**token) for token in row["tokens"]])
            except (ValueError, KeyError, TypeError) as error:
                raise WeftError(f"{self.path}:{number}: not a stored reply; remove the line") from error


class Recorded:
    """A model with a store before it: what it has said is not asked again. With `replay` there is no model, only its
    name, and a question that the store does not know gets a reply with an error."""

    def __init__(self, vlm: VLM | None, store: ReplyStore, *, replay: str | None = None):
        if (vlm is None) == (replay is None):
            raise WeftError("give a model to record, or replay=NAME to answer from the store alone")
        self.vlm, self.store = vlm, store
        self.name = vlm.name if vlm is not None else str(replay)

    def ask(self, questions: Sequence[Question], how: Ask) -> list[Reply]:
        """One reply for each question, in order; only unknown ones reach the model."""
        keys = [ask_key(self.name, question, how) for question in questions]
        missing = [k for k, key in enumerate(keys) if self.store.get(key) is None]
        fresh: dict[int, Reply] = {}
        if missing and self.vlm is not None:
            replies = self.vlm.ask([questions[k] for k in missing], how)
            for k, reply in zip(missing, replies, strict=True):
                self.store.add(keys[k], reply)
                fresh[k] = reply
        lost = Reply("", error=f"{self.store.path}: no recorded reply of {self.name} to this question")
        return [fresh.get(k) or self.store.get(key) or lost for k, key in enumerate(keys)]
