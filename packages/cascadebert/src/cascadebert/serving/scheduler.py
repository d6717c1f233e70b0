"""Calls on their way through the stages: whom a policy lets go, and who goes on to the next queue.

What a policy defers joins what other calls and other operating points have deferred, so that the
large model's batches fill from many small calls.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cascadebert.cascade import Cascade
from cascadebert.config import ServeConfig
from cascadebert.data import Examples
from cascadebert.policy import Policy
from cascadebert.scores import log_odds
from cascadebert.serving.monitor import Monitor
from cascadebert.serving.station import Answer, Call, Item, Refusal, Station

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """An operating point: a policy, and what becomes of it under load.

    Attributes:
        name: by which callers ask for it.
        policy: its thresholds.
        eased: the same with thresholds lowered to the floor; None where it never sheds.
    """

    name: str
    policy: Policy
    eased: Policy | None = None

    @classmethod
    def of(cls, name: str, policy: Policy, config: ServeConfig) -> "Point":
        """A policy sheds unless it guarantees a risk, or its score has no probability to floor."""
        if not config.shed_at:
            return cls(name, policy)
        promised = policy.guarantee.get("method", "empirical") != "empirical"
        if promised or policy.score == "energy":
            why = "it has a guarantee" if promised else "energy is not a probability"
            log.info("operating point %s never sheds load: %s", name, why)
            return cls(name, policy)
        floor = math.log(config.shed_floor / (1 - config.shed_floor))
        lowered = [min(threshold, floor) for threshold in policy.thresholds]
        return cls(name, policy, replace(policy, thresholds=lowered))

    def leaves(self, stage: int, logits: Tensor, crowded: bool) -> tuple[Tensor, Tensor]:
        """Which items leave at a stage, and which of these only because the next is crowded."""
        leave = self.policy.leaves(stage, logits)
        if not crowded or self.eased is None:
            return leave, torch.zeros_like(leave)
        eased = self.eased.leaves(stage, logits)
        return eased, eased & ~leave


class Scheduler:
    """Takes calls and sees each of their texts through the stages.

    Args:
        cascade: the models.
        points: the operating points by their names.
        config: limits, waits and shedding.
        monitor: what is told of every batch and answer.
    """

    def __init__(
        self, cascade: Cascade, points: Mapping[str, Point], config: ServeConfig, monitor: Monitor
    ) -> None:
        self.cascade, self.points, self.config = cascade, dict(points), config
        wait = config.max_wait / 1000
        self.stations = [
            Station(number, stage, cascade.batch_tokens, wait, self._decide, self._deliver)
            for number, stage in enumerate(cascade.stages)
        ]
        self._alike = [after.reads_like(before) for before, after in pairwise(cascade.stages)]
        self._monitor = monitor
        self._calls: set[Call] = set()
        self._tasks: list[asyncio.Task] = []
        monitor.watch(
            [lambda station=station: station.depth for station in self.stations],
            {name: point.policy.calibration.get("deciles") for name, point in points.items()},
        )

    async def start(self) -> None:
        """Warm the models up and begin."""
        for station in self.stations:
            await station.warm_up(self.cascade.pairs is True)
        for station in self.stations:
            self._tasks += [
                asyncio.create_task(station.read()),
                asyncio.create_task(station.work()),
            ]

    def submit(self, examples: Examples, point: str) -> Call:
        """Queue a call, whose `future` then holds the answers, in the texts' order, or a `Refusal`.

        Raises:
            Refusal: a queue is full.
        """
        first, *later = (station.depth for station in self.stations)
        limit = self.config.max_queue
        if first + len(examples) > limit or any(depth >= limit for depth in later):
            raise Refusal(429, "too many texts are waiting; try again", {"Retry-After": "1"})
        call = Call(point, len(examples))
        self._calls.add(call)
        call.future.add_done_callback(lambda _: self._calls.discard(call))
        pairs = examples.pairs or [None] * len(examples)
        rows = enumerate(zip(examples.texts, pairs, strict=True))
        self.stations[0].put([Item(call, index, *texts) for index, texts in rows])
        return call

    def stop(self, reason: str) -> int:
        """Refuse every call that is not answered yet, and end; returns how many those were."""
        left = list(self._calls)
        for call in left:
            call.refuse(Refusal(503, reason))
        for task in self._tasks:
            task.cancel()
        for station in self.stations:
            station.close()
        return len(left)

    def _decide(self, number: int, items: Sequence[Item], logits: Tensor) -> list[Answer | None]:
        answers: list[Answer | None] = [None] * len(items)
        last = number == len(self.stations) - 1
        shed_at = self.config.shed_at
        crowded = bool(shed_at) and not last and self.stations[number + 1].depth >= shed_at
        members: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            members.setdefault(item.call.point, []).append(i)
        for name, rows in members.items():
            point, here = self.points[name], logits[rows]
            if number == 0 and not last:
                self._monitor.scored(name, point.policy.score_of(0, here).tolist())
            leave, degraded = point.leaves(number, here, crowded)
            scaled = here / point.policy.temperature(number)
            classes, sure = scaled.argmax(dim=-1).tolist(), log_odds(scaled).sigmoid().tolist()
            for k in leave.nonzero()[:, 0].tolist():
                label, cut = self.cascade.labels[classes[k]], items[rows[k]].truncated
                answers[rows[k]] = Answer(label, number + 1, sure[k], bool(degraded[k]), cut)
        return answers

    def _deliver(
        self, number: int, items: Sequence[Item], answers: Sequence[Answer | None]
    ) -> None:
        now = time.monotonic()
        self._monitor.batch(number, [now - item.since for item in items])
        deferred = []
        for item, answer in zip(items, answers, strict=True):
            if answer is None:
                deferred.append(item)
            else:
                self._monitor.answered(item.call.point, answer.stage, answer.confidence,
                                       answer.degraded, answer.truncated)  # fmt: skip
                item.call.give(item.index, answer)
        if deferred:
            self.stations[number + 1].put(deferred, read=self._alike[number])
