"""The server of `transformers` (an OpenAI-compatible endpoint) on a Hope."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from nestlearn.hub.modeling import HopeForCausalLM

# What a request that does not say what it should makes the handlers raise.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)

# Set when the client of the request that is being answered has gone.
_GONE: ContextVar[threading.Event] = ContextVar("gone")

Message = MutableMapping[str, Any]


def serve(
    model: HopeForCausalLM,
    tokenizer: Any,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    seed: int | None = None,
) -> None:
    """Serves a model until it is stopped.

    Args:
        model: in evaluation mode, where it is to compute.
        tokenizer: of `transformers`, from `to_transformers` or `AutoTokenizer`.
        name: by which requests may call it; they need not.
        host: address to listen on. The default is reached from this machine alone. There is no password: whoever
            reaches another address may use the model.
        port: of the address; 0 for any that is free.
        seed: of the sampling; None for another one each time.

    Raises:
        ImportError: without the packages of the server; says how to install them.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("serving needs fastapi, uvicorn and openai: pip install 'nestlearn[serve]'")
    from transformers.cli.serve import Serve

    with _only(model, tokenizer, name):
        Serve(
            force_model=name,
            host=host,
            port=port,
            device=str(model.device),
            default_seed=seed,
            log_level="error",
        )


@contextlib.contextmanager
def _only(model: HopeForCausalLM, tokenizer: Any, name: str) -> Iterator[None]:
    """While it lasts, a server of transformers knows this model alone, answers what is malformed with 400, and stops
    writing when nobody reads any more; by itself it does so only in the middle of a stream."""
    from transformers.cli.serving import model_manager, server, utils

    class OneModel(model_manager.ModelManager):
        def load_model_and_processor(
            self, model_id_and_revision: str, progress_callback: Any = None, **_: Any
        ) -> tuple[Any, Any]:
            if progress_callback is not None:
                progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
            return model, tokenizer

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": int(started), "owned_by": "local"}]

    class Stopping(utils.GenerateManager):
        def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
            return super().generate_streaming(model, processor, _until_gone(inputs), *args, **settings)

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, *args: Any, **settings: Any
        ) -> Any:
            return await super().generate_non_streaming(model, processor, _until_gone(inputs), *args, **settings)

    started = time.time()
    build = server.build_server

    def build_and_teach(*args: Any, **settings: Any) -> Any:
        app = build(*args, **settings)
        for kind in _MALFORMED:
            app.add_exception_handler(kind, _say_what_is_wrong)
        app.add_middleware(_WatchClient)
        return app

    with (
        mock.patch.object(model_manager, "ModelManager", OneModel),
        mock.patch.object(server, "build_server", build_and_teach),
        mock.patch.object(utils, "GenerateManager", Stopping),
    ):
        yield


async def _say_what_is_wrong(_: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    said = f"{type(error).__name__}: {error}"
    return JSONResponse({"error": {"message": f"malformed request ({said})", "type": "invalid_request_error"}}, 400)


def _until_gone(inputs: Any) -> dict[str, Any]:
    """What `generate` is given for a request, with an end when its client has gone."""
    gone = _GONE.get()

    def stop(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((len(input_ids),), gone.is_set(), device=input_ids.device)

    return {**inputs, "stopping_criteria": StoppingCriteriaList([stop])}


class _WatchClient:
    """ASGI: sets `_GONE` when the client of a request disconnects, whether or not anybody is listening for it."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = threading.Event()
        _GONE.set(gone)
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def watch() -> None:
            while not gone.is_set():
                message = await receive()
                if message["type"] == "http.disconnect":
                    gone.set()
                messages.put_nowait(message)

        async def next_message() -> Message:
            if gone.is_set() and messages.empty():  # it is said as often as somebody asks
                return {"type": "http.disconnect"}
            return await messages.get()

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, next_message, send)
        finally:
            watching.cancel()
