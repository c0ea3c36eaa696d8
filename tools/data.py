"""Where rows come from: Hub datasets, folders and files, in every layout of TL;DR and HH data that is in use.

Imports nothing of ours. `load` is all that drpo.py asks for; a layout is told by its columns, never by the name of a dataset.
"""
import logging
from pathlib import Path

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT = ("validation", "valid", "test", "valid1")


def load(source):
    """-> (training rows, held-out rows), lists of {prompt, reference} or {prompt, chosen, rejected, batch}.

    `source` is a json, jsonl, csv or parquet file (also .gz), a folder of them, or a Hub name, as name or name:config. Where
    there is a train split only, as in a file, its last tenth is held out. Raises ValueError with one line that names what is
    wrong and where."""
    import datasets                                                   # slow to import, and the toy corpus does without
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)                  # what goes wrong is said once, below
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
    except Exception as error:                                        # `datasets` has some twenty types for a bad source
        reason = str(error.__cause__ or "") or str(error) or type(error).__name__  # the cause knows the row
        raise ValueError(f"{source}: cannot be read: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"{source}: has no split named train, only {', '.join(splits)}")
    train, held_out = splits["train"], next((splits[name] for name in HELD_OUT if name in splits), None)
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
            number = len(result[-1])                                  # of the row after the last good one
            raise ValueError(f"{source}: {part} row {number} cannot be read: {type(error).__name__}: {error}") from error
    return result


def tldr_prompt(info):
    return f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"


def article_prompt(article):
    return f"Article:\n{article}\n\nTL;DR:"


def read_row(row):
    """A row of any known layout -> {prompt, reference} or {prompt, chosen, rejected, batch}; of an unknown one -> the row.

    Two dialogues that do not share a prompt get an empty one, for the caller to drop and count."""
    has = row.keys().__ge__
    if has({"info", "summaries", "choice"}):                          # openai/summarize_from_feedback and vwxyzjn's builds
        article = row["info"].get("article")                          # CNN/DM rows have one instead of a post
        texts, choice = [summary["text"] for summary in row["summaries"]], row["choice"]
        return {"prompt": article_prompt(article) if article else tldr_prompt(row["info"]),
                "chosen": texts[choice], "rejected": texts[1 - choice], "batch": row.get("batch")}
    if has({"prompt", "chosen", "rejected"}):                         # trl-lib/tldr-preference, CarperAI, Dahoas
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    if has({"chosen", "rejected"}):                                   # Anthropic/hh-rlhf: two whole dialogues
        (prompt, mark, chosen), (other, _, rejected) = [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
        return {"prompt": prompt + mark if prompt == other else "", "chosen": chosen, "rejected": rejected}
    if has({"article", "highlights"}):                                # abisee/cnn_dailymail
        return {"prompt": article_prompt(row["article"]), "reference": row["highlights"]}
    if has({"subreddit", "title", "post", "summary"}):                # vwxyzjn/ and cleanrl/...tldr_3_filtered...
        return {"prompt": tldr_prompt(row), "reference": row["summary"]}
    for prompt, reference in [("prompt", "reference"), ("prompt", "completion"), ("prompt", "label"), ("prompt", "response"),
                              ("query", "reference_response")]:       # trl-lib/tldr, CarperAI, Dahoas; older cleanrl builds
        if has({prompt, reference}):
            text = row[reference]                                     # those older builds have the EOS in the text
            return {"prompt": row[prompt], "reference": text.removesuffix("<|endoftext|>") if isinstance(text, str) else text}
    return row
