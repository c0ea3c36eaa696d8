"""Data: every layout of TL;DR and HH data, what is dropped, how texts become tokens, and what bad rows are told.

Rows are made up here, with the columns of the datasets on the Hub. The last tests read real posts and dialogues from the folder
that the environment variable DRPO_DATA names."""

import csv
import gzip
import json
import os
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import drpo
import toy_text

N, EOS = 20, "<|endoftext|>"
S = drpo.parse(["sft"])[1]
POST = "SUBREDDIT: r/advice\n\nTITLE: title {i}\n\nPOST: first line {i}\n\nlast line\n\nTL;DR:"
ONE_NEWLINE = POST.replace("\n\n", "\n")
ARTICLE = "Article:\n(CNN) Story {i}.\nIt ends.\n\nTL;DR:"
HH = "\n\nHuman: question {i}\n\nAssistant: answer {i}\n\nHuman: and then?\n\nAssistant:"


@pytest.fixture(autouse=True)
def apart_from_the_world(tmp_path, monkeypatch):
    """No network, and nothing written into the user's cache."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def write(path, rows):
    """Rows into a file of the format that its name tells -> its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
        return str(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(name, count=N):
    return [{"prompt": f"{name} prompt {i}", "reference": f"{name} reference {i}"} for i in range(count)]


def refused(capsys, function, *args):
    """-> the one line on stderr with which function(*args) ends, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and len(line.splitlines()) == 1 and line.startswith("drpo.py: "), line
    return line


# ----------------------------------------------------------------------------------------------------------------------
# Layouts. Row i of each has the prompt that the table says, "good i" as reference or chosen, and "bad i" as rejected.


def post(i):
    return {"subreddit": "advice", "title": f"title {i}", "post": f"first line {i}\n\nlast line"}


def tldr(i):
    """vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_*"""
    tokens = {"query_token": [7], "reference_response_token": [9, 0], "query_reference_response_token": [7, 9, 0]}
    texts = {"query": "SUBREDDIT: cut", "reference_response": f" good {i}{EOS}", "query_reference_response": "x"}
    return {"id": f"t3_{i}", **post(i), "summary": f"good {i}", **texts, **tokens, "reference_response_token_len": 2}


def comparison(i, article=False):
    """openai/summarize_from_feedback, comparisons: reddit posts, and CNN/DM articles"""
    of_post = dict.fromkeys(post(i)) if article else post(i)
    info = {"id": f"{i}", **of_post, "site": "cnn", "article": f"(CNN) Story {i}.\nIt ends." if article else None}
    texts = [f" good {i}", f" bad {i}"][:: -1 if i % 2 else 1]
    summaries = [{"text": text, "policy": "sup4", "note": None} for text in texts]
    return {"info": info, "summaries": summaries, "choice": i % 2, "worker": "w", "batch": "batch7", "split": "train"}


def preprocessed(i):
    """vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144: the same, and texts and tokens made from it"""
    texts = {"query": "cut", "chosen": f" good {i}{EOS}", "rejected": f" bad {i}{EOS}", "query_chosen": "x"}
    return comparison(i) | texts | {"query_token": [7], "chosen_token": [9, 0], "chosen_policy": "sup4"}


def older(i):
    """cleanrl/summarize_from_feedback_oai_preprocessing_1704578687: response0 and response1, not chosen and rejected"""
    names = [f"{name}{j}{tail}" for name in ("response", "query_response") for j in "01" for tail in ("", "_token")]
    return comparison(i) | dict.fromkeys(names, "x") | {"query": "cut", "query_token": [7]}


def made(i, **columns):
    return {name: text.format(i=i) for name, text in columns.items()}


LAYOUTS = {  # file: kind, row i, prompt
    "vwxyzjn.parquet": ("reference", tldr, POST),
    "cleanrl_query.json": ("reference", partial(made, query=POST, reference_response=" good {i}" + EOS), POST),
    "trl_lib.csv": ("reference", partial(made, prompt=POST, completion=" good {i}"), POST),
    "carper.jsonl": ("reference", partial(made, prompt=ONE_NEWLINE, label="good {i}\n"), ONE_NEWLINE),
    "dahoas.jsonl": ("reference", partial(made, prompt=HH, response=" good {i}", chosen=" good {i}", rejected=" x"), HH),
    "hh_as_references.jsonl": ("reference", partial(made, chosen=HH + " good {i}", rejected=HH + " bad {i}"), HH),
    "cnn_dailymail.csv.gz": ("reference", partial(made, article=ARTICLE[9:-8], highlights="good {i}", id="{i}"), ARTICLE),
    "our_own.jsonl.gz": ("reference", partial(made, prompt=POST + " \n", reference="good {i}"), POST),
    "openai.jsonl": ("pairs", comparison, POST),
    "openai_cnndm.json": ("pairs", partial(comparison, article=True), ARTICLE),
    "vwxyzjn_pairs.parquet": ("pairs", preprocessed, POST),
    "cleanrl_older.parquet": ("pairs", older, POST),
    "trl_lib_pairs.csv": ("pairs", partial(made, prompt=POST, chosen=" good {i}", rejected=" bad {i}"), POST),
    "carper_pairs.jsonl": (
        "pairs",
        partial(made, prompt=ONE_NEWLINE[:-7], chosen="TL;DR:  good {i}", rejected="TL;DR:  bad {i}"),
        ONE_NEWLINE,
    ),
    "anthropic_hh.jsonl.gz": ("pairs", partial(made, chosen=HH + " good {i}", rejected=HH + " bad {i}"), HH),
    "dahoas.parquet": ("pairs", partial(made, prompt=HH, response=" x", chosen=" good {i}", rejected=" bad {i}"), HH),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_told_by_its_columns(tmp_path, capsys, name):
    kind, row, prompt = LAYOUTS[name]
    parts = drpo.load_rows(write(tmp_path / name, [row(i) for i in range(N)]), kind, 0)
    texts = {"reference": "good {i}"} if kind == "reference" else {"chosen": "good {i}", "rejected": "bad {i}"}
    wanted = [made(i, prompt=prompt.strip(), **texts) | {"batch": row(i).get("batch")} for i in range(N)]
    assert sorted(parts[0] + parts[1], key=wanted.index) == wanted  # one split in the file: a tenth is held out
    assert [wanted.index(x) for x in parts[0]] == sorted(map(wanted.index, parts[0])) and len(parts[1]) == 2
    assert "dropped" not in capsys.readouterr().out


def test_files_with_a_byte_order_mark_and_data_key_are_read(tmp_path):
    rows = plain("x")
    for name, text in {
        "bom.jsonl": "\ufeff" + "\n\n".join(map(json.dumps, rows)),
        "bom.csv": "\ufeffprompt,reference\r\n" + "".join(f'"{x["prompt"]}",{x["reference"]}\r\n' for x in rows),
        "data.json": json.dumps({"version": 1, "data": rows}),
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert sum(map(len, drpo.load_rows(str(tmp_path / name), "reference", 0))) == N


def test_words_for_nothing_and_digits_stay_text_in_csv(tmp_path):
    texts = ["None", "N/A", "null", "nan", "17", "1e5", "true", 'two\nlines, "quoted"'] + ["x"] * 4
    rows = [{"prompt": f"p{i}", "reference": text} for i, text in enumerate(texts)]
    parts = drpo.load_rows(write(tmp_path / "x.csv", rows), "reference", 0)
    assert {row["prompt"]: row["reference"] for part in parts for row in part} == {x["prompt"]: x["reference"] for x in rows}


def test_folders_keep_their_splits_and_a_colon_in_a_path(tmp_path):
    from datasets import Dataset, DatasetDict

    for held_out in ("validation", "test"):
        for split in ("train", held_out):
            write(tmp_path / f"{held_out}:v1" / f"{split}.jsonl", plain(split))
    DatasetDict({split: Dataset.from_list(plain(split)) for split in ("train", "valid1")}).save_to_disk(tmp_path / "saved")
    for folder, held_out in {"validation:v1": "validation", "./test:v1": "test", "saved": "valid1"}.items():
        parts = drpo.load_rows(folder, "reference", 0)
        assert [[row["reference"] for row in part] for part in parts] == [
            [row["reference"] for row in plain(name)] for name in ("train", held_out)
        ]
    Dataset.from_list(plain("x")).save_to_disk(tmp_path / "one_split")
    assert list(map(len, drpo.load_rows("one_split", "reference", 0))) == [N - 2, 2]


def test_no_prompt_is_in_both_parts_and_the_seed_draws_them(tmp_path):
    rows = [{"prompt": f"p{i % 30}", "reference": f"r{i}"} for i in range(100)]
    source, drawn = write(tmp_path / "x.jsonl", rows), []
    for seed in range(4):
        train, held_out = [{row["prompt"] for row in part} for part in drpo.load_rows(source, "reference", seed)]
        assert not train & held_out and len(held_out) == 3 and len(train) == 27
        drawn.append(held_out)
    assert len(set(map(frozenset, drawn))) == 4 and set.union(*drawn) != {"p27", "p28", "p29"}
    pairs = [{"prompt": row["prompt"], "chosen": row["reference"], "rejected": "x"} for row in rows]
    held_out = drpo.load_rows(write(tmp_path / "pairs.jsonl", pairs), "pairs", 0)[1]
    assert {row["prompt"] for row in held_out} == drawn[0]  # the pairs of one corpus leave out the posts of the other


def by_split_and_seed(split, seed):
    return [{"prompt": f"{split} {seed}", "chosen": "a", "rejected": "b", "batch": "b7"}]


def by_nothing():
    return plain("x", 2)


def test_a_function_gets_split_and_seed_if_it_takes_them():
    train, held_out = drpo.load_rows("test_data:by_split_and_seed", "pairs", 5)
    assert train == [{"prompt": "train 5", "chosen": "a", "rejected": "b", "batch": "b7"}]
    assert held_out[0]["prompt"] == "validation 5"
    assert list(map(len, drpo.load_rows("test_data:by_nothing", "reference", 5))) == [2, 2]


def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path, capsys):
    row, other = [made(i, chosen=HH + " good {i}", rejected=HH + " bad {i}") for i in (0, 99)]
    useless = {
        "no shared prompt": {**row, "rejected": other["rejected"]},
        "equal but for a space": {**row, "rejected": row["chosen"] + " "},
        "an empty response": {**row, "chosen": row["chosen"].removesuffix(" good 0")},
        "no dialogue": {"chosen": "good", "rejected": "bad"},
    }
    for i, bad in enumerate(useless.values()):
        write(tmp_path / "folder" / "train.jsonl", [row] * 3 + [bad])
        write(tmp_path / "folder" / "test.jsonl", [other])
        train, held_out = drpo.load_rows(f"{tmp_path}/{'./' * i}folder", "pairs", 0)
        assert len(train) == 3 and len(held_out) == 1
        out = capsys.readouterr().out
        assert "1 of 4 training rows dropped" in out and "held-out rows dropped" not in out


# ----------------------------------------------------------------------------------------------------------------------
# Bad rows: one line that names file, row and column

GOOD = {"prompt": "x", "reference": "y"}
BAD = {  # name: (rows or the file's text, words of the line)
    "column.jsonl": ([{"prompt": "x", "text": "y"}] * 9, ["row 0", "reference", "None"]),
    "none.jsonl": ([GOOD] * 4 + [{**GOOD, "reference": None}], ["row 4", "reference must be text, not None"]),
    "number.jsonl": ([GOOD, {**GOOD, "prompt": 7}], ["row 0", "prompt must be text, not 7"]),
    "list.jsonl": ([{**GOOD, "reference": ["y"]}] * 9, ["row 0", "reference must be text"]),
    "messages.jsonl": ([{"prompt": "x", "completion": [{"role": "user", "content": "y"}]}] * 9, ["row 0", "messages"]),
    "blank.jsonl": ([{**GOOD, "reference": " "}] * 9, ["no usable training rows"]),
    "empty.jsonl": ("", ["empty.jsonl"]),
    "empty.json": ("[]", ["no usable training rows among 0"]),
    "head.csv": ("prompt,reference\n", ["no usable training rows among 0"]),
    "scalar.json": ("3", ["cannot be read"]),
    "words.jsonl": ('"one"\n"two"\n', ["cannot be read"]),
    "broken.jsonl": (json.dumps(GOOD) + '\n{"prompt": "x",\n', ["cannot be read", "JSON"]),
    "binary.parquet": ("no parquet", ["cannot be read"]),
    "notes.txt.zip": ("one", ["cannot be read"]),
    "missing.jsonl": (None, ["cannot be read"]),
    "nobody/nothing": (None, ["cannot be read"]),
    "test_data:nosuchfunction": (None, ["nosuchfunction"]),
    "test_data:N": (None, ["not a callable"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_in_one_line(tmp_path, capsys, name):
    content, words = BAD[name]
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content:
        write(tmp_path / name, content)
    line = refused(capsys, drpo.load_rows, name, "reference", 0)
    assert name in line and all(word in line for word in words), line


def test_pairs_as_messages_are_refused_by_their_name(tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(tmp_path / "chat.jsonl", [{"chosen": turns, "rejected": turns[:1]}] * 4)
    assert "write messages out as text" in refused(capsys, drpo.load_rows, "chat.jsonl", "pairs", 0)


def test_a_lone_surrogate_is_refused_with_its_row(tmp_path, capsys):
    write(tmp_path / "half.jsonl", [{"prompt": f"{i}", "reference": "y\ud83d" if i == 5 else "y"} for i in range(9)])
    line = refused(capsys, drpo.load_rows, "half.jsonl", "reference", 0)
    assert "half.jsonl" in line and "row" in line and "reference" in line


# ----------------------------------------------------------------------------------------------------------------------
# From texts to tokens


def letters(added=None):
    """One token per ASCII character, so that lengths can be counted by hand. added: "[BOS] $A" or the like."""
    words = {EOS: 0, **{letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, "[BOS]": 300}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token="[BOS]")
    if added:
        special = [("[BOS]", 300), (EOS, 0)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=special)
    return tokenizer


LETTERS = letters()
HEAD, TAIL = "SUBREDDIT: r/a\n\nTITLE: t\n\nPOST:", "\n\nTL;DR:"  # 31 and 8 letters


def encoded(prompt, length, tokenizer=LETTERS):
    ids = drpo.encode_query(prompt, tokenizer, length)
    assert len(ids) <= length
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    "length, kept",
    [(56, 17), (55, 16), (54, 15), (52, 9), (48, 9), (47, 8), (46, 4), (43, 4), (42, 3), (40, 1), (39, 0)],
)
def test_a_long_post_loses_its_last_lines_then_characters(length, kept):
    post = " one\ntwo\n\nfour\nxy"
    assert len(HEAD + TAIL) == 39 and kept <= length - 39
    assert encoded(HEAD + post + TAIL, length) == HEAD + post[:kept].removesuffix("\n" * (kept in (15,))) + TAIL


def test_a_post_of_one_line_loses_characters():
    for length in range(39, 60):
        assert encoded(f"{HEAD} {'x' * 40}{TAIL}", length) == HEAD + f" {'x' * 40}"[: length - 39] + TAIL


def test_a_post_with_single_newlines_keeps_its_title():
    head, tail = HEAD.replace("\n\n", "\n"), TAIL[1:]
    assert encoded(f"{head} one\ntwo\nthree{tail}", len(head + tail) + 9) == f"{head} one\ntwo{tail}"


def test_an_article_is_cut_by_the_same_rule():
    prompt = "Article:\none\nof the Washington POST: two\nthree\n\nTL;DR:"
    assert encoded(prompt, len(prompt) - 1) == prompt.replace("\nthree", "")
    assert encoded(prompt, 22) == "Article:\none\n\nTL;DR:"


@pytest.mark.parametrize("title, post", [("REPOST: x", " one\ntwo"), ("t", " the POST: is\ntwo"), ("t", " one\n\nTL;DR: no\ntwo")])
def test_marks_in_a_title_or_a_post_mislead_nobody(title, post):
    head = HEAD.replace("TITLE: t", f"TITLE: {title}")
    assert encoded(head + post + TAIL, len(head + post + TAIL) - 1) == head + post[: post.rindex("\n")] + TAIL
    assert encoded(head + post + TAIL, len(head + TAIL) + 2) == head + post[:2] + TAIL


@pytest.mark.parametrize("prompt", [HH.format(i=1), "one two three\n\nTL;DR:", "POST: one\ntwo", HEAD + TAIL])
def test_other_prompts_lose_their_beginning(prompt):
    for length in range(1, len(prompt) + 2):
        assert encoded(prompt, length) == prompt[-length:]


def official_loop(prompt, tokenizer, length):
    """Off with the last line, or where there is one only, with one character; again, until it fits."""
    head, _, post = prompt.removesuffix(TAIL).partition("\n\nPOST:")
    while len(ids := tokenizer(f"{head}\n\nPOST:{post}{TAIL}")["input_ids"]) > length and post:
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
    return ids[-length:]


def test_a_cut_is_that_of_the_official_loop_at_every_length():
    bpe, rng, words = toy_text.bpe_tokenizer(), random.Random(0), "so my sister broke our bike yesterday 日本 feel angry".split()
    post = "".join(" ".join(rng.choices(words, k=6)) + rng.choice([" . ", " .\n", " .\n\n"]) for _ in range(8))
    prompt = f"SUBREDDIT: r/advice\n\nTITLE: i feel sad\n\nPOST: {post}the end{TAIL}"
    for length in range(5, len(bpe(prompt)["input_ids"]) + 1):
        assert drpo.encode_query(prompt, bpe, length) == official_loop(prompt, bpe, length)


def test_a_bos_stays_and_an_eos_that_is_added_goes():
    both, post = letters(f"[BOS] $A {EOS}"), f"{HEAD} one\ntwo{TAIL}"
    for prompt, length, kept in ((post, 99, post), (post, 44, f"{HEAD} one{TAIL}"), ("abcdef", 7, "abcdef"), ("abcdef", 4, "def")):
        assert encoded(prompt, length, both) == "[BOS]" + kept
        assert encoded(prompt, length, letters(f"$A {EOS}")) == encoded(prompt, length)
    assert both.decode(drpo.encode_response("abc", both, 9)) == f" abc{EOS}"


def test_a_response_is_a_space_its_text_and_one_eos():
    for tokenizer in (LETTERS, toy_text.bpe_tokenizer()):
        for text in ("i feel sad .", "  i feel sad .\n", f"i feel{EOS} sad .{EOS}"):
            ids = drpo.encode_response(text, tokenizer, 99)
            assert tokenizer.decode(ids) == f" i feel sad .{EOS}" and ids.count(tokenizer.eos_token_id) == 1


def test_a_response_that_is_cut_loses_its_eos():
    assert [LETTERS.decode(drpo.encode_response("abc", LETTERS, n)) for n in (5, 4, 2)] == [f" abc{EOS}", " abc", " a"]


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_collate_pads_on_the_right():
    batch = drpo.collate([[5, 6, 7], [8]], [[1], [2, 3]], 4, "cpu")
    assert batch["ids"].tolist() == [[5, 6, 7, 1], [8, 2, 3, 0]] and batch["response"].tolist() == [[1, 0, 0, 0], [2, 3, 0, 0]]
    assert batch["query_len"].tolist() == [3, 1] and batch["response_len"].tolist() == [1, 2]
    assert len(batch) == 4 and all(x.dtype == torch.long for x in batch.values())


def test_a_batch_of_pairs_is_all_chosen_then_all_rejected():
    s = drpo.dataclasses.replace(S, query_length=4, device="cpu")
    rows = [{"prompt": "abcdef", "chosen": "x", "rejected": "yy"}, {"prompt": "gh", "chosen": "zzz", "rejected": "w"}]
    batch = drpo.encode(rows, ["chosen", "rejected"], s, LETTERS, 4)
    lengths = (batch["query_len"] + batch["response_len"]).tolist()
    assert [LETTERS.decode(ids[:n]) for ids, n in zip(batch["ids"], lengths)] == [
        f"cdef x{EOS}",
        "gh zzz",
        f"cdef yy{EOS}",
        f"gh w{EOS}",
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches_cover_all_rows_once_by_falling_length(size):
    lengths = [2, 9, 4, 7, 9, 3, 5]
    batch = drpo.collate([[i] * n for i, n in enumerate(lengths)], [[i] for i in range(7)], 1, "cpu") | {"reset_len": torch.arange(7)}
    seen = []
    for index, part in drpo.micro_batches(batch, size):
        assert len(index) <= size and part["reset_len"].tolist() == part["ids"][:, 0].tolist() == index.tolist()
        assert part["ids"].shape[1] == max(lengths[i] for i in index) + 1
        seen += index.tolist()
    assert sorted(seen) == list(range(7)) and [lengths[i] for i in seen] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_micro_batches_keep_pairs_together(size):
    batch = drpo.collate([[i] for i in range(10)], [[i] * n for i, n in enumerate([1, 2, 3, 4, 5, 9, 1, 1, 1, 1])], 9, "cpu")
    seen = []
    for index, part in drpo.micro_batches(batch, size, pairs=True):
        assert len(part["ids"]) <= max(2, size) and part["ids"][:, 0].tolist() == index.tolist() + (index + 5).tolist()
        seen += index.tolist()
    assert seen == [0, 4, 3, 2, 1]  # pair 0 has the longest row, a rejected one


def test_each_epoch_of_draw_is_a_permutation_of_its_own():
    drawn = [row for update in range(10) for row in drpo.draw(list(range(10)), 4, update, 0, "rl")]  # straddles the epochs
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    assert sorted(map(drpo.draw(list("abc"), 7, 0, 0, "rl").count, "abc")) == [2, 2, 3]  # more than there are


def test_draw_depends_on_seed_stream_and_update_alone():
    rows, first = list(range(100)), None
    for seed in (1, 2):
        torch.manual_seed(seed)
        first, before = drpo.draw(rows, 20, 5, 0, "rl"), first
    assert first == before
    others = [drpo.draw(rows, 20, *key) for key in ((6, 0, "rl"), (5, 1, "rl"), (5, 0, "sft"))]
    assert first not in others


# ----------------------------------------------------------------------------------------------------------------------
# Real posts and dialogues


@pytest.fixture(scope="module")
def real():
    if "DRPO_DATA" not in os.environ:
        pytest.skip("DRPO_DATA names no folder with real data")
    return Path(os.environ["DRPO_DATA"])


@pytest.fixture(scope="module")
def pythia(real):
    return PreTrainedTokenizerFast(tokenizer_file=str(real / "pythia_tokenizer.json"), eos_token=EOS, bos_token=EOS)


def all_rows(real, name, kind):
    return sum(drpo.load_rows(str(real / name), kind, 0), [])


def test_real_posts_fit_and_keep_title_and_end(real, pythia):
    cut, lengths = 0, []
    for row in [row for name in ("train", "validation") for row in all_rows(real, f"tldr_{name}.jsonl", "reference")]:
        ids, whole = drpo.encode_query(row["prompt"], pythia, 512), pythia(row["prompt"])["input_ids"]
        assert ids == (whole if len(whole) <= 512 else official_loop(row["prompt"], pythia, 512)) and len(ids) <= 512
        title = row["prompt"].partition("\n\nPOST:")[0]
        assert pythia.decode(ids).startswith(title) and pythia.decode(ids).endswith(TAIL)
        cut += len(whole) > 512
        response = drpo.encode_response(row["reference"], pythia, 53)
        assert response[-1] == pythia.eos_token_id and pythia.decode(response) == f" {row['reference']}{EOS}"
        lengths.append(len(response))
    assert (cut, len(lengths), max(lengths)) == (7, 1000, 50)


def test_real_pairs_fit(real, pythia):
    rows = all_rows(real, "tldr_preferences.jsonl", "pairs")
    lengths = [len(drpo.encode_response(row[name], pythia, 169)) for row in rows for name in ("chosen", "rejected")]
    assert len(lengths) == 1000 and max(lengths) == 50


def test_real_dialogues_share_their_prompt_or_are_dropped(real, capsys):
    rows = all_rows(real, "hh_helpful.jsonl.gz", "pairs")
    assert all(row["prompt"].startswith("Human:") and row["prompt"].endswith("\n\nAssistant:") for row in rows)
    with gzip.open(real / "hh_helpful.jsonl.gz", "rt") as file:
        sides = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in map(json.loads, file)]
    useful = {(a[2].strip(), b[2].strip()) for a, b in sides if a[0] == b[0] and a[2].strip() and b[2].strip()}
    assert {(row["chosen"], row["rejected"]) for row in rows} == {(a, b) for a, b in useful if a != b} and len(rows) == 2339
    assert "training rows dropped" in capsys.readouterr().out
