# GPT-2 (124M) on 10 billion tokens of FineWeb, with the published settings of llm.c's reproduction. The val loss is
# expected to end near 3.3, which is not measured here. On 8 GPUs of one machine:
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fineweb.py
# llm.c: https://github.com/karpathy/llm.c/discussions/481

out_dir = "out-gpt2-fineweb"
dataset = "fineweb"
order = "epoch"  # the run is a little shorter than a pass: no token comes twice

wandb_project = "fineweb"
wandb_run_name = "gpt2-124M"

# 16 sequences x 1024 tokens x 32 micro-batches = 524,288 tokens an iteration
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8

max_iters = 18864  # the last of 18,865 iterations
lr_decay_iters = 18865
warmup_iters = 700
learning_rate = 6e-4
min_lr = 0.0
weight_decay = 1e-1
grad_clip = 1.0

eval_interval = 250
eval_iters = 200
log_interval = 10
