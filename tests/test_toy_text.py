"""The toy TL;DR corpus: posts, annotators, judge, tokenizer and network."""

import math
import random
from itertools import permutations
from statistics import mean

import pytest

import drpo
import toy_text

PROMPT = (
    "SUBREDDIT: r/advice\n\nTITLE: i feel hurt\n\nPOST: honestly i feel hurt . i work two jobs . so my boss sold our car . "
    "all i want is an apology .\n\nTL;DR:"
)
DEED, FEELING, WISH, ASK = "my boss sold our car .", "i feel hurt .", "i want an apology .", toy_text.QUESTION


@pytest.mark.parametrize(
    "response, score",
    [
        (f"{DEED} {FEELING} {WISH} {ASK}", 3 * 0.3 + 3.0 - 0.1 * (5 + 3 + 4 + 4)),
        (f"{DEED} {FEELING} {ASK}", 0.6 - 1.2),  # asked too early: the gate is closed
        (f"{ASK} {DEED} {FEELING} {WISH}", 0.9 - 1.6),
        (f"{DEED} {FEELING} {WISH}", 0.9 - 1.2),
        (FEELING, 0.3 - 0.3),
        ("i feel sad .", -1.0 - 0.3),  # invented
        (f"{FEELING} {FEELING}", 0.3 - 0.5 - 0.6),  # repeated
        (f"{DEED} {FEELING} i want", 0.6 - 1.0 - 1.0 - 1.0),  # "i want" is invented as it stands, and no end; 10 words
        ("", -1.0),  # no end
    ],
)
def test_the_gold_score_by_hand(response, score):
    assert toy_text.gold_score(PROMPT, response) == pytest.approx(score)


def test_all_six_orders_of_the_facts_score_the_same():
    scores = [toy_text.gold_score(PROMPT, " ".join([*facts, ASK])) for facts in permutations([DEED, FEELING, WISH])]
    assert scores == pytest.approx([0.9 + 3.0 - 1.6] * 6)


def test_the_judge_sees_winners_and_ties():
    full, short = f"{DEED} {FEELING} {WISH} {ASK}", FEELING
    assert toy_text.gold_judge([PROMPT] * 3, [full, short, full], [short, full, full]) == [1.0, 0.0, 0.5]


def test_the_facts_of_a_post_are_read_off_its_prompt():
    rng = random.Random(0)
    for _ in range(500):
        prompt, facts = toy_text.write_post(rng)
        assert toy_text.read_facts(prompt) == facts
    with pytest.raises(ValueError, match="no post of toy_text.py"):
        toy_text.read_facts("POST: hello\n\nTL;DR:")


@pytest.mark.parametrize("rows", [toy_text.gate, toy_text.easy, toy_text.gate_pairs])
def test_rows_depend_on_seed_and_split_only(rows):
    first = rows("train", 3)
    assert first == rows("train", 3)
    assert first[:20] != rows("train", 4)[:20] != rows("validation", 4)[:20]


def test_gate_references_are_rarely_full_and_easy_ones_often():
    def full_share(rows):
        return mean(row["reference"].endswith(ASK) and row["reference"].count(".") == 3 for row in rows)

    # lazy: 60 % in order, and past each of three clauses with probability 0.3: 0.6 * 0.3^3 = 1.6 %
    assert full_share(toy_text.gate("train", 0)) == pytest.approx(0.016, abs=0.006)
    assert full_share(toy_text.easy("train", 0)) > 0.45


def test_labels_err_as_often_as_bradley_terry_says():
    rows = toy_text.gate_pairs("train", 0)
    assert len(rows) == 4000 and all(row["chosen"] != row["rejected"] for row in rows)
    gaps = [toy_text.gold_score(r["prompt"], r["chosen"]) - toy_text.gold_score(r["prompt"], r["rejected"]) for r in rows]
    for low, high in [(0.2, 0.4), (0.6, 1.0), (2.0, 9.0)]:
        near = [gap for gap in gaps if low < abs(gap) < high]
        expected = mean(1 / (1 + math.exp(-abs(gap) / 0.5)) for gap in near)
        error = 4 * (expected * (1 - expected) / len(near)) ** 0.5 + 1e-3
        assert mean(gap > 0 for gap in near) == pytest.approx(expected, abs=error)


def test_posts_and_responses_fit_the_tiny_preset():
    s, tokenizer = drpo.parse([])[1], toy_text.bpe_tokenizer()
    for rows in (toy_text.gate("train", 1), toy_text.gate_pairs("train", 1)):
        for row in rows[:300]:
            assert len(tokenizer(row["prompt"])["input_ids"]) <= s.query_length
            for name in row.keys() - {"prompt"}:
                ids = tokenizer(" " + row[name])["input_ids"]
                assert len(ids) + 1 <= s.preference_length and tokenizer.decode(ids) == " " + row[name]
    full = [" ".join(toy_text.careful(None, toy_text.read_facts(row["prompt"]))) for row in toy_text.gate("validation", 1)]
    assert max(len(tokenizer(" " + text)["input_ids"]) + 1 for text in full) <= s.response_length


def test_the_tiny_network_is_a_seeded_gpt_neox():
    first, again, other = toy_text.tiny_pythia(0), toy_text.tiny_pythia(0), toy_text.tiny_pythia(1)
    assert first.config.model_type == "gpt_neox" and first.num_parameters() == 550_400
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters()))
    assert not first.get_output_embeddings().weight.equal(other.get_output_embeddings().weight)
