"""The scripts in docs/experiments, on a tiny data set."""

import shutil
from pathlib import Path

import pytest
from helpers import load_tokens, make_dataset, metrics

import train
from docs.experiments import collect, datasets, draw
from lab.console import UserError
from lab.data import Dataset, load_tokenizer
from lab.folder import load_checkpoint
from lab.notebook import SavedRun
from model import LanguageModel


@pytest.fixture
def both(tiny):
    """The two data sets of 3,000 ids of training and 700 of validation."""
    make_dataset(Path("data"), "articles")
    datasets.main(["articles", "--train", "2000", "--val", "500"])


def test_both_data_sets_train_on_the_same_ids_and_validate_on_others(both):
    ids = load_tokens("articles", "train").tolist()
    for name in ("choose", "wikipedia"):
        assert load_tokens(name, "train").tolist() == ids[:2000]
        source = Dataset(name).source["name"]
        assert source.startswith("2.00e3 tokens of English Wikipedia articles, not WikiText-103's")
    assert load_tokens("choose", "val").tolist() == ids[-500:]
    theirs, ours = (Dataset(name).counts["val"] for name in ("articles", "wikipedia"))
    assert theirs == ours and load_tokens("wikipedia", "val").tolist() != ids[-500:]


def test_words_and_bytes_are_those_of_the_text_however_it_is_cut(monkeypatch):
    text = "The cat – 猫 – sat on\u2003the mat . \n\n" * 50 + "end"
    encoding = load_tokenizer()
    ids = encoding.encode_to_numpy(text).astype("<u2")
    for block in (5, 7, 1000):
        monkeypatch.setattr(datasets, "BLOCK", block)
        counts = datasets.counts_of(ids, encoding)
        assert (counts["words"], counts["bytes"]) == (len(text.split()), len(text.encode()))


def test_too_few_articles_leave_nothing_behind(tiny):
    make_dataset(Path("data"), "articles")
    with pytest.raises(UserError, match="3,000 training tokens"):
        datasets.main(["articles"])
    assert not Path("data/choose").exists() and not Path("data/wikipedia").exists()


def test_a_run_is_collected_and_drawn(both, monkeypatch):
    shutil.move("tiny.py", "exp3.py")  # draw.py knows the experiments by their configs
    train.main(["exp3.py", "--dataset", "wikipedia", "--max_steps", "10", "--eval_interval", "4"])
    monkeypatch.setattr(collect, "LINES", 4)
    collect.main(["out/exp3", "--to", "kept", "--weights"])

    whole, kept = metrics("out/exp3"), metrics("kept/exp3")
    assert [line["step"] for line in kept] == [3, 6, 9, 10]
    mean = sum(line["train_loss"] for line in whole[:3]) / 3
    assert kept[0] == whole[2] | {name: kept[0][name] for name in collect.MEANS}
    assert kept[0]["train_loss"] == pytest.approx(mean) and kept[3] == whole[9]
    assert metrics("kept/exp3", True) == metrics("out/exp3", True)
    assert SavedRun("kept/exp3").final == SavedRun("out/exp3").final != {}
    assert "articles, not WikiText-103's own" in Path("kept/exp3/notebook.md").read_text()
    model = LanguageModel.from_checkpoint(load_checkpoint("kept/exp3/best.pt"))
    assert (
        model.count() == LanguageModel.from_checkpoint(load_checkpoint("out/exp3/best.pt")).count()
    )

    draw.draw_runs(["kept/exp3"], "runs.png")
    assert Path("runs.png").read_bytes().startswith(b"\x89PNG")
