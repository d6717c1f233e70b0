"""What writes the solutions: a model in this process, vLLM, or any server that completes texts."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from octavo.errors import ConfigError, ModelError
from octavo.models import load_model, load_tokenizer
from octavo.runtime import Runtime

from mathshepherd.config import Engine, Sampling
from mathshepherd.generate import Completion, Generator, LocalGenerator, Request
from mathshepherd.reward_model import model_folder


def open_engine(
    source: str, sampling: Sampling, runtime: Runtime, engine: Engine = Engine()
) -> Generator:
    """A generator of completions.

    Args:
        source: folder or hub id of a causal language model, or its name on the server.
        sampling: how tokens are drawn.
        runtime: device and precision, of a local model.
        engine: which.

    Raises:
        ConfigError: the engine's library or address is missing.
        ModelError: there is no such model.
    """
    from transformers import AutoModelForCausalLM

    if engine.engine == "server":
        return ServerGenerator(engine.server, source, sampling, engine.rows, engine.retries)
    folder = model_folder(source)
    if engine.engine == "vllm":
        return VllmGenerator(folder, sampling, runtime.seed)
    device = runtime.start()
    model = load_model(AutoModelForCausalLM, folder, dtype=runtime.torch_dtype())
    return LocalGenerator(model.to(device).eval(), load_tokenizer(folder), sampling, engine.rows)  # pyright: ignore


class VllmGenerator:
    """Completions by vLLM, whose cache shares prefixes among requests.

    Args:
        source: folder or hub id.
        sampling: how tokens are drawn; each completion has a seed of its own.
        seed: of the engine.
        options: for `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, source: str, sampling: Sampling, seed: int = 0, **options: Any) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "--engine vllm: is not installed; pip install 'mathshepherd[vllm]'"
            ) from None
        self.vllm, self.sampling = vllm, sampling
        self.model = vllm.LLM(model=source, enable_prefix_caching=True, seed=seed, **options)

    def __call__(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of each request, in its seeds' order."""
        sampling = self.sampling
        flat = [(request.text, seed) for request in requests for seed in request.seeds]
        settings = [
            self.vllm.SamplingParams(
                n=1, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed % 2**31,
                max_tokens=sampling.max_new_tokens, skip_special_tokens=False,
                spaces_between_special_tokens=False,
            )
            for _, seed in flat
        ]  # fmt: skip
        made = iter(self.model.generate([text for text, _ in flat], settings, use_tqdm=False))
        found = []
        for request in requests:
            outputs = [next(made).outputs[0] for _ in request.seeds]
            found.append(
                [
                    Completion(one.text, one.finish_reason == "stop", len(one.token_ids))
                    for one in outputs
                ]
            )
        return found


@dataclass(frozen=True)
class ServerGenerator:
    """Completions by a server with OpenAI's /v1/completions.

    Attributes:
        address: up to and with /v1.
        model: its name there.
        sampling: how tokens are drawn; each completion has a seed of its own.
        workers: requests at once.
        retries: of a request that fails.
    """

    address: str
    model: str
    sampling: Sampling
    workers: int = 32
    retries: int = 3

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
        answer = self._ask(json.dumps(body).encode())
        try:
            choice = answer["choices"][0]
            tokens = (answer.get("usage") or {}).get("completion_tokens") or len(
                choice["text"].split()
            )
            return Completion(choice["text"], choice["finish_reason"] == "stop", tokens)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ModelError(
                f"{self.address}: answered no completion: {str(answer)[:120]}"
            ) from None

    def _ask(self, body: bytes) -> Any:
        import time

        asked = urllib.request.Request(
            f"{self.address.rstrip('/')}/completions", body, {"Content-Type": "application/json"}
        )
        problem = ""
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(asked, timeout=600) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                words = error.read().decode(errors="replace")[:120]
                problem = f"refused a request ({error.code}: {words})"
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, ValueError) as error:
                problem = f"cannot be reached ({getattr(error, 'reason', error)})"
            if attempt < self.retries:
                time.sleep(min(0.2 * 2**attempt, 10))
        raise ModelError(f"{self.address}: {problem}")
