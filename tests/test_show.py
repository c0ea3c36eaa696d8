"""tools/show.py: its tables are read back from what it prints and compared with what drpo.py computes."""

import io
import json
import sys

import pytest
import torch
from conftest import make_run, write_lines

import drpo
from tools import report, show

B, T = 12, 12
SIZES = f"--sft_steps 2 --rm_steps 2 --updates 1 --batch_size {B} --micro_batch 4 --epochs 1 --response_length {T}"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The settings of a run that has two updates of sft and rm behind it; a third of the references are cut at T tokens."""
    folder, feel = tmp_path_factory.mktemp("show"), "i feel sad . "
    rows = [{"prompt": f"POST: my landlord hid our lamp {i}\n\nTL;DR:", "reference": feel * (i % 3 + 1)} for i in range(16)]
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "pairs.jsonl", [{"prompt": r["prompt"], "chosen": r["reference"], "rejected": "none"} for r in rows])
    given = f"--dataset {folder}/rows.jsonl --preference_dataset {folder}/pairs.jsonl --run_dir {folder} --reset_to reference"
    for stage in ("sft", "rm"):
        drpo.main([stage, *given.split(), *SIZES.split(), "--eval_samples=2"])
    return given.split() + SIZES.split()


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


@pytest.mark.parametrize("more", [[], ["--advantages", "rloo", "--group", "2"], ["--whiten_rewards", "True"]])
def test_a_row_shows_what_the_first_update_trains_on(arguments, capsys, monkeypatch, more):
    seen, s = {}, drpo.parse(["drpo", *arguments, *more])[1]
    monkeypatch.setattr(drpo, "step", lambda optimizer, s, where, batch: seen.update(batch) or 0.0)
    tokenizer, load = drpo.load(drpo.AutoTokenizer, f"{s.run_dir}/sft", s), drpo.load_network
    roles = drpo.build_roles(load(f"{s.run_dir}/sft", s, trained=True), drpo.load_reward(f"{s.run_dir}/rm", s, trained=True), s)
    drpo.drpo_update(roles, None, drpo.load_rows(s.dataset, "reference", s.seed)[0], 0, tokenizer, s, "")
    lengths = list(zip(seen["query_len"].tolist(), seen["reset_len"].tolist(), seen["response_len"].tolist()))
    for n in {max(range(B), key=lambda n: lengths[n][1]), min(range(B), key=lambda n: lengths[n][1])}:  # with reset, without
        Q, start, end = lengths[n]
        ((title, rows),) = shown(capsys, "row", *arguments, *more, "--row", str(n))
        response = rows[-end:]
        assert [token for token, *_ in response] == seen["response"][n, :end].tolist()
        assert [token for token, *_ in rows[:3]] == seen["ids"][n, :3].tolist()
        assert [role for _, role, _ in response[:start]] == ["reset"] * start and response[start][1] in ("sampled", "EOS")
        assert [cell["mask"] for *_, cell in response] == ["0"] * start + ["1"] * (end - start)
        assert (response[-1][1] == "EOS") == seen["has_eos"][n].item() == ("NO EOS" not in title)
        for name, key in {"logprob": "logprobs", "value": "values", "advantage": "advantages"}.items():
            found = torch.tensor([float(cell[name]) for *_, cell in response[start:]])
            assert torch.allclose(found, seen[key][n, start:end].cpu(), atol=6e-4), name
        if "--whiten_rewards" not in more:
            rewards = [float(cell["reward"]) for *_, cell in response[start:]]
            assert rewards == pytest.approx([0.0] * (end - start - 1) + [seen["scores"][n].item()], abs=6e-4)


def test_data_marks_targets_cuts_and_where_the_reward_is_read(arguments, capsys):
    cut = 0
    for n in (0, 3):
        sft, chosen, rejected = shown(capsys, "data", *arguments, "--preference_length", "8", "--row", str(n))
        assert [cell["predicted"] for *_, cell in sft[1]] == ["0"] + ["1"] * (len(sft[1]) - 1)
        for title, rows in (chosen, rejected):
            assert [cell["read"] for *_, cell in rows] == ["."] * (len(rows) - 1) + ["<-"]
            assert (rows[-1][1] == "EOS") == ("CUT" not in title)
            cut += "response 8 tokens, CUT from" in title
    assert 0 < cut < 4


def test_row_takes_the_settings_of_the_run(tmp_path):
    s = drpo.parse(["drpo", "--preset", "tldr", "--beta", "0.25", "--seeds", "1", "2", "--run_dir", str(tmp_path)])[1]
    (tmp_path / "report.json").write_text(json.dumps({"settings": vars(s)}))
    assert vars(drpo.parse(["drpo", *show.recorded(tmp_path)])[1]) == vars(s) | {"seeds": []}


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
