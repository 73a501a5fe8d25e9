# The loss of OpenAI's GPT-2 (124M parameters) on the dataset, OpenWebText unless --dataset= names another.
# Trains nothing. nanoGPT publishes 3.11 (train) and 3.12 (val) on OpenWebText.

init_from = "gpt2"
eval_only = True
eval_iters = 500  # many, for a good estimate
batch_size = 8
