# The quickest way we know to a good Shakespeare model on a laptop's CPU: nanoGPT's settings for a CPU
# (4 layers x 128, 64 characters of context) with Muon, which gets further in a fifth of the iterations.

out_dir = "out-shakespeare-cpu"
eval_interval = 420  # at the start and at the end: each costs as much as 30 iterations
eval_iters = 100
log_interval = 10

always_save_checkpoint = False

wandb_project = "shakespeare-char"
wandb_run_name = "cpu"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

optimizer = "muon"
learning_rate = 2e-2  # twenty times what AdamW alone has there: Muon's steps are of one length whatever the gradient's
min_lr = 0.0
warmup_iters = 10
max_iters = 420
lr_decay_iters = 480  # beyond max_iters: the last of the decay is too slow to be worth its time
beta1 = 0.85
beta2 = 0.99
grad_clip = 0.0  # Muon's steps do not grow with the gradient
