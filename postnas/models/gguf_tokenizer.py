"""The tokenizer that a GGUF's metadata describe, as llama.cpp reads them: byte-level BPE or SentencePiece's BPE.

transformers has a reader too. It is not used: between 5.17 and 5.23 it gives other tokens for the same file, 5.17
swaps start and end, and neither cuts text as every file asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postnas.errors import UserError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """What a byte-level tokenizer does to text before its merges."""

    words: str | None = None
    """A regular expression of the pieces; None is GPT-2's, which tokenizers has built in."""
    digits: bool = False
    """Each digit is a piece by itself, found before the others, so a space before it is one too."""
    nfc: bool = False
    """Text is brought into Unicode's normal form C first."""
    llama3: bool = False
    """A piece that is a token is taken whole whatever the merges say, and texts begin with bos by default."""


CUTS = {
    "gpt-2": Cut(),
    **dict.fromkeys(("mpt", "olmo"), Cut(nfc=True)),
    "smollm": Cut(digits=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"), Cut(_WORDS.replace("DIGITS", "{1,3}"), llama3=True)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Cut(_WORDS.replace("DIGITS", ""), nfc=True)),
}
"""By `tokenizer.ggml.pre`, as in the published tokenizers: GPT-2, GPT-NeoX, SmolLM2, Llama 3, Qwen2. llama.cpp leaves
the normal form out. Falcon 3 is cut as llama.cpp cuts it."""

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""The values of `tokenizer.ggml.token_type` that matter here."""


def tokenizer_of(path: Path, metadata: dict[str, Any], rows: int) -> Any:
    """A PreTrainedTokenizerFast from a file's metadata. rows: of the embedding.

    Raises UserError, with the file's `path`, where the metadata describe none, or not enough of one.
    """
    from transformers import PreTrainedTokenizerFast

    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = values.get("model"), values.get("tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise UserError(f"{path}: its tokenizer is {kind!r}; give a GGUF with one of gpt2, llama")
    if len(tokens) > rows:
        raise UserError(f"{path}: has {len(tokens)} tokens and {rows} rows in token_embd.weight; convert it again")
    if kind == "gpt2" and str(values.get("pre")) not in CUTS:
        raise UserError(f"{path}: tokenizer.ggml.pre is {values.get('pre')!r}; give one of {', '.join(CUTS)}")
    try:
        gemma = str(metadata.get("general.architecture")).startswith("gemma")
        if gemma:  # the file writes a run of spaces as it is, and every other space as the mark
            values["tokens"] = tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in tokens]
        backend = _byte_level(values) if kind == "gpt2" else _sentencepiece(values, in_order=gemma)
        names = {name: _named(values, name) for name in ("bos", "eos", "unknown", "padding")}
        _add_tokens(backend, values)
        first = values.get("add_bos_token", kind == "llama" or CUTS[values["pre"]].llama3)
        _add_ends(backend, names["bos"] if first else None, names["eos"] if values.get("add_eos_token") else None)
    except Exception as error:  # tokenizers raises nothing more precise, and all that it reads stands in the file
        raise UserError(f"{path}: its tokenizer cannot be read ({error}); convert the model again") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=names["bos"],
        eos_token=names["eos"],
        unk_token=names["unknown"],
        pad_token=names["padding"],
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _named(values: dict[str, Any], name: str) -> str | None:
    """The token that is meant by bos, eos, unknown or padding. Raises IndexError for an id beyond the tokens."""
    number = values.get(f"{name}_token_id")
    return None if number is None else values["tokens"][number]


def _byte_level(values: dict[str, Any]) -> Any:
    """A tokenizers.Tokenizer over bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = CUTS[values["pre"]]
    vocabulary = {token: number for number, token in enumerate(values["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in values.get("merges", [])]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.llama3))
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if cut.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if cut.words is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(values: dict[str, Any], in_order: bool) -> Any:
    """A tokenizers.Tokenizer over characters, a mark for each space; what no token spells falls back to bytes.

    The merges follow from the tokens: best score first, or (in_order) first token first, which is Gemma's order.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = values["tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    ranked = tokens
    if not in_order:
        ranked = [tokens[number] for number in sorted(range(len(tokens)), key=lambda at: -values["scores"][at])]
    merges = []
    for token in ranked:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    unknown = _named(values, "unknown")
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    marked: list[Any] = [normalizers.Replace(" ", "▁")]
    spoken: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if values.get("add_space_prefix", True):
        marked.insert(0, normalizers.Prepend("▁"))
        spoken.append(decoders.Strip(" ", 1, 0))
    backend.normalizer, backend.decoder = normalizers.Sequence(marked), decoders.Sequence(spoken)
    return backend


def _add_tokens(backend: Any, values: dict[str, Any]) -> None:
    """Tokens that are found whole in any text: control tokens, which decoding may leave out, and the file's own."""
    from tokenizers import AddedToken

    kinds = values.get("token_type") or [1] * len(values["tokens"])
    for special, chosen in ((True, (UNKNOWN, CONTROL)), (False, (USER_DEFINED,))):
        found = [token for token, kind in zip(values["tokens"], kinds) if kind in chosen]
        added = [AddedToken(token, normalized=False, special=special) for token in found]
        # All at once: each call builds the search for all of them anew.
        backend.add_special_tokens(added) if special else backend.add_tokens(added)


def _add_ends(backend: Any, first: str | None, last: str | None) -> None:
    """Let every text begin with `first` and end with `last`, where they are given."""
    from tokenizers import processors

    start, end = [[token] if token else [] for token in (first, last)]
    if start or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end],
            pair=[*start, "$A", *end, *[f"{token}:1" for token in start], "$B:1", *[f"{token}:1" for token in end]],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(start + end)],
        )
