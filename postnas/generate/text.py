"""Streaming generation, through transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

from postnas.errors import UserError


def generate(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0
) -> Iterator[str]:
    """Pieces of text as they are made. temperature 0 is greedy. Raises UserError for an empty prompt."""
    from transformers import TextIteratorStreamer

    if not prompt:
        raise UserError("prompt: '' is empty; give some text to go on from")
    if max_new_tokens < 1 or temperature < 0:
        raise UserError(
            f"max_new_tokens, temperature: {max_new_tokens}, {temperature} must be at least 1 and 0; give larger ones"
        )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    # The streamer hands text over between threads; a failure in the model's must not leave us waiting.
    failed: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, **sampling)
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]
