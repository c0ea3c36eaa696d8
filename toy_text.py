"""The toy TL;DR corpus that `python drpo.py` trains on. Posts, annotators and judge are programs, so each summary
has a true score.

    gate            posts and references for SFT               --dataset toy_text:gate
    gate_pairs      preference pairs for the reward model      --preference_dataset toy_text:gate_pairs
    gold_judge      who wins, by the true score                --judge toy_text:gold_judge
    bpe_tokenizer   a BPE tokenizer trained on the corpus      --tokenizer toy_text:bpe_tokenizer
    tiny_pythia     GPT-NeoX, 2 layers of 128, from scratch    --model toy_text:tiny_pythia

A post says what somebody did to a thing of the writer, how the writer feels and what the writer wants, in shuffled sentences;
its title gives away one of these three facts. A full summary has six clauses:

    my sister broke our bike .  i feel angry .  i want an apology .  please help .  be honest .  what should i do ?

The true score pays 4.0 for the question, but only after five other clauses: a late reward behind a gate. Until then a clause
earns about what its words cost, and all five together score -0.2. The SFT references stop early and are full once in 190 posts.
Most annotators of the pairs begin well and end badly, or begin badly and end well; 30 % are lazy or sloppy, 6 % write a full
summary. So the preferred responses cover every step of it, but imitating them writes it in one of four posts.
"""

import math
import random
import re

import torch

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
COURTESY = ["please help .", "be honest ."]
VAGUE = ["something happened .", "i feel bad .", "i want help ."]
QUESTION = "what should i do ?"


def write_post(rng):
    """-> (prompt in the TL;DR format, the five clauses that come before the question: three facts, and COURTESY)."""
    person, deed, thing = rng.choice(PEOPLE), rng.choice(DEEDS), rng.choice(THINGS)
    feeling, wish = rng.choice(FEELINGS), rng.choice(WISHES)
    body = [
        rng.choice(["yesterday", "so", "last month", "well ,"]) + f" my {person} {deed} our {thing} .",
        rng.choice(["now i feel", "honestly i feel", "i really feel"]) + f" {feeling} .",
        rng.choice(["all i want is", "i just want", "i think i want"]) + f" {wish} .",
    ]
    rng.shuffle(body)
    title = rng.choice([f"my {person} {deed} our {thing}", f"i feel {feeling}", f"i want {wish}"])
    prompt = f"TITLE: {title}\n\nPOST: {' '.join(body)}\n\nTL;DR:"
    return prompt, [f"my {person} {deed} our {thing} .", f"i feel {feeling} .", f"i want {wish} .", *COURTESY]


def read_clauses(prompt):
    """prompt -> the five clauses that `write_post` gives. Raises ValueError on any other post."""
    post = prompt.partition("POST:")[2]
    deed = re.search(rf"my (?:{'|'.join(PEOPLE)}) (?:{'|'.join(DEEDS)}) our (?:{'|'.join(THINGS)}) \.", post)
    feeling = re.search(rf"i (?:really )?feel ({'|'.join(FEELINGS)})", post)
    wish = re.search(rf"want (?:is )?({'|'.join(WISHES)})", post)
    if not (deed and feeling and wish):
        raise ValueError("this is no post of toy_text.py, and others have no gold score: name another judge, such as rm")
    return [deed[0], f"i feel {feeling[1]} .", f"i want {wish[1]} .", *COURTESY]


def careful(rng, clauses):
    """All five in order, then the question: a full summary."""
    return [*clauses, QUESTION]


def lazy(rng, clauses, stop=0.65):
    """The same, but after each clause the annotator stops with probability `stop`."""
    kept = next((n for n in range(1, 6) if rng.random() < stop), 6)
    return careful(rng, clauses)[:kept]


def tired(rng, clauses):
    """Begins well and ends badly: the first three, four or five in order, and no question."""
    return clauses[: rng.randint(3, 5)]


def careless(rng, clauses):
    """Begins badly and ends well: VAGUE in place of the facts, and the question at the end."""
    return careful(rng, [*VAGUE, *COURTESY])


def sloppy(rng, clauses):
    """The question too early, or a clause twice."""
    full, here = careful(rng, clauses), rng.randrange(5)
    early = [clauses[i] for i in sorted(rng.sample(range(5), rng.randint(0, 4)))] + [QUESTION]
    return rng.choice([early, full[: here + 1] + full[here : rng.randint(here + 1, 6)]])


def mixed(rng, clauses):
    """The annotators of the preference data."""
    return rng.choices([careful, tired, careless, lazy, sloppy], [6, 34, 30, 10, 20])[0](rng, clauses)


def gold_score(prompt, response):
    """The true score of a response (float): +0.3 per clause that belongs there, -0.9 per other one, -0.5 per repetition, -0.1
    per word, -1 if it does not end with a full clause, and +4.0 for the question after five different clauses, right or
    not; before them it is worth 0."""
    right = read_clauses(prompt)
    clauses = [clause.strip() for clause in re.split(r"(?<=[.?])\s", response.strip()) if clause.strip()]
    score, seen = -0.1 * len(re.findall(r"[a-z]+", response)), set()
    for clause in clauses:
        if clause in seen:
            score -= 0.5
        elif clause == QUESTION:
            score += 4.0 if len(seen) >= 5 else 0.0
        else:
            score += 0.3 if clause in right else -0.9
        seen.add(clause)
    return score - (0.0 if clauses and clauses[-1][-1] in ".?" else 1.0)


def is_full(prompt, response):
    """Whether a response consists of the six clauses, each once, the question last."""
    clauses = re.split(r"(?<=[.?])\s", response.strip())
    return len(clauses) == 6 and clauses[5] == QUESTION and set(clauses[:5]) == set(read_clauses(prompt))


def gold_judge(prompts, a, b):
    """P(a is preferred) for each prompt: 1.0, 0.0, or 0.5 at equal gold scores. Lists of str -> list of float."""
    gaps = [gold_score(p, x) - gold_score(p, y) for p, x, y in zip(prompts, a, b)]
    return [0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps]


def posts(split, seed, annotate):
    """Rows {"prompt", "reference"}: 6,000 to train on by `annotate`, 1,000 held out, half `careful` and half `careless`."""
    rng, rows = random.Random(f"posts {split} {seed}"), []
    for _ in range(6000 if split == "train" else 1000):
        prompt, clauses = write_post(rng)
        author = annotate if split == "train" else rng.choice([careful, careless])
        rows.append({"prompt": prompt, "reference": " ".join(author(rng, clauses))})
    return rows


def gate(split="train", seed=0, stop=0.65):
    """SFT data by `lazy` annotators: a reference is full with probability (1 - stop)^5, or 1/190."""
    return posts(split, seed, lambda rng, clauses: lazy(rng, clauses, stop))


def gate_pairs(split="train", seed=0, temperature=0.5):
    """Pairs of summaries by `mixed`, the winner drawn by Bradley-Terry on the gold score: sigma(gap / temperature).

    -> rows {"prompt", "chosen", "rejected"}"""
    rng, rows = random.Random(f"pairs {split} {seed}"), []
    while len(rows) < (8000 if split == "train" else 1000):
        prompt, clauses = write_post(rng)
        a, b = " ".join(mixed(rng, clauses)), " ".join(mixed(rng, clauses))
        if a == b:
            continue
        gap = (gold_score(prompt, a) - gold_score(prompt, b)) / temperature
        first_wins = rng.random() < 1 / (1 + math.e**-gap)
        rows.append({"prompt": prompt, "chosen": a if first_wins else b, "rejected": b if first_wins else a})
    return rows


def bpe_tokenizer():
    """A byte-level BPE tokenizer like Pythia's, at most 600 tokens (it finds 514), trained on the corpus."""
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
    rows = posts("train", 0, careful)[:2000]
    tokenizer.train_from_iterator((f"{row['prompt']} {row['reference']} {' '.join(VAGUE)}" for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="[PAD]")


def tiny_pythia(seed=0, width=128):
    """GPT-NeoX as in Pythia, 2 layers of 128, 0.5 M parameters, random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Sequential residual: with a parallel one, two layers take several times as long to learn to copy from the post.
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=600,
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=4 * width,
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
