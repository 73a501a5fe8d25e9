# The loss of OpenAI's GPT-2 medium (350M parameters) on the dataset, OpenWebText unless --dataset= names another.
# Trains nothing. nanoGPT publishes 2.85 (train) and 2.84 (val) on OpenWebText.

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
