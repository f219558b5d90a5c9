"""Code tasks: what of a completion is run, and the real files' right solutions, which have to pass."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

import pytest
import yaml

from postnas import sources
from postnas.errors import UserError
from postnas.evaluate import code, sandbox
from postnas.evaluate.code import Problem, check, cut, problems, program
from postnas.sources.wheel import cache_dir

needs_sandbox = pytest.mark.skipif(sandbox.available() is not None, reason=str(sandbox.available()))

DOUBLE = Problem(
    id="double",
    prompt="def double(x):\n",
    before="import math\n\ndef double(x):\n",
    test="assert double(2) == 4\nassert double(-1) == -2",
    stops=("\ndef ", "\n#", "```"),
    solution="    return 2 * x\n",
)
SCRIPT = Problem("script", "Double a number.\n```python\n", "", DOUBLE.test, ("\nassert ", "```"), "")


def load(name: str) -> dict[str, Any]:
    text = resources.files("postnas.evaluate").joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_a_completion_ends_at_the_first_stop() -> None:
    assert cut(DOUBLE, "    return x\n\n# then\ndef other(): pass") == "    return x\n"
    assert cut(DOUBLE, "    return x\ndef other(): pass\n#") == "    return x"
    assert cut(DOUBLE, "    return x  # not here\n    # nor here\n") == "    return x  # not here\n    # nor here\n"
    assert cut(DOUBLE, "```") == ""


def test_a_script_loses_blanks_in_front_and_a_body_keeps_them() -> None:
    assert cut(SCRIPT, " \ndef double(x):\n    return x\n```\nDone.") == "def double(x):\n    return x\n"
    assert cut(DOUBLE, "    return x") == "    return x"


def test_the_program_is_prompt_completion_and_tests() -> None:
    text = program(DOUBLE, "    return x\n\n#")
    assert text == "import math\n\ndef double(x):\n    return x\n\nassert double(2) == 4\nassert double(-1) == -2\n"


def test_problems_fill_the_templates_of_both_tasks() -> None:
    doc: dict[str, Any] = {
        "task_id": "H/1",
        "prompt": "def f():\n",
        "canonical_solution": "    {}",
        "test": "def check(c): {c}",
    }
    (problem,) = problems(load("humaneval"), [{"doc": {**doc, "entry_point": "f"}}])
    assert (problem.id, problem.prompt, problem.before) == ("H/1", "def f():\n", "def f():\n")
    assert problem.test == "def check(c): {c}\ncheck(f)" and problem.solution == "    {}"
    doc = {"task_id": 7, "code": "x", "test_setup_code": "s = 1", "test_list": ["assert a", "assert b", "assert c"]}
    (problem,) = problems(load("mbpp"), [{"doc": doc, "request": {"context": "Please:\n"}}])
    assert (problem.id, problem.prompt, problem.before) == ("7", "Please:\n", "")
    assert problem.test == "s = 1\nassert a\nassert b\nassert c"


@pytest.mark.parametrize(
    "record", [{}, {"doc": {"task_id": 1}}, {"doc": None}, {"doc": {"task_id": 1, "test_list": []}}]
)
def test_a_record_of_another_file_is_named(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="row 1: does not have what the task's templates name"):
        list(problems(load("mbpp"), [record]))


@needs_sandbox
def test_check_gives_one_record() -> None:
    assert check(DOUBLE, "    return 2 * x\n# and so on") == {
        "id": "double", "completion": "    return 2 * x", "passed": 1, "reason": "passed",
    }  # fmt: skip
    assert check(DOUBLE, "    return 4")["reason"] == "failed: AssertionError"
    assert check(SCRIPT, " def double(x):\n    return x + x\n```")["passed"] == 1


@needs_sandbox
@pytest.mark.parametrize(
    "completion",
    [
        "    import sys; sys.exit(0)",
        "    return 2 * x\nimport os; os._exit(0)",
        "    return 2 * x\nraise SystemExit(0)",
        "    return",
        "return 2 * x",
        "",
    ],
)
def test_what_does_not_pass_its_tests_is_zero(completion: str) -> None:
    found = check(DOUBLE, completion)
    assert found["passed"] == 0 and found["reason"] != "passed"


def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "this kernel has none")
    monkeypatch.setattr(sandbox, "_run", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(UserError, match=r"^--allow-code: this kernel has none; run code tasks elsewhere$"):
        check(DOUBLE, DOUBLE.solution)


def in_cache(source: str, sha256: str) -> bool:
    package, _, member = source.removeprefix("package:").partition("/")
    file = cache_dir() / "packages" / package.replace("==", "-") / member
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


@needs_sandbox
@pytest.mark.parametrize(("name", "rows"), [("humaneval", 164), ("mbpp", 500)])
def test_right_solutions_of_the_real_file_pass(name: str, rows: int) -> None:
    task = load(name)
    if not in_cache(task["source"], task["sha256"]):
        pytest.skip("the file is not in the package cache")
    found = list(problems(task, sources.records(task["source"], task["sha256"])))
    assert len(found) == len({problem.id for problem in found}) == rows
    for problem in found[:: rows // 10]:
        assert check(problem, problem.solution)["passed"] == 1, problem.id
        assert code.check(problem, "    pass\n")["passed"] == 0, problem.id
        assert problem.prompt.strip() and not problem.prompt.endswith(" ")
