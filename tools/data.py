"""Where rows come from: one's own functions, Hub datasets, folders and files, in every layout of TL;DR and HH data in use.

`load_rows` is all that drpo.py asks for; a layout is told by its columns, never by the name of a dataset.
"""

import functools
import importlib
import inspect
import logging
import re
from pathlib import Path

from tools.running import stop

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT = ("validation", "valid", "test", "valid1")


def resolve(name):
    """`module:function` -> the function; anything else -> None."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        stop(f"{name}: {error}")
    return found if callable(found) else stop(f"{name}: is not a function")


def call(function, **offered):
    """Call with those of the offered arguments that the function takes."""
    wanted = inspect.signature(function).parameters
    return function(**{name: value for name, value in offered.items() if name in wanted})


@functools.lru_cache
def load_rows(source, kind, seed, split=""):
    """-> (training rows, held-out rows): dicts with texts prompt and reference (kind "reference"), or prompt, chosen and
    rejected ("pairs"). Of pairs asked for as references, the chosen response is the reference.

    The held-out rows are those of `split`, or where none is named of the first of HELD_OUT that there is. A module:function
    is called with split="train" and "validation" (or `split`) and the seed; `load` reads everything else. Rows that teach
    nothing (an empty text, chosen equal to rejected) are dropped and counted. Exits with 2 on any other kind."""
    if function := resolve(source):
        splits = [call(function, split=name, seed=seed) for name in ("train", split or "validation")]
    else:
        try:
            splits = load(source, split)
        except ValueError as error:
            stop(error)
    fields, result = ("prompt", "reference") if kind == "reference" else ("prompt", "chosen", "rejected"), []
    for part, rows in zip(("training", "held-out"), splits):
        kept = []
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                stop(f"{source}: {part} row {number} must be a dict, not {type(row).__name__}")
            row = {"reference": row["chosen"], **row} if "chosen" in row else row
            for name in fields:
                if not isinstance(row.get(name), str):
                    stop(
                        f"{source}: {part} row {number}: {name} must be text, not {type(row.get(name)).__name__} "
                        f"(the row has {', '.join(row)})"
                    )
                if re.search("[\ud800-\udfff]", row[name]):
                    stop(f"{source}: {part} row {number}: {name} has half of a surrogate pair in it, which is not text")
            texts = {name: row[name].strip() for name in fields}
            if all(texts.values()) and len(set(texts.values())) == len(fields):
                # "TL;DR:" without a space after it: the response brings that. `batch` is the labellers', where it is told
                kept.append({**texts, "prompt": row["prompt"].rstrip(), "batch": row.get("batch")})
        if len(kept) < len(rows):
            print(f"{source}: {len(rows) - len(kept)} of {len(rows)} {part} rows dropped (empty, equal, or no shared prompt)")
        if not kept:
            stop(f"{source}: no usable {part} rows among {len(rows)}; both training and held-out rows are needed")
        result.append(kept)
    return result


def load(source, split=""):
    """-> (training rows, held-out rows), lists of {prompt, reference} or {prompt, chosen, rejected, batch}.

    `source` is a json, jsonl, csv or parquet file (also .gz), a folder of them, or a Hub name, as name or name:config. Where
    there is a train split only, as in a file, its last tenth is held out, unless a `split` is named. Raises ValueError with
    one line that names what is wrong and where."""
    import datasets  # slow to import, and the toy corpus does without

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, below
    reader = READERS.get(Path(source.removesuffix(".gz")).suffix)
    if (reader or source.startswith(("/", "."))) and not Path(source).exists():
        raise ValueError(f"{source}: no such file or folder")
    if Path(source).is_file() and not reader:
        raise ValueError(f"{source}: a data file must end in {', '.join(READERS)}, or one of these and .gz")
    if Path(source).is_file() and not Path(source).stat().st_size:
        raise ValueError(f"{source}: is empty")
    try:
        name, _, config = source.partition(":")
        splits = datasets.load_dataset(reader, data_files=source) if reader else datasets.load_dataset(name, config or None)
    except Exception as error:  # `datasets` has some twenty types for a bad source
        reason = str(error.__cause__ or "") or str(error) or type(error).__name__  # the cause knows the row
        raise ValueError(f"{source}: cannot be read: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"{source}: has no split named train, only {', '.join(splits)}")
    if split and split not in splits:
        raise ValueError(f"{source}: has no split named {split}, only {', '.join(splits)}")
    train, held_out = splits["train"], next((splits[name] for name in [split, *HELD_OUT] if name in splits), None)
    if held_out is None:
        cut = len(train) - max(1, len(train) // 10)
        train, held_out = train.select(range(cut)), train.select(range(cut, len(train)))
    result = []
    for part, rows in (("training", train), ("held-out", held_out)):
        result.append([])
        try:
            for row in rows:
                result[-1].append(read_row(row))
        except (TypeError, AttributeError, KeyError, IndexError, UnicodeDecodeError) as error:
            number = len(result[-1])  # of the row after the last good one
            raise ValueError(f"{source}: {part} row {number} cannot be read: {type(error).__name__}: {error}") from error
    return result


def tldr_prompt(info):
    return f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"


def article_prompt(article):
    return f"Article:\n{article}\n\nTL;DR:"


def read_row(row):
    """A row of any known layout -> {prompt, reference} or {prompt, chosen, rejected, batch}; of an unknown one -> the row.

    Two dialogues that do not share a prompt get an empty one, for the caller to drop and count."""
    columns = row.keys()
    if columns >= {"info", "summaries", "choice"}:  # openai/summarize_from_feedback and vwxyzjn's builds
        article = row["info"].get("article")  # CNN/DM rows have one instead of a post
        texts, choice = [summary["text"] for summary in row["summaries"]], row["choice"]
        return {
            "prompt": article_prompt(article) if article else tldr_prompt(row["info"]),
            "chosen": texts[choice],
            "rejected": texts[1 - choice],
            "batch": row.get("batch"),
        }
    if columns >= {"prompt", "chosen", "rejected"}:  # trl-lib/tldr-preference, CarperAI, Dahoas
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    if columns >= {"chosen", "rejected"}:  # Anthropic/hh-rlhf: two whole dialogues
        (prompt, mark, chosen), (other, _, rejected) = [
            row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
        ]
        return {"prompt": prompt + mark if prompt == other else "", "chosen": chosen, "rejected": rejected}
    if columns >= {"article", "highlights"}:  # abisee/cnn_dailymail
        return {"prompt": article_prompt(row["article"]), "reference": row["highlights"]}
    if columns >= {"subreddit", "title", "post", "summary"}:  # vwxyzjn/ and cleanrl/...tldr_3_filtered...
        return {"prompt": tldr_prompt(row), "reference": row["summary"]}
    for prompt, reference in [
        ("prompt", "reference"),
        ("prompt", "completion"),  # trl-lib/tldr
        ("prompt", "label"),  # CarperAI
        ("prompt", "response"),  # Dahoas
        ("query", "reference_response"),  # older cleanrl builds
    ]:
        if columns >= {prompt, reference}:
            text = row[reference]  # those older builds have the EOS in the text
            return {"prompt": row[prompt], "reference": text.removesuffix("<|endoftext|>") if isinstance(text, str) else text}
    return row
