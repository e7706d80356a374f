"""The command verify: a table of what was checked, row by row as it is known, and what each failure means."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Iterable

from ..system.checks import whole_number
from ..system.printable import counted, escaped, printable
from ..tokenizer import user_path
from .arguments import REQUIRED, Command, Option, a_number, some_of_model, truth
from .console import file_text, note, say
from .fetching import agreed_folder

NAME_WIDTH, VERDICT_WIDTH, WIDTH = 20, 16, 120
SHOWN = {"pass": "pass", "fail": "FAIL", "not applicable": "not applicable"}


def verify(args: Namespace) -> None:
    """Check that a folder is whole and right, and that this code and this machine give its model's numbers. Status 1 if not."""
    from ..runtime import Launch
    from ..verification.checks import Asked, files_of
    from ..verification.checks import verify as checked
    from ..verification.checksums import new_checklist, record
    from ..verification.results import FAIL

    if Launch.read().world_size > 1:
        raise ValueError("start verify as one process, without torchrun: it starts others itself")
    whole_number("processes", args.processes, 1)
    texts = () if args.text is None else tuple(file_text(user_path(args.text)).split("\n\n"))
    wikitext = None if args.wikitext is None else file_text(user_path(args.wikitext))
    folder, began = agreed_folder(args.ckpt_dir), time.monotonic()
    asked = Asked(
        folder, args.tokenizer_path, args.device, args.dtype, args.compile, args.quick, args.processes, args.seconds, texts,
        wikitext,
    )  # fmt: skip
    if args.record:
        new_checklist(folder)
    if not args.json:
        say(f"{escaped(str(folder))}\n")
    results = []
    for result in checked(asked):
        results.append(result)
        if not args.json:
            say(_row(result.name, SHOWN[result.verdict], result.told))
    wrong = [result for result in results if result.verdict == FAIL]
    seconds = round(time.monotonic() - began, 1)
    if args.json:
        told = {"folder": str(folder), "verdict": "fail" if wrong else "pass", "seconds": seconds}
        say(json.dumps({**told, "checks": [result._asdict() for result in results]}) + "\n")
    else:
        say(_summary(results, wrong, seconds))
    if wrong:
        sys.exit(1)
    if args.record:
        note(f"{record(folder, files_of(folder, None))} is written: whatever changes from now on is found")


def _row(name: str, verdict: str, told: str) -> str:
    head = f"  {name:{NAME_WIDTH}}{verdict:{VERDICT_WIDTH}}"
    return "\n".join(textwrap.wrap(printable(escaped(told)), WIDTH, initial_indent=head, subsequent_indent=" " * len(head))) + "\n"


def _summary(results: Iterable, wrong: list, seconds: float) -> str:
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in SHOWN}
    lines = [f"{counts['pass']} passed, {counts['fail']} failed, {counts['not applicable']} not applicable, in {seconds} s\n"]
    for means in dict.fromkeys(result.means for result in wrong):
        names = " and ".join(result.name for result in wrong if result.means == means)
        lines.append(textwrap.fill(f"{names}: {means}", WIDTH) + "\n")
    return "".join(lines)


COMMANDS = {
    "verify": Command(verify, ["ckpt_dir"], {
        "what is checked": {
            "ckpt_dir": Option(str, REQUIRED, "the folder, a GGUF file, or its name on the hub"),
            "quick": Option(truth, False, "read the files and weights only, and run nothing"),
            "text": Option(str, None, "a file of texts that the model was trained on the like of, with empty lines between them"),
            "wikitext": Option(str, None, "wiki.test.raw of WikiText-2: compare the perplexity with the published one"),
            "processes": Option(a_number, 4, "the most processes that are started to share the model"),
            "seconds": Option(a_number, 600, "how long to look for exchanged layers and other faults of meaning"),
        },
        "what is told": {
            "json": Option(truth, False, "print one JSON object in place of the table"),
            "record": Option(truth, False, "if all is right, write checklist.chk, by which later damage is found"),
        },
        "the model": some_of_model("tokenizer_path", "device", "dtype", "compile"),
    }),
}  # fmt: skip
