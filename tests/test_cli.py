"""The commands as a newcomer meets them: what they leave behind, and what they say when something is wrong."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nestlearn.cli import main
from nestlearn.cli.benchmark_tables import short
from nestlearn.layers import PlainAttention
from nestlearn.training.config import RunConfig
from nestlearn.training.tokenizers import ByteTokenizer

TEXT = "".join(f"Line {i}: the memory that is read at every token is written at every token.\n" for i in range(60))
SMALL = {"depth": 1, "dim": 16, "heads": 2, "chunk_size": 8}
BENCHMARKS = ("train", "prefill", "decode", "optimizer")
TRAINING = ["--steps", "3", "--batch-size", "2", "--sequence-length", "16", "--threads", "1"]


class Result:
    """Exit code, standard output and standard error of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def said(self) -> str:
        """Standard error with its line breaks undone and frames of boxes removed."""
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", self.err).split())


@pytest.fixture
def nestlearn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process."""

    def run(*words: object) -> Result:
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["nestlearn", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Result(end.value.code or 0, out, err)

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Text {i}. {TEXT[i * 700 : (i + 1) * 700]}")
    return folder


def small_model() -> list[str]:
    return [word for key, value in SMALL.items() for word in ("--set", f"model.{key}={value}")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run's folder. Tests do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["nestlearn", "train", "--text", str(corpus), "--out", str(folder), *TRAINING, *small_model()]
        )
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return folder


def refused(result: Result, *parts: str) -> None:
    """A sentence that teaches and exit code 2, without a traceback or anything on standard output."""
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    for part in parts:
        assert re.search(part, result.said), f"{part!r} not in {result.said!r}"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["eval"],
        ["generate"],
        ["inspect"],
        ["demo"],
        ["bench"],
        *(["bench", kind] for kind in BENCHMARKS),
    ],
    ids=" ".join,
)
def test_every_command_explains_itself(nestlearn, command: list[str]) -> None:
    result = nestlearn(*command, "--help")
    assert result.code == 0
    assert "Usage: nestlearn" in result.out
    # Every option says what it is for.
    options = re.findall(r"^│[ *]+(--[a-z-]+)(.*)│$", result.out, re.MULTILINE)
    for option, rest in options:
        assert re.sub(r"<\w+>|-h|SECTION.KEY=VALUE", "", rest).strip(), f"{option} is not explained"
    assert len(options) >= 1


def test_version(nestlearn) -> None:
    assert re.match(r"nestlearn \d+\.\d+\.\d+, torch ", nestlearn("--version").out)


def test_train_leaves_a_whole_run(trained: Path) -> None:
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    run = RunConfig.load(trained / "config.toml")
    assert (run.training.steps, run.training.sequence_length, run.model["dim"]) == (3, 16, 16)
    assert Path(run.data.text).is_absolute()


def test_train_says_what_it_made(nestlearn, corpus: Path, tmp_path: Path) -> None:
    result = nestlearn("train", "--text", corpus, "--out", tmp_path / "run", *TRAINING, *small_model())
    assert result.code == 0
    assert re.search(r"held-out text: \d\.\d{4} bits per byte", result.out)
    assert f"checkpoint  {tmp_path / 'run' / 'checkpoints' / 'step-00000003.safetensors'}" in result.out
    assert "nestlearn generate" in result.out
    assert "step 3/3" in result.err


def test_a_run_is_a_toml_file_and_options_go_before_it(nestlearn, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    lines = "\n".join(f"{key} = {value}" for key, value in SMALL.items())
    file.write_text(
        f'[model]\n{lines}\nmixer = "delta_net"\n[data]\ntext = "{corpus}"\n'
        "[training]\nsteps = 9\nbatch_size = 2\nsequence_length = 16\nthreads = 1\n"
    )
    assert nestlearn("train", "--config", file, "--out", tmp_path / "run", "--steps", "2").code == 0
    run = RunConfig.load(tmp_path / "run" / "config.toml")
    assert (run.training.steps, run.training.batch_size, run.model["mixer"]) == (2, 2, "delta_net")


def test_resume_goes_on_and_without_it_nothing_is_overwritten(nestlearn, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert nestlearn("train", "--text", corpus, "--out", out, *TRAINING, *small_model()).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(nestlearn("train", "--text", corpus, "--out", out, *TRAINING), "already holds a run", "--resume")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert nestlearn("train", "--out", out, "--resume", "--steps", "5").code == 0
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    refused(nestlearn("train", "--out", out, "--resume", "--lr", "0.5"), "another run", r"training\.lr")
    refused(nestlearn("train", "--out", out, "--resume", "--preset", "small"), "keeps its model")
    refused(nestlearn("train", "--out", tmp_path / "none", "--resume"), "no run in")


def test_generate_continues_the_prompt(nestlearn, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = nestlearn("generate", trained, "--prompt", "Line [bold]1", "--max-tokens", 20)
    assert result.code == 0
    assert result.out.startswith("Line [bold]1")
    as_json = json.loads(nestlearn("generate", trained, "--prompt", "Line [bold]1", "--max-tokens", 20, "--json").out)
    assert as_json["prompt"] + as_json["continuation"] + "\n" == result.out
    other = nestlearn("generate", trained, "--prompt", "Line [bold]1", "--max-tokens", 20, "--seed", 1)
    assert other.out != result.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Line [bold]1"))
    assert nestlearn("generate", trained, "--prompt", "-", "--max-tokens", 20).out == result.out


def test_eval_reports_bits_per_byte(nestlearn, trained: Path, corpus: Path, tmp_path: Path) -> None:
    own = json.loads(nestlearn("eval", trained, "--json").out)
    logged = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()][-1]
    # Without --text the run's own held-out side, in the run's own windows: the number that training logged.
    assert own["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)
    assert own["targets"] == logged["targets"]
    other = json.loads(nestlearn("eval", trained, "--text", corpus / "0.txt", "--sequence-length", 32, "--json").out)
    assert other["targets"] == (corpus / "0.txt").stat().st_size - 1
    assert 5 < other["bits_per_byte"] < 9
    fewer = json.loads(nestlearn("eval", trained, "--text", corpus, "--max-tokens", 64, "--json").out)
    assert fewer["targets"] <= 64
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(next((trained / "checkpoints").iterdir()).read_bytes())
    refused(nestlearn("eval", alone), "--text")
    assert re.search(r"\d\.\d{4} bits per byte", nestlearn("eval", alone, "--text", corpus).out)


def test_inspect_shows_tables_and_draws_pictures(nestlearn, trained: Path, corpus: Path, tmp_path: Path) -> None:
    result = nestlearn("inspect", trained, "--text", corpus, "--max-tokens", 50, "--out", tmp_path)
    assert result.code == 0
    assert "blocks.0.mixer.memory" in result.out
    assert "Memories after 50 tokens" in result.out
    for name in ("levels.png", "memories.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def bench(nestlearn, kind: str, *words: object) -> Result:
    """A benchmark as small as can be."""
    size = ["--dims" if kind == "optimizer" else "--dim", 16, "--depth", 1, "--heads", 2]
    return nestlearn("bench", kind, *size, "--alternations", 2, "--threads", 1, *words)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.004, "0.00"), (9.994, "9.99"), (9.996, "10.0"), (99.94, "99.9"), (99.96, "100"), (999.4, "999"),
     (999.6, "1.00k"), (99_960, "100k"), (999_400, "999k"), (999_600, "1.00M"), (2.5e9, "2.50G"), (None, "-")],
)  # fmt: skip
def test_numbers_in_tables_are_short(value: float | None, text: str) -> None:
    assert short(value, most=999) == text
    assert value is None or short(12_345) == "12,345"


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_bench_prints_ratios_in_80_columns_and_writes_them(nestlearn, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "bench.json"
    sizes = ["--mixers", "delta_net:chunk_size=8", "--lengths", "16,32", "--batch", 1, "--no-memory"]
    result = bench(nestlearn, kind, *([] if kind == "optimizer" else sizes), "--out", file)
    assert result.code == 0, result.err
    table, written = result.out.split("written to ")
    assert max(map(len, table.splitlines())) <= 80
    assert written.split() == [str(file), str(file.with_suffix(".png"))]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(file.read_text())
    assert report["benchmark"] == kind
    for row in report["rows"]:
        name = row.get("optimizer") or row["model"].split(":")[0]
        assert re.search(rf"^{name} .* {short(row['ratio'], most=999)} ", table, re.MULTILINE)
    assert ("chunk_size=8" in table) == (kind != "optimizer")
    assert "turn 2 of 2" in result.err


def test_bench_prints_json(nestlearn) -> None:
    result = bench(nestlearn, "decode", "--mixers", "delta_net", "--lengths", 9, "--no-memory", "--json")
    assert [row["model"] for row in json.loads(result.out)["rows"]] == ["transformer", "delta_net"]


def test_bench_refuses_what_is_wrong(nestlearn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(nestlearn("bench", "train", "--mixers", "hope"), "self_modifying_titans", "'hope'")
    refused(nestlearn("bench", "train", "--mixers", "titans:read"), "mixer:setting=value")
    refused(nestlearn("bench", "prefill", "--lengths", "long"), "--lengths", "'long'")
    refused(nestlearn("bench", "decode", "--batch", "1,x"), "--batch", "'1,x'")
    refused(nestlearn("bench", "optimizer", "--optimizers", "sgd"), "adamw_fused, level", "'sgd'")
    refused(nestlearn("bench", "train", "--out", tmp_path / "none" / "a.json"), "no folder", "none")
    refused(nestlearn("bench", "train", "--out", tmp_path / "a.txt"), "ends in .json", "a.txt")
    refused(nestlearn("bench", "train", "--device", "tpu"), "'tpu'")

    def wrong(self: PlainAttention, x: object, state: object) -> object:
        y, state = honest(self, x, state)  # type: ignore[arg-type]
        return 2 * y, state

    honest = PlainAttention.decode_step
    monkeypatch.setattr(PlainAttention, "decode_step", wrong)
    # The Transformer is checked as well: a wrong reference makes every ratio wrong.
    refused(
        bench(nestlearn, "decode", "--mixers", "delta_net", "--out", tmp_path / "a.json"), "decode_step", "No speed"
    )
    assert not list(tmp_path.iterdir())


# What can be wrong, and what is said about it.


def start(nestlearn, tmp_path: Path, *words: object) -> Result:
    result = nestlearn("train", "--out", tmp_path / "run", *TRAINING, *words)
    assert not (tmp_path / "run" / "config.toml").exists()
    return result


def test_no_text(nestlearn, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(start(nestlearn, tmp_path, "--text", tmp_path / "empty"), "no text found")
    (tmp_path / "nothing.txt").write_text("")
    refused(start(nestlearn, tmp_path, "--text", tmp_path / "nothing.txt"), "no text found")


def test_a_binary_file(nestlearn, tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_bytes(b"\x89PNG\r\n\0\0" * 50)
    refused(start(nestlearn, tmp_path, "--text", tmp_path / "photo.txt"), "photo.txt is not text", "UTF-8")


def test_a_missing_folder_names_its_neighbours(nestlearn, tmp_path: Path, corpus: Path, trained: Path) -> None:
    refused(start(nestlearn, tmp_path, "--text", corpus.with_name(f"{corpus.name}s") / ""), "no", corpus.name)
    for command in (["eval", "--text", corpus], ["generate", "--prompt", "a"], ["inspect"]):
        refused(nestlearn(command[0], trained.with_name("runn"), *command[1:]), "runn", "run")


def test_a_corpus_shorter_than_a_window(nestlearn, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    result = nestlearn("train", "--out", tmp_path / "run", *TRAINING, *small_model(), "--text", tmp_path / "short.txt")
    refused(result, "fewer than one sequence")


def test_settings_that_do_not_exist_or_do_not_fit(nestlearn, tmp_path: Path, corpus: Path) -> None:
    def with_setting(text: str) -> Result:
        return start(nestlearn, tmp_path, "--text", corpus, "--set", text)

    refused(with_setting("model.depht=2"), "'depht'", "'depth'")
    refused(with_setting("training.stepps=2"), "'stepps'", "'steps'")
    refused(with_setting("trainin.steps=2"), "'trainin'", "'training'")
    refused(with_setting("training.steps=many"), r"training\.steps", "integer", "'many'")
    refused(with_setting("model.depth"), "SECTION.KEY=VALUE")
    refused(with_setting("model.projection_chunk_size=48"), "one must divide the other", "64", "48")
    refused(with_setting("model.heads=3"), "multiple of heads")
    refused(with_setting("model.vocab_size=100"), "256", "100")
    refused(start(nestlearn, tmp_path, "--text", corpus, "--preset", "huge"), "'tiny'", "'huge'")
    refused(start(nestlearn, tmp_path, "--text", corpus, "--mixer", "mamba"), "delta_net", "'mamba'")
    refused(start(nestlearn, tmp_path, "--text", corpus, "--device", "tpu"), "'tpu'")


def test_an_unknown_key_in_a_run_file_names_the_file(nestlearn, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[training]\nlearning_rate = 0.1\n")
    refused(start(nestlearn, tmp_path, "--config", file), "run.toml", "learning_rate", "lr")
    file.write_text("[training\n")
    refused(start(nestlearn, tmp_path, "--config", file), "run.toml", "not valid TOML")
    refused(start(nestlearn, tmp_path, "--config", tmp_path / "rum.toml"), "rum.toml", "run.toml")


def test_a_checkpoint_cut_in_half(nestlearn, trained: Path, corpus: Path, tmp_path: Path) -> None:
    whole = next((trained / "checkpoints").iterdir()).read_bytes()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    half = run / "checkpoints" / "step-00000003.safetensors"
    half.write_bytes(whole[: len(whole) // 2])
    (run / "config.toml").write_bytes((trained / "config.toml").read_bytes())
    refused(nestlearn("generate", half, "--prompt", "a"), "step-00000003.safetensors")
    refused(nestlearn("eval", run, "--text", corpus), "can be read|cut")
    refused(nestlearn("train", "--out", run, "--resume"), "can be read|cut")
    assert half.read_bytes() == whole[: len(whole) // 2]


def test_a_file_that_is_no_checkpoint(nestlearn, corpus: Path, trained: Path, tmp_path: Path) -> None:
    refused(nestlearn("generate", corpus / "0.txt", "--prompt", "a"), "0.txt")
    (tmp_path / "empty").mkdir()
    refused(nestlearn("generate", tmp_path / "empty", "--prompt", "a"), "checkpoint")


def test_a_tokenizer_that_does_not_belong_to_the_model(
    nestlearn, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 300)
    refused(nestlearn("generate", trained, "--prompt", "a"), "300", "256", "tokenizer")


def test_bad_numbers_for_generation(nestlearn, trained: Path) -> None:
    refused(nestlearn("generate", trained, "--prompt", "a", "--temperature", "-1"), "temperature", "-1")
    refused(nestlearn("generate", trained, "--prompt", "a", "--top-p", "2"), "top_p")
    refused(nestlearn("generate", trained, "--prompt", ""), "at least one token")


def test_misspelt_commands_and_options(nestlearn) -> None:
    assert nestlearn("trian").code == 2
    assert nestlearn("train", "--txt", "a").code == 2
    assert nestlearn("train").code == 2


def test_a_bug_shows_its_traceback(nestlearn, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("nestlearn.cli.generation.continue_text", broken)
    monkeypatch.setattr(sys, "argv", ["nestlearn", "generate", str(trained), "--prompt", "a"])
    with pytest.raises(KeyError, match="a bug"):
        main()


def test_ctrl_c_ends_without_a_traceback(nestlearn, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nestlearn.cli.generation.continue_text", interrupted)
    assert nestlearn("generate", trained, "--prompt", "a").code == 130


def test_a_traceback_on_request(nestlearn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["nestlearn", "generate", str(tmp_path / "none"), "--prompt", "a"])
    with pytest.raises(FileNotFoundError):
        main()


def test_the_module_is_the_command(tmp_path: Path) -> None:
    # In a process of its own: exit code, no traceback, nothing on standard output.
    command = [sys.executable, "-m", "nestlearn", "train", "--text", str(tmp_path / "none.txt"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_later_stage_starts_from_another_run(nestlearn, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "later"
    result = nestlearn("train", "--from", trained, "--out", out, "--steps", 2, "--set", "model.chunk_size=4")
    assert result.code == 0, result.err
    assert "starting from the weights of" in result.said
    assert re.search(r"chunk_size \(8 there, 4 here\)", result.said)
    run, before = RunConfig.load(out / "config.toml"), RunConfig.load(trained / "config.toml")
    assert (run.model["chunk_size"], run.training.steps, run.training.start_from) == (4, 2, str(trained))
    assert run.training.seed == before.training.seed + 1
    assert run.data == before.data
    assert nestlearn("train", "--out", out, "--resume", "--steps", 3).code == 0
    other = tmp_path / "other"
    refused(nestlearn("train", "--from", trained, "--out", other), "--from: say how long with --steps")
    short = ("train", "--from", trained, "--out", other, "--steps", 1)
    refused(nestlearn(*short, "--preset", "tiny"), "leave --preset out")
    refused(nestlearn(*short, "--set", "model.dim=32"), r"dim \(16 there, 32 here\)")
    refused(nestlearn("train", "--from", tmp_path / "none", "--out", other, "--steps", 1), "none")
    assert not other.exists()
