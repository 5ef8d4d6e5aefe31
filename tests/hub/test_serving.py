"""The server of transformers on a Hope: real requests, real connections."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from house import ROOT
from nestlearn.hub import load, serve

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def port(run: Path) -> Iterator[int]:
    """Where `nestlearn serve` listens, from a process of its own until Ctrl-C."""
    found = free_port()
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nestlearn",
            "serve",
            str(run),
            "--port",
            str(found),
            "--name",
            "cats",
            "--threads",
            "1",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        wait_for(found, process)
        yield found
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in (0, 130), errors
    assert f"serving cats on http://127.0.0.1:{found}/v1" in errors
    assert f"Uvicorn running on http://127.0.0.1:{found}" in errors, "it is to listen to this machine alone"
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def here(run: Path) -> Any:
    """What answers to a chat are to be: text after the greedy continuation of a prompt."""
    model, tokenizer = load(run)

    def answer(messages: list[dict[str, str]], count: int) -> str:
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < end, "the server did not begin to listen"
            time.sleep(0.1)


def post(port: int, path: str, body: Any) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    sent = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", path, sent, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def chat(port: int, messages: list[dict[str, str]], count: int = 6) -> str:
    status, body = post(port, CHAT, {"messages": messages, "max_tokens": count, "temperature": 0})
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_requests_are_answered(port: int, here: Any) -> None:
    status, body = post(
        port, CHAT, {"model": "cats", "messages": [user("how many?")], "max_tokens": 8, "temperature": 0}
    )
    assert status == 200
    assert body["choices"][0]["message"]["content"] == here([user("how many?")], 8)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 8
    status, body = post(port, COMPLETE, {"prompt": "7 cats", "max_tokens": 5, "temperature": 0})
    assert status == 200
    assert len(body["choices"][0]["text"]) == 5
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    assert [model["id"] for model in json.loads(connection.getresponse().read())["data"]] == ["cats"]
    connection.close()


def test_a_stream_is_the_answer_in_pieces(port: int) -> None:
    body = {"messages": [user("how many?")], "max_tokens": 12, "temperature": 0}
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", CHAT, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert sum(piece is not None for piece in pieces) > 1
    assert "".join(piece or "" for piece in pieces) == post(port, CHAT, body)[1]["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, b"{not json", 422, "detail"),
        (CHAT, {"nonsense": 1}, 422, "nonsense"),
        (CHAT, {"max_tokens": 3}, 400, "messages"),
        (CHAT, {"messages": "hello"}, 400, "malformed request"),
        (CHAT, {"messages": []}, 400, "empty conversation"),
        (CHAT, {"messages": [user("x")], "max_tokens": "many"}, 400, "many"),
        (CHAT, {"messages": [user("x")], "model": "dogs"}, 400, "pinned to 'cats'"),
        (COMPLETE, {"prompt": 3}, 400, "prompt must be a string"),
        (COMPLETE, {"prompt": ""}, 400, "at least one token"),
        (COMPLETE, {"prompt": "x", "temperature": -1}, 400, "temperature"),
    ],
)
def test_what_is_malformed_is_refused_and_harms_no_one(
    port: int, here: Any, path: str, body: Any, status: int, says: str
) -> None:
    found, answer = post(port, path, body)
    assert found == status
    assert says in json.dumps(answer)
    assert chat(port, [user("still there?")]) == here([user("still there?")], 6)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("heard", [True, False])
def test_a_client_that_goes_away_harms_no_one(port: int, here: Any, stream: bool, heard: bool) -> None:
    body = json.dumps({"messages": [user("tell me all")], "max_tokens": 100_000, "stream": stream})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        if heard and stream:
            assert connection.recv(200)
        elif heard:
            time.sleep(0.5)
    # Were it still writing a hundred thousand tokens, nobody would be answered for minutes.
    began = time.monotonic()
    assert chat(port, [user("still there?")]) == here([user("still there?")], 6)
    assert time.monotonic() - began < 20


def test_eight_conversations_of_twenty_turns_at_once_answer_as_if_alone(port: int, here: Any) -> None:
    answers: dict[int, list[str]] = {}

    def talk(number: int) -> None:
        said: list[dict[str, str]] = []
        for turn in range(20):
            said.append(user(f"{number} cats, {turn}"))
            said.append({"role": "assistant", "content": chat(port, said, 3)})
        answers[number] = [message["content"] for message in said[1::2]]

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        said: list[dict[str, str]] = []
        for turn in range(20):
            said.append(user(f"{number} cats, {turn}"))
            said.append({"role": "assistant", "content": answers[number][turn]})
        # What was said before is in the prompt, so the last answers follow from all of it.
        for turn in (0, 7, 19):
            assert answers[number][turn] == here(said[: 2 * turn + 1], 3)


def test_a_seed_makes_sampling_reproducible(port: int) -> None:
    body = {"messages": [user("x")], "max_tokens": 12, "temperature": 1.5, "seed": 3}
    first, second, other = [post(port, CHAT, {**body, "seed": seed})[1]["choices"] for seed in (3, 3, 4)]
    assert first == second != other


def test_the_chat_of_transformers_talks_with_it(port: int, tmp_path: Path) -> None:
    code = "import typer\nfrom transformers.cli.chat import Chat\ntyper.run(Chat)"
    words = ["cats", f"http://127.0.0.1:{port}/v1", "max_new_tokens=5", "do_sample=False"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        input="hello\nn\n!exit\n",
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "<cats>" in done.stdout
    assert "error" not in done.stdout.lower()


def test_without_its_packages_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(ImportError, match=r"nestlearn\[serve\]"):
        serve(*load(run), name="cats")
