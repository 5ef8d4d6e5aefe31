"""One TOML file is one run; what it says wrong, it says so."""

import tomllib

import pytest

from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig, to_toml


def test_a_run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\npreset = "tiny"\ncms_periods = [1, 8]\nwrite_bound = "none"\n'
        '[data]\ntext = "books"\n[training]\nsteps = 7\nlr = 1\nbetas = [0.8, 0.9]\n'
    )
    run = RunConfig.load(path)
    assert run.model == {"preset": "tiny", "cms_periods": [1, 8], "write_bound": None}
    assert run.data == DataConfig(text="books")
    assert run.training == TrainingConfig(steps=7, lr=1.0, betas=(0.8, 0.9))
    assert isinstance(run.training.lr, float)


def test_every_default_survives_toml(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(RunConfig(model={"a": None, "b": [1, 2]}).to_dict()))
    assert RunConfig.load(path).to_dict() == RunConfig(model={"a": None, "b": [1, 2]}).to_dict()


@pytest.mark.parametrize(
    "value",
    [
        True,
        -3,
        1e-08,
        1e22,
        3.0,
        float("inf"),
        'quote " and \\ and \n and \x7f and \u00e9 and \U0001f600',
        [],
        [1.5, 2.5],
        {"a b": [1], "c": {"d": "e"}},
    ],
)
def test_toml_reads_back_what_was_written(value):
    found = tomllib.loads(to_toml({"section": {"key": value, "odd key\u00e9": 1}}))["section"]
    assert found == {"key": value, "odd key\u00e9": 1}
    assert type(found["key"]) is type(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[training]\nstep = 3", r"run\.toml: unknown key in \[training\]: 'step'; did you mean 'steps'"),
        ("[trainng]\nsteps = 3", "unknown section: 'trainng'; did you mean 'training'"),
        ("[data]\nzzz = 3", r"unknown key in \[data\]: 'zzz'; known: text, held_out"),
        ("training = 3", r"\[training\] must be a section"),
        ("[training]\nsteps = 3.5", "training.steps: expected an integer, got 3.5"),
        ("[training]\nsteps = true", "training.steps: expected an integer, got True"),
        ('[training]\nlr = "1e-3"', "training.lr: expected a number, got '1e-3'"),
        ("[data]\ntext = 3", "data.text: expected a string in quotes, got 3"),
        ("[training]\ncompile = 1", "training.compile: expected true or false, got 1"),
        ("[training]\nbetas = [0.9]", "training.betas: expected a list of 2 values"),
        ("[training]\nsteps = 0", "training.steps: expected at least 1, got 0"),
        ("[training]\nlr = -1.0", "training.lr: expected more than 0"),
        ("[training]\nmin_lr_ratio = 2.0", "training.min_lr_ratio: expected from 0 to 1"),
        ("[training]\nbetas = [0.9, 1.0]", "training.betas: expected two numbers in"),
        ('[training]\noptimizer = "sgd"', "training.optimizer: expected adamw, m3 or dgd, got 'sgd'"),
        ('[training]\noptimizer = "dgd"\ncompile = true', "training.compile: expected false with optimizer = 'dgd'"),
        ("[training]\nothers_lr = -1.0", "training.others_lr: expected at least 0"),
        ("[training]\nclip = -0.5", "training.clip: expected at least 0"),
        ('[training]\nprecision = "fp16"', "training.precision: expected auto, fp32, bf16 or fp64"),
        (
            "[training]\nbatch_size = 7\naccumulate = 2",
            "multiple of training.accumulate, got 7 and 2; try batch_size = 6",
        ),
        ("[data]\nheld_out_fraction = 1.0", "data.held_out_fraction: expected more than 0 and less than 1"),
        ("[training", r"run\.toml is not valid TOML"),
    ],
)
def test_errors_teach(tmp_path, content, message):
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(path)


def test_a_missing_file_names_what_is_near(tmp_path):
    (tmp_path / "demo.toml").touch()
    with pytest.raises(FileNotFoundError, match=r"demo\.toml"):
        RunConfig.load(tmp_path / "demos.toml")
