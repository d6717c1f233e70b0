"""The toy shop: word problems whose every step can be checked, and a demonstrator with misconceptions.

"Ann has 23 pens. buys 4. gives 3. doubles them. How many?" is solved by one step an event. Who writes
the demonstrations often adds where "gives" asks to subtract, and often doubles where "triples" is asked
for; all else is right. A model trained on them is wrong in a way that majority voting cannot mend, while
it still takes the right step often enough for rollouts, rerankers and reinforcement to find it: that is
by construction.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mathshepherd.records import Problem, Solution
from mathshepherd.steps import StepFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

#: Steps in one line and without numbers: "23 + 4 = 27 ки 27 - 3 = 24 ки", for speed.
FORMAT = StepFormat(numbered=False, joiner=" ")

NAMES = ("Ann", "Bob", "Cid", "Dee", "Eve", "Flo")
ITEMS = ("pens", "cups", "eggs", "hats", "keys", "nuts")
SIGNS = {"buys": "+", "finds": "+", "sells": "-", "eats": "-", "gives": "-"}
FACTORS = {"doubles": 2, "triples": 3}
VERBS = (*SIGNS, *FACTORS)
MARKER = "The answer is:"


@dataclass(frozen=True)
class Shop:
    """The world's sizes.

    Attributes:
        events: the least and the most after the start value.
        highest: number that a state may reach.
        operand: the highest that is bought, sold and so on; the least is 2.
        noise: chance that "gives" is done as an addition.
        noise_triples: chance that "triples" is done as doubling.
        clock: all states modulo this number (0: none), so that wrong ways hit right answers by luck.
    """

    events: tuple[int, int] = (4, 6)
    highest: int = 30
    operand: int = 5
    noise: float = 0.65
    noise_triples: float = 0.5
    clock: int = 0


@dataclass(frozen=True)
class Tale:
    """A problem's start value and events, each a verb and its number (0 where it has none)."""

    who: str
    what: str
    start: int
    events: tuple[tuple[str, int], ...]

    def question(self) -> str:
        """In words."""
        parts = [f"{verb} {number}." if number else f"{verb} them." for verb, number in self.events]
        return f"{self.who} has {self.start} {self.what}. {' '.join(parts)} How many?"


def step_of(shop: Shop, state: int, verb: str, number: int) -> tuple[str, int]:
    """The step that an event asks for, and the state after it."""
    sign, number = SIGNS.get(verb, "*"), number or FACTORS[verb]
    new = {"+": state + number, "-": state - number, "*": state * number}[sign]
    new = new % shop.clock if shop.clock else new
    return f"{state} {sign} {number} = {new}", new


def _fits(shop: Shop, state: int) -> bool:
    return shop.clock > 0 or 1 <= state <= shop.highest


def draw_tale(shop: Shop, draw: random.Random) -> Tale:
    """A problem whose states all lie in the world."""
    start = state = (
        draw.randrange(shop.clock) if shop.clock else draw.randint(3, shop.highest * 2 // 3)
    )
    events: list[tuple[str, int]] = []
    wanted = draw.randint(*shop.events)
    while len(events) < wanted:
        verb = draw.choice(VERBS)
        number = draw.randint(2, shop.operand) if verb in SIGNS else 0
        new = step_of(shop, state, verb, number)[1]
        if _fits(shop, new):
            events.append((verb, number))
            state = new
    return Tale(draw.choice(NAMES), draw.choice(ITEMS), start, tuple(events))


def solve(shop: Shop, tale: Tale) -> tuple[str, ...]:
    """The steps of the right solution."""
    return _steps([(verb, number, verb) for verb, number in tale.events], shop, tale.start) or ()


def demonstrate(shop: Shop, tale: Tale, draw: random.Random) -> tuple[str, ...]:
    """The steps of the demonstrator, whose slips never lead out of the world."""
    chances = {"gives": ("buys", shop.noise), "triples": ("doubles", shop.noise_triples)}
    for _ in range(20):
        done = []
        for verb, number in tale.events:
            slip, chance = chances.get(verb, (verb, 0.0))
            done.append((verb, number, slip if draw.random() < chance else verb))
        if steps := _steps(done, shop, tale.start):
            return steps
    return solve(shop, tale)


def _steps(
    events: Sequence[tuple[str, int, str]], shop: Shop, state: int
) -> tuple[str, ...] | None:
    """The steps where each event is done as another one; None where that leads out of the world."""
    steps = []
    for _, number, done in events:
        text, new = step_of(shop, state, done, number)
        if not _fits(shop, new):
            return None
        steps.append(text)
        state = new
    return (*steps[:-1], f"{steps[-1]}. {MARKER} {state}")


def truth(shop: Shop, tale: Tale, steps: Sequence[str]) -> tuple[int, ...]:
    """Whether each step, and all before it, are what the problem asks for."""
    right = solve(shop, tale)
    good, found = True, []
    for number, step in enumerate(steps):
        good = good and number < len(right) and step.strip() == right[number]
        found.append(int(good))
    return tuple(found)


@dataclass(frozen=True)
class World:
    """Problems of three kinds, no question among two of them, and demonstrations of the first.

    Attributes:
        shop: the sizes.
        tales: of each problem's id.
        demonstrations: solutions to fine-tune on.
        pool: problems to sample and label solutions of.
        test: problems to verify and evaluate on.
        dev: problems that reinforcement is watched on.
    """

    shop: Shop
    tales: dict[str, Tale]
    demonstrations: list[Solution]
    pool: list[Problem]
    test: list[Problem]
    dev: list[Problem]

    def with_truth(self, solution: Solution) -> Solution:
        """The solution with the true quality of its steps."""
        return replace(
            solution, truth=truth(self.shop, self.tales[solution.problem], solution.steps)
        )


def make_world(shop: Shop, demonstrations: int, pool: int, test: int, dev: int, seed: int) -> World:
    """Draw problems, no question twice."""
    draw = random.Random(f"toy shop {seed}")
    counts = {"demo": demonstrations, "pool": pool, "test": test, "dev": dev}
    wanted = iter([f"{kind}-{number}" for kind, count in counts.items() for number in range(count)])
    drawn: dict[Tale, str] = {}
    while len(drawn) < sum(counts.values()):
        tale = draw_tale(shop, draw)
        if tale not in drawn:
            drawn[tale] = next(wanted)
    tales = {name: tale for tale, name in drawn.items()}
    problems = {
        name: Problem(
            name,
            tale.question(),
            answer_of(solve(shop, tale)),
            " ".join(f"{step} {FORMAT.tag}" for step in solve(shop, tale)),
        )
        for name, tale in tales.items()
    }
    shown = [
        Solution(name, 0, problems[name].question, demonstrate(shop, tales[name], draw),
                 problems[name].answer)
        for name in tales if name.startswith("demo")
    ]  # fmt: skip
    of = {kind: [one for name, one in problems.items() if name.startswith(kind)] for kind in counts}
    return World(shop, tales, shown, of["pool"], of["test"], of["dev"])


def answer_of(steps: Sequence[str]) -> str:
    """The number behind the marker."""
    return steps[-1].rpartition(MARKER)[2].strip()


def make_tokenizer(shop: Shop) -> "PreTrainedTokenizerFast":
    """One token a word, number and sign, the blank before it included; nothing is lost."""
    from tokenizers import Regex, Tokenizer, decoders, models
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    words = ["has", "them", "How", "many", *ITEMS, *VERBS, "The", "answer", "is", FORMAT.tag,
             *map(str, range(max(shop.highest, shop.clock) + 1)), *"+-*="]  # fmt: skip
    pieces = ["[PAD]", "<|endoftext|>", "[UNK]", *NAMES, *".?:", *(f" {word}" for word in words)]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre.Split(Regex(r" ?\d+| ?[^\W\d]+| ?[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="<|endoftext|>", unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"], model_max_length=128,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer: Any, seed: int, layers: int = 3, width: int = 64) -> "PreTrainedModel":
    """A Llama of about 140,000 weights."""
    from octavo import tiny

    shape = tiny.Shape(kind="llama", layers=layers, width=width, max_length=128)
    return tiny.make_model(shape, tokenizer, seed)
