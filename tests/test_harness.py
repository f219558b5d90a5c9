"""lm-evaluation-harness on our models: its command line, the same answers as our suite, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from postnas.errors import UserError
from postnas.evaluate import harness
from postnas.evaluate.choice import Row, score
from tests.tiny import WORDS, make_base, make_hybrid, make_tokenizer

try:
    import lm_eval  # noqa: F401
except ModuleNotFoundError:
    MISSING = True
else:
    MISSING = False
needs_lm_eval = pytest.mark.skipif(MISSING, reason="lm_eval is not installed: pip install 'postnas[eval]'")

PROMPT = "Question: {q}\nAnswer:"
LETTERS = "{q}\nA. {a}\nB. {b}\nC. {c}\nAnswer:"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid's folder: each block once, weights random, with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    make_hybrid(
        ["jet", "attn", "gated_deltanet", "swa"], vocab_size=300, eos_token_id=0, pad_token_id=1
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def records() -> list[dict[str, Any]]:
    """Questions with choices of unlike length, each once for every right answer, so that a row that counts as right
    tells which choice was taken."""
    found = []
    for i in range(8):
        a, b, c, *rest = WORDS[i:] + WORDS[:i]
        question = {"q": " ".join(rest[: i + 1]) + "?", "a": a, "b": f"{b} {c} {a} {b}", "c": f"the {c}"}
        found += [question | {"gold": gold} for gold in range(3)]
    return found


def rows_of(found: list[dict[str, Any]], prompt: str, letters: bool) -> list[Row]:
    """The rows of lm_eval's tasks below, for our own suite."""
    rows = []
    for number, record in enumerate(found):
        choices = (" A", " B", " C") if letters else tuple(" " + record[name] for name in "abc")
        rows.append(Row(str(number), (prompt.format(**record),) * 3, choices, record["gold"]))
    return rows


def task(folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    """A task of lm_eval over a local file of `records`."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    shared = {"task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    source = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "datasets")}
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    kind = {"output_type": "multiple_choice", "doc_to_target": "gold", "metric_list": metrics}
    return shared | {"dataset_kwargs": source} | kind | fields


def two_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """One whose choices are texts, one whose choices are letters: lm_eval scores those in one forward pass."""
    shown = PROMPT.replace("{q}", "{{q}}")
    letters = LETTERS
    for name in "qabc":
        letters = letters.replace("{" + name + "}", "{{" + name + "}}")
    return {
        "texts": task(folder, "texts", doc_to_text=shown, doc_to_choice="{{[a, b, c]}}"),
        "letters": task(folder, "letters", doc_to_text=letters, doc_to_choice=["A", "B", "C"]),
    }


def evaluated(
    folder: Path, tasks: list[dict[str, Any]], batch: int, **arguments: Any
) -> dict[str, list[dict[str, Any]]]:
    """Samples by task, from lm_eval's own evaluator."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = harness.language_model()(str(folder), dtype="float32", device="cpu", batch_size=batch)
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **arguments)
    assert found is not None
    return {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}


def agree(samples: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    assert len(samples) == len(ours) == len(records())
    for theirs, row in zip(samples, ours, strict=True):
        values = [float(answer[0]) for answer in theirs["filtered_resps"]]
        assert values == pytest.approx(row["loglikelihoods"], abs=1e-4)
        assert values.index(max(values)) == row["choice"]
        assert int(theirs["target"]) == row["gold"]
        assert theirs["acc"] == float(row["choice"] == row["gold"])
        assert theirs["acc_norm"] == float(row["choice_norm"] == row["gold"])


@needs_lm_eval
@pytest.mark.parametrize("kind", ["hybrid", "base"])
def test_harness_and_suite_answer_alike(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    model, tokenizer = harness.load(str(folder), "float32", "cpu")
    tasks = two_tasks(tmp_path)
    single = evaluated(folder, list(tasks.values()), batch=1)
    padded = evaluated(folder, list(tasks.values()), batch=7)
    taken = set()
    for name, prompt in (("texts", PROMPT), ("letters", LETTERS)):
        rows = rows_of(records(), prompt, letters=name == "letters")
        ours = score(model, tokenizer, rows)
        agree(single[name], ours)
        agree(padded[name], ours)
        taken |= {(row["choice"], row["choice_norm"]) for row in ours}
    assert len({choice for choice, _ in taken}) > 1, "the rows do not tell choices apart"
    assert any(choice != norm for choice, norm in taken), "acc and acc_norm never differ"


@needs_lm_eval
def test_partial_scoring_is_that_of_the_suite(hybrid: Path, tmp_path: Path) -> None:
    """A choice inside the context and one ending for all, as in WinoGrande."""
    fields = {"doc_to_text": "{{gold}}", "doc_to_choice": "{{[a, b, c]}}", "doc_to_target": "{{q}}"}
    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    samples = evaluated(hybrid, [task(tmp_path, "partial", metric_list=metric, **fields)], batch=3)["partial"]
    found = [
        Row(str(i), tuple(record[name] for name in "abc"), (" " + record["q"],) * 3, record["gold"])
        for i, record in enumerate(records())
    ]
    ours = score(*harness.load(str(hybrid), "float32", "cpu"), found)
    for theirs, row in zip(samples, ours, strict=True):
        assert [float(answer[0]) for answer in theirs["filtered_resps"]] == pytest.approx(
            row["loglikelihoods"], abs=1e-4
        )
        assert theirs["acc"] == float(row["choice"] == row["gold"])


@needs_lm_eval
def test_generated_answers_do_not_depend_on_the_batch(hybrid: Path, tmp_path: Path) -> None:
    metric = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    wanted = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    fields = {"output_type": "generate_until", "doc_to_text": PROMPT.replace("{q}", "{{q}}"), "doc_to_target": "{{a}}"}
    made = task(tmp_path, "answers", generation_kwargs=wanted, metric_list=metric, **fields)
    single = evaluated(hybrid, [made], batch=1, limit=9)["answers"]
    padded = evaluated(hybrid, [made], batch=9, limit=9)["answers"]
    assert [row["resps"] for row in single] == [row["resps"] for row in padded]
    assert len({row["resps"][0][0] for row in single}) > 1


@needs_lm_eval
def test_its_own_command_line_writes_its_own_results(hybrid: Path, tmp_path: Path) -> None:
    """The tasks as files, our model as the default; no option of lm_eval is in our way."""
    names = []
    for name, fields in two_tasks(tmp_path).items():
        names.append(str(tmp_path / f"{name}.yaml"))
        Path(names[-1]).write_text(yaml.safe_dump(fields))
    before = list(sys.argv)
    arguments = ["--model_args", f"pretrained={hybrid},dtype=float32", "--device", "cpu", "--batch_size", "4"]
    out = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    assert harness.main([*arguments, "--tasks", ",".join(names), *out]) == 0
    assert sys.argv == before
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model"] == "postnas"
    model, tokenizer = harness.load(str(hybrid), "float32", "cpu")
    ours = score(model, tokenizer, rows_of(records(), PROMPT, letters=False))
    right = sum(row["choice"] == row["gold"] for row in ours) / len(ours)
    assert results["results"]["texts"]["acc,none"] == pytest.approx(right)
    (samples,) = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    agree(
        sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"]),
        score(model, tokenizer, rows_of(records(), LETTERS, letters=True)),
    )


TASK = ["--tasks", "arc_easy"]
REFUSALS = [
    ([*TASK, "--model", "hf"], "--model: 'hf' is not ours"),
    ([*TASK, "--use_cache", "answers.db"], "--use_cache: .*pickle"),
    ([*TASK, "--cache_requests"], "--cache_requests: .*pickle"),
    ([*TASK, "--trust_remote_code"], "--trust_remote_code: .*code from the hub"),
    ([*TASK, "--confirm_run_unsafe_code"], "--confirm_run_unsafe_code: "),
    ([*TASK, "--log_samples"], "--output_path"),
    ([*TASK, "--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--model_args", "pretrained=x"], "--tasks: none"),
]


@needs_lm_eval
@pytest.mark.parametrize(("arguments", "named"), REFUSALS)
def test_what_is_refused_is_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        harness.main(arguments)
    assert "\n" not in str(caught.value)


@needs_lm_eval
@pytest.mark.parametrize("setting", ["trust_remote_code: true", "model: hf", "use_cache: a.db", "no_such_setting: 1"])
def test_a_config_file_is_held_to_the_same(setting: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"tasks: [arc_easy]\n{setting}\n")
    with pytest.raises(UserError, match=setting.split(":")[0]):
        harness.main(["--config", str(path)])


@needs_lm_eval
def test_flags_that_its_parser_does_not_know_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main([*TASK, "--no_such_flag"]) == 2
    assert "--no_such_flag" in capsys.readouterr().err
    assert harness.main(["run", "--help"]) == 0


@needs_lm_eval
def test_a_metric_that_is_code_from_the_hub_is_refused(base: Path) -> None:
    """HumanEval's fetches its metric as a Python file when the task is loaded, before anything is asked."""
    import evaluate

    before = evaluate.load
    with pytest.raises(UserError, match="'code_eval' is code from the hub"):
        harness.main(["--model_args", f"pretrained={base}", "--device", "cpu", "--tasks", "humaneval"])
    assert evaluate.load is before


@needs_lm_eval
def test_a_task_that_would_run_the_models_code_is_one_line(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "unsafe.yaml"
    path.write_text(yaml.safe_dump(two_tasks(tmp_path)["texts"] | {"unsafe_code": True}))
    with pytest.raises(UserError, match=r"^--tasks: Attempted to run task: .* unsafe; choose another task$") as caught:
        harness.main(["--model_args", f"pretrained={base}", "--device", "cpu", "--tasks", str(path)])
    assert "\n" not in str(caught.value)


@needs_lm_eval
@pytest.mark.parametrize(
    "name", ["prompt_robustness_math_algebra", "arc_easy,non_greedy_robustness_math_precalc", "score_robustness_math"]
)
def test_tasks_that_evaluate_an_answer_as_python_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"--tasks: \w*robustness_math\w* runs what the model wrote"):
        harness.main(["--tasks", name])


@needs_lm_eval
@pytest.mark.parametrize("way", ["wildcard", "file"])
def test_they_are_refused_by_any_other_name(way: str, base: Path, tmp_path: Path) -> None:
    name = "*_robustness_mat*_algebra"
    if way == "file":
        (tmp_path / "own.py").write_text(f"from {harness.EVALS} import math_equal\n\ndef shown(doc):\n    return 'x'\n")
        fields = yaml.safe_dump(two_tasks(tmp_path)["texts"] | {"doc_to_text": "SHOWN"})
        (tmp_path / "own.yaml").write_text(fields.replace("SHOWN", "!function own.shown"))
        name = str(tmp_path / "own.yaml")
    with pytest.raises(UserError, match="SCORE's math runs what the model wrote"):
        harness.main(["--model_args", f"pretrained={base}", "--device", "cpu", "--tasks", name])
    assert harness.EVALS not in sys.modules


@needs_lm_eval
@pytest.mark.parametrize("kind", ["AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"])
def test_code_beside_a_model_is_not_run_whatever_a_task_allows(kind: str, tmp_path: Path) -> None:
    """RULER and babilong load the model's tokenizer with trust_remote_code=True."""
    import transformers

    mark = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    code = {"AutoConfig": "own.C", "AutoTokenizer": ["own.T", None], "AutoModelForCausalLM": "own.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": code}))
    auto: Any = getattr(transformers, kind)
    before = {owner: vars(owner)["from_pretrained"] for owner in harness._auto_classes()}
    with harness._no_code_from_the_hub(), pytest.raises(Exception):  # noqa: B017
        auto.from_pretrained(tmp_path, trust_remote_code=True)
    assert not mark.exists()
    assert before == {owner: vars(owner)["from_pretrained"] for owner in harness._auto_classes()}
    with pytest.raises(Exception):  # noqa: B017
        auto.from_pretrained(tmp_path, trust_remote_code=True)
    assert mark.exists(), "the test must notice what it looks for"


MODEL_MISTAKES = [
    ({"pretrained": ""}, "pretrained is missing"),
    ({"dtype": "int7"}, "dtype 'int7'.*bfloat16"),
    ({"device": "toaster"}, "toaster"),
    ({"peft": "x"}, "peft is not taken"),
    ({"trust_remote_code": False}, "trust_remote_code is not taken"),
    ({"batch_size": "many"}, "many"),
    ({"pretrained": "/nowhere/at/all"}, "/nowhere/at/all"),
]


@needs_lm_eval
@pytest.mark.parametrize(("arguments", "named"), MODEL_MISTAKES)
def test_a_wrong_model_argument_is_one_line(base: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        harness.language_model()(**{"pretrained": str(base), "device": "cpu"} | arguments)
    assert "\n" not in str(caught.value)


@needs_lm_eval
def test_pickled_weights_are_never_read(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickled"):
        harness.language_model()(str(tmp_path), device="cpu")


def test_without_lm_eval_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm_eval.*pip install 'postnas\[eval\]'"):
        harness.main(TASK)


def test_a_hybrid_keeps_its_type_and_a_base_takes_the_one_asked_for(hybrid: Path, base: Path) -> None:
    assert harness.load(str(hybrid), device="cpu")[0].dtype == torch.float32
    assert harness.load(str(hybrid), "bfloat16", "cpu")[0].dtype == torch.bfloat16
    assert harness.load(str(base), device="cpu")[0].dtype == torch.bfloat16
    assert harness.load(str(base), "float32", "cpu")[0].dtype == torch.float32
