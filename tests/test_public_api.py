"""`import megatron_iwsft` provides the operator, the objectives and the loss, and changes nothing in the process."""

from __future__ import annotations

import pytest

import megatron_iwsft as iwsft
from tests.support import run_python


def test_every_name_exists() -> None:
    for name in iwsft.__all__:
        assert getattr(iwsft, name) is not None
    assert set(dir(iwsft)) == set(iwsft.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = iwsft.nothing


PROGRAM = """
import sys
import megatron_iwsft as iwsft
assert "torch" not in sys.modules

import torch
import torch.distributed as dist

before = {name: value for name, value in vars(torch.cuda).items()}
all_to_all = dist.all_to_all_single
mask, segment = torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])
t = iwsft.Trajectories(
    logprobs=torch.full((6,), -1.0, requires_grad=True), proposal=torch.full((6,), -1.0), reference=torch.full((6,), -1.5), mask=mask,
    segment=segment, lengths=torch.tensor([3.0, 3.0]), quality=torch.ones(2), segment_sum=iwsft.local_segment_sum(segment, 2))
out = iwsft.micro_batch_loss(iwsft.iw_sft, t, iwsft.Settings())
out.loss.backward()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
totals = iwsft.LossTotals(iwsft.iw_sft, torch.device("cpu"), dp_cp=dist.group.WORLD)
totals.add(out)
totals.reduce()
assert abs(totals.metrics()["weight_mean"] - 2.718281828 ** 0.5) < 1e-6
weight = torch.randn(10, 4, requires_grad=True)
targets = torch.tensor([1, 2, iwsft.IGNORE])
iwsft.vocab_parallel_logprob(torch.randn(3, 4), weight, targets, group=dist.group.WORLD, vocab_size=10).sum().backward()

assert not [name for name in sys.modules if name.split(".")[0] == "megatron"], "Megatron-Core was imported"
from megatron_iwsft.convert.import_hf import import_directory
from megatron_iwsft.convert.parity import verify
import_directory(sys.argv[1], sys.argv[2])
assert verify(sys.argv[1], sys.argv[2], "What is 12 plus 30?")[0].max_difference < 1e-4
changed = {name for name, value in vars(torch.cuda).items() if before.get(name, value) is not value}
assert not changed, f"torch.cuda has changed: {changed}"
assert dist.all_to_all_single is all_to_all
with torch.overrides.BaseTorchFunctionMode() as mode:
    assert torch.overrides._len_torch_function_stack() == 1
"""


@pytest.mark.command
@pytest.mark.parallel
def test_the_api_works_without_megatron_core_and_changes_nothing_in_the_process(tmp_path) -> None:
    from tests.convert.test_convert import model_with_tokenizer

    source = model_with_tokenizer(tmp_path / "hf")
    program = tmp_path / "program.py"
    program.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in PROGRAM.splitlines()))
    done = run_python(program, source, tmp_path / "ck")
    assert done.returncode == 0, done.stdout + done.stderr
