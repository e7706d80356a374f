"""`python -m llama serve`: the model for many, over HTTP."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..system.checks import real, whole_number
from ..system.launch import Launch, api_key
from ..system.printable import shortened
from .arguments import MODEL, Command, Option, a_number, build
from .console import texts
from .fetching import check_named

SLOTS = 8


def serve(args: Namespace) -> None:
    """Serve a model over HTTP, in the words of OpenAI's API. There is a page to chat at, too. Ctrl-C or SIGTERM ends
    it."""
    port = whole_number("port", args.port, 0, 65535)
    waiting = whole_number("max_waiting", args.max_waiting, 0)
    grace = real(args.grace)
    if grace is None or not 0 <= grace <= 86400:
        raise ValueError(f"grace={shortened(args.grace)} must be a number of seconds, from 0 to 86400")
    check_named(args.ckpt_dir, args.draft)
    try:
        from ..server import serving
        from ..server.app import Settings
    except ImportError as error:
        raise ValueError(
            f"{error}: a server needs starlette, uvicorn and prometheus-client: pip install 'llama[serve]'"
        ) from error
    if Launch.read().rank == 0:
        serving.check_place(args.host, port)
    key = args.api_key or api_key()
    origins = args.allowed_origins or ()
    settings = Settings(
        model=args.served_model_name or _name(args.ckpt_dir),
        key=key,
        max_waiting=waiting,
        origins=[origins] if isinstance(origins, str) else origins,
        hosts=[*dict.fromkeys([args.host, *serving.LOCAL_NAMES])]
        if serving.is_local(args.host) and key is None
        else (),
    )
    serving.serve(build(args), settings, args.host, port, grace)


def _name(ckpt_dir: object) -> str:
    """What the model is called if nothing else is said: its folder, or the demo model."""
    return "demo" if ckpt_dir is None else Path(str(ckpt_dir)).name or str(ckpt_dir)


COMMANDS = {
    "serve": Command(serve, ["ckpt_dir", "tokenizer_path"], {
        "the server": {
            "host": Option(str, "127.0.0.1", "the address to listen on; 0.0.0.0 is all of them"),
            "port": Option(a_number, 8000, "the port to listen on; 0 takes a free one"),
            "api_key": Option(str, None, "clients' key; the variable LLAMA_API_KEY is safer"),
            "max_waiting": Option(a_number, 256, "answers that may wait for a slot; more get status 429"),
            "allowed_origins": Option(texts, None, "a JSON list of other sites whose pages may use it"),
            "served_model_name": Option(str, None, "the model's name; that of its folder if not given"),
            "grace": Option(a_number, 30, "seconds that running answers have after SIGTERM"),
        },
        "the model": MODEL | {"max_batch_size": Option(a_number, SLOTS, "answers that run side by side")},
    }, ["llama-2-7b-chat/ --max_batch_size 16", "llama-2-7b-chat/ --host 0.0.0.0 --port 8080 --quantize int8"]),
}  # fmt: skip
