"""A conversation with a Hugging Face model in `transformers`, greedily, with the answer's text as it is generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_iwsft.data.template_defaults import NO_VARIABLES, TemplateVariables
from megatron_iwsft.evaluate.generate import refuse_long_prompts, stop_tokens
from megatron_iwsft.hf.transformers_models import ChatPrompts, load_in_transformers


class Chat:
    """A conversation: `messages` so far. On CUDA if available, in the model's own dtype; else on CPU in fp32.

    variables: for the chat template. Raises CheckpointError for a model without one, ConfigError if it contradicts `variables`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_new_tokens: int,
        system: str | None = None,
        variables: TemplateVariables = NO_VARIABLES,
    ) -> None:
        import transformers

        on_cuda = torch.cuda.is_available()
        self._model, self._tokenizer = load_in_transformers(directory, dtype="auto" if on_cuda else torch.float32)
        self._model.to("cuda" if on_cuda else "cpu")
        self._prompts = ChatPrompts(self._tokenizer, variables)
        vocabulary = self._model.config.get_text_config().vocab_size
        stops = stop_tokens(self._model.generation_config, self._tokenizer, vocabulary)
        self._model.generation_config = transformers.GenerationConfig()  # without the model's own sampling settings
        self._options = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=(stops or [0])[0],
        )
        self.messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str, on_text: Callable[[str], None]) -> str:
        """The answer to a user's message; both are added to `messages`. on_text: receives the answer in pieces, as it is generated."""
        self.messages.append({"role": "user", "content": text})
        rendered = self._prompts(self.messages)
        ids = self._tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
        refuse_long_prompts(self._model, ids[0].tolist())
        streamer = _streamer(self._tokenizer, on_text)
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=torch.ones_like(ids).to(self._model.device),
                generation_config=self._options,
                streamer=streamer,
            )
        self.messages.append({"role": "assistant", "content": streamer.text})
        return streamer.text


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """transformers' streamer, which holds text back until its bytes and its word are complete."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
