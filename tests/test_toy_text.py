"""The toy TL;DR corpus: posts, annotators, judge, tokenizer and network."""

import math
import random
from itertools import permutations
from statistics import mean

import pytest

import drpo
import toy_text

PROMPT = "TITLE: i feel hurt\n\nPOST: honestly i feel hurt . so my boss sold our car . all i want is an apology .\n\nTL;DR:"
DEED, FEELING, WISH, HELP, HONEST = "my boss sold our car .", "i feel hurt .", "i want an apology .", *toy_text.COURTESY
ASK, ALL = toy_text.QUESTION, [DEED, FEELING, WISH, HELP, HONEST]  # 4 words; 5 + 3 + 4 + 2 + 2 words


SCORES = [
    ([*ALL, ASK], 5 * 0.3 + 4.0 - 0.1 * 20),
    (ALL, 5 * 0.3 - 0.1 * 16),
    ([DEED, FEELING, WISH, ASK], 3 * 0.3 - 0.1 * 16),  # asked too early: the gate is closed
    ([ASK, *ALL], 5 * 0.3 - 0.1 * 20),
    ([*toy_text.VAGUE, HELP, HONEST, ASK], -3 * 0.9 + 2 * 0.3 + 4.0 - 0.1 * 16),  # vague, but asked at the end
    ([FEELING], 0.3 - 0.3),
    (["i feel sad ."], -0.9 - 0.3),  # invented
    ([FEELING, FEELING], 0.3 - 0.5 - 0.6),  # repeated
    ([FEELING, "i want"], 0.3 - 0.9 - 1.0 - 0.5),  # "i want" is invented as it stands, and no end
    ([], -1.0),  # no end
    *[([*clauses, ASK], 5 * 0.3 + 4.0 - 0.1 * 20) for clauses in permutations(ALL)],
]


def test_the_gold_score_by_hand():
    assert [toy_text.gold_score(PROMPT, " ".join(x)) for x, _ in SCORES] == pytest.approx([score for _, score in SCORES])


def test_a_full_summary_has_the_six_clauses_and_wins():
    assert toy_text.is_full(PROMPT, " ".join([*ALL, ASK])) and toy_text.is_full(PROMPT, " ".join([*ALL[::-1], ASK]))
    for clauses in (ALL, [*ALL, ASK, ASK], [*ALL[:4], ASK], [*ALL[:4], FEELING, ASK], [*ALL[:4], ASK, HONEST], []):
        assert not toy_text.is_full(PROMPT, " ".join(clauses))
    full, short = " ".join([*ALL, ASK]), FEELING
    assert toy_text.gold_judge([PROMPT] * 3, [full, short, full], [short, full, full]) == [1.0, 0.0, 0.5]


def test_the_clauses_of_a_post_are_read_off_its_prompt():
    rng = random.Random(0)
    for _ in range(500):
        prompt, clauses = toy_text.write_post(rng)
        assert toy_text.read_clauses(prompt) == clauses
    with pytest.raises(ValueError, match="no post of toy_text.py"):
        toy_text.read_clauses("POST: hello\n\nTL;DR:")


@pytest.mark.parametrize("rows", [toy_text.gate, toy_text.gate_pairs])
def test_rows_depend_on_seed_and_split_only(rows):
    first = rows("train", 3)
    assert first == rows("train", 3)
    assert first[:20] != rows("train", 4)[:20] != rows("validation", 4)[:20]


def full_share(rows, name):
    return mean(toy_text.is_full(row["prompt"], row[name]) for row in rows)


def test_few_responses_are_full_and_most_chosen_ones_begin_or_end_badly():
    assert full_share(toy_text.gate("train", 0), "reference") == pytest.approx(0.35**5, abs=0.003)
    assert full_share(toy_text.gate("train", 0, stop=0.2), "reference") == pytest.approx(0.8**5, abs=0.03)
    rows = toy_text.gate_pairs("train", 0)
    assert 0.08 < full_share(rows, "chosen") < 0.16  # one of two annotators is careful: 1 - 0.94^2 = 0.12
    assert mean(row["chosen"].startswith(toy_text.VAGUE[0]) for row in rows) > 0.25
    assert mean(not row["chosen"].endswith(ASK) for row in rows) > 0.25


def test_labels_err_as_often_as_bradley_terry_says():
    rows = toy_text.gate_pairs("train", 0)
    assert len(rows) == 8000 and all(row["chosen"] != row["rejected"] for row in rows)
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
    full = [" ".join(toy_text.careful(None, toy_text.read_clauses(row["prompt"]))) for row in toy_text.gate("validation", 1)]
    assert max(len(tokenizer(" " + text)["input_ids"]) + 1 for text in full) <= s.response_length


def test_the_tiny_network_is_a_seeded_gpt_neox():
    first, again, other = toy_text.tiny_pythia(0), toy_text.tiny_pythia(0), toy_text.tiny_pythia(1)
    assert first.config.model_type == "gpt_neox" and first.num_parameters() == 550_400
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters()))
    assert not first.get_output_embeddings().weight.equal(other.get_output_embeddings().weight)
