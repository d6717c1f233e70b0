"""One stage's queue: what a call's texts wait in, and the threads that read and answer them.

A reader thread turns texts into tokens and a worker thread runs the model, both outside the
interpreter's lock for most of their time, so that the event loop goes on taking calls.
"""

import asyncio
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from octavo.errors import ModelError
from torch import Tensor

from cascadebert.data import Examples
from cascadebert.stage import Encoded, Stage, batches

log = logging.getLogger(__name__)

#: Token budgets that are taken from a queue at once, to sort them by length.
DRAIN = 4

#: Texts that are tokenised at once.
READ = 256


class Refusal(Exception):
    """Why a call is not answered; the reason holds nothing that the caller wrote.

    Args:
        status: of HTTP.
        reason: for the caller.
        headers: of the answer.
    """

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})


@dataclass(frozen=True)
class Answer:
    """What a caller gets for a text.

    Attributes:
        label: of the most probable class.
        stage: that answered, from 1.
        confidence: softmax probability of the label.
        degraded: it left early only because the next stage was overloaded.
        truncated: the text was longer than the stage takes.
    """

    label: str
    stage: int
    confidence: float
    degraded: bool
    truncated: bool


class Call:
    """The texts of one request, answered together."""

    def __init__(self, point: str, size: int) -> None:
        self.point = point
        self.future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._answers: dict[int, Answer] = {}
        self._size = size

    @property
    def over(self) -> bool:
        """Answered, refused, too late or abandoned: nothing more need be computed for it."""
        return self.future.done()

    def give(self, index: int, answer: Answer) -> None:
        """Answer one text; the last one completes the call."""
        self._answers[index] = answer
        if len(self._answers) == self._size and not self.over:
            self.future.set_result([self._answers[number] for number in range(self._size)])

    def refuse(self, refusal: Refusal) -> None:
        """End the call without an answer."""
        if not self.over:
            self.future.set_exception(refusal)


@dataclass(slots=True, eq=False)
class Item:
    """One text on its way through the stages."""

    call: Call
    index: int
    text: str
    pair: str | None
    since: float = 0.0  # when it came to the stage where it is
    row: dict[str, list[int]] = field(default_factory=dict)
    truncated: bool = False


class Station:
    """A stage with its queue, its batcher and its two threads.

    Args:
        number: of the stage, from 0.
        stage: the model.
        budget: tokens in a batch, padding included.
        max_wait: seconds that a batch waits to fill.
        decide: turns items and their logits into answers, None for a deferred one; in the worker.
        deliver: takes items and their answers, in the event loop.
    """

    def __init__(
        self,
        number: int,
        stage: Stage,
        budget: int,
        max_wait: float,
        decide: Callable[[int, Sequence[Item], Tensor], list[Answer | None]],
        deliver: Callable[[int, Sequence[Item], Sequence[Answer | None]], None],
    ) -> None:
        self.number, self.stage = number, stage
        self.depth = 0  # items that wait here, read or not
        self._budget, self._max_wait = budget, max_wait
        self._decide, self._deliver = decide, deliver
        self._unread: deque[Item] = deque()
        self._ready: deque[Item] = deque()
        self._tokens = 0  # of the ready ones
        self._unread_came, self._ready_came = asyncio.Event(), asyncio.Event()
        # One thread each: a tokenizer may not be used by two, and a second batch gains nothing.
        self.reader = ThreadPoolExecutor(1, f"reader-{number + 1}")
        self.worker = ThreadPoolExecutor(1, f"worker-{number + 1}")

    def put(self, items: Sequence[Item], read: bool = False) -> None:
        """Queue items, whose tokens may be known from a stage that reads alike."""
        now = time.monotonic()
        for item in items:
            item.since = now
        self.depth += len(items)
        if read:
            self._enqueue(items)
        else:
            self._unread.extend(items)
            self._unread_came.set()

    async def read(self) -> None:
        """Tokenise what comes, for ever."""
        while True:
            await self._unread_came.wait()
            count = min(READ, len(self._unread))
            items = self._alive([self._unread.popleft() for _ in range(count)])
            if not self._unread:
                self._unread_came.clear()
            for _, group in groupby(items, key=lambda item: item.pair is None):
                alike = list(group)
                try:
                    encoded = await _in_thread(self.reader, self._encode, alike)
                    for item, row, cut in zip(alike, encoded.rows, encoded.truncated, strict=True):
                        item.row, item.truncated = row, cut
                    self._enqueue(alike)
                except Exception as error:
                    self.depth -= len(alike)
                    self._failed(alike, error)

    async def work(self) -> None:
        """Run batches, for ever."""
        while True:
            drained = await self._due()
            lengths = [_length(item) for item in drained]
            for batch in batches(lengths, self._budget):
                self.depth -= len(batch)
                items = [drained[i] for i in batch if not drained[i].call.over]
                if not items:
                    continue
                try:
                    answers = await _in_thread(self.worker, self._answer, items)
                    self._deliver(self.number, items, answers)
                except Exception as error:
                    self._failed(items, error)

    async def warm_up(self, pairs: bool) -> None:
        """Run the model once in its thread, which then has its memory and its kernels."""
        texts = ["", "warm up " * 8] * 4
        examples = Examples(texts, texts if pairs else None)
        encoded = await _in_thread(self.reader, self.stage.encode, examples)
        await _in_thread(self.worker, self._logits, encoded.rows)

    def close(self) -> None:
        """Let the threads end after what they are doing."""
        for pool in (self.reader, self.worker):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _due(self) -> list[Item]:
        """Items for some batches, once one is full or the oldest item has waited long enough."""
        while True:
            self._ready_came.clear()
            if not self._ready:
                await self._ready_came.wait()
                continue
            patience = self._ready[0].since + self._max_wait - time.monotonic()
            if self._tokens >= self._budget or patience <= 0:
                break
            try:
                await asyncio.wait_for(self._ready_came.wait(), patience)
            except TimeoutError:
                break
        drained, tokens = [], 0
        while self._ready and tokens < DRAIN * self._budget:
            drained.append(self._ready.popleft())
            tokens += _length(drained[-1])
        self._tokens -= tokens
        return self._alive(drained)

    def _enqueue(self, items: Sequence[Item]) -> None:
        self._ready.extend(items)
        self._tokens += sum(map(_length, items))
        self._ready_came.set()

    def _alive(self, items: Sequence[Item]) -> list[Item]:
        """Those whose calls still want an answer; the others leave the queue."""
        alive = [item for item in items if not item.call.over]
        self.depth -= len(items) - len(alive)
        return alive

    def _failed(self, items: Sequence[Item], error: Exception) -> None:
        log_failure(f"stage {self.number + 1}", error)
        for item in items:
            item.call.refuse(Refusal(500, "the model failed on this call or on one beside it"))

    def _encode(self, items: Sequence[Item]) -> Encoded:
        seconds = [item.pair for item in items if item.pair is not None]
        return self.stage.encode(Examples([item.text for item in items], seconds or None))

    def _answer(self, items: Sequence[Item]) -> list[Answer | None]:
        return self._decide(self.number, items, self._logits([item.row for item in items]))

    def _logits(self, rows: Sequence[dict[str, list[int]]]) -> Tensor:
        with torch.inference_mode():
            output = self.stage.forward(self.stage.pad(rows))
            logits = output[:, self.stage.classes].float().cpu()
        if not logits.isfinite().all():
            raise ModelError(f"{self.stage.name}: gives logits that are not finite")
        return logits


def log_failure(what: str, error: BaseException) -> None:
    """Log where an error arose but not its message, which may quote a caller's text."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    log.error("%s: %s at %s", what, type(error).__name__, where)


def _length(item: Item) -> int:
    return len(item.row["input_ids"])


async def _in_thread(pool: ThreadPoolExecutor, work: Callable, *arguments):
    return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
