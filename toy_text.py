"""The toy TL;DR corpus that `python drpo.py` trains on. Posts, annotators and judge are programs, so each summary
has a true score.

    gate, easy      posts and references for SFT               --dataset toy_text:gate | toy_text:easy
    gate_pairs      preference pairs for the reward model      --preference_dataset toy_text:gate_pairs
    gold_judge      who wins, by the true score                --judge toy_text:gold_judge
    bpe_tokenizer   a BPE tokenizer trained on the corpus      --tokenizer toy_text:bpe_tokenizer
    tiny_pythia     GPT-NeoX, 2 layers of 128, from scratch    --model toy_text:tiny_pythia

A post says what somebody did to a thing of the writer, how the writer feels and what the writer wants, in shuffled sentences
with a distractor; its title gives away one of these three facts. A full summary has four clauses:

    my sister broke our bike .  i feel angry .  i want an apology .  what should i do ?

The true score pays 3.0 for the question, but only after the three facts: a late reward behind a gate. Each clause before it
costs a little more in words than it earns, so a policy that sees only short-term reward stops early. `gate` is the case of the
paper's abstract: the SFT references hardly ever get through the gate, but some responses in the preference pairs do, and are
preferred. In `easy` the SFT references get through often.
"""

import math
import random
import re

import torch

SUBREDDITS = ["relationships", "advice", "legaladvice", "askreddit", "offmychest", "personalfinance"]
PEOPLE = ["sister", "brother", "boss", "roommate", "neighbor", "cousin", "friend", "uncle", "landlord", "coworker"]
DEEDS = ["broke", "sold", "lost", "stole", "painted", "hid", "burned", "borrowed"]
THINGS = ["bike", "phone", "laptop", "guitar", "car", "jacket", "camera", "couch", "watch", "garden"]
FEELINGS = ["angry", "sad", "hurt", "confused", "betrayed", "tired", "worried", "guilty"]
WISHES = [
    "an apology",
    "my money back",
    "some advice",
    "to move out",
    "a new one",
    "to stay calm",
    "to call a lawyer",
    "to talk",
]
DISTRACTORS = [
    "it was raining all day .",
    "we had dinner before that .",
    "i work two jobs .",
    "most of them live far away .",
    "this happened last week .",
    "sorry for the long post .",
    "we used to get along .",
    "i hardly slept since .",
]
QUESTION = "what should i do ?"


def write_post(rng):
    """-> (prompt in the TL;DR format, its three facts: a list of clauses)."""
    person, deed, thing = rng.choice(PEOPLE), rng.choice(DEEDS), rng.choice(THINGS)
    feeling, wish = rng.choice(FEELINGS), rng.choice(WISHES)
    body = [
        rng.choice(["yesterday", "so", "last month", "well ,"]) + f" my {person} {deed} our {thing} .",
        rng.choice(["now i feel", "honestly i feel", "i really feel"]) + f" {feeling} .",
        rng.choice(["all i want is", "i just want", "i think i want"]) + f" {wish} .",
        rng.choice(DISTRACTORS),
    ]
    rng.shuffle(body)
    title = rng.choice([f"my {person} {deed} our {thing}", f"i feel {feeling}", f"i want {wish}"])
    prompt = f"SUBREDDIT: r/{rng.choice(SUBREDDITS)}\n\nTITLE: {title}\n\nPOST: {' '.join(body)}\n\nTL;DR:"
    return prompt, [f"my {person} {deed} our {thing} .", f"i feel {feeling} .", f"i want {wish} ."]


def read_facts(prompt):
    """prompt -> its three facts, as `write_post` gives them. Raises ValueError on any other post."""
    post = prompt.partition("POST:")[2]
    deed = re.search(rf"my (?:{'|'.join(PEOPLE)}) (?:{'|'.join(DEEDS)}) our (?:{'|'.join(THINGS)}) \.", post)
    feeling = re.search(rf"i (?:really )?feel ({'|'.join(FEELINGS)})", post)
    wish = re.search(rf"want (?:is )?({'|'.join(WISHES)})", post)
    if not (deed and feeling and wish):
        raise ValueError("this is no post of toy_text.py, and others have no gold score: name another judge, such as rm")
    return [deed[0], f"i feel {feeling[1]} .", f"i want {wish[1]} ."]


def careful(rng, facts):
    """The three facts in order, then the question."""
    return [*facts, QUESTION]


def lazy(rng, facts):
    """60 %: the clauses in order, stopping after each with probability 0.7. 40 %: one clause, the second or third."""
    if rng.random() < 0.4:
        return [rng.choice(facts[1:])]
    clauses = careful(rng, facts)
    kept = next((n for n in range(1, len(clauses)) if rng.random() < 0.7), len(clauses))
    return clauses[:kept]


def sloppy(rng, facts):
    """One mistake: facts of another post, the question too early, a clause in place of another, or a clause twice."""
    clauses, wrong = careful(rng, facts), write_post(rng)[1]
    places, (here, there) = rng.sample(range(3), rng.randint(1, 3)), rng.sample(range(3), 2)
    return rng.choice(
        [
            [wrong[i] if i in places else clause for i, clause in enumerate(clauses)],
            [*rng.sample(facts, rng.randint(0, 2)), QUESTION],
            [clauses[here] if i == there else clause for i, clause in enumerate(clauses)],
            clauses[: here + 1] + clauses[here:],
        ]
    )


def mixed(rng, facts):
    """The annotators of the preference data: 45 % careful, 30 % lazy, 25 % sloppy."""
    return rng.choices([careful, lazy, sloppy], [0.45, 0.3, 0.25])[0](rng, facts)


def gold_score(prompt, response):
    """The true score of a response (float): +0.3 per covered fact, -1 per invented one, -0.5 per repetition, -0.1 per word,
    -1 if it does not end with a full clause, and +3.0 for the question after all three facts.

    The facts may come in any of their six orders; `careful` and `lazy` annotators use one."""
    facts = read_facts(prompt)
    clauses = [clause.strip() for clause in re.split(r"(?<=[.?])\s", response.strip()) if clause.strip()]
    score, seen = -0.1 * len(re.findall(r"[a-z]+", response)), set()
    for clause in clauses:
        if clause in seen:
            score -= 0.5
        elif clause == QUESTION:
            score += 3.0 if seen.issuperset(facts) else 0.0
        else:
            score += 0.3 if clause in facts else -1.0
        seen.add(clause)
    return score - (0.0 if clauses and clauses[-1][-1] in ".?" else 1.0)


def gold_judge(prompts, a, b):
    """P(a is preferred) for each prompt: 1.0, 0.0, or 0.5 at equal gold scores. Lists of str -> list of float."""
    gaps = [gold_score(p, x) - gold_score(p, y) for p, x, y in zip(prompts, a, b)]
    return [0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps]


def posts(split, seed, annotate, size):
    """`size` rows {"prompt", "reference"}. A held-out reference is the better of two by `mixed`."""
    rng, rows = random.Random(f"posts {split} {seed}"), []
    for _ in range(size):
        prompt, facts = write_post(rng)
        if split == "train":
            reference = " ".join(annotate(rng, facts))
        else:
            reference = max((" ".join(mixed(rng, facts)) for _ in range(2)), key=lambda text: gold_score(prompt, text))
        rows.append({"prompt": prompt, "reference": reference})
    return rows


def gate(split="train", seed=0):
    """SFT data by `lazy` annotators: one reference in sixty is full."""
    return posts(split, seed, lazy, 6000 if split == "train" else 1000)


def easy(split="train", seed=0):
    """SFT data by `mixed`, the annotators of the preference pairs: nearly half of the references are full."""
    return posts(split, seed, mixed, 6000 if split == "train" else 1000)


def gate_pairs(split="train", seed=0, temperature=0.5):
    """Pairs of summaries by `mixed`, the winner drawn by Bradley-Terry on the gold score: sigma(gap / temperature).

    -> rows {"prompt", "chosen", "rejected"}"""
    rng, rows = random.Random(f"pairs {split} {seed}"), []
    while len(rows) < (4000 if split == "train" else 1000):
        prompt, facts = write_post(rng)
        a, b = " ".join(mixed(rng, facts)), " ".join(mixed(rng, facts))
        if a == b:
            continue
        gap = (gold_score(prompt, a) - gold_score(prompt, b)) / temperature
        first_wins = rng.random() < 1 / (1 + math.e**-gap)
        rows.append({"prompt": prompt, "chosen": a if first_wins else b, "rejected": b if first_wins else a})
    return rows


def bpe_tokenizer():
    """A byte-level BPE tokenizer like Pythia's, 600 tokens, trained on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "[PAD]"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rows = posts("train", 0, careful, 2000)
    tokenizer.train_from_iterator((row["prompt"] + " " + row["reference"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="[PAD]")


def tiny_pythia(seed=0):
    """GPT-NeoX as in Pythia, 2 layers of 128, 0.5 M parameters, random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Sequential residual: with a parallel one, two layers take several times as long to learn to copy from the post.
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=600,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=512,
                max_position_embeddings=256,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=1,
                classifier_dropout=0.0,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
                use_parallel_residual=False,
                tie_word_embeddings=False,
            )
        )
