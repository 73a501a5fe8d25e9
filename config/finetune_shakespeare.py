# OpenAI's GPT-2 finetuned on tiny Shakespeare. GPT-2 XL takes some 25 GB with its gradients and optimizer state, and
# activations: on a smaller device start from --init_from=gpt2 (124M) or gpt2-medium.
# python data/shakespeare/prepare.py comes first.

import time

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits within a few passes: keep the best only
wandb_project = "shakespeare"
wandb_run_name = f"ft-{time.time()}"

# 1 sequence x 32 x 1024 tokens = 32,768 tokens an iteration: the 301,966 of the training text in 9.2 of them
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# a constant learning rate, small enough to keep what GPT-2 knows
learning_rate = 3e-5
decay_lr = False
