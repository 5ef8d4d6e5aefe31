"""Files are whole or absent, and a file that cannot be read says so."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestlearn import io


def listing(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    io.atomic_write_text(path, "first, and long\r\n")
    io.atomic_write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert listing(path.parent) == {"a.txt"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_failed_block_keeps_the_earlier_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with io.atomic_write(path) as file:
            file.write(b"half of the ne")
            file.flush()
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "old"
    assert listing(tmp_path) == {"a.txt"}


def test_reader_sees_old_or_new_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with io.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_content_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    io.atomic_write_text(tmp_path / "a.txt", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_error_of_another_file_in_the_block_is_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), io.atomic_write(tmp_path / "a.txt"):
        (tmp_path / "other.txt").read_bytes()
    assert listing(tmp_path) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full of Linux")
def test_full_disk_for_real(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")

    def write() -> None:
        with io.atomic_path(path) as temporary:
            temporary.unlink()
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"x" * 100)

    with pytest.raises(OSError, match=r"the earlier file is untouched. Free some space") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert listing(tmp_path) == {"model.safetensors"}


LIMITED = """
    import resource, signal, sys, torch
    from nestlearn import io
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    writers = {
        "safetensors": lambda path: io.atomic_save_safetensors({"a": torch.zeros(10_000)}, path),
        "text": lambda path: io.atomic_write_text(path, "x" * 100_000),
    }
    try:
        writers[sys.argv[1]](sys.argv[2])
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs the file size limit of POSIX")
@pytest.mark.parametrize("writer", ["safetensors", "text"])
def test_disk_that_takes_no_more(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "state.bin"
    path.write_text("old")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), writer, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "untouched. Free some space" in result.stdout
    assert str(path) in result.stdout
    assert path.read_text() == "old"
    assert listing(tmp_path) == {"state.bin"}


def test_killed_writer_leaves_the_old_file_and_its_litter_goes_later(tmp_path: Path) -> None:
    path = tmp_path / "state.txt"
    path.write_text("old")
    code = (
        "import os, signal; from nestlearn import io\n"
        f"with io.atomic_write({str(path)!r}) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (litter,) = listing(tmp_path) - {"state.txt"}
    io.atomic_write_text(path, "new")
    assert litter in listing(tmp_path), "a writer may still be at work on a young file"
    old = time.time() - 2 * io.STALE_AFTER_SECONDS
    os.utime(tmp_path / litter, (old, old))
    io.atomic_write_text(path, "newer")
    assert listing(tmp_path) == {"state.txt"}


def test_link_and_mode_are_kept(tmp_path: Path) -> None:
    real = tmp_path / "real.txt"
    real.write_text("old")
    real.chmod(0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(real)
    io.atomic_write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640


def test_new_file_follows_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        io.atomic_write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(previous)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("place", "message"), [("", "this is a folder"), ("file/below", "File exists|Not a directory")]
)
def test_places_where_no_file_can_be(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=message):
        io.atomic_write_text(tmp_path / place, "x")
    assert listing(tmp_path) == {"file"}


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"z": [1, 2.5, None], "a": "é"}
    io.atomic_write_json(path, value)
    assert io.load_json(path) == value
    assert list(io.load_json(path)) == ["z", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        io.atomic_write_json(path, {"loss": float("nan")})
    assert io.load_json(path) == value
    path.write_text('{\n"a": 1,\n"b" 2}')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON: .* in line 3"):
        io.load_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        io.load_json(path)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*a\.json"):
        io.load_json(tmp_path / "b.json")


def test_missing_file_names_what_is_there(tmp_path: Path) -> None:
    assert f"{tmp_path} is empty" in str(io.missing_file(tmp_path / "x.txt"))
    (tmp_path / "valid.jsonl").write_text("")
    assert "valid.jsonl?" in str(io.missing_file(tmp_path / "valid.json"))
    assert f"{tmp_path} holds valid.jsonl." in str(io.missing_file(tmp_path / "zzz" / "q"))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtype=st.sampled_from(DTYPES),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_safetensors_round_trip(
    tmp_path: Path, shapes: list[list[int]], dtype: torch.dtype, metadata: dict[str, str]
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"layer.{i}.w": torch.randn(shape).mul(9).to(dtype) for i, shape in enumerate(shapes)}
    io.atomic_save_safetensors(tensors, path, metadata)
    loaded = io.load_safetensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)
    assert io.load_safetensors_metadata(path) == metadata


def test_safetensors_of_views_ties_and_gradients(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "tied": base,
        "row": base[1],
        "transposed": base.t(),
        "expanded": torch.ones(1).expand(4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "a.safetensors"
    io.atomic_save_safetensors(tensors, path)
    loaded = io.load_safetensors(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    # Only what is asked for: the row does not drag its matrix along.
    assert path.stat().st_size < 8 + 1000 + 4 * (3 * 12 + 4 + 4 + 2)


def test_safetensors_of_a_part_holds_the_part(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    matrix = torch.arange(4000.0).reshape(4, 1000)
    io.atomic_save_safetensors({"row": matrix[2]}, path)
    assert torch.equal(io.load_safetensors(path)["row"], matrix[2])
    assert path.stat().st_size < 5000


def test_loaded_tensors_outlive_a_new_save(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    io.atomic_save_safetensors({"a": torch.ones(5000)}, path)
    loaded = io.load_safetensors(path)["a"]
    io.atomic_save_safetensors({"a": loaded * 2}, path)
    assert torch.equal(loaded, torch.ones(5000))
    loaded.add_(1)
    assert torch.equal(io.load_safetensors(path)["a"], torch.full((5000,), 2.0))


def test_safetensors_refuses_other_values(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tensors\['a'\]: expected a torch.Tensor, got list"):
        io.atomic_save_safetensors({"a": [1.0]}, tmp_path / "a")  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"metadata\['step'\]: expected a string, got int"):
        io.atomic_save_safetensors({}, tmp_path / "a", {"step": 3})  # type: ignore[dict-item]
    assert listing(tmp_path) == set()


def test_cut_or_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    io.atomic_save_safetensors({"a": torch.arange(100.0), "b": torch.zeros(3)}, path)
    whole = path.read_bytes()
    for length in [*range(0, 40, 3), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors .*(is empty|is cut off or damaged)"):
            io.load_safetensors(path)
    for foreign in (b"PK\x03\x04" + whole, json.dumps({"weights": list(range(50))}).encode()):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match=r"model\.safetensors .*is not a safetensors file"):
            io.load_safetensors_metadata(path)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*model\.safetensors"):
        io.load_safetensors(tmp_path / "modell.safetensors")
    with pytest.raises(IsADirectoryError, match="got a folder"):
        io.load_safetensors(tmp_path)
