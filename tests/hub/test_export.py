"""`nestlearn export`: a folder that is ready to be loaded, read and published."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from nestlearn.cli import main
from nestlearn.hub import export, load
from nestlearn.hub.remote_code import collect, rewrite
from nestlearn.models.generation import Sampling, generate
from nestlearn.training.checkpoint import find_checkpoint, load_model, save_checkpoint

# A finder in front of all others that knows no nestlearn, as on a machine that has none.
WITHOUT_NESTLEARN = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nestlearn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_the_folder_goes_on_as_the_checkpoint_does(run: Path, exported: Path) -> None:
    model, tokenizer = load_model(run)
    prompt = torch.from_numpy(tokenizer.encode("7 cats").astype("int64"))[None]
    ours = [int(token) for token in generate(model, prompt, 20, Sampling(temperature=0))]
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    inputs = AutoTokenizer.from_pretrained(exported)("7 cats", return_tensors="pt")
    assert theirs.generate(**inputs, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :].tolist() == ours
    assert theirs.generation_config.do_sample
    assert theirs.generation_config.pad_token_id == 0


def test_the_pipeline_answers(exported: Path) -> None:
    generator = pipeline("text-generation", str(exported))
    texts = ["7 cats", "A much longer text before it", "x"]
    together = generator(texts, max_new_tokens=8, do_sample=False, batch_size=3)
    alone = [generator(text, max_new_tokens=8, do_sample=False) for text in texts]
    assert together == alone
    assert all(found[0]["generated_text"].startswith(text) for text, found in zip(texts, alone, strict=True))
    talk = [{"role": "user", "content": "how many?"}]
    assert generator(talk, max_new_tokens=4)[0]["generated_text"][-1]["role"] == "assistant"


def test_the_card_says_what_the_run_was(exported: Path, run: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    held_out = find_checkpoint(run).progress["held_out"]
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results[0].metric_value == round(held_out["bits_per_byte"], 4)
    for told in (
        "| text | story.txt |",
        "| tokens read | 2,048 |",
        "| optimizer steps | 8 of 8 |",
        f"{held_out['bits_per_byte']:.4f} bits per byte",
        "`blocks.0-1.mixer.memory` | every token",
        "`blocks.0-1.memory_system.levels.1` | every 4 steps",
        "sequences of 64 tokens",
        "## Limits",
        "The weights: cc-by-4.0.",
    ):
        assert told in card.text, told
    assert str(run.parent) not in card.content, "a path of this machine is nobody else's business"


def test_the_folder_holds_no_code_and_no_pickle(exported: Path) -> None:
    assert {path.suffix for path in exported.iterdir()} == {".json", ".safetensors", ".md", ".jinja"}


def test_a_checkpoint_file_alone_is_exported_too(run: Path, tmp_path: Path) -> None:
    whole = find_checkpoint(run)
    model, _ = load_model(run)
    file = tmp_path / "alone.safetensors"
    save_checkpoint(file, model=model.double(), step=3, model_config=whole.model, tokenizer="bytes")
    folder = export(file, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "the file says no more" in card
    assert "licence is not stated" in card
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float64


def test_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["nestlearn", "export", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    assert command(str(run), str(tmp_path / "out"), "--name", "cats", "--remote-code") == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert (tmp_path / "out/modeling_hope.py").exists()
    assert "# cats\n" in (tmp_path / "out/README.md").read_text()
    assert command(str(run), str(tmp_path / "out")) == 0, "an earlier export may be replaced"
    assert not list((tmp_path / "out").glob("*.py")), "its code does not outlive it"
    capsys.readouterr()
    assert command(str(run), str(run)) == 2
    assert "holds something else than an exported Hope" in capsys.readouterr().err
    assert command(str(run / "none"), str(tmp_path / "new")) == 2
    assert not (tmp_path / "new").exists()


def test_folders_that_are_no_whole_model_are_refused(exported: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    with pytest.raises(FileNotFoundError, match="holds a model of transformers, not a run"):
        find_checkpoint(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"copy has no tokenizer that can be loaded; tokenizer\.save_pretrained"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a model of type None; expected 'hope'"):
        load(folder)
    with pytest.raises(FileExistsError, match="holds something else"):
        export(run, folder)


@pytest.fixture(scope="module")
def with_code(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("code") / "cats", remote_code=True)


def test_code_in_the_folder_answers_where_nestlearn_is_not_installed(with_code: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(with_code)  # here by our own class: no code of the folder's is run
    assert type(model).__module__ == "nestlearn.hub.modeling"
    ids = model.generate(torch.tensor([list(b"7 cats")]), max_new_tokens=12, do_sample=False)[0].tolist()
    code = f"""{WITHOUT_NESTLEARN}
import json
import re
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    refused = "custom code" in str(error)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("7 cats", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
assert not any(name.split(".")[0] == "nestlearn" for name in sys.modules)
print(json.dumps([refused, ids]))
"""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(with_code)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, ids]


def test_copied_code_is_whole_and_asks_for_nothing_else() -> None:
    sources = collect()
    assert "nestlearn.models.hope" in sources
    assert not any("kernels.op" in name or name.startswith("nestlearn.training") for name in sources)
    for name, source in sources.items():
        copy = rewrite(source, name, set(sources))
        compile(copy, name, "exec")
        assert not re.search(r"^\s*(import|from) (nestlearn|triton)\b", copy, re.MULTILINE), name


def test_imports_are_rewritten_where_they_stand() -> None:
    source = (
        "from __future__ import annotations\n\n\ndef f():\n    from nestlearn.a import (\n        b,\n        c as d,\n"
        "    )\n\n    from nestlearn.x import y\n    return b\n"
    )
    copy = rewrite(source, "nestlearn.m", {"nestlearn.a", "nestlearn.a.b"})
    assert copy.splitlines()[5:9] == [
        "    from .nestlearn_a_b import __name__ as _nestlearn_a_b",
        "    from . import nestlearn_a_b as b",
        "    from .nestlearn_a import c as d",
        "",
    ]
    namespace: dict[str, Any] = {}
    exec(copy.replace("from .", "pass  #"), namespace)
    with pytest.raises(ImportError, match=r"nestlearn\.x is not part of this copy"):
        namespace["f"]()
