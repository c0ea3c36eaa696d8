"""Runs the notebooks from top to bottom, each in a fresh kernel, and saves them in place with what they show.

    python -m tools.notebooks [NAME ...]        NAME: the beginning of a file name in notebooks/; without one, all of them

Saved is what the next run would save too: no timestamps, no version of Python, no metadata of an editor.
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "name": "python"},
}


def execute(path):
    """-> the notebook as it comes out of a fresh kernel, started in the repository root; raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # it warns that it talks unencrypted, on this very machine
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    return notebook


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginning of a file name; none: all notebooks")
    parser.error = lambda message: parser.exit(2, f"notebooks.py: {message}\n")
    names = parser.parse_args(argv).names
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            parser.exit(2, f"notebooks.py: {name}: begins none of {', '.join(path.name for path in paths)}\n")
    for path in [path for path in paths if not names or path.name.startswith(tuple(names))]:
        began = time.perf_counter()
        try:
            nbformat.write(execute(path), path)
        except CellExecutionError as error:
            parser.exit(1, f"{path.name} is left as it was: {error}\n")
        print(f"{path.name}: {time.perf_counter() - began:.0f} seconds, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
