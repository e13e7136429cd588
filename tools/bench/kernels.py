"""What the Triton kernels compile to, without a GPU: tools/bench/kernels.py [options]

Compiles every kernel with the compiler in Triton's wheel, as a launch on the operator's buffer would, and reads the machine code.

instructions  executed per logit; of statistics over a whole row, of the gradient in a full block without the target
loads         bits per load of a full block of logits
spills        bytes of registers that do not fit and go through memory
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_iwsft.utils.cli import run_command

VOCABULARIES = (32_000, 32_001, 50_257, 128_256, 151_936, 256_000)
CAPABILITIES = (90, 100)
KERNELS = ("statistics", "statistics with entropy", "gradient")
DTYPES = ("bf16", "fp32")
_WARPS = 4  # Triton's default, which the launches do not change


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one GPU: see the module's docstring."""

    kernel: str
    capability: int
    dtype: str
    vocabulary: int
    instructions: float
    load_bits: int
    registers: int
    spills: int
    shared: int


def compile_kernel(kernel: str, capability: int, dtype: str, vocabulary: int) -> Compiled:
    """Compile for a GPU of this compute capability, which need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_iwsft.ops import logits_triton as kernels

    gradient = kernel == "gradient"
    function = kernels.gradient_kernel if gradient else kernels.statistics_kernel
    constants = {"COLUMNS": vocabulary, "BLOCK": kernels.BLOCK}
    signature = {"logits": f"*{dtype}", "target": "*i64", "row_stride": "i32"}
    if gradient:
        signature |= {"lse": "*fp32", "grad": "*fp32"}
    else:
        constants["ENTROPY"] = kernel.endswith("entropy")
        signature |= {"out": "*fp32", "out_stride": "i32"}
    # What a launch finds divisible by 16 and specialises on: the address of the logits, and their row stride.
    divisible = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("logits", "row_stride")}
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs=divisible,
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    instructions = _instructions(code)
    # One program covers a row of statistics, or one block of a row's gradient: here one that is full and without the target, as most are.
    if gradient:
        executed, columns = _shortest_path_with(instructions, "STG.E.128"), kernels.BLOCK
    else:
        executed, columns = _executed(instructions, vocabulary // kernels.BLOCK), vocabulary
    return Compiled(
        kernel,
        capability,
        dtype,
        vocabulary,
        instructions=executed * 32 * _WARPS / columns,
        load_bits=_widest_load(instructions),
        registers=registers,
        spills=stack + local,
        shared=built.metadata.shared,
    )


def _cuobjdump(option: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class _Instruction:
    """target: address that a branch goes to, else None."""

    address: int
    text: str

    @property
    def target(self) -> int | None:
        found = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def is_conditional(self) -> bool:
        return self.text.startswith("@") or re.search(r"\bBRA\S* !?U?P", self.text) is not None


def _instructions(code: str) -> list[_Instruction]:
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code, re.MULTILINE)
    all_of_them = [_Instruction(int(address, 16), text) for address, text in found]
    # A kernel ends in a branch to itself and padding, which are never executed.
    return [i for i in all_of_them if i.text != "NOP" and i.target != i.address]


def _executed(instructions: list[_Instruction], trips: int) -> int:
    """Instructions of a thread: those in the loop (the longest backward branch) as often as it runs, all others once."""
    loops = [(i.target, i.address) for i in instructions if i.target is not None and i.target <= i.address]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    inside = sum(begin <= i.address <= end for i in instructions)
    return len(instructions) + inside * (trips - 1) if inside else len(instructions)


def _shortest_path_with(instructions: list[_Instruction], opcode: str) -> int:
    """The shortest way from the first instruction to an exit, without going back, that passes an unmasked instruction of this kind."""
    position = {i.address: n for n, i in enumerate(instructions)}
    lengths, stack = [], [(0, 0, False)]
    while stack:
        at, length, passed = stack.pop()
        while at < len(instructions):
            now = instructions[at]
            length, passed, at = length + 1, passed or now.text.startswith(opcode), at + 1
            if now.target is not None and now.target > now.address:
                if now.is_conditional:
                    stack.append((position[now.target], length, passed))
                else:
                    at = position[now.target]
            elif now.text.startswith("EXIT"):
                break
        if passed:
            lengths.append(length)
    return min(lengths)


def _widest_load(instructions: list[_Instruction]) -> int:
    """Bits of the widest load from global memory."""
    widths = [re.search(r"\bLDG\.E(?:\.\w+)*?\.(64|128)\b", i.text) for i in instructions if "LDG" in i.text]
    return max(int(width[1]) if width else 32 for width in widths)


def table(args: argparse.Namespace) -> Iterator[Compiled]:
    for kernel, capability, dtype, vocabulary in itertools.product(
        args.kernel, args.capability, args.dtype, args.vocabulary
    ):
        yield compile_kernel(kernel, capability, dtype, vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--capability", nargs="+", type=int, default=CAPABILITIES, help="90: Hopper, 100: Blackwell")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--vocabulary", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    if not args.json:
        import triton

        print(f"Triton {triton.__version__}, {_WARPS} warps per program")
        head = f"{'kernel':24} {'GPU':6} {'dtype':5} {'V':>8} {'instructions':>13}"
        print(f"{head} {'loads':>9} {'registers':>10} {'spills':>7} {'shared':>8}")
    for c in table(args):
        if args.json:
            print(json.dumps(asdict(c)), flush=True)
        else:
            print(
                f"{c.kernel:24} sm_{c.capability:<3} {c.dtype:5} {c.vocabulary:>8,} {c.instructions:>13.2f} {c.load_bits:>4} bits "
                f"{c.registers:>10} {c.spills:>5} B {c.shared:>6} B",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main)
