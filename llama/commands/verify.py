"""The work of verify: a table of what was checked, row by row as it is known, and what each failure means."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from argparse import Namespace

from ..system.checks import real, whole_number
from ..system.files import user_path
from ..system.launch import Launch
from ..system.printable import escaped, printable, shortened
from ..verification.checksums import new_checklist, record
from ..verification.checkup import Asked, files_of
from ..verification.checkup import verify as checked
from ..verification.results import FAIL, NOT_APPLICABLE, PASS, Result
from .console import exact_text, note, say
from .fetching import agreed_folder

NAME_WIDTH, VERDICT_WIDTH, WIDTH = 22, 16, 120
ONLY_RUNNING = ("rounded", "text", "wikitext", "processes", "seconds", "device", "dtype", "compile")
SHOWN = {PASS: "pass", FAIL: "FAIL", NOT_APPLICABLE: "not applicable"}


def verify(args: Namespace) -> None:
    """Run the command. SystemExit with status 1 if a check failed."""
    if Launch.read().world_size > 1:
        raise ValueError("start verify as one process, without torchrun: it starts others itself")
    if args.quick and (idle := [f"--{name}" for name in ONLY_RUNNING if name in args.given]):
        raise ValueError(
            f"--quick runs no model, and {' and '.join(idle)} would do nothing; leave out one or the other"
        )
    whole_number("processes", args.processes, 1)
    if (seconds := real(args.seconds)) is None or seconds < 0:
        raise ValueError(f"seconds={shortened(args.seconds)} must be a number of 0 or more")
    # Windows puts U+FEFF in front.
    given = "" if args.text is None else exact_text(user_path(args.text)).removeprefix("\ufeff")
    texts = tuple(text for text in re.split(r"\r?\n\s*\n", given) if text.strip())
    wikitext = None if args.wikitext is None else exact_text(user_path(args.wikitext))
    folder, began = agreed_folder(args.ckpt_dir), time.monotonic()
    asked = Asked(
        folder, args.tokenizer_path, args.device, args.dtype, args.compile, args.quick, args.rounded,
        args.processes, seconds, texts,
        wikitext,
    )  # fmt: skip
    if args.record:
        new_checklist(folder)
    results: list[Result] = []
    for result in checked(asked):
        if not args.json and not results:
            say(f"{escaped(str(folder))}\n")
        results.append(result)
        if not args.json:
            say(_row(result.name, SHOWN[result.verdict], result.told))
    wrong = [result for result in results if result.verdict == FAIL]
    took = round(time.monotonic() - began, 1)
    if args.json:
        told = {"folder": str(folder), "verdict": "fail" if wrong else "pass", "seconds": took}
        say(json.dumps({**told, "checks": [result._asdict() for result in results]}) + "\n")
    else:
        say(_summary(results, wrong, took))
    if wrong:
        sys.exit(1)
    if args.record:
        note(f"{record(folder, files_of(folder, None))} is written: whatever changes from now on is found")


def _row(name: str, verdict: str, told: str) -> str:
    head = f"  {name:{NAME_WIDTH}}{verdict:{VERDICT_WIDTH}}"
    return (
        "\n".join(
            textwrap.wrap(printable(escaped(told)), WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
        )
        + "\n"
    )


def _summary(results: list[Result], wrong: list[Result], seconds: float) -> str:
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in SHOWN}
    lines = [f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[NOT_APPLICABLE]} not applicable, in {seconds} s\n"]
    for means in dict.fromkeys(result.means for result in wrong):
        names = " and ".join(result.name for result in wrong if result.means == means)
        lines.append(textwrap.fill(f"{names}: {means}", WIDTH) + "\n")
    return "".join(lines)
