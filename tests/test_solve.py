"""Scores that are kept serve another search: only what is missing is measured, and `--solve` needs no model."""

from __future__ import annotations

import statistics
from pathlib import Path
from shutil import copytree

import pytest
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas import run as run_module
from postnas.__main__ import main, parse
from postnas.files import read_json, read_jsonl
from postnas.search.gates import Gates


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was aligned, and placed greedily by `kl` alone."""
    folder = tmp_path_factory.mktemp("first")
    base, text = make_base(folder / "base"), make_text(folder / "text.jsonl")
    place = {"strategy": "greedy", "budget": 1, "objective": {"kl": 1.0}}
    recipe = write_recipe(folder / "recipe.yaml", tiny_recipe(folder, base, text, place=place))
    assert main(["align", str(recipe)]) == 0
    assert main(["place", str(recipe)]) == 0
    return folder


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    return copytree(first / "run", tmp_path / "run")


def place(first: Path, run: Path, *flags: str) -> int:
    return main(["place", str(first / "recipe.yaml"), "--out", str(run), *flags])


def made(run: Path) -> dict[str, bytes]:
    """Every file of a run directory, the empty lock apart."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_the_flag_belongs_to_place_alone(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(first / "recipe.yaml")
    assert parse("place", [recipe, "--solve"])[1]["solve"] is True
    assert parse("place", ["--solve", recipe])[1]["solve"] is True
    assert parse("place", [recipe, "--solve", "false"])[1]["solve"] is False
    assert parse("place", [recipe])[1]["solve"] is False
    assert main(["align", recipe, "--solve"]) == 2
    assert "--solve: is not understood" in capsys.readouterr().err


def test_of_an_added_objective_only_that_one_is_measured(first: Path, run: Path) -> None:
    before = read_jsonl(run / "scored.jsonl")
    assert {tuple(record["rows"]) for record in before} == {("kl",)}
    assert place(first, run, "--place.objective", "{kl: 1.0, copy: 2.0}") == 0
    after = read_jsonl(run / "scored.jsonl")
    known = {tuple(record["placement"]) for record in before}
    assert after[: len(before)] == before
    for record in after[len(before) :]:
        names = {"copy"} if tuple(record["placement"]) in known else {"kl", "copy"}
        assert record["rows"].keys() == names
    assert len(after) >= 2 * len(before)
    found = read_json(run / "placement.json")
    rows = {
        name: record["rows"][name]
        for record in after
        if record["placement"] == found["placement"]
        for name in record["rows"]
    }
    assert found["scores"]["copy"] == statistics.fmean(rows["copy"])
    assert found["scores"]["kl"] == statistics.fmean(rows["kl"])
    # And a search by fewer objectives than are known measures nothing.
    assert place(first, run, "--place.objective", "{copy: 1.0}", "--place.strategy", "swap", "--place.budget", "3") == 0
    assert read_jsonl(run / "scored.jsonl") == after
    assert set(read_json(run / "placement.json")["scores"]) == {"copy", "score"}


def test_solving_needs_neither_base_nor_candidates(
    first: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another budget from the scores of a search, as it is found with the model at hand."""
    other = copytree(run, tmp_path / "other")
    assert place(first, other, "--place.budget", "2") == 0
    (run / "candidates").rename(tmp_path / "away")

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("load_base", "base_folder", "load_candidates", "load_tokenizer", "prepare"):
        monkeypatch.setattr(run_module, name, loaded)
    assert place(first, run, "--place.budget", "2", "--solve") == 0
    for name in ("placement.json", "scores.json", "scored.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert read_json(run / "placement.json")["budget"] == 2
    assert "place" in read_json(run / "stages.json")


def test_solving_refuses_to_score_and_writes_nothing(
    first: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made(run)
    flags = ("--place.objective", "{kl: 1.0, copy: 1.0}", "--place.budget", "2", "--solve")
    assert place(first, run, *flags) == 2
    said = capsys.readouterr().err
    assert said == (
        "postnas: solve: 5 placements are not scored yet on copy; leave --solve out to score what is missing\n"
    )
    assert place(first, run, "--place.tokens", "256", "--solve") == 2
    assert "5 placements are not scored yet on kl" in capsys.readouterr().err
    assert place(first, run, "--align.lr", "1", "--solve") == 2
    assert "holds a run of another recipe" in capsys.readouterr().err
    assert made(run) == before
    (run / "made.json").unlink()
    assert place(first, run, "--solve") == 2
    assert "made.json: is not there; leave --solve out once" in capsys.readouterr().err
    assert place(first, run) == 0 and place(first, run, "--solve") == 0


def test_gates_go_on_where_they_were_killed(first: Path, run: Path, tmp_path: Path) -> None:
    """Killed after 7 of 11 steps, 5 of which are kept: the same placement and logits, bit for bit."""
    settings = ("--place.strategy", "gates", "--place.steps", "11", "--place.objective", "{kl: 1.0, copy: 1.0}")
    whole = copytree(run, tmp_path / "whole")
    assert place(first, whole, *settings) == 0
    with pytest.MonkeyPatch.context() as patch:
        taken = counted(patch, stop=7)
        assert place(first, run, *settings) == 130
    assert taken == list(range(7))
    assert read_json(run / "checkpoints" / "gates" / "state.json")["step"] == 5
    with pytest.MonkeyPatch.context() as patch:
        taken = counted(patch)
        assert place(first, run, *settings) == 0
    assert taken == list(range(5, 11))
    for name in ("placement.json", "scores.json", "checkpoints/gates/gates.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # solved gates are not trained again, those of another budget are
        taken = counted(patch)
        (run / "candidates").rename(tmp_path / "away")
        assert place(first, run, *settings, "--solve") == 0
        assert taken == []
        (tmp_path / "away").rename(run / "candidates")
        assert place(first, run, *settings, "--place.budget", "2", "--solve") == 2
        assert place(first, run, *settings, "--place.budget", "2") == 0
    assert taken == list(range(11))


def counted(patch: pytest.MonkeyPatch, stop: int | None = None) -> list[int]:
    """The steps of gates that are taken from here on; the process is interrupted before step `stop`."""
    taken: list[int] = []
    advance = Gates.advance

    def counting(self: Gates, relaxed: object) -> float:
        if self.step == stop:
            raise KeyboardInterrupt
        loss = advance(self, relaxed)  # type: ignore[arg-type]
        taken.append(self.step - 1)
        return loss

    patch.setattr(Gates, "advance", counting)
    return taken


def test_a_second_pass_scores_only_what_holds_windows(first: Path, run: Path) -> None:
    before = read_jsonl(run / "scored.jsonl")
    for window in ("16", "12"):
        known = read_jsonl(run / "scored.jsonl")
        assert place(first, run, "--place.windows", "1", "--place.window", window) == 0
        added = read_jsonl(run / "scored.jsonl")[len(known) :]
        assert added and all("swa" in record["placement"] and record["window"] == int(window) for record in added)
    assert not any("window" in record for record in before)


@pytest.mark.parametrize("text", ["[]", "{}", '"x"'])
def test_a_file_that_says_nothing_of_the_candidates_is_one_line(
    text: str, first: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "made.json").write_text(text, encoding="utf-8")
    assert place(first, run, "--solve") == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("made.json: does not say what the candidates are made from; leave --solve out once")
    )


@pytest.mark.parametrize("line", ["not json", "[]", '{"placement": ["attn"]}'])
def test_a_damaged_line_of_scores_is_refused_and_nothing_is_lost(
    line: str, first: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "scored.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n", encoding="utf-8")
    kept = path.read_bytes()
    assert place(first, run) == 2
    assert "scored.jsonl" in capsys.readouterr().err and path.read_bytes() == kept
    path.write_text("\n".join([*lines, '{"key": "unfinis']), encoding="utf-8")
    assert place(first, run) == 0


def test_windows_that_cannot_be_are_told_before_anything_is_scored(
    first: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_jsonl(run / "scored.jsonl")
    assert place(first, run, "--place.windows", "4") == 2
    assert "place.windows: 4 is not possible with 3 linear layers; give 0 to 3" in capsys.readouterr().err
    assert read_jsonl(run / "scored.jsonl") == before
