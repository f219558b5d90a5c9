"""The paper's groups: every name leads to a task that is there, and each of lm_eval's runs once on made-up rows."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from postnas.errors import UserError
from postnas.evaluate import groups, harness
from postnas.evaluate.groups import Member, group_names, resolve, runnable
from postnas.evaluate.task import load_task, task_names
from tests.tiny import WORDS, make_base

HARNESS = [member for member in resolve("paper") if member.harness]
MARK = "zebra"
"""Stands in every made-up question, and in no prompt of lm_eval's own."""
ANSWER = "The sum is so. #### 12"
PRO = "biology business chemistry economics engineering health history law math other philosophy physics psychology"


def missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def many(count: int = 6, **columns: Any) -> list[dict[str, Any]]:
    """Rows that differ in their number, which a text names by {i}."""
    return [
        {k: v.replace("{i}", str(i)) if isinstance(v, str) else v for k, v in columns.items()} for i in range(count)
    ]


def chosen(**columns: Any) -> list[dict[str, Any]]:
    return many(choices={"text": WORDS[:4], "label": list("ABCD")}, answerKey="B", **columns)


TARGETS = {"choices": WORDS[:4], "labels": [1, 0, 1, 0]}
BASED = many(text=f"The {MARK} {{i}} runs.\nSpeed:", value="seven")
LONG = many(
    question=f"How far did {MARK} {{i}} go?",
    context=f"{MARK} {{i}} went seven miles.",
    answers=["seven", "7"],
    all_classes=["seven"],
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "cais/mmlu": many(question=f"Which {MARK} {{i}}?", choices=WORDS[:4], answer=2),
    "TIGER-Lab/MMLU-Pro": [
        row
        for category in [*PRO.split(), "computer science"]
        for row in many(
            question=f"Which {MARK} {{i}}?",
            options=WORDS[:10],
            answer="C",
            cot_content="A: Let's think step by step. The answer is (C).",
            category=category,
        )
    ],
    "SaylorTwift/bbh": many(input=f"Is {MARK} {{i}} so?\nOptions:\n(A) yes\n(B) no\nList: river stone", target="(A)"),
    "openai/gsm8k": many(question=f"How many {MARK} {{i}}?", answer=ANSWER),
    "EleutherAI/hendrycks_math": many(
        problem=f"Count {MARK} {{i}}.", solution="It is $\\boxed{12}$.", level="Level 1", type="Algebra"
    ),
    "regisss/math_qa": many(
        Problem=f"Count {MARK} {{i}}.", options="a ) 1 , b ) 22 , c ) 3 , d ) 4 , e ) 5", correct="b"
    ),
    "Idavidrein/gpqa": many(
        **{"Question": f"Which {MARK} {{i}}?", "Correct Answer": "river"},
        **{f"Incorrect Answer {n}": f"{WORDS[n]} {{i}}" for n in (1, 2, 3)},
    ),
    "allenai/ai2_arc": chosen(question=f"Which {MARK} {{i}}?"),
    "baber/piqa": many(goal=f"Lead {MARK} {{i}} home.", sol1="By a rope.", sol2="By a longer rope.", label=1),
    "allenai/winogrande": many(
        sentence=f"{MARK} {{i}} met the horse, and _ ran.", option1="it", option2="the horse", answer="2"
    ),
    "allenai/openbookqa": chosen(question_stem=f"{MARK} {{i}} eats"),
    "aps/super_glue": many(passage=f"{MARK} {{i}} eats grass.", question="does it eat grass", label=1),
    "truthfulqa/truthful_qa": many(question=f"Which {MARK} {{i}}?", mc1_targets=TARGETS, mc2_targets=TARGETS),
    "hazyresearch/based-fda": BASED,
    "hazyresearch/based-swde-v2": BASED,
    "hazyresearch/based-squad": BASED,
    "Xnhyacinth/LongBench": LONG,
}
"""Made-up rows by data set, with the columns that lm_eval's prompts read."""


@pytest.fixture(scope="module")
def manager() -> Any:
    """All tasks of lm_eval; reading their names takes seconds."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'postnas[eval]'")
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'postnas[eval]'")
    folder = make_base(tmp_path_factory.mktemp("base"), layers=1, max_position_embeddings=4096)
    return harness.language_model()(str(folder), dtype="float32", device="cpu", batch_size=8)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Instead of the hub, the made-up rows as every split; fills with what was asked for."""
    import datasets

    seen: set[str] = set()

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        seen.update({path, f"{path}:{name}"})
        rows = datasets.Dataset.from_list(ROWS[path])
        return datasets.DatasetDict({split: rows for split in ("train", "validation", "test", "dev")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


@pytest.mark.parametrize("member", HARNESS, ids=lambda member: member.name)
def test_the_harness_runs_each_on_made_up_rows(member: Member, manager: Any, model: Any, asked: set[str]) -> None:
    """With lm_eval's own prompts and filters, at the paper's number of shots."""
    from lm_eval import simple_evaluate

    assert member.harness in manager.all_tasks
    if gone := missing(*member.modules):
        pytest.skip(f"{gone[0]} is not installed: pip install 'lm_eval[{member.extra}]'")
    found = simple_evaluate(
        model,
        tasks=[member.harness],
        num_fewshot=member.shots,
        task_manager=manager,
        limit=1,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 4},
    )
    assert found is not None
    # lm_eval names the filter `none` where a task has none of its own.
    metric = member.metric if "," in str(member.metric) else f"{member.metric},none"
    value = found["results"][member.harness][metric]
    assert math.isfinite(value) and 0 <= value <= 1
    assert member.data in asked
    assert set(found["n-shot"].values()) == {member.shots}
    prompts = [sample["arguments"][0][0] for rows in found["samples"].values() for sample in rows]
    assert prompts and all(MARK in prompt for prompt in prompts)


@pytest.mark.parametrize("member", [m for m in HARNESS if m.extra == "longbench"], ids=lambda member: member.name)
def test_prompts_and_data_are_right_where_the_extra_is_missing(member: Member, manager: Any) -> None:
    """The task's own prompt on a made-up row, without the scoring code that needs the extra."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    assert member.data
    leaves = [manager.task_index[name] for name in manager.task_index[member.harness].cfg["task"]]
    configs = [load_yaml(str(leaf.yaml_path), resolve_func=False) for leaf in leaves]
    path, _, config = member.data.partition(":")
    assert {leaf["dataset_path"] for leaf in configs} == {path}
    assert config in {leaf["dataset_name"] for leaf in configs}
    for leaf in configs:
        assert f"{MARK} 0" in apply_template(leaf["doc_to_text"], ROWS[path][0])
        assert member.metric in {metric["metric"] for metric in leaf["metric_list"]}


def test_every_benchmark_of_the_paper_is_there() -> None:
    assert group_names() == ["general", "math", "commonsense", "retrieval", "code", "long", "paper"]
    assert [len(resolve(group)) for group in group_names()] == [3, 5, 7, 3, 3, 5, 26]
    names = [member.name for member in resolve("paper")]
    assert len(set(names)) == 26
    shots = {member.name: member.shots for member in resolve("paper") if member.shots}
    assert shots == {"GSM8K": 4, "MATH": 4, "GPQA": 5, "MMLU-Pro": 5}


def test_every_member_says_who_runs_it_or_what_it_needs() -> None:
    for member in resolve("paper"):
        if member.needs:
            assert not (member.ours or member.harness or member.data) and "\n" not in member.needs
        else:
            assert member.harness and member.metric and member.data
        assert bool(member.extra) == bool(member.modules)


def test_unknown_group_is_one_line() -> None:
    with pytest.raises(UserError, match=r"'maths'.*general, math, .*paper") as caught:
        resolve("maths")
    assert "\n" not in str(caught.value)


def test_a_task_of_ours_is_runnable_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_missing", lambda module: True)
    assert {member.name for member in resolve("commonsense") if runnable(member) is None} == {
        *("ARC-c", "ARC-e", "PIQA", "WinoGrande", "OpenBookQA", "BoolQ")
    }


def test_why_a_benchmark_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(**fields: Any) -> str:
        found = runnable(Member("x", 0, **fields))
        assert found is not None and "\n" not in found
        return found

    assert reason(needs="its own code") == "its own code"
    assert "nosuch is no task" in reason(ours="nosuch")
    monkeypatch.setattr(groups, "_missing", lambda module: module == "jieba")
    fields: dict[str, Any] = {"harness": "longbench_code", "extra": "longbench", "data": "a/b"}
    assert "pip install 'lm_eval[longbench]'" in reason(modules=("rouge", "jieba"), **fields)
    monkeypatch.setattr(groups, "_missing", lambda module: module == "lm_eval")
    assert "pip install 'postnas[eval]'" in reason(**fields)
    # The tests run with the hub switched off, and nobody has this data set in a cache.
    monkeypatch.setattr(groups, "_missing", lambda module: False)
    assert "postnas-tests/no-such-data is on the hub only" in reason(harness="x", data="postnas-tests/no-such-data:a")


def test_data_that_can_be_had_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    monkeypatch.setattr(groups, "_missing", lambda module: False)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: asked.append((name, config)))
    groups._unreachable.cache_clear()
    assert runnable(Member("x", 0, harness="x", data="postnas-tests/here:part")) is None
    assert runnable(Member("x", 0, harness="x", data="postnas-tests/whole")) is None
    assert asked == [("postnas-tests/here", "part"), ("postnas-tests/whole", None)]
    groups._unreachable.cache_clear()


def test_the_harness_takes_a_members_arguments(manager: Any) -> None:
    from lm_eval._cli import HarnessCLI

    for member in HARNESS:
        args = HarnessCLI()._parser.parse_args(["run", *member.harness_arguments()])
        assert (args.tasks, args.num_fewshot) == ([member.harness], member.shots)
    assert Member("x", 0, needs="more").harness_arguments() == []


def test_the_file_has_no_field_that_a_member_lacks() -> None:
    text = (Path(groups.__file__).parent / "groups.yaml").read_text(encoding="utf-8")
    fields = {field for members in yaml.safe_load(text).values() for member in members for field in member}
    assert fields <= set(Member.__dataclass_fields__)


@pytest.mark.parametrize("member", [m for m in resolve("paper") if m.ours], ids=lambda member: member.name)
def test_ours_is_a_task(member: Member) -> None:
    assert member.ours in task_names()


@pytest.mark.parametrize("member", resolve("retrieval"), ids=lambda member: member.name)
def test_ours_of_the_retrieval_tasks_reads_what_the_harness_reads(member: Member) -> None:
    assert member.ours is not None and member.data is not None
    task = load_task(member.ours)
    assert task.source.partition("@")[0] == f"hf:{member.data.partition(':')[0]}"
    assert (task.metric, task.shots) == (member.metric, None)
