"""The loop, several times: the reinforced policy is sampled, labelled and judged anew.

The authors leave it as future work, since after PPO the reward model has gone stale (their Table 3): it
has never seen the new policy's solutions.
"""

from pathlib import Path
from typing import Any

from octavo.rundir import RunDir, is_finished, options_of
from octavo.runtime import Runtime
from octavo.training import TrainOptions

from mathshepherd import stations
from mathshepherd.config import (
    AnnotateConfig,
    Engine,
    PPOConfig,
    RewardConfig,
    Sampling,
    Shaping,
)
from mathshepherd.monitor import Alarm
from mathshepherd.steps import StepFormat

Tables = dict[str, list[dict[str, Any]]]


def rounds(
    run: RunDir, source: str, data: str, dev_data: str | None, count: int, samples: int,
    pool: Sampling, sampling: Sampling, labels: AnnotateConfig, reward: RewardConfig,
    options: TrainOptions, config: PPOConfig, shaping: Shaping, form: StepFormat, runtime: Runtime,
    limits: Alarm | None = Alarm(), limit: int = 0,
) -> tuple[Tables, str]:  # fmt: skip
    """Sample, label, train a reward model and reinforce, `count` times, each time from the last policy.

    Each station leaves a run of its own in `round-N`; a killed run goes on with the one it was at.

    Args:
        run: the folder of all.
        source: the generator to begin with.
        data: problems with answers.
        dev_data: held-out ones that reinforcement is watched on.
        count: of rounds.
        samples: solutions of each problem that are labelled, in each round.
        pool: how these are drawn.
        sampling: how completions are drawn.
        labels: how steps are labelled.
        reward: what the reward model learns.
        options: its training.
        config: reinforcement.
        shaping: scores to rewards.
        form: how solutions are written.
        runtime: seed, device, precision.
        limits: when a reinforcement is stopped, and with it the rounds.
        limit: the first so many problems.

    Returns:
        A table of the rounds, and why the last reinforcement was stopped, where it was.
    """
    rows: list[dict[str, Any]] = []
    policy, stopped = source, ""
    given = options_of(pool, sampling, labels, reward, options, config, shaping, form, runtime)
    for number in range(1, count + 1):
        place = run.path / f"round-{number}"

        def station(name: str, work: Any, place: Path = place, policy: str = policy) -> None:
            folder = place / name
            if is_finished(folder):
                return
            with RunDir.open(folder, given | {"policy": policy}) as one:
                found = work(one)
                tables, why = found if isinstance(found, tuple) else (found, "")
                one.write_json("result.json", {"command": name, "tables": tables, "stopped": why})

        station("pool", lambda one, policy=policy: stations.sample(
            one, policy, data, samples, pool, form, runtime, Engine(), limit))  # fmt: skip
        station("labels", lambda one, policy=policy, place=place: stations.annotate(
            one, policy, [str(place / "pool")], labels, sampling, form, runtime))  # fmt: skip
        station("prm", lambda one, policy=policy, place=place: stations.train(
            one, policy, [str(place / "labels")], "steps", reward, options, form, runtime,
            lora_rank=config.lora_rank))  # fmt: skip
        station("ppo", lambda one, policy=policy, place=place: stations.ppo(
            one, policy, str(place / "prm"), data, dev_data, config, shaping, form, runtime, limits,
            limit))  # fmt: skip
        results = {name: stations.result_of(place / name) for name in ("pool", "labels", "ppo")}
        checks = results["ppo"]["tables"]["Checks"]
        rows.append({
            "round": number, "right, sampled": results["pool"]["tables"]["Solutions"][0]["right"],
            "good steps": results["labels"]["tables"]["Labels"][0]["good"],
            "accuracy before": checks[0]["accuracy"] if checks else None,
            "accuracy after": checks[-1]["accuracy"] if checks else None,
        })  # fmt: skip
        policy, stopped = str(place / "ppo"), results["ppo"]["stopped"]
        if stopped:
            break
    return {"Rounds": rows}, stopped
