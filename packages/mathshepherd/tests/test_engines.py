"""Engines: a server on the loopback, a stand-in with vLLM's signatures, and which one is opened."""

import json
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest
from mathshepherd.config import Engine, Sampling
from mathshepherd.engines import ServerGenerator, VllmGenerator, open_engine
from mathshepherd.generate import Completion, LocalGenerator, Request
from octavo.errors import ConfigError, DataError, ModelError
from octavo.runtime import Runtime
from octavo.tiny import Shape, checkpoint

SAMPLING = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=7)
REQUESTS = [Request("one", (5, 2**40 + 3)), Request("none", ()), Request("two", (7,))]


@contextmanager
def serving(answer):
    """A server that hands each request to `answer`, which gives a status and a body."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            status, content = answer(body, len(seen))
            if status == 0:
                return self.connection.close()  # hangs up without a word
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            lost = 9 * (status < 0)  # hangs up in the middle of its words
            self.send_response(abs(status))
            self.send_header("Content-Length", str(len(content) + lost))
            self.end_headers()
            self.wfile.write(content)
            return None

        def log_message(self, format, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def echo(body, _):
    """A completion that tells what was asked for."""
    text = f"{body['prompt']} {body['seed']}"
    choice = {"text": text, "finish_reason": "stop" if body["seed"] % 2 else "length"}
    return 200, {"choices": [choice], "usage": {"completion_tokens": body["max_tokens"]}}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def server(address, **options):
    options = {"retries": 2, "wait": 0.001, "timeout": 5} | options
    return ServerGenerator(address, "name", SAMPLING, **options)


def test_a_server_completes_each_seed_in_order():
    ready = threading.Barrier(3, timeout=10)

    def together(body, count):
        ready.wait()  # all three are on their way at once
        return echo(body, count)

    with serving(together) as (address, seen):
        found = server(f"{address}/", workers=3)(REQUESTS)
    assert found == [
        [Completion("one 5", True, 7), Completion(f"one {(2**40 + 3) % 2**31}", True, 7)],
        [], [Completion("two 7", True, 7)],
    ]  # fmt: skip
    assert {path for path, _ in seen} == {"/v1/completions"}
    body = next(body for _, body in seen if body["prompt"] == "two")
    assert body == {"model": "name", "prompt": "two", "seed": 7, "n": 1, "temperature": 0.5,
                    "top_p": 0.9, "max_tokens": 7, "skip_special_tokens": False}  # fmt: skip
    with serving(echo) as (address, seen):
        many = [Request(str(n), tuple(range(n % 4))) for n in range(40)]
        found = server(address, workers=8)(many)
    texts = [[one.text for one in group] for group in found]
    assert texts == [[f"{n} {seed}" for seed in range(n % 4)] for n in range(40)]
    assert [one.finished for one in found[3]] == [False, True, False]


@pytest.mark.parametrize("status", [500, 503, 429, 0])
def test_what_may_pass_is_tried_again(status):
    with serving(lambda body, n: (status, {}) if n < 3 else echo(body, n)) as (address, seen):
        assert server(address)([Request("one", (1,))]) == [[Completion("one 1", True, 7)]]
    assert len(seen) == 3


def test_waits_grow(monkeypatch):
    waits = []
    monkeypatch.setattr("mathshepherd.engines.time.sleep", waits.append)
    with (
        serving(lambda *_: (500, b"out of\nmemory")) as (address, seen),
        pytest.raises(ModelError, match=r"refused a request \(500: out of memory\)$"),
    ):
        server(address, retries=7, wait=0.2)([Request("one", (1,))])
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10]
    assert len(seen) == 8


def test_a_refusal_is_final_and_told_in_one_line():
    with (
        serving(lambda *_: (400, {"message": "too\nlong " * 99})) as (address, seen),
        pytest.raises(ModelError, match=r"/v1: refused a request \(400: .*too") as caught,
    ):
        server(address)([Request("one", (1,))])
    assert len(seen) == 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("status", "message", "asked"),
    [(-200, r"cannot be reached \(IncompleteRead", 3), (-400, r"\(400: Bad Request\)", 1)],
)
def test_half_an_answer_is_told(status, message, asked):
    with (
        serving(lambda *_: (status, {})) as (address, seen),
        pytest.raises(ModelError, match=message),
    ):
        server(address)([Request("one", (1,))])
    assert len(seen) == asked


def test_a_server_that_is_not_there_is_told_in_one_line():
    with serving(echo) as (address, _):
        pass
    with pytest.raises(ModelError, match=rf"{address}: cannot be reached \(.*refused") as caught:
        server(address)([Request("one", (1,))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [b"<html>\nhello", [], {}, {"choices": []}, {"choices": [{"text": None}]}, {"choices": [{}]},
     {"choices": [{"text": "a"}]}, {"choices": [{"text": 3, "finish_reason": "stop"}]}],
)  # fmt: skip
def test_an_answer_of_another_kind_is_told(answer):
    with (
        serving(lambda *_: (200, answer)) as (address, seen),
        pytest.raises(ModelError, match="answered no completion: ") as caught,
    ):
        server(address)([Request("one", (1,))])
    assert len(seen) == 1
    assert "\n" not in str(caught.value)


def test_tokens_are_counted_roughly_where_a_server_does_not_tell():
    content = {"choices": [{"text": " a b c", "finish_reason": "stop"}], "usage": None}
    with serving(lambda *_: (200, content)) as (address, _):
        assert server(address)([Request("one", (1,))]) == [[Completion(" a b c", True, 3)]]


# The signatures of vLLM's own (vllm/entrypoints/llm.py, sampling_params.py, outputs.py).


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: object
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Words:
    """A tokenizer of bytes that begins texts with 256."""

    bos_token, eos_token, eos_token_id = "<s>", "</s>", 257

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [256] * add_special_tokens + list(text.encode())}


class LLM:
    made: list["LLM"] = []  # noqa: RUF012 - what the tests look at

    def __init__(
        self, model, *, runner="auto", convert="auto", tokenizer=None, tokenizer_mode="auto",
        skip_tokenizer_init=False, trust_remote_code=False, tensor_parallel_size=1, dtype="auto",
        quantization=None, revision=None, seed=0, gpu_memory_utilization=0.9, **kwargs,
    ):  # fmt: skip
        if "broken" in model:
            raise ValueError("no such\nmodel")
        self.options = {"model": model, "dtype": dtype, "seed": seed,
                        "tensor_parallel_size": tensor_parallel_size,
                        "gpu_memory_utilization": gpu_memory_utilization} | kwargs  # fmt: skip
        self.asked: list[tuple[dict, SamplingParams]] = []
        LLM.made.append(self)

    def get_tokenizer(self):
        return Words()

    def generate(
        self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None,
        tokenization_kwargs=None,
    ):  # fmt: skip
        assert sampling_params is not None
        assert not use_tqdm
        self.asked = list(zip(prompts, sampling_params, strict=True))
        if any(len(prompt["prompt_token_ids"]) > 20 for prompt in prompts):
            raise ValueError("The decoder prompt is longer\nthan the maximum model length")
        return [
            RequestOutput(str(number), prompt["prompt_token_ids"], [CompletionOutput(
                0, f"{bytes(prompt['prompt_token_ids'][1:]).decode()} {params.seed}", [1, 2, 3],
                None, None, "stop" if (params.seed or 0) % 2 else "length",
            )])
            for number, (prompt, params) in enumerate(self.asked)
        ]  # fmt: skip


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    return LLM


def test_vllm_gets_one_request_a_completion(vllm):
    runtime = Runtime(seed=9, dtype="bfloat16", device="cpu")
    generate = open_engine("some/model", SAMPLING, runtime, Engine(engine="vllm"))
    seed = (2**40 + 3) % 2**31
    assert generate(REQUESTS) == [
        [Completion("one 5", True, 3), Completion(f"one {seed}", True, 3)],
        [], [Completion("two 7", True, 3)],
    ]  # fmt: skip
    (made,) = vllm.made
    assert made.options == {"model": "some/model", "seed": 9, "dtype": "bfloat16",
                            "tensor_parallel_size": 1, "max_model_len": None,
                            "gpu_memory_utilization": 0.9, "enable_prefix_caching": True}  # fmt: skip
    assert [params.seed for _, params in made.asked] == [5, seed, 7]
    assert made.asked[0][1] == SamplingParams(
        temperature=0.5, top_p=0.9, seed=5, max_tokens=7, skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )  # fmt: skip
    assert made.asked[2][0] == {"prompt_token_ids": [256, *b"two"]}
    assert generate([Request("ok", (2,))]) == [[Completion("ok 2", False, 3)]]
    generate([Request("<s>two", (2,))])
    assert made.asked[0][0]["prompt_token_ids"] == list(b"<s>two")  # not begun twice
    assert generate([]) == []


def test_vllm_is_told_of_devices_and_context(vllm):
    engine = Engine(engine="vllm", tensor_parallel=2, max_model_len=2048, gpu_memory=0.5)
    open_engine("some/model", SAMPLING, Runtime(device="cpu"), engine)
    (made,) = vllm.made
    assert (made.options["tensor_parallel_size"], made.options["max_model_len"]) == (2, 2048)
    assert made.options["gpu_memory_utilization"] == 0.5


def test_vllm_stops_at_words(vllm, monkeypatch):
    generate = open_engine(
        "some/model", SAMPLING, Runtime(device="cpu"), Engine(engine="vllm"), "ки"
    )
    told = iter([("a ки", "stop", "ки"), ("b", "stop", None), ("c", "length", None)])

    def made(self, prompts, sampling_params=None, **_):
        for params in sampling_params or ():
            assert (params.stop, params.include_stop_str_in_output) == (["ки"], True)
        return [RequestOutput("0", [], [CompletionOutput(0, text, [1], None, None, why, at)])
                for text, why, at in told]  # fmt: skip

    monkeypatch.setattr(LLM, "generate", made)
    assert generate([Request("one", (1, 2, 3))]) == [
        [Completion("a ки", False, 1, True), Completion("b", True, 1), Completion("c", False, 1)]
    ]


def test_a_server_stops_at_words():
    """One that tells why (vLLM's), and one that does not, which counts until it says nothing more."""

    def answer(body, _):
        assert body["stop"] == ["ки"]
        more = {1: {"stop_reason": "ки"}, 2: {"stop_reason": None}, 4: {}, 5: {}}[body["seed"]]
        text = " " if body["seed"] == 5 else "a "
        choice = {"text": text, "finish_reason": "stop"} | more
        return 200, {"choices": [choice], "usage": {"completion_tokens": 2}}

    with serving(answer) as (address, _):
        (found,) = server(address, stop="ки")([Request("one", (1, 2, 4, 5))])
    assert found == [
        Completion("a ки", False, 2, True), Completion("a ", True, 2),
        Completion("a ки", False, 2, True), Completion(" ", True, 2),
    ]  # fmt: skip


def test_what_vllm_refuses_is_told_in_one_line(vllm):
    with pytest.raises(ModelError, match=r"broken: vLLM cannot load it \(no such model\)"):
        VllmGenerator("broken", SAMPLING)
    with pytest.raises(DataError, match=r"vLLM refuses a text \(The decoder prompt is longer than"):
        VllmGenerator("model", SAMPLING)([Request("long" * 9, (1,))])


def test_without_vllm_one_line_tells_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'mathshepherd\[vllm\]'"):
        VllmGenerator("model", SAMPLING)


def test_a_local_model_is_opened():
    source = str(checkpoint(["1 2 3"], Shape(kind="llama", alphabet="char", width=16, layers=1)))
    runtime = Runtime(device="cpu")
    generate = open_engine(source, SAMPLING, runtime, Engine(rows=5))
    assert isinstance(generate, LocalGenerator)
    assert (generate.rows, generate.sampling, generate.model.training) == (5, SAMPLING, False)
    assert len(generate([Request("1 2", (1, 2))])[0]) == 2
    with pytest.raises(ModelError):
        open_engine(f"{source}/none", SAMPLING, runtime)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"engine": "server"}, "--engine server and --server ADDRESS go together"),
        ({"server": "http://localhost"}, "go together"),
        ({"engine": "server", "server": "localhost:80/v1"}, "must begin with http:// or https://"),
        ({"engine": "server", "server": "file:///v1"}, "must begin with http"),
        ({"tensor_parallel": 2}, "--tensor-parallel, --max-model-len: are of --engine vllm alone"),
        (
            {"engine": "server", "server": "http://a", "max_model_len": 9},
            "are of --engine vllm alone",
        ),
        ({"engine": "vllm", "tensor_parallel": 0}, "--tensor-parallel 0: must be 1 or more"),
        ({"engine": "vllm", "max_model_len": -1}, "--max-model-len -1: must be 0 or more"),
        ({"rows": 0}, "--rows 0: must be 1 or more"),
        ({"retries": -1}, "--retries -1: must be 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(engine, message):
    with pytest.raises(ConfigError, match=message):
        open_engine("model", SAMPLING, Runtime(device="cpu"), Engine(**engine))
    opened = open_engine("model", SAMPLING, Runtime(), Engine(engine="server", server="http://a"))
    assert isinstance(opened, ServerGenerator)
