"""What writes the solutions: a model in this process, vLLM, or any server that completes texts."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from octavo.errors import ConfigError, DataError, ModelError
from octavo.models import load_model, load_tokenizer
from octavo.runtime import Runtime

from mathshepherd.config import Engine, Sampling
from mathshepherd.generate import Completion, Generator, LocalGenerator, Request, encode
from mathshepherd.reward_model import model_folder


def open_engine(
    source: str, sampling: Sampling, runtime: Runtime, engine: Engine = Engine(), stop: str = ""
) -> Generator:
    """A generator of completions.

    Args:
        source: folder or hub id of a causal language model, or its name on the server.
        sampling: how tokens are drawn.
        runtime: device and precision, of a local model.
        engine: which.
        stop: words to stop at; empty to go on to the end.

    Raises:
        ConfigError: the engine's library or address is missing.
        ModelError: there is no such model.
    """
    from transformers import AutoModelForCausalLM

    if engine.engine == "server":
        return ServerGenerator(
            engine.server, source, sampling, engine.rows, engine.retries, stop=stop
        )
    folder = model_folder(source)
    if engine.engine == "vllm":
        return VllmGenerator(
            folder, sampling, stop, seed=runtime.seed, dtype=runtime.dtype,
            tensor_parallel_size=engine.tensor_parallel, max_model_len=engine.max_model_len or None,
            gpu_memory_utilization=engine.gpu_memory,
        )  # fmt: skip
    device = runtime.start()
    model = load_model(AutoModelForCausalLM, folder, dtype=runtime.torch_dtype())
    return LocalGenerator(
        model.to(device).eval(), load_tokenizer(folder), sampling, engine.rows, stop  # pyright: ignore
    )  # fmt: skip


class VllmGenerator:
    """Completions by vLLM, whose cache shares prefixes among requests.

    Args:
        source: folder or hub id.
        sampling: how tokens are drawn; each completion has a seed of its own.
        stop: words to stop at; empty to go on to the end.
        options: for `vllm.LLM`, such as `seed`, `dtype` or `tensor_parallel_size`.

    Raises:
        ConfigError: vLLM is not installed.
        ModelError: it cannot load the model.
    """

    def __init__(self, source: str, sampling: Sampling, stop: str = "", **options: Any) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "--engine vllm: is not installed; pip install 'mathshepherd[vllm]'"
            ) from None
        self.vllm, self.sampling, self.stop = vllm, sampling, stop
        try:
            self.model = vllm.LLM(model=source, enable_prefix_caching=True, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{source}: vLLM cannot load it ({_line(error)})") from error

    def __call__(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of each request, in its seeds' order.

        Raises:
            DataError: vLLM refuses a text, for one that is too long.
        """
        sampling, tokenizer = self.sampling, self.model.get_tokenizer()
        prompts, settings = [], []
        for request in requests:  # as tokens, so that all engines begin a text alike
            prompts += [{"prompt_token_ids": encode(tokenizer, request.text)}] * len(request.seeds)
            settings += [
                self.vllm.SamplingParams(
                    n=1, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed % 2**31,
                    max_tokens=sampling.max_new_tokens, skip_special_tokens=False,
                    spaces_between_special_tokens=False, stop=[self.stop] if self.stop else None,
                    include_stop_str_in_output=bool(self.stop),
                )
                for seed in request.seeds
            ]  # fmt: skip
        try:
            made = iter(self.model.generate(prompts, settings, use_tqdm=False))
        except ValueError as error:
            raise DataError(f"vLLM refuses a text ({_line(error)})") from error
        return [
            [_completion(next(made).outputs[0], self.stop) for _ in one.seeds] for one in requests
        ]


def _completion(output: Any, stop: str) -> Completion:
    """One of vLLM's, which tells by what it was stopped: none of the words at the model's end."""
    stopped = bool(stop) and output.stop_reason == stop
    finished = output.finish_reason == "stop" and not stopped
    return Completion(output.text, finished, len(output.token_ids), stopped)


@dataclass(frozen=True)
class ServerGenerator:
    """Completions by a server with OpenAI's /v1/completions.

    Attributes:
        address: up to and with /v1.
        model: its name there.
        sampling: how tokens are drawn; each completion has a seed of its own.
        workers: requests at once.
        retries: of a request that fails.
        wait: seconds before the first repetition; twice as long before each further one.
        timeout: seconds that one answer may take.
        stop: words to stop at; empty to go on to the end. A server that does not tell whether it was
            at them (as vLLM's does) counts as having been, until it has nothing more to say.
    """

    address: str
    model: str
    sampling: Sampling
    workers: int = 32
    retries: int = 3
    wait: float = 0.2
    timeout: float = 600
    stop: str = ""

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"--server {self.address}: must begin with http:// or https://")

    def __call__(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of each request, in its seeds' order.

        Raises:
            ModelError: the server cannot be reached, refuses a request or answers something else.
        """
        flat = [(request.text, seed) for request in requests for seed in request.seeds]
        with ThreadPoolExecutor(self.workers) as pool:
            made = iter(list(pool.map(lambda one: self._complete(*one), flat)))
        return [[next(made) for _ in request.seeds] for request in requests]

    def _complete(self, text: str, seed: int) -> Completion:
        sampling = self.sampling
        body = {"model": self.model, "prompt": text, "seed": seed % 2**31, "n": 1,
                "temperature": sampling.temperature, "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens, "skip_special_tokens": False}  # fmt: skip
        if self.stop:
            body["stop"] = [self.stop]
        answer = self._ask(json.dumps(body).encode())
        try:
            content = json.loads(answer)
            choice = content["choices"][0]
            words = choice["text"].split()
            tokens = (content.get("usage") or {}).get("completion_tokens") or len(words)
            text, ended = choice["text"], choice["finish_reason"] == "stop"
            stopped = (
                ended and bool(self.stop) and choice.get("stop_reason", self.stop) == self.stop
            )
            stopped = stopped and bool(text.strip())
            return Completion(
                text + self.stop * stopped, ended and not stopped, int(tokens), stopped
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ModelError(
                f"{self.address}: answered no completion: {_line(answer.decode(errors='replace'))}"
            ) from None

    def _ask(self, body: bytes) -> bytes:
        """The server's answer; what may pass (no connection, 429, 5xx) is tried again."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        asked = urllib.request.Request(f"{self.address.rstrip('/')}/completions", body, headers)
        attempt = 0
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"refused a request ({error.code}: {_words(error)})"
                passing = error.code >= 500 or error.code == 429
            except (OSError, HTTPException) as error:
                problem, passing = f"cannot be reached ({_line(error)})", True
            if not passing or attempt >= self.retries:
                raise ModelError(f"{self.address}: {problem}")
            time.sleep(min(self.wait * 2**attempt, 10))
            attempt += 1


def _words(error: urllib.error.HTTPError) -> str:
    """What a server says to its refusal."""
    try:
        return _line(error.read().decode(errors="replace"))
    except (OSError, HTTPException):
        return str(error.reason)


def _line(words: object) -> str:
    """The beginning of a message, in one line."""
    return " ".join(str(words).split())[:120] or type(words).__name__
