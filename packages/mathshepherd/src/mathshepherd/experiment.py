"""One seed of the demo: each of its methods is a station of the method, on the toy shop."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from octavo.models import load_model
from octavo.rundir import RunDir, write_text
from octavo.runtime import Runtime
from octavo.training import TrainOptions, discard_checkpoints

from mathshepherd import shop, stations, verify
from mathshepherd.annotate import RolloutStore, annotate
from mathshepherd.config import AnnotateConfig, PPOConfig, RewardConfig, Sampling, Shaping
from mathshepherd.generate import LocalGenerator
from mathshepherd.monitor import Alarm, ever_alarmed
from mathshepherd.ppo import reinforce
from mathshepherd.quality import label_quality, quality_by_rollouts
from mathshepherd.records import ROWS, Solution, with_scores, write_solutions
from mathshepherd.report import steps_page
from mathshepherd.reward_model import Reading, StepRewardModel, score_solutions
from mathshepherd.sample import sample_solutions
from mathshepherd.sft import finetune, right_solutions
from mathshepherd.shop import FORMAT, Shop, World, make_world
from mathshepherd.train_rm import train_reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Ways to pick among candidates: a score and an aggregate.
METHODS = {"PRM min": ("prm", "min"), "PRM prod": ("prm", "prod"), "PRM last": ("prm", "last"),
           "ORM": ("orm", "last")}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The sizes of one profile.

    Attributes:
        shop: the world.
        demonstrations: to fine-tune on.
        pool: problems whose solutions are labelled.
        test: problems to verify on.
        dev: problems that reinforcement is watched on.
        sft: the fine-tuning.
        reward: training of the reward models.
        samples: solutions of each problem of the pool.
        candidates: of each test problem.
        few: labelled solutions in the comparison of PRM and ORM on little data; 0 for no comparison.
        few_epochs: passes over these.
        truth_prefixes: problems of the pool whose steps get 64 rollouts, to see labels by their number.
        iterations: of reinforcement.
        hack: iterations of the run with raw rewards, which the monitor must stop; 0 for no such run.
        tokens: in the longest solution.
        layers: of the model.
    """

    shop: Shop
    demonstrations: int
    pool: int
    test: int
    dev: int
    sft: TrainOptions
    reward: TrainOptions
    samples: int
    candidates: int
    few: int
    few_epochs: int
    truth_prefixes: int
    iterations: int
    hack: int
    tokens: int
    layers: int


SIZES = {
    "quick": Size(
        shop=Shop(events=(3, 4), highest=20, operand=4), demonstrations=2000, pool=500, test=200, dev=80,
        sft=TrainOptions(learning_rate=5e-3, epochs=10, batch_size=64),
        reward=TrainOptions(learning_rate=2e-3, epochs=5, batch_size=32),
        samples=4, candidates=16, few=0, few_epochs=0,
        truth_prefixes=40, iterations=4, hack=0, tokens=48, layers=2,
    ),
    "full": Size(
        shop=Shop(), demonstrations=3000, pool=1200, test=400, dev=100,
        sft=TrainOptions(learning_rate=4e-3, epochs=10.7, batch_size=64),
        reward=TrainOptions(learning_rate=2e-3, epochs=5, batch_size=32),
        samples=4, candidates=32, few=250, few_epochs=20,
        truth_prefixes=80, iterations=8, hack=30, tokens=64, layers=3,
    ),
}  # fmt: skip

#: Of every reinforcement but the one with raw rewards.
REINFORCE = PPOConfig(
    responses=256, micro_batch_size=64, batch_size=64, epochs=2, learning_rate=1e-4,
    critic="shared", monitor_every=4, save_every=1000, target_kl=0,
)  # fmt: skip


class Experiment:
    """One seed: each method is a station of the method, in order.

    Args:
        run: the demo's folder.
        size: of the profile.
        runtime: seed, device, threads.
    """

    def __init__(self, run: RunDir, size: Size, runtime: Runtime) -> None:
        self.size, self.runtime = size, runtime
        self.folder = run.path / f"seed-{runtime.seed}"
        self.run = RunDir(self.folder)
        self.folder.mkdir(exist_ok=True)
        self.device = runtime.start()
        self.world: World = make_world(
            size.shop, size.demonstrations, size.pool, size.test, size.dev, runtime.seed
        )
        self.tokenizer: PreTrainedTokenizerBase = shop.make_tokenizer(size.shop)
        self.numbers: dict[str, float] = {}

    def everything(self) -> dict[str, Any]:
        """Numbers that the claims are about, and the tables."""
        generator = self.generator()
        labelled, by_rollouts = self.labels(generator)
        scored, curves = self.verification(generator, labelled)
        few = self.little_data(generator, labelled, scored) if self.size.few else []
        policies, checks = self.reinforcement(generator, labelled)
        page = steps_page(scored[:40], "prm", f"Steps and their scores, seed {self.runtime.seed}")
        write_text(self.folder / "steps.html", page)
        write_solutions(self.folder / ROWS, scored)
        tables = {
            "Quality by rollouts": by_rollouts, "Best of N": curves, "By training solutions": few,
            "Checks of step-by-step PPO": checks, "Greedy accuracy of the policies": policies,
        }  # fmt: skip
        return {"numbers": self.numbers, "tables": tables}

    # Stations

    def generator(self) -> "PreTrainedModel":
        """A model fine-tuned on demonstrations, or the one that a killed demo has saved."""
        from transformers import AutoModelForCausalLM

        folder = self.folder / "sft"
        if not (folder / "model").is_dir():
            rows = [(one.question, one.steps) for one in self.world.demonstrations]
            new = shop.make_model(self.tokenizer, self.runtime.seed, self.size.layers)
            model = new.to(self.device)  # pyright: ignore
            place = RunDir(folder)
            finetune(model, self.tokenizer, rows, FORMAT, place, self.size.sft, self.runtime)
            stations.save_generator(place, model, self.tokenizer, FORMAT)
            discard_checkpoints(place, "sft")
        model = load_model(AutoModelForCausalLM, folder / "model").to(self.device).eval()  # pyright: ignore
        greedy = self.greedy(model)
        self.numbers |= {f"SFT {name}": value for name, value in greedy.items()}
        return model

    def sampler(self, model: "PreTrainedModel", temperature: float) -> LocalGenerator:
        """Sampling at a temperature."""
        sampling = Sampling(temperature=temperature, max_new_tokens=self.size.tokens)
        return LocalGenerator(model, self.tokenizer, sampling, 512)

    def greedy(self, model: "PreTrainedModel") -> dict[str, float]:
        """Accuracy, steps and answers of a policy on the test problems."""
        found = sample_solutions(self.world.test, self.sampler(model, 0.0), FORMAT, 1)
        return {
            "greedy": float(np.mean([bool(one.correct) for one in found])),
            "steps": float(np.mean([len(one.steps) for one in found])),
            "no answer": float(np.mean([one.predicted is None for one in found])),
        }

    def labels(self, model: "PreTrainedModel") -> tuple[list[Solution], list[dict[str, Any]]]:
        """The pool's solutions with labels, and labels of some by the number of rollouts."""
        size, seed = self.size, self.runtime.seed
        pool = sample_solutions(
            self.world.pool, self.sampler(model, 1.2), FORMAT, size.samples, seed
        )
        labelled, cost = annotate(
            pool, self.sampler(model, 0.7), AnnotateConfig(), FORMAT, None, seed
        )
        labelled = [self.world.with_truth(one) for one in labelled]
        quality = label_quality(labelled)
        self.numbers |= {
            "label accuracy": quality["accuracy"], "rollouts": cost.rollouts,
            "share of plain": cost.rollouts / cost.plain,
        }  # fmt: skip
        names = {one.id for one in self.world.pool[: size.truth_prefixes]}
        some = [one for one in labelled if one.problem in names]
        store = RolloutStore()
        soft = AnnotateConfig(rollouts=32, estimation="both")
        annotate(some, self.sampler(model, 0.7), soft, FORMAT, store, seed + 1)
        rows = quality_by_rollouts(some, store, (1, 2, 4, 8, 16, 32))
        self.numbers |= {
            "FN 1": rows[0]["false negatives"], "FN 8": rows[3]["false negatives"],
            "FP 1": rows[0]["false positives"], "FP 32": rows[-1]["false positives"],
            "CE 1": rows[0]["CE of soft"], "CE 32": rows[-1]["CE of soft"],
        }  # fmt: skip
        return labelled, rows

    def reward(
        self, model: "PreTrainedModel", scope: Literal["steps", "outcome"],
        solutions: Sequence[Solution], name: str, options: TrainOptions | None = None,
    ) -> StepRewardModel:  # fmt: skip
        """A reward model from the generator's weights; both kinds get the same start and steps."""
        reward = StepRewardModel(
            copy.deepcopy(model), self.tokenizer, Reading(scope=scope, form=FORMAT)
        )
        place = RunDir(self.folder / name)
        place.path.mkdir(exist_ok=True)
        train_reward(
            reward, solutions, RewardConfig(), place, options or self.size.reward, self.runtime
        )
        discard_checkpoints(place, "reward")
        return reward.eval()

    def verification(
        self, model: "PreTrainedModel", labelled: Sequence[Solution]
    ) -> tuple[list[Solution], list[dict[str, Any]]]:
        """Candidates scored by both reward models, and the curves over their number."""
        size, seed = self.size, self.runtime.seed
        found = sample_solutions(
            self.world.test, self.sampler(model, 0.7), FORMAT, size.candidates, seed + 2
        )
        self.numbers["SFT sampled"] = float(np.mean([bool(one.correct) for one in found]))
        self.prm = self.reward(model, "steps", labelled, "prm")
        self.orm = self.reward(model, "outcome", labelled, "orm")
        found = [self.world.with_truth(one) for one in self.scored(found, self.prm, self.orm)]
        quality = verify.step_quality(found, "prm")
        self.numbers |= {"PRM AUC": quality["AUC"], "PRM accuracy": quality["accuracy"]}
        minimum = verify.position_of_minimum(found, "prm")["minimum on the last step"]
        self.numbers["minimum on the last step"] = minimum
        rows = verify.curves(found, METHODS, seed=seed)
        self.numbers |= {f"{row['method']} @{row['n']}": row["accuracy"] for row in rows}
        return found, rows

    def scored(
        self, solutions: Sequence[Solution], prm: StepRewardModel, orm: StepRewardModel
    ) -> list[Solution]:
        """Solutions with both models' scores."""
        found = list(solutions)
        for name, reward in (("prm", prm), ("orm", orm)):
            scores = score_solutions(reward, found)
            found = [
                with_scores(one, name, values) for one, values in zip(found, scores, strict=True)
            ]
        return found

    def little_data(
        self, model: "PreTrainedModel", labelled: Sequence[Solution], candidates: Sequence[Solution]
    ) -> list[dict[str, Any]]:
        """Both reward models trained on few labelled solutions, at 16 candidates or all."""
        options = replace(self.size.reward, epochs=self.size.few_epochs)
        some = list(labelled)[:: len(labelled) // self.size.few][: self.size.few]
        prm = self.reward(model, "steps", some, "prm-few", options)
        orm = self.reward(model, "outcome", some, "orm-few", options)
        n = min(16, self.size.candidates)
        rows = []
        for count, found in (
            (len(some), self.scored(candidates, prm, orm)), (len(labelled), candidates)
        ):  # fmt: skip
            curve = verify.curves(found, METHODS, (n,), seed=self.runtime.seed)
            rows.append({"solutions": count} | {
                row["method"]: row["accuracy"] for row in curve if row["method"] in METHODS
            })  # fmt: skip
        self.numbers |= {"few PRM prod": rows[0]["PRM prod"], "few ORM": rows[0]["ORM"]}
        return rows

    def reinforcement(
        self, model: "PreTrainedModel", labelled: Sequence[Solution]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rejection sampling, PPO step by step, by outcome, and by raw scores."""
        size = self.size
        policies = [{"policy": "SFT", "greedy": self.numbers["SFT greedy"]}]

        def told(name: str, policy: Any) -> None:
            found = self.greedy(policy)
            self.numbers.update({f"{name} {key}": value for key, value in found.items()})
            policies.append({"policy": name} | found)

        right = right_solutions(labelled)
        shown = [(one.question, one.steps) for one in self.world.demonstrations]
        told("RFT", self.tuned(model, [*right, *shown], "rft"))
        told("right solutions alone", self.tuned(model, right, "right"))
        config = replace(REINFORCE, iterations=size.iterations, max_new_tokens=size.tokens)
        checks: list[dict[str, Any]] = []
        for name, reward in (("PPO by steps", self.prm), ("PPO by outcome", self.orm)):
            found = self.ppo(model, name, reward, config, Shaping(), None)
            told(name, found.policy)
            checks = checks or found.history
            self.numbers[f"{name} alarmed"] = float(ever_alarmed(found.history))
        if size.hack:
            raw = replace(config, iterations=size.hack, learning_rate=2e-4)
            found = self.ppo(
                model, "PPO by raw scores", self.prm, raw, Shaping(shaping="raw"), Alarm()
            )
            self.numbers["raw stopped"] = float(bool(found.stopped))
            self.numbers["raw stopped at"] = float(found.history[-1]["iteration"])
            worst = min(row["accuracy"] for row in found.history[1:])
            policies.append({"policy": f"PPO by raw scores, worst on dev ({found.stopped or 'ran on'})",
                             "greedy": worst})  # fmt: skip
        return policies, checks

    def tuned(
        self, model: "PreTrainedModel", rows: Sequence[tuple[str, Sequence[str]]], name: str
    ) -> "PreTrainedModel":
        """The generator, fine-tuned further."""
        place = RunDir(self.folder / name)
        place.path.mkdir(exist_ok=True)
        options = replace(self.size.sft, learning_rate=self.size.sft.learning_rate / 4, epochs=3)
        found, _ = finetune(
            copy.deepcopy(model), self.tokenizer, rows, FORMAT, place, options, self.runtime
        )
        discard_checkpoints(place, "sft")
        return found

    def ppo(
        self, model: "PreTrainedModel", name: str, reward: StepRewardModel, config: PPOConfig,
        shaping: Shaping, limits: Alarm | None,
    ) -> Any:  # fmt: skip
        """One reinforcement from the generator's weights."""
        place = RunDir(self.folder / name.replace(" ", "-"))
        place.path.mkdir(exist_ok=True)
        found = reinforce(
            copy.deepcopy(model), self.tokenizer, self.world.pool, reward, place, config, shaping,
            FORMAT, self.runtime, self.world.dev, limits,
        )  # fmt: skip
        discard_checkpoints(place, "ppo")
        return found
