"""Generate answers with a Hugging Face model: with vLLM if it is installed, with `transformers` otherwise."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_iwsft.data.template_defaults import NO_VARIABLES, TemplateVariables
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.hf.transformers_models import ChatPrompts, load_in_transformers, load_tokenizer_in_transformers

Backend = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. temperature 0 is greedy decoding; top_p is then ignored."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0

    def seed_of(self, problem: int, sample: int) -> int:
        """Seed of one answer, so that it does not depend on its batch or on where an earlier run was interrupted."""
        digest = hashlib.sha256(f"{self.seed}/{problem}/{sample}".encode()).digest()
        return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class Answer:
    """tokens: number of generated tokens; cut_off: generation reached max_new_tokens without a stop token; ids: with the stop token."""

    text: str
    tokens: int
    cut_off: bool
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


class Generator(Protocol):
    """problems_at_once: the best number of prompts per call to `answer`."""

    backend: str
    problems_at_once: int

    def answer(self, prompts: Sequence[tuple[int, str]]) -> list[list[Answer]]:
        """Return `samples` answers for each (problem number, question)."""
        ...


class PromptFormat:
    """Turns a question into prompt token ids, with the tokenizer's own chat template unless `raw`.

    wrapper: text around the question, such as an instruction; {prompt} is replaced by the question. variables: for the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        wrapper: str = "{prompt}",
        raw: bool = False,
        variables: TemplateVariables = NO_VARIABLES,
    ) -> None:
        if "{prompt}" not in wrapper:
            raise ConfigError(
                f"the prompt format {wrapper!r} has no {{prompt}} placeholder for the question. "
                "Add {prompt} to --prompt-format."
            )
        self._tokenizer, self._wrapper = tokenizer, wrapper
        self._chat = None if raw else ChatPrompts(tokenizer, variables)

    def __call__(self, question: str) -> list[int]:
        text = self._wrapper.replace("{prompt}", question)
        if self._chat is None:
            return self._tokenizer(text)["input_ids"]
        text = self._chat([{"role": "user", "content": text}])
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


class TransformersGenerator:
    """Batched, left-padded generation with a KV cache. On CUDA if available, in the model's own dtype; else on CPU in fp32."""

    backend = "transformers"

    def __init__(
        self,
        directory: str | Path,
        sampling: Sampling,
        *,
        batch_size: int,
        wrapper: str = "{prompt}",
        raw: bool = False,
        variables: TemplateVariables = NO_VARIABLES,
    ) -> None:
        import transformers

        on_cuda = torch.cuda.is_available()
        self._model, tokenizer = load_in_transformers(directory, dtype="auto" if on_cuda else torch.float32)
        self._model.to("cuda" if on_cuda else "cpu")
        self._tokenizer, self._sampling, self._batch_size = tokenizer, sampling, batch_size
        self._format = PromptFormat(tokenizer, wrapper=wrapper, raw=raw, variables=variables)
        self._stops = stop_tokens(
            self._model.generation_config, tokenizer, self._model.config.get_text_config().vocab_size
        )
        self._pad = (self._stops or [0])[0]  # masked; a tokenizer's padding token may be beyond the model's embedding
        self.problems_at_once = max(1, batch_size // sampling.samples)
        # Ignore the model's own penalties and sampling settings: the evaluation sets them.
        self._model.generation_config = transformers.GenerationConfig()
        self._options = transformers.GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=self._stops or None,
            pad_token_id=self._pad,
        )

    def answer(self, prompts: Sequence[tuple[int, str]]) -> list[list[Answer]]:
        formatted = [(number, self._format(question)) for number, question in prompts]
        refuse_long_prompts(self._model, *(ids for _, ids in formatted))
        rows = [
            (ids, self._sampling.seed_of(number, sample))
            for number, ids in formatted
            for sample in range(self._sampling.samples)
        ]
        flat = [
            a for at in range(0, len(rows), self._batch_size) for a in self._batch(rows[at : at + self._batch_size])
        ]
        n = self._sampling.samples
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _batch(self, rows: list[tuple[list[int], int]]) -> list[Answer]:
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([[self._pad] * (longest - len(ids)) + ids for ids, _ in rows])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in rows])
        device = self._model.device
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=self._options,
                logits_processor=self._samplers([seed for _, seed in rows]),
            )
        return [self._cut(ids) for ids in out[:, longest:].tolist()]

    def _samplers(self, seeds: list[int]) -> Any:
        from transformers.generation.logits_process import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        if self._sampling.temperature == 0:
            return LogitsProcessorList()
        chain = [TemperatureLogitsWarper(self._sampling.temperature)]
        if self._sampling.top_p < 1:
            chain.append(TopPLogitsWarper(self._sampling.top_p))
        return LogitsProcessorList([*chain, _GumbelNoise(seeds, self._model.device)])

    def _cut(self, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self._stops), None)
        kept = ids if end is None else ids[:end]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(text, len(kept), end is None, tuple(ids if end is None else ids[: end + 1]))


class _GumbelNoise:
    """Adds Gumbel noise to the scores [rows, V], so that the argmax of a row is a sample from its softmax.

    Each row has its own generator, so an answer depends on its seed only and not on the rest of the batch.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        noise = torch.stack(
            [torch.empty_like(scores[0]).exponential_(generator=generator) for generator in self._generators]
        )
        return scores - noise.log()


class VllmGenerator:
    """Generation with vLLM, on `tensor_parallel` GPUs."""

    backend = "vllm"
    problems_at_once = 256  # results are written once per call

    def __init__(
        self,
        directory: str | Path,
        sampling: Sampling,
        *,
        tensor_parallel: int = 1,
        wrapper: str = "{prompt}",
        raw: bool = False,
        variables: TemplateVariables = NO_VARIABLES,
    ) -> None:
        from transformers import GenerationConfig
        from vllm import LLM

        tokenizer = load_tokenizer_in_transformers(directory)
        self._sampling = sampling
        self._format = PromptFormat(tokenizer, wrapper=wrapper, raw=raw, variables=variables)
        has_own = (Path(directory) / "generation_config.json").exists()
        own = GenerationConfig.from_pretrained(directory) if has_own else GenerationConfig()
        self._stops = stop_tokens(own, tokenizer)
        self._engine = LLM(
            model=str(directory),
            tensor_parallel_size=tensor_parallel,
            load_format="safetensors",
            trust_remote_code=False,
            seed=sampling.seed,
            generation_config="vllm",  # ignore the model's own penalties
        )

    def answer(self, prompts: Sequence[tuple[int, str]]) -> list[list[Answer]]:
        from vllm import SamplingParams, TokensPrompt

        one = self._sampling
        inputs, params = [], []
        for number, question in prompts:
            ids = self._format(question)
            for sample in range(one.samples):
                inputs.append(TokensPrompt(prompt_token_ids=ids))
                params.append(
                    SamplingParams(
                        temperature=one.temperature,
                        top_p=one.top_p if one.temperature else 1.0,
                        max_tokens=one.max_new_tokens,
                        seed=one.seed_of(number, sample),
                        stop_token_ids=self._stops,
                    )
                )
        outputs = [request.outputs[0] for request in self._engine.generate(inputs, params, use_tqdm=False)]
        flat = [
            Answer(out.text, len(out.token_ids), out.finish_reason == "length", tuple(out.token_ids)) for out in outputs
        ]
        return [flat[i : i + one.samples] for i in range(0, len(flat), one.samples)]


def refuse_long_prompts(model: Any, *prompts: Sequence[int]) -> None:
    """Raise DataError for a prompt that is longer than a `transformers` model's context: its answer would mean nothing, and attention
    over it can take all time and memory that there is.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if isinstance(context, int) and longest > context:
        raise DataError(
            f"a prompt has {longest:,} tokens, but the context of {model.name_or_path} has {context:,} (max_position_embeddings). "
            "Shorten the prompt, or use a model with a longer context."
        )


def stop_tokens(generation_config: Any, tokenizer: Any, vocab_size: int | None = None) -> list[int]:
    """Token ids that end an answer: those of the model's generation config, and the tokenizer's end-of-sequence token.

    Without those that the model cannot write. Raises CheckpointError if one is no id.
    """
    own = generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    found = [*own, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]
    if not all(type(token) is int for token in found):
        raise CheckpointError(
            f"the generation config of {tokenizer.name_or_path} has eos_token_id {generation_config.eos_token_id!r:.80}, which is not "
            "a token id or a list of them. Correct it."
        )
    return [token for token in dict.fromkeys(found) if 0 <= token < (vocab_size or 2**31)]


def make_generator(
    directory: str | Path,
    sampling: Sampling,
    *,
    backend: Backend = "auto",
    batch_size: int = 16,
    tensor_parallel: int = 1,
    wrapper: str = "{prompt}",
    raw: bool = False,
    variables: TemplateVariables = NO_VARIABLES,
) -> Generator:
    """Build the generator. `auto` is vLLM if it is installed and there is a GPU, `transformers` otherwise."""
    prompts: dict[str, Any] = {"wrapper": wrapper, "raw": raw, "variables": variables}
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise ConfigError("vLLM is not installed. Install it (pip install vllm), or use --backend transformers.")
    if backend == "vllm" or (backend == "auto" and installed and torch.cuda.is_available()):
        return VllmGenerator(directory, sampling, tensor_parallel=tensor_parallel, **prompts)
    return TransformersGenerator(directory, sampling, batch_size=batch_size, **prompts)
