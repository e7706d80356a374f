"""Mutated code: which single changes of llama/ does no test notice? Each survivor shows a missing test, or code that
does nothing.

    python tests/mutants.py --mutants 12 --seed 1 drafting rounding sampling

Without names, of all files. A copy of the checkout is changed, not the checkout. The test files that belong to a file
must pass unchanged, else its mutants are not run; they run on each mutant, the quickest first, until one fails, which
notices it, as does whatever takes long. The mutants come in the order of the draw, so that the first n are a draw too.
The numbers in SPEED are left as they are.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Optional

import pytest
import torch  # noqa: F401, once, for all the children

ROOT = Path(__file__).resolve().parents[1]
SHARED = os.environ.get("LLAMA_SHARED", str(ROOT.parent / "shared"))
# The tests of each file that has no test file of its own name, or whose behaviour others test as well: files, or
# file::test.
TESTS = {
    "agreement": "generation", "app": "server", "archive": "files checkpoint", "as_built": "own_parts",
    "bodies": "server",
    "cache_use": "own_parts threads::test_called_in_the_middle_of_a_step threads::test_two_over_one_model "
                 "threads::test_a_fork_while_another_thread_steps threads::test_the_model_called_past_a_stream "
                 "emulated_cuda::test_every_device_and_thread",
    "calls": "scheduler threads", "chat_template": "chat_formats",
    "checkpoint": "checkpoint loading::test_scales_that_no_rounding_makes added_tokens "
                  "quantization::test_what_is_refused",
    "checks": "options sampling", "checksums": "checksums verify", "checkup": "checkup verify", "child": "itself",
    "children": "followers",
    "choosing": "scheduler streams sampling emulated_cuda forcing::test_a_form_that_fails_fails_alone",
    "cli": "terminal", "client": "remote",
    "compiled": "compiled emulated_cuda::test_a_capture_that_fails_half_way "
                "emulated_cuda::test_a_graph_that_reads_freed_memory_is_found_out "
                "emulated_cuda::test_a_compared_step_leaves_what_the_replay_wrote "
                "emulated_cuda::test_every_device_and_thread emulated_cuda::test_options_are_not_recorded "
                "emulated_cuda::test_a_model_that_is_let_go_leaves_its_memory emulated_cuda::test_launches "
                "packages::test_a_package_is_of_all_that_it_depends_on packages::test_a_full_disk",
    "compiler": "packages compiled::test_packaged compiled::test_a_package_for_several_processes",
    "completion": "streams options", "console": "terminal screen", "conversation": "terminal screen",
    "convert": "convert gguf added_tokens::test_convert_keeps_them_both_ways "
               "quantization::test_stored_is_what_loading_makes quantization::test_what_is_refused",
    "cores": "cores", "cpp": "one_digit", "cpu_step": "cpu_step shared_step", "decoding/invariant": "invariant",
    "engine": "streams scheduler emulated_cuda::test_ids_are_fetched_behind_what_is_queued "
              "emulated_cuda::test_a_step_waits_for_nothing_but_its_ids memory::test_running_out_later_is_explained "
              "generation::test_logits_that_are_not_finite own_parts::test_what_is_remembered_goes_with_the_weights "
              "own_parts::test_a_model_is_fast_again cpu_step::test_no_graph_is_made_where_it_would_not_run "
              "files::test_files_that_are_written_to_under_a_model "
              "cpu_step::test_weights_that_were_replaced_and_forms_that_are_unknown",
    "evaluate": "evaluation", "faults": "repairs verify", "fetching": "hub",
    "files": "files server::test_what_is_refused", "fingerprint": "peers", "folders": "arguments",
    "generation": "generation golden options streams infilling own_parts::test_overrides_that_metas_code_calls",
    "gguf_header": "gguf", "gguf_rope": "gguf rotary", "gguf_tokenizer": "gguf", "gpu_step": "emulated_cuda",
    "harness": "evaluation", "held": "scheduler", "help": "arguments",
    "huggingface": "huggingface files::test_numbers_of_a_model_at_their_bounds",
    "info": "terminal convert memory::test_info_counts_each_process_itself adapter::test_folders_that_are_mixed_up",
    "int4": "quantization", "int8": "quantization one_digit", "interrupts": "followers", "itself": "itself verify",
    "jobs": "terminal", "keyboard": "terminal screen", "known": "known verify", "launch": "runtime",
    "layers/invariant": "invariant", "leading": "leading followers", "lm_eval_model": "evaluation",
    "loading": "loading draft_model",
    "markdown": "screen screen::test_signs screen::test_lines screen::test_what_may_still_grow "
                "screen::test_it_ends_as_if_it_had_come_at_once",
    "masks": "constraints", "meta": "checkpoint files",
    "metas_way": "own_parts forcing::test_a_seeds_text threads::test_streams_of_a_model_with_hooks",
    "metrics": "server",
    "model": "model own_parts golden rotary::test_logits_are_those_of_transformers cpu_attention "
             "files::test_attention_shows_every_nan compiled::test_fused_projections "
             "rotary::test_greedy_ids_are_those_of_transformers rotary::test_a_table_of_somebodys_own "
             "rotary::test_shapes_that_no_scaling_fits emulated_cuda::test_scenarios_of_kernels",
    "openmp": "threads", "own_kernels": "one_digit cpu_attention", "pace": "scheduler",
    "parallel": "shared_memory collectives model checkpoint", "patterns": "adapter", "peft": "adapter",
    "perplexity": "evaluation", "pipes": "terminal printable peers::test_streams_as_the_shell_leaves_them",
    "places": "gguf hub", "proven": "proven emulated_cuda", "quantization": "quantization emulated_cuda::test_launches",
    "quantized": "quantization", "repairs": "repairs verify", "replies": "server",
    "requests": "generation options streams::test_what_chunks_hold streams::test_scores "
                "scheduler::test_what_prompts_share_is_read_once",
    "results": "verify", "rope": "rotary", "rounding": "quantization", "rows": "scheduler streams",
    "runtime": "runtime cores packages::test_a_processor_that_torch_does_not_describe packages::test_cache_folder "
               "packages::test_environment_of_the_compiler packages::test_inductors_folder_is_as_safe "
               "peers::test_groups_of_the_callers_own followers::test_nothing_else_changes "
               "emulated_cuda::test_ids_are_fetched_behind_what_is_queued "
               "memory::test_processes_of_one_machine_share_its_memory",
    "sampling": "sampling streams", "sandbox": "chat_formats", "saved": "session remote",
    "scheduler": "scheduler streams threads evaluation forcing emulated_cuda", "scoring": "evaluation",
    "sealed": "packages", "sentencepieces": "tokenizer_json", "serve": "server", "serving": "server",
    "settings": "sampling options", "shared_memory": "shared_memory", "spread": "spread verify", "staging": "loading",
    "stepper": "server", "texts": "verify", "tiles": "quantization one_digit", "tokenizer": "tokenizer added_tokens",
    "tokenizer_files": "added_tokens tokenizer_json",
    "tokenizer_json": "tokenizer_json convert::test_the_tokenizer_is_the_same_in_transformers",
    "triton_kernels": "kernels", "verifying": "drafting draft_model", "writers": "convert gguf",
}  # fmt: skip
# Sizes of what is read, multiplied or measured at a time; what was measured of others' memory; and limits far above
# what real files and calls need. Another value makes it slower or less certain, but changes no result.
SPEED = {
    "BLOCKS", "BLOCK_BYTES", "BLOCK_ROWS", "CHUNK", "CODE_BYTES", "COPIED", "COPY_BYTES", "END_BYTES", "FORCED",
    "JSON_BYTES", "KEPT", "KERNEL_BYTES", "LATE", "LEAST_COLUMNS", "LOGITS_BYTES", "LONGEST_REST", "MANY_QUERIES",
    "MODEL_BYTES", "MOST", "MOST_BYTES", "MOST_CHARACTERS", "MOST_IDS", "MOST_LINE", "MOST_MEMORY", "MOST_STACK",
    "NCCL_BYTES", "ONE", "ON_GPU", "PASS", "PERIOD", "PIECE", "PIECE_NUMBERS", "PLAIN", "PROGRAMS", "READ_BYTES",
    "REPEATS", "RETRY", "SAMPLED", "SEVERAL", "SHORTEST_REST", "SIDE", "STAGED_BYTES", "SUM_BYTES", "TOKENS",
    "TRIES", "UNPACKED", "WARPS", "WORKSPACE_BYTES", "WORTH",
}  # fmt: skip
OTHER: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "all": "any", "any": "all"}
UNSEEN = ("annotation", "returns", "decorator_list")  # fields that change no result
SILENT = ast.JoinedStr, ast.Raise  # what words say
Change = tuple[ast.AST, str, Callable[[], None]]  # of which node, what its text is afterwards, and what makes it so


def sources() -> dict[str, Path]:
    """The files of llama/ by their names; where two have one name, with that of the folder."""
    paths = sorted((ROOT / "llama").glob("**/[a-z]*.py"))
    stems = Counter(path.stem for path in paths)
    return {path.stem if stems[path.stem] == 1 else f"{path.parent.name}/{path.stem}": path for path in paths}


def tests_of(name: str) -> list[str]:
    """What pytest is to run for a file of llama/."""
    places = [test.split("::") for test in TESTS.get(name, name).split()]
    return ["::".join([f"tests/test_{file}.py", *parts]) for file, *parts in places]


def missing() -> list[str]:
    """What TESTS and SPEED name that is not there."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "llama").glob("**/*.py"))
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    files = {name: tests_of(name) for name in sources()}
    wrong = [name for name in TESTS if name not in files]
    wrong += [name for name in SPEED if not re.search(rf"^(\w+, )?{name}\b.* = ", code, re.MULTILINE)]
    for name, tests in files.items():
        for file, _, test in (test.removeprefix("tests/").partition("::") for test in tests):
            if file not in texts or (test and f"def {test}(" not in texts[file]):
                wrong.append(f"{name}: {file} {test}")
    return wrong


def without(items: list[Any], i: int) -> list[Any]:
    return items[:i] + items[i + 1 :]


def others(node: ast.AST, in_function: bool) -> Iterator[ast.AST]:
    """What may stand in a node's place."""

    def new(**fields: Any) -> ast.AST:
        return type(node)(**{**vars(node), **fields})

    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield new(ops=[*node.ops[:i], OTHER[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in OTHER:
        yield new(op=OTHER[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield new(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (new(value=node.value + 1), new(value=node.value - 1))
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield new(id=NAMES[node.id])
    elif isinstance(node, ast.Call):
        yield from (new(keywords=without(node.keywords, i)) for i in range(len(node.keywords)))
    elif in_function and (
        isinstance(node, (ast.Assign, ast.AugAssign))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    ):
        yield ast.Pass()


def changes(node: ast.AST, in_function: bool = False) -> Iterator[Change]:
    """Every single change of what lies in a node."""
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if field in UNSEEN or not isinstance(child, ast.AST) or isinstance(child, SILENT):
                continue
            if isinstance(child, ast.Assign) and any(
                getattr(part, "id", None) in SPEED for part in ast.walk(child.targets[0])
            ):
                continue
            inside = in_function or isinstance(node, ast.FunctionDef)
            for other in others(child, inside):
                put = partial(setattr, node, field) if i is None else partial(value.__setitem__, i)
                yield child, ast.unparse(other), partial(put, other)
            yield from changes(child, inside)


def work(folder: Path, arguments: list[str], out: Path) -> None:
    """A child, which has torch already: run pytest on the copy, in a session of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it, and tests send it
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    os.environ.update(PYTHONPATH=str(folder), OMP_NUM_THREADS="1", LLAMA_SHARED=SHARED)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *arguments])
    sys.stdout.flush()
    os._exit(code)


def verdict(folder: Path, arguments: list[str], seconds: Optional[float] = None) -> str:
    """Of test files, or whatever else pytest takes."""
    out = folder.parent / "out"
    child = get_context("fork").Process(target=work, args=(folder, arguments, out))
    child.start()
    child.join(seconds)
    late = child.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)  # and what its tests have started
    child.kill()
    child.join()
    if late:
        return "took too long"
    told = out.read_text(errors="replace")
    failed = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "survived" if child.exitcode == 0 else f"noticed: {failed[0] if failed else told[-300:]}"


def unchanged(folder: Path, test: str) -> Optional[float]:
    """The seconds of a test file before anything is changed; None, and a line, if it fails."""
    began = time.monotonic()
    if (result := verdict(folder, [test])) == "survived":
        return time.monotonic() - began
    print(f"{test} fails before anything is changed: {result}", flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of files of llama/, without .py")
    parser.add_argument("--mutants", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="so many of the draw, which were run before")
    args = parser.parse_args()
    if wrong := missing():
        sys.exit("what TESTS or SPEED names is not there: " + ", ".join(wrong))
    paths = sources()
    names = args.names or list(paths)
    texts = {name: paths[name].read_text(encoding="utf-8") for name in names}
    places = [(name, i) for name, source in texts.items() for i, _ in enumerate(changes(ast.parse(source)))]
    drawn = random.Random(args.seed).sample(places, min(args.mutants, len(places)))[args.skip :]
    outcomes, survivors = Counter[str](), []
    times: dict[str, Optional[float]] = {}  # of each test file, see `unchanged`
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".scratch", "__pycache__"))
        plain = {name: ast.unparse(ast.parse(path.read_text(encoding="utf-8"))) for name, path in paths.items()}
        for name, path in paths.items():
            (folder / path.relative_to(ROOT)).write_text(plain[name], encoding="utf-8")
        code = "from llama.layers import own_kernels; own_kernels.loaded()"  # compiled once for all runs of pytest
        kernels = str(folder.parent / "kernels")
        environment = {**os.environ, "PYTHONPATH": "", "LLAMA_CACHE": kernels}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
        for name, number in drawn:
            os.environ["KERNELS"] = kernels * (name != "cpp")  # which compiles them
            path, tests = folder / paths[name].relative_to(ROOT), tests_of(name)
            for test in tests:
                if test not in times:
                    times[test] = unchanged(folder, test)
            tree = ast.parse(texts[name])
            node, after, change = list(changes(tree))[number]
            told = f"{name}.py:{getattr(node, 'lineno', 0)} {ast.unparse(node)} -> {after}"
            seconds = [times[test] for test in tests]
            if None in seconds:
                result = "not run"
            else:
                change()
                path.write_text(ast.unparse(tree), encoding="utf-8")
                quickest = sorted(tests, key=lambda test: times[test] or 0)
                result = verdict(folder, quickest, 60 + 3 * sum(filter(None, seconds)))
                path.write_text(plain[name], encoding="utf-8")
            print(f"{told}: {result}", flush=True)
            outcomes[result.partition(":")[0]] += 1
            survivors += [told] * (result == "survived")
    print(
        json.dumps({"mutants": len(drawn), "seed": args.seed, **outcomes, "survivors": survivors}, ensure_ascii=False)
    )
    sys.exit(bool(survivors or outcomes["not run"]))


if __name__ == "__main__":
    main()
