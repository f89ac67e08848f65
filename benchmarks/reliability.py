"""The attacks at full length: how many cases, what became of them, in what time.

`make reliability` runs the tests that try to get a wrong picture, a crash or a loss, with thousands of cases
where `make test` has some, and writes docs/reliability.md. `PARTS="load crashes"` runs only these; what the
others gave before is kept in out/reliability. Exit code 1 if any failed or did not end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
#: part -> its title, its files in tests/, and how many run at once
PARTS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "regressions": ("The cases that other programs got wrong", ("test_regressions",), 2),
    "faults": (
        "Engines that fail, hang, or return something else, at every call",
        ("test_faults", "test_limit"),
        2,
    ),
    "crashes": ("Killed processes, full disks, sources that vanish", ("test_manifest",), 2),
    "load": ("Eight threads at once; processes that share a cache", ("test_load",), 1),
    "input": ("Broken and hostile pictures, weights, contracts, arguments, names", ("test_fuzz",), 2),
    "models": ("Broken and hostile graphs, each in a process of its own", ("test_hostile_models",), 2),
    "verify": ("Computed twice", ("test_verify",), 1),  # alone, as it measures times
    "isolate": ("A process of its own", ("test_isolate",), 2),
}
#: what was found wrong by these attacks, and which of them fails where it comes back
BUGS = {
    "test_first_programs_of_threads_do_not_wait_for_each_other": (
        "of OpenVINO: the first programs of two threads waited for each other, for ever, once in a hundred"
    ),
    "test_every_call_of_a_picture_may_go_wrong": (
        "an earlier result of the right shape was pasted as a tile or a band"
    ),
    "test_bands_that_come_twice_are_done_in_tiles": (
        "the first or last band of the picture before was taken for this one's"
    ),
    "test_a_hanging_engine_is_left_at_the_limit": "an engine that hung was waited for without end",
    "test_killed_at_any_moment_and_resumed": "what a killed run had half written was left lying about",
    "test_bytes_of_pictures": (
        "libvips quotes a damaged file in its message, which need not be text: a `UnicodeDecodeError`"
    ),
    "test_names_of_files": "a link to itself ended a folder's run",
    "test_another_picture_than_asked_for_is_an_error": (
        "a picture of another size from another process was returned"
    ),
    "test_who_waits_for_another_keeps_to_time_and_cancelling": (
        "a picture that waited for a busy process waited beyond its time limit"
    ),
    "test_no_answer_is_another_pictures": (
        "after a caller's own function raised, or Ctrl-C, the next picture of `Isolated` was the last one"
    ),
    "test_a_process_that_talks_nonsense": "strange messages of another process raised or hung here",
    "test_what_is_dropped_or_does_not_open_leaves_no_process": (
        "an `Isolated` that was dropped or did not open left its process"
    ),
    "test_a_picture_that_the_process_cannot_hold": "one too large for its process was an `ExecutionError`",
    "test_an_exception_while_a_process_is_ended_leaves_no_answer": (
        "a second Ctrl-C while `Isolated` ended its process: each further picture was the one before"
    ),
    "test_the_program_may_go_to_another_folder_but_the_model_stays": (
        "after the program changed its folder, a new process of `Isolated` opened another file of that name"
    ),
    "test_a_picture_within_a_picture_is_refused": "a picture within another's `progress` waited for ever",
    "test_what_the_process_has_started_ends_with_it": (
        "what a crashed engine had started held the pipe, and the crash was not noticed"
    ),
    "test_a_fork_has_a_process_of_its_own": "a fork, made while a thread ran a picture, waited for ever",
    "test_no_thread_at_all_is_an_error": "where no thread could be started, `Isolated` left its process",
    "test_nothing_of_a_picture_is_kept": "the process of `Isolated` held a picture till the next",
    "test_levels_and_long_messages": "a message of over 16 MiB ended the process of `Isolated`",
    "test_what_is_printed_as_python_starts_is_no_message": (
        "what other code printed as Python started ended the process of `Isolated`"
    ),
    "test_closing_ends_what_another_thread_runs": "closing an `Isolated` waited for a run that hung",
    "test_a_batch_has_a_limit_for_each_picture_not_for_two": (
        "in a batch, a picture's time ran while another's process was busy"
    ),
    "test_opening_has_a_limit_too": "an engine that hung as a model was opened was waited for without end",
    "test_a_process_ends_with_its_own_code_though_a_run_goes_on": (
        "a process that left a run at its limit aborted as it ended (SIGABRT), by way of the engine's C++"
    ),
    "test_an_interrupt_costs_no_shape": (
        "Ctrl-C while a program was compiled, or made room for another: its shape was waited for without end "
        "ever after, or another thread's picture ended with that Ctrl-C"
    ),
    "test_where_no_thread_can_be_started_the_next_run_is_right": (
        "where a limit of time found no thread: a `RuntimeError`, and the shape was waited for without end"
    ),
    "test_a_fork_of_a_moment_when_nobody_is_said_to_have_the_turn": (
        "one of a hundred forks of a busy program waited for ever for `Isolated`"
    ),
    "test_no_file_that_can_be_opened_costs_no_picture": (
        "`Isolated` in a program that had no file left to open: an `OSError`"
    ),
    "test_places_that_are_no_text": "a `Path` in `sys.path` kept the process of `Isolated` from starting",
    "test_what_cannot_be_known_of_another_process": (
        "`Isolated` in an embedded Python, or in a folder that is gone: errors without a type of ours"
    ),
    "test_what_was_not_verified_is_done_again_where_that_is_asked_for": (
        "`--resume --verify` kept what had not been verified"
    ),
    "test_planning_has_a_limit": "how to run a picture was planned beyond its time limit",
    "test_a_search_for_an_operator_has_a_limit": "`bisect` knew no time limit",
    "test_tuning_has_a_limit_in_all_its_threads": "the threads of `tune` knew no time limit",
    "test_a_limit_is_no_finding_of_a_comparison": "`compare` took the limit's end for an engine's fault",
    "test_keys_and_shapes_of_weights": "a key of weights such as `body.07.weight` was a `KeyError`",
    "test_weights_that_claim_a_larger_model": (
        "weights of kilobytes took gigabytes, by tensors that repeat one value, numbers of blocks in keys "
        "and sizes that tables are computed from"
    ),
    "test_pickles_that_take_more_than_their_size": (
        "450 bytes of weights took 6.4 GB by a byte array; tuples as keys were hashed for hours, or raised "
        "a `RecursionError`"
    ),
    "test_a_gif_holds_what_its_header_claims": "a GIF of 35 bytes was a picture of 484 megapixels",
    "test_texts_of_a_png_fill_no_memory": "compressed texts in a PNG of 2.3 MB took 2.3 GB",
    "test_methods_that_a_file_hides": "weights in a mapping whose `get` is data were a `TypeError`",
    "test_a_jpeg_holds_what_its_header_claims": "a progressive JPEG of 693 bytes took 2.8 GB",
    "test_damaged_json_is_a_load_error": "a contract of an endless range: an `OverflowError` in a run",
    "test_a_limit_that_is_over_costs_no_program": "a limit that was over before a run cost a good program",
    "test_other_loaders_of_libvips_never_see_a_file": (
        "a drawing (SVG) named .png kept libvips busy for minutes before it was refused"
    ),
    "test_a_pipe_is_not_waited_for": (
        "a pipe named .png, or anysize.jsonl, in a folder was waited for without end"
    ),
    "test_a_contract_that_asks_for_all_memory": "a contract of huge sizes: a `MemoryError`",
    "test_broken_graphs": (
        "of ONNX Runtime and OpenVINO: broken graphs end the process by a signal; an error of `Isolated`"
    ),
    "test_broken_nets": "of ncnn: a border of 100,000 pixels keeps it for ever; `Isolated` ends it",
    "test_a_graph_of_a_version_far_ahead": (
        "of OpenVINO: it counts up to an operator set's version, for ever; `Isolated` ends it, but "
        "`--timeout` did not count while a model was opened"
    ),
    "test_debug_does_not_end_a_folder_at_its_first_failure": (
        "with `--debug`, a picture that failed ended its folder's run with an internal error"
    ),
}


@dataclass
class Attack:
    """A test with all its parameters."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)

    def add(self, case: ET.Element) -> None:
        known = {p.get("name"): p.get("value", "") for p in case.iter("property")}
        self.seconds += float(case.get("time", 0))
        for problem in (*case.iter("failure"), *case.iter("error")):
            self.failed.append(f"{case.get('name')}: {problem.get('message', '')[:300]}")
        if case.find("skipped") is not None:
            return
        self.cases += int(known.get("cases", 1))
        self.outcomes += (
            Counter(json.loads(known["outcomes"])) if "outcomes" in known else {"as it should": 1}
        )
        self.slowest = max(self.slowest, float(known.get("slowest", 0)))
        usual = ("cases", "outcomes", "slowest")
        self.notes += [f"{name} {value}" for name, value in known.items() if name not in usual]


def run(part: str) -> None:
    _, files, workers = PARTS[part]
    environment = {**os.environ, "ANYSIZE_NIGHTLY": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    options = ["-q", "--show-capture=no", "--timeout=20000", f"-n{workers}", "--dist=worksteal"]
    options += ["-o", "junit_family=xunit1", f"--junitxml={OUT / part}.xml"]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    options += ["-o", f"junit_suite_name={commit.stdout.strip()}"]
    tests = [f"tests/{file}.py" for file in files]
    (OUT / f"{part}.xml").unlink(missing_ok=True)  # what an earlier run gave, should this one not end
    subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, env=environment)


def attacks(part: str) -> tuple[str, dict[str, Attack]]:
    """The commit and the day, and what each gave."""
    suite = ET.parse(OUT / f"{part}.xml").getroot()[0]
    found: dict[str, Attack] = {}
    for case in suite.iter("testcase"):
        found.setdefault(case.get("name", "").partition("[")[0], Attack()).add(case)
    return f"{suite.get('name')} on {suite.get('timestamp', '')[:10]}", found


def write() -> int:
    """The page; returns how many attacks succeeded."""
    from anysize.bench import machine

    sections, everything = [], dict[str, Attack]()
    for part, (title, _, _) in PARTS.items():
        if not (OUT / f"{part}.xml").exists():
            sections.append(f"## {title}\n\nNot run.\n")
            continue
        when, found = attacks(part)
        everything |= found
        rows = ["| attack | cases | what became of them | slowest case | in all |", "|---|---|---|---|---|"]
        for name, attack in found.items():
            outcomes = ", ".join(f"{count} {what}" for what, count in attack.outcomes.most_common())
            outcomes = "; ".join((outcomes, *attack.notes, *(f"**FAILED** {text}" for text in attack.failed)))
            slowest = f"{attack.slowest:.2f} s" if attack.slowest else ""
            text = name.removeprefix("test_").replace("_", " ")
            rows.append(f"| {text} | {attack.cases} | {outcomes} | {slowest} | {attack.seconds:.0f} s |")
        sections.append(f"## {title}\n\nCommit {when}.\n\n" + "\n".join(rows) + "\n")
    failed = sum(len(attack.failed) for attack in everything.values())
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert all(f"def {test}(" in tests for test in BUGS)
    bugs = [f"* {what}: `{test}`" for test, what in BUGS.items()]
    here = ", ".join(f"{key} {value}" for key, value in machine().items())
    cases = sum(attack.cases for attack in everything.values())
    PAGE.write_text(
        "# Reliability, measured\n\n"
        f"Made by `make reliability`, on {here}.\n\n"
        f"{cases} cases; {failed} failed. One fails where a picture is wrong, the caller's process\n"
        "would have crashed, an error has no type of anysize's, a limit of time or memory is not kept, or\n"
        "something is lost, left behind or half written. `make test` runs each with fewer cases.\n\n"
        + "\n".join(sections)
        + "\n## Found on the way\n\nEach with the test that fails where it comes back.\n\n"
        + "\n".join(bugs)
        + "\n"
    )
    return failed


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    parts = sys.argv[1:] or [*PARTS]
    for part in parts:
        run(part)
    failed = write()
    return 1 if failed or not all((OUT / f"{part}.xml").exists() for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
