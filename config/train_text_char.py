# A character-level GPT on any text (data/text_char/prepare.py): about two minutes on a laptop's CPU.

out_dir = "out-text-char"
eval_interval = 225
eval_iters = 40
log_interval = 25

always_save_checkpoint = False

wandb_project = "text-char"
wandb_run_name = "small"

dataset = "text_char"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

optimizer = "muon"  # twice the progress of adamw in an iteration
learning_rate = 2e-2
min_lr = 0.0
warmup_iters = 20
max_iters = 900
lr_decay_iters = 950  # beyond max_iters: the last of the decay is too slow to be worth its time
beta1 = 0.85
beta2 = 0.99
grad_clip = 0.0  # Muon's steps have the same length whatever the gradient's
