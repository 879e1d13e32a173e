"""A multimodal LLM behind an OpenAI-compatible server that returns log-probabilities (vLLM, SGLang and others)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.vlm.ask import Ask, Question, Reply, Token, plain
from weft.vlm.retry import Breaker, Failed, Patience, insist, open_client
from weft.vlm.structured import schema

if TYPE_CHECKING:
    import httpx
    from PIL import Image

LARGEST_REPLY = 16 << 20


class RemoteVLM:
    """`model` on the server at `url` (up to and with `/v1`). Replies without logprobs, where these are wanted, are an
    error, not a guess."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        patience: Patience | None = None,
        picture: str = "png",
        top: int = 20,
    ):
        """`key_env` names the environment variable with the API key. `picture`: "png" (lossless) or "jpeg" (quality
        95). `top`: how many candidates per token the server gives at most (vLLM: --max-logprobs, 20 by default).
        `timeout` in seconds. Raises WeftError for a URL that is not http(s), or a key that is not set."""
        if picture not in _FORMATS:
            raise WeftError(f"picture {picture!r} is unknown: use one of {', '.join(_FORMATS)}")
        self.name, self.model, self.top, self.picture = f"{model}@{url.rstrip('/')}", model, top, picture
        self.concurrency = concurrency
        self.breaker = Breaker(patience or Patience())
        self._client = open_client(
            url, "http://localhost:8000/v1", key_env=key_env, timeout=timeout, connections=concurrency
        )

    def ask(self, questions: Sequence[Question], how: Ask) -> list[Reply]:
        """One reply for each question, in order; up to `concurrency` requests under way at once."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda question: self._one(question, how), questions))

    def _one(self, question: Question, how: Ask) -> Reply:
        try:
            messages = [self._message(turn.role, turn.parts) for turn in question]
        except WeftError as error:  # a picture that cannot be read is one reply less, not all of them
            return Reply("", error=str(error))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": how.max_tokens,
            "temperature": how.temperature,
            "seed": how.seed,
        }
        wanted = how.top > 0 or bool(how.choices)
        if wanted:
            body |= {"logprobs": True, "top_logprobs": min(self.top, how.top)}
        if how.fields:
            form = {"name": "reply", "strict": True, "schema": schema(how.fields)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        read = _read if wanted else _read_text
        try:
            return insist(lambda: self._client.post("chat/completions", json=body), read, self.breaker)
        except Failed as failure:
            return Reply("", error=str(failure))

    def _message(self, role: str, parts: Sequence[Any]) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for part in parts:
            if part.type == "text":
                content.append({"type": "text", "text": plain(part.text or "")})
            elif part.type == "image":
                content.append({"type": "image_url", "image_url": {"url": data_url(part.load(), self.picture)}})
            else:
                raise WeftError(f"a {part.type} cannot be shown to a vision-language model: render it first")
        return {"role": role, "content": content}


_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"compress_level": 1}),
    "jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}


def encode_picture(picture: Image.Image, kind: str = "png") -> bytes:
    """A picture as a file in memory: "png" or "jpeg" (quality 95, full chroma)."""
    buffer = io.BytesIO()
    name, options = _FORMATS[kind]
    picture.save(buffer, format=name, **options)
    return buffer.getvalue()


def data_url(picture: Image.Image, kind: str = "png") -> str:
    """A picture as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(encode_picture(picture, kind)).decode()}"


def _read(response: httpx.Response) -> Reply:
    """The reply in a chat completion; ValueError for anything that is none."""
    if len(response.content) > LARGEST_REPLY:
        raise ValueError(f"{len(response.content)} bytes")
    try:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] or ""
        found = choice["logprobs"]["content"]
        tokens = [_token(row) for row in found]
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no chat completion with logprobs: {type(error).__name__} {error}") from error
    if not isinstance(text, str) or not tokens:
        raise ValueError("no generated token")
    return Reply(text, tokens)


def _read_text(response: httpx.Response) -> Reply:
    """The same without log-probabilities."""
    if len(response.content) > LARGEST_REPLY:
        raise ValueError(f"{len(response.content)} bytes")
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"no chat completion: {type(error).__name__} {error}") from error
    if not isinstance(text, str):
        raise ValueError("no text")
    return Reply(text)


def _token(row: dict[str, Any]) -> Token:
    top: dict[str, float] = {}
    for candidate in row.get("top_logprobs") or []:
        top.setdefault(str(candidate["token"]), _log_prob(candidate["logprob"]))
    return Token(str(row["token"]), _log_prob(row["logprob"]), top)


def _log_prob(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or value > 1e-3:
        raise ValueError(f"{value!r} is no log-probability")
    return float(value)
