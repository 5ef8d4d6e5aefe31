"""`nestlearn serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestlearn.cli.shared import say, teaching, use_threads


@teaching
def serve(
    model: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint file, or an exported folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; default: its folder's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; default: another one each time.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as torch chooses.")] = 0,
) -> None:
    """Answer OpenAI-compatible requests with a model, by the server of transformers. Ctrl-C stops it."""
    from nestlearn.hub.loading import load
    from nestlearn.hub.serving import serve as start

    use_threads(threads)
    loaded, tokenizer = load(model, device=device)
    called = name or model.expanduser().resolve().stem
    say(f"serving {called} on http://{host}:{port}/v1 (chat/completions, completions, models)")
    if host not in ("127.0.0.1", "localhost", "::1"):
        say("There is no password: everybody who reaches this address may use the model.")
    say(f"from another terminal: transformers chat {called} http://{host}:{port}/v1")
    start(loaded, tokenizer, name=called, host=host, port=port, seed=seed)
