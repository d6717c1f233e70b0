"""What each stage can be told; the defaults are what works best."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from octavo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are drawn."""

    temperature: float = 0.7
    """Of the softmax; 0 takes the likeliest token."""

    top_p: float = 1.0
    """Least probability mass that a token is drawn from, the likeliest tokens first."""

    max_new_tokens: int = 512
    """Tokens in the longest continuation."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature}: must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0, and 1 at most")
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What makes completions."""

    engine: Literal["local", "vllm", "server"] = "local"
    """local: in this process; vllm: with the extra [vllm]; server: any with the /v1/completions of
    OpenAI's (vLLM, SGLang, llama.cpp ...), whose model MODEL then names."""

    server: str = ""
    """Its address, like http://localhost:8000/v1; a key is taken from OPENAI_API_KEY."""

    rows: int = 256
    """Completions made at once."""

    retries: int = 3
    """Times that a request to the server is repeated when it fails."""

    tensor_parallel: int = 1
    """Devices that vLLM splits the model over."""

    gpu_memory: float = 0.9
    """Share of a device's memory that vLLM takes; less where a reward model lies on it too."""

    max_model_len: int = 0
    """Tokens of a text and its completion that vLLM makes room for; 0 for the model's own context."""

    def __post_init__(self) -> None:
        _check(
            self, rows=(1, None, False), retries=(0, None, False),
            tensor_parallel=(1, None, False), max_model_len=(0, None, False),
        )  # fmt: skip
        if not 0 < self.gpu_memory <= 1:
            raise ConfigError(f"--gpu-memory {self.gpu_memory}: must be above 0, and 1 at most")
        if (self.tensor_parallel, self.max_model_len) != (1, 0) and self.engine != "vllm":
            raise ConfigError("--tensor-parallel, --max-model-len: are of --engine vllm alone")
        if bool(self.server) != (self.engine == "server"):
            raise ConfigError("--engine server and --server ADDRESS go together")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a reward model guides a search over steps."""

    beams: int = 4
    """Beginnings that are gone on from."""

    width: int = 4
    """Ways on from each of them, at every step; beams times width is the N of best-of-N."""

    aggregate: Literal["min", "prod", "mean", "last", "geometric"] = "min"
    """Step scores to a beginning's score."""

    max_steps: int = 40
    """Steps of the longest solution; its tokens are limited by --max-new-tokens."""

    def __post_init__(self) -> None:
        _check(self, beams=(1, None, False), width=(1, None, False), max_steps=(1, None, False))

    def ways(self, depth: int) -> int:
        """Ways on from a beginning of so many steps: all there are from the only one at first."""
        return self.width if depth else self.width * self.beams


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """How steps are labelled."""

    rollouts: int = 8
    """Completions of each step, N."""

    estimation: Literal["hard", "soft", "both"] = "hard"
    """hard stops at the first hit, with the same label; soft and both make all N."""

    schedule: tuple[int, ...] = ()
    """Completions in each round, N in all: --schedule 1 --schedule 1 --schedule 2 --schedule 4; by
    default doubling."""

    strategy: Literal["linear", "binary"] = "linear"
    """linear labels each step by its own completions; binary searches for the first bad step of wrong
    solutions and calls right ones good throughout (not the paper's labels, and fewer completions)."""

    def __post_init__(self) -> None:
        if self.rollouts < 1:
            raise ConfigError(f"--rollouts {self.rollouts}: must be 1 or more")
        if self.schedule and (sum(self.schedule) != self.rollouts or min(self.schedule) < 1):
            raise ConfigError(
                f"--schedule {list(self.schedule)}: must be numbers of 1 or more that make "
                f"--rollouts {self.rollouts}"
            )
        if self.strategy == "binary" and self.estimation != "hard":
            raise ConfigError("--strategy binary: gives hard labels alone; use --estimation hard")

    def rounds(self) -> tuple[int, ...]:
        """Completions of each prefix in each round: 1, 1, 2, 4 and so on, or all at once."""
        if self.schedule:
            return self.schedule
        if self.estimation != "hard":
            return (self.rollouts,)
        sizes = [1]
        while (made := sum(sizes)) < self.rollouts:
            sizes.append(min(made, self.rollouts - made))
        return tuple(sizes)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a reward model learns."""

    labels: Literal["hard", "soft"] = "hard"
    """hard (0 or 1, Eq. 3) or soft (shares, Eq. 4)."""

    until_first_error: bool = False
    """Leave the steps behind the first bad one out."""

    positive_weight: float = 1.0
    """How many times a good step counts."""

    label_smoothing: float = 0.0
    """Moves each label this far towards one half: 0.1 makes 0.95 of 1 and 0.05 of 0."""

    supervise: Literal["last", "all"] = "last"
    """Of an outcome model: the last tag, or all of them with the outcome."""

    max_length: int = 512
    """Tokens; longer solutions are left out and counted, never cut."""

    def __post_init__(self) -> None:
        if not self.positive_weight > 0:
            raise ConfigError(f"--positive-weight {self.positive_weight}: must be above 0")
        _check(self, label_smoothing=(0, 1, False))
        if self.max_length < 2:
            raise ConfigError(f"--max-length {self.max_length}: must be 2 or more")


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """How scores of steps become rewards of tokens; where the paper is silent, our reading."""

    shaping: Literal["raw", "center", "delta", "clip", "min", "last"] = "delta"
    """raw: the score p_k, so that every further step pays; center: p_k - c; delta: p_k - p_(k-1); clip:
    min(p_k - eta, 0); min: weighted towards the worst step; last: the last step's alone."""

    prior: float = 0.5
    """Score before the first step, for delta."""

    offset: float = 0.5
    """c of center and min."""

    eta: float = 0.8
    """Of clip."""

    tau: float = 0.1
    """Temperature of min's weights."""

    answer_weight: float = 0.0
    """Reward of a right final answer, at the last token; needs problems with answers."""

    missing_penalty: float = 1.0
    """Taken off where a response has no answer, or no end."""

    def __post_init__(self) -> None:
        _check(self, tau=(0, None, True))


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Step-by-step PPO; the paper gives KL 0.04 and a learning rate of 4e-7 for 7B models."""

    iterations: int = 100
    """Rounds of sampling and updating."""

    responses: int = 256
    """Responses in each, over all processes."""

    group: int = 1
    """Responses of the same question; rloo and grpo need 2 or more."""

    epochs: int = 2
    """Passes over each iteration's responses."""

    batch_size: int = 64
    """Responses in one update, over all processes."""

    micro_batch_size: int = 8
    """Responses in one pass of a process; bounds memory, changes nothing else."""

    rows: int = 256
    """Responses sampled at once; bounds memory, changes nothing else."""

    learning_rate: float = 1e-6
    """Of Adam, constant."""

    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae with a critic; rloo and grpo compare responses of one question, without a critic."""

    critic: Literal["shared", "separate"] = "separate"
    """A model of its own, begun as the reward model (or the policy), or a head on the policy."""

    critic_learning_rate: float = 0.0
    """Of a separate critic; 0 for the policy's."""

    value_weight: float = 0.1
    """Of the critic's loss."""

    gamma: float = 1.0
    """Discount a token."""

    lam: float = 0.95
    """GAE's lambda."""

    clip: float = 0.2
    """Of the probability ratio, and of the values' change."""

    kl: float = 0.04
    """Weight of the divergence from the reference policy; 0 does without one."""

    kl_in: Literal["reward", "loss"] = "reward"
    """Taken off the tokens' rewards, or added to the loss (k3 estimate), as grpo always does: it
    compares steps, and most tokens end none."""

    target_kl: float = 0.1
    """An iteration's updates end when the policy has moved so far from the sampling one; 0: never."""

    temperature: float = 1.0
    """Of the sampling."""

    max_new_tokens: int = 512
    """Tokens in the longest response."""

    truncated: Literal["penalty", "bootstrap", "drop"] = "penalty"
    """A response without an end is worth nothing more and pays the missing penalty; or goes on with
    the critic's value of its last state (bootstrap, of gae alone); or is left out of the updates, if
    not of the responses that those of its question are compared with (drop)."""

    monitor_every: int = 4
    """Iterations between two checks on held-out questions."""

    save_every: int = 4
    """Iterations between two checkpoints to resume from."""

    lora_rank: int = 0
    """Train an adapter of this rank instead of all weights, the critic's too; the reference is the
    model without it."""

    gradient_checkpointing: bool = False
    """Compute activations twice, and keep few of them; changes nothing else."""

    @property
    def kl_in_loss(self) -> bool:
        """Whether the divergence is in the loss."""
        return self.kl > 0 and (self.kl_in == "loss" or self.advantage == "grpo")

    def __post_init__(self) -> None:
        _check(
            self, iterations=(1, None, False), responses=(1, None, False), group=(1, None, False),
            epochs=(1, None, False), batch_size=(1, None, False),
            micro_batch_size=(1, None, False), rows=(1, None, False),
            learning_rate=(0, None, True), critic_learning_rate=(0, None, False),
            value_weight=(0, None, False), gamma=(0, 1, False), lam=(0, 1, False), clip=(0, None, True),
            kl=(0, None, False), target_kl=(0, None, False), temperature=(0, None, True),
            max_new_tokens=(1, None, False), monitor_every=(1, None, False),
            save_every=(1, None, False), lora_rank=(0, None, False),
        )  # fmt: skip
        if self.advantage != "gae" and self.group < 2:
            raise ConfigError(f"--advantage {self.advantage}: compares a --group of 2 or more")
        if self.truncated == "bootstrap" and self.advantage != "gae":
            raise ConfigError("--truncated bootstrap: needs the critic of --advantage gae")
        if self.responses % self.group:
            raise ConfigError(
                f"--responses {self.responses}: must be a multiple of --group {self.group}"
            )


def _check(config: Any, **bounds: tuple[float, float | None, bool]) -> None:
    """Refuse numbers below the first bound (or at it, where that is open) and above the second."""
    for name, (least, most, is_open) in bounds.items():
        value = getattr(config, name)
        if not math.isfinite(value) or value < least or (is_open and value == least):
            what = f"above {least}" if is_open else f"{least} or more"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {what}, and finite")
        if most is not None and value > most:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {most} at most")
