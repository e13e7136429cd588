"""Hugging Face directories in `transformers`: loading them safely, and their log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_iwsft.data.conversation import Messages
from megatron_iwsft.data.template_defaults import NO_VARIABLES, TemplateVariables
from megatron_iwsft.data.template_engine import Template, TemplateError, limited
from megatron_iwsft.errors import CheckpointError, DataError
from megatron_iwsft.hf.config_keys import limit_sizes
from megatron_iwsft.utils.files import other_kind
from megatron_iwsft.utils.hub import missing_directory
from megatron_iwsft.utils.json_files import read_json


def load_in_transformers(directory: str | Path, *, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face directory. Raises CheckpointError if `transformers` cannot load it.

    Only safetensors are read and no code of the directory is run. dtype "auto" is the one that the weights are stored in.
    """
    import transformers

    tokenizer = load_tokenizer_in_transformers(directory)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # it does not check what it reads, and raises whatever follows from that
        raise CheckpointError(
            f"{directory} cannot be loaded by transformers: {error}. "
            "Install a newer transformers, or export the model again."
        ) from None
    return model.eval(), tokenizer


def load_tokenizer_in_transformers(directory: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory. Raises CheckpointError if `transformers` cannot load it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not Path(directory).exists():
        raise CheckpointError(missing_directory(directory))
    if not (Path(directory) / "config.json").exists():
        raise CheckpointError(
            f"{directory} is not a Hugging Face model directory: it has no config.json. "
            "Give the directory that has one."
        )
    for path in Path(directory).iterdir():
        kind = other_kind(path) if path.exists() else None
        if kind not in (None, "a directory"):
            raise CheckpointError(f"{path} is {kind}, not a file. Remove it.")
    config = Path(directory) / "config.json"
    limit_sizes(read_json(config, dict[str, Any], CheckpointError, advice="Download it again."), str(config))
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any kind, or a panic of the tokenizers' Rust code, which is no Exception
        raise CheckpointError(
            f"{directory} has no tokenizer that transformers can load: {error}. Copy the tokenizer's files into it."
        ) from None


class ChatPrompts:
    """Turns the messages of a conversation into the text that asks for its next message, by the tokenizer's own chat template.

    The template is run as `transformers` would run it, within the limits of `data.template_engine`: it may be malicious. One that asks
    for today's date gets the date that training gives it, or that of `variables`: prompts do not change from
    day to day. Raises CheckpointError if there is none, or if it cannot render a conversation; ConfigError if the template contradicts
    `variables`.
    """

    def __init__(self, tokenizer: Any, variables: TemplateVariables = NO_VARIABLES) -> None:
        self._of, self._options = tokenizer.name_or_path, variables.values
        if tokenizer.chat_template is None:
            raise CheckpointError(
                f"{self._of} has no chat template. For a base model, use --raw and set the prompt with --prompt-format; "
                "to chat, use an instruction-tuned model."
            )
        try:
            source = tokenizer.get_chat_template()  # of several, the default one
            variables.check(source, self._of)
            self._template = Template(source, tokenizer.special_tokens_map, variables.day)
        except (DataError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self._of}: {error}") from None

    def __call__(self, messages: Messages) -> str:
        try:
            with limited():
                return self._template.render(messages, add_generation_prompt=True, options=self._options).text
        except TemplateError as error:
            raise CheckpointError(
                f"the chat template of {self._of} cannot render the conversation: {error}. Change the conversation, or the template."
            ) from None


def hugging_face_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """log π(token t | before) for t = 1 …, float32 [n−1], from a `transformers` model; at most 1,024 rows of logits at once."""
    tokens = torch.tensor([ids])
    hidden = model.get_decoder()(tokens).last_hidden_state[0, :-1]
    parts = []
    for part, targets in zip(hidden.split(1024), tokens[0, 1:].split(1024), strict=True):
        logits = model.get_output_embeddings()(part).float()
        parts.append(torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)
