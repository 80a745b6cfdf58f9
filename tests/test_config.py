import dataclasses
from pathlib import Path

import pytest
from helpers import ROOT

from config import Config, load_config
from docs.settings import page
from lab.console import UserError


def loaded(tmp_path, text, *words):
    (tmp_path / "exp9.py").write_text(text, encoding="utf-8")
    return load_config([str(tmp_path / "exp9.py"), *words])


def problems(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_wins_over_the_file_and_takes_both_forms(tmp_path):
    text = 'dataset = "demo"\n_side = 3\nd_model = 4 * 8\nlearning_rate = 1\ncompile = True\n'
    words = "--d_model 64 --dropout=0.5 --compile auto --expected_ppl 35,42 --dry_run=true --resume"
    c = loaded(tmp_path, text, *words.split())
    assert (c.dataset, c.d_model, c.dropout, c.learning_rate) == ("demo", 64, 0.5, 1)
    assert c.compile is None and c.dry_run is True and c.resume is True
    assert c.expected_ppl == (35, 42) and c.out_dir == "out/exp9" and "d_model" in c.named


def test_values_are_taken_as_they_are_meant(tmp_path):
    text = (
        "\ufeffimport math\nfrom math import sqrt\nd_model = sqrt(64 * 64)\n"
        "expected_ppl = [35, 42]\n"
        "data_dir = '~/data'\nd_ff = int(math.pow(2, 5))\ndef helper(): pass\n"
    )
    words = ["--log_interval", "1e3", "--out_dir=~/out", "--sample_prompts", "It was, he said"]
    c = loaded(tmp_path, text, *words)
    assert (c.d_model, c.d_ff, c.log_interval) == (64, 32, 1000) and isinstance(c.d_model, int)
    assert c.expected_ppl == (35, 42) and c.sample_prompts == ("It was, he said",)
    assert (c.data_dir, c.out_dir) == (f"{Path.home()}/data", f"{Path.home()}/out")
    assert loaded(tmp_path, "", "--resume", "false").resume is False


def test_everything_wrong_is_listed_at_once_with_the_nearest_name(tmp_path):
    text = 'droput = 0.1\nepochs = 1.5\nlr_schedule = "cosin"\nbeta1 = 1.0\nbatch_size = True'
    shown = problems(loaded, tmp_path, text, "stray", "--lr", "1", "--wandb")
    for name in "dropout epochs cosine beta1 batch_size stray learning_rate wandb".split():
        assert name in shown
    assert "unknown setting wandb" in problems(load_config, ["--wandb", "config/exp5.py"])
    assert "--seed needs" in problems(loaded, tmp_path, "", "--seed", "--resume")


def test_no_config_and_no_such_config(tmp_path):
    assert "config/demo.py" in problems(load_config, [])
    shown = problems(load_config, [str(tmp_path / "exp55.py")])
    assert "exp5.py" in shown and "__" not in shown


@pytest.mark.parametrize(
    "text, names",
    [
        ("d_model = ", "SyntaxError"),
        ("dataset = FIELDS", "FIELDS"),  # not a name of the program's
        ("learning_rate = float('nan')", "learning_rate"),
        ("expected_ppl = (42,)", "expected_ppl"),
        ("expected_ppl = (42, 35)", "expected_ppl"),
        ("expected_ppl = ('a', 'b')", "expected_ppl"),
        ("device = 'cuda:first'", "device"),
        ("d_model = 16\nnum_heads = 7", "num_heads"),
        ("block = 'modern'\nd_model = 24\nnum_heads = 8", "block"),
        ("learning_rate = 1e-4\nmin_learning_rate = 1e-3", "min_learning_rate"),
        ("split = 'test'", "eval_only"),
        ("sample_prompts = (1984, 'x')", "sample_prompts"),
        ("learning_rate = 0", "learning_rate"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, names):
    assert names in problems(loaded, tmp_path, text)


def test_help_shows_every_setting_with_its_reason_and_a_config_s_values(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config([str(ROOT / "config/exp5.py"), "--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in shown and field.metadata["help"] in shown
    assert "--patience 5\n" in shown and "--seed 0\n" in shown


def test_the_page_of_settings_is_the_dataclass():
    shown = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert shown == page(), "run: python -m docs.settings > docs/settings.md"
