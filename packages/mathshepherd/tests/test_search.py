"""Search over steps: scripted trees with all that can be said known, and the toy's own model."""

import itertools

import numpy as np
import pytest
from mathshepherd.config import Sampling, SearchConfig
from mathshepherd.generate import Completion, LocalGenerator, Request, stop_tokens
from mathshepherd.records import Problem, Solution
from mathshepherd.reward_model import model_folder
from mathshepherd.search import beam_search, stop_words
from mathshepherd.sft import open_generator
from mathshepherd.shop import FORMAT
from mathshepherd.stations import in_parts
from mathshepherd.steps import StepFormat
from octavo.errors import ConfigError
from octavo.rundir import RunDir

PLAIN = StepFormat(numbered=False)
PROBLEM = Problem("p", "Q?", "7")


class Tree:
    """Says `a`, `b` or `c` at each step in turn, and the answer at the third."""

    def __init__(self, words="abc"):
        self.words, self.asked = words, []

    def __call__(self, requests):
        self.asked.append([(one.text, len(one.seeds)) for one in requests])
        made = []
        for one in requests:
            depth = one.text.count("ки")
            words = itertools.cycle(self.words)
            texts = [next(words) for _ in one.seeds]
            if depth == 2:
                texts = [f"{text} The answer is: {7 if text == 'a' else 8}" for text in texts]
            made.append([Completion(f"{text} ки", False, 2, True) for text in texts])
        return made


class Scorer:
    """A score for each step: how it goes on after the one before."""

    def __init__(self, seed=0):
        self.seed = seed

    def one(self, steps):
        words = "".join(step[0] for step in steps)
        return np.random.default_rng([self.seed, *words.encode()]).random()

    def step_scores(self, questions, solutions, *, batch_tokens=0, skip_long=False):
        assert set(questions) <= {PROBLEM.question}
        return [
            np.array([self.one(steps[: n + 1]) for n in range(len(steps))], np.float32)
            for steps in solutions
        ]


@pytest.mark.parametrize("how", ["min", "prod", "last"])
def test_wide_enough_it_finds_the_best_of_all(how):
    for seed in range(5):
        config = SearchConfig(beams=27, width=3, aggregate=how)
        found, tokens = beam_search([PROBLEM], Tree(), Scorer(seed), config, PLAIN)
        worth = {
            "min": min, "prod": np.prod, "last": lambda values: values[-1],
        }[how]  # fmt: skip
        every = {
            words: worth([Scorer(seed).one(words[: n + 1]) for n in range(3)])
            for words in itertools.product("abc", repeat=3)
        }
        order = sorted(every, key=lambda words: -every[words])
        assert [tuple(step[0] for step in one.steps) for one in found] == order
        assert tokens == 2 * (81 + 9 + 27)
        assert found[0].correct == (order[0][-1] == "a")
        assert all(one.finished and one.predicted in ("7", "8") for one in found)


def test_it_goes_on_from_the_best_and_from_each_once():
    tree, scorer = Tree(), Scorer(3)
    found, _ = beam_search([PROBLEM], tree, scorer, SearchConfig(beams=2, width=3), PLAIN)
    assert tree.asked[0] == [("Q?", 6)]
    first = sorted("abc", key=lambda word: -scorer.one([word]))[:2]
    assert tree.asked[1] == [(f"Q? {word} ки", 3) for word in first]
    assert len(found) == 2
    assert [one.sample for one in found] == [0, 1]
    values = [min(one.scores["prm"]) for one in found]
    assert values == sorted(values, reverse=True)


def test_paths_that_end_early_are_kept_or_beaten():
    """`b` ends the text at once, with an answer in one step; its score decides."""

    def generator(requests):
        def ways(text, count):
            if text == "Q?":
                return [Completion("a ки", False, 2, True),
                        Completion("b The answer is: 7", True, 3)] * (count // 2)  # fmt: skip
            return [Completion("c The answer is: 8 ки", False, 2, True)] * count

        return [ways(one.text, len(one.seeds)) for one in requests]

    class Given:
        def __init__(self, **scores):
            self.scores = scores

        def step_scores(self, questions, solutions, **_):
            return [np.array([self.scores[s[0]] for s in steps], np.float32) for steps in solutions]

    config = SearchConfig(beams=2, width=2)
    for c, best in ((0.9, "a"), (0.1, "b")):
        found, _ = beam_search([PROBLEM], generator, Given(a=0.8, b=0.5, c=c), config, PLAIN)
        assert found[0].steps[0][0] == best
        assert len(found) == 2
        assert {one.predicted for one in found} == {"7", "8"}


def test_what_is_cut_off_has_no_answer():
    def cut(requests):
        return [[Completion("3 + 4 = 7 so The answer is: 7", False, 9)] * 4 for _ in requests]

    found, _ = beam_search([PROBLEM], cut, Scorer(), SearchConfig(beams=2, width=2), PLAIN)
    assert [(one.finished, one.predicted, one.correct) for one in found] == [(False, None, False)]

    def endless(requests):
        return [[Completion("a ки", False, 2, True)] * len(one.seeds) for one in requests]

    found, _ = beam_search([PROBLEM], endless, Scorer(), SearchConfig(max_steps=3), PLAIN)
    assert [len(one.steps) for one in found] == [3]
    assert not found[0].finished

    def rambling(requests):
        return [[Completion("a ки", False, 30, True)] * len(one.seeds) for one in requests]

    found, _ = beam_search([PROBLEM], rambling, Scorer(), SearchConfig(), PLAIN, max_tokens=80)
    assert [(len(one.steps), one.finished) for one in found] == [(3, False)]

    class Short:
        def step_scores(self, questions, solutions, *, batch_tokens=0, skip_long=False):
            assert skip_long
            return [np.ones(len(one)) if len(one) < 3 else np.empty(0) for one in solutions]

    found, _ = beam_search([PROBLEM], endless, Short(), SearchConfig(), PLAIN)
    assert [one.steps for one in found] == [()]  # all of them grew too long to be read

    def paused(requests):
        """A blank line before each step, as some models write it."""
        said[0] += 1
        text = "The answer is: 7" if said[0] == 4 else "\n" if said[0] % 2 else "a\n"
        return [
            [Completion(text, said[0] == 4, 2, said[0] != 4)] * len(one.seeds) for one in requests
        ]

    said = [0]
    plain = StepFormat(numbered=False, plain=True)
    found, _ = beam_search([PROBLEM], paused, Scorer(), SearchConfig(), plain)
    assert [(one.steps, one.finished) for one in found] == [(("a", "The answer is: 7"), True)]

    def silent(requests):
        return [[Completion("", True, 1)] * len(one.seeds) for one in requests]

    found, _ = beam_search([PROBLEM], silent, Scorer(), SearchConfig(), PLAIN)
    assert [(one.steps, one.predicted, one.scores) for one in found] == [((), None, {})]


def test_a_local_model_stops_at_its_tag(files, generator, world):
    model, tokenizer = open_generator(model_folder(str(generator)), FORMAT)
    model.eval()
    whole = LocalGenerator(model, tokenizer, Sampling(temperature=0, max_new_tokens=60))
    step = LocalGenerator(
        model, tokenizer, Sampling(temperature=0, max_new_tokens=60), stop=stop_words(FORMAT)
    )
    asked = [Request(FORMAT.question(one.question), (1,)) for one in world.test]
    for one, other in zip(whole(asked), step(asked), strict=True):
        assert FORMAT.tag in one[0].text
        assert other[0].text == one[0].text.partition(FORMAT.tag)[0] + FORMAT.tag
        assert (other[0].stopped, other[0].finished) == (True, False)
    with pytest.raises(ConfigError, match="no token of this model holds"):
        stop_tokens(tokenizer, "§§")


def test_a_killed_search_or_sampling_goes_on(world, tmp_path):
    asked = []

    def make(problems):
        asked.append([one.id for one in problems])
        return [
            Solution(one.id, k, one.question, (f"step {k}",), one.answer)
            for one in problems for k in range(2)
        ]  # fmt: skip

    problems = world.test[:5]
    whole = in_parts(RunDir(tmp_path), problems, 2, make)
    lines = (tmp_path / "solutions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 10
    for kept, first in ((0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (9, 4)):
        (tmp_path / "partial.jsonl").write_text("".join(lines[:kept]) + lines[kept][:20])
        asked.clear()
        assert in_parts(RunDir(tmp_path), problems, 2, make) == whole
        assert [name for some in asked for name in some] == [one.id for one in problems[first:]]
        assert (tmp_path / "solutions.jsonl").read_text() == "".join(lines)
        assert not (tmp_path / "partial.jsonl").exists()
