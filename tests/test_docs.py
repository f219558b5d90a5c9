"""The documents say what is so: the example block works, files, links, commands and tasks are there."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import make_base, make_text, tiny_recipe, write_recipe
from torch import Tensor

import postnas
from postnas.__main__ import parse
from postnas.blocks import BLOCKS, linear_blocks
from postnas.commands import COMMANDS
from postnas.data import load_tokenizer
from postnas.errors import UserError
from postnas.evaluate import groups, long
from postnas.evaluate.suite import measures
from postnas.evaluate.task import load_task, task_names
from postnas.models.config import HybridConfig
from postnas.models.convert import convert
from postnas.models.load import load
from postnas.models.model import HybridForCausalLM
from postnas.pipeline import run

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DESIGN = ROOT / "docs" / "design.md"
EVALUATION = ROOT / "docs" / "evaluation.md"
COMING = "ablation-h100 blocks-h100 demo-cpu generation-cpu jet-nemotron-2b-cpu jetblock-h100 offline-suite"
COMING += " placement-h100 sizes-h100"
RESULTS = {f"{name}.json" for name in COMING.split()}
"""Figures that a document may point at before their benchmark has run."""
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def fenced(path: Path, language: str) -> list[str]:
    """The code blocks of a document that are marked with this language ("" for none)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for marked, code in blocks if marked == language]


# The example of adding_a_block.md


@pytest.fixture
def decay(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The document's code as a module, and its one line in BLOCKS."""
    code, *_ = fenced(ROOT / "docs" / "adding_a_block.md", "python")
    module = ModuleType("decay")
    monkeypatch.setitem(sys.modules, "decay", module)  # dataclasses look their module up
    exec(compile(code, "adding_a_block.md", "exec"), module.__dict__)
    monkeypatch.setitem(BLOCKS, "decay", module.Decay)
    return module


@pytest.fixture
def model(decay: ModuleType) -> HybridForCausalLM:
    config = HybridConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        placement=["decay", "attn", "swa", "decay"],
        blocks={"swa": {"window_size": 5}, "decay": {"chunk": 4}},
        eos_token_id=0,
    )
    return HybridForCausalLM(config).eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(3))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_example_block_pieces_equal_whole(model: HybridForCausalLM) -> None:
    whole = tokens(2, 23)
    cache, parts = None, []
    for piece in whole.split([6, 1, 1, 9, 2, 4], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    close(torch.cat(parts, dim=1), model(whole, use_cache=False).logits)


@torch.no_grad()
def test_example_block_chunked_equals_recurrent(model: HybridForCausalLM) -> None:
    chunked = model(tokens(2, 23)).logits
    for layer in (0, 3):
        mixer = model.model.layers[layer].self_attn
        mixer.options = replace(mixer.options, chunk=1)
    close(model(tokens(2, 23)).logits, chunked)


@torch.no_grad()
def test_example_block_ignores_left_padding(model: HybridForCausalLM) -> None:
    row, more = tokens(1, 9), torch.tensor([[7], [7]])
    padded = torch.cat([torch.full((1, 5), 13), row], dim=1)
    both = torch.cat([padded, tokens(2, 14)[1:]])
    mask = torch.ones_like(both)
    mask[0, :5] = 0
    first = model(both, attention_mask=mask, use_cache=True)
    alone = model(row, use_cache=True)
    close(first.logits[:1, 5:], alone.logits)
    after = model(more, past_key_values=first.past_key_values, attention_mask=torch.cat([mask, more * 0 + 1], dim=1))
    close(after.logits[:1], model(more[:1], past_key_values=alone.past_key_values).logits)


@torch.no_grad()
def test_example_block_keeps_packed_sequences_apart(model: HybridForCausalLM) -> None:
    row, lengths, more = tokens(1, 19), [3, 5, 11], torch.tensor([[7]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(row, position_ids=positions, use_cache=True)
    for piece, logits in zip(row.split(lengths, dim=1), packed.logits.split(lengths, dim=1), strict=True):
        alone = model(piece, use_cache=True)
        close(logits, alone.logits)
    after = model(more, past_key_values=packed.past_key_values)
    close(after.logits, model(more, past_key_values=alone.past_key_values).logits)
    new = model(row, position_ids=positions, past_key_values=packed.past_key_values)  # on a filled cache
    close(new.logits, packed.logits)


@torch.no_grad()
def test_example_block_saves_and_loads(model: HybridForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert again.config.placement == model.config.placement
    assert again.model.layers[0].self_attn.options.chunk == 4
    assert torch.equal(again(tokens(1, 12)).logits, model(tokens(1, 12)).logits)


@torch.no_grad()
def test_example_block_state_bytes_are_what_the_cache_holds(model: HybridForCausalLM) -> None:
    for context in (256, 512):  # a KV cache grows by 256 slots
        cache = model(tokens(1, context), use_cache=True).past_key_values
        for layer, state in zip(model.model.layers, cache.states, strict=True):
            assert state.nbytes == layer.self_attn.state_bytes(context, torch.float32)


def test_example_block_refuses_an_empty_chunk(model: HybridForCausalLM) -> None:
    with pytest.raises(UserError, match=r"decay\.chunk: 0"):
        HybridForCausalLM(HybridConfig(**model.config.to_dict() | {"blocks": {"decay": {"chunk": 0}}}))


def test_example_block_runs_through_a_recipe(decay: ModuleType, tmp_path: Path) -> None:
    base, text = make_base(tmp_path / "base"), make_text(tmp_path / "text.jsonl")
    recipe = tiny_recipe(
        tmp_path,
        base,
        text,
        align={"blocks": ["decay"]},
        place={"block": "decay", "strategy": "uniform"},
        stage2={"tokens": 0},
        stages=["align", "place", "train"],
    )
    _, values = parse("run", [str(write_recipe(tmp_path / "recipe.yaml", recipe))])
    hybrid, _ = load(run(values["recipe"]) / "model")
    assert hybrid.config.placement == ["decay", "attn", "decay", "attn"]
    assert isinstance(hybrid.model.layers[0].self_attn, decay.Decay)
    assert "decay" in linear_blocks()


# README and docs against the files


def listed_files(tree: str) -> list[str]:
    """Paths in a tree of indented names; a folder's name ends with a slash, a comment follows two spaces."""
    folders: list[str] = []
    found = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            found.append("".join([*folders, name]))
    return found


def package_files() -> set[str]:
    """All files of the package, the tasks of the evaluation as one pattern."""
    paths = (path for path in (ROOT / "postnas").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    tasks = {name for name in names if name.startswith("postnas/evaluate/tasks/") and name.endswith(".yaml")}
    return names - tasks | {"postnas/evaluate/tasks/*.yaml"}


def file_tree(path: Path) -> str:
    (tree,) = [block for block in fenced(path, "") if block.startswith("postnas/\n")]
    return tree


def test_design_tree_lists_the_package_exactly() -> None:
    listed = listed_files(file_tree(DESIGN))
    assert len(listed) == len(set(listed))
    assert set(listed) == package_files()


def test_readme_tree_lists_the_folders_exactly() -> None:
    folders = {f"{Path(name).parent.as_posix()}/" for name in package_files()} - {"postnas/"}
    lines = file_tree(README).splitlines()[1:]
    assert sorted(line.split()[0] for line in lines if not line.startswith("  *.py ")) == sorted(
        folder.removeprefix("postnas/") for folder in folders
    )
    assert [line for line in lines if len(line.split()) < 2] == []


def test_each_file_of_the_tree_has_a_comment() -> None:
    bare = [line for line in file_tree(DESIGN).splitlines() if len(line.split()) < 2 and not line.endswith("/")]
    assert bare == []


def links(path: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_resolve(path: Path) -> None:
    broken = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        place = path.parent / name if name else path
        if not place.exists():
            if not (place.parent == path.parent / "../benchmarks/results" and place.name in RESULTS):
                broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            broken += [target] if anchor not in map(slug, headings) else []
    assert broken == []


def shell_lines() -> list[tuple[str, list[str]]]:
    """(document, words) of each command in a code block, without its comment."""
    found = []
    for path in DOCUMENTS:
        for block in [*fenced(path, ""), *fenced(path, "bash"), *fenced(path, "sh")]:
            for line in block.splitlines():
                if re.match(r"(postnas|make|python) [\w-]", line):
                    found.append((path.name, shlex.split(line, comments=True)))
    return found


def test_commands_in_documents_are_there() -> None:
    used = [words for _, words in shell_lines() if words[0] == "postnas"]
    assert {"run", "generate", "convert"} <= {words[1] for words in used}
    assert [words for words in used if words[1] not in COMMANDS] == []


def test_commands_in_documents_have_flags_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for _, (program, name, *arguments) in shell_lines():
        if program == "postnas":
            parse(name, arguments)


def test_make_targets_in_documents_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert [words for _, words in shell_lines() if words[0] == "make" and words[1] not in targets] == []


def test_scripts_in_documents_are_there() -> None:
    scripts = [words[1] for _, words in shell_lines() if words[0] == "python"]
    assert [name for name in scripts if not (ROOT / name).is_file()] == []


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


def test_readme_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base")
    hybrid = convert(str(base), ["jet", "attn", "attn", "jet"], dtype=torch.float32)
    folder = tmp_path / "runs" / "smollm2-cpu" / "model"
    hybrid.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    (code,) = fenced(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_documents_name_what_the_package_exports() -> None:
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"postnas\.(\w+)\(", text)) <= set(postnas.__all__)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_are_there(path: Path) -> None:
    """Names in code spans such as `train/loop.py`, from the package or from the root."""
    names = set(re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|j2|yaml))`", path.read_text(encoding="utf-8")))
    made = {"recipe.yaml", "postnas/blocks/decay.py"}
    known = {file.name for file in (ROOT / "postnas").rglob("*.py")}
    missing = [
        name
        for name in names - made
        if not ((ROOT / name).exists() or (ROOT / "postnas" / name).exists() or name in known)
    ]
    assert missing == []


def test_paper_index_names_what_is_in_its_files() -> None:
    text = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(\.\./(postnas/[\w/]+)\.py\)((?:,? `\w+`)+)", text)
    assert len(named) > 10
    for path, names in named:
        module = importlib.import_module(path.replace("/", "."))
        assert [name for name in re.findall(r"\w+", names) if not hasattr(module, name)] == [], path


# The tables of evaluation.md


def table(path: Path, first: str) -> list[list[str]]:
    """The cells of a table's rows, code marks left out. first: the name of its first column."""
    _, rest = path.read_text(encoding="utf-8").split(f"\n| {first} |", 1)
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]


def test_evaluation_lists_every_task_as_it_is() -> None:
    rows = {name: cells for name, *cells in table(EVALUATION, "task | n")}
    assert sorted(rows) == task_names()
    for name, (count, kind, form, metrics, licence) in rows.items():
        task = load_task(name)
        lines = (ROOT / "postnas" / "evaluate" / "tasks" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        counts = re.findall(r"[\d,]*\d", " ".join(line for line in lines if line.startswith("#")))
        assert count in counts, name
        measured = ", ".join(measure.metric for measure in measures(task))
        assert (kind, metrics, licence) == (task.kind, measured, task.licence), name
        assert task.form in (None, form), name


def test_evaluation_lists_the_long_tasks_and_the_groups() -> None:
    assert table(EVALUATION, "task | what is asked") == [[name, task.about] for name, task in long.TASKS.items()]
    members = [(group, member) for group in groups.group_names()[:-1] for member in groups.resolve(group)]
    assert table(EVALUATION, "group") == [
        [group, one.name, str(one.shots), one.ours or "–", one.harness or "–"] for group, one in members
    ]
