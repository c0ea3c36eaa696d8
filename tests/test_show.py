"""tools/show.py: what it prints is what drpo.py does. Tables are read back from the output and compared with what the stages of
a tiny run really fed to the networks and computed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import drpo
import toy_env
from tools import show

ROOT = Path(__file__).resolve().parents[1]
B, T, EOS = 12, 20, 0
SETTINGS = [
    *(
        "--dataset test_show:posts --preference_dataset test_show:pairs --model test_show:network --seed 5 --query_length 60"
    ).split(),
    *("--sft_steps 2 --rm_steps 2 --updates 1 --sft_batch_size 6 --rm_batch_size 6 --micro_batch 4 --epochs 1").split(),
    *f"--sft_lr 1e-5 --lr 0.01 --batch_size {B} --response_length {T} --eval_samples 2".split(),
]


LONG = "i feel sad . " * 6  # more than 20 tokens, whatever the tokenizer


def posts():
    """Some too long for 60 tokens, some not for 50; the same of references and 20 tokens."""
    return [
        {
            "prompt": f"SUBREDDIT: r/a\n\nTITLE: {i}\n\nPOST: sad {LONG * (2 * (i % 3))}\n\nTL;DR:",
            "reference": f"{LONG * (i % 2)}number {i}",
        }
        for i in range(24)
    ]


def pairs():
    texts = ("no", LONG)
    return [{"prompt": row["prompt"], "chosen": texts[i % 2], "rejected": texts[1 - i % 2]} for i, row in enumerate(posts())]


def network(seed=0):
    """tiny_pythia, but that every token is EOS with a probability of about 6 %: some rollouts end, some do not."""
    model = toy_env.tiny_pythia(seed)
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight[0], model.gpt_neox.final_layer_norm.bias[0] = 0.0, 1.0
        model.get_output_embeddings().weight[:, 0] = 0.0
        model.get_output_embeddings().weight[EOS, 0] = 2.5
    return model


LINE = re.compile(
    r" *(\d+) +(\S+) +(\d+)  ('.*'|\".*\"|\S+) +(pad|query|response|reset prefix|sampled|EOS|after EOS) +(\d+|\.)(.*)"
)


def tables(text):
    """What show prints -> for each table its title and {column: {name: cell}}."""
    found = []
    for block in text.split("\n\n")[1:]:
        title, head, *lines = block.strip("\n").splitlines()
        names = re.split(r" {2,}", head.strip())
        rows = {}
        for line in lines:
            if "... " not in line or "more" not in line:
                *cells, rest = LINE.fullmatch(line).groups()
                rows[int(cells[0])] = dict(zip(names, [*cells, *rest.split()], strict=True))
        found.append((title, rows))
    return found


def shown(capsys, *argv):
    capsys.readouterr()
    show.main([str(word) for word in argv])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and what its stages did: the targets of the first SFT update, and the first update of drpo."""
    folder, seen = tmp_path_factory.mktemp("run"), SimpleNamespace(targets=[], rollouts=[], rewards=[], gae=[])

    def record(patch, module, name, into, what):
        real = getattr(module, name)

        def recorder(*args, **kwargs):
            result = real(*args, **kwargs)
            into.append(what(result, *args))
            return result

        patch.setattr(module, name, recorder)

    arguments = [*SETTINGS, "--run_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        record(patch, drpo, "token_logprobs", seen.targets, lambda result, head, states, tokens, *_: tokens.tolist())
        drpo.main(["sft", *arguments])
        drpo.main(["rm", *arguments])
    with pytest.MonkeyPatch.context() as patch:
        record(patch, drpo, "rollout", seen.rollouts, lambda result, policy, queries, prefixes, *_: (result, queries, prefixes))
        record(patch, drpo, "penalised_rewards", seen.rewards, lambda result, scores, logprobs, *_: (scores, logprobs))
        record(patch, drpo, "gae", seen.gae, lambda result, rewards, values, mask, *_: (rewards, values, mask))
        drpo.main(["drpo", *arguments])
    (folder / "drpo").rename(folder / "later")  # first as if RL were still to come
    return SimpleNamespace(folder=folder, **vars(seen))


@pytest.fixture
def rollouts(run, capsys):
    return tables(shown(capsys, "--run", run.folder, "--batch_size", B, "--rows", B))


def test_the_rollouts_shown_are_those_of_the_first_update(run, rollouts):
    responses, queries, prefixes = run.rollouts[0]
    (scores, logprobs), (rewards, values, _) = run.rewards[0], run.gae[0]
    width = max(map(len, queries))
    assert len(rollouts) == B and {len(ids) for ids in prefixes} > {0}
    for n, (title, rows) in enumerate(rollouts):
        by_t = [rows[width + t] for t in range(len(responses[n]))]
        assert [int(row["id"]) for row in by_t] == responses[n]
        assert [row["t"] for row in by_t] == [str(t) for t in range(len(responses[n]))]
        assert [row["role"] == "reset prefix" for row in by_t] == [t < len(prefixes[n]) for t in range(len(by_t))]
        for name, x in {"log pi": logprobs, "log pi_SFT": logprobs, "value": values, "reward": rewards}.items():
            start = 0 if name == "reward" else len(prefixes[n])  # the rest training asks for where the policy acted only
            assert [float(row[name]) for row in by_t][start:] == pytest.approx(x[n, start : len(by_t)].tolist(), abs=1e-3), name
        assert {float(row["KL"]) for row in by_t} == {0.0}
        assert f"reset_len {len(prefixes[n])} of" in title and f"response_len {len(by_t)}," in title
        assert float(re.search(r"score (\S+),", title)[1]) == pytest.approx(scores[n].item(), abs=1e-3)


def test_masks_are_those_of_token_masks(run, rollouts):
    responses, queries, prefixes = run.rollouts[0]
    lengths = [torch.tensor([len(ids) for ids in lists]) for lists in (prefixes, responses)]
    mask, width = drpo.token_masks(*lengths, T)[0], max(map(len, queries))
    assert mask.equal(run.gae[0][2])
    for n, (_, rows) in enumerate(rollouts):
        at = [column for column in rows if column >= width]  # what follows EOS is folded after its first token
        assert [rows[column]["mask"] for column in at] == [str(int(mask[n, column - width])) for column in at]
        assert len(at) == min(T, len(responses[n]) + 1) or len(at) == T
        assert all(row["mask"] == "." for column, row in rows.items() if column < width)


def test_the_score_stands_at_eos_and_without_one_at_the_last_token(run, rollouts):
    ended = 0
    for title, rows in rollouts:
        (last,) = [row for row in rows.values() if row["reward"] not in (".", "0.000")]
        score = float(re.search(r"score (\S+),", title)[1])
        assert float(last["reward"]) == score
        if "NO EOS" in title:
            assert last["role"] == "sampled" and int(last["t"]) == T - 1 and score == -1
            assert "EOS" not in {row["role"] for row in rows.values()}
        else:
            ended += 1
            assert last["role"] == "EOS" and int(last["id"]) == EOS
            after = [row["role"] for row in rows.values() if row["t"] != "." and int(row["t"]) > int(last["t"])]
            assert set(after) <= {"after EOS"}
    assert 0 < ended < B  # both kinds were looked at


def test_queries_are_padded_on_the_left_and_places_count_from_their_first_token(run, rollouts):
    responses, queries, _ = run.rollouts[0]
    width = max(map(len, queries))
    for query, response, (_, rows) in zip(queries, responses, rollouts):
        padding = width - len(query)
        for column, row in rows.items():
            assert row["role"] == "pad" if column < padding else row["role"] != "pad"
            fed = padding <= column < padding + len(query) + len(response)
            assert row["place"] == (str(column - padding) if fed else ".")
            assert column >= width or column < padding or int(row["id"]) == query[column - padding]
            assert (row["t"] == ".") == (column < width)


def test_after_rl_its_own_policy_rolls_out(run, capsys):
    (run.folder / "later").rename(run.folder / "drpo")
    try:
        text = shown(capsys, "--run", run.folder, "--rows", 3, "--kl_coef", 0.5)  # batch_size now comes from drpo/
    finally:
        (run.folder / "drpo").rename(run.folder / "later")
    made = json.loads((run.folder / "later" / "result.json").read_text())["settings"]
    assert text.startswith(
        f"policy: {run.folder}/drpo; beta {made['beta']:g}, reset to {made['reset_to']}, "
        f"temperature {made['temperature']:g}, kl_coef 0.5\n"
    )
    assert len(found := tables(text)) == 3
    for title, rows in found:
        steps = [
            {name: float(row[name]) for name in ("log pi", "log pi_SFT", "KL", "reward")}
            for row in rows.values()
            if row["role"] in ("sampled", "EOS")
        ]
        assert max(abs(step["KL"]) for step in steps) > 0.01
        score = float(re.search(r"score (\S+),", title)[1])
        for i, step in enumerate(steps):
            assert step["KL"] == pytest.approx(step["log pi"] - step["log pi_SFT"], abs=2e-3)
            assert step["reward"] == pytest.approx(-0.5 * step["KL"] + score * (i == len(steps) - 1), abs=2e-3)
        assert {row["KL"] for row in rows.values() if row["role"] == "reset prefix"} <= {"0.000"}


def test_official_masking_shows_its_three_masks_and_what_follows_eos(run, capsys):
    found = tables(shown(capsys, "--run", run.folder, "--batch_size", B, "--rows", B, "--masking", "official"))
    for title, rows in found:
        start, end = map(int, re.search(r"reset_len (\d+) of \d+, response_len (\d+),", title).groups())
        masks = [mask[0].int().tolist() for mask in drpo.token_masks(torch.tensor([start]), torch.tensor([end]), T, "official")]
        for row in rows.values():
            if row["t"] != ".":
                assert [row[name] for name in ("mask", "policy", "rest")] == [str(mask[int(row["t"])]) for mask in masks]
                assert row["log pi"] != "."
    after = [row for _, rows in found for row in rows.values() if row["role"] == "after EOS"]
    assert any(int(row["id"]) != EOS for row in after) and {row["policy"] for row in after} == {
        "1"
    }  # sampled on, and learned from


def test_rows_are_those_of_the_first_update_and_loss_marks_what_sft_predicts(run, capsys, monkeypatch):
    monkeypatch.setattr(show, "KEPT", {})  # every column, none left out for brevity
    found = tables(shown(capsys, *SETTINGS, "--rows", 6))
    assert [title.partition(":")[0] for title, _ in found] == [
        *(f"sft row {n}" for n in range(6)),
        *(f"pair {n}, {side}" for n in range(6) for side in ("chosen", "rejected")),
    ]
    rows = [[int(cells["id"]) for cells in rows.values() if cells["loss"] == "1"] for _, rows in found[:6]]
    assert all(rows[0]["loss"] == "0" for _, rows in found[:6])  # the first column has no target
    used = run.targets[0] + run.targets[1]  # two micro-batches make the first update
    while used:  # row after row, in the order of the micro-batches
        row = next(row for row in rows if used[: len(row)] == row)
        used = used[len(row) :]
        rows.remove(row)
    assert not rows


def test_the_reward_of_a_pair_is_read_at_eos_or_where_the_response_is_cut(capsys):
    found = tables(shown(capsys, *SETTINGS, "--rows", 4, "--preference_length", 8, "--query_length", 50))[4:]
    cut = 0
    for title, rows in found:
        (marked,) = [row for row in rows.values() if row["reward"] == "<-"]
        if "response 8 tokens, CUT from" in title:
            cut += 1
            assert marked["role"] == "response" and marked["t"] == "7" and "no EOS" in title
        else:
            assert marked["role"] == "EOS" and title.endswith("with EOS")
    assert 0 < cut < len(found)
    assert any("CUT from" in title.partition(";")[0] for title, _ in found)
    for title, _ in found:
        query = re.search(r"query (\d+) tokens(?:, CUT from (\d+))?", title)
        assert int(query[1]) <= 50 and (query[2] is None or int(query[2]) > 50)


def test_long_runs_are_folded(capsys):
    text = shown(capsys, *SETTINGS, "--rows", 1)
    assert max(map(len, text.splitlines())) < 130
    table = text.split("\n\n")[1]
    lines = table.splitlines()[2:]
    hidden = sum(int(n) - 1 for n in re.findall(r"\.\.\. (\d+) more", table))
    assert re.search(r"\.\.\. \d+ more query tokens", table)
    assert len(lines) + hidden == int(lines[-1].split()[0]) + 1  # every column is shown, or counted


@pytest.mark.parametrize("preset, more", [("tldr", {}), ("hh", {}), ("tiny", {"sft_steps": 7})])
def test_the_preset_of_a_run_is_found_again(tmp_path, preset, more):
    s = drpo.parse(["all", "--preset", preset, *(f"--{name}={value}" for name, value in more.items())])[1]
    for stage in ("sft", "rm"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "result.json").write_text(json.dumps({"settings": drpo.relevant(s, stage)}))
    found = drpo.parse(["all", *show.recorded(tmp_path, [])])[1]
    assert vars(found) == vars(s) | {"run_dir": str(tmp_path)}
    assert drpo.parse(["all", *show.recorded(tmp_path, ["--preset", "hh"]), "--preset", "hh"])[1].sft_steps == s.sft_steps
    (tmp_path / "eval.json").write_text(json.dumps({"settings": vars(s) | {"beta": 0.25, "device": "cuda:7", "seeds": [1]}}))
    again = drpo.parse(["all", *show.recorded(tmp_path, [])])[1]
    assert (again.preset, again.beta, again.device, again.seeds) == (preset, 0.25, s.device, [])


@pytest.mark.parametrize(
    "command, words",
    [
        ("--run {folder}/nowhere", ["nowhere", "sft/result.json"]),
        ("--run {folder}/half", ["half", "rm/result.json"]),
        ("--run {folder}/broken", ["broken/sft/result.json"]),
        ("--rows 0", ["--rows 0", "16"]),
        ("--rows 17", ["--rows 17", "16"]),
        ("--rows x", ["--rows", "x"]),
        ("--preset nope", ["--preset", "nope"]),
        ("--nosuchflag 3", ["--nosuchflag"]),
        ("sft", ["sft"]),
        ("--run", ["--run"]),
        ("--beta 2", ["--beta", "2"]),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, capsys, command, words):
    for name, text in (("half", '{"settings": {}}'), ("broken", "{")):
        (tmp_path / name / "sft").mkdir(parents=True)
        (tmp_path / name / "sft" / "result.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        show.main(command.format(folder=tmp_path).split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and not out
    assert all(word in err for word in words), err


def test_the_tiny_preset_from_the_shell():
    done = subprocess.run(
        [sys.executable, "-m", "tools.show", "--rows", "1"], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = tables(done.stdout)
    assert [title.partition(":")[0] for title, _ in found] == ["sft row 0", "pair 0, chosen", "pair 0, rejected"]
    for (_, rows), name in zip(found, ("loss", "reward", "reward")):
        roles = [row["role"] for row in rows.values()]
        assert roles.count("EOS") == 1 and roles.index("EOS") > max(
            i for i, role in enumerate(roles) if role in ("query", "response")
        )
        assert [row["token"] for row in rows.values() if row["role"] == "query"][-1] == "':'"
        assert next(row[name] for row in rows.values() if row["role"] == "EOS") in ("1", "<-")
