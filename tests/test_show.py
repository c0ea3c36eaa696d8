"""tools/show.py: its tables are read back from what it prints and compared with what drpo.py computes."""

import io
import json
import sys

import pytest
import torch
from conftest import make_run, write_lines

import drpo
import toy_text
from tools import report, show


def shown(capsys, *argv):  # what show prints -> [(title, rows of (id, role, {column: cell}))]
    capsys.readouterr()
    show.main(list(argv))
    found = []
    for block in capsys.readouterr().out.split("\n\n"):
        if "position" in block:
            title, head, *lines = block.strip("\n").splitlines()
            rows = [line for line in lines if "more of the query" not in line]
            cells = [dict(zip(head.split()[4:], line[46:].split(), strict=True)) for line in rows]
            found.append((title, [(int(line[8:15]), line[37:46].strip(), cell) for line, cell in zip(rows, cells)]))
    return found


@pytest.mark.parametrize(
    "more", [{}, {"advantages": "rloo", "group": 2}, {"whiten_rewards": True}, {"preference_dataset": "pairs.jsonl"}]
)
def test_a_row_shows_what_the_first_update_trains_on(start, capsys, monkeypatch, tmp_path, more):
    monkeypatch.chdir(tmp_path)  # pairs with a reference of their own, which is not what DR-PO is reset to
    write_lines(tmp_path / "pairs.jsonl", [row | {"reference": "no ."} for row in toy_text.gate_pairs("train", seed=0)[:50]])
    seen, command = {}, start("drpo", updates=1, epochs=1, **more)
    with monkeypatch.context() as patch:
        patch.setattr(drpo, "step", lambda optimizer, s, where, batch: seen.update(batch) or 0.0)
        drpo.main(command)
    lengths = list(zip(seen["reset_len"].tolist(), seen["response_len"].tolist()))
    for n in (lengths.index(max(lengths)), lengths.index(min(lengths))):  # with a reset, and without
        reset, end = lengths[n]
        ((title, rows),) = shown(capsys, "row", *command[1:], "--row", str(n))
        response = rows[-end:]
        assert [token for token, *_ in response] == seen["response"][n, :end].tolist()
        assert [token for token, *_ in rows[:3]] == seen["ids"][n, :3].tolist()
        assert [role for _, role, _ in response[:reset]] == ["reset"] * reset and response[reset][1] in ("sampled", "EOS")
        assert [cell["mask"] for *_, cell in response] == ["0"] * reset + ["1"] * (end - reset)
        assert (response[-1][1] == "EOS") == seen["has_eos"][n].item() == ("NO EOS" not in title)
        for name, key in {"logprob": "logprobs", "value": "values", "advantage": "advantages"}.items():
            found = torch.tensor([float(cell[name]) for *_, cell in response[reset:]])
            assert torch.allclose(found, seen[key][n, reset:end].cpu(), atol=6e-4), name
        if "whiten_rewards" not in more:
            rewards = [float(cell["reward"]) for *_, cell in response[reset:]]
            assert rewards == pytest.approx([0.0] * (end - reset - 1) + [seen["scores"][n].item()], abs=6e-4)


def test_data_marks_targets_cuts_and_where_the_reward_is_read(capsys):
    cut = 0
    for n in (0, 3):
        sft, chosen, rejected = shown(capsys, "data", "--preference_length", "20", "--row", str(n))
        assert [cell["predicted"] for *_, cell in sft[1]] == ["0"] + ["1"] * (len(sft[1]) - 1)
        for title, rows in (chosen, rejected):
            assert [cell["read"] for *_, cell in rows] == ["."] * (len(rows) - 1) + ["<-"]
            assert (rows[-1][1] == "EOS") == ("CUT" not in title)
            cut += "response 20 tokens, CUT from" in title
    assert 0 < cut < 4


def test_row_takes_the_settings_of_the_run(tmp_path):
    s = drpo.parse(["drpo", "--preset", "tldr", "--beta", "0.25", "--seeds", "1", "2", "--run_dir", str(tmp_path)])[1]
    (tmp_path / "report.json").write_text(json.dumps({"settings": vars(s)}))
    assert vars(drpo.parse(["drpo", *show.recorded(tmp_path)])[1]) == vars(s) | {"seeds": []}


def test_a_run_that_was_moved_is_shown_where_it_is(tmp_path, one_line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    make_run(tmp_path / "old", {"drpo": 0.5}).rename("runs/tiny")  # where `row` looks if no folder is named
    assert "runs/tiny/sft: no model" in one_line(["row"], main=show.main)


def test_a_sample_stands_beside_its_reference(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", {"sft": None, "drpo": 0.5})
    samples = report.read(run / "samples.jsonl", lines=True)
    samples[2]["drpo"]["response"] = "na\u00efve \u4f60"
    write_lines(run / "samples.jsonl", samples)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))  # it gets replacements
    show.main([str(run), "--sample", "2"])
    sys.stdout.flush()
    text = sys.stdout.buffer.getvalue().decode()
    assert "    POST: number 2\n" in text and "    reference: told 2\n" in text and "RM score 2.00): na?ve ?\n" in text
    assert text.splitlines()[-1].split() == ["DR-PO", "0.500", "2.00", "2.50", "0.200", "10.0", "1.00"]
    assert text.splitlines()[-2].split()[:2] == ["SFT", "-"]
