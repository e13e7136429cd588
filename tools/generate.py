"""Ask an exported model: tools/generate.py --model HF_DIR "What is 37 + 48?" …"""

from __future__ import annotations

import argparse

from megatron_iwsft.errors import CheckpointError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    import torch

    from megatron_iwsft.platform import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.convert import load_in_transformers

    model, tokenizer = load_in_transformers(args.model)
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{args.model} has no chat template.")
    for prompt in args.prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **ids,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        print(f"> {prompt}\n{tokenizer.decode(out[0, ids['input_ids'].shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    run_command(main)
