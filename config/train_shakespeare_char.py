# A character-level GPT on tiny Shakespeare: the baby GPT, minutes on a GPU.

out_dir = "out-shakespeare-char"
eval_interval = 250  # often: a model of this size overfits this little text
eval_iters = 200
log_interval = 10

always_save_checkpoint = False  # as it overfits, keep the best

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # a small model bears a higher one
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # an iteration has few tokens: average over more of them

warmup_iters = 100
