"""Data: every layout that TL;DR and HH data comes in, what is dropped, how texts become tokens, and what bad input is told.

Rows are made up here, with exactly the columns of the datasets on the Hub. The last tests read real posts and dialogues from
the folder named by the environment variable DRPO_DATA, and say only numbers about them."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import drpo
import toy_env
from tools import evaluation

ROOT = Path(__file__).resolve().parents[1]
N = 20  # rows of a file; the last two of them are held out
EOS = "<|endoftext|>"


@pytest.fixture(autouse=True)
def apart_from_the_world(tmp_path, monkeypatch):
    """No network, no files left in the user's cache, and nothing written into the working folder."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def write(path, rows):
    """Rows into a file of the format that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import datasets

        getattr(datasets.Dataset.from_list(rows), f"to_{path.suffix[1:]}")(path)
    return str(path)


def plain(name, count=N):
    return [{"prompt": f"{name} prompt {i}", "reference": f"{name} reference {i}"} for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# Layouts. Each function makes row i as it stands in the dataset; what must come out stands in the table below them.


def tldr_filtered(i):
    """vwxyzjn/ and cleanrl/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_*"""
    return {
        "id": f"t3_{i}",
        "subreddit": "advice",
        "title": f"title {i}",
        "post": f"first line {i}\n\nlast line",
        "summary": f"summary {i}",
        "query_token": [7, 8],
        "query": "SUBREDDIT: cut",
        "reference_response": f" summary {i}{EOS}",
        "reference_response_token": [9, 0],
        "reference_response_token_len": 2,
        "query_reference_response": "x",
        "query_reference_response_token": [7, 8, 9, 0],
        "query_reference_response_token_response_label": [-100, -100, 9, 0],
        "query_reference_response_token_len": 4,
    }


def comparison(i):
    """openai/summarize_from_feedback, comparisons; the last rows are CNN/DM articles"""
    article = i >= N - 6
    info = {
        "id": f"t3_{i}",
        "post": None if article else f"post {i}",
        "title": None if article else f"title {i}",
        "subreddit": None if article else "advice",
        "site": "cnn" if article else None,
        "article": f"article {i}" if article else None,
    }
    summaries = [
        {"text": f" {text} {i}", "policy": policy, "note": None} for text, policy in (("first", "sup4"), ("second", "ref"))
    ]
    return {
        "info": info,
        "summaries": summaries,
        "choice": i % 2,
        "worker": "w",
        "batch": f"batch{i % 3}",
        "split": "train",
        "extra": {"confidence": 5},
    }


def preprocessed_comparison(i):
    """vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144: the same, and texts and tokens made from it"""
    first, second = [summary["text"] + EOS for summary in comparison(i)["summaries"]]
    chosen, rejected = (second, first) if i % 2 else (first, second)
    return comparison(i) | {
        "query_token": [7],
        "query": "cut",
        "chosen": chosen,
        "chosen_token": [9, 0],
        "chosen_token_len": 2,
        "rejected": rejected,
        "rejected_token": [9, 0],
        "rejected_token_len": 2,
        "chosen_policy": "sup4",
        "rejected_policy": "ref",
        "policies": "sup4--ref",
        "query_chosen": "x",
        "query_chosen_token": [7, 9, 0],
        "query_chosen_token_len": 3,
        "query_rejected": "x",
        "query_rejected_token": [7, 9, 0],
        "query_rejected_token_len": 3,
        "query_token_len": 1,
        "query_chosen_token_response_label": [-100, 9, 0],
        "query_rejected_token_response_label": [-100, 9, 0],
    }


def older_comparison(i):
    """cleanrl/summarize_from_feedback_oai_preprocessing_1704578687 and its like: response0, response1, not chosen, rejected"""
    return (
        comparison(i)
        | {
            f"{name}{j}{tail}": "x"
            for name in ("response", "query_response")
            for j in (0, 1)
            for tail in ("", "_token", "_policy")
        }
        | {"query": "cut", "query_token": [7]}
    )


def trl_pair(i):
    """trl-lib/tldr-preference, CarperAI/openai_summarize_comparisons"""
    return {"prompt": POST.format(i=i), "chosen": f" good {i}", "rejected": f" bad {i}"}


def dialogue(i):
    """Anthropic/hh-rlhf: two whole dialogues"""
    before = f"\n\nHuman: question {i}\n\nAssistant: answer {i}\n\nHuman: and then?\n\nAssistant:"
    return {"chosen": f"{before} good {i}", "rejected": f"{before} bad {i}"}


def dahoas(i):
    """Dahoas/full-hh-rlhf and static-hh"""
    return {
        "prompt": f"\n\nHuman: question {i}\n\nAssistant:",
        "response": f" good {i}",
        "chosen": f" good {i}",
        "rejected": f" bad {i}",
    }


POST = "SUBREDDIT: r/advice\n\nTITLE: title {i}\n\nPOST: post {i}\n\nTL;DR:"


def comparison_out(i):
    first, second = (f"second {i}", f"first {i}") if i % 2 else (f"first {i}", f"second {i}")
    prompt = f"Article:\narticle {i}\n\nTL;DR:" if i >= N - 6 else POST.format(i=i)
    return {"prompt": prompt, "chosen": first, "rejected": second, "batch": f"batch{i % 3}"}


def pair_out(prompt):
    return lambda i: {"prompt": prompt.format(i=i), "chosen": f"good {i}", "rejected": f"bad {i}", "batch": None}


def reference_out(prompt, reference):
    return lambda i: {"prompt": prompt.format(i=i), "reference": reference.format(i=i), "batch": None}


HH = "\n\nHuman: question {i}\n\nAssistant: answer {i}\n\nHuman: and then?\n\nAssistant:"
LAYOUTS = [  # kind, file, what row i is, what comes of it
    (
        "reference",
        "tldr_filtered.parquet",
        tldr_filtered,
        reference_out("SUBREDDIT: r/advice\n\nTITLE: title {i}\n\nPOST: first line {i}\n\nlast line\n\nTL;DR:", "summary {i}"),
    ),
    ("pairs", "openai.jsonl", comparison, comparison_out),
    ("pairs", "vwxyzjn.parquet", preprocessed_comparison, comparison_out),
    ("pairs", "cleanrl_older.jsonl", older_comparison, comparison_out),
    (
        "reference",
        "trl.csv",
        lambda i: {"prompt": POST.format(i=i), "completion": f" summary {i}"},
        reference_out(POST, "summary {i}"),
    ),
    (
        "reference",
        "carper.parquet",
        lambda i: {"prompt": POST.format(i=i), "label": f"summary {i}"},
        reference_out(POST, "summary {i}"),
    ),
    (
        "reference",
        "space.jsonl",
        lambda i: {"prompt": POST.format(i=i) + " \n", "label": f"summary {i}\n"},
        reference_out(POST, "summary {i}"),
    ),
    (
        "reference",
        "cleanrl_older.jsonl",
        lambda i: {
            "query": POST.format(i=i),
            "query_token": [7],
            "reference_response_token": [9, 0],
            "reference_response": f" summary {i}{EOS}",
        },
        reference_out(POST, "summary {i}"),
    ),
    (
        "reference",
        "prompt_response.json",
        lambda i: {"prompt": f"p {i}", "response": f"r {i}"},
        reference_out("p {i}", "r {i}"),
    ),
    ("reference", "own.csv", lambda i: {"prompt": f"p {i}", "reference": f"r {i}"}, reference_out("p {i}", "r {i}")),
    ("pairs", "trl_pairs.csv", trl_pair, pair_out(POST)),
    ("pairs", "hh.jsonl.gz", dialogue, pair_out(HH)),
    ("pairs", "dahoas.parquet", dahoas, pair_out("\n\nHuman: question {i}\n\nAssistant:")),
    ("reference", "dahoas.jsonl", dahoas, reference_out("\n\nHuman: question {i}\n\nAssistant:", "good {i}")),
    ("reference", "hh.jsonl", dialogue, reference_out(HH, "good {i}")),  # of pairs, the chosen response is the reference
]


@pytest.mark.parametrize("kind, name, made, expected", LAYOUTS, ids=[f"{name} {kind}" for kind, name, _, _ in LAYOUTS])
def test_layout(tmp_path, capsys, kind, name, made, expected):
    source = write(tmp_path / name, [made(i) for i in range(N)])
    train, held_out = drpo.load_rows(source, kind, seed=0)
    assert train == [expected(i) for i in range(N - 2)]  # a single file: its last tenth is held out
    assert held_out == [expected(i) for i in range(N - 2, N)]
    assert "dropped" not in capsys.readouterr().out
    assert all(row["prompt"].endswith("TL;DR:") for row in train if "TL;DR:" in row["prompt"])


@pytest.mark.parametrize("count, kept", [(2, 1), (9, 8), (25, 23)])
def test_the_last_tenth_of_a_single_file_is_held_out_and_at_least_one_row(tmp_path, count, kept):
    rows = plain("x", count)
    splits = drpo.load_rows(write(tmp_path / "x.jsonl", rows), "reference", 0)
    assert [[row["reference"] for row in split] for split in splits] == [
        [row["reference"] for row in part] for part in (rows[:kept], rows[kept:])
    ]


@pytest.mark.parametrize("names, used", [(("validation", "test"), "validation"), (("test",), "test")])
def test_a_folder_is_split_as_its_files_say(tmp_path, names, used):
    for name in ("train", *names):
        write(tmp_path / "folder" / f"{name}.jsonl", plain(name))
    train, held_out = drpo.load_rows(str(tmp_path / "folder"), "reference", 0)
    assert [row["reference"] for row in train] == [f"train reference {i}" for i in range(N)]
    assert [row["reference"] for row in held_out] == [f"{used} reference {i}" for i in range(N)]


def test_the_evaluation_takes_the_held_out_split_that_is_named(tmp_path, capsys):
    for name in ("train", "validation", "test"):
        write(tmp_path / "folder" / f"{name}.jsonl", plain(name))
    s = drpo.Settings(dataset=str(tmp_path / "folder"), eval_split="test")
    assert evaluation.held_out_rows(s)[0]["reference"] == "test reference 0"
    assert evaluation.held_out_rows(dataclasses.replace(s, eval_split=""))[0]["reference"] == "validation reference 0"
    assert evaluation.held_out_rows(dataclasses.replace(s, dataset="test_data:by_split_and_seed"))[0]["prompt"] == "test 0"
    with pytest.raises(SystemExit):
        evaluation.held_out_rows(dataclasses.replace(s, eval_split="tset"))
    assert "has no split named tset, only" in capsys.readouterr().err


def by_split_and_seed(split, seed):
    return [{"prompt": f"{split} {seed}", "reference": "r"}]


def by_nothing():
    return plain("x", 2)


def batched(split):
    return [{"prompt": "p", "chosen": "a", "rejected": "b", "batch": "b7"}]


def test_a_function_gets_the_split_and_the_seed_if_it_wants_them():
    assert [rows[0]["prompt"] for rows in drpo.load_rows("test_data:by_split_and_seed", "reference", 5)] == [
        "train 5",
        "validation 5",
    ]
    assert [len(rows) for rows in drpo.load_rows("test_data:by_nothing", "reference", 5)] == [2, 2]
    assert drpo.load_rows("test_data:batched", "pairs", 5)[0] == [
        {"prompt": "p", "chosen": "a", "rejected": "b", "batch": "b7"}
    ]


def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path, capsys):
    good, (other,) = [dialogue(i) for i in range(14)], [dialogue(99)]
    bad = [
        {**good[0], "rejected": other["rejected"]},  # no shared prompt
        {**good[0], "rejected": good[0]["chosen"]},  # equal
        {**good[0], "rejected": good[0]["chosen"] + " "},  # equal but for a space
        {**good[0], "chosen": good[0]["chosen"].removesuffix(" good 0")},  # an empty response
        {"chosen": "good", "rejected": "bad"},
    ]  # no dialogue at all
    source = write(tmp_path / "x.jsonl", good[:7] + bad + good[7:])
    train, held_out = drpo.load_rows(source, "pairs", 0)  # 19 rows: 18 and 1
    assert train + held_out == [pair_out(HH)(i) for i in range(14)]
    out = capsys.readouterr().out
    assert source in out and "5 of 18 training rows dropped" in out and "held-out rows dropped" not in out


# ----------------------------------------------------------------------------------------------------------------------
# From texts to tokens


@pytest.fixture(scope="module")
def letters():
    """A tokenizer with one token per ASCII character, so that lengths can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({EOS: 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@pytest.fixture(scope="module")
def bpe():
    return toy_env.bpe_tokenizer()


def encoded(prompt, tokenizer, length):
    ids = drpo.encode_query(prompt, tokenizer, length)
    assert len(ids) <= length
    return tokenizer.decode(ids)


HEAD, TAIL = "SUBREDDIT: r/a\n\nTITLE: t\n\nPOST:", "\n\nTL;DR:"  # 31 and 8 letters


@pytest.mark.parametrize(
    "length, post",
    [
        (56, " one\ntwo\n\nfour\nx"),
        (55, " one\ntwo\n\nfour\nx"),
        (54, " one\ntwo\n\nfour"),
        (53, " one\ntwo\n\nfour"),
        (52, " one\ntwo\n"),
        (48, " one\ntwo\n"),  # the empty line is a line too
        (47, " one\ntwo"),
        (46, " one"),
        (43, " one"),
        (42, " on"),
        (41, " o"),
        (40, " "),
        (39, ""),
    ],
)
def test_a_long_post_loses_its_last_lines_then_its_last_characters(letters, length, post):
    assert len(HEAD + TAIL) == 39
    assert encoded(f"{HEAD} one\ntwo\n\nfour\nx{TAIL}", letters, length) == HEAD + post + TAIL


def test_a_title_that_is_too_long_loses_its_beginning(letters):
    assert encoded(f"{HEAD} one\ntwo{TAIL}", letters, 20) == (HEAD + TAIL)[-20:]


def test_a_post_of_one_line_loses_characters(letters):
    for length in range(39, 60):
        assert encoded(f"{HEAD} {'x' * 40}{TAIL}", letters, length) == HEAD + f" {'x' * 40}"[: length - 39] + TAIL


def test_an_article_is_cut_by_the_same_rule(letters):
    prompt = "Article:\none\ntwo\nthree\n\nTL;DR:"
    assert encoded(prompt, letters, len(prompt) - 1) == "Article:\none\ntwo\n\nTL;DR:"
    assert encoded(prompt, letters, 20) == "Article:\none\n\nTL;DR:"


@pytest.mark.parametrize(
    "title, post", [("REPOST: again", " one\ntwo"), ("t", " see the POST: there\ntwo"), ("t", " one\n\nTL;DR: no\ntwo")]
)
def test_marks_in_a_title_or_a_post_mislead_nobody(letters, title, post):
    head = HEAD.replace("TITLE: t", f"TITLE: {title}")
    assert encoded(head + post + TAIL, letters, len(head + post + TAIL) - 1) == head + post[: post.rindex("\n")] + TAIL
    assert encoded(head + post + TAIL, letters, len(head + TAIL) + 2) == head + post[:2] + TAIL


def test_an_article_may_speak_of_a_post(letters):
    prompt = "Article:\nan article\nof the Washington POST: here\nit ends\n\nTL;DR:"
    assert encoded(prompt, letters, 28) == "Article:\nan article\n\nTL;DR:"


@pytest.mark.parametrize("prompt", ["\n\nHuman: one\ntwo\n\nAssistant:", "one two three\n\nTL;DR:", "POST: one\ntwo"])
def test_other_prompts_lose_their_beginning(letters, prompt):
    for length in range(1, len(prompt) + 2):
        assert encoded(prompt, letters, length) == prompt[-length:]


def openai_rule(prompt, tokenizer, length):
    """The loop of the official preprocessing: off with the last line, or where there is one only, with a character; again."""
    head, _, post = prompt.removesuffix(TAIL).partition("\n\nPOST:")
    while len(ids := tokenizer(f"{head}\n\nPOST:{post}{TAIL}")["input_ids"]) > length and post:
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
    return ids[-length:]


def test_a_cut_is_that_of_the_official_loop_at_every_length(bpe):
    rng, words = random.Random(0), "so my sister broke our bike yesterday and i feel angry".split()
    for _ in range(2):
        post = "".join(" ".join(rng.choices(words, k=6)) + rng.choice([" . ", " .\n", " .\n\n"]) for _ in range(8))
        prompt = f"SUBREDDIT: r/advice\n\nTITLE: i feel sad\n\nPOST: {post}the end\n\nTL;DR:"
        whole = len(bpe(prompt)["input_ids"])
        assert drpo.encode_query(prompt, bpe, whole) == bpe(prompt)["input_ids"]
        for length in range(5, whole):
            ids = drpo.encode_query(prompt, bpe, length)
            assert ids == openai_rule(prompt, bpe, length) and len(ids) <= length


def test_a_response_is_a_space_its_text_and_one_eos(letters, bpe):
    for tokenizer in (letters, bpe):
        for text in ("i feel sad .", "  i feel sad .\n", f"i feel{EOS} sad .{EOS}"):
            ids = drpo.encode_response(text, tokenizer, 99)
            assert tokenizer.decode(ids) == f" i feel sad .{EOS}" and ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_a_response_that_is_too_long_has_no_eos(letters):
    assert letters.decode(drpo.encode_response("abc", letters, 5)) == f" abc{EOS}"
    assert letters.decode(drpo.encode_response("abc", letters, 4)) == " abc"
    assert letters.decode(drpo.encode_response("abc", letters, 2)) == " a"


def test_pack_pads_queries_on_the_left_and_responses_on_the_right():
    batch = drpo.padded([[5, 6, 7], [8]], [[1], [2, 3]], fill=9, device="cpu", width=4)
    assert batch["query"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["query_mask"].tolist() == [[True, True, True], [False, False, True]]
    assert batch["response"].tolist() == [[1, 9, 9, 9], [2, 3, 9, 9]] and batch["response_len"].tolist() == [1, 2]
    assert batch["row_len"].tolist() == [4, 3]
    assert drpo.padded([[5]], [[1, 2]], fill=9, device="cpu")["response"].shape == (1, 2)
    assert drpo.padded([[5]], [[]], fill=9, device="cpu")["response"].shape == (1, 0)
    assert {name: x.dtype for name, x in batch.items()} == {
        "query": torch.long,
        "query_mask": torch.bool,
        "response": torch.long,
        "response_len": torch.long,
        "row_len": torch.long,
    }


def test_a_batch_of_pairs_is_all_chosen_then_all_rejected(letters):
    s = dataclasses.replace(drpo.parse(["sft"])[1], query_length=4, device="cpu")
    rows = [{"prompt": "abcdef", "chosen": "x", "rejected": "yy"}, {"prompt": "gh", "chosen": "zzz", "rejected": "w"}]
    batch = drpo.encode(rows, ["chosen", "rejected"], s, letters, 4)
    assert [letters.decode(ids[mask]) for ids, mask in zip(batch["query"], batch["query_mask"])] == ["cdef", "gh"] * 2
    responses = [letters.decode(ids[:n]) for ids, n in zip(batch["response"], batch["response_len"])]
    assert responses == [f" x{EOS}", " zzz", f" yy{EOS}", f" w{EOS}"]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: exit status 2, and one line on stderr that names the culprit

SMALL = "--dataset test_data:few --sft_steps 1 --sft_batch_size 2 --eval_samples 2"


def few():
    return plain("x", 6)


def few_pairs():
    return [{"prompt": row["prompt"], "chosen": row["reference"], "rejected": "no"} for row in few()]


def no_rows():
    return []


def half_a_pair():
    return [*few()[:2], {"prompt": "x", "reference": "y\ud83d"}, *few()[2:]]


def no_dicts():
    return ["text"]


def no_eos_tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=toy_env.bpe_tokenizer().backend_tokenizer)


def large_tokenizer():
    tokenizer = toy_env.bpe_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(10)])
    return tokenizer


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with everything that the bad commands point at."""
    shelf = tmp_path_factory.mktemp("shelf")
    good = plain("x")
    files = {
        "good": good,
        "column": [{"prompt": "x", "text": "y"}] * N,
        "none": good[:7] + [{"prompt": "x", "reference": None}] + good[8:],
        "number": good[:7] + [{"prompt": "x", "reference": 7}] + good[8:],
        "list": [{"prompt": "x", "reference": ["y"]}] * N,
        "empty": [],
        "blank": [{"prompt": "x", "reference": " "}] * N,
        "one": good[:1],
        "half": good[:-2] + [{"prompt": "x"}] * 2,
        "choice": [{**comparison(0), "choice": 2}] * N,
        "notrain/validation": good,
    }
    for name, rows in files.items():
        write(shelf / f"{name}.jsonl", rows)
    for name, row in {
        "surrogate": {"prompt": "x\ud800", "reference": "y"},
        "dict": {"prompt": {"a": 1}, "reference": "y"},
        "bool": {"prompt": "x", "reference": True},
        "no_answer": {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
    }.items():
        write(shelf / f"{name}.jsonl", [row] * N)
    for name in ("binary.jsonl", "binary.parquet", "binary.csv"):
        (shelf / name).write_bytes(bytes(range(256)) * 8)
    (shelf / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "reference": "y"}\n' * N)
    (shelf / "zero.jsonl").touch()
    (shelf / "scalar.json").write_text("3")
    (shelf / "text.txt").write_text("one\n")
    (shelf / "head.csv").write_text("prompt,reference\n")
    (shelf / "broken.jsonl").write_text('{"prompt": "x", "reference": "y"}\n{"prompt": "x",\n')
    (shelf / "nothing").mkdir()
    drpo.main(["sft", *SMALL.split(), "--run_dir", str(shelf / "run")])
    shutil.copytree(shelf / "run" / "sft", shelf / "twice" / "sft")  # an SFT folder given as the reward model
    shutil.copytree(shelf / "run" / "sft", shelf / "twice" / "rm")
    shutil.copytree(shelf / "run" / "sft", shelf / "unfinished" / "sft")
    (shelf / "unfinished" / "sft" / "result.json").unlink()
    (shelf / "cut" / "sft").mkdir(parents=True)
    (shelf / "cut" / "sft" / "result.json").write_text('{"seconds": 1')  # by a full disk
    (shelf / "no_eos.json").write_text(no_eos_tokenizer().backend_tokenizer.to_str().replace(EOS, "[END]"))
    return shelf


BAD = {  # command -> words of its one line
    # the command line
    "nosuchstage": ["nosuchstage"],
    "sft extra": ["extra"],
    "sft --preset nope": ["--preset", "nope"],
    "sft --nosuchflag 3": ["--nosuchflag"],
    "sft --lr abc": ["--lr", "abc"],
    "sft --lr": ["--lr"],
    "sft --lr nan": ["--lr", "nan"],
    "sft --sft_lr -0.5": ["--sft_lr", "-0.5"],
    "sft --dpo_beta -1": ["--dpo_beta", "-1"],
    "sft --max_grad_norm inf": ["--max_grad_norm", "inf"],
    "sft --preset tldr --preset nope": ["--preset", "nope"],
    "sft --beta 1.5": ["--beta", "1.5"],
    "sft --beta -0.1": ["--beta", "-0.1"],
    "sft --seeds 3 4 3": ["--seeds 3 4 3", "twice"],
    "sft --updates -3": ["--updates", "-3"],
    "sft --updates 1.5": ["--updates", "1.5"],
    "sft --batch_size 0": ["--batch_size", "0"],
    "sft --micro_batch -1": ["--micro_batch", "-1"],
    "sft --temperature 0": ["--temperature", "0"],
    "sft --response_length 1": ["--response_length", "1"],
    "sft --masking some": ["--masking", "some"],
    "sft --dtype float16": ["--dtype", "float16"],
    "sft --whiten_rewards maybe": ["--whiten_rewards", "maybe"],
    "sft --device nosuchdevice": ["--device", "nosuchdevice"],
    "sft --run_dir {shelf}/good.jsonl": ["good.jsonl"],  # a file
    # data
    "sft --dataset {shelf}/missing.jsonl": ["missing.jsonl"],
    "sft --dataset {shelf}/missing": ["missing"],
    "sft --dataset nobody/nothing": ["nobody/nothing"],
    "sft --dataset {shelf}/text.txt": ["text.txt", ".jsonl"],
    "sft --dataset {shelf}/column.jsonl": ["column.jsonl", "row 0", "prompt, text"],
    "sft --dataset {shelf}/none.jsonl": ["none.jsonl", "training row 7", "reference", "None"],
    "sft --dataset {shelf}/number.jsonl": ["number.jsonl", "training row 7", "reference", "int"],
    "sft --dataset {shelf}/list.jsonl": ["list.jsonl", "training row 0", "reference", "list"],
    "sft --dataset {shelf}/half.jsonl": ["half.jsonl", "held-out row 0", "reference"],
    "sft --dataset {shelf}/choice.jsonl": ["choice.jsonl", "training row 0"],
    "sft --dataset {shelf}/empty.jsonl": ["empty.jsonl"],
    "sft --dataset {shelf}/head.csv": ["head.csv"],
    "sft --dataset {shelf}/zero.jsonl": ["zero.jsonl", "is empty"],
    "sft --dataset {shelf}/binary.jsonl": ["binary.jsonl", "JSON"],
    "sft --dataset {shelf}/binary.parquet": ["binary.parquet", "parquet"],
    "sft --dataset {shelf}/binary.csv": ["binary.csv"],
    "sft --dataset {shelf}/latin.jsonl": ["latin.jsonl", "training row 0", "utf-8"],
    "sft --dataset {shelf}/surrogate.jsonl": ["surrogate.jsonl", "surrogate", "row 0"],
    "sft --dataset test_data:half_a_pair": ["test_data:half_a_pair", "training row 2", "reference", "surrogate"],
    "sft --dataset {shelf}/dict.jsonl": ["dict.jsonl", "training row 0", "prompt must be text, not dict"],
    "sft --dataset {shelf}/bool.jsonl": ["bool.jsonl", "training row 0", "reference must be text, not bool"],
    "sft --dataset {shelf}/no_answer.jsonl": ["no_answer.jsonl", "no usable training rows"],
    "sft --dataset {shelf}/scalar.json": ["scalar.json"],
    "sft --dataset {shelf}/broken.jsonl": ["broken.jsonl", "row 1"],
    "sft --dataset {shelf}/blank.jsonl": ["blank.jsonl", "no usable training rows"],
    "sft --dataset {shelf}/one.jsonl": ["one.jsonl", "training"],
    "sft --dataset {shelf}/notrain": ["notrain", "train", "validation"],
    "sft --dataset {shelf}/nothing": ["nothing"],
    "sft --dataset nosuchmodule:rows": ["nosuchmodule"],
    "sft --dataset test_data:nosuchfunction": ["test_data", "nosuchfunction"],
    "sft --dataset test_data:ROOT": ["test_data:ROOT"],  # not a function
    "sft --dataset test_data:no_rows": ["test_data:no_rows", "no usable training rows"],
    "sft --dataset test_data:no_dicts": ["test_data:no_dicts", "training row 0"],
    # models
    f"sft {SMALL} --model {{shelf}}/nosuchmodel": ["nosuchmodel", "no such file or folder"],
    f"sft {SMALL} --model {{shelf}}/nothing": ["nothing"],
    f"sft {SMALL} --model nobody/nothing": ["nobody/nothing"],
    f"sft {SMALL} --model {{shelf}}/nosuchmodel.gguf": ["nosuchmodel.gguf"],
    f"sft {SMALL} --model test_data:few": ["--model", "test_data:few"],
    f"sft {SMALL} --tokenizer {{shelf}}/nosuchtokenizer": ["nosuchtokenizer"],
    f"sft {SMALL} --tokenizer test_data:few": ["--tokenizer", "test_data:few"],
    f"sft {SMALL} --tokenizer test_data:no_eos_tokenizer": ["--tokenizer", "no_eos_tokenizer", "end-of-text"],
    f"sft {SMALL} --tokenizer {{shelf}}/no_eos.json": ["--tokenizer", "no_eos.json", "end-of-text"],
    f"sft {SMALL} --tokenizer test_data:large_tokenizer": ["--tokenizer", "--model", "600"],
    # stages
    "rm --run_dir {shelf}/nowhere": ["rm needs", "nowhere/sft", "drpo.py sft"],
    "drpo --run_dir {shelf}/run": ["drpo needs", "run/rm", "drpo.py rm"],
    "eval --run_dir {shelf}/run": ["eval needs", "run/rm"],
    "rm --run_dir {shelf}/run --preference_dataset test_data:few": ["test_data:few", "training row 0", "chosen"],
    "drpo --run_dir {shelf}/twice --dataset test_data:few --preference_dataset test_data:few_pairs": [
        "twice/rm",
        "not a reward model",
    ],
    f"sft --run_dir {{shelf}}/run {SMALL} --sft_lr 0.5": ["run/sft", "sft_lr was 0.003, is 0.5", "--run_dir"],
    f"sft --run_dir {{shelf}}/cut {SMALL}": ["cut/sft/result.json", "cannot be read"],
    f"sft --run_dir {{shelf}}/unfinished {SMALL} --sft_lr 0.5": ["unfinished/sft", "sft_lr was 0.003, is 0.5"],
}


@pytest.mark.parametrize("command", BAD, ids=[command.replace(SMALL, "few") for command in BAD])
def test_bad_input_is_told_in_one_line(shelf, tmp_path, capsys, command):
    argv = command.format(shelf=shelf).split()
    with pytest.raises(SystemExit) as stopped:
        drpo.main(argv if "--run_dir" in argv else [*argv, "--run_dir", str(tmp_path / "run")])
    line = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(line.splitlines()) == 1 and line.startswith("drpo.py: ") and not line.endswith(":\n")
    assert all(word in line for word in BAD[command]), line


def test_bad_input_from_the_shell(shelf, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "drpo.py", "sft", "--dataset", shelf / "broken.jsonl", "--run_dir", tmp_path / "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "broken.jsonl" in done.stderr and "JSON" in done.stderr and "row 1" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Real posts and dialogues


@pytest.fixture(scope="module")
def real():
    folder = os.environ.get("DRPO_DATA")
    if not folder:
        pytest.skip("DRPO_DATA names no folder with real data")
    return Path(folder)


@pytest.fixture(scope="module")
def pythia(real):
    return drpo.load_tokenizer(str(real / "pythia_tokenizer.json"), None)


def both(splits):
    return splits[0] + splits[1]


def test_real_posts_fit_and_keep_their_end(real, pythia):
    end = pythia("TL;DR:")["input_ids"]
    cut = 0
    for name in ("tldr_train", "tldr_validation"):
        for row in both(drpo.load_rows(str(real / f"{name}.jsonl"), "reference", 0)):
            ids, whole = drpo.encode_query(row["prompt"], pythia, 512), pythia(row["prompt"])["input_ids"]
            assert row["prompt"].endswith("\n\nTL;DR:") and len(ids) <= 512 and ids[-len(end) :] == end
            assert pythia.decode(whole) == row["prompt"]
            if len(whole) > 512:
                cut += 1
                assert ids == openai_rule(row["prompt"], pythia, 512)
            else:
                assert ids == whole
    assert cut == 7  # all but these fit as they are


def test_real_references_fit(real, pythia):
    lengths = []
    for name in ("tldr_train", "tldr_validation"):
        for row in both(drpo.load_rows(str(real / f"{name}.jsonl"), "reference", 0)):
            ids = drpo.encode_response(row["reference"], pythia, 53)
            assert ids[-1] == pythia.eos_token_id and pythia.decode(ids) == f" {row['reference']}{EOS}"
            lengths.append(len(ids))
    assert len(lengths) == 1000 and max(lengths) == 50  # none is cut


def test_real_pairs_fit(real, pythia):
    rows = both(drpo.load_rows(str(real / "tldr_preferences.jsonl"), "pairs", 0))
    lengths = [len(drpo.encode_response(row[field], pythia, 169)) for row in rows for field in ("chosen", "rejected")]
    assert len(lengths) == 1000 and max(lengths) == 50


def test_real_dialogues_share_their_prompt_or_are_dropped_and_counted(real, capsys):
    rows = both(drpo.load_rows(str(real / "hh_helpful.jsonl.gz"), "pairs", 0))
    assert all(row["prompt"].endswith("\n\nAssistant:") and row["prompt"].startswith("\n\nHuman:") for row in rows)
    with gzip.open(real / "hh_helpful.jsonl.gz", "rt") as file:
        dialogues = [
            [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in map(json.loads, file)
        ]
    useful = [a for a, b in dialogues if a[0] == b[0] and a[2].strip() and b[2].strip() and a[2].strip() != b[2].strip()]
    assert len(dialogues) == 2354 and [row["chosen"] for row in rows] == [a[2].strip() for a in useful] and len(rows) == 2339
    assert "14 of 2119 training rows dropped" in (out := capsys.readouterr().out) and "1 of 235 held-out rows dropped" in out


def test_cnn_dailymail_is_read_by_its_columns_with_the_prompt_tail_of_tldr(tmp_path):
    rows = [
        {"article": f"(CNN) Story {i}.\nIt goes on.", "highlights": f"Point {i} .\nAnother point .", "id": str(i)}
        for i in range(N)
    ]
    train, held_out = drpo.load_rows(write(tmp_path / "cnn.jsonl", rows), "reference", 0)
    assert len(train) == 18 and held_out[0] == {
        "prompt": "Article:\n(CNN) Story 18.\nIt goes on.\n\nTL;DR:",
        "reference": "Point 18 .\nAnother point .",
        "batch": None,
    }


def test_the_cnndm_preset_leaves_room_for_64_new_tokens_in_pythias_2048_and_cuts_an_article_at_its_end():
    s = drpo.parse(["eval", "--preset", "cnndm"])[1]
    assert (s.dataset, s.response_length) == ("abisee/cnn_dailymail:3.0.0", 64) and s.query_length + s.response_length <= 2048
    tokenizer = toy_env.bpe_tokenizer()
    prompt = "Article:\n" + "i feel sad .\n" * 700 + "\n\nTL;DR:"
    ids = drpo.encode_query(prompt, tokenizer, s.query_length)
    text = tokenizer.decode(ids)
    assert len(ids) <= s.query_length and text.startswith("Article:\ni feel sad .") and text.endswith("i feel sad .\n\nTL;DR:")
