"""Reinforcement step by step: PPO whose reward stands at the end of every step (section 3.5).

Each iteration samples responses, scores their steps on the very tokens that were sampled, makes rewards
of tokens and advantages of them, and updates the policy a few times. Under torchrun or accelerate each
process samples and scores its share; all see the whole batch, so that one process gives the same
updates.
"""

import copy
import logging
import math
import random
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from octavo.console import counter
from octavo.errors import ConfigError, ModelError
from octavo.models import quiet_library
from octavo.rundir import RunDir, atomic
from octavo.runtime import Runtime, is_main, local_rank, rank, seed_everything, world_size
from torch import Tensor, nn

from mathshepherd.actor import (
    Actor,
    Critic,
    checkpoint_layers,
    take_weights,
    trained_weights,
)
from mathshepherd.aggregate import aggregate
from mathshepherd.answers import equivalent
from mathshepherd.config import PPOConfig, Shaping
from mathshepherd.generate import seed_of
from mathshepherd.lora import merged, narrow, with_adapter
from mathshepherd.monitor import Alarm, alarm
from mathshepherd.records import Problem
from mathshepherd.responses import Responder, Response, gathered
from mathshepherd.reward_model import StepRewardModel, pad
from mathshepherd.rewards import final_rewards, gae, grpo, reward_places, rloo, step_rewards, whiten
from mathshepherd.sample import Grader
from mathshepherd.steps import StepFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reinforced:
    """A trained policy.

    Attributes:
        policy: in evaluation mode.
        history: the checks, by iteration.
        stopped: why it stopped early; empty where it did not.
        iteration: the one whose policy this is; after an early stop the best one on held-out questions.
    """

    policy: Any
    history: list[dict[str, Any]]
    stopped: str
    iteration: int


def reinforce(
    policy: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    reward: StepRewardModel | None,
    run: RunDir,
    config: PPOConfig = PPOConfig(),
    shaping: Shaping = Shaping(),
    form: StepFormat = StepFormat(),
    runtime: Runtime = Runtime(),
    dev: Sequence[Problem] = (),
    limits: Alarm | None = Alarm(),
    grade: Grader = equivalent,
) -> Reinforced:
    """Train a policy on the rewards of its own steps; a run that was killed goes on from its checkpoint.

    Args:
        policy: changed in place.
        tokenizer: its own.
        problems: whose questions are answered; answers are needed for `answer_weight` alone.
        reward: process or outcome reward model; None for the answers' reward alone.
        run: gets the metrics, and the checkpoints meanwhile.
        config: the optimisation.
        shaping: scores to rewards; of an outcome model the last score is taken.
        form: how responses are written.
        runtime: seed, device, precision.
        dev: held-out questions the run is watched on.
        limits: when it is stopped; None for never.
        grade: tells a right answer.

    Raises:
        ConfigError: options do not fit each other.
        DataError: a question leaves no room for a response.
        ModelError: the policy's weights became NaN.
    """
    from accelerate import Accelerator

    _check(problems, reward, config, shaping)
    if reward is not None and reward.reading.scope == "outcome":
        shaping = replace(shaping, shaping="last")
    device = runtime.torch_device()
    seed_everything(runtime.seed)
    if runtime.torch_dtype() == torch.float16:
        raise ConfigError("--dtype float16: reinforcement needs bfloat16 or float32")
    if device.type == "cuda" and device.index != local_rank():
        raise ConfigError(f"--device {device}: set CUDA_VISIBLE_DEVICES={device.index} instead")
    accelerator = Accelerator(cpu=device.type == "cpu")
    trainer = _Trainer(
        policy, tokenizer, reward, run, config, shaping, form, runtime, grade, accelerator
    )
    first, history, best = trainer.resume()
    stopped = ""
    with counter("reinforcing", config.iterations, "iterations") as advance:
        advance(first)
        for iteration in range(first, config.iterations):
            if iteration % config.monitor_every == 0 and dev:
                stopped = trainer.check(iteration, dev, history, limits)
                best = trainer.keep_best(history, best, stopped)
                if stopped:
                    break
            trainer.iterate(iteration, problems)
            if (iteration + 1) % config.save_every == 0:
                trainer.save(iteration + 1, history, best)
            advance(1)
        else:
            if dev:
                stopped = trainer.check(config.iterations, dev, history, limits)
                best = trainer.keep_best(history, best, stopped)
    reached = history[-1]["iteration"] if history else config.iterations
    if stopped:
        log.warning("stopped: %s; iteration %d, the best one, is kept", stopped, best[0])
        trainer.restore_best()
        reached = best[0]
    if not all(weight.isfinite().all() for weight in policy.parameters()):
        raise ModelError("a weight of the policy became NaN or infinite; lower --learning-rate")
    return Reinforced(trainer.finished(), history, stopped, reached)


def _check(
    problems: Sequence[Problem], reward: StepRewardModel | None, config: PPOConfig, shaping: Shaping
) -> None:
    if reward is None and not shaping.answer_weight:
        raise ConfigError("there is no reward: name a --reward model, or give --answer-weight")
    if shaping.answer_weight and any(one.answer is None for one in problems):
        raise ConfigError("--answer-weight: some problems have no answer")
    if len(problems) < config.responses // config.group:
        raise ConfigError(
            f"--responses {config.responses}, --group {config.group}: need "
            f"{config.responses // config.group} questions, and there are {len(problems)}"
        )
    if (config.responses // config.group) % world_size() or config.batch_size % world_size():
        raise ConfigError(
            f"questions an iteration and --batch-size must be multiples of the {world_size()} processes"
        )


class _Trainer:
    """One run's models and optimiser."""

    def __init__(
        self, policy: Any, tokenizer: Any, reward: StepRewardModel | None, run: RunDir,
        config: PPOConfig, shaping: Shaping, form: StepFormat, runtime: Runtime, grade: Grader,
        accelerator: Any,
    ) -> None:  # fmt: skip
        self.reward, self.run, self.config, self.shaping = reward, run, config, shaping
        self.seed, self.accelerator = runtime.seed, accelerator
        device = accelerator.device
        half = runtime.torch_dtype() == torch.bfloat16
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)
        policy.to(device)
        self.reference = None
        if config.lora_rank:
            policy = with_adapter(policy, config.lora_rank)
        elif config.kl:
            frozen = copy.deepcopy(policy).eval().requires_grad_(False)
            self.reference = Actor(frozen, False)
            narrow(frozen, runtime.torch_dtype())
        self.policy = policy.eval()
        self.responder = Responder(
            policy,
            tokenizer,
            reward,
            form,
            config.max_new_tokens,
            config.rows,
            grade,
            self.autocast,
        )
        shared = config.advantage == "gae" and config.critic == "shared"
        self.actor: Any = Actor(policy, shared)
        self.critic: Any = None
        groups: list[dict[str, Any]] = [{"params": _trained(self.actor)}]
        if config.advantage == "gae" and not shared:
            judge = reward.model if reward is not None and self.responder.same_tokens else None
            model = copy.deepcopy(judge or policy).to(device)
            if not config.lora_rank:
                model = model.float().requires_grad_(True)
            elif judge is not None:  # the policy has an adapter already
                model = with_adapter(model, config.lora_rank)
            self.critic = Critic(model)
            rate = config.critic_learning_rate or config.learning_rate
            groups.append({"params": _trained(self.critic), "lr": rate})
        if config.lora_rank:
            for module in filter(None, (self.actor, self.critic)):
                narrow(module, runtime.torch_dtype())
        self.optimizer: Any = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
        if config.gradient_checkpointing:
            for module in filter(None, (self.actor, self.critic)):
                checkpoint_layers(module)
        if reward is not None:
            reward.to(device).eval().requires_grad_(False)
        if world_size() > 1:
            self.actor = accelerator.prepare(self.actor)
            self.critic = self.critic and accelerator.prepare(self.critic)
            self.optimizer = accelerator.prepare(self.optimizer)
        self.last: dict[str, float] = {}

    # One iteration

    def iterate(self, iteration: int, problems: Sequence[Problem]) -> None:
        """Sample, score, update."""
        config = self.config
        asked = _drawn(problems, config.responses // config.group, iteration, self.seed)
        share = list(range(len(asked)))[rank() :: world_size()]
        made = self.responder(
            [asked[n] for n in share], config.group, config.temperature,
            [[seed_of("ppo", self.seed, iteration, n, k) for k in range(config.group)] for n in share],
        )  # fmt: skip
        self.judge_tokens(made)
        rows = gathered(made, config.group)
        batch = self.batch(rows)
        self.last = self.update(iteration, rows, batch) | self.summary(rows, batch)
        self.run.log(iteration=iteration + 1, **self.last)

    @torch.no_grad()
    def judge_tokens(self, responses: Sequence[Response]) -> None:
        """Log-probabilities under the policy and the reference, and values."""
        config = self.config
        for start in range(0, len(responses), config.micro_batch_size):
            part = responses[start : start + config.micro_batch_size]
            bootstrap = config.truncated == "bootstrap"
            ids, mask, places, tokens, _ = self._tensors(part, behind=bootstrap)
            with self.autocast():
                old, _, values = self._plain(self.actor)(
                    ids, mask, places, tokens, config.temperature
                )
                reference = old
                if config.kl and self.config.lora_rank:
                    with self.policy.disable_adapter():
                        reference = self._plain(self.actor)(
                            ids, mask, places, tokens, config.temperature
                        )[0]
                elif self.reference is not None:
                    reference = self.reference(ids, mask, places, tokens, config.temperature)[0]
                if self.critic is not None:
                    values = self._plain(self.critic)(ids, mask, places)
            for n, one in enumerate(part):
                size = len(one.ids)
                one.old, one.reference = old[n, :size].cpu(), reference[n, :size].cpu()
                if values is not None:
                    one.values = values[n, :size].float().cpu()
                    if bootstrap and not one.finished:
                        one.behind = float(values[n, size])

    def _plain(self, module: Any) -> Any:
        return self.accelerator.unwrap_model(module)

    def _tensors(
        self, rows: Sequence[Response], behind: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens and mask, where each response's tokens are predicted, these tokens, and their mask.

        With `behind` there is one place more: where a token behind the last one would be predicted.
        """
        ids, mask = pad([one.prompt + one.ids for one in rows], self.accelerator.device)
        starts = torch.tensor([len(one.prompt) for one in rows], device=ids.device)
        sizes = torch.tensor([len(one.ids) for one in rows], device=ids.device)
        steps = torch.arange(int(sizes.max()) + behind, device=ids.device)
        there = steps < sizes[:, None]
        places = (starts[:, None] + steps - 1).clamp(max=ids.shape[1] - 1)
        tokens = ids.gather(1, (places + 1).clamp(max=ids.shape[1] - 1))
        return ids, mask, places, tokens, there

    def rewards(self, rows: Sequence[Response]) -> Float[Tensor, "rows length"]:
        """Rewards of the responses' tokens, without the divergence's."""
        sizes = torch.tensor([len(one.ids) for one in rows])
        scores = _padded([torch.tensor(one.scores) for one in rows], 0.0)
        ends = _padded([torch.tensor(one.ends, dtype=torch.long) for one in rows], -1)
        rewards = torch.zeros(len(rows), int(sizes.max()))
        if self.reward is not None:
            rewards = step_rewards(scores, ends, rewards.shape[1], self.shaping)
        goes_on = self.config.truncated == "bootstrap"
        right = [one.right for one in rows]
        answered = [one.answered or (goes_on and not one.finished) for one in rows]
        return final_rewards(rewards, sizes, right, answered, self.shaping)

    def batch(self, rows: Sequence[Response]) -> dict[str, Tensor]:
        """What the updates need of all responses [rows, length]; the mask is of what they learn from."""
        config = self.config
        sizes = torch.tensor([len(one.ids) for one in rows])
        length = int(sizes.max())
        mask = torch.arange(length) < sizes[:, None]
        ends = _padded([torch.tensor(one.ends, dtype=torch.long) for one in rows], -1)
        old, reference = (
            _padded([one.old for one in rows]),
            _padded([one.reference for one in rows]),
        )
        rewards = self.rewards(rows)
        task = rewards.sum(1)
        distance = (old - reference) * mask
        if not config.kl_in_loss:
            rewards = rewards - config.kl * distance
        finished = torch.tensor([one.finished for one in rows])
        used = mask & finished[:, None] if config.truncated == "drop" else mask
        found = {
            "mask": used,
            "old": old,
            "reference": reference,
            "task": task,
            "kl": distance.sum(1),
        }
        if config.advantage == "gae":
            values = _padded([one.values for one in rows])
            behind = torch.tensor([one.behind for one in rows])
            advantages = gae(rewards, values, mask, config.gamma, config.lam, behind)
            found |= {"values": values, "returns": advantages + values}
        elif config.advantage == "rloo":
            advantages = rloo(rewards, config.group, config.gamma)
        else:
            scored = self.reward is not None
            answered = [one.answered for one in rows]
            places = reward_places(ends, sizes, length, answered, self.shaping, scored)
            advantages = grpo(rewards, places, config.group)
        found["advantages"] = whiten(advantages, used) if config.advantage != "grpo" else advantages
        return found

    def update(
        self, iteration: int, rows: Sequence[Response], batch: dict[str, Tensor]
    ) -> dict[str, float]:
        """Pass over the responses in shuffled batches; each process takes its part of every batch."""
        config, sums, count = self.config, {}, 0
        draw = random.Random(f"ppo {self.seed} {iteration}")
        for _ in range(config.epochs):
            order = draw.sample(range(len(rows)), len(rows))
            moved = []
            for start in range(0, len(order), config.batch_size):
                chosen = order[start : start + config.batch_size]
                found = self._step(chosen[rank() :: world_size()], chosen, rows, batch)
                if not found:
                    continue
                moved.append(found["moved"])
                count += 1
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
            if not moved or (config.target_kl and _mean(moved) > config.target_kl):
                break
        if not count:
            log.warning(
                "iteration %d: every response was cut off, and none learnt from", iteration + 1
            )
        return {name: value / count for name, value in sums.items()}

    def _step(
        self,
        mine: Sequence[int],
        chosen: Sequence[int],
        rows: Sequence[Response],
        batch: dict[str, Tensor],
    ) -> dict[str, float]:
        """One update, or nothing where all of it was cut off and is left out.

        Each token of the whole batch counts the same, on whichever process it is.
        """
        names = ("policy_loss", "value_loss", "entropy", "moved")
        config, device = self.config, self.accelerator.device
        total = float(batch["mask"][list(chosen)].sum())
        if not total:
            return {}
        sums = torch.zeros(4, device=device)
        parts = [
            mine[a : a + config.micro_batch_size]
            for a in range(0, len(mine), config.micro_batch_size)
        ]
        for number, part in enumerate(parts):
            ids, mask, places, tokens, there = self._tensors([rows[n] for n in part])
            size = there.shape[1]
            known = {name: values[list(part), :size].to(device) for name, values in batch.items()
                     if values.ndim == 2}  # fmt: skip
            wait = number < len(parts) - 1 and world_size() > 1
            with self.actor.no_sync() if wait else nullcontext():
                with self.autocast():
                    new, entropy, values = self.actor(ids, mask, places, tokens, config.temperature)
                    if self.critic is not None:
                        values = self.critic(ids, mask, places)
                loss, found = ppo_loss(new, entropy, values, known, known["mask"], config)
                # processes' gradients are averaged
                (loss / total * world_size()).backward()
            sums += found.detach()
        trained = [one for group in self.optimizer.param_groups for one in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if not math.isfinite(float(norm)):
            raise ModelError(
                "a gradient of the policy became NaN or infinite; lower --learning-rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        sums = self.accelerator.reduce(sums) if world_size() > 1 else sums
        return dict(zip(names, (sums / total).tolist(), strict=True))

    def summary(self, rows: Sequence[Response], batch: dict[str, Tensor]) -> dict[str, float]:
        """What the responses of an iteration are like."""
        known = [one.right for one in rows if one.right is not None]
        found = {
            "reward": float(batch["task"].mean()), "kl": float(batch["kl"].mean()),
            "steps": _mean(len(one.ends) for one in rows), "tokens": _mean(len(one.ids) for one in rows),
            "no_answer": _mean(not one.answered for one in rows),
        }  # fmt: skip
        return found | ({"accuracy": _mean(map(bool, known))} if known else {})

    # Watching, saving

    def check(
        self,
        iteration: int,
        dev: Sequence[Problem],
        history: list[dict[str, Any]],
        limits: Alarm | None,
    ) -> str:
        """Greedy responses on held-out questions, into the history; why to stop, or nothing."""
        share = list(dev)[rank() :: world_size()]
        made = self.responder(share, 1, 0.0, [[0]] * len(share))
        rows = gathered(made, 1, len(dev))
        known = [one.right for one in rows if one.right is not None]
        how = "last" if self.reward and self.reward.reading.scope == "outcome" else "min"
        scored = [aggregate(np.array(one.scores), how) if one.scores else 0.0 for one in rows]
        accuracy = _mean(map(bool, known)) if known else None
        judged = _mean(scored) if self.reward is not None else None
        found = {
            "iteration": iteration, "accuracy": accuracy, "judged": judged,
            "gap": None if judged is None or accuracy is None else judged - accuracy,
            "reward": float(self.rewards(rows).sum(1).mean()), "kl": self.last.get("kl", 0.0),
            "kl a token": self._apart(),
            "entropy": self.last.get("entropy"), "steps": _mean(len(one.ends) for one in rows),
            "tokens": _mean(len(one.ids) for one in rows),
            "no answer": _mean(not one.answered for one in rows),
        }  # fmt: skip
        history.append(found)
        self.run.log(check=iteration, **{k: v for k, v in found.items() if k != "iteration"})
        return alarm(history, limits) if limits else ""

    def _apart(self) -> float | None:
        """How far the policy is from the reference, in nats a token; unknown without a reference."""
        if not self.config.kl or "kl" not in self.last:
            return None
        return self.last["kl"] / max(self.last["tokens"], 1.0)

    def keep_best(
        self, history: Sequence[dict[str, Any]], best: tuple[int, float], stopped: str
    ) -> tuple[int, float]:
        """Save the policy where its last check is the best so far; later ones win among equals.

        Without known answers that is the last check that raised no alarm.
        """
        last = history[-1]
        value = last["accuracy"] if last["accuracy"] is not None else -math.inf
        hacked = stopped and last["accuracy"] is None
        if hacked or value < best[1]:
            return best
        self._write("best.pt", {"actor": trained_weights(self._plain(self.actor))})
        return last["iteration"], value

    def restore_best(self) -> None:
        """Take the policy back that did best on the held-out questions."""
        saved = torch.load(
            self._folder() / "best.pt", map_location=self.accelerator.device, weights_only=True
        )
        take_weights(self._plain(self.actor), saved["actor"])

    def save(self, done: int, history: list[dict[str, Any]], best: tuple[int, float]) -> None:
        """Write everything that the next iteration needs, but for weights that stay as they were."""
        content = {"actor": trained_weights(self._plain(self.actor)),
                   "optimizer": self.optimizer.state_dict(), "done": done, "history": history,
                   "best": list(best), "last": self.last}  # fmt: skip
        if self.critic is not None:
            content["critic"] = trained_weights(self._plain(self.critic))
        self._write("last.pt", content)

    def resume(self) -> tuple[int, list[dict[str, Any]], tuple[int, float]]:
        """Iterations done, the history and the best check of a run that was killed."""
        file = self._folder() / "last.pt"
        if not file.is_file():
            self.run.forget(lambda line: "iteration" not in line and "check" not in line)
            return 0, [], (-1, -math.inf)
        saved = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        take_weights(self._plain(self.actor), saved["actor"])
        if self.critic is not None:
            take_weights(self._plain(self.critic), saved["critic"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.last, done = saved["last"], saved["done"]
        self.run.forget(
            lambda line: line.get("iteration", 0) <= done and line.get("check", 0) < done
        )
        log.info("resumed after iteration %d", done)
        return done, saved["history"], tuple(saved["best"])  # pyright: ignore

    def _folder(self) -> Path:
        return self.run.path / "checkpoints" / "ppo"

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if is_main():
            with atomic(self._folder() / name) as temporary, quiet_library():
                torch.save(content, temporary)
        self.accelerator.wait_for_everyone()

    def finished(self) -> Any:
        """The policy, an adapter merged into it."""
        policy = self._plain(self.actor).model
        if self.config.gradient_checkpointing:
            checkpoint_layers(policy, False)
        return (merged(policy) if self.config.lora_rank else policy).eval()


def ppo_loss(
    new: Float[Tensor, "rows length"], entropy: Float[Tensor, "rows length"], values: Tensor | None,
    known: dict[str, Tensor], mask: Bool[Tensor, "rows length"], config: PPOConfig,
) -> tuple[Float[Tensor, ""], Float[Tensor, " 4"]]:  # fmt: skip
    """Clipped surrogate, and the critic's clipped loss, as sums over tokens (Schulman et al. 2017).

    Args:
        new: log-probabilities under the policy as it is now.
        entropy: of its predictions.
        values: the critic's now; None without one.
        known: `old`, `reference` and `advantages` of the tokens, with a critic `values` and `returns`.
        mask: where there is a token.
        config: clipping and weights.

    Returns:
        The loss; and sums of the policy's loss, the critic's, the entropy, and how far the policy has
        moved from the sampling one (KL, k3 estimate).
    """
    shift = torch.where(mask, new - known["old"], 0.0)
    ratio = shift.exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    surrogate = -torch.minimum(ratio * known["advantages"], clipped * known["advantages"])
    loss = policy_loss = (surrogate * mask).sum()
    value_loss = torch.zeros((), device=new.device)
    if values is not None:
        near = known["values"] + (values - known["values"]).clamp(-config.clip, config.clip)
        worst = torch.maximum((values - known["returns"]) ** 2, (near - known["returns"]) ** 2)
        value_loss = 0.5 * (worst * mask).sum()
        loss = loss + config.value_weight * value_loss
    if config.kl_in_loss:
        apart = torch.where(mask, known["reference"] - new, 0.0)
        loss = loss + config.kl * (apart.exp() - 1 - apart).sum()
    moved = ((-shift).exp() - 1 + shift).sum()
    return loss, torch.stack([policy_loss, value_loss, (entropy * mask).sum(), moved])


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [one for one in module.parameters() if one.requires_grad]


def _drawn(problems: Sequence[Problem], count: int, iteration: int, seed: int) -> list[Problem]:
    """The questions of an iteration: all are asked before one is asked again."""
    each = len(problems) // count
    order = random.Random(f"questions {seed} {iteration // each}").sample(
        list(problems), len(problems)
    )
    begin = iteration % each * count
    return order[begin : begin + count]


def _padded(rows: Sequence[Tensor], value: float = 0.0) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(sum(found) / len(found)) if found else 0.0
