"""The parent's side of `systems`: starts a system's process, asks it, and outlives its crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Optional

import llama

PATIENCE = 1800  # seconds for one answer: the first may wait for a compiler
SCRIPT = Path(__file__).with_name("systems.py")


class System:
    """A name in the table, the specs to try for it one after another, and what came of it.

    kind: "ours", "peer" or "limits". form: of its weights: "bf16", "int8" or "int4". loads: what each start took. runs:
    for each task, the answers. notes: what the reader has to know.
    """

    def __init__(self, name: str, kind: str, form: str, specs: list[dict[str, Any]]) -> None:
        self.name, self.kind, self.form, self.specs = name, kind, form, specs
        self.loads: list[dict[str, Any]] = []
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []
        self.unable: set[str] = set()
        self._process: Optional[subprocess.Popen[str]] = None
        self._errors: Any = None

    @property
    def alive(self) -> bool:
        return bool(self.specs)

    def start(self, *, counted: bool, **changes: Any) -> None:
        """Load in a fresh process, with these changes to the spec; with the next spec where that fails."""
        self.stop()
        while self.alive:
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by stop
            paths = [str(Path(llama.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            command = [sys.executable, str(SCRIPT), json.dumps({**self.specs[0], **changes})]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )  # fmt: skip
            answer = self._answer()
            if "error" not in answer:
                if counted:
                    self.loads.append(answer)
                return
            self._give_up(f"does not load: {answer['error']}")

    def run(self, name: str, rows: list[list[int]], new: int, *, counted: bool) -> None:
        """Ask for the continuation of rows, the task `name`. Where it cannot do that, it is not asked again.

        A crash in a run that does not count leads to the next spec; any other ends the system.
        """
        while self.alive and name not in self.unable:
            if self._process is None:
                self.start(counted=False)
                continue
            answer = self._answer([rows, new])
            if "error" not in answer:
                if counted:
                    self.runs.setdefault(name, []).append(answer)
                return
            if "crash" not in answer:
                self.unable.add(name)
                self.notes.append(f"{name}: {answer['error']}")
                return
            if counted:
                del self.specs[1:]
            self._give_up(f"{name}: {answer['error']}")

    def _give_up(self, why: str) -> None:
        self.stop()
        way = self.specs.pop(0).get("way", "")
        instead = f"; ran {self.specs[0]['way']}" if self.specs else ""
        self.notes.append(f"{why}{' ' * bool(way)}{way}{instead}")

    def _answer(self, task: Optional[list[Any]] = None) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        limit = threading.Timer(PATIENCE, process.kill)
        limit.start()
        try:
            if task is not None:
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if line:
            return json.loads(line)
        code = process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()[-1:]
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}{': ' * bool(said)}{''.join(said)}"
        return {"error": f"its process ended by {how}", "crash": True}

    def stop(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its stdin, which ends it
            self._errors.close()
            self._process = None

    def result(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("name", "kind", "form", "loads", "runs", "notes")}

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self.stop()
