"""Data: every layout of TL;DR and HH data, what is dropped, how texts become tokens, and what bad rows are told.

The last tests read real posts and dialogues from the folder that the environment variable DRPO_DATA names."""

import gzip
import json
import os
import random
from pathlib import Path

import pandas
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import drpo
import toy_text

N, EOS = 20, "<|endoftext|>"
POST = "SUBREDDIT: r/advice\n\nTITLE: title {i}\n\nPOST: first line {i}\n\nlast line\n\nTL;DR:"
ONE_NEWLINE = POST.replace("\n\n", "\n")
ARTICLE = "Article:\n(CNN) Story {i}.\nIt ends.\n\nTL;DR:"
HH = "\n\nHuman: question {i}\n\nAssistant: answer {i}\n\nHuman: and then?\n\nAssistant:"


@pytest.fixture(autouse=True)
def apart_from_the_world(tmp_path, monkeypatch):  # no network, and nothing is written into the user's folders
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for switch in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(switch, True)
    monkeypatch.chdir(tmp_path)
    drpo.load_rows.cache_clear()  # files of other tests have the same names


def write(name, rows):  # rows into a file of the format that its name tells -> its name
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "parquet"):
        getattr(pandas.DataFrame(rows), f"to_{kind}")(name, index=False)
    else:
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return name


def rows_of(name="x", count=N, **columns):
    return [{"prompt": f"{name} prompt {i}", "reference": f"{name} reference {i}"} | columns for i in range(count)]


# ---- Layouts. Row i has the prompt that the table says, "good i" as reference or as chosen, and "bad i" as rejected
def fill(template, i):  # the template with i in all its texts
    return json.loads(json.dumps(template).replace("{i}", str(i)))


COLUMNS = {"subreddit": "advice", "title": "title {i}", "post": "first line {i}\n\nlast line"}
TOKENS = {"query": "cut", "query_token": [7], "query_token_len": 1, "reference_response_token": [9, 0]}
COMPARISON = {"info": {"id": "{i}", **COLUMNS, "site": None, "article": None}, "choice": 1, "batch": "batch7", "split": "train"}
COMPARISON["summaries"] = [{"text": " bad {i}", "policy": "sup4"}, {"text": " good {i}", "policy": "ref"}]
OF_ARTICLE = {**dict.fromkeys(COLUMNS), "id": "{i}", "site": "cnn", "article": ARTICLE[9:-8]}
OWN = {"prompt": POST, "reference": "good {i}", "info": "a note", "article": "7", "batch": ["b"]}
OLDER = dict.fromkeys([f"{name}{j}" for name in ("response", "query_response", "response_token") for j in "01"], "x")
PAIR, DIALOGUES = {"chosen": " good {i}", "rejected": " bad {i}"}, {"chosen": HH + " good {i}", "rejected": HH + " bad {i}"}
ENDED = {"chosen": " good {i}" + EOS, "rejected": " bad {i}" + EOS, "query_chosen": "x", "chosen_token": [9, 0]}
CARPER = {"prompt": ONE_NEWLINE[:-7], "chosen": "TL;DR:  good {i}", "rejected": "TL;DR:  bad {i}"}
LAYOUTS = {  # file: row, its prompt; files of pairs are named so
    "vwxyzjn.parquet": ({**COLUMNS, **TOKENS, "summary": "good {i}", "reference_response": " good {i}" + EOS}, POST),
    "cleanrl_query.json": ({"query": POST, "reference_response": " good {i}" + EOS}, POST),
    "trl_lib.csv": ({"prompt": POST, "completion": " good {i}"}, POST),
    "carper.jsonl": ({"prompt": ONE_NEWLINE, "label": "good {i}\n"}, ONE_NEWLINE),
    "dahoas.jsonl": ({"prompt": HH, "response": " good {i}", **PAIR}, HH),
    "anthropic_hh.jsonl": (DIALOGUES, HH),
    "cnn_dailymail.csv.gz": ({"article": ARTICLE[9:-8], "highlights": "good {i}", "id": "{i}"}, ARTICLE),
    "our_own.jsonl.gz": ({"prompt": POST + " \n", "reference": "good {i}"}, POST),
    "notes_in_info.jsonl": (OWN, POST),
    "openai_pairs.jsonl": (COMPARISON, POST),
    "openai_first_pairs.jsonl": ({**COMPARISON, "summaries": COMPARISON["summaries"][::-1], "choice": 0}, POST),
    "openai_cnndm_pairs.json": ({**COMPARISON, "info": OF_ARTICLE}, ARTICLE),
    "vwxyzjn_pairs.parquet": ({**COMPARISON, **TOKENS, **ENDED}, POST),
    "cleanrl_older_pairs.parquet": ({**COMPARISON, **TOKENS, **OLDER}, POST),
    "trl_lib_pairs.csv": ({"prompt": POST, **PAIR}, POST),
    "carper_pairs.jsonl": (CARPER, ONE_NEWLINE),
    "anthropic_hh_pairs.jsonl.gz": (DIALOGUES, HH),
    "dahoas_pairs.parquet": ({"prompt": HH, "response": "x", **PAIR}, HH),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_told_by_its_columns(capsys, name):
    (row, prompt), kind = LAYOUTS[name], "pairs" if "pairs" in name else "reference"
    expected = {"chosen": "good {i}", "rejected": "bad {i}"} if kind == "pairs" else {"reference": "good {i}"}
    wanted = [fill({"prompt": prompt.strip(), **expected, "batch": row.get("batch")}, i) for i in range(N)]
    train, held_out = drpo.load_rows(write(name, [fill(row, i) for i in range(N)]), kind, 0)
    assert sorted(train + held_out, key=wanted.index) == wanted and 0 < len(held_out) < N / 2  # one split: some are held out
    assert [wanted.index(x) for x in train] == sorted(map(wanted.index, train)) and "dropped" not in capsys.readouterr().out


def test_texts_stay_texts_in_files_of_every_make():
    odd = ["None", "N/A", "null", "nan", "17", "1e5", "true", 'two\nlines, "quoted"', "日本\u200d\0", "last"]
    rows = [{"prompt": f"p{i}", "reference": text} for i, text in enumerate(odd)]
    for name in ("plain.csv", "plain.jsonl"):
        Path(name.replace("plain", "bom")).write_bytes(b"\xef\xbb\xbf" + Path(write(name, rows)).read_bytes())
    Path("bom.jsonl").write_bytes(Path("bom.jsonl").read_bytes().replace(b"\n", b"\n\n"))  # with blank lines
    for name in ("plain.csv", "bom.csv", "bom.jsonl", write("list.json", rows), write("data.json", {"data": rows})):
        parts = drpo.load_rows(name, "reference", 0)
        assert sorted([{x: row[x] for x in rows[0]} for row in sum(parts, [])], key=rows.index) == rows


def test_folders_keep_their_splits_and_a_colon_in_the_path():
    from datasets import Dataset, DatasetDict

    for name in ("posts:v1/train", "posts:v1/validation", "posts:v2/train", "posts:v2/test"):
        write(f"{name}.jsonl", rows_of(Path(name).name))
    DatasetDict({split: Dataset.from_list(rows_of(split)) for split in ("train", "valid1")}).save_to_disk("saved")
    for folder, held_out in {"posts:v1": "validation", "./posts:v2": "test", "saved": "valid1"}.items():
        read = [[row["reference"] for row in part] for part in drpo.load_rows(folder, "reference", 0)]
        assert read == [[row["reference"] for row in rows_of(split)] for split in ("train", held_out)]
    Dataset.from_list(rows_of()).save_to_disk("one_split")
    assert sum(map(len, drpo.load_rows("one_split", "reference", 0))) == N


def test_no_prompt_is_in_both_parts_and_the_seed_draws_them():
    rows = [{"prompt": f"p{i % 30}", "reference": f"r{i}", "chosen": f"r{i}", "rejected": "x"} for i in range(100)]
    source, drawn = write("x.jsonl", rows), []
    for seed in range(4):
        train, held_out = [{row["prompt"] for row in part} for part in drpo.load_rows(source, "reference", seed)]
        assert not train & held_out and held_out and len(train | held_out) == 30
        drawn.append(held_out)
    assert len(set(map(frozenset, drawn))) == 4
    pairs = write("pairs.jsonl", [{**row, "prompt": " " + row["prompt"]} for row in rows[3:]] + rows_of(**rows[0]))
    assert {row["prompt"] for row in drpo.load_rows(pairs, "pairs", 0)[1]} & {f"p{i}" for i in range(30)} == drawn[0]
    assert 70 < len(drpo.load_rows(write("many.jsonl", rows_of(count=1000)), "reference", 0)[1]) < 130


def by_split_and_seed(split, seed):
    return [{"prompt": f"{split} {seed}", "chosen": "a", "rejected": "b", "batch": "b7"}]


def test_a_function_gets_split_and_seed_if_it_takes_them():
    wanted = by_split_and_seed("train", 5), by_split_and_seed("validation", 5)
    assert drpo.load_rows("test_data:by_split_and_seed", "pairs", 5) == list(wanted)
    assert list(map(len, drpo.load_rows("test_data:rows_of", "reference", 5))) == [N, N]


def test_rows_that_teach_nothing_are_dropped_and_counted(capsys):
    row, other = fill(DIALOGUES, 0), fill(DIALOGUES, 99)
    bad = [
        {**row, "rejected": other["rejected"]},  # no shared prompt
        {**row, "rejected": row["chosen"] + " "},  # equal but for a space
        {**row, "chosen": HH.format(i=0)},  # empty
        {"chosen": "good", "rejected": "bad"},  # no dialogue
    ]
    write("folder/train.jsonl", [row, *bad, row])
    write("folder/test.jsonl", [other])
    assert list(map(len, drpo.load_rows("folder", "pairs", 0))) == [2, 1]
    out = capsys.readouterr().out
    assert "folder: 4 of 6 training rows dropped" in out and "held-out rows dropped" not in out


# ---- Bad rows: one line that names file, row and column ----------------------------------------------------
def with_row(number, **columns):
    return [row | columns if i == number else row for i, row in enumerate(rows_of())]


NO_ROWS, TURNS = "no usable training rows", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BAD = {  # file: its rows or its text, and words of the line
    "column.jsonl": ([{"prompt": f"p{i}", "text": "y"} for i in range(N)], ["row 0: reference must be text, not None"]),
    "none.jsonl": (with_row(4, reference=None), ["row 4: reference must be text, not None"]),
    "messages.jsonl": (with_row(19, reference=TURNS), ["row 19: reference must be text, not [{"]),
    "blank.jsonl": (rows_of(reference=" "), [f"{NO_ROWS} among 1"]),
    "one.jsonl": (rows_of(count=1), [NO_ROWS]),
    "empty.jsonl": ("", [NO_ROWS]),
    "head.csv": ("prompt,reference\n", [NO_ROWS]),
    "scalar.json": ("3", ["cannot be read"]),
    "keys.json": ('{"rows": []}', [NO_ROWS]),
    "broken.jsonl": ('{"prompt": "x", "reference": "y"}\n{"prompt": "x",\n', ["cannot be read", "JSON"]),
    "choice.jsonl": ([{**COMPARISON, "choice": i // 4} for i in range(N)], ["cannot be read"]),
    "binary.parquet": ("no parquet", ["cannot be read"]),
    "prompt.jsonl": ([{"question": f"p{i}"} for i in range(N)], ["prompt must be text"]),
    "chat_pairs.jsonl": ([{"chosen": TURNS, "rejected": TURNS[:1]}] * N, ["row 0", "must be text"]),
    "surrogate.jsonl": (with_row(4, reference="y\ud83d"), ["row", "reference"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_in_one_line(one_line, name):
    content, words = BAD[name]
    Path(name).write_text(content) if isinstance(content, str) else write(name, content)
    line = one_line([], main=lambda _: drpo.load_rows(name, "pairs" if "pairs" in name else "reference", 0))
    assert all(word in line for word in ["drpo.py: ", name, *words]), line


# ---- From texts to tokens ----------------------------------------------------------------------------------
def letters(added=""):
    """One token per ASCII character, so that lengths can be counted by hand. added: "[BOS] $A" or the like."""
    alphabet = ["[BOS]", EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if added:
        inner.post_processor = processors.TemplateProcessing(single=added, special_tokens=[("[BOS]", 0), (EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, bos_token="[BOS]")


LETTERS = letters()
HEAD, TAIL = "SUBREDDIT: r/a\n\nTITLE: t\n\nPOST:", "\n\nTL;DR:"  # 31 and 8 letters


def encoded(prompt, length, tokenizer=LETTERS):
    ids = drpo.encode_query(prompt, tokenizer, length)
    assert len(ids) <= length
    return tokenizer.decode(ids)


ONE = HEAD.replace("\n\n", "\n")
LONG = {  # a prompt, and what is left of it when it may not be so long
    f"{HEAD} {'x' * 9}{TAIL}": f"{HEAD} {'x' * 8}{TAIL}",
    f"{HEAD}\n{'x' * 9}{TAIL}": f"{HEAD}\n{'x' * 8}{TAIL}",
    f"{HEAD} see POST: no\ntwo{TAIL}": f"{HEAD} see POST: no{TAIL}",
    f"{HEAD} one{TAIL} no\ntwo{TAIL}": f"{HEAD} one{TAIL} no{TAIL}",
    f"REPOST: {HEAD} a\nb{TAIL}": f"REPOST: {HEAD} a{TAIL}",
    f"{ONE} one\ntwo\nthree\nTL;DR:": f"{ONE} one\ntwo\nTL;DR:",
    "Article:\none\nof a POST: two\nthree\n\nTL;DR:": "Article:\none\nof a POST: two\n\nTL;DR:",
    f"Article:\n{'x' * 9}{TAIL}": f"Article:\n{'x' * 8}{TAIL}",
}


def test_a_post_keeps_title_and_mark_other_prompts_their_end():
    for prompt, kept in LONG.items():
        assert encoded(prompt, len(prompt)) == prompt and encoded(prompt, len(prompt) - 1) == kept
    for prompt in (HH.format(i=1), "one two three\n\nTL;DR:", "POST: one\ntwo"):
        assert all(encoded(prompt, length) == prompt[-length:] for length in range(1, len(prompt) + 2))


def official_loop(prompt, tokenizer, length):
    """Off with the last line, or where there is one only, with one character; again, until it fits."""
    head, _, post = prompt.removesuffix(TAIL).partition("\n\nPOST:")
    while len(ids := tokenizer(f"{head}\n\nPOST:{post}{TAIL}")["input_ids"]) > length and post:
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
    return ids[-length:]


def test_a_cut_is_that_of_the_official_loop_at_every_length():
    bpe, rng, words = toy_text.bpe_tokenizer(), random.Random(0), "so my sister broke our bike 日本 i feel angry".split()
    post = "".join(" ".join(rng.choices(words, k=6)) + rng.choice([" . ", " .\n", " .\n\n"]) for _ in range(8))
    for text in (f"{post}the end", "日本 so 日本 " * 3):
        prompt = f"SUBREDDIT: r/advice\n\nTITLE: i feel sad\n\nPOST: {text}{TAIL}"
        for length in range(5, len(bpe(prompt)["input_ids"]) + 1):
            assert drpo.encode_query(prompt, bpe, length) == official_loop(prompt, bpe, length)


def test_a_bos_stays_and_an_eos_that_is_added_goes():
    both, post, cut = letters(f"[BOS] $A {EOS}"), f"{HEAD} one\ntwo{TAIL}", f"{HEAD} one{TAIL}"
    for prompt, length, kept in ((post, 99, post), (post, 44, cut), ("abcdef", 7, "abcdef"), ("abcdef", 4, "def")):
        assert encoded(prompt, length, both) == "[BOS]" + kept
        assert encoded(prompt, length, letters(f"$A {EOS}")) == encoded(prompt, length)
    assert both.decode(drpo.encode_response("abc", both, 9)) == f" abc{EOS}"
    unknown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, EOS: 1}, [])), eos_token=EOS)
    assert drpo.encode_query("日本", unknown, 9) == [1]  # a state is needed to begin from


def test_a_response_is_a_space_its_text_and_one_eos():
    for text in ("i feel sad .", "  i feel sad .\n", f"i feel{EOS} sad .{EOS}"):
        for tokenizer in (LETTERS, toy_text.bpe_tokenizer()):
            ids = drpo.encode_response(text, tokenizer, 99)
            assert tokenizer.decode(ids) == f" i feel sad .{EOS}" and ids.count(tokenizer.eos_token_id) == 1
    cut = [LETTERS.decode(drpo.encode_response("abc", LETTERS, n)) for n in (5, 4, 2)]
    assert cut == [f" abc{EOS}", " abc", " a"]  # EOS is lost with the end


# ---- Batches -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches_cover_all_rows_once_by_falling_length(size):
    lengths, seen = [1, 2, 3, 4, 5, 9, 1, 1, 1, 1], []
    batch = drpo.collate([[i] for i in range(10)], [[1] * n for n in lengths], 9, "cpu") | {"extra": torch.arange(10)}
    for index, part in drpo.micro_batches(batch, size):
        assert len(index) <= size and part["extra"].tolist() == part["ids"][:, 0].tolist() == index.tolist()
        assert part["ids"].shape[1] == 1 + max(lengths[i] for i in index)
        seen += index.tolist()
    assert seen == [5, 4, 3, 2, 1, 0, 6, 7, 8, 9]
    pairs = list(drpo.micro_batches(batch, size, pairs=True))
    assert all(part["extra"].tolist() == [*index.tolist(), *(index + 5).tolist()] for index, part in pairs)
    assert torch.cat([index for index, _ in pairs]).tolist() == [0, 4, 3, 2, 1]  # a rejected response is the longest of all
    assert all(len(part["ids"]) <= max(2, size) for _, part in pairs)


def test_each_epoch_of_draw_is_a_permutation_of_its_own():
    drawn = [row for update in range(10) for row in drpo.draw(list(range(10)), 4, update, 0, "rl")]  # straddles the epochs
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    keys = [(5, 0, "rl"), (6, 0, "rl"), (5, 1, "rl"), (5, 0, "sft")]
    first, again = [[drpo.draw(list(range(100)), 20, *key) for key in keys] for seed in (1, 2) if torch.manual_seed(seed)]
    assert first == again and len(set(map(tuple, first))) == 4  # by update, seed and stream alone


# ---- Real posts and dialogues ------------------------------------------------------------------------------
REAL = os.environ.get("DRPO_DATA", "")
with_real_data = pytest.mark.skipif(not REAL, reason="DRPO_DATA names no folder with real data")


def real(name, kind):
    return sum(drpo.load_rows(f"{REAL}/{name}", kind, 0), [])


@with_real_data
def test_real_posts_keep_title_and_end_and_responses_fit():
    tokenizer, cut, lengths = PreTrainedTokenizerFast(tokenizer_file=f"{REAL}/pythia_tokenizer.json", eos_token=EOS), 0, []
    for row in real("tldr_train.jsonl", "reference") + real("tldr_validation.jsonl", "reference"):
        ids, whole = drpo.encode_query(row["prompt"], tokenizer, 512), tokenizer(row["prompt"])["input_ids"]
        assert ids == (whole if len(whole) <= 512 else official_loop(row["prompt"], tokenizer, 512))
        assert tokenizer.decode(ids).startswith(row["prompt"].partition("\n\nPOST:")[0])
        cut += len(whole) > 512
        lengths.append(len(drpo.encode_response(row["reference"], tokenizer, 999)))
    for row in real("tldr_preferences.jsonl", "pairs"):
        lengths += [len(drpo.encode_response(row[name], tokenizer, 999)) for name in ("chosen", "rejected")]
    assert (cut, len(lengths), max(lengths)) == (7, 2000, 50)


@with_real_data
def test_real_dialogues_share_their_prompt_or_are_dropped():
    rows = real("hh_helpful.jsonl.gz", "pairs")
    assert all(row["prompt"].startswith("Human:") and row["prompt"].endswith("\n\nAssistant:") for row in rows)
    with gzip.open(f"{REAL}/hh_helpful.jsonl.gz", "rt") as file:
        sides = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in map(json.loads, file)]
    pairs = [(a[2].strip(), b[2].strip()) for a, b in sides if a[0] == b[0]]
    useful = sorted((a, b) for a, b in pairs if a and b and a != b)
    assert sorted((row["chosen"], row["rejected"]) for row in rows) == useful and len(rows) == 2339 < len(sides)
