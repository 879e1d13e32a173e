"""A reward service as a scorer: batches over HTTP, matched by id, with bounded patience.

Whatever happens on the way, a sample gets its own value or none with a reason. Replies may come in any order and be
incomplete; what is missing is asked for again a few times. During an outage the calls wait (see `weft.vlm.retry`).
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from weft.errors import WeftError
from weft.reward.mix import Pair
from weft.reward.wire import PROTOCOL, Outbox, rows_to_scores
from weft.types import Score
from weft.vlm.retry import Breaker, Failed, Patience, insist, open_client

LARGEST_REPLY = 64 << 20


class RewardClient:
    """A scorer that asks `weft reward serve`. Thread-safe: calls from several threads share connections and breaker."""

    def __init__(
        self,
        url: str,
        scorer: str | None = None,
        *,
        token_env: str | None = None,
        chunk: int = 16,
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 2,
        delay: float = 0.5,
        cooldown: float = 5.0,
        patience: float = 120.0,
        picture: str = "png",
        multipart: bool = False,
    ):
        """`scorer`: its name on a service that has several. `token_env` names the environment variable that holds the
        bearer token. Items go in requests of `chunk`, `concurrency` of them at once; `timeout` is for one request.
        `retries` to `patience`: see `weft.vlm.retry.Patience`; all times in seconds. `picture`: "png" or "jpeg".

        Raises WeftError for an address that is not http(s) or a token that is not set; `check` asks the service.
        """
        if picture not in ("png", "jpeg"):
            raise WeftError(f"picture {picture!r} is unknown: use png or jpeg")
        if chunk < 1:
            raise WeftError(f"chunk is {chunk}; it must be at least 1")
        self.url, self.scorer, self.chunk, self.concurrency = url, scorer, chunk, concurrency
        self.picture, self.multipart, self.rounds = picture, multipart, retries
        self.breaker = Breaker(Patience(retries, delay, cooldown=cooldown, patience=patience))
        self._http = open_client(
            url, "http://localhost:12341", key_env=token_env, timeout=timeout, connections=concurrency
        )
        self._count = itertools.count()
        self._lock = threading.Lock()

    def check(self) -> dict[str, Any]:
        """What the service says of itself. Raises WeftError if it is not there, refuses us, or lacks the scorer."""
        try:
            about = insist(lambda: self._http.get("scorers"), _json, self.breaker)
            known = about["scorers"]
        except Failed as failure:
            raise WeftError(f"{self.url}: {failure}: start it with weft reward serve, or mend the address") from failure
        except (KeyError, TypeError) as error:
            raise WeftError(f"{self.url} is no weft reward service") from error
        if self.scorer is not None and self.scorer not in known:
            raise WeftError(f"{self.url} has no scorer {self.scorer!r}; it has {', '.join(known)}")
        if self.scorer is None and len(known) != 1:
            raise WeftError(f"{self.url} has several scorers ({', '.join(known)}): name one with scorer=")
        return about

    def ready(self) -> None:
        """Wait for the service to answer, `patience` seconds at most (it may still be loading its model), and `check`
        it. Training calls this before the first rollouts. Raises WeftError."""
        import httpx

        breaker = self.breaker
        end = breaker.clock() + breaker.patience.patience
        while breaker.clock() < end:
            try:
                if self._http.get("health").status_code < 500:
                    break
            except httpx.TransportError:
                pass  # not there yet
            breaker.sleep(min(breaker.patience.cooldown, 1.0))
        self.check()  # says what is wrong

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        """One score for each (record, picture), in order."""
        with self._lock:
            call = next(self._count)
        pairs = {f"{call}-{k}": pair for k, pair in enumerate(batch)}
        keys = list(pairs)
        chunks = [keys[k : k + self.chunk] for k in range(0, len(keys), self.chunk)]
        scores: dict[str, Score] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            for found in pool.map(lambda chunk: self._chunk({key: pairs[key] for key in chunk}), chunks):
                scores |= found
        return [scores[key] for key in keys]

    def _chunk(self, pairs: dict[str, Pair]) -> dict[str, Score]:
        """Scores of one request; what comes back missing is asked for again up to `retries` times."""
        scores: dict[str, Score] = {}
        left = dict(pairs)
        for turn in range(self.rounds + 1):
            try:
                found, again = self._request(left)
            except Failed as failure:
                if failure.status in (413, 422) and len(left) > 1:  # one item, or the size of all: find out which
                    half = len(left) // 2
                    for some in (list(left.items())[:half], list(left.items())[half:]):
                        scores |= self._chunk(dict(some))
                    return scores
                if failure.status in (401, 403, 404):
                    raise WeftError(
                        f"{self.url}: {failure}: mend the token, the scorer's name or the address"
                    ) from None
                return scores | {key: Score(None, reason=f"reward service: {failure}") for key in left}
            except WeftError as error:  # an item that cannot be sent
                if len(left) == 1:
                    return scores | {key: Score(None, reason=str(error)) for key in left}
                for item in left.items():
                    scores |= self._chunk(dict([item]))
                return scores
            scores |= found
            left = {key: pair for key, pair in left.items() if key in again}
            if not left:
                break
            if turn < self.rounds:
                self.breaker.sleep(self.breaker.patience.delay)
        absent = Score(None, reason="the reward service left this item out of its replies")
        return {key: scores.get(key, absent) for key in pairs} | scores

    def _request(self, pairs: dict[str, Pair]) -> tuple[dict[str, Score], set[str]]:
        outbox = Outbox(self.picture)
        items = []
        for key, (record, picture) in pairs.items():
            if not isinstance(picture, Image.Image):
                raise WeftError(f"the output is a {type(picture).__name__}: the reward service takes pictures")
            try:
                items.append(outbox.item(key, record, picture))
            except OSError as error:
                raise WeftError(f"record {record.id}: a picture cannot be read ({error})") from error
        body: dict[str, Any] = {"protocol": PROTOCOL, "items": items}
        if self.scorer is not None:
            body["scorer"] = self.scorer
        if not self.multipart:
            body["media"] = {name: base64.b64encode(data).decode() for name, data in outbox.media.items()}
        try:
            text = json.dumps(body, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise WeftError(f"a record's meta is not JSON ({error}): write plain values") from error

        def send() -> Any:
            if self.multipart:
                files = {name: (name, data, "application/octet-stream") for name, data in outbox.media.items()}
                return self._http.post("score", data={"request": text}, files=files)
            return self._http.post("score", content=text, headers={"Content-Type": "application/json"})

        return insist(send, lambda response: rows_to_scores(_json(response), list(pairs)), self.breaker)


def _json(response: Any) -> Any:
    """The decoded body; NaN and infinities, which are no JSON, are kept apart as such. ValueError if it is none."""
    if len(response.content) > LARGEST_REPLY:
        raise ValueError(f"{len(response.content)} bytes")
    try:
        return json.loads(response.content, parse_constant=lambda name: math.nan)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
