"""The table and the picture of a model's levels."""

from pathlib import Path

import pytest
from rich.console import Console

from nestlearn import HopeConfig, HopeLM
from nestlearn.inspect.levels import describe_levels, levels_table, plot_levels
from nestlearn.models.config import Mixer

MIXERS = Mixer.__args__  # type: ignore[attr-defined]


def model_of(mixer: str, **settings) -> HopeLM:
    return HopeLM(HopeConfig(dim=16, depth=3, heads=2, mixer=mixer, chunk_size=16, cms_periods=(1, 4, 16), **settings))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_is_in_exactly_one_part_of_training(mixer: str) -> None:
    model = model_of(mixer)
    steps = [part for part in describe_levels(model) if part.unit == "step"]
    assert sum(part.parameters for part in steps) == model.num_parameters()
    by_period = {period: sum(p.numel() for _, p in group) for period, group in model.level_parameters().items()}
    found: dict[float, int] = {}
    for part in steps:
        found[part.period] = found.get(part.period, 0) + part.parameters
    assert found == by_period


def test_hope_has_its_memories_and_levels_in_order() -> None:
    model = model_of("self_modifying_titans")
    parts = describe_levels(model)
    assert [(part.name, part.unit, part.level, part.period) for part in parts] == [
        ("blocks.0-2.mixer.memory", "token", 0, 1),
        ("blocks.0-2.mixer.projections", "token", 1, 16),
        ("blocks.0-2.memory_system.levels.0", "step", 0, 1),
        ("everything else", "step", 0, 1),
        ("blocks.0-2.memory_system.levels.1", "step", 1, 4),
        ("blocks.0-2.memory_system.levels.2", "step", 2, 16),
    ]
    memory, projections = parts[:2]
    assert memory.parameters + projections.parameters == sum(
        parameter.numel() for block in model.blocks for parameter in block.mixer.memory.parameters()
    )
    assert projections.parameters == 2.5 * memory.parameters  # those of k and v as large, two a quarter
    assert [parts[i].rhythm for i in (0, 1, 4)] == ["every token", "every 16 tokens", "every 4 steps"]


def test_what_a_context_starts_from_is_counted_for_each_kind_of_memory() -> None:
    sizes = {mixer: describe_levels(model_of(mixer))[0] for mixer in MIXERS}
    assert sizes["attention"].parameters == 0
    assert sizes["attention"].rhythm == "recomputed at every read"
    assert sizes["delta_net"].parameters == 3 * 2 * 8 * 8
    assert sizes["titans"].parameters == 2 * sizes["delta_net"].parameters


@pytest.mark.parametrize("mixer", MIXERS)
def test_tables_name_every_part_and_picture_is_drawn(mixer: str, tmp_path: Path) -> None:
    model = model_of(mixer)
    console = Console(width=140)
    with console.capture() as captured:
        for table in levels_table(model):
            console.print(table)
    text = captured.get()
    for part in describe_levels(model):
        assert part.name in text
        assert f"{part.parameters:,}" in text
    assert "counted in tokens" in text
    assert "counted in optimizer steps" in text
    plot_levels(model, tmp_path / "levels.png", title=mixer)
    assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")
