"""Speed of tools/shard_corpus.py and of Megatron-LM's tools/preprocess_data.py, with the same records, tokenizer and workers.

Ours also renders the chat template, masks, scores, hashes and deduplicates; preprocess_data.py gets texts that are already rendered.
It comes from a checkout of Megatron-LM (--megatron-lm DIR, or MEGATRON_LM in the environment), which needs the package six and, at its
newest, triton and Python 3.12. Without one, an equivalent script with Megatron-Core's IndexedDatasetBuilder replaces it. The output
says which of them ran.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
# Qwen2's pre-tokenization pattern, which gigatoken supports.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    args = _arguments()
    if args.stand_in:
        stand_in(*args.stand_in)
        return
    print(f"compared with {describe_theirs(args.megatron_lm)}", flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-sharding-", dir=args.scratch))
    try:
        for kind in args.kind or ["huggingface", "sentencepiece"]:
            compare(args, kind, scratch)
    finally:
        shutil.rmtree(scratch)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", type=Path, help="JSONL with --prompt-field and --response-field (default: generated sums)")
    add("--prompt-field", default="prompt")
    add("--response-field", default="response")
    add("--copies", type=int, default=20, help="copies of the input, each with a different prefix (default: 20)")
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--repeats", type=int, default=3, help="measurements of each (default: 3)")
    add(
        "--kind",
        action="append",
        choices=("huggingface", "sentencepiece"),
        help="kind of tokenizer to train on the input (default: both)",
    )
    checkout = os.environ.get("MEGATRON_LM")
    add(
        "--megatron-lm",
        type=Path,
        metavar="DIR",
        default=Path(checkout) if checkout else None,
        help="checkout of Megatron-LM (default: MEGATRON_LM; without it, the equivalent script)",
    )
    add(
        "--check", action="store_true", help="compare the ids of every record with those of the tokenizer's own library"
    )
    add("--scratch", type=Path, help="directory for temporary files (default: the system's temporary directory)")
    add("--stand-in", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def describe_theirs(checkout: Path | None) -> str:
    """Which script is compared with. Exits if the checkout's does not start."""
    if checkout is None:
        return "an equivalent of preprocess_data.py with Megatron-Core's IndexedDatasetBuilder (no checkout of Megatron-LM given)"
    script = checkout / "tools" / "preprocess_data.py"
    tried = subprocess.run(
        [sys.executable, str(script), "--help"], env=_theirs(checkout), capture_output=True, text=True
    )
    if tried.returncode:
        sys.exit(f"{script} does not start: {(tried.stderr.strip().splitlines() or ['no message'])[-1]}")
    version = runpy.run_path(str(checkout / "megatron" / "core" / "package_info.py"))["__version__"]
    return f"Megatron-LM's own {script} (version {version})"


def _theirs(checkout: Path) -> dict[str, str]:
    """The environment for a script of the checkout."""
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Run:
    """Number of tokens written; wall-clock seconds; CPU seconds of all processes."""

    tokens: int
    wall: float
    cpu: float

    def __str__(self) -> str:
        return (
            f"{self.tokens / self.wall / 1e6:6.2f} M tokens/s ({self.wall:5.1f} s, {self.tokens:,} tokens), "
            f"{self.tokens / self.cpu / 1e6:6.2f} M per CPU second"
        )


def compare(args: argparse.Namespace, kind: str, scratch: Path) -> None:
    base = list(_records(args))
    tokenizer, template = train(kind, base, scratch / kind)
    records, texts = scratch / f"{kind}.jsonl", scratch / f"{kind}.text.jsonl"
    write_inputs(base, args.copies, tokenizer, template, records, texts)
    size = records.stat().st_size / 1e6
    theirs_name = "preprocess_data.py" if args.megatron_lm else "equivalent of preprocess_data.py"
    print(f"\n{kind} tokenizer, {size:.0f} MB of records, {args.workers} workers, {os.cpu_count()} cores", flush=True)
    wall_ratios, cpu_ratios = [], []
    for _ in range(args.repeats):
        ours = run_ours(records, tokenizer, template, scratch / "corpus", args.workers)
        theirs = run_theirs(args.megatron_lm, texts, kind, tokenizer, scratch / "theirs", args.workers)
        wall_ratios.append(ours.tokens / ours.wall / (theirs.tokens / theirs.wall))
        cpu_ratios.append(ours.tokens / ours.cpu / (theirs.tokens / theirs.cpu))
        print(f"  shard_corpus.py {ours}\n  {theirs_name} {theirs}")
        print(f"  ratio {wall_ratios[-1]:.1f} by wall-clock time, {cpu_ratios[-1]:.1f} by CPU time", flush=True)
    print(f"  median ratio {np.median(wall_ratios):.1f} by wall-clock time, {np.median(cpu_ratios):.1f} by CPU time")
    memory(records, len(base), args.copies, tokenizer, template, args.workers, scratch)
    stages(records, tokenizer, template)
    if args.check:
        check(scratch / "corpus", records, tokenizer, template)
    open_with_megatron(scratch / "corpus")


def _records(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    if args.input is None:
        from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records

        yield from arithmetic_records(20_000, ArithmeticSettings(digits=8), 0)
        return
    with open(args.input, encoding="utf-8") as file:
        for record in map(json.loads, file):
            yield {"prompt": record[args.prompt_field], "response": record[args.response_field]}


def train(kind: str, records: list[dict[str, str]], directory: Path) -> tuple[Path, str | None]:
    """Train a tokenizer of 8,000 tokens on the records; returns its path and the name of the template it needs."""
    from megatron_iwsft.data.template_presets import PRESETS

    directory.mkdir()
    texts = [r[field] for r in records for field in ("prompt", "response")]
    if kind == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(directory / "spm"), vocab_size=8000, hard_vocab_limit=False, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
        return directory / "spm.model", "plain"
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "chat_template": PRESETS["chatml"],
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory, None


def write_inputs(
    base: list[dict[str, str]], copies: int, tokenizer: Path, template: str | None, records: Path, texts: Path
) -> None:
    """Write the same conversations twice: as records with a score, and as rendered texts."""
    from megatron_iwsft.data.chat_template import ChatTemplate
    from megatron_iwsft.data.conversation import Conversation
    from megatron_iwsft.data.tokenizer import load_tokenizer

    chat = ChatTemplate(load_tokenizer(tokenizer), template)
    with open(records, "w", encoding="utf-8") as ours, open(texts, "w", encoding="utf-8") as theirs:
        for copy in range(copies):
            for record in base:
                prompt, response = f"Case {copy}. {record['prompt']}", record["response"]
                (trajectory,) = chat.trajectories(Conversation(("user", "assistant"), [prompt, response]))
                score = len(response) % 10 / 10
                ours.write(json.dumps({"prompt": prompt, "response": response, "score": score}) + "\n")
                theirs.write(json.dumps({"text": "".join(trajectory.texts)}) + "\n")


def timed(command: list[str], **options: Any) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command and all its descendants, also those that outlive it."""
    adopt_orphans()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, **options)
    wall = time.perf_counter() - begin
    with suppress(ChildProcessError):
        while True:
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed:\n{done.stderr[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def adopt_orphans() -> None:
    """Make descendants whose parent has exited children of this process, so that their CPU time is counted too."""
    PR_SET_CHILD_SUBREAPER = 36
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def run_ours(records: Path, tokenizer: Path, template: str | None, output: Path, workers: int) -> Run:
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, str(ROOT / "tools" / "shard_corpus.py"), str(records), "--output", str(output), "--tokenizer", str(tokenizer),
        "--score-field", "score", "--workers", str(workers), *(["--template", template] if template else []),
    ]  # fmt: skip
    wall, cpu = timed(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    return Run(counts["tokens"], wall, cpu)


def run_theirs(checkout: Path | None, texts: Path, kind: str, tokenizer: Path, output: Path, workers: int) -> Run:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    if checkout is None:
        command = [sys.executable, __file__, "--stand-in", str(texts), str(tokenizer), str(output), str(workers)]
        wall, cpu = timed(command, env=os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"})
    else:
        names = {"huggingface": "HuggingFaceTokenizer", "sentencepiece": "SentencePieceTokenizer"}
        command = [
            sys.executable, str(checkout / "tools" / "preprocess_data.py"), "--input", str(texts), "--json-keys", "text",
            "--tokenizer-type", names[kind], "--tokenizer-model", str(tokenizer), "--output-prefix", str(output / "corpus"),
            "--workers", str(workers), "--log-interval", "1000000",
        ]  # fmt: skip
        wall, cpu = timed(command, env=_theirs(checkout))
    from megatron_iwsft.data.indexed import IndexedReader

    return Run(int(IndexedReader(output / "corpus_text_document").lengths.sum(dtype=np.int64)), wall, cpu)


def memory(
    records: Path, once: int, copies: int, tokenizer: Path, template: str | None, workers: int, scratch: Path
) -> None:
    """Print the peak memory of shard_corpus.py, summed over its processes, for one copy of the input and for all copies."""
    with open(records, encoding="utf-8") as all_copies, open(scratch / "once.jsonl", "w", encoding="utf-8") as one:
        one.writelines(islice(all_copies, once))
    peaks = []
    for source in (scratch / "once.jsonl", records):
        with peak_memory() as peak:
            run_ours(source, tokenizer, template, scratch / "corpus", workers)
        peaks.append(peak[0] / 2**20)
    print(
        f"  peak memory of all its processes: {peaks[0]:.0f} MiB for one copy, {peaks[1]:.0f} MiB for {copies} copies"
    )


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Sample the memory of this process's descendants; yields [peak bytes], with shared pages counted in each process."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            held = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has exited
                    held += process.memory_info().rss
            peak[0] = max(peak[0], held)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


_own: Any = None


def _open_tokenizer(path: str) -> None:
    global _own
    if path.endswith(".model"):
        import sentencepiece

        _own = sentencepiece.SentencePieceProcessor(model_file=path).encode
    else:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")
        _own = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731


def _encode_line(line: str) -> list[int]:
    return _own(json.loads(line)["text"])


def stand_in(texts: str, tokenizer: str, output: str, workers: str) -> None:
    """The work of preprocess_data.py: a pool maps lines to lists of ids, 32 at a time, and one process adds the documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{output}/corpus_text_document.bin", dtype=np.uint16)
    with (
        open(texts, encoding="utf-8") as file,
        multiprocessing.Pool(int(workers), _open_tokenizer, (tokenizer,)) as pool,
    ):
        for ids in pool.imap(_encode_line, file, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{output}/corpus_text_document.idx")


def stages(records: Path, tokenizer_path: Path, template_name: str | None) -> None:
    """Print the CPU microseconds per record of each stage in one process (minimum over blocks)."""
    from megatron_iwsft.data.chat_template import ChatTemplate
    from megatron_iwsft.data.prepare import encode
    from megatron_iwsft.data.prepare.filters import Curation
    from megatron_iwsft.data.prepare.readers import find_inputs, numbered_records, read_blocks
    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    template = ChatTemplate(tokenizer, template_name)
    fast = not isinstance(encode.gigatoken_encoder(tokenizer), str)
    encoder = encode.BlockEncoder(tokenizer, template, RecordFormat(score_fields=("score",)), Curation(), fast=fast)
    blocks = list(islice(read_blocks(find_inputs([records])[0]), 12))

    def best(function: Any, items: list[Any]) -> float:
        times = []
        for item, block in zip(items[2:-1], blocks[2:-1], strict=True):
            begin = time.process_time()
            function(item)
            times.append((time.process_time() - begin) / block.count * 1e6)
        return min(times)

    encoder(blocks[0])
    prepared = [encoder.prepare(block) for block in blocks]
    parsing = best(lambda b: list(numbered_records(b)), blocks)
    rendering = best(encoder.prepare, blocks) - parsing
    tokenizing = best(lambda rows: encoder._encode(rows.pieces, rows.counts), prepared)
    total = best(encoder, blocks)
    tokens = sum(encoder._encode(rows.pieces, rows.counts)[1].sum() for rows in prepared) / sum(b.count for b in blocks)
    print(
        f"  CPU time per record of {tokens:.0f} tokens: {total:.1f} µs ({tokens / total:.1f} M tokens/s per core): parsing "
        f"{parsing:.1f}, fields, template and checks {rendering:.1f}, tokenization {tokenizing:.1f}, masks, hashes and columns "
        f"{total - parsing - rendering - tokenizing:.1f}"
    )


def check(corpus_path: Path, records: Path, tokenizer_path: Path, template_name: str | None) -> None:
    """Compare the ids of every trajectory with those of the tokenizer's own library, piece by piece and as one text."""
    from megatron_iwsft.data.chat_template import ChatTemplate
    from megatron_iwsft.data.conversation import Conversation
    from megatron_iwsft.data.corpus import Corpus
    from megatron_iwsft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    template = ChatTemplate(tokenizer, template_name)
    corpus = Corpus.open(corpus_path)
    lines = corpus.meta(["line"])["line"].to_pylist()
    wrong = same_as_text = 0
    with open(records, encoding="utf-8") as file:
        texts = {n: json.loads(line) for n, line in enumerate(file, 1)}
    for i, line in enumerate(lines):
        record = texts[line]
        (trajectory,) = template.trajectories(
            Conversation(("user", "assistant"), [record["prompt"], record["response"]])
        )
        pieces = trajectory.texts
        own = [t for ids in tokenizer.encode_pieces(pieces) for t in ids]
        found = corpus.tokens(i).tolist()
        wrong += found != own
        same_as_text += found == [t for ids in tokenizer.encode_pieces(["".join(pieces)]) for t in ids]
    print(
        f"  ids of {len(lines):,} trajectories: {wrong} differ from the tokenizer's; {same_as_text:,} equal the ids of the full text"
    )


def open_with_megatron(corpus: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(corpus / "shard-00000"))
    print(
        f"  Megatron-Core's IndexedDataset opens shard-00000: {len(dataset):,} sequences, the first has {len(dataset[0])} tokens"
    )


if __name__ == "__main__":
    main()
