"""iw-SFT in a bare Megatron-Core training loop: torchrun --nproc_per_node 2 examples/iw_sft_in_a_megatron_loop.py

A stock GPTModel with tensor parallelism. What iw-SFT adds is marked [iw-SFT]; the rest is any Megatron-Core loop.
"""

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

import megatron_iwsft as iwsft
from megatron_iwsft.distributed.context import start

ROWS, LENGTH, VOCABULARY = 8, 32, 128


def main() -> None:
    platform = start()  # joins torchrun's job; on CPU it also stands in for torch.cuda, which Megatron-Core asks for
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=platform.world_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    size = dict(num_layers=2, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=platform.world_size)
    config = TransformerConfig(**size, hidden_dropout=0.0, attention_dropout=0.0, calculate_per_token_loss=True)
    gpt = GPTModel(config, gpt_layer_specs.get_gpt_layer_local_spec(), VOCABULARY, LENGTH).to(platform.device)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3), [model])

    torch.set_default_device(platform.device)
    data = torch.randint(VOCABULARY, (ROWS, LENGTH + 1))
    inputs = dict(input_ids=data[:, :-1], labels=data[:, 1:], position_ids=torch.arange(LENGTH).repeat(ROWS, 1),
                  attention_mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1))  # fmt: skip
    rows, mask, ones = torch.arange(ROWS).repeat_interleave(LENGTH), torch.ones(ROWS * LENGTH), torch.ones(ROWS)
    reference = -model(**inputs).flatten().detach()  # [iw-SFT] the initial policy's log-probs

    def loss(losses):  # Megatron-Core's loss per token is the negative log-prob
        t = iwsft.Trajectories(  # [iw-SFT] one trajectory per row, all of it trained on
            logprobs=-losses.flatten(), proposal=-losses.flatten().detach(), reference=reference, mask=mask, segment=rows,
            lengths=LENGTH * ones, quality=ones, segment_sum=iwsft.local_segment_sum(rows, ROWS))  # fmt: skip
        out = iwsft.micro_batch_loss(iwsft.iw_sft, t, iwsft.Settings(normalize="weights"))
        totals.add(out)
        return out.loss, torch.ones((), dtype=torch.int), {}

    for _ in range(5):
        model.zero_grad_buffer()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        totals = iwsft.LossTotals(iwsft.iw_sft, platform.device, dp_cp=group)  # [iw-SFT] one denominator for all
        config.finalize_model_grads_func = totals.finalize
        get_forward_backward_func()(forward_step_func=lambda _, model: (model(**inputs), loss), data_iterator=None, model=model,
                                    num_microbatches=1, seq_length=LENGTH, micro_batch_size=ROWS, forward_only=False)  # fmt: skip
        optimizer.step()
        if platform.rank == 0:
            print("loss {loss:.4f}, mean weight {weight_mean:.4f}".format(**totals.metrics()))


if __name__ == "__main__":
    main()
