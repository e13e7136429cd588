"""The log-prob operator alone: torchrun --nproc_per_node 2 examples/logprobs_under_torchrun.py

Each process holds half of a vocabulary's output projection. The operator returns the log-probs of the targets and their gradients,
without the logits of all tokens ever existing at once, and here agrees with torch's log-softmax over the full vocabulary.
"""

import torch
import torch.distributed as dist

import megatron_iwsft as iwsft

TOKENS, HIDDEN, VOCABULARY = 64, 32, 1000


def main() -> None:
    dist.init_process_group("gloo")
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # the same on every process
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::3] = iwsft.IGNORE  # positions that are not trained on cost nothing

    own = weight.chunk(size)[rank].clone().requires_grad_()
    logprobs = iwsft.vocab_parallel_logprob(hidden, own, targets, group=group, vocab_size=VOCABULARY)
    (-logprobs.sum()).backward()

    trained = targets != iwsft.IGNORE
    full = torch.log_softmax(hidden @ weight.T, dim=-1)[trained].gather(1, targets[trained, None])[:, 0]
    difference = (logprobs[trained] - full).abs().max().item()
    if rank == 0:
        print(f"{size} processes, {int(trained.sum())} trained tokens: log-probs differ by at most {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
