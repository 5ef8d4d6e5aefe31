"""The wrapper: the same weights under the same names, the same settings, and the habits of transformers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hope_models import MIXERS, VOCABULARY, padded, small_config, small_model, text
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import nestlearn
from cache_name import CACHE
from house import ROOT
from nestlearn.hub import HopeConfig, HopeForCausalLM
from nestlearn.models import HopeLM

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def in_fresh_process(code: str, *arguments: str) -> str:
    """What a Python process with nothing imported yet prints, without a network."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_nestlearn_does_not_import_transformers() -> None:
    in_fresh_process("import nestlearn, sys; assert 'transformers' not in sys.modules, 'it costs seconds'")


@pytest.mark.parametrize(
    "first",
    [
        "import nestlearn; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import nestlearn",
        "import importlib, nestlearn, transformers.models.auto.configuration_auto as c; importlib.reload(c)\n"
        "import transformers.models.auto.modeling_auto as m; importlib.reload(m)\n"
        "AutoConfig, AutoModelForCausalLM = c.AutoConfig, m.AutoModelForCausalLM",
    ],
)
def test_auto_classes_know_hope_whatever_is_imported_first(first: str) -> None:
    name = in_fresh_process(
        f"{first}\nmodel = AutoModelForCausalLM.from_config(AutoConfig.for_model('hope', dim=16, depth=1, heads=1))\n"
        "print(type(model).__module__, type(model).__name__)"
    )
    assert name.split() == ["nestlearn.hub.modeling", "HopeForCausalLM"]


def test_every_mixer_is_loaded_in_a_fresh_process_and_goes_on_as_here(tmp_path: Path) -> None:
    expected = {}
    for mixer in MIXERS:
        model = small_model(mixer)
        model.save_pretrained(tmp_path / mixer)
        expected[mixer] = model.generate(text(1, 7), max_new_tokens=8, do_sample=False)[0].tolist()
    found = in_fresh_process(
        "import json, sys, torch, nestlearn\nfrom pathlib import Path\nfrom transformers import AutoModelForCausalLM\n"
        f"prompt = torch.tensor([{text(7).tolist()}])\n"
        "load = AutoModelForCausalLM.from_pretrained\n"
        "print(json.dumps({path.name: load(path).generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()"
        " for path in Path(sys.argv[1]).iterdir()}))",
        str(tmp_path),
    )
    assert json.loads(found) == expected


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_have_our_names_and_survive_a_round_trip_bit_for_bit(mixer: str, tmp_path: Path) -> None:
    model = small_model(mixer)
    ours = HopeLM(model.config.architecture())
    assert list(model.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(back, HopeForCausalLM)
    assert not back.training
    assert back.config.architecture() == model.config.architecture()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert torch.equal(back(text(2, 9)).logits, ours(text(2, 9))[0])


def test_a_new_model_starts_as_hope_starts() -> None:
    config = small_config("self_modifying_titans")
    torch.manual_seed(3)
    ours = HopeLM(config.architecture()).state_dict()
    torch.manual_seed(3)
    theirs = HopeForCausalLM(config).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_settings_are_ours_with_their_names_beside() -> None:
    config = HopeConfig(dim=32, heads=4, mixer="titans", cms_periods=(1, 8))
    assert config.architecture() == nestlearn.HopeConfig(dim=32, heads=4, mixer="titans", cms_periods=(1, 8))
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 4, 4)
    assert HopeConfig(hidden_size=32, num_hidden_layers=2).architecture() == nestlearn.HopeConfig(dim=32, depth=2)
    preset = nestlearn.HopeConfig.preset("tiny", static_projections=("key",))
    assert HopeConfig.from_architecture(preset).architecture() == preset
    assert HopeConfig(**config.to_dict()).architecture() == config.architecture()
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        HopeConfig(dim=33)
    with pytest.raises(ValueError, match="no setting 'chunksize'; did you mean 'chunk_size'"):
        HopeConfig(chunksize=3)
    config.dim = 33
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        HopeForCausalLM(config)


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = small_config("tnt", write_bound=None, tie_embeddings=False, static_projections=("rate",))
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architecture() == config.architecture()


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_or_not(tied: bool, tmp_path: Path) -> None:
    model = small_model("delta_net", tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (back.head.weight is back.embedding.weight) is tied
    assert torch.equal(back(text(1, 5)).logits, model(text(1, 5)).logits)


def test_files_that_lack_a_weight_or_may_run_code_are_refused(tmp_path: Path) -> None:
    model = small_model("delta_net")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in list(weights)[1:]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"does not hold all weights of this model: {next(iter(weights))}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dim": 2 * config["dim"]}))
    with pytest.raises(ValueError, match=r"of another shape; does its config\.json belong to its weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"are damaged .*; fetch or export them again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_replaced_and_copied_modules_are_what_is_used() -> None:
    model = small_model("delta_net")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embedding.weight.zero_()
    assert not torch.equal(twin(text(1, 5)).logits, model(text(1, 5)).logits)
    bigger = copy.deepcopy(model)
    bigger.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    logits = bigger(torch.tensor([[VOCABULARY + 4]])).logits
    assert logits.shape[-1] == VOCABULARY + 5
    assert bigger.config.vocab_size == VOCABULARY + 5
    torch.testing.assert_close(bigger(text(1, 5)).logits[..., :VOCABULARY], model(text(1, 5)).logits)


def test_the_loss_is_that_of_the_next_token() -> None:
    model = small_model("self_modifying_titans")
    rows = [text(5, seed=1), text(9, seed=2)]
    logits = [model(row[None]).logits[0, :-1] for row in rows]
    expected = F.cross_entropy(torch.cat(logits), torch.cat([row[1:] for row in rows]))
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        labels = torch.where(mask.bool(), ids, -100)
        torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, expected)
    assert model(ids, labels=labels, return_dict=False)[0].shape == ()
    assert getattr(model.train()(ids, labels=labels), CACHE) is None


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "attention"])
def test_checkpointing_changes_no_gradient(mixer: str) -> None:
    model = small_model(mixer).double().train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(text(2, 9), labels=text(2, 9)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert any(getattr(module, "activation_checkpointing", False) for module in model.lm.modules())
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-12)


def test_weights_in_bfloat16_keep_their_state_in_fp32(tmp_path: Path) -> None:
    small_model("self_modifying_titans").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    output = model(text(1, 9))
    assert output.logits.dtype == torch.bfloat16
    floats = [t for layer in getattr(output, CACHE).layers for n, t in layer.state.items() if "inner" in n]
    assert floats
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)(text(1, 9)).logits
    assert (output.logits.float() - whole).norm() < 0.1 * whole.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_each_alone(side: str) -> None:
    model = small_model("self_modifying_titans")
    rows = [text(size, seed=size) for size in (3, 11, 7)]
    alone = sum(float(model(row[None], labels=row[None]).loss.detach()) * (len(row) - 1) for row in rows)
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    count = sum(map(len, rows)) - len(rows)
    for told in ({}, {"shift_labels": shifted}):
        loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=count, **told).loss
        assert float(loss.detach()) * count == pytest.approx(alone, rel=1e-5)
