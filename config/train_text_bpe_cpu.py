# A GPT on any text in its own tokens (data/text_bpe/prepare.py --vocab_size=4096): about two minutes on a laptop's CPU.

out_dir = "out-text-bpe"
eval_interval = 225
eval_iters = 20
log_interval = 25

always_save_checkpoint = False

wandb_project = "text-bpe"
wandb_run_name = "small"

dataset = "text_bpe"
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
