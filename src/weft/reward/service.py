"""The reward service: scorers behind HTTP, for models that should not share the trainer's process or machine.

Requests of many clients are scored together in micro-batches. Everything that arrives is hostile until checked: sizes
before contents, pictures by their headers before their pixels, names before use; no URL is opened and no path read.
See `weft.reward.wire` for what travels. Statuses: 401 without the token, 403 for a foreign Host, 408 too slow,
413 too large, 422 not a request (with the field), 429 busy (with Retry-After).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from weft.errors import WeftError
from weft.media import decode_image
from weft.record import record_from_dict
from weft.reward.mix import Pair, Scorer, ScorerConfig, ask_scorer
from weft.reward.wire import PROTOCOL, score_to_row
from weft.types import Score

log = logging.getLogger("weft.reward")


@dataclass(slots=True, frozen=True)
class Limits:
    """What a request may cost. `body` in bytes; `items` and `pictures` of one request; `pixels` of one picture and
    `all_pixels` of a request's pictures; `text` characters of one text part; `queue` items waiting per scorer;
    `requests` being read or waited for at once; `seconds` to send the body in; `deadline` seconds for its scores."""

    body: int = 64 << 20
    items: int = 256
    pictures: int = 1024
    pixels: int = 16_800_000
    all_pixels: int = 268_000_000
    text: int = 20_000
    queue: int = 1024
    requests: int = 32
    seconds: float = 30.0
    deadline: float = 110.0


class Refused(Exception):
    """A request that is not served: HTTP status, one line of why, seconds after which to come back."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None):
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"detail": self.detail}, self.status, headers)


class Batcher:
    """One scorer and its thread: waiting items are scored together, up to `largest`, `wait` seconds after the first."""

    def __init__(self, name: str, scorer: Scorer, largest: int = 16, wait: float = 0.01, room: int = 1024):
        self.config, self.largest, self.wait, self.room = ScorerConfig(name, scorer), largest, wait, room
        self.batches = self.scored = 0
        self._items: deque[tuple[Pair, Future[Score]]] = deque()
        self._change = threading.Condition()
        self._pace = 0.1  # seconds per item, a running mean
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"scorer-{name}", daemon=True)
        self._thread.start()

    def submit(self, pairs: Sequence[Pair]) -> list[Future[Score]]:
        """Futures of the scores. Raises `Refused` (429) if there is not room for all of them."""
        with self._change:
            if len(self._items) + len(pairs) > self.room:
                after = max(1, min(60, math.ceil(len(self._items) * self._pace)))
                raise Refused(429, f"{len(self._items)} items are waiting, {self.room} is the most", after)
            futures: list[Future[Score]] = [Future() for _ in pairs]
            self._items.extend(zip(pairs, futures, strict=True))
            self._change.notify()
        return futures

    def waiting(self) -> int:
        """Items not yet begun."""
        return len(self._items)

    def close(self) -> None:
        """Stop after the batch that is under way; what waits is missing."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while batch := self._take():
            start = time.monotonic()
            pairs = [pair for pair, _ in batch]
            scores = ask_scorer(self.config, pairs)
            if len(batch) > 1 and all(score is scores[0] for score in scores):
                # One Score for all is what `ask_scorer` gives when the call failed as a whole: a single bad item may
                # have felled it, and must not take the others with it.
                scores = [ask_scorer(self.config, [pair])[0] for pair in pairs]
            self.batches, self.scored = self.batches + 1, self.scored + len(batch)  # before anyone who waits can ask
            for (_, future), score in zip(batch, scores, strict=True):
                if score.value is None:
                    log.warning("%s: no score: %s", self.config.name, score.reason)
                future.set_result(score)
            self._pace += 0.2 * ((time.monotonic() - start) / len(batch) - self._pace)

    def _take(self) -> list[tuple[Pair, Future[Score]]]:
        """The next batch; empty when closed. Items whose request has gone are left out."""
        with self._change:
            while True:
                while not self._items and not self._closed:
                    self._change.wait()
                end = time.monotonic() + self.wait
                while len(self._items) < self.largest and not self._closed and (left := end - time.monotonic()) > 0:
                    self._change.wait(left)
                if self._closed:
                    for _, future in self._items:
                        future.cancel()
                    return []
                batch = [self._items.popleft() for _ in range(min(self.largest, len(self._items)))]
                batch = [item for item in batch if item[1].set_running_or_notify_cancel()]
                if batch:
                    return batch


class Item(BaseModel):
    """One thing to score."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    record: dict[str, Any]
    output: str


class Body(BaseModel):
    """A request; `media` holds base64 by name unless the pictures come as files."""

    model_config = ConfigDict(extra="forbid", strict=True)
    items: list[Item]
    protocol: int = PROTOCOL
    scorer: str | None = None
    media: dict[str, str] = {}


@dataclass(slots=True)
class Service:
    """The scorers and what guards them. `app` is the ASGI application."""

    batchers: dict[str, Batcher]
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    hosts: frozenset[str] | None = None
    active: int = 0

    def app(self) -> FastAPI:
        """The routes: GET /health (open), GET /scorers, POST /score."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(Refused, _refused)

        @app.get("/health")
        async def health() -> dict[str, Any]:
            return {"status": "ok", "waiting": {name: b.waiting() for name, b in self.batchers.items()}}

        @app.get("/scorers")
        async def scorers() -> dict[str, Any]:
            return {"protocol": PROTOCOL, "scorers": {name: self.about(name) for name in self.batchers}}

        @app.post("/score")
        async def score(request: Request) -> JSONResponse:
            return await self.score(request)

        from weft.reward.guard import Guard

        app.add_middleware(Guard, limits=self.limits, token=self.token, hosts=self.hosts)
        return app

    def about(self, name: str) -> dict[str, Any]:
        """What a scorer says of itself: its identity if it has one, and its counts."""
        batcher = self.batchers[name]
        identity = getattr(batcher.config.scorer, "identity", None)
        return {"identity": identity, "batches": batcher.batches, "scored": batcher.scored}

    async def score(self, request: Request) -> JSONResponse:
        """Read, check, wait for the scores."""
        if self.active >= self.limits.requests:
            raise Refused(429, f"{self.active} requests are under way, {self.limits.requests} is the most", 1)
        self.active += 1
        try:
            body, files = await self._read(request)
            batcher, pairs = await run_in_threadpool(self.parse, body, files)
            del files
            futures = batcher.submit(list(pairs.values()))
            waits = [asyncio.wrap_future(future) for future in futures]
            await asyncio.wait(waits, timeout=self.limits.deadline)
            rows = []
            for key, wait in zip(pairs, waits, strict=True):
                if wait.done() and not wait.cancelled():
                    rows.append(score_to_row(key, wait.result()))
                else:
                    wait.cancel()
                    why = Score(None, reason=f"not scored within {self.limits.deadline:g} s")
                    rows.append(score_to_row(key, why, retry=True))
            return JSONResponse({"protocol": PROTOCOL, "scores": rows})
        finally:
            self.active -= 1

    async def _read(self, request: Request) -> tuple[bytes, dict[str, bytes]]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return await request.body(), {}
        if kind != "multipart/form-data":
            raise Refused(422, f"content type {kind[:60] or 'missing'}: send application/json or multipart/form-data")
        files: dict[str, bytes] = {}
        parts = {"max_files": self.limits.pictures, "max_fields": 1, "max_part_size": self.limits.body}
        async with request.form(**parts) as form:
            text = form.get("request")
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files[name] = await value.read()
        if not isinstance(text, str):
            raise Refused(422, "request: the form has no field of this name: put the JSON there")
        return text.encode(), files

    def parse(self, body: bytes, files: Mapping[str, bytes]) -> tuple[Batcher, dict[str, Pair]]:
        """The scorer and the checked pairs by id. Raises `Refused` (413, 422)."""
        try:
            found = Body.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise Refused(422, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from error
        if found.protocol != PROTOCOL:
            raise Refused(422, f"protocol: {found.protocol}, this service speaks {PROTOCOL}")
        if not 1 <= len(found.items) <= self.limits.items:
            raise Refused(422, f"items: {len(found.items)}, send 1 to {self.limits.items}")
        if len({item.id for item in found.items}) < len(found.items):
            raise Refused(422, "items: two have the same id")
        if len(found.media) + len(files) > self.limits.pictures:
            raise Refused(422, f"media: {len(found.media) + len(files)} pictures, {self.limits.pictures} is the most")
        gallery = _Gallery(found.media, files, self.limits)
        pairs: dict[str, Pair] = {}
        for k, item in enumerate(found.items):
            try:
                pairs[item.id] = self._pair(item, gallery)
            except (WeftError, RecursionError) as error:
                raise Refused(422, f"items[{k}]: {' '.join(str(error).split())[:300]}") from error
        return self._batcher(found.scorer), pairs

    def _batcher(self, name: str | None) -> Batcher:
        if name is None and len(self.batchers) == 1:
            return next(iter(self.batchers.values()))
        if name is None or name not in self.batchers:
            raise Refused(404, f"scorer: {str(name)[:60]} is unknown, this service has {', '.join(self.batchers)}")
        return self.batchers[name]

    def _pair(self, item: Item, gallery: _Gallery) -> Pair:
        if not 0 < len(item.id) <= 200:
            raise WeftError(f"id: {len(item.id)} characters, use 1 to 200")
        record = record_from_dict(item.record)
        for turn in record.turns:
            for part in turn.parts:
                if part.type == "text":
                    if len(part.text or "") > self.limits.text:
                        raise WeftError(f"text: {len(part.text or '')} characters, {self.limits.text} is the most")
                    continue
                if part.type != "image":
                    raise WeftError(f"a {part.type}: this service takes pictures")
                part.value, part.path = gallery.get(str(part.path)), None
        record.instruction  # noqa: B018  # a record without a request is refused here, not in a scorer
        return record, gallery.get(item.output)


class _Gallery:
    """The pictures of a request by name, decoded when first shown, within the limits."""

    def __init__(self, encoded: Mapping[str, str], files: Mapping[str, bytes], limits: Limits):
        self.encoded, self.files, self.limits = encoded, files, limits
        self.left = limits.all_pixels
        self.decoded: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        if name not in self.decoded:
            label = f"picture '{name[:60]}'"
            if name in self.files:
                data = self.files[name]
            elif name in self.encoded:
                try:
                    data = base64.b64decode(self.encoded[name], validate=True)
                except (binascii.Error, ValueError) as error:
                    raise WeftError(f"{label} is not base64 ({error})") from error
            else:
                raise WeftError(f"{label} is not in the request's media")
            picture = decode_image(data, label, max_pixels=min(self.limits.pixels, self.left))
            self.left -= picture.width * picture.height
            self.decoded[name] = picture
        return self.decoded[name]


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return error.response()
