"""The cascade over HTTP: what may come in, and what goes out.

    POST /v1/classify   {"texts": [...]} or {"pairs": [[a, b], ...]}, operating_point, deadline
    GET  /v1/policies   the operating points
    GET  /healthz       the process lives        GET /readyz    it takes calls
    GET  /metrics       Prometheus

No log line and no metric holds anything that a caller wrote.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cascadebert.cascade import Cascade
from cascadebert.config import ServeConfig
from cascadebert.data import Examples
from cascadebert.policy import Policy
from cascadebert.serving.monitor import Monitor
from cascadebert.serving.scheduler import Point, Scheduler
from cascadebert.serving.station import Refusal, log_failure

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

log = logging.getLogger(__name__)

PATHS = ("/v1/classify", "/v1/policies", "/healthz", "/readyz", "/metrics")

#: What a call may hold, for /openapi.json.
BODY = {
    "type": "object",
    "properties": {
        "texts": {"type": "array", "items": {"type": "string"}},
        "pairs": {
            "type": "array",
            "items": {
                "type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2
            },
        },
        "operating_point": {"type": "string"},
        "deadline": {"type": "number", "exclusiveMinimum": 0, "description": "seconds"},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A call's body, checked."""

    examples: Examples
    point: str
    deadline: float


class Service:
    """What the routes share: the scheduler once the models are loaded, and whether it is ending.

    Args:
        config: the limits.
        key: what callers must send; empty for none.
    """

    def __init__(self, config: ServeConfig, key: str = "") -> None:
        self.config, self.monitor = config, Monitor()
        self.scheduler: Scheduler | None = None
        self.draining = False
        self.active = 0  # requests whose answers are not out yet
        self._key = key.encode()

    async def open(self, cascade: Cascade, policies: dict[str, Policy]) -> None:
        """Take calls from now on."""
        points = {name: Point.of(name, policy, self.config) for name, policy in policies.items()}
        scheduler = Scheduler(cascade, points, self.config, self.monitor)
        await scheduler.start()
        self.scheduler = scheduler

    async def close(self, hurry: asyncio.Event) -> None:
        """Take no more calls, finish those that were taken, and refuse what is left after a while.

        Args:
            hurry: ends the while.
        """
        self.draining = True
        end = time.monotonic() + self.config.drain
        while self.active and time.monotonic() < end and not hurry.is_set():
            await asyncio.sleep(0.01)
        if self.scheduler:
            left = self.scheduler.stop("the server is stopping and has no time left")
            log.info("drained; %d calls were refused", left)

    def running(self) -> Scheduler:
        """The scheduler, if calls are taken.

        Raises:
            Refusal: not yet, or no more.
        """
        if self.draining:
            raise Refusal(503, "the server is stopping")
        if self.scheduler is None:
            raise Refusal(503, "the models are not loaded yet")
        return self.scheduler

    def admit(self, request: "Request") -> None:
        """Check the key.

        Raises:
            Refusal: it is missing or wrong.
        """
        if not self._key:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if not (kind.lower() == "bearer" and same):
            reason = "send the key of this service as Authorization: Bearer KEY"
            raise Refusal(401, reason, {"WWW-Authenticate": "Bearer"})

    async def classify(self, request: "Request") -> dict[str, Any]:
        """Answer a call.

        Raises:
            Refusal: why it is not answered.
        """
        begin = asyncio.get_running_loop().time()
        self.admit(request)
        try:
            async with asyncio.timeout(self.config.deadline):
                body = await read_body(request, self.config.max_body)
        except TimeoutError:
            raise Refusal(408, "the body did not arrive in time") from None
        scheduler = self.running()
        question = parse(body, self.config, list(scheduler.points), scheduler.cascade.pairs)
        call = scheduler.submit(question.examples, question.point)
        watcher = asyncio.create_task(_refuse_when_gone(request, call.refuse))
        try:
            async with asyncio.timeout_at(begin + question.deadline):
                answers = await call.future
        except TimeoutError:
            raise Refusal(503, f"not answered within {question.deadline:g} seconds") from None
        finally:
            watcher.cancel()
        return {
            "operating_point": question.point,
            "answers": [asdict(answer) for answer in answers],
        }

    def describe(self) -> dict[str, Any]:
        """The operating points, the default first."""
        points = self.running().points
        rows = [
            {
                "name": name,
                "score": point.policy.score,
                "thresholds": point.policy.thresholds,
                "probabilities": point.policy.probabilities,
                "target": point.policy.target,
                "achieved": point.policy.achieved,
                "guarantee": point.policy.guarantee.get("text", ""),
                "sheds": point.eased is not None,
            }
            for name, point in points.items()
        ]
        return {"default": next(iter(points)), "operating_points": rows}


async def read_body(request: "Request", limit: int) -> bytes:
    """A request's body.

    Raises:
        Refusal: it is larger than the limit, by its header or as it comes, or the client has gone.
    """
    too_large = Refusal(413, f"the body is larger than {limit} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Refusal(499, "the client has gone")
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def parse(body: bytes, config: ServeConfig, points: Sequence[str], pairs: bool | None) -> Question:
    """Check a call's body.

    Args:
        body: JSON.
        config: the limits.
        points: names of the operating points, the default first.
        pairs: whether the models take pairs; None where that is unknown.

    Raises:
        Refusal: what is wrong with it.
    """

    def wrong(reason: str) -> Refusal:
        return Refusal(422, reason)

    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise wrong("the body is not JSON") from None
    if not isinstance(content, dict):
        raise wrong('the body must be an object like {"texts": ["..."]}')
    if set(content) - {"texts", "pairs", "operating_point", "deadline"}:
        raise wrong("unknown field; there are texts, pairs, operating_point and deadline")
    if ("texts" in content) == ("pairs" in content):
        raise wrong("name either texts or pairs")
    if "texts" in content and pairs is True:
        raise wrong("these models take pairs of texts; name pairs")
    if "pairs" in content and pairs is False:
        raise wrong("these models take single texts; name texts")
    rows = content.get("texts", content.get("pairs"))
    if not isinstance(rows, list) or not rows:
        raise wrong("texts or pairs must be a list that is not empty")
    if len(rows) > config.max_items:
        raise wrong(f"{len(rows)} texts; a call may have {config.max_items}")
    for number, row in enumerate(rows):
        if "texts" in content and not _is_text(row):
            raise wrong(f"texts[{number}] must be a string of valid Unicode")
        if "pairs" in content and not (
            isinstance(row, list) and len(row) == 2 and all(map(_is_text, row))
        ):
            raise wrong(f"pairs[{number}] must be two strings of valid Unicode")
    point = content.get("operating_point", points[0])
    if point not in points:
        raise wrong(f"unknown operating_point; there are {', '.join(points)}")
    deadline = content.get("deadline", config.deadline)
    if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not deadline > 0:
        raise wrong("deadline must be a number of seconds above 0")
    if "texts" in content:
        examples = Examples(rows)
    else:
        examples = Examples([first for first, _ in rows], [second for _, second in rows])
    return Question(examples, point, min(deadline, config.deadline))


def _is_text(value: Any) -> bool:
    """JSON can spell halves of characters, which no tokenizer takes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


async def _refuse_when_gone(request: "Request", refuse: Callable[[Refusal], None]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    refuse(Refusal(499, "the client has gone"))


def make_app(service: Service) -> "FastAPI":
    """The routes."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response

    app = FastAPI(title="cascadebert", docs_url=None, redoc_url=None)

    reasons = {
        404: f"there are {', '.join(PATHS)}",
        405: "this path takes another method",
        500: "the server failed; its log tells where",
    }

    async def refused(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, Refusal):
            return JSONResponse({"error": error.reason}, error.status, error.headers)
        status = getattr(error, "status_code", 500)
        return JSONResponse({"error": reasons[status]}, status)

    for kind in (Refusal, 404, 405, Exception):
        app.add_exception_handler(kind, refused)

    @app.post(PATHS[0], openapi_extra={"requestBody": {
        "content": {"application/json": {"schema": BODY}}, "required": True}})  # fmt: skip
    async def classify(request: Request) -> Response:
        return JSONResponse(await service.classify(request))

    @app.get(PATHS[1])
    async def policies(request: Request) -> Response:
        service.admit(request)
        return JSONResponse(service.describe())

    @app.get(PATHS[2])
    async def healthz() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get(PATHS[3])
    async def readyz() -> Response:
        service.running()
        return JSONResponse({"status": "ready"})

    @app.get(PATHS[4])
    async def metrics(request: Request) -> Response:
        service.admit(request)
        return Response(service.monitor.exposition(), media_type="text/plain; version=0.0.4")

    return app


class Gate:
    """Around the app: counts requests, and keeps what errors say out of the log.

    While the service drains it asks callers to close their connections.
    """

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, as ASGI has it."""
        path = scope["path"] if scope["path"] in PATHS else "other"
        begin, status = time.monotonic(), 0

        async def passed_on(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self._service.active += 1
        try:
            await self._app(scope, receive, passed_on)
        except Exception as error:  # the app has answered 500 by now
            log_failure(path, error)
        finally:
            self._service.active -= 1
            timed = path == PATHS[0] and status == 200
            took = time.monotonic() - begin if timed else None
            self._service.monitor.request(path, status, took)
