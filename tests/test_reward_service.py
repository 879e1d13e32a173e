"""The reward service over real HTTP on the loopback: scores, micro-batches, limits, hostile requests; its command."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from weft.cli.main import main
from weft.errors import WeftError
from weft.record import make_record
from weft.reward import guard
from weft.reward.client import RewardClient
from weft.reward.guard import make_server
from weft.reward.service import Limits
from weft.types import Score

TOKEN = "a-token-of-24-characters"


def brightness(batch: Sequence[Any]) -> list[Score]:
    """The mean of the output, with the source's beside it: both name their picture."""
    return [
        Score(float(np.asarray(image).mean()), {"source": float(np.asarray(record.load(record.source)).mean())})
        for record, image in batch
    ]


def grey(value: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def pairs(count: int, start: int = 0) -> list[Any]:
    """Every item has its own source and output."""
    return [
        (make_record("brighter", grey((start + k) % 256)), grey((start + k + 100) % 256, 8 + k % 3))
        for k in range(count)
    ]


@contextmanager
def served(scorer: Any = brightness, **options: Any) -> Iterator[tuple[str, Any]]:
    scorers = scorer if isinstance(scorer, dict) else {"brightness": scorer}
    server, service = make_server(scorers, port=0, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(10)
        for batcher in service.batchers.values():
            batcher.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(limits=Limits(body=200_000, items=4, pictures=6, pixels=10_000, all_pixels=15_000, text=500)) as (
        at,
        _,
    ):
        yield at


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def request(**changes: Any) -> dict[str, Any]:
    row = {
        "schema": 1,
        "id": "r",
        "task": "edit",
        "turns": [
            {
                "role": "user",
                "parts": [{"type": "image", "path": "s.png", "role": "source"}, {"type": "text", "text": "brighter"}],
            }
        ],
        "meta": {},
    }
    body = {
        "items": [{"id": "a", "record": row, "output": "o.png"}],
        "media": {"s.png": png(grey(7)), "o.png": png(grey(9))},
    }
    return body | changes


@pytest.mark.parametrize("multipart", [False, True])
@pytest.mark.parametrize("picture", ["png", "jpeg"])
def test_values_come_back_to_their_items(multipart: bool, picture: str) -> None:
    with served(batch=5) as (at, service):
        client = RewardClient(at, chunk=7, multipart=multipart, picture=picture)
        batch = pairs(40)
        scores = client(batch)
        for (record, image), score in zip(batch, scores, strict=True):
            assert score.value == pytest.approx(np.asarray(image).mean(), abs=1.0 if picture == "jpeg" else 0)
            assert score.parts["source"] == pytest.approx(np.asarray(record.load(record.source)).mean(), abs=1)
        assert client.check()["scorers"]["brightness"]["scored"] == 40
        assert service.batchers["brightness"].batches < 40


def test_a_shared_source_travels_once() -> None:
    from weft.reward.wire import Outbox

    record, outbox = make_record("brighter", grey(3)), Outbox()
    for k in range(12):
        outbox.item(str(k), record, grey(100 + k))
    assert len(outbox.media) == 13


def test_files_travel_as_they_are_and_targets_do_not(tmp_path: Path) -> None:
    from weft.reward.wire import Outbox

    grey(5).save(tmp_path / "a.jpg", quality=30)
    record = make_record("x", "a.jpg", target=grey(200), root=tmp_path)
    outbox = Outbox()
    item = outbox.item("k", record, grey(9))
    assert (tmp_path / "a.jpg").read_bytes() in outbox.media.values()
    assert len(outbox.media) == 2 and len(item["record"]["turns"]) == 1


def test_requests_of_many_clients_share_batches() -> None:
    sizes: list[int] = []

    def slow(batch: Sequence[Any]) -> list[Score]:
        sizes.append(len(batch))
        time.sleep(0.05)
        return brightness(batch)

    with served(slow, batch=16, wait=0.05) as (at, _):
        client = RewardClient(at, chunk=1, concurrency=16)
        client(pairs(32))
    assert max(sizes) > 4 and sum(sizes) == 32 and max(sizes) <= 16


def test_a_scorer_that_fails_gives_missing_scores() -> None:
    def moody(batch: Sequence[Any]) -> list[Score]:
        values = [int(np.asarray(image).mean()) for _, image in batch]
        if 103 in values:
            raise RuntimeError("cannot look at 103")
        return [Score(float("nan") if v == 105 else float(v)) for v in values]

    with served(moody, batch=8, wait=0.2) as (at, _):
        scores = RewardClient(at, chunk=8)(pairs(8))
    assert [s.value for s in scores] == [100, 101, 102, None, 104, None, 106, 107]
    assert "cannot look at 103" in str(scores[3].reason) and "nan" in str(scores[5].reason)


def test_what_is_too_slow_is_missing_and_asked_again() -> None:
    calls: list[int] = []

    def sluggish(batch: Sequence[Any]) -> list[Score]:
        calls.append(len(batch))
        time.sleep(0.6 if len(calls) == 1 else 0)
        return brightness(batch)

    with served(sluggish, limits=Limits(deadline=0.2)) as (at, _):
        assert RewardClient(at, retries=3, delay=0.3)(pairs(1))[0].value == 100
        assert len(calls) > 1


def test_training_waits_for_its_service_and_refuses_to_start_without_it() -> None:
    from weft.train.geometry import RewardRecipe, ScorerRecipe
    from weft.train.online import make_mixture

    def mixture(url: str, **args: Any) -> Any:
        args |= {"url": url, "retries": 0, "patience": 0.2}
        return make_mixture(RewardRecipe([ScorerRecipe("weft.reward.client:RewardClient", args)]), None, "nft")

    with pytest.raises(WeftError, match="start it with weft reward serve"):
        mixture("http://127.0.0.1:9")
    with served() as (at, _):
        assert mixture(at).scorers[0].name == "RewardClient"
        with pytest.raises(WeftError, match="has no scorer 'darkness'"):
            mixture(at, scorer="darkness")


def test_the_queue_is_bounded() -> None:
    gate, gate_entered = threading.Event(), threading.Event()

    def stuck(batch: Sequence[Any]) -> list[Score]:
        gate_entered.set()
        gate.wait(30)
        return brightness(batch)

    with served(stuck, batch=1, limits=Limits(queue=2, deadline=30)) as (at, service):
        results: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: results.append(httpx.post(f"{at}/score", json=request(), timeout=20)))
            for _ in range(6)
        ]
        for started, thread in enumerate(threads, 1):
            thread.start()
            while len(results) + service.batchers["brightness"].waiting() + gate_entered.is_set() < started:
                time.sleep(0.01)
        refused = [r for r in results if r.status_code == 429]
        assert len(refused) == 3 and int(refused[0].headers["retry-after"]) >= 1
        gate.set()
        for thread in threads:
            thread.join()
        assert sum(r.status_code == 200 for r in results) == 6 - len(refused)


def test_health_scorers_and_several_of_them() -> None:
    with served({"one": brightness, "two": brightness}) as (at, _):
        assert httpx.get(f"{at}/health").json()["status"] == "ok"
        assert set(httpx.get(f"{at}/scorers").json()["scorers"]) == {"one", "two"}
        assert httpx.post(f"{at}/score", json=request(scorer="two")).status_code == 200
        assert httpx.post(f"{at}/score", json=request()).status_code == 404
        assert httpx.post(f"{at}/score", json=request(scorer="three")).status_code == 404
        with pytest.raises(WeftError, match="several scorers"):
            RewardClient(at).check()
        with pytest.raises(WeftError, match="no scorer 'three'"):
            RewardClient(at, "three").check()
        with pytest.raises(WeftError, match="404"):
            RewardClient(at, "three")(pairs(1))


def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TOKEN", TOKEN)
    with served(token=TOKEN) as (at, _):
        assert httpx.get(f"{at}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            reply = httpx.post(f"{at}/score", json=request(), headers=headers)
            assert reply.status_code == 401 and "www-authenticate" in reply.headers
        assert RewardClient(at, token_env="WEFT_TOKEN")(pairs(1))[0].value == 100
        with pytest.raises(WeftError, match="401"):
            RewardClient(at)(pairs(1))
    with pytest.raises(WeftError, match="reached from other machines"):
        make_server({"x": brightness}, host="0.0.0.0")
    with pytest.raises(WeftError, match="guessed"):
        make_server({"x": brightness}, host="0.0.0.0", token="short")


def test_only_loopback_names_without_a_token(url: str) -> None:
    assert httpx.post(f"{url}/score", json=request(), headers={"Host": "evil.example"}).status_code == 403
    assert httpx.post(f"{url}/score", json=request(), headers={"Host": "localhost:1"}).status_code == 200


def with_row(**changes: Any) -> dict[str, Any]:
    body = request()
    body["items"][0]["record"] |= changes
    return body


def with_path(path: str) -> dict[str, Any]:
    body = request()
    body["items"][0]["record"]["turns"][0]["parts"][0]["path"] = path
    return body


def bomb() -> str:
    """A PNG whose header promises 50,000 x 50,000 pixels."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + data).decode()


def many(count: int) -> dict[str, Any]:
    item = request()["items"][0]
    return request(items=[item | {"id": str(k)} for k in range(count)])


HOSTILE: dict[str, tuple[Any, int, str]] = {
    "not JSON": (b"{", 422, ""),
    "a list": (b"[]", 422, ""),
    "nested": (b'{"items":' + b"[" * 50_000, 422, ""),
    "nested meta": (
        json.dumps(request()).replace('"meta": {}', '"meta": {"a": ' + "[" * 5000 + "]" * 5000 + "}"),
        422,
        "",
    ),
    "not UTF-8": (b'{"items": "\xff\xfe"}', 422, ""),
    "a pickle": (b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94.", 422, ""),
    "no items": (request(items=[]), 422, "items: 0"),
    "too many items": (many(5), 422, "items: 5"),
    "equal ids": (request(items=request()["items"] * 2), 422, "same id"),
    "empty id": (request(items=[request()["items"][0] | {"id": ""}]), 422, "id: 0 characters"),
    "id of another type": (request(items=[request()["items"][0] | {"id": 7}]), 422, "items.0.id"),
    "unknown field": (request(callback="http://127.0.0.1/"), 422, "callback"),
    "other protocol": (request(protocol=9), 422, "speaks 1"),
    "unknown row field": (with_row(code="x"), 422, "code"),
    "no turns": (with_row(turns=[]), 422, "turns"),
    "assistant only": (
        with_row(turns=[{"role": "assistant", "parts": [{"type": "text", "text": "x"}]}]),
        422,
        "user turn",
    ),
    "long text": (
        with_row(turns=[{"role": "user", "parts": [{"type": "text", "text": "x" * 501}]}]),
        422,
        "501 characters",
    ),
    "movement": (with_row(turns=[{"role": "user", "parts": [{"type": "motion", "path": "s.png"}]}]), 422, "motion"),
    "absolute path": (with_path("/etc/passwd"), 422, "absolute"),
    "path upwards": (with_path("../../etc/passwd"), 422, "leaves"),
    "file URL": (with_path("file:///etc/passwd"), 422, "URL"),
    "web URL": (with_path("http://169.254.169.254/latest/meta-data"), 422, "URL"),
    "data URL": (with_path("data:image/png;base64,AAAA"), 422, "URL"),
    "a real file": (with_path("pyproject.toml"), 422, "not in the request's media"),
    "no base64": (request(media={"s.png": "?!", "o.png": "AAAA"}), 422, "not base64"),
    "no picture": (
        request(media={"s.png": base64.b64encode(b"<svg onload=x>").decode(), "o.png": png(grey(1))}),
        422,
        "SVG",
    ),
    "a bomb": (request(media={"s.png": bomb(), "o.png": png(grey(1))}), 422, "too large"),
    "large pictures": (request(media={"s.png": png(grey(1, 95)), "o.png": png(grey(2, 95))}), 422, "too large"),
    "too many pictures": (request(media={str(k): "AAAA" for k in range(7)}), 422, "7 pictures"),
    "too large": (b"x" * 300_000, 413, "200000"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_get_clean_refusals(url: str, name: str) -> None:
    body, status, why = HOSTILE[name]
    content = json.dumps(body) if isinstance(body, dict) else body
    reply = httpx.post(f"{url}/score", content=content, headers={"Content-Type": "application/json"}, timeout=20)
    assert reply.status_code == status, reply.text
    detail = reply.json()["detail"]
    assert why in detail and "\n" not in detail and "Traceback" not in detail and len(detail) < 400
    assert httpx.post(f"{url}/score", json=request()).json()["scores"][0]["value"] == 9  # and it lives on


def test_other_routes_types_and_methods(url: str) -> None:
    assert httpx.post(f"{url}/score", content=b"x", headers={"Content-Type": "application/x-pickle"}).status_code == 422
    assert httpx.post(f"{url}/score", content=b"x").status_code == 422
    assert httpx.get(f"{url}/score").status_code == 405
    for path in ("docs", "openapi.json", "../etc/passwd", "mode/logits_non_cot"):
        assert httpx.get(f"{url}/{path}").status_code == 404
    broken = httpx.post(f"{url}/score", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert broken.status_code in (400, 422)
    lacking = httpx.post(f"{url}/score", files={"s.png": b"x"})
    assert lacking.status_code == 422 and "request" in lacking.json()["detail"]


def test_a_body_without_a_length_is_cut_off(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 10_000

    try:
        reply = httpx.post(f"{url}/score", content=endless(), headers={"Content-Type": "application/json"}, timeout=20)
        assert reply.status_code == 413
    except httpx.TransportError:  # the server has closed the connection while we were still sending
        pass


def test_slow_bodies_and_slow_headers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.4)
    with served(limits=Limits(seconds=0.4)) as (at, _):
        port = int(at.rpartition(":")[2])
        head = b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        for sent, expected in ((head + b"Content-Length: 100\r\n\r\n{", b"408"), (head, b"")):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(sent)
                start = time.monotonic()
                got = connection.recv(1000)
                assert expected in got and time.monotonic() - start < 5
        assert RewardClient(at)(pairs(1))[0].value == 100


def test_the_command_refuses_what_it_cannot_serve(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> str:
        assert main(["reward", "serve", *words]) == 2
        return capsys.readouterr().err

    mine = tmp_path / "mine.py"
    mine.write_text("def fn(batch, gain=1.0):\n    return []\n")
    assert "scorer 'jury' is unknown" in said("jury")
    assert "no argument 'modle': did you mean 'model'" in said("judge", "modle=x")
    assert "missing a required argument: 'model'" in said("judge")
    assert "reached from other machines" in said(f"{mine}:fn", "--host", "0.0.0.0")
    assert "WEFT_NO_TOKEN is not set" in said(f"{mine}:fn", "--token-env", "WEFT_NO_TOKEN")
    assert "no function 'other'" in said(f"{mine}:other")
    assert "port 99999" in said(f"{mine}:fn", "--port", "99999")
    assert "batch 0" in said(f"{mine}:fn", "--batch", "0")
    assert "not valid YAML" in said(f"{mine}:fn", "gain=[")
    assert "write KEY=VALUE" in said(f"{mine}:fn", "gain")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be opened" in said(f"{mine}:fn", "gain=2", "--port", str(taken.getsockname()[1]))
    listed = tmp_path / "several.yaml"
    listed.write_text(f"a: {{call: '{mine}:fn', args: {{gain: 2}}}}\nb: {{call: '{mine}:fn', weight: 2}}\n")
    assert "b.weight is unknown" in said(str(listed))
