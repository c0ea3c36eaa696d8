"""Runs of an experiment: one line of a .jsonl file each, several processes at a time. The same command resumes, and does not
ask which code made the lines that are there: after a change to the code name another --out."""

import argparse
import io
import json
import multiprocessing
import re
import signal
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

import drpo


def options(module, doc, out, seeds, jobs):
    """-> a parser of the options that all experiments take, with these defaults, for `python -m tools.MODULE`."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.{module}", description=doc.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help=f"default: {', '.join(map(str, seeds))}")
    parser.add_argument("--jobs", type=int, default=jobs, help="processes at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for the results (default: %(default)s)")
    parser.error = drpo.stop
    return parser


def quietly(argv):
    """python drpo.py ARGV in this process, without its output -> True, or False if a signal stopped it. RuntimeError, with its
    line, if it failed: a SystemExit would end a pool's process in silence, and the pool would wait for it."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        try:
            drpo.main(argv)
        except SystemExit as end:
            if end.code not in (0, 130):
                raise RuntimeError(re.findall("drpo.py: .*", said.getvalue())[-1]) from None
            return False
    return True


def read(path):
    """-> the runs in a .jsonl file, as dicts; none if there is no file. A line that was cut off is left out."""
    runs = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            runs.append(json.loads(line))
    return runs


def end_line(path):
    """Ends the last line of a file, if it was cut off. Makes the file, if there is none."""
    with path.open("a+b") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            file.write(b"\n")


def found(task, runs):
    """The run whose line begins with this task, or None."""
    return next((run for run in runs if task.items() <= run.items()), None)


def work(execute, tasks, path):
    """Tasks, one after another: each a dict, execute(task) another, and the two together a line of the file."""
    for task in tasks:
        line = json.dumps(task | execute(task))
        with path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def start(threads):
    """Of a process: its threads; Ctrl-C is for the first process, which ends the others."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def carry_out(execute, groups, path, jobs, threads=1):
    """Groups of tasks, `jobs` groups at a time, each in a process with so many threads. A task that has its line in the file is
    not done again. -> the runs of the tasks, in their order. Exit status 2 if the file cannot be written."""
    if min(jobs, threads) < 1:
        drpo.stop(f"--jobs {jobs} or --threads {threads}: must be at least 1")
    with drpo.blame(f"--out {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = read(path)
        end_line(path)
    missing = [[task for task in group if not found(task, done)] for group in groups]
    try:
        with multiprocessing.get_context("spawn").Pool(jobs, start, (threads,)) as pool:
            pool.starmap(work, [(execute, tasks, path) for tasks in missing if tasks], chunksize=1)
    except KeyboardInterrupt:
        drpo.stop("interrupted; the same command resumes", 130)
    done = read(path)
    return [found(task, done) for group in groups for task in group]
