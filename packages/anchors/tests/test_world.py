from collections import Counter
from dataclasses import replace

import torch
from anchors.demo import world_prompts
from anchors.world import END, TASKS, WORLDS, episodes, make_tokenizer, topic_words, train
from octavo.rundir import RunDir
from octavo.runtime import Runtime

WORLD = WORLDS["quick"]


def mappings(found):
    return {(e.task, *sorted(zip(e.topics, e.words, strict=True))) for e in found}


def test_the_same_seed_gives_the_same_episodes():
    assert episodes(WORLD, 20, 3, 1, 5) == episodes(WORLD, 20, 3, 1, 5)
    assert episodes(WORLD, 20, 3, 1, 5) != episodes(WORLD, 20, 3, 1, 6)


def test_offsets_give_the_words_back():
    tokenizer = make_tokenizer(WORLD)
    prompts, labels = world_prompts(WORLD, tokenizer, 20, 3, 0)
    for prompt, label, episode in zip(prompts, labels, episodes(WORLD, 20, 3, 1, 0), strict=True):
        before, after = TASKS[episode.task][0].removesuffix("{label}").split(" {text} ")
        words = [word.strip() for word in episode.words]
        expected, frame = [END], []
        for text, kind in episode.demonstrations:
            expected += [before, *text.split(), after, words[kind], "\n"]
            frame += [before, after, "\n"]
        last = [before, *episode.text.split(), after]
        tokens = tokenizer.convert_ids_to_tokens(list(prompt.input_ids))
        assert tokens == expected + last
        assert [[tokens[place] for place in places] for places in prompt.labels] == [
            [words[kind]] for _, kind in episode.demonstrations
        ]
        assert [tokens[place] for place in prompt.format] == frame
        assert (tokens[prompt.query :], tokens[prompt.target]) == (last, after)
        assert tokenizer.convert_ids_to_tokens(list(prompt.answers)) == words
        assert label == episode.label


def test_training_and_evaluation_share_no_mapping():
    for classes in (2, 3):
        train = mappings(episodes(WORLD, 3000, classes, 1, 0, training=True))
        held = mappings(episodes(WORLD, 1000, classes, 1, 0))
        assert train
        assert held
        assert not train & held


def test_siblings_share_words_and_others_none():
    for topic in range(WORLD.topics):
        for other in range(topic):
            common = set(topic_words(WORLD, topic)) & set(topic_words(WORLD, other))
            assert len(common) == (WORLD.shared if topic == other ^ 1 else 0)
    for episode in episodes(WORLD, 200, 3, 1, 0, siblings=True):
        assert episode.topics[0] == episode.topics[1] ^ 1
        assert len(set(episode.topics)) == 3


def test_no_class_and_no_place_tells_the_label():
    for classes in (2, 3):
        found = episodes(WORLD, 3000, classes, 1, 0)
        counts = Counter(episode.label for episode in found)
        last = sum(e.demonstrations[-1][1] == e.label for e in found) / len(found)
        first = sum(e.demonstrations[0][1] == e.label for e in found) / len(found)
        assert all(abs(count / 3000 - 1 / classes) < 0.04 for count in counts.values())
        assert abs(last - 1 / classes) < 0.04
        assert abs(first - 1 / classes) < 0.04
        assert all(len({kind for _, kind in e.demonstrations}) == classes for e in found)


def test_a_training_lowers_its_loss_and_repeats(tmp_path):
    sizes, tokenizer = replace(WORLD, steps=60, batch=4), make_tokenizer(WORLD)
    weights = []
    for name in ("one", "two"):
        run = RunDir.open(tmp_path / name, {})
        model = train(sizes, tokenizer, Runtime(seed=3, device="cpu"), run)
        weights.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
        losses = [line["loss"] for line in run.metrics()]
        assert len(losses) == 3
        assert losses[-1] < losses[0] - 0.5
    assert torch.equal(*weights)
