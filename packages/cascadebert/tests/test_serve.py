"""The service: real processes on loopback, and the app in this process where a stage must be held."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial

import httpx
import pytest
import torch
from cascadebert.cascade import Cascade
from cascadebert.config import ServeConfig
from cascadebert.data import Examples, load_examples
from cascadebert.policy import Policy
from cascadebert.scores import log_odds
from cascadebert.serving.monitor import Drift
from cascadebert.serving.routes import Gate, Service, make_app
from cascadebert.serving.scheduler import Point
from octavo.runtime import Runtime
from prometheus_client.parser import text_string_to_metric_families

SECRET = "unspeakable"  # goes into texts, names and paths, and must not come out anywhere
CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def texts(words):
    """What callers send: short words, an empty text, one too long."""
    rows = load_examples(str(words / "test.jsonl")).texts
    return [*rows, "", "aeiou" * 20, SECRET]


@pytest.fixture(scope="module")
def policies(calibrated, tmp_path_factory):
    """Two operating points that a good share of the words leaves at either stage."""
    folder = tmp_path_factory.mktemp("policies")
    cascade = Cascade.from_pretrained(calibrated, runtime=CPU)
    policy = Policy.load(calibrated / "policy.json", cascade.hashes, cascade.backend)
    policy.save(folder / "fast.json")
    far = replace(policy, thresholds=[1e9], temperatures=[2.0, 2.0])
    far.save(folder / "accurate.json")
    return [folder / "fast.json", folder / "accurate.json"]


def load(calibrated, path):
    """A cascade of its own, which a test may break, and a policy."""
    cascade = Cascade.from_pretrained(calibrated, runtime=CPU)
    return cascade, Policy.load(path, cascade.hashes, cascade.backend)


class Server:
    """A served cascade in a process of its own."""

    def __init__(self, calibrated, policies, log, *more):
        named = [word for path in policies for word in ("--policy", path)]
        command = ["serve", "--model", calibrated, "--port", 0, "--device", "cpu",
                   "--log-file", log, *named, *more]  # fmt: skip
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cascadebert", *map(str, command)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 120
        while not (found := re.search(r"listening on (\S+)\n", self.logged())):
            assert self.process.poll() is None, self.logged()
            assert time.monotonic() < end
            time.sleep(0.02)
        self.url = found[1]

    def logged(self):
        return self.log.read_text() if self.log.exists() else ""

    def until_ready(self):
        end = time.monotonic() + 120
        assert httpx.get(f"{self.url}/healthz").status_code == 200
        while (answer := httpx.get(f"{self.url}/readyz")).status_code != 200:
            assert (answer.status_code, "error" in answer.json()) == (503, True)
            assert time.monotonic() < end
            time.sleep(0.05)
        return self

    def ask(self, **body):
        return httpx.post(f"{self.url}/v1/classify", json=body, timeout=60)

    def end(self, sign=signal.SIGTERM):
        self.process.send_signal(sign)
        return self.process.wait(timeout=60)


@contextmanager
def serving(*arguments):
    server = Server(*arguments)
    try:
        yield server.until_ready()
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(calibrated, policies, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with serving(calibrated, policies, log, "--max-body", 50_000, "--max-items", 320) as running:
        yield running
        assert running.end() == 0
        assert "drained; 0 calls" in running.logged()


def check(answers, offline, start=0):
    """Answers of the service are those of `Cascade.predict`."""
    for i, answer in enumerate(answers, start):
        assert answer["label"] == offline.labels[i]
        assert answer["stage"] == int(offline.stages[i]) + 1
        assert answer["confidence"] == pytest.approx(float(offline.confidence[i]), abs=1e-5)
        assert answer["truncated"] == bool(offline.truncated[i])
        assert answer["degraded"] is False


def test_500_concurrent_calls_are_answered_as_offline(server, calibrated, policies, texts):
    everything = {}
    for path in policies:
        cascade, policy = load(calibrated, path)
        everything[path.stem] = cascade.predict(Examples(texts), policy)
    assert 0 < int(everything["fast"].stages.sum()) < len(texts)
    assert everything["accurate"].stages.min() == 1
    assert everything["fast"].truncated.sum() == 1

    async def load_up():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
            calls = []
            for i in range(500):
                start, point = i % (len(texts) - 2), ("fast", "accurate")[i % 2]
                body = {"texts": texts[start : start + 1 + i % 3], "operating_point": point}
                calls.append(client.post("/v1/classify", json=body))
            return await asyncio.gather(*calls)

    responses = asyncio.run(load_up())
    assert [response.status_code for response in responses] == [200] * 500
    for i, response in enumerate(responses):
        content = response.json()
        assert content["operating_point"] == ("fast", "accurate")[i % 2]
        assert len(content["answers"]) == 1 + i % 3
        check(content["answers"], everything[content["operating_point"]], i % (len(texts) - 2))


def test_one_call_of_many_texts_takes_the_default_operating_point(server, calibrated, policies,
                                                                  texts):  # fmt: skip
    cascade, policy = load(calibrated, policies[0])
    answer = server.ask(texts=texts, deadline=30).json()
    assert answer["operating_point"] == "fast"
    check(answer["answers"], cascade.predict(Examples(texts), policy))


def test_the_operating_points_are_told(server, policies):
    told = httpx.get(f"{server.url}/v1/policies").json()
    assert told["default"] == "fast"
    fast, accurate = told["operating_points"]
    stored = json.loads(policies[0].read_text())
    assert (fast["name"], accurate["name"]) == ("fast", "accurate")
    for name in ("thresholds", "probabilities", "target", "achieved"):
        assert fast[name] == stored[name]
    assert fast["guarantee"] == ""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (SECRET, "not JSON"),
        ("[" * 10_000, "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        ([SECRET], "must be an object"),
        ({}, "either texts or pairs"),
        ({"texts": ["a"], "pairs": [["a", "b"]]}, "either texts or pairs"),
        ({"texts": []}, "not empty"),
        ({"texts": SECRET}, "not empty"),
        ({"texts": ["a", None]}, r"texts\[1\] must be a string"),
        ({"texts": ["\ud800"]}, r"texts\[0\] must be a string of valid Unicode"),
        ({"texts": ["a"] * 321}, "321 texts; a call may have 320"),
        ({"pairs": [["a", "b"]]}, "single texts"),
        ({"texts": ["a"], SECRET: 1}, "unknown field"),
        ({"texts": ["a"], "operating_point": SECRET}, "there are fast, accurate"),
        ({"texts": ["a"], "operating_point": ["fast"]}, "there are fast, accurate"),
        ({"texts": ["a"], "deadline": 0}, "deadline"),
        ({"texts": ["a"], "deadline": True}, "deadline"),
        ({"texts": ["a"], "deadline": float("nan")}, "deadline"),
        ({"texts": ["a"], "deadline": "1"}, "deadline"),
    ],
)
def test_a_wrong_body_is_refused_with_the_reason(server, body, reason):
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    response = httpx.post(f"{server.url}/v1/classify", content=content)
    assert response.status_code == 422
    assert re.search(reason, response.json()["error"])
    assert SECRET not in response.text


def test_a_large_body_is_refused_by_its_header_and_as_it_comes(server):
    body = json.dumps({"texts": ["a" * 60_000]}).encode()
    for content in (body, (body[i : i + 999] for i in range(0, len(body), 999))):
        response = httpx.post(f"{server.url}/v1/classify", content=content)
        assert response.status_code == 413
        assert "50000 bytes" in response.json()["error"]


def test_other_paths_and_methods_are_refused(server):
    assert httpx.get(f"{server.url}/{SECRET}?{SECRET}").status_code == 404
    assert httpx.get(f"{server.url}/v1/classify").status_code == 405


def metrics_of(text):
    return {
        (sample.name.removeprefix("cascadebert_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_and_log_tell_all_but_the_texts(server, texts):
    before = metrics_of(httpx.get(f"{server.url}/metrics").text)
    assert server.ask(texts=texts).status_code == 200
    assert server.ask(texts=[]).status_code == 422
    page = httpx.get(f"{server.url}/metrics").text
    after = metrics_of(page)

    def gained(*key):
        return after[key] - before.get(key, 0)

    assert gained("requests_total", "/v1/classify", "200") == 1
    assert gained("requests_total", "/v1/classify", "422") == 1
    left = [gained("items_total", "fast", stage) for stage in "12"]
    assert sum(left) == len(texts)
    assert min(left) > 0
    assert [gained("confidence_count", stage) for stage in "12"] == left
    assert gained("stage_seconds_count", "1") == len(texts)
    assert gained("stage_seconds_count", "2") == left[1]
    assert gained("request_seconds_count") == 1
    assert gained("truncated_total") == 1
    assert after["queue_depth", "2"] == 0
    assert after["shed_total",] == 0
    assert 0 < after["drift_psi", "fast"] < 0.25
    assert SECRET not in page
    assert SECRET not in server.logged()
    assert "making" not in server.logged()


def test_sigkill_leaves_the_policy_and_sigterm_loses_no_call(calibrated, policies, texts, tmp_path):
    stored = [path.read_bytes() for path in policies]
    body = {"texts": texts[:40], "operating_point": "accurate"}
    enough, outcomes = threading.Event(), []

    def keep_asking(url):
        """Calls on connections of their own until one is not answered."""
        alone = {"Connection": "close"}
        with httpx.Client(base_url=url, headers=alone, verify=False, timeout=60) as client:
            while True:
                try:
                    response = client.post("/v1/classify", json=body)
                except httpx.TransportError as error:
                    outcomes.append(error)
                    return
                outcomes.append(response)
                if len(outcomes) > 20:
                    enough.set()
                if response.status_code != 200:
                    return

    def mid_load(server, sign):
        outcomes.clear()
        enough.clear()
        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(keep_asking, server.url)
            assert enough.wait(60)
            return server.end(sign)

    with serving(calibrated, policies, tmp_path / "1.log") as server:
        assert mid_load(server, signal.SIGKILL) == -signal.SIGKILL
    assert [path.read_bytes() for path in policies] == stored

    with serving(calibrated, policies, tmp_path / "2.log") as server:
        assert mid_load(server, signal.SIGTERM) == 0
        assert "drained; 0 calls were refused" in server.logged()
    for outcome in outcomes:
        if isinstance(outcome, httpx.Response):
            assert outcome.status_code in (200, 503)
            if outcome.status_code == 503:
                assert outcome.json() == {"error": "the server is stopping"}
                assert outcome.headers["connection"] == "close"
        else:  # it came after the end, and was never taken
            assert isinstance(outcome, httpx.ConnectError), outcome
    assert sum(isinstance(o, httpx.Response) and o.status_code == 200 for o in outcomes) > 20


# In this process, where a stage can be held or broken.


class Held:
    """A stage's forward pass that waits until it is let go, and counts its batches."""

    def __init__(self, stage):
        self.go, self.batches = threading.Event(), []
        self.error: Exception | None = None
        self.waits = False
        self._forward = stage.forward
        stage.forward = self

    def __call__(self, batch):
        self.waits = not self.go.is_set()
        assert self.go.wait(60)
        self.waits = False
        if self.error:
            raise self.error
        self.batches.append(len(batch["input_ids"]))
        return self._forward(batch)


@asynccontextmanager
async def service_of(cascade, policies, key="", held=None, **options):
    """A client of the app, and the service behind it; a held stage is let go for the warm-up."""
    service = Service(ServeConfig(**options), key)
    gate = Gate(make_app(service), service)
    if held:
        held.go.set()
    await service.open(cascade, policies)
    if held:
        held.go.clear()
        held.batches.clear()
    transport = httpx.ASGITransport(gate)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, service
    finally:
        if held:
            held.go.set()
        assert service.scheduler
        service.scheduler.stop("the test is over")


async def until(true):
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


def depth(service, stage):
    return service.scheduler.stations[stage].depth


def test_a_key_is_asked_for(calibrated, policies):
    cascade, policy = load(calibrated, policies[0])

    async def main():
        async with service_of(cascade, {"fast": policy}, key="clé") as (client, _):
            body = {"texts": ["making"]}
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic clé"}):
                sent = [(name.encode(), value.encode()) for name, value in headers.items()]
                answer = await client.post("/v1/classify", json=body, headers=sent)
                assert answer.status_code == 401
                assert "Bearer KEY" in answer.json()["error"]
            right = [(b"Authorization", "Bearer clé".encode())]
            assert (await client.post("/v1/classify", json=body, headers=right)).status_code == 200
            for path in ("/metrics", "/v1/policies"):
                assert (await client.get(path)).status_code == 401
                assert (await client.get(path, headers=right)).status_code == 200
            for path in ("/healthz", "/readyz"):
                assert (await client.get(path)).status_code == 200

    asyncio.run(main())


def test_the_large_models_batches_fill_from_many_calls(calibrated, policies, texts):
    cascade, policy = load(calibrated, policies[1])
    held = Held(cascade.stages[1])

    async def main():
        async with service_of(cascade, {"accurate": policy}, held=held) as (client, service):
            ask = partial(client.post, "/v1/classify")
            first = asyncio.create_task(ask(json={"texts": ["making"]}))
            await until(lambda: held.waits)
            calls = [asyncio.create_task(ask(json={"texts": [text]})) for text in texts[:60]]
            await until(lambda: depth(service, 1) == 60)
            held.go.set()
            await first
            answers = [(await call).json()["answers"][0] for call in calls]
            check(answers, cascade.predict(Examples(texts[:60]), policy))
            page = metrics_of((await client.get("/metrics")).text)
            number = int(page["batches_total", "2"])
            assert number <= 6  # a batch ends where it would be padding, not with each call
            assert (held.batches[0], sum(held.batches[:number])) == (1, 61)

    asyncio.run(main())


def test_tokens_cut_batches_and_other_readers_read_anew(calibrated, policies, texts, monkeypatch):
    cascade, policy = load(calibrated, policies[0])
    monkeypatch.setattr(type(cascade.stages[0]), "reads_like", lambda self, other: False)
    offline = cascade.predict(Examples(texts), policy)
    cascade.batch_tokens = 100
    sizes = []
    forward = cascade.stages[0].forward

    def counting(batch):
        sizes.append(batch["input_ids"].numel())
        return forward(batch)

    cascade.stages[0].forward = counting

    async def main():
        async with service_of(cascade, {"fast": policy}, max_items=400) as (client, _):
            answer = await client.post("/v1/classify", json={"texts": texts})
            check(answer.json()["answers"], offline)

    asyncio.run(main())
    assert max(sizes[1:]) <= 100  # the first is the warm-up
    assert len(sizes) > 10


def test_pairs_and_single_texts_where_both_will_do(calibrated, policies):
    cascade, policy = load(calibrated, policies[0])
    cascade.pairs = None
    pairs = [["making", "baked"], ["", "lion"]]
    offline = cascade.predict(Examples(["making", ""], ["baked", "lion"]), policy)

    async def main():
        async with service_of(cascade, {"fast": policy}) as (client, _):
            two, one = await asyncio.gather(
                client.post("/v1/classify", json={"pairs": pairs}),
                client.post("/v1/classify", json={"texts": ["making", "lion"]}),
            )
            check(two.json()["answers"], offline)
            check(one.json()["answers"], cascade.predict(Examples(["making", "lion"]), policy))
            for wrong in ([["a"]], [["a", 1]], ["ab"]):
                answer = await client.post("/v1/classify", json={"pairs": wrong})
                assert (answer.status_code, "pairs[0]" in answer.text) == (422, True)
            cascade.pairs = True
            answer = await client.post("/v1/classify", json={"texts": ["making"]})
            assert (answer.status_code, "name pairs" in answer.text) == (422, True)

    asyncio.run(main())


def test_a_full_queue_and_a_passed_deadline_are_refused(calibrated, policies):
    cascade, policy = load(calibrated, policies[0])
    held = Held(cascade.stages[0])

    async def main():
        options = {"max_queue": 8, "max_items": 8, "held": held}
        async with service_of(cascade, {"fast": policy}, **options) as (client, service):
            first = asyncio.create_task(client.post("/v1/classify", json={"texts": ["one"]}))
            await until(lambda: service.active == 1 and depth(service, 0) == 0)
            second = asyncio.create_task(client.post("/v1/classify", json={"texts": ["a"] * 6}))
            await until(lambda: depth(service, 0) == 6)
            answer = await client.post("/v1/classify", json={"texts": ["a"] * 3})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert "too many texts" in answer.json()["error"]
            late = await client.post("/v1/classify", json={"texts": ["a"], "deadline": 0.01})
            assert late.status_code == 503
            assert late.json()["error"] == "not answered within 0.01 seconds"
            held.go.set()
            assert [(await call).status_code for call in (first, second)] == [200, 200]
            await until(lambda: depth(service, 0) == 0)
        assert held.batches == [1, 6]  # nothing was computed for the late one

    asyncio.run(main())


def test_a_client_that_goes_leaves_nothing_behind(calibrated, policies):
    cascade, policy = load(calibrated, policies[0])
    held = Held(cascade.stages[0])
    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": [],
             "query_string": b"", "http_version": "1.1", "root_path": "", "scheme": "http"}  # fmt: skip

    async def main():
        async with service_of(cascade, {"fast": policy}, held=held) as (client, service):
            app = Gate(make_app(service), service)
            first = asyncio.create_task(client.post("/v1/classify", json={"texts": ["one"]}))
            await until(lambda: service.active == 1 and depth(service, 0) == 0)

            async def come_and_go(messages, status):
                sent = []

                async def receive():
                    if len(messages) == 1 and status == 499:
                        await asyncio.sleep(0.02)
                    return messages.pop(0)

                async def send(message):
                    sent.append(message)

                await app(scope, receive, send)
                assert sent[0]["status"] == status

            whole = {"type": "http.request", "body": b'{"texts": ["a", "b"]}'}
            gone = {"type": "http.disconnect"}
            await come_and_go([whole, gone], 499)
            await come_and_go([whole | {"more_body": True}, gone], 499)
            assert service.active == 1
            held.go.set()
            assert (await first).status_code == 200
            await until(lambda: depth(service, 0) == 0)
            assert service.scheduler
            assert not service.scheduler._calls
        assert held.batches == [1]

    asyncio.run(main())


def test_an_error_in_a_stage_is_500_and_the_service_goes_on(
    calibrated, policies, caplog, texts, monkeypatch
):
    cascade, policy = load(calibrated, policies[1])
    held = Held(cascade.stages[1])
    failing = {
        "encode": lambda examples: 1 / 0,
        "forward": lambda batch: torch.full((len(batch["input_ids"]), 5), float("nan")),
    }

    async def main():
        async with service_of(cascade, {"accurate": policy}, held=held) as (client, service):
            held.go.set()
            for error in (RuntimeError(SECRET), TimeoutError()):
                held.error = error
                answer = await client.post("/v1/classify", json={"texts": [SECRET]})
                assert answer.status_code == 500
                assert "failed on this call" in answer.json()["error"]
            held.error = None
            for method in ("encode", "forward"):
                with monkeypatch.context() as broken:
                    broken.setattr(cascade.stages[0], method, failing[method])
                    answer = await client.post("/v1/classify", json={"texts": [SECRET]})
                    assert answer.status_code == 500
            answer = await client.post("/v1/classify", json={"texts": texts[:9]})
            check(answer.json()["answers"], cascade.predict(Examples(texts[:9]), policy))
            assert [depth(service, 0), depth(service, 1)] == [0, 0]
            page = (await client.get("/metrics")).text
            assert metrics_of(page)["requests_total", "/v1/classify", "500"] == 4
            monkeypatch.setattr(service, "describe", lambda: 1 / 0)
            answer = await client.get("/v1/policies")
            assert answer.status_code == 500
            assert "its log tells where" in answer.json()["error"]

    # The app's own logger may not propagate, once a command has set it up.
    records = logging.getLogger("cascadebert")
    records.addHandler(caplog.handler)
    try:
        asyncio.run(main())
    finally:
        records.removeHandler(caplog.handler)
    assert "stage 2: RuntimeError at" in caplog.text
    assert "stage 1: ZeroDivisionError at" in caplog.text
    assert "/v1/policies: ZeroDivisionError at" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("patience", [60.0, 0.0])
def test_draining_finishes_what_was_taken_or_refuses_it(calibrated, policies, patience):
    cascade, policy = load(calibrated, policies[0])
    held = Held(cascade.stages[0])

    async def main():
        async with service_of(cascade, {"fast": policy}, held=held, drain=patience) as (
            client,
            service,
        ):
            taken = asyncio.create_task(client.post("/v1/classify", json={"texts": ["one"]}))
            await until(lambda: service.active == 1 and depth(service, 0) == 0)
            closing = asyncio.create_task(service.close(asyncio.Event()))
            await until(lambda: service.draining)
            late = [
                await client.post("/v1/classify", json={"texts": ["two"]}),
                await client.get("/readyz"),
            ]
            for answer in late:
                assert answer.status_code == 503
                assert answer.json()["error"] == "the server is stopping"
                assert answer.headers["connection"] == "close"
            assert (await client.get("/healthz")).status_code == 200
            if patience:
                held.go.set()
            answer = await taken
            assert answer.status_code == (200 if patience else 503)
            if not patience:
                assert "no time left" in answer.json()["error"]
            await closing

    asyncio.run(main())


def test_before_the_models_are_loaded_it_is_alive_but_not_ready():
    async def main():
        service = Service(ServeConfig())
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            for answer in (
                await client.get("/readyz"),
                await client.post("/v1/classify", json={"texts": ["a"]}),
            ):
                assert answer.status_code == 503
                assert "not loaded yet" in answer.json()["error"]

    asyncio.run(main())


def test_a_body_that_does_not_arrive_is_refused():
    async def main():
        service = Service(ServeConfig(deadline=0.02))

        async def never():
            await asyncio.sleep(60)
            yield b""

        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            # The transport reads what it sends as it is asked for.
            answer = await client.post("/v1/classify", content=never())
            assert answer.status_code == 408

    asyncio.run(main())


# Load shedding.


def test_thresholds_are_lowered_to_the_floor_and_never_raised():
    logits = torch.tensor([[0.0, 0.2], [0.0, 1.0], [0.0, 3.0]])  # log-odds 0.2, 1, 3
    config = ServeConfig(shed_at=1, shed_floor=0.7)  # log-odds 0.847
    point = Point.of("a", Policy([2.0]), config)
    leave, degraded = point.leaves(0, logits, crowded=True)
    assert leave.tolist() == [False, True, True]
    assert degraded.tolist() == [False, True, False]
    for calm in (
        point.leaves(0, logits, crowded=False),
        Point.of("b", Policy([2.0], guarantee={"method": "ltt"}), config).leaves(0, logits, True),
        Point.of("c", Policy([2.0]), ServeConfig()).leaves(0, logits, True),
    ):
        assert calm[0].tolist() == [False, False, True]
        assert not calm[1].any()
    low = Point.of("d", Policy([0.5]), config).leaves(0, logits, crowded=True)
    assert low[0].tolist() == [False, True, True]
    assert not low[1].any()
    assert Point.of("e", Policy([2.0], score="energy"), config).eased is None
    assert Point.of(
        "f", Policy([2.0], guarantee={"method": "empirical"}), config
    ).eased  # no promise
    last = point.leaves(1, logits, crowded=True)
    assert last[0].all()
    assert not last[1].any()


def test_borderline_texts_leave_early_while_the_next_queue_is_long(calibrated, policies, texts):
    cascade, policy = load(calibrated, policies[0])
    held = Held(cascade.stages[1])
    words = texts[:100]
    scores = log_odds(cascade.logits(0, Examples(words)))
    policy = replace(policy, thresholds=[float(scores.quantile(0.8))])
    floor = float(scores.quantile(0.4).sigmoid())
    risky = replace(policy, guarantee={"method": "ltt", "text": "holds"})
    deferred = int((scores <= policy.thresholds[0]).sum())
    lowest = [words[i] for i in scores.argsort()[:10]]  # deferred whatever the load
    options = {"held": held, "shed_at": deferred + 5, "shed_floor": floor}

    async def main():
        points = {"fast": policy, "safe": risky}
        async with service_of(cascade, points, **options) as (client, service):

            def ask(point, asked=words):
                body = {"texts": asked, "operating_point": point}
                return asyncio.create_task(client.post("/v1/classify", json=body))

            stuck = ask("fast", lowest[:1])  # its text is with the held worker
            await until(lambda: held.waits)
            queued = ask("fast")  # these wait in the queue, and are not yet too many
            await until(lambda: depth(service, 1) == deferred)
            more = ask("fast", lowest)
            await until(lambda: depth(service, 1) == deferred + 10)
            shed = ask("fast")
            kept = sum(float(score.sigmoid()) <= floor for score in scores)
            await until(lambda: depth(service, 1) == deferred + 10 + kept)
            safe = ask("safe")
            await until(lambda: depth(service, 1) == 2 * deferred + 10 + kept)
            held.go.set()
            await stuck
            await more
            return [(await call).json()["answers"] for call in (queued, shed, safe)]

    queued, shed, safe = asyncio.run(main())
    calm = cascade.predict(Examples(words), policy)
    for answers in (queued, safe):
        check(answers, calm)
    expected = [bool(floor < float(s.sigmoid()) and s <= policy.thresholds[0]) for s in scores]
    assert 30 <= sum(expected) <= 50
    assert [answer["degraded"] for answer in shed] == expected
    assert all(answer["stage"] == 1 for answer in shed if answer["degraded"])


# Drift.


def test_drift_is_the_stability_index_by_hand():
    deciles = list(range(1, 10))
    drift = Drift(deciles, window=1000, least=100)
    assert drift.psi == 0.0
    drift.add([0.5] * 99)
    assert drift.psi == 0.0  # too few to tell
    even = [0.5 + i % 10 for i in range(1000)]
    drift.add(even)
    assert len(drift) == 1000
    assert drift.psi == pytest.approx(0, abs=1e-9)
    drift.add([20.0] * 1000)  # all above the last decile, and the window has forgotten the others
    high, low = 1000.5 / 1005, 0.5 / 1005
    logs = torch.tensor([high / 0.1, low / 0.1], dtype=torch.float64).log()
    by_hand = (high - 0.1) * logs[0] + 9 * (low - 0.1) * logs[1]
    assert drift.psi == pytest.approx(float(by_hand))


def test_drift_takes_equal_deciles_for_one_part():
    drift = Drift([1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], least=100)
    assert drift.expected.tolist() == pytest.approx([0.3, *[0.1] * 7])
    drift.add([1.0] * 300 + [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 8.0] * 100)
    assert drift.psi == pytest.approx(0, abs=1e-4)


# Options.


def test_wrong_options_are_told_in_one_line(calibrated, command, tmp_path, monkeypatch, policies):
    def refused(*words):
        code, _, err = command("serve", "--model", calibrated, "--device", "cpu", *words)
        assert code == 2
        return err.strip().splitlines()[-1]

    assert "--port 65536: must be from 0 to 65535" in refused("--port", 65536)
    assert "--max-items 9: must be from 1 to 8" in refused("--max-items", 9, "--max-queue", 8)
    assert "--shed-floor 1: must be" in refused("--shed-floor", 1)
    assert "--deadline nan: must be" in refused("--deadline", "nan")
    key = tmp_path / "key"
    assert f"--api-key-file {key}: No such file" in refused("--api-key-file", key)
    key.write_text("\n")
    assert "is empty" in refused("--api-key-file", key)
    same = tmp_path / "fast.json"
    assert "two files are named fast" in refused("--policy", policies[0], "--policy", same)
    same.write_text("{}")
    assert "not a policy file" in refused("--port", 0, "--policy", same)
    content = json.loads(policies[0].read_text())
    same.write_text(json.dumps(content | {"models": ["x", "y"]}))
    assert "made for other models" in refused("--port", 0, "--policy", same)
    same.write_text(json.dumps(content | {"backend": "onnx"}))
    assert "made for backend onnx" in refused("--port", 0, "--policy", same)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in refused("--port", port)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "cascadebert[serve]"' in refused("--port", 0)


def test_the_benchmark_compares_equal_answers(benchmark_file):
    module = benchmark_file("bench_serve")
    rows = {row["engine"]: row for row in module.measure(items=48, width=64, tries=1, size=8,
                                                         seconds=0.2)}  # fmt: skip
    assert rows["service"]["of offline %"] > 0
    assert rows["exited texts of the cascade"]["p95 ms"] > 0
