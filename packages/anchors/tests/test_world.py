from collections import Counter

from anchors.world import WORLDS, episodes, make_tokenizer, prompt, topic_words

WORLD = WORLDS["quick"]


def mappings(found):
    return {(e.task, *sorted(zip(e.topics, e.words, strict=True))) for e in found}


def test_the_same_seed_gives_the_same_episodes():
    assert episodes(WORLD, 20, 3, 1, 5) == episodes(WORLD, 20, 3, 1, 5)
    assert episodes(WORLD, 20, 3, 1, 5) != episodes(WORLD, 20, 3, 1, 6)


def test_offsets_give_the_words_back():
    tokenizer = make_tokenizer(WORLD)
    for episode in episodes(WORLD, 20, 3, 1, 0):
        text = prompt(episode)
        coded = tokenizer(text, return_offsets_mapping=True)
        assert coded["input_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in coded["input_ids"]
        for number, (start, end) in list(
            zip(coded["input_ids"], coded["offset_mapping"], strict=False)
        )[1:]:
            assert text[start:end] == tokenizer.convert_ids_to_tokens(number)
        assert coded["input_ids"].count(tokenizer.convert_tokens_to_ids("\n")) == 3


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
