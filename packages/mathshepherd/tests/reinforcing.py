"""A very small reinforcement, and its runs in other processes: two at once, and one that is killed.

    python reinforcing.py FOLDER

Everything is imported once; processes are forked from here, and find each other over loopback.
"""

import copy
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
from mathshepherd import sft, shop
from mathshepherd.config import PPOConfig
from mathshepherd.ppo import reinforce
from mathshepherd.reward_model import Reading, StepRewardModel
from octavo.rundir import RunDir
from octavo.runtime import Runtime

assert transformers.models.llama.modeling_llama
SHOP = shop.Shop(events=(1, 2), highest=9, operand=3)
WORLD = shop.make_world(SHOP, 0, 16, 0, 3, seed=0)
TOKENIZER = shop.make_tokenizer(SHOP)
RUNTIME = Runtime(device="cpu")

#: Runs that are compared among one and two processes.
RUNS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"critic": "shared", "group": 2, "kl_in": "loss"},
    "lora": {"lora_rank": 2},
}


def make_model(seed: int = 0) -> Any:
    """A model that is sure of something, whatever that is."""
    model = shop.make_model(TOKENIZER, seed, layers=1, width=16).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def taught(rows: Sequence[tuple[str, Sequence[str]]], steps: int) -> Any:
    """A model that has seen some solutions."""
    model: Any = shop.make_model(TOKENIZER, 0, layers=1, width=16).eval()
    batch = sft.collate(0)([sft.encode_solution(TOKENIZER, shop.FORMAT, *row) for row in rows])
    adam = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        (sft.solution_loss(model, batch) / (batch["labels"] != sft.IGNORED).sum()).backward()
        adam.step()
        adam.zero_grad()
    return model


@cache
def _policy() -> Any:
    return taught(sft.worked(WORLD.pool, shop.FORMAT), 40)


def make_policy() -> Any:
    """A model that writes steps, and comes to an end more often than not."""
    return copy.deepcopy(_policy())


def make_reward(scope: Any = "steps") -> StepRewardModel:
    return StepRewardModel(make_model(7), TOKENIZER, Reading(form=shop.FORMAT, scope=scope)).eval()


def options(**changes: Any) -> PPOConfig:
    small: dict[str, Any] = {
        "iterations": 2, "responses": 8, "batch_size": 4, "micro_batch_size": 1, "max_new_tokens": 12,
        "learning_rate": 1e-3, "monitor_every": 1, "save_every": 2, "target_kl": 0.0,
    }  # fmt: skip
    return PPOConfig(**small | changes)


def train(run: RunDir, policy: Any = None, **changes: Any) -> Any:
    """Reinforce, by scores of steps on questions of the shop unless told otherwise."""
    given: dict[str, Any] = {
        "problems": WORLD.pool, "reward": make_reward(), "form": shop.FORMAT, "runtime": RUNTIME,
        "dev": WORLD.dev, "limits": None,
    }  # fmt: skip
    given |= {name: changes.pop(name) for name in (*given, "shaping", "grade") if name in changes}
    return reinforce(
        make_policy() if policy is None else policy, TOKENIZER, given.pop("problems"),
        given.pop("reward"), run, options(**changes), **given,
    )  # fmt: skip


def two(folder: Path) -> None:
    """One of two processes, each with a folder of its own, of which the first alone writes."""
    place = folder / f"rank-{os.environ['RANK']}"
    for name, changes in RUNS.items():
        found = train(RunDir.open(place / name, {}), **changes)
        torch.save([found.policy.state_dict(), found.history], folder / f"{name}-{place.name}.pt")
    torch.distributed.destroy_process_group()


#: What is killed, in its fifth iteration, and what it is compared with.
EVERY_TWO = {"iterations": 6, "monitor_every": 2, "save_every": 2, "micro_batch_size": 4}
KILLED: dict[str, dict[str, Any]] = {
    "killed": EVERY_TWO,
    "killed-lora": EVERY_TWO | {"lora_rank": 2},
}


def dies(name: str, folder: Path) -> None:
    """A run that is killed behind its second checkpoint."""
    plain = RunDir.log

    def log(self: RunDir, **metrics: Any) -> None:
        plain(self, **metrics)
        if metrics.get("iteration") == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    RunDir.log = log
    train(RunDir.open(folder / name, {}), **KILLED[name])


def leave(code: int) -> None:
    """End at once: to tear all modules down takes seconds. What coverage found is kept."""
    if "coverage" in sys.modules and (found := sys.modules["coverage"].Coverage.current()):
        found.stop()
        found.save()
    sys.stderr.flush()
    os._exit(code)


def start(job: Any, folder: Path, rank: int = 0, count: int = 1, port: int = 0) -> int:
    """Fork a process for a job; gives its id."""
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    try:
        job(folder)
        leave(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        leave(1)
    return 0


def main(folder: Path) -> None:
    make_policy()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(two, folder, rank, 2, port) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for name in KILLED:
        child = start(partial(dies, name), folder)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes == [0, 0, -signal.SIGKILL, -signal.SIGKILL], codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
