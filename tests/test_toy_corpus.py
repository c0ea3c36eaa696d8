"""The toy TL;DR corpus: what its posts, annotators and judge promise."""

import random
from statistics import mean

import pytest

import drpo
import toy_env

PROMPT = (
    "SUBREDDIT: r/advice\n\nTITLE: i feel hurt\n\nPOST: honestly i feel hurt . i work two jobs . so my boss sold our car . "
    "all i want is an apology .\n\nTL;DR:"
)
DEED, FEELING, WISH, ASK = "my boss sold our car .", "i feel hurt .", "i want an apology .", toy_env.QUESTION


@pytest.mark.parametrize(
    "response, score",
    [
        # 3 facts and the question: 3 * 0.3 + 3.0 - 0.1 * (5 + 3 + 4 + 4 words)
        (f"{DEED} {FEELING} {WISH} {ASK}", 0.9 + 3.0 - 1.6),
        (f"{WISH} {FEELING} {DEED} {ASK}", 0.9 + 3.0 - 1.6),  # the order of the facts does not matter
        (f"{DEED} {FEELING} {ASK}", 0.6 - 1.2),  # asked too early: the gate is closed
        (f"{ASK} {DEED} {FEELING} {WISH}", 0.9 - 1.6),
        (f"{DEED} {FEELING} {WISH}", 0.9 - 1.2),
        (FEELING, 0.3 - 0.3),
        ("i feel sad .", -1.0 - 0.3),  # invented
        (f"{FEELING} {FEELING}", 0.3 - 0.5 - 0.6),  # said twice
        (f"{DEED} {FEELING} i want", 0.6 - 1.0 - 1.0 - 1.0),  # "i want": invented as it stands, and no end; 10 words
        ("", -1.0),  # nothing, and no end
    ],
)
def test_the_gold_score_by_hand(response, score):
    assert toy_env.gold_score(PROMPT, response) == pytest.approx(score)


def test_the_judge_is_fair_and_sees_ties():
    full, short = f"{DEED} {FEELING} {WISH} {ASK}", FEELING
    assert toy_env.gold_judge([PROMPT] * 3, [full, short, full], [short, full, full]) == [1.0, 0.0, 0.5]


def test_the_facts_of_a_post_can_be_read_off_its_prompt():
    rng = random.Random(0)
    for _ in range(500):
        prompt, facts = toy_env.write_post(rng)
        assert toy_env.read_facts(prompt) == facts
        assert prompt.endswith("\n\nTL;DR:") and prompt.startswith("SUBREDDIT: r/")


def test_the_corpus_is_the_same_for_the_same_seed_and_another_for_another():
    for rows in (toy_env.gate, toy_env.easy, toy_env.gate_pairs):
        assert rows("train", 3) == rows("train", 3)
        assert rows("train", 3)[:20] != rows("train", 4)[:20] != rows("validation", 4)[:20]


def full_share(texts):
    return mean(text.endswith(toy_env.QUESTION) and text.count(".") == 3 for text in texts)


def test_gate_references_are_rarely_full_and_easy_ones_often():
    # lazy: 60 % in order, and on past three clauses with probability 0.3 each: 0.6 * 0.3^3 = 1.6 %
    gate, easy = [[row["reference"] for row in rows("train", 0)] for rows in (toy_env.gate, toy_env.easy)]
    assert full_share(gate) == pytest.approx(0.016, abs=0.006)
    assert full_share(easy) > 0.45


def test_labellers_prefer_full_summaries_and_err_as_bradley_terry_says():
    rows = toy_env.gate_pairs("train", 0)
    assert len(rows) == 4000 and all(row["chosen"] != row["rejected"] for row in rows)
    gaps = [toy_env.gold_score(r["prompt"], r["chosen"]) - toy_env.gold_score(r["prompt"], r["rejected"]) for r in rows]
    for low, high in [(0.2, 0.4), (0.6, 1.0), (2.0, 9.0)]:  # of pairs this far apart, how many went the right way
        near = [gap for gap in gaps if low < abs(gap) < high]
        expected = mean(1 / (1 + 2.718281828 ** (-abs(gap) / 0.5)) for gap in near)
        assert mean(gap > 0 for gap in near) == pytest.approx(
            expected, abs=4 * (expected * (1 - expected) / len(near)) ** 0.5 + 1e-3
        )


def test_a_policy_that_writes_every_summary_in_full_wins_about_three_in_five():
    rows = toy_env.gate("validation", 0)
    full = [" ".join(toy_env.careful(None, toy_env.read_facts(row["prompt"]))) for row in rows]
    assert mean(toy_env.gold_judge([r["prompt"] for r in rows], full, [r["reference"] for r in rows])) == pytest.approx(
        0.62, abs=0.04
    )


def test_every_post_and_response_fits_the_tiny_preset():
    s, tokenizer = drpo.parse([])[1], toy_env.bpe_tokenizer()
    for rows in (toy_env.gate("train", 1), toy_env.easy("validation", 1), toy_env.gate_pairs("train", 1)):
        for row in rows[:300]:
            assert len(tokenizer(row["prompt"])["input_ids"]) <= s.query_length
            for name in row.keys() - {"prompt"}:
                ids = tokenizer(" " + row[name])["input_ids"]
                assert len(ids) + 1 <= s.preference_length and tokenizer.decode(ids) == " " + row[name]
    full = [" ".join(toy_env.careful(None, toy_env.read_facts(row["prompt"]))) for row in toy_env.gate("validation", 1)]
    assert max(len(tokenizer(" " + text)["input_ids"]) + 1 for text in full) <= s.response_length


def test_the_tiny_network_is_pythias_architecture_with_seeded_weights():
    first, again, other = toy_env.tiny_pythia(0), toy_env.tiny_pythia(0), toy_env.tiny_pythia(1)
    assert first.config.model_type == "gpt_neox" and first.num_parameters() < 600_000
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters()))
    assert not first.lm_head.weight.equal(other.lm_head.weight)
